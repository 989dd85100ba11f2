"""Copies, loaded state and options changed in mid-run: none of it may go on with something else in silence."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltfast.losses import group_losses
from ltfast.optim import GSA, SAM, FriendlySAM
from tests.optim.test_surprises import SGD, batch, net, plain_closure, weights


def copied(how: str, pair: Any) -> Any:
    return copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_keep_what_was_set_on_the_optimizer(how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 5))
    late = nn.Linear(5, 5)
    optimizer = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9).bind(model, ascent="global")
    params = list(model.parameters())
    pulls = [torch.full_like(p, 0.5) for p in params]
    optimizer.set_anchor([None, *pulls[1:]], [None, *(-p for p in pulls[1:])], torch.tensor(0.3), alpha=0.8)
    optimizer.check_finite = True
    optimizer.add_param_group({"params": late.parameters()})
    twin, other = copied(how, (model, optimizer))
    assert other.check_finite
    assert other.alpha == 0.8
    assert other._model is twin
    assert other._ascent == "global"
    for m, o in ((model, optimizer), (twin, other)):
        for _ in range(2):
            o.step(plain_closure(m))
    assert torch.equal(weights(model), weights(twin))
    assert torch.equal(model[1].running_mean, twin[1].running_mean)
    optimizer.set_anchor(None)
    for m, o in ((model, optimizer), (twin, other)):
        o.step(plain_closure(m))
    assert not torch.equal(weights(model), weights(twin))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_between_the_passes_is_refused(how: str) -> None:
    model = net()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    plain_closure(model)()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="between the two passes"):
        copied(how, optimizer)
    optimizer.restore()
    copied(how, optimizer)


# step: what is set before it, for every group or (1) the second
CHANGES: dict[str, dict[int, tuple[int | None, dict[str, float]]]] = {
    "dampening on": {2: (None, {"dampening": 0.5})},
    "dampening off and on": {0: (None, {"dampening": 0.5}), 2: (None, {"dampening": 0.0}), 4: (None, {"dampening": 0.3})},
    "momentum on": {0: (None, {"momentum": 0.0}), 3: (None, {"momentum": 0.9})},
    "momentum on, dampened": {0: (None, {"momentum": 0.0, "dampening": 0.5}), 3: (None, {"momentum": 0.9})},
    "momentum on in one group": {0: (1, {"momentum": 0.0}), 2: (None, {"dampening": 0.5}), 4: (1, {"momentum": 0.9})},
    "momentum off and on": {2: (None, {"momentum": 0.0}), 4: (None, {"momentum": 0.9, "dampening": 0.5})},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_momentum_and_dampening_may_change_in_mid_run(change: str) -> None:
    """rho is 0, so every step is one of torch.optim.SGD; the last layer has no gradient in the first two."""
    model, twin = net(), net()
    groups = [[{"params": m[0].parameters()}, {"params": m[2].parameters()}] for m in (model, twin)]  # type: ignore[index]
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer, theirs = SAM(groups[0], SGD, rho=0.0, **options), SGD(groups[1], **options)
    for step in range(7):
        which, new = CHANGES[change].get(step, (None, {}))
        for o in (optimizer, theirs):
            for group in o.param_groups if which is None else [o.param_groups[which]]:
                group.update(new)
        for m, take in ((model, optimizer.second_step), (twin, theirs.step)):
            m.zero_grad()
            plain_closure(m)()
            if step < 2:
                m[2].weight.grad = None  # type: ignore[index]
            take()
        torch.testing.assert_close(weights(model), weights(twin), rtol=0, atol=1e-6)  # observed 6e-8
    shown = [set(s) for s in optimizer.state_dict()["state"].values()]
    assert shown == [set(s) for s in theirs.state_dict()["state"].values()]


def test_a_dict_of_other_groups_is_refused_before_anything_is_loaded() -> None:
    def made(counts: list[int], **options: Any) -> tuple[nn.Module, GSA]:
        model, (x, y) = net(), batch()
        optimizer = GSA(model.parameters(), SGD, counts, lr=0.1, momentum=0.9, **options)
        member = F.one_hot(y % len(counts), len(counts)).float()
        optimizer.step(lambda: group_losses(F.cross_entropy(model(x), y, reduction="none"), member))
        return model, optimizer

    for options in ({"gram_every": 4}, {}, {"direction": "friendly"}):
        _, optimizer = made([90, 10], **options)
        before = copy.deepcopy(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"3 groups.*2.*set_groups"):
            optimizer.load_state_dict(made([90, 10, 5], **options)[1].state_dict())
        after = optimizer.state_dict()
        assert torch.equal(after["state"][0]["momentum_buffer"], before["state"][0]["momentum_buffer"])
        assert after["param_groups"] == before["param_groups"]
        broken = copy.deepcopy(before)
        broken["param_groups"][0]["lr"] = float("nan")
        with pytest.raises(ValueError, match="lr is nan"):
            optimizer.load_state_dict(broken)


@pytest.mark.parametrize("base", [SGD, torch.optim.RMSprop])
def test_averages_of_f_sam_load_whatever_the_base(base: Any) -> None:
    model = net()
    optimizer = FriendlySAM(model.parameters(), base, lr=0.01)
    dict_ = {k: v for k, v in optimizer.state_dict().items() if k != "ltfast"}
    dict_["state"] = {i: {"momentum": torch.full_like(p, i), "old_p": p} for i, p in enumerate(model.parameters())}
    optimizer.load_state_dict(dict_)
    held = optimizer.state_dict()["ltfast"]["averages"]
    assert [float(held[i].mean()) for i in range(4)] == [0, 1, 2, 3]
    assert not optimizer.state  # nothing that the base optimizer would take for its own
    for take in (optimizer.first_step, optimizer.second_step):
        plain_closure(model)()
        take(zero_grad=True)
    dict_["state"][2]["momentum"] = torch.zeros(3)
    with pytest.raises(ValueError, match="moving average of parameter 2"):
        optimizer.load_state_dict(dict_)


@pytest.mark.parametrize("how", ["at once", "state dict", "deepcopy"])
def test_an_average_begins_with_the_first_gradient_that_was_not_skipped(how: str) -> None:
    """The first step, and the last layer's first, are skipped."""
    model, other = net(), net()
    optimizer = FriendlySAM(model.parameters(), SGD, lr=0.1)
    first: dict[nn.Module, Tensor] = {}
    for step, factor in enumerate((float("nan"), 1.0, float("nan"), 1.0)):
        plain_closure(model, factor)()
        if step < 2:
            model[2].weight.grad = None  # type: ignore[index]
        for layer in (model[0], model[2]):  # type: ignore[index]
            if factor == 1.0 and layer.weight.grad is not None:
                first.setdefault(layer, layer.weight.grad.clone())
        optimizer.first_step()
        optimizer.second_step(zero_grad=True)
        if how == "state dict":
            other.load_state_dict(model.state_dict())
            loaded = FriendlySAM(other.parameters(), SGD, lr=0.1)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            first = {dict(zip(model, other, strict=True))[layer]: g for layer, g in first.items()}  # type: ignore[arg-type]
            (model, optimizer), (other, loaded) = (other, loaded), (model, optimizer)
        elif how == "deepcopy":
            model, optimizer, first = copy.deepcopy((model, optimizer, first))
    averages = optimizer.state_dict()["ltfast"]["averages"]
    assert torch.equal(averages[2][0], first[model[2]])  # type: ignore[index]
    assert not torch.equal(averages[0][0], first[model[0]])  # has moved since  # type: ignore[index]
    torch.testing.assert_close(averages[0][0], first[model[0]], rtol=0.5, atol=0.05)  # type: ignore[index]
