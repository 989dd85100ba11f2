"""The whole page: every figure or the reason why not, nothing from outside, and what a browser makes of it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from ltfast import checkpoint
from ltfast.errors import UserError
from ltfast.report import report
from ltfast.report.budget import Budget
from ltfast.report.curvature import Quadrature, Spectrum
from ltfast.report.draw_classes import draw_class_size, draw_confusion
from ltfast.report.draw_geometry import WIDTHS, bars_with_errors, draw_landscapes, draw_spectra, free, width_of
from ltfast.report.draw_training import draw_ascent, draw_curves, draw_group_similarity, refreshes
from ltfast.report.geometry import SIDES, Curvature, Landscape
from ltfast.report.landscape import Surface
from ltfast.report.page import Entry, Item, Table, cell, render_item, render_table
from ltfast.report.style import colour, log_ticks, look, panels, save

IDS = (
    "curves", "shots", "class-size", "confusion", "quality", "groups", "forces", "similarity", "group-similarity", "ascent",
    "times", "profile", "calibration", "worst", "curvature", "landscape", "plane",
)  # fmt: skip
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


class Page(HTMLParser):
    """Sections by id with their pictures and missing lines; every address that the page would load."""

    def __init__(self, text):
        super().__init__()
        self.sections, self.addresses, self.now, self.scripts = {}, [], None, 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "section":
            self.now = self.sections.setdefault(attrs["id"], {"images": 0, "missing": 0, "tables": 0})
        if tag == "figure":
            self.now["images"] += 1
        if tag == "table":
            self.now["tables"] += 1
        if tag == "p" and attrs.get("class") == "missing":
            self.now["missing"] += 1
        self.addresses += [attrs[k] for k in ("src", "href", "srcset", "data") if k in attrs]
        self.scripts += tag == "script" and "src" in attrs


def page_of(path):
    return Page(Path(path).read_text())


def cheap_pictures(patch):
    """Encoding large PNGs is most of a small report's time."""
    patch.setattr("ltfast.report.style.DPI", 50)
    patch.setattr("ltfast.report.page.DPI", 50)


@pytest.fixture(autouse=True)
def low_resolution(monkeypatch):
    cheap_pictures(monkeypatch)


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The report of both runs at small sizes."""
    patch = pytest.MonkeyPatch()
    from ltfast.report import geometry

    cheap_pictures(patch)
    for name, value in (
        ("IMAGES", 24),
        ("LANCZOS_STEPS", 8),
        ("LANCZOS_PROBES", 1),
        ("TRACE_PROBES", 2),
        ("LEVELS", 1),
    ):
        patch.setattr(geometry, name, value)
    path = report(list(runs), tmp_path_factory.mktemp("out"), quiet=True)
    patch.undo()
    return path


def test_every_figure_is_there_or_its_absence_is_explained(written):
    page = page_of(written)
    assert set(IDS) <= set(page.sections)
    for name in IDS:
        section = page.sections[name]
        assert section["images"] + section["missing"] >= 1, name
    for name in IDS:
        assert page.sections[name]["images"] >= 1, name
    for name in ("groups", "group-similarity", "ascent"):  # plain cross-entropy has none
        assert page.sections[name]["missing"] == 1
    assert page.sections["worst"]["images"] == 2
    assert page.sections["overview"]["tables"] == 2


def test_page_loads_nothing_from_outside(written):
    page, text = page_of(written), written.read_text()
    assert page.scripts == 0
    assert all(a.startswith(("data:", "#")) or not a for a in page.addresses)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert "url(" not in text


def test_pictures_and_numbers_lie_beside_the_page(written):
    names = {p.name for p in written.parent.glob("*.png")}
    assert {f"{i}.png" for i in IDS if i != "worst"} | {"worst-1.png", "worst-2.png"} == names
    numbers = json.loads((written.parent / "report.json").read_text())
    assert set(numbers) == set(IDS)
    runs = numbers["shots"]
    assert set(runs) == {"default", "plain"}
    assert len(runs["default"]["accuracy"]) == 4
    assert numbers["curvature"]["plain"]["tail"]["top"][0] > 0


def test_no_time_leaves_the_log_figures(runs, tmp_path):
    page = page_of(report([runs[0]], tmp_path, max_minutes=1e-6, quiet=True))
    for name in ("curvature", "landscape", "plane", "calibration", "worst", "profile"):
        assert page.sections[name] == {"images": 0, "missing": 1, "tables": 0}, name
    assert page.sections["curves"]["images"] == 1
    assert "share of --max-minutes" in (tmp_path / "index.html").read_text()


def test_run_that_did_not_end(runs, tmp_path):
    """Stopped in its first epochs: no test result, no weights yet."""
    target = tmp_path / "stopped"
    target.mkdir()
    (target / "config.toml").write_text((Path(runs[0]) / "config.toml").read_text())
    lines = (Path(runs[0]) / "metrics.jsonl").read_text().splitlines()
    (target / "metrics.jsonl").write_text("\n".join(lines[:2]) + '\n{"kind": "epo')
    path = report([str(target)], quiet=True)
    assert path == target / "report" / "index.html"
    page = page_of(path)
    for name in ("shots", "class-size", "confusion", "curvature", "landscape", "plane", "calibration", "profile"):
        assert page.sections[name] == {"images": 0, "missing": 1, "tables": 0}, name
    assert "it has not ended" in path.read_text()


def test_figures_of_a_stopped_run_say_so(runs, tmp_path, small):
    """Calibration, curvature and landscapes come of weights that the run would have trained on."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"kind": "test"' not in line]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    text = report([str(run)], quiet=True).read_text()
    said = "run: it has not ended; this is of its last weights, epoch 3."
    assert [text.count(said), text.count("so there is no test result yet")] == [6, 3]
    assert "<td>3 of 3</td>" in text


def test_weights_older_than_the_test_row_are_said_to_be(runs, tmp_path, small):
    """A disk that is full lets a run end whose last weights it does not hold."""
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    last = run / "checkpoints/last.safetensors"
    tensors, meta = checkpoint.load(last)
    checkpoint.save(last, tensors, {**meta, "epoch": 2})
    text = report([str(run)], quiet=True).read_text()
    assert text.count("run: its final weights are not in the folder; this is of its last weights, epoch 2.") == 6


def test_run_without_validation_says_so(runs, tmp_path):
    target = tmp_path / "blind"
    target.mkdir()
    (target / "config.toml").write_text((Path(runs[0]) / "config.toml").read_text())
    rows = [json.loads(line) for line in (Path(runs[0]) / "metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps({**row, "val": None} if row["kind"] == "epoch" else row) for row in rows]
    (target / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = page_of(report([str(target)], max_minutes=1e-6, quiet=True))
    assert page.sections["curves"] == {"images": 1, "missing": 1, "tables": 0}


def test_errors_name_the_option(runs, tmp_path):
    with pytest.raises(UserError, match="--max-minutes -1"):
        report([runs[0]], tmp_path, max_minutes=-1)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="--out"):
        report([runs[0]], blocked)


def test_budget_shares_what_is_left():
    now = [0.0]
    budget = Budget(1.0, parts=3, clock=lambda: now[0])
    first = budget.share()
    now[0] = 19.9
    assert not first()
    now[0] = 20.0
    assert first()
    now[0] = 40.0  # the first overran: the other two share the remaining 20 s
    second = budget.share()
    now[0] = 49.9
    assert not second()
    now[0] = 50.1
    assert second()
    third = budget.share()
    assert not third()
    assert not budget.spent
    now[0] = 60.0
    assert third()
    assert budget.spent
    kept = Budget(1.0, clock=lambda: now[0])
    kept.keep(15)
    assert kept.end == 105.0
    free = Budget(None, parts=2, clock=lambda: now[0])
    assert not free.share()()
    assert not free.spent


def test_text_is_escaped_and_cells_are_readable():
    item = Item("x", "s", 'a <b> "c"', missing=["<script>: no"], table=Table(("run",), [("<i>",)]))
    text = render_item(item, [])
    assert "<b>" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text
    values = (None, float("nan"), 1.23456, 12345.6, 7, "x", 1234567)
    assert [cell(v) for v in values] == ["-", "-", "1.235", "12,346", "7", "x", "1,234,567"]
    assert render_table(Table(("a", "b"), [(1, 2.5)])).count("<td>") == 2


def test_an_entry_without_numbers_has_no_caption():
    empty = Item("x", "s", "title", "caption", missing=["run: no."], table=Table(("run",), []))
    assert "caption" not in render_item(empty, [])
    assert "<figcaption>caption" in render_item(Item("x", "s", "title", "caption", table=Table(("run",), [(1,)])), [])


@pytest.fixture
def entries():
    """Two runs of 24 classes: a confusion of the last three, whose names are alike or no formula of TeX."""
    from ltfast.report.numbers import Confusion

    names = [
        "species 001 with a long name",
        "species 002 with a long name",
        r"$\frac{$ 10_$",
        "\u65e5\u672c",
        *map(str, range(20)),
    ]
    shares = np.array([[50.0, 50, 0], [0, 100, 0], [0, 0, 100]])
    return [(name, Confusion(shares, [0, 1, 2], [0, 1, 2]), names, [3] * 24) for name in (r"$x^{$ run", "other")]


def test_names_are_drawn_as_they_are_and_stay_apart(entries, tmp_path):
    with look():
        figure = draw_confusion(entries)
        save(figure, tmp_path / "x.png")  # no error over "$", no warning of missing characters
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(set(labels)) == 3
    assert labels[1].startswith("1: ")
    assert labels[2] == r"$\frac{$ 10_$ (3)"


def test_shares_are_rounded_half_up():
    from ltfast.report.numbers import Confusion

    shares = np.array([[12.5, 87.5], [0.4, 99.6]])
    with look():
        (ax, *_) = draw_confusion([("a", Confusion(shares, [0, 1], [0, 1]), ["x", "y"], [3, 3])]).axes
    assert [text.get_text() for text in ax.texts] == ["13", "88", "100"]


def test_group_similarity_has_one_scale_for_all_runs():
    run = {"epoch": np.array([4.0]), "whole": np.zeros((1, 2))}
    runs = [Entry(i, "ab"[i], {**run, "matrix": np.array([[1, c], [c, 1]])}) for i, c in enumerate((0.9, 0.1))]
    with look():
        axes = draw_group_similarity(runs).axes
    assert [ax.images[0].get_clim() for ax in axes if ax.images] == [(-0.9, 0.9)] * 2


def ascent_run(labels, **values):
    """Two epochs of an ascent with these directions."""
    shape = (2, len(labels))
    run = {"epoch": np.array([1.0, 2.0]), "labels": labels, "refresh_cos": np.full(2, np.nan)}
    run |= {key: np.full(shape, 0.1) for key in ("radius", "above", "below", "norm", "length")}
    return {**run, "shared": np.full(2, 0.3), "rho": None, "bounds": (0.02, 0.03), **values}


def test_directions_of_an_ascent_look_the_same_in_all_rows_and_different_from_others():
    runs = [
        Entry(0, "a", ascent_run(["whole batch"], bounds=None, rho=0.05)),
        Entry(1, "b", ascent_run(["group 0", "group 1"])),
        Entry(2, "c", ascent_run(["group 0", "group 1"], shared=None)),
    ]
    with look():
        figure = draw_ascent(runs)
    looks = {
        (line.get_label(), line.get_color()) for ax in figure.axes for line in ax.lines if line.get_label()[0] != "_"
    }
    assert looks == {("group 0", colour(0)), ("group 1", colour(1)), ("whole batch", colour(2))}
    assert [len(figure.axes[place].lines) for place in (7, 11)] == [1, 2], "a shared perturbation has one line"
    assert not any(ax.lines or ax.axison for ax in figure.axes[:2])
    with look():
        assert len(draw_ascent(runs[:1]).axes) == 3


def test_spectra_have_a_legend_with_markers_and_logarithmic_bars():
    """A narrow spectrum beside a wide one is smoothed by its own width."""
    nodes, weights = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([0.9, 0.1], dtype=torch.float64)
    spectra = [Spectrum(9, (Quadrature(nodes * scale, weights, nodes, 0.1, nodes),), (0.1,)) for scale in (100, 0.01)]
    runs = [
        Entry(
            i,
            "ab"[i],
            Curvature(dict.fromkeys(SIDES, s), dict.fromkeys(SIDES, 3), dict.fromkeys(SIDES, (s.top[0], 0.0))),
        )
        for i, s in enumerate(spectra)
    ]
    with look():
        figure = draw_spectra(runs)
    assert [handle.get_marker() for handle in figure.legends[0].legend_handles] == ["o", "s"]
    assert [ax.get_yscale() for ax in figure.axes] == ["log"] * 4
    assert all(ax.get_ylabel() for ax in figure.axes)
    narrow = next(line for line in figure.axes[0].lines if line.get_color() == colour(1) and len(line.get_xdata()) > 1)
    assert np.trapezoid(narrow.get_ydata(), narrow.get_xdata()) == pytest.approx(1, abs=0.01)
    assert (width_of(spectra[0]), width_of(spectra[1])) == pytest.approx((100 / WIDTHS, 0.01 / WIDTHS))


def test_a_bar_without_an_error_has_no_whisker():
    pairs = [[(1.0, 0.2), (20.0, float("nan"))]]
    with look():
        _, (ax,) = panels(1)
        bars_with_errors(ax, [Entry(0, "a", None)], pairs)
    ends = np.array([line.get_ydata() for line in ax.lines], dtype=np.float64)
    np.testing.assert_allclose(ends, [[0.8, np.nan], [1.2, np.nan]])
    assert [text.get_text() for text in ax.texts] == ["1", "20"]


def test_a_plane_has_one_scale_and_no_value_under_a_mark():
    x, y = torch.linspace(-1, 3, 9).double(), torch.linspace(-1, 1, 9).double()
    surface = Surface(x, y, torch.hypot(x[None, :] - 1, 3 * y[:, None]).expand(2, 9, 9).exp())
    marked = ((0.0, 0.0), (2.0, 0.0), (2.0, 0.4))
    run = Landscape(surface, dict.fromkeys(SIDES, 3), marked, ("t0", "t1", "t2: last weights, epoch 15"))
    with look():
        figure = draw_landscapes([Entry(0, "a", run)], "distance")
    assert [ax.get_aspect() for ax in figure.axes[:2]] == [1, 1]
    assert [free(place, run) for place in ((0.0, 0.75), (2.97, -0.5), (1.0, 0.02), (1.5, 0.6), (-0.5, 0.97))] == [
        True, False, False, False, False,
    ]  # fmt: skip


def test_no_axis_needs_formulas(tmp_path):
    """Text with "$" is drawn as it stands, also that of matplotlib's own ticks on logarithmic axes."""
    epoch = np.arange(1, 5)
    run = {"epoch": epoch, "groupings": [], "lr": epoch, **dict.fromkeys(("top1", "many", "medium", "few"), epoch)}
    with look():
        for reach in (1.1, 1e3, 1e9):
            figure = draw_curves([Entry(0, "a", {**run, "loss": np.geomspace(1, reach, 4)})])
            save(figure, tmp_path / "x.png")
            ticks = [t.get_text() for t in figure.axes[0].get_yticklabels(which="both") if t.get_text()]
            assert len(ticks) >= 2
            assert not any("$" in tick for tick in ticks)


def test_without_validation_there_are_no_panels_for_it():
    epoch, unknown = np.arange(1, 5), np.full(4, np.nan)
    run = {
        "epoch": epoch,
        "loss": epoch,
        "lr": epoch,
        "groupings": [2],
        **dict.fromkeys(("top1", "many", "medium", "few"), unknown),
    }
    with look():
        assert len(draw_curves([Entry(0, "a", run)]).axes) == 2
        other = draw_curves([Entry(0, "a", {**run, "top1": epoch})])
    assert len(other.axes) == 6
    assert [ax.texts[0].get_text() for ax in other.axes if ax.texts] == ["no such classes"] * 3


def test_a_run_of_one_epoch_has_one_tick():
    run = {"epoch": np.array([1]), "groupings": []}
    run |= dict.fromkeys(("loss", "lr", "top1", "many", "medium", "few"), np.array([1.0]))
    with look():
        figure = draw_curves([Entry(0, "a", run)])
    ticks = figure.axes[0].get_xticks()
    assert [tick for tick in ticks if tick == round(tick)] == list(ticks)


def test_refreshes_of_one_epoch_have_one_tick():
    with look():
        _, (ax,) = panels(1)
        refreshes(ax, {"epoch": np.array([3.0]), "refresh_cos": np.array([0.9]), "refresh_min": np.array([0.5])})
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [3]


@pytest.mark.parametrize(("low", "high"), [(7.8, 11.9), (8.1, 9), (0.002, 5), (1, 1e7)])
def test_a_logarithmic_axis_has_two_numbers_or_more(low, high):
    with look():
        _, (ax,) = panels(1)
        ax.set(yscale="log", ylim=(low, high))
        log_ticks(ax.yaxis, "{x:g}")
    assert sum(low <= tick <= high for tick in ax.get_yticks()) >= 2


def test_a_short_logarithmic_axis_has_a_number_at_three_as_well():
    with look():
        _, (ax,) = panels(1)
        ax.set(yscale="log", ylim=(1.3, 5.4))
        log_ticks(ax.yaxis, "{x:g}")
    assert [tick for tick in ax.get_yticks() if 1.3 <= tick <= 5.4] == [2, 3, 5]


def test_marks_of_100_classes_are_small():
    run = {"size": np.arange(1.0, 101), "accuracy": np.arange(100.0), "curve_x": [1, 100], "curve_y": [0, 100]}
    with look():
        (marks,) = draw_class_size([Entry(0, "a", run)]).axes[0].collections
    assert marks.get_sizes() == [14]
    assert marks.get_alpha() < 1


def test_only_classes_have_marks_in_the_class_size_figure():
    size, curve = np.array([2.0, 20, 200]), np.linspace(2, 200, 60)
    run = {"size": size, "accuracy": size / 4, "curve_x": curve, "curve_y": curve / 4}
    with look():
        ax = draw_class_size([Entry(0, "a", run)]).axes[0]
    assert [line.get_marker() for line in ax.lines if len(line.get_xdata()) == len(curve)] == ["None"]
    assert [len(marks.get_offsets()) for marks in ax.collections] == [3]


def test_of_very_many_classes_a_mark_is_the_mean_of_a_size():
    size, accuracy = np.repeat([2.0, 5, 900], [2000, 3, 1]), np.full(2004, np.nan)
    accuracy[:3], accuracy[2000:] = (0, 100, 50), (0, 0, 60, 90)
    run = {"size": size, "accuracy": accuracy, "curve_x": [2, 900], "curve_y": [50, 60]}
    with look():
        (marks,) = draw_class_size([Entry(0, "a", run)]).axes[0].collections
    assert marks.get_offsets().tolist() == [[2, 50], [5, 20], [900, 90]]


def test_legend_of_long_names_stays_inside(tmp_path):
    names = [f"{i} a name of many letters for a run that tried many things" for i in range(4)]
    run = {"size": np.array([2.0, 20]), "accuracy": np.array([50.0, 60]), "curve_x": [2, 20], "curve_y": [50, 60]}
    with look():
        figure = draw_class_size([Entry(i, name, run) for i, name in enumerate(names)])
        save(figure, tmp_path / "x.png")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")
def test_browser_decodes_every_figure_and_no_script_fails(written, tmp_path):
    def browse(*arguments):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments, written.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    page, dumped = page_of(written), browse("--dump-dom")
    expected = sum(s["images"] for s in page.sections.values())
    found = {k: int(v) for k, v in re.findall(r'data-(figures|broken|errors)="(\d+)"', dumped.stdout[:400])}
    assert found == {"figures": expected, "broken": 0, "errors": 0}
    assert "Uncaught" not in dumped.stderr

    picture = tmp_path / "page.png"
    browse(f"--screenshot={picture}", "--window-size=1150,3000")
    from PIL import Image

    colours = Image.open(picture).convert("L").getcolors(256)
    assert len(colours) > 50  # not a blank page
