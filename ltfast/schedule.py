"""Schedules as pure functions of the position in the run, in epochs (fractions between epochs)."""

from __future__ import annotations

import math

from ltfast.config import Optim, Preserve

PAPER_LAMBDA = 10.0


def lr_at(optim: Optim, epoch: float) -> float:
    """Learning rate after `epoch` epochs: linear warm-up, then multistep (x0.1 at 80 % and 90 %), cosine or constant."""
    if epoch < optim.warmup:
        # Never 0, as the release's (epoch + 1) / warmup; but in every step, and at the peak when the warm-up ends.
        return optim.lr * ((epoch + 1) / (optim.warmup + 1))
    if optim.schedule == "multistep":
        return float(optim.lr * 0.1 ** sum(epoch >= optim.epochs * m for m in (0.8, 0.9)))
    if optim.schedule == "cosine":
        progress = (epoch - optim.warmup) / max(optim.epochs - optim.warmup, 1e-9)
        return optim.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optim.lr


def warm_up_note(optim: Optim) -> str:
    """What to tell the user of a run that its warm-up takes up, or ''."""
    if optim.warmup < optim.epochs:
        return ""
    return (
        f"the learning rate never leaves its warm-up: --warmup {optim.warmup:g} of --epochs {optim.epochs}; give less --warmup or "
        "more --epochs"
    )


def alpha_at(preserve: Preserve, progress: float) -> float:
    """Weight alpha of GSA against GKP: cosine from alpha_start to alpha_end; `progress` in [0, 1] of the run."""
    return preserve.alpha_end + (preserve.alpha_start - preserve.alpha_end) * 0.5 * (1 + math.cos(math.pi * progress))


def lambda_of(preserve: Preserve, num_classes: int) -> float:
    """GKP's lambda: as given, else the paper's 10, but not more than C / 100 where groups are divided by their classes.

    With Fishers F_j = F the penalty has (1 - alpha) lambda G^2 (G - 1) / C times the curvature F of the loss: with this lambda a
    tenth of it at most, with lambda = 10 as much for 100 classes and ten times as much for 10 (docs/findings.md).
    """
    if preserve.gkp_lambda is not None:
        return preserve.gkp_lambda
    return PAPER_LAMBDA if preserve.gkp_normalise == "samples" else min(PAPER_LAMBDA, num_classes / 100)


def scouting_epochs(preserve: Preserve, epochs: int) -> int:
    """Epochs of plain base loss that fill the bank before the first grouping: at least 1, none with a given bank.

    A short run leaves an epoch to what comes after, unless scouting is to take all.
    """
    if preserve.bank:
        return 0
    return max(1, min(round(preserve.scout * epochs), epochs if preserve.scout == 1 else epochs - 1))
