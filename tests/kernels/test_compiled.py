"""Kernels compiled to sm_80 and sm_90 without a GPU: no spills, 128-bit accesses, as many arrays touched as declared."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ltfast.kernels as K
import ltfast.kernels.conv  # noqa: F401  (registers its ops; the package itself leaves it out)

pytest.importorskip("triton")

from .compiled import compile_launch, record_launches
from .support import skip_if_interpreting

pytestmark = skip_if_interpreting()

N = 1 << 14
WIDE, NARROW = torch.float32, torch.bfloat16


def flat(dtype: torch.dtype = WIDE) -> Tensor:
    return torch.zeros(N, dtype=dtype)


def rows(count: int, dtype: torch.dtype = WIDE) -> Tensor:
    return torch.zeros(count, N, dtype=dtype)


def ascent(groups: int, direction: str, **options) -> Callable:
    count = 2 * groups if direction == "friendly" else groups
    gram = torch.zeros(600 if count <= 8 else 1, count, count, dtype=torch.float64)
    theta_sq = gram.new_zeros(gram.shape[0])
    shares, counts = torch.ones(groups), torch.ones(groups, dtype=torch.int64)
    return lambda: K.ascent_coefficients(gram, theta_sq, shares, counts, N, direction=direction, **options)


def everything(dtype: torch.dtype) -> dict:
    """Every option of an update at once, with device scalars."""
    one = torch.ones(())
    return {
        "anchor": (flat(), flat(), one),
        "mirror": flat(dtype),
        "grad_scale": one,
        "found_inf": one,
        "source": flat(),
    }


def penalty_gradient() -> Tensor:
    theta = flat().requires_grad_()
    return torch.ops.ltfast.anchor_grad(theta.detach(), rows(4), rows(4), torch.ones(4), torch.ones(()))


def convolution(channels: int) -> None:
    x = torch.zeros(2, channels, 16, 16, dtype=NARROW).to(memory_format=torch.channels_last)
    weight = torch.zeros(channels, channels, 3, 3)
    for mirror in (False, True):
        torch.ops.ltfast.conv3x3_nhwc(x, weight, mirror)
    torch.ops.ltfast.conv3x3_nhwc_weight(x, x)


# Bytes of shared memory that a block may have: of 8.0's generation the least (8.6, 8.9; 12.0 has as much), and of 9.0.
SHARED_MOST = {80: 101_376, 90: 232_448}
one = torch.ones(())
SMALL = {  # name: (module, call)
    "gram-1": ("gram", lambda: K.gram(rows(1), flat())),
    "gram-4": ("gram", lambda: K.gram(rows(4), flat(), True)),
    "gram-4-bf16": ("gram", lambda: K.gram(rows(4, NARROW), flat(), True)),
    "gram-5-bf16": ("gram", lambda: K.gram(rows(5, NARROW), flat(), True)),
    "gram-8-bf16": ("gram", lambda: K.gram(rows(8, NARROW), flat())),
    "gram-8": ("gram", lambda: K.gram_partials(rows(8), flat(), True)),
    "perturb-1": ("perturb", lambda: K.perturb(flat(), rows(1), torch.ones(1))),
    "perturb-4": ("perturb", lambda: K.perturb(flat(), rows(4), torch.ones(4), True, keep=flat())),
    "perturb-8-bf16": ("perturb", lambda: K.perturb(flat(), rows(8, NARROW), torch.ones(8), True, flat(NARROW))),
    "sgd": ("step", lambda: K.sgd_step(flat(), flat(), flat(), 0.1, 0.9)),
    "sgd-all": (
        "step",
        lambda: K.sgd_step(flat(), flat(NARROW), flat(), one, 0.9, nesterov=True, **everything(NARROW)),
    ),
    "adamw": ("step", lambda: K.adamw_step(flat(), flat(), flat(), flat(), 3, 0.1)),
    "adamw-all": ("step", lambda: K.adamw_step(flat(), flat(NARROW), flat(), flat(), one, one, **everything(WIDE))),
}
LOOPED = {  # kernels with a loop over rows, where the listing shows one iteration
    "gram-17": ("gram", lambda: K.gram_partials(rows(17), flat(), True)),
    "gram-64": ("gram", lambda: K.gram_partials(rows(64), flat(), True)),
    "perturb-13": ("perturb", lambda: K.perturb(flat(), rows(13), torch.ones(13), True)),
    "perturb-64": ("perturb", lambda: K.perturb(flat(), rows(64), torch.ones(64), True)),
    "anchor_penalty": ("anchor", lambda: K.anchor_penalty(flat(), rows(4), rows(4), torch.ones(4))),
    "anchor_grad": ("anchor", penalty_gradient),
    "collapse_anchors": ("anchor", lambda: K.collapse_anchors(rows(4), rows(4), torch.ones(4))),
    "conv-16": ("conv", lambda: convolution(16)),
    "conv-32": ("conv", lambda: convolution(32)),
    "coefficients-sam": ("coefficients", ascent(1, "joint", rho=0.05)),
    "coefficients-gsa": ("coefficients", ascent(4, "orthogonal")),
    "coefficients-friendly": ("coefficients", ascent(4, "friendly", objective="per_group")),
    "coefficients-33": ("coefficients", ascent(33, "none")),
    "coefficients-63": ("coefficients", ascent(63, "orthogonal", objective="per_group")),
    "coefficients-64": ("coefficients", ascent(64, "none")),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", list(SMALL))
def test_no_spills_wide_accesses_and_the_declared_passes(name, capability, monkeypatch):
    module, call = SMALL[name]
    with K.counting() as counters:
        launches = record_launches(monkeypatch, sys.modules[f"ltfast.kernels.{module}"], call)
    first = compile_launch(launches[0], capability)
    assert first.spilled_bytes == 0
    assert first.shared_bytes <= SHARED_MOST[capability]
    block = launches[0].options["BLOCK"]
    loads, stores = (first.tensor_accesses(kind, block) for kind in ("load", "store"))
    assert loads + stores == counters.ops[0].passes
    # Two float32 arrays need two 16-byte accesses for each bfloat16 one: at least one for every array touched.
    assert first.vector_accesses("ld") >= loads
    assert first.vector_accesses("st") >= stores
    assert len(launches) == counters.kernels


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", list(LOOPED))
def test_no_spills_in_kernels_with_loops(name, capability, monkeypatch):
    module, call = LOOPED[name]
    with K.counting() as counters:
        launches = record_launches(monkeypatch, sys.modules[f"ltfast.kernels.{module}"], call)
    padding = (
        8 if name in ("coefficients-33", "coefficients-63") else 0
    )  # torch's own launches, which fill absent groups in
    assert len(launches) == counters.kernels - padding
    for launch in launches:
        compiled = compile_launch(launch, capability)
        assert compiled.spilled_bytes == 0
        assert compiled.shared_bytes <= SHARED_MOST[capability], launch.kernel.__name__
        if module != "coefficients":  # touches nothing of size N
            assert compiled.vector_accesses("ld") > 0 or "cp.async.cg.shared.global" in compiled.ptx


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [WIDE, NARROW], ids=str)
def test_no_spills_for_any_number_of_rows(dtype, capability, monkeypatch):
    for count in (*range(1, 10), 13, 16, 17, 31, 32, 33, 48, 63, 64):
        for module, call in {
            "gram": lambda c=count: K.gram_partials(rows(c, dtype), flat(), True),
            "perturb": lambda c=count: K.perturb(flat(), rows(c, dtype), torch.ones(c), True, flat(dtype), flat()),
            "coefficients": ascent(count, "orthogonal", objective="per_group"),
            "coefficients, shared": ascent(count, "orthogonal"),
        }.items():
            module = module.split(",")[0]
            for launch in record_launches(monkeypatch, sys.modules[f"ltfast.kernels.{module}"], call):
                assert compile_launch(launch, capability).spilled_bytes == 0, (module, count)


@pytest.mark.parametrize("dtype", [WIDE, NARROW], ids=str)
def test_unaligned_slices_compile_to_narrow_accesses(dtype, monkeypatch):
    """The vector width follows the alignment: a slice that starts anywhere must not be read 16 bytes at a time."""
    buffer = torch.zeros(2, N + 1, dtype=dtype)
    theta = torch.zeros(N + 1)
    call = lambda: K.perturb(theta[1:], buffer[:, 1:], torch.ones(2))  # noqa: E731
    launch = record_launches(monkeypatch, sys.modules["ltfast.kernels.perturb"], call)[0]
    assert compile_launch(launch, 80).vector_accesses("ld") == 0
