"""Time to the released code's accuracy on CIFAR-10-LT: the recipe cifar10-lt-speedrun over several seeds, as a log and rows.

    python benchmarks/speedrun.py --data-dir CIFAR --runs 5 [--set epochs=60 lr=0.3]

As cifar10-airbench does: one table row an epoch, then every run's accuracy and seconds, their means and deviations; the
clock starts after an untimed warm-up, and only the training split is used. The log holds the recipe itself.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from harness import append_row, facts

from ltfast import recipes
from ltfast.config import Config, base_type
from ltfast.speedrun import TableProgress
from ltfast.train import train

NAME = "cifar10-lt-speedrun"


def one_run(config: Config, folder: Path) -> tuple[float, float]:
    """(top-1 % on the test split, seconds on the clock) of one seed."""
    progress = TableProgress()
    result = train(config.with_(out=str(folder / f"seed{config.run.seed}")), progress=progress)
    progress.finish(result)
    if "last" not in result:
        raise SystemExit("stopped before the end of a run")
    return result["last"]["top1"], progress.seconds


def settings(words: list[str]) -> dict[str, Any]:
    """name=value words as config values of the right type."""
    pairs = [word.split("=", 1) for word in words]
    return {name: base_type(name)(value) if base_type(name) is not bool else value == "true" for name, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="CIFAR-10 folder or pack")
    parser.add_argument("--runs", type=int, default=5, help="seeds 0 .. runs - 1 [5]")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change the recipe")
    parser.add_argument("--write", action=argparse.BooleanOptionalAction, default=True, help="append rows")
    args = parser.parse_args()
    dataset, method, values = recipes.named_recipe(NAME)
    changes = settings(args.set)
    config = recipes.build_config(dataset, method, values, {"data_dir": args.data_dir, **changes})
    print(inspect.getsource(recipes.NAMED[NAME][2]))
    print(json.dumps({**facts(), "changes": changes}))
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for seed in range(args.runs):  # a row as soon as there is one: a time budget may end the next run
            runs.append(one_run(config.with_(seed=seed), Path(folder)))
            for metric, number in zip(("top1", "seconds"), runs[-1], strict=True) if args.write else ():
                append_row("speedrun", f"{NAME}/seed={seed}", metric, number, config=changes)
    for metric, column in (("top1", 0), ("seconds", 1)):
        numbers = [run[column] for run in runs]
        spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        print(f"{metric}: mean {statistics.mean(numbers):.4f}  std {spread:.4f}  n {len(numbers)}")
        if args.write:
            append_row("speedrun", NAME, metric, statistics.mean(numbers), n=len(numbers), std=spread, config=changes)


if __name__ == "__main__":
    main()
