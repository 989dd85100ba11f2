"""Collectives inside a forward pass: ops that autograd goes back through and that torch.compile keeps as they are.

Two ranks must issue the same collectives in the same order, compiled or not. Order is the compiler's where nothing else
decides it, so nothing here may put a rank's number into the graph: every rank then compiles the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ltfast.dist import Ranks, joined

_muted = False


class _Muted(Ranks):
    """Ranks that send nothing: the others' tensors count as nothing in a sum, and look like one's own in a gathering."""

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor] * self.world)


def _ranks() -> Ranks:
    return _Muted(joined().rank, joined().world) if _muted else joined()


@contextmanager
def silent() -> Iterator[None]:
    """Inside, the ops here send nothing: for a trial whose results nobody reads."""
    global _muted
    kept, _muted = _muted, True
    try:
        yield
    finally:
        _muted = kept


@torch.library.custom_op("ltfast::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: Tensor) -> Tensor:
    """y = sum_r x_r on every rank; every rank's loss depends on every x, so gradients add up as well."""
    return _ranks().sum_(x.clone(memory_format=torch.contiguous_format))


@sum_over_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum_backward(_: Any, grad: Tensor) -> Tensor:
    return sum_over_ranks(grad)


sum_over_ranks.register_autograd(_sum_backward)


@torch.library.custom_op("ltfast::gather_own_first", mutates_args=())
def gather_own_first(x: Tensor, world: int) -> Tensor:
    """[b, ...] of every rank -> [world * b, ...]: this rank's own, then those of the ranks after it, round to the one before.

    Backward adds up what all ranks' losses say of a rank's.
    """
    return _ranks().gather(x.contiguous()).roll(-joined().rank, 0).flatten(0, 1)


@gather_own_first.register_fake
def _(x: Tensor, world: int) -> Tensor:
    return x.new_empty(world * x.shape[0], *x.shape[1:])


@torch.library.custom_op("ltfast::sum_of_own", mutates_args=())
def sum_of_own(x: Tensor, world: int) -> Tensor:
    """The adjoint of `gather_own_first`: what the ranks hold for this one in [world * b, ...], added up, [b, ...]."""
    ranks = _ranks()
    in_order = x.unflatten(0, (world, -1)).roll(ranks.rank, 0)
    return ranks.sum_(in_order.contiguous())[ranks.rank].clone()


@sum_of_own.register_fake
def _(x: Tensor, world: int) -> Tensor:
    return x.new_empty(x.shape[0] // world, *x.shape[1:])


def _keep_world(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.world = inputs[1]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return sum_of_own(grad, ctx.world), None


gather_own_first.register_autograd(_gather_backward, setup_context=_keep_world)
