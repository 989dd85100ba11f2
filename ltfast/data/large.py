"""load_large: from the name of a large data set to a Source, with the loader that is faster on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltfast.data.base import Levels, Source
from ltfast.data.check import read_bad_list
from ltfast.data.dali_pipeline import dali_available
from ltfast.data.folders import limit, thin
from ltfast.data.large_source import LargeSource, own_cores
from ltfast.data.large_views import IMAGENET_MEAN, IMAGENET_STD, ViewRecipe, view_recipes
from ltfast.data.lists import ImageList, validate_lists
from ltfast.data.public import PUBLIC, find_lists
from ltfast.errors import UserError

LOADERS = ("auto", "dali", "torch", "synthetic")

# Images of a CPU second, DALI over the DataLoader with PIL, on 2 cores (AMD EPYC): see benchmarks/results/data.jsonl.
CPU_GAIN_OF_DALI = {1: 1.5, 3: 1.5}


@dataclass(frozen=True, slots=True)
class LoaderChoice:
    """Which loader, and why, in one line for `ltfast doctor` and the run's log."""

    name: str
    reason: str


def choose_loader(loader: str, device: torch.device | str, num_views: int) -> LoaderChoice:
    """Resolves "auto": DALI where it is installed and measured faster, else torch. UserError for a loader that
    cannot be.
    """
    if loader not in LOADERS:
        raise UserError(f"--loader {loader!r}: choose one of {', '.join(LOADERS)}")
    available = dali_available()
    if loader == "dali" and not available:
        raise UserError(
            "--loader dali: the package nvidia-dali is not installed; pip install 'ltfast[dali]' or use --loader torch"
        )
    if loader != "auto":
        return LoaderChoice(loader, "as asked for")
    if not available:
        return LoaderChoice("torch", "DALI is not installed (pip install 'ltfast[dali]')")
    if torch.device(device).type == "cuda":
        return LoaderChoice("dali", "a GPU decodes and crops")
    gain = CPU_GAIN_OF_DALI[3 if num_views > 1 else 1]
    return LoaderChoice(
        "dali", f"on a CPU DALI makes {gain:.1f} times the images of the PIL loader for {num_views} view(s)"
    )


def load_large(
    dataset: str,
    *,
    data_dir: str | Path | None,
    image_size: int = 224,
    batch: int | None = None,
    views: str | Sequence[ViewRecipe] | None = None,
    num_views: int = 3,
    sampler: str = "instance",
    seed: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    loader: str = "auto",
    workers: int = -1,
    on_bad_image: str = "auto",
    limit_train: int | None = None,
    val_per_class: int | None = None,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    test_list: str | Path | None = None,
    exclude_list: str | Path | None = None,
    imbalance: float | None = None,
    imbalance_type: str = "exp",
    epochs_total: int | None = None,
    trained: Sequence[str] | None = None,
    levels: Levels | None = None,
) -> Source:
    """imagenet-lt, inat18, places-lt, folder, list or webdataset as a Source; see `ltfast.data.load` for the common
    options.

    data_dir: root of the pictures, or the shard pattern of webdataset; workers: -1 = this process's cores; imbalance:
    None or 1 keeps a list as it is, else folder, list and webdataset are thinned; val_per_class: so many images of each
    class of train become the validation split, which is empty where the set has none; exclude_list: the bad-file list
    that `data check` wrote.
    """
    if data_dir is None:
        what = (
            "with class folders, or train/ and test/ of them"
            if dataset == "folder"
            else "that its list's paths start from"
        )
        raise UserError(f"--dataset {dataset} needs --data-dir, the folder {what}")
    recipes = view_recipes(
        "imagenet" if views is None else views if isinstance(views, str) else tuple(views), num_views
    )
    public = PUBLIC.get(dataset)
    mean, std = levels or ((public.mean, public.std) if public else (IMAGENET_MEAN, IMAGENET_STD))
    options: dict[str, Any] = {
        "views": recipes,
        "image_size": image_size,
        "batch": batch or 256,
        "sampler": sampler,
        "seed": seed,
        "device": device,
        "rank": rank,
        "world": world,
        "epochs_total": epochs_total,
        "workers": own_cores() if workers < 0 else workers,
        "on_bad_image": on_bad_image,
        "mean": mean,
        "std": std,
    }
    lists = find_lists(
        dataset, data_dir, train_list=train_list, val_list=val_list, test_list=test_list, val_per_class=val_per_class,
        trained=trained,
    )  # fmt: skip
    lists = _shape(dataset, lists, imbalance, imbalance_type, limit_train, exclude_list, trained is None)
    choice = choose_loader(loader, device, len(recipes))
    exist = choice.name != "synthetic" and lists["train"].loose
    validate_lists(lists, exist, trained=trained is not None)
    return source_class(choice.name)(lists, **options)


def _shape(
    dataset: str,
    lists: dict[str, ImageList],
    imbalance: float | None,
    imbalance_type: str,
    limit_train: int | None,
    exclude_list: str | Path | None,
    own: bool,
) -> dict[str, ImageList]:
    """Excluded files off, thinned, limited: in this order. own: the exclude list must be of these pictures."""
    lists = dict(lists)
    if exclude_list is not None:
        bad = read_bad_list(exclude_list)
        whole, lists = lists, {split: images.without(bad) for split, images in lists.items()}
        if own and bad and len(whole["train"]) and all(len(lists[split]) == len(whole[split]) for split in lists):
            raise UserError(
                f"--exclude-list {exclude_list}: none of its {len(bad):,} paths is in the data set; it has "
                f"{min(bad).decode(errors='replace')!r}, the train split {whole['train'].paths[0]!r}; write the list with "
                "`ltfast data check --bad-list` on the same folder"
            )
    if not len(lists["train"]):
        return lists
    if imbalance is not None and imbalance != 1:
        if dataset in PUBLIC:
            raise UserError(f"--imbalance {imbalance:g}: {dataset} is long-tailed as it is; use it with folder or list")
        lists["train"] = thin(lists["train"], imbalance, imbalance_type)
    if limit_train is not None:
        lists["train"] = limit(lists["train"], limit_train)
    return lists


def source_class(loader: str) -> type[LargeSource]:
    """The class behind a resolved loader name."""
    if loader == "dali":
        from ltfast.data.dali_source import DaliSource

        return DaliSource
    if loader == "torch":
        from ltfast.data.torch_source import TorchSource

        return TorchSource
    from ltfast.data.synthetic_source import SyntheticSource

    return SyntheticSource
