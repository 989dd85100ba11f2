"""Two packs of CIFAR's pictures with other classes in each: a study of fine-tuning for two CPU cores.

    python benchmarks/other_classes.py CIFAR.npz BEFORE.npz AFTER.npz
    ltfast train --dataset folder-small --data-dir BEFORE.npz --method ce --model resnet20 --epochs 30 --batch 128 --lr 0.1 \\
        --schedule cosine --precision bf16 --compile on --out BEFORE
    python benchmarks/ablation.py --dataset cifar10-finetuned --data-dir AFTER.npz --weights BEFORE/checkpoints/last.safetensors \\
        --sweeps fine-tuning

BEFORE has the classes at even places of the list, all of their pictures; AFTER has those at odd places. Files are copied as they
are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def part(arrays: Arrays, classes: list[int]) -> Arrays:
    """The arrays of a pack of these classes alone, numbered afresh in the order given."""
    names = arrays["class_names"]
    place = np.full(len(names), -1)
    place[classes] = np.arange(len(classes))
    found: Arrays = {"class_names": names[classes]}
    for split in ("train", "test"):
        data, offsets, labels = (arrays[f"{split}_{what}"] for what in ("bytes", "offsets", "labels"))
        chosen = np.flatnonzero(place[labels] >= 0)
        files = [data[offsets[i] : offsets[i + 1]] for i in chosen]
        found[f"{split}_bytes"] = np.concatenate(files)
        found[f"{split}_offsets"] = np.cumsum([0, *map(len, files)])
        found[f"{split}_labels"] = place[labels[chosen]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    args = parser.parse_args()
    with np.load(args.source) as pack:
        arrays = {name: pack[name] for name in pack}
    for first, target in enumerate((args.before, args.after)):
        found = part(arrays, list(range(first, len(arrays["class_names"]), 2)))
        np.savez(target, **found)
        print(f"{target}: {', '.join(found['class_names'])}; {len(found['train_labels']):,} training pictures")


if __name__ == "__main__":
    main()
