"""Jobs on the CPU: those whose inputs are stored as they are together, the others one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from . import backends, gathered
from .batches import Reader, share_out
from .measures import Cuts, swept
from .pieces import Room
from .planner import Job
from .sweep import Found, Run, Target


def on_cpu(
    jobs: Sequence[Job],
    reader: Reader,
    cuts: Cuts,
    targets: Callable[[Job], list[Target]],
    backend: str,
    worked: backends.Worked,
    run: Run,
    room: Room,
) -> Iterator[tuple[list[Job], list[Found]]]:
    """Jobs that were done together, with what was found in each; `targets` says where the outputs of one go."""
    stored = reader.mapped([job for job in jobs if job.gather is None])
    for ops, mine in share_out(stored, reader, backend, worked):
        yield mine.jobs, swept(mine, ops, cuts, list(map(targets, mine.jobs)), run)
    for job in jobs:
        if job.gather is not None:
            ops = backends.Ops("torch" if job.direct else backend, reader.held(job), "cpu", worked)
            yield [job], [gathered.swept(job, reader, ops, cuts, targets(job), run, room)]
