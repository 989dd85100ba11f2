"""What loops of others do with parameters, gradients and state: edits by other ways than torch's, compiled steps, processes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.context import set_spawning_popen
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.testing._internal.two_tensor import TwoTensor

from ltfast.flat import FlatParameters
from ltfast.kernels import blocks
from ltfast.losses import group_losses
from ltfast.optim import SAM, FriendlySAM, ImbSAM

X = torch.linspace(-1, 1, 12).reshape(4, 3)


def made(kind: Any = SAM, base: Any = SGD, **options: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, kind(model.parameters(), base, lr=0.1, **options)


def loss_of(model: nn.Module) -> Tensor:
    return model(X).square().mean()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# -- torch.compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SAM, FriendlySAM])
def test_a_compiled_step_skips_what_is_not_finite(kind: type) -> None:
    """torch.compile loses what a method puts on an optimizer, so a step is left out of what it compiles."""

    def step(model: nn.Module, optimizer: Any, factor: float = 1.0) -> None:
        for take in (optimizer.first_step, optimizer.second_step):
            (loss_of(model) * factor).backward()
            take(zero_grad=True)

    found = []
    for run in (step, torch.compile(step, backend="eager")):
        model, optimizer = made(kind)
        for factor in (1.0, float("nan"), 1.0):
            run(model, optimizer, factor)
        assert float(optimizer.skipped) == 1
        assert {"bad", "ok"} <= set(optimizer.stats)
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


# -- gradients and state with other memory below them ----------------------------------------------------------------------


def scaled_in_place(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.mul_(0.1)


def scaled_data(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.data = p.grad.data * 0.1


def scaled_by_set(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.set_(p.grad.detach() * 0.1)  # type: ignore[call-overload]


@pytest.mark.parametrize("edit", [scaled_data, scaled_by_set])
@pytest.mark.parametrize("steps", [(True, True, True), (True, False, False), (False, True, False)])
def test_a_gradient_may_get_other_memory(edit: Callable[[nn.Parameter], None], steps: tuple[bool, ...]) -> None:
    found = []
    for change in (edit, scaled_in_place):
        model, optimizer = made(momentum=0.9)
        for edited in steps:
            optimizer.zero_grad(set_to_none=False)
            loss_of(model).backward()
            for p in model.parameters():
                if edited:
                    change(p)
            optimizer.first_step()
            optimizer.zero_grad(set_to_none=False)
            loss_of(model).backward()
            optimizer.second_step()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_gradient_that_got_other_memory_and_was_taken_away() -> None:
    found = []
    for edited in (True, False):
        model, optimizer = made()
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        for p in model.parameters():
            assert p.grad is not None
            if edited:
                p.grad.data = torch.ones_like(p)
            p.grad = None
        for _ in range(2):
            loss_of(model).backward()
            optimizer.second_step(zero_grad=True)
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [SAM, ImbSAM])
def test_a_gradient_that_got_other_memory_does_not_come_back(kind: type) -> None:
    """Neither when it is set to zero nor when the next one is written there, though its step was given up."""
    found = []
    for edited in (True, False):
        model, optimizer = made(kind)
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        for p in model.parameters():
            assert p.grad is not None
            if edited:
                p.grad.data = torch.ones_like(p)
        if kind is SAM:
            optimizer.zero_grad(set_to_none=False)
            loss_of(model).backward()
            optimizer.second_step()
        else:
            for _ in range(2):
                optimizer.step(lambda model=model: (model(X).square().mean(0), torch.tensor([0.5, 0.5])))
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def restarted(state: dict[str, Any]) -> None:
    state["step"] = torch.zeros(())
    state["exp_avg"].zero_()
    state["exp_avg_sq"].data = torch.zeros_like(state["exp_avg_sq"])


def halved(state: dict[str, Any]) -> None:
    state["exp_avg"].data = state["exp_avg"] / 2


@pytest.mark.parametrize("edit", [restarted, halved])
def test_state_may_be_edited(edit: Callable[[dict[str, Any]], None]) -> None:
    found = []
    for kind in (SAM, None):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer: Any = AdamW(model.parameters(), lr=0.01) if kind is None else SAM(model.parameters(), AdamW, lr=0.01)
        take = optimizer.step if kind is None else optimizer.second_step
        for k in range(8):
            optimizer.zero_grad()
            loss_of(model).backward()
            if k == 5:
                for state in optimizer.state.values():
                    edit(state)
            take()
        steps = [float(state["step"]) for state in optimizer.state.values()]
        found.append(torch.cat([weights(model), torch.tensor(steps)]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


class HalfState(SGD):
    """Keeps its momentum in bfloat16, which torch's loader would cast to the parameter's dtype."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                held = self.state[p].setdefault("held", torch.zeros_like(p, dtype=torch.bfloat16))
                assert held.dtype == torch.bfloat16
                held.add_(p.grad.bfloat16())
                p.sub_(held.float(), alpha=self.param_groups[0]["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["held"] = state["held"].bfloat16()


def test_a_base_optimizer_loads_its_state_its_own_way() -> None:
    def train(model: nn.Module, optimizer: Any, steps: int) -> None:
        for _ in range(steps):
            for take in (optimizer.first_step, optimizer.second_step):
                loss_of(model).backward()
                take(zero_grad=True)

    whole, optimizer = made(base=HalfState)
    train(whole, optimizer, 4)
    first, optimizer = made(base=HalfState)
    train(first, optimizer, 2)
    resumed, other = made(base=HalfState)
    resumed.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(resumed, other, 2)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)


# -- parameters ------------------------------------------------------------------------------------------------------------


def test_sparse_gradients_of_group_losses() -> None:
    labels, found = torch.arange(8) % 5, []
    table = torch.eye(2)[torch.tensor([0, 0, 1, 1, 1])]
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(9, 5, sparse=sparse)
        optimizer = ImbSAM(model.parameters(), SGD, lr=0.1)
        for _ in range(2):
            optimizer.step(
                lambda model=model: group_losses(
                    F.cross_entropy(model(torch.arange(8)), labels, reduction="none"), table[labels]
                )
            )
        found.append(weights(model))
    torch.testing.assert_close(*found)


def test_tensors_that_wrap_others_are_refused() -> None:
    wrapped = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match="TwoTensor: only plain tensors"):
        SAM([wrapped], SGD, lr=0.1)
    with pytest.raises(ValueError, match="nested tensor: only plain tensors"):
        SAM(
            [nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))], SGD, lr=0.1
        )


def test_parameters_with_common_elements_are_refused() -> None:
    base = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="share memory"):
        FlatParameters([nn.Parameter(base), nn.Parameter(base[:, :3])])
    with pytest.raises(ValueError, match="share memory"):
        FlatParameters([nn.Parameter(base[:, 2:4]), nn.Parameter(base[:, :3])])
    with pytest.raises(ValueError, match="share memory"):  # the first and the last, with another one between
        FlatParameters([nn.Parameter(base[:, :2]), nn.Parameter(base[0, 2:4]), nn.Parameter(base[3:, 1:3])])
    FlatParameters([nn.Parameter(base[:, :3]), nn.Parameter(base[:, 3:])])  # columns of one matrix


def test_an_optimizer_made_under_inference_mode_trains() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with torch.inference_mode():
        optimizer = SAM(model.parameters(), SGD, lr=0.1)
    before = weights(model).clone()
    loss_of(model).backward()
    optimizer.second_step()
    assert not torch.equal(weights(model), before)


def test_a_base_optimizer_without_torchs_hooks_is_refused() -> None:
    class Around(Optimizer):
        def __init__(self, groups: Any, **options: Any) -> None:
            self._optimizer_step_pre_hooks: Any = {}
            self.inner = SGD(groups, **options)
            self.param_groups, self.state = self.inner.param_groups, self.inner.state
            self.defaults = self.inner.defaults

    with pytest.raises(ValueError, match=r"Around does not call Optimizer.__init__"):
        made(base=Around)


# -- processes and threads ---------------------------------------------------------------------------------------------------


def test_what_a_spawned_process_opens_later_is_kept() -> None:
    _, optimizer = made(FriendlySAM)
    set_spawning_popen(object())  # type: ignore[no-untyped-call]  # while a process is being spawned
    try:
        state = optimizer.__getstate__()
    finally:
        set_spawning_popen(None)  # type: ignore[no-untyped-call]
    assert optimizer._handed_over is state["extra"]


def test_threads_may_use_other_numbers_of_threads() -> None:
    """Each change of the number makes a new pool; one that somebody is about to use goes on."""
    barrier, sums = threading.Barrier(2), []
    array = torch.ones(4 * blocks.BLOCK)

    def work(number: int) -> None:
        torch.set_num_threads(number)
        barrier.wait()
        for _ in range(30):
            parts = blocks.in_blocks(lambda each: sum(float(x.sum()) for (x,) in each), array)
            sums.append(sum(parts))

    before = torch.get_num_threads()
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in (2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert sums == [array.numel()] * 60
