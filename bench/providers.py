"""Who runs an op of the bench, a built-in provider or a Python file of one's own, and whether it is right."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Case, Resident, read_by, resident, settings, sweeps

from fastmerge import backends, reference
from fastmerge.methods import METHODS, ranks
from fastmerge.sweep import Inputs, Run, Sweep, Target

BUILT_IN = tuple(backends.ORDER["cpu"]["merge"])
_ODD = Case(3, (1003,))
_SUMS = 1e-10  # relative, of sums in float64 that may be taken in any order


def contestants(asked: str | None) -> list[tuple[str, str]]:
    """What was asked for by --provider, and who runs for it: a file of one's own beside every built-in of the host."""
    names = [name for name in (asked or "cpu").split(",") if name in BUILT_IN or name.endswith(".py")]
    files = [name for name in names if name not in BUILT_IN]
    beside = [(files[0], name) for name in BUILT_IN if name not in names] if files else []
    return [*((name, name) for name in names), *beside] or [("cpu", "cpu")]  # deselected, where only a GPU is asked


@lru_cache
def load(name: str) -> Any:
    """A provider by its name, or the module in a file."""
    if name in BUILT_IN:
        return backends.provider(name)
    path = Path(name)
    if not path.is_file():
        raise pytest.UsageError(f"--provider {name}: there is no such file")
    spec = importlib.util.spec_from_file_location(f"provider_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and Triton look their module up
    spec.loader.exec_module(module)
    module.name = path.name
    return module


def lacking(by: Any, op: str, method: str) -> str:
    """The functions that an op of the bench takes and a provider does not define; empty where it has all."""
    needed: tuple[str, ...] = (op,)
    if op == "whole":
        needed = ("threshold" if METHODS[method].selects else "gram", "merge")
        if METHODS[method].selects and hasattr(by, "merge_ranked"):
            needed = ("merge_ranked",)
    return " and ".join(name for name in needed if not hasattr(by, name))


def reads(op: str, method: str) -> tuple[int, bool]:
    """How many models an op takes here, and whether it takes deltas from a base."""
    return (int(method), False) if op == "gram" else read_by(METHODS[method])


def bound(
    by: Any,
    op: str,
    method: str,
    inputs: Sequence[Inputs],
    settled: Sequence[Sequence[Sweep]],
    targets: Sequence[Sequence[Target]],
    run: Run,
) -> Callable[[], Any]:
    """An op of the bench with its arguments, `settled` being the sweeps with everything measured: what is timed."""
    if op == "gram":
        return lambda: by.gram(inputs, run)
    if op == "norms":
        alone = [sweep for (sweep,) in settled]
        return lambda: by.norms(inputs, alone, run)
    if op == "merge":
        return lambda: by.merge(inputs, settled, targets, run)
    row = METHODS[method]
    wanted = [ranks(settings(row, len(each.models)), each.elements) for each in inputs] if row.selects else []
    if op == "threshold":
        groups = [[each] for each in inputs]
        return lambda: by.threshold(groups, wanted, run)
    if row.selects and hasattr(by, "merge_ranked"):
        unknown = [[_without_cuts(sweep) for sweep in each] for each in settled]
        return lambda: by.merge_ranked(inputs, unknown, wanted, targets, run)[1]
    return lambda: by.merge(inputs, sweeps(by, method, inputs, run), targets, run)


def check(by: Any, op: str, method: str, dtype: str, run: Run) -> None:
    """Asserts that an op does what the reference does to three odd tensors, with the values in them that are special.

    Cuts, outputs and what was found in them must be equal to the bit; sums in float64 may be taken in any order.
    """
    many, based = reads(op, method)
    made = resident(_ODD, dtype, torch.device("cpu"), cache_bytes=1)
    _plant(made, overflow=op == "merge" and based)
    inputs = made.inputs(many, based)
    settled = [] if op == "gram" else sweeps(reference, method, inputs, run)

    def answer(provider: Any) -> tuple[Any, torch.Tensor]:
        made.out().fill_(0xFF)
        return bound(provider, op, method, inputs, settled, made.targets(), run)(), made.out().clone()

    (ours, written), (theirs, expected) = answer(by), answer(reference)
    different = (written != expected).nonzero().flatten().tolist()
    assert not different, f"{by.name}, {op} {method}: byte {different[0]} of {len(written)} is not the reference's"
    same(ours, theirs, f"{by.name}, {op} {method}: not what the reference returns")


def same(ours: Iterable[Any], theirs: Iterable[Any], otherwise: str) -> None:
    """Asserts that two providers returned the same."""
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, np.ndarray):
            np.testing.assert_allclose(one, other, rtol=_SUMS, err_msg=otherwise)
        else:
            assert one == other, f"{otherwise}: {one}, not {other}"


def _plant(made: Resident, overflow: bool) -> None:
    """A NaN, infinities, a negative zero; and where no squares are summed, what a sum with the base makes too large."""
    models, base, _ = made.tensors()
    models[2][_ODD.elements + 5], models[2][-1], models[1][2 * _ODD.elements - 1] = torch.nan, torch.inf, -torch.inf
    for model in models:
        model[7] = 0.0
    base[7] = -0.0
    if overflow:
        about = torch.finfo(base.dtype)
        for model in models:
            model[11] = about.max
        base[11] = about.max - 5 * about.max * about.eps / (2 - about.eps)  # by five units of the last place


def _without_cuts(sweep: Sweep) -> Sweep:
    """What the engine gives where a provider selects by itself: cuts that mean nothing."""
    return replace(sweep, parts=tuple(replace(part, magnitude=7.0, ties_end=-5) for part in sweep.parts))
