"""Parameters as views of one buffer, gradients gathered into rows of one buffer.

Everything a sharpness-aware step does to the parameters (norms, Gram matrix, perturbation, anchor, update) is then one
pass over one tensor instead of one kernel per parameter. Shapes: N = padded number of elements, R = gradient rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

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


class FlatParameters:
    """Make `params` views of one float32 buffer and hold `rows` gradient rows beside it.

    Args:
        params: parameters, float32, all on one device; duplicates (tied weights) are taken once, in order of appearance.
        rows: number of gradient rows R.

    Attributes:
        data: [N] working copy; the parameters are views of it, their storage never changes afterwards.
        grads: [R, N] gradient rows; `attach(r)` lets autograd accumulate straight into row r.
        numel: number of real parameters d (without padding).

    Raises:
        ValueError: no parameter, a dtype other than float32, or parameters on several devices.
    """

    def __init__(self, params: Iterable[nn.Parameter], rows: int = 1) -> None:
        self.params: list[nn.Parameter] = list(dict.fromkeys(params))
        if not self.params:
            raise ValueError("params is empty: pass model.parameters()")
        self.device = self.params[0].device
        for p in self.params:
            if p.dtype != torch.float32:
                raise ValueError(
                    f"params holds a {p.dtype} parameter: keep parameters float32 and use autocast instead"
                )
            if p.device != self.device:
                raise ValueError(f"params lie on {self.device} and {p.device}: use one optimizer for each device")
        self.offsets: list[int] = []
        end = 0
        for p in self.params:
            self.offsets.append(end)
            end += -(-p.numel() // ALIGN) * ALIGN
        self.size = end
        self.numel = sum(p.numel() for p in self.params)
        self._strides = [p.stride() if _is_dense(p) else p.contiguous().stride() for p in self.params]
        self.data = torch.zeros(self.size, device=self.device)
        for p, view in zip(self.params, self.views(self.data), strict=True):
            view.copy_(p.detach())
            p.data = view
        self.grads = torch.zeros(0, self.size, device=self.device)
        self._grad_views: list[list[Tensor]] = []
        self.resize_rows(rows)

    def resize_rows(self, rows: int) -> None:
        """Reallocate the gradient buffer with `rows` rows (zero); called when the number of groups changes."""
        if rows != self.grads.shape[0]:
            self.grads = torch.zeros(rows, self.size, device=self.device)
            self._grad_views = [self.views(row) for row in self.grads]

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Views of a [N] buffer shaped and strided like the parameters, in order."""
        base = buffer.storage_offset()
        return [
            buffer.as_strided(p.shape, stride, base + offset)
            for p, stride, offset in zip(self.params, self._strides, self.offsets, strict=True)
        ]

    def flatten(self, tensors: Sequence[Tensor | None], out: Tensor | None = None) -> Tensor:
        """Copy one tensor for each parameter (None: zeros) into a [N] buffer."""
        flat = torch.zeros(self.size, device=self.device) if out is None else out
        for view, tensor in zip(self.views(flat), tensors, strict=True):
            view.zero_() if tensor is None else view.copy_(tensor)
        return flat

    def attach(self, row: int = 0, *, zero: bool = True) -> Tensor:
        """Point every `p.grad` at gradient row `row`, so that backward accumulates there; returns the row, [N]."""
        grads = self.grads[row]
        if zero:
            grads.zero_()
        for p, view in zip(self.params, self._grad_views[row], strict=True):
            p.grad = view
        return grads

    def span(self, params: Iterable[nn.Parameter]) -> slice:
        """The slice of the buffer that holds `params`, which must be consecutive.

        Raises:
            ValueError: the parameters are not one consecutive run of this buffer.
        """
        wanted = set(params)
        index = [i for i, p in enumerate(self.params) if p in wanted]
        if not index or len(index) != len(wanted) or index != list(range(index[0], index[-1] + 1)):
            raise ValueError("these parameters are not one consecutive run of the flat buffer")
        last = index[-1]
        return slice(self.offsets[index[0]], self.offsets[last + 1] if last + 1 < len(self.offsets) else self.size)


class FlatBuffers:
    """BatchNorm running statistics (all floating-point buffers) as views of one tensor, to be saved and put back.

    The second pass of a sharpness-aware step must not move them. Copying one small tensor back costs two launches and,
    unlike switching momentum to 0, changes nothing that torch.compile guards on.
    """

    def __init__(self, module: nn.Module) -> None:
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self.counters = [b for b in module.buffers() if not b.is_floating_point() and b.ndim == 0]
        self.data = (
            torch.cat([b.detach().reshape(-1).float() for b in self.buffers]) if self.buffers else torch.zeros(0)
        )
        start = 0
        for b in self.buffers:
            b.data = self.data[start : start + b.numel()].view(b.shape)
            start += b.numel()
        self._kept = torch.empty_like(self.data)
        self._kept_counters = [torch.empty_like(c) for c in self.counters]

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
