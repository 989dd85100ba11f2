"""SAM, ASAM and Friendly-SAM: drop-in replacements of davda54/sam and nblt/F-SAM on flat buffers.

    eps = rho * s^2 * g / |s * g|,  s = 1 or |theta| (adaptive);  g is the gradient, for Friendly-SAM g - sigma * m
    theta <- base_optimizer(theta, gradient at theta + eps)

One step is four launches: Gram matrix of the gradient, coefficient, perturbation (which keeps theta), update (which
restores it). Sources: Foret et al., ICLR 2021; Kwon et al., ICML 2021; Li et al., CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer

from ltfast.kernels import ascent_coefficients, gram_partials, perturb
from ltfast.optim.base import FlatOptimizer, uncompiled
from ltfast.optim.block import Block, Present, split_shared
from ltfast.optim.passes import loss_scale
from ltfast.optim.state import averages_by_index, check_averages, indices, load_averages

Closure = Callable[[], Any]


class SAM(FlatOptimizer):
    """Sharpness-aware minimisation: replace the import of davda54/sam and keep the rest.

        loss(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    Args:
        params: parameters or param groups; groups may have their own rho and adaptive beside the base optimizer's options.
        base_optimizer: torch.optim.SGD or AdamW (fused) or any other optimizer class.
        rho: radius of the ascent, >= 0. Adaptive steps want a larger one (ASAM's paper: about ten times).
        adaptive: scale by |theta| (ASAM).
        base_kwargs: options of the base optimizer (lr, momentum, weight_decay, ...).

    Raises:
        ValueError: a bad argument, by name.
    """

    direction = "joint"
    sigma = 1.0  # what "friendly" takes of the moving average

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, base_optimizer, {"rho": rho, "adaptive": bool(adaptive)}, base_kwargs)

    # -- the two passes ------------------------------------------------------------------------------------------------

    @uncompiled
    @torch.no_grad()
    def first_step(self, zero_grad: bool = False, *, scaler: GradScaler | None = None) -> None:
        """Climb from theta to theta + eps by the gradients there are.

        Args:
            zero_grad: clear the gradients afterwards, ready for the second pass.
            scaler: the GradScaler that scaled the loss; its overflow check covers this pass too.
        """
        if self.climbed:  # the last step was given up between its passes
            self._break_off(self._scaler)
        if scaler is not None:
            self._unscale(scaler)
        self._collect()
        for group in self.param_groups:
            if not 0 <= group["rho"] < float("inf"):
                raise ValueError(f"rho is {group['rho']}; it must be a finite number >= 0")
        self._climb()
        for block in self.blocks:
            block.flat.changed()
            block.note()
        self._scaler = scaler
        if zero_grad:
            self.zero_grad()

    @uncompiled
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to theta and take the base optimizer's step by the gradients there are.

        Without a first step before it, this is the base optimizer's plain step. p.grad stays as it is.

        Raises:
            ValueError: the first step had a GradScaler, which has not unscaled these gradients. Theta is back then.
        """
        if self._scaler is not None and self.climbed:
            self._check_unscaled(self._scaler)
        self._descend()
        if zero_grad:
            self.zero_grad()

    @uncompiled
    def step(self, closure: Closure | None = None, *, scaler: GradScaler | None = None) -> Any:  # type: ignore[override]
        """One whole step. `closure` runs forward and backward (as often as it likes) and may return the loss.

        The gradients at theta are those already there (davda54's protocol) or, if none have come since the last step,
        those of a first call of the closure. Without a closure this is `second_step`, so that
        `first_step(); ...; scaler.step(optimizer)` works. An exception in the closure restores theta.

        Args:
            closure: forward and backward of the same batch; with `scaler`, of the scaled loss.
            scaler: GradScaler; call its update() afterwards. `scaler.step(optimizer, closure)` works as well.
        """
        if closure is None:
            if not self.climbed:
                self._forget_scaler(None)
                raise ValueError(
                    "closure is None: pass a function that runs forward and backward, or call first_step before step() or "
                    "scaler.step(optimizer)"
                )
            with torch.no_grad():
                self._descend()
            return None
        try:
            with self._whole_step(scaler):
                return self._both_passes(torch.enable_grad()(closure), scaler)
        except BaseException:
            self.zero_grad()  # gradients of half a step are not those of the next one's first pass
            raise

    def _both_passes(self, closure: Closure, scaler: GradScaler | None) -> Any:
        scaled = self._of_scaler("grad_scale")
        if not self._fresh():
            self.zero_grad()
            with self.first_pass():
                closure()
        if scaled is not None:
            self._divide(scaled)
        self.first_step(zero_grad=True, scaler=scaler)
        with self._second_pass():
            loss = closure()
        if scaler is not None:
            scaler.step(self)
        else:
            with torch.no_grad():
                self._descend(check=scaled is not None)
        return loss

    def _unscale(self, scaler: GradScaler) -> None:
        """Unscale the first pass's gradients, unless `scaler.unscale_(optimizer)` has done so, for clipping.

        With several processes overflow is not told to the scaler: it may differ between them, and so would the scale.
        """
        unscaled = self._take_unscaled(scaler)
        if unscaled is not None:
            if not self._several():
                scaler._per_optimizer_states[id(self._first_pass)] = unscaled
        elif self._several():
            self._divide(loss_scale(scaler, self.blocks[0].flat.device))
        else:
            scaler.unscale_(self._first_pass)  # type: ignore[arg-type]

    def _check_unscaled(self, scaler: GradScaler) -> None:
        if scaler.is_enabled() and not scaler._per_optimizer_states[id(self)]["found_inf_per_device"]:
            self._break_off(scaler)
            raise ValueError(
                "second_step after first_step(scaler=...): the gradients are still scaled; call scaler.step(optimizer) "
                "instead, or scaler.unscale_(optimizer) before"
            )

    # -- the ascent ------------------------------------------------------------------------------------------------------

    def _parts(self, *names: str) -> list[tuple[Block, slice, tuple[Any, ...]]]:
        """Stretches of the blocks whose groups agree in the options `names`."""
        parts: list[tuple[Block, slice, tuple[Any, ...]]] = []
        for block in self.blocks:
            for k, span in block.spans:
                options = tuple(self.param_groups[k].get(name) for name in names)
                if parts and parts[-1][0] is block and parts[-1][2] == options:
                    parts[-1] = (block, slice(parts[-1][1].start, span.stop), options)
                else:
                    parts.append((block, span, options))
        return parts

    def _climb(self) -> None:
        rows = self.ascent_rows
        partials = []
        for block, span, (adaptive,) in self._parts("adaptive"):
            theta = block.flat.data[span] if adaptive else None
            partials.append(gram_partials(block.flat.grads[:rows, span], theta, adaptive)[0])
        matrix = partials[0] if len(partials) == 1 else torch.cat(partials)
        parts = self._parts("rho", "adaptive", "maximize")
        radii = {options[0] for _, _, options in parts}
        rho = radii.pop() if len(radii) == 1 else None
        coef, stats = ascent_coefficients(
            matrix,
            None,
            None,  # one direction
            None,
            1,
            direction=self.direction,
            rho=1.0 if rho is None else rho,
            sigma=self.sigma,
        )
        for block in self.blocks:
            own = [part for part in parts if part[0] is block]
            if len(own) > 1:
                block.kept.copy_(block.flat.data)
                block.climbed = True  # from here on an interruption can be taken back
            for _, span, (radius, adaptive, maximize) in own:
                scaled = coef if rho is not None else coef * radius
                scaled = -scaled if maximize else scaled  # the worst is where the objective is least
                theta, keep = block.flat.data[span], None if block.climbed else block.kept[span]
                perturb(theta, block.flat.grads[:rows, span], scaled, adaptive, out=theta, keep=keep)
            block.climbed = True
        self._moved()
        self.stats = stats._asdict()
        self._first_bad = stats.bad


class FriendlySAM(SAM):
    """Friendly-SAM: climb along g - sigma * m, the part of the gradient that its moving average m does not explain.

    m <- lmbda * m + (1 - lmbda) * g, after the ascent; the first gradient of a parameter starts its average, and until
    then the direction is the plain gradient. Parameters without a gradient stay where they are and keep their average.

    Args:
        sigma, lmbda: as above; the others as for SAM.
    """

    direction = "friendly"
    ascent_rows = 2  # the gradient, its moving average

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        sigma: float = 1,
        lmbda: float = 0.9,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if not 0 <= lmbda <= 1:
            raise ValueError(f"lmbda is {lmbda}; it must be in [0, 1]")
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigma is {sigma}; it must be a finite number >= 0")
        self.sigma, self.lmbda = float(sigma), float(lmbda)
        super().__init__(params, base_optimizer, rho, adaptive, **base_kwargs)

    def _own_state(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "lmbda": self.lmbda}

    def _setup(self) -> None:
        super()._setup()
        self._begun: dict[Block, list[Tensor]] = {}

    def _begun_in(self, block: Block) -> list[Tensor]:
        """0-dim flag of each parameter, 1 once its average has begun; parameters that came together share one."""
        if block not in self._begun:
            flag = torch.zeros((), device=block.flat.device, dtype=torch.float32)
            self._begun[block] = [flag] * len(block.flat.params)
        return self._begun[block]

    def _collect(self, row: int = 0) -> list[Present]:
        self._present = super()._collect(row)
        return self._present

    def _climb(self) -> None:
        """Climb, then move the averages: m + w (g - m) as a perturbation of m by the rows g and m, which leaves m
        alone where w = 0 even if g is infinite."""
        with ExitStack() as stack:
            for block, present in zip(self.blocks, self._present, strict=True):
                absent = [i for i, here in enumerate(present) if not here]
                stack.enter_context(block.flat.rows.without([1], absent))
            super()._climb()
        ok = 1.0 - self.stats["bad"]
        for block, present in zip(self.blocks, self._present, strict=True):
            begun = self._begun_in(block)
            split_shared(begun, present)
            flags = {id(flag): flag for flag, here in zip(begun, present, strict=True) if here}
            weights = {}
            for key, flag in flags.items():
                weight = ok * torch.where(flag > 0, 1 - self.lmbda, 1.0)
                weights[key] = torch.stack((weight, -weight))
                torch.maximum(flag, ok, out=flag)
            which = tuple(id(flag) if here else 0 for flag, here in zip(begun, present, strict=True))
            for run in block.runs(which, split_counters=False):
                if run.present:
                    rows = block.flat.grads[:2, run.span]
                    perturb(rows[1], rows, weights[run.present], out=rows[1])

    def _export(self) -> dict[str, Any]:
        averages, order = averages_by_index(self, 1, 1, self.blocks), indices(self)
        begun: set[int] = set()
        for block in self.blocks:
            flags = self._begun_in(block)
            known = {flag: bool(flag) for flag in set(flags)}  # few: each is a wait for the device
            begun |= {order[p] for p, flag in zip(block.flat.params, flags, strict=True) if known[flag] and p in order}
        return {"averages": {i: average for i, average in averages.items() if i in begun}}

    def _check_extra(self, extra: dict[str, Any]) -> None:
        check_averages(self, extra.get("averages", {}), 1)

    def _import(self, extra: dict[str, Any]) -> None:
        averages, order = extra.get("averages", {}), indices(self)
        load_averages(self, averages, 1, 1, self.blocks)
        for block in self.blocks:
            off = torch.zeros((), device=block.flat.device, dtype=torch.float32)
            on = torch.ones_like(off)
            self._begun[block] = [on if order[p] in averages else off for p in block.flat.params]
