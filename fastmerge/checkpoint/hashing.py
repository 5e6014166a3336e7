"""The hash of a tensor's bytes: the xxh3_128 of the xxh3_128 of each of its pieces, which come in any order."""

from __future__ import annotations

import ctypes
import errno
import importlib
from collections.abc import Iterable, Iterator
from functools import lru_cache

import xxhash

from .. import system

#: The bytes of a piece; the last may be shorter. As in csrc/cpu/hash.h.
PIECE = 1 << 15
#: What records call it.
NAME = f"xxh3_128 of the xxh3_128 of each {PIECE} bytes"


def hash_of(parts: Iterable[memoryview]) -> bytes:
    """The hash, 16 bytes, of what comes in parts that are whole pieces, but for the last."""
    digest = xxhash.xxh3_128_digest
    return digest(b"".join([digest(part[at : at + PIECE]) for part in parts for at in range(0, len(part), PIECE)]))


def hash_in_file(file: int, begin: int, end: int) -> bytes:
    """The hash of what lies in [begin, end) of an open file; OSError where that is shorter, or cannot be read."""
    room = memoryview(bytearray(min(end - begin, _READ)))

    def parts() -> Iterator[memoryview]:
        for at in range(begin, end, _READ):
            part = room[: min(_READ, end - at)]
            filled = 0
            while filled < len(part):
                if not (count := system.read_at(file, part[filled:], at + filled)):
                    raise OSError(errno.EIO, "it became shorter")
                filled += count
            yield part

    return hash_of(parts())


_READ = 32 * PIECE  # bytes read and hashed at a time, which stay in the cache


@lru_cache
def function() -> int:
    """The address of xxHash's C function in the library that Python hashes by, for compiled code that hashes as it
    writes; 0 where the library does not show it, or it does not answer as Python's."""
    try:
        library = ctypes.CDLL(importlib.import_module("xxhash._xxhash").__file__)
    except (ImportError, AttributeError, OSError):
        return 0
    for name in ("XXH3_128bits_dispatch", "XXH3_128bits"):  # the first as wide as the processor, on x86
        if (found := getattr(library, name, None)) and _answer(found) == xxhash.xxh3_128_digest(_ASKED):
            return ctypes.cast(found, ctypes.c_void_p).value or 0
    return 0


_ASKED = bytes(range(256)) * 9  # long enough for the part of the function that long inputs take


class _Hash128(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


def _answer(function: ctypes._NamedFuncPointer) -> bytes:
    function.restype, function.argtypes = _Hash128, (ctypes.c_char_p, ctypes.c_size_t)
    found = function(_ASKED, len(_ASKED))
    return int(found.high << 64 | found.low).to_bytes(16, "big")
