"""Layers, from names alone: a model's tensors as stacks of layers, sliced, renumbered, and split among modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from .errors import RecipeError
from .recipe import Document, Entry, Model, Module, Slice

Names = Mapping[Model, Collection[str]]


class Row(NamedTuple):
    """An output tensor, its name in each source of its slice, and its layer position in [0, 1], or what knows that."""

    name: str
    inputs: tuple[str, ...]
    at: float | Positions

    @property
    def t(self) -> float:
        return self.at if isinstance(self.at, float) else self.at.of(self.name)


class Positions:
    """The layer positions of some names, which are looked for where a parameter goes by them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    def of(self, name: str) -> float:
        match = _LAYER.match(name)
        return _position(int(match[2]), self._depths[match[1] or ""]) if match else 0.0

    @cached_property
    def _depths(self) -> dict[str, int]:
        """How many parts are numbered, by what stands before their numbers."""
        found: dict[str, int] = {}
        for match in filter(None, map(_LAYER.match, self._names)):
            prefix = match[1] or ""
            found[prefix] = max(int(match[2]) + 1, found.get(prefix, 0))
        return found


class Tower(NamedTuple):
    """The output tensors of a module, and for the stack that is renumbered, whose layers it has."""

    module: Module
    slices: Sequence[tuple[Slice, Iterable[Row]]]
    layers: Mapping[str, Sequence[tuple[Model, int]]]


class Stack(NamedTuple):
    """The names in each layer, without prefix and number. `common` are those in the first layer that serve all."""

    layers: Mapping[int, list[str]]
    common: Sequence[str]

    @property
    def depth(self) -> int:
        return max(self.layers) + 1


def towers(document: Document, names: Names) -> Iterator[Tower]:
    """A document's modules in turn; `names` are the tensors of each model, those of the config's donor first."""
    parts = _parts(document, names)
    for module in document.modules:
        make = _whole if module.slices[0].sources[0].layers is None else _sliced
        yield make(module, parts[module.name])


def stacks(names: Iterable[str]) -> dict[str, Stack]:
    """The stacks of layers among some names, by what stands before the numbers. Where layers hold modules, what holds
    tensors directly is no stack of them, but a list of small parts, as in a projector."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if match := _LAYER.match(name):
            found.setdefault(match[1] or "", {}).setdefault(int(match[2]), []).append(name[match.end() :])
    deep = {
        prefix: layers
        for prefix, layers in found.items()
        if any("." in name for inside in layers.values() for name in inside)
    }
    return {prefix: _split(layers) for prefix, layers in (deep or found).items()}


def is_embedding(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: embeddings do by name, norms and heads do not."""
    return _EMBEDDING.search(name) is not None


def is_head(name: str) -> bool:
    """Whether a tensor gives the scores of the vocabulary, and so may be tied to the embeddings."""
    return _HEAD.search(name) is not None


_LAYER = re.compile(r"(?:(.*?)\.)??([0-9]{1,6})\.")  # the stack is what stands before the first number
_EMBEDDING = re.compile(
    r"(?<!un)embed(?!_out)|wte|wpe"
    r"|(?:^|\.)(?:shared|conv[0-9]|ln_pre|pre_la?y\w*norm|project_in|altup_projections|(?:cls|class|mask)_token)(?:\.|$)"
)
_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|proj_out|vocab_projector|(?:lm_head\.|predictions\.|^)decoder)\.weight$"
)


def _split(layers: dict[int, list[str]]) -> Stack:
    """T5 holds the position bias of all layers in the first one, beside all that the others hold too."""
    first, *others = (set(layers[number]) for number in sorted(layers))
    if 0 in layers and others and others[0] < first and all(other == others[0] for other in others):
        common = [name for name in layers[0] if name not in others[0]]
        return Stack({**layers, 0: [name for name in layers[0] if name in others[0]]}, common)
    return Stack(layers, ())


# --- rows ---


def _whole(module: Module, names: Names) -> Tower:
    slice_ = module.slices[0]
    union = _union([names[source.model] for source in slice_.sources], slice_)
    width, at = len(slice_.sources), Positions(union)
    return Tower(module, [(slice_, (Row(name, (name,) * width, at) for name in union))], {})


def _sliced(module: Module, names: Names) -> Tower:
    """Layers are numbered as they come. What is outside of them is taken from the sources of the first slice when it
    comes before the layers or is in the first layer for all of them, else from those of the last."""
    held: dict[Model, _Sliced] = {}
    for source in chain.from_iterable(slice_.sources for slice_ in module.slices):
        if source.model not in held:
            held[source.model] = _one_stack(source.model, names[source.model], module.place)
        _check(source, held[source.model].stack)
    first, last = module.slices[0], module.slices[-1]
    prefix = held[first.sources[first.base or 0].model].prefix
    slices = [(first, _outside(first, held, before=True)), (first, _common(first, held, prefix))]
    kept: list[tuple[Model, int]] = []
    for slice_ in module.slices:
        slices.append((slice_, _renumbered(slice_, held, prefix, len(kept))))
        kept.extend((slice_.sources[0].model, layer) for layer in slice_.sources[0].numbers)
    slices.append((last, _outside(last, held, before=False)))
    return Tower(module, slices, {prefix: kept})


class _Sliced(NamedTuple):
    """A model's one stack, what its names begin with, and the names outside of it."""

    prefix: str
    stack: Stack
    outside: list[str]


def _one_stack(model: Model, names: Collection[str], place: str) -> _Sliced:
    found = stacks(names)
    if len(found) != 1:
        has = f"several ({_quoted(found)}): say which under modules" if found else "none"
        raise RecipeError(f"slices need one stack of layers, and {model.name!r} has {has}", place)
    ((prefix, stack),) = found.items()
    outside = [name for name in names if not ((match := _LAYER.match(name)) and (match[1] or "") == prefix)]
    return _Sliced(prefix, stack, outside)


def _check(source: Entry, stack: Stack) -> None:
    start, end = source.numbers.start, source.numbers.stop
    if end > stack.depth:
        raise RecipeError(
            f"layer_range [{start}, {end}] goes beyond the {stack.depth} layers of {source.model.name!r}",
            f"{source.place}.layer_range",
        )


def _outside(slice_: Slice, held: Mapping[Model, _Sliced], before: bool) -> Iterator[Row]:
    for name in _union([held[source.model].outside for source in slice_.sources], slice_):
        if is_embedding(name) == before:
            yield Row(name, (name,) * len(slice_.sources), 0.0)


def _common(slice_: Slice, held: Mapping[Model, _Sliced], prefix: str) -> Iterator[Row]:
    here = [held[source.model] for source in slice_.sources]
    for name in _union([model.stack.common for model in here], slice_):
        yield Row(_at(prefix, 0, name), tuple([_at(model.prefix, 0, name) for model in here]), 0.0)


def _renumbered(slice_: Slice, held: Mapping[Model, _Sliced], prefix: str, start: int) -> Iterator[Row]:
    count = len(slice_.sources[0].numbers)
    for step, numbers in enumerate(zip(*(source.numbers for source in slice_.sources), strict=True)):
        here = [(held[source.model], number) for source, number in zip(slice_.sources, numbers, strict=True)]
        for name in _union([model.stack.layers.get(number, []) for model, number in here], slice_):
            inputs = tuple(_at(model.prefix, number, name) for model, number in here)
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
#: What mergekit calls parts of a model, and what they may be called in it; what reads is the rest of what sees.
_CALLED = {
    "vision_tower": ("vision_tower", "visual", "vision_model"),
    "vision_model": ("vision_model", "vision_tower", "visual"),
    "multi_modal_projector": ("multi_modal_projector", "merger"),
    "text_decoder": ("text_decoder", "default"),
}


def _parts(document: Document, names: Names) -> Mapping[str | None, Names]:
    """The tensors of each module: those that begin with its prefix and with no longer one, the rest the default's, and
    where none is, an output head the decoder's."""
    if document.modules[0].name is None:
        return {None: names}
    donor = next(iter(names))
    prefixes: dict[str, str | None] = {}
    for module in document.modules:
        prefix = _prefix(module, donor, names[donor])
        if prefix in prefixes:
            raise RecipeError(f"the module {prefixes[prefix]!r} is the same part; keep one of them", module.place)
        prefixes[prefix] = module.name
    longest = sorted(prefixes, key=len, reverse=True)
    parts: dict[str | None, dict[Model, list[str]]] = {
        name: {model: [] for model in names} for name in prefixes.values()
    }
    rest: list[str] = []
    for model, tensors in names.items():
        for tensor in tensors:
            found = [prefixes[prefix] for prefix in longest if f"{tensor}.".startswith(prefix)]
            if not found and is_head(tensor) and "decoder" in parts:
                found = ["decoder"]
            if found:
                parts[found[0]][model].append(tensor)
            else:
                rest.append(tensor)
    if rest:
        raise RecipeError(
            f"no module covers {len(set(rest))} tensors, such as {rest[0]!r}; add the module {_DEFAULT}",
            document.place,
        )
    return parts


def _prefix(module: Module, donor: Model, names: Collection[str]) -> str:
    """What the names of a module begin with: all up to its name, which is a part of the path before any number; nothing
    for the default."""
    heads = {(match[1] or "") if (match := _LAYER.match(name)) else name for name in names}
    for name in _CALLED.get(str(module.name), (str(module.name),)):
        key = f".{name}."
        found = {f"{head}."[: place + len(key) - 1] for head in heads if (place := f".{head}.".find(key)) >= 0}
        if name == _DEFAULT or len(found) == 1:
            return "" if name == _DEFAULT else found.pop()
        if found:
            break
    which = f"names several parts ({', '.join(sorted(found))})" if found else "names no part"
    raise RecipeError(
        f"the module {module.name!r} {which} of {donor.name!r}; its stacks of layers are"
        f" {_quoted(sorted(stacks(names)))}, and {_DEFAULT} is what no other module covers",
        module.place,
    )


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
