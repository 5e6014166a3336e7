"""Renamed names: the old ones work and warn, and none outlives the version that its warning names."""

from __future__ import annotations

import ast
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fastmerge
from fastmerge.deprecation import renamed_name, renamed_parameter, until

PACKAGE = Path(__file__).parents[1] / "fastmerge"

MODULE = """
from fastmerge.deprecation import renamed_name, renamed_parameter

@renamed_parameter("share", "density", since="0.2")
def blend(models, *, density=1.0):
    return models, density

def __getattr__(name):
    if name == "mix":
        return renamed_name(__name__, "mix", "blend", since="0.2")
    raise AttributeError(name)
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = ModuleType("blending")
    monkeypatch.setitem(sys.modules, "blending", made)
    exec(MODULE, vars(made))
    return made


def test_a_renamed_name_warns_where_it_is_used(module: ModuleType) -> None:
    with pytest.warns(DeprecationWarning, match="since fastmerge 0.2") as told:
        assert module.mix is module.blend
    (warning,) = told
    assert str(warning.message) == (
        "blending.mix is blending.blend since fastmerge 0.2, and goes in 0.4: write blending.blend"
    )
    assert warning.filename == __file__


def test_a_renamed_parameter_warns_where_it_is_used(module: ModuleType) -> None:
    with pytest.warns(DeprecationWarning, match="since fastmerge 0.2") as told:
        assert module.blend(3, share=0.5) == (3, 0.5)
    (warning,) = told
    assert str(warning.message) == "share of blend() is density since fastmerge 0.2, and goes in 0.4: write density"
    assert warning.filename == __file__


def test_the_new_names_do_not_warn(module: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.blend(3, density=0.5) == (3, 0.5)
    assert list(inspect.signature(module.blend).parameters) == ["models", "density"]


def test_both_names_at_once_are_refused(module: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"blend\(\) got both density and share"):
        module.blend(3, share=0.5, density=0.5)


@pytest.mark.parametrize(("since", "last"), [("0.2", "0.4"), ("1.0", "1.2"), ("0.9", "0.11"), ("2.3.1", "2.5")])
def test_an_old_name_lives_for_two_minor_versions(since: str, last: str) -> None:
    assert until(since) == last


def test_no_alias_has_outlived_its_version() -> None:
    aliases = [alias for file in sorted(PACKAGE.rglob("*.py")) for alias in outlived(file.read_text(), VERSION)]
    assert not aliases, "remove what the warning said would go"


@pytest.mark.parametrize(("version", "count"), [("0.3.9", 0), ("0.4.0", 2), ("0.11.0", 2), ("1.0.0", 2)])
def test_an_alias_that_has_outlived_its_version_is_found(version: str, count: int) -> None:
    assert len(list(outlived(MODULE, version))) == count


VERSION = fastmerge.__version__
HELPERS = {renamed_name.__name__, renamed_parameter.__name__}


def outlived(source: str, version: str) -> Iterator[str]:
    """The aliases of a file that go in this version or went before."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in HELPERS:
            (since,) = (ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg == "since")
            if numbers(until(since)) <= numbers(version):
                yield ast.unparse(node)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split(".")[:2])
