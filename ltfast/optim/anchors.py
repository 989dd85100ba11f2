"""Quadratic anchors of the update pass (GKP), given one tensor per parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltfast.optim.block import Block


@torch.no_grad()
def attach_anchor(
    blocks: Sequence[Block],
    params: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    targets: Sequence[Tensor | None],
    strength: float | Tensor,
) -> None:
    """Let every block's update add strength * A * (theta - T); see FlatOptimizer.set_anchor.

    Raises:
        ValueError: number or shapes of the tensors do not fit; then nothing has changed.
    """
    for name, tensors in (("weights", weights), ("targets", targets)):
        if len(tensors) != len(params):
            raise ValueError(f"{name} holds {len(tensors)} tensors for {len(params)} parameters")
        for p, t in zip(params, tensors, strict=True):
            if t is not None and t.shape != p.shape:
                raise ValueError(f"{name} holds a tensor of shape {tuple(t.shape)} for a parameter of {tuple(p.shape)}")
    pairs = dict(zip(params, zip(weights, targets, strict=True), strict=True))
    for block in blocks:
        weight, target = ([pairs[p][i] for p in block.flat.params] for i in (0, 1))
        block.anchor = (block.flat.flatten(weight), block.flat.flatten(target), strength)


def export_anchor(
    blocks: Sequence[Block], params: Sequence[Tensor]
) -> tuple[list[Tensor | None], list[Tensor | None], float | Tensor] | None:
    """(weights, targets, strength) of the anchor that the blocks hold, as `attach_anchor` takes them; None: no anchor."""
    found: list[dict[Tensor, Tensor]] = [{}, {}]
    strength: float | Tensor | None = None
    for block in blocks:
        if block.anchor is not None:
            strength = block.anchor[2]
            for held, flat in zip(found, block.anchor[:2], strict=True):
                held.update(zip(block.flat.params, (v.clone() for v in block.flat.views(flat)), strict=True))
    if strength is None:
        return None
    return [found[0].get(p) for p in params], [found[1].get(p) for p in params], strength
