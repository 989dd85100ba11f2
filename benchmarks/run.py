"""Everything that fits into a time budget, most telling first; continues where the last call stopped.

    python benchmarks/run.py --budget 1800                                     # on a GPU machine: fills the GPU cells
    python benchmarks/run.py --budget 1800 --data CIFAR --pictures JPEGS --peer release=PATH    # and what needs more
    python benchmarks/run.py --budget 600 --device cpu
    python benchmarks/run.py --budget 0                                        # only prints the plan and writes REPORT.md

Each stage is a script of this folder in a process of its own. One that would pass the budget is stopped in time and keeps
the rows it has written; the next call takes it up again. What is done is remembered for each commit and device under
runs/benchmarks/, with each stage's output. At the end benchmarks/results/REPORT.md is written from the rows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / "runs" / "benchmarks"
GRACE = 5.0  # seconds that each way of ending a stage has: asking twice, then killing
REPORT_SECONDS = 20.0  # kept back for REPORT.md
PYTHON = sys.executable
DONE, STOPPED, FAILED = "done", "stopped", "failed"


@dataclass(frozen=True)
class Stage:
    """One benchmark script.

    Attributes:
        name: what the plan and the state call it.
        command: words after the interpreter; {budget}, {data}, {pictures}, {peers} and {device} are filled in.
        seconds: most that it may take, {budget} included.
        least: seconds below which it is not worth starting.
        resumable: a later call continues it, so it may be stopped at any time and is complete only if it had time left.
    """

    name: str
    command: tuple[str, ...]
    seconds: float = 120.0
    least: float = 10.0
    resumable: bool = False

    @property
    def script(self) -> Path | None:
        """The script that must exist for the stage to run."""
        return ROOT / self.command[0] if self.command[0].endswith(".py") else None

    def needs(self, option: str) -> bool:
        """True if the command has {option} in it."""
        return any(f"{{{option}}}" in word for word in self.command)


# Several processes: most of the time goes into compiling. Warnings of a new device must not end a test.
TESTS = Stage(
    "tests-gpu",
    ("-m", "pytest", "-q", "-W", "default", "-n", "6", "--dist", "worksteal", "--tb=short", "-m", "gpu", "tests/kernels",
     "tests/optim/test_models.py", "tests/optim/test_state.py", "tests/test_gpu.py", "tests/test_syncs.py",
     "tests/preserve/test_bank.py", "tests/preserve/test_layers.py", "tests/data/test_small.py", "tests/data/test_dali_source.py"),
    160,
)  # fmt: skip


def kernels(seconds: float) -> Iterator[Stage]:
    """One stage an op: on a GPU a minute must do, a CPU takes longer for the same arrays."""
    for op in ("step", "gram", "perturb", "anchor", "conv"):
        yield Stage(f"kernel-{op}", (f"benchmarks/bench_{op}.py", "--device", "{device}", "--write"), seconds)


METHODS = ("ce", "bcl", "gsa-paper+gkp", "gkp-gsa", "gsa-paper", "bcl+sam", "gsa-full", "gsa-release,groups=1")
CIFAR = Stage(
    "cifar10-lt",
    ("benchmarks/accuracy.py", "--dataset", "cifar10-lt", "--data-dir", "{data}", "--budget", "{budget}",
     "--work", "runs/accuracy", "--together", "--seeds", "0", "1", "2", "--methods", *METHODS),
    24 * 3600, 120, True,
)  # fmt: skip
DIGITS = Stage("digits-lt", ("benchmarks/accuracy.py", "--budget", "{budget}"), 3600, 60, True)
# The paper's table: all methods of a seed go on from one state after scouting.
LAST_FIFTH = Stage(
    "ablation-last-fifth",
    ("benchmarks/ablation.py", "--dataset", "cifar10-lt", "--data-dir", "{data}", "--budget", "{budget}", "--seeds", "0", "1", "2",
     "--sweeps", "last-fifth-three-views", "last-fifth"),
    3600, 200, True,
)  # fmt: skip
ABLATION_CIFAR = Stage(
    "ablation-cifar10-lt",
    ("benchmarks/ablation.py", "--dataset", "cifar10-lt", "--data-dir", "{data}", "--budget", "{budget}"),
    24 * 3600, 300, True,
)  # fmt: skip
ABLATION = Stage("ablation", ("benchmarks/ablation.py", "--budget", "{budget}"), 6 * 3600, 60, True)
PEERS = Stage("peers", ("benchmarks/peers.py", "--device", "{device}", "--compiled", "--write", "{peers}"), 600)
PEER_STEPS = Stage(
    "peer-steps", ("benchmarks/peer_steps.py", "--device", "{device}", "--write", "{peers}"), 1200, 30, True
)
PEER_STEPS_GPU = replace(PEER_STEPS, command=(*PEER_STEPS.command, "--budget", "40"), seconds=150)
PEER_PIPELINE = Stage("peer-pipeline", ("benchmarks/peer_pipeline.py", "--device", "{device}", "--write"), 120)
OPTIMIZERS = Stage("optimizers", ("benchmarks/optimizers.py", "counted", "--write", "{peers}"), 240)
MODE_R = Stage("mode-r", ("benchmarks/optimizers.py", "sweep", "--data", "{data}", "--write"), 1800, 120)
SPEEDRUN = Stage("speedrun", ("benchmarks/speedrun.py", "--data-dir", "{data}"), 100, 60)
VIEWS = Stage("small-views", ("-m", "benchmarks.small_views", "--device", "{device}", "--write"), 120)
INPUT = Stage("input", ("benchmarks/data.py", "throughput", "--pictures", "{pictures}", "--append"), 600, 60)
INPUT_GPU = Stage("input-gpu", ("benchmarks/data.py", "gpu", "--pictures", "{pictures}", "--append"), 600, 60)
ORDER = Stage("order", ("benchmarks/data.py", "order", "--append"), 120)
STEP = Stage("throughput", ("benchmarks/throughput.py",), 900)
STEP_SMALL = Stage(
    "throughput-main",
    ("benchmarks/throughput.py", "--cases", "resnet32", "--modes", "recorded", "--methods", "bcl", "gsa-paper", "gsa-full",
     "gsa-exact", "bcl,convolutions=kernel", "gsa-full,convolutions=kernel"),
    120,
)  # fmt: skip
# The paper's 200 epochs, in a process of its own: what a user waits for.
FULL = Stage(
    "cifar10-lt-gkp-gsa",
    ("benchmarks/accuracy.py", "--dataset", "cifar10-lt", "--data-dir", "{data}", "--budget", "{budget}",
     "--work", "runs/accuracy", "--seeds", "0", "--methods", "gkp-gsa"),
    300, 200,
)  # fmt: skip
# What the released code reaches, by the preset that takes its steps: the speedrun's mark.
RELEASED = Stage("cifar10-lt-release", (*FULL.command[:-1], "gsa-release,groups=1"), 400, 250)
STAGES: dict[str, tuple[Stage, ...]] = {
    "cuda": (
        TESTS, STEP_SMALL, FULL, PEER_STEPS_GPU, RELEASED, SPEEDRUN, *kernels(60), PEERS, STEP, INPUT_GPU, PEER_PIPELINE, LAST_FIFTH,
        CIFAR, INPUT, VIEWS, MODE_R, ABLATION_CIFAR,
    ),
    "cpu": (
        PEERS, *kernels(180), OPTIMIZERS, PEER_PIPELINE, PEER_STEPS,
        Stage("precision", ("benchmarks/precision.py",), 300),
        Stage("scale", ("benchmarks/scale.py", "--snapshots", "20", "--append"), 300),
        STEP, DIGITS, ORDER, INPUT, VIEWS, ABLATION,
    ),
}  # fmt: skip


class State:
    """What is done for one commit and device, in a JSON file that is written after each stage."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.all: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def done(self, stage: Stage) -> bool:
        """True if there is nothing left of this stage."""
        return self.all.get(self.key, {}).get(stage.name, {}).get("status") == DONE

    def note(self, stage: Stage, status: str, seconds: float) -> None:
        """Record how a stage ended."""
        self.all.setdefault(self.key, {})[stage.name] = {"status": status, "seconds": round(seconds, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".new")
        draft.write_text(json.dumps(self.all, indent=1) + "\n")
        draft.replace(self.path)


def fill(stage: Stage, values: dict[str, Any]) -> list[str]:
    """The stage's command line with its placeholders filled in; a list value becomes several words."""
    words: list[str] = [PYTHON]
    for word in stage.command:
        key = word[1:-1] if word.startswith("{") and word.endswith("}") else None
        value = values.get(key, word) if key else word
        words += [str(v) for v in value] if isinstance(value, list) else [str(value)]
    return words


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a stage and all that it started: ask twice, with GRACE seconds each, kill."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):  # at the first, pytest still prints what failed
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run_stage(stage: Stage, command: list[str], limit: float, log: Path) -> tuple[str, float]:
    """Run one stage for at most `limit` seconds, GRACE included; returns (status, seconds)."""
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    started = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(max(limit - 2 * GRACE, 0.1))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    seconds = time.monotonic() - started
    if code is None:
        return STOPPED, seconds
    if code:
        return FAILED, seconds
    return (STOPPED if stage.resumable and seconds > limit / 2 else DONE), seconds


def why_not(stage: Stage, values: dict[str, Any]) -> str:
    """Why a stage cannot run here, or an empty string."""
    if stage.script is not None and not stage.script.exists():
        return f"{stage.command[0]} does not exist: not measured"
    for option, what in (("data", "a CIFAR-10 folder or pack"), ("pictures", "a tar or folder of JPEGs")):
        if stage.needs(option) and not values[option]:
            return f"needs --{option} PATH ({what}): not measured"
    return ""


def shortest(stages: tuple[Stage, ...], values: dict[str, Any], state: State) -> Stage | None:
    """Of the stages that are left and can run here the one that needs the least time; None without any."""
    left = [stage for stage in stages if not why_not(stage, values) and not state.done(stage)]
    return min(left, key=lambda stage: stage.least, default=None)


def run(stages: tuple[Stage, ...], budget: float, values: dict[str, Any], state: State, folder: Path) -> dict[str, str]:
    """Run stages in order within `budget` seconds; returns stage -> what became of it."""
    deadline, outcome = time.monotonic() + budget, {}
    for stage in stages:
        left = deadline - time.monotonic()
        reason = why_not(stage, values)
        if reason or state.done(stage) or left < stage.least:
            outcome[stage.name] = reason or ("done before" if state.done(stage) else "no time left")
            say(f"{stage.name:14s} {outcome[stage.name]}")
            continue
        limit = min(left, stage.seconds)
        inner = max(limit - 3 * GRACE, 1.0)  # a stage that watches its own budget ends before it is ended
        say(f"{stage.name:14s} starts, at most {limit:.0f} s, {left:.0f} s left")
        log = folder / f"{stage.name}.log"
        status, seconds = run_stage(stage, fill(stage, {**values, "budget": f"{inner:.0f}"}), limit, log)
        state.note(stage, status, seconds)
        outcome[stage.name] = status
        say(f"{stage.name:14s} {status} after {seconds:.0f} s" + (last_line(log) if status == FAILED else ""))
    return outcome


def last_line(log: Path) -> str:
    """': ' and the last line of a stage's output."""
    lines = log.read_text(errors="replace").split("\n")
    return f": {next((line for line in reversed(lines) if line.strip()), '')[:200]}  ({log})"


def say(text: str) -> None:
    print(text, flush=True)


def device_and_commit(device: str) -> str:
    """Key of the state: `commit device`, found in a process of its own, so that this one holds no GPU memory."""
    code = f"import harness; f = harness.facts(); print(f['commit'], f['device'] if {device == 'cuda'} else 'cpu')"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "benchmarks"), str(ROOT)))}
    found = subprocess.run([PYTHON, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    commit, _, name = found.stdout.strip().partition(" ")
    return f"{commit.rstrip('+')}{'+' if code_changed(ROOT) else ''} {name}"


def code_changed(root: Path) -> bool:
    """True if tracked files differ from the commit, other than what a stage itself writes: rows, tables and pictures."""
    written = [f":!{name}" for name in ("benchmarks/results", "docs", "README.md")]
    command = ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", *written]
    try:
        return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    except OSError:  # a machine without git: LTFAST_COMMIT says what runs there
        return False


def main() -> None:
    """Plan, run, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, required=True, help="seconds, REPORT.md included")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--data", help="CIFAR-10 folder or .npz pack, for accuracy")
    parser.add_argument("--pictures", help="tar or folder of JPEGs, for input pipelines")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="other code to compare with (peers.py): its folder, or the file that defines its optimizer",
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages")
    args = parser.parse_args()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage under way is stopped with this process
    if args.device is None:
        has = subprocess.run(
            [PYTHON, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"], check=False
        )
        args.device = "cpu" if has.returncode else "cuda"
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else stages that find a GPU use it, and rows of the CPU name it
    stages = tuple(s for s in STAGES[args.device] if not args.only or s.name in args.only)
    if args.budget < 0:
        parser.error(f"--budget {args.budget:g}: it must be at least 0")
    unknown = set(args.only or ()) - {s.name for s in stages}
    if unknown:
        parser.error(
            f"--only {' '.join(sorted(unknown))}: choose from {', '.join(s.name for s in STAGES[args.device])}"
        )
    given = [args.data, args.pictures, *(peer.partition("=")[2] for peer in args.peer)]
    missing = [path for path in given if path is not None and not Path(path).exists()]
    if missing:
        parser.error(f"{', '.join(missing)}: no such file or folder")
    peers = [word for peer in args.peer for word in ("--peer", peer)]
    values = {"data": args.data, "pictures": args.pictures, "peers": peers, "device": args.device}
    state = State(STATE / "state.json", device_and_commit(args.device))
    spent = time.monotonic() - started
    first = shortest(stages, values, state)
    if first and 0 < args.budget < (need := REPORT_SECONDS + first.least + spent):
        parser.error(
            f"--budget {args.budget:g}: the report takes {REPORT_SECONDS:.0f} s and the shortest stage, {first.name}, needs "
            f"{first.least:.0f} s; give at least {math.ceil(need):.0f}, or 0 for the plan alone"
        )
    say(f"{state.key}: {args.budget:.0f} s for " + ", ".join(s.name for s in stages))
    run(stages, args.budget - REPORT_SECONDS - spent, values, state, STATE)
    subprocess.run([PYTHON, "benchmarks/report.py"], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
