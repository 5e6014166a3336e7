"""Tensors of torch, of numpy and of whatever speaks DLPack, where they lie: address, dtype, shape and device.

A library is looked at where a tensor of it is given, and torch imported where DLPack or a new tensor wants it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import memory
from .checkpoint import DTYPE_BITS
from .errors import MismatchError
from .sweep import Run

CPU = "cpu"


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor in memory that is contiguous, and kept there by its `value`, which is torch's or numpy's.

    `dtype` is a safetensors name, and `device` is "cpu" or, with its number, "cuda:0".
    """

    value: Any
    address: int
    dtype: str
    shape: tuple[int, ...]
    device: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def of_torch(self) -> bool:
        return not isinstance(self.value, np.ndarray)


def held(value: Any, name: str) -> Held:
    """A tensor as it lies; `name` is what errors call it.

    Raises:
        TypeError: it is no tensor.
        MismatchError: it has no memory that can be read in one piece, on a CPU or a GPU of CUDA.
    """
    if isinstance(value, Held):
        return value
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return _of_torch(value, name)
    if isinstance(value, np.ndarray):
        return _of_numpy(value, name)
    if hasattr(value, "__dlpack__"):
        return held(_from_dlpack(value, name), name)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    wanted = "a tensor of torch, an array of numpy, or what has __dlpack__"
    raise TypeError(f"{name} is a {kind}: give {wanted}")


def writable(value: Any, name: str) -> Held:
    """A tensor of torch or numpy that is to be written; raises as `held`."""
    one = held(value, name)
    if one.value is not value and not isinstance(value, Held):
        raise MismatchError(f"{name} is written through DLPack by no one: give a tensor of torch or an array of numpy")
    if not one.of_torch and not one.value.flags.writeable:
        raise MismatchError(f"{name} is read-only: give an array that may be written")
    return one


def empty(dtype: str, shape: tuple[int, ...], device: str, of_torch: bool) -> Held:
    """A new tensor, whose values are whatever was there; on the CPU it begins with a line of the caches, as only such
    outputs are written past them."""
    if of_torch:
        import torch

        return _of_torch(torch.empty(shape, dtype=getattr(torch, _WORDS[dtype]), device=device), "a new tensor")
    try:
        kind = np.dtype(_WORDS[dtype])
    except TypeError:
        raise MismatchError(f"numpy has no {_WORDS[dtype]}: install torch, or import ml_dtypes") from None
    nbytes = math.prod(shape) * kind.itemsize
    room = np.empty(nbytes + _LINE, np.uint8)
    begin = -room.ctypes.data % _LINE
    return _of_numpy(room[begin : begin + nbytes].view(kind).reshape(shape), "a new array")


_LINE = 64


def copy(source: Held, into: Held) -> None:
    """The values of a tensor of the same dtype and shape on the same device."""
    if source.of_torch and into.of_torch:
        into.value.detach().copy_(source.value.detach())
    elif source.address != into.address:
        memory.write(memory.view(source.address, source.nbytes), into.address, -1)


def same_bytes(one: Held, other: Held) -> bool:
    """Whether two tensors on the same device hold the same bytes."""
    if one.nbytes != other.nbytes or one.device != other.device:
        return False
    if one.address == other.address:
        return True
    if one.device == CPU:
        return all(_read(one, begin) == _read(other, begin) for begin in range(0, one.nbytes, _PIECE))
    torch: Any = sys.modules["torch"]
    raw = [each.value.detach().reshape(-1).view(torch.uint8) for each in (one, other)]
    return bool(torch.equal(*raw))


def _read(one: Held, begin: int) -> bytearray:
    piece = bytearray(min(_PIECE, one.nbytes - begin))
    memory.read(one.address + begin, memoryview(piece))
    return piece


_PIECE = 1 << 20  # bytes compared at a time


def changed(one: Held) -> None:
    """Tells autograd that a tensor was written."""
    if one.of_torch:
        sys.modules["torch"].autograd.graph.increment_version(one.value)


def torch_is_there() -> bool:
    return find_spec("torch") is not None


@contextmanager
def running(device: str, threads: int) -> Iterator[Run]:
    """How ops run on a device: on a GPU on the current stream."""
    if device == CPU:
        yield Run(threads)
        return
    torch: Any = sys.modules["torch"]
    with torch.cuda.device(device):
        yield Run(device=torch.device(device).index, stream=torch.cuda.current_stream().cuda_stream)


# --- each library ---

#: What dtypes are called by safetensors, and by torch and numpy (some by ml_dtypes, with which numpy knows them).
_WORDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"{kind[0].upper()}{bits}": f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}
_NAMES = {word: name for name, word in _WORDS.items()}


def _of_torch(value: Any, name: str) -> Held:
    device = str(value.device)
    if value.device.type not in ("cpu", "cuda"):
        raise MismatchError(f"{name} lies on {device}: bring it to the CPU or a GPU of CUDA")
    if str(value.layout) != "torch.strided" or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise MismatchError(f"{name} is {kind}: make it dense")
    if not value.is_contiguous() or value.is_neg() or value.is_conj():
        raise _strided(name, ".contiguous()" if not value.is_contiguous() else ".resolve_neg().resolve_conj()")
    try:
        address = value.data_ptr()
    except RuntimeError:  # of those that torch.func transforms
        address = 0
    if not address and value.numel():
        raise MismatchError(f"{name} is a {type(value).__name__} without memory of its own: give the tensor it is of")
    return Held(value, address, _dtype(str(value.dtype).removeprefix("torch."), name), tuple(value.shape), device)


def _of_numpy(value: Any, name: str) -> Held:
    if not value.flags.c_contiguous:
        raise _strided(name, "numpy.ascontiguousarray")
    if not value.dtype.isnative:
        raise MismatchError(f"{name} has the bytes of its numbers swapped: bring it to the native order with .astype")
    return Held(value, value.ctypes.data, _dtype(value.dtype.name, name), value.shape, CPU)


def _strided(name: str, how: str) -> MismatchError:
    return MismatchError(f"{name} is not contiguous, and is not copied unasked: make it so with {how}")


@lru_cache
def _dtype(word: str, name: str) -> str:
    if word not in _NAMES:
        raise MismatchError(f"{name} holds {word}: what is merged is one of float64, float32, float16, bfloat16")
    return _NAMES[word]


def _from_dlpack(value: Any, name: str) -> Any:
    try:
        if torch_is_there():
            from torch.utils.dlpack import from_dlpack

            return from_dlpack(value)
        return np.from_dlpack(value)
    except Exception as error:  # what a stranger's __dlpack__ raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MismatchError(f"{name} cannot be had through DLPack ({reason}): give it as torch or numpy") from None
