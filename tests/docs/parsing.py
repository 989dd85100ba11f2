"""Whether a command's words would be understood, without running it. Each function raises what makes them wrong."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import tomllib
from collections.abc import Sequence
from typing import Any

import pytest

from ltfast.cli import build_parser
from ltfast.cli_train import parsed
from ltfast.config import DEFAULT_DATASET, DEFAULT_METHOD, FIELDS
from ltfast.recipes import build_config, named_recipe
from tests.docs.blocks import ROOT


class Understood(Exception):
    """A script's parser took the words."""


def check(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises if the program would refuse these words."""
    program, *rest = words
    if program == "ltfast":
        check_ltfast(rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(list(rest))
        assert args.module
        assert args.training_script == "ltfast"
        check_ltfast(args.training_script_args)
    elif program == "pip":
        check_extras(words[-1])
    elif program == "pytest":
        check_pytest(rest)
    else:
        check_script(rest, monkeypatch)


def check_ltfast(words: Sequence[str]) -> None:
    """The command's parser, and for a training run the whole config."""
    if len(words) == 1:  # only named: `ltfast report`
        assert f"\n    {words[0]} " in build_parser().format_help()
        return
    args = build_parser().parse_args(list(words))
    if args.command == "train" and not args.resume:
        flags = {name: parsed(name, value) for name, value in vars(args).items() if name in FIELDS}
        named = named_recipe(args.recipe) if args.recipe else (DEFAULT_DATASET, DEFAULT_METHOD, {})
        build_config(flags.pop("dataset", named[0]), args.method or named[1], named[2], flags)


def check_extras(requirement: str) -> None:
    """.[a,b]: the extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\w+", requirement)) <= set(extras)


def check_pytest(words: Sequence[str]) -> None:
    """Files exist, markers are declared."""
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    for option, value in zip(words, [*words[1:], ""], strict=False):
        if option == "-m":
            assert set(re.findall(r"\w+", value)) - {"not", "and", "or"} <= {m.split(":")[0] for m in markers}
        elif "/" in option:
            assert (ROOT / option.split("::")[0]).exists(), option


def check_script(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/x.py or -m benchmarks.x: its own parser reads the words, and nothing more of it runs."""
    name, rest = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    name = name.removesuffix(".py").replace("/", ".").removeprefix("benchmarks.")
    source = ROOT / "benchmarks" / f"{name}.py"
    if "argparse" not in source.read_text() and "op_bench" not in source.read_text():
        assert not rest, f"{source.name} takes no options"
        return
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT))
    original = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        original(self, *args, **kwargs)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [str(source), *rest])
    with pytest.raises(Understood):
        runpy.run_path(str(source), run_name="__main__")
