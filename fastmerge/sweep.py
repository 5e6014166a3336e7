"""The vocabulary of a merge: what one sweep over a tensor reads, computes and writes, as plain data.

A sweep computes, for each element, in float32 and in the order of the models:

    d_i  = model_i - base                      (model_i itself without a base)
    d_i  = d_i where kept, else 0              Keep (CLIP: cut to what is allowed)
    d_i  = d_i * rescale_i
    D_i  = d_i * weight_i
    v    = sign of the vote                    Elect (none: every model takes part)
    m    = sum of the D_i that agree with v, divided as Mean says
    out  = base + lambda * m                   (base itself, to the bit, where lambda * m is zero)

and rounds once, to nearest even, into the output's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

#: Bytes per element of the dtypes that every provider sweeps, by their safetensors name; "U8" is bytes, only copied.
SWEPT = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}
#: One past any flat index: every magnitude equal to the threshold is kept.
EVERY = 2**63 - 1
#: The integer cut of probability one; an element is kept when its 32 random bits are below the cut.
CERTAIN = 2**32


class Keep(IntEnum):
    """Which elements of a delta stay; the rest become zero."""

    ALL = 0
    ABOVE = 1  # |d| > magnitude, or equal to it at a flat index below ties_end; a NaN stays
    BERNOULLI = 2  # at random, with probability cut / 2**32
    BAND = 3  # as ABOVE, but not > top_magnitude, nor equal to that at a flat index below top_ties_end; a NaN stays
    CLIP = 4  # all, but what is larger than magnitude becomes that, with its own sign; a NaN stays


class Elect(IntEnum):
    """What votes for the sign that an element takes."""

    NONE = 0
    WEIGHTED = 1  # sign of sum D_i; D_i agrees when its sign is the vote
    PLAIN = 2  # sign of sum d_i; d_i agrees
    COUNT = 3  # sign of sum sign(d_i); d_i agrees


class TieVote(IntEnum):
    """What a vote of exactly zero elects."""

    POSITIVE = 0
    ZERO = 1  # nobody: the mean is 0


class Mean(IntEnum):
    """What the sum of the agreeing D_i is divided by; a divisor of 0 counts as 1."""

    SUM = 0  # by `Sweep.divisor`, the same for each element
    WEIGHTS = 1  # by the sum of the agreeing weights
    COUNT = 2  # by the number of agreeing models
    CONTRIBUTORS = 3  # by the number of models whose voice (D_i or d_i, as Elect says; else D_i) is not zero


class Rescale(IntEnum):
    """Which norm of a delta, from before `Keep`, the kept part is brought back to; measured by the op `norms`."""

    NONE = 0
    L1 = 1
    L2 = 2
    LINF = 3


@dataclass(frozen=True, slots=True)
class Part:
    """One model's part in a sweep. `weight` and `rescale` are rounded to float32 where they are used."""

    weight: float = 1.0
    rescale: float = 1.0
    magnitude: float = 0.0  # Keep.ABOVE, Keep.BAND, Keep.CLIP; not negative
    ties_end: int = EVERY  # Keep.ABOVE, Keep.BAND
    cut: int = CERTAIN  # Keep.BERNOULLI, 0 ... 2**32
    key: int = 0  # Keep.BERNOULLI, 64 bits
    top_magnitude: float = math.inf  # Keep.BAND
    top_ties_end: int = 0  # Keep.BAND


@dataclass(frozen=True, slots=True)
class Sweep:
    """One setting of a merge: K sweeps over the same inputs give K outputs from one read."""

    parts: tuple[Part, ...]
    keep: Keep = Keep.ALL
    elect: Elect = Elect.NONE
    tie_vote: TieVote = TieVote.POSITIVE
    mean: Mean = Mean.SUM  # without an election SUM or CONTRIBUTORS
    divisor: float = 1.0  # Mean.SUM
    lambda_: float = 1.0


class View(NamedTuple):
    """A tensor's bytes: the address of its first element, and its dtype. Its maker keeps the memory alive.

    The address lies in the memory that the provider works in: the host's, or that of the GPU `Run.device`.
    """

    address: int
    dtype: str


class Inputs(NamedTuple):
    """What a sweep reads: `elements` of each model, and of the base where deltas are taken.

    It may be a part of a tensor, whose flat indices go on from `begin`, a multiple of 8.
    """

    elements: int
    models: tuple[View, ...]
    base: View | None = None
    begin: int = 0

    @property
    def views(self) -> tuple[View, ...]:
        """All that is read, the base last."""
        return self.models if self.base is None else (*self.models, self.base)

    def selected(self, ranks: Sequence[int]) -> Inputs:
        """What a selection is given at these ranks, one or more of each model: all models, as often."""
        return self._replace(models=self.models * (len(ranks) // len(self.models)))


class Target(NamedTuple):
    """Where an output goes: a byte offset in an open file, or an address in memory when `file` is -1."""

    dtype: str
    offset: int
    file: int = -1


class Cut(NamedTuple):
    """The outcome of a selection: a magnitude, and the flat index at which elements equal to it stop being kept."""

    magnitude: float
    ties_end: int


class Found(NamedTuple):
    """What a sweep noticed: NaN and Inf per input (base last), the first of each (-1: none), overflow per output.

    `hashes` are those of the outputs, where `Run.hash` was given and the provider hashes what it writes; else none.
    """

    nonfinite: tuple[int, ...]
    first: tuple[int, ...]
    overflow: tuple[int, ...]
    hashes: tuple[bytes, ...] = ()


class Run(NamedTuple):
    """How an op runs: threads, elements per tile (0: the provider's choice), a callback with the bytes read so far."""

    threads: int = 1
    tile: int = 0
    tick: Callable[[int], None] | None = None
    device: int = 0  # of the GPU that runs the op
    stream: int = 0  # of that GPU; an op returns when its work there is done
    hash: int = 0  # checkpoint.hashing.function(), where whole tensors go to files and their hashes are wanted
