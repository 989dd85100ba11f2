"""What all sharpness-aware optimizers share: flat parameters, the descent, AMP, skipping, and restoring theta.

Between steps the flat buffer IS theta: in-place edits of parameters, EMA swaps and `model.load_state_dict` are respected.
An ascent copies theta to `kept` in the pass that writes theta + eps; the update reads `kept` and writes theta, so restoring
costs no pass of its own and is exact to the bit. Parameters' storage is set once, at construction, and never changes.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from ltfast.kernels import gram_partials
from ltfast.optim.anchors import attach_anchor, export_anchor
from ltfast.optim.inner import (
    Block,
    Present,
    adopt_state,
    check_fused,
    check_options,
    foreign_step,
    fused,
    fused_step,
    release_state,
    replaced,
)
from ltfast.optim.skips import SkipCounter
from ltfast.optim.state import export_extra, import_extra, merge_groups
from ltfast.optim.statistics import frozen_statistics

ASCENTS = ("local", "global")


def several() -> bool:
    """True if several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class FlatOptimizer(Optimizer):
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
    _ready = False
    _base_hook: Any = None
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
        super().__init__(params, {**defaults, **base_kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self._check_base(defaults)
        self.defaults.update(self.base_optimizer.defaults)
        self._setup()

    def _check_base(self, defaults: dict[str, Any]) -> None:
        """ValueError if no step can be made of the base optimizer's."""
        name = type(self.base_optimizer).__name__
        closure = inspect.signature(type(self.base_optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(f"base_optimizer {name} evaluates the loss itself (its step needs a closure): use another")
        if both := sorted(defaults.keys() & self.base_optimizer.defaults.keys()):
            raise ValueError(
                f"base_optimizer {name} has an option {both[0]} of its own, which would be ours: use another"
            )

    def _setup(self) -> None:
        """Everything that is made anew after unpickling, too."""
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
        self._first_bad: Tensor | None = None
        self._scaler: GradScaler | None = None  # that of the first pass
        self._first_pass = _FirstPass(self)
        self._watch_base()
        self._skips = SkipCounter(self.blocks[0].flat.device)
        self._model: nn.Module | None = None
        self._ascent = "local"
        self._ready = True

    def _watch_base(self) -> None:
        """`base_optimizer.step()` is torch's own step (plain steps of a warm-up): give it state of torch's kind first."""
        if self._base_hook is not None:
            self._base_hook.remove()
        owner = weakref.ref(self)

        def before(*_: Any) -> None:
            if (optimizer := owner()) is None:
                return
            optimizer.restore()
            if optimizer._fused:
                optimizer._switch(False)
            for block in optimizer.blocks:
                block.flat.rows.consume()

        self._base_hook = self.base_optimizer.register_step_pre_hook(before)

    def _make_blocks(self) -> list[Block]:
        return [self._block(range(len(self.param_groups)))]

    def _block(self, groups: Iterable[int]) -> Block:
        return Block([(k, self.param_groups[k]["params"]) for k in groups], self.ascent_rows)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, at construction or later; a later one gets a flat buffer of its own."""
        if isinstance(param_group, dict):
            check_options(param_group)
        super().add_param_group(param_group)
        if not self._ready:
            return
        try:
            if self._fused:
                check_fused(self.base_optimizer)
            block = self._block([len(self.param_groups) - 1])
            if block.flat.device != self.blocks[0].flat.device:
                raise ValueError(f"params of the new group lie on {block.flat.device}, the others elsewhere")
        except ValueError:
            self.param_groups.pop()
            raise
        self.blocks.append(block)

    def bind(self, model: nn.Module, ascent: str = "local") -> Self:
        """Tell the optimizer its model, so that `step(closure)` can do right by it; returns the optimizer.

        BatchNorm statistics then move in the first pass only. Under DistributedDataParallel the closure's first pass
        runs without synchronisation ("local" ascent: each process climbs by its own batch) or with it ("global").
        """
        if ascent not in ASCENTS:
            raise ValueError(f"ascent is {ascent!r}; it must be one of {', '.join(ASCENTS)}")
        self._model, self._ascent = model, ascent
        return self

    # -- gradients ---------------------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients. None (the default) is the cheapest: autograd then hands its own tensors over and one
        gather brings them into the flat buffer, 2 passes and a few launches, where adding up in place costs 4 passes (zero,
        read twice, write) and one launch a parameter. `set_to_none=False` keeps views of the buffer attached, for
        gradient accumulation over many micro-batches.
        """
        for block in self.blocks:
            if set_to_none:
                for p in block.flat.params:
                    p.grad = None
                continue
            wanted = [e and p.requires_grad for e, p in zip(block.expected, block.flat.params, strict=True)]
            block.flat.rows.attach(0, only=wanted)

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
        """Take over parameters whose `.data` was replaced; a model that moved to another device takes all state along."""
        if any(block.flat.params[0].device != block.flat.device for block in self.blocks):
            if self.climbed or any(block.anchor is not None for block in self.blocks):
                raise RuntimeError("the model moved to another device in mid-step or with an anchor set")
            self._renew(self._settings(), export_extra(self))
        for block in self.blocks:
            block.flat.adopt()

    def _fresh(self) -> bool:
        return any(block.flat.rows.fresh() for block in self.blocks)

    # -- the descent ---------------------------------------------------------------------------------------------------

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
            ValueError: `GradScaler.step(optimizer, closure)` has found no gradient of a first pass.
        """
        found = getattr(self, "found_inf", None)
        if found is not None and not isinstance(found, Tensor):
            self._forget_scaler(None)
            raise ValueError(
                "scaler.step(optimizer, closure) needs the gradients of a first pass: run scaler.scale(loss).backward() before "
                "it, or call optimizer.step(closure, scaler=scaler)"
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
        if scaler is not None:
            scaler._per_optimizer_states.pop(id(self._first_pass), None)

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """`with optimizer.perturbed(): second forward and backward`; an exception inside restores theta."""
        try:
            yield
        except BaseException:
            self._break_off(self._scaler)
            raise

    @torch.no_grad()
    def _descend(self, row: int = 0, *, check: bool = False) -> None:
        """Update theta (restoring it first) by gradient row `row`; a non-finite gradient skips the update."""
        presents = self._collect(row)
        loss_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        scale = None if loss_scale is None else 1.0 / loss_scale
        if self.alpha is not None:
            scale = self.alpha if scale is None else scale * self.alpha
        try:
            for group in self.param_groups:
                check_options(group)
            covered = fused(self.base_optimizer)
            if covered:
                check_fused(self.base_optimizer)
            skip = self._skip(row, found_inf, check)
            self._switch(covered)
            if self._fused:
                self._follow_state()
                with self._base_hooks():
                    for block, present in zip(self.blocks, presents, strict=True):
                        fused_step(self.base_optimizer, block, row, present, scale, skip)
            else:
                self.restore()
                foreign_step(self.base_optimizer, self.blocks, row, presents, scale, skip)
        except BaseException:
            self.restore()
            raise
        self._skips.add(skip)
        self._moved()
        self._first_bad = None
        for optimizer in (self, self.base_optimizer):
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning-rate schedulers look at
        for block in self.blocks:
            block.flat.changed()
            block.flat.rows.consume()

    def _follow_state(self) -> None:
        """Somebody may have cleared or replaced `state`, or what it holds of a parameter: then that is the state."""
        self.base_optimizer.state = self.state
        if any(replaced(self.base_optimizer, block) for block in self.blocks):
            adopt_state(self.base_optimizer, self.blocks)

    @contextmanager
    def _base_hooks(self) -> Iterator[None]:
        """Around the fused step: the hooks of the base optimizer, whose own step it stands for."""
        base = self.base_optimizer
        for key, before in list(base._optimizer_step_pre_hooks.items()):
            if key != self._base_hook.id:
                before(base, (), {})
        yield
        for after in list(base._optimizer_step_post_hooks.values()):
            after(base, (), {})

    def _skip(self, row: int, found_inf: Tensor | None, check: bool) -> Tensor | None:
        """0-dim flag, nonzero if this update must not happen; None if nothing speaks for or against.

        With several processes the first pass is each one's own, so only the final, reduced gradient may decide.
        """
        flags = [] if found_inf is None else [found_inf.reshape(())]
        alone = not several()
        if alone and self._first_bad is not None:
            flags.append(self._first_bad)
        if check or self.check_finite or not alone:
            total = sum(gram_partials(block.flat.grads[row][None])[0].sum() for block in self.blocks)
            flags.append((~torch.isfinite(torch.as_tensor(total))).float())
        if len(flags) <= 1:
            return flags[0] if flags else None
        return torch.stack(flags).amax()

    def _switch(self, to_fused: bool) -> None:
        """Options may change at any time; hand the state over when the path changes."""
        if to_fused and not self._fused:
            adopt_state(self.base_optimizer, self.blocks)
        elif self._fused and not to_fused:
            release_state(self.base_optimizer)
            for block in self.blocks:
                block.forget()
        self._fused = to_fused

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
        """
        if weights is None:
            for block in self.blocks:
                block.anchor = None
            self.alpha = None
            return
        if targets is None:
            raise ValueError("targets is None: pass T for each parameter, or set_anchor(None) to remove the anchor")
        params = [p for group in self.param_groups for p in group["params"]]
        attach_anchor(self.blocks, params, list(weights), list(targets), strength)
        self.alpha = alpha

    # -- state -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's format with the base optimizer's state; "ltfast" holds what goes beyond it."""
        packed = super().state_dict()
        for index, values in packed["state"].items():
            if isinstance(values.get("step"), Tensor):  # one count for many parameters here, one each in torch
                packed["state"][index] = {**values, "step": values["step"].detach().cpu().clone()}
        packed["ltfast"] = export_extra(self)
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this optimizer's own state dict, one of torch.optim.SGD / AdamW, or one of davda54's SAM.

        Raises:
            ValueError: groups or parameters do not match; then nothing has changed.
        """
        merged, extra = merge_groups(self, state_dict)
        super().load_state_dict(merged)
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self.restore()
        self._fused = fused(self.base_optimizer)
        if self._fused:
            adopt_state(self.base_optimizer, self.blocks)
        import_extra(self, extra)

    def __getstate__(self) -> dict[str, Any]:
        if self.climbed:  # a copy of the parameters would take theta + eps for theta
            raise RuntimeError("copied between the two passes: call restore() before, or copy after second_step()")
        return {
            **super().__getstate__(),
            "base": self.base_optimizer,
            "own": self._own_state(),
            "settings": self._settings(),
            "anchor": export_anchor(self.blocks, [p for group in self.param_groups for p in group["params"]]),
            "extra": export_extra(self),
        }

    def _settings(self) -> dict[str, Any]:
        """What users set on the optimizer itself and `_setup` would forget."""
        return {name: getattr(self, name) for name in ("check_finite", "alpha", "_model", "_ascent")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base" not in state:  # Optimizer.load_state_dict
            super().__setstate__(state)
            return
        own, extra, self.base_optimizer = state.pop("own"), state.pop("extra"), state.pop("base")
        settings, anchor = state.pop("settings"), state.pop("anchor")
        super().__setstate__(state)
        self.__dict__.update(own)
        self._renew(settings, extra, anchor)

    def _renew(self, settings: dict[str, Any], extra: dict[str, Any], anchor: tuple[Any, ...] | None = None) -> None:
        """New buffers for the parameters there are now, with the state and the settings of the old ones."""
        self._setup()
        if anchor is not None:
            self.set_anchor(*anchor)
        self.__dict__.update(settings)
        if self._fused:
            adopt_state(self.base_optimizer, self.blocks)
        import_extra(self, extra)

    def _own_state(self) -> dict[str, Any]:
        """Constructor arguments that a subclass needs before `_setup` when it is unpickled."""
        return {}

    # -- two processes, BatchNorm ----------------------------------------------------------------------------------------

    def _export(self) -> dict[str, Any]:
        """State beyond the base optimizer's, for "ltfast" of the state dict."""
        return {}

    def _check_extra(self, extra: dict[str, Any]) -> None:
        """ValueError if `_import` could not take `extra`."""

    def _import(self, extra: dict[str, Any]) -> None:
        """Take over what `_export` gave."""

    def _second_pass(self) -> AbstractContextManager[None]:
        return nullcontext() if self._model is None else frozen_statistics(self._model)

    def first_pass(self) -> AbstractContextManager[None]:
        """`with optimizer.first_pass(): forward AND backward` of the ascent: no reduction if the ascent is local.

        DistributedDataParallel decides at the forward pass whether the backward pass reduces, so `no_sync` around the
        backward pass alone comes too late.
        """
        return self._unreduced() if self._ascent == "local" else nullcontext()

    def _unreduced(self) -> AbstractContextManager[None]:
        no_sync = getattr(self._model, "no_sync", None)
        return nullcontext() if no_sync is None else no_sync()


class _FirstPass:
    """Stands for the optimizer in GradScaler.unscale_ of the first pass, which allows one call an optimizer and step."""

    def __init__(self, owner: FlatOptimizer) -> None:
        self._owner = weakref.ref(owner)  # a cycle would keep a dropped optimizer's memory until it is collected
        self.params: list[Tensor] | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        owner = self._owner()
        assert owner is not None
        return owner.param_groups if self.params is None else [{"params": self.params}]
