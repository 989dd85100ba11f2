"""The examples of docs/optimizers.md for Lightning and Accelerate, where these are installed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ltfast.losses import cross_entropy, group_losses
from ltfast.optim import GSA, SAM
from tests.optim import support
from tests.optim.support import GROUP_COUNTS, SGD

STEPS = 6
pytestmark = pytest.mark.filterwarnings("ignore")  # of the frameworks


def data() -> TensorDataset:
    parts = [support.batch(i) for i in range(STEPS)]
    return TensorDataset(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))


def expected_sam() -> nn.Module:
    model = support.make()
    optimizer = SAM(model.parameters(), SGD[0], rho=0.3, **SGD[1])
    for i in range(STEPS):
        support.two_passes(model, optimizer, i)
    return model


def expected_gsa() -> nn.Module:
    model = support.make()
    optimizer = GSA(model.parameters(), SGD[0], GROUP_COUNTS, **SGD[1])
    for i in range(STEPS):
        optimizer.step(support.group_closure(model, i))
    return model


def lightning_trainer(**options: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet, **options)


@pytest.mark.parametrize("clip", [None, 1e6])
def test_lightning_runs_sam_as_it_is(clip: float | None) -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = support.make()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return SAM(self.parameters(), SGD[0], rho=0.3, **SGD[1])

    module = Lit()
    lightning_trainer(gradient_clip_val=clip).fit(module, DataLoader(data(), 30))
    assert support.distance(module.net, expected_sam()) < 1e-6


@pytest.mark.parametrize("base", support.BASES)
def test_lightning_runs_sam_by_hand(base: str) -> None:
    """Through Lightning's wrapper, which derives from the optimizer's class and forwards what it does not find there."""
    lightning = pytest.importorskip("lightning")
    kind, options = support.BASES[base]

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net, self.late = support.make(), nn.Linear(2, 2)

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            x, y = batch
            optimizer = self.optimizers()
            for take in (optimizer.first_step, optimizer.second_step):
                self.manual_backward(F.cross_entropy(self.net(x), y) + 0.0 * self.late(x[0, 0, :1, :2]).sum())
                take(zero_grad=True)
            if index == 0:
                optimizer.add_param_group({"params": self.late.parameters(), "weight_decay": 1.0})

        def configure_optimizers(self) -> Any:
            return SAM(self.net.parameters(), kind, rho=0.3, **options)

    module, expected = Lit(), support.make()
    before = module.late.weight.detach().clone()
    lightning_trainer().fit(module, DataLoader(data(), 30))
    optimizer = SAM(expected.parameters(), kind, rho=0.3, **options)
    for i in range(STEPS):
        support.two_passes(expected, optimizer, i)
    assert support.distance(module.net, expected) < 1e-6
    assert not torch.equal(module.late.weight, before)  # decayed


def test_lightning_runs_gsa_by_hand() -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = support.make()
            self.table = support.table("groups")

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            x, y = batch
            self.optimizers().step(lambda: group_losses(cross_entropy(self.net(x), y), self.table[y]))

        def configure_optimizers(self) -> Any:
            return GSA(self.parameters(), SGD[0], GROUP_COUNTS, **SGD[1])

    module = Lit()
    lightning_trainer().fit(module, DataLoader(data(), 30))
    assert support.distance(module.net, expected_gsa()) < 1e-6


def test_accelerate_runs_both() -> None:
    accelerate = pytest.importorskip("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        *(lambda m: (m, SAM(m.parameters(), SGD[0], rho=0.3, **SGD[1])))(support.make()), DataLoader(data(), 30)
    )
    for x, y in loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
        optimizer.zero_grad()
    assert support.distance(accelerator.unwrap_model(model), expected_sam()) < 1e-6
    model = support.make()
    model, optimizer = accelerator.prepare(model, GSA(model.parameters(), SGD[0], GROUP_COUNTS, **SGD[1]))
    table = support.table("groups")
    for x, y in loader:
        optimizer.step(lambda x=x, y=y: group_losses(cross_entropy(model(x), y), table[y]))
    assert support.distance(accelerator.unwrap_model(model), expected_gsa()) < 1e-6
