"""The sweep: keep, elect, mean and the sum with the base, for K settings in one read.

    out_k[e] = base[e] + lambda_k * mean_i(keep(model_i[e] - base[e]) * rescale_ki * weight_ki)

Inputs [elements] of float32, float16 or bfloat16, mixed as they come, M models and at most one base; outputs [elements]
of any of these. Reads each input and writes each output once. Each operation is one IEEE float32 operation, to nearest
even: launches turn contraction off, and the bits are those of the reference.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from ..sweep import Elect, Found, Inputs, Keep, Mean, Run, Sweep, Target, TieVote
from .device import on
from .stages import (
    ADDRESSES,
    BEGIN,
    LANE,
    NOTES,
    PART,
    RESCALE,
    WARPS,
    WEIGHT,
    block_of,
    deltas_of,
    inside_of,
    keep,
    load,
    magnitude_bits,
    number,
    pointer_of,
    work_of,
)
from .tables import Piece, Table, divisor, dtypes_of, launch, launches, row, settings

_NONE = tl.constexpr(int(Elect.NONE))
_WEIGHTED = tl.constexpr(int(Elect.WEIGHTED))
_COUNT = tl.constexpr(int(Elect.COUNT))
_ZERO = tl.constexpr(int(TieVote.ZERO))
_BY_SUM = tl.constexpr(int(Mean.SUM))
_BY_WEIGHTS = tl.constexpr(int(Mean.WEIGHTS))
_BY_COUNT = tl.constexpr(int(Mean.COUNT))
_BY_CONTRIBUTORS = tl.constexpr(int(Mean.CONTRIBUTORS))

_INFINITE = tl.constexpr(0x7F800000)
#: Over the least float32 and over the largest finite.
_SMALL = tl.constexpr(2.0**-64)
#: The first of none.
_NOWHERE = tl.constexpr(int(np.iinfo(np.int64).max))


@triton.jit(do_not_specialize=["span"])
def sweep_kernel(
    words,  # a table: models, the base where there is one, outputs; then the settings
    span,
    dtypes: tl.constexpr,  # of the inputs
    outputs: tl.constexpr,  # their dtypes
    has_base: tl.constexpr,
    stages: tl.constexpr,  # per output: keep, elect, tie_vote, mean, whether the divisor is not 1
    aligned: tl.constexpr,
    looks: tl.constexpr,  # counts what is not finite and what overflows, in the notes, and writes no outputs
    block: tl.constexpr,
):
    inputs: tl.constexpr = len(dtypes)
    models: tl.constexpr = inputs - has_base
    row, first, last = work_of(words, span, block)
    begin = tl.load(row + BEGIN)
    notes = words + tl.load(row + NOTES)
    settings = row + ADDRESSES + inputs + len(outputs)
    place = tl.arange(0, block)
    for b in range(first, last):
        start = tl.cast(b, tl.int64) * block
        inside = inside_of(row, start, aligned, block)
        base, deltas = deltas_of(row, dtypes, has_base, start, place, inside, aligned)
        odd = place < 0  # a delta that is not finite, or a sum that may be too large for its output
        for m in tl.static_range(models):
            odd = odd | (magnitude_bits(deltas[m]) >= _INFINITE)
        for k in tl.static_range(len(outputs)):
            merged = _merged(
                deltas,
                settings + k * (models * PART + 2),
                begin + start,
                stages[k][0],
                stages[k][1],
                stages[k][2],
                stages[k][3],
                stages[k][4],
                models,
                block,
            )
            if has_base:
                merged = tl.where(merged == 0.0, base, base + merged)
            large = _too_large(merged, outputs[k])
            if looks:
                overflows = large & (magnitude_bits(merged) < _INFINITE) & inside
                tl.atomic_add(notes + 2 * inputs + k, tl.sum(overflows.to(tl.int64), axis=0), sem="relaxed")
            else:
                odd = odd | large
                output = pointer_of(row, inputs + k, outputs[k], start, aligned)
                tl.store(output + place, _narrowed(merged, outputs[k]), mask=inside)
        if looks:
            for i in tl.static_range(inputs):
                values = load(row, i, dtypes[i], start, place, inside, aligned)
                _note_odd(notes + i, notes + inputs + i, magnitude_bits(values) >= _INFINITE, begin + start + place)
        else:  # neighbours first, which takes no thread to wait for another; all that write, write the same
            lanes: tl.constexpr = block // LANE
            some = tl.max(tl.reshape((odd & inside).to(tl.int32), (lanes, LANE)), axis=1)
            tl.store(notes + tl.zeros((lanes,), tl.int32), 1, mask=some > 0)


@triton.jit
def _note_odd(count, first, odd, index):
    found = tl.sum(odd.to(tl.int64), axis=0)
    tl.atomic_add(count, found, mask=found > 0, sem="relaxed")
    tl.atomic_min(first, tl.min(tl.where(odd, index, _NOWHERE), axis=0), mask=found > 0, sem="relaxed")


@triton.jit
def _merged(
    deltas,
    words,
    start,
    how: tl.constexpr,
    elect: tl.constexpr,
    tie_vote: tl.constexpr,
    mean: tl.constexpr,
    divides: tl.constexpr,
    models: tl.constexpr,
    block: tl.constexpr,
):
    """lambda times the mean; the votes and the sums go from the first model to the last."""
    voices, terms = (), ()
    for m in tl.static_range(models):
        part = words + m * PART
        delta = keep(deltas[m], part, start, how, block) * number(part + RESCALE)
        weighted = delta * number(part + WEIGHT)
        terms = terms + (weighted,)  # noqa: RUF005
        voices = voices + (weighted if elect == _WEIGHTED else delta,)  # noqa: RUF005
    zero = tl.zeros((block,), tl.float32)
    mass = zero + number(words + models * PART)
    if elect == _NONE:
        total = terms[0]  # not from +0: a negative zero stays
        for m in tl.static_range(1, models):
            total = total + terms[m]
        if mean == _BY_CONTRIBUTORS:
            counted = zero
            for m in tl.static_range(models):
                counted = counted + tl.where(terms[m] == 0.0, 0.0, 1.0)
            mass = tl.where(counted == 0.0, 1.0, counted)
    else:
        vote = zero
        for m in tl.static_range(models):
            if elect == _COUNT:
                vote = vote + tl.where(voices[m] > 0.0, 1.0, tl.where(voices[m] < 0.0, -1.0, 0.0))
            else:
                vote = vote + voices[m]
        positive = vote > 0.0 if tie_vote == _ZERO else vote >= 0.0
        total, agreeing = zero, zero
        for m in tl.static_range(models):
            # zero agrees with no vote, a NaN with any, so that it is never lost
            against = tl.where(positive, voices[m] <= 0.0, voices[m] >= 0.0)
            total = total + tl.where(against, 0.0, terms[m])
            if mean == _BY_WEIGHTS:
                agreeing = agreeing + tl.where(against, 0.0, number(words + m * PART + WEIGHT))
            if mean == _BY_COUNT:
                agreeing = agreeing + tl.where(against, 0.0, 1.0)
            if mean == _BY_CONTRIBUTORS:
                agreeing = agreeing + tl.where(voices[m] == 0.0, 0.0, 1.0)
        if tie_vote == _ZERO:
            total, agreeing = tl.where(vote == 0.0, 0.0, total), tl.where(vote == 0.0, 0.0, agreeing)
        if mean != _BY_SUM:
            mass = tl.where(agreeing == 0.0, 1.0, agreeing)
    if divides:
        total = _divided(total, mass)
    return total * number(words + models * PART + 1)


@triton.jit
def _divided(total, mass):
    """total / mass, rounded once; `mass` is not zero.

    A numerator of zero, as most sums of ties and dare are, would take a card's slow way for all elements of a warp. So
    a small number is divided in its place, which is nowhere near an overflow, and what comes of it only lends its sign.
    """
    none = total == 0.0
    quotient = tl.div_rn(tl.where(none, _SMALL, total), mass)
    return tl.where(none, total * quotient, quotient)


@triton.jit
def _too_large(values, dtype: tl.constexpr):
    """Where rounding into a type of 16 bits gives infinity, or nothing finite was there before."""
    if dtype == tl.float16:
        return magnitude_bits(values) >= 0x477FF000  # 65520
    if dtype == tl.bfloat16:
        return magnitude_bits(values) >= 0x7F7F8000
    return values != values


@triton.jit
def _narrowed(values, dtype: tl.constexpr):
    """Rounded to nearest even; any NaN is the one quiet NaN without a payload, which devices spell differently."""
    bits = values.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:  # in whole numbers, as the interpreter's own conversion cuts
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(values != values, 0x7FC0, rounded).to(tl.int16)
    elif dtype == tl.float16:
        bits = tl.where(values != values, 0x7E00, values.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
    else:
        bits = tl.where(values != values, 0x7FC00000, bits)
    return bits.to(dtype, bitcast=True)


# --- the launches ---


class Job(NamedTuple):
    """A tensor, and what becomes of it."""

    inputs: Inputs
    sweeps: Sequence[Sweep]
    targets: Sequence[Target]

    @property
    def places(self) -> list[tuple[int, str]]:
        """Of the inputs and the outputs, the address and the dtype."""
        return [*self.inputs.views, *[(target.offset, target.dtype) for target in self.targets]]


def merge_all(jobs: Sequence[Job], run: Run, look: bool) -> list[Found]:
    """One launch for all tensors alike; then, if asked to look, another for those where anything was noticed."""
    with on(run) as device:
        swept = _sweep(jobs, False, device)
        if not look:
            return []
        odd = {pieces[n].tensor for pieces, table in swept for n in np.flatnonzero(table.notes()).tolist()}
        found = [
            _nothing_found(len(job.inputs.models) + (job.inputs.base is not None), len(job.targets)) for job in jobs
        ]
        for number, noticed in zip(sorted(odd), _look([jobs[n] for n in sorted(odd)], device), strict=True):
            found[number] = noticed
    return found


def _look(jobs: Sequence[Job], device: torch.device) -> list[Found]:
    """What is not finite or overflows, counted by sweeping again without writing."""
    noted = [_nothing_noted(job) for job in jobs]
    for pieces, table in _sweep(jobs, True, device):
        for piece, more in zip(pieces, np.array_split(table.notes(), len(pieces)), strict=True):
            inputs, known = len(jobs[piece.tensor].inputs.views), noted[piece.tensor]
            firsts = slice(inputs, 2 * inputs)
            noted[piece.tensor] = known + more  # the firsts wrap, and are set next
            noted[piece.tensor][firsts] = np.minimum(known[firsts], more[firsts])
    return [_found(job, each) for job, each in zip(jobs, noted, strict=True)]


def _nothing_noted(job: Job) -> NDArray[np.int64]:
    """The notes of a closer look: per input how many are not finite, then the first of them; per output, overflows."""
    inputs = len(job.inputs.views)
    return np.repeat([0, _NOWHERE.value, 0], [inputs, inputs, len(job.targets)])


@cache
def _nothing_found(inputs: int, outputs: int) -> Found:
    return Found((0,) * inputs, (-1,) * inputs, (0,) * outputs)


def _found(job: Job, notes: NDArray[np.int64]) -> Found:
    inputs = len(job.inputs.views)
    firsts = np.where(notes == _NOWHERE.value, -1, notes)[inputs : 2 * inputs]
    return Found(tuple(notes[:inputs].tolist()), tuple(firsts.tolist()), tuple(notes[2 * inputs :].tolist()))


def _sweep(jobs: Sequence[Job], looks: bool, device: torch.device) -> list[tuple[list[Piece], Table]]:
    """The launches, each with the pieces that its rows stand for."""
    places = [job.places for job in jobs]
    words = settings(sweep for job in jobs for sweep in job.sweeps)
    kinds = [_kind(job, dtypes) for job, dtypes in zip(jobs, places, strict=True)]
    swept = []
    for like, aligned, pieces in launches(places, [job.inputs.elements for job in jobs], kinds):
        notes = _nothing_noted(jobs[like]).tolist() if looks else [0]
        rows = []
        for n, piece in enumerate(pieces):
            inputs, sweeps, _ = jobs[piece.tensor]
            more = words[id(sweeps[0])] if len(sweeps) == 1 else [word for each in sweeps for word in words[id(each)]]
            rows.append(row(piece, inputs.begin, n * len(notes), places[piece.tensor], more))
        inputs = jobs[like].inputs
        block = block_of(len(inputs.views))
        table = Table(rows, notes * len(pieces), block, device)
        choices = {
            "dtypes": dtypes_of(inputs.views),
            "outputs": dtypes_of(jobs[like].targets),
            "has_base": inputs.base is not None,
            "stages": stages_of(jobs[like].sweeps),
            "aligned": aligned,
            "looks": looks,
            "block": block,
        }
        launch(sweep_kernel, table.programs, (table.words, table.span), WARPS, choices)
        swept.append((pieces, table))
    return swept


def _kind(job: Job, places: Sequence[tuple[int, str]]) -> Hashable:
    """What the kernel is compiled for."""
    return tuple([dtype for _, dtype in places]), job.inputs.base is None, stages_of(job.sweeps)


def stages_of(sweeps: Sequence[Sweep]) -> tuple[tuple[int, ...], ...]:
    """The choices of a kernel, per output."""
    return tuple([_stages(each.keep, each.elect, each.tie_vote, each.mean, divisor(each) != 1.0) for each in sweeps])


@cache
def _stages(keep: Keep, elect: Elect, tie_vote: TieVote, mean: Mean, divides: bool) -> tuple[int, ...]:
    by = mean if elect or mean is Mean.CONTRIBUTORS else Mean.SUM
    return int(keep), int(elect), int(tie_vote), int(by), int(by is not Mean.SUM or divides)
