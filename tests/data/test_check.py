"""`data check` and `data stats` as functions: every finding, the tables, the written list, the plot."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image
from rich.console import Console

from ltfast.cli import main
from ltfast.data.check import check_dataset, inspect, print_check, read_bad_list, write_bad_list, write_findings
from ltfast.data.decode import decode, load_picture
from ltfast.data.lists import ImageList, read_list
from ltfast.data.paths import PathTable
from ltfast.data.public import find_lists
from ltfast.data.stats import dataset_stats, plot_counts, print_classes, print_stats
from ltfast.errors import UserError
from tests.data import bad_files
from tests.data.pictures import data_folder, make_set


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    bad = bad_files.write(folder / "bad", bad_files.bad_files())
    odd = bad_files.write(folder / "odd", bad_files.odd_files() | bad_files.damaged_files())
    names = [f"bad/{p.name}" for p in bad.values()] + [f"odd/{p.name}" for p in odd.values()]
    names.append("odd/gray.jpg")
    labels = np.zeros(len(names), dtype=np.int32)
    labels[-1] = 2
    return ImageList(folder, PathTable.of(names), labels, "mixed.txt")


@pytest.mark.parametrize("full", [False, True])
def test_every_bad_file_is_found_and_no_odd_one(mixed, full):
    report = check_dataset({"train": mixed}, full=full, workers=3)
    (split,) = report.splits
    found = dict(split.bad)
    expected = {f"bad/{kind.replace(' ', '_')}.jpg" for kind in bad_files.bad_files()}
    assert set(found) == expected
    assert found["bad/missing.jpg"] == "missing"
    assert found["bad/empty.jpg"] == "empty file"
    assert split.duplicates == ["odd/gray.jpg"]
    assert split.empty_classes == ["1"]
    assert split.notes["gray"] == 2
    assert split.notes["CMYK"] == 1
    assert split.notes["EXIF-rotated (not turned by the loaders)"] == 1
    assert split.notes["WEBP named .jpg"] == 1
    assert split.notes["16 bits (read as 8)"] == 1
    assert report.bad == len(expected)
    assert not report.ok


@pytest.mark.parametrize("options", [{}, {"big_tiff": True}, {"compression": "tiff_lzw"}])
def test_a_tiff_of_several_pages_is_told(tmp_path, options):
    pages = [Image.new("L", (300, 200), level) for level in (10, 200)]
    pages[0].save(tmp_path / "one.tif", **options)
    pages[0].save(tmp_path / "two.tif", save_all=True, append_images=pages[1:], **options)
    assert inspect(str(tmp_path / "one.tif")).notes == ()
    assert inspect(str(tmp_path / "two.tif")).notes == ("several pages (the first is read)",)
    assert np.asarray(decode((tmp_path / "two.tif").read_bytes())).max() == 10


def test_table_bad_list_and_excluding_it(mixed, tmp_path):
    report = check_dataset({"train": mixed, "val": mixed}, full=True)
    assert len(report.splits) == 1, "the same list is looked at once"
    console = Console(record=True, width=160, file=io.StringIO())
    print_check(report, console, examples=20)
    text = console.export_text()
    for word in ("full decode", "empty file", "not a picture", "CMYK", "duplicate path", "class without an image"):
        assert word in text
    assert write_bad_list(report, tmp_path / "bad.txt") == report.bad
    excluded = read_bad_list(tmp_path / "bad.txt")
    kept = mixed.without(excluded)
    assert len(kept) == len(mixed) - report.bad
    assert check_dataset({"train": kept}, full=True).bad == 0
    assert kept.without(set()) is kept
    with pytest.raises(UserError, match="cannot be read"):
        read_bad_list(tmp_path / "none.txt")


def test_a_clean_set_is_ok(tmp_path):
    root = make_set(tmp_path, (4, 3))
    lists = {split: read_list(root / f"{split}.txt", root) for split in ("train", "val")}
    report = check_dataset(lists)
    assert report.ok
    assert [s.images for s in report.splits] == [7, 4]
    console = Console(record=True, width=100, file=io.StringIO())
    print_check(report, console)
    assert "nothing unusual" in console.export_text()


def test_files_of_two_splits_and_what_is_wrong_with_the_whole_are_found(tmp_path):
    root = make_set(tmp_path, (4, 3))
    (root / "val/1/link.jpg").symlink_to("../../train/1/2.jpg")
    names = ["val/0/0.jpg", "val/1/link.jpg", "train/0/1.jpg"]
    test = ImageList(root, PathTable.of(names), np.array([0, 1, 0], dtype=np.int32), "test.txt")
    report = check_dataset({"train": read_list(root / "train.txt", root), "test": test})
    assert report.splits[1].copies.elsewhere == {
        "train": [("train/0/1.jpg", "train/0/1.jpg"), ("val/1/link.jpg", "train/1/2.jpg")]
    }
    assert not report.ok
    console = Console(record=True, width=100, file=io.StringIO())
    print_check(report, console)
    assert "also in train" in console.export_text()
    one = test.select(np.array([0]))
    report = check_dataset({"train": one, "test": one.select(np.arange(0))})
    assert len(report.notes) == 2
    assert not report.ok


def test_copies_are_found_whatever_their_names(tmp_path):
    root = make_set(tmp_path, (4, 3))
    for copy, of in (
        ("val/0/x.jpg", "train/0/2.jpg"),
        ("train/1/y.jpg", "train/0/3.jpg"),
        ("train/0/z.jpg", "train/0/0.jpg"),
    ):
        (root / copy).write_bytes((root / of).read_bytes())
    almost = bytearray((root / "train/0/1.jpg").read_bytes())
    almost[-3] ^= 1  # same size, not the same picture
    (root / "val/0/almost.jpg").write_bytes(almost)
    train = [f"train/0/{i}.jpg" for i in range(4)] + ["train/0/z.jpg", "train/1/0.jpg", "train/1/y.jpg"]
    labels = np.array([0, 0, 0, 0, 0, 1, 1], dtype=np.int32)
    test = ["val/0/x.jpg", "val/0/almost.jpg", "val/1/0.jpg"]
    lists = {
        "train": ImageList(root, PathTable.of(train), labels, "train.txt"),
        "test": ImageList(root, PathTable.of(test), np.array([0, 0, 1], dtype=np.int32), "test.txt"),
    }
    report = check_dataset(lists)
    inside, outside = (split.copies for split in report.splits)
    assert inside.relabelled == [("train/1/y.jpg", "train/0/3.jpg")]
    assert inside.repeated == [("train/0/z.jpg", "train/0/0.jpg")]
    assert outside.elsewhere == {"train": [("val/0/x.jpg", "train/0/2.jpg")]}
    assert not outside.relabelled
    assert not report.ok
    console = Console(record=True, width=120, file=io.StringIO())
    print_check(report, console)
    text = console.export_text()
    for words in ("also in train", "same picture in another class", "copy in the same class"):
        assert words in text
    assert write_findings(report, tmp_path / "found.csv") == 3
    assert (tmp_path / "found.csv").read_text().splitlines() == [
        "split,finding,path,same_as",
        "train,same picture in another class,train/1/y.jpg,train/0/3.jpg",
        "train,copy in the same class,train/0/z.jpg,train/0/0.jpg",
        "test,also in train,val/0/x.jpg,train/0/2.jpg",
    ]
    only_repeated = lists["train"].select(np.array([0, 4, 5]))
    assert check_dataset({"train": only_repeated}).ok, "a picture twice in its own class is the owner's affair"


def test_large_files_are_judged_by_head_and_tail(tmp_path):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (500, 500, 3), dtype=np.uint8))
    noise.save(tmp_path / "large.jpg", quality=95)
    data = (tmp_path / "large.jpg").read_bytes()
    assert len(data) > 2 * 65536
    assert inspect(str(tmp_path / "large.jpg")).bad == ""
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    assert inspect(str(tmp_path / "cut.jpg")).bad.startswith("truncated")
    (tmp_path / "junk.jpg").write_bytes(data + b"\0" * 20_000)
    assert inspect(str(tmp_path / "junk.jpg")).bad == ""
    load_picture(tmp_path / "junk.jpg")
    (tmp_path / "noise.jpg").write_bytes(rng.bytes(300_000))
    assert inspect(str(tmp_path / "noise.jpg")).bad == "not a picture"
    for mode, bad in (("F", "floating-point pixels, whose range nobody knows"), ("RGB", "")):
        (tmp_path / "large.tif").write_bytes(bad_files.tiff(mode))
        assert inspect(str(tmp_path / "large.tif")).bad == bad
    for name, options in (("large.png", {}), ("large.webp", {"lossless": True})):
        noise.save(tmp_path / name, **options)
        data = (tmp_path / name).read_bytes()
        assert len(data) > 2 * 65536
        for content, bad in (
            (data, ""),
            (data + b"\0" * 20_000, ""),
            (data[:-20], "truncated"),
            (data[:300], "truncated"),
        ):
            (tmp_path / name).write_bytes(content)
            assert inspect(str(tmp_path / name)).bad.partition(":")[0] == bad


def deep_set(root, shift: int, kinds: tuple[str, ...], count: int) -> ImageList:
    """Gray pictures of 16 bits, of which the upper `shift` are 0."""
    levels = np.random.default_rng(0).integers(0, 1 << 16, (count, 16, 16)).astype(np.uint16) >> shift
    names = [f"{i}{kinds[i % len(kinds)]}" for i in range(count)]
    for name, pixels in zip(names, levels, strict=True):
        if name.endswith(".pgm"):
            (root / name).write_bytes(b"P5 # made here\n16 16\n65535\n" + pixels.astype(">u2").tobytes())
        else:
            Image.fromarray(pixels.astype(np.int32) if ".32." in name else pixels).save(root / name)
    return ImageList(root, PathTable.of(names), np.arange(count, dtype=np.int32) % 2, "train.txt")


@pytest.mark.parametrize(("kinds", "bits"), [((".png", ".tif", ".pgm"), 16), ((".32.tif",), 32)])
@pytest.mark.parametrize("full", [False, True])
def test_pictures_of_12_bits_in_16_are_told(tmp_path, monkeypatch, full, kinds, bits):
    """Divided by 257 they have 16 levels; a set with a few dark pictures is none of them."""
    monkeypatch.setattr("ltfast.data.check.dali_available", lambda: bits == 16)
    for shift, found in ((4, True), (3, False)):
        images = deep_set(tmp_path, shift, kinds, 70)
        assert int(np.asarray(load_picture(images.file(0))).max()) == (15 if found else 31)
        report = check_dataset({"train": images}, full=full)
        assert report.splits[0].notes[f"{bits} bits (read as 8)"] == 70
        looked = 70 if full else 24
        note = f"train: {looked} of {looked} pictures of 16 bits that were looked at use 12 or fewer of them"
        assert [line.startswith(note) for line in report.notes] == [True] * found
        assert report.ok != found
    for name in list(images.paths)[::9]:  # a third of those that are looked at
        Image.new("I;16", (16, 16), 1).save(tmp_path / name)
    assert not check_dataset({"train": images}, full=full).notes


def test_statistics_and_plot(tmp_path):
    labels = np.repeat(np.arange(4), [150, 50, 20, 5]).astype(np.int32)
    train = ImageList(tmp_path, PathTable.of(map(str, range(len(labels)))), labels, "train.txt")
    val = train.select(np.array([0, 150, 200, 220, 221]))
    stats = dataset_stats({"train": train, "val": val, "test": val})
    assert [s.split for s in stats] == ["train", "val"], "test is val under another name"
    s = stats[0]
    assert stats[1].groups == {"many": (1, 1), "medium": (2, 2), "few": (1, 2)}
    assert (s.images, s.classes, s.largest, s.smallest, s.imbalance) == (225, 4, 150, 5, 30)
    assert s.groups == {"many": (1, 150), "medium": (2, 70), "few": (1, 5)}
    mean_difference = np.abs(np.subtract.outer([150, 50, 20, 5], [150, 50, 20, 5])).mean()
    assert s.gini == pytest.approx(mean_difference / (2 * np.mean([150, 50, 20, 5])))
    assert s.top_tenth == pytest.approx(150 / 225)
    labels = np.repeat(np.arange(11), [3, 3, *[1] * 9]).astype(np.int32)
    eleven = ImageList(tmp_path, PathTable.of(map(str, range(15))), labels, "train.txt")
    assert dataset_stats({"train": eleven})[0].top_tenth == pytest.approx(6 / 15), "two classes of eleven"
    console = Console(record=True, width=100, file=io.StringIO())
    print_stats(stats, console)
    assert "150 .. 5" in console.export_text()
    plot_counts({"train": train}, tmp_path / "counts.png")
    assert (tmp_path / "counts.png").read_bytes().startswith(b"\x89PNG")


def test_classes_are_named_with_their_counts(tmp_path):
    def shown(names: list[str], counts: list[int]) -> list[list[str]]:
        labels = np.repeat(np.arange(len(names)), counts).astype(np.int32)
        paths = PathTable.of(map(str, range(len(labels))))
        train = ImageList(tmp_path, paths, labels, "train", tuple(names))
        console = Console(record=True, width=60, file=io.StringIO())
        print_classes({"train": train, "val": train.select(np.arange(0)), "test": train.select(np.arange(2))}, console)
        lines = console.export_text().splitlines()
        return [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in lines if "\u2502" in line]

    rows = shown(["Frosch", "[b]frosch", "byte \udcff"], [2, 1, 3])
    assert rows == [["byte \ufffd", "3", "0"], ["Frosch", "2", "2"], ["[b]frosch", "1", "0"]]
    assert len(shown([f"c{c}" for c in range(20)], list(range(1, 21)))) == 20
    rows = shown([f"c{c}" for c in range(23)], list(range(1, 24)))
    named = [f"c{c}" for c in (22, 21, 20, 19, 18)], [f"c{c}" for c in range(14, -1, -1)]
    assert [row[0] for row in rows] == [*named[0], "... 3 more ...", *named[1]]


def test_statistics_of_labels_with_gaps(tmp_path, monkeypatch, capsys):
    """Classes without training images are named, and neither counted nor drawn."""
    labels = np.repeat([1, 2, 4], [150, 50, 5])
    (tmp_path / "train.txt").write_text("".join(f"{i}.jpg {label}\n" for i, label in enumerate(labels)))
    (tmp_path / "test.txt").write_text("test.jpg 1\n")
    drawn, stairs = [], Axes.stairs

    def watched(axes, values, *args, **options):
        drawn.append(values.tolist())
        return stairs(axes, values, *args, **options)

    monkeypatch.setattr(Axes, "stairs", watched)
    words = ["data", "stats", str(tmp_path), "--plot", str(tmp_path / "counts.png")]
    assert main([*words, "--train-list", f"{tmp_path}/train.txt", "--test-list", f"{tmp_path}/test.txt"]) == 0
    assert "train.txt: 2 of 5 classes have no image (class 0, 3); labels must be 0..C-1" in capsys.readouterr().out
    assert drawn == [[150, 50, 5]] * 2
    stats = dataset_stats({"train": read_list(tmp_path / "train.txt", tmp_path)})[0]
    assert stats.classes == 3
    assert stats.groups == {"many": (1, 150), "medium": (1, 50), "few": (1, 5)}


def test_splits_are_written_as_lists_that_train_on_the_same_pictures(tmp_path, capsys):
    """A test split that is held out of train has no other list of its pictures."""
    for name, count in (("a, or b", 12), ("c", 5)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "set" / name / f"{i}.png").write_bytes(b"")
    assert main(["data", "stats", str(tmp_path / "set"), "--lists", str(tmp_path / "deep" / "lists")]) == 0
    assert "lists written: " in capsys.readouterr().out
    lists = find_lists("folder", str(tmp_path / "set"))
    assert not (tmp_path / "deep" / "lists" / "val.csv").exists(), "it would be empty"
    for split in ("train", "test"):
        file = tmp_path / "deep" / "lists" / f"{split}.csv"
        back = read_list(file, tmp_path / "set")
        assert list(back.paths) == list(lists[split].paths)
        assert back.labels.tolist() == lists[split].labels.tolist()
        assert file.read_text().splitlines()[:2] == ["path,label,class", f'"{back.paths[0]}",0,"a, or b"']
    for folder, said in ((file, f"{file}/train.csv: cannot be written"), (file.parent, "train.csv is there already")):
        assert main(["data", "stats", str(tmp_path / "set"), "--lists", str(folder)]) == 2
        assert said in capsys.readouterr().err


def test_published_statistics_of_places_lt():
    folder = data_folder() / "lists"
    lists = {s: read_list(folder / f"Places_LT_{s}.txt.gz", "/") for s in ("train", "val", "test")}
    train, val, test = dataset_stats(lists)
    assert train.groups == {"many": (131, 52_762), "medium": (163, 8_934), "few": (71, 804)}
    assert train.imbalance == pytest.approx(996)
    assert train.percentiles == {10: 11, 25: 25, 50: 72, 75: 173, 90: pytest.approx(369.4)}
    assert (val.largest, val.smallest, test.largest) == (20, 20, 100)
