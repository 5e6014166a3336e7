"""Whole merges from disk to disk, as processes: against floors of reading and writing, and against mergekit."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import disk
import pytest
from conftest import Ratio, Row

from fastmerge.checkpoint import open_checkpoint
from fastmerge.methods import METHODS
from fastmerge.sweep import Run

_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "passthrough")
_LORA_PARAMETERS = 25e6  # 50 MB


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, disk.Models]]:
    """One set of models on the disk at a time."""
    lora = request.param == "lora"
    parameters = _LORA_PARAMETERS if lora else request.config.getoption("params")
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
        models = disk.write_llamas(Path(folder), parameters)
        yield "lora" if lora else f"{models.parameters / 1e6:.0f} M", models


@pytest.mark.parametrize("op", ["disk"])
@pytest.mark.parametrize(
    ("case", "method"),
    [*(("checkpoint", method) for method in _METHODS), ("lora", "task_arithmetic"), ("lora", "ties")],
    indirect=["case"],
    scope="module",
)
def test_against_the_floors(
    op: str,
    case: tuple[str, disk.Models],
    method: str,
    run: Run,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    name, models = case
    recipe = disk.recipe_of(method, models)
    out = models.folder / "merged"
    ours, floor, copy = disk.ours(recipe, out, run), disk.floor(recipe, out, run), disk.cat_and_cp(recipe, out)
    children, floors, copies = [], [], []

    def before() -> None:
        floors.append(disk.alone(floor, out))
        copies.append(disk.alone(copy, out))
        disk.settle(out)

    def merge() -> None:
        children.append(disk.run_child(ours))

    disk.settle(out)
    merge()
    error = disk.error(disk.checked(recipe, out), recipe)
    rounds = max(3, request.config.getoption("rounds") // 3)
    benchmark.pedantic(merge, setup=before, rounds=rounds, warmup_rounds=1)
    seconds, bare, copied = [[child.seconds for child in each[-rounds:]] for each in (children, floors, copies)]
    nbytes = 2 * models.parameters * (len(disk.read_by(recipe)) + 1)
    row = Row(
        op,
        name,
        method,
        "BF16",
        median(seconds),
        nbytes / median(seconds) / 1e9,
        nbytes / median(bare) / 1e9,
        Ratio.of(bare, seconds),
        median(child.spent / child.seconds for child in children[-rounds:]),
        times=Ratio.of(copied, seconds),
        against="as fast as cat and cp",
        error_ulp=error,
        **disk.peaks(children, run),
    )
    benchmark.extra_info.update(gbps=row.gbps, ceiling_gbps=row.ceiling_gbps, share=row.share.median)
    record(row)


@pytest.mark.parametrize("case", ["checkpoint"], indirect=True, scope="module")
@pytest.mark.parametrize("op", ["mergekit"])
@pytest.mark.parametrize("method", _METHODS)
def test_against_mergekit(
    op: str,
    case: tuple[str, disk.Models],
    method: str,
    run: Run,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    """In turn, ours after a run that does not count; the peer's first one counts: it may take minutes."""
    command = _mergekit()
    name, models = case
    recipe = disk.recipe_of(method, models)
    out, theirs = models.folder / "merged", models.folder / "merged-by-mergekit"
    ours = disk.ours(recipe, out, run)
    children = [disk.alone(ours, out, keep=True)]
    error = disk.error(disk.checked(recipe, out), recipe)
    asked = [str(command), str(models.folder / "recipe.yml"), str(theirs), "--quiet", "-j", str(run.threads)]
    peers, peer_errors = [], []

    def before() -> None:
        disk.warm(recipe)
        peers.append(disk.alone(asked, theirs, keep=True))
        if not METHODS[method].random:
            peer_errors.append(disk.error(disk.looked_at(open_checkpoint(theirs)), recipe))
        shutil.rmtree(theirs)
        disk.settle(out)
        disk.warm(recipe)

    rounds = max(2, request.config.getoption("rounds") // 5)
    benchmark.pedantic(lambda: children.append(disk.run_child(ours)), setup=before, rounds=rounds)
    seconds, theirs_took = [[child.seconds for child in each[-rounds:]] for each in (children, peers)]
    nbytes = 2 * models.parameters * (len(disk.read_by(recipe)) + 1)
    row = Row(
        op,
        name,
        method,
        "BF16",
        median(seconds),
        nbytes / median(seconds) / 1e9,
        times=Ratio.of(theirs_took, seconds),
        against="as fast",
        error_ulp=error,
        peer_error_ulp=max(peer_errors, default=None),
        peer=f"mergekit {_version(command)}",
        **disk.peaks(children, run),
        peer_seconds=median(theirs_took),
        peer_anonymous_mb=max(peer.anonymous_mb for peer in peers),
        peer_resident_mb=max(peer.resident_mb for peer in peers),
    )
    benchmark.extra_info.update(times=row.times.median, peer_seconds=row.peer_seconds)
    record(row)


def _mergekit() -> Path:
    """mergekit-yaml: FASTMERGE_MERGEKIT, or that of a virtual environment of its own in the repository."""
    beside = Path(__file__).parents[1] / ".venv-mergekit" / "bin" / "mergekit-yaml"
    command = Path(os.environ.get("FASTMERGE_MERGEKIT", beside))
    if not command.exists():
        pytest.skip(f"mergekit is not there: set FASTMERGE_MERGEKIT to mergekit-yaml, or install it at {beside}")
    return command


def _version(mergekit: Path) -> str:
    ask = "from importlib.metadata import version; print(version('mergekit'))"
    return subprocess.run(
        [str(mergekit.with_name("python")), "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()
