"""View recipes: how one uint8 picture becomes 1 or 3 float views, for a whole batch on its device.

A view is a module without parameters: `draws` is how many uniform numbers a sample needs, `view(images_u8, uniforms)`
gives float32 pictures, and nothing else goes in, so a view is a pure function of the picture and its numbers (see
rng.py). Constants are buffers: building them from lists on the way would synchronise with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltfast.data import augment_geometry as geometry

DIGITS_MEAN, DIGITS_STD = (0.3053,), (0.3760,)
"""Of all 1,797 digits, 0..1 scale."""


def to_unit(images_u8: Tensor) -> Tensor:
    """uint8 0..255 -> float32 0..1."""
    return images_u8.to(torch.float32) * (1 / 255)


class View(nn.Module):
    """Base: normalisation by channel. mean, std: per channel, 0..1 scale."""

    draws = 0
    scale: Tensor
    offset: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        scale = 1 / torch.tensor(std, dtype=torch.float64).view(-1, 1, 1)
        offset = -torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1) * scale
        self.register_buffer("scale", scale.float(), persistent=False)
        self.register_buffer("offset", offset.float(), persistent=False)

    def forward(self, images_u8: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """[B, ch, H, W] uint8 and [B, draws] float32 in [0, 1) -> [B, ch, h, w] float32, normalised."""
        raise NotImplementedError

    def normalize(self, images: Tensor) -> Tensor:
        """(x - mean) / std; images on the 0..1 scale."""
        return images * self.scale + self.offset


class Plain(View):
    """The picture itself, normalised."""

    def forward(self, images_u8: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """See View.forward."""
        return self.normalize(to_unit(images_u8))


class DigitsView(View):
    """Small rotation, zoom and shift for 8 x 8 digits (bilinear, background 0): what leaves a digit the same digit.

    degrees, zoom and shift (pixels) are the ends of uniform ranges around no change.
    """

    draws = 4

    def __init__(
        self, degrees: float, zoom: float, shift: float, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__(mean, std)
        self.degrees, self.zoom, self.shift = degrees, zoom, shift

    def forward(self, images_u8: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """See View.forward."""
        assert uniforms is not None
        angle, zoom, right, down = (2 * uniforms.double() - 1).unbind(1)
        zero = torch.zeros_like(angle)
        inverse = geometry.inverse_affine(
            angle * self.degrees,
            translate_x=right * self.shift,
            translate_y=down * self.shift,
            scale=1 + zoom * self.zoom,
            shear_x=zero,
            shear_y=zero,
            center_x=zero,
            center_y=zero,
        )
        return self.normalize(geometry.warp(to_unit(images_u8), inverse, "bilinear"))


RECIPES = ("plain", "digits")


def recipe(name: str, num_views: int, *, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[View, ...]:
    """The views of a named recipe, one of RECIPES; num_views 1 (classifier only) or 3 (BCL). ValueError otherwise."""
    if num_views not in (1, 3):
        raise ValueError(f"num_views must be 1 or 3, got {num_views}")
    views: tuple[View, ...]
    if name == "plain":
        views = (Plain(mean, std),) * 3
    elif name == "digits":
        views = (DigitsView(10.0, 0.1, 0.75, mean, std), *(DigitsView(15.0, 0.15, 1.0, mean, std),) * 2)
    else:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    return views[:num_views]
