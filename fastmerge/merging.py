"""Merges into memory: of models that are there or mapped, into new tensors or given ones."""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from . import backends, tensors
from .batches import BATCH_BYTES, Batch, Reader, in_batches, row_of
from .checkpoint import Checkpoint
from .errors import BackendError, FastmergeWarning, MismatchError, NonFiniteError
from .fit import BUFFERS, FLOATS
from .keywords import Keywords, document, method_of
from .measures import Cuts, model_cuts, swept
from .planner import SHARD_SIZE, Job, Source, Stage
from .recipe import Document, Model
from .states import InMemoryPlanner, Place, StateDict, Weights, held_in, opened, same
from .sweep import Found, Run, Target
from .tensors import CPU, Held


class Merging:
    """Merges of some models by one method: `plan`, then `into`.

    `base` is one of the models where it is the same object; else it comes after them.

    Raises:
        RecipeError: there is no such method.
        CheckpointError: a folder holds no sound model.
        MismatchError: a tensor cannot be read where it lies.
    """

    def __init__(
        self,
        method: str,
        models: Sequence[Weights],
        base: Weights | None,
        *,
        seed: int,
        backend: str,
        threads: int | None,
        nonfinite: str,
    ) -> None:
        if nonfinite not in ("error", "propagate"):
            raise ValueError(f'nonfinite is "error" or "propagate", not {nonfinite!r}')
        if not hasattr(seed, "__index__"):
            raise TypeError(f"seed is {seed!r}, and must be a whole number")
        if isinstance(models, Mapping | str):
            raise TypeError("models is a list of models, also where it is one")
        self.method = method_of(method)
        self.names = [f"models[{at}]" for at in range(len(models))]
        own = next((at for at, model in enumerate(models) if model is base), len(models))
        self.base = None if base is None else own
        self.models = [opened(name, model) for name, model in zip(self.names, models, strict=True)]
        if base is not None and own == len(models):
            self.models.append(opened("base", base))
        self.reader = Reader(self.models, nonfinite == "propagate")
        self.seed = int(seed)
        self.backend = backend
        self.threads = backends.workers(threads)

    def plan(self, keywords: Keywords, *, single: bool = False) -> Stage:
        """A job for each tensor. Raises RecipeError for a parameter, MismatchError where models do not fit."""
        made = self.document(keywords, single=single)
        stage = InMemoryPlanner([made], self.by_model(made), self.seed).stage(SHARD_SIZE)
        for job in stage.jobs:
            self.check(job)
        return stage

    def document(self, keywords: Keywords, *, single: bool = False) -> Document:
        return document(self.method, self.names, self.base, keywords, single=single)

    def by_model(self, made: Document) -> dict[Model, Checkpoint]:
        sources = made.modules[0].slices[0].sources
        return {source.model: held for source, held in zip(sources, self.models, strict=True)}

    def into(self, stage: Stage, into: Mapping[str, MutableMapping[str, Any]]) -> None:
        """Does the jobs. There is a mapping for each variant, by the name that errors call it: see `Outputs`.

        Raises:
            NonFiniteError: NaN or Inf in an input; outputs before it are written.
            BackendError: who was asked for does not take these tensors, or there is no one.
        """
        outputs = Outputs(self, stage, into)
        cuts = self.cuts(stage)
        overflown: dict[str, int] = {}
        for device, mine in groupby(outputs.jobs(), self.device):
            for jobs in in_batches(stage, list(mine), attrgetter("nbytes"), BATCH_BYTES):
                found_of = dict(self._swept(jobs, device, cuts, outputs))
                for job in jobs:
                    found = found_of[job.name]
                    if any(found.nonfinite) and not self.reader.propagate:
                        raise self._nonfinite(job, found)
                    if count := sum(found.overflow):
                        overflown[job.name] = count
                    outputs.keep(job)
        for model in self.models:
            model.check_unchanged()
        _warn_of_overflow(overflown)

    # --- what a session does its own way ---

    #: Whether an output may be one of its inputs; what to say where it is not.
    in_place, or_else = True, ", or exactly that of one of its own inputs"

    def ops(self, dtypes: Iterable[str], device: str, wanted: str, *, rows: bool) -> backends.Ops:
        """The ops on a kind of device, for tensors that are measured whole, or by `rows`."""
        return backends.Ops(wanted, dtypes, device, {})

    def mapped(self, jobs: Sequence[Job]) -> Batch:
        return self.reader.mapped(jobs)

    def cuts(self, stage: Stage) -> Cuts:
        return model_cuts(stage, self.reader, self.backend, {}, Run(self.threads))

    # --- devices ---

    def place(self, source: Source) -> Place | None:
        """Where an input lies; None where it is mapped from a file."""
        model = self.models[source.model]
        return model.places[source.tensor] if isinstance(model, StateDict) else None

    def device(self, job: Job) -> str:
        place = self.place(job.sources[0])
        return place[0] if place else CPU

    def by_torch(self, job: Job) -> bool:
        """Whether the output of a job is torch's: where an input in memory is, and where torch is there for others."""
        held = [self.models[source.model] for source in job.sources]
        known = [
            model.by_torch[source.tensor]
            for model, source in zip(held, job.sources, strict=True)
            if isinstance(model, StateDict)
        ]
        return any(known) if known else tensors.torch_is_there()

    def check(self, job: Job) -> None:
        """What the planner does not know of: where tensors lie, and who may merge them there."""
        places = [self.place(source) for source in job.sources]
        devices = [place[0] if place else CPU for place in places]
        if len(set(devices)) > 1:
            at = next(i for i, device in enumerate(devices) if device != devices[0])
            here, there = (self.models[job.sources[i].model].name for i in (0, at))
            raise MismatchError(
                f"{_said(job)} lies on {devices[0]} in {here} and on {devices[at]} in {there}: bring them together"
            )
        on_gpu = devices[0] != CPU
        if job.copy:
            return
        if self.backend != "auto" and (backends.device_of(self.backend) != "cpu") != on_gpu:
            fault = f"backend {self.backend} does not work where {_said(job)} lies, on {devices[0]}"
            raise BackendError(f"{fault}: ask for auto")
        if job.direct and (on_gpu or self.backend == "cpu"):
            how = "" if job.method.direct else " by columns (nuslerp_row_wise)"
            fault = f"{job.method.name}{how} is not fused, and runs by torch on tensors of the CPU"
            raise BackendError(f"{fault}: bring them there" if on_gpu else f"{fault}: ask for auto or torch")
        if on_gpu and job.settings.shared.get("scope") == "model":
            raise BackendError("scope: model selects among tensors of the CPU: bring them there")

    # --- sweeps ---

    def _swept(self, jobs: Sequence[Job], device: str, cuts: Cuts, outputs: Outputs) -> Iterator[tuple[str, Found]]:
        batch = self.mapped(jobs)
        shares: dict[tuple[Any, ...], Batch] = {}
        for job, inputs in zip(batch.jobs, batch.inputs, strict=True):
            places = outputs.places(job)
            if self.reader.raw(job) and device != CPU:
                (source,) = job.sources
                for place in places:
                    tensors.copy(held_in(self.models[source.model], source.tensor), place)
                yield job.name, Found((0,), (-1,), (0,) * len(places))
                continue
            dtypes = frozenset((*self.reader.dtypes(job)[:-1], *(self._written(job, place) for place in places)))
            share = shares.setdefault((job.direct, bool(row_of(job)), dtypes), Batch([], [], batch.owners))
            share.jobs.append(job)
            share.inputs.append(inputs)
        for (direct, rows, dtypes), share in shares.items():
            ops = self.ops(dtypes, "cpu" if device == CPU else "gpu", "torch" if direct else self.backend, rows=rows)
            targets = [
                [Target(self._written(job, place), place.address) for place in outputs.places(job)]
                for job in share.jobs
            ]
            with tensors.running(device, self.threads) as run:
                found = swept(share, ops, cuts, targets, run)
            yield from zip([job.name for job in share.jobs], found, strict=True)

    def _written(self, job: Job, place: Held) -> str:
        return "U8" if self.reader.raw(job) else place.dtype

    def _nonfinite(self, job: Job, found: Found) -> NonFiniteError:
        at = next(i for i, count in enumerate(found.nonfinite) if count)
        source = job.sources[at]
        which = f"tensor {source.tensor!r} holds" if source.tensor else "it holds"
        return NonFiniteError(
            f"{self.models[source.model].name}: {which} {found.nonfinite[at]:,} NaN or Inf, the first at index "
            f'{found.first[at]:,}; mend the model, or let them through with nonfinite="propagate"'
        )


class Outputs:
    """Where the tensors of a stage go: for each of its variants into a mapping, where they are given or made.

    An empty mapping gets new tensors. One that is not has a tensor for each output, which is written; two that are one
    and the same are written once. An output may be an input of its own, and no other.

    Raises:
        TypeError: what is given is no tensor.
        MismatchError: what is given is not what is merged, or lies where something else does.
    """

    def __init__(self, merging: Merging, stage: Stage, into: Mapping[str, MutableMapping[str, Any]]) -> None:
        for name, out in into.items():
            if not isinstance(out, MutableMapping):
                raise TypeError(f"{name} is a {type(out).__qualname__}: give a dict")
        self._merging = merging
        self._into = list(into.values())
        self._jobs = {job.name: job for job in stage.jobs}
        self._given = [self._looked(name, out) if out else None for name, out in into.items()]
        self._tied = [self._twice(name, given or {}) for name, given in zip(into, self._given, strict=True)]
        #: Outputs that are made apart and copied, so that nothing reads what was written over it.
        self._apart = self._overlapping(list(into))
        self._places: dict[str, list[Held]] = {}

    def jobs(self) -> Iterator[Job]:
        """What is to be done: what is written elsewhere anyway is not, and what has another dtype there is no copy."""
        for name, job in self._jobs.items():
            if all(name in tied for tied in self._tied):
                continue
            dtypes = {given[name].dtype for given in self._given if given}
            yield job._replace(copy=False) if job.copy and dtypes - {job.dtype} else job

    def places(self, job: Job) -> list[Held]:
        """What a job is to write, until it is kept."""
        if job.name not in self._places:
            self._places[job.name] = [self._place(job, given, tied) for given, tied in self._each()]
        return self._places[job.name]

    def keep(self, job: Job) -> None:
        """A job is done."""
        for out, (given, tied), made in zip(self._into, self._each(), self._places.pop(job.name), strict=True):
            if given is None:
                out[job.name] = made.value
            elif job.name not in tied:
                one = given[job.name]
                if made is not one:
                    tensors.copy(made, one)
                tensors.changed(one)

    def _each(self) -> Iterator[tuple[dict[str, Held] | None, Mapping[str, str]]]:
        return zip(self._given, self._tied, strict=True)

    def _place(self, job: Job, given: dict[str, Held] | None, tied: Mapping[str, str]) -> Held:
        one = given[job.name] if given else None
        if one is not None and job.name not in tied and job.name not in self._apart:
            return one
        dtype, by_torch = (one.dtype, one.of_torch) if one else (job.dtype, self._merging.by_torch(job))
        return tensors.empty(dtype, job.shape, self._merging.device(job), by_torch)

    # --- what is given ---

    def _looked(self, name: str, out: Mapping[str, Any]) -> dict[str, Held]:
        if missing := [tensor for tensor in self._jobs if tensor not in out]:
            fault = f"{name} lacks {len(missing)} tensors of the merge, such as {missing[0]!r}"
            raise MismatchError(f"{fault}: give all of them, or none")
        given = {tensor: tensors.writable(out[tensor], _label(name, tensor)) for tensor in self._jobs}
        for tensor, job in self._jobs.items():
            self._check(_label(name, tensor), given[tensor], job)
        held = {_span(one) for one in given.values()}
        others = [tensor for tensor in out if tensor not in given]
        if more := [tensor for tensor in others if _span(tensors.held(out[tensor], _label(name, tensor))) not in held]:
            raise MismatchError(
                f"{name} has {len(more)} tensors that no model has, such as {more[0]!r}: leave them out"
            )
        return given

    def _check(self, label: str, given: Held, job: Job) -> None:
        if given.shape != job.shape:
            raise MismatchError(f"{label} has the shape {list(given.shape)}, and what is merged {list(job.shape)}")
        if given.dtype != job.dtype and (job.dtype in BUFFERS or given.dtype not in FLOATS):
            raise MismatchError(f"{label} holds {given.dtype}, and what is merged {job.dtype}")
        if given.device != (device := self._merging.device(job)):
            raise MismatchError(f"{label} lies on {given.device} and what is merged on {device}: bring them together")

    def _twice(self, name: str, given: Mapping[str, Held]) -> dict[str, str]:
        """Outputs that are another one by another name, which goes first; in each model they are one, too."""
        firsts: dict[Any, str] = {}
        tied: dict[str, str] = {}
        for tensor, one in given.items():
            first = firsts.setdefault((_span(one), one.dtype, one.shape), tensor) if one.nbytes else tensor
            if first == tensor:
                continue
            tied[tensor] = first
            mine, theirs = (self._jobs[each].sources for each in (tensor, first))
            models = self._merging.models
            for (at, own), (model, other) in zip(mine, theirs, strict=True):
                if at != model or not same(models[at], own, models[model], other):
                    fault = f"{tensor!r} and {first!r} are one tensor in {name}, and two in {models[at].name}"
                    raise MismatchError(f"{fault}: untie them, or leave one out")
        return tied

    def _overlapping(self, names: Sequence[str]) -> frozenset[str]:
        """The outputs that are an input of their own."""
        written = sorted(
            _Written(_span(one), tensor, number)
            for number, (given, tied) in enumerate(self._each())
            for tensor, one in (given or {}).items()
            if tensor not in tied and one.nbytes
        )
        for first, second in pairwise(written):
            if _overlap(first.span, second.span):
                labels = [_label(names[each.number], each.tensor) for each in (first, second)]
                raise MismatchError(f"{' and '.join(labels)} overlap in memory: give each memory of its own")
        apart = set()
        for tensor, job in self._jobs.items() if written else ():
            for source in job.sources:
                place = self._merging.place(source)
                for each in _within(written, place) if place else ():
                    own = tensor in (each.tensor, *(t for t, f in self._tied[each.number].items() if f == each.tensor))
                    if not own or place != each.span or not self._merging.in_place:
                        label, model = _label(names[each.number], each.tensor), self._merging.models[source.model]
                        fault = f"{label} overlaps {_label(model.name, source.tensor)} in memory"
                        raise MismatchError(f"{fault}: give it memory of its own{self._merging.or_else}")
                    apart.add(each.tensor)
        return frozenset(apart)


class _Written(NamedTuple):
    """Memory that an output is written to."""

    span: Place
    tensor: str
    number: int  # of the variant


def _within(written: Sequence[_Written], place: Place) -> Iterator[_Written]:
    """Those that overlap a place, of some that do not overlap one another, in order."""
    device, _, end = place
    at = bisect_left(written, ((device, end),))
    while at and _overlap(written[at - 1].span, place):
        at -= 1
        yield written[at]


def _overlap(one: Place, other: Place) -> bool:
    return one[0] == other[0] and max(one[1], other[1]) < min(one[2], other[2])


def _span(one: Held) -> Place:
    return one.device, one.address, one.address + one.nbytes


def _label(name: str, tensor: str) -> str:
    return f"{name}[{tensor!r}]" if tensor else name


def _said(job: Job) -> str:
    return repr(job.name) if job.name else "a tensor"


def _warn_of_overflow(overflown: Mapping[str, int]) -> None:
    if overflown:
        worst = max(overflown, key=overflown.__getitem__)
        fault = f"{sum(overflown.values()):,} elements in {len(overflown)} tensors became infinite"
        where = f", {overflown[worst]:,} of them in {worst!r}" if worst else ""
        warnings.warn(f"{fault}{where}; an out of a wider dtype holds them", FastmergeWarning, stacklevel=4)
