"""The command `ltfast`, with doctor, bench, methods and datasets; the others stand in cli_*.py. A user's mistake is one line on
stderr and exit code 2."""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import ltfast
from ltfast.cli_data import add_data_commands
from ltfast.cli_runs import add_run_commands
from ltfast.cli_train import add_train_command
from ltfast.config import nearest
from ltfast.errors import UserError


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


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="ltfast", description=ltfast.__doc__)
    parser.add_argument("--version", action="version", version=ltfast.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    add_train_command(commands)
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
