"""The measured sums, inner products and norms: float64 per block of elements, added up in the order of the blocks.

    gram[i, j] = sum_e d_i[e] * d_j[e]
    norms[i]   = (sum |d_i|, sqrt(sum d_i^2), max |d_i|), before and after `keep`

d_i is model - base, or the model, in float32; what is not finite counts as 0. Inputs [elements] of float32, float16 or
bfloat16, each read once; M * (M + 1) / 2 or 6 * M float64 are written per block. Tiles are fixed, so that no sum
depends on how the op runs.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..sweep import Inputs, Run, Sweep
from .stages import WARPS, WHOLES, block_of, keep, load, magnitude_bits, tables
from .staging import tiles


@triton.jit
def gram_kernel(
    inputs,  # models, then the base where there is one
    sums,  # float64 [blocks, pairs], the upper triangle row by row
    count,
    models: tl.constexpr,
    has_base: tl.constexpr,
    block: tl.constexpr,
):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < count
    sums += tl.program_id(0) * (models * (models + 1) // 2)
    base = load(inputs[models], place, inside) if has_base else tl.zeros((block,), tl.float32)
    deltas = ()
    for m in tl.static_range(models):
        delta = load(inputs[m], place, inside)
        if has_base:
            delta = delta - base
        deltas = deltas + (_finite(delta).to(tl.float64),)  # noqa: RUF005  the compiler knows tuples by their sum
    for i in tl.static_range(models):
        for j in tl.static_range(i, models):
            tl.store(sums + (i * (2 * models - i - 1) // 2 + j), tl.sum(deltas[i] * deltas[j], axis=0))


@triton.jit
def norms_kernel(
    inputs,  # models, then the base where there is one
    sums,  # float64 [blocks, M, 2, 3]
    wholes,
    begin,
    count,
    how: tl.constexpr,
    models: tl.constexpr,
    has_base: tl.constexpr,
    block: tl.constexpr,
):
    offset = tl.program_id(0) * block
    place = offset + tl.arange(0, block)
    inside = place < count
    sums += tl.program_id(0) * models * 6
    base = load(inputs[models], place, inside) if has_base else tl.zeros((block,), tl.float32)
    for m in tl.static_range(models):
        delta = load(inputs[m], place, inside)
        if has_base:
            delta = delta - base
        kept = keep(delta, wholes + m * WHOLES, begin.to(tl.int64) + offset, how, block)
        _store_norms(sums + m * 6, delta)
        _store_norms(sums + m * 6 + 3, kept)


@triton.jit
def _store_norms(sums, values):
    magnitudes = tl.abs(_finite(values))
    wide = magnitudes.to(tl.float64)
    tl.store(sums, tl.sum(wide, axis=0))
    tl.store(sums + 1, tl.sum(wide * wide, axis=0))
    tl.store(sums + 2, tl.max(magnitudes, axis=0).to(tl.float64))


@triton.jit
def _finite(values):
    return tl.where(magnitude_bits(values) >= 0x7F800000, 0.0, values)


#: Elements. Not yet measured on a card.
_TILE = 1 << 22


def gram_of(inputs: Inputs, run: Run) -> NDArray[np.float64]:
    """Inner products [M, M]."""
    models = len(inputs.models)
    upper = np.triu_indices(models)
    products: NDArray[np.float64] = np.zeros((models, models))
    for _, values in tiles(inputs, _TILE, run):
        sums = _sums_per_block(values, len(upper[0]))
        gram_kernel[(len(sums),)](
            tuple(values),
            sums,
            len(values[0]),
            models=models,
            has_base=inputs.base is not None,
            block=block_of(len(values)),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        products[upper] += sums.cpu().numpy().sum(axis=0)
    products.T[upper] = products[upper]
    return products


def norms_of(inputs: Inputs, sweep: Sweep, run: Run) -> NDArray[np.float64]:
    """Norms [M, 2, 3]."""
    models = len(inputs.models)
    found: NDArray[np.float64] = np.zeros((models, 2, 3))
    for begin, values in tiles(inputs, _TILE, run):
        sums = _sums_per_block(values, found.size)
        norms_kernel[(len(sums),)](
            tuple(values),
            sums,
            tables([sweep], sums.device)[1],
            begin,
            len(values[0]),
            how=int(sweep.keep),
            models=models,
            has_base=inputs.base is not None,
            block=block_of(len(values)),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        blocks = sums.cpu().numpy().reshape(-1, models, 2, 3)
        found[:, :, :2] += blocks[..., :2].sum(axis=0)
        found[:, :, 2] = np.maximum(found[:, :, 2], blocks[..., 2].max(axis=0))
    found[:, :, 1] = np.sqrt(found[:, :, 1])
    return found


def _sums_per_block(values: list[Tensor], sums: int) -> Tensor:
    blocks = triton.cdiv(len(values[0]), block_of(len(values)))
    return torch.empty((blocks, sums), dtype=torch.float64, device=values[0].device)
