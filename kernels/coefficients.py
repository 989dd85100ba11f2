"""(Gram matrix, batch shares) -> ascent coefficients."""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import Number, check_small, count, number, split_number

DIRECTIONS = ("joint", "none", "orthogonal", "projected", "friendly")
AGGREGATES = ("uniform", "share")
OBJECTIVES = ("shared", "per_group")

# A group whose direction keeps less than this share of its squared norm has lost its digits to cancellation.
FALLBACK = 1e-6


class AscentStats(NamedTuple):
    """What a step logs, all on the device, float32; K directions (1 for "joint", else G). Zero for absent groups."""

    norm_sq: Tensor  # [K] |uh_k|^2, after the fallback
    radius: Tensor  # [K] rho_k before the clip
    clipped: Tensor  # [K] -1 at the lower bound, +1 at the upper, 0 inside (or fixed rho)
    fallback: Tensor  # [K] 1 where uh_k was replaced by u_k
    length_sq: Tensor  # |sum_j c_j u_j|^2: 0-d (shared) or [K] (per group); |eps / s|^2 of the perturbation
    ok: Tensor  # 0-d: 0 if the gradient is zero or not finite (then every coefficient is 0 and the step should be skipped)


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
    """The torch oracle in float64: D (K x R) holds the directions, uh = D u; returns (coefficients, stats [6, K])."""
    rows, groups = gram_PRR.shape[-1], shares_G.shape[0]
    present = shares_G > 0
    live = present.repeat(rows // groups)
    gram = torch.where(live[:, None] & live, gram_PRR.double().sum(0), 0.0)  # M
    w = torch.where(present, shares_G.double(), 0.0)
    plain = torch.eye(rows, dtype=torch.float64, device=gram.device)[:groups]  # D of "none": uh_k = u_k

    global_sq = w @ gram[:groups, :groups] @ w  # |u|^2
    p = torch.where(global_sq > 0, (gram[:groups, :groups] @ w) / global_sq, 0.0)  # <u_k, u> / <u, u>
    if direction == "joint":
        D = w[None]
    elif direction == "none":
        D = plain
    elif direction == "orthogonal":  # Eq. 12
        D = plain - p[:, None] * w
    elif direction == "projected":
        D = p[:, None] * w
    else:  # friendly: rows are u_1..u_G, m_1..m_G
        sigma_K1 = torch.as_tensor(sigma, dtype=torch.float64, device=gram.device).expand(groups)[:, None]
        D = plain - sigma_K1 * plain.roll(groups, 1)

    norm_sq = ((D @ gram) * D).sum(1)
    fallback = torch.zeros_like(norm_sq, dtype=torch.bool)
    if direction != "joint":
        single = groups == 1 and direction in ("orthogonal", "projected")
        fallback = present & ((norm_sq <= FALLBACK * gram.diagonal()[:groups]) | single)
        D = torch.where(fallback[:, None], plain, D)
        norm_sq = torch.where(fallback, gram.diagonal()[:groups], norm_sq)
        valid = present & (norm_sq > 0)
    else:
        valid = norm_sq > 0
    norm = norm_sq.clamp(min=0).sqrt()

    if rho is None:  # Eq. 13, and sqrt(d) of Eq. 15
        assert theta_sq_P is not None and counts_G is not None
        n = counts_G.double().sum()[None] if direction == "joint" else counts_G.double()
        theta_norm = theta_sq_P.double().sum().sqrt()
        radius = scale * (theta_norm / (2 * norm)).sqrt() * n_elements**-0.25 * (n.clamp(min=2) - 1) ** -0.25
        clipped = (radius > rho_max).double() - (radius < rho_min).double()
        intended = n_elements**0.5 * radius.clamp(min=torch.as_tensor(rho_min).to(radius)).clamp(
            max=torch.as_tensor(rho_max).to(radius)
        )
    else:
        radius = torch.zeros_like(norm) + rho
        clipped, intended = torch.zeros_like(norm), radius
    r = torch.where(valid, intended / norm, 0.0)

    coef = torch.where((r != 0)[:, None], r[:, None] * D, 0.0)  # [K, R]
    if objective == "shared":
        if direction == "joint":
            a = torch.ones_like(r)
        else:
            a = w / w.sum() if aggregate == "share" else present.double() / present.sum()
        coef = torch.where(present.any(), a, 0.0) @ coef
        length_sq = (coef @ gram @ coef).expand_as(r)
    else:
        length_sq = r * r * norm_sq
    ok = torch.isfinite(coef).all() & torch.isfinite(gram).all() & torch.isfinite(shares_G).all() & valid.any()
    stats = torch.stack((norm_sq, radius, clipped, fallback.double(), length_sq, torch.ones_like(r)))
    stats = torch.where(valid, stats, 0.0)
    stats[4], stats[5] = (length_sq, ok) if objective == "shared" else (torch.where(valid, length_sq, 0.0), ok)
    return torch.where(ok, coef, 0.0).float(), stats.float()


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
    sigma: Number | Tensor = 1.0,
    aggregate: str = "uniform",
    objective: str = "shared",
) -> tuple[Tensor, AscentStats]:
    """Coefficients of the gradient rows: [R] ("shared") or [K, R] ("per_group"), float32, and the step's statistics."""
    for name, value, known in (
        ("direction", direction, DIRECTIONS),
        ("aggregate", aggregate, AGGREGATES),
        ("objective", objective, OBJECTIVES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(known)}")
    partials = gram if gram.dim() == 3 else gram[None]
    rows = partials.shape[-1]
    device = gram.device
    groups = rows // 2 if direction == "friendly" else rows
    if shares_G is None:
        shares_G = torch.full((groups,), 1 / groups, device=device)
    check_small("shares_G", shares_G, groups, device)
    if rho is None:
        if theta_sq is None or counts_G is None:
            raise ValueError("the radius rule needs theta_sq and counts_G; pass them, or a fixed rho")
        check_small("counts_G", counts_G, groups, device)
        theta_sq = theta_sq.reshape(-1)
    fixed = None if rho is None else number(*split_number("rho", rho, device))
    if not (isinstance(sigma, Tensor) and sigma.numel() > 1):
        sigma = number(*split_number("sigma", sigma, device))
    count("ascent_coefficients", 1, [])
    with torch.no_grad():
        coef, stats = ascent_coefficients_reference(
            partials, theta_sq, shares_G, counts_G, n_elements, direction, fixed,
            number(*split_number("C", C, device)), number(*split_number("rho_min", rho_min, device)),
            number(*split_number("rho_max", rho_max, device)), sigma, aggregate, objective,
        )  # fmt: skip
    length_sq = stats[4, 0] if objective == "shared" else stats[4]
    return coef, AscentStats(stats[0], stats[1], stats[2], stats[3], length_sq, stats[5, 0])
