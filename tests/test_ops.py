"""The four ops on every provider and instruction set: the same bits as the reference, the numbers of the oracles."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import oracles
import pytest
import torch
from conftest import Memory, Tensors, bits, compiled_core, decode, encode, merge

from fastmerge import reference
from fastmerge.sweep import (
    CERTAIN,
    EVERY,
    SWEPT,
    Cut,
    Elect,
    Found,
    Keep,
    Mean,
    Part,
    Run,
    Sweep,
    Target,
    TieVote,
)

FLOATS = ("F32", "F16", "BF16")
PLAIN = Sweep((Part(),))


# --- merge: the same bits everywhere ---


@dataclass(frozen=True)
class Case:
    """One point of the space of sweeps, sizes, dtypes and ways to run; the data follow from the seed."""

    seed: int
    elements: int
    dtypes: tuple[str, ...]  # models, then the base where there is one
    has_base: bool
    outputs: tuple[str, ...]
    stages: tuple[tuple[Keep, Elect, TieVote, Mean], ...]  # one per output
    values: str
    skew: int
    run: Run

    def __str__(self) -> str:
        keep, elect, tie_vote, mean = (stage.name.lower() for stage in self.stages[0])
        models = len(self.dtypes) - self.has_base
        return (
            f"{self.seed}-{self.elements}x{models}{'+base' if self.has_base else ''}-{keep}-{elect}-{tie_vote}-{mean}"
            f"-{'+'.join(self.outputs).lower()}-{self.values}-skew{self.skew}-tile{self.run.tile}-t{self.run.threads}"
        )


STAGES = [
    (keep, elect, tie_vote, mean)
    for keep in Keep
    for elect, tie_vote, mean in [
        (Elect.NONE, TieVote.POSITIVE, Mean.SUM),
        (Elect.NONE, TieVote.POSITIVE, Mean.CONTRIBUTORS),
        *itertools.product([Elect.WEIGHTED, Elect.PLAIN, Elect.COUNT], TieVote, Mean),
    ]
]
SIZES = (0, 1, 15, 16, 17, 127, 128, 129, 2047, 2048, 2049, 5000)
CROSSING = 300_007  # several tiles of any provider


def cases() -> Iterator[Case]:
    """Every combination of stages three times over; the rest is drawn."""
    for seed, stages in enumerate(STAGES * 3):
        draw = random.Random(seed)
        has_base = draw.random() < 0.7
        outputs = draw.choices(FLOATS, k=draw.choice((1, 3)))
        yield Case(
            seed,
            CROSSING if seed % 25 == 7 else draw.choice(SIZES),
            tuple(draw.choices(FLOATS, k=draw.choice((1, 2, 3, 3, 4, 5, 17)) + has_base)),
            has_base,
            tuple(outputs),
            (stages, *draw.choices(STAGES, k=len(outputs) - 1)),
            draw.choice(("normal", "equal", "special", "tiny")),
            draw.choice((0, 0, 1, 2)),
            Run(draw.choice((1, 2, 3)), draw.choice((0, 2048, 8192))),
        )


LIMITS = [0.0, 1e-45, 1.1754942e-38, 1.1754944e-38, 2.9802322e-8, 6e-8, 6.1e-5, 65519.996, 65520, 3.39e38, 3.4028235e38]
SPECIAL = np.array([sign * x for x in [*LIMITS, 0.1, 1.0, 1.00390625, 1.01171875, np.inf, np.nan] for sign in (1, -1)])


def values_of(kind: str, count: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(count).astype(np.float32)
    if kind == "equal":  # many equal magnitudes, votes of zero, sums that cancel
        return (rng.integers(-3, 4, count) / 4).astype(np.float32)
    if kind == "special":
        return rng.choice(SPECIAL, count).astype(np.float32)
    return (rng.integers(-9, 10, count) * 1e-45).astype(np.float32)  # denormal also after a delta


def tensors_of(case: Case) -> Tensors:
    rng = np.random.default_rng(case.seed)
    models = [(values_of(case.values, case.elements, rng), dtype) for dtype in case.dtypes]
    return Tensors(models[:-1], models[-1], case.skew) if case.has_base else Tensors(models, None, case.skew)


def sweeps_of(case: Case) -> list[Sweep]:
    draw = random.Random(case.seed)
    models = len(case.dtypes) - case.has_base

    def part() -> Part:
        return Part(
            weight=draw.choice((1.0, 0.0, -0.5, 0.3, draw.gauss(0.0, 1.0))),
            rescale=draw.choice((1.0, 1.0, 2.0, 1 / 0.3)),
            magnitude=draw.choice((0.0, 0.25, 0.5, 0.75, 1.0, 3e-45, float("inf"))),
            ties_end=draw.choice((0, EVERY, draw.randint(0, case.elements))),
            cut=draw.choice((0, CERTAIN, CERTAIN // 2, draw.randint(0, CERTAIN))),
            key=draw.getrandbits(64),
            top_magnitude=draw.choice((0.0, 0.5, 0.75, 1.0, 2.0, 1e-44, float("inf"))),
            top_ties_end=draw.choice((0, EVERY, draw.randint(0, case.elements))),
        )

    return [
        Sweep(
            tuple(part() for _ in range(models)),
            keep,
            elect,
            tie_vote,
            mean,
            divisor=draw.choice((1.0, 0.0, float(models), 0.7)),
            lambda_=draw.choice((1.0, 0.5, -0.3, 0.0)),
        )
        for keep, elect, tie_vote, mean in case.stages
    ]


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_merge_has_the_bits_of_the_reference(provider: ModuleType, case: Case) -> None:
    expected, expected_found = merged_by_reference(replace(case, skew=0))
    outputs, found = merge(provider, tensors_of(case), sweeps_of(case), case.outputs, case.run, case.skew)
    for output, wanted, dtype in zip(outputs, expected, case.outputs, strict=True):
        np.testing.assert_array_equal(bits(output, dtype), bits(wanted, dtype), err_msg=dtype)
    assert found == expected_found


@cache
def merged_by_reference(case: Case) -> tuple[list[np.ndarray], Found]:
    return merge(reference, tensors_of(case), sweeps_of(case), case.outputs)


def test_merge_of_many_tensors_is_each_alone(provider: ModuleType) -> None:
    rng = np.random.default_rng(1)
    many = [Tensors([(rng.standard_normal(n), "BF16")] * 2, (rng.standard_normal(n), "F32")) for n in (70_000, 0, 3, 9)]
    sweeps = [[Sweep((Part(0.5 + i), Part(-1.0)))] * (1 + i % 2) for i in range(len(many))]
    outputs = [[Memory(4 * t.inputs.elements) for _ in k] for t, k in zip(many, sweeps, strict=True)]
    targets = [[Target("F32", output.address) for output in row] for row in outputs]
    found = provider.merge([t.inputs for t in many], sweeps, targets, Run(threads=2))
    for tensors, settings, row, noticed in zip(many, sweeps, outputs, found, strict=True):
        alone, alone_found = merge(provider, tensors, settings, ["F32"] * len(settings))
        assert noticed == alone_found
        for output, wanted in zip(row, alone, strict=True):
            output.check_guards()
            np.testing.assert_array_equal(output.bytes, wanted)


@pytest.mark.parametrize(
    "stages", [(Keep.ALL, Elect.NONE), (Keep.ABOVE, Elect.WEIGHTED), (Keep.BERNOULLI, Elect.PLAIN)]
)
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_many_settings_are_each_alone(provider: ModuleType, dtype: str, stages: tuple[Keep, Elect]) -> None:
    """More than are swept together, most of which differ in lambda alone; one overflows, and there is a NaN."""
    rng = np.random.default_rng(3)
    models = [rng.standard_normal(5003) for _ in range(2)]
    models[1][4001] = np.nan
    tensors = Tensors([(model, dtype) for model in models], (rng.standard_normal(5003), dtype))
    lambdas = [1.0, *(k / 8 for k in range(18)), 1e38, 0.5]
    sweeps = [
        Sweep(
            tuple(Part(0.5 + (k > 9), magnitude=0.5, cut=CERTAIN // 3, key=i) for i in range(2)), *stages, lambda_=each
        )
        for k, each in enumerate(lambdas)
    ]
    outputs, found = merge(provider, tensors, sweeps, [dtype] * len(sweeps))
    for k, (sweep, output) in enumerate(zip(sweeps, outputs, strict=True)):
        (expected,), alone = merge(reference, tensors, [sweep], [dtype])
        np.testing.assert_array_equal(bits(output, dtype), bits(expected, dtype), err_msg=str(lambdas[k]))
        assert found == alone._replace(overflow=found.overflow)
        assert found.overflow[k] == alone.overflow[0]
    assert (found.overflow[-2] > 0) == (dtype != "F32")  # where float32 itself overflows, nothing is narrowed


def test_no_sweeps_write_nothing(provider: ModuleType) -> None:
    tensors = Tensors([(np.ones(5000), "BF16")] * 2)
    output = Memory(4 * 5000)
    found = provider.merge(
        [tensors.inputs] * 2, [[], [Sweep((Part(),) * 2)]], [[], [Target("F32", output.address)]], Run()
    )
    assert found == [Found((0, 0), (-1, -1), ()), Found((0, 0), (-1, -1), (0,))]
    assert (decode(output.bytes, "F32") == 2).all()


# --- merge: the numbers of the oracle ---

ELECTIONS = [("none", "positive", "none"), ("none", "positive", "contributors")] + [
    (elect, tie_vote, divide)
    for elect in ("weighted", "plain", "count")
    for tie_vote in ("positive", "zero")
    for divide in ("weights", "count", "contributors", "none")
]
MEANS = {"none": Mean.SUM, "weights": Mean.WEIGHTS, "count": Mean.COUNT, "contributors": Mean.CONTRIBUTORS}


@pytest.mark.parametrize(("elect", "tie_vote", "divide"), ELECTIONS, ids="-".join)
def test_merge_is_within_rounding_of_the_oracle(provider: ModuleType, elect: str, tie_vote: str, divide: str) -> None:
    """Deltas, kept sets and votes are exact here: deltas are multiples of 2**-7 below 8, weights dyadic.

    What rounds, each by at most u = 2**-24 of its result: the sum of M terms (M), the mass and its inverse (2), lambda
    itself and its product (2), the base's sum (1), all below size = |base| + |lambda| sum |D_i| / |mass|, to first
    order; 1 % of slack covers the higher ones. Then the output's own half unit.
    """
    rng = np.random.default_rng(2)
    count, weights, lambda_ = 5000, (0.75, 1.0, -0.5, 1.25, 2.0), 0.7
    base = rng.integers(-512, 512, count) / 128
    deltas = [rng.integers(-256, 257, count) / 128 for _ in weights]
    tensors = Tensors([(base + d, "F32") for d in deltas], (base, "F32"))
    magnitude = 100 / 128
    kept = [np.where(np.abs(d) > magnitude, d, 0.0) for d in deltas]
    sweep = Sweep(
        tuple(Part(w, magnitude=magnitude, ties_end=0) for w in weights),
        Keep.ABOVE,
        Elect[elect.upper()],
        TieVote[tie_vote.upper()],
        MEANS[divide],
        lambda_=lambda_,
    )
    outputs, _ = merge(provider, tensors, [sweep] * 3, FLOATS)

    if elect == "none":
        merged, mass = oracles.weighted_sum(kept, weights, normalize=False), 1.0
        if divide == "contributors":
            merged /= np.maximum(np.count_nonzero(kept, axis=0), 1)
    else:
        merged = oracles.consensus(kept, weights, elect, tie_vote, divide)
        mass = 0.25  # the least |sum| of any of these weights but 0, which counts as 1
    exact = base + lambda_ * merged
    size = np.abs(base) + lambda_ * sum(abs(w) * np.abs(d) for w, d in zip(weights, kept, strict=True)) / mass
    arithmetic = 1.01 * (len(weights) + 5) * 2.0**-24 * size
    for dtype, raw in zip(FLOATS, outputs, strict=True):
        half_unit = 2.0 ** -oracles.FORMATS[dtype][0] * (np.abs(exact) + arithmetic) + 2.0**-25
        error = np.abs(decode(raw, dtype) - exact)
        assert (error <= arithmetic + half_unit).all(), f"{dtype}: {(error / (arithmetic + half_unit)).max():.2f}"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_narrowing_is_to_nearest_even(provider: ModuleType, dtype: str) -> None:
    """Each value of the format, the middle to its neighbour, and the float32 on either side of that middle."""
    numbers = decode(np.arange(1 << 16, dtype=np.uint16).view(np.uint8), dtype)
    numbers = np.sort(numbers[np.isfinite(numbers)]).astype(np.float32)
    middles = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    edge = np.array([65519.996, 65520, 3.3961775e38, 3.3895314e38, 3.4028235e38, 1e-45, -1e-45], np.float32)
    values = np.concatenate([numbers, middles, np.nextafter(middles, 1e38), np.nextafter(middles, -1e38), edge, -edge])
    values = values.astype(np.float32)
    ((raw,), found) = merge(provider, Tensors([(values, "F32")]), [PLAIN], [dtype])
    expected = oracles.rounded(values.astype(np.float64), dtype)
    np.testing.assert_array_equal(decode(raw, dtype), expected)
    assert found == Found((0,), (-1,), (int(np.isinf(expected).sum()),))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_number_survives_the_way_there_and_back(provider: ModuleType, dtype: str) -> None:
    raw = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    numbers = decode(raw, dtype)
    (narrow, wide), _ = merge(provider, Tensors([(raw, dtype)]), [PLAIN] * 2, [dtype, "F32"])
    number = ~np.isnan(numbers)
    np.testing.assert_array_equal(bits(narrow, dtype)[number], bits(raw, dtype)[number])
    np.testing.assert_array_equal(decode(wide, "F32"), numbers)


# --- merge: what is defined at the edges ---


def merged_values(
    provider: ModuleType, models: list[list[float]], base: list[float] | None, sweep: Sweep
) -> np.ndarray:
    """Small float32 tensors, repeated so that whole lanes and the rest of a vector are both run."""
    models32 = [np.tile(np.array(model, np.float32), 37) for model in models]
    base32 = None if base is None else (np.tile(np.array(base, np.float32), 37), "F32")
    tensors = Tensors([(model, "F32") for model in models32], base32)
    ((raw,), _) = merge(provider, tensors, [sweep], ["F32"])
    rows = bits(raw, "F32").reshape(37, -1)
    assert (rows == rows[0]).all(), "an element's result depends on its place"
    return raw[: 4 * len(models[0])].view(np.float32)


def same_bits(found: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), np.array(expected, np.float32).view(np.uint32))


def test_nothing_to_add_leaves_the_bits_of_the_base(provider: ModuleType) -> None:
    base = [-0.0, 0.0, 1e-45, np.inf]
    for sweep in (
        Sweep((Part(0.0),)),
        Sweep((Part(-1.0),), lambda_=0.0),
        Sweep((Part(cut=0),), Keep.BERNOULLI),
        Sweep((Part(magnitude=10.0),), Keep.ABOVE),
        Sweep((Part(),), elect=Elect.WEIGHTED, tie_vote=TieVote.ZERO, mean=Mean.WEIGHTS, lambda_=0.0),
    ):
        same_bits(merged_values(provider, [[1.0, 2.0, 3.0, 4.0]], base, sweep)[:3], base[:3])
    same_bits(merged_values(provider, [[1.0]], [np.inf], Sweep((Part(cut=0),), Keep.BERNOULLI)), [np.inf])


def test_a_dropped_nan_is_gone_and_a_trimmed_one_stays(provider: ModuleType) -> None:
    nan = [np.nan, 3.0]
    same_bits(merged_values(provider, [nan], [1.0, 1.0], Sweep((Part(cut=0),), Keep.BERNOULLI)), [1.0, 1.0])
    trimmed = Sweep((Part(magnitude=float("inf"), ties_end=0),), Keep.ABOVE)
    same_bits(merged_values(provider, [nan], [1.0, 1.0], trimmed), [np.nan, 1.0])


@pytest.mark.parametrize("elect", [Elect.WEIGHTED, Elect.PLAIN, Elect.COUNT])
@pytest.mark.parametrize("others", [1.0, -1.0])
def test_a_nan_is_never_outvoted(provider: ModuleType, elect: Elect, others: float) -> None:
    sweep = Sweep((Part(),) * 3, elect=elect, mean=Mean.COUNT)
    found = merged_values(provider, [[np.nan, 1.0], [others, 1.0], [others, 1.0]], [0.0, 0.0], sweep)
    same_bits(found, [np.nan, 1.0])


def test_every_nan_comes_out_as_one(provider: ModuleType) -> None:
    patterns = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7FC12345], np.uint32).view(np.float32)
    outputs, found = merge(provider, Tensors([(np.tile(patterns, 9), "F32")]), [PLAIN] * 3, FLOATS)
    for raw, dtype, quiet in zip(outputs, FLOATS, (0x7FC00000, 0x7E00, 0x7FC0), strict=True):
        assert set(bits(raw, dtype).tolist()) == {quiet}
    assert found == Found((45,), (0,), (0, 0, 0))


def test_a_vote_of_zero_elects_as_asked(provider: ModuleType) -> None:
    models, base = [[3.0, 1.0], [-1.0, 1.0]], [1.0, 1.0]
    for tie_vote, expected in ((TieVote.POSITIVE, 3.0), (TieVote.ZERO, 1.0)):
        for elect in (Elect.WEIGHTED, Elect.PLAIN, Elect.COUNT):
            sweep = Sweep((Part(), Part()), elect=elect, tie_vote=tie_vote, mean=Mean.COUNT)
            same_bits(merged_values(provider, models, base, sweep), [expected, 1.0])


def test_a_mass_of_zero_counts_as_one(provider: ModuleType) -> None:
    # both agree, as -1 times -3 is positive; their weights cancel
    sweep = Sweep((Part(1.0), Part(-1.0)), elect=Elect.WEIGHTED, mean=Mean.WEIGHTS)
    same_bits(merged_values(provider, [[2.0], [-3.0]], [0.0], sweep), [5.0])
    same_bits(merged_values(provider, [[2.0], [-3.0]], [0.0], Sweep((Part(), Part()), divisor=0.0)), [-1.0])


@pytest.mark.parametrize("divisor", [2.0, -3.0, 1e-45, -1e-45, 3e38])
def test_a_zero_divided_is_a_zero_of_the_quotients_sign(provider: ModuleType, divisor: float) -> None:
    zeros = np.array([-0.0, 0.0], np.float32)
    same_bits(
        merged_values(provider, [zeros.tolist()], None, Sweep((Part(),), divisor=divisor)), zeros / np.float32(divisor)
    )


def test_without_an_election_no_model_agrees(provider: ModuleType) -> None:
    """Means by those that agree are sums then; a model of weight 0 contributes nothing, a NaN does."""
    models = [[3.0, 3.0, 0.0, np.nan], [1.0, 1.0, 0.0, 0.0], [2.0, 0.0, 0.0, 1.0]]
    for mean, expected in (
        (Mean.WEIGHTS, [2.5, 1.5, 0.0]),
        (Mean.COUNT, [2.5, 1.5, 0.0]),
        (Mean.CONTRIBUTORS, [2.5, 3, 0]),
    ):
        sweep = Sweep((Part(), Part(0.0), Part()), mean=mean, divisor=2.0)
        same_bits(merged_values(provider, models, None, sweep), [*expected, np.nan])


def test_equals_are_kept_below_the_end_of_ties(provider: ModuleType) -> None:
    count, end = 5000, 3333
    values = np.where(np.arange(count) % 2, -0.5, 0.5)
    sweep = Sweep((Part(magnitude=0.5, ties_end=end),), Keep.ABOVE)
    ((raw,), _) = merge(provider, Tensors([(values, "BF16")]), [sweep], ["F32"], Run(2, 2048))
    np.testing.assert_array_equal(decode(raw, "F32"), np.where(np.arange(count) < end, values, 0.0))


def test_a_band_begins_and_ends_where_its_ties_do(provider: ModuleType) -> None:
    count, begin, end = 5000, 1111, 3333
    values = np.where(np.arange(count) % 2, -0.5, 0.5)
    values[[7, 3000]] = 0.75, -0.25
    inside = (np.arange(count) >= begin) & (np.arange(count) < end) & (np.abs(values) == 0.5)
    part = Part(magnitude=0.5, ties_end=end, top_magnitude=0.5, top_ties_end=begin)
    ((raw,), _) = merge(provider, Tensors([(values, "BF16")]), [Sweep((part,), Keep.BAND)], ["F32"], Run(2, 2048))
    np.testing.assert_array_equal(decode(raw, "F32"), np.where(inside, values, 0.0))


def test_a_band_leaves_out_the_infinite_and_keeps_what_is_no_number(provider: ModuleType) -> None:
    for top, ties_end, infinite in ((2.0, 0, [0, 0]), (np.inf, 0, [np.inf, -np.inf]), (np.inf, EVERY, [0, 0])):
        sweep = Sweep((Part(magnitude=1.0, top_magnitude=top, top_ties_end=ties_end),), Keep.BAND)
        values = [np.nan, np.inf, -np.inf, 1.5, 0.5]
        same_bits(merged_values(provider, [values], [0.0] * 5, sweep), [np.nan, *infinite, 1.5, 0.0])


def test_a_clip_leaves_the_sign_and_what_is_no_number(provider: ModuleType) -> None:
    values = [np.nan, np.inf, -np.inf, 0.5, -0.5, 0.25, -0.25, 1e-45, -0.0]
    for limit in (0.5, 0.25, 1e-45, 0.0):
        cut = np.copysign(np.minimum(np.abs(values), limit), values).tolist()
        sweep = Sweep((Part(magnitude=limit),), Keep.CLIP)
        same_bits(merged_values(provider, [values], None, sweep), cut)


def test_found_names_what_is_not_finite(provider: ModuleType) -> None:
    model, other, base = np.ones(CROSSING), np.ones(CROSSING), np.zeros(CROSSING)
    model[[70_001, 70_002, CROSSING - 1]] = np.nan, np.inf, -np.inf
    base[[5, 299_000]] = np.inf, np.nan
    for skew, run in ((0, Run()), (1, Run(3, 8192))):
        tensors = Tensors([(model, "BF16"), (other, "F32")], (base, "F16"), skew)
        _, found = merge(provider, tensors, [Sweep((Part(), Part()))], ["F32"], run)
        assert found == Found((3, 0, 2), (70_001, -1, 5), (0,))


@pytest.mark.parametrize("at", [8, 2048, 131_080, 2**33 + 2**20 + 8], ids=["line", "chunk", "tile", "beyond-32-bits"])
@pytest.mark.parametrize("keep", [Keep.ABOVE, Keep.BERNOULLI, Keep.BAND])
def test_a_part_of_a_tensor_is_swept_at_its_place(provider: ModuleType, keep: Keep, at: int) -> None:
    """Random bits, the end of ties, and what is found count from the start of the whole tensor."""
    rng = np.random.default_rng(12)
    models = [(values_of("equal", 5000, rng), "BF16") for _ in range(2)]
    models[1][0][4321] = np.inf
    cuts = {"ties_end": at + 2051, "top_magnitude": 0.75, "top_ties_end": at + 777}
    parts = (
        Part(magnitude=0.5, cut=2**31 + 12_345, key=0xFEDCBA9876543210, **cuts),  # type: ignore[arg-type]
        Part(cut=2**30, key=7),
    )
    sweep, output, tensors = Sweep(parts, keep), Memory(4 * 5000), Tensors(models)
    targets = [Target("F32", output.address)]
    (found,) = provider.merge([tensors.inputs._replace(begin=at)], [[sweep]], [targets], Run(2, 2048))
    wanted = reference.sweep_tile([torch.from_numpy(model) for model, _ in models], None, sweep, at)
    np.testing.assert_array_equal(decode(output.bytes, "F32"), wanted.numpy())
    assert found == Found((0, 1), (-1, at + 4321), (0,))
    (norms,) = provider.norms([tensors.inputs._replace(begin=at)], [sweep], Run())
    kept = [
        reference.keep(torch.from_numpy(model), keep, part, at) for (model, _), part in zip(models, parts, strict=True)
    ]
    l1 = [float(each[each.isfinite()].abs().double().sum()) for each in kept]
    np.testing.assert_allclose(norms[:, 1, 0], l1, rtol=1e-12)


def test_found_counts_what_overflows_each_output(provider: ModuleType) -> None:
    values = np.ones(40_000, np.float32)
    values[[3, 20_000, 39_999]] = 65520, 3.4e38, -70000
    values[7] = np.inf  # not an overflow: it was infinite before
    for run in (Run(), Run(2, 2048)):
        _, found = merge(provider, Tensors([(values, "F32")]), [PLAIN] * 3, ["F16", "BF16", "F32"], run)
        assert found == Found((1,), (7,), (3, 1, 0))


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("count", [0, 1, 4097, CROSSING])
def test_bytes_are_copied(provider: ModuleType, count: int, skew: int) -> None:
    raw = np.random.default_rng(3).integers(0, 256, count, np.uint8)
    tensors = Tensors([(raw, "U8")], None, skew)
    copies, found = merge(provider, tensors, [PLAIN] * 2, ["U8"] * 2, Run(2, 2048), skew)
    for copied in copies:
        np.testing.assert_array_equal(copied, raw)
    assert found == Found((0,), (-1,), (0, 0))


@pytest.mark.parametrize("dtype", [*FLOATS, "U8"])
def test_a_file_gets_the_bytes_that_memory_gets(provider: ModuleType, tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(4)
    if dtype == "U8":
        tensors, sweep = Tensors([(rng.integers(0, 256, CROSSING, np.uint8), dtype)]), PLAIN
    else:
        sweep = Sweep((Part(0.3), Part(0.6)), elect=Elect.WEIGHTED, mean=Mean.WEIGHTS)
        tensors = Tensors([(rng.standard_normal(CROSSING), "BF16")] * 2, (rng.standard_normal(CROSSING), "F32"))
    ((expected,), _) = merge(provider, tensors, [sweep], [dtype])
    path, before = tmp_path / "shard", 1003
    path.write_bytes(b"\xa5" * (before + expected.size + 10))
    with path.open("r+b") as file:
        targets = [[Target(dtype, before, file.fileno())]]
        provider.merge([tensors.inputs], [[sweep]], targets, Run(threads=3, tile=8192))
    written = np.fromfile(path, np.uint8)
    np.testing.assert_array_equal(written[before : before + expected.size], expected)
    assert (np.delete(written, slice(before, before + expected.size)) == 0xA5).all(), "written outside of the tensor"


def test_the_reference_goes_on_after_a_short_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, raw, offset: write_all(file, raw[:1000], offset))
    values = np.arange(5000, dtype=np.float32)
    tensors, path = Tensors([(values, "F32")]), tmp_path / "shard"
    with path.open("wb") as file:
        reference.merge([tensors.inputs], [[PLAIN]], [[Target("F32", 3, file.fileno())]], Run(tile=2048))
    np.testing.assert_array_equal(np.frombuffer(path.read_bytes()[3:], np.float32), values)


def test_a_file_that_cannot_be_written_is_an_error(provider: ModuleType, tmp_path: Path) -> None:
    tensors = Tensors([(np.ones(5000), "F32")])
    path = tmp_path / "shard"
    path.write_bytes(b"")
    file = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            provider.merge([tensors.inputs], [[PLAIN]], [[Target("F32", 0, file)]], Run(threads=2))
    finally:
        os.close(file)


def test_ticks_add_up_to_the_bytes_of_the_inputs(provider: ModuleType) -> None:
    """Once per op, however often a selection has to look: the engine plans a pass for each."""
    tensors, sweep = real_tensors()
    output = Memory(4 * CROSSING)
    ops = {
        "merge": lambda run: provider.merge([tensors.inputs], [[sweep]], [[Target("F32", output.address)]], run),
        "gram": lambda run: provider.gram([tensors.inputs], run),
        "norms": lambda run: provider.norms([tensors.inputs], [sweep], run),
        "threshold": lambda run: provider.threshold([[tensors.inputs]], [(1, 5000, 200_000)], run),
    }
    for name, op in ops.items():
        ticks: list[int] = []
        op(Run(2, tick=ticks.append))
        assert sum(ticks) == tensors.nbytes, name


def test_an_interrupt_from_the_tick_gets_through(provider: ModuleType) -> None:
    tensors, output = Tensors([(np.ones(CROSSING), "F32")]), Memory(4 * CROSSING)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    run = Run(threads=2, tile=2048, tick=interrupt)
    with pytest.raises(KeyboardInterrupt):
        provider.merge([tensors.inputs], [[PLAIN]], [[Target("F32", output.address)]], run)
    with pytest.raises(KeyboardInterrupt):
        provider.gram([tensors.inputs], run)
    with pytest.raises(KeyboardInterrupt):
        provider.threshold([[tensors.inputs]], [[5]], run)


# --- merge: float64, which the reference alone sweeps ---


def test_float64_is_swept_in_float64() -> None:
    rng = np.random.default_rng(5)
    models, base = [rng.standard_normal(3000) for _ in range(3)], rng.standard_normal(3000)
    tensors = Tensors([(model, "F64") for model in models], (base.astype(np.float32), "F32"))
    sweep = Sweep(tuple(Part(w) for w in (0.1, 0.2, 0.3)), divisor=0.6, lambda_=0.7)
    ((raw,), _) = merge(reference, tensors, [sweep], ["F64"])
    base32 = base.astype(np.float32).astype(np.float64)
    expected = oracles.task_arithmetic(base32, models, (0.1, 0.2, 0.3), normalize=True, lambda_=0.7)
    np.testing.assert_allclose(decode(raw, "F64"), expected, rtol=0, atol=20 * 2.0**-53 * 8)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float64_is_rounded_once(dtype: str) -> None:
    """Just off a middle between two neighbours by less than float32 can tell: rounding twice would go to even."""
    precision = oracles.FORMATS[dtype][0]
    middles = 1 + (2 * np.arange(60) + 1) * 2.0**-precision
    values = np.concatenate([middles, np.nextafter(middles, 2), np.nextafter(middles, 0)])
    values = np.concatenate([values, -values, values * 2.0**-140, [1e300, -1e300, 1e-300, 0.0, -0.0]])
    ((raw,), _) = merge(reference, Tensors([(values, "F64")]), [PLAIN], [dtype])
    np.testing.assert_array_equal(decode(raw, dtype), oracles.rounded(values, dtype))


# --- threshold ---


def selection_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(6)
    large = 1 << 20
    normal = rng.standard_normal(large + 1).astype(np.float32)
    block = normal[:200_000] * np.float32(1e-3)
    block[100_000:104_096] *= np.float32(1e6)
    flat = np.full(200_000, 0.25, np.float32)
    flat[[5, 199_999, 77_777]] = 9.0, -7.0, 0.0
    strided = normal[:200_000].copy()
    strided[::64] *= np.float32(1e4)
    return {
        "one": np.array([-2.0], np.float32),
        "normal": normal[:5000],
        "bf16-ties": decode(encode(normal[:200_000] * 0.02, "BF16"), "BF16").astype(np.float32),
        "few-values": (rng.integers(-3, 4, 70_001) / 4).astype(np.float32),
        "all-equal": np.where(np.arange(3001) % 3, -1.5, 1.5).astype(np.float32),
        "all-zero": np.where(np.arange(3001) % 3, -0.0, 0.0).astype(np.float32),
        "denormals": (rng.integers(-50, 51, 3001) * 1e-45).astype(np.float32),
        "specials": rng.choice(SPECIAL, 5001).astype(np.float32),
        "ascending": np.sort(np.abs(normal[:300_000])),
        "descending": -np.sort(np.abs(normal[:300_000]))[::-1],
        "outlier-block": block,
        "outliers-in-a-constant": flat,
        "outliers-at-a-stride": strided,
        "a-million-and-one": normal,
    }


SELECTION = selection_data()


@pytest.mark.parametrize("data", SELECTION)
def test_threshold_keeps_exactly_the_rank(provider: ModuleType, data: str) -> None:
    values = SELECTION[data]
    n = len(values)
    ranks = (1, n // 5, n // 2, n - 1) if n > 100_000 else sorted({-3, 0, 1, 2, n // 5, n // 2, n - 2, n - 1, n, n + 7})
    tensors = Tensors([(values, "F32")] * len(ranks))
    (cuts,) = provider.threshold([[tensors.inputs]], [ranks], Run(threads=2))
    for k, cut in zip(ranks, cuts, strict=True):
        check_cut(cut, values, k)
    assert (cuts,) == tuple(reference.threshold([[tensors.inputs]], [ranks], Run(tile=8192)))


def check_cut(cut: Cut, values: np.ndarray, k: int) -> None:
    magnitudes, index = oracles.selectable(values), np.arange(len(values))
    if k <= 0:
        assert cut == Cut(float("inf"), 0)
    elif k >= len(values):
        assert cut == Cut(0.0, EVERY)
    else:
        assert cut.magnitude == oracles.kth_largest(values, k), f"rank {k} of {len(values)}"
        assert (cut.ties_end == EVERY) == ((magnitudes >= cut.magnitude).sum() == k), "EVERY where all equals stay"
    kept = (magnitudes > cut.magnitude) | ((magnitudes == cut.magnitude) & (index < cut.ties_end))
    assert kept.sum() == min(max(k, 0), len(values))
    np.testing.assert_array_equal(kept | np.isnan(values), oracles.kept_by_rank(values, k), err_msg=f"rank {k}")


@pytest.mark.parametrize("run", [Run(1, 2048), Run(2, 8192), Run(3, 0)], ids=str)
@pytest.mark.parametrize("skew", [0, 1])
def test_threshold_of_deltas_does_not_depend_on_the_run(provider: ModuleType, run: Run, skew: int) -> None:
    rng = np.random.default_rng(7)
    base = rng.integers(-512, 512, 70_003) / 512
    deltas = [rng.integers(-128, 129, base.size) / 512 for _ in range(3)]
    dtypes = ("F32", "F16", "F32")
    tensors = Tensors([(base + d, dtype) for d, dtype in zip(deltas, dtypes, strict=True)], (base, "F32"), skew)
    ranks = (7000, 35_001, 70_002)
    (cuts,) = provider.threshold([[tensors.inputs]], [ranks], run)
    for k, cut, delta in zip(ranks, cuts, deltas, strict=True):
        check_cut(cut, delta, k)


@pytest.mark.parametrize("size", [700, 70_000])
def test_threshold_of_a_group_is_that_of_its_tensors_end_to_end(provider: ModuleType, size: int) -> None:
    rng = np.random.default_rng(8)
    pieces = [[rng.integers(-40, 41, n) / 16 for _ in range(3)] for n in (500, 0, 1, size, 17)]
    group = [Tensors([(a + base, "BF16"), (b + base, "F32")], (base, "BF16")) for a, b, base in pieces]
    alone = Tensors([(pieces[0][0], "F32")])
    elements = size + 518
    ranks = [(elements // 4, elements * 4 // 5), (499,)]
    found = provider.threshold([[tensors.inputs for tensors in group], [alone.inputs]], ranks, Run(threads=2))
    for m in range(2):
        check_cut(found[0][m], np.concatenate([piece[m] for piece in pieces]), ranks[0][m])
    check_cut(found[1][0], pieces[0][0], 499)


def test_a_threshold_trims_to_exactly_its_rank(provider: ModuleType) -> None:
    values = SELECTION["bf16-ties"]
    tensors = Tensors([(values, "BF16")])
    for k in (1, 1000, 100_000):
        ((cut,),) = provider.threshold([[tensors.inputs]], [(k,)], Run())
        sweep = Sweep((Part(magnitude=cut.magnitude, ties_end=cut.ties_end),), Keep.ABOVE)
        ((raw,), _) = merge(provider, tensors, [sweep], ["F32"])
        np.testing.assert_array_equal(decode(raw, "F32"), np.where(oracles.largest(np.abs(values), k), values, 0.0))


# --- gram and norms: sums of n float64 terms err by less than n 2**-53 of the sum of their magnitudes, 1e-12 here ---

RUNS = (Run(1, 0), Run(2, 0), Run(3, 2048), Run(2, 8192))


def measured_tensors(skew: int, with_base: bool, count: int = 5000) -> tuple[Tensors, list[np.ndarray]]:
    """Mixed dtypes that all hold the same multiples of 1/256 exactly, deltas too; and the vectors measured."""
    rng = np.random.default_rng(9)
    base = rng.integers(-64, 65, count) / 256
    models = [base + rng.integers(-64, 65, count) / 256 for _ in range(3)]
    dtypes = ("BF16", "F16", "F32")
    tensors = Tensors(list(zip(models, dtypes, strict=True)), (base, "BF16") if with_base else None, skew)
    return tensors, [model - base for model in models] if with_base else models


@pytest.mark.parametrize("with_base", [False, True], ids=["weights", "deltas"])
@pytest.mark.parametrize("skew", [0, 1])
def test_gram_is_that_of_the_oracle(provider: ModuleType, with_base: bool, skew: int) -> None:
    tensors, vectors = measured_tensors(skew, with_base)
    expected = oracles.gram(vectors)
    sizes = np.sqrt(np.diag(expected))
    (found,) = provider.gram([tensors.inputs], Run(threads=2))
    assert found.dtype == np.float64
    assert (np.abs(found - expected) <= 1e-12 * np.outer(sizes, sizes)).all()


@pytest.mark.parametrize(("models", "count"), [(1, 1), (2, 0), (2, 17), (5, 129), (17, 2049)])
def test_gram_of_any_number_of_models_and_elements(provider: ModuleType, models: int, count: int) -> None:
    vectors = [np.random.default_rng(i).standard_normal(count).astype(np.float32) for i in range(models)]
    tensors = Tensors([(v, "F32") for v in vectors])
    (found,) = provider.gram([tensors.inputs], Run())
    wide = [v.astype(np.float64) for v in vectors]
    expected = oracles.gram(wide)
    sizes = np.sqrt(np.diag(expected))
    assert found.shape == (models, models)
    assert (np.abs(found - expected) <= 1e-12 * np.outer(sizes, sizes)).all()


def test_gram_and_norms_do_not_depend_on_the_run(provider: ModuleType) -> None:
    tensors, sweep = real_tensors()
    grams = [provider.gram([tensors.inputs], run)[0].tobytes() for run in RUNS]
    norms = [provider.norms([tensors.inputs], [sweep], run)[0].tobytes() for run in RUNS]
    assert len(set(grams)) == 1
    assert len(set(norms)) == 1


def test_gram_and_norms_have_the_same_bits_on_every_isa() -> None:
    native = compiled_core()
    tensors, sweep = real_tensors()
    found = {}
    for isa in native.isas():
        with native.using(isa):
            gram, norms = native.gram([tensors.inputs], Run()), native.norms([tensors.inputs], [sweep], Run())
            found[isa] = gram[0].tobytes() + norms[0].tobytes()
    assert len(found) == len(native.isas()) >= 1
    assert len(set(found.values())) == 1


def real_tensors() -> tuple[Tensors, Sweep]:
    rng = np.random.default_rng(10)
    models = [(rng.standard_normal(CROSSING), dtype) for dtype in ("F32", "BF16", "F16")]
    return Tensors(models, (rng.standard_normal(CROSSING), "F32")), Sweep((Part(magnitude=1.0),) * 3, Keep.ABOVE)


@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("with_base", [False, True], ids=["weights", "deltas"])
def test_norms_are_those_of_the_oracle(provider: ModuleType, keep: Keep, with_base: bool) -> None:
    tensors, vectors = measured_tensors(0, with_base)
    like = Part(3.0, 7.0, magnitude=30 / 256, ties_end=2000, cut=CERTAIN // 3, top_magnitude=50 / 256, top_ties_end=900)
    parts = tuple(replace(like, key=i) for i in range(3))
    (found,) = provider.norms([tensors.inputs], [Sweep(parts, keep)], Run(threads=2))
    index = np.arange(len(vectors[0]))
    for vector, part, (before, after) in zip(vectors, parts, found, strict=True):
        magnitudes = np.abs(vector)
        above = (magnitudes > part.magnitude) | ((magnitudes == part.magnitude) & (index < part.ties_end))
        gone = (magnitudes > part.top_magnitude) | ((magnitudes == part.top_magnitude) & (index < part.top_ties_end))
        kept = {
            Keep.ALL: np.ones(len(vector), bool),
            Keep.ABOVE: above,
            Keep.BERNOULLI: oracles.bernoulli(part.key, part.cut, len(vector)),
            Keep.BAND: above & ~gone,
            Keep.CLIP: np.ones(len(vector), bool),
        }[keep]
        limit = part.magnitude if keep is Keep.CLIP else np.inf
        np.testing.assert_allclose(before, oracles.norms(vector), rtol=1e-12)
        np.testing.assert_allclose(after, oracles.norms(np.where(kept, vector, 0.0).clip(-limit, limit)), rtol=1e-12)


@pytest.mark.parametrize("keep", [Keep.ABOVE, Keep.BAND, Keep.CLIP])
def test_what_is_not_finite_is_not_measured(provider: ModuleType, keep: Keep) -> None:
    rng = np.random.default_rng(11)
    clean = [rng.integers(-64, 65, 5000) / 16 for _ in range(2)]
    dirty = [vector.copy() for vector in clean]
    for vector, other in zip(clean, dirty, strict=True):
        places = rng.choice(5000, 40, replace=False)
        vector[places] = 0.0
        other[places] = rng.choice([np.nan, np.inf, -np.inf], 40)
    sweep = Sweep((Part(magnitude=1.0), Part(magnitude=2.0)), keep)
    measured = [Tensors([(v, "F32") for v in vectors]) for vectors in (clean, dirty)]
    grams = [provider.gram([tensors.inputs], Run())[0].tolist() for tensors in measured]
    norms = [provider.norms([tensors.inputs], [sweep], Run())[0].tolist() for tensors in measured]
    assert grams[0] == grams[1]
    assert norms[0] == norms[1]


def test_norms_of_nothing_are_zero(provider: ModuleType) -> None:
    tensors = Tensors([(np.zeros(0), "F32")])
    (found,) = provider.norms([tensors.inputs], [PLAIN], Run())
    np.testing.assert_array_equal(found, np.zeros((1, 2, 3)))


def test_the_sizes_of_the_dtypes_are_those_of_numpy() -> None:
    assert {dtype: encode(np.zeros(1), dtype).size for dtype in FLOATS} == {dtype: SWEPT[dtype] for dtype in FLOATS}
