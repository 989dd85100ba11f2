"""CUDA graphs of whole steps: a step of a small network is bound by its thousand launches, a replay is one launch.

    calls 1 .. WARMUP      run as they are, on a side stream: they are real steps, and let kernels compile and tune
    call  WARMUP + 1       is recorded (nothing runs while recording), then replayed
    every call after       copies its inputs into the recorded ones and replays

Rules for a function that is recorded: every call of a branch has the same shapes; everything it reads or writes stays at
one address between calls (state is changed in place); the host decides nothing but the branch; it returns tensors, which
live in the graph's memory and hold until the next call.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ltfast.compiled import Report, quiet, reason_of

# Two, as PyTorch's recipe for whole-network capture does more than one: cuDNN and Triton tune in the first, and the second
# allocates as all later ones will.
WARMUP = 2


class Recorder(Protocol):
    """What `Captured` needs of CUDA; tests have one that needs no GPU."""

    def aside(self) -> AbstractContextManager[None]:
        """Run eagerly on the side stream."""
        ...

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, the function's recorded outputs); records without running."""
        ...


class CudaRecorder:
    """`Recorder` on CUDA graphs that share one memory pool and one side stream.

    Graphs that share them must go together: torch 2.14 and 2.15 clear a stream's cuBLAS workspace when any graph recorded on it
    is destroyed, though others still write there (pytorch issue 193402). What lives longer needs a recorder of its own, at
    the price of memory that the graphs would have shared: what each holds only while it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def aside(self) -> AbstractContextManager[None]:
        """See `Recorder`."""
        return _Aside(self.stream)

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Recorder`."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device)
        try:
            # thread_local: another thread that waits for a copy (ltfast/store.py) must not break the recording.
            with (
                _nothing_collected(),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                outputs = function()
        except BaseException:
            torch.cuda.set_stream(current)  # torch stays on the side stream if the recording could not be ended
            raise
        return graph.replay, outputs


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage goes before, and none inside: an old graph that is destroyed while another one is recorded breaks the
    recording (torch.cuda.graph collects no garbage any more since torch 2.9)."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class _Aside(AbstractContextManager[None]):
    """The side stream starts after all work of the current one, and the current one goes on after all of its."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.inside = stream, torch.cuda.stream(stream)

    def __enter__(self) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        self.inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)


@dataclass
class Failure:
    """Why a recording failed, known to all that record in this process: after one, nothing else is tried.

    The allocator of torch 2.11 may believe for ever that a recording is under way, and the next one would end in an
    assertion that says nothing of the cause.
    """

    reason: str | None = None


@dataclass
class Recording:
    """One branch: calls so far, and once recorded how to replay it and where its outputs are."""

    calls: int = 0
    replay: Callable[[], None] | None = None
    outputs: Any = None


class Captured:
    """`function(branch, *tensors)`, recorded once for each branch and replayed afterwards; see the module's rules.

    Args:
        function: what to record.
        name: for the report.
        recorder: `CudaRecorder`.
        report: told once for each recorded branch, or once why everything runs unrecorded.
        failure: shared by all that record on one device.

    Attributes:
        reason: why nothing is recorded any more, or None.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        recorder: Recorder,
        report: Report = quiet,
        warmup: int = WARMUP,
        failure: Failure | None = None,
    ) -> None:
        self.function, self.name, self.recorder, self.report = function, name, recorder, report
        self.failure = failure or Failure()
        self.warmup = max(1, warmup)
        self.inputs: list[Tensor] = []
        self.branches: dict[Hashable, Recording] = {}
        self.reason: str | None = None

    def __call__(self, branch: Hashable, *tensors: Tensor) -> Any:
        if self.reason is not None:
            return self.function(branch, *tensors)
        self.load(tensors)
        recording = self.branches.setdefault(branch, Recording())
        recording.calls += 1
        if recording.calls <= self.warmup:
            with self.recorder.aside():
                return self.function(branch, *self.inputs)
        if recording.replay is None and not self.record(branch, recording):
            return self.function(branch, *tensors)
        assert recording.replay is not None
        recording.replay()
        return recording.outputs

    def load(self, tensors: tuple[Tensor, ...]) -> None:
        """Copy the inputs into the ones that recordings read.

        Raises:
            ValueError: the shapes are not those of the first call.
        """
        if not self.inputs:
            self.inputs = [torch.empty_like(t) for t in tensors]
        for own, given in zip(self.inputs, tensors, strict=True):
            if own.shape != given.shape or own.dtype != given.dtype:
                raise ValueError(
                    f"{self.name}: recorded for {own.dtype} {tuple(own.shape)}, got {given.dtype} {tuple(given.shape)}"
                )
            own.copy_(given)

    def record(self, branch: Hashable, recording: Recording) -> bool:
        """Record one branch; False if that or an earlier recording failed: nothing has run then, and nothing will be recorded
        any more."""
        started = time.perf_counter()
        inside: list[Exception] = []

        def function() -> Any:
            try:
                return self.function(branch, *self.inputs)
            except Exception as error:
                inside.append(error)
                raise

        if self.failure.reason is None:
            try:
                recording.replay, recording.outputs = self.recorder.record(function)
            except Exception as error:
                # Ending a broken recording raises that there was an error before.
                first = inside[0] if inside else error
                if isinstance(first, torch.OutOfMemoryError):
                    raise first from None
                self.failure.reason = reason_of(first)
        self.reason = self.failure.reason
        if self.reason is not None:
            self.branches.clear()
        self.report(f"{self.name}, {branch}", seconds=time.perf_counter() - started, reason=self.reason)
        return self.reason is None
