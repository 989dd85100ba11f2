"""No step makes the host wait for the device: counted call by call on the CPU, and by CUDA itself on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from ltfast.config import Config
from ltfast.data import load
from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.losses import membership_for
from ltfast.optim.rules import RULES, Rule
from ltfast.preserve import Anchor
from ltfast.progress import Progress
from ltfast.recipes import SHARPNESS_SOURCES, build_config
from ltfast.scaler import LossScale
from ltfast.step import TrainStep
from ltfast.survive import Signals
from ltfast.train import Trainer
from ltfast.update import Update
from tests.syncs import Waits
from tests.test_step import COUNTS, GROUPS, make

STEPS = 5
MEMBERSHIP = {"one": "single", "class": "classes", "head-tail": "head-tail", "focal": "focal", "bank": "groups"}
OPTIONS: dict[str, Rule | None] = {
    "plain": None,
    **{name: RULES[name] for name in SHARPNESS_SOURCES},
    "gsa-full": replace(RULES["gsa-full"], gram_every=3),
    "per group, all parameters": Rule(groups="bank", direction="orthogonal", objective="per_group", adaptive=True, rho=None),
    "partial ascents": Rule(rho=0.05, ascent_every=3, ascent_views=1, ascent_fraction=0.5),
}  # fmt: skip
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def step_of(rule: Rule | None, device: str, optimizer: str, **options: Any) -> tuple[TrainStep, Batch]:
    net, objective, batch = make("bcl")
    net, counts = net.to(device), COUNTS.to(device)
    object.__setattr__(objective, "counts", counts)
    batch = Batch(tuple(v.to(device) for v in batch.views), batch.labels.to(device), batch.index.to(device))
    flat = FlatParameters(net.parameters())
    update = Update(flat, kind=optimizer, weight_decay=1e-3, **options)
    update.lr.fill_(0.1)
    update.anchor = Anchor(torch.ones_like(flat.data), torch.zeros_like(flat.data))
    membership = None if rule is None else membership_for(MEMBERSHIP[rule.groups], COUNTS, GROUPS)
    net.train()
    return TrainStep(net, objective, flat, FlatBuffers(net), update, rule, membership), batch


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_waits_for_nothing(name: str, device: str) -> None:
    rule = OPTIONS[name]
    options = {"clip": 1.0} if name == "sam" else {"scaler": LossScale(torch.device(device))} if name == "plain" else {}
    step, batch = step_of(rule, device, "adamw" if name == "gsa-paper" else "sgd", **options)
    step(batch)  # the first step makes its constants
    if device == "cpu":
        with Waits() as waits:
            for _ in range(STEPS):  # mode R refreshes its Gram matrix among them
                step(batch)
        assert not waits.found
        return
    step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waits_are_noticed() -> None:
    x = torch.randn(5)
    for wait in (
        lambda: float(x.sum()), lambda: bool(x[0] > 0), lambda: x[x > 0], lambda: x.nonzero(),
        lambda: torch.equal(x, x), lambda: torch.tensor([0.0, 1.0]), lambda: x.masked_select(x > 0),
        lambda: x.clone().index_put_((x > 0,), torch.zeros(())),
    ):  # fmt: skip
        with Waits() as waits:
            wait()
        assert sum(waits.found.values()) > 0


@pytest.mark.parametrize("views", ["digits", "crop", "cifar"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_making_a_batch_waits_for_nothing(views: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a device: on the CPU, which waits for nothing, apply_where computes the chosen samples only."""
    from ltfast.data.augment import recipe

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made = recipe(views, 3, mean=(0.5,) * 3, std=(0.2,) * 3)
    source: Any = load("digits-lt", batch=64, num_views=3, device=device)
    if views == "cifar":
        source.images["train"] = source.images["train"].expand(-1, 3, -1, -1).repeat(1, 1, 4, 4).contiguous()
        source.views = tuple(view.to(device) for view in made)
    indices, key = source.epoch_indices(0), source.epoch_key(0)
    source.make_batch(indices[0], key)
    if device == "cpu":
        with Waits() as waits:
            source.make_batch(indices[1], key)
        assert not waits.found
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        source.make_batch(indices[1], key)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watched(Progress):
    """Notes how many waits there were up to each step."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self.seen: list[int] = []

    def step(self, *values: Any) -> None:
        self.seen.append(sum(self.waits.found.values()))


@pytest.fixture
def trained() -> Iterator[Trainer]:
    config: Config = build_config(
        "digits-lt", "gsa-full+gkp", {}, {"epochs": 2, "scout": 0.5, "fisher_budget": 16, "batch": 16, "device": "cpu"}
    )
    trainer = Trainer(config, None, Ranks(), Progress())
    with Signals(False) as signals:
        trainer.guard(signals)
        yield trainer


def test_an_epoch_waits_for_nothing_between_its_steps(trained: Trainer) -> None:
    """Scouting, then grouped with GKP: whatever an epoch reads, it reads before its first step and after its last."""
    for epoch in range(2):
        if trained.grouping_due(epoch):
            trained.group()
        waits = Waits()
        trained.progress = watched = Watched(waits)
        with waits:
            trained.train_epoch(epoch)
        steps = trained.source.steps_per_epoch
        assert len(watched.seen) == steps
        # BadSteps reads its counter every 20 steps; on CUDA that is a copy put under way 20 steps earlier.
        reads = steps // trained.config.run.max_bad_steps + 1
        assert sum(b > a for a, b in pairwise(watched.seen[1:])) <= reads < steps // 4
        trained.remember(epoch)
        trained.summary()
        trained.batch = 0
