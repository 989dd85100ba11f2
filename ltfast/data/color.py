"""torchvision's colour operations on batches of pictures, on any device, each picture with its own strengths and
order.

Pictures are float32 [n, 3, P], P = height * width pixels, RGB on the 0..255 scale; every function works in place and
returns its argument. What they equal (torchvision on PIL pictures): contrast pulls towards the picture's own rounded
gray mean (not 128), hue is a shift in turns of HSV's hue (not degrees, not YIQ), gray is ITU-R 601 luma, and every
step clips to 0..255. PIL rounds to whole levels after each step and quantises hue to 256 values; here nothing is
rounded: see tests for the differences.

No step reads a value back to the host: which picture gets what is decided from host tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.299, 0.587, 0.114)
TINY = 1e-4  # below one level's float32 rounding at 255; only keeps gray pixels from 0/0


class Jitter(NamedTuple):
    """ColorJitter drawn for n pictures, on the host.

    factors: float32 [n, 4], brightness, contrast, saturation factor and hue shift in turns; order: int64 [n, 4],
    which of the four comes first, second, ...; applied: bool [n]; gray: bool [n], turned gray afterwards.
    """

    factors: Tensor
    order: Tensor
    applied: Tensor
    gray: Tensor


def luma(x: Tensor) -> Tensor:
    """[n, P] gray value of [n, 3, P]."""
    return (x[:, 0] * LUMA[0]).add_(x[:, 1], alpha=LUMA[1]).add_(x[:, 2], alpha=LUMA[2])


def adjust_brightness(x: Tensor, factor_n: Tensor) -> Tensor:
    """x * factor."""
    return x.mul_(factor_n[:, None, None]).clamp_(0, 255)


def adjust_contrast(x: Tensor, factor_n: Tensor) -> Tensor:
    """Towards (factor < 1) or away from the mean gray of each picture, rounded to a whole level as PIL does."""
    mean = luma(x).mean(dim=1).round_()[:, None, None]
    return x.sub_(mean).mul_(factor_n[:, None, None]).add_(mean).clamp_(0, 255)


def adjust_saturation(x: Tensor, factor_n: Tensor) -> Tensor:
    """Towards or away from each pixel's gray."""
    rest = luma(x).mul_(1 - factor_n[:, None])[:, None]
    return x.mul_(factor_n[:, None, None]).add_(rest).clamp_(0, 255)


def to_gray(x: Tensor) -> Tensor:
    """Luma in all three channels."""
    return x.copy_(luma(x)[:, None].expand_as(x))


def adjust_hue(x: Tensor, turns_n: Tensor) -> Tensor:
    """Shifts HSV's hue by `turns` (1 = the whole circle); value and chroma, hence clipping, stay as they are."""
    red, green, blue = x.unbind(1)
    high, low = torch.maximum(red, green), torch.minimum(red, green)
    torch.maximum(high, blue, out=high)
    torch.minimum(low, blue, out=low)
    chroma = high - low
    scale = chroma.clamp(min=TINY).reciprocal_()
    # Hue in sixths of a turn: 0 red, 2 green, 4 blue.
    hue = (red - green).mul_(scale).add_(4)
    hue = torch.where(green == high, (blue - red).mul_(scale).add_(2), hue)
    hue = torch.where(red == high, (green - blue).mul_(scale), hue)
    hue.add_(turns_n[:, None] * 6)
    hue.sub_((hue / 6).floor_().mul_(6))
    # Red is full within one sixth of 0, green of 2, blue of 4, and falls linearly over the next sixth.
    torch.sub(hue, 3, out=scale).abs_().sub_(1).clamp_(0, 1).mul_(chroma).add_(low)
    x[:, 0] = scale
    for channel in (1, 2):
        torch.sub(hue, 2 * channel, out=scale).abs_().neg_().add_(2).clamp_(0, 1).mul_(chroma).add_(low)
        x[:, channel] = scale
    return x


_STEPS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _identity(step: int) -> float:
    return 0.0 if step == HUE else 1.0


def apply_jitter(x: Tensor, jitter: Jitter) -> Tensor:
    """Jitter, then gray, in each picture's own order, in place.

    On the CPU picture by picture, whose 150,000 values stay in the cache from one operation to the next; elsewhere
    `apply_jitter_grouped`.
    """
    if x.device.type != "cpu":
        return apply_jitter_grouped(x, jitter)
    rows = zip(
        jitter.applied.tolist(), jitter.order.tolist(), jitter.factors.tolist(), jitter.gray.tolist(), strict=True
    )
    for i, (applied, order, factors, gray) in enumerate(rows):
        one = x[i : i + 1]
        for step in order if applied else ():
            if factors[step] != _identity(step):
                _STEPS[step](one, jitter.factors[i : i + 1, step])
        if gray:
            to_gray(one)
    return x


def apply_jitter_grouped(x: Tensor, jitter: Jitter) -> Tensor:
    """The same; pictures that share a step at a place in the order go through it together.

    At most 16 groups of kernels whatever n is; the index lists are made on the host, so nothing waits for the device.
    """
    for place in range(4):
        for step, adjust in enumerate(_STEPS):
            strength = jitter.factors[:, step]
            chosen = jitter.applied & (jitter.order[:, place] == step) & (strength != _identity(step))
            on_subset(x, chosen, adjust, strength)
    return on_subset(x, jitter.gray, lambda part, _: to_gray(part), jitter.factors[:, 0])


def on_subset(x: Tensor, chosen_n: Tensor, change: Callable[[Tensor, Tensor], Tensor], strength_n: Tensor) -> Tensor:
    """x[chosen] = change(x[chosen], strength[chosen]) in place; chosen (bool) and strength are host tensors."""
    index = chosen_n.nonzero().squeeze(1)
    if index.numel() == 0:
        return x
    strength = strength_n[index].to(x.device, non_blocking=True)
    if index.numel() == x.shape[0]:
        return x.copy_(changed) if (changed := change(x, strength)) is not x else x
    where = index.to(x.device, non_blocking=True)
    return x.index_copy_(0, where, change(x.index_select(0, where), strength))
