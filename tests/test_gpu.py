"""Whole steps on a GPU, in one go: eager, compiled and recorded agree, nothing waits, CPU and GPU agree, memory is as told.

    pytest -m gpu tests/test_gpu.py

Tolerances are those of the same comparisons on the CPU, widened for cuDNN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ltfast import build
from ltfast.compiled import Compiler
from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.graph import Captured, CudaRecorder
from ltfast.losses import membership_for
from ltfast.memory import OVERHEAD, activations
from ltfast.models import LongTailModel, create_encoder
from ltfast.models.conv import use_own_kernels
from ltfast.objective import Forward, Objective
from ltfast.optim.rules import Rule
from ltfast.recipes import build_config
from ltfast.scaler import LossScale
from ltfast.step import TrainStep
from ltfast.update import Update
from tests.test_graph import KINDS_RECORDED
from tests.test_step import COUNTS, GROUPS, flat_of

pytestmark = pytest.mark.gpu
STEPS, LR = 20, 0.005
B, SIDE = 64, 16
# Of the way that the weights went in STEPS steps.
COMPILED, DEVICES, HALF = 2e-2, 2e-2, 0.25


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """float32 products, deterministic kernels."""
    old = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = old
    torch._dynamo.reset()


def make(device: str) -> tuple[LongTailModel, Objective, list[Batch]]:
    """The same network and batches on any device."""
    torch.manual_seed(0)
    encoder, dim = create_encoder("resnet8", 3)
    net = LongTailModel(encoder, dim, len(COUNTS), projection=(32, 16)).to(device)
    if device == "cuda":
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    batches = []
    for _ in range(4):
        views = tuple(torch.randn(B, 3, SIDE, SIDE).to(device) for _ in range(3))
        labels = (torch.arange(B) % len(COUNTS)).to(device)
        batches.append(Batch(views, labels, torch.arange(B).to(device)))
    return net, Objective("bcl", COUNTS.to(device)), batches


def run(
    name: str,
    device: str = "cuda",
    *,
    steps: int = STEPS,
    compiled: bool = False,
    recorded: bool = False,
    half: torch.dtype | None = None,
    own: bool = False,
    between: Callable[[int], None] = lambda step: None,
) -> tuple[Tensor, TrainStep]:
    """(weights after `steps` steps, the step)."""
    rule: Rule | None = KINDS_RECORDED[name][0]
    net, objective, batches = make(device)
    if own:
        use_own_kernels(net)
    flat = FlatParameters(net.parameters())
    scaler = LossScale(torch.device(device), 1024.0) if half == torch.float16 else None
    update = Update(flat, momentum=0.9, weight_decay=1e-3, scaler=scaler)
    reasons: list[str] = []

    def report(what: str, *, seconds: float, reason: str | None) -> None:
        if reason:
            reasons.append(f"{what}: {reason}")

    context: Any = (lambda: torch.autocast("cuda", half)) if half else None
    compiler = Compiler(net, report) if compiled else None
    forward = Forward(net, objective, context, compiler) if context else Forward(net, objective, compiler=compiler)
    recorder = CudaRecorder(torch.device(device)) if recorded else None
    step = TrainStep(
        net, objective, flat, FlatBuffers(net), update, rule,
        None if rule is None else membership_for(KINDS_RECORDED[name][1], COUNTS, GROUPS), forward=forward,
        capture=None if recorder is None else lambda take: Captured(take, "step", recorder, report),
    )  # fmt: skip
    net.train()
    for i in range(steps):
        update.lr.fill_(LR / (1 + i / 10))
        between(i)
        step(batches[i % 4])
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")  # the result is read now
    assert not reasons
    return flat_of([p.detach() for p in net.parameters()]).cpu(), step


def gap(a: Tensor, b: Tensor, start: Tensor) -> float:
    """|a - b| over the way from the start to a."""
    return float((a - b).norm() / (a - start).norm())


@pytest.mark.parametrize("name", KINDS_RECORDED)
def test_recorded_steps_are_the_eager_ones(name: str) -> None:
    eager, _ = run(name)
    recorded, step = run(name, recorded=True)
    assert step._run.branches  # type: ignore[attr-defined]
    start, _ = run(name, steps=0)
    assert gap(eager, recorded, start) < 1e-5  # the same kernels in the same order
    assert float(step.update.skipped) == 0


@pytest.mark.parametrize("name", ["plain", "sam", "gsa-exact", "gsa-full", "gsa-paper"])
def test_compiled_and_recorded_steps_agree_with_eager_ones(name: str) -> None:
    eager, _ = run(name)
    start, _ = run(name, steps=0)
    compiled, _ = run(name, compiled=True)
    both, _ = run(name, compiled=True, recorded=True)
    assert gap(eager, compiled, start) < COMPILED
    assert gap(compiled, both, start) < 1e-4  # another run of the compiler may sum in another order


@pytest.mark.parametrize("name", KINDS_RECORDED)
def test_cpu_and_gpu_agree_for_three_steps(name: str) -> None:
    gpu, _ = run(name, steps=3)
    cpu, _ = run(name, "cpu", steps=3)
    start, _ = run(name, "cpu", steps=0)
    assert gap(cpu, gpu, start) < DEVICES


@pytest.mark.parametrize("own", [False, True], ids=["library", "own kernels"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_goes_the_same_way(half: torch.dtype, own: bool) -> None:
    full, _ = run("gsa-full", steps=3)
    start, _ = run("gsa-full", steps=0)
    low, step = run("gsa-full", steps=3, half=half, own=own, compiled=True)
    assert float(step.update.skipped) == 0
    assert gap(full, low, start) < HALF


@pytest.mark.parametrize("recorded", [False, True], ids=["compiled", "recorded"])
@pytest.mark.parametrize("name", ["plain", "gsa-full", "gsa-paper"])
def test_steps_wait_for_nothing_after_their_first(name: str, recorded: bool) -> None:
    """CUDA itself raises on a wait. Recordings are over by step 15: gsa-full refreshes every fourth."""

    def between(step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if step == 15 else torch.cuda.get_sync_debug_mode())

    try:
        run(name, compiled=True, recorded=recorded, between=between)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recorded_step_is_a_few_launches() -> None:
    from torch.profiler import ProfilerActivity, profile

    _, step = run("gsa-full", recorded=True)
    _, _, batches = make("cuda")
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        step(batches[0])
        torch.cuda.synchronize()
    launches = [e.count for e in profiler.key_averages() if "LaunchKernel" in e.key or "GraphLaunch" in e.key]
    assert sum(launches) <= 8  # copies of labels and three views, and one graph


def test_views_are_recorded_too() -> None:
    """The batches of a source whose views are replayed are those of one that makes them anew."""
    config = build_config("digits-lt", "bcl", {}, {"device": "cuda"})
    device = torch.device("cuda")
    eager, recorded = (build.build_data(config, device, Ranks()) for _ in range(2))
    build.record_batches(recorded, CudaRecorder(device))
    for epoch in range(2):
        for a, b in zip(eager.train(epoch), recorded.train(epoch), strict=True):
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.index, b.index)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def test_memory_of_a_step_stays_below_the_estimate() -> None:
    run("plain", steps=1)  # cuDNN's and cuBLAS's own memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _, step = run("plain", steps=3)
    peak = torch.cuda.max_memory_allocated() - before
    need = activations(step.model, Objective("bcl", COUNTS.cuda()), (3, SIDE, SIDE))
    state = 4 * step.flat.size * 4
    assert peak < state + OVERHEAD * need.at(B) + (64 << 20)  # and what cuDNN and cuBLAS take to work in
