"""CIFAR ResNets: the field's parameter counts, shapes, option A shortcuts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ltfast.models import CifarResNet
from ltfast.models.resnet import SMALL_STRIDES, BasicBlock

# He et al. 2016, table 6 (0.27, 0.46, 0.66, 0.85, 1.7 M) to the last parameter, without the 650 of its 10-way layer.
PARAMETERS = {20: 269_722 - 650, 32: 464_154 - 650, 44: 658_586 - 650, 56: 853_018 - 650, 110: 1_727_962 - 650}


def parameters(depth: int, in_channels: int = 3, width: int = 16) -> int:
    """The count from the architecture: convolutions 3x3 without bias, two numbers a BatchNorm channel."""
    blocks, total = (depth - 2) // 6, 9 * in_channels * width + 2 * width
    inside = width
    for out in (width, 2 * width, 4 * width):
        total += 9 * inside * out + 9 * out * out * (2 * blocks - 1) + 4 * blocks * out
        inside = out
    return total


@pytest.mark.parametrize(("depth", "expected"), PARAMETERS.items())
def test_parameter_counts_are_the_papers(depth: int, expected: int) -> None:
    network = CifarResNet(depth)
    assert sum(p.numel() for p in network.parameters()) == expected == parameters(depth)
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in network.modules())
    assert convolutions + 1 == depth  # the classifier is the last layer


@pytest.mark.parametrize(("in_channels", "width"), [(1, 16), (3, 5), (4, 32)])
def test_width_and_channels(in_channels: int, width: int) -> None:
    network = CifarResNet(8, in_channels, width)
    assert network.feature_dim == 4 * width
    assert sum(p.numel() for p in network.parameters()) == parameters(8, in_channels, width)
    assert network(torch.randn(2, in_channels, 32, 32)).shape == (2, 4 * width)


@pytest.mark.parametrize(
    ("size", "strides", "maps"),
    [
        (32, (1, 2, 2), (32, 16, 8)),
        (8, SMALL_STRIDES, (8, 8, 4)),
        (8, (1, 2, 2), (8, 4, 2)),
        (16, (2, 1, 2), (8, 8, 4)),
        (13, (1, 2, 2), (13, 7, 4)),
    ],
)
def test_maps_shrink_as_stated(size: int, strides: tuple[int, int, int], maps: tuple[int, int, int]) -> None:
    network, seen = CifarResNet(8, 1, 4, strides), []
    for layer in (network.layer1, network.layer2, network.layer3):
        layer.register_forward_hook(lambda _m, _i, out: seen.append(tuple(out.shape[2:])))
    network(torch.randn(2, 1, size, size))
    assert seen == [(m, m) for m in maps]


@pytest.mark.parametrize(("inside", "out", "stride"), [(4, 8, 2), (3, 6, 1), (4, 4, 2), (2, 5, 2), (4, 4, 1)])
def test_shortcut_subsamples_and_pads_with_zeros(inside: int, out: int, stride: int) -> None:
    x = torch.randn(2, inside, 7, 7)
    short = BasicBlock(inside, out, stride).shortcut(x)
    front = (out - inside) // 2
    truth = torch.zeros(2, out, *short.shape[2:])
    truth[:, front : front + inside] = x[:, :, ::stride, ::stride]
    assert torch.equal(short, truth)


def test_block_is_its_equation() -> None:
    block = BasicBlock(4, 8, 2).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    for layer in (block.bn1, block.bn2):
        torch.nn.init.normal_(layer.weight)
        torch.nn.init.normal_(layer.bias)

    def norm(y: Tensor, layer: torch.nn.BatchNorm2d) -> Tensor:
        unit = (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        return unit * layer.weight[:, None, None] + layer.bias[:, None, None]

    inner = norm(F.conv2d(x, block.conv1.weight, stride=2, padding=1), block.bn1).relu()
    residual = norm(F.conv2d(inner, block.conv2.weight, padding=1), block.bn2)
    truth = (residual + block.shortcut(x)).relu()
    torch.testing.assert_close(block(x), truth, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(block(x), residual.relu(), atol=1e-2)


def test_features_are_the_mean_over_the_map_of_stem_and_stages() -> None:
    network = CifarResNet(8, 2, 3).double()
    x = torch.randn(4, 2, 9, 9, dtype=torch.float64)
    stem = network.bn1(F.conv2d(x, network.conv1.weight, padding=1)).relu()
    last = network.layer3(network.layer2(network.layer1(stem)))
    torch.testing.assert_close(network(x), last.flatten(2).mean(2), rtol=1e-12, atol=1e-12)


def test_start_is_kaiming_normal() -> None:
    torch.manual_seed(0)
    weight = CifarResNet(8).layer3[0].conv2.weight
    std = (2 / (64 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert weight.abs().max() > 3 * std  # a uniform distribution of this deviation ends at 1.7


def test_channels_last_stays_and_changes_nothing() -> None:
    network = CifarResNet(14, 3, 8).double()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    truth, formats = network(x), []
    network = network.to(memory_format=torch.channels_last)
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.register_forward_hook(
                lambda _m, _i, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), truth, rtol=1e-10, atol=1e-10)
    assert formats == [True] * 6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(18), "depth: 18"),
        (lambda: CifarResNet(2), "depth: 2"),
        (lambda: CifarResNet(8, width=0), "width"),
        (lambda: BasicBlock(8, 4), "out_channels"),
    ],
)
def test_bad_arguments_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
