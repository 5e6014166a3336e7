"""The exact k-th magnitude of each model's delta, and where equals to it stop being kept; `search` says how.

d is model - base, or the model, in float32; a NaN counts as 0. Inputs [elements] of float32, float16 or bfloat16. After
a sample each of them is read once where the deltas are discrete, as those of 16-bit weights are, and twice elsewhere;
then once more where only some of the equals stay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..sweep import EVERY, Cut, Inputs, Run, View
from .device import on
from .search import BINS, GUESSES, Search
from .stages import ADDRESSES, BEGIN, LANE, deltas_of, inside_of, magnitude_bits, work_of
from .tables import Piece, Table, dtypes_of, launch, launches, most_programs, row, upload

_BINS = tl.constexpr(BINS)
_GUESSES = tl.constexpr(GUESSES)
#: A sample is runs of neighbours evenly apart.
_RUN = tl.constexpr(16)


@triton.jit(do_not_specialize=["span", "samples"])
def sample_kernel(
    words,  # a table of samples: models, then the base; then elements, index of the first, stride, row of `sampled`
    sampled,  # int32 [searches, samples]
    span,
    samples,
    dtypes: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    row, first, last = work_of(words, span, block)
    more = row + ADDRESSES + len(dtypes)
    elements, begin, stride = tl.load(more), tl.load(more + 1), tl.load(more + 2)
    sampled += tl.load(more + 3) * samples
    for b in range(first, last):
        start = tl.cast(b, tl.int64) * block
        sample = tl.load(row + BEGIN) + start + tl.arange(0, block)
        place = sample // _RUN * stride + sample % _RUN - begin
        inside = inside_of(row, start, aligned, block) & (place >= 0) & (place < elements) & (sample < samples)
        _base, deltas = deltas_of(row, dtypes, has_base, 0, place, inside, aligned)
        for m in tl.static_range(len(deltas)):
            tl.store(sampled + m * samples + sample, _selectable(deltas[m]), mask=inside)


@triton.jit(do_not_specialize=["span"])
def tally_kernel(
    words,  # a table: models, then the base; then the guesses of each model
    tallies,  # int32 [programs, M, GUESSES, 2]: above each guess, equal to it
    span,
    dtypes: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    models: tl.constexpr = len(dtypes) - has_base
    row, first, last = work_of(words, span, block)
    guesses = row + ADDRESSES + len(dtypes)
    place = tl.arange(0, block)
    totals = ()
    for _each in tl.static_range(2 * models * _GUESSES):
        totals = totals + (tl.zeros((block // LANE,), tl.int32),)  # noqa: RUF005  the compiler knows tuples by their sum
    for b in range(first, last):
        start = tl.cast(b, tl.int64) * block
        inside = inside_of(row, start, aligned, block)
        _base, deltas = deltas_of(row, dtypes, has_base, start, place, inside, aligned)
        more = ()
        for m in tl.static_range(models):
            bits = tl.where(inside, _selectable(deltas[m]), -1)
            for g in tl.static_range(_GUESSES):
                guess = tl.load(guesses + m * _GUESSES + g).to(tl.int32)
                above, equal = totals[2 * (m * _GUESSES + g)], totals[2 * (m * _GUESSES + g) + 1]
                more = more + (above + _per_lane(bits > guess), equal + _per_lane(bits == guess))  # noqa: RUF005
        totals = more
    tallies += tl.program_id(0).to(tl.int64) * (2 * models * _GUESSES)
    for i in tl.static_range(2 * models * _GUESSES):
        tl.store(tallies + i, tl.sum(totals[i], axis=0))


@triton.jit(do_not_specialize=["span"])
def census_kernel(
    words,  # a table: models, then the base; then the row of `counts`, and low, high and shift of each model
    counts,  # int64 [searches, BINS + 1]: the bins of a bracket, what lies above it
    span,
    dtypes: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    models: tl.constexpr = len(dtypes) - has_base
    row, first, last = work_of(words, span, block)
    brackets = row + ADDRESSES + len(dtypes)
    counts += tl.load(brackets) * (_BINS + 1)
    place = tl.arange(0, block)
    bins, above = (), ()
    for _each in tl.static_range(models):
        bins = bins + (tl.zeros((_BINS,), tl.int32),)  # noqa: RUF005
        above = above + (tl.zeros((block // LANE,), tl.int32),)  # noqa: RUF005
    for b in range(first, last):
        start = tl.cast(b, tl.int64) * block
        inside = inside_of(row, start, aligned, block)
        _base, deltas = deltas_of(row, dtypes, has_base, start, place, inside, aligned)
        more, higher = (), ()
        for m in tl.static_range(models):
            low = tl.load(brackets + 1 + 3 * m).to(tl.int32)
            high = tl.load(brackets + 2 + 3 * m).to(tl.int32)
            shift = tl.load(brackets + 3 + 3 * m).to(tl.int32)
            bits = tl.where(inside, _selectable(deltas[m]), -1)
            within = (bits >= low) & (bits <= high)
            digit = tl.where(within, (bits - low) >> shift, 0)
            more = more + (bins[m] + tl.histogram(digit, _BINS, mask=within),)  # noqa: RUF005
            higher = higher + (above[m] + _per_lane(bits > high),)  # noqa: RUF005
        bins, above = more, higher
    for m in tl.static_range(models):
        to = counts + m * (_BINS + 1)
        tl.atomic_add(to + tl.arange(0, _BINS), bins[m].to(tl.int64), mask=bins[m] > 0, sem="relaxed")
        tl.atomic_add(to + _BINS, tl.sum(above[m], axis=0).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["span"])
def place_kernel(
    words,  # a table, a program for each row: one model, then the base; then a magnitude, and which equal is looked for
    ends,  # int64 [rows]: one past its flat index
    span,
    dtypes: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    row, first, last = work_of(words, span, block)
    more = row + ADDRESSES + len(dtypes)
    magnitude, wanted = tl.load(more).to(tl.int32), tl.load(more + 1).to(tl.int32)
    place = tl.arange(0, block)
    end, seen = tl.load(row + BEGIN), 0
    for b in range(first, last):
        start = tl.cast(b, tl.int64) * block
        inside = inside_of(row, start, aligned, block)
        _base, deltas = deltas_of(row, dtypes, has_base, start, place, inside, aligned)
        equal = (inside & (_selectable(deltas[0]) == magnitude)).to(tl.int32)
        here = (equal > 0) & (seen + tl.cumsum(equal, axis=0) == wanted)
        index = tl.load(row + BEGIN) + start + place + 1
        end = tl.maximum(end, tl.max(tl.where(here, index, 0), axis=0))
        seen += tl.sum(equal, axis=0)
    tl.store(ends + tl.program_id(0), end)


@triton.jit
def _selectable(delta):
    return magnitude_bits(tl.where(delta != delta, 0.0, delta))


@triton.jit
def _per_lane(chosen):
    """How many of neighbours, for which no thread waits for another."""
    shape: tl.constexpr = (chosen.shape[0] // LANE, LANE)
    return tl.sum(tl.reshape(chosen.to(tl.int32), shape), axis=1)


#: Elements of a block. Not yet measured on a card.
BLOCK = 2048
WARPS = 8
#: No magnitude is this large.
_NO_GUESS = 0x7FFFFFFF
#: Samples of a search, and of all searches together, for which there is room.
_SAMPLES, _ALL_SAMPLES = 1 << 14, 1 << 22


class _Group:
    """Tensors laid end to end, and what is looked for in them."""

    def __init__(self, tensors: Sequence[Inputs], ranks: Sequence[int]) -> None:
        self.tensors, self._ranks = tensors, ranks
        self.elements = sum(inputs.elements for inputs in tensors)
        self.searches = {m: Search(k, self.elements) for m, k in enumerate(ranks) if 0 < k < self.elements}
        self.ends = dict.fromkeys(self.searches, EVERY)

    def cuts(self) -> tuple[Cut, ...]:
        found = {m: float(np.uint32(search.magnitude).view(np.float32)) for m, search in self.searches.items()}
        return tuple(
            Cut(found[m], self.ends[m]) if m in found else Cut(0.0, EVERY) if k > 0 else Cut(float("inf"), 0)
            for m, k in enumerate(self._ranks)
        )


class _Asked(NamedTuple):
    """A model of a group whose magnitude is looked for."""

    group: _Group
    model: int

    @property
    def search(self) -> Search:
        return self.group.searches[self.model]


class _Reading(NamedTuple):
    """A tensor of a group, and what is read of it."""

    asked: list[_Asked]
    number: int  # of the first of these, among all that are asked for
    views: list[View]  # of these models, then of the base
    elements: int
    begin: int  # in the group
    has_base: bool

    @property
    def kind(self) -> Hashable:
        return tuple(view.dtype for view in self.views), self.has_base


class _Span(NamedTuple):
    """How often each guess at a model's magnitude occurs in each program's part of a piece."""

    reading: _Reading
    model: int  # of those read
    piece: Piece
    elements: int  # of a program
    equals: NDArray[np.int32]  # [programs, GUESSES]


class _Split(NamedTuple):
    """Where the last equal that stays is known to be, and the row to find it by."""

    asked: _Asked
    views: list[View]  # of the model, then of the base
    row: list[int]

    @property
    def has_base(self) -> bool:
        return len(self.views) > 1


def select_all(groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> list[tuple[Cut, ...]]:
    """The cut of each model, over the tensors of each group laid end to end."""
    searched = [_Group(*each) for each in zip(groups, ranks, strict=True)]
    searches = [search for group in searched for search in group.searches.values()]
    with on(run) as device:
        _sample(searched, device)
        splits: list[_Split] = []
        while not all(search.found for search in searches):
            splits += _tally(searched, device)
            _take_census(searched, device)
        _place(splits, device)
    return [group.cuts() for group in searched]


def scratch_bytes(tensors: int, elements: int, settings: int, ranks: int) -> int:
    """Of the samples and of sorting them, of the tallies and of a census: no fewer than there are."""
    asked = tensors * settings * ranks
    if not asked:
        return 0
    sorting = 4 + 2 * (4 + 8)  # values, then twice their order
    programs = most_programs(tensors * settings, elements * settings, BLOCK)
    return asked * (_samples(asked, elements) * sorting + (BINS + 1) * 8) + programs * ranks * GUESSES * 8


def _samples(asked: int, elements: int) -> int:
    """Of each of so many searches, the largest of which is among so many elements: a power of two."""
    room = min(_SAMPLES, max(1 << 10, 1 << (_ALL_SAMPLES // asked).bit_length() - 1))
    return min(room, max(_RUN.value, 1 << (elements - 1).bit_length()))


def _sample(groups: Sequence[_Group], device: torch.device) -> None:
    """Bracket every search."""
    readings, asked = _readings(groups, lambda _: True)
    if not asked:
        return
    room = _samples(len(asked), max(each.group.elements for each in asked))
    sampled = torch.full((len(asked), room), -1, dtype=torch.int32, device=device)
    rows: dict[Hashable, list[list[int]]] = {}
    for reading in readings:
        stride = max(_RUN.value, reading.asked[0].group.elements // (room // _RUN.value))
        first, last = reading.begin // stride, (reading.begin + reading.elements - 1) // stride
        runs = Piece(0, 0, (last + 1 - first) * _RUN.value)
        more = (reading.elements, reading.begin, stride, reading.number)
        rows.setdefault(reading.kind, []).append(row(runs, first * _RUN.value, 0, reading.views, more))
    like = {reading.kind: reading for reading in readings}
    for kind, each in rows.items():
        _launch(sample_kernel, Table(each, [], BLOCK, device), sampled, like[kind], False, room)
    taken = [min(each.group.elements, room) for each in asked]
    places = np.stack([each.search.places(samples) for each, samples in zip(asked, taken, strict=True)])
    ordered = sampled.sort(dim=1, descending=True).values.gather(1, upload(places, device)).cpu().numpy()
    for each, at, values, samples in zip(asked, places, ordered, taken, strict=True):
        each.search.expect(at, values, samples)


def _tally(groups: Sequence[_Group], device: torch.device) -> list[_Split]:
    """Count the guesses of all searches that have any; returns where only some of the equals stay."""
    readings, asked = _readings(groups, lambda search: bool(search.guesses))

    def guesses(reading: _Reading) -> list[int]:
        return [word for each in reading.asked for word in (each.search.guesses + [_NO_GUESS] * GUESSES)[:GUESSES]]

    launched = []
    for pieces, like, aligned, table in _tables(readings, guesses, device):
        shape = (table.programs, len(like.asked), GUESSES, 2)
        tallies = torch.empty(shape, dtype=torch.int32, device=device)
        _launch(tally_kernel, table, tallies, like, aligned)
        launched.append((pieces, table, tallies))
    totals = np.zeros((len(asked), GUESSES, 2), np.int64)
    spans: list[list[_Span]] = [[] for _ in asked]
    for pieces, table, tallies in launched:
        for piece, counts in zip(pieces, np.split(tallies.cpu().numpy(), table.firsts[1:]), strict=True):
            reading = readings[piece.tensor]
            for m in range(len(reading.asked)):
                totals[reading.number + m] += counts[:, m].sum(axis=0, dtype=np.int64)
                spans[reading.number + m].append(_Span(reading, m, piece, table.span * BLOCK, counts[:, m, :, 1]))
    splits = []
    for each, total, parts in zip(asked, totals, spans, strict=True):
        each.search.tallied(total[:, 0].tolist(), total[:, 1].tolist())
        if each.search.found and each.search.wanted < each.search.equals:
            splits.append(_split(each, parts))
    return splits


def _take_census(groups: Sequence[_Group], device: torch.device) -> None:
    """Count what the brackets of all other searches hold."""
    readings, asked = _readings(groups, lambda search: not search.guesses)
    counts = torch.zeros((len(asked), BINS + 1), dtype=torch.int64, device=device)

    def brackets(reading: _Reading) -> list[int]:
        searches = [each.search for each in reading.asked]
        return [reading.number, *(word for search in searches for word in (search.low, search.high, search.shift))]

    for _, like, aligned, table in _tables(readings, brackets, device):
        _launch(census_kernel, table, counts, like, aligned)
    for each, found in zip(asked, counts.cpu().numpy(), strict=True):
        each.search.counted(int(found[BINS]), found[:BINS])


def _split(asked: _Asked, spans: list[_Span]) -> _Split:
    """The program that met the last equal that stays, and which it was there."""
    left = asked.search.wanted
    for span in sorted(spans, key=lambda span: span.reading.begin + span.piece.start):
        reached = span.equals[:, asked.search.guess].cumsum(dtype=np.int64)
        if left <= reached[-1]:
            break
        left -= int(reached[-1])
    program = int(np.searchsorted(reached, left))
    left -= int(reached[program - 1]) if program else 0
    reading, start = span.reading, program * span.elements
    piece = Piece(0, span.piece.start + start, min(span.elements, span.piece.count - start))
    views = [reading.views[span.model], *reading.views[len(reading.asked) :]]
    return _Split(asked, views, row(piece, reading.begin, 0, views, (asked.search.magnitude, left)))


def _place(splits: Sequence[_Split], device: torch.device) -> None:
    """Find the equals that are the last to stay."""
    alike: dict[Hashable, list[_Split]] = {}
    for split in splits:
        alike.setdefault(tuple(view.dtype for view in split.views), []).append(split)
    launched = []
    for each in alike.values():
        table = Table([split.row for split in each], [], BLOCK, device, max(split.row[0] for split in each))
        ends = torch.empty(len(each), dtype=torch.int64, device=device)
        _launch(place_kernel, table, ends, each[0], False)
        launched.append((each, ends))
    for each, ends in launched:
        for split, end in zip(each, ends.tolist(), strict=True):
            split.asked.group.ends[split.asked.model] = end


def _readings(groups: Sequence[_Group], wanted: Callable[[Search], bool]) -> tuple[list[_Reading], list[_Asked]]:
    """What is read for the searches that are wanted and not yet done, and these searches."""
    readings: list[_Reading] = []
    asked: list[_Asked] = []
    for group in groups:
        here = [_Asked(group, m) for m, search in group.searches.items() if not search.found and wanted(search)]
        begin = 0
        for inputs in group.tensors if here else ():
            views = [*(inputs.models[each.model] for each in here), *inputs.views[len(inputs.models) :]]
            if inputs.elements:
                readings.append(_Reading(here, len(asked), views, inputs.elements, begin, inputs.base is not None))
            begin += inputs.elements
        asked += here
    return readings, asked


def _tables(
    readings: Sequence[_Reading], more: Callable[[_Reading], list[int]], device: torch.device
) -> Iterator[tuple[list[Piece], _Reading, bool, Table]]:
    """For each launch: what it takes, a reading like all of it, whether 16 bytes can be read at a time, its table."""
    kinds = [reading.kind for reading in readings]
    views, elements = [reading.views for reading in readings], [reading.elements for reading in readings]
    for like, aligned, pieces in launches(views, elements, kinds):
        taken = [(piece, readings[piece.tensor]) for piece in pieces]
        rows = [row(piece, reading.begin, 0, reading.views, more(reading)) for piece, reading in taken]
        yield pieces, readings[like], aligned, Table(rows, [], BLOCK, device)


def _launch(
    kernel: triton.JITFunction[Any], table: Table, written: Tensor, like: _Reading | _Split, aligned: bool, *more: int
) -> None:
    choices = {"dtypes": dtypes_of(like.views), "has_base": like.has_base, "aligned": aligned, "block": BLOCK}
    launch(kernel, table.programs, (table.words, written, table.span, *more), WARPS, choices)
