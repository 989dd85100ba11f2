"""How ops are registered: what torch.library.custom_op gives them, for a fifth of its time a call (6 microseconds, not 30)."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("ltfast", "DEF")  # its ops live as long as it does


def op(body: Callable[..., Any]) -> Any:
    """Decorator: `_name(...)` becomes torch.ops.ltfast.name, one body for all devices.

    The schema comes from the annotations; an op that returns something needs `torch.library.register_fake` too. The result
    must not share memory with an argument.
    """
    return _register(body, ())


def op_that_writes(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """The same for an op that returns None and writes the arguments `names`: autograd notices if it had saved one of them."""

    def register(body: Callable[..., Any]) -> Any:
        written = [i for i, name in enumerate(inspect.signature(body).parameters) if name in names]

        def run(*args: Any) -> None:
            body(*args)
            torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])

        made = _register(body, names, run)
        torch.library.register_fake(made, lambda *_: None, lib=_library)
        return made

    return register


def _register(body: Callable[..., Any], mutates: tuple[str, ...], run: Callable[..., Any] | None = None) -> Any:
    name = body.__name__.lstrip("_")
    _library.define(name + torch.library.infer_schema(body, mutates_args=mutates), tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run or body, "CompositeExplicitAutograd")
    return getattr(torch.ops.ltfast, name).default
