"""A picture of what training sees: one row per image of the epoch's first ones, the plain view and then each training
view."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ltfast.data.base import Batch, Source
from ltfast.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

TILE = 96
"""Wanted side of a tile in pixels; small pictures are enlarged by a whole factor, pixel for pixel."""
GAP = 4
LETTERS = 12
"""A letter is so many times smaller than a tile, and at least 11 pixels high."""


def contact_sheet(source: Source, path: str | Path, n: int = 12) -> Path:
    """Write a PNG with n images of the first training batches, of as many classes as they hold; returns the path.

    UserError where it cannot be written.
    """
    from PIL import Image, ImageDraw

    columns, labels = _collect(source, n)
    names = [source.class_names[label] for label in labels]
    tile = _tile_side(columns)
    font = _font(max(11, tile // LETTERS))
    top = int(1.5 * font.size)
    left = 12 + int(max(font.getlength(name) for name in names))
    sheet = Image.new("RGB", (left + len(columns) * (tile + GAP), top + len(names) * (tile + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, pictures in enumerate(columns):
        x = left + column * (tile + GAP)
        draw.text((x, top // 2), "plain" if column == 0 else f"view {column}", fill="black", font=font, anchor="lm")
        for row, picture in enumerate(_to_bytes(source, pictures)):
            place = (x, top + row * (tile + GAP))
            sheet.paste(Image.fromarray(picture).resize((tile, tile), Image.Resampling.NEAREST), place)
    for row, name in enumerate(names):
        draw.text((4, top + row * (tile + GAP) + tile // 2), name, fill="black", font=font, anchor="lm")
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:  # ValueError: PIL knows no such suffix
        raise UserError(
            f"{path}: the picture cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from error
    return path


def _font(size: int) -> FreeTypeFont:
    """DejaVu Sans as it comes with matplotlib: Latin with accents, Greek, Cyrillic."""
    from matplotlib import font_manager
    from PIL import ImageFont

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size)


def _tile_side(columns: list[Tensor]) -> int:
    side = max(pictures.shape[-1] for pictures in columns)
    return side * max(1, round(TILE / side))


def _collect(source: Source, n: int) -> tuple[list[Tensor], list[int]]:
    """The plain pictures and each view of n chosen images, normalised as they come, on the CPU; and their labels."""
    parts: list[Batch] = []
    for part in source.train(0):
        parts.append(part)
        if sum(len(p.index) for p in parts) >= n:
            break
    batch = Batch(
        tuple(torch.cat(views) for views in zip(*(p.views for p in parts), strict=True)),
        torch.cat([p.labels for p in parts]),
        torch.cat([p.index for p in parts]),
    )
    labels, index = batch.labels.cpu(), batch.index.cpu()
    seen_before = torch.stack([(labels[:i] == label).sum() for i, label in enumerate(labels)])
    chosen = torch.argsort(seen_before * source.num_classes + labels, stable=True)[:n]
    chosen = chosen[torch.argsort(labels[chosen], stable=True)]
    # By index: a picture that cannot be decoded is left out.
    plain: dict[int, Tensor] = {}
    for part in source.evaluate("train", indices=index[chosen]):
        plain |= dict(zip(part.index.tolist(), part.views[0].float().cpu(), strict=True))
    rows = [row for row in chosen.tolist() if int(index[row]) in plain]
    columns = [torch.stack([plain[int(index[row])] for row in rows])]
    columns += [view[torch.tensor(rows, device=view.device)].float().cpu() for view in batch.views]
    return columns, labels[rows].tolist()


def _to_bytes(source: Source, pictures: Tensor) -> list[np.ndarray]:
    pictures = pictures * torch.tensor(source.std)[:, None, None] + torch.tensor(source.mean)[:, None, None]
    levels = (pictures * 255).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    return list(levels.permute(0, 2, 3, 1).numpy())
