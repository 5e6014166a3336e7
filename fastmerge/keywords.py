"""Merges as Python calls them: a method, models and parameters by keyword, as the document of a recipe."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from keyword import iskeyword
from numbers import Real
from typing import Any

from .errors import RecipeError
from .marked import meant
from .methods import DROP_RATE, KNOWN, Base, Method, broken, find, names
from .parameters import Condition, Parameters, Setting, setting_of
from .recipe import Document, Entry, Model, Module, Slice

#: What a parameter is given: a number, a flag or a word; a list with one for each model; where several tensors are
#: merged, gradients and conditions, too. None is as good as not given.
Keyword = float | bool | str | Sequence[Any] | Mapping[str, Any] | None
Keywords = Mapping[str, Keyword]


def method_of(name: str) -> Method:
    """A method by its name in a recipe; raises RecipeError where there is none."""
    if not isinstance(name, str):
        raise TypeError(f"method is a {type(name).__qualname__}: give its name in a recipe")
    found = find(name)
    if isinstance(found, Method):
        return found
    raise RecipeError(found or f"unknown merge_method {name!r}{meant(name, names())}{broken()}")


def over(keywords: Keywords, own: Keywords, method: Method) -> Keywords:
    """Parameters, those of `own` before others of the same name, however it is spelt."""
    given = _named(own, method)
    same = {DROP_RATE, "density"} & given.keys() and {DROP_RATE, "density"}
    return {name: value for name, value in _named(keywords, method).items() if name not in same} | given


def document(
    method: Method, models: Sequence[str], base: int | None, keywords: Keywords, *, single: bool = False
) -> Document:
    """A merge of models by these names, of which the one at `base` is the base, or, where that is the number after the
    last, one more. With `single` it is of one tensor, and parameters have one value.

    Raises:
        RecipeError: the method takes more models or fewer, or no such parameter, or not this value.
    """
    own, shared = _read(method, len(models), keywords, single)
    names = [*models, "base"] if base == len(models) else models
    _check_count(method, len(names), base)
    sources = tuple(
        Entry(Model(name, None), None, own[at] if at < len(own) else {}, name) for at, name in enumerate(names)
    )
    return Document(
        name=None,
        method=method,
        base_model=None if base is None else sources[base].model,
        modules=(Module(None, (Slice(sources, base, {}, method.name),), {}, method.name),),
        parameters=shared,
        dtype=None,
        out_dtype=None,
        seed=None,
        tokenizer=None,
        chat_template=None,
        place=method.name,
    )


def _check_count(method: Method, models: int, base: int | None) -> None:
    if base is None and method.base in (Base.ORIGIN, Base.ENDPOINT):
        raise RecipeError("it needs a base: give it as base", method.name)
    apart = method.base.apart and base is not None
    count, (low, high) = models - apart, method.models
    if count < low or (high is not None and count > high):
        wanted = f"{'exactly' if low == high else 'at least'} {'one model' if low == 1 else 'two models'}"
        besides = " besides the base" if apart else ""
        note = "; the base counts as one" if base is not None and not apart else ""
        raise RecipeError(f"it takes {wanted}{besides}, got {count}{note}", method.name)


# --- parameters ---


def _read(method: Method, models: int, keywords: Keywords, single: bool) -> tuple[list[dict[str, Setting]], Parameters]:
    """The settings of each model, and those of all."""
    own: list[dict[str, Setting]] = [{} for _ in range(models)]
    shared: dict[str, Setting] = {}
    for name, value in _named(keywords, method).items():
        parameter = method.parameter("density" if name == DROP_RATE else name)
        if parameter is None or not parameter.per_model or not _is_list(value) or _are_conditions(value):
            setting = _setting(method, name, value, single)
            shared[setting.parameter.name] = setting
            continue
        if len(value) != models:
            fault = f"{name} has {len(value)} values where there are {models} models: a list has one for each"
            raise RecipeError(fault + ("" if single else ", and a gradient for one model is a list in it"), method.name)
        for settings, each in zip(own, value, strict=True):
            if each is not None:
                settings[parameter.name] = _setting(method, name, each, single)
    for parameter in method.parameters:
        if parameter.required and not any(parameter.name in settings for settings in (shared, *own)):
            how = "one value, or a list with one for each model" if parameter.per_model else "one value"
            raise RecipeError(f"{method.name} needs the parameter {parameter.name}: give it {how}")
    return own, shared


def _named(keywords: Keywords, method: Method) -> dict[str, Any]:
    """By the names of recipes, as plain Python. A word that Python keeps to itself ends in an underscore here."""
    given: dict[str, Any] = {}
    for keyword, value in keywords.items():
        name = keyword.removesuffix("_") if keyword in _KEPT else keyword
        if name not in KNOWN and method.parameter(name) is None:
            raise RecipeError(f"unknown parameter {keyword!r}{meant(keyword, _SPELT)}")
        if name in given:
            raise RecipeError(f"{name} and {name}_ are both given, and are one parameter; keep one")
        if value is not None:
            given[name] = _plain(value)
    if DROP_RATE in given and "density" in given:
        raise RecipeError("drop_rate and density are both given; drop_rate is 1 - density, keep one")
    return given


_SPELT = frozenset(f"{name}_" if iskeyword(name) else name for name in KNOWN)
_KEPT = _SPELT - KNOWN


def _plain(value: Any) -> Any:
    """What numpy or torch hold as Python has it."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_conditions(values: Sequence[Any]) -> bool:
    """Whether a list is conditions for all models, and not one value for each."""
    return bool(values) and all(isinstance(value, Mapping) for value in values)


# --- values ---


def _setting(method: Method, name: str, value: Any, single: bool) -> Setting:
    """A scalar, a gradient, a condition, or a list of them."""
    value = _plain(value)
    if not _is_list(value) and not isinstance(value, Mapping):
        return _scalar(method, name, value)
    if single:
        raise RecipeError(f"{name} has one value here: there is one tensor, and no layers", method.name)
    if isinstance(value, Mapping):
        value = [value]
    if not any(isinstance(each, Mapping) for each in value):
        return _gradient(method, name, value)
    settings = [_condition(method, name, each) for each in value]
    conditions = [condition for setting in settings for condition in setting.conditions]
    return replace(settings[0], conditions=tuple(conditions))


def _condition(method: Method, name: str, value: Any) -> Setting:
    if not isinstance(value, Mapping) or not value.keys() <= {"filter", "value"} or "value" not in value:
        raise RecipeError(f'a condition is {{"filter": text, "value": value}}, not {value!r}', name)
    text, wanted = value.get("filter", "*"), value["value"]
    setting = _gradient(method, name, wanted) if _is_list(wanted) else _scalar(method, name, wanted)
    conditions = [condition._replace(filter=None if text == "*" else str(text)) for condition in setting.conditions]
    return replace(setting, conditions=tuple(conditions))


def _gradient(method: Method, name: str, values: Sequence[Any]) -> Setting:
    if not values:
        raise RecipeError(f"{name} is an empty list; give it values or leave it out", method.name)
    settings = [_scalar(method, name, value) for value in values]
    ends = tuple(setting.conditions[0].values[0] for setting in settings)
    return replace(settings[0], conditions=(Condition(None, ends, name),))


def _scalar(method: Method, name: str, value: Any) -> Setting:
    if isinstance(value, bool):
        return _read_scalar(method, name, str(value).lower())
    if isinstance(value, str):
        return _read_scalar(method, name, value if re.fullmatch(r"\w+", value) else json.dumps(value))
    if isinstance(value, Real):
        return _read_scalar(method, name, repr(float(value)))
    raise RecipeError(f"a value is a number, True, False or a word, not {value!r}", name)


@lru_cache(1024)
def _read_scalar(method: Method, name: str, text: str) -> Setting:
    return setting_of(name, text, method)
