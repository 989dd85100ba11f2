"""Your own pictures from the command line: which split chooses, what ends a run before it starts, exit codes, messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltfast.cli import main
from tests.data.bad_files import bad_files
from tests.data.small_sets import pack_arrays, write_tree

TREE = {"train": (8, 6, 4), "test": (2, 2, 2)}
QUICK = [
    "--model", "resnet8", "--image-size", "16", "--batch", "9", "--epochs", "1", "--method", "ce", "--device", "cpu",
    "--loader", "torch", "--workers", "0", "--no-tensorboard",
]  # fmt: skip


def train(root: Path, *words: str) -> list[str]:
    return ["train", "--dataset", "folder", "--data-dir", str(root), "--out", str(root / "run"), *QUICK, *words]


def test_no_checkpoint_is_chosen_on_test_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, {"train": TREE["train"], "val": TREE["test"]})
    note = "tested on the split named val, there is no other; no validation split"
    assert main([*train(tmp_path), "--dry-run"]) == 0
    assert note in capsys.readouterr().out
    assert main(train(tmp_path)) == 0
    out = capsys.readouterr().out
    assert note in out
    assert "best on validation" not in out
    assert not (tmp_path / "run/checkpoints/best.safetensors").exists()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (data,) = (row for row in rows if row["kind"] == "data")
    assert (data["sizes"]["val"], data["test_from"]) == (0, "val")
    assert main([*train(tmp_path, "--val-per-class", "1"), "--out", str(tmp_path / "held")]) == 0
    assert "best on validation" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["folder", "folder-small"])
def test_classes_that_are_not_measured_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str
) -> None:
    write_tree(tmp_path, {"train": TREE["train"], "val": (1, 1, 0), "test": (2, 0, 0)})
    notes = [
        f"{split} has no image of {n} of 3 classes: means are over the others" for split, n in (("val", 1), ("test", 2))
    ]
    words = train(tmp_path) if dataset == "folder" else [*train(tmp_path)[: -len(QUICK)], *QUICK[:-5], QUICK[-1]]
    words += ["--dataset", dataset]
    assert main([*words, "--dry-run"]) == 0
    assert "; ".join(notes) in capsys.readouterr().out
    assert main(words) == 0
    assert "; ".join(notes) in capsys.readouterr().out
    assert main(["data", "stats", str(tmp_path)]) == 0
    assert "; ".join(notes) in capsys.readouterr().out
    (tmp_path / "val/class002/0.png").write_bytes((tmp_path / "val/class000/0000.png").read_bytes())
    for c in (1, 2):
        (tmp_path / f"test/class00{c}/0.png").write_bytes((tmp_path / "test/class000/0000.png").read_bytes())
    assert main([*words, "--out", str(tmp_path / "whole"), "--dry-run"]) == 0
    assert "has no image of" not in capsys.readouterr().out


def test_a_broken_test_picture_costs_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, TREE)
    broken = bad_files()["cut PNG"]
    assert broken is not None
    (tmp_path / "test/class001/0001.png").write_bytes(broken)
    assert main(train(tmp_path)) == 2
    error = capsys.readouterr().err
    assert "test/class001/0001.png cannot be decoded" in error
    assert "the trained weights are safe" in error
    words = error.split("`")[1].split()
    assert words[:2] == ["ltfast", "train"]
    assert main(words[1:]) == 0
    assert "run folder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"train": (4, 4), "test": ()}, "test: no image to test on"),
        ({"train": (4,), "test": (1,)}, "only one class"),
        ({"train": (4, 0), "test": (1, 1)}, "1 of 2 classes have no image (class class001)"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_a_run_folder_exists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], counts: dict[str, tuple[int, ...]], message: str
) -> None:
    write_tree(tmp_path, counts)
    (tmp_path / "test").mkdir(exist_ok=True)
    for dataset in ("folder", "folder-small"):
        loader = [] if dataset == "folder-small" else QUICK[-5:]
        assert main([*train(tmp_path)[: -len(QUICK)], *QUICK[:-5], *loader, "--dataset", dataset]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main(["data", "check", str(tmp_path)]) == 1


def test_data_commands_say_what_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, TREE)
    assert main(["data", "check", str(tmp_path)]) == 0
    nowhere = tmp_path / "train/class000/0000.png/none.png"
    for words in (
        ["check", str(tmp_path), "--bad-list", str(nowhere)],
        ["check", str(tmp_path), "--csv", str(nowhere)],
        ["stats", str(tmp_path), "--plot", str(nowhere)],
        ["stats", str(tmp_path), "--plot", str(tmp_path / "x.none")],
        ["contact", str(nowhere)],
        ["contact", str(tmp_path / "x.none")],
    ):
        assert main(["data", *words]) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_a_contact_sheet_shows_the_few_pictures_that_there_are(tmp_path: Path) -> None:
    write_tree(tmp_path, {"train": (1, 1), "test": (1, 1)})
    assert main(["data", "contact", str(tmp_path / "x.png"), "--dataset", "folder", "--data-dir", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("words", "dataset", "size", "views"),
    [
        ([], "digits-lt", None, None),
        (["--data-dir", "here"], "folder", None, None),
        (["--data-dir", "here", "--dataset", "folder-small", "--image-size", "64"], "folder-small", 64, None),
        (["--data-dir", "here", "--train-list", "a.txt", "--image-size", "64", "--views", "crop"], "list", 64, "crop"),
        (["--data-dir", "s-{0..3}.tar"], "webdataset", None, None),
        (["--data-dir", "pack.npz", "--views", "plain"], "folder-small", None, "plain"),
    ],
)
def test_a_contact_sheet_is_of_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, words: list[str], dataset: str, size: int | None, views: str | None
) -> None:
    asked: list[tuple[str, dict]] = []
    monkeypatch.setattr("ltfast.data.load", lambda name, **options: asked.append((name, options)))
    monkeypatch.setattr("ltfast.data.contact.contact_sheet", lambda source, path, n: path)
    assert main(["data", "contact", "x.png", *words]) == 0
    ((name, options),) = asked
    assert (name, options["image_size"], options["views"]) == (dataset, size, views)
    assert options.get("train_list") == ("a.txt" if dataset == "list" else None)


@pytest.mark.parametrize(
    ("dataset", "option", "value"),
    [
        ("digits-lt", "--data-dir", "here"),
        ("digits-lt", "--image-size", "64"),
        ("folder", "--train-list", "a.txt"),
        ("cifar10-lt", "--image-size", "64"),
    ],
)
def test_a_contact_sheet_ignores_no_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str, option: str, value: str
) -> None:
    assert main(["data", "contact", str(tmp_path / "x.png"), "--dataset", dataset, option, value]) == 2
    assert f"{dataset} does not read it" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("dataset", ["folder", "folder-small"])
def test_views_and_size_of_a_contact_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: str) -> None:
    write_tree(tmp_path, TREE)
    words = ["data", "contact", str(tmp_path / "x.png"), "--data-dir", str(tmp_path), "--dataset", dataset]
    widths = []
    for size in ("24", "200"):
        assert main([*words, "--views", "crop", "--image-size", size, "--images", "2"]) == 0
        with Image.open(tmp_path / "x.png") as picture:
            widths.append(picture.width)
    assert widths[1] - widths[0] >= 4 * (200 - 96), "a plain picture and three views"
    assert main([*words, "--views", "none"]) == 2
    assert "--views 'none': choose one of" in capsys.readouterr().err


def test_a_contact_sheet_of_a_small_pack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "s.npz", **pack_arrays())
    words = [
        "data",
        "contact",
        str(tmp_path / "x.png"),
        "--dataset",
        "cifar10-lt",
        "--data-dir",
        str(tmp_path / "s.npz"),
    ]
    assert main(words) == 2
    assert "lower --imbalance" in capsys.readouterr().err
    assert main([*words, "--imbalance", "10"]) == 0
    assert main([*words, "--imbalance", "1", "--limit-train", "100"]) == 0


@pytest.mark.parametrize("verb", ["check", "stats"])
def test_data_commands_advise_nothing_that_they_refuse(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.npz").touch()
    for name, message in (("s.npz", "is a file, not a folder of pictures"), ("none", "no such folder of pictures")):
        assert main(["data", verb, str(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / name}: {message}" in error
        assert "--data-dir" not in error


def test_nothing_to_draw(tmp_path: Path, capsys) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
    assert main(["data", "stats", str(tmp_path / "set"), "--dataset", "folder", "--plot", str(tmp_path / "x.png")]) == 2
    assert "no training image" in capsys.readouterr().err
