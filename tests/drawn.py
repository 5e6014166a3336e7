"""Settings of the ops, drawn at random or kept in tests/corpus/settings, and what must come out of each."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import test_ops
from conftest import SIZES, Memory, Tensors, compiled_core, decode, encode
from hypothesis import strategies as st
from test_ops import STAGES, Case

from fastmerge import reference
from fastmerge.sweep import Elect, Inputs, Keep, Mean, Run, Sweep, Target, TieVote, View

OPS = ("merge", "merge_ranked", "threshold", "gram", "norms", "lowrank")


@dataclass(frozen=True)
class Setting:
    """An op on some tensors at once: what each is like, the flat index where it begins, and whether its outputs go to a
    file. The data, weights, ranks and the like follow from the seeds of the cases."""

    op: str
    cases: tuple[Case, ...]
    begin: int
    to_file: bool

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, path: Path) -> Setting:
        """One that was written as `str` does it."""
        said = json.loads(path.read_text())
        cases = [
            {
                **case,
                "dtypes": tuple(case["dtypes"]),
                "outputs": tuple(case["outputs"]),
                "stages": tuple((Keep(k), Elect(e), TieVote(t), Mean(m)) for k, e, t, m in case["stages"]),
                "run": Run(*case["run"]),
            }
            for case in said["cases"]
        ]
        return cls(**{**said, "cases": tuple(Case(**case) for case in cases)})


# --- drawn ---

_ELEMENTS = st.one_of(
    st.integers(0, 70),
    st.builds(int.__add__, st.sampled_from([128, 2048, 4096, 8192]), st.integers(-33, 33)),
    st.integers(0, 20_000),
)


@st.composite
def _cases(draw: st.DrawFn, op: str, models: int, run: Run) -> Case:
    has_base = draw(st.booleans())
    dtype = st.sampled_from(test_ops.FLOATS)
    alike = draw(st.booleans())
    dtypes = [draw(dtype)] * (models + has_base) if alike else [draw(dtype) for _ in range(models + has_base)]
    outputs = draw(st.lists(st.just(dtypes[0]) if alike else dtype, min_size=1, max_size=3))
    stages = [draw(st.sampled_from(STAGES)) for _ in outputs]
    if op == "norms":
        outputs, stages = outputs[:1], stages[:1]
    if op == "merge_ranked":
        stages = [(Keep.ABOVE, *rest) for _, *rest in stages]
    return Case(
        draw(st.integers(0, 2**30)),
        draw(_ELEMENTS),
        tuple(dtypes),
        has_base,
        tuple(outputs),
        tuple(stages),
        draw(st.sampled_from(["normal", "equal", "special", "tiny"])),
        draw(st.integers(0, 5)),
        run,
    )


@st.composite
def drawn(draw: st.DrawFn) -> Setting:
    op = draw(st.sampled_from(OPS))
    run = Run(draw(st.integers(1, 4)), draw(st.sampled_from([0, 1, 2048, 5000, 8192])))
    models = draw(st.integers(1, 8))
    count = draw(st.integers(1, 1 if op == "lowrank" else 4))
    cases = tuple(draw(_cases(op, models, run)) for _ in range(count))
    begin = 8 * draw(st.integers(0, 2**31)) if op in ("merge", "norms", "gram") and draw(st.booleans()) else 0
    return Setting(op, cases, begin, draw(st.booleans()))


# --- checked ---


def check(setting: Setting, providers: Sequence[tuple[ModuleType, str]]) -> None:
    """Each compiled core, forced to an instruction set, gives what the definition does: the same bits, but that sums in
    float64 err as they may, and have the bits of the scalar kernels."""
    expected = _CHECKED[setting.op](setting, None)
    for native, isa in providers:
        with native.using(isa):
            assert native.isa() == isa
            _compare(_CHECKED[setting.op](setting, native), expected, f"{isa}: {setting}")


def _compare(found: list[Any], expected: list[Any], what: str) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, np.ndarray):
            np.testing.assert_array_equal(one, other, err_msg=what)
        else:
            assert one == other, what


def _merge(setting: Setting, native: ModuleType | None) -> list[Any]:
    inputs, _held = _inputs(setting)
    sweeps = [test_ops.sweeps_of(case) for case in setting.cases]
    with _targets(setting) as (targets, outputs):
        found = (native or reference).merge(inputs, sweeps, targets, _run(setting, native))
        return [found, *outputs()]


def _merge_ranked(setting: Setting, native: ModuleType | None) -> list[Any]:
    inputs, _held = _inputs(setting)
    sweeps = [test_ops.sweeps_of(case) for case in setting.cases]
    ranks = [_ranks(case, case.elements) for case in setting.cases]
    with _targets(setting) as (targets, outputs):
        if native:
            cuts, found = native.merge_ranked(inputs, sweeps, ranks, targets, _run(setting, native))
        else:
            cuts = reference.threshold([[each] for each in inputs], ranks, Run())
            sweeps = [[_with(sweep, each) for sweep in row] for row, each in zip(sweeps, cuts, strict=True)]
            found = reference.merge(inputs, sweeps, targets, Run())
        return [cuts, found, *outputs()]


def _with(sweep: Sweep, cuts: Sequence[Any]) -> Sweep:
    return replace(
        sweep,
        parts=tuple(
            replace(part, magnitude=cut.magnitude, ties_end=cut.ties_end)
            for part, cut in zip(sweep.parts, cuts, strict=True)
        ),
    )


def _threshold(setting: Setting, native: ModuleType | None) -> list[Any]:
    """The first tensors are a group, the last one alone."""
    inputs, _held = _inputs(setting)
    groups = [group for group in (inputs[:-1], inputs[-1:]) if group]
    ranks = [_ranks(setting.cases[0], sum(each.elements for each in group)) for group in groups]
    return [(native or reference).threshold(groups, ranks, _run(setting, native))]


def _gram(setting: Setting, native: ModuleType | None) -> list[Any]:
    inputs, _held = _inputs(setting)
    with _scalar(native) as core:
        found = core.gram(inputs, _run(setting, native))
    if native is None:
        for each, wanted in zip(found, reference.gram(inputs, Run()), strict=True):
            sizes = np.sqrt(np.diag(wanted))
            assert (np.abs(each - wanted) <= 1e-11 * np.outer(sizes, sizes)).all(), str(setting)
    return found


def _norms(setting: Setting, native: ModuleType | None) -> list[Any]:
    inputs, _held = _inputs(setting)
    sweeps = [test_ops.sweeps_of(case)[0] for case in setting.cases]
    with _scalar(native) as core:
        found = core.norms(inputs, sweeps, _run(setting, native))
    if native is None:
        for each, wanted in zip(found, reference.norms(inputs, sweeps, Run()), strict=True):
            np.testing.assert_allclose(each, wanted, rtol=1e-11, err_msg=str(setting))
    return found


def _lowrank(setting: Setting, native: ModuleType | None) -> list[Any]:
    (case,) = setting.cases
    rng = np.random.default_rng(case.seed)
    width, rank, dtype = 1 + case.elements % 100, len(case.dtypes), case.dtypes[0]
    rows = 1 + case.elements // width
    weights = Memory(rows * width * SIZES[dtype], case.skew)
    weights.bytes[:] = encode(test_ops.values_of(case.values, rows * width, rng), dtype)
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, width)))
    scaling = np.float32(rng.standard_normal())
    out = np.full((rows, width), np.nan, np.float32)
    if native:
        blocks = native.in_blocks(right)
        native.lowrank(View(weights.address, dtype), left, blocks, float(scaling), out, case.run.threads)
    else:
        out[:] = 0
        for k in range(rank):
            out += left[:, k : k + 1] * right[k]
        with np.errstate(invalid="ignore", over="ignore"):
            out = decode(weights.bytes, dtype).astype(np.float32).reshape(rows, width) + scaling * out
    return [np.where(np.isnan(out), np.uint32(0x7FC00000), out.view(np.uint32))]


def _inputs(setting: Setting) -> tuple[list[Inputs], list[Tensors]]:
    """The inputs, and what holds them."""
    held = [test_ops.tensors_of(case) for case in setting.cases]
    return [tensors.inputs._replace(begin=setting.begin) for tensors in held], held


def _ranks(case: Case, elements: int) -> list[int]:
    draw = random.Random(case.seed)
    models = len(case.dtypes) - case.has_base
    return [draw.choice([draw.randint(-1, elements + 1), elements // 5, 1, elements]) for _ in range(models)]


def _run(setting: Setting, native: ModuleType | None) -> Run:
    return setting.cases[0].run if native else Run()


@contextmanager
def _scalar(native: ModuleType | None) -> Iterator[ModuleType]:
    """The core, or the scalar kernels of the one in this process."""
    if native:
        yield native
        return
    core = compiled_core()
    with core.using("scalar"):
        yield core


@contextmanager
def _targets(setting: Setting) -> Iterator[tuple[list[list[Target]], Callable[[], list[np.ndarray]]]]:
    """Where the outputs of each tensor go, and what is there in the end; nothing is written beside them."""
    sizes = [[case.elements * SIZES[dtype] for dtype in case.outputs] for case in setting.cases]
    memory = [
        [Memory(size, case.skew * (1 + k)) for k, size in enumerate(row)]
        for case, row in zip(setting.cases, sizes, strict=True)
    ]
    with tempfile.TemporaryFile() as file:
        ends = list(accumulate((size + 3 for row in sizes for size in row), initial=3))
        places = iter(ends)
        targets = [
            [
                Target(dtype, next(places), file.fileno()) if setting.to_file else Target(dtype, each.address)
                for dtype, each in zip(case.outputs, row, strict=True)
            ]
            for case, row in zip(setting.cases, memory, strict=True)
        ]
        file.write(b"\xa5" * ends[-1])
        file.flush()

        def outputs() -> list[np.ndarray]:
            if setting.to_file:
                file.seek(0)
                return [np.frombuffer(file.read(), np.uint8)]
            for each in chain.from_iterable(memory):
                each.check_guards()
            return [each.bytes for each in chain.from_iterable(memory)]

        yield targets, outputs


_CHECKED = {
    "merge": _merge,
    "merge_ranked": _merge_ranked,
    "threshold": _threshold,
    "gram": _gram,
    "norms": _norms,
    "lowrank": _lowrank,
}
