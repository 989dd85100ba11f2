"""Collectives, gradient reduction, synced BatchNorm and votes on 2 gloo processes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ltfast.dist import Ranks, Traffic, checksum
from ltfast.errors import UserError
from ltfast.flat import FlatParameters
from ltfast.models import LongTailModel
from ltfast.reduce import Agreement, GradientReducer
from ltfast.survive import VOTE_SECONDS, VOTE_STEPS_MAX, Action, BadSteps, Signals, Watch
from ltfast.syncbn import SyncedBatchNorm, synchronise
from tests.procs import run_ranks

pytestmark = pytest.mark.dist


def test_alone_nothing_happens() -> None:
    ranks, x = Ranks(), torch.ones(3)
    assert ranks.sum_(x) is x
    assert ranks.mean_(x) is x
    assert ranks.gather(x).shape == (1, 3)
    assert ranks.share({"a": 1}) == {"a": 1}
    assert ranks.tensors({"x": x})["x"] is x
    ranks.check_same(x, "x")
    assert ranks.traffic.calls == 0


def test_checksum_sees_every_bit_and_place() -> None:
    x = torch.randn(1000)
    base = int(checksum(x))
    for i in range(0, 1000, 37):
        for bit in (0, 13, 31):
            y = x.clone()
            y.view(torch.int32)[i] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
            assert int(checksum(y)) != base
    y = x.clone()
    y[3], y[4] = x[4], x[3]
    assert int(checksum(y)) != base
    weights = torch.arange(1, 2 * 5_000_000, 2)
    big = torch.randn(5_000_000)  # more than one block
    assert int(checksum(big)) == int((big.view(torch.int32).long() * weights).sum())


def primitives(ranks: Ranks) -> dict[str, Any]:
    result: dict[str, Any] = {"rank": ranks.rank, "local": ranks.local_rank}
    result["mean"] = ranks.mean_(torch.tensor([float(ranks.rank), 4.0]))
    result["gather"] = ranks.gather(torch.tensor([ranks.rank]))
    result["broadcast"] = ranks.broadcast_(torch.tensor([5.0 + ranks.rank]))
    result["columns"] = ranks.gather(torch.arange(6.0).view(2, 3).T + 10 * ranks.rank)
    total = Traffic()
    with ranks.traffic.noted_in(total):
        ranks.sum_(torch.zeros(3))
    with ranks.traffic.noted_in(total):
        ranks.sum_(torch.zeros(2))
    result["noted"] = (total.calls, total.bytes)
    held = {"held.a": torch.ones(2), "sent": torch.arange(6.0).view(2, 3).T}
    result["held"] = ranks.tensors(held if ranks.main else None, kept=("held.",))
    result["share"] = ranks.share({"text": "e\u0301", "n": [1, 2]} if ranks.main else None)
    named = {"b": torch.tensor([True, False]), "e": torch.zeros(0, 3), "h": torch.arange(6).view(2, 3).half()}
    result["tensors"] = ranks.tensors(named if ranks.main else None)

    def fails() -> None:
        raise UserError("only rank 0 can see this")

    try:
        ranks.on_main(fails)
    except UserError as error:
        result["error"] = str(error)
    same = torch.randn(10, generator=torch.Generator().manual_seed(0))
    ranks.check_same(same, "numbers")
    for name, change in (("less", -1), ("more", 1)):
        other = same.clone()
        other.view(torch.int32)[7] += change * ranks.rank
        try:
            ranks.check_same(other, "numbers")
        except UserError as error:
            result[name] = str(error)
    return result


def test_primitives(tmp_path: Path) -> None:
    for rank, result in enumerate(run_ranks(2, tmp_path, primitives)):
        assert result["rank"] == result["local"] == rank
        assert result["mean"].tolist() == [0.5, 4.0]
        assert result["gather"].tolist() == [[0], [1]]
        assert result["broadcast"].tolist() == [5.0]
        columns = torch.arange(6.0).view(2, 3).T
        assert result["columns"].tolist() == [columns.tolist(), (columns + 10).tolist()]
        assert result["noted"] == (2, 20)
        assert list(result["held"]) == (["held.a", "sent"] if rank == 0 else ["sent"])
        assert result["held"]["sent"].tolist() == columns.tolist()
        assert result["share"] == {"text": "e\u0301", "n": [1, 2]}
        assert result["error"] == "only rank 0 can see this"
        for name in ("less", "more"):
            assert result[name].startswith("ranks [1] hold other numbers than rank 0")
        tensors = result["tensors"]
        assert tensors["b"].tolist() == [True, False]
        assert tensors["e"].shape == (0, 3)
        assert tensors["h"].dtype == torch.float16
        assert tensors["h"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


class Net(nn.Module):
    """Layers of odd sizes, one of them unused, so that spans end in odd places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused, self.c = nn.Linear(5, 7), nn.Linear(7, 11), nn.Linear(3, 3), nn.Linear(11, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def reductions(ranks: Ranks) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Net()
    flat = FlatParameters(net.parameters(), rows=2)
    reducer = GradientReducer(flat, ranks, bucket_bytes=256)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))[4 * ranks.rank : 4 * ranks.rank + 4]
    flat.attach(1)
    net(x).square().mean().backward()  # an ascent's backward: stays here
    local = flat.grads[1].clone()
    calls = ranks.traffic.calls
    flat.attach(0)
    reducer.arm(flat.grads[0])
    net(x).square().mean().backward()
    early = len(reducer._work)
    reducer.finish(torch.tensor(0.0))
    result = {
        "spans": [(s.start, s.stop) for s in reducer.spans], "early": early, "calls": ranks.traffic.calls - calls, "size": flat.size,
        "mean": flat.grads[0].clone(), "local": local, "untouched": torch.equal(local, flat.grads[1]),
    }  # fmt: skip
    reducer.arm(flat.attach(0))
    net(x).square().mean().backward()
    result["early again"] = len(reducer._work)
    reducer.finish(torch.tensor(float(ranks.rank == 1)))
    result["poisoned"] = bool(flat.grads[0].isnan().any())
    used = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 2))
    flat = FlatParameters(used.parameters(), rows=1)
    reducer = GradientReducer(flat, ranks, bucket_bytes=256)
    reducer.arm(flat.attach(0))
    used(x).square().mean().backward()
    result["held back"] = len(reducer.spans) - len(reducer._work)
    reducer.finish(torch.tensor(float(ranks.rank == 1)))
    result["all used, poisoned"] = bool(flat.grads[0].isnan().any())
    return result


@pytest.mark.parametrize("least", [1, 256, 400, 1 << 30])
def test_every_parameter_is_in_a_span_whatever_the_least_size(least: int) -> None:
    flat = FlatParameters(Net().parameters(), rows=1)
    reducer = GradientReducer(flat, Ranks(), bucket_bytes=least)
    spans = [(s.start, s.stop) for s in reducer.spans]
    assert [spans[0][1], spans[-1][0]] == [flat.size, 0]
    assert all(later[1] == earlier[0] for earlier, later in pairwise(spans))
    assert all(4 * (stop - start) >= least for start, stop in spans[:-1])
    assert sum(reducer._members) == len(flat.params)


def test_gradient_reduction(tmp_path: Path) -> None:
    results = run_ranks(2, tmp_path, reductions)
    torch.manual_seed(0)
    net = Net()
    flat = FlatParameters(net.parameters(), rows=1)
    flat.attach(0)
    net(torch.randn(8, 5, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    for result in results:
        spans = result["spans"]
        assert len(spans) > 2
        assert [spans[0][1], spans[-1][0]] == [result["size"], 0]
        assert all(later[1] == earlier[0] for earlier, later in pairwise(spans))
        assert result["calls"] == len(spans), "one call a span, none for the ascent"
        assert result["untouched"]
        assert result["early"] == result["early again"] >= 1, "the last layer's span left before backward ended"
        assert result["poisoned"], "one rank's bad loss must reach the other's gradient"
        assert result["held back"] == 1, "the span that carries the word of a bad loss waits for it"
        assert result["all used, poisoned"]
        torch.testing.assert_close(result["mean"], flat.grads[0], rtol=1e-5, atol=1e-7)  # observed 3e-8
    assert torch.equal(results[0]["mean"], results[1]["mean"])
    assert not torch.allclose(results[0]["mean"], results[0]["local"], rtol=1e-3)


def agreements(ranks: Ranks) -> dict[str, Any]:
    shares = torch.tensor([[0.75, 0.25, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0]])[ranks.rank]
    losses = torch.tensor([[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 5.0, 0.0]])[ranks.rank]
    matrix = torch.full((4, 4), 1.0 + ranks.rank, dtype=torch.float64)
    local, whole = Agreement(ranks), Agreement(ranks, True)
    agreed, gram = local.remembered(shares, matrix)
    assert torch.equal(local.remembered(shares)[0], agreed)
    scaled, w = whole.losses(losses, shares)
    own_shares = shares.clone()
    z = torch.arange(8.0).view(4, 2) + 100 * ranks.rank
    z.requires_grad_()
    labels = torch.tensor([0, 1]) + 10 * ranks.rank
    everyone_z, everyone, own = whole.contrast(z, labels)
    (everyone_z * torch.arange(8.0)[:, None] * (1 + ranks.rank)).sum().backward()
    return {
        "local": local.losses(losses, shares), "mean": ranks.mean_(scaled.clone()), "own shares": own_shares, "shares": w, "agreed": agreed,
        "gram": gram, "z": everyone_z.detach(), "labels": everyone, "own": everyone[own], "grad": z.grad,
        "rows": whole.rows(torch.full((2, 2), float(ranks.rank))), "local_rows": local.rows(torch.full((2, 2), float(ranks.rank))),
    }  # fmt: skip


def test_agreement(tmp_path: Path) -> None:
    for rank, result in enumerate(run_ranks(2, tmp_path, agreements)):
        assert result["local"][0].tolist() == [[1.0, 2.0, 0.0, 0.0], [3.0, 0.0, 5.0, 0.0]][rank]
        assert result["own shares"].tolist() == [[0.75, 0.25, 0.0, 0.0], [0.25, 0.0, 0.75, 0.0]][rank]
        # Both ranks have 4 samples: group 0 has 3 of loss 1 and 1 of loss 3, group 1 one of loss 2, group 2 three of loss 5.
        assert result["mean"].tolist() == [1.5, 2.0, 5.0, 0.0]
        assert result["shares"].tolist() == result["agreed"].tolist() == [0.5, 0.125, 0.375, 0.0]
        never = 0.0  # groups 1 and 2 never met
        assert result["gram"][:3, :3].tolist() == [[1.5, 1.0, 2.0], [1.0, 1.0, never], [2.0, never, 2.0]]
        assert not result["gram"][3].any()
        assert not result["gram"][:, 3].any()
        assert result["labels"].tolist() == [[0, 1, 10, 11], [10, 11, 0, 1]][rank], "a rank's own come first"
        assert result["own"].tolist() == [[0, 1], [10, 11]][rank]
        views = [[0, 2, 100, 102, 4, 6, 104, 106], [100, 102, 0, 2, 104, 106, 4, 6]]
        assert result["z"][:, 0].tolist() == views[rank], "view 2 of all, then view 3 of all"
        own, others = torch.tensor([0.0, 1, 4, 5]), torch.tensor([2.0, 3, 6, 7])  # weights of places
        theirs = 1 + (1 - rank)
        expected = (1 + rank) * own + theirs * others
        assert result["grad"].tolist() == expected[:, None].expand(4, 2).tolist(), "both ranks' losses, 1 and 2 times"
        assert result["rows"].flatten().tolist() == [0.5] * 4
        assert result["local_rows"].flatten().tolist() == [float(rank)] * 4


def batchnorms(ranks: Ranks, momentum: float | None) -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, momentum=momentum), nn.ReLU(),
        nn.Flatten(), nn.Linear(80, 4, bias=False), nn.BatchNorm1d(4),
    )  # fmt: skip
    synchronise(net, ranks)
    x = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    part = 12 // ranks.world
    for _ in range(2):
        out = net(x[part * ranks.rank : part * (ranks.rank + 1)])
    net.zero_grad()
    (out * torch.arange(4.0)).exp().mean().backward()
    grads = {k: ranks.mean_(p.grad) for k, p in net.named_parameters()}
    return {"out": out.detach(), "grads": grads, "state": dict(net.state_dict())}


@pytest.mark.parametrize("momentum", [0.1, None])
def test_synced_batchnorm_is_batchnorm_of_the_whole_batch(tmp_path: Path, momentum: float | None) -> None:
    results = run_ranks(2, tmp_path, batchnorms, momentum)
    alone = batchnorms(Ranks(), momentum)
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}  # observed 1e-6
    torch.testing.assert_close(torch.cat([r["out"] for r in results]), alone["out"], **close)
    for result in results:
        torch.testing.assert_close(result["state"], alone["state"], **close)
        torch.testing.assert_close(result["grads"], alone["grads"], **close)


def test_the_class_centres_are_a_batch_that_every_rank_has_whole() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = LongTailModel(encoder, 6, 5, projection=(7, 3))
    synchronise(model, Ranks(0, 2))
    norms = {name.split(".")[0]: type(part) for name, part in model.named_modules() if isinstance(part, _BatchNorm)}
    assert norms == {"encoder": SyncedBatchNorm, "projection": SyncedBatchNorm, "center_projection": nn.BatchNorm1d}


@pytest.mark.parametrize(
    ("dtype", "side"), [(torch.float16, 257), (torch.bfloat16, 257), (torch.bfloat16, 17), (torch.float32, 17)]
)
def test_synced_batchnorm_counts_16_bit_pictures_exactly(dtype: torch.dtype, side: int) -> None:
    """257 x 257 positions are more than fp16 can hold, and neither they nor 17 x 17 are numbers that bf16 has."""
    x = (3 + 2 * torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(1))).to(dtype)
    expected, synced = nn.BatchNorm2d(2), SyncedBatchNorm(2)
    exact, found = expected(x.float()), synced(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, exact.to(dtype), rtol=8e-3, atol=1e-5)  # one rounding of bf16 at the most
    torch.testing.assert_close(synced.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-5)  # observed 2e-6


def votes(ranks: Ranks) -> list[tuple[Any, int]]:
    """Rank 1 is told to stop before step 7; what each rank does after which step."""
    clock = iter(range(10**6))
    signals, seen = Signals(), []
    watch = Watch(ranks, signals, checkpoint_minutes=20 / 60, busy=lambda: False, clock=lambda: next(clock) * 1.0)
    for step in range(40):
        if step == 7 and ranks.rank == 1:
            signals.received = 15
        action = watch.after_step()
        if action is Action.CHECKPOINT:
            watch.saved()
        if action:
            seen.append((step, int(action)))
        if action is Action.STOP:
            break
    signals.received = 15  # the launcher hands it on to all of them
    for _ in range(4):  # the vote under way is still of one rank
        watch.after_step()
    seen.append((watch.reason, 0))
    return seen


def test_all_ranks_act_at_the_same_step(tmp_path: Path) -> None:
    first, second = run_ranks(2, tmp_path, votes)
    assert first == second
    assert first.pop() == ("stopped by SIGTERM", 0)
    assert first[-1][1] == Action.STOP
    assert 7 <= first[-1][0] <= 12


def bad_steps(ranks: Ranks, folder: str) -> str:
    counter = torch.zeros(())
    watch = BadSteps(3, counter, ranks, Path(folder) if ranks.main else None)
    for batch in range(20):
        counter.copy_((counter + 1) * (batch >= 4))
        try:
            watch.after_step(0, batch, torch.tensor([10 * batch + ranks.rank]))
        except UserError as error:
            return str(error)
    return ""


def test_bad_steps_stop_every_rank_and_name_all_images(tmp_path: Path) -> None:
    import json

    first, second = run_ranks(2, tmp_path / "ranks", bad_steps, str(tmp_path))
    assert first.startswith("5 steps in a row")
    assert f"are in {tmp_path}/bad_steps.json" in first
    assert second == first, "whichever is told, it names rank 0's file"
    rows = json.loads((tmp_path / "bad_steps.json").read_text())["steps"]
    assert [row["batch"] for row in rows] == [4, 5, 6, 7, 8]
    assert rows[0]["index"] == [40, 41]


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
def test_synced_batchnorm_without_weights_or_statistics(options: dict[str, bool]) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(SyncedBatchNorm(3, **options)(x), nn.BatchNorm1d(3, **options)(x), rtol=1e-5, atol=1e-5)


class Backwards(Net):
    """Its last layer comes first: backward fills the flat row from its beginning."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.c, self.b, self.a = nn.Linear(11, 2), nn.Linear(7, 11), nn.Linear(5, 7)


def reduced_backwards(ranks: Ranks) -> tuple[int, Tensor]:
    torch.manual_seed(0)
    net = Backwards()
    flat = FlatParameters(net.parameters(), rows=1)
    reducer = GradientReducer(flat, ranks, bucket_bytes=256)
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).chunk(ranks.world)[ranks.rank]
    reducer.arm(flat.attach(0))
    net(x).square().mean().backward()
    reducer.finish(torch.tensor(0.0))
    return len(reducer.spans), flat.grads[0].clone()


def reduced_backwards_alone() -> Tensor:
    torch.manual_seed(0)
    net = Backwards()
    flat = FlatParameters(net.parameters(), rows=1)
    flat.attach(0)
    net(torch.randn(8, 5, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    return flat.grads[0].clone()


def test_a_span_waits_for_those_before_it_whatever_the_order_of_backward(tmp_path: Path) -> None:
    expected = reduced_backwards_alone()
    for spans, mean in run_ranks(2, tmp_path, reduced_backwards):
        assert spans > 2
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)


def contrast_of_three(ranks: Ranks) -> tuple[list[int], Tensor]:
    """Rank r's loss is sum of w_r(b) z_b, b the whole batch's numbers, own first."""
    z = torch.zeros(2, 1, requires_grad=True)  # one picture, two views
    everyone_z, labels, own = Agreement(ranks, True).contrast(z, torch.tensor([ranks.rank]))
    assert labels[own].tolist() == [ranks.rank]
    weights = torch.tensor([10.0**r for r in labels.tolist()]) * (1 + ranks.rank)  # of each picture, by its label
    (everyone_z * weights.repeat(2)[:, None]).sum().backward()
    assert z.grad is not None
    return labels.tolist(), z.grad


def test_three_ranks_each_get_what_all_losses_say_of_their_own(tmp_path: Path) -> None:
    """With two of them, one place on and one place back are the same."""
    for rank, (labels, grad) in enumerate(run_ranks(3, tmp_path, contrast_of_three)):
        assert labels == [rank, (rank + 1) % 3, (rank + 2) % 3]
        assert grad.tolist() == [[10.0**rank * (1 + 2 + 3)]] * 2


def between_epochs(ranks: Ranks) -> list[Any]:
    """Told to stop between two epochs: rank 1 alone, then both, as the launcher does; a vote of the steps is under way."""
    found = []
    for told in ((1,), (0, 1)):
        signals = Signals()
        watch = Watch(ranks, signals)
        assert [watch.after_step() for _ in range(3)] == [Action.GO] * 3
        signals.received = 15 * (ranks.rank in told)
        found += [watch.between_epochs(), watch.reason]
    return found


def test_all_ranks_stop_between_the_same_epochs(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, between_epochs) == [[Action.STOP, "stopped by SIGTERM"] * 2] * 2


def pace(ranks: Ranks, seconds: float) -> tuple[list[int], int]:
    """Intervals between votes where a step takes rank 0 `seconds` and rank 1 twice that; the steps until a signal is acted upon."""
    now = [0.0]
    signals, intervals = Signals(), []
    watch = Watch(ranks, signals, clock=lambda: now[0])
    for step in range(600):
        now[0] += seconds * (1 + ranks.rank)
        if step == 300 and ranks.rank == 1:
            signals.received = 15
        if watch.after_step() is Action.STOP:
            return intervals, step - 300
        intervals.append(watch._interval)
    return intervals, -1


@pytest.mark.parametrize(("seconds", "interval"), [(0.0625, 4), (1e-6, VOTE_STEPS_MAX), (3.0, 1)])
def test_votes_keep_to_the_pace_of_the_slowest_rank(tmp_path: Path, seconds: float, interval: int) -> None:
    assert interval == max(1, min(int(VOTE_SECONDS / (2 * seconds)), VOTE_STEPS_MAX))
    first, second = run_ranks(2, tmp_path, pace, seconds)
    assert first == second
    intervals, steps = first
    assert set(intervals[150:]) == {interval}
    assert 0 <= steps <= 2 * interval
