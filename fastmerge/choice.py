"""Whether a merge from disk goes through a GPU: the measured rates of the CPU and of the bus, and the rule between."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from . import backends
from .errors import BackendError, FastmergeWarning
from .streaming import bus_rate

#: What a GPU takes before its first byte: the driver, pinned memory, kernels. Not yet measured on a card.
START_SECONDS = 1.0
#: Of work on the CPU before its rate counts.
TRIAL_SECONDS = 0.2


def faster(left: int, cpu: float, bus: float) -> str:
    """Where `left` bytes of inputs are merged sooner: on the CPU, or over the bus after the start of a GPU.

    The rates are in bytes per second. Files are read and written in either case, and a GPU sweeps faster than any bus.
    """
    return "gpu" if left / cpu > START_SECONDS + left / bus else "cpu"


@dataclass
class Choice:
    """Where a merge's jobs go, and why. With `auto` the CPU begins, and a GPU takes over where that pays."""

    backend: str
    worked: backends.Worked
    clock: Callable[[], float] = time.perf_counter
    gpu: backends.Ops | None = None  # which takes what is left
    devices: list[backends.Device] = field(default_factory=list)
    reason: str = ""
    considered: bool = False  # a GPU was looked for, at some cost
    _bytes: int = 0
    _seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.backend != "auto":
            self.reason = f"{self.backend}: asked for by name"
            if backends.device_of(self.backend) == "gpu":
                self._take(self.backend)
        elif backends.has_gpu_driver():
            self.reason = "cpu: done before a GPU would have begun"
        else:
            self.reason = "cpu: there is no GPU"
        if self.backend == "auto" and not backends.why_not("torch") and (reason := backends.why_not("cpu")):
            warnings.warn(f"torch computes, slowly: {reason}", FastmergeWarning, stacklevel=4)

    def after(self, nbytes: int, seconds: float, left: int) -> None:
        """The CPU has merged so many bytes of inputs in this time, and so many are left."""
        self._bytes += nbytes
        self._seconds += seconds
        if self.backend != "auto" or self.considered or self._seconds < TRIAL_SECONDS:
            return
        cpu = self._bytes / self._seconds
        if faster(left, cpu, math.inf) == "gpu" and backends.has_gpu_driver():
            self.considered = True
            self._weigh(left, cpu)

    def _weigh(self, left: int, cpu: float) -> None:
        try:
            gpu = backends.Ops("auto", (), "gpu", self.worked)
            devices = gpu.devices()
            bus = bus_rate(devices[0], self.clock)
        except MemoryError:
            self.reason = "cpu: the memory of the GPU is full"
            return
        except (BackendError, RuntimeError) as error:  # a driver's, of a card that is busy or broken
            self.reason = f"cpu: {error}"
            return
        over = f"{bus / 1e9:.1f} GB/s over the bus of {devices[0].name}"
        rest = f"with {left / 1e9:.1f} GB left"
        if faster(left, cpu, bus) == "gpu":
            self.gpu, self.devices = gpu, devices
            self.reason = f"{gpu.names[-1]}: {over} against {cpu / 1e9:.1f} GB/s on the CPU, {rest}"
        else:
            self.reason = f"cpu: {cpu / 1e9:.1f} GB/s against {over}, {rest}"

    def _take(self, backend: str) -> None:
        self.gpu = backends.Ops(backend, (), "gpu", self.worked)
        self.devices = self.gpu.devices()
