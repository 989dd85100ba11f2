"""Every Python block of README.md and docs/*.md runs: the blocks of a page one after the other, as a reader would type them.

PRELUDE makes what a page takes as given (a model, a batch, a loss). Blocks for a framework that is not installed are
compiled only.
"""

from __future__ import annotations

import importlib
import importlib.util
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.docs.blocks import PAGES, Block, blocks
from tests.optim import support

PYTHON = {page.name: [b for b in blocks(page) if b.language == "python"] for page in PAGES}
WITH_PYTHON = [page for page, found in PYTHON.items() if found]
METHODS = ("def configure_optimizers(self)", "def __init__(self)")  # of a Lightning module


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One gloo process, for blocks with `ddp`."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def prelude() -> dict[str, Any]:
    """What the pages take as given."""
    torch.manual_seed(0)
    model = support.make("conv")
    x, y = support.batch()
    encoder, head = model[:-1], model[-1]
    return {
        "torch": torch, "F": F, "nn": nn, "model": model, "x": x, "y": y, "encoder": encoder, "head": head,
        "loss_fn": nn.CrossEntropyLoss(), "epochs": 2, "device": "cpu", "scaler": torch.amp.GradScaler("cpu"),
        "micro_batches": [(x[:10], y[:10]), (x[10:], y[10:])], "counts": support.COUNTS,
        "group_of_class": support.GROUP_OF_CLASS, "ddp": None,
    }  # fmt: skip


def weights(space: dict[str, Any]) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in space["model"].parameters()])


def run(block: Block, space: dict[str, Any]) -> None:
    """Execute a block; one that steps an optimizer must have moved the weights."""
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    if "ddp" in code.co_names:
        space["model"].zero_grad()
        space["ddp"] = nn.parallel.DistributedDataParallel(space["model"])
    if "accelerator" in code.co_names:
        if not importlib.util.find_spec("accelerate"):
            return  # compiled only; tests/optim/test_frameworks.py counts it as skipped
        accelerate = importlib.import_module("accelerate")
        space["accelerator"] = accelerate.Accelerator(cpu=True)
        space["loader"] = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(space["x"], space["y"]), 15)
    before = weights(space)
    exec(code, space)
    if "second_step" in block.text or "optimizer.step(" in block.text or "scaler.step(" in block.text:
        assert not torch.equal(before, weights(space)), f"{block.page}:{block.line} moved nothing"


@pytest.mark.parametrize("page", WITH_PYTHON)
@pytest.mark.usefixtures("process_group")
def test_blocks_of_a_page_run_in_order(page: str) -> None:
    space = prelude()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the frameworks
        for block in PYTHON[page]:
            if not block.text.startswith(METHODS):
                run(block, space)


LIGHTNING = [b for found in PYTHON.values() for b in found if b.text.startswith(METHODS)]


@pytest.mark.parametrize("block", LIGHTNING, ids=lambda b: f"{b.page}:{b.line}")
@pytest.mark.filterwarnings("ignore")
def test_methods_of_a_lightning_module_train_it(block: Block) -> None:
    compile(block.text, block.page, "exec")
    lightning = pytest.importorskip("lightning")
    from ltfast.losses import group_losses
    from ltfast.optim import GSA, SAM

    space = {**prelude(), "SAM": SAM, "group_losses": group_losses, "lightning": lightning}
    exec("class Written(lightning.LightningModule):\n" + textwrap.indent(block.text, "    "), space)
    by_hand = "automatic_optimization" in block.text

    class Module(space["Written"]):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.table = support.make(), support.table("groups")

        if by_hand:

            def configure_optimizers(self) -> Any:
                return GSA(self.parameters(), support.SGD[0], support.GROUP_COUNTS, **support.SGD[1])
        else:

            def training_step(self, batch: Any, index: int) -> torch.Tensor:
                return F.cross_entropy(self.net(batch[0]), batch[1])

    module = Module()
    start = [p.detach().clone() for p in module.parameters()]
    data = torch.utils.data.TensorDataset(space["x"], space["y"])
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, 15))
    assert not all(torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True))


def test_every_python_block_is_one_of_these() -> None:
    assert sum(map(len, PYTHON.values())) >= 10
    assert WITH_PYTHON
    assert len(LIGHTNING) == 2
