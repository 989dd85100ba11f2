"""theta + s^2 * (coef @ grads) in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import as_coefficients, check_rows, check_vector, count


def perturb_reference(theta_N: Tensor, grads_GN: Tensor, coef_G: Tensor, adaptive: bool) -> Tensor:
    """The torch oracle, in theta's dtype; a zero coefficient removes its row whatever the row holds."""
    coef_G = coef_G.to(theta_N.dtype)
    step = torch.zeros_like(theta_N)
    for c, g in zip(coef_G, grads_GN, strict=True):
        step = step + torch.where(c == 0, torch.zeros_like(theta_N), c * g.to(theta_N.dtype))
    return theta_N + (theta_N * theta_N * step if adaptive else step)


def perturb(
    theta_N: Tensor,
    grads_GN: Tensor,
    coef_G: Tensor | Sequence[float],
    adaptive: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """out = theta + s^2 * (coef @ grads)."""
    check_vector("theta_N", theta_N, dtypes=(torch.float32,))
    check_rows("grads_GN", grads_GN, theta_N)
    coef_G = as_coefficients("coef_G", coef_G, grads_GN.shape[0], theta_N)
    if out is not None:
        check_vector("out", out, theta_N)
    else:
        out = torch.empty_like(theta_N)
    count("perturb", 1, [theta_N, grads_GN], [out])
    with torch.no_grad():
        return out.copy_(perturb_reference(theta_N, grads_GN, coef_G, adaptive))
