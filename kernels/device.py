"""A GPU's memory and streams through torch, as addresses and handles; in Triton's interpreter the GPU is the host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from threading import Lock
from typing import Any

import torch
import triton
from torch import Tensor

from ..sweep import Run

#: Whether the kernels run in Triton's interpreter, on the CPU. Triton decides this when it is imported, for good.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_ALIGNMENT = 256
#: The interpreter rebinds names of Triton's while a kernel runs, for every thread.
_ALONE = Lock()
#: Of streams in the interpreter.
_HANDLES = count(1)


def why_not() -> str:
    """Why no kernel can run here; empty where one can."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"triton {triton.__version__} divides without denormals: install 3.6 or newer"
    if devices():
        return ""
    return "torch sees no GPU, and TRITON_INTERPRET=1, which runs the kernels without one, is not set"


def devices() -> int:
    """How many GPUs there are."""
    if INTERPRETED:
        return 1
    kind = _kind()
    return int(getattr(torch, kind).device_count()) if kind else 0


def device(index: int) -> Device:
    """The memory and the streams of one GPU."""
    return Device(index)


@contextmanager
def on(run: Run) -> Iterator[torch.device]:
    """Within the block, torch and Triton queue their work on the stream of a run.

    Raises:
        MemoryError: there is not enough for what an op needs beside its tensors.
    """
    try:
        if INTERPRETED:
            with _ALONE:
                yield torch.device("cpu")
            return
        place = torch.device(_kind(), run.device)
        module: Any = getattr(torch, place.type)
        with module.device(place), module.stream(_external(place, run.stream)):
            yield place
    except torch.cuda.OutOfMemoryError as error:  # torch's own, which is no MemoryError
        raise MemoryError(str(error)) from error


class Device:
    """One GPU; in the interpreter its memory is the host's, poisoned with 0xFF, and all work is done at once."""

    def __init__(self, index: int) -> None:
        self._place = torch.device("cpu") if INTERPRETED else torch.device(_kind(), index)
        self._module: Any = getattr(torch, self._place.type)
        self._blocks: dict[int, Tensor] = {}  # uint8 [nbytes], by address
        self._pinned: dict[int, Tensor] = {}
        self._streams: dict[int, Any] = {}
        self.is_cuda = self._place.type == "cuda"
        self.name: str = "Triton's interpreter" if INTERPRETED else self._module.get_device_name(self._place)

    def free_bytes(self) -> int:
        """What an allocation can have: free on the card, or kept by torch from allocations that were released."""
        if INTERPRETED:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free, _ = self._module.mem_get_info(self._place)
        kept = self._module.memory_reserved(self._place) - self._module.memory_allocated(self._place)
        return int(free + kept)

    def allocate(self, nbytes: int) -> int:
        """The address of new memory of the device, 256-byte aligned.

        Raises:
            MemoryError: there is not enough.
        """
        return self._new(self._blocks, nbytes, device=self._place)

    def release(self, address: int) -> None:
        del self._blocks[address]

    def pin(self, nbytes: int) -> int:
        """The address of new page-locked memory of the host.

        Raises:
            MemoryError: there is not enough.
        """
        return self._new(self._pinned, nbytes, pin_memory=not INTERPRETED)

    def unpin(self, address: int) -> None:
        del self._pinned[address]

    def stream(self) -> int:
        """The handle of a new stream."""
        if INTERPRETED:
            self._streams[handle := next(_HANDLES)] = None
            return handle
        stream = self._module.Stream(self._place)
        handle = stream.cuda_stream if self._place.type == "cuda" else stream.sycl_queue
        self._streams[handle] = stream
        return handle

    def close(self, stream: int) -> None:
        del self._streams[stream]

    def upload(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy from pinned memory to the device."""
        with self._on(stream):
            _within(self._blocks, to, nbytes).copy_(_within(self._pinned, source, nbytes), non_blocking=True)

    def download(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Queue a copy from the device to pinned memory."""
        with self._on(stream):
            _within(self._pinned, to, nbytes).copy_(_within(self._blocks, source, nbytes), non_blocking=True)

    def synchronize(self, stream: int) -> None:
        if not INTERPRETED:
            self._streams[stream].synchronize()

    def _on(self, stream: int) -> AbstractContextManager[Any]:
        known = self._streams[stream]
        return nullcontext() if INTERPRETED else self._module.stream(known)

    def _new(self, owners: dict[int, Tensor], nbytes: int, **where: Any) -> int:
        try:
            block = torch.empty(nbytes + _ALIGNMENT, dtype=torch.uint8, **where)
        except RuntimeError as error:  # also what torch raises where a card is full
            if "memory" not in str(error):
                raise
            raise MemoryError(f"{self.name} has no {nbytes} bytes left") from error
        block = block[-block.data_ptr() % _ALIGNMENT :][:nbytes]
        if INTERPRETED:
            block.fill_(0xFF)
        owners[block.data_ptr()] = block
        return block.data_ptr()


def _kind() -> str:
    return next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "")


def _external(place: torch.device, handle: int) -> Any:
    if place.type == "cuda":
        return torch.cuda.ExternalStream(handle, place)
    return torch.xpu.get_stream_from_external(handle, place) if handle else torch.xpu.current_stream(place)


def _within(owners: dict[int, Tensor], address: int, nbytes: int) -> Tensor:
    """Bytes inside of one allocation."""
    start = max(each for each in list(owners) if each <= address)  # a copy: other threads allocate
    return owners[start][address - start :][:nbytes]
