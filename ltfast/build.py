"""From a config to the objects of a run: device, data, model, objective, membership."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltfast.compiled import Compiler, Report, quiet
from ltfast.config import FIELDS, Config, check
from ltfast.data.base import Batch, Source
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.graph import Captured, CudaRecorder, Failure, Recorder
from ltfast.kernels.common import MAX_ROWS
from ltfast.launch import processes_here
from ltfast.losses import membership_for
from ltfast.models import LongTailModel, create_encoder
from ltfast.models.conv import use_own_kernels
from ltfast.models.registry import expected_levels, is_cifar_encoder, tries_a_picture
from ltfast.modes import evaluating
from ltfast.objective import Forward, Objective
from ltfast.optim.rules import Rule
from ltfast.recipes import reads_groups
from ltfast.reduce import Agreement
from ltfast.scaler import LossScale
from ltfast.step import Taken

MEMBERSHIP_KIND = {"one": "single", "class": "classes", "head-tail": "head-tail", "focal": "focal", "bank": "groups"}
# CC-SAM evaluates one perturbed classifier a class; above this many classes that is more work than the encoder.
CLASS_GROUPS_MAX = 128
AMPERE = (8, 0)  # compute capability, the first with bf16
TORCHVISION_SIDE = 224  # what its models are made for; each takes pictures of this size


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device of `--device NAME`; of a process that is shown one GPU alone (Slurm's --gpus-per-task 1), that one.

    Raises:
        UserError: no device is called so, or it is not there.
    """
    check("device", name)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if visible else "cpu"
    device = torch.device(f"cuda:{0 if visible == 1 else local_rank}" if name == "cuda" else name)
    if device.type == "cuda" and device.index >= visible:
        there = f"CUDA devices 0 to {visible - 1} are visible" if visible else "no CUDA device is visible"
        raise UserError(f"--device {name}: {there}; use {'one of them' if visible else '--device cpu'}")
    return device


def build_device(config: Config, ranks: Ranks) -> torch.device:
    """The device of this process, see `pick_device`; sets TF32 and determinism, and connects the GPUs of several processes.

    Raises:
        UserError: one GPU for several processes, which NCCL refuses.
    """
    if config.run.device.startswith("cuda:") and ranks.world > 1 and processes_here() > 1:
        raise UserError(
            f"--device {config.run.device}: several processes need a GPU each; use --device cuda, and the variable "
            "CUDA_VISIBLE_DEVICES to choose GPUs"
        )
    device = pick_device(config.run.device, ranks.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    tf32 = config.run.precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not config.run.deterministic
    torch.use_deterministic_algorithms(config.run.deterministic)
    if device.type == "cuda" and ranks.world > 1:
        if config.run.deterministic:  # torch does so itself where the mode is on before the processes join
            os.environ.setdefault("NCCL_ALGO", "^NVLS")
        ranks.sum_(torch.zeros(1, device=device))  # NCCL connects now: its errors come before the run's folder does
    return device


def lacks_bf16(device: torch.device) -> bool:
    """True on GPUs older than Ampere: torch emulates bf16 there, slower than float32, and Inductor refuses it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE


def pick_precision(config: Config, device: torch.device) -> str:
    """The run's precision, auto resolved."""
    if config.run.precision != "auto":
        return config.run.precision
    if device.type != "cuda":
        return "fp32"
    return "fp16" if lacks_bf16(device) else "bf16"


def check_convolutions(config: Config, device: torch.device) -> None:
    """UserError where training was to go through kernels that the device cannot run well."""
    if config.run.convolutions == "kernel" and lacks_bf16(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise UserError(
            f"--convolutions kernel: {device} has compute capability {major}.{minor}, the kernels need 8.0 (Ampere); "
            "use --convolutions library"
        )


def build_autocast(config: Config, device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """A factory of autocast contexts for the run's precision."""
    precision = pick_precision(config, device)
    if precision in ("fp32", "tf32"):
        return nullcontext
    return partial(torch.autocast, device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def build_scaler(config: Config, device: torch.device) -> LossScale | None:
    """The loss scale that fp16 needs; bf16 has float32's range and needs none."""
    return LossScale(device) if pick_precision(config, device) == "fp16" else None


def chosen(option: str, device: torch.device) -> bool:
    """auto|on|off -> yes or no: auto is on for CUDA. On the CPU compiling takes longer than it saves on small pictures."""
    return option == "on" or (option == "auto" and device.type == "cuda")


def build_forward(
    config: Config,
    model: LongTailModel,
    objective: Objective | None,
    device: torch.device,
    report: Report = quiet,
    ranks: Ranks | None = None,
) -> Forward:
    """The functions that a step and an evaluation (which needs no objective) call, compiled if the config says so."""
    wanted = chosen(config.run.compile, device)
    compiler = Compiler(model, report, agree=(ranks or Ranks()).complaint) if wanted else None
    return Forward(model, objective, build_autocast(config, device), compiler)


def build_capture(
    config: Config, source: Source, device: torch.device, ranks: Ranks, report: Report = quiet
) -> Callable[[Callable[..., Taken]], Captured] | None:
    """What turns a step into one that is recorded as CUDA graphs, or None.

    auto: for pictures that live on the device, alone in the run. Large pictures keep the device busy long enough for
    launches not to matter, and collectives are left out of graphs.

    Raises:
        UserError: recording was asked for where it cannot be.
    """
    if config.run.capture == "on" and (device.type != "cuda" or ranks.world > 1):
        raise UserError("--capture on: CUDA graphs need one process on a CUDA device; use --capture auto")
    small = hasattr(source, "make_batch")
    if ranks.world > 1 or not (config.run.capture == "on" or (small and chosen(config.run.capture, device))):
        return None
    failure = Failure()
    if small:
        record_batches(source, CudaRecorder(device), report, failure)
    # Recorded apart: a step that replaces another one, when groups appear, needs none of the old one's memory to be gone.
    return lambda take: Captured(take, "step", CudaRecorder(device), report, failure=failure)


def build_data(config: Config, device: torch.device, ranks: Ranks, trained: Sequence[str] | None = None) -> Source:
    """The data source of the run; its errors name the option to change. trained: see `ltfast.data.load`."""
    from ltfast.data import load
    from ltfast.data.registry import LARGE

    data = config.data
    large: dict[str, Any] = {
        "loader": data.loader, "workers": data.workers, "on_bad_image": data.on_bad_image,
        "train_list": data.train_list, "val_list": data.val_list, "test_list": data.test_list,
        "exclude_list": data.exclude_list,
    }  # fmt: skip
    source = load(
        data.dataset, data_dir=data.data_dir, imbalance=data.imbalance, imbalance_type=data.imbalance_type,
        limit_train=data.limit_train or None, val_per_class=data.val_per_class, batch=data.batch,
        views=None if data.views == "auto" else data.views, num_views=config.loss.n_views, sampler=data.sampler, seed=config.run.seed,
        device=device, rank=ranks.rank, world=ranks.world, epochs_total=config.optim.epochs, download=data.download,
        image_size=data.image_size, trained=trained, levels=expected_levels(config.model.model),
        **(large if data.dataset in LARGE else {}),
    )  # fmt: skip
    return source


def fitting(config: Config, num_classes: int) -> Config:
    """The config with no more groups than there are classes.

    Raises:
        UserError: more were asked for.
    """
    groups = config.preserve.groups
    if groups <= num_classes or not reads_groups(config):
        return config
    if groups != FIELDS["groups"][1].default:
        raise UserError(f"--groups {groups}: more groups than the {num_classes:,} classes; use at most {num_classes}")
    return config.with_(groups=num_classes)


def build_model(
    config: Config, input_shape: tuple[int, int, int], num_classes: int, fetch: bool = True
) -> LongTailModel:
    """The network on the CPU, its weights drawn from the run's seed.

    fetch: False leaves published weights where they are and only checks that they would fit.

    Raises:
        UserError: unknown model, one that cannot take so small pictures, or weights that do not fit.
    """
    from pathlib import Path

    from ltfast import checkpoint

    torch.manual_seed(config.run.seed)
    channels, side = input_shape[0], input_shape[-1]
    cfg = config.model
    # CIFAR ResNets keep their own stem at any size, on 8x8 digits too.
    imagenet_resnet = cfg.model.startswith(("resnet", "resnext", "wide_resnet")) and not is_cifar_encoder(cfg.model)
    stem = "small" if side <= 40 and imagenet_resnet else "default"
    given = Path(cfg.weights or "")
    published = cfg.weights if given.name == cfg.weights and not given.suffix and not given.exists() else None
    encoder, dim = create_encoder(cfg.model, channels, stem=stem, image_size=side, weights=published, fetch=fetch)
    if side < TORCHVISION_SIDE and not tries_a_picture(cfg.model):
        check_size(cfg.model, encoder, input_shape)
    projection = (cfg.projection_hidden, cfg.projection_out) if config.loss.loss == "bcl" else None
    model = LongTailModel(encoder, dim, num_classes, projection=projection, scale=cfg.scale, classifier=cfg.classifier)
    if cfg.weights and not published:
        checkpoint.load_weights(model.encoder, Path(cfg.weights))
    if config.run.convolutions == "kernel":
        use_own_kernels(model)
    return model


def check_size(name: str, encoder: torch.nn.Module, input_shape: tuple[int, int, int]) -> None:
    """UserError where nothing is left of a picture before the encoder's last layer; found by trying one."""
    try:
        with torch.no_grad(), evaluating(encoder):  # nothing is drawn or counted
            encoder(torch.zeros(1, *input_shape))
    except RuntimeError as error:
        side, reason = input_shape[-1], str(error).partition("\n")[0]
        raise UserError(
            f"--model {name}: it cannot take pictures of {side} x {side} pixels ({reason}); use larger pictures or a "
            "model such as resnet32"
        ) from None


def build_objective(config: Config, counts: Tensor, agreement: Agreement | None = None) -> Objective:
    """The base loss over classes with `counts` [C] training images."""
    loss = config.loss
    return Objective(loss.loss, counts, loss.a_ce, loss.a_scl, loss.temperature, loss.tau, agreement or Agreement())


def record_batches(source: Any, recorder: Recorder, report: Report = quiet, failure: Failure | None = None) -> None:
    """Make the views of a `SmallSource` by replaying one recorded graph: some hundred small launches otherwise."""
    make = source.make_batch
    recorded = Captured(
        lambda branch, draw, key: tuple(make(draw, key)[:2]), "views", recorder, report, failure=failure
    )

    def make_batch(draw: Tensor, key: Tensor) -> Batch:
        views, labels = recorded("train", draw, key)
        return Batch(views, labels, draw % source.sizes["train"])

    source.make_batch = make_batch


def build_membership(config: Config, rule: Rule | None, counts: Tensor, group_of_class: Tensor | None) -> Tensor:
    """[C, G] membership of every class in the groups of `rule`.

    While bank groups do not exist yet all classes are in the first of them: shapes stay as they will be, so that a
    compiled loss is not compiled once more when groups appear.

    Raises:
        UserError: more groups than the rule can take, or cc-sam with too many classes.
    """
    if rule is None:
        return membership_for("single", counts)
    most = CLASS_GROUPS_MAX if rule.independent and rule.scope == "classifier" else MAX_ROWS // rule.rows(1)
    if rule.groups == "class" and counts.numel() > most:
        raise UserError(
            f"cc-sam: {counts.numel()} classes, one group each, is more than {most}; use gsa-paper, its grouped form"
        )
    if rule.groups == "bank" and config.preserve.groups > most:
        raise UserError(f"--groups {config.preserve.groups}: {config.method} takes at most {most} groups of classes")
    if rule.groups == "bank" and group_of_class is None:
        return F.one_hot(torch.zeros(counts.numel(), dtype=torch.long), config.preserve.groups).float()
    sharp = config.sharpness
    return membership_for(
        MEMBERSHIP_KIND[rule.groups], counts, group_of_class,
        eta=sharp.tail_below, gamma=sharp.focal_gamma, sharpness=sharp.focal_strength,
    )  # fmt: skip
