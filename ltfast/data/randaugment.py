"""timm's RandAugment ('rand-n2-m10-mstd0.5') on batches of pictures, on any device, and its PIL twin.

Each of n layers draws one of 15 operations (with replacement) and applies it with probability 1/2 at magnitude m +
N(0, std) clipped to [0, 10]. m = 10 is full strength: rotate 30 degrees, shear .3, translate .45 of the width,
enhancement factor 1.9, posterize to 4 bits (3 when the drawn magnitude is below 10), solarize at 256 (218 and up),
solarize-add 110; geometric operations go left or right with equal odds, bilinear or bicubic with equal odds, and
fill with the ImageNet mean colour. torchvision's and DALI's RandAugment(2, 10) have 31 bins, hence a third of this
strength, 14 operations and no skipping: another augmentation under the same numbers.

Pictures here are float32 [n, 3, H, W] of whole levels 0..255. Batched bicubic has torch's constant -.75 where PIL's
transform has -1; everything else differs from PIL by rounding only (tests/data/test_randaugment.py states each
figure).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltfast.data.augment_color import equalize, posterize, solarize
from ltfast.data.color import adjust_brightness, adjust_contrast, adjust_saturation, on_subset

if TYPE_CHECKING:
    from PIL.Image import Image

FILL = (124, 116, 104)  # round(255 * ImageNet mean)
MAX_LEVEL = 10.0
SMOOTH_CENTRE, SMOOTH_SUM = 5.0, 13.0  # PIL's SMOOTH filter: 1 everywhere, 5 in the middle
DRAWS_PER_LAYER = 6


@dataclass(frozen=True, slots=True)
class RandAugment:
    """layers: operations drawn one after another; magnitude on timm's 0..10 scale; noise: its standard deviation."""

    layers: int = 2
    magnitude: float = 10.0
    noise: float = 0.5
    probability: float = 0.5


class Drawn(NamedTuple):
    """What was drawn for n pictures and L layers, host tensors [n, L]: operation number, applied, level 0..10, sign,
    bicubic.
    """

    operation: Tensor
    applied: Tensor
    level: Tensor
    sign: Tensor
    bicubic: Tensor


def draw(recipe: RandAugment, uniform: Tensor) -> Drawn:
    """Turns uniforms [n, layers * DRAWS_PER_LAYER] in [0, 1) into operations and levels."""
    u = uniform.view(-1, recipe.layers, DRAWS_PER_LAYER)
    normal = torch.sqrt(-2 * torch.log1p(-u[..., 2])) * torch.cos(2 * torch.pi * u[..., 3])
    return Drawn(
        (u[..., 0] * len(OPERATIONS)).long(),
        u[..., 1] < recipe.probability,
        (recipe.magnitude + recipe.noise * normal).clamp(0, MAX_LEVEL),
        torch.where(u[..., 4] < 0.5, 1.0, -1.0),
        u[..., 5] < 0.5,
    )


def auto_contrast(x: Tensor, _: Tensor) -> Tensor:
    """Stretches each channel to 0..255; a flat channel stays."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    scale = torch.where(high > low, 255 / (high - low).clamp(min=1), 1.0)
    # The offset is PIL's -low * scale; 1e-3 stands for its float64, which does not fall below whole levels.
    return (x * scale - torch.where(high > low, low * scale, 0.0) + 1e-3).floor_().clamp_(0, 255)


def invert(x: Tensor, _: Tensor) -> Tensor:
    """255 - x."""
    return 255 - x


def solarize_add(x: Tensor, amount: Tensor) -> Tensor:
    """Adds to levels below 128."""
    return torch.where(x < 128, (x + amount[:, None, None, None]).clamp(max=255), x)


def _flat(adjust: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def enhanced(x: Tensor, factor: Tensor) -> Tensor:
        return adjust(x.clone().flatten(2), factor).floor_().view_as(x)

    return enhanced


def sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Away from (factor > 1) PIL's 3 x 3 smoothing; the border pixels stay."""
    inner = x[:, :, 1:-1, 1:-1]
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]  # cheaper than avg_pool2d on a CPU
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = ((total + (SMOOTH_CENTRE - 1) * inner) / SMOOTH_SUM).add_(0.5).floor_()
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = (smooth + factor[:, None, None, None] * (inner - smooth)).floor_().clamp_(0, 255)
    return out


def _affine(x: Tensor, matrix: Tensor, mode: str) -> Tensor:
    """Samples the input at matrix [n, 2, 3] @ (x, y, 1) of each output pixel centre (pixels, y down); FILL outside."""
    height, width = x.shape[-2:]
    size = torch.tensor([width, height], dtype=x.dtype).to(x.device, non_blocking=True)
    ys = (torch.arange(height, device=x.device) + 0.5).view(1, height, 1, 1)
    xs = (torch.arange(width, device=x.device) + 0.5).view(1, 1, width, 1)
    m = matrix[:, None, None]
    source = m[..., 0] * xs + m[..., 1] * ys + m[..., 2]  # not a matmul, which TF32 would round to a tenth of a pixel
    grid = source * (2 / size) - 1
    out = F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False).floor_().clamp_(0, 255)
    inside = ((source >= 0) & (source < size)).all(dim=-1)[:, None]
    fill = torch.tensor(FILL, dtype=x.dtype).to(x.device, non_blocking=True).view(1, 3, 1, 1)
    return torch.where(inside, out, fill)


def _matrices(name: str, arg: Tensor, width: int, height: int) -> Tensor:
    one, zero = torch.ones_like(arg), torch.zeros_like(arg)
    if name == "Rotate":
        angle = torch.deg2rad(arg)
        cos, sin = torch.cos(angle), torch.sin(angle)
        x, y = width / 2, height / 2
        rows = (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
    else:
        rows = {
            "ShearX": (one, arg, zero, zero, one, zero),
            "ShearY": (one, zero, zero, arg, one, zero),
            "TranslateX": (one, zero, arg * width, zero, one, zero),
            "TranslateY": (one, zero, zero, zero, one, arg * height),
        }[name]
    return torch.stack(rows, dim=1).view(-1, 2, 3)


def warp(x: Tensor, arg: Tensor, name: str, bicubic: bool = False) -> Tensor:
    """Rotate (degrees, anticlockwise), ShearX, ShearY (about the top left corner), TranslateX, TranslateY (share of
    the side).
    """
    return _affine(x, _matrices(name, arg, x.shape[3], x.shape[2]), "bicubic" if bicubic else "bilinear")


def _plain(_: Tensor) -> float:
    return 0.0


# Name -> level 0..10 to the operation's argument (before the sign, for the geometric ones); the order is the drawn
# number.
OPERATIONS: dict[str, Callable[[Tensor], Tensor | float]] = {
    "AutoContrast": _plain,
    "Equalize": _plain,
    "Invert": _plain,
    "Rotate": lambda level: level * 3.0,
    "Posterize": lambda level: (level * 0.4).floor(),
    "Solarize": lambda level: (level * 25.6).floor(),
    "SolarizeAdd": lambda level: (level * 11.0).floor(),
    "Color": lambda level: level * 0.18 + 0.1,
    "Contrast": lambda level: level * 0.18 + 0.1,
    "Brightness": lambda level: level * 0.18 + 0.1,
    "Sharpness": lambda level: level * 0.18 + 0.1,
    "ShearX": lambda level: level * 0.03,
    "ShearY": lambda level: level * 0.03,
    "TranslateX": lambda level: level * 0.045,
    "TranslateY": lambda level: level * 0.045,
}
GEOMETRIC = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"})
POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "AutoContrast": auto_contrast,
    "Equalize": lambda x, _: equalize(x),
    "Invert": invert,
    "Posterize": posterize,
    "Solarize": solarize,
    "SolarizeAdd": solarize_add,
    "Color": _flat(adjust_saturation),
    "Contrast": _flat(adjust_contrast),
    "Brightness": _flat(adjust_brightness),
    "Sharpness": sharpness,
}


def apply_operation(x: Tensor, name: str, argument: Tensor, bicubic: bool = False) -> Tensor:
    """One operation on x [n, 3, H, W] (whole levels) with argument [n] (signed for the geometric ones); x stays."""
    return warp(x, argument, name, bicubic) if name in GEOMETRIC else POINTWISE[name](x, argument)


def apply_rand_augment(x: Tensor, drawn: Drawn) -> Tensor:
    """The drawn operations on x [n, 3, H, W] (whole levels), in place; on the CPU one picture at a time."""
    if x.device.type != "cpu":
        return apply_rand_augment_grouped(x, drawn)
    names = tuple(OPERATIONS)
    rows = zip(drawn.operation.tolist(), drawn.applied.tolist(), drawn.bicubic.tolist(), strict=True)
    for i, row in enumerate(rows):
        for layer, (number, applied, bicubic) in enumerate(zip(*row, strict=True)):
            if applied:
                name, one = names[number], slice(i, i + 1)
                x[one] = apply_operation(x[one], name, _argument(drawn, name, layer)[one], bicubic)
    return x


def apply_rand_augment_grouped(x: Tensor, drawn: Drawn) -> Tensor:
    """The same; pictures with the same operation in a layer go together, nothing waits for the device."""
    for layer in range(drawn.operation.shape[1]):
        for number, name in enumerate(OPERATIONS):
            chosen = drawn.applied[:, layer] & (drawn.operation[:, layer] == number)
            if not bool(chosen.any()):  # host tensors: no device is asked
                continue
            argument = _argument(drawn, name, layer)
            for bicubic in (False, True) if name in GEOMETRIC else (None,):
                part = chosen if bicubic is None else chosen & (drawn.bicubic[:, layer] == bicubic)
                on_subset(x, part, partial(_change, name=name, bicubic=bool(bicubic)), argument)
    return x


def _change(x: Tensor, argument: Tensor, name: str, bicubic: bool) -> Tensor:
    return apply_operation(x, name, argument, bicubic)


def _argument(drawn: Drawn, name: str, layer: int) -> Tensor:
    argument = torch.zeros_like(drawn.level[:, layer]) + OPERATIONS[name](drawn.level[:, layer])
    return argument * drawn.sign[:, layer] if name in GEOMETRIC else argument


def apply_rand_augment_pil(image: Image, drawn: Drawn, index: int) -> Image:
    """The same for picture `index` of the draw with PIL alone: the readable twin and the definition."""
    names = tuple(OPERATIONS)
    for layer in range(drawn.operation.shape[1]):
        if bool(drawn.applied[index, layer]):
            name = names[int(drawn.operation[index, layer])]
            argument = float(OPERATIONS[name](drawn.level[index, layer]))
            image = pil_operation(
                image, name, argument, float(drawn.sign[index, layer]), bool(drawn.bicubic[index, layer])
            )
    return image


def pil_operation(image: Image, name: str, argument: float, sign: float = 1.0, bicubic: bool = False) -> Image:
    """One operation by PIL; `argument` from OPERATIONS, `sign` used by the geometric ones."""
    from PIL import Image as pil
    from PIL import ImageEnhance, ImageOps

    if name in GEOMETRIC:
        resample = pil.Resampling.BICUBIC if bicubic else pil.Resampling.BILINEAR
        amount = argument * sign
        if name == "Rotate":
            return image.rotate(amount, resample=resample, fillcolor=FILL)
        data = {
            "ShearX": (1, amount, 0, 0, 1, 0),
            "ShearY": (1, 0, 0, amount, 1, 0),
            "TranslateX": (1, 0, amount * image.width, 0, 1, 0),
            "TranslateY": (1, 0, 0, 0, 1, amount * image.height),
        }[name]
        return image.transform(image.size, pil.Transform.AFFINE, data, resample=resample, fillcolor=FILL)
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, name)(image).enhance(argument)
    if name == "SolarizeAdd":
        return image.point([min(255, i + int(argument)) if i < 128 else i for i in range(256)] * 3)
    if name == "Posterize":
        return ImageOps.posterize(image, int(argument))
    if name == "Solarize":
        return ImageOps.solarize(image, int(argument))
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    return ImageOps.equalize(image) if name == "Equalize" else ImageOps.invert(image)
