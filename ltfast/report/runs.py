"""What the report reads of a run: its folder as a RunView, and, where weights and data are there, as a live model.

Legend: C classes, B batch, N parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltfast import build, checkpoint
from ltfast.config import Config
from ltfast.data.base import Source
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.models import LongTailModel
from ltfast.objective import Objective
from ltfast.observe import head_and_tail
from ltfast.places import check_there, moved
from ltfast.preserve import sample_indices
from ltfast.runs import RunFolder

HELD_BYTES = 1 << 30  # of images kept on the device for curvature and landscapes
CHUNK = 64  # images differentiated twice at once, which takes far more memory an image than a training step
INTERRUPTED = "the report was interrupted before"
OUT_OF_TIME = "left out: its share of --max-minutes did not suffice"


class Missing(Exception):
    """A run lacks what a figure needs; the text completes '<run>: ...' in one line."""


@dataclass
class RunView:
    """One run as its folder tells it.

    Attributes:
        name: short and unique in the report. rows: lines of metrics.jsonl by kind, one per epoch (the last written).
    """

    name: str
    folder: RunFolder
    config: Config
    rows: dict[str, list[dict[str, Any]]]

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """Rows of one kind. Raises Missing if there is none."""
        if not self.rows.get(kind):
            raise Missing(f"no {kind!r} rows in metrics.jsonl")
        return self.rows[kind]

    @property
    def class_names(self) -> list[str]:
        names = [str(n) for n in self.kind("data")[-1]["class_names"]]
        return [name.encode(errors="backslashreplace").decode() for name in names]  # a folder's name may be no text

    @property
    def counts(self) -> Tensor:
        """Training images of each class, int64 [C]."""
        return torch.tensor(self.kind("data")[-1]["counts"])

    @property
    def ended(self) -> bool:
        """True if the run has trained to its end."""
        return bool(self.rows.get("test"))

    @property
    def epochs(self) -> int | str:
        """Epochs of the run, or "14 of 60"."""
        whole, done = self.config.optim.epochs, [row["epoch"] + 1 for row in self.rows.get("epoch", [])]
        return whole if self.ended else f"{max(done, default=0)} of {whole}"

    @property
    def test(self) -> dict[str, Any]:
        """Figures of the last weights on the test split. Raises Missing for a run that did not end."""
        try:
            return dict(self.kind("test")[-1]["last"])
        except Missing:
            raise Missing("it has not ended, so there is no test result yet") from None


def open_runs(paths: Sequence[str]) -> list[RunView]:
    """The runs, named by the shortest ends of their paths that tell them apart.

    Raises:
        UserError: no run, the same run twice, not a run folder, or one without metrics.
    """
    if not paths:
        raise UserError("report: name at least one run folder")
    folders = [RunFolder.open(p) for p in paths]
    places = [f.path.resolve() for f in folders]
    if len(set(places)) < len(places):
        twice = next(p for p, place in zip(paths, places, strict=True) if places.count(place) > 1)
        raise UserError(f"{twice}: named twice; give each run once")
    views = []
    for folder, name in zip(folders, short_names(places), strict=True):
        rows: dict[str, list[dict[str, Any]]] = {}
        for row in folder.metrics():
            rows.setdefault(row["kind"], []).append(row)
        if "data" not in rows:
            raise UserError(f"{folder}: has no metrics yet; train it first (ltfast train --out {folder})")
        views.append(RunView(name, folder, folder.config, {k: one_an_epoch(v) for k, v in rows.items()}))
    return views


def short_names(places: Sequence[Path]) -> list[str]:
    """Path ends, as few parts as tell all apart; none begins with "_", which a legend of matplotlib leaves out."""
    for depth in range(1, max(len(p.parts) for p in places) + 1):
        names = ["/".join(p.parts[-depth:]) for p in places]
        if len(set(names)) == len(names) and not any(name.startswith("_") for name in names):
            return names
    raise AssertionError("places are distinct")


def one_an_epoch(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a resumed run: of each epoch the last written, in order of epochs. Rows without an epoch stay."""
    if not all("epoch" in row for row in rows):
        return rows
    return [row for _, row in sorted({row["epoch"]: row for row in rows}.items())]


@dataclass
class Live:
    """A run's last weights on the device, with its data and base loss.

    Attributes:
        precision: the run's own; everything here but its step profile is float32.
        loss: (logits [B, C], labels [B]) -> base classification loss of each sample (with the log prior, if the method has it).
    """

    model: LongTailModel
    source: Source
    loss: Callable[[Tensor, Tensor], Tensor]
    device: torch.device
    folder: RunFolder
    config: Config
    precision: str = "fp32"

    @property
    def params(self) -> list[nn.Parameter]:
        """Encoder and classifier: the parameters that the classification loss depends on."""
        return [*self.model.encoder.parameters(), *self.model.classifier.parameters()]

    @cached_property
    def sides(self) -> dict[str, Tensor]:
        """Classes of "head" and "tail", see `head_and_tail`."""
        return dict(zip(("head", "tail"), head_and_tail(self.source.train_counts), strict=True))

    def indices(self, side: str, limit: int) -> Tensor:
        """Positions of at most `limit` training images of the head or tail, a fixed random choice."""
        member = torch.zeros(self.source.num_classes, dtype=torch.int64)
        member[self.sides[side]] = 1
        return sample_indices(member, self.source.train_labels, 1, limit)

    def fetch(self, split: str, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Plain views [B, ch, H, W] and labels [B] on the device, at most HELD_BYTES of them."""
        channels, height, width = self.source.input_shape
        indices = indices[: max(1, HELD_BYTES // (4 * channels * height * width))]
        batches = list(self.source.evaluate(split, indices, 256))
        return torch.cat([b.views[0] for b in batches]), torch.cat([b.labels for b in batches])


def open_live(view: RunView, *, device: str = "auto", data_dir: str | None = None) -> Live:
    """Weights and data of a run, in float32.

    Raises:
        Missing: there are no weights, they are damaged or do not fit the config, or the data is not to be found where the
            run had it.
    """
    if not view.folder.last.exists():
        raise Missing("no checkpoints/last.safetensors in it")
    config = view.config.with_(device=device, precision="fp32", deterministic=False)
    if data_dir is not None:
        config = moved(config, {"data_dir": data_dir})
    where = build.build_device(config, Ranks())
    try:
        check_there(config)
        source = build.build_data(config, where, Ranks())
        view.folder.as_trained(source, "test", str(view.folder))
    except UserError as error:
        raise Missing(f"its data is missing ({error})") from None
    model = build.build_model(config.with_(weights=None), source.input_shape, source.num_classes)
    try:
        checkpoint.load_into(model, view.folder.last)
    except UserError as error:
        raise Missing(f"its weights cannot be used ({error})") from None
    objective: Objective = build.build_objective(config, source.train_counts.to(where))
    loss, precision = objective.classification, view.config.run.precision
    return Live(model.to(where).eval(), source, loss, where, view.folder, config, precision)
