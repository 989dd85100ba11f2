"""Loss surfaces over two directions: around a solution (filter-normalised), or in the plane through three solutions.

A direction is Gaussian, and each filter of it (a row along the first axis) has the norm of the weights' own filter;
vectors (biases, BatchNorm) stay fixed. Source: Li et al. 2018, "Visualizing the Loss Landscape of Neural Nets".
Grids are nested: every other line of a level is the level before, so that a surface stopped early is coarse, not cut off.
Legend: K losses, N parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

COARSEST = 5  # points per side of the first level; level l has 4 * 2**l + 1
MARGIN = 0.35  # around the three points of a plane, a share of their longer extent
LossAt = Callable[[float, float], Tensor]  # (x, y) -> K losses


@dataclass(frozen=True)
class Surface:
    """Losses [K, ny, nx] float64 over coordinates x [nx] and y [ny]."""

    x: Tensor
    y: Tensor
    values: Tensor

    @property
    def center(self) -> Tensor:
        """The losses [K] at the middle point."""
        return self.values[:, len(self.y) // 2, len(self.x) // 2]

    def rise(self, radius: float) -> Tensor:
        """Mean of loss - loss at the middle over the points between 0.75 and 1.25 times `radius` from it, [K]."""
        distance = torch.hypot(self.x[None, :], self.y[:, None]) / radius
        ring = (distance > 0.75) & (distance < 1.25)
        return self.values[:, ring].mean(1) - self.center


def side(level: int) -> int:
    """Points per side of a level."""
    return (COARSEST - 1) * 2**level + 1


def surface(
    loss_at: LossAt,
    x_range: tuple[float, float] = (-1.0, 1.0),
    y_range: tuple[float, float] = (-1.0, 1.0),
    *,
    levels: int = 3,
    stop: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
) -> Surface:
    """Evaluate `loss_at` on nested grids, coarse to fine; returns the finest that was completed.

    `stop()` is asked before each point, `tick()` called after it. Raises TimeoutError if it ends before the first level.
    """
    size = side(levels - 1)
    x, y = torch.linspace(*x_range, size, dtype=torch.float64), torch.linspace(*y_range, size, dtype=torch.float64)
    known: dict[tuple[int, int], Tensor] = {}
    done = -1
    for level in range(levels):
        stride = 2 ** (levels - 1 - level)
        for i in range(0, size, stride):
            for j in range(0, size, stride):
                if (i, j) in known:
                    continue
                if stop():
                    if done < 0:
                        raise TimeoutError("no level of the surface was completed")
                    return collect(known, x, y, 2 ** (levels - 1 - done))
                known[i, j] = loss_at(float(x[j]), float(y[i])).detach().double().cpu()
                tick()
        done = level
    return collect(known, x, y, 1)


def collect(known: dict[tuple[int, int], Tensor], x: Tensor, y: Tensor, stride: int) -> Surface:
    """The level of this stride as a Surface."""
    index = range(0, len(x), stride)
    values = torch.stack([torch.stack([known[i, j] for j in index]) for i in index])
    return Surface(x[::stride], y[::stride], values.permute(2, 0, 1).contiguous())


def filter_normalised(params: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """One random direction: tensors like `params`, each filter as long as its weights; zero for vectors and scalars."""
    direction = []
    for p in params:
        d = torch.randn(p.shape, generator=generator).to(p)
        if p.ndim < 2:
            direction.append(torch.zeros_like(p))
            continue
        d_rows, p_rows = d.flatten(1), p.detach().flatten(1)
        length = d_rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
        direction.append((d_rows / length * p_rows.norm(dim=1, keepdim=True)).view(p.shape))
    return direction


@contextmanager
def moved(params: Sequence[nn.Parameter]) -> Iterator[Callable[[Sequence[Tensor]], None]]:
    """Inside, `put(values)` writes into the parameters; afterwards they are what they were, bit for bit."""
    kept = [p.detach().clone() for p in params]

    def put(values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)

    try:
        yield put
    finally:
        put(kept)


def around(params: Sequence[nn.Parameter], losses: Callable[[], Tensor], seed: int = 0) -> LossAt:
    """(x, y) -> losses() at theta + x * d1 + y * d2 with two filter-normalised directions.

    `losses` evaluates the model as it stands, under no_grad; each call leaves theta as it was.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = [filter_normalised(params, generator) for _ in range(2)]
    origin = [p.detach().clone() for p in params]

    @torch.no_grad()
    def loss_at(x: float, y: float) -> Tensor:
        with moved(params) as put:
            put([o + x * a + y * b for o, a, b in zip(origin, *directions, strict=True)])
            return losses()

    return loss_at


@dataclass(frozen=True)
class Plane:
    """The plane through three points theta_0..theta_2 [N] of weight space, with orthonormal axes.

    Attributes:
        origin, first, second: theta_0 and the axes, [N]; points: the three in plane coordinates [3, 2], float64.
    """

    origin: Tensor
    first: Tensor
    second: Tensor
    points: Tensor

    @staticmethod
    def through(points: Sequence[Tensor]) -> Plane:
        """Raises ValueError if the three do not span a plane."""
        if len(points) != 3:
            raise ValueError(f"points: a plane goes through 3, got {len(points)}")
        origin, a, b = points[0], points[1] - points[0], points[2] - points[0]
        length = torch.linalg.vector_norm(a, dtype=torch.float64)
        first = (a / length).to(a) if length > 0 else a
        along = (b * first).sum(dtype=torch.float64)
        rest = b - along * first
        height = torch.linalg.vector_norm(rest, dtype=torch.float64)
        size = torch.linalg.vector_norm(b, dtype=torch.float64)
        if not (length > 1e-6 * (1 + size) and height > 1e-4 * torch.maximum(length, size)):
            raise ValueError("points: the three lie on one line")
        corners = torch.tensor([[0, 0], [float(length), 0], [float(along), float(height)]], dtype=torch.float64)
        return Plane(origin, first, (rest / height).to(a), corners)

    def at(self, x: float, y: float) -> Tensor:
        """Weights [N] at plane coordinates."""
        return self.origin + x * self.first + y * self.second

    def ranges(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Ranges of x and y around the three points, with a margin on each side."""
        low, high = self.points.amin(0), self.points.amax(0)
        pad = MARGIN * float((high - low).max())
        (x0, y0), (x1, y1) = (low - pad).tolist(), (high + pad).tolist()
        return (x0, x1), (y0, y1)
