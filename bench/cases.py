"""The cases of the bench: shapes of real models in buffers that caches cannot flatter, settings of the methods.

Bytes of traffic per element, in a dtype of `s` bytes, each input read once and each output written once:

    merge      linear 3 + 1, task_arithmetic, ties and dare 4 + 1, slerp's sweep 2 + 1, passthrough 1 + 1, times s
    whole      as its merge: a second read, for what it measures, is the op's own affair
    threshold  4 s      norms  4 s      gram  as many as its tensors, times s

What a store itself reads (a cache line before it is overwritten) is not counted, neither for us nor for the ceiling.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmerge.backends import Provider
from fastmerge.methods import METHODS, Base, Measured, Method, Settings, ranks
from fastmerge.sweep import SWEPT, Inputs, Run, Sweep, Target, View

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MODELS = 3  # and a base
PARAMETERS = {"density": 0.2, "t": 0.3}
_PAGE, _SHIFT = 4096, 8 * 37  # bytes; by an odd number of words, so that lines of 64 bytes begin elsewhere too
WEIGHTS = (0.5, 0.25, 0.375)  # exact, so that a vote of zero is zero in any precision; and a sum that is not 1


class Case(NamedTuple):
    """Some tensors of one shape, merged in one call."""

    tensors: int
    shape: tuple[int, ...]
    models: int = MODELS
    outputs: int = 1
    shifted: bool = False  # each input begins elsewhere in a page, as headers differ in length; the output at a page

    @property
    def elements(self) -> int:
        """Of one tensor."""
        return math.prod(self.shape)


CASES = {
    "mlp": Case(1, (14336, 4096)),  # 58.7 M: a projection of Llama 3.1 8B
    "attention": Case(1, (4096, 4096)),  # 16.8 M: of the same
    "embedding": Case(1, (50257, 768)),  # 38.6 M: the tokens of GPT-2
    "8M": Case(1, (1024, 8192)),  # 8.4 M: the keys of Llama 3.1 70B
    "4M": Case(1, (2048, 2048)),  # 4.2 M: the queries of Llama 3.2 1B
    "4M-shifted": Case(1, (2048, 2048), shifted=True),
    "1M": Case(1, (512, 2048)),  # 1.0 M: the keys of the same
    "norm": Case(161, (8192,)),  # 1.3 M: every norm of Llama 3.1 70B
}


#: Of the bench on a GPU, whose caches are larger and whose start takes longer.
GPU_CASES = {
    "mlp": CASES["mlp"],
    "attention": CASES["attention"],
    "vocabulary": Case(1, (128256, 4096)),  # 525 M: the tokens of Llama 3.1 8B
}
MANY, ONE = Case(1000, (4096,)), Case(1, (1000, 4096))  # of the same total


class Set(NamedTuple):
    """A base, its fine-tunes and room for outputs: one array each, with the tensors of the case end to end."""

    models: tuple[Any, ...]  # uint8 arrays, or tensors where they lie on a GPU, as are the others
    base: Any
    out: Any


class Buffers:
    """Equal sets of tensors, taken in turn: by the time one comes round again no cache holds any of it."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case = case
        self.dtype = dtype
        first = _filled(case, dtype)
        copies = rotated(case, dtype, _last_cache_bytes()) - 1
        self._sets = [first, *(Set(tuple(map(_again, first.models)), *map(_again, first[1:])) for _ in range(copies))]
        self._turns = cycle(range(len(self._sets)))

    def __len__(self) -> int:
        return len(self._sets)

    def turn(self) -> int:
        """The number of the set to use now."""
        return next(self._turns)

    def inputs(self, models: int, based: bool, number: int = 0) -> list[Inputs]:
        """What an op reads of a set: the models, and deltas from the base or the base as the first of them."""
        each = self._sets[number]
        arrays = each.models[:models] if based else (each.base, *each.models)[-models:]
        base, starts = _address(each.base), [_address(array) for array in arrays]
        return [
            Inputs(
                self.case.elements,
                tuple(View(start + offset, self.dtype) for start in starts),
                View(base + offset, self.dtype) if based else None,
            )
            for offset in self._offsets()
        ]

    def targets(self, number: int = 0, outputs: Sequence[int] = (0,)) -> list[list[Target]]:
        each = self._sets[number]
        starts = [_address(each.out) + len(each.base) * output for output in outputs]
        return [[Target(self.dtype, start + offset) for start in starts] for offset in self._offsets()]

    def out(self, number: int = 0) -> Any:
        """The outputs' bytes."""
        return self._sets[number].out

    def _offsets(self) -> list[int]:
        nbytes = self.case.elements * SWEPT[self.dtype]
        return [nbytes * tensor for tensor in range(self.case.tensors)]


class Resident(Buffers):
    """Sets of tensors made elsewhere, on a GPU or the copy of one of them in the memory of the host."""

    def __init__(self, case: Case, dtype: str, sets: list[Set]) -> None:
        self.case = case
        self.dtype = dtype
        self._sets = sets
        self._turns = cycle(range(len(sets)))

    def set(self, number: int = 0) -> Set:
        return self._sets[number]

    def tensors(self, number: int = 0) -> Set:
        """Those of a set as flat tensors of the dtype."""
        each = self._sets[number]
        models = tuple(model.view(TORCH[self.dtype]) for model in each.models)
        return Set(models, each.base.view(TORCH[self.dtype]), each.out.view(TORCH[self.dtype]))


def resident(case: Case, dtype: str, place: torch.device, cache_bytes: int, ascending: bool = False) -> Resident:
    """Sets like those of `Buffers` on a device; with deltas of `ascending` size no sample foretells a threshold."""
    generator = torch.Generator(place).manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(case.tensors * case.elements, generator=generator, device=place)

    base = normal() * 0.02
    models = []
    for _ in range(MODELS):
        delta = normal() * 0.001
        delta = delta.abs().sort().values if ascending else delta
        models.append((base + delta).to(TORCH[dtype]).view(torch.uint8))
    raw = base.to(TORCH[dtype]).view(torch.uint8)
    first = Set(tuple(models), raw, torch.full_like(raw, 0xFF))
    copies = rotated(case, dtype, cache_bytes) - 1
    return Resident(
        case, dtype, [first, *(Set(tuple(m.clone() for m in models), raw.clone(), raw.clone()) for _ in range(copies))]
    )


def rotated(case: Case, dtype: str, cache_bytes: int) -> int:
    """How many sets are four times a cache, by what the leanest op, a copy, touches of each."""
    return math.ceil(4 * cache_bytes / (2 * case.tensors * case.elements * SWEPT[dtype]))


def read_by(row: Method, models: int = MODELS) -> tuple[int, bool]:
    """How many of the models a method reads here, and whether it takes deltas from a base beside them."""
    return min(models, row.models[1] or models), row.base is Base.ORIGIN


def settings(row: Method, models: int) -> Settings:
    """A method's settings for a tensor: its defaults, and what the bench sets."""
    shared = {p.name: PARAMETERS.get(p.name, p.default) for p in row.parameters if not p.per_model}
    own = [p for p in row.parameters if p.per_model]
    each = tuple(
        {p.name: weight if p.name == "weight" else PARAMETERS.get(p.name, p.default) for p in own}
        for weight in islice(cycle(WEIGHTS), models)
    )
    return Settings(shared, each, tuple(range(1, models + 1)))


def varied(own: Settings, number: int) -> Settings:
    """The settings with another lambda or t, or the first model with another weight; those of number 0 as they are."""
    if number == 0:
        return own
    for name in ("lambda", "t"):
        if name in own.shared:
            return replace(own, shared={**own.shared, name: own.shared[name] + number / 16})
    first, *others = own.models
    return replace(own, models=({**first, "weight": first["weight"] + number / 16}, *others))


def sweeps(
    provider: Provider, method: str, tensors: Sequence[Inputs], run: Run, variants: Sequence[int] = (0,)
) -> list[list[Sweep]]:
    """The sweeps of each tensor, after measuring what the method wants to know, as the engine does it."""
    row = METHODS[method]
    own = settings(row, len(tensors[0].models))
    chosen = [varied(own, number) for number in variants]
    cuts = gram = None
    if row.selects:
        cuts = provider.threshold([[each] for each in tensors], [ranks(own, each.elements) for each in tensors], run)
    if row.gram:
        gram = provider.gram(tensors, run)
    return [
        [row.sweep(one, Measured(cuts[i] if cuts else (), gram[i].tolist() if gram else ())) for one in chosen]
        for i in range(len(tensors))
    ]


def _filled(case: Case, dtype: str) -> Set:
    """A base like trained weights, fine-tunes like trained ones: small deltas, many of them lost to the dtype."""
    elements = case.tensors * case.elements
    base = np.random.default_rng(0).standard_normal(elements, np.float32) * np.float32(0.02)
    models = []
    for seed in range(1, case.models + 1):
        model = np.random.default_rng(seed).standard_normal(elements, np.float32)
        model *= np.float32(0.001)
        model += base
        models.append(narrowed(model, dtype, case.shifted * seed * _SHIFT))
    origin = narrowed(base, dtype, case.shifted * (case.models + 1) * _SHIFT)
    return Set(tuple(models), origin, _room(case.outputs * elements * SWEPT[dtype]))


def narrowed(values: np.ndarray, dtype: str, after: int = 0) -> np.ndarray:
    """The bytes of float32 values, rounded to a dtype; so many after the beginning of a page."""
    return _copied(torch.from_numpy(values).to(TORCH[dtype]).view(torch.uint8).numpy(), after)


def _again(raw: np.ndarray) -> np.ndarray:
    """The same bytes at the same place of another page."""
    return _copied(raw, raw.ctypes.data % _PAGE)


def _copied(raw: np.ndarray, after: int) -> np.ndarray:
    room = _room(raw.size, after)
    room[:] = raw
    return room


def _room(nbytes: int, after: int = 0) -> np.ndarray:
    """Bytes that begin so many `after` a page, as in a mapped file, and are there: no first touch of them is timed."""
    whole = np.full(nbytes + 2 * _PAGE, 0xFF, np.uint8)
    start = -whole.ctypes.data % _PAGE + after % _PAGE
    return whole[start : start + nbytes]


def _address(memory: Any) -> int:
    return int(memory.data_ptr() if isinstance(memory, torch.Tensor) else memory.ctypes.data)


def _last_cache_bytes() -> int:
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (ValueError, OSError):
        return 32 << 20
