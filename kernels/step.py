"""Fused SGD and AdamW updates: anchor gradient, unscaling, skipping and the working copy's refresh in the one pass.

    d = grad_scale * g + strength * A * (theta - T)             A, T: the collapsed anchor of method GKP (optional)
    SGD    d += wd * theta;  b = mu * b + (1 - dampening) * d;  theta -= lr * (d + mu * b if nesterov else b)
    AdamW  m += (1 - beta1) (d - m);  v = beta2 v + (1 - beta2) d^2
           theta = (1 - lr wd) theta - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Shapes: every array [N]. Dtypes: theta, state, A and T float32; gradient and mirror float32 or bfloat16.
Arithmetic: float32 without fused multiply-add and with rounded division and root, as the torch oracle computes it. On a
CPU the last step is torch's own fused optimizer, a block at a time, which uses fused multiply-add: other last bits.
Mutates theta, state and mirror; with found_inf != 0 theta and state keep their bits and the mirror is refreshed from theta,
so that a skipped step still takes the ascent back. With a source, theta is read there and only written in its place (as a
working copy that holds theta + eps): the update of SAM restores and steps in the one pass.
Bytes per element: SGD with momentum 16 + sizeof(grad), AdamW 24 + sizeof(grad); anchor + 8; mirror + its size.
Source: torch.optim.SGD and torch.optim.AdamW (semantics); A, T: `collapse_anchors`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .blocks import in_blocks
from .common import (
    BLOCK,
    WARPS,
    Number,
    cdiv,
    check_apart,
    check_vector,
    count,
    jit,
    launch,
    load_number,
    number,
    split_number,
    tl,
    use_kernel,
)
from .register import op

Anchor = tuple[Tensor, Tensor, Number]
F32 = (torch.float32,)
# Keeps 0 / 0 of what never had a gradient, padding among it, from being NaN.
LEAST_EPS = torch.finfo(torch.float32).tiny


@jit
def _full_gradient(theta, grad_ptr, anchor_ptr, target_ptr, strength_ptr, strength, scale_ptr, scale, offsets, mask):
    d = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * load_number(scale_ptr, scale)
    if anchor_ptr is not None:
        weight = tl.load(anchor_ptr + offsets, mask=mask, other=0.0)
        target = tl.load(target_ptr + offsets, mask=mask, other=0.0)
        d += load_number(strength_ptr, strength) * weight * (theta - target)
    return d


@jit
def _store_theta(theta_ptr, mirror_ptr, theta, offsets, mask):
    tl.store(theta_ptr + offsets, theta, mask=mask)
    if mirror_ptr is not None:
        tl.store(mirror_ptr + offsets, theta.to(mirror_ptr.dtype.element_ty), mask=mask)


@jit
def _sgd_step_kernel(
    theta_ptr, source_ptr, grad_ptr, buf_ptr, anchor_ptr, target_ptr, mirror_ptr, found_inf_ptr,
    lr_ptr, lr, strength_ptr, strength, scale_ptr, scale, first_ptr, keep, momentum, weight_decay, n_elements,
    NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    theta = tl.load(source_ptr + offsets, mask=mask, other=0.0)
    d = _full_gradient(
        theta, grad_ptr, anchor_ptr, target_ptr, strength_ptr, strength, scale_ptr, scale, offsets, mask
    )  # fmt: skip
    d += tl.cast(weight_decay, tl.float32) * theta
    skip = load_number(found_inf_ptr, 0.0) != 0
    if buf_ptr is not None:
        mu = tl.cast(momentum, tl.float32)
        gain = tl.cast(keep, tl.float32)
        if first_ptr is not None:
            gain = tl.where(tl.load(first_ptr) != 0, 1.0, gain)
        old = tl.load(buf_ptr + offsets, mask=mask, other=0.0)
        buf = mu * old + gain * d
        tl.store(buf_ptr + offsets, tl.where(skip, old, buf), mask=mask)
        if NESTEROV:
            d += mu * buf
        else:
            d = buf
    new = theta - load_number(lr_ptr, lr) * d
    _store_theta(theta_ptr, mirror_ptr, tl.where(skip, theta, new), offsets, mask)


@jit
def _one_minus_power(log_beta, step):
    """1 - beta^step in float32 to its last digits: near 0 as -expm1's series, where 1 - exp(x) would cancel."""
    x = tl.cast(log_beta, tl.float32) * step
    series = 1.0 + x / 9
    for k in tl.static_range(7):
        series = 1.0 + x / (8 - k) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@jit
def _adamw_step_kernel(
    theta_ptr, source_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, anchor_ptr, target_ptr, mirror_ptr, found_inf_ptr,
    lr_ptr, lr, strength_ptr, strength, scale_ptr, scale, step_ptr, correct1, correct2, log_beta1, log_beta2,
    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, n_elements, BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    rate = load_number(lr_ptr, lr)
    if step_ptr is not None:
        step = tl.load(step_ptr).to(tl.float32)
        bias1 = _one_minus_power(log_beta1, step)
        bias2 = tl.sqrt_rn(_one_minus_power(log_beta2, step))
    else:
        bias1 = tl.cast(correct1, tl.float32)
        bias2 = tl.cast(correct2, tl.float32)
    theta = tl.load(source_ptr + offsets, mask=mask, other=0.0)
    d = _full_gradient(
        theta, grad_ptr, anchor_ptr, target_ptr, strength_ptr, strength, scale_ptr, scale, offsets, mask
    )  # fmt: skip
    old_m = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0)
    old_v = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0)
    m = old_m + tl.cast(one_minus_beta1, tl.float32) * (d - old_m)
    v = tl.cast(beta2, tl.float32) * old_v + tl.cast(one_minus_beta2, tl.float32) * (d * d)
    denominator = tl.div_rn(tl.sqrt_rn(v), bias2) + tl.cast(eps, tl.float32)
    decayed = theta * (1.0 - rate * tl.cast(weight_decay, tl.float32))
    new = decayed - tl.div_rn(rate, bias1) * tl.div_rn(m, denominator)
    skip = load_number(found_inf_ptr, 0.0) != 0
    tl.store(exp_avg_ptr + offsets, tl.where(skip, old_m, m), mask=mask)
    tl.store(exp_avg_sq_ptr + offsets, tl.where(skip, old_v, v), mask=mask)
    _store_theta(theta_ptr, mirror_ptr, tl.where(skip, theta, new), offsets, mask)


def _gradient_reference(
    theta: Tensor, grad: Tensor, anchor: Tensor | None, target: Tensor | None, strength: Number, scale: Number
) -> Tensor:
    d = grad.to(theta.dtype) * scale
    return d if anchor is None else d + strength * anchor * (theta - target)


def _sgd_reference(
    theta: Tensor, source: Tensor, d: Tensor, buf: Tensor | None, lr: Number, keep: Number, momentum: float,
    weight_decay: float, nesterov: bool,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """(array, old value, new value) of theta and the buffer, for `_write`."""
    d = d + weight_decay * source
    if buf is None:
        return [(theta, source, source - lr * d)]
    new_buf = momentum * buf + keep * d
    d = d + momentum * new_buf if nesterov else new_buf
    return [(theta, source, source - lr * d), (buf, buf, new_buf)]


def _adamw_reference(
    theta: Tensor, source: Tensor, d: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Number, step: Number, beta1: float,
    beta2: float, eps: float, weight_decay: float,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """(array, old value, new value) of theta and both moments, for `_write`."""
    correct1, correct2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    m = exp_avg + (1 - beta1) * (d - exp_avg)
    v = beta2 * exp_avg_sq + (1 - beta2) * (d * d)
    new = source * (1 - lr * weight_decay) - lr / correct1 * (m / (v.sqrt() / correct2 + eps))
    return [(theta, source, new.to(theta.dtype)), (exp_avg, exp_avg, m), (exp_avg_sq, exp_avg_sq, v)]


def _write(values: list[tuple[Tensor, Tensor, Tensor]], found_inf: Tensor | None, mirror: Tensor | None) -> None:
    """(array, old value, new value), theta first: write the new values, the old ones if found_inf; refresh the mirror."""
    for array, old, new in values:
        array.copy_(new if found_inf is None else torch.where(found_inf.reshape(()) != 0, old, new))
    if mirror is not None:
        mirror.copy_(values[0][0])


def _update_in_blocks(
    update: Callable[..., None], theta: Tensor, source: Tensor, grad: Tensor, anchor: Tensor | None, target: Tensor | None,
    mirror: Tensor | None, found_inf: Tensor | None, scale: Number, strength: Number, *state: Tensor | None,
) -> None:  # fmt: skip
    """On a CPU: take theta from source, call update(theta, full gradient, *state) unless skipping, refresh mirror."""
    scale, strength = float(scale), float(strength)
    skip = found_inf is not None and bool(found_inf)
    moved = source.data_ptr() != theta.data_ptr()

    def work(parts: Iterator[tuple[Any, ...]]) -> None:
        space: Tensor | None = None
        for here, there, g, weight, center, copy, *own in parts:
            if moved:
                here.copy_(there)
            if not skip:
                if anchor is not None or scale != 1.0 or g.dtype != here.dtype:
                    space = here.new_empty(2, here.shape[0]) if space is None else space
                    d, gap = space[:, : here.shape[0]]
                    g = torch.mul(g, scale, out=d) if g.dtype == here.dtype else d.copy_(g).mul_(scale)
                    if weight is not None:
                        d.addcmul_(weight, torch.sub(here, center, out=gap), value=strength)
                update(here, g, *own)
            if copy is not None:
                copy.copy_(here)

    in_blocks(work, theta, source, grad, anchor, target, mirror, *state)


def _moved(source: Tensor | None, theta: Tensor) -> Tensor | None:
    """The source if it is another array than theta."""
    return None if source is None or source.data_ptr() == theta.data_ptr() else source


@op("theta", "buf", "mirror")
def _sgd_step(
    theta: Tensor, source: Tensor | None, grad: Tensor, buf: Tensor | None, anchor: Tensor | None, target: Tensor | None,
    mirror: Tensor | None, found_inf: Tensor | None, lr: float, lr_t: Tensor | None, strength: float,
    strength_t: Tensor | None, scale: float, scale_t: Tensor | None, first_t: Tensor | None, keep: float,
    momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """`X` and `X_t` are one number: on the host, or (not None) on the device. keep = 1 - dampening."""
    check_apart(
        {"theta_N": theta, "momentum_N": buf, "mirror": mirror},
        {"grad_N": grad, "anchor[0] (A)": anchor, "anchor[1] (T)": target, "source": _moved(source, theta)},
    )
    source = theta if source is None else source
    count("sgd_step", 1, [source, grad, buf, anchor, target], [theta, buf, mirror])
    if use_kernel(theta):
        n = theta.shape[0]
        launch(_sgd_step_kernel, (cdiv(n, BLOCK),), theta.device, theta, source, grad, buf, anchor, target,
               mirror, found_inf, lr_t, lr, strength_t, strength, scale_t, scale, first_t, keep, momentum, weight_decay, n,
               NESTEROV=nesterov, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)  # fmt: skip
        return
    if theta.device.type == "cpu":
        first = first_t is not None and bool(first_t)
        options = {
            "weight_decay": weight_decay, "momentum": 0.0 if buf is None else momentum, "lr": float(number(lr, lr_t)),
            "dampening": 0.0 if first else 1.0 - keep, "nesterov": nesterov, "maximize": False,
        }  # fmt: skip
        _update_in_blocks(
            lambda here, d, b: sgd([here], [d], [b], fused=True, **options), theta, source, grad, anchor, target, mirror,
            found_inf, number(scale, scale_t), number(strength, strength_t), buf,
        )  # fmt: skip
        return
    d = _gradient_reference(source, grad, anchor, target, number(strength, strength_t), number(scale, scale_t))
    gain = keep if first_t is None else torch.where(first_t.reshape(()) != 0, 1.0, keep)
    values = _sgd_reference(theta, source, d, buf, number(lr, lr_t), gain, momentum, weight_decay, nesterov)
    _write(values, found_inf, mirror)


@op("theta", "exp_avg", "exp_avg_sq", "mirror")
def _adamw_step(
    theta: Tensor, source: Tensor | None, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, anchor: Tensor | None,
    target: Tensor | None, mirror: Tensor | None, found_inf: Tensor | None, lr: float, lr_t: Tensor | None, strength: float,
    strength_t: Tensor | None, scale: float, scale_t: Tensor | None, step: float, step_t: Tensor | None,
    beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """`X` and `X_t` are one number: on the host, or (not None) on the device."""
    check_apart(
        {"theta_N": theta, "exp_avg_N": exp_avg, "exp_avg_sq_N": exp_avg_sq, "mirror": mirror},
        {"grad_N": grad, "anchor[0] (A)": anchor, "anchor[1] (T)": target, "source": _moved(source, theta)},
    )
    source = theta if source is None else source
    count("adamw_step", 1, [source, grad, exp_avg, exp_avg_sq, anchor, target], [theta, exp_avg, exp_avg_sq, mirror])
    if use_kernel(theta):
        n = theta.shape[0]
        log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
        launch(_adamw_step_kernel, (cdiv(n, BLOCK),), theta.device, theta, source, grad, exp_avg, exp_avg_sq,
               anchor, target, mirror, found_inf, lr_t, lr, strength_t, strength, scale_t, scale, step_t, 1 - beta1**step,
               (1 - beta2**step) ** 0.5, log1, log2, 1 - beta1, beta2, 1 - beta2, eps, weight_decay, n,
               BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False)  # fmt: skip
        return
    if theta.device.type == "cpu":
        before = float(number(step, step_t)) - 1  # torch counts up first
        options = {
            "beta1": beta1, "beta2": beta2, "lr": float(number(lr, lr_t)), "weight_decay": weight_decay, "eps": eps,
            "amsgrad": False, "maximize": False,
        }  # fmt: skip

        def update(here: Tensor, d: Tensor, m: Tensor, v: Tensor) -> None:
            counter = torch.tensor(before, dtype=torch.float32, device="cpu")
            adamw([here], [d], [m], [v], [], [counter], fused=True, **options)

        _update_in_blocks(
            update, theta, source, grad, anchor, target, mirror, found_inf, number(scale, scale_t),
            number(strength, strength_t), exp_avg, exp_avg_sq,
        )  # fmt: skip
        return
    t: Number = step if step_t is None else step_t.reshape(()).double()
    d = _gradient_reference(source, grad, anchor, target, number(strength, strength_t), number(scale, scale_t))
    values = _adamw_reference(
        theta, source, d, exp_avg, exp_avg_sq, number(lr, lr_t), t, beta1, beta2, eps, weight_decay
    )  # fmt: skip
    _write(values, found_inf, mirror)


def _check_arrays(
    theta_N: Tensor,
    grad_N: Tensor,
    state: dict[str, Tensor | None],
    anchor: Anchor | None,
    mirror: Tensor | None,
    found_inf: Tensor | None,
    source: Tensor | None,
) -> tuple:
    """Check what goes with theta before anything is written; returns (A, T, strength, strength_t)."""
    check_vector("grad_N", grad_N, theta_N)
    for name, tensor in state.items():
        if tensor is None:
            raise ValueError(f"{name} is None; pass a zero-initialised buffer")
        check_vector(name, tensor, theta_N, dtypes=F32)
    if mirror is not None:
        check_vector("mirror", mirror, theta_N)
    if source is not None:
        check_vector("source", source, theta_N, dtypes=F32)
    if found_inf is not None:
        if not isinstance(found_inf, Tensor):
            raise ValueError(f"found_inf must be a one-element tensor, not {type(found_inf).__name__}")
        split_number("found_inf", found_inf, theta_N.device)
    if anchor is None:
        return None, None, 0.0, None
    if not isinstance(anchor, (tuple, list)) or len(anchor) != 3:
        raise ValueError("anchor must be the three values (A, T, strength)")
    weight, target, strength = anchor
    check_vector("anchor[0] (A)", weight, theta_N, dtypes=F32)
    check_vector("anchor[1] (T)", target, theta_N, dtypes=F32)
    return weight, target, *split_number("anchor[2] (strength)", strength, theta_N.device)


def _scale(grad_scale: Number | None, device: torch.device) -> tuple[float, Tensor | None]:
    return split_number("grad_scale", 1.0 if grad_scale is None else grad_scale, device, low=-math.inf)


@torch.no_grad()
def sgd_step(
    theta_N: Tensor,
    grad_N: Tensor,
    momentum_N: Tensor | None,
    lr: Number,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    anchor: Anchor | None = None,
    mirror: Tensor | None = None,
    *,
    grad_scale: Number | None = None,
    found_inf: Tensor | None = None,
    source: Tensor | None = None,
    first_step: bool | Tensor = False,
) -> None:
    """One torch.optim.SGD update, in place, in one pass.

    Args:
        theta_N, momentum_N: [N] float32; the buffer starts at zero (None is fine with momentum 0).
        grad_N: [N] float32 or bfloat16.
        lr, grad_scale, anchor's strength: number or one-element device tensor (for CUDA graphs).
        anchor: (A [N], T [N], strength): adds strength * A * (theta - T) to the gradient, unscaled by grad_scale.
        mirror: [N] float32 or bfloat16 second copy that gets the new theta.
        grad_scale: multiplies the gradient (1 / loss scale).
        found_inf: one-element device tensor; nonzero: theta and buffer stay, the mirror is refreshed all the same.
        source: [N] float32: theta is read here and written to theta_N, whose old content does not matter (found_inf:
            theta_N becomes source). For SAM: theta_N holds theta + eps, source theta.
        first_step: torch starts the buffer with the whole gradient, undampened; matters only with dampening.

    Raises:
        ValueError: a bad argument, or one that shares memory with what is written (source may be theta_N), by name; then
            nothing has been written.
    """
    check_vector("theta_N", theta_N, dtypes=F32)
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        split_number(name, value, theta_N.device)
    split_number("dampening", dampening, theta_N.device, low=-math.inf)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(f"nesterov needs momentum > 0 and dampening 0, not {momentum} and {dampening}")
    buf = momentum_N if momentum != 0 else None
    checked = _check_arrays(
        theta_N, grad_N, {} if momentum == 0 else {"momentum_N": momentum_N}, anchor, mirror, found_inf, source
    )
    weight, target, strength, strength_t = checked
    lr_pair = split_number("lr", lr, theta_N.device)
    first_t = first_step if isinstance(first_step, Tensor) else None
    keep = 1.0 if first_t is None and first_step else 1.0 - dampening
    _sgd_step(
        theta_N, source, grad_N, buf, weight, target, mirror, found_inf, *lr_pair, strength, strength_t,
        *_scale(grad_scale, theta_N.device), first_t, keep, float(momentum), float(weight_decay), bool(nesterov),
    )  # fmt: skip


@torch.no_grad()
def adamw_step(
    theta_N: Tensor,
    grad_N: Tensor,
    exp_avg_N: Tensor,
    exp_avg_sq_N: Tensor,
    step: Number,
    lr: Number,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    anchor: Anchor | None = None,
    mirror: Tensor | None = None,
    *,
    grad_scale: Number | None = None,
    found_inf: Tensor | None = None,
    source: Tensor | None = None,
) -> None:
    """One torch.optim.AdamW update, in place, in one pass.

    Args:
        theta_N, exp_avg_N, exp_avg_sq_N: [N] float32; both moments start at zero.
        eps: less than float32's smallest normal number counts as that.
        step: number of this step, 1 for the first; number or one-element device tensor, like lr. A skipped step
            (found_inf) must not be counted, which is the caller's part.
        grad_N, lr, anchor, mirror, grad_scale, found_inf, source: as for `sgd_step`.

    Raises:
        ValueError: a bad argument, by name; then nothing has been written.
    """
    check_vector("theta_N", theta_N, dtypes=F32)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}; it must be two numbers in [0, 1)")
    for i, beta in enumerate(betas):
        split_number(f"betas[{i}]", beta, theta_N.device)
        if not beta < 1:
            raise ValueError(f"betas[{i}] is {beta}; it must be in [0, 1)")
    split_number("eps", eps, theta_N.device)
    split_number("weight_decay", weight_decay, theta_N.device)
    weight, target, strength, strength_t = _check_arrays(
        theta_N, grad_N, {"exp_avg_N": exp_avg_N, "exp_avg_sq_N": exp_avg_sq_N}, anchor, mirror, found_inf, source
    )
    count_pair = split_number("step", step, theta_N.device, low=1)
    _adamw_step(
        theta_N, source, grad_N, exp_avg_N, exp_avg_sq_N, weight, target, mirror, found_inf,
        *split_number("lr", lr, theta_N.device), strength, strength_t, *_scale(grad_scale, theta_N.device),
        *count_pair, *map(float, betas), max(float(eps), LEAST_EPS), float(weight_decay),
    )  # fmt: skip
