"""Exact restoring, skipped steps and bad arguments: a failed step leaves parameters as they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltfast.optim import SAM, FriendlySAM
from ltfast.optim.skips import FLAGS, SkipCounter
from tests.optim import support
from tests.optim.support import ADAMW, SGD, bits, same_bits

# -- restoring ---------------------------------------------------------------------------------------------------------------


def test_a_hundred_ascents_leave_every_bit() -> None:
    model = support.make("conv")
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
        model[0].weight[0, 0, 0, 1] = 1e-40
    optimizer = SAM(model.parameters(), SGD[0], rho=3.0, adaptive=True, **SGD[1])
    before = bits(model)
    for i in range(100):
        optimizer.zero_grad()
        (support.loss_of(model, i) * 10.0 ** (i % 7 - 3)).backward()
        optimizer.first_step()
        assert not same_bits(model, before)
        optimizer.restore()
        assert same_bits(model, before)


def test_a_step_of_rate_zero_leaves_every_bit() -> None:
    model = support.make("conv")
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.0, momentum=0.9)
    before = bits(model)
    for i in range(100):
        support.two_passes(model, optimizer, i)
    assert same_bits(model, before)


def test_an_exception_in_the_second_pass_restores() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    before, calls = bits(model), []

    def closure() -> None:
        calls.append(None)
        support.loss_of(model, 0).backward()
        if len(calls) == 2:
            assert not same_bits(model, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert same_bits(model, before)
    assert not optimizer.climbed
    support.loss_of(model, 0).backward()
    optimizer.first_step(zero_grad=True)
    with pytest.raises(ZeroDivisionError), optimizer.perturbed():
        1 / 0  # noqa: B018
    assert same_bits(model, before)


def test_a_first_step_after_an_abandoned_one_starts_from_theta() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    before = bits(model)
    for _ in range(2):
        optimizer.zero_grad()
        support.loss_of(model, 0).backward()
        optimizer.first_step()
    optimizer.restore()
    assert same_bits(model, before)


def test_edits_between_steps_are_respected() -> None:
    """The buffer is theta: in-place edits, load_state_dict, EMA swaps through .data."""
    model, twin = support.make(), support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    theirs = SAM(twin.parameters(), SGD[0], rho=0.3, **SGD[1])
    other = support.make(seed=5)
    support.two_passes(model, optimizer, 0)
    support.two_passes(twin, theirs, 0)
    model.load_state_dict(other.state_dict())
    held = [p.data for p in model.parameters()]
    with torch.no_grad():
        for p, q in zip(twin.parameters(), other.parameters(), strict=True):
            p.copy_(q)
            p.mul_(0.5)
    for p, own in zip(model.parameters(), held, strict=True):
        p.data = own * 0.5
    support.two_passes(model, optimizer, 1)
    support.two_passes(twin, theirs, 1)
    assert support.equal(model, twin)
    assert all(p.data_ptr() == own.data_ptr() for p, own in zip(model.parameters(), held, strict=True))
    model.double()
    with pytest.raises(RuntimeError, match="before you make its optimizer"):
        optimizer.first_step()


# -- what is skipped ---------------------------------------------------------------------------------------------------------


def test_an_infinite_first_gradient_skips_the_step_and_is_counted() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    support.two_passes(model, optimizer, 0)
    before, momentum = bits(model), optimizer.state[model[1].weight]["momentum_buffer"].clone()
    (support.loss_of(model, 1) * torch.inf).backward()
    optimizer.first_step(zero_grad=True)
    assert same_bits(model, before)
    support.loss_of(model, 1).backward()
    optimizer.second_step(zero_grad=True)
    assert same_bits(model, before)
    assert torch.equal(optimizer.state[model[1].weight]["momentum_buffer"], momentum)
    assert float(optimizer.skipped) == 1
    support.two_passes(model, optimizer, 2)
    assert not same_bits(model, before)
    assert float(optimizer.skipped) == 1


def test_check_finite_tests_the_final_gradient() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    optimizer.check_finite = True
    before = bits(model)
    support.loss_of(model, 1).backward()
    optimizer.first_step(zero_grad=True)
    (support.loss_of(model, 1) * torch.inf).backward()
    optimizer.second_step(zero_grad=True)
    assert same_bits(model, before)
    assert float(optimizer.skipped) == 1


def test_a_loaded_count_of_skipped_steps_goes_on() -> None:
    counter = SkipCounter(torch.device("cpu"))
    counter.add(torch.tensor(1.0))
    counter.set(5.0)  # the flag above belongs to the run that was left
    for i in range(FLAGS + 3):
        counter.add(torch.tensor(2.0 * (i % 2)))
        counter.add(None)
    assert len(counter._flags) < FLAGS
    assert float(counter.total()) == float(counter.total()) == 5 + (FLAGS + 3) // 2


def test_a_zero_gradient_is_a_plain_step() -> None:
    model = nn.Linear(3, 2)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, weight_decay=0.5)
    before = model.weight.detach().clone()
    for _ in range(2):
        (model(torch.ones(1, 3)) * 0).sum().backward()
        (optimizer.second_step if optimizer.climbed else optimizer.first_step)(zero_grad=True)
    torch.testing.assert_close(model.weight.detach(), before * 0.95)


def test_friendly_averages_survive_an_infinite_gradient() -> None:
    model = support.make()
    optimizer = FriendlySAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    support.two_passes(model, optimizer, 0)
    before = optimizer.state_dict()["ltfast"]["averages"]
    (support.loss_of(model, 1) * torch.inf).backward()
    optimizer.first_step(zero_grad=True)
    after = optimizer.state_dict()["ltfast"]["averages"]
    assert all(torch.equal(before[i], after[i]) for i in before)
    assert float(optimizer.blocks[0].flat.grads[1].abs().max()) > 0


# -- arguments ---------------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    model = nn.Linear(3, 2)
    for name, make in {
        "rho": lambda: SAM(model.parameters(), torch.optim.SGD, rho=-0.1, lr=0.1),
        "rho ": lambda: SAM([{"params": model.parameters(), "rho": float("nan")}], torch.optim.SGD, lr=0.1),
        "base_optimizer": lambda: SAM(model.parameters(), torch.optim.SGD(model.parameters(), lr=0.1)),
        "lr": lambda: SAM(model.parameters(), torch.optim.SGD, lr=-1.0),
        "params": lambda: SAM(nn.Linear(3, 2).bfloat16().parameters(), torch.optim.SGD, lr=0.1),
        "sigma": lambda: FriendlySAM(model.parameters(), torch.optim.SGD, sigma=-1, lr=0.1),
        "lmbda": lambda: FriendlySAM(model.parameters(), torch.optim.SGD, lmbda=1.5, lr=0.1),
        "ascent": lambda: SAM(model.parameters(), torch.optim.SGD, lr=0.1).bind(model, ascent="both"),
        "closure": lambda: SAM(model.parameters(), torch.optim.SGD, lr=0.1).step(),
        "empty": lambda: SAM([], torch.optim.SGD, lr=0.1),
        "lazy": lambda: SAM(nn.LazyLinear(3).parameters(), torch.optim.SGD, lr=0.1),
    }.items():
        with pytest.raises(ValueError, match=name.strip()):
            make()


def test_a_failed_step_writes_nothing() -> None:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    support.two_passes(model, optimizer, 0)
    before = bits(model)
    for name, value in (("rho", -1.0), ("lr", float("nan")), ("momentum", -0.1)):
        good = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = value
        with pytest.raises(ValueError, match=name):
            support.two_passes(model, optimizer, 1)
        optimizer.param_groups[0][name] = good
        assert same_bits(model, before)
        optimizer.zero_grad()


def test_parameters_that_share_memory_are_refused() -> None:
    whole = torch.randn(8)
    with pytest.raises(ValueError, match="share memory"):
        SAM([nn.Parameter(whole[:5]), nn.Parameter(whole[3:])], torch.optim.SGD, lr=0.1)


def test_cross_entropy_goes_down() -> None:
    model = support.make("conv")
    optimizer = SAM(model.parameters(), ADAMW[0], rho=0.05, lr=1e-2)
    x, y = support.batch()
    first = float(F.cross_entropy(model(x), y).detach())
    for _ in range(30):
        support.two_passes(model, optimizer, 0)
    assert float(F.cross_entropy(model(x), y).detach()) < 0.6 * first
