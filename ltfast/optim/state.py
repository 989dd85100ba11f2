"""State dicts: what they hold beyond torch's, and what is taken from those of other optimizers.

Own state dicts are torch's (param_groups, and state by parameter index under the base optimizer's names) plus "ltfast":
    {"skipped": ..., "averages": {index: tensor}, "engine": {name: tensor}}      tensors, numbers and dicts only
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltfast.optim.inner import SLOTS, Block, check_options

if TYPE_CHECKING:
    from ltfast.optim.base import FlatOptimizer

# Per-parameter state of davda54's SAM (its base optimizer's momentum is not in its state dict) and of F-SAM.
OLD_P, AVERAGE = "old_p", "momentum"
RADIUS = ("rho", "adaptive")  # options of SAM's groups: an optimizer with another rule stays what it is


def indices(optimizer: FlatOptimizer) -> dict[Tensor, int]:
    """Parameter -> its index in a state dict."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    order: dict[Tensor, int] = {}
    for p in params:
        order.setdefault(p, len(order))
    return order


def merge_groups(optimizer: FlatOptimizer, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(a state dict for torch's loader, extra state); options that the loaded groups lack keep their present value.

    Raises:
        ValueError: the groups or the names of the state do not fit.
    """
    groups = state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in optimizer.param_groups]:
        sizes = [len(g["params"]) for g in optimizer.param_groups]
        raise ValueError(
            f"state_dict has groups of {[len(g['params']) for g in groups]} parameters, this optimizer {sizes}"
        )
    merged = [
        {
            **{k: v for k, v in ours.items() if k != "params"},
            **{k: v for k, v in theirs.items() if k in ours or k not in RADIUS},
        }
        for ours, theirs in zip(optimizer.param_groups, groups, strict=True)
    ]
    for group in merged:
        check_options(group)
    extra = dict(state_dict.get("ltfast", {}))
    state = {k: dict(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
    names = SLOTS.get(type(optimizer.base_optimizer))
    averages = {}
    for index, values in state.items():
        if not isinstance(values, dict):
            continue
        ascended = values.pop(OLD_P, None) is not None
        if AVERAGE in values and (names is not None or ascended):  # else it may be state of an unknown base
            averages[index] = values.pop(AVERAGE)[None]
        strange = set() if names is None else set(values) - {*names, "step", "max_exp_avg_sq"}
        if strange:
            kind = type(optimizer.base_optimizer).__name__
            raise ValueError(f"state_dict holds {', '.join(sorted(strange))}, which is not state of {kind}")
    if averages:
        extra.setdefault("averages", averages)
    state = {index: values for index, values in state.items() if values != {}}
    _check_shapes(optimizer, state)
    optimizer._check_extra(extra)
    return {**{k: v for k, v in state_dict.items() if k != "ltfast"}, "param_groups": merged, "state": state}, extra


def _check_shapes(optimizer: FlatOptimizer, state: dict[Any, Any]) -> None:
    names = SLOTS.get(type(optimizer.base_optimizer), ())
    for p, index in indices(optimizer).items():
        for name in names:
            value = state.get(index, {}).get(name)
            if isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"state_dict: {name} of parameter {index} is {tuple(value.shape)}, not {tuple(p.shape)}"
                )


def export_extra(optimizer: FlatOptimizer) -> dict[str, Any]:
    """State beyond the base optimizer's: skipped steps, moving averages, Gram memory."""
    return {"skipped": optimizer.skipped.clone(), **optimizer._export()}


@torch.no_grad()
def import_extra(optimizer: FlatOptimizer, extra: dict[str, Any]) -> None:
    """Take over what `export_extra` gave (or part of it: an empty dict starts afresh)."""
    optimizer._skips.set(extra.get("skipped", 0.0))
    optimizer._import(extra)


def check_averages(optimizer: FlatOptimizer, averages: dict[int, Tensor], rows: int) -> None:
    """ValueError if `load_averages` could not take these."""
    for p, index in indices(optimizer).items():
        held = averages.get(index)
        if held is not None and held.shape != (rows, *p.shape):
            raise ValueError(
                f"state_dict: the moving average of parameter {index} is {tuple(held.shape)}, not {(rows, *p.shape)}"
            )


def averages_by_index(optimizer: FlatOptimizer, first: int, rows: int, blocks: list[Block]) -> dict[int, Tensor]:
    """Gradient rows first .. first + rows - 1 as {index: [rows, *shape]}."""
    order = indices(optimizer)
    result = {}
    for block in blocks:
        per_row = [block.flat.views(block.flat.grads[first + k]) for k in range(rows)]
        for i, p in enumerate(block.flat.params):
            result[order[p]] = torch.stack([views[i] for views in per_row])
    return result


def load_averages(
    optimizer: FlatOptimizer, averages: dict[int, Tensor], first: int, rows: int, blocks: list[Block]
) -> None:
    """Undo `averages_by_index`; parameters without an entry get zeros."""
    order = indices(optimizer)
    for block in blocks:
        per_row = [block.flat.views(block.flat.grads[first + k]) for k in range(rows)]
        for i, p in enumerate(block.flat.params):
            held = averages.get(order[p])
            for k in range(rows):
                per_row[k][i].zero_() if held is None else per_row[k][i].copy_(held[k])
