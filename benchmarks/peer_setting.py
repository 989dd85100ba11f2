"""The network, batch and groups that whole steps are compared on, and our own steps on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from step_bench import told
from torch import Tensor

from ltfast import build
from ltfast.data.base import Batch
from ltfast.dist import Ranks
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.losses import membership_for
from ltfast.models import LongTailModel
from ltfast.preserve import Anchor
from ltfast.recipes import build_config, rule_of
from ltfast.step import TrainStep
from ltfast.update import Update

CLASSES, GROUPS = 10, 4
COUNTS = torch.tensor([500, 300, 180, 110, 66, 40, 24, 14, 9, 5])  # imbalance 100, a tenth of CIFAR-10-LT
BASE = {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}  # lr small: nothing may overflow in a benchmark
TRAINED = ",trained"  # compiled, recorded, bf16
METHODS = ("ce", "bcl", "ce+sam", "bcl+sam", "gsa-paper", "gsa-exact", "gkp-gsa", "gsa-release+gkp")


class Setting:
    """One batch for all; a fresh network with the same weights for each."""

    def __init__(self, model: str, batch: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.name, self.device = model, device
        torch.backends.cudnn.benchmark = True  # as in training; batches of one size suit everyone
        self.counts = COUNTS.to(device)
        self.groups = torch.arange(CLASSES) * GROUPS // CLASSES
        labels = (torch.arange(batch) % CLASSES).to(device)  # every class, so every group
        views = tuple(torch.randn(batch, 3, 32, 32, device=device) for _ in range(3))
        self.batch = Batch(views, labels, torch.arange(batch, device=device))

    def config(self, method: str) -> build.Config:
        """CIFAR-10-LT's recipe: eager in float32, or with TRAINED behind the method as `ltfast train` runs it."""
        flags: dict[str, Any] = {"model": self.name, "batch": len(self.batch.labels)}
        if not method.endswith(TRAINED):
            flags |= {"compile": "off", "capture": "off", "precision": "fp32"}
        return build_config("cifar10-lt", method.removesuffix(TRAINED), {}, flags)

    def model(self, method: str) -> LongTailModel:
        """A network in training mode."""
        model = build.build_model(self.config(method), (3, 32, 32), CLASSES).to(self.device).train()
        return model.to(memory_format=torch.channels_last) if self.device.type == "cuda" else model  # type: ignore[call-overload]

    def our_step(self, method: str) -> tuple[Callable[[], object], int]:
        """(the trainer's step on the batch, steps after which its cost repeats)."""
        config, model = self.config(method), self.model(method)
        objective = build.build_objective(config, self.counts)
        rule, flat = rule_of(config), FlatParameters(model.parameters())
        update = Update(flat, momentum=BASE["momentum"], weight_decay=BASE["weight_decay"])
        update.lr.fill_(BASE["lr"])
        if config.preserve.gkp:
            update.anchor = Anchor(torch.rand_like(flat.data), flat.data.clone())
            update.strength.fill_(0.1)
        member: Tensor | None = None
        if rule is not None:
            member = membership_for(build.MEMBERSHIP_KIND[rule.groups], COUNTS, self.groups).to(self.device)
        forward, capture = build.build_forward(config, model, objective, self.device, told), None
        if method.endswith(TRAINED):
            capture = build.build_capture(config.with_(capture="on"), None, self.device, Ranks(), told)
        step = TrainStep(
            model, objective, flat, FlatBuffers(model), update, rule, member, forward=forward, capture=capture
        )
        views = self.batch.views[: objective.n_views]
        batch = Batch(views, self.batch.labels, self.batch.index)
        return lambda: step(batch), 1 if rule is None else rule.gram_every
