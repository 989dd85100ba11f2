"""Signals, time limits, bad steps and failing disks, in whole runs."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltfast import checkpoint
from ltfast.cli import main
from ltfast.dist import Ranks
from ltfast.durable import Durable
from ltfast.errors import UserError
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.store import Store
from ltfast.survive import Action, BadSteps, Signals, Watch
from ltfast.train import train
from tests import procs
from tests.test_resume import SMALL, StopAt, assert_same_run, weights

QUICK = {**SMALL, "epochs": 2, "limit_train": 72}


COMMAND = [
    "train", "--epochs", "2", "--limit-train", "72", "--batch", "36", "--method", "ce", "--no-tensorboard", "--device", "cpu",
]  # fmt: skip


def quick(out: Path, method: str = "ce", **values: Any) -> Any:
    return build_config("digits-lt", method, {}, {**QUICK, "out": str(out), **values})


# -- signals and time --------------------------------------------------------------------------------------------------


def test_the_first_signal_is_remembered_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Signals(main=False) as signals:
        assert not signals.received
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_hangup_is_a_signal_as_others_unless_it_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests themselves may run under nohup
    try:
        with Signals(main=False) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Signals(main=False) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert not signals.received, "nohup"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_forked_workers_do_not_repeat_the_message(capfd: pytest.CaptureFixture[str]) -> None:
    with Signals():
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert capfd.readouterr().err == ""
        signal.raise_signal(signal.SIGINT)
        assert "once more to stop at once" in capfd.readouterr().err


def test_a_run_outlives_those_who_read_its_output(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ltfast", *COMMAND, "--out", str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        assert b"digits-lt" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(procs.TIMEOUT) == 0
    assert RunFolder(tmp_path / "run").metrics("test")


def test_outside_the_main_thread_it_does_nothing() -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with Signals():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def twice(path: str) -> None:
    with Signals(main=False):
        signal.raise_signal(signal.SIGTERM)
        Path(path).write_text("still here")
        signal.raise_signal(signal.SIGTERM)
        Path(path).write_text("must not be reached")


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    assert procs.wait(procs.start(twice, str(tmp_path / "x"))) == 128 + signal.SIGTERM
    assert (tmp_path / "x").read_text() == "still here"


def test_a_signal_that_the_launcher_hands_on_is_not_a_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm signals torchrun and its workers, and torchrun passes the signal on."""
    ends: list[int] = []
    monkeypatch.setattr("ltfast.survive.os._exit", ends.append)
    with Signals(main=False, launched=True) as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert ends == []
        signals._first -= 5
        signal.raise_signal(signal.SIGTERM)
    assert ends == [128 + signal.SIGTERM]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_watch_alone() -> None:
    clock, signals, busy = Clock(), Signals(), [False]
    watch = Watch(Ranks(), signals, checkpoint_minutes=1, max_hours=1, busy=lambda: busy[0], clock=clock)
    assert watch.after_step() is Action.GO
    clock.now = 61
    busy[0] = True
    assert watch.after_step() is Action.GO, "the last one is still being written"
    busy[0] = False
    assert watch.after_step() is Action.CHECKPOINT
    watch.saved()
    assert watch.after_step() is Action.GO
    clock.now = 3600
    assert watch.between_epochs() is Action.STOP
    assert watch.reason == "stopped after --max-hours 1"
    signals.received = signal.SIGINT
    assert watch.after_step() is Action.STOP
    assert watch.reason == "stopped by SIGINT"


def test_sigint_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0, how to resume, and the resumed run is the undisturbed one."""
    words = [
        "--epochs",
        "2",
        "--limit-train",
        "72",
        "--batch",
        "36",
        "--method",
        "ce",
        "--deterministic",
        "--no-tensorboard",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr("ltfast.progress.ConsoleProgress.step", lambda self, *args: StopAt.step(stop, *args))
    for name in ("whole", "parts"):
        stop = StopAt(3 if name == "parts" else 0, signal.SIGINT)
        assert main(["train", "--out", str(tmp_path / name), *words]) == 0
    text = capsys.readouterr()
    assert f"continue with: ltfast train --resume {tmp_path / 'parts'}" in text.out
    assert "stopped by SIGINT in epoch 2 after 3 steps" in text.out
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    assert "continuing after 3 steps, in epoch 2" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    assert "all 4 steps are done: evaluating" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path / "parts"), "--lr", "1"]) == 2
    assert "only these may be given anew: --checkpoint-minutes" in capsys.readouterr().err


def test_a_stop_between_epochs_names_the_one_that_is_done(tmp_path: Path, capsys, monkeypatch) -> None:
    stop = StopAt(2, signal.SIGTERM)
    monkeypatch.setattr("ltfast.progress.ConsoleProgress.step", lambda self, *args: stop.step(*args))
    words = ["--epochs", "2", "--limit-train", "72", "--batch", "36", "--method", "ce", "--no-tensorboard"]
    assert main(["train", "--out", str(tmp_path / "run"), *words, "--device", "cpu"]) == 0
    assert "stopped by SIGTERM after epoch 1 after 2 steps" in capsys.readouterr().out


def test_max_hours(tmp_path: Path) -> None:
    result = train(quick(tmp_path / "run", max_hours=1e-9))
    assert result["stopped"].startswith("stopped after --max-hours")
    assert Store(tmp_path / "run" / "checkpoints").load() is not None


def test_max_hours_count_from_the_start_of_the_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltfast.durable.began", lambda: time.monotonic() - 7200)
    assert train(quick(tmp_path / "run", max_hours=1))["stopped"] == "stopped after --max-hours 1"


class Minutes(StopAt):
    """A step takes a minute by the watch's clock, and nothing is being written when a checkpoint is due."""

    def begin(self, trainer: Any) -> None:
        self.trainer, self.now = trainer, 0.0

    def step(self, *args: Any) -> None:
        watch = self.trainer.watch
        if not self.now:
            watch.clock, watch.saved_at = lambda: self.now, 0.0
        self.now += 60
        self.trainer.flush()
        super().step(*args)


def test_checkpoints_by_the_clock_and_how_many_are_kept_also_after_a_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = quick(out, epochs=1, limit_train=0, checkpoint_minutes=2, keep_checkpoints=3)  # nine steps
    for resume, stop, kept in ((None, 7, (4, 6, 7)), (str(out), 0, (6, 7, 9))):
        train(settings, resume=resume, progress=Minutes(stop))
        states = sorted(path.name for path in (out / "checkpoints").glob("state-*"))
        assert states == [f"state-{steps:09d}.safetensors" for steps in kept]
        assert (out / "checkpoints" / "last.safetensors").exists() is not bool(stop), (
            "weights are those of a whole epoch"
        )


# -- one folder, one run -------------------------------------------------------------------------------------------------


class Sleep(Progress):
    """Stays in the third step, with a forked process beside it as a loader's worker would be."""

    def __init__(self, told: str) -> None:
        self.told, self.steps = told, 0

    def step(self, epoch: int, batch: int, total: int, loss_sum: Tensor | None) -> None:
        self.steps += 1
        if self.steps == 3:
            child = os.fork()
            if child:
                Path(self.told).write_text(str(child))
            time.sleep(60)
            os._exit(0)


def train_and_sleep(out: str, told: str) -> None:
    torch.set_num_threads(1)
    train(quick(Path(out)), progress=Sleep(told))


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    out, told = tmp_path / "run", tmp_path / "told"
    first = procs.start(train_and_sleep, str(out), str(told))
    try:
        while not (told.exists() and told.read_text()):
            assert first.is_alive()
            time.sleep(0.02)
        with pytest.raises(UserError, match=rf"{out}: process {first.pid} on \S+, since 2.* is training in it"):
            train(quick(out), resume=str(out))
        with pytest.raises(UserError, match="already exists"):
            train(quick(out))
    finally:
        first.kill()
        first.join()
    try:
        assert train(quick(out), resume=str(out))["last"], "the forked process still lives"
    finally:
        os.kill(int(told.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.lockf", refuse)
    notes = Notes()
    assert train(quick(tmp_path / "run"), progress=notes)["last"]
    assert [line for line in notes.lines if f"cannot be locked ({os.strerror(number)})" in line]


def make_folders(start: float, told: str) -> None:
    os.chdir(Path(told).parent)
    time.sleep(max(0.0, start - time.time()))
    Path(told).write_text(" ".join(str(RunFolder.create(quick(Path("x")).with_(out=None)).path) for _ in range(5)))


def test_default_names_are_given_once(tmp_path: Path) -> None:
    told = [tmp_path / name for name in "abcd"]
    makers = [procs.start(make_folders, time.time() + 0.5, str(path)) for path in told]
    assert [procs.wait(maker) for maker in makers] == [0] * 4
    names = [name for path in told for name in path.read_text().split()]
    assert len(set(names)) == 20


# -- steps without a finite loss -----------------------------------------------------------------------------------------


class Poison(Progress):
    """Makes a weight NaN after some steps, as a faulty device would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def begin(self, trainer: Any) -> None:
        self.trainer = trainer

    def step(self, epoch: int, batch: int, total: int, loss_sum: Tensor | None) -> None:
        self.after -= 1
        if self.after == 0:
            self.trainer.flat.data[0] = float("nan")


def test_bad_steps_stop_the_run_and_name_the_images(tmp_path: Path) -> None:
    out, poison = tmp_path / "run", Poison(12)
    with pytest.raises(UserError, match=r"3 steps in a row .* since batch 3 of epoch 2; their images .*bad_steps.json"):
        train(quick(out, batch=8, max_bad_steps=3, epochs=9), progress=poison)
    rows = json.loads((out / "bad_steps.json").read_text())["steps"]
    assert [(row["epoch"], row["batch"], len(row["index"])) for row in rows] == [(1, 3, 8), (1, 4, 8), (1, 5, 8)]
    assert all(0 <= i < 72 for row in rows for i in row["index"])
    assert poison.trainer.flat.data.isnan().sum() == 1, "no step has spread it"
    assert poison.trainer.buffers.data.isfinite().all()
    assert float(poison.trainer.update.skipped) == 3


def test_weights_that_are_not_finite_end_the_run_before_they_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="weights are no longer finite after epoch 2"):
        train(quick(out, epochs=3), progress=Poison(4))
    state = Store(out / "checkpoints").load()
    assert state is not None
    assert state[1]["steps"] == 2
    assert state[0]["theta"].isfinite().all()


def test_a_run_of_skipped_steps_alone_does_not_look_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMMAND, "--out", str(tmp_path / "run"), "--scale", "1e39"]) == 2
    text = capsys.readouterr()
    assert "4 steps in a row had a non-finite loss or gradient, since batch 0 of epoch 1" in text.err
    assert "skipped so far: 2" in text.out
    assert "top-1" not in text.out
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"loss": null' in log
    assert "NaN" not in log


def test_skipped_steps_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ill(Poison):
        def step(self, *args: Any) -> None:
            if self.after == 0:
                self.trainer.flat.data[0] = 0.0
            super().step(*args)

    ill = Ill(1)
    monkeypatch.setattr("ltfast.progress.ConsoleProgress.step", lambda self, *args: ill.step(*args))
    monkeypatch.setattr("ltfast.train.Trainer.describe", lambda self: (ill.begin(self), Durable.describe(self)))
    assert main([*COMMAND, "--out", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert text.count("skipped so far: 1\n") == 2
    assert "not finite: 1 of 4\n" in text


def test_bad_steps_in_between_do_not_add_up() -> None:
    counter = torch.zeros(())
    watch = BadSteps(4, counter, Ranks(), None)
    for batch in range(50):
        counter.copy_((counter + 1) * (batch % 4 != 0))
        watch.after_step(0, batch, torch.arange(2))
    with pytest.raises(UserError, match="--max-bad-steps 0"):
        BadSteps(0, counter, Ranks(), None)


def test_good_steps_after_what_was_read_an_interval_ago_let_a_run_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the number that is read is an interval old."""
    counter = torch.zeros(())
    read = [0.0]
    monkeypatch.setattr(BadSteps, "_read", lambda self: (read.append(float(counter)), read[-2])[1])
    watch = BadSteps(4, counter, Ranks(), None)
    for batch in range(12):
        counter.copy_((counter + 1) * (batch < 4))  # four bad ones, then good ones
        watch.after_step(0, batch, torch.arange(2))
    for batch in range(12, 19):
        counter += 1
        watch.after_step(0, batch, torch.arange(2))
    counter += 1
    with pytest.raises(UserError, match="8 steps in a row"):
        watch.after_step(0, 19, torch.arange(2))


def test_bad_steps_before_a_resume_are_not_told_as_steps_after_it(tmp_path: Path) -> None:
    counter = torch.tensor(2.0)  # of the training state
    watch = BadSteps(3, counter, Ranks(), tmp_path)
    for batch in (5, 6):
        watch.after_step(1, batch, torch.tensor([batch]))
    counter.fill_(5)
    with pytest.raises(UserError, match=r"3 steps in a row .* since batch 5 of epoch 2"):
        watch.after_step(1, 7, torch.tensor([7]))
    assert len(json.loads((tmp_path / "bad_steps.json").read_text())["steps"]) == 3


def test_the_end_of_an_epoch_looks_at_weights_and_short_epochs(tmp_path: Path) -> None:
    counter = torch.zeros(())
    watch = BadSteps(5, counter, Ranks(), tmp_path)
    weights = torch.ones(4)
    watch.after_epoch(0, weights, 3)
    for bad in (torch.inf, -torch.inf, torch.nan):
        weights[2] = bad
        with pytest.raises(UserError, match="no longer finite after epoch 1"):
            watch.after_epoch(0, weights, 0)
    weights[2] = 1.0
    for batch in range(4):
        counter.fill_(max(0, batch - 1))  # skipped: the last two of four
        watch.after_step(1, batch, torch.tensor([10 * batch]))
    watch.after_epoch(1, weights, 4)
    watch.after_epoch(1, weights, 0)  # not the last epoch: the next one may be better
    with pytest.raises(UserError, match=r"2 steps in a row .* since batch 2 of epoch 2"):
        watch.after_epoch(1, weights, 2)
    rows = json.loads((tmp_path / "bad_steps.json").read_text())["steps"]
    assert [(row["epoch"], row["batch"], row["index"]) for row in rows] == [(1, 2, [20]), (1, 3, [30])]


# -- disks that fail -----------------------------------------------------------------------------------------------------


class Notes(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on, says so once, and the run is complete in the end."""
    out, notes, real = tmp_path / "run", Notes(), checkpoint.write_atomically

    def sometimes(path: Path, pieces: Any) -> None:
        if path.name.startswith("state-") and len(notes.lines) < 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, pieces)

    monkeypatch.setattr(checkpoint, "write_atomically", sometimes)
    train(quick(out, epochs=4), progress=notes)
    told = [line for line in notes.lines if "No space left" in line]
    assert len(told) == 1
    assert "training goes on" in told[0]
    assert Store(out / "checkpoints").load() is not None


def test_a_disk_that_stays_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the run cannot be kept: a UserError that tells what is left."""
    out, real = tmp_path / "run", checkpoint.write_atomically

    def later(path: Path, pieces: Any) -> None:
        if (out / "checkpoints" / "state-000000002.safetensors").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, pieces)

    monkeypatch.setattr(checkpoint, "write_atomically", later)
    with pytest.raises(
        UserError, match=r"cannot write .* No space left on device; the last good training state is state-000000002"
    ):
        train(quick(out, epochs=3))
    monkeypatch.undo()
    train(quick(out), resume=str(out))
    train(quick(tmp_path / "whole", epochs=3))
    assert_same_run(tmp_path / "whole", out)


def test_the_result_outlives_a_disk_that_is_full_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights fit, states do not: the figures are logged and shown, and the weights are named."""
    out, notes, real = tmp_path / "run", Notes(), checkpoint.write_atomically

    def weights_alone(path: Path, pieces: Any) -> None:
        if path.name.startswith("state-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, pieces)

    monkeypatch.setattr(checkpoint, "write_atomically", weights_alone)
    with pytest.raises(UserError, match=rf"the trained weights are in {out}/\S+/last.safetensors: `ltfast eval {out}`"):
        train(quick(out), progress=notes)
    (row,) = RunFolder(out).metrics("test")
    assert f"{row['last']['top1']:.2f}" in notes.lines[-1]
    assert main(["eval", str(out)]) == 0


def test_weights_of_an_earlier_epoch_are_named_where_the_disk_was_full_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written, real = tmp_path / "run", [], checkpoint.write_atomically

    def first_epoch_alone(path: Path, pieces: Any) -> None:
        if "last.safetensors" in written:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, pieces)
        written.append(path.name)

    monkeypatch.setattr(checkpoint, "write_atomically", first_epoch_alone)
    with pytest.raises(UserError, match=rf"the weights after epoch 1 are in {out}/\S+/last.safetensors: `ltfast eval"):
        train(quick(out, epochs=3))
    for state in (out / "checkpoints").glob("state-*"):
        state.unlink()
    with pytest.raises(UserError, match=r"overwrite its weights \(epoch 1 of 3\), which"):
        train(quick(out), resume=str(out))


def with_quota(out: str, limit: int, answer: str) -> None:
    """Files may not grow beyond `limit` bytes: what a quota does, without root."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    words = ["train", "--out", out, "--method", "ce", "--epochs", "2", "--no-tensorboard", "--device", "cpu"]
    errors, real = [], os.write

    class Collect:
        def write(self, text: str) -> int:
            errors.append(text)
            return len(text)

        def flush(self) -> None:
            pass

    sys.stderr = Collect()  # type: ignore[assignment]
    code = main(words)
    handle = os.open(answer, os.O_WRONLY | os.O_CREAT)
    real(handle, json.dumps([code, "".join(errors)]).encode())
    os._exit(0)


def test_a_quota(tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    assert procs.wait(procs.start(with_quota, str(tmp_path / "run"), 100_000, str(answer))) == 0
    code, text = json.loads(answer.read_text())
    assert code == 2
    assert "File too large; no training state was written yet" in text
    assert text.count("\n") == 1
    assert not list((tmp_path / "run" / "checkpoints").glob("*")), "no half file is left"


def test_a_folder_that_vanishes_during_the_run(tmp_path: Path) -> None:
    """As an unmounted disk: its path is not made again, and the error names it."""
    out = tmp_path / "run"

    class Unmount(Notes):
        def epoch(self, epoch: int, epochs: int, phase: str, summary: Any, val: Any) -> None:
            if epoch == 1:
                while not list(out.glob("checkpoints/state-*.safetensors")):  # the first epoch's is still being written
                    time.sleep(0.01)
                out.rename(tmp_path / "elsewhere")

    notes = Unmount()
    with pytest.raises(UserError, match=r"run/checkpoints: cannot write the \w+ checkpoint: No such file or directory"):
        train(quick(out, epochs=4), progress=notes)
    assert any("training goes on" in line for line in notes.lines)
    assert not out.exists()
    (tmp_path / "elsewhere").rename(out)
    train(quick(out), resume=str(out))
    assert weights(out)


def test_events_that_cannot_be_written_are_told_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = Notes()
    (tmp_path / "run").mkdir()
    real = open

    def full(path: Any, *args: Any, **options: Any) -> Any:
        return real("/dev/full" if "tfevents" in str(path) else path, *args, **options)

    for module in ("builtins", "io"):
        monkeypatch.setattr(f"{module}.open", full)
    train(quick(tmp_path / "run", tensorboard=True, epochs=4), progress=notes)
    (told,) = [line for line in notes.lines if "events" in line]
    assert told.endswith("/events: cannot write (No space left on device); training goes on without")
    assert "Traceback" not in capfd.readouterr().err


def test_the_step_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one checkpoint is being written, time-based ones are put off and steps go on."""
    out, real, written = tmp_path / "run", checkpoint.write_atomically, []

    def slow(path: Path, pieces: Any) -> None:
        if path.name.startswith("state-"):
            written.append(path.name)
            time.sleep(0.4)
        real(path, pieces)

    monkeypatch.setattr(checkpoint, "write_atomically", slow)
    steps: list[float] = []

    class Times(Progress):
        def step(self, epoch: int, batch: int, total: int, loss_sum: Tensor | None) -> None:
            steps.append(time.monotonic())

    train(quick(out, epochs=1, limit_train=0, checkpoint_minutes=1e-6), progress=Times())
    assert len(steps) == 9
    assert len(written) < len(steps)


def test_a_signal_after_a_mistake_leaves_time_for_the_checkpoint_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher sends it to all who are left as soon as the first rank has ended."""
    out, real, ended = tmp_path / "run", checkpoint.write_atomically, []

    def signalled(path: Path, pieces: Any) -> None:
        if path.name.startswith("state-"):
            stopped.wait(60)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        real(path, pieces)

    class Ends(Progress):
        def step(self, epoch: int, batch: int, total: int, loss_sum: Tensor | None) -> None:
            if epoch:
                raise UserError("a mistake")

        def end(self) -> None:
            stopped.set()

    stopped = threading.Event()
    monkeypatch.setattr(checkpoint, "write_atomically", signalled)
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append("at once"))
    try:
        with pytest.raises(UserError, match="a mistake"):
            train(quick(out), progress=Ends())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not ended
    assert [path.name for path in Store(out / "checkpoints").states()] == ["state-000000002.safetensors"]


def test_a_terminal_that_is_gone_does_not_turn_a_hangup_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with Signals(launched=False) as signals:
        monkeypatch.setattr("ltfast.survive.os.write", gone)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_images_of_bad_steps_that_cannot_be_written_are_told_beside_the_cause(tmp_path: Path) -> None:
    watch = BadSteps(1, torch.ones(()), Ranks(), tmp_path / "gone")
    with pytest.raises(UserError, match=r"1 step in a row .*bad_steps.json could not be written \(No such file or dir"):
        watch.after_step(0, 0, torch.tensor([3]))
