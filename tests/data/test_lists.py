"""Image lists: every format, every user error, the public lists where they are at hand, and speed without a clock."""

from __future__ import annotations

import gzip
import json
import os
import re
import tracemalloc
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from ltfast.cli import main
from ltfast.data.folders import limit, scan_folder, thin
from ltfast.data.lists import ImageList, hold_out, read_list, validate_lists
from ltfast.data.paths import PathTable, contained, duplicate_indices, missing_indices, shared_indices
from ltfast.data.public import PUBLIC, assign_splits, find_lists
from ltfast.errors import UserError
from tests.data.pictures import data_folder


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def touch(root: Path, *names: str) -> None:
    for name in names:
        write(root / name, "")


@pytest.mark.parametrize(
    "text",
    [
        "a/1.jpg 0\nb c/2.jpg 1\n",
        "a/1.jpg 0\nb c/2.jpg 1",
        "\ufeffa/1.jpg 0\r\n\r\nb c/2.jpg   1  \r\n\n",
        "a/1.jpg\t0\nb c/2.jpg\t01\n",
    ],
)
def test_text_lists_with_blanks_in_names_and_any_line_end(tmp_path, text):
    for name in ("l.txt", "l.txt.gz", "l.lst"):
        images = read_list(write(tmp_path / name, text), tmp_path)
        assert list(images.paths) == ["a/1.jpg", "b c/2.jpg"]
        assert images.labels.tolist() == [0, 1]
        assert images.labels.dtype == np.int32
        assert images.counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a.jpg 0\nb.jpg\n", 2),
        ("a.jpg 0\n\nb.jpg x\n", 3),
        ("a.jpg -1\n", 1),
        ("a.jpg 1.5\n", 1),
        (" 3\n", 1),
        ("a.jpg 12345678\n", 1),
        ("a.jpg,3\n", 1),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, line):
    path = write(tmp_path / "l.txt", text)
    with pytest.raises(UserError, match=rf"l\.txt: line {line}: .*<relative path> <label>"):
        read_list(path, tmp_path)


def test_random_lists_equal_a_plain_parser(tmp_path):
    rng = np.random.default_rng(0)
    alphabet = list("abc/. _-é")
    for _ in range(20):
        n = int(rng.integers(1, 60))
        names = ["x" + "".join(rng.choice(alphabet, rng.integers(0, 9))).replace("..", "").rstrip() for _ in range(n)]
        labels = rng.integers(0, 10 ** rng.integers(1, 7), n)
        text = "".join(f"{a} {b}\n" for a, b in zip(names, labels, strict=True))
        images = read_list(write(tmp_path / "l.txt", text), tmp_path)
        assert list(images.paths) == [re.sub(r"/(\.?/)+", "/", name) for name in names]
        assert images.labels.tolist() == labels.tolist()


def test_csv_by_header_or_by_place(tmp_path):
    with_header = 'id,label,filename\n7,1,"a,b.jpg"\n8,0,c.jpg\n'
    images = read_list(write(tmp_path / "l.csv", with_header), tmp_path)
    assert list(images.paths) == ["a,b.jpg", "c.jpg"]
    assert images.labels.tolist() == [1, 0]
    images = read_list(write(tmp_path / "m.csv.gz", "a.jpg,1\nb.jpg,0\n"), tmp_path)
    assert list(images.paths) == ["a.jpg", "b.jpg"]
    with pytest.raises(UserError, match=r"n\.csv: line 2: 'b.jpg,cat'"):
        read_list(write(tmp_path / "n.csv", "a.jpg,1\nb.jpg,cat\n"), tmp_path)


def test_csv_with_names_for_its_classes(tmp_path):
    """Names alone, numbers with names beside them, and columns that name nothing."""
    images = read_list(write(tmp_path / "l.csv", "image,species\na.jpg,puma\nb.jpg, fox \nc.jpg,puma\n"), tmp_path)
    assert images.labels.tolist() == [1, 0, 1]
    assert (images.class_names, images.class_ids) == (("fox", "puma"), None)
    both = write(tmp_path / "b.csv", "path,class_id,class\na.jpg,4,fox\nb.jpg,2,puma\nc.jpg,4,fox\n")
    images = read_list(both, tmp_path)
    assert images.labels.tolist() == [1, 0, 1]
    assert (images.class_names, images.class_ids) == (("puma", "fox"), (2, 4))
    assert read_list(both, tmp_path, named=False).labels.tolist() == [4, 2, 4]
    for text in ("path,label,class\na.jpg,0,fox\nb.jpg,0,cat\n", "path,label,class\na.jpg,0,\nb.jpg,1,\n"):
        assert read_list(write(tmp_path / "n.csv", text), tmp_path).class_names is None
    for text, message in (
        (
            "a.jpg,fox\nb.jpg,cat\n",
            r"line 1: 'a.jpg,fox' is not .*; class names need a first line such as 'path,class' \(titles known: path, .*label,",
        ),
        ("path,class\na.jpg,1\nb.jpg,cat\n", r"line 3: 'b.jpg,cat' is not .*; names and numbers are mixed"),
        ("path,class\na.jpg,cat\nb.jpg,\n", r"line 3: 'b.jpg,' is not .* with a label >= 0$"),
        ("path,class\n\na.jpg\n", r"line 3: 'a.jpg,' is not"),
        ("path,class\n,cat\n", r"line 2: no path"),
    ):
        with pytest.raises(UserError, match=message):
            read_list(write(tmp_path / "w.csv", text), tmp_path)
    with pytest.raises(UserError, match="; the train list has numbers, not names"):
        read_list(tmp_path / "l.csv", tmp_path, named=False)


@pytest.mark.parametrize("text", ["path,class\na.jpg,fox\nb.jpg,Bär\nc.jpg,Bör\n", "path,label,class\na.jpg,0,Bär\n"])
def test_a_csv_that_is_not_utf8_merges_no_names(tmp_path, text):
    """Excel's plain CSV: two names that differ in such letters alone would be one class."""
    file = tmp_path / "l.csv"
    file.write_bytes(text.encode("cp1252"))
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if "ä" in row)
    with pytest.raises(
        UserError, match=rf"l\.csv: line {line}: 'B\ufffdr' is not UTF-8; save it as UTF-8 .*'CSV UTF-8'"
    ):
        read_list(file, tmp_path)
    for name in ("l.csv", "l.tsv", "l.txt"):
        (tmp_path / name).write_bytes(text.encode("utf-16"))
        with pytest.raises(UserError, match=r": is UTF-16; save it as UTF-8"):
            read_list(tmp_path / name, tmp_path)
    file.write_bytes(
        "path,class\nb\xe4.jpg,fox\nb\xf6.jpg,B\xe4r\n".encode("cp1252").replace(b"B\xe4r", "Bär".encode())
    )
    images = read_list(file, tmp_path)
    assert images.class_names == ("Bär", "fox")
    assert images.paths.raw(0) == b"b\xe4.jpg", "a file name may be any bytes"


def test_a_class_name_in_either_unicode_form_is_one_class(tmp_path):
    names = [unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD")]
    images = read_list(write(tmp_path / "l.csv", f"path,class\na.jpg,{names[0]}\nb.jpg,{names[1]}\n"), tmp_path)
    assert images.class_names == (names[0],)


@pytest.mark.parametrize("name", ["l.csv", "l.csv.gz", "l.tsv", "l.tsv.gz"])
@pytest.mark.parametrize("between", [";", "\t"])
def test_columns_may_be_parted_by_semicolons_or_tabs(tmp_path, name, between):
    def found(text: str) -> ImageList:
        return read_list(write(tmp_path / name, text.replace(";", "\t" if ".tsv" in name else between)), tmp_path)

    for titles in ("image;label_name", '\n"image";"Species_name"', "class_label;path;species"):
        shown = "{0};{1}" if titles.startswith(("image", "\n")) else "{1};{0};{1}"
        images = found("\n".join([titles, shown.format("a, b.jpg", "fox"), shown.format("c.jpg", "ant")]))
        assert list(images.paths) == ["a, b.jpg", "c.jpg"]
        assert (images.labels.tolist(), images.class_names) == ([1, 0], ("ant", "fox"))
    assert found("a b.jpg;1\nc.jpg;0\n").labels.tolist() == [1, 0]
    assert found("file;class_label;label_id\na.jpg;3;5\n").labels.tolist() == [5]


def test_a_csv_of_several_splits_is_refused(tmp_path):
    """Its test pictures would be trained on."""
    file = write(tmp_path / "l.csv", "path,class,Split\na.jpg,fox,Train\nb.jpg,ant,test\nc.jpg,ant,train\n")
    with pytest.raises(
        UserError, match=r"l\.csv: holds several splits \(column 'Split': train, test\); give each its own"
    ):
        read_list(file, tmp_path)
    for said in (("train", "TRAINING"), ("val", "dev"), ("1", "2"), ("test", "")):
        text = f"set,path,class\n{said[0]},a.jpg,fox\n{said[1]},b.jpg,ant\n"
        assert len(read_list(write(file, text), tmp_path)) == 2


def test_csv_lists_have_the_classes_of_train(tmp_path):
    def found(train: str, test: str, suffix: str = "csv") -> ImageList:
        files = write(tmp_path / "train.csv", train), write(tmp_path / f"test.{suffix}", test)
        return find_lists("list", tmp_path, train_list=files[0], test_list=files[1])["test"]

    named, numbered = "path,class\na,fox\nb,puma\nc,ant\n", "path,label,class\na,2,fox\nb,0,puma\nc,1,ant\n"
    assert found(named, "path,class\nd,puma\ne,ant\n").labels.tolist() == [2, 0]
    assert found(named, "path,label,class\nd,0,puma\ne,1,ant\n").labels.tolist() == [2, 0]
    for test in ("path,class\nd,puma\ne,ant\n", "path,label,class\nd,0,puma\ne,1,ant\n", "d,0\ne,1\n"):
        assert found(numbered, test).labels.tolist() == [0, 1]
    assert found(numbered, "d 0\ne 1\n", "txt").labels.tolist() == [0, 1]
    gapped = "path,class_id,class\na,1,fox\nb,2,puma\nc,5,ant\n"  # labels 0, 1, 2
    for test in ("d,1\ne,5\n", "path,class_id,class\nd,1,\ne,5,ant\n", "path,class_id,class\nd,1,fox\ne,5,ant\n"):
        assert found(gapped, test).labels.tolist() == [0, 2]
    assert found(gapped, "d 1\ne 5\n", "txt").labels.tolist() == [0, 2]
    plain = "a,0\nb,1\nc,2\n"
    images = found(plain, "path,label,class\nd,0,puma\ne,2,ant\n")
    assert (images.labels.tolist(), images.class_names) == ([0, 2], None)
    for train, test, message in (
        (named, "path,class\nd,wolf\n", r"test\.csv: class 'wolf' is not in .*train\.csv; all lists need"),
        (numbered, "path,label,class\nd,0,fox\n", r"test\.csv: category 0 \('fox'\) is 'puma' in .*train\.csv"),
        (gapped, "d,0\n", r"test\.csv: label 0 is not in .*train\.csv"),
        (named, "d,0\n", r"test\.csv: labels are numbers, but .*train\.csv names its classes"),
        (plain, "path,class\nd,fox\n", r"test\.csv: line 2: 'd,fox' is not .*; the train list has numbers, not names"),
    ):
        with pytest.raises(UserError, match=message):
            found(train, test)


def test_inaturalist_json(tmp_path):
    content = {
        "images": [{"id": 5, "file_name": "t/a.jpg"}, {"id": 3, "file_name": "t/b.jpg"}],
        "annotations": [{"image_id": 3, "category_id": 40}, {"image_id": 5, "category_id": 9}],
        "categories": [{"id": 40, "name": "Apis"}, {"id": 9, "name": "Bufo"}],
    }
    images = read_list(write(tmp_path / "train2018.json", json.dumps(content)), tmp_path)
    assert list(images.paths) == ["t/a.jpg", "t/b.jpg"]
    assert images.labels.tolist() == [0, 1]
    assert images.class_names == ("Bufo", "Apis")
    content["annotations"] += [{"image_id": 3, "category_id": 40}, {"image_id": 8, "category_id": 9}]
    boxes = read_list(write(tmp_path / "boxes.json", json.dumps(content)), tmp_path)  # one category, twice in a picture
    assert boxes.labels.tolist() == [0, 1]
    content["annotations"] += [{"image_id": 3, "category_id": 9}]
    with pytest.raises(UserError, match=r"t/b\.jpg has annotations of several categories"):
        read_list(write(tmp_path / "two.json", json.dumps(content)), tmp_path)
    content["annotations"] = content["annotations"][:1]
    with pytest.raises(UserError, match=r"t/a\.jpg has no annotation \(1 of 2 pictures\)"):
        read_list(write(tmp_path / "none.json", json.dumps(content)), tmp_path)
    del content["annotations"]
    with pytest.raises(UserError, match="is not an iNaturalist annotation file"):
        read_list(write(tmp_path / "x.json", json.dumps(content)), tmp_path)
    with pytest.raises(UserError, match="is not an iNaturalist annotation file"):
        read_list(write(tmp_path / "y.json", "{"), tmp_path)


def coco(path: Path, categories: dict[int, str], ids: list[int]) -> Path:
    """An annotation file with one image of each category of `ids`."""
    content = {
        "images": [{"id": i, "file_name": f"{path.stem}/{i}.jpg"} for i in range(len(ids))],
        "annotations": [{"image_id": i, "category_id": c} for i, c in enumerate(ids)],
        "categories": [{"id": c, "name": name} for c, name in categories.items()],
    }
    return write(path, json.dumps(content))


def test_json_lists_have_the_classes_of_train(tmp_path):
    def found(train: Path, test: Path) -> ImageList:
        return find_lists("list", tmp_path, train_list=train, test_list=test)["test"]

    train = coco(tmp_path / "train.json", {3: "ant", 5: "bee", 8: "cat"}, [3, 5, 8])
    test = found(train, coco(tmp_path / "test.json", {3: "ant", 8: "cat"}, [8, 3, 8]))
    assert test.labels.tolist() == [2, 0, 2]
    assert test.class_names == ("ant", "bee", "cat")
    for categories, message in (
        (
            {3: "ant", 9: "dog"},
            r"o\.json: category 9 \('dog'\) is not in .*train\.json; all lists need the same categories",
        ),
        ({3: "ant", 5: "cat"}, r"o\.json: category 5 \('cat'\) is 'bee' in .*train\.json"),
    ):
        other = coco(tmp_path / "o.json", categories, [3])
        with pytest.raises(UserError, match=message):
            found(train, other)
        assert main(["data", "check", str(tmp_path), "--train-list", str(train), "--test-list", str(other)]) == 2
    text = write(tmp_path / "train.txt", "a.jpg 0\nb.jpg 1\nc.jpg 2\n")
    assert found(text, train).labels.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"test\.json: 2 categories, but .*train\.txt has 3 classes and no names"):
        found(text, tmp_path / "test.json")


def test_unreadable_list_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_list(tmp_path / "none.txt", tmp_path)
    with pytest.raises(UserError, match="holds no image"):
        read_list(write(tmp_path / "empty.txt", "\n"), tmp_path)
    whole = gzip.compress(b"a.jpg 0\n" * 1000)
    (tmp_path / "cut.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="not a complete gzip file"):
        read_list(tmp_path / "cut.txt.gz", tmp_path)


@pytest.mark.parametrize("name", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "a\0b.jpg", "a/..", ".."])
def test_a_path_cannot_leave_the_root(tmp_path, name):
    path = write(tmp_path / "l.txt", f"ok.jpg 0\n{name} 1\n")
    with pytest.raises(UserError, match=r"l\.txt: entry 2: path .* leaves"):
        read_list(path, tmp_path)


def test_harmless_dots_and_absolute_names_inside_the_root_stay(tmp_path):
    path = write(tmp_path / "l.txt", f"a..b.jpg 0\n{tmp_path.resolve()}/c.jpg 1\n...x/d.jpg 2\n")
    assert list(read_list(path, tmp_path).paths) == ["a..b.jpg", "c.jpg", "...x/d.jpg"]
    table = PathTable.of(["a", ""])
    with pytest.raises(UserError, match="entry 2"):
        contained(table, tmp_path, "l")


def test_a_file_spelled_in_two_ways_is_one_file(tmp_path):
    names = ["./a.jpg", "b//./c", ".//./d", "/e//f", "x.", "/g./h", "", "../.i/./...", "././", "j/.", "/.k/"]
    plain = ["a.jpg", "b/c", "d", "/e/f", "x.", "/g./h", "", "../.i/...", "", "j/.", "/.k/"]
    assert list(PathTable.of(names).plain()) == plain
    same = PathTable.of(["a..b/.c", "x.", "/d"])
    assert list(same.plain()) == list(same)
    train = read_list(
        write(tmp_path / "train.txt", f"./a/0.png 0\na//1.png 1\n{tmp_path.resolve()}//a/2.png 1\n"), tmp_path
    )
    assert list(train.paths) == ["a/0.png", "a/1.png", "a/2.png"]
    test = read_list(write(tmp_path / "test.txt", "a/0.png 0\nb.png 1\n"), tmp_path)
    with pytest.raises(UserError, match=r"1 of 2 test images are in train too, first 'a/0\.png'"):
        validate_lists({"train": train, "test": test}, exist=False)
    assert list(train.without({b"a/0.png", b"./a//1.png"}).paths) == ["a/2.png"]


def test_path_table():
    table = PathTable.of(["a", "bcé", b"\xff.jpg"])
    assert list(table) == ["a", "bcé", "\udcff.jpg"]
    assert table.raw(-1) == b"\xff.jpg"
    assert list(table.select(np.array([2, 0]))) == ["\udcff.jpg", "a"]
    assert list(table.select(np.array([False, True, False]))) == ["bcé"]
    with pytest.raises(IndexError):
        table.raw(3)
    assert duplicate_indices(PathTable.of(["a", "b", "a", "a"])) == [(0, 2), (0, 3)]
    assert duplicate_indices(PathTable.of(["a", "b", "a", "a"]), limit=1) == [(0, 2)]
    assert shared_indices(PathTable.of(["x", "b", "y"]), PathTable.of(["a", "c", "b"])) == [2]


def test_a_fingerprint_tells_names_labels_and_where_names_end(tmp_path):
    same = list_of(tmp_path, [0, 1], ["ab", "c"])
    moved = list_of(tmp_path / "elsewhere", [0, 1], ["ab", "c"])
    others = [
        list_of(tmp_path, [1, 0], ["ab", "c"]),
        *(list_of(tmp_path, [0, 1], n) for n in (["a", "bc"], ["ab", "d"])),
    ]
    assert moved.fingerprint() == same.fingerprint()
    assert len({images.fingerprint() for images in (same, *others)}) == 4


def test_a_selection_keeps_labels_beside_their_files(tmp_path):
    chosen = list_of(tmp_path, [0, 1, 2]).select(np.array([2, 0]))
    assert (list(chosen.paths), chosen.labels.tolist()) == (["2.jpg", "0.jpg"], [2, 0])


def test_names_count_classes_that_a_split_lacks(tmp_path):
    few = ImageList(tmp_path, PathTable.of(["x"]), np.array([0], dtype=np.int32), "val", ("a", "b", "c"))
    assert few.counts.tolist() == [1, 0, 0]


def list_of(root: Path, labels: list[int], names: list[str] | None = None) -> ImageList:
    names = names or [f"{i}.jpg" for i in range(len(labels))]
    return ImageList(root, PathTable.of(names), np.array(labels, dtype=np.int32), "train.txt")


def test_validation_names_gaps_ranges_repeats_and_missing_files(tmp_path):
    touch(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    good = list_of(tmp_path, [0, 1, 1])
    touch(tmp_path, "v.jpg")
    assert validate_lists({"train": good, "val": list_of(tmp_path, [1], ["v.jpg"])}) == 2
    with pytest.raises(UserError, match=r"2 of 4 classes have no image \(class 1, 2\)"):
        validate_lists({"train": list_of(tmp_path, [0, 3, 3])})
    with pytest.raises(UserError, match=r"label 2 in val, but train\.txt has classes 0\.\.1"):
        validate_lists({"train": good, "val": list_of(tmp_path, [2])})
    with pytest.raises(UserError, match=r"'0\.jpg' stands twice \(entries 1 and 3\)"):
        validate_lists({"train": list_of(tmp_path, [0, 1, 1], ["0.jpg", "1.jpg", "0.jpg"])})
    with pytest.raises(UserError, match=r"1 of 3 files are not below .*first 'no/2\.jpg'"):
        validate_lists({"train": list_of(tmp_path, [0, 1, 1], ["0.jpg", "1.jpg", "no/2.jpg"])})
    with pytest.raises(UserError, match="only one class"):
        validate_lists({"train": list_of(tmp_path, [0, 0])})
    with pytest.raises(UserError, match=r"train\.txt: no image to test on"):
        validate_lists({"train": good, "test": list_of(tmp_path, [])})
    with pytest.raises(UserError, match=r"1 of 2 test images are in train too, first '1\.jpg'"):
        validate_lists({"train": good, "test": list_of(tmp_path, [0, 1], ["3.jpg", "1.jpg"])}, exist=False)
    assert missing_indices(tmp_path, PathTable.of(["0.jpg", "0.jpg/x", "z", "y"]), limit=2) == [1, 2]


def tree(root: Path) -> None:
    touch(root, "train/cat/1.jpg", "train/cat/deep/2.PNG", "train/ant/3.jpeg", "train/ant/notes.txt", "val/cat/4.jpg")


def test_folder_tree(tmp_path, caplog):
    tree(tmp_path)
    splits = scan_folder(tmp_path)
    assert "files not read, for their suffix: 1 .txt" in caplog.text
    assert splits["train"].class_names == ("ant", "cat")
    assert list(splits["train"].paths) == ["train/ant/3.jpeg", "train/cat/1.jpg", "train/cat/deep/2.PNG"]
    assert splits["train"].labels.tolist() == [0, 1, 1]
    assert list(splits["val"].paths) == ["val/cat/4.jpg"]
    assert validate_lists(splits) == 2
    touch(tmp_path, "val/dog/5.jpg")
    with pytest.raises(UserError, match="class folder 'dog' that the training folder lacks"):
        scan_folder(tmp_path)
    with pytest.raises(UserError, match="holds no class folders"):
        scan_folder(tmp_path / "train" / "cat" / "deep")
    with pytest.raises(UserError, match="no such folder of pictures"):
        scan_folder(tmp_path / "none")


def test_class_folders_in_either_unicode_form_are_one_class(tmp_path):
    """A Mac writes them decomposed, and they may be copied beside others."""
    composed, decomposed = (unicodedata.normalize(form, "Bär") for form in ("NFC", "NFD"))
    touch(tmp_path, f"train/{composed}/1.jpg", "train/cat/2.jpg", f"test/{decomposed}/3.jpg", "test/cat/4.jpg")
    splits = scan_folder(tmp_path)
    assert splits["test"].class_names == splits["train"].class_names == (composed, "cat")
    assert splits["test"].labels.tolist() == [0, 1]
    assert Path(splits["test"].file(0)).exists()
    touch(tmp_path, f"train/{decomposed}/5.jpg")
    assert scan_folder(tmp_path)["train"].counts.tolist() == [2, 1]


@pytest.mark.parametrize("splits", [("train", "test"), ("",)])
def test_pictures_beside_the_class_folders_are_told(tmp_path, caplog, splits):
    for split in splits:
        touch(tmp_path / split, "a/1.jpg", "b/2.jpg", "notes.txt", ".hidden.jpg")
    scan_folder(tmp_path)
    assert not caplog.text
    touch(tmp_path / splits[0], "3.jpg", "4.PNG")
    assert len(scan_folder(tmp_path)["train"]) == 2
    assert [r.message for r in caplog.records] == [
        f"pictures not read, for they lie in no class folder: 2 in {tmp_path / splits[0]}"
    ]


def test_a_list_with_backslashes_says_so(tmp_path, capsys):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg")
    file = write(tmp_path / "l.txt", "train\\a\\1.jpg 0\ntrain\\b\\2.jpg 1\n")
    hint = "its path has backslashes, use /"
    with pytest.raises(UserError, match=rf"2 of 2 files are not below .*; {hint}$"):
        validate_lists({"train": read_list(file, tmp_path)})
    assert main(["data", "check", str(tmp_path), "--train-list", str(file), "--bad-list", f"{tmp_path}/bad.txt"]) == 1
    assert (tmp_path / "bad.txt").read_text().count(f"missing; {hint}") == 2


def test_folders_below_a_class_are_read_in_the_order_of_their_names(tmp_path):
    names = [f"train/{label}/{folder}/1.jpg" for label in "ab" for folder in "abcdefgh"]
    touch(tmp_path, *reversed(names))
    assert list(scan_folder(tmp_path)["train"].paths) == names


def test_hidden_files_and_loops_of_links_are_no_pictures(tmp_path):
    tree(tmp_path)
    touch(tmp_path, "train/.ipynb_checkpoints/1.jpg", "train/cat/.cache/1.jpg", "train/cat/._1.jpg", "train/.DS_Store")
    (tmp_path / "train/cat/deep/up").symlink_to("..")
    (tmp_path / "train/ant/all").symlink_to("../..")
    (tmp_path / "train/linked").symlink_to("ant")
    train = scan_folder(tmp_path)["train"]
    assert train.class_names == ("ant", "cat", "linked")
    assert [name for name in train.paths if "linked" not in name] == [
        "train/ant/3.jpeg", "train/cat/1.jpg", "train/cat/deep/2.PNG",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    tree(tmp_path)
    listed = os.scandir

    def scandir(folder):
        if str(folder).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"train/cat/deep cannot be read: Permission denied"):
        scan_folder(tmp_path)


def test_thinning_and_holding_out(tmp_path):
    images = list_of(tmp_path, [0] * 40 + [1] * 40 + [2] * 3)
    assert thin(images, 16.0).counts.tolist() == [40, 10, 2]
    assert limit(images, 9).counts.tolist() == [4, 4, 1]
    rest, held = hold_out(images, 0.1, seed=0)
    assert held.counts.tolist() == [4, 4, 1]
    assert sorted([*rest.paths, *held.paths]) == sorted(images.paths)
    again = hold_out(images, 0.1, seed=0)[1]
    assert list(again.paths) == list(held.paths)
    first_ones = [f"{i}.jpg" for i in (0, 1, 2, 3, 40, 41, 42, 43, 80)]
    assert list(held.paths) != first_ones, "drawn, not the first of each class"
    assert list(assign_splits({"train": images})["test"].paths) == list(held.paths), "the same draw for every run"
    single = list_of(tmp_path, [0, 0, 1])
    assert hold_out(single, 0.5, seed=1)[1].counts.tolist()[:1] == [1]
    assert hold_out(single, 0.5, seed=1)[0].counts.tolist() == [1, 1]
    with pytest.raises(ValueError, match="share"):
        hold_out(images, 1.0, seed=0)


def test_finding_the_lists_of_a_set(tmp_path):
    tree(tmp_path)
    lists = find_lists("folder", tmp_path)
    assert [len(lists[s]) for s in ("train", "val", "test")] == [3, 0, 1]
    assert lists["test"].split == "val"
    write(tmp_path / "t.txt", "train/cat/1.jpg 0\ntrain/ant/3.jpeg 0\n")
    lists = find_lists("list", tmp_path, train_list="t.txt")
    assert [len(lists[s]) for s in ("train", "val", "test")] == [1, 0, 1]
    assert lists["test"].split == "train"
    with pytest.raises(UserError, match="--train-list"):
        find_lists("list", tmp_path)
    with pytest.raises(UserError, match="unknown data set 'imagenet'"):
        find_lists("imagenet", tmp_path)


@pytest.mark.parametrize(
    ("name", "images", "classes"), [("imagenet-lt", "115,846", "1,000"), ("inat18", "437,513", "8,142")]
)
def test_a_list_that_must_be_obtained_says_where_and_what(tmp_path, name, images, classes):
    with pytest.raises(UserError) as error:
        find_lists(name, tmp_path)
    for part in ("facebookresearch/classifier-balancing", "FlamieZhu/Balanced-Contrastive-Learning", images, classes):
        assert part in str(error.value)
    write(tmp_path / "lists" / PUBLIC[name].splits["train"].files[0], "a.jpg 0\nb.jpg 1\n")
    with pytest.raises(UserError, match=f"holds 2 images in 2 classes, expected {images}"):
        find_lists(name, tmp_path)


@pytest.mark.parametrize(
    ("file", "dataset", "split"),
    [
        ("Places_LT_train", "places-lt", "train"),
        ("Places_LT_val", "places-lt", "val"),
        ("Places_LT_test", "places-lt", "test"),
        ("ImageNet_LT_val", "imagenet-lt", "val"),
        ("ImageNet_LT_test", "imagenet-lt", "test"),
        ("iNaturalist18_val", "inat18", "val"),
    ],
)
def test_published_lists_hold_what_we_say(file, dataset, split):
    facts = PUBLIC[dataset].splits[split]
    path = data_folder() / "lists" / f"{file}.txt.gz"
    images = read_list(path, "/")
    counts = images.counts
    assert (len(images), len(counts), counts.max(), counts.min()) == (
        facts.images,
        facts.classes,
        facts.largest,
        facts.smallest,
    )
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    assert [f"{p} {int(c)}" for p, c in zip(images.paths, images.labels, strict=True)] == lines
    assert duplicate_indices(images.paths) == []


def test_a_quarter_of_a_million_lines_stay_small(tmp_path):
    lines = "".join(f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG {i % 1000}\n" for i in range(250_000))
    path = write(tmp_path / "l.txt", lines)
    tracemalloc.start()
    images = read_list(path, tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # 330 bytes a line are 0.33 GB at a million; observed 276 (in use afterwards: 44).
    assert peak < 330 * len(images)
    assert kept < 60 * len(images)


def test_a_set_with_one_list_to_test_on_takes_no_two(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x.jpg 0\n")
    with pytest.raises(UserError, match="not both"):
        find_lists("inat18", tmp_path, val_list=tmp_path / "a.txt", test_list=tmp_path / "b.txt")
