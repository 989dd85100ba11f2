"""perturb: theta + s^2 * (coef @ grads) in one pass, with and without the copy of theta that an ascent in place keeps.

python benchmarks/bench_perturb.py [--sizes N ...] [--write]
pytest benchmarks/bench_perturb.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import op_bench
import pytest
import torch
from torch import Tensor

from ltfast.kernels import perturb

# rows, dtype of gradients and output, adaptive, keep theta aside
VARIANTS = [
    (1, torch.float32, False, True),
    (4, torch.float32, True, False),
    (4, torch.float32, True, True),
    (4, torch.bfloat16, True, False),
]


def baseline(theta: Tensor, grads: Tensor, coef: Tensor, adaptive: bool, out: Tensor, keep: Tensor | None) -> None:
    """What a user would write: a matrix-vector product, then the elementwise rest."""
    step = coef @ grads.float()
    if keep is not None:
        keep.copy_(theta)
    out.copy_(theta + (theta * theta * step if adaptive else step))


def cases(n: int, device: str) -> Iterator[op_bench.Case]:
    """SAM in place, GSA, GSA in place, GSA with bfloat16 gradients and working copy."""
    compiled = op_bench.compiled(baseline)
    for rows, dtype, adaptive, keeps in VARIANTS:
        theta, grads = torch.randn(n, device=device), torch.randn(rows, n, device=device).to(dtype)
        coef, out = torch.full((rows,), 1e-3, device=device), torch.empty(n, dtype=dtype, device=device)
        keep = torch.empty_like(theta) if keeps else None
        args = (theta, grads, coef, adaptive, out, keep)
        name = f"R={rows}/{str(dtype).removeprefix('torch.')}{'/adaptive' * adaptive}{'/keep' * keeps}"
        calls = {
            "ltfast": lambda args=args: perturb(*args),
            "eager": lambda args=args: baseline(*args),
            "compiled": lambda args=args: compiled(*args),
        }
        yield op_bench.Case(name, n, calls)


@pytest.mark.parametrize("implementation", ["ltfast", "eager"])
def test_perturb_with_four_groups(benchmark: Any, implementation: str) -> None:
    """pytest-benchmark entry point."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = list(cases(op_bench.CPU_SIZES[0], device))[1]
    benchmark(case.calls[implementation])


if __name__ == "__main__":
    op_bench.run("perturb", cases, __doc__)
