"""A session's time for each candidate of a search, against merging anew: from disk to disk, and in memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import disk
import pytest
import torch
from cases import PARAMETERS, WEIGHTS
from ceiling import Ceiling, Swept, stores
from conftest import Ratio, Row
from safetensors.torch import load_file

import fastmerge
from fastmerge import Session
from fastmerge.methods import METHODS, Base
from fastmerge.sweep import Run

Weights = dict[str, torch.Tensor]

#: How many candidates are merged at once, and what they are held against.
_CASES = {
    "one": (1, "a merge to disk and back"),
    "one-anew": (1, "merge_state_dicts"),
    "weights": (8, "a merge to disk and back"),
    "lambdas": (8, "a merge to disk and back"),
}


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> Iterator[disk.Models]:
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
        yield disk.write_llamas(Path(folder), request.config.getoption("params"))


@pytest.mark.parametrize("op", ["session"])
@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "slerp"])
def test_a_candidate(
    op: str,
    case: str,
    method: str,
    models: disk.Models,
    run: Run,
    record: Callable[[Row], None],
    request: pytest.FixtureRequest,
) -> None:
    """One candidate after another with other weights, or another t, into tensors that are there, when all is measured;
    or several at once, with other weights or with another lambda alone. `seconds` are those of one candidate."""
    if case == "lambdas" and METHODS[method].parameter("lambda") is None:
        pytest.skip(f"{method} has no lambda")
    count, peer = _CASES[case]
    rounds = request.config.getoption("rounds")
    if "disk" in peer:
        rounds = max(3, rounds // 3)
    options: dict[str, Any] = {"backend": "cpu", "threads": run.threads}
    recipe, folder = disk.recipe_of(method, models), models.folder / "merged"
    given, base = _taking_part(method, models)
    outs = [_loaded(models.base) for _ in range(count)]
    there = _loaded(models.base)

    def anew(number: int) -> None:
        if peer == "merge_state_dicts":
            settings = _settings(method, case, number)
            fastmerge.merge_state_dicts(method, given, base, out=there, **options, **settings)
            return
        fastmerge.merge(recipe, folder, overwrite=True, **options)
        for name, tensor in load_file(folder / "model.safetensors").items():
            there[name].copy_(tensor)

    with Session(given, base, method=method, **options) as session:

        def ours(number: int) -> None:
            settings = [_settings(method, case, number * count + k) for k in range(count)]
            session.merge_many(settings, outs=outs)

        anew(0)
        ours(0)  # the first candidate is the recipe
        _assert_same(outs[0], there)
        ours(1)
        fastmerge.merge_state_dicts(method, given, base, out=there, **options, **_settings(method, case, 2 * count - 1))
        _assert_same(outs[-1], there)
        kinds, barest = stores(True), _ceiling([*given, *([] if base is None else [base])], outs, run.threads)
        times: dict[Any, list[float]] = {kind: [] for kind in (*kinds, "ours", "spent", "anew")}
        for number in range(rounds):
            for kind in kinds:
                times[kind].append(_timed(barest, kind))
            times["anew"].append(_timed(anew, number))
            start = process_time()
            times["ours"].append(_timed(ours, number))
            times["spent"].append(process_time() - start)
    shutil.rmtree(folder, ignore_errors=True)
    best = min(kinds, key=lambda kind: median(times[kind]))
    seconds = median(times["ours"])
    nbytes = 2 * models.parameters * (len(disk.read_by(recipe)) + count)
    record(
        Row(
            op,
            case,
            method,
            "BF16",
            seconds / count,
            nbytes / seconds / 1e9,
            nbytes / median(times[best]) / 1e9,
            Ratio.of(times[best], times["ours"]),
            Ratio.of(times["spent"], times["ours"]).median,
            Ratio.of([count * each for each in times["anew"]], times["ours"]),
            f"as fast as {peer}",
            peer="merging anew",
            peer_seconds=median(times["anew"]),
            at=models.parameters,
        )
    )


def _taking_part(method: str, models: disk.Models) -> tuple[list[Weights], Weights | None]:
    """In memory what the recipe of a method takes, in its order; a base that is one of the models is among them."""
    row = METHODS[method]
    base, *tuned = (_loaded(path) for path in (models.base, *models.tuned[: row.models[1]]))
    return ([base, tuned[0]], base) if row.base is Base.ENDPOINT else (tuned, base)


def _loaded(path: Path) -> Weights:
    """In memory of its own, and not mapped."""
    return {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}


def _settings(method: str, case: str, number: int) -> dict[str, Any]:
    """Those of a candidate; of the first, the recipe's."""
    row, factor = METHODS[method], 1 / (1 + number % 16)
    if row.parameter("t"):
        return {"t": PARAMETERS["t"] * factor}
    own = {"density": PARAMETERS["density"]} if row.parameter("density") else {}
    if case == "lambdas":
        return {"weight": list(WEIGHTS), "lambda_": factor, **own}
    return {"weight": [weight * factor for weight in WEIGHTS], **own}


def _assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), f"{name}: not the same bits"


def _ceiling(models: list[Weights], outs: list[Weights], threads: int) -> Ceiling:
    """The loop that reads each model once and writes each output."""
    inputs = list({id(model): model for model in models}.values())
    return Ceiling(
        [
            Swept(
                tuple(model[name].data_ptr() for model in inputs),
                first.nbytes,
                first.data_ptr(),
                others=tuple((out[name].data_ptr(), -1) for out in outs[1:]),
            )
            for name, first in outs[0].items()
        ],
        threads,
    )


def _timed(call: Callable[[int], Any], argument: int) -> float:
    start = perf_counter()
    call(argument)
    return perf_counter() - start
