"""Losses against float64 double loops written from the equations; every parity test also rejects wrong oracles.

Tolerances (largest error observed, CPU): float64 1e-12 (3.6e-15), float32 1e-5 (1.3e-6), losses of order 1 to 15.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ltfast.losses import (
    balanced_softmax,
    balanced_supcon,
    cross_entropy,
    group_losses,
    log_prior,
    membership_for,
)

EXACT = dict(rtol=1e-12, atol=1e-12)
SINGLE = dict(rtol=1e-5, atol=1e-5)
SYNCS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero"}


class Watch(TorchDispatchMode):
    """Fails on an op that makes the host wait; remembers the largest tensor made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._opname not in SYNCS, f"{func} makes the host wait"
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def naive_supcon(
    z: Tensor, centers: Tensor, labels: list[int], temperature: float, *, minus_one=True, complement=True, mask=True
) -> Tensor:
    """BCL, Eq. 8, as two loops. The switches each drop one term, to make wrong oracles."""
    batch = len(labels)
    members = [(z[i], labels[i % batch]) for i in range(2 * batch)]
    if complement:
        members += [(centers[c], c) for c in range(len(centers))]
    losses = []
    for i in range(2 * batch):
        own, partition, positives = labels[i % batch], 0, []
        for j, (vector, label) in enumerate(members):
            if mask and j == i:
                continue
            score = (z[i] * vector).sum() / temperature
            size = sum(other == label for _, other in members)
            if label == own and minus_one:
                size -= 1
            partition = partition + score.exp() / size
            if label == own:
                positives.append(score)
        losses.append(-torch.stack([score - torch.log(partition) for score in positives]).mean())
    return (torch.stack(losses[:batch]) + torch.stack(losses[batch:])) / 2


SUPCON_CASES = [
    pytest.param([2], 3, id="batch-1"),
    pytest.param([0, 0, 0, 0, 0], 2, id="one-class-present"),
    pytest.param([4, 1, 4, 0, 4, 1, 6], 7, id="absent-classes"),
    pytest.param(list(range(9)), 9, id="all-distinct"),
    pytest.param([0, 1, 1, 0, 1], 2, id="two-classes"),
]


@pytest.mark.parametrize(("labels", "classes"), SUPCON_CASES)
@pytest.mark.parametrize("temperature", [0.07, 0.1, 1.0])
def test_supcon_is_the_double_loop(labels: list[int], classes: int, temperature: float) -> None:
    z, centers = unit(2 * len(labels), 5), unit(classes, 5, seed=1)
    truth = naive_supcon(z, centers, labels, temperature)
    loss = balanced_supcon(z, centers, torch.tensor(labels), temperature)
    torch.testing.assert_close(loss, truth, **EXACT)
    single = balanced_supcon(z.float(), centers.float(), torch.tensor(labels), temperature)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, **SINGLE)
    assert not torch.allclose(torch.zeros_like(truth), truth, **SINGLE)
    for wrong in ({"minus_one": False}, {"complement": False}, {"mask": False}):
        other = naive_supcon(z, centers, labels, temperature, **wrong)
        assert not torch.allclose(loss, other, **SINGLE), wrong


def test_supcon_gradients_are_those_of_the_double_loop() -> None:
    labels = [3, 0, 3, 1, 0]
    z, centers = unit(10, 4).requires_grad_(), unit(5, 4, seed=1).requires_grad_()
    weights = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    fast = torch.autograd.grad(balanced_supcon(z, centers, torch.tensor(labels), 0.1) @ weights, (z, centers))
    slow = torch.autograd.grad(naive_supcon(z, centers, labels, 0.1) @ weights, (z, centers))
    torch.testing.assert_close(fast, slow, **EXACT)
    assert torch.autograd.gradcheck(lambda a, b: balanced_supcon(a, b, torch.tensor(labels), 0.5), (z, centers))
    assert fast[1].abs().min(1).values.max() > 0


def test_supcon_with_a_set_of_centres_for_each_group() -> None:
    """K sets of centres, each image against its group's: the K separate losses, each image's own one taken, and gradients."""
    labels, group = torch.tensor([0, 2, 1, 0, 3, 3, 1]), torch.tensor([0, 2, 1, 0, 1, 1, 1])
    z, centers = unit(14, 6).requires_grad_(), unit(3, 4, 6, seed=1).requires_grad_()
    together = balanced_supcon(z, centers, labels, 0.2, group)
    apart = torch.stack([balanced_supcon(z, c, labels, 0.2) for c in centers])[group, torch.arange(7)]
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    wrong = balanced_supcon(z, centers, labels, 0.2, group.roll(1))
    assert float((together - wrong).detach().abs().max()) > 1e-2
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((together * weight).sum(), (z, centers)),
        torch.autograd.grad((apart * weight).sum(), (z, centers)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"centers: shape \(4, 6\) must be \[K, C, 6\]"):
        balanced_supcon(z, centers[0], labels, 0.2, group)


def test_supcon_survives_tiny_temperatures_and_autocast() -> None:
    labels = torch.tensor([0, 2, 2, 1, 0, 2])
    z, centers = unit(12, 8, dtype=torch.float32).requires_grad_(), unit(4, 8, seed=1, dtype=torch.float32)
    loss = balanced_supcon(z, centers, labels, 1e-3)
    exact = balanced_supcon(z.double(), centers.double(), labels, 1e-3)
    torch.testing.assert_close(
        loss.double(), exact, rtol=1e-5, atol=1e-3
    )  # scores of 1000, spacing 6e-5; observed 8e-5
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isfinite().all()
    plain = balanced_supcon(z, centers, labels, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(balanced_supcon(z, centers, labels, 0.1), plain)
        from_bf16 = balanced_supcon(z.bfloat16(), centers.bfloat16(), labels, 0.1)
    assert from_bf16.dtype == torch.float32
    torch.testing.assert_close(from_bf16, plain, rtol=0, atol=0.05)  # input rounding; observed 0.010


def test_supcon_at_inaturalist_size_stays_within_one_score_matrix_and_never_waits() -> None:
    batch, classes = 256, 8142
    z, centers = unit(2 * batch, 4, dtype=torch.float32).requires_grad_(), unit(classes, 4, dtype=torch.float32, seed=1)
    labels = torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(0))
    with Watch() as watch:
        balanced_supcon(z, centers, labels, 0.07).mean().backward()
    assert watch.largest == 2 * batch * (2 * batch + classes)
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_supcon_compiles_without_a_graph_break() -> None:
    z, centers, labels = unit(10, 4), unit(5, 4, seed=1), torch.tensor([3, 0, 3, 1, 0])
    compiled = torch.compile(balanced_supcon, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, centers, labels), balanced_supcon(z, centers, labels), **EXACT)


@pytest.mark.parametrize(
    ("z", "centers", "message"), [((5, 4), (3, 4), "z: shape"), ((6, 4), (3, 5), "centers: shape")]
)
def test_supcon_names_the_bad_argument(z: tuple[int, int], centers: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        balanced_supcon(torch.ones(z), torch.ones(centers), torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_supcon_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        balanced_supcon(torch.ones(6, 4), torch.ones(3, 4), torch.zeros(3, dtype=torch.long), temperature)


@pytest.mark.parametrize("tau", [0.0, 1.0, 1.5])
def test_softmax_losses_are_their_equations(tau: float) -> None:
    logits = 3 * torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, counts = torch.tensor([0, 4, 2, 2, 1, 0, 3]), torch.tensor([500, 300, 40, 7, 1])
    prior = log_prior(counts)
    loss = balanced_softmax(logits, labels, prior, tau)
    shares = [int(n) / int(counts.sum()) for n in counts]
    truth = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        adjusted = [math.exp(x) * share**tau for x, share in zip(row, shares, strict=True)]
        truth.append(-math.log(adjusted[label] / sum(adjusted)))
    expected = torch.tensor(truth, dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)  # the prior is kept in float32
    assert not torch.allclose(torch.zeros_like(expected), expected, atol=1e-2)
    if tau == 0:
        torch.testing.assert_close(cross_entropy(logits, labels), expected, **EXACT)
    else:
        assert not torch.allclose(cross_entropy(logits, labels), expected, atol=1e-2)


def test_label_smoothing_mixes_in_the_uniform_target() -> None:
    logits, labels = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    uniform = -logits.log_softmax(1).mean(1)
    truth = 0.9 * cross_entropy(logits, labels) + 0.1 * uniform
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=0.1), truth, **EXACT)


@pytest.mark.parametrize(
    "loss", [cross_entropy, lambda x, y: balanced_softmax(x, y, log_prior(torch.tensor([9, 3, 1])))]
)
def test_softmax_losses_are_float32_from_bf16_and_never_wait(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits, labels = torch.randn(6, 3).bfloat16(), torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = loss(logits, labels)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, loss(logits.float(), labels), **SINGLE)
    with Watch():
        cross_entropy(logits, labels)


@pytest.mark.parametrize("counts", [[3, 0, 1], [3, math.inf], [], [[3, 1]]])
def test_log_prior_refuses_a_class_without_images(counts: list) -> None:
    with pytest.raises(ValueError, match="counts"):
        log_prior(torch.tensor(counts))


@pytest.mark.parametrize("shape", [(1,), (4,), (7, 5)])
def test_the_prior_has_one_entry_a_class(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="log_prior: shape"):
        balanced_softmax(torch.zeros(7, 5), torch.zeros(7, dtype=torch.long), torch.zeros(shape))


@pytest.mark.parametrize("given", [list, np.array])
def test_counts_and_groups_come_as_lists_and_arrays_too(given: Callable) -> None:
    counts, groups = [100, 20, 19], [0, 0, 1]
    assert torch.equal(log_prior(given(counts)), log_prior(torch.tensor(counts)))
    for kind in ("single", "groups", "classes", "head-tail", "focal"):
        table = membership_for(kind, given(counts), given(groups))
        assert torch.equal(table, membership_for(kind, torch.tensor(counts), torch.tensor(groups)))


@pytest.mark.parametrize("soft", [False, True])
def test_group_losses_are_weighted_means(soft: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    per_sample = torch.rand(11, dtype=torch.float64, generator=generator).requires_grad_()
    membership = torch.rand(11, 4, dtype=torch.float64, generator=generator).softmax(1)
    if not soft:
        membership = F.one_hot(torch.tensor([0, 0, 1, 3, 3, 3, 0, 1, 1, 0, 3]), 4).double()
    losses, shares = group_losses(per_sample, membership)
    for k in range(4):
        column = membership[:, k].tolist()
        mass = sum(column)
        expected = sum(m * x for m, x in zip(column, per_sample.tolist(), strict=True)) / mass if mass else 0.0
        assert losses[k].item() == pytest.approx(expected, abs=1e-12)
        assert shares[k].item() == pytest.approx(mass / 11, abs=1e-12)
        assert not mass or losses[k].item() != pytest.approx(expected * mass / 11, abs=1e-3)  # forgot to divide
    if not soft:
        assert losses[2] == 0
        assert shares[2] == 0
    torch.testing.assert_close(losses @ shares, per_sample.mean(), **EXACT)
    (gradient,) = torch.autograd.grad(losses @ shares, per_sample)
    torch.testing.assert_close(gradient, torch.full((11,), 1 / 11, dtype=torch.float64), **EXACT)


def test_group_losses_keep_float32_under_autocast_and_never_wait() -> None:
    per_sample, membership = torch.rand(8), F.one_hot(torch.arange(8) % 3, 3)
    plain = group_losses(per_sample, membership)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watch():
        losses, shares = group_losses(per_sample, membership)
    assert losses.dtype == shares.dtype == torch.float32
    assert torch.equal(losses, plain[0])


def test_group_losses_of_half_precision_are_float32() -> None:
    per_sample, membership = torch.rand(64).bfloat16(), F.one_hot(torch.arange(64) % 3, 3)
    for low, wide in zip(
        group_losses(per_sample, membership), group_losses(per_sample.float(), membership), strict=True
    ):
        assert torch.equal(low, wide)


@pytest.mark.parametrize(
    ("per_sample", "membership", "message"),
    [
        ((7, 1), (7, 3), "per_sample"),
        ((), (7, 3), "per_sample"),
        ((7,), (1, 3), "membership"),
        ((7,), (7,), "membership"),
    ],
)
def test_group_losses_name_the_bad_argument(per_sample: tuple, membership: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: shape"):
        group_losses(torch.ones(per_sample), torch.ones(membership))


def test_membership_tables_by_hand() -> None:
    counts = torch.tensor([100, 60, 20, 19, 1])
    assert torch.equal(membership_for("single", counts), torch.ones(5, 1))
    assert torch.equal(membership_for("classes", counts), torch.eye(5))
    groups = membership_for("groups", counts, torch.tensor([0, 0, 2, 1, 2]))
    assert torch.equal(groups, torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]]))
    assert torch.equal(membership_for("head-tail", counts)[:, 1], torch.tensor([0.0, 0, 0, 1, 1]))
    assert torch.equal(membership_for("head-tail", counts, eta=61)[:, 1], torch.tensor([0.0, 1, 1, 1, 1]))
    focal = membership_for("focal", counts, gamma=2.0, sharpness=0.8)
    tail = torch.tensor([0.8 * (1 - n / 200) ** 2 for n in counts.tolist()])
    torch.testing.assert_close(focal[:, 1], tail)
    torch.testing.assert_close(membership_for("focal", counts)[0], torch.tensor([0.75, 0.25]))
    for kind in ("single", "classes", "head-tail", "focal"):
        torch.testing.assert_close(membership_for(kind, counts).sum(1), torch.ones(5))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("clusters", {}, "kind: 'clusters'"),
        ("groups", {}, "group_of_class"),
        ("groups", {"group_of_class": torch.tensor([0, 1])}, "group_of_class"),
        ("groups", {"group_of_class": torch.tensor([0, 1, -1])}, "group_of_class"),
        ("focal", {"sharpness": 1.5}, "sharpness"),
        ("focal", {"gamma": -1.0}, "gamma"),
        ("focal", {"gamma": math.nan}, "gamma"),
        ("focal", {"counts": torch.zeros(3)}, "counts"),
        ("single", {"counts": torch.ones(3, 1)}, "counts"),
    ],
)
def test_membership_names_the_bad_argument(kind: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        membership_for(kind, **{"counts": torch.tensor([5, 4, 3]), **options})
