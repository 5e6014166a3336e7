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
from .staging import DTYPES, Arriving, device, store, tiles
from .stages import NUMBERS, WHOLES, divisor, keep, load, magnitude_bits, tables

_NONE = tl.constexpr(int(Elect.NONE))
_WEIGHTED = tl.constexpr(int(Elect.WEIGHTED))
_COUNT = tl.constexpr(int(Elect.COUNT))
_ZERO = tl.constexpr(int(TieVote.ZERO))
_BY_SUM = tl.constexpr(int(Mean.SUM))
_BY_WEIGHTS = tl.constexpr(int(Mean.WEIGHTS))
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
    STAGES: tl.constexpr,  # noqa: N803  per output: keep, elect, tie_vote, mean, whether the divisor is not 1
    MODELS: tl.constexpr,  # noqa: N803
    HAS_BASE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    block = tl.program_id(0) * BLOCK
    place = block + tl.arange(0, BLOCK)
    inside = place < count
    start = begin.to(tl.int64) + block
    odd = place < 0  # not finite, or too large for the output
    base = tl.zeros((BLOCK,), tl.float32)
    if HAS_BASE:
        base = load(inputs[MODELS], place, inside)
        odd = odd | (magnitude_bits(base) >= _INFINITE)
    deltas = ()
    for m in tl.static_range(MODELS):
        model = load(inputs[m], place, inside)
        odd = odd | (magnitude_bits(model) >= _INFINITE)
        if HAS_BASE:
            model = model - base
        deltas = deltas + (model,)  # noqa: RUF005  the compiler knows tuples by their sum
    for k in tl.static_range(len(STAGES)):
        merged = _merged(
            deltas,
            numbers + k * (MODELS + 1) * NUMBERS,
            wholes + k * MODELS * WHOLES,
            start,
            STAGES[k][0],
            STAGES[k][1],
            STAGES[k][2],
            STAGES[k][3],
            STAGES[k][4],
            MODELS,
            BLOCK,
        )
        if HAS_BASE:
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
    KEEP: tl.constexpr,  # noqa: N803
    ELECT: tl.constexpr,  # noqa: N803
    TIE_VOTE: tl.constexpr,  # noqa: N803
    MEAN: tl.constexpr,  # noqa: N803
    DIVIDES: tl.constexpr,  # noqa: N803
    MODELS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """lambda times the mean. What the models say is summed apart by its sign, so no delta is looked at twice.

    The sums start at +0 and so are never -0: leaving a term out and adding a zero are the same.
    """
    zero = tl.zeros((BLOCK,), tl.float32)
    total, vote, positive, negative, mass_positive, mass_negative = zero, zero, zero, zero, zero, zero
    for m in tl.static_range(MODELS):
        weight = tl.load(numbers + m * NUMBERS)
        delta = keep(deltas[m], wholes + m * WHOLES, start, KEEP, BLOCK) * tl.load(numbers + m * NUMBERS + 1)
        weighted = delta * weight
        if ELECT == _NONE:
            total = weighted if m == 0 else total + weighted  # not from +0: a negative zero stays
        else:
            voice = weighted if ELECT == _WEIGHTED else delta
            down, up = voice <= 0.0, voice >= 0.0  # a NaN is neither, so it stands on both sides and is never lost
            if ELECT == _COUNT:
                vote = vote + tl.where(voice > 0.0, 1.0, tl.where(voice < 0.0, -1.0, 0.0))
            else:
                vote = vote + voice
            positive = positive + tl.where(down, 0.0, weighted)
            negative = negative + tl.where(up, 0.0, weighted)
            if MEAN != _BY_SUM:
                part = weight if MEAN == _BY_WEIGHTS else 1.0
                mass_positive = mass_positive + _mass(voice, down, part, MEAN)
                mass_negative = mass_negative + _mass(voice, up, part, MEAN)
    mass = zero + tl.load(numbers + MODELS * NUMBERS)
    if ELECT != _NONE:
        elected = vote > 0.0 if TIE_VOTE == _ZERO else vote >= 0.0
        total = tl.where(elected, positive, tl.where(vote >= 0.0, 0.0, negative))
        if MEAN != _BY_SUM:
            mass = tl.where(elected, mass_positive, tl.where(vote >= 0.0, 0.0, mass_negative))
            mass = tl.where(mass == 0.0, 1.0, mass)
    if DIVIDES:
        total = tl.div_rn(total, mass)
    return total * tl.load(numbers + MODELS * NUMBERS + 1)


@triton.jit
def _mass(voice, against, part, MEAN: tl.constexpr):  # noqa: N803
    """What a model adds to the divisor of one side."""
    if MEAN == _BY_CONTRIBUTORS:
        return tl.where(voice == 0.0, 0.0, part)
    return tl.where(against, 0.0, part)


@triton.jit
def _too_large(values, DTYPE: tl.constexpr):  # noqa: N803
    """Where rounding into a type of 16 bits gives infinity, or nothing finite was there before."""
    if DTYPE == tl.float16:
        return magnitude_bits(values) >= 0x477FF000  # 65520
    if DTYPE == tl.bfloat16:
        return magnitude_bits(values) >= 0x7F7F8000
    return values != values


@triton.jit
def _narrowed(values, DTYPE: tl.constexpr):  # noqa: N803
    """Rounded to nearest even; any NaN is the one quiet NaN without a payload, which devices spell differently."""
    bits = values.to(tl.int32, bitcast=True)
    if DTYPE == tl.bfloat16:  # in whole numbers, as the interpreter's own conversion cuts
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(values != values, 0x7FC0, rounded).to(tl.int16)
    elif DTYPE == tl.float16:
        bits = tl.where(values != values, 0x7E00, values.to(tl.float16).to(tl.int16, bitcast=True)).to(tl.int16)
    else:
        bits = tl.where(values != values, 0x7FC00000, bits)
    return bits.to(DTYPE, bitcast=True)


# --- the launch ---

#: Elements per program by the number of inputs: what they hold must fit in registers. Not yet measured on a card.
_BLOCKS = ((4, 1024), (8, 512), (16, 256))
_LEAST_BLOCK = 128
_WARPS = 4


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
            STAGES=stages_of(sweeps),
            MODELS=len(inputs) - has_base,
            HAS_BASE=has_base,
            BLOCK=block,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    return flag


def block_of(inputs: int) -> int:
    return next((block for limit, block in _BLOCKS if inputs <= limit), _LEAST_BLOCK)


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
    noticed = _Noticed(len(inputs.models) + has_base, len(targets))
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
