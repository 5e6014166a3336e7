"""Batches: jobs that are done together, the memory that they read, and the providers that each goes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from . import backends
from .checkpoint import DTYPE_BITS, Checkpoint
from .methods import by_rows
from .planner import Job, Stage
from .sweep import Found, Inputs, Target, View

#: Inputs that are measured and swept together, in bytes: small enough to be in the page cache the second time.
BATCH_BYTES = 1 << 28
BATCH_JOBS = 512
BATCH_ROWS = 4096  # of one tensor
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
        full = filled + nbytes > most or len(batch) >= BATCH_JOBS or many
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
        stays = job.copy and job.gather is None
        return stays and (self.propagate or job.infos[0].dtype not in ("F32", "F16", "BF16"))

    def elements(self, job: Job) -> int:
        return job.nbytes if self.raw(job) else job.infos[0].elements

    def output(self, job: Job) -> str:
        """The dtype that is written."""
        return "U8" if self.raw(job) else job.dtype

    def dtypes(self, job: Job) -> tuple[str, ...]:
        """Of each input, the base last, and then of the output."""
        return ("U8", "U8") if self.raw(job) else (*[info.dtype for info in job.infos], job.dtype)

    def held(self, job: Job) -> frozenset[str]:
        """All that a sweep meets of a job that gathers: what is stored, what is made, and the output."""
        names = job.gather.names if job.gather else {}
        stored = [self.models[model].tensors[name].dtype for model, name in names.items()]
        return frozenset(("F32", *stored, *self.dtypes(job)))

    def places(self, job: Job) -> list[tuple[Path, int]]:
        """The file of each input, the base last, and its first byte there."""
        return [
            (self.models[model].file_of(name), info.begin)
            for (model, name), info in zip(job.sources, job.infos, strict=True)
        ]

    def mapped(self, jobs: Sequence[Job]) -> Batch:
        address_in = [model.address for model in self.models]
        held = [address_in[model](name) for job in jobs for model, name in job.sources]
        dtypes = ["U8" if self.raw(job) else info.dtype for job in jobs for info in job.infos]
        views = map(View, [address for address, _ in held], dtypes)
        inputs = [
            Inputs(self.elements(job), tuple(islice(views, len(job.inputs))), next(views) if job.base else None)
            for job in jobs
        ]
        return Batch(list(jobs), inputs, [owner for _, owner in held])


def inputs_of(job: Job, elements: int, views: Sequence[View], begin: int = 0) -> Inputs:
    """The views of a job's sources, as a sweep wants them."""
    models = len(job.inputs)
    return Inputs(elements, tuple(views[:models]), views[models] if job.base else None, begin)


def row_of(job: Job) -> int:
    """How long the rows of a job are, each of which is merged as a tensor of its own; 0 where the whole is one."""
    return job.shape[-1] if len(job.shape) > 1 and by_rows(job.settings) else 0


def in_rows(width: int, inputs: Inputs, targets: Sequence[Target]) -> Iterator[tuple[list[Inputs], list[list[Target]]]]:
    """The rows of a tensor, `width` elements each, as tensors of their own, some thousand at a time."""
    pitch = {dtype: DTYPE_BITS[dtype] // 8 * width for _, dtype in inputs.views} | {
        target.dtype: DTYPE_BITS[target.dtype] // 8 * width for target in targets
    }
    starts = range(inputs.elements // width)
    for at in range(0, len(starts), BATCH_ROWS):
        rows = starts[at : at + BATCH_ROWS]
        views = [[View(address + row * pitch[dtype], dtype) for address, dtype in inputs.views] for row in rows]
        yield (
            [Inputs(width, tuple(each[: len(inputs.models)]), each[-1] if inputs.base else None) for each in views],
            [[target._replace(offset=target.offset + row * pitch[target.dtype]) for target in targets] for row in rows],
        )


def joined(parts: Iterable[Found]) -> Found:
    """What was found in the parts of a tensor, whose indices are those of the whole; not its hash."""
    nonfinite, first, overflow, _ = (list(zip(*each, strict=True)) for each in zip(*parts, strict=True))
    return Found(
        tuple(map(sum, nonfinite)),
        tuple(min((at for at in places if at >= 0), default=-1) for places in first),
        tuple(map(sum, overflow)),
    )


def share_out(
    batch: Batch, reader: Reader, backend: str, worked: backends.Worked
) -> Iterator[tuple[backends.Ops, Batch]]:
    """The batch by the providers of the CPU that do it: most of it goes to the first, float64 to one that takes it,
    and what is direct to torch."""
    by_dtypes: dict[tuple[bool, tuple[str, ...]], Batch] = {}
    shares: dict[tuple[bool, tuple[str, ...]], tuple[backends.Ops, Batch]] = {}
    for job, inputs in zip(batch.jobs, batch.inputs, strict=True):
        key = job.direct, reader.dtypes(job)
        if key not in by_dtypes:
            ops = backends.Ops("torch" if job.direct else backend, key[1], "cpu", worked)
            _, by_dtypes[key] = shares.setdefault((job.direct, ops.names), (ops, Batch([], [], batch.owners)))
        mine = by_dtypes[key]
        mine.jobs.append(job)
        mine.inputs.append(inputs)
    yield from shares.values()
