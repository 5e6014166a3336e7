"""What csrc/cuda/plain.h sweeps a shorter way, on the emulated device: the reference's bits, and that it is taken."""

from __future__ import annotations

import ctypes
from types import ModuleType

import emulated
import numpy as np
import pytest
from conftest import Tensors, bits, merge

from fastmerge import reference
from fastmerge.sweep import CERTAIN, EVERY, Elect, Found, Keep, Mean, Part, Sweep, TieVote

TILE = 1024  # elements, of a block of 128 threads
ELEMENTS = 24 * TILE + 13  # several tiles for each block, and a part of one

STAGES = [
    (Keep.ALL, Elect.NONE, Mean.SUM),
    *[(Keep.ABOVE, Elect.NONE, mean) for mean in (Mean.SUM, Mean.CONTRIBUTORS)],
    (Keep.BERNOULLI, Elect.NONE, Mean.SUM),
    *[(keep, Elect.WEIGHTED, mean) for keep in (Keep.ABOVE, Keep.BERNOULLI) for mean in Mean],
]
VALUES = ("weights", "signs", "tiny", "huge", "odd")


@pytest.fixture
def provider() -> ModuleType:
    return emulated.provider()


def copies() -> int:
    library = ctypes.CDLL(emulated.compiled().__file__)
    library.emulated_copies.restype = ctypes.c_ulonglong
    return int(library.emulated_copies())


def drawn(values: str, models: int, rng: np.random.Generator, elements: int = ELEMENTS) -> list[np.ndarray]:
    """The models, then the base: near one another, as fine-tunes are, with many equal to the base."""
    scale = {"tiny": 1e-22, "huge": 1e38}.get(values, 0.02)
    if values == "signs":
        return [rng.choice([-1.0, -0.0, 0.0, 1.0], elements) for _ in range(models + 1)]
    base = rng.normal(0, scale, elements)
    deltas = [np.round(rng.normal(0, 3, elements)) / 64 * scale for _ in range(models)]
    tensors = [*(base + delta for delta in deltas), base]
    if values == "tiny":  # down to the denormals
        tensors = [each * 10.0 ** -rng.integers(0, 20, elements) for each in tensors]
    if values == "odd":
        for each in tensors:
            each[rng.integers(0, elements, 5)] = rng.choice([np.nan, np.inf, -np.inf, 3.4e38], 5)
    if values == "huge":  # up to the largest: a delta may overflow
        tensors = [np.clip(each, -3.38e38, 3.38e38) for each in tensors]
    return [each.astype(np.float32) for each in tensors]


def checked(
    provider: ModuleType, tensors: list[np.ndarray], sweep: Sweep, has_base: bool = True, begin: int = 0
) -> Found:
    """Merges, and holds it against the reference; says what was found."""
    *models, base = tensors

    def inputs() -> Tensors:
        held = Tensors([(model, "BF16") for model in models], (base, "BF16") if has_base else None)
        held.inputs = held.inputs._replace(begin=begin)
        return held

    (expected,), wanted = merge(reference, inputs(), [sweep], ["BF16"])
    (output,), found = merge(provider, inputs(), [sweep], ["BF16"])
    np.testing.assert_array_equal(bits(output, "BF16"), bits(expected, "BF16"))
    assert found == wanted
    return found


@pytest.mark.parametrize(
    ("models", "values"), [(1, "weights"), (1, "signs"), (2, "odd"), *[(3, values) for values in VALUES]]
)
@pytest.mark.parametrize(("keep", "elect", "mean"), STAGES)
def test_it_has_the_bits_of_the_reference(
    provider: ModuleType, keep: Keep, elect: Elect, mean: Mean, models: int, values: str
) -> None:
    rng = np.random.default_rng(VALUES.index(values) + 10 * models)
    tensors = drawn(values, models, rng)
    deltas = [np.abs(model - tensors[-1]) for model in tensors[:-1]]
    for lambda_, divisor in ((1.0, 1.0), (0.7, 3.0)):
        parts = tuple(
            Part(
                weight=float(rng.choice([1.0, 0.3, 0.45])),
                magnitude=float(np.nan_to_num(np.sort(delta)[int(0.8 * ELEMENTS)])),
                ties_end=int(rng.choice([0, EVERY, 7 * TILE, 20 * TILE + 5, ELEMENTS])),
                cut=int(0.3 * CERTAIN),
                key=int(rng.integers(2**63)),
            )
            for delta in deltas
        )
        before = copies()
        checked(provider, tensors, Sweep(parts, keep, elect, mean=mean, divisor=divisor, lambda_=lambda_))
        assert copies() > before, "the long way was taken"


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("models", [1, 2, 3])
@pytest.mark.parametrize("begin", [0, 2**33 + 8])
def test_without_a_base_it_is_a_weighted_sum(provider: ModuleType, models: int, values: str, begin: int) -> None:
    tensors = drawn(values, models, np.random.default_rng(models))
    before = copies()
    for weight, divisor in ((0.5, 1.0), (-0.3, 0.7)):
        sweep = Sweep((Part(weight),) * models, divisor=divisor)
        checked(provider, tensors, sweep, has_base=False, begin=begin)
    assert copies() > before


@pytest.mark.parametrize("keep", [Keep.ABOVE, Keep.BERNOULLI])
def test_a_part_of_a_tensor_is_swept_at_its_place(provider: ModuleType, keep: Keep) -> None:
    begin = 2**33 + 5 * TILE + 8
    tensors = drawn("signs", 2, np.random.default_rng(1))
    for end in (begin, begin + 8 * TILE, begin + 9 * TILE + 3, begin - 1, EVERY):
        part = Part(magnitude=1.0, ties_end=end, cut=CERTAIN // 2, key=end)
        checked(provider, tensors, Sweep((part, part), keep, Elect.WEIGHTED, mean=Mean.WEIGHTS), begin=begin)


@pytest.mark.parametrize(
    "sweep",
    [
        Sweep((Part(rescale=2.0),) * 2, Keep.ABOVE, Elect.WEIGHTED),
        Sweep((Part(weight=-1.0),) * 2, Keep.ABOVE, Elect.WEIGHTED, mean=Mean.WEIGHTS),
        Sweep((Part(),) * 2, Keep.ABOVE, Elect.WEIGHTED, lambda_=-1.0),
        Sweep((Part(),) * 2, Keep.ABOVE, Elect.WEIGHTED, lambda_=0.0),
        Sweep((Part(),) * 2, Keep.ABOVE, Elect.WEIGHTED, TieVote.ZERO),
        Sweep((Part(),) * 2, divisor=0.0),
        Sweep((Part(),) * 2, divisor=-2.0),
        Sweep((Part(),) * 4),
    ],
    ids=["rescale", "negative-mass", "negative-lambda", "lambda-0", "vote-of-zero", "divisor-0", "divisor<0", "four"],
)
def test_what_it_was_not_made_for_goes_the_long_way(provider: ModuleType, sweep: Sweep) -> None:
    tensors = drawn("signs", len(sweep.parts), np.random.default_rng(3), 3 * TILE)
    before = copies()
    checked(provider, tensors, sweep)
    assert copies() == before


@pytest.mark.parametrize("dtypes", ["BF16 F16 BF16 BF16", "BF16 BF16 F32 BF16", "BF16 BF16 BF16 F16"])
def test_one_other_dtype_is_the_long_way(provider: ModuleType, dtypes: str) -> None:
    first, second, base, output = dtypes.split()
    values = drawn("weights", 2, np.random.default_rng(4), 3 * TILE)
    before = copies()

    def inputs() -> Tensors:
        return Tensors([(values[0], first), (values[1], second)], (values[2], base))

    (expected,), _ = merge(reference, inputs(), [Sweep((Part(),) * 2)], [output])
    (found,), _ = merge(provider, inputs(), [Sweep((Part(),) * 2)], [output])
    np.testing.assert_array_equal(found, expected)
    assert copies() == before


def test_the_hardest_quotients_are_those_of_ieee() -> None:
    """But for two, and those only where a reciprocal is off. The compiler's own division takes the same steps: were a
    card's reciprocal off there, so were that."""
    source = emulated.EMULATOR / "quotients.cu"
    library = ctypes.CDLL(str(emulated.built("quotients", [source], [emulated.SOURCES, emulated.EMULATOR])))
    library.try_quotients.restype = ctypes.c_int64
    for first, step in ((2**24 - 2**17 + 1, 2), (2**23 + 1, 2 * 61)):
        wrong, count = ((ctypes.c_uint32 * 2) * 8)(), ctypes.c_int()
        assert library.try_quotients(first, step, wrong, 8, ctypes.byref(count)) > 200_000
        assert {tuple(pair) for pair in wrong[: count.value]} <= {(2**23, 2**24 - 1), (13981011, 2**24 - 3)}


def test_quotients_are_those_of_ieee(provider: ModuleType) -> None:
    """However the card's reciprocal is off: as sums over three equal models of weight 1, whose mean divides by 3."""
    every = np.arange(2**16, dtype=np.uint32) << 16
    values = every.view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 1e30)]
    zeros = np.zeros_like(values)
    rng = np.random.default_rng(5)
    for divisor in (3.0, 0.7, 2.0**-20, 2.0**20, *rng.uniform(1, 2, 20)):
        checked(provider, [values, zeros], Sweep((Part(),), divisor=float(np.float32(divisor))))
        part = Part(weight=float(np.float32(divisor)))
        sweep = Sweep((part, part), Keep.ABOVE, Elect.WEIGHTED, mean=Mean.WEIGHTS)
        checked(provider, [values, values[::-1].copy(), zeros], sweep)
