"""A contact sheet: training pictures in rows, the plain view first and then every augmented view, as a PNG to look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ltfast.data.base import Source
from ltfast.data.large_source import LargeSource

GAP = 4  # white pixels between pictures


def contact_sheet(source: Source, path: str | Path, rows: int = 8, epoch: int = 0) -> tuple[int, int]:
    """Writes the first `rows` pictures of an epoch (plain view, then each training view) and returns (rows, columns).

    Normalisation is undone exactly for large pictures, elsewhere by stretching the sheet's range to 0..255.
    """
    batch = next(iter(source.train(epoch)))
    rows = min(rows, len(batch.index))
    plain = [part.views[0] for part in source.evaluate("train", batch.index[:rows])]
    columns = torch.stack([torch.cat(plain), *(view[:rows] for view in batch.views)]).float()
    levels = _levels(source, columns.flatten(0, 1)).cpu().unflatten(0, columns.shape[:2])
    views, rows, _, height, width = levels.shape
    sheet = np.full((rows * (height + GAP) - GAP, views * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for row in range(rows):
        for view in range(views):
            top, left = row * (height + GAP), view * (width + GAP)
            sheet[top : top + height, left : left + width] = levels[view, row].permute(1, 2, 0).numpy()
    from PIL import Image

    Image.fromarray(sheet).save(path)
    return rows, views


def _levels(source: Source, pictures: Tensor) -> Tensor:
    if isinstance(source, LargeSource):
        return source.finisher.levels(pictures)
    low, high = pictures.amin(), pictures.amax()
    return ((pictures - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
