"""What a run does on a GPU, on one that is pretended (tests/pretended.py): where tensors lie, who waits for what, recorded steps."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ltfast.cli import main
from ltfast.optim import SAM
from tests.pretended import Gpu, OnDevice, pretended_gpu

SMALL = ("--device", "cuda", "--precision", "fp32", "--epochs", "4", "--scout", "0.5", "--warmup", "1")
EAGER = ("--compile", "off", "--capture", "off")


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with pretended_gpu() as gpu:
        yield gpu


def train(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """The log of a run, without what depends on the clock."""
    assert main(["train", *SMALL, "--out", str(folder), *flags]) == 0
    return log(folder)


def log(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "compiling", "images_per_s", "time")
    return [
        {k: v for k, v in row.items() if k not in clocks} for row in rows if row["kind"] not in ("compile", "capture")
    ]


# -- the pretence itself -------------------------------------------------------------------------------------------------


def test_both_sides_in_one_operation_are_refused(gpu: Gpu) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    for mix in (
        lambda: there + here,
        lambda: torch.cat([here, there]),
        lambda: here[there.long()],
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, TypeError), match=r"cuda|indices"):
            mix()
    assert (there * torch.tensor(2.0)).tolist() == [2, 2, 2]
    there.copy_(here)
    assert there.to("cpu").device.type == "cpu"


def test_a_copy_that_does_not_wait_arrives_when_something_waits(gpu: Gpu) -> None:
    there, here = torch.arange(3.0, device="cuda"), torch.empty(3, pin_memory=True)
    here.copy_(there, non_blocking=True)
    there.add_(1)  # after the copy
    assert here.isnan().all()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert here.tolist() == [0, 1, 2]
    source = torch.zeros(3)
    there.copy_(source, non_blocking=True)
    source += 1
    with pytest.raises(AssertionError, match="under way"):
        event.synchronize()


def test_a_module_moves_there_and_back_as_the_same_parameters(gpu: Gpu) -> None:
    model = nn.Linear(3, 2)
    weight = model.weight
    model.cuda()
    assert model.weight is weight
    assert weight.is_cuda
    loss = model(torch.ones(1, 3, device="cuda")).sum()
    seen: list[Tensor] = []
    loss.register_hook(seen.append)
    (grad,) = torch.autograd.grad(loss, weight)
    assert isinstance(grad, OnDevice)
    assert isinstance(seen[0], OnDevice)
    model.cpu()
    assert type(weight) is nn.Parameter


# -- runs ----------------------------------------------------------------------------------------------------------------


def test_an_optimizer_works_on_another_gpu_than_the_current_one() -> None:
    """torch refuses to share memory of such a one."""
    with pretended_gpu(2) as gpu:
        gpu.device = torch.device("cuda", 1)
        with pytest.raises(BufferError):
            torch.from_dlpack(torch.zeros(3, device="cuda:1"))
        torch.manual_seed(0)
        model = nn.Linear(3, 2).to("cuda:1")
        x = torch.ones(4, 3, device="cuda:1")
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().sum()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        copy.deepcopy(optimizer)
        assert optimizer.step(closure) < first
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("method", ["gkp-gsa", "gsa-paper+gkp", "bcl+imbsam", "ce+friendly-sam"])
def test_recorded_runs_are_the_eager_ones(gpu: Gpu, tmp_path: Path, method: str) -> None:
    eager = train(tmp_path / "eager", "--method", method, *EAGER)
    assert train(tmp_path / "recorded", "--method", method) == eager


def test_a_run_resumes_and_serves(gpu: Gpu, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    whole = train(run, "--keep-checkpoints", "3")
    weights = (run / "checkpoints" / "last.safetensors").read_bytes()
    states = sorted((run / "checkpoints").glob("state-*.safetensors"))
    for state in states[1:]:
        state.unlink()
    assert main(["train", "--resume", str(run)]) == 0
    assert (run / "checkpoints" / "last.safetensors").read_bytes() == weights
    assert log(run) == whole

    with (tmp_path / "digit.png").open("wb") as file:
        Image.new("L", (8, 8), 200).save(file)
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["nonfinite"] == 0
    assert main(["predict", str(run), str(tmp_path / "digit.png"), "--device", "cuda"]) == 0
    assert main(["export", str(run), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 0
    assert main(["report", str(run), "--max-minutes", ".1"]) == 0
    assert (run / "report" / "index.html").exists()


@pytest.mark.parametrize("method", ["gsa-paper", "gsa-release+gkp"])
def test_the_host_waits_as_often_whatever_the_number_of_steps(gpu: Gpu, tmp_path: Path, method: str) -> None:
    """Events left out: those are waited for in another thread, or are a whole interval old."""
    found = []
    for batch in ("64", "16"):
        gpu.waits.clear()
        train(tmp_path / batch, "--method", method, "--batch", batch, *EAGER)
        found.append({(*k, n) for k, n in gpu.waits.items() if k[0] != "event"})
    assert found[0] ^ found[1] == set()


def test_half_precision_trains(gpu: Gpu, tmp_path: Path) -> None:
    """Loss scaling, unscaling of the group gradients, skipped steps: all without the host; from an imprinted classifier."""
    method = ("--method", "gsa-exact+gkp", "--objective", "per_group", "--imprint", "on")
    rows = train(tmp_path / "run", "--precision", "fp16", *method)
    losses = [row["loss"] for row in rows if row["kind"] == "epoch" and row["phase"] == "train"]
    assert losses[-1] < losses[0]


def test_the_images_of_bad_steps_are_known_in_recorded_runs(gpu: Gpu, tmp_path: Path) -> None:
    """A recorded batch lies where the last one lay."""
    found = []
    for name, flags in (("eager", EAGER), ("recorded", ())):
        run = tmp_path / name
        assert (
            main(
                ["train", *SMALL, "--method", "bcl", "--lr", "1e15", "--max-bad-steps", "5", "--out", str(run), *flags]
            )
            == 2
        )
        found.append((run / "bad_steps.json").read_text())
    assert found[0] == found[1]


def test_untimed_steps_leave_nothing_but_recordings(gpu: Gpu, tmp_path: Path) -> None:
    cold = train(tmp_path / "cold")
    assert train(tmp_path / "warm", "--untimed-steps", "6") == cold


@pytest.mark.dist
def test_two_gpus_train_as_two_processes_of_a_cpu_do(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("from tests.pretended import stay\n\nstay(2)\n")
    root = str(Path(__file__).parent.parent)
    flags = ("--ascent", "global", "--sync-bn", *SMALL[2:])
    for name, own, paths in (("gpu", ("--gpus", "2"), [str(tmp_path), root]), ("cpu", ("--procs", "2"), [])):
        command = [sys.executable, "-m", "ltfast", "train", *own, *flags, "--out", str(tmp_path / name)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    for ours, other in zip(log(tmp_path / "gpu"), log(tmp_path / "cpu"), strict=True):
        assert ours["kind"] == other["kind"]
        if ours["kind"] == "epoch" and ours["phase"] == "train":
            assert ours["loss"] == pytest.approx(other["loss"], rel=0.02)
