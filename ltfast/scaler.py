"""Loss scaling for fp16 without asking the device: scale, growth and backoff are 0-dim tensors.

fp16 gradients below 6e-8 vanish and above 65504 overflow. The loss is multiplied by a power of two before backward and
the gradients divided by it after; an overflow skips the step and halves the scale, `interval` good steps double it (as
torch.amp.GradScaler does, whose `step` and `update` read found_inf on the host).
"""

from __future__ import annotations

import torch
from torch import Tensor

INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000  # torch.amp.GradScaler's
LARGEST, SMALLEST = 2.0**24, 2.0**-14


class LossScale:
    """A dynamic loss scale.

    Attributes:
        scale: what losses are multiplied by, 0-dim float32.
        inverse: 1 / scale, exact: scales are powers of two.
        good: steps without overflow since the scale last changed.
    """

    def __init__(self, device: torch.device, initial: float = INITIAL, interval: int = INTERVAL) -> None:
        self.scale = torch.full((), initial, device=device)
        self.inverse = 1 / self.scale
        self.good = torch.zeros((), device=device)
        self.interval = interval

    def update(self, found_inf: Tensor) -> None:
        """Back off after an overflow (found_inf != 0, 0-dim), grow after `interval` steps without one; in place."""
        overflow = found_inf != 0
        self.good.add_(1).masked_fill_(overflow, 0.0)
        grow = self.good >= self.interval
        factor = torch.where(overflow, BACKOFF, torch.where(grow, GROWTH, 1.0))
        self.good.masked_fill_(grow, 0.0)
        self.scale.mul_(factor).clamp_(SMALLEST, LARGEST)
        torch.reciprocal(self.scale, out=self.inverse)

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint."""
        return {"scale": self.scale, "inverse": self.inverse, "good": self.good}
