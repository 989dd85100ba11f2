"""Who trains together: the processes that DistributedDataParallel reduces over, and its modules where `bind` got none."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def reduces(model: nn.Module | None) -> bool:
    """Whether `model` is DistributedDataParallel, compiled or not, or works like it: it has `no_sync`."""
    return hasattr(model, "no_sync")


def group_of(model: nn.Module | None) -> Any:
    """The process group that `model` reduces over; None: it is not DistributedDataParallel, so all processes."""
    return getattr(model, "process_group", None) if reduces(model) else None


def several(model: nn.Module | None) -> bool:
    """True if several processes train `model` together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group_of(model)) > 1


def wrappers_of(params: Sequence[Tensor]) -> list[DistributedDataParallel]:
    """The DistributedDataParallel modules that reduce gradients of `params` over several processes.

    Such a module leaves no mark on its parameters, so this looks through all objects that the garbage collector
    knows. What was made before `gc.freeze` is not found.
    """
    found = _search(params)
    if found:
        gc.collect()  # a module that is out of use may still be waiting for the collector
        found = _search(params)
    return found


def _search(params: Sequence[Tensor]) -> list[DistributedDataParallel]:
    own = {id(p) for p in params}
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
    return [m for m in modules if several(m) and any(id(p) in own for p in m.module.parameters())]
