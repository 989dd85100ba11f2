"""A bank on disk: only new snapshots are written, nothing stale is trusted, damage is named."""

import pytest
import torch

from ltfast.errors import UserError
from ltfast.preserve.bank import MemoryBank
from ltfast.preserve.bankfile import BankFolder


def grown(epochs, bank=None, seed=0, start=0):
    bank = bank or MemoryBank(30, 17, origin=torch.ones(17))
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(start, start + epochs):
        quality = torch.randn(30, generator=generator) + 0.05 * epoch
        bank.update(quality, torch.randn(17, generator=generator), epoch)
    return bank


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


def test_round_trip_writes_each_snapshot_once(tmp_path):
    files, bank = BankFolder(tmp_path / "bank"), None
    for epoch in range(12):
        bank = grown(1, bank, seed=epoch, start=epoch)
        assert files.save(bank) <= (3 if epoch == 0 else 2)  # the new snapshot, the index, once the origin
        copy = MemoryBank(30, 17)
        BankFolder(tmp_path / "bank").load(copy)
        assert same(bank, copy)
    assert files.save(bank) == 1
    names = {p.name for p in (tmp_path / "bank").iterdir()}
    live = {f"snapshot.{i}.safetensors" for i in bank.lumps().ids}
    assert names == live | {"index.safetensors", "origin.safetensors"}


def test_a_resumed_run_does_not_trust_files_of_a_later_epoch(tmp_path):
    folder = tmp_path / "bank"
    early = grown(4)
    BankFolder(folder).save(early)
    state = {k: v.clone() for k, v in early.state_dict().items()}
    BankFolder(folder).save(grown(5, early, seed=1, start=4))
    resumed = MemoryBank(30, 17)
    resumed.load_state_dict(state)
    grown(5, resumed, seed=2, start=4)  # same numbers, other weights
    BankFolder(folder).save(resumed)
    copy = MemoryBank(30, 17)
    BankFolder(folder).load(copy)
    assert same(resumed, copy)


def test_a_crash_before_the_index_leaves_the_old_bank(tmp_path, monkeypatch):
    files, bank = BankFolder(tmp_path), grown(4)
    files.save(bank)
    old = {k: v.clone() for k, v in bank.state_dict().items()}
    write = files._write

    def crash(name, tensors):
        if name.startswith("index"):
            raise OSError("disk full")
        write(name, tensors)

    monkeypatch.setattr(files, "_write", crash)
    with pytest.raises(OSError, match="disk full"):
        files.save(grown(3, bank, seed=3, start=4))
    copy = MemoryBank(30, 17)
    BankFolder(tmp_path).load(copy)
    assert all(torch.equal(copy.state_dict()[k], old[k]) for k in old)


def test_damage_is_named(tmp_path):
    with pytest.raises(UserError, match=r"index.safetensors is missing"):
        BankFolder(tmp_path / "nothing").load(MemoryBank(30, 17))
    bank = grown(3)
    BankFolder(tmp_path).save(bank)
    with pytest.raises(UserError, match="another model"):
        BankFolder(tmp_path).load(MemoryBank(30, 18))
    victim = tmp_path / f"snapshot.{bank.lumps().ids[0]}.safetensors"
    victim.write_bytes(victim.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{victim.name} is damaged"):
        BankFolder(tmp_path).load(MemoryBank(30, 17))
    victim.unlink()
    with pytest.raises(UserError, match=rf"{victim.name} is missing"):
        BankFolder(tmp_path).load(MemoryBank(30, 17))
