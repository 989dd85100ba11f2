"""Sharpness-aware optimizers: drop-in for other training loops, and the engine of ltfast's own."""

from ltfast.optim.gsa import CCSAM, GSA, FocalSAM, ImbSAM
from ltfast.optim.sam import SAM, FriendlySAM
from ltfast.optim.statistics import frozen_statistics

__all__ = ["CCSAM", "GSA", "SAM", "FocalSAM", "FriendlySAM", "ImbSAM", "frozen_statistics"]
