"""Modes for a while: of a model's layers, of cuDNN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all of the model is in evaluation mode; then every layer is in its own again, whatever happened inside."""
    saved = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in saved:
            module.training = mode


@contextmanager
def untuned() -> Iterator[None]:
    """Inside, cuDNN takes the kernels that it expects to be fast: trying them costs more than a few batches can gain."""
    tuned = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = tuned
