"""davda54/sam's import line replaced and nothing else: the same script run with either class ends at the same weights.

Needs that package's sam.py, given by its path in LTFAST_TEST_DAVDA54; it is run beside ours, never copied.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.optim import support

PEER = os.environ.get("LTFAST_TEST_DAVDA54")
pytestmark = pytest.mark.skipif(not PEER, reason="LTFAST_TEST_DAVDA54 does not name davda54/sam's sam.py")
TOLERANCE = 2e-6  # observed 1e-7 and less after 20 steps

SETUP = """
import torch
import torch.nn.functional as F
{line}

model = support.make("{model}")
base_optimizer = torch.optim.{base}
optimizer = SAM(model.parameters(), base_optimizer, {options})
"""
# What its README and its example do.
SCRIPTS = {
    "two steps": """
for step in range(20):
    x, y = support.batch(step)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
""",
    "closure": """
for step in range(20):
    x, y = support.batch(step)
    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step(closure)
    optimizer.zero_grad()
""",
    "groups and schedule": """
scheduler = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 7, 0.3)
for group in optimizer.param_groups:
    assert {"rho", "adaptive", "lr", "weight_decay", "params"} <= set(group)
for step in range(20):
    x, y = support.batch(step)
    F.cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    F.cross_entropy(model(x), y).backward()
    optimizer.second_step(zero_grad=True)
    scheduler.step()
    for group in optimizer.param_groups:
        group["rho"] = 0.05 + 0.01 * step
""",
}
CASES = [
    ("SGD", "rho=0.2, lr=0.05, momentum=0.9, weight_decay=5e-4"),
    ("SGD", "rho=2.0, adaptive=True, lr=0.05, momentum=0.9, nesterov=True"),
    ("AdamW", "rho=0.1, lr=1e-3, eps=1e-3"),
    ("Adam", "rho=0.1, lr=1e-3, eps=1e-3"),
]


@pytest.fixture(scope="module", autouse=True)
def sam() -> Iterator[None]:
    """The package's file as module `sam`, as its import line wants it."""
    assert PEER is not None
    spec = importlib.util.spec_from_file_location("sam", Path(PEER))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sam"] = module
    spec.loader.exec_module(module)
    yield
    del sys.modules["sam"]


def run(line: str, script: str, model: str, base: str, options: str) -> list[Tensor]:
    space = {"support": support}
    exec(SETUP.format(line=line, model=model, base=base, options=options) + script, space)
    return [p.detach().clone() for p in space["model"].parameters()]  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", ["mlp", "conv", "vit"])
@pytest.mark.parametrize(("base", "options"), CASES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_only_the_import_line_changes(script: str, base: str, options: str, model: str) -> None:
    theirs = run("from sam import SAM", SCRIPTS[script], model, base, options)
    ours = run("from ltfast.optim import SAM", SCRIPTS[script], model, base, options)
    start = [p.detach() for p in support.make(model).parameters()]
    assert max(float((p - q).abs().max()) for p, q in zip(ours, start, strict=True)) > 1e-3
    assert max(float((p - q).abs().max()) for p, q in zip(ours, theirs, strict=True)) < TOLERANCE
    assert all(torch.isfinite(p).all() for p in ours)
