"""What a person sees while a run goes on: a live bar on a terminal, one line per epoch everywhere, in a log more of long ones."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import IO, TYPE_CHECKING, Any

from torch import Tensor

from ltfast.data.base import split_note
from ltfast.schedule import warm_up_note

if TYPE_CHECKING:
    from ltfast.train import Trainer

# Seconds between reads of device values: the only regular host synchronisation of a run.
REFRESH = 0.5
SILENCE = 300.0  # likewise where there is no terminal but a log: a step after as long without a line prints one


class Lasting:
    """A text stream that outlives its reader: once it cannot be written (terminal closed, `| head`), all is dropped."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:  # also for what is buffered, and for C
            os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def counted(n: int, noun: str) -> str:
    """'1 step', '2,000 steps'."""
    return f"{n:,} {noun}{'s' if n != 1 else ''}"


def outlive_readers() -> None:
    """From now on no print of this process can fail: a run is worth more than its output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))


class Progress:
    """Silent base class; `ConsoleProgress` prints."""

    def begin(self, trainer: Trainer) -> None:
        """The run starts."""

    def step(self, epoch: int, batch: int, total: int, loss_sum: Tensor | None) -> None:
        """A step was queued; `loss_sum` is the epoch's running sum on the device."""

    def epoch(self, epoch: int, epochs: int, phase: str, summary: dict[str, float], val: dict[str, float]) -> None:
        """An epoch ended."""

    def grouped(self, seconds: float) -> None:
        """Classes were grouped, and GKP's anchors made, in so many seconds, which belong to no epoch."""

    def note(self, text: str) -> None:
        """Something worth a line happened."""

    def end(self) -> None:
        """The run ended or failed."""


class ConsoleProgress(Progress):
    """On stdout: plain lines, and on a terminal a rich progress bar below them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TextColumn("{task.percentage:3.0f} %  loss {task.fields[loss]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console, transient=True,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self.read_at = 0.0
        self.epochs = 0
        self.task: Any = None  # once begun

    def begin(self, trainer: Trainer) -> None:
        cfg, src = trainer.config, trainer.source
        steps = cfg.optim.epochs * src.steps_per_epoch
        counts = src.train_counts
        self.console.print(
            f"{cfg.data.dataset}: {counted(src.sizes['train'], 'training image')}, {src.num_classes:,} classes of "
            f"{int(counts.max())} to {int(counts.min())} images, {src.sizes.get('val', 0):,} validation, {src.sizes['test']:,} test"
        )
        if note := split_note(src.sizes, src.test_from, src.lacking, src.num_classes):
            self.console.print(note)
        begun = f" from weights {cfg.model.weights}" if cfg.model.weights else ""
        self.console.print(
            f"{cfg.method} on {cfg.model.model}{begun} ({trainer.flat.numel:,} parameters), {trainer.device}, "
            f"{counted(cfg.optim.epochs, 'epoch')} x {counted(src.steps_per_epoch, 'step')} of {counted(cfg.data.batch, 'image')}"
        )
        if note := warm_up_note(cfg.optim):
            self.console.print(note)
        if trainer.folder is not None:
            self.console.print(f"run folder {trainer.folder}")
        self.epochs, self.read_at = cfg.optim.epochs, time.monotonic()
        self.task = self.bar.add_task("", total=steps, completed=trainer.steps, epoch=trainer.epoch + 1, loss="-")
        self.bar.start()

    def step(self, epoch: int, batch: int, total: int, loss_sum: Tensor | None) -> None:
        if time.monotonic() - self.read_at < (SILENCE if self.bar.disable else REFRESH):
            return
        loss = "-" if loss_sum is None else f"{float(loss_sum) / batch:.3f}"
        self.read_at = time.monotonic()
        if self.bar.disable:
            self.console.print(f"epoch {epoch + 1}/{self.epochs}  step {batch:,} of {total:,}  loss {loss}")
        else:
            self.bar.update(self.task, completed=epoch * total + batch, epoch=epoch + 1, loss=loss)

    def epoch(self, epoch: int, epochs: int, phase: str, summary: dict[str, float], val: dict[str, float]) -> None:
        figures = "  ".join(f"{k} {v:5.1f}" for k, v in val.items() if k != "ece")
        width = len(str(epochs))
        self.read_at = time.monotonic()
        self.console.print(
            f"epoch {epoch + 1:{width}}/{epochs}  {phase:5}  loss {summary['loss']:.3f}"
            + (f"  val: {figures}" if figures else "") + f"  {summary['seconds']:.1f} s"
            + (f", {summary['compiling']:.1f} of them compiling" if summary["compiling"] >= 0.1 else "")
            + (f"  skipped so far: {summary['skipped']:,}" if summary["skipped"] else "")
        )  # fmt: skip

    def note(self, text: str) -> None:
        self.console.print(text)

    def end(self) -> None:
        if self.task is not None:
            self.bar.stop()
