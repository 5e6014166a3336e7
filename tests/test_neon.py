"""The kernels of NEON, compiled for aarch64 and run by an emulator: the bits of the definitions and of the scalar
kernels of this machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType

import neon_emulator
import numpy as np
import pytest
import test_ops
import test_ranked
from conftest import compiled_core, encode
from test_ops import (  # noqa: F401  run here by the provider of this file
    test_a_band_begins_and_ends_where_its_ties_do,
    test_a_band_leaves_out_the_infinite_and_keeps_what_is_no_number,
    test_a_clip_leaves_the_sign_and_what_is_no_number,
    test_a_dropped_nan_is_gone_and_a_trimmed_one_stays,
    test_a_mass_of_zero_counts_as_one,
    test_a_nan_is_never_outvoted,
    test_a_part_of_a_tensor_is_swept_at_its_place,
    test_a_vote_of_zero_elects_as_asked,
    test_bytes_are_copied,
    test_equals_are_kept_below_the_end_of_ties,
    test_every_16_bit_number_survives_the_way_there_and_back,
    test_every_nan_comes_out_as_one,
    test_found_counts_what_overflows_each_output,
    test_found_names_what_is_not_finite,
    test_many_settings_are_each_alone,
    test_merge_has_the_bits_of_the_reference,
    test_merge_of_many_tensors_is_each_alone,
    test_narrowing_is_to_nearest_even,
    test_norms_are_those_of_the_oracle,
    test_nothing_to_add_leaves_the_bits_of_the_base,
    test_threshold_keeps_exactly_the_rank,
    test_threshold_of_a_group_is_that_of_its_tensors_end_to_end,
    test_threshold_of_deltas_does_not_depend_on_the_run,
    test_what_is_not_finite_is_not_measured,
    test_without_an_election_no_model_agrees,
)

from fastmerge.sweep import Keep, Run, View

RUN = Run(2)


@pytest.fixture(scope="module")
def provider() -> Iterator[ModuleType]:
    with neon_emulator.provider() as native:
        assert native.isa() == "neon"
        yield native


@pytest.fixture
def scalar() -> Iterator[ModuleType]:
    native = compiled_core()
    with native.using("scalar"):
        yield native


@pytest.mark.parametrize("keep", Keep)
@pytest.mark.parametrize("values", ["normal", "equal", "special", "tiny"])
@pytest.mark.parametrize("count", [0, 1, 15, 17, 2047, 131_080])
@pytest.mark.parametrize("same_dtype", [False, True], ids=["mixed", "alike"])
def test_measures_have_the_bits_of_the_scalar_kernels(
    provider: ModuleType, scalar: ModuleType, keep: Keep, values: str, count: int, same_dtype: bool
) -> None:
    draw = random.Random(f"{keep} {values} {count}")
    dtypes = draw.choices(test_ops.FLOATS, k=draw.randint(2, 7))
    dtypes = dtypes[:1] * len(dtypes) if same_dtype else dtypes
    stages = (keep, *test_ops.STAGES[0][1:])
    case = test_ops.Case(draw.getrandbits(30), count, tuple(dtypes), draw.random() < 0.7, (), (stages,), values, 1, RUN)
    tensors, (sweep,) = test_ops.tensors_of(case), test_ops.sweeps_of(case)
    for op, given in (("gram", ()), ("norms", ([sweep],))):
        here, there = (getattr(each, op)([tensors.inputs], *given, RUN)[0] for each in (provider, scalar))
        np.testing.assert_array_equal(here.view(np.uint64), there.view(np.uint64), err_msg=f"{op}: {case}")


@pytest.mark.parametrize("kind", ["normal", "mostly-zero", "not-finite"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_ranked_merge_is_threshold_and_then_merge(provider: ModuleType, kind: str, dtype: str) -> None:
    count = test_ranked.LARGE
    ranks = [count // 5, count // 3, count // 2]
    test_ranked.check(provider, test_ranked.tensors_of(kind, count, dtype), ranks, dtype, RUN)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("width", [1, 15, 16, 31, 32, 33, 100])
def test_a_product_has_the_bits_of_the_scalar_kernels(
    provider: ModuleType, scalar: ModuleType, dtype: str, rank: int, width: int
) -> None:
    rows, rng = 19, np.random.default_rng([rank, width])
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, width)))
    left[3], right[:, 0] = 0, 1e-42  # products that vanish, and denormal ones
    encoded = encode(rng.standard_normal(rows * width), dtype)
    weights = np.empty(encoded.size + 1, np.uint8)[1:]  # misaligned
    weights[:] = encoded
    made = [np.full((rows, width), np.nan, np.float32) for _ in range(2)]
    for native, out in zip((provider, scalar), made, strict=True):
        native.lowrank(View(weights.ctypes.data, dtype), left, native.in_blocks(right), 0.3, out, 2)
    np.testing.assert_array_equal(made[0].view(np.uint32), made[1].view(np.uint32))
