"""A merged model's files: laid out before any arithmetic, filled in any order, visible all at once at the end."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import OutputError
from .header import DTYPE_BITS, encode_header
from .reader import INDEX, SINGLE
from .sidecars import CONFIG, is_sidecar

#: Every file of an unfinished output begins so; the next run with the same folder removes them.
LEFTOVER = ".fastmerge-"
#: A folder inside the output for what is wanted only until the commit.
STAGES = LEFTOVER + "stages"

_LOCK = LEFTOVER + "lock"
_COMMIT = LEFTOVER + "commit"  # the names being renamed, one a line, the one that completes the output last
_KEPT_FILES = 16  # files that a writer keeps open when nothing refers to them
_STALE = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*",
    "consolidated*",
    "adapter_model*",
    "adapter_config.json",
    "tf_model*",
    "flax_model*",
)


class Shard(NamedTuple):
    """One file to be: its name, its bytes up to the first tensor, where each tensor begins, and its size in bytes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


class Layout(NamedTuple):
    """All files of an output's weights; `weight_index` is the JSON beside them where there is more than one."""

    shards: tuple[Shard, ...]
    weight_index: dict[str, Any] | None


def lay_out(outputs: Sequence[tuple[str, str, tuple[int, ...]]], shard_size: int) -> Layout:
    """Places (name, dtype, shape) tensors, in this order, into shards of at most `shard_size` bytes of tensors each.

    A tensor larger than that has a shard of its own. Inside a shard wider dtypes come first, so that each tensor is
    aligned to its dtype.
    """
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = total = 0
    for output in outputs:
        nbytes = _nbytes(output)
        if groups[-1] and filled + nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += nbytes
        total += nbytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        return Layout((_shard(SINGLE, groups[0]),), None)
    weight_map = {output[0]: name for name, group in zip(names, groups, strict=True) for output in group}
    return Layout(tuple(map(_shard, names, groups)), {"metadata": {"total_size": total}, "weight_map": weight_map})


class Writer:
    """The output folder while it is written; a context manager.

    Entering checks that nothing stands in the way (OutputError, before a byte is written), takes the folder for this
    process, and makes every file at its full size under a hidden name. `commit` makes them visible; leaving without it
    removes them.
    """

    def __init__(self, out: Path, layout: Layout, *, inputs: Sequence[Path], overwrite: bool) -> None:
        self._out = out
        self._layout = layout
        self._inputs = inputs
        self._overwrite = overwrite
        self._places: dict[str, tuple[str, int, int]] = {}  # shard, begin and end of each tensor
        for name, _, offsets, size in layout.shards:
            ends = [*offsets.values(), size][1:]
            for (tensor, begin), end in zip(offsets.items(), ends, strict=True):
                self._places[tensor] = name, begin, end
        self._open: dict[str, Descriptor] = {}
        self._opening = threading.Lock()
        self._made = False
        self._lock = -1

    def __enter__(self) -> Writer:
        _refuse_inputs(self._out, self._inputs)
        with _named(self._out):
            self._made = not self._out.exists()
            self._out.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._out)
            try:
                _clear(self._out)
                self._refuse_occupied()
                self._refuse_small()
                for shard in self._layout.shards:
                    self._create(shard)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        try:
            with suppress(OSError):
                _clear(self._out)
                os.unlink(self._out / _LOCK)
        finally:
            os.close(self._lock)
        if self._made:
            with suppress(OSError):  # it holds an output
                self._out.rmdir()

    def target(self, name: str) -> tuple[Descriptor, int]:
        """Where a tensor's bytes go: a file, open as long as the descriptor is referenced, and an absolute offset."""
        shard, begin, _ = self._places[name]
        return self._file(shard), begin

    def written(self, names: Iterable[str]) -> None:
        """Says that tensors are complete: the system begins to put them on disk, and `commit` has less to wait for."""
        if not hasattr(os, "posix_fadvise"):
            return
        for shard, places in groupby(sorted([self._places[name] for name in names]), key=itemgetter(0)):
            (_, begin, end), *rest = places
            size = (rest[-1][2] if rest else end) - begin
            # Advice that these pages are not needed makes Linux write them back; what it drops is only what is clean.
            os.posix_fadvise(self._file(shard), begin, size, os.POSIX_FADV_DONTNEED)

    def commit(self, sidecars: Mapping[str, bytes]) -> None:
        """Makes the output visible, with these files beside the weights.

        At no moment do the visible files look like a complete model that mixes old and new. First everything new is
        safe on disk under hidden names. Then, where an earlier output is replaced, its config and index go, without
        which nothing loads it, then its weights and the files beside them. Only then do the new files take their names,
        and the one that a loader begins with, the index or the only weight file, is the last. A crash among the renames
        leaves a list of them, by which the next run tells its own files and removes them.
        """
        files = dict(sidecars)
        if self._layout.weight_index is not None:
            files[INDEX] = json.dumps(self._layout.weight_index, indent=2).encode() + b"\n"
        with _named(self._out):
            self._open.clear()
            for name, data in files.items():
                self._write(self._temporary(name), data)
            _sync_all([self._temporary(name) for name in (*(shard.name for shard in self._layout.shards), *files)])
            if self._overwrite:
                self._remove_stale()
            last = SINGLE if self._layout.weight_index is None else INDEX
            names = [name for name in (*(shard.name for shard in self._layout.shards), *files) if name != last]
            names.sort(key=lambda name: name == CONFIG)  # loaders that take any *.safetensors still want a config
            self._write(self._temporary(_COMMIT), "\n".join([*names, last]).encode())
            _sync(self._temporary(_COMMIT))
            os.rename(self._temporary(_COMMIT), self._out / _COMMIT)
            _sync(self._out)
            for name in names:
                os.rename(self._temporary(name), self._out / name)
            _sync(self._out)
            os.rename(self._temporary(last), self._out / last)
            _sync(self._out)
            os.unlink(self._out / _COMMIT)

    def _file(self, shard: str) -> Descriptor:
        with self._opening:
            file = self._open.get(shard)
            if file is None:
                with _named(self._out):
                    file = Descriptor(os.open(self._temporary(shard), os.O_RDWR | os.O_CLOEXEC))
                self._open[shard] = file
                if len(self._open) > _KEPT_FILES:
                    self._open.pop(next(iter(self._open)))
            return file

    def _refuse_occupied(self) -> None:
        there = [name for name in sorted(os.listdir(self._out)) if not name.startswith(LEFTOVER)]
        if there and not self._overwrite:
            held = ", ".join(there[:5])
            raise OutputError(f"{self._out} is not empty ({held}): choose another folder, or pass --overwrite")

    def _refuse_small(self) -> None:
        """The new files must fit beside what is there: an earlier output goes only once they are complete."""
        needed = sum(shard.size for shard in self._layout.shards)
        disk = os.statvfs(self._out)
        free = disk.f_bavail * disk.f_frsize
        if disk.f_blocks and needed > free:
            raise OutputError(
                f"{self._out} needs {needed:,} bytes and its disk has {free:,} left: free some, or write elsewhere"
            )

    def _create(self, shard: Shard) -> None:
        """A shard at its full size with its header; allocated at once, so that a disk that fills up shows now."""
        with _new(self._temporary(shard.name)) as descriptor:
            _allocate(descriptor, shard.size)
            _write_all(descriptor, shard.header)

    def _write(self, path: Path, data: bytes) -> None:
        with _new(path) as descriptor:
            _write_all(descriptor, data)

    def _temporary(self, name: str) -> Path:
        return self._out / _temporary(name)

    def _remove_stale(self) -> None:
        """An earlier output's files, those first that loaders begin with."""
        names = [name for name in os.listdir(self._out) if is_sidecar(name) or _matches(name, _STALE)]
        for name in sorted(names, key=lambda name: (name != CONFIG, not name.endswith(".index.json"), name)):
            os.unlink(self._out / name)
        _sync(self._out)


class Descriptor(int):
    """A file descriptor that is closed when the last reference to it goes."""

    def __del__(self, close: Any = os.close) -> None:
        close(self)


def _shard(name: str, group: Sequence[tuple[str, str, tuple[int, ...]]]) -> Shard:
    header, offsets = encode_header(sorted(group, key=lambda output: -DTYPE_BITS[output[1]]), {"format": "pt"})
    return Shard(name, header, offsets, len(header) + sum(map(_nbytes, group)))


def _nbytes(output: tuple[str, str, tuple[int, ...]]) -> int:
    return math.prod(output[2]) * DTYPE_BITS[output[1]] // 8


def _refuse_inputs(out: Path, inputs: Sequence[Path]) -> None:
    """The output is neither an input's folder, nor inside one, nor where an input's files really lie."""
    real = _real(out)
    here = [_identity(folder) for folder in (real, *real.parents)]
    for path in inputs:
        resolved = _real(path)
        if resolved.is_dir():
            if _identity(resolved) in here:
                where = "is" if _identity(resolved) == here[0] else "is inside"
                raise OutputError(f"the output folder {out} {where} the input {path}; choose another folder")
            files = [_real(entry) for entry in resolved.glob("*.safetensors")]
        else:
            files = [resolved, path.absolute()]
        if any(_identity(file.parent) == here[0] is not None for file in files):
            raise OutputError(f"the output folder {out} holds files of the input {path}; choose another folder")


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve raises on a loop of links


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _lock(out: Path) -> int:
    """Takes the folder for this process until the returned descriptor is closed."""
    while True:
        descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(out / _LOCK)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"another fastmerge is writing to {out}: wait for it, or choose another folder") from None
        except FileNotFoundError:
            pass  # its holder finished and removed it between the two lines above
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _clear(out: Path) -> None:
    """Removes what an unfinished run left; an output whose last file has its name is finished, and stays."""
    with suppress(FileNotFoundError):
        names = [os.path.basename(name) for name in os.fsdecode((out / _COMMIT).read_bytes()).split("\n")]
        if os.path.lexists(out / _temporary(names[-1])):
            for name in filter(None, names):
                (out / name).unlink(missing_ok=True)
    leftovers = [name for name in os.listdir(out) if name.startswith(LEFTOVER) and name != _LOCK]
    for name in sorted(leftovers, key=lambda name: name == _COMMIT):
        if name == STAGES and not os.path.islink(out / name):
            shutil.rmtree(out / name)
        else:
            os.unlink(out / name)


def _temporary(name: str) -> str:
    return f"{LEFTOVER}{name}.part"  # no loader looks for such a suffix


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _new(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_all(paths: Sequence[Path]) -> None:
    """All at once: a file system puts what is asked for meanwhile on disk together."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(_sync, paths))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _named(out: Path) -> Iterator[None]:
    """What the system refuses becomes an OutputError that names the file and the remedy."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "mend that"
        raise OutputError(
            f"{error.filename or out} cannot be written ({error.strerror}): {remedy}, or choose another folder"
        ) from None
