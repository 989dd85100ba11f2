"""What a run writes down for `ltfast report`, beyond losses and accuracies: all of it once an epoch or more seldom.

Shapes: C classes, G groups, N flat parameters. Kinds of rows in metrics.jsonl:
    quality  feature quality of every class, each epoch (MBG)
    ascent   radii and clips of each group's ascent, each epoch, from some of its steps (GSA)
    forces   norms of what moves the weights: loss gradient, weight decay of the encoder, GKP, each epoch
    probe    Gram matrix of group gradients on fixed training images, up to PROBES + 2 times a run
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ltfast.data.base import SHOT_NAMES, Batch, shot_groups
from ltfast.dist import Ranks
from ltfast.flat import FlatParameters
from ltfast.models import LongTailModel
from ltfast.modes import evaluating, untuned
from ltfast.preserve import Quality, sample_indices

if TYPE_CHECKING:
    from ltfast.train import Trainer

PROBES = 12  # gradient probes per run, beside those of the first and the last epoch
PROBE_IMAGES = 32  # training images per group in one probe: together about one step of the default method
ASCENTS = 16  # steps per epoch whose ascent is recorded: the statistics cost launches, and 16 are plenty for a mean
QUALITY_CLASSES = 1000  # above this many classes only the means over many, medium and few are written
DIGITS = 5


def marked_epochs(epochs: int) -> tuple[int, int]:
    """The two epochs, counted from 1, whose weights are kept for the landscape through theta(t0), theta(t1), theta(t2):
    a third of the run and two thirds; t2 is its end."""
    return max(1, epochs // 3), max(1, 2 * epochs // 3)


def head_and_tail(counts_C: Tensor) -> tuple[Tensor, Tensor]:
    """Classes of the head and of the tail, int64: many-shot and few-shot ones, as far as both exist; otherwise the
    third (at least one) with the most and the third with the fewest training images."""
    shots = shot_groups(counts_C)
    head, tail = (shots == 0).nonzero().flatten(), (shots == 2).nonzero().flatten()
    if len(head) and len(tail):
        return head, tail
    order = torch.argsort(counts_C, descending=True, stable=True)
    third = max(1, len(order) // 3)
    return order[:third].sort().values, order[-third:].sort().values


def finite(values: Tensor) -> list[float | None]:
    """A vector as JSON numbers of DIGITS significant digits; None for infinities and NaN, which JSON has not."""
    return [float(f"{v:.{DIGITS}g}") if abs(v) < float("inf") else None for v in values.tolist()]


def quality_row(quality: Quality, counts_C: Tensor) -> dict[str, Any]:
    """Q, V and D of every class, or their means over many, medium and few where there are very many classes (without
    those of one image, which have no spread)."""
    values = {name: value.cpu().double() for name, value in quality._asdict().items()}
    if len(counts_C) <= QUALITY_CLASSES:
        return {name: finite(value) for name, value in values.items()}
    shots, several, row = shot_groups(counts_C), counts_C > 1, {}
    for name, value in values.items():
        parts = [value[(shots == k) & several & value.isfinite()] for k in range(len(SHOT_NAMES))]
        row[name] = dict(zip(SHOT_NAMES, finite(torch.stack([p.mean() for p in parts])), strict=True))
    return row


class AscentMeter:
    """Means over some steps of an epoch of each group's ascent; adds on the device, reads once an epoch.

    steps: steps of an epoch.
    """

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // ASCENTS)
        self.sums: Tensor | None = None

    def add(self, step: int, stats: Mapping[str, Tensor], good: Tensor | None = None) -> None:
        """`stats`: `AscentStats` of step number `step` as a dict ({} where there was no ascent); good: 0-dim, 0 if it was skipped."""
        if not stats or step % self.every:
            return
        radius, clipped = stats["radius"], stats["clipped"]
        rows = torch.stack([
            radius > 0, radius, clipped > 0, clipped < 0, stats["fallback"], stats["norm_sq"].sqrt(),
            stats["length_sq"].sqrt() * (radius > 0),
        ])  # fmt: skip
        if good is not None:
            rows = torch.where(good != 0, rows, 0.0)
        self.sums = rows if self.sums is None or self.sums.shape != rows.shape else self.sums + rows

    def result(self) -> dict[str, Any]:
        """Lists over the groups: `steps` with the group present, and means over them.

        radius: Eq. 13, unclipped; above, below: shares of radii clipped; fallback: share of plain SAM directions;
        norm: |uh_k|; length: |s^-1 eps|.
        """
        if self.sums is None:
            return {}
        steps, *sums = self.sums.cpu().double()
        self.sums = None
        names = ("radius", "above", "below", "fallback", "norm", "length")
        # Of several ranks `steps` is a mean, which may be below 1.
        means = [finite(value / torch.where(steps > 0, steps, 1.0)) for value in sums]
        return {"steps": finite(steps), **dict(zip(names, means, strict=True))}


def gradient_gram(
    model: LongTailModel,
    flat: FlatParameters,
    loss: Callable[[Tensor, Tensor], Tensor],
    groups: Iterable[Iterable[Batch]],
    ranks: Ranks | None = None,
) -> tuple[Tensor, Tensor]:
    """(Gram matrix [G, G] float64 of the groups' mean-loss gradients, their losses [G]); eval mode, plain views.

    loss: (logits, labels) -> loss of each sample. Gradients are taken beside `p.grad`, and modes are restored.
    """
    ranks = ranks or Ranks()
    rows, losses = [], []
    with untuned(), evaluating(model):
        for batches in groups:
            row, total = torch.zeros_like(flat.data), torch.zeros(2, dtype=torch.float64, device=flat.device)
            for batch in batches:
                value = loss(model(batch.views[0]), batch.labels).sum()
                row += flat.flatten(torch.autograd.grad(value, flat.params, allow_unused=True))
                total += torch.stack([value.detach().double(), total.new_tensor(float(len(batch.labels)))])
            ranks.sum_(row)
            ranks.sum_(total)
            rows.append(row / total[1])
            losses.append(total[0] / total[1])
    gram = torch.stack([torch.stack([(a * b).sum(dtype=torch.float64) for b in rows]) for a in rows])
    return gram, torch.stack(losses)


def probe_row(trainer: Trainer) -> dict[str, Any]:
    """Gram matrices and losses of many, medium, few ("shots") and of the bank's groups; the same images every time."""
    source = trainer.source
    shots = shot_groups(source.train_counts)
    present = shots.unique()
    tables = {"shots": torch.searchsorted(present, shots)}
    if trainer.groups is not None:
        tables["groups"] = trainer.groups.cpu()
    row: dict[str, Any] = {"names": [SHOT_NAMES[k] for k in present.tolist()]}
    for name, table in tables.items():
        chosen = [sample_indices(table, source.train_labels, k, PROBE_IMAGES) for k in range(int(table.max()) + 1)]
        batches = [source.evaluate("train", index) for index in chosen]
        loss = trainer.objective.classification
        gram, losses = gradient_gram(trainer.model, trainer.flat, loss, batches, trainer.ranks)
        row[name] = {"gram": [finite(line) for line in gram], "loss": finite(losses)}
    return row


@torch.no_grad()
def forces_row(trainer: Trainer) -> dict[str, Any]:
    """|weight decay| of the encoder, which is what GKP pulls, |theta|, and of GKP: |gradient| as the update adds it, loss,
    alpha; one pass over N each.

    The loss is what the update minimises, (1 - alpha) lambda / 2 sum A (theta - T)^2 with A as it was capped: L_gkp without
    its constant, which moves nothing.
    """
    update, theta = trainer.update, trainer.flat.data
    norm, encoder = (torch.linalg.vector_norm(v, dtype=torch.float64) for v in (theta, theta[trainer.encoder]))
    row = {"theta": float(norm), "decay": update.weight_decay * float(encoder)}
    if update.anchor is not None:
        weight, target = update.anchor
        pull, gap = update.strength * weight, theta - target
        row["gkp"] = float(torch.linalg.vector_norm(pull * gap, dtype=torch.float64))
        row["gkp_loss"] = 0.5 * float((pull * gap * gap).sum(dtype=torch.float64))
        row["alpha"] = float(update.alpha)
    return row


def refresh_row(trainer: Trainer) -> dict[str, float]:
    """Cosines between the remembered and the exact ascent direction at this epoch's Gram refreshes (mode R)."""
    engine = trainer.step.engine
    if engine is None:
        return {}
    total, count, smallest = engine.refresh.tolist()
    engine.forget_refreshes()
    return {"refreshes": count, "refresh_cos": total / count, "refresh_min": smallest} if count else {}


def observe_epoch(trainer: Trainer, epoch: int) -> None:
    """Write the rows of an epoch that is over; keep the weights of the marked ones."""
    epochs = trainer.config.optim.epochs
    if trainer.meter.sums is not None:
        trainer.ranks.mean_(trainer.meter.sums)  # local ascents differ
    ascent = trainer.meter.result()
    if ascent:
        trainer.log("ascent", epoch=epoch, **ascent, **refresh_row(trainer))
    trainer.log("forces", epoch=epoch, **forces_row(trainer))
    if (epoch + 1) % max(1, -(-epochs // PROBES)) == 0 or epoch + 1 == epochs or epoch == 0:
        trainer.log("probe", epoch=epoch, **probe_row(trainer))
    if epoch + 1 in marked_epochs(epochs):
        trainer.save_weights(f"epoch-{epoch + 1}")
