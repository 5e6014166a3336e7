"""Which provider runs which op: an ordered list per device and op, probes, and a choice that fails loudly.

The providers of other packages come after those of the table: a package that is installed changes no merge that ran
before, and is neither looked for nor imported until it is asked for by name, or nothing of the table will do.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from . import installed
from .errors import BackendError
from .sweep import Cut, Found, Inputs, Run, Sweep, Target

OPS = ("gram", "norms", "threshold", "merge")

#: Providers by the name that `--backend` takes: the module, what may be missing, and the remedy where it is.
PROVIDERS = {
    "cpu": ("native", "the compiled core", "reinstall fastmerge with a C++17 compiler at hand"),
    "torch": ("reference", "torch", "pip install 'fastmerge[torch]'"),
    "cuda": ("cuda", "the CUDA module", "reinstall fastmerge where CUDA's compiler nvcc is"),
    "triton": ("kernels.provider", "triton or torch", "pip install 'fastmerge[gpu]'"),
}
#: What `auto` tries for each op, in order of preference, by the device in whose memory the tensors are.
ORDER = {
    "cpu": {
        "gram": ("cpu", "torch"),
        "norms": ("cpu", "torch"),
        "threshold": ("cpu", "torch"),
        "merge": ("cpu", "torch"),
    },
    "gpu": {
        "gram": ("cuda", "triton"),
        "norms": ("cuda", "triton"),
        "threshold": ("cuda", "triton"),
        "merge": ("cuda", "triton"),
    },
}
_TAKEN = frozenset(("auto", *PROVIDERS))
#: One of these is there where a driver of NVIDIA or AMD is, or that of WSL.
_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

#: By provider, the ops that it had work for.
Worked = dict[str, set[str]]


class Provider(Protocol):
    """A module that implements the ops, or some of them, on one kind of device; what they compute stands in `sweep`."""

    name: str
    DEVICE: str
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


class Device(Protocol):
    """A GPU's memory and streams; addresses and handles are integers, and any thread may call."""

    name: str
    is_cuda: bool  # its addresses are CUDA's, as other libraries know them

    def free_bytes(self) -> int: ...
    def allocate(self, nbytes: int) -> int:
        """Device memory at a multiple of 256; MemoryError where there is not enough."""
        ...

    def release(self, address: int) -> None: ...
    def pin(self, nbytes: int) -> int:
        """Page-locked memory of the host; MemoryError where there is not enough."""
        ...

    def unpin(self, address: int) -> None: ...
    def stream(self) -> int: ...
    def close(self, stream: int) -> None: ...
    def upload(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Queued on the stream, from pinned memory."""
        ...

    def download(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Queued on the stream, to pinned memory."""
        ...

    def synchronize(self, stream: int) -> None: ...


class Ops:
    """The ops on one device, each by the provider chosen for it; what is given no tensors is not asked."""

    def __init__(self, wanted: str, dtypes: Iterable[str], device: str, worked: Worked) -> None:
        needed = frozenset(dtypes)
        chosen = {op: _choice(wanted, needed, op, device) for op in OPS}
        self._by = {op: each for op, each in chosen.items() if not isinstance(each, BackendError)}
        self._missing = {op: each for op, each in chosen.items() if isinstance(each, BackendError)}
        if "merge" in self._missing:
            raise self._missing["merge"]
        self._worked = worked
        self.names = tuple(dict.fromkeys(each.name for each in self._by.values()))
        self.dtypes = frozenset.intersection(*(each.DTYPES for each in self._by.values()))
        #: Whether tensors can be selected and swept in one go.
        self.ranks = self._by.get("threshold") is self._by["merge"] and hasattr(self._by["merge"], "merge_ranked")

    def gram(self, tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
        return self._working("gram").gram(tensors, run) if tensors else []

    def norms(self, tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
        return self._working("norms").norms(tensors, sweeps, run) if tensors else []

    def threshold(
        self, groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run
    ) -> list[tuple[Cut, ...]]:
        return self._working("threshold").threshold(groups, ranks, run) if groups else []

    def merge(
        self,
        tensors: Sequence[Inputs],
        sweeps: Sequence[Sequence[Sweep]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> list[Found]:
        return self._working("merge").merge(tensors, sweeps, targets, run) if tensors else []

    def merge_ranked(
        self,
        tensors: Sequence[Inputs],
        sweeps: Sequence[Sequence[Sweep]],
        ranks: Sequence[Sequence[int]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> list[Found]:
        """`threshold` and then `merge` with the cuts that it found, where the provider of both `ranks`."""
        if not tensors:
            return []
        self._working("threshold")
        provider: Any = self._working("merge")
        _, found = provider.merge_ranked(tensors, sweeps, ranks, targets, run)
        return list(found)

    def compute(
        self,
        tensors: Sequence[Inputs],
        functions: Sequence[Sequence[Callable[..., Any]]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> list[Found]:
        """`merge` by functions of whole torch tensors, where the provider is torch."""
        provider: Any = self._working("merge")
        return list(provider.compute(tensors, functions, targets, run))

    def scratch_bytes(self, tensors: int, elements: int, models: int, settings: int, ranks: int, run: Run) -> int:
        """What an op takes at most beside its tensors, on the device and pinned; 0 where the provider does not say."""
        provider: Any = self._by["merge"]
        if not hasattr(provider, "scratch_bytes"):
            return 0
        return int(provider.scratch_bytes(tensors, elements, models, settings, ranks, run))

    def release_scratch(self, run: Run) -> None:
        """Gives back what the ops have kept of that."""
        provider: Any = self._by["merge"]
        if hasattr(provider, "release_scratch"):
            provider.release_scratch(run)

    def devices(self) -> list[Device]:
        return _devices(self._by["merge"])

    def _working(self, op: str) -> Provider:
        if op in self._missing:
            raise self._missing[op]
        provider = self._by[op]
        self._worked.setdefault(provider.name, set()).add(op)
        return provider


class Standing(NamedTuple):
    """How a provider stands on this machine: per op "auto" (it is the one that `auto` takes on its device), "can" or
    "-"; and why it is out where it is."""

    provider: str
    device: str
    ops: tuple[str, ...]
    reason: str


def provider(name: str) -> Provider:
    """The provider of this name.

    Raises:
        BackendError: it cannot run here, or there is none of that name.
    """
    if name not in PROVIDERS and name not in added():
        raise BackendError(f"there is no backend {name!r}; there are {', '.join(names())}")
    if reason := why_not(name):
        raise BackendError(f"backend {name} cannot run: {reason}")
    built_in = name in PROVIDERS
    found: Any = importlib.import_module(f".{PROVIDERS[name][0]}", __package__) if built_in else installed.load(name)
    return cast(Provider, found)


def choose(wanted: str, dtypes: Iterable[str], *, op: str = "merge", device: str = "cpu") -> Provider:
    """The first provider of a device that takes these dtypes, or the one asked for by name.

    Raises:
        BackendError: none does, or the one asked for does not.
    """
    needed = frozenset(dtypes)
    reasons = []
    for name in _order(device, op) if wanted == "auto" else [wanted]:
        if wanted == "auto" and (reason := why_not(name)):
            reasons.append(f"{name} is out: {reason}")
            continue
        each = provider(name)  # imports torch for the reference, so only where the ones before it do not do
        if not hasattr(each, op):
            if wanted != "auto":
                raise BackendError(f"backend {name} has no {op}, which this merge needs: ask for auto")
            reasons.append(f"{name} has no {op}")
            continue
        if needed <= each.DTYPES:
            return each
        reasons.append(f"{name} takes {', '.join(sorted(each.DTYPES))}")
    what = f"merges {' with '.join(sorted(needed))}" if needed else f"runs on a {device.upper()}"
    raise BackendError(f"no backend {what} here ({'; '.join(reasons)})")


def _choice(wanted: str, dtypes: Iterable[str], op: str, device: str) -> Provider | BackendError:
    """What `choose` makes of it, or its error, for those who may not need the op."""
    try:
        return choose(wanted, dtypes, op=op, device=device)
    except BackendError as error:
        return error


def names() -> list[str]:
    """What may be asked for by name."""
    return ["auto", *PROVIDERS, *added()]


def added() -> list[str]:
    """The providers of other packages, which are not loaded for it."""
    return [name for name in dict.fromkeys(each.name for each in installed.listed()) if name not in _TAKEN]


def device_of(name: str) -> str:
    """The kind of device that a provider works on; "cpu" also for `auto`, which begins there."""
    if name not in _TAKEN and name in added():
        return getattr(installed.load(name), "DEVICE", "cpu")
    return next((device for device, ops in ORDER.items() if any(name in order for order in ops.values())), "cpu")


def why_not(name: str) -> str:
    """Why a provider cannot run here; empty where it can. Only for triton this imports torch."""
    if name not in PROVIDERS:
        return found if isinstance(found := installed.load(name), str) else found.why_not()
    module, what, remedy = PROVIDERS[name]
    if name == "torch":
        return "" if find_spec("torch") else f"torch is not installed ({remedy})"
    try:
        imported = importlib.import_module("._core" if name == "cpu" else f".{module}", __package__)
    except ImportError as error:
        absent = error.name == __package__ or isinstance(error, ModuleNotFoundError)
        return f"{what} is not there{'' if absent else f': {error}'} ({remedy})"
    return imported.why_not() if device_of(name) == "gpu" else ""


def standings() -> list[Standing]:
    """Every provider, in the order of PROVIDERS, and then those of other packages."""
    reasons = {name: why_not(name) for name in (*PROVIDERS, *added())}

    def can(name: str, op: str) -> bool:
        return not reasons[name] and (name in PROVIDERS or hasattr(installed.load(name), op))

    def standing(name: str, op: str) -> str:
        able = [each for each in _order(device_of(name), op) if can(each, op)]
        return "-" if name not in able else "auto" if name == able[0] else "can"

    def device(name: str) -> str:
        return "-" if name not in PROVIDERS and isinstance(installed.load(name), str) else device_of(name)

    return [
        *(
            Standing(name, device(name), tuple(standing(name, op) for op in OPS), reason)
            for name, reason in reasons.items()
        ),
        *(
            Standing(each.name, "-", ("-",) * len(OPS), str(each.fault("has a name that is fastmerge's own")))
            for each in installed.listed()
            if each.name in _TAKEN
        ),
    ]


def gpus() -> list[Device]:
    """The GPUs of the first provider that can run on one."""
    first = next((name for name in _order("gpu", "merge") if not why_not(name)), None)
    return _devices(provider(first)) if first else []


def _order(device: str, op: str) -> Iterator[str]:
    """What `auto` tries; other packages are looked for where nothing of the table will do."""
    yield from ORDER[device][op]
    yield from (name for name in added() if device_of(name) == device)


def _devices(provider: Any) -> list[Device]:
    return [provider.device(number) for number in range(provider.devices())]


def has_gpu_driver() -> bool:
    """Whether a look for a GPU is worth its while: it takes the driver's start, or an import of torch."""
    return any(map(os.path.exists, _DRIVERS))


def workers(wanted: int | None) -> int:
    """As many as are wanted, or one for each processor that this process may use."""
    if wanted is None:
        return threads()
    if not hasattr(wanted, "__index__") or wanted < 1:
        raise ValueError(f"threads is {wanted!r}, and must be a whole number from 1 on")
    return int(wanted)


def threads() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def isa() -> str | None:
    """The instruction set of the compiled core; None where that cannot run."""
    return next((name for name, _, runs in instruction_sets() if runs), None)


def instruction_sets() -> list[tuple[str, str, bool]]:
    """The compiled core's instruction sets, best first: name, why it is out (or empty), whether it is the one."""
    if why_not("cpu"):
        return []
    from . import native

    return [(isa, native.why_not(isa), isa == native.isa()) for isa in native.ISAS]
