"""Batches: jobs that are done together, the memory that they read, and the providers that each goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import backends
from .checkpoint import Checkpoint, TensorInfo
from .planner import Job, Source, Stage
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
        many = len(files) * len(job.variants) >= _BATCH_FILES and file_of[job.name] not in files
        full = filled + size(job) > most or len(batch) >= _BATCH_JOBS or many
        if batch and full:
            yield batch
            batch, files, filled = [], set(), 0
        batch.append(job)
        files.add(file_of[job.name])
        filled += size(job)
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
        return job.copy and (self.propagate or self._info(job.inputs[0]).dtype not in ("F32", "F16", "BF16"))

    def elements(self, job: Job) -> int:
        info = self._info(job.inputs[0])
        return info.nbytes if self.raw(job) else info.elements

    def dtypes(self, job: Job) -> list[str]:
        """Of each input, the base last, and then of the output."""
        if self.raw(job):
            return ["U8", "U8"]
        return [*(self._info(source).dtype for source in job.sources), job.dtype]

    def place(self, source: Source) -> tuple[Path, int]:
        """The file of an input, and its first byte there."""
        return self.models[source.model].file_of(source.tensor), self._info(source).begin

    def mapped(self, jobs: Sequence[Job]) -> Batch:
        owners: list[object] = []
        inputs = []
        for job in jobs:
            views = []
            for source, dtype in zip(job.sources, self.dtypes(job), strict=False):  # the last is the output's
                address, owner = self.models[source.model].address(source.tensor)
                owners.append(owner)
                views.append(View(address, dtype))
            inputs.append(inputs_of(job, self.elements(job), views))
        return Batch(list(jobs), inputs, owners)

    def _info(self, source: Source) -> TensorInfo:
        return self.models[source.model].tensors[source.tensor]


def inputs_of(job: Job, elements: int, views: Sequence[View], begin: int = 0) -> Inputs:
    """The views of a job's sources, as a sweep wants them."""
    models = len(job.inputs)
    return Inputs(elements, tuple(views[:models]), views[models] if job.base else None, begin)


def share_out(
    batch: Batch, reader: Reader, backend: str, worked: backends.Worked
) -> Iterator[tuple[backends.Ops, Batch]]:
    """The batch by the providers of the CPU that do it: most of it goes to the first, float64 to one that takes it."""
    ops_of: dict[frozenset[str], backends.Ops] = {}
    shares: dict[tuple[str, ...], tuple[backends.Ops, Batch]] = {}
    for job, inputs in zip(batch.jobs, batch.inputs, strict=True):
        dtypes = frozenset(reader.dtypes(job))
        ops = ops_of.get(dtypes) or backends.Ops(backend, dtypes, "cpu", worked)
        ops_of[dtypes] = ops
        _, mine = shares.setdefault(ops.names, (ops, Batch([], [], batch.owners)))
        mine.jobs.append(job)
        mine.inputs.append(inputs)
    yield from shares.values()


def input_bytes(stage: Stage, job: Job) -> int:
    return sum(stage.models[source.model].tensors[source.tensor].nbytes for source in job.sources)
