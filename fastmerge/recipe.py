"""Recipes: mergekit's YAML, read into a frozen `Recipe`; each mistake is reported here, with its place in the text."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import FastmergeWarning, RecipeError
from .methods import DROP_RATE, KNOWN, METHODS, Base, Method, Parameter, Value


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as the user wrote it: `documents` in the order in which they are needed, the result last."""

    text: str
    documents: tuple[Document, ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Reads a recipe from a file. Raises `RecipeError`; a `FastmergeWarning` names what has no effect."""
        try:
            with open(path, "rb") as file:
                data = file.read(_LARGEST + 1)
            text = data.decode("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise RecipeError(f"cannot read the recipe {str(path)!r}: {reason}") from None
        return cls.parse(text, str(path), Path(path).parent)

    @classmethod
    def parse(cls, text: str, name: str = "recipe", folder: str | os.PathLike[str] = "") -> Recipe:
        """Reads a recipe from a text; `name` is what errors call it. Models are looked for from the current directory,
        then from `folder`."""
        return cls(text, _documents(text, _plain(name), Path(folder)))


@dataclass(frozen=True, slots=True)
class Document:
    """One merge of a recipe. `dtype` and `out_dtype` are safetensors names."""

    name: str | None
    method: Method
    base_model: Model | None
    modules: tuple[Module, ...]
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    seed: int | None
    place: str

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model that the document names, once each, `base_model` first."""
        sources = (source.model for module in self.modules for slice_ in module.slices for source in slice_.sources)
        return tuple(dict.fromkeys((*(() if self.base_model is None else (self.base_model,)), *sources)))


@dataclass(frozen=True, slots=True)
class Module:
    """A part of the model, or all of it when `name` is None, as slices that follow one another."""

    name: str | None
    slices: tuple[Slice, ...]
    parameters: Parameters
    place: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Models of which the same number of layers is merged; `base` is the index of the base among the sources."""

    sources: tuple[Entry, ...]
    base: int | None
    parameters: Parameters
    place: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A model's part in a slice: its layers [start, end), all of the model when `layers` is None."""

    model: Model
    layers: tuple[int, int] | None
    parameters: Parameters
    place: str


class Model(NamedTuple):
    """A model by the name that the recipe gives it; without a `path` it is the document of that name."""

    name: str
    path: Path | None


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter as written in one place: conditions, of which the first that matches gives the value."""

    parameter: Parameter
    conditions: tuple[Condition, ...]
    place: str

    @property
    def constant(self) -> Value:
        """The value that every tensor gets; None when it depends on the tensor."""
        first = self.conditions[0]
        return first.values[0] if first.filter is None and len(first.values) == 1 else None

    def read(self, tensor: str, t: float) -> Value:
        """The value for a tensor at layer position `t` in [0, 1]; None when no condition matches."""
        for condition in self.conditions:
            if condition.filter is None or condition.filter in tensor:
                return _along(condition.values, t, self.parameter.kind is float)
        return None


class Condition(NamedTuple):
    """A scalar (one value) or gradient (several) for the tensors whose name contains `filter`; None: for all."""

    filter: str | None
    values: tuple[Value, ...]
    place: str


Parameters = Mapping[str, Setting]


def _along(values: tuple[Value, ...], t: float, numeric: bool) -> Value:
    """The gradient at `t`. Between two numbers it stays between them, so what the ends may be, the value may be."""
    position = t * (len(values) - 1)
    low = int(position)
    fraction = position - low
    if not numeric or fraction == 0.0:
        return values[low]
    first, second = float(values[low] or 0.0), float(values[low + 1] or 0.0)
    return min(max((1.0 - fraction) * first + fraction * second, min(first, second)), max(first, second))


# --- documents ---

_FIELDS = (
    "name merge_method models slices modules base_model dtype out_dtype parameters seed"
    " tokenizer tokenizer_source chat_template"
)
_LATER = {
    "tokenizer": "leave it out where the models' vocabularies are the same",
    "tokenizer_source": "leave it out where the models' vocabularies are the same",
    "chat_template": "leave it out, and the base's template is copied",
}
_UNSUPPORTED = (
    "nuslerp multislerp karcher model_stock nearswap arcee_fusion sce ram ramplus_tl"
    " breadcrumbs breadcrumbs_ties della della_linear"
)
_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_COUNTS = {1: "one model", 2: "two models"}


def _documents(text: str, file: str, folder: Path) -> tuple[Document, ...]:
    roots = [_At(file, node) for node in _composed(text, file)]
    if not roots:
        raise RecipeError("the recipe is empty; it needs at least merge_method and models", file)
    names: dict[str, _At] = {}
    unnamed: list[_At] = []
    for root in roots:
        at = root.fields(_FIELDS.split()).get("name")
        if at is None:
            unnamed.append(root)
        elif at.text() in names:
            raise at.error(f"a document named {at.text()!r} is already at {names[at.text()].place}; rename one")
        else:
            names[at.text()] = at
    if len(unnamed) > 1:
        raise unnamed[1].error(f"only one document may go without a name, the result, and {unnamed[0].place} has none")
    if len(roots) > 1 and not unnamed:
        raise roots[0].error("each document has a name; leave it out of the one that is the result")
    reader = _Reader(frozenset(names), folder, {})
    documents = [reader.document(root) for root in roots]
    return _by_need(documents, documents[roots.index(unnamed[0])] if unnamed else documents[0])


def _by_need(documents: list[Document], result: Document) -> tuple[Document, ...]:
    """The documents that the result needs, each after those it needs itself."""
    named = {document.name: document for document in documents}
    done: dict[str | None, Document] = {}

    def visit(document: Document, path: tuple[str | None, ...]) -> None:
        if document.name in path:
            cycle = " needs ".join(repr(name) for name in (*path[path.index(document.name) :], document.name))
            raise RecipeError(f"documents need one another in a circle: {cycle}", document.place)
        if document.name not in done:
            for model in document.models:
                if model.path is None:
                    visit(named[model.name], (*path, document.name))
            done[document.name] = document

    visit(result, ())
    needed = tuple(done.values())
    for document in documents:
        visit(document, ())
    for extra in tuple(done.values())[len(needed) :]:
        _warn(f"{extra.place}: nothing needs the document {extra.name!r}; it is left out")
    return needed


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads nodes into documents; `found` maps the models met so far by their real path."""

    names: frozenset[str]
    folder: Path
    found: dict[str, Model]

    def document(self, at: _At) -> Document:
        fields = at.fields(_FIELDS.split())
        for key, remedy in _LATER.items():
            if key in fields:
                raise fields[key].error(f"{key} is not supported yet; {remedy}")
        if "merge_method" not in fields:
            raise at.error(f"merge_method is missing; it is one of {', '.join(METHODS)}")
        method = _method(fields["merge_method"])
        base = self.model(fields["base_model"]) if "base_model" in fields else None
        kinds = [key for key in ("models", "slices", "modules") if key in fields and fields[key].node.value]
        if len(kinds) != 1:
            raise at.error(
                f"exactly one of models, slices and modules must be there, not {' and '.join(kinds) or 'none'}"
            )
        if kinds == ["modules"]:
            modules = tuple(self.module(key, item, method, base) for key, item in fields["modules"].mapping().items())
        else:
            modules = (Module(None, self.slices(fields, method, base), {}, at.place),)
        return Document(
            name=fields["name"].text() if "name" in fields else None,
            method=method,
            base_model=base,
            modules=modules,
            parameters=_parameters(fields, method),
            dtype=_dtype(fields.get("dtype")),
            out_dtype=_dtype(fields.get("out_dtype")),
            seed=fields["seed"].integer() if "seed" in fields else None,
            place=at.place,
        )

    def module(self, name: str, at: _At, method: Method, base: Model | None) -> Module:
        fields = at.fields(("models", "slices", "parameters"))
        if sum(bool(fields[key].node.value) for key in ("models", "slices") if key in fields) != 1:
            raise at.error("a module has either models or slices")
        return Module(name, self.slices(fields, method, base), _parameters(fields, method), at.place)

    def slices(self, fields: dict[str, _At], method: Method, base: Model | None) -> tuple[Slice, ...]:
        if "models" in fields and fields["models"].node.value:
            at = fields["models"]
            sources = [self.entry(item, method) for item in at.items()]
            if base is not None and all(source.model != base for source in sources):
                sources.append(Entry(base, None, {}, at.place))
            return (_checked(Slice(tuple(sources), _index(sources, base), {}, at.place), method),)
        return tuple(self.slice(item, method, base) for item in fields["slices"].items())

    def slice(self, at: _At, method: Method, base: Model | None) -> Slice:
        fields = at.fields(("sources", "base_model", "residual_weight", "parameters"))
        if "residual_weight" in fields:
            raise fields["residual_weight"].error("residual_weight has no effect in mergekit either; remove it")
        if "sources" not in fields:
            raise at.error("a slice needs sources, a list of model and layer_range")
        if "base_model" in fields:
            base = self.model(fields["base_model"])
        sources = [self.source(item, method) for item in fields["sources"].items()]
        for source in sources[1:]:
            (start, end), (first, last) = source.layers or (0, 0), sources[0].layers or (0, 0)
            if end - start != last - first:
                raise RecipeError(
                    f"layer_range has {end - start} layers where that of {sources[0].model.name!r} has {last - first};"
                    " the sources of a slice need the same number",
                    source.place,
                )
        return _checked(Slice(tuple(sources), _index(sources, base), _parameters(fields, method), at.place), method)

    def source(self, at: _At, method: Method) -> Entry:
        fields = at.fields(("model", "layer_range", "parameters"))
        if "layer_range" not in fields:
            raise at.error("layer_range is missing; write [start, end], the end not included")
        bounds = fields["layer_range"].items()
        if len(bounds) != 2:
            raise fields["layer_range"].error("layer_range is two numbers, [start, end], the end not included")
        start, end = (bound.integer() for bound in bounds)
        if not 0 <= start < end:
            fault = "reversed" if start > end else "empty" if start == end else "negative"
            raise fields["layer_range"].error(
                f"layer_range [{start}, {end}] is {fault}; write [start, end] with start < end"
            )
        return Entry(self.model(_required(at, fields)), (start, end), _parameters(fields, method, own=True), at.place)

    def entry(self, at: _At, method: Method) -> Entry:
        fields = at.fields(("model", "parameters", "layer_range"))
        if "layer_range" in fields:
            raise fields["layer_range"].error("models are merged whole; for a range of layers write slices, not models")
        return Entry(self.model(_required(at, fields)), None, _parameters(fields, method, own=True), at.place)

    def model(self, at: _At) -> Model:
        name = at.text()
        if name in self.names:
            return Model(name, None)
        for path in (Path(name), self.folder / name):
            if os.path.exists(path):
                return self.found.setdefault(os.path.realpath(path), Model(name, path))
        raise at.error(_absent(name, self.names))


def _required(at: _At, fields: dict[str, _At]) -> _At:
    if "model" not in fields:
        raise at.error("model is missing; it is a folder with a checkpoint, or the name of another document")
    return fields["model"]


def _absent(name: str, names: frozenset[str]) -> str:
    """Why a name is no model, with what to do about it."""
    if "+" in name:
        return f"there is no folder {name!r}, and LoRA adapters (base+adapter) are not supported yet; fuse it first"
    if "@" in name:
        return f"there is no folder {name!r}, and hub revisions are not supported yet; download the model to a folder"
    if name.count("/") <= 1 and not name.startswith((".", "/", "~")):
        hint = "hub ids are not supported yet: download the model to a folder and name that" + _meant(name, names)
        return f"there is no folder or document {name!r}, and {hint}"
    return f"there is no file or folder {name!r}"


def _index(sources: list[Entry], base: Model | None) -> int | None:
    return next((i for i, source in enumerate(sources) if source.model == base), None)


def _checked(slice_: Slice, method: Method) -> Slice:
    """The slice, when its models are what the method takes."""
    models = [source.model for source in slice_.sources]
    for place, source in enumerate(slice_.sources):
        if source.model in models[:place]:
            raise RecipeError(f"the model {source.model.name!r} is here twice; it takes part once", source.place)
    if method.base is not Base.INPUT and slice_.base is None:
        raise RecipeError(
            f"{method.name} needs base_model, and where layers are sliced it is one of the sources of each slice",
            slice_.place,
        )
    count = len(models) - (method.base is Base.ORIGIN)
    low, high = method.models
    if count < low or (high is not None and count > high):
        wanted = f"{'exactly' if low == high else 'at least'} {_COUNTS[low]}"
        besides = " besides the base" if method.base is Base.ORIGIN else ""
        note = "; base_model counts as one" if method.base is Base.INPUT and slice_.base is not None else ""
        raise RecipeError(f"{method.name} takes {wanted}{besides}, got {count}{note}", slice_.place)
    return slice_


def _method(at: _At) -> Method:
    name = at.text()
    if name in METHODS:
        return METHODS[name]
    if name in _UNSUPPORTED.split():
        raise at.error(f"{name} is a method of mergekit that is not supported yet; there are {', '.join(METHODS)}")
    raise at.error(f"unknown merge_method {name!r}{_meant(name, METHODS)}")


def _dtype(at: _At | None) -> str | None:
    if at is None:
        return None
    name = at.text().removeprefix("torch.")
    if name not in _DTYPES:
        raise at.error(f"unknown dtype {name!r}{_meant(name, _DTYPES)}")
    return _DTYPES[name]


# --- parameters ---


def _parameters(fields: dict[str, _At], method: Method, own: bool = False) -> Parameters:
    """The settings under `parameters` that mean something to the method; `own` when they belong to one model."""
    if "parameters" not in fields:
        return {}
    written = fields["parameters"].mapping()
    settings = {}
    for name, at in written.items():
        if name not in KNOWN:
            raise at.error(f"unknown parameter {name!r}{_meant(name, KNOWN)}")
        if name == DROP_RATE and "density" in written:
            raise at.error("drop_rate and density are both given; drop_rate is 1 - density, keep one")
        parameter = method.parameter("density" if name == DROP_RATE else name)
        if parameter is None:
            continue
        if own and not parameter.per_model:
            _warn(
                f"{at.place}: {name} is one for all models and has no effect here; move it to the recipe's parameters"
            )
            continue
        settings[parameter.name] = _setting(at, parameter, _drop if name == DROP_RATE else None)
    return settings


def _drop(value: Value) -> Value:
    return round(1.0 - float(value or 0.0), 12)  # so that a drop_rate of 0.9 is a density of 0.1


def _setting(at: _At, parameter: Parameter, convert: Callable[[Value], Value] | None) -> Setting:
    def scalars(item: _At) -> tuple[Value, ...]:
        ends = item.items() if isinstance(item.node.value, list) else [item]
        if not ends:
            raise item.error(f"{parameter.name} is an empty list; give it values or remove it")
        values = (_value(end, parameter) for end in ends)
        return tuple(values if convert is None else map(convert, values))

    def condition(item: _At) -> Condition:
        fields = item.fields(("filter", "value"))
        if "value" not in fields:
            raise item.error("a condition needs a value, beside its filter")
        text = fields["filter"].text() if "filter" in fields else "*"
        return Condition(None if text == "*" else text, scalars(fields["value"]), item.place)

    value = at.node.value
    if isinstance(value, list) and any(isinstance(item.value, dict) for item in value):
        return Setting(parameter, tuple(condition(item) for item in at.items()), at.place)
    if isinstance(value, dict):
        return Setting(parameter, (condition(at),), at.place)
    return Setting(parameter, (Condition(None, scalars(at), at.place),), at.place)


def _value(at: _At, parameter: Parameter) -> Value:
    value = at.node.value
    if isinstance(value, str | int | float):
        if parameter.kind is float:
            number = _number(value)
            if number is not None and parameter.low <= number <= parameter.high:
                return number
        elif value in parameter.words and isinstance(value, str):
            return value
        elif parameter.kind is bool and str(value).lower() in _FLAGS:
            return _FLAGS[str(value).lower()]
    raise at.error(f"{parameter.name} must be {_wanted(parameter)}, not {at.said()}")


_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def _number(value: str | bool | int | float) -> float | None:
    """A finite number, also one that YAML 1.1 takes for a string, such as 1e-3."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _wanted(parameter: Parameter) -> str:
    if parameter.kind is float:
        bounds = math.isfinite(parameter.low) and math.isfinite(parameter.high)
        return f"a number from {parameter.low:g} to {parameter.high:g}" if bounds else "a finite number"
    return " or ".join([*(("true", "false") if parameter.kind is bool else ()), *parameter.words])


# --- nodes, and where they are ---

_LARGEST = 10_000_000  # bytes of a recipe
_MOST = 1_000_000  # nodes of a document, aliases expanded
_DEEPEST = 32


class _Node(NamedTuple):
    value: dict[str, _Node] | list[_Node] | str | bool | int | float | None
    line: int
    size: int = 1  # nodes in it, aliases expanded
    text: str = ""  # of a scalar


@dataclass(frozen=True, slots=True)
class _At:
    """A node, with the way to it."""

    file: str
    node: _Node
    path: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.node.line}" + (f": {self.path}" if self.path else "")

    def error(self, message: str) -> RecipeError:
        return RecipeError(message, self.place)

    def said(self) -> str:
        value = self.node.value
        return "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else repr(self.node.text)

    def fields(self, known: Collection[str]) -> dict[str, _At]:
        """The entries of a mapping that has only known keys; those without a value are as good as absent."""
        entries = self.mapping()
        for key, at in entries.items():
            if key not in known:
                raise at.error(f"unknown key {key!r}{_meant(key, known)}")
        return {key: at for key, at in entries.items() if at.node.value is not None}

    def mapping(self) -> dict[str, _At]:
        if not isinstance(self.node.value, dict):
            raise self.error(f"this must be a mapping (key: value), not {self.said()}")
        prefix = f"{self.path}." if self.path else ""
        return {key: _At(self.file, node, prefix + _plain(key)) for key, node in self.node.value.items()}

    def items(self) -> list[_At]:
        if not isinstance(self.node.value, list):
            raise self.error(f"this must be a list, not {self.said()}")
        return [_At(self.file, node, f"{self.path}[{i}]") for i, node in enumerate(self.node.value)]

    def text(self) -> str:
        if not self.node.text or isinstance(self.node.value, dict | list) or self.node.value is None:
            raise self.error(f"this must be text, not {self.said()}")
        return self.node.text

    def integer(self) -> int:
        number = _number(self.node.value) if isinstance(self.node.value, str | int | float) else None
        if number is None or not number.is_integer():
            raise self.error(f"this must be a whole number, not {self.said()}")
        return int(number)


def _composed(text: str, file: str) -> Iterator[_Node]:
    """The documents of a YAML text that hold something."""
    if len(text) > _LARGEST:
        raise RecipeError(f"the recipe has over {_LARGEST // 10**6} MB; that is not a recipe", file)
    events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                node = _Composer(events, file, {}).node(next(events), 0)
                if node.value is not None:
                    yield node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(f"this is not YAML: {reason}", f"{file}:{mark.line + 1}" if mark else file) from None


@dataclass(frozen=True, slots=True)
class _Composer:
    """Makes nodes of parser events, so that each keeps its line and nothing is ever built from a tag."""

    events: Iterator[Any]
    file: str
    anchors: dict[str, _Node | None]

    def node(self, event: Any, depth: int) -> _Node:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            anchor = str(event.anchor)
            target = self.anchors.get(anchor)
            if target is None:
                raise self.error(line, f"the alias *{_plain(anchor)} has no anchor before it, or is inside it")
            return target._replace(line=line)
        if event.tag is not None:
            raise self.error(line, f"the YAML tag {event.tag!r} has no meaning in a recipe; remove it")
        if depth > _DEEPEST:
            raise self.error(line, f"this is nested more than {_DEEPEST} deep")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            node = _Node(self.scalar(event, line), line, text=event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self.sequence(line, depth)
        else:
            node = self.mapping(line, depth)
        if node.size > _MOST:
            raise self.error(line, f"aliases expand this to more than {_MOST} entries")
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def sequence(self, line: int, depth: int) -> _Node:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return _Node(items, line, 1 + sum(item.size for item in items))

    def mapping(self, line: int, depth: int) -> _Node:
        entries: dict[str, _Node] = {}
        merged: dict[str, _Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if isinstance(key.value, dict | list):
                raise self.error(key.line, "a key must be plain text")
            if key.text == "<<":
                for source in value.value if isinstance(value.value, list) else [value]:
                    if not isinstance(source.value, dict):
                        raise self.error(key.line, "<< takes in a mapping, or a list of mappings")
                    merged = {**source.value, **merged}
            elif key.text in entries:
                raise self.error(key.line, f"the key {key.text!r} is already on line {entries[key.text].line}")
            else:
                entries[key.text] = value._replace(line=key.line)
        entries = {**merged, **entries}
        return _Node(entries, line, 1 + sum(entry.size for entry in entries.values()))

    def scalar(self, event: Any, line: int) -> str | bool | int | float | None:
        text: str = event.value
        tag: str = _RESOLVER.resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call]
        if tag.rpartition(":")[2] not in ("null", "bool", "int", "float"):
            return text
        try:
            value: bool | int | float | None = _CONSTRUCTOR.construct_object(yaml.ScalarNode(tag, text))
        except ValueError:
            raise self.error(line, f"{text[:40]!r} is not a number that can be read") from None
        return value

    def error(self, line: int, message: str) -> RecipeError:
        return RecipeError(message, f"{self.file}:{line}")


_RESOLVER = yaml.resolver.Resolver()
_CONSTRUCTOR = yaml.constructor.SafeConstructor()


# --- words ---


def _meant(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; it is one of {', '.join(sorted(known))}" if 0 < len(known) < 20 else ""


def _plain(word: str) -> str:
    return word if word.isprintable() else repr(word)


def _warn(message: str) -> None:
    warnings.warn(message, FastmergeWarning, stacklevel=2)
