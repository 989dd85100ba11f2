"""One optimisation step: views -> group losses -> ascent -> descent -> update.

Shapes: B batch, V views, C classes, G groups, D feature dimension, N flat parameters. Nothing here waits for the device:
every statistic stays a tensor until the logging interval asks for it. Python decides nothing but the branch of a step
(`TrainStep.next_branch`), so each branch can be recorded as one CUDA graph (ltfast/graph.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ltfast.backward import Backward
from ltfast.data.base import Batch
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.graph import Captured
from ltfast.kernels import AscentStats, ascent_coefficients, gram_partials, perturb
from ltfast.kernels.common import MAX_ROWS
from ltfast.models import LongTailModel
from ltfast.objective import Forward, Objective
from ltfast.optim.engine import EXACT, REPEAT, STALE, Engine
from ltfast.optim.rules import Rule
from ltfast.reduce import Agreement, GradientReducer
from ltfast.update import Update

# With bcl mode R makes the classifier's group gradients afresh up to this many classes only: they take G passes of the class
# centres' MLP, whose share of a step grows with the number of classes (counted, see docs/methods.md; not timed).
CENTRES_MAX = 1000


class Taken(NamedTuple):
    """What a step leaves behind, on the device.

    result: 0-dim figures for the log (0 of a skipped step), and whether the step was "good"; features: [B, D] of view 1;
    stats: of the ascent, one value per direction.
    """

    result: dict[str, Tensor]
    features: Tensor
    stats: dict[str, Tensor]


class Evaluated(NamedTuple):
    """Group losses [G] and batch shares [G] of a pass, and its detached features [V*B, D] and projections [2B, P]."""

    losses: Tensor
    shares: Tensor
    features: Tensor | None = None
    z: Tensor | None = None


class TrainStep:
    """One step of training on a batch; `rule=None` is plain descent.

    Args:
        model, objective, flat, buffers, update: what it trains and how.
        rule: sharpness-aware rule, or None.
        membership: [C, G] group weights of every class (rows sum to 1).
        forward: the objective's functions, compiled or not; made here if None.
        reducer: adds the final gradient up over the ranks; None: one rank.
        agreement: what else of a step is taken over all ranks.
        capture: wraps the step's function in a recorder of CUDA graphs.

    Attributes:
        features: [B, D] of view 1 of the last batch (detached).
        ascent_stats: statistics of the last ascent, one value per direction; empty without one.
    """

    def __init__(
        self,
        model: LongTailModel,
        objective: Objective,
        flat: FlatParameters,
        buffers: FlatBuffers,
        update: Update,
        rule: Rule | None = None,
        membership: Tensor | None = None,
        forward: Forward | None = None,
        reducer: GradientReducer | None = None,
        agreement: Agreement | None = None,
        capture: Callable[[Callable[..., Taken]], Captured] | None = None,
    ) -> None:
        self.model, self.flat, self.buffers, self.update = model, flat, buffers, update
        self.rule, self.reducer = rule, reducer
        self.forward = forward or Forward(model, objective)
        self.agreement = agreement or Agreement()
        c = objective.counts.numel()
        device = flat.device
        self.membership = torch.ones(c, 1, device=device) if membership is None else membership.to(device)
        self.group_counts = self.membership.T @ objective.counts.to(device).float()
        self.group_of_class = self.membership.argmax(1)  # of hard memberships
        self.backward = Backward(flat, update.scaler)
        self.engine: Engine | None = None
        if rule is not None and rule.scope == "all":
            hard = bool((self.membership.max(1).values == 1).all())
            cheap = objective.kind != "bcl" or c <= CENTRES_MAX
            known = hard and cheap and not rule.partial and not rule.split
            marked = cast(nn.Parameter, model.classifier.weight) if known else None
            self.engine = Engine(flat, rule, self.group_counts, self.agreement, self.backward, marked)
        else:
            flat.resize_rows(1)
        per_group = self.engine is not None and self.engine.rule.objective == "per_group"
        self._final_row = self.engine.n_rows if self.engine is not None and per_group else 0
        self.features: Tensor | None = None
        self.ascent_stats: dict[str, Tensor] = {}
        # Not the bound method: in a reference cycle a step that others have replaced would keep its rows and CUDA graphs.
        own = weakref.proxy(self)

        def take(branch: str, labels: Tensor, *views: Tensor) -> Taken:
            return cast(Taken, own.take(branch, labels, *views))

        self._run: Callable[..., Taken] = take if capture is None else capture(take)
        self._some: Tensor | None = None  # positions of the samples that a partial ascent sees

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Train on one batch; returns 0-dim device tensors (loss, grad_norm, statistics of the ascent)."""
        branch = self.next_branch()
        taken = self._run(branch, batch.labels, *batch.views)
        if self.engine is not None:
            self.engine.taken(branch)
        self.features, self.ascent_stats = taken.features, taken.stats
        return taken.result

    def next_branch(self) -> str:
        """Which path the coming step takes; counts the step."""
        return EXACT if self.engine is None else self.engine.next_branch()

    def take(self, branch: str, labels: Tensor, *views: Tensor) -> Taken:
        """One step along `branch` on labels [B] int64 and views, each [B, channels, H, W]: losses and gradient by the rule's kind
        of step, then the update."""
        x = torch.cat(views)
        if x.is_cuda:
            x = x.contiguous(memory_format=torch.channels_last)
        self.buffers.begin()
        if self.rule is None:
            loss, features, stats = self._plain(x, labels)
        elif self.rule.scope == "classifier":
            loss, features, stats = self._classifier(x, labels)
        elif self.rule.objective == "per_group":
            loss, features, stats = self._per_group(x, labels)
        else:
            loss, features, stats = self._shared(branch, x, labels)
        bad = (~torch.isfinite(loss)).float()
        if self.update.scaler is not None and stats and branch != REPEAT:
            bad = bad.maximum(stats["bad"].max())  # overflow on the way up; ok = 0 may also mean that no group climbs
        if self.reducer is not None:
            self.reducer.finish(bad)
        kept = self.engine.kept if self.engine is not None else None
        norm = self.update(self.flat.grads[self._final_row], kept, bad)
        self.buffers.undo(self.update.in_a_row)
        figures = {"loss": loss, "grad_norm": norm, **means(stats)}
        good = self.update.in_a_row == 0
        # A skipped step counts as 0 in the log.
        values = torch.where(good, torch.stack([value.float() for value in figures.values()]), 0.0)
        result = dict(zip(figures, values.unbind(), strict=True))
        return Taken({**result, "good": good.float()}, features[: labels.numel()], stats)

    # -- parts -----------------------------------------------------------------------------------------------------------

    def losses(self, x: Tensor, labels: Tensor) -> Evaluated:
        """Group losses of pictures [V*B, ...]."""
        losses, shares, features, z = self.forward.losses(x, labels, self.membership)
        return Evaluated(*self.agreement.losses(losses, shares), features, z)

    def ascent_losses(self, x: Tensor, labels: Tensor) -> Evaluated:
        """What the ascent climbs: `losses`, or those of a part of the samples and views (then without features)."""
        rule = self.rule
        assert rule is not None
        if not rule.partial:
            return self.losses(x, labels)
        if rule.ascent_views == 1:
            x = x[: labels.numel()]
        if rule.ascent_fraction < 1:
            some = self._thinned(labels)
            x = x.view(-1, labels.numel(), *x.shape[1:])[:, some].flatten(0, 1)
            labels = labels[some]
        evaluated = (self.forward.first_view if rule.ascent_views == 1 else self.forward.losses)(
            x, labels, self.membership
        )
        return Evaluated(*self.agreement.losses(evaluated[0], evaluated[1]))

    def _thinned(self, labels: Tensor) -> Tensor:
        """Positions of the samples that a partial ascent sees: evenly spaced, whatever a batch may be sorted by."""
        if self._some is None:
            assert self.rule is not None
            b, share = labels.numel(), self.rule.ascent_fraction
            self._some = (torch.arange(max(1, round(b * share))) / share).long().clamp_max(b - 1).to(labels.device)
        return self._some

    @contextmanager
    def _statistics_kept(self, keep: bool = True) -> Iterator[None]:
        """BatchNorm statistics come out as they went in: of a step's passes over the whole batch only one moves them."""
        if keep:
            self.buffers.save()
        yield
        if keep:
            self.buffers.restore()

    def _descend(self, loss: Tensor, *, add: bool = False) -> None:
        """Gradient of the final loss, or of its last part (add); leaves for the other ranks as autograd hands it over."""
        row = self._final_row
        overlapped = self.reducer is not None and self.update.scaler is None
        if not overlapped:
            self.backward(loss, row, add=add)
        if self.reducer is not None:
            self.reducer.arm(self.flat.grads[row])
        if overlapped:  # its hooks wait for autograd to add into p.grad
            self.flat.attach(row, zero=not add)
            loss.backward()

    # -- the four kinds of step ----------------------------------------------------------------------------------------

    def _plain(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        losses, shares, features, _ = self.losses(x, labels)
        loss = (losses * shares).sum()
        self._descend(loss)
        assert features is not None
        return loss.detach(), features, {}

    def _shared(self, branch: str, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """One perturbation for the whole batch: SAM, its variants, and GSA with a shared objective."""
        engine, rule = self.engine, self.rule
        assert engine is not None
        assert rule is not None
        first = None  # pass over the whole batch; it is the one that moves the statistics
        if branch == REPEAT:
            engine.repeat()
        else:
            with self._statistics_kept(rule.partial):
                found = self.ascent_losses(x, labels)
            engine.ascend(found.losses, found.shares, branch, self._known_rows(branch, found, labels))
            first = None if found.features is None else found
        with self._statistics_kept(first is not None):
            after = self.losses(x, labels)
        first = first or after
        if rule.split:  # row 0 already holds the gradient of the part that stays at theta
            self._descend(after.losses[1] * after.shares[1], add=True)
        else:
            self._descend((after.losses * after.shares).sum())
        assert first.features is not None
        return (first.losses.detach() * after.shares).sum(), first.features, engine.stats

    def _known_rows(self, branch: str, found: Evaluated, labels: Tensor) -> Tensor | None:
        """Group gradients [G, C, D] of the classifier for mode R's remembered steps, or None where they are not wanted.

        The encoder's features are there: one pass of the head gives them, where one backward pass per group of a compiled
        network would go all the way down.
        """
        if branch != STALE or self.engine is None or self.engine.last is None:
            return None
        assert found.features is not None
        with self._statistics_kept():
            rows, _, _ = self._classifier_rows(found.features, found.z, labels)
        return rows

    def _per_group(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """sum_k w_k L_k(theta + eps_k) exactly: G forward and backward passes at G perturbed points (for ablation)."""
        engine = self.engine
        assert engine is not None
        losses, shares, features, _ = self.losses(x, labels)
        coef = engine.ascend(losses, shares)
        with self._statistics_kept():
            for k in range(engine.n_groups):
                engine.move_to(coef[k])
                perturbed = self.losses(x, labels).losses
                if k + 1 < engine.n_groups:
                    self.backward(perturbed[k] * shares[k], self._final_row, add=k > 0)
        # The rows are done with, and a recorded step hands nothing to the next one but state at its address.
        engine.settle(engine.rows)
        self._descend(perturbed[-1] * shares[-1], add=engine.n_groups > 1)
        assert features is not None
        return (losses.detach() * shares).sum(), features, engine.stats

    def _classifier(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Perturb the classifier only: the encoder runs once, G perturbed classifiers read its features (Figure 3)."""
        features, z = self.forward.encode(x, labels)
        weight = self.model.classifier.weight
        with self._statistics_kept():
            eps, plain, stats = self._classifier_ascent(features.detach(), None if z is None else z.detach(), labels)
            weights = weight + eps.view(-1, *weight.shape)
            group = self.group_of_class if len(eps) > 1 else torch.zeros_like(self.group_of_class)
            losses, shares = self.forward.head(features, z, labels, self.membership, weights, group)
        self._descend((losses * shares).sum())
        return plain, features.detach(), stats

    def _classifier_ascent(
        self, features: Tensor, z: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Perturbations [G or 1, C*D] of the classifier weight, the unperturbed loss, and statistics."""
        rule = self.rule
        assert rule is not None
        theta = self.model.classifier.weight.detach().reshape(-1)
        gradients, losses, shares = self._classifier_rows(features, z, labels)
        rows = self.agreement.rows(gradients.flatten(1))
        eps, stats = [], []
        # More groups than a Gram matrix takes are of a rule whose groups know nothing of each other (build_membership).
        for part, w, n in zip(*(t.split(MAX_ROWS) for t in (rows, shares, self.group_counts)), strict=True):
            matrix, theta_sq = gram_partials(part, theta, rule.adaptive)
            coef, found = ascent_coefficients(matrix, theta_sq, w, n, theta.numel(), **rule.options)
            eps += [perturb(theta, part, c, rule.adaptive) - theta for c in coef.reshape(-1, len(part))]
            stats.append(found)
        return torch.stack(eps), (losses * shares).sum().detach(), joined(stats)

    def _classifier_rows(self, features: Tensor, z: Tensor | None, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients [G, C, D] of each group's loss by the classifier weight, from detached features; losses and shares."""
        weight = self.model.classifier.weight.detach()
        # Each group has a copy of the classifier of its own, so one backward of the sum gives every group's gradient.
        copies = weight.expand(self.membership.shape[1], *weight.shape).contiguous().requires_grad_()
        evaluated = self.forward.head(features, z, labels, self.membership, copies, self.group_of_class)
        losses, shares = self.agreement.losses(*evaluated)
        (rows,) = torch.autograd.grad(self.backward.scaled(losses.sum()), copies)
        return rows if self.update.scaler is None else rows * self.update.scaler.inverse, losses, shares


def means(stats: dict[str, Tensor]) -> dict[str, Tensor]:
    """0-dim figures of an ascent for the log: means over the groups in the batch; of `clipped` the share that is."""
    each = {name: value for name, value in stats.items() if value.dim()}
    if not each:
        return stats
    present = (stats["radius"] > 0).float()
    found = (torch.stack(list(each.values())).abs() * present).sum(1) / present.sum().clamp_min(1)
    return {**stats, **dict(zip(each, found.unbind(), strict=True))}


def joined(parts: list[AscentStats]) -> dict[str, Tensor]:
    """Statistics of one ascent whose groups went in parts."""
    if len(parts) == 1:
        return parts[0]._asdict()
    found = {
        name: torch.stack(values) if values[0].dim() == 0 else torch.cat(values)
        for name, *values in zip(AscentStats._fields, *parts, strict=True)
    }
    bad = found["bad"].amax()
    return {**found, "bad": bad, "ok": found["ok"].amax() * (1 - bad)}
