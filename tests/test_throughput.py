"""The step benchmark's own arithmetic: sections that do not overlap, shares, ratios, the picture; one tiny case."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import step_profile  # noqa: E402
import throughput  # noqa: E402

TINY = throughput.Case("resnet8-w4", (1, 8, 8), 16)


def test_inner_sections_do_not_count_for_outer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])  # outer 0..10 with inner 1..3 and 4..4.5
    sections = step_profile.Sections()
    monkeypatch.setattr(step_profile.Sections, "now", staticmethod(lambda: next(clock)))
    with sections.section("other"):
        with sections.section("forward"):
            pass
        with sections.section("update"):
            pass
    assert sections.seconds == {"forward": 2.0, "update": 0.5, "other": 7.5}
    assert step_profile.shares(sections.seconds)["other"] == pytest.approx(0.75)


def test_ratio_is_the_median_over_rounds() -> None:
    found = throughput.ratio([2.0, 4.0, 9.0, 4.0, 2.0], [1.0, 2.0, 3.0, 1.0, 1.0])
    assert found["value"] == 2.0
    assert found["n"] == 5
    assert found["p20"] <= 2.0 <= found["p80"]


def test_turns_meet_the_calls_in_turn() -> None:
    order: list[str] = []
    seconds = throughput.turns((lambda: order.append("a"), lambda: order.append("b")), rounds=2, cycle=2)
    assert order == list("aabb" * 3)  # once to warm up
    assert [len(s) for s in seconds] == [2, 2]


def test_speedups_are_over_the_first_way() -> None:
    found = throughput.speedups_on_cpu(throughput.Case("resnet8-w4", (1, 8, 8), 16, (), ("eager",)), 2)
    assert list(found) == [f"bcl{p}/resnet8-w4/8px/B=16/G=4/eager" for p in ("", ",precision=bf16")]
    first, second = found.values()
    assert first["value"] == 1
    assert second["value"] > 0


@pytest.mark.parametrize("method", ["bcl", "gsa-paper", "gsa-exact", "gsa-full,ascent_every=2"])
def test_a_tiny_case(method: str, tmp_path: Path) -> None:
    """Counts are right, every section is there, the picture is written; the steps do what they are said to."""
    bench = throughput.Bench(method, TINY, torch.device("cpu"), "eager")
    counts = throughput.counted(bench)
    assert counts["syncs_per_step"] == 0
    low, high = {"bcl": (1, 1), "gsa-paper": (1, 1.4), "gsa-exact": (3.5, 4.1), "gsa-full,ascent_every=2": (1.5, 1.7)}[
        method
    ]
    assert low <= counts["flops_vs_sgd"] <= high
    shares = step_profile.sections_of(bench.step, bench.make, 2)
    assert tuple(shares) == step_profile.SECTIONS
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[name] for name in ("data", "forward", "backward", "update")) > 0
    before = [p.detach().clone() for p in bench.twin_model.parameters()]
    bench.twin()()
    assert any(not torch.equal(a, b) for a, b in zip(before, bench.twin_model.parameters(), strict=True))
    path = tmp_path / "profile.png"
    step_profile.picture(path, {"one": shares, "two": shares}, "title")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_twin_and_step_go_the_same_way() -> None:
    """What ratio_vs_twin compares is the same computation: two steps from the same weights."""
    bench = throughput.Bench("gsa-exact", TINY, torch.device("cpu"), "eager")
    twin = bench.twin()
    for _ in range(2):
        bench.ours()
        twin()
    for p, q in zip(bench.model.parameters(), bench.twin_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_clock_runs() -> None:
    started = step_profile.Sections.now()
    time.sleep(0.001)
    assert step_profile.Sections.now() > started
