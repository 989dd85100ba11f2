"""Evaluation of a model on one split: every image exactly once, figures added up on the device and over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ltfast.data.base import Source
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.metrics import Accumulator
from ltfast.modes import evaluating


def augmented(logits: Callable[[Tensor], Tensor], tta: str) -> Callable[[Tensor], Tensor]:
    """Test-time augmentation of pictures [b, C, H, W] -> logits [b, K]: "flip" is the mean over both sides, "none" `logits`."""
    if tta == "none":
        return logits
    return lambda pictures: (logits(pictures) + logits(pictures.flip(-1))) / 2


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    split: str,
    device: torch.device,
    ranks: Ranks | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
    tta: str = "none",
) -> dict[str, Any]:
    """Figures of `ltfast.metrics.Accumulator.to_dict` for `split` ("train", "val" or "test"); modes are kept.

    logits: pictures [b, ...] -> logits [b, C] of the model, if it is not to be called itself (compiled, autocast). It
    always gets as many pictures as in the first batch, so one compiled graph serves a split. tta: see `augmented`.
    """
    infer = augmented(logits or model, tta)
    accumulator = Accumulator(source.num_classes, source.train_counts, device=device)
    size = 0
    with evaluating(model):
        for batch in source.evaluate(split):
            n = batch.labels.numel()
            size = size or n
            pictures = batch.views[0]
            if n < size:  # the last batch: filled up with copies of its last picture, which do not count
                # Indexing keeps the memory format, which a compiled graph hangs on as well; torch.cat would not.
                pictures = pictures[torch.arange(size, device=pictures.device).clamp_max(n - 1)]
            accumulator.update(infer(pictures)[:n].float(), batch.labels)
    for tensor in accumulator.state().values():
        (ranks or Ranks()).sum_(tensor)
    return accumulator.to_dict()


def evaluate_run(
    folder: str,
    which: str = "last",
    split: str = "test",
    data_dir: str | None = None,
    on_bad_image: str = "fail",
    lists: Mapping[str, str] | None = None,
    device: str | None = None,
    tta: str | None = None,
) -> tuple[dict[str, Any], Source]:
    """(figures, data source) of a finished run's `last` or `best` weights; on_bad_image: "skip" leaves out, "fail" raises.

    data_dir, lists: where data and lists ({"test_list": FILE, ...}) lie now, if they moved. device, tta: instead of the run's.

    Raises:
        UserError: not a run folder, no such checkpoint, or its data is missing; the split is drawn from the training
            pictures and these have changed.
    """
    from ltfast import build, checkpoint
    from ltfast.places import moved
    from ltfast.recipes import refuse_unread
    from ltfast.runs import RunFolder

    run = RunFolder.open(folder)
    weights = run.weights(which)
    given = {
        name: value for name, value in (("data_dir", data_dir), ("device", device), ("tta", tta)) if value is not None
    }
    config = moved(run.config, {"on_bad_image": on_bad_image, **given, **(lists or {})})
    ranks = Ranks()
    place = build.build_device(config, ranks)
    refuse_unread(config.data.dataset, {"data_dir": data_dir, **(lists or {})})
    source = build.build_data(config, place, ranks)
    run.as_trained(source, split, str(folder))
    if not source.sizes.get(split, 0):
        raise UserError(f"--split {split}: this run held out no such images; use --split test")
    model = build.build_model(config.with_(weights=None), source.input_shape, source.num_classes)
    checkpoint.load_into(model, weights)
    forward = build.build_forward(config.with_(compile="off"), model.to(place), None, place)
    return evaluate(model, source, split, place, ranks, logits=forward.logits, tta=config.run.tta), source
