"""Addresses and settings as the record arrays that a compiled module reads without conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .sweep import Inputs, Mean, Sweep, Target

#: The numbers by which the compiled modules know the dtypes.
DTYPE_CODES = {"F32": 0, "F16": 1, "BF16": 2, "U8": 3}

_T = TypeVar("_T", bound=np.generic)


class Layouts(Protocol):
    """A compiled module: the layouts of its records, each named as the C++ type."""

    ROW: np.dtype[np.void]
    VIEW: np.dtype[np.void]
    SWEEP: np.dtype[np.void]
    PART: np.dtype[np.void]
    TARGET: np.dtype[np.void]


class Records:
    """The records of one compiled module."""

    def __init__(self, layouts: Layouts) -> None:
        self._layouts = layouts

    def rows(
        self, tensors: Sequence[Inputs], *, settings: Sequence[int] | None = None, groups: Sequence[int] | None = None
    ) -> NDArray[np.void]:
        """One per tensor; its views, parts, sweeps and targets follow one another in the other arrays."""
        rows = [(t.elements, t.begin, len(t.models), len(t.views), 1, 0) for t in tensors]
        records = np.array(rows, self._layouts.ROW)
        if settings is not None:
            records["settings"] = settings
        if groups is not None:
            records["group"] = groups
        return records

    def views(self, tensors: Sequence[Inputs]) -> NDArray[np.void]:
        views = [(v.address, DTYPE_CODES[v.dtype]) for tensor in tensors for v in tensor.views]
        return np.array(views, self._layouts.VIEW)

    def sweeps(self, settings: Sequence[Sequence[Sweep]]) -> NDArray[np.void]:
        rows = [
            (sweep.keep, sweep.elect, sweep.tie_vote, sweep.mean, sweep.divisor, sweep.lambda_, 0.0)
            for each in settings
            for sweep in each
        ]
        return np.array(rows, self._layouts.SWEEP)

    def parts(self, settings: Sequence[Sequence[Sweep]]) -> NDArray[np.void]:
        rows = [
            (
                part.weight,
                part.rescale,
                part.magnitude,
                part.weight if sweep.mean is Mean.WEIGHTS else 1.0,
                part.ties_end,
                part.cut,
                part.key,
            )
            for each in settings
            for sweep in each
            for part in sweep.parts
        ]
        return np.array(rows, self._layouts.PART)

    def targets(self, targets: Sequence[Sequence[Target]]) -> NDArray[np.void]:
        places = [(target.offset, target.file, DTYPE_CODES[target.dtype]) for each in targets for target in each]
        return np.array(places, self._layouts.TARGET)


def split(flat: NDArray[_T], sizes: Sequence[int]) -> list[NDArray[_T]]:
    """A flat array in pieces of these sizes."""
    return np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []
