"""What a race against the clock needs: steps that do not count, a clock, and a table as cifar10-airbench prints it.

The clock runs from the first counted step to the end of the last epoch, the device waited for. It does not run while the
machine warms up (`untimed_steps`: taken, then undone), nor while results are evaluated and written down.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from ltfast.data.large_source import LargeSource
from ltfast.progress import Progress

if TYPE_CHECKING:
    from ltfast.train import Trainer

COLUMNS = ("run", "epoch", "train_loss", "val_acc", "test_acc", "seconds")


def warm_up(trainer: Trainer, steps: int) -> None:
    """Take `steps` steps and an evaluation, then undo them: weights, statistics, optimizer, ascent, random numbers.

    What was compiled, tuned and recorded stays. Only before the first step of a run.
    """
    tensors = [trainer.flat.data, trainer.buffers.data, *trainer.buffers.counters, *trainer.update.state().values()]
    if isinstance(trainer.source, LargeSource):
        tensors.append(trainer.source.replaced)
    kept = [t.clone() for t in tensors]
    engine = trainer.step.engine
    ascent = {} if engine is None else {k: v.clone() for k, v in engine.state().items()}
    with torch.random.fork_rng(devices=[trainer.device] if trainer.device.type == "cuda" else []):
        trainer.model.train()
        while steps > 0:
            for batch in islice(trainer.source.train(0), steps):
                trainer.set_schedules(0.0)
                trainer.step(batch)
                steps -= 1
        trainer.evaluate("test")
    for tensor, old in zip(tensors, kept, strict=True):
        tensor.copy_(old)
    if engine is not None:
        engine.load_state(ascent)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


class TableProgress(Progress):
    """One row per epoch, with the seconds on the clock; `finish` adds the test accuracy that they led to."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.run: Any = ""

    def begin(self, trainer: Trainer) -> None:
        self.run = trainer.config.run.seed
        before = [] if trainer.folder is None else trainer.folder.metrics()  # of a run that goes on
        self.seconds = sum(row["seconds"] for row in before if row["kind"] in ("epoch", "group"))
        line = "|".join(f"{name:^14}" for name in COLUMNS)
        print(f"{'-' * (len(line) + 2)}\n|{line}|\n{'-' * (len(line) + 2)}")

    def epoch(self, epoch: int, epochs: int, phase: str, summary: dict[str, float], val: dict[str, float]) -> None:
        self.seconds += summary["seconds"]
        self.row(epoch + 1, summary["loss"], val.get("top1"), None)

    def finish(self, result: dict[str, Any]) -> None:
        """The last row: accuracy of the last weights on the test split, in percent; none if the run was stopped."""
        if "last" in result:
            self.row("eval", None, None, result["last"]["top1"])

    def grouped(self, seconds: float) -> None:
        self.seconds += seconds

    def row(self, epoch: Any, loss: float | None, val: float | None, test: float | None) -> None:
        """Print one row; None leaves a cell empty."""
        cells = [self.run, epoch, loss, val, test, self.seconds]
        texts = ["" if c is None else f"{c:.4f}" if isinstance(c, float) else str(c) for c in cells]
        print("|" + "|".join(f"{text:>12}  " for text in texts) + "|", flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)
