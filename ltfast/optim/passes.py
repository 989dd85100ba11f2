"""Between the two passes of a sharpness-aware step: theta + eps and back, loss scaling, BatchNorm, several processes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from ltfast.optim.block import Block
from ltfast.optim.processes import reduces, several
from ltfast.optim.statistics import frozen_statistics

ASCENTS = ("local", "global")


def loss_scale(scaler: GradScaler, device: torch.device) -> Tensor:
    """The scale by which `scaler` multiplies a loss, 0-dim on the device."""
    return cast(Tensor, scaler.scale(torch.ones((), device=device)))


class TwoPasses(Optimizer):
    """What an optimizer knows of a step that has begun; FlatOptimizer builds on it.

    Attributes:
        blocks: flat buffers; each knows whether its parameters hold theta + eps.
    """

    blocks: list[Block]
    _first_bad: Tensor | None  # nonzero if the first pass's gradient was not finite
    _scaler: GradScaler | None  # that of the first pass

    def _params(self) -> list[Tensor]:
        """Parameters in the order of the param groups, which a state dict counts by."""
        return [p for group in self.param_groups for p in group["params"]]

    def _begin_afresh(self) -> None:
        """No step has begun, no model is bound."""
        self._first_bad = self._scaler = None
        self._first_pass = _FirstPass(self)
        self._model: nn.Module | None = None
        self._ascent = "local"

    def bind(self, model: nn.Module, ascent: str = "local") -> Self:
        """Tell the optimizer its model, so that `step(closure)` can do right by it; returns the optimizer.

        BatchNorm statistics then move in the first pass only. Under DistributedDataParallel the closure's first pass
        runs without synchronisation ("local" ascent: each process climbs by its own batch) or with it ("global").
        """
        if ascent not in ASCENTS:
            raise ValueError(f"ascent is {ascent!r}; it must be one of {', '.join(ASCENTS)}")
        if getattr(model, "static_graph", False) and self._leaves_unreduced(ascent):
            raise ValueError("model: DistributedDataParallel(static_graph=True) reduces every pass: make it without")
        self._model, self._ascent = model, ascent
        return self

    # -- theta + eps and back ---------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Bring theta back, bit for bit, if an ascent left theta + eps in the parameters."""
        if self.climbed:
            with torch.no_grad():
                for block in self.blocks:
                    block.restore()
            self._first_bad = None
            self._moved()

    @property
    def climbed(self) -> bool:
        """True between an ascent and the descent (or `restore`)."""
        return any(block.climbed for block in self.blocks)

    def _moved(self) -> None:
        """The parameters have moved: copies of them that autocast keeps until its block ends are out of date."""
        if torch.is_autocast_cache_enabled():
            torch.clear_autocast_cache()

    @contextmanager
    def _whole_step(self, scaler: GradScaler | None) -> Iterator[None]:
        """Around `step(closure)`: an exception restores theta and takes back what a GradScaler has noted of the step.

        Raises:
            ValueError: `GradScaler.step(optimizer, closure)` has found no gradient of a first pass, or one that is unscaled
                already: it would not unscale the second.
        """
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and (scale is None or not isinstance(found, Tensor)):
            self._forget_scaler(None)
            raise ValueError(
                "scaler.step(optimizer, closure) needs the scaled gradients of a first pass: run scaler.scale(loss).backward() "
                "before it, without scaler.unscale_, or call optimizer.step(closure, scaler=scaler)"
            )
        try:
            yield
        except BaseException:
            self._break_off(scaler)
            raise

    def _break_off(self, scaler: GradScaler | None) -> None:
        """Give up a step between its passes: theta comes back, and `scaler` knows nothing of it."""
        self.restore()
        self._forget_scaler(scaler)

    def _forget_scaler(self, scaler: GradScaler | None) -> None:
        """A step was broken off: what GradScaler.step has set here, and that the first pass was unscaled."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)
        if scaler is not None and scaler.is_enabled():
            scaler._per_optimizer_states.pop(id(self._first_pass), None)

    def _take_unscaled(self, scaler: GradScaler) -> dict[str, Any] | None:
        """What `scaler.unscale_(optimizer)` has noted since the last step, or None; the second pass is unscaled afresh."""
        states = scaler._per_optimizer_states if scaler.is_enabled() else {}
        unscaled = id(self) in states and states[id(self)]["stage"] is OptState.UNSCALED
        return states.pop(id(self)) if unscaled else None

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """`with optimizer.perturbed(): second forward and backward`; an exception inside restores theta."""
        try:
            yield
        except BaseException:
            self._break_off(self._scaler)
            raise

    # -- BatchNorm, several processes --------------------------------------------------------------------------------------

    def _second_pass(self) -> AbstractContextManager[None]:
        return nullcontext() if self._model is None else frozen_statistics(self._model)

    def first_pass(self) -> AbstractContextManager[None]:
        """`with optimizer.first_pass(): forward AND backward` of the ascent: no reduction if the ascent is local.

        DistributedDataParallel decides at the forward pass whether the backward pass reduces, so `no_sync` around the
        backward pass alone comes too late.
        """
        return self._unreduced() if self._ascent == "local" else nullcontext()

    def _leaves_unreduced(self, ascent: str) -> bool:
        """Whether the first pass runs under `no_sync`."""
        return ascent == "local"

    def _unreduced(self) -> AbstractContextManager[None]:
        return self._model.no_sync() if reduces(self._model) else nullcontext()  # type: ignore[union-attr, operator]

    def _several(self) -> bool:
        """Whether several processes train together."""
        return several(self._model)

    def _verdict_is_shared(self) -> bool:
        """Whether all processes that train together know of an inf or NaN in the first pass."""
        return not self._several()


class _FirstPass:
    """Stands for the optimizer in GradScaler.unscale_ of the first pass, which allows one call an optimizer and step."""

    def __init__(self, owner: TwoPasses) -> None:
        self._owner = weakref.ref(owner)  # a cycle would keep a dropped optimizer's memory until it is collected
        self.params: list[Tensor] | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        owner = self._owner()
        assert owner is not None
        return owner.param_groups if self.params is None else [{"params": self.params}]
