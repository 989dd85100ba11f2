"""What the kernel benchmarks share: implementations side by side in one run, timed on a GPU, counted anywhere.

On a GPU every implementation is timed (device events, 50 repetitions after a warm-up) and compared with a copy of the same
size measured in the same run. On a CPU nothing is timed: kernels, parameter-sized passes and bytes an element are counted.
Kernels and passes of a baseline are counted from the operators it dispatches (a foreach operator counts as one, though
CUDA may launch it in chunks); torch.compile's are not counted, it fuses them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ltfast.kernels import counting

GPU_SIZES = (25_600_000, 100_000_000)  # ResNet-50, and a model four times its size
CPU_SIZES = (100_000,)
WRITE_ONLY = (
    "copy_",
    "fill_",
    "zero_",
    "_foreach_copy_",
    "_foreach_zero_",
)  # operators that do not read what they write over
LINE = "{:42s} {:>8s} {:>7s} {:>9s} {:>10s} {:>10s} {:>8s}"


class Case(NamedTuple):
    """One problem and the implementations that solve it, ours under the name "ltfast"."""

    name: str
    n: int
    calls: dict[str, Callable[[], Any]]


class Counted(NamedTuple):
    """Kernels launched, passes over an [N] array, bytes an element."""

    kernels: int
    passes: float
    bytes: float


class _DispatchCounter(TorchDispatchMode):
    """Counts operators that launch a kernel and the elements they read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.elements, self.bytes = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if aliases or func.namespace != "aten" or "empty" in func.__name__ or "detach" in func.__name__:
            return result
        self.kernels += 1
        named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        if "grads" in written and named.get("grad_scale") is None:
            written.remove("grads")  # torch's fused optimizers write the gradients only to unscale them
        read = {k: v for k, v in named.items() if not (k == "self" and func.__name__.split(".")[0] in WRITE_ONLY)}
        moved = [read, [named[name] for name in written] if written else result]
        for tensor in tree_leaves(moved):
            if isinstance(tensor, Tensor):
                self.elements += tensor.numel()
                self.bytes += tensor.nbytes
        return result


def count_call(call: Callable[[], Any], n: int) -> Counted:
    """Kernels, passes and bytes an element of one call: declared by our ops, dispatched operators for anything else."""
    call()  # an optimizer's first step also makes its state
    with counting() as ours, _DispatchCounter() as other:
        call()
    if ours.ops:
        return Counted(ours.kernels, ours.passes, ours.bytes / n)
    return Counted(other.kernels, other.elements / n, other.bytes / n)


def compiled(function: Callable) -> Callable:
    """torch.compile for the baseline, shapes static."""
    return torch.compile(function, dynamic=False)


def run(op: str, make: Callable[[int, str], Iterator[Case]], description: str | None) -> None:
    """Command line of one benchmark script: `make(n, device)` yields its cases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="parameters N (default: 25.6M and 100M; 100k on a CPU)")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/kernels.jsonl")
    arguments = parser.parse_args()
    timed = arguments.device.startswith("cuda")
    print(LINE.format("case", "kernels", "passes", "B/element", "us", "GB/s", "of copy"))
    for n in arguments.sizes or (GPU_SIZES if timed else CPU_SIZES):
        for case in make(n, arguments.device):
            for name, call in case.calls.items():
                if timed or name != "compiled":
                    report(op, case, name, call, arguments.device, arguments.write)


def report(op: str, case: Case, name: str, call: Callable[[], Any], device: str, write: bool) -> None:
    """Count and, on a GPU, time one implementation of one case; print a line and append its rows."""
    label = f"{op}/{name}/{case.name}/N={case.n}"
    useful = count_call(case.calls["ltfast"], case.n).bytes * case.n  # every implementation must move at least these
    rows: dict[str, tuple[float, dict[str, Any]]] = {}
    cells = ["", "", ""]
    if name != "compiled":
        counted = count_call(call, case.n)
        cells = [str(counted.kernels), f"{counted.passes:.1f}", f"{counted.bytes:.1f}"]
        rows = {"kernels": (counted.kernels, {}), "passes": (round(counted.passes, 2), {})}
    speed = ["-", "-", "-"]
    if device.startswith("cuda"):
        time = harness.time_call(call)
        copy = harness.copy_bandwidth(device, case.n)
        shares = [useful / seconds / copy for seconds in (time.median, time.p80, time.p20)]
        rows["seconds"] = (time.median, {"n": time.n, "p20": time.p20, "p80": time.p80})
        rows["share_of_copy"] = (shares[0], {"n": time.n, "p20": shares[1], "p80": shares[2]})
        speed = [f"{1e6 * time.median:.1f}", f"{useful / time.median / 1e9:.0f}", f"{shares[0]:.2f}"]
    print(LINE.format(label, *cells, *speed))
    if write:
        for metric, (value, extra) in rows.items():
            harness.append_row("kernels", label, metric, value, config={"n": case.n, "case": case.name}, **extra)
