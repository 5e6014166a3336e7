"""The four ops in plain PyTorch: the definition of every stage, and the provider where nothing is compiled.

Deltas, votes and sums are float32, or float64 where any view is F64; measured sums are float64. Elements
stand alone or are summed in fixed blocks, so no result depends on the tile. The random bits of an element are those of
Philox4x32 with 7 rounds (Salmon et al., SC 2011) at the element's flat index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import memory
from .sweep import EVERY, Cut, Elect, Found, Inputs, Keep, Mean, Part, Run, Sweep, Target, TieVote, View

name = "torch"
DTYPES = frozenset({"F64", "F32", "F16", "BF16", "U8"})

_TILE = 1 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}


def gram(tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
    """Inner products [M, M] of the deltas, or of the weights without a base, in float64; NaN and Inf count as 0."""
    return [_gram(inputs, run) for inputs in tensors]


def norms(tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
    """L1, L2 and Linf of each delta before and after `Keep`, [M, 2, 3], in float64; NaN and Inf count as 0."""
    return [_norms(inputs, sweep, run) for inputs, sweep in zip(tensors, sweeps, strict=True)]


def threshold(groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> list[tuple[Cut, ...]]:
    """The cut per model that keeps exactly its rank of elements, of the tensors of a group laid end to end.

    Of equal magnitudes those with the lowest index stay; `ties_end` is EVERY where all of them do. A NaN counts as 0.
    """
    return [_cuts(group, wanted, run) for group, wanted in zip(groups, ranks, strict=True)]


def merge(
    tensors: Sequence[Inputs], sweeps: Sequence[Sequence[Sweep]], targets: Sequence[Sequence[Target]], run: Run
) -> list[Found]:
    """Write K outputs per tensor, one for each of its sweeps, from one read; a U8 tensor is copied."""
    return [
        _copy(inputs, each, run)
        if inputs.models[0].dtype == "U8"
        else _written(inputs, [partial(sweep_tile, sweep=sweep) for sweep in those], each, run)
        for inputs, those, each in zip(tensors, sweeps, targets, strict=True)
    ]


def compute(
    tensors: Sequence[Inputs],
    functions: Sequence[Sequence[Callable[[Sequence[Tensor], Tensor | None], Tensor]]],
    targets: Sequence[Sequence[Target]],
    run: Run,
) -> list[Found]:
    """`merge`, with functions of whole tensors, all of them flat, in the place of sweeps."""
    return [
        _written(
            inputs,
            [lambda models, base, begin, whole=whole: whole(models, base) for whole in those],
            each,
            run._replace(tile=inputs.elements),
        )
        for inputs, those, each in zip(tensors, functions, targets, strict=True)
    ]


# --- the stages of a sweep ---


def delta(model: Tensor, base: Tensor | None) -> Tensor:
    return model if base is None else model - base


def keep(delta: Tensor, how: Keep, part: Part, begin: int) -> Tensor:
    """The delta where kept, +0 elsewhere, or clipped; `begin` is the flat index of its first element."""
    if how is Keep.ALL:
        return delta
    if how is Keep.CLIP:
        limit = _scalar(part.magnitude, delta)
        return torch.where(delta.abs() > limit, limit.copysign(delta), delta)
    if how is Keep.BERNOULLI:
        kept = random_bits(part.key, begin, len(delta)) < part.cut
    else:
        kept = _above(delta, part.magnitude, part.ties_end, begin)
    if how is Keep.BAND:
        kept &= ~_above(delta, part.top_magnitude, part.top_ties_end, begin) | delta.isnan()
    return torch.where(kept, delta, _scalar(0.0, delta))


def scale(delta: Tensor, factor: float) -> Tensor:
    return delta * _scalar(factor, delta)


def elect(ballots: Sequence[Tensor], sweep: Sweep) -> tuple[Tensor, Tensor]:
    """Where the vote is positive, and where it is negative. A vote that is NaN is negative."""
    if sweep.elect is Elect.COUNT:
        ballots = [(ballot > 0).to(ballot.dtype) - (ballot < 0).to(ballot.dtype) for ballot in ballots]
    vote = _sum(ballots)
    return vote >= 0 if sweep.tie_vote is TieVote.POSITIVE else vote > 0, ~(vote >= 0)


def agreement(ballots: Sequence[Tensor], sweep: Sweep) -> list[Tensor]:
    """Where each model agrees with the vote. Zero agrees with none, NaN with either, so that it is never lost."""
    positive, negative = elect(ballots, sweep)
    return [(positive & ~(ballot <= 0)) | (negative & ~(ballot >= 0)) for ballot in ballots]


def mean(deltas: Sequence[Tensor], weighted: Sequence[Tensor], sweep: Sweep) -> Tensor:
    """The sum of the weighted deltas that agree, from the first model to the last, over the mass."""
    if sweep.elect is Elect.NONE:
        total = weighted[0]
        for term in weighted[1:]:
            total = total + term
        counted = sweep.mean is Mean.CONTRIBUTORS
        return total / _nonzero(_contributors(weighted) if counted else _scalar(sweep.divisor, total).expand_as(total))
    ballots = weighted if sweep.elect is Elect.WEIGHTED else deltas
    agrees = agreement(ballots, sweep)
    zero = _scalar(0.0, weighted[0])
    total = _sum([torch.where(agree, term, zero) for agree, term in zip(agrees, weighted, strict=True)])
    return total / _nonzero(mass(ballots, agrees, sweep))


def mass(ballots: Sequence[Tensor], agrees: Sequence[Tensor], sweep: Sweep) -> Tensor:
    """What the agreeing sum is divided by."""
    like = ballots[0]
    if sweep.mean is Mean.WEIGHTS:
        zero = _scalar(0.0, like)
        weights = [_scalar(part.weight, like) for part in sweep.parts]
        return _sum([torch.where(agree, weight, zero) for agree, weight in zip(agrees, weights, strict=True)])
    if sweep.mean is Mean.COUNT:
        return _sum([agree.to(like.dtype) for agree in agrees])
    if sweep.mean is Mean.CONTRIBUTORS:
        return _contributors(ballots)
    return _scalar(sweep.divisor, like).expand_as(like)


def add(base: Tensor | None, merged: Tensor) -> Tensor:
    """The base moved by the merged delta: the base's own bits, a negative zero's too, where there is nothing to add."""
    return merged if base is None else torch.where(merged == 0, base, base + merged)


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once, to nearest even; too large becomes infinite, and any NaN the one quiet NaN without a payload."""
    if values.dtype == torch.float64 and dtype.itemsize == 2:
        values = _rounded_to_odd(values)  # torch goes through float32, which would round a second time
    narrowed = values.to(dtype)
    return torch.where(narrowed.isnan(), torch.tensor(torch.nan, dtype=dtype), narrowed)


def sweep_tile(models: Sequence[Tensor], base: Tensor | None, sweep: Sweep, begin: int) -> Tensor:
    """All stages but the last, over the tile that starts at flat index `begin`."""
    deltas = [
        scale(keep(delta(model, base), sweep.keep, part, begin), part.rescale)
        for model, part in zip(models, sweep.parts, strict=True)
    ]
    weighted = [scale(d, part.weight) for d, part in zip(deltas, sweep.parts, strict=True)]
    return add(base, scale(mean(deltas, weighted, sweep), sweep.lambda_))


def _above(delta: Tensor, magnitude: float, ties_end: int, begin: int) -> Tensor:
    """Where |delta| is above a magnitude, or equal to it at a flat index below `ties_end`; a NaN is above all."""
    magnitudes, cut = _magnitude_bits(delta), _magnitude_bits(_scalar(magnitude, delta))
    index = torch.arange(begin, begin + len(delta))
    return (magnitudes > cut) | ((magnitudes == cut) & (index < ties_end))


def _sum(terms: Sequence[Tensor]) -> Tensor:
    """From +0, left to right."""
    total = torch.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def _contributors(voices: Sequence[Tensor]) -> Tensor:
    return _sum([(voice != 0).to(voice.dtype) for voice in voices])


def _nonzero(mass: Tensor) -> Tensor:
    return torch.where(mass == 0, _scalar(1.0, mass), mass)


def _scalar(value: float, like: Tensor) -> Tensor:
    """A number, rounded to the precision of the arithmetic."""
    return torch.tensor(value, dtype=torch.float64).to(like.dtype)


def _magnitude_bits(values: Tensor) -> Tensor:
    """The bits of |values| as integers, in the same order as the magnitudes, NaN above infinity."""
    if values.dtype == torch.float64:
        return values.view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    return values.view(torch.int32) & 0x7FFFFFFF


def _rounded_to_odd(values: Tensor) -> Tensor:
    """Float64 as float32, cut towards zero, with the last bit set where anything was lost for a later rounding."""
    single = values.to(torch.float32)
    widened, bits = single.to(torch.float64), single.view(torch.int32)
    bits = torch.where(widened.abs() > values.abs(), bits - 1, bits)
    return torch.where(widened != values, bits | 1, bits).view(torch.float32)


# --- random bits ---

_WORD = 0xFFFFFFFF


def random_bits(key: int, begin: int, count: int) -> Tensor:
    """32 random bits for each flat index from `begin`: 16 of stream 0, then 16 of stream 1."""
    return _pieces(key, begin, count, 0) << 16 | _pieces(key, begin, count, 1)


def _pieces(key: int, begin: int, count: int, stream: int) -> Tensor:
    """16 random bits per index; eight neighbours share a block of four words, low half first."""
    blocks = torch.arange(begin // 8, (begin + count + 7) // 8)
    halves = [half for word in _philox(blocks, stream, key) for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).flatten()[begin % 8 :][:count]  # [blocks, 8] -> [count]


def _philox(blocks: Tensor, stream: int, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits per block, in int64: its products wrap, but both halves of their 64 bits are right."""
    c0, c1, c2, c3 = blocks & _WORD, blocks >> 32, torch.full_like(blocks, stream), torch.zeros_like(blocks)
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(7):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (right >> 32 & _WORD) ^ c1 ^ k0,
            right & _WORD,
            (left >> 32 & _WORD) ^ c3 ^ k1,
            left & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


# --- the loops of the ops ---


def _gram(inputs: Inputs, run: Run) -> NDArray[np.float64]:
    count = len(inputs.models)
    products: NDArray[np.float64] = np.zeros((count, count))
    for _, models, base in _tiles(inputs, _TILE, run, _arithmetic(inputs.views)):
        deltas = [_finite(delta(model, base)).to(torch.float64) for model in models]
        for i in range(count):
            for j in range(i, count):
                products[i, j] += float((deltas[i] * deltas[j]).sum())
                products[j, i] = products[i, j]
    return products


def _norms(inputs: Inputs, sweep: Sweep, run: Run) -> NDArray[np.float64]:
    found = np.zeros((len(inputs.models), 2, 3))
    for begin, models, base in _tiles(inputs, _TILE, run, _arithmetic(inputs.views)):
        for model, part, stages in zip(models, sweep.parts, found, strict=True):
            before = _finite(delta(model, base))
            kept = keep(before, sweep.keep, part, inputs.begin + begin)
            for norm, values in zip(stages, (before, kept), strict=True):
                magnitudes = values.abs().to(torch.float64)
                norm[0] += float(magnitudes.sum())
                norm[1] += float((magnitudes * magnitudes).sum())
                norm[2] = max(norm[2], float(magnitudes.max()))
    found[:, :, 1] = np.sqrt(found[:, :, 1])
    return found


def _finite(values: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, _scalar(0.0, values))


def _cuts(group: Sequence[Inputs], ranks: Sequence[int], run: Run) -> tuple[Cut, ...]:
    """Radix selection, 16 bits of the magnitude at a time from the top, then the place of the last equal kept."""
    count = sum(inputs.elements for inputs in group)
    selected = [m for m, k in enumerate(ranks) if 0 < k < count]
    if not selected:
        return tuple(_trivial_cut(k) for k in ranks)
    arithmetic = _arithmetic([view for inputs in group for view in inputs.views])
    prefix = dict.fromkeys(selected, 0)
    left = {m: ranks[m] for m in selected}  # how many are kept of the `equals` that share the prefix
    equals = dict.fromkeys(selected, count)
    for shift in range(8 * arithmetic.itemsize - 16, -1, -16):
        counts = {m: torch.zeros(1 << 16, dtype=torch.int64) for m in selected}
        for _, magnitudes in _selectable(group, selected, run, arithmetic):
            for m, bits in magnitudes.items():
                alike = bits[bits >> 16 >> shift == prefix[m]]
                counts[m] += torch.bincount(alike >> shift & 0xFFFF, minlength=1 << 16)
        for m in selected:
            digit, left[m] = _digit(counts[m], left[m])
            prefix[m], equals[m] = prefix[m] << 16 | digit, int(counts[m][digit])
        run = run._replace(tick=None)  # the bytes are counted once
    ends = dict.fromkeys(selected, EVERY)
    split = [m for m in selected if left[m] < equals[m]]
    if split:
        ends |= _ties_ends(group, {m: prefix[m] for m in split}, left, run, arithmetic)
    integer = torch.int64 if arithmetic == torch.float64 else torch.int32
    return tuple(
        Cut(float(torch.tensor(prefix[m], dtype=integer).view(arithmetic)), ends[m]) if m in ends else _trivial_cut(k)
        for m, k in enumerate(ranks)
    )


def _trivial_cut(k: int) -> Cut:
    return Cut(float("inf"), 0) if k <= 0 else Cut(0.0, EVERY)


def _digit(counts: Tensor, k: int) -> tuple[int, int]:
    """The digit of the k-th largest, and its rank among those with the same digit."""
    reached = counts.flip(0).cumsum(0)  # [digits], from the largest
    place = int(torch.searchsorted(reached, k))
    return len(counts) - 1 - place, k - (int(reached[place - 1]) if place else 0)


def _ties_ends(
    group: Sequence[Inputs], equal: dict[int, int], left: dict[int, int], run: Run, arithmetic: torch.dtype
) -> dict[int, int]:
    """One past the flat index of the last equal that is kept, per model."""
    left, ends = dict(left), {}
    for begin, magnitudes in _selectable(group, list(equal), run, arithmetic):
        for m, bits in magnitudes.items():
            if m not in ends:
                places = (bits == equal[m]).nonzero().flatten()
                if len(places) >= left[m]:
                    ends[m] = begin + int(places[left[m] - 1]) + 1
                left[m] -= len(places)
    return ends


def _selectable(
    group: Sequence[Inputs], selected: Sequence[int], run: Run, arithmetic: torch.dtype
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Tile after tile of a group: the index in the group, and the magnitude bits of each selected model."""
    start = 0
    for inputs in group:
        for begin, models, base in _tiles(inputs, run.tile, run, arithmetic):
            deltas = {m: delta(models[m], base) for m in selected}
            yield start + begin, {m: _magnitude_bits(d.where(~d.isnan(), 0.0)) for m, d in deltas.items()}
        start += inputs.elements


def _written(inputs: Inputs, functions: Sequence[Callable[..., Tensor]], targets: Sequence[Target], run: Run) -> Found:
    """Each function takes the models and the base of a tile, and its `begin`."""
    views = inputs.views
    nonfinite, first, overflow = [0] * len(views), [-1] * len(views), [0] * len(targets)
    arithmetic = _arithmetic(views)
    for begin, models, base in _tiles(inputs, run.tile, run, arithmetic):
        for i, values in enumerate(models if base is None else [*models, base]):
            places = (~values.isfinite()).nonzero()
            if len(places) and first[i] < 0:
                first[i] = inputs.begin + begin + int(places[0])
            nonfinite[i] += len(places)
        for k, (function, target) in enumerate(zip(functions, targets, strict=True)):
            merged = function(models, base, begin=inputs.begin + begin)
            output = narrow(merged, _DTYPES[target.dtype])
            overflow[k] += int((merged.isfinite() & output.isinf()).sum())
            _store(output, target, begin)
    return Found(tuple(nonfinite), tuple(first), tuple(overflow))


def _copy(inputs: Inputs, targets: Sequence[Target], run: Run) -> Found:
    for begin, (values,), _ in _tiles(inputs, run.tile, run, torch.uint8):
        for target in targets:
            _store(values, target, begin)
    return Found((0,), (-1,), (0,) * len(targets))


# --- memory and files ---


def _tiles(
    inputs: Inputs, tile: int, run: Run, arithmetic: torch.dtype
) -> Iterator[tuple[int, list[Tensor], Tensor | None]]:
    """Tile after tile: its first flat index, the models, the base; reports the bytes of each once it is done."""
    step = tile or _TILE
    for begin in range(0, inputs.elements, step):
        end = min(begin + step, inputs.elements)
        tensors = [_load(view, begin, end).to(arithmetic) for view in inputs.views]
        yield begin, tensors[: len(inputs.models)], None if inputs.base is None else tensors[-1]
        if run.tick:
            run.tick(sum((end - begin) * _DTYPES[view.dtype].itemsize for view in inputs.views))


def _arithmetic(views: Sequence[View]) -> torch.dtype:
    return torch.float64 if any(view.dtype == "F64" for view in views) else torch.float32


def _load(view: View, begin: int, end: int) -> Tensor:
    """A copy of some elements, from memory of any alignment."""
    size = _DTYPES[view.dtype].itemsize
    copied = torch.empty((end - begin) * size, dtype=torch.uint8)
    memory.read(view.address + begin * size, copied.numpy().data)
    return copied.view(_DTYPES[view.dtype])


def _store(values: Tensor, target: Target, begin: int) -> None:
    raw = values.contiguous().view(torch.uint8).numpy().data
    memory.write(raw, target.offset + begin * values.itemsize, target.file)
