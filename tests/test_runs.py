"""A run folder by itself: its name, its log, what it says of the source it came from, and which data it is true to."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ltfast import environment
from ltfast.config import Config
from ltfast.errors import UserError
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.text import to_json


def test_default_names_hold_data_method_and_seed_and_are_counted_from_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = build_config("digits-lt", "ce", {}, {"seed": 3})
    for name in ("digits-lt-ce-s3", "digits-lt-ce-s3-2", "digits-lt-ce-s3-3"):
        folder = RunFolder.create(config)
        folder.close()
        assert folder.path == tmp_path / "runs" / name
        assert str(folder) == f"runs/{name}"


def test_a_lock_and_parts_that_a_killed_process_left_are_no_run(tmp_path: Path) -> None:
    for name in ("lock", ".config.toml.7.part"):
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path)
    folder.check_free()
    folder.prepare(Config())
    with pytest.raises(UserError, match="already exists"):
        folder.check_free()
    (tmp_path / "env.json").write_text("of the first process")
    folder.prepare(Config())
    assert (tmp_path / "env.json").read_text() == "of the first process"


def test_a_file_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run: is a file; choose a folder"):
        RunFolder.create(build_config("digits-lt", "ce", {}, {"out": str(tmp_path / "run")}))


def test_a_folder_that_another_process_filled_before_the_lock_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunFolder.lock

    def late(folder: RunFolder) -> None:
        (folder.path / "config.toml").write_text("another's")
        lock(folder)

    monkeypatch.setattr(RunFolder, "lock", late)
    with pytest.raises(UserError, match="already exists"):
        RunFolder.create(build_config("digits-lt", "ce", {}, {"out": str(tmp_path / "run")}))
    assert (tmp_path / "run" / "config.toml").read_text() == "another's"


def test_a_lock_names_its_process_alone(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("process 1 on a machine with a long name, since long ago; " * 3)
    folder = RunFolder(tmp_path)
    folder.lock()
    folder.close()
    assert (tmp_path / "lock").read_text().count("process") == 1


def test_the_log_is_read_around_a_broken_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    assert folder.metrics_bytes() == 0
    folder.log("a", x=1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "a", "cut sho\n')
    folder.log("b", x=2)
    assert [row["x"] for row in folder.metrics()] == [1, 2]
    assert [row["x"] for row in folder.metrics("a")] == [1]
    size = folder.metrics_bytes()
    assert folder.cut_metrics(size + 5) == 5  # it is shorter than a checkpoint knew: nothing is made up
    assert folder.metrics_bytes() == size
    assert folder.cut_metrics(size) == 0
    assert folder.cut_metrics(size - 3) > 0, "no half line stays"
    assert [row["x"] for row in folder.metrics()] == [1]
    assert folder.path.joinpath("metrics.jsonl").read_bytes().endswith(b"\n")


def test_an_empty_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(UserError, match=r"config.toml: is empty"):
        _ = RunFolder.open(tmp_path).config


def test_numbers_of_any_kind_are_json() -> None:
    values = {"array": np.array([1.5, np.nan]), "tensor": torch.tensor([[2, 3]]), "infinite": [torch.tensor(-np.inf)]}
    assert to_json(values) == '{"array": [1.5, null], "tensor": [[2, 3]], "infinite": [null]}'


def test_events_do_not_bring_a_vanished_folder_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        RunFolder(tmp_path / "gone").scalars(1, {"loss": 0.5})
    assert not (tmp_path / "gone").exists()


def test_the_commit_is_that_of_the_tree_ltfast_runs_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    monkeypatch.delenv("LTFAST_COMMIT", raising=False)
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "--short=12", "HEAD")
    monkeypatch.setattr("ltfast.__file__", str(tmp_path / "ltfast" / "__init__.py"))
    assert environment.commit() == head
    (tmp_path / "file").write_text("2")
    assert environment.commit() == head + "+"
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr("ltfast.__file__", str(tmp_path / "site-packages" / "ltfast" / "__init__.py"))
    assert environment.commit() is None, "installed below another's repository"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    assert environment.commit() is None
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None


@pytest.mark.parametrize(
    ("split", "test_from", "val_from", "refused"),
    [
        ("test", "train", "val", True), ("test", "test", "train", False), ("test", "val", "train", False),
        ("val", "test", "train", True), ("val", "train", "val", False), ("train", "train", "train", False),
    ],
)  # fmt: skip
def test_only_a_split_that_is_drawn_depends_on_the_training_pictures(
    split: str, test_from: str, val_from: str, refused: bool, tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    folder.log("data", fingerprint="a", sizes={"train": 1234})
    source: Any = SimpleNamespace(test_from=test_from, val_from=val_from, fingerprint="a", sizes={"train": 1233})
    folder.check_held_out(source, split, "the run")
    source.fingerprint = "b"
    if not refused:
        folder.check_held_out(source, split, "the run")
        return
    with pytest.raises(
        UserError, match=rf"the run: its {split} images .* \(1,234 images to train on then, 1,233 now\)"
    ):
        folder.check_held_out(source, split, "the run")


def test_a_run_on_the_processor_names_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA X")
    assert environment.environment()["device"] == "NVIDIA X"
    assert [environment.environment(cpu=True)[name] for name in ("device", "cuda")] == ["cpu", None]
