"""The model on paper behind docs/scaling.md: step time on 1..64 GPUs, and what breaks first with a million classes.

    python benchmarks/scaling_model.py                    # prints the tables
    python benchmarks/scaling_model.py --append           # and appends rows to benchmarks/results/scale.jsonl

    step(P)   = passes * max(b / rate, floor) + update + exposed(P)           b = images a GPU
    exposed   = transfer of the last bucket + max(0, transfer of the others - overlap)
    transfer  = ring all-reduce, 2 (P - 1) / P * bytes / link, and latency; across machines: inside, between, inside
    overlap   = 0: torch.compile (on for CUDA) makes the loss one node of autograd, whose gradients all come at its end
                and leave then; --compile off: 2/3 of one pass, the final backward, while which buckets leave one by one
Single-GPU pieces come from benchmarks/results/throughput.jsonl where a GPU row is there, else from ASSUMED (and the row says
so: device "simulated"). Nothing here was timed on several GPUs. The plan's own experiments are in scaling_plan.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import seeded  # noqa: E402
from harness import RESULTS, append_row  # noqa: E402

from ltfast.optim.rules import RULES  # noqa: E402
from ltfast.plan import flops_ratio, gradient_rows  # noqa: E402

WORLDS = (1, 2, 4, 8, 16, 32, 64)
GROUPS = 4
GIB = 1 << 30
EAGER_OVERLAP = 2 / 3  # the final backward
FLOAT64_FLOPS = 50e12  # of the distances between class centres; an H200's tensor cores promise 67e12


@dataclass(frozen=True)
class Machine:
    """What the model assumes of the hardware and its use; bandwidths are what collectives reach, not what a data sheet says."""

    rate: float = 1500.0  # images/s of BCL (three 224 x 224 views, ResNet-50, bf16) on one GPU, where no row has it
    floor: float = 0.008  # s: a pass is not faster than its launches, however small the batch
    gpus: int = 8  # in one machine
    inside: float = 300e9  # bytes/s of an all-reduce over NVLink
    between: float = 40e9  # bytes/s a GPU over 400 Gbit/s InfiniBand, one card a GPU
    latency_inside: float = 6e-6  # s a hop of a ring
    latency_between: float = 12e-6
    memory: float = 3.8e12  # bytes/s of device memory, 80 % of an H200's 4.8e12
    jitter: float = 0.01  # the slowest of P ranks is slower by jitter * log2 P
    overlap: float = 0.0  # of a pass, behind which communication hides; EAGER_OVERLAP without torch.compile


ASSUMED = Machine()


@dataclass(frozen=True)
class Network:
    """Sizes that decide communication and memory."""

    name: str
    parameters: int  # without classifier and heads
    features: int
    projection: int


RESNET50 = Network("resnet50", 23_508_032, 2048, 1024)


def parameters(net: Network, classes: int) -> int:
    """All trained parameters: encoder, classifier, and the two projection MLPs of BCL."""
    head = net.features * net.features + 3 * net.features + (net.features + 1) * net.projection
    return net.parameters + classes * net.features + 2 * head


def measured_rate() -> tuple[float, str] | None:
    """(images/s, device) of plain BCL on one GPU from the newest row, if there is one."""
    found = [
        r
        for r in seeded.rows(RESULTS / "throughput.jsonl")
        if r["device"] != "cpu" and r["metric"] == "images_per_s" and r["case"].startswith("bcl/resnet50/224px")
    ]
    return (found[-1]["value"], found[-1]["device"]) if found else None


def all_reduce(size: float, world: int, m: Machine) -> float:
    """Seconds of an all-reduce of `size` bytes: a ring within the machine, rings between machines for each GPU's part."""
    if world == 1:
        return 0.0
    here = min(world, m.gpus)
    seconds = 2 * (here - 1) / here * size / m.inside + 2 * (here - 1) * m.latency_inside
    machines = world // here
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * (size / here) / m.between + 2 * (machines - 1) * m.latency_between
    return seconds


def step_seconds(
    method: str, world: int, batch: int, classes: int, m: Machine, ascent: str = "local"
) -> dict[str, float]:
    """One step's parts in seconds for `batch` images a GPU."""
    rule = RULES.get(method)
    size = 4.0 * parameters(RESNET50, classes)
    one_pass = max(batch / m.rate, m.floor)
    compute = flops_ratio(rule, GROUPS) * one_pass * (1 + m.jitter * max(world - 1, 0).bit_length())
    update = (5 + 3 * gradient_rows(rule, GROUPS)) * size / m.memory
    bucket = min(25 * 2**20, size)
    exposed = all_reduce(bucket, world, m) + max(0.0, all_reduce(size - bucket, world, m) - m.overlap * one_pass)
    if ascent == "global" and rule is not None and rule.scope == "all":
        every = rule.gram_every
        exposed += ((GROUPS + every - 1) / every) * all_reduce(size, world, m)  # rows: nothing left to hide behind
    total = compute + update + exposed
    return {"seconds": total, "exposed_share": exposed / total, "images_per_s": world * batch / total, "bytes": size}


def weak_scaling(m: Machine, batch: int = 128, classes: int = 8142) -> list[tuple[str, int, dict[str, float]]]:
    """Fixed batch a GPU: iNaturalist's classes."""
    cases = (("bcl", "local"), ("gsa-paper", "local"), ("gsa-full", "local"), ("gsa-full", "global"))
    return [(f"{name}/{how}", p, step_seconds(name, p, batch, classes, m, how)) for name, how in cases for p in WORLDS]


def strong_scaling(m: Machine, batch: int = 1024, classes: int = 8142) -> list[tuple[str, int, dict[str, float]]]:
    """Fixed global batch."""
    return [
        (f"{name}/local", p, step_seconds(name, p, batch // p, classes, m))
        for name in ("bcl", "gsa-full")
        for p in WORLDS
    ]


# -- a million classes, a billion images -------------------------------------------------------------------------------


def memory_by_classes(classes: int, batch: int = 128, snapshots: int = 100) -> dict[str, float]:
    """GiB that grow with the number of classes, with everything whole on every GPU, as the code has it."""
    net, n = RESNET50, parameters(RESNET50, classes)
    rows = gradient_rows(RULES["gsa-full"], GROUPS)
    bytes_of = {
        "theta, momentum, kept, anchor (5 N)": 5 * 4 * n,
        "gradient rows (G N)": rows * 4 * n,
        "BalSCL similarities (forward + backward, 6 x 2B x (2B + C))": 6 * 4 * 2 * batch * (2 * batch + classes),
        "class centres and their MLP (C x 3 D)": 4 * classes * (2 * net.features + net.projection) * 2,
        "logits of one view (3 x B x C)": 3 * 4 * batch * classes,
        "quality sums, float64 (C x D)": 8 * classes * (net.features + 2),
        "bank on the host (S x encoder)": 4 * snapshots * net.parameters,
    }
    return {name: size / GIB for name, size in bytes_of.items()}


def first_to_break(capacity_gib: float = 141.0) -> int:
    """Classes at which one H200 is full: everything but the bank lies on the GPU."""
    low, high = 1_000, 100_000_000
    while high - low > 1_000:
        middle = (low + high) // 2
        needed = sum(v for k, v in memory_by_classes(middle).items() if not k.startswith("bank"))
        low, high = (middle, high) if needed < 0.9 * capacity_gib else (low, middle)
    return low


# -- output --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help="append rows to benchmarks/results/scale.jsonl")
    parser.add_argument(
        "--rate", type=float, default=None, help="images/s of one GPU instead of the measured or assumed rate"
    )
    args = parser.parse_args()
    found = measured_rate()
    rate, source = (args.rate, "given") if args.rate else found or (ASSUMED.rate, "assumed")
    m = dataclasses.replace(ASSUMED, rate=rate)
    settings = {**dataclasses.asdict(m), "rate_source": source, "groups": GROUPS, "network": RESNET50.name}

    def row(case: str, metric: str, value: float, **config: Any) -> None:
        print(f"{case:46s} {metric:22s} {value:12.5g}")
        if args.append:
            append_row("scale", case, metric, value, device="simulated", config={**settings, **config})

    for kind, table, extra in (
        ("weak", weak_scaling(m), {"batch_a_gpu": 128}),
        ("strong", strong_scaling(m), {"global_batch": 1024}),
    ):
        alone = {name: cost["images_per_s"] for name, p, cost in table if p == 1}
        for name, p, cost in table:
            case = f"model/{kind}/{name}/resnet50/C=8142/P={p}"
            for metric in ("seconds", "exposed_share"):
                row(case, metric, cost[metric], **extra)
            row(case, "efficiency", cost["images_per_s"] / alone[name] / p, **extra)
    for classes in (8_142, 100_000, 1_000_000):
        for name, gib in memory_by_classes(classes).items():
            row(f"model/memory/C={classes}/{name}", "gib", gib)
    row("model/memory/one H200", "classes_until_full", first_to_break())
    for p in (8, 64):
        cost = step_seconds("bcl", p, 128, 1_000_000, m)
        row(f"model/weak/bcl/local/resnet50/C=1000000/P={p}", "seconds", cost["seconds"], batch_a_gpu=128)
        row(f"model/weak/bcl/local/resnet50/C=1000000/P={p}", "exposed_share", cost["exposed_share"], batch_a_gpu=128)
    row("model/quality/C=1000000/D=2048", "gpu_seconds", 1e12 * RESNET50.features / FLOAT64_FLOPS)


if __name__ == "__main__":
    main()
