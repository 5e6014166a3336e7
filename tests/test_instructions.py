"""The kernels of AVX2 and CUDA take as many instructions as they are known to, which even a noisy machine can tell."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

COUNT = Path(__file__).parent.parent / "bench" / "instructions" / "count.py"
KEPT = json.loads(COUNT.with_name("avx2.json").read_text())
MARGIN = 0.03
GPU = COUNT.with_name("gpu.py")
KEPT_OF_GPU = json.loads(GPU.with_name("sm_90.json").read_text())


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return runpy.run_path(str(COUNT))


@pytest.fixture(scope="module")
def counted(here: dict[str, Any]) -> dict[str, float]:
    if reason := here["why_not"]():
        pytest.skip(reason)
    _stop_unless_comparable(here, here["compiler"]())
    counts: dict[str, float] = here["count"]()
    return counts


@pytest.mark.parametrize("case", KEPT["instructions_per_element"])
def test_instructions_per_element_are_those_kept(counted: dict[str, float], case: str) -> None:
    kept = KEPT["instructions_per_element"][case]
    meant = "; if that is meant: python bench/instructions/count.py --write"
    assert counted[case] == pytest.approx(kept, rel=MARGIN), f"{case} took {kept} instructions per element{meant}"


def test_every_case_is_kept(counted: dict[str, float]) -> None:
    assert counted.keys() == KEPT["instructions_per_element"].keys()


@pytest.mark.parametrize("compiler", ["(Ubuntu 12.4.0-2ubuntu1~24.04) 12.4.0", "g++-12 (GCC) 12.3.1 20230508"])
def test_a_later_version_of_the_same_gcc_will_do(here: dict[str, Any], compiler: str) -> None:
    assert here["release"](compiler) == here["release"](KEPT["compiler"])


@pytest.mark.parametrize("compiler", ["(Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0", "Debian clang version 12.0.1"])
@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_another_compiler_stops_ci(
    here: dict[str, Any], compiler: str, ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises((pytest.fail.Exception, pytest.skip.Exception), match="the counts are those of") as stopped:
        _stop_unless_comparable(here, compiler)
    assert stopped.type is outcome


def _stop_unless_comparable(here: dict[str, Any], compiler: str) -> None:
    """Where the machine is ours to choose, nothing is left out in silence."""
    if here["release"](compiler) != here["release"](KEPT["compiler"]):
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"the counts are those of {KEPT['compiler']}, not of {compiler}: set CXX to a compiler like it")


# --- what nvcc makes for a card ---


@pytest.fixture(scope="module")
def counted_for_gpu() -> dict[str, dict[str, float]]:
    gpu = runpy.run_path(str(GPU))
    if reason := gpu["why_not"]():
        pytest.skip(reason)
    if gpu["compiler"]() != KEPT_OF_GPU["compiler"]:
        pytest.skip(f"the counts are those of {KEPT_OF_GPU['compiler']}, not of {gpu['compiler']()}")
    counts: dict[str, dict[str, float]] = gpu["count"]()
    return counts


@pytest.mark.parametrize("case", KEPT_OF_GPU["instructions_per_element"])
def test_instructions_for_a_gpu_are_those_kept(counted_for_gpu: dict[str, dict[str, float]], case: str) -> None:
    kept = KEPT_OF_GPU["instructions_per_element"][case]
    meant = "; if that is meant: python bench/instructions/gpu.py --write"
    assert counted_for_gpu[case]["all"] == pytest.approx(kept["all"], rel=MARGIN), f"{case}{meant}"


def test_every_case_of_a_gpu_is_kept(counted_for_gpu: dict[str, dict[str, float]]) -> None:
    assert counted_for_gpu.keys() == KEPT_OF_GPU["instructions_per_element"].keys()
