"""Evaluation of a model on one split: every image exactly once, figures added up on the device and over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ltfast.data.base import Source
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.metrics import Accumulator


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    split: str,
    device: torch.device,
    ranks: Ranks | None = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Any]:
    """Figures of `ltfast.metrics.Accumulator.to_dict` for `split` ("train", "val" or "test"); the model's mode is kept."""
    was_training = model.training
    model.eval()
    accumulator = Accumulator(source.num_classes, source.train_counts, device=device)
    for batch in source.evaluate(split):
        with autocast():
            logits = model(batch.views[0])
        accumulator.update(logits.float(), batch.labels)
    for tensor in accumulator.state().values():
        (ranks or Ranks()).sum_(tensor)
    model.train(was_training)
    return accumulator.to_dict()


def evaluate_run(
    folder: str, which: str = "last", split: str = "test", data_dir: str | None = None
) -> tuple[dict[str, Any], Source]:
    """(figures, data source) of a finished run's `last` or `best` weights.

    Raises:
        UserError: not a run folder, no such checkpoint, or its data is missing.
    """
    from ltfast import build, checkpoint
    from ltfast.runs import RunFolder

    run = RunFolder.open(folder)
    config = run.config if data_dir is None else run.config.with_(data_dir=data_dir)
    ranks = Ranks()
    device = build.build_device(config, ranks)
    source = build.build_data(config, device, ranks)
    if not source.sizes.get(split, 0):
        raise UserError(f"--split {split}: this run held out no such images; use --split test")
    model = build.build_model(config, source.input_shape, source.num_classes)
    checkpoint.load_into(model, run.checkpoints / f"{which}.safetensors")
    return evaluate(model.to(device), source, split, device, ranks, build.build_autocast(config, device)), source
