"""Writes counters.md: what stands between us and the marks that are missed, in counters.

    python bench/counters.py [--params 1.1e9] [--rounds 3]

Instructions are those of callgrind (`instructions/avx2.json`), for a virtual machine seldom gives the processor's own
counters. The rest the system counts: processor time, page faults, waits. The machine should have nothing else to do;
how far it had is the column *others*.
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
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
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
_ABOUT = """
Written by `python bench/counters.py` on {}, {} processors, {}.

Instructions are counted by callgrind, the rest by the system. Of the processor's own counters (cycles, misses of its
caches) there are none here: a virtual machine seldom gives them.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--params", type=float, default=1.1e9)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as place:
        models = disk.write_llamas(Path(place), asked.params)
        page = [
            "# What stands in the way",
            _ABOUT.format(ceiling.processor(), _THREADS, native.isa()).rstrip(),
            *_table("Sweeps in memory", _IN_MEMORY, in_memory(asked.rounds)),
            *_table("Thousands of tiny tensors, by the command line", _TINY, tiny(Path(place))),
            *_table(f"From disk to disk, {_millions(models)} parameters", _ON_DISK, on_disk(models, asked.rounds)),
        ]
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as place:
        models = disk.write_llamas(Path(place), _held(asked.params))
        page += _table(f"8 outputs of one read, {_millions(models)} parameters", _MANY, outputs(models, asked.rounds))
    _PAGE.write_text("\n".join(page) + "\n")


def _millions(models: disk.Models) -> str:
    return f"{models.parameters / 1e6:,.0f} M"


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
our reader and writer without arithmetic. Seconds of all processors in that time: its *user* and *system*; *others*,
what other processes and the system itself had of them, as when it writes back; *idle*, when a processor had nothing to
run, waiting for the disk or not. *sync*: how long the process waited for the disk at its end, which `cp` does not.

process | seconds | user | system | others | idle | sync | page faults | written, MB
"""


def on_disk(models: disk.Models, rounds: int) -> Iterator[Sequence[Any]]:
    run, out = Run(_THREADS), models.folder / "out"
    processes: dict[str, list[str]] = {}
    for method in ("passthrough", "linear", "slerp", "task_arithmetic"):
        recipe = disk.recipe_of(method, models)
        processes[f"floor of {method}"] = _noted("floor", disk.floor(recipe, out, run)[2:])
        processes[f"{method}: cat and cp"] = disk.cat_and_cp(recipe, out)
    for method in _SWEPT:
        processes[method] = _merging(method, models, out)
    yield from _in_turn(processes, out, rounds)


_MANY = """
The same of 8 values of lambda beside one, the models small enough that the page cache holds them and all outputs.

process | seconds | user | system | others | idle | sync | page faults | written, MB
"""


def outputs(models: disk.Models, rounds: int) -> Iterator[Sequence[Any]]:
    run, out = Run(_THREADS), models.folder / "out"
    recipe = disk.recipe_of("task_arithmetic", models)
    processes = {f"floor, {each} written": _noted("floor", disk.floor(recipe, out, run, each)[2:]) for each in (1, 8)}
    for method in ("task_arithmetic", "ties"):
        processes[method] = _merging(method, models, out)
        processes[f"{method}, 8 of lambda"] = [*processes[method], "--vary", f"lambda={_LAMBDAS}"]
    yield from _in_turn(processes, out, rounds)


def _held(parameters: float) -> float:
    """Of models that with a base and 8 outputs take half of the memory at most: as many, or a quarter, or of that."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    while 2 * parameters * (MODELS + 1 + 8) > memory / 2:
        parameters /= 4
    return parameters


def _merging(method: str, models: disk.Models, out: Path) -> list[str]:
    path = models.folder / "recipes" / method / "recipe.yml"
    path.parent.mkdir(parents=True)
    path.write_text(disk.recipe_of(method, models).text)
    return _noted("merge", ["merge", str(path), str(out), "--quiet", "--backend", "cpu"])


def _in_turn(processes: Mapping[str, Sequence[str]], out: Path, rounds: int) -> Iterator[Sequence[Any]]:
    found = [{name: _usage(command, out) for name, command in processes.items()} for _ in range(rounds)]
    for name in processes:
        *times, faults, written = (median(each) for each in zip(*(each[name] for each in found), strict=True))
        yield name, *(f"{each:.2f}" for each in times), f"{faults:,.0f}", f"{written:,.0f}"


def _noted(kind: str, arguments: Sequence[str]) -> list[str]:
    """A process that notes how long it waited for the disk."""
    return [sys.executable, noting.__file__, kind, *arguments]


def _usage(command: Sequence[str], out: Path) -> tuple[float, ...]:
    """Seconds, user and system time, that of others, idle time, seconds of sync, page faults, megabytes written."""
    disk.settle(out)
    notes = out.with_name("notes")
    notes.unlink(missing_ok=True)
    before, was_idle, was_busy = resource.getrusage(resource.RUSAGE_CHILDREN), *_processors()
    start = perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, noting.PLACE: str(notes)})
    seconds = perf_counter() - start
    idle, busy = _processors()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    sync = float(notes.read_text()) if notes.exists() else 0.0
    written = sum(file.stat().st_size for file in out.rglob("*.safetensors")) / 1e6
    spent = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
    others = max(0.0, busy - was_busy - sum(spent))  # the system counts in hundredths
    return seconds, *spent, others, idle - was_idle, sync, after.ru_minflt - before.ru_minflt, written


def _processors() -> tuple[float, float]:
    idle, busy = idle_and_busy(Path("/proc/stat").read_text(), os.sched_getaffinity(0))
    return idle / os.sysconf("SC_CLK_TCK"), busy / os.sysconf("SC_CLK_TCK")


def idle_and_busy(stat: str, processors: Container[int]) -> tuple[int, int]:
    """Ticks in which processors had nothing to run, also while something waited for a disk, and in which they had."""
    idle = busy = 0
    for name, *ticks in map(str.split, stat.splitlines()):
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in processors:
            user, nice, system, resting, waiting, *others = map(int, ticks[:8])  # guests are in `user` already
            idle += resting + waiting
            busy += user + nice + system + sum(others)
    return idle, busy


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
