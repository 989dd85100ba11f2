"""Hessian spectrum of a loss by stochastic Lanczos quadrature: density, largest eigenvalue, trace.

    v'f(H)v = sum_i tau_i f(theta_i),  theta_i, tau_i: Ritz values and squared first components of T = Q'HQ (m Lanczos steps)
    density(t) = mean over random v of sum_i tau_i N(t; theta_i, sigma^2),   tr H = N * mean over v of sum_i tau_i theta_i

A quadrature of m steps is exact for polynomials of degree 2m - 1. Vectors are orthogonalised against all earlier ones,
twice: without that, Lanczos finds copies of converged eigenvalues and the density is wrong.
Sources: Golub and Welsch 1969; Ghorbani, Krishnan, Xiao 2019 (arXiv 1901.10159). Legend: N parameters, m steps, P probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltfast.modes import evaluating

MatVec = Callable[[Tensor], Tensor]
TRACE_LEAST = 8  # probes: the spread of fewer says too little about the error of their mean
# Beta below this share of the spectrum's size: the Krylov space is complete (float32 rounding is 6e-8).
BREAKDOWN = 1e-7


def hessian_product(
    model: nn.Module,
    params: Sequence[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Sequence[tuple[Tensor, Tensor]],
) -> MatVec:
    """v [N] -> H v [N], H the Hessian of the mean of `loss` over all samples of `batches`; N as in `flatten(params)`.

    loss: (logits, labels) -> loss of each sample [B]. The model runs in eval mode (BatchNorm on its running statistics,
    so samples do not mix); modes are kept. Double backward, one batch in memory at a time.
    """

    def product(vector: Tensor) -> Tensor:
        parts = unflatten(vector, params)
        total = torch.zeros_like(vector)
        count = 0
        with evaluating(model), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            for images, labels in batches:
                value = loss(model(images), labels).sum()
                grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True)
                terms = [(g * v).sum() for g, v in zip(grads, parts, strict=True) if g is not None]
                second = torch.autograd.grad(torch.stack(terms).sum(), params, allow_unused=True)
                total += flatten([torch.zeros_like(p) if s is None else s for s, p in zip(second, params, strict=True)])
                count += len(labels)
        return total / count

    return product


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All elements one after another, [N]."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `vector` [N] shaped as `like`."""
    parts = vector.split([t.numel() for t in like])
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


class Quadrature(NamedTuple):
    """Float64 [m]: nodes (Ritz values, increasing), weights (they sum to 1) and residuals: each node lies within its
    residual of an eigenvalue of the matrix that `matvec` multiplies by, if it does so exactly. first: v'Hv / v'v; vector:
    the unit Ritz vector [N] of the largest node."""

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    first: float
    vector: Tensor


@torch.no_grad()
def lanczos(matvec: MatVec, start: Tensor, steps: int, stop: Callable[[], bool] = lambda: False) -> Quadrature:
    """At most `steps` Lanczos steps from `start` [N] (at least one), fewer if `stop()` or the space is complete."""
    size = start.numel()
    steps = min(steps, size)
    basis = torch.empty(steps, size, dtype=start.dtype, device=start.device)
    alphas: list[float] = []
    betas: list[float] = []
    basis[0] = start / norm(start)
    for j in range(steps):
        with torch.enable_grad():
            w = matvec(basis[j])
        alphas.append(dot(w, basis[j]))
        for _ in range(2):
            w = w - basis[: j + 1].T @ (basis[: j + 1] @ w)
        betas.append(norm(w))
        scale = max(map(abs, [*alphas, *betas]))
        if j + 1 == steps or betas[-1] <= BREAKDOWN * scale or stop():
            break
        basis[j + 1] = w / betas[-1]
    m = len(alphas)
    off = torch.tensor(betas[: m - 1], dtype=torch.float64)
    matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    rounding = torch.finfo(start.dtype).eps * scale
    top = basis[:m].T @ vectors[:, -1].to(basis)
    return Quadrature(nodes, vectors[0].square(), betas[-1] * vectors[-1].abs() + rounding, alphas[0], top)


def residual(matvec: MatVec, vector: Tensor) -> tuple[float, float]:
    """(v'Hv / v'v, error): an eigenvalue of H lies within `error` of it, however v [N] was found."""
    v = vector / norm(vector)
    w = matvec(v)
    value = dot(w, v)
    return value, norm(w - value * v)


def norm(v: Tensor) -> float:
    """Euclidean norm, accumulated in float64."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product, accumulated in float64."""
    return float((a * b).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` found.

    Attributes:
        size: N. quadratures: one a Lanczos probe. quadratic_forms: v'Hv / N of all probes, also of those for the trace only.
    """

    size: int
    quadratures: tuple[Quadrature, ...]
    quadratic_forms: tuple[float, ...]

    @property
    def top(self) -> tuple[float, float]:
        """(lambda_max, error): the largest Ritz value over the probes; with exact products an eigenvalue lies within `error`
        of it, and no Ritz value exceeds the true maximum. Rounding of float32 losses may exceed it: see `residual`."""
        return float(self.best.nodes[-1]), float(self.best.residuals[-1])

    @property
    def best(self) -> Quadrature:
        """The probe with the largest Ritz value."""
        return max(self.quadratures, key=lambda q: float(q.nodes[-1]))

    @property
    def bottom(self) -> tuple[float, float]:
        """(lambda_min, error), as `top`."""
        best = min(self.quadratures, key=lambda q: float(q.nodes[0]))
        return float(best.nodes[0]), float(best.residuals[0])

    @property
    def trace(self) -> tuple[float, float]:
        """(trace, standard error over the probes; NaN for fewer than TRACE_LEAST)."""
        forms = torch.tensor(self.quadratic_forms, dtype=torch.float64) * self.size
        known = len(forms) >= TRACE_LEAST
        return float(forms.mean()), float(forms.std() / len(forms) ** 0.5) if known else float("nan")

    def density(self, grid: Tensor, sigma: float) -> Tensor:
        """Density of the eigenvalues on `grid` (integral 1), smoothed by a Gaussian of width `sigma`; float64."""
        t = grid.double()[:, None]
        total = torch.zeros(len(grid), dtype=torch.float64)
        for q in self.quadratures:
            bumps = torch.exp(-0.5 * ((t - q.nodes) / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)
            total += bumps @ q.weights
        return total / len(self.quadratures)

    def moment(self, k: int) -> float:
        """mean over the probes of v'H^k v / v'v: an estimate of tr(H^k) / N, exact per probe for k < 2m."""
        return sum(float(q.weights @ q.nodes**k) for q in self.quadratures) / len(self.quadratures)


def spectrum(
    matvec: MatVec,
    like: Tensor,
    *,
    probes: int = 2,
    steps: int = 30,
    trace_probes: int = 0,
    stop: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
) -> Spectrum:
    """Lanczos quadratures from `probes` random sign vectors, then `trace_probes` more products for the trace alone.

    like: any vector [N] of the right dtype and device. `stop()` ends it early, after at least one step of one probe;
    `tick()` is called after every product.
    """
    generator = torch.Generator().manual_seed(0)

    def counted(v: Tensor) -> Tensor:
        result = matvec(v)
        tick()
        return result

    def signs() -> Tensor:
        return (torch.randint(2, (like.numel(),), generator=generator) * 2 - 1).to(like)

    quadratures = [lanczos(counted, signs(), steps, stop)]
    forms = [quadratures[0].first]
    while len(forms) < probes and not stop():
        found = lanczos(counted, signs(), steps, stop)
        forms.append(found.first)
        if len(found.nodes) >= len(quadratures[0].nodes) or not stop():  # else broken off: good for the trace alone
            quadratures.append(found)
    for _ in range(trace_probes):
        if stop():
            break
        v = signs()
        forms.append(dot(v, counted(v)) / like.numel())
    return Spectrum(like.numel(), tuple(quadratures), tuple(forms))
