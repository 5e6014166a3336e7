"""The GPU providers on a card against the compiled CPU core; without a card the same checks, small, emulated."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import emulated
import numpy as np
import pytest
import test_engine
import test_ops
import torch
from conftest import Memory, Tensors, bits, compiled_core, encode, measured_sweep, merge
from test_cuda import (  # noqa: F401  run here by the provider of this file
    test_a_part_of_a_tensor_is_swept_at_its_place,
    test_a_random_drop_is_decided_to_its_last_bit,
    test_found_names_what_is_not_finite,
    test_merge_at_the_edges_of_tiles,
)
from test_cuda_select import (  # noqa: F401
    test_threshold_by_one_block_each_is_that_by_the_whole_grid,
    test_threshold_is_exact_where_a_sample_misleads,
    test_threshold_of_a_group_of_many_tensors,
    test_threshold_of_large_and_small_selections_in_one_call,
    test_threshold_on_either_side_of_a_border,
)
from test_ops import (  # noqa: F401
    test_a_dropped_nan_is_gone_and_a_trimmed_one_stays,
    test_a_mass_of_zero_counts_as_one,
    test_a_nan_is_never_outvoted,
    test_a_threshold_trims_to_exactly_its_rank,
    test_a_vote_of_zero_elects_as_asked,
    test_a_zero_divided_is_a_zero_of_the_quotients_sign,
    test_equals_are_kept_below_the_end_of_ties,
    test_every_16_bit_number_survives_the_way_there_and_back,
    test_every_nan_comes_out_as_one,
    test_found_counts_what_overflows_each_output,
    test_gram_of_any_number_of_models_and_elements,
    test_merge_of_many_tensors_is_each_alone,
    test_narrowing_is_to_nearest_even,
    test_norms_are_those_of_the_oracle,
    test_norms_of_nothing_are_zero,
    test_nothing_to_add_leaves_the_bits_of_the_base,
    test_threshold_keeps_exactly_the_rank,
    test_threshold_of_a_group_is_that_of_its_tensors_end_to_end,
    test_what_is_not_finite_is_not_measured,
)

import fastmerge
from fastmerge import backends, memory, reference, streaming
from fastmerge.methods import METHODS, Base, Settings
from fastmerge.recipe import Recipe
from fastmerge.sweep import CERTAIN, SWEPT, Elect, Found, Inputs, Keep, Mean, Part, Run, Sweep, Target, View

# Triton decides when it is imported, for good, whether kernels are interpreted.
if not backends.has_gpu_driver():
    with pytest.MonkeyPatch.context() as _environment, suppress(ImportError):
        _environment.setenv("TRITON_INTERPRET", "1")
        importlib.import_module("fastmerge.kernels.provider")

# The interpreter computes in numpy, which warns of what the kernels define: overflow, and NaN in a comparison.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

ON_A_CARD = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")]
EMULATED = ("emulated", "interpreted")  # stand-ins for cuda and triton, which take the small sizes only


# --- a GPU provider, as the tests of the ops want it ---


class Mirrored:
    """A GPU provider for tensors in the memory of the host.

    They go to the card with the misalignment that they have there, and outputs come back; nothing else may change.
    """

    def __init__(self, provider: Any, number: int = 0) -> None:
        self.provider = provider
        self.name: str = provider.name
        self.device: backends.Device = provider.device(number)
        self._number = number

    def gram(self, tensors: Sequence[Inputs], run: Run) -> Any:
        with self._there(tensors, [], run) as there:
            return self.provider.gram(there.tensors, there.run)

    def norms(self, tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> Any:
        with self._there(tensors, [], run) as there:
            return self.provider.norms(there.tensors, sweeps, there.run)

    def threshold(self, groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> Any:
        with self._there(list(chain(*groups)), [], run) as there:
            rest = iter(there.tensors)
            return self.provider.threshold([[next(rest) for _ in group] for group in groups], ranks, there.run)

    def merge(
        self,
        tensors: Sequence[Inputs],
        sweeps: Sequence[Sequence[Sweep]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> Any:
        with self._there(tensors, targets, run) as there:
            return self.provider.merge(there.tensors, sweeps, there.targets, there.run)

    def merge_ranked(
        self,
        tensors: Sequence[Inputs],
        sweeps: Sequence[Sequence[Sweep]],
        ranks: Sequence[Sequence[int]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> Any:
        with self._there(tensors, targets, run) as there:
            return self.provider.merge_ranked(there.tensors, sweeps, ranks, there.targets, there.run)

    @contextmanager
    def _there(self, tensors: Sequence[Inputs], targets: Sequence[Sequence[Target]], run: Run) -> Iterator[There]:
        """Uploads without waiting, so that an op which does not keep to its stream reads garbage."""
        end = 256
        moves: list[tuple[int, int, int]] = []  # place, address in the host's memory, bytes

        def place(address: int, nbytes: int) -> int:
            nonlocal end
            moves.append((end + address % 256, address, nbytes))
            end += (address % 256 + nbytes) // 256 * 256 + 512
            return moves[-1][0]

        views = [[place(view.address, t.elements * SWEPT[view.dtype]) for view in t.views] for t in tensors]
        read = len(moves)
        outs = [
            [place(target.offset, t.elements * SWEPT[target.dtype]) for target in each]
            for t, each in zip(tensors, targets, strict=False)
        ]
        with streaming.block(self.device, end) as (on_device, pinned, stream):
            host = np.frombuffer(memory.view(pinned, end), np.uint8)
            host[:] = 0xA5
            for at, address, nbytes in moves:
                ctypes.memmove(pinned + at, address, nbytes)
            before = host.copy()
            self.device.upload(on_device, pinned, end, stream)
            yield There(
                [_moved(t, [on_device + at for at in each]) for t, each in zip(tensors, views, strict=True)],
                [
                    [Target(target.dtype, on_device + at) for target, at in zip(mine, each, strict=True)]
                    for mine, each in zip(targets, outs, strict=True)
                ],
                run._replace(device=self._number, stream=stream),
            )
            self.device.synchronize(stream)  # an op on nothing does not wait for the upload
            host[:] = 0
            self.device.download(pinned, on_device, end, stream)
            self.device.synchronize(stream)
            for at, address, nbytes in moves[read:]:
                ctypes.memmove(address, pinned + at, nbytes)
                host[at : at + nbytes] = before[at : at + nbytes]
            np.testing.assert_array_equal(host, before, err_msg="written outside of the outputs")


class There(NamedTuple):
    tensors: list[Inputs]
    targets: list[list[Target]]
    run: Run


def _moved(tensor: Inputs, addresses: Sequence[int]) -> Inputs:
    views = [View(address, view.dtype) for address, view in zip(addresses, tensor.views, strict=True)]
    models = len(tensor.models)
    return tensor._replace(models=tuple(views[:models]), base=views[models] if tensor.base else None)


@pytest.fixture(params=ON_A_CARD)
def provider(request: pytest.FixtureRequest) -> Mirrored:
    """For what the emulated ones are asked in files of their own."""
    return Mirrored(available(request.param))


@pytest.fixture(params=[*ON_A_CARD, *EMULATED])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirrored]:
    with emulated.installed() if request.param == "emulated" else nullcontext():
        if request.param == "interpreted":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
        yield Mirrored(available(request.param))


def available(name: str) -> Any:
    """The provider of this name, or of a stand-in's."""
    if name == "emulated":
        return emulated.provider()
    wanted = "triton" if name == "interpreted" else name
    if reason := backends.why_not(wanted):
        pytest.skip(f"backend {wanted} cannot run: {reason}")
    if wanted == "triton":
        interpreted = importlib.import_module("fastmerge.kernels.device").INTERPRETED
        if interpreted and name == "triton":
            pytest.skip("Triton interprets its kernels in this process: there is no GPU, or ask for this file alone")
        if not interpreted and name == "interpreted":
            pytest.skip("Triton compiles its kernels in this process")
    return backends.provider(wanted)


# --- every op, at every size ---

SMALL = (0, 1, 31, 1025)
LARGE = ((1 << 20) - 1, 1 << 20, (1 << 20) + 1)
STAGES = ((Keep.ABOVE, Elect.WEIGHTED), (Keep.BERNOULLI, Elect.NONE), (Keep.ALL, Elect.COUNT))


@pytest.mark.parametrize("count", SMALL)
def test_small_tensors_in_every_op(gpu: Mirrored, count: int) -> None:
    is_as_on_the_cpu(gpu, count)


@pytest.mark.parametrize("gpu", ON_A_CARD, indirect=True)
@pytest.mark.parametrize("count", LARGE)
def test_a_million_elements_in_every_op(gpu: Mirrored, count: int) -> None:
    is_as_on_the_cpu(gpu, count)


def is_as_on_the_cpu(gpu: Mirrored, count: int) -> None:
    """Thresholds and merges to the bit; sums of n float64 terms err by less than n 2**-53 of their magnitudes, each."""
    native = compiled_core()
    tensors, run = like_weights(count), Run(threads=2)
    inputs, wanted = tensors.inputs, [(count // 5, count // 2, 1)]
    (cuts,) = native.threshold([[inputs]], wanted, run)
    assert gpu.threshold([[inputs]], wanted, run) == [cuts]
    sweeps = [sweep_of(keep, elect, cuts) for keep, elect in STAGES]
    outputs = ("BF16", "F32", "F16")
    expected, expected_found = merge(native, tensors, sweeps, outputs)
    merged, found = merge(gpu, tensors, sweeps, outputs, run)
    for output, reached, dtype in zip(merged, expected, outputs, strict=True):
        np.testing.assert_array_equal(bits(output, dtype), bits(reached, dtype), err_msg=dtype)
    assert found == expected_found
    tolerance = 2 * max(count, 1) * 2.0**-53
    (gram,), (here,) = gpu.gram([inputs], run), native.gram([inputs], run)
    sizes = np.sqrt(np.diag(here))
    assert (np.abs(gram - here) <= tolerance * np.outer(sizes, sizes)).all()
    for sweep in sweeps:
        (norms,), (here,) = gpu.norms([inputs], [sweep], run), native.norms([inputs], [sweep], run)
        np.testing.assert_allclose(norms, here, rtol=tolerance)


def like_weights(count: int) -> Tensors:
    """Three models near a base, of mixed dtypes, at odd addresses."""
    rng = np.random.default_rng(count)
    base = 0.02 * rng.standard_normal(count, np.float32)
    models = [base + 1e-3 * rng.standard_normal(count, np.float32) for _ in range(3)]
    return Tensors(list(zip(models, ("BF16", "F16", "BF16"), strict=True)), (base, "BF16"), skew=4)


def sweep_of(keep: Keep, elect: Elect, cuts: Sequence[Any]) -> Sweep:
    parts = tuple(
        Part(weight, magnitude=cut.magnitude, ties_end=cut.ties_end, cut=CERTAIN // 3, key=0xFEDCBA9876543210 + i)
        for i, (weight, cut) in enumerate(zip((0.5, 0.7, -0.2), cuts, strict=True))
    )
    return Sweep(parts, keep, elect, mean=Mean.SUM if elect is Elect.NONE else Mean.WEIGHTS, lambda_=0.9)


@pytest.mark.parametrize("gpu", ["cuda", "emulated"], indirect=True)
def test_small_and_large_tensors_selected_and_swept_in_one_call(gpu: Mirrored) -> None:
    native, run = compiled_core(), Run()
    many = [like_weights(count) for count in (1, 31, 1025, 60_000)]
    ranks = [(t.inputs.elements // 5, t.inputs.elements // 2, 1) for t in many]
    cuts = native.threshold([[t.inputs] for t in many], ranks, run)
    sweeps = [[sweep_of(Keep.ABOVE, Elect.WEIGHTED, each)] for each in cuts]
    outputs = [Memory(2 * t.inputs.elements) for t in many]
    targets = [[Target("BF16", output.address)] for output in outputs]
    found_cuts, found = gpu.merge_ranked([t.inputs for t in many], sweeps, ranks, targets, run)
    assert found_cuts == cuts
    for tensors, sweep, output, noticed in zip(many, sweeps, outputs, found, strict=True):
        (expected,), expected_found = merge(native, tensors, sweep, ["BF16"])
        np.testing.assert_array_equal(bits(output.bytes, "BF16"), bits(expected, "BF16"))
        assert noticed == expected_found


@pytest.mark.parametrize("gpu", ON_A_CARD[:1], indirect=True)
@pytest.mark.parametrize("kind", ["normal", "sorted", "two-values"])
def test_large_tensors_that_are_guessed(gpu: Mirrored, kind: str) -> None:
    """More than four tiles for each block of any card: read once where a guess is right, and always right."""
    count, native, run = 12_000_003, compiled_core(), Run(threads=2)
    rng = np.random.default_rng(count)
    base = 0.02 * rng.standard_normal(count, np.float32)
    deltas = [1e-3 * rng.standard_normal(count, np.float32) for _ in range(3)]
    if kind == "sorted":
        deltas = [np.sort(np.abs(delta)) for delta in deltas]
    elif kind == "two-values":
        deltas = [np.where(delta < 0, np.float32(0.5), np.float32(1)) for delta in deltas]
    deltas[1][::99_991] = np.nan
    tensors = Tensors([(base + delta, "BF16") for delta in deltas], (base, "BF16"))
    ranks = (count // 5, count // 2, count - 5)
    (cuts,) = native.threshold([[tensors.inputs]], [ranks], run)
    sweeps, output = [sweep_of(Keep.ABOVE, Elect.WEIGHTED, cuts)], Memory(2 * count)
    found_cuts, found = gpu.merge_ranked([tensors.inputs], [sweeps], [ranks], [[Target("BF16", output.address)]], run)
    assert found_cuts == [cuts]
    (expected,), expected_found = merge(native, tensors, sweeps, ["BF16"])
    np.testing.assert_array_equal(bits(output.bytes, "BF16"), bits(expected, "BF16"))
    assert found == [expected_found]


# --- every combination of stages, every method ---


def sampled(most: int) -> list[test_ops.Case]:
    """Each combination of stages once; every number of models would be a kernel of its own to compile."""
    there = {
        case.stages[0]: replace(case, skew=4 * case.skew)
        for case in test_ops.cases()
        if len(case.dtypes) - case.has_base <= 4 and case.elements <= most
    }
    return list(there.values())


@pytest.mark.parametrize("gpu", ON_A_CARD, indirect=True)
@pytest.mark.parametrize("case", sampled(test_ops.CROSSING), ids=str)
def test_merge_has_the_bits_of_the_cpu(gpu: Mirrored, case: test_ops.Case) -> None:
    has_the_bits_of_the_cpu(gpu, case)


@pytest.mark.parametrize("gpu", EMULATED, indirect=True)
@pytest.mark.parametrize("case", sampled(129)[::8], ids=str)
def test_merge_has_the_bits_of_the_cpu_where_emulated(gpu: Mirrored, case: test_ops.Case) -> None:
    has_the_bits_of_the_cpu(gpu, case)


def has_the_bits_of_the_cpu(gpu: Mirrored, case: test_ops.Case) -> None:
    tensors, sweeps = test_ops.tensors_of(case), test_ops.sweeps_of(case)
    expected, expected_found = merge(compiled_core(), tensors, sweeps, case.outputs)
    outputs, found = merge(gpu, tensors, sweeps, case.outputs, case.run, case.skew)
    for output, wanted, dtype in zip(outputs, expected, case.outputs, strict=True):
        np.testing.assert_array_equal(bits(output, dtype), bits(wanted, dtype), err_msg=dtype)
    assert found == expected_found


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.direct])
def test_every_method_measured_and_swept(gpu: Mirrored, method: str) -> None:
    row = METHODS[method]
    models = min(3, row.models[1] or 3)
    given = {"weight": (0.5, 0.25, 0.375), "density": (0.2, 0.5, 0.7)}
    settings = Settings(
        {p.name: 0.3 if p.name == "t" else p.default for p in row.parameters if not p.per_model},
        tuple(
            {p.name: given.get(p.name, (p.default,) * 3)[i] for p in row.parameters if p.per_model}
            for i in range(models)
        ),
        tuple(range(models)),
    )
    rng = np.random.default_rng(16)
    count = 3001
    values = [(rng.standard_normal(count).astype(np.float32), "BF16") for _ in range(models + 1)]
    tensors = Tensors(values[:models], values[-1] if row.base is Base.ORIGIN else None)
    sweep = measured_sweep(compiled_core(), row, settings, tensors)
    measured = measured_sweep(gpu, row, settings, tensors)
    for ours, theirs in zip(measured.parts, sweep.parts, strict=True):
        assert ours == replace(theirs, weight=pytest.approx(theirs.weight, rel=1e-11))  # slerp's come of a gram
    (expected,), _ = merge(compiled_core(), tensors, [sweep], ["BF16"])
    (merged,), _ = merge(gpu, tensors, [sweep], ["BF16"])
    np.testing.assert_array_equal(bits(merged, "BF16"), bits(expected, "BF16"))


# --- more elements than 32 bits count ---


class Long(NamedTuple):
    """A tensor that repeats a pattern, and the places to look at it."""

    elements: int
    periods: tuple[int, int]  # of the model and of the base: odd, so that no power of two is a multiple
    slices: tuple[int, ...]  # multiples of 8, a thousand elements each


SHORT = Long(5007, (1009, 1013), (0, 2000, 4000))
HUGE = Long(
    2**31 + 7,
    (4_194_301, 4_194_287),
    (0, 2**30 - 504, 2**31 - 504, 2**31 - 992),  # the borders of 2**31 and 2**32 bytes; the end
)


@pytest.mark.parametrize(
    ("gpu", "tensor"),
    [pytest.param(name, HUGE, marks=pytest.mark.gpu, id=f"{name}-huge") for name in ("cuda", "triton")]
    + [pytest.param(name, SHORT, id=f"{name}-short") for name in EMULATED],
    indirect=["gpu"],
)
def test_a_tensor_of_any_length(gpu: Mirrored, tensor: Long) -> None:
    """All ops on a model of `tensor`, merged with a base; the last element becomes infinite before the merge."""
    count, device = tensor.elements, gpu.device
    if device.free_bytes() < 11 * count:
        pytest.skip(f"{device.name} has less than {11 * count:,} bytes free")
    rng = np.random.default_rng(17)
    model, base = (rng.integers(-99, 100, period).astype(np.float32) / 64 for period in tensor.periods)
    with ExitStack() as held:
        stream = held.enter_context(streaming.block(device, 2 * max(tensor.periods))).stream
        addresses = [device.allocate(2 * count) for _ in range(4)]
        for address in addresses:
            held.callback(device.release, address)
        run = Run(stream=stream)
        for address, values in zip(addresses, (model, base), strict=False):
            repeat(device, address, values, count, stream)
        alone = Inputs(count, (View(addresses[0], "BF16"),))
        k = count // 5
        ((cut,),) = gpu.provider.threshold([[alone]], [(k,)], run)
        assert cut == cut_of_repeated(model, count, k)
        sums_are_those_of_repeated(gpu, alone, model, run)
        put(device, addresses[0] + 2 * (count - 1), encode(np.array([np.inf]), "BF16"), stream)
        sweeps = [
            Sweep((Part(0.7, magnitude=cut.magnitude, ties_end=count - 500),), Keep.ABOVE, Elect.WEIGHTED),
            Sweep((Part(1.3, cut=CERTAIN // 2, key=0xFEDCBA9876543210),), Keep.BERNOULLI),
        ]
        inputs = alone._replace(base=View(addresses[1], "BF16"))
        (found,) = gpu.provider.merge([inputs], [sweeps], [[Target("BF16", a) for a in addresses[2:]]], run)
        assert found == Found((1, 0), (count - 1, -1), (0, 0))
        for start in tensor.slices:
            index = np.arange(start, min(start + 1000, count))
            values = model[index % len(model)]
            values[index == count - 1] = np.inf
            here = [torch.from_numpy(values)], torch.from_numpy(base[index % len(base)])
            for sweep, address in zip(sweeps, addresses[2:], strict=True):
                expected = reference.narrow(reference.sweep_tile(*here, sweep, start), torch.bfloat16)
                merged = taken(device, address + 2 * start, 2 * len(index), stream)
                np.testing.assert_array_equal(bits(merged, "BF16"), expected.view(torch.int16).numpy().view(np.uint16))


def repeat(device: backends.Device, address: int, values: np.ndarray, count: int, stream: int) -> None:
    """Fills device memory with a pattern in bf16, over and over."""
    with streaming.block(device, 2 * len(values)) as (_, pinned, _):
        memory.view(pinned, 2 * len(values))[:] = encode(values, "BF16").data
        for start in range(0, count, len(values)):
            device.upload(address + 2 * start, pinned, 2 * min(len(values), count - start), stream)
        device.synchronize(stream)


def put(device: backends.Device, address: int, raw: np.ndarray, stream: int) -> None:
    with streaming.block(device, raw.size) as (_, pinned, _):
        memory.view(pinned, raw.size)[:] = raw.data
        device.upload(address, pinned, raw.size, stream)
        device.synchronize(stream)


def taken(device: backends.Device, address: int, nbytes: int, stream: int) -> np.ndarray:
    with streaming.block(device, nbytes) as (_, pinned, _):
        device.download(pinned, address, nbytes, stream)
        device.synchronize(stream)
        return np.frombuffer(memory.view(pinned, nbytes), np.uint8).copy()


def cut_of_repeated(values: np.ndarray, count: int, k: int) -> Any:
    """Like a sort of all `count` magnitudes, by counting those of the pattern."""
    magnitudes = np.abs(values)
    repeats, rest = divmod(count, len(values))
    levels, counts = np.unique(magnitudes, return_counts=True)
    counts = counts * repeats + [(magnitudes[:rest] == level).sum() for level in levels]
    above = np.cumsum(counts[::-1])[::-1] - counts  # strictly larger
    at = np.flatnonzero(above < k)[0]
    wanted = k - int(above[at])
    if wanted == counts[at]:
        return float(levels[at]), test_ops.EVERY
    places = np.flatnonzero(magnitudes == levels[at])
    turn, place = divmod(wanted - 1, len(places))
    return float(levels[at]), turn * len(values) + int(places[place]) + 1


def sums_are_those_of_repeated(gpu: Mirrored, alone: Inputs, values: np.ndarray, run: Run) -> None:
    repeats, rest = divmod(alone.elements, len(values))
    wide = np.abs(values.astype(np.float64))
    l1, squares = (repeats * each.sum() + each[:rest].sum() for each in (wide, wide * wide))
    tolerance = 2 * alone.elements * 2.0**-53
    (gram,) = gpu.provider.gram([alone], run)
    np.testing.assert_allclose(gram, [[squares]], rtol=tolerance)
    (norms,) = gpu.provider.norms([alone], [Sweep((Part(),))], run)
    np.testing.assert_allclose(norms[0], [[l1, np.sqrt(squares), wide.max()]] * 2, rtol=tolerance)


# --- a GPU's memory, streams and neighbours ---


def test_small_bytes_go_to_a_device_and_back(gpu: Mirrored) -> None:
    device = gpu.device
    assert device.name
    assert device.free_bytes() > 0
    values = np.arange(100_003, dtype=np.uint32).view(np.uint8)
    with streaming.block(device, values.size) as (on_device, _, stream):
        assert on_device % 256 == 0
        put(device, on_device, values, stream)
        np.testing.assert_array_equal(taken(device, on_device, values.size, stream), values)


@pytest.mark.parametrize("gpu", ON_A_CARD, indirect=True)
def test_a_card_that_is_full_says_so(gpu: Mirrored) -> None:
    with pytest.raises(MemoryError):
        gpu.device.allocate(gpu.device.free_bytes() + (1 << 40))
    gpu.device.release(gpu.device.allocate(1 << 20))


def test_threads_with_streams_of_their_own_do_not_disturb_one_another(gpu: Mirrored) -> None:
    sweep = Sweep((Part(0.5, cut=CERTAIN // 3, key=3), Part(0.7, cut=CERTAIN // 2, key=4)), Keep.BERNOULLI)
    sets = [Tensors([(np.full(3001, 1.0 + i), "F32"), (np.arange(3001) % 7, "F32")]) for i in range(4)]
    with ThreadPoolExecutor(len(sets)) as pool:
        several = list(pool.map(lambda tensors: [merge(gpu, tensors, [sweep], ["F32"]) for _ in range(3)], sets))
    for tensors, results in zip(sets, several, strict=True):
        (expected,), noticed = merge(compiled_core(), tensors, [sweep], ["F32"])
        for (merged,), found in results:
            np.testing.assert_array_equal(merged, expected)
            assert found == noticed


def test_every_device_has_the_bits_of_the_first(gpu: Mirrored) -> None:
    count = gpu.provider.devices()
    if count < 2:
        pytest.skip(f"{gpu.name} sees one GPU")
    for number in range(1, count):
        is_as_on_the_cpu(Mirrored(gpu.provider, number), 1025)


# --- whole merges ---


@pytest.mark.parametrize("gpu", [*ON_A_CARD, "emulated"], indirect=True)  # the interpreter takes its time
@pytest.mark.parametrize("tiles", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("recipe", test_engine.RECIPES)
def test_a_merge_from_disk_has_the_bytes_of_the_cpu(
    gpu: Mirrored, recipe: str, tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if tiles:  # of a size that the scratch memory of the ops does not change
        monkeypatch.setattr(streaming, "SMALLEST", 1 << 16)
        monkeypatch.setattr(streaming.Streamer, "_block_bytes", lambda *_: 1 << 16)
    for name, tensors in test_engine.family(torch.bfloat16).items():
        test_engine.save(name, tensors)
    text = test_engine.RECIPES[recipe]
    expected = test_engine.raw(test_engine.merged(text, backend="cpu"))
    report = fastmerge.merge(Recipe.parse(text), "gpu", backend=gpu.name)
    assert test_engine.raw(test_engine.load("gpu")) == expected
    assert "merge" in report.worked[gpu.name]


# --- the bench of the GPU, so that it runs on the day that there is one ---


def test_the_bench_of_a_gpu_runs_where_emulated() -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark not installed")
    emulated.compiled()
    chosen = ["--provider", "cuda", "--op", "merge,queued,whole,norms,threshold,disk", "--method", "ties"]
    command = [sys.executable, "-m", "pytest", str(emulated.ROOT / "bench" / "test_gpu.py"), "--emulated", *chosen]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=emulated.ROOT)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "cannot run" not in ended.stdout
    for op in ("merge", "queued", "whole", "norms", "threshold", "disk"):
        assert f"\n{op} " in ended.stdout, "no row in the table"
