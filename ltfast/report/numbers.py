"""The figures' numbers that a run's log already holds. Each function takes a RunView and raises Missing with the reason.

Legend: C classes, E epochs, G groups. Arrays are numpy float64 with NaN for what is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ltfast.data.base import SHOT_NAMES, shot_groups
from ltfast.errors import UserError
from ltfast.observe import head_and_tail
from ltfast.recipes import needs_groups, rule_of
from ltfast.report.runs import Missing, RunView
from ltfast.resume import load_bank

Array = np.ndarray[Any, np.dtype[Any]]
SMOOTHING = 0.35  # bandwidth of the accuracy curve, in factors of e of the class size


def array(values: Sequence[Any]) -> Array:
    """Float64 with NaN for None."""
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def column(rows: Sequence[dict[str, Any]], key: str) -> Array:
    """One key of all rows."""
    return array([row.get(key) for row in rows])


def epochs_of(rows: Sequence[dict[str, Any]]) -> Array:
    """Epoch numbers counted from 1."""
    return column(rows, "epoch") + 1


def curves(view: RunView) -> dict[str, Any]:
    """Training loss, learning rate, validation accuracies by epoch [E]; end of scouting and epochs of grouping."""
    rows = view.kind("epoch")
    result: dict[str, Any] = {"epoch": epochs_of(rows), "loss": column(rows, "loss"), "lr": column(rows, "lr")}
    for key in ("top1", *SHOT_NAMES):
        result[key] = column([row.get("val") or {} for row in rows], key)
    result["scouts"] = sum(row.get("phase") == "scout" for row in rows)
    result["groupings"] = [row["epoch"] for row in view.rows.get("group", [])]
    return result


def smooth(log_size: Array, values: Array, at: Array, bandwidth: float = SMOOTHING) -> Array:
    """Local linear fit of values over log class size with Gaussian weights; NaN values are left out."""
    known = np.isfinite(values)
    x, y = log_size[known], values[known]
    result = np.empty(len(at))
    for i, a in enumerate(at):
        w = np.exp(-0.5 * ((x - a) / bandwidth) ** 2) + 1e-12
        mx, my = np.average(x, weights=w), np.average(y, weights=w)
        spread = np.average((x - mx) ** 2, weights=w)
        slope = np.average((x - mx) * (y - my), weights=w) / spread if spread > 1e-9 else 0.0
        result[i] = my + slope * (a - mx)
    return result


def by_class_size(view: RunView) -> dict[str, Array]:
    """Class sizes [C], their accuracies in % [C], and the smoothed curve (curve_x, curve_y)."""
    size, accuracy = view.counts.numpy().astype(np.float64), array(view.test["per_class"])
    if not np.isfinite(accuracy).any():
        raise Missing("its test split has no image")
    seen = size[np.isfinite(accuracy)]
    grid = np.linspace(np.log(seen.min()), np.log(seen.max()), 60) if len(seen) > 1 else np.log(seen)
    curve = np.clip(smooth(np.log(size), accuracy, grid), 0, 100)
    return {"size": size, "accuracy": accuracy, "curve_x": np.exp(grid), "curve_y": curve}


def shots(view: RunView) -> dict[str, Any]:
    """Test accuracy in %: all, many, medium, few; and how many classes each stands for."""
    test, groups = view.test, shot_groups(view.counts)
    names = ("all", *SHOT_NAMES)
    values = array([test["top1"], *(test[name] for name in SHOT_NAMES)])
    return {
        "names": names,
        "accuracy": values,
        "classes": [len(groups), *((groups == k).sum().item() for k in range(3))],
    }


class Confusion(NamedTuple):
    """Shares in % [rows, columns] of each row class's test images; one more column, if needed, for all other classes."""

    shares: Array
    rows: list[int]
    columns: list[int]


def tail_confusion(view: RunView, max_rows: int = 10, max_others: int = 6, all_below: int = 13) -> Confusion:
    """Where the images of tail classes go: the least accurate tail classes against the classes they are taken for.

    Rows and columns by class size, largest first. Columns are the same classes and the `max_others` that draw most of
    their images, or simply all classes where there are fewer than `all_below`.
    """
    matrix = view.test.get("confusion")
    if matrix is None:
        raise Missing("its test result holds no confusion matrix (more than 1,000 classes)")
    counts, table = view.counts, np.array(matrix, dtype=np.float64)
    _, tail = head_and_tail(counts)
    seen = table.sum(1)
    accuracy = np.diag(table) / np.maximum(seen, 1)
    rows = sorted((c for c in tail.tolist() if seen[c]), key=lambda c: accuracy[c])[:max_rows]
    if not rows:
        raise Missing("no tail class has a test image")
    drawn = (table[rows] / seen[rows, None]).sum(0)
    others = [c for c in np.argsort(-drawn, kind="stable").tolist() if c not in rows]
    columns = rows + (others if len(counts) < all_below else others[:max_others])
    by_size = lambda c: (-int(counts[c]), c)  # noqa: E731
    rows, columns = sorted(rows, key=by_size), sorted(columns, key=by_size)
    shares = 100 * table[rows][:, columns] / seen[rows, None]
    if len(columns) < len(counts):
        shares = np.hstack([shares, 100 - shares.sum(1, keepdims=True)])
    return Confusion(shares, rows, columns)


def feature_quality(view: RunView) -> dict[str, Any]:
    """Q, V, D by epoch: means over head and tail {"head": {"quality": [E], ...}, "tail": ...}; the epochs of the bank's
    entries are in the state, not in the log. Classes of one image have no spread, and a Q that only its floor made: they
    are left out."""
    rows = view.kind("quality")
    result: dict[str, Any] = {"epoch": epochs_of(rows), "head": {}, "tail": {}}
    head, tail = (index[view.counts[index] > 1].numpy() for index in head_and_tail(view.counts))
    for key in ("quality", "variance", "distance"):
        if isinstance(rows[0][key], dict):  # very many classes: only means were written
            table = {"head": column([r[key] for r in rows], "many"), "tail": column([r[key] for r in rows], "few")}
        else:
            values = np.stack([array(row[key]) for row in rows])
            table = {"head": mean(values[:, head]), "tail": mean(values[:, tail])}
        for side, value in table.items():
            result[side][key] = value
    return result


def mean(values: Array) -> Array:
    """Mean over the last axis of what is finite; NaN where nothing is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(-1)
    return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)


def cosines(gram: Array) -> Array:
    """Cosine matrix of a Gram matrix; NaN for a gradient of norm zero."""
    norm = np.sqrt(np.maximum(np.diag(gram), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return gram / np.outer(norm, norm)


def gradient_similarity(view: RunView) -> dict[str, Any]:
    """Cosines between gradients of many, medium and few by epoch, each group's with the whole training gradient, and the
    gradients' norms."""
    rows = view.kind("probe")
    names = rows[-1]["names"]
    matrices = np.stack([np.stack([array(line) for line in row["shots"]["gram"]]) for row in rows])
    cos = np.stack([cosines(m) for m in matrices])
    pairs = {f"{names[i]} and {names[j]}": cos[:, i, j] for i in range(len(names)) for j in range(i + 1, len(names))}
    groups = shot_groups(view.counts)
    shares = np.array([float(view.counts[groups == SHOT_NAMES.index(name)].sum()) for name in names])
    shares /= shares.sum()
    whole = {name: to_whole(matrices, shares, i) for i, name in enumerate(names)}
    norms = {name: np.sqrt(matrices[:, i, i]) for i, name in enumerate(names)}
    return {"epoch": epochs_of(rows), "pairs": pairs, "whole": whole, "norms": norms}


def group_similarity(view: RunView) -> dict[str, Any]:
    """Of the bank's groups: cosine matrix at the last probe [G, G], and cosines with the whole gradient [E, G]."""
    groups_now = groups(view)
    rows = [row for row in view.kind("probe") if "groups" in row and row["epoch"] >= groups_now["epoch"]]
    if not rows:
        raise Missing("no gradient probe after its grouping")
    matrices = np.stack([np.stack([array(line) for line in row["groups"]["gram"]]) for row in rows])
    shares = groups_now["images"] / groups_now["images"].sum()
    whole = np.stack([to_whole(matrices, shares, k) for k in range(len(shares))], 1)
    return {"epoch": epochs_of(rows), "matrix": cosines(matrices[-1]), "whole": whole}


def to_whole(grams: Array, shares: Array, k: int) -> Array:
    """Cosine of group k's gradient and sum_j w_j g_j, for each of the Gram matrices [E, G, G]."""
    inner = grams[:, k] @ shares
    whole = np.sqrt(np.einsum("j,ejk,k->e", shares, grams, shares).clip(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return inner / (np.sqrt(grams[:, k, k].clip(0)) * whole)


def ascent(view: RunView) -> dict[str, Any]:
    """Statistics of the ascent [E, G]: radius, above, below, norm, length, fallback, steps; Gram refresh cosines [E]; rho:
    a fixed radius or None; shared: the norm [E] of the one perturbation of all groups, None where each has its own."""
    rule = rule_of(view.config)
    if rule is None:
        raise Missing(f"its method, {view.config.method}, has no ascent")
    rows = view.kind("ascent")
    width = max(len(row["radius"]) for row in rows)
    result: dict[str, Any] = {"epoch": epochs_of(rows)}
    for key in ("steps", "radius", "above", "below", "fallback", "norm", "length"):
        padded = [array([*row[key], *[None] * (width - len(row[key]))]) for row in rows]
        result[key] = np.stack(padded)
    absent = result["steps"] == 0
    for key in ("radius", "above", "below", "fallback", "norm", "length"):
        result[key][absent] = np.nan
    result["refresh_cos"], result["refresh_min"] = column(rows, "refresh_cos"), column(rows, "refresh_min")
    # Groups' means of one shared perturbation differ by the steps that they were in: the fullest group's has the most.
    fullest = np.nan_to_num(result["steps"]).argmax(1)[:, None]
    result["shared"] = np.take_along_axis(result["length"], fullest, 1)[:, 0] if rule.objective == "shared" else None
    result["rho"] = rule.rho
    return result


def ascent_labels(view: RunView, n: int) -> list[str]:
    """What each of the n directions of the run's rule stands for."""
    rule = rule_of(view.config)
    kind = "one" if rule is None else rule.groups
    if kind == "class" and n == len(view.counts):
        return [f"class {name}" for name in view.class_names]
    if n == 1:
        return [{"head-tail": "tail", "focal": "weighted tail"}.get(kind, "whole batch")]
    return [f"group {k}" for k in range(n)]


def radius_bounds(view: RunView) -> tuple[float, float] | None:
    """[rho_min, rho_max] of Eq. 13, or None for a rule with a fixed radius."""
    rule = rule_of(view.config)
    return None if rule is None or rule.rho is not None else (rule.rho_min, rule.rho_max)


def forces(view: RunView) -> dict[str, Any]:
    """Norms by epoch [E] of what moves the weights: loss gradient (before clipping, times alpha), GKP, weight decay of the
    encoder; anchors as rows (epoch, how far away over the norm of the encoder's weights, capped share)."""
    rows = view.kind("forces")
    gradient = {row["epoch"]: row.get("grad_norm") for row in view.rows.get("epoch", [])}
    alpha = np.nan_to_num(column(rows, "alpha"), nan=1.0)
    loss = array([gradient.get(row["epoch"]) for row in rows]) * alpha
    result = {"epoch": epochs_of(rows), "gradient": loss, "decay": column(rows, "decay"), "gkp": column(rows, "gkp")}
    result["gkp_loss"] = column(rows, "gkp_loss")
    result["anchors"] = [(row["epoch"] + 1, row.get("away"), row["capped"]) for row in view.rows.get("anchor", [])]
    return result


def bank_epochs(view: RunView) -> list[int] | None:
    """Epoch, counted from 1, of each class's entry in the memory bank [C]; None if the state or an entry is missing, or the bank
    began as another run's, whose epochs are not this one's."""
    if view.config.preserve.bank:
        return None
    try:
        bank = load_bank(view.folder.path)
    except UserError:
        return None
    epochs = dict(bank["epochs"].tolist())
    entries = [epochs.get(number) for number in bank["entry"].tolist()]
    return None if None in entries else [epoch + 1 for epoch in entries if epoch is not None]


def groups(view: RunView) -> dict[str, Any]:
    """Group of each class [C] at the last grouping, its epoch, class sizes, the epoch of each class's bank entry (None if
    not kept, or of an entry that was not there yet), and images and classes per group."""
    if not view.rows.get("group"):
        raise Missing(
            "it has not grouped its classes yet"
            if needs_groups(view.config, rule_of(view.config))
            else "its method makes no groups"
        )
    row, counts = view.rows["group"][-1], view.counts.numpy()
    group = np.array(row["groups"])
    size = group.max() + 1
    entries: Sequence[int | None] | None = bank_epochs(view)
    if entries and view.config.preserve.regroup:
        entries = [epoch if epoch is not None and epoch <= row["epoch"] else None for epoch in entries]
    return {
        "group": group, "epoch": row["epoch"], "counts": counts, "entries": entries,
        "classes": np.bincount(group, minlength=size), "images": np.bincount(group, weights=counts, minlength=size),
    }  # fmt: skip


def times(view: RunView) -> dict[str, float]:
    """Logged seconds of the run by part: epochs of scouting and of training, without those of them that went into
    compiling; grouping with Fisher and anchor. Validation, test, probes and checkpoints are not logged."""
    rows = view.kind("epoch")
    parts = {
        "compiling": sum(r.get("compiling", 0.0) for r in rows),
        "scouting": sum(stepping(r) for r in rows if r.get("phase") == "scout"),
        "training": sum(stepping(r) for r in rows if r.get("phase") != "scout"),
        "grouping": sum(r.get("seconds", 0.0) for r in view.rows.get("group", [])),
    }
    return {k: float(v) for k, v in parts.items() if v}


def stepping(row: Mapping[str, Any]) -> float:
    """Seconds of an epoch's row without compiling."""
    return float(row["seconds"]) - float(row.get("compiling", 0.0))


def epoch_ratio(view: RunView) -> float | None:
    """Median seconds of a training epoch over those of a scouting epoch; None if a run lacks either."""
    rows = view.kind("epoch")
    scouts = [stepping(r) for r in rows if r.get("phase") == "scout"]
    others = [stepping(r) for r in rows if r.get("phase") != "scout"]
    return float(np.median(others) / np.median(scouts)) if scouts and others else None
