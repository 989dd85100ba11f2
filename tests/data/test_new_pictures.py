"""A run is judged by pictures that came after it (a folder with test/ alone, or a list of them), and picture by picture."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ltfast.cli import main
from ltfast.cli_runs import write_predictions
from tests.data.small_sets import write_tree
from tests.data.test_cli_data import TREE

QUICK = [
    "--model", "resnet8", "--batch", "3", "--epochs", "1", "--method", "ce", "--device", "cpu", "--no-tensorboard",
]  # fmt: skip
LARGE = ["--image-size", "16", "--loader", "torch", "--workers", "0"]


def train(root: Path, run: Path, dataset: str, *words: str) -> list[str]:
    large = [] if dataset == "folder-small" else LARGE
    return ["train", "--dataset", dataset, "--data-dir", str(root), "--out", str(run), *QUICK, *large, *words]


def evaluated(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", str(run), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dataset", ["folder", "folder-small"])
@pytest.mark.parametrize("held", [(), ("--val-per-class", "1", "--limit-train", "12")])
def test_a_folder_of_test_pictures_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, held: tuple[str, ...]
) -> None:
    old, new, run = (tmp_path / name for name in ("old", "new", "run"))
    write_tree(old, TREE)
    assert main(train(old, run, dataset, *held)) == 0
    before = evaluated(capsys, run)
    assert sum(before["train_counts"]) == (12 if held else 18)
    shutil.copytree(old / "test", new / "Testing")
    assert evaluated(capsys, run, "--data-dir", str(new)) == before
    assert main(["eval", str(run), "--data-dir", str(new), "--split", "val"]) == 2

    shutil.rmtree(new / "Testing/class001")
    first = new / "Testing/class000/0000.png"
    Image.open(first).resize((50, 40)).save(first)
    fewer = evaluated(capsys, run, "--data-dir", str(new))
    assert (fewer["n"], fewer["per_class"][1]) == (4, None)
    assert fewer["train_counts"] == before["train_counts"]

    old.rename(tmp_path / "older")
    assert main(["eval", str(run)]) == 2
    gone = f"{old}: no such folder of pictures; if they moved, --data-dir says where they lie now\n"
    assert capsys.readouterr().err.endswith(gone)

    (new / "Testing/class009").mkdir()
    assert main(["eval", str(run), "--data-dir", str(new)]) == 2
    classes = "class000, class001, class002"
    unknown = f"holds the class folder 'class009' that the run was not trained on; its classes are {classes}\n"
    assert capsys.readouterr().err.endswith(unknown)
    assert main(train(new, tmp_path / "none", dataset)) == 2
    assert "holds Testing and no folder train" in capsys.readouterr().err


@pytest.mark.parametrize("named", [False, True])
def test_a_list_of_new_pictures_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], named: bool) -> None:
    old, new, run = (tmp_path / name for name in ("old", "new", "run"))
    write_tree(old, TREE)
    for split in TREE:
        files = sorted((old / split).glob("*/*.png"))
        label = [f"{f.parent.name}" if named else f"{int(f.parent.name[-3:])}" for f in files]
        rows = [f"{file.relative_to(old)},{name}\n" for file, name in zip(files, label, strict=True)]
        (tmp_path / f"{split}.csv").write_text("path,label\n" + "".join(rows))
    lists = [w for split in TREE for w in (f"--{split}-list", str(tmp_path / f"{split}.csv"))]
    assert main(train(old, run, "list", *lists)) == 0
    before = evaluated(capsys, run)

    (old / "test").rename(new)
    judge, text = tmp_path / "judge.csv", (tmp_path / "test.csv").read_text().replace("test/", "")
    words = ["--data-dir", str(new), "--test-list", str(judge)]
    judge.write_text(text)
    assert evaluated(capsys, run, *words) == before
    judge.write_text("\n".join(text.splitlines()[:3]))  # the first class alone
    assert evaluated(capsys, run, *words)["n"] == 2
    judge.write_text(text.replace("class002\n" if named else ",2\n", "class009\n" if named else ",9\n"))
    assert main(["eval", str(run), *words]) == 2
    unknown = "class 'class009' is not in the run" if named else "label 9 is not in the run, whose labels are 0..2"
    assert unknown in capsys.readouterr().err
    assert main(["eval", str(run), *words, "--train-list", str(tmp_path / "train.csv")]) == 2
    assert "train.csv" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["folder", "folder-small"])
def test_a_row_for_each_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str) -> None:
    data, run, file = write_tree(tmp_path / "data", TREE), tmp_path / "run", tmp_path / "pictures.csv"
    assert main(train(data, run, dataset, "--val-per-class", "2", "--epochs", "3")) == 0
    found = {}
    for split, prior in (("test", None), ("val", None), ("test", "uniform")):
        words = ["--split", split, "--predictions", str(file), *(["--prior", prior] if prior else [])]
        result = evaluated(capsys, run, *words)
        rows = list(csv.DictReader(file.read_text().splitlines()))
        assert len({row["path"] for row in rows}) == len(rows) == result["n"] == 6
        for row in rows:
            assert (data / row["path"]).is_file()
            assert Path(row["path"]).parts[:2] == ("test" if split == "test" else "train", row["class"])
        assert result["top1"] == pytest.approx(100 * sum(row["class"] == row["predicted"] for row in rows) / 6)
        assert all(1 / 3 < float(row["probability"]) <= 1 for row in rows)
        found[split, prior] = [row["probability"] for row in rows]
    assert found["test", None] != found["test", "uniform"]
    assert main(["eval", str(run), "--predictions", str(tmp_path / "none" / "a.csv")]) == 2
    assert f"--predictions {tmp_path}/none/a.csv: cannot be written" in capsys.readouterr().err


def test_rows_of_pictures_without_files_and_without_an_answer(tmp_path: Path) -> None:
    source: Any = SimpleNamespace(class_names=("ant", "bee"), paths={})
    write_predictions(str(tmp_path / "a.csv"), [(0, 1, 0, 0.75), (1, 1, 0, float("nan"))], source, "test")
    assert (tmp_path / "a.csv").read_text() == "index,class,predicted,probability\n0,bee,ant,0.75\n1,bee,,\n"
