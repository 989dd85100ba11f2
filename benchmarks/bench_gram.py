"""gram: one read of the gradient rows against a matrix product of the rows (needs scaled copies when adaptive).

python benchmarks/bench_gram.py [--sizes N ...] [--write]
pytest benchmarks/bench_gram.py --benchmark-enable
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import op_bench
import pytest
import torch

from ltfast.kernels import gram

VARIANTS = [(1, torch.float32, False), (4, torch.float32, True), (4, torch.bfloat16, True), (8, torch.float32, False)]


def baseline(grads: torch.Tensor, theta: torch.Tensor, adaptive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a user would write: float32, matrix product by cuBLAS."""
    rows = grads.float() * theta.abs() if adaptive else grads.float()
    return rows @ rows.T, theta @ theta


def cases(n: int, device: str) -> Iterator[op_bench.Case]:
    """SAM, GSA (float32 and bfloat16 gradients), Friendly GSA."""
    compiled = op_bench.compiled(baseline)
    for rows, dtype, adaptive in VARIANTS:
        grads, theta = torch.randn(rows, n, device=device).to(dtype), torch.randn(n, device=device)
        name = f"R={rows}/{str(dtype).removeprefix('torch.')}{'/adaptive' if adaptive else ''}"
        calls = {
            "ltfast": lambda g=grads, t=theta, a=adaptive: gram(g, t, a),
            "eager": lambda g=grads, t=theta, a=adaptive: baseline(g, t, a),
            "compiled": lambda g=grads, t=theta, a=adaptive: compiled(g, t, a),
        }
        yield op_bench.Case(name, n, calls)


@pytest.mark.parametrize("implementation", ["ltfast", "eager"])
def test_gram_of_four_groups(benchmark: Any, implementation: str) -> None:
    """pytest-benchmark entry point."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = list(cases(op_bench.CPU_SIZES[0], device))[1]
    benchmark(case.calls[implementation])


if __name__ == "__main__":
    op_bench.run("gram", cases, __doc__)
