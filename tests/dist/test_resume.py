"""What several processes write down of a run, and what each takes of it when the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ltfast import resume, survive
from ltfast.config import Config
from ltfast.dist import Ranks, Traffic
from ltfast.preserve import group_by_frequency
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.train import Trainer, train
from tests.dist.test_training import SMALL, StopAt
from tests.procs import run_ranks
from tests.test_resume import of_pictures, write_pictures

pytestmark = pytest.mark.dist


def made(ranks: Ranks, config: Config) -> Trainer:
    """With two groups where the method has groups of the bank."""
    trainer = Trainer(config, None, ranks, Progress())
    if trainer.needs_groups:
        trainer.groups = group_by_frequency(trainer.source.train_counts, 2)
        trainer.make_step()
    return trainer


def parts(trainer: Trainer) -> dict[str, Tensor]:
    """What a rank has added up for itself, or has of its own."""
    found = {"quality": trainer.quality.flat, "buffers": trainer.buffers.data}
    if (engine := trainer.step.engine) is not None:
        found |= {k: v for k, v in engine.state().items() if k in ("averages", "eps")}
    if trainer.sums:
        found["sums"] = trainer.sums["loss"]
    if trainer.meter.sums is not None:
        found["meter"] = trainer.meter.sums
    if hasattr(trainer.source, "replaced"):
        found["replaced"] = trainer.source.replaced
    return found


def numbers(trainer: Trainer) -> dict[str, float]:
    found = {k: v.double() for k, v in parts(trainer).items()}
    assert all(torch.equal(v, v.flatten()[0].expand_as(v)) for v in found.values()), "each is of one number"
    return {k: float(v.flatten()[0]) for k, v in found.items()} | {"counter": int(trainer.buffers.counters[0])}


def kept(ranks: Ranks, config: Config) -> dict[str, Any]:
    """Each rank's numbers are 1 (rank 0) or 3 (rank 1); what is captured of them, and what another trainer makes of that."""
    trainer = made(ranks, config)
    trainer.sums = {"loss": torch.zeros(())}
    trainer.meter.sums = torch.zeros(7, 2)
    own = 1 + 2 * ranks.rank
    for tensor in (*parts(trainer).values(), *trainer.buffers.counters):
        tensor.fill_(own)
    trainer.wire, trainer.seconds = Traffic(7, 8), 9.0
    torch.manual_seed(ranks.rank)
    tensors, meta, shared = resume.capture(trainer)
    tensors = {k: v.clone() for k, v in (tensors | shared).items()}
    other = made(ranks, config)
    torch.manual_seed(99)
    resume.restore(other, tensors, meta)
    return {
        "left": numbers(trainer), "restored": numbers(other), "random": torch.rand(1), "wire": other.wire, "seconds": other.seconds,
        "state": (tensors, meta),
    }  # fmt: skip


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "averages": ("gsa-release", {}), "eps": ("ce+sam", {"ascent_every": 2}), "pictures": ("ce", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_differs_between_ranks_is_kept_as_the_documentation_says(tmp_path: Path, name: str) -> None:
    """Own: statistics and generators. Sums: quality and unreadable images, once. Means: the log's, and of local ascents."""
    method, values = CASES[name]
    if name == "pictures":
        write_pictures(tmp_path / "data", "ab")
        config = of_pictures(tmp_path / "data", tmp_path / "run").with_(batch=2)
    else:
        config = build_config("digits-lt", method, {}, {**SMALL, **values})
    results = run_ranks(2, tmp_path / "ranks", kept, config)
    for rank, result in enumerate(results):
        own = 1.0 + 2 * rank
        assert set(result["left"].values()) == {own}, "to capture changes nothing"
        expected = {
            "quality": 0.0 if rank else 4.0, "replaced": 0.0 if rank else 4.0, "sums": 2.0, "meter": 2.0, "averages": 2.0, "eps": 2.0,
            "buffers": own, "counter": own,
        }  # fmt: skip
        assert result["restored"] == {k: expected[k] for k in result["left"]}
        torch.manual_seed(rank)
        assert result["random"].equal(torch.rand(1))
        assert (result["wire"], result["seconds"]) == (Traffic(7, 8), 9.0)
    alone = made(Ranks(), config)
    torch.manual_seed(99)
    resume.restore(alone, *results[0]["state"])
    assert numbers(alone)["buffers"] == 2.0, "one process goes on with the mean"
    assert numbers(alone)["quality"] == 4.0
    expected = torch.Generator().manual_seed(99)
    assert torch.rand(1).equal(torch.rand(1, generator=expected)), "and with random numbers of its own"


def one_epoch(ranks: Ranks, out: str, stop: int, resumed: bool) -> None:
    survive.VOTE_SECONDS = 0.0  # every step is counted, so that the run stops inside its epoch
    config = build_config("digits-lt", "ce+sam", {}, {**SMALL, "epochs": 1, "out": out})
    train(config, resume=out if resumed else None, ranks=ranks, progress=StopAt(stop if ranks.rank else 0))


def test_the_figures_of_local_ascents_go_on_after_a_resume(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for out, stop, resumed in ((whole, 0, False), (parts, 2, False), (parts, 0, True)):
        run_ranks(2, tmp_path / f"{out.name}-{resumed}", one_epoch, str(out), stop, resumed)
    assert (parts / "checkpoints" / "state-000000003.safetensors").exists(), "stopped inside the epoch"
    (expected,), (found,) = (RunFolder(out).metrics("ascent") for out in (whole, parts))
    for name in ("steps", "radius", "norm", "length"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4), name
