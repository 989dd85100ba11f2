"""What `--prior` gives: one training, evaluated for pictures of equal class frequencies and of those of the training set.

    python benchmarks/prior.py --seeds 0 1 2                                              # digits-lt
    python benchmarks/prior.py --study cifar10-half --data-dir HALF.npz --seeds 0 1 2     # minutes a run

Studies are ablation.py's. Rows: case "<study>/<method>/prior=<prior>/seed=<k>" of prior.jsonl. The test splits are balanced:
accuracy at the class frequencies of training is the mean of the classes' accuracies by their training images.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import ablation
import harness
import seeded
import torch

from ltfast.evaluate import PRIORS

METHODS = ("ce", "balanced-softmax")


def evaluations(study: str, method: str, seed: int, flags: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Figures of one training's last weights on the test split, by prior."""
    from ltfast.dist import Ranks
    from ltfast.evaluate import evaluate, prior_shift
    from ltfast.progress import Progress
    from ltfast.runs import RunFolder
    from ltfast.train import Trainer

    with tempfile.TemporaryDirectory(prefix="ltfast-prior-") as folder:
        config = ablation.configured(study, method, {**flags, "seed": seed, "out": f"{folder}/run"})
        trainer = Trainer(config, RunFolder.create(config), Ranks(), Progress())
        ablation.fitted(trainer)
        counts, found = trainer.source.train_counts, {}
        for prior in PRIORS:
            shift = prior_shift(config, counts, prior)
            figures = evaluate(
                trainer.model, trainer.source, "test", trainer.device, logits=trainer.forward.logits, tta=config.run.tta,
                prior=shift,
            )  # fmt: skip
            often = torch.tensor(figures["per_class"], dtype=torch.float64) @ (counts / counts.sum()).double()
            found[prior] = {"top1_train": float(often), **ablation.tested(figures)}
        return found


def run(study: str, seeds: list[int], flags: dict[str, Any]) -> None:
    """Both methods at every seed, a row a figure."""
    for seed in seeds:
        for method in METHODS:
            config = ablation.row_config(study, ablation.Cell(method, {}), flags)
            for prior, figures in evaluations(study, method, seed, flags).items():
                for metric, value in figures.items():
                    case = f"{study}/{method}/prior={prior}/seed={seed}"
                    harness.append_row("prior", case, metric, round(value, 6), config=config)
                shown = "  ".join(f"{name} {value:.2f}" for name, value in figures.items())
                print(f"{study} {method} {prior}, seed {seed}: {shown}", flush=True)


def table(study: str, path: Path) -> str:
    """Means over seeds of every method and prior."""

    def name_and_seed(case: str) -> tuple[str, int]:
        name, seed = case.rsplit("/seed=", 1)
        return name, int(seed)

    runs = seeded.newest(seeded.read(seeded.rows(path), name_and_seed))
    lines = [
        "| trained by | `--prior` | seeds | top-1 %, classes equally common | top-1 %, as in training | few %, equally common |",
        "|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        for prior in PRIORS:
            found = [run for (name, _), run in runs.items() if name == f"{study}/{method}/prior={prior}"]
            if found:
                means = (statistics.fmean(run[m] for run in found) for m in ("top1", "top1_train", "few"))
                cells = " | ".join(f"{mean:.1f}" for mean in means)
                lines.append(f"| `{method}` | {prior} | {len(found)} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default=ablation.DIGITS, choices=list(ablation.STUDIES))
    parser.add_argument("--data-dir", help="its pack")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of prior.jsonl")
    args = parser.parse_args()
    harness.RESULTS = args.results
    run(args.study, args.seeds, {"data_dir": args.data_dir} if args.data_dir else {})
    print(table(args.study, args.results / "prior.jsonl"))


if __name__ == "__main__":
    main()
