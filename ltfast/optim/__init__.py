"""Sharpness-aware optimizers: drop-in for other training loops, and the engine of ltfast's own."""

from ltfast.optim.sam import SAM, FriendlySAM
from ltfast.optim.statistics import frozen_statistics

__all__ = ["SAM", "FriendlySAM", "frozen_statistics"]
