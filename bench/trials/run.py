"""Ways to bring a merge's bytes in and out, each against the present one: mapped inputs, `pwrite` from a hot tile.

    python bench/trials/run.py FOLDER                           # needs 3 GB of disk there, and of page cache
    python bench/trials/run.py FOLDER --section whole --rounds 15

Each figure is a process of io.cpp, with one of the present way just before or after it; the present way against itself
shows the noise. What a way reads and writes is compared with numpy's once, before any is timed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_SOURCE = Path(__file__).with_name("io.cpp")
_BUILT = Path(__file__).parents[1] / "results" / "io"
_COMPILE = (
    os.environ.get("CXX", "c++"),
    "-std=c++17",
    "-O3",
    "-march=native",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pthread",
)
_MB = 1 << 20


class Way(NamedTuple):
    """How io.cpp reads and writes; `direct` is past the page cache (O_DIRECT).

    Read: mapped, as it is or with MADV_HUGEPAGE for the file, MADV_POPULATE_READ per tile, MADV_WILLNEED a tile ahead;
    or into tiles that are used again, by pread or io_uring. Write: nothing, the mapped output, from a hot tile; or
    straight, by pwrite from the mapped input, or within the kernel. What pwrite leaves in the page cache is put on its
    way to the disk after each batch, or with `begin` after each tile, or with `late` by fsync alone.
    """

    read: str
    write: str
    tile: int = 512  # KB of each file


class Section(NamedTuple):
    """Ways that do the same job; the first is the present one.

    `cache` is where the inputs are: "cold" not in the page cache; "read" into it from the disk, in large folios where
    the file system has them; or "written" into it 4 KB at a time, and so in single pages, of which each costs more.
    """

    title: str
    inputs: int
    cache: str
    ways: tuple[Way, ...]


_READS = (
    *(Way(read, "none") for read in ("mapped", "populate", "willneed", "hugepage")),
    *(Way("pread", "none", tile) for tile in (128, 512, 2048)),
    *(Way("uring", "none", tile) for tile in (128, 512)),
)
_SECTIONS = {
    "warm": Section("Reading 4 inputs, in the page cache", 4, "read", _READS),
    "small": Section("Reading 4 inputs, in the page cache in single pages", 4, "written", _READS),
    "cold": Section(
        "Reading 4 inputs, from the disk",
        4,
        "cold",
        (*_READS, *(Way(read, "none", tile) for read in ("pread-direct", "uring-direct") for tile in (512, 2048))),
    ),
    "whole": Section(
        "Reading 4 inputs, in the page cache, and writing 1 output",
        4,
        "read",
        (
            *(Way("mapped", "pwrite", tile) for tile in (512, 128, 1024, 2048, 4096)),
            *(Way(read, "pwrite") for read in ("populate", "pread", "uring")),
            Way("pread", "pwrite", 128),
            *(Way("mapped", write) for write in ("pwrite-begin", "pwrite-late", "mapped", "uring")),
            *(Way("mapped", write, tile) for write in ("pwrite-direct", "uring-direct") for tile in (512, 4096)),
        ),
    ),
    "small-whole": Section(
        "Reading 4 inputs, in the page cache in single pages, and writing 1 output",
        4,
        "written",
        (*(Way(read, "pwrite") for read in ("mapped", "populate", "pread", "uring")), Way("mapped", "uring")),
    ),
    "cold-whole": Section(
        "Reading 4 inputs, from the disk, and writing 1 output",
        4,
        "cold",
        (
            *(Way(read, "pwrite") for read in ("mapped", "populate", "hugepage", "pread", "uring")),
            Way("pread", "pwrite", 128),
            Way("uring-direct", "uring-direct", 2048),
        ),
    ),
    "through": Section(
        "Passing 1 input through, in the page cache",
        1,
        "read",
        (
            Way("mapped", "pwrite"),
            Way("mapped", "straight"),
            *(Way("none", write, tile) for write in ("copy_file_range", "sendfile") for tile in (512, 4096)),
        ),
    ),
}
Figures = dict[str, Any]


class Trials:
    """The inputs, and one way after another over them."""

    def __init__(self, folder: Path, megabytes: int, threads: int) -> None:
        self._folder, self._megabytes, self._threads = folder, megabytes, threads
        self._expected: dict[int, tuple[int, bytes]] = {}  # of so many inputs combined: all words' xor, and the digest
        combined = np.zeros(megabytes * _MB // 8, np.uint64)
        for number in range(4):
            data = np.random.default_rng(number).integers(0, 1 << 63, combined.size, np.uint64)
            data.tofile(folder / f"in{number}")
            combined ^= data
            self._expected[number + 1] = int(np.bitwise_xor.reduce(combined)), sha256(combined).digest()
        os.sync()

    def prepare(self, cache: str) -> None:
        """Brings the inputs to where a section wants them."""
        for path in self._folder.glob("in*"):
            if cache == "written":
                data = path.read_bytes()
                path.unlink()
                with path.open("wb", buffering=0) as file:
                    for at in range(0, len(data), 4096):
                        file.write(data[at : at + 4096])
                continue
            with path.open("rb", buffering=0) as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while cache == "read" and file.read(_MB):
                    pass

    def refusal(self, section: Section, way: Way) -> str:
        """Why the system refuses a way; empty where it does not, and the way's result is right."""
        try:
            self._check(section, way, self.figures(section, way))
        except RuntimeError as error:
            return str(error)
        return ""

    def figures(self, section: Section, way: Way) -> Figures:
        """One run; RuntimeError with the reason where the system refuses."""
        out = self._folder / "out"
        out.unlink(missing_ok=True)
        os.sync()
        if section.cache == "cold":
            self.prepare("cold")
        words = (self._folder, section.inputs, self._megabytes, self._threads, *way)
        ran = subprocess.run([_BUILT, *map(str, words)], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(ran.stderr.strip() or f"ended with {ran.returncode}")
        figures: Figures = json.loads(ran.stdout)
        assert abs(figures["cached"] - (section.cache != "cold")) < 0.02, (
            f"{figures['cached']:.0%} was in the page cache"
        )
        return figures

    def _check(self, section: Section, way: Way, figures: Figures) -> None:
        seen, digest = self._expected[section.inputs]
        if way.write == "none":
            assert figures["seen"] == seen, f"{way} read something else"
        else:
            assert sha256((self._folder / "out").read_bytes()).digest() == digest, f"{way} wrote something else"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where files are made, and removed at the end")
    parser.add_argument("--section", choices=_SECTIONS, action="append", help="default: all")
    parser.add_argument("--megabytes", type=int, default=512, help="of each of 5 files (default: 512)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all processors")
    parser.add_argument("--rounds", type=int, default=6, help="pairs per figure (default: 6)")
    asked = parser.parse_args()
    _BUILT.parent.mkdir(exist_ok=True)
    subprocess.run([*_COMPILE, _SOURCE, "-o", _BUILT], check=True)
    print(f"Linux {platform.release()}, {asked.threads} threads, files of {asked.megabytes} MB, {asked.rounds} pairs")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        trials = Trials(Path(folder), asked.megabytes, asked.threads)
        for name in asked.section or _SECTIONS:
            _measure(trials, _SECTIONS[name], asked.megabytes * _MB, asked.rounds)


def _measure(trials: Trials, section: Section, size: int, rounds: int) -> None:
    """Prints a section's table."""
    trials.prepare(section.cache)
    refused = {way: trials.refusal(section, way) for way in section.ways}
    ways = [way for way in section.ways if not refused[way]]
    pairs: dict[Way, list[tuple[Figures, Figures]]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in random.Random(number).sample(ways, len(ways)):
            # Each goes first as often as second: what one leaves to the disk, the next one waits for.
            turn = -1 if number % 2 else 1
            present, figures = [trials.figures(section, each) for each in (section.ways[0], way)[::turn]][::turn]
            pairs[way].append((present, figures))

    writes = section.ways[0].write != "none"
    ends = {"written": "", "synced": " with fsync"} if writes else {"written": ""}
    heads = [
        *(f"{what}{end}" for end in ends.values() for what in ("GB/s", "times as fast (quartiles)")),
        "user s",
        "system s",
        "minor faults",
        "major faults",
    ]
    print(f"\n{section.title}:\n\n| read | write | tile KB | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 3)}")
    for way in section.ways:
        cells = [_cells(pairs[way], ends, size * (section.inputs + writes))] if way in pairs else [refused[way]]
        print(f"| {' | '.join([*map(str, way), *cells])} |", flush=True)


def _cells(pairs: list[tuple[Figures, Figures]], ends: dict[str, str], nbytes: int) -> str:
    cells = []
    for end in ends:
        times = [present[end] / way[end] for present, way in pairs]
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
        cells += [f"{nbytes / 1e9 / _median(pairs, end):.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
    cells += [f"{_median(pairs, name):.2f}" for name in ("user", "system")]
    cells += [f"{_median(pairs, name):,.0f}" for name in ("minor", "major")]
    return " | ".join(cells)


def _median(pairs: list[tuple[Figures, Figures]], name: str) -> float:
    return float(statistics.median(way[name] for _, way in pairs))


if __name__ == "__main__":
    main()
