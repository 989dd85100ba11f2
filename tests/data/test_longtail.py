"""Counts and subsets against the field's own procedure (LDAM's imbalance_cifar, written again from its description)."""

# ruff: noqa: NPY002 (the legacy generator is the field's)
import numpy as np
import pytest

from ltfast.data.longtail import (
    first_of_each_class,
    limited_counts,
    long_tail_counts,
    select_subset,
)
from ltfast.errors import UserError

CIFAR10 = np.random.default_rng(3).permutation(np.repeat(np.arange(10), 5000))


def test_published_counts() -> None:
    ten = long_tail_counts(5000, 10, 100)
    assert ten.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert ten.sum() == 12_406
    hundred = long_tail_counts(500, 100, 100)
    assert (hundred[0], hundred[-1], hundred.sum()) == (500, 5, 10_847)
    assert long_tail_counts(5000, 10, 1).tolist() == [5000] * 10
    assert long_tail_counts(5000, 10, 10)[-1] == 500
    assert long_tail_counts(5000, 10, 100, "step").tolist() == [5000] * 5 + [50] * 5
    assert long_tail_counts(30, 1, 100).tolist() == [30]


def field_subset(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """np.random.seed(0); shuffle the positions of each class in turn, keep the first n_c."""
    state = np.random.get_state()
    try:
        np.random.seed(0)
        parts = []
        for c, keep in enumerate(counts):
            positions = np.where(labels == c)[0]
            np.random.shuffle(positions)
            parts.append(positions[:keep])
    finally:
        np.random.set_state(state)
    return np.concatenate(parts)


def test_subset_is_the_fields() -> None:
    counts = long_tail_counts(5000, 10, 100)
    subset = select_subset(CIFAR10, counts)
    assert np.array_equal(subset.train, field_subset(CIFAR10, counts))
    assert len(subset.val) == 0
    assert not np.array_equal(select_subset(CIFAR10, counts, seed=1).train, subset.train)


def test_validation_leaves_the_fields_images_where_it_can() -> None:
    counts = long_tail_counts(5000, 10, 100)
    subset, field = select_subset(CIFAR10, counts, 50), field_subset(CIFAR10, counts)
    assert np.bincount(CIFAR10[subset.val]).tolist() == [50] * 10
    assert np.bincount(CIFAR10[subset.train]).tolist() == [4950, *counts[1:]]
    assert not set(subset.train) & set(subset.val)
    assert np.array_equal(subset.train[4950:], field[5000:])
    assert np.array_equal(subset.train[:4950], field[:4950])


@pytest.mark.parametrize("limit", [6, 50, 333, 636, 637, 638, 10_000])
def test_limit_keeps_proportions(limit: int) -> None:
    counts = np.array([400, 150, 60, 20, 7, 1])
    kept = limited_counts(counts, limit)
    assert kept.sum() == min(limit, 638)
    assert (kept >= 1).all()
    assert (kept <= counts).all()
    if limit >= 333:
        assert (np.abs(kept - counts * min(1, limit / 638)) < 1).all()


def test_first_of_each_class() -> None:
    labels = np.array([2, 0, 0, 1, 2, 2, 0, 1])
    assert first_of_each_class(labels, np.array([2, 1, 2])).tolist() == [0, 1, 2, 3, 4]
    assert first_of_each_class(labels, np.array([0, 2, 1])).tolist() == [0, 3, 7]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: long_tail_counts(50, 10, 0.5), "--imbalance 0.5"),
        (lambda: long_tail_counts(50, 10, float("nan")), "--imbalance nan"),
        (lambda: long_tail_counts(50, 10, 2, "linear"), "--imbalance-type 'linear'"),
        (lambda: limited_counts(np.full(10, 5), 9), "--limit-train 9"),
        (lambda: select_subset(np.repeat(np.arange(2), 5), np.array([5, 0])), "class 1 keeps none of its 5 images"),
        (lambda: select_subset(np.zeros(5, int), np.array([5, 5])), "class 1 has no image"),
        (lambda: select_subset(np.zeros(5, int), np.array([5]), -1), "--val-per-class -1"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
