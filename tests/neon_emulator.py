"""The provider `cpu` on NEON without such a processor: its ops cross-compiled, and run by an emulator of aarch64."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import driven
import pytest

SOURCES = ("isa_neon", "hands", "lowrank", "measure", "merge", "parallel", "ranked", "select")
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
FLAGS = ("-O1", "-Wall", "-Wextra", "-Werror", "-static", "-DFASTMERGE_ONLY=kernels_neon")


@contextmanager
def provider() -> Iterator[ModuleType]:
    """A `fastmerge.native` of its own, whose only instruction set is the emulated one; that of the package is
    untouched."""
    if missing := [tool for tool in (COMPILER, EMULATOR) if not shutil.which(tool)]:
        pytest.skip(f"no {' and no '.join(missing)} to compile NEON with and run it")
    driver = driven.built("neon", COMPILER, FLAGS, dict.fromkeys(SOURCES, ()))
    with driven.provider([EMULATOR, str(driver)]) as native:
        yield native
