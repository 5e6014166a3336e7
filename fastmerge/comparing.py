"""Two checkpoints held against one another, tensor by tensor."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import backends, memory
from .checkpoint import DTYPE_BITS, Checkpoint, TensorInfo, naming_what_changed, open_checkpoint
from .checkpoint.header import open_regular
from .lora.fusing import recipe_of
from .planner import plan
from .sources.lora import Adapted
from .sweep import Inputs, Part, Run, Sweep, View

Name = str | os.PathLike[str]


@dataclass(slots=True)
class _Sums:
    """What adds up over the parts of tensors, in float64."""

    elements: int = 0
    differing: int = 0
    nonfinite: int = 0
    max: float = 0.0
    squares: float = 0.0  # of the differences
    products: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2)))  # of the weights
    deltas: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 2)))  # of those from the base
    agreeing: int = 0
    opposed: int = 0

    def add(self, part: _Sums) -> None:
        for each in fields(self):
            one, two = getattr(self, each.name), getattr(part, each.name)
            setattr(self, each.name, max(one, two) if each.name == "max" else one + two)


@dataclass(frozen=True, slots=True)
class Difference:
    """How a tensor, or all together, differs; None is what there is not.

    `differing` elements have other bits where the dtypes are the same, else other values. Of NaN and Inf, in any of the
    models, there are `nonfinite`; these elements count for nothing that follows. `max` and `rms` are of a - b;
    `sign_agreement` is the share of the elements with the same sign among those that differ from the base in both, and
    `delta_cosine` the cosine of a - base and b - base.
    """

    name: str
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    elements: int
    differing: int
    nonfinite: int
    max: float | None
    rms: float | None
    cosine: float | None
    sign_agreement: float | None
    delta_cosine: float | None


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor of which the two have another shape each, or no dtypes that compare."""

    name: str
    dtypes: tuple[str, str]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `diff` found: each tensor that is in both, in the order of `a`; `total` is all of them as one."""

    a: str
    b: str
    base: str | None
    tensors: tuple[Difference, ...]
    total: Difference
    mismatched: tuple[Mismatch, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the two have the same tensors of the same dtypes with the same bits."""
        dtypes = all(one == two for one, two in (each.dtypes for each in self.tensors))
        return dtypes and not (self.total.differing or self.mismatched or self.only_in_a or self.only_in_b)

    @property
    def worst(self) -> tuple[Difference, ...]:
        """The tensors that differ, those with the largest rms difference first."""
        apart = [each for each in self.tensors if each.differing or each.dtypes[0] != each.dtypes[1]]
        return tuple(sorted(apart, key=lambda each: (-(each.rms or 0.0), -each.differing, each.name)))

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for json.dumps."""
        total = _plain(self.total)
        for key in ("name", "dtypes", "shape"):
            del total[key]
        return {
            "a": self.a,
            "b": self.b,
            "base": self.base,
            "same": self.same,
            "total": total,
            "tensors": [_plain(each) for each in self.tensors],
            "mismatched": [_plain(each) for each in self.mismatched],
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
        }


def _plain(each: Difference | Mismatch) -> dict[str, Any]:
    return {at.name: getattr(each, at.name) for at in fields(each)}


def diff(
    a: Name,
    b: Name,
    *,
    base: Name | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compares two checkpoints by the names of their tensors, some megabytes at a time.

    Differences of 16-bit and 32-bit floats are taken in float32, and summed in float64; others are all float64. Of
    8-bit floats and smaller the bytes are compared, and nothing more is said.

    Args:
        a: a folder or file, an id on the hub, or either with an adapter, ``base+adapter``.
        b: likewise.
        base: likewise: what the task vectors of both are taken from, where it has the tensor in their shape.
        threads: workers; by default one for each processor that this process may use.
        progress: called with (bytes compared, bytes in all), on this thread.

    Raises:
        CheckpointError: one of them is no sound model.
    """
    models = [_opened(name) for name in ((a, b) if base is None else (a, b, base))]
    one, two, *origin = models
    both = [name for name in one.tensors if name in two.tensors]
    fits = [name for name in both if _fit(one.tensors[name], two.tensors[name])]
    total_bytes = sum(one.tensors[name].nbytes + two.tensors[name].nbytes for name in fits)
    found, total, done = [], _Sums(), 0
    # An adapter's product is kept for one tensor at a time.
    workers = 1 if any(isinstance(model, Adapted) for model in models) else backends.workers(threads)
    pool = ThreadPoolExecutor(workers)
    try:
        with naming_what_changed(*models):
            for name, sums in zip(fits, pool.map(lambda name: _compared(name, one, two, *origin), fits), strict=True):
                infos = one.tensors[name], two.tensors[name]
                found.append(_difference(name, infos, sums))
                total.add(sums)
                done += infos[0].nbytes + infos[1].nbytes
                if progress:
                    progress(done, total_bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    return Comparison(
        one.name,
        two.name,
        origin[0].name if origin else None,
        tuple(found),
        _difference("", None, total),
        tuple(_mismatch(one.tensors[name], two.tensors[name]) for name in both if name not in set(fits)),
        tuple(name for name in one.tensors if name not in two.tensors),
        tuple(name for name in two.tensors if name not in one.tensors),
    )


def _opened(name: Name) -> Checkpoint:
    """A folder or a file, else what a recipe finds under the name."""
    if os.path.exists(name):
        return open_checkpoint(os.fspath(name))
    (stage,) = plan(recipe_of("passthrough", None, [(os.fspath(name), {})], {})).stages
    (held,) = stage.models
    assert isinstance(held, Checkpoint), "a recipe of one document has no other stage"
    return held


def _fit(one: TensorInfo, two: TensorInfo) -> bool:
    return one.shape == two.shape and (one.dtype == two.dtype or {one.dtype, two.dtype} <= _NUMPY.keys())


def _mismatch(one: TensorInfo, two: TensorInfo) -> Mismatch:
    return Mismatch(one.name, (one.dtype, two.dtype), (one.shape, two.shape))


def _difference(name: str, infos: tuple[TensorInfo, TensorInfo] | None, sums: _Sums) -> Difference:
    dtypes = ("", "") if infos is None else (infos[0].dtype, infos[1].dtype)
    finite = sums.elements - sums.nonfinite if infos is None or dtypes[0] in _NUMPY else 0
    voting = sums.agreeing + sums.opposed
    return Difference(
        name,
        dtypes,
        () if infos is None else infos[0].shape,
        sums.elements,
        sums.differing,
        sums.nonfinite,
        _finite(sums.max) if finite else None,
        _finite(math.sqrt(sums.squares / finite)) if finite else None,
        _cosine(sums.products),
        sums.agreeing / voting if voting else None,
        _cosine(sums.deltas),
    )


def _cosine(products: NDArray[np.float64]) -> float | None:
    """None where one of the two is zero."""
    (one, both), (_, two) = products.tolist()
    norms = math.sqrt(one) * math.sqrt(two)
    return _finite(min(1.0, max(-1.0, both / norms))) if norms else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- a tensor ---

_TILE = 1 << 18  # elements, whose bytes stay in the cache
_SMALL = 1 << 14  # elements that are widened: larger arrays are new pages each time, and take 10 times as long
_ONE = Sweep((Part(),))
#: Dtypes whose elements are compared as numbers, and how numpy has them; BF16 as the upper half of float32.
_NUMPY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "BOOL": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
}
#: The bits of an exponent that is so large that NaN or Inf has it, or that a difference may become Inf.
_LARGE = {"F32": 0x7F000000, "BF16": 0x7F00, "F16": 0x7C00}


def _compared(name: str, one: Checkpoint, two: Checkpoint, base: Checkpoint | None = None) -> _Sums:
    info, total = one.tensors[name], _Sums()
    if base is not None and (name not in base.tensors or not _based(info, base.tensors[name])):
        base = None
    models = [model for model in (one, two, base) if model]
    width = math.prod(info.shape[1:]) if any(isinstance(model, Adapted) for model in models) else 1
    step = max(1, _TILE // max(1, width)) * width
    for begin in range(0, info.elements, step) if step else ():
        end = min(begin + step, info.elements)
        total.add(_part([_read(model, name, begin, end) for model in models], end - begin))
    return total


def _based(info: TensorInfo, base: TensorInfo) -> bool:
    return info.shape == base.shape and {info.dtype, base.dtype} <= _NUMPY.keys()


class _Tile(NamedTuple):
    """Some elements of a tensor as bytes."""

    raw: NDArray[np.uint8]
    dtype: str

    def part(self, begin: int, end: int) -> _Tile:
        size = DTYPE_BITS[self.dtype] // 8
        return _Tile(self.raw[begin * size : end * size], self.dtype)

    @property
    def values(self) -> NDArray[Any]:
        """The elements as numbers."""
        if self.dtype == "BF16":
            return (self.raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        values: NDArray[Any] = self.raw.view(_NUMPY[self.dtype])
        return values

    @property
    def bits(self) -> NDArray[Any]:
        """The elements as unsigned integers; the bytes where an element is no whole number of them."""
        bits: NDArray[Any] = self.raw.view(f"u{max(8, DTYPE_BITS[self.dtype]) // 8}")
        return bits

    @property
    def large(self) -> bool:
        """Whether NaN, Inf, or what is near to that, is there."""
        exponent = self.bits.dtype.type(_LARGE[self.dtype])
        return bool(((self.bits & exponent) == exponent).any())


def _read(model: Checkpoint, name: str, begin: int, end: int) -> _Tile:
    """Elements [begin, end) of a tensor; those that an adapter changes are computed, in whole rows."""
    info = model.tensors[name]
    if isinstance(model, Adapted):
        if model.computed(name):
            dtype = "F64" if info.dtype == "F64" else "F32"
            width = math.prod(info.shape[1:])
            made = np.empty(((end - begin) // width, width), _NUMPY[dtype])
            model.fill(name, begin // width, made)
            return _Tile(made.reshape(-1).view(np.uint8), dtype)
        held, name = model.stored(name)
        assert isinstance(held, Checkpoint), "there are no stages here"
        model, info = held, held.tensors[name]
    first, last = (info.begin + at * DTYPE_BITS[info.dtype] // 8 for at in (begin, end))
    raw = np.empty(last - first, np.uint8)
    with open_regular(model.file_of(name)) as file:
        memory.load(file.fileno(), first, raw.data)
    return _Tile(raw, info.dtype)


def _part(tiles: Sequence[_Tile], elements: int) -> _Sums:
    one, two, *_ = tiles
    if one.dtype == two.dtype:
        sums = _Sums(elements, int(np.count_nonzero(one.bits != two.bits)))
    else:
        sums = _Sums(elements, sum(_differing(*each) for each in _widened((one, two), elements)))
    if one.dtype in _NUMPY:
        core = _core()
        if core is not None and all(tile.dtype in _LARGE and not tile.large for tile in tiles):
            _by_ops(core, tiles, sums)
        else:
            _by_numpy(tiles, sums)
    return sums


def _widened(tiles: Sequence[_Tile], elements: int) -> Iterator[list[NDArray[Any]]]:
    """The values of tiles, some at a time."""
    for begin in range(0, elements, _SMALL):
        yield [tile.part(begin, begin + _SMALL).values for tile in tiles]


def _differing(a: NDArray[Any], b: NDArray[Any]) -> int:
    return int(np.count_nonzero((a != b) & ~(np.isnan(a) & np.isnan(b))))


@cache
def _core() -> backends.Provider | None:
    return None if backends.why_not("cpu") else backends.provider("cpu")


def _by_ops(core: backends.Provider, tiles: Sequence[_Tile], sums: _Sums) -> None:
    """Norms and inner products by the compiled core, which counts what is Inf as 0: there is none."""
    run, (a, b, *base) = Run(), [View(tile.raw.ctypes.data, tile.dtype) for tile in tiles]
    (sums.products,) = core.gram([Inputs(sums.elements, (a, b))], run)
    (norms,) = core.norms([Inputs(sums.elements, (a,), b)], [_ONE], run)  # [1, 2, 3]
    _, l2, sums.max = norms[0, 0].tolist()
    sums.squares = l2 * l2
    if base:
        (sums.deltas,) = core.gram([Inputs(sums.elements, (a, b), base[0])], run)
        for values in _widened(tiles, sums.elements):
            _vote(values, sums)


def _by_numpy(tiles: Sequence[_Tile], sums: _Sums) -> None:
    """The same in float64, without the elements that are not finite."""
    wide = [tile.values.astype(np.float64) for tile in tiles]
    finite = np.logical_and.reduce([np.isfinite(each) for each in wide])
    a, b, *base = (each[finite] for each in wide)
    sums.nonfinite = sums.elements - len(a)
    with np.errstate(over="ignore", invalid="ignore"):
        sums.products = _gram(a, b)
        sums.max = float(np.abs(a - b).max(initial=0.0))
        sums.squares = float(np.square(a - b).sum())
        if base:
            sums.deltas = _gram(a - base[0], b - base[0])
            _vote([a, b, *base], sums)


def _gram(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([[(one * two).sum() for two in (a, b)] for one in (a, b)])


def _vote(values: Sequence[NDArray[Any]], sums: _Sums) -> None:
    a, b, base = values
    a_up, b_up, a_down, b_down = a > base, b > base, a < base, b < base
    sums.agreeing += int(np.count_nonzero(a_up & b_up) + np.count_nonzero(a_down & b_down))
    sums.opposed += int(np.count_nonzero(a_up & b_down) + np.count_nonzero(a_down & b_up))
