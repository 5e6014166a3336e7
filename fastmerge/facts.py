"""How this installation was built and what it runs on: what `fastmerge --version` prints, for reports of bugs."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import NamedTuple

from . import __version__, backends


class _Build(NamedTuple):
    """What CMake wrote down in `_build`."""

    revision: str = ""
    compiler: str = ""
    no_core: str = ""
    cuda: str = ""
    no_cuda: str = "this build is Python alone"


def lines() -> Iterator[str]:
    """The version, the compiled core with its instruction sets, the CUDA kernels, and Python; a line each.

    Raises BackendError: FASTMERGE_ISA asks for an instruction set that cannot run here.
    """
    build = _written()
    yield f"fastmerge {__version__}" + (f", revision {build.revision}" if build.revision else "")
    if reason := backends.why_not("cpu"):
        yield f"no core, torch computes: {build.no_core or reason}"
    else:
        sets = [f"{isa} (runs)" if runs else isa for isa, _, runs in backends.instruction_sets()]
        yield f"core: {', '.join(filter(None, [build.compiler, *sets]))}"
    yield f"CUDA kernels: {build.cuda}" if build.cuda else f"no CUDA kernels: {build.no_cuda}"
    yield f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} {platform.machine()}"


def _written() -> _Build:
    try:
        from . import _build as written
    except ImportError:
        return _Build()
    return _Build(written.REVISION, written.COMPILER, written.NO_CORE, written.CUDA, written.NO_CUDA)
