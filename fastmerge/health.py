"""How far the numbers of a merge can be trusted, by what its inputs and their deltas look like in a sample."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import memory
from .batches import Reader
from .checkpoint import DTYPE_BITS
from .checkpoint.header import cannot_read, open_regular
from .layers import stacks
from .methods import number
from .planner import Job, Stage

#: What deltas stay within where dropping them at random is known to work (DARE, arXiv:2311.03099), and the share of
#: larger ones from which on they are of another kind. Those of continued pretraining reach 0.03, and dropping fails.
DARE_RANGE, DARE_BEYOND = 0.005, 0.01
#: The norm of the deltas over that of the base. Two models of one norm have 1 at 60 degrees, and 1.41 at a right angle.
UNRELATED = 1.0
#: The share of elements that are denormal, and so have fewer bits than their dtype.
DENORMAL = 0.01
#: A layer stands out where the logarithm of its rms is more robust deviations from the median (the modified z-score of
#: Iglewicz and Hoaglin, 1993), and its rms more times the median or less of it, in a stack of so many layers.
LAYER_DEVIATIONS, LAYER_TIMES, FEWEST_LAYERS = 3.5, 4.0, 5

#: Elements up to which a tensor is looked at as a whole; of a larger one so long windows, one in so many elements.
WHOLE, WINDOW, WINDOW_IN, FEWEST_WINDOWS, MOST_WINDOWS = 4096, 512, 1 << 22, 4, 64
#: Bytes of inputs for each tensor that is looked at, which takes 0.1 ms.
TENSOR_IN, FEWEST_TENSORS, MOST_TENSORS = 1 << 25, 128, 4096


@dataclass(frozen=True, slots=True)
class Deltas:
    """The deltas of a model, all of them together.

    `zero`, `denormal` and `beyond` are the shares that are exactly zero, denormal in the arithmetic, and larger than
    DARE_RANGE; `mean` is that of their magnitudes, and `relative` their `norm` over the base's, None where that is 0.
    """

    zero: float
    denormal: float
    beyond: float
    mean: float
    rms: float
    norm: float
    relative: float | None


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """An input: by tensor how many NaN and Inf went through, all counted, where there are some; the share of elements
    that are denormal in the dtype they are stored in; and its deltas, None where it has none."""

    name: str
    nonfinite: Mapping[str, int]
    denormal: float
    deltas: Deltas | None


@dataclass(frozen=True, slots=True)
class Layers:
    """The deltas of a model in a stack of layers such as model.layers: their norm and rms in each layer that is there,
    by its number, and the numbers of those that stand out."""

    stack: str
    model: str
    numbers: tuple[int, ...]
    norms: tuple[float, ...]
    rms: tuple[float, ...]
    outliers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """What was seen of a merge.

    All but counts of NaN, Inf and overflow is estimated from a sample: `sampled` of `elements`, in `looked` of
    `tensors`. Of `skipped` tensors nothing is known: they are copied, or some input is gathered or computed. `overflow`
    has, by output and tensor, how many elements became infinite when they were rounded to the output's dtype;
    `warnings` has a sentence for each figure beyond its threshold.
    """

    sampled: int = 0
    elements: int = 0
    looked: int = 0
    tensors: int = 0
    skipped: int = 0
    models: tuple[ModelHealth, ...] = ()
    layers: tuple[Layers, ...] = ()
    overflow: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    warnings: tuple[str, ...] = ()

    def to_json(self, output: str = "") -> dict[str, Any]:
        """One output's, as plain data for json.dumps; figures have four digits, and None is what is not finite."""
        return {
            **{name: getattr(self, name) for name in ("sampled", "elements", "looked", "tensors", "skipped")},
            "overflow": dict(self.overflow.get(output, {})),
            "models": [_plain(each) for each in self.models],
            "layers": [_plain(each) for each in self.layers],
            "warnings": list(self.warnings),
        }


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Deltas | ModelHealth | Layers):
        return {at.name: _plain(getattr(value, at.name)) for at in fields(value)}
    return value


class Checkup:
    """Looks at a stage's tensors soon after they are merged, while their inputs are in the page cache; many together,
    which takes half of the time."""

    def __init__(self, stage: Stage, reader: Reader) -> None:
        self._stage = stage
        self._reader = reader
        self._jobs = [job for job in stage.jobs if not job.copy and job.gather is None]
        self._wanted = {job.name for job in _spread([job for job in self._jobs if job.nbytes])}
        self._nonfinite: dict[str, tuple[int, ...]] = {}
        self._looks: dict[str, _Look] = {}
        self._waiting: list[Job] = []
        self._waiting_bytes = 0
        self._files: dict[Path, FileIO] = {}

    def note(self, job: Job, nonfinite: tuple[int, ...]) -> None:
        """A tensor was merged, in whose inputs so many elements are NaN or Inf."""
        self._nonfinite[job.name] = nonfinite
        if job.name in self._wanted:
            self._waiting.append(job)
            self._waiting_bytes += job.nbytes
            if self._waiting_bytes >= _TOGETHER_BYTES:
                self._look()

    def health(self, overflow: Mapping[str, Mapping[str, int]]) -> Health:
        """All that was seen, once all is merged; tensors that an earlier run has merged are looked at now.

        Raises CheckpointError where an input is cut short or cannot be read.
        """
        for job in self._jobs:
            if job.name not in self._nonfinite:
                self.note(job, self._counted(job) if self._reader.propagate else (0,) * len(job.sources))
        self._look()
        while self._files:
            self._files.popitem()[1].close()
        jobs = [job for job in self._jobs if job.name in self._looks]
        looks = [self._looks[job.name] for job in jobs]
        models = tuple(self._models(jobs, looks))
        layers = tuple(_layers(self._stage, jobs, looks))
        return Health(
            sum(look.sampled for look in looks),
            sum(math.prod(shape) * count for shape, count in Counter(job.shape for job in self._stage.jobs).items()),
            len(jobs),
            len(self._stage.jobs),
            len(self._stage.jobs) - len(self._jobs),
            models,
            layers,
            {
                output: {job.name: counts[job.name] for job in self._stage.jobs if job.name in counts} if counts else {}
                for output, counts in overflow.items()
            },
            tuple(_warnings(models, layers, _dropped(self._stage, jobs))),
        )

    def _look(self) -> None:
        self._looks |= {job.name: _look(self._sample(job), job) for job in self._waiting}
        self._waiting.clear()
        self._waiting_bytes = 0

    def _models(self, jobs: Sequence[Job], looks: Sequence[_Look]) -> Iterator[ModelHealth]:
        names = [model.text for model in self._stage.document.models]
        nonfinite: list[dict[str, int]] = [{} for _ in names]
        elements, denormal = np.zeros((2, len(names)))
        deltas = np.zeros((len(names), len(_Sums._fields)))
        for job in self._jobs:
            if any(counts := self._nonfinite[job.name]):
                for (model, tensor), count in zip(job.sources, counts, strict=True):
                    nonfinite[model] |= {tensor: count} if count else {}
        for job, look in zip(jobs, looks, strict=True):
            held = [source.model for source in job.sources]
            elements[held] += look.elements
            denormal[held] += look.denormal
            deltas[held[: len(look.deltas)]] += look.deltas
        shares = (denormal / np.maximum(elements, 1)).tolist()
        for name, counts_of, share, sums in zip(names, nonfinite, shares, deltas.tolist(), strict=True):
            yield ModelHealth(name, counts_of, share, _deltas(_Sums(*sums)))

    # --- elements ---

    def _sample(self, job: Job) -> NDArray[Any]:
        """Some elements of each input, at the same places: [inputs, elements]."""
        begins, width = windows(job.infos[0].elements)
        return self._values(job, begins, width)

    def _counted(self, job: Job) -> tuple[int, ...]:
        """The NaN and Inf of each input, all of which is read."""
        counts, elements = np.zeros(len(job.sources), np.int64), job.infos[0].elements
        for begin in range(0, elements, _PIECE):
            values = self._values(job, [begin], min(_PIECE, elements - begin))
            counts += np.count_nonzero(~np.isfinite(values), axis=1)
        return tuple(counts.tolist())

    def _values(self, job: Job, begins: Sequence[int], width: int) -> NDArray[Any]:
        """So many elements from each of these places, of each input: [inputs, elements], in the arithmetic's dtype."""
        dtypes = [info.dtype for info in job.infos]
        made = np.empty((len(dtypes), len(begins) * width), np.float64 if "F64" in dtypes else np.float32)
        for row, (path, first), dtype in zip(made, self._reader.places(job), dtypes, strict=True):
            file, size = self._file(path).fileno(), DTYPE_BITS[dtype] // 8
            raw = np.empty((len(begins), width * size), np.uint8)
            try:
                for begin, into in zip(begins, raw, strict=True):
                    memory.load(file, first + begin * size, into.data)
            except OSError as error:
                raise cannot_read(path, error) from None
            row[:] = _numbers(raw.reshape(-1), dtype)
        return made

    def _file(self, path: Path) -> FileIO:
        if path not in self._files:
            if len(self._files) >= _KEPT_FILES:
                self._files.pop(next(iter(self._files))).close()
            self._files[path] = open_regular(path)
        return self._files[path]


_PIECE = 1 << 18  # elements
_TOGETHER_BYTES = 1 << 31  # of inputs
_KEPT_FILES = 16
_NUMPY: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
#: The smallest number of all bits of each dtype.
_SMALLEST = {"F64": 2.0**-1022, "F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14}


def windows(elements: int) -> tuple[list[int], int]:
    """Where the windows of a tensor's sample begin, and how long they are: evenly spread from its first to its last
    element, and not in step with its rows."""
    if elements <= WHOLE:
        return [0], elements
    count = min(max(elements // WINDOW_IN, FEWEST_WINDOWS), MOST_WINDOWS)
    return [(elements - WINDOW) * i // (count - 1) for i in range(count)], WINDOW


def _spread(jobs: Sequence[Job]) -> Sequence[Job]:
    """Those that are looked at: all, or no more than their bytes allow, evenly spread and not in step with layers."""
    most = min(max(sum(job.nbytes for job in jobs) // TENSOR_IN, FEWEST_TENSORS), MOST_TENSORS)
    if len(jobs) <= most:
        return jobs
    golden = 0x9E3779B9  # 2**32 over the golden ratio: the multiples of it, modulo 2**32, lie evenly
    return [jobs[at] for at in sorted({(i * golden % 2**32 * len(jobs)) >> 32 for i in range(most)})]


def _numbers(raw: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(_NUMPY[dtype])


# --- a tensor ---


class _Sums(NamedTuple):
    """What adds up over the deltas of tensors, each as if all of its elements were as the sample is."""

    elements: float
    zero: float
    denormal: float
    beyond: float
    magnitudes: float
    squares: float
    base: float  # squares of the base, where the deltas are finite


class _Look(NamedTuple):
    """What was seen of a tensor of so many elements; `deltas` has each model's `_Sums`, [models, sums], or nothing."""

    sampled: int
    elements: int
    denormal: NDArray[np.float64]  # of each input, how many of all elements
    deltas: NDArray[np.float64]


def _look(values: NDArray[Any], job: Job) -> _Look:
    sampled, elements = values.shape[1], job.infos[0].elements
    with np.errstate(over="ignore", invalid="ignore"):
        smallest = np.array([[_SMALLEST[info.dtype]] for info in job.infos], values.dtype)
        denormal = _denormal(np.abs(values), smallest) * (elements / sampled)
        sums = _sums(values[:-1], values[-1]) if job.base else np.zeros((0, len(_Sums._fields)))
    return _Look(sampled, elements, denormal, sums * (elements / np.maximum(sums[:, :1], 1)))


def _sums(models: NDArray[Any], base: NDArray[Any]) -> NDArray[np.float64]:
    """The `_Sums` of some elements of each model, [models, sums]; deltas that are NaN or Inf count for nothing."""
    sizes = models - base
    np.abs(sizes, out=sizes)
    finite = np.isfinite(sizes)
    squares = np.square(base.astype(np.float64))
    counts, based = np.full(len(sizes), len(base)), np.full(len(sizes), squares.sum())
    if not finite.all():
        sizes[~finite] = 0
        counts, based = _count(finite), np.where(finite, squares, 0).sum(axis=1)
    wide = sizes.astype(np.float64)
    sums = (
        counts,
        counts - _count(sizes > 0),
        _denormal(sizes, np.finfo(sizes.dtype).tiny),
        _count(sizes > sizes.dtype.type(DARE_RANGE)),
        wide.sum(axis=1),
        np.square(wide, out=wide).sum(axis=1),
        based,
    )
    made: NDArray[np.float64] = np.array(sums, np.float64).T
    return made


def _denormal(sizes: NDArray[Any], smallest: Any) -> NDArray[np.int64]:
    """Of each row of magnitudes, how many are below the smallest normal number, and not zero."""
    small = sizes < smallest
    return _count(small & (sizes != 0)) if small.any() else np.zeros(len(sizes), np.int64)


def _count(rows: NDArray[Any]) -> NDArray[np.int64]:
    """Of each row, how many are not zero."""
    return np.array([np.count_nonzero(row) for row in rows], np.int64)


# --- all together ---


def _deltas(sums: _Sums) -> Deltas | None:
    if not sums.elements:
        return None
    zero, denormal, beyond, mean, square = (each / sums.elements for each in sums[1:6])
    norm, base = math.sqrt(sums.squares), math.sqrt(sums.base)
    return Deltas(zero, denormal, beyond, mean, math.sqrt(square), norm, norm / base if base else None)


def _layers(stage: Stage, jobs: Sequence[Job], looks: Sequence[_Look]) -> Iterator[Layers]:
    by_name = {job.name: (job, look) for job, look in zip(jobs, looks, strict=True) if job.base}
    for prefix, stack in stacks(by_name).items():
        found: dict[int, dict[int, tuple[float, float]]] = {}  # of each model's layers, elements and squares
        for layer, names in stack.layers.items():
            for name in names:
                job, look = by_name.get(".".join(filter(None, (prefix, str(layer), name))), (None, None))
                if job is None or look is None:  # its number has zeros before it
                    continue
                for source, each in zip(job.inputs, look.deltas.tolist(), strict=True):
                    sums, layers = _Sums(*each), found.setdefault(source.model, {})
                    elements, squares = layers.get(layer, (0.0, 0.0))
                    layers[layer] = elements + sums.elements, squares + sums.squares
        for model, layers in sorted(found.items()):
            held = [(layer, *sums) for layer, sums in sorted(layers.items()) if sums[0]]
            rms = tuple(math.sqrt(squares / elements) for _, elements, squares in held)
            yield Layers(
                prefix,
                stage.document.models[model].text,
                tuple(layer for layer, _, _ in held),
                tuple(math.sqrt(squares) for _, _, squares in held),
                rms,
                tuple(held[at][0] for at in outliers(rms)),
            )


def outliers(sizes: Sequence[float]) -> list[int]:
    """Which of some sizes stand out, by their indices; zeros count for nothing: such a layer was left as it is."""
    at = [i for i, size in enumerate(sizes) if 0 < size < math.inf]
    if len(at) < FEWEST_LAYERS:
        return []
    logs = [math.log(sizes[i]) for i in at]
    middle = _median(logs)
    apart = [abs(log - middle) for log in logs]
    limit = max(LAYER_DEVIATIONS * _median(apart) / 0.6745, math.log(LAYER_TIMES))
    return [i for i, distance in zip(at, apart, strict=True) if distance > limit]


def _median(values: Sequence[float]) -> float:
    """As numpy's, which takes 10 ms to be imported."""
    ordered = sorted(values)
    return (ordered[len(ordered) // 2] + ordered[(len(ordered) - 1) // 2]) / 2


# --- what is said ---


def _warnings(models: Sequence[ModelHealth], layers: Sequence[Layers], dropped: Mapping[int, float]) -> Iterator[str]:
    changed = any(each.deltas.zero < 1 for each in models if each.deltas)
    for model, each in enumerate(models):
        if each.nonfinite:
            worst = max(each.nonfinite, key=each.nonfinite.__getitem__)
            yield (
                f"{each.name}: {sum(each.nonfinite.values()):,} NaN or Inf in {len(each.nonfinite):,} tensors, "
                f"{each.nonfinite[worst]:,} of them in {worst!r}, went where the arithmetic took them; mend the model"
            )
        if each.denormal > DENORMAL:
            yield (
                f"{each.name}: {each.denormal:.2%} of its elements are denormal (threshold {DENORMAL:.0%}) and have "
                "lost bits; take it in a dtype of more range, such as bfloat16"
            )
        if (deltas := each.deltas) is None:
            continue
        if deltas.zero == 1 and changed:
            yield f"{each.name}: all deltas in the sample are zero (threshold 100%); look whether it is the base again"
        if deltas.denormal > DENORMAL:
            yield (
                f"{each.name}: {deltas.denormal:.2%} of its deltas are denormal (threshold {DENORMAL:.0%}) and have "
                "lost bits; look whether its scale is that of the base"
            )
        if deltas.relative is not None and deltas.relative > UNRELATED:
            yield (
                f"{each.name}: its deltas are {deltas.relative:.3g} times as large as the base (threshold "
                f"{UNRELATED:g}), as between models of different origin; name the base that it was tuned from"
            )
        if model in dropped and deltas.beyond > DARE_BEYOND:
            yield (
                f"{each.name}: {deltas.beyond:.2%} of its deltas are larger than {DARE_RANGE:g} (threshold "
                f"{DARE_BEYOND:.0%}), as after continued pretraining, where dropping them at random is known to fail "
                f"(density {dropped[model]:g}); raise the density, or merge by ties"
            )
    yield from (_of_layers(each) for each in layers if each.outliers)


def _dropped(stage: Stage, jobs: Sequence[Job]) -> dict[int, float]:
    """The models of which DARE drops deltas, by number, and the least density of each."""
    found: dict[int, float] = {}
    for job in jobs if stage.document.method.name in ("dare_linear", "dare_ties") else ():
        for settings in job.variants if job.base else ():
            for source, own in zip(job.inputs, settings.models, strict=True):
                if (density := number(own, "density")) < 1:
                    found[source.model] = min(density, found.get(source.model, 1.0))
    return found


def _of_layers(found: Layers) -> str:
    median = _median([size for size in found.rms if size])
    sizes = dict(zip(found.numbers, found.rms, strict=True))
    worst = max(found.outliers, key=lambda layer: abs(math.log(sizes[layer] / median)))
    named = ", ".join(map(str, found.outliers[:_NAMED])) + (", ..." if len(found.outliers) > _NAMED else "")
    return (
        f"{found.model}: in {found.stack or 'its stack'} the deltas of layers {named} stand out, those of {worst} by "
        f"an rms {sizes[worst] / median:.3g} times the median (threshold {LAYER_TIMES:g} times either way, and "
        f"{LAYER_DEVIATIONS:g} robust deviations); look at them with fastmerge diff"
    )


_NAMED = 8  # layers in a sentence
