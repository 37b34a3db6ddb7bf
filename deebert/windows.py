"""What is said of a text that is longer than the model reads at once: the mean of its windows.

Such a text is cut into windows that overlap; each is a sample of its own and leaves where it is sure. The
text's scores (its distribution, a probability for each label, or its number) are the mean of its windows'
scores, each counting the same whatever its length; its answer and its entropy are those of the mean
(`Problem.predict_scores`, `Problem.entropy_of_scores`), its exit layer is that of its deepest window: what the
answer waited for. Knows nothing of tokenizers, models or who holds the windows meanwhile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deebert.packing import IntArray

FloatArray = npt.NDArray[np.float32] | npt.NDArray[np.float64]


def first_windows(counts: IntArray) -> IntArray:
    """(N,) numbers of windows -> (N,) index of each text's first window, when windows lie text by text."""
    return np.cumsum(counts) - counts


def text_means(values: FloatArray, counts: IntArray) -> npt.NDArray[np.float64]:
    """Means over the windows of each text.

    Args:
        values: (W, C), windows lie text by text, in the order of the text.
        counts: (N,) windows of each text, at least 1; they add up to W.

    Returns:
        (N, C). Sums are taken in float64 and in the order of the windows, never in that of their exits, so
        that the answer is the same however they left.
    """
    if not len(counts):
        return np.zeros((0, values.shape[1]), np.float64)
    sums = np.add.reduceat(values.astype(np.float64), first_windows(counts), axis=0)
    return np.asarray(sums / counts[:, None], np.float64)


def text_sums(values: IntArray, counts: IntArray) -> IntArray:
    """Sums over the windows of each text; (W,) and (N,) as in `text_means` -> (N,)."""
    if not len(counts):
        return np.zeros(0, np.int64)
    return np.asarray(np.add.reduceat(values, first_windows(counts)), np.int64)
