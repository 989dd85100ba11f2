"""Loss surfaces: values, directions, nesting, and that the model comes back unchanged."""

import pytest
import torch
from torch import nn

from ltfast.report.landscape import Plane, around, filter_normalised, moved, side, surface


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))


def losses_of(model):
    images = torch.randn(9, 1, 5, 5, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(9) % 4

    def losses():
        values = nn.functional.cross_entropy(model(images), labels, reduction="none")
        return torch.stack([values[:4].mean(), values[4:].mean()])

    return losses


def test_origin_equals_the_loss_and_weights_come_back():
    model = net().eval()
    params = list(model.parameters())
    losses = losses_of(model)
    before = [p.detach().clone() for p in params]
    loss_at = around(params, losses, seed=1)
    found = surface(loss_at, levels=2)
    assert found.values.shape == (2, side(1), side(1))
    assert torch.equal(found.center, losses().double())  # theta + 0 * d: the same to the bit
    assert found.x[len(found.x) // 2] == 0
    assert (found.values[:, 0, 0] - found.center).abs().min() > 1e-3  # a constant surface would not pass
    assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


def test_surface_values_stand_at_their_coordinates():
    found = surface(lambda x, y: torch.tensor([x + 10 * y, x * y]), (0, 8), (-4, 4), levels=2)
    torch.testing.assert_close(found.values[0], found.x[None] + 10 * found.y[:, None])
    torch.testing.assert_close(found.values[1], found.x[None] * found.y[:, None])
    assert not torch.allclose(found.values[0], found.values[0].T)


def test_directions_have_the_norm_of_each_filter():
    params = list(net().parameters())
    direction = filter_normalised(params, torch.Generator().manual_seed(0))
    for p, d in zip(params, direction, strict=True):
        if p.ndim < 2:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
            assert not torch.allclose(d, p)
    other = filter_normalised(params, torch.Generator().manual_seed(1))
    assert not torch.equal(direction[0], other[0])


def test_stop_before_the_first_level_is_an_error():
    calls = []
    with pytest.raises(TimeoutError):
        surface(lambda x, y: torch.zeros(1), stop=lambda: len(calls) >= 24, tick=lambda: calls.append(0))
    assert len(calls) == 24


@pytest.mark.parametrize("budget", [25, 80, 81, 10**6])
def test_stopped_surface_is_a_coarser_whole_one(budget):
    calls = []
    found = surface(
        lambda x, y: torch.tensor([x - 3 * y]),
        levels=3,
        stop=lambda: len(calls) >= budget,
        tick=lambda: calls.append(0),
    )
    expected = {25: 5, 80: 5, 81: 9, 10**6: 17}[budget]
    assert found.values.shape == (1, expected, expected)
    torch.testing.assert_close(found.values[0], found.x[None] - 3 * found.y[:, None])
    assert float(found.x[0]) == -1
    assert float(found.x[-1]) == 1
    assert len(calls) == {25: 25, 80: 80, 81: 81, 10**6: 289}[budget]


def test_rise_of_a_paraboloid():
    found = surface(lambda x, y: torch.tensor([1 + x * x + y * y, 5.0]), levels=4)
    assert float(found.rise(0.5)[0]) == pytest.approx(0.25, rel=0.05)
    assert float(found.rise(0.5)[1]) == 0


def test_moved_restores_after_an_error():
    model = net()
    before = [p.detach().clone() for p in model.parameters()]

    def fail(put):
        put([torch.zeros_like(p) for p in model.parameters()])
        raise RuntimeError

    with moved(list(model.parameters())) as put, pytest.raises(RuntimeError):
        fail(put)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_plane_goes_through_its_points():
    generator = torch.Generator().manual_seed(5)
    points = [torch.randn(1001, generator=generator) for _ in range(3)]
    plane = Plane.through(points)
    for point, (x, y) in zip(points, plane.points.tolist(), strict=True):
        torch.testing.assert_close(plane.at(x, y), point, rtol=0, atol=1e-5)  # observed 5e-7
    assert float(plane.first @ plane.second) == pytest.approx(0, abs=1e-5)
    assert float(plane.second.norm()) == pytest.approx(1, abs=1e-5)
    distances = torch.pdist(torch.stack(points)).double()
    torch.testing.assert_close(torch.pdist(plane.points), distances, rtol=1e-5, atol=0)
    (x0, x1), (y0, y1) = plane.ranges()
    assert x0 < plane.points[:, 0].min() < plane.points[:, 0].max() < x1
    assert y0 < plane.points[:, 1].min() < plane.points[:, 1].max() < y1


def test_points_on_a_line_are_refused():
    a = torch.randn(50)
    for points in ([a, a, a + 1], [a, a + 1, a + 2], [a, a + 1, a + 1], [a, a + 1, a]):
        with pytest.raises(ValueError, match="one line"):
            Plane.through(points)
    with pytest.raises(ValueError, match="got 2"):
        Plane.through([a, a])
