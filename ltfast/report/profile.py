"""Where one training step's time goes: steps of the run's own, timed bare and then under the profiler.

Operations are counted to the innermost part they run in: views and loading, forward and loss, backward, and the kernels
of the ascent and the update. Where a rule has several kinds of step (exact, remembered, repeated), each is timed by itself
and counts by its share of all steps. Steps run eager (neither compiled nor recorded as CUDA graphs), so that parts stay apart.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ltfast import build, checkpoint
from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.optim.engine import EXACT, REPEAT, STALE
from ltfast.optim.rules import Rule
from ltfast.plan import predicted_flops
from ltfast.preserve import Anchor
from ltfast.progress import Progress
from ltfast.report.runs import OUT_OF_TIME, Live, Missing
from ltfast.train import Trainer

WARM, TIMED, PROFILED = 2, 6, 2  # steps of each kind
DATA, STEP = "ltfast.data", "ltfast.step"
NAMES = {
    DATA: "data and views", STEP: "forward and loss", "autograd": "backward", "ltfast::gram_partials": "Gram matrix and norms",
    "ltfast::gram_reduce": "Gram matrix and norms", "ltfast::ascent_coefficients": "coefficients", "ltfast::perturb": "perturb",
    "ltfast::sgd_step": "update", "ltfast::adamw_step": "update",
}  # fmt: skip
PARTS = tuple(dict.fromkeys(NAMES.values()))


def profile(live: Live, stop: Callable[[], bool], tick: Callable[[], None]) -> dict[str, Any]:
    """{"parts": mean seconds of a step by part, "measured": of a step, "predicted": the plan's, or None}.

    predicted: the plan's FLOPs ratio times a plain step measured here; None for a method that descends plainly.
    Raises Missing if the run cannot be set up again, or the time runs out.
    """
    try:
        return profile_steps(revive(live), live.device, stop, tick)
    finally:
        build.build_device(live.config, Ranks())  # the run's precision set TF32 for the whole process


def profile_steps(
    trainer: Trainer, device: torch.device, stop: Callable[[], bool], tick: Callable[[], None]
) -> dict[str, Any]:
    """See `profile`."""
    batches = endless(trainer)
    measured = seconds_a_step(trainer, batches, stop, tick)
    shares = parts_of(trainer, batches)
    if device.type == "cpu":  # the profiler slows the host: only its shares are true
        total = sum(shares.values())
        parts = {name: value / total * measured for name, value in shares.items()}
    else:
        parts = {**shares, "waiting for the host": max(0.0, measured - sum(shares.values()))}
    predicted = None
    if trainer.step.rule is not None:
        ratio = predicted_flops(trainer.config, trainer.source.num_classes)
        trainer.rule = None
        trainer.make_step()
        predicted = ratio * seconds_a_step(trainer, batches, stop, tick)
    return {"parts": parts, "measured": measured, "predicted": predicted}


def revive(live: Live) -> Trainer:
    """A trainer in the run's last phase: its weights and groups, an anchor if it had one."""
    config = live.config.with_(compile="off", capture="off", bank=None, weights=None, precision=live.precision)
    try:
        trainer = Trainer(config, None, Ranks(), Progress())
    except UserError as error:
        raise Missing(f"its step cannot be set up ({error})") from None
    checkpoint.load_into(trainer.model, live.folder.last)
    grouping = live.folder.metrics("group")
    if grouping:
        trainer.groups = torch.tensor(grouping[-1]["groups"])
        if config.preserve.gkp:  # its values cost no more and no less than zeros
            nothing = torch.zeros_like(trainer.flat.data)
            trainer.update.anchor = Anchor(nothing, nothing)
        trainer.make_step()
    trainer.model.train()
    return trainer


def kinds(rule: Rule | None) -> dict[str, float]:
    """The kinds of step that the rule takes, and each one's share of all steps."""
    if rule is None:
        return {EXACT: 1.0}
    climbing = 1 / rule.ascent_every
    exact = climbing / rule.gram_every
    return {kind: x for kind, x in ((EXACT, exact), (STALE, climbing - exact), (REPEAT, 1 - climbing)) if x > 0}


def take(trainer: Trainer, kind: str, batch: Batch) -> None:
    """One step of this kind, whichever is due."""
    trainer.step.take(kind, batch.labels, *batch.views)
    if trainer.step.engine is not None:
        trainer.step.engine.taken(kind)


def endless(trainer: Trainer) -> Iterator[Batch]:
    """Training batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from trainer.source.train(epoch)
        epoch += 1


def seconds_a_step(
    trainer: Trainer, batches: Iterator[Batch], stop: Callable[[], bool], tick: Callable[[], None]
) -> float:
    """Mean seconds of a step with its data: of each kind the median of TIMED steps after WARM others."""
    mean = 0.0
    for kind, share in kinds(trainer.step.rule).items():
        seconds = []
        for _ in range(WARM + TIMED):
            if stop():
                raise Missing(OUT_OF_TIME)
            synchronize(trainer.device)
            started = time.perf_counter()
            take(trainer, kind, next(batches))
            synchronize(trainer.device)
            seconds.append(time.perf_counter() - started)
            tick()
        mean += share * statistics.median(seconds[WARM:])
    return mean


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parts_of(trainer: Trainer, batches: Iterator[Batch]) -> dict[str, float]:
    """Profiled seconds of a mean step by part: of the device on CUDA, of the host otherwise."""
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    cuda = trainer.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler prints errors where there is no GPU
    devices = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    sums = dict.fromkeys(PARTS, 0.0)
    for kind, share in kinds(trainer.step.rule).items():
        with profiler(activities=devices, acc_events=True) as found:  # False makes torch 2.11 warn
            for _ in range(PROFILED):
                with record_function(DATA):
                    batch = next(batches)
                with record_function(STEP):
                    take(trainer, kind, batch)
            synchronize(trainer.device)
        for event in found.events() or ():
            part = part_of(event)
            if part is not None:
                microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
                sums[part] += share * microseconds / 1e6 / PROFILED
    return {name: value for name, value in sums.items() if value > 0}


def part_of(event: Any) -> str | None:
    """The innermost part that an event of the profiler runs in; None of a GPU's own events, whose time the operations that
    launched them have: `record_function` leaves one there, too, as long as all that runs in it."""
    if event.device_type != torch.autograd.DeviceType.CPU:
        return None
    while event is not None:
        name = "autograd" if event.name.startswith("autograd::engine") else event.name
        if name in NAMES:
            return NAMES[name]
        event = event.cpu_parent
    return None
