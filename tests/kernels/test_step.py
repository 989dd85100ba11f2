"""sgd_step and adamw_step against torch.optim and against the update rules written out in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from ltfast.kernels import adamw_step, sgd_step
from ltfast.kernels import step as kernels_step

from .support import PLACES, check, narrowed, normal, same_bits

SIZES = [1, 7, 1025]
SGD_OPTIONS = [
    {"momentum": 0.0, "weight_decay": 0.0},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
]


def scalar(value: float, place: str, on_device: bool) -> float | Tensor:
    return torch.tensor(value, device=place) if on_device else value


def run_torch(kind, theta: Tensor, grads: list[Tensor], **options) -> tuple[Tensor, dict[str, Tensor]]:
    p = torch.nn.Parameter(theta.double())
    optimizer = kind([p], **options)
    for g in grads:
        p.grad = g.double()
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_ten_steps_of_torch_sgd(place, n, options, on_device):
    theta, grads = normal(n, seed=1), [normal(n, seed=2 + i) for i in range(10)]
    expected, state = run_torch(torch.optim.SGD, theta, grads, lr=0.1, **options)
    undecayed, _ = run_torch(torch.optim.SGD, theta, grads, lr=0.1, **options | {"weight_decay": 0.02})
    short, _ = run_torch(torch.optim.SGD, theta, grads[:-1], lr=0.1, **options)
    ours, buf = theta.to(place, copy=True), torch.zeros(n, device=place)
    for i, g in enumerate(grads):
        first = torch.tensor(float(i == 0), device=place) if on_device else i == 0
        sgd_step(ours, g.to(place), buf, scalar(0.1, place, on_device), **options, first_step=first)
    check(ours, expected, "chain", [undecayed, short])
    if options["momentum"]:
        check(buf, state["momentum_buffer"], "chain")
    else:
        assert (buf == 0).all()


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_the_formulas_beside_the_kernels_are_torchs(options):
    """What a GPU takes in float64 or without Triton; the CPU has torch's own fused updates."""
    theta, buf, *grads = (normal(7, seed=k).double() for k in range(4))
    expected, state = run_torch(torch.optim.SGD, theta.clone(), grads, lr=0.1, **options)
    ours, buf = theta.clone(), torch.zeros_like(buf) if options["momentum"] else None
    for keep, grad in zip((1.0, 1 - options.get("dampening", 0.0)), grads, strict=True):
        rest = options["momentum"], options["weight_decay"], options.get("nesterov", False)
        kernels_step._write(kernels_step._sgd_reference(ours, ours.clone(), grad, buf, 0.1, keep, *rest), None, None)
    torch.testing.assert_close(ours, expected)
    if buf is not None:
        torch.testing.assert_close(buf, state["momentum_buffer"])
    expected, state = run_torch(
        torch.optim.AdamW, theta.clone(), grads, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1
    )
    ours, m, v = theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta)
    for t, grad in enumerate(grads, 1):
        kernels_step._write(
            kernels_step._adamw_reference(ours, ours.clone(), grad, m, v, 0.1, t, 0.8, 0.9, 1e-3, 0.1), None, None
        )
    for found, wanted in ((ours, expected), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
@pytest.mark.parametrize("n", SIZES)
def test_ten_steps_of_torch_adamw(place, n, betas, on_device):
    theta, grads = normal(n, seed=1), [normal(n, seed=2 + i) for i in range(10)]
    options = {"lr": 0.05, "betas": betas, "eps": 1e-3, "weight_decay": 0.1}
    expected, state = run_torch(torch.optim.AdamW, theta, grads, **options)
    other, _ = run_torch(torch.optim.AdamW, theta, grads, **options | {"weight_decay": 0.0})
    ours, m, v = theta.to(place, copy=True), torch.zeros(n, device=place), torch.zeros(n, device=place)
    for i, g in enumerate(grads):
        step = torch.tensor(i + 1, device=place) if on_device else i + 1
        adamw_step(ours, g.to(place), m, v, step, scalar(0.05, place, on_device), betas, 1e-3, 0.1)
    check(ours, expected, "chain", [other])
    check(m, state["exp_avg"], "chain")
    check(v, state["exp_avg_sq"], "chain")


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # 0 / 0 in masked lanes, under the interpreter
@pytest.mark.parametrize("place", PLACES)
def test_bias_correction_of_a_device_step_is_exact_early_and_late(place):
    for step, beta2 in itertools.product((1, 2, 100, 499, 501, 10_000), (0.9, 0.999)):
        theta, m, v = (torch.zeros(4, device=place) for _ in range(3))
        grad = torch.ones(4, device=place)
        adamw_step(theta, grad, m, v, torch.tensor(step, device=place), 1.0, (0.9, beta2), 0.0, 0.0)
        root = math.sqrt((1 - beta2) / (1 - beta2**step))
        check(theta, torch.full((4,), -0.1 / (1 - 0.9**step) / root, dtype=torch.float64), "elementwise")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_anchor_scale_and_mirror_in_one_pass(place, kind, on_device):
    n = 1031
    theta, grad = normal(n, seed=1), normal(n, seed=2, dtype=torch.bfloat16)
    weight, target = normal(n, seed=3).abs(), normal(n, seed=4)
    full = 0.25 * grad.double() + 0.7 * weight.double() * (theta.double() - target.double())
    optimizer, options = {
        "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        "adamw": (torch.optim.AdamW, {"lr": 0.1, "eps": 0.1, "weight_decay": 0.01}),
    }[kind]
    expected, no_anchor, no_scale = (
        run_torch(optimizer, theta, [g], **options)[0] for g in (full, 0.25 * grad.double(), full + 0.75 * grad)
    )

    ours, state = theta.to(place, copy=True), [torch.zeros(n, device=place) for _ in range(2)]
    mirror = torch.empty(n, dtype=torch.bfloat16, device=place)
    extra = {
        "anchor": (weight.to(place), target.to(place), scalar(0.7, place, on_device)),
        "mirror": mirror,
        "grad_scale": scalar(0.25, place, on_device),
    }
    lr = scalar(0.1, place, on_device)
    if kind == "sgd":
        sgd_step(ours, grad.to(place), state[0], lr, 0.9, weight_decay=0.01, **extra)
    else:
        adamw_step(ours, grad.to(place), *state, scalar(1.0, place, on_device), lr, eps=0.1, weight_decay=0.01, **extra)
    check(ours, expected, "elementwise", [no_anchor, no_scale])
    assert same_bits(mirror, narrowed(ours))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, under the interpreter
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_keeps_every_bit_and_still_refreshes_the_mirror(place, kind, found):
    n = 500
    theta, state = normal(n, seed=1).to(place), [normal(n, seed=s).abs().to(place) for s in (2, 3)]
    grad = normal(n, seed=4).to(place)
    if found:
        grad[::3], grad[1::3] = torch.inf, torch.nan
    before = [t.clone() for t in (theta, *state)]
    mirror = torch.full((n,), 9.0, device=place)
    flag = torch.tensor(found, device=place)
    if kind == "sgd":
        sgd_step(theta, grad, state[0], 0.1, 0.9, mirror=mirror, found_inf=flag)
    else:
        adamw_step(theta, grad, *state, 2, 0.1, mirror=mirror, found_inf=flag)
    kept = [same_bits(a, b) for a, b in zip(before, (theta, *state), strict=True)]
    assert kept == ([True] * 3 if found else [False, False, kind == "sgd"])
    assert same_bits(mirror, theta)


@pytest.mark.parametrize("place", PLACES)
def test_slices_and_two_runs(place):
    buffers = [normal(400, seed=s).abs().to(place) for s in range(4)]
    part = slice(3, 300)
    copies = [b.clone() for b in buffers]
    for arrays in (buffers, copies):
        adamw_step(*(a[part] for a in arrays), 2, 0.1)
    assert all(same_bits(a, b) for a, b in zip(buffers, copies, strict=True))
    assert same_bits(buffers[0][:3], normal(400, seed=0).abs()[:3])
    assert same_bits(buffers[0][300:], normal(400, seed=0).abs()[300:])
    assert not same_bits(buffers[0], normal(400, seed=0).abs())


def bad_calls(theta: Tensor, grad: Tensor, buf: Tensor) -> dict[str, tuple[tuple, dict]]:
    nan, good = math.nan, (theta, grad, buf, 0.1, 0.9)
    return {
        "lr": ((theta, grad, buf, nan), {}),
        "lr is -": ((theta, grad, buf, -0.1), {}),
        "momentum": ((theta, grad, buf, 0.1, -0.9), {}),
        "momentum_N": ((theta, grad, None, 0.1, 0.9), {}),
        "momentum_N has 7": ((theta, grad, buf[:7], 0.1, 0.9), {}),
        "dampening": ((theta, grad, buf, 0.1, 0.9, nan), {}),
        "nesterov": ((theta, grad, buf, 0.1, 0.9, 0.5), {"nesterov": True}),
        "weight_decay": (good, {"weight_decay": -1.0}),
        "theta_N": ((theta.half(), grad, buf, 0.1), {}),
        r"theta_N is torch\.bfloat16": ((theta.bfloat16(), grad, buf, 0.1), {}),
        r"momentum_N is torch\.bfloat16": ((theta, grad, buf.bfloat16(), 0.1, 0.9), {}),
        r"source is torch\.bfloat16": (good, {"source": buf.bfloat16()}),
        "grad_N": ((theta, grad[:7], buf, 0.1), {}),
        "grad_N is": ((theta, grad.half(), buf, 0.1), {}),
        r"anchor\[0\]": (good, {"anchor": (buf[:7], buf, 0.1)}),
        r"anchor\[0\] .* is torch\.bfloat16": (good, {"anchor": (buf.bfloat16(), buf, 0.1)}),
        r"anchor\[1\]": (good, {"anchor": (buf, buf.double(), 0.1)}),
        r"anchor\[2\]": (good, {"anchor": (buf, buf, nan)}),
        "anchor must be": (good, {"anchor": (buf, buf, 0.0, 0.1)}),
        "lr must be a number": ((theta, grad, buf, "0.1"), {}),
        "lr must": ((theta, grad, buf, None), {}),
        "momentum must": ((theta, grad, buf, 0.1, None), {"nesterov": True}),
        "theta_N must": (([1.0], grad, buf, 0.1), {}),
        "mirror": (good, {"mirror": buf[:7]}),
        "grad_scale": (good, {"grad_scale": nan}),
        "found_inf": (good, {"found_inf": True}),
        "found_inf must": (good, {"found_inf": torch.zeros(2)}),
        "lr lies on meta": ((theta, grad, buf, torch.tensor(0.1, device="meta")), {}),
    }


def test_bad_arguments_are_named_and_nothing_is_written():
    theta, grad, buf = torch.ones(8), torch.ones(8), torch.ones(8)
    for name, (args, kwargs) in bad_calls(theta, grad, buf).items():
        with pytest.raises(ValueError, match=name):
            sgd_step(*args, **kwargs)
    for name, kwargs in {
        r"betas\[1\]": {"betas": (0.9, 1.0)},
        r"betas\[0\] must": {"betas": ("0.9", 0.9)},
        "betas is": {"betas": (0.9,)},
        "betas is 0.9": {"betas": 0.9},
        "eps": {"eps": -1.0},
        "weight_decay": {"weight_decay": math.inf},
        "step": {"step": 0},
    }.items():
        with pytest.raises(ValueError, match=name):
            adamw_step(theta, grad, buf, buf.clone(), **{"step": 1, "lr": 0.1} | kwargs)
    with pytest.raises(ValueError, match="exp_avg_sq_N"):
        adamw_step(theta, grad, buf, buf[:7], 1, 0.1)
    with pytest.raises(ValueError, match=r"theta_N is torch\.bfloat16"):
        adamw_step(theta.bfloat16(), grad, buf, buf.clone(), 1, 0.1)
    assert (theta == 1).all()
    assert (buf == 1).all()


def test_memory_shared_with_what_is_written_is_refused():
    """With a source, theta is overwritten before the gradient is read; a momentum buffer would lose its past."""
    buffer = torch.arange(1.0, 65.0)
    before = buffer.clone()
    theta, grad, one, two, source = buffer[:8], buffer[8:16], buffer[16:24], buffer[24:32], buffer[32:40]
    for name, arguments, options in (
        ("grad_N shares memory with theta_N", (theta, theta), {"source": source}),
        ("grad_N shares memory with theta_N", (theta, buffer[4:12]), {}),
        ("grad_N shares memory with (momentum_N|exp_avg_N)", (theta, one), {}),
        ("(momentum_N|exp_avg_N) shares memory with theta_N", (one, grad), {}),
        (r"anchor\[1\] \(T\) shares memory with theta_N", (theta, grad), {"anchor": (source, theta, 1.0)}),
        ("source shares memory with theta_N", (theta, grad), {"source": buffer[1:9]}),
        ("mirror shares memory with theta_N", (theta, grad), {"mirror": buffer[1:9]}),
    ):
        with pytest.raises(ValueError, match=name):
            sgd_step(*arguments, one, 0.1, 0.9, **options)
        with pytest.raises(ValueError, match=name):
            adamw_step(*arguments, one, two, 1, 0.1, **options)
    assert torch.equal(buffer, before)
    sgd_step(theta, grad, one, 0.1, 0.9, source=theta, mirror=buffer[40:48])
    assert torch.equal(theta, buffer[40:48])
