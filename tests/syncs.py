"""Counts what would make the host wait for the device, on any device: each aten call that hands a value to Python, whose
result's shape depends on values, or that carries a host constant over."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# item, float(), bool(), `if tensor`, tolist; shapes that depend on values; torch.tensor([...]) on its way to a device.
WAITS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::nonzero_static",
    "aten::masked_select", "aten::unique_consecutive", "aten::_unique2", "aten::unique_dim", "aten::bincount",
    "aten::repeat_interleave", "aten::lift_fresh", "aten::_linalg_check_errors",
}  # fmt: skip
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Waits(TorchDispatchMode):
    """`found`: how often each waiting call was made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        masks = name in INDEXING and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        )
        if name in WAITS or masks:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))
