"""conv3x3, its input gradient and its weight gradient against the library's, in bfloat16 on channels_last pictures.

python benchmarks/bench_conv.py [--sizes N ...] [--write]       # N: elements of the pictures
pytest benchmarks/bench_conv.py --benchmark-enable

"eager" is cuDNN, tuned as in training. On a CPU our op is the library's convolution, so there is nothing to time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import op_bench
import pytest
import torch
from torch import Tensor

from ltfast.kernels.conv import conv3x3

STAGES = ((16, 32), (32, 16))  # channels and side of ResNet-32's first two stages
STEP = 768 * 16 * 32 * 32  # elements of a stage 1 picture batch: three views of 256; half of it in stage 2
NHWC = torch.channels_last


def library(x: Tensor, up: Tensor, weight: Tensor, want: tuple[bool, bool, bool]) -> Any:
    """The gradients that are wanted, as autograd asks cuDNN for them; weights in bfloat16, as autocast makes them."""
    one = [1, 1]
    return torch.ops.aten.convolution_backward(up, x, weight, None, one, one, one, False, [0, 0], 1, list(want))


def cases(n: int, device: str) -> Iterator[op_bench.Case]:
    """Three passes of two stages."""
    torch.backends.cudnn.benchmark = True
    ops = torch.ops.ltfast
    for channels, side in STAGES:
        shape = (max(1, n // (STAGES[0][0] * 32 * 32)), channels, side, side)
        x, up = (torch.randn(shape, device=device).to(torch.bfloat16, memory_format=NHWC) for _ in range(2))
        weight = torch.randn(channels, channels, 3, 3, device=device).to(memory_format=NHWC)
        half = weight.bfloat16()
        passes: dict[str, dict[str, Callable[[], Any]]] = {
            "forward": {
                "ltfast": partial(ops.conv3x3_nhwc, x, weight, False),
                "eager": partial(torch.nn.functional.conv2d, x, half, padding=1),
            },
            "input": {
                "ltfast": partial(ops.conv3x3_nhwc, up, weight, True),
                "eager": partial(library, x, up, half, (True, False, False)),
            },
            "weight": {
                "ltfast": lambda x=x, up=up: ops.conv3x3_nhwc_weight(x, up).sum(0),
                "eager": partial(library, x, up, half, (False, True, False)),
            },
        }
        for name, calls in passes.items():
            yield op_bench.Case(f"{name}/{channels}x{side}px", x.numel(), calls)


@pytest.mark.parametrize("implementation", ["ltfast", "eager"])
def test_forward_and_backward(benchmark: Any, implementation: str) -> None:
    """pytest-benchmark entry point."""
    x = torch.randn(8, 16, 32, 32).to(memory_format=NHWC).requires_grad_()
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    function = conv3x3 if implementation == "ltfast" else partial(torch.nn.functional.conv2d, padding=1)
    benchmark(lambda: function(x, weight).sum().backward())


if __name__ == "__main__":
    op_bench.run("conv", cases, __doc__, gpu_sizes=(STEP,), cpu_sizes=(STEP // 96,))
