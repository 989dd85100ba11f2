"""Tar shards: patterns, indexes (which DALI's own reader accepts), pictures equal to loose files, user errors, and
order.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ltfast.cli import main
from ltfast.data.check import check_dataset
from ltfast.data.large import load_large
from ltfast.data.lists import ImageList, read_list
from ltfast.data.webdataset import expand_shards, read_shards, shard_index, shard_names
from ltfast.errors import UserError
from tests.data import bad_files
from tests.data.pictures import make_set, needs_dali

COUNTS = (9, 7, 4)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def pack(images: ImageList, folder: Path, shards: int, extension: str = "jpg") -> str:
    """The pictures of a list as shards, in its order; returns the pattern."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, part in enumerate(np.array_split(np.arange(len(images)), shards)):
        with tarfile.open(folder / f"train-{shard:03d}.tar", "w") as tar:
            for i in part.tolist():
                add(tar, f"sub/{i:06d}.{extension}", images.read(i))
                add(tar, f"sub/{i:06d}.cls", f"{images.labels[i]}\n".encode())
    return f"{folder}/train-{{000..{shards - 1:03d}}}.tar"


@pytest.fixture(scope="module")
def loose(tmp_path_factory) -> ImageList:
    root = make_set(tmp_path_factory.mktemp("loose"), COUNTS)
    return read_list(root / "train.txt", root)


@pytest.fixture(scope="module")
def pattern(loose, tmp_path_factory) -> str:
    return pack(loose, tmp_path_factory.mktemp("shards"), 3)


def test_patterns(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b.tar"):
        (tmp_path / name).touch()
    for pattern, count in (("a-{000..002}.tar", 3), ("{a-000,b}.tar", 2), ("a-*.tar", 3), ("b.tar", 1)):
        assert len(expand_shards(f"{tmp_path}/{pattern}")) == count
    assert len(expand_shards(f"{tmp_path}/a-{{000..001}}.tar::{tmp_path}/b.tar")) == 3
    order = ["a-000.tar", "a-001.tar", "a-002.tar", "b.tar"]  # what a seed draws hangs on it
    assert [shard.name for shard in expand_shards(f"{tmp_path}/*.tar")] == order
    with pytest.raises(UserError, match=r"shard .*a-003\.tar does not exist"):
        expand_shards(f"{tmp_path}/a-{{000..005}}.tar")
    with pytest.raises(UserError, match=f"^{tmp_path}: shard {tmp_path} is a folder"):  # may be of any of three options
        expand_shards(str(tmp_path))
    with pytest.raises(UserError, match="no shard"):
        expand_shards(f"{tmp_path}/c-*.tar")


def test_one_shard_twice_is_refused_but_shards_of_one_name_are_not(loose, tmp_path):
    once, again = pack(loose, tmp_path / "a", 1), pack(loose, tmp_path / "b", 1)
    with pytest.raises(UserError, match=r"shard .*train-000\.tar stands twice"):
        expand_shards(f"{once}::{once}")
    test = pack(loose, tmp_path / "test", 1)
    source = load_large("webdataset", data_dir=f"{once}::{again}", test_list=test, batch=4, loader="torch", workers=0)
    assert source.sizes["train"] == 2 * len(loose)


def test_pictures_in_shards_of_one_name_are_told_apart(loose, tmp_path):
    train, test = (pack(loose, tmp_path / "w" / split, 2) for split in ("train", "test"))
    bad = tmp_path / "bad.txt"
    bad.write_text("train/train-000.tar/sub/000003.jpg\ttruncated\n")
    source = load_large("webdataset", data_dir=train, test_list=test, exclude_list=bad, batch=4, loader="torch")
    assert source.sizes == {"train": len(loose) - 1, "val": 0, "test": len(loose)}
    assert source.lists["test"].paths[3] == "test/train-000.tar/sub/000003.jpg"


def test_shards_are_called_by_their_file_names_where_these_are_unique():
    names = {
        "/w/train/0.tar": "train/0.tar",
        "/w/val/0.tar": "val/0.tar",
        "/w/train/1.tar": "1.tar",
        "/a/b/2.tar": "a/b/2.tar",
        "/b/2.tar": "/b/2.tar",
        "/c/b/2.tar": "c/b/2.tar",
    }
    assert shard_names(map(Path, [*names, *names])) == {Path(shard): name for shard, name in names.items()}
    assert shard_names([Path("0.tar"), Path("0.tar").absolute()]) == {
        Path("0.tar"): "0.tar",
        Path("0.tar").absolute(): "0.tar",
    }


def test_data_check_and_stats_look_into_shards(loose, pattern, tmp_path, capsys):
    test = pack(loose.select(np.arange(3)), tmp_path, 1)
    words = [pattern, "--test-list", test]
    assert main(["data", "stats", *words]) == 0
    assert "9 .. 4" in capsys.readouterr().out
    assert main(["data", "check", *words, "--full", "--csv", str(tmp_path / "found.csv")]) == 1
    assert "also in train" in capsys.readouterr().out
    assert "train-000.tar/sub/000000.jpg" in (tmp_path / "found.csv").read_text()


def test_the_index_reaches_every_picture(loose, pattern):
    for _ in range(2):  # built, then read back
        images = read_shards(pattern)
        assert images.labels.tolist() == loose.labels.tolist()
        assert all(images.read(i) == loose.read(i) for i in range(len(loose)))
        assert images.paths[0] == "train-000.tar/sub/000000.jpg"
        assert not images.loose
    chosen = images.select(np.array([12, 3]))
    assert chosen.read(0) == loose.read(12)
    assert chosen.labels.tolist() == loose.labels[[12, 3]].tolist()


def test_a_shard_cut_between_samples_is_told_each_time(loose, tmp_path, caplog):
    (shard,) = expand_shards(pack(loose, tmp_path, 1))
    whole = shard_index(shard)
    read_shards(str(shard))
    assert not caplog.text
    _, offset, size, _ = max(whole[5], key=lambda c: c[1])
    with open(shard, "r+b") as file:
        file.truncate(offset + -(-size // 512) * 512)
    for _ in range(2):  # from the tar, then from its index
        caplog.clear()
        assert len(read_shards(str(shard))) == 6
        assert "lacks the end mark of a tar file: it may have been cut off" in caplog.text
        os.utime(f"{shard}.idx", ns=(2**62, 2**62))


def test_an_old_or_broken_index_is_made_anew(loose, tmp_path):
    pattern = pack(loose, tmp_path, 1)
    (shard,) = expand_shards(pattern)
    before = shard_index(shard)
    index = Path(f"{shard}.idx")
    index.write_text("v1.2 3\nhalf a file")
    os.utime(index, ns=(2**62, 2**62))
    assert shard_index(shard) == before
    index.write_text("v1.2 0\n")
    os.utime(index, ns=(0, 0))
    assert shard_index(shard) == before
    assert index.read_text().startswith(f"v1.2 {len(loose)}\n")


def test_a_shard_replaced_by_an_older_file_is_indexed_anew(loose, tmp_path):
    (shard,) = expand_shards(pack(loose, tmp_path, 1))
    (other,) = expand_shards(pack(loose.select(np.arange(5, 12)), tmp_path / "other", 1))
    shard_index(shard)
    os.utime(other, ns=(0, 0))
    other.replace(shard)
    images = read_shards(str(shard))
    assert [images.read(i) for i in range(len(images))] == [loose.read(i) for i in range(5, 12)]


def test_a_newer_index_is_read(loose, tmp_path):
    (shard,) = expand_shards(pack(loose, tmp_path, 1))
    samples = shard_index(shard)
    index = Path(f"{shard}.idx")
    index.write_text(index.read_text().replace(".jpg", ".png"))
    os.utime(index, ns=(2**62, 2**62))
    assert shard_index(shard)[0][0][3] == samples[0][0][3].replace(".jpg", ".png")


def test_member_names_need_not_be_utf8(loose, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "caf\udce9.jpg", loose.read(0))
        add(tar, "caf\udce9.cls", b"0")
    for _ in range(2):  # built, then read back
        images = read_shards(f"{tmp_path}/t.tar")
        assert images.paths.raw(0) == b"t.tar/caf\xe9.jpg"
        assert images.select(np.array([0])).read(0) == loose.read(0)
    assert b"caf\xe9.jpg" in (tmp_path / "t.tar.idx").read_bytes()


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_shards_show_what_loose_files_show(loose, pattern, loader, tmp_path):
    if loader == "dali":
        needs_dali()
    options = {"image_size": 24, "batch": 5, "loader": loader, "workers": 1, "seed": 2}
    val = pack(read_list(loose.root / "val.txt", loose.root), tmp_path, 1)
    by_file = load_large("list", data_dir=loose.root, train_list=loose.source, val_list="val.txt", **options)
    by_shard = load_large("webdataset", data_dir=pattern, val_list=val, **options)
    assert (by_shard.sizes, by_shard.test_from) == (by_file.sizes, "val")
    assert load_large("webdataset", data_dir=pattern, val_per_class=1, **options).sizes["val"] == len(COUNTS)
    assert by_shard.train_counts.tolist() == list(COUNTS)
    for a, b in zip(by_file.train(1, 1), by_shard.train(1, 1), strict=True):
        assert torch.equal(a.index, b.index)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    for a, b in zip(by_file.evaluate("test", batch=7), by_shard.evaluate("test", batch=7), strict=True):
        assert torch.equal(a.views[0], b.views[0])


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_bad_picture_in_a_shard_is_replaced_and_named(loader, loose, tmp_path, caplog):
    if loader == "dali":
        needs_dali()
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for i in range(8):
            data = bad_files.bad_files()["cut at 50 percent"] if i == 3 else loose.read(i)
            assert data is not None
            add(tar, f"{i}.jpg", data)
            add(tar, f"{i}.cls", b"0" if i < 5 else b"1")
    shutil.copy(tmp_path / "t.tar", tmp_path / "v.tar")
    source = load_large(
        "webdataset", data_dir=f"{tmp_path}/t.tar", val_list=f"{tmp_path}/v.tar", batch=4, image_size=16, loader=loader
    )
    seen = [i for b in source.train(0) for i in b.index.tolist()]
    assert Counter(seen) == {**dict.fromkeys(range(8), 1), 3: 0, 4: 2} or Counter(seen)[4] == 2
    assert 3 not in seen
    assert "t.tar/3.jpg cannot be decoded (truncated" in caplog.text
    report = check_dataset({"train": read_shards(f"{tmp_path}/t.tar")}, full=True)
    assert report.splits[0].bad == [("t.tar/3.jpg", "truncated: no end marker")]


def test_the_picture_is_the_one_without_a_further_dot(loose, tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add(tar, "0_0.depth.png", loose.read(1))
        add(tar, "0_0.JPG", loose.read(0))
        add(tar, "0_0.cls", b"0")
        add(tar, "0_1.rgb.jpg", loose.read(2))  # the only one
        add(tar, "0_1.cls", b"1")
    images = read_shards(f"{tmp_path}/t.tar")
    assert list(images.paths) == ["t.tar/0_0.JPG", "t.tar/0_1.rgb.jpg"]
    assert images.read(0) == loose.read(0)


def test_user_errors(tmp_path, loose):
    def shard(name: str, members: dict[str, bytes], again: str = "") -> str:
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in [*members, again] if again else members:
                add(tar, member, members[member])
        return f"{tmp_path}/{name}"

    picture = loose.read(0)
    cases = [
        (shard("a.tar", {"x.jpg": picture}), r"sample 'x\.jpg' has no \.cls label"),
        (shard("b.tar", {"x.cls": b"1"}), r"sample 'x\.cls' has no picture"),
        (shard("c.tar", {"x.jpg": picture, "x.cls": b"cat"}), r"'x\.cls' holds b'cat', not a label"),
        (shard("d.tar", {}), "hold no sample"),
        (shard("g.tar", {"x.jpg": picture, "x.cls": b"4294967297"}), r"'x\.cls' holds b'4294967297', not a label"),
        (shard("h.tar", {"x.jpg": picture, "x.png": picture, "x.cls": b"1"}), r"sample 'x\.jpg' has 2 pictures"),
        (shard("i.tar", {"x.jpg": picture, "x.cls": b"1"}, again="x.cls"), r"sample 'x\.jpg' has 2 \.cls labels"),
        (shard("j.tar", {"x.l.jpg": picture, "x.r.jpg": picture, "x.cls": b"1"}), r"'x\.l\.jpg' has 2 pictures"),
    ]
    (tmp_path / "e.tar").write_bytes(b"not a tar" * 200)
    cases.append((f"{tmp_path}/e.tar", "not a readable, uncompressed tar file"))
    for pattern, text in cases:
        with pytest.raises(UserError, match=text):
            read_shards(pattern)
    gap, other = (shard(name, {"x.jpg": picture, "x.cls": b"1"}) for name in ("f.tar", "k.tar"))
    with pytest.raises(UserError, match="classes have no image"):
        load_large("webdataset", data_dir=gap, val_list=other, batch=1)


def reader_order(shards: list[Path], n: int, epochs: int, **options) -> list[list[int]]:
    """Labels in the order in which DALI's own reader gives them, from our indexes."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=50, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        _, label = fn.readers.webdataset(
            paths=[str(s) for s in shards], index_paths=[f"{s}.idx" for s in shards], ext=["jpg", "cls"], **options
        )
        pipeline.set_outputs(label)
    pipeline.build()
    orders = []
    for _ in range(epochs):
        labels: list[int] = []
        while len(labels) < n:
            (batch,) = pipeline.run()
            labels += [int(bytes(np.array(batch[i]))) for i in range(len(batch))]
        orders.append(labels)
    return orders


def test_dalis_reader_accepts_the_index_but_keeps_neighbours_together(loose, tmp_path):
    """Why training reads by index: the reader's window leaves a class-sorted set class-sorted; our order does not."""
    needs_dali()
    n, shards = 2000, 4
    picture = loose.read(0)
    for shard in range(shards):
        with tarfile.open(tmp_path / f"s-{shard}.tar", "w") as tar:
            for i in range(shard * n // shards, (shard + 1) * n // shards):
                add(tar, f"{i:05d}.jpg", picture[:64])
                add(tar, f"{i:05d}.cls", str(i).encode())
    pattern = f"{tmp_path}/s-{{0..3}}.tar"
    files = expand_shards(pattern)
    assert read_shards(pattern).labels.tolist() == list(range(n))
    (plain,) = reader_order(files, n, 1)
    assert plain == list(range(n))
    shuffled = reader_order(files, n, 2, random_shuffle=True, initial_fill=200)
    for order in shuffled:
        assert sorted(order) == list(range(n))
        assert np.corrcoef(np.argsort(order), np.arange(n))[0, 1] > 0.9
    from ltfast.data.sampler import epoch_order

    ours = epoch_order("instance", torch.zeros(n, dtype=torch.int64), batch=50, seed=0, epoch=0)[:n]
    assert abs(np.corrcoef(np.argsort(ours.numpy()), np.arange(n))[0, 1]) < 0.1
