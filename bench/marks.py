"""The marks that a GPU's figures are held against, and the worst figure of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

PROVIDERS = ("cuda", "triton")


class Mark(NamedTuple):
    """One line of the table; `of` gives a row's figure, or None where the mark isn't about it."""

    name: str
    goal: float
    at_most: bool
    of: Callable[[Any], float | None]


def standing(rows: Sequence[Any]) -> Iterator[list[str]]:
    """Per mark and provider: its goal, the worst figure, where that was, and whether it is met."""
    for mark in MARKS:
        for provider in PROVIDERS:
            figures = [
                (figure, row) for row in rows if row.provider == provider and (figure := mark.of(row)) is not None
            ]
            goal = f"{'<=' if mark.at_most else '>='} {mark.goal:g}"
            if not figures:
                yield [mark.name, provider, goal, "", "", "not measured"]
                continue
            figure, row = (max if mark.at_most else min)(figures, key=lambda each: each[0])
            met = figure <= mark.goal if mark.at_most else figure >= mark.goal
            yield [mark.name, provider, goal, f"{figure:.3g}", f"{row.method} {row.case}", "met" if met else "missed"]


def _share(ops: tuple[str, ...], methods: tuple[str, ...] = ()) -> Callable[[Any], float | None]:
    """Of the ceiling by the GPU's own work, where the profiler saw it: the host's part is not the kernel's."""

    def of(row: Any) -> float | None:
        if row.op not in ops or row.share is None or (methods and row.method not in methods):
            return None
        return float(row.share.median if row.kernel_share is None else row.kernel_share)

    return of


def _times(
    op: str, methods: tuple[str, ...] = (), against: str = "", cases: Callable[[str], bool] = lambda _: True
) -> Callable[[Any], float | None]:
    def of(row: Any) -> float | None:
        about = row.op == op and row.times and (not methods or row.method in methods) and cases(row.case)
        return float(row.times.median) if about and row.against.startswith(against) else None

    return of


_REST = ("linear", "task_arithmetic", "dare_linear", "dare_ties", "slerp")

MARKS = (
    Mark("merge, share of copy", 0.92, False, _share(("merge",), ("linear", "task_arithmetic", "ties", "slerp"))),
    Mark("dare, share of copy", 0.55, False, _share(("merge",), ("dare_linear", "dare_ties"))),
    Mark("gram and norms, share of read", 0.90, False, _share(("gram", "norms"))),
    Mark("ties whole over its sweep", 1.3, True, _times("whole", ("ties",), cases=lambda case: case != "ascending")),
    Mark("ties whole, a misled sample", 2.1, True, _times("whole", ("ties",), cases=lambda case: case == "ascending")),
    Mark("1,000 tensors, launches", 3, True, lambda row: row.launches if row.op == "many" else None),
    Mark("1,000 tensors over one", 2, True, _times("many")),
    Mark("ties against eager", 20, False, _times("peer", ("ties",), "eager")),
    Mark("ties against torch.compile", 8, False, _times("peer", ("ties",), "torch.compile")),
    Mark("ties against mergekit", 30, False, _times("peer", ("ties",), "mergekit")),
    Mark("the rest against eager", 5, False, _times("peer", _REST, "eager")),
    Mark("the rest against torch.compile", 1.5, False, _times("peer", _REST, "torch.compile")),
    Mark("the rest against mergekit", 5, False, _times("peer", _REST, "mergekit")),
    Mark("disk to disk, of the slower floor", 0.85, False, _share(("disk",))),
)
