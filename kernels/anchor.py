"""Quadratic anchors: the general penalty of G anchors and their collapse into one."""

import torch
from torch import Tensor

from .common import check_rows, check_small, check_vector, count


def anchor_penalty_reference(theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> Tensor:
    """The torch oracle: 0.5 * sum_j c_j sum_i F_ji (theta_i - a_ji)^2."""
    gap = theta_N - anchors_GN
    return 0.5 * (coef_G.double() @ (fishers_GN * gap * gap).sum(1, dtype=torch.float64)).to(theta_N.dtype)


def collapse_anchors_reference(anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The torch oracle, in float64: (A, T, const)."""
    weight = coef_G.double()[:, None] * fishers_GN.double()
    total = weight.sum(0)
    target = torch.where(total > 0, (weight * anchors_GN.double()).sum(0) / total, 0.0)
    const = (weight * (anchors_GN.double() - target) ** 2).sum()
    return total.to(anchors_GN.dtype), target.to(anchors_GN.dtype), const


def anchor_penalty(theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> Tensor:
    """0.5 * sum_j coef_j sum_i F_ji (theta_i - anchor_ji)^2, differentiable in theta."""
    check_vector("theta_N", theta_N, dtypes=(torch.float32,))
    check_rows("anchors_GN", anchors_GN, theta_N)
    check_rows("fishers_GN", fishers_GN, theta_N)
    check_small("coef_G", coef_G, anchors_GN.shape[0], theta_N.device)
    count("anchor_penalty", 2, [theta_N, anchors_GN, fishers_GN])
    return anchor_penalty_reference(theta_N, anchors_GN, fishers_GN, coef_G)


def collapse_anchors(anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(A_N, T_N, const): the G anchors as one."""
    check_rows("anchors_GN", anchors_GN)
    check_rows("fishers_GN", fishers_GN, anchors_GN)
    check_small("coef_G", coef_G, anchors_GN.shape[0], anchors_GN.device)
    count("collapse_anchors", 2, [anchors_GN, fishers_GN])
    with torch.no_grad():
        return collapse_anchors_reference(anchors_GN, fishers_GN, coef_G)
