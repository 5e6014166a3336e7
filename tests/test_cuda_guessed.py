"""`merge_ranked` on the emulated device where tensors are large: a guess, right or not, gives the reference's bits."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import ModuleType

import emulated
import numpy as np
import pytest
from conftest import SIZES, Memory, Tensors, decode, encode, merge

from fastmerge import reference
from fastmerge.sweep import Cut, Elect, Found, Keep, Mean, Part, Run, Sweep, Target

#: More than four tiles for each of the six emulated blocks; neither tiles nor eights are whole.
LARGE = 6 * 4 * 8192 + 5003
OPEN = Cut(7.0, -5)  # what the parts say before anything is selected


@pytest.fixture
def provider() -> ModuleType:
    return emulated.provider()


def stored() -> int:
    """How many bytes of outputs have been written, anew or not."""
    library = ctypes.CDLL(str(emulated.compiled().__file__))
    library.emulated_stored.restype = ctypes.c_ulonglong
    return int(library.emulated_stored())


def launches() -> int:
    library = ctypes.CDLL(str(emulated.compiled().__file__))
    library.emulated_launches.restype = ctypes.c_ulonglong
    return int(library.emulated_launches())


def tensors_of(deltas: Sequence[np.ndarray], dtype: str, skew: int = 0, seed: int = 30) -> Tensors:
    base = np.random.default_rng(seed).normal(0, 0.02, len(deltas[0]))
    base = decode(encode(base, dtype), dtype).astype(np.float64)
    return Tensors([(base + each, dtype) for each in deltas], (base, dtype), skew)


def sweep(cuts: Sequence[Cut], mean: Mean = Mean.WEIGHTS, lambda_: float = 1.0) -> Sweep:
    parts = tuple(Part(0.5 + 0.25 * m, magnitude=cut.magnitude, ties_end=cut.ties_end) for m, cut in enumerate(cuts))
    return Sweep(parts, Keep.ABOVE, Elect.WEIGHTED, mean=mean, lambda_=lambda_)


def written(
    provider: ModuleType,
    many: Sequence[Tensors],
    ranks: Sequence[Sequence[int]],
    mean: Mean = Mean.WEIGHTS,
    lambdas: Sequence[float] = (1.0,),
    dtype: str = "BF16",
) -> tuple[float, list[Found]]:
    """How often the outputs were written, and what was found: all of it, and all bits, are the reference's."""
    outputs = [[Memory(t.inputs.elements * SIZES[dtype]) for _ in lambdas] for t in many]
    targets = [[Target(dtype, output.address) for output in each] for each in outputs]
    unknown = [[sweep([OPEN] * len(each), mean, lambda_) for lambda_ in lambdas] for each in ranks]
    before = stored()
    cuts, found = provider.merge_ranked([t.inputs for t in many], unknown, ranks, targets, Run())
    total = stored() - before
    assert cuts == reference.threshold([[t.inputs] for t in many], ranks, Run())
    for tensors, cut, noticed, row in zip(many, cuts, found, outputs, strict=True):
        known = [sweep(cut, mean, lambda_) for lambda_ in lambdas]
        expected, expected_found = merge(reference, tensors, known, [dtype] * len(lambdas))
        assert noticed == expected_found
        for output, wanted in zip(row, expected, strict=True):
            output.check_guards()
            np.testing.assert_array_equal(output.bytes, wanted)
    eights = sum(t.inputs.elements // 8 * len(lambdas) for t in many)
    return total / (eights * 8 * SIZES[dtype]), found


def normal(count: int, models: int, seed: int = 31) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1e-3, count) for _ in range(models)]


def shares(count: int, models: int) -> list[int]:
    return [count // 5, count // 3, count // 2, count // 10, count // 4][:models]


# --- a guess that is right ---


@pytest.mark.parametrize("models", [1, 2])
def test_discrete_deltas_are_written_little_more_than_once(provider: ModuleType, models: int) -> None:
    tensors = tensors_of(normal(LARGE, models), "BF16")
    before = launches()
    times, _ = written(provider, [tensors], [shares(LARGE, models)])
    assert launches() - before == 7
    assert 1 < times < 1.5


@pytest.mark.parametrize("lambdas", [(0.3,), (1.0, 0.3, -2.0)], ids=["one-setting", "three-settings"])
@pytest.mark.parametrize("mean", [Mean.SUM, Mean.WEIGHTS, Mean.CONTRIBUTORS])
def test_every_mass_and_several_settings(provider: ModuleType, mean: Mean, lambdas: Sequence[float]) -> None:
    tensors = tensors_of(normal(LARGE, 2), "BF16")
    times, _ = written(provider, [tensors], [shares(LARGE, 2)], mean, lambdas)
    assert 1 < times < 1.5


@pytest.mark.parametrize("count", [6 * 4 * 8192, 6 * 4 * 8192 + 1, 6 * 5 * 8192 - 1, LARGE + 2048])
def test_sizes_on_either_side_of_a_border(provider: ModuleType, count: int) -> None:
    times, _ = written(provider, [tensors_of(normal(count, 2), "BF16")], [shares(count, 2)])
    assert 1 < times < 1.5


def test_mixed_dtypes_at_odd_addresses_and_without_a_base(provider: ModuleType) -> None:
    steps = np.random.default_rng(32).integers(-40, 41, (2, LARGE)) / 64
    models = list(zip(steps, ("BF16", "F16"), strict=True))
    for base in (None, (np.zeros(LARGE), "F16")):
        for skew in (0, 2):
            before = launches()
            times, _ = written(provider, [Tensors(models, base, skew)], [[LARGE * 21 // 100, LARGE * 506 // 1000]])
            assert launches() - before == 7
            assert 1 < times < 1.6


# --- a guess that is not ---


def test_equals_in_one_half_are_swept_again(provider: ModuleType) -> None:
    """The early units say a third of the equals, which is a third of the tensor; but they all lie in its first half."""
    deltas = np.where(np.arange(LARGE) < LARGE // 2, 1.0, 2.0)
    tensors = Tensors([(deltas, "BF16")])
    times, _ = written(provider, [tensors], [[LARGE // 2 + LARGE // 6]])
    assert 1.1 < times < 1.3


def test_sorted_tensors_are_swept_again_up_to_a_whole(provider: ModuleType) -> None:
    deltas = [np.sort(np.abs(each)) for each in normal(LARGE, 2)]
    times, _ = written(provider, [tensors_of([deltas[0], deltas[1][::-1]], "BF16")], [shares(LARGE, 2)])
    assert 1 < times <= 3
    steps = np.floor(np.arange(LARGE) / LARGE * 16)
    times, _ = written(provider, [Tensors([(steps, "BF16"), (steps[::-1], "BF16")])], [shares(LARGE, 2)])
    assert 1 < times <= 2


def early(count: int) -> np.ndarray:
    """Which elements are read early, as csrc/cuda/guessed.h has it for tensors of this size."""
    mask = np.zeros(count, bool)
    for period in range(count // 2048 // 8):
        unit = period * 8 + (((period + 1) * 0x9E3779B97F4A7C15 & 2**64 - 1) >> 32) % 8
        mask[unit * 2048 : (unit + 1) * 2048] = True
    return mask


def test_early_units_that_are_unlike_the_others(provider: ModuleType) -> None:
    """No guess by them is right, and a selection is made after all."""
    steps = np.random.default_rng(33).integers(-60, 61, LARGE)
    times, _ = written(provider, [Tensors([(np.where(early(LARGE), steps * 4, steps), "BF16")])], [[LARGE // 5]])
    assert times == 1


FIFTH = LARGE * 2087 // 10000


def misleading(models: int, early_larger: bool = True) -> list[np.ndarray]:
    """Small whole numbers, those of the last model larger by one in early units, or in all others. Of the larger fifth
    the smallest is another number there, of each other model it is the same, both with some room."""
    steps = np.random.default_rng(34).integers(-60, 61, (models, LARGE)).astype(np.float64)
    steps[-1] += np.where(early(LARGE) == early_larger, np.sign(steps[-1]), 0)
    return list(steps)


@pytest.mark.parametrize("early_larger", [True, False])
@pytest.mark.parametrize("models", [1, 3, 4, 5])
def test_a_magnitude_that_was_another_one_is_guessed_anew(
    provider: ModuleType, models: int, early_larger: bool
) -> None:
    """The counts say how far off it was; then all is swept twice, and the little that is wrong again."""
    tensors = Tensors([(each, "BF16") for each in misleading(models, early_larger)])
    times, _ = written(provider, [tensors], [[FIFTH] * models])
    assert 2 < times < 2.5


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_magnitudes_that_are_hardly_ever_equal(provider: ModuleType, dtype: str) -> None:
    """A sample cannot tell which is the one, so there is no guess."""
    rng = np.random.default_rng(35)
    models = [(rng.standard_normal(LARGE), dtype) for _ in range(2)]
    times, _ = written(provider, [Tensors(models, (rng.standard_normal(LARGE), dtype))], [shares(LARGE, 2)])
    assert times == 1


@pytest.mark.parametrize("levels", [20, 2000])
def test_a_guess_is_made_where_a_sample_can_tell(provider: ModuleType, levels: int) -> None:
    """At the median a sample of 25,000 is off by 80 or so, which is a tenth of one step in 20, and many of 2,000."""
    steps = np.random.default_rng(39).integers(-levels, levels + 1, LARGE) / 4096
    times, _ = written(provider, [Tensors([(steps, "F16")])], [[LARGE // 2]])
    assert (times > 1) == (levels == 20)


def test_float32_is_not_guessed(provider: ModuleType) -> None:
    before = launches()
    times, _ = written(provider, [tensors_of(normal(LARGE, 2), "F32")], [shares(LARGE, 2)], dtype="F32")
    assert (launches() - before, times) == (1, 1)


@pytest.mark.parametrize("ranks", [[0, 5, 10**9], [1, LARGE - 1, LARGE], [0, 0, LARGE], [-1, LARGE // 5, 0]], ids=str)
def test_the_ends_of_the_ranks(provider: ModuleType, ranks: list[int]) -> None:
    written(provider, [tensors_of(normal(LARGE, 3), "BF16")], [ranks])


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_zero_is_a_magnitude_as_any_other_and_nan_counts_as_zero(provider: ModuleType, share: float) -> None:
    rng = np.random.default_rng(36)
    deltas = np.where(rng.random(LARGE) < 0.8, 0, rng.integers(-3, 4, LARGE))
    deltas = np.where(rng.random(LARGE) < 0.01, np.nan, deltas)
    times, (found,) = written(
        provider, [Tensors([(deltas, "BF16"), (deltas[::-1], "BF16")])], [[int(share * LARGE)] * 2]
    )
    assert found.nonfinite == (np.isnan(deltas).sum(),) * 2
    assert times < 1.6


# --- what is found ---


def test_what_is_swept_again_is_counted_once(provider: ModuleType) -> None:
    deltas = misleading(3)
    deltas[0][::997] = np.nan
    deltas[1][5::1009] = np.inf
    deltas[2][7::5003] = -np.inf
    tensors = Tensors([(each, "BF16") for each in deltas])
    times, (found,) = written(provider, [tensors], [[FIFTH] * 3], lambdas=(1.0, 0.5))
    assert times > 2
    assert found.nonfinite == (len(deltas[0][::997]), len(deltas[1][5::1009]), len(deltas[2][7::5003]))


@pytest.mark.parametrize("values", [40.0, 1e3], ids=["rarely", "often"])
def test_overflow_is_that_of_the_cuts(provider: ModuleType, values: float) -> None:
    """What overflows with a guess may not with the cuts, so all is swept again where anything does."""
    steps = np.random.default_rng(37).integers(-60, 61, (2, LARGE)) / 64
    steps[:, ::4999] *= values
    tensors = Tensors([(each, "BF16") for each in steps])
    times, (found,) = written(provider, [tensors], [shares(LARGE, 2)], Mean.SUM, (1.0, 1500.0), "F16")
    assert (found.overflow[0], found.overflow[1] > 0) == (0, True)
    assert times >= 2


# --- many tensors ---


def test_tensors_of_all_kinds_in_one_call(provider: ModuleType) -> None:
    """Each gets what is its own: those that are guessed, those of one block, those of float32."""
    rng = np.random.default_rng(38)
    kinds = [
        tensors_of(normal(LARGE, 2, 1), "BF16"),
        tensors_of(normal(900, 2, 2), "BF16"),
        tensors_of(normal(LARGE + 77, 2, 3), "F32"),
        Tensors([(np.where(early(LARGE), 4.0, rng.integers(-9, 10, LARGE)), "BF16")] * 3),
        tensors_of(normal(LARGE + 9000, 4, 4), "F16"),
        Tensors([(np.full(LARGE, 0.5), "BF16"), (np.zeros(LARGE), "F16")]),
        Tensors([(np.zeros(0), "BF16")] * 2),
    ]
    ranks = [shares(t.inputs.elements, len(t.inputs.models)) for t in kinds]
    for _ in range(2):
        written(provider, kinds, ranks)


def test_the_memory_it_takes_is_what_was_said(provider: ModuleType) -> None:
    many = [tensors_of(normal(LARGE + 100 * i, 3, i), "BF16") for i in range(3)]
    elements = sum(t.inputs.elements for t in many)
    provider.release_scratch(Run())
    emulated.peak()
    held = emulated.peak()
    written(provider, many, [shares(t.inputs.elements, 3) for t in many])
    assert emulated.peak() - held <= provider.scratch_bytes(len(many), elements, 3, 1, 3, Run())


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_levels_and_ranks(provider: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, models = LARGE + int(rng.integers(0, 9000)), int(rng.integers(1, 6))
    levels = int(rng.choice([1, 2, 5, 40, 1000]))
    drift = 1 + np.arange(count) / count * rng.integers(0, 2)
    values = [(np.rint(rng.integers(-levels, levels + 1, count) * drift) / levels, "BF16") for _ in range(models + 1)]
    tensors = Tensors(values[:models], values[models] if seed % 2 else None)
    written(provider, [tensors], [rng.integers(0, count + 1, models).tolist()])
