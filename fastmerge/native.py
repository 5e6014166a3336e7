"""The compiled CPU core as a provider: addresses and settings in, numbers out. No arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import CUT, BackendError, CheckpointError
from .records import DTYPE_CODES, Records, cuts_of, flat, found_of, split
from .sweep import Cut, Found, Inputs, Run, Sweep, Target, View

name = "cpu"

#: By instruction set of this build, best first, why it cannot run here; None where it can.
_WHY_NOT: dict[str, str | None] = _core.instruction_sets()
#: Every instruction set of this build, best first.
ISAS = tuple(_WHY_NOT)
_HERE = tuple(isa for isa, reason in _WHY_NOT.items() if reason is None)

DTYPES = frozenset(DTYPE_CODES)

_records = Records(_core)
_forced: list[str] = []


def isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this processor can run, best first."""
    return _HERE


def why_not(isa: str) -> str:
    """Why an instruction set cannot run here; empty where it can."""
    return _WHY_NOT.get(isa, f"this build has no {isa} kernels") or ""


def isa() -> str:
    """The instruction set that runs: the one of `using`, else of FASTMERGE_ISA, else the best.

    Raises:
        BackendError: the one asked for cannot run here.
    """
    wanted = _forced[-1] if _forced else os.environ.get("FASTMERGE_ISA", "")
    if not wanted:
        return isas()[0]
    if reason := why_not(wanted):
        raise BackendError(f"FASTMERGE_ISA={wanted!r} cannot run: {reason}; here there are {', '.join(isas())}")
    return wanted


@contextmanager
def using(isa: str) -> Iterator[None]:
    """Force one instruction set within the block."""
    _forced.append(isa)
    try:
        yield
    finally:
        _forced.pop()


def gram(tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
    """Inner products [M, M] in float64 of deltas, or of weights without a base; NaN and Inf count as 0."""
    with _cut_inputs():
        products = _core.gram(_records.rows(tensors), _records.views(tensors), isa(), run.threads, run.tick)
    sizes = [len(tensor.models) for tensor in tensors]
    return [part.reshape(m, m) for m, part in zip(sizes, split(products, [m * m for m in sizes]), strict=True)]


def norms(tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
    """Per model, before and after `Keep`: L1, L2, Linf of the delta [M, 2, 3]; NaN and Inf count as 0."""
    settings = [(sweep,) for sweep in sweeps]
    with _cut_inputs():
        sums = _core.norms(
            _records.rows(tensors),
            _records.views(tensors),
            _records.sweeps(settings),
            _records.parts(settings),
            isa(),
            run.threads,
            run.tick,
        )
    return [part.reshape(-1, 2, 3) for part in split(sums, [6 * len(tensor.models) for tensor in tensors])]


def threshold(groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> list[tuple[Cut, ...]]:
    """Per group and model the cut that keeps exactly its rank of elements, equals from the lowest index.

    A NaN counts as 0. Where all equals stay, or all elements, `ties_end` is EVERY.
    """
    tensors = list(chain.from_iterable(groups))
    rows = _records.rows(tensors, groups=[number for number, group in enumerate(groups) for _ in group])
    wanted = flat(ranks)
    with _cut_inputs():
        magnitudes, ends = _core.threshold(rows, _records.views(tensors), wanted, isa(), run.threads, run.tick)
    return cuts_of(magnitudes, ends, ranks)


def merge(
    tensors: Sequence[Inputs], sweeps: Sequence[Sequence[Sweep]], targets: Sequence[Sequence[Target]], run: Run
) -> list[Found]:
    """One output per sweep and target of each tensor, from one read of its inputs.

    Raises:
        CheckpointError: a mapped input was cut while it was read.
        OSError: a target file could not be written.
    """
    rows = _records.rows(tensors, settings=[len(each) for each in sweeps])
    with _cut_inputs():
        nonfinite, first, overflow, hashes = _core.merge(
            rows,
            _records.views(tensors),
            _records.sweeps(sweeps),
            _records.parts(sweeps),
            _records.targets(targets),
            isa(),
            run.threads,
            run.tile,
            run.tick,
            run.hash,
        )
    return found_of(rows, (nonfinite, first, overflow), hashes)


def merge_ranked(
    tensors: Sequence[Inputs],
    sweeps: Sequence[Sequence[Sweep]],
    ranks: Sequence[Sequence[int]],
    targets: Sequence[Sequence[Target]],
    run: Run,
) -> tuple[list[tuple[Cut, ...]], list[Found]]:
    """`threshold` of each tensor alone, then `merge` with its cuts in the parts of its sweeps, which keep ABOVE.

    Large tensors whose deltas are discrete, as those of 16-bit weights, are read once; a tick counts as of two reads.
    """
    rows = _records.rows(tensors, settings=[len(each) for each in sweeps])
    tick = run.tick
    with _cut_inputs():
        nonfinite, first, overflow, hashes, magnitudes, ends = _core.merge_ranked(
            rows,
            _records.views(tensors),
            _records.sweeps(sweeps),
            _records.parts(sweeps),
            flat(ranks),
            _records.targets(targets),
            isa(),
            run.threads,
            run.tile,
            tick and (lambda read: tick(2 * read)),
            run.hash,
        )
    return cuts_of(magnitudes, ends, ranks), found_of(rows, (nonfinite, first, overflow), hashes)


def lowrank(
    weights: View,
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    scaling: float,
    out: NDArray[np.float32],
    threads: int,
) -> None:
    """Weights [rows, width] + scaling * left [rows, rank] right [rank, width], into `out`; `right` comes `in_blocks`.

    In float32, the sum over the rank in its order. Raises CheckpointError: the mapped weights were cut meanwhile.
    """
    with _cut_inputs():
        _core.lowrank(weights.address, DTYPE_CODES[weights.dtype], left, right, scaling, out, isa(), threads)


def in_blocks(right: NDArray[np.float32]) -> NDArray[np.float32]:
    """A matrix [rank, width] as `lowrank` reads it: some columns after others, padded with zeros."""
    rank, width = right.shape
    blocks = -(-width // _core.LOWRANK_BLOCK)
    padded = np.zeros((rank, blocks * _core.LOWRANK_BLOCK), np.float32)
    padded[:, :width] = right
    return np.ascontiguousarray(padded.reshape(rank, blocks, _core.LOWRANK_BLOCK).swapaxes(0, 1))


@contextmanager
def _cut_inputs() -> Iterator[None]:
    try:
        yield
    except _core.InputCut:
        raise CheckpointError(CUT) from None
