"""What every op shares: the triton guard, the choice of path, argument checks, and the counters of launches and bytes.

CUDA tensors take the Triton kernel, CPU tensors the same arithmetic in torch a cache-sized block at a time; with
TRITON_INTERPRET=1 CPU tensors take the kernel too. Elsewhere (CUDA without triton, or in float64) the torch oracle runs.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU need not have triton
    triton = None

    class _NoLanguage:
        """Stands in for triton.language so that kernels can be defined, never run."""

        constexpr = object

    tl = _NoLanguage()

# triton reads the same variable when it decorates a kernel, so the choice is made once, at import.
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

FLOATS = (torch.float32, torch.bfloat16)
# Elementwise kernels: 8 elements a thread are two 16-byte accesses of each float32 array and one of each bfloat16 array.
BLOCK = 1024
WARPS = 4
# Rows loaded before the first is used; the loop over more rows is not unrolled further.
UNROLL = 8
MAX_ROWS = 64  # gradient rows: 64 x 64 float64 is the largest Gram that one program holds in registers without spills
Number = float | int | Tensor
Coefficients = Tensor | Sequence[float]


def jit(function: Callable) -> Any:
    """triton.jit, or the function itself where triton is missing."""
    return function if triton is None else triton.jit(function)


def use_kernel(tensor: Tensor, *, float64_too: bool = False) -> bool:
    """True if ops on `tensor` run the Triton kernel, False if they run in torch."""
    return triton is not None and (float64_too or tensor.dtype != torch.float64) and (tensor.is_cuda or INTERPRET)


def cdiv(a: int, b: int) -> int:
    """ceil(a / b)."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Smallest power of two >= n (n >= 1)."""
    return 1 << (n - 1).bit_length()


# --- counters ---------------------------------------------------------------------------------------------------------


@dataclass
class OpCost:
    """What one call of an op costs: kernels launched, and passes (a read or a write of one parameter-sized array)."""

    op: str
    kernels: int
    passes: float
    bytes: int


@dataclass
class Counters:
    """Filled by `counting()`: one OpCost a call (on either path) and the names of the kernels really launched."""

    ops: list[OpCost] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)

    @property
    def kernels(self) -> int:
        """Kernels that the calls launch on a GPU."""
        return sum(c.kernels for c in self.ops)

    @property
    def passes(self) -> float:
        """Parameter-sized reads and writes of the calls."""
        return sum(c.passes for c in self.ops)

    @property
    def bytes(self) -> int:
        """Bytes that those passes move."""
        return sum(c.bytes for c in self.ops)


_counters: list[Counters] = []


@contextmanager
def counting() -> Iterator[Counters]:
    """Count kernels, passes and bytes of every op called inside; works on the CPU too, where nothing is launched."""
    counters = Counters()
    _counters.append(counters)
    try:
        yield counters
    finally:
        _counters.remove(counters)


def count(op: str, kernels: int, arrays: Sequence[Tensor | None], writes: Sequence[Tensor | None] = ()) -> None:
    """Declare one call: it reads every array of `arrays` once and writes each of `writes` once (None: absent)."""
    if not _counters:
        return
    moved = [t for t in (*arrays, *writes) if t is not None]
    size = max((t.shape[-1] for t in moved), default=1)
    cost = OpCost(op, kernels, sum(t.numel() for t in moved) / size, sum(t.numel() * t.element_size() for t in moved))
    for counters in _counters:
        counters.ops.append(cost)


def selected(device: torch.device) -> AbstractContextManager[None]:
    """Inside, a GPU is the current device, which triton launches on and torch shares memory of; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # type: ignore[return-value]


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, enable_fp_fusion: bool, **options: Any
) -> None:
    """Launch a kernel on `device` (triton would take the current one) and note it in the active counters.

    enable_fp_fusion: multiply-adds in one rounding; always said, as triton's default changes in 3.10.
    """
    for counters in _counters:
        counters.launched.append(kernel.__name__)
    with selected(device):
        kernel[grid](*args, enable_fp_fusion=enable_fp_fusion, **options)


# --- argument checks --------------------------------------------------------------------------------------------------


def check_vector(name: str, tensor: Tensor, like: Tensor | None = None, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
    """A dense [N] array; `like` gives N, the device and, for a float64 oracle run, the dtype."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dim() != 1 or (tensor.shape[0] > 1 and tensor.stride(0) != 1):
        raise ValueError(f"{name} must be one contiguous [N] array, not shape {tuple(tensor.shape)}")
    if tensor.shape[0] == 0:
        raise ValueError(f"{name} is empty")
    _check_like(name, tensor, like, dtypes)
    if like is not None and tensor.shape[0] != like.shape[-1]:
        raise ValueError(f"{name} has {tensor.shape[0]} elements where {like.shape[-1]} are needed")


def check_rows(name: str, tensor: Tensor, like: Tensor | None = None) -> None:
    """[R, N] with dense rows (any distance between rows) and 1 <= R <= MAX_ROWS."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
        raise ValueError(f"{name} must be [rows, N] with contiguous rows, not shape {tuple(tensor.shape)}")
    if not 1 <= tensor.shape[0] <= MAX_ROWS:
        raise ValueError(f"{name} has {tensor.shape[0]} rows; 1 to {MAX_ROWS} are supported")
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} is empty")
    _check_like(name, tensor, like, FLOATS)
    if like is not None and tensor.shape[1] != like.shape[-1]:
        raise ValueError(f"{name} has rows of {tensor.shape[1]} elements where {like.shape[-1]} are needed")


def _check_like(name: str, tensor: Tensor, like: Tensor | None, dtypes: Sequence[torch.dtype]) -> None:
    double = tensor.dtype == torch.float64 and (like is None or like.dtype == torch.float64)
    if tensor.dtype not in dtypes and not double:
        raise ValueError(f"{name} is {tensor.dtype}; supported: {', '.join(map(str, dtypes))}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} lies on {tensor.device}, the other arrays on {like.device}")


def check_apart(written: dict[str, Tensor | None], read: dict[str, Tensor | None]) -> None:
    """ValueError if an array that is written shares memory with another one; None: absent. For the body of an op: tracing
    has no addresses."""
    spans = [(name, t.data_ptr(), t.nbytes) for name, t in (*written.items(), *read.items()) if t is not None]
    outputs = sum(t is not None for t in written.values())
    for i, (name, start, size) in enumerate(spans[:outputs]):
        for other, first, length in spans[i + 1 :]:
            if start < first + length and first < start + size:
                raise ValueError(f"{other} shares memory with {name}, which is written: pass a copy")


def check_small(name: str, tensor: Tensor, length: int, device: torch.device) -> Tensor:
    """A [length] array of numbers on `device`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} where ({length},) is needed")
    if tensor.device != device:
        raise ValueError(f"{name} lies on {tensor.device}, the other arrays on {device}")
    return tensor


def as_coefficients(name: str, values: Coefficients, length: int, like: Tensor) -> Tensor:
    """[length] coefficients on like's device; python numbers are checked (finite) and copied there."""
    if not isinstance(values, Tensor):
        try:
            values = [float(value) for value in values]
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a [{length}] tensor or {length} numbers, not {values!r}") from None
        for value in values:
            if not abs(value) < math.inf:  # torch.compile traces this, not math.isfinite
                raise ValueError(f"{name} holds {value}; coefficients must be finite")
        values = torch.tensor(values, dtype=torch.float32, device=like.device)
    return check_small(name, values, length, like.device)


def split_number(name: str, value: Number, device: torch.device, *, low: float = 0.0) -> tuple[float, Tensor | None]:
    """(python number, None) or (0.0, one-element tensor on `device`); only python numbers can be range-checked."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a one-element tensor, not shape {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name} lies on {value.device}, the arrays on {device}")
        return 0.0, value.detach()
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):  # torch 2.11 traces the first only
        raise ValueError(f"{name} must be a number or a one-element tensor, not {value!r}")
    if not (low <= value and abs(value) < math.inf):  # torch.compile traces this, not math.isfinite
        raise ValueError(f"{name} is {value}; it must be finite and at least {low}")
    return float(value), None


def number(value: float, tensor: Tensor | None) -> float | Tensor:
    """Undo `split_number` for torch arithmetic: the tensor as 0-d, or the python number."""
    return value if tensor is None else tensor.reshape(())


@jit
def load_number(pointer, value):
    """The float32 scalar behind `pointer`, or `value` where no pointer is given (then the branch costs nothing)."""
    if pointer is None:
        return tl.cast(value, tl.float32)
    else:
        return tl.cast(tl.load(pointer), tl.float32)
