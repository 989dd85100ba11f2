"""Encoders by name: the CIFAR ResNets of resnet.py, every torchvision classifier with its last layer removed, timm's models."""

import os
import re
from typing import Any

import torch
from torch import nn

from ltfast.checkpoint import current_names
from ltfast.errors import UserError, closest
from ltfast.models import timm_encoder
from ltfast.models.resnet import CIFAR_DEPTHS, CIFAR_STRIDES, SMALL_STRIDES, CifarResNet

STEMS = ("default", "small")
_CIFAR_NAME = re.compile(r"resnet(\d+)(?:-w(\d+))?")
_IMAGENET_CLASSES = 1000
_MAXVIT_MULTIPLE = 224  # five halvings and windows of 7
_AUXILIARY = {"inception_v3": ("AuxLogits",), "googlenet": ("aux1", "aux2")}


def encoder_names() -> list[str]:
    """Every name create_encoder takes but timm's, ours first. resnet8..resnet110 also take a width: resnet8-w32."""
    import torchvision

    return [f"resnet{depth}" for depth in CIFAR_DEPTHS] + torchvision.models.list_models(module=torchvision.models)


def is_cifar_encoder(name: str) -> bool:
    """True for our CIFAR-style ResNets (resnet8 ... resnet110, with or without a width), False for torchvision's."""
    match = _CIFAR_NAME.fullmatch(name)
    return match is not None and int(match[1]) in CIFAR_DEPTHS


def tries_a_picture(name: str) -> bool:
    """True where any picture will do, or create_encoder has found out that those will."""
    return is_cifar_encoder(name) or name.startswith(timm_encoder.PREFIX)


def expected_levels(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of each channel, 0..1 scale, of the pictures that a model's weights expect; None: those of the data set."""
    return timm_encoder.levels(name.removeprefix(timm_encoder.PREFIX)) if name.startswith(timm_encoder.PREFIX) else None


def create_encoder(
    name: str,
    in_channels: int = 3,
    *,
    width: int | None = None,
    stem: str = "default",
    image_size: int | None = None,
    weights: str | None = None,
    fetch: bool = True,
) -> tuple[nn.Module, int]:
    """(module [B, in_channels, H, W] -> [B, D], D) for a name of encoder_names(), or "timm/" and a name of timm's.

    width: channels of the first stage of a CIFAR ResNet (16; D = 4 * width), also as a suffix: resnet8-w32.
    stem: "small" keeps resolution early: CIFAR ResNets use strides (1, 1, 2); torchvision ResNets get a 3x3 stride-1 first
        convolution and no max-pool (32 x 32 or 64 x 64 pictures).
    image_size: pixels per side (224), used by vit_* and maxvit_* and by timm's: their position tables depend on it.
    weights: torchvision weight name ("IMAGENET1K_V1", "DEFAULT"), of timm's models "DEFAULT", None = random; fetch: False
        checks the name only.
    Raises UserError naming the option for anything a user can get wrong.
    """
    if stem not in STEMS:
        raise UserError(f"stem: {stem!r} is not one of {', '.join(STEMS)}")
    if in_channels < 1:
        raise UserError(f"in_channels: {in_channels} must be at least 1")
    match = _CIFAR_NAME.fullmatch(name)
    if match and int(match[1]) in CIFAR_DEPTHS:
        if width is not None and match[2]:
            raise UserError(f"width: {width} beside the width in {name!r}; leave one out")
        if weights is not None:
            raise UserError(
                f"weights: {weights!r} is for torchvision models, {name} has none, and there is no file of that name; "
                "leave it out or give a file"
            )
        width = width if width is not None else int(match[2] or 16)
        if width < 1:
            raise UserError(f"width: {width} must be at least 1")
        cifar = CifarResNet(int(match[1]), in_channels, width, SMALL_STRIDES if stem == "small" else CIFAR_STRIDES)
        return cifar, cifar.feature_dim
    by_timm = name.startswith(timm_encoder.PREFIX)
    if not by_timm and name not in encoder_names():
        raise UserError(_unknown(name))
    if width is not None:
        raise UserError(f"width: {width} is for the CIFAR ResNets, not {name}; leave it out")
    if by_timm:
        own = name.removeprefix(timm_encoder.PREFIX)
        return timm_encoder.create(own, in_channels, image_size, weights, fetch)
    return _torchvision_encoder(name, in_channels, stem, image_size, weights, fetch)


def _unknown(name: str) -> str:
    close = closest(name.lower(), encoder_names(), cutoff=0.5)
    hint = f"did you mean {close!r}?" if close else "try resnet32 (small pictures), resnet50 or timm/NAME"
    return f"model: unknown name {name!r}; {hint}"


def _torchvision_encoder(
    name: str, in_channels: int, stem: str, image_size: int | None, weights: str | None, fetch: bool
) -> tuple[nn.Module, int]:
    import torchvision

    published = None if weights is None else _published(name, weights)
    if published is not None and (in_channels != 3 or stem != "default"):
        raise UserError(
            "weights: published weights are for large pictures in colour (--dataset folder, list, ...); with small ones leave "
            "--weights out or give a file"
        )
    options: dict[str, Any] = {}
    if name.startswith(("vit_", "maxvit_")) and image_size is not None:
        options.update(_size_option(name, image_size, weights))
    if name in _AUXILIARY:
        # Published weights expect other input levels. With any: a run's weights must find at the end what they had.
        options.update(init_weights=weights is None, transform_input=in_channels == 3)
    model = torchvision.models.get_model(name, weights=None, **options)
    if published is not None and fetch:
        model.load_state_dict(_fetched(name, published))
    for attribute in _AUXILIARY.get(name, ()):
        setattr(model, attribute, None)
        model.aux_logits = False
    feature_dim = _remove_classifier(name, model)
    if stem == "small":
        _small_stem(name, model)
    if in_channels != 3:
        _replace_first_conv(name, model, in_channels)
    return model, feature_dim


def _published(name: str, weights: str) -> Any:
    """The entry of torchvision's table of published weights."""
    import torchvision

    known = torchvision.models.get_model_weights(name).__members__
    if weights not in known:
        raise UserError(
            f"weights: {weights!r} is no file and no weights of {name}; torchvision has {', '.join(known) or 'none'}"
        )
    return known[weights]


def _fetched(name: str, published: Any) -> dict[str, Any]:
    """The state dict of published weights, read without pickle; downloaded once to torch's hub folder."""
    try:
        return current_names(published.get_state_dict(check_hash=True, weights_only=True))
    except OSError as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        raise UserError(
            f"weights: {published.name!r} of {name} could not be downloaded ({error}); fetch {published.url} elsewhere and give the "
            f"file as --weights FILE, or put it into {folder}; --weights none starts from random weights"
        ) from error


def _size_option(name: str, image_size: int, weights: str | None) -> dict[str, Any]:
    """The constructor argument of the models that are built for one picture size."""
    vit = name.startswith("vit_")
    multiple = int(name.rsplit("_", 1)[1]) if vit else _MAXVIT_MULTIPLE
    if image_size < multiple or image_size % multiple:
        raise UserError(f"image_size: {image_size} is not a multiple of {multiple} pixels, as {name} needs")
    if weights is not None and image_size != 224:
        raise UserError(
            f"image_size: {image_size} does not fit the weights {weights!r} of {name}; use 224 or no weights"
        )
    return {"image_size": image_size} if vit else {"input_size": (image_size, image_size)}


def _remove_classifier(name: str, model: nn.Module) -> int:
    """Replace the layer that makes the 1000 logits by the identity; its input width is the feature dimension.

    Everything before it (norms, hidden layers, pooling) stays. SqueezeNet's is a 1x1 convolution before the pooling.
    """
    found = None
    for path, module in model.named_modules():
        if getattr(module, "out_features", None) == _IMAGENET_CLASSES and isinstance(module, nn.Linear):
            found = path, module.in_features
        if isinstance(module, nn.Conv2d) and module.out_channels == _IMAGENET_CLASSES:
            found = path, module.in_channels
    if found is None:
        raise UserError(f"model: no layer with {_IMAGENET_CLASSES} outputs found in {name}; choose another model")
    _set(model, found[0], nn.Identity())
    return found[1]


def _small_stem(name: str, model: nn.Module) -> None:
    import torchvision

    if not isinstance(model, torchvision.models.ResNet):
        raise UserError(f"stem: 'small' exists for ResNets only, not {name}; use stem 'default'")
    conv = nn.Conv2d(3, model.conv1.out_channels, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = conv
    model.maxpool = nn.Identity()  # type: ignore[assignment]


def _replace_first_conv(name: str, model: nn.Module, in_channels: int) -> None:
    for path, old in model.named_modules():
        if isinstance(old, nn.Conv2d):
            new = nn.Conv2d(
                in_channels,
                old.out_channels,
                old.kernel_size,  # type: ignore[arg-type]
                old.stride,  # type: ignore[arg-type]
                old.padding,  # type: ignore[arg-type]
                bias=old.bias is not None,
            )
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            _set(model, path, new)
            return
    raise UserError(f"model: {name} has no convolution to adapt to {in_channels} channels; choose another model")


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
