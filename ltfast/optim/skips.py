"""Counting skipped updates without a launch a step."""

from __future__ import annotations

import torch
from torch import Tensor

FLAGS = 256  # flags are added up once in so many steps


class SkipCounter:
    """How many of the 0-dim device flags given to `add` were nonzero."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), device=device, dtype=torch.float32)
        self._flags: list[Tensor] = []

    def add(self, flag: Tensor | None) -> None:
        """Note a flag; None counts as zero."""
        if flag is None:
            return
        if flag.is_cuda and torch.cuda.is_current_stream_capturing():
            self._total += (flag != 0).float()  # in the graph, so that every replay counts
            return
        self._flags.append(flag)
        if len(self._flags) >= FLAGS:
            self.total()

    def total(self) -> Tensor:
        """The count, 0-dim on the device."""
        if self._flags:
            self._total += torch.stack(self._flags).ne(0).sum()
            self._flags.clear()
        return self._total

    def set(self, value: float | Tensor) -> None:
        """Go on from `value`."""
        self._flags.clear()
        self._total.copy_(torch.as_tensor(value, dtype=torch.float32))
