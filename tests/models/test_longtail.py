"""LongTailModel: the parts together, and what the flat buffer, autocast, vmap and torch.compile rely on."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ltfast.losses import balanced_supcon, cross_entropy
from ltfast.models import LongTailModel, create_encoder


def digits_model(projection: tuple[int, int] | None = (12, 6), classifier: str = "cosine") -> LongTailModel:
    torch.manual_seed(0)
    encoder, width = create_encoder("resnet8-w4", 1, stem="small")
    return LongTailModel(encoder, width, 10, projection=projection, classifier=classifier)


def pictures(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.randint(0, 10, (batch,), generator=generator)


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
@pytest.mark.parametrize("projection", [None, (12, 6)])
def test_encoder_parameters_are_a_prefix(classifier: str, projection: tuple[int, int] | None) -> None:
    model = digits_model(projection, classifier)
    names = [name for name, _ in model.named_parameters()]
    encoder = sum(1 for _ in model.encoder.parameters())
    assert all(name.startswith("encoder.") for name in names[:encoder])
    assert not any(name.startswith("encoder.") for name in names[encoder:])
    assert names[encoder] == "classifier.weight"


def test_shapes_and_consistency() -> None:
    model, (x, _) = digits_model().eval(), pictures()
    f = model.features(x)
    assert f.shape == (6, 16)
    assert torch.equal(model(x), model.logits(f))
    assert torch.equal(model.logits(f, model.classifier.weight), model.logits(f))
    z, centers = model.project(f), model.centers()
    assert z.shape == (6, 6)
    assert centers.shape == (10, 6)
    for rows in (z, centers):
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))
    other = torch.randn(10, 16)
    assert torch.equal(model.centers(model.classifier.weight), centers)
    assert not torch.allclose(model.centers(other), centers)
    assert not torch.allclose(model.center_projection(f), z)  # two MLPs, not one


def test_every_parameter_gets_a_gradient_from_the_base_loss() -> None:
    model, (x, y) = digits_model(), pictures()
    z = model.project(model.features(torch.cat([x, x + 0.1])))
    loss = cross_entropy(model(x), y) + balanced_supcon(z, model.centers(), y)
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.center_projection[3].weight.grad.abs().max() > 0
    (through_centers,) = torch.autograd.grad(model.centers().sum(), model.classifier.weight)
    assert through_centers.abs().max() > 0


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_vmap_gives_per_sample_gradients_in_eval_mode(classifier: str) -> None:
    model, (x, y) = digits_model(None, classifier).eval().double(), pictures(3)
    x = x.double()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(theta: dict[str, Tensor], picture: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, (theta, buffers), (picture[None],)), label[None])[0]

    per_sample = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(3):
        single = torch.autograd.grad(cross_entropy(model(x[i : i + 1]), y[i : i + 1]).sum(), list(parameters.values()))
        for name, gradient in zip(parameters, single, strict=True):
            torch.testing.assert_close(per_sample[name][i], gradient, rtol=1e-9, atol=1e-12)
            assert gradient.abs().max() > 0, name


def test_functional_call_with_other_parameters() -> None:
    model, (x, _) = digits_model().eval(), pictures()
    moved = {name: p + 0.01 * torch.randn_like(p) for name, p in model.named_parameters()}
    out = functional_call(model, moved, (x,))
    before = model(x)
    model.load_state_dict(moved, strict=False)
    assert torch.equal(model(x), out)
    assert not torch.allclose(before, out)


def test_compiles_without_a_graph_break_also_under_autocast() -> None:
    model, (x, y) = digits_model(), pictures()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        f = model.features(x)
        z = model.project(torch.cat([f, f]))
        return cross_entropy(model.logits(f), y) + balanced_supcon(z, model.centers(), y)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = compiled(x, y)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(x, y), rtol=0.05, atol=0.1)


def test_bf16_autocast_keeps_logits_in_float32() -> None:
    model, (x, _) = digits_model().eval(), pictures()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        f = model.features(x)
        logits = model.logits(f)
    assert f.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model.logits(f.float()))


def test_channels_last_changes_nothing() -> None:
    model, (x, _) = digits_model().eval(), pictures()
    truth = model(x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), truth, rtol=1e-5, atol=1e-5)


def test_state_dict_goes_there_and_back() -> None:
    first, (x, _) = digits_model(), pictures()
    first(x)  # moves the running statistics
    second = digits_model()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(x), second.eval()(x))


def test_without_projection_there_are_no_heads() -> None:
    model = digits_model(None)
    with pytest.raises(ValueError, match="projection"):
        model.project(torch.zeros(2, 16))
    with pytest.raises(ValueError, match="projection"):
        model.centers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": create_encoder("resnet8")}, "encoder: tuple"),
        ({"feature_dim": 0}, "feature_dim: 0"),
        ({"num_classes": 1}, "num_classes: 1"),
        ({"scale": 0.0}, "scale: 0.0"),
        ({"scale": float("nan")}, "scale: nan"),
        ({"projection": (0, 8)}, "projection: "),
        ({"projection": (8,)}, "projection: "),
        ({"classifier": "cos"}, "classifier: 'cos'"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    encoder, width = create_encoder("resnet8")
    with pytest.raises(ValueError, match=message):
        LongTailModel(**{"encoder": encoder, "feature_dim": width, "num_classes": 10, **options})
