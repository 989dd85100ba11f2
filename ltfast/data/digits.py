"""digits-lt: scikit-learn's 1,797 handwritten digits (UCI, 8 x 8, 0..16) made long-tailed; needs no download.

A balanced test split of 40 per class comes off first, then 10 per class for validation; the training counts follow the
exponential rule with n_max = 134, imbalance 100, but never fewer than 2 images, so that a class has a spread and a
positive pair: 128 80 48 28 17 10 6 3 2 2 (324 images; the first class gives its last 6 to validation). The splits do
not depend on the training seed.
"""

from __future__ import annotations

import numpy as np

from ltfast.data.longtail import select_subset
from ltfast.data.pool import Pool

TEST_PER_CLASS = 40
MIN_PER_CLASS = 2


def read_digits() -> Pool:
    """The pool: uint8 [n, 1, 8, 8], intensity 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels, names = bunch.target.astype(np.int64), tuple(str(digit) for digit in range(10))
    drawn = select_subset(labels, np.bincount(labels), TEST_PER_CLASS)
    rest = np.sort(drawn.train)
    return Pool(images[rest], labels[rest], images[drawn.val], labels[drawn.val], names)
