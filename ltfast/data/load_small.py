"""From a data set's name to a SmallSource: read the pool, draw the long-tailed splits, choose the views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ltfast.data.augment import DIGITS_MEAN, DIGITS_STD, RECIPES, Plain, View, recipe
from ltfast.data.digits import MIN_PER_CLASS, read_digits
from ltfast.data.pool import Pool, long_tail_splits
from ltfast.data.registry import DATASETS
from ltfast.data.small import SmallSource
from ltfast.errors import UserError


def load_small(
    dataset: str,
    *,
    data_dir: Path | None,
    imbalance: float | None,
    imbalance_type: str,
    limit_train: int | None,
    val_per_class: int | None,
    batch: int | None,
    views: str | Sequence[View] | None,
    num_views: int,
    sampler: str,
    seed: int,
    device: torch.device | str,
    rank: int,
    world: int,
    download: bool,
    epochs_total: int | None,
    eval_batch: int | None,
) -> SmallSource:
    """See `ltfast.data.load`."""
    info = DATASETS[dataset]
    pool, where = _read(dataset, data_dir, download)
    splits = long_tail_splits(
        pool,
        imbalance=info.imbalance if imbalance is None else imbalance,
        imbalance_type=imbalance_type,
        val_per_class=info.val_per_class if val_per_class is None else val_per_class,
        limit_train=limit_train,
        min_per_class=MIN_PER_CLASS if dataset == "digits-lt" else 0,
        where=where,
    )
    mean, std = DIGITS_MEAN, DIGITS_STD
    return SmallSource(
        splits,
        views=_views(info.views if views is None else views, num_views, mean, std),
        plain=Plain(mean, std),
        batch=info.batch if batch is None else batch,
        sampler=sampler,
        seed=seed,
        device=device,
        rank=rank,
        world=world,
        epochs_total=epochs_total,
        eval_batch=eval_batch or 1024,
        name=dataset,
    )


def _read(dataset: str, data_dir: Path | None, download: bool) -> tuple[Pool, str]:
    """The pool and the name that errors give it."""
    return read_digits(), dataset


def _views(
    views: str | Sequence[View], num_views: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[View, ...]:
    if not isinstance(views, str):
        return tuple(views)
    if views not in RECIPES:
        raise UserError(f"--views {views!r}: choose one of {', '.join(RECIPES)}")
    return recipe(views, num_views, mean=mean, std=std)
