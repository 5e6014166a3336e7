"""Addresses and settings as the record arrays that a compiled module reads without conversion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, islice, repeat
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .sweep import Cut, Found, Inputs, Sweep, Target

#: The numbers by which the compiled modules know the dtypes.
DTYPE_CODES = {"F32": 0, "F16": 1, "BF16": 2, "U8": 3}

_Flat = TypeVar("_Flat", NDArray[np.int64], NDArray[np.float64], tuple[int, ...], tuple[bytes, ...])


class Layouts(Protocol):
    """A compiled module: the layouts of its records, each named as the C++ type."""

    ROW: np.dtype[np.void]
    VIEW: np.dtype[np.void]
    SWEEP: np.dtype[np.void]
    PART: np.dtype[np.void]
    TARGET: np.dtype[np.void]


class Records:
    """The records of one compiled module, filled in by the core."""

    def __init__(self, layouts: Layouts) -> None:
        from . import _core  # here: torch_ops has other ways where nothing is compiled

        self._core, self._layouts = _core, layouts

    def rows(
        self, tensors: Sequence[Inputs], *, settings: Sequence[int] | None = None, groups: Sequence[int] | None = None
    ) -> NDArray[np.void]:
        """One per tensor; its views, parts, sweeps and targets follow one another in the other arrays."""
        records = self._core.rows(tensors).view(self._layouts.ROW)
        if settings is not None:
            records["settings"] = settings
        if groups is not None:
            records["group"] = groups
        return records

    def views(self, tensors: Sequence[Inputs]) -> NDArray[np.void]:
        return self._core.views(tensors, DTYPE_CODES).view(self._layouts.VIEW)

    def sweeps(self, settings: Sequence[Sequence[Sweep]]) -> NDArray[np.void]:
        return self._core.sweeps(settings).view(self._layouts.SWEEP)

    def parts(self, settings: Sequence[Sequence[Sweep]]) -> NDArray[np.void]:
        return self._core.parts(settings).view(self._layouts.PART)

    def targets(self, targets: Sequence[Sequence[Target]]) -> NDArray[np.void]:
        return self._core.targets(targets, DTYPE_CODES).view(self._layouts.TARGET)


def split(flat: _Flat, sizes: Sequence[int]) -> list[_Flat]:
    """A flat array or tuple in pieces of these sizes."""
    return [flat[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def flat(ranks: Iterable[Iterable[int]]) -> NDArray[np.int64]:
    """Ranks, group after group."""
    return np.fromiter(chain.from_iterable(ranks), np.int64)


def cuts_of(
    magnitudes: NDArray[np.float32], ends: NDArray[np.int64], ranks: Sequence[Sequence[int]]
) -> list[tuple[Cut, ...]]:
    """What a selection answered, by group."""
    cuts = map(Cut, magnitudes.tolist(), ends.tolist())
    return [tuple(islice(cuts, len(wanted))) for wanted in ranks]


def found_of(rows: NDArray[np.void], counts: Iterable[NDArray[np.int64]], hashes: Iterable[bytes] = ()) -> list[Found]:
    """What a merge noticed, by tensor: not finite, first and overflow."""
    inputs, outputs = rows["inputs"].tolist(), rows["settings"].tolist()
    nonfinite, first, overflow = (tuple(each.tolist()) for each in counts)
    by_output = tuple(hashes)
    each = split(by_output, outputs) if by_output else repeat(())
    return list(map(Found, split(nonfinite, inputs), split(first, inputs), split(overflow, outputs), each))
