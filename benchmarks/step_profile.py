"""Where the time of one step goes: data, forward, backward, Gram, perturb, update, other. Used by throughput.py.

An eager step is timed section by section, each section without those inside it; a GPU step, compiled and recorded or not,
by its kernels' own times (torch.profiler), sorted by what launched or named them.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ltfast.backward import Backward
from ltfast.optim.engine import Engine
from ltfast.step import TrainStep

SECTIONS = ("data", "forward", "backward", "Gram", "perturb", "update", "other")
# Okabe-Ito, dark to light, so that the order survives grey print.
COLORS = ("#000000", "#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#999999")
# Kernel names on a GPU; what matches nothing is the model's forward and backward, which no name tells apart.
KERNELS = (
    ("Gram", r"_gram_|_coefficients_kernel"),
    ("perturb", r"_perturb_"),
    ("update", r"_sgd_step|_adamw_step"),
    ("other", r"multi_tensor|Memcpy|Memset"),
)


class Sections:
    """Seconds by section; inner sections do not count for the outer ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.open: list[list[float]] = []  # seconds of the sections inside each open one

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        started = self.now()
        self.open.append([])
        try:
            yield
        finally:
            spent = self.now() - started
            self.seconds[name] += spent - sum(self.open.pop())
            if self.open:
                self.open[-1].append(spent)

    @staticmethod
    def now() -> float:
        """The clock, after everything queued has run."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed as section `name`."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.section(name):
                return function(*args, **kwargs)

        return timed


@contextmanager
def instrumented(step: TrainStep, sections: Sections) -> Iterator[None]:
    """Inside, the parts of an eager step are timed."""
    wrap = sections.around
    places: list[tuple[Any, str, str]] = [
        (step.forward, name, "forward") for name in ("losses", "first_view", "encode", "head")
    ]
    places += [
        (Backward, "__call__", "backward"), (torch.autograd, "grad", "backward"), (step, "update", "update"),
        (Engine, "from_rows", "Gram"), (Engine, "stale_coefficients", "Gram"), (Engine, "rescaled", "Gram"),
        (step, "_classifier_ascent", "Gram"),
    ]  # fmt: skip
    patches = [patch.object(owner, name, wrap(section, getattr(owner, name))) for owner, name, section in places]
    for module in ("ltfast.step", "ltfast.optim.engine"):
        for name, section in (("perturb", "perturb"), ("gram_partials", "Gram")):
            patches.append(patch(f"{module}.{name}", wrap(section, getattr(__import__(module, fromlist=[name]), name))))
    try:
        for p in patches:
            p.start()
        yield
    finally:
        for p in patches:
            p.stop()


def sections_of(step: TrainStep, make: Callable[[], Any], steps: int) -> dict[str, float]:
    """Shares of the sections over `steps` eager steps on the batches that `make` makes."""
    sections = Sections()
    with instrumented(step, sections):
        for _ in range(steps):
            with sections.section("data"):
                batch = make()
            with sections.section("other"):
                step(batch)
    return shares(sections.seconds)


def sections_of_kernels(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """Shares of kernel time on a GPU; "forward" holds forward and backward together."""
    from torch.profiler import ProfilerActivity, profile

    seconds: dict[str, float] = defaultdict(float)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        name = next((section for section, pattern in KERNELS if re.search(pattern, event.key)), "forward")
        seconds[name] += event.self_device_time_total
    return shares(seconds)


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each section's share of the sum, in SECTIONS' order."""
    total = sum(seconds.values()) or 1.0
    return {name: seconds.get(name, 0.0) / total for name in SECTIONS}


def picture(path: Path, cases: dict[str, dict[str, float]], title: str) -> None:
    """One bar a case (its label may hold a line break), cut into the sections; written as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.42 * len(cases)), dpi=150)
    labels = list(cases)
    left = [0.0] * len(labels)
    for name, color in zip(SECTIONS, COLORS, strict=True):
        widths = [100 * cases[label][name] for label in labels]
        bars = axes.barh(labels, widths, left=left, color=color, label=name, edgecolor="white", linewidth=0.5)
        dark = name in ("data", "forward", "update", "Gram")
        texts = [f"{w:.0f}" if w >= 4 else "" for w in widths]
        axes.bar_label(bars, texts, label_type="center", fontsize=7, color="white" if dark else "black")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlim=(0, 100), xlabel="share of one step, %")
    axes.set_title(title, fontsize=9)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    below = (0.45, -0.3 / len(labels) - 0.16)
    axes.legend(ncols=len(SECTIONS), loc="upper center", bbox_to_anchor=below, fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
