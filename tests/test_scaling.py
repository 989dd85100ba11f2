"""The model on paper: its tables are those of docs/scaling.md, and what it says where the answer is known."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling_model as model  # noqa: E402
import scaling_plan as plan  # noqa: E402

FREE = dataclasses.replace(model.ASSUMED, inside=1e30, between=1e30, latency_inside=0, latency_between=0, jitter=0)


def test_free_communication_scales_perfectly_and_slow_does_not() -> None:
    alone = model.step_seconds("gsa-full", 1, 128, 8142, FREE)["seconds"]
    for world in model.WORLDS:
        assert model.step_seconds("gsa-full", world, 128, 8142, FREE)["seconds"] == pytest.approx(alone)
    slow = dataclasses.replace(FREE, between=1e8)
    assert model.step_seconds("gsa-full", 8, 128, 8142, slow)["seconds"] == pytest.approx(alone)
    assert model.step_seconds("gsa-full", 16, 128, 8142, slow)["seconds"] > 1.5 * alone


def test_what_hides_and_what_does_not() -> None:
    slow = dataclasses.replace(FREE, inside=20e9)
    for method in ("bcl", "gsa-full"):
        alone = model.step_seconds(method, 1, 128, 8142, slow)["seconds"]
        compiled = model.step_seconds(method, 8, 128, 8142, slow)
        eager = model.step_seconds(method, 8, 128, 8142, dataclasses.replace(slow, overlap=model.EAGER_OVERLAP))
        assert compiled["seconds"] == pytest.approx(alone + model.all_reduce(compiled["bytes"], 8, slow))
        assert eager["seconds"] == pytest.approx(alone + model.all_reduce(25 * 2**20, 8, slow))


class Products(TorchDispatchMode):
    """Notes every matrix product inside."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.noted.append("product")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_backward_hands_over_every_gradient_at_its_end(compiled: bool) -> None:
    """Why the model hides nothing: `GradientReducer` can send a gradient when autograd calls its hook, not before."""
    net, noted = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4))), []
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: noted.append("gradient"))
    function = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else net
    loss = function(torch.ones(2, 8)).sum()
    with Products(noted):
        loss.backward()
    assert noted.count("gradient") == 4
    last = len(noted) - noted[::-1].index("product")
    assert noted[:last].count("gradient") == (0 if compiled else 3)


def test_all_reduce_by_hand() -> None:
    m = dataclasses.replace(model.ASSUMED, latency_inside=1.0, latency_between=100.0)
    assert model.all_reduce(300e9, 1, m) == 0
    assert model.all_reduce(300e9, 2, m) == pytest.approx(1.0 + 2)  # half of it there and back, two hops
    # Seven eighths twice inside; then an eighth of it over two machines' wires.
    assert model.all_reduce(300e9, 16, m) == pytest.approx(1.75 + 14 + 300e9 / 8 / 40e9 + 200)


def test_the_docs_tables_are_the_models() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    said = re.search(r"three\s+views at ([\d,]+) images/s", text)
    assert said is not None
    machine = dataclasses.replace(
        model.ASSUMED, rate=float(said[1].replace(",", ""))
    )  # the measured one when they were made
    for head, table in (("128 images a GPU", model.weak_scaling), ("global batch 1,024", model.strong_scaling)):
        lines = text[text.index(f"| {head} |") :].split("\n\n")[0].splitlines()
        found = [[float(cell) for cell in line.split("|")[2:-1]] for line in lines if "ms a step" in line]
        costs: dict[str, list[float]] = {}
        for name, _, cost in table(machine):
            costs.setdefault(name, []).append(1e3 * cost["seconds"])
        wanted = [row for name, row in costs.items() if not name.startswith("gsa-paper")]  # in the docs with bcl
        assert len(found) == len(wanted)
        for row, values in zip(found, wanted, strict=True):
            assert row == pytest.approx(values, rel=0.012)
    assert model.weak_scaling(model.ASSUMED)[7][2]["seconds"] == model.weak_scaling(model.ASSUMED)[0][2]["seconds"]


def test_figures_of_the_plan_are_committed_rows() -> None:
    rows = {}
    for line in (ROOT / "benchmarks" / "results" / "scale.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["case"], row["metric"]] = row["value"]
    text = (ROOT / "docs" / "scaling.md").read_text()
    sharded = "model/sharded/bcl/local/resnet50/C=1000000/P=64"
    measured = rows["host/a rank/torch loader/n=2000000", "bytes_an_image_all"]
    assert f"of a list: {measured:.0f} bytes an image in every rank, measured" in text
    assert f"of the remaining {rows[sharded, 'gib_a_gpu']:.1f} GiB" in text
    found = model.measured_rate()  # one machine for the whole line, that of the tables above it
    machine = dataclasses.replace(model.ASSUMED, rate=found[0]) if found else model.ASSUMED
    assert rows[sharded, "seconds"] == pytest.approx(plan.sharded_step(plan.MILLION, 64, machine)["seconds"])
    pairs = []  # step without and with the work of size C, in ms
    for classes in (8142, plan.MILLION):
        seconds = model.step_seconds("bcl", 64, 128, classes, machine)["seconds"]
        pairs.append((seconds, seconds + plan.class_seconds(classes)))
    whole = rows[sharded, "seconds"]
    pairs.append((whole - plan.class_seconds(plan.MILLION, 128, 64), whole))
    small, million, shards = (f"{1e3 * without:.0f}, {1e3 * with_:.0f}" for without, with_ in pairs)
    assert f"| {small} | | {million} | {shards} |" in text


@pytest.mark.parametrize("world", [3, 8])
def test_a_sharded_softmax_is_the_whole_one(world: int) -> None:
    errors = plan.sharded_softmax(world, classes=5_000, width=16, batch=33)
    assert errors["loss_error"] < 1e-6  # observed 6e-8
    assert errors["feature_gradient_error"] < 1e-5  # observed 3e-7
    assert errors["gram_error"] < 1e-4  # observed 1e-6


def test_memory_that_sharding_cannot_share() -> None:
    assert plan.sharded_memory(plan.MILLION, 1) == pytest.approx(130.4, rel=0.01)
    assert 7 < plan.sharded_memory(plan.MILLION, 10**6) < 9
