"""Layers, from names alone: a model's tensors as stacks of layers, sliced, renumbered, and split among modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

from .errors import RecipeError
from .recipe import Document, Entry, Model, Module, Slice

Names = Mapping[Model, Collection[str]]


class Row(NamedTuple):
    """An output tensor, its name in each source of its slice, and its layer position in [0, 1]."""

    name: str
    inputs: tuple[str, ...]
    t: float


class Tower(NamedTuple):
    """The output tensors of a module, and for the stack that is renumbered, whose layers it has."""

    module: Module
    slices: Sequence[tuple[Slice, Iterable[Row]]]
    layers: Mapping[str, Sequence[tuple[Model, int]]]


def towers(document: Document, names: Names) -> Iterator[Tower]:
    """A document's modules in turn; `names` are the tensors of each model, those of the config's donor first."""
    parts = _parts(document, names)
    for module in document.modules:
        make = _whole if module.slices[0].sources[0].layers is None else _sliced
        yield make(module, parts[module.name])


def counts(names: Iterable[str]) -> dict[str, int]:
    """The stacks of layers among some names, and how many layers each has."""
    found: dict[str, int] = {}
    for match in filter(None, map(_LAYER.match, names)):
        stack = match[1] or ""
        found[stack] = max(int(match[2]) + 1, found.get(stack, 0))
    return found


def is_embedding(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: embeddings do by name, norms and heads do not."""
    return _EMBEDDING.search(name) is not None


_LAYER = re.compile(r"(?:(.*?)\.)??([0-9]{1,6})\.")  # the stack is what stands before the first number
_EMBEDDING = re.compile(r"(?<!un)embed(?!_out)|wte|wpe")


# --- rows ---


def _whole(module: Module, names: Names) -> Tower:
    slice_ = module.slices[0]
    union = _union([names[source.model] for source in slice_.sources], slice_)
    return Tower(module, [(slice_, _rows(union, counts(union), len(slice_.sources)))], {})


def _rows(names: Iterable[str], depths: Mapping[str, int], width: int) -> Iterator[Row]:
    for name in names:
        match = _LAYER.match(name)
        yield Row(name, (name,) * width, _position(int(match[2]), depths[match[1] or ""]) if match else 0.0)


def _sliced(module: Module, names: Names) -> Tower:
    """Layers are numbered as they come. What is outside of them is taken from the sources of the first slice when it
    comes before the layers, else from those of the last."""
    stacks: dict[Model, _Stack] = {}
    for source in chain.from_iterable(slice_.sources for slice_ in module.slices):
        if source.model not in stacks:
            stacks[source.model] = _stack(source.model, names[source.model], module.place)
        _check(source, stacks[source.model])
    first, last = module.slices[0], module.slices[-1]
    prefix = stacks[first.sources[first.base or 0].model].prefix
    slices = [(first, _outside(first, stacks, before=True))]
    kept: list[tuple[Model, int]] = []
    for slice_ in module.slices:
        slices.append((slice_, _renumbered(slice_, stacks, prefix, len(kept))))
        kept.extend((slice_.sources[0].model, layer) for layer in slice_.sources[0].numbers)
    slices.append((last, _outside(last, stacks, before=False)))
    return Tower(module, slices, {prefix: kept})


class _Stack(NamedTuple):
    """A model with one stack: the names of each layer without prefix and number, and those outside of it."""

    prefix: str
    layers: dict[int, list[str]]
    outside: list[str]


def _stack(model: Model, names: Iterable[str], place: str) -> _Stack:
    layers: dict[str, dict[int, list[str]]] = {}
    outside: list[str] = []
    for name in names:
        if match := _LAYER.match(name):
            layers.setdefault(match[1] or "", {}).setdefault(int(match[2]), []).append(name[match.end() :])
        else:
            outside.append(name)
    if len(layers) != 1:
        found = f"several ({_quoted(layers)}): say which under modules" if layers else "none"
        raise RecipeError(f"slices need one stack of layers, and {model.name!r} has {found}", place)
    return _Stack(*layers.popitem(), outside)


def _check(source: Entry, stack: _Stack) -> None:
    start, end, count = source.numbers.start, source.numbers.stop, max(stack.layers) + 1
    if end > count:
        raise RecipeError(
            f"layer_range [{start}, {end}] goes beyond the {count} layers of {source.model.name!r}",
            f"{source.place}.layer_range",
        )


def _outside(slice_: Slice, stacks: Mapping[Model, _Stack], before: bool) -> Iterator[Row]:
    for name in _union([stacks[source.model].outside for source in slice_.sources], slice_):
        if is_embedding(name) == before:
            yield Row(name, (name,) * len(slice_.sources), 0.0)


def _renumbered(slice_: Slice, stacks: Mapping[Model, _Stack], prefix: str, start: int) -> Iterator[Row]:
    count = len(slice_.sources[0].numbers)
    for step, numbers in enumerate(zip(*(source.numbers for source in slice_.sources), strict=True)):
        here = [(stacks[source.model], number) for source, number in zip(slice_.sources, numbers, strict=True)]
        for name in _union([stack.layers.get(number, []) for stack, number in here], slice_):
            inputs = tuple(_at(stack.prefix, number, name) for stack, number in here)
            yield Row(_at(prefix, start + step, name), inputs, _position(step, count))


def _at(prefix: str, layer: int, name: str) -> str:
    return f"{prefix}.{layer}.{name}" if prefix else f"{layer}.{name}"


def _union(names: Sequence[Collection[str]], slice_: Slice) -> Collection[str]:
    """All names once: those of the base in its order, or of the first model, then what only others have."""
    return dict.fromkeys(chain(names[slice_.base or 0], *names))


def _position(layer: int, count: int) -> float:
    return layer / (count - 1) if count > 1 else 1.0


# --- modules ---

_DEFAULT = "default"


def _parts(document: Document, names: Names) -> Mapping[str | None, Names]:
    """The tensors of each module: those that begin with its prefix and with no longer one, the rest the default's."""
    if document.modules[0].name is None:
        return {None: names}
    donor = next(iter(names))
    prefixes: dict[str, str | None] = {}
    for module in document.modules:
        if module.name != _DEFAULT:
            prefix = _prefix(module, donor, names[donor])
            if prefix in prefixes:
                raise RecipeError(f"the module {prefixes[prefix]!r} is the same part; keep one of them", module.place)
            prefixes[prefix] = module.name
    longest = sorted(prefixes, key=len, reverse=True)
    parts: dict[str | None, dict[Model, list[str]]] = {
        name: {model: [] for model in names} for name in (_DEFAULT, *prefixes.values())
    }
    for model, tensors in names.items():
        for tensor in tensors:
            prefix = next((prefix for prefix in longest if f"{tensor}.".startswith(prefix)), "")
            parts[prefixes.get(prefix, _DEFAULT)][model].append(tensor)
    rest = list(chain.from_iterable(parts[_DEFAULT].values()))
    if rest and all(module.name != _DEFAULT for module in document.modules):
        raise RecipeError(
            f"no module covers {len(set(rest))} tensors, such as {rest[0]!r}; add the module {_DEFAULT}",
            document.place,
        )
    return parts


def _prefix(module: Module, donor: Model, names: Iterable[str]) -> str:
    """What the names of a module begin with: all up to its name, which is a part of the path before any number."""
    heads = {(match[1] or "") if (match := _LAYER.match(name)) else name for name in names}
    key = f".{module.name}."
    found = {f"{head}."[: place + len(key) - 1] for head in heads if (place := f".{head}.".find(key)) >= 0}
    if len(found) != 1:
        which = f"names several parts ({', '.join(sorted(found))})" if found else "names no part"
        raise RecipeError(
            f"the module {module.name!r} {which} of {donor.name!r}; its stacks of layers are"
            f" {_quoted(sorted(counts(names)))}, and {_DEFAULT} is what no other module covers",
            module.place,
        )
    return found.pop()


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
