"""Recording and replaying steps, on a tape instead of CUDA graphs; tests/test_gpu.py does the same on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ltfast.graph import WARMUP, Captured
from tests.tape import TapeRecorder


class Counter:
    """A function with state: adds the input to a total, in one of two ways."""

    def __init__(self) -> None:
        self.total = torch.zeros(3)
        self.python_calls = 0

    def __call__(self, branch: str, x: Tensor) -> dict[str, Tensor]:
        self.python_calls += 1
        self.total += x if branch == "add" else -x
        return {"total": self.total.clone(), "twice": 2 * x}


def test_replays_continue_the_state_and_run_no_python() -> None:
    function, told = Counter(), []
    captured = Captured(function, "count", TapeRecorder(), lambda name, **values: told.append((name, values)))
    total = torch.zeros(3)
    for step in range(12):
        x = torch.full((3,), float(step))
        branch = "subtract" if step % 3 == 2 else "add"
        total += x if branch == "add" else -x
        out = captured(branch, x)
        torch.testing.assert_close(out["total"], total, rtol=0, atol=0)
        torch.testing.assert_close(out["twice"], 2 * x, rtol=0, atol=0)
    assert function.python_calls == 2 * (WARMUP + 1)  # both branches: warm-up, then one recording
    assert [name for name, _ in told] == ["count, add", "count, subtract"]
    assert all(values["reason"] is None for _, values in told)


def test_the_tape_notices_state_that_moves() -> None:
    """The rule that recorded state is changed in place: without it a replay reads what the recording read."""
    box = {"total": torch.zeros(())}

    def moving(branch: str, x: Tensor) -> Tensor:
        box["total"] = box["total"] + x
        return box["total"]

    captured = Captured(moving, "moving", TapeRecorder())
    results = [float(captured("", torch.ones(()))) for _ in range(6)]
    assert results != [1, 2, 3, 4, 5, 6]


def test_a_failed_recording_runs_everything_as_it_is_and_says_so_once() -> None:
    class Broken:
        def aside(self) -> AbstractContextManager[None]:
            return nullcontext()

        def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
            raise RuntimeError("operation not permitted\n when stream is capturing")

    function, told = Counter(), []
    captured = Captured(function, "count", Broken(), lambda name, **values: told.append(values["reason"]))
    for _ in range(8):
        out = captured("add", torch.ones(3))
    assert out["total"].tolist() == [8, 8, 8]
    assert told == ["RuntimeError: operation not permitted when stream is capturing"]
    assert captured.reason == told[0]


def test_other_shapes_are_refused() -> None:
    captured = Captured(Counter(), "count", TapeRecorder())
    captured("add", torch.ones(3))
    with pytest.raises(ValueError, match=r"count: recorded for torch.float32 \(3,\), got torch.float32 \(1,\)"):
        captured("add", torch.ones(1))
