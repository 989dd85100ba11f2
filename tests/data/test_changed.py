"""Pictures that come or go after training: what was held out of the training pictures is not drawn again in silence."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltfast.cli import main
from ltfast.data.longtail import select_subset
from ltfast.report.runs import open_live, open_runs
from ltfast.runs import RunFolder
from tests.data.bad_files import bad_files

KINDS, COUNTS = ("bird", "cake", "dog"), (30, 12, 1)


def pictures(root: Path, *, test: bool = False) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test") if test else ("",):
        for kind, count in zip(KINDS, COUNTS, strict=True):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return root


def trained(dataset: str, root: Path, run: Path, *more: str) -> Path:
    size = ["--model", "resnet8", "--image-size", "16", "--batch", "8", "--epochs", "1", "--no-tensorboard"]
    words = ["--dataset", dataset, "--data-dir", str(root), *size, *more, "--method", "ce", "--device", "cpu"]
    assert main(["train", *words, "--out", str(run)]) == 0
    return run


@pytest.mark.parametrize("dataset", ["folder", "folder-small"])
def test_eval_and_report_refuse_a_test_split_drawn_anew(dataset: str, tmp_path: Path, capsys) -> None:
    root = pictures(tmp_path / "set")
    run = trained(dataset, root, tmp_path / "run")
    assert main(["eval", str(run), "--json"]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    root.rename(tmp_path / "moved")  # another place is no other picture
    root = tmp_path / "moved"
    assert main(["eval", str(run), "--json", "--data-dir", str(root)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == before["top1"]
    gone = root / "bird" / "003.png"
    gone.rename(tmp_path / "aside.png")
    assert main(["eval", str(run), "--data-dir", str(root)]) == 2
    assert "its test images are drawn from the training pictures, and those have changed" in capsys.readouterr().err
    assert main(["report", str(run), "--data-dir", str(root), "--max-minutes", "0.1"]) == 0
    assert "those have changed" in (run / "report" / "index.html").read_text()
    (tmp_path / "aside.png").rename(gone)
    assert main(["eval", str(run), "--data-dir", str(root)]) == 0


@pytest.mark.parametrize("dataset", ["folder", "folder-small"])
def test_a_test_split_of_the_sets_own_is_evaluated_as_it_is(dataset: str, tmp_path: Path, capsys) -> None:
    root = pictures(tmp_path / "set", test=True)
    run = trained(dataset, root, tmp_path / "run", "--val-per-class", "2")
    (root / "train" / "bird" / "003.png").unlink()
    assert main(["eval", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--split", "val"]) == 2
    assert "its val images are drawn from the training pictures" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["folder", "folder-small"])
def test_a_run_is_evaluated_by_the_training_pictures_that_it_had(dataset: str, tmp_path: Path, capsys) -> None:
    """Bright pictures that come to a class afterwards change neither the normalisation nor which class is few-shot."""
    root = pictures(tmp_path / "set", test=True)
    run = trained(dataset, root, tmp_path / "run")
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    for i in range(40):
        Image.fromarray(np.full((16, 16, 3), 255, dtype=np.uint8)).save(root / "train" / "dog" / f"white{i}.png")
    assert main(["eval", str(run), "--json", "--csv", str(tmp_path / "classes.csv")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == before
    assert before["train_counts"] == list(COUNTS)
    assert (tmp_path / "classes.csv").read_text().splitlines()[3].startswith("dog,1,")
    live = open_live(open_runs([str(run)])[0], device="cpu")
    assert live.source.train_counts.tolist() == list(COUNTS)
    used = RunFolder.open(run).metrics("data")[0]["preprocess"]
    assert [list(live.source.mean), list(live.source.std)] == [used["mean"], used["std"]]


def test_runs_of_before_are_evaluated(tmp_path: Path, capsys) -> None:
    root = pictures(tmp_path / "set")
    run = trained("folder-small", root, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("fingerprint", None)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "bird" / "003.png").unlink()
    assert main(["eval", str(run)]) == 0


@pytest.mark.parametrize(("change", "differs"), [("removed", "images"), ("renamed", "training list")])
def test_resume_of_a_small_set_refuses_other_pictures(change: str, differs: str, tmp_path: Path, capsys) -> None:
    root = pictures(tmp_path / "set", test=True)
    run = trained("folder-small", root, tmp_path / "run")
    assert "fingerprint" in RunFolder.open(run).metrics("data")[0]
    victim = root / "train" / "bird" / "003.png"
    if change == "removed":
        victim.unlink()
    else:  # as many pictures of every class, but others
        victim.rename(victim.with_name("zzz.png"))
    capsys.readouterr()
    assert main(["train", "--resume", str(run)]) == 2
    assert f"cannot resume: {differs} was" in capsys.readouterr().err


def test_scarce_classes_keep_a_picture_to_train_on(caplog) -> None:
    labels = np.repeat(np.arange(4), (9, 3, 2, 1))
    with caplog.at_level(logging.WARNING, "ltfast.data"):
        drawn = select_subset(labels, np.bincount(labels), 2)
    assert np.bincount(labels[drawn.train]).tolist() == [7, 1, 1, 1]
    assert np.bincount(labels[drawn.val], minlength=4).tolist() == [2, 2, 1, 0]
    assert sorted([*drawn.train, *drawn.val]) == list(range(15))
    assert "--val-per-class 2: classes with no more images than that: 2" in caplog.text


def test_a_run_with_scarce_classes_chooses_a_best_checkpoint(tmp_path: Path, capsys) -> None:
    run = trained("folder-small", pictures(tmp_path / "set", test=True), tmp_path / "run", "--val-per-class", "2")
    folder = RunFolder.open(run)
    assert folder.metrics("data")[0]["sizes"]["val"] == 4
    assert folder.best.exists()
    assert folder.metrics("data")[0]["counts"] == [28, 10, 1]


def test_look_at_data_names_classes_sets_and_the_next_step(tmp_path: Path, capsys) -> None:
    root = pictures(tmp_path / "set", test=True)
    (root / "train" / "emu").mkdir()
    assert main(["data", "check", str(root)]) == 1
    assert "emu" in capsys.readouterr().out
    assert main(["data", "check", str(root), "--dataset", "folder-small"]) == 2
    assert "--dataset folder-small: `ltfast data` looks at" in capsys.readouterr().err
    (root / "train" / "emu").rmdir()
    (root / "train" / "bird" / "bad.png").write_bytes(bad_files()["cut at 50 percent"])
    assert main(["train", "--dataset", "folder-small", "--data-dir", str(root)]) == 2
    assert "`ltfast data check` lists all" in capsys.readouterr().err
    assert main(["train", "--dataset", "folder"]) == 2
    assert "the folder with class folders" in capsys.readouterr().err
