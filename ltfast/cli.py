"""The command `ltfast` and its train, doctor, bench, methods and datasets. A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ltfast
from ltfast.cli_data import add_data_commands
from ltfast.cli_runs import add_run_commands, print_result
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
    nearest,
)
from ltfast.errors import UserError

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


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line; options are written out in full."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def innermost(self, args: argparse.Namespace) -> Parser:
        """The parser of the command, and of its verb, that was given."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and getattr(args, action.dest):
                chosen: Parser = action.choices[getattr(args, action.dest)]
                return chosen.innermost(args)
        return self

    def error(self, message: str) -> Any:
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized.*?(--[^ =]+)", message)
        known = [word for action in self._actions for word in (*action.option_strings, *(action.choices or ()))]
        hint = nearest(wrong[1] or wrong[2], known) if wrong else ""
        raise UserError(f"{message}{hint}; see `{self.prog} --help`")


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
    kind = base_type(name)
    try:
        return check(name, kind(text))
    except UserError:
        raise
    except ValueError:
        raise UserError(f"{flag(name)} {text}: needs a number ({kind.__name__})") from None


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="ltfast", description=ltfast.__doc__)
    parser.add_argument("--version", action="version", version=ltfast.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

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
    train.add_argument("--recipe", default=None, metavar="NAME", help="a named recipe: cifar10-lt-speedrun")
    train.add_argument("--config", default=None, metavar="FILE", help="TOML file of settings; flags override it")
    train.add_argument("--resume", default=None, metavar="RUN", help="continue this run folder")
    train.add_argument(
        "--dry-run", action="store_true", help="print the plan (steps, learning rate, memory, FLOPs) and stop"
    )
    add_config_flags(train)
    train.set_defaults(run=command_train)

    add_run_commands(commands)
    data = commands.add_parser("data", help="check, count and look at a data set")
    add_data_commands(data)

    doctor = commands.add_parser("doctor", help="check this machine: versions, GPUs, disk, memory, kernels")
    doctor.add_argument("--dir", default=".", help="folder whose disk is measured: where runs go [.]")
    doctor.add_argument("--data-dir", default=None, help="folder or pack of pictures whose reading is measured")
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=command_doctor)

    bench = commands.add_parser("bench", help="run the benchmarks of a source checkout within a time budget")
    bench.add_argument("--budget", type=float, default=540.0, metavar="X", help="time limit in seconds [540]")
    bench.add_argument("--device", choices=("cuda", "cpu"), default=None, help="device [cuda if there is one]")
    bench.add_argument("--data", default=None, metavar="PATH", help="CIFAR-10 folder or .npz pack, for accuracy")
    bench.add_argument("--pictures", default=None, metavar="PATH", help="tar or folder of JPEGs, for input pipelines")
    bench.add_argument("--peer", action="append", default=[], metavar="NAME=PATH", help="other code to compare with")
    bench.set_defaults(run=command_bench)

    commands.add_parser("methods", help="list the methods").set_defaults(run=command_methods)
    commands.add_parser("datasets", help="list the datasets").set_defaults(run=command_datasets)
    return parser


def command_train(args: argparse.Namespace) -> int:
    from ltfast import launch
    from ltfast.progress import outlive_readers
    from ltfast.recipes import build_config, method_values, named_recipe
    from ltfast.runs import RunFolder, fresh_folder
    from ltfast.unread import unread

    outlive_readers()
    flags = {name: parsed(name, value) for name, value in vars(args).items() if name in FIELDS}
    if args.resume:
        if "gpus" in flags or "procs" in flags:  # one of them takes the place of the other, too
            flags = {"gpus": -1, "procs": 0, **flags}
        if flags.keys() - RESUME_OPTIONS or args.method or args.config or args.recipe:
            options = ", ".join(map(flag, sorted(RESUME_OPTIONS)))
            raise UserError(
                f"--resume: continues the run with its own settings; only these may be given anew: {options}; to train on with others: "
                "--weights RUN/checkpoints/last.safetensors"
            )
        config = Config() if launch.launched() else RunFolder.open(args.resume).config.with_(**flags)
    else:
        values = load_toml(args.config) if args.config else {}
        fields = flatten(values, args.config or "")
        named = named_recipe(args.recipe) if args.recipe else (DEFAULT_DATASET, DEFAULT_METHOD, {})
        dataset = flags.pop("dataset", None) or fields.pop("dataset", named[0])
        method = args.method or values.get("method", named[1])
        if args.method:  # a flag goes before the file: what the file's own method was made of must not come back in
            fields = {name: fields[name] for name in fields.keys() - method_values(method).keys()}
        config = build_config(dataset, method, {**named[2], **fields}, flags)
        usual = build_config(dataset, method, named[2], flags).to_dict()  # a run's config.toml holds every setting
        chosen = [name for name, value in fields.items() if usual[FIELDS[name][0]].get(name) != value]
        idle = unread(config, [*chosen, *flags])
        if idle and not launch.launched():
            print(f"note: no effect with {config.method}: {', '.join(map(flag, idle))}")
    for name in ("gpus", "procs"):
        launch.check_count(name, flags.get(name, getattr(config.run, name)))
    config = launch.on_cpu(config, resumed=bool(args.resume))
    if args.dry_run:
        from ltfast.plan import print_plan

        print_plan(config, resumed=bool(args.resume))
        return 0
    count = launch.process_count(config)
    if count > 1 and not launch.launched():
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
    return train_here(config, launch.restarted_run(config, args.resume), flags if args.resume else {})


def train_here(config: Config, resume: str | None, changes: dict[str, Any]) -> int:
    """Train in this process, alone or as one of several."""
    from ltfast import dist, launch

    launch.end_with_launcher()
    ranks = dist.start()
    try:
        code = train_as(ranks, config, resume, changes)
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
        if ranks.world == 1 or not dist.lost_peer(error):
            raise
        if not launch.message_left():
            print(f"ltfast: process {ranks.rank} ends because another one is gone", file=sys.stderr)
        return 1
    return 0


def command_doctor(args: argparse.Namespace) -> int:
    from ltfast.doctor import examine, print_findings

    findings = examine(args.dir, args.data_dir)
    if args.json:
        print(json.dumps([f._asdict() for f in findings]))
    else:
        print_findings(findings)
    return int(any(f.level == "fail" for f in findings))


def command_bench(args: argparse.Namespace) -> int:
    import subprocess
    from pathlib import Path

    if not args.budget >= 0:
        raise UserError(f"--budget {args.budget:g}: give seconds, 0 or more (0 prints the plan)")
    script = Path(ltfast.__file__).resolve().parent.parent / "benchmarks" / "run.py"
    if not script.exists():
        raise UserError(
            "bench: the benchmarks are part of the source checkout, not of the installed package; run it there"
        )
    words = [sys.executable, str(script), "--budget", str(args.budget)]
    for name in ("device", "data", "pictures"):
        words += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    return subprocess.run([*words, *(word for peer in args.peer for word in ("--peer", peer))]).returncode


def command_methods(args: argparse.Namespace) -> int:
    from ltfast.recipes import ALIASES, BASES, SHARPNESS_SOURCES

    print(
        "A method joins a base loss (bcl if not named), at most one sharpness rule, and gkp: balanced-softmax+sam+gkp.\n"
    )
    for title, rows in (
        ("base losses", {k: v[1] for k, v in BASES.items()}),
        ("sharpness rules", SHARPNESS_SOURCES),
        (
            "knowledge",
            {"gkp": "grouped knowledge preservation: Fisher-weighted anchors of class groups (Chen et al., CVPR 2026)"},
        ),
        ("short names", ALIASES),
    ):
        print(title)
        for name, text in rows.items():
            print(f"  {name:18} {text}")
    return 0


def command_datasets(args: argparse.Namespace) -> int:
    from ltfast.data import DATASETS

    for name, info in DATASETS.items():
        print(f"{name:14} {info.description}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not end a command
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        parser = build_parser()
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            parser.innermost(args).error(f"unrecognized arguments: {' '.join(unknown)}")
        args.words = list(sys.argv[1:] if argv is None else argv)
        if args.command is None:
            parser.print_help()
            return 0
        return int(args.run(args))
    except UserError as error:
        from ltfast import launch

        return launch.report(error)
    except KeyboardInterrupt:  # before or after training; in it, a checkpoint comes first
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a file or folder that nobody before could say more about
        from ltfast import launch

        if launch.launched() or error.strerror is None:
            raise  # a worker's may pass: it is started again
        where = f"{error.filename}: " if error.filename is not None else ""
        return launch.report(UserError(f"{where}{error.strerror}"))
