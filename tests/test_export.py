"""Exported models and predictions say what the trained model says."""

from __future__ import annotations

import importlib.util
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ltfast import build, checkpoint
from ltfast.cli import main
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.export import FORMATS, INFO, SUFFIX, export
from ltfast.predict import Preprocess, load_trained, pictures_below, predict
from ltfast.recipes import build_config
from ltfast.train import train

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = {"epochs": 2, "batch": 36, "tensorboard": False, "device": "cpu", "out": str(out)}
    train(build_config("digits-lt", "bcl", {}, flags))
    return out


@pytest.fixture(scope="module")
def truth(run: Path) -> dict[str, torch.Tensor]:
    """Pictures of the test split and the logits of the checkpoint, by another way than the one under test."""
    from ltfast.runs import RunFolder

    config = RunFolder.open(run).config
    source = build.build_data(config, torch.device("cpu"), Ranks())
    model = build.build_model(config, source.input_shape, 10)
    checkpoint.load_into(model, run / "checkpoints" / "last.safetensors")
    batch = next(iter(source.evaluate("test")))
    with torch.no_grad():
        logits = model.eval()(batch.views[0])
    return {"x": batch.views[0], "logits": logits, "pixels": source.images["test"]}


def test_safetensors(run: Path, truth: dict[str, torch.Tensor]) -> None:
    path = export(run)
    assert path == run / "export" / "last.safetensors"
    trained = load_trained(path)
    with pytest.raises(UserError, match=r"--checkpoint best: .* holds one model"):
        load_trained(path, "best")
    assert trained.classes == tuple("0123456789")
    with torch.no_grad():
        assert torch.equal(trained.model(truth["x"]), truth["logits"])
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged"):
        load_trained(path)
    with pytest.raises(UserError, match="not an exported model"):
        load_trained(run / "checkpoints" / "last.safetensors")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, of its own archive
def test_torch_export(run: Path, truth: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = export(run, "torch-export", out=tmp_path / "new" / "folder" / "model.pt2")
    extra = {INFO: ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra[INFO])["classes"] == list("0123456789")
    for batch in (1, 7, 400):
        out = program.module()(truth["x"][:batch])
        torch.testing.assert_close(out, truth["logits"][:batch], rtol=1e-4, atol=1e-4)  # observed 1e-5
    assert not torch.allclose(program.module()(truth["x"].flip(3)), truth["logits"], atol=1e-1)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_onnx(run: Path, truth: dict[str, torch.Tensor], tmp_path: Path) -> None:
    import onnxruntime

    path = export(run, "onnx", out=tmp_path / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.onnx"]
    assert json.loads((tmp_path / "model.json").read_text())["classes"] == list("0123456789")
    session = onnxruntime.InferenceSession(str(path))
    for batch in (1, 7):
        (out,) = session.run(None, {"pictures": truth["x"][:batch].numpy()})
        torch.testing.assert_close(torch.from_numpy(out), truth["logits"][:batch], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_weights_too_large_for_one_onnx_file_lie_beside_it(run: Path, truth, tmp_path: Path, monkeypatch) -> None:
    import onnxruntime

    monkeypatch.setattr("ltfast.export.ONNX_BYTES", 0)
    path = export(run, "onnx", out=tmp_path / "model.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.onnx", "model.onnx.data"]
    logits = onnxruntime.InferenceSession(str(path)).run(None, {"pictures": truth["x"].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(logits), truth["logits"], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_each_onnx_graph_has_a_description_of_its_own(run: Path, tmp_path: Path) -> None:
    for name in ("model.v1", "model.v2"):
        export(run, "onnx", out=tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.v1", "model.v1.json", "model.v2", "model.v2.json"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_is_not_written_where_its_description_goes(run: Path, tmp_path: Path, format: str) -> None:
    with pytest.raises(UserError, match=rf"x.json: a .json is the description of a model; use .*x\{SUFFIX[format]}"):
        export(run, format, out=tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, of its own archive
@pytest.mark.parametrize("name", ["model.safetensors", "model"])
def test_an_export_is_exported_again_beside_itself(run: Path, tmp_path: Path, name: str) -> None:
    first = export(run, out=tmp_path / name)
    assert export(first, "torch-export") == tmp_path / "model.pt2"
    if name != "model":
        with pytest.raises(UserError, match="in this format already; give another --format, or --out"):
            export(first)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "model.pt2"])


def test_onnx_without_the_package(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else known(name))
    assert main(["export", str(run), "--format", "onnx"]) == 2
    assert "pip install onnx onnxscript" in capsys.readouterr().err


def test_export_errors(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose from safetensors, torch-export, onnx"):
        export(run, "pickle")
    assert "pickle" not in FORMATS
    with pytest.raises(UserError, match="not a run folder"):
        export(tmp_path)
    (tmp_path / "x.pt2").write_text("")
    with pytest.raises(UserError, match="for use without ltfast"):
        load_trained(tmp_path / "x.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export(run, out=tmp_path / "file" / "x.safetensors")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11, of its own archive
@pytest.mark.parametrize("format", ["safetensors", "torch-export", "onnx"])
def test_a_full_disk_is_one_line_and_keeps_no_part(run: Path, tmp_path: Path, format: str) -> None:
    if format == "onnx" and MISSING:
        pytest.skip(f"not installed: {', '.join(MISSING)}")
    _, hard = limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # of the model's 340 kB and more
    try:
        with pytest.raises(UserError, match="model: cannot write"):
            export(run, format, out=tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_predict(run: Path, truth: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pictures saved as files give the probabilities of the test split's own pixels."""
    paths = []
    for i in range(5):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(truth["pixels"][i, 0].numpy()).save(paths[-1])
    expected = truth["logits"][:5].softmax(1)
    assert main(["predict", str(run), *paths, "--top", "10", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for i, row in enumerate(rows):
        assert row["image"] == paths[i]
        got = torch.zeros(10)
        got[[int(name) for name in row["classes"]]] = torch.tensor(row["probabilities"])
        torch.testing.assert_close(got, expected[i], rtol=1e-3, atol=1e-5)  # observed 2e-6
        assert row["probabilities"] == sorted(row["probabilities"], reverse=True)
    file = export(run)
    again = [row["probabilities"] for row in predict(load_trained(file), paths, top=10, batch=2)]
    torch.testing.assert_close(torch.tensor(again), torch.tensor([row["probabilities"] for row in rows]))
    assert main(["predict", str(file), paths[0]]) == 0
    assert paths[0] in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\ncut"])
def test_predict_names_a_bad_picture(
    run: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    good = tmp_path / "good.png"
    Image.new("L", (8, 8)).save(good)
    assert main(["predict", str(run), str(path)]) == 2
    assert f"{path}: cannot be read as a picture" in capsys.readouterr().err
    assert main(["predict", str(run), str(good), str(path), str(good)]) == 2
    text = capsys.readouterr()
    assert text.out.count(f"{good}: ") == 2, "the others are answered"
    assert text.err.count("\n") == 1
    with pytest.raises(UserError, match="cannot be read"):
        list(predict(load_trained(run), [path]))


def test_folders_are_searched_as_in_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.PNG", "sub/b.jpg", ".hidden.png", "._a.PNG", ".thumbs/a.png", "c.gif", "d.heic"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.png").touch()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "sub" / "up").symlink_to(tmp_path / "in")
    found = [Path(p).relative_to(tmp_path / "in").as_posix() for p in pictures_below([tmp_path / "in"])]
    assert found == ["a.PNG", "linked/e.png", "sub/b.jpg"]
    assert "in: files not read, for their suffix: 1 .gif, 1 .heic" in caplog.text


def test_preprocessing_of_large_pictures_is_that_of_evaluation(tmp_path: Path) -> None:
    """Resize the short side to 256, crop 224, ImageNet's mean and deviation: against torchvision's own transforms."""
    from torchvision import transforms

    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (300, 410, 3), dtype=np.uint8))
    picture.save(tmp_path / "x.png")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    how = Preprocess(3, 224, mean, std, True)
    theirs: Any = transforms.Compose(
        [transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    torch.testing.assert_close(how(tmp_path / "x.png"), theirs(picture), rtol=1e-5, atol=1e-5)
    assert how(tmp_path / "x.png").std() > 0.5
    whole: Any = transforms.Compose(
        [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    small = Preprocess(3, 32, mean, std, False)(tmp_path / "x.png")
    torch.testing.assert_close(small, whole(picture), rtol=1e-5, atol=1e-5)
    assert Preprocess.from_dict(json.loads(json.dumps(how.__dict__))) == how
