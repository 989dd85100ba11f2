"""`ltfast export RUN`: the trained classifier (encoder and classifier, logits out) for use elsewhere.

safetensors    all weights, with the config, classes and preprocessing as JSON; `ltfast predict FILE` reads it
torch-export   a torch.export program (.pt2): `torch.export.load(FILE).module()(x)`, without ltfast
onnx           an ONNX graph with a free batch size (needs the packages onnx and onnxscript)

Input of the last two: [B, channels, size, size] float32, prepared as the JSON beside the weights says. Output: the logits of this
view alone, also where the run says --tta flip (docs/reliability.md).
"""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltfast import checkpoint
from ltfast.errors import UserError
from ltfast.predict import Trained, load_trained

SUFFIX = {"safetensors": ".safetensors", "torch-export": ".pt2", "onnx": ".onnx"}
FORMATS = tuple(SUFFIX)
INFO = "ltfast.json"  # the description inside a .pt2
ONNX_BYTES = 1_900_000_000  # one ONNX file holds at most 2 GiB; larger weights go to FILE.data beside it
EXAMPLE_BATCH = 2  # torch.export takes a size of 1 for a constant


def export(run: str | Path, format: str = "safetensors", *, which: str = "last", out: str | Path | None = None) -> Path:
    """Write the model of a run (`which`: last or best) or of a safetensors export in `format`; returns the file.

    out: the file, by default RUN/export/<which><suffix>, or beside an export that is given.

    Raises:
        UserError: unknown format, neither of them, a package is missing, or the file cannot be written or ends in .json.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: choose from {', '.join(FORMATS)}")
    if out is not None and Path(out).suffix.lower() == ".json":
        raise UserError(
            f"--out {out}: a .json is the description of a model; use {Path(out).with_suffix(SUFFIX[format])}"
        )
    if out is not None and Path(out).is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    if format == "onnx":
        missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
        if missing:
            raise UserError(f"--format onnx: needs the package {' and '.join(missing)}; pip install onnx onnxscript")
    trained = load_trained(run, which)
    path = _default(Path(run), which, SUFFIX[format]) if out is None else Path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        {"safetensors": _safetensors, "torch-export": _torch_export, "onnx": _onnx}[format](trained, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror or error}); give another --out") from None
    return path


def _default(run: Path, which: str, suffix: str) -> Path:
    if not run.is_file():
        return run / "export" / (which + suffix)
    path = _renamed(run, suffix)
    if path == run:
        raise UserError(f"{run}: is in this format already; give another --format, or --out")
    return path


def _renamed(path: Path, suffix: str) -> Path:
    """`path` with this suffix in the place of a format's own; any other, as in model.v1, is part of the name."""
    return path.with_suffix(suffix) if path.suffix in SUFFIX.values() else path.with_name(path.name + suffix)


def _safetensors(trained: Trained, path: Path) -> None:
    checkpoint.save(path, trained.model.state_dict(), trained.describe())


def _example(trained: Trained) -> Tensor:
    how = trained.preprocess
    return torch.randn(EXAMPLE_BATCH, how.channels, how.size, how.size)


def _torch_export(trained: Trained, path: Path) -> None:
    dynamic: Any = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(trained.model, (_example(trained),), dynamic_shapes=dynamic)
    content = io.BytesIO()  # where torch writes files itself, a full disk and a missing right are one RuntimeError
    torch.export.save(program, content, extra_files={INFO: json.dumps(trained.describe())})
    checkpoint.write_atomically(path, [content.getbuffer()])


def _onnx(trained: Trained, path: Path) -> None:
    size = sum(tensor.nbytes for tensor in trained.model.state_dict().values())
    program = torch.onnx.export(
        trained.model,
        (_example(trained),),
        input_names=["pictures"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # of the dynamo exporter
    if size > ONNX_BYTES:  # the weights' own file is found by its name, so neither can be renamed
        program.save(path, external_data=True)
    else:
        checkpoint.write_atomically(path, [program.model_proto.SerializeToString()])
    checkpoint.write_atomically(_renamed(path, ".json"), [json.dumps(trained.describe()).encode() + b"\n"])
