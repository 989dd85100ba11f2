"""Input of CIFAR-sized pictures beside a plain pipeline: torch's DataLoader, PIL pictures, torchvision's transforms.

    python benchmarks/peer_pipeline.py [--batch 256] [--write]

Both make the three views of balanced contrastive learning: crop, flip, AutoAugment, cutout; and twice resized crop, flip,
jitter, gray. On a CPU in one process and one thread, by processor seconds, so that a busy machine matters less; ours makes
the views of a batch at once, where its pictures lie. On a GPU ours is timed there and the plain pipeline with --workers
processes by the wall clock (not yet run on a GPU). Large pictures: benchmarks/data.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import harness  # noqa: E402
from small_views import smooth_pictures  # noqa: E402

from ltfast.data.augment import Plain, recipe  # noqa: E402
from ltfast.data.base import SPLITS  # noqa: E402
from ltfast.data.cifar import MEAN, STD  # noqa: E402
from ltfast.data.pool import Splits  # noqa: E402
from ltfast.data.small import SmallSource  # noqa: E402

# On a GPU machine enough that the plain pipeline's workers seldom start an epoch.
PICTURES = {"cpu": 1024, "cuda": 32768}


class Pictures(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Three views of each PIL picture."""

    def __init__(self, images: Tensor) -> None:
        from torchvision import transforms as t
        from torchvision.transforms.functional import to_pil_image

        self.pictures = [to_pil_image(image) for image in images]
        end = [t.ToTensor(), t.Normalize(MEAN, STD)]
        cutout = t.RandomErasing(p=1.0, scale=(0.25, 0.25), ratio=(1.0, 1.0))
        policy = t.AutoAugment(t.AutoAugmentPolicy.CIFAR10)
        self.first = t.Compose([t.RandomCrop(32, padding=4), t.RandomHorizontalFlip(), policy, *end, cutout])
        jitter = t.RandomApply([t.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
        crop = t.RandomResizedCrop(32, scale=(0.2, 1.0))
        self.other = t.Compose([crop, t.RandomHorizontalFlip(), jitter, t.RandomGrayscale(0.2), *end])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        picture = self.pictures[index]
        return self.first(picture), self.other(picture), self.other(picture)


def plain_batches(images: Tensor, batch: int, workers: int) -> Iterator[object]:
    """Batches of the plain pipeline, epoch after epoch."""
    loader = DataLoader(
        Pictures(images), batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=workers > 0
    )
    while True:
        yield from loader


def our_batches(images: Tensor, batch: int, device: str) -> Iterator[object]:
    """Batches of the small source."""
    labels = torch.arange(len(images)) % 10
    names = tuple(str(c) for c in range(10))
    splits = Splits({s: images for s in SPLITS}, {s: labels for s in SPLITS}, names)
    views = recipe("cifar", 3, mean=MEAN, std=STD, size=32)
    source = SmallSource(splits, views=views, plain=Plain(MEAN, STD), batch=batch, device=torch.device(device))
    epoch = 0
    while True:
        yield from source.train(epoch)
        epoch += 1


def rate(batches: Iterator[object], batch: int, device: str, repetitions: int, together: int = 1) -> harness.Timing:
    """Images a second: median, p20, p80, and the number of figures; processor seconds on a CPU.

    together: batches that make one figure. Worker processes end theirs at about the same time, so that most are only
    taken out of a queue and one a round is waited for: a median of single batches would tell the queue's speed.
    """
    for _ in islice(batches, 2 * together):
        pass
    clock: Callable[[], float] = time.perf_counter if device == "cuda" else time.process_time
    rates = []
    for _ in range(repetitions):
        started = clock()
        for _ in islice(batches, together):
            pass
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(together * batch / (clock() - started))
    return harness.timing(rates)


def main() -> None:
    """Print a line each, append rows with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=16, help="processes of the plain pipeline on a GPU machine [16]")
    parser.add_argument("--write", action="store_true", help="append rows to benchmarks/results/peers.jsonl")
    args = parser.parse_args()
    gpu = args.device == "cuda"
    torch.set_num_threads(torch.get_num_threads() if gpu else 1)
    images, workers = smooth_pictures(PICTURES[args.device]), args.workers if gpu else 0
    metric = "images_per_s" if gpu else "images_per_cpu_s"
    found = {}
    for name, batches in (
        ("ltfast", our_batches(images, args.batch, args.device)),
        ("DataLoader+PIL", plain_batches(images, args.batch, workers)),
    ):
        ours = name == "ltfast"
        repetitions, together = (24, 1) if ours else (8, max(workers, 1))
        found[name], p20, p80, n = rate(batches, args.batch, args.device, repetitions, together)
        print(f"{name:16s} {found[name]:10.0f} {metric}", flush=True)
        if args.write:
            config = {
                "batch": args.batch,
                "side": 32,
                "views": 3,
                "workers": workers,
                "clock": "wall" if gpu else "processor",
            }
            harness.append_row(
                "peers", f"pipeline/{name}/cifar-3views", metric, found[name], n=n, p20=p20, p80=p80, config=config
            )
    print(f"ratio {found['ltfast'] / found['DataLoader+PIL']:.2f}")


if __name__ == "__main__":
    main()
