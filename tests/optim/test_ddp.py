"""DistributedDataParallel on two gloo processes: local and global ascent, and what travels between the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ltfast.dist import Ranks
from ltfast.losses import cross_entropy, group_losses
from ltfast.optim import CCSAM, GSA, SAM, ImbSAM, frozen_statistics
from tests.optim import support
from tests.optim.support import GROUP_COUNTS, SGD
from tests.procs import run_ranks

pytestmark = pytest.mark.dist
STEPS = 100
GROUPED_STEPS = 40
HOW, ASCENTS = ("calls", "closure", "batchnorm"), ("local", "global")
GROUPED = [("shared", 1), ("shared", 4), ("marked", 4), ("per_group", 1), ("imbsam", 1), ("ccsam", 1)]
STATIC = {"static_graph": True}
# name, (kind of optimizer, bound to the module inside), whether and how DistributedDataParallel is used
UNBOUND: list[tuple[str, tuple[str, bool], dict[str, Any]]] = [
    ("ccsam", ("ccsam", False), {}), ("ccsam, inside", ("ccsam", True), {}), ("static", ("shared", False), STATIC),
    ("static, inside", ("imbsam", True), STATIC), ("gsa", ("shared", False), {}), ("imbsam", ("imbsam", True), {}),
    ("ccsam, each its own", ("ccsam", False), {"wrapped": False}),
]  # fmt: skip
UNEVEN = [("ccsam", "local"), ("shared", "global"), ("imbsam", "local")]
OVERFLOWS = [(kind, scaled) for kind in ("shared", "per_group", "imbsam", "ccsam") for scaled in (False, True)]
Runs = list[dict[str, Any]]
# Radii inside the bounds, so that a wrong gradient norm shows.
RADIUS = {"C": 3.0, "rho_min": 5e-3, "rho_max": 4e-2}


def wrapped(name: str, reductions: list[int], **options: Any) -> DistributedDataParallel:
    """The same network on every process; every reduced bucket adds its size to `reductions`."""
    ddp = DistributedDataParallel(support.make(name), **options)

    def count(_, bucket):  # type: ignore[no-untyped-def]  # torch insists on its own annotations or none
        reductions.append(bucket.buffer().numel())
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, count)
    return ddp


def part(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """This process's half of a batch."""
    x, y = support.batch(step, 40)
    return x[rank::2], y[rank::2]


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = part(step, rank)
    return F.cross_entropy(model(x), y)


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# -- SAM: what must be inside no_sync -----------------------------------------------------------------------------------------


def recipes(ranks: Ranks) -> dict[str, Any]:
    reductions: list[int] = []
    ddp = wrapped("mlp", reductions)
    result: dict[str, Any] = {}

    def reduced() -> int:
        count = len(reductions)
        reductions.clear()
        return count

    loss = loss_of(ddp, 0, ranks.rank)
    with ddp.no_sync():  # davda54's README: too late, the forward pass has already asked for a reduction
        loss.backward()
    result["around backward"] = reduced()
    ddp.zero_grad()
    with ddp.no_sync():
        loss_of(ddp, 0, ranks.rank).backward()
    result["around forward and backward"] = reduced()
    ddp.zero_grad()
    loss_of(ddp, 0, ranks.rank).backward()
    result["without"] = reduced()
    return result


def test_no_sync_must_hold_the_forward_pass_too(runs: Runs) -> None:
    for run in runs:
        assert run["recipes"] == {"around backward": 1, "around forward and backward": 0, "without": 1}


def sam(ranks: Ranks, ascent: str, how: str) -> dict[str, Any]:
    reductions: list[int] = []
    ddp = wrapped("conv" if how == "batchnorm" else "mlp", reductions)
    optimizer = SAM(ddp.parameters(), SGD[0], rho=0.3, **SGD[1]).bind(ddp, ascent)
    climbed = None
    for i in range(STEPS):
        if how == "closure":
            optimizer.step(lambda i=i: loss_of(ddp, i, ranks.rank).backward())
            optimizer.zero_grad()
            continue
        with optimizer.first_pass():
            loss_of(ddp, i, ranks.rank).backward()
        optimizer.first_step(zero_grad=True)
        climbed = state(ddp) if i == 0 else climbed
        with frozen_statistics(ddp):
            loss_of(ddp, i, ranks.rank).backward()
        optimizer.second_step(zero_grad=True)
    return {"reductions": len(reductions), "climbed": climbed, "end": state(ddp), "gathered": optimizer.gathered}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("ascent", ASCENTS)
def test_sam_keeps_the_processes_identical(runs: Runs, ascent: str, how: str) -> None:
    a, b = runs[0][f"sam {ascent} {how}"], runs[1][f"sam {ascent} {how}"]
    assert a["reductions"] == b["reductions"] == (STEPS if ascent == "local" else 2 * STEPS)
    assert all(torch.equal(p, q) for p, q in zip(a["end"], b["end"], strict=True))
    if how == "calls":
        same = all(torch.equal(p, q) for p, q in zip(a["climbed"], b["climbed"], strict=True))
        assert same == (ascent == "global")
    if ascent == "global" and how != "batchnorm":
        model = support.make()
        alone = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
        for i in range(STEPS):
            for take in (alone.first_step, alone.second_step):
                x, y = support.batch(i, 40)
                F.cross_entropy(model(x), y).backward()
                take(zero_grad=True)
        assert (
            max(float((p - q).abs().max()) for p, q in zip(state(model), a["end"], strict=True)) < 1e-5
        )  # observed 4e-7


# -- group losses ------------------------------------------------------------------------------------------------------------


def closure_of(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> Any:
    return lambda: group_losses(cross_entropy(model(x), y), support.table(kind)[y])


def build(kind: str, model: nn.Module, every: int) -> tuple[Any, str]:
    if kind == "imbsam":
        return ImbSAM(model.parameters(), SGD[0], rho=0.3, **SGD[1]), "head-tail"
    if kind == "ccsam":
        groups = support.classifier_groups(getattr(model, "module", model))
        return CCSAM(groups, SGD[0], support.COUNTS, **RADIUS, **SGD[1]), "classes"
    objective = "per_group" if kind == "per_group" else "shared"
    params: Any = model.parameters()
    if kind == "marked":
        params = support.classifier_groups(getattr(model, "module", model))
    optimizer = GSA(params, SGD[0], GROUP_COUNTS, objective=objective, gram_every=every, **RADIUS, **SGD[1])
    return optimizer, "groups"


def grouped(ranks: Ranks, kind: str, ascent: str, every: int) -> dict[str, Any]:
    reductions: list[int] = []
    ddp = wrapped("mlp", reductions)
    optimizer, groups = build(kind, ddp, every)
    optimizer.bind(ddp, ascent)
    for i in range(GROUPED_STEPS):
        x, y = part(i, ranks.rank)
        optimizer.step(closure_of(ddp, x, y, groups))
    return {"reductions": len(reductions), "end": state(ddp), "skipped": float(optimizer.skipped)}


@pytest.mark.parametrize("ascent", ASCENTS)
@pytest.mark.parametrize(("kind", "every"), GROUPED)
def test_grouped_steps_reduce_once(runs: Runs, kind: str, every: int, ascent: str) -> None:
    """G + 1 backward passes, one reduction; a global ascent is that of the whole batch."""
    a, b = (run[f"{kind} {every} {ascent}"] for run in runs)
    assert a["reductions"] == b["reductions"] == GROUPED_STEPS
    assert a["skipped"] == 0
    assert all(torch.equal(p, q) for p, q in zip(a["end"], b["end"], strict=True))
    model = support.make()
    alone, groups = build(kind, model, every)
    for i in range(GROUPED_STEPS):
        x, y = support.batch(i, 40)
        alone.step(closure_of(model, x, y, groups))
    off = max(float((p - q).abs().max()) for p, q in zip(state(model), a["end"], strict=True))
    assert (off < 2e-5) == (ascent == "global"), off  # observed 4e-7 to 2e-6 global


# -- overflow and unused parameters --------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def forward(self, x: Tensor, used: int) -> Tensor:
        return self.parts[used](x) + self.parts[2](x)


def odd_ones(ranks: Ranks) -> dict[str, Any]:
    ddp = DistributedDataParallel(Branches(), find_unused_parameters=True)
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, weight_decay=0.1).bind(ddp)
    generator = torch.Generator().manual_seed(ranks.rank)
    for i in range(6):
        # step 2: nobody uses part 1; otherwise one process uses part 0 and the other part 1
        used = 0 if i == 2 else (i + ranks.rank) % 2
        factor = torch.inf if i == 4 and ranks.rank == 1 else 1.0
        before = state(ddp)

        def loss(used: int = used, factor: float = factor) -> Tensor:
            return ddp(torch.randn(5, 4, generator=generator), used).pow(2).mean() * factor

        with optimizer.first_pass():
            loss().backward()
        optimizer.first_step(zero_grad=True)
        loss().backward()
        optimizer.second_step(zero_grad=True)
        if i == 2:
            unused = all(torch.equal(p, q) for p, q in zip(before[2:4], state(ddp)[2:4], strict=True))
        if i == 4:
            untouched = all(torch.equal(p, q) for p, q in zip(before, state(ddp), strict=True))
    return {"end": state(ddp), "unused": unused, "untouched": untouched, "skipped": float(optimizer.skipped)}


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.between, self.last = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, support.CLASSES)

    def forward(self, x: Tensor, whole: bool) -> Tensor:
        h = torch.tanh(self.first(x.flatten(1)))
        return self.last(h + self.between(h) if whole else h)


def idle_layer(ranks: Ranks, bucket_view: bool) -> bool:
    """Whether a layer that a step does not use stays where it is, for all its momentum."""
    ddp = DistributedDataParallel(Sometimes(), find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    optimizer, groups = build("imbsam", ddp, 1)
    optimizer.bind(ddp, "global")
    for i in range(2):
        before = ddp.module.between.weight.detach().clone()
        x, y = part(i, ranks.rank)
        optimizer.step(closure_of(lambda x, i=i: ddp(x, i == 0), x, y, groups))
    return torch.equal(ddp.module.between.weight, before)


def complaint(work: Callable[[], object]) -> str:
    try:
        work()
    except ValueError as error:
        return str(error)
    return ""


def static(ranks: Ranks) -> list[str]:
    """What is said to DDP's static graph: by a local SAM, a global one, a global GSA."""
    ddp = DistributedDataParallel(support.make(), static_graph=True)
    gsa, _ = build("shared", ddp, 1)
    sam = SAM(support.make().parameters(), SGD[0], **SGD[1])
    return [
        complaint(lambda optimizer=optimizer, ascent=ascent: optimizer.bind(ddp, ascent))
        for optimizer, ascent in ((sam, "local"), (sam, "global"), (gsa, "global"))
    ]


def sharded(ranks: Ranks) -> list[str]:
    """What is said to parameters of FSDP, without and with `use_orig_params`, and of `fully_shard`."""
    models: list[nn.Module] = [
        FullyShardedDataParallel(nn.Linear(192, 6), device_id=torch.device("cpu"), use_orig_params=original)
        for original in (False, True)
    ]
    models.append(fully_shard(nn.Linear(192, 6), mesh=init_device_mesh("cpu", (ranks.world,))))
    return [complaint(lambda model=model: SAM(model.parameters(), SGD[0], **SGD[1])) for model in models]


def of_a_subgroup(ranks: Ranks) -> dict[str, Any]:
    """A global ascent of a module that reduces within a group of one: what other processes do has no part in it."""
    own = [torch.distributed.new_group([rank]) for rank in range(ranks.world)][ranks.rank]
    ddp = DistributedDataParallel(support.make(), process_group=own)
    optimizer, groups = build("shared", ddp, 1)
    optimizer.bind(ddp, "global")
    for i in range(2 + ranks.rank):  # a step that needs the other process would hang
        x, y = support.batch(i + 10 * ranks.rank, 40)
        optimizer.step(closure_of(ddp, x, y, groups))
    return {"end": state(ddp)}


def unbound(ranks: Ranks, kind: str, bind: bool, wrapped: bool = True, **options: Any) -> dict[str, Any]:
    """A step of an optimizer that knows of no DistributedDataParallel."""
    model = support.make()
    optimizer, groups = build(kind, model, 1)
    used = DistributedDataParallel(model, **options) if wrapped else model
    if bind:
        optimizer.bind(model)
    x, y = part(0, ranks.rank)
    said = complaint(lambda: optimizer.step(closure_of(used, x, y, groups)))
    return {"said": said, "end": state(model)}


def uneven(ranks: Ranks, kind: str, ascent: str) -> dict[str, Any]:
    """One process has a batch more than the other."""
    ddp = DistributedDataParallel(support.make())
    optimizer, groups = build(kind, ddp, 1)
    optimizer.bind(ddp, ascent)
    said = ""
    with ddp.join():
        for i in range(2 + ranks.rank):
            x, y = part(i, ranks.rank)
            said = said or complaint(lambda x=x, y=y: optimizer.step(closure_of(ddp, x, y, groups)))
            if said:  # as a run does
                break
    return {"said": said, "end": state(ddp)}


def overflow(ranks: Ranks, kind: str, ascent: str, scaled: bool) -> dict[str, Any]:
    """The second process's loss is infinite in the first pass of a step, and there alone."""
    ddp = DistributedDataParallel(support.make())
    optimizer, groups = build(kind, ddp, 1)
    optimizer.bind(ddp, ascent)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0) if scaled else None
    calls = iter(range(100))
    x, y = part(0, ranks.rank)

    def closure() -> tuple[Tensor, Tensor]:
        factor = torch.inf if next(calls) == 0 and ranks.rank == 1 else 1.0
        return group_losses(cross_entropy(ddp(x), y) * factor, support.table(groups)[y])

    before = state(ddp)
    optimizer.step(closure, scaler=scaler)
    if scaler is not None:
        scaler.update()
    same = all(torch.equal(p, q) for p, q in zip(before, state(ddp), strict=True))
    scale = None if scaler is None else scaler.get_scale()
    return {"same": same, "skipped": float(optimizer.skipped), "scale": scale, "end": state(ddp)}


def everything(ranks: Ranks) -> dict[str, Any]:
    """All of this file in one pair of processes: starting them costs more than the steps."""
    result = {"recipes": recipes(ranks), "odd": odd_ones(ranks), "static": static(ranks)}
    result["sharded"] = sharded(ranks)
    result["subgroup"] = of_a_subgroup(ranks)
    result |= {f"unbound {name}": unbound(ranks, *args, **options) for name, args, options in UNBOUND}
    result |= {f"uneven {kind} {ascent}": uneven(ranks, kind, ascent) for kind, ascent in UNEVEN}
    result |= {f"overflow {kind} {scaled}": overflow(ranks, kind, "global", scaled) for kind, scaled in OVERFLOWS}
    result["overflow local"] = overflow(ranks, "shared", "local", False)
    result["idle"] = [idle_layer(ranks, bucket_view) for bucket_view in (False, True)]
    for ascent in ASCENTS:
        result |= {f"sam {ascent} {how}": sam(ranks, ascent, how) for how in HOW}
        result |= {f"{kind} {every} {ascent}": grouped(ranks, kind, ascent, every) for kind, every in GROUPED}
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), everything)


def test_a_process_alone_neither_skips_nor_decides_what_is_used(runs: Runs) -> None:
    a, b = (run["odd"] for run in runs)
    assert all(torch.equal(p, q) for p, q in zip(a["end"], b["end"], strict=True))
    for result in (a, b):
        assert result["unused"]
        assert result["untouched"]
        assert result["skipped"] == 1
        assert all(torch.isfinite(p).all() for p in result["end"])


def test_a_layer_that_a_step_does_not_use_stays(runs: Runs) -> None:
    """Where gradients are views of DDP's buckets, it takes whatever p.grad holds for one."""
    for run in runs:
        assert run["idle"] == [True, True]


def test_a_static_graph_is_refused_where_a_pass_is_not_reduced(runs: Runs) -> None:
    for run in runs:
        local, reduced, grouped = run["static"]
        assert "static_graph=True" in local
        assert not reduced
        assert grouped == local


def test_sharded_parameters_are_refused_as_such(runs: Runs) -> None:
    for run in runs:
        assert len(run["sharded"]) == 3
        assert all("sharded parameters (FSDP, DTensor) are not supported: " in text for text in run["sharded"])


def test_a_global_ascent_is_that_of_the_modules_own_group(runs: Runs) -> None:
    for rank, run in enumerate(runs):
        model = support.make()
        alone, groups = build("shared", model, 1)
        for i in range(2 + rank):
            alone.step(closure_of(model, *support.batch(i + 10 * rank, 40), groups))
        assert all(torch.equal(p, q) for p, q in zip(state(model), run["subgroup"]["end"], strict=True))


@pytest.mark.parametrize("name", [name for name, _, _ in UNBOUND])
def test_reductions_that_the_optimizer_cannot_direct_are_refused(runs: Runs, name: str) -> None:
    """What works without them goes on working."""
    a, b = (run[f"unbound {name}"] for run in runs)
    refused = name in ("ccsam", "ccsam, inside", "static", "static, inside")
    same = all(torch.equal(p, q) for p, q in zip(a["end"], b["end"], strict=True))
    assert same == (name != "ccsam, each its own")
    for run in (a, b):
        assert ("optimizer.bind(ddp)" in run["said"]) == bool(run["said"]) == refused


@pytest.mark.parametrize(("kind", "ascent"), UNEVEN)
def test_uneven_inputs_are_refused_where_every_process_is_needed(runs: Runs, kind: str, ascent: str) -> None:
    a, b = (run[f"uneven {kind} {ascent}"] for run in runs)
    assert all(torch.equal(p, q) for p, q in zip(a["end"], b["end"], strict=True))
    for run in (a, b):
        assert ("DistributedDataParallel.join" in run["said"]) == bool(run["said"]) == (kind != "imbsam")


@pytest.mark.parametrize(("kind", "scaled"), OVERFLOWS)
def test_a_global_ascents_overflow_skips_the_step_of_all(runs: Runs, kind: str, scaled: bool) -> None:
    for run in runs:
        found = run[f"overflow {kind} {scaled}"]
        assert found["same"]
        assert found["skipped"] == 1
        assert found["scale"] == (2.0 if scaled else None)


def test_a_local_ascents_overflow_skips_nothing(runs: Runs) -> None:
    """The other processes do not know of it; the process itself does not climb."""
    a, b = (run["overflow local"] for run in runs)
    assert not a["same"]
    assert a["skipped"] == b["skipped"] == 0
    assert all(torch.equal(p, q) and torch.isfinite(p).all() for p, q in zip(a["end"], b["end"], strict=True))
