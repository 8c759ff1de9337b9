"""Mean loss over windows and its standard error."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def window_mean(values: npt.ArrayLike, targets: Sequence[int] = ()) -> tuple[float, float]:
    """Mean over all counted targets, and its standard error, from the means (n,) of n >= 2 windows.

    With r = sum(c x) / sum(c) for n windows of c targets, the squared standard error is that of a ratio of two sums,
    n / (n - 1) * sum((c (x - r))^2) / sum(c)^2 (Cochran, Sampling Techniques, 3rd edition, 6.4). If all windows have
    equally many targets (or `targets` is empty), this is the mean and s / sqrt(n).
    """
    means = np.asarray(values, dtype=np.float64)
    count = len(means)
    with np.errstate(invalid="ignore"):  # the caller reports losses that are not finite
        if len(set(targets)) < 2:
            return float(means.mean()), float(means.std(ddof=1) / math.sqrt(count))
        counts = np.asarray(targets, dtype=np.float64)
        mean = float((counts * means).sum() / counts.sum())
        squares = float(((counts * (means - mean)) ** 2).sum())
    return mean, math.sqrt(count / (count - 1) * squares) / float(counts.sum())
