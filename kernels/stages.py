"""What the kernels share: loading deltas, the stage `keep`, and the numbers of a setting as tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sweep import Keep, Sweep
from .random import pieces

_ABOVE = tl.constexpr(int(Keep.ABOVE))
_BERNOULLI = tl.constexpr(int(Keep.BERNOULLI))

#: Numbers and whole numbers per model in the tables of `tables`.
NUMBERS = tl.constexpr(2)
WHOLES = tl.constexpr(4)


@triton.jit
def load(pointer, place, inside):
    """Elements as float32; +0 outside."""
    values = tl.load(pointer + place, mask=inside, other=0.0)
    if pointer.dtype.element_ty == tl.bfloat16:  # in whole numbers: the interpreter's own conversion loses denormals
        return (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return values.to(tl.float32)


@triton.jit
def magnitude_bits(values):
    """The bits of |values|, in the order of the magnitudes: NaN above infinity."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def keep(delta, wholes, start, how: tl.constexpr, block: tl.constexpr):
    """The delta where kept, +0 elsewhere; `wholes` is the model's row, `start` the flat index of the first."""
    if how == _ABOVE:
        bits = magnitude_bits(delta)
        cut = tl.load(wholes).to(tl.int32)
        ties_end = tl.load(wholes + 1)
        below = tl.minimum(tl.maximum(ties_end - start, 0), block).to(tl.int32)  # in elements of this block
        kept = (bits > cut) | ((bits == cut) & (tl.arange(0, block) < below))
        delta = tl.where(kept, delta, 0.0)
    if how == _BERNOULLI:
        cut, key = tl.load(wholes + 2), tl.load(wholes + 3)
        first, upper = pieces(key, start, 0, block), (cut >> 16).to(tl.int32)
        kept = (first < upper).to(tl.int32)
        equal = (first == upper).to(tl.int32)
        if tl.max(equal, axis=0) > 0:  # one element in 65536
            second, lower = pieces(key, start, 1, block), (cut & 0xFFFF).to(tl.int32)
            kept = kept | (equal & (second < lower).to(tl.int32))
        delta = tl.where(kept > 0, delta, 0.0)
    return delta


#: Elements per program by the number of inputs, whose elements must fit in registers. Not yet measured on a card.
_BLOCKS = ((4, 1024), (8, 512), (16, 256))
_LEAST_BLOCK = 128
WARPS = 4


def block_of(inputs: int) -> int:
    """How many elements a program takes."""
    return next((block for limit, block in _BLOCKS if inputs <= limit), _LEAST_BLOCK)


def tables(sweeps: Sequence[Sweep], device: torch.device) -> tuple[Tensor, Tensor]:
    """What differs per model and setting, as the kernels read it.

    Numbers, float32 [K, M + 1, 2]: weight and rescale of each model, then divisor (a 0 counts as 1) and lambda.
    Whole numbers, int64 [K, M, 4]: the bits of the magnitude, ties_end, cut, key.
    """
    numbers = [
        [*((part.weight, part.rescale) for part in sweep.parts), (divisor(sweep), sweep.lambda_)] for sweep in sweeps
    ]
    wholes = [
        [(_bits(part.magnitude), part.ties_end, part.cut, _signed(part.key)) for part in sweep.parts]
        for sweep in sweeps
    ]
    return (
        torch.tensor(numbers, dtype=torch.float64).to(torch.float32).to(device),
        torch.tensor(wholes, dtype=torch.int64).to(device),
    )


def divisor(sweep: Sweep) -> float:
    """The divisor in float32, where a 0 counts as 1."""
    return float(np.float32(sweep.divisor)) or 1.0


def _bits(magnitude: float) -> int:
    return int(np.float32(magnitude).view(np.uint32)) & 0x7FFFFFFF


def _signed(key: int) -> int:
    key &= 2**64 - 1
    return key - 2**64 if key >> 63 else key
