"""The CIFAR views of a batch: ours against torchvision v2 picture by picture and kornia's batched modules.

python -m benchmarks.small_views [--batch 256] [--device cpu|cuda] [--write]

On the CPU one thread is used and processor seconds are counted, so that a busy machine matters less (images_per_cpu_s);
on a GPU device events (images_per_s). kornia draws one order of the jitter for a whole batch, so it is not the same
augmentation; it is measured only where it is installed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Timing, append_row, time_call, timing
from ltfast.data.augment import Contrastive, Plain, recipe
from ltfast.data.cifar import MEAN, STD
from ltfast.data.rng import epoch_key, uniforms

REPETITIONS = 50


def main() -> None:
    """Print one line an implementation, append rows with --write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pictures = smooth_pictures(arguments.batch).to(arguments.device)
    metric = "images_per_s" if arguments.device == "cuda" else "images_per_cpu_s"
    cases = ours(pictures) | torchvision_per_picture(pictures) | kornia_batched(pictures)
    for name, call in cases.items():
        slow = name.startswith("torchvision")
        median, p20, p80, n = measure(call, arguments.device, 7 if slow else REPETITIONS)
        rates = [arguments.batch / seconds for seconds in (median, p80, p20)]
        print(f"{name:34s} {rates[0]:10.0f} {metric}   {1e3 * median:8.2f} ms a batch of {arguments.batch}")
        if arguments.write:
            config = {"batch": arguments.batch, "side": 32, "threads": 1}
            case = f"small-views/{name}/B={arguments.batch}"
            append_row("data", case, metric, rates[0], n=n, p20=rates[1], p80=rates[2], config=config)


def smooth_pictures(n: int) -> Tensor:
    """Colour fields with some noise, uint8 [n, 3, 32, 32]."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, 3, 4, 4, generator=rng)
    fields = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    return ((fields + 0.05 * torch.randn(n, 3, 32, 32, generator=rng)) * 255).clamp(0, 255).to(torch.uint8)


def measure(call: Callable[[], object], device: str, repetitions: int) -> Timing:
    """Seconds: device events on a GPU, processor time of this process on a CPU."""
    if device == "cuda":
        return time_call(call, repetitions, min(10, repetitions))
    call()
    seconds = []
    for _ in range(repetitions):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return timing(seconds)


def ours(pictures: Tensor) -> dict[str, Callable[[], object]]:
    """View 1, view 2 and all three, random numbers included."""
    views = [view.to(pictures.device) for view in recipe("cifar", 3, mean=MEAN, std=STD)]
    key, index = epoch_key(0, 0, pictures.device), torch.arange(len(pictures), device=pictures.device)

    def make(stream: int) -> Tensor:
        return views[stream](pictures, uniforms(key, index, stream, views[stream].draws))

    plain = Plain(MEAN, STD).to(pictures.device)
    return {
        "ours/plain": lambda: plain(pictures),
        "ours/view1": lambda: make(0),
        "ours/view2": lambda: make(1),
        "ours/3views": lambda: [make(stream) for stream in range(3)],
    }


def torchvision_per_picture(pictures: Tensor) -> dict[str, Callable[[], object]]:
    """The same recipes from torchvision.transforms.v2, one call a picture: a call has one set of parameters."""
    from torchvision.transforms import v2

    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    first = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
            v2.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0)),
            *end,
        ]
    )
    other = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            *end,
        ]
    )

    def run(transforms: list[Callable[[Tensor], Tensor]]) -> list[Tensor]:
        return [torch.stack([transform(picture) for picture in pictures]) for transform in transforms]

    return {
        "torchvision-v2/view1": lambda: run([first]),
        "torchvision-v2/view2": lambda: run([other]),
        "torchvision-v2/3views": lambda: run([first, other, other]),
    }


def kornia_batched(pictures: Tensor) -> dict[str, Callable[[], object]]:
    """View 2 from kornia, where installed."""
    try:
        import kornia.augmentation as kornia
    except ImportError:
        return {}
    view = kornia.AugmentationSequential(
        kornia.RandomResizedCrop((32, 32), scale=Contrastive.area),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        kornia.RandomGrayscale(p=0.2),
        kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        data_keys=["input"],
    )
    return {"kornia/view2": lambda: view(pictures.float() / 255)}


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
