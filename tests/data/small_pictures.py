"""Pictures for the augmentation tests: smooth shapes plus noise, and the odd ones that break histogram and hue code."""

import torch
from torch import Tensor


def make_pictures(n: int, size: int = 32, seed: int = 0) -> Tensor:
    """[n, 3, size, size] uint8; number 0 is black, 1 is one colour, 2 is gray noise, 3 uses few levels."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    pictures = ((smooth + 0.1 * torch.randn(n, 3, size, size, generator=rng)) * 255).clamp(0, 255).to(torch.uint8)
    pictures[0] = 0
    pictures[1] = torch.tensor([200, 40, 90], dtype=torch.uint8)[:, None, None]
    pictures[2] = pictures[2, :1]
    pictures[3] = pictures[3] // 64 * 64
    return pictures
