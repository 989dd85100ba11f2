"""Two short runs on digits, trained once for all report tests."""

import pytest
import torch

from ltfast.recipes import build_config
from ltfast.report import geometry
from ltfast.train import train


def train_run(path, method, epochs, **flags):
    config = build_config("digits-lt", method, {}, {"epochs": epochs, "out": str(path), "tensorboard": False, **flags})
    train(config)
    return str(path)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """(default method, plain cross-entropy): run folders."""
    torch.set_num_threads(1)
    base = tmp_path_factory.mktemp("runs")
    return train_run(base / "default", "gkp-gsa", 3), train_run(base / "plain", "ce", 3)


@pytest.fixture
def small(monkeypatch):
    """Curvature and landscapes at sizes that take a second."""
    monkeypatch.setattr(geometry, "IMAGES", 24)
    monkeypatch.setattr(geometry, "LANCZOS_STEPS", 8)
    monkeypatch.setattr(geometry, "LANCZOS_PROBES", 1)
    monkeypatch.setattr(geometry, "TRACE_PROBES", 2)
    monkeypatch.setattr(geometry, "LEVELS", 1)
