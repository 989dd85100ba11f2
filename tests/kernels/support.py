"""Where the parity tests run, how close they must come, and the one comparison they all use.

The same tests check three things: "cpu" in a plain session is the torch oracle, "cpu" under TRITON_INTERPRET=1 is the
Triton kernel in the interpreter (test_interpreter.py starts that session), "cuda" is the Triton kernel on a GPU.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from ltfast.kernels import common

PLACES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]

# Largest |actual - expected| / max |expected| that passes, by class of error. Observed worst (interpreter and oracle):
TOLERANCE = {
    "reduction": 6e-7,  # 3.6e-7: float32 products summed in blocks, then float64
    "tensor cores": 2e-6,  # 3xTF32 on a GPU: estimated 2e-7 to 5e-7, by the width of the accumulator
    "elementwise": 1e-6,  # 2.4e-7: a few float32 roundings
    "coefficients": 3e-7,  # 1.0e-7: float64, stored as float32
    "chain": 5e-6,  # 1.1e-6: ten steps of an optimizer one after the other
    "convolution": 2e-6,  # 8.1e-7: float32 sums of up to 288 products, in the library's order
    "fp16": 2**-10,  # one rounding to float16
    "bf16": 2**-7,  # one rounding to bfloat16; the interpreter truncates
}


def check(actual: Tensor, expected: Tensor, kind: str, wrong: Iterable[Tensor] = ()) -> None:
    """Close to `expected`; zeros and every tensor of `wrong` (an oracle that lacks a term) must not be."""
    actual = actual.detach().double().cpu()
    expected = expected.detach().double().cpu()
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    scale = expected.abs().max().item()
    assert scale > 0, "a test whose answer is zero shows nothing"
    bound = TOLERANCE[kind] * scale
    worst = (actual - expected).abs().max().item()
    assert worst <= bound, f"off by {worst / scale:.1e} of the largest entry, allowed {TOLERANCE[kind]:.1e}"
    for other in (torch.zeros_like(expected), *wrong):
        assert (actual - other.detach().double().cpu()).abs().max().item() > bound, "a wrong oracle passes too"


def normal(*shape: int, seed: int, place: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(place)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors are equal bit by bit (NaN included)."""
    bits = [t.detach().cpu().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def narrowed(tensor: Tensor) -> Tensor:
    """float32 as the place's bfloat16: rounded to nearest even; triton's interpreter cuts the digits off."""
    if common.INTERPRET and not tensor.is_cuda:
        tensor = (tensor.view(torch.int32) & -65536).view(torch.float32)
    return tensor.bfloat16()


def skip_unless_interpreting() -> pytest.MarkDecorator:
    """For tests of the interpreter session only."""
    return pytest.mark.skipif(not common.INTERPRET, reason="runs in the interpreter session (test_interpreter.py)")


def skip_if_interpreting() -> pytest.MarkDecorator:
    """For tests that the plain session has run already, or that need compiled kernels."""
    return pytest.mark.skipif(common.INTERPRET, reason="runs in the plain session")
