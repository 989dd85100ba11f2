"""The DALI path against its PIL twin, picture by picture, and the traps of DALI that it must not fall into."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltfast.data import check
from ltfast.data.check import check_dataset
from ltfast.data.large_views import (
    IMAGENET_STD,
    RECIPES,
    Crop,
    ViewRecipe,
    crop_windows,
    draw_view,
    evaluation_window,
    view_recipes,
)
from ltfast.data.lists import ImageList
from ltfast.data.paths import PathTable
from ltfast.data.rng import epoch_key
from ltfast.data.torch_source import TorchSource, evaluation_crop
from ltfast.errors import UserError
from tests.data import bad_files
from tests.data.pictures import data_folder, make_set, needs_dali, picture
from tests.data.test_large_source import epoch, ids, open_source, read_lists

needs_dali()

from ltfast.data import dali_pipeline, dali_source  # noqa: E402
from ltfast.data.dali_schedule import part_size, spans  # noqa: E402
from ltfast.data.dali_source import DaliSource  # noqa: E402

LEVELS = torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255


def folder_lists(folder: Path, names: list[str]) -> dict[str, ImageList]:
    images = ImageList(folder, PathTable.of(names), np.arange(len(names), dtype=np.int32), "made")
    return {"train": images, "val": images, "test": images}


def both(lists: dict[str, ImageList], num_views: int, views: str = "imagenet", size: int = 96, **options) -> list:
    n = len(lists["train"])
    options = {"views": view_recipes(views, num_views), "image_size": size, "batch": n, "seed": 3, **options}
    return [kind(lists, workers=workers, **options) for kind, workers in ((DaliSource, 2), (TorchSource, 0))]


def levels_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean difference of each picture on the 0..255 scale."""
    return ((a - b).abs() * LEVELS).mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, ImageList]:
    """48 pictures of many shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    names = []
    for seed in range(48):
        width, height = 60 + 37 * seed % 200, 50 + 53 * seed % 180
        picture(seed, width, height).save(folder / f"{seed}.jpg", quality=93, subsampling=seed % 3)
        names.append(f"{seed}.jpg")
    return folder_lists(folder, names)


# Mean difference in levels (largest picture in brackets): observed 0.17 (0.3) for crops; 1.1 (1.8) with jitter,
# where PIL cuts fractions off and holds hue in 256 steps; 1.3 (6) with RandAugment (bicubic's constant, equalize
# after a rounding difference).
@pytest.mark.parametrize(
    ("views", "num_views", "view", "mean", "worst"),
    [("crop", 1, 0, 0.4, 1.0), ("crop", 3, 2, 0.4, 1.0), ("imagenet", 3, 0, 2.0, 20.0), ("imagenet", 3, 1, 1.8, 4.0)],
)
def test_both_paths_show_the_same_pictures(pictures, views, num_views, view, mean, worst):
    a, b = (next(source.train(0)) for source in both(pictures, num_views, views))
    assert torch.equal(a.index, b.index)
    apart = levels_apart(a.views[view], b.views[view])
    assert apart.mean() < mean
    assert apart.max() < worst
    # Another crop, another flip, the neighbour's picture: all are far away.
    assert levels_apart(a.views[view].flip(3), b.views[view]).mean() > 4 * mean
    assert levels_apart(a.views[view].roll(1, 0), b.views[view]).mean() > 10 * mean


def test_real_pictures_too(tmp_path):
    import tarfile

    with tarfile.open(data_folder() / "imagenet_sample_256.tar") as tar:
        members = sorted((m for m in tar.getmembers() if m.isfile()), key=lambda m: m.name)[::8]
        names = [Path(m.name).name for m in members]
        for name, member in zip(names, members, strict=True):
            (tmp_path / name).write_bytes(tar.extractfile(member).read())
    dali, torch_path = both(folder_lists(tmp_path, names), 3, size=128)
    a, b = next(dali.train(1)), next(torch_path.train(1))
    for view, mean in ((0, 2.0), (1, 1.6), (2, 1.6)):  # observed 1.3, 1.1, 1.0
        assert levels_apart(a.views[view], b.views[view]).mean() < mean
    a, b = next(dali.evaluate("val")), next(torch_path.evaluate("val"))
    assert levels_apart(a.views[0], b.views[0]).max() < 0.5  # observed 0.2


@pytest.mark.parametrize("size", [64, 97])
def test_evaluation_equals_resize_and_centre_crop(pictures, size):
    dali, torch_path = both(pictures, 1, size=size)
    a, b = next(dali.evaluate("val")), next(torch_path.evaluate("val"))
    assert torch.equal(a.index, b.index)
    assert levels_apart(a.views[0], b.views[0]).max() < 0.6  # observed 0.26
    moved = levels_apart(a.views[0][..., 1:], b.views[0][..., :-1])
    assert moved.mean() > 2, "one pixel off is seen"


def test_odd_files_decode_alike_and_exif_is_not_applied(tmp_path):
    paths = bad_files.write(tmp_path, dict(bad_files.odd_files()))
    paths |= bad_files.write(tmp_path, dict(bad_files.damaged_files()))
    lists = folder_lists(tmp_path, [p.name for p in paths.values()])
    dali, torch_path = both(lists, 1, size=48)
    a, b = (next(source.evaluate("val")).views[0] for source in (dali, torch_path))
    apart = levels_apart(a, b)
    assert apart.max() < 0.6, dict(zip(paths, apart.tolist(), strict=True))
    rotated = Image.open(paths["EXIF orientation 6"])
    upright = np.asarray(evaluation_crop(rotated.convert("RGB"), 48))
    place = list(paths).index("EXIF orientation 6")
    shown = dali.finisher.plain(torch.from_numpy(upright.copy())[None])
    assert levels_apart(a[place : place + 1], shown).max() < 0.6
    turned = dali.finisher.plain(torch.from_numpy(np.rot90(upright, -1).copy())[None])
    assert levels_apart(a[place : place + 1], turned).max() > 10, "DALI's default would rotate"


def test_crop_windows_of_the_graph_are_those_of_the_twin():
    """The windows themselves, for shapes where no candidate fits too."""
    fn, types = dali_pipeline._dali().fn, dali_pipeline._dali().types
    n = 64
    crop = draw_view(ViewRecipe(scale=(0.5, 1.0)), epoch_key(0, 0), torch.arange(n), 0).crop
    sizes = torch.stack([torch.arange(n) % 40 + 1, (torch.arange(n) * 7) % 300 + 1], dim=1)
    pipeline = dali_pipeline._dali().Pipeline(batch_size=n, num_threads=1, device_id=None, prefetch_queue_depth=1)
    arrays = [sizes.numpy(), *(part[:, None].numpy() for part in crop)]
    with pipeline:
        size, across, down, place = fn.external_source(lambda: arrays, num_outputs=4, batch=True)
        windows = dali_pipeline._windows(size, across, down, place)
        pipeline.set_outputs(*(fn.cast(w, dtype=types.INT64) for w in windows))
    pipeline.build()
    got = torch.stack([torch.from_dlpack(o.as_tensor()).flatten().clone() for o in pipeline.run()], dim=1)
    expected = crop_windows(crop, sizes)
    assert torch.equal(got, expected)
    assert (expected[:, 3] < sizes[:, 1]).any()
    assert (crop_windows(Crop(crop.across * 1.1, crop.down, crop.place), sizes) != expected).any()


def test_centre_windows_of_the_graph_are_those_of_the_twin():
    fn = dali_pipeline._dali().fn
    sizes = torch.tensor([[h, w] for h in (31, 96, 97, 98, 99, 640) for w in (33, 96, 101, 102, 103, 480)])
    n = len(sizes)
    for side in (64, 97):
        pipeline = dali_pipeline._dali().Pipeline(batch_size=n, num_threads=1, device_id=None, prefetch_queue_depth=1)
        with pipeline:
            size = fn.external_source(lambda: sizes.double().numpy(), batch=True)
            pipeline.set_outputs(*dali_pipeline._centre(size, side))
        pipeline.build()
        start, end = (torch.from_dlpack(o.as_tensor()).clone() for o in pipeline.run())
        for i, (height, width) in enumerate(sizes.tolist()):
            tall, wide, top, left = evaluation_window(height, width, side)
            scale = torch.tensor([height / tall, width / wide], dtype=torch.float64)
            torch.testing.assert_close(start[i], torch.tensor([top, left]).double() * scale)
            torch.testing.assert_close(end[i] - start[i], side * scale)


def test_no_random_number_is_drawn_by_dali(pictures, monkeypatch):
    """Pipelines are built without a seed (so DALI takes the clock's), yet two of them show the same pictures."""
    fn = dali_pipeline._dali().fn
    for name in ("uniform", "coin_flip", "normal"):
        monkeypatch.setattr(fn.random, name, lambda *a, **k: pytest.fail("DALI's own random operator"))
    a, b = (next(both(pictures, 3)[0].train(2)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_flips_are_those_drawn(pictures):
    source = both(pictures, 1, "crop")[0]
    batch = next(source.train(0))
    draw = draw_view(RECIPES["crop"][0], epoch_key(3, 0), torch.arange(48), 0)
    assert 10 < draw.flip.sum() < 38
    unflipped = draw._replace(flip=torch.zeros(48, dtype=torch.bool))
    from ltfast.data.decode import load_picture
    from ltfast.data.torch_source import augment, pixels

    straight = torch.stack(
        [
            pixels(augment(load_picture(source.lists["train"].file(int(j))), unflipped, i, 96))
            for i, j in enumerate(batch.index)
        ]
    )
    plain = source.finisher.plain(straight)
    mirrored = levels_apart(batch.views[0], plain.flip(3)) < levels_apart(batch.views[0], plain)
    assert torch.equal(mirrored, draw.flip)


def test_one_pipeline_runs_through_epochs_and_evaluations(tmp_path, monkeypatch):
    source = open_source("dali", make_set(tmp_path, (9, 7)))
    built = []
    monkeypatch.setattr(
        dali_source, "train_pipeline", lambda *a, **k: built.append(1) or dali_pipeline.train_pipeline(*a, **k)
    )
    for number in range(3):
        epoch(source, number)
        list(source.evaluate("val"))
    assert len(built) == 1
    epoch(source, 1)
    assert len(built) == 2, "going back needs a new one"
    running = source.train(2)
    next(running)
    epoch(source, 0)
    assert len(built) == 3, "the running epoch kept its own"
    assert ids(list(running)) == source.epoch_indices(2)[1:].tolist()
    source.set_groups(torch.tensor([0, 1]))
    epoch(source, 3)
    assert len(built) == 4, "prefetched steps had been drawn with the old groups"


def test_a_dropped_source_frees_its_pipelines_without_the_garbage_collector(tmp_path, monkeypatch):
    """In a cycle they would wait for the collector, and one collected in a forked worker hangs it."""
    alive = []

    def watched(*args, **options):
        pipeline = dali_pipeline.train_pipeline(*args, **options)
        alive.append(weakref.ref(pipeline))
        return pipeline

    monkeypatch.setattr(dali_source, "train_pipeline", watched)
    root = make_set(tmp_path, (9, 7))
    (root / read_lists(root)["train"].paths[4]).write_bytes(b"")  # DALI dies of it
    source = open_source("dali", root, num_views=3)
    gc.collect()
    gc.disable()
    try:
        epoch(source, 0)
        epoch(source, 0)
        running = source.train(5)
        next(running)
        del running
        assert [ref() is None for ref in alive] == [True, True, True, True]
        epoch(source, 1)
        del source
        assert alive[-1]() is None
    finally:
        gc.enable()


def test_kept_batches_stay_as_they_were(tmp_path):
    source = open_source("dali", make_set(tmp_path, (20, 20)), num_views=3)
    kept = epoch(source, 0)
    copies = [[v.clone() for v in b.views] for b in kept]
    for number in range(1, 4):
        epoch(source, number)
    gc.collect()
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.views, copy, strict=True))


def test_a_failure_without_a_culprit_is_dalis_own(tmp_path, monkeypatch):
    root = make_set(tmp_path, (9, 7))
    source = open_source("dali", root)

    class Broken:
        def build(self):
            pass

        def run(self):
            raise RuntimeError("out of memory, say")

    monkeypatch.setattr(dali_source, "train_pipeline", lambda *a, **k: Broken())
    with pytest.raises(RuntimeError, match="out of memory, say"):
        next(source.train(0))


OPERATOR = """Critical error in pipeline:
Error in {} operator `nvidia.dali.fn.decoders.image`,
which was used in the pipeline definition with the following traceback:

  File "/home/out of memory/CUDA runtime API error.py", line 126, in decode_pipeline
    pipeline.set_outputs(fn.decoders.image(raw, **_decoder(None)))

encountered:

{}
Current pipeline object is no longer valid."""


@pytest.mark.parametrize(("said", "kind"), [
    (OPERATOR.format("MIXED", "CUDA allocation failed"), torch.OutOfMemoryError),
    (OPERATOR.format("GPU", "Can't allocate 1073741824 bytes on device 0."), torch.OutOfMemoryError),
    ("Critical error in pipeline: CUDA allocation failed", torch.OutOfMemoryError),
    (OPERATOR.format("MIXED", "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory"), torch.OutOfMemoryError),
    (OPERATOR.format("MIXED", "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal memory access"), RuntimeError),
    (OPERATOR.format("MIXED", "CUDA driver API error CUDA_ERROR_ECC_UNCORRECTABLE (214)"), RuntimeError),
    (OPERATOR.format("MIXED", "Can't allocate 4096 bytes on host."), RuntimeError),
])  # fmt: skip
@pytest.mark.parametrize("when", ["build", "run"])
def test_a_fault_of_the_device_is_raised_before_any_file_is_looked_at(tmp_path, monkeypatch, when, said, kind):
    """A decode of all files under way by PIL takes minutes, and would end in the same error."""
    monkeypatch.setattr(DaliSource, "_find_bad", lambda *_: pytest.fail("looked for a bad file"))
    kind = UserError if when == "build" and kind is RuntimeError else kind
    with pytest.raises(kind) as caught:
        next(failing_source(tmp_path, monkeypatch, said, when).train(0))
    assert caught.type is kind
    assert (
        "operator" not in str(caught.value) or kind is RuntimeError
    )  # the message without DALI's traceback, or as it was


def test_a_gpu_that_dali_cannot_use_and_a_failure_without_a_culprit_say_what_to_do(tmp_path, monkeypatch):
    driver = "CUDA driver version is insufficient for CUDA runtime version"
    with pytest.raises(UserError, match=rf"DALI cannot work on this GPU \({driver}\); --loader torch does without it"):
        next(failing_source(tmp_path / "a", monkeypatch, driver, "build").train(0))
    with pytest.raises(
        RuntimeError, match=r"DALI: Failed to decode sample #2; no picture is to blame, .* a smaller --batch"
    ):
        next(
            failing_source(tmp_path / "b", monkeypatch, OPERATOR.format("MIXED", "Failed to decode sample #2")).train(0)
        )


def test_the_number_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [dali_source.device_number(torch.device(name)) for name in ("cpu", "cuda", "cuda:1")] == [None, 3, 1]


@pytest.mark.parametrize(
    "said", ["Failed to decode sample #0 :", "nvImageCodec failure: '#3'", "nvjpeg (CUDA decoder): bad code stream"]
)
def test_a_bad_picture_on_the_device_is_looked_for(tmp_path, monkeypatch, said):
    def find(*_):
        raise LookupError

    monkeypatch.setattr(DaliSource, "_find_bad", find)
    with pytest.raises(LookupError):
        next(failing_source(tmp_path, monkeypatch, OPERATOR.format("MIXED", said)).train(0))


def failing_source(folder: Path, monkeypatch, said: str, when: str = "run") -> DaliSource:
    """A source on a device whose pipeline fails with these words, when it is built or run."""
    source = open_source("dali", make_set(folder, (9, 7)))

    class Broken:
        def build(self):
            if when == "build":
                raise RuntimeError(said)

        def run(self, stream):
            raise RuntimeError(said)

    monkeypatch.setattr(dali_source, "train_pipeline", lambda *a, **k: Broken())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    source.device_id = 0
    return source


def test_a_file_that_only_dali_refuses_is_found(tmp_path, monkeypatch, caplog):
    root = make_set(tmp_path, (9, 7))
    lists = read_lists(root)
    (root / lists["train"].paths[3]).write_bytes(bad_files.bad_files()["GIF"])
    for name in ("_by_header", "_by_pil"):
        monkeypatch.setattr(dali_source, name, lambda images, i: "")
    shown = {i for batch in epoch(open_source("dali", root, num_views=3), 0) for i in batch.index.tolist()}
    assert 3 not in shown
    assert "DALI cannot decode it, --loader torch can: " in caplog.text


@pytest.mark.parametrize(("mode", "what"), [("1", "no BitsPerSample"), ("I", "32 bits a sample")])
def test_a_tiff_that_dali_does_not_read_is_named_before_training_and_in_it(tmp_path, monkeypatch, mode, what):
    """Whatever the path; PIL reads it."""
    (tmp_path / "odd.tif").write_bytes(bad_files.tiff(mode))
    picture(1).save(tmp_path / "good.jpg")
    reason = f"{what}, which DALI does not read as it is; --loader torch does"
    lists = folder_lists(tmp_path, ["odd.tif", "good.jpg"])
    dali, torch_path = both(lists, 1, size=48)
    with pytest.raises(UserError, match=reason):
        next(dali.evaluate("test"))
    assert len(next(torch_path.evaluate("test")).index) == 2
    assert dali_source._by_header(lists["train"], 0) == reason, "under another name DALI dies of it"
    for full in (False, True):
        assert check_dataset(lists, full=full).splits[0].bad == [("odd.tif", reason)]
    monkeypatch.setattr(check, "dali_available", lambda: False)
    assert not check_dataset(lists, full=True).bad


@pytest.mark.parametrize("white", [255, 99, 65535, 4095])
def test_a_white_that_dali_does_not_scale_is_found_before_training(tmp_path, white):
    """12-bit pictures in PGMs that say so: PIL stretches them, DALI leaves 16 levels."""
    levels = np.linspace(0, white, 48 * 48).reshape(48, 48).astype(">u2" if white > 255 else "u1")
    (tmp_path / "a.pgm").write_bytes(b"P5 # levels\n48 48 %d\n" % white + levels.tobytes())
    lists = folder_lists(tmp_path, ["a.pgm"])
    dali, torch_path = (next(s.evaluate("test")).views[0] for s in both(lists, 1, size=48))
    scaled = bool(torch.allclose(dali, torch_path, atol=0.05))
    assert scaled == (white in (255, 65535))
    assert check_dataset(lists).splits[0].bad == (
        [] if scaled else [("a.pgm", f"its white is {white}, which DALI does not scale; --loader torch does")]
    )


def test_labels_follow_the_substitute_when_prefetch_ran_ahead(tmp_path):
    """The error belongs to the oldest batch outstanding, though younger ones were already asked for."""
    root = make_set(tmp_path, (12, 12), val=1)
    lists = read_lists(root)
    for position in (0, 5, 13):
        (root / lists["train"].paths[position]).write_bytes(b"")
    source = open_source("dali", root, batch=3, num_views=3)
    batches = epoch(source, 0)
    assert len(batches) == 8
    assert not {0, 5, 13} & {i for b in batches for i in b.index.tolist()}
    for batch in batches:
        assert torch.equal(batch.labels, source.train_labels[batch.index])


@pytest.mark.parametrize("num_views", [1, 3])
def test_the_parts_of_a_batch_change_nothing(tmp_path, monkeypatch, num_views):
    """Nor does a bad file in the middle part: the step begins anew."""
    root = make_set(tmp_path, (20, 17))
    lists = read_lists(root)
    lists["test"] = lists["train"]
    found = []
    for size in (1, 5, 18, 100):
        monkeypatch.setattr(dali_source, "part_size", lambda device, threads, batch, size=size: min(size, batch))
        source = open_source("dali", root, lists, batch=18, num_views=num_views, on_bad_image="skip")
        assert source.part == min(size, 18)
        found.append([*epoch(source, 0), *source.evaluate("test", batch=30)])
    for batches in found[1:]:
        for a, b in zip(batches, found[0], strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.labels, b.labels)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    monkeypatch.setattr(dali_source, "part_size", lambda *_: 5)
    (root / lists["train"].paths[int(found[0][0].index[7])]).write_bytes(b"")
    source = open_source("dali", root, lists, batch=18, num_views=num_views, on_bad_image="skip")
    again = [*epoch(source, 0), *source.evaluate("test", batch=30)]
    assert [len(b.index) for b in again] == [18, 18, 18, 29, 7]
    assert (again[0].index != found[0][0].index).nonzero().flatten().tolist() == [7]
    others = torch.arange(18) != 7
    assert torch.equal(again[0].views[0][others], found[0][0].views[0][others])


def test_parts_are_even_and_complete():
    for total, size in ((1, 16), (16, 16), (17, 16), (64, 16), (65, 16), (256, 100)):
        numbers = [list(range(total))[span] for span in spans(total, size)]
        assert [i for part in numbers for i in part] == list(range(total))
        lengths = [len(part) for part in numbers]
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
    assert part_size("cpu", 2, 256) == 16
    assert part_size("cpu", 12, 256) == 96
    assert part_size("cpu", 12, 30) == 30
    assert part_size("cuda", 2, 256) == 256


def test_the_gpu_graph_can_be_defined():
    """Named arguments must be CPU values, conditions too: a wrong placement is refused here, without a GPU."""
    for views in (1, 3):
        dali_pipeline.train_pipeline(
            lambda info: (), views=views, loose=True, image_size=64, batch=4, threads=1, device_id=0
        )
    dali_pipeline.evaluation_pipeline(lambda info: (), loose=False, image_size=64, batch=4, threads=1, device_id=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_views", [1, 3])
def test_bad_files_are_replaced_on_a_gpu(tmp_path, num_views):
    root = make_set(tmp_path, (20, 20))
    images, bad = read_lists(root)["train"], list(bad_files.bad_files().values())[:10]
    for position, data in enumerate(bad):
        (root / images.paths[position]).write_bytes(data)
    shown = {
        i for b in epoch(open_source("dali", root, num_views=num_views, device="cuda"), 0) for i in b.index.tolist()
    }
    assert not shown & set(range(len(bad)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_odd_files_decode_alike_on_a_gpu(tmp_path):
    paths = bad_files.write(tmp_path, dict(bad_files.odd_files()))
    lists = folder_lists(tmp_path, [p.name for p in paths.values()])
    on_cpu, on_gpu = (
        next(both(lists, 1, size=48, device=d)[0].evaluate("val")).views[0].cpu() for d in ("cpu", "cuda")
    )
    apart = levels_apart(on_cpu, on_gpu)
    assert apart.max() < 1.0, dict(zip(paths, apart.tolist(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_pictures_equal_cpu_pictures(pictures):
    """jpeg_fancy_upsampling is on: without it subsampled JPEGs differ by whole levels."""
    for num_views in (1, 3):
        on_cpu = both(pictures, num_views)[0]
        on_gpu = both(pictures, num_views, device="cuda")[0]
        a, b = next(on_cpu.train(0)), next(on_gpu.train(0))
        assert b.views[0].is_contiguous(memory_format=torch.channels_last)
        for x, y in zip(a.views, b.views, strict=True):
            assert levels_apart(x, y.cpu()).mean() < 1.0
    a, b = (next(both(pictures, 1, device=d)[0].evaluate("val")) for d in ("cpu", "cuda"))
    assert levels_apart(a.views[0], b.views[0].cpu()).mean() < 0.5
