"""Test-time augmentation: the mean over a picture and its mirror image, wherever a run is looked at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltfast import build, checkpoint
from ltfast.cli import main
from ltfast.dist import Ranks
from ltfast.evaluate import augmented, evaluate
from ltfast.predict import load_trained, predict
from ltfast.recipes import build_config
from ltfast.report import report
from ltfast.runs import RunFolder

RUN = [
    "--model",
    "resnet8-w8",
    "--batch",
    "16",
    "--epochs",
    "8",
    "--device",
    "cpu",
    "--method",
    "ce",
    "--no-tensorboard",
]


def test_flip_is_the_mean_of_both_sides() -> None:
    x = torch.randn(5, 3, 6, 6).to(memory_format=torch.channels_last)
    weight = torch.randn(4, 3 * 36)
    strides = []

    def logits(pictures: torch.Tensor) -> torch.Tensor:
        strides.append(pictures.stride())
        return pictures.flatten(1) @ weight.T

    mirror = torch.stack([picture[:, :, torch.arange(5, -1, -1)] for picture in x])
    torch.testing.assert_close(augmented(logits, "flip")(x), (logits(x) + logits(mirror)) / 2)
    assert strides[0] == strides[1] == x.stride()  # one compiled graph
    assert augmented(logits, "none") is logits


def test_a_model_is_evaluated_in_evaluation_mode_without_gradients_and_keeps_its_mode() -> None:
    seen = set()

    class Probe(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add((self.training, torch.is_grad_enabled()))
            return torch.zeros(len(x), 10)

    probe, source = Probe(), build.build_data(build_config("digits-lt", "ce", {}, {}), torch.device("cpu"), Ranks())
    for training in (True, False):
        probe.train(training)
        evaluate(probe, source, "test", torch.device("cpu"))
        assert probe.training is training
    assert seen == {(False, False)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tta") / "run"
    assert main(["train", "--dataset", "digits-lt", *RUN, "--tta", "flip", "--out", str(path)]) == 0
    return path


def test_a_run_evaluates_validates_and_reports_by_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder.open(run)
    source = build.build_data(folder.config, torch.device("cpu"), Ranks())
    model = build.build_model(folder.config, source.input_shape, source.num_classes)
    checkpoint.load_into(model, folder.last)
    plain, flipped = (evaluate(model, source, "test", torch.device("cpu"), tta=t) for t in ("none", "flip"))
    assert plain["per_class"] != flipped["per_class"]  # digits have no mirror images
    assert folder.metrics("test")[0]["last"]["top1"] == pytest.approx(flipped["top1"])
    val = evaluate(model, source, "val", torch.device("cpu"), tta="flip")
    assert folder.metrics("epoch")[-1]["val"]["top1"] == pytest.approx(val["top1"])
    capsys.readouterr()
    for words, expected in (([], flipped), (["--tta", "none"], plain), (["--tta", "flip"], flipped)):
        assert main(["eval", str(run), "--json", *words]) == 0
        assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(expected["top1"])
    report([run], max_minutes=0.05)
    written = json.loads((run / "report" / "report.json").read_text())
    assert f"{flipped['top1']:.4g}"[:4] in json.dumps(written)


def test_predict_does_as_the_run_did(run: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    picture = rng.integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(picture).save(files[0])
    Image.fromarray(picture[:, ::-1].copy()).save(files[1])
    (one, other) = list(predict(load_trained(run), files, top=10))
    assert one["classes"] == other["classes"]
    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-6)
