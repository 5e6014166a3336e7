"""The loop over the jobs of a plan: read, measure, sweep, write; and the public `merge`."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import backends, cards, provenance
from .batches import BATCH_BYTES, Reader, in_batches
from .checkpoint import (
    DTYPE_BITS,
    STAGES,
    Checkpoint,
    Writer,
    hashing,
    naming_what_changed,
    open_checkpoint,
    same_bytes,
    sidecars,
)
from .checkpoint.folder import left_in
from .choice import Choice
from .errors import BackendError, FastmergeError, FastmergeWarning, NonFiniteError, OutputError
from .health import Checkup, Health
from .identity import identity, packages
from .measures import Cuts, model_cuts
from .pieces import Room
from .planner import SHARD_SIZE, Job, Plan, Planned, Stage, opened, uncollected
from .planner import plan as make_plan
from .recipe import Recipe
from .sources.lora import Adapted
from .streaming import Streamer
from .sweep import Found, Run, Target
from .sweeping import on_cpu
from .vary import Vary

Progress = Callable[[int, int], None]

_DONE = "done"  # beside the model of an earlier document, where that is complete


@dataclass(frozen=True, slots=True)
class Report:
    """What a merge did."""

    out: Path
    outputs: tuple[Path, ...]  # the folders written: `out`, or those in it where parameters varied
    methods: tuple[str, ...]
    tensors: int
    bytes_read: int  # the inputs, each once; without those of tensors that an earlier run had merged
    bytes_written: int  # of all outputs, likewise
    seconds: float
    peak_anonymous_bytes: int  # memory that is not a mapped file; 0 where the system doesn't tell
    worked: Mapping[str, tuple[str, ...]]  # by provider, the ops that it ran; empty where bytes were only copied
    threads: int
    choice: str  # which device was chosen, and why
    gpu_considered: bool  # whether a GPU was measured against the CPU
    resumed: int  # tensors that an earlier run had merged
    health: Health = field(default_factory=Health)  # of the recipe's result

    @property
    def providers(self) -> tuple[str, ...]:
        """Who ran an op."""
        return tuple(self.worked)

    @property
    def gigabytes_per_second(self) -> float:
        """Bytes read and written, over the whole time."""
        return (self.bytes_read + self.bytes_written) / self.seconds / 1e9


def merge(
    recipe: Recipe | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    backend: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
    shard_size: int = SHARD_SIZE,
    gpu_memory: int | None = None,
    overwrite: bool = False,
    restart: bool = False,
    nonfinite: str = "error",
    hash: str = "fast",
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
    vary: Vary = MappingProxyType({}),
    progress: Progress | None = None,
) -> Report:
    """Merges the models of a recipe into a new checkpoint folder, or into several from one read.

    Args:
        recipe: a `Recipe`, or the path of its YAML file.
        out: the folder to write; new or empty, unless `overwrite`.
        backend: "auto", or a provider by name ("cpu", "torch", "cuda", "triton"), which then never falls back. "auto"
            begins on the CPU, and goes on with a GPU where that is faster by what was measured.
        threads: workers; by default one for each processor that this process may use.
        seed: of the random drops; before the recipe's own. The default is 0.
        shard_size: the most bytes of tensors in one file.
        gpu_memory: the most bytes that are taken for each GPU, about half on it, half pinned in the host's memory; by
            default 8 GB, or what the GPU has free where that is less.
        overwrite: replace an earlier output in `out`, or in a folder of it that `vary` names.
        restart: begin anew where an unfinished merge is in `out`. Without it the same merge goes on where it stopped,
            and ends in the same bytes; another is refused.
        nonfinite: "error", or "propagate": NaN and Inf in the inputs go where the arithmetic takes them.
        hash: "full" notes the sha256 of every input in fastmerge.json; "fast" those that the hub's cache knows, beside
            the fingerprint that every input has.
        copy_tokenizer: whether the files of the base's or the first model's tokenizer are copied beside the weights.
        write_model_card: whether README.md and mergekit_config.yml are written beside them.
        vary: values of parameters of the recipe's result, as in ``{"lambda": [0.2, 0.4]}``. Each, or each combination
            where there are several parameters, gives an output of its own in `out`, in a folder such as
            ``lambda=0.2``, as a merge of the recipe with that value would.
        progress: called with (bytes done, bytes in all) about twenty times a second, on this thread.

    Raises:
        FastmergeError: the user's mistake, as the subclass says; nothing that looks complete is left in `out`.
        KeyboardInterrupt: at once on Ctrl-C, likewise, but for the folders in its `args`, outputs that are complete;
            the same call goes on from there.
    """
    if nonfinite not in ("error", "propagate"):
        raise ValueError(f'nonfinite is "error" or "propagate", not {nonfinite!r}')
    if hash not in ("fast", "full"):
        raise ValueError(f'hash is "fast" or "full", not {hash!r}')
    started = time.perf_counter()
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    plan = make_plan(recipe, seed=seed, shard_size=shard_size, vary=vary)
    watch = _Watch(plan, progress)
    worked: backends.Worked = {}
    work = _Work(
        Choice(backend, worked), worked, backends.workers(threads), gpu_memory, nonfinite == "propagate", watch
    )
    inputs = [path for stage in plan.stages for model in stage.models for path in _paths(model)]
    *before, result = plan.stages
    follows = identity(plan, seed=seed, nonfinite=nonfinite, backend=backend)
    folders = {variant.name: Path(out, variant.name) for variant in plan.variants}
    writers: dict[str, Writer] = {}
    with _stops(writers), _disk(Path(out)), _folder(Path(out)), ExitStack() as entered:
        for variant in plan.variants:
            writers[variant.name] = entered.enter_context(
                Writer(
                    folders[variant.name],
                    result.layout,
                    inputs=inputs,
                    overwrite=overwrite,
                    plan={"recipe": variant.text, **follows},
                    restart=restart,
                )
            )
        entered.enter_context(_stops(writers))  # also here, so that writers whose outputs are all complete clear up
        written: dict[str | None, Checkpoint] = {}
        odd: list[str] = []
        for number, stage in enumerate(before):
            place = next(iter(folders.values())) / STAGES / str(number)  # its name is the user's, and may be any text
            if not (said := _taken_up(place)):
                said = _between(stage, written, place, {"recipe": recipe.text, **follows}, work)
            odd += said["warnings"]
            written[stage.name] = open_checkpoint(place)
        health = _run(result, written, writers, work)
        watch.finish()
        made_from = provenance.inputs_of(result, full=hash == "full", threads=work.threads)
        _check_unchanged([model for stage in plan.stages for model in stage.models])
        for number, variant in enumerate(plan.variants):
            folder, writer = folders[variant.name], writers[variant.name]
            writer.settle()
            again = recipe.again or f"merge mergekit_config.yml {shlex.quote(folder.name)}"
            command = f"fastmerge {again}{_options(seed, shard_size, nonfinite, copy_tokenizer)}"
            copied = {"copy_tokenizer": copy_tokenizer, "write_model_card": write_model_card}
            beside = _sidecars(result, variant.text, command, folder, **copied)
            record = provenance.written(
                result,
                variant.text,
                command,
                inputs=made_from,
                hashes=writer.hashes,
                worked=worked,
                isa=backends.isa() if "cpu" in worked else None,
                seed=seed,
                options={"nonfinite": nonfinite, "shard_size": shard_size, **packages(plan)},
                health=health.to_json(variant.name),
                beside=beside,
                variant=number,
            )
            writer.commit({**beside, provenance.FILE: record})
    for sentence in (*odd, *health.warnings):
        warnings.warn(sentence, FastmergeWarning, stacklevel=2)
    spared_read, spared_written = work.spared_bytes
    return Report(
        Path(out),
        tuple(folders.values()),
        tuple(dict.fromkeys(stage.document.method.name for stage in plan.stages)),
        sum(len(stage.jobs) for stage in plan.stages),
        plan.bytes_read - spared_read,
        plan.bytes_written - spared_written,
        time.perf_counter() - started,
        watch.peak_anonymous_bytes,
        {
            name: tuple(op for op in backends.OPS if op in worked[name])
            for name in (*backends.PROVIDERS, *worked)
            if name in worked
        },
        work.threads,
        work.choice.reason,
        work.choice.considered,
        work.resumed,
        health,
    )


def _options(seed: int | None, shard_size: int, nonfinite: str, copy_tokenizer: bool) -> str:
    """What a command line says beside the recipe, for the same bytes."""
    said = {
        f" --seed {seed}": seed is not None,
        f" --shard-size {shard_size}": shard_size != SHARD_SIZE,
        f" --nonfinite {nonfinite}": nonfinite != "error",
        " --no-copy-tokenizer": not copy_tokenizer,
    }
    return "".join(option for option, wanted in said.items() if wanted)


def _between(
    stage: Stage, written: Mapping[str | None, Checkpoint], place: Path, plan: Mapping[str, Any], work: _Work
) -> dict[str, Any]:
    """Makes the model of an earlier document; what there is to know of it is said beside it, too, once it is whole."""
    with Writer(place, stage.layout, inputs=(), overwrite=True, plan=plan) as writer:
        health = _run(stage, written, {"": writer}, work)
        writer.commit(_sidecars(stage, plan["recipe"], "", place, write_model_card=False))
        said = {"hashes": writer.hashes, "warnings": list(health.warnings)}
    (place / _DONE).write_text(json.dumps(said))
    return said


def _taken_up(place: Path) -> dict[str, Any] | None:
    """What an earlier run has said of a model that it made, where that is as it was."""
    try:
        said: dict[str, Any] = json.loads(left_in(place / _DONE))
        held = open_checkpoint(place)
        whole = said["hashes"] == {name: held.hash_of(name) for name in held.tensors}
        return said if whole and type(said["warnings"]) is list else None
    except (OSError, FastmergeError, ValueError, TypeError, KeyError, RecursionError):
        return None


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Made for the outputs in it, the folder goes again where there are none."""
    made = not os.path.lexists(out)
    try:
        yield
    finally:
        if made:
            with suppress(OSError):
                out.rmdir()


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """What the disk refuses while an op writes; the writer tells of the rest."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        raise OutputError(
            f"{out} cannot be written ({error.strerror}): free some space, or choose another folder"
        ) from None


@contextmanager
def _stops(writers: Mapping[str, Writer]) -> Iterator[None]:
    """A merge that is stopped when all is done is done; else its KeyboardInterrupt says which outputs are complete."""
    try:
        yield
    except KeyboardInterrupt as stop:
        complete = [str(writer.out) for writer in writers.values() if writer.committed]
        if len(complete) < max(1, len(writers)):
            stop.args = tuple(complete)
            raise


class _Watch:
    """Progress and memory, looked at whenever an op comes up for air."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self.total = sum(job.passes * job.nbytes for stage in plan.stages for job in stage.jobs)
        self.done = 0
        self.peak_anonymous_bytes = 0
        self._progress = progress

    def tick(self, read: int) -> None:
        self.done = min(self.total, self.done + read)  # a threshold over a model reads its base once per model
        self.peak_anonymous_bytes = max(self.peak_anonymous_bytes, _anonymous_bytes())
        if self._progress:
            self._progress(self.done, self.total)

    def finish(self) -> None:
        """A threshold that needed no look at the tensor left some undone."""
        self.tick(self.total - self.done)


@dataclass(slots=True)
class _Work:
    """How jobs are done in this merge, and by whom they were."""

    choice: Choice
    worked: backends.Worked
    threads: int
    gpu_memory: int | None
    propagate: bool
    watch: _Watch
    resumed: int = 0  # tensors of an earlier run
    spared_bytes: tuple[int, int] = (0, 0)  # read and written for them then

    @property
    def run(self) -> Run:
        return Run(self.threads, tick=self.watch.tick, hash=hashing.function())


def _run(stage: Stage, written: Mapping[str | None, Checkpoint], outputs: Mapping[str, Writer], work: _Work) -> Health:
    """Does all jobs of a stage, whose outputs have a name each, then makes sure that no input changed meanwhile."""
    _check_direct(stage, work.choice.backend)
    _warn_of_what_the_cpu_does(stage, work.choice.backend)
    models = [opened(model, written) for model in stage.models]
    _warn_of_no_deltas(stage, models)
    overflown: dict[str, dict[str, int]] = {name: {} for name in outputs}
    jobs = list(_left(stage, outputs, overflown, work))
    with naming_what_changed(*models):
        reader = Reader(models, work.propagate)
        checkup = Checkup(stage, reader)
        cuts = model_cuts(stage, reader, work.choice.backend, work.worked, work.run) if jobs else {}
        with closing(_done(stage, jobs, reader, cuts, list(outputs.values()), work)) as done:
            for mine, found in done:
                for job, its in zip(mine, found, strict=True):
                    if any(its.nonfinite) and not work.propagate:
                        raise _nonfinite(job, its, models)
                    checkup.note(job, its.nonfinite)
                for k, (name, writer) in enumerate(outputs.items()):
                    noted = [
                        (job.name, its.overflow[k], its.hashes[k] if its.hashes else None)
                        for job, its in zip(mine, found, strict=True)
                    ]
                    writer.record(noted, work.worked)
                    overflown[name].update({tensor: count for tensor, count, _ in noted if count})
        health = checkup.health(overflown)
    _check_unchanged(models)
    for name, elements in overflown.items():
        _warn_of_overflow(stage, name, elements)
    return health


def _left(
    stage: Stage, outputs: Mapping[str, Writer], overflown: Mapping[str, dict[str, int]], work: _Work
) -> Iterator[Job]:
    """The jobs that no earlier run has done in all outputs; of the others, what was found then."""
    claimed = frozenset.intersection(*[writer.claimed for writer in outputs.values()])
    for job in stage.jobs:
        whole = [writer.still_whole(job.name) for writer in outputs.values()] if job.name in claimed else [None]
        if None in whole:
            yield job
            continue
        for elements, found in zip(overflown.values(), filter(None, whole), strict=True):
            if found.overflow:
                elements[job.name] = found.overflow
            for provider, ops in found.worked.items():
                work.worked.setdefault(provider, set()).update(ops)
        read, wrote = work.spared_bytes
        nbytes = math.prod(job.shape) * DTYPE_BITS[job.dtype] // 8
        work.spared_bytes = read + job.nbytes, wrote + nbytes * len(outputs)
        work.resumed += 1
        work.watch.tick(job.passes * job.nbytes)


def _paths(model: Checkpoint | Planned) -> tuple[Path, ...]:
    """Where a model lies that is no output of ours."""
    if isinstance(model, Planned):
        return ()
    return model.inputs if isinstance(model, Adapted) else (model.path,)


def _check_direct(stage: Stage, backend: str) -> None:
    """Jobs that are no sweeps are done by torch alone."""
    if job := next((job for job in stage.jobs if job.direct), None):
        how = "" if job.method.direct else " by columns (nuslerp_row_wise: true)"
        what = f"{job.method.name}{how} is not fused and runs by torch alone"
        if backend == "cpu":
            raise BackendError(f"{what}, not by {backend}: ask for auto or torch")
        if reason := backends.why_not("torch"):
            raise BackendError(f"{what}: {reason}")


def _warn_of_what_the_cpu_does(stage: Stage, backend: str) -> None:
    """A GPU that was asked for by name sweeps what is stored, and that alone."""
    if backends.device_of(backend) != "cpu" and (names := [job.name for job in stage.jobs if job.direct or job.gather]):
        fault = f"the CPU and not {backend} merges {len(names)} tensors, such as {names[0]!r}"
        why = "they are not fused, or their rows are gathered or computed"
        warnings.warn(f"{fault}: {why}", FastmergeWarning, stacklevel=3)


def _done(
    stage: Stage, todo: Sequence[Job], reader: Reader, cuts: Cuts, writers: Sequence[Writer], work: _Work
) -> Generator[tuple[Sequence[Job], Sequence[Found]], None, None]:
    """Jobs that were done together: by the CPU, as long as it is the choice, then by GPUs, if there are jobs left."""
    choice, size, room = work.choice, attrgetter("nbytes"), Room()

    def targets(job: Job) -> list[Target]:
        dtype = reader.output(job)
        places = [writer.target(job.name) for writer in writers]  # holds the files open
        return [Target(dtype, offset, file) for file, offset in places]

    def by_cpu(jobs: Sequence[Job]) -> Iterator[tuple[Sequence[Job], Sequence[Found]]]:
        wanted = "auto" if choice.gpu else choice.backend
        with uncollected():
            for mine, found in on_cpu(jobs, reader, cuts, targets, wanted, work.worked, work.run, room):
                for writer in writers:
                    writer.written(job.name for job in mine)
                yield mine, found

    done, left_bytes = 0, sum(map(size, todo))
    for jobs in in_batches(stage, todo, size, BATCH_BYTES):
        if choice.gpu:
            break
        started = time.perf_counter()
        yield from by_cpu(jobs)
        nbytes = sum(map(size, jobs))
        done, left_bytes = done + len(jobs), left_bytes - nbytes
        if not any(job.direct or job.gather for job in jobs):
            choice.after(nbytes, time.perf_counter() - started, left_bytes)
    left = todo[done:]
    if choice.gpu and left:
        streamer = Streamer(
            stage, reader, writers, cuts, choice.gpu, choice.devices, work.worked, work.gpu_memory, work.run
        )
        others = [job for job in left if not streamer.takes(job)]
        strange = [job for job in others if not (job.direct or job.gather)]
        if strange and choice.backend != "auto":
            backends.Ops(choice.backend, reader.dtypes(strange[0]), "gpu", work.worked)  # which refuses them
        if mine := [job for job in left if streamer.takes(job)]:
            with closing(streamer.swept(mine)) as streamed:
                for job, found in streamed:
                    yield [job], [found]
        for jobs in in_batches(stage, others, size, BATCH_BYTES):
            yield from by_cpu(jobs)


def _check_unchanged(models: Sequence[Checkpoint | Planned]) -> None:
    for model in models:
        if isinstance(model, Checkpoint):
            model.check_unchanged()


# --- what is said ---


def _nonfinite(job: Job, found: Found, models: Sequence[Checkpoint]) -> NonFiniteError:
    at = next(i for i, count in enumerate(found.nonfinite) if count)
    source = job.sources[at]
    model = models[source.model]
    return NonFiniteError(
        f"{model.name}: tensor {source.tensor!r} holds {found.nonfinite[at]:,} NaN or Inf, the first at index "
        f"{found.first[at]:,}; mend the model, or let them through with --nonfinite propagate"
    )


def _warn_of_no_deltas(stage: Stage, models: Sequence[Checkpoint]) -> None:
    """A base that is each of its models: every delta is zero, and the output is the base."""
    # Frozen embeddings may be equal to the last byte: a look at the start of each tensor settles nearly all cases.
    if (
        any(job.base for job in stage.jobs)
        and not any(job.gather for job in stage.jobs)
        and all(
            same_bytes(models[base.model], base.tensor, models[source.model], source.tensor, start_only=start_only)
            for start_only in (True, False)
            for job in stage.jobs
            if (base := job.base)
            for source in job.inputs
        )
    ):
        warnings.warn(
            "the base is identical to every model: all deltas are zero, and the output is the base",
            FastmergeWarning,
            stacklevel=3,
        )


def _warn_of_overflow(stage: Stage, output: str, overflown: Mapping[str, int]) -> None:
    if overflown:
        worst = max(overflown, key=overflown.__getitem__)
        dtypes = " and ".join(sorted({job.dtype for job in stage.jobs}))
        warnings.warn(
            f"{output + ': ' if output else ''}{sum(overflown.values()):,} elements in {len(overflown)} tensors "
            f"became infinite in {dtypes}, "
            f"{overflown[worst]:,} of them in {worst!r}; a wider out_dtype holds them",
            FastmergeWarning,
            stacklevel=2,
        )


def _sidecars(
    stage: Stage, text: str, command: str, out: Path, *, copy_tokenizer: bool = True, write_model_card: bool = True
) -> dict[str, bytes]:
    from . import __version__

    card = None
    if write_model_card:
        card = cards.card(
            list(_inputs(stage)),
            text,
            method=stage.document.method.name,
            paper=stage.document.method.paper,
            command=command,
            version=__version__,
            title=out.resolve().name,
            library="transformers" if stage.donor.config else "",
        )
    return sidecars(
        stage.donor, stage.config_changes, text, card, tokenizer=stage.tokenizer, copy_tokenizer=copy_tokenizer
    )


def _inputs(stage: Stage) -> Iterator[cards.Input]:
    """The models of a stage, then those of the stages before that it needs."""
    base = stage.document.base_model
    for model in stage.models:
        yield cards.Input(model.name, model.files, base is not None and model.name == base.text)
    for model in stage.models:
        whole = model.base if isinstance(model, Adapted) else model
        if isinstance(whole, Planned):
            yield from (each._replace(is_base=False) for each in _inputs(whole.stage))


def _anonymous_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
