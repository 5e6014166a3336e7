"""A merged model's files: laid out before any arithmetic, filled in any order, visible all at once at the end."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from .. import system
from ..errors import FastmergeError, OutputError
from .folder import COMMIT, JOURNAL, LEFTOVER, LOCK, STAGES, clear, finished, lock, refuse_inputs, take_back, temporary
from .hashing import hash_in_file
from .journal import Journal, Recorder, Whole
from .layout import Layout, Shard
from .reader import INDEX, SINGLE
from .sidecars import CONFIG, is_sidecar

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
    "fastmerge.json",
)


class Writer:
    """The output folder while it is written; a context manager.

    Entering checks that nothing stands in the way (OutputError, before a byte is written), takes the folder for this
    process, and makes every file at its full size under a hidden name. `commit` makes them visible.

    With a `plan`, plain data that says all that the bytes follow from, a journal tells which tensors are whole. Then
    leaving without `commit` keeps what there is, except after a FastmergeError that is no OutputError: it would come
    again. The next writer with the same plan goes on from there, another is refused unless it says `restart`. Without a
    plan, leaving without `commit` removes everything.
    """

    def __init__(
        self,
        out: Path,
        layout: Layout,
        *,
        inputs: Sequence[Path],
        overwrite: bool,
        plan: Mapping[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        self.out = out
        self._layout = layout
        self._inputs = inputs
        self._overwrite = overwrite
        self._plan = None if plan is None else {**plan, "layout": layout.hash}
        self._restart = restart
        self._places: dict[str, tuple[str, int, int]] = {}  # shard, begin and end of each tensor
        for name, _, offsets, size in layout.shards:
            ends = [*offsets.values(), size][1:]
            for (tensor, begin), end in zip(offsets.items(), ends, strict=True):
                self._places[tensor] = name, begin, end
        self._open: dict[str, Descriptor] = {}
        self._opening = threading.Lock()
        self._made = False
        self.committed = False  # whether the output is visible and whole
        self._lock = -1

    def __enter__(self) -> Writer:
        refuse_inputs(self.out, self._inputs)
        with _named(self.out):
            self._made = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.out)
            self._journal = Journal(self.out / JOURNAL)
            self._recorder = Recorder(self._journal, self._read_back)
            try:
                if not self._goes_on():
                    clear(self.out)
                    self._journal.forget()
                self._refuse_occupied()
                self._refuse_small()
                if self._plan is not None and self._journal.plan is None:
                    self._journal.begin(self._plan)
                for shard in self._layout.shards:
                    self._create(shard)
            except BaseException as error:
                self.__exit__(type(error))
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        _: TracebackType | None = None,
    ) -> None:
        self._recorder.close()
        self._open.clear()
        again = kind is not None and issubclass(kind, FastmergeError) and not issubclass(kind, OutputError)
        keep = self._begun and not again and (kind is not None or not self.committed)
        with system.uninterrupted():
            try:
                with suppress(OSError):
                    if not keep:
                        clear(self.out)
                    elif kind is not None and issubclass(kind, OSError):
                        self._remove_partial()
                    os.unlink(self.out / LOCK)
            finally:
                os.close(self._lock)
            if self._made:
                with suppress(OSError):  # it holds an output
                    self.out.rmdir()

    @property
    def _begun(self) -> bool:
        """Whether there is something to go on with: tensors, or a model that the output is to be made of."""
        stages = self.out / STAGES
        between = self._journal.plan is not None and stages.is_dir() and any(stages.iterdir())
        return between or bool(self.hashes)

    @property
    def claimed(self) -> frozenset[str]:
        """The tensors that an earlier run says it has written."""
        return frozenset(self._journal.whole)

    @property
    def hashes(self) -> dict[str, str]:
        """The hash of each tensor's bytes, once all are recorded and the writer has been told so by `settle`."""
        return {name: whole.hash for name, whole in self._journal.whole.items()} | self._journal.hashes

    def still_whole(self, name: str) -> Whole | None:
        """What is known of a claimed tensor, where its bytes are those that were written."""
        whole = self._journal.whole[name]
        if self._read_back([name])[name] == whole.hash:
            return whole
        del self._journal.whole[name]
        return None

    def record(self, tensors: Iterable[tuple[str, int, bytes | None]], worked: Mapping[str, Collection[str]]) -> None:
        """Notes in the journal, soon, that tensors are complete and right: of each its name, how many elements became
        infinite, and its hash, for which it is read back where there is none; and the ops that each provider has run
        by now."""
        if self._plan is not None:
            places = self._places
            sized = ((name, places[name][2] - places[name][1], overflow, hash) for name, overflow, hash in tensors)
            with _named(self.out):
                self._recorder.add(sized, worked)

    def settle(self) -> None:
        """Waits until all that was recorded is in the journal, and the weights are on the disk."""
        shards = [self._hidden(shard.name) for shard in self._layout.shards]
        with _named(self.out), ThreadPoolExecutor(1) as pool:
            synced = pool.submit(_sync_all, shards)
            self._recorder.settle()
            synced.result()

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
        leaves a list of them, by which the next run tells its own files.
        """
        files = dict(sidecars)
        if (index := self._layout.index_file) is not None:
            files[INDEX] = index
        with _named(self.out):
            self._recorder.settle()
            self._open.clear()
            for name, data in files.items():
                self._write(self._hidden(name), data)
            _sync_all([self._hidden(name) for name in (*(shard.name for shard in self._layout.shards), *files)])
            if self._overwrite:
                self._remove_stale()
            last = SINGLE if self._layout.weight_index is None else INDEX
            names = [name for name in (*(shard.name for shard in self._layout.shards), *files) if name != last]
            names.sort(key=lambda name: name == CONFIG)  # loaders that take any *.safetensors still want a config
            self._write(self._hidden(COMMIT), b"\0".join(map(os.fsencode, [*names, last])))
            system.sync(self._hidden(COMMIT))
            os.rename(self._hidden(COMMIT), self.out / COMMIT)
            system.sync(self.out)
            for name in names:
                os.rename(self._hidden(name), self.out / name)
            system.sync(self.out)
            with system.uninterrupted():
                os.rename(self._hidden(last), self.out / last)
                try:
                    system.sync(self.out)
                except OSError:
                    os.rename(self.out / last, self._hidden(last))
                    raise
                self.committed = True

    def _file(self, shard: str) -> Descriptor:
        file = self._open.get(shard)
        if file is None:
            with self._opening, _named(self.out):
                file = self._open[shard] = Descriptor(os.open(self._hidden(shard), os.O_RDWR | system.FLAGS))
                if len(self._open) > _KEPT_FILES:
                    self._open.pop(next(iter(self._open)))
        return file

    def _read_back(self, names: Sequence[str]) -> dict[str, str]:
        """The hashes of the bytes of tensors, as they lie in the files."""
        hashes = {}
        for name in names:
            shard, begin, end = self._places[name]
            hashes[name] = hash_in_file(self._file(shard), begin, end).hex()
        return hashes

    def _goes_on(self) -> bool:
        """Whether what an earlier run left is taken up; OutputError where it is of something else."""
        was, now = self._journal.plan, self._plan
        whole = finished(self.out)  # where other outputs of the same merge are not
        parts = any(name.startswith(LEFTOVER) and name.endswith(".part") for name in os.listdir(self.out))
        if self._restart or was is None or not self._begun or not (parts or whole) or (whole and was != now):
            return False
        if now is None:
            raise OutputError(f"{self.out} holds an unfinished merge: choose another folder, or delete it")
        if other := " and ".join(_differing(was, now)):
            raise OutputError(
                f"{self.out} holds an unfinished merge with another {other}: run that again to go on with it, pass "
                "--restart to begin anew, or choose another folder"
            )
        take_back(self.out, [shard.name for shard in self._layout.shards])
        return True

    def _remove_partial(self) -> None:
        """Frees the space of the files that are not whole."""
        whole = self.hashes
        missing = {shard for name, (shard, _, _) in self._places.items() if name not in whole}
        for shard in missing:
            self._hidden(shard).unlink(missing_ok=True)

    def _refuse_occupied(self) -> None:
        there = [name for name in sorted(os.listdir(self.out)) if not name.startswith(LEFTOVER)]
        if there and not self._overwrite:
            held = ", ".join(there[:5])
            raise OutputError(f"{self.out} is not empty ({held}): choose another folder, or pass --overwrite")

    def _refuse_small(self) -> None:
        """The new files must fit beside what is there: an earlier output goes only once they are complete."""
        needed = sum(shard.size - self._allocated(shard) for shard in self._layout.shards)
        disk = shutil.disk_usage(self.out)
        if disk.total and needed > disk.free:
            raise OutputError(
                f"{self.out} needs {needed:,} bytes and its disk has {disk.free:,} left: free some, or write elsewhere"
            )

    def _create(self, shard: Shard) -> None:
        """A shard at its full size with its header; allocated at once, so that a disk that fills up shows now. That of
        an earlier run stays where it is that already."""
        if self._stays(shard):
            return
        self._hidden(shard.name).unlink(missing_ok=True)
        for name in shard.offsets:
            self._journal.whole.pop(name, None)
        with _new(self._hidden(shard.name)) as descriptor:
            system.allocate(descriptor, shard.size)
            _write_all(descriptor, shard.header)

    def _stays(self, shard: Shard) -> bool:
        path = self._hidden(shard.name)
        if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.size:
            return False
        with open(path, "rb") as file:
            return file.read(len(shard.header)) == shard.header

    def _allocated(self, shard: Shard) -> int:
        try:
            return min(os.lstat(self._hidden(shard.name)).st_blocks * 512, shard.size)
        except FileNotFoundError:
            return 0

    def _write(self, path: Path, data: bytes) -> None:
        with _new(path) as descriptor:
            _write_all(descriptor, data)

    def _hidden(self, name: str) -> Path:
        return self.out / temporary(name)

    def _remove_stale(self) -> None:
        """An earlier output's files, those first that loaders begin with."""
        names = [name for name in os.listdir(self.out) if is_sidecar(name) or _matches(name, _STALE)]
        for name in sorted(names, key=lambda name: (name != CONFIG, not name.endswith(".index.json"), name)):
            os.unlink(self.out / name)
        system.sync(self.out)


class Descriptor(int):
    """A file descriptor that is closed when the last reference to it goes."""

    def __del__(self, close: Any = os.close) -> None:
        close(self)


def _differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs between two plans, with the names inside it."""
    for name, value in now.items():
        before = was.get(name)
        if before == value:
            continue
        if isinstance(before, dict) and isinstance(value, Mapping):
            inside = [key for key in {**before, **value} if before.get(key) != value.get(key)]
            yield f"{name} ({', '.join(inside[:5])})"
        else:
            yield name


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def _new(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | system.FLAGS, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_all(paths: Sequence[Path]) -> None:
    """All at once: a file system puts what is asked for meanwhile on disk together."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(system.sync, paths))


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
