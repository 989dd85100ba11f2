"""Recipes: one function per dataset, one line per method. Figures are those of the released codes where nothing else is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ltfast.config import FIELDS, Config, nearest
from ltfast.errors import UserError

if TYPE_CHECKING:
    from ltfast.optim.rules import Rule

Values = dict[str, Any]


def digits() -> Values:
    """scikit-learn's 8x8 digits, long-tailed: the embedded default, sized for two CPU cores and two minutes."""
    return {
        "model": "resnet8", "batch": 64, "epochs": 60, "lr": 0.1, "schedule": "cosine", "warmup": 3.0, "weight_decay": 5e-4,
        "a_ce": 1.0, "a_scl": 0.35, "temperature": 0.1, "projection_hidden": 128, "projection_out": 64, "groups": 4,
        "val_per_class": 10, "fisher_budget": 128,
    }  # fmt: skip


def cifar() -> Values:
    """CIFAR-10/100-LT: BCL's recipe, ResNet-32, 200 epochs."""
    return {
        "model": "resnet32", "batch": 256, "epochs": 200, "lr": 0.15, "schedule": "multistep", "warmup": 5.0,
        "weight_decay": 5e-4, "a_ce": 2.0, "a_scl": 0.6, "temperature": 0.1, "projection_hidden": 512, "projection_out": 128,
    }  # fmt: skip


def imagenet() -> Values:
    """ImageNet-LT: ResNet-50, 90 epochs, cosine."""
    return {
        "model": "resnet50", "batch": 256, "epochs": 90, "lr": 0.1, "schedule": "cosine", "warmup": 0.0, "weight_decay": 5e-4,
        "a_ce": 1.0, "a_scl": 0.35, "temperature": 0.07, "projection_hidden": 2048, "projection_out": 1024,
    }  # fmt: skip


def inat() -> Values:
    """iNaturalist 2018: ResNet-50, 100 epochs, lr 0.2, weight decay 1e-4."""
    return {**imagenet(), "epochs": 100, "lr": 0.2, "weight_decay": 1e-4}


def places() -> Values:
    """Places-LT: ResNet-152 from ImageNet weights (`--weights`), 30 epochs; lr 0.02 cosine is our choice, the papers state none."""
    return {**imagenet(), "model": "resnet152", "epochs": 30, "lr": 0.02}


def cifar10_speedrun() -> Values:
    """CIFAR-10-LT, ratio 100, on one GPU in the shortest time to the accuracy that the released code reaches after 200 epochs.

    Not tuned on a GPU, and the released code's accuracy is not known yet. One view and logit adjustment (most of the gain on
    digits-lt came from it, and a third of BCL's pictures); the mean over both sides of a picture, which gains on pictures of
    half size; AutoAugment and cutout, worth about four points at two seeds (docs/findings.md). Guesses: batches of 128, a
    network four times as wide and half as deep as ResNet-32 (large products, few launches); Nesterov, a short warm-up, cosine
    to 0.
    The rules are cifar10-airbench's: only the training split is used, and the clock starts after an untimed warm-up.
    """
    return {
        "model": "resnet14-w64", "batch": 128, "epochs": 100, "lr": 0.1, "schedule": "cosine", "warmup": 5.0,
        "nesterov": True, "weight_decay": 5e-4, "views": "cifar", "val_per_class": 0, "untimed_steps": 8, "table": True, "tta": "flip",
        "checkpoint_every": 1_000_000, "tensorboard": False,
    }  # fmt: skip


def fine_tuning() -> Values:
    """From published weights, for a few thousand pictures or fewer: small batches, so that an epoch has steps, and a low rate.

    ASAM takes twice the time of a plain step, and gains on CIFAR's pictures, where plain descent does not with that time; on
    plankton it does not (docs/findings.md). The rate is the largest tried that did not undo what the weights had learned; on
    other pictures try it first.
    """
    return {"weights": "DEFAULT", "batch": 32, "epochs": 40, "lr": 0.005, "schedule": "cosine", "warmup": 3.0}


RECIPES: dict[str, Callable[[], Values]] = {
    "digits-lt": digits, "cifar10-lt": cifar, "cifar100-lt": cifar, "folder-small": cifar, "imagenet-lt": imagenet, "inat18": inat,
    "places-lt": places, "folder": imagenet, "list": imagenet, "webdataset": imagenet,
}  # fmt: skip

# Recipes that are asked for by name (--recipe): data set, method, values.
NAMED: dict[str, tuple[str, str, Callable[[], Values]]] = {
    "cifar10-lt-speedrun": ("cifar10-lt", "balanced-softmax", cifar10_speedrun),
    "fine-tune": ("folder", "balanced-softmax+asam", fine_tuning),
}

# Options of [data] that other data sets than these would not read.
CIFAR = ("cifar10-lt", "cifar100-lt")
LISTED = ("imagenet-lt", "inat18", "places-lt", "list")
FILES = (*LISTED, "folder", "webdataset")
READ_BY: dict[str, tuple[str, ...]] = {
    "data_dir": (*FILES, "folder-small", *CIFAR), "train_list": LISTED, "val_list": (*LISTED, "webdataset"),
    "test_list": (*LISTED, "webdataset"), "exclude_list": FILES, "image_size": (*FILES, "folder-small"), "download": CIFAR,
    **dict.fromkeys(("on_bad_image", "loader", "workers"), FILES),
}  # fmt: skip

# Parts that a method name joins with "+": a base loss, at most one sharpness rule, gkp.
BASES: dict[str, tuple[Values, str]] = {
    "ce": ({"loss": "ce"}, "plain cross-entropy on one view: the baseline"),
    "balanced-softmax": (
        {"loss": "balanced-softmax"},
        "logits + log prior, one view (Ren et al. 2020; Menon et al. 2021)",
    ),
    "bcl": ({"loss": "bcl"}, "balanced contrastive learning, three views (Zhu et al., CVPR 2022)"),
}
SHARPNESS_SOURCES: dict[str, str] = {
    "sam": "sharpness-aware minimisation (Foret et al. 2021)",
    "asam": "adaptive SAM (Kwon et al. 2021)",
    "friendly-sam": "SAM whose direction excludes the gradient's moving average (Li et al., CVPR 2024)",
    "imbsam": "SAM for the loss of the tail classes only (Zhou et al., ICCV 2023)",
    "cc-sam": "one radius per class, classifier only (Zhou et al., CVPR 2023)",
    "focal-sam": "ascent weighted by (1 - prior)^gamma (Li et al., ICML 2025)",
    "gsa-paper": "GSA as in the paper: orthogonal, per group, classifier only (Chen et al., CVPR 2026)",
    "gsa-full": "GSA on all parameters, one shared perturbation, Gram matrix every 16 steps",
    "gsa-exact": "the same with exact group gradients at every step",
    "gsa-release": "GSA as in the released code: adaptive, moving-average direction, shared, all parameters",
}
ALIASES: dict[str, str] = {
    "logit-adjustment": "balanced-softmax",
    # On all parameters; the default, gsa-paper+gkp, costs half as much a step and is as accurate (docs/findings.md).
    "gkp-gsa": "gsa-full+gkp",
}


def method_values(name: str) -> Values:
    """Config fields of a method such as `ce`, `bcl+sam`, `gsa-paper` (base bcl) or `balanced-softmax+gsa-full+gkp`.

    Raises:
        UserError: a part is unknown, or two parts exclude each other.
    """
    values: Values = {"loss": "bcl", "sharpness": "none", "gkp": False}
    seen: set[str] = set()
    parts = [word for part in name.split("+") for word in (ALIASES[part].split("+") if part in ALIASES else [part])]
    for part in parts:
        if part in BASES:
            kind, new = "base loss", BASES[part][0]
        elif part in SHARPNESS_SOURCES:
            kind, new = "sharpness rule", {"sharpness": part}
        elif part == "gkp":
            kind, new = "gkp", {"gkp": True}
        else:
            known = [*BASES, *SHARPNESS_SOURCES, *ALIASES, "gkp"]
            raise UserError(f"--method {name}: unknown part {part!r}{nearest(part, known)}; see `ltfast methods`")
        if kind in seen:
            raise UserError(f"--method {name}: names more than one {kind}; keep one")
        seen.add(kind)
        values |= new
    return values


def named_recipe(name: str) -> tuple[str, str, Values]:
    """(data set, method, values) of a recipe of NAMED.

    Raises:
        UserError: there is none of that name.
    """
    if name not in NAMED:
        raise UserError(f"--recipe {name}: unknown{nearest(name, NAMED)}; there is {', '.join(NAMED)}")
    dataset, method, values = NAMED[name]
    return dataset, method, values()


def build_config(dataset: str, method: str, file_values: Mapping[str, Any], flags: Mapping[str, Any]) -> Config:
    """Defaults < recipe < method < config file < flags.

    Raises:
        UserError: unknown data set or method, a value that does not fit, or an option that does nothing here.
    """
    if dataset not in RECIPES:
        raise UserError(f"--dataset {dataset}: unknown{nearest(dataset, RECIPES)}; see `ltfast datasets`")
    layers = {**RECIPES[dataset](), **method_values(method), **file_values, **flags, "dataset": dataset}
    if layers.get("weights") in ("", "none"):
        layers["weights"] = None
    config = Config().with_(**layers)
    given = {name: getattr(config.data, name) for name in READ_BY}
    refuse_unread(dataset, {name: value for name, value in given.items() if value != FIELDS[name][1].default})
    if config.optim.nesterov and config.optim.optimizer == "sgd" and config.optim.momentum == 0:
        raise UserError("nesterov=True: it needs momentum; set --momentum above 0 or leave --nesterov out")
    if config.model.imprint == "on" and config.model.classifier != "cosine":
        raise UserError(
            "imprint='on': only a cosine classifier can begin at mean features; leave --imprint or --classifier out"
        )
    if config.preserve.gkp and config.preserve.groups == 1:
        raise UserError(
            "groups=1: GKP holds each group by the anchors of the others, and of one group there are none; use at least 2, "
            "or a method without gkp"
        )
    return dataclasses.replace(config, method=method_name(method, config))


def method_name(method: str, config: Config) -> str:
    """`method`, or what the config has become of it by --loss, --sharpness and --gkp."""
    values = {"loss": config.loss.loss, "sharpness": config.sharpness.sharpness, "gkp": config.preserve.gkp}
    if values == method_values(method):
        return method
    parts = [config.loss.loss, *([config.sharpness.sharpness] if values["sharpness"] != "none" else [])]
    return "+".join([*parts, "gkp"] if config.preserve.gkp else parts)


def refuse_unread(dataset: str, given: Mapping[str, Any]) -> None:
    """UserError for a value of `given` (None: not given) that data set `dataset` would not look at."""
    for name, datasets in READ_BY.items():
        if given.get(name) is not None and dataset not in datasets:
            raise UserError(
                f"{name}={given[name]!r}: {dataset} does not read it (only {', '.join(datasets)}); "
                "leave it out or choose another --dataset"
            )


def rule_of(config: Config) -> Rule | None:
    """The sharpness rule of a config with its overrides, or None for plain descent."""
    from ltfast.optim.rules import RULES, Rule

    sharp = config.sharpness
    if sharp.sharpness == "none":
        return None
    if sharp.sharpness not in RULES:
        raise UserError(
            f"sharpness={sharp.sharpness!r}: unknown{nearest(sharp.sharpness, RULES)}; see `ltfast methods`"
        )
    names = {f.name for f in dataclasses.fields(Rule)}
    overrides = {k: v for k, v in dataclasses.asdict(sharp).items() if k in names and v is not None}
    try:
        rule = dataclasses.replace(RULES[sharp.sharpness], **overrides)
    except ValueError as error:
        raise UserError(str(error)) from None
    if rule.groups == "bank" and config.preserve.groups == 1 and not config.preserve.gkp:
        rule = dataclasses.replace(rule, groups="one")  # nothing to find out: no bank, no scouting
    if rule.scope == "classifier" and rule.direction == "friendly":
        raise UserError("direction=friendly keeps a moving average of full gradients: use scope=all with it")
    saving = rule.ascent_every > 1 or rule.partial
    if saving and (rule.scope, rule.objective, rule.split) != ("all", "shared", False):
        raise UserError(
            f"{sharp.sharpness}: ascent_every, ascent_views and ascent_fraction need one perturbation of all parameters "
            "for the whole batch; use sam, gsa-full, gsa-exact or gsa-release"
        )
    if rule.split and (rule.scope, rule.objective) != ("all", "shared"):
        raise UserError(f"{sharp.sharpness}: only scope=all and objective=shared exist for it")
    return rule


def reads_groups(config: Config) -> bool:
    """Whether the number of groups makes a difference to the method."""
    return config.preserve.gkp or config.sharpness.sharpness.startswith("gsa")


def needs_groups(config: Config, rule: Rule | None) -> bool:
    """Whether GKP or the rule wants the groups of the memory bank."""
    return config.preserve.gkp or (rule is not None and rule.groups == "bank")
