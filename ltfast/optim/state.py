"""State dicts, copies and pickles: what they hold beyond torch's, and what is taken from those of other optimizers.

Own state dicts are torch's (param_groups, and state by parameter index under the base optimizer's names) plus "ltfast":
    {"skipped": ..., "averages": {index: tensor}, "engine": {name: tensor}}      tensors, numbers and dicts only
"""

from __future__ import annotations

from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltfast.optim.anchors import attach_anchor, export_anchor
from ltfast.optim.block import Block
from ltfast.optim.inner import SLOTS, adopt_state, check_options
from ltfast.optim.over_base import OverBase, own_counts
from ltfast.optim.skips import SkipCounter

# Per-parameter state of davda54's SAM (its base optimizer's momentum is not in its state dict) and of F-SAM.
OLD_P, AVERAGE = "old_p", "momentum"
RADIUS = ("rho", "adaptive")  # options of SAM's groups: an optimizer with another rule stays what it is
# State of torch's optimizers: what else a dict of ours holds of a parameter, its user has put there.
TORCHS = frozenset((
    "acc_delta", "ax", "col_var", "eta", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "momentum_buffer", "mu", "mu_product",
    "prev", "row_var", "square_avg", "step_size", "sum", "variance",
))  # fmt: skip


class StoredOptimizer(OverBase):
    """What of an optimizer survives in a state dict, a copy and a pickle; FlatOptimizer builds on it."""

    alpha: float | Tensor | None
    check_finite: bool
    _skips: SkipCounter
    _ready: bool

    def _setup(self) -> None:
        """Everything that is made anew after unpickling, too."""
        raise NotImplementedError

    def _adopt(self) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """torch's format with the base optimizer's state; "ltfast" holds what goes beyond it."""
        handle = self.register_state_dict_post_hook(_add_extra, prepend=True)  # hooks of others see it, too
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's own state dict, one of torch.optim.SGD / AdamW, or one of davda54's SAM.

        Raises:
            ValueError: groups or parameters do not match; then nothing has changed.
        """
        if not self.climbed:
            self._adopt()  # parameters that were put into a group by hand
        merged, extra = dict[str, Any](), dict[str, Any]()

        def fit(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            nonlocal merged, extra
            merged, extra = merge_groups(self, given)
            return merged

        # The last hook: it gets what those of others make of the state dict.
        handle = self.register_load_state_dict_pre_hook(fit)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        own_loader = type(self.base_optimizer).load_state_dict is not Optimizer.load_state_dict
        if own_loader and "base" not in extra:  # torch's casts state that this one keeps as it is
            self.base_optimizer.load_state_dict(merged)
        self._follow_base()
        import_extra(self, extra)

    def __getstate__(self) -> dict[str, Any]:
        if self.climbed:  # a copy of the parameters would take theta + eps for theta
            raise RuntimeError("copied between the two passes: call restore() before, or copy after second_step()")
        extra = export_extra(self)
        if get_spawning_popen() is not None:  # a process that is being spawned opens the memory of these later
            self._handed_over = extra
        return {
            **super().__getstate__(),
            "base": self.base_optimizer,
            "own": self._own_state(),
            "settings": self._settings(),
            "anchor": export_anchor(self.blocks, self._params()),
            "extra": extra,
        }

    def _settings(self) -> dict[str, Any]:
        """What users set on the optimizer itself and `_setup` would forget."""
        return {name: getattr(self, name) for name in ("check_finite", "alpha", "_model", "_ascent")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" not in state:  # Optimizer.load_state_dict
            super().__setstate__(state)
            return
        self._ready, self._base_handles = False, []
        own, extra, self.base_optimizer = state.pop("own"), state.pop("extra"), state.pop("base")
        settings, anchor = state.pop("settings"), state.pop("anchor")
        super().__setstate__(state)
        self.__dict__.update(own)
        self._renew(settings, extra, anchor)

    def _renew(self, settings: dict[str, Any], extra: dict[str, Any], anchor: tuple[Any, ...] | None = None) -> None:
        """New buffers for the parameters there are now, with the state and the settings of the old ones."""
        self._setup()
        if anchor is not None:
            attach_anchor(self.blocks, self._params(), *anchor)
        self.__dict__.update(settings)
        if self._fused:
            adopt_state(self.base_optimizer, self.blocks)
        import_extra(self, extra)

    def _own_state(self) -> dict[str, Any]:
        """Constructor arguments that a subclass needs before `_setup` when it is unpickled."""
        return {}

    def _export(self) -> dict[str, Any]:
        """State beyond the base optimizer's, for "ltfast" of the state dict."""
        return {}

    def _check_extra(self, extra: dict[str, Any]) -> None:
        """ValueError if `_import` could not take `extra`."""

    def _import(self, extra: dict[str, Any]) -> None:
        """Take over what `_export` gave."""


def _add_extra(optimizer: Any, packed: dict[str, Any]) -> None:
    """Make torch's state dict ours, in place."""
    own_counts(packed)
    packed["ltfast"] = export_extra(optimizer)


def indices(optimizer: StoredOptimizer) -> dict[Tensor, int]:
    """Parameter -> its index in a state dict."""
    order: dict[Tensor, int] = {}
    for p in optimizer._params():
        order.setdefault(p, len(order))
    return order


def merge_groups(optimizer: StoredOptimizer, state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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
        if "ltfast" in state_dict:
            strange &= TORCHS
        if strange:
            kind = type(optimizer.base_optimizer).__name__
            raise ValueError(f"state_dict holds {', '.join(sorted(strange))}, which is not state of {kind}")
    if averages:
        extra.setdefault("averages", averages)
    state = {index: values for index, values in state.items() if values != {}}
    _check_shapes(optimizer, state)
    optimizer._check_extra(extra)
    return {**{k: v for k, v in state_dict.items() if k != "ltfast"}, "param_groups": merged, "state": state}, extra


def _check_shapes(optimizer: StoredOptimizer, state: dict[Any, Any]) -> None:
    names = SLOTS.get(type(optimizer.base_optimizer), ())
    for p, index in indices(optimizer).items():
        for name in names:
            value = state.get(index, {}).get(name)
            if isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"state_dict: {name} of parameter {index} is {tuple(value.shape)}, not {tuple(p.shape)}"
                )


def export_extra(optimizer: StoredOptimizer, base: bool = True) -> dict[str, Any]:
    """State beyond the base optimizer's: skipped steps, moving averages, Gram memory; `base`: also what one with a state_dict
    of its own keeps outside of `state`."""
    extra = {"skipped": optimizer._skips.total().clone(), **optimizer._export()}
    if base and type(optimizer.base_optimizer).state_dict is not Optimizer.state_dict:
        extra["base"] = optimizer.base_optimizer.state_dict()
    return extra


@torch.no_grad()
def import_extra(optimizer: StoredOptimizer, extra: dict[str, Any]) -> None:
    """Take over what `export_extra` gave (or part of it: an empty dict starts afresh)."""
    if "base" in extra:
        options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.base_optimizer.load_state_dict(extra["base"])
        optimizer._follow_base()
        for group, loaded in zip(optimizer.param_groups, options, strict=True):
            group |= loaded  # those of the state dict itself, which its user may have edited
    optimizer._skips.set(extra.get("skipped", 0.0))
    optimizer._import(extra)


def check_averages(optimizer: StoredOptimizer, averages: dict[int, Tensor], rows: int) -> None:
    """ValueError if `load_averages` could not take these."""
    for p, index in indices(optimizer).items():
        held = averages.get(index)
        if held is not None and held.shape != (rows, *p.shape):
            raise ValueError(
                f"state_dict: the moving average of parameter {index} is {tuple(held.shape)}, not {(rows, *p.shape)}"
            )


def averages_by_index(optimizer: StoredOptimizer, first: int, rows: int, blocks: list[Block]) -> dict[int, Tensor]:
    """Gradient rows first .. first + rows - 1 as {index: [rows, *shape]}."""
    order = indices(optimizer)
    result = {}
    for block in blocks:
        per_row = [block.flat.views(block.flat.grads[first + k]) for k in range(rows)]
        for i, p in enumerate(block.flat.params):
            if p in order:  # else somebody took it out of the param groups
                result[order[p]] = torch.stack([views[i] for views in per_row])
    return result


def load_averages(
    optimizer: StoredOptimizer, averages: dict[int, Tensor], first: int, rows: int, blocks: list[Block]
) -> None:
    """Undo `averages_by_index`; parameters without an entry get zeros."""
    order = indices(optimizer)
    for block in blocks:
        per_row = [block.flat.views(block.flat.grads[first + k]) for k in range(rows)]
        for i, p in enumerate(block.flat.params):
            held = averages.get(order[p])
            for k in range(rows):
                per_row[k][i].zero_() if held is None else per_row[k][i].copy_(held[k])
