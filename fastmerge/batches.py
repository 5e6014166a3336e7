"""Batches: jobs that are done together, the memory that they read, and the providers that each goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import backends
from .checkpoint import Checkpoint
from .planner import Job, Stage
from .sweep import Inputs, View

#: Inputs that are measured and swept together, in bytes: small enough to be in the page cache the second time.
BATCH_BYTES = 1 << 28
_BATCH_JOBS = 512
_BATCH_FILES = 16  # of all outputs that a batch writes to, which are open together


@dataclass(slots=True)
class Batch:
    """Jobs done together: what they read, and the owners that keep it mapped."""

    jobs: list[Job]
    inputs: list[Inputs]
    owners: list[object]


def in_batches(stage: Stage, jobs: Sequence[Job], size: Callable[[Job], int], most: int) -> Iterator[list[Job]]:
    """Jobs in their order, whose sizes sum up to `most` at most; a larger one is alone."""
    file_of = {name: shard.name for shard in stage.layout.shards for name in shard.offsets}
    batch: list[Job] = []
    files: set[str] = set()
    filled = 0
    for job in jobs:
        file, nbytes = file_of[job.name], size(job)
        many = len(files) * len(job.variants) >= _BATCH_FILES and file not in files
        full = filled + nbytes > most or len(batch) >= _BATCH_JOBS or many
        if batch and full:
            yield batch
            batch, files, filled = [], set(), 0
        batch.append(job)
        files.add(file)
        filled += nbytes
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class Reader:
    """What the jobs of a stage read, by the headers.

    A copy is read as bytes, unless it must and can be looked at for NaN on the way.
    """

    models: Sequence[Checkpoint]
    propagate: bool

    def raw(self, job: Job) -> bool:
        """Whether a job moves bytes, whatever they mean."""
        return job.copy and (self.propagate or job.infos[0].dtype not in ("F32", "F16", "BF16"))

    def elements(self, job: Job) -> int:
        return job.nbytes if self.raw(job) else job.infos[0].elements

    def output(self, job: Job) -> str:
        """The dtype that is written."""
        return "U8" if self.raw(job) else job.dtype

    def dtypes(self, job: Job) -> tuple[str, ...]:
        """Of each input, the base last, and then of the output."""
        return ("U8", "U8") if self.raw(job) else (*[info.dtype for info in job.infos], job.dtype)

    def places(self, job: Job) -> list[tuple[Path, int]]:
        """The file of each input, the base last, and its first byte there."""
        return [
            (self.models[model].file_of(name), info.begin)
            for (model, name), info in zip(job.sources, job.infos, strict=True)
        ]

    def mapped(self, jobs: Sequence[Job]) -> Batch:
        owners: list[object] = []
        inputs = []
        for job in jobs:
            places = [self.models[model].address(name) for model, name in job.sources]
            owners += [owner for _, owner in places]
            # The last dtype is the output's.
            views = [View(address, dtype) for (address, _), dtype in zip(places, self.dtypes(job), strict=False)]
            inputs.append(inputs_of(job, self.elements(job), views))
        return Batch(list(jobs), inputs, owners)


def inputs_of(job: Job, elements: int, views: Sequence[View], begin: int = 0) -> Inputs:
    """The views of a job's sources, as a sweep wants them."""
    models = len(job.inputs)
    return Inputs(elements, tuple(views[:models]), views[models] if job.base else None, begin)


def share_out(
    batch: Batch, reader: Reader, backend: str, worked: backends.Worked
) -> Iterator[tuple[backends.Ops, Batch]]:
    """The batch by the providers of the CPU that do it: most of it goes to the first, float64 to one that takes it."""
    by_dtypes: dict[tuple[str, ...], Batch] = {}
    shares: dict[tuple[str, ...], tuple[backends.Ops, Batch]] = {}
    for job, inputs in zip(batch.jobs, batch.inputs, strict=True):
        dtypes = reader.dtypes(job)
        if dtypes not in by_dtypes:
            ops = backends.Ops(backend, dtypes, "cpu", worked)
            _, by_dtypes[dtypes] = shares.setdefault(ops.names, (ops, Batch([], [], batch.owners)))
        mine = by_dtypes[dtypes]
        mine.jobs.append(job)
        mine.inputs.append(inputs)
    yield from shares.values()
