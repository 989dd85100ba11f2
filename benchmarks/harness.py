"""What every benchmark shares: result rows, device facts, timing with device events, the copy bandwidth of the same run.

A row is one JSON line of benchmarks/results/<bench>.jsonl and files are append-only:
    bench, case, metric, value, n, [p20, p80 | std], device, cpu, driver, cuda, torch, triton, commit, date, config
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 10
REPETITIONS = 50  # at least; p20 and p80 of fewer runs say little
QUEUE_CYCLES = 40_000_000  # about 20 ms of a GPU's clock: twenty calls of a few launches are queued in less
COPY_ELEMENTS = 1 << 27  # 512 MiB of float32: far larger than any cache, so a copy runs at memory speed


class Timing(NamedTuple):
    """Seconds of one call: median, 20th and 80th percentile, number of repetitions."""

    median: float
    p20: float
    p80: float
    n: int


ON_CPU: dict[str, Any] = {"device": "cpu", "driver": None, "cuda": None}
Timings = dict[str, list[float]]  # contender -> one figure a round


@cache
def facts() -> dict[str, Any]:
    """Device, driver, versions and commit of this process."""
    from ltfast.environment import environment

    env = environment()
    cuda = torch.cuda.is_available()
    return {
        "device": env["device"],
        "cpu": f"{env['cpu']}, {env['threads']} threads",
        "driver": driver() if cuda else None,
        "cuda": env["cuda"],
        "torch": env["torch"],
        "triton": env["triton"],
        "commit": env["commit"],
    }


def driver() -> str | None:
    """Version of the NVIDIA driver."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def append_row(bench: str, case: str, metric: str, value: Any, *, n: int = 1, **fields: Any) -> dict[str, Any]:
    """Append one row to results/<bench>.jsonl and return it; `fields` add to or replace the facts of this process, of which a
    config with device cpu leaves a GPU out."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    place = ON_CPU if (fields.get("config") or {}).get("device") == "cpu" else {}
    what = {"bench": bench, "case": case, "metric": metric, "value": value, "n": n}
    row = {**what, **facts(), **place, "date": date, **fields}
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{bench}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def time_call(call: Callable[[], object], repetitions: int = REPETITIONS, warm_up: int = WARM_UP) -> Timing:
    """Time `call` by CUDA events where there is a GPU, by the wall clock elsewhere."""
    for _ in range(warm_up):
        call()
    seconds = _events(call, repetitions) if torch.cuda.is_available() else _wall(call, repetitions)
    return timing(seconds)


def device_time(call: Callable[[], object], repetitions: int = 20) -> Timing:
    """Time `call` on a GPU alone: the calls queue up behind a wait, so the host's part of launching them is hidden.

    Only where the host needs longer than the wait does it show: then launching costs more than the work.
    """
    call()
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUE_CYCLES)
    return timing(_events(call, repetitions, wait=False))


def _events(call: Callable[[], object], repetitions: int, *, wait: bool = True) -> list[float]:
    if wait:  # what is still queued would hide the host's part of the first call, of some calls more
        torch.cuda.synchronize()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for start, end in pairs:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def _wall(call: Callable[[], object], repetitions: int) -> list[float]:
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_turns(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    prepare: dict[str, Callable[[], object]],
    budget: float = math.inf,
) -> Timings:
    """Seconds of each call in each round, A B C A B C ...: what disturbs the machine disturbs all of them alike.

    prepare: what to do before a call, outside the clock. budget: seconds after which no round but the first starts.
    """
    seconds: Timings = {name: [] for name in calls}
    started = time.monotonic()
    for turn in range(rounds):
        if turn and time.monotonic() - started > budget:
            break
        for name, call in calls.items():
            prepare.get(name, lambda: None)()
            seconds[name] += (_events if torch.cuda.is_available() else _wall)(call, 1)
    return seconds


def timing(values: list[float]) -> Timing:
    """Median and fifths of some measurements, or of their ratios."""
    fifths = statistics.quantiles(values, n=5) if len(values) > 1 else values
    return Timing(statistics.median(values), fifths[0], fifths[-1], len(values))


def compared(seconds: Timings, base: str, label: str) -> dict[str, dict[str, Timing]]:
    """Contender -> "seconds" and "seconds_vs_<label>", the ratio to `base` round by round; {} without a round."""
    return {
        name: {
            "seconds": timing(values),
            f"seconds_vs_{label}": timing([a / b for a, b in zip(values, seconds[base], strict=True)]),
        }
        for name, values in seconds.items()
        if values
    }


@cache
def copy_bandwidth(device: str, elements: int = COPY_ELEMENTS) -> float:
    """Bytes a second (read + written) of a device-to-device copy: what "share of a copy" is relative to."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_call(lambda: target.copy_(source)).median
