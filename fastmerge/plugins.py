"""What other packages add by entry points: found when asked for, each loaded alone, its failures in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import FastmergeError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


class Plugin(NamedTuple):
    """An entry point of an installed package; its text says which."""

    name: str
    package: str  # and its version
    point: EntryPoint
    error: type[FastmergeError]  # the kind that its failures are

    def __str__(self) -> str:
        return f"the entry point {self.name!r} of {self.package}"

    def load(self) -> Any:
        """What it names; raises the error where that cannot be imported."""
        return self.call("loading", self.point.load)

    def call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of the package; raises the error where it fails."""
        try:
            return function(*arguments)
        except (FastmergeError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            raise self.fault(f"failed in {what}, with {said(error)}") from error

    def fault(self, fault: str) -> FastmergeError:
        """The error of something that is wrong with it."""
        return self.error(f"{self} {fault}; update or uninstall that package")


@lru_cache
def found(group: str, error: type[FastmergeError]) -> tuple[Plugin, ...]:
    """The entry points of a group by their names, none of them loaded; looked up once in a process."""
    from importlib.metadata import entry_points  # here: few merges need it, and it is slow to import

    try:
        points = entry_points(group=group)
    except Exception as fault:
        raise error(f"the entry points of the installed packages cannot be read: {said(fault)}") from fault
    plugins = [Plugin(point.name, _package(point), point, error) for point in points]
    return tuple(sorted(plugins, key=lambda plugin: (plugin.name, plugin.package)))


def said(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":").rstrip(".")


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "a package without a name"
