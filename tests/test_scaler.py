"""The loss scale against torch.amp.GradScaler's rules, written out."""

from __future__ import annotations

import pytest
import torch

from ltfast.scaler import LARGEST, LossScale


def by_hand(overflows: list[bool], scale: float, interval: int) -> list[float]:
    good, scales = 0, []
    for overflow in overflows:
        if overflow:
            scale, good = scale / 2, 0
        else:
            good += 1
            if good == interval:
                scale, good = scale * 2, 0
        scales.append(scale)
    return scales


@pytest.mark.parametrize("seed", range(4))
def test_grows_and_backs_off_as_the_rules_say(seed: int) -> None:
    torch.manual_seed(seed)
    overflows = (torch.rand(60) < 0.15).tolist()
    scaler = LossScale(torch.device("cpu"), initial=1024.0, interval=5)
    addresses = [t.data_ptr() for t in scaler.state().values()]
    seen = []
    for overflow in overflows:
        scaler.update(torch.tensor(float(overflow)))
        assert float(scaler.scale * scaler.inverse) == 1.0
        seen.append(float(scaler.scale))
    assert seen == by_hand(overflows, 1024.0, 5)
    assert seen != by_hand(overflows, 1024.0, 6)
    assert addresses == [t.data_ptr() for t in scaler.state().values()]  # a CUDA graph reads them there


def test_stays_in_range() -> None:
    scaler = LossScale(torch.device("cpu"), initial=LARGEST, interval=1)
    scaler.update(torch.zeros(()))
    assert float(scaler.scale) == LARGEST
    for _ in range(60):
        scaler.update(torch.ones(()))
    assert 0 < float(scaler.scale) < 1
    assert torch.isfinite(scaler.inverse)
