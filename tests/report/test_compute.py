"""What a part of a run needs and does not find is told in its place, and the other parts are worked out all the same."""

import pytest

from ltfast.errors import UserError
from ltfast.report import compute
from ltfast.report.budget import Budget, Progress
from ltfast.report.runs import Missing


@pytest.mark.parametrize("kind", [Missing, UserError])
def test_an_unreadable_picture_leaves_out_the_part_that_needs_it(kind, monkeypatch):
    def predict(live, stop, tick):
        raise kind("x.jpg cannot be decoded (cut short)")

    monkeypatch.setattr(compute, "predict", predict)
    monkeypatch.setattr(compute, "profile", lambda live, stop, tick: {"parts": 1})
    for name in ("curvature", "solution_landscape", "plane_landscape"):
        monkeypatch.setattr(compute.geometry, name, lambda live, stop, tick: "done")
    result = compute.Computed()
    with Progress(len(compute.PARTS), quiet=True) as progress:
        compute.compute_run("run", None, result, Budget(None), progress)
    assert result.missing["predictions"] == "x.jpg cannot be decoded (cut short)"
    assert result.predictions is None
    assert (result.profile, result.curvature, result.plane) == ({"parts": 1}, "done", "done")
