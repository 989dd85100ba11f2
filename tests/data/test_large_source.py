"""What every loader of large pictures promises: order, shards, resume, bad files, evaluation. One suite, all
loaders.
"""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from ltfast.data.base import Source
from ltfast.data.dali_pipeline import dali_available
from ltfast.data.large_source import LargeSource, Substitutes, available_cores, own_cores
from ltfast.data.large_views import view_recipes
from ltfast.data.lists import ImageList, read_list
from ltfast.data.paths import PathTable
from ltfast.data.synthetic_source import SyntheticSource
from ltfast.data.torch_source import TorchSource
from ltfast.data.webdataset import read_shards
from ltfast.errors import UserError
from ltfast.resume import check_data
from tests.data import bad_files
from tests.data.pictures import make_set, needs_dali

LOADERS = ["torch", "torch-workers", "dali"]
COUNTS = (9, 7, 4, 3)
BATCH = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("set"), COUNTS, val=3)


def read_lists(root: Path) -> dict[str, ImageList]:
    lists = {split: read_list(root / f"{split}.txt", root) for split in ("train", "val")}
    return {**lists, "test": lists["val"]}


def open_source(loader: str, root: Path, lists: dict[str, ImageList] | None = None, **options) -> LargeSource:
    num_views = options.pop("num_views", 1)
    options = {
        "views": view_recipes("imagenet", num_views),
        "image_size": 32,
        "batch": BATCH,
        "seed": 5,
        "workers": 0 if loader == "torch" else 2,
        **options,
    }
    kind: type[LargeSource] = TorchSource
    if loader == "dali":
        needs_dali()
        from ltfast.data.dali_source import DaliSource

        kind = DaliSource
    return kind(lists or read_lists(root), **options)


def epoch(source: LargeSource, number: int, start: int = 0) -> list:
    return list(source.train(number, start))


def ids(batches: list) -> list[list[int]]:
    return [b.index.tolist() for b in batches]


@pytest.mark.parametrize("loader", LOADERS)
def test_attributes_shapes_and_types(loader, root):
    source = open_source(loader, root, num_views=3)
    assert isinstance(source, Source)
    assert source.num_classes == 4
    assert source.class_names == ("0", "1", "2", "3")
    assert source.train_counts.tolist() == list(COUNTS)
    assert source.train_labels.dtype == torch.int64
    assert source.input_shape == (3, 32, 32)
    assert source.sizes == {"train": 23, "val": 12, "test": 12}
    assert source.steps_per_epoch == 3
    batches = epoch(source, 0)
    assert len(batches) == 3
    for batch in batches:
        assert len(batch.views) == 3
        for view in batch.views:
            assert view.shape == (BATCH, 3, 32, 32)
            assert view.dtype == torch.float32
            assert bool(view.isfinite().all())
        # DALI's own labels are int32 of shape (B, 1).
        assert batch.labels.shape == batch.index.shape == (BATCH,)
        assert batch.labels.dtype == batch.index.dtype == torch.int64
        assert torch.equal(batch.labels, source.train_labels[batch.index])
    assert not torch.equal(batches[0].views[1], batches[0].views[2])


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_holds_every_image_and_the_fill_is_its_head(loader, root):
    source = open_source(loader, root)
    flat = [i for batch in ids(epoch(source, 0)) for i in batch]
    assert sorted(flat[:23]) == list(range(23))
    assert flat[23:] == flat[:1]
    assert flat == source.epoch_indices(0).flatten().tolist()
    following = [i for batch in ids(epoch(source, 1)) for i in batch]
    assert following != flat
    assert flat != [i for b in ids(epoch(open_source(loader, root, seed=6), 0)) for i in b]


@pytest.mark.parametrize("loader", LOADERS)
def test_resume_gives_exactly_the_remaining_images(loader, root):
    """Reset in mid-epoch is what DALI's iterator ignores; here an epoch may be left and begun anywhere."""
    source = open_source(loader, root)
    whole = epoch(source, 1)
    running = source.train(1)
    next(running)
    del running  # left in mid-epoch
    for start in (0, 1, 2, 3):
        for again in (source, open_source(loader, root)):
            rest = epoch(again, 1, start)
            assert ids(rest) == ids(whole)[start:]
            for a, b in zip(rest, whole[start:], strict=True):
                assert torch.equal(a.views[0], b.views[0])
    with pytest.raises(ValueError, match="start_step"):
        epoch(source, 0, 4)


@pytest.mark.parametrize("loader", LOADERS)
def test_epochs_follow_one_another_with_evaluation_between(loader, root):
    source = open_source(loader, root)
    first = [ids(epoch(source, e)) for e in range(3)]
    again = open_source(loader, root)
    second = []
    for e in range(3):
        second.append(ids(epoch(again, e)))
        assert sum(len(b.index) for b in again.evaluate("val")) == 12
    assert first == second
    assert ids(epoch(again, 0)) == first[0]


@pytest.mark.parametrize("loader", LOADERS)
def test_the_number_of_workers_changes_nothing(loader, root):
    few, many = (
        epoch(open_source(loader, root, workers=w, num_views=3), 0) for w in (0 if loader == "torch" else 1, 3)
    )
    for a, b in zip(few, many, strict=True):
        assert torch.equal(a.index, b.index)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


@pytest.mark.parametrize("loader", LOADERS)
def test_ranks_share_each_global_batch(loader, root):
    alone = epoch(open_source(loader, root), 0)
    shares = [epoch(open_source(loader, root, rank=r, world=2), 0) for r in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(alone)
    for whole, left, right in zip(alone, *shares, strict=True):
        assert torch.equal(whole.index, torch.cat([left.index, right.index]))
        assert torch.equal(whole.views[0], torch.cat([left.views[0], right.views[0]]))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [1, 3, 5])
def test_evaluation_shows_every_image_once_on_any_number_of_ranks(loader, root, world):
    sources = [open_source(loader, root, rank=r, world=world, batch=15) for r in range(world)]
    seen = Counter(i for s in sources for b in s.evaluate("val", batch=2) for i in b.index.tolist())
    assert seen == Counter(range(12))
    first = next(sources[0].evaluate("test"))
    assert torch.equal(first.labels, torch.from_numpy(sources[0].lists["test"].labels).long()[first.index])
    chosen = torch.tensor([7, 2, 2, 11])
    shown = [i for s in sources for b in s.evaluate("train", chosen) for i in b.index.tolist()]
    assert shown == chosen.tolist()
    with pytest.raises(ValueError, match="split"):
        sources[0].evaluate("all")


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("sampler", ["class-balanced", "sqrt", "progressive", "group-stratified"])
def test_samplers(loader, root, sampler):
    source = open_source(loader, root, sampler=sampler, epochs_total=4)
    source.set_groups(torch.tensor([0, 0, 1, 1]))
    batches = epoch(source, 3)
    labels = torch.cat([b.labels for b in batches])
    if sampler in ("class-balanced", "progressive"):
        assert torch.bincount(labels).tolist() == [6, 6, 6, 6]
    if sampler == "group-stratified":
        assert all(len((b.labels >= 2).unique()) == 2 for b in batches)
    # Groups set now are used from the next epoch on, also where DALI has already run ahead.
    list(source.train(0))
    source.set_groups(torch.tensor([1, 0, 0, 0]))
    assert ids(epoch(source, 1)) == source.epoch_indices(1).tolist()


def class_sorted(n: int, classes: int) -> dict[str, ImageList]:
    labels = np.sort(np.arange(n) % classes).astype(np.int32)
    images = ImageList(Path("/nowhere"), PathTable.of(f"{i}.jpg" for i in range(n)), labels, "sorted")
    return {"train": images, "val": images, "test": images}


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_a_class_sorted_list_is_uniform_for_every_epoch_and_rank(seed):
    """DALI's random_shuffle keeps neighbours together: this is why the order is our own."""
    n, world, batch = 4000, 4, 64
    lists = class_sorted(n, 8)
    sources = [
        SyntheticSource(lists, views=view_recipes("crop", 1), batch=batch, seed=seed, rank=r, world=world)
        for r in range(world)
    ]
    p_values, places = [], []
    for number in range(6):
        order = np.concatenate([s.epoch_indices(number).numpy() for s in sources], axis=1).flatten()[:n]
        place = np.empty(n)
        place[order] = np.arange(n)
        places.append(place)
        for source in sources:
            first = source.train_labels[source.epoch_indices(number)[:5].flatten()]
            p_values.append(stats.chisquare(torch.bincount(first, minlength=8).numpy()).pvalue)
    # 24 tests: a true shuffle falls below 1e-4 once in 400 runs of this file; a window of 1,024 always does.
    assert min(p_values) > 1e-4
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    for a, b in pairwise(places):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.07
    together = [np.mean(np.abs(np.diff(np.argsort(p)[:batch])) == 1) for p in places]
    assert np.mean(together) < 5 / n * 2 + 0.02
    window = np.arange(n)  # a window shuffle starts with the first classes
    assert stats.chisquare(np.bincount(lists["train"].labels[window[:320]], minlength=8)).pvalue < 1e-10


def test_the_order_depends_on_the_seed_from_the_first_epoch_on():
    """shuffle_after_epoch of DALI gives the same order for every pipeline seed."""
    lists = class_sorted(3000, 5)
    orders = [
        SyntheticSource(lists, views=view_recipes("crop", 1), batch=50, seed=seed).epoch_indices(0).flatten().numpy()
        for seed in (0, 1)
    ]
    assert abs(np.corrcoef(np.argsort(orders[0]), np.argsort(orders[1]))[0, 1]) < 0.07


def spoil(root: Path, target: Path, kinds: list[str]) -> tuple[dict[str, ImageList], list[int]]:
    """A copy of the training list in which the last file of some classes is bad: (lists, bad positions)."""
    made = bad_files.write(target / "bad", {k: bad_files.bad_files()[k] for k in kinds})
    lists = read_lists(root)
    train = lists["train"]
    names, positions = [str((root / p).resolve()) for p in train.paths], []
    ends = np.cumsum(train.counts) - 1
    for kind, position in zip(kinds, ends.tolist(), strict=False):
        names[position] = str(made[kind].resolve())
        positions.append(position)
    table = PathTable.of(name.lstrip("/") for name in names)
    return {**lists, "train": ImageList(Path("/"), table, train.labels, "spoilt.txt")}, positions


@pytest.mark.parametrize(("loader", "num_views"), [("torch", 1), ("dali", 1), ("dali", 3)])
@pytest.mark.parametrize("kind", list(bad_files.bad_files()))
def test_a_bad_file_is_replaced_and_named_once(loader, num_views, kind, root, tmp_path, caplog):
    """With three views DALI meets the file and dies of it; with one view its bytes are looked at before."""
    lists, (position,) = spoil(root, tmp_path, [kind])
    source = open_source(loader, root, lists, num_views=num_views)
    clean = source.epoch_indices(0).tolist()
    planned = [i for number in (0, 1) for i in source.epoch_indices(number).flatten().tolist()]
    with caplog.at_level(logging.WARNING, "ltfast.data"):
        shown = ids(epoch(source, 0)) + ids(epoch(source, 1))
    assert len(caplog.records) == 1
    assert kind.replace(" ", "_") in caplog.text
    flat = [i for batch in shown for i in batch]
    assert position not in flat
    assert int(source.replaced) == planned.count(position) >= 2
    # Everything else is where it was, and the substitute is of the same class (the next in list order, round once).
    substitute = next(i for i in source.substitutes(position) if i != position)
    assert lists["train"].labels[substitute] == lists["train"].labels[position]
    assert shown[:3] == [[substitute if i == position else i for i in batch] for batch in clean]
    # A fresh source finds the same; one that starts in mid-epoch too.
    assert ids(epoch(open_source(loader, root, lists, num_views=num_views), 0, 1)) == shown[1:3]


@pytest.mark.parametrize(("loader", "num_views"), [("torch", 1), ("dali", 1), ("dali", 3)])
@pytest.mark.parametrize("shards", [False, True])
def test_a_tiff_of_floats_is_refused_by_every_loader(loader, num_views, shards, root, tmp_path, caplog):
    """DALI alone would show a white picture."""
    (tmp_path / "bad.TIF").write_bytes(bad_files.tiff("F"))
    lists = read_lists(root)
    if shards:
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            for i, name in enumerate([tmp_path / "bad.TIF", *(root / p for p in lists["train"].paths)]):
                tar.add(name, f"{i}{name.suffix}")
                (tmp_path / "cls").write_text(str(lists["train"].labels[max(i - 1, 0)]))
                tar.add(tmp_path / "cls", f"{i}.cls")
        train = read_shards(f"{tmp_path}/t.tar")
    else:
        names = [str(p).lstrip("/") for p in (tmp_path / "bad.TIF", *(root / p for p in lists["train"].paths))]
        train = ImageList(Path("/"), PathTable.of(names), np.append(0, lists["train"].labels).astype(np.int32), "made")
    lists = {"train": train, "val": train, "test": train}
    source = open_source(loader, root, lists, num_views=num_views)
    shown = [i for number in (0, 1) for batch in ids(epoch(source, number)) for i in batch]
    assert 0 not in shown
    assert "cannot be decoded (floating-point pixels" in caplog.text
    source = open_source(loader, root, lists, num_views=num_views)
    with pytest.raises(UserError, match=r"cannot be decoded \(floating-point pixels"):
        next(source.evaluate("test"))
    assert next(source.evaluate("train", batch=30)).index.tolist() == list(range(1, 24))


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_several_bad_files_even_in_one_batch(loader, root, tmp_path, caplog):
    kinds = ["cut at 50 percent", "HTML page", "empty", "missing"]
    lists, positions = spoil(root, tmp_path, kinds)
    source = open_source(loader, root, lists, batch=23, num_views=3)
    with caplog.at_level(logging.WARNING, "ltfast.data"):
        (batch,) = epoch(source, 0)
    assert len(caplog.records) == 4
    assert not set(positions) & set(batch.index.tolist())
    assert torch.bincount(batch.labels).tolist() == list(COUNTS), "classes keep their shares"
    assert len(batch.index) == 23


@pytest.mark.parametrize("loader", LOADERS)
def test_on_bad_image_fail_names_file_reason_and_fix(loader, root, tmp_path):
    lists, _ = spoil(root, tmp_path, ["cut at 50 percent"])
    source = open_source(loader, root, lists, on_bad_image="fail")
    with pytest.raises(UserError, match=r"cut_at_50_percent\.jpg cannot be decoded \(truncated.*--on-bad-image skip"):
        epoch(source, 0)


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_class_without_any_good_file_ends_the_run(loader, root, tmp_path):
    lists = read_lists(root)
    made = bad_files.write(tmp_path / "bad", {"a": b"", "b": b"", "c": b""})
    names = [str(root / p).lstrip("/") for p in lists["train"].paths]
    names[-3:] = [str(p).lstrip("/") for p in made.values()]
    lists["train"] = ImageList(Path("/"), PathTable.of(names), lists["train"].labels, "spoilt.txt")
    with pytest.raises(UserError, match="no picture of class '3' can be decoded"):
        epoch(open_source(loader, root, lists), 0)


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_leaves_a_bad_file_out(loader, root, tmp_path, caplog):
    lists, positions = spoil(root, tmp_path, ["GIF", "random bytes"])
    source = open_source(loader, root, lists)
    with caplog.at_level(logging.WARNING, "ltfast.data"):
        for _ in range(2):
            shown = [i for b in source.evaluate("train", batch=4) for i in b.index.tolist()]
            assert shown == [i for i in range(23) if i not in positions]
    assert len(caplog.records) == 2
    with pytest.raises(UserError, match="cannot be decoded"):
        list(open_source(loader, root, lists, on_bad_image="fail").evaluate("train"))
    held_out = {**lists, "val": lists["train"]}
    with pytest.raises(UserError, match=r"cannot be decoded .*--on-bad-image skip"):
        list(open_source(loader, root, held_out).evaluate("val"))
    left = [
        i for b in open_source(loader, root, held_out, on_bad_image="skip").evaluate("val") for i in b.index.tolist()
    ]
    assert left == shown


def test_identity_is_plain_values_and_a_changed_batch_is_caught(root):
    """DALI's own checkpoint accepts a changed batch size in silence."""
    saved = json.loads(json.dumps(open_source("torch", root).identity()))
    check_data(saved, open_source("torch-workers", root).identity())
    for change in ({"batch": 4}, {"seed": 9}, {"sampler": "sqrt"}):
        with pytest.raises(UserError, match=f"cannot resume: {next(iter(change))} was"):
            check_data(saved, open_source("torch", root, **change).identity())
    lists = read_lists(root)
    order = np.arange(len(lists["train"]))
    lists["train"] = lists["train"].select(np.roll(order, 1))
    with pytest.raises(UserError, match="cannot resume: training list was"):
        check_data(saved, open_source("torch", root, lists).identity())
    if dali_available():
        check_data(saved, open_source("dali", root).identity())


def test_user_errors_of_the_constructor(root):
    for options, text in (
        ({"batch": 24}, "--batch 24 is larger than the 23 training images of .*; --batch 2 makes 12 steps of them"),
        ({"batch": 7, "world": 2}, "--batch 7 cannot be shared evenly"),
        ({"sampler": "best"}, "--sampler 'best'"),
        ({"sampler": "progressive"}, "number of epochs"),
        ({"on_bad_image": "ignore"}, "--on-bad-image 'ignore'"),
        ({"image_size": 4}, "--image-size 4"),
    ):
        with pytest.raises(UserError, match=text):
            open_source("torch", root, **options)
    with pytest.raises(ValueError, match="group_of_class"):
        open_source("torch", root).set_groups(torch.zeros(3))
    with pytest.raises(ValueError, match="views"):
        open_source("torch", root, views=view_recipes("crop", 3)[:2])


def test_substitutes_go_round_the_class_once():
    rounds = Substitutes(np.array([0, 1, 0, 1, 0]))
    assert list(rounds(2)) == [2, 4, 0]
    assert list(rounds(3)) == [3, 1]


def test_synthetic_pictures(root):
    lists = class_sorted(50, 5)
    source = SyntheticSource(lists, views=view_recipes("imagenet", 3), batch=16, image_size=24, seed=1)
    assert isinstance(source, Source)
    a, b = epoch(source, 0), epoch(source, 0)
    assert ids(a) == ids(b) == source.epoch_indices(0).tolist()
    assert torch.equal(a[0].views[2], b[0].views[2])
    assert a[0].views[0].shape == (16, 3, 24, 24)
    assert not torch.equal(a[0].views[0], a[0].views[1])
    assert sum(len(e.index) for e in source.evaluate("val")) == 50


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    """Eight of them with a loader thread a core each would be eight times too many."""
    assert own_cores() == available_cores()
    for name, value in {"RANK": 0, "WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("ltfast.data.large_source.available_cores", lambda: 20)
    assert own_cores() == 2
    monkeypatch.setattr("ltfast.data.large_source.available_cores", lambda: 4)
    assert own_cores() == 1
