"""The hashes of outputs: those of their bytes in the files, whoever writes them, in whatever tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import xxhash
from conftest import SIZES, Tensors, compiled_core
from recorded import hashes, merged, models, tree
from test_ranked import LARGE, OPEN, core, deltas, sweep, tensors_of  # noqa: F401  core is a fixture

from fastmerge import provenance
from fastmerge.checkpoint import hashing
from fastmerge.sweep import Found, Keep, Part, Run, Sweep, Target


@pytest.fixture
def function() -> int:
    if not (address := hashing.function()):
        pytest.skip("this xxhash shows no function to compiled code")
    return address


@pytest.mark.parametrize("count", [0, 1, hashing.PIECE - 1, hashing.PIECE, hashing.PIECE + 1, 5 * hashing.PIECE + 7])
def test_it_is_that_of_the_hashes_of_the_pieces(count: int) -> None:
    data = np.random.default_rng(count).bytes(count)
    assert hashing.hash_of([memoryview(data)]).hex() == tree(data)
    halves = [data[: 2 * hashing.PIECE], data[2 * hashing.PIECE :]]
    assert hashing.hash_of(map(memoryview, halves)).hex() == tree(data)


class _Changed:
    """A library whose function answers something else, or that has none."""

    def __init__(self, *names: str) -> None:
        for name in names:
            setattr(self, name, lambda asked, count: hashing._Hash128(low=count, high=7))


@pytest.mark.parametrize("names", [(), ("XXH3_128bits",), ("XXH3_128bits_dispatch", "XXH3_128bits")], ids=str)
def test_a_function_that_is_another_is_not_used(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda path: _Changed(*names))
    assert hashing.function.__wrapped__() == 0


# --- by the compiled core ---


def into_file(
    native: ModuleType,
    path: Path,
    tensors: Sequence[Tensors],
    dtypes: Sequence[str],
    run: Run,
    ranks: Sequence[int] = (),
    kind: str = "",
) -> list[Found]:
    """The merge of some tensors for a setting per dtype, one output after another, some bytes apart."""
    targets, place = [], 5
    with path.open("wb+") as file:
        for each in tensors:
            targets.append([])
            for dtype in dtypes:
                targets[-1].append(Target(dtype, place, file.fileno()))
                place += each.inputs.elements * SIZES[dtype] + 3
        inputs = [each.inputs for each in tensors]
        if ranks:
            sweeps = [[sweep((OPEN,) * 3, 1 / (k + 1)) for k in range(len(dtypes))]] * len(tensors)
            _, found = native.merge_ranked(inputs, sweeps, [ranks] * len(tensors), targets, run)
        else:
            parts = tuple(Part(0.5 + m, cut=2**31, key=m) for m in range(len(inputs[0].models)))
            keep = Keep.BERNOULLI if kind == "random" else Keep.ALL
            sweeps = [[Sweep(parts, keep, lambda_=1 / (k + 1)) for k in range(len(dtypes))]] * len(tensors)
            found = native.merge(inputs, sweeps, targets, run)
    raw = path.read_bytes()
    for each, outputs, one in zip(tensors, targets, found, strict=True):
        ends = [target.offset + each.inputs.elements * SIZES[target.dtype] for target in outputs]
        expected = [tree(raw[target.offset : end]) for target, end in zip(outputs, ends, strict=True)]
        assert [hash.hex() for hash in one.hashes] == expected
    return found


def test_every_instruction_set_hashes_what_it_writes(core: ModuleType, tmp_path: Path, function: int) -> None:  # noqa: F811
    tensors = [tensors_of("normal", count, "BF16") for count in (1, 2048, 16384, 70_001, 300_000)]
    into_file(core, tmp_path / "out", tensors, ["BF16"], Run(2, hash=function))


@pytest.mark.parametrize("tile", [0, 1, 5000, 40_000])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtypes", [["F32"], ["F16", "F32", "BF16"], ["BF16"] * 9], ids=["F32", "mixed", "nine"])
def test_tiles_threads_and_settings_do_not_matter(
    tmp_path: Path, function: int, tile: int, threads: int, dtypes: list[str]
) -> None:
    tensors = [tensors_of("normal", count, "BF16") for count in (1, 16_385, 200_003)]
    into_file(compiled_core(), tmp_path / "out", tensors, dtypes, Run(threads, tile, hash=function), kind="random")


@pytest.mark.parametrize("count", [1, 32768, 1_000_003])
def test_bytes_that_are_copied(tmp_path: Path, function: int, count: int) -> None:
    data = np.random.default_rng(3).integers(0, 256, count, np.uint8)
    into_file(compiled_core(), tmp_path / "out", [Tensors([(data, "U8")])], ["U8"], Run(2, 70_000, hash=function))


@pytest.mark.parametrize("kind", ["normal", "sorted", "mostly-zero", "halves", "equal", "not-finite"])
@pytest.mark.parametrize("dtypes", [["BF16"], ["F32", "BF16"]], ids="+".join)
def test_what_is_swept_again_is_hashed_again(tmp_path: Path, function: int, kind: str, dtypes: list[str]) -> None:
    tensors = [tensors_of(kind, count, "BF16") for count in (LARGE, 999)]
    ranks = [LARGE // 5, LARGE // 3, LARGE // 2]
    into_file(compiled_core(), tmp_path / "out", tensors, dtypes, Run(2, hash=function), ranks)


def test_a_tensor_without_elements_has_the_hash_of_nothing(tmp_path: Path, function: int) -> None:
    into_file(compiled_core(), tmp_path / "out", [Tensors([(np.zeros(0), "F32")])], ["F32"], Run(hash=function))


def test_what_overflows_is_hashed_as_it_is_written(tmp_path: Path, function: int) -> None:
    values = np.linspace(-60000, 60000, 50_000)
    values[77] = np.nan
    (found,) = into_file(
        compiled_core(), tmp_path / "out", [Tensors([(values, "F32")] * 3)], ["F16"], Run(2, hash=function)
    )
    assert found.overflow[0] > 0
    assert found.nonfinite == (1, 1, 1)


def test_nothing_is_hashed_unasked_or_in_memory(function: int) -> None:
    native, tensors = compiled_core(), tensors_of("normal", 5000, "BF16")
    out = np.zeros(5000, np.uint16)
    arguments = [tensors.inputs], [[Sweep((Part(),) * 3)]], [[Target("BF16", out.ctypes.data)]]
    assert native.merge(*arguments, Run())[0].hashes == ()
    with pytest.raises(ValueError, match="goes to a file"):
        native.merge(*arguments, Run(hash=function))


# --- in whole merges ---


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("seen", [True, False], ids=["while hot", "read back"])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_records_have_the_hashes_of_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, seen: bool, method: str
) -> None:
    if backend == "cpu":
        compiled_core()
    monkeypatch.chdir(tmp_path)
    if not seen:
        monkeypatch.setattr(hashing, "function", lambda: 0)
    models("base", "a", "b")
    base = "base_model: base\n" if method != "linear" else ""
    given = "[model: base, model: a]" if method == "slerp" else "[model: a, model: b]"
    parameters = "{t: 0.3}" if method == "slerp" else "{weight: 0.5}"
    merged(f"merge_method: {method}\n{base}models: {given}\nparameters: {parameters}\n", backend=backend)
    record = provenance.read("out")
    assert {name: tensor.hash for name, tensor in record.tensors.items()} == hashes(Path("out"))


def test_a_merge_hashes_hot_and_reads_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: int
) -> None:
    compiled_core()
    monkeypatch.chdir(tmp_path)
    models("base", "a", "b")
    monkeypatch.setattr("fastmerge.checkpoint.writer.hash_in_file", lambda *place: pytest.fail("read back"))
    merged("merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n", backend="cpu")


def test_the_library_answers_as_its_python() -> None:
    if not (address := hashing.function()):
        pytest.skip("this xxhash shows no function to compiled code")
    import ctypes

    call = ctypes.CFUNCTYPE(hashing._Hash128, ctypes.c_char_p, ctypes.c_size_t)(address)
    for count in (0, 3, 17, 200, 1000, hashing.PIECE):
        data = np.random.default_rng(count).bytes(count)
        found = call(data, count)
        assert (found.high << 64 | found.low) == xxhash.xxh3_128_intdigest(data)
