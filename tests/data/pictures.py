"""Pictures for the tests of large-image input: made with PIL, or the sample folder that LTFAST_TEST_DATA names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def data_folder() -> Path:
    """The folder with lists/ and imagenet_sample_256.tar, or a skip with the reason."""
    folder = os.environ.get("LTFAST_TEST_DATA")
    if not folder:
        pytest.skip("set LTFAST_TEST_DATA to the folder with lists/ and imagenet_sample_256.tar")
    return Path(folder)


def needs_dali() -> None:
    """Skips the test where DALI is not installed."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed (pip install ltfast[dali])")


def picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    """A smooth colourful picture with some texture, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-12, 13, (height, width, 1), dtype=np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def make_set(root: Path, counts: tuple[int, ...], *, val: int = 2, size: tuple[int, int] = (96, 80)) -> Path:
    """JPEG files train/<class>/<i>.jpg and val/..., with train.txt and val.txt sorted by class; returns root."""
    for split, numbers in (("train", counts), ("val", (val,) * len(counts))):
        lines = []
        for label, count in enumerate(numbers):
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                name = f"{split}/{label}/{i}.jpg"
                seed = label * 1000 + i + (500_000 if split == "val" else 0)
                width, height = size[0] + seed % 7, size[1] + seed % 5
                picture(seed, width, height).save(root / name, quality=92)
                lines.append(f"{name} {label}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root
