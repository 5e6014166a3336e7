"""Sessions: models that are held and measured once, and merged again and again with other settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import backends
from .batches import Batch
from .errors import RecipeError
from .fit import BUFFERS
from .keywords import Keyword, Keywords, over
from .layers import Row, towers
from .measures import Cuts
from .merging import Merging
from .methods import Settings, by_columns, by_rows
from .planner import Job, Stage
from .settings import Resolver
from .states import StateDict, Weights, weights_of
from .sweep import Cut, Inputs, Run, Sweep, View


class Session:
    """Models that are merged again and again, to search for the best settings.

        with fastmerge.Session([one, other], base, method="ties", density=0.2) as session:
            for lambda_ in (0.5, 0.7, 1.0):
                session.merge_into(model, weight=[0.6, 0.4], lambda_=lambda_)
                score(model)

    The inputs are held: checkpoints stay mapped, and tensors in memory must not change. What a method wants to know of
    them is measured once for each way of keeping: thresholds for each density, inner products, norms. So a merge with
    another lambda, other weights or another t is one sweep, and it has the bits of `merge_state_dicts`.

    Args:
        models: as `merge_state_dicts` takes them: state dicts, on a CPU or a GPU, or checkpoints.
        base: what deltas are taken from; or one of the two that slerp goes between.
        method: its name in a recipe.
        seed: of the random drops.
        backend: "auto", or a provider by name ("cpu", "torch", "cuda", "triton"), which then never falls back.
        threads: workers on a CPU; by default one for each processor that this process may use.
        nonfinite: "error", or "propagate": NaN and Inf in the inputs go where the arithmetic takes them.
        parameters: those that all merges have, as `merge_state_dicts` takes them.

    Raises:
        RecipeError, CheckpointError, MismatchError, TypeError: as `merge_state_dicts`, here or when merging.
    """

    def __init__(
        self,
        models: Sequence[Weights],
        base: Weights | None = None,
        *,
        method: str,
        seed: int = 0,
        backend: str = "auto",
        threads: int | None = None,
        nonfinite: str = "error",
        **parameters: Keyword,
    ) -> None:
        self._merging: _Kept | None = _Kept(
            method, models, base, seed=seed, backend=backend, threads=threads, nonfinite=nonfinite
        )
        self._parameters = parameters

    def merge(self, *, out: MutableMapping[str, Any] | None = None, **parameters: Keyword) -> MutableMapping[str, Any]:
        """Merges with these parameters, which go before those of the session, into `out` or a new dict.

        `out` is as `merge_state_dicts` takes it, but apart from all inputs; memory that is written again is faster than
        new memory. The errors are those of `merge_state_dicts`.
        """
        return self.merge_many([parameters], outs=None if out is None else [out])[0]

    def merge_many(
        self, settings: Sequence[Keywords], *, outs: Sequence[MutableMapping[str, Any]] | None = None
    ) -> list[MutableMapping[str, Any]]:
        """Merges with several settings at once, from one read of the models: a dict of parameters for each.

        There are as many `outs`, where they are given, each as that of `merge`.
        """
        merging = self._open()
        if outs is not None and len(outs) != len(settings):
            raise ValueError(f"there are {len(outs)} outs for {len(settings)} settings: give one for each")
        if outs is not None and len({id(out) for out in outs}) < len(outs):
            raise ValueError("two outs are one and the same dict: give one for each of the settings")
        if not all(isinstance(own, Mapping) for own in settings):
            raise TypeError("settings is a list of dicts of parameters, also where it is one")
        if not settings:
            return []
        stage = merging.joint([over(self._parameters, own, merging.method) for own in settings])
        into: list[MutableMapping[str, Any]] = [{} for _ in settings] if outs is None else list(outs)
        names = ["out"] if len(into) == 1 else [f"outs[{at}]" for at in range(len(into))]
        merging.into(stage, dict(zip(names, into, strict=True)))
        return into if outs is not None else [{job.name: each[job.name] for job in stage.jobs} for each in into]

    def merge_into(self, module: Any, **parameters: Keyword) -> None:
        """Merges with these parameters into the weights of a live `torch.nn.Module`, as `fastmerge.merge_into` does."""
        merging = self._open()
        settings = over(self._parameters, parameters, merging.method)
        merging.into(merging.joint([settings]), {"module": weights_of(module)})

    def close(self) -> None:
        """Lets go of the models; leaving the context does so, too."""
        self._merging = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session holds memory of this process, and is not pickled or copied: make another")

    def _open(self) -> _Kept:
        if self._merging is None:
            raise ValueError("the session is closed: make another")
        return self._merging


class _Kept(Merging):
    """Merges that share all that does not depend on their settings."""

    in_place, or_else = False, "; the inputs of a session stay as they are"

    def __init__(self, method: str, models: Sequence[Weights], base: Weights | None, **options: Any) -> None:
        super().__init__(method, models, base, **options)
        for model in self.models:
            if isinstance(model, StateDict):
                model.hold()
        self._inputs: dict[tuple[str, bool], tuple[Inputs, list[object]]] = {}
        self._known = _Known({}, {}, {})
        self._cuts: dict[Any, Cuts] = {}
        self._first: Stage | None = None
        self._rows: dict[str, Row] = {}

    def plan(self, keywords: Keywords, *, single: bool = False) -> Stage:
        """The first plan with other settings, unless these depend on one another."""
        if self._first is None:
            self._first = super().plan(keywords, single=single)
            made = self._first.document
            names = {model: held.tensors for model, held in self.by_model(made).items()}
            slices = next(towers(made, names)).slices
            self._rows = {row.name: row for _, rows in slices for row in rows}
            return self._first
        made = self.document(keywords, single=single)
        if any(setting.parameter.name == "scope" for setting in made.settings):
            return super().plan(keywords, single=single)
        (module,) = made.modules
        resolver = Resolver(made, module, module.slices[0], self.seed)
        return replace(self._first, jobs=tuple([self._settled(job, resolver) for job in self._first.jobs]))

    def _settled(self, job: Job, resolver: Resolver) -> Job:
        """A job with other settings, where it has those of the method."""
        stored = job.infos[0].dtype
        if job.method is not self.method or stored in BUFFERS:
            return job
        settings, identity = resolver.resolve(self._rows[job.name], tuple([source.model for source in job.inputs]))
        job = job._replace(variants=(settings,), copy=identity and job.base is None and job.dtype == stored)
        if job.direct:
            self.check(job)
        return job

    def joint(self, settings: Sequence[Keywords]) -> Stage:
        """The merges with several settings as one, of which they are variants."""
        first, *others = stages = [self.plan(keywords) for keywords in settings]
        if not others:
            return first
        jobs = [_joined(jobs) for jobs in zip(*(stage.jobs for stage in stages), strict=True)]
        return replace(first, jobs=tuple(jobs))

    def ops(self, dtypes: Iterable[str], device: str, wanted: str, *, rows: bool) -> backends.Ops:
        """Rows are too many for what is known of each to be kept."""
        if rows:
            return super().ops(dtypes, device, wanted, rows=rows)
        return _Remembering(wanted, dtypes, device, self._known)

    def mapped(self, jobs: Sequence[Job]) -> Batch:
        wanted = {(job.name, self.reader.raw(job)): job for job in jobs}
        for key, job in wanted.items():
            if key not in self._inputs:
                batch = super().mapped([job])
                self._inputs[key] = batch.inputs[0], batch.owners
        held = [self._inputs[key] for key in wanted]
        return Batch(list(jobs), [inputs for inputs, _ in held], [owner for _, owners in held for owner in owners])

    def cuts(self, stage: Stage) -> Cuts:
        job = next((job for job in stage.jobs if not job.copy and "scope" in job.settings.shared), None)
        if job is None:
            return {}
        kept = tuple((each.shared["scope"], _densities(each)) for each in job.variants)
        if kept not in self._cuts:
            self._cuts[kept] = super().cuts(stage)
        return self._cuts[kept]


def _densities(settings: Settings) -> tuple[Any, ...]:
    return tuple((model.get("density"), model.get("gamma")) for model in settings.models)


def _joined(jobs: Sequence[Job]) -> Job:
    """The same tensor with several settings."""
    if len({(by_rows(job.settings), by_columns(job.settings)) for job in jobs if not job.copy}) > 1:
        raise RecipeError(f"{jobs[0].name!r} is merged row by row with some settings only; merge them one by one")
    return jobs[0]._replace(
        variants=tuple(settings for job in jobs for settings in job.variants), copy=all(job.copy for job in jobs)
    )


class _Known(NamedTuple):
    """What was measured of tensors, by where they are held."""

    cuts: dict[tuple[View, View | None, int, int], Cut]  # model, base, elements, rank
    grams: dict[Inputs, NDArray[np.float64]]
    norms: dict[tuple[Inputs, Sweep], NDArray[np.float64]]


class _Remembering(backends.Ops):
    """Measures what is not known yet."""

    def __init__(self, wanted: str, dtypes: Iterable[str], device: str, known: _Known) -> None:
        super().__init__(wanted, dtypes, device, {})
        self.ranks = False  # what is selected and swept in one go would be again
        self._known = known

    def threshold(
        self, groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run
    ) -> list[tuple[Cut, ...]]:
        cuts = self._known.cuts
        keys = [
            [(view, inputs.base, inputs.elements, rank) for view, rank in zip(inputs.models, each, strict=True)]
            for (inputs,), each in zip(groups, ranks, strict=True)
        ]
        missing = [[key for key in dict.fromkeys(each) if key not in cuts] for each in keys]
        wanted = [
            (inputs._replace(models=tuple(view for view, *_ in each)), [rank for *_, rank in each])
            for (inputs,), each in zip(groups, missing, strict=True)
            if each
        ]
        found = super().threshold([[inputs] for inputs, _ in wanted], [each for _, each in wanted], run)
        for each, those in zip(filter(None, missing), found, strict=True):
            cuts.update(zip(each, those, strict=True))
        return [tuple(cuts[key] for key in each) for each in keys]

    def gram(self, tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
        grams = self._known.grams
        missing = [inputs for inputs in dict.fromkeys(tensors) if inputs not in grams]
        grams.update(zip(missing, super().gram(missing, run), strict=True))
        return [grams[inputs] for inputs in tensors]

    def norms(self, tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
        norms, keys = self._known.norms, list(zip(tensors, sweeps, strict=True))
        missing = [key for key in dict.fromkeys(keys) if key not in norms]
        found = super().norms([inputs for inputs, _ in missing], [sweep for _, sweep in missing], run)
        norms.update(zip(missing, found, strict=True))
        return [norms[key] for key in keys]
