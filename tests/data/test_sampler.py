"""Sampling orders: what an epoch holds, where it stands, and that it depends on nothing but its arguments."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from ltfast.data.sampler import SAMPLERS, epoch_order, rank_slice, steps_per_epoch

COUNTS = (400, 150, 60, 20, 7, 1)
LABELS = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
N, C = len(LABELS), len(COUNTS)
GROUPS = torch.tensor([0, 0, 1, 1, 2, 3])
BATCH = 48
STEPS = math.ceil(N / BATCH)


def order(
    kind: str, epoch: int = 0, *, labels: Tensor = LABELS, batch: int = BATCH, seed: int = 5, total: int = 10
) -> Tensor:
    return epoch_order(
        kind, labels, batch=batch, seed=seed, epoch=epoch, epochs_total=total, group_of_class=GROUPS.clone()
    )


@pytest.mark.parametrize("kind", SAMPLERS)
def test_pure_function_with_static_shape(kind: str) -> None:
    first = order(kind, 3)
    assert first.shape == (STEPS * BATCH,)
    assert first.dtype == torch.int64
    assert first.min() >= 0
    assert first.max() < N
    torch.manual_seed(1)  # the global generator must not matter
    assert torch.equal(first, order(kind, 3))
    assert not torch.equal(first, order(kind, 4))
    assert not torch.equal(first, order(kind, 3, seed=6))


@pytest.mark.parametrize("batch", [1, 7, BATCH, N - 1, N])
def test_instance_is_a_permutation_filled_from_its_head(batch: int) -> None:
    o = order("instance", batch=batch)
    assert torch.equal(o[:N].sort().values, torch.arange(N))
    assert torch.equal(o[N:], o[: len(o) - N])


def test_instance_places_are_uniform() -> None:
    places = torch.stack([order("instance", e)[:N].argsort() for e in range(200)])
    # The mean place of every image over 200 epochs: normal with the variance of a uniform place.
    z = (places.double().mean(0) - (N - 1) / 2) / (N / math.sqrt(12 * 200))
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3


def group_table(o: Tensor) -> Tensor:
    """Images of each group in each batch, [steps, groups]."""
    return torch.nn.functional.one_hot(GROUPS[LABELS[o]], 4).view(STEPS, -1, 4).sum(1)


def test_group_stratified_holds_the_instance_epoch_in_even_parts() -> None:
    for epoch in range(20):
        o, plain = order("group-stratified", epoch), order("instance", epoch)
        assert torch.equal(o.sort().values, plain.sort().values)  # the same images as often: unbiased by construction
        table, total = group_table(o), group_table(o).sum(0)
        assert (table >= total // STEPS).all()
        assert (table <= (total + STEPS - 1) // STEPS).all()
        assert (table[:, total >= STEPS] >= 1).all()
    assert not (group_table(plain) >= total // STEPS).all()  # instance does not pass the same test


def test_group_stratified_batch_and_place_of_an_image_are_uniform() -> None:
    tail = N - 1  # the only image of its class and group
    found = [int((order("group-stratified", e) == tail).nonzero()[0]) for e in range(600)]
    where = torch.tensor(found)
    assert stats.chisquare((where // BATCH).bincount(minlength=STEPS).numpy()).pvalue > 1e-3
    assert stats.chisquare((where % BATCH).bincount(minlength=BATCH).numpy()).pvalue > 1e-3


def test_one_group_is_instance_rearranged() -> None:
    o = epoch_order(
        "group-stratified", LABELS, batch=N, seed=5, epoch=0, group_of_class=torch.zeros(C, dtype=torch.int64)
    )
    assert torch.equal(o.sort().values, torch.arange(N))


def expected_shares(kind: str, t: float) -> Tensor:
    n = torch.tensor(COUNTS, dtype=torch.float64)
    return {
        "class-balanced": torch.full((C,), 1 / C, dtype=torch.float64),
        "sqrt": n.sqrt() / n.sqrt().sum(),
        "progressive": (1 - t) * n / n.sum() + t / C,
    }[kind]


@pytest.mark.parametrize("kind", ["class-balanced", "sqrt", "progressive"])
@pytest.mark.parametrize("epoch", [0, 4, 9])
def test_class_shares(kind: str, epoch: int) -> None:
    o = order(kind, epoch)
    drawn = LABELS[o].bincount(minlength=C)
    expected = expected_shares(kind, epoch / 9) * len(o)
    assert ((drawn - expected).abs() < 1).all()
    wrong = expected_shares(kind, epoch / 9).flip(0) * len(o)
    assert not ((drawn - wrong).abs() < 1).all() or kind == "class-balanced" or epoch == 9
    times = o.bincount(minlength=N)
    for c in range(C):  # inside a class nobody comes again before everybody came
        assert times[c == LABELS].max() - times[c == LABELS].min() <= 1


def test_class_shares_are_unbiased_and_images_alike() -> None:
    drawn = torch.stack([LABELS[order("sqrt", e)].bincount(minlength=C) for e in range(400)]).double()
    expected = expected_shares("sqrt", 0) * STEPS * BATCH
    assert ((drawn.mean(0) - expected).abs() < 4 * 0.5 / math.sqrt(400)).all()
    times = sum(order("sqrt", e).bincount(minlength=N) for e in range(100))
    head = times[LABELS == 0]
    assert stats.chisquare(head.numpy()).pvalue > 1e-3  # thinner than Poisson: drawn without replacement


def test_batches_mix_classes() -> None:
    table = torch.nn.functional.one_hot(LABELS[order("class-balanced")], C).view(STEPS, BATCH, C).sum(1)
    assert (table >= 1).all()


def test_a_class_without_images_gets_nothing() -> None:
    labels = LABELS + (LABELS >= 2)  # class 2 of 7 is empty
    for kind in ("class-balanced", "sqrt", "progressive"):
        o = epoch_order(kind, labels, batch=BATCH, seed=1, epoch=9, epochs_total=10)
        assert o.shape == (STEPS * BATCH,)
        assert (labels[o].bincount(minlength=7)[2] == 0).all()


@pytest.mark.parametrize("kind", SAMPLERS)
def test_many_classes(kind: str) -> None:
    """C = 8142 with natural counts; batch 1000 divides nothing."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.rand(8142, generator=rng) ** 6 + 1e-3
    labels = torch.cat([torch.arange(8142), torch.multinomial(weight, 60_000, True, generator=rng)])
    groups = torch.randint(0, 4, (8142,), generator=rng)
    o = epoch_order(kind, labels, batch=1000, seed=0, epoch=1, epochs_total=2, group_of_class=groups)
    assert len(o) == 69_000
    assert len(torch.unique(labels[o])) == 8142


def test_rank_slices_make_up_the_global_batch() -> None:
    o = order("instance")
    parts = [rank_slice(o, BATCH, rank, 3) for rank in range(3)]
    assert parts[0].shape == (STEPS, 16)
    assert torch.equal(torch.cat(parts, 1).flatten(), o)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("uniform", {}, "kind must be one of"),
        ("instance", {"batch": 0}, "batch must be in 1.."),
        ("instance", {"batch": N + 1}, "batch must be in 1.."),
        ("group-stratified", {"group_of_class": None}, "group_of_class"),
        ("progressive", {"epochs_total": None}, "epochs_total"),
    ],
)
def test_bad_arguments(kind: str, change: dict, message: str) -> None:
    arguments = {"batch": BATCH, "seed": 0, "epoch": 0, "epochs_total": 3, "group_of_class": GROUPS} | change
    with pytest.raises(ValueError, match=message):
        epoch_order(kind, LABELS, **arguments)


@pytest.mark.parametrize(("rank", "world"), [(0, 5), (3, 3), (-1, 2), (0, 0)])
def test_bad_ranks(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="world"):
        rank_slice(order("instance"), BATCH, rank, world)


def test_steps_per_epoch() -> None:
    assert [steps_per_epoch(n, 4) for n in (4, 5, 8, 9)] == [1, 2, 2, 3]
