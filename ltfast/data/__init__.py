"""Data sets by name: `load("digits-lt", ...)` gives a Source; see base.py for what a Source is.

Small sets live on the device (small.py); large ones are decoded on the way (large.py, imported only when asked for).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ltfast.data.base import Batch, Levels, Source, shot_groups
from ltfast.data.registry import DATASETS, LARGE, DatasetInfo
from ltfast.errors import UserError, closest

__all__ = ["DATASETS", "Batch", "DatasetInfo", "Source", "load", "shot_groups"]


def load(
    dataset: str,
    *,
    data_dir: str | Path | None = None,
    imbalance: float | None = None,
    imbalance_type: str = "exp",
    limit_train: int | None = None,
    val_per_class: int | None = None,
    batch: int | None = None,
    views: str | Sequence[Any] | None = None,
    num_views: int = 3,
    sampler: str = "instance",
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    download: bool = False,
    epochs_total: int | None = None,
    image_size: int | None = None,
    trained: Sequence[str] | None = None,
    levels: Levels | None = None,
    **options: Any,
) -> Source:
    """The named data set, ready to iterate. None means the data set's own default (`DATASETS[dataset]`).

    batch: global batch; views: a recipe name or view modules, num_views of them used (1 or 3); val_per_class: images a
    class held out of train for checkpoint choice; download: may fetch a public set that is missing; image_size: side to
    resize pictures to; trained: classes of a model that is to be evaluated, on a folder or list that may lack train; levels:
    what to normalise pictures in colour by; options: of the large sets only. UserError, one line, for anything a user can fix.
    """
    if dataset not in DATASETS:
        near = closest(dataset, DATASETS)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(DATASETS)}"
        raise UserError(f"--dataset {dataset!r} is unknown; {hint}")
    if data_dir is not None and not str(data_dir):
        raise UserError("--data-dir: is empty; give it a value or leave it out")
    common: dict[str, Any] = {
        "data_dir": None if data_dir is None else Path(data_dir),
        "imbalance": imbalance,
        "imbalance_type": imbalance_type,
        "limit_train": limit_train,
        "val_per_class": val_per_class,
        "batch": batch,
        "views": views,
        "num_views": num_views,
        "sampler": sampler,
        "seed": seed,
        "device": device,
        "rank": rank,
        "world": world,
        "epochs_total": epochs_total,
        "image_size": image_size,
        "trained": trained,
        "levels": levels,
    }
    if dataset in LARGE:
        from ltfast.data.large import load_large

        given = {key: value for key, value in common.items() if value is not None or key == "data_dir"}
        return load_large(dataset, **given, **options)
    if options:
        raise UserError(f"{dataset} does not take the option {next(iter(options))!r}")
    from ltfast.data.load_small import load_small

    return load_small(dataset, **common, download=download)
