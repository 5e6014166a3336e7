"""The marks that a processor's figures are held against, by the bench that measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

TINY_MICROSECONDS = 2  # what a tiny tensor may cost
SIZES = ("mlp", "embedding", "attention", "8M", "4M", "4M-shifted", "1M")  # the cases of 1 to 60 M elements
_EVERY = ("linear", "task_arithmetic", "slerp", "passthrough", "dare_linear", "dare_ties", "ties")
_DARE = ("dare_linear", "dare_ties")
LORA = ("fuse", "combine", "extract")
WHOLE = ", whole process"  # after a method's name: the peer's imports and loading are counted, too
SVD = ("svd", "magnitude_prune_svd", "ties_svd", "dare_linear_svd")  # what of PEFT's types ends in its svd


class Figure(NamedTuple):
    """A number, and the quartiles around it where it is the median of several."""

    median: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


class Mark(NamedTuple):
    """One line of the table; `of` gives a row's figure, or None where the mark isn't about it."""

    name: str
    goal: float
    at_most: bool
    of: Callable[[Any], Figure | None]
    count: int = 0  # of the figures that it is about, where that is known


def standing(rows: Sequence[Any]) -> Iterator[list[str]]:
    """Per mark: its goal, the worst figure and where that was, of how many, and whether the mark is met.

    With the revision that the worst was measured at, where that is not the newest row's.
    """
    newest = max(rows, key=lambda row: row.run).revision
    rows = [*rows, *_beside_task_arithmetic(rows), *_beside_what_is_allowed(rows)]
    for command, marks in MARKS.items():
        for mark in marks:
            goal = f"{'at most' if mark.at_most else 'at least'} {mark.goal:g}"
            figures = [(figure, row) for row in rows if (figure := mark.of(row)) is not None]
            lacking = len(figures) < mark.count
            count = f"{len(figures)} of {mark.count}" if lacking else f"{len(figures)}"
            if not figures:
                yield [mark.name, goal, "", "", count, f"not measured: `{command}`"]
                continue
            figure, row = (max if mark.at_most else min)(figures, key=lambda each: each[0].median)
            met = figure.median <= mark.goal if mark.at_most else figure.median >= mark.goal
            peer, older = row.peer if row.op == "peer" else "", row.revision != newest and f"at {row.revision}"
            where = ", ".join(filter(None, (row.method, row.case, peer, older)))
            standing = ("met so far" if lacking else "met") if met else "**missed**"
            yield [mark.name, goal, str(figure), where, count, standing]


def parameters(row: Any) -> float:
    """Of a model on disk, whose case is their number: "1093 M"."""
    number, _, unit = row.case.partition(" ")
    return float(number) * 1e6 if unit == "M" else 0


def _of(
    op: str,
    methods: Sequence[str],
    figure: Callable[[Any], Figure | None],
    where: Callable[[Any], bool] = lambda row: True,
) -> Callable[[Any], Figure | None]:
    return lambda row: figure(row) if row.op == op and row.method in methods and where(row) else None


def percent(row: Any) -> Figure | None:
    """Of the ceiling."""
    return Figure(*(100 * each for each in row.share)) if row.share else None


def _floors(row: Any) -> Figure | None:
    """How many times the floor's seconds a merge takes."""
    return Figure(1 / row.share.median, 1 / row.share.high, 1 / row.share.low) if row.share else None


def _times(row: Any) -> Figure | None:
    return row.times


def _anonymous(row: Any) -> Figure | None:
    """MB beside 8 a thread."""
    return None if row.anonymous_mb is None else Figure(row.anonymous_mb - 8 * row.threads)


def _against(peer: str) -> Callable[[Any], bool]:
    return lambda row: row.peer.startswith(peer) and _large(row)


def _large(row: Any) -> bool:
    return row.case in SIZES


def _billion(row: Any) -> bool:
    return parameters(row) >= 1e9


def _beside_task_arithmetic(rows: Sequence[Any]) -> Iterator[Any]:
    """Of dare, the seconds of task_arithmetic: both are paired with one loop over as many bytes."""
    swept = {(row.run, row.case, row.method): row for row in rows if row.op == "merge" and row.share}
    for (run, case, method), row in swept.items():
        if method in _DARE and (plain := swept.get((run, case, "task_arithmetic"))):
            yield row._replace(op="dare", times=_over(plain.share, row.share))


def _beside_what_is_allowed(rows: Sequence[Any]) -> Iterator[Any]:
    """Of many outputs on disk, what they may cost: both are paired with one output."""
    many = {(row.run, row.method, row.at): row for row in rows if row.op == "scale" and row.case == "settings"}
    for (run, method, at), row in many.items():
        if allowed := many.get((run, f"{method}, at most", at)):
            yield row._replace(op="outputs", times=_over(row.times, allowed.times))


def _over(one: Figure, other: Figure) -> Figure:
    """Of two that were not paired: the quartiles as far apart as they can be."""
    return Figure(one.median / other.median, one.low / other.high, one.high / other.low)


MARKS = {
    "make bench OP=merge,whole,gram": (
        Mark(
            "linear, task_arithmetic, slerp, passthrough: sweep, % of the ceiling",
            90,
            False,
            _of("merge", _EVERY[:4], percent, _large),
            4 * len(SIZES),
        ),
        Mark(
            "gram of 2 and 4 tensors: % of the ceiling",
            90,
            False,
            _of("gram", ("2", "4"), percent, _large),
            2 * len(SIZES),
        ),
        Mark("ties, whole: times its sweep", 1.5, True, _of("whole", ("ties",), _times, _large), len(SIZES)),
        Mark("dare: times the sweep of task_arithmetic", 2.5, True, _of("dare", _DARE, _times, _large), 2 * len(SIZES)),
    ),
    "make bench OP=disk PARAMS=1.1e9": (
        Mark(
            "1 B parameters, linear, task_arithmetic, slerp, dare: times the floor",
            1.1,
            True,
            _of("disk", (*_EVERY[:3], *_DARE), _floors, _billion),
            5,
        ),
        Mark("1 B parameters, ties: times the floor", 1.3, True, _of("disk", ("ties",), _floors, _billion), 1),
        Mark("1 B parameters: times as fast as `cat` and `cp`", 1, False, _of("disk", _EVERY, _times, _billion), 7),
        Mark(
            "anonymous memory of any merge beside 8 MB a thread, MB",
            200,
            True,
            lambda row: None if row.op in LORA else _anonymous(row),
        ),
        Mark(
            "a merge of the size of a LoRA (50 MB), seconds",
            0.5,
            True,
            lambda row: Figure(row.seconds) if row.op == "disk" and row.case == "lora" else None,
            2,
        ),
    ),
    "make bench OP=mergekit PARAMS=1.1e9": tuple(
        Mark(
            f"disk to disk, {name}: times as fast as mergekit",
            goal,
            False,
            _of("mergekit", methods, _times),
            len(methods),
        )
        for name, methods, goal in (
            ("linear and slerp", ("linear", "slerp"), 8),
            ("dare", _DARE, 25),
            ("ties", ("ties",), 60),
        )
    ),
    "make bench OP=peer": (
        *(
            Mark(
                f"in memory, {name}: times as fast as mergekit",
                goal,
                False,
                _of("peer", methods, _times, _against("mergekit")),
                len(methods) * len(SIZES),
            )
            for name, methods, goal in (
                ("linear and slerp", ("linear", "slerp"), 20),
                ("dare", _DARE, 40),
                ("ties", ("ties",), 200),
            )
        ),
        *(
            Mark(
                f"ties: times as fast as {peer}",
                goal,
                False,
                _of("peer", ("ties",), _times, _against(peer)),
                len(SIZES),
            )
            for peer, goal in (("eager torch", 10), ("torch.compile", 3))
        ),
        Mark(
            "every method: times as fast as any of the three",
            1,
            False,
            _of("peer", _EVERY, _times),
            20 * (len(SIZES) + 1),  # mergekit has no work with passthrough
        ),
    ),
    "make bench OP=scale": (
        Mark(
            "8 outputs of one read: of twice the reading of one and the writing of all",
            1,
            True,
            lambda row: row.times if row.op == "outputs" and row.at == 8 else None,
            2,
        ),
        Mark(
            "a tiny tensor's own cost, microseconds",
            TINY_MICROSECONDS,
            True,
            lambda row: Figure(1e6 * row.seconds) if row.op == "scale" and row.case == "tensors" else None,
            10,
        ),
    ),
    "make bench OP=session": (
        Mark(
            "a session's candidate, 100 M parameters or more, ties: times as fast as a merge to disk and back",
            20,
            False,
            _of("session", ("ties",), _times, lambda row: row.at >= 1e8 and row.against.endswith("to disk and back")),
            3,
        ),
    ),
    "make bench OP=fuse,combine,extract": (
        *(
            Mark(
                f"lora {name}, a whole process: times as fast as PEFT's {peer}",
                goal,
                False,
                _of(op, tuple(f"{method}{variant}" for method in methods), _times),
                len(methods),
            )
            for op, name, methods, goal, peers in (
                ("fuse", "fuse", ("merge_and_unload",), 5, ("load, merge_and_unload and save", "whole process")),
                ("combine", "combine by svd", SVD, 20, ("add_weighted_adapter alone", "whole process")),
            )
            for variant, peer in zip(("", WHOLE), peers, strict=True)
        ),
        Mark(
            "lora fuse, combine, extract: anonymous memory beside 8 MB a thread, MB",
            200,
            True,
            lambda row: _anonymous(row) if row.op in LORA and not row.method.endswith(WHOLE) else None,
            7,
        ),
    ),
}
