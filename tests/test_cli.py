"""The command line as a user meets it: help, listings, and one clear line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ltfast.baselines import baseline_for
from ltfast.build import pick_device
from ltfast.cli import main
from ltfast.errors import UserError
from ltfast.plan import make_plan
from ltfast.progress import counted
from ltfast.recipes import build_config
from ltfast.report.budget import Progress as ReportProgress
from ltfast.runs import RunFolder
from ltfast.text import toml_of
from tests.test_resume import assert_same_run

QUICK = ["--epochs", "2", "--scout", "0.5", "--fisher-budget", "32", "--no-tensorboard"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "r"
    assert main(["train", "--out", str(out), *QUICK]) == 0
    return out


def test_help_lists_every_topic_default_and_paper_value(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for piece in (
        "memory bank, groups and GKP",
        "--rho-max",
        "[0.15]",
        "(paper: 0.15 (CIFAR), 0.1, 0.2)",
        "--dry-run",
        "--resume",
    ):
        assert piece in text


def test_listings(capsys) -> None:
    assert main(["methods"]) == 0
    assert main(["datasets"]) == 0
    text = capsys.readouterr().out
    for name in ("gsa-paper", "focal-sam", "logit-adjustment", "digits-lt", "inat18"):
        assert name in text


def test_run_folder_describes_itself(run: Path) -> None:
    for name in (
        "config.toml",
        "env.json",
        "metrics.jsonl",
        "checkpoints/last.safetensors",
        "checkpoints/best.safetensors",
    ):
        assert (run / name).exists(), name
    assert json.loads((run / "env.json").read_text())["torch"]
    kinds = [json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("epoch") == 2
    assert {"data", "group", "test"} <= set(kinds)
    (data,) = RunFolder.open(run).metrics("data")
    assert data["test_from"] == "test"


def test_eval_json(run: Path, capsys) -> None:
    assert main(["eval", str(run), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"top1", "top5", "many", "medium", "few", "per_class", "ece", "confusion"} <= set(result)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    test = next(r for r in rows if r["kind"] == "test")
    assert result["top1"] == test["last"]["top1"]
    assert (result["split"], result["checkpoint"], result["epoch"]) == ("test", "last", 2)
    assert main(["eval", str(run), "--checkpoint", "best"]) == 0
    assert "few-shot %" in capsys.readouterr().out
    assert main(["eval", str(run), "--checkpoint", "best", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["checkpoint"], result["epoch"]) == ("best", test["best"]["epoch"] + 1)


def test_eval_and_export_take_the_checkpoint_that_is_named(run: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "checkpoints" / "last.safetensors").unlink()
    for words, file in ((["eval", str(copy)], None), (["export", str(copy)], copy / "export" / "best.safetensors")):
        assert main([*words, "--checkpoint", "best"]) == 0
        assert file is None or file.exists()
        capsys.readouterr()
        assert main(words) == 2
        assert "last.safetensors" in capsys.readouterr().err


def test_eval_on_another_device_than_the_runs(run: Path, tmp_path: Path, capsys) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    config = copy / "config.toml"
    config.write_text(re.sub("device = .*", 'device = "cuda:77"', config.read_text()))
    assert main(["eval", str(copy)]) == 2
    assert "use --device cpu" in capsys.readouterr().err
    assert main(["eval", str(copy), "--device", "cpu"]) == 0


def test_a_run_does_not_need_the_weights_it_started_from_again(run: Path, tmp_path: Path, capsys) -> None:
    start = str(shutil.copy(run / "checkpoints" / "last.safetensors", tmp_path / "start.safetensors"))
    out = tmp_path / "r"
    assert main(["train", "--weights", start, "--method", "ce", "--out", str(out), *QUICK]) == 0
    assert f" from weights {start} (" in capsys.readouterr().out
    Path(start).unlink()
    assert main(["eval", str(out), "--json"]) == 0
    (out / "checkpoints" / "last.safetensors").unlink()  # as of a run that was stopped in its first epoch
    assert main(["train", "--resume", str(out), "--dry-run"]) == 0
    assert main(["train", "--resume", str(out)]) == 0


@pytest.mark.parametrize(
    ("method", "idle"),
    [
        ("ce", "--a-scl, --tau, --rho-max, --gram-ema, --gkp-lambda"),
        ("balanced-softmax", "--a-scl, --rho-max, --gram-ema, --gkp-lambda"),
        ("bcl+sam", "--rho-max, --gram-ema, --gkp-lambda"),
        ("gsa-exact", "--gram-ema, --gkp-lambda"),
        ("bcl+gkp", "--rho-max, --gram-ema"),
        ("gkp-gsa", None),
    ],
)
def test_options_that_a_method_does_not_read_are_said(method: str, idle: str | None, capsys) -> None:
    options = {"a-scl": 0.5, "tau": 0.9, "rho-max": 0.01, "gram-ema": 0.4, "gkp-lambda": 5}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["train", "--method", method, "--dry-run", *words]) == 0
    line = next((line for line in capsys.readouterr().out.splitlines() if line.startswith("note: no effect")), None)
    assert line == (idle and f"note: no effect with {method}: {idle}")


def test_of_a_files_idle_settings_those_are_said_that_somebody_chose(tmp_path: Path, capsys) -> None:
    """The config.toml of a run holds all of them."""
    file = tmp_path / "config.toml"
    for loss, idle in (({}, None), ({"a_scl": 0.9}, "--a-scl")):
        file.write_text(toml_of(build_config("digits-lt", "ce", {}, loss).to_dict()))
        assert main(["train", "--config", str(file), "--dry-run"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: no effect")]
        assert lines == ([f"note: no effect with ce: {idle}"] if idle else [])


def test_momentum_is_asked_for_by_sgd_alone(capsys) -> None:
    assert main(["train", "--dry-run", "--nesterov", "--momentum", "0", "--optimizer", "adamw"]) == 0
    assert "note: no effect with gsa-paper+gkp: --nesterov" in capsys.readouterr().out


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--method", "gsa-exact", "--dry-run"]) == 0
    assert "4.00 x an SGD step on the same batch (after scouting; 1.60 x over the run)" in capsys.readouterr().out
    assert main(["train", "--method", "ce+sam", "--dry-run"]) == 0
    assert "2.00 x an SGD step on the same batch\n" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_bank_of_an_earlier_run(run: Path, tmp_path: Path, capsys) -> None:
    bank, out = shutil.copytree(run, tmp_path / "bank"), tmp_path / "b"
    assert main(["train", "--bank", str(bank), "--out", str(out), *QUICK]) == 0
    assert "grouped" in capsys.readouterr().out
    assert main(["train", "--bank", str(bank), "--dry-run", *QUICK]) == 0
    assert main(["train", "--bank", str(bank), "--dry-run", "--model", "resnet8-w4", *QUICK]) == 2
    assert "the memory bank is of another model" in capsys.readouterr().err
    assert make_plan(RunFolder.open(out).config).bank_bytes_max > 0
    begun = tmp_path / "d"  # killed before its first checkpoint
    RunFolder.create(RunFolder.open(out).config.with_(out=str(begun))).close()
    assert main(["train", "--resume", str(begun)]) == 0
    assert_same_run(out, begun)
    log = bank / "metrics.jsonl"
    log.write_text(log.read_text().replace('"class_names": ["0", "1"', '"class_names": ["1", "0"'))
    assert main(["train", "--bank", str(bank), "--out", str(tmp_path / "c"), *QUICK]) == 2
    assert "class 0 is '1' there and '0' here" in capsys.readouterr().err
    shutil.rmtree(bank)  # its entries are in the checkpoints of the run that took them over
    assert main(["train", "--resume", str(out)]) == 0


BAD = [
    (["train", "--method", "gsa-papr"], "did you mean gsa-paper"),
    (["train", "--method", "ce+gsa"], "'gsa' (did you mean gsa-paper, gsa-full, gsa-exact or gsa-release?)"),
    (["train", "--dataset", "digit-lt"], "did you mean digits-lt"),
    (["train", "--epochs", "ten"], "--epochs ten: needs a number"),
    (["train", "--epoch", "3"], "did you mean --epochs?); see `ltfast train --help`"),
    (["train", "--lerning-rate", "3"], "unrecognized arguments: --lerning-rate 3"),
    (["train", "--sampler", "stratfied"], "choose from"),
    (["train", "--groups", "11"], "more groups than the 10 classes"),
    (["train", "--batch", "5000"], "5000"),
    (["train", "--imbalance", "0.5"], "imbalance"),
    (["train", "--dataset", "cifar10-lt", "--data-dir", "/nowhere"], "/nowhere"),
    (["train", "--config", "/nowhere.toml"], "no such config file"),
    (["train", "--model", "resnt8"], "resnt8"),
    (["train", "--model", "squeezenet1_1", "--dry-run"], "it cannot take pictures of 8 x 8 pixels"),
    (["train", "--device", "cuda:7"], "cuda"),
    (["train", "--resume", "/nowhere"], "not a run folder"),
    (["train", "--bank", "/nowhere"], "not a run folder"),
    (["train", "--resume", "/nowhere", "--lr", "1"], "only these may be given anew"),
    (["train", "--weights", "/nowhere.pt"], "no such file"),
    (["eval", "/nowhere"], "not a run folder"),
    (["fly"], "invalid choice"),
    (["trian"], "did you mean train?"),
    (["train", "--epochs", "0"], "epochs=0: use at least 1"),
    (["train", "--dry-run", "--lr", "nan"], "lr=nan: needs a finite number"),
    (["train", "--dry-run", "--device", "tpu"], "use auto, cpu, cuda or cuda:N"),
    (["train", "--dry-run", "--nesterov", "--momentum", "0"], "it needs momentum"),
    (["train", "--config", "."], "cannot be read as a config file"),
    (["train", "--data-dir", "x"], "data_dir='x': digits-lt does not read it"),
    (["train", "--dataset", "folder", "--test-list", "x"], "test_list='x': folder does not read it"),
    (["train", "--out", "x" * 300], "File name too long"),
    (["data", "contact", "/dev/null/sheet.png"], "/dev/null/sheet.png: the picture cannot be written: File exists"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(a)[:40] for a, _ in BAD])
def test_mistakes_are_one_line_and_exit_code_2(
    argv: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ltfast: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_device_that_is_not_there(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda:2: CUDA devices 0 to 1 are visible; use one of them"):
        pick_device("cuda:2")
    with pytest.raises(UserError, match="--device cuda: CUDA devices 0 to 1 are visible"):
        pick_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto", 3) == torch.device("cuda:0"), "each process is shown its own GPU alone"
    with pytest.raises(UserError, match="--device cuda:1: CUDA devices 0 to 0"):
        pick_device("cuda:1", 3)
    assert main(["predict", str(run), "x.png", "--device", "tpu"]) == 2
    assert "use auto, cpu, cuda or cuda:N" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(run: Path, capsys) -> None:
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["train", "--out", str(run)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["train", "--out", str(run / "config.toml")]) == 2
    assert "is a file; choose a folder" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


def test_a_finished_run_without_training_state_is_not_started_again(run: Path, tmp_path: Path, capsys) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("state-*"):
        path.unlink()
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != "lock"}
    assert main(["train", "--resume", str(copy)]) == 2
    error = capsys.readouterr().err
    assert "no training state" in error
    assert f"--config {copy}/config.toml" in error
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != "lock"}


def test_a_method_given_as_a_flag_is_not_undone_by_the_files_own(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "ce"
    assert (
        main(["train", "--config", str(run / "config.toml"), "--method", "ce", "--out", str(out), "--epochs", "1"]) == 0
    )
    own = RunFolder.open(str(out)).config
    assert (own.method, own.loss.loss, own.sharpness.sharpness, own.preserve.gkp) == ("ce", "ce", "none", False)
    assert own.preserve.fisher_budget == 32  # of the file


def test_config_typo_and_foreign_checkpoint(run: Path, tmp_path: Path, capsys) -> None:
    bad = tmp_path / "c.toml"
    bad.write_text("[optim]\nepoch = 3\n")
    assert main(["train", "--config", str(bad)]) == 2
    assert "did you mean epochs" in capsys.readouterr().err

    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.toml").read_text().replace('model = "resnet8"', 'model = "resnet14"')
    (other / "config.toml").write_text(text)
    for argv, what in ((["eval", str(other)], "another model"), (["train", "--resume", str(other)], "another size")):
        assert main(argv) == 2
        assert what in capsys.readouterr().err


def test_import_is_light() -> None:
    """`import ltfast` needs no GPU, no DALI and none of the heavy libraries."""
    code = "import sys, ltfast; print([m for m in ('torch', 'sklearn', 'matplotlib', 'nvidia', 'tensorboard') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_listing_of_methods_needs_no_torch() -> None:
    code = "import sys; from ltfast.cli import main; main(['methods']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("method", "groups"), [("ce", "1"), ("gkp", "4"), ("imbsam", "2"), ("imbsam+gkp", "4 of GKP, 2 of the ascent")]
)
def test_dry_run_counts_the_groups_of_gkp(method: str, groups: str, capsys) -> None:
    assert main(["train", "--dry-run", "--method", method, "--epochs", "1"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["groups"].strip() == groups
    assert "1 epoch x 6 steps" in lines["steps"]


def test_the_defaults_that_the_help_tells_of_recipes_are_theirs(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    digits = build_config("digits-lt", "gkp-gsa", {}, {})
    words = f"{digits.model.model}, {digits.optim.epochs} epochs, {digits.optim.schedule}"
    assert f"digits-lt: {words};" in text
    for dataset in ("folder", "list", "webdataset"):
        config = build_config(dataset, "gkp-gsa", {}, {})
        optim = config.optim
        assert optim.warmup == 0
        words = f"{config.model.model}, {optim.epochs} epochs, lr {optim.lr:g}, {optim.schedule}, no warm-up"
        assert f"folder, list and webdataset: {words}" in text


def test_dry_run_refuses_what_training_refuses_and_fetches_no_weights(tmp_path: Path, monkeypatch, capsys) -> None:
    def refuse(*_args, **_options):
        raise AssertionError("fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    for split in ("train", "test"):
        (tmp_path / split).write_text("".join(f"{split}/{c}-{i}.jpg {c}\n" for c in range(129) for i in range(2)))
    lists = ["--train-list", str(tmp_path / "train"), "--test-list", str(tmp_path / "test")]
    words = ["train", "--dry-run", "--dataset", "list", "--data-dir", str(tmp_path), *lists, "--model", "resnet18"]
    assert main([*words, "--method", "ce", "--weights", "DEFAULT", "--lr", "0.02"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["weights"].strip() == "DEFAULT, the classifier at the mean features of its classes"
    assert lines["descent"].strip() == "sgd, lr 0.02, cosine schedule, warm-up 0 epochs, weight decay 0.0005"
    assert main([*words, "--method", "cc-sam"]) == 2
    assert "cc-sam: 129 classes, one group each, is more than 128" in capsys.readouterr().err


def test_the_recipe_of_fine_tuning_takes_any_pictures_and_leaves_the_last_word_to_flags(tmp_path: Path, capsys) -> None:
    for split in ("train", "test"):
        (tmp_path / split).write_text("".join(f"{split}/{c}-{i}.jpg {c}\n" for c in range(3) for i in range(40)))
    lists = ["--train-list", str(tmp_path / "train"), "--test-list", str(tmp_path / "test")]
    words = ["train", "--dry-run", "--recipe", "fine-tune", "--dataset", "list", "--data-dir", str(tmp_path), *lists]
    for more, method, lr in (
        ([], "balanced-softmax+asam", "0.005"),
        (["--method", "ce", "--lr", "0.01"], "ce", "0.01"),
    ):
        assert main([*words, *more, "--model", "resnet18"]) == 0
        lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        assert lines["method"].strip() == f"{method} on resnet18"
        assert lines["weights"].strip() == "DEFAULT, the classifier at the mean features of its classes"
        assert lines["descent"].strip().startswith(f"sgd, lr {lr}, cosine schedule, warm-up 3 epochs")
        assert "40 epochs x 4 steps" in lines["steps"]
    for none in ("none", ""):
        assert main([*words, "--weights", none, "--model", "resnet18"]) == 0
        lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        assert lines["weights"].strip() == "random"
    assert main(["train", "--recipe", "fine-tuned"]) == 2
    assert "did you mean fine-tune?" in capsys.readouterr().err


def test_the_baseline_is_of_the_same_data_network_and_descent() -> None:
    assert baseline_for(build_config("digits-lt", "gkp-gsa", {}, {})) is not None
    assert baseline_for(build_config("digits-lt", "gkp-gsa", {}, {"epochs": 3})) is None
    assert baseline_for(build_config("digits-lt", "gkp-gsa", {}, {"imbalance": 10.0})) is None
    assert baseline_for(build_config("digits-lt", "gkp-gsa", {}, {"model": "resnet20"})) is None
    assert baseline_for(build_config("digits-lt", "gkp-gsa", {}, {"lr": 0.01})) is None


def test_counts_agree_with_their_nouns() -> None:
    assert [counted(n, "step") for n in (0, 1, 2000)] == ["0 steps", "1 step", "2,000 steps"]


def test_a_report_without_a_terminal_tells_its_parts(capsys) -> None:
    for quiet in (False, True):
        with ReportProgress(1, quiet) as progress, progress.part("run: curvature"):
            pass
        assert capsys.readouterr().err == ("" if quiet else "report: run: curvature\n")


@pytest.mark.parametrize(("silence", "lines"), [(0.0, 4), (300.0, 0)])
def test_a_log_hears_of_a_long_epoch(silence: float, lines: int, tmp_path: Path, monkeypatch, capsys) -> None:
    """Without a terminal there is no bar; an epoch of ImageNet takes an hour."""
    monkeypatch.setattr("ltfast.progress.SILENCE", silence)
    words = ["--dataset", "digits-lt", "--method", "ce", "--epochs", "1", "--batch", "81", "--model", "resnet8"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1  step ")]
    assert len(said) == lines
    if said:
        assert re.fullmatch(r"epoch 1/1  step 2 of 4  loss \d+\.\d{3}", said[1])
