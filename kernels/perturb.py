"""Ascent step: parameters moved along a combination of the gradient rows, in one pass.

    out = theta + s^2 * sum_j coef_j g_j,   s = 1 or |theta| (adaptive);   keep = theta (optional)

Shapes: theta, out, keep [N]; grads [R, N] (1 <= R <= 64, dense rows at any distance); coef [R].
Dtypes: theta float32; grads and out float32 or bfloat16. Accumulation: float32, rows in order.
Mutates out and keep only (out may be theta itself, or one of the rows). A coefficient of zero removes its row whatever
the row holds, inf and NaN too: an absent group or a skipped step (`AscentStats.ok` = 0) leaves theta exactly; the row is
then not even read.
Bytes per element: 4 + R * sizeof(grad) + sizeof(out) + 4 for keep.
Source: Eq. 15 of arXiv 2603.21217 with the coefficients of `ascent_coefficients`.
"""

# ruff: noqa: RUF005 (triton tuples grow by +, not by unpacking)
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .blocks import in_blocks
from .common import (
    BLOCK,
    UNROLL,
    WARPS,
    Coefficients,
    as_coefficients,
    cdiv,
    check_apart,
    check_rows,
    check_vector,
    count,
    jit,
    launch,
    tl,
    use_kernel,
)
from .register import op

# Left to itself ptxas (12.8, 13.x) squeezes some R into 32 registers, spills 8 to 16 bytes and requests the rows one after
# the other; a bound of 128 lets every row of a chunk be in flight (measured by compiling R = 1..64 to sm_80 and sm_90).
MAX_REGISTERS = 128


@jit
def _add_rows(step, grads_ptr, coef_ptr, start, stride, offsets, mask, ROWS: tl.constexpr):
    """Add ROWS rows; all of them are requested before the first is used."""
    coefs = ()
    rows = ()
    for k in tl.static_range(ROWS):
        c = tl.full(step.shape, tl.load(coef_ptr + start + k).to(tl.float32), tl.float32)
        coefs = coefs + (c,)
        rows = rows + (tl.load(grads_ptr + (start + k) * stride + offsets, mask=mask & (c != 0.0), other=0.0),)
    for k in tl.static_range(ROWS):
        step += coefs[k] * rows[k].to(tl.float32)
    return step


@jit
def _perturb_kernel(
    theta_ptr, grads_ptr, coef_ptr, out_ptr, keep_ptr, n_elements, row_stride,
    R: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    stride = tl.cast(row_stride, tl.int64)
    theta = tl.load(theta_ptr + offsets, mask=mask, other=0.0)
    step = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, R - R % UNROLL, UNROLL):
        step = _add_rows(step, grads_ptr, coef_ptr, start, stride, offsets, mask, UNROLL)
    if R % UNROLL != 0:
        step = _add_rows(step, grads_ptr, coef_ptr, R - R % UNROLL, stride, offsets, mask, R % UNROLL)
    if ADAPTIVE:
        step = theta * theta * step
    if keep_ptr is not None:
        tl.store(keep_ptr + offsets, theta, mask=mask)
    tl.store(out_ptr + offsets, (theta + step).to(out_ptr.dtype.element_ty), mask=mask)


def perturb_reference(theta_N: Tensor, grads_GN: Tensor, coef_G: Tensor, adaptive: bool) -> Tensor:
    """The torch oracle, in theta's dtype."""
    step = torch.zeros_like(theta_N)
    for c, g in zip(coef_G.to(theta_N.dtype), grads_GN, strict=True):
        step = step + torch.where(c == 0, 0.0, c * g.to(theta_N.dtype))
    return theta_N + (theta_N * theta_N * step if adaptive else step)


def _perturb_cpu(
    theta_N: Tensor, grads_GN: Tensor, coef_G: Tensor, adaptive: bool, out: Tensor, keep: Tensor | None
) -> None:
    """The oracle in blocks: its additions in its order, so its bits; rows of coefficient 0 are not read."""
    live = [(k, c) for k, c in enumerate(coef_G.to(theta_N.dtype).tolist()) if c != 0]

    def work(parts: Iterator[tuple[Any, ...]]) -> None:
        space: Tensor | None = None
        for theta, rows, target, kept in parts:
            space = theta.new_empty(2, theta.shape[0]) if space is None else space
            step, term = space[:, : theta.shape[0]]
            if kept is not None:
                kept.copy_(theta)
            if not live:
                step.zero_()
            for i, (k, c) in enumerate(live):
                into = term if i else step
                if rows.dtype == into.dtype:
                    torch.mul(rows[k], c, out=into)
                else:
                    into.copy_(rows[k]).mul_(c)
                if i:
                    step.add_(term)
            if adaptive:
                step.mul_(torch.mul(theta, theta, out=term))
            torch.add(theta, step, out=target)

    in_blocks(work, theta_N, grads_GN, out, keep)


def _check_memory(theta_N: Tensor, grads_GN: Tensor, out: Tensor, keep: Tensor | None) -> None:
    """out may be theta or one of the rows, element for element, or lie between rows; keep is an array of its own."""
    start, itemsize = grads_GN.data_ptr(), grads_GN.element_size()
    length, stride = grads_GN.shape[1] * itemsize, grads_GN.stride(0) * itemsize
    end = start + (grads_GN.shape[0] - 1) * stride + length
    for name, array in (("out", out), ("keep", keep)):
        if array is None or not start - array.nbytes < array.data_ptr() < end:
            continue
        place = (array.data_ptr() - start) % stride if stride >= length else array.data_ptr() - start
        is_row = name == "out" and place == 0 and out.dtype == grads_GN.dtype
        if not is_row and not length <= place <= stride - array.nbytes:
            raise ValueError(f"{name} shares memory with grads_GN: pass a copy (out may also be one of the rows)")
    same = out is theta_N or (out.data_ptr() == theta_N.data_ptr() and out.dtype == theta_N.dtype)
    if keep is not None or not same:
        check_apart({"out": None if same else out, "keep": keep}, {"theta_N": theta_N})


@op("out", "keep")
def _perturb(
    theta_N: Tensor, grads_GN: Tensor, coef_G: Tensor, adaptive: bool, out: Tensor, keep: Tensor | None
) -> None:
    _check_memory(theta_N, grads_GN, out, keep)
    count("perturb", 1, [theta_N, grads_GN], [out, keep])
    rows, n = grads_GN.shape
    if use_kernel(theta_N):
        # No FMA: the same bits as the oracle, in a kernel that waits for memory anyway.
        launch(_perturb_kernel, (cdiv(n, BLOCK),), theta_N.device, theta_N, grads_GN, coef_G, out, keep, n,
               grads_GN.stride(0), R=rows, ADAPTIVE=adaptive, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=WARPS,
               maxnreg=MAX_REGISTERS, enable_fp_fusion=False)  # fmt: skip
    elif theta_N.device.type == "cpu":
        _perturb_cpu(theta_N, grads_GN, coef_G, adaptive, out, keep)
    else:
        if keep is not None:
            keep.copy_(theta_N)
        out.copy_(perturb_reference(theta_N, grads_GN, coef_G, adaptive))


@torch.no_grad()
def perturb(
    theta_N: Tensor,
    grads_GN: Tensor,
    coef_G: Coefficients,
    adaptive: bool = False,
    out: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """out = theta + s^2 * (coef @ grads).

    Args:
        theta_N: [N] float32 parameters.
        grads_GN: [G, N] gradient rows, float32 or bfloat16, 1 <= G <= 64.
        coef_G: [G] coefficients on the same device (python numbers are copied there: not inside a CUDA graph).
        adaptive: s = |theta| (as ASAM) instead of 1.
        out: [N] float32 or bfloat16, may be theta_N or one of the rows; allocated like theta_N if None.
        keep: [N] float32, gets theta as it was, bit for bit, so that an ascent in place can be taken back.

    Returns:
        out.

    Raises:
        ValueError: shape, dtype, device mix, shared memory or a python coefficient that is not finite, naming the argument.
    """
    check_vector("theta_N", theta_N, dtypes=(torch.float32,))
    check_rows("grads_GN", grads_GN, theta_N)
    coef_G = as_coefficients("coef_G", coef_G, grads_GN.shape[0], theta_N)
    if out is None:
        out = torch.empty_like(theta_N)
    check_vector("out", out, theta_N)
    if keep is not None:
        check_vector("keep", keep, theta_N, dtypes=(torch.float32,))
    _perturb(theta_N, grads_GN, coef_G, bool(adaptive), out, keep)
    return out
