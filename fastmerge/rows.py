"""Row maps: where each row of an output's vocabulary lies in the models, whose vocabularies order tokens differently."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: Instead of a model: a row of zeros, the mean of some rows, or that of all other rows of the map.
ZERO, MEAN, PADDING = -1, -2, -3


@dataclass(frozen=True, eq=False)
class RowMap:
    """For each row of an output, the row that a model has for it.

    `model` is int32[size]: the index of the model whose row it is, mostly the map's own, or `ZERO`, `MEAN` or
    `PADDING`. `row` is int64[size]: the row there, for `MEAN` an index into `means`, else 0. Each of the `means` are the
    (model, row) pairs whose plain float32 mean the row is.
    """

    model: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]
    means: tuple[tuple[tuple[int, int], ...], ...] = ()

    @property
    def size(self) -> int:
        return len(self.model)
