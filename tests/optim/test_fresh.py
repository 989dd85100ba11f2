"""Mode R with a marked classifier (ltfast.optim.fresh), and ascents whose groups cancel."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ltfast.flat import FlatParameters
from ltfast.kernels import counting, gram
from ltfast.optim import GSA
from ltfast.optim.ascent import Ascent
from ltfast.optim.fresh import FreshGradients
from ltfast.optim.rules import RULES
from tests.optim import support
from tests.optim.support import GROUP_COUNTS, SGD, bits, same_bits

RADIUS = {"C": 3.0, "rho_min": 5e-3, "rho_max": 4e-2}


def marked(model: nn.Module, **options: Any) -> GSA:
    return GSA(
        support.classifier_groups(model), SGD[0], GROUP_COUNTS, **{**RADIUS, **SGD[1], "gram_every": 4, **options}
    )


@pytest.mark.parametrize("scale", [None, 2.0**10])
def test_fresh_rows_are_the_classifiers_part_of_the_group_gradients(scale: float | None) -> None:
    model = support.make("conv")
    flat = FlatParameters(model.parameters(), 3)
    last = FreshGradients(flat, list(support.last_layer(model).parameters()), 3)
    losses, _ = support.group_closure(model, 0)()
    rows = last.put(losses, None if scale is None else torch.tensor(scale)).clone()
    for k, loss in enumerate(losses):
        flat.rows.put(k, torch.autograd.grad(loss, flat.params, retain_graph=True))
    torch.testing.assert_close(rows, flat.grads[:, last.span])
    expected = gram(flat.grads, flat.data, adaptive=True)[0]
    flat.grads[:, : last.span.start] = 0
    own = gram(flat.grads, flat.data, adaptive=True)[0]
    assert float((own - expected).abs().max()) > 0.01 * float(expected.abs().max())
    for part in (rows, flat.grads):
        torch.testing.assert_close(last.gram(part, True), own)


def test_a_classifier_that_was_frozen_has_no_gradient() -> None:
    model = support.make("conv")
    flat = FlatParameters(model.parameters(), 3)
    layer = support.last_layer(model)
    last = FreshGradients(flat, list(layer.parameters()), 3)
    assert last.put(support.group_closure(model, 0)()[0]).abs().sum() > 0
    layer.requires_grad_(False)
    assert last.put(support.group_closure(model, 0)()[0]).abs().sum() == 0


def test_what_leaves_no_trace_in_the_memory() -> None:
    """An overflow and an absent group; and a memory of the whole matrix none in that of all but the classifier."""
    ascent = Ascent(RULES["gsa-full"], torch.tensor([3.0, 4.0]), 9, torch.device("cpu"))
    matrix, one, half = (
        torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(),
        torch.ones(()).double(),
        torch.tensor([0.5, 0.5]),
    )
    ascent.refreshed(matrix, one, half)
    torch.testing.assert_close(ascent.memory, matrix)
    for value in (torch.inf, torch.nan):
        ascent.refreshed(torch.where(matrix > 1, value, matrix), one, half)
        torch.testing.assert_close(ascent.memory, matrix)
    ascent.refreshed(4 * matrix, one, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(ascent.memory, torch.tensor([[4.0, 0.5], [0.5, 1.0]]).double())
    ascent.refreshed(matrix, one, half, matrix / 4)
    torch.testing.assert_close(ascent.memory, 0.75 * matrix)


def test_micro_batches() -> None:
    whole, halves = support.make(), support.make()
    a, b = marked(whole), marked(halves)
    for i in range(7):
        a.step(support.group_closure(whole, i))
        half = support.group_closure(halves, i)
        b.step([half, half])
    assert support.distance(whole, halves) < 1e-6  # observed 6e-8


def test_cost_and_norm() -> None:
    """One backward as without a mark, six launches that touch N elements at most once, the intended length."""
    model = support.make()
    optimizer = marked(model)
    for i in range(6):
        forwards = support.counted(model)
        theta = optimizer.blocks[0].flat.data.clone()
        watched, seen = support.watched_closure(optimizer, support.group_closure(model, i))
        with counting() as cost:
            optimizer.step(watched)
        assert forwards() == 2
        eps = torch.where(theta != 0, (seen[-1] - theta) / theta, 0.0).double().norm()
        torch.testing.assert_close(eps.float(), optimizer.stats["length_sq"].sqrt(), rtol=2e-3, atol=0.0)
    assert cost.kernels == 7  # two Gram matrices of the last layer and an update for each of the two param groups more
    assert optimizer.ascent.holds_rest


def test_an_odd_batch_is_damped_to_the_expected_length() -> None:
    """A remembered part that comes out ten times too long is taken back; without a mark all of it only is shortened."""
    ascent = Ascent(RULES["gsa-full"], torch.tensor([200.0, 50.0, 10.0]), 100, torch.device("cpu"))
    u = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares, size = torch.tensor([0.7, 0.2, 0.1]), torch.tensor(25.0, dtype=torch.float64)
    known, rest = u[:, :10] @ u[:, :10].T, u[:, 10:] @ u[:, 10:].T
    ascent.refreshed(known + rest, size, shares, known)
    stale = ascent.stale_coefficients(shares, known)
    exact = ascent.coefficients(known + rest, size, shares).double()
    assert float(ascent.cosine(stale, exact, known + rest, known)) == pytest.approx(1.0)
    c = stale.coef.double()
    long = 100 * rest
    total = torch.as_tensor(c @ (known + long) @ c)
    scale, more = ascent.rescaled(total.reshape(1, 1, 1), size.reshape(1), stale, c @ known @ c)
    assert float(more) == pytest.approx(10.0)
    length = float(scale) * math.sqrt(float(c @ long @ c + more.double() ** 2 * (c @ known @ c)))
    assert length == pytest.approx(float(stale.norm), rel=1e-5)
    _, more = ascent.rescaled(
        torch.as_tensor(c @ (known + rest / 9) @ c).reshape(1, 1, 1), size[None], stale, c @ known @ c
    )
    assert float(more) == 1.0  # one that comes out short is not stretched


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_overflow_in_a_remembered_step_climbs_nowhere_and_is_told(value: float) -> None:
    ascent = Ascent(RULES["gsa-full"], torch.tensor([200.0, 50.0, 10.0]), 100, torch.device("cpu"))
    matrix = torch.tensor([[1.0, 0.2, 0.1], [0.2, 4.0, 0.3], [0.1, 0.3, 9.0]], dtype=torch.float64)
    shares, size = torch.tensor([0.7, 0.2, 0.1]), torch.ones(1, dtype=torch.float64)
    ascent.refreshed(matrix, size[0], shares, matrix / 2)
    stale = ascent.stale_coefficients(shares, matrix / 2)
    c = stale.coef.double()
    for squared, bad in ((c @ matrix @ c, 0), (torch.tensor(value, dtype=torch.float64), 1)):
        scale, more = ascent.rescaled(squared.reshape(1, 1, 1), size, stale, c @ matrix @ c / 2)
        assert (float(scale) == 0) == bool(bad)
        assert float(more) == pytest.approx(1.0)
        assert (float(ascent.stats["ok"]), float(ascent.stats["bad"])) == (1 - bad, bad)


def test_an_overflow_in_the_classifiers_rows_is_told_though_nothing_is_left_to_overflow() -> None:
    ascent = Ascent(RULES["gsa-full"], torch.tensor([200.0, 50.0, 10.0]), 100, torch.device("cpu"))
    matrix = torch.eye(3, dtype=torch.float64)
    shares, size = torch.tensor([0.7, 0.2, 0.1]), torch.ones(1, dtype=torch.float64)
    ascent.refreshed(matrix, size[0], shares, matrix / 2)
    stale = ascent.stale_coefficients(shares, torch.full_like(matrix, torch.inf))
    assert not stale.coef.any()
    ascent.rescaled(torch.zeros(1, 1, 1, dtype=torch.float64), size, stale, torch.zeros((), dtype=torch.float64))
    assert (float(ascent.stats["ok"]), float(ascent.stats["bad"])) == (0, 1)


def test_cosines_of_refreshes_are_logged_as_sum_count_and_least() -> None:
    ascent = Ascent(RULES["gsa-full"], torch.tensor([200.0, 50.0]), 100, torch.device("cpu"))
    for cosine in (0.75, 0.5, torch.nan, 0.875):  # NaN: neither direction moves
        ascent._log(torch.tensor(cosine, dtype=torch.float64))
    assert ascent.refresh.tolist() == [2.125, 3.0, 0.5]


def test_one_long_gradient_does_not_rule_the_memory() -> None:
    """Norms are averaged in the logarithm; a mean of squares would remember sqrt((1 + 100^2) / 2) = 71."""
    ascent = Ascent(RULES["gsa-full"], torch.tensor([200.0, 50.0]), 100, torch.device("cpu"))
    matrix = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    shares, size = torch.tensor([0.7, 0.3]), torch.ones((), dtype=torch.float64)
    stretch = torch.diag(torch.tensor([1.0, 100.0], dtype=torch.float64))
    ascent.refreshed(matrix, size, shares)
    ascent.refreshed(stretch @ matrix @ stretch, size, shares)
    torch.testing.assert_close(ascent.memory, torch.tensor([[1.0, 5.0], [5.0, 100.0]], dtype=torch.float64))
    before = ascent.memory.clone()
    for odd in (matrix * torch.nan, torch.zeros(2, 2).double()):
        ascent.refreshed(odd, size, shares)
        assert torch.equal(ascent.memory, before)


def test_a_mark_that_changes_renews_the_memory() -> None:
    """The memory of a run without a mark does not fit one with it."""
    model = support.make()
    old = marked(model)
    del old.param_groups[1]["classifier"]
    old.set_groups(GROUP_COUNTS)
    for i in range(3):
        old.step(support.group_closure(model, i))
    assert not old.ascent.holds_rest
    twin = support.clone(model, "mlp")
    new = marked(twin)
    state = old.state_dict()
    for group in state["param_groups"]:
        group.pop("classifier", None)
    new.load_state_dict(state)
    assert new.ascent.remembers
    assert not new.ascent.holds_rest
    new.step(support.group_closure(twin, 3))
    assert new.ascent.holds_rest


# -- cancellation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
def test_two_groups_of_one_radius_make_plain_steps(every: int) -> None:
    """Under Eq. 12 two groups climb in opposite directions: with equal radii nothing is left of a shared perturbation."""
    model, twin = support.make(), support.make()
    optimizer = GSA(model.parameters(), SGD[0], [290.0, 57.0], gram_every=every, rho_min=0.1, rho_max=0.1, **SGD[1])
    base = SGD[0](twin.parameters(), **SGD[1])
    table = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1], [0, 1]])

    def closure(m: nn.Module, i: int) -> tuple[Tensor, Tensor]:
        x, y = support.batch(i)
        losses = nn.functional.cross_entropy(m(x), y, reduction="none")
        part = table[y]
        return (losses @ part) / part.sum(0), part.mean(0)

    for i in range(5):
        before = bits(model)
        optimizer.step(lambda i=i: closure(model, i))
        assert not same_bits(model, before)
        base.zero_grad()
        losses, shares = closure(twin, i)
        (losses * shares).sum().backward()
        base.step()
        assert float(optimizer.stats["length_sq"]) == 0
        assert float(optimizer.stats["ok"]) == 1
    assert support.distance(model, twin) < 1e-6
    assert float(optimizer.skipped) == 0
    assert optimizer.ascent.refresh.tolist() == [0.0, 0.0, 1.0]  # no direction, no cosine
