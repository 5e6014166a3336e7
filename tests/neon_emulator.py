"""The provider `cpu` on NEON without such a processor: its ops cross-compiled, and run by an emulator of aarch64."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import emulated
import numpy as np
import pytest
from conftest import compiled_core

import fastmerge
from fastmerge.sweep import SWEPT

CPU = emulated.ROOT / "csrc" / "cpu"
DRIVER = Path(__file__).parent / "neon" / "driver.cpp"
SOURCES = (
    DRIVER,
    *(CPU / f"{name}.cpp" for name in ("isa_neon", "lowrank", "measure", "merge", "parallel", "ranked", "select")),
)
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-Werror")
OPS = ("merge", "merge_ranked", "gram", "norms", "threshold", "lowrank")
SIZES = [SWEPT[dtype] for dtype in ("F32", "F16", "BF16", "U8")]  # by code


@contextmanager
def provider() -> Iterator[ModuleType]:
    """A `fastmerge.native` of its own, whose only instruction set is the emulated one; that of the package is
    untouched."""
    if missing := [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]:
        pytest.skip(f"no {' and no '.join(missing)} to compile NEON with and run it")
    compiled_core()
    with subprocess.Popen([EMULATOR, driver()], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        core = cast(ModuleType, Core(process))
        with emulated.in_place_of({"fastmerge._core": core}):
            yield emulated.loaded("fastmerge.native", Path(fastmerge.__file__).with_name("native.py"))


class Core:
    """`fastmerge._core`, but that its ops are the driver's: their inputs are sent to it, their outputs fetched."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._to, self._from = process, process.stdin, process.stdout
        self._real = compiled_core()._core
        self._isa = self._fetch().decode()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)  # layouts, and records from Python's objects

    def instruction_sets(self) -> dict[str, str | None]:
        return {self._isa: None}

    def merge(self, rows: Any, views: Any, sweeps: Any, parts: Any, targets: Any, *run: Any) -> Any:
        self._ask("merge", run, rows, views, sweeps, parts, targets)
        return self._found(targets)

    def merge_ranked(self, rows: Any, views: Any, sweeps: Any, parts: Any, ranks: Any, targets: Any, *run: Any) -> Any:
        self._ask("merge_ranked", run, rows, views, sweeps, parts, targets, ranks)
        return *self._found(targets), *self._cuts()

    def gram(self, rows: Any, views: Any, *run: Any) -> Any:
        self._ask("gram", run, rows, views)
        return np.frombuffer(self._fetch(), np.float64)

    def norms(self, rows: Any, views: Any, sweeps: Any, parts: Any, *run: Any) -> Any:
        self._ask("norms", run, rows, views, sweeps, parts)
        return np.frombuffer(self._fetch(), np.float64)

    def threshold(self, rows: Any, views: Any, ranks: Any, *run: Any) -> Any:
        self._ask("threshold", run, rows, views, ranks=ranks)
        return self._cuts()

    def lowrank(
        self, weights: int, dtype: int, left: Any, right: Any, scaling: float, out: Any, isa: str, threads: int
    ) -> None:
        rows, width = out.shape
        self._send(np.array([OPS.index("lowrank"), threads, 0]))
        self._send(np.array([dtype, left.shape[1], rows, width, weights]))
        self._send(ctypes.string_at(weights, rows * width * SIZES[dtype]))
        for array in (left, right, np.array([scaling], np.float32)):
            self._send(array)
        out[:] = np.frombuffer(self._fetch(), np.float32).reshape(rows, width)

    def _ask(
        self,
        op: str,
        run: Sequence[Any],
        rows: Any,
        views: Any,
        sweeps: Any = b"",
        parts: Any = b"",
        targets: Any = b"",
        ranks: Any = b"",
    ) -> None:
        """A request, from records and a run: (isa, threads, tile, tick), or without a tile."""
        self._send(np.array([OPS.index(op), run[1], run[2] if len(run) == 4 else 0]))
        for array in (rows, views, sweeps, parts, targets, ranks):
            self._send(array)
        elements = np.repeat(rows["elements"], rows["inputs"]).tolist()
        for (address, dtype), count in zip(views.tolist(), elements, strict=True):
            self._to.write(ctypes.string_at(address, count * SIZES[dtype]))

    def _found(self, targets: Any) -> tuple[Any, ...]:
        found = tuple(np.frombuffer(self._fetch(), np.int64) for _ in range(3))
        for address in targets["offset"].tolist():
            raw = self._fetch()
            ctypes.memmove(address, raw, len(raw))
        return found

    def _cuts(self) -> tuple[Any, Any]:
        return np.frombuffer(self._fetch(), np.float32), np.frombuffer(self._fetch(), np.int64)

    def _send(self, array: Any) -> None:
        raw = bytes(array)
        self._to.write(len(raw).to_bytes(8, "little") + raw)

    def _fetch(self) -> bytes:
        self._to.flush()
        return self._read(int.from_bytes(self._read(8), "little"))

    def _read(self, count: int) -> bytes:
        raw = self._from.read(count)
        assert len(raw) == count, f"the driver ended with {self._process.wait()}"
        return raw


def driver() -> Path:
    """The driver, built anew when anything that it is made of has changed."""
    digest = hashlib.sha256(repr((FLAGS, _run(COMPILER, "--version"))).encode())
    for path in sorted([*SOURCES, *(CPU.parent).glob("*.h"), *CPU.glob("*.h"), *CPU.glob("*.inl")]):
        digest.update(path.read_bytes())
    folder = emulated.ROOT / "build" / "neon" / digest.hexdigest()[:16]
    built = folder / "driver"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run(COMPILER, *FLAGS, "-c", str(source), "-o", str(target))
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES, key=lambda source: source.stem != "isa_neon")))
    unfinished = built.with_suffix(".part")
    _run(COMPILER, "-static", *map(str, objects), "-o", str(unfinished))
    unfinished.rename(built)
    return built


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
