"""A folder of classes as it was found in nature, split into train and test: fine-tuning from published weights.

    python benchmarks/natural.py PLANKTON OUT --share 0.1
    python benchmarks/ablation.py --dataset plankton --data-dir OUT --sweeps published-weights

PLANKTON is the training part of PlanktonSet 1.0 (Cowen et al. 2015; the National Data Science Bowl's): 30,336 pictures in 121
folders of 1,979 to 9. OUT has links to the files as `--dataset folder` wants them: OUT/test/<class> up to 25 pictures of a
class, no more than half of them, so that each class counts about as much; OUT/train/<class> a share of the rest, two at least:
the long tail stays. Which ones is drawn once, by names alone.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from ltfast.data.folders import IMAGE_SUFFIXES


def drawn(name: str, files: Sequence[Path], share: float, test: int) -> tuple[list[Path], list[Path]]:
    """(train, test) of the files of a class."""
    shuffled = sorted(files)
    random.Random(name).shuffle(shuffled)
    held = min(test, len(shuffled) // 2)
    rest = shuffled[held:]
    return rest[: max(2, round(len(rest) * share))], shuffled[:held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="of what is not tested [0.1]")
    parser.add_argument("--test", type=int, default=25, help="pictures of a class, at most [25]")
    args = parser.parse_args()
    sizes = {"train": 0, "test": 0}
    for folder in sorted(path for path in args.source.iterdir() if path.is_dir()):
        files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
        for split, chosen in zip(sizes, drawn(folder.name, files, args.share, args.test), strict=True):
            target = args.out / split / folder.name
            target.mkdir(parents=True)
            for path in chosen:
                (target / path.name).symlink_to(path.resolve())
            sizes[split] += len(chosen)
    print(f"{args.out}: {sizes['train']:,} training and {sizes['test']:,} test pictures")


if __name__ == "__main__":
    main()
