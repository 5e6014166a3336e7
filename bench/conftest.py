"""What the benches share: their options, the choice of what runs, the table at the end and the rows of the CSV."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import ceiling
import marks
import pytest

from fastmerge import backends, native
from fastmerge.sweep import Run

_CHOICES = ("provider", "op", "case", "method")
_ROWS = pytest.StashKey[list["Row"]]()
_END = pytest.StashKey[float]()
_RUN = pytest.StashKey[str]()


class Ratio(NamedTuple):
    """Pairwise ratios of times taken in turn on a shared machine: their median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        if len(ratios) == 1:
            return cls(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, method="inclusive")
        return cls(median, low, high)


class Row(NamedTuple):
    """One figure. Rates are logical bytes, each input and output once, over median seconds."""

    op: str
    case: str
    method: str
    dtype: str
    seconds: float
    gbps: float
    ceiling_gbps: float | None = None
    share: Ratio | None = None  # of the ceiling: its time over ours
    processors: float | None = None  # that we got: processor time over time; below `threads` others had the rest
    times: Ratio | None = None  # how much slower than its sweep alone, or faster than the peer
    against: str = ""  # what `times` compares with
    error_ulp: float | None = None  # largest, against float64, in units of the output's last place
    peer_error_ulp: float | None = None
    peer: str = ""  # eager torch, or mergekit with its version
    anonymous_mb: float | None = None  # peak of sampled RssAnon
    resident_mb: float | None = None  # ru_maxrss: mapped files too
    peer_seconds: float | None = None
    peer_anonymous_mb: float | None = None
    peer_resident_mb: float | None = None
    provider: str = "cpu"
    device: str = ""  # a GPU's name, of what ran on one
    kernel_seconds: float | None = None  # of the GPU's own work, without the host's
    kernel_share: float | None = None  # of the ceiling by that
    launches: float | None = None
    at: float | None = None  # the place on a curve of `op` "scale"; the parameters of a session's models


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmerge bench")
    for choice in _CHOICES:
        group.addoption(f"--{choice}", help=f"only this {choice}, or several with commas between")
    group.addoption("--dtype", default="BF16", choices=("BF16", "F16", "F32"), help="of the tensors in memory")
    group.addoption("--threads", type=int, default=backends.threads(), help="of ours and of the ceiling")
    group.addoption("--rounds", type=int, default=15, help="rounds in memory, ceiling and op in turn")
    group.addoption("--params", type=float, default=0.3e9, help="parameters of each model on disk")
    group.addoption("--minutes", type=float, default=8.5, help="after which no more is begun on a GPU")
    group.addoption("--emulated", action="store_true", help="the benches of a GPU tiny and without one, to check them")
    group.addoption("--csv", type=Path, help="a file that grows by a row per figure")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # bare times of a shared machine; the table at the end has ratios
    config.option.benchmark_disable_gc = True
    config.stash[_ROWS] = []
    config.stash[_END] = perf_counter() + 60 * config.getoption("minutes")
    config.stash[_RUN] = _now()
    if config.getoption("emulated"):
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for choice in _CHOICES:
        wanted = config.getoption(choice)
        if not wanted:
            continue
        there = {item: item.callspec.params.get(choice, "cpu") for item in items}
        if unknown := set(wanted.split(",")) - set(there.values()):
            names = ", ".join(sorted(set(there.values())))
            raise pytest.UsageError(f"no bench has --{choice} {', '.join(sorted(unknown))}; there are {names}")
        config.hook.pytest_deselected(items=[item for item in items if there[item] not in wanted.split(",")])
        items[:] = [item for item in items if there[item] in wanted.split(",")]


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.config.getoption("threads"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Keeps a row for the table, and writes it to the CSV at once: a run that is cut short keeps what it measured."""

    def keep(row: Row) -> None:
        config = request.config
        config.stash[_ROWS].append(row)
        if row.device:  # one by one, as a machine that is lent may be taken away
            request.getfixturevalue("terminal").write_line("  ".join(filter(None, _gpu_cells(row))))
        if path := config.getoption("csv"):
            append(path, row, config.getoption("threads"), config.stash[_RUN])

    return keep


@pytest.fixture(scope="session")
def terminal(request: pytest.FixtureRequest) -> pytest.TerminalReporter:
    return request.config.pluginmanager.getplugin("terminalreporter")


@pytest.fixture
def _in_time(request: pytest.FixtureRequest) -> None:
    if perf_counter() > request.config.stash[_END]:
        pytest.skip(f"not begun in the {request.config.getoption('minutes')} --minutes")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_ROWS]
    if not rows:
        return
    about = _about(config.getoption("threads"))
    terminalreporter.section("fastmerge bench")
    terminalreporter.line(", ".join(f"{key} {value}" for key, value in about.items()))
    terminalreporter.line("share: the ceiling's time over ours; medians of pairs taken in turn (quartiles)")
    if on_host := [row for row in rows if not row.device]:
        several = len({row.provider for row in on_host}) > 1
        _show(terminalreporter, _HEADINGS, [_cells(row, several) for row in on_host])
    if config.getoption("emulated"):
        terminalreporter.line("emulated and tiny: no figure below means anything")
    if on_gpu := [row for row in rows if row.device]:
        on_gpu.sort(key=lambda row: (row.op, row.method, row.case, row.provider, row.against))
        _show(terminalreporter, _GPU_HEADINGS, map(_gpu_cells, on_gpu))
        terminalreporter.line("")
        _show(terminalreporter, _MARK_HEADINGS, marks.standing(on_gpu))


def _show(reporter: pytest.TerminalReporter, headings: Sequence[str], cells: Iterable[Sequence[str]]) -> None:
    """A column in which no row has anything is left out."""
    columns = [column for column in zip(headings, *cells, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        reporter.line("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


_HEADINGS = (
    "op",
    "method",
    "case",
    "at",
    "provider",
    "seconds",
    "GB/s",
    "ceiling",
    "share",
    "processors",
    "against",
    "ulp",
    "MB anonymous",
)


_GPU_HEADINGS = (
    "op",
    "method",
    "case",
    "provider",
    "seconds",
    "GB/s",
    "ceiling",
    "share",
    "kernels alone",
    "launches",
    "against",
)
_MARK_HEADINGS = ("mark", "provider", "goal", "worst", "where", "")


def _gpu_cells(row: Row) -> list[str]:
    """`kernels alone`: the share by the time of the GPU's own work, as the profiler saw it."""
    return [
        row.op,
        row.method,
        row.case,
        row.provider,
        f"{row.seconds:.6f}",
        f"{row.gbps:.1f}",
        "" if row.ceiling_gbps is None else f"{row.ceiling_gbps:.1f}",
        f"{row.share.median:.1%} ({row.share.low:.1%} to {row.share.high:.1%})" if row.share else "",
        "" if row.kernel_share is None else f"{row.kernel_share:.1%}",
        "" if row.launches is None else f"{row.launches:g}",
        f"{row.times.median:.2f} x {row.against}" if row.times else "",
    ]


def _cells(row: Row, several: bool) -> list[str]:
    """`several` providers are told apart by name."""
    share = f"{row.share.median:.0%} ({row.share.low:.0%} to {row.share.high:.0%})" if row.share else ""
    against = f"{row.times.median:.2f} x {row.against}" if row.times else ""
    error = "" if row.error_ulp is None else f"{row.error_ulp:.3f}"
    peer = "" if row.peer_error_ulp is None else f" ({row.peer} {row.peer_error_ulp:.3g})"
    memory = "" if row.anonymous_mb is None else f"{row.anonymous_mb:.0f}"
    if row.peer_anonymous_mb is not None:
        memory += f" ({row.peer} {row.peer_anonymous_mb:.0f})"
    processors = "" if row.processors is None else f"{row.processors:.1f}"
    rates = [f"{row.gbps:.1f}", "" if row.ceiling_gbps is None else f"{row.ceiling_gbps:.1f}"]
    return [
        row.op,
        row.method,
        row.case,
        "" if row.at is None else f"{row.at:g}",
        row.provider if several else "",
        f"{row.seconds:.4f}",
        *rates,
        share,
        processors,
        against,
        error + peer,
        memory,
    ]


def append(path: Path, row: Row, threads: int, run: str) -> None:
    """`run` is shared by the rows of one session: when it began."""
    values = {"run": run, "date": _now(), **_about(threads)}
    for key, value in row._asdict().items():
        if isinstance(value, Ratio) or key in ("share", "times"):
            values |= {f"{key}_{name}": getattr(value, name, "") for name in Ratio._fields}
        else:
            values[key] = value
    shown = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        if columns not in (None, list(shown)):
            raise pytest.UsageError(f"{path} has other columns than this bench writes: name a new file with --csv")
        writer = csv.DictWriter(file, shown)
        if columns is None:
            writer.writeheader()
        writer.writerow(shown)


def _about(threads: int) -> dict[str, object]:
    """What a figure depends on beside what it measures."""
    versions = [f"{name} {version(name)}" for name in ("fastmerge", "torch", "numpy")]
    return {
        "revision": _revision(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "cpu": ceiling.processor(),
        "isa": native.isa(),
        "threads": threads,
        "versions": " / ".join([*versions, f"Python {platform.python_version()}"]),
    }


@cache
def _revision() -> str:
    """Dirty where anything differs but what the bench itself writes."""
    git = ("git", "-C", str(Path(__file__).parents[1]))
    changed = [*git, "diff", "--quiet", "HEAD", "--", ".", ":!bench/history.csv", ":!bench/page", ":!bench/counters.md"]
    try:
        name = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=True).stdout.strip()
        return f"{name}-dirty" if subprocess.run(changed).returncode else name
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
