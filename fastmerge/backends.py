"""Which provider runs which op: an ordered list per op, a probe for each provider, and a choice that fails loudly."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError
from .sweep import Cut, Found, Inputs, Run, Sweep, Target

OPS = ("gram", "norms", "threshold", "merge")

#: Providers by the name that `--backend` takes: the module, and the remedy where it is out.
PROVIDERS = {
    "cpu": ("native", "reinstall fastmerge with a C++17 compiler at hand"),
    "torch": ("reference", "pip install 'fastmerge[torch]'"),
    "triton": ("kernels.provider", "pip install 'fastmerge[gpu]'"),
}
#: What `auto` tries, in order of preference; whether a GPU pays for a merge from disk is not yet measured.
AUTO = ("cpu", "torch")


class Provider(Protocol):
    """A module that implements the ops; what they compute stands in `sweep`."""

    name: str
    DTYPES: frozenset[str]

    def gram(self, tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]: ...
    def norms(self, tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]: ...
    def threshold(
        self, groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run
    ) -> list[tuple[Cut, ...]]: ...
    def merge(
        self,
        tensors: Sequence[Inputs],
        sweeps: Sequence[Sequence[Sweep]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> list[Found]: ...


class Standing(NamedTuple):
    """How a provider stands on this machine: the ops it runs, and why it is out where it is."""

    provider: str
    ops: tuple[str, ...]
    reason: str


def provider(name: str) -> Provider:
    """The provider of this name.

    Raises:
        BackendError: it cannot run here, or there is none of that name.
    """
    if name not in PROVIDERS:
        raise BackendError(f"there is no backend {name!r}; there are auto, {', '.join(PROVIDERS)}")
    if reason := why_not(name):
        raise BackendError(f"backend {name} cannot run: {reason}")
    module: Provider = importlib.import_module(f".{PROVIDERS[name][0]}", __package__)
    return module


def choose(wanted: str, dtypes: Iterable[str]) -> Provider:
    """The first provider that takes these dtypes, or the one asked for by name.

    Raises:
        BackendError: none does, or the one asked for does not.
    """
    needed = frozenset(dtypes)
    reasons = []
    for name in AUTO if wanted == "auto" else [wanted]:
        if wanted == "auto" and (reason := why_not(name)):
            reasons.append(f"{name} is out: {reason}")
            continue
        each = provider(name)  # imports torch for the reference, so only where the ones before it do not do
        if needed <= each.DTYPES:
            return each
        reasons.append(f"{name} takes {', '.join(sorted(each.DTYPES))}")
    raise BackendError(f"no backend merges {' with '.join(sorted(needed))} here ({'; '.join(reasons)})")


def why_not(name: str) -> str:
    """Why a provider cannot run here; empty where it can. Only for triton this imports torch."""
    module, remedy = PROVIDERS[name]
    if name == "torch":
        return "" if find_spec("torch") else f"torch is not installed ({remedy})"
    try:
        imported = importlib.import_module("._core" if name == "cpu" else f".{module}", __package__)
    except ImportError as error:
        what = "the compiled core is" if name == "cpu" else "triton or torch is"
        return f"{what} not there: {error} ({remedy})"
    return imported.why_not() if name == "triton" else ""


def standings() -> list[Standing]:
    """Every provider, those of `auto` first."""
    return [Standing(name, () if why_not(name) else OPS, why_not(name)) for name in PROVIDERS]


def threads() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def instruction_sets() -> list[tuple[str, str, bool]]:
    """The compiled core's instruction sets, best first: name, why it is out (or empty), whether it is the one."""
    if why_not("cpu"):
        return []
    from . import native

    return [(isa, native.why_not(isa), isa == native.isa()) for isa in native.ISAS]
