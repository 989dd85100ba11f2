"""Checkpoint files and the store: checksums, atomic replacement, rotation, shared tensors, damage, full disks."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import struct
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltfast import checkpoint
from ltfast.errors import UserError
from ltfast.models import create_encoder
from ltfast.store import Store


def assorted() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, generator=generator)
    return {
        "float": x, "double": x.double(), "bf16": x.bfloat16(), "half": x.half(), "long": torch.arange(3),
        "mask": x[0] > 0, "bytes": torch.tensor([255, 0, 7], dtype=torch.uint8), "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4), "transposed": x.T, "nan": torch.tensor([float("nan"), float("inf")]),
    }  # fmt: skip


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and checkpoint.raw(a[k].contiguous()) == checkpoint.raw(b[k].contiguous())
        for k in a
    )  # fmt: skip


def test_round_trip_and_other_readers(tmp_path: Path) -> None:
    path, tensors = tmp_path / "x.safetensors", assorted()
    checkpoint.save(path, tensors, {"epoch": 3, "name": "e\u0301"})
    loaded, meta = checkpoint.load(path)
    assert meta == {"epoch": 3, "name": "e\u0301"}
    assert same(loaded, tensors)
    assert same(load_file(path), tensors), "the official reader must see the same"
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    save_file({"a": torch.ones(3)}, tmp_path / "foreign.safetensors")  # without our checksum
    assert checkpoint.load(tmp_path / "foreign.safetensors")[0]["a"].sum() == 3


def test_every_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, assorted(), {"epoch": 3})
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(1)
    places = torch.randint(len(whole), (60,), generator=generator).tolist()
    for place in [*places, 0, 7, 8, len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            loaded, meta = checkpoint.load(path)
        except UserError:
            continue
        # The only bits that may change unnoticed are those of the header's padding.
        assert same(loaded, assorted())
        assert meta == {"epoch": 3}
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"x.safetensors: (not a readable checkpoint|damaged)"):
            checkpoint.load(path)


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("wrap", ["pickle", "torch", "named safetensors"])
def test_hostile_pickles_do_not_run(tmp_path: Path, wrap: str) -> None:
    target, bomb = tmp_path / "exploded", tmp_path / ("weights.safetensors" if "named" in wrap else "weights.pth")
    if wrap == "pickle":
        bomb.write_bytes(pickle.dumps({"state_dict": Bomb(target)}))
    else:
        buffer = io.BytesIO()
        torch.save({"conv1.weight": torch.ones(1), "x": Bomb(target)}, buffer)
        bomb.write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match=r"(not safetensors nor a plain state dict|not a readable checkpoint)"):
        checkpoint.load_weights(torch.nn.Linear(2, 2), bomb)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(bomb)
    assert not target.exists()
    os.mkdir(target)  # the same bomb does work when it is really unpickled
    os.rmdir(target)
    if wrap == "pickle":
        pickle.loads(bomb.read_bytes())
        assert target.exists()


def test_a_lying_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(path)
    path.write_bytes(struct.pack("<Q", 1 << 60))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, {"a": torch.zeros(4)}, {})

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"a": torch.ones(4)}, {})
    assert checkpoint.load(path)[0]["a"].sum() == 0
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# -- the store ---------------------------------------------------------------------------------------------------------


def state(step: int) -> dict[str, torch.Tensor]:
    return {"theta": torch.full((100,), float(step))}


def filled(folder: Path, steps: int, keep: int = 2) -> Store:
    store = Store(folder, keep=keep)
    constant = {"snapshot.0": torch.arange(10.0)}
    for step in range(1, steps + 1):
        store.save_state(step, state(step), {"epoch": step}, constant)
    store.flush()
    return store


def test_rotation_keeps_the_newest_and_what_they_share(tmp_path: Path) -> None:
    store = filled(tmp_path, 3)
    assert [p.name for p in store.states()] == ["state-000000003.safetensors", "state-000000002.safetensors"]
    first = list((tmp_path / "shared").iterdir())
    assert len(first) == 1, "one constant, three states: one file"
    newer = {"snapshot.0": torch.arange(10.0) + 1, "snapshot.1": torch.ones(3)}
    store.save_state(4, state(4), {"epoch": 4}, newer)
    store.flush()
    assert first[0].exists(), "state 3 still refers to it"
    store.save_state(5, state(5), {"epoch": 5}, newer)
    store.flush()
    assert not first[0].exists()
    assert len(list((tmp_path / "shared").iterdir())) == 2
    tensors, meta = Store(tmp_path).load()
    assert meta == {"epoch": 5}
    assert tensors["theta"][0] == 5
    assert tensors["snapshot.0"].equal(newer["snapshot.0"])
    assert tensors["snapshot.1"].sum() == 3


def test_a_constant_that_no_state_named_for_a_while_is_written_again(tmp_path: Path) -> None:
    store, constant = Store(tmp_path, keep=1), {"anchor": torch.arange(5.0)}
    for step, shared in ((1, constant), (2, {}), (3, constant)):
        store.save_state(step, state(step), {}, shared)
    store.flush()
    assert Store(tmp_path).load()[0]["anchor"].equal(constant["anchor"])


def test_nothing_waits_for_the_write_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and the state of an epoch are saved one after the other, and training goes on while they are written."""
    slow, saved = threading.Event(), checkpoint.save

    def save(*args: Any) -> None:
        assert slow.wait(60)
        saved(*args)

    monkeypatch.setattr(checkpoint, "save", save)
    store = Store(tmp_path)
    rescue = threading.Timer(30, slow.set)  # a store that waits
    rescue.start()
    store.save_weights("best", state(1), {})
    store.save_weights("last", state(1), {})
    store.save_state(1, state(1), {"epoch": 1})
    assert not slow.is_set()
    assert store.busy
    slow.set()
    rescue.cancel()
    store.save_state(2, state(2), {"epoch": 2})
    store.flush()
    assert not store.busy
    assert Store(tmp_path).load()[1] == {"epoch": 2}


def test_what_is_to_be_written_again_is_settled_before_its_memory_is_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that did not fit on the disk are tried again by the next job, of whatever kind."""
    saved, tries, slow = checkpoint.save, [], threading.Event()

    def save(path: Path, *args: Any) -> None:
        if path.name.startswith("last"):
            tries.append(path)
            if len(tries) == 1:
                raise OSError(errno.ENOSPC, "full")
            assert slow.wait(60)
        saved(path, *args)

    monkeypatch.setattr(checkpoint, "save", save)
    store, waited = Store(tmp_path), []
    store.save_weights("last", state(1), {})
    store._settle()
    settle = store._settle
    monkeypatch.setattr(store, "_settle", lambda *kinds: (waited.append(kinds), settle(*kinds)))
    store.save_state(1, state(1), {})
    threading.Timer(0.3, slow.set).start()
    store.save_weights("last", state(2), {})
    assert waited[-1] == ()
    store.flush()
    assert float(checkpoint.load(tmp_path / "last.safetensors")[0]["theta"][0]) == 2


def test_a_state_is_written_before_the_weights_that_wait_for_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in between leaves no weights without the state that they follow."""
    saved, order = checkpoint.save, []

    def save(path: Path, *args: Any) -> None:
        order.append(path.name)
        if len(order) == 1:
            raise OSError(errno.ENOSPC, "full")
        saved(path, *args)

    monkeypatch.setattr(checkpoint, "save", save)
    store = Store(tmp_path)
    store.save_weights("last", state(1), {})
    store.save_state(1, state(1), {})
    store.flush()
    assert order == ["last.safetensors", "state-000000001.safetensors", "last.safetensors"]


def test_an_error_of_one_kind_is_seen_by_the_next_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, saved = Store(tmp_path), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args: 1 / 0)
    store.save_weights("epoch-7", state(1), {})
    assert store._jobs["epoch-7"].exception() is not None
    monkeypatch.setattr(checkpoint, "save", saved)
    with pytest.raises(ZeroDivisionError):
        store.save_weights("last", state(1), {})


def test_values_are_those_of_the_call(tmp_path: Path) -> None:
    store, live = Store(tmp_path), torch.zeros(1 << 20)
    store.save_state(1, {"theta": live}, {})
    live += 1  # the next step, while the writer is at work
    store.flush()
    assert Store(tmp_path).load()[0]["theta"].abs().max() == 0


@pytest.mark.parametrize("what", ["bit", "cut", "shared"])
def test_a_damaged_newest_state_falls_back(tmp_path: Path, what: str) -> None:
    store = filled(tmp_path, 2)
    store.save_state(3, state(3), {"epoch": 3}, {"snapshot.0": torch.zeros(10)})
    store.flush()
    newest = store.states()[0]
    data = bytearray(newest.read_bytes())
    if what == "bit":
        data[-3] ^= 16
        newest.write_bytes(data)
    elif what == "cut":
        newest.write_bytes(data[: len(data) // 2])
    else:
        name = json.loads(checkpoint_meta(newest))["shared"]["snapshot.0"]
        (tmp_path / "shared" / name).unlink()
    notes: list[str] = []
    again = Store(tmp_path, note=notes.append)
    tensors, meta = again.load()
    assert (meta["epoch"], float(tensors["theta"][0])) == (2, 2.0)
    assert len(notes) == 1
    assert "falling back" in notes[0]
    # Training goes on from state 2 and reaches step 3 again: the damaged file is replaced, and 2 is still there.
    again.save_state(3, state(3), {"epoch": 3}, {"snapshot.0": tensors["snapshot.0"]})
    again.flush()
    assert len(again.states()) == 2
    assert Store(tmp_path).load()[1] == {"epoch": 3}


def checkpoint_meta(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()[checkpoint.META]


def test_a_damaged_state_that_is_never_reached_again_goes(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    newest = Store(tmp_path).states()[0]
    newest.write_bytes(b"x")
    store = Store(tmp_path, note=lambda text: None)
    store.load()
    store.save_state(2, state(2), {"epoch": 2})  # SIGTERM before another step was made
    store.flush()
    assert [p.name for p in store.states()] == ["state-000000002.safetensors"]


def test_all_damaged_is_an_error_and_none_is_none(tmp_path: Path) -> None:
    assert Store(tmp_path).load() is None
    for path in filled(tmp_path, 2).states():
        path.write_bytes(b"")
    notes: list[str] = []
    with pytest.raises(UserError, match="every training state is damaged"):
        Store(tmp_path, note=notes.append).load()
    (note,) = notes  # there is none before the oldest
    assert "state-000000002" in note
    assert "falling back to the checkpoint before it" in note


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "x.safetensors", torch.nn.Linear(1, 2).state_dict(), {})
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(
        UserError, match=r"belongs to another model \(weight is \[2, 1\] there and \[2, 3\] here.*classes added"
    ):
        checkpoint.load_into(model, tmp_path / "x.safetensors")
    assert torch.equal(model.weight, before)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((2, 3), float("nan")), "bias": torch.zeros(2)}, tmp_path / "nan.pt")
    with pytest.raises(UserError, match=r"nan\.pt: weight holds NaN or inf"):
        checkpoint.load_weights(torch.nn.Linear(3, 2), tmp_path / "nan.pt")


def test_shared_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes(b"")
    folder = tmp_path / "run"
    folder.mkdir()
    meta = {"run": {}, "steps": 1, "shared": {"a": "../../outside.safetensors"}}
    checkpoint.save(folder / "state-000000001.safetensors", state(1), meta)
    with pytest.raises(UserError, match="every training state"):
        Store(folder, note=lambda text: None).load()


def test_left_overs_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    left = [tmp_path / ".state-000000002.safetensors.99.part", tmp_path / "shared" / ".snapshot.1.99.part"]
    for path in left:
        path.write_bytes(b"half")
    store.clean()
    assert not any(path.exists() for path in left)
    assert store.load() is not None


def test_keep_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--keep-checkpoints 0"):
        Store(tmp_path, keep=0)


# -- disks that fail ---------------------------------------------------------------------------------------------------


def test_full_disk_keeps_the_last_good_state_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path, 2)
    real = checkpoint.write_atomically

    def full(path: Path, pieces: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    for step in (3, 4):
        store.save_state(step, state(step), {"epoch": step})
        with pytest.raises(
            UserError, match=r"No space left on device; the last good training state is state-000000002"
        ):
            store.flush()
    assert len(store.problems()) == 1, "reported"
    assert store.problems() == [], "once"
    assert Store(tmp_path).load()[1] == {"epoch": 2}
    monkeypatch.setattr(checkpoint, "write_atomically", real)
    store.save_state(5, state(5), {"epoch": 5})
    store.flush()
    assert store.problems() == []
    assert Store(tmp_path).load()[1] == {"epoch": 5}
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    store.save_state(6, state(6), {"epoch": 6})
    with pytest.raises(UserError, match="the last good training state is state-000000005"):
        store.flush()
    assert len(store.problems()) == 1, "the next time that it fails is news"


def test_a_folder_that_vanishes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    store = filled(folder, 1)
    folder.rename(tmp_path / "elsewhere")
    store.save_state(2, state(2), {"epoch": 2}, {"new": torch.ones(2)})
    with pytest.raises(UserError, match="cannot write the state checkpoint: No such file or directory"):
        store.flush()
    assert not folder.exists(), "an unmounted disk's mount point must not be written to"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    store = filled(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        store.save_state(2, state(2), {"epoch": 2})
        with pytest.raises(UserError, match="Permission denied"):
            store.flush()
    finally:
        tmp_path.chmod(0o700)
    assert Store(tmp_path).load()[1] == {"epoch": 1}


@pytest.mark.parametrize("names", ["{}", "encoder.{}", "backbone.{}", "module.encoder_q.{}", "model.student.trunk.{}"])
def test_weights_are_found_inside_larger_models(names: str, tmp_path: Path) -> None:
    encoder, _ = create_encoder("resnet18", 3)
    other, _ = create_encoder("resnet18", 3)
    saved = {names.format(k): v for k, v in other.state_dict().items()}
    saved |= {names.format("fc.weight"): torch.ones(3, 512), "head.0.weight": torch.ones(2)}
    # A second encoder of the same kind, as momentum contrast has: the first in the file is the one that was trained.
    saved |= {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in other.state_dict().items()}
    torch.save({"state_dict": saved, "epoch": 7}, tmp_path / "pretrained.pth")
    checkpoint.load_weights(encoder, tmp_path / "pretrained.pth")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_training_state_given_as_weights_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_state(1, state(1), {"epoch": 1})
    store.flush()
    with pytest.raises(UserError, match=r"^--weights .*: is a training state, not weights; give .*/last.safetensors"):
        checkpoint.load_weights(torch.nn.Linear(2, 2), *tmp_path.glob("state-*"))
