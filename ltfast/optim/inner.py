"""The descent of every optimizer here: torch.optim.SGD and AdamW on flat buffers, any other optimizer through its own step.

State lives in flat buffers and `base.state[p]` holds views of them under torch's own names, so `state_dict` is that of the
base optimizer and either path can take the next step. Parameters without a gradient are left alone, as torch leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from ltfast.kernels import adamw_step, sgd_step
from ltfast.optim.block import Block, Present

SLOTS = {SGD: ("momentum_buffer",), AdamW: ("exp_avg", "exp_avg_sq")}
# Options that the kernels do not cover; torch's own step then runs on the flat views, with the same state.
UNCOVERED = ("maximize", "differentiable", "amsgrad")
LR_BELOW = 1e-12  # torch's LinearLR, which multiplies, ends its way to 0 at about -1e-18


def check_options(group: dict[str, Any]) -> None:
    """ValueError for an option that no update could use, before anything is written."""
    for name in ("lr", "momentum", "weight_decay", "eps", "rho"):
        value = group.get(name, 0.0)
        if type(value) is float and 0 <= value < math.inf:
            continue  # as nearly always; what follows is slow
        if isinstance(value, Tensor) or (name != "rho" and not isinstance(value, Real)):
            continue  # a number on the device; what another optimizer understands by eps (a pair, None)
        least = -LR_BELOW if name == "lr" else 0.0
        if not (isinstance(value, Real) and least <= float(value) < math.inf):
            raise ValueError(f"{name} is {value}; it must be a finite number >= 0")


def check_fused(base: Optimizer) -> None:
    """ValueError for an option of any group that the kernels would refuse, before the first group is written."""
    for group in base.param_groups:
        if type(base) is AdamW:
            beta1, beta2 = group["betas"]
            if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
                raise ValueError(f"betas are {beta1} and {beta2}; both must be in [0, 1)")
        elif group["dampening"] or group["nesterov"]:
            if not math.isfinite(group["dampening"]):
                raise ValueError(f"dampening is {group['dampening']}; it must be finite")
            if group["nesterov"] and group["momentum"] and group["dampening"] != 0:
                raise ValueError(f"nesterov needs dampening 0, not {group['dampening']}")


def fused(base: Optimizer) -> bool:
    """True if the kernels cover every option of `base`."""
    if type(base) not in SLOTS:
        return False
    for group in base.param_groups:
        betas = group.get("betas", ())
        if any(group.get(name) for name in UNCOVERED) or any(isinstance(b, Tensor) for b in betas):
            return False
        if not group.get("decoupled_weight_decay", True):  # of AdamW, for one group
            return False
    return True


def fused_step(base: Optimizer, block: Block, row: int, present: Present, scale: Any, skip: Tensor | None) -> None:
    """Restore theta and take the step of `base` in one pass per run; absent parameters are only restored."""
    names = SLOTS[type(base)]  # type: ignore[index]
    kind = type(base)
    first: dict[int, Tensor] = {}
    if kind is AdamW:
        block.split_counters(present)
        block.count(present, skip)
    elif any(group.get("dampening") for group in base.param_groups):
        first = _count_buffers(base, block, present, skip)
    else:
        block.counting = False
    theta, grad = block.flat.data, block.flat.grads[row]
    for run in block.runs(present):
        s = run.span
        if not run.present:
            if block.climbed:
                theta[s].copy_(block.kept[s])
            continue
        group = base.param_groups[run.group]
        common: dict[str, Any] = {
            "source": block.kept[s] if block.climbed else None,
            "anchor": None if block.anchor is None else (block.anchor[0][s], block.anchor[1][s], block.anchor[2]),
            "weight_decay": group["weight_decay"],
            "grad_scale": scale,
            "found_inf": skip,
        }
        lr = _rate(group["lr"], theta)
        if kind is SGD:
            buffer = block.slot(names[0])[s] if group["momentum"] else None
            fresh = first.get(id(block.counters[run.first]), False)
            sgd_step(
                theta[s], grad[s], buffer, lr, group["momentum"], group["dampening"],
                nesterov=group["nesterov"] and group["momentum"] > 0,  # as torch: of no effect without momentum
                first_step=fresh, **common,
            )  # fmt: skip
        else:
            moments = [block.slot(name)[s] for name in names]
            step = block.counters[run.first]
            adamw_step(theta[s], grad[s], *moments, step, lr, group["betas"], group["eps"], **common)
        if not run.published and (kind is AdamW or group["momentum"]):
            publish(base, block, range(run.first, run.end))
            run.published = True
    block.climbed = False


def _count_buffers(base: Optimizer, block: Block, present: Present, skip: Tensor | None) -> dict[int, Tensor]:
    """Count the updates of SGD's momentum buffers; 0-dim flag by id of each counter: this update begins the buffer.

    As in torch a buffer begins with the whole gradient, and only at an update with momentum. Steps without dampening do
    not count; those that have a buffer by then are known by the state they show.
    """
    if not block.counting:
        shown = ["momentum_buffer" in base.state.get(p, ()) for p in block.flat.params]
        block.set_counters([float(begun) for begun in shown])
        block.counting = True
    moving = [bool(group["momentum"]) for group in base.param_groups]
    counted = tuple(bool(here) and moving[g] for g, here in zip(block.group_of, present, strict=True))
    block.split_counters(counted)
    first = {id(c): (c == 0).float() for c in set(block.counters)}
    block.count(counted, skip)
    return first


def _rate(lr: float | Tensor, theta: Tensor) -> float | Tensor:
    """A learning rate the kernels take: torch also allows a CPU tensor for CUDA parameters."""
    if isinstance(lr, Tensor):
        return lr if lr.device == theta.device else float(lr)
    return max(lr, 0.0)


def publish(base: Optimizer, block: Block, indices: Iterable[int]) -> None:
    """Show the flat state of these parameters in base.state, under torch's names."""
    names = [name for name in SLOTS[type(base)] if name in block.slots]  # type: ignore[index]
    for i in indices if names else ():
        state = base.state[block.flat.params[i]]
        block.shown[id(state)] = state, i
        for name in names:
            state[name] = block.views[name][i]
        if type(base) is AdamW:
            state["step"] = block.counters[i]


def replaced(base: Optimizer, block: Block) -> bool:
    """True if state that `publish` showed is no longer there. (Looking tensors up takes longer than going through them all.)"""
    there = set(map(id, base.state.values()))
    if not block.shown.keys() <= there:
        return True
    for name, views in block.views.items():
        addresses = block.addresses[name]
        for state, i in block.shown.values():
            if state.get(name) is not views[i] or views[i].data_ptr() != addresses[i]:
                return True
    counted = type(base) is AdamW
    return counted and any(state.get("step") is not block.counters[i] for state, i in block.shown.values())


def adopt_state(base: Optimizer, blocks: list[Block]) -> None:
    """Move state that lies elsewhere (loaded, or made by torch's own step) into the flat buffers."""
    names = SLOTS[type(base)]  # type: ignore[index]
    for block in blocks:
        counts = [0.0] * len(block.flat.params)
        for i, p in enumerate(block.flat.params):
            state = base.state.get(p, {})
            for name in names:
                held = state.get(name)
                if held is not None:
                    block.slot(name)
                    if block.views[name][i].data_ptr() != block.addresses[name][i]:
                        block.views[name][i] = block.flat.views(block.slots[name])[i]
                    if held is not block.views[name][i]:
                        block.views[name][i].copy_(held)
                    counts[i] = 1.0
                elif name in block.slots:
                    block.views[name][i].zero_()
            if "step" in state:
                counts[i] = float(state["step"])
        block.set_counters(counts)
        block.counting = False
        block.shown.clear()
        publish(base, block, [i for i, count in enumerate(counts) if count > 0])


def release_state(base: Optimizer) -> None:
    """Give every parameter a step count of its own, where torch's step wants it, before that counts each one up."""
    for group in base.param_groups:
        beside = bool(group.get("capturable") or group.get("fused"))
        for p in group["params"]:
            state = base.state.get(p, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].detach().to(p.device if beside else "cpu", copy=True)


@torch.no_grad()
def foreign_step(
    base: Optimizer, blocks: list[Block], row: int, presents: list[Present], scale: Any, skip: Tensor | None
) -> None:
    """Take the step of `base` itself; theta must have been restored. `skip` costs one wait for the device.

    p.grad is what the user left there, afterwards too: scaling and anchor act on a copy.
    """
    if skip is not None and bool(skip):
        return
    params = [p for block in blocks for p in block.flat.params]
    held = [p.grad for p in params]
    try:
        for block, present in zip(blocks, presents, strict=True):
            edited = _edited_gradient(block, row, scale)
            grads = [p.grad for p in block.flat.params] if edited is None else block.flat.views(edited)
            for p, here, grad in zip(block.flat.params, present, grads, strict=True):
                p.grad = grad if here else None
        base.step()
    finally:
        for p, grad in zip(params, held, strict=True):
            p.grad = grad


def _edited_gradient(block: Block, row: int, scale: Any) -> Tensor | None:
    """scale * g + strength * A * (theta - T), [N]; None if that is g itself."""
    if scale is None and block.anchor is None:
        return None
    grad = block.flat.grads[row] * (1.0 if scale is None else scale)
    if block.anchor is not None:
        weight, target, strength = block.anchor
        grad += strength * weight * (block.flat.data - target)
    return grad
