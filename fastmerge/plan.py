"""Plans: from a recipe and the headers of its checkpoints, one `Job` per output tensor and the layout of the shards."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .checkpoint import DTYPE_BITS, Checkpoint, Layout, TensorInfo, lay_out, open_checkpoint
from .errors import CheckpointError, FastmergeWarning, MismatchError, RecipeError
from .methods import METHODS, Base, Measured, Method, Parameter, Settings, Value
from .recipe import Document, Model, Module, Parameters, Recipe, Setting, Slice
from .sweep import Part, Sweep

SHARD_SIZE = 5_000_000_000


class Source(NamedTuple):
    """An input: the index of its model in `Stage.models`, and its name there."""

    model: int
    tensor: str


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor. `inputs` are the models that take part, in recipe order, an endpoint base first; `base` is
    what deltas are taken from. A `copy` has one input, whose bytes are the output's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[Source, ...]
    base: Source | None
    method: Method
    settings: Settings
    copy: bool = False

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that is read, the base last."""
        return self.inputs if self.base is None else (*self.inputs, self.base)


@dataclass(frozen=True, slots=True)
class Stage:
    """One document of the recipe. `donor` gives config and tokenizer files; `config_changes` are the keys of its
    config.json that change, a nested config such as text_config as a whole."""

    name: str | None
    document: Document
    models: tuple[Checkpoint | Planned, ...]
    jobs: tuple[Job, ...]
    layout: Layout
    donor: Checkpoint
    config_changes: dict[str, Any]

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, each counted once."""
        tensors = [model.tensors for model in self.models]
        return sum(tensors[model][name].nbytes for job in self.jobs for model, name in job.sources)

    @property
    def bytes_written(self) -> int:
        return sum(shard.size for shard in self.layout.shards)


class Planned:
    """What an earlier stage will write, with the interface of a `Checkpoint` as far as headers go."""

    files: ClassVar[tuple[Path, ...]] = ()

    def __init__(self, name: str, stage: Stage) -> None:
        self.name = name
        self.stage = stage
        self.config = {**stage.donor.config, **stage.config_changes}
        shapes = {job.name: (job.dtype, job.shape) for job in stage.jobs}
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(name, *shapes[name], begin)
            for shard in stage.layout.shards
            for name, begin in shard.offsets.items()
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a recipe in order, the result last."""

    stages: tuple[Stage, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, each counted once a stage; methods that measure first read theirs again."""
        return sum(stage.bytes_read for stage in self.stages)

    @property
    def bytes_written(self) -> int:
        return sum(stage.bytes_written for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data for json.dumps."""
        return {
            "stages": [_stage_json(stage) for stage in self.stages],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


def plan(recipe: Recipe, *, seed: int | None = None, shard_size: int = SHARD_SIZE) -> Plan:
    """Plans a merge from headers and configs. `seed` goes before the recipe's own (default 0); `shard_size` in bytes.

    An output has the recipe's `out_dtype`, else its `dtype`, else the dtype that holds all of its inputs (BF16 with F16
    gives F32). Raises `RecipeError`, `CheckpointError`, or `MismatchError` with the first 20 reasons why the models do
    not fit one another; a `FastmergeWarning` tells of what is odd but defined.
    """
    opened: dict[Model, Checkpoint | Planned] = {}
    stages: list[Stage] = []
    for document in recipe.documents:
        for model in document.models:
            if model.path is not None and model not in opened:
                opened[model] = open_checkpoint(model.path)
        own = seed if seed is not None else document.seed or 0
        stage = _Planner(document, {model: opened[model] for model in document.models}, own).stage(shard_size)
        stages.append(stage)
        if document.name is not None:
            opened[Model(document.name, None)] = Planned(document.name, stage)
    return Plan(tuple(stages))


def _info(name: str, dtype: str, shape: tuple[int, ...], begin: int) -> TensorInfo:
    return TensorInfo(name, dtype, shape, begin, begin + math.prod(shape) * DTYPE_BITS[dtype] // 8)


def _stage_json(stage: Stage) -> dict[str, Any]:
    def source(at: Source) -> dict[str, str]:
        return {"model": stage.models[at.model].name, "tensor": at.tensor}

    return {
        "name": stage.name,
        "method": stage.document.method.name,
        "models": [model.name for model in stage.models],
        "donor": stage.donor.name,
        "config_changes": stage.config_changes,
        "shards": [{"name": shard.name, "bytes": shard.size} for shard in stage.layout.shards],
        "jobs": [
            {
                "name": job.name,
                "dtype": job.dtype,
                "shape": list(job.shape),
                "inputs": [source(at) for at in job.inputs],
                "base": None if job.base is None else source(job.base),
                "method": "copy" if job.copy else job.method.name,
                "parameters": {} if job.copy else dict(job.settings.shared),
                "model_parameters": [] if job.copy else [dict(model) for model in job.settings.models],
            }
            for job in stage.jobs
        ],
        "bytes_read": stage.bytes_read,
        "bytes_written": stage.bytes_written,
    }


# --- one stage ---

_FLOATS = {"BF16": 1, "F16": 1, "F32": 2, "F64": 3}  # by what holds what
_COPIED = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))
_PASSTHROUGH = METHODS["passthrough"]
_AS_IT_IS = Settings({}, ({"scale": None},))
_LISTED = 20


class _Row(NamedTuple):
    """An output tensor, its name in each source of its slice, and its layer position in [0, 1]."""

    name: str
    inputs: tuple[str, ...]
    t: float


class _Planner:
    """Plans one document; what does not fit gathers in `problems` and is raised together."""

    def __init__(self, document: Document, models: Mapping[Model, Checkpoint | Planned], seed: int) -> None:
        self.document = document
        self.method = document.method
        self.dtype = document.out_dtype or document.dtype
        self.models = tuple(models.values())
        self.index = {model: place for place, model in enumerate(models)}
        self.seed = seed
        self.problems: list[str] = []
        self.lacking: dict[int, list[str]] = {}
        self.layers: dict[str, list[tuple[int, int]]] = {}  # by stack: model and layer that each output layer is from

    def stage(self, shard_size: int) -> Stage:
        _warn_of_configs(self.models)
        dropped = self._tied_heads()
        owner = _owner(self.document, self.models)
        jobs: list[Job] = []
        for module in self.document.modules:
            for slice_, rows in self._slices(module, owner):
                jobs.extend(self._jobs(module, slice_, (row for row in rows if row.name not in dropped)))
        self._raise_problems(jobs)
        self._warn_of_gaps()
        _warn_of_filters(self.document, jobs)
        _check_scope(self.document, jobs)
        donor = self.models[0]
        changes = self._config_changes(donor.config, jobs)
        if isinstance(donor, Planned):
            changes = {**donor.stage.config_changes, **changes}
            donor = donor.stage.donor
        layout = lay_out([(job.name, job.dtype, job.shape) for job in jobs], shard_size)
        return Stage(self.document.name, self.document, self.models, tuple(jobs), layout, donor, changes)

    def _slices(self, module: Module, owner: _Owner | None) -> Iterator[tuple[Slice, Iterable[_Row]]]:
        """The rows of a module, slice by slice: whole models, or layers renumbered as they come.

        Where layers are sliced, what is outside of them is taken from the sources of the first slice when it comes
        before the layers (`_is_before`), else from those of the last, as embeddings and heads are."""
        stacks = [[self._stack(module, owner, source.model) for source in slice_.sources] for slice_ in module.slices]
        if module.slices[0].sources[0].layers is None:
            yield module.slices[0], _whole(stacks[0], module.slices[0].base or 0)
            return
        for slice_, parts in zip(module.slices, stacks, strict=True):
            for source, stack in zip(slice_.sources, parts, strict=True):
                self._check_layers(module, source.model, stack, source.layers or (0, 0), source.place)
        yield module.slices[0], _outside(stacks[0], module.slices[0].base or 0, before=True)
        name = next(iter(stacks[0][module.slices[0].base or 0].layers))
        kept = self.layers.setdefault(name, [])
        for slice_, parts in zip(module.slices, stacks, strict=True):
            ranges = [range(*(source.layers or (0, 0))) for source in slice_.sources]
            yield slice_, _renumbered(name, parts, ranges, slice_.base or 0, len(kept))
            first = self.index[slice_.sources[0].model]
            kept.extend((first, layer) for layer in ranges[0])
        yield module.slices[-1], _outside(stacks[-1], module.slices[-1].base or 0, before=False)

    def _stack(self, module: Module, owner: _Owner | None, model: Model) -> _Stack:
        names: Iterable[str] = self.models[self.index[model]].tensors
        if owner is not None:
            names = [name for name in names if owner.module(name) == module.name]
        return _Stack(names)

    def _check_layers(self, module: Module, model: Model, stack: _Stack, layers: tuple[int, int], place: str) -> None:
        counts = stack.counts()
        if len(counts) != 1:
            found = f"several ({_quoted(counts)}): say which under modules" if counts else "none"
            raise RecipeError(f"slices need one stack of layers, and {model.name!r} has {found}", module.place)
        (count,) = counts.values()
        if layers[1] > count:
            raise RecipeError(
                f"layer_range {list(layers)} goes beyond the {count} layers of {model.name!r}", f"{place}.layer_range"
            )

    def _jobs(self, module: Module, slice_: Slice, rows: Iterable[_Row]) -> Iterator[Job]:
        resolver = _Resolver(self.document, module, slice_)
        models = [self.index[source.model] for source in slice_.sources]
        tensors = [self.models[model].tensors for model in models]
        origin = slice_.base if self.method.base is Base.ORIGIN else None
        endpoint = slice_.base if self.method.base is Base.ENDPOINT else None
        order = tuple(sorted((i for i in range(len(models)) if i != origin), key=lambda i: i != endpoint))
        for row in rows:
            infos = [held.get(name) for held, name in zip(tensors, row.inputs, strict=True)]
            takers = order
            if None in infos:
                if not self._may_lack(row, models, infos, origin):
                    continue
                takers = tuple(i for i in order if infos[i] is not None)
            found = [info for info in infos if info is not None]
            if not self._fits(row, models, infos, found):
                continue
            sources = [Source(model, name) for model, name in zip(models, row.inputs, strict=True)]
            stored, shape = found[0].dtype, found[0].shape
            if stored in _COPIED or not takers:  # a buffer that is the same in all, or a tensor of the base alone
                takers = (takers[0] if takers else slice_.base or 0,)
                method, settings, identity, base = _PASSTHROUGH, _AS_IT_IS, True, None
            else:
                method, (settings, identity) = self.method, resolver.settings(row, takers)
                base = None if origin is None else sources[origin]
            target = stored if stored in _COPIED else self.dtype or _common(found)
            copy = identity and base is None and target == stored
            if stored not in _FLOATS and not copy:
                self.problems.append(
                    f"{row.name!r} is {stored} in {self._name(models[takers[0]])}: dequantise it to merge it"
                )
                continue
            if method.random:
                keys = tuple(_key(self.seed, place, row.name) for place in range(len(takers)))
                settings = dataclasses.replace(settings, keys=keys)
            yield Job(row.name, target, shape, tuple(sources[i] for i in takers), base, method, settings, copy)

    def _may_lack(
        self, row: _Row, models: Sequence[int], infos: Sequence[TensorInfo | None], origin: int | None
    ) -> bool:
        """Whether a tensor that some models lack can be made: a model without it has no delta."""
        lacking = [model for model, info in zip(models, infos, strict=True) if info is None]
        for model in lacking:
            self.lacking.setdefault(model, []).append(row.name)
        if row.name.endswith(_HEADS):
            having = next(model for model, info in zip(models, infos, strict=True) if info is not None)
            self.problems.append(_tied(row.name, self._name(lacking[0]), self._name(having)))
            return False
        if origin is not None and infos[origin] is not None:
            return True
        self.problems.append(f"{row.name!r} is missing in {', '.join(map(self._name, lacking))}")
        return False

    def _fits(
        self, row: _Row, models: Sequence[int], infos: Sequence[TensorInfo | None], found: Sequence[TensorInfo]
    ) -> bool:
        """Whether shapes agree, and dtypes are all of numbers to merge or all of the same buffer."""
        first = found[0]
        floats = first.dtype in _FLOATS
        if all(info.shape == first.shape and (info.dtype in _FLOATS if floats else False) for info in found):
            return True
        holders = [place for place, info in enumerate(infos) if info is not None]
        lead = self._name(models[holders[0]])
        for place, info in zip(holders[1:], found[1:], strict=True):
            other = self._name(models[place])
            if info.shape != first.shape:
                how = _shapes(row.name, first.shape, info.shape)
                self.problems.append(
                    f"{row.name!r} is {list(first.shape)} in {lead} and {list(info.shape)} in {other}{how}"
                )
                return False
            if info.dtype != first.dtype and not (floats and info.dtype in _FLOATS):
                self.problems.append(f"{row.name!r} is {first.dtype} in {lead} and {info.dtype} in {other}")
                return False
            if first.dtype in _COPIED and not _equal(
                self.models[models[holders[0]]], row.inputs[holders[0]], self.models[models[place]], row.inputs[place]
            ):
                self.problems.append(f"{row.name!r} holds {first.dtype} values, which differ in {lead} and {other}")
                return False
        return True

    def _tied_heads(self) -> frozenset[str]:
        """Output heads that are left out: with every config tied, a loader takes the embeddings for the head."""
        flags = [_stated(model.config, "tie_word_embeddings") for model in self.models]
        heads = {name for model in self.models for name in model.tensors if name.endswith(_HEADS)}
        if True in flags and False in flags:
            for name in sorted(heads):
                tied, untied = (self._name(flags.index(flag)) for flag in (True, False))
                self.problems.append(_tied(name, tied, untied))
            return frozenset(heads)
        if not all(flag is True for flag in flags):
            return frozenset()
        shapes = {info.shape for name, info in self.models[0].tensors.items() if _is_before(name)}
        held = {name: model.tensors[name].shape for name in heads for model in self.models if name in model.tensors}
        return frozenset(name for name, shape in held.items() if shape in shapes)

    def _raise_problems(self, jobs: Sequence[Job]) -> None:
        touched = {source.model for job in jobs if not job.copy for source in job.sources}
        quantised = [
            f"{self._name(place)} is quantised ({reason}): dequantise it first"
            for place, model in enumerate(self.models)
            if (place in touched or self.problems) and (reason := _quantised(model)) is not None
        ]
        problems = [*quantised, *self.problems]
        if not problems:
            return
        renames = [
            f"{self._name(place)} {rename}"
            for place in range(1, len(self.models))
            if (rename := _rename(set(self.models[0].tensors), set(self.models[place].tensors), self._name(0)))
            is not None
        ]
        listed = [*renames, *problems][:_LISTED]
        more = len(renames) + len(problems) - len(listed)
        lines = "".join(f"\n  {problem}" for problem in listed) + (f"\n  and {more} more" if more else "")
        raise MismatchError(f"{self.document.place}: the models do not fit one another:{lines}")

    def _warn_of_gaps(self) -> None:
        for model, names in self.lacking.items():
            _warn(f"{self._name(model)} lacks {len(names)} tensors, such as {names[0]!r}: there it counts as the base")

    def _config_changes(self, config: Mapping[str, Any], jobs: Sequence[Job]) -> dict[str, Any]:
        """What config.json must say otherwise: counts of layers, lists that go by layer, dtype."""
        changes: dict[str, Any] = {}
        for stack, kept in self.layers.items():
            old = max((layer for prefix, layer in _numbered(self.models[0].tensors) if prefix == stack), default=-1) + 1
            key = _count_key(config, stack, old)
            if key is None:
                if len(kept) != old:
                    text = f"no key of config.json counts the layers {stack!r} of {self._name(0)}"
                    _warn(f"{text}; there are {len(kept)} now")
                continue
            section, _, word = key.rpartition(".")
            values: dict[str, Any] = {word: len(kept)}
            for name in _BY_LAYER:
                entries = [_entry(_section(self.models[model].config, section), name, layer) for model, layer in kept]
                if name in _section(config, section) and None not in entries:
                    values[name] = entries
            if section:
                values = {section: {**_section(config, section), **values}}
            changes.update({name: value for name, value in values.items() if config[name] != value})
        dtypes = {job.dtype for job in jobs if job.dtype in _FLOATS}
        word = "dtype" if "dtype" in config else "torch_dtype"
        if len(dtypes) == 1 and config and config.get(word) != (name := _NAMES[dtypes.pop()]):
            changes[word] = name
        return changes

    def _name(self, model: int) -> str:
        return repr(self.models[model].name)


_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def _common(found: Sequence[TensorInfo]) -> str:
    """The dtype that holds all of them: what torch promotes to."""
    dtypes = {info.dtype for info in found}
    if len(dtypes) == 1:
        return found[0].dtype
    widest = max(dtypes, key=_FLOATS.__getitem__)
    return "F32" if _FLOATS[widest] == 1 else widest


def _key(seed: int, place: int, tensor: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{place}\0{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _shapes(name: str, first: Sequence[int], second: Sequence[int]) -> str:
    if list(first[::-1]) == list(second):
        return ": one is transposed"
    if first[1:] == second[1:] and (name.endswith(_HEADS) or _is_before(name)):
        return ": their vocabularies differ, and tokenizer work is not supported yet"
    return ""


# --- layers, from names ---

_LAYER = re.compile(r"(?:(.*?)\.)??([0-9]{1,6})\.")
_BEFORE = re.compile(r"(?<!un)embed(?!_out)|wte|wpe")
_HEADS = ("lm_head.weight", "embed_out.weight")


def _is_before(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: embeddings do by name, norms and heads do not."""
    return _BEFORE.search(name) is not None


def _numbered(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Stack and layer of the names that have them: what stands before the first number, and that number."""
    return ((match[1] or "", int(match[2])) for match in map(_LAYER.match, names) if match)


class _Stack:
    """The names of a model, or of a module: `layers` by stack and layer without the numbering, `outside` the rest."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.layers: dict[str, dict[int, list[str]]] = {}
        self.outside: list[str] = []
        for name in self.names:
            if match := _LAYER.match(name):
                layers = self.layers.setdefault(match[1] or "", {})
                layers.setdefault(int(match[2]), []).append(name[match.end() :])
            else:
                self.outside.append(name)

    def counts(self) -> dict[str, int]:
        return {stack: max(layers) + 1 for stack, layers in self.layers.items()}

    def layer(self, number: int) -> list[str]:
        (layers,) = self.layers.values()
        return layers.get(number, [])

    def at(self, number: int, name: str) -> str:
        (stack,) = self.layers
        return _at(stack, number, name)


def _at(stack: str, number: int, name: str) -> str:
    return f"{stack}.{number}.{name}" if stack else f"{number}.{name}"


def _whole(stacks: Sequence[_Stack], lead: int) -> Iterator[_Row]:
    counts: dict[str, int] = {}
    for stack in stacks:
        for prefix, count in stack.counts().items():
            counts[prefix] = max(count, counts.get(prefix, 0))
    for name in _union([stack.names for stack in stacks], lead):
        match = _LAYER.match(name)
        t = _position(int(match[2]), counts[match[1] or ""]) if match else 0.0
        yield _Row(name, (name,) * len(stacks), t)


def _outside(stacks: Sequence[_Stack], lead: int, before: bool) -> Iterator[_Row]:
    for name in _union([stack.outside for stack in stacks], lead):
        if _is_before(name) == before:
            yield _Row(name, (name,) * len(stacks), 0.0)


def _renumbered(
    prefix: str, stacks: Sequence[_Stack], ranges: Sequence[range], lead: int, start: int
) -> Iterator[_Row]:
    for step, numbers in enumerate(zip(*ranges, strict=True)):
        here = list(zip(stacks, numbers, strict=True))
        t = _position(step, len(ranges[0]))
        for name in _union([stack.layer(number) for stack, number in here], lead):
            yield _Row(_at(prefix, start + step, name), tuple(stack.at(number, name) for stack, number in here), t)


def _union(names: Sequence[Sequence[str]], lead: int) -> Iterable[str]:
    """All names once: those of the lead in its order, then what only others have."""
    return dict.fromkeys(chain(names[lead], *names))


def _position(layer: int, count: int) -> float:
    return layer / (count - 1) if count > 1 else 1.0


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))


class _Owner(NamedTuple):
    """Which module a tensor belongs to: the one with the longest prefix of its name, else the default one."""

    prefixes: Sequence[tuple[str, str]]  # of names, and the module; longest first

    def module(self, name: str) -> str:
        return next((module for prefix, module in self.prefixes if f"{name}.".startswith(prefix)), _DEFAULT)


_DEFAULT = "default"


def _owner(document: Document, models: Sequence[Checkpoint | Planned]) -> _Owner | None:
    """The modules of a recipe as prefixes of names; a key is a part of the path that comes before a layer's number."""
    if document.modules[0].name is None:
        return None
    heads = {(match[1] or "") if (match := _LAYER.match(name)) else name for name in models[0].tensors}
    stacks = sorted({stack for stack, _ in _numbered(models[0].tensors)})
    prefixes: list[tuple[str, str]] = []
    for module in document.modules:
        key = module.name or _DEFAULT
        found = {f"{head}."[: place + len(key) + 1] for head in heads if (place := f".{head}.".find(f".{key}.")) >= 0}
        if key == _DEFAULT:
            continue
        if len(found) != 1:
            which = f"names several parts ({', '.join(sorted(found))})" if found else "names no part"
            raise RecipeError(
                f"the module {key!r} {which} of {models[0].name!r}; its stacks of layers are {_quoted(stacks)}, and"
                f" {_DEFAULT} is what no other module covers",
                module.place,
            )
        prefixes.append((found.pop(), key))
    owner = _Owner(sorted(prefixes, key=lambda pair: -len(pair[0])))
    if all(module.name != _DEFAULT for module in document.modules):
        rest = [name for model in models for name in model.tensors if owner.module(name) == _DEFAULT]
        if rest:
            raise RecipeError(
                f"no module covers {len(set(rest))} tensors, such as {rest[0]!r}; add the module {_DEFAULT}",
                document.place,
            )
    return owner


# --- parameters ---


class _Lookup:
    """One parameter of one model or of all, in the places that set it, strongest first."""

    def __init__(self, parameter: Parameter, levels: Sequence[Parameters], place: str) -> None:
        self.parameter = parameter
        self.place = place
        self.settings = [level[parameter.name] for level in levels if parameter.name in level]
        constant = self.settings[0].constant if self.settings else parameter.default
        self.varies = bool(self.settings) and constant is None
        self.constant = constant

    def read(self, tensor: str, t: float) -> Value:
        if not self.varies:
            return self.constant
        values = (setting.read(tensor, t) for setting in self.settings)
        return next((value for value in values if value is not None), self.parameter.default)


class _Resolver:
    """The settings of the tensors of one slice; tensors with the same values share one."""

    def __init__(self, document: Document, module: Module, slice_: Slice) -> None:
        self.method = document.method
        self.slice = slice_
        levels = (slice_.parameters, module.parameters, document.parameters)
        parameters = document.method.parameters
        self.shared = [_Lookup(p, levels, document.place) for p in parameters if not p.per_model]
        self.models = [
            [_Lookup(p, (source.parameters, *levels), source.place) for p in parameters if p.per_model]
            for source in slice_.sources
        ]
        self.varying = [lookup for lookup in self.shared if lookup.varies]
        self.varying_models = [[lookup for lookup in lookups if lookup.varies] for lookups in self.models]
        self.made: dict[tuple[Any, ...], tuple[Settings, bool]] = {}

    def settings(self, row: _Row, takers: tuple[int, ...]) -> tuple[Settings, bool]:
        """The settings of a row for the sources that take part, and whether they make its sweep change nothing."""
        shared = tuple(lookup.read(row.name, row.t) for lookup in self.varying)
        own = tuple(lookup.read(row.inputs[i], row.t) for i in takers for lookup in self.varying_models[i])
        key = (takers, shared, own)
        if key not in self.made:
            self.made[key] = self._make(row, takers)
        return self.made[key]

    def _make(self, row: _Row, takers: tuple[int, ...]) -> tuple[Settings, bool]:
        settings = Settings(
            {lookup.parameter.name: self._needed(lookup, row.name, row.t) for lookup in self.shared},
            tuple(
                {lookup.parameter.name: self._needed(lookup, row.inputs[i], row.t) for lookup in self.models[i]}
                for i in takers
            ),
        )
        if self.method.selects or self.method.gram or self.method.random:
            return settings, False
        sweep = self.method.sweep(settings, Measured())
        if abs(sweep.divisor) < 1e-8:
            raise RecipeError(
                f"the weights sum to {sweep.divisor:g} for {row.name!r}, and normalize divides by that;"
                " change them, or set normalize: false",
                self.slice.place,
            )
        return settings, sweep == Sweep((Part(),))

    def _needed(self, lookup: _Lookup, tensor: str, t: float) -> Value:
        value = lookup.read(tensor, t)
        if value is None and lookup.parameter.required:
            raise RecipeError(
                f"{self.method.name} needs the parameter {lookup.parameter.name}, and nothing gives it for {tensor!r}",
                lookup.place,
            )
        return value


def _settings(document: Document) -> Iterator[Setting]:
    for module in document.modules:
        for slice_ in module.slices:
            for source in slice_.sources:
                yield from source.parameters.values()
            yield from slice_.parameters.values()
        yield from module.parameters.values()
    yield from document.parameters.values()


def _warn_of_filters(document: Document, jobs: Sequence[Job]) -> None:
    filters = {c.filter: c.place for setting in _settings(document) for c in setting.conditions if c.filter is not None}
    if filters:
        names = "\n".join({name for job in jobs for name in (job.name, *(source.tensor for source in job.sources))})
        for text, place in filters.items():
            if text not in names:
                _warn(f"{place}: the filter {text!r} matches no tensor")


def _check_scope(document: Document, jobs: Sequence[Job]) -> None:
    """One threshold over a whole model needs one density, and every tensor, in each model."""
    merged = [job for job in jobs if job.method is document.method and not job.copy]
    scopes = {job.settings.shared.get("scope") for job in merged}
    if "model" not in scopes:
        return
    fault = None
    if len(scopes) > 1:
        fault = "scope is model for some tensors only; set it for all"
    elif len({tuple(source.model for source in job.inputs) for job in merged}) > 1:
        fault = "scope: model takes one threshold over a model, so every tensor must come from the same models"
    elif len({tuple(model["density"] for model in job.settings.models) for job in merged}) > 1:
        fault = "scope: model takes one threshold over a model, so density must be the same for all of its tensors"
    if fault is not None:
        raise RecipeError(fault, next(s.place for s in _settings(document) if s.parameter.name == "scope"))


# --- configs ---

_COUNTS = "num_hidden_layers n_layer num_layers n_layers depth num_decoder_layers encoder_layers decoder_layers"
_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")  # lists with an entry per layer
_MATHS = (
    "model_type rope_theta rope_scaling rope_parameters partial_rotary_factor rms_norm_eps layer_norm_eps"
    " layer_norm_epsilon norm_eps hidden_act hidden_activation activation_function num_attention_heads"
    " num_key_value_heads n_head head_dim sliding_window attn_logit_softcapping final_logit_softcapping"
    " num_experts_per_tok"
)


def _sections(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """A config and those nested in it, such as text_config, by their key; its own is empty."""
    nested = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return {"": config, **nested}


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return _sections(config).get(key, {})


def _stated(config: Mapping[str, Any], key: str) -> Any:
    return next((section[key] for section in _sections(config).values() if key in section), None)


def _entry(config: Mapping[str, Any], name: str, layer: int) -> Any:
    """The entry of a layer in a list of a config, None where there is none."""
    entries = config.get(name)
    return entries[layer] if isinstance(entries, list) and layer < len(entries) else None


def _count_key(config: Mapping[str, Any], stack: str, count: int) -> str | None:
    """The key of a config that counts the layers of a stack: where several would do, one that shares a word with it."""
    keys = [
        f"{name}.{key}" if name else key
        for name, section in _sections(config).items()
        for key in _COUNTS.split()
        if section.get(key) == count
    ]
    words = set(re.split(r"[._]", stack))
    return next((key for key in keys if words & set(re.split(r"[._]", key))), keys[0] if keys else None)


def _warn_of_configs(models: Sequence[Checkpoint | Planned]) -> None:
    first = models[0]
    numbers = [section.get(key) for section in _sections(first.config).values() for key in _COUNTS.split()]
    stated = {number for number in numbers if isinstance(number, int)}
    counts: dict[str, int] = {}
    for stack, layer in _numbered(first.tensors):
        counts[stack] = max(layer + 1, counts.get(stack, 0))
    if stated and counts and not stated & set(counts.values()):
        said, held = (" and ".join(map(str, sorted(kinds))) for kinds in (stated, set(counts.values())))
        _warn(f"config.json of {first.name!r} speaks of {said} layers, and its tensors are of {held}")
    for model in models[1:]:
        differing = [
            f"{key} ({ours[key]!r} and {theirs[key]!r})"
            for name, ours in _sections(first.config).items()
            for theirs in (_section(model.config, name),)
            for key in _MATHS.split()
            if key in ours and key in theirs and ours[key] != theirs[key]
        ]
        if differing:
            _warn(
                f"the configs of {first.name!r} and {model.name!r} differ in {', '.join(differing)}; the first is kept"
            )


def _tied(name: str, tied: str, untied: str) -> str:
    return (
        f"{name!r} is tied to the embeddings in {tied} and not in {untied}: save both one way, with {name!r} and"
        " tie_word_embeddings: false, or without it and with true"
    )


_QUANTISED = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".absmax",
    ".SCB",
    "_blocks",
)


def _quantised(model: Checkpoint | Planned) -> str | None:
    """What shows that a model's numbers are codes, which mean nothing without their scales."""
    if isinstance(config := _stated(model.config, "quantization_config"), dict):
        return f"quantization_config in config.json, method {config.get('quant_method', 'unknown')!s}"
    return next(
        (f"{name!r} is {info.dtype}" for name, info in model.tensors.items() if name.endswith(_QUANTISED)), None
    )


def _rename(wanted: set[str], names: set[str], reference: str) -> str | None:
    """The renaming that would make most of a model's names those of the reference."""
    missing, extra = wanted - names, names - wanted
    if not missing or not extra:
        return None
    probe = max(missing, key=len)
    added = next((name[: -len(probe)] for name in extra if name.endswith(f".{probe}")), None)
    dropped = next((probe[: -len(name)] for name in extra if probe.endswith(f".{name}")), None)
    if added and 2 * sum(name.removeprefix(added) in missing for name in extra) > len(missing):
        return f"has names that begin with {added!r}, unlike {reference}: remove that from them"
    if dropped and 2 * sum(f"{dropped}{name}" in missing for name in extra) > len(missing):
        return f"has names without the {dropped!r} of {reference}: put that before them"
    if 2 * sum(name.replace("_orig_mod.", "") in missing for name in extra) > len(missing):
        return "has names with '_orig_mod.', which torch.compile puts there: remove that from them"
    return None


# --- buffers ---

_CHUNK = 1 << 20


def _equal(first: Checkpoint | Planned, name: str, second: Checkpoint | Planned, other: str) -> bool:
    """Whether two tensors of the same dtype and shape have the same bytes, read a chunk at a time."""
    (one, ours), (two, theirs) = _stored(first, name), _stored(second, other)
    try:
        with one.file_of(ours).open("rb") as left, two.file_of(theirs).open("rb") as right:
            info = one.tensors[ours]
            left.seek(info.begin)
            right.seek(two.tensors[theirs].begin)
            sizes = (min(_CHUNK, info.nbytes - done) for done in range(0, info.nbytes, _CHUNK))
            return all(left.read(size) == right.read(size) for size in sizes)
    except OSError as error:
        raise CheckpointError(f"cannot compare {name!r} in {first.name!r} and {second.name!r}: {error}") from None


def _stored(model: Checkpoint | Planned, name: str) -> tuple[Checkpoint, str]:
    """Where the bytes of a buffer lie; what an earlier stage copies, lies where it copies it from."""
    while isinstance(model, Planned):
        place, name = next(job for job in model.stage.jobs if job.name == name).inputs[0]
        model = model.stage.models[place]
    return model, name


def _warn(message: str) -> None:
    warnings.warn(message, FastmergeWarning, stacklevel=2)
