"""The compiled core under the sanitizers: settings at random, inputs that are cut, ticks that throw, a full disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import drawn
import fuzzing
import numpy as np
import pytest
import sanitized
from conftest import Memory, Tensors, encode
from hypothesis import given
from test_ops import PLAIN

from fastmerge.errors import CheckpointError
from fastmerge.sweep import EVERY, Elect, Keep, Mean, Part, Run, Sweep, Target

LARGE = (1 << 19) + 3001  # more than `merge_ranked` takes for small, and no multiple of a chunk


@pytest.fixture(scope="module", params=list(sanitized.KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def core(kind: str) -> Iterator[ModuleType]:
    with sanitized.provider(kind) as native:
        yield native


def test_settings_at_random(core: ModuleType, kind: str) -> None:
    isas = core.isas()
    with fuzzing.counted(f"settings of the ops under the {kind} sanitizer, on {', '.join(isas)}") as count:

        @fuzzing.examples(150)
        @given(drawn.drawn())
        def check(setting: drawn.Setting) -> None:
            count()
            with fuzzing.kept("settings", ".json", str(setting).encode()):
                drawn.check(setting, [(core, isa) for isa in isas])

        check()


@pytest.mark.parametrize("path", fuzzing.corpus("settings"), ids=lambda path: path.stem)
def test_settings_that_were_kept(core: ModuleType, path: Path) -> None:
    drawn.check(drawn.Setting.read(path), [(core, isa) for isa in core.isas()])


class Ops:
    """Each op on tensors that take a few tiles and more than one tick, with a NaN, so that some of it is looked at
    twice."""

    RUN = Run(3)
    SWEEP = Sweep((Part(0.5, magnitude=1.0, ties_end=EVERY), Part(-1.0)), Keep.ABOVE, Elect.WEIGHTED, mean=Mean.WEIGHTS)

    def __init__(self, native: ModuleType, file: int = -1) -> None:
        rng = np.random.default_rng(1)
        models = [rng.standard_normal(LARGE) for _ in range(3)]
        models[0][7] = np.nan
        self._native, self._file = native, file
        self._out = Memory(4 * LARGE)
        self._tensors = Tensors([(model, "BF16") for model in models[:2]], (models[2], "BF16"))
        self._bytes = Tensors([(encode(models[0], "F32"), "U8")])

    def merge(self) -> None:
        self._native.merge([self._tensors.inputs], [[self.SWEEP]], [[self._target("BF16")]], self.RUN)

    def copy(self) -> None:
        self._native.merge([self._bytes.inputs], [[PLAIN]], [[self._target("U8")]], self.RUN)

    def merge_ranked(self) -> None:
        ranks = [[LARGE // 5, LARGE // 3]]
        targets = [[self._target("BF16")]]
        self._native.merge_ranked([self._tensors.inputs], [[self.SWEEP]], ranks, targets, self.RUN)

    def threshold(self) -> None:
        self._native.threshold([[self._tensors.inputs]], [[LARGE // 5, LARGE // 3]], self.RUN)

    def gram(self) -> None:
        self._native.gram([self._tensors.inputs], self.RUN)

    def norms(self) -> None:
        self._native.norms([self._tensors.inputs], [self.SWEEP], self.RUN)

    def lowrank(self, threads: int = 3) -> None:
        left, right = np.ones((512, 3), np.float32), np.ones((3, 1000), np.float32)
        out = np.empty((512, 1000), np.float32)
        (weights, _) = self._tensors.inputs.models
        self._native.lowrank(weights, left, self._native.in_blocks(right), 0.5, out, threads)

    def lowrank_alone(self) -> None:
        self.lowrank(threads=1)

    def _target(self, dtype: str) -> Target:
        return Target(dtype, 3 if self._file >= 0 else self._out.address, self._file)


WRITING = ("merge", "copy", "merge_ranked")
MEASURING = ("threshold", "gram", "norms", "lowrank", "lowrank_alone")
FAULTS = {"cut": CheckpointError, "stop": KeyboardInterrupt, "full": OSError}


@pytest.mark.parametrize(
    ("fault", "to_file"), [("cut", False), ("cut", True), ("stop", False), ("stop", True), ("full", True)]
)
def test_an_op_that_is_cut_short_leaves_nothing_behind(
    core: ModuleType, fault: str, to_file: bool, tmp_path: Path
) -> None:
    """No memory, no thread, no lock: the next op goes well."""
    with (tmp_path / "out").open("w+b") as file:
        ops = Ops(core, file.fileno() if to_file else -1)
        for isa in core.isas():
            for name in WRITING if to_file else (*WRITING, *MEASURING):
                with core.using(isa):
                    with core._core.meeting(fault), pytest.raises(FAULTS[fault]):
                        getattr(ops, name)()
                    getattr(ops, name)()


def test_a_read_past_the_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parts of which one is missing."""
    with sanitized.provider("address") as core:
        parts = core._records.parts
        monkeypatch.setattr(core._records, "parts", lambda settings: parts(settings)[:-1])
        with pytest.raises(AssertionError, match="heap-buffer-overflow"):
            Ops(core).merge()
