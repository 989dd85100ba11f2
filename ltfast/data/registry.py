"""The data sets by name, with what `ltfast datasets` prints and the defaults that a recipe starts from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
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


DATASETS: dict[str, DatasetInfo] = {
    "digits-lt": DatasetInfo(
        "scikit-learn's handwritten digits, long-tailed; nothing to download",
        10,
        (1, 8, 8),
        100,
        64,
        60,
        10,
        "digits",
        False,
    ),
    "cifar10-lt": DatasetInfo(
        "CIFAR-10, long-tailed; torchvision's folder, class folders or .npz pack",
        10,
        (3, 32, 32),
        100,
        256,
        200,
        0,
        "cifar",
    ),
    "cifar100-lt": DatasetInfo(
        "CIFAR-100, long-tailed; torchvision's folder or class folders", 100, (3, 32, 32), 100, 256, 200, 0, "cifar"
    ),
    "folder-small": DatasetInfo(
        "your own folder of small pictures, held on the device", None, (3, 32, 32), None, 256, 200, 0, "cifar"
    ),
    "imagenet-lt": DatasetInfo(
        "ImageNet-LT: 115,846 pictures by the published lists", 1000, (3, 224, 224), None, 256, 90, 0, "imagenet"
    ),
    "inat18": DatasetInfo(
        "iNaturalist 2018: 437,513 pictures, naturally long-tailed", 8142, (3, 224, 224), None, 256, 100, 0, "imagenet"
    ),
    "places-lt": DatasetInfo(
        "Places-LT: 62,500 pictures by the published lists", 365, (3, 224, 224), None, 256, 30, 0, "imagenet"
    ),
    "folder": DatasetInfo(
        "your own folder of pictures, one folder a class", None, (3, 224, 224), None, 256, 90, 0, "imagenet"
    ),
    "list": DatasetInfo(
        "your own split lists: a path and a label on each line", None, (3, 224, 224), None, 256, 90, 0, "imagenet"
    ),
    "webdataset": DatasetInfo("your own tar shards (WebDataset)", None, (3, 224, 224), None, 256, 90, 0, "imagenet"),
}

LARGE = ("imagenet-lt", "inat18", "places-lt", "folder", "list", "webdataset")
"""Read by large.py; the others are small enough to live on the device."""
