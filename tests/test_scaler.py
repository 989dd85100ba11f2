"""The loss scale against torch.amp.GradScaler's rules, written out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ltfast import build
from ltfast.errors import UserError
from ltfast.flat import FlatBuffers, FlatParameters
from ltfast.losses import membership_for
from ltfast.models import LongTailModel
from ltfast.objective import Forward
from ltfast.optim.engine import Engine
from ltfast.recipes import build_config
from ltfast.scaler import LARGEST, LossScale
from ltfast.step import TrainStep
from ltfast.update import Update
from tests.test_compiled import KINDS
from tests.test_step import COUNTS, GROUPS, difference, flat_of, make


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


def take_steps(
    name: str, scaler: LossScale | None, *, half: bool = False, n: int = 6
) -> tuple[LongTailModel, TrainStep]:
    """n steps of a kind from the same start; half: under fp16 autocast."""
    rule, kind = KINDS[name]
    net, objective, batch = make("bcl")
    flat = FlatParameters(net.parameters())
    update = Update(flat, weight_decay=1e-3, scaler=scaler, clip=5.0)
    update.lr.fill_(0.02)
    forward = Forward(net, objective, (lambda: torch.autocast("cpu", torch.float16)) if half else nullcontext)
    member = None if rule is None else membership_for(kind, COUNTS, GROUPS)
    step = TrainStep(net, objective, flat, FlatBuffers(net), update, rule, member, forward=forward)
    net.train()
    for _ in range(n):
        step(batch)
    return net, step


@pytest.mark.parametrize("name", KINDS)
def test_a_power_of_two_changes_no_step(name: str) -> None:
    """In float32, where nothing overflows, scaling and unscaling are exact: observed difference 0."""
    net, _ = take_steps(name, None)
    scaled, step = take_steps(name, LossScale(torch.device("cpu"), initial=256.0))
    assert difference(net, scaled) < 1e-7
    assert float(step.update.skipped) == 0


@pytest.mark.parametrize("name", ["plain", "sam", "gsa-full", "gsa-paper", "gsa-release"])
def test_overflow_skips_the_step_and_halves_the_scale(name: str) -> None:
    """Losses times 2^126 are infinite in float32: nothing moves until the scale fits; nothing is poisoned after."""
    scaler = LossScale(torch.device("cpu"))
    scaler.scale.fill_(2.0**126)
    scaler.inverse.fill_(2.0**-126)
    before, _ = take_steps(name, None, n=0)
    net, step = take_steps(name, scaler, n=1)
    assert float(step.update.skipped) == 1
    assert difference(net, before) == 0
    assert float(scaler.scale) == LARGEST
    net, _ = take_steps(name, scaler, n=12)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert difference(net, before) > 0


def overflow_on_the_way_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ascent says that it has overflowed."""
    ascend = Engine.ascend

    def overflowing(self: Engine, *args: Any, **kwargs: Any) -> Tensor:
        coef = ascend(self, *args, **kwargs)
        self.stats |= {"bad": torch.ones(())}
        return coef

    monkeypatch.setattr(Engine, "ascend", overflowing)


def test_an_overflow_on_the_way_up_alone_skips_the_step_too(monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_on_the_way_up(monkeypatch)
    scaler = LossScale(torch.device("cpu"), initial=256.0)
    before, _ = take_steps("sam", None, n=0)
    net, step = take_steps("sam", scaler, n=1)
    assert float(step.update.skipped) == 1
    assert float(scaler.scale) == 128
    assert difference(net, before) == 0


def test_an_overflow_on_the_way_up_skips_no_step_that_repeats_the_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    overflow_on_the_way_up(monkeypatch)
    _, step = take_steps(
        "one-view ascent", LossScale(torch.device("cpu"), initial=256.0), n=2
    )  # climbs in every second
    assert float(step.update.skipped) == 1


@pytest.mark.parametrize("name", ["plain", "gsa-full", "gsa-paper"])
def test_half_precision_stays_near_float32(name: str) -> None:
    """Three steps under fp16 autocast end where float32's do: observed 4 to 6 % of the way in between."""
    end, _ = take_steps(name, None, n=3)
    start, _ = take_steps(name, None, n=0)
    half, step = take_steps(name, LossScale(torch.device("cpu"), initial=1024.0), half=True, n=3)
    assert float(step.update.skipped) == 0
    a, b, c = (flat_of([p.detach() for p in net.parameters()]) for net in (start, end, half))
    assert (c - b).norm() < 0.15 * (b - a).norm()


@pytest.mark.parametrize(
    ("precision", "capability", "dtype"),
    [("auto", (7, 5), torch.float16), ("auto", (8, 0), torch.bfloat16), ("bf16", (7, 0), torch.bfloat16),
     ("fp16", (9, 0), torch.float16), ("tf32", (7, 5), None)],
)  # fmt: skip
def test_auto_is_fp16_with_its_scale_where_a_gpu_has_no_bf16(
    monkeypatch: pytest.MonkeyPatch, precision: str, capability: tuple[int, int], dtype: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(build, "LossScale", lambda device: "scale")
    config, device = build_config("digits-lt", "bcl", {}, {"precision": precision}), torch.device("cuda:0")
    made = build.build_autocast(config, device)
    assert (None if made is nullcontext else made.args) == (None if dtype is None else ("cuda", dtype))
    assert build.build_scaler(config, device) == ("scale" if dtype == torch.float16 else None)


def test_own_convolutions_need_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    config, device = build_config("digits-lt", "bcl", {}, {"convolutions": "kernel"}), torch.device("cuda:0")
    build.check_convolutions(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    build.check_convolutions(config, device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    build.check_convolutions(build_config("digits-lt", "bcl", {}, {}), device)
    with pytest.raises(
        UserError, match=r"--convolutions kernel: cuda:0 has .* 7\.5, .* 8\.0 .*--convolutions library$"
    ):
        build.check_convolutions(config, device)
