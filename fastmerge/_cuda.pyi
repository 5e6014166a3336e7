import numpy as np
from numpy.typing import NDArray

__version__: str
ROW: np.dtype[np.void]
VIEW: np.dtype[np.void]
SWEEP: np.dtype[np.void]
PART: np.dtype[np.void]
TARGET: np.dtype[np.void]

class DeviceError(RuntimeError): ...

_Records = NDArray[np.void]
_Wholes = NDArray[np.int64]

def merge(
    rows: _Records,
    views: _Records,
    sweeps: _Records,
    parts: _Records,
    targets: _Records,
    device: int,
    stream: int,
    /,
) -> tuple[_Wholes, _Wholes, _Wholes]: ...
def merge_async(
    rows: _Records,
    views: _Records,
    sweeps: _Records,
    parts: _Records,
    targets: _Records,
    cuts: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def merge_ranked(
    rows: _Records,
    views: _Records,
    sweeps: _Records,
    parts: _Records,
    ranks: _Wholes,
    targets: _Records,
    device: int,
    stream: int,
    /,
) -> tuple[_Wholes, _Wholes, _Wholes, NDArray[np.float32], _Wholes]: ...
def gram(rows: _Records, views: _Records, device: int, stream: int, /) -> NDArray[np.float64]: ...
def norms(
    rows: _Records, views: _Records, sweeps: _Records, parts: _Records, device: int, stream: int, /
) -> NDArray[np.float64]: ...
def threshold(
    rows: _Records, views: _Records, ranks: _Wholes, device: int, stream: int, /
) -> tuple[NDArray[np.float32], _Wholes]: ...
def threshold_async(
    rows: _Records, views: _Records, ranks: _Wholes, cuts: int, workspace: int, device: int, stream: int, /
) -> None: ...
def workspace_bytes(rows: _Records, device: int, /) -> int: ...
def why_not() -> str: ...
def devices() -> int: ...
def device_name(device: int, /) -> str: ...
def free_bytes(device: int, /) -> int: ...
def allocate(device: int, nbytes: int, /) -> int: ...
def release(device: int, address: int, /) -> None: ...
def pin(device: int, nbytes: int, /) -> int: ...
def unpin(device: int, address: int, /) -> None: ...
def open_stream(device: int, /) -> int: ...
def close_stream(device: int, stream: int, /) -> None: ...
def copy(device: int, to: int, source: int, nbytes: int, up: bool, stream: int, /) -> None: ...
def synchronize(device: int, stream: int, /) -> None: ...
