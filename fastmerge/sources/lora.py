"""A model with a LoRA adapter: its tensors as they are stored, or computed, some rows at a time.

    W + scaling * B A

in float32: the sum over the rank starts from 0 and runs in its order, then it is scaled, then the weight is added, and
nothing is fused, so that the bits are the same everywhere. In float64 where W is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from .. import memory
from ..checkpoint import DTYPE_BITS, Checkpoint, TensorInfo, same_bytes, tokenizer_files
from ..checkpoint.header import open_regular
from ..errors import CheckpointError
from ..sweep import View
from .adapter import Adapter, Update

Rows = NDArray[Any]  # of float32, or of float64 where the model is


class Base(Protocol):
    """What an adapter is applied to: a `Checkpoint`, or as far as headers go what a stage will write."""

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def folder(self) -> Path: ...


class Adapted(Checkpoint):
    """A model with an adapter; of a tensor that is `computed`, `address` and `file_of` tell of its weights before the
    adapter is applied.

    Raises CheckpointError where a tensor of the adapter has no place in the model, or another shape there.
    """

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter
        self.name = f"{base.name}+{adapter.name}"
        self.path, *_ = self.inputs
        self.folder = base.folder
        self.commit = None
        self.files = (*base.files, *adapter.weights.files)
        places = _Places(base, adapter)
        self._replaced = places.replaced
        self._products = places.products
        self.tensors: Mapping[str, TensorInfo] = places.tensors
        self.config: dict[str, Any] = places.config
        self._factors: tuple[str, _Factors] | None = None

    def over(self, base: Checkpoint) -> Adapted:
        """The adapter over another model of the same tensors: over what a stage has written by now."""
        return Adapted(base, self.adapter)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Where it lies, in which nothing may be written."""
        own = (self.base.path,) if isinstance(self.base, Checkpoint) else ()
        return (*own, self.adapter.folder)

    @property
    def commits(self) -> dict[str, str]:
        """What each half was on the hub, by its name."""
        halves = (self.base, self.adapter)
        return {half.name: half.commit for half in halves if isinstance(half, Checkpoint | Adapter) and half.commit}

    @property
    def moves_head(self) -> bool:
        """Whether it changes embeddings that are its head, too, and PEFT those alone."""
        heads = any(_HEAD.search(name) for name in self.tensors)
        adds = any(update.embedding for update in self.adapter.updates)
        sizes = [(size,) for size in _values("vocab_size", self.config)]
        saved = any(
            name.removesuffix(".weight").endswith(self.adapter.saved) and self.tensors[name].shape[:1] in sizes
            for name in self._replaced
        )
        return (adds or saved) and not heads and True in _values("tie_word_embeddings", self.config)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The adapter's, where it has the tokenizer that counts: it changes the vocabulary, or the base has none."""
        grown = any(self.tensors[name].shape != info.shape for name, info in self.base.tensors.items())
        theirs = bool(tokenizer_files(self.adapter.folder)) and (grown or not tokenizer_files(self.folder))
        return self.adapter.folder if theirs else None

    def computed(self, tensor: str) -> bool:
        """Whether its values are stored nowhere as they are."""
        return tensor in self._products or self._other_dtype(tensor)

    def stored(self, tensor: str) -> tuple[Base, str]:
        """The model, which may be another, that holds a tensor, before the adapter is applied; and its name there."""
        info = self._replaced.get(tensor)
        return (self.base, tensor) if info is None else (self.adapter.weights, info.name)

    def file_of(self, tensor: str) -> Path:
        """The file that holds a tensor."""
        return self._holder(tensor).file_of(self.stored(tensor)[1])

    def address(self, tensor: str) -> tuple[int, object]:
        """The address of a tensor's first byte, and the owner that keeps it mapped while referenced."""
        return self._holder(tensor).address(self.stored(tensor)[1])

    def check_unchanged(self) -> None:
        """Raises CheckpointError when a file of either is not what it was."""
        for half in (self.base, self.adapter.weights):
            if isinstance(half, Checkpoint):
                half.check_unchanged()

    def fill(self, tensor: str, first: int, out: Rows, threads: int = 1) -> None:
        """Rows first ... of a tensor that is computed, seen as a matrix [shape[0], width], into `out` [count, width]
        of float32 or float64."""
        count, width = out.shape
        weights, owner = self._weights(tensor, first, width)
        if tensor not in self._products:
            out[:] = _read(weights, count, width)
        else:
            factors = self._factors_of(tensor, threads)
            direct = out.dtype == factors.dtype and out.flags.c_contiguous
            made = out if direct else np.empty(out.shape, factors.dtype)
            factors.fill(weights, first, made, threads)
            if not direct:
                out[:] = made
        del owner  # it was mapped until here

    def _weights(self, tensor: str, first: int, width: int) -> tuple[View, object]:
        """Rows before the adapter is applied, and what keeps them mapped."""
        model, name = self._holder(tensor), self.stored(tensor)[1]
        dtype = model.tensors[name].dtype
        address, owner = model.address(name)
        return View(address + first * width * DTYPE_BITS[dtype] // 8, dtype), owner

    def _factors_of(self, tensor: str, threads: int) -> _Factors:
        """Those of the tensor that was asked for last are kept."""
        if self._factors is None or self._factors[0] != tensor:
            self._factors = None
            model, name = self.stored(tensor)
            shape = self.tensors[tensor].shape
            dtype = np.float64 if model.tensors[name].dtype == "F64" else np.float32
            factors = _Factors(self.adapter.weights, self._products[tensor], dtype)
            if factors.magnitude is not None and self._products[tensor].turned:
                factors.columns = self._columns(tensor, factors, shape, threads)
            self._factors = tensor, factors
        return self._factors[1]

    def _columns(self, tensor: str, factors: _Factors, shape: tuple[int, ...], threads: int) -> Rows:
        """DoRA's factors of columns, which come from all rows."""
        rows, width = shape
        step = max(1, _AT_ONCE // max(1, width))
        sums = np.zeros(width)
        for first in range(0, rows, step):
            weights, owner = self._weights(tensor, first, width)
            made = np.empty((min(step, rows - first), width), factors.dtype)
            factors.add(weights, first, made, threads)
            sums += np.square(made, dtype=np.float64).sum(0)
            del owner
        return factors.over_norms(sums, slice(None))

    def _holder(self, tensor: str) -> Checkpoint:
        model, _ = self.stored(tensor)
        assert isinstance(model, Checkpoint), "what an earlier stage makes is read when it is written"
        return model

    def _other_dtype(self, tensor: str) -> bool:
        info = self._replaced.get(tensor)
        return info is not None and info.dtype != self.tensors[tensor].dtype


# --- the arithmetic ---


class _Product(NamedTuple):
    """What is added to a tensor: scaling * `b` `a`, or its transpose where that is how the tensor is stored; `a` is 1
    where there is none."""

    b: TensorInfo
    a: TensorInfo | None
    scaling: float
    turned: bool
    magnitude: TensorInfo | None


class _Factors:
    """A product's thin matrices in memory: `left` [rows, rank] and `right` [rank, width]."""

    def __init__(self, weights: Checkpoint, product: _Product, dtype: type[np.float32] | type[np.float64]) -> None:
        self.dtype = dtype
        self.scaling = product.scaling
        left = _matrix(weights, product.b, dtype)
        right = np.ones((1, 1), dtype) if product.a is None else _matrix(weights, product.a, dtype)
        if product.turned:
            left, right = right.T, left.T
        self.left, self.right = np.ascontiguousarray(left), np.ascontiguousarray(right)
        core = _core() if dtype is np.float32 else None
        self.blocks = None if core is None else core.in_blocks(self.right)
        self.magnitude = None if product.magnitude is None else _matrix(weights, product.magnitude, np.float64).ravel()
        self.columns: Rows | None = None

    def fill(self, weights: View, first: int, out: Rows, threads: int) -> None:
        """Rows first ..., with DoRA where there is a magnitude: each output of a layer over its norm, times that."""
        self.add(weights, first, out, threads)
        with np.errstate(all="ignore"):
            if self.columns is not None:
                out *= self.columns
            elif self.magnitude is not None:
                sums = np.square(out, dtype=np.float64).sum(1)
                out *= self.over_norms(sums, slice(first, first + len(out)))[:, None]

    def add(self, weights: View, first: int, out: Rows, threads: int) -> None:
        left = self.left[first : first + len(out)]
        core = _core()
        if self.blocks is not None and core is not None:
            core.lowrank(weights, left, self.blocks, self.scaling, out, threads)
        else:
            out[:] = added(_read(weights, *out.shape), left, self.right, self.scaling)

    def over_norms(self, sums_of_squares: NDArray[np.float64], part: slice) -> Rows:
        assert self.magnitude is not None
        with np.errstate(all="ignore"):
            factors: Rows = (self.magnitude[part] / np.sqrt(sums_of_squares)).astype(self.dtype)
        return factors


def added(weights: Rows, left: Rows, right: Rows, scaling: float) -> Rows:
    """The definition: weights [rows, width] + scaling * left [rows, rank] right [rank, width], in their dtype."""
    total = np.zeros_like(weights)
    with np.errstate(all="ignore"):
        for k in range(len(right)):
            total += left[:, k : k + 1] * right[k]
        total *= scaling
        total += weights
    return total


@cache
def _core() -> ModuleType | None:
    """The compiled core, where there is one; it gives the same bits, sooner."""
    try:
        from .. import native
    except ImportError:
        return None
    return native


_AT_ONCE = 1 << 18  # elements


def _matrix(weights: Checkpoint, info: TensorInfo, dtype: type[np.float32] | type[np.float64]) -> Rows:
    raw = np.empty(info.nbytes, np.uint8)
    with open_regular(weights.file_of(info.name)) as file:
        memory.load(file.fileno(), info.begin, raw.data)
    return widened(raw, info.dtype).reshape(info.shape[0], -1).astype(dtype)


def _read(weights: View, count: int, width: int) -> Rows:
    raw = np.empty(count * width * DTYPE_BITS[weights.dtype] // 8, np.uint8)
    memory.read(weights.address, raw.data)
    return widened(raw, weights.dtype).reshape(count, width)


def widened(raw: NDArray[np.uint8], dtype: str) -> Rows:
    """Bytes of a floating-point dtype as float32, or float64 where they are that."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16).astype(np.float32) if dtype == "F16" else raw.view(_NUMPY[dtype])


_NUMPY: dict[str, type[np.float32] | type[np.float64]] = {"F32": np.float32, "F64": np.float64}


# --- where an adapter's tensors go ---

_FLOATS = ("F32", "F16", "BF16", "F64")
_HEAD = re.compile(r"(^|\.)(\w*head|embed_out)\.")
_LISTED = 20  # names in one message


class _Places:
    """Finds the tensors of a model that those of an adapter are for."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.roots = sorted({name.partition(".")[0] for name in base.tensors})
        self.lost: list[TensorInfo] = []
        self.replaced: dict[str, TensorInfo] = {}
        for name, info in adapter.replaced.items():
            self.put(self.replaced, name, info, info)
        self.lost = [info for info in self.lost if not self.is_copy(info)]
        updates: dict[str, Update] = {}
        biases: dict[str, Update] = {}
        for update in adapter.updates:
            self.put(updates, f"{update.module}.weight", update.a, update)
            if update.bias is not None:
                self.put(biases, f"{update.module}.bias", update.bias, update)
        if self.lost:
            raise CheckpointError(self.homeless())
        self.tensors = {**base.tensors, **{name: self.replacing(name, info) for name, info in self.replaced.items()}}
        self.config = self.resized()
        products = {name: self.product(name, update) for name, update in updates.items()}
        self.products = {**products, **{name: self.of_bias(name, update) for name, update in biases.items()}}

    # --- names ---

    def put(self, into: dict[str, _T], name: str, info: TensorInfo, value: _T) -> None:
        home = self.home(name, info)
        if home is None:
            self.lost.append(info)
        elif home in into:
            raise self.error(f"two of its tensors are for {home!r} of {self.base.name}, {info.name!r} the second")
        else:
            into[home] = value

    def home(self, name: str, info: TensorInfo) -> str | None:
        """The name in the model: the same; else with or without a first part, which models with a head have more."""
        tensors = self.base.tensors
        if name in tensors:
            return name
        others = (name.partition(".")[2], *(f"{root}.{name}" for root in self.roots))
        found = [other for other in others if other in tensors]
        if len(found) > 1:
            raise self.error(f"{info.name!r} may be for {found[0]!r} or {found[1]!r} of {self.base.name}")
        return found[0] if found else None

    def is_copy(self, info: TensorInfo) -> bool:
        """Whether it is the other of two tied tensors, of which the model has one."""
        weights = self.adapter.weights
        same = (other for other in self.replaced.values() if other.shape == info.shape)
        return any(same_bytes(weights, info.name, weights, other.name) for other in same)

    def homeless(self) -> str:
        names = [info.name for info in self.lost]
        listed = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        if True in _values("tie_word_embeddings", self.base.config) and all(_HEAD.search(name) for name in names):
            remedy = "its head is tied to its embeddings, so save it untied first"
        else:
            trained_on = self.adapter.trained_on
            remedy = "take the base that it was trained on" + (f", {trained_on}" if trained_on else "")
        return f"{self.adapter.name}: these tensors have no place in {self.base.name}: {listed}; {remedy}"

    # --- shapes ---

    def product(self, name: str, update: Update) -> _Product:
        """What is added to a weight, by its shape; a square one is stored as its neighbours are."""
        shape, a, b = self.tensors[name].shape, update.a, update.b
        out, inputs = b.shape[0], a.shape[1:]
        plain = shape == (out, *inputs) and not update.embedding
        turned = shape == (*inputs, out) and len(shape) == 2
        if plain and turned:
            turned = self.by_inputs(name)
        if not plain and not turned:
            pair = f"{a.name!r} is {list(a.shape)} and {b.name!r} {list(b.shape)}"
            raise self.error(f"{pair}, which does not fit {name!r} of {self.base.name}, {list(shape)}")
        return self.sound(name, _Product(b, a, update.scaling, turned, update.magnitude))

    def of_bias(self, name: str, update: Update) -> _Product:
        assert update.bias is not None
        if self.tensors[name].shape != update.bias.shape:
            shapes = f"is {list(update.bias.shape)}, and {name!r} of {self.base.name} {list(self.tensors[name].shape)}"
            raise self.error(f"{update.bias.name!r} {shapes}")
        return self.sound(name, _Product(update.bias, None, update.scaling, False, None))

    def sound(self, name: str, product: _Product) -> _Product:
        if (dtype := self.tensors[name].dtype) not in _FLOATS:
            raise self.error(f"{name!r} is {dtype} in {self.base.name}: dequantise that first")
        return product

    def by_inputs(self, name: str) -> bool:
        """Whether a square weight is [in, out], as its nearest neighbour is that is known; else as the adapter says."""
        near = max(self.known, key=lambda module: common_parts(module, name), default=None)
        return self.adapter.fan_in_fan_out if near is None else self.known[near]

    @cached_property
    def known(self) -> dict[str, bool]:
        """Whether modules store [in, out], where their bias tells."""
        tensors = self.base.tensors
        modules = [(name[: -len(".bias")], info.shape) for name, info in tensors.items() if name.endswith(".bias")]
        weights = [(module, bias, info.shape) for module, bias in modules if (info := tensors.get(f"{module}.weight"))]
        return {
            module: (shape[1],) == bias
            for module, bias, shape in weights
            if len(shape) == 2 and shape[0] != shape[1] and bias in ((shape[0],), (shape[1],))
        }

    def replacing(self, name: str, info: TensorInfo) -> TensorInfo:
        """A tensor in the place of another keeps its dtype, and its shape except for the size of the vocabulary."""
        was = self.base.tensors[name]
        rows = was.shape[:1] in [(size,) for size in _values("vocab_size", self.base.config)] and len(info.shape) > 0
        if info.shape != was.shape and not (rows and info.shape[1:] == was.shape[1:]):
            raise self.error(f"{info.name!r} is {list(info.shape)}, and {name!r} of {self.base.name} {list(was.shape)}")
        if was.dtype not in _FLOATS:
            raise self.error(f"{name!r} is {was.dtype} in {self.base.name}, and {info.name!r} {info.dtype}")
        return info._replace(name=name, dtype=was.dtype)

    def resized(self) -> dict[str, Any]:
        """The model's config with the size of its vocabulary, which all tensors of that many rows share."""
        before, now = self.base.tensors, self.tensors
        grown = {before[name].shape[0]: name for name in self.replaced if before[name].shape != now[name].shape}
        for was, name in grown.items():
            size = now[name].shape[0]
            for other, info in now.items():
                if before[other].shape[:1] == (was,) and info.shape[0] != size:
                    fault = f"its {name!r} has {size} rows, and {other!r} has {info.shape[0]}"
                    raise self.error(f"{fault}: save it with all embeddings and heads (save_embedding_layers=True)")
        return _with_vocab_size(self.base.config, {was: now[name].shape[0] for was, name in grown.items()})

    def error(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self.adapter.name}: {fault}")


_T = TypeVar("_T")


def common_parts(one: str, two: str) -> int:
    """How many parts of two names are the same from the start."""
    pairs = zip(one.split("."), two.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _values(key: str, config: Mapping[str, Any]) -> Iterator[Any]:
    """What a config, and those within it, say."""
    for name, value in config.items():
        if name == key:
            yield value
        elif isinstance(value, dict):
            yield from _values(key, value)


def _with_vocab_size(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[str, Any]:
    def changed(key: str, value: Any) -> Any:
        if key == "vocab_size":
            return sizes.get(value, value)
        return _with_vocab_size(value, sizes) if isinstance(value, dict) else value

    return {key: changed(key, value) for key, value in config.items()}
