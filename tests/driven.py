"""The provider `cpu` in a process of its own: the sources of csrc/cpu compiled as one likes, their inputs sent to a
driver, their outputs fetched."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

import emulated
import numpy as np
from conftest import compiled_core

import fastmerge
from fastmerge.sweep import SWEPT

CPU = emulated.ROOT / "csrc" / "cpu"
BUILD = emulated.ROOT / "build"
OPS = ("merge", "merge_ranked", "gram", "norms", "threshold", "lowrank")
FAULTS = ("", "cut", "stop", "full")
SIZES = [SWEPT[dtype] for dtype in ("F32", "F16", "BF16", "U8")]  # by code


@contextmanager
def provider(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Iterator[ModuleType]:
    """A `fastmerge.native` of its own, whose instruction sets are those of a driver, its core in `_core`; that of the
    package is untouched. The driver ends well, or AssertionError."""
    compiled_core()
    with tempfile.TemporaryFile("a+b") as said:
        core = Core(lambda: subprocess.Popen(command, env=environment, stdin=_PIPE, stdout=_PIPE, stderr=said), said)
        with emulated.in_place_of({"fastmerge._core": cast(ModuleType, core)}):
            yield emulated.loaded("fastmerge.native", Path(fastmerge.__file__).with_name("native.py"))
        core.end()


_PIPE = subprocess.PIPE


class Core:
    """`fastmerge._core`, but that its ops are the driver's. A driver that ends is an AssertionError, with what it said,
    and the next request goes to a new one."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], said: IO[bytes]) -> None:
        self._fault = ""
        self._real = compiled_core()._core
        self._start, self._said = start, said
        self._begun()

    def end(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0, self._ended()

    @contextmanager
    def meeting(self, fault: str) -> Iterator[None]:
        """Ops within the block meet a fault: mapped inputs are "cut" to half before they are read, the tick says
        "stop", or files are on a "full" disk."""
        self._fault = fault
        try:
            yield
        finally:
            self._fault = ""

    def _begun(self) -> None:
        self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self._isas = self._fetch().decode().split()

    def _ended(self) -> str:
        self._said.seek(0)
        return f"the driver ended with {self._process.wait()}\n{self._said.read().decode(errors='replace')}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)  # layouts, and records from Python's objects

    def instruction_sets(self) -> dict[str, str | None]:
        return dict.fromkeys(self._isas)

    def merge(self, rows: Any, views: Any, sweeps: Any, parts: Any, targets: Any, *run: Any) -> Any:
        self._ask("merge", run, rows, views, sweeps, parts, targets)
        return *self._found(targets), []

    def merge_ranked(self, rows: Any, views: Any, sweeps: Any, parts: Any, ranks: Any, targets: Any, *run: Any) -> Any:
        self._ask("merge_ranked", run, rows, views, sweeps, parts, targets, ranks)
        return *self._found(targets), [], *self._cuts()

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
        self._begin("lowrank", isa, threads, 0)
        for array in (np.array([dtype, left.shape[1], rows, width, weights]), left, right, np.array([scaling], "f4")):
            self._send(array)
        self._to.write(ctypes.string_at(weights, rows * width * SIZES[dtype]))
        self._outcome(None)
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
        """A request, from records and a run: (isa, threads, tick), with a tile (and a hash, which the driver has of its
        own) for what sweeps; and its outcome."""
        isa, threads, *tile, tick = run[:4]
        self._begin(op, isa, threads, *(tile or (0,)))
        for array in (rows, views, sweeps, parts, targets, np.array(ranks, np.int64) if len(ranks) else b""):
            self._send(array)
        elements = np.repeat(rows["elements"], rows["inputs"]).tolist()
        for (address, dtype), count in zip(views.tolist(), elements, strict=True):
            self._to.write(ctypes.string_at(address, count * SIZES[dtype]))
        self._outcome(tick)

    def _begin(self, op: str, isa: str, threads: int, tile: int) -> None:
        self._send(np.array([OPS.index(op), self._isas.index(isa), threads, tile, FAULTS.index(self._fault)]))

    def _outcome(self, tick: Callable[[int], None] | None) -> None:
        outcome, read = np.frombuffer(self._fetch(), np.int64).tolist()
        if outcome == -1:
            raise self._real.InputCut("a mapped input was cut while it was read")
        if outcome == -2:
            raise KeyboardInterrupt
        if outcome:
            raise OSError(outcome, os.strerror(outcome))
        if tick:
            tick(read)

    def _found(self, targets: Any) -> tuple[Any, ...]:
        found = tuple(np.frombuffer(self._fetch(), np.int64) for _ in range(3))
        for offset, file, _ in targets.tolist():
            raw = self._fetch()
            if file < 0:
                ctypes.memmove(offset, raw, len(raw))
            else:
                assert os.pwrite(file, raw, offset) == len(raw)
        return found

    def _cuts(self) -> tuple[Any, Any]:
        return np.frombuffer(self._fetch(), np.float32), np.frombuffer(self._fetch(), np.int64)

    def _send(self, array: Any) -> None:
        raw = bytes(array)
        self._to.write(len(raw).to_bytes(8, "little") + raw)

    def _fetch(self) -> bytes:
        with suppress(BrokenPipeError):  # then there is nothing to read either
            self._to.flush()
        return self._read(int.from_bytes(self._read(8), "little"))

    def _read(self, count: int) -> bytes:
        raw = self._from.read(count)
        if len(raw) < count:
            ended = self._ended()
            self._said.truncate(0)
            self._begun()
            raise AssertionError(ended)
        return raw


def built(name: str, compiler: str, flags: Sequence[str], sources: Mapping[str, Sequence[str]]) -> Path:
    """The driver of some sources of csrc/cpu, each with flags of its own, the first of which take longest; built anew
    when anything that it is made of has changed."""
    commands = {
        path: (compiler, "-std=c++17", "-ffp-contract=off", "-fno-math-errno", *flags, *own, "-c", str(path))
        for path, own in {**{CPU / f"{source}.cpp": own for source, own in sources.items()}, _DRIVER: ()}.items()
    }
    digest = hashlib.sha256(repr((list(commands.values()), _run(compiler, "--version"))).encode())
    for path in sorted([*commands, *CPU.parent.glob("*.h"), *CPU.glob("*.h"), *CPU.glob("*.inl")]):
        digest.update(path.read_bytes())
    folder = BUILD / name / digest.hexdigest()[:16]
    if (driver := folder / "driver").exists():
        return driver
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{path.stem}.o" for path in commands]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command, to: _run(*command, "-o", str(to)), commands.values(), objects))
    unfinished = driver.with_suffix(".part")
    _run(compiler, *flags, *map(str, objects), "-pthread", "-o", str(unfinished))
    unfinished.rename(driver)
    return driver


_DRIVER = Path(__file__).with_name("driver.cpp")


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
