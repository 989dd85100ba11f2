"""`--dry-run`: what a run will do and need, before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ltfast import build
from ltfast.config import Config
from ltfast.data.base import split_note
from ltfast.data.large_source import LargeSource
from ltfast.data.paths import missing_indices
from ltfast.data.registry import LARGE
from ltfast.data.sampler import check_batch
from ltfast.dist import Ranks
from ltfast.flat import FlatParameters
from ltfast.launch import process_count
from ltfast.memory import activations
from ltfast.optim.rules import Rule
from ltfast.preserve.bank import check_state
from ltfast.progress import counted
from ltfast.recipes import needs_groups, rule_of
from ltfast.resume import load_bank
from ltfast.runs import RunFolder
from ltfast.schedule import scouting_epochs, warm_up_note

FLOAT = 4
GIB = 1 << 30


def flops_ratio(rule: Rule | None, n_groups: int, views: int = 3) -> float:
    """FLOPs of a step over those of an SGD step on the same batch of `views` views, backward counted as two forwards.

    E: 1 forward and G backwards, then 1 + 1: (1 + 2G)/3 + 1. R: 2 + (E - 2)/gram_every. Classifier scope: about 1.
    Per group on all parameters: (1 + 2G)/3 + G. An ascent every k-th step, on v of the views and a part f of the samples
    costs its share times f v / (k views).
    """
    if rule is None or rule.scope == "classifier":
        return 1.0
    first = (1 + 2 * n_groups) / 3
    if rule.objective == "per_group":
        return first + n_groups
    first = 1 + (first - 1) / rule.gram_every
    seen = rule.ascent_fraction / (views if rule.ascent_views else 1)
    return 1 + first * seen / rule.ascent_every


def gradient_rows(rule: Rule | None, n_groups: int) -> int:
    """Rows of the gradient buffer: one per group, twice that with moving averages, one more for a per-group objective."""
    if rule is None or rule.scope == "classifier":
        return 1
    return rule.rows(n_groups) + (rule.objective == "per_group")


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; memory in bytes."""

    train_images: int
    classes: int
    steps_per_epoch: int
    steps: int
    scouting_epochs: int
    parameters: int
    encoder_parameters: int
    groups: int
    """Of the ascent, 1 without one."""
    bank_groups: int
    """Of the memory bank; 0 where nothing needs them."""
    flops_vs_sgd: float
    scouting_flops: float
    """FLOPs of a scouting step over those of an SGD step."""
    state_bytes: int
    """Of one process: weights, gradient rows, optimizer state, copies."""
    activation_bytes: float | None
    """What autograd keeps of one process's images, in float32 without torch.compile; None for small pictures."""
    bank_bytes_max: int
    processes: int
    images_a_process: int
    """Images of a step in each process."""
    missing: str
    """The first training picture that is not there, or ''."""
    splits: str
    """See base.split_note."""


def ascent_groups(config: Config, classes: int) -> int:
    """Groups of the ascent; those of GKP are always the bank's."""
    rule = rule_of(config)
    kinds = {"bank": config.preserve.groups, "class": classes, "head-tail": 2, "focal": 2}
    return kinds.get(rule.groups, 1) if rule else 1


def predicted_flops(config: Config, classes: int) -> float:
    """FLOPs of the method's step over those of a plain one with the same loss."""
    return flops_ratio(rule_of(config), ascent_groups(config, classes), config.loss.n_views)


def scouting_flops(config: Config, classes: int) -> float:
    """The same of a scouting step: plain descent where the rule waits for the bank's groups, else the method's own step."""
    rule = rule_of(config)
    return 1.0 if rule is None or rule.groups == "bank" else predicted_flops(config, classes)


def make_plan(config: Config, resumed: bool = False) -> Plan:
    """The plan of a config; reads the data set's lists, builds the model on the CPU, trains nothing, downloads no weights.

    Pictures of a large set need not be there yet. resumed: a bank that the run began with is not read again.
    """
    rule = rule_of(config)
    large = config.data.dataset in LARGE
    source = build.build_data(config.with_(loader="synthetic") if large else config, torch.device("cpu"), Ranks())
    config = build.fitting(config, source.num_classes)
    processes = planned_processes(config)
    check_batch(config.data.batch, source.sizes["train"], processes, config.data.dataset)
    model = build.build_model(config, source.input_shape, source.num_classes, fetch=False)
    build.build_membership(config, rule, source.train_counts, None)  # refuses what training would refuse
    flat = FlatParameters(model.parameters())
    banked = needs_groups(config, rule)
    groups = ascent_groups(config, source.num_classes)
    rows = gradient_rows(rule, groups)
    slots = 1 if config.optim.optimizer == "sgd" else 2
    kept = rule is not None and rule.scope == "all"
    anchor = 2 if config.preserve.gkp else 0
    scouts = scouting_epochs(config.preserve, config.optim.epochs) if banked else 0
    span = flat.span(model.encoder.parameters())
    snapshots = scouts if not config.preserve.regroup else config.optim.epochs
    if config.preserve.bank and not resumed:
        bank = load_bank(Path(config.preserve.bank), source.class_names, config.preserve.center)
        check_state(bank, source.num_classes, span.stop - span.start)
        snapshots += len(bank["epochs"])
    kept_images = None
    if large:
        need = activations(model, build.build_objective(config, source.train_counts), source.input_shape)
        kept_images = need.at(config.data.batch // processes)
    return Plan(
        train_images=source.sizes["train"],
        classes=source.num_classes,
        steps_per_epoch=source.steps_per_epoch,
        steps=source.steps_per_epoch * config.optim.epochs,
        scouting_epochs=scouts,
        parameters=flat.numel,
        encoder_parameters=sum(p.numel() for p in model.encoder.parameters()),
        groups=groups,
        bank_groups=config.preserve.groups if banked else 0,
        flops_vs_sgd=predicted_flops(config, source.num_classes),
        scouting_flops=scouting_flops(config, source.num_classes),
        state_bytes=FLOAT * flat.size * (1 + rows + slots + kept + anchor),
        activation_bytes=kept_images,
        bank_bytes_max=FLOAT * (span.stop - span.start) * min(source.num_classes, snapshots) if banked else 0,
        processes=processes,
        images_a_process=config.data.batch // processes,
        missing=first_missing(source) if isinstance(source, LargeSource) else "",
        splits=split_note(source.sizes, source.test_from, source.lacking, source.num_classes),
    )


def planned_processes(config: Config) -> int:
    """Those asked for, whatever there is here; by default those that the run would start on this machine."""
    asked = max(config.run.gpus, config.run.procs)
    return asked if asked > 0 else process_count(config)


def first_missing(source: LargeSource) -> str:
    """The first training picture of a large set that is not below its folder, or ''."""
    train = source.lists["train"]
    found = missing_indices(train.root, train.paths, limit=1) if train.loose else []
    return train.file(found[0]) if found else ""


def flops_of_run(plan: Plan, epochs: int) -> float:
    """FLOPs of the whole run over those of SGD on the same batches."""
    return (plan.scouting_epochs * plan.scouting_flops + (epochs - plan.scouting_epochs) * plan.flops_vs_sgd) / epochs


def print_plan(config: Config, resumed: bool = False) -> None:
    """Print the plan for a person.

    Raises:
        UserError: training would refuse to start; `resumed`: it goes on in the folder --out.
    """
    if config.run.out and not resumed:
        RunFolder(Path(config.run.out)).check_free()
    plan, optim = make_plan(config, resumed), config.optim
    epochs, steps = counted(config.optim.epochs, "epoch"), counted(plan.steps_per_epoch, "step")
    scouts = plan.scouting_epochs
    groups = f"{plan.bank_groups or plan.groups}"
    if plan.bank_groups and 1 < plan.groups != plan.bank_groups:
        groups += f" of GKP, {plan.groups} of the ascent"
    lines = {
        "method": f"{config.method} on {config.model.model}",
        "data": f"{config.data.dataset}, {plan.train_images:,} training images, {plan.classes:,} classes",
        "steps": f"{epochs} x {steps} of {counted(config.data.batch, 'image')} = {plan.steps:,}"
        + (f"; the first {scouts} epochs scout" if scouts > 1 else "; the first epoch scouts" if scouts else ""),
        "descent": f"{optim.optimizer}, lr {optim.lr:g}, {optim.schedule} schedule, warm-up {optim.warmup:g} epochs, "
        f"weight decay {optim.weight_decay:g}",
        "weights": (config.model.weights or "random")
        + (", the classifier at the mean features of its classes" if config.model.imprints else ""),
        "processes": f"{plan.processes}, each {counted(plan.images_a_process, 'image')} a step",
        "parameters": f"{plan.parameters:,} ({plan.encoder_parameters:,} in the encoder)",
        "groups": groups,
        "FLOPs a step": f"{plan.flops_vs_sgd:.2f} x an SGD step on the same batch"
        + (
            f" (after scouting; {flops_of_run(plan, config.optim.epochs):.2f} x over the run)"
            if scouts and plan.scouting_flops != plan.flops_vs_sgd
            else ""
        ),
        "memory": f"{plan.state_bytes / GIB:.3f} GiB a process for weights, gradients, optimizer state and anchor"
        + (
            " (without activations)"
            if plan.activation_bytes is None
            else f"; about {plan.activation_bytes / GIB:.1f} GiB for activations in float32, half of it in bf16"
        ),
        "memory bank": f"at most {plan.bank_bytes_max / GIB:.3f} GiB of host memory",
    }
    if note := warm_up_note(optim):
        lines["warm-up"] = note
    if plan.splits:
        lines["splits"] = plan.splits
    if plan.missing:
        lines["pictures"] = f"not all there: {plan.missing} is missing; see `ltfast data check`"
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")
