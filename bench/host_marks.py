"""The marks that a processor's figures are held against, by the bench that measures them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from marks import Mark

TINY_MICROSECONDS = 2  # what a tiny tensor may cost
_EVERY = ("linear", "task_arithmetic", "slerp", "passthrough", "dare_linear", "dare_ties", "ties")
_DARE = ("dare_linear", "dare_ties")


def standing(rows: Sequence[Any]) -> Iterator[list[str]]:
    """Per mark: its goal, the worst figure and where that was, of how many, and whether the mark is met."""
    rows = [*rows, *_beside_task_arithmetic(rows), *_beside_what_is_allowed(rows)]
    for command, marks in MARKS.items():
        for mark in marks:
            goal = f"{'at most' if mark.at_most else 'at least'} {mark.goal:g}"
            figures = [(figure, row) for row in rows if (figure := mark.of(row)) is not None]
            if not figures:
                yield [mark.name, goal, "", "", "0", f"not measured: `{command}`"]
                continue
            figure, row = (max if mark.at_most else min)(figures, key=lambda each: each[0])
            met = figure <= mark.goal if mark.at_most else figure >= mark.goal
            where = ", ".join(filter(None, (row.method, row.case, row.peer if row.op == "peer" else "")))
            yield [mark.name, goal, f"{figure:.3g}", where, f"{len(figures)}", "met" if met else "**missed**"]


def parameters(row: Any) -> float:
    """Of a model on disk, whose case is their number: "1093 M"."""
    number, _, unit = row.case.partition(" ")
    return float(number) * 1e6 if unit == "M" else 0


def _of(
    op: str,
    methods: Sequence[str],
    figure: Callable[[Any], float | None],
    where: Callable[[Any], bool] = lambda row: True,
) -> Callable[[Any], float | None]:
    return lambda row: figure(row) if row.op == op and row.method in methods and where(row) else None


def _percent(row: Any) -> float | None:
    return 100 * row.share.median if row.share else None


def _floors(row: Any) -> float | None:
    """How many times the floor's seconds a merge takes."""
    return 1 / row.share.median if row.share else None


def _times(row: Any) -> float | None:
    return row.times.median if row.times else None


def _against(peer: str) -> Callable[[Any], bool]:
    return lambda row: row.peer.startswith(peer) and _large(row)


def _large(row: Any) -> bool:
    """Tensors of 1 to 60 M elements."""
    return row.case != "norm"


def _billion(row: Any) -> bool:
    return parameters(row) >= 1e9


def _beside_task_arithmetic(rows: Sequence[Any]) -> Iterator[Any]:
    """Of dare, the seconds of task_arithmetic: both are paired with one loop over as many bytes."""
    swept = {(row.run, row.case, row.method): row for row in rows if row.op == "merge" and row.share}
    for (run, case, method), row in swept.items():
        if method in _DARE and (plain := swept.get((run, case, "task_arithmetic"))):
            yield row._replace(op="dare", times=row.share._replace(median=plain.share.median / row.share.median))


def _beside_what_is_allowed(rows: Sequence[Any]) -> Iterator[Any]:
    """Of many outputs on disk, what they may cost: both are paired with one output."""
    many = {(row.run, row.method, row.at): row for row in rows if row.op == "scale" and row.case == "settings"}
    for (run, method, at), row in many.items():
        if allowed := many.get((run, f"{method}, at most", at)):
            yield row._replace(op="outputs", times=row.times._replace(median=row.times.median / allowed.times.median))


MARKS = {
    "make bench OP=merge,whole,gram": (
        Mark(
            "linear, task_arithmetic, slerp, passthrough: sweep, % of the ceiling",
            90,
            False,
            _of("merge", _EVERY[:4], _percent, _large),
        ),
        Mark("gram of 2 and 4 tensors: % of the ceiling", 90, False, _of("gram", ("2", "4"), _percent, _large)),
        Mark("ties, whole: times its sweep", 1.5, True, _of("whole", ("ties",), _times, _large)),
        Mark("dare: times the sweep of task_arithmetic", 2.5, True, _of("dare", _DARE, _times, _large)),
    ),
    "make bench OP=disk PARAMS=1.1e9": (
        Mark(
            "1 B parameters, linear, task_arithmetic, slerp, dare: times the floor",
            1.1,
            True,
            _of("disk", (*_EVERY[:3], *_DARE), _floors, _billion),
        ),
        Mark("1 B parameters, ties: times the floor", 1.3, True, _of("disk", ("ties",), _floors, _billion)),
        Mark("1 B parameters: times as fast as `cat` and `cp`", 1, False, _of("disk", _EVERY, _times, _billion)),
        Mark(
            "anonymous memory of any merge beside 8 MB a thread, MB",
            200,
            True,
            lambda row: None if row.anonymous_mb is None else row.anonymous_mb - 8 * row.threads,
        ),
        Mark(
            "a merge of the size of a LoRA (50 MB), seconds",
            0.5,
            True,
            lambda row: row.seconds if row.op == "disk" and row.case == "lora" else None,
        ),
    ),
    "make bench OP=mergekit PARAMS=1.1e9": tuple(
        Mark(f"disk to disk, {name}: times as fast as mergekit", goal, False, _of("mergekit", methods, _times))
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
            )
            for name, methods, goal in (
                ("linear and slerp", ("linear", "slerp"), 20),
                ("dare", _DARE, 40),
                ("ties", ("ties",), 200),
            )
        ),
        Mark("ties: times as fast as eager torch", 10, False, _of("peer", ("ties",), _times, _against("eager torch"))),
        Mark(
            "ties: times as fast as torch.compile", 3, False, _of("peer", ("ties",), _times, _against("torch.compile"))
        ),
        Mark("every method: times as fast as any of the three", 1, False, _of("peer", _EVERY, _times)),
    ),
    "make bench OP=scale": (
        Mark(
            "8 outputs of one read: of twice the reading of one and the writing of all",
            1,
            True,
            lambda row: row.times.median if row.op == "outputs" and row.at == 8 else None,
        ),
        Mark(
            "a tiny tensor's own cost, microseconds",
            TINY_MICROSECONDS,
            True,
            lambda row: 1e6 * row.seconds if row.op == "scale" and row.case == "tensors" else None,
        ),
    ),
}
