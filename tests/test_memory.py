"""Estimated memory of a step against what autograd really keeps, and the message for a batch that does not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from ltfast import memory
from ltfast.dist import Ranks
from ltfast.errors import UserError
from ltfast.memory import GIB, OVERHEAD, Activations, activations, available_memory, kept_bytes, state_bytes, too_large
from ltfast.models import LongTailModel, create_encoder
from ltfast.objective import Objective
from ltfast.plan import flops_of_run, make_plan, print_plan
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.train import Trainer, train
from tests.data.pictures import make_set

COUNTS = torch.tensor([50, 30, 20, 10, 5])


def model(name: str, kind: str) -> tuple[LongTailModel, Objective]:
    encoder, dim = create_encoder(name, 3)
    net = LongTailModel(encoder, dim, len(COUNTS), projection=(32, 16) if kind == "bcl" else None)
    return net.train(), Objective(kind, COUNTS)


@pytest.mark.parametrize("kind", ["ce", "bcl"])
@pytest.mark.parametrize("name", ["resnet8", "resnet18"])
def test_estimate_is_what_autograd_keeps(name: str, kind: str) -> None:
    """Three small batches of fake tensors foretell a larger real one to a part in 10^6; the model is not touched."""
    net, objective = model(name, kind)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    estimate = activations(net, objective, (3, 32, 32))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    for batch in (24, 40):
        real = kept_bytes(net, objective, batch, (3, 32, 32), fake=False)
        assert estimate.at(batch) == pytest.approx(real, rel=1e-6)
    assert (estimate.square > 1) == (kind == "bcl")
    half = activations(net, objective, (3, 32, 32), lambda: torch.autocast("cpu", torch.bfloat16))
    assert 0.4 < half.linear / estimate.linear < 0.75


def test_largest_batch() -> None:
    for need in (Activations(0, 10, 0), Activations(100, 3, 0.5), Activations(0, 0, 2)):
        for room in (99, 100, 1234, 10**9):
            best = need.largest(room)
            assert need.at(best) <= room or best == 0
            assert need.at(best + 1) > room


def test_message_names_needs_and_remedy() -> None:
    need = Activations(0, 40 * 2**20, 0)
    text = too_large(4096, need, 1.5 * GIB, 80 * GIB, "cuda:0 (NVIDIA H200)")
    found = re.search(r"use --batch (\d+)$", text)
    assert found is not None
    batch = int(found[1])
    assert batch % 8 == 0
    assert 1.5 * GIB + OVERHEAD * need.at(batch) <= 80 * GIB < 1.5 * GIB + OVERHEAD * need.at(batch + 8)
    assert text == (
        "--batch 4096 does not fit on cuda:0 (NVIDIA H200): a step needs about 201.50 GiB (1.50 for weights, gradients, "
        "optimizer and data, 200.00 for activations), there are 80.00; the largest batch that would fit is about 1,600: "
        "use --batch 1600"
    )


def test_message_never_offers_what_just_failed() -> None:
    """The estimate may be too low; four processes share the batch, 64 images each."""
    text = too_large(256, Activations(0, 1, 0), 0, GIB, "cuda:0", world=4)
    assert text.endswith("use --batch 204")  # 4 * 51, and 51 = 64 / 1.25
    assert "not even one image a process would fit" in too_large(1, Activations(0, GIB, 0), 0, GIB, "cuda:0")


def test_a_step_that_main_memory_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_set(tmp_path / "data", (4, 3))
    values = {"data_dir": str(tmp_path / "data"), "model": "resnet18", "image_size": 64, "batch": 4, "device": "cpu"}
    config = build_config("folder", "ce", {}, {**values, "epochs": 1, "loader": "torch", "workers": 0})
    config = config.with_(out=str(tmp_path / "run"))
    monkeypatch.setattr(memory, "available_memory", lambda: 4 << 20)
    with pytest.raises(UserError, match=r"--batch 4 does not fit on the CPU: .* use --batch \d$"):
        train(config, progress=Progress())
    assert not (tmp_path / "run").exists()


def test_available_memory_is_known_here() -> None:
    assert available_memory() > 1 << 20


def test_a_run_that_runs_out_of_memory_ends_with_that_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = build_config("digits-lt", "gsa-full", {}, {"epochs": 1, "device": "cpu"})
    trainer = Trainer(config, None, Ranks(), Progress())
    weights = 4 * trainer.flat.size
    assert state_bytes(trainer) > 3 * weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "small GPU")

    def full(self: Trainer, epoch: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_epoch", full)
    with pytest.raises(UserError, match=r"--batch 64 does not fit on cpu \(small GPU\): .* use --batch \d+$"):
        train(config.with_(out=str(tmp_path / "run")), progress=Progress())


@pytest.mark.parametrize(
    ("method", "values", "copies"),
    [  # weights, gradient rows, slots of the optimizer, theta of an ascent, anchor
        ("ce", {}, 1 + 1 + 1),
        ("ce", {"optimizer": "adamw"}, 1 + 1 + 2),
        ("bcl+sam", {}, 1 + 1 + 1 + 1),
        ("bcl+gkp", {}, 1 + 1 + 1 + 2),
        ("gsa-paper", {}, 1 + 1 + 1),
        ("gsa-full", {"groups": 3}, 1 + 3 + 1 + 1),
        ("gsa-release", {"groups": 3}, 1 + 6 + 1 + 1),
        ("gsa-exact", {"groups": 3, "objective": "per_group"}, 1 + 4 + 1 + 1),
    ],
)
def test_a_plan_counts_what_a_run_keeps(method: str, values: dict, copies: int) -> None:
    plan = make_plan(build_config("digits-lt", method, {}, values))
    assert plan.state_bytes / (4 * plan.parameters) == pytest.approx(copies, rel=0.02)  # padding


def test_a_plan_counts_scouting_and_what_it_remembers() -> None:
    config = build_config("digits-lt", "gsa-exact", {}, {"epochs": 6, "scout": 0.5, "procs": 4})
    plan = make_plan(config)
    assert (plan.processes, plan.images_a_process, plan.scouting_epochs, plan.bank_groups) == (4, 16, 3, 4)
    assert plan.flops_vs_sgd == pytest.approx(4)
    assert flops_of_run(plan, 6) == pytest.approx((3 * 1 + 3 * 4) / 6)
    assert plan.scouting_flops == 1
    assert plan.bank_bytes_max / (4 * plan.encoder_parameters) == pytest.approx(3, rel=0.02)
    plan = make_plan(config.with_(regroup=1))
    assert plan.bank_bytes_max / (4 * plan.encoder_parameters) == pytest.approx(6, rel=0.02)
    assert make_plan(build_config("digits-lt", "bcl+sam", {}, {})).bank_groups == 0


def test_a_rule_without_groups_of_the_bank_climbs_while_scouting(capsys: pytest.CaptureFixture[str]) -> None:
    config = build_config("digits-lt", "bcl+sam+gkp", {}, {"epochs": 6, "scout": 0.5})
    plan = make_plan(config)
    assert (plan.scouting_epochs, plan.flops_vs_sgd, plan.scouting_flops, flops_of_run(plan, 6)) == (3, 2, 2, 2)
    print_plan(config)
    assert "2.00 x an SGD step on the same batch\n" in capsys.readouterr().out
    print_plan(build_config("digits-lt", "gsa-exact", {}, {"epochs": 6, "scout": 0.5}))
    assert "4.00 x an SGD step on the same batch (after scouting; 2.50 x over the run)\n" in capsys.readouterr().out
