"""Whole training steps beside other people's: forward, backward and update, counted and timed in turns.

    python benchmarks/peer_steps.py --peer release=GKP-GSA --peer davda54=SAM --peer timm=TIMM/train.py --write
    python benchmarks/peer_steps.py --only ltfast/bcl ltfast/gkp-gsa

One network, one batch of CIFAR-sized pictures, four groups, float32, eager; only the step differs. On a GPU our steps stand there
as `ltfast train` takes them, too (",trained": compiled, recorded, bf16). Steps with plain cross-entropy see one view, those with
balanced contrastive learning (bcl) three. Counted on the CPU, a mean over one period of the method:
    kernels         operators dispatched; ours: kernels launched on a GPU plus operators dispatched
    gflops          of convolutions and matrix products;  flops_vs_sgd: over those of our plain step with the same loss
    gigabytes       read and written by those operators
    syncs_per_step  calls that hand a number to the host or carry one over
    peak_mib        of memory taken during a step beyond what lives between steps
Timed on any device, all in turns: seconds of a step and their ratio to our plain step with the same loss in the same round;
on a GPU peak_mib as its allocator saw it.
Other code is given by path or used where its package is installed (see peers.py): the released train() and timm's
train_one_epoch() are called as they are; only their surroundings are made here. With --write, what this commit has rows of
already is not counted again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import harness  # noqa: E402
import op_bench  # noqa: E402
import peer_tables  # noqa: E402
import peers  # noqa: E402
from peer_code import composer_steps, release_steps, timm_steps  # noqa: E402
from peer_setting import GROUPS, METHODS, TRAINED, Setting  # noqa: E402

from ltfast.kernels import counting  # noqa: E402
from tests.peak import peak_bytes  # noqa: E402
from tests.syncs import Waits  # noqa: E402

WARM_UP = 2  # steps: state is made in the first
RECORDED = 64  # steps until every branch of a period of 16 has been recorded
CE, BCL = "ce", "bcl"


@dataclass
class Contender:
    """One way to take a step.

    Attributes:
        name: of the row. base: loss it minimises, "ce" or "bcl". run: takes so many steps.
        period: steps after which its cost repeats. around: run(n) does more than n steps (an epoch's bookkeeping).
    """

    name: str
    base: str
    run: Callable[[int], object]
    period: int = 1
    around: bool = False


class OneLoss(peers.Losses):
    """A real loss in the place of the stand-ins."""

    def __init__(self, loss: Callable[[], torch.Tensor]) -> None:
        self.loss, self.stock = loss, []

    def __call__(self, k: int = 0) -> torch.Tensor:
        return self.loss()


def repeated(step: Callable[[], object]) -> Callable[[int], None]:
    """A step as a function that takes n of them."""

    def run(n: int) -> None:
        for _ in range(n):
            step()

    return run


def ours(setting: Setting) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Our trainer's steps, by method."""
    trained = ("bcl", "gkp-gsa") if setting.device.type == "cuda" else ()
    for method in (*METHODS, *(name + TRAINED for name in trained)):

        def make(method: str = method) -> Contender:
            step, period = setting.our_step(method)
            return Contender(f"ltfast/{method}", CE if method.startswith("ce") else BCL, repeated(step), period)

        yield f"ltfast/{method}", make


def loops(setting: Setting, paths: dict[str, Path]) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """A plain loop with cross-entropy around each optimizer with davda54/sam's interface, ours among them."""
    for name, make_step, _ in (*peers.ours(), *peers.peers(paths)):
        if "gsa" in name.lower():
            continue

        def make(name: str = name, make_step: peers.Make = make_step) -> Contender:
            model, batch = setting.model(CE), setting.batch

            losses = OneLoss(lambda: F.cross_entropy(model(batch.views[0]), batch.labels))
            return Contender(f"loop/{name}", CE, repeated(make_step(list(model.parameters()), losses)))

        yield f"loop/{name}", make


def others(setting: Setting, paths: dict[str, Path]) -> Iterator[tuple[str, Callable[[], Contender]]]:
    """Whole steps of other code, where it is given or installed."""
    found = (
        ("composer/SAM", CE, composer_steps, False), ("timm/train_one_epoch", CE, timm_steps, True),
        ("release/train", BCL, release_steps, True),
    )  # fmt: skip
    for name, base, steps, around in found:
        run = steps(setting, paths)
        if run is not None:
            yield name, lambda name=name, base=base, run=run, around=around: Contender(name, base, run(), 1, around)


class Total:
    """Sums over the steps that run inside `counted`."""

    def __init__(self, run: Callable[[int], object], steps: int) -> None:
        with (
            FlopCounterMode(display=False) as flops, counting() as own, op_bench.DispatchCounter() as other, Waits() as waits,
        ):  # fmt: skip
            run(steps)
        self.values = {
            "kernels": own.kernels + other.kernels, "gflops": flops.get_total_flops() / 1e9,
            "gigabytes": (own.bytes + other.bytes) / 1e9, "syncs_per_step": sum(waits.found.values()),
        }  # fmt: skip


def counted(contender: Contender) -> dict[str, float]:
    """Figures of one step."""
    contender.run(WARM_UP)
    period = contender.period
    if contender.around:  # two steps less one
        more, less = Total(contender.run, 2).values, Total(contender.run, 1).values
        values = {name: more[name] - less[name] for name in more}
    else:
        values = {name: value / period for name, value in Total(contender.run, period).values.items()}
    return {**values, "peak_mib": peak_bytes(lambda: contender.run(period)) / 2**20}


def peak_on_gpu(contender: Contender) -> float:
    """MiB that the allocator lent during a period beyond what lived before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.run(contender.period)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def clocked(
    makers: dict[str, Callable[[], Contender]], rounds: int, budget: float = math.inf
) -> dict[str, dict[str, harness.Timing]]:
    """Seconds of a step of each, in turns, and their ratio to our plain step with the same loss."""
    everyone = {name: make() for name, make in makers.items()} if rounds else {}
    for contender in everyone.values():
        contender.run(RECORDED if contender.name.endswith(TRAINED) else WARM_UP + contender.period)
    calls = {name: (lambda c=c: c.run(c.period)) for name, c in everyone.items()}
    seconds = harness.in_turns(calls, rounds, {}, budget)
    seconds = {name: [s / everyone[name].period for s in values] for name, values in seconds.items()}
    found = dict[str, dict[str, harness.Timing]]()
    for base in (CE, BCL):
        chosen = {name: seconds[name] for name, c in everyone.items() if c.base == base}
        if chosen:
            found |= harness.compared(chosen, f"ltfast/{base}", "sgd")
    return found


def base_of(name: str) -> str:
    """Loss of a contender by its name, known before it is made."""
    return CE if name.startswith(("ltfast/ce", "loop/", "timm", "composer")) else BCL


def write(name: str, figures: dict[str, Any], config: dict[str, Any]) -> None:
    """Append rows."""
    case = f"step/{name}/{config['model']}/B={config['batch']}"
    for metric, value in figures.items():
        more: dict[str, Any] = {}
        if isinstance(value, harness.Timing):
            more, value = {"n": value.n, "p20": value.p20, "p80": value.p80}, value.median
        value = value if isinstance(value, int) else float(f"{value:.6g}")
        harness.append_row("peers", case, metric, value, config=config, **more)


def known(config: dict[str, Any], device: str) -> dict[str, dict[str, float]]:
    """Name -> figures of the rows that this commit wrote on this kind of device with this config."""
    commit, found = (harness.facts()["commit"] or "").rstrip("+"), {}  # "+": files changed, which writing rows does
    for case, rows in peer_tables.cases(device).items():
        row = rows.get("flops_vs_sgd")
        if (
            case.startswith("step/")
            and row
            and (row["commit"] or "").rstrip("+") == commit
            and config.items() <= row["config"].items()
        ):
            found[peer_tables.step_name(case)] = {metric: r["value"] for metric, r in rows.items()}
    return found


def main() -> None:
    """Print a line a contender, append rows with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="release, davda54, fsam, composer, timm"
    )
    parser.add_argument("--model", default="resnet32")
    parser.add_argument("--batch", type=int, help="default: 256 on a GPU, 16 elsewhere")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--rounds", type=int, help="of the clock; 0: only count (default: 5, on a GPU 20)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds of the clock's rounds")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/peers.jsonl")
    args = parser.parse_args()
    paths = peers.paths_of(args.peer)
    batch = args.batch or (256 if args.device == "cuda" else 16)
    setting = Setting(args.model, batch, torch.device(args.device))
    config = {
        "model": args.model,
        "batch": batch,
        "groups": GROUPS,
        "precision": "fp32",
        "mode": "eager",
        "part": "whole step",
    }
    rounds = (20 if args.device == "cuda" else 5) if args.rounds is None else args.rounds
    chosen = dict[str, Callable[[], Contender]]()
    on_gpu = args.device == "cuda"
    done = known(config, args.device) if args.write and not on_gpu else {}
    plain = {base: done[f"ltfast/{base}"]["gflops"] for base in (CE, BCL) if f"ltfast/{base}" in done}
    for name, make in (*ours(setting), *loops(setting, paths), *others(setting, paths)):
        if args.only and name not in args.only and f"ltfast/{base_of(name)}" != name:
            continue
        chosen[name] = make
        if name in done:
            print(f"{name:34s} done before")
            continue
        if name.endswith(TRAINED):
            continue
        contender = make()
        if on_gpu:
            contender.run(WARM_UP)
            figures = {"peak_mib": peak_on_gpu(contender)}
        else:
            figures = counted(contender)
            plain.setdefault(contender.base, figures["gflops"])  # ours come first, and of ours the plain steps
            figures["flops_vs_sgd"] = figures["gflops"] / plain[contender.base]
        print(
            f"{name:34s}",
            {k: round(v, 3) for k, v in figures.items()},
            flush=True,
        )
        if args.write:
            write(name, figures, {**config, "base": contender.base})
    for name, times in clocked(chosen, rounds, args.budget).items():
        print(f"{name:34s}", {k: float(f"{v.median:.4g}") for k, v in times.items()}, flush=True)
        if args.write:
            write(name, times, {**config, "base": base_of(name), "threads": torch.get_num_threads()})


if __name__ == "__main__":
    main()
