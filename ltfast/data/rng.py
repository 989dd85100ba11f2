"""Counter-based random numbers: what an image gets depends on (seed, epoch, view, position, draw number) and on nothing
else.

splitmix64 (Steele, Lea, Flood 2014) in int64 tensor arithmetic, which wraps alike on CPU and CUDA. Because no generator
state is carried, the numbers are the same on every device, for every world size, for every batch composition, and after
a resume; and drawing them needs no host synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MUL_1 = 0xBF58476D1CE4E5B9
_MUL_2 = 0x94D049BB133111EB
STREAM_DRAWS = 1 << 16
"""Draws reserved for one stream (view) of one sample; `uniforms` refuses more."""


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _mix_int(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MUL_1) & _MASK
    value = ((value ^ (value >> 27)) * _MUL_2) & _MASK
    return value ^ (value >> 31)


def fold(*values: int) -> int:
    """A 63-bit hash of the integers, order mattering; seeds torch.Generator and the keys below."""
    state = 0
    for value in values:
        state = _mix_int((state + _GAMMA + (value & _MASK)) & _MASK)
    return state >> 1


def generator(*values: int) -> torch.Generator:
    """A CPU generator seeded by `fold(*values)`."""
    return torch.Generator().manual_seed(fold(*values))


def epoch_key(seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """The int64 scalar tensor that stands for (seed, epoch) in `uniforms`: a tensor, so that a compiled step is not
    rebuilt."""
    return torch.tensor(fold(seed, epoch), dtype=torch.int64, device=device)


def _mix(x: Tensor) -> Tensor:
    # >> on int64 is arithmetic in torch: the mask makes it logical.
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(_MUL_1)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(_MUL_2)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniforms(key: Tensor, index_B: Tensor, stream: int, draws: int) -> Tensor:
    """[B, draws] float32 in [0, 1), multiples of 2^-24.

    key: `epoch_key`; index_B: int64 position of each sample; stream: which view asks; draws: numbers a sample needs.
    """
    if not 0 < draws <= STREAM_DRAWS:
        raise ValueError(f"draws must be in 1..{STREAM_DRAWS}, got {draws}")
    base = _mix(key ^ _mix((index_B + 1) * _signed(_GAMMA)))
    counter = torch.arange(1, draws + 1, device=index_B.device) + stream * STREAM_DRAWS
    # The sum is multiplied, not the counter: Inductor folds arange * constant symbolically and overflows int64.
    bits = _mix((base[:, None] + counter) * _signed(_GAMMA))
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24
