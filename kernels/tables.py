"""What one launch is told of its many tensors: a table of addresses and settings in the memory of the device.

A table is int64 words: for each program the place of its row and its first block, then notes that the kernel may
write, then the rows. A row has the number of elements, the flat index of the first, the place of its notes, the
addresses, and what else the kernel wants to know.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from ..sweep import Sweep, Target, View
from .device import INTERPRETED

#: The dtypes that the kernels take.
DTYPES = {"F32": tl.float32, "F16": tl.float16, "BF16": tl.bfloat16}
SIZES = {"F32": 4, "F16": 2, "BF16": 2}

#: What every kernel is launched with: each float32 operation is one of IEEE's.
PLAINLY = {"enable_fp_fusion": False}

#: A launch has about so many programs; where there are more blocks a program takes several. Not yet measured on a card.
PROGRAMS = 1 << 14
#: The bits of 1.0.
_ONE = 0x3F800000
#: Accesses of 16 bytes need addresses and numbers of elements that these divide.
_BYTES, _ELEMENTS = 16, 8


class Piece(NamedTuple):
    """Some elements of a tensor."""

    tensor: int
    start: int
    count: int


class Launch(NamedTuple):
    """Pieces of tensors that are alike in all that a kernel is compiled for."""

    like: int  # one of the tensors
    aligned: bool  # so that 16 bytes can be read and written at a time
    pieces: list[Piece]


def launches(
    places: Sequence[Sequence[tuple[int, str]]], counts: Sequence[int], kinds: Sequence[Hashable]
) -> list[Launch]:
    """As few as there are kinds, twice as many at most.

    The last few elements of a tensor are a piece of their own, so that the others are a multiple of 8.
    """
    found: dict[Hashable, Launch] = {}

    def add(tensor: int, aligned: bool, start: int, count: int) -> None:
        key = kinds[tensor], aligned
        if key not in found:
            found[key] = Launch(tensor, aligned, [])
        found[key].pieces.append(Piece(tensor, start, count))

    for tensor, count in enumerate(counts):
        whole = count // _ELEMENTS * _ELEMENTS
        if whole:
            add(tensor, all(address % _BYTES == 0 for address, _ in places[tensor]), 0, whole)
        if whole < count:
            add(tensor, False, whole, count - whole)
    return list(found.values())


def row(piece: Piece, begin: int, note: int, places: Iterable[tuple[int, str]], more: Iterable[int] = ()) -> list[int]:
    """The row of a piece: `begin` is the flat index of the tensor's first element, `note` the place in the notes.

    Places are addresses with their dtypes, as views are.
    """
    _, start, count = piece
    addresses = [signed(address + start * SIZES[dtype]) for address, dtype in places]
    return [count, begin + start, note, *addresses, *more]


#: What the compiler made, by all that it was made for.
_COMPILED: dict[Hashable, Any] = {}


def launch(
    kernel: triton.JITFunction[Any],
    programs: int,
    arguments: Sequence[Any],
    warps: int,
    choices: Mapping[str, Hashable],
) -> None:
    """Queues a kernel: its arguments, then its compile-time choices in the order of its parameters.

    Triton finds out anew at each launch what a kernel is to be compiled for, which takes longer than all else. Here it
    is always the same: tensors are aligned, and of one dtype for each parameter.
    """
    if INTERPRETED:
        kernel[(programs,)](*arguments, **choices, num_warps=warps, **PLAINLY)
        return
    key = kernel, arguments[0].device, *choices.values()
    if compiled := _COMPILED.get(key):
        compiled[programs, 1, 1](*arguments, *choices.values())
    else:
        _COMPILED[key] = kernel[(programs,)](*arguments, **choices, num_warps=warps, **PLAINLY)


class Table:
    """Rows of one length for a kernel that takes `block` elements at a time, `span` times (0: as the size asks)."""

    def __init__(
        self, rows: Sequence[Sequence[int]], notes: Sequence[int], block: int, device: torch.device, span: int = 0
    ) -> None:
        records = np.array(rows, np.int64)  # [rows, words]
        blocks = -(-records[:, 0] // block)
        self.span = span or max(1, int(blocks.sum()) // PROGRAMS)
        programs = -(-blocks // self.span)
        ends = programs.cumsum()
        self.programs = int(ends[-1])
        self.firsts: NDArray[np.int64] = ends - programs  # program of each row
        numbers = np.repeat(np.arange(len(records)), programs)
        entries = np.empty((self.programs, 2), np.int64)
        entries[:, 0] = entries.size + len(notes) + numbers * records.shape[1]
        entries[:, 1] = (np.arange(self.programs) - self.firsts[numbers]) * self.span
        records[:, 2] += entries.size
        self._notes = slice(entries.size, entries.size + len(notes))
        self.words = upload(np.concatenate([entries.ravel(), np.array(notes, np.int64), records.ravel()]), device)

    def notes(self) -> NDArray[np.int64]:
        """The notes, once the kernel has run."""
        found: NDArray[np.int64] = self.words[self._notes].cpu().numpy()
        return found


def most_programs(tensors: int, elements: int, block: int) -> int:
    """Of the launches for so many tensors, with so many elements together, no fewer than there are."""
    return min(elements // block, 2 * PROGRAMS) + 2 * tensors


def scratch_bytes(tensors: int, elements: int, models: int, settings: int, ranks: int, block: int) -> int:
    """Of the tables of an op, on the device and pinned: no fewer than there are."""
    words = 3 + models + 1 + settings * (1 + 8 * models + 2 + 4 * ranks) + 2 * (models + 1) + settings
    return 2 * 8 * (2 * most_programs(tensors, elements, block) + 2 * tensors * words)


def upload(words: NDArray[np.int64], device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    values = torch.from_numpy(words)
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def settings(sweeps: Iterable[Sweep]) -> dict[int, list[int]]:
    """By id the words of each setting: eight per model (see `stages`), the divisor (a 0 counts as 1) and lambda.

    What is a float32 goes by its bits.
    """
    known = {id(sweep): sweep for sweep in sweeps}
    floats: list[float] = []
    for sweep in known.values():
        for part in sweep.parts:
            floats += (part.weight, part.rescale, abs(part.magnitude), abs(part.top_magnitude))
        floats += (sweep.divisor, sweep.lambda_)
    narrow = np.array(floats, np.float64).astype(np.float32)
    bits = iter(narrow.view(np.int32).tolist())
    words: dict[int, list[int]] = {}
    for key, sweep in known.items():
        mine = words[key] = []
        for part in sweep.parts:
            weight, rescale, magnitude, top_magnitude = next(bits), next(bits), next(bits), next(bits)
            mine += (weight, rescale, magnitude, part.ties_end, part.cut, signed(part.key), top_magnitude)
            mine.append(part.top_ties_end)
        divisor = next(bits)
        mine += (divisor if divisor & 0x7FFFFFFF else _ONE, next(bits))
    return words


def divisor(sweep: Sweep) -> float:
    """The divisor in float32, where a 0 counts as 1."""
    return float(np.float32(sweep.divisor)) or 1.0


def signed(word: int) -> int:
    """The integer of 64 bits with the same bits."""
    word &= 2**64 - 1
    return word - 2**64 if word >> 63 else word


def dtypes_of(places: Iterable[View | Target]) -> tuple[tl.dtype, ...]:
    return tuple(DTYPES[place.dtype] for place in places)
