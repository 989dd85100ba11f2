"""Evaluation figures from a stream of logits: accuracy by class frequency, calibration, confusion.

Shapes: B batch, C classes. Counts live on the device and are added up without making the host wait; every sum is an
integer count except the confidence sums, which are float64 and added in a fixed order.
Source of the groups: the field's many (> 100 training images), medium (20..100), few (< 20), each the mean over its
classes of the per-class accuracy (Liu et al. 2019, OLTR).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ltfast.data.base import SHOT_NAMES, shot_groups

ECE_BINS = 15
CONFUSION_MAX_CLASSES = 1000  # 8 MB of int64; 8142 classes would take 530 MB
TABLE_MAX_CLASSES = 30
TABLE_WORST_CLASSES = 10
TABLE_NAME_WIDTH = 28
TABLE_FIGURE_WIDTH = 12  # or as wide as the longest heading, up to TABLE_NAME_WIDTH
OVERALL = {
    "top1": "top-1 %",
    "top5": "top-5 %",
    "macro": "mean of classes %",
    "many": "many-shot %",
    "medium": "medium-shot %",
    "few": "few-shot %",
    "ece": "calibration error (ECE) %",
}


class Accumulator:
    """Running counts of one evaluation; update() per batch, all-reduce (sum) state() across ranks, then to_dict().

    train_counts [C]: training images per class (decides many / medium / few). The confusion matrix [C, C] is kept up to
    CONFUSION_MAX_CLASSES classes. Raises ValueError for bad arguments.
    """

    def __init__(self, num_classes: int, train_counts: Tensor, *, device: torch.device | str = "cpu") -> None:
        if train_counts.shape != (num_classes,):
            raise ValueError(f"train_counts: shape {tuple(train_counts.shape)} must be [{num_classes}]")
        self.num_classes = num_classes
        self.train_counts = train_counts.cpu()

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._state = {
            "seen": zeros(num_classes),
            "correct": zeros(num_classes),
            "correct5": zeros(),
            "nonfinite": zeros(),
            "bin_seen": zeros(ECE_BINS),
            "bin_correct": zeros(ECE_BINS),
            "bin_confidence": zeros(ECE_BINS, dtype=torch.float64),
        }
        if num_classes <= CONFUSION_MAX_CLASSES:
            self._state["confusion"] = zeros(num_classes, num_classes)

    def state(self) -> dict[str, Tensor]:
        """The tensors that hold everything, live: sum each in place over the ranks (all_reduce) before to_dict()."""
        return self._state

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count one batch: logits [B, C], labels [B] int64; negative ones (padding) are not counted.

        A row with a NaN or infinity counts as wrong with confidence 0, and under "nonfinite".
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits: shape {tuple(logits.shape)} must be [B, {self.num_classes}]")
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels: shape {tuple(labels.shape)} must be [{len(logits)}], one for each row of logits")
        state, valid = self._state, labels >= 0
        labels = labels.clamp_min(0)
        finite = logits.isfinite().all(1)
        top = logits.topk(min(5, self.num_classes), dim=1).indices
        hits = (top == labels[:, None]) & (finite & valid)[:, None]
        predicted, correct = top[:, 0], hits[:, 0]
        confidence = torch.where(finite, logits.double().softmax(1).gather(1, predicted[:, None])[:, 0], 0.0)

        state["seen"].index_add_(0, labels, valid.long())
        state["correct"].index_add_(0, labels, correct.long())
        state["correct5"] += hits.sum()
        state["nonfinite"] += (valid & ~finite).sum()
        # Bins are (0, 1/15], ..., (14/15, 1]; a one-hot sum, because float index_add has no fixed order on CUDA.
        index = (confidence * ECE_BINS).ceil().long().sub(1).clamp(0, ECE_BINS - 1)
        member = (index[:, None] == torch.arange(ECE_BINS, device=index.device)) & valid[:, None]
        state["bin_seen"] += member.sum(0)
        state["bin_correct"] += (member & correct[:, None]).sum(0)
        state["bin_confidence"] += (member * confidence[:, None]).sum(0)
        if "confusion" in state:
            cell = labels * self.num_classes + predicted
            state["confusion"].view(-1).index_add_(0, cell, (valid & finite).long())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able result in percent: top1, top5 (of min(5, C)), macro, many, medium, few, per_class, ece; and n, test_counts.

        None marks what has no test image: an empty group, a class in per_class. test_counts: images of each class. ece:
        expected calibration error, sum_b n_b / n |accuracy_b - confidence_b| over equal-width bins (Guo et al. 2017) and the
        rows that are finite, None without one. nonfinite: rows that held NaN or infinity. confusion[c][p], if kept: test
        images of class c predicted as p, without nonfinite rows.
        This call waits for the device.
        """
        state = {name: tensor.cpu() for name, tensor in self._state.items()}
        seen, correct, counts = state["seen"], state["correct"], self.train_counts
        n = int(seen.sum())
        present = seen > 0
        accuracy = 100.0 * correct.double() / seen.clamp_min(1)
        group = shot_groups(counts)
        gap = (state["bin_correct"].double() - state["bin_confidence"]).abs().sum()  # 0 of rows that are not finite
        finite = n - int(state["nonfinite"])
        result: dict[str, Any] = {
            "n": n,
            "top1": 100.0 * int(correct.sum()) / n if n else None,
            "top5": 100.0 * int(state["correct5"]) / n if n else None,
            "macro": _mean(accuracy, present),
            **{name: _mean(accuracy, present & (group == k)) for k, name in enumerate(SHOT_NAMES)},
            "per_class": [float(a) if p else None for a, p in zip(accuracy, present, strict=True)],
            "ece": 100.0 * float(gap) / finite if finite else None,
            "nonfinite": int(state["nonfinite"]),
            "test_counts": seen.tolist(),
        }
        if "confusion" in state:
            result["confusion"] = state["confusion"].tolist()
        return result


def format_table(
    result: Mapping[str, Any],
    class_names: Sequence[str],
    counts: Sequence[int] | Tensor,
    baseline: Mapping[str, Any] | None = None,
    *,
    headings: tuple[str, str] = ("this run", "baseline"),
) -> str:
    """Plain-text table of a to_dict() result, beside a baseline's if given: overall figures first, then classes.

    counts [C]: training images, beside those that were tested where the result says so. Up to 30 classes each get a row in
    class order, beyond that the 10 least accurate, of equal ones those with the most training images. Rows for images
    without a finite output, and for classes without a right answer where those are ten or more, come in where there are any.
    """
    counts = [int(c) for c in counts]
    if not len(counts) == len(class_names) == len(result["per_class"]):
        raise ValueError(
            f"class_names, counts: {len(class_names)}, {len(counts)}, not {len(result['per_class'])} classes"
        )
    runs = [result] if baseline is None else [result, baseline]
    tested = result.get("test_counts")

    def images(train: object = "", test: object = "") -> str:
        return f"{train:>8}" + ("" if tested is None else f" {test:>8}")

    rows = [(label, images(), [run[key] for run in runs]) for key, label in OVERALL.items()]
    if result["nonfinite"]:
        shares = [100.0 * run.get("nonfinite", 0) / run["n"] if run.get("n") else None for run in runs]
        rows.append(("images with NaN output %", images(), shares))
    order = list(range(len(counts)))
    title = "class"
    if len(order) > TABLE_MAX_CLASSES:
        shown = [c for c in order if result["per_class"][c] is not None]
        order = sorted(shown, key=lambda c: (result["per_class"][c], -counts[c]))[:TABLE_WORST_CLASSES]
        title = f"{len(order)} worst classes"
        if shown and result["per_class"][order[-1]] == 0:  # which of them are the ten says little
            tested_ones = [[v for v in run["per_class"] if v is not None] for run in runs]
            rows.append(
                ("classes never right %", images(), [100 * v.count(0) / len(v) if v else None for v in tested_ones])
            )
    classes = [
        (class_names[c], images(counts[c], tested and tested[c]), [run["per_class"][c] for run in runs]) for c in order
    ]
    width = min(TABLE_NAME_WIDTH, max(len(name) for name, _, _ in [*rows, *classes, (title, "", [])]))
    columns = list(headings[: len(runs)]) + (["change"] if len(runs) == 2 else [])
    wide = min(TABLE_NAME_WIDTH, max(TABLE_FIGURE_WIDTH, *(len(heading) for heading in columns)))
    lines = [_line("", images(), columns, width, wide), *(_figures(*row, width, wide) for row in rows)]
    heads = "images" if tested is None else "train"
    lines += ["", _line(title, images(heads, "test"), columns, width, wide)]
    lines += [_figures(*row, width, wide) for row in classes]
    return "\n".join(line.rstrip() for line in lines)


def _figures(name: str, images: str, values: list[float | None], width: int, wide: int) -> str:
    cells = ["-" if v is None else f"{v:.2f}" for v in values]
    if len(values) == 2:
        cells.append("-" if values[0] is None or values[1] is None else f"{values[0] - values[1]:+.2f}")
    return _line(name, images, cells, width, wide)


def _line(name: str, images: str, cells: Sequence[str], width: int, wide: int) -> str:
    if len(name) > width:
        end = (width - 3) // 2  # both ends: long names often differ in their last letters
        name = f"{name[: width - 3 - end]}...{name[-end:]}"
    return f"{name:<{width}} {images}" + "".join(f" {cell[:wide]:>{wide}}" for cell in cells)


def _mean(values: Tensor, mask: Tensor) -> float | None:
    return float(values[mask].mean()) if bool(mask.any()) else None
