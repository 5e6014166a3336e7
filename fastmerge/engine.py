"""The loop over the jobs of a plan: read, measure, sweep, write; and the public `merge`."""

from __future__ import annotations

import dataclasses
import errno
import os
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import backends
from .checkpoint import STAGES, Checkpoint, Writer, open_checkpoint, same_bytes, sidecars
from .errors import CheckpointError, FastmergeWarning, NonFiniteError, OutputError, RecipeError
from .methods import Base, Measured, ranks, rescale_of
from .planner import SHARD_SIZE, Job, Plan, Planned, Source, Stage
from .planner import plan as make_plan
from .recipe import Recipe
from .sweep import EVERY, Cut, Found, Inputs, Part, Rescale, Run, Sweep, Target, View

Progress = Callable[[int, int], None]

#: Inputs that are measured and swept together, in bytes: small enough to be in the page cache the second time.
_BATCH_BYTES = 1 << 28
_BATCH_JOBS = 512
_BATCH_FILES = 16  # outputs of a batch are open together
_IDENTITY = Sweep((Part(),))


@dataclass(frozen=True, slots=True)
class Report:
    """What a merge did."""

    out: Path
    methods: tuple[str, ...]
    tensors: int
    bytes_read: int  # the inputs, each once
    bytes_written: int
    seconds: float
    peak_anonymous_bytes: int  # memory that is not a mapped file; 0 where the system doesn't tell
    providers: tuple[str, ...]
    threads: int

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
    overwrite: bool = False,
    nonfinite: str = "error",
    progress: Progress | None = None,
) -> Report:
    """Merges the models of a recipe into a new checkpoint folder.

    Args:
        recipe: a `Recipe`, or the path of its YAML file.
        out: the folder to write; new or empty, unless `overwrite`.
        backend: "auto", or a provider by name ("cpu", "torch"), which then never falls back.
        threads: workers; by default one for each processor that this process may use.
        seed: of the random drops; before the recipe's own. The default is 0.
        shard_size: the most bytes of tensors in one file.
        overwrite: replace an earlier output in `out`.
        nonfinite: "error", or "propagate": NaN and Inf in the inputs go where the arithmetic takes them.
        progress: called with (bytes done, bytes in all) about twenty times a second, on this thread.

    Raises:
        FastmergeError: the user's mistake, as the subclass says; nothing that looks complete is left in `out`.
        KeyboardInterrupt: at once on Ctrl-C, likewise.
    """
    if nonfinite not in ("error", "propagate"):
        raise ValueError(f'nonfinite is "error" or "propagate", not {nonfinite!r}')
    started = time.perf_counter()
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    plan = make_plan(recipe, seed=seed, shard_size=shard_size)
    watch = _Watch(plan, progress)
    work = _Work(backend, threads or backends.threads(), nonfinite == "propagate", watch)
    folder = Path(out)
    inputs = [model.path for stage in plan.stages for model in stage.models if isinstance(model, Checkpoint)]
    result = plan.stages[-1]
    with _disk(folder), Writer(folder, result.layout, inputs=inputs, overwrite=overwrite) as writer:
        written: dict[str, Checkpoint] = {}
        for number, stage in enumerate(plan.stages[:-1]):
            place = folder / STAGES / str(number)  # its name is the user's, and may be any text
            with Writer(place, stage.layout, inputs=(), overwrite=False) as between:
                _run(stage, written, between, work)
                between.commit(_sidecars(stage, recipe, place, seed))
            written[str(stage.name)] = open_checkpoint(place)
        _run(result, written, writer, work)
        watch.finish()
        writer.commit(_sidecars(result, recipe, folder, seed))
    return Report(
        folder,
        tuple(dict.fromkeys(stage.document.method.name for stage in plan.stages)),
        sum(len(stage.jobs) for stage in plan.stages),
        plan.bytes_read,
        plan.bytes_written,
        time.perf_counter() - started,
        watch.peak_anonymous_bytes,
        tuple(work.providers),
        work.threads,
    )


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


class _Watch:
    """Progress and memory, looked at whenever an op comes up for air."""

    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self.total = sum(_passes(job) * _bytes(stage, job) for stage in plan.stages for job in stage.jobs)
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

    backend: str
    threads: int
    propagate: bool
    watch: _Watch
    providers: dict[str, None] = dataclasses.field(default_factory=dict)

    @property
    def run(self) -> Run:
        return Run(self.threads, tick=self.watch.tick)


@dataclass(slots=True)
class _Batch:
    """Jobs done together: what they read, and the owners that keep it mapped."""

    jobs: list[Job]
    inputs: list[Inputs]
    owners: list[object]


def _run(stage: Stage, written: dict[str, Checkpoint], writer: Writer, work: _Work) -> None:
    """Does all jobs of a stage, batch by batch, then makes sure that no input changed meanwhile."""
    models = [written[model.name] if isinstance(model, Planned) else model for model in stage.models]
    _warn_of_no_deltas(stage, models)
    overflown: dict[str, int] = {}
    try:
        cuts = _model_cuts(stage, models, work)
        for jobs in _batches(stage):
            batch = _read(jobs, models, work.propagate)
            for provider, mine in _shared_out(batch, work):
                for job, found in _swept(mine, provider, cuts, writer, work):
                    if sum(found.nonfinite) and not work.propagate:
                        raise _nonfinite(job, found, models)
                    if sum(found.overflow):
                        overflown[job.name] = sum(found.overflow)
    except CheckpointError:
        _check_unchanged(models)  # which knows the file
        raise
    _check_unchanged(models)
    _warn_of_overflow(stage, overflown)


def _swept(
    batch: _Batch,
    provider: backends.Provider,
    cuts: Mapping[str, tuple[Cut, ...]],
    writer: Writer,
    work: _Work,
) -> Iterator[tuple[Job, Found]]:
    sweeps = _measured(batch, provider, cuts, work)
    places = [writer.target(job.name) for job in batch.jobs]  # holds the files open
    targets = [
        [Target(_dtype(job, inputs), offset, file)]
        for job, inputs, (file, offset) in zip(batch.jobs, batch.inputs, places, strict=True)
    ]
    found = provider.merge(batch.inputs, [[sweep] for sweep in sweeps], targets, work.run)
    return zip(batch.jobs, found, strict=True)


def _check_unchanged(models: Sequence[Checkpoint]) -> None:
    for model in models:
        model.check_unchanged()


def _batches(stage: Stage) -> Iterator[list[Job]]:
    file_of = {name: shard.name for shard in stage.layout.shards for name in shard.offsets}
    jobs: list[Job] = []
    files: set[str] = set()
    filled = 0
    for job in stage.jobs:
        jobs.append(job)
        files.add(file_of[job.name])
        filled += _bytes(stage, job)
        if filled >= _BATCH_BYTES or len(jobs) >= _BATCH_JOBS or len(files) >= _BATCH_FILES:
            yield jobs
            jobs, files, filled = [], set(), 0
    if jobs:
        yield jobs


def _read(jobs: Sequence[Job], models: Sequence[Checkpoint], propagate: bool) -> _Batch:
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
    return _Batch(list(jobs), inputs, owners)


def _shared_out(batch: _Batch, work: _Work) -> Iterator[tuple[backends.Provider, _Batch]]:
    """The batch by provider: most of it goes to the first, float64 to one that takes it."""
    shares: dict[str, tuple[backends.Provider, _Batch]] = {}
    for job, inputs in zip(batch.jobs, batch.inputs, strict=True):
        dtypes = {view.dtype for view in _views(inputs)} | {_dtype(job, inputs)}
        provider = backends.choose(work.backend, dtypes)
        work.providers[provider.name] = None
        _, mine = shares.setdefault(provider.name, (provider, _Batch([], [], batch.owners)))
        mine.jobs.append(job)
        mine.inputs.append(inputs)
    yield from shares.values()


def _views(inputs: Inputs) -> tuple[View, ...]:
    return inputs.models if inputs.base is None else (*inputs.models, inputs.base)


def _dtype(job: Job, inputs: Inputs) -> str:
    return "U8" if inputs.models[0].dtype == "U8" else job.dtype


# --- measures ---


def _measured(
    batch: _Batch, provider: backends.Provider, cuts: Mapping[str, tuple[Cut, ...]], work: _Work
) -> list[Sweep]:
    """The sweep of each job, after whatever its method wants to know of the tensors."""
    sweeps = [_IDENTITY] * len(batch.jobs)
    selecting = [i for i, job in enumerate(batch.jobs) if _selects(job) and job.name not in cuts]
    found = provider.threshold(
        [[batch.inputs[i]] for i in selecting],
        [ranks(batch.jobs[i].settings, batch.inputs[i].elements) for i in selecting],
        work.run,
    )
    chosen = dict(zip(selecting, found, strict=True))
    products = _gram(batch, provider, work)
    for i, job in enumerate(batch.jobs):
        if not job.copy:
            measured = Measured(cuts.get(job.name) or chosen.get(i, ()), products.get(i, ()))
            sweeps[i] = job.method.sweep(job.settings, measured)
    return _rescaled(batch, sweeps, provider, work)


def _gram(batch: _Batch, provider: backends.Provider, work: _Work) -> dict[int, list[list[float]]]:
    wanted = [i for i, job in enumerate(batch.jobs) if job.method.gram and not job.copy]
    found = provider.gram([batch.inputs[i] for i in wanted], work.run)
    return {i: products.tolist() for i, products in zip(wanted, found, strict=True)}


def _rescaled(batch: _Batch, sweeps: list[Sweep], provider: backends.Provider, work: _Work) -> list[Sweep]:
    """Where a method matches norms: each part's rescale becomes the norm before `Keep` over the norm after it."""
    matched = {i: rescale_of(job.method, job.settings) for i, job in enumerate(batch.jobs) if not job.copy}
    wanted = [i for i, rescale in matched.items() if rescale is not Rescale.NONE]
    found = provider.norms([batch.inputs[i] for i in wanted], [sweeps[i] for i in wanted], work.run)
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


def _model_cuts(stage: Stage, models: Sequence[Checkpoint], work: _Work) -> dict[str, tuple[Cut, ...]]:
    """`scope: model`: one selection over all tensors of a model, told to each tensor in its own indices."""
    jobs = [job for job in stage.jobs if _selects(job) and job.settings.shared.get("scope") == "model"]
    if not jobs:
        return {}
    batch = _read(jobs, models, work.propagate)
    provider = backends.choose(work.backend, {view.dtype for inputs in batch.inputs for view in _views(inputs)})
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
        ((cut,),) = provider.threshold([group], [wanted], work.run)
        start = 0
        for job, inputs, settings in parts:
            every = settings.shared["ties"] == "all" and cut.ties_end > 0
            cuts[job.name].append(Cut(cut.magnitude, EVERY if every else max(0, cut.ties_end - start)))
            start += inputs.elements
    return {name: tuple(each) for name, each in cuts.items()}


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
    jobs = [job for job in stage.jobs if job.method.base is Base.ORIGIN and job.base is not None and not job.copy]
    if jobs and all(
        same_bytes(models[job.base.model], job.base.tensor, models[source.model], source.tensor)
        for job in jobs
        for source in job.inputs
        if job.base is not None
    ):
        warnings.warn(
            "the base is identical to every model: all deltas are zero, and the output is the base",
            FastmergeWarning,
            stacklevel=3,
        )


def _warn_of_overflow(stage: Stage, overflown: Mapping[str, int]) -> None:
    if overflown:
        worst = max(overflown, key=overflown.__getitem__)
        dtypes = " and ".join(sorted({job.dtype for job in stage.jobs}))
        warnings.warn(
            f"{sum(overflown.values()):,} elements in {len(overflown)} tensors became infinite in {dtypes}, "
            f"{overflown[worst]:,} of them in {worst!r}; a wider out_dtype holds them",
            FastmergeWarning,
            stacklevel=2,
        )


def _sidecars(stage: Stage, recipe: Recipe, out: Path, seed: int | None) -> dict[str, bytes]:
    from . import __version__

    method = stage.jobs[0].method if stage.jobs else None
    if method is None:
        raise RecipeError("the recipe gives no tensors")
    base = next((stage.models[job.base.model].name for job in stage.jobs if job.base), None)
    options = "" if seed is None else f" --seed {seed}"
    return sidecars(
        stage.donor,
        stage.config_changes,
        recipe.text,
        method=method.name,
        paper=method.paper,
        models=[model.name for model in stage.models],
        base=base,
        command=f"fastmerge merge mergekit_config.yml {shlex.quote(out.name)}{options}",
        version=__version__,
        title=out.resolve().name,
    )


def _bytes(stage: Stage, job: Job) -> int:
    return sum(stage.models[source.model].tensors[source.tensor].nbytes for source in job.sources)


def _passes(job: Job) -> int:
    """How often a job reads its inputs: once, and once more for each thing that its method measures."""
    if job.copy:
        return 1
    return 1 + job.method.selects + job.method.gram + (rescale_of(job.method, job.settings) is not Rescale.NONE)


def _anonymous_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
