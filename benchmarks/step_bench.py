"""One method's step on one network and batch, as the throughput benchmark times it: ours, its plain twin, the bare passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltfast import build
from ltfast.cli_train import parsed
from ltfast.data.augment import Plain, recipe
from ltfast.data.base import SPLITS, Batch
from ltfast.data.pool import Splits
from ltfast.data.small import SmallSource
from ltfast.dist import Ranks
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.losses import membership_for
from ltfast.objective import Forward, Objective
from ltfast.optim import reference
from ltfast.optim.rules import Rule
from ltfast.preserve import Anchor
from ltfast.recipes import build_config, rule_of
from ltfast.step import TrainStep
from ltfast.update import Update

METHODS = ("bcl", "bcl+sam", "gsa-paper", "gsa-full", "gsa-exact", "gsa-release", "gsa-full+gkp")
GROUPS = 4
LR = 0.01  # small: nothing may overflow in a benchmark


def cycle_of(rule: Rule | None) -> int:
    """Steps until a rule's sequence of exact, remembered and repeated ascents begins again."""
    return 1 if rule is None else rule.gram_every * rule.ascent_every


def told(name: str, *, seconds: float, reason: str | None) -> None:
    """A row must not say "compiled" or "recorded" of a step that runs eagerly."""
    if reason is not None:
        raise RuntimeError(f"{name} runs eagerly: {reason}")


@dataclass(frozen=True)
class Case:
    """One network and batch."""

    model: str
    shape: tuple[int, int, int]
    batch: int
    methods: tuple[str, ...] = METHODS
    modes: tuple[str, ...] = ("eager",)
    classes: int = 10

    @property
    def name(self) -> str:
        return f"{self.model}/{self.shape[1]}px/B={self.batch}/G={GROUPS}"


class Bench:
    """Everything for the steps of one method on one case: ours, the twin's and the bare passes."""

    def __init__(self, method: str, case: Case, device: torch.device, mode: str) -> None:
        compiled = "off" if mode == "eager" else "on"
        flags = {"model": case.model, "batch": case.batch, "compile": compiled, "capture": "off"}
        preset, *options = method.split(",")  # "gsa-full,ascent_every=2"
        flags |= {name: parsed(name, value) for name, value in (option.split("=") for option in options)}
        self.config = build_config("digits-lt" if case.shape[1] < 32 else "cifar10-lt", preset, {}, flags)
        self.method, self.case, self.device, self.mode = method, case, device, mode
        self.rule = rule_of(self.config)
        shortcut = self.rule is not None and (self.rule.partial or self.rule.ascent_every > 1)
        self.has_twin = not shortcut and not self.config.preserve.gkp
        self.counts = torch.linspace(500, 10, case.classes).long()
        self.make, self.batch = pictures(case, device)
        groups = torch.arange(case.classes) * GROUPS // case.classes
        kind = "single" if self.rule is None else build.MEMBERSHIP_KIND[self.rule.groups]
        self.membership = membership_for(kind, self.counts, groups).to(device)
        if device.type == "cuda":
            build.build_device(self.config, Ranks())  # cuDNN and TF32 as in training
        self.reset()

    def reset(self) -> None:
        """Fresh weights, the same every time."""
        model = build.build_model(self.config, self.case.shape, self.case.classes).to(self.device)
        if self.device.type == "cuda":
            model = model.to(memory_format=torch.channels_last)
        self.model = model.train()
        self.objective: Objective = build.build_objective(self.config, self.counts.to(self.device))
        self.twin_model = copy.deepcopy(self.model)
        self.flat = FlatParameters(model.parameters())
        self.forward: Forward = build.build_forward(self.config, model, self.objective, self.device, told)
        self.step = self.make_step(self.rule)
        if self.config.preserve.gkp:
            self.step.update.anchor = Anchor(torch.rand_like(self.flat.data), self.flat.data.clone())
            self.step.update.strength.fill_(0.1)

    def make_step(self, rule: Rule | None) -> TrainStep:
        """A step by `rule` on this model."""
        update = Update(self.flat, momentum=0.9, weight_decay=5e-4)
        update.lr.fill_(LR)
        capture = None
        if self.mode == "recorded":
            capture = build.build_capture(self.config.with_(capture="on"), None, self.device, Ranks(), told)
        member = None if rule is None else self.membership
        buffers = FlatBuffers(self.model)
        return TrainStep(
            self.model, self.objective, self.flat, buffers, update, rule, member, forward=self.forward, capture=capture
        )

    def ours(self) -> None:
        """One step."""
        self.step(self.batch)

    def bare(self) -> None:
        """Forward and backward of the plain loss, and nothing else."""
        x = torch.cat(self.batch.views)
        x = x.contiguous(memory_format=torch.channels_last) if x.is_cuda else x
        losses, shares, *_ = self.forward.losses(x, self.batch.labels, self.membership)
        torch.autograd.grad((losses * shares).sum(), self.flat.params, allow_unused=True)

    def twin(self) -> Callable[[], None]:
        """The same method in plain PyTorch, one step a call."""
        model, objective, member = self.twin_model, self.objective, self.membership
        forward, rule, batch = Forward(model, objective, self.forward.autocast), self.rule, self.batch
        params = list(model.parameters())
        base = torch.optim.SGD(params, LR, momentum=0.9, weight_decay=5e-4)
        counts = (member.T.cpu() @ self.counts.float()).tolist()
        averages: dict[str, Any] = {}

        def closure() -> tuple[Tensor, Tensor]:
            losses, shares, *_ = forward.losses(torch.cat(batch.views), batch.labels, member)
            return losses, shares

        def plain() -> Tensor:
            losses, shares = closure()
            return (losses * shares).sum()

        def step() -> None:
            if rule is None:
                base.zero_grad()
                plain().backward()
                base.step()
            elif rule.groups == "one":
                reference.sam_step(base, params, plain, rule.rho or 0.05, rule.adaptive)
            else:
                chosen = params if rule.scope == "all" else [model.classifier.weight]
                reference.gsa_step(
                    base, chosen, closure, counts, averages, rule.direction, rule.objective, rule.radius_C,
                    rule.rho_min, rule.rho_max, rule.adaptive, rule.aggregate, rule.sigma, rule.lmbda,
                )  # fmt: skip

        return step


def pictures(case: Case, device: torch.device) -> tuple[Callable[[], Batch], Batch]:
    """(makes the views of a batch as in training, a batch); every class, so every group, occurs in it."""
    torch.manual_seed(0)
    channels, side, _ = case.shape
    labels = torch.arange(case.batch) % case.classes
    if side > 64:
        views = tuple(torch.randn(case.batch, *case.shape, device=device) for _ in range(3))
        batch = Batch(views, labels.to(device), torch.arange(case.batch, device=device))
        return lambda: batch, batch
    images = torch.randint(0, 256, (case.batch, *case.shape), dtype=torch.uint8)
    names = tuple(str(c) for c in range(case.classes))
    splits = Splits({s: images for s in SPLITS}, {s: labels for s in SPLITS}, names)
    mean, std = (0.5,) * channels, (0.25,) * channels
    views_of = recipe("cifar" if channels == 3 else "digits", 3, mean=mean, std=std, size=side)
    source = SmallSource(splits, views=views_of, plain=Plain(mean, std), batch=case.batch, device=device)
    index, key = source.epoch_indices(0)[0], source.epoch_key(0)
    return lambda: source.make_batch(index, key), source.make_batch(index, key)
