"""Gram matrix of the gradient rows and |theta|^2, in one read of both.

    M_ij = sum_n s_n^2 g_in g_jn,  s = 1 or |theta| (adaptive);   |theta|^2 = sum_n theta_n^2

Shapes: grads [R, N] (1 <= R <= 64, dense rows at any distance), theta [N]; partials [P, R, R] and [P], float64.
Dtypes: gradients float32 or bfloat16, theta float32.
Accumulation: float32 inside a program (a few hundred terms a lane, then a tree), float64 across programs; on a CPU float32
inside pieces of some thousands, float64 across them (elements below 1e-20 are lost in the squares). Up to SMALL_ROWS rows the
pairs are products on the CUDA cores; above, tiles go through the tensor cores as 3xTF32, which keeps float32's digits.
Deterministic: two stages in a fixed order, no atomics; P depends on N and R only, not on the device.
Mutates nothing. Bytes per element: R * sizeof(grad) + 4 (theta, where it is given).
Source: the identities of Eq. 12-15 of arXiv 2603.21217 need nothing of the gradients but M and |theta|.
"""

# ruff: noqa: RUF005 (triton tuples grow by +, not by unpacking)
from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import in_blocks
from .common import cdiv, check_rows, check_vector, count, jit, launch, next_power_of_2, tl, use_kernel
from .register import op

# R (R + 1) / 2 accumulators of E elements live in registers: 36 x 4 at R = 8 is the most that fits without spills.
SMALL_ROWS = 8
SMALL_WARPS = 4
# E elements a thread: as many 16-byte loads in flight as the accumulators leave room for.
ELEMENTS_PER_THREAD = {1: 16, 2: 16, 4: 8, 8: 4}
# bfloat16 rows want E = 8 for 16-byte loads; with more than 4 rows neighbours are then added up before they reach the
# accumulators, FOLD into one: R = 5..8 then spills no registers (tests/kernels/test_compiled.py), as it does with E = 8 alone.
NARROW_ELEMENTS, FOLD = 8, 2
# Every program is resident at once on 108 and on 132 SMs (8 to 10 CTAs of 128 threads each), so there is no tail wave, and
# the partials are added up in a few microseconds: 0.93 to 1.03 of a copy's bandwidth on an H100 (docs/kernels.md).
SMALL_PROGRAMS = 1024
# Tensor-core path: [R, TILE] tiles; fewer programs, because each leaves R x R partials.
LARGE_TILE = 32
LARGE_PROGRAMS = 256
# Second stage: a program adds few columns up over all partials at once, as one load (1024 x 8 float64: 32 a thread) and one
# tree: sixteen loads of 64 x 64 one after another would wait for memory longer than one row takes to be read (docs/kernels.md).
REDUCE_COLUMNS = 8
REDUCE_ROWS = 1024
REDUCE_WARPS = 8
# On a CPU, elements of a row whose products are summed in float32, by BLAS; pieces are added up in float64. Float64 throughout
# would take about twice the time.
PIECE = 4096


@jit
def _folded(x, FOLD: tl.constexpr):
    """Sums of FOLD neighbours, which lie in one thread."""
    if FOLD == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [x.shape[0] // FOLD, FOLD]), axis=1)


@jit
def _gram_kernel(
    grads_ptr, theta_ptr, gram_ptr, theta_sq_ptr, n_elements, row_stride, n_blocks,
    R: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    stride = tl.cast(row_stride, tl.int64)
    zero = tl.zeros([BLOCK // FOLD], dtype=tl.float32)
    theta_acc = zero
    acc = ()
    for _ in tl.static_range(R * (R + 1) // 2):
        acc = acc + (zero,)
    for block in range(pid, n_blocks, tl.num_programs(0)):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        if theta_ptr is not None:
            theta = tl.load(theta_ptr + offsets, mask=mask, other=0.0)
            theta_acc += _folded(theta * theta, FOLD)
        rows = ()
        for r in tl.static_range(R):
            g = tl.load(grads_ptr + r * stride + offsets, mask=mask, other=0.0).to(tl.float32)
            if ADAPTIVE:
                g = g * theta  # sign(theta) squares away in every product
            rows = rows + (g,)
        new = ()
        for i in tl.static_range(R):
            for j in tl.static_range(i, R):
                new = new + (acc[i * R - i * (i - 1) // 2 + j - i] + _folded(rows[i] * rows[j], FOLD),)
        acc = new
    out = gram_ptr + tl.cast(pid, tl.int64) * R * R
    for i in tl.static_range(R):
        for j in tl.static_range(i, R):
            pair = tl.sum(acc[i * R - i * (i - 1) // 2 + j - i], axis=0).to(tl.float64)
            tl.store(out + i * R + j, pair)
            tl.store(out + j * R + i, pair)
    tl.store(theta_sq_ptr + pid, tl.sum(theta_acc, axis=0).to(tl.float64))


@jit
def _gram_tile_kernel(
    grads_ptr, theta_ptr, gram_ptr, theta_sq_ptr, n_elements, row_stride, n_blocks,
    R: tl.constexpr, ROWS: tl.constexpr, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    row_offsets = tl.cast(rows, tl.int64) * tl.cast(row_stride, tl.int64)
    acc = tl.zeros([ROWS, ROWS], dtype=tl.float32)
    theta_acc = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(pid, n_blocks, tl.num_programs(0)):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        x = tl.load(
            grads_ptr + row_offsets[:, None] + offsets[None, :], mask=(rows < R)[:, None] & mask[None, :], other=0.0
        ).to(tl.float32)
        if theta_ptr is not None:
            theta = tl.load(theta_ptr + offsets, mask=mask, other=0.0)
            theta_acc += theta * theta
            if ADAPTIVE:
                x = x * theta[None, :]
        acc = tl.dot(x, tl.trans(x), acc, input_precision="tf32x3")
    out = gram_ptr + tl.cast(pid, tl.int64) * R * R + rows[:, None] * R + rows[None, :]
    tl.store(out, acc.to(tl.float64), mask=(rows < R)[:, None] & (rows < R)[None, :])
    tl.store(theta_sq_ptr + pid, tl.sum(theta_acc, axis=0).to(tl.float64))


@jit
def _gram_reduce_kernel(
    partials_ptr, theta_sq_ptr, gram_ptr, theta_out_ptr, n_partials, n_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Second stage: column sums of [P, R*R] in float64; program 0 also adds |theta|^2 up."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float64)
    theta = tl.zeros([ROWS], dtype=tl.float64)
    for start in range(0, n_partials, ROWS):
        p = start + tl.arange(0, ROWS)
        mask = (p < n_partials)[:, None] & (columns < n_columns)[None, :]
        acc += tl.load(partials_ptr + p[:, None] * n_columns + columns[None, :], mask=mask, other=0.0)
        theta += tl.load(theta_sq_ptr + p, mask=p < n_partials, other=0.0)
    tl.store(gram_ptr + columns, tl.sum(acc, axis=0), mask=columns < n_columns)
    if tl.program_id(0) == 0:
        tl.store(theta_out_ptr, tl.sum(theta, axis=0))


def gram_partials_reference(grads_RN: Tensor, theta_N: Tensor | None, adaptive: bool) -> tuple[Tensor, Tensor]:
    """The torch oracle: everything in float64, one partial."""
    rows = grads_RN.double()
    theta = None if theta_N is None else theta_N.double()
    if adaptive:
        rows = rows * theta.abs()
    theta_sq = rows.new_zeros(1) if theta is None else (theta @ theta).reshape(1)
    return (rows @ rows.T)[None], theta_sq


def _gram_partials_cpu(grads_RN: Tensor, theta_N: Tensor | None, adaptive: bool) -> tuple[Tensor, Tensor]:
    """The oracle in blocks, rows as they are: a copy of a block only where rows are scaled or bfloat16."""
    rows = grads_RN.shape[0]
    wide = torch.promote_types(grads_RN.dtype, torch.float32 if theta_N is None else theta_N.dtype)

    def work(parts: Iterator[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        space: Tensor | None = None
        found = []
        for g, theta in parts:
            u, sums = g, g.new_zeros(rows * rows + 1, dtype=torch.float64)
            if adaptive or g.dtype != wide:
                space = g.new_empty(g.numel(), dtype=wide) if space is None else space
                u = space[: g.numel()].view(rows, -1)
                u = torch.mul(g, theta, out=u) if adaptive else u.copy_(g)  # sign(theta) squares away in every product
            if theta is not None:
                sums[-1] = _products(theta[None].to(wide))
            sums[:-1] = _products(u).flatten()
            found.append(sums)
        return found

    found = in_blocks(work, grads_RN, theta_N, rows=cdiv(rows, 2))
    total = torch.stack([sums for part in found for sums in part]).sum(0)
    return total[:-1].view(1, rows, rows).clone(), total[-1:].clone()


def _products(u_Rn: Tensor) -> Tensor:
    """u u^T [R, R] in float64, of pieces in their own dtype, one BLAS call for all whole ones and one for the rest; in float64
    where that overflows."""
    rows, n = u_Rn.shape
    whole = n - n % PIECE
    pieces, rest = u_Rn[:, :whole].view(rows, -1, PIECE).transpose(0, 1), u_Rn[:, whole:]
    found = torch.bmm(pieces, pieces.mT).sum(0, dtype=torch.float64) + torch.mm(rest, rest.mT)
    return found if u_Rn.dtype == torch.float64 or found.isfinite().all() else _products(u_Rn.double())


def _fold(rows: int, dtype: torch.dtype) -> int:
    return FOLD if dtype == torch.bfloat16 and 4 < rows <= SMALL_ROWS else 1


def _block(rows: int, dtype: torch.dtype) -> int:
    if rows > SMALL_ROWS:
        return LARGE_TILE
    elements = NARROW_ELEMENTS if _fold(rows, dtype) > 1 else ELEMENTS_PER_THREAD[next_power_of_2(rows)]
    return SMALL_WARPS * 32 * elements


def _programs(n_elements: int, rows: int, dtype: torch.dtype) -> int:
    return min(cdiv(n_elements, _block(rows, dtype)), SMALL_PROGRAMS if rows <= SMALL_ROWS else LARGE_PROGRAMS)


def _launch_partials(grads_RN: Tensor, theta_N: Tensor | None, adaptive: bool) -> tuple[Tensor, Tensor]:
    rows, n = grads_RN.shape
    block, programs = _block(rows, grads_RN.dtype), _programs(n, rows, grads_RN.dtype)
    partials, theta_sq = _empty_partials(grads_RN, programs)
    args = (grads_RN, theta_N, partials, theta_sq, n, grads_RN.stride(0), cdiv(n, block))
    # FMA: one rounding less per product, and half the instructions of the widest kernel (R = 8: 36 pairs per element).
    if rows <= SMALL_ROWS:
        launch(_gram_kernel, (programs,), grads_RN.device, *args, R=rows, ADAPTIVE=adaptive, BLOCK=block,
               FOLD=_fold(rows, grads_RN.dtype), num_warps=SMALL_WARPS, enable_fp_fusion=True)  # fmt: skip
    else:
        launch(_gram_tile_kernel, (programs,), grads_RN.device, *args, R=rows, ROWS=max(16, next_power_of_2(rows)),
               ADAPTIVE=adaptive, BLOCK=block, num_warps=SMALL_WARPS, enable_fp_fusion=True)  # fmt: skip
    return partials, theta_sq


def _empty_partials(like: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    rows = like.shape[0]
    return (
        like.new_empty((programs, rows, rows), dtype=torch.float64),
        like.new_empty((programs,), dtype=torch.float64),
    )


@op()
def _gram_partials(grads_RN: Tensor, theta_N: Tensor | None, adaptive: bool) -> tuple[Tensor, Tensor]:
    count("gram_partials", 1, [grads_RN, theta_N])
    if use_kernel(grads_RN):
        return _launch_partials(grads_RN, theta_N, adaptive)
    on_host = _gram_partials_cpu if grads_RN.device.type == "cpu" else gram_partials_reference
    return on_host(grads_RN, theta_N, adaptive)


@torch.library.register_fake("ltfast::gram_partials")
def _(grads_RN: Tensor, theta_N: Tensor | None, adaptive: bool) -> tuple[Tensor, Tensor]:
    rows, n = grads_RN.shape
    return _empty_partials(grads_RN, _programs(n, rows, grads_RN.dtype) if use_kernel(grads_RN) else 1)


@op()
def gram_reduce(partials_PRR: Tensor, theta_sq_P: Tensor) -> tuple[Tensor, Tensor]:
    """Add partial sums up, float64: ([P, R, R], [P]) -> ([R, R], 0-d)."""
    count("gram_reduce", 1, [])
    if not use_kernel(theta_sq_P, float64_too=True):
        return partials_PRR.sum(0), theta_sq_P.sum()
    programs, rows, _ = partials_PRR.shape
    gram_RR, theta_sq = partials_PRR.new_empty((rows, rows)), theta_sq_P.new_empty(())
    columns = min(REDUCE_COLUMNS, next_power_of_2(rows * rows))
    launch(_gram_reduce_kernel, (cdiv(rows * rows, columns),), partials_PRR.device, partials_PRR, theta_sq_P,
           gram_RR, theta_sq, programs, rows * rows, ROWS=min(REDUCE_ROWS, next_power_of_2(programs)), COLUMNS=columns,
           num_warps=REDUCE_WARPS, enable_fp_fusion=False)  # fmt: skip
    return gram_RR, theta_sq


@torch.library.register_fake("ltfast::gram_reduce")
def _(partials_PRR: Tensor, theta_sq_P: Tensor) -> tuple[Tensor, Tensor]:
    return partials_PRR.new_empty(partials_PRR.shape[1:]), theta_sq_P.new_empty(())


@torch.no_grad()
def gram_partials(grads_RN: Tensor, theta_N: Tensor | None = None, adaptive: bool = False) -> tuple[Tensor, Tensor]:
    """First stage of `gram`, enough for `ascent_coefficients`: one launch less on the step path.

    Args:
        grads_RN: [R, N] gradient rows, float32 or bfloat16, 1 <= R <= 64.
        theta_N: [N] float32 parameters; None leaves |theta|^2 out (0), which a fixed, non-adaptive radius does not need.
        adaptive: rows are u = |theta| * g.

    Returns:
        Partial sums of M ([P, R, R]) and of |theta|^2 ([P]), float64.

    Raises:
        ValueError: shape, dtype, device mix, or adaptive without theta.
    """
    if theta_N is not None:
        check_vector("theta_N", theta_N, dtypes=(torch.float32,))
    elif adaptive:
        raise ValueError("theta_N is None; adaptive=True needs it")
    check_rows("grads_RN", grads_RN, theta_N)
    return _gram_partials(grads_RN, theta_N, bool(adaptive))


@torch.no_grad()
def gram(grads_GN: Tensor, theta_N: Tensor, adaptive: bool = False) -> tuple[Tensor, Tensor]:
    """Gram matrix of u_k = s * g_k and squared norm of theta.

    Args:
        grads_GN: [G, N] gradients, float32 or bfloat16, 1 <= G <= 64.
        theta_N: [N] float32 parameters.
        adaptive: s = |theta| (as ASAM) instead of 1.

    Returns:
        M [G, G] and |theta|^2 (0-d), float64.

    Raises:
        ValueError: shape, dtype or device mix, naming the argument.
    """
    check_vector("theta_N", theta_N, dtypes=(torch.float32,))
    check_rows("grads_GN", grads_GN, theta_N)
    return gram_reduce(*_gram_partials(grads_GN, theta_N, bool(adaptive)))
