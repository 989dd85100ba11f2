"""A pack of CIFAR's pictures at half their size: a study for two CPU cores.

    python benchmarks/half_size.py CIFAR.npz HALF.npz      # for `ablation.py --dataset cifar10-half --data-dir HALF.npz`

Each pixel is the mean of four; pictures are kept as PNG, so nothing else is lost.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ltfast.data.pack import read_pack
from ltfast.data.pool import ImageArray


def halved(pictures: ImageArray) -> ImageArray:
    """Means of 2 x 2 pixels, rounded: uint8 [n, C, H, W] -> [n, C, H // 2, W // 2]."""
    n, c, h, w = pictures.shape
    cells = pictures.reshape(n, c, h // 2, 2, w // 2, 2).astype(np.uint16)
    return ((cells.sum((3, 5)) + 2) // 4).astype(np.uint8)


def encoded(pictures: ImageArray) -> tuple[np.ndarray, np.ndarray]:
    """PNG files of RGB pictures one after another, and where each begins [n + 1]."""
    files = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture.transpose(1, 2, 0)).save(file, "PNG")
        files.append(file.getvalue())
    ends = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), dtype=np.uint8), ends.astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    pool = read_pack(args.source)
    arrays: dict[str, np.ndarray] = {"class_names": np.array(pool.class_names)}
    parts = {
        "train": (pool.images[np.arange(len(pool.labels))], pool.labels),
        "test": (pool.test_images, pool.test_labels),
    }
    for split, (pictures, labels) in parts.items():
        arrays[f"{split}_bytes"], arrays[f"{split}_offsets"] = encoded(halved(pictures))
        arrays[f"{split}_labels"] = np.asarray(labels)
    np.savez(args.target, **arrays)
    print(
        f"{args.target}: {args.target.stat().st_size / 2**20:.0f} MiB, pictures of {pool.images.shape[2] // 2} pixels"
    )


if __name__ == "__main__":
    main()
