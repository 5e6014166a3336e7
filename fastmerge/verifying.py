"""Merges held against their record: every byte of their tensors, and some of them merged again."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from . import backends, provenance
from .batches import BATCH_BYTES, Reader, in_batches
from .checkpoint import Checkpoint, Writer, lay_out, naming_what_changed, open_checkpoint, same_bytes
from .checkpoint.hashing import hash_of
from .checkpoint.header import read_small
from .errors import CheckpointError
from .measures import model_cuts
from .pieces import Room
from .planner import SHARD_SIZE, Job, Plan, Planned, Stage, opened, plan
from .provenance import ARITHMETIC, Input, Record
from .recipe import Document, Model, Recipe
from .sources.lora import Adapted
from .sweep import Run, Target
from .sweeping import on_cpu


class Wrong(NamedTuple):
    """What is not as the record says: of a tensor, whose bytes are [begin, end) of the file, or of the whole."""

    reason: str
    tensor: str | None = None
    file: str | None = None
    begin: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found in an output: nothing `wrong` where it is what was written, which is so many `tensors`, and
    `files` beside the weights. `recomputed` are the tensors that were merged again."""

    out: Path
    tensors: int
    files: int
    bytes_read: int
    wrong: tuple[Wrong, ...]
    recomputed: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The same as plain data for json.dumps."""
        return {
            "out": str(self.out),
            "tensors": self.tensors,
            "files": self.files,
            "bytes_read": self.bytes_read,
            "wrong": [each._asdict() for each in self.wrong],
            "recomputed": list(self.recomputed),
        }


def verify(
    out: str | os.PathLike[str],
    *,
    recompute: int = 0,
    sample_seed: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Holds an output of `merge` against its fastmerge.json: index, headers, the hash of each tensor's bytes, and that
    of each file beside the weights but for README.md, which is there to be edited.

    Args:
        out: the folder of the output.
        recompute: so many tensors, drawn at random, are merged again where no tensor is wrong, by the CPU, from the
            recipe in the record and its inputs, and must come out to the bit. Models are looked for from the current
            directory, then from the folder that `out` is in; those of the hub at the commits that they had.
        sample_seed: of the drawing.
        threads: workers; by default one for each processor that this process may use.
        progress: called with (bytes hashed, bytes in all), on this thread.

    Raises:
        CheckpointError: there is no sound record, or what it was merged from cannot be had, or changed.
    """
    started = time.perf_counter()
    out, threads = Path(out), backends.workers(threads)
    record = provenance.read(out)
    nbytes, recomputed = 0, []
    try:
        held = open_checkpoint(out)
        wrong = list(_misplaced(record, held))
        nbytes = sum(info.nbytes for info in held.tensors.values())
        wrong += _damaged(record, held, {each.tensor for each in wrong}, threads, progress)
    except CheckpointError as error:
        wrong = [Wrong(str(error))]
    if recompute and not wrong:
        names = sorted(record.tensors)
        recomputed = sorted(random.Random(sample_seed).sample(names, min(recompute, len(names))))
        wrong += _made_differently(record, held, recomputed, threads)
    wrong += _beside(record, out)
    seconds = time.perf_counter() - started
    return Verification(out, len(record.tensors), len(record.files), nbytes, tuple(wrong), tuple(recomputed), seconds)


def outputs(out: Path) -> list[Path]:
    """The folders of the outputs of a merge: `out`, or those in it where parameters varied."""
    within = sorted(path.parent for path in out.glob(f"*/{provenance.FILE}"))
    return [out] if os.path.lexists(out / provenance.FILE) or not within else within


# --- the bytes ---


def _misplaced(record: Record, held: Checkpoint) -> Iterator[Wrong]:
    """Tensors that are in the record or in the headers alone, or that the two describe differently."""
    for name, tensor in record.tensors.items():
        if name not in held.tensors:
            yield Wrong(f"tensor {name!r} is missing", name, tensor.file)
            continue
        info, file = held.tensors[name], held.file_of(name).relative_to(held.folder).as_posix()
        was, now = (tensor.dtype, tensor.shape, tensor.file), (info.dtype, info.shape, file)
        for kind, before, after in zip(("dtype", "shape", "file"), was, now, strict=True):
            if before != after:
                reason = f"tensor {name!r} has the {kind} {after}, and was written with {before}"
                yield Wrong(reason, name, file, info.begin, info.end)
                break
    for name in held.tensors:
        if name not in record.tensors:
            yield Wrong(f"tensor {name!r} was not written by the merge", *_place(held, name))


def _damaged(
    record: Record,
    held: Checkpoint,
    known: Collection[str | None],
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Wrong]:
    """Tensors whose bytes have another hash, in the order of the files."""
    names = [name for name in held.tensors if name not in known]
    total = sum(held.tensors[name].nbytes for name in names)
    done = 0
    pool = ThreadPoolExecutor(threads)
    try:
        for name, digest in zip(names, pool.map(held.hash_of, names), strict=True):
            done += held.tensors[name].nbytes
            if progress:
                progress(done, total)
            if digest != record.tensors[name].hash:
                yield Wrong(f"tensor {name!r} has other bytes than were written", *_place(held, name))
    finally:
        pool.shutdown(cancel_futures=True)


def _place(held: Checkpoint, name: str) -> tuple[str, str, int, int]:
    info = held.tensors[name]
    return name, held.file_of(name).relative_to(held.folder).as_posix(), info.begin, info.end


def _beside(record: Record, out: Path) -> Iterator[Wrong]:
    """Files beside the weights that are missing, or other than were written."""
    for name, was in record.files.items():
        if not os.path.lexists(out / name):
            yield Wrong(f"the file {name!r} is missing", file=name)
            continue
        try:
            now = hash_of([memoryview(read_small(out / name))]).hex()
        except CheckpointError as error:
            yield Wrong(str(error), file=name)
            continue
        if now != was:
            yield Wrong(f"the file {name!r} is other than was written", file=name)


# --- the same again ---


def _made_differently(record: Record, held: Checkpoint, names: Sequence[str], threads: int) -> Iterator[Wrong]:
    """Tensors that come out with other bytes when they are merged again."""
    if record.arithmetic != ARITHMETIC:
        raise CheckpointError(
            f"{held.folder} was merged by fastmerge {record.fastmerge}, whose bits are others (arithmetic "
            f"{record.arithmetic}, here {ARITHMETIC}): recompute it with that version"
        )
    made = plan(_recipe(record, held.folder), seed=record.seed)
    _refuse_changed(record, provenance.inputs_of(made.stages[-1], threads=threads), held.folder)
    with tempfile.TemporaryDirectory(prefix="fastmerge-") as folder:
        again = _merged(made, set(names), Path(folder), record.options.get("nonfinite") == "propagate", threads)
        for name in names:
            if name not in again.tensors or not same_bytes(held, name, again, name):
                yield Wrong(f"tensor {name!r} comes out with other bytes when it is merged again", *_place(held, name))


def _recipe(record: Record, out: Path) -> Recipe:
    """The recipe of a record as far as its document goes, with models of the hub at their commits; documents that were
    merged before, and kept, are folders beside the output."""
    commits = {each.name: each.revision for each in record.inputs if each.revision}
    kept = {each.name for each in record.inputs if each.files}
    whole = Recipe.parse(record.recipe, str(out / provenance.FILE), out.absolute().parent, every=True)
    named = {document.name for document in whole.documents}

    def found(model: Model) -> Model:
        adapter = model.adapter and found(model.adapter)
        if model.repository is not None and model.name in commits:
            return model._replace(adapter=adapter, repository=replace(model.repository, revision=commits[model.name]))
        if model.path is None and model.name in named & kept:
            return model._replace(adapter=adapter, path=out.absolute().parent / model.name)
        return model._replace(adapter=adapter)

    documents: list[Document] = []
    needed: set[str | None] = {record.document}
    for document in reversed(whole.documents):
        if document.name in needed:
            documents.insert(0, document.with_models(found))
            needed |= {model.name for model in documents[0].models if model.path is None and model.repository is None}
    if not documents or documents[-1].name != record.document:
        raise CheckpointError(f"{out / provenance.FILE} has no document {record.document!r} in its recipe; merge again")
    return Recipe(record.recipe, tuple(documents))


def _refuse_changed(record: Record, now: Iterable[Input], out: Path) -> None:
    """Inputs must be what they were; a sha256 is compared where both sides know it."""
    found = {(each.name, each.role == "adapter"): each.files for each in now}
    for before in record.inputs:
        files = found.get((before.name, before.role == "adapter"), {})
        for name, was in before.files.items():
            is_ = files.get(name)
            if is_ is None or was._replace(sha256=None) != is_._replace(sha256=None) or _contradict(was, is_):
                what = "is missing" if is_ is None else "is not the file that it was"
                raise CheckpointError(
                    f"{out} cannot be merged again: {name} of the input {before.name!r} {what}; put back what it was"
                )


def _contradict(was: provenance.File, is_: provenance.File) -> bool:
    return None not in (was.sha256, is_.sha256) and was.sha256 != is_.sha256


def _merged(made: Plan, names: set[str], folder: Path, propagate: bool, threads: int) -> Checkpoint:
    """These tensors of a plan's result, merged by the CPU, and of the stages before it those that they need."""
    asked: dict[str | None, set[str]] = {stage.name: set() for stage in made.stages}
    asked[made.stages[-1].name] = names
    for stage in reversed(made.stages):
        for name, tensors in _needed(stage, asked[stage.name]):
            asked[name] |= tensors
    written: dict[str | None, Checkpoint] = {}
    for number, stage in enumerate(made.stages):
        models = [opened(model, written) for model in stage.models]
        place = folder / str(number)
        jobs = [job for job in stage.jobs if job.name in asked[stage.name]]
        with naming_what_changed(*models):
            _merge(stage, jobs, Reader(models, propagate), place, Run(threads))
        written[stage.name] = open_checkpoint(place)
    return written[made.stages[-1].name]


def _needed(stage: Stage, names: Collection[str]) -> Iterator[tuple[str, set[str]]]:
    """By the name of an earlier stage, its tensors that some of this stage are made from."""
    for job in _measured(stage, names).jobs:
        read = [*job.sources, *(job.gather.names.items() if job.gather else ())]
        for at, tensor in read:
            model = stage.models[at]
            if isinstance(model, Planned):
                yield model.name, {tensor}
            elif isinstance(model, Adapted) and isinstance(model.base, Planned):
                yield model.base.name, set(model.base.tensors)  # an adapter wants to find a place for each of its own


def _measured(stage: Stage, names: Collection[str]) -> Stage:
    """The stage with what is read for some of its tensors alone; with one threshold over a model, that is all."""
    jobs = tuple([job for job in stage.jobs if job.name in names])
    whole = any(job.settings.shared.get("scope") == "model" for job in jobs)
    return stage if whole else replace(stage, jobs=jobs)


def _merge(stage: Stage, jobs: Sequence[Job], reader: Reader, place: Path, run: Run) -> None:
    """Some jobs of a stage, into a folder of their own."""
    worked: backends.Worked = {}
    cuts = model_cuts(_measured(stage, [job.name for job in jobs]), reader, "auto", worked, run)
    room = Room()
    layout = lay_out([(job.name, job.dtype, job.shape) for job in jobs], SHARD_SIZE)
    with Writer(place, layout, inputs=(), overwrite=False) as writer:

        def targets(job: Job) -> list[Target]:
            file, offset = writer.target(job.name)
            return [Target(reader.output(job), offset, file)]

        for batch in in_batches(stage, jobs, attrgetter("nbytes"), BATCH_BYTES):
            for _ in on_cpu(batch, reader, cuts, targets, "auto", worked, run, room):
                pass
        writer.commit({})
