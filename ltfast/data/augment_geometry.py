"""Where pixels come from: crop, flip, cutout, affine warp, random resized crop, for a whole batch with parameters per
sample.

Every function takes images [B, ch, H, W] and one parameter tensor [B] per argument, and means what
torchvision.transforms.v2 means by the same numbers; tests compare them one by one. No function looks at values on the
host, so each can be compiled or captured.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def integers(uniform: Tensor, n: int | Tensor) -> Tensor:
    """floor(u * n) as int64 in 0..n-1; exact for n < 2^24 - 1 since u is a multiple of 2^-24 below 1."""
    return (uniform.to(torch.float64) * n).floor().to(torch.int64)


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    """low + u * (high - low)."""
    return low + uniform * (high - low)


def crop_flip(images: Tensor, top_B: Tensor, left_B: Tensor, flip_B: Tensor, padding: int) -> Tensor:
    """Pad with zeros by `padding`, crop H x W at (top, left) of the padded image, mirror left-right where flip. Any
    dtype."""
    batch, channels, height, width = images.shape
    rows = top_B[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left_B[:, None] + torch.where(flip_B[:, None], width - 1 - columns, columns)
    padded_width = width + 2 * padding
    place = (rows[:, :, None] * padded_width + columns[:, None, :]).view(batch, 1, -1).expand(-1, channels, -1)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, place).view(batch, channels, height, width)


def cutout(images: Tensor, center_y_B: Tensor, center_x_B: Tensor, length: int) -> Tensor:
    """Set the length x length square around the centre to 0, clipped at the border (DeVries and Taylor 2017)."""
    height, width = images.shape[-2:]
    half = length // 2
    rows = torch.arange(height, device=images.device) - center_y_B[:, None]
    columns = torch.arange(width, device=images.device) - center_x_B[:, None]
    inside_rows = (rows >= -half) & (rows < half)
    inside_columns = (columns >= -half) & (columns < half)
    hole = (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]
    return images.masked_fill(hole, 0.0)


def inverse_affine(
    angle_B: Tensor,
    *,
    translate_x: Tensor,
    translate_y: Tensor,
    scale: Tensor,
    shear: Tensor,
    center_x: Tensor,
    center_y: Tensor,
) -> Tensor:
    """[B, 2, 3] float32: output pixel -> input pixel, both measured from the image centre; torchvision's affine
    inverted.

    angle in degrees, clockwise (as torchvision's affine; its rotate turns the other way); shear is vertical, a tangent
    and no angle; translation and centre in pixels from the image centre. Computed in float64.
    """
    rotation = angle_B.double() * (math.pi / 180)
    cos, sin = rotation.cos(), rotation.sin()
    m00, m01 = cos / scale, sin / scale
    m10, m11 = (cos * shear - sin) / scale, (cos + sin * shear) / scale
    x, y = -center_x - translate_x, -center_y - translate_y
    m02 = m00 * x + m01 * y + center_x
    m12 = m10 * x + m11 * y + center_y
    return torch.stack([m00, m01, m02, m10, m11, m12], dim=1).view(-1, 2, 3).float()


def warp(images: Tensor, inverse_B23: Tensor, mode: str = "nearest") -> Tensor:
    """Resample float images through `inverse_affine` matrices; outside is 0. mode: nearest or bilinear."""
    height, width = images.shape[-2:]
    device = images.device
    x = torch.linspace((1 - width) / 2, (width - 1) / 2, width, device=device)
    y = torch.linspace((1 - height) / 2, (height - 1) / 2, height, device=device)[:, None]
    m = inverse_B23[:, :, :, None, None]
    # Written out, not as a matmul: TF32 or autocast would move pixels.
    source_x = (m[:, 0, 0] * x + m[:, 0, 1] * y + m[:, 0, 2]) * (2 / width)
    source_y = (m[:, 1, 0] * x + m[:, 1, 1] * y + m[:, 1, 2]) * (2 / height)
    grid = torch.stack([source_x, source_y], dim=-1)
    return F.grid_sample(images, grid, mode=mode, padding_mode="zeros", align_corners=False)


class Boxes(NamedTuple):
    """Crop boxes in pixels, int64 [B] each."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


RRC_TRIES = 10
RRC_DRAWS = 4 * RRC_TRIES


def random_boxes(
    uniforms: Tensor, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Boxes:
    """Random-resized-crop boxes by torchvision's rule, all ten tries at once: the first that fits, else the centre
    crop.

    uniforms: [B, RRC_DRAWS]. scale: range of the area's share; ratio: range of width / height, log-uniform.
    """
    area_u, ratio_u, top_u, left_u = uniforms.double().view(-1, 4, RRC_TRIES).unbind(1)
    area = height * width * between(area_u, *scale)
    aspect = between(ratio_u, math.log(ratio[0]), math.log(ratio[1])).exp()
    w = (area * aspect).sqrt().round().to(torch.int64)
    h = (area / aspect).sqrt().round().to(torch.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    top, left = integers(top_u, (height - h + 1).clamp(min=1)), integers(left_u, (width - w + 1).clamp(min=1))
    first = fits.to(torch.int64).argmax(dim=1, keepdim=True)  # argmax gives the first of equal maxima
    found = fits.any(dim=1)
    fallback_h, fallback_w = _fallback_size(height, width, ratio)
    fallback = ((height - fallback_h) // 2, (width - fallback_w) // 2, fallback_h, fallback_w)
    tries = (top, left, h, w)
    return Boxes(*(torch.where(found, t.gather(1, first).squeeze(1), f) for t, f in zip(tries, fallback, strict=True)))


def _fallback_size(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int]:
    """Height and width of the largest box whose ratio is in range."""
    return min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))


def resized_crop(images: Tensor, boxes: Boxes, flip_B: Tensor, size: int) -> Tensor:
    """Crop each box of float images and resize it to size x size (bilinear, antialiased as torchvision does), mirror
    where flip.

    Up to the image's own size a box is never made smaller, so antialiasing has no effect and one grid_sample does it,
    cheaper than two matrix products; a smaller output takes the antialiasing weights.
    """
    height, width = images.shape[-2:]
    if size >= max(height, width):
        y = _source_positions(boxes.top, boxes.height, size, height)
        x = _source_positions(boxes.left, boxes.width, size, width)
        x = torch.where(flip_B[:, None], x.flip(1), x)
        grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], dim=-1)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    rows = _resize_weights(boxes.top, boxes.height, size, height)
    columns = _resize_weights(boxes.left, boxes.width, size, width)
    columns = torch.where(flip_B[:, None, None], columns.flip(1), columns)
    with torch.autocast(images.device.type, enabled=False):
        return rows[:, None] @ images @ columns[:, None].transpose(-1, -2)


def _source_positions(start_B: Tensor, length_B: Tensor, n_out: int, n_in: int) -> Tensor:
    """Grid coordinates [B, n_out] in grid_sample's -1..1, kept inside the box as torchvision's crop-then-resize
    does."""
    start, length = start_B.float()[:, None], length_B.float()[:, None]
    place = (torch.arange(n_out, device=start_B.device) + 0.5) * (length / n_out) - 0.5
    place = start + torch.minimum(place.clamp(min=0), length - 1)
    return (place + 0.5) * (2 / n_in) - 1


def _resize_weights(start_B: Tensor, length_B: Tensor, n_out: int, n_in: int) -> Tensor:
    """[B, n_out, n_in]: triangle filter over the box, widened when shrinking, normalised (Pillow's and torch's
    antialias)."""
    start, length = start_B.float()[:, None, None], length_B.float()[:, None, None]
    ratio = length / n_out
    support = ratio.clamp(min=1)
    center = start + (torch.arange(n_out, device=start_B.device)[:, None] + 0.5) * ratio
    pixel = torch.arange(n_in, device=start_B.device) + 0.5
    weights = (1 - (pixel - center).abs() / support).clamp(min=0)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(-1, keepdim=True)
