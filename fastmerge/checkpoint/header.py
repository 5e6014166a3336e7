"""The header of a safetensors file: which bytes are which tensor, read strictly and written.

A file is the header's length (8 bytes, little endian), the header (JSON, padded with spaces) and the tensors' bytes,
which cover the rest of the file without hole or overlap. What `read_header` accepts, the safetensors library accepts
too; it refuses more: duplicate keys, an empty name, a NUL in a name, a header that does not begin with `{` or is padded
with anything but spaces, `__metadata__: null`, and entries that are not objects with a dtype given as a string.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from ..errors import CheckpointError

#: Bits per element of each dtype, by its name in a header.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
#: The longest JSON that is read, and other small file, in bytes; the safetensors library's own limit for a header.
LONGEST_JSON = 100_000_000
#: Objects and arrays that may lie inside one another, as in the safetensors library.
DEEPEST = 127

_LARGEST = 2**64 - 1  # sizes are unsigned 64-bit numbers


class TensorInfo(NamedTuple):
    """One tensor of a file; its bytes are [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a file holds: its tensors in the order of their bytes, its metadata, and its size in bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int


def read_header(path: str | Path) -> Header:
    """Reads the header of a safetensors file; raises CheckpointError for a file that is not a sound one."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return _parse(file, size)
        except ValueError as error:
            file.seek(0)
            reason = looks_like(file.read(512)) or f"is not a sound safetensors file: {error!s:.500}; fetch it again"
            raise CheckpointError(f"{path} {reason}") from None


def encode_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Encodes the header of (name, dtype, shape) tensors packed in this order.

    Returns the bytes from the start of the file to the first tensor, which is aligned to 8 bytes, and the absolute
    offset of each tensor.
    """
    entries = [f'"__metadata__":{_json(dict(metadata))}'] if metadata else []
    begins: dict[str, int] = {}
    alike: dict[tuple[str, tuple[int, ...]], tuple[str, int]] = {}
    end = 0
    for name, dtype, shape in tensors:
        if (dtype, shape) not in alike:
            text = f'"dtype":{_json(dtype)},"shape":{_json(shape)}'
            alike[dtype, shape] = text, math.prod(shape) * DTYPE_BITS[dtype] // 8
        text, nbytes = alike[dtype, shape]
        begins[name], end = end, end + nbytes
        entries.append(f'{_json(name)}:{{{text},"data_offsets":[{end - nbytes},{end}]}}')
    data = f"{{{','.join(entries)}}}".encode()
    data += b" " * (-len(data) % 8)
    start = 8 + len(data)
    return struct.pack("<Q", len(data)) + data, {name: start + begin for name, begin in begins.items()}


_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


class InputFile(FileIO):
    """An open file of an input, unbuffered; a `with` of it turns what the system refuses into a CheckpointError that
    names it, also where it is read by its number."""

    def exactly(self, count: int) -> bytes:
        """The next `count` bytes, which may come fewer at a time; CheckpointError where there are not so many."""
        pieces = []
        try:
            while count and (piece := self.read(count)):
                pieces.append(piece)
                count -= len(piece)
        except OSError as error:
            raise cannot_read(self.name, error) from None
        if count:
            raise CheckpointError(f"{self.name} became shorter while it was read; fetch it again")
        return b"".join(pieces)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
        if isinstance(error, OSError):
            raise cannot_read(self.name, error) from None


def cannot_read(path: object, error: OSError) -> CheckpointError:
    """What is said where the system refuses to read an input."""
    return CheckpointError(f"{path} cannot be read ({error.strerror or error}): look at its disk, or fetch it again")


def open_regular(path: str | Path) -> InputFile:
    """Opens a file; raises CheckpointError for what is no readable regular file, without blocking on it."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            return InputFile(path)
    except FileNotFoundError:
        where = f"is a link to {os.readlink(path)}, which is missing" if os.path.islink(path) else "does not exist"
        raise CheckpointError(f"{path} {where}; mend the path, or fetch the file first") from None
    except PermissionError:
        raise CheckpointError(f"{path} may not be read: change its permissions or those of its folder") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {error}; mend the path") from None
    kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device or socket"
    raise CheckpointError(f"{path} is {kind} where a file is wanted; mend the path")


def read_small(path: str | Path) -> bytes:
    """All of a file that is no weights; raises CheckpointError for what is longer than `LONGEST_JSON`."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LONGEST_JSON:
            raise CheckpointError(
                f"{path} has {size} bytes, more than the {LONGEST_JSON} that are read; fetch it again"
            )
        return file.readall()


def looks_like(head: bytes) -> str | None:
    """What a file is that begins so and should have held a model, with the remedy; None for nothing known."""
    if head[8:9] == b"{":
        return None
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs.github.com/"):
        return "is a git-LFS pointer, not the file itself: run `git lfs pull` in its repository"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "is an HTML page, not the file itself: download it again, logged in where the model is gated"
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return f"is a zip or pickle, as torch.save writes them: {CONVERT}"
    if head.startswith(b"GGUF"):
        return "is a GGUF file: merge the safetensors that it was made from, and convert the result"
    return None


#: The remedy for files of torch.save.
CONVERT = (
    "pickle is never loaded here; convert it to safetensors, for example with transformers' save_pretrained, "
    "where you trust its source"
)


def parse_json(data: bytes) -> Any:
    """Parses JSON as strictly as the safetensors library, and refuses duplicate keys; ValueError gives the reason."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its JSON is not UTF-8 at byte {error.start}") from None
    try:
        document = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer if "-0" in text else None,
            parse_float=_float,
            parse_constant=_constant,
        )
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a string in its JSON holds half a surrogate pair") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"its JSON is invalid: {error.msg} at character {error.pos}") from None
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice!r} is there twice")
    return entries


def _integer(text: str) -> float:
    return -0.0 if text == "-0" else int(text)  # the safetensors library takes -0 for no integer


def _float(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"the number {text} is out of range")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _parse(file: InputFile, size: int) -> Header:
    """The header of an open file of `size` bytes; ValueError says what is wrong with it."""
    if size < 8:
        raise ValueError(f"it has {size} bytes, fewer than the 8 of a header's length")
    (length,) = struct.unpack("<Q", file.exactly(8))
    if length > min(LONGEST_JSON, size - 8):
        limit = f"longer than {LONGEST_JSON}" if length > LONGEST_JSON else f"beyond the file's {size} bytes"
        raise ValueError(f"it gives its header {length} bytes, {limit}")
    data = file.exactly(length)
    header = _known.get((data, size))
    if header is None:
        header = _known[data, size] = _header(data, size)
    return header


#: Headers in use, by their text and the size of the file: models of one architecture mostly have the same, and one look
#: at it will do.
_known: WeakValueDictionary[tuple[bytes, int], Header] = WeakValueDictionary()


def _header(data: bytes, size: int) -> Header:
    if data[:1] != b"{":
        raise ValueError("its header does not begin with `{`")
    if data.rstrip(b" ")[-1:] != b"}":
        raise ValueError("its header does not end with `}` and spaces")
    document = parse_json(data)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise ValueError("its __metadata__ is not a flat object of strings")
    start = 8 + len(data)
    tensors = [_tensor(name, entry, start) for name, entry in document.items()]
    tensors.sort(key=attrgetter("begin", "end"))
    end = start
    for tensor in tensors:
        if tensor.begin != end:
            gap = "a hole before" if tensor.begin > end else "an overlap at"
            raise ValueError(f"there is {gap} the bytes of tensor {tensor.name!r}")
        end = tensor.end
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, the file at {size}")
    return Header({tensor.name: tensor for tensor in tensors}, metadata, size)


def _tensor(name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sound = type(dtype) is str and type(shape) is list and type(begin) is type(end) is int
        bits = _bits(dtype, *shape) if sound else None
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or (len(entry) > 3 and nesting(entry) >= DEEPEST):
        raise ValueError(f"the entry of tensor {name!r} is not a dtype, a shape and two data_offsets")
    if not name or "\0" in name:
        raise ValueError(f"tensor name {name!r} is empty or holds a NUL")
    if dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if bits is None or bits != (end - begin) * 8:
        raise ValueError(
            f"tensor {name!r} of dtype {dtype} and shape {shape} does not fit its data_offsets [{begin}, {end}]"
        )
    return TensorInfo(name, dtype, tuple(shape), start + begin, start + end)


@lru_cache(typed=True)
def _bits(dtype: str, *shape: int) -> int | None:
    """How many bits a tensor has, None where there is no such shape or dtype; TypeError for what is no integer."""
    if not {int}.issuperset(map(type, shape)):
        raise TypeError
    possible = dtype in DTYPE_BITS and min(shape, default=0) >= 0 and not (0 in shape and _overflows(shape))
    return math.prod(shape) * DTYPE_BITS[dtype] if possible else None


def _overflows(shape: tuple[int, ...]) -> bool:
    """Whether a dimension, or a product from the left, is beyond 64 bits, as the safetensors library counts."""
    count = 1
    for dim in shape:
        count *= dim
        if max(dim, count) > _LARGEST:
            return True
    return False


def nesting(entry: dict[str, Any]) -> int:
    """How many objects and arrays lie inside one another."""
    depth = 0
    layer: list[Any] = [entry]
    while layer := [item for item in layer if isinstance(item, dict | list)]:
        depth += 1
        layer = [child for item in layer for child in (item.values() if isinstance(item, dict) else item)]
    return depth
