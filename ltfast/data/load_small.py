"""From a data set's name to a SmallSource: read the pool, draw the long-tailed splits, choose the views."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ltfast.data import cifar
from ltfast.data.augment import DIGITS_MEAN, DIGITS_STD, RECIPES, Plain, View, recipe
from ltfast.data.base import Levels
from ltfast.data.digits import MIN_PER_CLASS, read_digits
from ltfast.data.pack import read_pack
from ltfast.data.pool import Pool, Splits, held_out_splits, long_tail_splits
from ltfast.data.registry import DATASETS
from ltfast.data.small import SmallSource
from ltfast.data.tree import read_tree
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
    image_size: int | None,
    trained: Sequence[str] | None,
    levels: Levels | None,
) -> SmallSource:
    """See `ltfast.data.load`."""
    info = DATASETS[dataset]
    pool, where = _read(dataset, data_dir, download, image_size, trained)
    if trained is not None and pool.val is not None:  # other pictures than the run's, from whose train it was held out
        val_per_class = 0
    splits = (
        held_out_splits(pool)
        if trained is not None and not len(pool.labels)
        else long_tail_splits(
            pool,
            imbalance=info.imbalance if imbalance is None else imbalance,
            imbalance_type=imbalance_type,
            val_per_class=info.val_per_class if val_per_class is None else val_per_class,
            limit_train=limit_train,
            min_per_class=MIN_PER_CLASS if dataset == "digits-lt" else 0,
            where=where,
        )
    )
    colour = splits.images["train"].shape[1] == 3
    mean, std = levels if levels is not None and colour else _normalisation(dataset, splits)
    return SmallSource(
        splits,
        views=_views(info.views if views is None else views, num_views, mean, std, splits),
        plain=Plain(mean, std),
        batch=info.batch if batch is None else batch,
        sampler=sampler,
        seed=seed,
        device=device,
        rank=rank,
        world=world,
        epochs_total=epochs_total,
        name=dataset,
    )


def _read(
    dataset: str, data_dir: Path | None, download: bool, image_size: int | None, trained: Sequence[str] | None
) -> tuple[Pool, str]:
    """The pool and the name that errors give it."""
    if dataset == "digits-lt":
        return read_digits(), dataset
    if dataset.startswith("cifar"):
        return cifar.read_cifar(dataset, data_dir, download), str(data_dir or cifar.DEFAULT_DIR)
    if data_dir is None:
        raise UserError(
            f"{dataset}: --data-dir is needed, a folder with train/<class>/ and test/<class>/, or an .npz pack"
        )
    if not data_dir.is_file():
        return read_tree(data_dir, image_size, trained=trained), str(data_dir)
    pool = read_pack(data_dir)
    side = pool.images.shape[-1]
    if image_size not in (None, side):
        raise UserError(f"--image-size {image_size}: {data_dir} holds pictures of {side} pixels; leave the option out")
    return pool, str(data_dir)


def _normalisation(dataset: str, splits: Splits) -> Levels:
    """Mean and deviation per channel: the field's constants, or those of the training split."""
    if dataset == "digits-lt":
        return DIGITS_MEAN, DIGITS_STD
    if dataset.startswith("cifar"):
        return cifar.MEAN, cifar.STD
    pixels = splits.images["train"]
    totals = [_moments(pixels[:, channel]) for channel in range(pixels.shape[1])]
    return tuple(mean for mean, _ in totals), tuple(deviation for _, deviation in totals)


def _moments(channel: torch.Tensor) -> tuple[float, float]:
    count = channel.flatten().bincount(minlength=256).double()
    level = torch.arange(256, dtype=torch.float64) / 255
    mean = (count * level).sum() / count.sum()
    variance = (count * (level - mean) ** 2).sum() / count.sum()
    return float(mean), max(float(variance.sqrt()), 1 / 255)


def _views(
    views: str | Sequence[View], num_views: int, mean: tuple[float, ...], std: tuple[float, ...], splits: Splits
) -> tuple[View, ...]:
    if not isinstance(views, str):
        return tuple(views)
    if views not in RECIPES:
        raise UserError(f"--views {views!r}: choose one of {', '.join(RECIPES)}")
    channels, side = splits.images["train"].shape[1:3]
    if views == "cifar" and channels != 3:
        raise UserError(
            f"--views cifar needs colour pictures, these have {channels} channel; choose crop, digits or plain"
        )
    return recipe(views, num_views, mean=mean, std=std, size=side)
