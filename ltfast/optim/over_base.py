"""The base optimizer and what others do with it: its own steps, hooks and state dicts.

It shares `param_groups` and `state` with the optimizer around it, whose fused step stands for its own.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltfast.optim.inner import adopt_state, fused, release_state, replaced
from ltfast.optim.passes import TwoPasses

# What Optimizer.__init__ makes, and we register hooks in.
HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_post_hooks")


class OverBase(TwoPasses):
    """What an optimizer knows of the one that it wraps; StoredOptimizer builds on it.

    Attributes:
        base_optimizer: the inner optimizer.
    """

    base_optimizer: Optimizer
    _fused: bool  # the last step was the kernels', which then hold the state
    _base_handles: list[Any]  # of our hooks in base_optimizer, that before its step first

    def _check_base(self, defaults: dict[str, Any]) -> None:
        """ValueError if no step can be made of the base optimizer's."""
        name = type(self.base_optimizer).__name__
        if not all(hasattr(self.base_optimizer, hooks) for hooks in HOOKS):
            raise ValueError(f"base_optimizer {name} does not call Optimizer.__init__: use another")
        closure = inspect.signature(type(self.base_optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(f"base_optimizer {name} evaluates the loss itself (its step needs a closure): use another")
        if both := sorted(defaults.keys() & self.base_optimizer.defaults.keys()):
            raise ValueError(
                f"base_optimizer {name} already has an option {both[0]!r}, which this optimizer needs for itself; "
                "choose another base optimizer"
            )

    def _watch_base(self) -> None:
        """What users do with `base_optimizer` itself: step() is torch's own step (plain steps of a warm-up), which wants state
        of torch's kind; state_dict() may go to another optimizer; what load_state_dict() has loaded is the state."""
        for handle in self._base_handles:
            handle.remove()
        owner, base = weakref.ref(self), self.base_optimizer

        def before(*_: Any) -> None:
            if (optimizer := owner()) is None:
                return
            optimizer.restore()
            if optimizer._fused:
                optimizer._switch(False)
            for block in optimizer.blocks:
                block.flat.rows.consume()

        def loaded(_: Optimizer) -> None:
            if (optimizer := owner()) is not None:
                optimizer._follow_base()

        self._base_handles = [
            base.register_step_pre_hook(before),
            base.register_state_dict_post_hook(lambda _, packed: own_counts(packed)),
            base.register_load_state_dict_post_hook(loaded),
        ]
        hooks: Any = base._optimizer_step_pre_hooks
        hooks.move_to_end(self._base_handles[0].id, last=False)  # those of others find theta

    def _follow_base(self) -> None:
        """`base_optimizer` has other groups and another state now, which are ours: somebody has loaded a state dict."""
        for ours, theirs in zip(self.param_groups, self.base_optimizer.param_groups, strict=True):
            theirs |= {name: value for name, value in ours.items() if name not in theirs}  # rho and the like
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        for block in self.blocks:
            block.keep_written()
        self.restore()
        self._fused = fused(self.base_optimizer)
        if self._fused:
            adopt_state(self.base_optimizer, self.blocks)

    def _follow_state(self) -> None:
        """Somebody may have cleared or replaced `state`, or what it holds of a parameter: then that is the state."""
        self.base_optimizer.state = self.state
        if any(replaced(self.base_optimizer, block) for block in self.blocks):
            adopt_state(self.base_optimizer, self.blocks)

    def _switch(self, to_fused: bool) -> None:
        """Options may change at any time; hand the state over when the path changes."""
        if to_fused and not self._fused:
            adopt_state(self.base_optimizer, self.blocks)
        elif self._fused and not to_fused:
            release_state(self.base_optimizer)
            for block in self.blocks:
                block.forget()
        self._fused = to_fused

    def _before_step(self, loss_scale: Tensor | None) -> bool:
        """The hooks that come before a step of the base optimizer, for which the fused step stands; whether there are any.

        They find theta and gradients without the loss scale.
        """
        base, own = self.base_optimizer, self._base_handles[0].id
        hooks = [hook for key, hook in base._optimizer_step_pre_hooks.items() if key != own]
        if hooks:
            bad = self._first_bad
            self.restore()
            self._first_bad = bad  # this step still goes on
            if loss_scale is not None:
                self._divide(loss_scale)
        for hook in hooks:
            hook(base, (), {})
        return bool(hooks)

    def _divide(self, scale: Tensor) -> None:
        """Take a loss scale out of p.grad."""
        grads = [p.grad for block in self.blocks for p in block.flat.params if p.grad is not None]
        if grads:
            with torch.no_grad():
                torch._foreach_mul_(grads, scale.reciprocal().to(grads[0].device))


def own_counts(packed: dict[str, Any]) -> None:
    """Give every parameter a step count of its own in a state dict, in place: here one may be for many parameters."""
    for index, values in packed["state"].items():
        of_one = isinstance(values, dict)  # else state of the optimizer as a whole
        if of_one and isinstance(values.get("step"), Tensor):
            packed["state"][index] = {**values, "step": values["step"].detach().cpu().clone()}
