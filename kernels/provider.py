"""The four ops in Triton, for NVIDIA, AMD and Intel GPUs, on addresses of host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..sweep import Cut, Found, Inputs, Run, Sweep, Target
from .measure import gram_of, norms_of
from .merging import merge_tensor
from .select import cuts_of
from .staging import DTYPES as _DTYPES
from .staging import why_not

__all__ = ["DTYPES", "gram", "merge", "name", "norms", "threshold", "why_not"]

name = "triton"
DTYPES = frozenset(_DTYPES)


def gram(tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
    """Inner products [M, M] of the deltas, or of the weights without a base, in float64; NaN and Inf count as 0."""
    return [gram_of(inputs, run) for inputs in tensors]


def norms(tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
    """L1, L2 and Linf of each delta before and after `Keep`, [M, 2, 3], in float64; NaN and Inf count as 0."""
    return [norms_of(inputs, sweep, run) for inputs, sweep in zip(tensors, sweeps, strict=True)]


def threshold(groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> list[tuple[Cut, ...]]:
    """The cut per model that keeps exactly its rank of elements, of the tensors of a group laid end to end.

    Of equal magnitudes those with the lowest index stay; `ties_end` is EVERY where all of them do. A NaN counts as 0.
    """
    return [cuts_of(group, wanted, run) for group, wanted in zip(groups, ranks, strict=True)]


def merge(
    tensors: Sequence[Inputs], sweeps: Sequence[Sequence[Sweep]], targets: Sequence[Sequence[Target]], run: Run
) -> list[Found]:
    """Write K outputs per tensor, one for each of its sweeps, from one read; a U8 tensor is copied."""
    return [merge_tensor(*job, run) for job in zip(tensors, sweeps, targets, strict=True)]
