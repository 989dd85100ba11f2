"""Gradients that are missing, unused, tied, sparse or the user's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ltfast.optim import SAM
from ltfast.optim.reference import sam_step
from tests.optim import support
from tests.optim.support import BASES


class Branches(nn.Module):
    """Uses a different part in every step: two branches, one tied weight, one frozen, one never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied, self.frozen, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.also_tied = nn.Linear(6, 6)
        self.also_tied.weight = self.tied.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor, left: bool) -> Tensor:
        x = torch.tanh(self.frozen(self.first(x)))
        x = (self.left if left else self.right)(x)
        return self.also_tied(torch.tanh(self.tied(x)))


def branch_loss(model: Branches, step: int, left: bool) -> Tensor:
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(step))
    return model(x, left).pow(2).mean()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_unused_frozen_and_tied_parameters_behave_as_in_torch(base: str, clip: bool) -> None:
    """No weight decay and no momentum without a gradient; step counts of AdamW are each parameter's own."""
    kind, options = BASES[base]
    model, twin = Branches(), Branches()
    optimizer = SAM(model.parameters(), kind, rho=0.1, **options)
    theirs = kind(twin.parameters(), **options)
    pattern = [True, True, False, True, False, False, False, True]
    for i, left in enumerate(pattern):
        for _ in range(2):
            optimizer.zero_grad()
            branch_loss(model, i, left).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            (optimizer.second_step if optimizer.climbed else optimizer.first_step)()
        theirs.zero_grad()
        branch_loss(twin, i, left).backward()
        if clip:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        used = [p for p in twin.parameters() if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in used]).norm()
        kept = [p.detach().clone() for p in used]
        with torch.no_grad():
            for p in used:
                p += 0.1 / norm * p.grad
        theirs.zero_grad()
        branch_loss(twin, i, left).backward()
        with torch.no_grad():
            for p, k in zip(used, kept, strict=True):
                p.copy_(k)
        if clip:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        theirs.step()
        assert support.distance(model, twin) < 2e-6, i  # observed 1e-7
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p in optimizer.state) == (q in theirs.state)
        if "step" in theirs.state.get(q, {}):
            assert float(optimizer.state[p]["step"]) == float(theirs.state[q]["step"])
    assert model.never.weight.grad is None
    assert model.also_tied.weight is model.tied.weight


@pytest.mark.parametrize("missing_pass", [1, 2])
def test_a_parameter_without_gradient_in_one_pass_is_restored(missing_pass: int) -> None:
    model = Branches()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)
    branch_loss(model, 0, True).backward()
    optimizer.first_step()
    optimizer.second_step(zero_grad=True)
    part = model.left if missing_pass == 2 else model.right
    before = [p.detach().clone() for p in part.parameters()]
    branch_loss(model, 1, True).backward()
    optimizer.first_step(zero_grad=True)
    if missing_pass == 2:
        assert not torch.equal(part.weight, before[0])
    branch_loss(model, 1, False).backward()
    optimizer.second_step()
    unchanged = all(torch.equal(p, b) for p, b in zip(part.parameters(), before, strict=True))
    assert unchanged == (missing_pass == 2)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_gradient_that_is_taken_away_before_the_ascent_has_no_part_in_it(set_to_none: bool) -> None:
    """Attached gradients lie in the row of which the radius is measured: what autograd added there goes, too."""
    model, twin = support.make(), support.make()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, **support.SGD[1])
    base = torch.optim.SGD(twin.parameters(), **support.SGD[1])
    for i in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        taken, before = model[1].weight, model[1].weight.detach().clone()
        support.loss_of(model, i).backward()
        taken.grad = None
        optimizer.first_step()
        assert torch.equal(taken, before)
        optimizer.zero_grad(set_to_none=set_to_none)
        support.loss_of(model, i).backward()
        taken.grad = None
        optimizer.second_step()
        twin[1].weight.requires_grad_(False)
        sam_step(base, [p for p in twin.parameters() if p.requires_grad], lambda i=i: support.loss_of(twin, i), rho=0.5)
        assert support.distance(model, twin) < 1e-6, i


@pytest.mark.parametrize("how", ["none", "own tensor", "sparse"])
def test_stray_gradients_are_gathered_and_left_alone(how: str) -> None:
    torch.manual_seed(0)
    model, twin = nn.Embedding(7, 5, sparse=how == "sparse"), nn.Embedding(7, 5)
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    index = torch.tensor([1, 3, 3, 6])
    for _ in range(3):
        for take in (optimizer.first_step, optimizer.second_step):
            model.zero_grad()  # sets p.grad to None
            model(index).pow(2).sum().backward()
            if how == "own tensor":
                model.weight.grad = model.weight.grad.clone()
            held = model.weight.grad
            values = held.to_dense().clone()
            take()
            assert model.weight.grad is held
            assert torch.equal(held.to_dense(), values)
        sam_step(base, list(twin.parameters()), lambda: twin(index).pow(2).sum(), 0.1)
    assert support.distance(model, twin) < 1e-6  # observed 6e-8
    assert optimizer.gathered == 6


def test_gradients_written_by_hand_count() -> None:
    model = nn.Linear(3, 2)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    optimizer.zero_grad(set_to_none=False)
    before = model.weight.detach().clone()
    model.weight.grad.copy_(torch.ones(2, 3))
    optimizer.first_step()
    assert torch.allclose(model.weight, before + 0.1 / 6**0.5)
    optimizer.second_step()
    assert torch.allclose(model.weight, before - 0.1)
