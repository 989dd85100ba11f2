"""Time of one training step: every preset against plain SGD, its readable twin and the bare forward and backward.

    python benchmarks/throughput.py                      # prints a table, appends rows, writes the profile picture
    python benchmarks/throughput.py --methods gsa-full --rounds 30 --no-write

Pictures are random, lie on the device, and become three views there as in training (224 px: ready views, data excluded);
only the profile counts that. On the CPU there are only ratios: the steps that are compared take turns, and a ratio is the
median over rounds of one step's time by the other's. On a GPU there are absolute figures too, of eager, compiled and
recorded steps; the mode stands in the case. The GPU part is not confirmed on a GPU.
    ratio_vs_sgd     a step's time over that of plain SGD on the same batch and base loss
    ratio_vs_twin    over that of the same method written out in plain PyTorch (ltfast/optim/reference.py, torch.optim)
    share_of_bare    forward and backward alone, times the FLOP ratio, over the step's time (1 = nothing else costs anything)
    flops_vs_sgd     counted; syncs_per_step: calls that would wait for a device, counted
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from harness import append_row, time_call  # noqa: E402
from step_profile import SECTIONS, picture, sections_of, sections_of_kernels  # noqa: E402

from ltfast import build  # noqa: E402
from ltfast.data.augment import Plain, recipe  # noqa: E402
from ltfast.data.base import SPLITS, Batch  # noqa: E402
from ltfast.data.pool import Splits  # noqa: E402
from ltfast.data.small import SmallSource  # noqa: E402
from ltfast.dist import Ranks  # noqa: E402
from ltfast.flat import FlatBuffers, FlatParameters  # noqa: E402
from ltfast.losses import membership_for  # noqa: E402
from ltfast.objective import Forward, Objective  # noqa: E402
from ltfast.optim import reference  # noqa: E402
from ltfast.optim.rules import Rule  # noqa: E402
from ltfast.recipes import build_config, rule_of  # noqa: E402
from ltfast.step import TrainStep  # noqa: E402
from ltfast.update import Update  # noqa: E402
from tests.syncs import Waits  # noqa: E402

METHODS = ("bcl", "bcl+sam", "gsa-paper", "gsa-full", "gsa-exact", "gsa-release", "gsa-full+gkp")
MAIN = ("bcl", "gsa-paper", "gsa-full", "gsa-exact")
GROUPS = 4
LR = 0.01  # small: nothing may overflow in a benchmark


@dataclass(frozen=True)
class Case:
    """One network and batch."""

    model: str
    shape: tuple[int, int, int]
    batch: int
    methods: tuple[str, ...] = METHODS
    modes: tuple[str, ...] = ("eager",)
    classes: int = 10

    @property
    def name(self) -> str:
        return f"{self.model}/{self.shape[1]}px/B={self.batch}/G={GROUPS}"


CASES = {
    "cpu": (Case("resnet8", (1, 8, 8), 64), Case("resnet20", (3, 32, 32), 16, MAIN)),
    "cuda": (
        Case("resnet32", (3, 32, 32), 256, METHODS, ("recorded", "compiled", "eager")),
        Case("resnet50", (3, 224, 224), 64, MAIN[:3], ("compiled",), 1000),
    ),
}


class Bench:
    """Everything for the steps of one method on one case: ours, the twin's and the bare passes."""

    def __init__(self, method: str, case: Case, device: torch.device, mode: str) -> None:
        compiled = "off" if mode == "eager" else "on"
        flags = {"model": case.model, "batch": case.batch, "compile": compiled, "capture": "off"}
        self.config = build_config("digits-lt" if case.shape[1] < 32 else "cifar10-lt", method, {}, flags)
        self.method, self.case, self.device, self.mode = method, case, device, mode
        self.rule = rule_of(self.config)
        self.counts = torch.linspace(500, 10, case.classes).long()
        self.make, self.batch = pictures(case, device)
        groups = torch.arange(case.classes) * GROUPS // case.classes
        kind = "single" if self.rule is None else build.MEMBERSHIP_KIND[self.rule.groups]
        self.membership = membership_for(kind, self.counts, groups).to(device)
        self.reset()

    def reset(self) -> None:
        """Fresh weights, the same every time."""
        model = build.build_model(self.config, self.case.shape, self.case.classes).to(self.device)
        if self.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        self.model = model.train()
        self.objective: Objective = build.build_objective(self.config, self.counts.to(self.device))
        self.twin_model = copy.deepcopy(self.model)
        self.flat = FlatParameters(model.parameters())
        self.forward: Forward = build.build_forward(self.config, model, self.objective, self.device)
        self.step = self.make_step(self.rule)
        if self.config.preserve.gkp:
            self.step.update.anchor = (torch.rand_like(self.flat.data), self.flat.data.clone())
            self.step.update.strength.fill_(0.1)

    def make_step(self, rule: Rule | None) -> TrainStep:
        """A step by `rule` on this model."""
        update = Update(self.flat, momentum=0.9, weight_decay=5e-4)
        update.lr.fill_(LR)
        capture = None
        if self.mode == "recorded":
            capture = build.build_capture(self.config.with_(capture="on"), None, self.device, Ranks())
        member = None if rule is None else self.membership
        buffers = FlatBuffers(self.model)
        return TrainStep(
            self.model, self.objective, self.flat, buffers, update, rule, member, forward=self.forward, capture=capture
        )

    def ours(self) -> None:
        """One step."""
        self.step(self.batch)

    def bare(self) -> None:
        """Forward and backward of the plain loss, and nothing else."""
        losses, shares, _ = self.forward.losses(torch.cat(self.batch.views), self.batch.labels, self.membership)
        torch.autograd.grad((losses * shares).sum(), self.flat.params, allow_unused=True)

    def twin(self) -> Callable[[], None]:
        """The same method in plain PyTorch, one step a call."""
        model, objective, member = self.twin_model, self.objective, self.membership
        forward, rule, batch = Forward(model, objective, self.forward.autocast), self.rule, self.batch
        params = list(model.parameters())
        base = torch.optim.SGD(params, LR, momentum=0.9, weight_decay=5e-4)
        counts = (member.T.cpu() @ self.counts.float()).tolist()
        averages: dict[str, Any] = {}

        def closure() -> tuple[Tensor, Tensor]:
            losses, shares, _ = forward.losses(torch.cat(batch.views), batch.labels, member)
            return losses, shares

        def plain() -> Tensor:
            losses, shares = closure()
            return (losses * shares).sum()

        def step() -> None:
            if rule is None:
                base.zero_grad()
                plain().backward()
                base.step()
            elif rule.groups == "one":
                reference.sam_step(base, params, plain, rule.rho or 0.05, rule.adaptive)
            else:
                chosen = params if rule.scope == "all" else [model.classifier.weight]
                reference.gsa_step(
                    base, chosen, closure, counts, averages, rule.direction, rule.objective, rule.radius_C,
                    rule.rho_min, rule.rho_max, rule.adaptive, rule.aggregate, rule.sigma, rule.lmbda,
                )  # fmt: skip

        return step


def pictures(case: Case, device: torch.device) -> tuple[Callable[[], Batch], Batch]:
    """(makes the views of a batch as in training, a batch); every class, so every group, occurs in it."""
    torch.manual_seed(0)
    channels, side, _ = case.shape
    labels = torch.arange(case.batch) % case.classes
    if side > 64:
        views = tuple(torch.randn(case.batch, *case.shape, device=device) for _ in range(3))
        batch = Batch(views, labels.to(device), torch.arange(case.batch, device=device))
        return lambda: batch, batch
    images = torch.randint(0, 256, (case.batch, *case.shape), dtype=torch.uint8)
    names = tuple(str(c) for c in range(case.classes))
    splits = Splits({s: images for s in SPLITS}, {s: labels for s in SPLITS}, names)
    mean, std = (0.5,) * channels, (0.25,) * channels
    views_of = recipe("cifar" if channels == 3 else "digits", 3, mean=mean, std=std, size=side)
    source = SmallSource(splits, views=views_of, plain=Plain(mean, std), batch=case.batch, device=device)
    index, key = source.epoch_indices(0)[0], source.epoch_key(0)
    return lambda: source.make_batch(index, key), source.make_batch(index, key)


def turns(calls: Sequence[Callable[[], object]], rounds: int, cycle: int = 1) -> list[list[float]]:
    """Seconds of each call, one list a call; they take turns, so that all of them meet the machine's moods alike.

    cycle: calls in a row that make one time (mode R: a refresh and the steps that use it).
    """
    for call in calls:
        for _ in range(cycle):
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            started = time.perf_counter()
            for _ in range(cycle):
                call()
            times.append((time.perf_counter() - started) / cycle)
    return seconds


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Median and spread of over / under, round by round."""
    values = sorted(a / b for a, b in zip(over, under, strict=True))
    fifths = statistics.quantiles(values, n=5)
    return {"value": statistics.median(values), "p20": fifths[0], "p80": fifths[-1], "n": len(values)}


def counted(bench: Bench) -> dict[str, float]:
    """FLOPs over plain SGD's and waits for the device, each over one cycle of the method."""
    flops = {}
    for rule in (None, bench.rule):
        step = bench.make_step(rule)
        cycle = 1 if rule is None else rule.gram_every
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
    cycle = 1 if bench.rule is None else bench.rule.gram_every
    ours, plain, bare = turns((bench.ours, sgd.ours, sgd.bare), max(4, rounds // cycle), cycle)
    figures["ratio_vs_sgd"] = ratio(ours, plain)
    by_flops = [t * figures["flops_vs_sgd"]["value"] for t in bare]
    figures["share_of_bare"] = ratio(by_flops, ours)
    ours, twin = turns((bench.ours, bench.twin()), max(5, rounds // 2))
    figures["ratio_vs_twin"] = ratio(ours, twin)
    return figures, sections_of(bench.step, bench.make, max(4, cycle))


def measure_on_gpu(bench: Bench, sgd: Bench) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Absolute figures of one mode; images a second count an image once, not its views."""
    flops = counted(Bench(bench.method, bench.case, bench.device, "eager"))["flops_vs_sgd"]
    cycle = 1 if bench.rule is None else bench.rule.gram_every
    torch.cuda.reset_peak_memory_stats()
    ours = time_call(bench.ours, repetitions=64, warm_up=8 + 3 * cycle)  # every branch is recorded after 3 calls
    plain, bare = (time_call(call, repetitions=64, warm_up=16) for call in (sgd.ours, sgd.bare))
    seconds = ours.median if cycle == 1 else refreshes(bench)
    figures: dict[str, dict[str, Any]] = {
        "seconds": {"value": seconds, "p20": ours.p20, "p80": ours.p80, "n": ours.n},
        "images_per_s": {"value": bench.case.batch / seconds, "n": ours.n},
        "ratio_vs_sgd": {"value": seconds / plain.median, "n": ours.n},
        "share_of_bare": {"value": bare.median * flops / seconds, "n": ours.n},
        "flops_vs_sgd": {"value": flops, "n": 1},
        "peak_gib": {"value": torch.cuda.max_memory_allocated() / 2**30, "n": 1},
    }
    if bench.mode == "eager":
        figures["ratio_vs_twin"] = {"value": ours.median / time_call(bench.twin(), 10, 3).median, "n": 10}
    return figures, sections_of_kernels(bench.ours, 16)


def refreshes(bench: Bench) -> float:
    """Mean seconds of a step over whole cycles of mode R, whose refreshes a median would not see."""
    assert bench.rule is not None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    steps = 8 * bench.rule.gram_every
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
        for mode in case.modes:
            sgd = Bench("bcl", case, device, mode)
            for method in args.methods or case.methods:
                bench = Bench(method, case, device, mode)
                if device.type == "cpu":
                    figures, profile = compare_on_cpu(bench, sgd, args.rounds)
                else:
                    figures, profile = measure_on_gpu(bench, sgd)
                profiles[f"{method}, {case.model}, {mode}"] = profile
                note(f"{method}/{case.name}/{mode}", figures, profile, args.write)
    if args.write:
        what = "sections of eager steps" if device.type == "cpu" else "kernels; forward holds the backward too"
        path = ROOT / "docs" / "img" / f"step-{device.type}.png"
        picture(path, profiles, f"Where one step's time goes, {device.type} ({what})")
        print(path)


def note(name: str, figures: dict[str, dict[str, Any]], profile: dict[str, float], write: bool) -> None:
    """Print a line for a case, and append its rows."""
    shown = "  ".join(f"{k} {v['value']:.3g}" for k, v in figures.items())
    parts = "  ".join(f"{k} {100 * profile[k]:.0f}" for k in SECTIONS)
    print(f"{name}\n    {shown}\n    time, %: {parts}", flush=True)
    if write:
        for metric, values in (figures | {f"share_{k.lower()}": {"value": v} for k, v in profile.items()}).items():
            append_row("throughput", name, metric, **values)


if __name__ == "__main__":
    main()
