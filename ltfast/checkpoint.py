"""Checkpoints: tensors plus JSON in one safetensors file, written atomically, checked when read. No pickle anywhere.

The header carries a SHA-256 over the JSON and every tensor's name, type, shape and bytes. A file is written beside its
place, flushed to the disk and renamed, then the folder is flushed: after a crash at any moment a reader finds the old
file or the new one. Files are plain safetensors that any other reader opens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltfast.errors import UserError

META = "ltfast"
DIGEST = "ltfast-sha256"
PART = ".part"
CHUNK = 16 << 20  # bytes a write call: large enough for any disk, small enough to be interrupted
DTYPES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# What DistributedDataParallel, DataParallel and torch.compile put before names.
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
# DenseNets and vision transformers: the files are older than the names, and torchvision renames while loading.
RENAMED = (
    (r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.", r"\1\2."), (r"\.mlp\.linear_1\.", ".mlp.0."),
    (r"\.mlp\.linear_2\.", ".mlp.3."),
)  # fmt: skip


def save(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> str:
    """Write `tensors` and `meta` (JSON-able) to `path`, whose folder must exist; returns the digest.

    A reader sees the old file or the new one, never a part, also after a power cut.

    Raises:
        OSError: disk full, no permission, the folder is gone; `path` is then what it was before, or the new file where only
            the folder could not be flushed.
    """
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(meta)
    digest = digest_of(host, text)
    write_atomically(path, file_content(host, {META: text, DIGEST: digest}))
    return digest


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def digest_of(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256, hex, over the metadata text and every host tensor: name, type, shape and bytes, sorted by name."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"|{name}|{DTYPES[tensor.dtype]}|{list(tensor.shape)}|".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def file_content(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file in pieces: length, JSON header, tensors (widest types first, so all are aligned)."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in names:
        data = raw(tensors[name])
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Write beside `path`, flush to the disk, rename over it, flush the folder. OSError leaves `path` untouched, but
    for that of the last flush."""
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        with open(part, "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        flush_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def flush_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file written by `save` (its checksum is verified) or any other safetensors file.

    Raises:
        UserError: missing, damaged, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # A copy: safetensors maps the file, and a map of a file that is cut short kills the process.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        meta = json.loads(metadata.get(META, "{}"))
        intact = DIGEST not in metadata or metadata[DIGEST] == digest_of(tensors, metadata.get(META, "{}"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None
    if not intact:
        raise UserError(f"{path}: damaged (its checksum does not match); use another checkpoint")
    return tensors, meta


def load_meta(path: Path) -> dict[str, Any]:
    """The JSON part of a file written by `save`, without reading its tensors; {} if there is none or it is unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(json.loads((file.metadata() or {}).get(META, "{}")))
    except (SafetensorError, OSError, ValueError):
        return {}


def load_into(model: torch.nn.Module, path: Path) -> None:
    """Copy weights and buffers from `path` into `model`, in place.

    Raises:
        UserError: names or shapes differ, i.e. the file belongs to another model.
    """
    tensors, _ = load(path)
    state = model.state_dict()
    problems = [f"{k} missing" for k in state if k not in tensors]
    problems += [
        f"{k} is {list(tensors[k].shape)} there and {list(v.shape)} here"
        for k, v in state.items() if k in tensors and tensors[k].shape != v.shape
    ]  # fmt: skip
    if problems:
        raise UserError(
            f"{path}: belongs to another model ({problems[0]}; {len(problems)} differences); "
            "were classes added or removed, or was the run's config.toml changed?"
        )
    with torch.no_grad():
        for k, v in state.items():
            v.copy_(tensors[k])


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Start `module` from a file of weights: safetensors, or a torch state dict read with weights_only, also as the
    "state_dict" or "model" of a training checkpoint and as a part of a larger model (a run's encoder, the backbone or query
    encoder of a pre-trained one, the inside of DDP's and torch.compile's wrappers).

    A classifier and whatever else stands outside the module is ignored; every parameter of the module must be there.

    Raises:
        UserError: missing, unreadable, or weights of another network.
    """
    state = module.state_dict()
    tensors = current_names({WRAPPERS.sub("", k): v for k, v in _read_weights(path).items()})
    prefix = part_with(tensors, state)
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    missing = [k for k in state if k not in tensors and not k.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"--weights {path}: {missing[0]} is missing ({len(missing)} of {len(state)} tensors); is it another --model?"
        )
    blocks = {k.partition(".")[0] for k in state}
    removed = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, torch.nn.Identity))
    more = [k for k in tensors if k not in state and k.partition(".")[0] in blocks and not k.startswith(removed)]
    if more:
        raise UserError(
            f"--weights {path}: {more[0]}, which the model lacks, is in it ({len(more)} such tensors); is it another --model?"
        )
    with torch.no_grad():
        for k, v in state.items():
            if k in tensors:
                if tensors[k].shape != v.shape:
                    raise UserError(
                        f"--weights {path}: {k} is {list(tensors[k].shape)}, the model needs {list(v.shape)}; "
                        "is it for another --model or --image-size?"
                    )
                if not bool(tensors[k].isfinite().all()):
                    raise UserError(f"--weights {path}: {k} holds NaN or inf")
                v.copy_(tensors[k])


def part_with(names: Iterable[str], wanted: Container[str]) -> str:
    """What stands before most of the `wanted` names, "" or such as "encoder_q."; of several as good ones the first."""
    found = Counter([""])
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                found["".join(f"{part}." for part in parts[:i])] += 1
    return found.most_common(1)[0][0]


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, by their names there; UserError if it is none."""
    if path.is_dir():
        raise UserError(f"--weights {path}: is a folder; of a run, give {path}/checkpoints/last.safetensors")
    try:
        if path.suffix == ".safetensors":
            tensors, meta = load(path)
            if "run" in meta:
                raise UserError(f"{path}: is a training state, not weights; give {path.parent}/last.safetensors")
            return tensors
        found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("state_dict", found.get("model", found))
        return {k: v for k, v in found.items() if isinstance(v, Tensor)}
    except FileNotFoundError:
        raise UserError(f"--weights {path}: no such file") from None
    except UserError as error:
        raise UserError(f"--weights {error}") from None
    except Exception as error:
        raise UserError(f"--weights {path}: not safetensors nor a plain state dict ({type(error).__name__})") from None


def current_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict, its names changed in place from those of torchvision's published files to those of its models."""
    for name in list(tensors):
        new = name
        for old, now in RENAMED:
            new = re.sub(old, now, new)
        tensors[new] = tensors.pop(name)
    return tensors
