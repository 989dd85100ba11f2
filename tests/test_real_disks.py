"""Disks that are really full, read-only or gone: a tmpfs of 2 MiB in a mount namespace of its own (Linux)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ltfast import checkpoint
from ltfast.errors import UserError
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.store import Store
from ltfast.train import train

UNSHARE = ["unshare", "--map-root-user", "--mount"]
SMALL = {
    "epochs": 6, "batch": 36, "limit_train": 72, "deterministic": True, "tensorboard": False, "device": "cpu",
    "keep_checkpoints": 1,
}  # fmt: skip


def mounts_allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


class AtEpoch(Progress):
    """Does something to the disk after an epoch; keeps what the run says."""

    def __init__(self, number: int, deed: Any) -> None:
        self.number, self.deed, self.lines = number, deed, list[str]()

    def begin(self, trainer: Any) -> None:
        self.trainer = trainer

    def epoch(self, epoch: int, epochs: int, phase: str, summary: Any, val: Any) -> None:
        if epoch + 1 == self.number:
            self.deed()

    def note(self, text: str) -> None:
        self.lines.append(text)


def attempt(out: Path, progress: Progress, resume: bool = False, **values: Any) -> str:
    """The run's error, or an empty string."""
    try:
        train(
            build_config("digits-lt", "ce", {}, {**SMALL, "out": str(out), **values}),
            resume=str(out) if resume else None,
            progress=progress,
        )
    except UserError as error:
        return str(error)
    return ""


def full(folder: Path, out: Path) -> dict[str, Any]:
    """Weights and one training state fit, a second state beside the first does not."""
    quiet = AtEpoch(0, None)
    error = attempt(out, quiet, tensorboard=True)
    state = Store(out / "checkpoints").load()
    left = [path.name for path in (out / "checkpoints").iterdir() if path.name.endswith(checkpoint.PART)]
    mount("-o", "remount,size=64m", str(folder))
    again = attempt(out, AtEpoch(0, None), resume=True)
    weights = checkpoint.load(out / "checkpoints" / "last.safetensors")[0]
    whole = folder.parent / "whole"
    attempt(whole, AtEpoch(0, None))
    same = checkpoint.load(whole / "checkpoints" / "last.safetensors")[0]
    return {
        "error": error, "lines": quiet.lines, "steps": state[1]["steps"] if state else 0, "left": left, "again": again,
        "same": all(weights[name].equal(same[name]) for name in same),
    }  # fmt: skip


def read_only(folder: Path, out: Path) -> dict[str, Any]:
    mount("-o", "remount,size=64m", str(folder))

    def remount() -> None:
        assert quiet.trainer.folder is not None
        quiet.trainer.folder.close()  # a disk that fails turns read-only by force, `mount` waits for open files: the lock
        for _ in range(100):  # busy while a checkpoint is being written
            if subprocess.run(["mount", "-o", "remount,ro", str(folder)], capture_output=True).returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError("stayed busy")

    quiet = AtEpoch(3, remount)
    error = attempt(out, quiet)
    state = Store(out / "checkpoints").load()
    other = attempt(folder / "other", AtEpoch(0, None))
    steps, resumed = state[1]["steps"] if state else 0, attempt(out, AtEpoch(0, None), resume=True)
    return {"error": error, "lines": quiet.lines, "steps": steps, "other": other, "resumed": resumed}


def unmounted(folder: Path, out: Path) -> dict[str, Any]:
    mount("-o", "remount,size=64m", str(folder))
    quiet = AtEpoch(3, lambda: subprocess.run(["umount", "-l", str(folder)], check=True))
    error = attempt(out, quiet, tensorboard=True)
    return {"error": error, "lines": quiet.lines, "under": [path.name for path in folder.iterdir()]}


def run_case(case: str, tmp_path: Path) -> dict[str, Any]:
    words = [*UNSHARE, sys.executable, "-m", "tests.test_real_disks", case, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


pytestmark = pytest.mark.skipif(not mounts_allowed(), reason="mounting in a namespace is not allowed here")


def test_a_full_disk(tmp_path: Path) -> None:
    got = run_case("full", tmp_path)
    assert "cannot write the state checkpoint: No space left on device" in got["error"]
    assert f"the last good training state is state-{got['steps']:09d}" in got["error"]
    assert 0 < got["steps"] < 12
    told = [line for line in got["lines"] if "training goes on, older checkpoints are intact" in line]
    assert len(told) == len(set(told)) >= 1, "each kind of checkpoint is told once"
    assert got["left"] == []
    assert got["again"] == ""
    assert got["same"], "once there is room the run ends as if there always had been"


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    got = run_case("read_only", tmp_path)
    assert "checkpoint: Read-only file system" in got["error"]
    assert got["steps"] >= 4
    assert sum("metrics.jsonl: cannot write (Read-only file system); training goes on" in line for line in got["lines"])
    assert got["other"].endswith("/other: cannot write there (Read-only file system); choose another folder")
    assert "/run: cannot write there (Read-only file system)" in got["resumed"], "before anything is trained"


def test_a_disk_that_is_unmounted(tmp_path: Path) -> None:
    got = run_case("unmounted", tmp_path)
    assert "checkpoint: No such file or directory" in got["error"]
    assert (
        sum("/events: cannot write (No such file or directory); training goes on" in line for line in got["lines"]) == 1
    )
    assert got["under"] == [], "nothing was written to the mount point below"


if __name__ == "__main__":
    name, root = sys.argv[1], Path(sys.argv[2])
    disk = root / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "none", str(disk))
    print(json.dumps({"full": full, "read_only": read_only, "unmounted": unmounted}[name](disk, disk / "run")))
