"""Each op in memory against the ceiling of the same run: GB/s, and the share of what the machine can read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import accuracy
import numpy as np
import pytest
import torch
from cases import CASES, TORCH, Buffers, read_by, settings, sweeps
from ceiling import Ceiling, Swept, stores
from conftest import Ratio, Row

from fastmerge import backends, reference
from fastmerge.methods import METHODS, ranks
from fastmerge.sweep import SWEPT, Inputs, Run, Sweep, View

_MERGES = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "passthrough")
_OPS = (
    *(("merge", method) for method in _MERGES),
    *(("whole", method) for method in ("ties", "slerp")),
    *(("gram", tensors) for tensors in ("2", "4")),
    *(("norms", method) for method in ("task_arithmetic", "ties", "dare_linear")),
    ("threshold", "ties"),
)
_CHECKED = 1 << 20  # elements of a tensor, from the first, that a sweep is compared on: the reference takes its time
_LEAST_SECONDS, _MOST_ROUNDS = 0.5, 200  # small cases take more rounds


class Work(NamedTuple):
    """An op on the sets of some buffers, by number."""

    inputs: Callable[[int], list[Inputs]]
    call: Callable[[int], Any]
    writes: bool
    error_ulp: float | None = None
    eager_error_ulp: float | None = None
    sweep: Callable[[int], Any] | None = None  # of a whole method: its sweep alone


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> tuple[str, Buffers]:
    """One case in memory at a time."""
    return request.param, Buffers(CASES[request.param], request.config.getoption("dtype"))


@pytest.mark.parametrize("case", CASES, indirect=True, scope="module")
@pytest.mark.parametrize(("op", "method"), _OPS, ids=["-".join(each) for each in _OPS])
def test_op(
    op: str,
    method: str,
    case: tuple[str, Buffers],
    run: Run,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    name, buffers = case
    provider = backends.provider("cpu")
    work = {"merge": _merge, "whole": _whole, "gram": _gram, "norms": _norms, "threshold": _threshold}[op](
        method, buffers, provider, run
    )
    kinds = stores(work.writes)
    barest = [_ceiling(work, buffers, number, run.threads) for number in range(len(buffers))]
    before: dict[Any, list[float]] = {kind: [] for kind in (*kinds, "sweep")}

    spent: list[float] = []

    def op_itself(number: int) -> None:
        start = process_time()
        work.call(number)
        spent.append(process_time() - start)

    def others() -> tuple[tuple[int], dict[str, Any]]:
        """What goes before each round of the op: the ceiling with each kind of store, and the sweep alone."""
        for kind in kinds:
            before[kind].append(_seconds(barest[buffers.turn()], kind))
        if work.sweep:
            before["sweep"].append(_seconds(work.sweep, buffers.turn()))
        return (buffers.turn(),), {}

    rounds = max(request.config.getoption("rounds"), min(_MOST_ROUNDS, int(_LEAST_SECONDS / _seconds(work.call, 0))))
    benchmark.pedantic(op_itself, setup=others, rounds=rounds, warmup_rounds=1)
    seconds = benchmark.stats.stats.data
    before = {kind: times[-len(seconds) :] for kind, times in before.items()}  # without the warm-up
    best = min(kinds, key=lambda kind: median(before[kind]))
    nbytes = _nbytes(work, buffers)
    row = Row(
        op,
        name,
        method,
        buffers.dtype,
        median(seconds),
        nbytes / median(seconds) / 1e9,
        nbytes / median(before[best]) / 1e9,
        Ratio.of(before[best], seconds),
        Ratio.of(spent[-len(seconds) :], seconds).median,
        Ratio.of(seconds, before["sweep"]) if work.sweep else None,
        "its sweep" if work.sweep else "",
        work.error_ulp,
        work.eager_error_ulp,
        "eager torch" if work.eager_error_ulp is not None else "",
    )
    benchmark.extra_info.update(gbps=row.gbps, ceiling_gbps=row.ceiling_gbps, share=row.share.median)
    record(row)


# --- the ops; each is right before it is timed ---


def _merge(method: str, buffers: Buffers, provider: backends.Provider, run: Run) -> Work:
    """The sweep with everything measured beforehand."""
    reads = read_by(METHODS[method])
    settled = sweeps(provider, method, buffers.inputs(*reads), run)
    sets = [(buffers.inputs(*reads, number), settled, buffers.targets(number), run) for number in range(len(buffers))]
    buffers.out()[:] = 0xFF
    provider.merge(*sets[0])
    return Work(
        lambda number: sets[number][0],
        lambda number: provider.merge(*sets[number]),
        writes=True,
        **_checked(buffers, sets[0][0], settled),
    )


def _whole(method: str, buffers: Buffers, provider: backends.Provider, run: Run) -> Work:
    """Measuring and the sweep, at one go where the engine does that."""
    alone = _merge(method, buffers, provider, run)
    row = METHODS[method]
    known = sweeps(provider, method, alone.inputs(0), run)
    wanted = [ranks(settings(row, len(each.models)), each.elements) for each in alone.inputs(0)] if row.selects else []

    def call(number: int) -> None:
        inputs = alone.inputs(number)
        if wanted:  # the cuts within `known` are not looked at
            provider.merge_ranked(inputs, known, wanted, buffers.targets(number), run)
        else:
            provider.merge(inputs, sweeps(provider, method, inputs, run), buffers.targets(number), run)

    buffers.out()[:] = 0xFF
    call(0)
    inputs = alone.inputs(0)
    errors = _checked(buffers, inputs, sweeps(provider, method, inputs, run))
    return alone._replace(call=call, sweep=alone.call, **errors)


def _gram(tensors: str, buffers: Buffers, provider: backends.Provider, run: Run) -> Work:
    sets = [buffers.inputs(int(tensors), False, number) for number in range(len(buffers))]
    _assert_close(provider.gram(sets[0], run), reference.gram(sets[0], run))
    return Work(sets.__getitem__, lambda number: provider.gram(sets[number], run), writes=False)


def _norms(method: str, buffers: Buffers, provider: backends.Provider, run: Run) -> Work:
    reads = read_by(METHODS[method])
    sets = [buffers.inputs(*reads, number) for number in range(len(buffers))]
    settled = [sweep for (sweep,) in sweeps(provider, method, sets[0], run)]
    short = [_head(each) for each in sets[0]]
    _assert_close(provider.norms(short, settled, run), reference.norms(short, settled, run))
    return Work(sets.__getitem__, lambda number: provider.norms(sets[number], settled, run), writes=False)


def _threshold(method: str, buffers: Buffers, provider: backends.Provider, run: Run) -> Work:
    row = METHODS[method]
    models, based = read_by(row)
    sets = [buffers.inputs(models, based, number) for number in range(len(buffers))]
    wanted = [ranks(settings(row, models), each.elements) for each in sets[0]]

    def call(number: int, by: Any = provider) -> Any:
        return by.threshold([[each] for each in sets[number]], wanted, run)

    assert call(0) == call(0, reference)
    return Work(sets.__getitem__, call, writes=False)


# --- what they share ---


def _checked(buffers: Buffers, inputs: Sequence[Inputs], settled: Sequence[Sequence[Sweep]]) -> dict[str, float]:
    """Asserts that the output holds the reference's bits; gives the error of both against float64, ours and eager's."""
    size = SWEPT[buffers.dtype]
    ours, theirs = [], []
    for number, (each, (sweep,)) in enumerate(zip(map(_head, inputs), settled, strict=True)):
        (target,) = buffers.targets()[number]
        out = accuracy.tensor_in(View(target.offset, target.dtype), each.elements)
        expected = np.full(each.elements * size, 0xFF, np.uint8)
        reference.merge([each], [[sweep]], [[target._replace(offset=expected.ctypes.data)]], Run())
        assert np.array_equal(out.view(torch.uint8).numpy(), expected), "not the reference's bits"
        exact = accuracy.exact(each, sweep)
        ours.append(accuracy.ulps(out, exact, each, buffers.dtype))
        theirs.append(accuracy.ulps(accuracy.eager(each, sweep), exact, each, buffers.dtype))
    whole = torch.from_numpy(buffers.out()).view(TORCH[buffers.dtype])
    assert bool(whole.isfinite().all()), "a part of the output was never written"
    return {"error_ulp": accuracy.worst(ours), "eager_error_ulp": accuracy.worst(theirs)}


def _head(inputs: Inputs) -> Inputs:
    return inputs._replace(elements=min(inputs.elements, _CHECKED))


def _assert_close(ours: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    for one, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def _ceiling(work: Work, buffers: Buffers, number: int, threads: int) -> Ceiling:
    """The loop that reads what the op reads and, where it writes, writes where it writes."""
    size = SWEPT[buffers.dtype]
    swept = [
        Swept(
            tuple(view.address for view in (*inputs.models, inputs.base) if view),
            inputs.elements * size,
            target.offset,
        )
        for inputs, (target,) in zip(work.inputs(number), buffers.targets(number), strict=True)
    ]
    return Ceiling(swept, threads)


def _nbytes(work: Work, buffers: Buffers) -> int:
    return SWEPT[buffers.dtype] * sum(
        each.elements * (len(each.models) + (each.base is not None) + work.writes) for each in work.inputs(0)
    )


def _seconds(call: Callable[[int], Any], argument: int) -> float:
    start = perf_counter()
    call(argument)
    return perf_counter() - start
