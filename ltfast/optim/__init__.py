"""Sharpness-aware optimizers: drop-in for other training loops, and the engine of ltfast's own.

The drop-in optimizers, from the ground up:
    TwoPasses         passes.py        a step that has begun: theta + eps and back, loss scaling, BatchNorm, several processes
    OverBase          over_base.py     the base optimizer: its own steps, hooks and state dicts
    StoredOptimizer   state.py         state dicts, copies and pickles
    FlatOptimizer     base.py          flat parameters and gradients, the fused update that restores theta, the anchor
    SAM, FriendlySAM  sam.py           one gradient: first_step and second_step, or a closure
    AcrossProcesses   across.py        (on FlatOptimizer) group gradients of several processes
    GroupAscent       group_ascent.py  the ascent by group losses
    GroupedOptimizer  grouped.py       the step by closures
    GSA, ImbSAM, ...  gsa.py           their rules and arguments
"""

from ltfast.optim.gsa import CCSAM, GSA, FocalSAM, ImbSAM
from ltfast.optim.sam import SAM, FriendlySAM
from ltfast.optim.statistics import frozen_statistics

__all__ = ["CCSAM", "GSA", "SAM", "FocalSAM", "FriendlySAM", "ImbSAM", "frozen_statistics"]
