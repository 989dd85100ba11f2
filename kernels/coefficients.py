"""Coefficients of the gradient rows: from (M, |theta|^2, batch shares, class counts) to one ascent, all on the device.

With u_k = s g_k, u = sum_k w_k u_k, p_k = (M w)_k / (w' M w) and D (K x R) the directions in terms of the rows,
    joint       uh = u                    one direction: SAM and ASAM (G = 1), or the batch gradient of G groups
    none        uh_k = u_k                each group its own: CC-SAM, ImbSAM
    orthogonal  uh_k = u_k - p_k u        GSA, Eq. 12
    projected   uh_k = p_k u              ablation: what Eq. 12 removes
    friendly    uh_k = u_k - sigma_k s m_k   Friendly-SAM and the release of GSA; rows g_1..g_G and their averages m_1..m_G
    |uh_k|^2 = (D M D')_kk
    r_k  = rho / |uh_k|    or, Eq. 13 and 15,
           sqrt(d) clip(C sqrt(|theta| / (2 |uh_k|)) d^(-1/4) (n_k - 1)^(-1/4), rho_min, rho_max) / |uh_k|
    c_kj = r_k D_kj  (per group)    or    c_j = sum_k a_k r_k D_kj,  a = w / sum w ("share") or 1 / #present ("uniform")
so that eps = s^2 * sum_j c_j g_j.

Shapes: M [R, R] or partials [P, R, R]; shares, counts [G]; coefficients [R] or [K, R], float32; stats [7, K], float32.
Accumulation: float64 throughout. Mutates nothing. One program: the partials are some tens of kilobytes, the rest is
in registers; nothing of size N is touched.
Edge cases: |uh_k|^2 <= 1e-6 M_kk (or G = 1, where Eq. 12 removes everything) falls back to u_k; a group with w_k = 0
contributes nothing whatever its row holds; a zero or non-finite gradient gives coefficients 0 and ok = 0. A shared sum that
cancels, |sum_k a_k r_k uh_k|^2 <= 1e-6 (sum_k a_k r_k |uh_k|)^2, is rounding and no direction: coefficients 0, length 0, ok
= 1, so the step is a plain one. Two groups of one radius always cancel under Eq. 12: uh_1 and uh_2 are exactly opposite.
Source: arXiv 2603.21217, Eq. 12-15; the radius rule is CC-SAM's.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .coefficients_kernel import MAX_REGISTERS, PARTIAL_ELEMENTS, WARPS, _coefficients_kernel
from .common import MAX_ROWS, Number, check_small, count, launch, next_power_of_2, number, split_number, use_kernel
from .gram import SMALL_ROWS, gram_reduce
from .register import op

DIRECTIONS = ("joint", "none", "orthogonal", "projected", "friendly")
AGGREGATES = ("uniform", "share")
OBJECTIVES = ("shared", "per_group")

# A direction, or a sum of them, that keeps less than this share of its squared norm has lost its digits to cancellation.
FALLBACK = 1e-6


class AscentStats(NamedTuple):
    """What a step logs, all on the device, float32; K directions (1 for "joint", else G). Zero for absent groups."""

    norm_sq: Tensor  # [K] |uh_k|^2, after the fallback
    radius: Tensor  # [K] rho_k before the clip
    clipped: Tensor  # [K] -1 at the lower bound, +1 at the upper, 0 inside (or fixed rho)
    fallback: Tensor  # [K] 1 where uh_k was replaced by u_k
    length_sq: Tensor  # |sum_j c_j u_j|^2: 0-d (shared) or [K] (per group); |eps / s|^2 of the perturbation
    ok: Tensor  # 0-d: 0 if the gradient is zero or not finite: every coefficient is 0
    bad: Tensor  # 0-d: 1 if the gradient is not finite; the update takes it as its found_inf


class _Directions(NamedTuple):
    """uh = D u, float64: D [K, R], |uh_k|^2, which of them became u_k, and which there are."""

    D: Tensor
    norm_sq: Tensor
    fallback: Tensor
    valid: Tensor


def _directions(gram: Tensor, w: Tensor, direction: str, sigma: float | Tensor) -> _Directions:
    """Eq. 12 and its relatives from M [R, R] and the shares w [G], 0 for an absent group."""
    groups, diagonal = len(w), gram.diagonal()[: len(w)]
    own = torch.eye(len(gram), dtype=torch.float64, device=gram.device)[:groups]  # D of uh_k = u_k
    if direction == "joint":
        D = w[None]
        norm_sq = ((D @ gram) * D).sum(1)
        return _Directions(D, norm_sq, torch.zeros_like(norm_sq, dtype=torch.bool), norm_sq > 0)

    global_sq = w @ gram[:groups, :groups] @ w  # |u|^2
    p = torch.where(global_sq > 0, (gram[:groups, :groups] @ w) / global_sq, 0.0)  # <u_k, u> / <u, u>
    if direction == "none":
        D = own
    elif direction == "orthogonal":  # Eq. 12
        D = own - p[:, None] * w
    elif direction == "projected":
        D = p[:, None] * w
    else:  # friendly: the rows are gradients g_1..g_G, then their averages m_1..m_G
        sigma_K1 = torch.as_tensor(sigma, dtype=torch.float64, device=gram.device).expand(groups)[:, None]
        D = own - sigma_K1 * own.roll(groups, 1)
    norm_sq = ((D @ gram) * D).sum(1)
    single = groups == 1 and direction in ("orthogonal", "projected")
    fallback = (w > 0) & ((norm_sq <= FALLBACK * diagonal) | single)
    norm_sq = torch.where(fallback, diagonal, norm_sq)
    return _Directions(torch.where(fallback[:, None], own, D), norm_sq, fallback, (w > 0) & (norm_sq > 0))


def _radii(
    norm: Tensor,
    theta_norm: Tensor,
    n: Tensor,
    n_elements: int,
    scale: float | Tensor,
    low: float | Tensor,
    high: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 13, and sqrt(d) of Eq. 15: (radius before the clip, which bound it met, length that is meant) of directions of
    length `norm` whose groups hold n images."""
    radius = scale * (theta_norm / (2 * norm)).sqrt() * n_elements**-0.25 * (n.clamp(min=2) - 1) ** -0.25
    clipped = (radius > high).double() - (radius < low).double()
    low, high = (torch.as_tensor(bound).to(radius) for bound in (low, high))
    return radius, clipped, n_elements**0.5 * radius.clamp(min=low).clamp(max=high)


def ascent_coefficients_reference(
    gram_PRR: Tensor,
    theta_sq_P: Tensor | None,
    shares_G: Tensor,
    counts_G: Tensor | None,
    n_elements: int,
    direction: str,
    rho: float | Tensor | None,
    scale: float | Tensor,
    rho_min: float | Tensor,
    rho_max: float | Tensor,
    sigma: float | Tensor,
    aggregate: str,
    objective: str,
) -> tuple[Tensor, Tensor]:
    """The torch oracle in float64: directions, their lengths, and what is made of them; (coefficients, stats [7, K])."""
    present = shares_G > 0
    live = present.repeat(gram_PRR.shape[-1] // len(shares_G))
    gram = torch.where(live[:, None] & live, gram_PRR.double().sum(0), 0.0)  # M
    w = torch.where(present, shares_G.double(), 0.0)
    D, norm_sq, fallback, valid = _directions(gram, w, direction, sigma)
    norm = norm_sq.clamp(min=0).sqrt()
    if rho is None:
        assert theta_sq_P is not None
        assert counts_G is not None
        n = counts_G.double().sum()[None] if direction == "joint" else counts_G.double()
        theta_norm = theta_sq_P.double().sum().sqrt()
        radius, clipped, intended = _radii(norm, theta_norm, n, n_elements, scale, rho_min, rho_max)
    else:
        radius = intended = torch.zeros_like(norm) + rho
        clipped = torch.zeros_like(norm)

    r = torch.where(valid, intended / norm, 0.0)
    coef = torch.where((r != 0)[:, None], r[:, None] * D, 0.0)  # [K, R]
    length_sq = torch.where(valid, r * r * norm_sq, 0.0)
    if objective == "shared":
        a = torch.ones_like(r)
        if direction != "joint":
            a = w / w.sum() if aggregate == "share" else present.double() / present.sum()
        coef = torch.where(present.any(), a, 0.0) @ coef
        total = coef @ gram @ coef
        if direction != "joint":
            vanishes = total <= FALLBACK * (a * torch.where(valid, intended, 0.0)).sum() ** 2
            coef, total = torch.where(vanishes, 0.0, coef), torch.where(vanishes, 0.0, total)
        length_sq = total.expand_as(r)

    coef = coef.float()
    finite = torch.isfinite(coef).all() & torch.isfinite(gram).all() & torch.isfinite(shares_G).all()
    ok = finite & valid.any()
    found = torch.where(valid, torch.stack((norm_sq, radius, clipped, fallback.double())), 0.0)
    flags = torch.stack((ok, ~finite)).double()[:, None].expand(2, len(r))
    return torch.where(ok, coef, 0.0), torch.cat((found, length_sq[None], flags)).float()


def _one_row(gram_PRR: Tensor, rho: float, objective: str) -> tuple[Tensor, Tensor]:
    """SAM on a CPU, rho / |u|: one number in Python, a twenty-fifth of the time of the oracle's forty tensors of one element."""
    norm_sq = float(gram_PRR.sum())
    finite, valid = math.isfinite(norm_sq), norm_sq > 0
    coef = torch.tensor(rho / norm_sq**0.5 if finite and valid else 0.0, dtype=torch.float32)
    stats = [norm_sq, rho, 0.0, 0.0, rho * rho] if valid else [0.0] * 5
    stats += [float(finite and valid), float(not finite)]
    return coef.reshape((1,) if objective == "shared" else (1, 1)), torch.tensor(stats, dtype=torch.float32)[:, None]


@op()
def _ascent_coefficients(
    gram_PRR: Tensor, theta_sq_P: Tensor | None, shares_G: Tensor | None, counts_G: Tensor | None, n_elements: int,
    direction: str, rule: bool, rho: float, rho_t: Tensor | None, scale: float, scale_t: Tensor | None,
    rho_min: float, rho_min_t: Tensor | None, rho_max: float, rho_max_t: Tensor | None, sigma: float,
    sigma_t: Tensor | None, aggregate: str, objective: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`X` and `X_t` are one number: on the host, or (not None) on the device."""
    programs, rows, _ = gram_PRR.shape
    groups = rows // 2 if direction == "friendly" else rows
    if programs > 1 and rows > SMALL_ROWS:  # too much for one program: a launch of its own
        theta_in = gram_PRR.new_zeros((programs,)) if theta_sq_P is None else theta_sq_P
        reduced, theta_sq = gram_reduce(gram_PRR, theta_in)
        gram_PRR, theta_sq_P, programs = reduced[None], theta_sq.reshape(1), 1
    absent = MAX_ROWS - groups if 32 < groups < MAX_ROWS else 0  # see MAX_REGISTERS in coefficients_kernel.py
    count("ascent_coefficients", 9 if absent else 1, [])
    if not use_kernel(gram_PRR, float64_too=True):
        if gram_PRR.device.type == "cpu" and rows == 1 and direction == "joint" and shares_G is None and not rule:
            return _one_row(gram_PRR, float(number(rho, rho_t)), objective)
        shares = gram_PRR.new_full((groups,), 1 / groups) if shares_G is None else shares_G
        sigma_K = sigma if sigma_t is None else sigma_t.reshape(-1)
        return ascent_coefficients_reference(
            gram_PRR, theta_sq_P, shares, counts_G, n_elements, direction, number(rho, rho_t) if not rule else None,
            number(scale, scale_t), number(rho_min, rho_min_t), number(rho_max, rho_max_t), sigma_K, aggregate,
            objective,
        )  # fmt: skip
    if absent:
        shares_G = gram_PRR.new_full((groups,), 1 / groups) if shares_G is None else shares_G
        gram_PRR, shares_G = F.pad(gram_PRR, (0, absent, 0, absent)), F.pad(shares_G, (0, absent))
        counts_G = None if counts_G is None else F.pad(counts_G, (0, absent))
        rows = groups = MAX_ROWS
    coef, stats = _empty_result(gram_PRR, direction, objective)
    padded = next_power_of_2(groups)
    launch(
        _coefficients_kernel, (1,), gram_PRR.device, gram_PRR, theta_sq_P, shares_G, counts_G, coef, stats, programs,
        n_elements**0.5, rho_t, rho, scale_t, scale, rho_min_t, rho_min, rho_max_t, rho_max, sigma_t, sigma,
        SIGMA_STRIDE=0 if sigma_t is None or sigma_t.numel() == 1 else 1, R=rows, G=groups, GROUPS=padded,
        K=stats.shape[1], PARTS=max(1, min(1024, PARTIAL_ELEMENTS // padded**2, next_power_of_2(programs))),
        DIRECTION=direction, RULE=rule, UNIFORM=aggregate == "uniform", SHARED=objective == "shared",
        FALLBACK=FALLBACK, num_warps=WARPS, maxnreg=MAX_REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip
    if absent:
        kept = MAX_ROWS - absent
        coef, stats = (coef[:kept] if coef.dim() == 1 else coef[:kept, :kept]).clone(), stats[:, :kept].clone()
    return coef, stats


def _empty_result(gram_PRR: Tensor, direction: str, objective: str) -> tuple[Tensor, Tensor]:
    rows = gram_PRR.shape[-1]
    directions = 1 if direction == "joint" else rows // 2 if direction == "friendly" else rows
    shape = (rows,) if objective == "shared" else (directions, rows)
    return (
        gram_PRR.new_empty(shape, dtype=torch.float32),
        gram_PRR.new_empty((7, directions), dtype=torch.float32),
    )


@torch.library.register_fake("ltfast::ascent_coefficients")
def _(gram_PRR, theta_sq_P, shares_G, counts_G, n_elements, direction, *rest):
    return _empty_result(gram_PRR, direction, rest[-1])


def _check_gram(gram: Tensor, theta_sq: Tensor | None, direction: str) -> tuple[Tensor, Tensor | None, int]:
    """([P, R, R], [P] or None, number of groups)."""
    if not isinstance(gram, Tensor) or gram.dim() not in (2, 3) or gram.shape[-1] != gram.shape[-2]:
        raise ValueError("gram must be a tensor [R, R], or [P, R, R] from gram_partials")
    partials = (gram if gram.dim() == 3 else gram[None]).contiguous()
    programs, rows, _ = partials.shape
    if direction == "friendly" and rows % 2:
        raise ValueError(f"gram has {rows} rows; direction 'friendly' needs g_1..g_G, m_1..m_G")
    groups = rows // 2 if direction == "friendly" else rows
    if not 1 <= rows <= MAX_ROWS or not programs:
        raise ValueError(f"gram has shape {tuple(gram.shape)}; 1 to {MAX_ROWS} rows are supported")
    if partials.dtype != torch.float64:
        raise ValueError(f"gram is {partials.dtype}; it must be float64, as gram and gram_partials give it")
    if theta_sq is not None:
        fits = isinstance(theta_sq, Tensor) and theta_sq.numel() == programs and theta_sq.dtype == torch.float64
        if not fits or theta_sq.device != gram.device:
            raise ValueError(f"theta_sq must hold {programs} float64 on {gram.device}, as it came with gram")
        theta_sq = theta_sq.reshape(-1)
    return partials, theta_sq, groups


@torch.no_grad()
def ascent_coefficients(
    gram: Tensor,
    theta_sq: Tensor | None,
    shares_G: Tensor | None,
    counts_G: Tensor | None,
    n_elements: int,
    *,
    direction: str = "orthogonal",
    rho: Number | None = None,
    C: Number = 0.1,
    rho_min: Number = 2e-3,
    rho_max: Number = 3e-3,
    sigma: Number = 1.0,
    aggregate: str = "uniform",
    objective: str = "shared",
) -> tuple[Tensor, AscentStats]:
    """Coefficients c of the gradient rows (eps = s^2 * c @ grads) and the step's statistics; one launch.

    Args:
        gram, theta_sq: what `gram_partials` or `gram` returned (for adaptive steps with adaptive=True); theta_sq may be
            None with a fixed rho.
        shares_G: [G] shares w of the groups in the batch, 0 for an absent group; None: 1 / G each.
        counts_G: [G] training images n_k of each group (the rule only).
        n_elements: d, number of perturbed parameters (without padding).
        direction: "joint", "none", "orthogonal", "projected" or "friendly" (then gram has 2 G rows), see the module.
        rho: fixed radius |eps_k / s|; None: the rule of Eq. 13 with C, rho_min and rho_max, times sqrt(d).
        C, rho_min, rho_max, rho: number or one-element device tensor.
        sigma: weight of the moving average: number, one-element or [G] device tensor ("friendly").
        aggregate: "uniform" over the groups present, or "share" (shared objective only).
        objective: "shared": one perturbation, [R]; "per_group": one each, [K, R].

    Returns:
        Coefficients, float32, and AscentStats.

    Raises:
        ValueError: a bad argument, by name.
    """
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("aggregate", aggregate, AGGREGATES),
        ("objective", objective, OBJECTIVES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    partials, theta_sq, groups = _check_gram(gram, theta_sq, direction)
    device = gram.device
    if n_elements < 1:
        raise ValueError(f"n_elements is {n_elements}; it must be at least 1, the number of perturbed parameters")
    if shares_G is not None:
        check_small("shares_G", shares_G, groups, device)
    if rho is None:
        if theta_sq is None or counts_G is None:
            raise ValueError("the radius rule needs theta_sq and counts_G; pass both, or a fixed rho")
        check_small("counts_G", counts_G, groups, device)
    if isinstance(sigma, Tensor) and sigma.numel() > 1:
        sigma_pair = (0.0, check_small("sigma", sigma, groups, device))
    else:
        sigma_pair = split_number("sigma", sigma, device)
    coef, stats = _ascent_coefficients(
        partials, theta_sq, shares_G, counts_G, n_elements, direction, rho is None,
        *split_number("rho", 0.0 if rho is None else rho, device), *split_number("C", C, device),
        *split_number("rho_min", rho_min, device), *split_number("rho_max", rho_max, device), *sigma_pair,
        aggregate, objective,
    )  # fmt: skip
    length_sq = stats[4, 0] if objective == "shared" else stats[4]
    return coef, AscentStats(stats[0], stats[1], stats[2], stats[3], length_sq, stats[5, 0], stats[6, 0])
