"""Models of large pictures as the command line builds them: any torchvision classifier with BCL's heads, from weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltfast.build import build_model
from ltfast.errors import UserError
from ltfast.recipes import build_config

CLASSES = 12


def model(name: str, side: int, weights: str | None = None) -> torch.nn.Module:
    fields = {"model": name, "image_size": side, "weights": weights}
    return build_model(build_config("imagenet-lt", "bcl", {}, fields), (3, side, side), CLASSES)


@pytest.mark.parametrize(
    ("name", "side", "width"),
    [
        ("resnet50", 64, 2048),
        ("resnext50_32x4d", 64, 2048),
        ("resnet152", 64, 2048),
        ("vit_b_16", 32, 768),
        ("convnext_tiny", 64, 768),
        ("mobilenet_v3_small", 64, 1024),
    ],
)
def test_a_torchvision_classifier_with_the_heads_of_bcl(name: str, side: int, width: int) -> None:
    net = model(name, side).eval()
    with torch.no_grad():
        features = net.features(torch.randn(2, 3, side, side))
        assert features.shape == (2, width)
        assert net.logits(features).shape == (2, CLASSES)
        out = net.projection(features)
        assert torch.allclose(out.norm(dim=1), torch.ones(2), atol=1e-5)
        assert net.centers().shape == (CLASSES, out.shape[1])


def saved(kind: str, state: dict[str, Tensor], path: Path) -> str:
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if kind == "ddp" else state, path)
    return str(path)


@pytest.mark.parametrize(("kind", "file"), [("safetensors", "w.safetensors"), ("plain", "w.pth"), ("ddp", "c.pth.tar")])
def test_starting_from_a_file_of_weights(kind: str, file: str, tmp_path: Path) -> None:
    """torchvision's own names; its classifier (fc) is left out."""
    import torchvision

    theirs = torchvision.models.resnet18().state_dict()
    path = saved(kind, theirs, tmp_path / file)
    ours = model("resnet18", 64, path).encoder.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert {name for name in theirs if name not in ours} == {"fc.weight", "fc.bias"}
    assert not torch.equal(model("resnet18", 64).encoder.state_dict()["conv1.weight"], theirs["conv1.weight"])
    with pytest.raises(UserError, match=r"--weights .* is missing .*another --model"):
        model("resnet50", 64, path)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("resnet18", lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()}),
        ("resnet18", lambda state: {"model": state, "epoch": 3, "optimizer": {}}),
        ("resnet18", lambda state: {f"encoder.{k}": v for k, v in state.items()}),  # a run's own
        ("vit_b_32", lambda state: state),  # has an encoder of its own
        ("vit_b_32", lambda state: {f"encoder.{k}": v for k, v in state.items()}),
        ("vit_b_32", lambda state: {k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for k, v in state.items()}),
        ("densenet121", lambda state: {re.sub(r"(layer\d+\.(norm|conv))(\d)", r"\1.\3", k): v for k, v in state.items()}),
    ],
)  # fmt: skip
def test_names_that_others_give_to_weights(name: str, wrap: Any, tmp_path: Path) -> None:
    """DDP and torch.compile, training scripts, our runs, and torchvision's own files, older than its models."""
    import torchvision

    theirs = torchvision.models.get_model(
        name, weights=None, **({"image_size": 64} if "vit" in name else {})
    ).state_dict()
    torch.save(wrap(theirs), tmp_path / "w.pth")
    ours = model(name, 64, str(tmp_path / "w.pth")).encoder.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_weights_of_another_network_are_refused_where_they_would_fit(tmp_path: Path) -> None:
    import torchvision

    path = saved("plain", torchvision.models.resnet34().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"layer1.2.* which the model lacks, is in it \(96 such tensors\)"):
        model("resnet18", 64, path)
    with pytest.raises(UserError, match=r"is a folder; of a run, give .*last.safetensors"):
        model("resnet18", 64, str(tmp_path))


def test_published_and_trained_weights_of_inception_see_the_same_pictures() -> None:
    """torchvision turns pictures to other levels where it loads its weights itself; a run is evaluated without."""
    assert model("googlenet", 64).encoder.transform_input


def test_a_size_that_a_model_cannot_take_is_named() -> None:
    for name in ("vit_b_16", "maxvit_t"):
        with pytest.raises(UserError, match="image_size: 50"):
            model(name, 50)
