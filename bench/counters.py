"""Writes counters.md: what stands between us and the marks that are missed, in counters.

    python bench/counters.py [--params 1.1e9] [--rounds 3]

Instructions are those of callgrind (`instructions/avx2.json`), for a virtual machine seldom gives the processor's own
counters. The rest the system counts: processor time, page faults, waits. The machine should have nothing else to do.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import ceiling
import disk
import noting
from cases import CASES, MODELS, Buffers, Case, read_by, sweeps

from fastmerge import native
from fastmerge.methods import METHODS
from fastmerge.sweep import SWEPT, Run

_HERE = Path(__file__).parent
_PAGE = _HERE / "counters.md"
_THREADS = len(os.sched_getaffinity(0))
_SWEPT = ("linear", "task_arithmetic", "slerp", "passthrough", "dare_linear", "dare_ties", "ties")
_IN_CACHE = (Case(1, (8192,)), Case(1, (57344,)))  # the larger is half a megabyte with four inputs and an output
_LAMBDAS = ",".join(str((1 + number) / 8) for number in range(8))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--params", type=float, default=1.1e9)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as place:
        models = disk.write_llamas(Path(place), asked.params)
        page = [
            "# What stands in the way",
            "",
            f"Written by `python bench/counters.py` on {ceiling.processor()}, {_THREADS} processors, {native.isa()}.",
            *_table("Sweeps in memory", _IN_MEMORY, in_memory(asked.rounds)),
            *_table("Thousands of tiny tensors, by the command line", _TINY, tiny(Path(place))),
            *_table(
                f"From disk to disk, {models.parameters / 1e6:,.0f} M parameters", _ON_DISK, on_disk(models, asked)
            ),
        ]
    _PAGE.write_text("\n".join(page) + "\n")


def _table(title: str, head: str, rows: Iterator[Sequence[Any]]) -> list[str]:
    about, columns = head.strip().split("\n\n")
    names = columns.split(" | ")
    lines = [["", f"## {title}", "", about, "", f"| {columns} |", f"|{' --- |' * len(names)}"]]
    for row in rows:
        print(*row, sep="\t", flush=True)
        lines.append([f"| {' | '.join(map(str, row))} |"])
    return [line for each in lines for line in each]


# --- in memory ---

_IN_MEMORY = """
Bfloat16, three models and a base, nanoseconds per 16 elements. *in cache*: by one thread over tensors that stay in its
second cache, so the instructions alone, and what is left of that where the threads share the work. *bytes*: what the
bare loop of the ceiling takes to move as many bytes from and to memory, by all threads. A sweep cannot take less than
either, and takes more than the larger of the two as far as they do not overlap.

method | instructions per element | bytes per element | in cache | shared | bytes | measured | bytes of measured
"""


def in_memory(rounds: int) -> Iterator[Sequence[Any]]:
    counts = json.loads((_HERE / "instructions" / "avx2.json").read_text())["instructions_per_element"]
    large = Buffers(CASES["mlp"], "BF16")
    cached = [Buffers(case, "BF16") for case in _IN_CACHE]
    for method in _SWEPT:
        small, whole = (_least(_sweeping(method, each, Run(1), 400), 20 * rounds) / 400 for each in cached)
        hot = (whole - small) * 16e9 / (_IN_CACHE[1].elements - _IN_CACHE[0].elements)  # without what a call costs
        shared = hot / _THREADS
        of_bytes, measured = _beside_ceiling(method, large, rounds)
        moved = (sum(read_by(METHODS[method])) + 1) * SWEPT["BF16"]
        figures = [f"{each:.2f}" for each in (hot, shared, of_bytes, measured)]
        yield method, counts[method], moved, *figures, f"{of_bytes / measured:.0%}"


def _beside_ceiling(method: str, buffers: Buffers, rounds: int) -> tuple[float, float]:
    """Nanoseconds per 16 elements of the bare loop and of the sweep, in turn."""
    models, based = read_by(METHODS[method])
    bare, ours = [], []
    for number in (buffers.turn() for _ in range(5 * rounds)):
        loop = ceiling.Ceiling.of(buffers.inputs(models, based, number), buffers.targets(number), _THREADS)
        sweeping = _sweeping(method, buffers, Run(_THREADS), 1, number)
        bare.append(min(_least(lambda kind=kind, loop=loop: loop(kind), 1) for kind in ceiling.stores(True)))
        ours.append(_least(sweeping, 1))
    return median(bare) * 16e9 / buffers.case.elements, median(ours) * 16e9 / buffers.case.elements


def _sweeping(method: str, buffers: Buffers, run: Run, times: int, number: int = 0) -> Callable[[], object]:
    inputs = buffers.inputs(*read_by(METHODS[method]), number)
    (known,) = sweeps(native, method, inputs, run)
    targets = buffers.targets(number)
    return lambda: native.merge(inputs * times, [known] * times, targets * times, run)


def _least(call: Callable[[], object], rounds: int) -> float:
    """The least seconds of some."""
    taken = []
    for _ in range(rounds):
        start = perf_counter()
        call()
        taken.append(perf_counter() - start)
    return min(taken)


# --- from disk to disk ---

_ON_DISK = """
Each a process from start to end, in turn, on models in the page cache; medians. *floor* moves the same bytes through
our reader and writer without arithmetic. *idle*: what is left of the processors' time. *sync*: how long the process
waited for the disk at its end, which `cp` does not.

process | seconds | user | system | idle | sync | page faults | written, MB
"""


def on_disk(models: disk.Models, asked: argparse.Namespace) -> Iterator[Sequence[Any]]:
    run, out = Run(_THREADS), models.folder / "out"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    several = 2 * models.parameters * (MODELS + 1 + 8) < memory / 2  # else the page cache does not hold them all
    processes: dict[str, list[str]] = {}
    for method in ("passthrough", "linear", "slerp", "task_arithmetic"):
        recipe = disk.recipe_of(method, models)
        processes[f"floor of {method}"] = _noted("floor", disk.floor(recipe, out, run)[2:])
        processes[f"{method}: cat and cp"] = disk.cat_and_cp(recipe, out)
    recipes = models.folder / "recipes"
    for method in _SWEPT:
        path = recipes / method / "recipe.yml"
        path.parent.mkdir(parents=True)
        path.write_text(disk.recipe_of(method, models).text)
        processes[method] = _noted("merge", ["merge", str(path), str(out), "--quiet", "--backend", "cpu"])
        if several and method in ("task_arithmetic", "ties"):
            options = ["--vary", f"lambda={_LAMBDAS}"]
            processes[f"{method}, 8 of lambda"] = [*processes[method], *options]
    if several:
        recipe = disk.recipe_of("task_arithmetic", models)
        processes["floor of task_arithmetic, 8 outputs"] = _noted("floor", disk.floor(recipe, out, run, 8)[2:])
    rounds = [{name: _usage(command, out) for name, command in processes.items()} for _ in range(asked.rounds)]
    for name in processes:
        seconds, user, system, sync, faults, written = (
            median(each) for each in zip(*(found[name] for found in rounds), strict=True)
        )
        idle = _THREADS * seconds - user - system
        times = (f"{each:.2f}" for each in (seconds, user, system, idle, sync))
        yield name, *times, f"{faults:,.0f}", f"{written:,.0f}"


def _noted(kind: str, arguments: Sequence[str]) -> list[str]:
    """A process that notes how long it waited for the disk."""
    return [sys.executable, noting.__file__, kind, *arguments]


def _usage(command: Sequence[str], out: Path) -> tuple[float, ...]:
    """Seconds, user and system time, seconds of sync, page faults, megabytes written."""
    disk.settle(out)
    notes = out.with_name("notes")
    notes.unlink(missing_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, noting.PLACE: str(notes)})
    seconds = perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sync = float(notes.read_text()) if notes.exists() else 0.0
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    spent = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
    return seconds, *spent, sync, after.ru_minflt - before.ru_minflt, written


# --- tiny tensors ---

_TINY = """
4,000 tensors of 256 elements, task_arithmetic of three models and a base: what Python does for each, as cProfile counts
it, which makes it slower: the shares count. 2 microseconds are about 20 calls of a Python function.

where | calls per tensor | share of the time
"""
_TENSORS = 4000


def tiny(place: Path) -> Iterator[Sequence[Any]]:
    models = disk.write_models(place / "tiny", {f"model.layers.{n}.norm.weight": (256,) for n in range(_TENSORS)}, {})
    recipe = disk.recipe_of("task_arithmetic", models)
    os.sync()  # what else is to be put on disk is not waited for here
    profile = cProfile.Profile()
    from fastmerge.engine import merge

    profile.runcall(merge, recipe, place / "tiny-out", threads=1)
    calls: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for (file, _, name), (_, count, own, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        where = (
            Path(file).name if file.endswith(".py") and "fastmerge" in file else "the core" if "_core" in name else ""
        )
        calls[where or "Python itself"] += count
        seconds[where or "Python itself"] += own
    total = sum(seconds.values())
    for where, spent in seconds.most_common(10):
        yield where, f"{calls[where] / _TENSORS:.1f}", f"{spent / total:.0%}"
    yield "all", f"{sum(calls.values()) / _TENSORS:.1f}", "100%"


if __name__ == "__main__":
    main()
