"""The step of optimizers whose closure returns group losses: ImbSAM, Focal-SAM, CC-SAM and GSA (gsa.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from ltfast.optim.base import uncompiled
from ltfast.optim.group_ascent import Closure, GroupAscent

Head = Callable[..., tuple[Tensor, Tensor]]
# Options that live in the param groups, so that they can be scheduled, and their names in a Rule.
OPTIONS = {"rho": "rho", "adaptive": "adaptive", "C": "radius_C", "rho_min": "rho_min", "rho_max": "rho_max"}


class GroupedOptimizer(GroupAscent):
    """Step by closures; see GSA for how to use it.

    Attributes:
        scheduled: options of the rule that live in the param groups. (A base optimizer may have a `rho` of its own.)
    """

    scheduled: tuple[str, ...] = ("C", "rho_min", "rho_max")

    def _sync_rule(self) -> None:
        """Take over options that were changed in the param groups."""
        options = {}
        for name in self.scheduled:
            field = OPTIONS[name]
            values = [group[name] for group in self.param_groups if name in group]
            if any(value != values[0] for value in values):
                raise ValueError(f"{name} differs between the param groups: one ascent has one {name}")
            if values and values[0] != getattr(self.rule, field):
                options[field] = values[0]
        if options:
            self.rule = self.ascent.rule = replace(self.rule, **options)

    @uncompiled
    def step(  # type: ignore[override]
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        head: Head | None = None,
        scaler: GradScaler | None = None,
        on_gradient: Callable[[], object] | None = None,
    ) -> Tensor | None:
        """One step; returns the loss at theta, sum_k w_k L_k, on the device.

        Args:
            closure: runs forward only and returns (group losses [G], batch shares [G]); the optimizer runs backward.
                Several closures are micro-batches of one step (gradient accumulation), each called as often as the one
                would be. Each weighs the same: of unequal ones return shares times size over mean size. None finishes a
                step for `scaler`.
            head: for scope="classifier": closure() then returns features (a tensor or a tuple of tensors), computed
                once, and head(*features) the group losses and shares; only the head is evaluated at perturbed points.
            scaler: GradScaler of fp16 autocast; do not scale the losses yourself, and call its update() afterwards.
            on_gradient: called with the final (unscaled) gradient in p.grad before the update: clipping, logging.

        Raises:
            ValueError: the closure's result has the wrong shape or no gradient. Theta is then what it was.
        """
        if closure is None:
            if not self.climbed:
                self._forget_scaler(None)
                raise ValueError("closure is None: pass a function that returns (group losses, batch shares)")
            self._descend()
            return None
        if getattr(self, "found_inf", None) is not None:
            self._forget_scaler(None)
            raise ValueError("scaler.step(optimizer, closure): call optimizer.step(closure, scaler=scaler) instead")
        closures = [closure] if callable(closure) else list(closure)
        if not closures:
            raise ValueError("closure is an empty list: pass at least one micro-batch")
        self.restore()
        self._adopt()
        self._sync_rule()
        self._check_processes()
        if scaler is not None:
            self._take_unscaled(scaler)  # of gradients that have no part in this step
        with torch.enable_grad(), self._whole_step(scaler):
            loss = self._passes(closures, scaler) if head is None else self._head_passes(closures, head, scaler)
            if on_gradient is not None:
                if scaler is not None:
                    scaler.unscale_(self)
                on_gradient()
            if scaler is not None:
                scaler.step(self)
            else:
                self._descend()
        return loss

    def _passes(self, closures: list[Closure], scaler: GradScaler | None) -> Tensor:
        """Leave theta + eps in the parameters and the final gradient in p.grad; the loss at theta."""
        coef, rows, loss = self._first(closures, scaler)
        for k in self._points(coef, rows):
            for m, closure in enumerate(closures):
                last = (k is None or k + 1 == len(coef)) and m + 1 == len(closures)
                with self._second_pass(), nullcontext() if last else self._unreduced():
                    losses, shares = self._evaluate(closure)
                    self._backward(self._part(losses, shares, k) / len(closures), scaler)
        return loss

    def _points(self, coef: Tensor, rows: list[Tensor]) -> Any:
        """Move to every perturbed point in turn: group k's, or the shared one (None); gradients are cleared before."""
        if self.rule.objective == "shared":
            self._climb(coef, rows)
            self._settle(rows)
            self._attach()
            yield None
            return
        self._attach()
        for k in range(len(coef)):
            self._climb(coef[k], rows)
            yield k
        self._settle(rows)

    def _part(self, losses: Tensor, shares: Tensor, k: int | None) -> Tensor:
        """What is minimised at the perturbed point."""
        if k is not None:
            return losses[k] * shares[k]
        first = 1 if self.rule.split else 0
        return (losses[first:] * shares[first:]).sum()

    def _attach(self) -> None:
        """Let autograd add up in row 0; in a split rule that holds the gradient of the part that stays at theta."""
        if not self.rule.split:
            self.zero_grad()
            return
        for block in self.blocks:
            rows = block.flat.rows
            rows.attach(0, zero=False, only=rows.filled([0]))  # DDP takes whatever p.grad holds for a gradient

    @staticmethod
    def _backward(loss: Tensor, scaler: GradScaler | None) -> None:
        with torch.enable_grad():
            (loss if scaler is None else scaler.scale(loss)).backward()

    # -- scope "classifier" with the encoder run once ----------------------------------------------------------------------

    def _head_passes(self, closures: list[Closure], head: Head, scaler: GradScaler | None) -> Tensor:
        if self.rule.scope != "classifier" or len(closures) != 1:
            raise ValueError("head needs scope='classifier' and a single closure")
        if hasattr(self._model, "no_sync"):
            raise ValueError("head does not work with DistributedDataParallel: reduce p.grad in on_gradient instead")
        with torch.enable_grad():
            features: Any = closures[0]()
        outputs = tuple(features) if isinstance(features, (tuple, list)) else (features,)
        if wrong := [type(f).__name__ for f in outputs if not isinstance(f, Tensor)]:
            raise ValueError(f"closure returned features of type {wrong[0]}; head takes a tensor or a tuple of tensors")
        leaves = [f.detach().requires_grad_(f.requires_grad) for f in outputs]

        def evaluate() -> tuple[Tensor, Tensor]:
            return head(*leaves)

        loss = self._passes([evaluate], scaler)
        pairs = [(f, leaf.grad) for f, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])
        return loss
