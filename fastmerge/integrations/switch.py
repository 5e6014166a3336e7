"""Attributes of another package replaced all at once, and put back as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import Any

from ..errors import BackendError

#: The dictionary of a module or an object, a name in it, and what belongs there.
Attribute = tuple[dict[str, Any], str, Any]


@dataclass(slots=True)
class Tally:
    """The calls since `install`: how many fastmerge computed, by method, and how many it left, by the reason."""

    computed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} ({reason})" for reason, count in self.left.most_common())
        return f"{self.computed.total()} computed by fastmerge, {f'left: {reasons}' if reasons else 'none left'}"


class Switch:
    """One integration: on between `install` and `uninstall`, off before and after."""

    def __init__(
        self, package: str, versions: tuple[str, ...], attributes: Callable[[Tally], Iterable[Attribute]]
    ) -> None:
        self._package = package
        self._versions = versions
        self._attributes = attributes
        self._tally: Tally | None = None
        self._undo = ExitStack()
        self._lock = Lock()

    def install(self) -> Tally:
        """All attributes, or an error and none; where it is on already, nothing happens."""
        with self._lock:
            if self._tally is None:
                self._check()
                tally = Tally()
                with ExitStack() as undo:
                    for namespace, name, value in self._attributes(tally):
                        undo.callback(_put, namespace, name, namespace.get(name, _ABSENT))
                        namespace[name] = value
                    self._undo = undo.pop_all()
                self._tally = tally
            return self._tally

    def uninstall(self) -> None:
        """Every attribute as it was; where it is off already, nothing happens."""
        with self._lock:
            self._tally = None
            self._undo.close()

    @contextmanager
    def accelerated(self) -> Iterator[Tally]:
        """On within the block, and then as it was before."""
        was_on = self._tally is not None
        tally = self.install()
        try:
            yield tally
        finally:
            if not was_on:
                self.uninstall()

    def _check(self) -> None:
        known = " or ".join(self._versions)
        remedy = f"pip install {self._package}=={self._versions[-1]}"
        try:
            found = version(self._package)
        except PackageNotFoundError:
            raise BackendError(f"{self._package} is not installed: {remedy}") from None
        if found not in self._versions:
            raise BackendError(
                f"fastmerge accelerates {self._package} {known}, and this is {found}: {remedy}, or run it as it is"
            )


_ABSENT = object()


def _put(namespace: dict[str, Any], name: str, value: Any) -> None:
    if value is _ABSENT:
        del namespace[name]
    else:
        namespace[name] = value
