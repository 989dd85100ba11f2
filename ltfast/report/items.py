"""The report's entries from a run's log: numbers, figure, caption, and one line for each run that lacks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ltfast.observe import PROBE_IMAGES
from ltfast.plan import predicted_flops, scouting_flops
from ltfast.recipes import rule_of
from ltfast.report import draw_classes, draw_training, numbers
from ltfast.report.page import Entry, Item, Table
from ltfast.report.runs import Missing, RunView

Found = list[Entry]
CLASS_TABLE = 200  # above this many classes the per-class table is left to report.json


def collect(views: Sequence[RunView], compute: Callable[[RunView], Any]) -> tuple[Found, list[str]]:
    """Numbers of the runs that have them, and '<run>: <reason>' for the others."""
    found, missing = [], []
    for place, view in enumerate(views):
        try:
            found.append(Entry(place, view.name, compute(view)))
        except Missing as reason:
            missing.append(f"{view.name}: {reason}.")
    return found, missing


def simple(
    views: Sequence[RunView], id: str, section: str, title: str, caption: str,
    compute: Callable[[RunView], Any], draw: Callable[[Found], Any],
) -> Item:  # fmt: skip
    """An item with one figure for all runs."""
    found, missing = collect(views, compute)
    figures = [("", draw(found))] if found else []
    return Item(id, section, title, caption, figures, missing, data={e.name: e.data for e in found})


def curves(views: Sequence[RunView]) -> Item:
    caption = (
        "Mean loss over each epoch's steps (with its contrastive part, where the method has one), learning rate, and "
        "accuracy on the images held out of training. Dotted vertical lines, in the run's colour: scouting ended and the "
        "classes were grouped (the first), or were grouped again (the others, with --regroup)."
    )
    item = simple(views, "curves", "Training", "Training curves", caption, numbers.curves, draw_training.draw_curves)
    blind = [name for name, run in item.data.items() if np.isnan(run["top1"]).all()]
    item.missing += [f"{name}: it held out no validation images." for name in blind]
    return item


def class_size(views: Sequence[RunView]) -> Item:
    caption = (
        "One mark per class (of more than 1,000 classes one per class size, the mean of its classes), test split, last weights; "
        "the line is a local linear fit over the logarithm of the class size. A method for long tails lifts the left end."
    )
    title = "Accuracy against class size"
    item = simple(views, "class-size", "Classes", title, caption, numbers.by_class_size, draw_classes.draw_class_size)
    if item.data and len(views[0].counts) <= CLASS_TABLE:
        names, counts = views[0].class_names, views[0].counts.tolist()
        same = [v for v in views if v.name in item.data and v.class_names == names and v.counts.tolist() == counts]
        columns = [item.data[v.name]["accuracy"] for v in same]
        rows = [(name, n, *(c[i] for c in columns)) for i, (name, n) in enumerate(zip(names, counts, strict=True))]
        item.table = Table(("class", "training images", *(v.name for v in same)), rows)
    return item


def shots(views: Sequence[RunView]) -> Item:
    caption = (
        "Test accuracy of the last weights: all images, and means over many-shot (more than 100 training images), "
        "medium-shot (20 to 100) and few-shot classes (fewer than 20). One run each: with small test splits, differences of "
        "a point or two are within what another seed changes."
    )
    item = simple(views, "shots", "Classes", "Many, medium and few", caption, numbers.shots, draw_classes.draw_shots)
    if item.data:
        rows = [(name, *run["accuracy"]) for name, run in item.data.items()]
        item.table = Table(("run", "all", "many", "medium", "few"), rows)
    return item


def confusion(views: Sequence[RunView]) -> Item:
    caption = (
        "Where the test images of tail classes go, in %; a frame marks the right class. Tail: few-shot classes (the third "
        "with the fewest images, if there are no many- or few-shot ones); at most the ten least accurate, of equal ones "
        "those with the lowest number. Where shortened names would be the same, the class's number stands before them."
    )
    found, missing = collect(views, lambda v: (numbers.tail_confusion(v), v.class_names, v.counts.tolist()))
    runs = [(entry.name, *entry.data) for entry in found]
    figures = [("", draw_classes.draw_confusion(runs))] if runs else []
    data = {name: c._asdict() for name, c, _, _ in runs}
    rows = [
        (name, str(c), names[c], counts[c], share[found.columns.index(c)])
        for name, found, names, counts in runs
        for c, share in zip(found.rows, found.shares, strict=True)
    ]
    table = Table(("run", "number", "class", "training images", "right (%)"), rows)
    return Item("confusion", "Classes", "Confusion of the tail", caption, figures, missing, table, data)


def quality(views: Sequence[RunView]) -> Item:
    caption = (
        "Means over head classes (open marks, solid) and tail classes (full marks, dashed) of more than one image of the "
        "training features' quality, spread and distance, as the memory bank scores them (Fig. 2 of the paper). Where the "
        "curves of head and tail part, the epoch that suits one does not suit the other: that is what the bank is for."
    )
    weights = {view.name: view.config.preserve.lambda_q for view in views}
    if set(weights.values()) != {1.0}:
        caption += " lambda_q: " + ", ".join(f"{name} {value:g}" for name, value in weights.items()) + "."
    return simple(
        views,
        "quality",
        "Knowledge",
        "Feature quality of head and tail",
        caption,
        numbers.feature_quality,
        draw_training.draw_quality,
    )


def groups(views: Sequence[RunView]) -> Item:
    caption = (
        "Classes by size, in the colour and hatch of their group. Groups are numbered by decreasing mean class size; they "
        "come from which epoch's weights served each class best (e21: epoch 21; no number where the bank has taken later ones "
        "since), and from the sizes only where those weights tell fewer groups apart."
    )

    def compute(view: RunView) -> dict[str, Any]:
        return {**numbers.groups(view), "names": view.class_names}

    item = simple(views, "groups", "Knowledge", "Groups and their classes", caption, compute, draw_training.draw_groups)
    rows = []
    for name, run in item.data.items():
        for k, (classes, images) in enumerate(zip(run["classes"], run["images"], strict=True)):
            members = [run["names"][c] for c in np.flatnonzero(run["group"] == k)]
            text = ", ".join(members[:12]) + (f", and {len(members) - 12} more" if len(members) > 12 else "")
            rows.append((name, k, classes, int(images), text))
    item.table = Table(("run", "group", "classes", "training images", "which"), rows)
    return item


def forces(views: Sequence[RunView]) -> Item:
    caption = (
        "Norms at the end of each epoch of what moves the weights: the loss gradient of all parameters before clipping "
        "(mean over the epoch, times alpha), the pull of GKP on the encoder, and weight decay of the encoder. GKP that lies "
        "far below weight decay does nothing. An anchor far from the weights, over their norm, can undo what was learnt "
        "since (docs/findings.md)."
    )
    title = "Strength of GKP against loss and weight decay"
    item = simple(views, "forces", "Knowledge", title, caption, numbers.forces, draw_training.draw_forces)
    rows = [(name, *anchor) for name, run in item.data.items() for anchor in run["anchors"]]
    if rows:
        item.table = Table(("run", "anchor made before epoch", "away / norm of weights", "share capped"), rows)
    return item


def similarity(views: Sequence[RunView]) -> Item:
    caption = (
        "Cosine between mean gradients of many-, medium- and few-shot classes on fixed training images (plain views, "
        "BatchNorm on running statistics), and of the tail's with the whole training gradient. Below zero, a step that "
        "helps one side hurts the other. Gradients of a fitted side are tiny, and then their direction says little."
    )
    return simple(
        views, "similarity", "Sharpness", "Gradient similarity between head and tail", caption, numbers.gradient_similarity,
        draw_training.draw_similarity,
    )  # fmt: skip


def group_similarity(views: Sequence[RunView]) -> Item:
    caption = (
        "The same for the memory bank's groups: cosines between their gradients at the last probe, and of each with the "
        "whole gradient. An estimate from at most "
        f"{PROBE_IMAGES} training images per group: plain gradients of the classification loss alone, by all parameters, in "
        "evaluation mode; the ascent of GSA sees batches, its own loss and (if adaptive) gradients times |theta|."
    )
    return simple(
        views, "group-similarity", "Sharpness", "Gradient similarity between groups", caption, numbers.group_similarity,
        draw_training.draw_group_similarity,
    )  # fmt: skip


def ascent(views: Sequence[RunView]) -> Item:
    caption = (
        "Means over sampled steps of each epoch. Radius: Eq. 13 before clipping, with its bounds as a band; a radius "
        "outside them is set to the bound. Direction: the norm of what is left of a group's gradient (Eq. 12), times "
        "|theta| for adaptive rules. Perturbation: its norm, in units of |theta| for adaptive rules; a shared one has one "
        "line, of the group that most sampled steps had. With --gram-every above 1 (gsa-full) radii and directions come "
        "mostly from the remembered Gram matrix, not from the step's own gradients. At a refresh of the Gram matrix, the "
        "direction that the old matrix gives is compared with the exact one (a point: mean of the epoch; the line below it: "
        "down to the smallest)."
    )

    def compute(view: RunView) -> dict[str, Any]:
        found = numbers.ascent(view)
        labels = numbers.ascent_labels(view, found["radius"].shape[1])
        return {**found, "labels": labels, "bounds": numbers.radius_bounds(view)}

    item = simple(
        views, "ascent", "Sharpness", "Directions and radii of the ascent", caption, compute, draw_training.draw_ascent
    )
    rows = []
    for name, run in item.data.items():
        clipped = np.nan if run["bounds"] is None else numbers.mean((run["above"] + run["below"]).ravel())
        rows.append(
            (
                name,
                100 * float(clipped),
                float(numbers.mean(run["refresh_cos"])),
                np.nanmin([*run["refresh_min"], np.inf]),
            )
        )
    rows = [(n, c, cos, low if np.isfinite(low) else None) for n, c, cos, low in rows]
    item.table = Table(("run", "radii outside the bounds (%)", "mean cosine at refreshes", "smallest"), rows)
    return item


def times(views: Sequence[RunView]) -> Item:
    caption = (
        "Seconds of what is logged: grouping includes Fisher and anchor, compiling is told apart; validation, test, "
        "gradient probes, checkpoints and the start are not among them. Right: the median training epoch over the median "
        "scouting epoch (which climbs as well where the method's ascent needs no groups of the bank), beside the ratio that "
        "the plan predicts from counted FLOPs; small networks are bound by the number of operations instead, and cost more."
    )

    def compute(view: RunView) -> dict[str, Any]:
        parts = numbers.times(view)
        if not parts:
            raise Missing("no finished epoch")
        rule = rule_of(view.config)
        ratio = numbers.epoch_ratio(view) if rule is not None else None
        classes = len(view.counts)
        predicted = predicted_flops(view.config, classes) / scouting_flops(view.config, classes) if rule else None
        return {"parts": parts, "measured": ratio, "predicted": predicted}

    item = simple(views, "times", "Time", "Where the time went", caption, compute, draw_training.draw_times)
    rows = [(name, sum(run["parts"].values()), *run["parts"].values()) for name, run in item.data.items()]
    if rows and len({tuple(run["parts"]) for run in item.data.values()}) == 1:
        item.table = Table(("run", "seconds", *next(iter(item.data.values()))["parts"]), rows)
    return item


LOG_ITEMS = (
    curves,
    shots,
    class_size,
    confusion,
    quality,
    groups,
    forces,
    similarity,
    group_similarity,
    ascent,
    times,
)
