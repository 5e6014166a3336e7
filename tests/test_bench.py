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


def _loaded(providers: Any, source: str, folder: Path) -> Any:
    path = folder / "mine.py"
    path.write_text(source)
    return providers.load(str(path))
