"""Runs, pictures and lists that stand for the capital words of the docs' commands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from ltfast.cli import main
from tests.data import pictures, small_sets
from tests.docs.rules import QUICK


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, RUN, and one that was stopped, STOPPED."""
    base = tmp_path_factory.mktemp("docs-runs")
    assert main(["train", *QUICK, "--out", str(base / "RUN")]) == 0
    assert main(["train", *QUICK, "--out", str(base / "STOPPED"), "--max-hours", "1e-9"]) == 0
    return base


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with PICTURES (class folders and lists), CIFAR (torchvision's layout) and picture.jpg."""
    base = tmp_path_factory.mktemp("docs-sets")
    root = pictures.make_set(base / "PICTURES", (9, 5, 3))
    shutil.copy(root / "val.txt", root / "test.txt")
    small_sets.write_cifar10(base / "CIFAR")
    pictures.picture(0).save(base / "picture.jpg")
    Image.new("L", (8, 8), 128).save(base / "digit.png")
    return base


@pytest.fixture
def place(runs: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the capital words stand for; the working folder is a fresh one with the lists in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.txt", "val.txt", "test.txt"):
        shutil.copy(sets / "PICTURES" / name, tmp_path / name)
        rows = [line.rsplit(" ", 1) for line in (tmp_path / name).read_text().splitlines()]
        (tmp_path / name).with_suffix(".csv").write_text("path,class\n" + "".join(f"{p},kind {c}\n" for p, c in rows))
    (tmp_path / "bad.txt").write_text("")
    run, second, stopped = (tmp_path / name for name in ("RUN", "RUN2", "STOPPED"))
    shutil.copytree(runs / "RUN", run)
    shutil.copytree(runs / "RUN", second)
    shutil.copytree(runs / "STOPPED", stopped)
    data = str(sets / "PICTURES")
    return {
        "RUN": str(run), "RUN2": str(second), "STOPPED": str(stopped), "RUNS": str(tmp_path), "FILE": str(tmp_path / "file"),
        "PICTURES": data, "ROOT": data, "D": data, "INAT": data, "CIFAR": str(sets / "CIFAR"), "IMAGE": str(sets / "digit.png"),
    }  # fmt: skip
