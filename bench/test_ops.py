"""Each op in memory against the ceiling of the same run: GB/s, and the share of what the machine can read and write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import accuracy
import numpy as np
import providers
import pytest
import torch
from cases import CASES, TORCH, Buffers, sweeps
from ceiling import Ceiling, Swept, stores
from conftest import Ratio, Row

from fastmerge import native, reference
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
_MOST_SECONDS, _LEAST_ROUNDS = 10, 3  # slow providers and peers take fewer


class Work(NamedTuple):
    """An op on the sets of some buffers, by number, and what it is held against."""

    inputs: Callable[[int], list[Inputs]]
    call: Callable[[int], Any]
    writes: bool
    error_ulp: float | None = None
    eager_error_ulp: float | None = None
    beside: Callable[[int], Any] | None = None  # of a whole method: its sweep alone; of another provider: ours


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "by" in metafunc.fixturenames:
        pairs = providers.contestants(metafunc.config.getoption("provider"))
        metafunc.parametrize(("provider", "by"), pairs, ids=[Path(by).stem for _, by in pairs])


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> tuple[str, Buffers]:
    """One case in memory at a time."""
    return request.param, Buffers(CASES[request.param], request.config.getoption("dtype"))


@pytest.mark.parametrize("case", CASES, indirect=True, scope="module")
@pytest.mark.parametrize(("op", "method"), _OPS, ids=["-".join(each) for each in _OPS])
def test_op(
    provider: str,
    by: str,
    op: str,
    method: str,
    case: tuple[str, Buffers],
    run: Run,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    """`provider` is who was asked for, `by` who runs: a file of one's own brings the built-in ones along."""
    name, buffers = case
    runner = providers.load(by)
    if names := providers.lacking(runner, op, method):
        pytest.skip(f"{runner.name} defines no {names}")
    torch.set_num_threads(run.threads)
    try:
        work = worked(op, method, buffers, runner, run)
    except NotImplementedError as error:
        pytest.skip(f"{runner.name}, {op} {method}: {error}")
    kinds = stores(work.writes)
    barest = [_ceiling(work, buffers, number, run.threads) for number in range(len(buffers))]
    before: dict[Any, list[float]] = {kind: [] for kind in (*kinds, "beside")}

    spent: list[float] = []

    def op_itself(number: int) -> None:
        start = process_time()
        work.call(number)
        spent.append(process_time() - start)

    def others() -> tuple[tuple[int], dict[str, Any]]:
        """What goes before each round of the op: the ceiling with each kind of store, and what it is held against."""
        for kind in kinds:
            before[kind].append(timed(barest[buffers.turn()], kind))
        if work.beside:
            before["beside"].append(timed(work.beside, buffers.turn()))
        return (buffers.turn(),), {}

    benchmark.pedantic(op_itself, setup=others, rounds=rounds(timed(work.call, 0), request.config), warmup_rounds=1)
    seconds = benchmark.stats.stats.data
    before = {kind: times[-len(seconds) :] for kind, times in before.items()}  # without the warm-up
    best = min(kinds, key=lambda kind: median(before[kind]))
    times, against = None, ""
    if runner is not native:
        times, against = Ratio.of(before["beside"], seconds), "as fast as cpu"
    elif work.beside:
        times, against = Ratio.of(seconds, before["beside"]), "its sweep"
    row = Row(
        op,
        name,
        method,
        buffers.dtype,
        median(seconds),
        nbytes(work, buffers) / median(seconds) / 1e9,
        nbytes(work, buffers) / median(before[best]) / 1e9,
        Ratio.of(before[best], seconds),
        Ratio.of(spent[-len(seconds) :], seconds).median,
        times,
        against,
        work.error_ulp,
        work.eager_error_ulp,
        "eager torch" if work.eager_error_ulp is not None else "",
        provider=runner.name,
    )
    benchmark.extra_info.update(gbps=row.gbps, ceiling_gbps=row.ceiling_gbps, share=row.share.median)
    record(row)


def rounds(seconds: float, config: pytest.Config) -> int:
    """Of a call that takes so long: more of a short one, fewer of a very long one."""
    wanted = max(config.getoption("rounds"), min(_MOST_ROUNDS, int(_LEAST_SECONDS / seconds)))
    return min(wanted, max(_LEAST_ROUNDS, int(_MOST_SECONDS / seconds)))


def worked(op: str, method: str, buffers: Buffers, by: Any, run: Run) -> Work:
    """An op that is right, on odd tensors and on these: with everything measured beforehand, but for `whole`."""
    providers.check(by, op, method, buffers.dtype, run)
    sets = range(len(buffers))
    inputs = [buffers.inputs(*providers.reads(op, method), number) for number in sets]
    settled = [] if op in ("gram", "threshold") else sweeps(native, method, inputs[0], run)

    def on_each(by: Any, op: str) -> Callable[[int], Any]:
        calls = [providers.bound(by, op, method, inputs[n], settled, buffers.targets(n), run) for n in sets]
        return lambda number: calls[number]()

    call = on_each(by, op)
    if op in ("merge", "whole"):
        buffers.out()[:] = 0xFF
        call(0)
        errors = _checked(buffers, inputs[0], settled)
    else:
        errors = {}
        some = [head(each) for each in inputs[0]] if op == "norms" else inputs[0]
        judge = native if by is reference else reference
        ours, theirs = (providers.bound(each, op, method, some, settled, (), run)() for each in (by, judge))
        providers.same(ours, theirs, f"{by.name}, {op} {method}: not what {judge.name} returns")
    beside = None
    if by is not native:
        beside = on_each(native, op)
        _assert_as_native(call, beside, buffers, f"{by.name}, {op} {method}: not what cpu makes of the whole tensors")
    elif op == "whole":
        beside = on_each(native, "merge")
    return Work(inputs.__getitem__, call, op in ("merge", "whole"), **errors, beside=beside)


# --- right before it is timed ---


def _assert_as_native(call: Callable[[int], Any], ours: Callable[[int], Any], buffers: Buffers, otherwise: str) -> None:
    """To the last element: what `call` wrote and returned of the first set is what the compiled core does."""
    buffers.out()[:] = 0xFF
    returned = call(0)
    written = buffers.out().copy()
    buffers.out()[:] = 0xFF
    providers.same(returned, ours(0), otherwise)
    assert np.array_equal(written, buffers.out()), otherwise


def _checked(buffers: Buffers, inputs: Sequence[Inputs], settled: Sequence[Sequence[Sweep]]) -> dict[str, float]:
    """Asserts that the output holds the reference's bits; gives the error of both against float64, ours and eager's."""
    size = SWEPT[buffers.dtype]
    ours, theirs = [], []
    for number, (each, (sweep,)) in enumerate(zip(map(head, inputs), settled, strict=True)):
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


def head(inputs: Inputs) -> Inputs:
    return inputs._replace(elements=min(inputs.elements, _CHECKED))


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


def nbytes(work: Work, buffers: Buffers) -> int:
    return SWEPT[buffers.dtype] * sum(
        each.elements * (len(each.models) + (each.base is not None) + work.writes) for each in work.inputs(0)
    )


def timed(call: Callable[[int], Any], argument: int) -> float:
    start = perf_counter()
    call(argument)
    return perf_counter() - start
