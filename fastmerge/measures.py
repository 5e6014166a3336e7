"""A batch from inputs to outputs: what its methods want to know first (cuts, Gram matrices, norms), then the sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from . import backends
from .batches import Batch, Reader, in_rows, joined, row_of
from .methods import Measured, Method, Settings, ranks, rescale_of
from .pieces import Piece, Pieces, Room
from .planner import Job, Stage
from .sweep import Cut, Found, Inputs, Keep, Part, Rescale, Run, Sweep, Target

#: By the name of a job: of each variant the cuts of its whole model, or none where each tensor has its own.
Cuts = Mapping[str, Sequence[tuple[Cut, ...]]]


class Measuring(Protocol):
    """The ops that measure."""

    def gram(self, tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]: ...
    def norms(self, tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]: ...
    def threshold(
        self, groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run
    ) -> list[tuple[Cut, ...]]: ...


_IDENTITY = Sweep((Part(),))
#: A cut that no selection finds: what becomes of it shows whether a method takes its cuts as they come.
_PROBE = Cut(0.5, -2)


def swept(batch: Batch, ops: backends.Ops, cuts: Cuts, targets: Sequence[Sequence[Target]], run: Run) -> list[Found]:
    """Measures and sweeps each job; at one go where its cuts are all that it wants to know, and the provider can. A
    batch of jobs that are no sweeps is computed."""
    if batch.jobs[0].direct:
        return ops.compute(batch.inputs, list(map(functions_of, batch.jobs)), targets, run)
    ranked = {
        i: left_open
        for i, (job, inputs) in enumerate(zip(batch.jobs, batch.inputs, strict=True))
        if ops.ranks and _selects(job) and job.name not in cuts
        if (left_open := _left_open(job.method, job.variants, inputs.elements))
    }
    split = {i: width for i, job in enumerate(batch.jobs) if (width := row_of(job))}
    rest = [i for i in range(len(batch.jobs)) if i not in ranked and i not in split]
    found = ops.merge_ranked(
        [batch.inputs[i] for i in ranked],
        [sweeps for sweeps, _ in ranked.values()],
        [wanted for _, wanted in ranked.values()],
        [targets[i] for i in ranked],
        run,
    )
    others = Batch([batch.jobs[i] for i in rest], [batch.inputs[i] for i in rest], batch.owners)
    found += ops.merge(others.inputs, measured(others, ops, cuts, run), [targets[i] for i in rest], run)
    found += [row_by_row(batch.jobs[i], width, batch.inputs[i], ops, targets[i], run) for i, width in split.items()]
    by_place = dict(zip([*ranked, *rest, *split], found, strict=True))
    return [by_place[i] for i in range(len(batch.jobs))]


def measured(batch: Batch, provider: Measuring, cuts: Cuts, run: Run) -> list[list[Sweep]]:
    """The sweeps of each job, one per variant, after whatever its method wants to know of the tensors."""
    chosen = _selected(batch, provider, cuts, run)
    products = _gram(batch, provider, run)
    sweeps = [
        [
            job.method.sweep(settings, Measured(each, products.get(i, ())))
            for settings, each in zip(job.variants, chosen.get(i) or ((),) * len(job.variants), strict=True)
        ]
        if i in chosen or i in products
        else list(_unmeasured(job.method, job.variants, job.copy))
        for i, job in enumerate(batch.jobs)
    ]
    return _rescaled(batch, sweeps, provider, run)


def functions_of(job: Job) -> list[Callable[..., Any]]:
    """A job that is no sweep, as a function of whole torch tensors for each variant."""
    from .direct import function  # imports torch

    return [function(job.method, each, job.shape) for each in job.variants]


def row_by_row(job: Job, width: int, inputs: Inputs, ops: backends.Ops, targets: Sequence[Target], run: Run) -> Found:
    """Each row measured and swept as a tensor of its own."""
    run = run._replace(hash=0)  # a row is no piece
    begin, found = inputs.begin, [Found((0,) * len(inputs.views), (-1,) * len(inputs.views), (0,) * len(targets))]
    for rows, places in in_rows(width, inputs, targets):
        sweeps = measured(Batch([job] * len(rows), rows, []), ops, {}, run)
        for each in ops.merge(rows, sweeps, places, run):
            found.append(each._replace(first=tuple(at if at < 0 else begin + at for at in each.first)))
            begin += width
        found = [joined(found)]
    return found[0]


@lru_cache
def _unmeasured(method: Method, variants: tuple[Settings, ...], copy: bool) -> tuple[Sweep, ...]:
    return tuple(_IDENTITY if copy else method.sweep(settings, Measured()) for settings in variants)


def _selected(batch: Batch, provider: Measuring, cuts: Cuts, run: Run) -> dict[int, list[tuple[Cut, ...]]]:
    """The cuts of each variant, for jobs whose method wants some: one selection for all variants of equal ranks."""
    given = {i: cuts.get(job.name) or ((),) * len(job.variants) for i, job in enumerate(batch.jobs) if _selects(job)}
    wanted = {
        i: [
            () if has else ranks(settings, batch.inputs[i].elements)
            for settings, has in zip(batch.jobs[i].variants, each, strict=True)
        ]
        for i, each in given.items()
    }
    once = list(dict.fromkeys((i, each) for i, those in wanted.items() for each in those if each))
    tick = run.tick
    looks = max((len(each) // len(batch.inputs[i].models) for i, each in once), default=1)
    found = provider.threshold(
        [[batch.inputs[i].selected(each)] for i, each in once],
        [each for _, each in once],
        run._replace(tick=tick and (lambda read: tick(read // looks))),  # of one read
    )
    chosen = dict(zip(once, found, strict=True))
    return {
        i: [has or chosen[i, each] for has, each in zip(given[i], those, strict=True)] for i, those in wanted.items()
    }


def _gram(batch: Batch, provider: Measuring, run: Run) -> dict[int, list[list[float]]]:
    wanted = [i for i, job in enumerate(batch.jobs) if job.method.gram and not job.copy]
    found = provider.gram([batch.inputs[i] for i in wanted], run)
    return {i: products.tolist() for i, products in zip(wanted, found, strict=True)}


def _rescaled(batch: Batch, sweeps: list[list[Sweep]], provider: Measuring, run: Run) -> list[list[Sweep]]:
    """Where a method matches norms: each part's rescale becomes the norm before `Keep` over the norm after it."""
    matched = {
        (i, k): rescale
        for i, job in enumerate(batch.jobs)
        for k, settings in enumerate(job.variants)
        if not job.copy and (rescale := rescale_of(job.method, settings)) is not Rescale.NONE
    }
    kept = {(i, k): (i, _kept(sweeps[i][k])) for i, k in matched}
    once = list(dict.fromkeys(kept.values()))
    found = provider.norms([batch.inputs[i] for i, _ in once], [sweep for _, sweep in once], run)
    norms = dict(zip(once, found, strict=True))
    for (i, k), rescale in matched.items():
        column = int(rescale) - 1
        parts = [
            dataclasses.replace(part, rescale=before / after if before >= 1e-7 and after >= 1e-7 else 1.0)
            for part, (before, after) in zip(sweeps[i][k].parts, norms[kept[i, k]][:, :, column].tolist(), strict=True)
        ]
        sweeps[i][k] = dataclasses.replace(sweeps[i][k], parts=tuple(parts))
    return sweeps


def _kept(sweep: Sweep) -> Sweep:
    """What a sweep keeps, without what it makes of it: the norms of two that keep the same are equal."""
    return Sweep(tuple(dataclasses.replace(part, weight=1.0) for part in sweep.parts), sweep.keep)


def _selects(job: Job) -> bool:
    return job.method.selects and not job.copy


@lru_cache
def _left_open(
    method: Method, variants: tuple[Settings, ...], count: int
) -> tuple[list[Sweep], tuple[int, ...]] | None:
    """For a method that wants to know its cuts only and takes them as they come: the sweeps, which leave them open,
    and the ranks of `count` elements."""
    wanted, *others = {ranks(settings, count) for settings in variants}
    if method.gram or others or any(rescale_of(method, each) is not Rescale.NONE for each in variants):
        return None
    probe = Measured((_PROBE,) * len(wanted))
    sweeps = [method.sweep(settings, probe) for settings in variants]
    as_they_come = all(Cut(part.magnitude, part.ties_end) == _PROBE for sweep in sweeps for part in sweep.parts)
    return (sweeps, wanted) if as_they_come and all(sweep.keep is Keep.ABOVE for sweep in sweeps) else None


def model_cuts(stage: Stage, reader: Reader, backend: str, worked: backends.Worked, run: Run) -> Cuts:
    """`scope: model`: one selection over all tensors of a model, told to each tensor in its own indices.

    On the CPU whatever the backend: no memory but that of mapped files holds a whole model.
    """
    jobs = [job for job in stage.jobs if _selects(job) and any(map(_of_model, job.variants))]
    if not jobs:
        return {}
    held = [_held(job, reader) for job in jobs]
    pieces = [piece.inputs for piece in chain(*held)]
    dtypes = {view.dtype for inputs in pieces for view in inputs.views}
    ops = backends.Ops(backend if backends.device_of(backend) == "cpu" else "auto", dtypes, "cpu", worked)
    starts = list(accumulate((reader.elements(job) for job in jobs), initial=0))
    wanted = [  # the plan saw to it: each variant is the same for all tensors, which are of the same models
        ranks(settings, starts[-1]) if _of_model(settings) else () for settings in jobs[0].variants
    ]
    chosen = {}
    for at, rank in dict.fromkeys(pair for each in wanted for pair in enumerate(each)):
        alone = [inputs._replace(models=(inputs.models[at],)) for inputs in pieces]
        (((magnitude, end),),) = ops.threshold([alone], [(rank,)], run)
        chosen[at, rank] = [Cut(magnitude, max(0, end - start)) for start in starts]
    return {
        job.name: [tuple(chosen[pair][i] for pair in enumerate(each)) for each in wanted] for i, job in enumerate(jobs)
    }


def _held(job: Job, reader: Reader) -> list[Piece]:
    if job.gather:
        return list(Pieces(job, reader, Room()))
    batch = reader.mapped([job])
    return [Piece(batch.inputs[0], batch.owners)]


def _of_model(settings: Settings) -> bool:
    return settings.shared.get("scope") == "model"
