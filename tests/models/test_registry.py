"""Encoders by name; torchvision networks are built on the meta device, which costs no memory."""

import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from ltfast.build import build_model
from ltfast.config import Config
from ltfast.errors import UserError
from ltfast.models import CifarResNet, create_encoder, encoder_names

WIDTHS = {
    "resnet50": 2048,
    "resnext50_32x4d": 2048,
    "resnet152": 2048,
    "convnext_tiny": 768,
    "vit_b_16": 768,
    "swin_t": 768,
    "mobilenet_v3_small": 1024,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "squeezenet1_1": 512,
    "vgg11_bn": 4096,
    "googlenet": 1024,
    "inception_v3": 2048,
}


def feature_width(name: str, in_channels: int, size: int, **options) -> tuple[int, int]:
    """(the stated width, the width of what comes out in training mode)."""
    with torch.device("meta"):
        encoder, width = create_encoder(name, in_channels, **options)
        out = encoder(torch.empty(2, in_channels, size, size))
    assert out.shape[0] == 2
    return width, out.shape[1]


@pytest.mark.parametrize("depth", [8, 14, 20, 32, 44, 56, 110])
def test_cifar_names(depth: int) -> None:
    encoder, width = create_encoder(f"resnet{depth}")
    assert isinstance(encoder, CifarResNet)
    assert width == 64
    assert len(encoder.layer1) == (depth - 2) // 6


def test_cifar_options() -> None:
    assert create_encoder("resnet8-w24")[1] == create_encoder("resnet8", width=24)[1] == 96
    encoder, width = create_encoder("resnet8", 1, stem="small")
    assert encoder(torch.randn(2, 1, 8, 8)).shape == (2, width)
    assert encoder.layer2[0].stride == 1
    assert create_encoder("resnet8", 1)[0].layer2[0].stride == 2


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_torchvision_width_is_the_feature_width(name: str, width: int) -> None:
    size = 299 if name == "inception_v3" else 224
    assert feature_width(name, 1, size) == (width, width)


@pytest.mark.slow
def test_every_name_builds() -> None:
    for name in encoder_names():
        if not name.startswith("regnet"):  # their constructor reads a tensor, which the meta device has not
            stated, found = feature_width(name, 3, 299 if name == "inception_v3" else 224)
            assert stated == found, name


def test_a_real_forward_and_backward() -> None:
    encoder, width = create_encoder("regnet_y_400mf", 2)
    out = encoder(torch.randn(2, 2, 32, 32))
    assert out.shape == (2, width)
    out.square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_resnet50_has_the_fields_161_tensors() -> None:
    with torch.device("meta"):
        full = list(torchvision.models.resnet50().parameters())
        encoder, _ = create_encoder("resnet50")
    ours = list(encoder.parameters())
    assert len(full) == 161
    assert [p.shape for p in ours] == [p.shape for p in full[:-2]]
    assert sum(p.numel() for p in ours) == 25_557_032 - 2_049_000


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 32), ("vit_h_14", 28), ("maxvit_t", 448)])
def test_picture_size_of_position_tables(name: str, size: int) -> None:
    stated, found = feature_width(name, 3, size, image_size=size)
    assert stated == found


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "vit_b_16"])
def test_other_channels_change_nothing_else_of_the_first_convolution(name: str) -> None:
    found = []
    with torch.device("meta"):
        for channels in (2, 3):
            encoder, _ = create_encoder(name, channels)
            conv = next(m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
            assert conv.in_channels == channels
            found.append((conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.bias is None))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_pictures_in_colour_are_brought_to_the_levels_that_published_weights_expect(name: str) -> None:
    with torch.device("meta"):
        assert [create_encoder(name, channels)[0].transform_input for channels in (1, 3)] == [False, True]


def test_small_stem_keeps_the_resolution() -> None:
    maps = []
    with torch.device("meta"):
        for stem in ("default", "small"):
            encoder, _ = create_encoder("resnet18", stem=stem)
            encoder.layer1.register_forward_hook(lambda _m, _i, out: maps.append(out.shape[2]))
            encoder(torch.empty(2, 3, 32, 32))
    assert maps == [8, 32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet_32"}, "unknown name 'resnet_32'; did you mean 'resnet32'"),
        ({"name": "ResNet50"}, "did you mean 'resnet50'"),
        ({"name": "qqqqq"}, "try resnet32"),
        ({"name": "resnet26"}, "unknown name 'resnet26'"),
        ({"name": "resnet8", "stem": "tiny"}, "stem: 'tiny'"),
        ({"name": "vgg11", "stem": "small"}, "stem: 'small' exists for ResNets only"),
        ({"name": "resnet8", "width": 0}, "width: 0"),
        ({"name": "resnet8-w32", "width": 8}, "width: 8 beside the width in 'resnet8-w32'"),
        ({"name": "resnet18", "in_channels": 0}, "in_channels: 0"),
        ({"name": "resnet50", "width": 8}, "width: 8 is for the CIFAR ResNets"),
        (
            {"name": "resnet32", "weights": "pretraned"},
            "'pretraned' is for torchvision .* and there is no file of that name",
        ),
        ({"name": "resnet18", "weights": "IMAGENET2K"}, "weights: 'IMAGENET2K' is no file and no weights of resnet18"),
        (
            {"name": "resnet18", "weights": "DEFAULT", "in_channels": 1},
            "published weights are for large pictures in colour",
        ),
        (
            {"name": "resnet18", "weights": "DEFAULT", "stem": "small"},
            "with small ones leave --weights out or give a file",
        ),
        (
            {"name": "resnet18", "weights": "IMAGENET1K_V9", "stem": "small"},
            "'IMAGENET1K_V9' is no file and no weights",
        ),
        ({"name": "vit_b_16", "image_size": 30}, "image_size: 30 is not a multiple of 16"),
        ({"name": "maxvit_t", "image_size": 32}, "image_size: 32 is not a multiple of 224"),
        ({"name": "vit_b_16", "image_size": 384, "weights": "DEFAULT"}, "image_size: 384 does not fit"),
    ],
)
def test_user_errors_name_the_option_and_the_fix(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_encoder(**options)


def test_weights_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args, **_options):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(
        UserError, match=r"could not be downloaded .*; fetch https://\S+/resnet18-\w+\.pth elsewhere and give the"
    ):
        create_encoder("resnet18", weights="DEFAULT")


def test_published_weights_are_the_starting_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    published = torchvision.models.resnet18()
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    torch.save(published.state_dict(), cache / url.rpartition("/")[2])  # as if downloaded before
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = Config().with_(model="resnet18", weights="DEFAULT")
    encoder = build_model(config, (3, 64, 64), 5).encoder
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, published.state_dict()[name]), name


def test_published_weights_with_the_names_of_earlier_versions_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision.models.densenet121().state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): value for name, value in published.items()}
    assert old.keys() != published.keys()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: old)
    for name, value in create_encoder("densenet121", weights="DEFAULT")[0].state_dict().items():
        assert torch.equal(value, published[name]), name


def test_published_weights_are_checked_without_fetching_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args, **_options):
        raise AssertionError("fetched")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    create_encoder("resnet18", weights="DEFAULT", fetch=False)
    with pytest.raises(UserError, match="no weights of resnet18"):
        create_encoder("resnet18", weights="imagenet", fetch=False)
    with pytest.raises(AssertionError, match="fetched"):
        create_encoder("resnet18", weights="DEFAULT")


def test_a_mistyped_file_of_weights_is_told_what_there_is() -> None:
    with pytest.raises(UserError, match=r"weights: 'imagenet' is no file and no weights of resnet18; .* DEFAULT"):
        build_model(Config().with_(model="resnet18", weights="imagenet"), (3, 64, 64), 5)
