"""How ops are registered: what torch.library.custom_op gives them, without the Python that it runs at every call."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("ltfast", "DEF")  # its ops live as long as it does


def op(*writes: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `_name(...)` becomes torch.ops.ltfast.name, one body for all devices; the schema comes from annotations.

    torch.compile finds graphs on disk by the names of their ops alone: one whose result changes in shape, strides or meaning,
    or that of an op in its backward, needs another name.

    Args:
        writes: arguments that are written; the op then returns None, and autograd notices if it had saved one of them.
            One without needs `torch.library.register_fake` too, and its result must not share memory with an argument.
    """

    def register(body: Callable[..., Any]) -> Any:
        name = body.__name__.lstrip("_")
        written = [i for i, argument in enumerate(inspect.signature(body).parameters) if argument in writes]

        def run(*args: Any) -> None:
            body(*args)
            torch.autograd.graph.increment_version([args[i] for i in written if args[i] is not None])

        schema = name + torch.library.infer_schema(body, mutates_args=writes)
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run if written else body, "CompositeExplicitAutograd")
        if written:
            torch.library.register_fake(f"ltfast::{name}", lambda *_: None, lib=_library)
        return getattr(torch.ops.ltfast, name).default

    return register
