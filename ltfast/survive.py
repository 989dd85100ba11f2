"""What lets a run survive: signals, time limits, steps without a finite loss, and the ranks' agreement on all of it.

Nothing here waits for the device on the step path, and with several ranks nothing waits for another one either: votes
travel in the background and are counted a few steps later, at the same step on every rank.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.launch import launched as is_launched
from ltfast.progress import counted

# Seconds between the ranks' votes: the answer to a signal takes up to two of them. One tiny message on the host each.
VOTE_SECONDS = 0.5
VOTE_STEPS_MAX = 64
# A scheduler signals workers and launcher alike, and the launcher hands it on: what comes that soon is the same signal.
SAME_SIGNAL_SECONDS = 3.0


class Signals:
    """While active, the first SIGTERM, SIGINT or SIGHUP (unless nohup has it ignored) is remembered in `received`, and the
    second ends the process at once.

    A context manager; outside the main thread (where Python installs no handlers) it does nothing. In a process that a
    launcher has started (default: as `launched` finds), signals within SAME_SIGNAL_SECONDS are one.
    """

    def __init__(self, main: bool = True, launched: bool | None = None) -> None:
        self.received = 0
        self._main = main
        self._same = SAME_SIGNAL_SECONDS if (is_launched() if launched is None else launched) else 0.0
        self._first = 0.0
        self._process = os.getpid()
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)
        self._old.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._first < self._same:
            return
        if self.received:
            os._exit(128 + number)
        self.received, self._first = number, time.monotonic()
        if self._main and os.getpid() == self._process:  # loader workers are forked with this handler
            with contextlib.suppress(OSError):  # the terminal is gone; os.write: print is not safe here
                os.write(2, b"\nstopping after this step and a checkpoint; once more to stop at once\n")


class Action(enum.IntEnum):
    """What to do after a step."""

    GO = 0
    CHECKPOINT = 1
    STOP = 2


class Watch:
    """Tells after each step whether to go on, to checkpoint, or to checkpoint and stop; the same on every rank.

    checkpoint_minutes, max_hours: 0 = off; counted from construction, max_hours from `began` (of `clock`) if given. busy:
    true while a checkpoint is being written, which puts a due one off. `reason` says why it stops.
    """

    def __init__(
        self,
        ranks: Ranks,
        signals: Signals,
        *,
        checkpoint_minutes: float = 0.0,
        max_hours: float = 0.0,
        busy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self.ranks, self.signals, self.busy, self.clock = ranks, signals, busy, clock
        self.every = checkpoint_minutes * 60
        self.hours = max_hours
        self.saved_at = self.voted_at = clock()
        began = clock() if began is None else began
        self.deadline = began + max_hours * 3600 if max_hours else float("inf")
        self.reason = ""
        self._vote: tuple[Tensor, Any] | None = None
        self._wait = 1  # steps until the next vote
        self._interval = 1

    def saved(self) -> None:
        """A checkpoint was taken: the time-based one is due `checkpoint_minutes` from now."""
        self.saved_at = self.clock()

    def after_step(self) -> Action:
        """Call once after every step, on every rank."""
        if self.ranks.world == 1:
            return self._decide(self._wishes())
        self._wait -= 1
        if self._wait > 0:
            return Action.GO
        now = self.clock()
        seconds = (now - self.voted_at) / self._interval
        self.voted_at = now
        verdict = self._count()
        ballot = torch.tensor([*self._wishes(), seconds], dtype=torch.float64)
        self._vote = ballot, dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.ranks.host, async_op=True)
        self._wait = self._interval
        return verdict

    def between_epochs(self) -> Action:
        """Call after every epoch, on every rank; waits for the other ranks."""
        if self.ranks.world == 1:
            return self._decide(self._wishes())
        late = self._count()
        ballot = torch.tensor(self._wishes(), dtype=torch.float64)
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self.ranks.host)
        return max(late, self._decide(ballot.tolist()))

    def _wishes(self) -> list[float]:
        now = self.clock()
        due = self.ranks.main and self.every > 0 and now - self.saved_at >= self.every and not self.busy()
        return [float(self.signals.received), float(now >= self.deadline), float(due)]

    def _count(self) -> Action:
        """The verdict of the vote under way; the votes' interval follows the slowest rank's step time."""
        if self._vote is None:
            return Action.GO
        ballot, work = self._vote
        work.wait()
        self._vote = None
        *wishes, seconds = ballot.tolist()
        self._interval = int(min(max(VOTE_SECONDS / max(seconds, 1e-9), 1), VOTE_STEPS_MAX))
        return self._decide(wishes)

    def _decide(self, wishes: list[float]) -> Action:
        number, late, due = wishes
        if number:
            self.reason = f"stopped by {signal.Signals(int(number)).name}"
        elif late:
            self.reason = f"stopped after --max-hours {self.hours:g}"
        return Action.STOP if number or late else Action.CHECKPOINT if due else Action.GO


class BadSteps:
    """Stops a run after `limit` steps in a row without a finite loss and gradient, and saves those steps' images.

    counter: device scalar, the number of such steps in a row so far. It is read every `limit` steps only, and on CUDA
    the value read was put under way one interval earlier: the device is never waited for. Bad steps change nothing, so
    stopping late costs time only.
    """

    def __init__(self, limit: int, counter: Tensor, ranks: Ranks, folder: Path | None) -> None:
        if limit < 1:
            raise UserError(f"--max-bad-steps {limit}: use 1 or more")
        self.limit, self.counter, self.ranks, self.folder = limit, counter, ranks, folder
        self.recent: deque[tuple[int, int, Tensor]] = deque(maxlen=3 * limit)
        self._steps = 0
        self._value: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        if counter.is_cuda:
            self._value = torch.zeros(1, pin_memory=True)

    def after_step(self, epoch: int, batch: int, index: Tensor) -> None:
        """Call after every step with the positions [B] of its images in the train split.

        Raises:
            UserError: the limit is reached; it names the file with the images.
        """
        self.recent.append((epoch, batch, index))
        self._steps += 1
        # Those of one interval ago may have been followed by good ones, so the counter itself decides: a wait, on the way out.
        if self._steps % self.limit == 0 and self._read() >= self.limit and int(self.counter) >= self.limit:
            self._stop()

    def after_epoch(self, epoch: int, weights: Tensor, steps: int) -> None:
        """Call after every epoch with the weights [N], and after the last one with its number of steps, else with 0.

        Waits for the device, as the epoch's summary does.

        Raises:
            UserError: the weights are not finite, or none of the last epoch's steps was of use.
        """
        if not bool(torch.stack(torch.aminmax(weights)).isfinite().all()):
            raise UserError(
                f"the weights are no longer finite after epoch {epoch + 1}: training has diverged. Lower --lr or --rho; "
                "checkpoints of earlier epochs are untouched"
            )
        if steps and int(self.counter) >= min(steps, self.limit):
            self._stop()

    def _read(self) -> float:
        if self._value is None:
            return float(self.counter)
        old = 0.0
        if self._event is not None:
            self._event.synchronize()  # queued a whole interval ago
            old = float(self._value)
        self._value.copy_(self.counter.reshape(1), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(self.counter.device))
        return old

    def _stop(self) -> None:
        count = min(int(self.counter), len(self.recent))  # of those before a resume only the number is known
        steps = list(self.recent)[-count:]
        rows = [
            {"epoch": epoch, "batch": batch, "index": self.ranks.gather(index).flatten().tolist()}
            for epoch, batch, index in steps
        ]
        where = ""
        if self.folder is not None:
            path = self.folder / "bad_steps.json"
            try:
                path.write_text(json.dumps({"steps": rows}, indent=1) + "\n")
                where = f"; their images (positions in the train split) are in {path}"
            except OSError as error:
                where = f"; {path} could not be written ({error.strerror})"
        where = self.ranks.share(where)  # the folder is rank 0's, and whichever rank is first tells the user
        epoch, batch, _ = steps[0]
        raise UserError(
            f"{counted(count, 'step')} in a row had a non-finite loss or gradient, since batch {batch} of epoch {epoch + 1}{where}. "
            "Weights were not touched by them: look at those images, lower --lr or --rho, or raise --max-bad-steps"
        )
