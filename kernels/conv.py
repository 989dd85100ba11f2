"""3x3 convolution with few channels (stride 1, padding 1, no bias): forward, input gradient and weight gradient.

    y[n, o, r, c] = sum_{i, a, b} w[o, i, a, b] x[n, i, r + a - 1, c + b - 1]

Shapes: x [N, I, H, W] and y [N, O, H, W] in channels_last memory, w [O, I, 3, 3] with any strides; I and O are 16 or 32.
Dtypes: x and y float32, bfloat16 or float16; w that or float32, rounded to x's as it is loaded: under autocast no copy of the
weights is made, and their gradient, float32 partial sums, is never rounded.
The input gradient is the same kernel: the filter mirrored, its channels swapped, which is a matter of strides.
Accumulation: float32; products of 16-bit numbers on the tensor cores, of float32 in full precision.
Deterministic: partial sums of the weight's gradient are added up in a fixed order, no atomics.
Mutates nothing. A program holds BLOCK pixels and all channels, so x comes from memory once and from the cache nine times.
Why: a library's smallest tile is wider than 16 channels; two thirds of a ResNet-32 step are convolutions, most of them with so
few (docs/kernels.md).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .common import cdiv, count, jit, launch, next_power_of_2, tl, use_kernel
from .register import op

CHANNELS = (16, 32)  # more fill a library's tiles
HALVES = (torch.bfloat16, torch.float16)  # on a GPU only these: float32's exact products spill registers there
BLOCK = 128  # pixels of a program; two 64-row matrix products on Hopper
WARPS = 4
# Weight gradient: few long-lived programs, each leaving 9 I O partial sums, 2.4 and 4.7 MB in all.
WEIGHT_BLOCK = 64
WEIGHT_PROGRAMS = 4096  # over the channels: 256 programs at 16, 128 at 32
NHWC = torch.channels_last


@jit
def _conv_kernel(
    x_ptr, w_ptr, y_ptr, n_pixels, stride_out, stride_in, stride_row, stride_col,
    H: tl.constexpr, W: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, MIRROR: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * BLOCK
    own, i, o = tl.arange(0, BLOCK), tl.arange(0, IN), tl.arange(0, OUT)
    known = start + own < n_pixels
    row, col = (start + own) // W % H, (start + own) % W
    x_ptr += tl.cast(start, tl.int64) * IN
    acc = tl.zeros([BLOCK, OUT], dtype=tl.float32)
    for a in tl.static_range(3):
        for b in tl.static_range(3):
            inside = (row + a >= 1) & (row + a < H + 1) & (col + b >= 1) & (col + b < W + 1) & known
            near = own + ((a - 1) * W + b - 1)
            x = tl.load(x_ptr + near[:, None] * IN + i[None, :], mask=inside[:, None], other=0.0)
            tap = (2 - a) * stride_row + (2 - b) * stride_col if MIRROR else a * stride_row + b * stride_col
            w = tl.load(w_ptr + tap + i[:, None] * stride_in + o[None, :] * stride_out)
            acc = tl.dot(x, w.to(x.dtype), acc, input_precision=PRECISION)
    y_ptr += tl.cast(start, tl.int64) * OUT
    tl.store(y_ptr + own[:, None] * OUT + o[None, :], acc.to(y_ptr.dtype.element_ty), mask=known[:, None])


@jit
def _conv_weight_kernel(
    x_ptr, up_ptr, partials_ptr, n_pixels, n_blocks, H: tl.constexpr, W: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[3 * ROWS * IN, OUT] products of ROWS rows of the filter, summed over every num_programs-th block of pixels."""
    own, k, o = tl.arange(0, BLOCK), tl.arange(0, K), tl.arange(0, OUT)
    tap, i = tl.program_id(1) * (3 * ROWS) + k // IN, k % IN
    used = k < 3 * ROWS * IN
    a, b = tap // 3, tap % 3
    near = (own[:, None] + ((a - 1) * W + b - 1)[None, :]) * IN + i[None, :]
    acc = tl.zeros([K, OUT], dtype=tl.float32)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        start = block * BLOCK
        known = start + own < n_pixels
        row, col = (start + own) // W % H, (start + own) % W
        r, c = row[:, None] + a[None, :], col[:, None] + b[None, :]
        inside = (r >= 1) & (r < H + 1) & (c >= 1) & (c < W + 1) & used[None, :] & known[:, None]
        x = tl.load(x_ptr + tl.cast(start, tl.int64) * IN + near, mask=inside, other=0.0)
        up_at = up_ptr + tl.cast(start, tl.int64) * OUT + own[:, None] * OUT + o[None, :]
        up = tl.load(up_at, mask=known[:, None], other=0.0)
        acc = tl.dot(tl.trans(x), up, acc, input_precision=PRECISION)
    out = partials_ptr + tl.cast(tl.program_id(0), tl.int64) * (9 * IN * OUT) + tl.program_id(1) * (3 * ROWS * IN)
    tl.store(out + k[:, None] + o[None, :] * (9 * IN), acc, mask=used[:, None])


def conv3x3_reference(x_NCHW: Tensor, weight_OIKK: Tensor) -> Tensor:
    """The torch oracle, differentiable: nine shifted products in float64."""
    h, w = x_NCHW.shape[2:]
    padded = F.pad(x_NCHW.double(), (1, 1, 1, 1))
    taps = weight_OIKK.to(x_NCHW.dtype).double().unbind(-1)
    return torch.stack([
        torch.einsum("oi,nihw->nohw", tap[..., a], padded[:, :, a : a + h, b : b + w])
        for b, tap in enumerate(taps)
        for a in range(3)
    ]).sum(0)  # fmt: skip


def _empty(like: Tensor, channels: int) -> Tensor:
    """[N, channels, H, W] of `like`'s N, H and W."""
    return torch.empty_like(like[:, :1].expand(-1, channels, -1, -1), memory_format=NHWC)


def _flat(x: Tensor) -> Tensor:
    """The elements of channels_last memory as one array."""
    return x.permute(0, 2, 3, 1).reshape(-1)


@op()
def _conv3x3_nhwc(x_NCHW: Tensor, weight_OIKK: Tensor, mirror: bool) -> Tensor:
    """mirror: from O channels to I through the mirrored filter, as the gradient of the input goes."""
    weight = weight_OIKK.transpose(0, 1) if mirror else weight_OIKK
    out, inner = weight.shape[:2]
    x, y = x_NCHW.contiguous(memory_format=NHWC), _empty(x_NCHW, out)
    count("conv3x3_nhwc", 1, [_flat(x)], [_flat(y)])
    if not use_kernel(x_NCHW):
        weight = (weight.flip(2, 3) if mirror else weight).to(x.dtype)
        return F.conv2d(x, weight, padding=1).contiguous(memory_format=NHWC)
    pixels, (h, w) = y.numel() // out, y.shape[2:]
    launch(_conv_kernel, (cdiv(pixels, BLOCK),), x.device, x, weight, y, pixels, *weight.stride(), H=h, W=w, IN=inner,
           OUT=out, MIRROR=mirror, BLOCK=BLOCK, PRECISION="ieee", num_warps=WARPS, enable_fp_fusion=True)  # fmt: skip
    return y


@torch.library.register_fake("ltfast::conv3x3_nhwc")
def _(x_NCHW: Tensor, weight_OIKK: Tensor, mirror: bool) -> Tensor:
    return _empty(x_NCHW, weight_OIKK.shape[1 if mirror else 0])


def _partials(x: Tensor, up: Tensor) -> tuple[int, Tensor]:
    """Programs, and where each leaves its [O, 3, 3, I] sums, the order of a channels_last filter."""
    inner, out = x.shape[1], up.shape[1]
    programs = min(WEIGHT_PROGRAMS // max(inner, out), cdiv(x.numel() // inner, WEIGHT_BLOCK)) if use_kernel(x) else 1
    return programs, x.new_empty((programs, out, 3, 3, inner), dtype=torch.float32)


@op()
def _conv3x3_nhwc_weight(x_NCHW: Tensor, up_NCHW: Tensor) -> Tensor:
    """Partial sums [P, O, 3, 3, I] of the weight's gradient, float32; the compiler fuses their sum with what follows."""
    programs, partials = _partials(x_NCHW, up_NCHW)
    inner, out = x_NCHW.shape[1], up_NCHW.shape[1]
    x, up = x_NCHW.contiguous(memory_format=NHWC), up_NCHW.contiguous(memory_format=NHWC)
    count("conv3x3_nhwc_weight", 1, [_flat(x), _flat(up)])
    if not use_kernel(x_NCHW):
        found = torch.nn.grad.conv2d_weight(x.float(), (out, inner, 3, 3), up.float(), padding=1)
        partials[0].copy_(found.permute(0, 2, 3, 1))
        return partials
    pixels, (h, w) = x.numel() // inner, x.shape[2:]
    rows = 3 if inner == 16 else 1  # of the filter at once: 144 of 256 sums used, 96 of 128
    launch(_conv_weight_kernel, (programs, 3 // rows), x.device, x, up, partials, pixels, cdiv(pixels, WEIGHT_BLOCK),
           H=h, W=w, IN=inner, OUT=out, ROWS=rows, K=next_power_of_2(3 * rows * inner), BLOCK=WEIGHT_BLOCK,
           PRECISION="ieee", num_warps=WARPS, enable_fp_fusion=True)  # fmt: skip
    return partials


@torch.library.register_fake("ltfast::conv3x3_nhwc_weight")
def _(x_NCHW: Tensor, up_NCHW: Tensor) -> Tensor:
    return _partials(x_NCHW, up_NCHW)[1]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: torch.autograd.function.FunctionCtx, up: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    down = _conv3x3_nhwc(up, weight, True) if ctx.needs_input_grad[0] else None
    if not ctx.needs_input_grad[1]:
        return down, None, None
    # In channels_last memory, as the library's: torch's foreach functions, which gather all gradients into the flat buffer,
    # launch one kernel for each of them if a single one lies otherwise than its target.
    return down, _conv3x3_nhwc_weight(x, up).sum(0).permute(0, 3, 1, 2).to(weight.dtype), None


torch.library.register_autograd("ltfast::conv3x3_nhwc", _backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.ltfast.conv3x3_nhwc, torch.ops.ltfast.conv3x3_nhwc_weight])
def _flops(x_shape: torch.Size, other_shape: torch.Size, *_: object, **__: object) -> int:
    """Of either op, for torch's counter: the other shape is the filter's or the upstream gradient's."""
    n, inner, h, w = x_shape
    out = other_shape[0] if tuple(other_shape[2:]) == (3, 3) and other_shape[1] == inner else other_shape[1]
    return 2 * 9 * n * h * w * inner * out


def conv3x3(x_NCHW: Tensor, weight_OIKK: Tensor) -> Tensor:
    """F.conv2d(x, weight, padding=1) for few channels; differentiable once in both.

    Args:
        x_NCHW: [N, I, H, W]; another memory format than channels_last is copied into it.
        weight_OIKK: [O, I, 3, 3] of the same dtype (bfloat16, float16, on a CPU also float32) or float32. I and O: 16 or 32.

    Returns:
        [N, O, H, W] of that dtype, in channels_last memory.

    Raises:
        ValueError: shape, dtype or device mix, naming the argument.
    """
    if x_NCHW.dim() != 4 or x_NCHW.shape[1] not in CHANNELS or 0 in x_NCHW.shape:
        raise ValueError(f"x_NCHW must be [N, I, H, W] with I in {CHANNELS}, not {tuple(x_NCHW.shape)}")
    out = weight_OIKK.shape[0] if weight_OIKK.dim() else 0
    if weight_OIKK.shape != (out, x_NCHW.shape[1], 3, 3) or out not in CHANNELS:
        raise ValueError(
            f"weight_OIKK must be [O, {x_NCHW.shape[1]}, 3, 3] with O in {CHANNELS}, not {tuple(weight_OIKK.shape)}"
        )
    dtypes = HALVES if x_NCHW.is_cuda else (torch.float32, *HALVES)
    if x_NCHW.dtype not in dtypes:
        raise ValueError(f"x_NCHW is {x_NCHW.dtype}; supported on {x_NCHW.device}: {', '.join(map(str, dtypes))}")
    if weight_OIKK.dtype not in (x_NCHW.dtype, torch.float32):
        raise ValueError(f"weight_OIKK is {weight_OIKK.dtype}; it must be {x_NCHW.dtype}, as x_NCHW is, or float32")
    if x_NCHW.numel() // x_NCHW.shape[1] >= 2**31:
        raise ValueError(f"x_NCHW of {tuple(x_NCHW.shape)} has 2^31 pixels or more; use smaller batches")
    if weight_OIKK.device != x_NCHW.device:
        raise ValueError(f"weight_OIKK lies on {weight_OIKK.device}, x_NCHW on {x_NCHW.device}")
    return _conv3x3_nhwc(x_NCHW, weight_OIKK, False)
