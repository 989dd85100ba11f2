"""From cropped uint8 pictures to the views a model sees: colour, RandAugment, one float32 normalisation.

The work that is not decode, crop and flip runs here in torch, on the device of the pictures: on a GPU for the whole
batch at once, on a CPU picture by picture in place (one pass over 600 kB that stays in the cache).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from ltfast.data.color import Jitter, apply_jitter
from ltfast.data.large_views import ViewDraw
from ltfast.data.randaugment import Drawn, apply_rand_augment


class Finisher:
    """Turns uint8 [n, H, W, 3] pictures into normalised float32 views [n, 3, H, W].

    mean, std: RGB on the 0..1 scale; threads: pictures finished at a time on a CPU. CPU views are NCHW, GPU views
    channels_last.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        threads: int = 1,
    ) -> None:
        self.device = device
        # One intra-op thread each: pictures are the parallelism.
        pooled = device.type == "cpu" and threads > 1
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) if pooled else None
        self.normalise(mean, std)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Take another mean and deviation."""
        self._mean = (255 * torch.tensor(mean, dtype=torch.float64)).float().view(1, 3, 1, 1).to(self.device)
        self._scale = (1 / (255 * torch.tensor(std, dtype=torch.float64))).float().view(1, 3, 1, 1).to(self.device)

    def plain(self, pictures: Tensor) -> Tensor:
        """Normalisation only."""
        return self.view(pictures, None)

    def view(self, pictures: Tensor, draw: ViewDraw | None, out: Tensor | None = None) -> Tensor:
        """Jitter and gray, RandAugment (without a draw: none of them), normalisation; crop and flip are done.

        out: where the view goes, float32 [n, 3, H, W] (CPU only); None: a new tensor.
        """
        jitter, augment = (None, None) if draw is None else (draw.jitter, draw.augment)
        out = self.empty(len(pictures), pictures) if out is None else out
        if self.device.type != "cpu":
            return self._colour(out, pictures, jitter, augment).to(memory_format=torch.channels_last)
        self._one_by_one(out, pictures, jitter, augment)
        return out

    def empty(self, n: int, like: Tensor) -> Tensor:
        """Room for n views of the size of the pictures `like` [.., H, W, 3]."""
        return torch.empty(n, 3, *like.shape[1:3], dtype=torch.float32, device=self.device)

    def _one_by_one(self, out: Tensor, pictures: Tensor, jitter: Jitter | None, augment: Drawn | None) -> None:
        def colour_one(i: int) -> None:
            one = slice(i, i + 1)
            own_jitter = None if jitter is None else Jitter(*(field[one] for field in jitter))
            own_augment = None if augment is None else Drawn(*(field[one] for field in augment))
            self._colour(out[one], pictures[one], own_jitter, own_augment)

        numbers = range(len(pictures))
        deque(map(colour_one, numbers) if self._pool is None else self._pool.map(colour_one, numbers), maxlen=0)

    def _colour(self, out: Tensor, pictures: Tensor, jitter: Jitter | None, augment: Drawn | None) -> Tensor:
        """Fills `out` [n, 3, H, W] and returns it."""
        # As bytes, in the order they have: copying into `out` at once would permute them on the host first, out of pinned memory.
        out.copy_(pictures.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
        if jitter is not None:
            apply_jitter(out.flatten(2), jitter)
        if augment is not None:
            apply_rand_augment(out.round_(), augment)
        return out.sub_(self._mean).mul_(self._scale)
