"""Providers of other packages, found by their entry points: what one defines, called so that its failures are told.

An entry point of the group `fastmerge.providers` has the name of a backend, and names a module or object that defines
some of the ops. docs/write-a-provider.md is written for its authors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np

from . import memory
from .errors import BackendError, FastmergeError
from .plugins import Plugin, found, said
from .sweep import SWEPT, Target

GROUP = "fastmerge.providers"
_MEASURES, _MERGES, _GPUS = ("gram", "norms", "threshold"), ("merge", "merge_ranked"), ("devices", "device")
_SIZES = SWEPT | {"F64": 8}


def listed() -> tuple[Plugin, ...]:
    """The entry points, none of them loaded."""
    return found(GROUP, BackendError)


@lru_cache
def load(name: str) -> Installed | str:
    """The provider of this name, or why it cannot be used."""
    own = [plugin for plugin in listed() if plugin.name == name]
    if len(own) > 1:
        packages = " and ".join(plugin.package for plugin in own)
        return f"the backend {name} is added by {packages}; uninstall one of them"
    try:
        return Installed(own[0])
    except FastmergeError as error:
        return str(error)


class Installed:
    """A provider as `backends` calls it, with the ops that it has. Outputs that lie in a file are merged in memory, a
    tensor at a time, and then written."""

    def __init__(self, plugin: Plugin) -> None:
        made = plugin.load()
        self.name = plugin.name
        self.DEVICE: str = getattr(made, "DEVICE", "cpu")
        self.DTYPES = frozenset(getattr(made, "DTYPES", SWEPT))
        self._plugin, self._made = plugin, made
        ops = {op: partial(self._answer, op) for op in _MEASURES if hasattr(made, op)}
        ops |= {op: partial(self._merge, op) for op in _MERGES if hasattr(made, op)}
        if not ops:
            raise plugin.fault(f"defines none of {', '.join((*_MEASURES, *_MERGES))}")
        if self.DEVICE == "gpu" and (absent := [name for name in _GPUS if not hasattr(made, name)]):
            raise plugin.fault(f"works on a GPU and has no {absent[0]}")
        if self.DEVICE not in ("cpu", "gpu"):
            raise plugin.fault(f'has the DEVICE {self.DEVICE!r}, which is neither "cpu" nor "gpu"')
        vars(self).update(ops)

    def why_not(self) -> str:
        """Why it cannot run here; empty where it can."""
        try:
            return str(self._call("why_not")) if hasattr(self._made, "why_not") else ""
        except FastmergeError as error:
            return str(error)

    def devices(self) -> int:
        return int(self._call("devices"))

    def device(self, number: int) -> Any:
        return self._call("device", number)

    def _merge(self, op: str, tensors: Sequence[Any], *rest: Any) -> Any:
        *settings, targets, run = rest
        if all(target.file < 0 for each in targets for target in each):
            return self._answer(op, tensors, *rest)
        answers = [self._to_files(op, *each, run) for each in zip(tensors, *settings, targets, strict=True)]
        if op == "merge":
            return [found for (found,) in answers]
        return [cuts for (cuts,), _ in answers], [found for _, (found,) in answers]

    def _to_files(self, op: str, inputs: Any, *rest: Any) -> Any:
        *settings, targets, run = rest
        outputs = [np.empty(inputs.elements * _SIZES[target.dtype], np.uint8) for target in targets]
        places = [Target(target.dtype, output.ctypes.data) for target, output in zip(targets, outputs, strict=True)]
        answer = self._answer(op, [inputs], *([each] for each in settings), [places], run)
        for target, output in zip(targets, outputs, strict=True):
            memory.write(output.data, target.offset, target.file)
        return answer

    def _answer(self, op: str, tensors: Sequence[Any], *rest: Any) -> Any:
        """What an op returns: of each tensor something."""
        answer = self._call(op, tensors, *rest)
        for part in answer if op == "merge_ranked" and isinstance(answer, tuple) else (answer,):
            if not isinstance(part, list | tuple) or len(part) != len(tensors):
                raise self._plugin.fault(f"returns of {op} no list with an item for each tensor")
        return answer

    def _call(self, name: str, *arguments: Any) -> Any:
        return self._plugin.call(name, self._unless_refused, getattr(self._made, name), *arguments)

    def _unless_refused(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except NotImplementedError as error:
            raise BackendError(f"backend {self.name} refuses: {said(error)}; ask for auto, or another") from error
