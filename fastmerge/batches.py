"""Batches: jobs that are done together, the memory that they read, and the provider that each goes to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import backends
from .checkpoint import Checkpoint
from .planner import Job, Source, Stage
from .sweep import Inputs, View

#: Inputs that are measured and swept together, in bytes: small enough to be in the page cache the second time.
_BATCH_BYTES = 1 << 28
_BATCH_JOBS = 512
_BATCH_FILES = 16  # outputs of a batch are open together


@dataclass(slots=True)
class Batch:
    """Jobs done together: what they read, and the owners that keep it mapped."""

    jobs: list[Job]
    inputs: list[Inputs]
    owners: list[object]


def in_batches(stage: Stage) -> Iterator[list[Job]]:
    file_of = {name: shard.name for shard in stage.layout.shards for name in shard.offsets}
    jobs: list[Job] = []
    files: set[str] = set()
    filled = 0
    for job in stage.jobs:
        jobs.append(job)
        files.add(file_of[job.name])
        filled += input_bytes(stage, job)
        if filled >= _BATCH_BYTES or len(jobs) >= _BATCH_JOBS or len(files) >= _BATCH_FILES:
            yield jobs
            jobs, files, filled = [], set(), 0
    if jobs:
        yield jobs


def read(jobs: Sequence[Job], models: Sequence[Checkpoint], propagate: bool) -> Batch:
    """Maps what the jobs read. A copy is read as bytes, unless it must and can be looked at for NaN on the way."""
    owners: list[object] = []

    def view(source: Source, raw: bool) -> View:
        address, owner = models[source.model].address(source.tensor)
        owners.append(owner)
        return View(address, "U8" if raw else models[source.model].tensors[source.tensor].dtype)

    inputs = []
    for job in jobs:
        info = models[job.inputs[0].model].tensors[job.inputs[0].tensor]
        raw = job.copy and (propagate or info.dtype not in ("F32", "F16", "BF16"))
        inputs.append(
            Inputs(
                info.nbytes if raw else info.elements,
                tuple(view(source, raw) for source in job.inputs),
                None if job.base is None else view(job.base, raw),
            )
        )
    return Batch(list(jobs), inputs, owners)


def share_out(batch: Batch, backend: str) -> Iterator[tuple[backends.Provider, Batch]]:
    """The batch by provider: most of it goes to the first, float64 to one that takes it."""
    shares: dict[str, tuple[backends.Provider, Batch]] = {}
    for job, inputs in zip(batch.jobs, batch.inputs, strict=True):
        dtypes = {view.dtype for view in inputs.views} | {output_dtype(job, inputs)}
        provider = backends.choose(backend, dtypes)
        _, mine = shares.setdefault(provider.name, (provider, Batch([], [], batch.owners)))
        mine.jobs.append(job)
        mine.inputs.append(inputs)
    yield from shares.values()


def output_dtype(job: Job, inputs: Inputs) -> str:
    return "U8" if inputs.models[0].dtype == "U8" else job.dtype


def input_bytes(stage: Stage, job: Job) -> int:
    return sum(stage.models[source.model].tensors[source.tensor].nbytes for source in job.sources)
