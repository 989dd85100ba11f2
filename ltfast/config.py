"""Configuration: frozen dataclasses, one help line a field; TOML files and command-line flags share the same names.

A run is decided in this order, later wins: defaults < recipe of the dataset < method < config file < flags.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ltfast.errors import UserError, closest

# Bounds of a number, in the words of the error. Options that bound each other are compared where they are used.
LIMITS = {
    "least": (operator.ge, "at least"), "above": (operator.gt, "more than"),
    "most": (operator.le, "at most"), "below": (operator.lt, "less than"),
}  # fmt: skip
SEED_MAX = 2**32 - 1  # numpy's and torch's generators take more, but not the products made of it
DEVICES = r"auto|cpu|cuda(:\d+)?"
DEFAULT_DATASET, DEFAULT_METHOD = "digits-lt", "gsa-paper+gkp"


def _opt(default: Any, text: str, *, paper: str = "", choices: tuple[str, ...] = (), **limits: float) -> Any:
    return field(default=default, metadata={"help": text, "paper": paper, "choices": choices, "limits": limits})


@dataclass(frozen=True)
class Data:
    """What to train on."""

    dataset: str = _opt(DEFAULT_DATASET, "dataset name (see `ltfast datasets`)")
    data_dir: str | None = _opt(None, "folder, .npz pack, list root or shard pattern of the dataset")
    imbalance: float | None = _opt(
        None,
        "ratio of the largest to the smallest class after thinning; 1 = balanced (large folders, lists, shards: left as they are); "
        "default 100 for digits and CIFAR",
        paper="100",
        least=1,
    )
    imbalance_type: str = _opt("exp", "shape of the long tail", choices=("exp", "step"))
    limit_train: int = _opt(0, "keep this many training images, class proportions kept; 0 = all", least=0)
    val_per_class: int = _opt(
        0,
        "images per class held out of train to choose the best checkpoint; 0 = the set's own validation split, if any",
        least=0,
    )
    sampler: str = _opt(
        "instance",
        "order of training images",
        choices=("instance", "class-balanced", "sqrt", "progressive", "group-stratified"),
        paper="instance",
    )
    batch: int = _opt(256, "global batch size (over all processes)", paper="256", least=1)
    views: str = _opt(
        "auto",
        "augmentation recipe; auto = the dataset's own; crop = crop and flip only; imagenet: large pictures; the others: small ones",
        choices=("auto", "digits", "cifar", "plain", "imagenet", "crop"),
    )
    image_size: int | None = _opt(
        None, "side of pictures in pixels; default 224, folder-small the first one's", paper="224", least=1
    )
    loader: str = _opt(
        "auto",
        "input pipeline of large images; synthetic = generated pictures, no file is read",
        choices=("auto", "dali", "torch", "synthetic"),
    )
    workers: int = _opt(-1, "loader threads or workers of each process; -1 = its share of the cores", least=-1)
    on_bad_image: str = _opt(
        "auto",
        "unreadable images; skip = replace in training, leave out elsewhere; fail = end the run; auto = replace in training, else fail",
        choices=("auto", "skip", "fail"),
    )
    train_list: str | None = _opt(
        None, "list of training images: '<relative path> <label>' lines, CSV, TSV or COCO's JSON"
    )
    val_list: str | None = _opt(None, "list of validation images, or a pattern of shards")
    test_list: str | None = _opt(None, "list of test images, or a pattern of shards")
    exclude_list: str | None = _opt(None, "bad files to leave out, as written by `ltfast data check --bad-list`")
    download: bool = _opt(False, "allow torchvision to download CIFAR when it is missing")


def flag(name: str) -> str:
    """The command line's word for a field."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Model:
    """The network."""

    model: str = _opt(
        "resnet32",
        "encoder: resnet8|resnet20|resnet32... (CIFAR style, resnet8-w32 twice as wide), a torchvision classifier, or timm/NAME",
        paper="resnet32",
    )
    classifier: str = _opt("cosine", "classifier layer", choices=("cosine", "linear"), paper="cosine")
    scale: float = _opt(30.0, "scale of the cosine classifier", paper="30", above=0)
    projection_hidden: int = _opt(512, "hidden width of the projection heads", paper="512 (CIFAR), 2048", least=1)
    projection_out: int = _opt(128, "output width of the projection heads", paper="128 (CIFAR), 1024", least=1)
    weights: str | None = _opt(
        None,
        "start from these encoder weights: a file, or DEFAULT = torchvision's or timm's for this model; none = random, in any recipe",
    )
    imprint: str = _opt(
        "auto",
        "begin the cosine classifier at the mean features of its classes (weight imprinting); auto = with --weights",
        choices=("auto", "on", "off"),
        paper="off",
    )

    @property
    def imprints(self) -> bool:
        """Whether the classifier begins at mean features rather than at random."""
        return self.imprint == "on" or (self.imprint == "auto" and bool(self.weights) and self.classifier == "cosine")


@dataclass(frozen=True)
class Loss:
    """The base loss."""

    loss: str = _opt("bcl", "base loss", choices=("ce", "balanced-softmax", "bcl"), paper="bcl")
    a_ce: float = _opt(1.0, "weight of the classification term of bcl", paper="2.0 (CIFAR), 1.0", least=0)
    a_scl: float = _opt(0.35, "weight of the contrastive term of bcl", paper="0.6 (CIFAR), 0.35", least=0)
    temperature: float = _opt(0.07, "temperature of the contrastive term", paper="0.1 (CIFAR), 0.07", above=0)
    tau: float = _opt(1.0, "strength of the log prior in balanced softmax", paper="1.0", least=0)

    @property
    def n_views(self) -> int:
        """Views of a picture that the loss looks at."""
        return 3 if self.loss == "bcl" else 1


@dataclass(frozen=True)
class Sharpness:
    """Sharpness-aware minimisation (GSA and its relatives)."""

    sharpness: str = _opt("none", "rule (see `ltfast methods`); none = plain descent")
    direction: str | None = _opt(
        None,
        "override: the part of its gradient that a group climbs along",
        choices=("joint", "none", "orthogonal", "projected", "friendly"),
        paper="orthogonal",
    )
    objective: str | None = _opt(
        None,
        "override: one perturbation for all groups, or each its own",
        choices=("shared", "per_group"),
        paper="per_group",
    )
    scope: str | None = _opt(
        None, "override: which parameters are perturbed", choices=("all", "classifier"), paper="classifier"
    )
    adaptive: bool | None = _opt(None, "override: scale perturbations by |theta|", paper="true")
    rho: float | None = _opt(None, "override: fixed radius instead of Eq. 13", least=0)
    radius_C: float | None = _opt(None, "override: C of Eq. 13", paper="0.1", least=0)
    rho_min: float | None = _opt(None, "override: lower clip of the radius", paper="2e-3", least=0)
    rho_max: float | None = _opt(None, "override: upper clip of the radius", paper="3e-3", least=0)
    sigma: float | None = _opt(
        None, "override: strength of the moving average removed by `friendly`", paper="1", least=0
    )
    lmbda: float | None = _opt(
        None, "override: decay of the moving average of `friendly`", paper="0.9", least=0, most=1
    )
    aggregate: str | None = _opt(
        None,
        "override: how a shared perturbation averages the groups: all alike, or by their shares of the batch",
        choices=("uniform", "share"),
    )
    gram_every: int | None = _opt(None, "override: steps between exact group gradients; 1 = every step", least=1)
    gram_ema: float | None = _opt(None, "override: weight of the old Gram matrix at a refresh", least=0, below=1)
    ascent_every: int | None = _opt(
        None, "inexact, faster: climb every k-th step only, reuse the perturbation between", least=1
    )
    ascent_views: int | None = _opt(
        None, "inexact, faster: 1 = climb on the classification view alone; 0 = all views", least=0, most=1
    )
    ascent_fraction: float | None = _opt(
        None, "inexact, faster: share of the batch that the ascent sees", above=0, most=1
    )
    tail_below: int = _opt(20, "imbsam: classes with fewer training images than this are tail", least=0)
    focal_gamma: float = _opt(1.0, "focal-sam: t_c = focal_strength * (1 - pi_c) ** focal_gamma", least=0)
    focal_strength: float = _opt(0.5, "focal-sam: see focal_gamma", least=0, most=1)


@dataclass(frozen=True)
class Preserve:
    """Memory bank, grouping and grouped knowledge preservation (GKP)."""

    gkp: bool = _opt(False, "add the GKP anchor", paper="true")
    groups: int = _opt(4, "number of class groups G", paper="4", least=1)
    scout: float = _opt(
        0.8,
        "share of the epochs that only fill the bank: GKP, and GSA with its groups, begin afterwards",
        least=0,
        most=1,
    )
    regroup: int = _opt(0, "epochs between regroupings; 0 = once, after scouting", paper="0", least=0)
    center: bool = _opt(False, "subtract the initial weights before comparing snapshots", paper="false")
    lambda_q: float = _opt(1.0, "weight of log V in feature quality", paper="1")
    gkp_lambda: float | None = _opt(
        None,
        "strength lambda of GKP; default 10, of fewer than 1,000 classes a hundredth of their number (not with --gkp-normalise "
        "samples)",
        paper="10",
        least=0,
    )
    gkp_normalise: str = _opt(
        "classes",
        "divide a group's term by its number of classes or of training images",
        choices=("classes", "samples"),
        paper="classes",
    )
    fisher: str = _opt(
        "per-sample",
        "Fisher information from squares of per-sample gradients, or of batch means (as released)",
        choices=("per-sample", "batch"),
    )
    fisher_budget: int = _opt(512, "training images per group for its Fisher information", least=1)
    alpha_start: float = _opt(
        0.9, "weight of GSA against GKP at the start (cosine schedule)", paper="0.9", least=0, most=1
    )
    alpha_end: float = _opt(0.8, "weight of GSA against GKP at the end", paper="0.8", least=0, most=1)
    bank: str | None = _opt(None, "use the memory bank of this earlier run: classes are grouped before training")


@dataclass(frozen=True)
class Optim:
    """Descent."""

    epochs: int = _opt(200, "passes over the training images", paper="200 (CIFAR), 90, 100, 30", least=1)
    optimizer: str = _opt("sgd", "base optimizer", choices=("sgd", "adamw"), paper="sgd")
    lr: float = _opt(0.15, "peak learning rate", paper="0.15 (CIFAR), 0.1, 0.2", least=0)
    schedule: str = _opt(
        "multistep",
        "multistep: x0.1 at 80 % and 90 % of the epochs; cosine: to 0",
        choices=("multistep", "cosine", "constant"),
    )
    warmup: float = _opt(5.0, "epochs of linear warm-up", paper="5 (CIFAR), 0", least=0)
    momentum: float = _opt(0.9, "momentum of sgd, beta1 of adamw", paper="0.9", least=0, below=1)
    nesterov: bool = _opt(False, "Nesterov momentum", paper="false")
    weight_decay: float = _opt(5e-4, "weight decay", paper="5e-4 (iNaturalist 1e-4)", least=0)
    clip: float = _opt(
        0.0, "clip the norm of the loss gradient, before alpha and without GKP; 0 = off", paper="0", least=0
    )


@dataclass(frozen=True)
class Run:
    """Where and how it runs."""

    out: str | None = _opt(None, "run folder; default runs/<dataset>-<method>-s<seed>, numbered if taken")
    seed: int = _opt(0, "seed of weights, order and augmentation", paper="0", least=0, most=SEED_MAX)
    device: str = _opt("auto", "auto, cpu, cuda or cuda:N")
    precision: str = _opt(
        "auto",
        "auto = bf16 autocast on GPU (fp16 on those older than Ampere), fp32 on CPU",
        choices=("auto", "fp32", "tf32", "bf16", "fp16"),
    )
    compile: str = _opt("auto", "torch.compile forward and backward; auto = on GPU", choices=("auto", "on", "off"))
    capture: str = _opt(
        "auto", "record whole steps as CUDA graphs; auto = small pictures on one GPU", choices=("auto", "on", "off")
    )
    convolutions: str = _opt(
        "library",
        "3x3 convolutions of 16 and 32 channels in bf16 or fp16; kernel = ltfast's own (on a GPU: Ampere or newer)",
        choices=("library", "kernel"),
    )
    deterministic: bool = _opt(False, "bit-reproducible kernels")
    checkpoint_every: int = _opt(1, "epochs between checkpoints", least=1)
    checkpoint_minutes: float = _opt(15.0, "also checkpoint after this many minutes in mid-epoch; 0 = off", least=0)
    keep_checkpoints: int = _opt(2, "training states kept for --resume", least=1)
    max_hours: float = _opt(0.0, "stop cleanly, ready to resume, after this many hours; 0 = off", least=0)
    max_bad_steps: int = _opt(20, "stop after this many skipped (non-finite) steps in a row", least=1)
    tta: str = _opt(
        "none", "test-time augmentation; flip = mean logits of a picture and its mirror image", choices=("none", "flip")
    )
    tensorboard: bool = _opt(True, "write TensorBoard events")
    table: bool = _opt(
        False, "print one table row per epoch with the training seconds so far, as cifar10-airbench does"
    )
    untimed_steps: int = _opt(
        0, "warm-up steps, undone before the clock starts (compilation, tuning, CUDA graph recording)", least=0
    )
    gpus: int = _opt(
        -1, "GPUs of this machine, one process each; -1 = all for large data sets, else one; 0 = CPU", least=-1
    )
    procs: int = _opt(0, "processes on the CPU instead of GPUs; 0 = one process", least=0)
    max_restarts: int = _opt(
        3, "how many times all processes may restart from the last checkpoint after one has died", least=0
    )
    sync_bn: bool = _opt(False, "BatchNorm statistics over all processes; off = over each process's part of the batch")
    ascent: str = _opt(
        "local",
        "gradient of the ascent; local: of each process's part of the batch; global: of the whole batch",
        choices=("local", "global"),
    )


SECTIONS: dict[str, type] = {
    "data": Data, "model": Model, "loss": Loss, "sharpness": Sharpness, "preserve": Preserve, "optim": Optim, "run": Run,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Everything that decides a run; `method` records the name it was built from."""

    method: str = DEFAULT_METHOD
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    sharpness: Sharpness = field(default_factory=Sharpness)
    preserve: Preserve = field(default_factory=Preserve)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)

    def with_(self, **values: Any) -> Config:
        """A copy with these fields changed, each found by its (unique) name.

        Raises:
            UserError: unknown field (the nearest name is suggested), wrong type or a value outside choices or range.
        """
        changed: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section = section_of(name)
            changed.setdefault(section, {})[name] = check(name, value)
        parts = {s: dataclasses.replace(getattr(self, s), **v) for s, v in changed.items()}
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values without None (TOML has none); `from_dict` inverts it."""
        sections = {
            s: {k: v for k, v in dataclasses.asdict(getattr(self, s)).items() if v is not None} for s in SECTIONS
        }
        return {"method": self.method, **sections}

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str = "config") -> Config:
        """Build from the nested form of `to_dict`; see `flatten` for the errors."""
        return dataclasses.replace(
            Config().with_(**flatten(values, where)), method=str(values.get("method", DEFAULT_METHOD))
        )


FIELDS: dict[str, tuple[str, dataclasses.Field[Any]]] = {
    f.name: (section, f) for section, cls in SECTIONS.items() for f in dataclasses.fields(cls)
}
TYPES: dict[str, Any] = {name: hint for cls in SECTIONS.values() for name, hint in get_type_hints(cls).items()}


def nearest(name: str, known: Any) -> str:
    """' (did you mean X?)' or an empty string; X are all that go on from `name` by a hyphen, or the one most like it."""
    longer = [other for other in known if other.startswith(f"{name}-")]
    close = longer or [other for other in [closest(name, known)] if other]
    return f" (did you mean {', '.join(close[:-1])}{' or ' if close[1:] else ''}{close[-1]}?)" if close else ""


def section_of(name: str) -> str:
    """The section that holds field `name`."""
    if name not in FIELDS:
        raise UserError(f"unknown option {name!r}{nearest(name, FIELDS)}")
    return FIELDS[name][0]


def base_type(name: str) -> type:
    """The type of a field, Optional stripped."""
    hint = TYPES[name]
    return next((t for t in get_args(hint) if t is not type(None)), hint)


def check(name: str, value: Any) -> Any:
    """The value in the field's own type.

    Raises:
        UserError: it does not fit.
    """
    f, kind, optional = FIELDS[name][1], base_type(name), type(None) in get_args(TYPES[name])
    if value is None and optional:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r}: needs {kind.__name__}, got {type(value).__name__}")
    _check_range(name, value, **f.metadata)
    return value


def _check_range(name: str, value: Any, choices: tuple[str, ...], limits: Mapping[str, float], **_: Any) -> None:
    if choices and value not in choices:
        raise UserError(f"{name}={value!r}: choose from {', '.join(choices)}{nearest(str(value), choices)}")
    if name == "device" and not re.fullmatch(DEVICES, value):
        raise UserError(f"device={value!r}: use auto, cpu, cuda or cuda:N")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name}={value!r}: needs a finite number")
    if not all(LIMITS[word][0](value, limit) for word, limit in limits.items()):
        raise UserError(f"{name}={value!r}: use {' and '.join(f'{LIMITS[w][1]} {n}' for w, n in limits.items())}")


def flatten(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Nested TOML to flat fields.

    Raises:
        UserError: unknown section or key, a key in the wrong section or a value that does not fit, naming `where`.
    """
    flat: dict[str, Any] = {}
    for section, fields in values.items():
        if section == "method":
            if not isinstance(fields, str):
                raise UserError(f"{where}: method={fields!r}: needs the name of a method, see `ltfast methods`")
            continue
        if section not in SECTIONS:
            if isinstance(fields, Mapping):
                raise UserError(f"{where}: unknown section [{section}]{nearest(section, SECTIONS)}")
            if section not in FIELDS:  # nor a setting that stands above all sections
                raise UserError(f"{where}: unknown key {section}{nearest(section, FIELDS)}")
            raise UserError(f"{where}: {section} belongs in [{FIELDS[section][0]}]")
        if not isinstance(fields, Mapping):
            raise UserError(f"{where}: {section}={fields!r}: this is the name of a section, [{section}]")
        for name, value in fields.items():
            if name not in FIELDS:
                raise UserError(f"{where}: unknown key {section}.{name}{nearest(name, FIELDS)}")
            if FIELDS[name][0] != section:
                raise UserError(f"{where}: {name} belongs in [{FIELDS[name][0]}], not [{section}]")
            try:
                flat[name] = check(name, value)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    return flat


def load_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML config file.

    Raises:
        UserError: it is missing, cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a config file ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
