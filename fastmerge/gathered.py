"""Jobs whose inputs come in pieces, measured as one tensor and swept piece by piece.

A selection wants all pieces at once, and holds what is made of one tensor; so does a method that is no sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from . import backends
from .batches import Batch, Reader, joined, row_of
from .checkpoint import DTYPE_BITS
from .measures import Cuts, functions_of, measured, row_by_row
from .pieces import Pieces, Room
from .planner import Job
from .sweep import Cut, Found, Inputs, Run, Sweep, Target


def swept(
    job: Job, reader: Reader, ops: backends.Ops, cuts: Cuts, targets: Sequence[Target], run: Run, room: Room
) -> Found:
    """Measures and sweeps a job that gathers; what is made of its inputs is made in the room, which is free then."""
    try:
        return _swept(job, Pieces(job, reader, room, run.threads), ops, cuts, targets, run)
    finally:
        room.free()


def _swept(job: Job, pieces: Pieces, ops: backends.Ops, cuts: Cuts, targets: Sequence[Target], run: Run) -> Found:
    if job.direct:
        whole = pieces.whole()
        return ops.compute([whole.inputs], [functions_of(job)], [targets], run)[0]
    run = run._replace(hash=0)  # parts of a tensor end where its pieces do not
    width = row_of(job)
    sweeps = [] if width else measured(Batch([job], [pieces.inputs], []), _Joint(ops, pieces), cuts, run)[0]
    views = len(pieces.inputs.views)
    found = [Found((0,) * views, (-1,) * views, (0,) * len(targets))]
    for batch in pieces.batches():
        inputs = [piece.inputs for piece in batch]
        places = [[_moved(target, piece.begin) for target in targets] for piece in inputs]
        if width:
            found += [row_by_row(job, width, each, ops, at, run) for each, at in zip(inputs, places, strict=True)]
        else:
            found += ops.merge(inputs, [sweeps] * len(inputs), places, run)
        found = [joined(found)]
    return found[0]


def _moved(target: Target, begin: int) -> Target:
    return target._replace(offset=target.offset + begin * DTYPE_BITS[target.dtype] // 8)


class _Joint:
    """The measures of a tensor in pieces, which `measured` asks for as of one."""

    def __init__(self, ops: backends.Ops, pieces: Pieces) -> None:
        self._ops, self._pieces = ops, pieces

    def threshold(
        self, groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run
    ) -> list[tuple[Cut, ...]]:
        if not groups:
            return []
        groups = [[piece.inputs.selected(wanted) for piece in self._pieces.held()] for wanted in ranks]
        return self._ops.threshold(groups, ranks, run)

    def gram(self, tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
        if not tensors:
            return []
        sums = np.zeros((len(tensors[0].models),) * 2)
        for batch in self._pieces.batches():
            for products in self._ops.gram([piece.inputs for piece in batch], run):
                sums += products
        return [sums]

    def norms(self, tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
        found = [np.zeros((len(each.models), 2, 3)) for each in tensors]
        for sums, sweep in zip(found, sweeps, strict=True):
            for batch in self._pieces.batches():
                for norms in self._ops.norms([piece.inputs for piece in batch], [sweep] * len(batch), run):
                    sums[:, :, 0] += norms[:, :, 0]
                    sums[:, :, 1] += norms[:, :, 1] ** 2
                    sums[:, :, 2] = np.maximum(sums[:, :, 2], norms[:, :, 2])
            sums[:, :, 1] = np.sqrt(sums[:, :, 1])
        return found
