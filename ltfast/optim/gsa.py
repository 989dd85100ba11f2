"""GSA and its kin for class-imbalanced training: ImbSAM, Focal-SAM, CC-SAM.

    L = sum_{k plain} w_k L_k(theta) + sum_{k perturbed} w_k L_k(theta + eps_k),   eps_k = s^2 sum_j c_kj g_j
and only the rule for the coefficients c differs (docs/method.md; ltfast.optim.rules lists sources).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ltfast.kernels import ascent_coefficients
from ltfast.optim.base import uncompiled
from ltfast.optim.grouped import Closure, GroupAscent
from ltfast.optim.rules import Rule

Head = Callable[..., tuple[Tensor, Tensor]]
# Options that live in the param groups, so that they can be scheduled, and their names in a Rule.
OPTIONS = {"rho": "rho", "adaptive": "adaptive", "C": "radius_C", "rho_min": "rho_min", "rho_max": "rho_max"}


class GroupedOptimizer(GroupAscent):
    """The whole step of the optimizers in this file; see GSA for how to use it.

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
        outputs = features if isinstance(features, tuple) else (features,)
        leaves = [f.detach().requires_grad_(f.requires_grad) for f in outputs]

        def evaluate() -> tuple[Tensor, Tensor]:
            return head(*leaves)

        loss = self._passes([evaluate], scaler)
        pairs = [(f, leaf.grad) for f, leaf in zip(outputs, leaves, strict=True) if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([f for f, _ in pairs], [g for _, g in pairs])
        return loss


class GSA(GroupedOptimizer):
    """Grouped sharpness-aware minimisation (Chen et al., CVPR 2026).

        optimizer = GSA(model.parameters(), torch.optim.SGD, counts=images_per_group, gram_every=16, lr=.1, momentum=.9)
        table = membership_for("groups", counts_of_classes, group_of_class)

        def closure():
            return group_losses(cross_entropy(model(x), y), table[y])

        optimizer.step(closure)

    Args:
        params: parameters or param groups. With scope="classifier" the group of the classifier's parameters must hold
            {"classifier": True}; with gram_every > 1 it may, and then each step computes the classifier's own group
            gradients (a backward that stops there) and remembers the other parameters' Gram matrix only: a better
            direction for next to no FLOPs. Do not mark it if classifier and encoder are one compiled graph.
        base_optimizer: torch.optim.SGD or AdamW (fused) or any other optimizer class.
        counts: [G] training images of each group, G <= 64 (32 with direction "friendly"). Two groups of one radius cancel
            in a shared orthogonal perturbation (a plain step results): use objective="per_group" or more groups.
        direction: "orthogonal" (Eq. 12), "friendly" (the released code), "projected", "none" or "joint".
        objective: "shared": one perturbation; "per_group": each group's own, G forward and backward passes instead of one.
        scope: "all" parameters or the "classifier".
        gram_every: 1: every group's gradient in every step (mode E); k > 1: one backward with coefficients from a Gram
            matrix renewed every k-th step (mode R), about 2 + (E - 2) / k SGD steps of work.
        C, rho_min, rho_max: radius rule, Eq. 13.
        adaptive: scale by |theta|.
        aggregate: how a shared perturbation averages the groups: "uniform" or by "share" of the batch.
        gram_ema: weight of the remembered Gram matrix when it is renewed.
        sigma, lmbda: of direction "friendly": s (g - sigma * m), m <- lmbda * m + (1 - lmbda) * g.
        base_kwargs: options of the base optimizer.

    Raises:
        ValueError: a bad argument, by name.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        counts: Tensor | Sequence[float],
        direction: str = "orthogonal",
        objective: str = "shared",
        scope: str = "all",
        gram_every: int = 1,
        C: float = 0.1,
        rho_min: float = 2e-3,
        rho_max: float = 3e-3,
        adaptive: bool = True,
        aggregate: str = "uniform",
        *,
        gram_ema: float = 0.5,
        sigma: float = 1.0,
        lmbda: float = 0.9,
        **base_kwargs: Any,
    ) -> None:
        rule = Rule(
            groups="bank", direction=direction, objective=objective, scope=scope, adaptive=bool(adaptive), rho=None,
            radius_C=C, rho_min=rho_min, rho_max=rho_max, sigma=sigma, lmbda=lmbda, aggregate=aggregate,
            gram_every=gram_every, gram_ema=gram_ema,
        )  # fmt: skip
        options = {"C": C, "rho_min": rho_min, "rho_max": rho_max}
        super().__init__(params, base_optimizer, rule, counts, options, base_kwargs)


class ImbSAM(GroupedOptimizer):
    """ImbSAM (Zhou et al., ICCV 2023): the tail's loss is sharpness-aware, the head's is not.

    step(closure), closure() -> (losses [2], shares [2]) of (head, tail): `membership_for("head-tail", counts, eta=20)`.
    A batch without tail images is a plain step of the base optimizer.

    Args:
        rho: radius |eps / s| of the tail's ascent; adaptive: s = |theta|. The others as for SAM.
    """

    groups = "head-tail"
    scheduled = ("rho", "adaptive")

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        rule = Rule(groups=self.groups, rho=rho, adaptive=bool(adaptive))
        super().__init__(params, base_optimizer, rule, [1, 1], {"rho": rho, "adaptive": bool(adaptive)}, base_kwargs)


class FocalSAM(ImbSAM):
    """Focal-SAM (Li et al., ICML 2025): the share t_c of every sample's loss is sharpness-aware, more for rarer classes.

    step(closure), closure() -> (losses [2], shares [2]) of the parts (1 - t, t): `membership_for("focal", counts)`.
    Arguments as for ImbSAM.
    """

    groups = "focal"


class CCSAM(GroupedOptimizer):
    """CC-SAM (Zhou et al., CVPR 2023): every class has its own perturbation of the classifier.

    step(closure), closure() -> (losses [C], shares [C]) of the classes (`membership_for("classes", counts)`); better,
    step(closure, head=...), which runs the encoder once. Classes are taken one after the other, so memory does not grow
    with C; the host reads which of them the batch holds (one wait a step).

    Args:
        params: param groups; that of the classifier holds {"classifier": True}.
        counts: [C] training images of each class.
        C, rho_min, rho_max, adaptive: radius rule, Eq. 13, as in GSA.
        scope: "classifier", or "all" for every parameter.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        counts: Tensor | Sequence[float],
        C: float = 0.1,
        rho_min: float = 2e-3,
        rho_max: float = 3e-3,
        adaptive: bool = False,
        scope: str = "classifier",
        **base_kwargs: Any,
    ) -> None:
        rule = Rule(
            groups="class", direction="none", objective="per_group", scope=scope, adaptive=bool(adaptive), rho=None,
            radius_C=C, rho_min=rho_min, rho_max=rho_max,
        )  # fmt: skip
        options = {"C": C, "rho_min": rho_min, "rho_max": rho_max}
        super().__init__(params, base_optimizer, rule, counts, options, base_kwargs)

    def _rows_of(self, block: Any) -> int:
        return 2 if self._climbs(block) else 1

    def _passes(self, closures: list[Closure], scaler: GradScaler | None) -> Tensor:
        if len(closures) != 1:
            raise ValueError("closure: CC-SAM takes one closure; classes are not averaged over micro-batches")
        with self._unreduced():
            losses, shares = self._evaluate(closures[0])
        world = self._world()
        total = shares / world if world > 1 else shares
        self._add_up(total)
        present = [k for k, share in enumerate(total.tolist()) if share > 0]
        if not present:
            raise ValueError(f"closure: no batch share is above 0: {shares.tolist()}")
        self._attach()
        bad = [(~torch.isfinite((losses.detach() * shares).sum())).float()]
        holders = [block.flat.rows for block in self._climbing]
        self.ascent.n_elements = self._climbing_elements()
        for k in present:
            self.restore()  # the graph of the losses at theta is read once more
            factor = shares[k] / (world * total[k]) if world > 1 else None
            self._fill(holders, 1, losses[k], factor, scaler, add=False, retain=k != present[-1])
            rows = [holder.data[1:2] for holder in holders]
            self._add_up(*rows)
            if scaler is not None:
                self._unscale(rows, scaler, tell=k == present[0])
            coef = self._class_coefficients(rows, k)
            bad.append(self.stats["bad"])
            self._climb(coef, rows)
            with self._second_pass(), nullcontext() if k == present[-1] else self._unreduced():
                perturbed, _ = self._evaluate(closures[0])
                self._backward(perturbed[k] * shares[k], scaler)
        self._first_bad = self._of_all(torch.stack(bad).amax())
        return (losses.detach() * shares).sum()

    def _class_coefficients(self, rows: list[Tensor], k: int) -> Tensor:
        matrix, theta_sq = self._gram(rows)
        options = self.rule.options | {"direction": "joint", "objective": "shared"}  # of this class alone
        count = self.ascent.counts[k : k + 1]
        coef, stats = ascent_coefficients(matrix, theta_sq, None, count, self.ascent.n_elements, **options)
        self.stats = stats._asdict()
        return coef
