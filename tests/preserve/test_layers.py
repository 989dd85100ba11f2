"""Per-sample gradients layer by layer against vmap, and the networks for which they must not be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ltfast.models import LongTailModel, create_encoder
from ltfast.preserve import fisher
from ltfast.preserve.layers import known_layers
from tests.preserve.support import fisher_diagonal
from tests.syncs import Waits

B, C = 7, 5


class Everything(nn.Module):
    """Every kind of layer that is known, in place where networks are so."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=(1, 2), dilation=(1, 2))
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 2), groups=4, bias=False)
        self.plain = nn.Conv2d(12, 6, 1, bias=False)
        self.tokens = nn.Linear(6, 4)
        self.flat_bn = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, C, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.conv(x)))
        x = self.plain(torch.relu_(self.grouped(x)))
        x = self.tokens(x.flatten(2).transpose(1, 2)).tanh().mean(1)
        return self.out(F.relu(self.flat_bn(x), inplace=True))


class Twice(Everything):
    """A layer that is used twice: its gradient is a sum over both uses, squared afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(3))


class Unseen(Everything):
    """A weight that is also used behind its layer's back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.out.weight.square().sum()


class Tied(Everything):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, C, bias=False)
        self.again.weight = self.out.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.again(x.mean((1, 2, 3))[:, None].expand(-1, 4))


class Other(Everything):
    """A kind of layer that is not known."""

    def __init__(self) -> None:
        super().__init__()
        self.flat_bn = nn.LayerNorm(4)  # type: ignore[assignment]


class Reparametrised(Everything):
    """A layer whose weight is computed from its parameter."""

    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.out)


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = kind()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(m.weight, 1.0, 0.2)
            nn.init.normal_(m.bias, 0.0, 0.2)
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2.0)
    return net


def both(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch, chunk: int | None = 4, names: list[str] | None = None
) -> tuple[Tensor, Tensor, list[bool]]:
    """(Fisher layer by layer, by vmap, whether each call to the layers' way went to its end)."""
    images, labels = torch.randn(B, 3, 9, 10), torch.arange(B) % C
    names, ended = names or [name for name, _ in net.named_parameters()], list[bool]()

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    def noted(*args, **kwargs):
        ended.append(False)
        squares = sample_squares(*args, **kwargs)
        ended[-1] = True
        return squares

    sample_squares = fisher.sample_squares
    by_vmap = fisher_diagonal(net, names, [(images, labels)], loss, chunk=chunk)
    monkeypatch.setattr(fisher, "_by_layers", lambda model: True)
    monkeypatch.setattr(fisher, "sample_squares", noted)
    return fisher_diagonal(net, names, [(images, labels)], loss, chunk=chunk), by_vmap, ended


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_every_kind_of_layer(monkeypatch: pytest.MonkeyPatch, chunk: int | None) -> None:
    net = made(Everything)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    ours, exact, ended = both(net, monkeypatch, chunk)
    assert ended
    assert all(ended)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-12)
    assert (ours[-6:] == 0).all()  # what is not used
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


def test_the_host_does_not_wait_for_each_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    with Waits() as waits:
        _, _, ended = both(made(Everything), monkeypatch)
    assert ended
    assert "aten::_local_scalar_dense" not in waits.found, "the check of a first chunk reads one list"


@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_networks_in_use(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, dim = create_encoder(name, 3)
    net = made(lambda: LongTailModel(encoder, dim, C, projection=(8, 4)))
    names = [n for n, _ in net.named_parameters() if n.startswith("encoder.")]
    assert known_layers(net, names) is not None
    ours, exact, ended = both(net, monkeypatch, names=names)
    assert all(ended)
    torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("kind", [Twice, Unseen, Tied, Other, Reparametrised])
def test_other_networks_go_through_vmap(kind: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    net = made(kind)
    ours, exact, ended = both(net, monkeypatch)
    assert not any(ended)
    assert len(ended) <= 1  # tried once
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_layers_are_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its error may change the sign of a ReLU's input
    net, images, labels = made(Everything), torch.randn(B, 3, 9, 10), torch.arange(B) % C
    names = [name for name, _ in net.named_parameters()]

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels, reduction="none")

    exact = fisher_diagonal(net, names, [(images, labels)], loss)
    ours = fisher_diagonal(net.cuda(), names, [(images.cuda(), labels.cuda())], loss).cpu()
    torch.testing.assert_close(ours, exact, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"padding": "same"}, {"padding": "valid"}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_a_convolution_padded_in_another_way_is_of_no_known_kind(options: dict[str, Any]) -> None:
    assert known_layers(nn.Sequential(nn.Conv2d(2, 3, 3, **options)), ["0.weight"]) is None
    assert known_layers(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), ["0.weight"]) is not None
