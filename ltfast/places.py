"""Where the files of a run lie: absolute, so that it may be gone on with from any folder, and found again once moved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltfast.config import Config
from ltfast.errors import UserError

LISTS = ("train_list", "val_list", "test_list", "exclude_list")
SHARDS = ("data_dir", "val_list", "test_list")  # patterns of them, of a WebDataset


def absolute(config: Config) -> Config:
    """The config with absolute paths, so that the run may be evaluated and continued from any folder.

    Lists may be named from data_dir. What is nowhere stays as it is: the name of published weights. Shard patterns are paths.
    """
    values = {"out": os.path.abspath(config.run.out)} if config.run.out else {}
    for name in ("data_dir", *LISTS, "weights", "bank"):
        value = getattr(config.model if name == "weights" else config.preserve if name == "bank" else config.data, name)
        if not value:
            continue
        shards = config.data.dataset == "webdataset" and name in SHARDS
        below = os.path.join(config.data.data_dir or "", value)
        if shards or os.path.exists(value):
            parts = value.split("::") if shards else [value]
            values[name] = "::".join(os.path.abspath(part) for part in parts)
        elif name in LISTS and os.path.exists(below):
            values[name] = os.path.abspath(below)
    return config.with_(**values)


def short(path: Path) -> str:
    """An absolute path as a person here would type it: from the working folder if it lies below that (and that is not /)."""
    try:
        here = Path.cwd()
    except OSError:  # it is gone
        return str(path)
    return str(path.relative_to(here)) if here in path.parents and here != here.parent else str(path)


def check_there(config: Config) -> None:
    """UserError if a run's pictures are not where its config has them; shards and CIFAR have errors of their own."""
    data = config.data
    own = data.dataset == "webdataset" or data.dataset.startswith("cifar")
    if data.data_dir and not (own or os.path.exists(data.data_dir)):
        raise UserError(
            f"{data.data_dir}: no such folder of pictures; if they moved, --data-dir says where they lie now"
        )


def moved(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with `changes`; lists that lay below data_dir are taken from the new one if they are there."""
    old, new, found = config.data.data_dir or "", changes.get("data_dir") or "", {}
    for name in LISTS if old and new else ():
        value = getattr(config.data, name)
        if value and Path(value).is_relative_to(old):
            place = Path(new, Path(value).relative_to(old))
            if place.exists():
                found[name] = str(place)
    return config.with_(**{**found, **changes})
