"""Parameters as views of one buffer, their gradients in rows of another (rows.py), BatchNorm's statistics in a third.

Everything a sharpness-aware step does to the parameters (norms, Gram matrix, perturbation, anchor, update) is then one
pass over one tensor instead of one kernel per parameter. Shapes: N = padded number of elements, R = gradient rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ltfast.kernels.common import selected
from ltfast.rows import GradientRows, part_of

# Each parameter starts on a 128-byte boundary (32 float32): cuBLAS and cuDNN pick their vectorised kernels by alignment,
# and an unaligned view of a flat buffer would cost them that. The padding is zero and stays zero.
ALIGN = 32


def _is_dense(tensor: Tensor) -> bool:
    """True if the tensor's strides are a permutation of contiguous ones (contiguous, channels_last, transposed)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _of_its_own(view: Tensor) -> Tensor:
    """The same memory as a storage of its own."""
    with selected(view.device):  # torch shares none of another GPU's
        return torch.from_dlpack(view)


def _is_sharded(p: nn.Parameter) -> bool:
    """FullyShardedDataParallel marks its parameters; `fully_shard` and tensor parallelism make DTensors of them."""
    return bool(getattr(p, "_fsdp_flattened", False)) or hasattr(p, "device_mesh")


def _check_apart(params: Sequence[Tensor]) -> None:
    """ValueError if two parameters share memory: flattening would silently untie them."""
    before: list[Tensor] = []  # those that reach beyond where the next one begins
    for p in sorted((p for p in params if p.numel()), key=lambda p: p.data_ptr()):
        before = [other for other in before if _end(other) > p.data_ptr()]
        for other in before:
            if _share(other, p):
                raise ValueError(
                    f"params holds two parameters, {tuple(other.shape)} and {tuple(p.shape)}, that share memory: "
                    "tie modules by giving them the same Parameter"
                )
        before.append(p)


def _end(tensor: Tensor) -> int:
    """The address behind a tensor's last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _share(first: Tensor, second: Tensor) -> bool:
    """Whether tensors whose memory overlaps have an element in common; columns of one matrix have none."""
    start, size = first.data_ptr(), first.element_size()
    end = max(_end(first), _end(second))
    taken = torch.zeros((end - start) // size, dtype=torch.bool)
    taken.as_strided(first.shape, first.stride()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), (second.data_ptr() - start) // size).any())


class FlatParameters:
    """Make `params` views of one float32 buffer and hold `rows` gradient rows beside it.

    Args:
        params: parameters, float32, all on one device; duplicates (tied weights) are taken once, in order of appearance.
        rows: number of gradient rows R.

    Attributes:
        data: [N] working copy; the parameters are views of it, their storage never changes afterwards.
        offsets: where each parameter begins in the buffer, and then the buffer's end N.
        rows: the gradient rows; `attach(r)` lets autograd accumulate straight into row r of `grads`, [R, N].
        numel: number of real parameters d (without padding).

    Raises:
        ValueError: no parameter, a sharded one, a dtype other than float32, or parameters on several devices.
    """

    @torch.inference_mode(False)  # buffers made under it could not be trained
    def __init__(self, params: Iterable[nn.Parameter], rows: int = 1) -> None:
        self.params: list[nn.Parameter] = list(dict.fromkeys(params))
        if not self.params:
            raise ValueError("params is empty: pass model.parameters()")
        self.device = self.params[0].device
        for p in self.params:
            if _is_sharded(p):
                raise ValueError(
                    "sharded parameters (FSDP, DTensor) are not supported: use DistributedDataParallel, or make the "
                    "optimizer over a model that is whole on every process"
                )
            if p.is_nested or is_traceable_wrapper_subclass(p):
                raise ValueError(
                    f"params holds a {'nested tensor' if p.is_nested else type(p.data).__name__}: only plain tensors lie in a flat buffer"
                )
            if isinstance(p, UninitializedParameter):
                raise ValueError("params holds a lazy parameter without a shape: run the model once before")
            if p.is_meta:
                raise ValueError("params holds a parameter on the meta device: give the model memory before (to_empty)")
            if p.dtype != torch.float32:
                raise ValueError(
                    f"params holds a {p.dtype} parameter: keep parameters float32 and use autocast instead"
                )
            if p.device != self.device:
                raise ValueError(f"params lie on {self.device} and {p.device}: use one optimizer for each device")
        _check_apart(self.params)
        self.offsets = [0, *accumulate(-(-p.numel() // ALIGN) * ALIGN for p in self.params)]
        self.size = self.offsets[-1]
        if not self.size:
            raise ValueError("params holds empty tensors only")
        self.numel = sum(p.numel() for p in self.params)
        self._strides = [p.stride() if _is_dense(p) else p.contiguous().stride() for p in self.params]
        self.data = torch.zeros(self.size, device=self.device, dtype=torch.float32)
        # Each parameter has a storage of its own over the same memory: tools that write a model down take tensors of one
        # storage for one tied weight and keep the first only (safetensors' save_model, Accelerate's save_model).
        self._views = [_of_its_own(view) if view.numel() else view for view in self.views(self.data)]
        self._addresses = [view.data_ptr() for view in self._views]
        with torch.no_grad():
            for p, view in zip(self.params, self._views, strict=True):
                view.copy_(p.detach())
                p.data = view
        self.rows = GradientRows(self, rows)

    @property
    def grads(self) -> Tensor:
        """[R, N] gradient rows."""
        return self.rows.data

    def resize_rows(self, rows: int) -> None:
        """Reallocate the gradient buffer with `rows` rows (zero); called when the number of groups changes."""
        if rows != self.grads.shape[0]:
            self.rows = GradientRows(self, rows)

    def adopt(self) -> None:
        """Take over parameters whose `.data` somebody replaced since: their values move into the buffer.

        Raises:
            RuntimeError: a parameter has another device, dtype or shape than when the buffer was made.
        """
        replaced = self.replaced()
        values = [self.params[i].detach() for i in replaced]
        if len(values) > 1:  # they may have come from one another, as of layers that changed places
            values = [value.clone() for value in values]
        for i, value in zip(replaced, values, strict=True):
            p, view, address = self.params[i], self._views[i], self._addresses[i]
            if p.device != view.device or p.dtype != view.dtype or p.shape != view.shape:
                raise RuntimeError(
                    f"a parameter is now {p.dtype} {tuple(p.shape)} on {p.device}, was {view.dtype} {tuple(view.shape)} "
                    f"on {view.device}: move or convert the model before you make its optimizer"
                )
            if view.data_ptr() != address:  # its storage went into shared memory (share_memory_, a queue)
                view = self._views[i] = _of_its_own(self.views(self.data)[i])
            view.copy_(value)
            p.data = view

    def point(self) -> None:
        """Let parameters whose `.data` somebody replaced since show the buffer again; what they held is given up."""
        for i in self.replaced():
            p, view = self.params[i], self._views[i]
            if (p.device, p.dtype, p.shape) == (view.device, view.dtype, view.shape):
                p.data = view

    def replaced(self) -> list[int]:
        """Parameters whose `.data` is not the buffer's any more."""
        addresses = [p.data_ptr() for p in self.params]
        if addresses == self._addresses:
            return []
        return [i for i, (now, then) in enumerate(zip(addresses, self._addresses, strict=True)) if now != then]

    def changed(self) -> None:
        """The buffer was written: autograd must notice parameters that a graph has saved, as after any write in place."""
        torch.autograd.graph.increment_version(self.params)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views of a [N] buffer shaped and strided like the parameters, in order."""
        return [
            part_of(buffer, p, stride, offset)
            for p, stride, offset in zip(self.params, self._strides, self.offsets[:-1], strict=True)
        ]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """A new [N] buffer with a copy of one tensor for each parameter (None: zeros)."""
        flat = torch.zeros_like(self.data)
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            view.zero_() if tensor is None else view.copy_(tensor)
        return flat

    def attach(self, row: int = 0, *, zero: bool = True) -> Tensor:
        """Point every `p.grad` at gradient row `row`, so that backward accumulates there; returns the row, [N]."""
        return self.rows.attach(row, zero=zero)

    def span(self, params: Iterable[nn.Parameter]) -> slice:
        """The slice of the buffer that holds `params`, which must be consecutive.

        Raises:
            ValueError: the parameters are not one consecutive run of this buffer.
        """
        wanted = set(params)
        index = [i for i, p in enumerate(self.params) if p in wanted]
        if not index or len(index) != len(wanted) or index != list(range(index[0], index[-1] + 1)):
            raise ValueError("these parameters are not one consecutive run of the flat buffer")
        return slice(self.offsets[index[0]], self.offsets[index[-1] + 1])


class FlatBuffers:
    """BatchNorm running statistics (all floating-point buffers) as views of one tensor, to be saved and put back.

    The second pass of a sharpness-aware step must not move them. Copying one small tensor back costs two launches and,
    unlike switching momentum to 0, changes nothing that torch.compile guards on.
    """

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self.counters = [b for b in module.buffers() if not b.is_floating_point() and b.ndim == 0]
        none = torch.zeros(0, device=next(module.parameters()).device)  # what a network without BatchNorm has
        self.data = torch.cat([none, *(b.detach().reshape(-1).float() for b in self.buffers)])
        start = 0
        for b in self.buffers:
            b.data = self.data[start : start + b.numel()].view(b.shape)
            start += b.numel()
        self._kept = torch.empty_like(self.data)
        self._kept_counters = [torch.empty_like(c) for c in self.counters]
        self._before = torch.empty_like(self.data)

    def save(self) -> None:
        """Remember the statistics."""
        self._kept.copy_(self.data)
        if self.counters:
            torch._foreach_copy_(self._kept_counters, self.counters)

    def restore(self) -> None:
        """Put the remembered statistics back."""
        self.data.copy_(self._kept)
        if self.counters:
            torch._foreach_copy_(self.counters, self._kept_counters)

    def begin(self) -> None:
        """A step begins: remember the statistics for `undo`."""
        self._before.copy_(self.data)

    def undo(self, skipped: Tensor) -> None:
        """Bring the statistics back to the step's beginning if `skipped` (0-dim) is not 0: one picture with a NaN would
        otherwise stay in them for ever, and in every evaluation."""
        torch.where(skipped != 0, self._before, self.data, out=self.data)
