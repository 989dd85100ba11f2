"""The path of CPU tensors: the oracle's arithmetic, a block at a time. Whatever the block, the result is the oracle's."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ltfast.kernels import adamw_step, anchor_penalty, blocks, collapse_anchors, gram_partials, perturb, sgd_step
from ltfast.kernels.anchor import anchor_penalty_reference, collapse_anchors_reference
from ltfast.kernels.gram import gram_partials_reference
from ltfast.kernels.perturb import perturb_reference

from ..peak import peak_bytes
from .support import check, normal, same_bits, skip_if_interpreting

pytestmark = skip_if_interpreting()
N = 1003


@pytest.fixture(params=[(96, 1), (96, 3), (96, 64), (10**6, 1)], ids=["blocks", "threads", "many threads", "one block"])
def block(request, monkeypatch) -> Iterator[tuple[int, int]]:
    (size, threads), before = request.param, torch.get_num_threads()
    monkeypatch.setattr(blocks, "BLOCK", size)
    monkeypatch.setattr(blocks, "SERIAL", size)
    monkeypatch.setattr(sys.modules["ltfast.kernels.gram"], "PIECE", 20)  # several and a rest in a block
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    yield request.param
    torch.set_num_threads(before)


def test_blocks_cover_the_arrays_once_and_in_order(block):
    theta, rows = torch.arange(N), torch.arange(3 * N).view(3, N)
    found = blocks.in_blocks(lambda parts: list(parts), theta, None, rows, rows=3)
    parts = [part for stretch in found for part in stretch]
    assert torch.equal(torch.cat([a for a, _, _ in parts]), theta)
    assert torch.equal(torch.cat([r for _, _, r in parts], 1), rows)
    assert all(b is None for _, b, _ in parts)
    size, threads = block
    assert len(parts) == -(-N // max(size // 3, 1))
    assert len(found) == (1 if threads == 1 else min(threads, len(parts)))


def test_an_error_in_a_thread_is_the_callers():
    def fail(parts):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        blocks.in_blocks(fail, torch.zeros(300_000))


def test_results_do_not_depend_on_the_number_of_threads():
    n, before = 300_007, torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            theta, grads, buf, keep = normal(n, seed=1), normal(3, n, seed=2), normal(n, seed=3), torch.empty(n)
            matrix, theta_sq = gram_partials(grads, theta, True)
            perturb(theta, grads, torch.tensor([0.1, 0.2, 0.3]), True, theta, keep)
            sgd_step(theta, grads[0], buf, 0.1, 0.9, weight_decay=0.01, source=keep)
            m, v = torch.zeros(n), torch.zeros(n)
            adamw_step(theta, grads[1], m, v, 1, 0.1, anchor=(keep.abs(), keep, 0.1))
            results.append([matrix, theta_sq, theta, buf, m, v, keep])
            assert torch.get_num_threads() == threads  # of the caller, still
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_work_in_the_callers_inference_mode():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.inference_mode():
            theta = torch.ones(300_007)
            perturb(theta, torch.ones(1, 300_007), torch.tensor([1.0]), out=theta)
            assert (theta == 2).all()
    finally:
        torch.set_num_threads(before)


def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, signal, torch
from ltfast.kernels import gram_partials
torch.set_num_threads(2)
theta, grads = torch.ones(300_000), torch.ones(2, 300_000)
gram_partials(grads, theta)
child = os.fork()
if child == 0:
    signal.alarm(60)  # it would wait for ever for its parent's threads
    os._exit(int(gram_partials(grads, theta)[0][0, 0, 1].item() != 300_000))
print("child", os.waitpid(child, 0)[1])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "child 0", run.stderr


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_gram(block, rows, adaptive):
    grads, theta = normal(rows, N, seed=1), normal(N, seed=2)
    (matrix, theta_sq), expected = (
        [t.sum(0) for t in f(grads, theta, adaptive)] for f in (gram_partials, gram_partials_reference)
    )
    check(matrix, expected[0], "reduction", [gram_partials_reference(grads[:, :-1], theta[:-1], adaptive)[0][0]])
    check(theta_sq, expected[1], "reduction")


def test_gram_of_float64_rows_is_float64_throughout():
    grads, theta = normal(3, N, seed=1).double(), normal(N, seed=2).double()
    for adaptive in (False, True):
        for ours, expected in zip(
            gram_partials(grads, theta, adaptive), gram_partials_reference(grads, theta, adaptive), strict=True
        ):
            assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-11)


def test_squares_that_overflow_float32_are_summed_in_float64():
    grads = 1e25 * normal(3, N, seed=1)
    check(gram_partials(grads)[0], gram_partials_reference(grads, None, False)[0], "reduction")
    grads[1, 7] = torch.inf
    assert not gram_partials(grads)[0].isfinite().all()


def test_autocast_narrows_no_product():
    grads = normal(2, N, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gram_partials(grads)[0]
    assert same_bits(inside, gram_partials(grads)[0])


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


def test_no_op_takes_memory_of_the_parameters_size(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the profiler sees the calling thread only
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
        assert peak_bytes(call) < theta.nbytes, name
    assert peak_bytes(lambda: collapse_anchors(grads, grads, coef)) < 3 * theta.nbytes  # two arrays are its result
