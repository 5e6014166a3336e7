"""`merge_ranked` of the compiled core: selecting and sweeping at one go gives what one after the other gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conftest import ISAS, SIZES, Memory, Tensors, bits, compiled_core, decode, encode, merge

from fastmerge import reference
from fastmerge.sweep import Cut, Elect, Keep, Mean, Part, Run, Sweep, Target

#: More than the core takes for small, and no multiple of a chunk.
LARGE = (1 << 19) + 3001
OPEN = Cut(7.0, -5)  # what the parts say before anything is selected


@pytest.fixture(params=[2, 1], ids=["two-threads", "one-thread"])
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


@pytest.fixture(params=ISAS or ["compiled"])
def core(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    native = compiled_core()
    if request.param not in native.isas():
        pytest.skip(native.why_not(request.param))
    with native.using(request.param):
        yield native


def deltas(kind: str, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """What three models add to their base."""
    if kind == "sorted":  # no part of the tensor is like another
        return [np.sort(np.abs(rng.normal(0, 1e-3, count))) for _ in range(3)]
    if kind == "mostly-zero":
        return [np.where(rng.random(count) < 0.9, 0, 1e-3) for _ in range(3)]
    if kind == "halves":  # a sample says nothing of where the equals lie
        return [np.where(np.arange(count) < count // 2, 1e-3, 2e-3) for _ in range(3)]
    if kind == "equal":
        return [np.full(count, 3e-3)] * 3
    return [rng.normal(0, 1e-3, count) for _ in range(3)]


def tensors_of(kind: str, count: int, dtype: str) -> Tensors:
    rng = np.random.default_rng(17)
    base = decode(encode(rng.normal(0, 0.02, count), dtype), dtype)
    models = [base + each for each in deltas(kind, count, rng)]
    if kind == "not-finite":
        models[1][[count // 3, count - 1]] = np.nan, np.inf
    return Tensors([(model, dtype) for model in models], (base, dtype))


def sweep(cuts: tuple[Cut, ...], lambda_: float = 1.0) -> Sweep:
    parts = tuple(Part(0.5 + 0.25 * m, magnitude=cut.magnitude, ties_end=cut.ties_end) for m, cut in enumerate(cuts))
    return Sweep(parts, Keep.ABOVE, Elect.WEIGHTED, mean=Mean.WEIGHTS, lambda_=lambda_)


def check(core: ModuleType, tensors: Tensors, ranks: list[int], dtype: str, run: Run) -> None:
    """Cuts, bits and what is found, against the reference, for two settings at once."""
    (cuts,) = reference.threshold([[tensors.inputs]], [ranks], Run())
    lambdas = (1.0, 0.3)
    expected, found = merge(reference, tensors, [sweep(cuts, each) for each in lambdas], [dtype] * 2)
    outputs = [Memory(tensors.inputs.elements * SIZES[dtype]) for _ in lambdas]
    ranked = core.merge_ranked(
        [tensors.inputs],
        [[sweep((OPEN,) * 3, each) for each in lambdas]],
        [ranks],
        [[Target(dtype, output.address) for output in outputs]],
        run,
    )
    assert ranked == ([cuts], [found])
    for output, wanted in zip(outputs, expected, strict=True):
        output.check_guards()
        np.testing.assert_array_equal(bits(output.bytes, dtype), bits(wanted, dtype))


@pytest.mark.parametrize("kind", ["normal", "sorted", "mostly-zero", "halves", "equal", "not-finite"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_it_is_threshold_and_then_merge(kind: str, dtype: str, run: Run) -> None:
    check(compiled_core(), tensors_of(kind, LARGE, dtype), [LARGE // 5, LARGE // 3, LARGE // 2], dtype, run)


def test_every_instruction_set_counts_right(core: ModuleType) -> None:
    check(core, tensors_of("normal", LARGE, "BF16"), [LARGE // 5, LARGE // 3, LARGE // 2], "BF16", Run(2))


@pytest.mark.parametrize("ranks", [[0, 5, 10**9], [1, LARGE - 1, LARGE], [0, 0, 0], [LARGE] * 3], ids=str)
def test_the_ends_of_the_ranks(ranks: list[int]) -> None:
    check(compiled_core(), tensors_of("normal", LARGE, "BF16"), ranks, "BF16", Run(2))


@pytest.mark.parametrize("count", [1, 31, 2048, 70_001])
def test_small_tensors(count: int) -> None:
    check(compiled_core(), tensors_of("normal", count, "BF16"), [max(1, count // 5)] * 3, "BF16", Run(2))


def test_tensors_of_all_kinds_at_once_into_a_file(tmp_path: Path) -> None:
    """Each guess goes its own way; what is swept again replaces what was written."""
    native = compiled_core()
    kinds = ["normal", "sorted", "not-finite", "equal", "normal"]
    counts = [LARGE, LARGE + 77, LARGE + 5, LARGE, 999]
    tensors = [tensors_of(kind, count, "BF16") for kind, count in zip(kinds, counts, strict=True)]
    ranks = [[count // 5] * 3 for count in counts]
    places = np.cumsum([0, *(2 * count for count in counts)]).tolist()
    with (tmp_path / "out").open("wb+") as file:
        cuts, _ = native.merge_ranked(
            [each.inputs for each in tensors],
            [[sweep((OPEN,) * 3)] for _ in tensors],
            ranks,
            [[Target("BF16", place, file.fileno())] for place in places[:-1]],
            Run(2),
        )
    raw = np.fromfile(tmp_path / "out", np.uint8)
    for each, found, rank, begin, end in zip(tensors, cuts, ranks, places[:-1], places[1:], strict=True):
        (wanted,) = reference.threshold([[each.inputs]], [rank], Run())
        assert found == wanted
        ((expected,), _) = merge(reference, each, [sweep(wanted)], ["BF16"])
        np.testing.assert_array_equal(bits(raw[begin:end], "BF16"), bits(expected, "BF16"))


def test_ticks_count_two_reads() -> None:
    """As planned for a method that selects, whether or not the second was needed."""
    tensors = tensors_of("normal", LARGE, "BF16")
    output, told = Memory(LARGE * 2), []
    compiled_core().merge_ranked(
        [tensors.inputs],
        [[sweep((OPEN,) * 3)]],
        [[LARGE // 5] * 3],
        [[Target("BF16", output.address)]],
        Run(2, tick=told.append),
    )
    assert sum(told) >= 2 * tensors.nbytes
