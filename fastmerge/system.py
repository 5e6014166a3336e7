"""What operating systems do each in its own way: files at an offset, mapped, locked, allocated and synced.

POSIX with its extensions where they are there (macOS allocates nothing ahead), and Windows.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

#: For every `os.open`: the bytes as they are, and nothing for child processes.
FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
#: For `os.open` of what is no link; where the system cannot say so, links are followed.
NO_LINK = getattr(os, "O_NOFOLLOW", 0)
#: For `os.open` of what may be a pipe that nobody writes to.
NO_WAIT = getattr(os, "O_NONBLOCK", 0)

_seeking = threading.Lock()  # where a file can be read only from where it stands


def read_at(file: int, into: memoryview, offset: int) -> int:
    """Reads into a buffer from a place in a file; how many bytes came, 0 past its end."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [into], offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        raw = os.read(file, len(into))
    into[: len(raw)] = raw
    return len(raw)


def write_at(file: int, raw: memoryview, offset: int) -> int:
    """Writes bytes at a place in a file; how many were taken."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, raw, offset)
    with _seeking:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, raw)


def allocate(file: int, size: int) -> None:
    """Makes a file so long, with room on the disk where the system can promise it; OSError where there is none."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    os.ftruncate(file, size)


def lock(file: int) -> None:
    """Locks an open file until it is closed; BlockingIOError where another process has it."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    windows: Any = msvcrt
    try:
        windows.locking(file, windows.LK_NBLCK, 1)
    except OSError as error:
        raise BlockingIOError(error.errno, error.strerror) from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the block ends."""
    waiting: list[int] = []
    handled = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread() or None in handled.values():
        yield  # signals do not come here, or have handlers that are not Python's
        return
    for each in handled:
        signal.signal(each, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for each, handler in handled.items():
            signal.signal(each, handler)
        for number in waiting:
            signal.raise_signal(number)


def stand_back() -> None:
    """Lets the calling thread have the processors that no other wants, where threads have priorities of their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def sync(path: Path) -> None:
    """Waits until a file, or what a folder lists, is on the disk; Windows keeps its folders itself."""
    if not fcntl and path.is_dir():
        return
    file = os.open(path, (os.O_RDONLY if fcntl else os.O_RDWR) | FLAGS)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def map_file(file: int, size: int) -> tuple[int, Callable[[], object]]:
    """The address of an open file mapped for reading, and what unmaps it; OSError where it cannot be mapped.

    But for Windows the mapping holds no file open, as mmap.mmap would: a model may have more shards than a process may
    open files.
    """
    if _libc is None:
        import numpy as np

        mapped: Any = mmap.mmap(file, size, access=mmap.ACCESS_READ)
        return int(np.frombuffer(mapped, np.uint8).ctypes.data), mapped.close
    libc = _libc
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return address, lambda: libc.munmap(address, size)


_libc = ctypes.CDLL(None, use_errno=True) if hasattr(mmap, "MAP_SHARED") else None
if _libc is not None:
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_ssize_t)
    _libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
