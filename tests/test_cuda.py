"""The CUDA kernels without a card: on the emulated device, bit for bit; and what nvcc makes of them."""

from __future__ import annotations

import ctypes
import re
import runpy
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

import emulated
import numpy as np
import pytest
import test_ops
import torch
from conftest import Memory, Tensors, bits, decode, merge
from test_ops import (  # noqa: F401  run here by the provider of this file
    test_a_band_begins_and_ends_where_its_ties_do,
    test_a_band_leaves_out_the_infinite_and_keeps_what_is_no_number,
    test_a_clip_leaves_the_sign_and_what_is_no_number,
    test_a_dropped_nan_is_gone_and_a_trimmed_one_stays,
    test_a_mass_of_zero_counts_as_one,
    test_a_nan_is_never_outvoted,
    test_a_vote_of_zero_elects_as_asked,
    test_a_zero_divided_is_a_zero_of_the_quotients_sign,
    test_equals_are_kept_below_the_end_of_ties,
    test_every_16_bit_number_survives_the_way_there_and_back,
    test_every_nan_comes_out_as_one,
    test_found_counts_what_overflows_each_output,
    test_merge_of_many_tensors_is_each_alone,
    test_narrowing_is_to_nearest_even,
    test_nothing_to_add_leaves_the_bits_of_the_base,
    test_without_an_election_no_model_agrees,
)

from fastmerge import reference
from fastmerge.sweep import Elect, Found, Inputs, Keep, Mean, Part, Run, Sweep, Target, View

TILE = 1024  # elements, of a block of 128 threads


@pytest.fixture
def provider() -> ModuleType:
    return emulated.provider()


@pytest.fixture
def stream(provider: ModuleType) -> Iterator[int]:
    device = provider.device(0)
    stream = device.stream()
    yield stream
    device.close(stream)


def launches() -> int:
    library = ctypes.CDLL(emulated.compiled().__file__)
    library.emulated_launches.restype = ctypes.c_ulonglong
    return int(library.emulated_launches())


# --- merge: the bits of the reference ---


@pytest.mark.parametrize("case", list(test_ops.cases()), ids=str)
def test_merge_has_the_bits_of_the_reference(provider: ModuleType, case: test_ops.Case) -> None:
    has_the_bits_of_the_reference(provider, replace(case, skew=4 * case.skew))


@pytest.mark.parametrize("elements", [7, 8, 9, 31, TILE - 1, TILE, TILE + 1, 12 * TILE - 1, 12 * TILE, 12 * TILE + 9])
def test_merge_at_the_edges_of_tiles(provider: ModuleType, elements: int) -> None:
    for case in (test_ops.Case(elements, elements, *EDGES, skew, Run()) for skew in (0, 4, 8)):
        has_the_bits_of_the_reference(provider, case)


EDGES = (
    ("BF16", "F32", "F16", "BF16"),
    True,
    ("BF16", "F32", "F16"),
    ((Keep.ABOVE, Elect.WEIGHTED, test_ops.TieVote.POSITIVE, Mean.WEIGHTS),) * 3,
    "special",
)


@pytest.mark.parametrize("models", [4, 5, 8, 9, 33])
@pytest.mark.parametrize("keep", Keep)
def test_any_number_of_models_and_settings(provider: ModuleType, models: int, keep: Keep) -> None:
    """Two settings of one combination of stages share a read; the third has stages of its own."""
    draw = np.random.default_rng(models)
    dtypes = tuple(draw.choice(("F32", "F16", "BF16"), models + 1).tolist())
    stages = (keep, Elect.PLAIN, test_ops.TieVote.ZERO, Mean.COUNT)
    linear = (Keep.ALL, Elect.NONE, test_ops.TieVote.POSITIVE, Mean.SUM)
    outputs = ("BF16", "F32", "F16")
    case = test_ops.Case(models, 2 * TILE + 5, dtypes, True, outputs, (stages, linear, stages), "special", 4, Run())
    has_the_bits_of_the_reference(provider, case)


def has_the_bits_of_the_reference(provider: ModuleType, case: test_ops.Case) -> None:
    sweeps = test_ops.sweeps_of(case)
    expected, expected_found = merge(reference, test_ops.tensors_of(case), sweeps, case.outputs)
    outputs, found = merge(provider, test_ops.tensors_of(case), sweeps, case.outputs, skew=case.skew)
    for output, wanted, dtype in zip(outputs, expected, case.outputs, strict=True):
        np.testing.assert_array_equal(bits(output, dtype), bits(wanted, dtype), err_msg=dtype)
    assert found == expected_found


@pytest.mark.parametrize("begin", [8 * 12_345, 2**33 + 2**20], ids=["middle", "beyond-32-bits"])
def test_a_part_of_a_tensor_is_swept_at_its_place(provider: ModuleType, begin: int) -> None:
    """Random bits, the end of ties and what is found count from the start of the whole tensor."""
    rng = np.random.default_rng(12)
    count = 2 * TILE + 3
    models = [(rng.integers(-3, 4, count) / 4).astype(np.float32) for _ in range(2)]
    tensors = Tensors([(model, "F32") for model in models])
    for keep, part in (
        (Keep.BERNOULLI, Part(cut=2**31 + 12_345, key=0xFEDCBA9876543210)),
        (Keep.ABOVE, Part(magnitude=0.5, ties_end=begin + TILE + 4)),
        (Keep.ABOVE, Part(magnitude=0.5, ties_end=begin)),
        (Keep.BAND, Part(magnitude=0.25, ties_end=begin + 9, top_magnitude=0.5, top_ties_end=begin + TILE + 4)),
    ):
        sweep, output = Sweep((part, part), keep), Memory(4 * count)
        inputs = tensors.inputs._replace(begin=begin)
        provider.merge([inputs], [[sweep]], [[Target("F32", output.address)]], Run())
        wanted = reference.sweep_tile([torch.from_numpy(model) for model in models], None, sweep, begin)
        np.testing.assert_array_equal(decode(output.bytes, "F32"), wanted.numpy())


@pytest.mark.parametrize("begin", [0, 8 * 12_345, 2**33 + 2**20], ids=["start", "middle", "beyond-32-bits"])
def test_a_random_drop_is_decided_to_its_last_bit(provider: ModuleType, begin: int) -> None:
    """One below the cut stays, and what equals it goes: the first 16 bits tie, and the second draw decides."""
    key, values = 0xFEDCBA9876543210, np.arange(1, 1001, dtype=np.float32)
    drawn = reference.random_bits(key, begin, len(values))
    tensors = Tensors([(values, "F32")])
    for place in (0, 7, 500):
        for above, kept in ((0, False), (1, True)):
            sweep, output = Sweep((Part(cut=int(drawn[place]) + above, key=key),), Keep.BERNOULLI), Memory(4000)
            inputs = tensors.inputs._replace(begin=begin)
            provider.merge([inputs], [[sweep]], [[Target("F32", output.address)]], Run())
            merged = decode(output.bytes, "F32")
            assert (merged[place] != 0) == kept
            np.testing.assert_array_equal(
                merged, reference.keep(torch.from_numpy(values), sweep.keep, sweep.parts[0], begin)
            )


@pytest.mark.parametrize("begin", [0, 2**33])
@pytest.mark.parametrize("keep", Keep)
def test_found_names_what_is_not_finite(provider: ModuleType, keep: Keep, begin: int) -> None:
    """Also what is dropped or outvoted; in every setting, it is counted once."""
    count = test_ops.CROSSING
    model, other, base = np.ones(count), np.ones(count), np.zeros(count)
    model[[70_001, 70_002, count - 1]] = np.nan, np.inf, -np.inf
    base[[5, 299_000]] = np.inf, np.nan
    part = Part(magnitude=9.0, cut=0)
    sweeps = [Sweep((part, part), keep, elect) for elect in (Elect.COUNT, Elect.NONE, Elect.COUNT)]
    for skew in (0, 4):
        tensors = Tensors([(model, "BF16"), (other, "F32")], (base, "F16"), skew)
        outputs = [Memory(4 * count) for _ in sweeps]
        targets = [Target("F32", output.address) for output in outputs]
        (found,) = provider.merge([tensors.inputs._replace(begin=begin)], [sweeps], [targets], Run())
        assert found == Found((3, 0, 2), (begin + 70_001, -1, begin + 5), (0, 0, 0))


def test_a_thousand_small_tensors_are_one_launch_per_combination_of_stages(provider: ModuleType) -> None:
    rng = np.random.default_rng(13)
    sizes = rng.integers(0, 40, 1000).tolist()
    many = [Tensors([(rng.standard_normal(n), "BF16")] * 2, (rng.standard_normal(n), "BF16")) for n in sizes]
    one = Sweep((Part(0.5), Part(0.25)))
    two = Sweep((Part(0.5), Part(0.25, magnitude=0.5)), Keep.ABOVE, Elect.WEIGHTED)
    for sweeps, most in (([one], 1), ([one, one], 1), ([one, two, one], 2)):
        outputs = [[Memory(2 * n) for _ in sweeps] for n in sizes]
        targets = [[Target("BF16", output.address) for output in each] for each in outputs]
        before = launches()
        found = provider.merge([t.inputs for t in many], [sweeps] * len(many), targets, Run())
        assert launches() - before == most
        assert found == [Found((0,) * 3, (-1,) * 3, (0,) * len(sweeps))] * len(many)
        for tensors, each in zip(many[:50], outputs, strict=False):
            expected, _ = merge(reference, tensors, sweeps, ["BF16"] * len(sweeps))
            for output, wanted in zip(each, expected, strict=True):
                output.check_guards()
                np.testing.assert_array_equal(output.bytes, wanted)


def test_nothing_is_launched_for_nothing(provider: ModuleType) -> None:
    before = launches()
    assert provider.merge([], [], [], Run()) == []
    ((), ()), found = merge(provider, Tensors([(np.zeros(0), "F32")]), [test_ops.PLAIN] * 2, ["F32"] * 2)
    assert found == Found((0,), (-1,), (0, 0))
    assert launches() == before


# --- merge_ranked, merge_async ---


def ranked_tensors() -> tuple[list[Tensors], list[list[int]]]:
    """Tensors for one block, for the grid, all equal, and empty of one another's models; and how many elements stay."""
    rng = np.random.default_rng(14)
    many, ranks = [], []
    for count in (1, 100, 9000, 200_003, 12_000, 50_000):
        base = rng.integers(-64, 65, count) / 64
        deltas = [rng.integers(-40, 41, count) / 64 for _ in range(2)] + [np.full(count, 0.5)]
        many.append(Tensors([(base + d, "BF16") for d in deltas], (base, "F32")))
        ranks.append([max(1, count // 5), count // 2, count // 3])
    return many, ranks


@pytest.mark.parametrize("elect", Elect)
def test_a_ranked_merge_is_the_selection_and_the_sweep(provider: ModuleType, elect: Elect) -> None:
    many, ranks = ranked_tensors()
    mean = Mean.SUM if elect is Elect.NONE else Mean.WEIGHTS
    sweeps = [[Sweep((Part(0.5), Part(0.7), Part(-0.2)), Keep.ABOVE, elect, mean=mean)]] * len(many)
    is_selection_and_sweep(provider, many, ranks, sweeps, 1 if elect is Elect.WEIGHTED else 2)


def test_a_ranked_merge_of_several_combinations_of_stages(provider: ModuleType) -> None:
    many, ranks = ranked_tensors()
    settings = [Sweep((Part(0.5),) * 3, Keep.ABOVE, elect) for elect in (Elect.NONE, Elect.WEIGHTED)]
    is_selection_and_sweep(provider, many, ranks, [settings] * len(many), 3)


def is_selection_and_sweep(
    provider: ModuleType, many: list[Tensors], ranks: list[list[int]], sweeps: list[list[Sweep]], most: int
) -> None:
    outputs = [[Memory(2 * t.inputs.elements) for _ in each] for t, each in zip(many, sweeps, strict=True)]
    targets = [[Target("BF16", output.address) for output in each] for each in outputs]
    before = launches()
    cuts, found = provider.merge_ranked([t.inputs for t in many], sweeps, ranks, targets, Run())
    assert launches() - before == most
    assert cuts == reference.threshold([[t.inputs] for t in many], ranks, Run())
    for tensors, cut, each, noticed, row in zip(many, cuts, sweeps, found, outputs, strict=True):
        parts = [
            tuple(replace(p, magnitude=c.magnitude, ties_end=c.ties_end) for p, c in zip(sweep.parts, cut, strict=True))
            for sweep in each
        ]
        known = [replace(sweep, parts=these) for sweep, these in zip(each, parts, strict=True)]
        expected, expected_found = merge(reference, tensors, known, ["BF16"] * len(known))
        assert noticed == expected_found
        for output, wanted in zip(row, expected, strict=True):
            output.check_guards()
            np.testing.assert_array_equal(output.bytes, wanted)


CUT = np.dtype([("magnitude", "f4"), ("ties_end", "i8")], align=True)


def test_an_asynchronous_merge_takes_its_cuts_from_the_device(provider: ModuleType, stream: int) -> None:
    rng = np.random.default_rng(15)
    count, run = 5000, Run(stream=stream)
    tensors = Tensors([((rng.integers(-3, 4, count) / 4), "BF16") for _ in range(6)])
    cuts = np.array([(0.25 * i, 700 * i) for i in range(6)], CUT)
    sweep = Sweep((Part(0.3),) * 6, Keep.ABOVE, Elect.WEIGHTED)
    known = tuple(Part(0.3, magnitude=float(m), ties_end=int(e)) for m, e in cuts.tolist())
    for address, parts in ((cuts.ctypes.data, known), (0, sweep.parts)):
        output = Memory(2 * count)
        provider.merge_async(tensors.inputs, [sweep], [Target("BF16", output.address)], address, run)
        assert (output.bytes == 0xFF).all(), "waited for"
        provider.device(0).synchronize(stream)
        output.check_guards()
        (wanted,), _ = merge(reference, tensors, [replace(sweep, parts=parts)], ["BF16"])
        np.testing.assert_array_equal(output.bytes, wanted)


def test_an_asynchronous_merge_says_when_its_tables_are_too_large(provider: ModuleType) -> None:
    inputs = Inputs(8, (View(256, "F32"),) * 200)
    with pytest.raises(ValueError, match="fewer models"):
        provider.merge_async(inputs, [Sweep((Part(),) * 200)], [Target("F32", 256)], 0, Run())


# --- a GPU's memory and streams ---


def test_bytes_go_to_a_device_and_back(provider: ModuleType, stream: int) -> None:
    device = provider.device(0)
    assert device.name
    pinned, memory = device.pin(1000), device.allocate(1000)
    assert memory % 256 == 0
    host = np.ctypeslib.as_array((ctypes.c_uint8 * 1000).from_address(pinned))
    host[:] = np.arange(1000) % 251
    device.upload(memory, pinned, 1000, stream)
    device.synchronize(stream)
    host[:] = 0
    device.download(pinned, memory, 1000, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(host, np.arange(1000) % 251)
    device.release(memory)
    device.unpin(pinned)


def test_a_device_that_is_full_says_so(provider: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    device = provider.device(1)
    monkeypatch.setenv("CUDA_EMULATOR_MEMORY", str(1 << 40))
    held = (1 << 40) - device.free_bytes()  # by what ran in this process before
    monkeypatch.setenv("CUDA_EMULATOR_MEMORY", str(held + 10000))
    assert device.free_bytes() == 10000
    memory = device.allocate(6000)
    assert device.free_bytes() == 4000
    with pytest.raises(MemoryError, match="allocate memory: out of memory"):
        device.allocate(6000)
    device.release(memory)
    device.release(device.allocate(6000))


def test_each_device_has_its_own_streams(provider: ModuleType, stream: int) -> None:
    tensors, output = Tensors([(np.ones(10), "F32")]), Memory(40)
    job = ([tensors.inputs], [[test_ops.PLAIN]], [[Target("F32", output.address)]])
    provider.merge(*job, Run(device=1))
    np.testing.assert_array_equal(decode(output.bytes, "F32"), np.ones(10))
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        provider.merge(*job, Run(device=1, stream=stream))
    with pytest.raises(RuntimeError, match="be chosen: invalid device"):
        provider.merge(*job, Run(device=7))
    provider.merge(*job, Run(stream=stream))  # neither error stays behind


# --- the emulator ---


@pytest.fixture(scope="module")
def probe() -> Callable[[int, bool], tuple[list[int], str]]:
    source = emulated.EMULATOR / "probes.cu"
    library = ctypes.CDLL(str(emulated.built("probes", [source], [emulated.SOURCES, emulated.EMULATOR])))
    library.probe.restype = ctypes.c_char_p

    def run(number: int, mistaken: bool) -> tuple[list[int], str]:
        out = (ctypes.c_int * 64)(*[-1] * 64)
        fault = library.probe(number, ctypes.c_bool(mistaken), out)
        return list(out), fault.decode()

    return run


def test_a_missing_barrier_leaves_garbage(probe: Callable[[int, bool], tuple[list[int], str]]) -> None:
    for number, right in ((0, [(thread + 1) % 64 for thread in range(64)]), (1, [28] * 64)):
        assert all(probe(number, False) == (right, "") for _ in range(20))
        assert all(probe(number, True) != (right, "") for _ in range(20))


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (2, "not every thread of a block or warp reached a barrier"),
        (3, "not every thread of a block or warp reached a barrier"),
        (4, "a thread waits for what no other thread will do"),
        (5, "a write past the end of shared memory"),
    ],
    ids=["a-lane-left", "a-divergent-barrier", "a-block-left", "out-of-bounds"],
)
def test_what_cannot_be_right_is_a_fault(
    probe: Callable[[int, bool], tuple[list[int], str]], number: int, fault: str
) -> None:
    assert probe(number, False)[1] == ""
    assert probe(number, True)[1] == fault


# --- compiled by nvcc ---


@cache
def ptx(name: str) -> str:
    """What the compiler makes of a file's kernels."""
    gpu = runpy.run_path(str(emulated.ROOT / "bench" / "instructions" / "gpu.py"))
    if reason := gpu["why_not"]():
        pytest.skip(reason)
    return str(gpu["ptx"](name))


SPILLS = """
__global__ void __launch_bounds__(1024, 2) spills(float* values) {
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = values[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) values[(63 - i) * 1024 + threadIdx.x] = held[i] * held[(i + 7) % 64];
}
"""


def test_the_build_refuses_a_kernel_that_spills(tmp_path: Path) -> None:
    """So that none does, on any architecture that is built."""
    nvcc = shutil.which("nvcc")
    if not nvcc:
        pytest.skip("no nvcc to compile the kernels with")

    def compiled(*options: str) -> subprocess.CompletedProcess[str]:
        command = [nvcc, "-arch=sm_90", "-cubin", "-x", "cu", *options, "-o", str(tmp_path / "cubin"), "-"]
        return subprocess.run(command, input=SPILLS, capture_output=True, text=True)

    flags = re.findall(r"(-Werror=all-warnings|-Xptxas=--warn[\w,-]+)", (emulated.SOURCES / "build.cmake").read_text())
    assert len(flags) == 2
    assert compiled().returncode == 0
    assert "spill" in compiled(*flags).stderr


@pytest.mark.parametrize("name", ["guessed", "ranked"])
def test_a_ranked_merge_reads_its_cuts_past_the_cache_of_constants(name: str) -> None:
    """They are written in the same launch."""
    assert "ld.global.nc" not in ptx(name)


def test_no_sweep_is_contracted_or_approximate() -> None:
    """Each float32 operation is one of IEEE's, to nearest even, denormals and all. But a division may begin with a
    rough step, whose further ones make up for it: `test_quotients_are_those_of_ieee`.
    """
    operations = set(re.findall(r"\b(?:add|sub|mul|mad|div|fma|rcp|ex2|sqrt)\.[a-z0-9.]*f32\b", ptx("merge")))
    exact = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "fma.rn.f32", "div.rn.f32"}
    assert operations == {*exact, "rcp.approx.ftz.f32"}
