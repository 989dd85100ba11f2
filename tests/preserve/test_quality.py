"""Streaming quality against features that were stored and reduced class by class."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ltfast.preserve.quality import VARIANCE_FLOOR, QualityStats, nearest_other


def stored_quality(features, labels, num_classes, lambda_q, floor=VARIANCE_FLOOR, spread_term=True):
    """The equations, one class at a time, in float64."""
    features = features.double()
    centroid = {c: features[labels == c].mean(0) for c in range(num_classes) if (labels == c).any()}
    quality = torch.full((num_classes,), -torch.inf, dtype=torch.float64)
    for c, mean in centroid.items():
        v = (features[labels == c] - mean).square().sum(1).mean().item()
        d = min((mean - other).norm().item() for k, other in centroid.items() if k != c)
        quality[c] = -1.0 / d - (lambda_q * math.log(max(v, floor)) if spread_term else 0.0)
    return quality


def batches_of(features, labels, sizes=(5, 1, 7, 64)):
    start = 0
    while start < len(labels):
        for size in sizes:
            yield features[start : start + size], labels[start : start + size]
            start += size


def example(dtype=torch.float32, num_classes=11, dim=13, n=301, offset=3.0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes - 1, (n,), generator=generator)  # the last class is never seen
    centres = torch.randn(num_classes, dim, generator=generator)
    features = centres[labels] + 0.3 * torch.randn(n, dim, generator=generator) + offset
    features, labels = torch.cat([features, centres[-2:-1] * 5]), torch.cat([labels, torch.tensor([num_classes - 2])])
    return features.to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lambda_q", [1.0, 0.25])
def test_streaming_equals_stored_features(dtype, lambda_q):
    features, labels = example(dtype)
    stats = QualityStats(11, 13)
    for f, y in batches_of(features, labels):
        stats.update(f, y)
    got = stats.compute(lambda_q, chunk=4)
    expected = stored_quality(features, labels, 11, lambda_q)
    torch.testing.assert_close(got.quality, expected, rtol=1e-10, atol=1e-10)  # observed 2e-14
    assert got.quality[-1] == -torch.inf
    seen = expected.isfinite()
    assert (expected[seen].abs() > 1e-3).all()  # zeros would not pass
    wrong = stored_quality(features, labels, 11, lambda_q, spread_term=False)
    assert ((got.quality - wrong)[seen].abs() > 1e-3).all()


def test_large_common_offset_does_not_cancel():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(3).repeat(200)
    features = 1e3 + torch.randn(3, 8, generator=generator)[labels] + 1e-2 * torch.randn(600, 8, generator=generator)
    stats = QualityStats(3, 8)
    stats.update(features, labels)
    expected = stored_quality(features, labels, 3, 1.0)
    torch.testing.assert_close(stats.compute().quality, expected, rtol=1e-5, atol=0)  # observed 4e-7
    # The same sums in float32 are useless here: that is why they are float64.
    f = features[labels == 0]
    naive = f.square().sum(1).mean() - f.mean(0).square().sum()
    assert abs(naive.item() / stats.compute().variance[0].item() - 1) > 0.1


def test_single_image_uses_the_floor_and_distance_decides():
    stats = QualityStats(2, 3)
    stats.update(torch.eye(3)[:2], torch.tensor([0, 1]))
    near = stats.compute()
    torch.testing.assert_close(near.variance, torch.zeros(2, dtype=torch.float64))
    expected = -1.0 / math.sqrt(2) - math.log(VARIANCE_FLOOR)
    torch.testing.assert_close(near.quality, torch.full((2,), expected, dtype=torch.float64))
    stats.reset()
    stats.update(torch.eye(3)[:2] * 4, torch.tensor([0, 1]))
    assert (stats.compute().quality > near.quality).all()


def test_one_class_only_has_no_neighbour():
    stats = QualityStats(4, 2)
    stats.update(torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([2, 2]))
    got = stats.compute()
    assert got.distance[2] == torch.inf
    assert got.quality[2] == 0.0  # -1/inf - log 1
    assert torch.equal(got.quality.isfinite(), torch.tensor([False, False, True, False]))


def test_no_class_seen_has_no_distance():
    got = QualityStats(3, 2).compute()
    assert (got.distance == torch.inf).all()
    assert (got.quality == -torch.inf).all()
    assert torch.equal(
        nearest_other(torch.eye(3).double(), torch.tensor([True, False, False])), torch.full((3,), torch.inf).double()
    )


def test_not_finite_features_and_equal_centroids_never_win():
    stats = QualityStats(4, 2)
    rows = torch.tensor([[torch.nan, 0.0], [1.0, 1.0], [1.0, 1.0], [2.0, 5.0]])
    stats.update(rows, torch.arange(4))
    got = stats.compute()
    assert torch.equal(got.quality.isfinite(), torch.tensor([False, False, False, True]))
    assert (got.quality[:3] == -torch.inf).all()


def test_a_batch_that_does_not_count_leaves_no_trace():
    stats, twin = QualityStats(4, 2), QualityStats(4, 2)
    rows, labels = torch.randn(8, 2), torch.arange(8) % 4
    for each in (stats, twin):
        each.update(rows, labels, torch.tensor(1.0))
    stats.update(torch.full((4, 2), torch.nan), torch.arange(4), torch.tensor(0.0))
    assert torch.equal(stats.flat, twin.flat)


def test_two_ranks_add_up():
    features, labels = example()
    ranks = [QualityStats(11, 13) for _ in range(2)]
    whole = QualityStats(11, 13)
    whole.update(features, labels)
    for rank, stats in enumerate(ranks):
        stats.update(features[rank::2], labels[rank::2])
    ranks[0].flat.add_(ranks[1].flat)  # what an all-reduce does
    torch.testing.assert_close(ranks[0].compute().quality, whole.compute().quality, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ranks[0].counts, torch.bincount(labels, minlength=11).double())


@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
def test_nearest_other_in_blocks(chunk):
    x = torch.randn(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(23, dtype=torch.bool)
    valid[[0, 9, 22]] = False
    table = torch.cdist(x, x).masked_fill(torch.eye(23, dtype=torch.bool) | ~valid[None], torch.inf)
    got = nearest_other(x, valid, chunk)
    torch.testing.assert_close(got[valid], table.amin(1)[valid], rtol=1e-9, atol=1e-9)


def test_nearest_other_far_from_the_origin():
    x = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 1e-3
    valid = torch.ones(9, dtype=torch.bool)
    torch.testing.assert_close(nearest_other(x + 1e6, valid), nearest_other(x, valid), rtol=1e-5, atol=0)


def test_inaturalist_class_count():
    stats = QualityStats(8142, 3)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(8142, 3, generator=generator)
    stats.update(features, torch.arange(8142))
    got = stats.compute().distance
    pick = torch.tensor([0, 511, 512, 4097, 8141])
    table = torch.cdist(features.double()[pick], features.double())
    torch.testing.assert_close(got[pick], table.topk(2, largest=False).values[:, 1], rtol=1e-6, atol=1e-9)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_update_reads_nothing_back_to_the_host():
    stats = QualityStats(5, 3)
    features, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 4, 4, 1])
    with Ops() as ops:
        stats.update(features, labels)
    assert any("index_add" in name for name in ops.names)
    assert not [n for n in ops.names if any(sync in n for sync in ("_local_scalar_dense", "nonzero", "_to_copy.cpu"))]
    assert not stats.flat.requires_grad


def test_bad_arguments():
    with pytest.raises(ValueError, match="must be positive"):
        QualityStats(0, 4)
    with pytest.raises(ValueError, match=r"must be \[B, 4\]"):
        QualityStats(3, 4).update(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))
