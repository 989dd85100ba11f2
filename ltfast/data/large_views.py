"""View recipes of large pictures, and what is drawn for each view: the one definition that both loaders follow.

All draws are host tensors and pure functions of (seed, epoch, position in the epoch, view): the same for every
loader, worker count, batch composition and world size, and after a resume. Recipes are those of BCL's code
(FlamieZhu/Balanced-Contrastive-Learning, main.py): no blur anywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ltfast.data.color import HUE, Jitter
from ltfast.data.randaugment import DRAWS_PER_LAYER, Drawn, RandAugment, draw
from ltfast.data.rng import epoch_key, uniforms
from ltfast.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ASPECT = (3 / 4, 4 / 3)
CROP_TRIES = 10  # torchvision's RandomResizedCrop; then the largest centred window of an allowed aspect
EVALUATION_SCALE = 256 / 224  # the short side before the centre crop, as a multiple of the crop
_PLACE, _FLIP, _APPLY, _FACTORS, _ORDER, _GRAY, _AUGMENT = 20, 22, 23, 24, 28, 32, 33


@dataclass(frozen=True, slots=True)
class ViewRecipe:
    """RandomResizedCrop(area share `scale`), flip with probability 1/2, then what is set.

    jitter: brightness, contrast, saturation, hue as in torchvision's ColorJitter, applied with probability jitter_p;
    gray_p: probability of RandomGrayscale; rand_augment: None or timm's RandAugment.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    jitter: tuple[float, float, float, float] | None = None
    jitter_p: float = 1.0
    gray_p: float = 0.0
    rand_augment: RandAugment | None = None


_FIRST = ViewRecipe(jitter=(0.4, 0.4, 0.4, 0.0), rand_augment=RandAugment())
_CONTRASTIVE = ViewRecipe(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray_p=0.2)
RECIPES: dict[str, tuple[ViewRecipe, ...]] = {
    "imagenet": (_FIRST, _CONTRASTIVE, _CONTRASTIVE),
    "crop": (ViewRecipe(), ViewRecipe(), ViewRecipe()),
}


def view_recipes(views: str | tuple[ViewRecipe, ...], num_views: int) -> tuple[ViewRecipe, ...]:
    """The first num_views (1 or 3) of a recipe by name, or the given ones. UserError for an unknown name."""
    if not isinstance(views, str):
        return tuple(views)
    if views not in RECIPES:
        raise UserError(f"--views {views!r}: choose one of {', '.join(RECIPES)}")
    if num_views not in (1, 3):
        raise ValueError(f"num_views must be 1 or 3, got {num_views}")
    return RECIPES[views][:num_views]


class Crop(NamedTuple):
    """RandomResizedCrop drawn for n pictures of unknown size, float64.

    across, down: [n, CROP_TRIES], candidate width and height as multiples of sqrt(picture area); place: [n, 2],
    vertical and horizontal position in [0, 1).
    """

    across: Tensor
    down: Tensor
    place: Tensor


class ViewDraw(NamedTuple):
    """Everything random about one view of n pictures, on the host; jitter and augment are None where the recipe has
    none.
    """

    crop: Crop
    flip: Tensor
    jitter: Jitter | None
    augment: Drawn | None


def draw_view(recipe: ViewRecipe, key: Tensor, position: Tensor, view: int) -> ViewDraw:
    """Draws view number `view` of the pictures at `position` (int64 [n], place in the epoch); key from
    rng.epoch_key.
    """
    layers = recipe.rand_augment.layers if recipe.rand_augment is not None else 0
    u = uniforms(key, position, view, _AUGMENT + layers * DRAWS_PER_LAYER)
    area = recipe.scale[0] + u[:, :CROP_TRIES].double() * (recipe.scale[1] - recipe.scale[0])
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = torch.exp(low + u[:, CROP_TRIES : 2 * CROP_TRIES].double() * (high - low))
    crop = Crop(torch.sqrt(area * aspect), torch.sqrt(area / aspect), u[:, _PLACE:_FLIP].double())
    jitter = None
    if recipe.jitter is not None or recipe.gray_p > 0:
        strength = torch.tensor(recipe.jitter or (0.0, 0.0, 0.0, 0.0))
        centre = torch.ones(4)
        centre[HUE] = 0.0
        floor = torch.zeros(4)
        floor[HUE] = -0.5
        lowest = torch.maximum(centre - strength, floor)
        factors = lowest + u[:, _FACTORS:_ORDER] * (centre + strength - lowest)
        jitter = Jitter(
            factors,
            u[:, _ORDER:_GRAY].argsort(dim=1),
            (u[:, _APPLY] < recipe.jitter_p) & (recipe.jitter is not None),
            u[:, _GRAY] < recipe.gray_p,
        )
    augment = None if recipe.rand_augment is None else draw(recipe.rand_augment, u[:, _AUGMENT:])
    return ViewDraw(crop, u[:, _FLIP] < 0.5, jitter, augment)


def draw_views(recipes: tuple[ViewRecipe, ...], seed: int, epoch: int, position: Tensor) -> tuple[ViewDraw, ...]:
    """All views of the pictures at `position` (int64 [n], place in the epoch)."""
    key = epoch_key(seed, epoch)
    return tuple(draw_view(recipe, key, position, view) for view, recipe in enumerate(recipes))


def crop_windows(crop: Crop, sizes: Tensor) -> Tensor:
    """int64 [n, 4]: top, left, height, width for pictures of `sizes` [n, 2] (height, width).

    torchvision's rule: the first of CROP_TRIES candidates that fits, else the largest centred window with an aspect
    in ASPECT. Rounding is floor(x + 1/2) where torchvision rounds halves to even.
    """
    height, width = sizes[:, :1].double(), sizes[:, 1:].double()
    root = torch.sqrt(height * width)
    w, h = torch.floor(crop.across * root + 0.5), torch.floor(crop.down * root + 0.5)
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1, keepdim=True)
    w = torch.where(found, w.gather(1, first), torch.minimum(width, torch.floor(height * ASPECT[1] + 0.5)))
    h = torch.where(found, h.gather(1, first), torch.minimum(height, torch.floor(width / ASPECT[0] + 0.5)))
    room = torch.cat([height - h, width - w], dim=1)
    corner = torch.where(found, torch.floor(crop.place * (room + 1)), torch.floor(room / 2))
    return torch.cat([corner, h, w], dim=1).long()


def evaluation_size(image_size: int) -> int:
    """The short side before the centre crop: 256 for 224, in proportion for other sizes."""
    return round(image_size * EVALUATION_SCALE)


def evaluation_window(height: int, width: int, image_size: int) -> tuple[int, int, int, int]:
    """(resized height, resized width, top, left) of torchvision's Resize(evaluation_size) and
    CenterCrop(image_size).
    """
    short = evaluation_size(image_size)
    if height <= width:
        tall, wide = short, int(short * width / height)
    else:
        tall, wide = int(short * height / width), short
    return tall, wide, round((tall - image_size) / 2), round((wide - image_size) / 2)
