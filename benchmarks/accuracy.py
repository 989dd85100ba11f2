"""Accuracy of presets over seeds: trains through the public command line and appends one row a run and figure.

    python benchmarks/accuracy.py --methods ce bcl gkp-gsa --seeds 0 1 2                       # digits-lt, CPU
    python benchmarks/accuracy.py --dataset cifar10-lt --data-dir PACK.npz --budget 540        # as many as fit
    python benchmarks/accuracy.py --collect runs/a runs/b                                      # rows of finished runs
Methods are trained round by round (all methods at one seed before the next), so that a budget that ends early still
compares like with like. A finished run under --work is not trained again, an interrupted one is continued.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from harness import append_row, facts
from seeded import DRAWS

ONE_GROUP = ",groups=1"
COLLECTED = "rows-written"  # mark in a run folder of this script: its rows exist
FIGURES = ("top1", "many", "medium", "few", "ece", "per_class")
METHODS = (
    "ce",
    "balanced-softmax",
    "bcl",
    "gkp",
    "gsa-paper",
    "gkp-gsa",
    "gsa-full",
    "gsa-paper+gkp",
    "bcl+sam",
    "gsa-release",
    f"gsa-release{ONE_GROUP}",  # what the release does at its defaults (peer_training.py)
)


def collect(folder: Path, flags: Sequence[str] = ()) -> bool:
    """Append the rows of one run: test figures of its last checkpoint and its training time. False: it is not finished.

    flags: further ones that it was trained with; tables leave such runs out.
    """
    from ltfast.recipes import reads_groups
    from ltfast.runs import RunFolder

    run = RunFolder.open(folder)
    config, env = run.config, json.loads((folder / "env.json").read_text())
    tests, epochs = run.metrics("test"), run.metrics("epoch")
    if not tests:
        print(f"{folder}: not finished, left out", file=sys.stderr)
        return False
    method = config.method + (ONE_GROUP if config.preserve.groups == 1 and reads_groups(config) else "")
    case = f"{method}/{config.model.model}/seed={config.run.seed}"
    words = [*flags_of(method), "--seed", str(config.run.seed), *flags]
    settings = {
        "command": f"ltfast train --dataset {config.data.dataset} {' '.join(words)}", **({"flags": list(flags)} if flags else {}),
        "imbalance": config.data.imbalance, "limit_train": config.data.limit_train, "epochs": config.optim.epochs,
        "batch": config.data.batch, "images": run.data_row["sizes"]["train"], "scout": config.preserve.scout,
        "draws": DRAWS,
    }  # fmt: skip
    where = {name: env[name] for name in ("device", "cuda", "torch", "triton", "commit")}
    where["cpu"] = f"{env['cpu']}, {env['threads']} threads"
    where["driver"] = facts()["driver"] if env["device"] == facts()["device"] else None  # of another machine: not known
    for name in FIGURES:
        append_row(config.data.dataset, case, name, tests[-1]["last"][name], n=1, config=settings, **where)
    append_row(config.data.dataset, case, "seconds", sum(e["seconds"] for e in epochs), n=1, config=settings, **where)
    return True


def flags_of(method: str) -> list[str]:
    """Flags of a method with options, such as gsa-release,groups=1."""
    name, *options = method.split(",")
    return ["--method", name, *(word for o in options for word in f"--{o.replace('_', '-')}".split("=", 1))]


def finished(folder: Path) -> bool:
    """True for a run that has been tested; a folder without config is an error of ltfast's, as always."""
    from ltfast.runs import RunFolder

    return folder.exists() and bool(RunFolder.open(folder).metrics("test"))


def train(folder: Path, method: str, seed: int, args: argparse.Namespace) -> None:
    """Train one run into `folder` through the command line, or continue it."""
    if folder.exists():
        words = ["train", "--resume", str(folder)]
    else:
        words = ["train", "--dataset", args.dataset, *flags_of(method), "--seed", str(seed), "--out", str(folder)]
        words += ["--no-tensorboard", *(["--data-dir", args.data_dir] if args.data_dir else []), *args.flags]
    if args.together:
        here(words)
    else:
        subprocess.run([sys.executable, "-m", "ltfast", *words], check=True, stdout=subprocess.DEVNULL)


def here(words: list[str]) -> None:
    """An ltfast command in this process: on a GPU starting, tuning and reading from the compiler's cache take longer than many
    epochs."""
    import torch

    from ltfast.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(words)
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if code:
        raise SystemExit(f"ltfast {' '.join(words)}: exit status {code}\n{said.getvalue()[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="digits-lt")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no further run starts")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="where run folders go")
    parser.add_argument("--together", action="store_true", help="all runs in this process, which saves starting each")
    parser.add_argument("--collect", nargs="+", type=Path, help="only append the rows of these finished runs")
    parser.add_argument("flags", nargs="*", help="further flags of ltfast train, after --")
    args = parser.parse_args()
    if args.collect:
        for folder in args.collect:
            collect(folder, args.flags)
        return
    started = time.monotonic()
    for seed in args.seeds:
        for method in args.methods:
            further = "".join(f"-{word.strip('-')}" for word in args.flags).replace("/", "_")
            folder = args.work / f"{args.dataset}-{method}{further}-s{seed}"
            if (folder / COLLECTED).exists():
                continue
            if not finished(folder):
                if time.monotonic() - started > args.budget:
                    return
                train(folder, method, seed, args)
            if not collect(folder, args.flags):
                raise SystemExit("stopped; the same command goes on from there")
            (folder / COLLECTED).touch()


if __name__ == "__main__":
    main()
