"""benchmarks/results/REPORT.md: tables made from the committed rows and nothing else.

    python benchmarks/report.py            # writes REPORT.md and fills the marked tables of README and docs

The newest row of a case, metric and device counts. What has no row is said to be not measured.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ablation
import figures
import gpu_tables
import peer_tables
import prior
import seeded
from ablation_cells import IMPRINTED
from harness import RESULTS
from peer_tables import NOT_MEASURED

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "findings.md", ROOT / "docs" / "kernels.md")
SUPERSEDED = {"model/host/a rank": "host/a rank/torch loader/n=2000000"}  # computed: measured
Row = dict[str, Any]


class Section(NamedTuple):
    """A table of one results file."""

    title: str
    bench: str
    text: str


SECTIONS = (
    Section(
        "Kernels",
        "kernels",
        "Ours beside what a user would write. Counted anywhere, timed on a GPU; bandwidth is relative to a copy of the "
        "same size in the same run.",
    ),
    Section("Optimizer steps", "optimizers", "Whole optimizer parts: counted on the CPU, timed on a GPU."),
    Section("Training steps", "step", "One step of the trainer."),
    Section("Throughput", "throughput", "Images a second of the trainer."),
    Section("Input", "data", "Input pipelines."),
    Section("Scale", "scale", "Bookkeeping for 8,142 classes."),
)
PAIRED = (
    "Top-1 and few-shot accuracy on the balanced test split of digits-lt (CPU); differences are paired with the baseline of "
    f"the same seed, +- half of a 95 % interval (Student's t). Cells that do not say scout for {ablation.USUAL['scout']:g} of the epochs."
)


LONG = ("long", "scope-of-gsa", "long-three-views")
RELEASE = ("release", "long-release")
HALF_CIFAR = (
    "{limit_train:,} training pictures of 16 pixels, ratio {imbalance:g}, {model}, {epochs} epochs; all 10,000 pictures of "
    "the test split; {device}. Cells that do not say scout for {scout:g} of the epochs. ".format(
        **ablation.HALF, **ablation.FIXED
    )
    + "Rows: [ablation-cifar10-half.jsonl](ablation-cifar10-half.jsonl)"
)


def half_cifar(*sweeps: str) -> str:
    """By default: rules on balanced softmax, one view; the default method on bcl, three views; what the speedrun's recipe may
    gain from."""
    return tables("cifar10-half", *(sweeps or ("one-view", "three-views", "recipe")))


def tables(study: str, *sweeps: str) -> str:
    """Tables of some sweeps of a study."""
    return "\n\n".join(ablation.table(sweep, RESULTS / f"{ablation.bench_of(study)}.jsonl") for sweep in sweeps)


FULL = "cifar10-lt-resnet8"
FULL_CIFAR = (
    "All 12,406 training pictures, ratio {imbalance:g}, the recipe of `--dataset cifar10-lt` (200 epochs, multistep) with a "
    "{model}, {precision}, {device}. ".format(**ablation.FULL)
    + f"Rows: [ablation-{FULL}.jsonl](ablation-{FULL}.jsonl)"
)


def full_cifar() -> str:
    """What acts in the last fifth of the epochs, weaker, of the classifier alone, or later, on all of CIFAR-10-LT."""
    return tables(FULL, "last-fifth", "last-fifth-weaker", "scope-of-gsa", "begin")


FINE_TUNING = (
    "Five classes, {limit_train} training pictures of 32 pixels, ratio {imbalance:g}, {model}, first weights from a run on the "
    "other five classes (`benchmarks/other_classes.py`), {epochs} epochs, batch {batch}, lr {lr:g}, {schedule}; all 5,000 "
    "pictures of the test split; {device}. Cells that do not say scout for {scout:g} of the epochs. ".format(
        **ablation.FINE, **ablation.FIXED
    )
    + f"Rows: [ablation-{ablation.FINE_TUNED}.jsonl](ablation-{ablation.FINE_TUNED}.jsonl)"
)
FROM_SCRATCH = (
    "From random weights, lr {lr:g}. Rows: [ablation-cifar10-five.jsonl](ablation-cifar10-five.jsonl)".format(
        **ablation.STUDIES["cifar10-five"][1]
    )
)


def fine_tuning() -> str:
    """Every published rule from weights of other classes."""
    return tables(ablation.FINE_TUNED, "fine-tuning")


def from_scratch() -> str:
    """Some of them on the same pictures from random weights."""
    return tables("cifar10-five", "from-scratch")


PLANKTON = (
    "PlanktonSet 1.0, 121 classes in the frequencies of nature (`benchmarks/natural.py`): {model} with the weights {weights}, "
    "{image_size} pixels, {epochs} epochs, batch {batch}, {schedule}; 2,793 training pictures, 195 to 2 a class, and up to 25 test "
    "pictures a class, 2,627 in all; {device}.".format(**ablation.PLANKTON)
)


def plankton(study: str = "plankton") -> str:
    """What gained in fine-tuning on CIFAR's pictures, on other ones from published weights."""
    return tables(study, "published-weights")


def imprinting(study: str = "plankton") -> str:
    """What it changes that the classifier begins at mean features: each method and setting against itself."""
    runs = ablation.read(RESULTS / f"{ablation.bench_of(study)}.jsonl")
    lines = ["| cell | seeds | top-1 % from random | from mean features | top-1 | few | ECE |", "|" + "---|" * 7]
    for name in ablation.SWEEPS["imprinting"]:
        plain = name.replace(IMPRINTED, "")
        on, off = ablation.same(name), ablation.same(plain)
        pairs = seeded.pairs(runs, on, off) if plain != name else []
        if pairs:
            means = [ablation.mean_of([pair[side] for pair in pairs], "top1") for side in (1, 0)]
            gains = [ablation.paired(on, runs, figure, off) for figure in ("top1", "few", "ece")]
            lines.append("| " + " | ".join([f"`{plain}`", str(len(pairs)), *means, *gains]) + " |")
    return "\n".join(lines)


def rate(study: str) -> str:
    """The learning rate of a study, and where its rows are."""
    name = ablation.bench_of(study)
    return f"lr {ablation.study_of(study)[1]['lr']:g} ([rows]({name}.jsonl))"


SPEEDRUN = (
    "The recipe `cifar10-lt-speedrun` on all 12,406 training pictures at half size, with a {model} and {epochs} epochs, {device}; all "
    "10,000 pictures of the test split. Rows: [ablation-speedrun-half.jsonl](ablation-speedrun-half.jsonl)".format(
        **ablation.SPEEDRUN
    )
)


def speedrun() -> str:
    """One change of the speedrun's recipe at a time."""
    return tables("speedrun-half", "speedrun")


def priors() -> str:
    """One training evaluated for two class frequencies, by study."""
    parts = ((study, prior.table(study, RESULTS / "prior.jsonl")) for study in ablation.STUDIES)
    return "\n\n".join(f"{study}:\n\n{table}" for study, table in parts if table.count("\n") > 1) or NOT_MEASURED


def read(bench: str) -> list[Row]:
    """All rows of one results file, oldest first; none if there is no file."""
    return seeded.rows(RESULTS / f"{bench}.jsonl")


def newest(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(device, case) -> metric -> its last row."""
    table: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        table[row["device"], row["case"]][row["metric"]] = row
    return table


def number(value: Any) -> str:
    """Four significant digits; whole numbers as they are; lists by their length."""
    if isinstance(value, list):
        return f"[{len(value)} values]"
    if value is None:
        return "-"
    if isinstance(value, str) or float(value).is_integer():
        return f"{value:,.0f}" if not isinstance(value, str) else value
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def pivot(rows: list[Row]) -> str:
    """Markdown, tables for each device: a line a case (seeds averaged), a column a metric, kindred cases together."""
    grouped: dict[str, dict[str, dict[str, list[Any]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (device, case), metrics in newest(rows).items():
        for metric, row in metrics.items():
            grouped[device][re.sub(r"/seed=\d+$", "", case)][metric].append(row["value"])
    parts = []
    for device, cases in grouped.items():
        parts.append(f"Device: {device}")
        for names, members in kindred(cases):
            lines = ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
            for case in members:
                values = [mean(cases[case][name]) if name in cases[case] else "" for name in names]
                lines.append(f"| `{case}` | " + " | ".join(values) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def kindred(cases: Mapping[str, Mapping[str, Any]]) -> list[tuple[list[str], list[str]]]:
    """(metrics, cases) of tables in which every case has at least half of the metrics that its table had before it."""
    tables: list[tuple[list[str], list[str]]] = []
    for case, metrics in cases.items():
        for names, members in tables:
            if 2 * len(metrics.keys() & set(names)) >= len(metrics.keys() | set(names)):
                names.extend(name for name in metrics if name not in names)
                members.append(case)
                break
        else:
            tables.append((list(metrics), [case]))
    return tables


def mean(values: list[Any]) -> str:
    """One number of one or several seeds."""
    return number(statistics.fmean(values) if len(values) > 1 and not isinstance(values[0], list) else values[0])


def section(part: Section) -> str:
    """Title, sentence, table, and what is missing; rows of a case that another one replaced are left out."""
    rows = read(part.bench)
    cases = {row["case"] for row in rows}
    rows = [row for row in rows if SUPERSEDED.get(row["case"]) not in cases]
    lines = [f"## {part.title}", part.text, f"Rows: [{part.bench}.jsonl]({part.bench}.jsonl)" if rows else NOT_MEASURED]
    if rows:
        lines.append(pivot(rows))
    if rows and all(row["cuda"] is None for row in rows):
        lines.append(f"On a GPU: {NOT_MEASURED}.")
    return "\n\n".join(lines)


def accuracy(bench: str) -> str:
    """Mean and standard deviation over seeds of every method, and how the runs were made."""
    rows = seeded.rows(RESULTS / f"{bench}.jsonl", longest=True)
    if not rows:
        return NOT_MEASURED
    settings = sorted({(r["config"]["images"], r["config"]["epochs"], r["config"]["batch"], r["device"]) for r in rows})
    text = "; ".join(f"{n:,} training images, {e} epochs, batch {b}, {device}" for n, e, b, device in settings)
    return f"{text}. Rows: [{bench}.jsonl]({bench}.jsonl)\n\n{figures.accuracy_table(bench)}"


def preset_pairs(bench: str, base: str = "bcl") -> str:
    """Every method against `base` (see `seeded.pairs`): mean differences and half of their 95 % intervals."""
    if not read(bench):
        return NOT_MEASURED
    runs = figures.read(bench)
    lines = [f"| method | pairs | top-1 against {base} | few against {base} | ECE against {base} |", "|---" * 5 + "|"]
    found = {}
    for method in figures.newest(bench):
        both = seeded.pairs(runs, method, base)
        if method == base or len(both) < 2:
            continue
        pairs = [ablation.interval([run[f] - partner[f] for run, partner in both]) for f in ("top1", "few", "ece")]
        text = " | ".join(f"{mean:+.2f} +- {half:.2f}" for mean, half in pairs)
        found[f"| `{method}` | {len(both)} | {text} |"] = pairs[0][0]
    return "\n".join(lines + sorted(found, key=lambda line: -found[line]))


def ablations(dataset: str = ablation.DIGITS) -> str:
    """A table for each sweep that has a row; the others are named."""
    path, parts, missing = RESULTS / f"{ablation.bench_of(dataset)}.jsonl", [], []
    measured = {cell for cell, _ in ablation.rows(path)}
    for sweep in ablation.sweeps_of(dataset):
        cells = ablation.SWEEPS[sweep]
        own = [name for name in cells if name != ablation.baseline_of(name)] or list(cells)
        if any(ablation.same(name) in measured for name in own):
            parts.append(f"### {sweep}\n\n{ablation.table(sweep, path)}")
        else:
            missing.append(sweep)
    if missing:
        parts.append(f"{NOT_MEASURED.capitalize()}: {', '.join(missing)}.")
    return "\n\n".join(parts)


def precision() -> str:
    """Cosine of effective and intended perturbation: a line a rule, a column a rounding; means over seeds."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, case), metrics in newest(read("precision")).items():
        dataset, rule, _, rounding, _ = case.split("/")
        cells[dataset, rule][rounding].append(metrics["cosine"]["value"])
    if not cells:
        return NOT_MEASURED
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    lines = ["| pictures | rule | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for (dataset, rule), found in cells.items():
        values = [f"{statistics.fmean(found[name]):.3f}" for name in names]
        lines.append(f"| {dataset} | `{rule}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def draw_ablations(path: Path) -> bool:
    """Paired differences of all cells with two seeds or more, with their 95 % intervals; False if there are none."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = ablation.read(RESULTS / "ablation.jsonl")
    names = dict.fromkeys(name for sweep in ablation.SWEEPS.values() for name in sweep)  # once, whatever sweeps have it
    cells = [name for name in names if name == ablation.same(name)]
    names = [name for name in cells if name != ablation.baseline_of(name)]
    drawn = []
    for name in names:
        deltas = ablation.differences(name, runs, "top1")
        if len(deltas) > 1:
            drawn.append((f"{name} ({len(deltas)})", *ablation.interval(deltas), deltas))
    if not drawn:
        return False
    fig, ax = plt.subplots(figsize=(7, 1 + 0.3 * len(drawn)), dpi=130)
    for y, (_, mean, half, deltas) in enumerate(drawn):
        ax.plot(deltas, [y] * len(deltas), "|", color="#777777", markersize=9)
        ax.errorbar(mean, y, xerr=half, fmt="o", color="#0072B2", capsize=3)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(drawn)), [name for name, *_ in drawn], fontsize=8)
    ax.set(xlim=(-6, 6), ylim=(len(drawn) - 0.5, -0.5))
    ax.set(xlabel="top-1 against the baseline of the same seed, points\nbar: 95 % interval, ticks: seeds")
    ax.set_title("digits-lt ablations (number of seeds)", fontsize=10)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
    return True


def other_code() -> str:
    """Other people's code beside ours: optimizer parts, whole steps, pipelines."""
    if not read("peers"):
        return NOT_MEASURED
    part = (
        "Gradients that cost nothing; gathering them included. `torch.compile`: kernels that it makes for a CPU, at least one a "
        "tensor; for a GPU it joins those of a list."
    )
    return "\n\n".join([
        "Other implementations by path or package, only adapted here (`benchmarks/peers.py`, `peer_steps.py`, `peer_pipeline.py`). "
        "Rows: [peers.jsonl](peers.jsonl)",
        f"### Optimizer part of a step\n\n{part}\n\n{peer_tables.optimizer_part()}",
        f"### Whole steps\n\nForward, backward and update. `loop/`: a plain loop around that optimizer.\n\n{peer_tables.whole_steps()}",
        "### The released training function and `--method gsa-release --groups 1`\n\nThe same steps, SiLU for ReLU "
        f"(`benchmarks/peer_training.py`).\n\n{peer_tables.same_steps()}",
        f"### Input of CIFAR-sized pictures\n\nThree views a picture, one process, one thread.\n\n{peer_tables.pipelines()}",
    ])  # fmt: skip


def report() -> str:
    """The whole page."""
    head = (
        "# Measurements\n\nMade by `python benchmarks/report.py` from the rows in this folder; each row names its commit, "
        "versions and date. Run `python benchmarks/run.py --budget SECONDS` to fill what is missing."
    )
    smoke = "Smoke-sized runs unless the settings say otherwise."
    kept = "Cosine of the effective and the intended perturbation of a trained ResNet-20. Rows: [precision.jsonl](precision.jsonl)"
    picture = "![Paired differences](ablation.png)\n\n" if draw_ablations(RESULTS / "ablation.png") else ""
    return "\n\n".join([
        head,
        f"## Accuracy, digits-lt\n\n{accuracy('digits-lt')}\n\n![By class size](../../docs/img/digits-lt.png)",
        f"Paired by seed, +- half of a 95 % interval:\n\n{preset_pairs('digits-lt')}",
        f"## Accuracy, CIFAR-10-LT\n\n{smoke}\n\n{accuracy('cifar10-lt')}",
        f"## Ablations\n\n{PAIRED}\n\n{picture}{ablations()}",
        f"## Ablations, CIFAR-10-LT\n\n{ablations('cifar10-lt')}",
        f"## CIFAR-10-LT in full, a small network\n\n{FULL_CIFAR}\n\n{full_cifar()}",
        f"## CIFAR-10-LT at half size\n\n{HALF_CIFAR}\n\n{half_cifar()}",
        f"Every published rule at its default:\n\n{half_cifar('published')}",
        f"Five times the epochs:\n\n{half_cifar(*LONG)}",
        f"The authors' released training function on the same pictures:\n\n{half_cifar(*RELEASE)}",
        f"## Fine-tuning\n\n{FINE_TUNING}\n\n{fine_tuning()}",
        f"{FROM_SCRATCH}\n\n{from_scratch()}",
        f"### From published weights\n\n{PLANKTON}\n\n"
        + "\n\n".join(f"With {rate(study)}:\n\n{plankton(study)}" for study in ("plankton", "plankton-fast"))
        + f"\n\nThe classifier begun at the mean features of its classes, {rate('plankton')}:\n\n{imprinting()}"
        + f"\n\nOn CIFAR's pictures, {rate(ablation.FINE_TUNED)} where nothing else is said:\n\n{imprinting(ablation.FINE_TUNED)}",
        f"## The speedrun's recipe at half size\n\n{SPEEDRUN}\n\n{speedrun()}",
        f"## Answers for other class frequencies\n\nRows: [prior.jsonl](prior.jsonl)\n\n{priors()}",
        f"## Precision\n\n{kept}\n\n{precision()}",
        f"## Other code\n\n{other_code()}",
        *(section(part) for part in SECTIONS),
    ]) + "\n"  # fmt: skip


def fill_page(path: Path) -> None:
    """Regenerate the marked tables of a page."""
    made = {name: lambda name=name: figures.accuracy_table(name) for name in ("digits-lt", "cifar10-lt")}
    made |= {f"ablation-{s}": lambda s=s: ablation.table(s, RESULTS / "ablation.jsonl") for s in ablation.SWEEPS}
    made |= {"precision": precision, "peers": peer_tables.optimizer_part, "steps": peer_tables.whole_steps}
    made["full-cifar"] = full_cifar
    made["half-cifar"] = half_cifar
    made["half-cifar-published"] = lambda: half_cifar("published")
    made["half-cifar-long"] = lambda: half_cifar(*LONG)
    made["half-cifar-release"] = lambda: half_cifar(*RELEASE)
    made["fine-tuning"] = fine_tuning
    made["from-scratch"] = from_scratch
    made |= {"plankton": plankton, "plankton-fast": lambda: plankton("plankton-fast")}
    made |= {"imprinting": imprinting, "imprinting-cifar": lambda: imprinting(ablation.FINE_TUNED)}
    made |= {"speedrun": speedrun, "prior": priors}
    made["digits-lt-paired"] = lambda: preset_pairs("digits-lt")
    made |= gpu_tables.TABLES
    if path.name == "README.md":  # shorter tables of the same name
        made |= {"peers": peer_tables.readme_parts, "steps": peer_tables.readme_steps}
    for name in re.findall(r"<!-- ([a-z0-9-]+) -->", path.read_text()):
        if name in made:
            figures.fill(path, name, made[name]())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "REPORT.md")
    parser.add_argument("--no-pages", action="store_true", help="leave README and docs as they are")
    args = parser.parse_args()
    args.out.write_text(report())
    written = [args.out]
    for page in PAGES if not args.no_pages else ():
        before = page.read_text()
        fill_page(page)
        written += [page] if page.read_text() != before else []
    print("wrote " + ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
