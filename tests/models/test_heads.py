"""Classifiers and projection MLP against their equations."""

import math

import pytest
import torch
from torch import Tensor

from ltfast.models.heads import CosineClassifier, LinearClassifier, ProjectionMLP, unit_rows


def feats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_cosine_logits_by_loops() -> None:
    head, x = CosineClassifier(5, 4, scale=30.0).double(), feats(3, 5)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[0.5], [1.0], [2.0], [7.0]]))
    out = head(x)
    for i in range(3):
        for c in range(4):
            a, b = x[i].tolist(), head.weight[c].tolist()
            cosine = sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
            assert out[i, c].item() == pytest.approx(30 * cosine, abs=1e-12)
    assert not torch.allclose(out, 30 * unit_rows(x) @ head.weight.T, atol=1e-2)  # forgot to normalise the weight
    assert [name for name, _ in head.named_parameters()] == ["weight"]


@pytest.mark.parametrize("head", [CosineClassifier(5, 4), LinearClassifier(5, 4)])
def test_a_perturbed_weight_stands_in(head: CosineClassifier | LinearClassifier) -> None:
    head, x, other = head.double(), feats(3, 5), feats(4, 5, seed=1)
    with_other = head(x, other)
    assert not torch.allclose(with_other, head(x))
    stacked = torch.vmap(head, (None, 0))(x, torch.stack([other, head.weight]))
    torch.testing.assert_close(stacked, torch.stack([with_other, head(x)]))
    with torch.no_grad():
        head.weight.copy_(other)
    torch.testing.assert_close(head(x), with_other)


def test_linear_logits() -> None:
    head, x = LinearClassifier(5, 4).double(), feats(3, 5)
    torch.testing.assert_close(head(x), x @ head.weight.T + head.bias)


def test_cosine_weights_start_as_unit_rows() -> None:
    weight = CosineClassifier(64, 10).weight
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(10))
    assert (weight @ weight.T - torch.eye(10)).abs().max() < 0.6


@pytest.mark.parametrize("training", [True, False])
def test_projection_is_its_equation(training: bool) -> None:
    head, x = ProjectionMLP(5, 7, 3).double().train(training), feats(6, 5)
    first, norm, _, last = head
    hidden = x @ first.weight.T + first.bias
    mean, var = (hidden.mean(0), hidden.var(0, correction=0)) if training else (norm.running_mean, norm.running_var)
    out = ((hidden - mean) / (var + 1e-5).sqrt()).relu() @ last.weight.T + last.bias
    truth = out / out.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(x), truth, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(out, truth, atol=1e-2)


def test_projection_starts_kaiming_normal() -> None:
    head = ProjectionMLP(256, 512, 128)
    for layer, fan_in in ((head[0], 256), (head[3], 512)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)


def test_float32_inside_bf16_autocast() -> None:
    x = feats(8, 64).float()
    for head in (CosineClassifier(64, 10), LinearClassifier(64, 10)):
        plain = head(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(head(x), plain)
            assert head(x.bfloat16()).dtype == torch.float32
    projection = ProjectionMLP(64, 32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = projection(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(8), rtol=0, atol=1e-6)


def test_a_zero_feature_gives_zero_logits_and_finite_gradients() -> None:
    head, x = CosineClassifier(5, 4), torch.zeros(2, 5, requires_grad=True)
    out = head(x)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()
