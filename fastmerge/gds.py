"""Files straight into the memory of an NVIDIA GPU (GPUDirect Storage), by kvikio wherever that is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .errors import CUT, BackendError, CheckpointError


def installed() -> bool:
    return find_spec("kvikio") is not None


@contextmanager
def reading(file: str) -> Iterator[Callable[[int, int, int], None]]:
    """Opens a file; the function given fills memory of a GPU: offset in the file, address, bytes.

    Raises:
        BackendError: kvikio cannot read it.
        CheckpointError: it ends before that.
    """
    kvikio = import_module("kvikio")
    try:
        with kvikio.CuFile(file, "r") as opened:

            def load(offset: int, to: int, nbytes: int) -> None:
                if opened.pread(_Memory(to, nbytes), nbytes, offset).get() != nbytes:
                    raise CheckpointError(CUT)

            yield load
    except RuntimeError as error:
        raise BackendError(f"kvikio cannot read {file} ({error}): mend that, or uninstall kvikio") from None


class _Memory:
    """Device memory, as libraries of arrays tell one another."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
