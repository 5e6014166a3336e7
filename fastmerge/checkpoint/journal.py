"""The journal of an unfinished output: what it is of, and which of its tensors are whole."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .. import system
from .folder import left_in

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

    A line that was cut while it was written says nothing, and without the first line none does. That a line is there
    does not mean that the tensor's bytes reached the disk, too, where the machine itself went down: hence the hashes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.plan: Mapping[str, Any] | None = None  # None: there is no journal, or its first line is not one of ours
        self.whole: dict[str, Whole] = {}  # by what was in the file when it was opened
        self.hashes: dict[str, str] = {}  # of those added since
        data = left_in(path)
        self._cut = not data.endswith(b"\n")
        first, *lines = data.split(b"\n")
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            said = json.loads(first)
            self.plan = said["plan"] if said["journal"] == _FORMAT and type(said["plan"]) is dict else None
        for line in lines if self.plan is not None else ():
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

    def add(self, hashes: Mapping[str, str], overflow: Mapping[str, int], worked: Mapping[str, Sequence[str]]) -> None:
        """Tensors whose bytes are written, together or not at all."""
        self.hashes.update(hashes)
        ops, name = json.dumps(worked), json.JSONEncoder().encode
        self._append([f'[{name(tensor)}, "{hashes[tensor]}", {count}, {ops}]' for tensor, count in overflow.items()])

    def _append(self, lines: Iterable[str], flags: int = 0) -> None:
        data = memoryview(("\n" * self._cut + "\n".join([*lines, ""])).encode())
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
        self._noted: deque[Future[None]] = deque()
        self._overflow: dict[str, int] = {}  # of the tensors that are noted next
        self._hashes: dict[str, str] = {}  # of some of them
        self._worked: Mapping[str, Collection[str]] = {}
        self._nbytes = 0

    def add(self, tensors: Iterable[tuple[str, int, int, bytes | None]], worked: Mapping[str, Collection[str]]) -> None:
        """Notes (name, bytes, overflow, hash) tensors soon; raises the OSError of what could not be noted before."""
        self._worked = worked
        for tensor, nbytes, overflow, hash in tensors:
            self._overflow[tensor] = overflow
            if hash is not None:
                self._hashes[tensor] = hash.hex()
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
        while self._noted and self._noted[0].done():
            self._noted.popleft().result()
        if self._overflow:
            worked = {name: sorted(ops) for name, ops in self._worked.items()}
            self._noted.append(self._thread.submit(self._note, self._overflow, self._hashes, worked))
            self._overflow, self._hashes, self._nbytes = {}, {}, 0

    def _note(
        self, overflow: Mapping[str, int], hashes: Mapping[str, str], worked: Mapping[str, Sequence[str]]
    ) -> None:
        known = {**hashes, **self._read_back([tensor for tensor in overflow if tensor not in hashes])}
        self._journal.add(known, overflow, worked)
