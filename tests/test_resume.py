"""A run that was interrupted, however rudely, ends with the bits of one that was not."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ltfast import build, checkpoint, resume
from ltfast.errors import UserError
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.scaler import INITIAL, LossScale
from ltfast.train import train
from tests import procs

# Nine steps an epoch, scouting for two epochs, then groups, anchor and sharpness: everything there is.
SMALL = {
    "epochs": 5, "scout": 0.4, "batch": 36, "fisher_budget": 16, "deterministic": True, "tensorboard": False, "device": "cpu",
    "keep_checkpoints": 2,
}  # fmt: skip


def config(out: Path, method: str = "gkp-gsa", **values: Any) -> Any:
    return build_config("digits-lt", method, {}, {**SMALL, "out": str(out), **values})


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoint.load(out / "checkpoints" / "last.safetensors")[0]


def assert_same_run(a: Path, b: Path) -> None:
    """Same weights and BatchNorm statistics to the bit, and the same log but for times."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    wrong = [name for name in first if not first[name].equal(second[name])]
    assert not wrong, f"{len(wrong)} of {len(first)} tensors differ, first {wrong[0]}"
    assert log(a) == log(b)


def log(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class StopAt(Progress):
    """Sends the process a signal after some steps, as a scheduler would."""

    def __init__(self, steps: int, number: signal.Signals = signal.SIGTERM) -> None:
        self.steps, self.number = steps, number

    def step(self, epoch: int, batch: int, total: int, loss_sum: Tensor | None) -> None:
        self.steps -= 1
        if self.steps == 0:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """As the processes that are killed: sums of several threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(config(out))
    return out


def test_runs_are_reproducible_and_the_comparison_can_fail(undisturbed: Path, tmp_path: Path) -> None:
    train(config(tmp_path / "again"))
    assert_same_run(undisturbed, tmp_path / "again")
    train(config(tmp_path / "other", seed=1))
    with pytest.raises(AssertionError):
        assert_same_run(undisturbed, tmp_path / "other")


@pytest.mark.parametrize("stops", [(4,), (9, 1, 1), (23, 9)])
def test_sigterm_then_resume(undisturbed: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """In the middle of scouting; at an epoch's last step, then after single steps; between groups and the end."""
    out = tmp_path / "run"
    for i, steps in enumerate(stops):
        result = train(config(out), resume=str(out) if i else None, progress=StopAt(steps))
        assert result["stopped"] == "stopped by SIGTERM"
    result = train(config(out), resume=str(out))
    assert result["last"]["n"] == 400
    assert_same_run(undisturbed, out)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("gsa-full", {"gram_every": 4, "sampler": "group-stratified"}),  # mode R: Gram memory and its age
        ("gsa-release", {"regroup": 1}),  # moving averages; the bank goes on filling
        ("ce+imbsam", {"optimizer": "adamw", "lr": 0.001, "sampler": "progressive"}),
        ("bcl+sam", {"sampler": "class-balanced"}),
        ("ce+sam", {"ascent_every": 3}),  # the last perturbation and its statistics
    ],
)
def test_every_method_resumes_in_the_middle_of_an_epoch(tmp_path: Path, method: str, values: dict[str, Any]) -> None:
    for name, stop in (("a", 0), ("b", 14)):
        out = tmp_path / name
        result = train(config(out, method, epochs=3, **values), progress=StopAt(stop))
        if "stopped" in result:
            train(config(out), resume=str(out))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_run_goes_on_where_auto_means_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begun without a loss scale, taken up by a GPU without bf16: the scale begins there."""
    out, scales = tmp_path / "run", []
    for _ in range(2):
        train(config(out, "bcl", epochs=1), resume=str(out) if scales else None, progress=StopAt(0 if scales else 5))
        newest = max((out / "checkpoints").glob("state-*"))
        scales.append(checkpoint.load(newest)[0].get("update.scale"))
        monkeypatch.setattr(build, "build_scaler", lambda config, device: LossScale(device))
    assert scales == [None, INITIAL]


def write_pictures(data: Path, classes: str) -> None:
    """Four pictures a class and split."""
    rng = np.random.default_rng(0)
    for split, c, i in itertools.product(("train", "test"), classes, range(4)):
        (data / split / c).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(data / split / c / f"{i}.png")


def of_pictures(data: Path, out: Path) -> Any:
    flags = {
        **SMALL, "data_dir": str(data), "batch": 1, "epochs": 1, "model": "resnet8", "image_size": 16, "workers": 0,
        "loader": "torch",
    }  # fmt: skip
    return build_config("folder", "ce", {}, {**flags, "out": str(out)})


def test_a_class_more_is_told_as_such(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", "ab")
    settings = of_pictures(tmp_path / "data", tmp_path / "run")
    assert "stopped" in train(settings, progress=StopAt(3))
    write_pictures(tmp_path / "data", "c")
    with pytest.raises(UserError, match=r"cannot resume: .* was .* and is .* now"):
        train(settings, resume=str(tmp_path / "run"))


def test_unreadable_images_before_a_stop_are_counted(tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", "ab")
    for c in "ab":
        (tmp_path / "data/train" / c / "0.png").write_bytes(b"no picture")
    for name, stop in (("a", 0), ("b", 7)):
        out = tmp_path / name
        settings = of_pictures(tmp_path / "data", out)
        if "stopped" in train(settings, progress=StopAt(stop)):
            train(settings, resume=str(out))
    (row,) = [row for row in log(tmp_path / "b") if row["kind"] == "epoch"]
    assert row["replaced"] == 2
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_state_of_an_earlier_version_holds_more_of_an_anchor(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = resume.capture

    def capture(trainer: Any) -> Any:
        tensors, meta, shared = real(trainer)
        return tensors | {"anchor.const": torch.ones((), dtype=torch.float64)}, meta, shared

    out = tmp_path / "run"
    monkeypatch.setattr(resume, "capture", capture)
    train(config(out), progress=StopAt(23))
    monkeypatch.undo()
    tensors, _ = checkpoint.load(max((out / "checkpoints").glob("state-*")))
    assert "anchor.const" in tensors
    train(config(out), resume=str(out))
    assert_same_run(undisturbed, out)


def test_dropout_resumes_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of torch's generator is part of the checkpoint."""
    real = build.build_model

    def with_dropout(*args: Any) -> Any:
        model = real(*args)
        model.encoder = torch.nn.Sequential(model.encoder, torch.nn.Dropout(0.3))
        return model

    monkeypatch.setattr(build, "build_model", with_dropout)
    for name, stop in (("a", 0), ("b", 4)):
        out = tmp_path / name
        if "stopped" in train(config(out, "ce", epochs=1), progress=StopAt(stop)):
            torch.manual_seed(123)
            train(config(out), resume=str(out))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_damaged_state_is_told_and_unfinished_files_are_removed(undisturbed: Path, tmp_path: Path) -> None:
    class Notes(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    out, notes = tmp_path / "run", []
    train(config(out), progress=StopAt(23))
    newest = max((out / "checkpoints").glob("state-*"))
    newest.write_bytes(newest.read_bytes()[:-9])
    unfinished = out / "checkpoints" / f".last.safetensors.7{checkpoint.PART}"
    unfinished.touch()
    train(config(out), resume=str(out), progress=Notes())
    assert [note for note in notes if newest.name in note and "falling back to the checkpoint before it" in note]
    assert not unfinished.exists()
    assert_same_run(undisturbed, out)


def test_resume_of_a_run_without_a_checkpoint_starts_again(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(config(out), progress=StopAt(3))
    for path in (out / "checkpoints").glob("*.safetensors"):
        path.unlink()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"kind": "epoch", "cut sho')
    train(config(out), resume=str(out))
    assert_same_run(undisturbed, out)


class Notes(StopAt):
    """What the run says, and where it is stopped."""

    def __init__(self, steps: int = 0) -> None:
        super().__init__(steps)
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_whose_checkpoints_are_gone_keeps_its_log(tmp_path: Path) -> None:
    """Stopped in its fourth epoch, and finished: neither is trained again over what it has measured."""
    out = tmp_path / "run"
    for resumed, stop in ((None, 32), (str(out), 0)):
        train(config(out, "ce"), resume=resumed, progress=StopAt(stop))
        before = (out / "metrics.jsonl").read_bytes()
        (out / "checkpoints").rename(tmp_path / "aside")
        with pytest.raises(UserError, match=rf"epochs, but no training state .* --config {out}/config.toml --out NEW"):
            train(config(out), resume=str(out))
        assert (out / "metrics.jsonl").read_bytes() == before
        shutil.rmtree(out / "checkpoints")
        (tmp_path / "aside").rename(out / "checkpoints")


def test_a_kill_before_the_first_checkpoint_starts_again_and_keeps_the_log_aside(tmp_path: Path) -> None:
    out, notes = tmp_path / "run", Notes()
    train(config(out, "ce", epochs=3, checkpoint_every=3), progress=StopAt(14))
    for path in (out / "checkpoints").glob("state-*"):  # as if killed instead
        path.unlink()
    before = (out / "metrics.jsonl").read_bytes()
    train(config(out), resume=str(out), progress=notes)
    assert (out / "metrics.jsonl.old").read_bytes() == before
    assert any("there was no checkpoint yet: from the beginning" in line for line in notes.lines)
    assert any("metrics.jsonl.old" in line for line in notes.lines)
    train(config(tmp_path / "whole", "ce", epochs=3, checkpoint_every=3))
    assert_same_run(tmp_path / "whole", out)


def test_a_log_that_a_power_loss_cut_short_is_told_and_goes_on_in_whole_lines(tmp_path: Path) -> None:
    out, notes = tmp_path / "run", Notes()
    train(config(out, "ce", epochs=2), progress=StopAt(14))
    path = out / "metrics.jsonl"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 10)
    train(config(out), resume=str(out), progress=notes)
    (told,) = [line for line in notes.lines if "metrics.jsonl" in line]
    assert re.search(rf"{path}: lacks \d+ bytes", told)
    assert [row["epoch"] for row in log(out) if row["kind"] == "epoch"] == [1], "the first epoch's row was cut"
    assert log(out)[-1]["kind"] == "test"


def test_the_log_is_on_the_disk_before_a_state_that_knows_its_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, sync, write = [], RunFolder.sync_log, checkpoint.write_atomically

    def synced(folder: RunFolder) -> None:
        order.append("log")
        sync(folder)

    def written(path: Path, pieces: Any) -> None:
        order.append(path.name[:5])
        write(path, pieces)

    monkeypatch.setattr(RunFolder, "sync_log", synced)
    monkeypatch.setattr(checkpoint, "write_atomically", written)
    train(config(tmp_path / "run", "ce", epochs=1))
    assert order[order.index("state") - 1] == "log"
    RunFolder(tmp_path / "gone").sync_log()  # a log that never could be written


@pytest.mark.parametrize("left", ["missing", "damaged"])
def test_best_weights_that_are_gone_or_damaged_are_told(tmp_path: Path, left: str) -> None:
    class Keep(Notes):
        def begin(self, trainer: Any) -> None:
            trainer.best["score"] = 101.0  # no later epoch is better

    out, notes = tmp_path / "run", Keep()
    train(config(out, "ce", epochs=3), progress=StopAt(23))
    best = out / "checkpoints" / "best.safetensors"
    best.unlink()
    if left == "damaged":
        best.touch()
    result = train(config(out), resume=str(out), progress=notes)
    assert "best" not in result
    assert f"{best}: is {left}; it is not evaluated" in notes.lines


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    train(config(out, "ce", epochs=1), progress=StopAt(4))

    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("ltfast.runs.open", refuse, raising=False)
    with pytest.raises(UserError, match=rf"--resume {out}: cannot write there \(Permission denied\)"):
        train(config(out), resume=str(out))


@pytest.mark.parametrize("left", [".config.toml.7.part", "config.toml"])
def test_a_kill_while_the_folder_is_made(undisturbed: Path, tmp_path: Path, left: str) -> None:
    """Before config.toml is whole the same command starts again; after it, --resume does."""
    out = tmp_path / "run"
    out.mkdir()
    text = (undisturbed / "config.toml").read_text()
    (out / left).write_text(text.replace(str(undisturbed), str(out)) if left == "config.toml" else text[:50])
    train(config(out), resume=str(out) if left == "config.toml" else None)
    assert_same_run(undisturbed, out)
    assert json.loads((out / "env.json").read_text())["torch"] == torch.__version__


def test_a_run_that_goes_on_with_other_versions_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, notes = tmp_path / "run", []
    monkeypatch.setattr(Progress, "note", lambda _, text: notes.append(text))
    train(config(out), progress=StopAt(4))
    env = json.loads((out / "env.json").read_text())
    (out / "env.json").write_text(json.dumps({**env, "torch": "1.0", "date": "long ago"}))
    train(config(out), resume=str(out))
    assert f"goes on with other than env.json says: torch {torch.__version__}" in notes
    (row,) = RunFolder(out).metrics("env")
    assert row == {"kind": "env", "epoch": row["epoch"], "torch": torch.__version__}
    for text in ("", "[]"):
        (out / "env.json").write_text(text)
        assert RunFolder(out).changed_environment(config(out)) == {}


def test_tensorboard_shows_every_epoch_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    for steps in (23, 0):
        settings = config(out, "ce", epochs=4, tensorboard=True, keep_checkpoints=3)
        result = train(settings, resume=None if steps else str(out), progress=StopAt(steps))
        assert ("stopped" in result) == bool(steps)
        for state in sorted((out / "checkpoints").glob("state-*"))[1:]:
            state.unlink()  # as if killed after the second epoch, which then comes again
    events = EventAccumulator(str(out / "events")).Reload()
    rows = [row for row in log(out) if row["kind"] == "epoch"]
    for tag, wanted in (("train/loss", [r["loss"] for r in rows]), ("val/top1", [r["val"]["top1"] for r in rows])):
        found = events.Scalars(tag)
        assert [event.step for event in found] == [9, 18, 27, 36]
        assert [event.value for event in found] == pytest.approx(wanted, rel=1e-5)
    assert {"train/lr", "val/few"} <= set(events.Tags()["scalars"])
    assert "train/epoch" not in events.Tags()["scalars"]


# -- kill -9 -----------------------------------------------------------------------------------------------------------


def part_of_a_run(out: str, kind: str = "", moment: float = 0, answer: str = "") -> None:
    """Train or resume; be killed "at" a piece of the checkpoints' bytes, "after" so many seconds, or not at all.

    Checkpoints follow each other without pause and are written in small, flushed pieces. A run that ends writes how
    many pieces and seconds it took to `answer`.
    """
    torch.set_num_threads(1)
    checkpoint.CHUNK = 1 << 16
    real, written, started = checkpoint.file_content, [0], time.monotonic()

    def pieces(*args: Any) -> Any:
        for piece in real(*args):
            yield piece
            written[0] += 1
            if kind == "at" and written[0] >= moment:
                os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.file_content = pieces  # type: ignore[assignment]
    if kind == "after":
        timer = threading.Timer(moment, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    path = Path(out)
    train(config(path, checkpoint_minutes=1e-5), resume=out if (path / "config.toml").exists() else None)
    if answer:
        Path(answer).write_text(json.dumps([written[0], time.monotonic() - started]))


def run_part(out: Path, *how: Any) -> int:
    return procs.wait(procs.start(part_of_a_run, str(out), *how))


@pytest.fixture(scope="module")
def length(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, float]:
    """Pieces written and seconds taken by a whole run that checkpoints all the time."""
    folder = tmp_path_factory.mktemp("length")
    assert run_part(folder / "run", "", 0, str(folder / "answer")) == 0
    assert_same_run(undisturbed, folder / "run")
    pieces, seconds = json.loads((folder / "answer").read_text())
    return pieces, seconds


def survive(out: Path, moments: list[tuple[str, float]]) -> list[int]:
    """Start or resume the run once for each moment, killed there, then let it end. Returns the steps of the newest
    state after each kill."""
    reached = []
    for kind, moment in moments:
        assert run_part(out, kind, moment) in (0, -signal.SIGKILL)
        states = sorted(path.name for path in (out / "checkpoints").glob("state-*"))
        reached.append(int(states[-1][6:15]) if states else 0)
    assert run_part(out) == 0
    assert not list((out / "checkpoints").glob(".*")), "no unfinished file is left"
    return reached


@pytest.mark.dist
def test_kill_9(undisturbed: Path, length: tuple[int, float], tmp_path: Path) -> None:
    """Twice in the middle of a checkpoint's bytes, once at a random moment, all in one run."""
    chance = random.Random(time.time_ns())
    pieces, seconds = length
    moments = [("at", 7), ("at", chance.randint(20, pieces // 2)), ("after", chance.uniform(0.1, seconds / 2))]
    reached = survive(tmp_path / "run", moments)
    print("killed", moments, "steps saved then", reached)
    assert_same_run(undisturbed, tmp_path / "run")


def killed_at_the_first_state(out: str, epochs: int) -> None:
    """Train; be killed when the first training state is about to be written and the log has so many epochs."""
    torch.set_num_threads(1)
    real, path = checkpoint.save, Path(out)

    def save(file: Path, *args: Any) -> str:
        if file.name.startswith("state-"):
            while len(RunFolder(path).metrics("epoch")) < epochs:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(file, *args)

    checkpoint.save = save  # type: ignore[assignment]
    train(config(path, "ce", epochs=3))


@pytest.mark.dist
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_kill_while_the_first_state_is_written_starts_again(tmp_path: Path, epochs: int) -> None:
    """Also on a disk so slow that the next epoch ends meanwhile: nothing but that epoch is lost."""
    out = tmp_path / "run"
    assert procs.wait(procs.start(killed_at_the_first_state, str(out), epochs)) == -signal.SIGKILL
    train(config(out), resume=str(out))
    train(config(tmp_path / "whole", "ce", epochs=3))
    assert_same_run(tmp_path / "whole", out)


@pytest.mark.slow
@pytest.mark.dist
def test_kill_9_at_twenty_moments(undisturbed: Path, length: tuple[int, float], tmp_path: Path) -> None:
    """Twenty runs, each killed once or several times at moments spread over its whole length, at least half of them
    inside a checkpoint write."""
    chance = random.Random(time.time_ns())
    pieces, seconds = length
    for i in range(20):
        kills = i % 3 + 1
        moments = [
            ("at", chance.randint(1, pieces // kills))
            if chance.random() < 0.5 + 0.5 * (k == 0)
            else ("after", chance.uniform(0, seconds / kills))
            for k in range(kills)
        ]
        out = tmp_path / str(i)
        reached = survive(out, moments)
        print("killed", moments, "steps saved then", reached)
        assert_same_run(undisturbed, out)
