"""What fails for a while: a disk, a log line, a launcher's process; afterwards the run says and keeps what is true."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ltfast import checkpoint, cli, launch
from ltfast.dist import Ranks, start
from ltfast.durable import Durable
from ltfast.errors import UserError
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.store import Store
from ltfast.survive import Signals, Watch
from ltfast.train import train
from tests.test_resume import SMALL, StopAt

QUICK = {**SMALL, "epochs": 6, "limit_train": 72, "lr": 0.1}


def quick(out: Path, **values: Any) -> Any:
    return build_config("digits-lt", "ce", {}, {**QUICK, "out": str(out), **values})


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def failing(monkeypatch: pytest.MonkeyPatch, fails: Any) -> None:
    """`checkpoint.save` of files for which fails(name, how often it was written before) is true meets a full disk."""
    save, seen = checkpoint.save, {}

    def maybe(path: Path, *rest: Any) -> Any:
        name = "state" if path.name.startswith("state") else path.stem
        seen[name] = seen.get(name, -1) + 1
        if fails(name, seen[name]):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(path, *rest)

    monkeypatch.setattr(checkpoint, "save", maybe)


def test_a_best_checkpoint_that_could_not_be_written_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = train(quick(tmp_path / "twin"))
    failing(monkeypatch, lambda name, count: name == "best" and count % 2 == 0)  # each first try
    result = train(quick(tmp_path / "run"))
    assert result["best"] == twin["best"]
    assert checkpoint.load_meta(tmp_path / "run/checkpoints/best.safetensors")["epoch"] == result["best"]["epoch"] + 1


def test_weights_of_another_epoch_are_not_called_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda name, count: name == "best" and count > 0)
    with pytest.raises(UserError, match="cannot write the best checkpoint"):
        train(quick(tmp_path / "run"))
    monkeypatch.undo()
    notes = Notes()
    result = train(quick(tmp_path / "run"), resume=str(tmp_path / "run"), progress=notes)
    assert "last" in result
    assert "best" not in result
    assert any("could not be written after the best epoch" in note for note in notes.notes)


def test_the_first_epoch_may_be_the_best_and_a_best_checkpoint_that_is_gone_is_none(tmp_path: Path) -> None:
    settings = quick(tmp_path / "run", epochs=1)
    assert train(settings)["best"]["epoch"] == 0
    (tmp_path / "run/checkpoints/best.safetensors").unlink()
    result = train(settings, resume=str(tmp_path / "run"))
    assert "last" in result
    assert "best" not in result


def test_a_stop_whose_checkpoint_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda name, count: name == "state")
    with pytest.raises(UserError, match="cannot write the state checkpoint: No space left on device"):
        train(quick(tmp_path / "run"), progress=StopAt(1))


def test_a_marked_epoch_that_could_not_be_written_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda name, count: name == "epoch-2")
    notes = Notes()
    result = train(quick(tmp_path / "run"), progress=notes)
    assert "last" in result
    assert sum("cannot write the epoch-2 checkpoint" in note for note in notes.notes) == 1
    assert not (tmp_path / "run/checkpoints/epoch-2.safetensors").exists()
    assert (tmp_path / "run/checkpoints/epoch-4.safetensors").exists()


def test_what_failed_is_tried_again_with_the_next_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda name, count: name == "best" and count == 0)
    store = Store(tmp_path)
    store.save_weights("best", {"x": torch.ones(3)}, {"epoch": 1})
    store.save_state(5, {"x": torch.zeros(3)}, {})
    store.flush()
    assert checkpoint.load_meta(tmp_path / "best.safetensors")["epoch"] == 1
    store.close()


def test_half_a_line_of_the_log_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    """In a process whose files may not grow: as a full disk, which writes a part of a line."""
    script = """
import resource, signal, sys
from pathlib import Path
from ltfast.runs import RunFolder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = RunFolder(Path(sys.argv[1]))
folder.log("first", text="a" * 50)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
try:
    folder.log("second", text="b" * 50)
except OSError:
    print("refused")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
folder.log("third")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n"
    assert [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        "first", "third",
    ]  # fmt: skip
    assert len(RunFolder(tmp_path).metrics()) == 2


class Fake(Durable):
    """Of a trainer only what writes its log."""

    def __init__(self, path: Path) -> None:
        self.folder, self.progress, self.ranks, self.compiling = RunFolder(path), Notes(), Ranks(), 0.0


def test_a_log_that_cannot_be_written_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [True]
    write = RunFolder.log

    def log(folder: RunFolder, kind: str, **values: Any) -> None:
        if broken[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, kind, **values)

    monkeypatch.setattr(RunFolder, "log", log)

    fake = Fake(tmp_path)
    for state in (True, True, False, True, True):
        broken[0] = state
        fake.log("loss")
    assert len(fake.progress.notes) == 2  # type: ignore[attr-defined]


def test_events_that_cannot_be_written_are_given_up_and_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def scalars(folder: RunFolder, step: int, values: dict[str, float]) -> None:
        tries.append(values)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "scalars", scalars)
    fake = Fake(tmp_path)
    fake.steps = 9
    for tensorboard, loss in ((False, 0.25), (True, 0.5), (True, 0.75)):
        fake.config = quick(tmp_path, tensorboard=tensorboard)
        fake.log("epoch", epoch=1, skipped=2, loss=loss, phase="train", val={"top1": 0.25})
    assert tries == [{"train/skipped": 2, "train/loss": 0.5, "val/top1": 0.25}]
    assert len(fake.progress.notes) == 1  # type: ignore[attr-defined]


def test_unreadable_images_are_those_of_an_epoch_and_told_when_their_number_changes(tmp_path: Path) -> None:
    class Images:
        replaced = torch.zeros((), dtype=torch.int64)

    fake = Fake(tmp_path)
    fake.source = Images()  # type: ignore[assignment]
    for number in (0, 2, 2, 3, 0):
        fake.source.replaced += number  # type: ignore[attr-defined]
        assert fake.replaced_images() == {"replaced": number}
    assert [note[-3:] for note in fake.progress.notes] == [": 2", ": 3"]  # type: ignore[attr-defined]
    fake.source = object()  # type: ignore[assignment]
    assert fake.replaced_images() == {}


def test_what_is_compiled_adds_up_and_what_runs_eagerly_is_told(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    fake.compiled("losses", seconds=2.0, reason=None)
    assert not fake.progress.notes  # type: ignore[attr-defined]
    fake.compiled("step", seconds=3.0, reason="a fault")
    (note,) = fake.progress.notes  # type: ignore[attr-defined]
    assert note.startswith("step: running eagerly")
    assert note.endswith("because of a fault")
    assert fake.compiling == 5
    rows = RunFolder(tmp_path).metrics("compile")
    assert [(row["what"], row["ok"], row["reason"]) for row in rows] == [
        ("losses", True, None), ("step", False, "a fault"),
    ]  # fmt: skip


def test_a_restart_does_not_move_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(Ranks(), Signals(False), max_hours=1, clock=lambda: 5000.0, began=3000.0)
    assert watch.deadline == 6600
    assert Watch(Ranks(), Signals(False), max_hours=1, clock=lambda: 5000.0).deadline == 8600
    assert launch.began() is None
    monkeypatch.setenv(launch.STARTED, "12.5")
    assert launch.began() is None, "of another process's launcher"
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert launch.began() == 12.5


@pytest.mark.parametrize(
    ("first", "second"),
    [(["--gpus", "0"], ["--procs", "2"]), (["--procs", "2"], ["--gpus", "0"]), (["--device", "cpu"], ["--procs", "2"])],
)
def test_a_run_may_go_on_elsewhere(first: list[str], second: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = "--epochs 2 --limit-train 72 --batch 36 --method ce --no-tensorboard --max-hours 1e-7".split()  # noqa: SIM905
    assert cli.main(["train", *words, *first, "--out", str(out)]) == 0
    assert not RunFolder.open(out).metrics("test")
    assert cli.main(["train", "--resume", str(out), *second, "--max-hours", "0"]) == 0
    assert RunFolder.open(out).metrics("test")


def test_a_run_on_processes_may_go_on_on_gpus() -> None:
    config = launch.on_cpu(build_config("digits-lt", "ce", {}, {"procs": 2}))
    assert config.run.device == "cpu"
    moved = config.with_(gpus=4, procs=0)
    assert launch.on_cpu(moved).run.device == "cpu"
    assert launch.on_cpu(moved, resumed=True).run.device == "auto"
    for kept in (build_config("digits-lt", "ce", {}, {"device": "cpu"}), config.with_(procs=0)):
        assert launch.on_cpu(kept, resumed=True).run.device == "cpu"


def test_a_vanished_folder_is_not_made_anew_by_a_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = build_config("digits-lt", "ce", {}, {"out": str(tmp_path / "run")})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv(launch.MESSAGE, str(tmp_path / "message"))
    assert launch.restarted_run(config) is None
    launch.tell_begun()
    with pytest.raises(UserError, match="the run's folder has vanished"):
        launch.restarted_run(config)


@pytest.mark.parametrize("launched", [False, True])
def test_a_worker_that_has_ended_in_order_is_not_aborted_by_a_library(launched: bool) -> None:
    """The destructors that run last in a process stand for those of communication libraries."""
    script = """
import atexit, ctypes, runpy, sys
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)
atexit.register(print, "python's own")
sys.argv = ["ltfast", *sys.argv[1:]]
runpy.run_module("ltfast", run_name="__main__")
"""
    of_launcher = {"RANK": "0", "WORLD_SIZE": "1"} if launched else {}
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | of_launcher
    for words, expected in ((["methods"], 0), (["train", "--lr", "-1"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == (expected if launched else -6), done.stderr
        assert "python's own" in done.stdout


def test_half_an_environment_of_a_launcher_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some schedulers do for programs they do not start in ranks
    assert start() == Ranks()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="not MASTER_ADDR and MASTER_PORT: start with torchrun"):
        start()
    assert "RANK" in os.environ
