"""ltfast: long-tailed image classification, fast and right (GKP + GSA, CVPR 2026)."""

__version__ = "0.1.0"
