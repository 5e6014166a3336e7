"""Recipes: mergekit's YAML, read into a frozen `Recipe`; each mistake is reported here, with its place in the text."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from . import marked
from .errors import FastmergeWarning, RecipeError
from .marked import Marked, meant, printable
from .methods import METHODS, Base, Method, broken, find, names
from .parameters import Parameters, Setting, read_parameters
from .vocabulary.setting import TokenizerSetting, read_tokenizer
from .vocabulary.templates import read_chat_template

#: The dtypes that a recipe may name, and their safetensors names.
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class Recipe:
    """A merge as the user wrote it: `documents` in the order in which they are needed, the result last. `again` is what
    to ask fastmerge for when that is not to merge its text."""

    text: str
    documents: tuple[Document, ...]
    again: str = ""

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, every: bool = False) -> Recipe:
        """Reads a recipe from a file. Raises `RecipeError`; a `FastmergeWarning` names what has no effect.

        With `every`, each of its documents is one to merge, and none needs to be the result.
        """
        try:
            with open(path, "rb") as file:
                data = file.read(marked.LARGEST + 1)
            text = data.decode("utf-8-sig")
        except (OSError, ValueError) as error:
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise RecipeError(f"cannot read the recipe {str(path)!r}: {reason}") from None
        return cls.parse(text, str(path), Path(path).parent, every=every)

    @classmethod
    def parse(
        cls, text: str, name: str = "recipe", folder: str | os.PathLike[str] = "", *, every: bool = False
    ) -> Recipe:
        """Reads a recipe from a text; `name` is what errors call it. Models are looked for from the current directory,
        then from `folder`."""
        return cls(text, _documents(text, printable(name), Path(folder), every))


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
    tokenizer: TokenizerSetting | None
    chat_template: str | None
    place: str

    @property
    def models(self) -> tuple[Model, ...]:
        """Every model that the document names, once each, `base_model` first."""
        return _named(self.base_model, self.modules)

    @property
    def settings(self) -> Iterator[Setting]:
        """Every parameter in every place that sets it."""
        for module in self.modules:
            for slice_ in module.slices:
                for source in slice_.sources:
                    yield from source.parameters.values()
                yield from slice_.parameters.values()
            yield from module.parameters.values()
        yield from self.parameters.values()

    def with_models(self, found: Callable[[Model], Model]) -> Document:
        """The document with another model in the place of each."""
        modules = []
        for module in self.modules:
            slices = [
                replace(piece, sources=tuple(replace(source, model=found(source.model)) for source in piece.sources))
                for piece in module.slices
            ]
            modules.append(replace(module, slices=tuple(slices)))
        return replace(self, modules=tuple(modules), base_model=self.base_model and found(self.base_model))


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

    @property
    def numbers(self) -> range:
        """The numbers of its layers; none when it is whole."""
        return range(*self.layers) if self.layers else range(0)


class Model(NamedTuple):
    """A model by the name that the recipe gives it: what lies at `path`, or a `repository` on the hub, or, with
    neither, the document of that name; with the LoRA `adapter` that the recipe adds to it, which is found likewise."""

    name: str
    path: Path | None
    repository: Repository | None = None
    adapter: Model | None = None

    @property
    def text(self) -> str:
        """The whole name, its adapter's too."""
        return self.name if self.adapter is None else f"{self.name}+{self.adapter.name}"


@dataclass(frozen=True, slots=True)
class Repository:
    """A model on the hub: its id, the branch, tag or commit (None: its main branch), and where the recipe names it."""

    id: str
    revision: str | None
    place: str = field(compare=False)


def repository(name: str, place: str = "") -> Repository | None:
    """The repository of an id, and `@` with a branch, tag or commit; None where it is none that the hub could have."""
    hub = _HUB_ID.fullmatch(name)
    return Repository(hub["id"], hub["revision"], place) if hub else None


#: `name` or `org/name`, and `@` with a branch, tag or commit.
_HUB_ID = re.compile(
    r"(?!.*\.\.)(?![^@]*--)(?P<id>(?:\w(?:[\w.-]*\w)?/)?\w(?:[\w.-]*\w)?)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)


# --- documents ---

_FIELDS = (
    "name merge_method models slices modules base_model dtype out_dtype parameters seed"
    " tokenizer tokenizer_source chat_template"
)


def _documents(text: str, file: str, folder: Path, every: bool) -> tuple[Document, ...]:
    roots = marked.documents(text, file)
    if not roots:
        raise RecipeError("the recipe is empty; it needs at least merge_method and models", file)
    names: dict[str | None, Marked] = {}
    for root in roots:
        at = root.fields(_FIELDS.split()).get("name")
        name = None if at is None else at.text()
        if at is None and name in names:
            raise root.error(f"only one document may go without a name, the result, and {names[name].place} has none")
        if at is not None and name in names:
            raise at.error(f"a document named {name!r} is already at {names[name].place}; rename one")
        names[name] = at or root
    if len(roots) > 1 and None not in names and not every:
        fault = "each document has a name; leave it out of the one that is the result"
        raise roots[0].error(f"{fault}, or keep the models of all with `fastmerge multi --intermediate-dir`")
    models = _Models(frozenset(name for name in names if name is not None), folder, {})
    return _by_need({document.name: document for document in (_document(root, models) for root in roots)}, every)


def _by_need(named: Mapping[str | None, Document], every: bool) -> tuple[Document, ...]:
    """The documents that the result needs, each after those it needs itself; it has no name, or is alone. With `every`,
    all of them, the one without a name last."""
    done: dict[str | None, Document] = {}

    def visit(document: Document, path: tuple[str | None, ...]) -> None:
        if document.name in path:
            cycle = " needs ".join(repr(name) for name in (*path[path.index(document.name) :], document.name))
            raise RecipeError(f"documents need one another in a circle: {cycle}", document.place)
        if document.name not in done:
            for model in document.models:
                if model.name in named:
                    visit(named[model.name], (*path, document.name))
            done[document.name] = document

    *others, last = sorted(named.values(), key=lambda document: document.name is None)
    for document in (*others, last) if every else (last,):
        visit(document, ())
    needed = tuple(done.values())
    for document in others:
        visit(document, ())
    for extra in tuple(done.values())[len(needed) :]:
        fault = f"nothing needs the document {extra.name!r}; it is left out"
        warnings.warn(f"{extra.place}: {fault}", FastmergeWarning, stacklevel=2)
    return needed


def _document(at: Marked, models: _Models) -> Document:
    fields = at.fields(_FIELDS.split())
    if "merge_method" not in fields:
        raise at.error(f"merge_method is missing; it is one of {', '.join(METHODS)}")
    method = _method(fields["merge_method"])
    base = models.find(fields["base_model"]) if "base_model" in fields else None
    reader = _Reader(models, method, base)
    kinds = [key for key in ("models", "slices", "modules") if key in fields and fields[key].value]
    if len(kinds) != 1:
        raise at.error(f"exactly one of models, slices and modules must be there, not {' and '.join(kinds) or 'none'}")
    if kinds == ["modules"]:
        modules = tuple(reader.module(name, item) for name, item in fields["modules"].mapping().items())
    else:
        modules = (Module(None, reader.slices(fields[kinds[0]], kinds[0]), {}, at.place),)
    return Document(
        name=fields["name"].text() if "name" in fields else None,
        method=method,
        base_model=base,
        modules=modules,
        parameters=read_parameters(fields, method),
        dtype=_dtype(fields.get("dtype")),
        out_dtype=_dtype(fields.get("out_dtype")),
        seed=fields["seed"].integer() if "seed" in fields else None,
        tokenizer=read_tokenizer(fields, models.find, _named(base, modules)),
        chat_template=read_chat_template(fields),
        place=at.place,
    )


def _named(base: Model | None, modules: Sequence[Module]) -> tuple[Model, ...]:
    sources = (source.model for module in modules for slice_ in module.slices for source in slice_.sources)
    return tuple(dict.fromkeys((*(() if base is None else (base,)), *sources)))


def _method(at: Marked) -> Method:
    name = at.text()
    found = find(name)
    if isinstance(found, Method):
        return found
    raise at.error(found or f"unknown merge_method {name!r}{meant(name, names())}{broken()}")


def _dtype(at: Marked | None) -> str | None:
    if at is None:
        return None
    name = at.text().removeprefix("torch.")
    if name not in DTYPES:
        raise at.error(f"unknown dtype {name!r}{meant(name, DTYPES)}")
    return DTYPES[name]


# --- what a document is made of ---


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads the parts of one document."""

    models: _Models
    method: Method
    base: Model | None

    def module(self, name: str, at: Marked) -> Module:
        fields = at.fields(("models", "slices", "parameters"))
        kinds = [key for key in ("models", "slices") if key in fields and fields[key].value]
        if len(kinds) != 1:
            raise at.error("a module has either models or slices")
        slices = self.slices(fields[kinds[0]], kinds[0])
        return Module(name, slices, read_parameters(fields, self.method), at.place)

    def slices(self, at: Marked, kind: str) -> tuple[Slice, ...]:
        """Slices as they are written; `models` are one slice, of which a `base_model` not listed is the last."""
        if kind == "slices":
            return tuple(self.slice(item) for item in at.items())
        sources = [self.entry(item, whole=True) for item in at.items()]
        if self.base is not None and all(source.model != self.base for source in sources):
            sources.append(Entry(self.base, None, {}, at.place))
        return (self.checked(sources, self.base, {}, at),)

    def slice(self, at: Marked) -> Slice:
        fields = at.fields(("sources", "base_model", "residual_weight", "parameters"))
        if "residual_weight" in fields:
            raise fields["residual_weight"].error("residual_weight has no effect in mergekit either; remove it")
        if "sources" not in fields:
            raise at.error("a slice needs sources, a list of model and layer_range")
        base = self.models.find(fields["base_model"]) if "base_model" in fields else self.base
        sources = [self.entry(item, whole=False) for item in fields["sources"].items()]
        for source in sources:
            count, wanted = len(source.numbers), len(sources[0].numbers)
            if count != wanted:
                raise RecipeError(
                    f"layer_range has {count} layers where that of {sources[0].model.text!r} has {wanted};"
                    " the sources of a slice need the same number",
                    source.place,
                )
        return self.checked(sources, base, read_parameters(fields, self.method), at)

    def entry(self, at: Marked, whole: bool) -> Entry:
        fields = at.fields(("model", "layer_range", "parameters"))
        bounds = fields.get("layer_range")
        if whole and bounds is not None:
            raise bounds.error("models are merged whole; for a range of layers write slices, not models")
        if not whole and bounds is None:
            raise at.error("layer_range is missing; write [start, end], the end not included")
        if "model" not in fields:
            raise at.error("model is missing; it is a folder with a checkpoint, a hub id, or the name of a document")
        model = self.models.find(fields["model"])
        layers = None if bounds is None else _layers(bounds)
        return Entry(model, layers, read_parameters(fields, self.method, own=True), at.place)

    def checked(self, sources: list[Entry], base: Model | None, parameters: Parameters, at: Marked) -> Slice:
        """The slice, when its models are what the method takes."""
        method = self.method
        models: list[Model | None] = [source.model for source in sources]
        for place, source in enumerate(sources):
            if source.model in models[:place]:
                raise RecipeError(f"the model {source.model.text!r} is here twice; it takes part once", source.place)
        needed = method.base is not Base.INPUT and (method.base is not Base.OPTIONAL or base is not None)
        if needed and base not in models:
            where = "and where layers are sliced it is one of the sources of each slice"
            raise at.error(f"{method.name} needs base_model, {where}")
        apart = method.base.apart and base in models
        count = len(models) - apart
        low, high = method.models
        if count < low or (high is not None and count > high):
            wanted = f"{'exactly' if low == high else 'at least'} {_COUNTS[low]}"
            besides = " besides the base" if apart else ""
            note = "; base_model counts as one" if method.base is Base.INPUT and base in models else ""
            raise at.error(f"{method.name} takes {wanted}{besides}, got {count}{note}")
        return Slice(tuple(sources), models.index(base) if base in models else None, parameters, at.place)


_COUNTS = {1: "one model", 2: "two models"}


def _layers(at: Marked) -> tuple[int, int]:
    bounds = at.items()
    if len(bounds) != 2:
        raise at.error("layer_range is two numbers, [start, end], the end not included")
    start, end = (bound.integer() for bound in bounds)
    if not 0 <= start < end:
        fault = "reversed" if start > end else "empty" if start == end else "negative"
        raise at.error(f"layer_range [{start}, {end}] is {fault}; write [start, end] with start < end")
    if end > _MOST_LAYERS:
        raise at.error(f"layer_range ends at {end:.4g}, and no model has so many layers; write [start, end]")
    return start, end


_MOST_LAYERS = 1_000_000


# --- models ---


@dataclass(frozen=True, slots=True)
class _Models:
    """What names of models mean: other documents, paths, or hub ids; `found` are the paths met so far, by where they
    really are."""

    documents: frozenset[str]
    folder: Path
    found: dict[str, Model]

    def find(self, at: Marked) -> Model:
        if isinstance(at.value, dict):
            return self.apart(at)
        name = at.text()
        if (model := self.known(name, at)) is not None:
            return model
        base, plus, adapter = name.partition("+")
        if "+" in adapter:
            apart = "{model: {path: ...}, lora: {path: ...}}"
            raise at.error(f"there is no folder {name!r}, and it has more than one +: write {apart} in its place")
        if not plus:
            raise at.error(f"there is no file or folder {name!r}")
        model, lora = self.known(base, at), self.stored(adapter, at)
        if model is None or lora is None:
            half = base if model is None else adapter
            raise at.error(f"there is no file or folder {name!r}, and no {half!r} either")
        return model._replace(adapter=lora)

    def apart(self, at: Marked) -> Model:
        """mergekit's long form, in which a path may hold any character: {model: {path, revision}, lora: ...}."""
        fields = at.fields(("model", "lora", "override_architecture"))
        if "model" not in fields:
            raise at.error("model is missing; it is a folder, a hub id, or {path: ..., revision: ...}")
        if "override_architecture" in fields:
            fault = "override_architecture has no effect: tensors go by their names, and config.json keeps its own"
            warnings.warn(f"{fields['override_architecture'].place}: {fault}", FastmergeWarning, stacklevel=2)
        model = self.half(fields["model"], self.documents)
        return model._replace(adapter=self.half(fields["lora"])) if "lora" in fields else model

    def half(self, at: Marked, documents: Collection[str] = ()) -> Model:
        """One of the two in the long form, a text or {path, revision}."""
        fields = at.fields(("path", "revision")) if isinstance(at.value, dict) else {"path": at}
        if "path" not in fields:
            raise at.error("path is missing; it is a folder or a hub id")
        path, revision = fields["path"], fields.get("revision")
        name = path.text()
        wanted = None if revision is None else revision.text()
        model = Model(name, None) if name in documents else self.stored(name, path, wanted)
        if model is None:
            raise path.error(f"there is no file or folder {name!r}")
        if revision is not None and model.repository is None:
            fault = f"revision has no effect: {name!r} is not taken from the hub"
            warnings.warn(f"{revision.place}: {fault}", FastmergeWarning, stacklevel=2)
        return model

    def known(self, name: str, at: Marked) -> Model | None:
        document, _, _ = name.partition("@")  # of which there is one revision, whatever a recipe says
        return Model(document, None) if document in self.documents else self.stored(name, at)

    def stored(self, name: str, at: Marked, revision: str | None = None) -> Model | None:
        """What is on disk or may be on the hub under a name."""
        for path in (Path(name), self.folder / name):
            if name and os.path.exists(path):
                return self.found.setdefault(os.path.realpath(path), Model(name, path))
        full = name if revision is None else f"{name}@{revision}"
        hub = repository(full, at.place)
        return None if hub is None else Model(full, None, hub)
