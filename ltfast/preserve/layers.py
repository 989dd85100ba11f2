"""Squared gradients of every sample, layer by layer, from one ordinary forward and backward pass.

The gradient of a sample with respect to a convolution or a linear layer is the product of its own input (unfolded) and the
gradient of its own output: one batched matrix product for all samples of a chunk. BatchNorm in evaluation multiplies and
adds element by element. (torch.func.vmap asks for convolutions of as many groups as there are samples.)

Legend: B samples of a chunk, L positions of an output, K = channels x kernel elements of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from ltfast.models.conv import Conv3x3

# Of the root of the samples' squared gradients: more than TF32 changes their sum, less than a mistake does.
AGREE = 0.02
Gradients = Iterator[tuple[str, Tensor]]  # (parameter of the layer, gradients of B samples [B, *shape])


def _of_convolution(layer: nn.Conv2d, x: Tensor, up: Tensor) -> Gradients:
    groups = layer.groups
    assert not isinstance(layer.padding, str)
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0):
        columns = x.flatten(2)  # [B, K, L]
    else:
        columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    up = up.flatten(2)  # [B, O, L]
    parts, inputs = up.unflatten(1, (groups, -1)), columns.unflatten(1, (groups, -1))
    found = parts @ inputs.transpose(2, 3)  # [B, groups, O / groups, K / groups]
    yield "weight", found.reshape(len(x), *layer.weight.shape)
    if layer.bias is not None:
        yield "bias", up.sum(2)


def _of_linear(layer: nn.Linear, x: Tensor, up: Tensor) -> Gradients:
    x, up = x.reshape(len(x), -1, x.shape[-1]), up.reshape(len(up), -1, up.shape[-1])
    yield "weight", up.transpose(1, 2) @ x
    if layer.bias is not None:
        yield "bias", up.sum(1)


def _of_batchnorm(layer: _BatchNorm, x: Tensor, up: Tensor) -> Gradients:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    rest, shape = tuple(range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    scale = torch.rsqrt(layer.running_var + layer.eps)
    normal = (x - layer.running_mean.view(shape)) * scale.view(shape)
    yield "weight", (up * normal).sum(rest) if rest else up * normal
    yield "bias", up.sum(rest) if rest else up


def _rule(layer: nn.Module) -> Callable[..., Gradients] | None:
    """How a layer's gradients are computed, or None if it is of no kind that is known here."""
    if type(layer) in (nn.Conv2d, Conv3x3) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return _of_convolution
    if type(layer) is nn.Linear:
        return _of_linear
    plain = isinstance(layer, _BatchNorm) and not hasattr(layer, "act")  # timm's applies its activation, too
    if plain and layer.affine and layer.running_mean is not None:
        return _of_batchnorm
    return None


def known_layers(model: nn.Module, names: Sequence[str]) -> list[tuple[str, nn.Module]] | None:
    """(prefix, layer) of the layers that own the parameters `names`; None if one belongs to none or several, or to a kind
    that is not known here."""
    wanted, owners = set(names), dict[int, int]()
    layers = []
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}" if prefix else name: p for name, p in module.named_parameters(recurse=False)}
        for p in own.values():
            owners[id(p)] = owners.get(id(p), 0) + 1
        if wanted & own.keys():
            if _rule(module) is None:
                return None
            layers.append((f"{prefix}." if prefix else "", module))
            wanted -= own.keys()
    parameters = dict(model.named_parameters())
    return layers if not wanted and all(owners[id(parameters[name])] == 1 for name in names) else None


class Unlike(Exception):
    """A layer's gradients do not add up to autograd's: it is used in a way that its inputs and outputs do not show."""


def sample_squares(
    model: nn.Module,
    layers: Sequence[tuple[str, nn.Module]],
    loss: Callable[[Tensor, Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    check: bool = False,
) -> dict[str, Tensor]:
    """Sums over the samples of `images` [B, ...] of their squared gradients with respect to the parameters `names` of `layers`.

    loss: (outputs [B, C], labels [B]) -> loss of each sample [B]. The model must be in evaluation mode, so that samples do not mix. check:
    compare the gradients' own sums with autograd's.

    Raises:
        Unlike: with check, if they differ, or if a layer is used more than once.
    """
    values = {name: p.detach() for name, p in model.named_parameters()}
    if check:
        values |= {name: values[name].requires_grad_() for name in names}
    squares = dict.fromkeys(names, images.new_zeros(()))
    sums = dict[str, Tensor]()

    def arrived(prefix: str, layer: nn.Module, x: Tensor, up: Tensor) -> None:
        rule = _rule(layer)
        assert rule is not None
        with torch.no_grad():
            for own, gradients in rule(layer, x, up):
                name = prefix + own
                if name not in squares:
                    continue
                if check and name in sums:
                    raise Unlike(name)
                # Never in place: gradients of two parameters may share memory.
                squares[name] = gradients.square().sum(0)
                if check:
                    sums[name] = gradients.sum(0)

    def passed(prefix: str, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(arrived, prefix, layer, args[0].detach()))

    with _hooks(layers, passed), torch.enable_grad():
        start = images.detach().requires_grad_()  # gradients of all outputs, and of no parameter unless checked
        total = loss(functional_call(model, values, (start,)), labels).sum()
        known = torch.autograd.grad(total, [start, *(values[n] for n in names if check)], allow_unused=True)
    agree = {
        name: (sums.get(name, 0.0) - exact).norm() <= AGREE * squares[name].sum().sqrt()
        for name, exact in zip(names, known[1:], strict=False) if exact is not None
    }  # fmt: skip
    # One wait for the device, whatever the number of parameters.
    for name, good in zip(agree, torch.stack(list(agree.values())).tolist() if agree else (), strict=True):
        if not good:
            raise Unlike(name)
    return squares


@contextmanager
def _hooks(
    layers: Sequence[tuple[str, nn.Module]], passed: Callable[[str, nn.Module, tuple[Any, ...], Tensor], None]
) -> Iterator[None]:
    """Inside, `passed` sees every layer's arguments and output."""
    handles = [layer.register_forward_hook(partial(passed, prefix)) for prefix, layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
