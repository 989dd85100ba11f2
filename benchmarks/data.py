"""Input pipelines side by side on real JPEGs: images a second, images of a CPU second, memory, and how uniform an order is.

    python benchmarks/data.py throughput --pictures imagenet_sample_256.tar     # a tar or a folder of JPEGs
    python benchmarks/data.py lists                                             # parse and check a million-line list
    python benchmarks/data.py check --pictures imagenet_sample_256.tar          # microseconds a file of `data check`
    python benchmarks/data.py order                                             # our order and DALI's readers
    python benchmarks/data.py gpu --pictures imagenet_sample_256.tar            # share of a ResNet-50 step (needs a GPU)

throughput runs every case in a process of its own, in turns, so that each ratio compares neighbours; a CPU second counts all
threads and worker processes, and is the figure to trust on a busy machine. Memory is read with a batch in hand and all
queues full, as during a training step: proportional set size of all processes, and batches that wait in shared memory,
mapped or not; memory_beyond_import leaves out what one process holds after the imports.
`pil` is the baseline: a torchvision DataLoader as BCL's code has it (decode, transforms, ToTensor, Normalize in the workers).
--append writes the rows to results/data.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.data_lists import Row, million_lines, orders
from benchmarks.family import cpu_seconds, memory_mib, wait_until_idle

BATCH, WORKERS, SIZE = 64, 2, 224
MEMORY_BATCHES = 2
CASES = ("pil", "torch", "dali")


def unpack(pictures: str, folder: Path) -> Path:
    """The folder with the JPEG files of a tar or folder."""
    if Path(pictures).is_dir():
        return Path(pictures)
    with tarfile.open(pictures) as tar:
        tar.extractall(folder, filter="data")
    return folder


def lists_of(folder: Path, images: int) -> dict[str, Any]:
    """The files of a folder as splits of `images` entries (repeated as needed), 16 made-up classes."""
    from ltfast.data.lists import ImageList
    from ltfast.data.paths import PathTable

    files = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in (".jpg", ".jpeg"))
    names = (files * -(-images // len(files)))[:images]
    train = ImageList(folder, PathTable.of(names), np.arange(images, dtype=np.int32) % 16, str(folder))
    return {"train": train, "val": train, "test": train}


class Baseline(torch.utils.data.Dataset[Any]):
    """BCL's data set: one file, one decode, one or three torchvision pipelines that end in a normalised float tensor."""

    def __init__(self, images: Any, views: int) -> None:
        from torchvision import transforms as T

        from ltfast.data.large_views import IMAGENET_MEAN, IMAGENET_STD

        self.images = images
        start = [T.RandomResizedCrop(SIZE), T.RandomHorizontalFlip()]
        end = [T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        jitter, gray = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(p=0.2)
        self.views = [T.Compose([*start, *end])]
        if views == 3:
            first = T.Compose([*start, T.ColorJitter(0.4, 0.4, 0.4, 0.0), T.Lambda(_rand_augment), *end])
            self.views = [first, *(T.Compose([*start, jitter, gray, *end]) for _ in range(2))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int]:
        from PIL import Image

        with open(self.images.file(index), "rb") as file:
            picture = Image.open(file).convert("RGB")
        return [view(picture) for view in self.views], int(self.images.labels[index])


def _rand_augment(image: Any) -> Any:
    from ltfast.data.randaugment import DRAWS_PER_LAYER, RandAugment, apply_rand_augment_pil, draw

    recipe = RandAugment()
    return apply_rand_augment_pil(image, draw(recipe, torch.rand(1, recipe.layers * DRAWS_PER_LAYER)), 0)


def batches(case: str, views: int, lists: dict[str, Any], device: str = "cpu") -> Iterator[Any]:
    """Endless training batches of a case."""
    if case == "pil":
        data = Baseline(lists["train"], views)
        while True:
            yield from torch.utils.data.DataLoader(
                data, BATCH, shuffle=True, num_workers=WORKERS, drop_last=True, pin_memory=device != "cpu"
            )
    from ltfast.data.large import source_class
    from ltfast.data.large_views import view_recipes

    recipes = view_recipes("imagenet" if views == 3 else "crop", views)
    source = source_class(case)(
        lists, views=recipes, image_size=SIZE, batch=BATCH, workers=WORKERS, device=device, sampler="instance"
    )
    epoch = 0
    while True:
        yield from source.train(epoch)
        epoch += 1


def import_what(case: str) -> None:
    """The libraries of a case, so that their memory is not its own: torchvision for PIL and torch's loader, DALI for DALI's."""
    if case == "dali":
        import nvidia.dali.fn  # noqa: F401
    else:
        import torchvision.transforms.functional  # noqa: F401


def measure(case: str, views: int, folder: Path, images: int) -> dict[str, float]:
    """One timed pass over `images` pictures, after four batches of warm-up, in this process."""
    torch.set_num_threads(1)
    import_what(case)
    imported = memory_mib()
    # One long epoch: the cost of starting workers is not in the figure of any case.
    stream = batches(case, views, lists_of(folder, images + 32 * BATCH))
    for _ in range(4):
        batch = next(stream)
    cpu, wall, peak = cpu_seconds(), time.perf_counter(), 0.0
    for _ in range(images // BATCH):
        batch = next(stream)
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    for _ in range(MEMORY_BATCHES):
        batch = next(stream)
        peak = max(peak, memory_mib())
        wait_until_idle()
        peak = max(peak, memory_mib())
    del batch
    done = images // BATCH * BATCH
    figures = {"images_per_s": done / wall, "images_per_cpu_s": done / cpu}
    return {**figures, "memory_mib": peak, "memory_beyond_import_mib": peak - imported}


def throughput(folder: Path, rounds: int, images: int) -> list[Row]:
    """All cases in turns; medians over the rounds, ratios to `pil` of the same round."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for turn in range(rounds):
        for views in (1, 3):
            for case in CASES:
                command = [sys.executable, "-W", "ignore", __file__, "one", "--pictures", str(folder)]
                options = ["--case", case, "--views", str(views), "--images", str(images if views == 3 else 2 * images)]
                out = subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout
                found.setdefault((case, views), []).append(json.loads(out.splitlines()[-1]))
                print(f"round {turn} {views} view(s) {case:6s}", found[case, views][-1], flush=True)
    rows: list[Row] = []
    config = {"batch": BATCH, "workers": WORKERS, "image_size": SIZE, "images": images}
    for (case, views), runs in found.items():
        for metric in runs[0]:
            values = [run[metric] for run in runs]
            ratios = [run[metric] / base[metric] for run, base in zip(runs, found["pil", views], strict=True)]
            spread = {
                "p20": float(np.percentile(values, 20)),
                "p80": float(np.percentile(values, 80)),
                "config": config,
            }
            rows.append((f"{case}/{views}-view", metric, statistics.median(values), rounds, spread))
            if case != "pil":
                rows.append(
                    (f"{case}/{views}-view", f"{metric}_vs_pil", statistics.median(ratios), rounds, {"config": config})
                )
    return rows


def check_speed(folder: Path, images: int) -> list[Row]:
    """Microseconds a file of `data check`, headers and full decode, one thread."""
    from ltfast.data.check import check_dataset

    train = {"train": lists_of(folder, images)["train"]}
    rows: list[Row] = []
    for depth in ("headers", "full"):
        start = time.perf_counter()
        check_dataset(train, full=depth == "full", workers=1)
        rows.append((f"check/{depth}", "us_per_file", (time.perf_counter() - start) / images * 1e6, 1, {}))
    return rows


def gpu_share(folder: Path, steps: int = 60) -> list[Row]:
    """Seconds of a ResNet-50 step (bf16, three views, batch 64) with each loader over those with one cached batch."""
    import torchvision

    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return []
    model = torchvision.models.resnet50().cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train_step(views: Any) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(torch.cat([v.cuda(non_blocking=True) for v in views])).float().logsumexp(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(stream: Iterator[Any]) -> float:
        for step in range(steps + 10):
            if step == 10:
                torch.cuda.synchronize()
                start = time.perf_counter()
            train_step(next(stream)[0])
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    lists = lists_of(folder, (steps + 30) * BATCH)
    cached = next(batches("dali", 3, lists, "cuda"))
    base = seconds(iter(lambda: cached, None))
    rows: list[Row] = [("gpu/cached", "step_s", base, steps, {})]
    for case in CASES:
        value = seconds(batches(case, 3, lists, "cuda"))
        rows += [
            (f"gpu/{case}", "step_s", value, steps, {}),
            (f"gpu/{case}", "step_vs_cached", value / base, steps, {}),
        ]
    return rows


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "lists", "check", "order", "gpu", "one"))
    parser.add_argument("--pictures", help="tar or folder of JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--case", choices=CASES, default="pil", help=argparse.SUPPRESS)
    parser.add_argument("--views", type=int, default=3, help=argparse.SUPPRESS)
    parser.add_argument("--append", action="store_true", help="append the rows to benchmarks/results/data.jsonl")
    args = parser.parse_args()
    if args.what in ("throughput", "check", "gpu", "one") and not args.pictures:
        parser.error("--pictures is needed")
    with tempfile.TemporaryDirectory() as scratch:
        folder = unpack(args.pictures, Path(scratch)) if args.pictures else Path(scratch)
        if args.what == "one":
            print(json.dumps(measure(args.case, args.views, folder, args.images)))
            os._exit(0)  # the loaders' threads and workers need no orderly end here
        rows = {
            "throughput": lambda: throughput(folder, args.rounds, args.images),
            "lists": million_lines,
            "check": lambda: check_speed(folder, args.images),
            "order": orders,
            "gpu": lambda: gpu_share(folder),
        }[args.what]()
    for case, metric, value, n, fields in rows:
        print(f"{case:45s} {metric:28s} {value:12.4g}  n={n}")
        if args.append:
            from benchmarks.harness import append_row

            append_row("data", case, metric, value, n=n, **fields)


if __name__ == "__main__":
    main()
