"""Numbers taken from a run's log, on a log written by hand."""

import json

import numpy as np
import pytest
import torch

from ltfast.config import Config
from ltfast.errors import UserError
from ltfast.recipes import method_values
from ltfast.report import items, numbers
from ltfast.report.runs import Missing, RunView, one_an_epoch, open_runs
from ltfast.report.style import distinct, shorten, wrapped
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


def test_groups_of_classes_are_counted_from_many_to_few(tmp_path):
    test = {"kind": "test", "last": {"top1": 50.0, "many": 75.0, "medium": 40.0, "few": 20.0}}
    data = {**DATA, "counts": [200, 150, 120, 50, 3]}
    assert numbers.shots(view_of(tmp_path, [data, test]))["classes"] == [5, 3, 1, 1]


def test_curves_of_a_scouting_run(tmp_path):
    rows = [
        {"kind": "epoch", "epoch": e, "loss": 2.0 - e, "lr": 0.1, "phase": "scout" if e < 2 else "train", "val": val}
        for e, val in enumerate([None, {"top1": 40.0, "few": 5.0}, {"top1": 60.0, "few": 30.0}])
    ]
    found = numbers.curves(view_of(tmp_path, [DATA, *rows, {"kind": "group", "epoch": 2, "groups": [0] * 5}]))
    assert found["epoch"].tolist() == [1, 2, 3]
    assert found["scouts"] == 2
    assert found["groupings"] == [2]
    np.testing.assert_array_equal(found["top1"], [np.nan, 40, 60])
    np.testing.assert_array_equal(found["few"], [np.nan, 5, 30])
    assert found["loss"].tolist() == [2, 1, 0]


def test_accuracy_by_class_size_is_smoothed_over_the_logarithm(tmp_path):
    counts = [1000, 100, 10, 1]
    per_class = [80.0, 60.0, 40.0, None]  # 20 points a factor of 10: a line over the logarithm
    test = {"kind": "test", "last": {"per_class": per_class}}
    found = numbers.by_class_size(view_of(tmp_path, [{**DATA, "counts": counts, "class_names": list("abcd")}, test]))
    assert found["size"].tolist() == counts
    np.testing.assert_allclose(found["curve_x"][[0, -1]], [10, 1000])
    np.testing.assert_allclose(found["curve_y"], 20 * np.log10(found["curve_x"]) + 20, atol=1e-6)


def test_smoothing_weighs_near_classes_more():
    x, y = np.arange(5.0), np.array([0.0, 0, 10, 0, 0])
    at = np.array([1.0, 2.0, 3.0])
    w = np.exp(-0.5 * ((x - at[:, None]) / 0.8) ** 2)
    slopes = [np.polyfit(x - a, y, 1, w=np.sqrt(row))[1] for a, row in zip(at, w, strict=True)]
    np.testing.assert_allclose(numbers.smooth(x, y, at, 0.8), slopes, rtol=1e-6)


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


def test_confusion_takes_the_worst_of_the_tail_and_who_draws_most_of_a_class(tmp_path):
    """Class 4 has many test images: of images class 1 draws most, of shares of a class it is class 0."""
    data = {**DATA, "counts": [200, 150, 50, 5, 10]}
    table = np.diag([10] * 5)
    table[3] = [6, 1, 0, 3, 0]
    table[4] = [0, 40, 0, 0, 60]
    view = view_of(tmp_path, [data, {"kind": "test", "last": {"confusion": table.tolist()}}])
    found = numbers.tail_confusion(view, max_others=1, all_below=5)
    assert (found.rows, found.columns) == ([4, 3], [0, 4, 3])
    np.testing.assert_allclose(found.shares, [[0, 60, 0, 40], [60, 0, 30, 10]])
    assert numbers.tail_confusion(view, max_rows=1).rows == [3], "30 % against 60 %"
    assert numbers.tail_confusion(view, max_others=1, all_below=6).columns == [0, 1, 2, 4, 3], "all of few classes"


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
    at_once = {**late, "epoch": 2, "groups": {"gram": [[4.0, 0], [0, 4]]}}  # the epoch that the grouping began
    found = numbers.group_similarity(view_of(tmp_path, [DATA, grouping, early, at_once, late]))
    assert found["epoch"].tolist() == [3, 4]
    np.testing.assert_allclose(found["matrix"], [[1, cos], [cos, 1]], err_msg="of the last probe")


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
    means = {key: {"many": 7.0, "medium": 6.0, "few": 5.0} for key in ("quality", "variance", "distance")}
    found = numbers.feature_quality(view_of(tmp_path, [DATA, {"kind": "quality", "epoch": 0, **means}]))
    assert [found[side]["quality"].tolist() for side in ("head", "tail")] == [[7], [5]]
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
    assert found["rho"] is None
    assert found["shared"].tolist() == [3, 3], "of one perturbation for all, by the group that was in the most steps"
    own = numbers.ascent(view_of(tmp_path, [DATA, *rows], sharpness="gsa-paper"))
    assert own["shared"] is None
    with pytest.raises(Missing, match="has no ascent"):
        numbers.ascent(view_of(tmp_path, [DATA]))
    fixed = view_of(tmp_path, [DATA], sharpness="sam")
    assert numbers.radius_bounds(fixed) is None
    one = {"kind": "ascent", "epoch": 0, "steps": [2], "radius": [0.05], "above": [0], "below": [0], "fallback": [0]}
    fixed = view_of(tmp_path, [DATA, {**one, "norm": [1], "length": [0.05]}], sharpness="sam")
    assert numbers.ascent(fixed)["rho"] == 0.05
    item = items.ascent([fixed])
    assert np.isnan(item.table.rows[0][1]), "no share of radii outside bounds that there are none of"
    assert [text.get_text() for ax in item.figures[0][1].axes for text in ax.texts] == ["fixed radius 0.05"]
    assert numbers.ascent_labels(fixed, 1) == ["whole batch"]
    assert numbers.ascent_labels(view_of(tmp_path, [DATA], sharpness="imbsam"), 1) == ["tail"]
    assert numbers.ascent_labels(view_of(tmp_path, [DATA], sharpness="cc-sam"), 5)[3] == "class d"


def test_forces_scale_the_gradient_by_alpha(tmp_path):
    rows = [
        {"kind": "epoch", "epoch": 0, "grad_norm": 4.0, "seconds": 1.5, "phase": "scout"},
        {"kind": "epoch", "epoch": 1, "grad_norm": 2.0, "seconds": 2.0, "phase": "train"},
        {"kind": "forces", "epoch": 0, "decay": 0.1},
        {"kind": "forces", "epoch": 1, "decay": 0.1, "gkp": 0.5, "gkp_loss": 3.0, "alpha": 0.8},
        {"kind": "anchor", "epoch": 1, "capped": 0.25, "away": 0.4},
        {"kind": "anchor", "epoch": 3, "capped": 0.5},
    ]
    view = view_of(tmp_path, [DATA, *rows])
    found = numbers.forces(view)
    np.testing.assert_allclose(found["gradient"], [4.0, 1.6])
    np.testing.assert_array_equal(found["gkp"], [np.nan, 0.5])
    np.testing.assert_array_equal(found["gkp_loss"], [np.nan, 3.0])
    assert found["anchors"] == [(2, 0.4, 0.25), (4, None, 0.5)]
    assert numbers.times(view) == {"scouting": 1.5, "training": 2.0}


@pytest.mark.parametrize(("method", "predicted"), [("gsa-exact+gkp", 4), ("bcl+sam+gkp", 1), ("sam", 1)])
def test_predicted_cost_is_in_steps_of_the_scouting(tmp_path, method, predicted):
    """SAM climbs from the first step on: a step after the grouping costs what one before it does."""
    rows = [
        {"kind": "epoch", "epoch": e, "seconds": 1.0 + e, "phase": "scout" if e < 2 else "train", "loss": 1.0}
        for e in range(4)
    ]
    view = view_of(tmp_path, [DATA, *rows], **method_values(method))
    assert items.times([view]).data["r"]["predicted"] == pytest.approx(predicted)


def test_captions_name_the_weight_of_log_v_where_it_is_not_one(tmp_path):
    row = {"kind": "quality", "epoch": 0, **dict.fromkeys(("quality", "variance", "distance"), [1.0] * 5)}
    plain, other = (view_of(tmp_path, [DATA, row], lambda_q=weight) for weight in (1.0, 0.3))
    other.name = "s"
    assert "lambda_q" not in items.quality([plain]).caption
    assert items.quality([plain, other]).caption.endswith(" lambda_q: r 1, s 0.3.")


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
    again = [{"kind": "group", "epoch": 2, "groups": [0] * 5}, {"kind": "group", "epoch": 4, "groups": [0, 1, 0, 2, 2]}]
    found = numbers.groups(view_of(tmp_path, [DATA, *again]))
    assert (found["epoch"], found["group"].tolist()) == (4, [0, 1, 0, 2, 2])
    with pytest.raises(Missing, match="makes no groups"):
        numbers.groups(view_of(tmp_path, [DATA]))


def test_the_banks_epoch_of_each_class(tmp_path, monkeypatch):
    bank = {"epochs": torch.tensor([[7, 2], [9, 4]]), "entry": torch.tensor([9, 9, 7, 9, 7])}
    monkeypatch.setattr("ltfast.report.numbers.load_bank", lambda folder: bank)
    view = view_of(tmp_path, [DATA])
    assert numbers.bank_epochs(view) == [5, 5, 3, 5, 3], "counted from 1"
    bank["entry"][0] = 8  # of a snapshot that is no longer there
    assert numbers.bank_epochs(view) is None


def test_entries_that_came_after_the_grouping_have_no_label(tmp_path, monkeypatch):
    bank = {"epochs": torch.tensor([[7, 2], [9, 4]]), "entry": torch.tensor([9, 9, 7, 9, 7])}
    monkeypatch.setattr("ltfast.report.numbers.load_bank", lambda folder: bank)
    grouping = {"kind": "group", "epoch": 4, "groups": [0, 1, 0, 2, 2]}
    assert numbers.groups(view_of(tmp_path, [DATA, grouping], regroup=1))["entries"] == [None, None, 3, None, 3]
    later = numbers.groups(view_of(tmp_path, [DATA, {**grouping, "epoch": 5}], regroup=1))
    assert later["entries"] == [5, 5, 3, 5, 3]
    with_a_bank = numbers.groups(view_of(tmp_path, [DATA, {**grouping, "epoch": 0}]))
    assert with_a_bank["entries"] == [5, 5, 3, 5, 3], "epochs of the run that filled it"


def test_figures_are_those_of_the_last_weights_and_the_last_start(tmp_path):
    test = {"kind": "test", "best": {"top1": 1.0}, "last": {"top1": 2.0}}
    view = view_of(tmp_path, [DATA, {**DATA, "counts": [9, 8, 7, 6, 5]}, test])
    assert view.test["top1"] == 2
    assert view.counts.tolist() == [9, 8, 7, 6, 5]


def test_a_resumed_run_keeps_the_last_row_of_each_epoch():
    rows = [{"epoch": 0, "a": 1}, {"epoch": 1, "a": 2}, {"epoch": 1, "a": 3}, {"epoch": 2, "a": 4}]
    assert [r["a"] for r in one_an_epoch(rows)] == [1, 3, 4]
    assert [r["a"] for r in one_an_epoch([*rows[2:], rows[0]])] == [1, 3, 4], "in the order of epochs"


def make_folder(path, rows):
    (path / "checkpoints").mkdir(parents=True)
    (path / "config.toml").write_text('method = "ce"\n')
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def test_long_class_names_stand_on_two_lines_and_stay_apart():
    assert wrapped("heron", 12) == "heron"
    assert wrapped("hydromedusae_sideview_big", 15) == "hydromedusae_\nsideview_big"
    assert wrapped("Danaus plexippus", 12) == "Danaus\nplexippus"
    assert wrapped("x_averylongname", 8) == shorten("x_averylongname", 8)  # one letter has no line
    alike = ["copepod_calanoid_small_antennae", "copepod_calanoid_frilly_antennae"]
    assert distinct(alike, 12, wrapped) == [f"{i}: {wrapped(name, 8)}" for i, name in enumerate(alike)]


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
