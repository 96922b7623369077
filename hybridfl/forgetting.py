"""Forgetting in a stream of tasks, of the matrix of accuracies.

Row t of a matrix has the accuracies after task t on each of the tasks 0 … t. With k rows, task k - 1 is the last one
learned, and forgetting is a mean over the tasks before it. Negative values say that later tasks have helped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def forgetting(matrix: Matrix) -> float:
    """Mean over tasks i of max_t A[t][i] - A[k-1][i], with i ≤ t < k - 1; NaN for fewer than two rows.

    Chaudhry, Dokania, Ajanthan, Torr 2018, arXiv 1801.10112, equation 3. There t begins with the first task; here a task has
    no accuracy before its own classes have been seen.
    """
    return _mean([_most([row[i] for row in matrix[i:-1]]) - matrix[-1][i] for i in range(len(matrix) - 1)])


def forgetting_learned(matrix: Matrix) -> float:
    """Mean over tasks i of A[i][i] - A[k-1][i], from when each had just been learned; NaN for fewer than two rows.

    As in the official code of LoRM, Salami et al. 2025, arXiv 2410.17961.
    """
    return _mean([matrix[i][i] - matrix[-1][i] for i in range(len(matrix) - 1)])


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan


def _most(values: Sequence[float]) -> float:
    """The largest; NaN if one is not known, which ``max`` would hide."""
    return math.nan if any(map(math.isnan, values)) else max(values)
