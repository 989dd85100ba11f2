"""View recipes: how one uint8 picture becomes 1 or 3 float views, for a whole batch on its device.

A view is a module without parameters: `draws` is how many uniform numbers a sample needs, `view(images_u8, uniforms)`
gives float32 pictures, and nothing else goes in, so a view is a pure function of the picture and its numbers (see
rng.py). Constants are buffers: building them from lists on the way would synchronise with the device.

Why own code: torchvision v2 has the right meaning but one set of parameters per call, so a batch is a Python loop over
pictures; kornia is batched but draws the order of the jitter once a batch, and AutoAugment's sub-policy too. Processor
time for 256 pictures of 32 x 32 on one core of a busy machine (benchmarks/small_views.py, rows in results/data.jsonl):
three views here 80 ms, torchvision 695; view 2 here 36, torchvision 344, kornia 75.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltfast.data import augment_color as color
from ltfast.data import augment_geometry as geometry
from ltfast.data.augment_auto import AutoAugmentCifar

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
        self.mean, self.std = mean, std
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
            shear=zero,
            center_x=zero,
            center_y=zero,
        )
        return self.normalize(geometry.warp(to_unit(images_u8), inverse, "bilinear"))


class CropFlip(View):
    """Random crop after padding with black, and flip: the least that CIFAR's recipes do. For grey pictures as well.

    size: side of the pictures; padding is CIFAR's 4 of 32 pixels in proportion, at least 1.
    """

    draws = 3

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int = 32) -> None:
        super().__init__(mean, std)
        self.padding = max(size // 8, 1)

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Crop corner (top, left, in pixels of the padded picture) and mirror from [B, draws] uniform numbers: each [B]."""
        top, left = (geometry.integers(uniforms[:, i], 2 * self.padding + 1) for i in (0, 1))
        return top, left, uniforms[:, 2] < 0.5

    def forward(self, images_u8: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """See View.forward."""
        assert uniforms is not None
        return self.normalize(to_unit(geometry.crop_flip(images_u8, *self.draw(uniforms), self.padding)))


class StrongDraw(NamedTuple):
    """What CifarStrong drew for B samples: crop corner, mirror, cutout centre (pixels), numbers for the policy
    [B, 5]."""

    top: Tensor
    left: Tensor
    flip: Tensor
    hole_y: Tensor
    hole_x: Tensor
    policy: Tensor


class CifarStrong(View):
    """View 1 of the CIFAR recipe: random crop with padding, flip, AutoAugment-CIFAR, cutout (black), normalise.

    size: side of the pictures; padding and cutout are CIFAR's 4 and 16 of 32 pixels in proportion.
    """

    draws = 5 + AutoAugmentCifar.draws

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], size: int = 32) -> None:
        super().__init__(mean, std)
        self.padding, self.hole = size // 8, size // 2
        self.auto = AutoAugmentCifar()

    def draw(self, uniforms: Tensor, height: int, width: int) -> StrongDraw:
        """Parameters from [B, draws] uniform numbers for pictures of this size."""
        top, left = (geometry.integers(uniforms[:, i], 2 * self.padding + 1) for i in (0, 1))
        hole_y, hole_x = geometry.integers(uniforms[:, 3], height), geometry.integers(uniforms[:, 4], width)
        return StrongDraw(top, left, uniforms[:, 2] < 0.5, hole_y, hole_x, uniforms[:, 5:])

    def forward(self, images_u8: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """See View.forward."""
        assert uniforms is not None
        drawn = self.draw(uniforms, *images_u8.shape[-2:])
        images = geometry.crop_flip(images_u8, drawn.top, drawn.left, drawn.flip, self.padding).to(torch.float32)
        images = self.auto(images, drawn.policy)
        return self.normalize(geometry.cutout(images, drawn.hole_y, drawn.hole_x, self.hole) * (1 / 255))


class ContrastiveDraw(NamedTuple):
    """What Contrastive drew: crop boxes, mirror, jitter factors and order [B, 4], jitter on, gray."""

    boxes: geometry.Boxes
    flip: Tensor
    factors: Tensor
    order: Tensor
    jittered: Tensor
    gray: Tensor


class Contrastive(View):
    """Views 2 and 3: random resized crop, flip, colour jitter, grayscale, normalise.

    size: side of the result.
    """

    area = (0.2, 1.0)  # the crop's share of the picture
    ratio = (3 / 4, 4 / 3)
    strength = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
    jittered, gray = 0.8, 0.2  # shares of the pictures
    draws = geometry.RRC_DRAWS + 11
    low: Tensor
    span: Tensor

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__(mean, std)
        self.size = size
        low = [1 - s for s in self.strength[:3]] + [-self.strength[3]]
        high = [1 + s for s in self.strength[:3]] + [self.strength[3]]
        self.register_buffer("low", torch.tensor(low), persistent=False)
        self.register_buffer("span", torch.tensor(high) - torch.tensor(low), persistent=False)

    def draw(self, uniforms: Tensor, height: int, width: int) -> ContrastiveDraw:
        """Parameters from [B, draws] uniform numbers for pictures of this size."""
        box, rest = uniforms.split([geometry.RRC_DRAWS, 11], dim=1)
        return ContrastiveDraw(
            boxes=geometry.random_boxes(box, height, width, self.area, self.ratio),
            flip=rest[:, 0] < 0.5,
            factors=self.low + rest[:, 1:5] * self.span,
            order=rest[:, 5:9].argsort(dim=1),
            jittered=rest[:, 9] < self.jittered,
            gray=rest[:, 10] < self.gray,
        )

    def forward(self, images_u8: Tensor, uniforms: Tensor | None = None) -> Tensor:
        """See View.forward."""
        assert uniforms is not None
        drawn = self.draw(uniforms, *images_u8.shape[-2:])
        images = geometry.resized_crop(to_unit(images_u8), drawn.boxes, drawn.flip, self.size)
        images = color.jitter(images, drawn.order, drawn.factors, drawn.jittered)
        return self.normalize(color.apply_where(drawn.gray, color.to_gray, images))


RECIPES = ("plain", "digits", "crop", "cifar")


def recipe(
    name: str, num_views: int, *, mean: tuple[float, ...], std: tuple[float, ...], size: int = 32
) -> tuple[View, ...]:
    """The views of a named recipe, one of RECIPES; num_views 1 (classifier only) or 3 (BCL). ValueError otherwise.

    size: side of the pictures that the "crop" and "cifar" recipes make.
    """
    if num_views not in (1, 3):
        raise ValueError(f"num_views must be 1 or 3, got {num_views}")
    views: tuple[View, ...]
    if name == "plain":
        views = (Plain(mean, std),) * 3
    elif name == "digits":
        views = (DigitsView(10.0, 0.1, 0.75, mean, std), *(DigitsView(15.0, 0.15, 1.0, mean, std),) * 2)
    elif name == "crop":
        views = (CropFlip(mean, std, size),) * 3
    elif name == "cifar":
        views = (CifarStrong(mean, std, size), *(Contrastive(size, mean, std),) * 2)
    else:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    return views[:num_views]
