"""Group gradients of the last layer alone, every step: what mode R knows exactly while it remembers the rest.

    M = C + R:  C_ij = <u_i, u_j> over the marked parameters, of this batch;  R the same over all others, remembered

A backward pass that stops at the classifier costs next to nothing (no layer below is visited), and under s = |theta| the
classifier holds most of M. What it gains: docs/optimizers.md, from benchmarks/direction.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ltfast.flat import FlatParameters
from ltfast.kernels import gram_partials
from ltfast.rows import dense


class FreshGradients:
    """Rows [G, n] of group gradients over `params`, neighbours in `flat`; `span` is their slice of the flat buffer.

    Raises:
        ValueError: the parameters are not one consecutive run of `flat`.
    """

    def __init__(self, flat: FlatParameters, params: Sequence[nn.Parameter], groups: int) -> None:
        self.flat, self.span = flat, flat.span(params)
        held = set(params)
        self.params = [p for p in flat.params if p in held]
        self.rows = torch.zeros(groups, self.span.stop - self.span.start, device=flat.device)
        index = [i for i, p in enumerate(flat.params) if p in held]
        whole = flat.views(flat.data)
        self._views = [
            [row.as_strided(whole[i].shape, whole[i].stride(), row.storage_offset() + flat.offsets[i] - self.span.start)
             for i in index]
            for row in self.rows
        ]  # fmt: skip

    def put(self, losses: Tensor, scale: Tensor | None = None) -> Tensor:
        """Fill the rows with the gradients of losses [G] (times `scale`, of which the rows are freed); keeps the graph."""
        wanted = [i for i, p in enumerate(self.params) if p.requires_grad]
        if not wanted:  # frozen
            return self.rows.zero_()
        for k, views in enumerate(self._views):
            with torch.enable_grad():
                loss = losses[k] if scale is None else losses[k] * scale
            found = torch.autograd.grad(loss, [self.params[i] for i in wanted], retain_graph=True, allow_unused=True)
            for i, grad in zip(wanted, found, strict=True):
                views[i].zero_() if grad is None else views[i].copy_(dense(grad))
        if scale is not None:
            self.rows.div_(scale)
        return self.rows

    def put_rows(self, gradients: Tensor) -> Tensor:
        """Fill the rows with given gradients, [G, *shape] of the only parameter."""
        for (view,), gradient in zip(self._views, gradients, strict=True):
            view.copy_(gradient)
        return self.rows

    def gram(self, rows: Tensor, adaptive: bool) -> Tensor:
        """Gram matrix, float64, of rows [R, n] over the marked parameters, or of their part of rows [R, N]."""
        part = rows if rows.shape[1] == self.rows.shape[1] else rows[:, self.span]
        return gram_partials(part, self.flat.data[self.span], adaptive)[0].sum(0)
