"""What an expert user does and a reviewer does not think of: schedules that end below zero, layers that change places, ..."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltfast.losses import group_losses
from ltfast.optim import CCSAM, GSA, SAM, FocalSAM

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 4
COUNTS = [9.0, 5.0, 3.0, 2.0]


def layer(n: int = 5, m: int = 3) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(n, m)


def two_passes(model: nn.Module, optimizer: Any, x: Tensor = X) -> None:
    for step in (optimizer.first_step, optimizer.second_step):
        model(x).pow(2).mean().backward()
        step(zero_grad=True)


def one_pass(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(X).pow(2).mean().backward()
    optimizer.step()


def test_a_schedule_that_ends_a_rounding_below_zero() -> None:
    model = layer()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=5)
    for _ in range(7):
        two_passes(model, optimizer)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] <= 0
    before = model.weight.detach().clone()
    two_passes(model, optimizer)
    assert torch.equal(model.weight, before)
    optimizer.param_groups[0]["lr"] = -0.1
    with pytest.raises(ValueError, match=r"lr is -0\.1"):
        two_passes(model, optimizer)


def test_nesterov_does_nothing_in_a_group_without_momentum() -> None:
    made = []
    for wrap in (True, False):
        a, b = layer(5, 4), layer(4, 3)
        model = nn.Sequential(a, b)
        groups = [{"params": a.parameters()}, {"params": b.parameters(), "momentum": 0.0}]
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
        optimizer: Any = (
            SAM(groups, torch.optim.SGD, rho=0.0, **options) if wrap else torch.optim.SGD(groups, **options)
        )
        for _ in range(3):
            (two_passes if wrap else one_pass)(model, optimizer)
        made.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*made)


def test_layers_that_change_places() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0)
    weights = [m.weight.detach().clone() for m in model]
    model[0].weight.data, model[1].weight.data, model[2].weight.data = (model[i].weight.data for i in (1, 2, 0))
    two_passes(model, optimizer, X[:, :4])
    assert all(torch.equal(m.weight, weights[i]) for m, i in zip(model, (1, 2, 0), strict=True))


def test_marked_groups_of_mode_r_need_not_be_neighbours() -> None:
    """The usual split of weights and biases."""

    def of(e: nn.Linear, h: nn.Linear) -> list[dict[str, Any]]:
        return [
            {"params": [e.weight]}, {"params": [h.weight], "classifier": True}, {"params": [e.bias], "weight_decay": 0.0},
            {"params": [h.bias], "classifier": True, "weight_decay": 0.0},
        ]  # fmt: skip

    encoder, head = layer(5, 7), layer(7, 4)
    optimizer = GSA(of(encoder, head), torch.optim.SGD, COUNTS, lr=0.1, gram_every=2, weight_decay=0.1)
    before = encoder.bias.detach().clone()
    for _ in range(4):
        optimizer.step(lambda: group_losses(F.cross_entropy(head(encoder(X)), Y, reduction="none"), torch.eye(4)[Y]))
    assert not torch.equal(encoder.bias, before)
    assert optimizer.ascent.refresh[1] == 1
    again = GSA(of(*copy.deepcopy((encoder, head))), torch.optim.SGD, COUNTS, lr=0.1, gram_every=2, weight_decay=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert [g["weight_decay"] for g in again.param_groups] == [0.1, 0.1, 0.0, 0.0]


def test_adamw_without_eps() -> None:
    made = []
    for wrap in (True, False):
        model = layer()
        optimizer: Any = (
            SAM(model.parameters(), torch.optim.AdamW, rho=0.0, adaptive=True, lr=0.01, eps=0.0)
            if wrap
            else torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.0)
        )
        for _ in range(4):
            (two_passes if wrap else one_pass)(model, optimizer)
        if wrap:
            assert int(optimizer.skipped) == 0
            assert optimizer.blocks[0].flat.data.isfinite().all(), "the padding stays zero"
        made.append(model.weight.detach())
    torch.testing.assert_close(*made)


def test_a_second_pass_without_a_gradient_under_a_scaler() -> None:
    encoder, head = layer(5, 7), layer(7, 4)
    optimizer = SAM(encoder.parameters(), torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    before = encoder.weight.detach().clone()
    scaler.scale(head(encoder(X)).sum()).backward()
    optimizer.first_step(True, scaler=scaler)
    scaler.scale(head(torch.ones(1, 7)).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(encoder.weight, before)
    assert not optimizer.climbed


def test_a_loss_that_is_not_finite_does_not_reach_the_encoder_of_a_frozen_classifier() -> None:
    encoder, head = layer(5, 7), layer(7, 4)
    groups = [{"params": encoder.parameters()}, {"params": head.parameters(), "classifier": True}]
    optimizer = GSA(groups, torch.optim.SGD, COUNTS, objective="per_group", scope="classifier", lr=0.1)
    head.requires_grad_(False)
    before = encoder.weight.detach().clone()
    for x, skipped in ((X * float("nan"), 1), (X, 1)):
        optimizer.step(
            lambda x=x: group_losses(F.cross_entropy(head(encoder(x)), Y, reduction="none"), torch.eye(4)[Y])
        )
        assert int(optimizer.skipped) == skipped
        assert torch.equal(encoder.weight, before) == bool(x.isnan().any())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: GSA(p, torch.optim.SGD, COUNTS, lr=0.1),
        lambda p: GSA(p, torch.optim.SGD, COUNTS, lr=0.1, gram_every=2),
        lambda p: GSA(p, torch.optim.SGD, COUNTS, lr=0.1, objective="per_group"),
        lambda p: CCSAM(p, torch.optim.SGD, COUNTS, lr=0.1, scope="all"),
    ],
)
def test_the_loss_of_a_group_that_is_absent_is_in_no_figure(make: Any) -> None:
    model = layer(5, 4)
    optimizer = make(model.parameters())
    present = Y[Y < 3]

    def closure() -> tuple[Tensor, Tensor]:
        per_sample = F.cross_entropy(model(X[Y < 3]), present, reduction="none")
        losses = torch.stack([per_sample[present == k].mean() for k in range(4)])  # that of group 3 is NaN
        return losses, torch.stack([(present == k).float().mean() for k in range(4)])

    for _ in range(3):
        loss = optimizer.step(closure)
        assert loss.isfinite()
    assert int(optimizer.skipped) == 0
    assert model.weight.isfinite().all()


def test_a_group_optimizer_whose_batch_uses_frozen_parameters_alone() -> None:
    model = layer(5, 4)
    optimizer = FocalSAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="do not depend on any parameter"):
        optimizer.step(lambda: (torch.zeros(2), torch.ones(2) / 2), scaler=torch.amp.GradScaler("cpu"))
    assert torch.equal(model.weight, before)
