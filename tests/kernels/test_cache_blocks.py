"""The path of CPU tensors: the oracle's arithmetic, a block at a time. Whatever the block, the result is the oracle's."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ltfast.kernels import adamw_step, anchor_penalty, collapse_anchors, common, gram_partials, perturb, sgd_step
from ltfast.kernels.anchor import anchor_penalty_reference, collapse_anchors_reference
from ltfast.kernels.gram import gram_partials_reference
from ltfast.kernels.perturb import perturb_reference

from .support import check, normal, same_bits, skip_if_interpreting

pytestmark = skip_if_interpreting()
N = 1003


@pytest.fixture(params=[96, 10**6], ids=["many blocks", "one block"])
def block(request, monkeypatch) -> int:
    monkeypatch.setattr(common, "CPU_BLOCK", request.param)
    monkeypatch.setattr(common, "CPU_BLOCK_PER_THREAD", 1)
    return request.param


def test_blocks_cover_the_arrays_once(block):
    theta, rows = torch.arange(N), torch.arange(3 * N).view(3, N)
    parts = list(common.cache_blocks(theta, None, rows, rows=3))
    assert torch.equal(torch.cat([a for a, _, _ in parts]), theta)
    assert torch.equal(torch.cat([r for _, _, r in parts], 1), rows)
    assert all(b is None for _, b, _ in parts)
    assert (len(parts) > 1) == (block < N)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_gram(block, rows, adaptive):
    grads, theta = normal(rows, N, seed=1), normal(N, seed=2)
    (matrix, theta_sq), expected = (
        [t.sum(0) for t in f(grads, theta, adaptive)] for f in (gram_partials, gram_partials_reference)
    )
    assert torch.allclose(matrix, expected[0], rtol=1e-13, atol=1e-11)
    assert torch.allclose(theta_sq, expected[1], rtol=1e-13)
    assert not torch.allclose(matrix, gram_partials_reference(grads[:, :-1], theta[:-1], adaptive)[0][0], rtol=1e-13)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
def test_perturb_has_the_bits_of_the_oracle(block, dtype, adaptive, zero):
    theta, grads = normal(N, seed=1), normal(4, N, seed=2, dtype=dtype)
    coef = torch.zeros(4) if zero else torch.tensor([0.3, 0.0, -0.7, 0.2])
    grads[1, 5] = torch.inf
    expected, before, kept = perturb_reference(theta, grads, coef, adaptive), theta.clone(), torch.empty(N)
    narrow = perturb(theta, grads, coef, adaptive, torch.empty(N, dtype=torch.bfloat16))
    perturb(theta, grads, coef, adaptive, theta, kept)
    assert same_bits(theta, expected)
    assert same_bits(kept, before)
    assert same_bits(narrow, expected.bfloat16())


def sgd_of(theta: Tensor, d: Tensor, buf: Tensor) -> tuple[Tensor, ...]:
    moved = 0.9 * buf + d + 0.01 * theta
    return theta - 0.1 * (d + 0.01 * theta + 0.9 * moved), moved


def adamw_of(theta: Tensor, d: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    m, v = 0.9 * m + 0.1 * d, 0.95 * v + 0.05 * d * d
    root = (v / (1 - 0.95**7)).sqrt() + 1e-3
    return theta * (1 - 0.1 * 0.01) - 0.1 * m / (1 - 0.9**7) / root, m, v


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "anchor, scale, source, mirror"])
@pytest.mark.parametrize("skip", [None, 0.0, 1.0])
def test_updates(block, kind, extras, skip):
    """Against the rule written out in float64; a skipped step takes the ascent back and nothing else."""
    theta, source = normal(N, seed=1), normal(N, seed=2)
    grad, weight, target = normal(N, seed=3), normal(N, seed=4).abs(), normal(N, seed=5)
    state = [normal(N, seed=6).abs(), normal(N, seed=7).abs()][: 1 if kind == "sgd" else 2]
    start, held = source if extras else theta.clone(), [s.clone() for s in state]
    d = 0.25 * grad.double() + 0.7 * weight.double() * (start.double() - target.double()) if extras else grad.double()
    rule = sgd_of if kind == "sgd" else adamw_of
    expected = rule(start.double(), d, *(s.double() for s in state))
    mirror = torch.empty(N) if extras else None
    options: dict = {"found_inf": None if skip is None else torch.tensor(skip)}
    if extras:
        options |= {
            "anchor": (weight, target, 0.7),
            "grad_scale": torch.tensor(0.25),
            "source": source,
            "mirror": mirror,
        }
    if kind == "sgd":
        sgd_step(theta, grad, state[0], 0.1, 0.9, weight_decay=0.01, nesterov=True, **options)
    else:
        adamw_step(theta, grad, *state, torch.tensor(7), 0.1, (0.9, 0.95), 1e-3, 0.01, **options)
    if skip:
        assert all(same_bits(a, b) for a, b in zip((theta, *state), (start, *held), strict=True))
    else:
        for actual, wanted in zip((theta, *state), expected, strict=True):
            check(actual, wanted, "chain")
    assert mirror is None or same_bits(mirror, theta)
    assert same_bits(source, normal(N, seed=2))
    assert same_bits(grad, normal(N, seed=3))


def test_anchors(block):
    theta, anchors, fishers = normal(N, seed=1), normal(4, N, seed=2), normal(4, N, seed=3).abs()
    coef = torch.tensor([0.1, 0.2, 0.3, 0.4])
    leaf = theta.clone().requires_grad_()
    value = anchor_penalty(leaf, anchors, fishers, coef)
    value.backward()
    check(value.detach(), anchor_penalty_reference(theta, anchors, fishers, coef), "reduction")
    check(leaf.grad, (coef[:, None].double() * fishers * (theta - anchors)).sum(0), "elementwise")
    for actual, wanted in zip(
        collapse_anchors(anchors, fishers, coef), collapse_anchors_reference(anchors, fishers, coef), strict=True
    ):
        assert torch.allclose(actual, wanted, rtol=1e-13, atol=0)


def most_bytes(call) -> int:
    """Most bytes that a call holds at once, its results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        call()
    sizes = [(e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, size in sorted(sizes):
        now += size
        peak = max(peak, now)
    return peak


def test_no_op_takes_memory_of_the_parameters_size():
    n, rows = 2_000_000, 4
    theta, grads, state = torch.ones(n), torch.ones(rows, n), [torch.zeros(n) for _ in range(2)]
    keep, coef, anchor = torch.ones(n), torch.ones(rows), (torch.ones(n), torch.ones(n), 0.1)
    calls = {
        "gram": lambda: gram_partials(grads, theta, True),
        "perturb": lambda: perturb(theta, grads, coef, True, theta, keep),
        "sgd": lambda: sgd_step(theta, grads[0], state[0], 1e-3, 0.9, anchor=anchor, source=keep),
        "adamw": lambda: adamw_step(theta, grads[0], *state, 1, 1e-3, anchor=anchor, source=keep),
        "penalty": lambda: anchor_penalty(theta, grads, grads, coef),
    }
    for name, call in calls.items():
        assert most_bytes(call) < theta.nbytes, name
    assert most_bytes(lambda: collapse_anchors(grads, grads, coef)) < 3 * theta.nbytes  # two arrays are its result
