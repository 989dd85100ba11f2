"""Everything that determines the rest of a run, taken from a Trainer and put back: `--resume` is exact because of it.
The bank of another run (`--bank`) is read here, too.

Order and augmentation of images are pure functions of (seed, epoch, position), so the data's state is three numbers.
With several ranks, what differs between them (BatchNorm statistics, random generators) is kept for each; sums over a
part of an epoch (feature quality, means for the log, moving averages of local ascents) are kept as one sum or mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltfast.data.large_source import LargeSource
from ltfast.dist import Traffic
from ltfast.errors import UserError
from ltfast.preserve import Anchor
from ltfast.preserve.bank import WEIGHTS
from ltfast.runs import RunFolder
from ltfast.store import Store

if TYPE_CHECKING:
    from ltfast.train import Trainer

# Never written to once made, so stored once whatever the number of training states that refer to them.
HELD = tuple(f"bank.{name}" for name in WEIGHTS)  # by rank 0 alone
SHARED = (*HELD, "anchor.weight", "anchor.target")


def capture(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(tensors, JSON-able values, unchanging tensors) of a run between two steps; every rank must call it.

    The tensors are the live ones: copy them before the next step (`Store.save_state` does).
    """
    ranks = trainer.ranks
    tensors = {"theta": trainer.flat.data, "quality": ranks.sum_(trainer.quality.flat.clone())}
    tensors |= {f"update.{k}": v for k, v in trainer.update.state().items()}
    tensors |= {f"bank.{k}": v for k, v in trainer.bank.state_dict().items()}
    if trainer.step.engine is not None:
        tensors |= {f"engine.{k}": v for k, v in trainer.step.engine.state().items()}
        if "engine.eps" in tensors:
            tensors["engine.eps"] = ranks.mean_(tensors["engine.eps"].clone())
        # Averages are meaned over the ranks on which a group's has begun.
        if "engine.averages" in tensors and ranks.world > 1:
            begun = ranks.sum_(tensors["engine.seen"].clone())
            seen = tensors["engine.seen"][:, None]
            total = ranks.sum_(torch.where(seen > 0, tensors["engine.averages"], 0.0))
            tensors["engine.averages"] = total / begun.clamp_min(1)[:, None]
            tensors["engine.seen"] = (begun > 0).float()
    if trainer.groups is not None:
        tensors["groups"] = trainer.groups
    if trainer.update.anchor is not None:
        tensors |= {f"anchor.{k}": v for k, v in trainer.update.anchor._asdict().items()}
    if trainer.sums:
        tensors["sums"] = ranks.mean_(torch.stack(list(trainer.sums.values())))
    if trainer.meter.sums is not None:
        tensors["meter"] = ranks.mean_(trainer.meter.sums.clone())
    tensors |= {f"rank.{k}": ranks.gather(v) for k, v in rank_state(trainer).items()}
    meta = {name: getattr(trainer, name) for name in ("epoch", "batch", "steps", "best")}
    meta |= {
        "sums": list(trainer.sums), "seconds": trainer.seconds, "wire": dataclasses.asdict(trainer.wire), "world": ranks.world,
        "metrics": trainer.folder.metrics_bytes() if trainer.folder is not None else 0, "data": trainer.source.identity(),
    }  # fmt: skip
    if isinstance(trainer.source, LargeSource):
        tensors["replaced"] = ranks.sum_(trainer.source.replaced.clone())
    shared = {name: tensors.pop(name) for name in list(tensors) if name.startswith(SHARED)}
    return tensors, meta, shared


def rank_state(trainer: Trainer) -> dict[str, Tensor]:
    """What each rank has of its own."""
    own = {"buffers": trainer.buffers.data, "rng": torch.get_rng_state()}
    if trainer.buffers.counters:
        own["counters"] = torch.stack(trainer.buffers.counters)
    if trainer.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state(trainer.device)
    return own


def restore(trainer: Trainer, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Continue exactly where `capture` was called; with another number of ranks, to rounding.

    Raises:
        UserError: the state belongs to another model or training list, or lacks something.
    """
    try:
        check_data(meta["data"], trainer.source.identity())  # first: other classes make another network
        _check(trainer, tensors)
        _restore_shared(trainer, tensors)
        _restore_rank(trainer, tensors, meta["world"] == trainer.ranks.world)
        for name in ("epoch", "batch", "steps", "best", "seconds"):
            setattr(trainer, name, meta[name])
        trainer.wire = Traffic(**meta["wire"])
        if "sums" in tensors:
            trainer.sums = dict(zip(meta["sums"], tensors["sums"].to(trainer.device).unbind(), strict=True))
        if "meter" in tensors:
            trainer.meter.sums = tensors["meter"].to(trainer.device)
        if isinstance(trainer.source, LargeSource) and "replaced" in tensors and trainer.ranks.main:  # of all ranks
            trainer.source.replaced.copy_(tensors["replaced"])
    except KeyError as error:
        raise UserError(
            f"--resume: the training state lacks {error}; it was written by another version of ltfast"
        ) from None


def _check(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    saved = tensors["theta"].numel(), tensors["rank.buffers"][0].numel()
    here = trainer.flat.data.numel(), trainer.buffers.data.numel()
    if saved != here:
        raise UserError(
            f"--resume: the checkpoint is of a network of another size ({saved[0]:,} parameters and {saved[1]:,} statistics, "
            f"{here[0]:,} and {here[1]:,} here); were classes added or removed, or was config.toml changed?"
        )


def check_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """UserError when the run was on other images, or on the same in another order (`Source.identity`)."""
    for name, value in now.items():
        if saved.get(name) != value:
            raise UserError(
                f"cannot resume: {name} was {saved.get(name)!r} and is {value!r} now, so the images that are left, and "
                "those held out, are not known; bring it back or start a new run"
            )


def _restore_shared(trainer: Trainer, tensors: dict[str, Tensor]) -> None:
    """What all ranks have in common."""
    trainer.flat.data.copy_(tensors["theta"])
    # --precision auto may have meant no fp16 where the run began: then there is no scale yet.
    scale = {} if trainer.update.scaler is None else trainer.update.scaler.state()
    for name, value in trainer.update.state().items():
        if f"update.{name}" in tensors or name not in scale:
            value.copy_(tensors[f"update.{name}"])
    trainer.bank.load_state_dict(part(tensors, "bank."))
    if "groups" in tensors:
        trainer.groups = tensors["groups"]
    if "anchor.weight" in tensors:
        trainer.update.anchor = Anchor(*(tensors[f"anchor.{name}"].to(trainer.device) for name in Anchor._fields))
    trainer.make_step()
    if trainer.step.engine is not None:
        trainer.step.engine.load_state(part(tensors, "engine."))
    trainer.quality.reset()
    if trainer.ranks.main:  # the saved sum is that of all ranks
        trainer.quality.flat.copy_(tensors["quality"])


def _restore_rank(trainer: Trainer, tensors: dict[str, Tensor], same_world: bool) -> None:
    """What this rank had of its own; with another number of ranks, means and fresh random numbers."""
    row = trainer.ranks.rank if same_world else 0
    buffers = tensors["rank.buffers"]
    trainer.buffers.data.copy_(buffers[row] if same_world else buffers.mean(0))
    for i, counter in enumerate(trainer.buffers.counters):
        counter.copy_(tensors["rank.counters"][row, i])
    if not same_world:
        return
    torch.set_rng_state(tensors["rank.rng"][row].clone())
    if trainer.device.type == "cuda" and "rank.cuda_rng" in tensors:
        torch.cuda.set_rng_state(tensors["rank.cuda_rng"][row].clone(), trainer.device)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def load_bank(run: Path, class_names: Sequence[str] = (), center: bool = False) -> dict[str, Tensor]:
    """The memory bank of an earlier run (`--bank RUN`), whose classes must be `class_names` if any are given.

    Raises:
        UserError: not a run folder, or it filled no bank, or one of other classes, or one that cannot be centred.
    """
    folder = RunFolder.open(run)
    if class_names:
        folder.check_classes(class_names, f"--bank {run}", "give the bank of a run with the same classes")
    state = Store(folder.checkpoints).load()
    if state is None:
        raise UserError(f"--bank {run}: that run has no training state yet")
    bank = part(state[0], "bank.")
    if bool((bank["entry"] < 0).all()):
        raise UserError(f"--bank {run}: that run filled no memory bank; choose one trained with gkp or gsa-*")
    if center and "origin" not in bank:
        raise UserError(
            f"--center: the bank of {run} lacks the weights that its run began with; fill one by a run with --center"
        )
    return bank
