"""What sits on the encoder: cosine or linear classifier, projection MLP.

Shapes: B batch, D feature width, C classes, P projection width. Normalisation and logits are computed in float32 even
under bf16 autocast: 30 * cosine in bf16 is off by up to 0.06, more than a perturbation of rho = 2e-3 moves it.
(On a GPU the products are TF32 unless --precision is fp32: an eighth of bf16's rounding.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(x: Tensor) -> Tensor:
    """x in float32 if it is bf16 or fp16, else unchanged (float64 stays float64)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| along the last dimension, in float32 or wider; a zero row stays zero."""
    with torch.autocast(x.device.type, enabled=False):
        return F.normalize(full_precision(x), dim=-1)


class CosineClassifier(nn.Module):
    """logits = scale * cos(feature, class weight), no bias (BCL, LDAM); weight [C, D], unit rows at the start."""

    def __init__(self, feature_dim: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(unit_rows(torch.empty(num_classes, feature_dim).uniform_(-1, 1)))

    def forward(self, feats: Tensor, weight: Tensor | None = None) -> Tensor:
        """[B, D] -> [B, C] float32; `weight` [C, D] stands in for the classifier's own (a perturbed one)."""
        weight = self.weight if weight is None else weight
        with torch.autocast(feats.device.type, enabled=False):
            return self.scale * F.linear(unit_rows(feats), unit_rows(weight))


class LinearClassifier(nn.Linear):
    """logits = W feature + b in float32; `weight` may stand in for W as in CosineClassifier."""

    def forward(self, feats: Tensor, weight: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """[B, D] -> [B, C] float32."""
        weight = self.weight if weight is None else weight
        with torch.autocast(feats.device.type, enabled=False):
            return F.linear(full_precision(feats), full_precision(weight), full_precision(self.bias))


class ProjectionMLP(nn.Sequential):
    """Linear-BN-ReLU-Linear, rows normalised after it: [B, D] -> [B, P] float32 unit rows (BCL).

    In training mode BatchNorm needs at least two rows. Weights start Kaiming normal, as in the released CIFAR code.
    """

    def __init__(self, in_dim: int, hidden: int, out: int) -> None:
        layers = (nn.Linear(in_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))
        super().__init__(*layers)
        nn.init.kaiming_normal_(layers[0].weight)
        nn.init.kaiming_normal_(layers[3].weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, P]; see the class."""
        return unit_rows(super().forward(x))
