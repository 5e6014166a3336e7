"""Each op on a GPU, CUDA beside Triton, against copies and reads of its own memory in the same run."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import ceiling
import disk
import marks
import numpy as np
import peers
import pytest
import torch
from cases import GPU_CASES, MANY, ONE, Case, Resident, Set, read_by, resident, settings, sweeps
from conftest import Ratio, Row

import fastmerge
from fastmerge import backends, native, streaming
from fastmerge.methods import METHODS, Method, ranks
from fastmerge.sweep import SWEPT, Inputs, Run

pytestmark = pytest.mark.usefixtures("_in_time")

_MERGES = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "passthrough")
_PEERS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp")
_OPS = (
    *(("merge", method) for method in _MERGES),
    *(("queued", method) for method in ("linear", "ties")),
    *(("whole", method) for method in ("ties", "slerp")),
    *(("gram", tensors) for tensors in ("2", "4")),
    *(("norms", method) for method in ("task_arithmetic", "ties", "dare_linear")),
    ("threshold", "ties"),
)
_ROUNDS, _PROFILED = 15, 5
_TINY = {"elements": 2049, "tensors": 20}  # where it is emulated


class Card:
    """The GPU with a clock of its own, or the host that plays one."""

    def __init__(self, emulated: bool) -> None:
        self.emulated = emulated
        self.place = torch.device("cpu" if emulated else "cuda")
        if emulated:
            self.name, self.cache_bytes = "emulated", 1 << 10
            return
        about = torch.cuda.get_device_properties(self.place)
        self.name, self.cache_bytes = about.name, about.L2_cache_size

    def seconds(self, call: Callable[[int], Any], number: int, launched: int = 1) -> float:
        """Between two events, after a wait in which the host gets ahead: it prepares while the GPU is busy."""
        if self.emulated:
            started = perf_counter()
            call(number)
            return perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000 + 20_000 * launched)  # cycles
        start.record()
        call(number)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def work(self, call: Callable[[int], Any], numbers: Sequence[int]) -> tuple[float | None, float | None]:
        """Seconds that the GPU worked per call, and kernels launched, as the profiler sees it; None where it can't."""
        activity = torch.profiler.ProfilerActivity.CPU if self.emulated else torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            for number in numbers:
                call(number)
            self.wait()
        seen = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        if not seen:
            return None, None
        kernels = sum(not event.name.startswith(("Memcpy", "Memset")) for event in seen)
        return sum(event.time_range.elapsed_us() for event in seen) / 1e6 / len(numbers), kernels / len(numbers)

    def wait(self) -> None:
        if not self.emulated:
            torch.cuda.synchronize()


class Work(NamedTuple):
    """An op on sets by number, and what it is held against."""

    call: Callable[[int], Any]
    nbytes: int
    writes: bool
    sweep: Callable[[int], Any] | None = None  # of a whole method: its sweep alone


@pytest.fixture(scope="session")
def card(request: pytest.FixtureRequest) -> Card:
    emulated = request.config.getoption("emulated")
    if not emulated and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return Card(emulated)


@pytest.fixture(scope="session")
def providers(card: Card) -> Iterator[Callable[[str], Any]]:
    """A provider by name, or its stand-in."""
    with ExitStack() as stack:
        if card.emulated:
            stack.enter_context(_emulated().installed())

        def provider(name: str) -> Any:
            if reason := backends.why_not(name):
                pytest.skip(f"backend {name} cannot run: {reason}")
            return backends.provider(name)

        yield provider


class Held(NamedTuple):
    """Tensors on the GPU, and the first set once more in the memory of the host."""

    name: str
    there: Resident
    here: Resident


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, card: Card) -> Iterator[Held]:
    """One case in memory at a time."""
    yield _made(request.param, _CASES[request.param], card, request.config.getoption("dtype"))
    if not card.emulated:
        torch.cuda.empty_cache()


_CASES = GPU_CASES | {"ascending": GPU_CASES["mlp"]}


def _made(name: str, case: Case, card: Card, dtype: str) -> Held:
    if card.emulated:
        case = Case(min(case.tensors, _TINY["tensors"]), (_TINY["elements"],))
    ascending = name == "ascending"
    dtype = "F32" if ascending else dtype
    there = resident(case, dtype, card.place, card.cache_bytes, ascending)
    first = there.set()
    here = Set(
        tuple(m.cpu() for m in first.models), first.base.cpu(), torch.full(first.out.shape, 0xFF, dtype=torch.uint8)
    )
    return Held(name, there, Resident(case, dtype, [here]))


# --- the ops, alone and whole ---


@pytest.mark.parametrize("case", _CASES, indirect=True, scope="module")
@pytest.mark.parametrize(("op", "method"), _OPS, ids=["-".join(each) for each in _OPS])
@pytest.mark.parametrize("provider", marks.PROVIDERS)
def test_op(
    provider: str,
    op: str,
    method: str,
    case: Held,
    card: Card,
    providers: Callable[[str], Any],
    run: Run,
    record: Callable[[Row], None],
    request: pytest.FixtureRequest,
) -> None:
    if (case.name == "ascending" and op not in ("whole", "threshold")) or (case.name, method) == ("ascending", "slerp"):
        pytest.skip("only for what selects")
    by = providers(provider)
    work = _WORK[op](method, case, by, run)
    bare = _Bare(card, work)
    record(_measured(provider, op, case.name, method, case.there, work, bare, card))


def _measured(
    provider: str, op: str, name: str, method: str, there: Resident, work: Work, bare: _Bare, card: Card
) -> Row:
    """In turn: each kind of ceiling, the op, and where it has one its sweep alone."""
    times: dict[str, list[float]] = {kind: [] for kind in (*bare.kinds, "op", "sweep")}
    launched = there.case.tensors
    for number in range(-2, _ROUNDS if not card.emulated else 2):
        for kind, call in bare.kinds.items():
            times[kind].append(card.seconds(call, number))
        times["op"].append(card.seconds(work.call, there.turn(), launched))
        if work.sweep:
            times["sweep"].append(card.seconds(work.sweep, there.turn(), launched))
    times = {kind: seconds[2:] for kind, seconds in times.items()}  # without the warm-up
    best = min(bare.kinds, key=lambda kind: median(times[kind]))
    numbers = [there.turn() for _ in range(_PROFILED)]
    busy, launches = card.work(work.call, numbers)
    barest, _ = card.work(bare.kinds[best], numbers)
    return Row(
        op,
        name,
        method,
        there.dtype,
        median(times["op"]),
        work.nbytes / median(times["op"]) / 1e9,
        work.nbytes / median(times[best]) / 1e9,
        Ratio.of(times[best], times["op"]),
        times=Ratio.of(times["op"], times["sweep"]) if work.sweep else None,
        against="its sweep" if work.sweep else "",
        provider=provider,
        device=card.name,
        kernel_seconds=busy,
        kernel_share=barest / busy if barest and busy else None,
        launches=launches,
    )


class _Bare:
    """The ceilings of an op: copies of half as many bytes as it moves, and where it only reads, also reads of all.

    A read is a sum or a maximum by PyTorch of float32 words; the fastest of all of them is the ceiling. The place moves
    on from call to call through memory larger than the cache.
    """

    def __init__(self, card: Card, work: Work) -> None:
        half = max(work.nbytes // 2 // 4 * 4, 4)
        room = half * max(1, -(-4 * card.cache_bytes // (2 * half)))
        self._from = torch.zeros(room, dtype=torch.uint8, device=card.place)
        self._to = torch.zeros_like(self._from)
        self._half, self._places = half, room // half
        self.kinds: dict[str, Callable[[int], Any]] = {"copy": self._copy}
        if not work.writes:
            self.kinds |= {"sum": self._read(torch.sum), "amax": self._read(torch.amax)}

    def _copy(self, number: int) -> None:
        self._at(self._to, number).copy_(self._at(self._from, number))

    def _read(self, reduce: Callable[[torch.Tensor], Any]) -> Callable[[int], Any]:
        return lambda number: [reduce(self._at(each, number).view(torch.float32)) for each in (self._from, self._to)]

    def _at(self, memory: torch.Tensor, number: int) -> torch.Tensor:
        start = number % self._places * self._half
        return memory[start : start + self._half]


def _merge(method: str, case: Held, by: Any, run: Run) -> Work:
    """The sweep with everything measured beforehand, as the engine calls it."""
    return _swept(method, case, by, run, lambda inputs, settled, targets: by.merge(inputs, settled, targets, Run()))


def _queued(method: str, case: Held, by: Any, run: Run) -> Work:
    """The same without a wait for what was found, as the torch ops call it."""

    def call(inputs: list[Inputs], settled: Any, targets: Any) -> None:
        if by.name == "triton":
            by.merge(inputs, settled, targets, Run(), look=False)
            return
        for each in zip(inputs, settled, targets, strict=True):
            by.merge_async(*each, 0, Run())

    return _swept(method, case, by, run, call)


def _whole(method: str, case: Held, by: Any, run: Run) -> Work:
    """Measuring, then the sweep; in one call where the provider can."""
    row = METHODS[method]

    def call(inputs: list[Inputs], settled: Any, targets: Any) -> None:
        if row.selects and hasattr(by, "merge_ranked"):
            by.merge_ranked(inputs, settled, _ranks(row, inputs), targets, Run())
        else:
            by.merge(inputs, sweeps(by, method, inputs, Run()), targets, Run())

    return _swept(method, case, by, run, call)._replace(sweep=_merge(method, case, by, run).call)


def _swept(method: str, case: Held, by: Any, run: Run, call: Callable[[list[Inputs], Any, Any], Any]) -> Work:
    """Poisoned, called and compared with the bits of the CPU."""
    there, here = case.there, case.here
    reads = read_by(METHODS[method])
    inputs = here.inputs(*reads)
    settled = sweeps(native, method, inputs, run)
    sets = [(there.inputs(*reads, number), settled, there.targets(number)) for number in range(len(there))]
    there.out().fill_(0xFF)
    call(*sets[0])
    if by.name == "cuda":  # torch waits for a card of its own, not for an emulated one
        by.device(0).synchronize(0)
    native.merge(inputs, settled, here.targets(), run)
    assert torch.equal(there.out().cpu(), here.out()), "not the bits of the CPU"
    return Work(lambda number: call(*sets[number]), _nbytes(there, inputs, True), True)


def _gram(tensors: str, case: Held, by: Any, run: Run) -> Work:
    return _read(case, (int(tensors), False), lambda by, inputs, run: by.gram(inputs, run), by, run)


def _norms(method: str, case: Held, by: Any, run: Run) -> Work:
    reads = read_by(METHODS[method])
    settled = [sweep for (sweep,) in sweeps(native, method, case.here.inputs(*reads), run)]
    return _read(case, reads, lambda by, inputs, run: by.norms(inputs, settled, run), by, run)


def _threshold(method: str, case: Held, by: Any, run: Run) -> Work:
    row = METHODS[method]

    def op(by: Any, inputs: list[Inputs], run: Run) -> Any:
        return by.threshold([[each] for each in inputs], _ranks(row, inputs), run)

    return _read(case, read_by(row), op, by, run)


def _ranks(row: Method, inputs: Sequence[Inputs]) -> list[tuple[int, ...]]:
    own = settings(row, read_by(row)[0])
    return [ranks(own, each.elements) for each in inputs]


def _read(case: Held, reads: tuple[int, bool], op: Callable[[Any, list[Inputs], Run], Any], by: Any, run: Run) -> Work:
    """Compared with the CPU: cuts to the bit; sums err by less than n 2**-53 of those of magnitudes, of either."""
    sets = [case.there.inputs(*reads, number) for number in range(len(case.there))]
    inputs = case.here.inputs(*reads)
    size = np.sqrt(case.there.case.elements)
    for ours, theirs in zip(op(by, sets[0], Run()), op(native, inputs, run), strict=True):
        if isinstance(ours, tuple):
            assert ours == theirs
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-12 * size, atol=1e-12 * size)
    return Work(lambda number: op(by, sets[number], Run()), _nbytes(case.there, inputs, False), False)


_WORK = {
    "merge": _merge,
    "queued": _queued,
    "whole": _whole,
    "gram": _gram,
    "norms": _norms,
    "threshold": _threshold,
}


def _nbytes(there: Resident, inputs: Sequence[Inputs], writes: bool) -> int:
    return SWEPT[there.dtype] * sum(each.elements * (len(each.views) + writes) for each in inputs)


# --- a thousand small tensors against one ---


@pytest.mark.parametrize("case", ["small"])
@pytest.mark.parametrize("op", ["many"])
@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("provider", marks.PROVIDERS)
def test_many(
    provider: str,
    op: str,
    case: str,
    method: str,
    card: Card,
    providers: Callable[[str], Any],
    run: Run,
    record: Callable[[Row], None],
    request: pytest.FixtureRequest,
) -> None:
    by, dtype = providers(provider), request.config.getoption("dtype")
    kind = _whole if METHODS[method].selects else _merge
    many, one = (_made(case, shape, card, dtype) for shape in (MANY, ONE))
    work, alone = (kind(method, each, by, run) for each in (many, one))
    row = _measured(
        provider,
        op,
        case,
        method,
        many.there,
        work._replace(sweep=_turning(alone.call, one.there)),
        _Bare(card, work),
        card,
    )
    record(row._replace(against="one tensor of the same total"))


def _turning(call: Callable[[int], Any], there: Resident) -> Callable[[int], Any]:
    return lambda _: call(there.turn())


# --- against PyTorch ---


@pytest.mark.parametrize("case", ["mlp"], indirect=True, scope="module")
@pytest.mark.parametrize("op", ["peer"])
@pytest.mark.parametrize("method", _PEERS)
@pytest.mark.parametrize("provider", marks.PROVIDERS)
def test_against_pytorch(
    provider: str,
    op: str,
    case: Held,
    method: str,
    card: Card,
    providers: Callable[[str], Any],
    run: Run,
    record: Callable[[Row], None],
) -> None:
    """As one writes it and as torch.compile makes it, both into a new tensor; ours whole, selection and all."""
    row = METHODS[method]
    work = (_whole if row.selects or row.gram else _merge)(method, case, providers(provider), run)
    many, based = read_by(row)
    there = case.there
    written = getattr(peers, method)
    compiled = torch.compile(written, dynamic=False, backend="eager" if card.emulated else "inductor")

    def peer(function: Callable[..., Any], number: int) -> None:
        each = there.tensors(number)
        function(each.models[:many] if based else (each.base, *each.models)[-many:], each.base if based else None)

    for name, function in (("eager torch", written), ("torch.compile", compiled)):
        ours, theirs = [], []
        for _ in range(-2, 1 if card.emulated else _ROUNDS):
            ours.append(card.seconds(work.call, there.turn()))
            theirs.append(card.seconds(lambda number, function=function: peer(function, number), there.turn()))
        seconds = median(ours[2:])
        record(
            Row(
                op,
                case.name,
                method,
                there.dtype,
                seconds,
                work.nbytes / seconds / 1e9,
                times=Ratio.of(theirs[2:], ours[2:]),
                against=name,
                provider=provider,
                device=card.name,
                peer=name,
                peer_seconds=median(theirs[2:]),
            )
        )


# --- from disk to disk ---


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest, card: Card) -> Iterator[disk.Models]:
    parameters = 100_000 if card.emulated else request.config.getoption("params")
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
        yield disk.write_llamas(Path(folder), parameters)


@pytest.mark.parametrize("case", ["checkpoint"])
@pytest.mark.parametrize("op", ["disk"])
@pytest.mark.parametrize("method", ["linear", "ties"])
@pytest.mark.parametrize("provider", marks.PROVIDERS)
def test_disk_to_disk(
    provider: str,
    op: str,
    case: str,
    method: str,
    models: disk.Models,
    card: Card,
    providers: Callable[[str], Any],
    run: Run,
    record: Callable[[Row], None],
) -> None:
    """In one process, after a first merge, of models in the page cache; fsync counts, for the floor too.

    The floor is the slower of the bus, for what goes up, and our writer, fed from one mapped model.
    """
    if card.emulated and provider == "triton":
        pytest.skip("the interpreter takes hours for a checkpoint")
    device = providers(provider).device(0)
    recipe = disk.recipe_of(method, models)
    read = [checkpoint.path for checkpoint in fastmerge.plan(recipe).stages[0].models]
    out = models.folder / "merged"
    up = 2 * models.parameters * len(read)

    def merge() -> None:
        fastmerge.merge(recipe, out, backend=provider, threads=run.threads)

    def floor() -> float:
        return max(
            up / streaming.bus_rate(device), _alone(lambda: ceiling.disk_to_disk(run.threads, out, read[:1]), out)
        )

    _alone(merge, out)
    disk.checked(recipe, out)
    pairs = [(floor(), _alone(merge, out)) for _ in range(2 if card.emulated else 4)][1:]
    floors, ours = zip(*pairs, strict=True)
    nbytes = up + 2 * models.parameters
    record(
        Row(
            op,
            f"{models.parameters / 1e6:.0f} M",
            method,
            "BF16",
            median(ours),
            nbytes / median(ours) / 1e9,
            nbytes / median(floors) / 1e9,
            Ratio.of(floors, ours),
            provider=provider,
            device=card.name,
        )
    )


def _alone(call: Callable[[], Any], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    started = perf_counter()
    call()
    return perf_counter() - started


def _emulated() -> Any:
    """Of the tests, which lie beside the bench."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    return importlib.import_module("emulated")
