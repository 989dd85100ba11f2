"""`ltfast train`: its flags, the config that they make, and the process or processes that train by it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

from ltfast.cli_runs import print_result
from ltfast.config import (
    DEFAULT_DATASET,
    DEFAULT_METHOD,
    FIELDS,
    SECTIONS,
    Config,
    base_type,
    check,
    flag,
    flatten,
    load_toml,
)
from ltfast.errors import UserError
from ltfast.recipes import NAMED, RECIPES, build_config, method_values, named_recipe

if TYPE_CHECKING:
    from ltfast.dist import Ranks

TOPICS = {
    "data": "data", "model": "network", "loss": "base loss", "sharpness": "sharpness (overrides of the method's rule)",
    "preserve": "memory bank, groups and GKP", "optim": "descent", "run": "run",
}  # fmt: skip

# What a resumed run may be given anew: where and how long it runs, not what it computes.
RESUME_OPTIONS = {
    "gpus",
    "procs",
    "max_restarts",
    "max_hours",
    "max_bad_steps",
    "checkpoint_minutes",
    "keep_checkpoints",
    "data_dir",
    "train_list",
    "val_list",
    "test_list",
    "exclude_list",
    "workers",
    "on_bad_image",
}


def add_train_command(commands: Any) -> None:
    """Add train to the commands of the parser."""
    train = commands.add_parser(
        "train",
        help="train a model",
        description=f"Train a model; with no argument, {DEFAULT_METHOD} on {DEFAULT_DATASET}.",
    )
    train.usage = "ltfast train [--dataset NAME] [--method NAME] [--data-dir PATH] [options]"
    train.epilog = (
        "[value]: the default unless the dataset's recipe or the method sets another (digits-lt: resnet8, 60 epochs, cosine; "
        "folder, list and webdataset: resnet50, 90 epochs, lr 0.1, cosine, no warm-up). --dry-run prints the most important "
        "of them, a run's config.toml all. Later wins: defaults, recipe, method, --config, flags."
    )
    train.add_argument("--method", default=None, help=f"method name, see `ltfast methods` [{DEFAULT_METHOD}]")
    train.add_argument("--recipe", default=None, metavar="NAME", help=f"a named recipe: {', '.join(NAMED)}")
    train.add_argument("--config", default=None, metavar="FILE", help="TOML file of settings; flags override it")
    train.add_argument("--resume", default=None, metavar="RUN", help="continue this run folder")
    train.add_argument(
        "--dry-run", action="store_true", help="print the plan (steps, learning rate, memory, FLOPs) and stop"
    )
    add_config_flags(train)
    train.set_defaults(run=command_train)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for every config field, grouped by topic."""
    groups = {name: parser.add_argument_group(TOPICS[name]) for name in SECTIONS}
    for name, (section, field) in FIELDS.items():
        kind, paper = base_type(name), field.metadata["paper"]
        default = "" if field.default is None else f" [{str(field.default).lower() if kind is bool else field.default}]"
        choices = ", ".join(field.metadata["choices"])
        text = (
            field.metadata["help"]
            + (f": {choices}" if choices else "")
            + default
            + (f" (paper: {paper})" if paper else "")
        )
        flags = list(dict.fromkeys((flag(name).lower(), flag(name))))
        common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            groups[section].add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
        else:
            groups[section].add_argument(*flags, metavar="X" if kind in (int, float) else "NAME", **common)


def parsed(name: str, text: Any) -> Any:
    """A flag's text as the field's type."""
    if not isinstance(text, str):
        return text
    if not text and name != "weights":  # which is none then
        raise UserError(f"{flag(name)}: is empty; give it a value or leave it out")
    kind = base_type(name)
    try:
        return check(name, kind(text))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{flag(name)} {text}: needs a number ({kind.__name__})") from None


def command_train(args: argparse.Namespace) -> int:
    from ltfast import launch
    from ltfast.progress import outlive_readers

    outlive_readers()
    flags = {name: parsed(name, value) for name, value in vars(args).items() if name in FIELDS}
    if args.resume and ("gpus" in flags or "procs" in flags):  # one of them takes the place of the other, too
        flags = {"gpus": -1, "procs": 0, **flags}
    config = resumed_config(args, flags) if args.resume else new_config(args, flags)
    for name in ("gpus", "procs"):
        launch.check_count(name, flags.get(name, getattr(config.run, name)))
    config = launch.on_cpu(config, resumed=bool(args.resume))
    if args.dry_run:
        from ltfast.plan import print_plan

        print_plan(config, resumed=bool(args.resume))
        return 0
    count = launch.process_count(config)
    if count > 1 and not launch.launched():
        return train_in_processes(count, args, config, flags)
    return train_here(config, args.resume, flags if args.resume else {})


def resumed_config(args: argparse.Namespace, flags: dict[str, Any]) -> Config:
    """The config of the run to be continued; a worker gets it from rank 0 later.

    Raises:
        UserError: another setting than those of RESUME_OPTIONS is given.
    """
    from ltfast import launch
    from ltfast.runs import RunFolder

    if flags.keys() - RESUME_OPTIONS or args.method or args.config or args.recipe:
        options = ", ".join(map(flag, sorted(RESUME_OPTIONS)))
        raise UserError(
            f"--resume: continues the run with its own settings; only these may be given anew: {options}; to train on with others: "
            "--weights RUN/checkpoints/last.safetensors"
        )
    return Config() if launch.launched() else RunFolder.open(args.resume).resumed_config.with_(**flags)


def new_config(args: argparse.Namespace, flags: dict[str, Any]) -> Config:
    """The config of a new run, from recipe, method, --config and flags; a note says which of them do nothing."""
    from ltfast import launch
    from ltfast.unread import unread

    flags = dict(flags)
    values = load_toml(args.config) if args.config else {}
    fields = flatten(values, args.config or "")
    named = named_recipe(args.recipe) if args.recipe else (DEFAULT_DATASET, DEFAULT_METHOD, {})
    dataset = flags.pop("dataset", None) or fields.pop("dataset", named[0])
    method = args.method or values.get("method", named[1])
    if args.method:  # a flag goes before the file: what the file's own method was made of must not come back in
        fields = {name: fields[name] for name in fields.keys() - method_values(method).keys()}
    config = build_config(dataset, method, {**named[2], **fields}, flags)
    # A run's config.toml holds every setting: those that only say what would be so without it are not chosen.
    usual = Config().with_(**{**RECIPES[dataset](), **method_values(method), **named[2], **flags}).to_dict()
    chosen = [name for name, value in fields.items() if usual[FIELDS[name][0]].get(name) != value]
    idle = unread(config, [*chosen, *flags])
    if idle and not launch.launched():
        print(f"note: no effect with {config.method}: {', '.join(map(flag, idle))}")
    return config


def train_in_processes(count: int, args: argparse.Namespace, config: Config, flags: dict[str, Any]) -> int:
    """Start this command again as `count` processes and wait for them; returns the exit code."""
    from ltfast import launch
    from ltfast.runs import fresh_folder

    fresh = None if args.resume or config.run.out else fresh_folder(config)
    out = args.resume or config.run.out or str(fresh)
    words = ["train", "--resume", out, *launch.words(flags)] if args.resume else [*args.words, "--out", out]
    try:
        return launch.launch(
            count, words, out=out, max_restarts=config.run.max_restarts, cpu=config.run.device == "cpu"
        )
    finally:
        if fresh:
            with contextlib.suppress(OSError):  # it is empty if the run never began
                fresh.rmdir()


def train_here(config: Config, resume: str | None, changes: dict[str, Any]) -> int:
    """Train in this process, alone or as one of several; `resume` is a run to continue."""
    from ltfast import dist, launch

    launch.end_with_launcher()
    launch.end_after_mistake()
    ranks = dist.start()
    try:
        code = train_as(ranks, config, launch.restarted_run(config, resume), changes)
    except BaseException as error:
        if not dist.leaves_together():
            dist.stop()
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        if isinstance(error, UserError):
            code = launch.report(error)
        elif isinstance(error, Exception):
            traceback.print_exc()
    if code and dist.leaves_together():  # the others wait for this process, and leaving in order would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    dist.stop()
    return code


def train_as(ranks: Ranks, config: Config, resume: str | None, changes: dict[str, Any]) -> int:
    """Train as one of `ranks`; returns the exit code."""
    from pathlib import Path

    from ltfast import dist, launch
    from ltfast.places import short
    from ltfast.progress import ConsoleProgress, Progress
    from ltfast.speedrun import TableProgress
    from ltfast.train import train

    try:
        progress = (TableProgress() if config.run.table else ConsoleProgress()) if ranks.main else Progress()
        result = train(config, resume=resume, changes=changes, ranks=ranks, progress=progress)
        if ranks.main and "stopped" in result:
            print(f"continue with: ltfast train --resume {short(Path(result['folder']))}")
        elif ranks.main:
            if isinstance(progress, TableProgress):
                progress.finish(result)
            print_result(result)
        if ranks.main:
            launch.tell_ended()
    except RuntimeError as error:
        if ranks.world == 1 or (why := dist.lost_peer(error)) is None:
            raise
        if not launch.message_left():
            print(f"ltfast: process {ranks.rank} ends {why}", file=sys.stderr)
        return 1
    return 0
