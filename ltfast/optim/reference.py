"""Slow twins of the optimizers: the papers' equations on lists of tensors, one parameter after the other.

For tests and for reading; every function takes one whole step. `base` is a torch optimizer over all parameters, `params`
the perturbed ones. No flat buffer, no Gram matrix (mode R apart, which is defined by one), no kernel.
Sources: docs/method.md and the papers named there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Vector = list[Tensor]  # one tensor for each parameter
Closure = Callable[[], tuple[Tensor, Tensor]]
SMALL = 1e-6  # an orthogonal direction shorter than this share of u_k has lost its digits


def gradient(loss: Tensor, params: Sequence[Tensor]) -> Vector:
    """d loss / d params, zero where the loss does not depend on one."""
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(params, grads, strict=True)]


def dot(a: Vector, b: Vector) -> float:
    """<a, b>, in float64."""
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def combine(coefficients: Sequence[float], vectors: Sequence[Vector]) -> Vector:
    """sum_k c_k v_k."""
    return [sum(c * v for c, v in zip(coefficients, parts, strict=True)) for parts in zip(*vectors, strict=True)]


def scale_of(params: Sequence[Tensor], adaptive: bool) -> Vector:
    """s: |theta| (adaptive) or 1."""
    return [p.detach().abs() if adaptive else torch.ones_like(p) for p in params]


def times(a: Vector, b: Vector) -> Vector:
    """Elementwise product."""
    return [x * y for x, y in zip(a, b, strict=True)]


class Climb:
    """`with Climb(params, eps):` theta + eps inside, theta again afterwards."""

    def __init__(self, params: Sequence[Tensor], eps: Vector) -> None:
        self.params, self.eps = list(params), eps

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.params]
        for p, e in zip(self.params, self.eps, strict=True):
            p.add_(e)

    @torch.no_grad()
    def __exit__(self, *failure: object) -> None:
        for p, k in zip(self.params, self.kept, strict=True):
            p.copy_(k)


def sam_step(
    base: Optimizer, params: Sequence[Tensor], loss: Callable[[], Tensor], rho: float, adaptive: bool = False
) -> None:
    """SAM (Foret et al. 2021), ASAM (Kwon et al. 2021): eps = rho s^2 g / |s g|."""
    s = scale_of(params, adaptive)
    u = times(s, gradient(loss(), params))
    length = math.sqrt(dot(u, u))
    eps = [rho / length * x for x in times(s, u)] if length else [torch.zeros_like(p) for p in params]
    base.zero_grad()
    with Climb(params, eps):
        loss().backward()
    base.step()


def friendly_sam_step(
    base: Optimizer, params: Sequence[Tensor], loss: Callable[[], Tensor], averages: dict[str, Any], rho: float,
    sigma: float = 1.0, lmbda: float = 0.9, adaptive: bool = False,
) -> None:  # fmt: skip
    """Friendly-SAM (Li et al. 2024): climb along g - sigma m, the first time along g; m <- lmbda m + (1 - lmbda) g."""
    s, g = scale_of(params, adaptive), gradient(loss(), params)
    m = averages.get("m")
    u = times(s, g if m is None else combine((1.0, -sigma), (g, m)))
    averages["m"] = [x.clone() for x in g] if m is None else combine((lmbda, 1 - lmbda), (m, g))
    eps = [rho / math.sqrt(dot(u, u)) * x for x in times(s, u)]
    base.zero_grad()
    with Climb(params, eps):
        loss().backward()
    base.step()


def split_step(base: Optimizer, params: Sequence[Tensor], closure: Closure, rho: float, adaptive: bool = False) -> None:
    """ImbSAM (Zhou et al. 2023), Focal-SAM (Li et al. 2025): g = w_0 grad L_0(theta) + w_1 grad L_1(theta + eps),
    eps = rho s^2 g_1 / |s g_1|; without a part 1 in the batch there is no ascent."""
    losses, shares = closure()
    s = scale_of(params, adaptive)
    u = times(s, gradient(losses[1], params))
    length = math.sqrt(dot(u, u))
    base.zero_grad()
    (losses[0] * shares[0]).backward()
    with Climb(params, [rho / length * x if length else torch.zeros_like(x) for x in times(s, u)]):
        losses, shares = closure()
        (losses[1] * shares[1]).backward()
    base.step()


def radius(C: float, theta: float, direction: float, d: int, n: float, low: float, high: float) -> float:
    """Eq. 13."""
    rho = C * math.sqrt(theta / (2 * direction)) * d**-0.25 * (max(n, 2) - 1) ** -0.25
    return min(max(rho, low), high)


def directions(
    u: Sequence[Vector], w: Sequence[float], kind: str, averages: dict[str, Any], sigma: float
) -> list[Vector]:
    """uh_k of every group from u_k = s g_k, for groups in the batch (w_k > 0); zero for the others."""
    zero = [torch.zeros_like(x) for x in u[0]]
    total = combine([x if x > 0 else 0.0 for x in w], u)
    result = []
    for k, (u_k, w_k) in enumerate(zip(u, w, strict=True)):
        if w_k <= 0:
            result.append(zero)
            continue
        if kind == "none":
            uh = u_k
        elif kind == "friendly":
            m_k = averages.get("m", {}).get(k)
            uh = u_k if m_k is None else combine((1.0, -sigma), (u_k, m_k))
        else:  # Eq. 12, or what it takes away
            p = dot(u_k, total) / dot(total, total)
            uh = combine((1.0, -p), (u_k, total)) if kind == "orthogonal" else [p * x for x in total]
            if len(u) == 1 or dot(uh, uh) <= SMALL * dot(u_k, u_k):
                uh = u_k
        result.append(uh)
    return result


def gsa_step(
    base: Optimizer, params: Sequence[Tensor], closure: Closure, counts: Sequence[float], averages: dict[str, Any],
    direction: str = "orthogonal", objective: str = "shared", C: float = 0.1, rho_min: float = 2e-3,
    rho_max: float = 3e-3, adaptive: bool = True, aggregate: str = "uniform", sigma: float = 1.0, lmbda: float = 0.9,
) -> None:  # fmt: skip
    """GSA (Chen et al. 2026), Eq. 12-15, every group's gradient exact; CC-SAM (Zhou et al. 2023) with direction "none",
    objective "per_group" and the classifier's parameters. Moving averages are of g, as in Friendly-SAM."""
    losses, shares = closure()
    w, d = shares.tolist(), sum(p.numel() for p in params)
    s = scale_of(params, adaptive)
    g = [gradient(loss, params) for loss in losses]
    means = averages.get("m", {})
    scaled = {"m": {k: times(s, m) for k, m in means.items()}}
    uh = directions([times(s, g_k) for g_k in g], w, direction, scaled, sigma)
    if direction == "friendly":
        fresh = {
            k: combine((lmbda, 1 - lmbda), (means[k], g[k])) if k in means else g[k] for k in range(len(w)) if w[k] > 0
        }
        averages["m"] = {**means, **fresh}
    theta = math.sqrt(dot([p.detach() for p in params], [p.detach() for p in params]))
    present = [k for k in range(len(w)) if w[k] > 0]
    eps = {}
    for k in present:  # Eq. 13, 15
        length = math.sqrt(dot(uh[k], uh[k]))
        r = math.sqrt(d) * radius(C, theta, length, d, counts[k], rho_min, rho_max) / length
        eps[k] = [r * x for x in times(s, uh[k])]
    base.zero_grad()
    if objective == "shared":
        a = {k: w[k] if aggregate == "share" else 1 / len(present) for k in present}
        norm = sum(a.values())
        with Climb(params, combine([a[k] / norm for k in present], [eps[k] for k in present])):
            losses, shares = closure()
            (losses * shares).sum().backward()
    else:
        for k in present:
            with Climb(params, eps[k]):
                losses, shares = closure()
                (losses[k] * shares[k]).backward()
    base.step()


def gsa_remember(memory: list[list[float]] | None, matrix: list[list[float]], ema: float) -> list[list[float]]:
    """Mode R's memory after a renewal: norms averaged in the logarithm, cosines as they are (all groups present)."""
    if memory is None:
        return matrix
    g, halves = range(len(matrix)), (memory, matrix)
    old, new = ([math.sqrt(m[k][k]) for k in g] for m in halves)
    norms = [old[k] ** ema * new[k] ** (1 - ema) for k in g]
    return [
        [norms[i] * norms[j] * (ema * memory[i][j] / (old[i] * old[j]) + (1 - ema) * matrix[i][j] / (new[i] * new[j]))
         for j in g]
        for i in g
    ]  # fmt: skip


def gsa_stale_coefficients(
    memory: list[list[float]], theta: float, shares: Sequence[float], counts: Sequence[float], d: int, C: float = 0.1,
    rho_min: float = 2e-3, rho_max: float = 3e-3,
) -> tuple[list[float], float]:  # fmt: skip
    """Mode R, orthogonal and shared: c_j of a remembered Gram matrix (all groups present) and the norm they intend."""
    M, g = memory, range(len(shares))
    Mw = [sum(M[i][j] * shares[j] for j in g) for i in g]
    wMw = sum(shares[i] * Mw[i] for i in g)
    p = [Mw[k] / wMw for k in g]
    lengths = [math.sqrt(M[k][k] - Mw[k] ** 2 / wMw) for k in g]
    r = [math.sqrt(d) * radius(C, theta, lengths[k], d, counts[k], rho_min, rho_max) / lengths[k] for k in g]
    mean = sum(r[k] * p[k] for k in g) / len(r)
    c = [r[j] / len(r) - shares[j] * mean for j in g]
    return c, math.sqrt(sum(c[i] * M[i][j] * c[j] for i in g for j in g))


def gsa_stale_step(
    base: Optimizer, params: Sequence[Tensor], closure: Closure, coefficients: Sequence[float], intended: float,
    adaptive: bool = True, fresh: Sequence[Tensor] = (), rest: float = 0.0,
) -> None:  # fmt: skip
    """Mode R between refreshes: ONE gradient, of sum_j c_j L_j, stretched to the intended norm.

    fresh: parameters whose part of the Gram matrix was this batch's own; the others' part of the gradient is first damped
    to the norm `rest` that was expected of it, if it is longer."""
    losses, _ = closure()
    s = scale_of(params, adaptive)
    u = times(s, gradient(sum(c * loss for c, loss in zip(coefficients, losses, strict=True)), params))
    if fresh:
        own = [any(p is q for q in fresh) for p in params]
        remembered = [x for x, known in zip(u, own, strict=True) if not known]
        damping = min(1.0, rest / math.sqrt(dot(remembered, remembered)))
        u = [x if known else damping * x for x, known in zip(u, own, strict=True)]
    eps = [intended / math.sqrt(dot(u, u)) * x for x in times(s, u)]
    base.zero_grad()
    with Climb(params, eps):
        losses, shares = closure()
        (losses * shares).sum().backward()
    base.step()
