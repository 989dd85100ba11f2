"""Tables of benchmarks/results/peers.jsonl: the optimizer part of a step, whole steps, pipelines; the newest row counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import seeded
from harness import RESULTS

NOT_MEASURED = "not measured"
Figures = dict[str, dict[str, Any]]  # metric -> row

PART = ("kernels", "passes", "syncs_per_step", "extra_memory_per_parameter", "backwards", "seconds_vs_foreach")
PART_HEADS = (
    "kernels", "parameter-sized passes", "host waits", "memory, in parameters", "backward passes", "CPU time / foreach-sam",
)  # fmt: skip
STEP = ("kernels", "gflops", "flops_vs_sgd", "seconds_vs_sgd", "gigabytes", "syncs_per_step", "peak_mib")
STEP_HEADS = (
    "kernels", "GFLOP", "FLOPs / plain step", "CPU time / plain step", "GB moved", "host waits", "peak MiB",
)  # fmt: skip
SAME = "same-steps/release/"  # the released code's steps and ours of the same method
README_NETWORK = "resnet50"  # of the optimizer part: large enough for time to be memory traffic


def cases(device: str = "cpu", bench: str = "peers") -> dict[str, Figures]:
    """Case -> metric -> newest row of one kind of device: "cpu", or "cuda" for any GPU."""
    table = defaultdict[str, Figures](dict)
    for row in seeded.rows(RESULTS / f"{bench}.jsonl"):
        if (row["cuda"] is None) == (device == "cpu"):
            table[row["case"]][row["metric"]] = row
    return dict(table)


def is_part(case: str) -> bool:
    """True for an optimizer part, false for a whole step, a pipeline or a comparison of steps."""
    return not case.startswith(("step/", "pipeline/", SAME))


def value(found: Figures, metric: str) -> str:
    """A cell."""
    if metric not in found:
        return NOT_MEASURED if metric.startswith("seconds") else "not counted"
    number = float(found[metric]["value"])
    return f"{number:,.0f}" if number.is_integer() or number >= 100 else f"{number:.3g}"


def table(
    chosen: dict[str, Figures], label: Callable[[str], str], metrics: Sequence[str], heads: Sequence[str], first: str
) -> str:
    """Markdown: one line a case."""
    lines = [f"| {first} | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for case, found in chosen.items():
        lines.append(f"| `{label(case)}` | " + " | ".join(value(found, m) for m in metrics) + " |")
    return "\n".join(lines)


def parts(model: str) -> dict[str, Figures]:
    """Optimizer parts on the parameters of one network, fewest kernels first."""
    found = {case: f for case, f in cases().items() if is_part(case) and case.endswith(f"/{model}")}
    return dict(sorted(found.items(), key=lambda item: item[1]["kernels"]["value"]))


def part_name(case: str) -> str:
    """<package>/<optimizer>/<model> -> <package>/<optimizer>."""
    return case.rsplit("/", 1)[0]


def optimizer_part() -> str:
    """Everything of a step but forward and backward, by network."""
    models = list(dict.fromkeys(case.rsplit("/", 1)[1] for case in cases() if is_part(case)))
    made = [f"Parameters of {m}:\n\n{table(parts(m), part_name, PART, PART_HEADS, 'optimizer')}" for m in models]
    return "\n\n".join(made) if made else NOT_MEASURED


def whole_steps() -> str:
    """Whole steps, by base loss."""
    found = {case: figures for case, figures in cases().items() if case.startswith("step/")}
    if not found:
        return NOT_MEASURED
    parts = []
    for base, what in (("ce", "Plain cross-entropy, one view"), ("bcl", "Balanced contrastive learning, three views")):
        rows = {case: f for case, f in found.items() if f["kernels"]["config"]["base"] == base}
        if not rows:
            continue
        config = next(iter(rows.values()))["kernels"]["config"]
        rows = dict(
            sorted(rows.items(), key=lambda item: (item[1]["flops_vs_sgd"]["value"] > 1.5, item[1]["kernels"]["value"]))
        )
        text = f"{what}; {config['model']}, batch {config['batch']}, {config['groups']} groups, {config['precision']}:"
        parts.append(f"{text}\n\n{table(rows, step_name, STEP, STEP_HEADS, 'step')}")
    return "\n\n".join(parts)


def step_name(case: str) -> str:
    """step/<name>/<model>/B=<batch> -> name."""
    return case.split("/", 1)[1].rsplit("/", 2)[0]


def pipelines() -> str:
    """Images a second of the small pipelines."""
    lines = ["| pipeline | images a processor second | images/s on a GPU machine |", "|---|---|---|"]
    timed = cases("cuda")
    found = {case: figures for case, figures in cases().items() if case.startswith("pipeline/")}
    for case, figures in found.items():
        gpu = timed.get(case, {}).get("images_per_s")
        cell = f"{gpu['value']:,.0f} ({gpu['device']})" if gpu else NOT_MEASURED
        lines.append(f"| `{case.split('/', 1)[1]}` | {value(figures, 'images_per_cpu_s')} | {cell} |")
    return "\n".join(lines) if found else NOT_MEASURED


def same_steps() -> str:
    """How far the released code's steps and ours lead apart."""
    lines = ["| pictures | network | steps | distance / norm of the parameters |", "|---|---|---|---|"]
    for case, found in cases().items():
        if case.startswith(SAME):
            row = found["apart"]
            about = row["config"]
            lines.append(f"| {case.removeprefix(SAME)} | {about['model']} | {about['steps']} | {row['value']:.1e} |")
    return "\n".join(lines) if len(lines) > 2 else NOT_MEASURED


README_STEPS = (
    "ltfast/ce", "timm/train_one_epoch", "loop/ltfast/sam", "loop/davda54/SAM", "loop/pytorch_optimizer/SAM", "composer/SAM",
    "ltfast/bcl", "ltfast/gsa-paper", "ltfast/gkp-gsa", "ltfast/gsa-release+gkp", "release/train",
)  # fmt: skip

README_STEP_COLUMNS = ("flops_vs_sgd", "seconds_vs_sgd", "kernels", "syncs_per_step", "peak_mib")


def readme_steps() -> str:
    """The most telling whole steps, in a fixed order."""
    found = {step_name(case): figures for case, figures in cases().items() if case.startswith("step/")}
    lines = [
        "| whole step | views | FLOPs / plain step | CPU time / plain step | kernels | host waits | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in README_STEPS:
        if name in found:
            views = 3 if found[name]["kernels"]["config"]["base"] == "bcl" else 1
            cells = [value(found[name], m) for m in README_STEP_COLUMNS]
            lines.append(f"| `{name}` | {views} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def readme_parts() -> str:
    """The optimizer part in four columns."""
    columns = ("seconds_vs_foreach", "kernels", "passes", "syncs_per_step")
    lines = [
        "| optimizer | CPU time / foreach-sam | kernels | parameter-sized passes | host waits |",
        "|---|---|---|---|---|",
    ]
    for case, figures in parts(README_NETWORK).items():
        if "passes" in figures:
            lines.append(f"| `{part_name(case)}` | " + " | ".join(value(figures, m) for m in columns) + " |")
    return "\n".join(lines)
