"""Names that have been renamed: the old ones work for two minor versions, with a warning that says the new one.

    if name == "blend":  # in the __getattr__ of a module
        return renamed_name(__name__, "blend", "merge", since="0.2")

    @renamed_parameter("share", "density", since="0.2")
    def merge(..., density): ...

`since` is the version that renamed; `tests/test_deprecation.py` fails where an alias has outlived `until(since)`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def renamed_name(module: str, old: str, new: str, *, since: str) -> Any:
    """The value of the new name, for the old one in a module's `__getattr__`."""
    _warn(f"{module}.{old}", f"{module}.{new}", since, stacklevel=4)  # of whoever asks the module
    return getattr(sys.modules[module], new)


def renamed_parameter(old: str, new: str, *, since: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A function that still takes a keyword by its old name; TypeError where it is given by both."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def renamed(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
            if old in keywords:
                if new in keywords:
                    raise TypeError(f"{function.__name__}() got both {new} and {old}, its name before {since}")
                _warn(f"{old} of {function.__name__}()", new, since, stacklevel=3)
                keywords[new] = keywords.pop(old)
            return function(*arguments, **keywords)

        return renamed

    return decorate


def until(since: str) -> str:
    """The first version without the old name: two minor versions later."""
    major, minor = (int(number) for number in since.split(".")[:2])
    return f"{major}.{minor + 2}"


def _warn(old: str, new: str, since: str, stacklevel: int) -> None:
    message = f"{old} is {new} since fastmerge {since}, and goes in {until(since)}: write {new}"
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)
