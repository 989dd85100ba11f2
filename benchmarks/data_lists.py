"""Lists without pictures: how fast a million lines are parsed and checked, and how uniform an order is.

    python benchmarks/data.py lists | order

The order of an epoch is compared with DALI's tar reader, plain and with its two ways of shuffling, on class-sorted shards:
correlations of a picture's place (0 for a uniform permutation), and how many of eight equal classes the first batch of 64
holds.
"""

from __future__ import annotations

import io
import itertools
import os
import resource
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = tuple[str, str, float, int, dict[str, Any]]  # case, metric, value, n, further fields


def million_lines(lines: int = 1_000_000) -> list[Row]:
    """Seconds and peak memory to parse a list, validate it and check that every file exists."""
    from ltfast.data.lists import read_list, validate_lists

    with tempfile.TemporaryDirectory() as name:
        root, text = Path(name), []
        for label in range(1000):
            (root / f"train/n{label:08d}").mkdir(parents=True)
            for i in range(lines // 1000):
                path = f"train/n{label:08d}/n{label:08d}_{i}.JPEG"
                os.close(os.open(root / path, os.O_CREAT))
                text.append(f"{path} {label}\n")
        order = np.random.default_rng(0).permutation(len(text))
        (root / "list.txt").write_text("".join(text[i] for i in order))
        del text
        start = time.perf_counter()
        images = read_list(root / "list.txt", root)
        parsed = time.perf_counter()
        validate_lists({"train": images})
        end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    case = f"list/{lines}-lines"
    figures = {"parse_s": parsed - start, "validate_and_exist_s": end - parsed, "peak_memory_mib": peak}
    return [(case, metric, value, 1, {}) for metric, value in figures.items()]


def orders(n: int = 20_000, shards: int = 8, epochs: int = 3) -> list[Row]:
    """Correlation of a picture's place with the list, between epochs and between seeds: 0 for a uniform permutation."""
    from ltfast.data.sampler import epoch_order

    def ours(seed: int) -> list[np.ndarray]:
        labels = torch.zeros(n, dtype=torch.int64)
        return [epoch_order("instance", labels, batch=50, seed=seed, epoch=e)[:n].numpy() for e in range(epochs)]

    rows = _order_rows("order/ltfast", ours(0), ours(1))
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return rows
    with tempfile.TemporaryDirectory() as name:
        files = _numbered_shards(Path(name), n, shards)
        for label, options in (
            ("window-1024", {"random_shuffle": True}),
            ("window-1024+shuffle_after_epoch", {"random_shuffle": True, "shuffle_after_epoch": True}),
        ):
            a, b = (_reader_order(files, n, epochs, seed=seed, **options) for seed in (0, 1))
            rows += _order_rows(f"order/dali-webdataset/{label}", a, b)
    return rows


def _order_rows(case: str, a: list[np.ndarray], b: list[np.ndarray]) -> list[Row]:
    def correlation(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.corrcoef(np.argsort(x), np.argsort(y))[0, 1])

    n = len(a[0])
    figures = {
        "correlation_list_epoch": correlation(np.arange(n), a[0]),
        "correlation_epochs": statistics.fmean(correlation(x, y) for x, y in itertools.pairwise(a)),
        "correlation_seeds": correlation(a[0], b[0]),
        "classes_in_first_batch_of_8": len(np.unique(a[0][:64] * 8 // n)),
    }
    return [(case, metric, value, 1, {"config": {"images": n}}) for metric, value in figures.items()]


def _numbered_shards(folder: Path, n: int, shards: int) -> list[Path]:
    from ltfast.data.webdataset import shard_index

    files = [folder / f"s-{shard}.tar" for shard in range(shards)]
    for file, part in zip(files, np.array_split(np.arange(n), shards), strict=True):
        with tarfile.open(file, "w") as tar:
            for number in part.tolist():
                for extension in ("jpg", "cls"):
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = 6
                    tar.addfile(info, io.BytesIO(f"{number:06d}".encode()))
        shard_index(file)
    return files


def _reader_order(files: list[Path], n: int, epochs: int, **options: Any) -> list[np.ndarray]:
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(batch_size=50, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        paths, indexes = [str(f) for f in files], [f"{f}.idx" for f in files]
        _, number = fn.readers.webdataset(paths=paths, index_paths=indexes, ext=["jpg", "cls"], **options)
        pipeline.set_outputs(number)
    pipeline.build()
    found = []
    for _ in range(epochs):
        numbers: list[int] = []
        while len(numbers) < n:
            (batch,) = pipeline.run()
            numbers += [int(bytes(np.array(batch[i]))) for i in range(len(batch))]
        found.append(np.array(numbers[:n]))
    return found
