"""sgd_step and adamw_step against torch.optim (foreach and fused, 161 tensors as ResNet-50 has) and the compiled oracle.

python benchmarks/bench_step.py [--sizes N ...] [--write]
pytest benchmarks/bench_step.py --benchmark-enable
The anchor of method GKP costs torch.optim two more operators a tensor; ours adds two reads to the one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import op_bench
import pytest
import torch
from torch import Tensor

from ltfast.kernels import adamw_step, sgd_step

TENSORS = 161
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"lr": 1e-3, "weight_decay": 1e-2}
STRENGTH = 0.1


def torch_step(kind: Any, n: int, device: str, anchored: bool, **options: Any) -> Callable[[], None]:
    """torch.optim's step on n parameters in 161 tensors."""
    sizes = [n // TENSORS + (i < n % TENSORS) for i in range(TENSORS)]
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    weights, targets = [torch.rand_like(p) for p in params], [torch.randn_like(p) for p in params]
    optimizer = kind(params, **options)

    def step() -> None:
        if anchored:
            gaps = torch._foreach_sub([p.detach() for p in params], targets)
            torch._foreach_addcmul_([p.grad for p in params], gaps, weights, value=STRENGTH)
        optimizer.step()

    return step


def sgd_by_hand(theta: Tensor, grad: Tensor, buf: Tensor, anchor: tuple | None) -> None:
    """The rule in plain torch, for torch.compile."""
    d = grad + SGD["weight_decay"] * theta
    if anchor is not None:
        d = d + STRENGTH * anchor[0] * (theta - anchor[1])
    buf.mul_(SGD["momentum"]).add_(d)
    theta.sub_(SGD["lr"] * buf)


def cases(n: int, device: str) -> Iterator[op_bench.Case]:
    """SGD with momentum, the same with the GKP anchor, AdamW."""
    theta, grad, m, weight, target = (torch.randn(n, device=device) for _ in range(5))
    v = torch.rand(n, device=device)
    compiled = op_bench.compiled(sgd_by_hand)
    for anchored in (False, True):
        anchor = (weight, target, STRENGTH) if anchored else None
        calls = {
            "ltfast": lambda a=anchor: sgd_step(theta, grad, m, **SGD, anchor=a),
            "eager": lambda a=anchor: sgd_by_hand(theta, grad, m, a),
            "compiled": lambda a=anchor: compiled(theta, grad, m, a),
            "foreach": torch_step(torch.optim.SGD, n, device, anchored, foreach=True, **SGD),
            "fused": torch_step(torch.optim.SGD, n, device, anchored, fused=True, **SGD),
        }
        yield op_bench.Case("sgd" + "/anchor" * anchored, n, calls)
    calls = {
        "ltfast": lambda: adamw_step(theta, grad, m, v, 5, **ADAMW),
        "foreach": torch_step(torch.optim.AdamW, n, device, False, foreach=True, **ADAMW),
        "fused": torch_step(torch.optim.AdamW, n, device, False, fused=True, **ADAMW),
    }
    yield op_bench.Case("adamw", n, calls)


@pytest.mark.parametrize("implementation", ["ltfast", "foreach", "fused"])
def test_sgd_step(benchmark: Any, implementation: str) -> None:
    """pytest-benchmark entry point."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark(next(cases(op_bench.CPU_SIZES[0], device)).calls[implementation])


if __name__ == "__main__":
    op_bench.run("step", cases, __doc__)
