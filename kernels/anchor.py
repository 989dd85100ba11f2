"""Quadratic anchors (GKP): the penalty of G anchors, and their collapse into one.

    penalty  = 0.5 * sum_j c_j sum_i F_ji (theta_i - a_ji)^2;    d penalty / d theta = sum_j c_j F_j (theta - a_j)
    collapse A = sum_j c_j F_j,  T = sum_j c_j F_j a_j / A (0 where A = 0),  const = sum_ji c_j F_ji (a_ji - T_i)^2
             so that penalty = 0.5 * (sum_i A_i (theta_i - T_i)^2 + const)

Shapes: theta, A, T [N]; anchors a, Fisher diagonals F [G, N] (1 <= G <= 64); c [G]. Dtypes: theta, A, T float32; anchors
and F float32 or bfloat16; const float64.
Accumulation: the penalty in float32 inside a program and float64 across programs, two stages; A, T and const in float64
(once a regrouping). const comes from moments about the first anchor, in the one read that A and T need: float64 leaves 1e-16
of the anchors' distances, and equal anchors give 0.
Mutates nothing. Bytes per element: forward 4 + 2 G * 4, backward 4 more (written), collapse 2 G * 4 + 8.
Source: section 3.2 of arXiv 2603.21217. (A, T) is kept rather than (A, A T): theta - T is exact near the anchor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import in_blocks
from .common import (
    BLOCK,
    WARPS,
    Coefficients,
    as_coefficients,
    cdiv,
    check_rows,
    check_vector,
    count,
    jit,
    launch,
    tl,
    use_kernel,
)
from .register import op

# As many partial sums as one program can add up in a few microseconds, enough to fill 132 SMs eight times over.
PROGRAMS = 1024
SUM_BLOCK = 1024


@jit
def _anchor_penalty_kernel(
    theta_ptr, anchors_ptr, fishers_ptr, coef_ptr, partials_ptr, n_elements, anchor_stride, fisher_stride, n_blocks,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(pid, n_blocks, tl.num_programs(0)):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        theta = tl.load(theta_ptr + offsets, mask=mask, other=0.0)
        for j in range(0, G):
            row = tl.cast(j, tl.int64)
            a = tl.load(anchors_ptr + row * anchor_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            f = tl.load(fishers_ptr + row * fisher_stride + offsets, mask=mask, other=0.0).to(tl.float32)
            gap = theta - a
            acc += tl.load(coef_ptr + j).to(tl.float32) * f * gap * gap
    tl.store(partials_ptr + pid, 0.5 * tl.sum(acc, axis=0).to(tl.float64))


@jit
def _anchor_grad_kernel(
    theta_ptr, anchors_ptr, fishers_ptr, coef_ptr, upstream_ptr, grad_ptr, n_elements, anchor_stride, fisher_stride,
    G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    theta = tl.load(theta_ptr + offsets, mask=mask, other=0.0)
    grad = tl.zeros([BLOCK], dtype=tl.float32)
    for j in range(0, G):
        row = tl.cast(j, tl.int64)
        a = tl.load(anchors_ptr + row * anchor_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(fishers_ptr + row * fisher_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        grad += tl.load(coef_ptr + j).to(tl.float32) * f * (theta - a)
    tl.store(grad_ptr + offsets, tl.load(upstream_ptr).to(tl.float32) * grad, mask=mask)


@jit
def _collapse_anchors_kernel(
    anchors_ptr, fishers_ptr, coef_ptr, weight_ptr, target_ptr, partials_ptr, n_elements, anchor_stride,
    fisher_stride, n_blocks, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    acc = tl.zeros([BLOCK], dtype=tl.float64)
    for block in range(pid, n_blocks, tl.num_programs(0)):
        offsets = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        origin = tl.load(anchors_ptr + offsets, mask=mask, other=0.0).to(tl.float64)
        total = tl.zeros([BLOCK], dtype=tl.float64)
        first = tl.zeros([BLOCK], dtype=tl.float64)
        second = tl.zeros([BLOCK], dtype=tl.float64)
        for j in range(0, G):
            row = tl.cast(j, tl.int64)
            a = tl.load(anchors_ptr + row * anchor_stride + offsets, mask=mask, other=0.0).to(tl.float64)
            f = tl.load(fishers_ptr + row * fisher_stride + offsets, mask=mask, other=0.0).to(tl.float64)
            f = f * tl.load(coef_ptr + j).to(tl.float64)
            away = a - origin
            total += f
            first += f * away
            second += f * away * away
        present = total > 0.0
        shift = tl.where(present, first / tl.where(present, total, 1.0), 0.0)
        spread = second - first * shift
        acc += tl.where(spread < 0.0, 0.0, spread)  # rounding; a NaN stays
        tl.store(weight_ptr + offsets, total.to(tl.float32), mask=mask)
        tl.store(target_ptr + offsets, tl.where(present, origin + shift, 0.0).to(tl.float32), mask=mask)
    tl.store(partials_ptr + pid, tl.sum(acc, axis=0))


@jit
def _sum_kernel(partials_ptr, out_ptr, n_partials, BLOCK: tl.constexpr):
    """Second stage: one program adds float64 partial sums up in a fixed order."""
    acc = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, n_partials, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        acc += tl.load(partials_ptr + offsets, mask=offsets < n_partials, other=0.0)
    tl.store(out_ptr, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty))


def _launch_sum(partials: Tensor, out: Tensor) -> Tensor:
    launch(_sum_kernel, (1,), out.device, partials, out, partials.shape[0], BLOCK=SUM_BLOCK, num_warps=WARPS,
           enable_fp_fusion=False)  # fmt: skip
    return out


def anchor_penalty_reference(theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> Tensor:
    """The torch oracle, float64."""
    gap = theta_N - anchors_GN
    terms = (fishers_GN * gap * gap).sum(1, dtype=torch.float64)
    return 0.5 * (coef_G.double() @ terms)


def collapse_anchors_reference(anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The torch oracle, in float64 (float32 results, float64 const)."""
    weight = coef_G.double()[:, None] * fishers_GN.double()
    total = weight.sum(0)
    target = torch.where(total > 0, (weight * anchors_GN.double()).sum(0) / total, 0.0)
    const = (weight * (anchors_GN.double() - target) ** 2).sum()
    return total.to(_result_dtype(anchors_GN)), target.to(_result_dtype(anchors_GN)), const


def _result_dtype(anchors_GN: Tensor) -> torch.dtype:
    return torch.float64 if anchors_GN.dtype == torch.float64 else torch.float32


@op()
def _anchor_penalty(theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> Tensor:
    count("anchor_penalty", 2, [theta_N, anchors_GN, fishers_GN])
    if not use_kernel(theta_N):
        found = in_blocks(
            lambda parts: [anchor_penalty_reference(*part, coef_G) for part in parts], theta_N, anchors_GN, fishers_GN,
            rows=anchors_GN.shape[0],
        )  # fmt: skip
        return torch.stack([value for part in found for value in part]).sum().to(theta_N.dtype)
    groups, n = anchors_GN.shape
    blocks = cdiv(n, BLOCK)
    partials = theta_N.new_empty((min(blocks, PROGRAMS),), dtype=torch.float64)
    launch(_anchor_penalty_kernel, tuple(partials.shape), theta_N.device, theta_N, anchors_GN, fishers_GN, coef_G,
           partials, n, anchors_GN.stride(0), fishers_GN.stride(0), blocks, G=groups, BLOCK=BLOCK, num_warps=WARPS,
           enable_fp_fusion=False)  # fmt: skip
    return _launch_sum(partials, theta_N.new_empty(()))


@torch.library.register_fake("ltfast::anchor_penalty")
def _(theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> Tensor:
    return theta_N.new_empty(())


@op()
def _anchor_grad(
    theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor, upstream: Tensor
) -> Tensor:  # fmt: skip
    """upstream * d penalty / d theta."""
    grad = torch.empty_like(theta_N)
    count("anchor_grad", 1, [theta_N, anchors_GN, fishers_GN], [grad])
    if not use_kernel(theta_N):
        coef_G1 = coef_G.to(theta_N.dtype)[:, None]

        def work(parts: Iterator[tuple[Tensor, ...]]) -> None:
            for out, theta, anchors, fishers in parts:
                torch.mul(upstream, (coef_G1 * fishers * (theta - anchors)).sum(0), out=out)

        in_blocks(work, grad, theta_N, anchors_GN, fishers_GN, rows=anchors_GN.shape[0])
        return grad
    groups, n = anchors_GN.shape
    launch(_anchor_grad_kernel, (cdiv(n, BLOCK),), theta_N.device, theta_N, anchors_GN, fishers_GN, coef_G, upstream,
           grad, n, anchors_GN.stride(0), fishers_GN.stride(0), G=groups, BLOCK=BLOCK, num_warps=WARPS,
           enable_fp_fusion=False)  # fmt: skip
    return grad


@torch.library.register_fake("ltfast::anchor_grad")
def _(theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor, upstream: Tensor) -> Tensor:
    return torch.empty_like(theta_N)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> tuple:
    return _anchor_grad(*ctx.saved_tensors, upstream), None, None, None


torch.library.register_autograd("ltfast::anchor_penalty", _backward, setup_context=_setup_context)


@op()
def _collapse_anchors(
    anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    groups, n = anchors_GN.shape
    weight = anchors_GN.new_empty((n,), dtype=_result_dtype(anchors_GN))
    target = torch.empty_like(weight)
    count("collapse_anchors", 2, [anchors_GN, fishers_GN], [weight, target])
    if not use_kernel(anchors_GN):

        def work(parts: Iterator[tuple[Tensor, ...]]) -> list[Tensor]:
            spreads = []
            for a, t, anchors, fishers in parts:
                total, mean, spread = collapse_anchors_reference(anchors, fishers, coef_G)
                a.copy_(total)
                t.copy_(mean)
                spreads.append(spread)
            return spreads

        found = in_blocks(work, weight, target, anchors_GN, fishers_GN, rows=groups)
        return weight, target, torch.stack([spread for part in found for spread in part]).sum()
    blocks = cdiv(n, BLOCK)
    partials = weight.new_empty((min(blocks, PROGRAMS),), dtype=torch.float64)
    launch(_collapse_anchors_kernel, tuple(partials.shape), weight.device, anchors_GN, fishers_GN, coef_G, weight, target,
           partials, n, anchors_GN.stride(0), fishers_GN.stride(0), blocks, G=groups, BLOCK=BLOCK, num_warps=WARPS,
           enable_fp_fusion=False)  # fmt: skip
    return weight, target, _launch_sum(partials, partials.new_empty(()))


@torch.library.register_fake("ltfast::collapse_anchors")
def _(anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weight = anchors_GN.new_empty((anchors_GN.shape[1],), dtype=_result_dtype(anchors_GN))
    return weight, torch.empty_like(weight), weight.new_empty((), dtype=torch.float64)


def anchor_penalty(theta_N: Tensor, anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Coefficients) -> Tensor:
    """0.5 * sum_j coef_j sum_i F_ji (theta_i - anchor_ji)^2, differentiable in theta (once, not twice).

    Args:
        theta_N: [N] float32 parameters.
        anchors_GN, fishers_GN: [G, N] float32 or bfloat16, 1 <= G <= 64; the Fisher diagonal is not negative.
        coef_G: [G] weights of the anchors (method GKP: lambda (G - 1) / |G^j|).

    Returns:
        0-d float32. With weights that do not change, `collapse_anchors` gives the same for two reads per parameter.

    Raises:
        ValueError: shape, dtype or device mix, naming the argument.
    """
    check_vector("theta_N", theta_N, dtypes=(torch.float32,))
    check_rows("anchors_GN", anchors_GN, theta_N)
    check_rows("fishers_GN", fishers_GN, theta_N)
    coef_G = _check_groups(anchors_GN, fishers_GN, coef_G)
    return _anchor_penalty(theta_N, anchors_GN, fishers_GN, coef_G)


def _check_groups(anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Coefficients) -> Tensor:
    if fishers_GN.shape[0] != anchors_GN.shape[0]:
        raise ValueError(f"fishers_GN has {fishers_GN.shape[0]} rows, anchors_GN {anchors_GN.shape[0]}")
    return as_coefficients("coef_G", coef_G, anchors_GN.shape[0], anchors_GN)


@torch.no_grad()
def collapse_anchors(anchors_GN: Tensor, fishers_GN: Tensor, coef_G: Coefficients) -> tuple[Tensor, Tensor, Tensor]:
    """The G anchors as one: penalty = 0.5 * (sum_i A_i (theta_i - T_i)^2 + const).

    Args:
        anchors_GN, fishers_GN: [G, N] float32 or bfloat16, 1 <= G <= 64; the Fisher diagonal is not negative.
        coef_G: [G] weights, not negative.

    Returns:
        A [N] and T [N], float32 (T = 0 where A = 0), and const, 0-d float64.

    Raises:
        ValueError: shape, dtype or device mix, naming the argument.
    """
    check_rows("anchors_GN", anchors_GN)
    check_rows("fishers_GN", fishers_GN, anchors_GN)
    coef_G = _check_groups(anchors_GN, fishers_GN, coef_G)
    return _collapse_anchors(anchors_GN, fishers_GN, coef_G)
