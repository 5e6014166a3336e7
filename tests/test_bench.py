"""The bench takes a provider from a Python file once it does what the reference does; that of bench/KERNELS.md does."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastmerge.sweep import Run

BENCH = Path(__file__).parent.parent / "bench"
PAGE = BENCH / "KERNELS.md"
BROKEN = {
    "rounds halves up": ("0x7fff + (bits >> 16 & 1)", "0x8000"),
    "loses a negative zero": ("sum[i] == 0 ? base[i] : base[i] + sum[i]", "base[i] + sum[i]"),
    "leaves out the last element": ("min(spans[number] + step, inputs.elements)", "inputs.elements - 1"),
    "finds no NaN": ("!found[2 * m]++", "0"),
    "finds no overflow": ("sum[i] - sum[i] == 0", "0"),
}


@pytest.fixture(scope="module")
def providers() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("providers")


@pytest.fixture(scope="module")
def source() -> str:
    if not shutil.which("cc"):
        pytest.skip("no C compiler named cc")
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return str(block)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "slerp", "passthrough"])
def test_the_provider_of_the_page_is_right(providers: Any, source: str, method: str, tmp_path: Path) -> None:
    providers.check(_loaded(providers, source, tmp_path), "merge", method, "BF16", Run(3))


@pytest.mark.parametrize(("old", "new"), BROKEN.values(), ids=BROKEN)
def test_a_wrong_provider_is_refused(providers: Any, source: str, old: str, new: str, tmp_path: Path) -> None:
    assert source.count(old) == 1
    broken = _loaded(providers, source.replace(old, new), tmp_path)
    with pytest.raises(AssertionError, match=r"mine\.py, merge task_arithmetic: .*the reference"):
        providers.check(broken, "merge", "task_arithmetic", "BF16", Run(2))


def test_what_it_cannot_do_it_refuses(providers: Any, source: str, tmp_path: Path) -> None:
    mine = _loaded(providers, source, tmp_path)
    with pytest.raises(NotImplementedError):
        providers.check(mine, "merge", "ties", "BF16", Run())
    with pytest.raises(NotImplementedError):
        providers.check(mine, "merge", "linear", "F16", Run())


def test_what_it_does_not_define_is_named(providers: Any, source: str, tmp_path: Path) -> None:
    mine = _loaded(providers, source, tmp_path)
    lacking = {case: providers.lacking(mine, *case) for case in [("merge", "ties"), ("whole", "ties"), ("gram", "2")]}
    assert list(lacking.values()) == ["", "threshold", "gram"]


@pytest.mark.parametrize("op", ["merge", "whole", "norms", "threshold"])
def test_the_compiled_core_passes(providers: Any, op: str) -> None:
    providers.check(providers.load("cpu"), op, "ties", "F16", Run(2))


def test_a_file_stands_beside_what_is_built_in(providers: Any) -> None:
    assert providers.contestants(None) == [("cpu", "cpu")]
    assert providers.contestants("cuda") == [("cpu", "cpu")]
    assert providers.contestants("mine.py") == [("mine.py", "mine.py"), ("mine.py", "cpu"), ("mine.py", "torch")]
    assert providers.contestants("cpu,mine.py") == [("cpu", "cpu"), ("mine.py", "mine.py"), ("mine.py", "torch")]


def test_the_marks_are_about_every_case_of_their_sizes(providers: Any) -> None:
    cases, marks = (importlib.import_module(name) for name in ("cases", "host_marks"))
    assert {name for name, case in cases.CASES.items() if 1e6 <= case.elements <= 60e6} == {*marks.SIZES}


@pytest.mark.parametrize("shifted", [False, True], ids=["at a page", "shifted"])
def test_sets_exceed_the_cache_and_begin_alike(providers: Any, shifted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shifted inputs begin at different words of pages and of cache lines; outputs, and all other inputs, at a page."""
    cases = importlib.import_module("cases")
    monkeypatch.setattr(cases, "_last_cache_bytes", lambda: 10_000)
    buffers = cases.Buffers(cases.Case(1, (1000,), shifted=shifted), "BF16")
    assert len(buffers) * 2 * 2000 >= 4 * 10_000
    for number in range(len(buffers)):
        (inputs,), ((target,),) = buffers.inputs(3, True, number), buffers.targets(number)
        places = [view.address % 4096 for view in inputs.views]
        assert target.offset % 4096 == 0
        assert not any(place % 8 for place in places)
        if shifted:
            assert len({place % 64 for place in places} - {0}) == len(places) == 4
        else:
            assert places == [0] * 4


def test_time_of_processors_is_theirs_alone(providers: Any) -> None:
    counters = importlib.import_module("counters")
    stat = """cpu  1000 0 0 1000 0 0 0 0 0 0
cpu0 100 2 30 400 50 6 7 8 9 0
cpu1 1 0 1 10 5 0 0 0 0 0
cpu2 900 900 900 900 900 0 0 0 0 0
intr 5 0
"""
    assert counters.idle_and_busy(stat, {0, 1}) == (465, 155)


def test_as_many_parameters_as_memory_has_room_for(providers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three models, a base and 8 outputs, two bytes each, in half of it."""
    counters = importlib.import_module("counters")
    monkeypatch.setattr(counters.os, "sysconf", {"SC_PHYS_PAGES": 6000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert counters._held(512_000) == 512_000
    assert counters._held(512_001) == 512_001 / 4


def _loaded(providers: Any, source: str, folder: Path) -> Any:
    path = folder / "mine.py"
    path.write_text(source)
    return providers.load(str(path))
