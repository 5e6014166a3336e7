"""The kernels of AVX2 take as many instructions as they are known to, which even a noisy machine can tell."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

COUNT = Path(__file__).parent.parent / "bench" / "instructions" / "count.py"
KEPT = json.loads(COUNT.with_name("avx2.json").read_text())
MARGIN = 0.03


@pytest.fixture(scope="module")
def counted() -> dict[str, float]:
    here: dict[str, Any] = runpy.run_path(str(COUNT))
    if reason := here["why_not"]():
        pytest.skip(reason)
    if here["compiler"]() != KEPT["compiler"]:
        pytest.skip(f"the counts are those of {KEPT['compiler']}, not of {here['compiler']()}")
    counts: dict[str, float] = here["count"]()
    return counts


@pytest.mark.parametrize("case", KEPT["instructions_per_element"])
def test_instructions_per_element_are_those_kept(counted: dict[str, float], case: str) -> None:
    kept = KEPT["instructions_per_element"][case]
    meant = "; if that is meant: python bench/instructions/count.py --write"
    assert counted[case] == pytest.approx(kept, rel=MARGIN), f"{case} took {kept} instructions per element{meant}"


def test_every_case_is_kept(counted: dict[str, float]) -> None:
    assert counted.keys() == KEPT["instructions_per_element"].keys()
