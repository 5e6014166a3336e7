"""The page of the bench: `python bench/page.py [CSV] [FOLDER]` writes README.md with figures of the newest rows."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import figures
import host_marks
from host_marks import Figure

_HERE = Path(__file__).parent
_NUMBERS = (
    "threads",
    "seconds",
    "gbps",
    "ceiling_gbps",
    "processors",
    "error_ulp",
    "peer_error_ulp",
    "anonymous_mb",
    "peer_seconds",
    "peer_anonymous_mb",
    "at",
)
_TEXTS = (
    *("run", "date", "revision", "machine", "cpu", "isa", "versions", "op", "case", "method", "dtype"),
    *("against", "peer", "provider", "device"),
)
_KEY = ("op", "case", "method", "dtype", "provider", "threads", "isa", "cpu", "peer", "at")
_OPS = ("merge", "whole", "gram", "norms", "threshold")
#: What the candidates of a session are, by case.
_CANDIDATES = {
    "one": "one by one",
    "one-anew": "one by one, in memory",
    "weights": "8 at once",
    "lambdas": "8 at once, lambda alone",
}


class Row(NamedTuple("Row", [(name, Any) for name in (*_TEXTS, *_NUMBERS, "share", "times")])):
    """A row of the CSV, as conftest.py wrote it."""

    @classmethod
    def of(cls, line: dict[str, str]) -> Row:
        numbers = {name: float(line[name]) if line[name] else None for name in _NUMBERS}
        ratios = {
            name: Figure(*(float(line[f"{name}_{part}"]) for part in Figure._fields))
            for name in ("share", "times")
            if line[f"{name}_median"]
        }
        return cls(**{name: line[name] for name in _TEXTS}, **numbers, **{"share": None, "times": None, **ratios})


class Section(NamedTuple):
    """Figures of the same rows, and their table."""

    title: str
    says: str  # what was measured
    command: str  # that measures it
    rows: Sequence[Row]
    draw: dict[str, Callable[[Sequence[Row]], Any]]  # by file
    table: Callable[[Sequence[Row]], Sequence[Sequence[str]]]  # headings first


def main(path: Path, folder: Path) -> None:
    rows = _chosen(path)
    folder.mkdir(parents=True, exist_ok=True)
    parts = [
        "# What the bench measured",
        f"Written by `python bench/page.py` from `{path.name}`: the newest row of each figure on {_machine(rows[-1])}. "
        "What a figure means is in [bench/README.md](../README.md).",
        "## Against the marks",
        _table([("", "goal", "worst", "where", "figures", ""), *host_marks.standing(rows)]),
        "The worst figure of each, its quartiles where it is the median of several, and the revision that it was "
        f"measured at where that is not the newest here, {max(rows, key=lambda row: row.run).revision}; *so far*: some "
        "of what the mark is about is not measured. What stands in the way of those that are missed: "
        "[counters.md](../counters.md), and what they mean in"
        " [bench/README.md](../README.md#what-stands-in-the-way).",
    ]
    for section in _sections(rows):
        parts += [f"## {section.title}", section.says]
        if not section.rows:
            parts.append(f"Not measured: `{section.command}`.")
            continue
        for name, draw in section.draw.items():
            figures.write(partial(draw, section.rows), folder / name)
            parts.append(f"![{section.title}]({name})")
        parts += [_measured(section.rows), _table(section.table(section.rows))]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# --- the rows ---


def _chosen(path: Path) -> list[Row]:
    """The newest row of each figure, where the last run was; of its settings, those with the most figures."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = sorted(map(Row.of, csv.DictReader(file)), key=lambda row: row.run)
    newest = {
        tuple(getattr(row, name) for name in _KEY): row for row in rows if row.provider == "cpu" and not row.device
    }
    if not newest:
        sys.exit(f"{path} has no figure of the compiled CPU core: run make bench")
    last = max(newest.values(), key=lambda row: row.run)
    settings: dict[tuple[Any, ...], list[Row]] = {}
    for row in newest.values():
        if row.cpu == last.cpu:
            settings.setdefault(_settings(row), []).append(row)
    most = max(settings.values(), key=lambda own: (len(own), max(row.run for row in own)))
    return sorted(most, key=_place)


def _settings(row: Row) -> tuple[Any, ...]:
    """Adapters have a dtype of their own: they stand with the models that they are for."""
    return row.isa, row.threads, "BF16" if row.op in host_marks.LORA else row.dtype


def _place(row: Row) -> tuple[Any, ...]:
    op = _OPS.index(row.op) if row.op in _OPS else len(_OPS)
    return op, row.op, row.case, figures.order(row.method), row.method, row.peer, row.at or 0


def _gbps(row: Row) -> Figure:
    return Figure(row.gbps)


def _times(disk: bool) -> Callable[[Row], Figure | None]:
    return lambda row: row.times if row.times and ("disk to disk" in row.method) == disk else None


#: By case: title, what was measured, what `at` is, and the values.
_CURVES = {
    "bytes": (
        "Models of any size",
        "Three models and a base from disk to disk; the ceiling is that of disk to disk.",
        "bytes read and written, log scale",
        {"GB/s": _gbps, "% of the ceiling": host_marks.percent},
    ),
    "threads": (
        "Threads",
        "Whole methods on the case `mlp` in memory, the ceiling with as many threads.",
        "threads",
        {"GB/s": _gbps, "% of the ceiling": host_marks.percent},
    ),
    "models": (
        "Models at once",
        "Whole methods, and gram, on tensors of 4.2 M elements in memory.",
        "models",
        {"GB/s": _gbps, "% of the ceiling": host_marks.percent},
    ),
    "settings": (
        "Many outputs of one read",
        "As many settings of one recipe, against one: in one read, and one by one. At most: twice what one costs "
        "beside its writing, and the writing of all.",
        "outputs",
        {"in memory: times one output": _times(False), "disk to disk: times one output": _times(True)},
    ),
}


def _sections(rows: Sequence[Row]) -> Iterator[Section]:
    def own(op: str) -> list[Row]:
        return [row for row in rows if row.op == op]

    def largest(op: str) -> list[Row]:
        most = max(map(host_marks.parameters, own(op)), default=0)
        return [row for row in own(op) if host_marks.parameters(row) == most]

    def scaled(case: str) -> list[Row]:
        return [row for row in own("scale") if row.case == case]

    merged, peers = largest("mergekit"), [row for row in own("peer") if row.case == "mlp"]
    yield Section(
        "Disk to disk, beside mergekit",
        "The same recipe and models, in the page cache, as processes from start to end; ours waits for the disk "
        "(fsync), mergekit does not.",
        "make bench OP=mergekit PARAMS=1.1e9",
        merged,
        {
            "speed.svg": lambda rows: figures.seconds(rows, [row.method for row in rows]),
            "memory.svg": figures.memory,
        },
        _beside_mergekit,
    )
    yield Section(
        "Disk to disk, of the ceiling",
        "The ceiling: a process that reads each tensor through our reader and writes as many bytes through our writer.",
        "make bench OP=disk PARAMS=1.1e9",
        largest("disk"),
        {"disk.svg": partial(_shares, "{method}")},
        partial(_of_the_ceiling, ("method",)),
    )
    yield Section(
        "In memory, of the ceiling",
        "One tensor of 58.7 M elements (the case `mlp`), three models and a base. The ceiling is the barest loop over "
        "the same bytes, buffers and threads.",
        f"make bench OP={','.join(_OPS)} CASE=mlp",
        [row for row in rows if row.op in _OPS and row.case == "mlp"],
        {"roofline.svg": partial(_shares, "{op} {method}")},
        partial(_of_the_ceiling, ("op", "method")),
    )
    yield Section(
        "In memory, beside PyTorch and mergekit",
        "The same tensors (the case `mlp`), measuring counted in.",
        "make bench OP=peer CASE=mlp",
        peers,
        {"in-memory.svg": figures.times_as_fast},
        _beside_peers,
    )
    for curve, (title, says, x, values) in _CURVES.items():
        yield Section(
            title,
            says,
            f"make bench OP=scale CASE={curve}",
            scaled(curve),
            {f"{curve}.svg": partial(figures.curves, x=x, values=values)},
            partial(_curve, values),
        )
    yield Section(
        "Thousands of tiny tensors",
        "What each costs for being one, in place of a part of a large tensor, which is merged in turn.",
        "make bench OP=scale CASE=tensors",
        scaled("tensors"),
        {"tensors.svg": lambda rows: figures.overheads(rows, list(map(_tiny, rows)), host_marks.TINY_MICROSECONDS)},
        _overheads,
    )
    most = max((row.at for row in own("session")), default=0)
    adapted = [row for op in host_marks.LORA for row in largest(op)]
    yield Section(
        "A session's candidates",
        "A session keeps three models and a base (slerp: two models) in memory and gives them merged with other "
        "settings, into tensors that are there: with other weights or another t, or with another lambda alone. The "
        "seconds are those of one candidate. What is measured once (thresholds, inner products) and reading the models "
        "beforehand are not counted. Merging anew is `fastmerge.merge` from disk to disk, fsync included, and loading "
        "its output, which is what the mark is about; *in memory* it is `merge_state_dicts`. The ceiling is the barest "
        "loop that reads each model once and writes the candidates of one call.",
        "make bench OP=session",
        sorted((row for row in own("session") if row.at == most), key=_by_candidates),
        {"session.svg": lambda rows: figures.seconds(rows, list(map(_candidates, rows)), " a candidate")},
        _of_sessions,
    )
    yield Section(
        "LoRA, beside PEFT",
        "`fastmerge lora` from disk to disk: whole processes with start-up and fsync, their median. PEFT ran once. "
        f"*{host_marks.WHOLE.removeprefix(', ')}*: all of its process, too, which imports, loads the base, computes "
        "and saves. The other rows leave its imports out of fusing (loading the base, merge_and_unload and saving are "
        "counted), and have add_weighted_adapter alone for combining, the model and both adapters loaded and nothing "
        "saved; the figure has these. Memory is the peak of the whole process on both sides. Ours combines without "
        "the base, which PEFT has to load; the parameters beside combine and extract are those that the adapters "
        "change, of one layer. PEFT has nothing like extract.",
        f"make bench OP={','.join(host_marks.LORA)}",
        adapted,
        {"lora.svg": _beside_peft} if any(row.peer for row in adapted) else {},
        _of_adapters,
    )
    yield Section(
        "Accuracy beside speed",
        "The largest error against the same maths in float64, in units of the last place; down and to the left is "
        "better. Left out: a peer's random drops, which are not ours, and copies, which have no error.",
        "make bench OP=mergekit,peer PARAMS=1.1e9",
        [*merged, *peers],
        {"accuracy.svg": lambda rows: figures.accuracy(_points(rows))},
        _accuracy,
    )


def _shares(name: str, rows: Sequence[Row]) -> Any:
    return figures.shares(rows, [name.format_map(row._asdict()) for row in rows])


# --- the tables, with the numbers of the figures ---


def _beside_mergekit(rows: Sequence[Row]) -> list[Sequence[str]]:
    headings = ("method", "parameters", "seconds", rows[0].peer, "times as fast", "MB anonymous", "its")
    return [
        headings,
        *(
            (
                row.method,
                row.case,
                f"{row.seconds:.2f}",
                f"{row.peer_seconds:.1f}",
                str(row.times),
                f"{row.anonymous_mb:,.0f}",
                f"{row.peer_anonymous_mb:,.0f}",
            )
            for row in rows
        ),
    ]


def _of_the_ceiling(names: Sequence[str], rows: Sequence[Row]) -> list[Sequence[str]]:
    headings = (*names, "case", "seconds", "GB/s", "ceiling", "share (quartiles)", "processors", "against", "ulp")
    return [
        headings,
        *(
            (
                *(getattr(row, name) for name in names),
                row.case,
                f"{row.seconds:.4g}",
                f"{row.gbps:.1f}",
                f"{row.ceiling_gbps:.1f}",
                _share(row),
                "" if row.processors is None else f"{row.processors:.1f}",
                f"{figures.times(row.times.median)} {row.against}" if row.times else "",
                _ulp(row.error_ulp),
            )
            for row in rows
        ),
    ]


def _share(row: Row) -> str:
    return f"{row.share.median:.0%} ({row.share.low:.0%} to {row.share.high:.0%})"


def _beside_peers(rows: Sequence[Row]) -> list[Sequence[str]]:
    return [
        ("method", "peer", "seconds", "its", "times as fast"),
        *(
            (
                row.method,
                row.peer,
                f"{row.seconds:.4g}",
                f"{row.peer_seconds:.4g}",
                str(row.times),
            )
            for row in rows
        ),
    ]


def _curve(values: dict[str, Callable[[Row], Figure | None]], rows: Sequence[Row]) -> list[Sequence[str]]:
    """A line per method and value, a column per place on the curve; in brackets quartiles."""
    places = sorted({row.at for row in rows})
    lines: dict[tuple[str, str], dict[float, str]] = {}
    for row in rows:
        for label, value in values.items():
            if (number := value(row)) is not None:
                lines.setdefault((row.method, label), {})[row.at] = str(number)
    return [
        ("", "", *(f"{at / 1e6:,.0f} MB" if at >= 1e6 else f"{at:g}" for at in places)),
        *((*line, *(numbers.get(at, "") for at in places)) for line, numbers in lines.items()),
    ]


def _overheads(rows: Sequence[Row]) -> list[Sequence[str]]:
    return [
        ("", "tensors", "microseconds a tensor", "against"),
        *(
            (_tiny(row), f"{row.at:,g}", f"{1e6 * row.seconds:.2f}", f"{figures.times(row.times.median)} {row.against}")
            for row in rows
        ),
    ]


def _tiny(row: Row) -> str:
    return row.method.removesuffix(", overhead per tensor")


def _of_sessions(rows: Sequence[Row]) -> list[Sequence[str]]:
    headings = ("method", "candidates", "parameters", "seconds each", "anew", "times as fast", "as", "GB/s", "ceiling")
    return [
        (*headings, "share (quartiles)", "processors"),
        *(
            (
                row.method,
                _CANDIDATES[row.case],
                f"{row.at / 1e6:.0f} M",
                f"{row.seconds:.3g}",
                f"{row.peer_seconds:.3g}",
                str(row.times),
                row.against.removeprefix("as fast as "),
                f"{row.gbps:.1f}",
                f"{row.ceiling_gbps:.1f}",
                _share(row),
                f"{row.processors:.1f}",
            )
            for row in rows
        ),
    ]


def _candidates(row: Row) -> str:
    return f"{row.method}, {_CANDIDATES[row.case]}"


def _by_candidates(row: Row) -> tuple[int, int]:
    return figures.order(row.method), list(_CANDIDATES).index(row.case)


def _of_adapters(rows: Sequence[Row]) -> list[Sequence[str]]:
    return [
        ("", "", "parameters", "seconds", "peer", "its", "times as fast", "MB anonymous", "its", "ulp", "its"),
        *(
            (
                row.op,
                row.method,
                row.case,
                f"{row.seconds:.3g}",
                row.peer,
                "" if row.peer_seconds is None else f"{row.peer_seconds:.3g}",
                str(row.times or ""),
                f"{row.anonymous_mb:,.0f}",
                "" if row.peer_anonymous_mb is None else f"{row.peer_anonymous_mb:,.0f}",
                _ulp(row.error_ulp),
                _ulp(row.peer_error_ulp),
            )
            for row in rows
        ),
    ]


def _beside_peft(rows: Sequence[Row]) -> Any:
    """Those that have a peer; of both countings that which favours it."""
    beside = [row for row in rows if row.peer and not row.method.endswith(host_marks.WHOLE)]
    return figures.seconds(beside, [f"{row.op}, {row.method}" for row in beside])


def _accuracy(rows: Sequence[Row]) -> list[Sequence[str]]:
    return [
        ("where", "method", "tool", "seconds", "ulp"),
        *((*point[:3], f"{point.seconds:.4g}", f"{point.error_ulp:.3g}") for point in _points(rows)),
    ]


def _points(rows: Sequence[Row]) -> list[figures.Point]:
    """Of each row ours, once per method and place, and the peer's."""
    points: dict[tuple[str, ...], figures.Point] = {}
    for row in rows:
        where = "in memory" if row.op == "peer" else "disk to disk"
        for tool, seconds, error in (
            ("fastmerge", row.seconds, row.error_ulp),
            (row.peer, row.peer_seconds, row.peer_error_ulp),
        ):
            if error:
                point = figures.Point(where, row.method, tool, seconds, error)
                points.setdefault(point[:3], point)
    return list(points.values())


def _ulp(error: float | None) -> str:
    return "" if error is None else f"{error:.3g}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    headings, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rest))


# --- what the figures depend on ---


def _machine(row: Row) -> str:
    return f"{row.cpu} ({row.machine}), {row.isa}, {row.threads:g} threads, {row.dtype}"


def _measured(rows: Sequence[Row]) -> str:
    """When, at which revision and where; several where the newest rows are of several runs."""
    days, revisions, machines, versions = (
        "; ".join(dict.fromkeys(told))
        for told in (
            sorted(row.date[:10] for row in rows),
            (row.revision for row in rows),
            map(_machine, rows),
            (row.versions for row in rows),
        )
    )
    return f"Measured {days} at revision {revisions} on {machines}; {versions}."


if __name__ == "__main__":
    arguments = [Path(each) for each in sys.argv[1:]]
    main(*(arguments + [_HERE / "history.csv", _HERE / "page"][len(arguments) :]))
