"""The scale benchmark runs at a small size and writes rows of the agreed form."""

import importlib.util
import json
from argparse import Namespace
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "scale.py"


@pytest.fixture(scope="module")
def scale():
    spec = importlib.util.spec_from_file_location("scale_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ARGS = Namespace(classes=40, images=3000, features=6, snapshots=5, dimension=1000, groups=3, threads=1)


@pytest.mark.parametrize("part", ["sampler", "quality", "bank"])
def test_parts(scale, part):
    figures = scale.run_part(part, ARGS)
    assert all(value > 0 for _, _, value in figures)
    assert len({(case, metric) for case, metric, _ in figures}) == len(figures)
    assert any(metric == "peak_rss_gib" for _, metric, _ in figures)


def test_rows(scale, tmp_path):
    for _ in range(2):
        scale.append(tmp_path / "rows.jsonl", [("a/b", "seconds", 1.5)], vars(ARGS))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    needed = {"bench", "case", "metric", "value", "n", "device", "cpu", "driver", "cuda"}
    needed |= {"torch", "triton", "commit", "date", "config"}
    assert all(needed == set(row) for row in rows)


def test_counts(scale):
    counts = scale.long_tail(8142, 437_513)
    assert counts.min() >= 2
    assert abs(int(counts.sum()) / 437_513 - 1) < 0.02
