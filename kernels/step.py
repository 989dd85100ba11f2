"""Fused SGD and AdamW updates."""

import math

import torch
from torch import Tensor

from .common import Number, check_vector, count, number, split_number

Anchor = tuple[Tensor, Tensor, Number]


def _full_gradient(theta: Tensor, grad: Tensor, anchor: tuple | None, grad_scale: float | Tensor | None) -> Tensor:
    grad = grad.to(theta.dtype)
    if grad_scale is not None:
        grad = grad * grad_scale
    if anchor is not None:
        weight, target, strength = anchor
        grad = grad + strength * weight * (theta - target)
    return grad


def _store(pairs: list[tuple[Tensor, Tensor]], found_inf: Tensor | None, mirror: Tensor | None) -> None:
    """Write every new value over its array (pairs[0] is theta), none of them if found_inf; then refresh the mirror."""
    for array, new in pairs:
        array.copy_(new if found_inf is None else torch.where(found_inf.reshape(()) != 0, array, new))
    if mirror is not None:
        mirror.copy_(pairs[0][0])


def sgd_step_reference(
    theta: Tensor, grad: Tensor, buf: Tensor | None, lr, momentum, dampening, weight_decay, nesterov, anchor, mirror,
    grad_scale, found_inf, first_step,
) -> None:  # fmt: skip
    """The torch oracle."""
    d = _full_gradient(theta, grad, anchor, grad_scale)
    if weight_decay != 0:
        d = d + weight_decay * theta
    pairs = []
    if buf is not None:
        keep = 1 - dampening * (1 - torch.as_tensor(first_step, device=theta.device).to(theta.dtype))
        new_buf = momentum * buf + keep * d
        pairs = [(buf, new_buf)]
        d = d + momentum * new_buf if nesterov else new_buf
    _store([(theta, theta - lr * d), *pairs], found_inf, mirror)


def adamw_step_reference(
    theta: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step, lr, betas, eps, weight_decay, anchor,
    mirror, grad_scale, found_inf,
) -> None:  # fmt: skip
    """The torch oracle."""
    beta1, beta2 = betas
    d = _full_gradient(theta, grad, anchor, grad_scale)
    m = exp_avg + (1 - beta1) * (d - exp_avg)
    v = beta2 * exp_avg_sq + (1 - beta2) * (d * d)
    if isinstance(step, Tensor):
        step = step.double()
    correct1, correct2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    if isinstance(step, Tensor):
        correct1, correct2 = correct1.to(theta.dtype), correct2.to(theta.dtype)
    new = theta * (1 - lr * weight_decay) - (lr / correct1) * (m / (v.sqrt() / correct2 + eps))
    _store([(theta, new), (exp_avg, m), (exp_avg_sq, v)], found_inf, mirror)


def _check(theta_N: Tensor, grad_N: Tensor, anchor, mirror, state: dict[str, Tensor]) -> None:
    check_vector("theta_N", theta_N, dtypes=(torch.float32,))
    check_vector("grad_N", grad_N, theta_N)
    for name, tensor in state.items():
        check_vector(name, tensor, theta_N, dtypes=(torch.float32,))
    if anchor is not None:
        check_vector("anchor[0]", anchor[0], theta_N, dtypes=(torch.float32,))
        check_vector("anchor[1]", anchor[1], theta_N, dtypes=(torch.float32,))
    if mirror is not None:
        check_vector("mirror", mirror, theta_N)


def _numbers(theta_N, lr, anchor, grad_scale, found_inf):
    device = theta_N.device
    lr = number(*split_number("lr", lr, device))
    if anchor is not None:
        anchor = (anchor[0], anchor[1], number(*split_number("anchor[2]", anchor[2], device)))
    if grad_scale is not None:
        grad_scale = number(*split_number("grad_scale", grad_scale, device, low=-math.inf))
    if found_inf is not None:
        found_inf = torch.as_tensor(found_inf, device=device)
    return lr, anchor, grad_scale, found_inf


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
    first_step: bool | Tensor = False,
) -> None:
    """torch.optim.SGD's update in one pass, in place."""
    buf = momentum_N if momentum != 0 else None
    if momentum != 0 and momentum_N is None:
        raise ValueError(f"momentum_N is None; momentum {momentum} needs a buffer")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError("nesterov needs a momentum above 0 and dampening 0")
    _check(theta_N, grad_N, anchor, mirror, {} if buf is None else {"momentum_N": buf})
    lr, anchor, grad_scale, found_inf = _numbers(theta_N, lr, anchor, grad_scale, found_inf)
    count("sgd_step", 1, [theta_N, grad_N, buf, *(anchor or ())[:2]], [theta_N, buf, mirror])
    with torch.no_grad():
        sgd_step_reference(theta_N, grad_N, buf, lr, momentum, dampening, weight_decay, nesterov, anchor, mirror,
                           grad_scale, found_inf, first_step)  # fmt: skip


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
) -> None:
    """torch.optim.AdamW's update in one pass, in place; `step` counts from 1."""
    _check(theta_N, grad_N, anchor, mirror, {"exp_avg_N": exp_avg_N, "exp_avg_sq_N": exp_avg_sq_N})
    lr, anchor, grad_scale, found_inf = _numbers(theta_N, lr, anchor, grad_scale, found_inf)
    step = number(*split_number("step", step, theta_N.device, low=1))
    count("adamw_step", 1, [theta_N, grad_N, exp_avg_N, exp_avg_sq_N, *(anchor or ())[:2]],
          [theta_N, exp_avg_N, exp_avg_sq_N, mirror])  # fmt: skip
    with torch.no_grad():
        adamw_step_reference(theta_N, grad_N, exp_avg_N, exp_avg_sq_N, step, lr, betas, eps, weight_decay, anchor,
                             mirror, grad_scale, found_inf)  # fmt: skip
