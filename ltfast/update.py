"""The descent of a training step, with the loss scale, what is skipped, and GKP's pull."""

from __future__ import annotations

import torch
from torch import Tensor

from ltfast.flat import FlatParameters
from ltfast.kernels import adamw_step, gram_partials, sgd_step
from ltfast.preserve import Anchor
from ltfast.scaler import LossScale


class Update:
    """Momentum SGD or AdamW on the flat buffer of N elements, with restore, weight decay and the GKP anchor in one pass.

    Args:
        flat: the parameters.
        kind: "sgd" or "adamw" (beta1 is `momentum`, beta2 .999).
        momentum, weight_decay, nesterov: as in torch.optim.
        clip: largest norm of the loss gradient, before alpha and without GKP; 0: none.
        scaler: loss scale of fp16, told of every skipped step, or None.

    Attributes:
        lr: learning rate, 0-dim device tensor (changing it recompiles and synchronises nothing).
        anchor: GKP's, of the whole buffer, or None.
        alpha, strength: factor of the loss gradient, and (1 - alpha) * lambda of the anchor; 0-dim device tensors.
        slots: [N] each: the momentum buffer, or both moments of AdamW.
        step, skipped, in_a_row: 0-dim device tensors: steps taken, steps skipped, and those since the last one taken.
    """

    def __init__(
        self,
        flat: FlatParameters,
        *,
        kind: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        clip: float = 0.0,
        scaler: LossScale | None = None,
    ) -> None:
        device = flat.device
        self.flat, self.kind, self.clip, self.scaler = flat, kind, clip, scaler
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.betas = momentum, 0.999
        self.lr = torch.zeros((), device=device)
        self.alpha = torch.ones((), device=device)
        self.strength = torch.zeros((), device=device)
        self.anchor: Anchor | None = None
        n_slots = 1 if kind == "sgd" else 2
        self.slots = [torch.zeros_like(flat.data) for _ in range(n_slots)]
        self.step = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)

    def __call__(self, grad: Tensor, kept: Tensor | None, bad: Tensor) -> Tensor:
        """Apply the gradient [N]; `kept` is theta before the ascent, if there was one. Returns |gradient|, 0-dim.

        A non-finite gradient, or `bad` != 0, leaves theta and the optimizer state as they were and is counted.
        """
        norm = gram_partials(grad[None])[0].sum().sqrt().float()
        skip = (~torch.isfinite(norm)).float().maximum(bad)
        scale = self.alpha * (self.clip / norm.clamp_min(self.clip)) if self.clip else self.alpha
        anchor = None if self.anchor is None else (*self.anchor, self.strength)
        self.skipped += skip
        self.in_a_row.add_(skip).mul_(skip)
        self.step += 1 - skip
        if self.scaler is not None:
            self.scaler.update(skip)
        theta = self.flat.data
        if self.kind == "sgd":
            sgd_step(
                theta, grad, self.slots[0], self.lr, self.momentum, 0.0, self.weight_decay, self.nesterov, anchor,
                grad_scale=scale, found_inf=skip, source=kept,
            )  # fmt: skip
        else:
            adamw_step(
                theta, grad, *self.slots, self.step, self.lr, self.betas, 1e-8, self.weight_decay, anchor,
                grad_scale=scale, found_inf=skip, source=kept,
            )  # fmt: skip
        return norm

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint, by name."""
        named = {f"slot{i}": slot for i, slot in enumerate(self.slots)}
        scale = {} if self.scaler is None else self.scaler.state()
        return {**named, **scale, "step": self.step, "skipped": self.skipped, "in_a_row": self.in_a_row}
