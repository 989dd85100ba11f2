"""A run is evaluated and continued from any folder, and its data found again where it was moved to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ltfast.cli import main
from ltfast.config import Config
from ltfast.places import absolute, moved
from ltfast.progress import Progress
from ltfast.recipes import build_config
from ltfast.runs import RunFolder
from ltfast.train import train
from tests.data.pictures import make_set


def test_what_is_there_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    Path("bad.txt").touch()
    given = Config().with_(data_dir="pictures", train_list="train.txt", exclude_list="bad.txt", weights="/w.pt")
    data = absolute(given).data
    assert (data.data_dir, data.exclude_list) == (f"{tmp_path}/pictures", f"{tmp_path}/bad.txt")
    assert data.train_list == "train.txt", "it is looked for below data_dir"
    assert absolute(given).model.weights == "/w.pt"


def test_shard_patterns_become_absolute_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = Config().with_(dataset="webdataset", data_dir="a/{000..003}.tar::b/*.tar", val_list="../v-{a,b}.tar")
    data = absolute(given).data
    assert data.data_dir == f"{tmp_path}/a/{{000..003}}.tar::{tmp_path}/b/*.tar"
    assert data.val_list == f"{tmp_path.parent}/v-{{a,b}}.tar"


def test_lists_below_the_data_move_with_it(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train.txt").touch()
    config = Config().with_(data_dir="/old", train_list="/old/train.txt", val_list="/old/val.txt", test_list="/t.txt")
    data = moved(config, {"data_dir": str(tmp_path / "new")}).data
    assert (data.data_dir, data.train_list) == (f"{tmp_path}/new", f"{tmp_path}/new/train.txt")
    assert (data.val_list, data.test_list) == ("/old/val.txt", "/t.txt"), "not there, so perhaps not moved"
    assert moved(config, {"data_dir": str(tmp_path / "new"), "train_list": "x"}).data.train_list == "x"


def test_a_run_outlives_a_change_of_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leave(Progress):
        def epoch(self, *args: object) -> None:
            monkeypatch.chdir("/")

    monkeypatch.chdir(tmp_path)
    flags = {"out": "run", "epochs": 2, "limit_train": 72, "batch": 36, "device": "cpu"}
    result = train(build_config("digits-lt", "ce", {}, flags), progress=Leave())
    assert result["folder"] == f"{tmp_path}/run"
    assert RunFolder.open(result["folder"]).config.run.out == f"{tmp_path}/run"
    assert len(RunFolder(tmp_path / "run").metrics("epoch")) == 2
    folder = RunFolder(tmp_path / "run")
    for here, shown in (("/", f"{tmp_path}/run"), (tmp_path, "run"), (tmp_path / "run", f"{tmp_path}/run")):
        monkeypatch.chdir(here)
        assert str(folder) == shown


def test_a_run_by_relative_paths_goes_on_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_set(tmp_path / "set", (4, 3, 2), size=(20, 20))
    monkeypatch.chdir(tmp_path)
    words = (
        "--model resnet8 --image-size 16 --batch 4 --epochs 1 --workers 0 --loader torch --device cpu --no-tensorboard"
    )
    lists = ["--train-list", "set/train.txt", "--test-list", "set/val.txt"]
    train = ["train", "--dataset", "list", "--data-dir", "set", *lists, "--method", "ce", *words.split()]
    assert main([*train, "--out", "run"]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert main(["eval", "../run", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert main(["train", "--resume", "../run"]) == 0
    shutil.move(tmp_path / "set", elsewhere / "set")
    assert main(["eval", "../run"]) == 2
    capsys.readouterr()
    assert main(["eval", "../run", "--data-dir", "set", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == figures
    assert main(["train", "--resume", "../run", "--data-dir", "set"]) == 0
    (elsewhere / "set" / "val.txt").rename("other.txt")
    assert main(["eval", "../run", "--data-dir", "set", "--test-list", "other.txt"]) == 0
    assert main(["train", "--resume", "../run", "--data-dir", "set", "--test-list", "other.txt"]) == 0
