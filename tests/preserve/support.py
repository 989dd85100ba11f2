"""What the tests of this folder share."""

from typing import Any

from torch import Tensor

from ltfast.preserve.fisher import fisher_sums


def fisher_diagonal(*args: Any, **options: Any) -> Tensor:
    """Mean of squared gradients, float32 [D]; arguments as `fisher_sums`."""
    sums, seen = fisher_sums(*args, **options)
    return (sums / seen).float()
