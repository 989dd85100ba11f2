"""Numbers taken from a run's log, on a log written by hand."""

import json

import numpy as np
import pytest

from ltfast.config import Config
from ltfast.errors import UserError
from ltfast.report import numbers
from ltfast.report.runs import Missing, RunView, one_an_epoch, open_runs
from ltfast.runs import RunFolder


def view_of(tmp_path, rows, **config):
    kinds = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    return RunView("r", RunFolder(tmp_path), Config().with_(**config), kinds)


COUNTS = [200, 150, 50, 10, 5]
DATA = {"kind": "data", "class_names": list("abcde"), "counts": COUNTS}


def test_bars_of_many_medium_few(tmp_path):
    test = {
        "kind": "test",
        "last": {"top1": 50.0, "many": 75.0, "medium": None, "few": 20.0, "per_class": [90, 60, None, 30, 10]},
    }
    view = view_of(tmp_path, [DATA, test])
    found = numbers.shots(view)
    assert found["names"] == ("all", "many", "medium", "few")
    np.testing.assert_array_equal(found["accuracy"], [50, 75, np.nan, 20])
    assert found["classes"] == [5, 2, 1, 2]


def test_smoothing_reproduces_a_line_and_ignores_gaps():
    x = np.log(np.array([1.0, 2, 5, 10, 100]))
    y = 3 + 2 * x
    y[2] = np.nan
    at = np.linspace(0, 4, 7)
    np.testing.assert_allclose(numbers.smooth(x, y, at, 0.5), 3 + 2 * at, atol=1e-6)
    y[1] += 100  # the values matter
    assert np.abs(numbers.smooth(x, y, at, 0.5) - 3 - 2 * at).max() > 1
    np.testing.assert_allclose(numbers.smooth(x[:1], y[:1], at), y[0])


def test_confusion_rows_are_the_tail_and_sum_to_100(tmp_path):
    table = [[9, 1, 0, 0, 0], [0, 10, 0, 0, 0], [0, 0, 10, 0, 0], [4, 4, 0, 2, 0], [5, 1, 1, 1, 2]]
    view = view_of(tmp_path, [DATA, {"kind": "test", "last": {"confusion": table}}])
    found = numbers.tail_confusion(view, max_others=1, all_below=5)
    assert found.rows == [3, 4]
    assert found.columns == [0, 3, 4]
    np.testing.assert_allclose(found.shares, [[40, 20, 0, 40], [50, 10, 20, 20]])
    whole = numbers.tail_confusion(view)
    assert whole.columns == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(whole.shares, np.array(table)[[3, 4]] * 10)


def test_confusion_of_many_classes_says_why(tmp_path):
    with pytest.raises(Missing, match=r"1,000 classes"):
        numbers.tail_confusion(view_of(tmp_path, [DATA, {"kind": "test", "last": {}}]))


def test_similarity_from_gram_matrices(tmp_path):
    rng = np.random.default_rng(0)
    g = rng.normal(size=(3, 20))
    probe = {"kind": "probe", "epoch": 4, "names": ["many", "medium", "few"], "shots": {"gram": (g @ g.T).tolist()}}
    found = numbers.gradient_similarity(view_of(tmp_path, [DATA, probe]))
    expected = g[0] @ g[2] / np.linalg.norm(g[0]) / np.linalg.norm(g[2])
    np.testing.assert_allclose(found["pairs"]["many and few"], [expected])
    w = np.array([350, 50, 15]) / 415
    whole = w @ g
    for k, name in enumerate(probe["names"]):
        cos = g[k] @ whole / np.linalg.norm(g[k]) / np.linalg.norm(whole)
        np.testing.assert_allclose(found["whole"][name], [cos])
        np.testing.assert_allclose(found["norms"][name], [np.linalg.norm(g[k])])
    assert found["epoch"].tolist() == [5]


def test_group_similarity_needs_a_probe_after_grouping(tmp_path):
    rng = np.random.default_rng(1)
    g = rng.normal(size=(2, 9))
    grouping = {"kind": "group", "epoch": 2, "groups": [0, 0, 1, 1, 1]}
    early = {"kind": "probe", "epoch": 1, "names": [], "groups": {"gram": [[9.0, 0], [0, 9]]}}
    late = {"kind": "probe", "epoch": 3, "names": [], "groups": {"gram": (g @ g.T).tolist()}}
    found = numbers.group_similarity(view_of(tmp_path, [DATA, grouping, early, late]))
    assert found["epoch"].tolist() == [4]
    cos = g[0] @ g[1] / np.linalg.norm(g[0]) / np.linalg.norm(g[1])
    np.testing.assert_allclose(found["matrix"], [[1, cos], [cos, 1]])
    whole = 350 / 415 * g[0] + 65 / 415 * g[1]
    expected = [k @ whole / np.linalg.norm(k) / np.linalg.norm(whole) for k in g]
    np.testing.assert_allclose(found["whole"], [expected])
    with pytest.raises(Missing, match="no gradient probe after"):
        numbers.group_similarity(view_of(tmp_path, [DATA, grouping, early]))


def test_quality_means_of_head_and_tail(tmp_path):
    rows = [
        {
            "kind": "quality",
            "epoch": e,
            "quality": [1.0 + e, 3 + e, 9, 5, None],
            "variance": [1] * 5,
            "distance": [None] * 5,
        }
        for e in range(3)
    ]
    found = numbers.feature_quality(view_of(tmp_path, [DATA, *rows]))
    assert found["head"]["quality"].tolist() == [2, 3, 4]
    assert found["tail"]["quality"].tolist() == [5, 5, 5]
    assert np.isnan(found["head"]["distance"]).all()
    single = {**DATA, "counts": [200, 150, 50, 1, 5]}  # the floor under log V would make its Q the mean's
    assert np.isnan(numbers.feature_quality(view_of(tmp_path, [single, *rows]))["tail"]["quality"]).all()


def test_ascent_marks_absent_groups(tmp_path):
    base = {"above": [1, 0], "below": [0, 0], "fallback": [0, 0], "norm": [1, 2], "length": [3, 4]}
    rows = [
        {"kind": "ascent", "epoch": 3, "steps": [4, 0], "radius": [0.1, 0.0], **base, "refresh_cos": 0.9},
        {"kind": "ascent", "epoch": 4, "steps": [4, 2], "radius": [0.1, 0.2], **base},
    ]
    view = view_of(tmp_path, [DATA, *rows], sharpness="gsa-full")
    found = numbers.ascent(view)
    np.testing.assert_array_equal(found["radius"], [[0.1, np.nan], [0.1, 0.2]])
    np.testing.assert_array_equal(found["refresh_cos"], [0.9, np.nan])
    assert numbers.radius_bounds(view) == (2e-3, 3e-3)
    with pytest.raises(Missing, match="has no ascent"):
        numbers.ascent(view_of(tmp_path, [DATA]))


def test_forces_scale_the_gradient_by_alpha(tmp_path):
    rows = [
        {"kind": "epoch", "epoch": 0, "grad_norm": 4.0, "seconds": 1.5, "phase": "scout"},
        {"kind": "epoch", "epoch": 1, "grad_norm": 2.0, "seconds": 2.0, "phase": "train"},
        {"kind": "forces", "epoch": 0, "decay": 0.1},
        {"kind": "forces", "epoch": 1, "decay": 0.1, "gkp": 0.5, "gkp_loss": 3.0, "alpha": 0.8},
    ]
    view = view_of(tmp_path, [DATA, *rows])
    found = numbers.forces(view)
    np.testing.assert_allclose(found["gradient"], [4.0, 1.6])
    np.testing.assert_array_equal(found["gkp"], [np.nan, 0.5])
    np.testing.assert_array_equal(found["gkp_loss"], [np.nan, 3.0])
    assert numbers.times(view) == {"scouting": 1.5, "training": 2.0}


def test_compiling_is_a_part_of_its_own(tmp_path):
    rows = [
        {"kind": "epoch", "epoch": 0, "seconds": 41.0, "compiling": 40.0, "phase": "scout"},
        {"kind": "epoch", "epoch": 1, "seconds": 32.0, "compiling": 30.0, "phase": "train"},
    ]
    view = view_of(tmp_path, [DATA, *rows])
    assert numbers.times(view) == {"compiling": 70.0, "scouting": 1.0, "training": 2.0}
    assert numbers.epoch_ratio(view) == 2.0


def test_groups_and_their_sizes(tmp_path):
    view = view_of(tmp_path, [DATA, {"kind": "group", "epoch": 2, "groups": [0, 1, 0, 2, 2]}])
    found = numbers.groups(view)
    assert found["classes"].tolist() == [2, 1, 2]
    assert found["images"].tolist() == [250, 150, 15]
    with pytest.raises(Missing, match="makes no groups"):
        numbers.groups(view_of(tmp_path, [DATA]))


def test_a_resumed_run_keeps_the_last_row_of_each_epoch():
    rows = [{"epoch": 0, "a": 1}, {"epoch": 1, "a": 2}, {"epoch": 1, "a": 3}, {"epoch": 2, "a": 4}]
    assert [r["a"] for r in one_an_epoch(rows)] == [1, 3, 4]


def make_folder(path, rows):
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.toml").write_text('method = "ce"\n')
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_runs_get_short_distinct_names_and_clear_errors(tmp_path):
    a, b = (make_folder(tmp_path / x / "run", [DATA]) for x in ("one", "two"))
    assert [v.name for v in open_runs([a, b])] == ["one/run", "two/run"]
    assert open_runs([a])[0].name == "run"
    assert open_runs([make_folder(tmp_path / "one" / "_run", [DATA])])[0].name == "one/_run"  # legends skip "_run"
    with pytest.raises(UserError, match="named twice"):
        open_runs([a, a + "/"])
    with pytest.raises(UserError, match="at least one"):
        open_runs([])
    with pytest.raises(UserError, match="not a run folder"):
        open_runs([str(tmp_path)])
    with pytest.raises(UserError, match="no metrics yet"):
        open_runs([make_folder(tmp_path / "empty", [])])
