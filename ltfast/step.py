"""One optimisation step: views -> group losses -> ascent -> descent -> update.

Shapes: B batch, C classes, G groups, D feature dimension, N flat parameters. Nothing here waits for the device: every
statistic stays a tensor until the logging interval asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ltfast.data.base import Batch
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.kernels import adamw_step, ascent_coefficients, gram_partials, perturb, sgd_step
from ltfast.losses import balanced_softmax, balanced_supcon, cross_entropy, group_losses, log_prior
from ltfast.models import LongTailModel
from ltfast.optim.engine import Engine
from ltfast.optim.rules import Rule
from ltfast.reduce import Agreement, GradientReducer


@dataclass(frozen=True)
class Objective:
    """The base loss (docs/method.md): a_ce * CE(view 1) + a_scl * BalSCL(views 2, 3).

    Attributes:
        kind: "ce", "balanced-softmax" or "bcl".
        counts: [C] training images a class (the prior).
        a_ce, a_scl, temperature, tau: weights, BalSCL temperature, strength of the prior.
        agreement: over how many ranks the contrast set of bcl reaches.
    """

    kind: str
    counts: Tensor
    a_ce: float = 1.0
    a_scl: float = 0.35
    temperature: float = 0.1
    tau: float = 1.0
    agreement: Agreement = field(default_factory=Agreement)

    @property
    def n_views(self) -> int:
        return 3 if self.kind == "bcl" else 1

    @cached_property
    def prior(self) -> Tensor:
        """log(n_c / n), [C]."""
        return log_prior(self.counts)

    def classification(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The CE term for each sample [B] (this is also the loss whose Fisher GKP uses)."""
        if self.kind == "ce":
            return cross_entropy(logits, labels)
        return balanced_softmax(logits, labels, self.prior, self.tau)

    def __call__(
        self, model: LongTailModel, features: Tensor, z: Tensor | None, labels: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample [B] from features [V*B, D], projections z [2B, P] and an optional perturbed classifier."""
        b = labels.numel()
        if self.kind != "bcl":
            return self.classification(model.logits(features[:b], weight), labels)
        assert z is not None
        loss = self.a_ce * self.classification(model.logits(features[:b], weight), labels)
        z, everyone, own = self.agreement.contrast(z, labels)
        return loss + self.a_scl * balanced_supcon(z, model.centers(weight), everyone, self.temperature)[own]


class Update:
    """The descent: momentum SGD or AdamW on the flat buffer, with restore, weight decay and the GKP anchor in one pass.

    Attributes:
        lr: learning rate, 0-dim device tensor (changing it recompiles and synchronises nothing).
        anchor: (A [N], T [N]) of shared GKP or None; `strength` is (1 - alpha) * lambda, `alpha` scales the gradient.
        state: tensors to checkpoint.
    """

    def __init__(
        self,
        flat: FlatParameters,
        *,
        kind: str = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float = 0.0,
    ) -> None:
        device = flat.device
        self.flat, self.kind, self.clip = flat, kind, clip
        self.momentum, self.weight_decay, self.nesterov, self.betas = momentum, weight_decay, nesterov, betas
        self.lr = torch.zeros((), device=device)
        self.alpha = torch.ones((), device=device)
        self.strength = torch.zeros((), device=device)
        self.anchor: tuple[Tensor, Tensor] | None = None
        n_slots = 1 if kind == "sgd" else 2
        self.slots = [torch.zeros_like(flat.data) for _ in range(n_slots)]
        self.step = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)  # steps skipped since the last good one

    def __call__(self, grad: Tensor, kept: Tensor | None, bad: Tensor) -> Tensor:
        """Apply the gradient [N]; `kept` is theta before the ascent, if there was one. Returns |gradient|, 0-dim.

        A non-finite gradient, or `bad` != 0, leaves theta and the optimizer state as they were and is counted.
        """
        norm = gram_partials(grad[None])[0].sum().sqrt().float()
        skip = (~torch.isfinite(norm)).float().maximum(bad)
        scale = self.alpha * (self.clip / norm.clamp_min(self.clip)) if self.clip else self.alpha
        anchor = None if self.anchor is None else (*self.anchor, self.strength)
        self.skipped += skip
        self.in_a_row.add_(skip).mul_(skip)
        self.step += 1 - skip
        theta, mirror = (self.flat.data, None) if kept is None else (kept, self.flat.data)
        if self.kind == "sgd":
            sgd_step(
                theta, grad, self.slots[0], self.lr, self.momentum, 0.0, self.weight_decay, self.nesterov, anchor, mirror,
                grad_scale=scale, found_inf=skip,
            )  # fmt: skip
        else:
            adamw_step(
                theta, grad, *self.slots, self.step, self.lr, self.betas, 1e-8, self.weight_decay, anchor, mirror,
                grad_scale=scale, found_inf=skip,
            )  # fmt: skip
        return norm

    def state(self) -> dict[str, Tensor]:
        """Tensors to checkpoint, by name."""
        named = {f"slot{i}": slot for i, slot in enumerate(self.slots)}
        return {**named, "step": self.step, "skipped": self.skipped, "in_a_row": self.in_a_row}


class TrainStep:
    """One step of training on a batch; `rule=None` is plain descent.

    Args:
        model, objective, flat, buffers, update: what it trains and how.
        rule: sharpness-aware rule, or None.
        membership: [C, G] group weights of every class (rows sum to 1).
        group_counts: [G] training images of each group.
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
        group_counts: Tensor | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        reducer: GradientReducer | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self.model, self.objective, self.flat, self.buffers, self.update = model, objective, flat, buffers, update
        self.rule, self.autocast, self.reducer = rule, autocast, reducer
        self.agreement = agreement or Agreement()
        c = objective.counts.numel()
        device = flat.device
        self.membership = torch.ones(c, 1, device=device) if membership is None else membership.to(device)
        counts = self.membership.T @ objective.counts.to(device).float() if group_counts is None else group_counts
        self.group_counts = counts.to(device, torch.float32)
        self.engine = Engine(flat, rule, self.group_counts, self.agreement) if rule and rule.scope == "all" else None
        self.features: Tensor | None = None
        self.classifier_stats: dict[str, Tensor] = {}
        if rule is None or rule.scope == "classifier":
            flat.resize_rows(1)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Train on one batch; returns 0-dim device tensors (loss, grad_norm, skipped, statistics of the ascent)."""
        x, labels = torch.cat(batch.views), batch.labels
        if self.rule is None:
            loss = self._plain(x, labels)
        elif self.rule.scope == "classifier":
            loss = self._classifier(x, labels)
        elif self.rule.objective == "per_group":
            loss = self._per_group(x, labels)
        else:
            loss = self._shared(x, labels)
        grad = self.flat.grads[self._final_row]
        bad = (~torch.isfinite(loss)).float()
        if self.reducer is not None:
            self.reducer.finish(bad)
        kept = self.engine.kept if self.engine is not None else None
        norm = self.update(grad, kept, bad)
        if self.engine is not None:
            self.engine.climbed = False
        return {"loss": loss.detach(), "grad_norm": norm, **self._stats}

    # -- losses -----------------------------------------------------------------------------------------------------------

    def _encode(self, x: Tensor, batch: int) -> tuple[Tensor, Tensor | None]:
        features = self.model.features(x)
        z = self.model.project(features[batch:]) if self.objective.kind == "bcl" else None
        return features, z

    def losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Group losses [G], batch shares [G] and the features of view 1 [B, D] (detached)."""
        with self.autocast():
            features, z = self._encode(x, labels.numel())
            per_sample = self.objective(self.model, features, z, labels)
        losses, shares = self.agreement.losses(*group_losses(per_sample, self.membership[labels]))
        return losses, shares, features[: labels.numel()].detach()

    @property
    def _final_row(self) -> int:
        return self.engine.n_rows if self.engine is not None and self.engine.rule.objective == "per_group" else 0

    @property
    def ascent_stats(self) -> dict[str, Tensor]:
        """Statistics of the last ascent, one value a direction; empty without one."""
        return self.classifier_stats if self.engine is None else self.engine.stats

    @property
    def _stats(self) -> dict[str, Tensor]:
        """The same, 0-dim: each averaged over its directions."""
        return {name: value.mean() for name, value in self.ascent_stats.items()}

    def _descend(self, loss: Tensor) -> None:
        """Backward of the final loss: its gradient leaves for the other ranks while earlier layers are still computed."""
        if self.reducer is not None:
            self.reducer.arm(self.flat.grads[self._final_row])
        loss.backward()

    # -- the four kinds of step ----------------------------------------------------------------------------------------

    def _plain(self, x: Tensor, labels: Tensor) -> Tensor:
        losses, shares, self.features = self.losses(x, labels)
        loss = (losses * shares).sum()
        self.flat.attach(0)
        self._descend(loss)
        return loss

    def _shared(self, x: Tensor, labels: Tensor) -> Tensor:
        """One perturbation for the whole batch: SAM, its variants, and GSA with a shared objective."""
        assert self.engine is not None
        assert self.rule is not None
        losses, shares, self.features = self.losses(x, labels)
        self.engine.ascend(losses, shares)
        self.buffers.save()
        perturbed, shares, _ = self.losses(x, labels)
        self.buffers.restore()
        if self.rule.split:  # row 0 already holds the gradient of the part that stays at theta
            self.flat.attach(0, zero=False)
            self._descend(perturbed[1] * shares[1])
        else:
            self.flat.attach(0)
            self._descend((perturbed * shares).sum())
        return (losses.detach() * shares).sum()

    def _per_group(self, x: Tensor, labels: Tensor) -> Tensor:
        """sum_k w_k L_k(theta + eps_k) exactly: G forward and backward passes at G perturbed points (for ablation)."""
        assert self.engine is not None
        losses, shares, self.features = self.losses(x, labels)
        coef = self.engine.ascend(losses, shares)
        self.buffers.save()
        self.flat.attach(self._final_row)
        for k in range(self.engine.n_groups):
            self.engine.move_to(coef[k])
            perturbed, _, _ = self.losses(x, labels)
            last = k + 1 == self.engine.n_groups
            (self._descend if last else torch.Tensor.backward)(perturbed[k] * shares[k])
        self.buffers.restore()
        return (losses.detach() * shares).sum()

    def _classifier(self, x: Tensor, labels: Tensor) -> Tensor:
        """Perturb the classifier only: the encoder runs once, G perturbed classifiers read its features (Figure 3)."""
        with self.autocast():
            features, z = self._encode(x, labels.numel())
        self.features = features[: labels.numel()].detach()
        weight = self.model.classifier.weight
        member = self.membership[labels]
        eps, plain = self._classifier_ascent(features.detach(), None if z is None else z.detach(), labels, member)
        self.buffers.save()
        total = torch.zeros((), device=x.device)
        with self.autocast():
            for k, eps_k in enumerate(eps):
                per_sample = self.objective(self.model, features, z, labels, weight + eps_k.view_as(weight))
                part = member.sum(1) if eps.shape[0] == 1 else member[:, k]
                total = total + (per_sample * part).sum() / labels.numel()
        self.buffers.restore()
        self.flat.attach(0)
        self._descend(total)
        return plain

    def _classifier_ascent(
        self, features: Tensor, z: Tensor | None, labels: Tensor, member: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Perturbations [G or 1, C*D] of the classifier weight, and the unperturbed loss."""
        rule = self.rule
        assert rule is not None
        weight = self.model.classifier.weight.view_as(
            self.model.classifier.weight
        )  # not a leaf: FLOP counters need that
        with self.autocast():
            per_sample = self.objective(self.model, features, z, labels, weight)
        losses, shares = self.agreement.losses(*group_losses(per_sample, member))
        last = losses.numel() - 1
        grads = [
            torch.autograd.grad(loss, weight, retain_graph=k < last)[0].reshape(-1) for k, loss in enumerate(losses)
        ]
        rows, theta = self.agreement.rows(torch.stack(grads).float()), weight.detach().reshape(-1)
        coef, stats = ascent_coefficients(
            *gram_partials(rows, theta, rule.adaptive), shares, self.group_counts, theta.numel(),
            direction=rule.direction, objective=rule.objective, rho=rule.rho, C=rule.radius_C,
            rho_min=rule.rho_min, rho_max=rule.rho_max, sigma=rule.sigma, aggregate=rule.aggregate,
        )  # fmt: skip
        self.classifier_stats = stats._asdict()
        coef = coef.reshape(-1, losses.numel())
        eps = torch.stack([perturb(theta, rows, c, rule.adaptive) - theta for c in coef])
        return eps, (losses * shares).sum().detach()
