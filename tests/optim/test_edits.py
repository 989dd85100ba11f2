"""Param groups edited by hand, hooks, options of one group: what torch's own optimizers follow, these do, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ltfast.optim import GSA, SAM, FriendlySAM
from tests.optim import support
from tests.optim.support import BASES


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model[1].parameters())}, {"params": list(model[3].parameters()), "lr": 0.02}]


def replace(model: nn.Module, optimizer: Optimizer) -> None:
    """As growing networks do it: another Parameter with the old one's state."""
    old = model[1].weight
    new = nn.Parameter(old.detach().clone() * 1.1)
    optimizer.state[new] = optimizer.state.pop(old)
    optimizer.param_groups[0]["params"][0] = model[1].weight = new


def take_out(model: nn.Module, optimizer: Optimizer) -> None:
    del optimizer.param_groups[0]["params"][1]


def put_in(model: nn.Module, optimizer: Optimizer) -> None:
    model.append(nn.Linear(support.CLASSES, support.CLASSES).requires_grad_(True))
    with torch.no_grad():
        for p in model[-1].parameters():
            p.fill_(0.1)
    optimizer.param_groups[1]["params"].extend(model[-1].parameters())


def pop(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups.pop()


def reverse(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups.reverse()


def other_list(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.05


EDITS = [replace, take_out, put_in, pop, reverse, other_list]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edited_param_groups_are_followed(edit: Callable[..., None], base: str) -> None:
    kind, options = BASES[base]
    model, twin = support.make(), support.make()
    optimizer = SAM(groups_of(model), kind, rho=0.0, **options)
    theirs = kind(groups_of(twin), **options)
    for i in range(6):
        if i == 3:
            edit(model, optimizer)
            edit(twin, theirs)
        support.two_passes(model, optimizer, i)
        for p in twin.parameters():
            p.grad = None
        support.loss_of(twin, i).backward()
        theirs.step()
        for p in model.parameters():  # who is not in a group any more keeps a gradient
            p.grad = None
        assert support.distance(model, twin) < 1e-6, i  # observed 1e-7
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups


def test_averages_go_along_with_their_parameters() -> None:
    """Reversing the groups of an optimizer with state of its own changes nothing but the order."""
    models = [support.make(), support.make()]
    optimizers = [FriendlySAM(groups_of(m), support.SGD[0], rho=0.2, **support.SGD[1]) for m in models]
    for i in range(6):
        if i == 3:
            optimizers[0].param_groups.reverse()
        for model, optimizer in zip(models, optimizers, strict=True):
            support.two_passes(model, optimizer, i)
        assert support.distance(*models) < 1e-7, i
    first, second = (o.state_dict()["ltfast"]["averages"] for o in optimizers)
    assert torch.allclose(first[0], second[2])


def test_groups_edited_in_mid_step_are_an_error() -> None:
    model = support.make()
    optimizer = SAM(groups_of(model), torch.optim.SGD, lr=0.1)
    support.loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    support.loss_of(model, 0).backward()
    optimizer.param_groups.pop()
    with pytest.raises(RuntimeError, match="param_groups were changed in mid-step"):
        optimizer.second_step()


def test_groups_edited_under_an_anchor_are_an_error_whose_cure_works() -> None:
    model = support.make()
    optimizer = SAM(groups_of(model), torch.optim.SGD, lr=0.1)

    def anchor() -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.set_anchor([torch.ones_like(p) for p in params], [p.detach().clone() for p in params])

    anchor()
    optimizer.param_groups.pop()
    with pytest.raises(RuntimeError, match=r"call restore\(\) and set_anchor\(None\) first"):
        support.two_passes(model, optimizer, 0)
    optimizer.restore()
    optimizer.set_anchor(None)
    anchor()
    support.two_passes(model, optimizer, 0)


def test_an_empty_group_may_be_filled_later() -> None:
    model, late = support.make(), nn.Linear(support.CLASSES, support.CLASSES)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.add_param_group({"params": [], "lr": 0.3})
    support.two_passes(model, optimizer, 0)
    optimizer.param_groups[1]["params"].append(late.weight)
    model.append(late)
    before = late.weight.detach().clone(), late.bias.detach().clone()
    support.two_passes(model, optimizer, 1)
    assert not torch.equal(late.weight, before[0])
    assert torch.equal(late.bias, before[1])


def test_parameters_without_an_element_are_refused_at_once() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match="empty tensors only"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(0, 3))]})
    support.two_passes(model, optimizer, 0)


@pytest.mark.parametrize("who", ["optimizer", "model"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_a_gradient_set_to_zero_is_one(base: str, clip: bool, who: str) -> None:
    """As in torch: who had a gradient takes a step by zero then, decay, momentum and step count included."""
    kind, options = BASES[base]
    model, twin = support.make(), support.make()
    optimizer = SAM(model.parameters(), kind, rho=0.1, **options)
    theirs = kind(twin.parameters(), **options)
    for i in range(6):
        for m, o in ((model, optimizer), (twin, theirs)):
            (o if who == "optimizer" else m).zero_grad(set_to_none=False)
            x, _ = support.batch(i)
            hidden = m[2](m[1](m[0](x)))
            (hidden if i % 2 else m[3](hidden)).square().mean().backward()  # the last layer: every other step
            if clip:
                nn.utils.clip_grad_norm_(m.parameters(), 0.3)
        optimizer.second_step()
        theirs.step()
        assert support.distance(model, twin) < 1e-6, i  # observed 6e-8


def test_hooks_see_and_change_whole_state_dicts() -> None:
    model, twin = support.make(), support.make()
    optimizer = FriendlySAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    support.two_passes(model, optimizer, 0)
    optimizer.register_state_dict_post_hook(lambda _, packed: {"wrapped": packed, "keys": sorted(packed)})
    saved = optimizer.state_dict()
    assert saved["keys"] == ["ltfast", "param_groups", "state"]
    other = FriendlySAM(twin.parameters(), torch.optim.SGD, lr=0.5)
    other.register_load_state_dict_pre_hook(lambda _, given: given["wrapped"])
    other.load_state_dict(saved)
    twin.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (twin, other)):
        support.two_passes(m, o, 1)
    assert support.equal(model, twin)
    copy.deepcopy(optimizer)


def test_coupled_weight_decay_of_one_group() -> None:
    model, twin = support.make(), support.make()
    groups = [groups_of(m) for m in (model, twin)]
    for each in groups:
        each[1]["decoupled_weight_decay"] = False
    options = {"lr": 3e-3, "weight_decay": 0.3}
    optimizer, theirs = SAM(groups[0], torch.optim.AdamW, rho=0.0, **options), torch.optim.AdamW(groups[1], **options)
    for i in range(4):
        support.two_passes(model, optimizer, i)
        theirs.zero_grad()
        support.loss_of(twin, i).backward()
        theirs.step()
        assert support.distance(model, twin) < 1e-6, i  # observed 0


@pytest.mark.parametrize("friendly", [False, True])
def test_who_maximises_climbs_downhill(friendly: bool) -> None:
    """maximize of the objective -loss is minimising the loss."""
    kind = FriendlySAM if friendly else SAM
    model, twin = support.make(), support.make()
    optimizer = kind(model.parameters(), torch.optim.SGD, lr=0.05, rho=0.3)
    other = kind(twin.parameters(), torch.optim.SGD, lr=0.05, rho=0.3, maximize=True)
    for i in range(4):
        support.two_passes(model, optimizer, i)
        for take in (other.first_step, other.second_step):
            (-support.loss_of(twin, i)).backward()
            take(zero_grad=True)
        assert support.distance(model, twin) < 1e-6, i  # observed 6e-8


def test_group_losses_may_be_maximised() -> None:
    model, twin = support.make(), support.make()
    options = {"lr": 0.05, "rho_min": 0.1, "rho_max": 0.3}
    optimizer = GSA(model.parameters(), torch.optim.SGD, support.GROUP_COUNTS, **options)
    other = GSA(twin.parameters(), torch.optim.SGD, support.GROUP_COUNTS, maximize=True, **options)
    for i in range(3):
        optimizer.step(support.group_closure(model, i))
        closure = support.group_closure(twin, i)

        def negative(closure: Callable[[], tuple[Tensor, Tensor]] = closure) -> tuple[Tensor, Tensor]:
            losses, shares = closure()
            return -losses, shares

        other.step(negative)
        assert support.distance(model, twin) < 1e-6, i  # observed 6e-8


def test_group_losses_are_maximised_in_all_groups_or_none() -> None:
    model = support.make()
    optimizer = GSA(groups_of(model), torch.optim.SGD, support.GROUP_COUNTS, lr=0.1)
    optimizer.param_groups[0]["maximize"] = True
    before = support.bits(model)
    with pytest.raises(ValueError, match="maximize differs"):
        optimizer.step(support.group_closure(model, 0))
    assert support.same_bits(model, before)
