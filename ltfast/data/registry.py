"""The data sets by name, with what `ltfast datasets` prints and the defaults that a recipe starts from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """One line of `ltfast datasets` and the data set's defaults."""

    description: str
    """One line for people."""
    num_classes: int | None
    """None: found in the data."""
    input_shape: tuple[int, int, int]
    """Channels, height, width of a view."""
    imbalance: float | None
    """Default of --imbalance; None keeps the data as it is."""
    batch: int
    """Default global batch."""
    epochs: int
    """Epochs of the published recipe."""
    val_per_class: int
    """Default of --val-per-class."""
    views: str
    """Default view recipe."""
    needs_data_dir: bool = True
    """False: comes with a dependency."""


def _small(description: str, num_classes: int | None, imbalance: float | None) -> DatasetInfo:
    return DatasetInfo(
        description=description,
        num_classes=num_classes,
        input_shape=(3, 32, 32),
        imbalance=imbalance,
        batch=256,
        epochs=200,
        val_per_class=0,
        views="cifar",
    )


def _large(description: str, num_classes: int | None, epochs: int) -> DatasetInfo:
    return DatasetInfo(
        description=description,
        num_classes=num_classes,
        input_shape=(3, 224, 224),
        imbalance=None,
        batch=256,
        epochs=epochs,
        val_per_class=0,
        views="imagenet",
    )


DATASETS: dict[str, DatasetInfo] = {
    "digits-lt": DatasetInfo(
        description="scikit-learn's handwritten digits, long-tailed; nothing to download",
        num_classes=10,
        input_shape=(1, 8, 8),
        imbalance=100,
        batch=64,
        epochs=60,
        val_per_class=10,
        views="digits",
        needs_data_dir=False,
    ),
    "cifar10-lt": _small("CIFAR-10, long-tailed; torchvision's folder, class folders or .npz pack", 10, 100),
    "cifar100-lt": _small("CIFAR-100, long-tailed; torchvision's folder, class folders or .npz pack", 100, 100),
    "folder-small": _small("your own small pictures (class folders or .npz pack), held on the device", None, None),
    "imagenet-lt": _large("ImageNet-LT: 115,846 pictures by the published lists", 1000, 90),
    "inat18": _large("iNaturalist 2018: 437,513 pictures, naturally long-tailed", 8142, 100),
    "places-lt": _large("Places-LT: 62,500 pictures by the published lists", 365, 30),
    "folder": _large("your own folder of pictures, one folder a class", None, 90),
    "list": _large("your own split lists: a path and a label on each line", None, 90),
    "webdataset": _large("your own tar shards (WebDataset)", None, 90),
}

LARGE = ("imagenet-lt", "inat18", "places-lt", "folder", "list", "webdataset")
"""Read by large.py; the others are small enough to live on the device."""
