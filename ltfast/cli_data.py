"""`ltfast data check | stats | contact`: look at a data set before training on it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ltfast.errors import UserError

if TYPE_CHECKING:
    from ltfast.data.lists import ImageList


def add_data_commands(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of `ltfast data` to its parser."""
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=type(parser))

    check = verbs.add_parser(
        "check", help="find and list missing, truncated, corrupt and odd files; exit code 1 if any would harm training"
    )
    _add_lists(check)
    check.add_argument("--full", action="store_true", help="decode every picture, not only its headers")
    check.add_argument("--workers", type=int, default=8, metavar="X", help="threads [8]")
    check.add_argument(
        "--bad-list", default=None, metavar="FILE", help="write the bad files here (train with --exclude-list)"
    )
    check.add_argument("--csv", default=None, metavar="FILE", help="write every bad, repeated and copied file here")
    check.set_defaults(run=command_check)

    stats = verbs.add_parser("stats", help="class counts and names, many / medium / few, imbalance")
    _add_lists(stats)
    stats.add_argument("--plot", default=None, metavar="PNG", help="draw the class counts")
    stats.add_argument(
        "--lists", default=None, metavar="DIR",
        help="write each split as DIR/<split>.csv (path, label, class), also a test split that is held out of train",
    )  # fmt: skip
    stats.set_defaults(run=command_stats)

    contact = verbs.add_parser("contact", help="a picture of what training sees: every view of some images")
    contact.add_argument("picture", metavar="PNG", help="file to write")
    contact.add_argument("--dataset", default=None, help="data set [guessed; digits-lt without --data-dir]")
    contact.add_argument("--data-dir", default=None, help="its folder, pack, list root or pattern of shards")
    contact.add_argument("--train-list", default=None, help="list file of training images")
    contact.add_argument("--imbalance", type=float, default=None, metavar="X", help="as in training [the data set's]")
    contact.add_argument("--limit-train", type=int, default=None, metavar="X", help="as in training [all images]")
    contact.add_argument("--image-size", type=int, default=None, metavar="X", help="as in training [the data set's]")
    contact.add_argument("--views", default="auto", metavar="X", help="as in training [auto]")
    contact.add_argument("--images", type=int, default=12, metavar="X", help="images shown [12]")
    contact.set_defaults(run=command_contact)


def _add_lists(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data_dir", metavar="ROOT", help="folder of the pictures, or a pattern of shards")
    parser.add_argument(
        "--dataset", default=None, help="folder, list, webdataset, imagenet-lt, inat18 or places-lt [guessed]"
    )
    for split in ("train", "val", "test"):
        also = "" if split == "train" else ", or a pattern of shards"
        parser.add_argument(f"--{split}-list", default=None, metavar="FILE", help=f"list file of {split} images{also}")


def _guessed(data_dir: str, train_list: str | None) -> str:
    return "list" if train_list else "webdataset" if data_dir.endswith(".tar") else "folder"


def _lists(args: argparse.Namespace) -> dict[str, ImageList]:
    from ltfast.data.public import find_lists
    from ltfast.data.registry import LARGE
    from ltfast.recipes import refuse_unread

    dataset = args.dataset or _guessed(args.data_dir, args.train_list)
    names = {f"{split}_list": getattr(args, f"{split}_list") for split in ("train", "val", "test")}
    if dataset not in LARGE:
        raise UserError(f"--dataset {dataset}: `ltfast data` looks at {', '.join(LARGE)} only")
    refuse_unread(dataset, names)
    return find_lists(dataset, args.data_dir, **names)


def _print_note(lists: dict[str, ImageList]) -> None:
    from ltfast.data.base import lacking_classes, split_note

    sizes, classes = {split: len(images) for split, images in lists.items()}, lists["train"].num_classes
    lacking = lacking_classes({split: images.labels for split, images in lists.items()}, classes)
    if note := split_note(sizes, lists["test"].split, lacking, classes):
        print(note)


def command_check(args: argparse.Namespace) -> int:
    from ltfast.data.check import check_dataset, print_check, write_bad_list, write_findings

    lists = _lists(args)
    report = check_dataset(lists, full=args.full, workers=args.workers)
    print_check(report)
    _print_note(lists)
    if args.bad_list:
        print(f"{write_bad_list(report, args.bad_list)} bad files listed in {args.bad_list}")
    if args.csv:
        print(f"{write_findings(report, args.csv)} findings listed in {args.csv}")
    return int(not report.ok)


def command_stats(args: argparse.Namespace) -> int:
    from ltfast.data.lists import empty_classes, write_lists
    from ltfast.data.stats import dataset_stats, plot_counts, print_classes, print_stats

    lists = _lists(args)
    print_stats(dataset_stats(lists))
    print_classes(lists)
    if empty := empty_classes(lists["train"]):
        print(empty)
    _print_note(lists)
    if args.plot:
        plot_counts(lists, args.plot)
        print(f"class counts drawn in {args.plot}")
    if args.lists:
        print(f"lists written: {', '.join(map(str, write_lists(lists, args.lists)))}")
    return 0


def command_contact(args: argparse.Namespace) -> int:
    from ltfast.data import DATASETS, load
    from ltfast.data.contact import contact_sheet
    from ltfast.data.registry import LARGE
    from ltfast.recipes import refuse_unread

    if args.images < 1:
        raise UserError(f"--images {args.images}: show at least 1")
    guessed = "digits-lt"
    if args.data_dir or args.train_list:
        pack = (args.data_dir or "").endswith(".npz")
        guessed = "folder-small" if pack else _guessed(args.data_dir or "", args.train_list)
    dataset = args.dataset or guessed
    given = {name: getattr(args, name) for name in ("data_dir", "train_list", "image_size")}
    if dataset in DATASETS:
        refuse_unread(dataset, given)
    if dataset not in LARGE:
        del given["train_list"]
    source = load(
        dataset, **given, batch=1, num_views=3, views=None if args.views == "auto" else args.views, imbalance=args.imbalance,
        limit_train=args.limit_train or None,
    )  # fmt: skip
    print(f"written {contact_sheet(source, args.picture, n=args.images)}")
    return 0
