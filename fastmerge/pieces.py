"""The inputs of tensors that are not all stored as they are, but gathered by a row map or computed, piece by piece.

A piece is some rows of the output, one after another. Where an input's rows are stored one after another, too, they are
read where they lie; else they are made in memory, a piece at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import memory
from .batches import Reader, inputs_of
from .checkpoint import DTYPE_BITS
from .planner import Job
from .sources.lora import Adapted, widened
from .sources.rows import MEAN, PADDING, ZERO, RowMap
from .sweep import Inputs, View

#: Of one input, made at a time: 4 MB; with a quarter of it base+adapter took 1.7 to 2 times as long.
_ROW_ELEMENTS = 1 << 20
_AT_ONCE = 1 << 20  # elements of pieces given to an op together, where they are made
_PIECES = 1024  # given to an op together
_ALIGNED = 8  # flat indices at which a part of a tensor may begin

Rows = NDArray[np.float32] | NDArray[np.float64]


class Room:
    """Memory for what is made, which is used again: the first touch of a page takes longer than what is made in it."""

    def __init__(self) -> None:
        self._free: list[Rows] = []
        self._taken: list[Rows] = []

    def take(self, shape: tuple[int, int], dtype: type[np.floating]) -> Rows:
        size = shape[0] * shape[1]
        room = next((each for each in self._free if each.size >= size), None)
        if room is None:
            room = np.empty(size, dtype)
        else:
            self._free = [each for each in self._free if each is not room]
        self._taken.append(room)
        return room[:size].reshape(shape)

    def free(self) -> None:
        """All that was taken may be taken again."""
        self._free += self._taken
        self._taken = []


class Piece(NamedTuple):
    """Some rows of all inputs, and what keeps them in memory."""

    inputs: Inputs
    owners: Sequence[object]


class Pieces:
    """The inputs of a job that gathers, in pieces whose elements follow one another."""

    def __init__(self, job: Job, reader: Reader, room: Room, threads: int = 1) -> None:
        assert job.gather is not None
        self._job, self._models, self._gather, self._sources = job, reader.models, job.gather, job.sources
        self._rows = job.shape[0] if job.shape else 1
        self._width = math.prod(job.shape[1:])
        #: Rows are pieces of a tensor where each begins at a flat index that it may; else all is made.
        self._aligned = self._width % _ALIGNED == 0
        self._dtype: type[np.floating] = np.float64 if "F64" in reader.held(job) else np.float32
        self._threads = threads
        self._padding: dict[int, Rows] = {}
        self._room = room
        self._held: list[Piece] = []
        #: How many elements there are, of which models; there are no addresses for the whole.
        self.inputs = inputs_of(job, math.prod(job.shape), [View(0, dtype) for dtype in reader.dtypes(job)])

    def batches(self) -> Iterator[list[Piece]]:
        """The pieces, as many at a time as do no harm to memory; each batch is gone when the next is asked for."""
        if self._held:
            yield self._held
            return
        batch: list[Piece] = []
        made = 0
        for piece in self:
            batch.append(piece)
            made += piece.inputs.elements if any(isinstance(each, np.ndarray) for each in piece.owners) else 0
            if made >= _AT_ONCE or len(batch) >= _PIECES:
                yield batch
                batch, made = [], 0
                self._room.free()
        if batch:
            yield batch

    def held(self) -> list[Piece]:
        """All pieces at once, which stay for whoever asks next."""
        self._held = self._held or list(self)
        return self._held

    def __iter__(self) -> Iterator[Piece]:
        bounds = self._bounds()
        counts = np.diff(bounds)
        inputs = [self._views(at, bounds[:-1], counts) for at in range(len(self._sources))]
        for first, count, *held in zip(
            bounds.tolist(), counts.tolist(), *inputs, strict=False
        ):  # the last bound is the end
            views, owners = zip(*held, strict=True)
            yield Piece(inputs_of(self._job, count * self._width, views, first * self._width), owners)

    def whole(self) -> Piece:
        """All rows as one piece, which is made."""
        made = [self._made(at, 0, self._rows) for at in range(len(self._sources))]
        views = [self._view_of(rows) for rows in made]
        return Piece(inputs_of(self._job, self.inputs.elements, views), made)

    # --- where pieces begin ---

    def _bounds(self) -> NDArray[np.int64]:
        """The rows at which pieces begin, and then the end."""
        step = max(1, _ROW_ELEMENTS // max(1, self._width))
        begins, made = np.zeros(self._rows, bool), np.zeros(self._rows, bool)
        begins[:1] = True
        if not self._aligned:
            begins[:: -(-step // _ALIGNED) * _ALIGNED] = True
            return np.append(np.flatnonzero(begins), self._rows)
        for map_, source in zip(self._gather.maps, self._sources, strict=True):
            if map_ is None:
                made |= self._computed(source.model)
            else:
                begins |= _begins(map_)
                made |= map_.model < 0
                for model in filter(self._computed, self._gather.names):
                    made |= map_.model == model
        begins[::step] |= made[::step]
        return np.append(np.flatnonzero(begins), self._rows)

    # --- the rows of one input ---

    def _views(self, at: int, firsts: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[tuple[View, object]]:
        """An input's rows of each piece, where they are stored, all of which are then of one model, or made."""
        map_, own = self._gather.maps[at], self._sources[at].model
        models = [own] * len(firsts) if map_ is None else map_.model[firsts].tolist()
        rows = firsts if map_ is None else map_.row[firsts]
        stored = {
            model: self._stored(model)
            for model in set(models)
            if self._aligned and model >= 0 and not self._computed(model)
        }
        for first, count, model, row in zip(firsts.tolist(), counts.tolist(), models, rows.tolist(), strict=True):
            if held := stored.get(model):
                yield View(held.address + row * held.pitch, held.dtype), held.owner
            else:
                made = self._made(at, first, count)
                yield self._view_of(made), made

    def _view_of(self, made: Rows) -> View:
        return View(made.ctypes.data, "F64" if self._dtype is np.float64 else "F32")

    def _made(self, at: int, first: int, count: int) -> Rows:
        made = self._room.take((count, self._width), self._dtype)
        self._make(at, first, made)
        return made

    def _make(self, at: int, first: int, out: Rows) -> None:
        map_ = self._gather.maps[at]
        if map_ is None:
            self._read(self._sources[at].model, first, out)
            return
        models, rows = map_.model[first : first + len(out)], map_.row[first : first + len(out)]
        for start, end in pairwise([*np.flatnonzero(_begins(RowMap(models, rows))).tolist(), len(out)]):
            self._fill(at, int(models[start]), rows[start:end], out[start:end])

    def _fill(self, at: int, model: int, rows: NDArray[np.int64], out: Rows) -> None:
        """Rows of one kind, or of one model, where they follow one another."""
        map_ = self._gather.maps[at]
        if model >= 0:
            self._read(model, int(rows[0]), out)
        elif model == ZERO:
            out[:] = 0
        elif model == MEAN and map_ is not None:
            for mean, row in zip(out, rows.tolist(), strict=True):
                self._mean(map_.means[row], mean)
        elif model == PADDING:
            out[:] = self._mean_of_all(at)

    def _mean(self, pairs: Sequence[tuple[int, int]], out: Rows) -> None:
        one = np.empty((1, self._width), self._dtype)
        out[:] = 0
        for model, row in pairs:
            self._read(model, row, one)
            out += one[0]
        out /= self._dtype(len(pairs))

    def _mean_of_all(self, at: int) -> Rows:
        """The mean of the rows that are no padding, which is the end of a map; summed in float64."""
        if at not in self._padding:
            map_ = self._gather.maps[at]
            assert map_ is not None
            count = int(np.count_nonzero(map_.model != PADDING))
            step = max(1, _ROW_ELEMENTS // max(1, self._width))
            some = np.empty((min(step, count), self._width), self._dtype)
            total = np.zeros(self._width, np.float64)
            for first in range(0, count, step):
                rows = some[: min(step, count - first)]
                self._make(at, first, rows)
                total += rows.sum(0, dtype=np.float64)
            self._padding[at] = (total / max(1, count)).astype(self._dtype)
        return self._padding[at]

    # --- the rows of one model ---

    def _computed(self, model: int) -> bool:
        held = self._models[model]
        return isinstance(held, Adapted) and held.computed(self._gather.names[model])

    def _stored(self, model: int) -> _Stored:
        name, held = self._gather.names[model], self._models[model]
        address, owner = held.address(name)
        dtype = held.tensors[name].dtype
        return _Stored(address, self._width * DTYPE_BITS[dtype] // 8, dtype, owner)

    def _read(self, model: int, row: int, out: Rows) -> None:
        """Rows of a model that follow one another, widened."""
        held = self._models[model]
        if isinstance(held, Adapted) and held.computed(self._gather.names[model]):
            held.fill(self._gather.names[model], row, out, self._threads)
            return
        stored = self._stored(model)
        raw = np.empty(len(out) * stored.pitch, np.uint8)
        memory.read(stored.address + row * stored.pitch, raw.data)
        out[:] = widened(raw, stored.dtype).reshape(out.shape)


class _Stored(NamedTuple):
    """A model's rows, mapped as long as their owner lives."""

    address: int
    pitch: int  # bytes from one to the next
    dtype: str
    owner: object


def _begins(map_: RowMap) -> NDArray[np.bool_]:
    """Where a row does not follow the one before it."""
    begins = np.ones(map_.size, bool)
    stored = map_.model[1:] >= 0
    begins[1:] = (map_.model[1:] != map_.model[:-1]) | (stored & (map_.row[1:] != map_.row[:-1] + 1))
    return begins
