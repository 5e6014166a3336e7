"""How the cost goes with the size: curves over bytes, threads, models, tiny tensors, and outputs of one read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import accuracy
import disk
import numpy as np
import pytest
from cases import CASES, MODELS, Buffers, Case, read_by, settings, sweeps
from ceiling import Ceiling, stores
from conftest import Ratio, Row

from fastmerge import Recipe, backends, reference
from fastmerge.methods import METHODS, ranks
from fastmerge.sweep import SWEPT, Inputs, Run, Target, View

_PROVIDER: Any = backends.provider("cpu")
_DTYPE = "BF16"
_MODELS = (2, 4, 8, 16, 32)
_GRAMS = (2, 4, 8)
_TINY, _COUNT = (2048, 256), 4000  # elements, tensors
_OUTPUTS = (1, 2, 4, 8)
_SMALLEST = 1e6  # parameters of a model
_CHECKED = 1 << 18  # elements of a tensor, from the first, that are compared with the reference's
_SAMPLED = _COUNT // 16  # of tiny tensors every so many-th is


class Taken(NamedTuple):
    """Seconds of some calls, by the clock and of the processors."""

    seconds: list[float]
    spent: list[float]


@pytest.fixture(scope="module")
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("rounds"))


# --- from disk to disk ---


@pytest.fixture(scope="module")
def written() -> Iterator[Callable[[float], disk.Models]]:
    """Models of about so many parameters, written once."""
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
        yield cache(lambda parameters: disk.write_llamas(Path(folder, f"{parameters:.0f}"), parameters))


@pytest.fixture(scope="module")
def sizes(request: pytest.FixtureRequest) -> list[float]:
    """Parameters of a model, each four times those before, up to --params."""
    largest = request.config.getoption("params")
    return [largest / 4**step for step in range(20) if step == 0 or largest / 4**step >= _SMALLEST][::-1]


@pytest.mark.parametrize("op", ["scale"])
@pytest.mark.parametrize("case", ["bytes"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_bytes(
    op: str,
    case: str,
    method: str,
    sizes: list[float],
    written: Callable[[float], disk.Models],
    run: Run,
    rounds: int,
    record: Callable[[Row], None],
) -> None:
    for parameters in sizes:
        models = written(parameters)
        recipe = disk.recipe_of(method, models)
        out = models.folder / "merged"
        ours = _Process(disk.ours(recipe, out, run), out)
        floor = _Process(disk.floor(recipe, out, run), out)
        ours.run(keep=True)
        disk.checked(recipe, out)
        merging, bare = _in_turn(_few(rounds), ours, floor)
        nbytes = 2 * models.parameters * (MODELS + 2)
        record(_row(case, method, nbytes, nbytes, merging, bare)._replace(**disk.peaks(ours.children, run)))


@pytest.mark.parametrize("op", ["scale"])
@pytest.mark.parametrize("case", ["settings"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_outputs_on_disk(
    op: str,
    case: str,
    method: str,
    sizes: list[float],
    written: Callable[[float], disk.Models],
    run: Run,
    rounds: int,
    record: Callable[[Row], None],
) -> None:
    """Against one output; and at most: twice what one costs beside its writing, and the writing of all.

    What an output costs to write is what the floor takes longer for each one more.
    """
    models = written(sizes[max(0, len(sizes) - 2)])
    recipe = disk.recipe_of(method, models)
    most = _OUTPUTS[-1]
    out = models.folder / "merged"
    lambdas = [f"{1 + number / 16}" for number in range(most)]
    vary = f"--vary=lambda={','.join(lambdas)}"
    ours = [_Process(disk.ours(recipe, out, run, *options), out) for options in ((), (vary,))]
    floors = [_Process(disk.floor(recipe, out, run, outputs), out) for outputs in (1, most)]
    for process, folder in zip(ours, (out, out / f"lambda={lambdas[-1]}"), strict=True):
        process.run(keep=True)
        disk.checked(Recipe.load(folder / "mergekit_config.yml"), folder)
    one, many, bare_one, bare_many = _in_turn(_few(rounds), *ours, *floors)
    for outputs, merging, bare, process in zip((1, most), (one, many), (bare_one, bare_many), ours, strict=True):
        nbytes = 2 * models.parameters * (MODELS + 1 + outputs)
        row = _row(case, f"{method}, disk to disk", outputs, nbytes, merging, bare)
        record(row._replace(**_against("one output", merging, one), **disk.peaks(process.children, run)))
    writing = [(b - a) / (most - 1) for a, b in zip(bare_one.seconds, bare_many.seconds, strict=True)]
    allowed = [2 * (a - each) + most * each for a, each in zip(one.seconds, writing, strict=True)]
    record(
        Row(
            op,
            case,
            f"{method}, disk to disk, at most",
            _DTYPE,
            median(allowed),
            nbytes / median(allowed) / 1e9,
            times=Ratio.of(allowed, one.seconds),
            against="one output",
            at=most,
        )
    )


@pytest.mark.parametrize("op", ["scale"])
@pytest.mark.parametrize("case", ["tensors"])
@pytest.mark.parametrize("method", ["command line"])
def test_tiny_tensors_on_disk(
    op: str, case: str, method: str, tmp_path: Path, run: Run, rounds: int, record: Callable[[Row], None]
) -> None:
    for elements in _TINY:
        processes = []
        for count, each in ((_COUNT, elements), (1, _COUNT * elements)):
            shapes = {disk.LOOKED_AT.replace("0", f"{number}"): (each,) for number in range(count)}
            models = disk.write_models(tmp_path / f"{count}-of-{each}", shapes, {"model_type": "llama"})
            recipe = disk.recipe_of("task_arithmetic", models)
            out = models.folder / "merged"
            process = _Process(disk.ours(recipe, out, run), out)
            process.run(keep=True)
            disk.checked(recipe, out)
            processes.append(process)
        many, one = _in_turn(_few(rounds), *processes)
        row = _overhead(method, elements, 2 * _COUNT * elements * (MODELS + 2), many, one)
        record(row._replace(**disk.peaks(processes[0].children, run)))


class _Process:
    """A command that writes to a folder, run again and again on a disk at rest; and what each run took."""

    def __init__(self, command: Sequence[str], out: Path) -> None:
        self._command, self._out = list(command), out
        self.children: list[disk.Child] = []

    def run(self, keep: bool = False) -> None:
        self.children.append(disk.alone(self._command, self._out, keep))

    def __call__(self) -> tuple[float, float]:
        self.run()
        return self.children[-1].seconds, self.children[-1].spent


def _few(rounds: int) -> int:
    return max(1, rounds // 5)


# --- in memory ---


class Work(NamedTuple):
    """An op on the sets of some buffers, by number."""

    call: Callable[[int], Any]
    inputs: list[list[Inputs]]
    targets: list[list[list[Target]]] | None = None  # where it writes

    @property
    def nbytes(self) -> int:
        outputs = len(self.targets[0][0]) if self.targets else 0
        return SWEPT[_DTYPE] * sum(each.elements * (len(each.views) + outputs) for each in self.inputs[0])


@pytest.fixture(scope="module")
def large() -> Buffers:
    return Buffers(CASES["mlp"]._replace(outputs=_OUTPUTS[-1]), _DTYPE)


@pytest.fixture(scope="module")
def crowd() -> Buffers:
    return Buffers(Case(1, (2048, 2048), models=_MODELS[-1]), _DTYPE)


@pytest.mark.parametrize("op", ["scale"])
@pytest.mark.parametrize("case", ["threads"])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_threads(
    op: str, case: str, method: str, large: Buffers, run: Run, rounds: int, record: Callable[[Row], None]
) -> None:
    """Up to --threads."""
    for threads in sorted({2**power for power in range(run.threads.bit_length())} | {run.threads}):
        crew = run._replace(threads=threads)
        work = _whole(method, large, crew)
        ours, *bare = _in_turn(rounds, _op(work, large), *_barest(work, large, crew))
        record(_row(case, method, threads, work.nbytes, ours, *bare))


@pytest.mark.parametrize("op", ["scale"])
@pytest.mark.parametrize("case", ["models"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "gram"])
def test_models(
    op: str, case: str, method: str, crowd: Buffers, run: Run, rounds: int, record: Callable[[Row], None]
) -> None:
    for models in _GRAMS if method == "gram" else _MODELS:
        work = _gram(crowd, run, models) if method == "gram" else _whole(method, crowd, run, models)
        ours, *bare = _in_turn(rounds, _op(work, crowd), *_barest(work, crowd, run))
        record(_row(case, method, models, work.nbytes, ours, *bare))


@pytest.mark.parametrize("op", ["scale"])
@pytest.mark.parametrize("case", ["tensors"])
@pytest.mark.parametrize("method", ["merge", "merge_ranked", "threshold", "gram"])
def test_tiny_tensors(op: str, case: str, method: str, run: Run, rounds: int, record: Callable[[Row], None]) -> None:
    """All of them in one call, against one tensor of as many elements."""
    made = {
        "merge": lambda buffers: _whole("task_arithmetic", buffers, run),
        "merge_ranked": lambda buffers: _whole("ties", buffers, run),
        "threshold": lambda buffers: _threshold(buffers, run),
        "gram": lambda buffers: _gram(buffers, run, 2),
    }[method]
    for elements in _TINY:
        tiny, whole = (Buffers(Case(*each), _DTYPE) for each in ((_COUNT, (elements,)), (1, (_COUNT, elements))))
        work = made(tiny)
        many, one = _in_turn(rounds, _op(work, tiny), _op(made(whole), whole))
        record(_overhead(method, elements, work.nbytes, many, one))


@pytest.mark.parametrize("op", ["scale"])
@pytest.mark.parametrize("case", ["settings"])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_linear", "slerp"])
def test_outputs(
    op: str, case: str, method: str, large: Buffers, run: Run, rounds: int, record: Callable[[Row], None]
) -> None:
    """Of one read, and of one read each, against one output."""
    each = [_whole(method, large, run, variants=(number,)) for number in range(_OUTPUTS[-1])]

    def in_turn(calls: Sequence[Callable[[int], Any]], number: int) -> None:
        for call in calls:
            call(number)

    for outputs in _OUTPUTS:
        work = _whole(method, large, run, variants=range(outputs))
        apart = work._replace(call=partial(in_turn, [single.call for single in each[:outputs]]))
        together, one, separate, *bare = _in_turn(
            rounds, *(_op(every, large) for every in (work, each[0], apart)), *_barest(work, large, run)
        )
        row = _row(case, method, outputs, work.nbytes, together, *bare)
        record(row._replace(**_against("one output", together, one)))
        row = _row(case, f"{method}, one by one", outputs, work.nbytes, separate, *bare)
        record(row._replace(**_against("one output", separate, one)))


# --- the ops; each is right before it is timed ---


def _whole(method: str, buffers: Buffers, run: Run, models: int = MODELS, variants: Sequence[int] = (0,)) -> Work:
    """Measuring and sweeping as the engine does it, with other settings for each output.

    Merging at one go what is ranked is held to the cuts of `threshold`, an op of its own.
    """
    row = METHODS[method]
    reads = read_by(row, models)
    sets = [buffers.inputs(*reads, number) for number in range(len(buffers))]
    targets = [buffers.targets(number, variants) for number in range(len(buffers))]
    known = sweeps(_PROVIDER, method, sets[0], run, variants)
    wanted = [ranks(settings(row, len(each.models)), each.elements) for each in sets[0]] if row.selects else []

    def call(number: int) -> None:
        inputs = sets[number]
        if row.selects:  # the cuts within `known` are not looked at
            _PROVIDER.merge_ranked(inputs, known, wanted, targets[number], run)
        elif row.gram:
            _PROVIDER.merge(inputs, sweeps(_PROVIDER, method, inputs, run, variants), targets[number], run)
        else:
            _PROVIDER.merge(inputs, known, targets[number], run)

    buffers.out()[:] = 0xFF
    call(0)
    for inputs, each, places in list(zip(sets[0], known, targets[0], strict=True))[::_SAMPLED]:
        for sweep, target in zip(each, places, strict=True):
            merged = accuracy.tensor_in(View(target.offset, target.dtype), inputs.elements)
            assert bool(merged.isfinite().all()), "a part of the output was never written"
            accuracy.assert_bits(merged[:_CHECKED], inputs, sweep, target.dtype)
    return Work(call, sets, targets)


def _gram(buffers: Buffers, run: Run, tensors: int) -> Work:
    sets = [buffers.inputs(tensors, False, number) for number in range(len(buffers))]
    sampled = sets[0][::_SAMPLED]
    for ours, expected in zip(_PROVIDER.gram(sets[0], run)[::_SAMPLED], reference.gram(sampled, run), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-10)
    return Work(lambda number: _PROVIDER.gram(sets[number], run), sets)


def _threshold(buffers: Buffers, run: Run) -> Work:
    row = METHODS["ties"]
    models, based = read_by(row)
    sets = [buffers.inputs(models, based, number) for number in range(len(buffers))]
    groups = [[[each] for each in inputs] for inputs in sets]
    wanted = [ranks(settings(row, models), each.elements) for each in sets[0]]
    sampled = groups[0][::_SAMPLED], wanted[::_SAMPLED]
    assert _PROVIDER.threshold(groups[0], wanted, run)[::_SAMPLED] == reference.threshold(*sampled, run)
    return Work(lambda number: _PROVIDER.threshold(groups[number], wanted, run), sets)


# --- the clock ---


def _in_turn(rounds: int, *calls: Callable[[], tuple[float, float]]) -> list[Taken]:
    """What each call took in each round, after one that doesn't count."""
    taken = [[call() for call in calls] for _ in range(rounds + 1)][1:]
    return [Taken(*map(list, zip(*each, strict=True))) for each in zip(*taken, strict=True)]


def _op(work: Work, buffers: Buffers) -> Callable[[], tuple[float, float]]:
    return lambda: _clocked(work.call, buffers.turn())


def _barest(work: Work, buffers: Buffers, run: Run) -> list[Callable[[], tuple[float, float]]]:
    """The ceiling with each kind of store."""
    places = work.targets or [[] for _ in work.inputs]
    ceilings = [Ceiling.of(*each, run.threads) for each in zip(work.inputs, places, strict=True)]
    kinds = stores(work.targets is not None)
    return [lambda kind=kind: _clocked(ceilings[buffers.turn()], kind) for kind in kinds]


def _clocked(call: Callable[[int], Any], argument: int) -> tuple[float, float]:
    start, spent = perf_counter(), process_time()
    call(argument)
    return perf_counter() - start, process_time() - spent


# --- the rows ---


def _row(case: str, method: str, at: float, nbytes: int, ours: Taken, *bare: Taken) -> Row:
    ceiling = min((each.seconds for each in bare), key=median)
    return Row(
        "scale",
        case,
        method,
        _DTYPE,
        median(ours.seconds),
        nbytes / median(ours.seconds) / 1e9,
        nbytes / median(ceiling) / 1e9,
        Ratio.of(ceiling, ours.seconds),
        Ratio.of(ours.spent, ours.seconds).median,
        at=at,
    )


def _overhead(method: str, elements: int, nbytes: int, many: Taken, one: Taken) -> Row:
    """What a tensor costs for being one, in place of a part of a large one."""
    return Row(
        "scale",
        "tensors",
        f"{method} of {elements:,} elements, overhead per tensor",
        _DTYPE,
        median((a - b) / _COUNT for a, b in zip(many.seconds, one.seconds, strict=True)),
        nbytes / median(many.seconds) / 1e9,
        processors=Ratio.of(many.spent, many.seconds).median,
        at=_COUNT,
        **_against("one tensor of as many elements", many, one),
    )


def _against(what: str, numerators: Taken, denominators: Taken) -> dict[str, Any]:
    return {"times": Ratio.of(numerators.seconds, denominators.seconds), "against": what}
