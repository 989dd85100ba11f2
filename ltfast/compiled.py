"""torch.compile with a net under it: every kind of call is tried once, backward included, and a failure turns to eager.

A kind of call is the shapes, dtypes and gradient needs of its arguments. All of a run's kinds are met in its first steps
(and once more when groups appear), so after them nothing is compiled any more.

Ranks train on the same kinds in the same order and turn to eager together: a compiled graph may order its collectives
(ltfast/collectives.py) otherwise than eager calls do. Trials send nothing, so the one that fails leaves nobody waiting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from types import FunctionType
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from ltfast.collectives import silent

P = ParamSpec("P")
R = TypeVar("R")
Agree = Callable[[str | None], str | None]  # every rank's complaint, or None -> one of them, the same on every rank
REASON_CHARS = 500


class Report(Protocol):
    """Told what was compiled, or why it runs eagerly: a row in the run folder and, for a failure, a line on screen."""

    def __call__(self, name: str, *, seconds: float, reason: str | None) -> None: ...


def quiet(name: str, *, seconds: float, reason: str | None) -> None:
    """The `Report` that says nothing."""


def reason_of(error: Exception) -> str:
    """What to tell of an error: its kind and the beginning of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:REASON_CHARS]


class Compiler:
    """Compiles the functions of one run; the first failure in training makes all of training eager, one in evaluation all
    of evaluation, and is reported once.

    Args:
        module: whose buffers and random draws a trial call must not change.
        report: see `Report`.
        backend: of torch.compile.
        agree: asked after every trial in training, so that all ranks go the same way. In evaluation ranks may meet
            different kinds of calls, which hold no collectives.
    """

    def __init__(
        self, module: nn.Module, report: Report = quiet, backend: str = "inductor", agree: Agree = lambda reason: reason
    ) -> None:
        self.module, self.report, self.backend, self.agree = module, report, backend, agree
        self.reasons: dict[bool, str] = {}  # training -> why it is eager now
        # Exact group gradients go back through one graph G times; donated buffers would let the first pass eat it.
        functorch.donated_buffer = False

    def __call__(self, function: Callable[P, R], name: str) -> Callable[P, R]:
        """`function` of tensors (and None), one graph: shapes are static, a graph break is a failure."""
        compiled: Any = Compiled(self, function, name)
        return compiled  # type: ignore[no-any-return]

    @property
    def reason(self) -> str | None:
        """Why the mode that the module is in, training or evaluation, runs eagerly now, or None."""
        return self.reasons.get(self.module.training)

    def tried(self, name: str, error: Exception | None, seconds: float) -> None:
        """Report a trial; from the first that fails, here or (in training) on another rank, this mode is eager."""
        reason = None if error is None else reason_of(error)
        if self.module.training:
            reason = self.agree(reason)
        if reason is not None:
            self.reasons[self.module.training] = reason
        self.report(name, seconds=seconds, reason=reason)


def kind_of(args: Sequence[Tensor | None]) -> Hashable:
    """What torch.compile would compile anew for."""
    tensors = tuple(None if a is None else (a.shape, a.dtype, a.stride(), a.requires_grad) for a in args)
    return tensors, torch.is_grad_enabled()


class Compiled:
    """One compiled function; see `Compiler`."""

    def __init__(self, compiler: Compiler, function: Callable[..., Any], name: str) -> None:
        self.compiler, self.function, self.name = compiler, function, name
        self.compiled = torch.compile(fresh(function), backend=compiler.backend, fullgraph=True, dynamic=False)
        self.known: set[Hashable] = set()

    def __call__(self, *args: Tensor | None) -> Any:
        if self.compiler.reason is None:
            kind = (kind_of(args), self.compiler.module.training)
            if kind not in self.known:
                self.known.add(kind)
                self.attempt(args)
        return (self.function if self.compiler.reason else self.compiled)(*args)

    def attempt(self, args: Sequence[Tensor | None]) -> None:
        """Compile for arguments of this kind and run forward and backward once; leaves no trace but the compiled code."""
        module, started = self.compiler.module, time.perf_counter()
        kept = [buffer.clone() for buffer in module.buffers()]
        devices = {p.device for p in module.parameters() if p.is_cuda}
        failure = None
        try:
            with torch.random.fork_rng(devices=list(devices)), silent():
                self.rehearse(args)
        except torch.OutOfMemoryError:
            raise  # the batch does not fit: eager would not fit either
        except Exception as error:
            failure = error
        finally:
            for buffer, old in zip(module.buffers(), kept, strict=True):
                buffer.data.copy_(old)  # .data: graphs that wait for their backward must not see it as a change
        self.compiler.tried(self.name, failure, time.perf_counter() - started)

    def rehearse(self, args: Sequence[Tensor | None]) -> None:
        """Forward, and backward to every argument and parameter; on copies of the arguments, whose graph must live on."""
        copies = [a if a is None else a.detach().requires_grad_(a.requires_grad) for a in args]
        outputs = self.compiled(*copies)
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        ends = [t.float().sum() for t in tensors if t is not None and t.requires_grad]
        if ends:
            leaves: list[Tensor] = [p for p in self.compiler.module.parameters() if p.requires_grad]
            leaves += [c for c in copies if c is not None and c.requires_grad]
            torch.autograd.grad(torch.stack(ends).sum(), leaves, allow_unused=True)


def fresh(function: Callable[P, R]) -> Callable[P, R]:
    """The same function with a code object of its own.

    torch.compile counts recompilations by code object: several runs in one process (seeds, tests) would share a budget
    of eight and then fail.
    """
    inner = getattr(function, "__func__", function)
    copy = FunctionType(
        inner.__code__.replace(), inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__
    )
    owner = getattr(function, "__self__", None)
    return copy if owner is None else copy.__get__(owner)
