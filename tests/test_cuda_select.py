"""What the CUDA kernels select and measure, on the emulated device: exact cuts, and sums that no grid can change."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import emulated
import numpy as np
import oracles
import pytest
import test_ops
from conftest import Tensors, encode
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import (  # noqa: F401  run here by the provider of this file
    test_a_threshold_trims_to_exactly_its_rank,
    test_gram_of_any_number_of_models_and_elements,
    test_norms_are_those_of_the_oracle,
    test_norms_of_nothing_are_zero,
    test_threshold_keeps_exactly_the_rank,
    test_threshold_of_a_group_is_that_of_its_tensors_end_to_end,
    test_what_is_not_finite_is_not_measured,
)

from fastmerge import reference
from fastmerge.sweep import CERTAIN, Cut, Inputs, Keep, Part, Run, Sweep, View

SAMPLES = 10_240  # of csrc/cuda/select.h: selections up to this size are their own sample


@pytest.fixture
def provider() -> ModuleType:
    return emulated.provider()


def assert_cuts(cuda: ModuleType, groups: Sequence[Sequence[Tensors]], ranks: Sequence[Sequence[int]]) -> None:
    """The cuts are those of the reference, from all groups in one call."""
    inputs = [[tensors.inputs for tensors in group] for group in groups]
    assert cuda.threshold(inputs, ranks, Run()) == reference.threshold(inputs, ranks, Run(tile=1 << 20))


def deltas(rng: np.random.Generator, count: int, models: int, dtype: str = "BF16") -> Tensors:
    """Models near a base: in 16 bits a few per cent of the deltas equal any one of them."""
    base = 0.02 * rng.standard_normal(count)
    return Tensors([(base + 1e-3 * rng.standard_normal(count), dtype) for _ in range(models)], (base, dtype))


# --- threshold ---


@pytest.mark.parametrize("skew", [0, 4])
def test_threshold_of_deltas_is_that_of_the_oracle(provider: ModuleType, skew: int) -> None:
    test_ops.test_threshold_of_deltas_does_not_depend_on_the_run(provider, Run(), skew)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("count", [8, SAMPLES - 1, SAMPLES, SAMPLES + 1, 8 * 8192, 70_001])
def test_threshold_on_either_side_of_a_border(provider: ModuleType, dtype: str, count: int) -> None:
    tensors = deltas(np.random.default_rng(count), count, 4, dtype)
    assert_cuts(provider, [[tensors]], [(1, count // 5, count // 2, count - 1)])


def test_threshold_by_one_block_each_is_that_by_the_whole_grid(provider: ModuleType) -> None:
    """Many selections of one size are a block's work each; one of them alone is the grid's."""
    rng = np.random.default_rng(20)
    sizes = [SAMPLES + 1 + 777 * i for i in range(12)]
    assert max(sizes) <= sum(sizes) // 6, "for each of the six emulated blocks there is more to do than any of these"
    groups = [[deltas(rng, size, 2, dtype)] for size, dtype in zip(sizes, ["BF16", "F32", "F16"] * 4, strict=True)]
    ranks = [(size // 5, size // 2) for size in sizes]
    together = provider.threshold([[group[0].inputs] for group in groups], ranks, Run())
    alone = [
        provider.threshold([[group[0].inputs]], [each], Run())[0] for group, each in zip(groups, ranks, strict=True)
    ]
    assert together == alone
    assert_cuts(provider, groups, ranks)


def test_threshold_of_large_and_small_selections_in_one_call(provider: ModuleType) -> None:
    rng = np.random.default_rng(21)
    sizes = [*[100] * 9, 60_000, 0, 12_000, 7, 50_003, 1]
    groups = [[deltas(rng, size, 3)] for size in sizes]
    assert_cuts(provider, groups, [(size // 4, size // 2, size - 1) for size in sizes])


def test_threshold_of_a_group_of_many_tensors(provider: ModuleType) -> None:
    rng = np.random.default_rng(22)
    sizes = [1, 3, 0, 9000, *[17] * 40, 30_000, 8192, 0, 2]
    groups = [[deltas(rng, size, 2) for size in sizes], [deltas(rng, size, 2) for size in sizes[:4]]]
    total = sum(sizes)
    assert_cuts(provider, groups, [(total // 5, total // 2), (2000, 9003)])
    assert_cuts(provider, groups[:1], [(1, total - 1)])


def hard_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(23)
    n = 50_000
    normal = rng.standard_normal(n).astype(np.float32)
    sparse = np.where(rng.random(n) < 0.1, normal, np.float32(0))
    period = normal.copy()
    period[:: n // (SAMPLES // 16)] *= np.float32(1e6)
    not_finite = normal.copy()
    not_finite[rng.choice(n, 9000, replace=False)] = np.nan
    not_finite[rng.choice(n, 9000, replace=False)] = -np.inf
    denormal = (rng.integers(-3, 4, n) * 1e-45).astype(np.float32)
    adjacent = np.float32(1) + rng.integers(0, 3, n).astype(np.float32) * np.float32(2**-23)
    return {
        "sparse": sparse,
        "two-values": rng.choice(np.float32([0.5, 2.0]), n),
        "one-value": np.full(n, -0.25, np.float32),
        "adjacent-values": adjacent,
        "denormal-steps": denormal,
        "a-period-like-the-sample's": period,
        "nan-and-inf": not_finite,
        "ascending-by-bits": (np.arange(n, dtype=np.uint32) * 40_000).view(np.float32),
        "all-large-at-the-end": np.concatenate([normal[: n - 100] * np.float32(1e-20), np.full(100, 3e38, np.float32)]),
    }


@pytest.mark.parametrize(("data", "values"), hard_data().items(), ids=hard_data())
def test_threshold_is_exact_where_a_sample_misleads(provider: ModuleType, data: str, values: np.ndarray) -> None:
    n = len(values)
    ranks = (1, 100, n // 10, n // 2, n - 101, n - 1)
    tensors = Tensors([(values, "F32")] * len(ranks))
    assert_cuts(provider, [[tensors]], [ranks])
    (cuts,) = provider.threshold([[tensors.inputs]], [ranks], Run())
    for k, cut in zip(ranks, cuts, strict=True):
        test_ops.check_cut(cut, values, k)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_threshold_of_anything_is_that_of_the_reference(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    models = data.draw(st.integers(1, 5), label="models")
    levels = data.draw(st.sampled_from([1, 2, 5, 1000, 10**9]), label="levels")
    dtype = data.draw(st.sampled_from(["F32", "F16", "BF16"]), label="dtype")
    has_base = data.draw(st.booleans(), label="has base")
    sizes = st.sampled_from([0, 1, 5, 8, 100, 8191, 8192, SAMPLES, 13_001, 25_000])
    groups, ranks = [], []
    for wanted in data.draw(st.lists(st.lists(sizes, min_size=1, max_size=4), min_size=1, max_size=4), label="groups"):
        group = []
        for size in wanted:
            values = [(rng.integers(-levels, levels + 1, size) / levels, dtype) for _ in range(models + 1)]
            group.append(Tensors(values[:models], values[models] if has_base else None))
        groups.append(group)
        total = sum(wanted)
        ranks.append([data.draw(st.integers(-1, total + 1), label="rank") for _ in range(models)])
    assert_cuts(emulated.provider(), groups, ranks)


@pytest.mark.parametrize("count", [0, 1, 500, SAMPLES, 40_001])
def test_threshold_without_a_wait_is_the_same(provider: ModuleType, count: int) -> None:
    tensors, device, run = deltas(np.random.default_rng(24), count, 4), provider.device(0), Run()
    ranks = (0, count // 5, count // 2, count)
    cuts, workspace = device.allocate(16 * 4), device.allocate(provider.workspace_bytes(tensors.inputs, run))
    provider.threshold_async(tensors.inputs, ranks, cuts, workspace, run)
    device.synchronize(run.stream)
    layout = np.dtype([("magnitude", np.float32), ("padding", np.int32), ("ties_end", np.int64)])
    written = np.frombuffer(ctypes.string_at(cuts, 16 * 4), layout)
    device.release(cuts)
    device.release(workspace)
    found = tuple(Cut(*cut) for cut in zip(written["magnitude"].tolist(), written["ties_end"].tolist(), strict=True))
    assert [found] == reference.threshold([[tensors.inputs]], [ranks], run)


def test_threshold_without_a_wait_refuses_more_inputs_than_it_can_carry(provider: ModuleType) -> None:
    tensors = Tensors([(np.ones(3), "F32")] * 121)
    with pytest.raises(ValueError, match="at most 120 inputs"):
        provider.threshold_async(tensors.inputs, (1,) * 121, 0, 0, Run())


# --- gram and norms; their tolerance is that of test_ops ---


@pytest.mark.parametrize("with_base", [False, True], ids=["weights", "deltas"])
@pytest.mark.parametrize("skew", [0, 4])
def test_gram_is_that_of_the_oracle(provider: ModuleType, with_base: bool, skew: int) -> None:
    test_ops.test_gram_is_that_of_the_oracle(provider, with_base, skew)


@pytest.mark.parametrize("models", [3, 4, 5, 6, 9])
def test_gram_over_many_grains(provider: ModuleType, models: int) -> None:
    """Multiples of 1/64 whose sums are exact in float64, so that nothing is to be tolerated."""
    rng = np.random.default_rng(25)
    vectors = [rng.integers(-64, 65, 70_003) / 64 for _ in range(models)]
    tensors = Tensors([(vector, "BF16") for vector in vectors])
    (found,) = provider.gram([tensors.inputs], Run())
    np.testing.assert_array_equal(found, np.array(vectors) @ np.array(vectors).T)


def test_what_is_measured_of_a_tensor_does_not_depend_on_its_company(provider: ModuleType) -> None:
    rng = np.random.default_rng(26)
    tensors = [deltas(rng, size, 4, "F32") for size in (40_001, 0, 5, 70_000, 32_768, 0)]
    inputs = [each.inputs for each in tensors]
    sweep = Sweep((Part(magnitude=1e-3),) * 4, Keep.ABOVE)
    grams, norms = provider.gram(inputs, Run()), provider.norms(inputs, [sweep] * len(inputs), Run())
    for alone, gram, norm in zip(inputs, grams, norms, strict=True):
        np.testing.assert_array_equal(provider.gram([alone], Run())[0], gram)
        np.testing.assert_array_equal(provider.norms([alone], [sweep], Run())[0], norm)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("keep", Keep)
def test_inputs_that_lie_alike_are_measured_as_any_are(provider: ModuleType, dtype: str, keep: Keep) -> None:
    """Nothing is asked of a single element of them, until a sum says that something is not finite."""
    rng = np.random.default_rng(28)
    count, begin = 40_000, 16_000
    clean = [rng.integers(-64, 65, count) / 64 for _ in range(6)]
    places = rng.choice(count, 40, replace=False)
    for vector in clean:
        vector[places] = 0.0
    dirty = [vector.copy() for vector in clean]
    for vector in dirty[:3]:
        vector[places] = rng.choice([np.nan, np.inf, -np.inf], 40)
    like = Part(cut=CERTAIN // 3 + 12_345, magnitude=0.5, ties_end=begin + 20_011, top_magnitude=0.75)
    like = replace(like, top_ties_end=begin + 30_013)
    measured = []
    for vectors, skew in ((clean, 0), (dirty, 0), (dirty, 4)):
        for models, base in ((vectors[:5], vectors[5]), (vectors[:3], None)):
            tensors = Tensors([(vector, dtype) for vector in models], base if base is None else (base, dtype), skew)
            assert skew or not any(view.address % 16 for view in tensors.inputs.views)
            inputs = tensors.inputs._replace(begin=begin)
            sweep = Sweep(tuple(replace(like, key=i) for i in range(len(models))), keep)
            measured.append([provider.gram([inputs], Run())[0], provider.norms([inputs], [sweep], Run())[0]])
    expected = np.array(clean[:3])
    np.testing.assert_array_equal(measured[1][0], expected @ expected.T)
    for others in (measured[2:4], measured[4:]):
        for known, other in zip(measured[:2], others, strict=True):
            np.testing.assert_array_equal(known[0], other[0])
            np.testing.assert_array_equal(known[1], other[1])


@pytest.mark.parametrize("keep", [Keep.ABOVE, Keep.BERNOULLI], ids=["above", "bernoulli"])
def test_norms_of_a_part_of_a_tensor_count_from_its_begin(provider: ModuleType, keep: Keep) -> None:
    rng = np.random.default_rng(27)
    values = rng.integers(-64, 65, 40_000) / 64
    raw = encode(values, "BF16")
    parts = tuple(Part(magnitude=0.5, ties_end=20_011, cut=CERTAIN // 3 + 12_345, key=i) for i in range(5))
    begin, count = 16_000, 9001
    inputs = Inputs(count, tuple(View(raw.ctypes.data + 2 * begin, "BF16") for _ in parts), None, begin)
    (found,) = provider.norms([inputs], [Sweep(parts, keep)], Run())
    index = np.arange(len(values))
    for part, (before, after) in zip(parts, found, strict=True):
        if keep is Keep.ABOVE:
            kept = (np.abs(values) > 0.5) | ((np.abs(values) == 0.5) & (index < part.ties_end))
        else:
            kept = oracles.bernoulli(part.key, part.cut, len(values))
        here = slice(begin, begin + count)
        assert tuple(before) == oracles.norms(values[here])
        assert tuple(after) == oracles.norms(np.where(kept, values, 0.0)[here])


def test_a_second_draw_decides_the_norms_of_what_ties(provider: ModuleType) -> None:
    """Cuts right at an element's own 32 random bits: the first 16 of them tie, the others decide."""
    values, key = np.arange(1.0, 101.0), 0xFEDCBA9876543210
    drawn = (oracles.pieces(key, 100, 0) << 16 | oracles.pieces(key, 100, 1)).tolist()
    tensors = Tensors([(values, "F32")])
    for place in (0, 7, 50):
        for cut in (drawn[place], drawn[place] + 1):
            (found,) = provider.norms([tensors.inputs], [Sweep((Part(cut=cut, key=key),), Keep.BERNOULLI)], Run())
            assert found[0, 1, 0] == values[np.array(drawn) < cut].sum()
