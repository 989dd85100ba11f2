"""What users do with `base_optimizer` itself: its state dicts, its hooks, its groups, and bases of their own."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from ltfast.optim import SAM
from tests.optim import support
from tests.optim.support import BASES, SGD
from tests.optim.test_foreign import GROUPED, passes


@pytest.mark.parametrize("base", BASES)
def test_a_state_dict_may_be_loaded_into_the_base_optimizer(base: str) -> None:
    """davda54's users checkpoint that one: its own state dict lacks the momentum."""
    kind, options = BASES[base]
    model = support.make()
    optimizer = SAM(model.parameters(), kind, rho=0.1, **options)
    passes(model, optimizer, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.base_optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file)
    twin = support.make(seed=1)
    theirs = SAM(twin.parameters(), kind, rho=0.1, **{**options, "lr": 7.0})
    twin.load_state_dict(weights)
    theirs.base_optimizer.load_state_dict(state)
    assert theirs.param_groups is theirs.base_optimizer.param_groups
    assert theirs.param_groups[0]["lr"] == options["lr"]
    assert theirs.param_groups[0]["rho"] == 0.1
    for i in range(3, 6):
        support.two_passes(model, optimizer, i)
        support.two_passes(twin, theirs, i)
    assert support.equal(model, twin)


def test_torchs_adamw_counts_on_from_the_state_dict_of_the_base_optimizer() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=1e-3)
    passes(model, optimizer, 5)
    torchs = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torchs.load_state_dict(optimizer.base_optimizer.state_dict())
    support.loss_of(model, 5).backward()
    torchs.step()
    assert [int(state["step"]) for state in torchs.state.values()] == [6] * 4


@pytest.mark.parametrize("base", [torch.optim.SGD, type("Unfused", (torch.optim.SGD,), {})])
def test_hooks_before_a_step_of_the_base_optimizer_act(base: Any) -> None:
    """They find theta and the final gradient, and what they do to either counts."""
    model = support.make()
    optimizer = SAM(model.parameters(), base, rho=0.5, lr=1.0)
    before, seen = copy.deepcopy(model), []

    def hook(*_: Any) -> None:
        seen.append(support.distance(model, before))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with torch.no_grad():
            model[3].bias.add_(1.0)

    optimizer.base_optimizer.register_step_pre_hook(hook)
    passes(model, optimizer)
    assert seen == [0]
    with torch.no_grad():
        model[3].bias.sub_(1.0)
    assert 0 < support.distance(model, before) < 1.1e-3


@pytest.mark.parametrize("kind", ["sam", "gsa"])
def test_hooks_before_a_step_find_gradients_without_the_loss_scale(kind: str) -> None:
    ends = []
    for scaled in (False, True):
        model = support.make()
        optimizer = SAM(model.parameters(), SGD[0], **SGD[1]) if kind == "sam" else GROUPED["gsa"][1](model)
        optimizer.base_optimizer.register_step_pre_hook(
            lambda *_, model=model: (nn.utils.clip_grad_norm_(model.parameters(), 0.1), None)[1]
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for i in range(3):
            if kind == "gsa":
                optimizer.step(support.group_closure(model, i), scaler=scaler)
            else:
                optimizer.step(
                    lambda model=model, i=i, scaler=scaler: scaler.scale(support.loss_of(model, i)).backward(),
                    scaler=scaler,
                )
                optimizer.zero_grad()
            scaler.update()
        ends.append(model)
    assert support.distance(ends[0], support.make()) > 0
    assert support.distance(*ends) < 1e-6  # observed 2e-8


def test_a_hook_that_raises_leaves_nothing_to_the_next_step() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)

    def hook(*_: Any) -> None:
        raise KeyError

    handle = optimizer.base_optimizer.register_step_pre_hook(hook)
    (support.loss_of(model, 0) * float("inf")).backward()
    optimizer.first_step(zero_grad=True)
    support.loss_of(model, 0).backward()
    with pytest.raises(KeyError):
        optimizer.second_step(zero_grad=True)
    handle.remove()
    before = copy.deepcopy(model)
    optimizer.zero_grad()
    support.loss_of(model, 0).backward()
    optimizer.second_step()
    assert not support.equal(model, before)
    assert int(optimizer.skipped) == 0


def test_hooks_find_theta_in_a_plain_step_of_the_base_after_an_edit_of_the_groups() -> None:
    model = support.make()
    optimizer = SAM(model[3].parameters(), SGD[0], rho=1.0, **SGD[1])
    optimizer.param_groups[0]["params"] += list(model[1].parameters())
    seen: list[float] = []
    before = copy.deepcopy(model)
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append(support.distance(model, before)))
    support.loss_of(model, 0).backward()
    optimizer.first_step()
    optimizer.base_optimizer.step()
    assert seen == [0]


def test_a_bad_first_gradient_is_skipped_with_hooks_too() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: None)
    before = copy.deepcopy(model)
    (support.loss_of(model, 0) * float("inf")).backward()
    optimizer.first_step(zero_grad=True)
    support.loss_of(model, 0).backward()
    optimizer.second_step()
    assert support.equal(model, before)
    assert int(optimizer.skipped) == 1


def test_a_group_that_the_base_optimizer_was_given_has_our_options() -> None:
    model = support.make()
    optimizer = SAM(model[1].parameters(), SGD[0], rho=0.2, **SGD[1])
    optimizer.base_optimizer.add_param_group({"params": list(model[3].parameters())})
    before = copy.deepcopy(model)
    passes(model, optimizer)
    assert optimizer.param_groups[1]["rho"] == 0.2
    assert not torch.equal(model[3].weight, before[3].weight)


class Counting(torch.optim.SGD):
    """Keeps something outside of `state`, and says so in its state dict."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        self.taken = 0

    def step(self, closure: Any = None) -> Any:
        self.taken += 1
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.taken = state_dict["taken"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "taken"})


@pytest.mark.parametrize("how", ["state dict", "deepcopy"])
def test_a_base_optimizer_may_have_a_state_dict_of_its_own(how: str) -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), Counting, lr=0.1, momentum=0.9)
    passes(model, optimizer, 3)
    if how == "deepcopy":
        twin, theirs = copy.deepcopy((model, optimizer))
    else:
        twin = copy.deepcopy(model)
        theirs = SAM(twin.parameters(), Counting, lr=0.5, momentum=0.9)
        theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert theirs.base_optimizer.taken == 3
    support.two_passes(model, optimizer, 3)
    support.two_passes(twin, theirs, 3)
    assert support.equal(model, twin)


def test_options_edited_in_a_state_dict_count_whatever_the_base() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), Counting, lr=0.1, momentum=0.9)
    passes(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.01
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == 0.01
    del optimizer.param_groups[0]["params"][1]  # and its groups may be edited by hand
    before = copy.deepcopy(model)
    passes(model, optimizer)
    assert torch.equal(model[1].bias, before[1].bias)
    assert not torch.equal(model[1].weight, before[1].weight)


def test_a_base_optimizer_that_is_none_of_torchs_is_refused() -> None:
    class Bare(torch.optim.Optimizer):
        def __init__(self, params: Any, **options: Any) -> None:
            self.param_groups, self.state, self.defaults = list(params), {}, options

        def step(self, closure: Any = None) -> None: ...

    with pytest.raises(ValueError, match=r"Bare does not call Optimizer.__init__"):
        SAM(support.make().parameters(), Bare, lr=0.1)
