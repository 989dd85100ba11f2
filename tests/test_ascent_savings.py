"""Options that make an ascent cheaper at the price of exactness: off they change nothing, on they do what they say."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ltfast.config import Config
from ltfast.data.base import Batch
from ltfast.errors import UserError
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.losses import membership_for
from ltfast.models import LongTailModel
from ltfast.objective import Forward, Objective
from ltfast.optim.rules import RULES, Rule
from ltfast.plan import flops_ratio
from ltfast.recipes import build_config, rule_of
from ltfast.step import TrainStep
from ltfast.update import Update
from tests.test_step import ALPHA, COUNTS, LR, TOLERANCE, difference, flat_of, make, take_step

SAM = RULES["sam"]


def pulled(net: LongTailModel, loss: Tensor) -> Tensor:
    return flat_of(list(torch.autograd.grad(loss, list(net.parameters()), allow_unused=False)))


def assign(net: LongTailModel, vector: Tensor) -> None:
    start = 0
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(vector[start : start + p.numel()].view_as(p))
            start += p.numel()


def whole_loss(net: LongTailModel, objective: Objective, batch: Batch) -> Tensor:
    b = batch.labels.numel()
    features = net.features(torch.cat(batch.views))
    return objective(net, features, net.project(features[b:]) if objective.kind == "bcl" else None, batch.labels).mean()


@pytest.mark.parametrize("name", ["sam", "gsa-exact"])
def test_everything_seen_is_the_exact_step(name: str) -> None:
    """A fraction that keeps all samples, and one view of one, take the partial path to the exact step's weights."""
    groups = "single" if name == "sam" else "groups"
    net, objective, batch = make("ce")
    all_samples, one_view = copy.deepcopy(net), copy.deepcopy(net)
    take_step(net, objective, batch, RULES[name], groups)
    take_step(all_samples, objective, batch, replace(RULES[name], ascent_fraction=0.99), groups)
    take_step(one_view, objective, batch, replace(RULES[name], ascent_views=1), groups)
    assert difference(net, all_samples) < TOLERANCE
    assert difference(net, one_view) < TOLERANCE


def test_ascent_on_half_of_view_one_equals_its_slow_twin() -> None:
    """eps from a_ce * CE(view 1) of every second sample; the descent from the whole loss of the whole batch."""
    net, objective, batch = make("bcl")
    object.__setattr__(objective, "a_ce", 1.7)
    twin, exact = copy.deepcopy(net), copy.deepcopy(net)
    take_step(net, objective, batch, replace(SAM, ascent_views=1, ascent_fraction=0.5), "single")
    take_step(exact, objective, batch, SAM, "single")

    twin.train()
    theta = flat_of([p.detach() for p in twin.parameters()])
    logits = twin(batch.views[0][::2])
    loss = 1.7 * objective.classification(logits, batch.labels[::2]).mean()
    one = torch.ones(len(COUNTS), 1)
    (seen,), _ = Forward(twin, objective).first_view(batch.views[0][::2], batch.labels[::2], one)
    torch.testing.assert_close(seen, loss)  # a radius that depends on the gradient's norm asks for a_ce
    params = [p for p in twin.parameters()]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    climb = flat_of([torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)])
    assign(twin, theta + 0.05 * climb / climb.norm())
    final = ALPHA * pulled(twin, whole_loss(twin, objective, batch)) + 1e-3 * theta
    assign(twin, theta - LR * final)
    assert difference(net, twin) < TOLERANCE
    assert difference(net, exact) > 20 * TOLERANCE


def test_between_ascents_the_last_perturbation_is_used_again() -> None:
    net, objective, batch = make("bcl")
    flat = FlatParameters(net.parameters())
    update = Update(flat, momentum=0.0)
    update.lr.fill_(LR)
    rule = replace(SAM, ascent_every=3)
    step = TrainStep(net, objective, flat, FlatBuffers(net), update, rule, membership_for("single", COUNTS))
    net.train()
    assert step.engine is not None
    kept = []
    for i in range(4):
        before, twin = flat.data.clone(), copy.deepcopy(net)
        step(batch)
        eps = step.engine.eps
        assert eps is not None
        kept.append(eps.clone())
        if i in (1, 2):
            twin.train()
            theta = flat_of([p.detach() for p in twin.parameters()])
            assign(twin, theta + flat_of(list(flat.views(eps))))
            assign(twin, theta - LR * pulled(twin, whole_loss(twin, objective, batch)))
            assert difference(net, twin) < TOLERANCE
        assert not torch.equal(flat.data, before)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[0], kept[3])


@pytest.mark.parametrize("saving", [{}, {"ascent_every": 2}, {"ascent_views": 1}, {"ascent_fraction": 0.5}])
def test_statistics_move_once_a_step_and_on_the_whole_batch(saving: dict[str, float]) -> None:
    net, objective, batch = make("bcl")
    take_step(net, objective, batch, replace(SAM, **saving), "single", steps=4)
    counts = {name: int(b) for name, b in net.named_buffers() if "tracked" in name}
    assert set(counts.values()) == {4}


@pytest.mark.parametrize(
    ("name", "saving", "expected"),
    [
        ("sam", {"ascent_every": 4}, 1.25),
        ("sam", {"ascent_fraction": 0.5}, 1.5),
        ("sam", {"ascent_views": 1}, 1 + 1 / 3),
        ("sam", {"ascent_every": 2, "ascent_views": 1, "ascent_fraction": 0.5}, 1 + 1 / 12),
        ("gsa-exact", {"ascent_views": 1}, 1 + 3 / 3),
        ("gsa-full", {"ascent_every": 2, "gram_every": 2}, 1 + 2 / 2),
    ],
)
def test_flops_relative_to_sgd(name: str, saving: dict[str, float], expected: float) -> None:
    """Counted on a ResNet-20 over whole cycles of ascents; G = 4."""
    rule: Rule = replace(RULES[name], **saving)
    cycle = rule.ascent_every * rule.gram_every
    flops = {}
    for key in (None, rule):
        net, objective, batch = make("bcl", "resnet20", 16)
        flat = FlatParameters(net.parameters())
        member = membership_for("single" if rule.groups == "one" else "groups", COUNTS, torch.tensor([0, 1, 2, 3, 3]))
        step = TrainStep(net, objective, flat, FlatBuffers(net), Update(flat), key, None if key is None else member)
        net.train()
        with FlopCounterMode(display=False) as counter:
            for _ in range(cycle if key is not None else 1):
                step(batch)
        flops[key] = counter.get_total_flops() / (cycle if key is not None else 1)
    assert flops[rule] / flops[None] == pytest.approx(expected, rel=0.03)
    assert flops_ratio(rule, 1 if rule.groups == "one" else 4) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("flags", [{"ascent_every": 2}, {"ascent_views": 1}, {"ascent_fraction": 0.3}])
def test_only_where_one_perturbation_serves_the_batch(flags: dict[str, float]) -> None:
    for method in ("gsa-paper", "bcl+imbsam"):
        with pytest.raises(UserError, match="ascent_every, ascent_views and ascent_fraction need one perturbation"):
            rule_of(build_config("digits-lt", method, {}, flags))
    assert rule_of(build_config("digits-lt", "bcl+sam", {}, flags)) == replace(SAM, **flags)


@pytest.mark.parametrize(("flag", "value"), [("ascent_every", 0), ("ascent_views", 2), ("ascent_fraction", 0.0)])
def test_bad_values_are_named(flag: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{flag}={value}"):
        rule_of(Config().with_(sharpness="sam", **{flag: value}))
