"""BatchNorm running statistics that do not move."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, BatchNorm still normalises by the batch, but afterwards its running statistics are as they were.

    For the second pass of a sharpness-aware step, which sees the same images at another point. The statistics are copied
    back: no flag or momentum changes, so torch.compile guards on nothing new. One launch for all layers on either side.
    """
    statistics: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            # .data: graphs that wait for their backward must not see the copying back as a change
            statistics += [b.data for b in module.buffers(recurse=False)]
    kept = [torch.empty_like(b) for b in statistics]
    if statistics:
        torch._foreach_copy_(kept, statistics)
    try:
        yield
    finally:
        if statistics:
            with torch.no_grad():
                torch._foreach_copy_(statistics, kept)
