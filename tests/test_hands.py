"""Threads that wait for work between calls of the core: how many, after a fork, whose signals are not theirs, and what
becomes of a call where memory runs out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastmerge.native", reason="compiled core not built", exc_type=ImportError)
pytestmark = pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="needs /proc, where threads can be counted"
)

_MERGING = """
import os
import numpy as np
from fastmerge import native
from fastmerge.methods import METHODS
from fastmerge.sweep import Inputs, Part, Run, Sweep, Target, View

models = np.arange(3 * 100_000, dtype=np.float32).reshape(3, -1)

def merged(threads):
    out = np.full(models.shape[1], np.nan, np.float32)
    inputs = Inputs(out.size, tuple(View(model.ctypes.data, "F32") for model in models))
    sweep = Sweep(tuple(Part(0.25) for _ in models))
    native.merge([inputs], [[sweep]], [[Target("F32", out.ctypes.data)]], Run(threads, tile=2048))
    return out

def threads():
    return os.listdir("/proc/self/task")

started = len(threads())
assert (merged(1) == models.sum(0) / 4).all()
assert len(threads()) == started
"""


def _printed(code: str) -> str:
    # The threads of the linear algebra that numpy brings would be counted.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _MERGING + code]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=environment)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_calls_share_their_threads() -> None:
    """One beside the caller's for two; and never more that wait than processors, however many a call was given."""
    code = """
for _ in range(300):
    assert (merged(2) == models.sum(0) / 4).all()
print(len(threads()) - started, end=" ")
merged(40)
while len(threads()) - started > os.cpu_count():  # those that leave have to come to it
    pass
print("and", (merged(40) == models.sum(0) / 4).all())
"""
    assert _printed(code) == "1 and True\n"


def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """
merged(3)
child = os.fork()
if not child:
    same = (merged(3) == models.sum(0) / 4).all()
    os._exit(0 if same and len(threads()) > 1 else 1)
print(os.waitpid(child, 0)[1], (merged(3) == models.sum(0) / 4).all())
"""
    assert _printed(code) == "0 True\n"


def test_signals_are_not_for_threads_that_wait() -> None:
    code = """
before = set(threads())
merged(2)
(hand,) = set(threads()) - before
lines = open(f"/proc/self/task/{hand}/status").read().splitlines()
(blocked,) = (line.split()[1] for line in lines if line.startswith("SigBlk"))
print(int(blocked, 16))
"""
    blocked = int(_printed(code))
    assert all(blocked >> each - 1 & 1 for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM))
    assert not any(blocked >> each - 1 & 1 for each in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE))


def test_a_call_without_memory_ends_with_none_of_its_threads_at_work(tmp_path: Path) -> None:
    """Whichever allocation fails: all is done by the threads there are, or the call is refused and over."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    root = Path(__file__).parent
    core = root.parent / "csrc" / "cpu"
    sources = [root / "faults" / "memory.cpp", core / "hands.cpp", core / "parallel.cpp"]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", *map(str, sources)]
    subprocess.run([*command, "-o", str(tmp_path / "memory")], check=True)
    ended = subprocess.run([tmp_path / "memory"], capture_output=True, text=True, check=False, timeout=60)
    done, refused = map(int, ended.stdout.replace(",", "").split()[::2])
    assert ended.returncode == 0, ended.stdout
    assert done > refused > 0
