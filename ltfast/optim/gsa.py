"""GSA and its kin for class-imbalanced training: ImbSAM, Focal-SAM, CC-SAM.

    L = sum_{k plain} w_k L_k(theta) + sum_{k perturbed} w_k L_k(theta + eps_k),   eps_k = s^2 sum_j c_kj g_j
and only the rule for the coefficients c differs (docs/method.md; ltfast.optim.rules lists sources).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ltfast.kernels import ascent_coefficients
from ltfast.optim.group_ascent import Closure, batch_loss
from ltfast.optim.grouped import GroupedOptimizer
from ltfast.optim.rules import Rule


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
    with C; the host reads which of them the batch holds (one wait per step).

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
        loss = batch_loss(losses, shares)
        bad = [(~torch.isfinite(loss)).float()]
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
        return loss

    def _class_coefficients(self, rows: list[Tensor], k: int) -> Tensor:
        matrix, theta_sq = self._gram(rows)
        options = self.rule.options | {"direction": "joint", "objective": "shared"}  # of this class alone
        count = self.ascent.counts[k : k + 1]
        coef, stats = ascent_coefficients(matrix, theta_sq, None, count, self.ascent.n_elements, **options)
        self.stats = stats._asdict()
        return coef
