"""What the rest of torch does to parameters, gradients, state and hooks, and what an optimizer must make of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltfast.losses import group_losses
from ltfast.optim import CCSAM, GSA, SAM, ImbSAM

SGD = torch.optim.SGD
X, Y = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


def by_class(logits: Tensor) -> tuple[Tensor, Tensor]:
    return group_losses(F.cross_entropy(logits, Y, reduction="none"), F.one_hot(Y).float())


def marked(encoder: nn.Module, head: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(encoder.parameters())}, {"params": list(head.parameters()), "classifier": True}]


@pytest.mark.parametrize("share", [nn.Module.share_memory, lambda m: ForkingPickler.dumps(m.state_dict())])
def test_training_goes_on_when_the_parameters_went_into_shared_memory(share: Callable[[nn.Module], object]) -> None:
    model, twin = net(), net()
    optimizers = [SAM(m.parameters(), SGD, lr=0.1, momentum=0.9) for m in (model, twin)]
    for i in range(4):
        if i == 2:
            share(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            for take in (optimizer.first_step, optimizer.second_step):
                loss(m).backward()
                take(zero_grad=True)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_autograd_notices_that_a_step_has_changed_what_a_graph_has_saved() -> None:
    generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizer = SAM(critic.parameters(), SGD, lr=1.0)
    score = critic(generator(X)).square().mean()
    critic(X).mean().backward()
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()


def test_a_forgotten_second_forward_pass_is_noticed() -> None:
    model = net()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    first = loss(model)
    first.backward(retain_graph=True)
    optimizer.first_step(zero_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def cleared(optimizer: SAM, model: nn.Module) -> None:
    optimizer.state.clear()


def exchanged(optimizer: SAM, model: nn.Module) -> None:
    optimizer.state = type(optimizer.state)(dict)


def deleted(optimizer: SAM, model: nn.Module) -> None:
    for p in model.parameters():
        del optimizer.state[p]


@pytest.mark.parametrize("reset", [cleared, exchanged, deleted])
@pytest.mark.parametrize("base", [SGD, torch.optim.AdamW])
def test_state_that_was_reset_begins_afresh_and_is_saved(base: Any, reset: Callable[[SAM, nn.Module], None]) -> None:
    options = {"lr": 0.1, "weight_decay": 0.0} | ({"momentum": 0.9} if base is SGD else {})
    model = net()
    optimizer = SAM(model.parameters(), base, **options)
    for _ in range(3):
        loss(model).backward()
        optimizer.second_step(zero_grad=True)
    reset(optimizer, model)
    twin = net()
    twin.load_state_dict(model.state_dict())
    plain = base(twin.parameters(), **options)
    for _ in range(2):
        for m, take in ((model, optimizer.second_step), (twin, plain.step)):
            m.zero_grad()
            loss(m).backward()
            take()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    saved, expected = optimizer.state_dict()["state"], plain.state_dict()["state"]
    assert saved.keys() == expected.keys()
    for index, values in expected.items():
        for name, value in values.items():
            torch.testing.assert_close(saved[index][name], value, rtol=1e-5, atol=1e-6)


def test_gradients_that_were_set_to_zero_are_no_first_pass() -> None:
    model, calls = net(), []
    optimizer = SAM(model.parameters(), SGD, lr=0.1, rho=0.5)

    def closure() -> Tensor:
        calls.append(1)
        found = loss(model)
        found.backward()
        return found

    for _ in range(3):
        model.zero_grad(set_to_none=False)
        calls.clear()
        optimizer.step(closure)
        assert len(calls) == 2
        assert float(optimizer.stats["length_sq"]) == pytest.approx(0.25)
    model.zero_grad(set_to_none=False)
    loss(model).backward()  # davda54's protocol: the first pass is there
    calls.clear()
    optimizer.step(closure)
    assert len(calls) == 1
    optimizer.base_optimizer.step()  # uses what there is
    calls.clear()
    optimizer.step(closure)
    assert len(calls) == 2


def test_another_methods_state_dict_does_not_change_the_method() -> None:
    model = net()
    old = SAM(model.parameters(), SGD, rho=0.5, lr=0.1, momentum=0.9).state_dict()
    optimizer = GSA(model.parameters(), SGD, [100, 10, 2], lr=0.2, momentum=0.9)
    before = optimizer.rule
    optimizer.load_state_dict(old)
    optimizer.step(lambda: by_class(model(X)))
    assert optimizer.rule == before
    assert optimizer.param_groups[0]["lr"] == 0.1
    imbsam = ImbSAM(model.parameters(), SGD, rho=0.05, lr=0.1)
    imbsam.load_state_dict(SAM(model.parameters(), SGD, rho=0.5, lr=0.1).state_dict())
    assert imbsam.param_groups[0]["rho"] == 0.5


def test_a_base_optimizer_with_a_rho_of_its_own() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"base_optimizer Adadelta already has an option 'rho'.*choose another"):
        SAM(model.parameters(), torch.optim.Adadelta, rho=0.05)
    optimizer = GSA(model.parameters(), torch.optim.Adadelta, [100, 10, 2], lr=0.1)
    optimizer.step(lambda: by_class(model(X)))
    assert optimizer.rule.rho is None
    assert optimizer.param_groups[0]["rho"] == 0.9


@pytest.mark.parametrize("mode", ["head of GSA", "head of CC-SAM", "all of CC-SAM"])
@pytest.mark.parametrize("training", [True, False])
def test_statistics_that_stay_do_not_spoil_a_graph_that_waits(mode: str, training: bool) -> None:
    torch.manual_seed(0)
    encoder, head = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 3)
    model = nn.Sequential(encoder, head).train(training)
    before = model[0][0].weight.detach().clone()
    if mode == "all of CC-SAM":
        CCSAM(model.parameters(), SGD, [9, 5, 2], scope="all", lr=0.1).bind(model).step(lambda: by_class(model(X)))
    else:
        options: dict[str, Any] = {"objective": "per_group", "scope": "classifier"} if "GSA" in mode else {}
        optimizer: Any = (GSA if "GSA" in mode else CCSAM)(marked(encoder, head), SGD, [9, 5, 2], lr=0.1, **options)
        optimizer.bind(model).step(lambda: encoder(X), head=lambda z: by_class(head(z)))
    assert not torch.equal(model[0][0].weight, before)
    assert int(encoder[1].num_batches_tracked) == int(training)


def test_a_frozen_classifier_leaves_the_encoder_its_plain_step() -> None:
    model = net()
    model[2].requires_grad_(False)
    optimizer = GSA(marked(model[0], model[2]), SGD, [9, 5, 2], scope="classifier", objective="per_group", lr=0.1)
    before = model[0].weight.detach().clone()
    optimizer.step(lambda: by_class(model(X)))
    assert not torch.equal(model[0].weight, before)
    assert int(optimizer.skipped) == 0
    ccsam = CCSAM(marked(model[0], model[2]), SGD, [9, 5, 2], lr=0.1)
    before = model[0].weight.detach().clone()
    ccsam.step(lambda: (by_class(model(X))[0] * torch.nan, by_class(model(X))[1]))
    assert torch.equal(model[0].weight, before)
    assert int(ccsam.skipped) == 1


@pytest.mark.parametrize("inside", [True, False])
def test_a_scaler_forgets_a_step_that_was_given_up_between_its_passes(inside: bool) -> None:
    model = net()
    optimizer, scaler = SAM(model.parameters(), SGD, lr=0.1), torch.amp.GradScaler("cpu")

    def first() -> None:
        scaler.scale(loss(model)).backward()
        optimizer.first_step(zero_grad=True, scaler=scaler)

    first()
    if inside:
        with pytest.raises(MemoryError), optimizer.perturbed():
            raise MemoryError
    optimizer.zero_grad()
    first()
    with optimizer.perturbed():
        scaler.scale(loss(model)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(optimizer.skipped) == 0


def test_a_plain_step_of_the_base_between_the_passes_starts_from_theta() -> None:
    model, twin = net(), net()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    loss(model).backward()
    optimizer.first_step()
    optimizer.base_optimizer.step()
    loss(twin).backward()
    SGD(twin.parameters(), lr=0.1).step()
    assert not optimizer.climbed
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_first_pass_that_was_taken_back_does_not_skip_the_next_step() -> None:
    model = net()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    (loss(model) * torch.nan).backward()
    optimizer.first_step(zero_grad=True)
    optimizer.restore()
    before = model[0].weight.detach().clone()
    loss(model).backward()
    optimizer.second_step(zero_grad=True)
    assert not torch.equal(model[0].weight, before)
    assert int(optimizer.skipped) == 0


@pytest.mark.parametrize("base", [SGD, torch.optim.Adam])
def test_hooks_of_the_base_optimizer_run_once_a_step(base: Any) -> None:
    model, seen = net(), []
    optimizer = SAM(model.parameters(), base, lr=0.1)
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for _ in range(2):
        for take in (optimizer.first_step, optimizer.second_step):
            loss(model).backward()
            take(zero_grad=True)
    assert seen == ["before", "after"] * 2


def test_a_dropped_optimizer_is_freed_at_once() -> None:
    model = net()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    loss(model).backward()
    optimizer.first_step()
    optimizer.second_step()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
