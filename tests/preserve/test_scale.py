"""The scale benchmark runs at a small size and writes rows of the agreed form."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import harness
import scale

ARGS = Namespace(classes=40, images=3000, features=6, snapshots=5, dimension=1000, groups=3, threads=1)


@pytest.mark.parametrize("part", ["sampler", "quality", "bank"])
def test_parts(part):
    figures = scale.run_part(part, ARGS)
    assert all(value > 0 for _, _, value in figures)
    assert len({(case, metric) for case, metric, _ in figures}) == len(figures)
    assert any(metric == "peak_rss_gib" for _, metric, _ in figures)


def test_rows(tmp_path, monkeypatch):
    facts = harness.facts()
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(harness, "facts", lambda: {**facts, "commit": "as everywhere+"})
    for _ in range(2):
        scale.append([("a/b", "seconds", 1.5)], vars(ARGS))
    rows = [json.loads(line) for line in (tmp_path / "scale.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    needed = {"bench", "case", "metric", "value", "n", "device", "cpu", "driver", "cuda"}
    needed |= {"torch", "triton", "commit", "date", "config"}
    assert all(needed == set(row) for row in rows)
    assert {(row["commit"], row["device"], row["cuda"]) for row in rows} == {("as everywhere+", "cpu", None)}


def test_counts():
    counts = scale.long_tail(8142, 437_513)
    assert counts.min() >= 2
    assert abs(int(counts.sum()) / 437_513 - 1) < 0.02
