"""Mixed precision: bf16 autocast, and fp16 loss scaling in every order people use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from ltfast.optim import CCSAM, GSA, SAM, FriendlySAM, ImbSAM
from tests.optim import support
from tests.optim.support import ADAMW, BASES, COUNTS, GROUP_COUNTS, SGD, bits, same_bits

SCALE = 2.0**13


def new_scaler(scale: float = SCALE) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=1000)


def loss(model: nn.Module, step: int, factor: float = 1.0) -> torch.Tensor:
    return support.loss_of(model, step) * factor


def by_keyword(model: nn.Module, optimizer: Any, scaler: GradScaler, step: int, factors: tuple[float, float]) -> None:
    """The documented way."""
    scaler.scale(loss(model, step, factors[0])).backward()
    optimizer.first_step(zero_grad=True, scaler=scaler)
    scaler.scale(loss(model, step, factors[1])).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def with_clipping(
    model: nn.Module, optimizer: Any, scaler: GradScaler, step: int, factors: tuple[float, float]
) -> None:
    """Unscale the final gradient, clip it (to no effect), step."""
    scaler.scale(loss(model, step, factors[0])).backward()
    optimizer.first_step(zero_grad=True, scaler=scaler)
    scaler.scale(loss(model, step, factors[1])).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def scaled_ascent(
    model: nn.Module, optimizer: Any, scaler: GradScaler, step: int, factors: tuple[float, float]
) -> None:
    """SAM's ascent does not depend on the scale, so it need not be unscaled."""
    scaler.scale(loss(model, step, factors[0])).backward()
    optimizer.first_step(zero_grad=True)
    scaler.scale(loss(model, step, factors[1])).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def updated_twice(
    model: nn.Module, optimizer: Any, scaler: GradScaler, step: int, factors: tuple[float, float]
) -> None:
    """What users of davda54/sam do: update() between the passes, so that unscale_ may be called again."""
    scaler.scale(loss(model, step, factors[0])).backward()
    scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True)
    scaler.update()
    scaler.scale(loss(model, step, factors[1])).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def with_closure(model: nn.Module, optimizer: Any, scaler: GradScaler, step: int, factors: tuple[float, float]) -> None:
    passes = iter(factors)
    optimizer.step(lambda: scaler.scale(loss(model, step, next(passes))).backward(), scaler=scaler)
    scaler.update()


def through_the_scaler(
    model: nn.Module, optimizer: Any, scaler: GradScaler, step: int, factors: tuple[float, float]
) -> None:
    scaler.scale(loss(model, step, factors[0])).backward()
    scaler.step(optimizer, lambda: scaler.scale(loss(model, step, factors[1])).backward())
    scaler.update()
    optimizer.zero_grad()


RECIPES = [by_keyword, with_clipping, scaled_ascent, updated_twice, with_closure, through_the_scaler]
TWO_PASS: dict[str, Callable[..., Any]] = {"sam": SAM, "friendly": FriendlySAM}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", TWO_PASS)
def test_scaling_changes_nothing_but_rounding(kind: str, recipe: Callable[..., None], base: str) -> None:
    if kind == "friendly" and recipe is scaled_ascent:
        pytest.skip("Friendly-SAM averages gradients, so it wants them unscaled")
    model, twin = support.make(), support.make()
    optimizer, plain = (
        TWO_PASS[kind](m.parameters(), BASES[base][0], rho=0.3, **BASES[base][1]) for m in (model, twin)
    )
    scaler = new_scaler()
    for i in range(4):
        recipe(model, optimizer, scaler, i, (1.0, 1.0))
        support.two_passes(twin, plain, i)
    assert support.distance(model, twin) < 1e-6  # observed 1e-7; powers of two
    assert scaler.get_scale() == SCALE
    assert float(optimizer.skipped) == 0


class Elsewhere:
    """A number on another GPU: the kernels refuse it."""

    def __init__(self, value: float) -> None:
        self.value = torch.tensor(value)

    def to(self, device: torch.device) -> torch.Tensor:
        return self.value.to(device)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_scaler_may_keep_its_scale_on_another_gpu(found_inf: float) -> None:
    """Of two optimizers with one scaler the second one's parameters lie elsewhere than the first loss did."""
    model, twin = support.make(), support.make()
    optimizer, plain = (SAM(m.parameters(), SGD[0], rho=0.3, **SGD[1]) for m in (model, twin))
    loss(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    loss(model, 0, SCALE).backward()
    optimizer.grad_scale, optimizer.found_inf = Elsewhere(SCALE), Elsewhere(found_inf)
    optimizer.step()
    if not found_inf:
        support.two_passes(twin, plain, 0)
    assert support.distance(model, twin) < 1e-6  # observed 1e-7; powers of two
    assert float(optimizer.skipped) == found_inf


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r is not scaled_ascent], ids=lambda f: f.__name__)
def test_averages_do_not_know_the_scale(recipe: Callable[..., None]) -> None:
    """A scale that stays cancels in the direction of Friendly-SAM; one that changes shows what the averages hold."""
    model, twin = support.make(), support.make()
    optimizer, plain = (FriendlySAM(m.parameters(), SGD[0], rho=0.3, **SGD[1]) for m in (model, twin))
    scaler = new_scaler()
    for i in range(4):
        recipe(model, optimizer, scaler, i, (1.0, 1.0))
        scaler.update(SCALE * 4.0 ** (i + 1))
        support.two_passes(twin, plain, i)
    assert support.distance(model, twin) < 1e-6  # observed 0; powers of two
    averages, expected = (o.state_dict()["ltfast"]["averages"] for o in (optimizer, plain))
    for index, average in averages.items():
        torch.testing.assert_close(average, expected[index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("where", ["first", "second", "both"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda f: f.__name__)
def test_overflow_in_either_pass_skips_the_step(recipe: Callable[..., None], where: str, base: str) -> None:
    model = support.make("conv")
    optimizer = SAM(model.parameters(), BASES[base][0], rho=0.3, **BASES[base][1])
    scaler = new_scaler()
    recipe(model, optimizer, scaler, 0, (1.0, 1.0))
    before = bits(model)
    state = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    factors = (torch.inf if where != "second" else 1.0, torch.inf if where != "first" else 1.0)
    recipe(model, optimizer, scaler, 1, factors)
    assert same_bits(model, before)
    for p, values in state.items():
        for name, value in values.items():
            assert torch.equal(optimizer.state[p][name], value), name
    told = not (recipe is scaled_ascent and where == "first") and not (
        recipe is through_the_scaler and where == "second"
    )
    assert (scaler.get_scale() < SCALE) == told
    assert float(optimizer.skipped) == 1
    recipe(model, optimizer, scaler, 2, (1.0, 1.0))
    assert not same_bits(model, before)
    assert all(torch.isfinite(p).all() for p in model.parameters())


GROUPED: dict[str, tuple[Callable[..., Any], str]] = {
    "gsa": (lambda m: GSA(m.parameters(), SGD[0], GROUP_COUNTS, **SGD[1]), "groups"),
    "gsa-r": (lambda m: GSA(m.parameters(), SGD[0], GROUP_COUNTS, gram_every=2, **SGD[1]), "groups"),
    "gsa-r marked": (
        lambda m: GSA(support.classifier_groups(m), SGD[0], GROUP_COUNTS, gram_every=2, **SGD[1]),
        "groups",
    ),
    "gsa-friendly": (lambda m: GSA(m.parameters(), ADAMW[0], GROUP_COUNTS, direction="friendly", **ADAMW[1]), "groups"),
    "gsa-per-group": (lambda m: GSA(m.parameters(), SGD[0], GROUP_COUNTS, objective="per_group", **SGD[1]), "groups"),
    "imbsam": (lambda m: ImbSAM(m.parameters(), SGD[0], rho=0.3, **SGD[1]), "head-tail"),
    "cc-sam": (lambda m: CCSAM(support.classifier_groups(m), SGD[0], COUNTS, **SGD[1]), "classes"),
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped_optimizers_take_the_scaler(name: str, clip: bool) -> None:
    make, kind = GROUPED[name]
    model, twin = support.make(), support.make()
    optimizer, plain, scaler = make(model), make(twin), new_scaler()

    def clipped(m: nn.Module) -> Any:
        return (lambda: nn.utils.clip_grad_norm_(m.parameters(), 0.1)) if clip else None

    for i in range(4):
        optimizer.step(support.group_closure(model, i, kind), scaler=scaler, on_gradient=clipped(model))
        scaler.update()
        plain.step(support.group_closure(twin, i, kind), on_gradient=clipped(twin))
    assert support.distance(model, twin) < 1e-6  # observed 1e-7
    assert float(optimizer.skipped) == float(plain.skipped) == 0


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_overflow_skips_and_lowers_the_scale(name: str) -> None:
    make, kind = GROUPED[name]
    model = support.make()
    optimizer, scaler = make(model), new_scaler()
    optimizer.step(support.group_closure(model, 0, kind), scaler=scaler)
    scaler.update()
    before, saved = bits(model), optimizer.state_dict()["ltfast"]
    closure = support.group_closure(model, 1, kind)

    def overflowing() -> tuple[torch.Tensor, torch.Tensor]:
        losses, shares = closure()
        return losses * torch.inf, shares

    optimizer.step(overflowing, scaler=scaler)
    scaler.update()
    assert same_bits(model, before)
    assert scaler.get_scale() < SCALE
    assert float(optimizer.skipped) == 1
    after = optimizer.state_dict()["ltfast"]
    for index, value in saved.get("averages", {}).items():
        assert torch.equal(after["averages"][index], value)
    if "memory" in saved["engine"]:
        assert torch.equal(after["engine"]["memory"], saved["engine"]["memory"])
    optimizer.step(closure, scaler=scaler)
    scaler.update()
    assert not same_bits(model, before)


@pytest.mark.parametrize("base", BASES)
def test_an_anchor_and_its_alpha_know_nothing_of_the_scale(base: str) -> None:
    model, twin = support.make(), support.make()
    optimizer, plain = (SAM(m.parameters(), BASES[base][0], rho=0.3, **BASES[base][1]) for m in (model, twin))
    for own in (optimizer, plain):
        pulls = [torch.ones_like(p) for p in model.parameters()]
        own.set_anchor(pulls, [torch.zeros_like(p) for p in pulls], 0.3, alpha=0.5)
    scaler = new_scaler()
    for i in range(4):
        by_keyword(model, optimizer, scaler, i, (1.0, 1.0))
        support.two_passes(twin, plain, i)
    assert support.distance(model, twin) < 1e-6


def test_a_disabled_scaler_is_transparent() -> None:
    model, twin = support.make(), support.make()
    optimizer, plain = (SAM(m.parameters(), SGD[0], rho=0.3, **SGD[1]) for m in (model, twin))
    scaler = GradScaler("cpu", enabled=False)
    for i in range(3):
        by_keyword(model, optimizer, scaler, i, (1.0, 1.0))
        support.two_passes(twin, plain, i)
    assert support.equal(model, twin)
