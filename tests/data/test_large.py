"""load_large and load: names, options and user errors of the large sets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ltfast.data import load
from ltfast.data.base import Source, split_note
from ltfast.data.dali_pipeline import dali_available
from ltfast.data.large import CPU_GAIN_OF_DALI, choose_loader, load_large
from ltfast.errors import UserError
from tests.data.pictures import make_set


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"), (12, 9, 6, 4))


def small(root, **options):
    options = {"image_size": 16, "batch": 4, "loader": "torch", "workers": 0, "train_list": "train.txt", **options}
    return load_large(options.pop("dataset", "list"), data_dir=root, **options)


def test_list_and_folder_are_the_same_set(root):
    by_list = small(root, val_list="val.txt")
    by_folder = small(root, dataset="folder", train_list=None)
    for source in (by_list, by_folder):
        assert isinstance(source, Source)
        assert source.train_counts.tolist() == [12, 9, 6, 4]
        assert source.sizes == {"train": 31, "val": 0, "test": 8}
        assert source.test_from == "val"
    for a, b in zip(by_list.train(0), by_folder.train(0), strict=True):
        assert torch.equal(a.labels, b.labels)
    for split in ("train", "test"):
        assert sorted(by_list.lists[split].paths) == sorted(by_folder.lists[split].paths)


def test_through_the_common_entry(root):
    source = load(
        "list", data_dir=root, train_list="train.txt", val_list="val.txt", image_size=16, batch=4, num_views=1
    )
    assert len(next(source.train(0)).views) == 1
    assert source.input_shape == (3, 16, 16)


def test_thinning_limiting_holding_out_and_excluding(root, tmp_path):
    assert small(root, imbalance=4.0).train_counts.tolist() == [10, 6, 3, 2]  # a tenth of each class is held out
    assert small(root, val_list="val.txt", imbalance=1.0).train_counts.tolist() == [12, 9, 6, 4]
    assert small(root, val_list="val.txt", limit_train=10).train_counts.sum() == 10
    held = small(root, val_per_class=2)
    assert held.train_counts.tolist() == [8, 6, 3, 1]
    assert held.sizes == {"train": 18, "val": 8, "test": 5}
    assert held.test_from == "train"
    own = small(root, val_list="val.txt", val_per_class=1)
    assert own.sizes == {"train": 27, "val": 4, "test": 8}
    assert next(iter(own.lists["test"].paths)).startswith("val/")
    tested = small(root, test_list="val.txt")
    assert tested.sizes == {"train": 31, "val": 0, "test": 8}
    assert split_note(tested.sizes, tested.test_from, tested.lacking, 4).startswith(
        "no validation split, so no best checkpoint"
    )
    (tmp_path / "bad.txt").write_text("train/3/0.jpg\ttruncated\n")
    assert small(root, val_list="val.txt", exclude_list=tmp_path / "bad.txt").train_counts.tolist() == [12, 9, 6, 3]


def test_an_exclude_list_of_other_pictures_is_refused(root, tmp_path):
    (tmp_path / "bad.txt").write_text("other/3/0.jpg\ttruncated\n")
    with pytest.raises(UserError, match=r"none of its 1 paths is in the data set; it has 'other/3/0.jpg', .* 'train/"):
        small(root, exclude_list=tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_text("")  # `data check` found none
    assert small(root, val_list="val.txt", exclude_list=tmp_path / "bad.txt").train_counts.tolist() == [12, 9, 6, 4]


def test_user_errors(root):
    cases = [
        ({"train_list": None}, "--train-list"),
        ({"loader": "fast"}, "--loader 'fast'"),
        ({"views": "cifar"}, "--views 'cifar'"),
        ({"dataset": "folders", "train_list": None}, "unknown data set"),
        ({"dataset": "imagenet-lt", "train_list": None}, "ImageNet-LT: no train list"),
        ({"batch": 64}, "--batch 64 is larger than"),
    ]
    for options, text in cases:
        with pytest.raises(UserError, match=text):
            small(root, **options)
    with pytest.raises(UserError, match="needs --data-dir"):
        load_large("folder", data_dir=None)
    with pytest.raises(UserError, match="no such folder of pictures"):
        load_large("folder", data_dir=root / "none")


def test_a_list_with_missing_pictures_can_be_stepped_through_with_generated_ones(tmp_path):
    (tmp_path / "l.txt").write_text("".join(f"no/{i}.jpg {i % 3}\n" for i in range(12)))
    with pytest.raises(UserError, match=r"of \d+ files are not below"):
        small(tmp_path, train_list="l.txt")
    source = small(tmp_path, train_list="l.txt", loader="synthetic")
    assert next(source.train(0)).views[0].shape == (4, 3, 16, 16)


def test_loader_choice():
    assert choose_loader("torch", "cpu", 3).name == "torch"
    assert choose_loader("synthetic", "cpu", 3).reason == "as asked for"
    choice = choose_loader("auto", "cpu", 3)
    assert choice.name in ("dali", "torch")
    assert choice.reason
    if dali_available():
        assert choose_loader("auto", "cuda", 3).name == "dali"


def test_the_choice_rests_on_committed_rows():
    lines = (Path(__file__).parents[2] / "benchmarks/results/data.jsonl").read_text().splitlines()
    rows = {(row["case"], row["metric"]): row["value"] for row in map(json.loads, lines)}
    for views, gain in CPU_GAIN_OF_DALI.items():
        dali, torch_path = (rows[f"{loader}/{views}-view", "images_per_cpu_s"] for loader in ("dali", "torch"))
        assert dali / torch_path == pytest.approx(gain, rel=0.2)
        assert gain > 1  # so that DALI is chosen


def test_without_dali(monkeypatch):
    monkeypatch.setattr("ltfast.data.large.dali_available", lambda: False)
    assert choose_loader("auto", "cuda", 3).name == "torch"
    assert "not installed" in choose_loader("auto", "cpu", 1).reason
    with pytest.raises(UserError, match=r"pip install 'ltfast\[dali\]'"):
        choose_loader("dali", "cpu", 3)
