"""The measured sums, inner products and norms: float64 per program and in the order of the programs.

    gram[i, j] = sum_e d_i[e] * d_j[e]
    norms[i]   = (sum |d_i|, sqrt(sum d_i^2), max |d_i|), before and after `keep`

d_i is model - base, or the model, in float32; what is not finite counts as 0. Inputs [elements] of float32, float16 or
bfloat16, each read once; M * (M + 1) / 2 or 6 * M float64 are written per program. What a program takes is fixed, so
that no sum depends on what else is measured beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from ..sweep import Inputs, Run, Sweep
from .device import on
from .stages import (
    ADDRESSES,
    BEGIN,
    LANE,
    PART,
    WARPS,
    block_of,
    deltas_of,
    inside_of,
    keep,
    magnitude_bits,
    work_of,
)
from .tables import Piece, Table, dtypes_of, launch, launches, row, settings


@triton.jit(do_not_specialize=["span"])
def gram_kernel(
    words,  # a table: models, then the base where there is one
    sums,  # float64 [programs, pairs], the upper triangle row by row
    span,
    dtypes: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    models: tl.constexpr = len(dtypes) - has_base
    pairs: tl.constexpr = models * (models + 1) // 2
    row, first, last = work_of(words, span, block)
    place = tl.arange(0, block)
    totals = ()
    for _each in tl.static_range(pairs):
        totals = totals + (tl.zeros((block // LANE,), tl.float64),)  # noqa: RUF005  the compiler knows tuples by their sum
    for b in range(first, last):
        start = tl.cast(b, tl.int64) * block
        inside = inside_of(row, start, aligned, block)
        _base, deltas = deltas_of(row, dtypes, has_base, start, place, inside, aligned)
        wide = ()
        for m in tl.static_range(models):
            wide = wide + (_finite(deltas[m]).to(tl.float64),)  # noqa: RUF005
        more = ()
        for i in tl.static_range(models):
            for j in tl.static_range(i, models):
                total = totals[i * (2 * models - i - 1) // 2 + j]
                more = more + (total + _per_lane(wide[i] * wide[j]),)  # noqa: RUF005
        totals = more
    for pair in tl.static_range(pairs):
        tl.store(sums + tl.program_id(0).to(tl.int64) * pairs + pair, tl.sum(totals[pair], axis=0))


@triton.jit(do_not_specialize=["span"])
def norms_kernel(
    words,  # a table: models, then the base where there is one; then one setting
    sums,  # float64 [programs, M, 2, 3]
    span,
    how: tl.constexpr,
    dtypes: tl.constexpr,
    has_base: tl.constexpr,
    aligned: tl.constexpr,
    block: tl.constexpr,
):
    models: tl.constexpr = len(dtypes) - has_base
    row, first, last = work_of(words, span, block)
    begin = tl.load(row + BEGIN)
    parts = row + ADDRESSES + len(dtypes)
    place = tl.arange(0, block)
    totals = ()
    for _each in tl.static_range(2 * models):
        zero = tl.zeros((block // LANE,), tl.float64)
        totals = totals + (zero, zero, tl.zeros((block // LANE,), tl.float32))  # noqa: RUF005
    for b in range(first, last):
        start = tl.cast(b, tl.int64) * block
        inside = inside_of(row, start, aligned, block)
        _base, deltas = deltas_of(row, dtypes, has_base, start, place, inside, aligned)
        more = ()
        for m in tl.static_range(models):
            delta = _finite(deltas[m])
            kept = keep(delta, parts + m * PART, begin + start, how, block)
            more = more + _with(totals[6 * m], totals[6 * m + 1], totals[6 * m + 2], delta)
            more = more + _with(totals[6 * m + 3], totals[6 * m + 4], totals[6 * m + 5], kept)
        totals = more
    sums += tl.program_id(0).to(tl.int64) * models * 6
    for i in tl.static_range(6 * models):
        if i % 3 == 2:
            tl.store(sums + i, tl.max(totals[i], axis=0).to(tl.float64))
        else:
            tl.store(sums + i, tl.sum(totals[i], axis=0))


@triton.jit
def _with(total, squares, largest, values):
    """The three sums, grown by a block."""
    magnitudes = tl.abs(values)
    wide = magnitudes.to(tl.float64)
    shape: tl.constexpr = (values.shape[0] // LANE, LANE)
    peak = tl.max(tl.reshape(magnitudes, shape), axis=1)
    return total + _per_lane(wide), squares + _per_lane(wide * wide), tl.maximum(largest, peak)


@triton.jit
def _per_lane(values):
    """Sums of neighbours, for which no thread waits for another."""
    shape: tl.constexpr = (values.shape[0] // LANE, LANE)
    return tl.sum(tl.reshape(values, shape), axis=1)


@triton.jit
def _finite(values):
    return tl.where(magnitude_bits(values) >= 0x7F800000, 0.0, values)


#: Blocks that a program takes. Not yet measured on a card.
_SPAN = 16


def gram_all(tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
    """Inner products [M, M] of each tensor, one launch for all that are alike."""
    uppers = [np.triu_indices(len(inputs.models)) for inputs in tensors]
    products: list[NDArray[np.float64]] = [np.zeros((len(inputs.models),) * 2) for inputs in tensors]
    for pieces, sums in _measured(gram_kernel, tensors, [len(upper[0]) for upper in uppers], run):
        for (tensor, *_), parts in zip(pieces, sums, strict=True):
            products[tensor][uppers[tensor]] += parts.sum(axis=0)
    for product, upper in zip(products, uppers, strict=True):
        product.T[upper] = product[upper]
    return products


def norms_all(tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
    """Norms [M, 2, 3] of each tensor, one launch for all that are alike."""
    found: list[NDArray[np.float64]] = [np.zeros((len(inputs.models), 2, 3)) for inputs in tensors]
    for pieces, sums in _measured(norms_kernel, tensors, [each.size for each in found], run, sweeps):
        for (tensor, *_), parts in zip(pieces, sums, strict=True):
            parts = parts.reshape(-1, *found[tensor].shape)
            found[tensor][..., :2] += parts[..., :2].sum(axis=0)
            found[tensor][..., 2] = np.maximum(found[tensor][..., 2], parts[..., 2].max(axis=0))
    for each in found:
        each[..., 1] = np.sqrt(each[..., 1])
    return found


def scratch_bytes(tensors: int, elements: int, models: int, settings: int) -> int:
    """Of the sums of all programs, no fewer than there are."""
    programs = elements // (_SPAN * block_of(models + 1)) + 2 * tensors
    return programs * settings * 8 * models * max(models, 6)


def _measured(
    kernel: triton.JITFunction[Any],
    tensors: Sequence[Inputs],
    sizes: Sequence[int],
    run: Run,
    sweeps: Sequence[Sweep] = (),
) -> list[tuple[list[Piece], list[NDArray[np.float64]]]]:
    """What each launch took, and the sums of each piece, float64 [programs, size]."""
    launched = []
    kinds = [
        (tuple(view.dtype for view in inputs.views), inputs.base is None, sweeps[t].keep if sweeps else None)
        for t, inputs in enumerate(tensors)
    ]
    words = settings(sweeps)
    with on(run) as device:
        for like, aligned, pieces in launches([t.views for t in tensors], [t.elements for t in tensors], kinds):
            inputs = tensors[like]
            rows = [
                row(
                    piece,
                    tensors[piece.tensor].begin,
                    0,
                    tensors[piece.tensor].views,
                    words[id(sweeps[piece.tensor])] if sweeps else (),
                )
                for piece in pieces
            ]
            block = block_of(len(inputs.views))
            table = Table(rows, [], block, device, _SPAN)
            sums = torch.empty((table.programs, sizes[like]), dtype=torch.float64, device=device)
            choices = {
                **({"how": int(sweeps[like].keep)} if sweeps else {}),
                "dtypes": dtypes_of(inputs.views),
                "has_base": inputs.base is not None,
                "aligned": aligned,
                "block": block,
            }
            launch(kernel, table.programs, (table.words, sums, table.span), WARPS, choices)
            launched.append((pieces, table, sums))
        return [(pieces, np.split(sums.cpu().numpy(), table.firsts[1:])) for pieces, table, sums in launched]
