"""The sweep: keep, elect, mean and the sum with the base, for K settings in one read.

    out_k[e] = base[e] + lambda_k * mean_i(keep(model_i[e] - base[e]) * rescale_ki * weight_ki)

Inputs [elements] of float32, float16 or bfloat16, mixed as they come, M models and at most one base; outputs [elements]
of any of these. Reads each input and writes each output once. Each operation is one IEEE float32 operation, to nearest
even: launches turn contraction off, and the bits are those of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sweep import Elect, Found, Inputs, Mean, Run, Sweep, Target, TieVote
from .stages import NUMBERS, WARPS, WHOLES, block_of, divisor, keep, load, magnitude_bits, tables
from .staging import DTYPES, Arriving, device, store, tiles

_NONE = tl.constexpr(int(Elect.NONE))
_WEIGHTED = tl.constexpr(int(Elect.WEIGHTED))
_COUNT = tl.constexpr(int(Elect.COUNT))
_ZERO = tl.constexpr(int(TieVote.ZERO))
_BY_SUM = tl.constexpr(int(Mean.SUM))
_BY_WEIGHTS = tl.constexpr(int(Mean.WEIGHTS))
_BY_COUNT = tl.constexpr(int(Mean.COUNT))
_BY_CONTRIBUTORS = tl.constexpr(int(Mean.CONTRIBUTORS))

_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def sweep_kernel(
    inputs,  # models, then the base where there is one
    outputs,
    numbers,
    wholes,
    flag,
    begin,  # flat index of the first element
    count,
    stages: tl.constexpr,  # per output: keep, elect, tie_vote, mean, whether the divisor is not 1
    models: tl.constexpr,
    has_base: tl.constexpr,
    block: tl.constexpr,
):
    offset = tl.program_id(0) * block
    place = offset + tl.arange(0, block)
    inside = place < count
    start = begin.to(tl.int64) + offset
    odd = place < 0  # not finite, or too large for the output
    base = tl.zeros((block,), tl.float32)
    if has_base:
        base = load(inputs[models], place, inside)
        odd = odd | (magnitude_bits(base) >= _INFINITE)
    deltas = ()
    for m in tl.static_range(models):
        model = load(inputs[m], place, inside)
        odd = odd | (magnitude_bits(model) >= _INFINITE)
        if has_base:
            model = model - base
        deltas = deltas + (model,)  # noqa: RUF005  the compiler knows tuples by their sum
    for k in tl.static_range(len(stages)):
        merged = _merged(
            deltas,
            numbers + k * (models + 1) * NUMBERS,
            wholes + k * models * WHOLES,
            start,
            stages[k][0],
            stages[k][1],
            stages[k][2],
            stages[k][3],
            stages[k][4],
            models,
            block,
        )
        if has_base:
            merged = tl.where(merged == 0.0, base, base + merged)
        odd = odd | _too_large(merged, outputs[k].dtype.element_ty)
        tl.store(outputs[k] + place, _narrowed(merged, outputs[k].dtype.element_ty), mask=inside)
    tl.store(flag, 1, mask=tl.max((odd & inside).to(tl.int32), axis=0) > 0)  # all that write, write the same


@triton.jit
def _merged(
    deltas,
    numbers,
    wholes,
    start,
    how: tl.constexpr,
    elect: tl.constexpr,
    tie_vote: tl.constexpr,
    mean: tl.constexpr,
    divides: tl.constexpr,
    models: tl.constexpr,
    block: tl.constexpr,
):
    """lambda times the mean; the votes and the sums go from the first model to the last."""
    voices, terms = (), ()
    for m in tl.static_range(models):
        delta = keep(deltas[m], wholes + m * WHOLES, start, how, block) * tl.load(numbers + m * NUMBERS + 1)
        weighted = delta * tl.load(numbers + m * NUMBERS)
        terms = terms + (weighted,)  # noqa: RUF005
        voices = voices + (weighted if elect == _WEIGHTED else delta,)  # noqa: RUF005
    zero = tl.zeros((block,), tl.float32)
    mass = zero + tl.load(numbers + models * NUMBERS)
    if elect == _NONE:
        total = terms[0]  # not from +0: a negative zero stays
        for m in tl.static_range(1, models):
            total = total + terms[m]
    else:
        vote = zero
        for m in tl.static_range(models):
            if elect == _COUNT:
                vote = vote + tl.where(voices[m] > 0.0, 1.0, tl.where(voices[m] < 0.0, -1.0, 0.0))
            else:
                vote = vote + voices[m]
        positive = vote > 0.0 if tie_vote == _ZERO else vote >= 0.0
        total, agreeing = zero, zero
        for m in tl.static_range(models):
            # zero agrees with no vote, a NaN with any, so that it is never lost
            against = tl.where(positive, voices[m] <= 0.0, voices[m] >= 0.0)
            total = total + tl.where(against, 0.0, terms[m])
            if mean == _BY_WEIGHTS:
                agreeing = agreeing + tl.where(against, 0.0, tl.load(numbers + m * NUMBERS))
            if mean == _BY_COUNT:
                agreeing = agreeing + tl.where(against, 0.0, 1.0)
            if mean == _BY_CONTRIBUTORS:
                agreeing = agreeing + tl.where(voices[m] == 0.0, 0.0, 1.0)
        if tie_vote == _ZERO:
            total, agreeing = tl.where(vote == 0.0, 0.0, total), tl.where(vote == 0.0, 0.0, agreeing)
        if mean != _BY_SUM:
            mass = tl.where(agreeing == 0.0, 1.0, agreeing)
    if divides:
        total = tl.div_rn(total, mass)
    return total * tl.load(numbers + models * NUMBERS + 1)


@triton.jit
def _too_large(values, dtype: tl.constexpr):
    """Where rounding into a type of 16 bits gives infinity, or nothing finite was there before."""
    if dtype == tl.float16:
        return magnitude_bits(values) >= 0x477FF000  # 65520
    if dtype == tl.bfloat16:
        return magnitude_bits(values) >= 0x7F7F8000
    return values != values


@triton.jit
def _narrowed(values, dtype: tl.constexpr):
    """Rounded to nearest even; any NaN is the one quiet NaN without a payload, which devices spell differently."""
    bits = values.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:  # in whole numbers, as the interpreter's own conversion cuts
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(values != values, 0x7FC0, rounded).to(tl.int16)
    elif dtype == tl.float16:
        bits = tl.where(values != values, 0x7E00, values.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
    else:
        bits = tl.where(values != values, 0x7FC00000, bits)
    return bits.to(dtype, bitcast=True)


# --- the launch ---


def sweep(
    inputs: Sequence[Tensor], has_base: bool, sweeps: Sequence[Sweep], outputs: Sequence[Tensor], begin: int = 0
) -> Tensor:
    """Write K outputs for K settings; the tensors lie on one device, `begin` is a multiple of 8.

    Returns what is 1 where anything in the inputs is not finite or an output may have overflowed, int32 [1].
    """
    count = outputs[0].numel()
    flag = torch.zeros(1, dtype=torch.int32, device=outputs[0].device)
    if count:
        block = block_of(len(inputs))
        sweep_kernel[(triton.cdiv(count, block),)](
            tuple(inputs),
            tuple(outputs),
            *tables(sweeps, outputs[0].device),
            flag,
            begin,
            count,
            stages=stages_of(sweeps),
            models=len(inputs) - has_base,
            has_base=has_base,
            block=block,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return flag


def stages_of(sweeps: Sequence[Sweep]) -> tuple[tuple[int, ...], ...]:
    """What the kernel is compiled for, per output."""
    return tuple(
        (
            int(each.keep),
            int(each.elect),
            int(each.tie_vote),
            int(each.mean) if each.elect else int(Mean.SUM),
            int(each.mean is not Mean.SUM or divisor(each) != 1.0),
        )
        for each in sweeps
    )


# --- from memory, tile after tile ---


def merge_tensor(inputs: Inputs, sweeps: Sequence[Sweep], targets: Sequence[Target], run: Run) -> Found:
    """One tensor; while the device works on a tile, the next one is read."""
    if inputs.models[0].dtype == "U8":
        return _copy(inputs, targets, run)
    has_base = inputs.base is not None
    noticed = _Noticed(len(inputs.views), len(targets))
    swept: list[_Swept] = []
    for begin, values in tiles(inputs, run.tile, run):
        outputs = [torch.empty(len(values[0]), dtype=DTYPES[target.dtype], device=device()) for target in targets]
        flag = sweep(values, has_base, sweeps, outputs, begin)
        swept.append(_Swept(begin, values, Arriving(flag), [Arriving(output) for output in outputs]))
        if len(swept) > 1:
            _finish(swept.pop(0), has_base, sweeps, targets, noticed)
    for tile in swept:
        _finish(tile, has_base, sweeps, targets, noticed)
    return Found(tuple(noticed.nonfinite), tuple(noticed.first), tuple(noticed.overflow))


class _Swept(NamedTuple):
    """A tile that the device has been told to sweep."""

    begin: int
    inputs: list[Tensor]
    flag: Arriving
    outputs: list[Arriving]


class _Noticed:
    """What becomes a `Found`, tile after tile."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.nonfinite, self.first, self.overflow = [0] * inputs, [-1] * inputs, [0] * outputs


def _finish(
    tile: _Swept, has_base: bool, sweeps: Sequence[Sweep], targets: Sequence[Target], noticed: _Noticed
) -> None:
    outputs = [output.wait() for output in tile.outputs]
    if tile.flag.wait().item():
        _look_closely(tile, has_base, sweeps, outputs, noticed)
    for output, target in zip(outputs, targets, strict=True):
        store(output, target, tile.begin)


def _look_closely(
    tile: _Swept, has_base: bool, sweeps: Sequence[Sweep], outputs: Sequence[Tensor], noticed: _Noticed
) -> None:
    """Count what is not finite and, from a second sweep into float32, what became infinite by rounding."""
    for i, values in enumerate(tile.inputs):
        places = (~values.isfinite()).nonzero()
        if len(places) and noticed.first[i] < 0:
            noticed.first[i] = tile.begin + int(places[0])
        noticed.nonfinite[i] += len(places)
    merged = [torch.empty_like(tile.inputs[0], dtype=torch.float32) for _ in outputs]
    sweep(tile.inputs, has_base, sweeps, merged, tile.begin)
    for k, (exact, output) in enumerate(zip(merged, outputs, strict=True)):
        noticed.overflow[k] += int((exact.cpu().isfinite() & output.isinf()).sum())


def _copy(inputs: Inputs, targets: Sequence[Target], run: Run) -> Found:
    for begin, (values,) in tiles(inputs, run.tile, run, torch.device("cpu")):
        for target in targets:
            store(values, target, begin)
    return Found((0,), (-1,), (0,) * len(targets))
