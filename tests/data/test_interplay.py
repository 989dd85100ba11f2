"""Options, files and folders that meet: what one reviewer after another would not think of trying together."""

from __future__ import annotations

import gzip
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from ltfast import launch
from ltfast.cli import main
from ltfast.config import Config
from ltfast.data.check import check_dataset, read_bad_list
from ltfast.data.decode import dali_fault, decode
from ltfast.data.lists import ImageList, no_images, read_list, read_lists
from ltfast.data.pack import read_pack
from ltfast.data.paths import PathTable
from ltfast.data.webdataset import read_splits
from ltfast.errors import UserError
from ltfast.places import absolute
from tests.data import bad_files
from tests.data.small_sets import write_tree
from tests.data.test_cli_data import TREE
from tests.data.test_new_pictures import LARGE, QUICK, evaluated, train


@pytest.mark.parametrize(
    ("mode", "told"),
    [("LA", "gray with alpha"), ("I;16", ""), ("L", ""), ("RGB", ""), ("RGBA", ""), ("P", ""), ("1", "no BitsPerSample"),
     ("F", "32 bits"), ("I", "32 bits")],
)  # fmt: skip
def test_tiffs_that_dali_does_not_read_as_they_are(mode, told):
    why = dali_fault(bad_files.tiff(mode))
    assert bool(why) == bool(told)
    assert why.startswith(told)


def test_gray_with_alpha_as_dali_reads_it():
    """The reason for the rule: colours that are not there."""
    dali = pytest.importorskip("nvidia.dali")
    data = bad_files.tiff("LA")

    @dali.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        files = dali.fn.external_source(source=lambda: [np.frombuffer(data, dtype=np.uint8)])
        return dali.fn.decoders.image(files, device="cpu", output_type=dali.types.RGB)

    pipe = pipeline()
    pipe.build()
    shown = np.asarray(pipe.run()[0][0])
    plain = np.asarray(decode(data))
    assert (plain[..., 0] == plain[..., 1]).all()
    assert not np.array_equal(shown, plain), "DALI reads it now: the rule may go"


def test_a_shard_stands_in_one_split_only(tmp_path):
    for name in ("s-0.tar", "s-1.tar"):
        (tmp_path / name).touch()
    for test in (str(tmp_path / "s-1.tar"), os.path.relpath(tmp_path / "s-1.tar")):
        with pytest.raises(UserError, match=r"s-1\.tar is in train and in test; take it off one of the two"):
            read_splits({"train": str(tmp_path / "s-{0..1}.tar"), "test": test})


def test_new_pictures_of_classes_that_are_called_by_numbers(tmp_path):
    """Labels 1 .. 3 of classes "0" .. "2": a list that lacks the last one must not be read by its numbers."""
    run = no_images(tmp_path, ("0", "1", "2"))

    def labels(text: str) -> list[int]:
        path = tmp_path / "new.csv"
        path.write_text(text)
        return read_lists([("test", path)], tmp_path, train=run)["test"].labels.tolist()

    assert labels("path,label,class\na,1,0\nb,2,1\n") == [0, 1]
    assert labels("path,class\na,2\nb,0\n") == [2, 0]
    assert labels("path,label,class\na,0,cat\nb,2,dog\n") == [0, 2]  # names of its own: numbers count
    assert labels("a,2\nb,1\n") == [2, 1]


def test_a_rotten_picture_of_16_bits_is_bad_though_only_a_sample_is_decoded(tmp_path):
    for i in range(4):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 65536, (60, 60), dtype=np.uint16)).save(path)
        if i == 2:
            data = bytearray(path.read_bytes())
            data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
            path.write_bytes(bytes(data))
    images = ImageList(tmp_path, PathTable.of([f"{i}.png" for i in range(4)]), np.array([0, 1, 0, 1], np.int32), "x")
    for full in (False, True):
        (split,) = check_dataset({"train": images}, full=full).splits
        assert [name for name, _ in split.bad] == ["2.png"]


def test_a_bad_list_names_paths_with_tabs(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"a\tb.jpg\tempty file\nc.jpg\n")
    assert read_bad_list(tmp_path / "bad.txt") == {b"a\tb.jpg", b"c.jpg"}


def test_an_empty_value_is_refused(capsys):
    """As of --data-dir "$UNSET", which would be the working folder."""
    assert main(["train", "--dataset", "folder", "--data-dir", "", "--dry-run"]) == 2
    assert "--data-dir: is empty" in capsys.readouterr().err
    assert main(["data", "contact", "x.png", "--dataset", "folder", "--data-dir", ""]) == 2
    assert main(["data", "contact", "x.png", "--dataset", "cifar10lt", "--data-dir", "a"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_names_of_published_weights_are_no_shards_and_lists_may_be_named_from_the_data(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.txt").touch()
    monkeypatch.chdir(tmp_path)
    shards = Config().with_(dataset="webdataset", data_dir="a-{0..3}.tar", weights="DEFAULT", test_list="b.tar")
    found = absolute(shards)
    assert found.model.weights == "DEFAULT"
    assert (found.data.data_dir, found.data.test_list) == (str(tmp_path / "a-{0..3}.tar"), str(tmp_path / "b.tar"))
    listed = absolute(Config().with_(dataset="list", data_dir="data", test_list="test.txt", val_list="val.txt"))
    assert (listed.data.test_list, listed.data.val_list) == (str(tmp_path / "data" / "test.txt"), "val.txt")


def test_damaged_archives_are_told(tmp_path):
    text = gzip.compress(b"".join(b"class%d/picture%d.jpg %d\n" % (i % 7, i * 7919, i % 7) for i in range(400)))
    np.savez_compressed(tmp_path / "whole.npz", a=np.arange(5000))
    packed = (tmp_path / "whole.npz").read_bytes()
    for place in range(30, 400, 10):
        for data, name, read in (
            (text, "list.txt.gz", lambda p: read_list(p, tmp_path)),
            (packed, "pack.npz", read_pack),
        ):
            broken = bytearray(data)
            broken[place % len(broken)] ^= 16
            (tmp_path / name).write_bytes(bytes(broken))
            with pytest.raises(UserError):
                read(tmp_path / name)


def test_absolute_paths_below_a_linked_root(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/link/a.jpg 0\n{tmp_path}/real/b.jpg 1\n")
    assert list(read_list(tmp_path / "list.txt", tmp_path / "link").paths) == ["a.jpg", "b.jpg"]
    (tmp_path / "list.txt").write_text(f"{tmp_path}/c.jpg 0\n")
    with pytest.raises(UserError, match="leaves"):
        read_list(tmp_path / "list.txt", tmp_path / "link")


def test_other_pictures_are_judged_whatever_lies_in_their_train(tmp_path, capsys):
    old, new, run = (tmp_path / name for name in ("old", "new", "run"))
    write_tree(old, TREE)
    (tmp_path / "bad.txt").write_text("train/class000/0000.png\tempty\n")
    for dataset in ("folder", "folder-small"):
        own = ["--exclude-list", str(tmp_path / "bad.txt")] if dataset == "folder" else []
        assert main(train(old, run, dataset, "--val-per-class", "1", "--batch", "6", *own)) == 0
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(old / "test", new / "test")
        shutil.copytree(old / "test", new / "val")
        for name in ("class000", "class001", "class002"):  # fewer pictures than a batch
            (new / "train" / name).mkdir(parents=True)
        for name in ("class000", "class001", "class002"):
            shutil.copy(next((old / "train" / name).iterdir()), new / "train" / name / "x.png")
        found = evaluated(capsys, run, "--data-dir", str(new))
        assert found["n"] == evaluated(capsys, run)["n"]
        assert evaluated(capsys, run, "--data-dir", str(new), "--split", "val")["n"] == found["n"]
        shutil.rmtree(run)


def test_a_config_file_is_not_refused_for_what_only_its_flags_would_be(tmp_path):
    (tmp_path / "a.toml").write_text("[preserve]\ngkp = false\n")
    assert main(["train", "--config", str(tmp_path / "a.toml"), "--groups", "1", "--dry-run"]) == 0
    (tmp_path / "b.toml").write_text('[optim]\noptimizer = "adamw"\n')
    words = ["--momentum", "0", "--nesterov", "--method", "ce", "--dry-run"]
    assert main(["train", "--config", str(tmp_path / "b.toml"), *words]) == 0


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_without_one_readable_picture(tmp_path, capsys, split):
    write_tree(tmp_path / "data", TREE)
    shutil.copytree(tmp_path / "data" / "test", tmp_path / "data" / "val")
    for path in (tmp_path / "data" / split).rglob("*.png"):
        path.write_bytes(b"no picture")
    words = ["train", "--dataset", "folder", "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    assert main([*words, *QUICK, *LARGE, "--on-bad-image", "skip"]) == 2
    assert f"no {split} picture could be read" in capsys.readouterr().err


def test_figures_are_shown_before_a_table_that_cannot_be_written(tmp_path, capsys):
    write_tree(tmp_path / "data", TREE)
    assert main(train(tmp_path / "data", tmp_path / "run", "folder-small")) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json", "--csv", str(tmp_path / "gone" / "x.csv")]) == 2
    assert json.loads(capsys.readouterr().out)["n"] == 6
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err


def test_a_message_with_a_name_that_is_no_text_arrives(tmp_path, monkeypatch):
    monkeypatch.setenv(launch.MESSAGE, str(tmp_path / "message"))
    launch.report(UserError("a\udcff.jpg: empty file"))
    assert (tmp_path / "message").read_text() == "a\\udcff.jpg: empty file"
