"""What long-tailed bookkeeping costs at iNaturalist's size, without a picture or a network.

    python benchmarks/scale.py                                 # C = 8,142, 100 snapshots of a ResNet-50; needs 12 GiB of memory
    python benchmarks/scale.py --snapshots 20 --append         # and appends rows to benchmarks/results/scale.jsonl

Sampling order, class and group statistics, streaming quality, memory bank, clustering, group means and the collapsed
anchor, each part in a process of its own so that its peak memory is its own. Snapshots are random walks: cost does not
depend on their values.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from harness import append_row

from ltfast.data.sampler import SAMPLERS, epoch_order
from ltfast.environment import cpu_name
from ltfast.memory import meminfo
from ltfast.preserve import (
    MemoryBank,
    QualityStats,
    group_by_frequency,
    group_classes,
    group_sizes,
    sample_indices,
    stream_anchor,
)

CLASSES, IMAGES, FEATURES = 8142, 437_513, 2048
RESNET50_WITH_HEADS = 25_600_000  # with a projection head: the size that the memory target is stated for
GROWTH_DIMENSION = 100_000  # of the snapshots whose clustering is timed against C
Figure = tuple[str, str, float]  # (case, metric, value)


def timed(call: Callable[..., Any], *args: object) -> tuple[Any, float]:
    """Result of one call, and its seconds."""
    start = time.perf_counter()
    result = call(*args)
    return result, time.perf_counter() - start


def seconds(call: Callable[..., object], *args: object, repeat: int = 1, **keywords: object) -> float:
    """Fastest of `repeat` calls with these arguments."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call(*args, **keywords)
        times.append(time.perf_counter() - start)
    return min(times)


def peak_gib() -> float:
    """Peak resident memory of this process in GiB, Python and torch included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def long_tail(classes: int, images: int) -> torch.Tensor:
    """Counts [C], head 500 times the tail, adding up to `images` (a few more or less by rounding), none below 2."""
    weight = 500.0 ** (-torch.arange(classes, dtype=torch.float64) / (classes - 1))
    return (images * weight / weight.sum()).round().long().clamp(min=2)


def tables(labels: torch.Tensor, classes: int, num_groups: int) -> None:
    """Counts, groups by frequency, group sizes and the Fisher's samples of every group."""
    counts = torch.bincount(labels, minlength=classes)
    groups = group_by_frequency(counts, num_groups)
    group_sizes(groups, counts, num_groups, "samples")
    for j in range(num_groups):
        sample_indices(groups, labels, j, 512)


def bench_sampler(args: argparse.Namespace) -> Iterator[Figure]:
    """One epoch's order and all class and group tables, at n and 10 n images."""
    for images in (args.images, 10 * args.images):
        counts = long_tail(args.classes, images)
        labels = torch.repeat_interleave(counts)[torch.randperm(int(counts.sum()))]
        groups = group_by_frequency(counts, args.groups)
        case = f"C={args.classes}/n={images}"
        for kind in SAMPLERS:
            needs = {"batch": 256, "seed": 0, "epoch": 1, "epochs_total": 90, "group_of_class": groups}
            yield f"sampler/{kind}/{case}", "seconds", seconds(epoch_order, kind, labels, repeat=3, **needs)
        yield f"statistics/{case}", "seconds", seconds(tables, labels, args.classes, args.groups, repeat=3)
    yield f"sampler+statistics/C={args.classes}/n={10 * args.images}", "peak_rss_gib", peak_gib()


def bench_quality(args: argparse.Namespace) -> Iterator[Figure]:
    """A training step's update, and the epoch's quality: the one part that is quadratic in C."""
    for classes in sorted({args.classes // 8, args.classes // 4, args.classes // 2, args.classes}):
        stats = QualityStats(classes, args.features)
        for labels in torch.randperm(classes).split(256):
            stats.update(torch.randn(len(labels), args.features), labels)
        features, labels = torch.randn(256, args.features), torch.randint(classes, (256,))
        case = f"C={classes}/D={args.features}"
        per_step = seconds(stats.update, features, labels, repeat=30)
        yield f"quality/update/{case}/B=256", "seconds", per_step
        yield f"quality/compute/{case}", "seconds", seconds(stats.compute, repeat=3)
    yield f"quality/{case}", "peak_rss_gib", peak_gib()


def bench_bank(args: argparse.Namespace) -> Iterator[Figure]:
    """Fill a bank until `snapshots` are alive, then cluster, average and collapse."""
    case = f"C={args.classes}/S={args.snapshots}/d={args.dimension}"
    generator = torch.Generator().manual_seed(0)
    theta, step = torch.randn(args.dimension, generator=generator), torch.empty(args.dimension)
    bank, spent = MemoryBank(args.classes, args.dimension), 0.0
    for epoch in range(args.snapshots):
        theta += step.normal_(0.0, 0.1, generator=generator)
        quality = torch.rand(args.classes, generator=generator)  # records: the last one is uniform over epochs
        spent += seconds(bank.update, quality, theta, epoch)
    yield f"bank/update/{case}", "seconds", spent / args.snapshots
    yield f"bank/{case}", "live_snapshots", len(bank)
    yield f"bank/{case}", "bank_gib", bank.num_bytes / 2**30
    yield f"bank/{case}", "peak_rss_gib", peak_gib()
    counts = long_tail(args.classes, args.images)
    groups, spent = timed(group_classes, bank, counts, args.groups)
    yield f"cluster/{case}/G={args.groups}", "seconds", spent
    yield f"cluster/{case}/G={args.groups}", "peak_rss_gib", peak_gib()
    means, spent = timed(bank.group_means, groups, args.groups)
    yield f"group_means/{case}/G={args.groups}", "seconds", spent
    sizes = group_sizes(groups, torch.ones_like(groups), args.groups)
    pairs = ((mean, step.uniform_(generator=generator)) for mean in means)
    yield f"anchor/{case}/G={args.groups}", "seconds", seconds(stream_anchor, pairs, sizes)
    yield f"all/{case}/G={args.groups}", "peak_rss_gib", peak_gib()


def bench_growth(args: argparse.Namespace) -> Iterator[Figure]:
    """CPU seconds at C and n, at 10 n, and at 10 C and 10 n: once an epoch each, clustering once a run."""
    for classes, images in ((1, 1), (1, 10), (10, 10)):
        classes, images = classes * args.classes, images * args.images
        counts = long_tail(classes, images)
        labels = torch.repeat_interleave(counts)[torch.randperm(int(counts.sum()))]
        groups, case = group_by_frequency(counts, args.groups), f"C={classes}/n={images}"
        for kind in SAMPLERS:
            needs = {"batch": 256, "seed": 0, "epoch": 1, "epochs_total": 90, "group_of_class": groups}
            yield f"growth/sampler/{kind}/{case}", "cpu_seconds", cpu_seconds(epoch_order, kind, labels, **needs)
        yield f"growth/statistics/{case}", "cpu_seconds", cpu_seconds(tables, labels, classes, args.groups)
        bank = MemoryBank(classes, GROWTH_DIMENSION)
        for epoch in range(args.snapshots):
            bank.update(torch.rand(classes), torch.randn(GROWTH_DIMENSION), epoch)
        case = f"C={classes}/S={len(bank)}/d={GROWTH_DIMENSION}"
        yield f"growth/cluster/{case}", "cpu_seconds", cpu_seconds(group_classes, bank, counts, args.groups)
        yield (
            f"growth/bank/{case}",
            "cpu_seconds",
            cpu_seconds(bank.update, torch.zeros(classes), torch.zeros(GROWTH_DIMENSION), 0),
        )
    yield f"growth/C={10 * args.classes}/n={10 * args.images}", "peak_rss_gib", peak_gib()


def cpu_seconds(call: Callable[..., object], *args: object, **keywords: object) -> float:
    """Least processor time of two calls."""
    times = []
    for _ in range(2):
        start = time.process_time()
        call(*args, **keywords)
        times.append(time.process_time() - start)
    return min(times)


PARTS = {"sampler": bench_sampler, "quality": bench_quality, "bank": bench_bank, "growth": bench_growth}


def run_part(name: str, args: argparse.Namespace) -> list[Figure]:
    """All figures of one part, in the process that calls it."""
    torch.set_num_threads(args.threads)
    return list(PARTS[name](args))


def available_gib() -> float:
    """Memory that the machine can still give, in GiB (Linux)."""
    return meminfo()["MemAvailable"] / 2**30


def append(figures: list[Figure], config: dict[str, object]) -> None:
    """One row a figure, in scale.jsonl."""
    where = {"device": "cpu", "cpu": f"{cpu_name()}, {config['threads']} threads", "driver": None, "cuda": None}
    for case, metric, value in figures:
        append_row("scale", case, metric, value, config=config, **where)


def main() -> None:
    """Run the chosen parts, print their figures and append them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--features", type=int, default=FEATURES)
    parser.add_argument("--snapshots", type=int, default=100)
    parser.add_argument("--dimension", type=int, default=RESNET50_WITH_HEADS)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--append", action="store_true", help="append rows to benchmarks/results/scale.jsonl")
    args = parser.parse_args()
    needed = args.snapshots * args.dimension * 4 / 2**30 + 2.5
    if "bank" in args.parts and needed > available_gib():
        parser.error(
            f"--snapshots {args.snapshots} needs {needed:.1f} GiB, {available_gib():.1f} GiB are free: ask for fewer"
        )
    figures: list[Figure] = []
    for part in args.parts:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(run_part, part, args).result()
        for case, metric, value in found:
            print(f"{case:70s} {metric:15s} {value:10.4g}", flush=True)
        figures += found
    if args.append:
        config = {k: v for k, v in vars(args).items() if k not in ("append", "parts")}
        append(figures, config)


if __name__ == "__main__":
    main()
