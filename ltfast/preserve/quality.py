"""Feature quality per class, from running sums over the features that training computes anyway.

    Q_c = -1 / D_c - lambda_q * log V_c
    V_c = mean squared distance of class c's features to their centroid = sum|f|^2 / n - |sum f / n|^2
    D_c = Euclidean distance from centroid c to the nearest other centroid

Source: the paper's memory bank (arXiv 2603.21217). Legend: C classes, D feature dimensions, B batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Below this mean squared distance a class counts as collapsed: a single image has V = 0 and log V = -inf, so its first
# epoch would be unbeatable. The floor makes log V a constant there, and D alone ranks the epochs of such a class.
# It is far above the float64 rounding of V (1e-16 |f|^2) and far below the V of any class that is still spread out.
VARIANCE_FLOOR = 1e-8


class Quality(NamedTuple):
    """All float64 [C] on the statistics' device; a class that was not seen has quality -inf and variance NaN."""

    quality: Tensor
    variance: Tensor
    distance: Tensor


class QualityStats:
    """Running sum f, sum |f|^2 and count of each class; one fused `index_add_` a step and no host synchronisation.

    The sums are float64. V is a difference of two numbers near |centroid|^2, and late in training the
    quotient of the two is small: float32 sums over thousands of images would leave V inaccurate, or negative.

    `flat` is the whole state as one float64 vector of C * (D + 2): ranks add theirs (`all_reduce(stats.flat)`) before
    `compute`. With `torch.use_deterministic_algorithms(True)` the sums are reproducible on CUDA to the bit.
    """

    def __init__(self, num_classes: int, feature_dim: int, device: torch.device | str = "cpu") -> None:
        if num_classes < 1 or feature_dim < 1:
            raise ValueError(f"num_classes and feature_dim must be positive, got {num_classes} and {feature_dim}")
        self.num_classes, self.feature_dim = num_classes, feature_dim
        self._sums = torch.zeros(num_classes, feature_dim + 2, dtype=torch.float64, device=device)

    @property
    def flat(self) -> Tensor:
        """The state, float64 [C * (D + 2)], sharing memory: write to it (all-reduce) to change the statistics."""
        return self._sums.view(-1)

    @property
    def counts(self) -> Tensor:
        """Images seen per class, float64 [C]."""
        return self._sums[:, -1]

    def reset(self) -> None:
        """Forget everything; call at the start of each epoch."""
        self._sums.zero_()

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, good: Tensor | None = None) -> None:
        """Add a batch: features [B, D] of any float dtype, labels int64 [B], both on the statistics' device.

        good: 0-dim, zero where the batch is not to count, whatever its features hold (a step that was skipped).
        Raises ValueError for other shapes.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_dim or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features must be [B, {self.feature_dim}] with labels [B], "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        f = features.detach().double()
        rows = torch.cat([f, f.square().sum(1, keepdim=True), torch.ones_like(f[:, :1])], dim=1)
        if good is not None:
            rows = torch.where(good != 0, rows, 0.0)
        self._sums.index_add_(0, labels, rows)

    @torch.no_grad()
    def compute(self, lambda_q: float = 1.0, chunk: int = 512) -> Quality:
        """Quality of each class; classes that were not seen, or whose features are not finite, get -inf.

        lambda_q: weight of the spread. chunk: centroids compared at once; the distance table never exceeds
        chunk * C * 8 bytes.
        """
        count, seen = self.counts, self.counts > 0
        n = count.clamp(min=1.0)
        centroid = self._sums[:, :-2] / n[:, None]
        variance = (self._sums[:, -2] / n - centroid.square().sum(1)).clamp_(min=0.0)
        seen &= variance.isfinite()
        variance = variance.masked_fill(~seen, torch.nan)
        distance = nearest_other(centroid, seen, chunk)
        quality = -1.0 / distance - lambda_q * variance.clamp(min=VARIANCE_FLOOR).log()
        return Quality(quality.masked_fill(quality.isnan(), -torch.inf), variance, distance)


def nearest_other(centroids: Tensor, valid: Tensor, chunk: int = 512) -> Tensor:
    """Euclidean distance from each of float64 centroids [C, D] to the nearest other valid one; inf where none is.

    Pairs are visited once (half of C^2 D multiply-adds), in blocks of `chunk` rows. Taking the grand mean off first
    keeps |a|^2 + |b|^2 - 2 a.b from cancelling when all centroids share a large offset.
    """
    x = centroids.masked_fill(~valid[:, None], 0.0)
    x = x - x.sum(0) / valid.sum().clamp(min=1)
    norm = x.square().sum(1).masked_fill(~valid, torch.inf)
    nearest = torch.full_like(norm, torch.inf)
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk]
        square = torch.addmm(norm[None, start:], rows, x[start:].T, alpha=-2.0)
        square += norm[start : start + chunk, None]
        square.diagonal().fill_(torch.inf)
        nearest[start : start + chunk] = torch.minimum(nearest[start : start + chunk], square.amin(1))
        nearest[start:] = torch.minimum(nearest[start:], square.amin(0))
    return nearest.clamp_(min=0.0).sqrt_()
