"""Encoder, classifier, and the two projection heads of BCL in one module."""

import math

from torch import Tensor, nn

from ltfast.models.heads import CosineClassifier, LinearClassifier, ProjectionMLP

CLASSIFIERS = ("cosine", "linear")


class LongTailModel(nn.Module):
    """f = encoder(x) [B, D]; logits = classifier(f) [B, C]; z = MLP(f), centres = MLP'(classifier weight), unit rows.

    encoder: any module [B, ch, H, W] -> [B, feature_dim]. projection: (hidden, out) or None for no MLPs.
    Invariant: the encoder's parameters come first in parameters(), so theta_enc is a prefix of the flat buffer.
    Raises ValueError for bad arguments.
    """

    def __init__(
        self,
        encoder: nn.Module,
        feature_dim: int,
        num_classes: int,
        *,
        projection: tuple[int, int] | None = None,
        scale: float = 30.0,
        classifier: str = "cosine",
    ) -> None:
        super().__init__()
        if not isinstance(encoder, nn.Module):
            raise ValueError(
                f"encoder: {type(encoder).__name__} must be a module; create_encoder gives (encoder, feature_dim)"
            )
        if feature_dim < 1:
            raise ValueError(f"feature_dim: {feature_dim} must be at least 1")
        if num_classes < 2:
            raise ValueError(f"num_classes: {num_classes} must be at least 2")
        if classifier not in CLASSIFIERS:
            raise ValueError(f"classifier: {classifier!r} must be one of {', '.join(CLASSIFIERS)}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale: {scale} must be finite and above 0")
        if projection is not None and (len(projection) != 2 or min(projection) < 1):
            raise ValueError(f"projection: {projection} must be (hidden, out), each at least 1, or None")
        self.feature_dim = feature_dim
        self.num_classes = num_classes
        self.encoder = encoder
        self.classifier: CosineClassifier | LinearClassifier
        if classifier == "cosine":
            self.classifier = CosineClassifier(feature_dim, num_classes, scale)
        else:
            self.classifier = LinearClassifier(feature_dim, num_classes)
        self.projection = ProjectionMLP(feature_dim, *projection) if projection else None
        self.center_projection = ProjectionMLP(feature_dim, *projection) if projection else None

    def features(self, x: Tensor) -> Tensor:
        """Pictures [B, ch, H, W] -> features [B, D] (bf16 under bf16 autocast)."""
        return self.encoder(x)

    def logits(self, feats: Tensor, weight: Tensor | None = None) -> Tensor:
        """Features [B, D] -> logits [B, C] float32; `weight` [C, D] replaces the classifier's own."""
        return self.classifier(feats, weight)

    def project(self, feats: Tensor) -> Tensor:
        """Features [B, D] -> unit rows z [B, P] float32. ValueError if the model was made with projection=None."""
        if self.projection is None:
            raise ValueError("projection: this model has none; pass projection=(hidden, out)")
        return self.projection(feats)

    def centers(self, weight: Tensor | None = None) -> Tensor:
        """Class centres [C, P], unit rows: the centre MLP of the raw classifier weight, or of `weight` [C, D]."""
        if self.center_projection is None:
            raise ValueError("projection: this model has none; pass projection=(hidden, out)")
        own = self.classifier.weight
        # A view, not the leaf: FLOP counters hook what enters a module, and autograd.grad takes no hooks on leaves.
        return self.center_projection(own.view_as(own) if weight is None else weight)

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B, ch, H, W] -> logits [B, C]."""
        return self.logits(self.features(x))
