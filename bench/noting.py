"""A merge, or its floor, as a process that notes how long it waited for the disk.

FASTMERGE_BENCH_NOTES=FILE python bench/noting.py merge|floor ARGUMENTS
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from time import perf_counter

PLACE = "FASTMERGE_BENCH_NOTES"


def main(kind: str, arguments: list[str]) -> None:
    spans: list[tuple[float, float]] = []
    fsync = os.fsync

    def noted(file: int) -> None:
        start = perf_counter()
        fsync(file)
        spans.append((start, perf_counter()))

    os.fsync = noted
    if kind == "floor":
        import ceiling

        threads, outputs, out, *models = arguments
        ceiling.disk_to_disk(int(threads), Path(out), [Path(model) for model in models], int(outputs))
    else:
        from fastmerge.cli import main as command

        command(arguments, standalone_mode=False)
    Path(os.environ[PLACE]).write_text(str(_covered(spans)))


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """The time in which there was at least one."""
    end = total = 0.0
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
