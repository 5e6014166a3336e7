"""Jobs through GPUs: disk, pinned memory, device, pinned memory, disk, in lanes that overlap.

A lane is a thread with a stream, a block of pinned memory and a block of device memory of one size and layout: inputs,
then outputs, each at a multiple of 256 bytes. It takes a piece of work from a queue that the lanes of all GPUs share,
reads the inputs into pinned memory, uploads them in one copy, measures and sweeps, downloads the outputs in one copy
and writes them to their places. A few lanes per GPU keep the disk, both directions of the bus and the kernels busy at
the same time, and no lane waits for another.

A tensor too large for a lane goes through in tiles, which any lane may take; what its method wants to know first is
measured by the CPU on the mapped file. Bytes that are only copied never see a GPU. Where kvikio is installed, inputs go
from the disk to an NVIDIA GPU past the memory of the host.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import NamedTuple

from . import backends, gds, memory
from .batches import BATCH_BYTES, BATCH_JOBS, BATCH_ROWS, Batch, Reader, in_batches, inputs_of, joined, row_of
from .checkpoint import Writer
from .checkpoint.header import open_regular
from .errors import BackendError
from .measures import Cuts, measured, swept
from .methods import ranks
from .planner import Job, Stage
from .sweep import SWEPT, Found, Run, Sweep, Target, View

#: Per GPU: one reads, one uploads, one sweeps, one downloads or writes. Not yet measured on a card.
LANES = 4
#: Bytes of a lane's block, below which a GPU is given up.
SMALLEST = 1 << 20
_MEMORY = 8_000_000_000
_ALIGNED = 256
_AT_ONCE = 1 << 24  # bytes moved between two looks at whether to stop
_LOOK_SECONDS = 0.05
_TIMED_BYTES = 1 << 26


class Block(NamedTuple):
    """Memory of a device and pinned memory of the host, of one size, and a stream of their own."""

    device: int
    pinned: int
    stream: int


@contextmanager
def block(device: backends.Device, nbytes: int) -> Iterator[Block]:
    """Raises MemoryError where the device or the host has not enough."""
    with ExitStack() as undo:
        on_device = device.allocate(nbytes)
        undo.callback(device.release, on_device)
        pinned = device.pin(nbytes)
        undo.callback(device.unpin, pinned)
        stream = device.stream()
        undo.callback(device.close, stream)
        undo.callback(device.synchronize, stream)  # where an error left copies under way
        yield Block(on_device, pinned, stream)


def bus_rate(device: backends.Device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second between pinned memory and a GPU, in the slower direction; MemoryError where it is full."""
    rates = []
    with block(device, _TIMED_BYTES) as (on_device, pinned, stream):
        for copy, to, source in ((device.upload, on_device, pinned), (device.download, pinned, on_device)):
            for _ in range(2):  # the first touches pages and wakes the bus
                started = clock()
                copy(to, source, _TIMED_BYTES, stream)
                device.synchronize(stream)
                seconds = clock() - started
            rates.append(_TIMED_BYTES / max(seconds, 1e-9))
    return min(rates)


@dataclass(frozen=True)
class Streamer:
    """The way of a stage's jobs through GPUs.

    `gpu_memory` bounds what all lanes of a GPU take, pinned and of the device together: their blocks, and the tables
    and scratch memory of the ops. By default it is 8 GB, or what the GPU has free where that is less. A lane has its
    share of that, and no more than the largest job or a batch needs. Where memory runs out, all make do with half.
    """

    stage: Stage
    reader: Reader
    writers: Sequence[Writer]  # one per variant of the stage
    cuts: Cuts
    ops: backends.Ops
    devices: Sequence[backends.Device]
    worked: backends.Worked
    gpu_memory: int | None
    run: Run  # of this thread: its tick, and the threads of what the CPU measures

    def takes(self, job: Job) -> bool:
        """Whether a job can go this way."""
        if job.gather is not None:
            return False
        return self.reader.raw(job) or (not job.direct and self.ops.dtypes.issuperset(self.reader.dtypes(job)))

    def swept(self, jobs: Sequence[Job]) -> Generator[tuple[Job, Found], None, None]:
        """Does the jobs, and tells of each when its output is written. To be closed, which stops all lanes.

        Raises:
            BackendError: a GPU has too little memory.
            CheckpointError: an input was cut while it was read.
            OSError: an output could not be written.
        """
        traffic = _Traffic()
        with ExitStack() as opened:
            for number in range(len(self.devices)):
                self.ops.release_scratch(Run(device=number))  # of earlier merges
                opened.callback(self.ops.release_scratch, Run(device=number))
            lanes, nbytes = self._open(jobs, traffic, opened)
            threads = [threading.Thread(target=lane.work, daemon=True) for lane in lanes]
            try:
                for thread in threads:
                    thread.start()
                yield from self._results(jobs, nbytes, traffic)
            finally:
                traffic.stop.set()
                for _ in threads:
                    traffic.pieces.put(None)
                for thread in threads:
                    if thread.ident:
                        thread.join()

    def _open(self, jobs: Sequence[Job], traffic: _Traffic, opened: ExitStack) -> tuple[list[_Lane], int]:
        """The lanes of all GPUs, with blocks of as many bytes as there is memory for."""
        nbytes = self._block_bytes(jobs)
        while nbytes >= SMALLEST:
            with ExitStack() as undo, suppress(MemoryError):
                lanes = [
                    _Lane(self, traffic, device, number, undo.enter_context(block(device, nbytes)), nbytes)
                    for number, device in enumerate(self.devices)
                    for _ in range(LANES)
                ]
                opened.push(undo.pop_all())
                return lanes, nbytes
            nbytes = nbytes // 2 // _ALIGNED * _ALIGNED
        raise BackendError(
            f"{self.devices[0].name} needs {LANES * (2 * SMALLEST + self._scratch_bytes(jobs)(SMALLEST)):,} bytes to "
            "merge, about half of them its own and half in the memory of the host: free some, pass more as "
            "--gpu-memory, or merge with --backend cpu"
        )

    def _block_bytes(self, jobs: Sequence[Job]) -> int:
        """Of a lane's blocks, which with the scratch memory of an op take no more than the lane's share."""
        sizes = [_room(job, self.reader) for job in jobs]
        useful = max(max(sizes), min(BATCH_BYTES, sum(sizes) // (LANES * len(self.devices))), SMALLEST)
        bound = self.gpu_memory or min(_MEMORY, *(device.free_bytes() for device in self.devices))
        share, scratch = bound // LANES, self._scratch_bytes(jobs)
        nbytes = min(share // 2 // _ALIGNED * _ALIGNED, _aligned(useful))
        while nbytes >= SMALLEST and (beside := scratch(nbytes)) > share - 2 * nbytes:
            nbytes = max((share - beside) // 2, nbytes // 2) // _ALIGNED * _ALIGNED
        return nbytes

    def _scratch_bytes(self, jobs: Sequence[Job]) -> Callable[[int], int]:
        """What an op takes at most, on the largest GPU, for what lies in blocks of so many bytes."""
        mine = [(job, _held(job, self.reader)) for job in jobs if not self.reader.raw(job)]
        if not mine:
            return lambda nbytes: 0
        pitches = [sum(SWEPT[dtype] for dtype in held) for _, held in mine]
        least = _ALIGNED * min(len(held) for _, held in mine)  # of a tensor
        rows = [
            (row, pitch, self.reader.elements(job))
            for (job, _), pitch in zip(mine, pitches, strict=True)
            if (row := row_of(job))
        ]
        models = max(len(job.inputs) for job, _ in mine)
        settings = max(len(job.variants) for job, _ in mine)
        wanted = max(len(ranks(each, 1)) if job.method.selects else 0 for job, _ in mine for each in job.variants)

        def scratch(nbytes: int) -> int:
            whole = min(len(mine), BATCH_JOBS, nbytes // least)
            tensors = max([whole, *(min(count, nbytes // pitch) // row for row, pitch, count in rows)])
            runs = (Run(device=number) for number in range(len(self.devices)))
            asked = min(tensors, max(BATCH_JOBS, BATCH_ROWS)), nbytes // min(pitches), models, settings, wanted
            return max(self.ops.scratch_bytes(*asked, run) for run in runs)

        return scratch

    def _results(self, jobs: Sequence[Job], nbytes: int, traffic: _Traffic) -> Iterator[tuple[Job, Found]]:
        small = [job for job in jobs if _room(job, self.reader) <= nbytes]
        for raw in (False, True):
            mine = [job for job in small if self.reader.raw(job) is raw]
            for batch in in_batches(self.stage, mine, lambda job: _room(job, self.reader), min(nbytes, BATCH_BYTES)):
                traffic.send(_Piece(batch, raw))
        for job in jobs:
            if _room(job, self.reader) > nbytes:
                for piece in self._tiles(job, nbytes):
                    traffic.send(piece)
                yield from self._received(traffic, wait=False)
        yield from self._received(traffic, wait=True)

    def _tiles(self, job: Job, nbytes: int) -> Iterator[_Piece]:
        """The pieces of a job too large for a lane, after what its method wants to know, unless that is of each row."""
        sweeps: list[Sweep] = []
        raw, row = self.reader.raw(job), row_of(job)
        if not raw and not row:
            on_cpu = backends.Ops("auto", self.reader.dtypes(job), "cpu", self.worked)
            (sweeps,) = measured(self.reader.mapped([job]), on_cpu, self.cuts, self.run)
        sizes = [SWEPT[dtype] for dtype in _held(job, self.reader)]
        unit = row or 8
        step = (nbytes - _ALIGNED * len(sizes)) // sum(sizes) // unit * unit
        if step <= 0:
            raise BackendError(
                f"tensor {job.name!r} has {len(job.sources):,} inputs, for which {nbytes:,} bytes are too little: "
                "pass more as --gpu-memory, or merge with --backend cpu"
            )
        count = self.reader.elements(job)
        for begin in range(0, count, step):
            yield _Piece([job], raw, sweeps, begin, min(step, count - begin))

    def _received(self, traffic: _Traffic, wait: bool) -> Iterator[tuple[Job, Found]]:
        """The jobs that are done; with `wait` until all are, looking up now and then for whoever wants to stop."""
        while traffic.pending:
            try:
                done = traffic.results.get(wait, _LOOK_SECONDS)
            except queue.Empty:
                if not wait:
                    return
                self._tick(0)
                continue
            if isinstance(done, BaseException):
                raise done
            traffic.pending -= 1
            self._tick(self._bytes_done(done.piece))
            for job, found in zip(done.piece.jobs, done.found, strict=True):
                if whole := traffic.joined(job, found, done.piece, self.reader.elements(job)):
                    yield job, whole

    def _tick(self, read: int) -> None:
        if self.run.tick:
            self.run.tick(read)

    def _bytes_done(self, piece: _Piece) -> int:
        """As progress counts them: each look at the inputs, though a GPU reads them once; those of the CPU it knows."""
        if piece.elements is not None:
            return sum(move.nbytes for move in chain(*_Layout.of(piece, self.reader).reads))
        return sum(job.nbytes * (job.passes - (job.name in self.cuts)) for job in piece.jobs)


class _Piece(NamedTuple):
    """What a lane does at a time: whole jobs, or a tile of one whose sweeps are known."""

    jobs: list[Job]
    raw: bool  # each of them
    sweeps: Sequence[Sweep] = ()
    begin: int = 0
    elements: int | None = None


class _Done(NamedTuple):
    piece: _Piece
    found: list[Found]


@dataclass
class _Traffic:
    """What goes between the lanes and the engine's thread, which alone sends pieces and receives results."""

    pieces: queue.SimpleQueue[_Piece | None] = field(default_factory=queue.SimpleQueue)
    results: queue.SimpleQueue[_Done | BaseException] = field(default_factory=queue.SimpleQueue)
    stop: threading.Event = field(default_factory=threading.Event)
    pending: int = 0
    _tiles: dict[str, tuple[int, list[Found]]] = field(default_factory=dict)

    def send(self, piece: _Piece) -> None:
        self.pending += 1
        self.pieces.put(piece)

    def joined(self, job: Job, found: Found, piece: _Piece, count: int) -> Found | None:
        """What was found in a whole job, once its last tile is there."""
        if piece.elements is None:
            return found
        done, others = self._tiles.pop(job.name, (0, []))
        done, others = done + piece.elements, [*others, found]
        if done < count:
            self._tiles[job.name] = done, others
            return None
        return joined(others)


class _Move(NamedTuple):
    """Bytes between a file and a place in a lane's block."""

    name: str  # the file of an input, or the tensor of an output
    offset: int  # in that
    at: int
    nbytes: int


class _Layout(NamedTuple):
    """Where the inputs and the outputs of each job of a piece lie in a block."""

    reads: list[list[_Move]]
    writes: list[list[_Move]]  # one per variant
    outputs: int  # where they begin; a raw piece has none, and is written as it was read
    end: int

    @staticmethod
    def of(piece: _Piece, reader: Reader) -> _Layout:
        at = 0

        def move(name: str, start: int, count: int, dtype: str) -> _Move:
            nonlocal at
            moved = _Move(name, start + piece.begin * SWEPT[dtype], at, count * SWEPT[dtype])
            at += _aligned(moved.nbytes)
            return moved

        counts = [reader.elements(job) if piece.elements is None else piece.elements for job in piece.jobs]
        reads: list[list[_Move]] = []
        for job, count in zip(piece.jobs, counts, strict=True):
            places = zip(reader.places(job), reader.dtypes(job), strict=False)  # the last dtype is the output's
            reads.append([move(str(file), start, count, dtype) for (file, start), dtype in places])
        if piece.raw:
            writes = [
                [_Move(job.name, piece.begin, read.at, read.nbytes)] * len(job.variants)
                for job, (read,) in zip(piece.jobs, reads, strict=True)
            ]
            return _Layout(reads, writes, at, at)
        outputs = at
        writes = [
            [move(job.name, 0, count, job.dtype) for _ in job.variants]
            for job, count in zip(piece.jobs, counts, strict=True)
        ]
        return _Layout(reads, writes, outputs, at)


class _StopError(Exception):
    """The others go no further, so neither does this lane."""


class _Lane:
    """One thread's way through the pieces."""

    def __init__(
        self, streamer: Streamer, traffic: _Traffic, device: backends.Device, number: int, block: Block, nbytes: int
    ) -> None:
        self._streamer = streamer
        self._traffic = traffic
        self._device = device
        self._block = block
        self._pinned = memory.view(block.pinned, nbytes)
        self._direct = device.is_cuda and gds.installed()
        self._run = Run(device=number, stream=block.stream)

    def work(self) -> None:
        try:
            while piece := self._traffic.pieces.get():
                self._traffic.results.put(_Done(piece, self._done(piece)))
        except _StopError:
            pass
        except MemoryError:
            self._traffic.results.put(
                BackendError(
                    f"{self._device.name} ran out of memory while it merged: pass less as --gpu-memory, which leaves "
                    "the rest to the ops, or merge with --backend cpu"
                )
            )
        except BaseException as error:
            self._traffic.results.put(error)

    def _done(self, piece: _Piece) -> list[Found]:
        layout = _Layout.of(piece, self._streamer.reader)
        moves = list(chain(*layout.reads))
        if self._direct and not piece.raw:
            self._read_directly(moves)
        else:
            self._read(moves)
        copied = [Found((0,), (-1,), (0,) * len(job.variants)) for job in piece.jobs]
        found = copied if piece.raw else self._swept(piece, layout)
        for moves in layout.writes:
            self._write(moves)
        if piece.elements is None:
            for writer in self._streamer.writers:
                writer.written(job.name for job in piece.jobs)
        return found

    def _swept(self, piece: _Piece, layout: _Layout) -> list[Found]:
        """Over the bus, through the ops, and back."""
        on_device, pinned, stream = self._block
        if not self._direct:
            self._device.upload(on_device, pinned, layout.outputs, stream)
        inputs = []
        for job, moves in zip(piece.jobs, layout.reads, strict=True):
            dtypes = self._streamer.reader.dtypes(job)
            views = [View(on_device + move.at, dtype) for move, dtype in zip(moves, dtypes, strict=False)]
            count = moves[0].nbytes // SWEPT[dtypes[0]]
            inputs.append(inputs_of(job, count, views, piece.begin))
        targets = [
            [Target(job.dtype, on_device + move.at) for move in moves]
            for job, moves in zip(piece.jobs, layout.writes, strict=True)
        ]
        if piece.sweeps:
            found = self._streamer.ops.merge(inputs, [piece.sweeps], targets, self._run)
        else:
            batch = Batch(piece.jobs, inputs, [])
            found = swept(batch, self._streamer.ops, self._streamer.cuts, targets, self._run)
        nbytes = layout.end - layout.outputs
        self._device.download(pinned + layout.outputs, on_device + layout.outputs, nbytes, stream)
        self._device.synchronize(stream)
        return found

    def _read(self, moves: list[_Move]) -> None:
        for file, mine in groupby(sorted(moves), key=lambda move: move.name):
            with open_regular(file) as opened:
                for _, offset, at, nbytes in mine:
                    for begin, end in self._steps(nbytes):
                        memory.load(opened.fileno(), offset + begin, self._pinned[at + begin : at + end])

    def _read_directly(self, moves: list[_Move]) -> None:
        """Past the memory of the host."""
        for file, mine in groupby(sorted(moves), key=lambda move: move.name):
            with open_regular(file), gds.reading(file) as load:
                for _, offset, at, nbytes in mine:
                    for begin, end in self._steps(nbytes):
                        load(offset + begin, self._block.device + at + begin, end - begin)

    def _write(self, moves: list[_Move]) -> None:
        for writer, (name, offset, at, nbytes) in zip(self._streamer.writers, moves, strict=True):
            file, start = writer.target(name)  # open as long as it is referenced
            for begin, end in self._steps(nbytes):
                memory.write(self._pinned[at + begin : at + end], start + offset + begin, file)

    def _steps(self, nbytes: int) -> Iterator[tuple[int, int]]:
        for begin in range(0, nbytes, _AT_ONCE):
            if self._traffic.stop.is_set():
                raise _StopError
            yield begin, min(begin + _AT_ONCE, nbytes)


def _room(job: Job, reader: Reader) -> int:
    """The bytes of a block that a whole job takes; a little more than that for one that is raw."""
    return sum(_aligned(reader.elements(job) * SWEPT[dtype]) for dtype in _held(job, reader))


def _held(job: Job, reader: Reader) -> list[str]:
    """The dtypes of all that a block holds of a job: its inputs, and its outputs."""
    *inputs, output = reader.dtypes(job)
    return [*inputs, *[output] * len(job.variants)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED
