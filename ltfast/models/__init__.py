"""Networks: encoders by name, and LongTailModel = encoder + cosine classifier + BCL's projection heads."""

from ltfast.models.imprint import imprint
from ltfast.models.longtail import LongTailModel
from ltfast.models.registry import create_encoder, encoder_names
from ltfast.models.resnet import CifarResNet

__all__ = ["CifarResNet", "LongTailModel", "create_encoder", "encoder_names", "imprint"]
