"""The Triton kernels without a GPU: in the interpreter, bit for bit, and compiled ahead of time for three of them."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import test_engine
import test_ops
import torch
from conftest import Memory, Tensors, bits, merge
from test_ops import (  # noqa: F401  run here by the provider of this file
    test_a_dropped_nan_is_gone_and_a_trimmed_one_stays,
    test_a_file_that_cannot_be_written_is_an_error,
    test_a_mass_of_zero_counts_as_one,
    test_a_nan_is_never_outvoted,
    test_a_vote_of_zero_elects_as_asked,
    test_bytes_are_copied,
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
)

from fastmerge import backends, reference
from fastmerge.errors import BackendError, CheckpointError
from fastmerge.methods import METHODS, Base, Measured, Method, Settings
from fastmerge.sweep import Cut, Found, Inputs, Keep, Part, Run, Sweep, Target, View

# Triton decides when it is imported, for good, whether kernels are interpreted.
with pytest.MonkeyPatch.context() as _environment:
    _environment.setenv("TRITON_INTERPRET", "1")
    kernels = pytest.importorskip("fastmerge.kernels.provider", reason="triton not installed", exc_type=ImportError)

# The interpreter computes in numpy, which warns of what the kernels define: overflow, and NaN in a comparison.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def provider() -> ModuleType:
    return kernels


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_the_kernels_are_interpreted() -> None:
    merging = importlib.import_module("fastmerge.kernels.merging")
    assert type(merging.sweep_kernel).__name__ == "InterpretedFunction"
    assert backends.provider("triton") is kernels


# --- in the interpreter ---


def sampled() -> Iterator[test_ops.Case]:
    """Each combination of stages once, short, with few models; the interpreter takes milliseconds per block."""
    seen = set()
    for case in test_ops.cases():
        models = len(case.dtypes) - case.has_base
        if case.stages[0] not in seen and case.elements <= 2049 and models <= 5:
            seen.add(case.stages[0])
            yield case


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


@pytest.mark.parametrize("begin", [0, 8 * 12_345, 2**33 + 2**20], ids=["start", "middle", "beyond-32-bits"])
def test_a_random_drop_is_decided_to_its_last_bit(begin: int) -> None:
    """One below the cut stays, and what equals it goes: the first 16 bits tie, and the second draw decides."""
    merging = importlib.import_module("fastmerge.kernels.merging")
    key, values = 0xFEDCBA9876543210, torch.arange(1.0, 1001.0)
    drawn = reference._random(key, begin, len(values))
    for place in (0, 7, 500):
        for above, kept in ((0, False), (1, True)):
            sweep = Sweep((Part(cut=int(drawn[place]) + above, key=key),), Keep.BERNOULLI)
            merged = torch.full_like(values, torch.nan)
            merging.sweep([values], False, [sweep], [merged], begin)
            assert (merged[place] != 0) == kept
            torch.testing.assert_close(merged, reference.sweep_tile([values], None, sweep, begin), rtol=0, atol=0)


def test_an_odd_element_is_found_in_any_tile() -> None:
    model, base = np.ones(5000), np.zeros(5000)
    model[[2500, 2501, 4999]] = np.nan, np.inf, 3e38
    base[[5, 4000]] = np.inf, np.nan
    tensors = Tensors([(model, "F32"), (np.ones(5000), "F16")], (base, "F32"))
    for run in (Run(), Run(tile=2048), Run(tile=1001)):
        _, found = merge(kernels, tensors, [Sweep((Part(), Part()))] * 2, ["F32", "F16"], run)
        assert found == Found((2, 0, 2), (2500, -1, 5), (0, 1))


@pytest.mark.parametrize("data", ["one", "normal", "all-equal", "all-zero", "denormals", "specials", "few-values"])
def test_threshold_keeps_exactly_the_rank(data: str) -> None:
    test_ops.test_threshold_keeps_exactly_the_rank(kernels, data)


@pytest.mark.parametrize("run", [Run(tile=2048), Run(tile=30_000), Run()], ids=str)
def test_threshold_of_deltas_does_not_depend_on_the_run(run: Run) -> None:
    test_ops.test_threshold_of_deltas_does_not_depend_on_the_run(kernels, run, 1)


@pytest.mark.parametrize("with_base", [False, True], ids=["weights", "deltas"])
def test_gram_is_that_of_the_oracle(with_base: bool) -> None:
    test_ops.test_gram_is_that_of_the_oracle(kernels, with_base, 1)


@pytest.mark.parametrize(("models", "count"), [(1, 1), (2, 0), (2, 17), (5, 129), (17, 300)])
def test_gram_of_any_number_of_models_and_elements(models: int, count: int) -> None:
    test_ops.test_gram_of_any_number_of_models_and_elements(kernels, models, count)


def test_gram_and_norms_do_not_depend_on_the_run() -> None:
    tensors, _ = test_ops.measured_tensors(0, True)
    sweep = Sweep((Part(magnitude=0.1),) * 3, Keep.ABOVE)
    assert len({kernels.gram([tensors.inputs], run)[0].tobytes() for run in test_ops.RUNS}) == 1
    assert len({kernels.norms([tensors.inputs], [sweep], run)[0].tobytes() for run in test_ops.RUNS}) == 1


def test_ticks_add_up_to_the_bytes_of_the_inputs() -> None:
    tensors, output = test_ops.measured_tensors(0, True)[0], Memory(4 * 5000)
    sweep = Sweep((Part(),) * 3)
    ops = {
        "merge": lambda run: kernels.merge([tensors.inputs], [[sweep]], [[Target("F32", output.address)]], run),
        "gram": lambda run: kernels.gram([tensors.inputs], run),
        "norms": lambda run: kernels.norms([tensors.inputs], [sweep], run),
        "threshold": lambda run: kernels.threshold([[tensors.inputs]], [(1, 500, 2000)], run),
    }
    for name, op in ops.items():
        ticks: list[int] = []
        op(Run(tile=2048, tick=ticks.append))
        assert sum(ticks) == tensors.nbytes, name


def test_an_input_that_was_cut_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        values = np.frombuffer(mapped, np.float32)
        inputs, output = Inputs(len(values), (View(values.ctypes.data, "F32"),)), Memory(values.nbytes)
        os.truncate(path, mmap.PAGESIZE)
        with pytest.raises(CheckpointError, match="became shorter"):
            kernels.merge([inputs], [[Sweep((Part(),))]], [[Target("F32", output.address)]], Run())
        del values


@pytest.mark.parametrize("recipe", test_engine.RECIPES)
def test_a_merge_from_disk_has_the_bytes_of_the_reference(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = {name: shape for name, shape in test_engine.SHAPES.items() if name != "model.wide.weight"}
    for name, tensors in test_engine.family(torch.bfloat16, shapes).items():
        test_engine.save(name, tensors)
    text = test_engine.RECIPES[recipe]
    expected = test_engine.raw(test_engine.merged(text, "torch", backend="torch"))
    assert test_engine.raw(test_engine.merged(text, "triton", backend="triton")) == expected


# --- the choice ---


def test_triton_is_never_chosen_unasked() -> None:
    assert backends.choose("auto", {"BF16"}) is not kernels
    assert backends.choose("triton", {"BF16"}) is kernels
    with pytest.raises(BackendError, match="triton takes BF16, F16, F32, U8"):
        backends.choose("triton", {"F64"})


def test_without_a_gpu_triton_says_why_it_is_out() -> None:
    if torch.cuda.is_available() or torch.xpu.is_available():
        pytest.skip("a GPU is here")
    code = "from fastmerge import backends; print(backends.why_not('triton'))"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip().startswith("torch sees no GPU")


# --- compiled ahead of time ---

TARGETS = (80, 90, 100)
COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastmerge.kernels import measure, merging, select, stages

def compiled(kernel, signature, constants, target, warps=stages.WARPS):
    # what a launch on tensors of torch promises: pointers and counts that 16 divides
    signature = signature | dict.fromkeys(constants, "constexpr")
    aligned = [
        (i, *rest)
        for i, kind in enumerate(signature.values()) if kind != "constexpr"
        for rest in ([(j,) for j in range(len(kind))] if isinstance(kind, tuple) else [()])
    ]
    source = ASTSource(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)

target, jobs = int(sys.argv[1]), json.loads(sys.argv[2])
tables = {"numbers": "*fp32", "wholes": "*i64"}
for name, choice, models, has_base in jobs:
    inputs = models + has_base
    pointers = {"inputs": ("*bf16",) * inputs}
    shared = {"models": models, "has_base": has_base, "block": stages.block_of(inputs)}
    selection = shared | {"block": select.BLOCK}
    if name == "gram":
        built = compiled(measure.gram_kernel, pointers | {"sums": "*fp64", "count": "i32"}, shared, target)
    elif name == "norms":
        signature = pointers | {"sums": "*fp64", "wholes": "*i64", "begin": "i64", "count": "i32"}
        built = compiled(measure.norms_kernel, signature, {"how": choice} | shared, target)
    elif name == "histogram":
        signature = pointers | {"counts": "*i32", "prefixes": "*i64", "count": "i32"}
        built = compiled(select.histogram_kernel, signature, {"shift": choice} | selection, target, select.WARPS)
    elif name == "equals":
        signature = pointers | {"counts": "*i32", "magnitudes": "*i64", "count": "i32"}
        built = compiled(select.equals_kernel, signature, selection, target, select.WARPS)
    else:
        choice = tuple(map(tuple, choice))
        signature = pointers | {"outputs": ("*bf16",) * len(choice)} | tables
        signature |= {"flag": "*i32", "begin": "i64", "count": "i32"}
        built = compiled(merging.sweep_kernel, signature, {"stages": choice} | shared, target)
    print("@" + json.dumps({"name": name, "ptx": built.asm["ptx"]}), flush=True)
"""


def sweep_of(method: Method) -> Sweep:
    """A method's sweep by its defaults, of as many models as it takes, at most three."""
    models = min(3, method.models[1] or 3)
    given = {"weight": 0.3, "t": 0.3, "density": 0.5, "scale": 0.5}
    settings = Settings(
        {p.name: given.get(p.name, p.default) for p in method.parameters if not p.per_model},
        tuple({p.name: given.get(p.name, p.default) for p in method.parameters if p.per_model} for _ in range(models)),
        tuple(range(models)),
    )
    return method.sweep(settings, Measured((Cut(0.5, 9),) * models, ((1.0, 0.5), (0.5, 1.0)) if method.gram else ()))


def jobs() -> list[tuple[str, object, int, bool]]:
    """What is compiled: name, stages, models, whether there is a base; every method, and every other kernel."""
    merging = importlib.import_module("fastmerge.kernels.merging")
    sweeps = {name: sweep_of(method) for name, method in METHODS.items()}
    found: list[tuple[str, object, int, bool]] = [
        (name, merging.stages_of([sweep]), len(sweep.parts), METHODS[name].base is Base.ORIGIN)
        for name, sweep in sweeps.items()
    ]
    three = [sweeps[name] for name in ("task_arithmetic", "ties", "dare_ties")]
    return [
        *found,
        ("three-settings", merging.stages_of(three), 3, True),
        ("gram", None, 3, True),
        *(("norms", int(keep), 3, True) for keep in (Keep.ABOVE,)),
        ("histogram", 20, 3, True),
        ("equals", None, 3, True),
    ]


@cache
def compiled(target: int, folder: Path) -> dict[str, tuple[str, str]]:
    """The PTX of each job, and what ptxas said of it; in a process where the kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1", "TRITON_CACHE_DIR": str(folder)}
    ended = subprocess.run(
        [sys.executable, "-c", COMPILE, str(target), json.dumps(jobs())],
        env=environment,
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


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spills(target: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    built = compiled(target, tmp_path_factory.getbasetemp() / "triton")
    assert built.keys() == {name for name, *_ in jobs()}
    for name, (_, log) in built.items():
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        registers = re.findall(r"Used (\d+) registers", log)
        print(f"sm_{target} {name}: {registers} registers, {spilled} bytes spilled")
        assert spilled
        assert set(spilled) == {"0"}, f"{name} spills"
        if name != "histogram":  # Triton's own, which took 181 before 3.9
            assert max(map(int, registers)) <= 128, f"{name} leaves room for less than 512 threads on a processor"


@pytest.mark.parametrize("target", TARGETS)
def test_no_sweep_is_contracted_or_approximate(target: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each float32 operation is one of IEEE's, to nearest even, denormals and all."""
    built = compiled(target, tmp_path_factory.getbasetemp() / "triton")
    for name in (*METHODS, "three-settings"):
        operations = re.findall(r"\b(?:add|sub|mul|mad|div|fma|rcp|ex2|sqrt)\.[a-z0-9.]*f32(?:x2)?\b", built[name][0])
        operations = {operation.removesuffix("x2") for operation in operations}  # two at a time on the newest
        assert "mul.rn.f32" in operations
        assert operations <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}, name
