"""The ceilings that a merge is held against: a compiled loop with the same reads and writes and no arithmetic.

In memory through `Ceiling`; from disk to disk, through our own reader and writer, as a process of its own, which writes
OUT, or where there are to be several OUTPUTS, as many folders in it:

    python bench/ceiling.py THREADS OUTPUTS OUT MODEL ...
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fastmerge.sweep import SWEPT, Inputs, Target

_SOURCE = Path(__file__).with_name("ceiling.cpp")
_BUILT = Path(__file__).with_name("results")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread")

#: How the output is stored; the ceiling is whichever of PLAIN and STREAMED is faster.
NONE, PLAIN, STREAMED, _TO_FILE = range(4)


class Swept(NamedTuple):
    """One tensor: the addresses of its inputs, the bytes of each, and where the output goes; and the others."""

    inputs: tuple[int, ...]
    nbytes: int
    place: int = 0  # an address, or an offset in `file`
    file: int = -1
    others: tuple[tuple[int, int], ...] = ()  # places and files of more outputs


class Ceiling:
    """The loop over some tensors, ready to be called."""

    def __init__(self, tensors: Sequence[Swept], threads: int) -> None:
        outputs = [((each.place, each.file), *each.others) for each in tensors]
        self._addresses = [(ctypes.c_void_p * len(each.inputs))(*each.inputs) for each in tensors]
        self._outputs = [(_Output * len(each))(*each) for each in outputs]
        self._records = (_Tensor * len(tensors))(
            *(
                _Tensor(ctypes.addressof(read), len(read), each.nbytes, ctypes.addressof(written), len(written))
                for each, read, written in zip(tensors, self._addresses, self._outputs, strict=True)
            )
        )
        self._threads = threads

    @classmethod
    def of(cls, tensors: Sequence[Inputs], targets: Sequence[Sequence[Target]], threads: int) -> Ceiling:
        """The loop that reads what an op reads and, where it has targets, writes where it writes."""
        places = [[(target.offset, target.file) for target in each] for each in targets] or [[(0, -1)]] * len(tensors)
        return cls(
            [
                Swept(
                    tuple(view.address for view in each.views),
                    each.elements * SWEPT[each.views[0].dtype],
                    *first,
                    others=tuple(others),
                )
                for each, (first, *others) in zip(tensors, places, strict=True)
            ],
            threads,
        )

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


class _Output(ctypes.Structure):
    _fields_ = (("place", ctypes.c_int64), ("file", ctypes.c_int64))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("inputs", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("outputs", ctypes.c_void_p),
        ("outputs_count", ctypes.c_int64),
    )


_loaded: list[ctypes.CDLL] = []


def _library() -> ctypes.CDLL:
    if not _loaded:
        library = ctypes.CDLL(str(build()))
        library.ceiling.argtypes = (ctypes.POINTER(_Tensor), ctypes.c_int64, ctypes.c_int, ctypes.c_int)
        _loaded.append(library)
    return _loaded[0]


def disk_to_disk(threads: int, out: Path, models: Sequence[Path], outputs: int = 1) -> None:
    """Reads each tensor of each model through our reader, writes as many bytes as one model has through our writer.

    In batches of the size that a merge has, after each of which the system is told to put them on disk.
    """
    from fastmerge.batches import BATCH_BYTES
    from fastmerge.checkpoint import Writer, lay_out, open_checkpoint

    checkpoints = [open_checkpoint(model) for model in models]
    infos = checkpoints[0].tensors.values()
    layout = lay_out([(info.name, info.dtype, info.shape) for info in infos], 5_000_000_000)
    folders = [out] if outputs == 1 else [out / str(number) for number in range(outputs)]
    with ExitStack() as opened:
        writers = [opened.enter_context(Writer(folder, layout, inputs=models, overwrite=False)) for folder in folders]
        batch: list[Swept] = []
        names: list[str] = []
        held = []  # what keeps the inputs mapped and the outputs open
        for number, info in enumerate(infos, 1):
            read = [checkpoint.address(info.name) for checkpoint in checkpoints]
            targets = [writer.target(info.name) for writer in writers]
            (file, offset), *others = targets
            addresses = tuple(address for address, _ in read)
            batch.append(Swept(addresses, info.nbytes, offset, file, tuple((place, into) for into, place in others)))
            names.append(info.name)
            held += [read, targets]
            if number == len(infos) or sum(each.nbytes * len(each.inputs) for each in batch) >= BATCH_BYTES:
                Ceiling(batch, threads)(_TO_FILE)
                for writer in writers:
                    writer.written(names)
                batch, names, held = [], [], []
        for writer in writers:
            writer.commit({})


if __name__ == "__main__":
    disk_to_disk(int(sys.argv[1]), Path(sys.argv[3]), [Path(model) for model in sys.argv[4:]], int(sys.argv[2]))
