"""Colour operations for a whole batch with parameters per sample, as torchvision.transforms.v2 does them on tensors.

Images are float32 [B, 3, H, W]; `bound` is the white level. On the 0..1 scale (bound 1) values stay real; on the 0..255
scale (bound 255) they are whole numbers and every operation truncates as torchvision does for uint8, which the
AutoAugment policy needs (thresholds, bits and histograms mean levels). Every function is free of host synchronisation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)
"""torchvision's weights (v2.functional.rgb_to_grayscale)."""


def apply_where(chosen_B: Tensor, operation: Callable[..., Tensor], images: Tensor, *parameters: Tensor) -> Tensor:
    """operation(images, *parameters) for the chosen samples, the others unchanged; may write into `images`.

    On the CPU only the chosen samples are computed; on other devices, and when compiling, all of them, and a select
    decides: finding the chosen rows would wait for the device and make shapes vary.
    """
    if images.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(chosen_B[:, None, None, None], operation(images, *parameters), images)
    rows = chosen_B.nonzero().squeeze(1)
    if rows.numel() == 0:
        return images
    return images.index_copy_(0, rows, operation(images[rows], *(parameter[rows] for parameter in parameters)))


def luma(images: Tensor, bound: float = 1.0) -> Tensor:
    """Gray value [B, 1, H, W]; a whole number when bound is 255."""
    red, green, blue = images.split(1, dim=1)
    gray = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return gray if bound == 1 else gray.floor()


def blend(images: Tensor, other: Tensor, factor_B: Tensor, bound: float = 1.0) -> Tensor:
    """factor * images + (1 - factor) * other, clipped; the heart of brightness, contrast and saturation."""
    factor = factor_B[:, None, None, None]
    mixed = (images * factor + other * (1 - factor)).clamp(0, bound)
    return mixed if bound == 1 else mixed.floor()


BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def color_blend(images: Tensor, kind_B: Tensor, factor_B: Tensor, bound: float = 1.0) -> Tensor:
    """Brightness (towards black), contrast (towards the picture's mean gray) or saturation (towards gray), by kind."""
    gray = luma(images, bound)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    kind = kind_B[:, None, None, None]
    other = torch.where(kind == CONTRAST, mean, gray)
    return blend(images, torch.where(kind == BRIGHTNESS, 0.0, other), factor_B, bound)


def adjust_hue(images: Tensor, turns_B: Tensor) -> Tensor:
    """Shift the hue of HSV by `turns` (1 = the whole circle) on the 0..1 scale.

    With v the largest channel, c the chroma and h the hue in sixths, channel k is v - c * clip(min(q, 4 - q), 0, 1)
    with q = (5, 3, 1)[k] + h modulo 6: the same function as torchvision's six-way table, without a gather.
    """
    red, green, blue = images.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    hue = hue + 6 * turns_B[:, None, None, None]
    start = 5 - 2 * torch.arange(3, device=images.device).view(1, 3, 1, 1)
    q = (hue + start).remainder(6)
    return value - chroma * torch.minimum(q, 4 - q).clamp(0, 1)


def to_gray(images: Tensor) -> Tensor:
    """The gray value in all three channels, 0..1 scale."""
    return luma(images).expand_as(images)


def jitter(images: Tensor, order_B4: Tensor, factors_B4: Tensor, applied_B: Tensor) -> Tensor:
    """ColorJitter on the 0..1 scale: the four adjustments in each sample's own order, where applied.

    order_B4: a permutation of (brightness, contrast, saturation, hue) by number; factors_B4: their parameters, hue's in
    turns.
    """
    for place in range(4):
        kind = order_B4[:, place]
        factor = factors_B4.gather(1, kind[:, None]).squeeze(1)
        images = apply_where(applied_B & (kind != HUE), color_blend, images, kind, factor)
        images = apply_where(applied_B & (kind == HUE), adjust_hue, images, factor)
    return images


def sharpen(images: Tensor, factor_B: Tensor) -> Tensor:
    """adjust_sharpness on the 0..255 scale: away from (factor > 1) or towards a 3 x 3 smoothing; the border stays."""
    columns = images[..., :-2] + images[..., 1:-1] + images[..., 2:]
    box = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    center = images[..., 1:-1, 1:-1]
    smooth = ((box + 4 * center) * (1 / 13)).round()
    inner = center + (1 - factor_B[:, None, None, None]) * (smooth - center)
    out = images.clone()
    out[..., 1:-1, 1:-1] = inner.clamp(0, 255).floor()
    return out


def solarize(images: Tensor, threshold_B: Tensor) -> Tensor:
    """255 - x where x >= threshold, 0..255 scale."""
    return torch.where(images >= threshold_B[:, None, None, None], 255 - images, images)


def posterize(images: Tensor, bits_B: Tensor) -> Tensor:
    """Keep the highest `bits` bits, 0..255 scale."""
    step = torch.exp2(8 - bits_B)[:, None, None, None]
    return (images / step).floor() * step


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel to 0..255; a channel of one value stays."""
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    flat = high == low
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return ((images - torch.where(flat, 0.0, low)) / scale).clamp(0, 255).floor()


def equalize(images: Tensor) -> Tensor:
    """Histogram equalisation of each channel by Pillow's rule, 0..255 scale.

    step = (pixels below the maximum) // 255; level v becomes (pixels below v + step // 2) // step, clipped; step 0
    changes nothing.
    """
    batch, channels, height, width = images.shape
    level = images.to(torch.int64).reshape(batch * channels, height * width)
    histogram = torch.zeros(batch * channels, 256, dtype=torch.int64, device=images.device)
    histogram = histogram.scatter_add(1, level, torch.ones_like(level))
    below = histogram.cumsum(1) - histogram
    step = below.gather(1, level.amax(dim=1, keepdim=True)) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step == 0, torch.arange(256, device=images.device), table)
    return table.gather(1, level).to(images.dtype).view_as(images)
