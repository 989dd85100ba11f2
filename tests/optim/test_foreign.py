"""What users and other libraries do between, around and under the passes: `.data` replaced, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ltfast.losses import cross_entropy, group_losses
from ltfast.optim import CCSAM, GSA, SAM, FocalSAM, FriendlySAM, ImbSAM
from tests.optim import support
from tests.optim.support import COUNTS, GROUP_COUNTS, SGD

RADIUS = {"C": 3.0, "rho_min": 5e-2, "rho_max": 4e-1}
GROUPED: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "imbsam": ("head-tail", lambda m: ImbSAM(m.parameters(), SGD[0], rho=0.5, **SGD[1])),
    "focal-sam": ("focal", lambda m: FocalSAM(m.parameters(), SGD[0], rho=0.5, **SGD[1])),
    "gsa": ("groups", lambda m: GSA(m.parameters(), SGD[0], GROUP_COUNTS, **RADIUS, **SGD[1])),
    "gsa, remembered": ("groups", lambda m: GSA(m.parameters(), SGD[0], GROUP_COUNTS, gram_every=4, **RADIUS, **SGD[1])),
    "gsa, per group": (
        "groups",
        lambda m: GSA(m.parameters(), SGD[0], GROUP_COUNTS, objective="per_group", **RADIUS, **SGD[1]),
    ),
    "cc-sam": ("classes", lambda m: CCSAM(support.classifier_groups(m), SGD[0], COUNTS, **RADIUS, **SGD[1])),
}  # fmt: skip


def passes(model: nn.Module, optimizer: Any, steps: int = 1) -> None:
    for i in range(steps):
        support.two_passes(model, optimizer, i)


def replaced(layer: nn.Module, *_: Any) -> None:
    """As max-norm layers do it in their forward pass."""
    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, 1e9)


@pytest.mark.parametrize("kind", ["sam", "friendly-sam", *GROUPED])
def test_a_forward_pass_may_replace_data(kind: str) -> None:
    models = [support.make(), support.make()]
    models[0][1].register_forward_pre_hook(replaced)
    for model in models:
        if kind in GROUPED:
            table, make = GROUPED[kind]
            optimizer = make(model)
            for i in range(3):
                optimizer.step(support.group_closure(model, i, table))
        else:
            passes(model, (SAM if kind == "sam" else FriendlySAM)(model.parameters(), SGD[0], rho=0.5, **SGD[1]), 3)
    assert support.distance(*models) == 0


def squeezed(layer: nn.Module, put: Callable[[nn.Module, Tensor], object]) -> None:
    """A max-norm that acts."""
    put(layer, torch.renorm(layer.weight.data, 2, 0, 0.4))


@pytest.mark.parametrize("kind", GROUPED)
def test_a_forward_pass_that_changes_the_weights_changes_what_climbs(kind: str) -> None:
    """Replacing `.data` and writing to it are the same: radius and scale are those of the new weights."""
    table, make = GROUPED[kind]
    models = [support.make(), support.make()]
    for model, put in zip(
        models, (lambda m, w: setattr(m.weight, "data", w), lambda m, w: m.weight.data.copy_(w)), strict=True
    ):
        for layer in (model[1], model[3]):
            layer.register_forward_pre_hook(lambda m, _, put=put: squeezed(m, put))
        optimizer = make(model)
        for group in optimizer.param_groups:
            group |= {"adaptive": True} if "adaptive" in group else {}
        for i in range(2):
            optimizer.step(support.group_closure(model, i, table))
    assert support.distance(*models) == 0


@pytest.mark.parametrize("kind", GROUPED)
def test_weights_that_were_set_through_data_count(kind: str) -> None:
    table, make = GROUPED[kind]
    models = [support.make(), support.make()]
    for how, model in enumerate(models):
        optimizer = make(model)
        optimizer.step(support.group_closure(model, 0, table))
        for p in model.parameters():
            if how:
                p.data = p.data * 0.5
            else:
                p.data.mul_(0.5)
        optimizer.step(support.group_closure(model, 1, table))
    assert support.distance(*models) == 0


def test_theta_comes_back_where_the_second_pass_replaced_data() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.5, **SGD[1])
    before = copy.deepcopy(model)
    support.loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)

    def second_pass() -> None:
        with optimizer.perturbed():
            for p in model.parameters():
                p.data = p.data.clone()
            raise KeyError

    with pytest.raises(KeyError):
        second_pass()
    assert support.equal(model, before)
    twin = SAM(before.parameters(), SGD[0], rho=0.5, **SGD[1])
    passes(model, optimizer, 2)
    passes(before, twin, 2)
    assert support.equal(model, before)


def test_groups_edited_before_the_first_step_are_followed() -> None:
    """The step's statistics, which decide whether it is skipped, are those of the new layout."""
    models = [support.make(), support.make()]
    for edited, model in enumerate(models):
        params = list(model[1].parameters())
        optimizer = GSA(params[:1] if edited else params, SGD[0], GROUP_COUNTS, **RADIUS, **SGD[1])
        if edited:
            optimizer.param_groups[0]["params"] += params[1:]
        optimizer.step(support.group_closure(model, 0))
        assert optimizer.stats is optimizer.ascent.stats
    assert support.equal(*models)


@pytest.mark.parametrize("kind", GROUPED)
def test_reentrant_checkpointing_of_what_climbs_is_refused(kind: str) -> None:
    """autograd.grad does not see what it hides: those layers would never climb. (CC-SAM climbs with the classifier only.)"""
    table, make = GROUPED[kind]
    x, y = support.batch(0)
    ends = []
    for reentrant in (None, False, True):
        model = support.make()
        optimizer = make(model)

        def closure(model: nn.Module = model, reentrant: bool | None = reentrant) -> tuple[Tensor, Tensor]:
            h = x.clone().requires_grad_()
            h = model[:3](h) if reentrant is None else checkpoint(model[:3], h, use_reentrant=reentrant)
            return group_losses(cross_entropy(model[3](h), y), support.table(table)[y])

        if reentrant and kind != "cc-sam":
            before = copy.deepcopy(model)
            with pytest.raises(ValueError, match="use_reentrant=False"):
                optimizer.step(closure)
            assert support.equal(model, before)
        else:
            optimizer.step(closure)
            ends.append(model)
    assert all(support.equal(ends[0], end) for end in ends[1:])


# -- state, gradients, scaling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_a_checkpoint_may_be_loaded_between_the_passes(order: str) -> None:
    """After a NaN in the second pass one goes back to the last checkpoint."""
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.5, **SGD[1])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    passes(model, optimizer, 3)
    support.loss_of(model, 3).backward()
    optimizer.first_step(zero_grad=True)
    if order == "model first":
        model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if order != "model first":
        model.load_state_dict(saved[0])
    twin = support.make()
    passes(model, optimizer, 2)
    passes(twin, SAM(twin.parameters(), SGD[0], rho=0.5, **SGD[1]), 2)
    assert support.equal(model, twin)


def test_a_state_dict_between_the_passes_takes_the_ascent_back_where_nothing_was_written() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.5, **SGD[1])
    saved, before = optimizer.state_dict(), copy.deepcopy(model)
    support.loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    with torch.no_grad():
        model[3].bias.fill_(3.0)
    model[1].bias.data = torch.ones(17)
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        before[3].bias.fill_(3.0)
        before[1].bias.fill_(1.0)
    assert support.equal(model, before)


def test_state_of_the_optimizer_as_a_whole_is_kept() -> None:
    """As MADGRAD keeps its step count: torch's state dicts allow keys that are no parameters."""
    model = support.make()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=1e-3)
    optimizer.state["epoch"] = 3
    passes(model, optimizer)
    optimizer.base_optimizer.step()  # torch's own
    twin = SAM(support.make().parameters(), torch.optim.AdamW, lr=1e-3)
    twin.load_state_dict(optimizer.state_dict())
    assert twin.state["epoch"] == 3


def test_what_users_keep_beside_a_parameter_is_loaded_again() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=1e-3)
    optimizer.state[model[1].weight]["ema"] = model[1].weight.detach().clone()
    passes(model, optimizer)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert "ema" in optimizer.state[model[1].weight]
    with pytest.raises(ValueError, match="exp_avg"):
        SAM(model.parameters(), torch.optim.SGD, lr=1e-3).load_state_dict(saved)
    twin = support.make()
    factors = SAM(twin.parameters(), torch.optim.Adafactor, lr=1e-3)
    passes(twin, factors)
    with pytest.raises(ValueError, match="row_var"):
        SAM(model.parameters(), torch.optim.SGD, lr=1e-3).load_state_dict(factors.state_dict())


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_of_parameters_put_in_by_hand_are_cleared(to_none: bool) -> None:
    model, twin = support.make(), support.make()
    optimizer = SAM(model[3].parameters(), SGD[0], rho=0.0, **SGD[1])
    theirs = SGD[0](twin[3].parameters(), **SGD[1])
    for net, each in ((model, optimizer), (twin, theirs)):
        support.loss_of(net, 0).backward()
        each.param_groups[0]["params"] += list(net[1].parameters())
        each.zero_grad(set_to_none=to_none)
        assert (net[1].weight.grad is None) == to_none
        support.loss_of(net, 1).backward()
        each.second_step() if net is model else each.step()
    assert support.distance(model, twin) < 1e-7  # observed 4e-9


def test_averages_of_parameters_put_in_by_hand_are_loaded() -> None:
    model = support.make()
    optimizer = FriendlySAM(model.parameters(), SGD[0], rho=0.5, **SGD[1])
    passes(model, optimizer, 3)
    twin = copy.deepcopy(model)
    theirs = FriendlySAM(list(twin[1].parameters()), SGD[0], rho=0.5, **SGD[1])
    theirs.param_groups[0]["params"] += list(twin[3].parameters())
    theirs.load_state_dict(optimizer.state_dict())
    support.two_passes(model, optimizer, 3)
    support.two_passes(twin, theirs, 3)
    assert support.equal(model, twin)


@pytest.mark.parametrize("how", ["calls", "closure"])
@pytest.mark.parametrize("kind", [SAM, FriendlySAM])
def test_the_first_gradient_may_be_unscaled_for_clipping(kind: Any, how: str) -> None:
    ends = []
    for scaled in (False, True):
        model = support.make()
        optimizer = kind(model.parameters(), SGD[0], rho=0.5, **SGD[1])
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)

        def closure(model: nn.Module = model, scaler: torch.amp.GradScaler = scaler, step: int = 0) -> None:
            scaler.scale(support.loss_of(model, step)).backward()

        for step in range(3):
            closure(step=step)
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if how == "closure":
                optimizer.step(lambda step=step, closure=closure: closure(step=step), scaler=scaler)
            else:
                optimizer.first_step(zero_grad=True, scaler=scaler)
                closure(step=step)
                scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(model)
    assert support.distance(*ends) < 1e-6  # observed 3e-8


def test_an_overflow_that_unscaling_before_the_first_step_found_skips_the_step() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.5, **SGD[1])
    scaler, before = torch.amp.GradScaler("cpu", init_scale=256.0), copy.deepcopy(model)
    scaler.scale(support.loss_of(model, 0) * float("inf")).backward()
    scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True, scaler=scaler)
    scaler.scale(support.loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert support.equal(model, before)
    assert scaler.get_scale() == 128


@pytest.mark.parametrize("kind", ["sam", "imbsam"])
def test_a_scaler_step_that_would_not_unscale_says_which_call_does(kind: str) -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], **SGD[1]) if kind == "sam" else GROUPED[kind][1](model)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=1024.0), copy.deepcopy(model)
    scaler.scale(support.loss_of(model, 0)).backward()
    if kind == "sam":
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"optimizer.step\(closure, scaler=scaler\)"):
        scaler.step(optimizer, support.group_closure(model, 0, "head-tail"))
    assert support.equal(model, before)


def test_unscaled_gradients_of_before_have_no_part_in_a_grouped_step() -> None:
    table, make = GROUPED["gsa"]
    models = [support.make(), support.make()]
    for stale, model in enumerate(models):
        optimizer = make(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        if stale:
            scaler.scale(support.loss_of(model, 5)).backward()
            scaler.unscale_(optimizer)
        optimizer.step(support.group_closure(model, 0, table), scaler=scaler)
        scaler.update()
    assert support.equal(*models)


def test_parameters_without_memory_are_named() -> None:
    with pytest.raises(ValueError, match="meta device"):
        SAM(nn.Linear(3, 2, device="meta").parameters(), SGD[0], **SGD[1])
