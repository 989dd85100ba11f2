"""`ltfast report`: one self-contained HTML page for one run or several side by side, PNGs and numbers beside it."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ltfast
from ltfast.config import SECTIONS
from ltfast.report import draw_classes, draw_geometry, draw_training, items
from ltfast.report.budget import Budget
from ltfast.report.compute import Computed, compute_all
from ltfast.report.curvature import TRACE_LEAST
from ltfast.report.draw_geometry import WIDTHS
from ltfast.report.geometry import SIDES
from ltfast.report.page import Entry, Item, Table, render_item, render_page, render_table
from ltfast.report.runs import Missing, RunView, open_runs
from ltfast.report.seeds import over_seeds
from ltfast.report.style import look, save
from ltfast.runs import cannot_write
from ltfast.text import to_json

PAGE, NUMBERS = "index.html", "report.json"
LEAD = "What happened in training, which classes gained, and how the loss looks around the solution."
TERMS = (
    'GKP, grouped knowledge preservation, and GSA, grouped sharpness-aware minimisation, are the methods of "Reframing '
    'Long-Tailed Learning via Loss Landscape Geometry" (CVPR 2026), whose figures and equations the captions cite (Fig. 2, '
    "Eq. 12 and 13; ltfast's docs/method.md has them all). Scouting is the first part of training: it fills the memory bank "
    "with the encoder of each class's best epoch, by which the classes are grouped; GKP then holds the encoder to an anchor, "
    "a mean of those encoders weighted by Fisher information."
)
SEEDS = (
    "Ended runs of one setting on the same pictures, which differ in their seed: mean +- standard deviation on the test split; on "
    "the right, the mean difference at the seeds of both, +- half of its 95 % interval (Student's t)."
)
RADIUS = 0.5  # distance from the solution, in filter norms, at which the table states the rise of the loss
LATER = 0.6  # time that drawing the computed figures takes, over that of the log's: there are half as many
SECTION_ORDER = ("Classes", "Training", "Knowledge", "Sharpness", "Geometry", "Time")


def report(
    runs: Sequence[str],
    out: str | Path | None = None,
    max_minutes: float | None = None,
    *,
    data_dir: str | None = None,
    quiet: bool = False,
) -> Path:
    """Write the report of `runs` (run folders) into the folder `out`; returns the HTML file, index.html.

    Args:
        out: default: RUN/report for one run, <folder of the first run>/report-<names> for several.
        max_minutes: curvature and landscapes stop refining in time, and say so where nothing came of it; None: no limit.
        data_dir: where the data lies now, if it moved.
        quiet: nothing on stderr about the progress.

    Raises:
        UserError: a folder that is no run, or has no metrics; an `out` that cannot be written; a limit <= 0.
    """
    started = time.monotonic()
    budget = Budget(max_minutes)
    views = open_runs(runs)
    folder = Path(out) if out is not None else default_folder(views)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    if not quiet:
        bound = "" if max_minutes else "; curvature and landscapes may take minutes: --max-minutes bounds them"
        print(f"report: drawing what the logs hold{bound}", file=sys.stderr, flush=True)
    drawing = time.monotonic()
    with look():
        entries = [build(views) for build in items.LOG_ITEMS]
        rendered = {item.id: render_item(item, save_figures(item, folder)) for item in entries}
    budget.keep(LATER * (time.monotonic() - drawing))
    computed, interrupted = [Computed() for _ in views], False
    try:
        compute_all(views, computed, budget, data_dir=data_dir, quiet=quiet)
    except KeyboardInterrupt:
        interrupted = True
    with look():
        others = [build_computed(views, computed) for build_computed in COMPUTED_ITEMS]
        rendered |= {item.id: render_item(item, save_figures(item, folder)) for item in others}
    entries += others
    blocks = [("Overview", overview(views, computed))]
    for section in SECTION_ORDER:
        blocks.append((section, "".join(rendered[item.id] for item in entries if item.section == section)))
    (folder / NUMBERS).write_text(to_json({item.id: item.data for item in entries}, indent=1) + "\n")
    seconds = time.monotonic() - started
    names = ", ".join(view.name for view in views)
    footer = (
        f"Made by ltfast {ltfast.__version__} in {seconds:.0f} s on {time.strftime('%Y-%m-%d')}; numbers: {NUMBERS}."
    )
    (folder / PAGE).write_text(render_page(f"ltfast report: {names}", (LEAD, TERMS), blocks, footer))
    if interrupted:
        print(f"report: interrupted; {folder / PAGE} holds what there was", file=sys.stderr, flush=True)
        raise KeyboardInterrupt
    return folder / PAGE


def default_folder(views: Sequence[RunView]) -> Path:
    """RUN/report, or a folder beside the first run named after all of them."""
    first = views[0].folder.path
    if len(views) == 1:
        return first / "report"
    return first.parent / ("report-" + "-".join(view.name.replace("/", "_") for view in views))[:120]


def save_figures(item: Item, folder: Path) -> list[tuple[str, bytes]]:
    """Write the item's PNGs; (what it shows, bytes) of each."""
    names = [item.id if len(item.figures) == 1 else f"{item.id}-{i + 1}" for i in range(len(item.figures))]
    return [
        (text, save(figure, folder / f"{name}.png")) for name, (text, figure) in zip(names, item.figures, strict=True)
    ]


# -- entries that need weights and data ---------------------------------------------------------------------------------


def part(views: Sequence[RunView], computed: Sequence[Computed], name: str) -> tuple[list[Entry], list[str]]:
    """One part of the runs that have it, and a line for each run that lacks it, or whose weights are not its final ones."""
    found, missing = [], []
    for place, (view, result) in enumerate(zip(views, computed, strict=True)):
        value = getattr(result, name)
        if value is None:
            missing.append(f"{view.name}: {result.missing[name]}.")
        else:
            found.append(Entry(place, view.name, value))
            if not view.ended or view.folder.progress("last"):  # a full disk lets a run end without its final weights
                behind = "its final weights are not in the folder" if view.ended else "it has not ended"
                epoch = view.folder.epoch_of("last") or 0
                missing.append(f"{view.name}: {behind}; this is of its last weights, epoch {epoch}.")
    return found, missing


def calibration(views: Sequence[RunView], computed: Sequence[Computed]) -> Item:
    found, missing = part(views, computed, "predictions")
    caption = (
        "Last weights on the test split in 15 bins of confidence; hatched: how far confidence and accuracy lie apart. ECE is "
        "the mean of that gap over the images. Below: the share of images in each bin."
    )
    figures = [("", draw_classes.draw_reliability(found))] if found else []
    data = {
        name: {"ece": p.result["ece"], "seen": p.bin_seen, "accuracy": p.bin_accuracy, "confidence": p.bin_confidence}
        for _, name, p in found
    }
    return Item("calibration", "Classes", "Calibration", caption, figures, missing, data=data)


def worst(views: Sequence[RunView], computed: Sequence[Computed]) -> Item:
    found, missing = part(views, computed, "predictions")
    names = {view.name: view.class_names for view in views}
    caption = (
        "The least accurate classes on the test split, of equal ones those with the most training images; over each "
        "picture, what it was taken for and how confidently."
    )
    figures = [(name, draw_classes.draw_worst(name, p, names[name])) for _, name, p in found if p.worst]
    data = {name: [(w.label, w.accuracy, w.images) for w in p.worst] for _, name, p in found}
    return Item("worst", "Classes", "Worst classes", caption, figures, missing, data=data)


def landscape(views: Sequence[RunView], computed: Sequence[Computed]) -> Item:
    found, missing = part(views, computed, "landscape")
    caption = (
        "Classification loss on training images around the last weights (star), in two random directions whose filters have "
        "the norms of the weights' own; BatchNorm on running statistics. One colour scale for all panels. A tail that sits "
        "in a narrower basin than the head has sharper minima."
    )
    figures = [("", draw_geometry.draw_landscapes(found, "filter norms"))] if found else []
    rows = [(name, *run.surface.center.tolist(), *run.surface.rise(RADIUS).tolist()) for _, name, run in found]
    head = ("run", "loss of head", "of tail", f"mean rise at {RADIUS:g} filter norms, head", "tail")
    data = {name: dataclasses.asdict(run) for _, name, run in found}
    return Item("landscape", "Geometry", "Loss around the solution", caption, figures, missing, Table(head, rows), data)


def plane(views: Sequence[RunView], computed: Sequence[Computed]) -> Item:
    found, missing = part(views, computed, "plane")
    notes = "; ".join(dict.fromkeys(run.note for _, _, run in found if run.note))
    caption = (
        f"The plane of weight space through three points of the run ({notes}), in Euclidean distance; the dashed line joins "
        "them in order. BatchNorm statistics are estimated anew at every point. Where the tail's basin and the head's lie "
        "apart, training on all classes cannot stay in both."
    )
    figures = [("", draw_geometry.draw_landscapes(found, "distance"))] if found else []
    data = {name: dataclasses.asdict(run) for _, name, run in found}
    return Item("plane", "Geometry", "Loss through three epochs", caption, figures, missing, data=data)


def curvature(views: Sequence[RunView], computed: Sequence[Computed]) -> Item:
    found, missing = part(views, computed, "curvature")
    caption = (
        "Eigenvalue density of the Hessian of the classification loss on training images of head and tail, by stochastic "
        "Lanczos quadrature with full reorthogonalisation; encoder and classifier parameters, BatchNorm on running statistics. "
        f"Each density is smoothed by a Gaussian of 1/{WIDTHS} of its own range (widths in the table), so head and tail have "
        "other axes and other widths. Marks on the axis: the largest eigenvalue. Whiskers: how far from it an eigenvalue may "
        f"lie (one product in float64), and the standard error of the trace over its probes, of {TRACE_LEAST} or more."
    )
    figures = [("", draw_geometry.draw_spectra(found))] if found else []
    rows: list[tuple[Any, ...]] = []
    data: dict[str, Any] = {}
    for _, name, run in found:
        data[name] = {}
        for side in SIDES:
            s = run.spectra[side]
            top, probes, steps = run.tops[side], len(s.quadratic_forms), len(s.quadratures[0].nodes)
            width = draw_geometry.width_of(s)
            rows.append((name, side, run.images[side], *top, *s.trace, probes, s.bottom[0], steps, width))
            data[name][side] = {"top": top, "trace": s.trace, "probes": probes, "bottom": s.bottom}
            data[name][side] |= {"images": run.images[side], "width": width}
    head = (
        "run", "side", "images", "largest", "error", "trace", "std. error", "probes", "smallest", "Lanczos steps", "width",
    )  # fmt: skip
    return Item("curvature", "Geometry", "Hessian spectrum", caption, figures, missing, Table(head, rows), data)


def profile(views: Sequence[RunView], computed: Sequence[Computed]) -> Item:
    found, missing = part(views, computed, "profile")
    caption = (
        "The mean training step of the run's last phase, run again where this report was made, eager; by the part in which "
        "each operation runs. Where steps differ (--gram-every, --ascent-every) each kind is timed by itself and counts as often "
        "as it is taken. A diamond: what the plan predicts from counted FLOPs and the time of a plain step."
    )
    figures = [("", draw_training.draw_profile(found))] if found else []
    rows = [
        (name, 1e3 * run["measured"], None if run["predicted"] is None else 1e3 * run["predicted"])
        for _, name, run in found
    ]
    table = Table(("run", "measured, ms", "predicted, ms"), rows)
    return Item(
        "profile", "Time", "Profile of a step", caption, figures, missing, table, {e.name: e.data for e in found}
    )


COMPUTED_ITEMS = (calibration, worst, curvature, landscape, plane, profile)


# -- overview -----------------------------------------------------------------------------------------------------------


def overview(views: Sequence[RunView], computed: Sequence[Computed]) -> str:
    """HTML: a table of the runs, their means over seeds, and what differs in their settings."""
    head = (
        "run",
        "method",
        "data",
        "epochs",
        "seed",
        "top-1 %",
        "many",
        "medium",
        "few",
        "ECE %",
        "lambda_max, head",
        "tail",
    )
    rows = [overview_row(view, result) for view, result in zip(views, computed, strict=True)]
    html = f'<section class="item" id="overview">{render_table(Table(head, rows))}'
    if seeds := over_seeds(views):
        html += f"<h3>Over seeds</h3>{render_table(seeds)}<figcaption>{SEEDS}</figcaption>"
    differing = differences(views)
    if differing:
        table = Table(("setting", *(view.name for view in views)), differing)
        html += f"<details><summary>settings that differ</summary>{render_table(table)}</details>"
    return html + "</section>"


def overview_row(view: RunView, result: Computed) -> tuple[Any, ...]:
    """One line of the overview; dashes for what is not there."""
    try:
        test = view.test
    except Missing:
        test = {}
    tops = [result.curvature.tops[side][0] if result.curvature else None for side in SIDES]
    config = view.config
    figures = [None if test.get(k) is None else f"{test[k]:.1f}" for k in ("top1", "many", "medium", "few", "ece")]
    return (view.name, config.method, config.data.dataset, view.epochs, str(config.run.seed), *figures, *tops)


def differences(views: Sequence[RunView]) -> list[tuple[Any, ...]]:
    """Settings that are not the same in all runs, without names of folders."""
    rows = []
    for section in SECTIONS:
        for field in dataclasses.fields(SECTIONS[section]):
            values = [getattr(getattr(view.config, section), field.name) for view in views]
            if len({str(v) for v in values}) > 1 and field.name not in ("out", "data_dir"):
                rows.append((field.name, *(str(v) for v in values)))
    return rows
