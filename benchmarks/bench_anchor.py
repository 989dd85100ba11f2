"""anchor_penalty (forward and backward) and collapse_anchors against autograd on the double sum.

python benchmarks/bench_anchor.py [--sizes N ...] [--write]
pytest benchmarks/bench_anchor.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import op_bench
import pytest
import torch
from torch import Tensor

from ltfast.kernels import anchor_penalty, collapse_anchors

GROUPS = 4


def baseline(theta: Tensor, anchors: Tensor, fishers: Tensor, coef: Tensor) -> Tensor:
    """The double sum as a user would write it."""
    return 0.5 * (coef @ (fishers * (theta - anchors) ** 2).sum(1))


def with_gradient(penalty: Callable[..., Tensor], theta: Tensor, *rest: Tensor) -> Tensor:
    """Gradient of the penalty in theta."""
    return torch.autograd.grad(penalty(theta, *rest), theta)[0]


def collapse(anchors: Tensor, fishers: Tensor, coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The collapse in plain float32 torch."""
    weight = coef[:, None] * fishers
    total = weight.sum(0)
    target = torch.where(total > 0, (weight * anchors).sum(0) / total, 0.0)
    return total, target, (weight * (anchors - target) ** 2).sum()


def cases(n: int, device: str) -> Iterator[op_bench.Case]:
    """Penalty with its gradient, and the collapse, for four groups."""
    theta = torch.randn(n, device=device).requires_grad_()
    anchors, fishers = torch.randn(GROUPS, n, device=device), torch.rand(GROUPS, n, device=device)
    coef = torch.rand(GROUPS, device=device)
    arrays = (anchors, fishers, coef)
    compiled_penalty, compiled_collapse = op_bench.compiled(baseline), op_bench.compiled(collapse)
    yield op_bench.Case(
        f"penalty+gradient/G={GROUPS}",
        n,
        {
            "ltfast": lambda: with_gradient(anchor_penalty, theta, *arrays),
            "eager": lambda: with_gradient(baseline, theta, *arrays),
            "compiled": lambda: with_gradient(compiled_penalty, theta, *arrays),
        },
    )
    yield op_bench.Case(
        f"collapse/G={GROUPS}",
        n,
        {
            "ltfast": lambda: collapse_anchors(*arrays),
            "eager": lambda: collapse(*arrays),
            "compiled": lambda: compiled_collapse(*arrays),
        },
    )


@pytest.mark.parametrize("implementation", ["ltfast", "eager"])
def test_penalty_and_gradient(benchmark: Any, implementation: str) -> None:
    """pytest-benchmark entry point."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark(next(cases(op_bench.CPU_SIZES[0], device)).calls[implementation])


if __name__ == "__main__":
    op_bench.run("anchor", cases, __doc__)
