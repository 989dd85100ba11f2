"""Ablations: each cell changes one thing, every seed is paired with plain BCL (or balanced softmax) of the same seed.

    python benchmarks/ablation.py --list                                # sweeps and their cells
    python benchmarks/ablation.py --sweeps radius-full sam --seeds 0 1 2     # digits-lt
    python benchmarks/ablation.py --dataset cifar10-lt --data-dir CIFAR --sweeps baseline gkp    # needs a GPU
    python benchmarks/ablation.py --dataset cifar10-half --data-dir HALF.npz --sweeps one-view   # minutes a run
    python benchmarks/ablation.py --dataset cifar10-lt-resnet8 --data-dir CIFAR --sweeps last-fifth    # hours
    python benchmarks/ablation.py --dataset cifar10-finetuned --data-dir AFTER.npz --weights BEFORE.safetensors --sweeps fine-tuning
    python benchmarks/ablation.py --dataset plankton --data-dir PLANKTON --sweeps published-weights    # from published weights
    python benchmarks/ablation.py --table                               # means and 95 % intervals from the rows there are
Runs are made in this process, all cells at one seed before the next, so that a budget that ends early still compares like
with like. A cell and seed that has its row is not run again. HALF.npz is what half_size.py writes, PLANKTON natural.py. Rows: case
"<data set>/<cell>/seed=<k>" of ablation.jsonl, or of ablation-<data set>.jsonl for other data than digits-lt.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import harness
import seeded
import torch
from ablation_cells import RELEASE, SWEEPS, USUAL, Cell, baseline_of, same, sweeps_of

from ltfast.recipes import cifar10_speedrun, fine_tuning

FIGURES = ("top1", "medium", "few", "ece")
DIGITS = "digits-lt"
FIXED = {"tensorboard": False, "checkpoint_every": 10**6, **USUAL}
SMALL = {"device": "cpu", "compile": "off"}  # of digits-lt: everywhere the same
# CIFAR-10-LT as far as two CPU cores go: 4,000 training pictures of 16 pixels (1,612 to 16 a class), all 10,000 of the test split.
HALF = {
    **SMALL, "imbalance": 100.0, "limit_train": 4000, "val_per_class": 0, "model": "resnet8", "epochs": 40, "batch": 64,
    "lr": 0.1, "schedule": "cosine", "warmup": 3.0,
}  # fmt: skip
# All of CIFAR-10-LT by its own recipe, in the precision of a GPU, with the network that two CPU cores can train.
FULL = {"device": "cpu", "precision": "bf16", "compile": "on", "imbalance": 100.0, "model": "resnet8"}
# Five classes of CIFAR-10 (500 to 5 training pictures), from a network trained on the other five (other_classes.py).
FINE = {**HALF, "limit_train": 729, "model": "resnet20", "batch": 32, "lr": 0.02}
FINE_TUNED = "cifar10-finetuned"
# The speedrun's recipe with a network of half its width and pictures of half their size, for 60 epochs: all of CIFAR-10-LT.
SPEEDRUN = {
    **cifar10_speedrun(), **SMALL, "imbalance": 100.0, "model": "resnet14-w32", "epochs": 60, "warmup": 3.0,
    "untimed_steps": 0, "table": False,
}  # fmt: skip
# Plankton as it was found (natural.py), 195 to 2 pictures a class: the recipe for fine-tuning in half its epochs, on pictures that two
# CPU cores can take.
PLANKTON = {
    **fine_tuning(), "epochs": 20, "device": "cpu", "compile": "on", "model": "mobilenet_v2", "weights": "IMAGENET1K_V1",
    "image_size": 64,
}  # fmt: skip
STUDIES: dict[str, tuple[str, dict[str, Any]]] = {
    DIGITS: (DIGITS, SMALL), "cifar10-half": ("folder-small", HALF), "cifar10-lt-resnet8": ("cifar10-lt", FULL),
    FINE_TUNED: ("folder-small", FINE), "cifar10-five": ("folder-small", {**FINE, "lr": 0.1}),
    "speedrun-half": ("folder-small", SPEEDRUN), "plankton": ("folder", PLANKTON),
    "plankton-fast": ("folder", {**PLANKTON, "lr": 0.02}),
}  # fmt: skip
State = tuple[dict[str, torch.Tensor], dict[str, Any]]
_kept: dict[tuple[Any, ...], tuple[float, State]] = {}  # the newest end of scouting and its share of the epochs


class Scouted(Exception):
    """Scouting is over."""


def bench_of(dataset: str) -> str:
    """Name of the results file."""
    return "ablation" if dataset == DIGITS else f"ablation-{dataset}"


def study_of(study: str) -> tuple[str, dict[str, Any]]:
    """(data set, settings) of a study: a name of STUDIES, or a data set with its own recipe."""
    return STUDIES.get(study, (study, {}))


def configured(study: str, method: str, flags: Mapping[str, Any]) -> Any:
    """The config of a run of a study."""
    from ltfast.recipes import build_config

    dataset, own = study_of(study)
    return build_config(dataset, method, {}, {**FIXED, **own, **flags})


def scouted(dataset: str, base: str, seed: int, scout: float, flags: tuple[tuple[str, Any], ...]) -> State:
    """State of a run at the end of scouting, which is the base loss and the same for every cell with a memory bank.

    The newest state is kept: what scouts as long begins there, and what scouts longer goes on from it.
    """
    from ltfast.dist import Ranks
    from ltfast.progress import Progress
    from ltfast.resume import capture, restore
    from ltfast.train import Trainer

    key = (dataset, base, seed, flags)
    share, state = _kept.get(key, (0.0, None))
    if state is not None and share == scout:
        return state

    class Scout(Trainer):
        def grouping_due(self, epoch: int) -> bool:
            if super().grouping_due(epoch):
                raise Scouted
            return False

    config = configured(dataset, f"{base}+gkp", {**dict(flags), "seed": seed, "scout": scout})
    scout_run = Scout(config, None, Ranks(), Progress())
    if state is not None and share < scout:
        restore(scout_run, *state)
    with contextlib.suppress(Scouted):
        scout_run.fit()
        raise SystemExit("stopped while scouting")
    tensors, meta, shared = capture(scout_run)
    state = {name: tensor.clone() for name, tensor in (tensors | shared).items()}, meta
    _kept.clear()
    _kept[key] = scout, state
    return state


def run_released(dataset: str, cell: Cell, seed: int, flags: Mapping[str, Any], path: Path) -> dict[str, float]:
    """Figures of the released training function on the data, epochs and schedule of the other cells."""
    import peer_training

    config = configured(dataset, "gsa-release", {"groups": 1, **cell.settings, **flags, "seed": seed})
    return tested(peer_training.run(path, config))


def tested(result: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an evaluation that a row keeps."""
    return {name: result[name] for name in FIGURES if result[name] is not None}


def in_common(dataset: str, cell: Cell, others: Iterable[Cell]) -> float | None:
    """Share of the epochs that a cell of plain descent has in common with the first of `others` that scouts by the same steps.

    None: it is another rule or changes a setting, or none of them does.
    """
    from ltfast.recipes import BASES, needs_groups, rule_of

    if cell.method not in BASES or cell.settings.keys() - {"epochs"}:
        return None
    for other in others:
        if other.method == RELEASE or other.settings.get("epochs") != cell.settings.get("epochs"):
            continue
        config = configured(dataset, other.method, other.settings)
        if config.loss.loss == cell.method and needs_groups(config, rule_of(config)):
            return config.preserve.scout
    return None


def run_cell(
    dataset: str, cell: Cell, seed: int, flags: Mapping[str, Any], common: float | None = None
) -> dict[str, float]:
    """Figures of one cell trained in this process: test accuracy of its last weights (the test split chooses nothing).

    common: what `in_common` says of a cell that does not scout.
    """
    from ltfast.dist import Ranks
    from ltfast.progress import Progress
    from ltfast.resume import restore
    from ltfast.runs import RunFolder
    from ltfast.train import Trainer

    with tempfile.TemporaryDirectory(prefix="ltfast-ablation-") as folder:
        flags = {**cell.settings, **flags, "seed": seed, "out": f"{folder}/run"}
        config = configured(dataset, cell.method, flags)
        trainer = Trainer(config, RunFolder.create(config), Ranks(), Progress())
        share = config.preserve.scout if trainer.scouts else common
        if share is not None:
            shared = tuple(shared_flags(flags).items())
            tensors, meta = scouted(dataset, config.loss.loss, seed, share, shared)
            restore(trainer, tensors, meta)
        return {**tested(fitted(trainer)["last"]), **mechanics(trainer.folder)}


def fitted(trainer: Any) -> dict[str, Any]:
    """What training to the end comes to; its run folder is closed."""
    result = trainer.fit()
    if "stopped" in result:
        config = trainer.config
        raise SystemExit(f"{config.method}, seed {config.run.seed}: {result['stopped']}; no row written")
    trainer.store.close()
    trainer.folder.close()
    return result


def shared_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that scouting depends on: where it begins, and the descent. Cells change others of sharpness and preservation."""
    from ltfast.config import FIELDS

    return {
        n: v
        for n, v in flags.items()
        if n in ("data_dir", "weights", "imprint") or FIELDS[n][0] in ("optim", "data", "loss")
    }


def mechanics(run: Any) -> dict[str, float]:
    """What the method did, as means over the epochs after scouting.

    gkp_over_grad: norm of the GKP force over that of the loss gradient; clipped_below, clipped_above: shares of radii on a
    bound; length: |s^-1 eps| of a group; refresh_cos: remembered against exact direction at Gram refreshes;
    anchor_away: distance of theta from GKP's anchor when it was made, over theta's norm; anchor_capped: share of the
    encoder's parameters whose weight A was capped, so that they do not overshoot.
    """
    epochs = {row["epoch"]: row for row in run.metrics("epoch") if row["phase"] == "train"}
    found: dict[str, list[float]] = defaultdict(list)
    for row in run.metrics("forces"):
        if row.get("gkp") is not None and row["epoch"] in epochs:
            found["gkp_over_grad"].append(row["gkp"] / max(epochs[row["epoch"]]["grad_norm"], 1e-12))
    for row in run.metrics("anchor"):
        found["anchor_away"].append(row["away"])
        found["anchor_capped"].append(row["capped"])
    for row in run.metrics("ascent"):
        if row["epoch"] not in epochs:
            continue
        for name, key in (("clipped_above", "above"), ("clipped_below", "below"), ("length", "length")):
            values = [v for v in row[key] if v is not None]
            found[name].append(statistics.fmean(values))
        if "refresh_cos" in row:
            found["refresh_cos"].append(row["refresh_cos"])
    return {name: statistics.fmean(values) for name, values in found.items()}


def read(path: Path) -> seeded.Runs:
    """All runs of cells."""

    def cell_and_seed(case: str) -> tuple[str, int]:
        cell, seed = case.partition("/")[2].rsplit("/seed=", 1)
        return cell, int(seed)

    return seeded.read(seeded.rows(path), cell_and_seed)


def rows(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(cell, seed) -> metric -> value of the last run in a file."""
    return seeded.newest(read(path))


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its Student-t confidence interval; half-width infinite for one value."""
    from ltfast.report.seeds import half_interval

    return statistics.fmean(values), half_interval(values)


def table(sweep: str, path: Path) -> str:
    """Markdown of one sweep: mean top-1, few (medium where no class is so small) and ECE, and their paired differences to the
    baseline with 95 % intervals."""
    found = read(path)
    base = baseline_of(next(iter(SWEEPS[sweep]))).partition(",")[0]
    tail = "medium" if found and not any("few" in run for run in found.values()) else "few"
    lines = [
        f"| cell | seeds | top-1 % | {tail} % | top-1 against {base} | {tail} against {base} | ECE % | ECE against {base} | "
        "mechanics |",
        "|" + "---|" * 9,
    ]
    for name in SWEEPS[sweep]:
        runs = [run for (cell, _), run in seeded.newest(found).items() if cell == same(name)]
        if not runs:
            lines.append(f"| `{name}` | 0 | not measured |" + " |" * 6)
            continue
        cells = [f"`{name}`", str(len(runs)), *(mean_of(runs, figure) for figure in ("top1", tail))]
        cells += [paired(same(name), found, figure) for figure in ("top1", tail)]
        cells += [mean_of(runs, "ece"), paired(same(name), found, "ece"), mechanics_text(runs)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_of(runs: Iterable[Mapping[str, float]], figure: str) -> str:
    """Mean with two decimals; "-" where there is no such class."""
    values = [run[figure] for run in runs if figure in run]
    return f"{statistics.fmean(values):.2f}" if values else "-"


def differences(cell: str, runs: seeded.Runs, figure: str, base: str | None = None) -> list[float]:
    """A figure of a cell's last runs minus that of `base`, the cell's baseline if none is given."""
    pairs = seeded.pairs(runs, cell, base or baseline_of(cell))
    return [run[figure] - partner[figure] for run, partner in pairs if figure in run and figure in partner]


def paired(cell: str, runs: seeded.Runs, figure: str, base: str | None = None) -> str:
    """Mean difference to the baseline of the same seeds, +- half of its 95 % interval."""
    deltas = differences(cell, runs, figure, base)
    if not deltas:
        return "no baseline" if not seeded.pairs(runs, cell, base or baseline_of(cell)) else "-"
    mean, half = interval(deltas)
    return f"{mean:+.2f} +- {half:.2f}" if len(deltas) > 1 else f"{mean:+.2f} (one seed)"


def mechanics_text(runs: Iterable[Mapping[str, float]]) -> str:
    """What the rows say about the mechanics of a cell, for instance `GKP/grad .03`."""
    names = {
        "gkp_over_grad": "GKP/gradient", "anchor_away": "anchor away", "anchor_capped": "capped", "length": "length",
        "clipped_above": "on upper bound", "clipped_below": "on lower bound", "refresh_cos": "refresh cosine",
    }  # fmt: skip
    runs, parts = list(runs), []
    for key, label in names.items():
        values = [run[key] for run in runs if key in run]
        if values:
            parts.append(f"{label} {statistics.fmean(values):.2g}")
    return ", ".join(parts)


def row_config(dataset: str, cell: Cell, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of the run that it is of; where the data lies does not count, and of first weights their checksum does."""
    config = {"method": cell.method, **USUAL, **study_of(dataset)[1], **cell.settings, **flags, "draws": seeded.DRAWS}
    config.pop("data_dir", None)
    if "weights" in flags:
        config["weights"] = f"{zlib.crc32(Path(flags['weights']).read_bytes()):08x}"
    return config


def run_sweeps(
    sweeps: list[str],
    seeds: list[int],
    budget: float,
    flags: Mapping[str, Any],
    only: list[str] | None = None,
    again: bool = False,
    dataset: str = DIGITS,
    release: Path | None = None,
) -> None:
    """Run what has no row yet (`again`: all), all chosen sweeps at one seed before the next, until the budget is spent.

    release: folder of the released code, without which its cells are left out.
    """
    path, started, longest = harness.RESULTS / f"{bench_of(dataset)}.jsonl", time.monotonic(), 0.0
    cells: dict[str, tuple[str, Cell]] = {}
    for sweep in sweeps:
        for name, cell in SWEEPS[sweep].items():
            if cell.method != RELEASE or release is not None:
                cells.setdefault(same(name), (sweep, cell))
    if only:
        cells = {name: cell for name, cell in cells.items() if name in {same(each) for each in only}}
    for seed in seeds:
        for name, (sweep, cell) in cells.items():
            if not again and (name, seed) in rows(path):
                continue
            begun = time.monotonic()
            if begun - started + longest > budget:
                print(f"budget of {budget:g} s spent before {name}, seed {seed}", flush=True)
                return
            if cell.method == RELEASE:
                assert release is not None
                figures = run_released(dataset, cell, seed, flags, release)
            else:
                figures = run_cell(dataset, cell, seed, flags, in_common(dataset, cell, (c for _, c in cells.values())))
            seconds = time.monotonic() - begun
            longest = max(longest, seconds)
            config = {**row_config(dataset, cell, flags), "sweep": sweep}
            for metric, value in figures.items():
                case = f"{dataset}/{name}/seed={seed}"
                harness.append_row(bench_of(dataset), case, metric, round(value, 6), config=config)
            few = f"  few {figures['few']:.2f}" if "few" in figures else ""
            shown = f"top-1 {figures['top1']:.2f}{few}  {seconds:.0f} s"
            print(f"{sweep:13s} {name:60s} seed {seed}  {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=DIGITS)
    parser.add_argument("--data-dir", help="its folder or pack")
    parser.add_argument("--weights", help="first weights of the encoder: a file")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), help="[all, or those of the study alone]")
    parser.add_argument("--cells", nargs="+", help="only these cells of the sweeps")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; no run starts that would exceed them"
    )
    parser.add_argument("--again", action="store_true", help="also what has rows; the last row counts")
    parser.add_argument("--release", type=Path, metavar="PATH", help="folder of the released code, for its cells")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's (rows then say so)")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of ablation.jsonl")
    parser.add_argument("--list", action="store_true", help="print sweeps and cells")
    parser.add_argument("--table", action="store_true", help="print the tables of the rows there are")
    args = parser.parse_args()
    args.sweeps = args.sweeps or sweeps_of(args.dataset)
    harness.RESULTS = args.results
    if args.list or args.table:
        for sweep in args.sweeps:
            print(
                f"\n## {sweep}\n"
                + (
                    table(sweep, args.results / f"{bench_of(args.dataset)}.jsonl")
                    if args.table
                    else "\n".join(SWEEPS[sweep])
                )
            )
        return
    if (args.dataset == FINE_TUNED) != bool(args.weights):
        parser.error(f"--weights: {FINE_TUNED} needs them, and no other study begins with any")
    flags: dict[str, Any] = {"epochs": args.epochs} if args.epochs else {}
    flags |= {name: value for name in ("data_dir", "weights") if (value := getattr(args, name))}
    run_sweeps(args.sweeps, args.seeds, args.budget, flags, args.cells, args.again, args.dataset, args.release)


if __name__ == "__main__":
    main()
