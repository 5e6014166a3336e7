"""A batch from inputs to outputs: what its methods want to know first (cuts, Gram matrices, norms), then the sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from . import backends
from .batches import Batch, Reader
from .methods import Measured, ranks, rescale_of
from .planner import Job, Stage
from .sweep import Cut, Found, Keep, Part, Rescale, Run, Sweep, Target

_IDENTITY = Sweep((Part(),))
#: A cut that no selection finds: what becomes of it shows whether a method takes its cuts as they come.
_PROBE = Cut(0.5, -2)


def swept(
    batch: Batch, ops: backends.Ops, cuts: Mapping[str, tuple[Cut, ...]], targets: Sequence[Target], run: Run
) -> list[Found]:
    """Measures and sweeps each job; at one go where its cuts are all that it wants to know, and the provider can."""
    probed = {i: _probed(job) for i, job in enumerate(batch.jobs) if ops.ranks and job.name not in cuts}
    ranked = {i: sweep for i, sweep in probed.items() if sweep}
    rest = [i for i in range(len(batch.jobs)) if i not in ranked]
    found = ops.merge_ranked(
        [batch.inputs[i] for i in ranked],
        [[sweep] for sweep in ranked.values()],
        [ranks(batch.jobs[i].settings, batch.inputs[i].elements) for i in ranked],
        [[targets[i]] for i in ranked],
        run,
    )
    others = Batch([batch.jobs[i] for i in rest], [batch.inputs[i] for i in rest], batch.owners)
    sweeps = measured(others, ops, cuts, run)
    found += ops.merge(others.inputs, [[sweep] for sweep in sweeps], [[targets[i]] for i in rest], run)
    by_place = dict(zip([*ranked, *rest], found, strict=True))
    return [by_place[i] for i in range(len(batch.jobs))]


def measured(batch: Batch, provider: backends.Ops, cuts: Mapping[str, tuple[Cut, ...]], run: Run) -> list[Sweep]:
    """The sweep of each job, after whatever its method wants to know of the tensors."""
    sweeps = [_IDENTITY] * len(batch.jobs)
    selecting = [i for i, job in enumerate(batch.jobs) if _selects(job) and job.name not in cuts]
    found = provider.threshold(
        [[batch.inputs[i]] for i in selecting],
        [ranks(batch.jobs[i].settings, batch.inputs[i].elements) for i in selecting],
        run,
    )
    chosen = dict(zip(selecting, found, strict=True))
    products = _gram(batch, provider, run)
    for i, job in enumerate(batch.jobs):
        if not job.copy:
            measured = Measured(cuts.get(job.name) or chosen.get(i, ()), products.get(i, ()))
            sweeps[i] = job.method.sweep(job.settings, measured)
    return _rescaled(batch, sweeps, provider, run)


def _gram(batch: Batch, provider: backends.Ops, run: Run) -> dict[int, list[list[float]]]:
    wanted = [i for i, job in enumerate(batch.jobs) if job.method.gram and not job.copy]
    found = provider.gram([batch.inputs[i] for i in wanted], run)
    return {i: products.tolist() for i, products in zip(wanted, found, strict=True)}


def _rescaled(batch: Batch, sweeps: list[Sweep], provider: backends.Ops, run: Run) -> list[Sweep]:
    """Where a method matches norms: each part's rescale becomes the norm before `Keep` over the norm after it."""
    matched = {i: rescale_of(job.method, job.settings) for i, job in enumerate(batch.jobs) if not job.copy}
    wanted = [i for i, rescale in matched.items() if rescale is not Rescale.NONE]
    found = provider.norms([batch.inputs[i] for i in wanted], [sweeps[i] for i in wanted], run)
    for i, norms in zip(wanted, found, strict=True):
        column = int(matched[i]) - 1
        parts = [
            dataclasses.replace(part, rescale=before / after if before >= 1e-7 and after >= 1e-7 else 1.0)
            for part, (before, after) in zip(sweeps[i].parts, norms[:, :, column].tolist(), strict=True)
        ]
        sweeps[i] = dataclasses.replace(sweeps[i], parts=tuple(parts))
    return sweeps


def _selects(job: Job) -> bool:
    return job.method.selects and not job.copy


def _probed(job: Job) -> Sweep | None:
    """The sweep of a job that wants to know its cuts only and takes them as they come; they are left open in it."""
    if not _selects(job) or job.method.gram or rescale_of(job.method, job.settings) is not Rescale.NONE:
        return None
    sweep = job.method.sweep(job.settings, Measured((_PROBE,) * len(job.inputs)))
    as_they_come = all(Cut(part.magnitude, part.ties_end) == _PROBE for part in sweep.parts)
    return sweep if sweep.keep is Keep.ABOVE and as_they_come else None


def model_cuts(
    stage: Stage, reader: Reader, backend: str, worked: backends.Worked, run: Run
) -> dict[str, tuple[Cut, ...]]:
    """`scope: model`: one selection over all tensors of a model, told to each tensor in its own indices.

    On the CPU whatever the backend: no memory but that of mapped files holds a whole model.
    """
    jobs = [job for job in stage.jobs if _selects(job) and job.settings.shared.get("scope") == "model"]
    if not jobs:
        return {}
    batch = reader.mapped(jobs)
    dtypes = {view.dtype for inputs in batch.inputs for view in inputs.views}
    ops = backends.Ops(backend if backends.device_of(backend) == "cpu" else "auto", dtypes, "cpu", worked)
    cuts: dict[str, list[Cut]] = {job.name: [] for job in jobs}
    for place in sorted({source.model for job in jobs for source in job.inputs}):
        parts = [
            (job, inputs._replace(models=(inputs.models[at],)), dataclasses.replace(job.settings, models=(own,)))
            for job, inputs in zip(jobs, batch.inputs, strict=True)
            for at, (source, own) in enumerate(zip(job.inputs, job.settings.models, strict=True))
            if source.model == place
        ]
        group = [inputs for _, inputs, _ in parts]
        wanted = ranks(parts[0][2], sum(inputs.elements for inputs in group))  # the plan saw to it: one density
        ((cut,),) = ops.threshold([group], [wanted], run)
        start = 0
        for job, inputs, _ in parts:
            cuts[job.name].append(Cut(cut.magnitude, max(0, cut.ties_end - start)))
            start += inputs.elements
    return {name: tuple(each) for name, each in cuts.items()}
