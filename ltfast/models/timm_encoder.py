"""Encoders of the timm library, by `timm/` and its own name, with the weights that it publishes.

timm is not among ltfast's requirements: `pip install "ltfast[timm]"`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ltfast.errors import UserError, closest

PREFIX = "timm/"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # with which the pipelines of pictures in colour normalise


def create(
    name: str, in_channels: int, image_size: int | None, weights: str | None, fetch: bool
) -> tuple[nn.Module, int]:
    """(module [B, in_channels, H, W] -> [B, D], D) of timm's model `name` (without the prefix), its classifier removed.

    image_size: pixels per side (the model's own), of the pictures that it will see.
    weights: "DEFAULT", the published ones that `name` stands for; None = random; fetch: False checks the name only.
    Published weights that expect pictures normalised with other means than ImageNet's get them: a hook in front of the model.

    Raises:
        UserError: timm is missing, has no such model or no weights of it, or the model cannot take such pictures.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"model: {PREFIX}{name} needs timm, which is not installed: pip install timm") from None

    if not timm.is_model(name):
        close = closest(name, timm.list_models(pretrained="." in name), cutoff=0.5)
        hint = f"did you mean {PREFIX}{close}?" if close else "timm.list_models() lists its names"
        raise UserError(f"model: timm has no {name!r}; {hint}")
    if weights is not None:
        _check_published(name, weights, in_channels)
    options: dict[str, Any] = {"num_classes": 0, "in_chans": in_channels}
    known: Any = timm.get_pretrained_cfg(name)
    if image_size is not None and known.fixed_input_size:
        options["img_size"] = image_size
    try:
        model: Any = timm.create_model(name, pretrained=weights is not None and fetch, **options)
        side = image_size or model.pretrained_cfg["input_size"][-1]
        with torch.no_grad():
            found = model.eval()(torch.zeros(1, in_channels, side, side))
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model: {PREFIX}{name} cannot be made for pictures of {in_channels} x {image_size} x {image_size}: {reason}"
        ) from error
    except OSError as error:  # and what huggingface_hub raises without a network
        raise UserError(
            f"weights: those of {PREFIX}{name} could not be downloaded ({error}); fetch its safetensors file elsewhere and give "
            "it as --weights FILE"
        ) from error
    if found.ndim != 2:
        raise UserError(
            f"model: {PREFIX}{name} gives features of shape {list(found.shape[1:])}, not one vector a picture"
        )
    if in_channels == 3:
        _renormalise(model)
    return model.train(), found.shape[1]


def _check_published(name: str, weights: str, in_channels: int) -> None:
    from timm.models import is_model_pretrained

    if weights != "DEFAULT":
        raise UserError(
            f"weights: {weights!r} is no file, and timm's weights are a part of the model's name, for instance "
            f"{PREFIX}vit_small_patch16_224.augreg_in21k; use DEFAULT"
        )
    if not is_model_pretrained(name):
        raise UserError(f"weights: timm publishes none of {name}; leave --weights out or give a file")
    if in_channels != 3:
        raise UserError("weights: published weights are for pictures in colour; leave --weights out or give a file")


def _renormalise(model: Any) -> None:
    """Pictures normalised with ImageNet's means reach the model as its weights expect them."""
    own = [torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std")]
    usual = [torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD)]
    if all(torch.equal(a, b) for a, b in zip(own, usual, strict=True)):
        return
    model.register_buffer("input_gain", usual[1] / own[1], persistent=False)
    model.register_buffer("input_shift", (usual[0] - own[0]) / own[1], persistent=False)
    model.register_forward_pre_hook(_normalised_anew)


def _normalised_anew(model: Any, pictures: tuple[Tensor]) -> tuple[Tensor]:
    return (pictures[0] * model.input_gain + model.input_shift,)
