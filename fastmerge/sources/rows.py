"""Row maps: where each row of an output's vocabulary lies in models whose vocabularies are not alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

#: Instead of a model: a row of zeros, the mean of some rows, or that of all other rows of the map.
ZERO, MEAN, PADDING = -1, -2, -3


@dataclass(frozen=True, eq=False)
class RowMap:
    """For each row of an output, the row that a model has for it.

    `model` is int32[size]: the index of the model whose row it is, mostly the map's own, or `ZERO`, `MEAN` or
    `PADDING`. `row` is int64[size]: the row there, for `MEAN` an index into `means`, else 0. Each of the `means` are
    the (model, row) pairs whose plain float32 mean the row is.
    """

    model: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]
    means: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def size(self) -> int:
        return len(self.model)


class Gather(NamedTuple):
    """How the inputs of a tensor come about that are not all stored as they are.

    `maps` has one for each input, the base last; None where the rows are its model's own in their order. `names` is
    what the tensor is called in each model that rows are of.
    """

    maps: tuple[RowMap | None, ...]
    names: Mapping[int, str]
