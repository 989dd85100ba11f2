"""A stand-in for CUDA graphs that needs no GPU: records aten calls, undoes them, and replays them at the same addresses.

Like a CUDA graph it runs nothing while recording (what ran to find the shapes is undone), replays kernels and no Python,
and writes every result where the recorded one lay. So it shows the same faults: state that moves, numbers read by the
host, decisions taken in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def extent(storage: torch.UntypedStorage) -> tuple[int, int]:
    """(address, bytes)."""
    return storage.data_ptr(), storage.nbytes()


def is_view(function: Any) -> bool:
    """True if every result is a view of an argument, or an argument's shape changes: at replay it is there already."""
    if torch.Tag.inplace_view in function.tags:
        return True
    results = function._schema.returns
    return bool(results) and all(r.alias_info is not None and not r.alias_info.is_write for r in results)


class Tape(TorchDispatchMode):
    """Every aten call made inside, in order; the memory they found is put back on leaving."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        # Storages may lie over the same memory (a parameter's own and the flat buffer), so an address does not name one.
        self.found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # extent -> (flat view of it, its bytes before)
        self.made: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            storage = tensor.untyped_storage()
            if extent(storage) not in self.made and extent(storage) not in self.found:
                raw = torch.empty(0, dtype=torch.uint8).set_(storage)
                self.found[extent(storage)] = (raw, raw.clone())
        result = function(*args, **kwargs)
        self.made.update(own for t in tensors_in(result) if (own := extent(t.untyped_storage())) not in self.found)
        if not is_view(function):
            self.calls.append((function, args, kwargs, result))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for raw, before in reversed(self.found.values()):  # where two overlap, the one seen first knows how it was
            raw.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tensors_in(result), tensors_in(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new.view_as(old))


class TapeRecorder:
    """A `ltfast.graph.Recorder` on the CPU."""

    tape = Tape

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with self.tape() as tape:
            outputs = function()
        leaves, form = tree_flatten(outputs)
        self.tapes.append(tape)
        return tape.replay, tree_unflatten(
            [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], form
        )
