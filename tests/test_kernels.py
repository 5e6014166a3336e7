"""The Triton kernels without a GPU: in the interpreter, bit for bit, and compiled ahead of time for NVIDIA and AMD."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

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
    test_a_threshold_trims_to_exactly_its_rank,
    test_a_vote_of_zero_elects_as_asked,
    test_a_zero_divided_is_a_zero_of_the_quotients_sign,
    test_equals_are_kept_below_the_end_of_ties,
    test_every_16_bit_number_survives_the_way_there_and_back,
    test_every_nan_comes_out_as_one,
    test_found_counts_what_overflows_each_output,
    test_merge_of_many_tensors_is_each_alone,
    test_narrowing_is_to_nearest_even,
    test_norms_are_those_of_the_oracle,
    test_norms_of_nothing_are_zero,
    test_nothing_to_add_leaves_the_bits_of_the_base,
    test_threshold_of_a_group_is_that_of_its_tensors_end_to_end,
    test_what_is_not_finite_is_not_measured,
    test_without_an_election_no_model_agrees,
)

from fastmerge import reference
from fastmerge.methods import METHODS
from fastmerge.sweep import Elect, Found, Inputs, Keep, Part, Run, Sweep, Target, View

# Triton decides when it is imported, for good, whether kernels are interpreted.
with pytest.MonkeyPatch.context() as _environment:
    _environment.setenv("TRITON_INTERPRET", "1")
    kernels = pytest.importorskip("fastmerge.kernels.provider", reason="triton not installed", exc_type=ImportError)

# The interpreter computes in numpy, which warns of what the kernels define: overflow, and NaN in a comparison.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """For tests of values in long tensors: the interpreter's time goes by the block, so these are large."""
    monkeypatch.setattr(room("stages"), "_BLOCKS", ((16, 8192),))
    monkeypatch.setattr(room("select"), "BLOCK", 16384)
    return kernels


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def room(name: str) -> ModuleType:
    return importlib.import_module(f"fastmerge.kernels.{name}")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were launched."""
    names: list[str] = []
    executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
    launch = executor.__call__

    def noted(self: object, *args: object, **kwargs: object) -> None:
        names.append(self.fn.__name__)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(executor, "__call__", noted)
    return names


def test_the_kernels_are_interpreted() -> None:
    assert type(room("merging").sweep_kernel).__name__ == "InterpretedFunction"
    assert kernels.why_not() == ""
    assert kernels.devices() == 1


# --- merge ---


def sampled() -> Iterator[test_ops.Case]:
    """Each combination of stages once, short, with few models; the interpreter takes milliseconds per block."""
    seen = set()
    for case in test_ops.cases():
        models = len(case.dtypes) - case.has_base
        if case.stages[0] not in seen and case.elements <= 2049 and models <= 5:
            seen.add(case.stages[0])
            yield replace(case, skew=4 * case.skew)  # elements are at least aligned to themselves


@pytest.mark.parametrize("case", list(sampled()), ids=str)
def test_merge_has_the_bits_of_the_reference(case: test_ops.Case) -> None:
    expected, expected_found = merge(reference, test_ops.tensors_of(case), test_ops.sweeps_of(case), case.outputs)
    outputs, found = merge(
        kernels, test_ops.tensors_of(case), test_ops.sweeps_of(case), case.outputs, case.run, case.skew
    )
    for output, wanted, dtype in zip(outputs, expected, case.outputs, strict=True):
        np.testing.assert_array_equal(bits(output, dtype), bits(wanted, dtype), err_msg=dtype)
    assert found == expected_found


def test_nearly_every_combination_of_stages_is_sampled() -> None:
    assert len(list(sampled())) >= 0.9 * len(test_ops.STAGES)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1023, 1024, 1025, 3000])
@pytest.mark.parametrize("skew", [0, 2, 8])
def test_no_size_and_no_alignment_changes_a_bit(count: int, skew: int) -> None:
    rng = np.random.default_rng(count)
    models = [(rng.standard_normal(count), "BF16"), (rng.standard_normal(count), "F16")]
    sweep = Sweep((Part(0.3), Part(0.7)), elect=Elect.WEIGHTED, lambda_=0.9)
    base = (rng.standard_normal(count), "BF16")
    (expected,), _ = merge(reference, Tensors(models, base), [sweep], ["BF16"])
    (output,), _ = merge(kernels, Tensors(models, base, skew), [sweep], ["BF16"], Run(), skew)
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("begin", [0, 8 * 12_345, 2**33 + 2**20], ids=["start", "middle", "beyond-32-bits"])
def test_a_random_drop_is_decided_to_its_last_bit(begin: int) -> None:
    """One below the cut stays, and what equals it goes: the first 16 bits tie, and the second draw decides."""
    key, values = 0xFEDCBA9876543210, np.arange(1.0, 1002.0)
    drawn = reference.random_bits(key, begin, len(values))
    for place in (0, 7, 500):
        for above, kept in ((0, False), (1, True)):
            sweep = Sweep((Part(cut=int(drawn[place]) + above, key=key),), Keep.BERNOULLI)
            merged, _ = merged_part(values, sweep, begin)
            assert (merged[place] != 0) == kept
            expected = reference.sweep_tile([torch.from_numpy(values).float()], None, sweep, begin)
            np.testing.assert_array_equal(merged, expected.numpy())


@pytest.mark.parametrize("begin", [8, 2**33 + 2**20], ids=["start", "beyond-32-bits"])
def test_flat_indices_go_on_from_the_begin_of_a_part(begin: int) -> None:
    values = np.where(np.arange(2003) % 2, -0.5, 0.5)
    values[[1500, 2001]] = np.nan, np.inf
    sweep = Sweep((Part(magnitude=0.5, ties_end=begin + 1100),), Keep.ABOVE)
    merged, found = merged_part(values, sweep, begin)
    stays = (np.arange(2003) < 1100) | ~np.isfinite(values)
    np.testing.assert_array_equal(merged, np.where(stays, values, 0.0))
    assert found == Found((2,), (begin + 1500,), (0,))
    tensors = Tensors([(values, "F32")])
    ((_, after),) = kernels.norms([tensors.inputs._replace(begin=begin)], [sweep], Run())[0]
    assert after[0] == 0.5 * 1100


def merged_part(values: np.ndarray, sweep: Sweep, begin: int) -> tuple[np.ndarray, Found]:
    """A part of a tensor without a base, in float32, whose first element has the flat index `begin`."""
    tensors, output = Tensors([(values, "F32")]), Memory(4 * len(values))
    inputs = tensors.inputs._replace(begin=begin)
    (found,) = kernels.merge([inputs], [[sweep]], [[Target("F32", output.address)]], Run())
    output.check_guards()
    return output.bytes.view(np.float32), found


def test_an_odd_element_is_found_wherever_it_is(launched: list[str]) -> None:
    model, base = np.ones(5003), np.zeros(5003)
    model[[2500, 2501, 4999, 5002]] = np.nan, np.inf, 3e38, -np.inf
    base[[5, 4000]] = np.inf, np.nan
    tensors = Tensors([(model, "F32"), (np.ones(5003), "F16")], (base, "F32"))
    _, found = merge(kernels, tensors, [Sweep((Part(), Part()))] * 2, ["F32", "F16"])
    assert found == Found((3, 0, 2), (2500, -1, 5), (0, 1))
    assert len(launched) == 4, "a sweep and a closer look, of all but the last three elements and of these"


def test_a_merge_that_does_not_look_writes_the_same() -> None:
    values = np.array([np.nan, 1.0, 70000.0])
    tensors, output = Tensors([(values, "F32")]), Memory(6)
    target = Target("F16", output.address)
    assert kernels.merge([tensors.inputs], [[test_ops.PLAIN]], [[target]], Run(), look=False) == []
    np.testing.assert_array_equal(decode(output.bytes, "F16"), [np.nan, 1.0, np.inf])


# --- threshold ---

SELECTED = ("one", "normal", "all-equal", "all-zero", "denormals", "specials", "ascending", "outliers-in-a-constant")


@pytest.mark.parametrize("data", SELECTED)
@pytest.mark.parametrize("samples", [1 << 10, 1 << 14])
def test_threshold_keeps_exactly_the_rank(data: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of short tensors the larger sample is all there is."""
    monkeypatch.setattr(room("select"), "_SAMPLES", samples)
    monkeypatch.setattr(room("select"), "BLOCK", 4096)
    values = test_ops.SELECTION[data][:20_001]
    n = len(values)
    ranks = sorted({-3, 0, 1, n // 5, n - 1, n})
    tensors = Tensors([(values, "F32")] * len(ranks))
    (cuts,) = kernels.threshold([[tensors.inputs]], [ranks], Run())
    for k, cut in zip(ranks, cuts, strict=True):
        test_ops.check_cut(cut, values, k)


@pytest.mark.parametrize("skew", [0, 4])
def test_threshold_of_deltas_is_exact(skew: int, provider: ModuleType) -> None:
    test_ops.test_threshold_of_deltas_does_not_depend_on_the_run(provider, Run(), skew)


def test_discrete_deltas_are_read_once_and_others_twice(launched: list[str]) -> None:
    rng = np.random.default_rng(12)
    smooth = rng.standard_normal(40_000).astype(np.float32)
    discrete = np.round(smooth * 16) / 16
    for values, expected in ((discrete, ["tally", "place"]), (smooth, ["census", "census"])):
        launched.clear()
        tensors = Tensors([(values, "F32")])
        ((cut,),) = kernels.threshold([[tensors.inputs]], [(8000,)], Run())
        test_ops.check_cut(cut, values, 8000)
        assert launched == [f"{name}_kernel" for name in ["sample", *expected]]


# --- gram and norms ---


@pytest.mark.parametrize("with_base", [False, True], ids=["weights", "deltas"])
def test_gram_is_that_of_the_oracle(with_base: bool) -> None:
    test_ops.test_gram_is_that_of_the_oracle(kernels, with_base, 4)


@pytest.mark.parametrize(("models", "count"), [(1, 1), (2, 0), (2, 17), (5, 129), (17, 300)])
def test_gram_of_any_number_of_models_and_elements(models: int, count: int) -> None:
    test_ops.test_gram_of_any_number_of_models_and_elements(kernels, models, count)


def test_a_sum_of_many_programs_is_that_of_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room("measure"), "_SPAN", 2)
    test_ops.test_gram_is_that_of_the_oracle(kernels, True, 0)
    test_ops.test_norms_are_those_of_the_oracle(kernels, Keep.BERNOULLI, True)


# --- many tensors ---


def test_many_small_tensors_take_few_launches(launched: list[str]) -> None:
    """And each comes out as it does alone."""
    rng = np.random.default_rng(13)
    many = [Tensors([(rng.integers(-9, 10, n) / 8, "BF16")] * 2, (np.zeros(n), "BF16")) for n in range(8, 200, 8)]
    inputs = [tensors.inputs for tensors in many]
    sweeps = [Sweep((Part(0.1 * i, key=i), Part(-1.0, cut=2**31)), Keep.BERNOULLI) for i in range(len(many))]
    outputs = [Memory(2 * each.elements) for each in inputs]
    targets = [[Target("BF16", output.address)] for output in outputs]
    ranks = [(each.elements // 2, each.elements // 3) for each in inputs]

    def counted(op: str, *args: object) -> list[object]:
        launched.clear()
        found: list[object] = getattr(kernels, op)(*args, Run())
        assert 1 <= len(launched) <= 3, f"{op}: {launched}"
        return found

    merged = counted("merge", inputs, [[sweep] for sweep in sweeps], targets)
    grams, norms = counted("gram", inputs), counted("norms", inputs, sweeps)
    cuts = counted("threshold", [[each] for each in inputs], ranks)
    for i in (0, 7, len(many) - 1):
        (alone,), found = merge(kernels, many[i], [sweeps[i]], ["BF16"])
        np.testing.assert_array_equal(outputs[i].bytes, alone)
        assert merged[i] == found
        np.testing.assert_array_equal(grams[i], kernels.gram([inputs[i]], Run())[0])
        np.testing.assert_array_equal(norms[i], kernels.norms([inputs[i]], [sweeps[i]], Run())[0])
        assert cuts[i] == kernels.threshold([[inputs[i]]], [ranks[i]], Run())[0]


def test_threads_do_not_disturb_one_another() -> None:
    rng = np.random.default_rng(14)
    many = [Tensors([(rng.standard_normal(3000), "F32")] * 2) for _ in range(8)]
    expected = [kernels.gram([tensors.inputs], Run())[0].tolist() for tensors in many]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda tensors: kernels.gram([tensors.inputs], Run())[0].tolist(), many)
        assert list(found) == expected


def test_odd_sizes_share_a_launch_for_their_last_elements(launched: list[str]) -> None:
    many = [Tensors([(np.ones(n), "F32")]) for n in range(60, 100)]
    outputs = [Memory(4 * tensors.inputs.elements) for tensors in many]
    targets = [[Target("F32", output.address)] for output in outputs]
    kernels.merge([tensors.inputs for tensors in many], [[test_ops.PLAIN]] * len(many), targets, Run())
    assert len(launched) == 2
    for output in outputs:
        output.check_guards()
        assert (decode(output.bytes, "F32") == 1).all()


def test_a_program_of_several_blocks_leaves_none_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room("tables"), "PROGRAMS", 3)
    sizes = (10_000, 3, 2500)
    many = [Tensors([(np.arange(n) % 251, "F32")]) for n in sizes]
    outputs = [Memory(4 * n) for n in sizes]
    targets = [[Target("F32", output.address)] for output in outputs]
    kernels.merge([tensors.inputs for tensors in many], [[test_ops.PLAIN]] * len(many), targets, Run())
    for n, output in zip(sizes, outputs, strict=True):
        np.testing.assert_array_equal(decode(output.bytes, "F32"), np.arange(n) % 251)


def test_memory_that_an_op_lacks_is_what_python_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = Tensors([(np.ones(9), "F32")])

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryError, match="Tried to allocate 2 GiB"):
        kernels.gram([tensors.inputs], Run())


def test_the_last_of_more_than_two_billion_elements_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the others: the interpreter would take hours."""
    tables, count = room("tables"), 2**31 + 2007

    class LastProgram(tables.Table):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            self.words[:2] = self.words[2 * self.programs - 2 : 2 * self.programs].clone()
            self.programs = 1

    monkeypatch.setattr(room("merging"), "Table", LastProgram)
    mapped = [np.memmap(tmp_path / name, np.int16, "w+", shape=count) for name in ("model", "merged")]  # sparse
    model, merged = mapped
    model[-1000:] = np.arange(1000)
    model[-500] = 0x7FC0  # NaN
    inputs = Inputs(count, (View(model.ctypes.data, "BF16"),))
    (found,) = kernels.merge([inputs], [[test_ops.PLAIN]], [[Target("BF16", merged.ctypes.data)]], Run())
    assert found == Found((1,), (count - 500,), (0,))
    np.testing.assert_array_equal(merged[-2000:], model[-2000:])


# --- memory and streams ---


def test_bytes_go_to_the_device_and_come_back() -> None:
    device = kernels.device(0)
    stream = device.stream()
    memory, pinned = device.allocate(10_000), device.pin(3000)
    assert memory % 256 == 0
    at = memory_at(pinned, 3000)
    assert (at == 0xFF).all()
    at[:1000] = np.arange(1000) % 253
    device.upload(memory + 77, pinned, 1000, stream)
    device.download(pinned + 1500, memory + 76, 1002, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(at[1500:2502], [0xFF, *(np.arange(1000) % 253), 0xFF])
    assert (at[2502:] == 0xFF).all()
    assert device.free_bytes() > 0
    for give_back, handle in ((device.release, memory), (device.unpin, pinned), (device.close, stream)):
        give_back(handle)


def memory_at(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def test_streams_are_told_apart() -> None:
    device = kernels.device(0)
    assert device.stream() != device.stream()


def test_memory_that_is_not_there_is_an_error() -> None:
    device = kernels.device(0)
    for take in (device.allocate, device.pin):
        with pytest.raises(MemoryError, match="has no 1152921504606846976 bytes left"):
            take(1 << 60)


# --- without a GPU ---


def test_without_a_gpu_triton_says_why_it_is_out() -> None:
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("a GPU is here")
    code = "from fastmerge.kernels import provider; print(provider.devices(), provider.why_not())"
    ended = subprocess.run([sys.executable, "-c", code], env=compiling(), capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("0 torch sees no GPU")


def compiling() -> dict[str, str]:
    """The environment of a process in which kernels are not interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


# --- compiled ahead of time, by the launches themselves ---

NVIDIA = (80, 90, 100)
AMD = "gfx942"
COMPILE = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from fastmerge.kernels import device, measure, merging, select
from fastmerge.methods import METHODS, Base, Measured, Settings, ranks
from fastmerge.sweep import Cut, Inputs, Keep, Run, Target, View

class Card:  # what a launch asks before it compiles
    get_current_target = staticmethod(lambda: GPUTarget(*json.loads(sys.argv[1])))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def compile_only(kernel, grid):
    kernel.device_caches.clear()  # else methods that are one kernel would be compiled once
    return lambda *args, **kwargs: built.append(kernel.warmup(*args, grid=grid, **kwargs))

def done(name):
    for each in built:
        print("@" + json.dumps({"name": name, "ptx": each.asm.get("ptx", "")}), flush=True)
    built.clear()

def inputs(models, has_base):  # never read: nothing is launched
    views = tuple(View(4096 * (1 + i), "BF16") for i in range(models + has_base))
    return Inputs(1 << 20, views[:models], views[models] if has_base else None)

def sweep_of(method):  # by its defaults, of as many models as it takes, at most three
    models = min(3, method.models[1] or 3)
    given = {"weight": 0.3, "t": 0.3, "density": 0.5, "scale": 0.5}
    settings = Settings(
        {p.name: given.get(p.name, p.default) for p in method.parameters if not p.per_model},
        tuple({p.name: given.get(p.name, p.default) for p in method.parameters if p.per_model} for _ in range(models)),
        tuple(range(models)),
    )
    gram = [[1.0 if i == j else 0.5 for j in range(models)] for i in range(models)]
    cuts = (Cut(0.5, 9),) * len(ranks(settings, 100) if method.selects else ())
    return method.sweep(settings, Measured(cuts, gram))

def job(sweeps, has_base):
    targets = [Target("BF16", 65536 * (1 + k)) for k in range(len(sweeps))]
    return merging.Job(inputs(len(sweeps[0].parts), has_base), sweeps, targets)

built = []
driver.set_active(Card())
JITFunction.__getitem__ = compile_only
device.INTERPRETED = True  # the host's memory stands for the device's
torch.empty = torch.zeros
host = torch.device("cpu")
sweeps = {name: sweep_of(method) for name, method in METHODS.items() if not method.direct}
for name, sweep in sweeps.items():
    merging._sweep([job([sweep], METHODS[name].base is Base.ORIGIN)], False, host)
    done(name)
three = job([sweeps[name] for name in ("task_arithmetic", "ties", "dare_ties")], True)
merging._sweep([three], False, host)
done("three-settings")
merging._sweep([job([sweeps["ties"]], True)], True, host)
done("look")
for models in (2, 3, 4):
    measure.gram_all([inputs(models, models == 3)], Run())
    done(f"gram-{models}")
for name in ("task_arithmetic", "ties", "dare_linear", "breadcrumbs", "nearswap"):
    measure.norms_all([inputs(len(sweeps[name].parts), True)], [sweeps[name]], Run())
    done(f"norms-{name}")
group = select._Group([inputs(3, True)], [5, 6, 7])
select._sample([group], host)
done("sample")
for search in group.searches.values():
    search.guesses = [1]
select._tally([group], host)
done("tally")
select._take_census([group], host)
done("census")
views = [group.tensors[0].models[0], group.tensors[0].base]
select._place([select._Split(select._Asked(group, 0), views, [8, 0, 0, 4096, 8192, 1, 1])], host)
done("place")
"""
FUSED = [name for name, row in METHODS.items() if not row.direct]
NORMS = [f"norms-{name}" for name in ("task_arithmetic", "ties", "dare_linear", "breadcrumbs", "nearswap")]
GRAMS = [f"gram-{models}" for models in (2, 3, 4)]
NAMES = {*FUSED, *NORMS, *GRAMS, "three-settings", "look", "sample", "tally", "census", "place"}
#: Registers of a thread, beyond which a processor has no room for 512 threads, or 384 where so much is summed.
REGISTERS = dict.fromkeys(NAMES, 128) | dict.fromkeys(["three-settings", *NORMS], 168)


Built = dict[str, tuple[str, str]]


@cache
def compiled(folder: Path) -> dict[str | int, Built]:
    """By target what each kernel becomes, its PTX and what ptxas said of it; two targets at a time."""
    targets = [*(("cuda", number, 32) for number in NVIDIA), ("hip", AMD, 64)]
    with ThreadPoolExecutor(2) as pool:
        return {
            target[1]: built
            for target, built in zip(targets, pool.map(compiled_for, targets, [folder] * 4), strict=True)
        }


def compiled_for(target: tuple[str, int | str, int], folder: Path) -> Built:
    environment = {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1", "TRITON_CACHE_DIR": str(folder)}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(target)],
        env=compiling() | environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found, log = {}, ""
    for line in ended.stdout.splitlines():
        if line.startswith("@"):
            job = json.loads(line[1:])
            found[job["name"]], log = (job["ptx"], log), ""
        else:
            log += line + "\n"
    return found


@pytest.fixture
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return compiled(tmp_path_factory.getbasetemp() / "triton")[request.param]


@pytest.mark.parametrize("built", NVIDIA, indirect=True)
def test_every_kernel_compiles_without_spills(built: Built) -> None:
    assert built.keys() == NAMES
    for name, (_, log) in built.items():
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        registers = re.findall(r"Used (\d+) registers", log)
        print(f"{name}: {registers} registers, {spilled} bytes spilled")
        assert spilled
        assert set(spilled) == {"0"}, f"{name} spills"
        assert max(map(int, registers)) <= REGISTERS[name], name


@pytest.mark.parametrize("built", NVIDIA, indirect=True)
def test_tensors_are_read_and_written_16_bytes_at_a_time(built: Built) -> None:
    """What a program reads of its table and writes as its result is one number at a time."""
    for name in NAMES - {"sample", "place"}:
        accesses = set(re.findall(r"\b(?:ld|st)\.global[.\w]*", built[name][0]))
        assert "ld.global.v4.b32" in accesses, name
        assert accesses <= {"ld.global.v4.b32", "ld.global.b64", "st.global.v4.b32", "st.global.b64", "st.global.b32"}


@pytest.mark.parametrize("built", NVIDIA, indirect=True)
def test_no_sweep_is_contracted_or_approximate(built: Built) -> None:
    """Each float32 operation is one of IEEE's, to nearest even, denormals and all."""
    for name in (*FUSED, "three-settings"):
        operations = re.findall(r"\b(?:add|sub|mul|mad|div|fma|rcp|ex2|sqrt)\.[a-z0-9.]*f32(?:x2)?\b", built[name][0])
        operations = {operation.removesuffix("x2") for operation in operations}  # two at a time on the newest
        assert "mul.rn.f32" in operations
        assert operations <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, name


@pytest.mark.parametrize("built", [AMD], indirect=True)
def test_every_kernel_compiles_for_amd(built: Built) -> None:
    assert built.keys() == NAMES


LAUNCH = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastmerge.kernels import device, merging, tables
from fastmerge.sweep import Inputs, Part, Run, Sweep, Target, View

class Card:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)
    class utils:
        load_binary = staticmethod(lambda *binary: (1, 2, 64, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 1 << 17})
        unload_module = staticmethod(lambda module: None)
    class launcher_cls:
        def __init__(self, *made): pass
        def __call__(self, *given):
            given = given[:6] + given[9:]  # without what only profilers look at
            launched.append([each.data_ptr() % 16 if hasattr(each, "data_ptr") else each for each in given])

def run(self, *args, **kwargs):
    compiled.append(self)
    return plainly(self, *args, **kwargs)

launched, compiled, plainly = [], [], JITFunction.run
JITFunction.run = run
driver.set_active(Card())
device.INTERPRETED = True  # the host's memory stands for the device's, but for launches

def sweep(count, dtype):
    inputs = Inputs(count, (View(4096, dtype), View(8192, dtype)))
    merging._sweep([merging.Job(inputs, [Sweep((Part(), Part()))], [Target(dtype, 65536)])], False, torch.device("cpu"))

tables.INTERPRETED = False
for count, dtype in ((1024, "BF16"), (8192, "BF16"), (1024, "BF16"), (1024, "F16")):
    sweep(count, dtype)
assert len(compiled) == 2, "once for each dtype"
again = list(launched)
launched.clear()
tables._COMPILED.clear()
for count, dtype in ((1024, "BF16"), (8192, "BF16"), (1024, "BF16"), (1024, "F16")):
    tables._COMPILED.clear()
    sweep(count, dtype)
assert len(compiled) == 6
assert launched == again, f"{launched} and not as Triton launches it: {again}"
"""


def test_what_is_compiled_is_launched_again_as_triton_does_it() -> None:
    ended = subprocess.run([sys.executable, "-c", LAUNCH], env=compiling(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
