"""Evaluation of a model on one split: every image exactly once, figures added up on the device and over the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltfast.config import Config
from ltfast.data.base import Source
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.losses import log_prior
from ltfast.metrics import Accumulator
from ltfast.modes import evaluating

# Share of the training set's log prior in the logits of a model that answers for these class frequencies, and in those that
# cross-entropy leaves with each sampler, at the end of training.
PRIORS = {"uniform": 0.0, "train": 1.0}
SAMPLED = {"instance": 1.0, "group-stratified": 1.0, "sqrt": 0.5, "class-balanced": 0.0, "progressive": 0.0}


def augmented(logits: Callable[[Tensor], Tensor], tta: str) -> Callable[[Tensor], Tensor]:
    """Test-time augmentation of pictures [b, C, H, W] -> logits [b, K]: "flip" is the mean over both sides, "none" `logits`."""
    if tta == "none":
        return logits
    return lambda pictures: (logits(pictures) + logits(pictures.flip(-1))) / 2


def prior_shift(config: Config, counts: Tensor | Sequence[float], prior: str) -> Tensor:
    """What to add to a model's logits [b, C] for other class frequencies than its training assumed, float32 [C].

    counts: training images of each class. prior: "uniform" where all classes are equally common, "train" where they are as
    common as in training. Cross-entropy leaves the log prior of what it is shown in the logits, and logit adjustment takes tau
    times that of the training images off (Menon et al. 2021).
    """
    held = SAMPLED[config.data.sampler] - (0.0 if config.loss.loss == "ce" else config.loss.tau)
    return (PRIORS[prior] - held) * log_prior(counts)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: Source,
    split: str,
    device: torch.device,
    ranks: Ranks | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
    tta: str = "none",
    prior: Tensor | None = None,
    each: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Figures of `ltfast.metrics.Accumulator.to_dict` for `split` ("train", "val" or "test"); modes are kept.

    logits: pictures [b, ...] -> logits [b, C] of the model, if it is not to be called itself (compiled, autocast). It
    always gets as many pictures as in the first batch, so one compiled graph serves a split. tta: see `augmented`; prior: a `prior_shift`.
    each: called with the logits [b, C] after both, the labels [b] and the places in the split [b] of each batch.
    """
    infer = augmented(logits or model, tta)
    shift = 0.0 if prior is None else prior.to(device)
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
            answers = infer(pictures)[:n].float() + shift
            accumulator.update(answers, batch.labels)
            if each is not None:
                each(answers, batch.labels, batch.index)
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
    prior: str | None = None,
    each: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> tuple[dict[str, Any], Source]:
    """(figures, data source) of a finished run's `last` or `best` weights; on_bad_image: "skip" leaves out, "fail" raises.

    data_dir, lists: where data and lists ({"test_list": FILE, ...}) lie now, if they moved, or others to judge by: a folder
    may then lack train, and beside data_dir and a test_list only lists that are given are read. device, tta: instead of the run's.
    prior: class frequencies to answer for, see `prior_shift`; None: those that the loss assumed. each: see `evaluate`.

    Raises:
        UserError: not a run folder, no such checkpoint, or its data is missing; the split is drawn from the training
            pictures and these have changed.
    """
    from ltfast import build, checkpoint
    from ltfast.places import check_there, moved
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
    if data_dir and (lists or {}).get("test_list") and (config.data.dataset, split) == ("list", "test"):
        config = config.with_(**{"train_list": None, "val_list": None, **(lists or {})})
    check_there(config)
    classes, side = run.trained_on()
    if config.data.dataset == "folder-small" and os.path.isdir(config.data.data_dir or ""):
        config = config.with_(image_size=config.data.image_size or side)
    source = build.build_data(config.with_(batch=1), place, ranks, classes)  # train may be small there
    run.as_trained(source, split, str(folder))
    if not source.sizes.get(split, 0):
        raise UserError(f"--split {split}: this run held out no such images; use --split test")
    model = build.build_model(config.with_(weights=None), source.input_shape, source.num_classes)
    checkpoint.load_into(model, weights)
    forward = build.build_forward(config.with_(compile="off"), model.to(place), None, place)
    shift = None if prior is None else prior_shift(config, source.train_counts, prior)
    result = evaluate(model, source, split, place, ranks, forward.logits, config.run.tta, shift, each)
    if not result["n"]:
        raise UserError(f"no {split} picture could be read; `ltfast data check` says why")
    return result, source
