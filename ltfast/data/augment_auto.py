"""AutoAugment's CIFAR-10 policy (Cubuk et al. 2019) for a whole batch, each sample with its own sub-policy.

The 25 sub-policies, probabilities, magnitudes, signs and the meaning of each operation are torchvision's
(AutoAugmentPolicy.CIFAR10, ten magnitude bins, nearest neighbour, black fill); images are whole numbers 0..255 in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ltfast.data import augment_color as color
from ltfast.data.augment_geometry import integers, inverse_affine, warp

# Signed operations first, geometric ones first of all: the code compares with the last of each kind.
OPERATIONS = (
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Contrast",
    "Color",
    "Sharpness",
    "Solarize",
    "Posterize",
    "Invert",
    "AutoContrast",
    "Equalize",
    "Identity",
)
CODE = {name: code for code, name in enumerate(OPERATIONS)}

# Two operations per row: name, probability in tenths, magnitude bin.
_POLICY = """
Invert 1 0 Contrast 2 6 | Rotate 7 2 TranslateX 3 9 | Sharpness 8 1 Sharpness 9 3 | ShearY 5 8 TranslateY 7 9
AutoContrast 5 0 Equalize 9 0 | ShearY 2 7 Posterize 3 7 | Color 4 3 Brightness 6 7 | Sharpness 3 9 Brightness 7 9
Equalize 6 0 Equalize 5 0 | Contrast 6 7 Sharpness 6 5 | Color 7 7 TranslateX 5 8 | Equalize 3 0 AutoContrast 4 0
TranslateY 4 3 Sharpness 2 6 | Brightness 9 6 Color 2 8 | Solarize 5 2 Invert 0 0 | Equalize 2 0 AutoContrast 6 0
Equalize 2 0 Equalize 6 0 | Color 9 9 Equalize 6 0 | AutoContrast 8 0 Solarize 2 8 | Brightness 1 3 Color 7 0
Solarize 4 5 AutoContrast 9 0 | TranslateY 9 9 TranslateY 7 9 | AutoContrast 9 0 Solarize 8 3 | Equalize 8 0 Invert 1 0
TranslateY 7 9 AutoContrast 9 0
"""

Policy = list[tuple[tuple[str, float, int], tuple[str, float, int]]]


def cifar_policy() -> Policy:
    """The 25 sub-policies: two of (operation, probability, magnitude bin) each."""
    words = _POLICY.replace("|", " ").split()
    flat = [(words[i], int(words[i + 1]) / 10, int(words[i + 2])) for i in range(0, len(words), 3)]
    return list(zip(flat[::2], flat[1::2], strict=True))


def magnitude(operation: str, level: int) -> float:
    """Strength of a magnitude bin 0..9: shear tangent, share of the side, degrees, change of factor, threshold or
    bits."""
    if operation == "ShearY":
        return 0.3 * level / 9
    if operation in ("TranslateX", "TranslateY"):
        return 150 / 331 * level / 9
    if operation == "Rotate":
        return 30 * level / 9
    if operation == "Solarize":
        return 255 * (1 - level / 9)
    if operation == "Posterize":
        return 8 - round(level / (9 / 4))
    return 0.9 * level / 9 if operation in ("Brightness", "Contrast", "Color", "Sharpness") else 0.0


class AutoAugmentCifar(nn.Module):
    """Applies the policy to [B, 3, H, W] whole numbers 0..255 in float32; may write into its input."""

    draws = 5
    code: Tensor
    probability: Tensor
    strength: Tensor

    def __init__(self) -> None:
        super().__init__()
        policy = cifar_policy()
        code = [[CODE[name] for name, _, _ in pair] for pair in policy]
        strength = [[magnitude(name, level) for name, _, level in pair] for pair in policy]
        self.register_buffer("code", torch.tensor(code), persistent=False)
        probability = [[p for _, p, _ in pair] for pair in policy]
        self.register_buffer("probability", torch.tensor(probability), persistent=False)
        self.register_buffer("strength", torch.tensor(strength), persistent=False)

    def draw(self, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Operation codes [B, 2] and signed magnitudes [B, 2] from [B, 5] uniform numbers.

        The five: sub-policy, two gates, two signs.
        """
        row = integers(uniforms[:, 0], len(self.code))
        applied = uniforms[:, 1:3] < self.probability[row]
        code = torch.where(applied, self.code[row], CODE["Identity"])
        signed = (uniforms[:, 3:5] < 0.5) & (code <= CODE["Sharpness"])
        strength = self.strength[row]
        return code, torch.where(signed, -strength, strength)

    def forward(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Both operations of the sub-policy that each sample drew."""
        code, strength = self.draw(uniforms)
        for place in range(2):
            images = apply_operations(images, code[:, place], strength[:, place])
        return images


def apply_operations(images: Tensor, code_B: Tensor, strength_B: Tensor) -> Tensor:
    """One operation a sample, by number in OPERATIONS; strength as `magnitude` says. May write into images."""

    def on(names: tuple[str, ...]) -> Tensor:
        low, high = CODE[names[0]], CODE[names[-1]]
        return (code_B >= low) & (code_B <= high)

    images = color.apply_where(on(("ShearY", "Rotate")), _warp, images, code_B, strength_B)
    images = color.apply_where(on(("Brightness", "Color")), _blend, images, code_B, strength_B)
    images = color.apply_where(on(("Sharpness",)), color.sharpen, images, 1 + strength_B)
    images = color.apply_where(on(("Solarize",)), color.solarize, images, strength_B)
    images = color.apply_where(on(("Posterize",)), color.posterize, images, strength_B)
    images = color.apply_where(on(("Invert",)), lambda part: 255 - part, images)
    images = color.apply_where(on(("AutoContrast",)), color.autocontrast, images)
    return color.apply_where(on(("Equalize",)), color.equalize, images)


def _blend(images: Tensor, code_B: Tensor, strength_B: Tensor) -> Tensor:
    return color.color_blend(images, code_B - CODE["Brightness"], 1 + strength_B, 255)


def _warp(images: Tensor, code_B: Tensor, strength_B: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    amount = strength_B.double()
    shear = torch.where(code_B == CODE["ShearY"], amount, 0.0)
    inverse = inverse_affine(
        torch.where(code_B == CODE["Rotate"], -amount, 0.0),
        translate_x=torch.where(code_B == CODE["TranslateX"], (amount * width).trunc(), 0.0),
        translate_y=torch.where(code_B == CODE["TranslateY"], (amount * height).trunc(), 0.0),
        scale=torch.ones_like(shear),
        shear=shear,
        # A shear keeps the left upper corner in place (torchvision's center=[0, 0]); the others do not use the centre.
        center_x=torch.where(shear != 0, -width / 2, 0.0),
        center_y=torch.where(shear != 0, -height / 2, 0.0),
    )
    return warp(images, inverse)
