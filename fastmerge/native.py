"""The compiled CPU core as a provider: lays addresses and settings out in record arrays. No arithmetic."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from . import _core
from .errors import CUT, BackendError, CheckpointError
from .sweep import Cut, Found, Inputs, Mean, Run, Sweep, Target

name = "cpu"

#: Every instruction set of this build, best first.
ISAS = tuple(_core.instruction_sets())

_CODES = {"F32": 0, "F16": 1, "BF16": 2, "U8": 3}
DTYPES = frozenset(_CODES)

_forced: list[str] = []
_T = TypeVar("_T", bound=np.generic)


def isas() -> tuple[str, ...]:
    """The instruction sets that this build has and this processor can run, best first."""
    return tuple(isa for isa, reason in _core.instruction_sets().items() if reason is None)


def why_not(isa: str) -> str:
    """Why an instruction set cannot run here; empty where it can."""
    return _core.instruction_sets().get(isa, f"this build has no {isa} kernels") or ""


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
        products = _core.gram(_rows(tensors), _views(tensors), isa(), run.threads, run.tick)
    sizes = [len(tensor.models) for tensor in tensors]
    return [part.reshape(m, m) for m, part in zip(sizes, _split(products, [m * m for m in sizes]), strict=True)]


def norms(tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
    """Per model, before and after `Keep`: L1, L2, Linf of the delta [M, 2, 3]; NaN and Inf count as 0."""
    settings = [(sweep,) for sweep in sweeps]
    with _cut_inputs():
        sums = _core.norms(
            _rows(tensors), _views(tensors), _sweeps(settings), _parts(settings), isa(), run.threads, run.tick
        )
    return [part.reshape(-1, 2, 3) for part in _split(sums, [6 * len(tensor.models) for tensor in tensors])]


def threshold(groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> list[tuple[Cut, ...]]:
    """Per group and model the cut that keeps exactly its rank of elements, equals from the lowest index.

    A NaN counts as 0. Where all equals stay, or all elements, `ties_end` is EVERY.
    """
    tensors = list(chain.from_iterable(groups))
    rows = _rows(tensors, [number for number, group in enumerate(groups) for _ in group])
    wanted = np.fromiter(chain.from_iterable(ranks), np.int64)
    with _cut_inputs():
        magnitudes, ends = _core.threshold(rows, _views(tensors), wanted, isa(), run.threads, run.tick)
    cuts = iter(map(Cut, magnitudes.tolist(), ends.tolist()))
    return [tuple(next(cuts) for _ in wanted) for wanted in ranks]


def merge(
    tensors: Sequence[Inputs], sweeps: Sequence[Sequence[Sweep]], targets: Sequence[Sequence[Target]], run: Run
) -> list[Found]:
    """One output per sweep and target of each tensor, from one read of its inputs.

    Raises:
        CheckpointError: a mapped input was cut while it was read.
        OSError: a target file could not be written.
    """
    rows = _rows(tensors)
    rows["settings"] = [len(each) for each in sweeps]
    places = np.array(
        [(target.offset, target.file, _CODES[target.dtype]) for each in targets for target in each], _core.TARGET
    )
    with _cut_inputs():
        nonfinite, first, overflow = _core.merge(
            rows, _views(tensors), _sweeps(sweeps), _parts(sweeps), places, isa(), run.threads, run.tile, run.tick
        )
    inputs, outputs = rows["inputs"].tolist(), rows["settings"].tolist()
    return [
        Found(tuple(a.tolist()), tuple(b.tolist()), tuple(c.tolist()))
        for a, b, c in zip(_split(nonfinite, inputs), _split(first, inputs), _split(overflow, outputs), strict=True)
    ]


# --- records ---


def _rows(tensors: Sequence[Inputs], groups: Sequence[int] | None = None) -> NDArray[np.void]:
    rows = [(t.elements, len(t.models), len(t.views), 1, 0) for t in tensors]
    records = np.array(rows, _core.ROW)
    if groups is not None:
        records["group"] = groups
    return records


def _views(tensors: Sequence[Inputs]) -> NDArray[np.void]:
    return np.array([(v.address, _CODES[v.dtype]) for tensor in tensors for v in tensor.views], _core.VIEW)


def _sweeps(settings: Sequence[Sequence[Sweep]]) -> NDArray[np.void]:
    rows = [
        (sweep.keep, sweep.elect, sweep.tie_vote, sweep.mean, sweep.divisor, sweep.lambda_, 0.0)
        for each in settings
        for sweep in each
    ]
    return np.array(rows, _core.SWEEP)


def _parts(settings: Sequence[Sequence[Sweep]]) -> NDArray[np.void]:
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
    return np.array(rows, _core.PART)


def _split(flat: NDArray[_T], sizes: Sequence[int]) -> list[NDArray[_T]]:
    return np.split(flat, np.cumsum(sizes)[:-1]) if sizes else []


@contextmanager
def _cut_inputs() -> Iterator[None]:
    try:
        yield
    except _core.InputCut:
        raise CheckpointError(CUT) from None
