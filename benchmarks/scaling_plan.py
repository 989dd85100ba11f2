"""Experiments behind the plan for a million classes and a billion images in docs/scaling.md; one CPU, no GPU, no network.

    python benchmarks/scaling_plan.py                     # prints
    python benchmarks/scaling_plan.py --append            # and appends rows to benchmarks/results/scale.jsonl

sharded   what sharding the classifier makes of memory and step time on paper (the model of scaling_model.py), and that
          softmax, gradients and GSA's Gram matrix of a sharded classifier are those of the whole one to rounding
host      bytes that one rank holds for an image of a list, measured; time of an epoch's order
sketch    clustering from sketches of the snapshots instead of whole ones
shards    how far batches of shard-wise order are from those of a full permutation
Nothing here was timed on several machines: rows say device "simulated" where they are not a measurement of this CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from harness import append_row  # noqa: E402, I001
from scaling_model import (  # noqa: E402
    ASSUMED, GIB, GROUPS, RESNET50, Machine, all_reduce, measured_rate, memory_by_classes, step_seconds,
)  # fmt: skip

from ltfast.data.large_views import view_recipes  # noqa: E402
from ltfast.data.lists import ImageList  # noqa: E402
from ltfast.data.paths import PathTable  # noqa: E402
from ltfast.data.sampler import epoch_order  # noqa: E402
from ltfast.data.torch_source import TorchSource  # noqa: E402
from ltfast.preserve import MemoryBank, group_classes  # noqa: E402

MILLION = 1_000_000
FLOPS = 400e12  # bf16 products of this size on an H200; assumed, 40 % of its data sheet

# -- sharded classifier ------------------------------------------------------------------------------------------------


def class_seconds(classes: int, batch: int = 128, share: int = 1) -> float:
    """Work of size C in a BCL step: logits, similarities with the centres, and the centres' MLP over 1/share of them."""
    width, out = RESNET50.features, RESNET50.projection
    return 6.0 * classes * (batch * width + 2 * batch * out + width * (width + out) / share) / FLOPS


def sharded_step(classes: int, world: int, m: Machine, batch: int = 128) -> dict[str, float]:
    """The model's step with the classifier's rows shared out: features travel instead of its gradient.

    gather = features of the global batch to all, its gradient back (reduce-scatter): each half of an all-reduce; two
    all-reduces of P b numbers for the softmax. None of it is hidden.
    """
    whole = step_seconds("bcl", world, batch, 0, m)  # everything but the classifier
    features = 4.0 * world * batch * RESNET50.features
    wire = all_reduce(features, world, m) + 2 * all_reduce(4.0 * world * batch, world, m)
    # A step without a classifier leaves out reading and updating its rows: 5 passes over C / P of them.
    rows = 5 * 4.0 * classes * RESNET50.features / world / m.memory
    seconds = whole["seconds"] + wire + rows + class_seconds(classes, batch, world)
    exposed = whole["exposed_share"] * whole["seconds"] + wire
    return {"seconds": seconds, "exposed_share": exposed / seconds, "wire_bytes": 2 * features + 8.0 * world * batch}


def sharded_memory(classes: int, world: int) -> float:
    """GiB of one GPU: rows of classes are shared out; logits and similarities are P b x C / P, as large as ever."""
    fixed, grown = memory_by_classes(0), memory_by_classes(classes)
    whole = ("BalSCL", "logits")
    share = {name: 1 if name.startswith(whole) else world for name in grown if not name.startswith("bank")}
    return sum(fixed[name] + (grown[name] - fixed[name]) / share[name] for name in share)


def sharded_softmax(world: int, classes: int = 50_000, width: int = 64, batch: int = 256) -> dict[str, float]:
    """Cross-entropy, its gradients and the classifier's group Gram matrix by shards, against float64 of the whole."""
    g = torch.Generator().manual_seed(0)
    weight, features = (
        torch.nn.functional.normalize(torch.randn(n, width, generator=g), dim=1) for n in (classes, batch)
    )
    labels, group = torch.randint(classes, (batch,), generator=g), torch.randint(GROUPS, (batch,), generator=g)
    exact = _by_shards(weight.double(), features.double(), labels, group, 1)
    return {f"{name}_error": _relative(got, wanted) for (name, got), wanted in
            zip(_by_shards(weight, features, labels, group, world).items(), exact.values(), strict=True)}  # fmt: skip


def _by_shards(weight: Tensor, features: Tensor, labels: Tensor, group: Tensor, world: int) -> dict[str, Tensor]:
    """What `world` ranks with a part of the classes each compute; sums over parts are the all-reduces."""
    parts = [torch.arange(len(weight)).chunk(world)[r] for r in range(world)]
    logits = [30 * features @ weight[p].T for p in parts]
    top = torch.stack([x.max(1).values for x in logits]).max(0).values
    total = torch.stack([(x - top[:, None]).exp().sum(1) for x in logits]).sum(0)
    loss, grad_features = total.log() + top, torch.zeros_like(features)
    gram = torch.zeros(GROUPS, GROUPS, dtype=features.dtype)
    for p, x in zip(parts, logits, strict=True):
        own = (labels >= p[0]) & (labels <= p[-1])
        error = (x - top[:, None]).exp() / total[:, None]
        rows, columns = own.nonzero().flatten(), labels[own] - p[0]
        loss[rows] -= x[rows, columns]
        error[rows, columns] -= 1
        grad_features += 30 * error @ weight[p]
        by_group = torch.stack([(30 * error * (group == k)[:, None]).T @ features for k in range(GROUPS)]).flatten(1)
        gram += by_group @ by_group.T
    return {"loss": loss, "feature_gradient": grad_features, "gram": gram}


def _relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())


# -- host memory and orders ----------------------------------------------------------------------------------------------


def resident() -> int:
    """Resident bytes of this process."""
    gc.collect()
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024


def host_bytes(images: int = 2_000_000, path: int = 40) -> dict[str, float]:
    """Bytes an image of a list in one rank, with paths of `path` characters."""
    names = [f"{i:0{path}d}" for i in range(images)]
    before = resident()
    table = PathTable.of(names)
    after_paths = resident()
    labels = np.sort(np.arange(images) % 8142)
    few = ImageList(Path("/"), PathTable.of(["a.jpg"] * 8142), np.arange(8142), "val.txt")
    lists = {"train": ImageList(Path("/"), table, labels, "train.txt"), "val": few, "test": few}
    source = TorchSource(lists, views=view_recipes("imagenet", 3), batch=1024, image_size=224)
    after_source = resident()
    order = source.epoch_indices(0)
    after_order = resident()
    steps = (after_paths - before, after_source - after_paths, after_order - after_source)
    assert len(order)
    parts = dict(zip(("paths", "labels_and_substitutes", "order"), (s / images for s in steps), strict=True))
    return {**parts, "all": sum(parts.values())}


def order_seconds(images: int, shard: int = 4096) -> dict[str, float]:
    """CPU seconds of one epoch's order of all images, and of its shards."""
    seconds = {}
    for name, n in (("images", images), ("shards", images // shard)):
        labels = torch.zeros(n, dtype=torch.int64)
        started = time.process_time()
        epoch_order("instance", labels, batch=min(1024, n), seed=0, epoch=1)
        seconds[name] = time.process_time() - started
    return seconds


# -- sketched bank -------------------------------------------------------------------------------------------------------


def snapshots_like_training(count: int, size: int, seed: int) -> Tensor:
    """[S, D] a walk that slows down from a common start, as weights do under a falling learning rate."""
    g = torch.Generator().manual_seed(seed)
    theta, rows = torch.randn(size, generator=g) * 0.05, []
    for s in range(count):
        theta = theta + torch.randn(size, generator=g) * 0.02 / (1 + s / 4)
        rows.append(theta.clone())
    return torch.stack(rows)


def sketch(rows: Tensor, width: int, seed: int = 0) -> Tensor:
    """Count sketch [S, width]: every element goes to one random place with a random sign; O(D), keeps inner products."""
    g = torch.Generator().manual_seed(seed)
    place = torch.randint(width, (rows.shape[1],), generator=g)
    sign = torch.randint(0, 2, (rows.shape[1],), generator=g).float() * 2 - 1
    return torch.zeros(len(rows), width).index_add_(1, place, rows * sign)


def groups_of(rows: Tensor, classes: int = 200) -> Tensor:
    bank = MemoryBank(classes, rows.shape[1], origin=torch.zeros(rows.shape[1]))
    for s, row in enumerate(rows):
        quality = torch.full((classes,), -torch.inf, dtype=torch.float64)
        quality[s * classes // len(rows) : (s + 1) * classes // len(rows)] = 1.0
        bank.update(quality, row, s)
    return group_classes(bank, torch.arange(classes, 0, -1), GROUPS)


def sketched_bank(width: int, seeds: int = 3, count: int = 40, size: int = 1_000_000) -> dict[str, float]:
    """What clustering from sketches instead of whole snapshots changes."""
    worst, same = 0.0, []
    for seed in range(seeds):
        rows = snapshots_like_training(count, size, seed)
        small = sketch(rows, width, seed)
        cosine, sketched = (
            torch.nn.functional.normalize(x, dim=1) @ torch.nn.functional.normalize(x, dim=1).T for x in (rows, small)
        )
        worst = max(worst, float((cosine - sketched).abs().max()))
        a, b = groups_of(rows), groups_of(small)
        pairs = (a[:, None] == a) == (b[:, None] == b)
        same.append(float(pairs.float().mean()))
    return {"cosine_error": worst, "pairs_agreeing": sum(same) / seeds, "bytes_a_snapshot": 4.0 * width}


# -- shard-wise sampling ------------------------------------------------------------------------------------------------


def shard_order(shards: int, size: int, window: int, seed: int = 0) -> Tensor:
    """An epoch as shard readers see it: shards in random order, a shuffle buffer of `window` of them; [n] image numbers."""
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(shards, generator=g)
    out = []
    for part in order.split(window):
        images = (part[:, None] * size + torch.arange(size)).flatten()
        out.append(images[torch.randperm(len(images), generator=g)])
    return torch.cat(out)


def shard_sampling(
    window: int, shards: int = 256, size: int = 4096, classes: int = 1000, batch: int = 1024
) -> dict[str, float]:
    """How far batches of shard-wise order are from those of a full permutation, for data written class by class (worst
    case) and written shuffled: mean share of a batch's images that come from classes over-represented by chance."""
    n = shards * size
    labels_sorted = torch.arange(n) * classes // n
    labels_mixed = labels_sorted[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    full = torch.randperm(n, generator=torch.Generator().manual_seed(2))
    order = shard_order(shards, size, window)

    def distance(labels: Tensor) -> float:
        batches = labels.view(-1, batch)[:64]
        counts = torch.stack([torch.bincount(row, minlength=classes) for row in batches]).double() / batch
        return float(0.5 * (counts - 1 / classes).abs().sum(1).mean())

    return {
        "by_class": distance(labels_sorted[order]), "shuffled": distance(labels_mixed[order]), "permutation": distance(labels_sorted[full]),
    }  # fmt: skip


# -- output --------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--append", action="store_true", help="append rows to benchmarks/results/scale.jsonl")
    parser.add_argument("--parts", nargs="+", choices=("sharded", "host", "sketch", "shards"), default=None)
    args = parser.parse_args()
    parts = args.parts or ["sharded", "host", "sketch", "shards"]

    def row(case: str, metric: str, value: float, **fields: Any) -> None:
        print(f"{case:46s} {metric:26s} {value:12.5g}", flush=True)
        if args.append:
            append_row("scale", case, metric, value, **{"device": "simulated", **fields})

    if "sharded" in parts:
        rate, source = measured_rate() or (ASSUMED.rate, "assumed")  # as in the tables of scaling_model.py
        m = dataclasses.replace(ASSUMED, rate=rate)
        for classes in (8142, 100_000, MILLION):
            row(f"model/classes/C={classes}", "seconds", class_seconds(classes), config={"flops": FLOPS})
        for world in (8, 64, 256):
            case = f"model/sharded/bcl/local/resnet50/C=1000000/P={world}"
            for metric, value in sharded_step(MILLION, world, m).items():
                row(case, metric, value, config={**vars(m), "rate_source": source, "batch_a_gpu": 128})
            row(case, "gib_a_gpu", sharded_memory(MILLION, world), config={"batch_a_gpu": 128})
            for metric, value in sharded_softmax(world).items():
                row(f"model/sharded softmax/C=50000/P={world}", metric, value, config={"dtype": "float32"})
    if "host" in parts:
        measured = {"device": "cpu"}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # memory that nothing has used before
            each = pool.submit(host_bytes).result()
        for name, value in each.items():
            row("host/a rank/torch loader/n=2000000", f"bytes_an_image_{name}", value, **measured, config={"path": 40})
        row("model/host/256 GiB, 8 ranks", "images_until_full", 256 * GIB / 8 / each["all"])
        for images in (10_000_000, 100_000_000):
            for name, value in order_seconds(images).items():
                counted = {"counted": "CPU seconds", "threads": torch.get_num_threads()}
                row(f"sampler/order of {name}/n={images}", "cpu_seconds", value, **measured, config=counted)
    if "sketch" in parts:
        for width in (1 << 10, 1 << 12, 1 << 14, 1 << 16):
            for metric, value in sketched_bank(width).items():
                row(f"model/sketched bank/D=1e6/width={width}", metric, value)
    if "shards" in parts:
        for window in (1, 4, 16, 64, 256):
            for metric, value in shard_sampling(window).items():
                row(f"model/shards/256x4096/window={window}", f"distance_{metric}", value)


if __name__ == "__main__":
    main()
