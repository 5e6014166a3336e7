"""The compiled core under the sanitizers: settings at random, inputs that are cut, ticks that throw, a full disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

import drawn
import numpy as np
import pytest
import sanitized
from conftest import Memory, Tensors
from hypothesis import HealthCheck, given, settings
from test_ops import PLAIN

from fastmerge.errors import CheckpointError
from fastmerge.sweep import Elect, Inputs, Keep, Mean, Part, Run, Sweep, Target, View

#: Settings per sanitizer; `make sanitize` tries as many as it is told, others each time.
LONG = int(os.environ.get("FASTMERGE_TEST_EXAMPLES", "0"))
COUNT = LARGE = (1 << 19) + 3001  # more than the core takes for small, and no multiple of a chunk


@pytest.fixture(scope="module", params=list(sanitized.KINDS))
def core(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with sanitized.provider(request.param) as native:
        yield native


def test_settings_at_random(core: ModuleType) -> None:
    tried, start = 0, perf_counter()

    @settings(
        max_examples=LONG or 120,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn.drawn())
    def check(setting: drawn.Setting) -> None:
        nonlocal tried
        tried += 1
        drawn.check(setting, [(core, isa) for isa in core.isas()])

    check()
    print(f"{tried} settings on {', '.join(core.isas())} in {(perf_counter() - start) / 60:.1f} minutes")


@pytest.mark.parametrize("setting", drawn.kept(), ids=lambda setting: f"{setting.op}-{setting.cases[0].seed}")
def test_settings_that_were_kept(core: ModuleType, setting: drawn.Setting) -> None:
    drawn.check(setting, [(core, isa) for isa in core.isas()])
