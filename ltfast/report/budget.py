"""Time: a budget shared fairly by the parts still to come, and what a person sees while they are computed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from ltfast.errors import UserError


@dataclass
class Budget:
    """`minutes` from now on (None: no limit), for `parts` parts; each may use its share of what is left when it starts.

    Raises UserError for minutes <= 0.
    """

    minutes: float | None
    parts: int = 1
    clock: Callable[[], float] = time.monotonic
    end: float = field(init=False)

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise UserError(f"--max-minutes {self.minutes}: needs a positive number of minutes")
        self.end = float("inf") if self.minutes is None else self.clock() + 60 * self.minutes

    @property
    def spent(self) -> bool:
        """True when no time is left."""
        return self.clock() >= self.end

    def keep(self, seconds: float) -> None:
        """Keep time back for what comes after the parts."""
        self.end -= seconds

    def share(self) -> Callable[[], bool]:
        """Start the next part: a function that tells whether the part's share of the time is used up."""
        now = self.clock()
        deadline = now + max(0.0, self.end - now) / max(1, self.parts)
        self.parts -= 1
        return lambda: self.clock() >= deadline


class Progress:
    """A rich bar on a terminal's stderr, a line for each part on any other; `with Progress(parts) as p:`, `p.part(...)`."""

    def __init__(self, parts: int, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=console, transient=True, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        self.lines = not quiet and not console.is_terminal
        self.whole = self.bar.add_task("report", total=parts)
        self.task: Any = None

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def note(self, text: str) -> None:
        """A line for the user."""
        if self.lines:
            print(f"report: {text}", file=sys.stderr, flush=True)
        elif not self.bar.disable:
            self.bar.print(f"report: {text}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def part(self, name: str, ticks: int | None = None) -> Iterator[Callable[[], None]]:
        """One part of the report; yields the function to call after each of its (at most) `ticks` units of work."""
        if self.lines:
            self.note(name)
        task = self.bar.add_task(name, total=ticks)
        try:
            yield lambda: self.bar.advance(task)
        finally:
            self.bar.remove_task(task)
            self.bar.advance(self.whole)
