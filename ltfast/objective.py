"""The base loss, and the functions from pictures to group losses that a step evaluates and that can be compiled.

Shapes: B batch, V views, C classes, G groups, D feature dimension, P projection width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from ltfast.compiled import Compiler
from ltfast.losses import balanced_softmax, balanced_supcon, cross_entropy, group_losses, log_prior
from ltfast.models import LongTailModel
from ltfast.reduce import Agreement

P = ParamSpec("P")
R = TypeVar("R")
Autocast = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Objective:
    """The base loss (docs/method.md). bcl: a_ce * CE(view 1) + a_scl * BalSCL(views 2, 3); the others: CE(view 1) alone.

    Attributes:
        kind: "ce", "balanced-softmax" or "bcl".
        counts: [C] training images per class (the prior).
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
        self,
        model: LongTailModel,
        features: Tensor,
        z: Tensor | None,
        labels: Tensor,
        weights: Tensor | None = None,
        group_of_class: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample [B] from features [V*B, D] and projections z [2B, P].

        weights: a classifier [C, D] in the place of the model's own, or [K, C, D] with group_of_class [C]: a sample of
        class c meets the one of row group_of_class[c]; what does not depend on the classifier is computed once, not K times.
        """
        own_features = features[: labels.numel()]
        if group_of_class is None:
            logits = model.logits(own_features, weights)
        else:
            assert weights is not None
            every = torch.stack([model.logits(own_features, weight) for weight in weights])  # [K, B, C]
            place = group_of_class[labels][None, :, None].expand(1, -1, every.shape[2])
            logits = every.gather(0, place).squeeze(0)
        loss = self.classification(logits, labels)
        if self.kind != "bcl":
            return loss
        assert z is not None
        z, everyone, own = self.agreement.contrast(z, labels)
        if group_of_class is None:
            contrast = balanced_supcon(z, model.centers(weights), everyone, self.temperature)
        else:
            assert weights is not None
            centers = torch.stack([model.centers(weight) for weight in weights])  # [K, C, P]
            contrast = balanced_supcon(z, centers, everyone, self.temperature, group_of_class[everyone])
        return self.a_ce * loss + self.a_scl * contrast[own]


class Forward:
    """Pictures to group losses under the run's precision: every function is one graph, of tensors only.

    Args:
        objective: None for a Forward that only evaluates (`logits`).
        compiler: compiles the functions; None leaves them eager.
    """

    def __init__(
        self,
        model: LongTailModel,
        objective: Objective | None,
        autocast: Autocast = nullcontext,
        compiler: Compiler | None = None,
    ) -> None:
        self.model, self.autocast, self.compiler = model, autocast, compiler
        self.logits = self._prepared(self._logits, "logits")
        if objective is None:
            return
        self.objective = objective
        _ = objective.prior  # checked and computed on the host, so never inside a compiled function
        self.losses = self._prepared(self._losses, "losses")
        self.first_view = self._prepared(self._first_view, "losses of view 1")
        self.encode = self._prepared(self._encode, "encoder")
        self.head = self._prepared(self._head, "losses of features")

    def _prepared(self, function: Callable[P, R], name: str) -> Callable[P, R]:
        inner = function if self.compiler is None else self.compiler(function, name)

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with self.autocast():
                return inner(*args, **kwargs)

        return call

    def _encode(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pictures [V*B, ...] -> features [V*B, D] and the projections [2B, P] of views 2 and 3.

        The statistics of everything behind the encoder move here, once, and may be kept still afterwards.
        """
        features, z = self._features(x, labels)
        if z is not None:
            with torch.no_grad():
                self.model.centers(self.model.classifier.weight.detach())
        return features, z

    def _features(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.model.features(x)
        return features, self.model.project(features[labels.numel() :]) if self.objective.kind == "bcl" else None

    def _head(
        self, features: Tensor, z: Tensor | None, labels: Tensor, membership: Tensor, weights: Tensor, group: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Group losses [G] and batch shares [G] from `_encode`'s results with classifiers [K, C, D], row group [C] each."""
        return group_losses(self.objective(self.model, features, z, labels, weights, group), membership[labels])

    def _losses(self, x: Tensor, labels: Tensor, membership: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Group losses [G], batch shares [G], and detached features [V*B, D] and projections [2B, P]; membership [C, G]."""
        features, z = self._features(x, labels)
        per_sample = self.objective(self.model, features, z, labels)
        losses, shares = group_losses(per_sample, membership[labels])
        return losses, shares, features.detach(), None if z is None else z.detach()

    def _first_view(self, x: Tensor, labels: Tensor, membership: Tensor) -> tuple[Tensor, Tensor]:
        """The classification term alone, from view 1 alone [B, ...]: group losses [G] and shares [G]."""
        per_sample = self.objective.classification(self.model(x), labels)
        scale = self.objective.a_ce if self.objective.kind == "bcl" else 1.0
        return group_losses(scale * per_sample, membership[labels])

    def _logits(self, x: Tensor) -> Tensor:
        """Pictures [B, ...] -> logits [B, C], for evaluation."""
        return self.model(x)
