"""What a run from published weights does before its first step: its classifier begins where the encoder puts the classes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ltfast import build
from ltfast.models.imprint import imprint, pictures_per_class
from ltfast.modes import untuned
from ltfast.progress import counted

if TYPE_CHECKING:
    from ltfast.train import Trainer

PICTURES, TOTAL = 32, 1 << 16  # looked at, at most: of a class, and in all, but one of each class


def imprint_classifier(trainer: Trainer) -> None:
    """Begin the cosine classifier at the mean features of its classes; the time counts as the first epoch's.

    A function of seed and data, so a run that was lost before its first checkpoint begins where it did.
    """
    started, source = time.perf_counter(), trainer.source
    most = max(1, min(PICTURES, TOTAL // source.num_classes))
    chosen = pictures_per_class(source.train_labels, most, trainer.config.run.seed)
    trainer.progress.note(f"the classifier begins at the mean features of {counted(len(chosen), 'picture')}")
    batches = ((batch.views[0], batch.labels) for batch in source.evaluate("train", chosen))
    with untuned(), build.build_autocast(trainer.config, trainer.device)():
        rows = imprint(trainer.model, batches, trainer.ranks)
    if random := int((source.train_counts > 0).sum()) - rows:
        trainer.progress.note(f"classes whose classifier rows begin at random, without a usable picture: {random}")
    seconds = time.perf_counter() - started
    trainer.log("imprint", pictures=len(chosen), classes=rows, seconds=seconds)
    trainer.seconds += seconds
