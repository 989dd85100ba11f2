"""Grouped knowledge preservation as one quadratic anchor (given to the update kernels as (A, T, strength)).

    L_gkp = (lam / 2) sum_g sum_{j != g} (1 / |G^j|) sum_i F_ji (theta_i - theta*_ji)^2
          = (lam / 2) [ sum_i A_i (theta_i - T_i)^2 + const ]
    c_j = (G - 1) / |G^j|,   A = sum_j c_j F_j,   T = sum_j c_j F_j theta*_j / A  (0 where A = 0)
    gradient = lam * A * (theta - T)   (const does not depend on theta)

Both are exact. Storing T, not A * T, keeps theta - T exact in float32 near the anchor. Source: arXiv 2603.21217, GKP.
Legend: G groups, D elements of the flattened encoder, N elements of the whole flat model.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 20  # elements of one float64 temporary in `stream_anchor` (8 MiB): a few of them, not of length D


class Anchor(NamedTuple):
    """weight A >= 0 and target T, float32 [D]."""

    weight: Tensor
    target: Tensor

    def expanded(self, n_elements: int, start: int = 0) -> "Anchor":
        """The anchor of a flat model of N elements whose encoder begins at `start`; no force on the rest. ValueError unless it
        fits in."""
        if start < 0 or start + len(self.weight) > n_elements:
            raise ValueError(f"{len(self.weight)} anchored elements from {start} do not fit into {n_elements}")
        whole = self.weight.new_zeros(2, n_elements)
        whole[0, start : start + len(self.weight)] = self.weight
        whole[1, start : start + len(self.target)] = self.target
        return Anchor(whole[0], whole[1])


def group_sizes(group_of_class: Tensor, counts_C: Tensor, num_groups: int, normalise: str = "classes") -> Tensor:
    """|G^j| float64 [G]: classes of each group (the paper) or its training images ("samples", the released code).

    Raises ValueError unless group_of_class [C] holds groups below `num_groups`, and one for each of counts [C].
    """
    if normalise not in ("classes", "samples"):
        raise ValueError(f"normalise must be classes or samples, got {normalise!r}")
    if (
        group_of_class.shape != counts_C.shape
        or not 0 <= int(group_of_class.min()) <= int(group_of_class.max()) < num_groups
    ):
        raise ValueError(
            f"group_of_class must give each of the {len(counts_C)} classes a group from 0 to {num_groups - 1}"
        )
    weights = torch.ones_like(counts_C, dtype=torch.float64) if normalise == "classes" else counts_C.double()
    return torch.zeros(num_groups, dtype=torch.float64).index_add_(0, group_of_class.cpu(), weights.cpu())


def anchor_coefficients(sizes_G: Tensor) -> Tensor:
    """c_j = (G - 1) / |G^j|, float64 [G]: each group's anchor holds all other groups. Zero for a single group."""
    check_sizes(sizes_G)
    return (len(sizes_G) - 1) / sizes_G.double()


def critical_weight(lr: float, momentum: float, strength: float) -> float:
    """The largest A that descent draws to its anchor without passing it: lr * strength * A = (1 - sqrt(momentum))^2.

    That is critical damping of gap_t+1 = (1 + momentum - lr strength A) gap_t - momentum gap_t-1; beyond it the parameter
    swings around the anchor for 1 / (1 - momentum) steps and more, and from 2 (1 + momentum) on it diverges.
    """
    return (1 - momentum**0.5) ** 2 / max(lr * strength, 1e-12)


@torch.no_grad()
def stream_anchor(pairs: Iterable[tuple[Tensor, Tensor]], sizes_G: Tensor) -> Anchor:
    """Collapse anchors that come one at a time, as (theta*_j [D], F_j [D]) in group order; two float64 [D] are held, not G.

    T is a running weighted mean, T += (w / A)(theta* - T), in float64: nothing cancels however close the anchors are.
    """
    state: Tensor | None = None
    for (theta, fisher), coef in zip(pairs, anchor_coefficients(sizes_G).tolist(), strict=True):
        if state is None:
            state = torch.zeros(2, len(theta), dtype=torch.float64, device=theta.device)
        for total, mean, t, f in zip(*(x.split(BLOCK) for x in (state[0], state[1], theta, fisher)), strict=True):
            w = f.double() * coef
            total += w
            mean += torch.where(total > 0, w / total, 0.0) * (t.double() - mean)
    assert state is not None  # anchor_coefficients refuses an empty sizes_G
    return Anchor(state[0].float(), state[1].float())


def check_sizes(sizes_G: Tensor) -> None:
    """Raise ValueError unless every group has a class."""
    if sizes_G.ndim != 1 or not len(sizes_G) or bool((sizes_G <= 0).any()):
        raise ValueError(f"sizes_G must be positive with one size per group, got {sizes_G.tolist()}")
