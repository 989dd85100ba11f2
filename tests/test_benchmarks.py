"""Benchmark runner (budget, resume, stopped stages), ablation statistics, roundings, stand-in gradients, REPORT.md."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ablation  # noqa: E402
import accuracy  # noqa: E402
import half_size  # noqa: E402
import harness  # noqa: E402
import natural  # noqa: E402
import other_classes  # noqa: E402
import precision  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402
import seeded  # noqa: E402
import step_bench  # noqa: E402
from ablation_cells import OWN, resolved  # noqa: E402

from ltfast import train  # noqa: E402
from ltfast.data.pack import read_pack  # noqa: E402
from ltfast.recipes import build_config  # noqa: E402
from ltfast.runs import RunFolder  # noqa: E402
from tests.docs import parsing  # noqa: E402

PLAIN = {"data": None, "pictures": None, "peers": [], "device": "cpu"}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty results folder that all benchmark modules use."""
    folder = tmp_path / "results"
    folder.mkdir()
    for module in (harness, report):
        monkeypatch.setattr(module, "RESULTS", folder)
    for module in (report.figures, report.peer_tables):
        monkeypatch.setattr(module, "RESULTS", folder)
    return folder


def fake(name: str, code: str, **fields: object) -> run.Stage:
    return run.Stage(name, ("-c", code), **{"seconds": 60.0, "least": 0.0, **fields})  # type: ignore[arg-type]


def state_at(folder: Path, key: str = "commit cpu") -> run.State:
    return run.State(folder / "state.json", key)


# -- run.py ----------------------------------------------------------------------------------------------------------------


def test_stages_run_in_order_once_and_failures_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    stages = (
        fake("a", f"{note}('a')"), fake("bad", f"{note}('b'); raise SystemExit('no such card')"), fake("c", f"{note}('c')"),
    )  # fmt: skip
    first = run.run(stages, 100, PLAIN, state_at(tmp_path), tmp_path)
    assert first == {"a": "done", "bad": "failed", "c": "done"}
    assert "no such card" in capsys.readouterr().out
    again = run.run(stages, 100, PLAIN, state_at(tmp_path), tmp_path)
    assert again == {"a": "done before", "bad": "failed", "c": "done before"}
    assert (tmp_path / "order").read_text() == "abcb"
    assert run.run(stages[:1], 100, PLAIN, state_at(tmp_path, "other cpu"), tmp_path) == {"a": "done"}


def test_a_stage_is_stopped_in_time_with_its_children_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRACE", 0.5)
    alive = tmp_path / "alive"
    child = f"import time\nwhile 1: open({str(alive)!r}, 'a').write('x'); time.sleep(.05)"
    code = (
        f"import signal, subprocess, sys, time; open({str(tmp_path / 'rows')!r}, 'w').write('row')\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    )
    started = time.monotonic()
    outcome = run.run((fake("slow", code), fake("next", "")), 4.0, PLAIN, state_at(tmp_path), tmp_path)
    assert time.monotonic() - started < 20
    assert outcome["slow"] == "stopped"
    assert (tmp_path / "rows").read_text() == "row"
    size = alive.stat().st_size
    time.sleep(0.3)
    assert alive.stat().st_size == size  # nothing that it started lives on
    assert not state_at(tmp_path).done(fake("slow", code))


def test_budget_gates_and_placeholders(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = f"import sys; open({str(said)!r}, 'w').write(' '.join(sys.argv[1:]))"
    stage = run.Stage("x", ("-c", code, "--budget", "{budget}", "{peers}"), 50, 5)
    values = {**PLAIN, "peers": ["--peer", "a=b"]}
    assert run.run((stage,), 4.0, values, state_at(tmp_path), tmp_path) == {"x": "no time left"}
    assert run.run((stage,), 90.0, values, state_at(tmp_path), tmp_path) == {"x": "done"}
    assert said.read_text() == f"--budget {50 - 3 * run.GRACE:.0f} --peer a=b"
    assert "needs --data" in run.why_not(run.CIFAR, PLAIN)
    assert (
        run.why_not(run.Stage("y", ("benchmarks/none.py",)), PLAIN) == "benchmarks/none.py does not exist: not measured"
    )


def test_a_budget_that_nothing_fits_into_is_refused_before_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(run, "STATE", tmp_path)
    monkeypatch.setattr(run, "device_and_commit", lambda device: "commit cpu")
    monkeypatch.setattr(run.subprocess, "run", lambda words, **_: started.append(words))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for budget in ("20", "5"):
        monkeypatch.setattr(sys, "argv", ["run.py", "--budget", budget, "--device", "cpu"])
        with pytest.raises(SystemExit, match="2"):
            run.main()
        said = capsys.readouterr().err
        assert f"--budget {budget}: the report takes 20 s and the shortest stage" in said
        assert "needs 10 s; give at least 31, or 0 for the plan alone" in said
    assert not started
    monkeypatch.setattr(sys, "argv", ["run.py", "--budget", "0", "--device", "cpu"])
    run.main()
    assert len(started) == 1
    state, stages = state_at(tmp_path), (fake("a", ""), fake("b", "", least=70.0), run.CIFAR)
    state.note(stages[0], "done", 1.0)
    assert run.shortest(stages, PLAIN, state) == stages[1]
    assert run.shortest(stages[:1], PLAIN, state) is None


def test_a_resumable_stage_that_used_its_time_is_not_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = fake("slow", "import time; time.sleep(1)", resumable=True)
    assert run.run_stage(slow, run.fill(slow, PLAIN), 60, tmp_path / "log")[0] == "done"
    monkeypatch.setattr(run, "GRACE", -60.0)  # so that it may run past a limit that is too short for it
    assert run.run_stage(slow, run.fill(slow, PLAIN), 0.5, tmp_path / "log")[0] == "stopped"


def test_rows_do_not_make_another_commit_of_it(tmp_path: Path) -> None:
    """A second call must find what the first one did, though the first has changed the results."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    for name in ("code.py", "benchmarks/results/rows.jsonl"):
        (tmp_path / name).write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    assert not run.code_changed(tmp_path)
    (tmp_path / "benchmarks/results/rows.jsonl").write_text("2")
    assert not run.code_changed(tmp_path)
    (tmp_path / "code.py").write_text("2")
    assert run.code_changed(tmp_path)


ALL_STAGES = {stage.name: stage for stages in run.STAGES.values() for stage in stages}


@pytest.mark.parametrize("stage", ALL_STAGES.values(), ids=list(ALL_STAGES))
def test_every_stage_is_understood_by_its_script(stage: run.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**PLAIN, "data": "x", "pictures": "x", "budget": "5", "peers": ["--peer", "release=x"]}
    assert not run.why_not(stage, values)
    words = run.fill(stage, values)[1:]
    if words[:2] != ["-m", "pytest"]:
        parsing.check_script(words, monkeypatch)


def test_stage_names_are_unique() -> None:
    for stages in run.STAGES.values():
        assert len({s.name for s in stages}) == len(stages)


def test_a_method_with_options_is_a_row_of_its_own(results: Path, tmp_path: Path, monkeypatch) -> None:
    assert accuracy.flags_of("bcl+sam,rho=0.1,ascent_every=2") == [
        "--method", "bcl+sam", "--rho", "0.1", "--ascent-every", "2",
    ]  # fmt: skip
    flags = ["--dataset", "digits-lt", "--epochs", "1", "--limit-train", "70", "--device", "cpu"]
    cases = ("gsa-release,groups=1", "ce,groups=1")
    for method in cases:
        folder = str(tmp_path / method)
        accuracy.here(["train", *accuracy.flags_of(method), *flags, "--no-tensorboard", "--out", folder])
        assert accuracy.collect(Path(folder))
    rows = [json.loads(line) for line in (results / "digits-lt.jsonl").read_text().splitlines()]
    assert {row["case"] for row in rows} == {"gsa-release,groups=1/resnet8/seed=0", "ce/resnet8/seed=0"}
    assert "--method gsa-release --groups 1 --seed 0" in rows[0]["config"]["command"]


# -- ablation.py -------------------------------------------------------------------------------------------------------------


def test_half_size_averages_four_pixels_and_keeps_the_rest(tmp_path):
    pictures = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    small = half_size.halved(pictures)
    assert small.shape == (2, 3, 2, 2)
    assert small[1, 2, 1, 0] == math.floor(pictures[1, 2, 2:, :2].mean() + 0.5)
    data, ends = half_size.encoded(small)
    parts = {"bytes": data, "offsets": ends, "labels": np.array([0, 1])}
    arrays = {f"{split}_{name}": array for split in ("train", "test") for name, array in parts.items()}
    np.savez(tmp_path / "half.npz", class_names=np.array(["a", "b"]), **arrays)
    pool = read_pack(tmp_path / "half.npz")
    assert np.array_equal(pool.test_images, small)
    assert pool.labels.tolist() == [0, 1]


def test_a_part_of_a_pack_has_the_files_of_its_classes_numbered_afresh():
    files = [b"a", b"bb", b"ccc", b"d"]
    split = {
        "bytes": np.frombuffer(b"".join(files), dtype=np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": np.array([0, 3, 1, 3], dtype=np.uint8),
    }
    arrays = {f"{name}_{what}": value for name in ("train", "test") for what, value in split.items()}
    found = other_classes.part({**arrays, "class_names": np.array(["a", "b", "c", "d"])}, [1, 3])
    assert found["class_names"].tolist() == ["b", "d"]
    for name in ("train", "test"):
        data, ends = found[f"{name}_bytes"].tobytes(), found[f"{name}_offsets"].tolist()
        assert [data[start:stop] for start, stop in itertools.pairwise(ends)] == files[1:]
        assert found[f"{name}_labels"].tolist() == [1, 0, 1]


def test_a_folder_of_classes_is_split_with_its_tail(tmp_path, monkeypatch):
    for name, count in (("common", 300), ("rare", 9), ("other", 40)):
        (tmp_path / "all" / name).mkdir(parents=True)
        for place in range(count):
            (tmp_path / "all" / name / f"{place}.jpg").touch()
    for out in ("a", "b"):
        monkeypatch.setattr(sys, "argv", ["natural.py", str(tmp_path / "all"), str(tmp_path / out)])
        natural.main()
    found = {
        split: {folder.name: {path.name for path in folder.iterdir()} for folder in (tmp_path / "a" / split).iterdir()}
        for split in ("train", "test")
    }
    assert {name: len(files) for name, files in found["test"].items()} == {"common": 25, "rare": 4, "other": 20}
    assert {name: len(files) for name, files in found["train"].items()} == {"common": 28, "rare": 2, "other": 2}
    for name, files in found["train"].items():
        assert not files & found["test"][name]
        assert files == {path.name for path in (tmp_path / "b" / "train" / name).iterdir()}


def test_studies_are_configurations_of_known_data_sets():
    for study in ablation.STUDIES:
        for cell in ablation.SWEEPS["one-view"].values():
            config = ablation.configured(study, cell.method, {**cell.settings, "data_dir": None})
            sizes = {
                ablation.DIGITS: (60, 64), "cifar10-half": (40, 64), "cifar10-lt-resnet8": (200, 256),
                "cifar10-finetuned": (40, 32), "cifar10-five": (40, 32), "speedrun-half": (60, 128),
                "plankton": (20, 32), "plankton-fast": (20, 32),
            }  # fmt: skip
            assert (config.optim.epochs, config.data.batch) == sizes[study]
    assert ablation.configured("cifar10-lt", "bcl", {}).optim.epochs == 200


def test_cells_are_one_where_every_study_gives_them_one_configuration():
    assert (
        ablation.same("balanced-softmax+gsa-full+gkp,epochs=200,scout=0.8,gkp_lambda=0.1")
        in ablation.SWEEPS["last-fifth-weaker"]
    )
    assert ablation.same("balanced-softmax+asam,rho=2.0") == "balanced-softmax+asam,rho=2"
    given = ablation.Cell("balanced-softmax", {"lr": 0.1})  # of digits-lt, which other studies do not have
    assert resolved(given) != resolved(ablation.Cell("balanced-softmax", {}))


def test_a_sweep_of_one_study_is_of_no_other(monkeypatch):
    assert ablation.sweeps_of("cifar10-finetuned") == ["fine-tuning"]
    assert not set(OWN) & set(ablation.sweeps_of("digits-lt"))
    assert len(ablation.sweeps_of("cifar10-lt")) == len(ablation.SWEEPS) - len(OWN)
    for words in (["--dataset", "cifar10-finetuned"], ["--dataset", "cifar10-five", "--weights", "x"]):
        monkeypatch.setattr(sys, "argv", ["ablation.py", *words])
        with pytest.raises(SystemExit, match="2"):
            ablation.main()


def test_one_view_cells_are_compared_with_balanced_softmax():
    assert {ablation.baseline_of(name) for name in ablation.SWEEPS["one-view"]} == {"balanced-softmax"}
    assert {ablation.baseline_of(name) for name in ablation.SWEEPS["long"]} == {"balanced-softmax,epochs=200"}
    assert {ablation.baseline_of(name) for name in ablation.SWEEPS["long-three-views"]} == {"bcl,epochs=200"}
    assert ablation.baseline_of("gkp,epochs=12") == "bcl,epochs=12"
    assert ablation.baseline_of("bcl+sam,rho=0.05") == "bcl"


def test_a_stopped_run_ends_the_table_and_goes_on_next_time(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "train", lambda folder, *_: folder.mkdir(parents=True))
    monkeypatch.setattr(accuracy, "finished", lambda folder: False)
    monkeypatch.setattr(accuracy, "collect", lambda folder, flags: False)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--work", str(tmp_path), "--methods", "ce", "bcl"])
    with pytest.raises(SystemExit, match="stopped"):
        accuracy.main()
    (begun,) = tmp_path.iterdir()
    assert begun.name == "digits-lt-ce-s0"
    assert not list(begun.iterdir())


def test_rows_of_collected_runs_tell_where_they_were_trained(results: Path, tmp_path: Path) -> None:
    folder = RunFolder.create(build_config("digits-lt", "ce", {}, {"out": str(tmp_path / "run")}))
    env = {
        "commit": "abc",
        "device": "Some GPU",
        "cuda": "12",
        "torch": "2",
        "triton": "3",
        "cpu": "Some CPU",
        "threads": 7,
    }
    (folder.path / "env.json").write_text(json.dumps(env))
    folder.log("data", sizes={"train": 5})
    folder.log("epoch", seconds=1.0)
    folder.log("test", last=dict.fromkeys(accuracy.FIGURES, 1.0))
    assert accuracy.collect(folder.path)
    folder.close()
    for line in (results / "digits-lt.jsonl").read_text().splitlines():
        row = json.loads(line)
        told = {name: row[name] for name in ("commit", "device", "cuda", "torch", "triton", "cpu", "driver")}
        expected = {k: v for k, v in env.items() if k != "threads"} | {"cpu": "Some CPU, 7 threads", "driver": None}
        assert told == expected


def test_interval_is_students() -> None:
    values = [1.0, 2.0, 4.0]  # mean 7/3, s = 1.527525, t(.975, 2) = 4.302653
    mean, half = ablation.interval(values)
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * 1.527525 / math.sqrt(3), rel=1e-6)
    assert ablation.interval([3.0]) == (3.0, float("inf"))


def test_cells_of_one_configuration_are_run_once() -> None:
    assert ablation.same("gsa-full,gram_every=16") == "gsa-full,radius=x1"
    assert ablation.same("gkp,scout=0.4") == "gkp,gkp_lambda=10"
    assert ablation.same("gsa-full,radius=x3") == "gsa-full,radius=x3"


def test_a_cell_is_run_once_with_any_sweep_that_has_it(results: Path, monkeypatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(ablation, "run_cell", lambda _, cell, *__: ran.append(cell.method) or {"top1": 1.0})
    for _ in range(2):
        ablation.run_sweeps(["three-views", "baseline"], [0], math.inf, {})
        assert sorted(ran) == ["bcl", "gkp-gsa", "gkp-gsa", "gkp-gsa"]
    path = results / "ablation.jsonl"
    cells = {cell for cell, _ in ablation.rows(path)}
    assert cells == {"bcl", "gkp-gsa,scout=0.8", "gkp-gsa,scout=0.8,gkp_lambda=0.1", "gsa-full+gkp,radius=x1"}
    configs = [json.loads(line)["config"] for line in path.read_text().splitlines()]
    assert {config["sweep"] for config in configs} == {"three-views"}, "the first sweep that has it"
    assert sorted(config["scout"] for config in configs) == [0.4, 0.4, 0.8, 0.8]


def put(folder: Path, cell: str, seed: int, torch: str = "2", draws: int | None = None, **figures: float) -> None:
    about = {"device": "cpu", "cuda": None, "torch": torch, "config": {} if draws is None else {"draws": draws}}
    with open(folder / "ablation.jsonl", "a") as file:
        for metric, value in figures.items():
            case = f"digits-lt/{cell}/seed={seed}"
            file.write(json.dumps({"case": case, "metric": metric, "value": value, **about}) + "\n")


def test_mechanics_are_of_the_epochs_after_scouting():
    rows = {
        "epoch": [{"epoch": e, "phase": phase, "grad_norm": 4.0} for e, phase in ((0, "scout"), (1, "train"), (2, "train"))],
        "forces": [{"epoch": e, "gkp": gkp} for e, gkp in ((0, 400.0), (1, 1.0), (2, None))],
        "anchor": [{"epoch": 1, "away": 0.2, "capped": 0.0}, {"epoch": 2, "away": 0.4, "capped": 0.5}],
        "ascent": [
            {"epoch": 0, "above": [9.0], "below": [9.0], "length": [9.0]},
            {"epoch": 1, "above": [0.5, None], "below": [0.25, None], "length": [0.1, 0.3], "refresh_cos": 0.9},
            {"epoch": 2, "above": [0.7], "below": [0.05], "length": [0.4]},
        ],
    }  # fmt: skip
    found = ablation.mechanics(SimpleNamespace(metrics=rows.__getitem__))
    expected = {"gkp_over_grad": 0.25, "clipped_above": 0.6, "clipped_below": 0.15, "length": 0.3, "refresh_cos": 0.9}
    assert found == pytest.approx(expected | {"anchor_away": 0.3, "anchor_capped": 0.25})


def test_fields_of_a_row_replace_the_facts_of_the_process(results: Path):
    row = harness.append_row("b", "case", "seconds", 1.5, commit="abc", date="then", n=3)
    assert json.loads((results / "b.jsonl").read_text()) == row
    assert (row["commit"], row["date"], row["n"], row["value"]) == ("abc", "then", 3, 1.5)


def test_a_section_says_where_no_gpu_was_measured(results: Path):
    part = report.Section("Title", "b", "Text.")
    assert report.section(part).endswith(report.NOT_MEASURED)
    for cuda, missing in ((None, True), ("13.0", False)):
        harness.append_row("b", "case", "seconds", 1.5, cuda=cuda)
        assert ("On a GPU: " in report.section(part)) == missing


def test_a_case_that_another_one_replaced_is_left_out(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "SUPERSEDED", {"computed": "measured"})
    part = report.Section("Title", "b", "Text.")
    harness.append_row("b", "computed", "bytes", 84)
    assert "| `computed` | 84 |" in report.section(part)
    harness.append_row("b", "measured", "bytes", 108)
    assert "computed" not in report.section(part)
    assert "| `measured` | 108 |" in report.section(part)


def test_table_pairs_by_seed_and_names_what_is_missing(results: Path) -> None:
    for seed, base, sam in ((0, 80.0, 82.0), (1, 84.0, 88.0), (2, 70.0, 99.0)):
        put(results, "bcl+sam,rho=0.05", seed, top1=sam, few=sam, ece=1.0, length=0.05)
        if seed < 2:
            put(results, "bcl", seed, top1=base, few=base, ece=1.0)
    text = ablation.table("sam", results / "ablation.jsonl")
    row = next(line for line in text.splitlines() if "rho=0.05" in line)
    assert "+3.00 +- 12.71" in row  # differences 2 and 4: t(.975, 1) = 12.706, s / sqrt 2 = 1; seed 2 has no partner
    assert "length 0.05" in row
    assert text.count("not measured") == 3


def test_a_run_is_compared_with_the_baseline_of_its_own_torch(results: Path) -> None:
    put(results, "bcl", 0, torch="1", top1=80.0, few=80.0, ece=1.0)
    put(results, "bcl+sam,rho=0.05", 0, torch="1", top1=83.0, few=83.0, ece=1.0)
    put(results, "bcl", 0, torch="2", top1=90.0, few=90.0, ece=1.0)
    assert "+3.00 (one seed)" in ablation.table("sam", results / "ablation.jsonl")
    put(results, "bcl+sam,rho=0.05", 0, torch="3", top1=83.0, few=83.0, ece=1.0)
    assert "no baseline" in ablation.table("sam", results / "ablation.jsonl")


def test_a_run_is_compared_with_the_baseline_of_the_same_draws(results: Path) -> None:
    for draws, base in ((None, 80.0), (2, 90.0)):
        put(results, "bcl", 0, draws=draws, top1=base, few=base, ece=1.0)
    put(results, "bcl+sam,rho=0.05", 0, top1=83.0, few=83.0, ece=1.0)
    put(results, "bcl+sam,rho=0.1", 0, draws=2, top1=94.0, few=94.0, ece=1.0)
    put(results, "bcl+sam,rho=0.2", 0, draws=3, top1=94.0, few=94.0, ece=1.0)
    text = ablation.table("sam", results / "ablation.jsonl")
    assert "+3.00 (one seed)" in text
    assert "+4.00 (one seed)" in text
    assert "no baseline" in text


def test_short_runs_are_compared_with_bcl_of_as_many_epochs(results: Path) -> None:
    for name, top1 in (("bcl", 90.0), ("bcl,epochs=12", 70.0), ("gkp,epochs=12", 72.0)):
        put(results, name, 0, top1=top1, few=top1, ece=1.0)
    assert "+2.00 (one seed)" in ablation.table("short", results / "ablation.jsonl")


def test_a_cell_is_trained_and_not_trained_again(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["gsa-full,radius=x3"]
    for _ in range(2):
        ablation.run_sweeps(["radius-full"], [0], 1000, {"epochs": 3}, names)
    assert capsys.readouterr().out.count("seed 0") == 1
    found = ablation.rows(results / "ablation.jsonl")["gsa-full,radius=x3", 0]
    assert found["length"] > 0
    assert 5 < found["top1"] <= 100
    ablation.run_sweeps(["baseline"], [0], 0.0 - 1, {"epochs": 3})
    assert "spent" in capsys.readouterr().out


def test_plain_descent_may_begin_where_others_have_scouted(monkeypatch) -> None:
    """The same numbers as alone: scouting only looks on."""
    plain, flags = ablation.Cell("bcl", {}), {"epochs": 3}
    beside = [ablation.Cell("gkp-gsa", {"scout": 0.7})]
    share = ablation.in_common("digits-lt", plain, beside)
    assert share == 0.7
    alone = ablation.run_cell("digits-lt", plain, 0, flags)
    scouted, shares = ablation.scouted, []
    monkeypatch.setattr(ablation, "scouted", lambda *key: shares.append(key[3]) or scouted(*key))
    assert ablation.run_cell("digits-lt", plain, 0, flags, share) == alone
    assert shares == [0.7]


def test_scouting_goes_on_from_where_a_shorter_one_ended(monkeypatch) -> None:
    begun: list[int] = []
    train_epoch = train.Trainer.train_epoch
    monkeypatch.setattr(
        train.Trainer, "train_epoch", lambda trainer, epoch: begun.append(epoch) or train_epoch(trainer, epoch)
    )
    key = ("digits-lt", "bcl", 5)
    direct = ablation.scouted(*key, 0.75, (("epochs", 4),))
    assert ablation.scouted(*key, 0.75, (("epochs", 4),)) is direct
    ablation.scouted(*key, 0.5, (("epochs", 4),))
    assert begun == [0, 1, 2, 0, 1], "it cannot go back"
    tensors, meta = ablation.scouted(*key, 0.75, (("epochs", 4),))
    assert begun[5:] == [2]
    assert (meta["epoch"], meta["steps"]) == (direct[1]["epoch"], direct[1]["steps"])
    for name, value in direct[0].items():
        assert torch.equal(tensors[name], value), name


def test_cells_that_scout_begin_as_they_say(monkeypatch) -> None:
    begun: list[str] = []
    monkeypatch.setattr(train, "imprint_classifier", lambda trainer: begun.append(trainer.config.model.imprint))
    for settings in ({"imprint": "on"}, {}):
        ablation.run_cell("digits-lt", ablation.Cell("gsa-full", {"scout": 0.5, **settings}), 6, {"epochs": 2})
    assert begun == ["on"], "once, in the scouting that both would share"


def test_what_a_plain_cell_has_in_common_with_others() -> None:
    for base, sweep in (("balanced-softmax", "last-fifth"), ("bcl", "last-fifth-three-views")):
        cells = ablation.SWEEPS[sweep]
        plain = cells[f"{base},epochs=200"]
        assert ablation.in_common("cifar10-half", plain, cells.values()) == 0.8
        assert {ablation.baseline_of(name) for name in cells} == {f"{base},epochs=200"}
    assert ablation.in_common("cifar10-half", plain, ablation.SWEEPS["one-view"].values()) is None, "other epochs"
    one_view = ablation.SWEEPS["one-view"]
    assert ablation.in_common("digits-lt", one_view["balanced-softmax"], one_view.values()) == ablation.USUAL["scout"]
    assert ablation.in_common("digits-lt", one_view["balanced-softmax+sam"], one_view.values()) is None, "another rule"
    assert ablation.in_common("digits-lt", one_view["ce"], one_view.values()) is None, "another loss"
    recipe = ablation.SWEEPS["recipe"]["balanced-softmax,weight_decay=0.002"]
    assert ablation.in_common("digits-lt", recipe, one_view.values()) is None, "another setting"
    release = ablation.SWEEPS["release"]
    assert ablation.in_common("digits-lt", release["bcl"], release.values()) is None, "one group needs no bank"


# -- precision.py -------------------------------------------------------------------------------------------------------------


def test_roundings_against_float64() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1001), torch.randn(100) * 1e-6])
    for rounding, bits in ((precision.round_tf32, 10), (lambda v: v.bfloat16().float(), 7)):
        step = 2.0 ** (torch.floor(torch.log2(x.double().abs())) - bits)
        error = (rounding(x).double() - x.double()).abs() / step
        assert error.max() <= 0.5
        assert error.max() > 0.4  # it does round
    weights = (torch.arange(len(x)) % 2).float()
    kept = precision.ROUNDINGS["bf16 autocast"](x, weights)
    assert torch.equal(kept[::2], x[::2])
    assert not torch.equal(kept[1::2], x[1::2])


def test_smoke_runs_do_not_mix_with_long_ones(tmp_path: Path) -> None:
    rows = [
        {"config": {"images": n, "epochs": e}, "value": i} for i, (n, e) in enumerate([(3000, 15), (9, 9), (3000, 15)])
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["value"] for row in seeded.rows(tmp_path / "x.jsonl", longest=True)] == [0, 2]
    assert len(seeded.rows(tmp_path / "x.jsonl")) == 3
    assert seeded.rows(tmp_path / "none.jsonl", longest=True) == []


def test_the_accuracy_table_leaves_smoke_runs_out(results: Path) -> None:
    for epochs, method, top1 in ((60, "bcl", 80.0), (2, "ce", 90.0)):
        for metric in ("top1", "many", "medium", "few", "ece"):
            config = {"images": 9, "epochs": epochs}
            harness.append_row("x", f"{method}/resnet8/seed=0", metric, top1, device="cpu", config=config)
    assert "`bcl`" in report.figures.accuracy_table("x")
    assert "`ce`" not in report.figures.accuracy_table("x")


# -- report.py ---------------------------------------------------------------------------------------------------------------


def test_report_without_rows_claims_nothing(results: Path) -> None:
    text = report.report()
    assert text.count("not measured") >= len(report.SECTIONS) + 3
    assert "%" not in text.split("## Kernels")[1]


def test_report_uses_the_newest_row_and_says_what_no_gpu_measured(results: Path) -> None:
    rows = [
        {"bench": "kernels", "case": "gram/N=5", "metric": "kernels", "value": value, "device": "cpu", "cuda": None}
        for value in (9, 2)
    ]
    (results / "kernels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.section(report.SECTIONS[0])
    assert "| `gram/N=5` | 2 |" in text
    assert "On a GPU: not measured" in text


def test_picture_of_paired_differences(results: Path) -> None:
    assert not report.draw_ablations(results / "ablation.png")
    for seed in range(3):
        put(results, "bcl", seed, top1=80.0, few=1.0, ece=1.0)
        put(results, "gsa-full,radius=x3", seed, top1=81.0 + seed, few=1.0, ece=1.0)
    assert report.draw_ablations(results / "ablation.png")
    assert (results / "ablation.png").stat().st_size > 5000
    assert "![" in report.report()


def test_findings_are_filled_where_they_are_marked(results: Path, tmp_path: Path) -> None:
    put(results, "bcl", 0, top1=80.0, few=70.0, ece=1.0)
    page = tmp_path / "findings.md"
    page.write_text("kept\n<!-- ablation-sam -->\nold\n<!-- /ablation-sam -->\n<!-- unknown -->\n")
    report.fill_page(page)
    text = page.read_text()
    assert "old" not in text
    assert "not measured" in text
    assert text.startswith("kept")


def test_command_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--list", "--sweeps", "sam"])
    ablation.main()
    assert "bcl+sam,rho=0.2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["run.py", "--budget", "1", "--device", "cpu", "--only", "nothing"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(SystemExit):
        run.main()
    assert "choose from" in capsys.readouterr().err
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""  # stages of the CPU find no GPU


def test_intended_perturbation_against_its_equation() -> None:
    trainer = SimpleNamespace(flat=SimpleNamespace(data=torch.ones(4), numel=4))
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]])
    setting = precision.Setting(trainer, None, rows, torch.tensor([0.5, 0.5]), torch.tensor([10.0, 5.0]), torch.ones(4))  # type: ignore[arg-type]
    eps = precision.intended(setting, {"direction": "joint", "rho": 0.5})
    want = torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(eps, 0.5 * want / want.norm(), rtol=1e-6, atol=1e-7)


def test_rows_of_a_study_on_the_cpu_name_no_gpu(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = {**harness.facts(), "device": "NVIDIA X", "cuda": "13.0", "driver": "1"}
    monkeypatch.setattr(harness, "facts", lambda: there)
    rows = [
        harness.append_row("x", "case", "m", 1, config=config) for config in ({"device": "cpu"}, {"device": "cuda"}, {})
    ]
    assert [(row["device"], row["cuda"], row["driver"]) for row in rows] == [
        ("cpu", None, None), ("NVIDIA X", "13.0", "1"), ("NVIDIA X", "13.0", "1")]  # fmt: skip


def test_runs_with_further_flags_stay_out_of_the_tables(results: Path) -> None:
    """Even one that is longer than all others."""
    plain = {"images": 10, "epochs": 2}
    for case, config in (
        ("ce/resnet8/seed=0", plain),
        ("ce/resnet8/seed=1", {**plain, "epochs": 9, "flags": ["--epochs"]}),
    ):
        harness.append_row("digits-lt", case, "top1", 50.0, config=config)
    assert [row["case"] for row in seeded.rows(results / "digits-lt.jsonl", longest=True)] == ["ce/resnet8/seed=0"]
    assert len(seeded.rows(results / "digits-lt.jsonl")) == 2


def test_only_a_method_that_has_one_is_compared_with_a_twin() -> None:
    case = step_bench.Case("resnet8", (1, 8, 8), 8)
    found = {m: step_bench.Bench(m, case, torch.device("cpu"), "eager").has_twin for m in (
        "bcl", "gsa-full", "gsa-full+gkp", "gsa-full,ascent_every=2")}  # fmt: skip
    assert list(found.values()) == [True, True, False, False]
