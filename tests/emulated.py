"""The CUDA provider without a card: `_cuda` compiled by g++ against tests/cuda_emulator, once per change of it."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import fastmerge

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tests" / "cuda_emulator"
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno")
#: For a sanitizer, as `make sanitize` has it.
FURTHER = tuple(os.environ.get("EMULATED_FLAGS", "").split())
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")


@cache
def provider() -> ModuleType:
    """A `fastmerge.cuda` of its own, whose kernels run on the emulated device; that of the package is untouched."""
    with in_place_of({"fastmerge._cuda": compiled()}):
        return loaded("fastmerge.cuda", Path(fastmerge.__file__).with_name("cuda.py"))


@contextmanager
def installed() -> Iterator[ModuleType]:
    """`fastmerge.cuda` is the emulated one within the block, also for those that import it."""
    cuda = provider()
    with in_place_of({"fastmerge._cuda": compiled(), "fastmerge.cuda": cuda}):
        yield cuda


@cache
def compiled() -> ModuleType:
    """The test-only `_cuda`."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 not installed")
    includes = [SOURCES, EMULATOR, Path(pybind11.get_include()), Path(sysconfig.get_path("include"))]
    sources = sorted([*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp")])
    # A name of its own: pybind11 answers to one that is imported already with that module, were it built for a card.
    return loaded("emulated._cuda", built("_cuda", sources, includes, ['-DFASTMERGE_VERSION="emulated"']))


def peak() -> int:
    """The most bytes that were held at a time, on all devices and pinned, since this was last asked."""
    library = ctypes.CDLL(str(compiled().__file__))
    library.emulated_peak.restype = ctypes.c_ulonglong
    return int(library.emulated_peak())


def built(name: str, sources: Sequence[Path], includes: Sequence[Path], defines: Sequence[str] = ()) -> Path:
    """A shared library of these sources, built anew when anything it may read has changed."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("no g++ to compile the CUDA emulator with")
    command = [compiler, *FLAGS, *FURTHER, *WARNINGS, *defines, *(f"-I{folder}" for folder in includes)]
    folder = ROOT / "build" / "emulated" / f"{name}-{_digest(sources, command)}"
    library = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # another worker may be at it too
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _build(sources, command, library)
    return library


def _build(sources: Sequence[Path], command: Sequence[str], library: Path) -> None:

    def compile_one(source: Path) -> Path:
        target = library.with_name(f"{source.name}.o")
        _run([*command, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    unfinished = library.with_suffix(".part")
    _run([command[0], "-shared", *FURTHER, *map(str, objects), "-o", str(unfinished)])
    unfinished.rename(library)


def _digest(sources: Sequence[Path], command: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((command, sys.version)).encode())
    headers = [path for folder in (ROOT / "csrc", EMULATOR) for path in folder.rglob("*.h")]
    for path in sorted([*sources, *headers]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def loaded(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with in_place_of({name: module}):
        spec.loader.exec_module(module)
    return module


@contextmanager
def in_place_of(modules: dict[str, ModuleType]) -> Iterator[None]:
    """These modules under their names, in `sys.modules` and in their package."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
            patch.setattr(fastmerge, name.rpartition(".")[2], module, raising=False)
        yield
