"""Parameters without a gradient have no part in an ascent: they stay where they are and do not count in Eq. 13."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ltfast.optim import CCSAM, GSA, FriendlySAM
from ltfast.optim.reference import friendly_sam_step, gsa_step
from tests.optim import support

KIND, OPTIONS = support.SGD


def frozen_at(model: nn.Module, now: bool) -> None:
    for p in model[1].parameters():
        p.requires_grad_(not now)


@pytest.mark.parametrize("adaptive", [False, True])
def test_friendly_sam_leaves_a_layer_alone_that_has_no_gradient(adaptive: bool) -> None:
    """Its moving average pulled it along, and took most of the radius from the others."""
    model, twin = support.make(), support.make()
    optimizer = FriendlySAM(model.parameters(), KIND, rho=0.3, adaptive=adaptive, **OPTIONS)
    base = KIND(twin.parameters(), **OPTIONS)
    everything, rest = {}, {}
    for i in range(8):
        frozen = 3 <= i < 6
        for each in (model, twin):
            frozen_at(each, frozen)
        support.loss_of(model, i).backward()
        before = [p.detach().clone() for p in model[1].parameters()]
        average = optimizer.blocks[0].flat.views(optimizer.blocks[0].flat.grads[1])[0].clone()
        optimizer.first_step(zero_grad=True)
        moved = [not torch.equal(p, b) for p, b in zip(model[1].parameters(), before, strict=True)]
        assert moved == [not frozen] * 2
        held = optimizer.blocks[0].flat.views(optimizer.blocks[0].flat.grads[1])[0]
        assert torch.equal(held, average) == frozen
        support.loss_of(model, i).backward()
        optimizer.second_step(zero_grad=True)
        # The twin: averages of the trainable parameters alone while the layer is frozen.
        params = [p for p in twin.parameters() if p.requires_grad]
        if frozen:
            rest = rest or {"m": everything["m"][2:]}
        elif rest:
            everything, rest = {"m": [*everything["m"][:2], *rest["m"]]}, {}
        averages = rest if frozen else everything
        friendly_sam_step(
            base, params, lambda i=i: support.loss_of(twin, i), averages, rho=0.3, adaptive=adaptive
        )  # fmt: skip
        assert support.distance(model, twin) < 1e-6, i  # observed 6e-8


@pytest.mark.parametrize("objective", ["shared", "per_group"])
@pytest.mark.parametrize("direction", ["orthogonal", "friendly"])
def test_gsa_does_not_see_a_frozen_layer(direction: str, objective: str) -> None:
    """Neither in |theta| nor, of "friendly", by the averages it had begun before."""
    wide = {"C": 1.0, "rho_min": 0.0, "rho_max": 10.0, "direction": direction, "objective": objective}
    model, twin = support.make(), support.make()
    for each in (model, twin):
        frozen_at(each, direction == "orthogonal")
    optimizer = GSA(model.parameters(), KIND, support.GROUP_COUNTS, **wide, **OPTIONS)
    base = KIND(twin.parameters(), **OPTIONS)
    averages: dict = {}
    for i in range(6):
        if i == 3:
            for each in (model, twin):
                frozen_at(each, True)
            averages = {"m": {k: m[2:] for k, m in averages["m"].items()}} if averages else {}
        before = [p.detach().clone() for p in model[1].parameters()]
        optimizer.step(support.group_closure(model, i))
        params = [p for p in twin.parameters() if p.requires_grad]
        gsa_step(base, params, support.group_closure(twin, i), support.GROUP_COUNTS, averages, **wide)
        assert support.distance(model, twin) < 2e-6, i  # observed 2e-7
        if i >= 3:
            assert all(torch.equal(p, b) for p, b in zip(model[1].parameters(), before, strict=True))


@pytest.mark.parametrize("gram_every", [1, 4])
def test_a_frozen_encoder_may_be_handed_over_or_not(gram_every: int) -> None:
    models = [support.make(), support.make()]
    optimizers = []
    for whole, model in zip((True, False), models, strict=True):
        frozen_at(model, True)
        params = [p for p in model.parameters() if whole or p.requires_grad]
        radii = {"C": 1.0, "rho_min": 0.0, "rho_max": 10.0}
        optimizers.append(GSA(params, KIND, support.GROUP_COUNTS, gram_every=gram_every, **radii, **OPTIONS))
    for i in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step(support.group_closure(model, i))
        torch.testing.assert_close(optimizers[0].stats["radius"], optimizers[1].stats["radius"], rtol=1e-5, atol=0)
    assert support.distance(*models) < 1e-6  # observed 6e-8


def test_cc_sam_does_not_see_a_frozen_layer() -> None:
    models = [support.make(), support.make()]
    for whole, model in zip((True, False), models, strict=True):
        frozen_at(model, True)
        params = [p for p in model.parameters() if whole or p.requires_grad]
        radii = {"C": 1.0, "rho_min": 0.0, "rho_max": 10.0}
        optimizer = CCSAM(params, KIND, support.COUNTS, scope="all", **radii, **OPTIONS)
        for i in range(3):
            optimizer.step(support.group_closure(model, i, kind="classes"))
    assert support.distance(*models) < 1e-6  # observed 3e-8
