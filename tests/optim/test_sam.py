"""SAM as a drop-in: the protocol of davda54/sam, param groups, schedulers, BatchNorm, counted cost."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from ltfast.kernels import counting
from ltfast.optim import SAM, frozen_statistics
from ltfast.optim.reference import sam_step
from tests.optim import support
from tests.optim.support import BASES, SGD

# -- the protocol ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES)
def test_step_with_a_closure_equals_the_two_calls(base: str) -> None:
    kind, options = BASES[base]
    a, b, c = (support.make() for _ in range(3))
    first, second, third = (SAM(m.parameters(), kind, rho=0.3, **options) for m in (a, b, c))
    for i in range(5):
        support.two_passes(a, first, i)
        support.loss_of(b, i).backward()  # davda54: gradients are there already
        second.step(lambda i=i: support.loss_of(b, i).backward())
        second.zero_grad()
        third.step(lambda i=i: support.loss_of(c, i).backward())  # Lightning: the closure is all there is
    assert support.equal(a, b)
    assert support.equal(a, c)


def test_closure_runs_once_more_only_if_no_gradient_has_come() -> None:
    model = support.make()
    calls = support.counted(model)
    optimizer = SAM(model.parameters(), SGD[0], **SGD[1])

    def closure() -> Tensor:
        loss = support.loss_of(model, 0)
        loss.backward()
        return loss.detach()

    expected = [(closure(), optimizer.step(closure))[1], optimizer.step(closure), optimizer.step(closure)]
    assert calls() == 2 + 2 + 2
    assert all(isinstance(value, Tensor) for value in expected)
    optimizer.zero_grad()
    optimizer.step(closure)
    assert calls() == 8


def test_gradients_stay_after_the_step_and_storage_never_moves() -> None:
    model = support.make("conv")
    optimizer = SAM(model.parameters(), SGD[0], rho=0.2, **SGD[1])
    pointers = [p.data_ptr() for p in model.parameters()]
    for i in range(3):
        optimizer.zero_grad()
        support.loss_of(model, i).backward()
        optimizer.first_step(zero_grad=True)
        support.loss_of(model, i).backward()
        final = [p.grad.clone() for p in model.parameters()]
        optimizer.second_step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), final, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_second_step_alone_is_the_base_optimizers_step() -> None:
    model, twin = support.make(), support.make()
    optimizer, base = SAM(model.parameters(), SGD[0], **SGD[1]), SGD[0](twin.parameters(), **SGD[1])
    for i in range(3):
        for m in (model, twin):
            m.zero_grad()
            support.loss_of(m, i).backward()
        optimizer.second_step()
        base.step()
    assert support.distance(model, twin) < 1e-7  # observed 3e-8


def test_gradient_accumulation() -> None:
    model, twin = support.make(), support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    base = SGD[0](twin.parameters(), **SGD[1])

    def halves(m: nn.Module, i: int) -> Tensor:
        return (support.loss_of(m, i) + support.loss_of(m, i + 1)) / 2

    for i in range(4):
        for j in (i, i + 1):
            (support.loss_of(model, j) / 2).backward()
        optimizer.first_step(zero_grad=True)
        for j in (i, i + 1):
            (support.loss_of(model, j) / 2).backward()
        optimizer.second_step(zero_grad=True)
        sam_step(base, list(twin.parameters()), lambda i=i: halves(twin, i), 0.3)
    assert support.distance(model, twin) < 1e-6  # observed 6e-8


def test_clipping_acts_on_the_final_gradient() -> None:
    model, twin = support.make(), support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    base = SGD[0](twin.parameters(), **SGD[1])
    for i in range(4):
        support.loss_of(model, i).backward()
        optimizer.first_step(zero_grad=True)
        support.loss_of(model, i).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.second_step(zero_grad=True)
        step, base.step = base.step, lambda: (nn.utils.clip_grad_norm_(twin.parameters(), 0.1), step())  # noqa: B023
        sam_step(base, list(twin.parameters()), lambda i=i: support.loss_of(twin, i), 0.3)
        base.step = step
    assert support.distance(model, twin) < 1e-6  # observed 6e-8
    assert optimizer.gathered % len(list(model.parameters())) == 0  # always all of them in one gather


def test_schedulers_see_lr_momentum_and_rho() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.1, **SGD[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=6)
        for i in range(3):
            support.two_passes(model, optimizer, i)
            cosine.step()
            cycle.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] != SGD[1]["lr"]
    before = support.make()
    before.load_state_dict(model.state_dict())
    optimizer.param_groups[0]["rho"] = 0.0
    support.loss_of(model, 0).backward()
    optimizer.first_step()
    assert support.equal(model, before)


def test_learning_rate_as_a_tensor() -> None:
    model, twin = support.make(), support.make()
    a = SAM(model.parameters(), torch.optim.SGD, lr=torch.tensor(0.03), momentum=0.9)
    b = SAM(twin.parameters(), torch.optim.SGD, lr=0.03, momentum=0.9)
    for i in range(2):
        support.two_passes(model, a, i)
        support.two_passes(twin, b, i)
    assert support.equal(model, twin)


# -- param groups ------------------------------------------------------------------------------------------------------------


def grouped(model: nn.Module, **more: object) -> list[dict]:
    first, *rest = list(model.parameters())
    return [
        {"params": [first], "lr": 0.03, "rho": 0.4, "weight_decay": 0.0, "adaptive": True},
        {"params": rest[:2], "rho": 0.1, "momentum": 0.5},
        {"params": rest[2:], "rho": 0.1, **more},
    ]


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_groups_have_their_own_options(base: str) -> None:
    """One gradient norm for all groups, each with its own rho and scaling, as davda54's."""
    kind, options = BASES[base]
    model, twin = support.make(), support.make()
    optimizer = SAM(grouped(model), kind, rho=0.2, **options)
    groups = grouped(twin)
    theirs = kind(groups, **options)
    for i in range(5):
        support.two_passes(model, optimizer, i)
        theirs.zero_grad()
        support.loss_of(twin, i).backward()
        s = {p: p.detach().abs() if g.get("adaptive") else torch.ones_like(p) for g in groups for p in g["params"]}
        norm = sum((s[p] * p.grad).pow(2).sum() for p in twin.parameters()).sqrt()
        eps = {p: g["rho"] / norm * s[p] ** 2 * p.grad for g in groups for p in g["params"]}
        kept = {p: p.detach().clone() for p in twin.parameters()}
        theirs.zero_grad()
        with torch.no_grad():
            for p in twin.parameters():
                p += eps[p]
        support.loss_of(twin, i).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p.copy_(kept[p])
        theirs.step()
    assert support.distance(model, twin) < 1e-6  # observed 1e-7


def test_a_group_added_later() -> None:
    model, twin = support.make(), support.make()
    head, twin_head = model[-1], twin[-1]
    optimizer = SAM(model[:-1].parameters(), SGD[0], rho=0.2, **SGD[1])
    base = SGD[0](twin[:-1].parameters(), **SGD[1])
    for i in range(6):
        if i == 3:
            optimizer.add_param_group({"params": head.parameters(), "lr": 0.02})
            base.add_param_group({"params": twin_head.parameters(), "lr": 0.02})
        support.two_passes(model, optimizer, i)
        params = [p for g in base.param_groups for p in g["params"]]
        sam_step(base, params, lambda i=i: support.loss_of(twin, i), 0.2)
        twin_head.zero_grad()
        if i < 3:
            head.zero_grad()
    assert support.distance(model, twin) < 1e-6  # observed 3e-8
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": head.parameters()})
    with pytest.raises(ValueError, match="float64"):
        optimizer.add_param_group({"params": nn.Linear(2, 2).double().parameters()})
    assert len(optimizer.param_groups) == 2


# -- BatchNorm ---------------------------------------------------------------------------------------------------------------


def test_running_statistics_move_once_a_step() -> None:
    model, twin, other = support.make("conv"), support.make("conv"), support.make("conv")
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    bound = SAM(other.parameters(), SGD[0], rho=0.3, **SGD[1]).bind(other)
    for i in range(3):
        twin.load_state_dict(model.state_dict())
        support.loss_of(twin, i)
        support.loss_of(model, i).backward()
        optimizer.first_step(zero_grad=True)
        with frozen_statistics(model):
            support.loss_of(model, i).backward()
        optimizer.second_step(zero_grad=True)
        bound.step(lambda i=i: support.loss_of(other, i).backward())
        for ours, once in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(ours, once)
    assert support.equal(model, other)
    assert int(model[1].num_batches_tracked) == 3
    with frozen_statistics(model), pytest.raises(IndexError):
        model[0:2](torch.randn(4, 3, 8, 8))[9]
    assert int(model[1].num_batches_tracked) == 3


# -- cost --------------------------------------------------------------------------------------------------------------------


def many_tensors(count: int = 161) -> nn.Module:
    """As many tensors as ResNet-50 has."""
    return nn.ParameterList([torch.full((3 + i % 5,), 0.1 * i) for i in range(count)])


@pytest.mark.parametrize(
    ("base", "options", "kernels", "passes"),
    [
        ("sgd", {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}, 4, 10),
        ("sgd", {}, 4, 8),
        ("adamw", {}, 4, 12),
    ],
)
def test_counted_cost_of_a_step(base: str, options: dict, kernels: int, passes: float) -> None:
    model = many_tensors()
    optimizer = SAM(model.parameters(), BASES[base][0], rho=0.05, lr=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        sum(p.pow(2).sum() for p in model).backward()
        with counting() as up:
            optimizer.first_step(zero_grad=True)
        sum(p.pow(2).sum() for p in model).backward()
        with counting() as down:
            optimizer.second_step()
    assert up.kernels + down.kernels == kernels
    assert up.passes + down.passes == passes
    assert optimizer.gathered == 3 * 2 * len(model)  # one gather of autograd's own tensors before each of the two
