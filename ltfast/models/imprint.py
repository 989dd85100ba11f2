"""Weight imprinting: a cosine classifier begins at the mean feature of each class (Qi, Brown and Lowe, CVPR 2018).

From published weights the encoder tells many classes apart before the first step. A random classifier hides that: its
gradients undo some of it, and a class of a handful of pictures never sees enough steps to catch up.

Shapes: B batch, D feature width, C classes.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ltfast.dist import Ranks
from ltfast.models.heads import CosineClassifier, unit_rows
from ltfast.models.longtail import LongTailModel
from ltfast.modes import evaluating


@torch.no_grad()
def imprint(model: LongTailModel, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks | None = None) -> int:
    """Set each row of the cosine classifier to the direction of its class's mean unit feature; returns how many rows.

    The model is run in evaluation mode, so BatchNorm keeps its statistics; then its modes are what they were. A class without a
    picture of finite features keeps its row.

    Args:
        batches: (pictures [B, ch, H, W], labels int64 [B]) on the model's device: plain views, on each rank its share of them.
        ranks: who shares the work; they end with the same rows.

    Raises:
        ValueError: the classifier is linear: a mean feature is no weight of it.
    """
    if not isinstance(model.classifier, CosineClassifier):
        raise ValueError("model: only a cosine classifier can begin at mean features")
    weight = model.classifier.weight
    sums = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    with evaluating(model):
        for pictures, labels in batches:
            rows = unit_rows(model.features(pictures)).double()
            sums.index_add_(0, labels, torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0))
    rows = unit_rows((ranks or Ranks()).sum_(sums))
    known = (rows != 0).any(1)
    weight.copy_(torch.where(known[:, None], rows.to(weight.dtype), weight))
    return int(known.sum())


def pictures_per_class(labels: Tensor, most: int, seed: int = 0) -> Tensor:
    """Positions of at most `most` pictures of each class, int64, increasing; drawn without replacement, by the seed alone.

    labels: int64 [n], on the host.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    counts = labels.bincount()
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[by_class]]
    return by_class[place < most].sort().values
