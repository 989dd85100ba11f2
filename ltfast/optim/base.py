"""What all sharpness-aware optimizers share: flat parameters, gradients, and the descent that restores theta.

Between steps the flat buffer IS theta: in-place edits of parameters, EMA swaps and `model.load_state_dict` are respected.
An ascent copies theta to `kept` in the pass that writes theta + eps; the update reads `kept` and writes theta, so restoring
costs no pass of its own and is exact to the bit. Parameters' storage is set once, at construction, and never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltfast.kernels import gram_partials
from ltfast.optim.anchors import attach_anchor
from ltfast.optim.block import Block, Present
from ltfast.optim.inner import check_fused, check_options, foreign_step, fused, fused_step
from ltfast.optim.skips import SkipCounter
from ltfast.optim.state import StoredOptimizer, export_extra

# Decorates a step, which runs as it is where torch.compile traces its caller: the compiler loses what a method puts on an
# optimizer. (torch.optim's own; torch.compiler.disable would import the compiler together with this module.)
uncompiled = torch._disable_dynamo


class FlatOptimizer(StoredOptimizer):
    """Base class; see SAM for the two-pass protocol and GSA for the closure of group losses.

    Args:
        params: parameters or param groups, float32, on one device.
        base_optimizer: a class such as torch.optim.SGD; SGD and AdamW run fused, any other through its own step.
        defaults: this optimizer's own options of a param group.
        base_kwargs: options of the base optimizer.

    Attributes:
        base_optimizer: the inner optimizer; it shares `param_groups` and `state` with this one.
        stats: device tensors that describe the last ascent, for logging.
        check_finite: also test the final gradient for inf and NaN, one more pass (always done with several processes
            and where a GradScaler has scaled it); a step with a non-finite gradient is skipped.

    Raises:
        ValueError: a bad argument, by name.
    """

    _step_supports_amp_scaling = True  # GradScaler.step then calls step() even on overflow, which must restore theta
    ascent_rows = 1

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        defaults: dict[str, Any],
        base_kwargs: dict[str, Any],
    ) -> None:
        if isinstance(base_optimizer, Optimizer) or not callable(base_optimizer):
            raise ValueError(f"base_optimizer must be a class like torch.optim.SGD, not {base_optimizer!r}")
        check_options({**defaults, **base_kwargs})
        # No defaults on the class: wrappers that derive from it (Lightning's) would find those instead of these.
        self._ready, self._base_handles = False, []
        super().__init__(params, {**defaults, **base_kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self._check_base(defaults)
        self.defaults.update(self.base_optimizer.defaults)
        self._setup()

    def _setup(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        for group in self.param_groups:
            check_options(group)
        self._fused = fused(self.base_optimizer)
        if self._fused:
            check_fused(self.base_optimizer)
        self.blocks = self._make_blocks()
        self.check_finite = False
        self.stats: dict[str, Tensor] = {}
        self.alpha: float | Tensor | None = None
        self._layout = self._groups_now()
        self._begin_afresh()
        self._watch_base()
        self._skips = SkipCounter(self.blocks[0].flat.device)
        self._ready = True

    def _make_blocks(self) -> list[Block]:
        return [self._block(range(len(self.param_groups)))]

    def _groups_now(self) -> list[list[int]]:
        """Which parameters each group holds, by identity."""
        return [[id(p) for p in group["params"]] for group in self.param_groups]

    def _block(self, groups: Iterable[int]) -> Block:
        return Block([(k, self.param_groups[k]["params"]) for k in groups], self.ascent_rows)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at construction or later; a later one gets a flat buffer of its own.

        Raises:
            ValueError: an option that no update could use, by name, or what torch refuses; then no group was added.
        """
        if isinstance(param_group, dict):
            check_options(param_group)
        super().add_param_group(param_group)
        if not self._ready:
            return
        try:
            if self._fused:
                check_fused(self.base_optimizer)
            if not self.param_groups[-1]["params"]:  # to be filled later
                self._layout = self._groups_now()
                return
            block = self._block([len(self.param_groups) - 1])
            if block.flat.device != self.blocks[0].flat.device:
                raise ValueError(f"params of the new group lie on {block.flat.device}, the others elsewhere")
        except ValueError:
            self.param_groups.pop()
            raise
        self.blocks.append(block)
        self._layout = self._groups_now()

    # -- gradients ---------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients. None (the default) is the cheapest: autograd then hands its own tensors over and one
        gather brings them into the flat buffer, 2 passes and a few launches, where adding up in place costs 4 passes (zero,
        read twice, write) and one launch a parameter. `set_to_none=False` keeps views of the buffer attached, for
        gradient accumulation over many micro-batches; as in torch, who had a gradient has a zero one then.
        """
        if self._layout != self._groups_now():
            super().zero_grad(set_to_none)  # parameters put into a group by hand are in no block before the next step
        for block in self.blocks:
            if set_to_none:
                for p in block.flat.params:
                    p.grad = None
                continue
            wanted = [e and p.requires_grad for e, p in zip(block.expected, block.flat.params, strict=True)]
            had = [p.grad is not None for p in block.flat.params]
            block.flat.rows.attach(0, only=wanted, present=had)

    @property
    def gathered(self) -> int:
        """Gradients that had to be copied into the flat buffer because p.grad was not a view of it."""
        return sum(block.flat.rows.gathered for block in self.blocks)

    def _collect(self, row: int = 0) -> list[Present]:
        """Bring every gradient into row `row`; which parameters have one, for each block."""
        self._adopt()
        presents: list[Present] = []
        for block in self.blocks:
            presents.append(block.flat.rows.collect(row))
            block.expected = [bool(here) for here in presents[-1]]
        return presents

    def _adopt(self) -> None:
        """Take over parameters whose `.data` was replaced; a model that moved to another device takes all state along, and
        so do parameters that were put into, taken out of or moved between the param groups by hand."""
        self.base_optimizer.param_groups = self.param_groups
        moved = any(block.flat.params[0].device != block.flat.device for block in self.blocks)
        if moved or self._layout != self._groups_now():
            if self.climbed or any(block.anchor is not None for block in self.blocks):
                what = "the model moved to another device" if moved else "the parameters of param_groups were changed"
                raise RuntimeError(
                    f"{what} in mid-step or with an anchor set; call restore() and set_anchor(None) first, then set the "
                    "anchor again"
                )
            for group in self.param_groups:  # a new one may have come by base_optimizer.add_param_group
                group |= {name: value for name, value in self.defaults.items() if name not in group}
            self._renew(self._settings(), export_extra(self, base=False))
        for block in self.blocks:
            block.flat.adopt()

    def _fresh(self) -> bool:
        return any(block.flat.rows.fresh() for block in self.blocks)

    # -- the descent ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _descend(self, row: int = 0, *, check: bool = False) -> None:
        """Update theta (restoring it first) by gradient row `row`; a non-finite gradient skips the update."""
        try:
            loss_scale, found_inf = self._of_scaler("grad_scale"), self._of_scaler("found_inf")
            scale: float | Tensor | None = None if loss_scale is None else 1.0 / loss_scale
            if self.alpha is not None:
                scale = self.alpha if scale is None else scale * self.alpha
            for group in self.param_groups:
                check_options(group)
            covered = fused(self.base_optimizer)
            if covered:
                check_fused(self.base_optimizer)
                if self._before_step(loss_scale):
                    scale = self.alpha
            presents = self._collect(row)
            skip = self._skip(row, found_inf, check)
            self._switch(covered)
            if self._fused:
                self._follow_state()
                for block, present in zip(self.blocks, presents, strict=True):
                    fused_step(self.base_optimizer, block, row, present, scale, skip)
                for hook in list(self.base_optimizer._optimizer_step_post_hooks.values()):
                    hook(self.base_optimizer, (), {})
            else:
                self.restore()
                foreign_step(self.base_optimizer, self.blocks, row, presents, scale, skip)
        except BaseException:
            self.restore()
            self._first_bad = None
            raise
        self._skips.add(skip)
        self._moved()
        self._first_bad = None
        for optimizer in (self, self.base_optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        for block in self.blocks:
            block.flat.changed()
            block.flat.rows.consume()

    def _of_scaler(self, name: str) -> Tensor | None:
        """What GradScaler.step has set here; it may lie on another GPU, where the loss or another optimizer's parameters do. None
        if it has not, or (it sets the number 0 then) has found no gradient.
        """
        value = getattr(self, name, None)
        return None if value is None or isinstance(value, int) else value.to(self.blocks[0].flat.device)

    def _skip(self, row: int, found_inf: Tensor | None, check: bool) -> Tensor | None:
        """0-dim flag, nonzero if this update must not happen; None if nothing speaks for or against.

        With several processes the first pass is each one's own in a local ascent, so only the final, reduced gradient may
        decide.
        """
        flags = [] if found_inf is None else [found_inf.reshape(())]
        if self._verdict_is_shared() and self._first_bad is not None:
            flags.append(self._first_bad)
        if check or self.check_finite or self._several():
            total = sum(gram_partials(block.flat.grads[row][None])[0].sum() for block in self.blocks)
            flags.append((~torch.isfinite(torch.as_tensor(total))).float())
        if len(flags) <= 1:
            return flags[0] if flags else None
        return torch.stack(flags).amax()

    @property
    def skipped(self) -> Tensor:
        """Updates left out because a gradient was not finite, 0-dim device tensor."""
        return self._skips.total()

    # -- knowledge preservation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def set_anchor(
        self,
        weights: Iterable[Tensor | None] | None,
        targets: Iterable[Tensor | None] | None = None,
        strength: float | Tensor = 1.0,
        alpha: float | Tensor | None = None,
    ) -> None:
        """Add strength * A * (theta - T) to the gradient in the update's own pass (GKP); `set_anchor(None)` removes it.

        Copies and pickles of the optimizer keep it; a state dict does not hold it.

        Args:
            weights, targets: A and T for each parameter in the order of the param groups; None: that one is free.
            strength: (1 - alpha) * lambda; a 0-dim device tensor may be changed in place.
            alpha: factor of the loss gradient; None is 1.

        Raises:
            ValueError: targets is None, or number or shapes of the tensors do not fit; then nothing has changed.
        """
        if weights is None:
            for block in self.blocks:
                block.anchor = None
            self.alpha = None
            return
        if targets is None:
            raise ValueError("targets is None: pass T for each parameter, or set_anchor(None) to remove the anchor")
        if not self.climbed:
            self._adopt()  # parameters that were put into, or taken out of, a group by hand
        attach_anchor(self.blocks, self._params(), list(weights), list(targets), strength)
        self.alpha = alpha
