"""Gradients as rows of one buffer: autograd accumulates straight into the attached row, and what it or somebody else made as
tensors of their own is copied in. Which parameters have a gradient is told by versions, without a look at the device.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ltfast.flat import FlatParameters


def dense(grad: Tensor) -> Tensor:
    """A gradient as a strided tensor: an embedding may have a sparse one."""
    return grad if grad.layout == torch.strided else grad.to_dense()


def part_of(buffer: Tensor, like: Tensor, strides: Sequence[int], offset: int) -> Tensor:
    """The part of a [N] buffer that belongs to parameter `like`."""
    return buffer.as_strided(like.shape, strides, buffer.storage_offset() + offset)


class GradientRows:
    """[R, N] gradient rows of `flat`; autograd accumulates straight into the attached one.

    A gradient counts as present if anything was added to it since `attach` (its version tells) or if it is a tensor of
    its own ("stray": somebody set p.grad to None or assigned it), which `collect` copies into the row. Strays are never
    written to.

    Attributes:
        data: the rows.
        gathered: how many stray gradients have been copied so far.
    """

    def __init__(self, flat: FlatParameters, rows: int) -> None:
        self.params = flat.params
        self._layout = list(zip(flat._strides, flat.offsets[:-1], strict=True))
        self.data = torch.zeros(rows, flat.size, device=flat.device, dtype=torch.float32)
        # .data gives every view a version counter of its own: a write to one gradient is told from a write to another.
        self._views = [[view.data for view in flat.views(row)] for row in self.data]
        self._addresses = [[view.data_ptr() for view in views] for views in self._views]
        self._attached = [[0] * len(self.params) for _ in range(rows)]  # version when attached
        self._dirty = [[False] * len(self.params) for _ in range(rows)]  # the row holds a gradient there
        self._zeroed = [[False] * len(self.params) for _ in range(rows)]  # its attached zero is one, too
        self._used: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(self.params)  # by `consume` or `attach`
        self._consumed = False  # by `consume`
        self.gathered = 0

    def attach(
        self,
        row: int = 0,
        *,
        zero: bool = True,
        only: Sequence[bool] | None = None,
        present: Sequence[bool] | None = None,
    ) -> Tensor:
        """Point `p.grad` at row `row` (of parameters not in `only`: at None); returns the row, [N].

        present: parameters whose zeroed gradient counts as one even if nothing is added to it.
        """
        self._renew(row)
        views = self._views[row]
        if zero:
            self.data[row].zero_()
            self._attached[row] = [view._version for view in views]
            self._used = [(weakref.ref(view), view._version) for view in views]
            self._consumed = False
            self._dirty[row] = [False] * len(views)
            self._zeroed[row] = list(present) if present is not None else [False] * len(views)
        for p, view, wanted in zip(self.params, views, repeat(True) if only is None else only, strict=False):
            p.grad = view if wanted else None
        return self.data[row]

    def collect(self, row: int = 0) -> tuple[bool, ...]:
        """Make `row` hold every parameter's gradient, zero where there is none; returns which parameters have one.

        To be called under no_grad: gradients of create_graph=True have a graph of their own.
        """
        views, attached, dirty = self._views[row], self._attached[row], self._dirty[row]
        self._renew(row)
        grads = [p.grad for p in self.params]
        if all(grad is not None and grad is not view for grad, view in zip(grads, views, strict=True)):
            self._gather(views, grads)  # nearly every step: all of them are tensors of autograd's own
            self._dirty[row] = [True] * len(views)
            return (True,) * len(views)
        writes = [0] * len(views)
        strays, absent = [], []
        for i, (p, view) in enumerate(zip(self.params, views, strict=True)):
            if p.grad is view:
                writes[i] = view._version - attached[i]
                dirty[i] = dirty[i] or writes[i] > 0 or self._zeroed[row][i]
            elif p.grad is None:
                if dirty[i] or view._version != attached[i]:  # or autograd wrote there before it was taken away
                    absent.append(i)
            else:
                strays.append(i)
        self._gather([views[i] for i in strays], [self.params[i].grad for i in strays])
        if absent:
            torch._foreach_zero_([views[i] for i in absent])
        for i in strays:
            dirty[i] = True
        for i in absent:
            dirty[i], attached[i] = False, views[i]._version
        here = [i for i, p in enumerate(self.params) if p.grad is views[i] and not self._zeroed[row][i]]
        self._unused_among(views, dirty, here, writes)
        return tuple(dirty)

    def _renew(self, row: int) -> None:
        """Somebody may have put other memory below an attached gradient (`p.grad.data = ...`): it is like one of autograd's own
        from then on, and the row has another view."""
        views = self._views[row]
        for i, (view, address) in enumerate(zip(views, self._addresses[row], strict=True)):
            if view.data_ptr() != address:
                views[i] = part_of(self.data[row], self.params[i], *self._layout[i]).data
                self._attached[row][i] = views[i]._version

    def filled(self, rows: Sequence[int]) -> list[bool]:
        """Which parameters have a gradient in any of `rows`."""
        return [any(column) for column in zip(*(self._dirty[row] for row in rows), strict=True)]

    @contextmanager
    def without(self, rows: Sequence[int], absent: Sequence[int]) -> Iterator[None]:
        """`rows` hold zeros for the parameters of index `absent` meanwhile; what they held comes back."""
        views = [self._views[row][i] for row in rows for i in absent]
        held = [view.clone() for view in views]
        if views:
            torch._foreach_zero_(views)
        try:
            yield
        finally:
            if views:
                torch._foreach_copy_(views, held)

    @torch.no_grad()
    def put(self, row: int, grads: Sequence[Tensor | None], *, add: bool = False) -> None:
        """Write (or add) one gradient for each parameter to `row`; None is zero and counts as no gradient."""
        self._renew(row)
        views, dirty = self._views[row], self._dirty[row]
        held = [(view, grad) for view, grad in zip(views, grads, strict=True) if grad is not None]
        if held:
            targets, sources = [view for view, _ in held], [dense(grad) for _, grad in held]
            (torch._foreach_add_ if add else torch._foreach_copy_)(targets, sources)
        if not add:
            absent = [view for view, grad in zip(views, grads, strict=True) if grad is None]
            if absent:
                torch._foreach_zero_(absent)
        for i, grad in enumerate(grads):
            dirty[i] = grad is not None or (add and dirty[i])
            self._zeroed[row][i] = False
            self._attached[row][i] = views[i]._version

    def _gather(self, views: list[Tensor], grads: list[Tensor | None]) -> None:
        if not views:
            return
        self.gathered += len(views)
        torch._foreach_copy_(views, [dense(g) for g in grads if g is not None])

    def _unused_among(self, views: list[Tensor], dirty: list[bool], here: list[int], writes: list[int]) -> None:
        """Clipping writes to every gradient, so an unused one has a write too, but fewer than the others.

        Only then (all written, some less often) the host looks which of those are zero: the one wait for the device,
        in steps that have both unused parameters and clipping.
        """
        least = min((writes[i] for i in here), default=0)
        if least == 0 or all(writes[i] == least for i in here):
            return
        unsure = [i for i in here if writes[i] == least]
        nonzero = torch.stack([views[i].any() for i in unsure]).tolist()
        for i, used in zip(unsure, nonzero, strict=True):
            dirty[i] = used

    def consume(self) -> None:
        """Remember the gradients as used, so that `fresh` tells whether new ones have come."""
        for i, p in enumerate(self.params):
            self._used[i] = None if p.grad is None else (weakref.ref(p.grad), p.grad._version)
        self._consumed = True

    def fresh(self) -> bool:
        """True if a parameter has a gradient that came after the last `attach` or `consume`.

        Used gradients that were written since may have been set to zero (`model.zero_grad(set_to_none=False)`): then, and
        only then, the host looks.
        """
        written = []
        for p, used in zip(self.params, self._used, strict=True):
            grad = p.grad
            if grad is None:
                continue
            if used is None or used[0]() is not grad:
                return True
            if used[1] != grad._version:
                written.append(grad)
        if not written or not self._consumed:
            return bool(written)
        return bool(torch.stack([grad.detach().any() for grad in written]).any())
