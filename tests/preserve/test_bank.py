"""Memory bank against a table that stores one full copy for every class (the definition)."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltfast.errors import UserError
from ltfast.preserve.bank import WEIGHTS, MemoryBank


def naive_run(classes=7, dimension=33, epochs=25, seed=0):
    """Yields (bank, copy of the weights per class, best per class) after each epoch; class 6 never improves."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(classes, dimension)
    entries, best = {}, torch.full((classes,), -torch.inf, dtype=torch.float64)
    theta = torch.randn(dimension, generator=generator)
    for epoch in range(epochs):
        theta += torch.randn(dimension, generator=generator)  # in place, as training does
        quality = torch.randn(classes, generator=generator, dtype=torch.float64) + 0.05 * epoch
        quality[-1] = -torch.inf
        quality[epoch % 3] = torch.nan
        better = quality > best
        for c in better.nonzero().flatten().tolist():
            entries[c], best[c] = theta.clone(), quality[c]
        assert bank.update(quality, theta, epoch) == int(better.sum())
        yield bank, entries, best


def test_table_equals_one_copy_per_class():
    live = []
    for bank, entries, best in naive_run():
        for c in range(7):
            if c in entries:
                assert torch.equal(bank.snapshot(int(bank.entry[c])), entries[c])
            else:
                assert bank.entry[c] == -1
        assert torch.equal(bank.best, best)
        assert len(bank) == len({tuple(t.tolist()) for t in entries.values()})
        assert bank.num_bytes == len(bank) * 33 * 4
        ids, masses, classes = bank.lumps()
        assert masses.sum() == len(entries)
        assert [bank.epochs[i] for i in ids] == sorted(bank.epochs[i] for i in ids)
        assert sorted(torch.cat(classes).tolist()) == sorted(entries)
        live.append(len(bank))
    assert max(live) <= 6  # never more than classes with an entry
    assert any(b < a for a, b in itertools.pairwise(live))  # some snapshots were dropped on the way


def test_nothing_is_copied_unless_a_class_improves(monkeypatch):
    bank = MemoryBank(3, 4)
    assert bank.update(torch.tensor([-1.0, -2.0, -3.0]), torch.ones(4), 0) == 3
    stored = []
    monkeypatch.setattr(bank, "_store", lambda *args: stored.append(args))
    assert bank.update(torch.tensor([-1.0, -2.0, torch.nan]), torch.zeros(4), 1) == 0
    assert not stored
    assert torch.equal(bank.snapshot(int(bank.entry[0])), torch.ones(4))


@pytest.mark.parametrize("block", [1, 8, 100])
def test_group_means(block):
    *_, (bank, entries, _) = naive_run()
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 1])  # class 6 has no entry and must not count
    got = bank.group_means(groups, 3, block)
    members = [[c for c in range(7) if groups[c] == j and c in entries] for j in range(3)]
    expected = torch.stack([torch.stack([entries[c] for c in m]).double().mean(0) for m in members])
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)  # float32 result; observed 2e-7
    unweighted = torch.stack([torch.stack([entries[c] for c in m[:1]]).double().mean(0) for m in members])
    assert (got.double() - unweighted).abs().max() > 1e-2
    ids, masses, _ = bank.lumps()
    alone = bank.group_means(torch.tensor([0, 0, 0, 0, 0, 0, 1]), 2, block)[1]
    assert torch.equal(alone, bank.snapshot(ids[int(masses.argmax())]))
    with pytest.raises(ValueError, match="empty"):
        MemoryBank(3, 4).group_means(torch.zeros(3, dtype=torch.long), 1)


def test_state_round_trip_through_safetensors(tmp_path):
    for i, (first, _, _) in enumerate(naive_run()):  # noqa: B007
        if i == 12:
            break
    save_file(first.state_dict(), tmp_path / "bank.safetensors")
    second = MemoryBank(7, 33)
    second.load_state_dict(load_file(tmp_path / "bank.safetensors"))
    generator = torch.Generator().manual_seed(9)
    for epoch in range(13, 20):
        quality, theta = torch.randn(7, generator=generator) + 1, torch.randn(33, generator=generator)
        assert first.update(quality, theta, epoch) == second.update(quality, theta, epoch)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert list(first.state_dict()) == list(second.state_dict())


def test_origin_is_kept_and_copied():
    theta = torch.arange(4.0)
    bank = MemoryBank(2, 4, origin=theta)
    theta.zero_()
    assert torch.equal(bank.origin, torch.arange(4.0))
    assert bank.num_bytes == 16
    other = MemoryBank(2, 4)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.origin, torch.arange(4.0))


def test_load_refuses_and_changes_nothing():
    *_, (bank, _, _) = naive_run()
    state = bank.state_dict()
    for target, match in [(MemoryBank(8, 33), "another model"), (MemoryBank(7, 34), "another model")]:
        with pytest.raises(UserError, match=match):
            target.load_state_dict(state)
        assert len(target) == 0
    with pytest.raises(UserError, match="not a memory bank"):
        MemoryBank(7, 33).load_state_dict({"weight": torch.zeros(3)})
    gone = f"snapshot.{int(bank.entry[0])}"
    with pytest.raises(UserError, match="damaged"):
        MemoryBank(7, 33).load_state_dict({k: v for k, v in state.items() if k != gone})


def test_bad_arguments():
    with pytest.raises(ValueError, match="positive"):
        MemoryBank(0, 3)
    bank = MemoryBank(3, 4)
    with pytest.raises(ValueError, match=r"shape \[3\]"):
        bank.update(torch.zeros(2), torch.zeros(4), 0)
    with pytest.raises(ValueError, match="4 elements"):
        bank.update(torch.zeros(3), torch.zeros(5), 0)
    assert bank.entry.tolist() == [-1, -1, -1]


class FakeCuda(torch.Tensor):
    """A host tensor that says it is on CUDA."""

    is_cuda = property(lambda self: True)


class FakeEvent:
    """A copy that lands only when its event is waited for; it is on the stream of its tensor's device."""

    landed = 0

    def record(self, stream=None):
        assert stream == "stream of cpu"

    def synchronize(self):
        FakeEvent.landed += 1


def test_asynchronous_copies_are_waited_for_before_any_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    bank = MemoryBank(3, 4)
    bank._pinned = torch.empty(4)  # real pinned memory needs a driver
    theta = torch.zeros(4).as_subclass(FakeCuda)
    for epoch in range(4):
        theta.fill_(epoch + 1)
        bank.update(torch.tensor([float(epoch), -float(epoch), torch.nan]), theta, epoch)
        assert FakeEvent.landed == epoch  # the copy before was settled, this one is on its way
    assert bank.lumps().masses.tolist() == [1, 1]
    assert FakeEvent.landed == 3
    assert torch.equal(bank.snapshot(int(bank.entry[0])), torch.full((4,), 4.0))
    assert torch.equal(bank.snapshot(int(bank.entry[1])), torch.ones(4))
    assert FakeEvent.landed == 4
    assert bank.num_bytes == (2 + 1) * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_copy_is_the_value_at_update():
    bank = MemoryBank(1, 1 << 20)
    theta = torch.zeros(1 << 20, device="cuda")
    for epoch in range(5):
        theta.fill_(epoch + 1)
        bank.update(torch.tensor([float(epoch)], device="cuda"), theta, epoch)
        theta.fill_(-1)  # the copy is ordered before this
    assert (bank.snapshot(int(bank.entry[0])) == 5).all()
    assert len(bank) == 1
    assert bank.num_bytes == 2 * 4 << 20


def test_a_rank_without_weights_keeps_the_same_table() -> None:
    whole, table = MemoryBank(3, 4, origin=torch.ones(4)), MemoryBank(3, 4, origin=torch.ones(4), holds=False)
    for epoch, quality in enumerate(([0.0, -1.0, -2.0], [1.0, -2.0, -1.0], [2.0, -3.0, -3.0])):
        for bank in (whole, table):
            bank.update(torch.tensor(quality), torch.full((4,), float(epoch)), epoch)
    for one, other in ((whole, table), (reloaded(whole, True), reloaded(whole, False))):
        assert torch.equal(one.entry, other.entry)
        assert torch.equal(one.best, other.best)
        assert one.epochs == other.epochs
        assert [len(c) for c in one.lumps().classes] == [len(c) for c in other.lumps().classes]
        assert other.num_bytes == 0 < one.num_bytes
    assert [name for name in table.state_dict() if name.startswith(WEIGHTS)] == []
    weights = [name for name in whole.state_dict() if name.startswith(WEIGHTS)]
    assert weights == ["origin", *(f"snapshot.{i}" for i in whole.epochs)]


def reloaded(bank: MemoryBank, holds: bool) -> MemoryBank:
    """A bank from the state of another, without its weights where they are not held."""
    state = bank.state_dict()
    if not holds:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(WEIGHTS)}
    other = MemoryBank(3, 4, holds=holds)
    other.load_state_dict(state)
    return other
