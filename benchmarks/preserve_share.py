"""Share of a run that scouting for groups costs: quality, memory bank, clustering, Fisher and anchor, against its steps.

    python benchmarks/preserve_share.py --data cifar10_jpeg.npz          # CIFAR-10-LT, ResNet-32, 200 epochs
    python benchmarks/preserve_share.py --steps 8 --no-write             # digits-lt

A real trainer runs a few steps, fills its bank with one snapshot a class (the most there can be) and groups them once;
each part's seconds are scaled to the whole run. Parts and steps run the same network on the same device, so the share
carries over to another one roughly as their FLOPs do. Rows: bench "throughput", case "preserve/<data>/<model>/...".
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from harness import append_row  # noqa: E402

from ltfast.dist import Ranks  # noqa: E402
from ltfast.progress import Progress  # noqa: E402
from ltfast.recipes import build_config  # noqa: E402
from ltfast.train import Trainer  # noqa: E402


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call, the device's work included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(trainer: Trainer, steps: int) -> dict[str, float]:
    """Seconds of a step, of what every epoch's end adds, and of one grouping with its anchor."""
    trainer.set_schedules(0)
    trainer.model.train()
    batches = trainer.source.train(0)
    times = [seconds(lambda: trainer.step(next(batches))) for _ in range(steps + 2)][2:]
    assert trainer.step.features is not None
    labels = trainer.source.train_labels
    classes = trainer.source.num_classes
    for label in range(classes):  # two features of every class: quality is defined for all of them
        several = torch.full((2,), label, device=trainer.device)
        trainer.quality.update(torch.randn(2, trainer.model.feature_dim, device=trainer.device), several)
    quality = trainer.quality.compute(trainer.config.preserve.lambda_q).quality
    assert len(labels) >= classes
    theta = trainer.flat.data[trainer.encoder]
    updates = []
    for label in range(classes):
        score = torch.full_like(quality, -torch.inf)
        score[label] = 1.0
        snapshot = theta + 1e-3 * torch.randn_like(theta)
        updates.append(seconds(lambda score=score, snapshot=snapshot: trainer.bank.update(score, snapshot, 0)))  # type: ignore[misc]
    epoch_end = seconds(lambda: trainer.quality.compute(trainer.config.preserve.lambda_q)) + statistics.median(updates)
    return {"step": statistics.median(times), "epoch_end": epoch_end, "grouping": seconds(trainer.group)}


def shares(parts: dict[str, float], epochs: int, steps_per_epoch: int, flops: float, regroup: int) -> dict[str, float]:
    """Shares of a run of `epochs`; flops: of the method's step over that of the plain step measured."""
    descent = parts["step"] * flops * steps_per_epoch * epochs
    once = parts["epoch_end"] * epochs + parts["grouping"]
    often = parts["epoch_end"] * epochs + parts["grouping"] * (epochs // regroup)
    return {"share_of_run": once / (once + descent), f"share_of_run_regroup_{regroup}": often / (often + descent)}


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="packed CIFAR-10; digits-lt without it")
    parser.add_argument("--model", help="encoder [the recipe's]")
    parser.add_argument("--steps", type=int, default=4, help="steps timed, after two of warm-up [4]")
    parser.add_argument("--regroup", type=int, default=10, help="epochs between groupings of the second figure [10]")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True, help="append rows")
    args = parser.parse_args()
    dataset = "cifar10-lt" if args.data else "digits-lt"
    flags: dict[str, Any] = {"tensorboard": False, "data_dir": args.data, "model": args.model, "capture": "off"}
    config = build_config(dataset, "bcl+gkp", {}, {k: v for k, v in flags.items() if v is not None})
    trainer = Trainer(config, None, Ranks(), Progress())
    parts = measure(trainer, args.steps)
    epochs = config.optim.epochs
    # bcl+gkp: the plain step, the cheapest one, so the share is at its largest.
    figures = shares(parts, epochs, trainer.source.steps_per_epoch, 1.0, args.regroup)
    case = f"preserve/{dataset}/{config.model.model}/B={config.data.batch}/epochs={epochs}"
    settings = {
        "dataset": dataset, "method": config.method, "model": config.model.model, "batch": config.data.batch, "epochs": epochs,
        "fisher_budget": config.preserve.fisher_budget, "groups": config.preserve.groups,
    }  # fmt: skip
    for name, value in ({f"{part}_s": s for part, s in parts.items()} | figures).items():
        print(f"{case:55s} {name:26s} {value:.4g}")
        if args.write:
            append_row("throughput", case, name, value, n=args.steps, config=settings)


if __name__ == "__main__":
    main()
