"""Gradients of a loss, gathered into a row of the flat buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from ltfast.flat import FlatParameters
from ltfast.scaler import LossScale


class Backward:
    """`backward(loss, row)` writes the gradient of a scalar loss into gradient row `row` of `flat`.

    Autograd hands the gradients over and a few multi-tensor launches move them all into the row; adding each into its
    `p.grad` would be one launch a parameter. `p.grad` stays alone.

    Args:
        scaler: loss scale of fp16; rows are unscaled.
    """

    def __init__(self, flat: FlatParameters, scaler: LossScale | None = None) -> None:
        self.flat, self.scaler = flat, scaler
        self._buffer: Tensor | None = None
        self._views: list[list[Tensor]] = []

    @torch.no_grad()
    def __call__(self, loss: Tensor, row: int = 0, *, add: bool = False, retain_graph: bool = False) -> Tensor:
        """Write (or add) the gradient of `loss` to the row; returns it, [N]. Parameters it does not reach get zero."""
        scaled = self.scaled(loss)
        grads = torch.autograd.grad(scaled, self.flat.params, retain_graph=retain_graph, allow_unused=True)
        views = self.views(row)
        reached = [(view, grad) for view, grad in zip(views, grads, strict=True) if grad is not None]
        targets, found = [view for view, _ in reached], [grad for _, grad in reached]
        if self.scaler is not None:
            found = list(torch._foreach_mul(found, self.scaler.inverse))
        if add:
            torch._foreach_add_(targets, found)
            return self.flat.grads[row]
        if len(reached) < len(views):
            torch._foreach_zero_([view for view, grad in zip(views, grads, strict=True) if grad is None])
        torch._foreach_copy_(targets, found)
        return self.flat.grads[row]

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times its scale."""
        with torch.enable_grad():
            return loss if self.scaler is None else loss * self.scaler.scale

    def views(self, row: int) -> list[Tensor]:
        """Row `row` as one view a parameter; kept until the buffer is reallocated."""
        buffer = self.flat.grads
        if self._buffer is not buffer:
            self._buffer, self._views = buffer, [self.flat.views(r) for r in buffer]
        return self._views[row]
