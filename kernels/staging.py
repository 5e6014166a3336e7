"""Tiles between host memory and the device: one tile is read while the device works on the one before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import torch
import triton
from torch import Tensor

from .. import memory
from ..sweep import Inputs, Run, Target, View

#: The dtypes that the kernels take; bytes are copied.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
#: Whether the kernels run in Triton's interpreter, on the CPU. Triton decides this when it is imported, for good.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

#: Elements. Not yet measured on a card.
_TILE = 1 << 22
#: Offsets within a tile are 32 bits wide.
_LARGEST_TILE = 1 << 30
#: Random bits come in blocks of this many elements.
_STEP = 8


def why_not() -> str:
    """Why no kernel can run here; empty where one can."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"triton {triton.__version__} divides without denormals: install 3.6 or newer"
    if INTERPRETED or _accelerator():
        return ""
    return "torch sees no GPU, and TRITON_INTERPRET=1, which runs the kernels without one, is not set"


@cache
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else _accelerator())


def tiles(inputs: Inputs, tile: int, run: Run, place: torch.device | None = None) -> Iterator[tuple[int, list[Tensor]]]:
    """Tile after tile on the device: its first flat index, the models and then the base; reports the bytes of each."""
    place = place or device()
    step = min(max(tile // _STEP * _STEP, _STEP), _LARGEST_TILE) if tile else _TILE
    for begin in range(0, inputs.elements, step):
        count = min(step, inputs.elements - begin)
        yield begin, [_load(view, begin, count, place) for view in inputs.views]
        if run.tick:
            run.tick(sum(count * DTYPES[view.dtype].itemsize for view in inputs.views))


class Arriving:
    """A tensor on its way from the device to memory of the host."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._arrived = values, None
        if values.device.type != "cpu":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = getattr(torch, values.device.type).current_stream().record_event()

    def wait(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values


def store(values: Tensor, target: Target, begin: int) -> None:
    """Values in host memory, to their place."""
    memory.write(values.view(torch.uint8).numpy().data, target.offset + begin * values.itemsize, target.file)


def _accelerator() -> str:
    return next((kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()), "")


def _load(view: View, begin: int, count: int, place: torch.device) -> Tensor:
    """A copy of some elements, by way of pinned memory where they go to a device."""
    dtype = DTYPES[view.dtype]
    copied = torch.empty(count * dtype.itemsize, dtype=torch.uint8, pin_memory=place.type != "cpu")
    memory.read(view.address + begin * dtype.itemsize, copied.numpy().data)
    return copied.view(dtype).to(place, non_blocking=True)
