"""Tables of optimizers.jsonl and of kernels.jsonl on a CPU (benchmarks/results); the newest row of each case and metric counts."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import figures
import peer_tables
import seeded

ROOT = Path(__file__).resolve().parent.parent
KERNEL_ROWS = ROOT / "benchmarks" / "results" / "kernels.jsonl"
OTHERS = ("eager", "foreach", "fused")  # implementations beside ours
COUNTED = (
    "kernels",
    "passes",
    "other_kernels",
    "other_passes",
    "flops_vs_sgd",
    "syncs_per_step",
    "extra_memory_per_parameter",
)
HEADS = (
    "own kernels",
    "own passes",
    "getting gradients there, kernels",
    "passes",
    "FLOPs / SGD",
    "host waits",
    "memory",
)
COSINES = ("cosine_mean", "cosine_p10", "cosine_worst")


def counted(model: str = "resnet50") -> str:
    """Markdown: what the optimizer part of a step costs, ours first."""
    lines = ["| optimizer | " + " | ".join(HEADS) + " |", "|---" * (len(HEADS) + 1) + "|"]
    for case, rows in peer_tables.cases("cpu", "optimizers").items():
        if case.endswith(f"/{model}") and set(COUNTED) <= set(rows):
            found = {m: rows[m]["value"] for m in COUNTED}
            cells = (f"{v:,.0f}" if float(v).is_integer() else f"{v:.4g}" for v in found.values())
            lines.append(f"| `{case.removesuffix('/' + model)}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def on_cpu() -> str:
    """Markdown: time of every op on a CPU beside that of other implementations."""
    table: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in seeded.rows(KERNEL_ROWS):
        op, name, *rest = row["case"].split("/")
        if row["cuda"] is None and row["metric"] in ("seconds", "seconds_vs_ltfast", "share_of_copy"):
            table["/".join([op, *rest[:-1]])][name][row["metric"]] = row["value"]
    lines = [
        "| op | ms | of copy bandwidth | " + " | ".join(f"{name} / ours" for name in OTHERS) + " |",
        "|---" * 6 + "|",
    ]
    for case, found in table.items():
        ours, others = found["ltfast"], (found[name].get("seconds_vs_ltfast") for name in OTHERS)
        cells = [
            f"{1e3 * ours['seconds']:.0f}",
            f"{ours['share_of_copy']:.2f}",
            *("" if t is None else f"{t:.2f}" for t in others),
        ]
        lines.append(f"| `{case}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def direction(emas: tuple[str, ...] = ("0.5", "0.8")) -> str:
    """Markdown: cosine of mode R's direction, one line a network, sampler, kind of memory and EMA, one column an interval."""
    table: dict[tuple[str, ...], dict[int, str]] = defaultdict(dict)
    steps: dict[tuple[str, ...], int] = {}
    for case, found in peer_tables.cases("cpu", "optimizers").items():
        if "cosine_mean" not in found:
            continue
        _, model, _, kind, every, ema, sampler = case.split("/")
        key = (model, sampler, kind, ema.removeprefix("ema="))
        if key[-1] in emas:
            table[key][int(every.removeprefix("gram_every="))] = " / ".join(f"{found[m]['value']:.2f}" for m in COSINES)
            steps[key] = found["cosine_mean"]["n"]
    intervals = sorted({every for cells in table.values() for every in cells})
    heads = ["network", "batches", "steps", "Gram matrix", "EMA", *(f"every {every}" for every in intervals)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for key in sorted(table):
        model, sampler, kind, ema = key
        row = [model, sampler, str(steps[key]), kind, ema, *(table[key].get(every, "") for every in intervals)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def fill_documents() -> None:
    """Write the tables between their markers, `<!-- table: FILE/NAME -->`, wherever README and docs have them."""
    tables = {
        "table: optimizers/counted": counted(),
        "table: optimizers/direction": direction(),
        "table: kernels/cpu": on_cpu(),
    }
    for path in (
        ROOT / "README.md",
        ROOT / "docs" / "optimizers.md",
        ROOT / "docs" / "findings.md",
        ROOT / "docs" / "kernels.md",
    ):
        for marker, text in tables.items():
            if f"<!-- {marker} -->" in path.read_text():
                figures.fill(path, marker, text)
