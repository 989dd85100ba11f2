"""Encoders of the timm library, by `timm/` and its own name, with the weights that it publishes.

timm is not among ltfast's requirements: `pip install "ltfast[timm]"`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ltfast.errors import UserError, closest

PREFIX = "timm/"


def facts(name: str) -> Any:
    """What timm knows of its model `name` (given without the prefix): mean and std of the pictures it expects and the like.

    Raises:
        UserError: timm is missing, or has no such model or no such weights of it.
    """
    try:
        import timm
        from timm.models import get_deprecated_models
    except ImportError:
        raise UserError(f"model: {PREFIX}{name} needs timm 1.0.27 or newer: pip install timm") from None
    network, dot, _ = name.partition(".")
    if timm.is_model(name):
        try:
            found = timm.get_pretrained_cfg(name)
        except RuntimeError:  # the part after the dot is unknown
            found = None
        if found is not None:
            return found
    names = timm.list_models(f"{network}.*", include_tags=True) if dot else []
    near = get_deprecated_models().get(name) or closest(
        name, names or timm.list_models(pretrained=bool(dot)), cutoff=0.3
    )
    hint = f"did you mean {PREFIX}{near}?" if near else "timm.list_models() lists its names"
    raise UserError(f"model: timm has no {name!r}; {hint}")


def levels(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of each channel, 0..1 scale, with which pictures are to be normalised for timm's model `name`."""
    known = facts(name)
    return tuple(known.mean), tuple(known.std)


def create(
    name: str, in_channels: int, image_size: int | None, weights: str | None, fetch: bool
) -> tuple[nn.Module, int]:
    """(module [B, in_channels, H, W] -> [B, D], D) of timm's model `name` (without the prefix), its classifier removed.

    image_size: pixels per side (the model's own), of the pictures that it will see.
    weights: "DEFAULT", the published ones that `name` stands for; None = random; fetch: False checks the name only.

    Raises:
        UserError: see `facts`; timm publishes no weights, they cannot be had, or the model cannot take such pictures.
    """
    known = facts(name)
    import timm

    if weights is not None:
        _check_published(name, weights, in_channels)
    side = image_size or known.input_size[-1]
    options: dict[str, Any] = {"num_classes": 0, "in_chans": in_channels}
    if image_size is not None and known.fixed_input_size:
        options["img_size"] = image_size
    try:
        model: Any = timm.create_model(name, pretrained=False, **options)
        with torch.no_grad():
            found = model.eval()(torch.zeros(1, in_channels, side, side))
    except Exception as error:  # of many kinds, by what the model asks of its pictures
        raise UserError(
            f"model: {PREFIX}{name} cannot be made for pictures of {in_channels} x {side} x {side} ({_reason(error)}); "
            "try another --image-size"
        ) from error
    if found.ndim != 2:
        raise UserError(
            f"model: {PREFIX}{name} gives features of shape {list(found.shape[1:])}, not one vector a picture"
        )
    if weights is not None and fetch:
        try:
            model = timm.create_model(name, pretrained=True, **options)
        except Exception as error:  # of the hub, of the connection, of the file
            source = f"{known.hf_hub_id} on the Hugging Face hub" if known.hf_hub_id else known.url
            raise UserError(
                f"weights: those of {PREFIX}{name} could not be loaded ({_reason(error)}); fetch the file of {source} "
                "elsewhere and give it as --weights FILE"
            ) from error
    return model.train().requires_grad_(True), found.shape[1]


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


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
