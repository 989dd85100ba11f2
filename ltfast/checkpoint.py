"""Checkpoints: tensors plus JSON in one safetensors file, written atomically. No pickle is read or written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltfast.errors import UserError

META = "ltfast"


def save(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` (JSON-able) to `path`: a reader sees the old file or the new one, never a part."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, part, {META: json.dumps(meta)})
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by `save`.

    Raises:
        UserError: missing, damaged, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(META, "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None


def load_into(model: torch.nn.Module, path: Path, prefix: str = "") -> None:
    """Copy weights and buffers from `path` into `model`, in place.

    Raises:
        UserError: names or shapes differ, i.e. the file belongs to another model.
    """
    tensors, _ = load(path)
    state = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    problems = [f"{k} missing" for k in state if k not in tensors]
    problems += [
        f"{k} is {list(tensors[k].shape)} there and {list(v.shape)} here"
        for k, v in state.items() if k in tensors and tensors[k].shape != v.shape
    ]  # fmt: skip
    if problems:
        raise UserError(f"{path}: belongs to another model ({problems[0]}; {len(problems)} differences); use the run's own --model and --dataset")
    with torch.no_grad():
        for k, v in state.items():
            v.copy_(tensors[k])


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Start `module` from a file of weights: safetensors, or a torch state dict read with weights_only.

    Tensors the module does not have (a classifier, say) are ignored; every parameter of the module must be there.

    Raises:
        UserError: missing, unreadable, or weights of another network.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load(path)[0]
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors.get("state_dict", tensors)
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--weights {path}: not safetensors nor a plain state dict ({type(error).__name__})") from None
    state = module.state_dict()
    tensors = {k.removeprefix("module.").removeprefix("encoder."): v for k, v in tensors.items()}
    missing = [k for k in state if k not in tensors and not k.endswith("num_batches_tracked")]
    if missing:
        raise UserError(f"--weights {path}: {missing[0]} is missing ({len(missing)} of {len(state)} tensors); is it another --model?")
    with torch.no_grad():
        for k, v in state.items():
            if k in tensors:
                if tensors[k].shape != v.shape:
                    raise UserError(f"--weights {path}: {k} is {list(tensors[k].shape)}, the model needs {list(v.shape)}")
                v.copy_(tensors[k])
