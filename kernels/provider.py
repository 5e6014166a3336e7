"""The four ops in Triton, for NVIDIA, AMD and Intel GPUs, on addresses of device memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..sweep import Cut, Found, Inputs, Run, Sweep, Target
from . import measure, select, tables
from .device import Device, device, devices, why_not
from .measure import gram_all, norms_all
from .merging import Job, merge_all
from .select import select_all
from .stages import block_of

__all__ = [
    "DEVICE",
    "DTYPES",
    "Device",
    "device",
    "devices",
    "gram",
    "merge",
    "name",
    "norms",
    "scratch_bytes",
    "threshold",
    "why_not",
]

name = "triton"
DEVICE = "gpu"
DTYPES = frozenset(tables.DTYPES)


def gram(tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
    """Inner products [M, M] of the deltas, or of the weights without a base, in float64; NaN and Inf count as 0."""
    return gram_all(tensors, run)


def norms(tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
    """L1, L2 and Linf of each delta before and after `Keep`, [M, 2, 3], in float64; NaN and Inf count as 0."""
    return norms_all(tensors, sweeps, run)


def threshold(groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> list[tuple[Cut, ...]]:
    """The cut per model that keeps exactly its rank of elements, of the tensors of a group laid end to end.

    Of equal magnitudes those with the lowest index stay; `ties_end` is EVERY where all of them do. A NaN counts as 0.
    """
    return select_all(groups, ranks, run)


def merge(
    tensors: Sequence[Inputs],
    sweeps: Sequence[Sequence[Sweep]],
    targets: Sequence[Sequence[Target]],
    run: Run,
    look: bool = True,
) -> list[Found]:
    """Write K outputs per tensor, one for each of its sweeps, from one read; no output may overlap an input.

    Without `look` nothing is waited for: the work is queued on the stream of the run, and nothing is returned.
    """
    return merge_all([Job(*each) for each in zip(tensors, sweeps, targets, strict=True)], run, look)


def scratch_bytes(tensors: int, elements: int, models: int, settings: int, ranks: int, run: Run) -> int:
    """The most memory that an op takes beside its tensors, of the GPU and pinned together; torch keeps it for others.

    That is, when it is given no more tensors than this, of so many elements together, so many models and settings each;
    `ranks` is how many magnitudes a selection finds, 0 where nothing is selected.
    """
    beside = max(
        measure.scratch_bytes(tensors, elements, models, settings),
        select.scratch_bytes(tensors, elements, settings, ranks),
    )
    return tables.scratch_bytes(tensors, elements, models, settings, ranks, block_of(models + 1)) + beside
