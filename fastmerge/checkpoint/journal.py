"""The journal of an unfinished output: what it is of, and which of its tensors are whole."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .. import system
from .folder import left_in
from .hashing import hash_of

_FORMAT = 2
_TOGETHER_BYTES = 1 << 26  # of tensors that are noted together
_TOGETHER = 512


class Whole(NamedTuple):
    """A tensor whose bytes were all written: their hash in hexadecimal, how many elements became infinite, and the ops
    that each provider had run by then."""

    hash: str
    overflow: int
    worked: Mapping[str, Sequence[str]]


class Journal:
    """A file that only grows: a line that says what the output is of, then a line for each tensor that is whole.

    A line that was cut while it was written says nothing. That a line is there does not mean that the tensor's bytes
    reached the disk, too, where the machine itself went down: hence the hashes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.plan: Mapping[str, Any] | None = None  # None: there is no journal, or it was cut in its first line
        self.whole: dict[str, Whole] = {}
        data = left_in(path)
        self._cut = not data.endswith(b"\n")
        first, *lines = data.split(b"\n")
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            said = json.loads(first)
            self.plan = said["plan"] if said["journal"] == _FORMAT and type(said["plan"]) is dict else None
        for line in lines:
            with suppress(ValueError, TypeError, RecursionError):
                tensor, *rest = json.loads(line)
                if type(tensor) is str and _is_sound(whole := Whole(*rest)):
                    self.whole[tensor] = whole

    def begin(self, plan: Mapping[str, Any]) -> None:
        """A new journal, in which no tensor is whole."""
        self.plan = plan
        self._append([json.dumps({"journal": _FORMAT, "plan": plan})], os.O_EXCL)

    def forget(self) -> None:
        """The file is gone."""
        self.plan, self.whole, self._cut = None, {}, False

    def add(self, whole: Mapping[str, Whole]) -> None:
        """Tensors whose bytes are written, together or not at all."""
        self.whole |= whole
        self._append(json.dumps([tensor, *line]) for tensor, line in whole.items())

    def _append(self, lines: Iterable[str], flags: int = 0) -> None:
        data = memoryview(("\n" * self._cut + "".join(f"{line}\n" for line in lines)).encode())
        self._cut = False
        flags |= os.O_WRONLY | os.O_CREAT | os.O_APPEND | system.FLAGS | system.NO_LINK
        descriptor = os.open(self._path, flags, 0o666)
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def _is_sound(whole: Whole) -> bool:
    """Whether what was read is of the types that are written."""
    if not (type(whole.hash) is str and type(whole.overflow) is int and type(whole.worked) is dict):
        return False
    return all(type(ops) is list and all(type(op) is str for op in ops) for ops in whole.worked.values())


class Recorder:
    """Notes tensors in a journal as they become whole, on a thread of its own that reads those back which were not
    hashed while they were written."""

    def __init__(self, journal: Journal, read_back: Callable[[Sequence[str]], dict[str, str]]) -> None:
        self._journal = journal
        self._read_back = read_back
        self._thread = ThreadPoolExecutor(1, "fastmerge-journal", system.stand_back)
        self._noted: list[Future[None]] = []
        self._overflow: dict[str, int] = {}  # of the tensors that are noted next
        self._hashes: dict[str, str] = {}  # of some of them
        self._worked: Mapping[str, Collection[str]] = {}
        self._nbytes = 0

    def add(
        self, tensor: str, overflow: int, worked: Mapping[str, Collection[str]], nbytes: int, hash: bytes | None
    ) -> None:
        self._overflow[tensor] = overflow
        if hash is not None:
            self._hashes[tensor] = hash.hex()
        self._worked = worked
        self._nbytes += nbytes
        if self._nbytes >= _TOGETHER_BYTES or len(self._overflow) >= _TOGETHER:
            self._begin()

    def settle(self) -> None:
        """Waits until all is noted; raises the OSError of what could not be."""
        self._begin()
        for note in self._noted:
            note.result()

    def close(self) -> None:
        """Notes what can be."""
        with suppress(OSError):
            self.settle()
        self._thread.shutdown()

    def _begin(self) -> None:
        if self._overflow:
            worked = {name: sorted(ops) for name, ops in self._worked.items()}
            self._noted.append(self._thread.submit(self._note, self._overflow, self._hashes, worked))
            self._overflow, self._hashes, self._nbytes = {}, {}, 0

    def _note(
        self, overflow: Mapping[str, int], hashes: Mapping[str, str], worked: Mapping[str, Sequence[str]]
    ) -> None:
        known = {**hashes, **self._read_back([tensor for tensor in overflow if tensor not in hashes])}
        self._journal.add({tensor: Whole(known[tensor], count, worked) for tensor, count in overflow.items()})


def hashes_of(path: Path, places: Sequence[tuple[int, int]]) -> list[str]:
    """The hash of parts of a file in ascending order, each by its begin and end; OSError where it is shorter.

    Through a mapping, which is twice as fast as to copy: the file is one that this process alone writes.
    """
    (start, _), (_, end) = places[0], places[-1]
    start -= start % mmap.ALLOCATIONGRANULARITY
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < end:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if end == start:
            return [hash_of([]).hex()] * len(places)
        mapped = mmap.mmap(file.fileno(), end - start, access=mmap.ACCESS_READ, offset=start)
        with mapped, memoryview(mapped) as view:
            return [_hash(view, begin - start, end - start) for begin, end in places]


def _hash(view: memoryview, begin: int, end: int) -> str:
    with view[begin:end] as part:
        return hash_of([part]).hex()
