"""Variants of a recipe: for each value that a parameter is to take, the recipe that has it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import yaml

from .errors import RecipeError
from .marked import Marked, documents, printable
from .parameters import Parameters, Setting, read_parameters, setting_of
from .recipe import Document, Recipe

#: Parameters by name, each with the values that it takes in turn.
Vary = Mapping[str, Sequence[float | bool | str]]

#: Outputs of one merge. Each keeps a few files open, and a system allows a process a thousand or so.
MOST = 32


class Variant(NamedTuple):
    """A recipe with other values: the name of its output, empty where nothing varies; its text; and its result."""

    name: str
    text: str
    document: Document


def variants(recipe: Recipe, vary: Vary) -> tuple[Variant, ...]:
    """Every combination of the values, which the result's `parameters` get; the recipe itself where there are none."""
    document = recipe.documents[-1]
    choices = [_choices(document, name, list(map(_text, values))) for name, values in vary.items()]
    return tuple(_variant(recipe.text, document, chosen) for chosen in _combined(choices))


class _Choice(NamedTuple):
    """One value of one parameter, as the user writes it and as it is read."""

    name: str
    text: str
    setting: Setting


def _text(value: float | bool | str) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _choices(document: Document, name: str, texts: Sequence[str]) -> list[_Choice]:
    if not texts:
        raise RecipeError("there are no values to vary it over", name)
    for number, text in enumerate(texts):
        place = printable(f"{name}={text}")
        if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", text, re.ASCII):  # it goes into YAML, and into a folder's name
            raise RecipeError("a value is a number, true, false or a word", place)
        if text in texts[:number]:
            raise RecipeError("this value is here twice", place)
    choices = [_Choice(name, text, setting_of(name, text, document.method)) for text in texts]
    _refuse_finer(document, choices[0].setting, name)
    return choices


def _refuse_finer(document: Document, varied: Setting, name: str) -> None:
    """What tensors or models have for themselves would go before a value for all."""
    ours = document.parameters.get(varied.parameter.name)
    for setting in document.settings:
        if setting.parameter.name != varied.parameter.name:
            continue
        if setting is not ours:
            fault = f"{name} is set for a part of the merge here, and varies only as one value for all"
        elif setting.constant is None:
            fault = f"{name} depends on the tensor here, and varies only as one value for all"
        else:
            continue
        raise RecipeError(f"{fault}: write one under the recipe's parameters", setting.place)


def _combined(choices: Sequence[Sequence[_Choice]]) -> Iterable[tuple[_Choice, ...]]:
    counts = [len(each) for each in choices]
    if math.prod(counts) > MOST:
        fault = f"{' x '.join(map(str, counts))} values make {math.prod(counts):,} outputs"
        raise RecipeError(f"{fault}, and one merge writes {MOST} at most: vary fewer at a time")
    return product(*choices)


def _variant(text: str, document: Document, chosen: Sequence[_Choice]) -> Variant:
    for choice in chosen:
        parameters = {**document.parameters, choice.setting.parameter.name: choice.setting}
        document = replace(document, parameters=parameters)
        text = _written(text, choice, document)
    return Variant(",".join(f"{choice.name}={choice.text}" for choice in chosen), text, document)


# --- the text ---


def _written(text: str, choice: _Choice, document: Document) -> str:
    """The recipe's text with a value in the result's `parameters`; the rest stays, comments included."""
    number, _ = _result(text)
    roots = [node for node in yaml.compose_all(text, yaml.SafeLoader) if isinstance(node, yaml.MappingNode)]
    edit = _edit(text, roots[number], ("parameters", choice.name), choice.text)
    if edit is not None:
        start, end, entry = edit
        text = text[:start] + entry + text[end:]
        _, root = _result(text)
        if _values(read_parameters(root.mapping(), document.method)) == _values(document.parameters):
            return text
    fault = f"{choice.name} cannot be set here: write the recipe's parameters out, without anchors and aliases"
    raise RecipeError(fault + ", and by one name each", document.place)


def _edit(text: str, mapping: yaml.MappingNode, path: Sequence[str], value: str) -> tuple[int, int, str] | None:
    """Where the value at a path of keys stands, or would stand, from start to end, and what to write there.

    None where an anchor may share it with others.
    """
    key, *rest = path
    for at, child in mapping.value:
        if at.value == key:
            start, end = child.start_mark.index, child.end_mark.index
            if start < at.end_mark.index or text[start : start + 1] == "&":
                return None
            if rest and isinstance(child, yaml.MappingNode):
                return _edit(text, child, rest, value)
            return start, end, (" " if start == end else "") + _flow(rest, value)
    start, entry = mapping.start_mark.index, f"{key}: {_flow(rest, value)}"
    if mapping.flow_style:
        return start + 1, start + 1, f"{entry}, "
    return start, start, f"{entry}\n{' ' * mapping.start_mark.column}"


def _flow(path: Sequence[str], value: str) -> str:
    for key in reversed(path):
        value = f"{{{key}: {value}}}"
    return value


def _result(text: str) -> tuple[int, Marked]:
    """The document that has no name, or is alone, and its number."""
    roots = documents(text, "")
    nameless = [number for number, root in enumerate(roots) if "name" not in root.fields(root.mapping())]
    number = nameless[0] if nameless else 0
    return number, roots[number]


def _values(parameters: Parameters) -> dict[str, list[tuple[Any, ...]]]:
    return {name: [condition[:2] for condition in setting.conditions] for name, setting in parameters.items()}
