"""Time of one training step: every preset against plain SGD, its readable twin and the bare forward and backward.

    python benchmarks/throughput.py                      # prints a table, appends rows, writes the profile picture
    python benchmarks/throughput.py --methods gsa-full --rounds 30 --no-write

Pictures are random, lie on the device, and become three views there as in training (224 px: ready views, data excluded);
only the profile counts that. On the CPU there are only ratios: the steps that are compared take turns, and a ratio is the
median over rounds of one step's time by the other's. On a GPU there are absolute figures too, of eager, compiled and
recorded steps; the mode stands in the case.
    ratio_vs_sgd     a step's time over that of plain SGD on the same batch and base loss
    ratio_vs_twin    over that of the same method written out in plain PyTorch (ltfast/optim/reference.py, torch.optim), whose
                     ascents are all exact; both over whole cycles of the method
    share_of_bare    forward and backward alone, times the FLOP ratio, over the step's time (1 = nothing else costs anything)
    flops_vs_sgd     counted; syncs_per_step: calls that would wait for a device, counted
    speedup          of plain descent on a CPU in bf16 and compiled, over eager float32, which is the default there
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from harness import append_row, in_turns, time_call, timing  # noqa: E402
from step_bench import METHODS, Bench, Case, cycle_of  # noqa: E402
from step_profile import SECTIONS, picture, sections_of, sections_of_kernels  # noqa: E402

from tests.syncs import Waits  # noqa: E402

MAIN = ("bcl", "gsa-paper", "gsa-full", "gsa-exact")
# Shortcuts that trade exactness for speed.
SHORTCUTS = tuple(f"gsa-full,{option}" for option in ("ascent_every=2", "ascent_views=1", "ascent_fraction=0.5"))
CASES = {
    "cpu": (
        Case("resnet8", (1, 8, 8), 64, METHODS + SHORTCUTS),
        Case("resnet20", (3, 32, 32), 16, MAIN),
        Case("resnet32", (3, 32, 32), 64, (), ("eager", "compiled")),
    ),
    "cuda": (
        Case("resnet32", (3, 32, 32), 256, METHODS + SHORTCUTS, ("recorded", "compiled", "eager")),
        Case("resnet50", (3, 224, 224), 64, MAIN[:3], ("compiled",), 1000),
    ),
}


def turns(calls: Sequence[Callable[[], object]], rounds: int, cycle: int = 1) -> list[list[float]]:
    """Seconds of each call, one list a call; they take turns, so that all of them meet the machine's moods alike.

    cycle: calls in a row that make one time (mode R: a refresh and the steps that use it).
    """

    def whole(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(cycle):
                call()

        return run

    cycles = {str(i): whole(call) for i, call in enumerate(calls)}
    for run in cycles.values():
        run()
    return [[s / cycle for s in seconds] for seconds in in_turns(cycles, rounds, {}).values()]


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Median and spread of over / under, round by round."""
    found = timing([a / b for a, b in zip(over, under, strict=True)])
    return {"value": found.median, "p20": found.p20, "p80": found.p80, "n": found.n}


def counted(bench: Bench) -> dict[str, float]:
    """FLOPs over plain SGD's and waits for the device, each over one cycle of the method."""
    flops = {}
    for rule in (None, bench.rule):
        step = bench.make_step(rule)
        cycle = cycle_of(rule)
        with FlopCounterMode(display=False) as counter:
            for _ in range(cycle):
                step(bench.batch)
        flops[rule] = counter.get_total_flops() / cycle
    step = bench.make_step(bench.rule)
    step(bench.batch)
    with Waits() as waits:
        step(bench.batch)
    return {"flops_vs_sgd": flops[bench.rule] / flops[None], "syncs_per_step": sum(waits.found.values())}


def compare_on_cpu(bench: Bench, sgd: Bench, rounds: int) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Rows' values by metric, and the profile."""
    figures: dict[str, dict[str, Any]] = {k: {"value": v, "n": 1} for k, v in counted(bench).items()}
    bench.reset()
    cycle = cycle_of(bench.rule)
    ours, plain, bare = turns((bench.ours, sgd.ours, sgd.bare), max(4, rounds // cycle), cycle)
    figures["ratio_vs_sgd"] = ratio(ours, plain)
    by_flops = [t * figures["flops_vs_sgd"]["value"] for t in bare]
    figures["share_of_bare"] = ratio(by_flops, ours)
    if bench.has_twin:
        ours, twin = turns((bench.ours, bench.twin()), max(4, rounds // 2 // cycle), cycle)
        figures["ratio_vs_twin"] = ratio(ours, twin)
    return figures, sections_of(bench.step, bench.make, max(4, cycle))


def speedups_on_cpu(case: Case, rounds: int, methods: Sequence[str] = ("bcl", "bcl,precision=bf16")) -> dict[str, Any]:
    """Row's values by the name of a case: time of the first of `methods` in the first mode over that of each in each mode."""
    benches = {
        f"{m}/{case.name}/{mode}": Bench(m, case, torch.device("cpu"), mode) for mode in case.modes for m in methods
    }
    seconds = turns([bench.ours for bench in benches.values()], rounds)
    return {name: ratio(seconds[0], own) for name, own in zip(benches, seconds, strict=True)}


@cache
def flops_of(method: str, case: Case, device: torch.device) -> float:
    """flops_vs_sgd, which the mode does not change."""
    return counted(Bench(method, case, device, "eager"))["flops_vs_sgd"]


def measure_on_gpu(method: str, sgd: Bench) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Absolute figures of one mode; images a second count an image once, not its views."""
    gc.collect()
    others = torch.cuda.memory_allocated()  # sgd's
    bench = Bench(method, sgd.case, sgd.device, sgd.mode)
    flops = flops_of(bench.method, bench.case, bench.device)
    cycle = cycle_of(bench.rule)
    torch.cuda.reset_peak_memory_stats()
    ours = time_call(bench.ours, repetitions=64, warm_up=8 + 3 * cycle)  # every branch is recorded after 3 calls
    peak = torch.cuda.max_memory_allocated() - others
    plain, bare = (time_call(call, repetitions=64, warm_up=16) for call in (sgd.ours, sgd.bare))
    seconds = ours.median if cycle == 1 else refreshes(bench)
    figures: dict[str, dict[str, Any]] = {
        "seconds": {"value": seconds, "p20": ours.p20, "p80": ours.p80, "n": ours.n},
        "images_per_s": {"value": bench.case.batch / seconds, "n": ours.n},
        "ratio_vs_sgd": {"value": seconds / plain.median, "n": ours.n},
        "share_of_bare": {"value": bare.median * flops / seconds, "n": ours.n},
        "flops_vs_sgd": {"value": flops, "n": 1},
        "peak_gib": {"value": peak / 2**30, "n": 1},
    }
    if bench.mode == "eager" and bench.has_twin:
        figures["ratio_vs_twin"] = {"value": seconds / time_call(bench.twin(), 10, 3).median, "n": 10}
    return figures, sections_of_kernels(bench.ours, 16)


def refreshes(bench: Bench) -> float:
    """Mean seconds of a step over whole cycles of mode R, whose refreshes a median would not see."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    steps = 8 * cycle_of(bench.rule)
    start.record()
    for _ in range(steps):
        bench.ours()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=None, help="methods, see `ltfast methods`")
    parser.add_argument("--cases", nargs="+", default=None, help="models of the cases to run")
    parser.add_argument(
        "--modes", nargs="+", default=None, help="of a GPU: recorded, compiled, eager [those of the case]"
    )
    parser.add_argument("--rounds", type=int, default=16, help="rounds of turns on the CPU [16]")
    parser.add_argument(
        "--write", action=argparse.BooleanOptionalAction, default=True, help="append rows and write the picture"
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    profiles: dict[str, dict[str, float]] = {}
    for case in CASES[device.type]:
        if args.cases and case.model not in args.cases:
            continue
        if not case.methods:
            for name, values in speedups_on_cpu(case, args.rounds).items():
                note(name, {"speedup": values}, {}, args.write)
            continue
        for mode in args.modes or case.modes:
            sgd = Bench("bcl", case, device, mode)
            for method in args.methods or case.methods:
                if device.type == "cpu":
                    figures, profile = compare_on_cpu(Bench(method, case, device, mode), sgd, args.rounds)
                else:
                    figures, profile = measure_on_gpu(method, sgd)
                profiles[f"{method}, {case.model}, {mode}"] = profile
                note(f"{method}/{case.name}/{mode}", figures, profile, args.write)
    if args.write and profiles:
        what = "sections of eager steps" if device.type == "cpu" else "kernels; forward holds the backward too"
        path = ROOT / "docs" / "img" / f"step-{device.type}.png"
        picture(path, profiles, f"Where one step's time goes, {device.type} ({what})")
        print(path)


def note(name: str, figures: dict[str, dict[str, Any]], profile: dict[str, float], write: bool) -> None:
    """Print a line for a case, and append its rows."""
    shown = "  ".join(f"{k} {v['value']:.3g}" for k, v in figures.items())
    parts = "  ".join(f"{k} {100 * profile[k]:.0f}" for k in SECTIONS if k in profile)
    print(f"{name}\n    {shown}" + (f"\n    time, %: {parts}" if parts else ""), flush=True)
    if write:
        for metric, values in (figures | {f"share_{k.lower()}": {"value": v} for k, v in profile.items()}).items():
            append_row("throughput", name, metric, **values)


if __name__ == "__main__":
    main()
