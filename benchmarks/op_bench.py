"""What the kernel benchmarks share: implementations side by side in one run, counted and timed.

On a GPU every implementation is timed by device events after a warm-up, as Python calls it (seconds) and behind a queue that
hides the launching (device_seconds); on a CPU, at the larger size, all of a case in turns. share_of_copy compares the device's
own time with a copy of the same size measured in the same run. Counted at any size: kernels, parameter-sized passes and bytes
an element.
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
CPU_SIZES = (100_000, 25_600_000)  # counted; counted and timed
CPU_ROUNDS = 7
LEAST_TIMED = 1_000_000  # below that a CPU shows its overhead and caches
# Operators that do not read what they write over.
WRITE_ONLY = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_")
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


class DispatchCounter(TorchDispatchMode):
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
    with counting() as ours, DispatchCounter() as other:
        call()
    if ours.ops:
        return Counted(ours.kernels, ours.passes, ours.bytes / n)
    return Counted(other.kernels, other.elements / n, other.bytes / n)


def compiled(function: Callable) -> Callable:
    """torch.compile for the baseline, shapes static."""
    return torch.compile(function, dynamic=False)


def run(
    op: str,
    make: Callable[[int, str], Iterator[Case]],
    description: str | None,
    gpu_sizes: tuple[int, ...] = GPU_SIZES,
    cpu_sizes: tuple[int, ...] = CPU_SIZES,
) -> None:
    """Command line of one benchmark script: `make(n, device)` yields its cases."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help=f"elements N (default: {gpu_sizes}; on a CPU {cpu_sizes})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="ltfast and only these beside it (eager, ...)")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/kernels.jsonl")
    arguments = parser.parse_args()
    on_gpu = arguments.device.startswith("cuda")
    print(LINE.format("case", "kernels", "passes", "B/element", "us", "GB/s", "of copy"))
    for n in arguments.sizes or (gpu_sizes if on_gpu else cpu_sizes):
        for case in make(n, arguments.device):
            wanted = ("ltfast", *(arguments.only or case.calls))
            calls = {k: call for k, call in case.calls.items() if k in wanted and (on_gpu or k != "compiled")}
            times = {} if on_gpu or n < LEAST_TIMED else in_turns(calls)
            for name, call in calls.items():
                report(op, case, name, call, arguments.device, times.get(name, {}), arguments.write)


def in_turns(calls: dict[str, Callable[[], Any]]) -> dict[str, dict[str, harness.Timing]]:
    """Times of every implementation on a CPU, and their ratios to ours."""
    for call in calls.values():
        call()
    return harness.compared(harness.in_turns(calls, CPU_ROUNDS, {}), "ltfast", "ltfast")


def report(
    op: str,
    case: Case,
    name: str,
    call: Callable[[], Any],
    device: str,
    times: dict[str, harness.Timing],
    write: bool,
) -> None:
    """Count and time one implementation of one case; print a line and append its rows.

    times: measured before, by metric; on a GPU they are measured here.
    """
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
        times = {"seconds": harness.time_call(call), "device_seconds": harness.device_time(call)}
    if times:
        time, copy = times.get("device_seconds", times["seconds"]), harness.copy_bandwidth(device, case.n)
        shares = (useful / seconds / copy for seconds in (time.median, time.p80, time.p20))
        for metric, t in {**times, "share_of_copy": harness.Timing(*shares, time.n)}.items():
            rows[metric] = (t.median, {"n": t.n, "p20": t.p20, "p80": t.p80})
        speed = [f"{1e6 * time.median:.1f}", f"{useful / time.median / 1e9:.0f}", f"{rows['share_of_copy'][0]:.2f}"]
    print(LINE.format(label, *cells, *speed), flush=True)
    if write:
        for metric, (value, extra) in rows.items():
            harness.append_row("kernels", label, metric, value, config={"n": case.n, "case": case.name}, **extra)
