"""Encoders of timm: what comes out of them, what their weights expect, whole runs, and what a user can get wrong."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ltfast.build import build_data, build_model
from ltfast.cli import main
from ltfast.config import Config
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.models import create_encoder
from ltfast.predict import load_trained
from ltfast.syncbn import SyncedBatchNorm, synchronise
from tests.data.pictures import make_set

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(("name", "width"), [("test_resnet", 96), ("test_vit", 64), ("mobilenetv3_small_050", 1024)])
def test_a_name_gives_timms_network_without_its_classifier(name: str, width: int, tmp_path: Path) -> None:
    published = timm.create_model(name)
    save_file(published.state_dict(), tmp_path / "weights.safetensors")
    side = published.pretrained_cfg["input_size"][-1]
    config = Config().with_(model=f"timm/{name}", weights=str(tmp_path / "weights.safetensors"), loss="ce")
    model = build_model(config, (3, side, side), 5)
    assert model.feature_dim == width
    assert model.training
    assert set(model.encoder.state_dict()) <= set(published.state_dict())
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        found = model.eval().features(x)
        expected = published.eval().forward_head(published.forward_features(x), pre_logits=True)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("small", [False, True])
def test_pictures_are_normalised_as_the_model_expects(small: bool, tmp_path: Path) -> None:
    make_set(tmp_path, (4, 3), size=(48, 48))
    data = {"dataset": "folder-small" if small else "folder", "data_dir": str(tmp_path), "image_size": 32, "batch": 4}
    config = Config().with_(**data, model="timm/test_vit", loss="ce", loader="torch", views="crop", val_per_class=0)
    source = build_data(config, torch.device("cpu"), Ranks())
    assert (source.mean, source.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    for batch in (next(source.train(0)), next(source.evaluate("test"))):
        view = batch.views[0]
        assert -1 <= view.min() < -0.5
        assert 0.5 < view.max() <= 1


def test_position_tables_and_channels_follow_the_pictures() -> None:
    encoder, width = create_encoder("timm/test_vit", 1, image_size=48)
    assert encoder(torch.zeros(2, 1, 48, 48)).shape == (2, width)


def test_published_weights_are_asked_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], timm.create_model

    def create(name: str, pretrained: bool, **options) -> torch.nn.Module:
        made.append((name, pretrained))
        return real(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    create_encoder("timm/test_vit.r160_in1k", weights="DEFAULT", fetch=False)
    assert made == [("test_vit.r160_in1k", False)]
    create_encoder("timm/test_vit", weights="DEFAULT")
    assert made[1:] == [("test_vit", False), ("test_vit", True)]


def test_every_parameter_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm freezes some of a few models where it is told to leave the classifier out."""
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *words, **options: real(*words, **options).requires_grad_(False))
    assert all(p.requires_grad for p in create_encoder("timm/test_vit", image_size=32)[0].parameters())


def test_synchronised_statistics_keep_the_activation() -> None:
    encoder = create_encoder("timm/test_efficientnet", image_size=32)[0]
    x, one = torch.randn(4, 3, 32, 32), copy.deepcopy(encoder)
    for part in encoder.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.__class__ = SyncedBatchNorm  # as `synchronise` does on several ranks
    for mode in (True, False):
        torch.testing.assert_close(encoder.train(mode)(x), one.train(mode)(x), atol=1e-3, rtol=1e-3)


def test_a_norm_with_another_meaning_is_not_synchronised() -> None:
    class Doubled(torch.nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(UserError, match="--sync-bn: Doubled of this --model is not known here"):
        synchronise(torch.nn.Sequential(Doubled(2)), Ranks(0, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "timm/resnet_18"}, "timm has no 'resnet_18'; did you mean timm/resnet18"),
        ({"name": "timm/qqqqqqqq"}, r"timm.list_models\(\)"),
        ({"name": "timm/test_vit", "weights": "IMAGENET1K_V1"}, "timm's weights are a part of the model's name"),
        ({"name": "timm/test_vit", "weights": "DEFAULT", "in_channels": 1}, "weights are for pictures in colour"),
        ({"name": "timm/vit_tiny_patch16_384x", "weights": "DEFAULT"}, "timm has no"),
        (
            {"name": "timm/test_vit.nonsense", "weights": "DEFAULT"},
            "timm has no .*; did you mean timm/test_vit.r160_in1k",
        ),
        ({"name": "timm/vit_tiny_patch16_224_in21k"}, "did you mean timm/vit_tiny_patch16_224.augreg_in21k"),
        ({"name": "timm/maxvit_pico_rw_256", "image_size": 8}, "cannot be made for pictures of 3 x 8 x 8"),
        ({"name": "timm/test_vit", "width": 8}, "width: 8 is for the CIFAR ResNets"),
        ({"name": "timm/swin_tiny_patch4_window7_224", "image_size": 2}, "cannot be made for pictures of 3 x 2 x 2"),
    ],
)
def test_user_errors(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_encoder(**options)


def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        create_encoder("timm/test_vit")


@pytest.mark.parametrize("kind", [FileNotFoundError, RuntimeError, KeyError])
def test_without_a_network_the_error_asks_for_a_file(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(name: str, pretrained: bool, **options) -> torch.nn.Module:
        if pretrained:
            raise kind("no route to host\nand more")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    told = r"timm/test_vit could not be loaded \('?no route to host.*\); fetch the file of timm/test_vit.r160_in1k on .* --weights FILE"
    with pytest.raises(UserError, match=told):
        create_encoder("timm/test_vit", weights="DEFAULT")


@pytest.mark.parametrize(("name", "method"), [("test_resnet", "gkp-gsa"), ("test_vit", "balanced-softmax+asam")])
def test_a_run_is_trained_resumed_evaluated_and_exported(
    name: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, run = str(make_set(tmp_path / "set", (8, 4, 3))), tmp_path / "run"
    words = [
        "--dataset",
        "folder",
        "--data-dir",
        pictures,
        "--model",
        f"timm/{name}",
        "--image-size",
        "32",
        "--batch",
        "8",
    ]
    more = [
        "--epochs",
        "3",
        "--scout",
        "0.4",
        "--groups",
        "2",
        "--loader",
        "torch",
        "--device",
        "cpu",
        "--compile",
        "off",
    ]
    main(["train", *words, *more, "--method", method, "--max-hours", "0", "--out", str(run)])
    assert main(["train", "--resume", str(run)]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert told["top1"] == next(row["last"]["top1"] for row in logged if row["kind"] == "test")
    assert main(["export", str(run), "--format", "torch-export", "--out", str(tmp_path / "model.pt2")]) == 0
    exported = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(exported(x), load_trained(run).model(x), atol=1e-4, rtol=1e-4)
