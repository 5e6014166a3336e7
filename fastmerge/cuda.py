"""The compiled CUDA kernels as a provider: device addresses and settings in, numbers out. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from . import _cuda
from .records import DTYPE_CODES, Records, cuts_of, flat, found_of, split
from .sweep import Cut, Found, Inputs, Run, Sweep, Target

name = "cuda"
DEVICE = "gpu"
DTYPES = frozenset(DTYPE_CODES) - {"U8"}

_records = Records(_cuda)


def why_not() -> str:
    """Why this provider cannot run here; empty where it can."""
    return _cuda.why_not()


def devices() -> int:
    """How many GPUs there are."""
    return _cuda.devices()


def gram(tensors: Sequence[Inputs], run: Run) -> list[NDArray[np.float64]]:
    """Inner products [M, M] in float64 of deltas, or of weights without a base; NaN and Inf count as 0."""
    products = _cuda.gram(_records.rows(tensors), _records.views(tensors), run.device, run.stream)
    sizes = [len(tensor.models) for tensor in tensors]
    return [part.reshape(m, m) for m, part in zip(sizes, split(products, [m * m for m in sizes]), strict=True)]


def norms(tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> list[NDArray[np.float64]]:
    """Per model, before and after `Keep`: L1, L2, Linf of the delta [M, 2, 3]; NaN and Inf count as 0."""
    settings = [(sweep,) for sweep in sweeps]
    sums = _cuda.norms(
        _records.rows(tensors),
        _records.views(tensors),
        _records.sweeps(settings),
        _records.parts(settings),
        run.device,
        run.stream,
    )
    return [part.reshape(-1, 2, 3) for part in split(sums, [6 * len(tensor.models) for tensor in tensors])]


def threshold(groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> list[tuple[Cut, ...]]:
    """Per group and model the cut that keeps exactly its rank of elements, equals from the lowest index.

    A NaN counts as 0. Where all equals stay, or all elements, `ties_end` is EVERY.
    """
    tensors = list(chain.from_iterable(groups))
    rows = _records.rows(tensors, groups=[number for number, group in enumerate(groups) for _ in group])
    magnitudes, ends = _cuda.threshold(rows, _records.views(tensors), flat(ranks), run.device, run.stream)
    return cuts_of(magnitudes, ends, ranks)


def merge(
    tensors: Sequence[Inputs], sweeps: Sequence[Sequence[Sweep]], targets: Sequence[Sequence[Target]], run: Run
) -> list[Found]:
    """One output per sweep and target of each tensor; one launch for all tensors per combination of stages."""
    rows = _records.rows(tensors, settings=[len(each) for each in sweeps])
    counts = _cuda.merge(
        rows,
        _records.views(tensors),
        _records.sweeps(sweeps),
        _records.parts(sweeps),
        _records.targets(targets),
        run.device,
        run.stream,
    )
    return found_of(rows, counts)


def merge_ranked(
    tensors: Sequence[Inputs],
    sweeps: Sequence[Sequence[Sweep]],
    ranks: Sequence[Sequence[int]],
    targets: Sequence[Sequence[Target]],
    run: Run,
) -> tuple[list[tuple[Cut, ...]], list[Found]]:
    """`threshold` of each tensor alone, then `merge` with the cuts it found: one launch for all tensors.

    That is, where all sweeps have the same stages and elect WEIGHTED, and a few for all large tensors of 16 bits; else
    one for the selection, and those of `merge`.
    Each sweep keeps ABOVE; the magnitudes in its parts are not looked at.
    """
    rows = _records.rows(tensors, settings=[len(each) for each in sweeps])
    *counts, magnitudes, ends = _cuda.merge_ranked(
        rows,
        _records.views(tensors),
        _records.sweeps(sweeps),
        _records.parts(sweeps),
        flat(ranks),
        _records.targets(targets),
        run.device,
        run.stream,
    )
    return cuts_of(magnitudes, ends, ranks), found_of(rows, counts)


def merge_async(inputs: Inputs, sweeps: Sequence[Sweep], targets: Sequence[Target], cuts: int, run: Run) -> None:
    """Queues the merge of one tensor and returns at once; what is not finite is not counted.

    `cuts` is 0, or the device address of one Cut per model (float32 magnitude, 4 bytes, int64 ties_end) that stands in
    for the parts' own. A CUDA graph can capture it.
    """
    _cuda.merge_async(
        _records.rows([inputs], settings=[len(sweeps)]),
        _records.views([inputs]),
        _records.sweeps([sweeps]),
        _records.parts([sweeps]),
        _records.targets([targets]),
        cuts,
        run.device,
        run.stream,
    )


def threshold_async(inputs: Inputs, ranks: Sequence[int], cuts: int, workspace: int, run: Run) -> None:
    """Queues the selection of one tensor and returns at once: one Cut per model at `cuts`, a device address.

    `workspace` is the address of `workspace_bytes` of device memory. A CUDA graph can capture it.
    """
    rows, views = _records.rows([inputs]), _records.views([inputs])
    _cuda.threshold_async(rows, views, flat([ranks]), cuts, workspace, run.device, run.stream)


def workspace_bytes(inputs: Inputs, run: Run) -> int:
    """How much device memory `threshold_async` needs beside its inputs."""
    return _cuda.workspace_bytes(_records.rows([inputs]), run.device)


def scratch_bytes(tensors: int, elements: int, models: int, settings: int, ranks: int, run: Run) -> int:
    """The most memory that an op takes beside its tensors, of the GPU and pinned together.

    That is, when it is given no more tensors than this, of so many elements together, so many models and settings each;
    `ranks` is how many magnitudes a selection finds, 0 where nothing is selected. Ops keep it for those that follow.
    """
    return _cuda.scratch_bytes(tensors, elements, models, settings, ranks, run.device)


def release_scratch(run: Run) -> None:
    """Gives back what ops have kept on a GPU."""
    _cuda.release_scratch(run.device)


def device(index: int) -> Device:
    """A GPU's memory and streams."""
    return Device(index, _cuda.device_name(index))


@dataclass(frozen=True)
class Device:
    """Addresses and streams are integers; what is asked of a stream is done in order, some time before `synchronize`.

    `allocate` and `pin` raise MemoryError where there is not enough.
    """

    index: int
    name: str
    is_cuda: bool = True

    def free_bytes(self) -> int:
        return _cuda.free_bytes(self.index)

    def allocate(self, nbytes: int) -> int:
        """The address of memory of the GPU, aligned to 256 bytes."""
        return _cuda.allocate(self.index, nbytes)

    def release(self, address: int) -> None:
        _cuda.release(self.index, address)

    def pin(self, nbytes: int) -> int:
        """The address of page-locked memory of the host."""
        return _cuda.pin(self.index, nbytes)

    def unpin(self, address: int) -> None:
        _cuda.unpin(self.index, address)

    def stream(self) -> int:
        return _cuda.open_stream(self.index)

    def close(self, stream: int) -> None:
        _cuda.close_stream(self.index, stream)

    def upload(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Queues a copy from pinned memory."""
        _cuda.copy(self.index, to, source, nbytes, True, stream)

    def download(self, to: int, source: int, nbytes: int, stream: int) -> None:
        """Queues a copy to pinned memory."""
        _cuda.copy(self.index, to, source, nbytes, False, stream)

    def synchronize(self, stream: int) -> None:
        """Waits for all that was queued; an error of any of it is raised here."""
        _cuda.synchronize(self.index, stream)
