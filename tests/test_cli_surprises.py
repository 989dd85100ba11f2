"""What users of the command line ran into: names, folders and lists that are not quite what a command expects."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ltfast.cli import main
from ltfast.data.contact import contact_sheet
from ltfast.data.decode import BadImage, decode
from ltfast.data.folders import scan_folder
from ltfast.errors import UserError
from ltfast.metrics import format_table
from ltfast.recipes import build_config
from ltfast.report.main import report
from ltfast.runs import RunFolder
from tests.test_resume import StopAt

COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}


def pictures(
    root: Path, classes: dict[str, tuple[int, int, int]], *, train: str = "train", test: str = "test", n: int = 6
) -> Path:
    """A folder tree of plain pictures with some noise."""
    rng = np.random.default_rng(0)
    for split in (train, test):
        for name, colour in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                noise = rng.integers(-25, 25, (16, 16, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
                    root / split / name / f"{split}{i}.png"
                )
    return root


def training(root: Path, *more: str) -> list[str]:
    """Words of a training on the tree, its batch a class's pictures; an option that is given again counts."""
    words = f"train --dataset folder-small --batch 6 --model resnet8 --device cpu --image-size 16 --no-tensorboard {' '.join(more)}"
    return [*words.split(), "--data-dir", str(root)]


def fitted(root: Path, out: Path, *more: str) -> Path:
    """A run of one epoch on the tree."""
    assert main([*training(root, "--method ce --epochs 1", *more), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run, its data)."""
    folder = tmp_path_factory.mktemp("small")
    data = pictures(folder / "data", COLOURS)
    return fitted(data, folder / "run"), data


def test_evaluation_refuses_other_classes_in_the_same_number(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = trained
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for split in ("train", "test"):
        (other / split / "ant").rename(other / split / "zebra")
    assert main(["eval", str(run), "--data-dir", str(other)]) == 2
    assert "class 0 is 'ant' there and 'bee' here" in capsys.readouterr().err
    page = report([str(run)], tmp_path / "report", data_dir=str(other), quiet=True)
    assert "give the data that the run was trained on" in page.read_text()


def test_evaluation_names_classes_and_refuses_what_it_does_not_read(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = trained
    assert main(["eval", str(run), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["class_names"] == list(COLOURS)
    assert row["train_counts"] == [6, 6, 6]
    assert main(["eval", str(run), "--test-list", "list.txt"]) == 2
    assert "folder-small does not read it" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_run_without_validation_says_why_it_has_no_best(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    run, _ = trained
    assert main([command, str(run), "--checkpoint", "best"]) == 2
    assert "no validation split, so none was chosen best; use --checkpoint last" in capsys.readouterr().err


@pytest.mark.parametrize(("train", "test"), [("Train", "Test"), ("training", "testing"), ("TRAIN", "Valid")])
def test_split_folders_by_other_names(tmp_path: Path, train: str, test: str) -> None:
    lists = scan_folder(pictures(tmp_path, COLOURS, train=train, test=test))
    assert lists["train"].class_names == tuple(COLOURS)
    assert len(lists["train"]) == len(lists["val" if test == "Valid" else "test"]) == 18


def test_a_tree_with_test_alone_is_no_tree_of_one_class(tmp_path: Path) -> None:
    (pictures(tmp_path, COLOURS) / "train").rename(tmp_path / ".train")
    with pytest.raises(UserError, match="holds test and no folder train"):
        scan_folder(tmp_path)


def test_check_refuses_lists_that_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path / "data", COLOURS)
    for split in ("train", "test"):
        rows = [
            f"{p.relative_to(root)} {c}\n"
            for c, name in enumerate(COLOURS)
            for p in sorted((root / split / name).iterdir())
        ]
        (tmp_path / f"{split}.txt").write_text("".join(rows).replace(" 2\n", " 5\n" if split == "test" else " 2\n"))
    lists = ["--train-list", str(tmp_path / "train.txt"), "--test-list", str(tmp_path / "test.txt")]
    assert main(["data", "check", str(root), *lists]) == 1
    assert "label 5 in test" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "check", str(root), "--test-list", str(tmp_path / "test.txt")]) == 2
    assert "folder does not read it" in capsys.readouterr().err


def test_a_run_has_the_name_of_what_it_does() -> None:
    assert build_config("digits-lt", "gkp-gsa", {}, {"loss": "ce", "sharpness": "none", "gkp": False}).method == "ce"
    assert build_config("digits-lt", "gkp-gsa", {"sharpness": "sam"}, {}).method == "bcl+sam+gkp"
    assert build_config("digits-lt", "gkp-gsa", {}, {"groups": 3}).method == "gkp-gsa"


def test_brackets_in_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pictures(tmp_path / "data", {"Quercus [sp]": (9, 9, 9), **COLOURS})
    bad = root / "train" / "Quercus [sp]" / "[bold]cut.jpg"
    bad.write_bytes(b"\xff\xd8\xff\xe0" + b"\0" * 20)
    assert main(["data", "check", str(root)]) == 1
    assert "[sp]/[bold]cut.jpg" in "".join(capsys.readouterr().out.split())
    bad.unlink()
    fitted(root, tmp_path / "o[/x]1")


def test_a_dry_run_refuses_the_folder_that_training_refuses(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = trained
    assert main([*training(data), "--out", str(run), "--dry-run"]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main([*training(data), "--out", str(tmp_path / "new"), "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()
    assert main(["train", "--resume", str(run), "--dry-run"]) == 0


def test_a_run_too_short_for_its_warm_up_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = "the learning rate never leaves its warm-up: --warmup 3 of --epochs 2"
    words = ["train", "--method", "ce", "--limit-train", "72", "--batch", "36", "--device", "cpu", "--no-tensorboard"]
    for last, said in (
        (["--dry-run"], True),
        (["--out", str(tmp_path / "run")], True),
        (["--warmup", "1.5", "--dry-run"], False),
    ):
        assert main([*words, "--epochs", "2", *last]) == 0
        assert (note in capsys.readouterr().out) is said


def test_eval_and_export_say_how_far_an_unfinished_run_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, run = StopAt(3), tmp_path / "run"
    monkeypatch.setattr("ltfast.progress.ConsoleProgress.step", lambda self, *args: stop.step(*args))
    words = ["train", "--method", "ce", "--epochs", "4", "--limit-train", "72", "--batch", "36", "--device", "cpu"]
    assert main([*words, "--no-tensorboard", "--out", str(run)]) == 0
    for resumed in (False, True):
        for command, checkpoint in (("eval", "last"), ("export", "best")):
            assert main([command, str(run), "--checkpoint", checkpoint]) == 0
            assert ("(epoch 1 of 4)" in capsys.readouterr().out) is not resumed
        assert main(["train", "--resume", str(run)]) == 0
        capsys.readouterr()


def test_names_that_the_terminal_cannot_show_end_nothing(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"\u00e9pic\u00e9a": (200, 30, 30), "\u0435\u043b\u044c": (30, 200, 30), "ant": (30, 30, 200)}
    run = fitted(pictures(tmp_path / "data", names), tmp_path / "run")
    bare = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bare, encoding="latin-1", errors="strict"))
    assert main(["eval", str(run)]) == 0
    sys.stdout.flush()
    assert b"\xe9pic\xe9a" in bare.getvalue()


def test_a_path_that_no_config_can_hold_is_a_mistake_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "caf\udce9"  # a Latin-1 name
    assert main([*training(pictures(tmp_path / "data", COLOURS), "--method ce --epochs 1"), "--out", str(out)]) == 2
    assert "--out: holds a byte that is not UTF-8" in capsys.readouterr().err
    assert not out.exists()


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.log("data", class_names=["ant", "none"])
    folder.check_classes(["ant", "none"], "the data", "")
    with pytest.raises(UserError, match="the data: class 1 is 'none' there and None here"):
        folder.check_classes(["ant"], "the data", "")


def test_an_interrupted_report_leaves_a_page(
    trained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ltfast.report.compute.profile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report([str(trained[0])], tmp_path / "report", quiet=True)
    text = (tmp_path / "report" / "index.html").read_text()
    assert "the report was interrupted before" in text
    assert "Calibration" in text


def test_long_names_stay_apart_in_tables() -> None:
    names = [f"Magnoliopsida_Lamiales_Orobanchaceae_Castilleja_species_{i:03}" for i in range(3)]
    result = {
        "per_class": [1.0, 2.0, 3.0],
        "top1": 2.0,
        "top5": 2.0,
        "macro": 2.0,
        "many": None,
        "medium": None,
        "few": 2.0,
        "ece": 1.0,
        "nonfinite": 0,
    }
    table = format_table(result, names, [3, 2, 1])
    assert all(f"_{i:03}" in table for i in range(3))


def test_fewer_classes_than_the_default_number_of_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = {name: COLOURS[name] for name in ("ant", "bee")}
    root = pictures(tmp_path / "data", two, n=8)
    run = fitted(root, tmp_path / "run", "--method", "gkp-gsa", "--epochs", "3")
    assert main(["eval", str(run)]) == 0
    assert main(training(root, "--groups 3")) == 2
    assert "--groups 3: more groups than the 2 classes" in capsys.readouterr().err


def test_tiff_is_not_turned_and_floats_are_refused() -> None:
    picture = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    picture.save(data, "TIFF", exif=exif)
    assert np.array_equal(np.asarray(decode(data.getvalue())), np.asarray(picture))
    data = io.BytesIO()
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(data, "TIFF")
    with pytest.raises(BadImage, match="floating-point"):
        decode(data.getvalue())


def test_a_config_file_with_a_byte_order_mark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + b"[optim]\nepochs = 3\n")
    assert main(["train", "--config", str(tmp_path / "c.toml"), "--dry-run"]) == 0


def test_captions_of_a_contact_sheet_take_the_room_they_need(tmp_path: Path) -> None:
    from ltfast.data import load

    wide = {f"{letter} very long name of a class of insects": (9, 9, 9) for letter in "ab"}
    widths = []
    for name, classes in (("long", wide), ("short", {"a": (9, 9, 9), "b": (99, 9, 9)})):
        source = load("folder-small", data_dir=pictures(tmp_path / name, classes), batch=4, num_views=1, image_size=16)
        with Image.open(contact_sheet(source, tmp_path / f"{name}.png", n=4)) as sheet:
            widths.append(sheet.width)
    assert widths[0] > widths[1] + 100


def test_tables_of_classes_and_of_a_folder_of_pictures(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = trained
    assert main(["eval", str(run), "--csv", str(tmp_path / "classes.csv")]) == 0
    rows = list(csv.reader((tmp_path / "classes.csv").read_text().splitlines()))
    assert rows[0] == ["class", "train_images", "test_images", "accuracy"]
    assert [row[:3] for row in rows[1:]] == [[name, "6", "6"] for name in COLOURS]
    capsys.readouterr()
    assert main(["predict", str(run), str(data / "test"), "--csv", "--top", "2"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert len(rows) == 1 + 18
    assert all(len(row) == 5 and row[1] in COLOURS and float(row[2]) >= float(row[4]) for row in rows[1:])
    assert main(["predict", str(run), str(data / "test"), "--csv", "--json"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["predict", str(run), str(tmp_path / "none")]) == 2
    assert "no pictures below this folder" in capsys.readouterr().err
