"""The public long-tailed sets: what their lists must hold, where to get them, and finding the lists of any data
set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ltfast.data.base import SPLITS
from ltfast.data.folders import check_folder, scan_folder
from ltfast.data.lists import ImageList, hold_out, hold_out_each, no_images, read_lists
from ltfast.data.longtail import SUBSET_SEED
from ltfast.data.registry import LARGE
from ltfast.errors import UserError

HELD_OUT_SHARE = 0.1  # of each class, to test on when a set has training images only
LIST_FOLDERS = ("", "lists", "data_txt", "splits", "annotations")


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """Published size of one split; largest and smallest are images of a class."""

    images: int
    classes: int
    largest: int
    smallest: int
    files: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.images:,} images, {self.classes:,} classes, {self.largest:,}..{self.smallest} a class"


@dataclass(frozen=True, slots=True)
class PublicSet:
    """Facts of one public set; mean and std are the normalisation of its published recipes (RGB, 0..1 scale)."""

    title: str
    splits: dict[str, SplitFacts]
    lists_from: str
    images_from: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


_LISTS_FROM = (
    "the public GitHub repository facebookresearch/classifier-balancing (folder data/) or "
    "FlamieZhu/Balanced-Contrastive-Learning (folder dataset/), or the drives that their READMEs name"
)
_INAT_VAL = SplitFacts(24_426, 8_142, 3, 3, ("iNaturalist18_val.txt", "val2018.json"))
_INAT_TRAIN = SplitFacts(437_513, 8_142, 1_000, 2, ("iNaturalist18_train.txt", "train2018.json"))

PUBLIC: dict[str, PublicSet] = {
    "imagenet-lt": PublicSet(
        "ImageNet-LT",
        {
            "train": SplitFacts(115_846, 1_000, 1_280, 5, ("ImageNet_LT_train.txt",)),
            "val": SplitFacts(20_000, 1_000, 20, 20, ("ImageNet_LT_val.txt",)),
            "test": SplitFacts(50_000, 1_000, 50, 50, ("ImageNet_LT_test.txt",)),
        },
        _LISTS_FROM,
        "ILSVRC2012, folders train/ and val/ with one folder a class, from image-net.org",
    ),
    "inat18": PublicSet(
        "iNaturalist 2018",
        {"train": _INAT_TRAIN, "val": _INAT_VAL},  # test labels were never published
        _LISTS_FROM + ", or train2018.json and val2018.json of GitHub visipedia/inat_comp",
        "train_val2018.tar.gz of GitHub visipedia/inat_comp (2018)",
        (0.466, 0.471, 0.380),
        (0.195, 0.194, 0.192),
    ),
    "places-lt": PublicSet(
        "Places-LT",
        {
            "train": SplitFacts(62_500, 365, 4_980, 5, ("Places_LT_train.txt",)),
            "val": SplitFacts(7_300, 365, 20, 20, ("Places_LT_val.txt",)),
            "test": SplitFacts(36_500, 365, 100, 100, ("Places_LT_test.txt",)),
        },
        _LISTS_FROM,
        "Places365-Standard, 256 x 256, folders train/ and val/, from places2.csail.mit.edu",
    ),
}


def find_lists(
    dataset: str,
    data_dir: str | Path,
    *,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    test_list: str | Path | None = None,
    val_per_class: int | None = None,
    trained: Sequence[str] | None = None,
) -> dict[str, ImageList]:
    """The splits 'train', 'val', 'test' of imagenet-lt, inat18, places-lt, list or folder below `data_dir`, or of webdataset,
    whose data_dir and val_list, test_list are patterns of shards.

    The *_list options name files (relative to the working folder, then to data_dir); a public set also finds its
    lists by their published names in data_dir, data_dir/lists and the like. See assign_splits for val_per_class and
    for a split that the set lacks. trained: classes of a model that is to be evaluated, on a folder or a list; train may
    then be missing, and is empty.
    """
    root = Path(data_dir)
    given = {"train": train_list, "val": val_list, "test": test_list}
    if dataset == "webdataset":
        from ltfast.data.webdataset import read_splits

        patterns = {split: str(p) for split, p in {**given, "train": data_dir}.items() if p is not None}
        lists: dict[str, ImageList] = {**read_splits(patterns)}
        return assign_splits(lists, val_per_class, evaluated=trained is not None)
    check_folder(root)
    if dataset == "folder":
        lists = scan_folder(root, trained)
    elif dataset == "list":
        if train_list is None and trained is None:
            raise UserError("dataset 'list' needs --train-list FILE with lines '<relative path> <label>'")
        files = ((split, _locate(name, root)) for split, name in given.items() if name is not None)
        lists = read_lists(files, root, train=no_images(root, trained or ()) if train_list is None else None)
    elif dataset in PUBLIC:
        lists = _public_lists(PUBLIC[dataset], root, given)
    else:
        raise UserError(f"unknown data set {dataset!r}; choose one of {', '.join(LARGE)}")
    return assign_splits(lists, val_per_class, evaluated=trained is not None)


def assign_splits(
    lists: dict[str, ImageList],
    val_per_class: int | None = None,
    share: float = HELD_OUT_SHARE,
    *,
    evaluated: bool = False,
) -> dict[str, ImageList]:
    """'train', 'val' and 'test' of what a set has; val may be empty, and never holds test images: it chooses.

    Without a test split, the one named val is test; without both, `share` of each class of train is (a fixed draw,
    never a class's last image). val_per_class: so many images of each class of the rest, if it has any, become val.
    UserError where the set has val and test of its own and val_per_class is given; evaluated: it keeps its own then (a model is
    evaluated, which may have been trained on other pictures).
    """
    lists = {split: replace(images, split=split) for split, images in lists.items()}
    if "test" not in lists and "val" in lists:
        lists["test"] = lists.pop("val")
    elif "test" not in lists:
        lists["train"], lists["test"] = hold_out(lists["train"], share, SUBSET_SEED)
    if val_per_class and len(lists["train"]):
        if len(lists.get("val", ())) and not evaluated:
            raise UserError(
                f"--val-per-class {val_per_class}: {lists['val'].source} is a validation split of the set's own; "
                "leave the option out"
            )
        if not len(lists.get("val", ())):
            lists["train"], lists["val"] = hold_out_each(lists["train"], val_per_class)
    lists.setdefault("val", lists["test"].select(np.arange(0)))
    return {split: lists[split] for split in SPLITS}


def _locate(name: str | Path, root: Path) -> Path:
    path = Path(name)
    return path if path.exists() or path.is_absolute() or not (root / path).exists() else root / path


def _public_lists(public: PublicSet, root: Path, given: dict[str, str | Path | None]) -> dict[str, ImageList]:
    if "test" not in public.splits:
        if given["val"] and given["test"]:
            raise UserError(f"{public.title} has one list to test on: give --val-list or --test-list, not both")
        given = {**given, "val": given["val"] or given["test"]}
    splits = public.splits
    found = ((split, _find_public(public, facts, split, root, given[split])) for split, facts in splits.items())
    return read_lists(found, root, lambda split, images: _check_facts(public, splits[split], split, images))


def _find_public(public: PublicSet, facts: SplitFacts, split: str, root: Path, given: str | Path | None) -> Path:
    if given is not None:
        return _locate(given, root)
    for folder in LIST_FOLDERS:
        for name in facts.files:
            for suffix in ("", ".gz"):
                if (root / folder / (name + suffix)).is_file():
                    return root / folder / (name + suffix)
    raise UserError(
        f"{public.title}: no {split} list ({' or '.join(facts.files)}, also .gz) in {root}; give --{split}-list, or "
        f"obtain it from {public.lists_from}; it must hold {facts}. Images: {public.images_from}"
    )


def _check_facts(public: PublicSet, facts: SplitFacts, split: str, images: ImageList) -> None:
    classes = len(np.unique(images.labels))
    if len(images) != facts.images or classes != facts.classes:
        raise UserError(
            f"{images.source} is not the {split} list of {public.title}: it holds {len(images):,} images in "
            f"{classes:,} classes, expected {facts}; obtain it from {public.lists_from}, or use --dataset list for a "
            "list of your own"
        )
