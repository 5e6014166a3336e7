"""The figures of the page: small SVGs that read well on a light page and a dark one, and without colour vision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

# The colours of Okabe and Ito. Text stays text, which is small, can be searched, and differs where a figure does.
_TOOLS = {
    "fastmerge": "#0072B2",
    "eager torch": "#009E73",
    "torch.compile": "#CC79A7",
    "mergekit": "#E69F00",
    "PEFT": "#D55E00",
    "merging anew": "#8C8C8C",
}
_METHODS = {
    "linear": ("#0072B2", "o"),
    "task_arithmetic": ("#E69F00", "s"),
    "slerp": ("#56B4E9", "P"),
    "passthrough": ("#000000", "X"),
    "dare_linear": ("#CC79A7", "D"),
    "dare_ties": ("#D55E00", "v"),
    "ties": ("#009E73", "^"),
}
_OTHER = ("#8C8C8C", "*")
_VARIANTS = {
    "one by one": ("--", "full"),
    "at most": ("", "none"),
}  # style of the line, filling of its marks
_BARE, _INK = "#C8C8C8", "#333333"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastmerge",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}
_PLAIN = FuncFormatter(lambda value, _: f"{value:,.15g}")
_WIDTH, _BAR = 7.6, 0.26  # inches: of a figure, and of the height that a bar takes


class Point(NamedTuple):
    """A merge by a tool."""

    where: str
    method: str
    tool: str
    seconds: float
    error_ulp: float


def write(draw: Callable[[], Figure], path: Path) -> None:
    """The same bytes for the same figure, whatever the reader's own settings of matplotlib are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        draw().savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def tool(peer: str) -> str:
    """A peer without its version."""
    return next(name for name in _TOOLS if peer.startswith(name))


def times(ratio: float) -> str:
    return f"{_round(ratio)} x"


def _round(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"


def order(method: str) -> int:
    """The place of a method among all."""
    name, *_ = method.split(", ")
    return list(_METHODS).index(name) if name in _METHODS else len(_METHODS)


def shares(rows: Sequence[Any], names: Sequence[str]) -> Figure:
    """GB/s before the ceiling's own, a bar per row."""
    figure, axes = _bars(names)
    places = range(len(rows))
    axes.barh(places, [row.ceiling_gbps for row in rows], 0.76, color=_BARE, label="ceiling")
    axes.barh(places, [row.gbps for row in rows], 0.44, color=_TOOLS["fastmerge"], label="fastmerge")
    for place, row in zip(places, rows, strict=True):
        end = max(row.gbps, row.ceiling_gbps)
        axes.annotate(f"{row.share.median:.0%}", (end, place), (4, 0), textcoords="offset points", va="center")
    axes.set_xlabel("GB/s, each input and the output counted once; %: of the ceiling")
    _legend(figure, axes)
    return figure


def seconds(rows: Sequence[Any], names: Sequence[str], each: str = "") -> Figure:
    """Ours and a peer's seconds, with how many times as fast we are; `each`: what they are the seconds of."""
    figure, axes = _bars(names, 1.7)
    ours, theirs = [row.seconds for row in rows], [row.peer_seconds for row in rows]
    told = [
        f"{row.seconds:{'.1f' if row.seconds >= 1 else '.2g'}} s, {_round(row.times.median)} times as fast"
        for row in rows
    ]
    _two(axes, rows, (ours, told), (theirs, [f"{each:.3g} s" for each in theirs]))
    axes.set_xlabel(f"seconds{each}, log scale")
    _legend(figure, axes)
    return figure


def memory(rows: Sequence[Any]) -> Figure:
    """Ours and a peer's memory that is not a mapped file, at its peak."""
    figure, axes = _bars([row.method for row in rows], 1.7)
    ours, theirs = [row.anonymous_mb for row in rows], [row.peer_anonymous_mb for row in rows]
    _two(axes, rows, (ours, [f"{mb:,.0f} MB" for mb in ours]), (theirs, [f"{mb:,.0f} MB" for mb in theirs]))
    axes.set_xlabel("MB that are not mapped files, at the peak, log scale")
    _legend(figure, axes)
    return figure


def times_as_fast(rows: Sequence[Any]) -> Figure:
    """A bar per method and peer in memory, against 1: as fast as the peer."""
    methods = sorted({row.method for row in rows}, key=order)
    there = [name for name in _TOOLS if any(tool(row.peer) == name for row in rows)]
    height = 0.8 / len(there)
    figure, axes = _bars(methods, len(there))
    for number, name in enumerate(there):
        own = [row for row in rows if tool(row.peer) == name]
        places = [methods.index(row.method) + (number - (len(there) - 1) / 2) * height for row in own]
        ratios = [row.times.median for row in own]
        bars = axes.barh(places, ratios, height * 0.9, color=_TOOLS[name], label=name)
        axes.bar_label(bars, list(map(times, ratios)), padding=3, fontsize=8)
    _log(axes, [1, *(row.times.median for row in rows)])
    axes.axvline(1, color=_BARE, zorder=0)
    axes.set_xlabel("times as fast as the peer, log scale")
    _legend(figure, axes)
    return figure


def overheads(rows: Sequence[Any], names: Sequence[str], most: float) -> Figure:
    """Microseconds, a bar per row, and a line at what is allowed."""
    figure, axes = _bars(names)
    bars = axes.barh(range(len(rows)), [max(0, 1e6 * row.seconds) for row in rows], 0.6, color=_TOOLS["fastmerge"])
    axes.bar_label(bars, [f"{1e6 * row.seconds:.2f}" for row in rows], padding=3)
    axes.axvline(most, color=_BARE, zorder=0)
    axes.set_xlabel(f"microseconds a tensor; the mark is {most:g}")
    return figure


def curves(rows: Sequence[Any], x: str, values: dict[str, Callable[[Any], Any]]) -> Figure:
    """A panel per value, a line per method and variant of it; `x` and the keys of `values` label the axes."""
    figure = Figure((_WIDTH, 3), layout="constrained")
    lines: dict[str, list[Any]] = {}
    for row in rows:
        lines.setdefault(row.method, []).append(row)
    for axes, (label, value) in zip(figure.subplots(1, len(values)), values.items(), strict=True):
        places = set()
        for method, own in lines.items():
            points = sorted((row.at, value(row).median) for row in own if value(row) is not None)
            if points:
                axes.plot(*zip(*points, strict=True), **_drawn(method))
                places |= {at for at, _ in points}
        if max(places) > 64:
            axes.set_xscale("log")
        else:
            axes.set_xticks(sorted(places), [f"{place:g}" for place in sorted(places)])
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
        axes.set_xlabel(x)
        axes.set_ylabel(label)
        axes.grid(axis="y", color="#E6E6E6")
    methods = {method.split(", ")[0] for method in lines}
    variants = [each for each in _VARIANTS if any(method.endswith(each) for method in lines)]
    handles = [Line2D([], [], label=method, **_drawn(method)) for method in sorted(methods, key=order)]
    handles += [Line2D([], [], label=each, **_drawn(each) | {"color": _INK, "marker": "o"}) for each in variants]
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    return figure


def _drawn(method: str) -> dict[str, Any]:
    parts = method.split(", ")
    colour, marker = _METHODS.get(parts[0], _OTHER)
    line, fill = _VARIANTS.get(parts[-1], ("-", "full"))
    return {"color": colour, "marker": marker, "linestyle": line, "fillstyle": fill, "markersize": 5}


def accuracy(points: Sequence[Point]) -> Figure:
    """A colour is a tool, a shape a method."""
    figure = Figure((_WIDTH, 3.8), layout="constrained")
    places = list(dict.fromkeys(point.where for point in points))
    for axes, place in zip(figure.subplots(1, len(places), sharey=True, squeeze=False)[0], places, strict=True):
        for point in points:
            if point.where == place:
                colour, marker = _TOOLS[tool(point.tool)], _METHODS[point.method][1]
                axes.plot(point.seconds, point.error_ulp, marker, color=colour, markersize=7, alpha=0.85)
        axes.set(xscale="log", yscale="log", title=place, xlabel="seconds, log scale")
        axes.axhline(0.5, color=_INK, linewidth=0.8, linestyle=":")
        axes.yaxis.set_major_formatter(_PLAIN)
        axes.xaxis.set_major_formatter(_PLAIN)
    figure.axes[0].set_ylabel("largest error, ulp (0.5: a perfect rounding)")
    tools, methods = {tool(point.tool) for point in points}, {point.method for point in points}
    handles = [Line2D([], [], color=_TOOLS[name], linewidth=5, label=name) for name in _TOOLS if name in tools]
    handles += [
        Line2D([], [], color=_INK, marker=marker, linestyle="", label=method)
        for method, (_, marker) in _METHODS.items()
        if method in methods
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    return figure


# --- bars ---


def _bars(names: Sequence[str], each: float = 1) -> tuple[Figure, Axes]:
    """`each`: how many bars stand by a name."""
    figure = Figure((_WIDTH, 1 + _BAR * len(names) * each), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)  # for the numbers after the bars
    return figure, axes


def _two(
    axes: Axes,
    rows: Sequence[Any],
    ours: tuple[Sequence[float], Sequence[str]],
    theirs: tuple[Sequence[float], Sequence[str]],
) -> None:
    """Our bars above the peer's: values, and what is told at their ends."""
    for name, (values, told), place in (("fastmerge", ours, -0.2), (rows[0].peer, theirs, 0.2)):
        places = [number + place for number in range(len(rows))]
        bars = axes.barh(places, values, 0.36, color=_TOOLS[tool(name)], label=name)
        axes.bar_label(bars, told, padding=3, fontsize=8)
    _log(axes, [*ours[0], *theirs[0]])


def _log(axes: Axes, values: Sequence[float]) -> None:
    """From a little below the least value, with room for a label after the largest."""
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 1.6, max(values) * (max(values) / min(values)) ** 0.2)
    axes.xaxis.set_major_formatter(_PLAIN)
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))
