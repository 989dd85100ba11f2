"""Reading small sets: digits, torchvision's CIFAR folders, image trees, JPEG packs."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ltfast.data import load
from ltfast.data.cifar import read_cifar
from ltfast.data.digits import read_digits
from ltfast.data.pack import read_pack
from ltfast.data.tree import read_tree
from ltfast.errors import UserError
from tests.data import small_sets


def test_digits() -> None:
    source = load("digits-lt")
    assert source.train_counts.tolist() == [128, 80, 48, 28, 17, 10, 6, 3, 2, 2]
    assert source.sizes == {"train": 324, "val": 100, "test": 400}
    assert source.input_shape == (1, 8, 8)
    pool = read_digits()
    assert pool.images.max() == 255
    assert np.bincount(pool.test_labels).tolist() == [40] * 10
    assert torch.equal(
        source.train_labels, load("digits-lt", seed=9).train_labels
    )  # the split is no matter of the seed


def test_digits_splits_share_no_picture() -> None:
    source = load("digits-lt")
    pictures = {split: {row.numpy().tobytes() for row in source.images[split]} for split in source.sizes}
    assert not pictures["train"] & pictures["test"]
    assert not pictures["val"] & pictures["test"]
    assert not pictures["train"] & pictures["val"]


@pytest.mark.parametrize("python2", [True, False])
def test_cifar10_folder(tmp_path: Path, python2: bool) -> None:
    images, labels = small_sets.write_cifar10(tmp_path, python2=python2)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        pool = read_cifar("cifar10-lt", root)
        assert np.array_equal(pool.images, images)
        assert np.array_equal(pool.labels, labels)
        assert pool.class_names == small_sets.NAMES
        assert pool.test_images.shape == (30, 3, 32, 32)


def test_cifar10_folder_as_torchvision_reads_it(tmp_path: Path) -> None:
    images, _ = small_sets.write_cifar10(tmp_path)
    content = pickle.loads((tmp_path / "cifar-10-batches-py" / "data_batch_2").read_bytes(), encoding="latin1")
    assert np.array_equal(content["data"].reshape(-1, 3, 32, 32), images[40:80])


def test_cifar100_folder(tmp_path: Path) -> None:
    small_sets.write_cifar100(tmp_path)
    source = load("cifar100-lt", data_dir=tmp_path, imbalance=1, batch=10)
    assert source.num_classes == 100
    assert source.train_counts.tolist() == [3] * 100
    assert source.class_names[7] == "fine7"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_pickles_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    small_sets.write_cifar10(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(UserError, match=rf"{name}: cannot be read as a CIFAR file .*posix.mkdir"):
        read_cifar("cifar10-lt", tmp_path)
    assert not (tmp_path / "owned").exists()


def test_pack(tmp_path: Path) -> None:
    arrays = small_sets.pack_arrays()
    np.savez(tmp_path / "pack.npz", **arrays)
    pool = read_pack(tmp_path / "pack.npz")
    assert pool.images.shape == (200, 3, 32, 32)
    assert np.array_equal(pool.labels, arrays["train_labels"])
    for i in (0, 77, 199):
        raw = arrays["train_bytes"][arrays["train_offsets"][i] : arrays["train_offsets"][i + 1]].tobytes()
        decoded = pool.images[np.array([5, i])][1]
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(raw))), decoded.transpose(1, 2, 0))
    for place in (tmp_path, tmp_path / "pack.npz"):
        source = load("cifar10-lt", data_dir=place, imbalance=10, batch=32)
        assert source.train_counts.tolist() == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]


def test_a_pack_may_have_a_validation_split(tmp_path: Path) -> None:
    arrays = small_sets.pack_arrays()
    arrays |= {key.replace("test", "val"): value for key, value in arrays.items() if key.startswith("test_")}
    np.savez(tmp_path / "pack.npz", **arrays)
    source = load("folder-small", data_dir=tmp_path / "pack.npz", batch=32)
    assert source.sizes == {"train": 200, "val": len(arrays["val_labels"]), "test": len(arrays["test_labels"])}
    assert torch.equal(source.images["val"], source.images["test"])
    del arrays["val_labels"]
    np.savez(tmp_path / "pack.npz", **arrays)
    with pytest.raises(UserError, match="the array 'val_labels' is missing"):
        load("folder-small", data_dir=tmp_path / "pack.npz", batch=32)


def test_pictures_of_a_pack_are_squares_and_stay_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "pack.npz", **small_sets.pack_arrays(side=20))
    assert load("folder-small", data_dir=tmp_path / "pack.npz", batch=32, image_size=20).input_shape == (3, 20, 20)
    with pytest.raises(UserError, match=r"--image-size 24: .*pack.npz holds pictures of 20 pixels"):
        load("folder-small", data_dir=tmp_path / "pack.npz", batch=32, image_size=24)
    oblong = small_sets.jpeg(np.zeros((3, 16, 48), np.uint8))
    arrays = small_sets.pack_arrays()
    for split in ("train", "test"):
        n = len(arrays[f"{split}_labels"])
        arrays[f"{split}_bytes"] = np.frombuffer(oblong * n, dtype=np.uint8)
        arrays[f"{split}_offsets"] = len(oblong) * np.arange(n + 1)
    np.savez(tmp_path / "pack.npz", **arrays)
    with pytest.raises(UserError, match=r"pack.npz \(train\): pictures are 48 x 16 pixels; crop or resize them"):
        load("folder-small", data_dir=tmp_path / "pack.npz", batch=32)


def test_tree_with_splits(tmp_path: Path) -> None:
    small_sets.write_tree(tmp_path, {"train": (4, 3, 2), "val": (1, 1, 1), "test": (2, 2, 2)})
    source = load("folder-small", data_dir=tmp_path, batch=4)
    assert source.sizes == {"train": 9, "val": 3, "test": 6}
    assert source.train_counts.tolist() == [4, 3, 2]
    assert source.class_names == ("class000", "class001", "class002")
    expected = np.asarray(Image.open(tmp_path / "train" / "class001" / "0002.png")).transpose(2, 0, 1)
    assert any(np.array_equal(image.numpy(), expected) for image in source.images["train"])
    # Normalisation is the training split's own.
    pixels = source.images["train"].double() / 255
    torch.testing.assert_close(torch.tensor(source.mean, dtype=torch.float64), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(source.std, dtype=torch.float64), pixels.std((0, 2, 3), correction=0))
    with pytest.raises(UserError, match="validation split of its own"):
        load("folder-small", data_dir=tmp_path, batch=4, val_per_class=1)


def test_tree_of_class_folders_holds_out_a_test_split(tmp_path: Path) -> None:
    small_sets.write_tree(tmp_path, {"": (30, 18, 13)}, side=40)
    source = load("folder-small", data_dir=tmp_path, batch=4, image_size=24, val_per_class=1)
    assert source.sizes == {"train": 61 - 7 - 3, "val": 3, "test": 7}  # a tenth of each class: 3, 2 and 2
    assert source.input_shape == (3, 24, 24)
    assert next(iter(source.train(0))).views[1].shape == (4, 3, 24, 24)
    assert read_tree(tmp_path).images.shape[2:] == (40, 40)
    halved = read_tree(tmp_path, 20, share=0.5)
    assert np.bincount(halved.test_labels).tolist() == [15, 9, 7]
    whole = read_tree(tmp_path, share=0.5).images[0].transpose(1, 2, 0)
    expected = Image.fromarray(whole).resize((20, 20), Image.Resampling.BILINEAR)
    assert np.array_equal(halved.images[0], np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("val_per_class", [0, 1])
@pytest.mark.parametrize(
    "counts",
    [
        {"": (12, 6, 3)},
        {"train": (6, 5, 3), "val": (2, 1, 0)},
        {"train": (6, 5, 3), "test": (2, 0, 1)},
        {"train": (6, 5, 3), "test": (2, 0, 1), "val": (0, 0, 0)},
    ],
    ids=["alone", "val", "test", "empty val"],
)
def test_a_tree_is_split_alike_small_and_large(
    tmp_path: Path, counts: dict[str, tuple[int, ...]], val_per_class: int
) -> None:
    small_sets.write_tree(tmp_path, counts)
    (tmp_path / next(iter(counts)) / ".hidden").mkdir()
    small, large = (
        load(name, data_dir=tmp_path, batch=4, val_per_class=val_per_class, seed=5)
        for name in ("folder-small", "folder")
    )
    assert small.class_names == large.class_names
    assert (small.sizes, small.test_from) == (large.sizes, large.test_from)
    assert small.sizes["val"] == 3 * val_per_class
    for split in ("train", "test"):
        assert torch.equal(small.labels[split].sort()[0], torch.from_numpy(large.lists[split].labels).long())


def test_cifar_tree(tmp_path: Path) -> None:
    small_sets.write_tree(tmp_path, {"train": (5,) * 10, "test": (1,) * 10})
    assert load("cifar10-lt", data_dir=tmp_path, imbalance=5, batch=8).train_counts[-1] == 1


def test_cifar_class_folders_hold_out_cifars_own_share(tmp_path: Path) -> None:
    small_sets.write_tree(tmp_path, {"train": (18,) * 10})
    pool = read_cifar("cifar10-lt", tmp_path)
    assert np.bincount(pool.test_labels).tolist() == [3] * 10
    assert np.bincount(pool.labels).tolist() == [15] * 10


def test_limit_train_keeps_proportions() -> None:
    source = load("digits-lt", limit_train=162)
    assert source.sizes["train"] == 162
    assert source.train_counts.tolist() == [64, 40, 24, 14, 9, 5, 3, 1, 1, 1]


def test_real_pack() -> None:
    folder = os.environ.get("LTFAST_TEST_DATA")
    path = Path(folder or "") / "cifar10_jpeg.npz"
    if not folder or not path.is_file():
        pytest.skip("set LTFAST_TEST_DATA to the folder with cifar10_jpeg.npz")
    source = load("cifar10-lt", data_dir=path)
    assert source.train_counts.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert source.sizes == {"train": 12_406, "val": 0, "test": 10_000}
    assert source.steps_per_epoch == 49
