"""Tables of what was measured on a GPU: kernels, the trainer's steps, other code; the newest row of a case and metric counts."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from peer_tables import NOT_MEASURED, Figures, cases, step_name

CLOCKS = ("device_seconds", "seconds")
OTHERS = ("eager", "compiled", "foreach", "fused")  # implementations beside ours
MODEL = "resnet32/32px/B=256/G=4/recorded"  # the README's steps


def seconds(found: Figures) -> float:
    """The device's own time, or where only that was measured the time from call to call."""
    return float(next(found[clock]["value"] for clock in CLOCKS if clock in found))


def times_ours(found: Figures, ours: Figures) -> str:
    """How many times as long as ours, both by one clock; "" without a measurement."""
    clock = next((clock for clock in CLOCKS if clock in found and clock in ours), None)
    return "" if clock is None else f"{found[clock]['value'] / ours[clock]['value']:.2f}"


def devices(found: dict[str, Figures]) -> str:
    """The GPUs and versions of some rows, for the line above their table."""
    rows = [row for metrics in found.values() for row in metrics.values()]
    return "; ".join(sorted({f"{r['device']}, torch {r['torch']}, triton {r['triton']}" for r in rows}))


def kernels() -> str:
    """Markdown: every kernel beside a copy of the same size and other implementations."""
    found, problems = cases("cuda", "kernels"), defaultdict[str, dict[str, Any]](dict)
    for case, metrics in found.items():
        op, name, *rest = case.split("/")
        problems["/".join([op, *rest])][name] = metrics
    if not found:
        return NOT_MEASURED
    lines = [
        f"{devices(found)}:\n",
        "| op | us | of copy bandwidth | " + " | ".join(f"{o} / ours" for o in OTHERS) + " |",
    ]
    lines.append("|---" * (3 + len(OTHERS)) + "|")
    for problem, by_name in problems.items():
        ours = by_name["ltfast"]
        cells = [f"{1e6 * seconds(ours):.0f}", f"{ours['share_of_copy']['value']:.2f}"]
        cells += [times_ours(by_name.get(name, {}), ours) for name in OTHERS]
        lines.append(f"| `{problem}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def steps(readme: bool = False) -> str:
    """Markdown: the trainer's steps, fastest mode first; readme: only the recorded steps of the small network."""
    found = {case: f for case, f in cases("cuda", "throughput").items() if "seconds" in f}
    if readme:
        found = {case: f for case, f in found.items() if case.endswith(MODEL)}
    if not found:
        return NOT_MEASURED
    lines = [
        "| step | ms | images/s | time / plain step | FLOPs / plain step | not forward or backward |",
        "|---" * 6 + "|",
    ]
    for case, metrics in found.items():
        values = {metric: float(row["value"]) for metric, row in metrics.items()}
        label = case.removesuffix(f"/{MODEL.split('/', 1)[1]}") if readme else case
        cells = [
            f"{1e3 * values['seconds']:.1f}", f"{values['images_per_s']:,.0f}", f"{values['ratio_vs_sgd']:.2f}",
            f"{values['flops_vs_sgd']:.2f}", f"{100 * (1 - values['share_forward']):.1f} %",
        ]  # fmt: skip
        lines.append(f"| `{label}` | " + " | ".join(cells) + " |")
    return f"{devices(found)}:\n\n" + "\n".join(lines)


def other_code() -> str:
    """Markdown: whole steps of other code beside ours."""
    found = {case: f for case, f in cases("cuda").items() if case.startswith("step/") and "seconds" in f}
    if not found:
        return NOT_MEASURED
    lines = ["| step | views | ms | time / plain step | peak MiB | machine |", "|---" * 6 + "|"]
    for case, metrics in found.items():
        config = metrics["seconds"]["config"]
        peak = f"{metrics['peak_mib']['value']:,.0f}" if "peak_mib" in metrics else NOT_MEASURED
        cells = [
            "3" if config["base"] == "bcl" else "1", f"{1e3 * metrics['seconds']['value']:.1f}",
            f"{metrics['seconds_vs_sgd']['value']:.2f}", peak, "shared" if "load" in config else "idle",
        ]  # fmt: skip
        lines.append(f"| `{step_name(case)}` | " + " | ".join(cells) + " |")
    return f"{devices(found)}:\n\n" + "\n".join(lines)


TABLES = {
    "gpu-kernels": kernels,
    "gpu-steps": steps,
    "gpu-steps-short": lambda: steps(readme=True),
    "gpu-other-code": other_code,
}
