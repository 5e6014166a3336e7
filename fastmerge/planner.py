"""Plans: from a recipe and the headers of its checkpoints, one `Job` per output tensor and the layout of the shards."""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from . import configs, layers
from .checkpoint import (
    DTYPE_BITS,
    GENERATION,
    Checkpoint,
    Layout,
    TensorInfo,
    lay_out,
    open_checkpoint,
    same_bytes,
    tokenizer_files,
)
from .checkpoint.header import read_small
from .embeddings import Rows, rows_of
from .errors import CheckpointError, FastmergeWarning, RecipeError
from .fit import BUFFERS, FLOATS, Fit, common
from .hub import Snapshot, snapshot
from .layers import Row
from .methods import METHODS, Base, Method, Settings, by_columns, by_rows, rescale_of
from .recipe import Document, Model, Module, Recipe, Repository, Slice
from .settings import Resolver
from .sources import lora
from .sources.adapter import Adapter, open_adapter
from .sources.lora import Adapted
from .sources.rows import Gather
from .sweep import Rescale
from .vary import Variant, Vary, variants
from .vocabulary.templates import chat_template, with_template
from .vocabulary.tokens import Tokenized, Vocabulary
from .vocabulary.tokens import vocabulary as make_vocabulary

SHARD_SIZE = 5_000_000_000


class Source(NamedTuple):
    """An input: the index of its model in `Stage.models`, and its name there."""

    model: int
    tensor: str


class Job(NamedTuple):
    """One tensor of each output. `inputs` are the models that take part, in recipe order, an endpoint base first;
    `base` is what deltas are taken from. A `copy` has one input, whose bytes are the outputs'."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[Source, ...]
    base: Source | None
    infos: tuple[TensorInfo, ...]  # of `sources`
    nbytes: int  # of all of them
    method: Method
    variants: tuple[Settings, ...]  # one per output
    copy: bool = False
    gather: Gather | None = None  # where not all inputs are stored as they are; `infos` are then as they come out

    @property
    def settings(self) -> Settings:
        """Those of the first output."""
        return self.variants[0]

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that is read, the base last."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def direct(self) -> bool:
        """Whether it is no sweep, but a function of whole tensors."""
        return not self.copy and (self.method.direct or by_columns(self.variants[0]))

    @property
    def passes(self) -> int:
        """How often the inputs are read: once, and once more for each thing that the method measures first."""
        return 1 if self.copy else _passes(self.method, self.variants)


@dataclass(frozen=True, slots=True)
class Stage:
    """One document of the recipe. `donor` gives config and tokenizer files; `config_changes` are the keys of its
    config.json that change, a nested config such as text_config as a whole. Where the document varies, its outputs have
    all of this in common."""

    name: str | None
    document: Document
    models: tuple[Checkpoint | Planned, ...]
    jobs: tuple[Job, ...]
    layout: Layout
    donor: Checkpoint
    config_changes: dict[str, Any]
    tokenizer: Mapping[str, bytes] | None  # its files; None: those of the donor

    @property
    def commits(self) -> dict[str, str]:
        """What each model from the hub was, by name; those of the stages that it needs too."""
        own: dict[str, str] = {}
        for model in self.models:
            if isinstance(model, Planned):
                own |= model.stage.commits
            elif isinstance(model, Adapted):
                own |= model.commits
            elif model.commit:
                own[model.name] = model.commit
        return own

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, each counted once."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def bytes_written(self) -> int:
        """Bytes of one output."""
        return sum(shard.size for shard in self.layout.shards)


class Planned:
    """What an earlier stage will write, with the interface of a `Checkpoint` as far as headers go."""

    files: ClassVar[tuple[Path, ...]] = ()

    def __init__(self, name: str, stage: Stage) -> None:
        self.name = name
        self.stage = stage
        self.config = {**stage.donor.config, **stage.config_changes}
        self.jobs = {job.name: job for job in stage.jobs}
        self.tensors: Mapping[str, TensorInfo] = {
            name: _info(self.jobs[name], begin)
            for shard in stage.layout.shards
            for name, begin in shard.offsets.items()
        }

    @property
    def folder(self) -> Path:
        return self.stage.donor.folder


def opened(model: Checkpoint | Planned, written: Mapping[str | None, Checkpoint]) -> Checkpoint:
    """A model to read: as it is, or what its stage has written by now."""
    if isinstance(model, Planned):
        return written[model.name]
    if isinstance(model, Adapted) and isinstance(model.base, Planned):
        return model.over(written[model.base.name])
    return model


@dataclass(frozen=True, slots=True)
class Plan:
    """All stages of a recipe in order, the result last, of which there is one output per variant."""

    stages: tuple[Stage, ...]
    variants: tuple[Variant, ...]

    @property
    def bytes_read(self) -> int:
        """Bytes of all inputs, each counted once a stage; methods that measure first read theirs again."""
        return sum(stage.bytes_read for stage in self.stages)

    @property
    def bytes_written(self) -> int:
        *before, result = self.stages
        return sum(stage.bytes_written for stage in before) + len(self.variants) * result.bytes_written

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data for json.dumps."""
        return {
            "stages": [_stage_json(stage) for stage in self.stages],
            "outputs": [variant.name for variant in self.variants],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
        }


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the garbage collector: nearly all objects made here stay, and looking for cycles among ever more of them
    took a quarter of the time of a merge of tiny tensors."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def plan(
    recipe: Recipe,
    *,
    seed: int | None = None,
    shard_size: int = SHARD_SIZE,
    vary: Vary = MappingProxyType({}),
) -> Plan:
    """Plans a merge from headers and configs. `seed` goes before the recipe's own (default 0); `shard_size` in bytes;
    with `vary` there is one output per combination of the values that parameters take.

    An output has the recipe's `out_dtype`, else its `dtype`, else the dtype that holds all of its inputs (BF16 with F16
    gives F32). Raises `RecipeError`, `CheckpointError`, or `MismatchError` with the first 20 reasons why the models do
    not fit one another; a `FastmergeWarning` tells of what is odd but defined.
    """
    varied = variants(recipe, vary)
    opened: dict[Model, Checkpoint | Planned] = {}
    stages: list[Stage] = []
    for document in recipe.documents:
        for model in document.models:
            if model not in opened:
                opened[model] = _opened(model, opened)
        own = seed if seed is not None else document.seed or 0
        result = document is recipe.documents[-1]
        planner = Planner(
            [variant.document for variant in varied] if result else [document],
            {model: opened[model] for model in document.models},
            own,
        )
        stage = planner.stage(shard_size)
        stages.append(stage)
        if document.name is not None:
            opened[Model(document.name, None)] = Planned(document.name, stage)
    return Plan(tuple(stages), varied)


def _opened(model: Model, met: dict[Model, Checkpoint | Planned]) -> Checkpoint:
    """A model; where it has an adapter, over its base, which may have been met before."""
    if model.adapter is None:
        if model.repository is None:
            return open_checkpoint(str(model.path))
        folder, commit = _fetched(model.repository)
        return open_checkpoint(folder, name=model.name, commit=commit)
    whole = model._replace(adapter=None)
    if whole not in met:
        met[whole] = _opened(whole, met)
    base = met[whole]
    assert not isinstance(base, Adapted)
    made = Adapted(base, _adapter(model.adapter))
    if made.moves_head:
        fault = "its head is tied to the embeddings that the adapter changes, and changes with them"
        warnings.warn(f"{made.name}: {fault}", FastmergeWarning, stacklevel=2)
    return made


def _adapter(model: Model) -> Adapter:
    if model.repository is None:
        return open_adapter(str(model.path))
    folder, commit = _fetched(model.repository, adapter=True)
    return open_adapter(folder, name=model.name, commit=commit)


def _fetched(repository: Repository, **kind: bool) -> Snapshot:
    """What is on the hub."""
    try:
        return snapshot(repository.id, repository.revision, **kind)
    except CheckpointError as error:
        raise CheckpointError(f"{repository.place}: {error}".removeprefix(": ")) from None


@lru_cache
def _passes(method: Method, variants: tuple[Settings, ...]) -> int:
    if method.direct or by_columns(variants[0]):
        return 1
    matching = [settings for settings in variants if rescale_of(method, settings) is not Rescale.NONE]
    selections = len(_densities(variants)) if method.selects else 0
    return 1 + selections + method.gram + len(_densities(matching))


def _densities(variants: Iterable[Settings]) -> set[tuple[Any, ...]]:
    """What is kept of the models, in different ways, each of which is measured for itself."""
    return {tuple((model.get("density"), model.get("gamma")) for model in settings.models) for settings in variants}


def _info(job: Job, begin: int) -> TensorInfo:
    end = begin + math.prod(job.shape) * DTYPE_BITS[job.dtype] // 8
    return TensorInfo(job.name, job.dtype, job.shape, begin, end)


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
                "passes": job.passes,
                "gathered": job.gather is not None,
                "fused": not job.direct,
                "method": "copy" if job.copy else job.method.name,
                "parameters": {} if job.copy else dict(job.settings.shared),  # of the first output
                "model_parameters": [] if job.copy else [dict(model) for model in job.settings.models],
            }
            for job in stage.jobs
        ],
        "bytes_read": stage.bytes_read,
        "bytes_written": stage.bytes_written,
    }


# --- one stage ---

_PASSTHROUGH = METHODS["passthrough"]
_AS_IT_IS = Settings({}, ({"scale": None},))


@dataclass(slots=True)
class _Way:
    """How tensors are merged that the same models have in the same dtypes; models are known by their place in the
    slice. `resolved` are the settings of each variant, and whether with all of them the sweep changes nothing."""

    stored: str
    dtype: str
    method: Method
    takers: tuple[int, ...]
    base: tuple[int, ...]  # what deltas are taken from, where they are
    resolved: tuple[tuple[Settings, ...], bool] | None = None


class Planner:
    """Plans one document, given as often as it has variants, whose `parameters` alone differ."""

    def __init__(self, documents: Sequence[Document], models: Mapping[Model, Checkpoint | Planned], seed: int) -> None:
        self.documents = documents
        self.document = documents[0]
        self.by_name = models
        self.models = tuple(models.values())
        self.index = {model: place for place, model in enumerate(models)}
        self.seed = seed
        self.fit = Fit(self.models)
        self.rows: Rows | None = None
        self.gathers = any(isinstance(model, Adapted) for model in self.models)

    def stage(self, shard_size: int) -> Stage:
        configs.warn_of_differences(self.models)
        vocabulary = self.vocabulary()
        left_out = self.fit.left_out()
        towers = list(layers.towers(self.document, {model: held.tensors for model, held in self.by_name.items()}))
        jobs = [
            job
            for tower in towers
            for slice_, rows in tower.slices
            for job in self.jobs(tower.module, slice_, (row for row in rows if row.name not in left_out))
        ]
        self.fit.check(self.document.place, (source.model for job in jobs if not job.copy for source in job.sources))
        _warn_of_filters(self.document, jobs)
        _check_scope(self.document, jobs)
        _check_rows(self.document, jobs)
        donor, kept = self.models[0], {stack: kept for tower in towers for stack, kept in tower.layers.items()}
        changes = configs.changes(self.by_name, kept, {job.dtype for job in jobs if job.dtype in FLOATS})
        if isinstance(donor, Planned):
            changes = {**donor.stage.config_changes, **changes}
            donor = donor.stage.donor
        if vocabulary is not None:
            changes |= vocabulary.token_ids({**donor.config, **changes})
            changes |= configs.restated({**donor.config, **changes}, "vocab_size", vocabulary.size)
        layout = lay_out([(job.name, job.dtype, job.shape) for job in jobs], shard_size)
        files = self.tokenizer_files(vocabulary)
        return Stage(self.document.name, self.document, self.models, tuple(jobs), layout, donor, changes, files)

    def vocabulary(self) -> Vocabulary | None:
        """That of the output, where the recipe says which."""
        if self.document.tokenizer is None:
            return None
        tokenized = [Tokenized(model.name, _tokenizer_of(model), rows_of(model)) for model in self.models]
        made = make_vocabulary(tokenized, self.document.tokenizer)
        rows = Rows(made, self.models)
        if not rows.trivial:
            self.rows, self.gathers = rows, True
        return made

    def tokenizer_files(self, vocabulary: Vocabulary | None) -> Mapping[str, bytes] | None:
        """The files of the output's tokenizer, where they are not the donor's."""
        first, setting = self.models[0], self.document.chat_template
        if vocabulary is None and setting is None:
            if isinstance(first, Adapted) and first.tokenizer_folder is not None:
                return _tokenizer_of(first)
            return first.stage.tokenizer if isinstance(first, Planned) else None
        files = dict(_tokenizer_of(first)) if vocabulary is None else vocabulary.files
        if setting is not None and (template := chat_template(setting, map(_tokenizer_of, self.models))) is not None:
            files = with_template(files, template)
        return files if vocabulary is None else files | _generation(first, vocabulary)

    def jobs(self, module: Module, slice_: Slice, rows: Iterable[Row]) -> Iterator[Job]:
        """The jobs of a slice, without the tensors that do not fit."""
        document = self.document
        resolvers = [Resolver(variant, module, slice_, self.seed) for variant in self.documents]
        models = [self.index[source.model] for source in slice_.sources]
        tensors = [self.models[model].tensors for model in models]
        origin = slice_.base if document.method.base.apart else None
        order = [i for i in range(len(models)) if i != origin]
        if document.method.base is Base.ENDPOINT:
            order.sort(key=lambda i: i != (slice_.base or 0))
        varies = any(resolver.varies for resolver in resolvers)
        ways: dict[tuple[str | None, ...], _Way] = {}
        for row in rows:
            infos = [tensors[i].get(name) for i, name in enumerate(row.inputs)]
            if self.rows is not None:
                infos = [
                    self.rows.resized(info) if info is not None and self.rows.covers(model, info) else info
                    for model, info in zip(models, infos, strict=True)
                ]
            if not self.fit.tensor(row.name, models, infos, origin):
                continue
            dtypes = tuple([info and info.dtype for info in infos])
            if (way := ways.get(dtypes)) is None:
                way = ways[dtypes] = self.way(infos, order, origin)
            sources = list(map(Source, models, row.inputs))
            if way.stored in BUFFERS and not self.same(row.name, way.stored, sources, infos):
                continue
            resolved = way.resolved or _resolved(resolvers, row, way.takers)
            if not varies:
                way.resolved = resolved
            settings, unchanged = resolved
            copy = unchanged and not way.base and way.dtype == way.stored
            if copy or way.stored in FLOATS:
                inputs = tuple([sources[i] for i in way.takers])
                base = sources[way.base[0]] if way.base else None
                read = tuple([info for i in way.takers + way.base if (info := infos[i])])
                nbytes = sum([info.end - info.begin for info in read])
                gather = self.gather(row, models, (*inputs, base) if base else inputs) if self.gathers else None
                shape = read[0].shape
                yield Job(row.name, way.dtype, shape, inputs, base, read, nbytes, way.method, settings, copy, gather)
            else:
                holder = self.fit.name(sources[way.takers[0]].model)
                self.fit.problems.append(f"{row.name!r} is {way.stored} in {holder}: dequantise it to merge it")

    def way(self, infos: Sequence[TensorInfo | None], order: Sequence[int], origin: int | None) -> _Way:
        """How a tensor is merged that is in these models, with deltas from the one at `origin`."""
        held = {i: info for i, info in enumerate(infos) if info is not None}
        first, stored = next((i, info.dtype) for i, info in held.items())
        takers = tuple([i for i in order if i in held])
        dtype = stored if stored in BUFFERS else self.document.out_dtype or self.document.dtype or common(held.values())
        if stored in BUFFERS or not takers:  # what is the same in all, or in the base alone, stays as it is
            as_it_is = (_AS_IT_IS,) * len(self.documents), True
            return _Way(stored, dtype, _PASSTHROUGH, takers[:1] or (first,), (), as_it_is)
        method = self.document.method
        alone = method.base is Base.OPTIONAL and len(takers) == 1  # then it stays as it is
        return _Way(stored, dtype, method, takers, () if alone or origin is None else (origin,))

    def gather(self, row: Row, models: Sequence[int], sources: Sequence[Source]) -> Gather | None:
        """How the inputs of a tensor come about, where they are not all stored as they are."""
        names = dict(zip(models, row.inputs, strict=True))
        first = sources[0]
        if self.rows and self.rows.covers(first.model, self.models[first.model].tensors[first.tensor]):
            others = dict.fromkeys(range(len(self.models)), row.name)
            held = {model: name for model, name in {**others, **names}.items() if name in self.models[model].tensors}
            try:
                return self.rows.gather([source.model for source in sources], held)
            except KeyError as error:
                whose = self.fit.name(error.args[0])
                self.fit.problems.append(f"{row.name!r} is missing in {whose}, whose rows some tokens have")
                return None
        computed = [
            model.computed(source.tensor)
            for source in sources
            if isinstance(model := self.models[source.model], Adapted)
        ]
        return Gather((None,) * len(sources), dict(sources)) if any(computed) else None

    def same(self, name: str, dtype: str, sources: Sequence[Source], infos: Sequence[TensorInfo | None]) -> bool:
        """Whether a buffer has the same bytes in all models that have it; a problem where not."""
        first, *others = (source for source, info in zip(sources, infos, strict=True) if info is not None)
        for other in others:
            if not same_bytes(*self.stored(first), *self.stored(other)):
                pair = f"{self.fit.name(first.model)} and {self.fit.name(other.model)}"
                self.fit.problems.append(f"{name!r} holds {dtype} values, which differ in {pair}")
                return False
        return True

    def stored(self, source: Source) -> tuple[Checkpoint, str]:
        """Where the bytes of a buffer lie; what an earlier stage copies, lies where it copies it from."""
        model, name = self.models[source.model], source.tensor
        while isinstance(model, Planned | Adapted):
            if isinstance(model, Planned):
                at = model.jobs[name].inputs[0]
                model, name = model.stage.models[at.model], at.tensor
            else:
                held, name = model.stored(name)
                assert isinstance(held, Checkpoint | Planned)
                model = held
        return model, name


def _resolved(resolvers: Sequence[Resolver], row: Row, takers: tuple[int, ...]) -> tuple[tuple[Settings, ...], bool]:
    settings, unchanged = zip(*[resolver.resolve(row, takers) for resolver in resolvers], strict=True)
    return settings, all(unchanged)


def _tokenizer_of(model: lora.Base) -> Mapping[str, bytes]:
    """The files of a model's tokenizer, by name."""
    if isinstance(model, Adapted):
        if model.tokenizer_folder is not None:
            return tokenizer_files(model.tokenizer_folder)
        return _tokenizer_of(model.base)
    if isinstance(model, Planned):
        return tokenizer_files(model.stage.donor.folder) if model.stage.tokenizer is None else model.stage.tokenizer
    return tokenizer_files(model.folder)


def _generation(first: Checkpoint | Planned, vocabulary: Vocabulary) -> dict[str, bytes]:
    """The generation_config.json of the first model, where the ids of its special tokens are others now."""
    file = (first.stage.donor if isinstance(first, Planned) else first).folder / GENERATION
    try:
        said = json.loads(read_small(file)) if vocabulary.moved else {}
        said = said if isinstance(said, dict) else {}
    except (CheckpointError, ValueError, RecursionError):
        said = {}
    changes = vocabulary.token_ids(said)
    return {GENERATION: json.dumps(said | changes, indent=2).encode()} if changes else {}


def _warn_of_filters(document: Document, jobs: Sequence[Job]) -> None:
    filters = {c.filter: c.place for setting in document.settings for c in setting.conditions if c.filter is not None}
    if filters:
        names = "\n".join({name for job in jobs for name in (job.name, *(source.tensor for source in job.sources))})
        for text, place in filters.items():
            if text not in names:
                warnings.warn(f"{place}: the filter {text!r} matches no tensor", FastmergeWarning, stacklevel=2)


def _check_scope(document: Document, jobs: Sequence[Job]) -> None:
    """One threshold over a whole model needs one density, and every tensor, in each model."""
    merged = [job for job in jobs if job.method is document.method and not job.copy]
    for variant in zip(*(job.variants for job in merged), strict=True):
        scopes = {settings.shared.get("scope") for settings in variant}
        if "model" not in scopes:
            continue
        fault = None
        if len(scopes) > 1:
            fault = "scope is model for some tensors only; set it for all"
        elif len({tuple(source.model for source in job.inputs) for job in merged}) > 1:
            fault = "scope: model takes one threshold over a model, so every tensor must come from the same models"
        elif len(_densities(variant)) > 1:
            fault = "scope: model takes one threshold over a model, so density must be the same for all of its tensors"
        if fault is not None:
            raise RecipeError(fault, next(s.place for s in document.settings if s.parameter.name == "scope"))


def _check_rows(document: Document, jobs: Sequence[Job]) -> None:
    """Each row may be merged as a tensor of its own, in all outputs or in none."""
    for each in {job.variants for job in jobs}:
        if len({(by_rows(settings), by_columns(settings)) for settings in each}) > 1:
            raise RecipeError("some outputs are merged row by row and some not; merge them one by one", document.place)
