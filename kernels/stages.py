"""What the kernels share: a row of a launch's table, the deltas of a block, and the stage `keep`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..sweep import Keep
from .random import pieces

_ABOVE = tl.constexpr(int(Keep.ABOVE))
_BERNOULLI = tl.constexpr(int(Keep.BERNOULLI))
_BAND = tl.constexpr(int(Keep.BAND))
_CLIP = tl.constexpr(int(Keep.CLIP))

#: The words of a row: elements, flat index of the first, where its notes are, then the addresses.
COUNT = tl.constexpr(0)
BEGIN = tl.constexpr(1)
NOTES = tl.constexpr(2)
ADDRESSES = tl.constexpr(3)

#: The words of a model in a setting: weight, rescale, magnitude, ties_end, cut, key, top_magnitude, top_ties_end.
PART = tl.constexpr(8)
WEIGHT = tl.constexpr(0)
RESCALE = tl.constexpr(1)
_MAGNITUDE = tl.constexpr(2)
_TIES_END = tl.constexpr(3)
_CUT = tl.constexpr(4)
_KEY = tl.constexpr(5)
_TOP_MAGNITUDE = tl.constexpr(6)
_TOP_TIES_END = tl.constexpr(7)

#: Neighbours that a thread has in its own registers, where a block has enough elements for all threads.
LANE = tl.constexpr(8)


@triton.jit
def work_of(table, span, block: tl.constexpr):
    """The program's row, and its blocks: the first, and one past the last."""
    entry = table + 2 * tl.program_id(0)
    row, first = table + tl.load(entry), tl.load(entry + 1)
    return row, first, tl.minimum(first + span, tl.cdiv(tl.load(row + COUNT), block))


@triton.jit
def inside_of(row, start, aligned: tl.constexpr, block: tl.constexpr):
    """Which elements of the block that begins at `start` there are."""
    left = tl.minimum(tl.load(row + COUNT) - start, block).to(tl.int32)
    if aligned:
        left = tl.multiple_of(left, 8)
    return tl.arange(0, block) < left


@triton.jit
def pointer_of(row, i: tl.constexpr, dtype: tl.constexpr, start, aligned: tl.constexpr):
    """To the element `start`, 64 bits wide, of the row's i-th address."""
    address = tl.load(row + ADDRESSES + i) + start * (dtype.primitive_bitwidth // 8)
    pointer = address.to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def load(row, i: tl.constexpr, dtype: tl.constexpr, start, place, inside, aligned: tl.constexpr):
    """Elements as float32; +0 outside."""
    values = tl.load(pointer_of(row, i, dtype, start, aligned) + place, mask=inside, other=0.0)
    if dtype == tl.bfloat16:  # in whole numbers: the interpreter's own conversion loses denormals
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def deltas_of(row, dtypes: tl.constexpr, has_base: tl.constexpr, start, place, inside, aligned: tl.constexpr):
    """The base, or zeros, and each model's delta. `dtypes` are those of the models, then of the base."""
    models: tl.constexpr = len(dtypes) - has_base
    base = tl.zeros(place.shape, tl.float32)
    if has_base:
        base = load(row, models, dtypes[models], start, place, inside, aligned)
    deltas = ()
    for m in tl.static_range(models):
        delta = load(row, m, dtypes[m], start, place, inside, aligned)
        if has_base:
            delta = delta - base
        deltas = deltas + (delta,)  # noqa: RUF005  the compiler knows tuples by their sum
    return base, deltas


@triton.jit
def magnitude_bits(values):
    """The bits of |values|, in the order of the magnitudes: NaN above infinity."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def number(words):
    """The float32 whose bits a word has."""
    return tl.load(words).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def keep(delta, part, start, how: tl.constexpr, block: tl.constexpr):
    """The delta where kept, +0 elsewhere, or clipped.

    `part` is the model's in the setting, `start` the flat index of the first element.
    """
    if how == _ABOVE:
        delta = tl.where(_above(delta, part + _MAGNITUDE, part + _TIES_END, start, block), delta, 0.0)
    if how == _BAND:
        kept = _above(delta, part + _MAGNITUDE, part + _TIES_END, start, block)
        gone = _above(delta, part + _TOP_MAGNITUDE, part + _TOP_TIES_END, start, block) & (delta == delta)
        delta = tl.where(kept & ~gone, delta, 0.0)
    if how == _CLIP:
        bits, limit = delta.to(tl.int32, bitcast=True), tl.load(part + _MAGNITUDE).to(tl.int32)
        clipped = (limit | (bits ^ (bits & 0x7FFFFFFF))).to(tl.float32, bitcast=True)
        delta = tl.where(tl.abs(delta) > limit.to(tl.float32, bitcast=True), clipped, delta)
    if how == _BERNOULLI:
        cut, key = tl.load(part + _CUT), tl.load(part + _KEY)
        first, upper = pieces(key, start, 0, block), (cut >> 16).to(tl.int32)
        kept = (first < upper).to(tl.int32)
        equal = (first == upper).to(tl.int32)
        if tl.max(equal, axis=0) > 0:  # one element in 65536
            second, lower = pieces(key, start, 1, block), (cut & 0xFFFF).to(tl.int32)
            kept = kept | (equal & (second < lower).to(tl.int32))
        delta = tl.where(kept > 0, delta, 0.0)
    return delta


@triton.jit
def _above(delta, magnitude, ties_end, start, block: tl.constexpr):
    """Where |delta| is above a magnitude, or equal to it at a flat index below the end of ties."""
    bits, cut = magnitude_bits(delta), tl.load(magnitude).to(tl.int32)
    below = tl.minimum(tl.maximum(tl.load(ties_end) - start, 0), block).to(tl.int32)  # in this block
    return (bits > cut) | ((bits == cut) & (tl.arange(0, block) < below))


#: Elements of a block by the number of inputs, whose elements must fit in registers. Not yet measured on a card.
_BLOCKS = ((4, 1024), (8, 512), (16, 256))
_LEAST_BLOCK = 128
WARPS = 4


def block_of(inputs: int) -> int:
    """How many elements a program takes at a time."""
    return next((block for limit, block in _BLOCKS if inputs <= limit), _LEAST_BLOCK)
