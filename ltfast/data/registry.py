"""The data sets by name, with what `ltfast datasets` prints and the defaults that a recipe starts from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One line of `ltfast datasets` and the data set's defaults."""

    description: str
    """One line for people."""
    imbalance: float | None = None
    """Default of --imbalance; None keeps the data as it is."""
    batch: int = 256
    """Default global batch."""
    val_per_class: int = 0
    """Default of --val-per-class."""
    views: str
    """Default view recipe."""


def _small(description: str, imbalance: float | None) -> DatasetInfo:
    return DatasetInfo(description=description, imbalance=imbalance, views="cifar")


def _large(description: str) -> DatasetInfo:
    return DatasetInfo(description=description, views="imagenet")


DATASETS: dict[str, DatasetInfo] = {
    "digits-lt": DatasetInfo(
        description="scikit-learn's handwritten digits, long-tailed; nothing to download",
        imbalance=100,
        batch=64,
        val_per_class=10,
        views="digits",
    ),
    "cifar10-lt": _small("CIFAR-10, long-tailed; torchvision's folder, class folders or .npz pack", 100),
    "cifar100-lt": _small("CIFAR-100, long-tailed; torchvision's folder, class folders or .npz pack", 100),
    "folder-small": _small("your own small pictures (class folders or .npz pack), held on the device", None),
    "imagenet-lt": _large("ImageNet-LT: 115,846 pictures by the published lists"),
    "inat18": _large("iNaturalist 2018: 437,513 pictures, naturally long-tailed"),
    "places-lt": _large("Places-LT: 62,500 pictures by the published lists"),
    "folder": _large("your own folder of pictures, one folder a class"),
    "list": _large("your own split lists: a path and a label on each line"),
    "webdataset": _large("your own tar shards (WebDataset)"),
}

LARGE = ("imagenet-lt", "inat18", "places-lt", "folder", "list", "webdataset")
"""Read by large.py; the others are small enough to live on the device."""
