"""The public surface, listed in api.txt: a change to a name, a signature, a default or a flag must be made there as well.

LTFAST_WRITE_API=1 pytest tests/docs/test_api.py      # writes the list anew; review the difference, and CHANGELOG.md
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ltfast
from ltfast.cli import build_parser

LISTED = Path(__file__).with_name("api.txt")
MODULES = ("ltfast", "ltfast.optim", "ltfast.kernels", "ltfast.losses", "ltfast.models")
HEAD = (
    "# The public surface of ltfast, written and checked by tests/docs/test_api.py. Names that are not here may change."
)


def signature(thing: Any) -> str:
    """Parameters with kinds and defaults, without annotations (they are mypy's business)."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty)).replace("<factory>", "...")


def public_names(module: Any) -> list[str]:
    """__all__, or what the module itself defines."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    own = [
        n for n, v in vars(module).items() if not n.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]
    return sorted(own)


def members(kind: type) -> Iterator[str]:
    """Public methods and properties that a class or its bases within ltfast define."""
    for name in sorted(dir(kind)):
        owner = next((c for c in kind.__mro__ if name in vars(c)), None)
        if name.startswith("_") or owner is None or not owner.__module__.startswith("ltfast"):
            continue
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property):
            yield f".{name}"
        elif callable(value):
            yield f".{name}{signature(value)}"


def library() -> Iterator[str]:
    """One line a name, and one a method."""
    yield f"ltfast.__version__: {type(ltfast.__version__).__name__}"
    for path in MODULES:
        module = importlib.import_module(path)
        for name in public_names(module):
            thing = getattr(module, name)
            yield f"{path}.{name}{signature(thing) if callable(thing) else ''}"
            if inspect.isclass(thing):
                yield from (f"{path}.{name}{member}" for member in members(thing))


def flags(parser: argparse.ArgumentParser, prefix: str) -> Iterator[str]:
    """One line an option or argument of a command and of its verbs: names, default, choices."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, verb in action.choices.items():
                yield f"{prefix} {name}"
                yield from flags(verb, f"{prefix} {name}")
        elif action.dest != "help":
            default = "" if action.default in (None, argparse.SUPPRESS) else f" = {action.default!r}"
            choices = f" of {', '.join(map(str, action.choices))}" if action.choices else ""
            yield f"{prefix} {'|'.join(action.option_strings) or action.dest.upper()}{default}{choices}"


def surface() -> str:
    """The whole list."""
    return "\n".join([HEAD, *library(), *flags(build_parser(), "ltfast")]) + "\n"


def test_public_surface_changes_only_on_purpose() -> None:
    now = surface()
    if os.environ.get("LTFAST_WRITE_API"):
        LISTED.write_text(now)
    before = LISTED.read_text()
    changes = "\n".join(difflib.unified_diff(before.splitlines(), now.splitlines(), "listed", "now", lineterm="", n=0))
    assert not changes, (
        f"{changes}\nIf meant: LTFAST_WRITE_API=1 pytest {Path(__file__).name}, and a line in CHANGELOG.md"
    )


def test_a_changed_signature_or_flag_would_be_seen(monkeypatch: Any) -> None:
    import ltfast.kernels

    def gram(grads_GN: Any, theta_N: Any, adaptive: bool = True) -> None: ...

    before = surface()
    monkeypatch.setattr(ltfast.kernels, "gram", gram)
    changed = set(surface().splitlines()) ^ set(before.splitlines())
    assert len(changed) == 2
    assert all(line.startswith("ltfast.kernels.gram(") for line in changed)


def test_names_that_the_design_fixes_are_listed() -> None:
    text = LISTED.read_text()
    for piece in (
        "ltfast.kernels.gram(grads_GN, theta_N, adaptive=False)",
        "ltfast.kernels.perturb(theta_N, grads_GN, coef_G, adaptive=False",
        "ltfast.kernels.sgd_step(theta_N, grad_N, momentum_N, lr, momentum=0.0",
        "ltfast.kernels.collapse_anchors(anchors_GN, fishers_GN, coef_G)",
        "ltfast.optim.SAM(params, base_optimizer, rho=0.05, adaptive=False, **",
        "ltfast.optim.GSA(params, base_optimizer, counts, ",
        "ltfast train --resume",
        "ltfast eval --json",
        "ltfast report --max-minutes",
    ):
        assert piece in text, piece


def test_types_are_declared() -> None:
    """py.typed lies in the package, and every public function has complete annotations."""
    assert (Path(ltfast.__file__).parent / "py.typed").exists()
    for path in MODULES[1:]:
        module = importlib.import_module(path)
        for name in public_names(module):
            thing = getattr(module, name)
            if inspect.isfunction(thing):
                found = inspect.signature(thing)
                bare = [p.name for p in found.parameters.values() if p.annotation is inspect.Parameter.empty]
                assert not bare, f"{path}.{name}: {bare} without a type"
                assert found.return_annotation is not inspect.Signature.empty, f"{path}.{name} returns what?"
