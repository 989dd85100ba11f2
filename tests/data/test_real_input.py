"""Real input end to end: pictures from a tar as list and folder through the command line, and a run of iNaturalist's
shape with generated pictures.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltfast.cli import main
from ltfast.data.dali_pipeline import dali_available
from ltfast.dist import Ranks
from ltfast.preserve import group_by_frequency
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.train import Trainer
from tests import procs
from tests.data.pictures import data_folder
from tests.procs import run_ranks

COUNTS = (92, 56, 34, 21, 13, 8, 5, 3)  # with two pictures of each class held out: 248 of the 256
INAT_CLASSES, INAT_IMAGES = 8142, 437_513


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    with tarfile.open(data_folder() / "imagenet_sample_256.tar") as tar:
        tar.extractall(folder, filter="data")
    return folder


def dealt(pictures: Path) -> dict[str, list[tuple[str, int]]]:
    """The pictures dealt to made-up classes: (file name, class) of train and val."""
    names = iter(sorted(p.name for p in pictures.iterdir()))
    wanted = {"train": COUNTS, "val": (2,) * len(COUNTS)}
    return {s: [(next(names), c) for c, n in enumerate(counts) for _ in range(n)] for s, counts in wanted.items()}


def rows_of(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_an_epoch_of_a_resnet50_on_real_pictures(pictures: Path, tmp_path: Path, capsys) -> None:
    """A list with made long-tail counts, from the command line, on the CPU."""
    for split, entries in dealt(pictures).items():
        (tmp_path / f"{split}.txt").write_text("".join(f"{name} {label}\n" for name, label in entries))
    lists = ["--train-list", str(tmp_path / "train.txt"), "--val-list", str(tmp_path / "val.txt")]
    run = tmp_path / "run"
    size = ["--model", "resnet50", "--image-size", "64", "--batch", "29", "--epochs", "1", "--no-tensorboard"]
    words = ["--dataset", "list", "--data-dir", str(pictures), *lists, "--method", "balanced-softmax", *size]
    assert main(["train", *words, "--out", str(run)]) == 0
    assert "8 classes of 92 to 3 images" in capsys.readouterr().out
    (epoch,) = rows_of(run, "epoch")
    assert math.isfinite(epoch["loss"])
    assert epoch["skipped"] == 0
    (test,) = rows_of(run, "test")
    assert test["last"]["n"] == 2 * len(COUNTS)
    assert rows_of(run, "data")[0]["counts"] == list(COUNTS)
    assert main(["data", "contact", str(tmp_path / "sheet.png"), *words[:4], *lists[:2], "--image-size", "64"]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_a_folder_of_real_pictures_trained_evaluated_and_predicted(pictures: Path, tmp_path: Path, capsys) -> None:
    root, kinds = tmp_path / "set", ("bird", "cake", "dog", "fish")
    for split, entries in dealt(pictures).items():
        for name, label in entries[1::2] if split == "train" else entries:
            folder = root / split / kinds[label % 4]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).hardlink_to(pictures / name)
    assert main(["data", "check", str(root), "--full"]) == 0
    assert main(["data", "stats", str(root), "--plot", str(tmp_path / "counts.png")]) == 0
    run = tmp_path / "run"
    size = ["--model", "resnet8", "--image-size", "32", "--batch", "16", "--epochs", "2", "--no-tensorboard"]
    assert main(["train", "--dataset", "folder", "--data-dir", str(root), *size, "--out", str(run)]) == 0
    capsys.readouterr()
    aside = tmp_path / "aside.jpg"
    gone = sorted((root / "train" / "cake").iterdir())[0]
    gone.rename(aside)
    assert main(["train", "--resume", str(run)]) == 2, "another training list"
    assert "cannot resume: images was" in capsys.readouterr().err
    aside.rename(gone)
    assert main(["eval", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["n"] == 2 * len(COUNTS)
    some = sorted((root / "val" / "cake").iterdir())[:2]
    assert main(["predict", str(run), *map(str, some), "--top", "4", "--json"]) == 0
    predicted = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in predicted:
        assert set(row["classes"]) == set(kinds)
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-3)


@pytest.fixture(scope="module")
def inat(tmp_path_factory) -> Path:
    """Lists of iNaturalist 2018's size: 8,142 classes with generated counts, 437,513 training images, no picture."""
    root = tmp_path_factory.mktemp("inat")
    weight = 500.0 ** (-np.arange(INAT_CLASSES) / (INAT_CLASSES - 1))
    counts = 2 + ((INAT_IMAGES - 2 * INAT_CLASSES) * weight / weight.sum()).astype(int)
    counts[: INAT_IMAGES - counts.sum()] += 1
    for name, numbers in (("train", counts), ("val", np.full(INAT_CLASSES, 3))):
        lines = (f"train_val2018/{c}/{name}{i}.jpg {c}\n" for c, n in enumerate(numbers) for i in range(n))
        (root / f"iNaturalist18_{name}.txt").write_text("".join(lines))
    return root


def test_the_plan_of_inaturalist_on_eight_gpus(inat: Path, capsys) -> None:
    assert main(["train", "--dry-run", "--dataset", "inat18", "--gpus", "8", "--data-dir", str(inat)]) == 0
    shown = capsys.readouterr().out
    lines = dict(line.split("  ", 1) for line in shown.splitlines())
    assert "437,513 training images, 8,142 classes" in lines["data"]
    assert "100 epochs x 1,710 steps of 256 images = 171,000; the first 80 epochs scout" in lines["steps"]
    assert "8, each 32 images a step" in lines["processes"]
    assert "gsa-paper+gkp on resnet50" in lines["method"]
    # theta, momentum, A, T and the gradient, 52.8 million each; 80 snapshots of the encoder.
    assert float(lines["memory"].split()[0]) == pytest.approx(5 * 4 * 52_780_096 / 2**30, rel=0.01)
    assert float(lines["memory bank"].split()[2]) == pytest.approx(80 * 4 * 23_508_032 / 2**30, rel=0.01)
    assert "train0.jpg is missing" in lines["pictures"]
    assert "tested on the split named val" in lines["splits"]
    assert main(["train", "--dry-run", "--dataset", "inat18", "--gpus", "7", "--data-dir", str(inat)]) == 2
    assert "--batch 256 cannot be shared evenly by 7" in capsys.readouterr().err


def test_the_plan_takes_the_gpus_that_the_run_would_take(inat: Path, monkeypatch, capsys) -> None:
    """Of large pictures all that are visible, and none that are taken off."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    words = ["train", "--dry-run", "--dataset", "inat18", "--data-dir", str(inat), "--model", "resnet18"]
    for more, planned in ([], "4, each 64 images a step"), (["--gpus", "0"], "1, each 256 images a step"):
        assert main([*words, *more]) == 0
        lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        assert planned in lines["processes"]


def twenty_steps(ranks: Ranks, root: str, values: dict[str, Any]) -> dict[str, Any]:
    """The first 20 steps of the run, groups by frequency in place of the bank's."""
    common = {"data_dir": root, "loader": "synthetic", "device": "cpu", "tensorboard": False}
    trainer = Trainer(build_config("inat18", "gkp-gsa", {}, {**common, **values}), None, ranks, Progress())
    trainer.groups = group_by_frequency(trainer.source.train_counts, trainer.config.preserve.groups)
    trainer.make_step()
    before, losses, seen = trainer.flat.data.clone(), [], []
    for number, batch in enumerate(trainer.source.train(0)):
        if number == 20:
            break
        trainer.update.lr.fill_(0.01)
        losses.append(float(trainer.step(batch)["loss"]))
        seen += batch.index.tolist()
    return {
        "losses": losses, "seen": seen, "theta": trainer.flat.data, "moved": float((trainer.flat.data - before).norm()),
        "skipped": int(trainer.update.skipped), "steps": trainer.source.steps_per_epoch,
    }  # fmt: skip


# The recipe's heads turn 8,142 class weights into 1,024 numbers each through 2,048: 400 GFLOP a step, too much for a CPU.
HEADS = {"projection_hidden": 64, "projection_out": 32}
SMALL = {**HEADS, "model": "resnet8", "image_size": 32, "batch": 8}
LARGE = {**HEADS, "model": "resnet50", "image_size": 48, "batch": 8}


@pytest.mark.dist
@pytest.mark.parametrize("values", [SMALL, pytest.param(LARGE, marks=pytest.mark.slow)], ids=["small", "resnet50"])
def test_twenty_steps_of_inaturalists_shape_on_two_processes(inat: Path, tmp_path: Path, monkeypatch, values) -> None:
    monkeypatch.setattr(procs, "TIMEOUT", 900)
    first, second = run_ranks(2, tmp_path, twenty_steps, str(inat), values)
    assert first["steps"] == -(-INAT_IMAGES // 8)
    assert torch.equal(first["theta"], second["theta"])
    assert first["moved"] > 0
    assert first["skipped"] == 0
    for rank in (first, second):
        assert len(rank["losses"]) == 20
        assert all(map(math.isfinite, rank["losses"]))
        assert len(rank["seen"]) == len(set(rank["seen"])) == 80
    assert not set(first["seen"]) & set(second["seen"])


def test_doctor_names_the_loader_that_is_faster_here(capsys) -> None:
    main(["doctor"])
    shown = capsys.readouterr().out
    if dali_available() and not torch.cuda.is_available():
        assert "dali: on a CPU DALI makes" in shown
