"""The exact k-th magnitude: radix selection over the bits of |d|, then the place of the last equal that stays.

d is model - base, or the model, in float32; a NaN counts as 0. Inputs [elements] of float32, float16 or bfloat16, read
once per digit (11, 10 and 10 bits), and once more where only some of the equals stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..sweep import EVERY, Cut, Inputs, Run
from .stages import load, magnitude_bits
from .staging import device, tiles

#: The digits of a magnitude: how far down each begins. The first is 11 bits wide, the others 10.
_SHIFTS = (20, 10, 0)
_BINS = tl.constexpr(1 << 11)


@triton.jit
def histogram_kernel(
    inputs,  # models, then the base where there is one
    counts,  # int32 [M, BINS]
    prefixes,  # int64 [M]: the bits above the digit, the same for all that count
    count,
    shift: tl.constexpr,
    models: tl.constexpr,
    has_base: tl.constexpr,
    block: tl.constexpr,
):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < count
    bins = tl.arange(0, _BINS)
    base = load(inputs[models], place, inside) if has_base else tl.zeros((block,), tl.float32)
    for m in tl.static_range(models):
        bits = _selectable(inputs[m], base, place, inside, has_base)
        if shift == 20:
            digit, alike = bits >> 20, inside
        else:
            digit = (bits >> shift) & 0x3FF
            alike = inside & ((bits >> shift >> 10) == tl.load(prefixes + m).to(tl.int32))
        found = tl.histogram(digit, _BINS, mask=alike)
        tl.atomic_add(counts + m * _BINS + bins, found, mask=found > 0, sem="relaxed")


@triton.jit
def equals_kernel(
    inputs,  # models, then the base where there is one
    counts,  # int32 [M, blocks]: elements whose magnitude is the one looked for
    magnitudes,  # int64 [M]: its bits
    count,
    models: tl.constexpr,
    has_base: tl.constexpr,
    block: tl.constexpr,
):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < count
    base = load(inputs[models], place, inside) if has_base else tl.zeros((block,), tl.float32)
    for m in tl.static_range(models):
        bits = _selectable(inputs[m], base, place, inside, has_base)
        equal = inside & (bits == tl.load(magnitudes + m).to(tl.int32))
        tl.store(counts + m * tl.num_programs(0) + tl.program_id(0), tl.sum(equal.to(tl.int32), axis=0))


@triton.jit
def _selectable(model, base, place, inside, has_base: tl.constexpr):
    delta = load(model, place, inside)
    if has_base:
        delta = delta - base
    return magnitude_bits(tl.where(delta != delta, 0.0, delta))


#: Elements per program. Not yet measured on a card.
BLOCK = 2048
WARPS = 8


def cuts_of(group: Sequence[Inputs], ranks: Sequence[int], run: Run) -> tuple[Cut, ...]:
    """The cut of each model, over the tensors of the group laid end to end."""
    count = sum(inputs.elements for inputs in group)
    selected = [m for m, k in enumerate(ranks) if 0 < k < count]
    if not selected:
        return tuple(_trivial_cut(k) for k in ranks)
    bits = [0] * len(selected)
    left = [ranks[m] for m in selected]  # how many are kept of the `equals` that share these bits
    equals = [count] * len(selected)
    for shift in _SHIFTS:
        counts = _histograms(group, selected, bits, shift, run)
        for s in range(len(selected)):
            digit, left[s] = _digit(counts[s], left[s])
            bits[s], equals[s] = bits[s] << 10 | digit, int(counts[s][digit])
        run = run._replace(tick=None)  # the bytes are counted once
    ends = dict.fromkeys(selected, EVERY)
    split = [s for s in range(len(selected)) if left[s] < equals[s]]
    if split:
        models = [selected[s] for s in split]
        found = _ties_ends(group, models, [bits[s] for s in split], [left[s] for s in split], run)
        ends |= zip(models, found, strict=True)
    magnitudes = np.array(bits, np.uint32).view(np.float32).tolist()
    cuts = {m: Cut(magnitude, ends[m]) for m, magnitude in zip(selected, magnitudes, strict=True)}
    return tuple(cuts.get(m) or _trivial_cut(k) for m, k in enumerate(ranks))


def _trivial_cut(k: int) -> Cut:
    return Cut(float("inf"), 0) if k <= 0 else Cut(0.0, EVERY)


def _digit(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The digit of the k-th largest, and its rank among those with the same digit."""
    reached = counts[::-1].cumsum()  # from the largest
    place = int(np.searchsorted(reached, k))
    return len(counts) - 1 - place, k - (int(reached[place - 1]) if place else 0)


def _histograms(
    group: Sequence[Inputs], selected: Sequence[int], bits: Sequence[int], shift: int, run: Run
) -> NDArray[np.int64]:
    """How often each digit occurs among the elements with these bits above it, [selected, bins]."""
    counts = torch.zeros((len(selected), _BINS.value), dtype=torch.int64, device=device())
    prefixes = torch.tensor(bits, dtype=torch.int64).to(device())
    for _, values, has_base in _tiles(group, selected, run):
        found = torch.zeros_like(counts, dtype=torch.int32)
        histogram_kernel[(triton.cdiv(len(values[0]), BLOCK),)](
            tuple(values),
            found,
            prefixes,
            len(values[0]),
            shift=shift,
            models=len(selected),
            has_base=has_base,
            block=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        counts += found
    reached: NDArray[np.int64] = counts.cpu().numpy()
    return reached


def _ties_ends(
    group: Sequence[Inputs], selected: Sequence[int], bits: Sequence[int], left: Sequence[int], run: Run
) -> list[int]:
    """One past the flat index of the last equal that is kept, per model."""
    magnitudes = torch.tensor(bits, dtype=torch.int64).to(device())
    left, ends = list(left), [-1] * len(selected)
    for begin, values, has_base in _tiles(group, selected, run):
        blocks = triton.cdiv(len(values[0]), BLOCK)
        counts = torch.empty((len(selected), blocks), dtype=torch.int32, device=device())
        equals_kernel[(blocks,)](
            tuple(values),
            counts,
            magnitudes,
            len(values[0]),
            models=len(selected),
            has_base=has_base,
            block=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        for s, reached in enumerate(counts.cpu().numpy().cumsum(axis=1, dtype=np.int64)):
            if ends[s] < 0 and reached[-1] >= left[s]:
                block = int(np.searchsorted(reached, left[s]))
                rank = left[s] - (int(reached[block - 1]) if block else 0)
                ends[s] = begin + block * BLOCK + _place(values, s, has_base, block, bits[s], rank) + 1
            left[s] -= int(reached[-1])
        if min(ends) >= 0:
            break
    return ends


def _place(values: list[Tensor], s: int, has_base: bool, block: int, bits: int, rank: int) -> int:
    """Where in a block the equal of this rank stands."""
    within = slice(block * BLOCK, (block + 1) * BLOCK)
    delta = values[s][within].float()
    if has_base:
        delta = delta - values[-1][within].float()
    delta = delta.nan_to_num(0.0, float("inf"), float("-inf"))
    return int(((delta.view(torch.int32) & 0x7FFFFFFF) == bits).nonzero()[rank - 1])


def _tiles(group: Sequence[Inputs], selected: Sequence[int], run: Run) -> Iterator[tuple[int, list[Tensor], bool]]:
    """Tile after tile of a group: the index in the group, the selected models and the base, whether there is one."""
    start = 0
    for inputs in group:
        has_base = inputs.base is not None
        for begin, values in tiles(inputs, run.tile, run):
            yield start + begin, [*(values[m] for m in selected), *values[len(inputs.models) :]], has_base
        start += inputs.elements
