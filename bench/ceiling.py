"""The ceilings that a merge is held against: a compiled loop with the same reads and writes and no arithmetic.

In memory through `Ceiling`; from disk to disk, through our own reader and writer, as a process of its own:

    python bench/ceiling.py THREADS OUT MODEL ...
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).with_name("ceiling.cpp")
_BUILT = Path(__file__).with_name("results")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread")

#: How the output is stored; the ceiling is whichever of PLAIN and STREAMED is faster.
NONE, PLAIN, STREAMED, _TO_FILE = range(4)


class Swept(NamedTuple):
    """One tensor: the addresses of its inputs, the bytes of each, and where the output goes."""

    inputs: tuple[int, ...]
    nbytes: int
    place: int = 0  # an address, or an offset in `file`
    file: int = -1


class Ceiling:
    """The loop over some tensors, ready to be called."""

    def __init__(self, tensors: Sequence[Swept], threads: int) -> None:
        self._addresses = [(ctypes.c_void_p * len(each.inputs))(*each.inputs) for each in tensors]
        self._records = (_Tensor * len(tensors))(
            *(
                _Tensor(ctypes.addressof(addresses), len(each.inputs), each.nbytes, each.place, each.file)
                for addresses, each in zip(self._addresses, tensors, strict=True)
            )
        )
        self._threads = threads

    def __call__(self, store: int) -> None:
        if _library().ceiling(self._records, len(self._records), store, self._threads):
            raise OSError("the ceiling's output could not be written")


def stores(writes: bool) -> tuple[int, ...]:
    """The kinds of store to try for an op that writes, or does not."""
    if not writes:
        return (NONE,)
    return (PLAIN, STREAMED) if _library().can_stream() else (PLAIN,)


def build() -> Path:
    """The compiled loop, made where there is none for this source and processor."""
    compiler = os.environ.get("CXX", "c++")
    about = (_SOURCE.read_text(), compiler, *_FLAGS, platform.machine(), processor())
    library = _BUILT / f"ceiling-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        _BUILT.mkdir(exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library


def processor() -> str:
    """The processor's name, family and model, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{facts.get('model name', platform.processor())} ({facts.get('cpu family')}/{facts.get('model')})"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("place", ctypes.c_int64),
        ("file", ctypes.c_int64),
    )


_loaded: list[ctypes.CDLL] = []


def _library() -> ctypes.CDLL:
    if not _loaded:
        library = ctypes.CDLL(str(build()))
        library.ceiling.argtypes = (ctypes.POINTER(_Tensor), ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        _loaded.append(library)
    return _loaded[0]


def _disk_to_disk(threads: int, out: Path, models: Sequence[Path]) -> None:
    """Reads each tensor of each model through our reader, writes as many bytes as one model has through our writer.

    In batches of the size that a merge has, after each of which the system is told to put them on disk.
    """
    from fastmerge.batches import BATCH_BYTES
    from fastmerge.checkpoint import Writer, lay_out, open_checkpoint

    checkpoints = [open_checkpoint(model) for model in models]
    infos = checkpoints[0].tensors.values()
    layout = lay_out([(info.name, info.dtype, info.shape) for info in infos], 5_000_000_000)
    with Writer(out, layout, inputs=models, overwrite=False) as writer:
        batch: list[Swept] = []
        names: list[str] = []
        held = []  # what keeps the inputs mapped and the outputs open
        for number, info in enumerate(infos, 1):
            read = [checkpoint.address(info.name) for checkpoint in checkpoints]
            file, offset = writer.target(info.name)
            batch.append(Swept(tuple(address for address, _ in read), info.nbytes, offset, file))
            names.append(info.name)
            held += [read, file]
            if number == len(infos) or sum(each.nbytes * len(each.inputs) for each in batch) >= BATCH_BYTES:
                Ceiling(batch, threads)(_TO_FILE)
                writer.written(names)
                batch, names, held = [], [], []
        writer.commit({})


if __name__ == "__main__":
    _disk_to_disk(int(sys.argv[1]), Path(sys.argv[2]), [Path(model) for model in sys.argv[3:]])
