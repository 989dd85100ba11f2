"""ltfast: long-tailed image classification with GKP and GSA (CVPR 2026) and other sharpness-aware rules."""

__version__ = "0.1.0"
