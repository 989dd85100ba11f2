"""The readable twin against torchvision's own transforms, and its worker processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from torchvision import transforms

from ltfast.data.decode import decode
from ltfast.data.large_source import Step, Substitutes
from ltfast.data.large_views import IMAGENET_MEAN, IMAGENET_STD, RECIPES, ViewRecipe, draw_view
from ltfast.data.lists import read_list
from ltfast.data.rng import epoch_key
from ltfast.data.torch_source import TrainTasks, augment, evaluation_crop, pixels
from tests.data.pictures import make_set, picture
from tests.data.test_large_source import epoch, open_source


def statistics(images: list) -> np.ndarray:
    """Per picture: mean, spread and a few places of each channel."""
    arrays = [np.asarray(image, dtype=np.float64) for image in images]
    return np.array([[*a.mean((0, 1)), *a.std((0, 1)), a[3, 5, 0], a[-4, -6, 2]] for a in arrays])


@pytest.mark.parametrize("view", [1, "crop"])
def test_views_have_the_distribution_of_torchvisions_transforms(view):
    from scipy import stats

    n, image = 1500, picture(4, 90, 70)
    recipe = ViewRecipe() if view == "crop" else RECIPES["imagenet"][1]
    steps: list = [transforms.RandomResizedCrop(24), transforms.RandomHorizontalFlip()]
    if view != "crop":
        steps.append(transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8))
        steps.append(transforms.RandomGrayscale(p=0.2))
    theirs_transform = transforms.Compose(steps)
    torch.manual_seed(0)
    theirs = statistics([theirs_transform(image) for _ in range(n)])
    draw = draw_view(recipe, epoch_key(0, 0), torch.arange(n), 1)
    ours = statistics([augment(image, draw, i, 24) for i in range(n)])
    p_values = [stats.ks_2samp(a, b).pvalue for a, b in zip(ours.T, theirs.T, strict=True)]
    assert min(p_values) > 1e-3 / len(p_values)
    other = draw_view(ViewRecipe(scale=(0.5, 1.0)), epoch_key(0, 0), torch.arange(n), 1)
    wrong = statistics([augment(image, other, i, 24) for i in range(n)])
    assert min(stats.ks_2samp(a, b).pvalue for a, b in zip(wrong.T, theirs.T, strict=True)) < 1e-8


def test_a_picture_is_augmented_by_its_place_in_the_epoch(tmp_path):
    """And by nothing else: DALI's path, another number of ranks and a resumed run draw the same."""
    root = make_set(tmp_path, (3, 3))
    images = read_list(root / "train.txt", root)
    tasks = TrainTasks(images, RECIPES["imagenet"], 32, 5, True, Substitutes(images.labels))
    step = Step(2, 1, torch.tensor([7, 3]), torch.tensor([1, 4]))
    made = tasks[step]
    assert made.shown.tolist() == [1, 4]
    for view, recipe in enumerate(RECIPES["imagenet"]):
        draw = draw_view(recipe, epoch_key(5, 2), step.position, view)
        for i, index in enumerate([1, 4]):
            truth = pixels(augment(decode(images.read(index)), draw, i, 32))
            assert torch.equal(made.views[view][i], truth)


def test_evaluation_is_torchvisions_compose():
    image = picture(8, 131, 97)
    theirs = transforms.Compose(
        [
            transforms.Resize(37),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )(image)
    from ltfast.data.finish import Finisher

    finisher = Finisher(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"))
    ours = finisher.plain(pixels(evaluation_crop(image, 32))[None])[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_views_rounded_by_autocast_are_nearer_than_arithmetic_in_bfloat16():
    """Views are float32, and autocast rounds them: all arithmetic in bfloat16 has a larger error."""
    from ltfast.data.finish import Finisher

    finisher = Finisher(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"))
    x = pixels(picture(3))[None]
    exact = (x.double().permute(0, 3, 1, 2) / 255 - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(
        IMAGENET_STD
    ).view(1, 3, 1, 1)
    once = finisher.plain(x).to(torch.bfloat16)
    mean, std = (torch.tensor(v, dtype=torch.bfloat16).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    throughout = (x.permute(0, 3, 1, 2).to(torch.bfloat16) / 255 - mean) / std
    errors = [(y.double() - exact).abs().mean().item() for y in (once, throughout)]
    assert errors[0] < 0.0016
    assert errors[1] > 2 * errors[0]


def test_finishing_in_threads_changes_nothing_but_the_time():
    from ltfast.data.finish import Finisher

    x = torch.stack([pixels(picture(seed)) for seed in range(12)])
    draw = draw_view(RECIPES["imagenet"][0], epoch_key(0, 0), torch.arange(12), 0)
    before = torch.get_num_threads()
    alone, pooled = (
        Finisher(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu"), threads=n).view(x, draw) for n in (1, 3)
    )
    assert torch.equal(alone, pooled)
    assert torch.get_num_threads() == before
    plain = Finisher(IMAGENET_MEAN, IMAGENET_STD, torch.device("cpu")).plain(x)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(plain, (x.permute(0, 3, 1, 2) / 255 - mean) / std, rtol=0, atol=1e-6)


def test_workers_end_with_their_epoch(tmp_path):
    source = open_source("torch-workers", make_set(tmp_path, (9, 7)))
    running = source.train(0)
    next(running)
    assert multiprocessing.active_children()
    del running
    assert not multiprocessing.active_children()
    epoch(source, 0)
    list(source.evaluate("val"))
    assert not multiprocessing.active_children()


def test_workers_outlive_a_signal_to_the_whole_process_group(tmp_path):
    """Ctrl-C, Slurm and torch's launcher signal workers too, whose parent still makes a step and a checkpoint."""
    source = open_source("torch-workers", make_set(tmp_path, (9, 7, 8, 8)), batch=2)
    running = source.train(0)
    next(running)
    workers = [process.pid for process in multiprocessing.active_children()]
    assert workers
    for _ in workers[1:]:
        next(running)  # they take turns: now each has begun
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for pid in workers:  # from another process, as those do; the parent's own SIGTERM ends a worker
            subprocess.run([sys.executable, "-c", f"import os; os.kill({pid}, {int(number)})"], check=True)
    assert len(list(running)) == source.steps_per_epoch - len(workers)
    assert not multiprocessing.active_children()


def test_workers_leave_the_parents_garbage_alone(tmp_path):
    """A dropped DALI pipeline in a reference cycle, collected in a forked worker, hangs that worker for ever."""

    class Trap:
        def __init__(self) -> None:
            self.me, self.home = self, os.getpid()

        def __del__(self) -> None:
            if os.getpid() != self.home:
                os._exit(77)

    source = open_source("torch-workers", make_set(tmp_path, (9, 7)))
    gc.collect()
    gc.disable()
    try:
        Trap()
        running = source.train(0)
        next(running)
        assert gc.isenabled() is False
        assert len(list(running)) == source.steps_per_epoch - 1
    finally:
        gc.enable()
        gc.collect()


def test_pictures_go_to_a_device_as_the_bytes_they_are():
    """Nothing is rearranged on the host, out of the pinned memory that a copy beside the device's work needs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from ltfast.data.finish import Finisher

    class OnHost(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.ndim == 4 for a in args):
                self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    finisher = Finisher(IMAGENET_MEAN, IMAGENET_STD, torch.device("meta"))
    with OnHost() as host:
        view = finisher.plain(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert host.calls == ["aten._to_copy.default"]
    assert view.is_contiguous(memory_format=torch.channels_last)
