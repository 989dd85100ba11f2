"""Gram matrix of the gradient rows and |theta|^2 in one read."""

import torch
from torch import Tensor

from .common import check_rows, check_vector, count


def gram_partials_reference(grads_RN: Tensor, theta_N: Tensor | None, adaptive: bool) -> tuple[Tensor, Tensor]:
    """The torch oracle: one partial sum, in float64."""
    rows = grads_RN.double()
    theta = None if theta_N is None else theta_N.double()
    if adaptive:
        rows = rows * theta.abs()
    theta_sq = rows.new_zeros(1) if theta is None else (theta @ theta).reshape(1)
    return (rows @ rows.T)[None], theta_sq


def gram_partials(grads_RN: Tensor, theta_N: Tensor | None = None, adaptive: bool = False) -> tuple[Tensor, Tensor]:
    """Partial sums ([P, R, R], [P])."""
    check_rows("grads_RN", grads_RN)
    if theta_N is not None:
        check_vector("theta_N", theta_N, grads_RN)
    elif adaptive:
        raise ValueError("theta_N is None; adaptive=True needs it")
    count("gram_partials", 1, [grads_RN, theta_N])
    with torch.no_grad():
        return gram_partials_reference(grads_RN, theta_N, adaptive)


def gram(grads_GN: Tensor, theta_N: Tensor, adaptive: bool = False) -> tuple[Tensor, Tensor]:
    """(M [G, G], |theta|^2), float64."""
    partial, theta_sq = gram_partials(grads_GN, theta_N, adaptive)
    return partial.sum(0), theta_sq.sum(0)
