from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .sweep import Inputs, Sweep, Target

__version__: str
ROW: np.dtype[np.void]
VIEW: np.dtype[np.void]
SWEEP: np.dtype[np.void]
PART: np.dtype[np.void]
TARGET: np.dtype[np.void]
LOWRANK_BLOCK: int

class InputCut(Exception): ...  # noqa: N818 - as in csrc

_Records = NDArray[np.void]
_Tick = Callable[[int], None] | None

def instruction_sets() -> dict[str, str | None]: ...
def rows(tensors: Sequence[Inputs], /) -> _Records: ...
def views(tensors: Sequence[Inputs], codes: dict[str, int], /) -> _Records: ...
def sweeps(settings: Sequence[Sequence[Sweep]], /) -> _Records: ...
def parts(settings: Sequence[Sequence[Sweep]], /) -> _Records: ...
def targets(targets: Sequence[Sequence[Target]], codes: dict[str, int], /) -> _Records: ...
def merge(
    rows: _Records,
    views: _Records,
    sweeps: _Records,
    parts: _Records,
    targets: _Records,
    isa: str,
    threads: int,
    tile: int,
    tick: _Tick,
    hash: int,
    /,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[bytes]]: ...
def merge_ranked(
    rows: _Records,
    views: _Records,
    sweeps: _Records,
    parts: _Records,
    ranks: NDArray[np.int64],
    targets: _Records,
    isa: str,
    threads: int,
    tile: int,
    tick: _Tick,
    hash: int,
    /,
) -> tuple[
    NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[bytes], NDArray[np.float32], NDArray[np.int64]
]: ...
def gram(rows: _Records, views: _Records, isa: str, threads: int, tick: _Tick, /) -> NDArray[np.float64]: ...
def norms(
    rows: _Records, views: _Records, sweeps: _Records, parts: _Records, isa: str, threads: int, tick: _Tick, /
) -> NDArray[np.float64]: ...
def threshold(
    rows: _Records, views: _Records, ranks: NDArray[np.int64], isa: str, threads: int, tick: _Tick, /
) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...
def lowrank(
    weights: int,
    dtype: int,
    left: NDArray[np.float32],
    right: NDArray[np.float32],
    scaling: float,
    out: NDArray[np.float32],
    isa: str,
    threads: int,
    /,
) -> None: ...
