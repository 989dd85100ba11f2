"""Other people's code beside ours: stand-in gradients, counted whole steps, adapters, tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ablation  # noqa: E402
import gpu_tables  # noqa: E402
import harness  # noqa: E402
import peer_code  # noqa: E402
import peer_pipeline  # noqa: E402
import peer_setting  # noqa: E402
import peer_steps  # noqa: E402
import peer_tables  # noqa: E402
import peer_training  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
from ablation_cells import RELEASE, Cell  # noqa: E402

from ltfast.recipes import build_config  # noqa: E402
from tests.peak import peak_bytes  # noqa: E402


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty results folder."""
    for module in (report, report.figures, peer_tables):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    return tmp_path


def test_stand_in_gradients_are_the_given_ones() -> None:
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(5))]
    losses = peers.Losses(params)
    (losses.groups()[0] * torch.tensor([1.0, 2.0, 0.0, -1.0])).sum().backward()
    for i, param in enumerate(params):
        want = losses.grads[0][i] + 2 * losses.grads[1][i] - losses.grads[3][i]
        torch.testing.assert_close(param.grad, want)


def test_under_the_clock_gradients_come_from_stock() -> None:
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(5))]
    losses = peers.Losses(params)
    losses.restock(1)
    assert len(losses.stock) == peers.GROUPS + 1
    losses.backward(0)  # the last of the stock, which starts again with row 0
    torch.testing.assert_close(params[0].grad, losses.grads[0][0])
    found = torch.autograd.grad(losses(0), params)
    torch.testing.assert_close(found[1], losses.grads[3][1])
    assert len(losses.stock) == peers.GROUPS - 1


def test_contenders_are_timed_in_turns_and_compared_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b")}
    found = harness.in_turns(calls, 2, {"b": lambda: order.append("before b")})
    assert order == ["a", "before b", "b"] * 2
    assert {name: len(values) for name, values in found.items()} == {"a": 2, "b": 2}
    made = harness.compared({"a": [1.0, 10.0, 3.0], "b": [2.0, 20.0, 9.0]}, "a", "a")
    assert made["b"]["seconds_vs_a"] == harness.timing([2.0, 2.0, 3.0])
    assert made["b"]["seconds"].median == 9.0
    assert harness.compared({"a": []}, "a", "a") == {}


def test_on_a_gpu_the_clock_starts_with_an_empty_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    event = SimpleNamespace(record=lambda: order.append("event"), elapsed_time=lambda end: 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    harness.in_turns({"a": lambda: order.append("a")}, 1, {"a": lambda: order.append("before")})
    assert order == ["before", "wait", "event", "a", "event", "wait"]


def test_device_time_is_measured_behind_a_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    event = SimpleNamespace(record=lambda: order.append("event"), elapsed_time=lambda end: 2000.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("queue"))
    found = harness.device_time(lambda: order.append("call"), repetitions=2)
    assert order == ["call", "wait", "queue", *["event", "call", "event"] * 2, "wait"]
    assert (found.median, found.n) == (2.0, 2)


def test_no_further_round_starts_after_the_budget() -> None:
    assert len(harness.in_turns({"a": lambda: None}, 50, {}, budget=-1.0)["a"]) == 1


def test_a_pipeline_of_processes_is_timed_in_whole_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, taken = iter(range(100)), iter(range(100))
    monkeypatch.setattr(peer_pipeline, "time", SimpleNamespace(process_time=lambda: next(ticks), perf_counter=None))
    median, *_, n = peer_pipeline.rate(taken, 5, "cpu", 3, together=4)
    assert (median, n) == (20, 3)  # four batches of five in one tick
    assert next(taken) == 2 * 4 + 3 * 4


def test_our_sam_and_foreach_sam_take_the_same_step() -> None:
    def stepped(make: peers.Make) -> torch.Tensor:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(7, 3)), torch.nn.Parameter(torch.randn(11))]
        start = torch.cat([p.detach().flatten().clone() for p in params])
        step = make(params, peers.Losses(params))
        step()
        step()
        after = torch.cat([p.detach().flatten() for p in params])
        assert not torch.equal(start, after)
        return after

    makers = {name: make for name, make, _ in peers.ours()}
    torch.testing.assert_close(
        stepped(makers["ltfast/sam"]), stepped(makers["torch/foreach-sam"]), rtol=1e-5, atol=1e-6
    )


def test_compiled_sam_takes_the_same_step_as_foreach_sam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda dynamic: lambda function: function)  # the arithmetic, not the compiler
    makers = {name: make for name, make, _ in peers.ours()}
    results = []
    for make in (makers["torch/foreach-sam"], peers.compiled_sam):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(7, 3)), torch.nn.Parameter(torch.randn(11))]
        step = make(params, peers.Losses(params))
        step()
        step()
        results.append(torch.cat([p.detach().flatten() for p in params]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


class Setting:
    """Whole steps on a small network, made once."""

    made: peer_setting.Setting | None = None

    @classmethod
    def get(cls) -> peer_setting.Setting:
        cls.made = cls.made or peer_setting.Setting("resnet8", 12, torch.device("cpu"))
        return cls.made


def test_whole_steps_of_ours_are_counted_over_their_period() -> None:
    makers = dict(peer_steps.ours(Setting.get()))
    plain, sam = (peer_steps.counted(makers[name]()) for name in ("ltfast/ce", "ltfast/ce+sam"))
    assert sam["gflops"] / plain["gflops"] == pytest.approx(2, rel=0.01)
    assert plain["syncs_per_step"] == sam["syncs_per_step"] == 0
    assert 0 < plain["peak_mib"] < 200
    assert makers["ltfast/gkp-gsa"]().period == 16


def test_a_peak_of_memory_is_found() -> None:
    def run_steps(n: int) -> None:
        for _ in range(n):
            first = torch.zeros(1 << 20)  # 4 MiB
            second = torch.zeros(1 << 21)  # 8 MiB: 12 at once
            del first, second
            torch.zeros(1 << 20)

    assert peak_bytes(lambda: run_steps(2)) / 2**20 == pytest.approx(12, abs=0.1)


def test_a_released_training_loop_runs_as_it_is(tmp_path: Path) -> None:
    """A stand-in with the release's names: moves to CUDA unasked, reads values on the host, does more than its steps."""
    (tmp_path / "sam.py").write_text("")
    (tmp_path / "cifar_OneBackward.py").write_text(STAND_IN)
    make = peer_code.release_steps(Setting.get(), {"release": tmp_path / "sam.py"})
    assert make is not None
    found = peer_steps.counted(peer_steps.Contender("x", "bcl", make(), around=True))
    assert found["syncs_per_step"] == 2  # .cpu() and .item() of a step; the epoch's own .item() is not a step's
    assert found["gflops"] > 0
    assert peer_code.release_steps(Setting.get(), {}) is None


STAND_IN = """
import torch
from torch import nn
from tensorboardX import SummaryWriter
def ResNet32Model(classes, use_norm, classifier): return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))
class LogitAdjust(nn.Module):
    def __init__(self, counts): super().__init__(); self.m = torch.cuda.FloatTensor(counts).log().cuda()
    def forward(self, x, y): return nn.functional.cross_entropy(x + self.m, y)
class BalSCL(nn.Module):
    def __init__(self, counts, temp): super().__init__()
class GSA:
    def __init__(self, params, base, adaptive, rho_scale_C): self.base = base
def train(loader, model, ce, scl, optimizer, epoch, args, writer, anchors, gammas, alpha):
    total = 0.0
    for views, targets in loader:
        targets.cpu().numpy()
        optimizer.base.zero_grad()
        loss = ce(model(views[0].cuda(args.gpu)), targets)
        loss.backward()
        optimizer.base.step()
        total += loss.item()
    writer.add_scalar("loss", torch.tensor(total).item(), epoch)
"""


def test_tables_of_other_code_say_what_was_not_measured(results: Path) -> None:
    config = {"base": "ce", "model": "m", "batch": 4, "groups": 4, "precision": "fp32"}
    figures = {"kernels": 5, "flops_vs_sgd": 2.0, "peak_mib": 1.25}
    rows = [
        {"case": "step/loop/a/SAM/m/B=4", "metric": k, "value": v, "cuda": None, "config": config}
        for k, v in figures.items()
    ]
    rows.append({"case": "a/SAM/m", "metric": "kernels", "value": 900, "cuda": None, "config": {}})
    rows.append({"case": "pipeline/x/y", "metric": "images_per_cpu_s", "value": 10.5, "cuda": None, "config": {}})
    (results / "peers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.other_code()
    assert "| `loop/a/SAM` | 5 | not counted | 2 | not measured | not counted | not counted | 1.25 |" in text
    assert "| `a/SAM` | 900 |" in text
    assert "| `x/y` | 10.5 | not measured |" in text


def test_tables_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_tables, "RESULTS", tmp_path)
    assert {make() for make in gpu_tables.TABLES.values()} == {"not measured"}

    def put(
        bench: str, case: str, cuda: str | None = "13", config: dict[str, str] | None = None, **values: float
    ) -> None:
        facts = {"device": "GPU", "torch": "2", "triton": "3", "cuda": cuda, "config": config or {}}
        with open(tmp_path / f"{bench}.jsonl", "a") as file:
            for metric, value in values.items():
                file.write(json.dumps({"case": case, "metric": metric, "value": value, **facts}) + "\n")

    put("kernels", "gram/ltfast/R=1/N=5", seconds=3e-6, device_seconds=2e-6, share_of_copy=0.9)
    put("kernels", "gram/eager/R=1/N=5", seconds=9e-6, device_seconds=5e-6)
    put("kernels", "gram/compiled/R=1/N=5", seconds=9e-6)  # by the clock that both have
    put("kernels", "gram/fused/R=1/N=5", None, seconds=9.0)  # of a CPU
    assert "| `gram/R=1/N=5` | 2 | 0.90 | 2.50 | 3.00 |  |  |" in gpu_tables.kernels()
    values = {"seconds": 0.01, "images_per_s": 2e4, "ratio_vs_sgd": 2.0, "flops_vs_sgd": 2.0, "share_forward": 0.98}
    put("throughput", f"bcl/{gpu_tables.MODEL}", **values)
    put("throughput", "bcl/resnet50/224px", **values)
    assert "| `bcl/resnet32` | 10.0 | 20,000 | 2.00 | 2.00 | 2.0 % |" in gpu_tables.steps(readme=True)
    assert "resnet50" not in gpu_tables.steps(readme=True)
    assert "resnet50" in gpu_tables.steps()
    put("peers", "step/a/b/m/B=2", config={"base": "bcl", "load": "busy"}, seconds=0.5, seconds_vs_sgd=3.0)
    assert "| `a/b` | 3 | 500.0 | 3.00 | not measured | shared |" in gpu_tables.other_code()


def test_a_peer_class_is_taken_out_of_a_file_that_does_not_import(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("import not_installed\nclass SAM:\n    rho = torch.tensor(0.05).item()\n")
    assert peers.class_of(path, "SAM").rho == pytest.approx(0.05)
    with pytest.raises(SystemExit, match="defines no class GSA"):
        peers.class_of(path, "GSA")


RELEASED_STEPS = """
import torch
from torch import nn
import torch.nn.functional as F
from ltfast.losses import balanced_supcon
class LogitAdjust(nn.Module):
    def __init__(self, counts): super().__init__(); self.m = (torch.tensor(counts) / sum(counts)).log()
    def forward(self, x, y): return F.cross_entropy(x + self.m, y)
class BalSCL(nn.Module):
    def __init__(self, counts, temp): super().__init__(); self.temp = temp
    def forward(self, centres, z, y): return balanced_supcon(torch.cat(z.unbind(1)), centres, y, self.temp).mean()
class GSA:
    def __init__(self, params, base, adaptive, rho_scale_C): self.params, self.base, self.c, self.m = list(params), base, rho_scale_C, None
def train(loader, model, ce, scl, opt, epoch, args, writer, anchors, gammas, alpha):
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    n, d = anchors[0]["n_j"], sum(p.numel() for p in opt.params)
    for views, y in loader:
        def backward():
            opt.base.zero_grad()
            z, logits, centres = model(torch.cat(views))
            _, two, three = z.split(len(y))
            both = torch.stack([two, three], 1)
            (alpha * (args.alpha * ce(logits[:len(y)], y) + args.beta * scl(centres, both, y))).backward()
            return [p.grad.clone() for p in opt.params]
        g = backward()
        u = g if opt.m is None else [a - b for a, b in zip(g, opt.m)]
        opt.m = g if opt.m is None else [.9 * b + .1 * a for a, b in zip(g, opt.m)]
        theta = [p.detach().clone() for p in opt.params]
        length = lambda many: sum(t.square().sum() for t in many).sqrt()
        norm = length([t * v for t, v in zip(theta, u)])
        rho = (opt.c * (length(theta) / (2 * norm)).sqrt() * d**-.25 * (n - 1)**-.25).clamp(2e-3, 3e-3)
        with torch.no_grad():
            for p, t, v in zip(opt.params, theta, u):
                p.add_(t**2 * v * d**.5 * rho / norm)
        for m in norms: m.momentum = 0
        backward()
        for m in norms: m.momentum = .1
        with torch.no_grad():
            for p, t in zip(opt.params, theta): p.copy_(t)
        opt.base.step()
"""


def test_one_group_of_gsa_release_takes_the_steps_of_the_released_code(tmp_path: Path) -> None:
    """A stand-in that states them plainly, one group, alpha 1."""
    (tmp_path / "cifar_OneBackward.py").write_text(RELEASED_STEPS)
    config = build_config("digits-lt", "gsa-release", {}, {"groups": 1, "device": "cpu", "compile": "off"})
    found = list(peer_training.apart(tmp_path, config, 5))
    assert len(found) == 5
    assert max(found) < 1e-6


def test_a_released_training_is_tested_as_ours_are(tmp_path: Path) -> None:
    (tmp_path / "cifar_OneBackward.py").write_text(RELEASED_STEPS)
    flags = {"epochs": 12, "limit_train": 200, "seed": 3}
    found = ablation.run_released("digits-lt", Cell(RELEASE, {}), 3, flags, tmp_path)
    assert found.keys() == {"top1", "medium", "few", "ece"}
    assert found["top1"] > 25


def test_a_peer_may_be_given_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "sam.py").write_text("class SAM: ...")
    file = tmp_path / "sam.py"
    assert peers.paths_of([f"davda54={tmp_path}", f"fsam={file}"]) == {"davda54": file, "fsam": file}
    with pytest.raises(SystemExit, match=r"none: no such file"):
        peers.paths_of([f"release={tmp_path / 'none'}"])
