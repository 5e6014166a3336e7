"""Checkpoints on disk: which file holds a tensor, and its bytes as mapped memory."""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .. import system
from ..errors import CheckpointError, FastmergeWarning
from .hashing import hash_in_file
from .header import (
    CONVERT,
    DEEPEST,
    Header,
    TensorInfo,
    looks_like,
    nesting,
    open_regular,
    parse_json,
    read_header,
    read_small,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
#: Mappings that one checkpoint keeps when nothing refers to them: page tables cost 2 MB per GB mapped.
KEPT_MAPPINGS = 64

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LISTED = 20  # names in one message
_PIECE = 1 << 20  # bytes compared at a time


class Checkpoint:
    """A model's weights as they lie on disk; made by `open_checkpoint`.

    `name` is what the user calls it, `path` where it lies, and `folder` where config.json and its like are; `commit`
    says which version of it a repository gave. `tensors` maps each name to its dtype, shape and place, in the order of
    `files` and of the bytes in them.
    """

    def __init__(
        self, name: str, path: Path, folder: Path, shards: Mapping[Path, _Shard], commit: str | None = None
    ) -> None:
        self.name = name
        self.path = path
        self.folder = folder
        self.commit = commit
        self.config: dict[str, Any] = _config(folder)
        self.files = tuple(shards)
        held = [shard.tensors for shard in shards.values()]
        self.tensors = held[0] if len(held) == 1 else {name: info for each in held for name, info in each.items()}
        self._later = {name: i for i, each in enumerate(held) if i for name in each}  # its file, if not the first
        self._shards = shards
        self._mapped: dict[int, _Mapped] = {}
        self._lock = threading.Lock()

    def file_of(self, tensor: str) -> Path:
        """The file that holds a tensor; KeyError when none does."""
        return self.files[self._later.get(self.tensors[tensor].name, 0)]

    def hash_of(self, name: str) -> str:
        """The hash of a tensor's bytes, as records have it, read from its file."""
        info = self.tensors[name]
        with open_regular(self.file_of(name)) as file:
            return hash_in_file(file.fileno(), info.begin, info.end).hex()

    def address(self, tensor: str) -> tuple[int, object]:
        """The address of a tensor's first byte, and the owner that keeps it mapped while referenced.

        Raises CheckpointError when the file is no longer the one that was opened. Any number of owners may be alive: a
        mapping holds no open file.
        """
        begin, number = self.tensors[tensor].begin, self._later.get(tensor, 0)
        mapped = self._mapped.get(number)
        if mapped is None:
            with self._lock:
                mapped = self._mapped[number] = self._map(self.files[number])
                if len(self._mapped) > KEPT_MAPPINGS:
                    self._mapped.pop(next(iter(self._mapped)))
        return mapped.address + begin, mapped

    def check_unchanged(self) -> None:
        """Raises CheckpointError when a file's size, time or inode differ from when it was opened."""
        for file in self.files:
            try:
                now = _stamp(os.stat(file))
            except OSError as error:
                raise CheckpointError(f"{file} went away while it was read ({error.strerror}); run again") from None
            self._compare(file, now)

    def _compare(self, file: Path, now: _Stamp) -> None:
        was = self._shards[file].stamp
        if now != was:
            raise CheckpointError(
                f"{file} changed while it was read (it has {now.size} bytes, had {was.size}); "
                "wait until whatever writes it is done, and run again"
            )

    def _map(self, file: Path) -> _Mapped:
        with open_regular(file) as opened:
            now = _stamp(os.fstat(opened.fileno()))
            self._compare(file, now)
            return _Mapped(file, opened.fileno(), now.size)


def open_checkpoint(path: str | Path, *, name: str | None = None, commit: str | None = None) -> Checkpoint:
    """Opens a model: a folder with model.safetensors, or with its index and shards, or one .safetensors file.

    `name` is by default the path, as it is given. Reads headers, index and config.json. Raises CheckpointError for what
    is not a sound model, and warns with FastmergeWarning about what is odd but defined: an index is taken before a
    single file, and names what counts.
    """
    name, path = name or str(path), Path(path)
    if os.path.isdir(path):
        return Checkpoint(name, path, path, _shards(path), commit)
    if path.suffix in _PICKLES:
        raise CheckpointError(f"{path} is a PyTorch checkpoint: {CONVERT}")
    return Checkpoint(name, path, path.parent, {path: _open(path)}, commit)


@contextmanager
def naming_what_changed(*models: Checkpoint) -> Iterator[None]:
    """A CheckpointError in here, where a file of these models was cut, names the file: what reads mapped memory knows
    no names."""
    try:
        yield
    except CheckpointError:
        for model in models:
            model.check_unchanged()
        raise


def same_bytes(one: Checkpoint, tensor: str, two: Checkpoint, other: str, *, start_only: bool = False) -> bool:
    """Whether a tensor of one checkpoint and a tensor of another have the same bytes, whatever their dtypes.

    Read a piece at a time, until one differs; `start_only` reads the first megabyte. A file cut meanwhile is a
    CheckpointError.
    """
    here, there = one.tensors[tensor], two.tensors[other]
    if here.nbytes != there.nbytes:
        return False
    with open_regular(one.file_of(tensor)) as left, open_regular(two.file_of(other)) as right:
        left.seek(here.begin)
        right.seek(there.begin)
        nbytes = min(here.nbytes, _PIECE) if start_only else here.nbytes
        for done in range(0, nbytes, _PIECE):
            size = min(_PIECE, nbytes - done)
            if left.exactly(size) != right.exactly(size):
                return False
    return True


def sha256_in_cache(file: Path) -> str | None:
    """What the hub's cache calls a large file, its SHA-256; None for a file that lies anywhere else."""
    *_, repository, blobs, name = ("", "", *os.path.realpath(file).split(os.sep))
    known = repository.startswith("models--") and blobs == "blobs" and re.fullmatch("[0-9a-f]{64}", name)
    return name if known else None


def _shards(folder: Path) -> dict[Path, _Shard]:
    """The files of a folder's model, and the tensors that count in each."""
    single, index = folder / SINGLE, folder / INDEX
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            raise CheckpointError(no_model(folder, names_in(folder)))
        return {single: _open(single)}
    weight_map, total_size = _index(index)
    names = sorted(set(weight_map.values()))
    if SINGLE not in names and os.path.lexists(single):
        _warn(f"{folder} has both {INDEX} and {SINGLE}; the index is used, delete the one that is out of date")
    for shard in names:
        _refuse_outside(folder, index, shard)
    if missing := [shard for shard in names if not os.path.exists(folder / shard)]:
        raise CheckpointError(f"{index} names shards that are missing: {_listed(missing)}; fetch them again")
    shards = {shard: _open(folder / shard) for shard in names}
    _refuse_mismatch(index, weight_map, shards)
    _warn_about_rest(folder, index, weight_map, shards)
    held = sum(info.nbytes for shard in shards.values() for info in shard.tensors.values())
    if total_size not in (None, held):
        _warn(f"{index} says total_size {total_size}, its shards hold {held} bytes; the shards are believed")
    return {
        folder / name: shard._replace(tensors={t: info for t, info in shard.tensors.items() if t in weight_map})
        for name, shard in shards.items()
    }


def _open(file: Path) -> _Shard:
    with open_regular(file) as opened:
        stamp = _stamp(os.fstat(opened.fileno()))
    header = read_header(file)
    return _Shard(header.tensors, stamp, header)


def no_model(where: str | Path, names: Sequence[str]) -> str:
    """Why what holds files of these names, but no weights of a known name, is refused, with the remedy."""
    if found := [name for name in names if name.endswith(".safetensors")]:
        return f"{where} has no {SINGLE} and no {INDEX}; name one of its files instead: {_listed(found)}"
    if found := [name for name in names if name.endswith(_PICKLES)]:
        return f"{where} holds PyTorch files only ({_listed(found)}): {CONVERT}"
    return f"{where} holds no model: neither {SINGLE} nor {INDEX}; name the folder that does"


def shards_named(index: Path) -> list[str]:
    """The files that an index names, sorted."""
    return sorted(set(_index(index)[0].values()))


def _index(index: Path) -> tuple[dict[str, str], object]:
    """The weight_map and total_size of an index."""
    data = read_small(index)
    try:
        document = parse_json(data)
        if not isinstance(document, dict):
            raise ValueError("it is not an object")
        weight_map = document.get("weight_map")
        if not isinstance(weight_map, dict) or not all(type(shard) is str for shard in weight_map.values()):
            raise ValueError("its weight_map is not an object of file names")
    except ValueError as error:
        reason = looks_like(data[:512]) or f"is not an index of shards: {error!s:.500}; fetch it again"
        raise CheckpointError(f"{index} {reason}") from None
    metadata = document.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _refuse_outside(folder: Path, index: Path, shard: str) -> None:
    """A shard lies in its folder, by name and once links are followed; the hub's cache links into its own blobs."""
    parts = Path(shard).parts
    if not parts or "\0" in shard or Path(shard).is_absolute() or ".." in parts:
        raise CheckpointError(
            f"{index} names the shard {shard!r}, which is not a path inside its folder; mend the index"
        )
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / shard))
    caches = (
        home for home in root.parents if home.name.startswith("models--") and (home / "snapshots") in root.parents
    )
    if not any(target.is_relative_to(home) for home in (root, *caches)):
        raise CheckpointError(f"{folder / shard} is a link out of its folder, to {target}; put the file itself there")


def _refuse_mismatch(index: Path, weight_map: Mapping[str, str], shards: Mapping[str, _Shard]) -> None:
    """Each tensor of the index is in the shard it names, and in no other."""
    if absent := [
        f"{tensor} in {shard}" for tensor, shard in weight_map.items() if tensor not in shards[shard].tensors
    ]:
        raise CheckpointError(f"{index} names tensors that its shards lack: {_listed(absent)}; fetch the model again")
    times = Counter(tensor for shard in shards.values() for tensor in shard.tensors)
    if twice := [tensor for tensor, count in times.items() if count > 1]:
        holders = [name for name, shard in shards.items() if twice[0] in shard.tensors]
        raise CheckpointError(
            f"{index}: the same tensor is in two shards, {_listed(holders)}: {_listed(twice)}; fetch the model again"
        )


def _warn_about_rest(folder: Path, index: Path, weight_map: Mapping[str, str], shards: Mapping[str, _Shard]) -> None:
    """Weights that lie there, but that the index does not name, do not count."""
    lying = [name for name in names_in(folder) if name.endswith(".safetensors") and not name.startswith(".")]
    if files := [name for name in lying if name not in shards and name != SINGLE]:
        _warn(f"{index} does not name {_listed(files)}, which lie beside it; they are left out")
    held = [(tensor, name) for name, shard in shards.items() for tensor in shard.tensors]
    if tensors := [f"{tensor} in {name}" for tensor, name in held if tensor not in weight_map]:
        _warn(f"{index} does not name {_listed(tensors)}; they are left out")


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, sorted; CheckpointError where it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed ({error.strerror}): change its permissions") from None


def _config(folder: Path) -> dict[str, Any]:
    """config.json, empty where there is none; Infinity and NaN are taken, as transformers writes them."""
    path = folder / "config.json"
    if not os.path.lexists(path):
        return {}
    data = read_small(path)
    try:
        config = json.loads(data.decode())
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
        if nesting(config) > DEEPEST:
            raise RecursionError
        return config
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:
        reason = str(error)
    raise CheckpointError(f"{path} {looks_like(data[:512]) or f'is not a model config: {reason}; fetch it again'}")


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are; those that would steer a terminal are quoted."""
    rest = len(names) - _LISTED
    shown = [name if name.isprintable() else repr(name) for name in names[:_LISTED]]
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _warn(message: str) -> None:
    warnings.warn(message, FastmergeWarning, stacklevel=4)


class _Stamp(NamedTuple):
    """What tells that a file is still the one that was opened."""

    size: int
    mtime_ns: int
    inode: int
    device: int


class _Shard(NamedTuple):
    """A file's tensors that count, and what the file was when they were read."""

    tensors: Mapping[str, TensorInfo]
    stamp: _Stamp
    header: Header  # kept, so that files with the same share it


def _stamp(status: os.stat_result) -> _Stamp:
    return _Stamp(status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


class _Mapped:
    """A file mapped for reading until the last reference goes."""

    __slots__ = ("_unmap", "address")

    def __init__(self, file: Path, descriptor: int, size: int) -> None:
        try:
            self.address, self._unmap = system.map_file(descriptor, size)
        except OSError as error:
            reason = error.strerror
            raise CheckpointError(
                f"{file} cannot be mapped ({reason}); copy it to a local disk, or raise `ulimit -v`"
            ) from None

    def __del__(self) -> None:
        if hasattr(self, "_unmap"):
            self._unmap()
