"""Pictures and the packaged baseline, made from committed result rows and nothing else.

python benchmarks/figures.py            # writes docs/img/digits-lt.png and ltfast/baselines.json
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import seeded
from harness import RESULTS

from ltfast.config import DEFAULT_METHOD
from ltfast.recipes import ALIASES

ROOT = Path(__file__).resolve().parent.parent
# Okabe-Ito colours with distinct markers: readable in grey print and to colour-blind eyes.
STYLES = {"ce": ("#D55E00", "s", "--"), DEFAULT_METHOD: ("#0072B2", "o", "-")}


def read(bench: str) -> seeded.Runs:
    """All runs of methods as they are, as long as the longest.

    A method that a short name stands for (gsa-full+gkp) counts as rows of the short name (gkp-gsa).
    """
    short = {method: name for name, method in ALIASES.items() if "+" in method}

    def method_and_seed(case: str) -> tuple[str, int]:
        method, _, seed = case.split("/")
        return short.get(method, method), int(seed.removeprefix("seed="))

    return seeded.read(seeded.rows(RESULTS / f"{bench}.jsonl", longest=True), method_and_seed)


def newest(bench: str) -> dict[str, dict[int, dict[str, Any]]]:
    """method -> seed -> metric -> value of the last run."""
    table: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for (method, seed), run in seeded.newest(read(bench)).items():
        table[method][seed] = run
    return table


def spread(values: list[float]) -> str:
    """mean +- standard deviation (n - 1), one decimal."""
    return f"{np.mean(values):.1f} +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else f"{np.mean(values):.1f}"


def accuracy_table(bench: str) -> str:
    """Markdown: one line a method, best top-1 first; mean +- standard deviation over seeds."""
    table = newest(bench)
    order = sorted(table, key=lambda m: -np.mean([run["top1"] for run in table[m].values()]))
    lines = ["| method | seeds | top-1 % | many | medium | few | ECE % |", "|---|---|---|---|---|---|---|"]
    for method in order:
        runs = list(table[method].values())
        cells = [
            spread([run[name] for run in runs if run[name] is not None])
            for name in ("top1", "many", "medium", "few", "ece")
        ]
        lines.append(f"| `{method}` | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill(path: Path, marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->`."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    head, rest = path.read_text().split(begin)
    path.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def accuracy_by_count(path: Path, counts: list[int]) -> None:
    """Per-class accuracy against training images, plain cross-entropy and the default method, mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = newest("digits-lt")
    fig, ax = plt.subplots(figsize=(7, 3.6), dpi=150)
    for method, (color, marker, line) in STYLES.items():
        values = np.array([run["per_class"] for run in table[method].values()])
        ax.plot(
            counts,
            values.mean(0),
            color=color,
            marker=marker,
            linestyle=line,
            label=f"{method} (mean of {len(values)} seeds)",
        )
        ax.fill_between(counts, values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
    ax.set(xscale="log", xlabel="training images of the class", ylabel="test accuracy of the class, %", ylim=(0, 103))
    ax.set_xticks(counts[:-1], [str(c) for c in counts[:-1]])
    ax.minorticks_off()
    ax.invert_xaxis()
    ax.grid(alpha=0.3)
    ax.legend(loc="lower left", frameon=False)
    ax.set_title("digits-lt: accuracy by class size", fontsize=11)
    fig.tight_layout()
    fig.savefig(path)


def write_baseline(path: Path) -> None:
    """Mean test figures of `--method ce` on digits-lt, shown beside a training run's closing table."""
    runs = list(newest("digits-lt")["ce"].values())
    mean = {name: float(np.mean([run[name] for run in runs])) for name in ("top1", "many", "medium", "few", "ece")}
    mean["per_class"] = np.mean([run["per_class"] for run in runs], axis=0).tolist()
    path.write_text(json.dumps({"digits-lt": {"seeds": len(runs), **mean}}, indent=1) + "\n")


if __name__ == "__main__":
    from ltfast.data import load

    counts = load("digits-lt", num_views=1, val_per_class=10, batch=64).train_counts.tolist()
    accuracy_by_count(ROOT / "docs" / "img" / "digits-lt.png", counts)
    write_baseline(ROOT / "ltfast" / "baselines.json")
