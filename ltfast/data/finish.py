"""From cropped uint8 pictures to the views a model sees: colour, RandAugment, one float32 normalisation.

The work that is not decode, crop and flip runs here in torch, on the device of the pictures: on a GPU for the whole
batch at once, on a CPU picture by picture in place (one pass over 600 kB that stays in the cache).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ltfast.data.color import apply_jitter
from ltfast.data.large_views import ViewDraw
from ltfast.data.randaugment import apply_rand_augment


class Finisher:
    """Turns uint8 [n, H, W, 3] pictures into normalised float views [n, 3, H, W].

    mean, std: RGB on the 0..1 scale; dtype: of the views on a GPU (float32 or bfloat16), computed in float32 and
    rounded once: doing the arithmetic in bfloat16 has 2.7 times the error. CPU views are float32, NCHW; GPU views
    channels_last.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.device, self.dtype = device, dtype
        self._mean = (255 * torch.tensor(mean, dtype=torch.float64)).float().view(1, 3, 1, 1).to(device)
        self._scale = (1 / (255 * torch.tensor(std, dtype=torch.float64))).float().view(1, 3, 1, 1).to(device)

    def plain(self, pictures: Tensor) -> Tensor:
        """Normalisation only."""
        return self._normalise(self._planar(pictures))

    def view(self, pictures: Tensor, draw: ViewDraw) -> Tensor:
        """Jitter and gray, RandAugment, normalisation; crop and flip are done."""
        x = self._planar(pictures)
        if draw.jitter is not None:
            apply_jitter(x.flatten(2), draw.jitter)
        if draw.augment is not None:
            apply_rand_augment(x.round_(), draw.augment)
        return self._normalise(x)

    def levels(self, view: Tensor) -> Tensor:
        """Back to uint8 levels 0..255 of [n, 3, H, W], for people to look at."""
        x = view.to(self.device, torch.float32) / self._scale + self._mean
        return x.round().clamp(0, 255).to(torch.uint8)

    def _planar(self, pictures: Tensor) -> Tensor:
        n, height, width, _ = pictures.shape
        planar = torch.empty(n, 3, height, width, dtype=torch.float32, device=self.device)
        return planar.copy_(pictures.permute(0, 3, 1, 2), non_blocking=True)

    def _normalise(self, x: Tensor) -> Tensor:
        x.sub_(self._mean).mul_(self._scale)
        if self.device.type == "cpu":
            return x
        return x.to(self.dtype, memory_format=torch.channels_last)
