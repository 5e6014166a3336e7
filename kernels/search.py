"""The search for one k-th magnitude, without its elements: what to count next, and what the counts say.

A sample brackets the magnitude. Deltas of 16-bit weights are discrete: where a few values are most of the bracket, one
read counts what lies above each of them and equals it, which proves the k-th. Elsewhere a census counts what lies above
the bracket and, in bins, inside it; the bin that holds the k-th is the next bracket, until a bin is one magnitude wide.
A bracket or a guess that missed says on which side. Magnitudes are the bits of a float32 without its sign.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

#: Values that are counted one by one, bins of a census, and places of a sorted sample that tell the two apart.
GUESSES, BINS, PLACES = 4, 1024, 64

_INFINITE = 0x7F800000


class Search:
    """One model of one group; `elements` is more than `rank`, and that more than 0."""

    def __init__(self, rank: int, elements: int) -> None:
        self.rank, self.elements = rank, elements
        self.magnitude = -1  # until it is found
        self.wanted = 0  # how many of its `equals` are kept
        self.equals = 0
        self.guess = 0  # its place among the guesses
        self.guesses: list[int] = []  # descending; a census where there are none
        self.low, self.high = 0, _INFINITE

    @property
    def found(self) -> bool:
        return self.magnitude >= 0

    @property
    def shift(self) -> int:
        """By which the place in the bracket becomes a bin."""
        return max(0, (self.high - self.low).bit_length() - BINS.bit_length() + 1)

    def places(self, samples: int) -> NDArray[np.int64]:
        """Where to look in that many samples, largest first: evenly, five standard deviations about the rank."""
        if samples == self.elements:
            return np.full(PLACES, self.rank - 1)
        share = self.rank / self.elements
        margin = 5 * math.sqrt(samples * share * (1 - share)) + 5
        first, last = max(share * samples - margin, 0), min(share * samples + margin, samples - 1)
        return np.linspace(first, last, PLACES).astype(np.int64)

    def expect(self, places: NDArray[np.int64], sampled: NDArray[np.int32], samples: int) -> None:
        """Bracket and guesses from what stands at these places of the sample."""
        self.low = int(sampled[-1]) if places[-1] < samples - 1 else 0
        self.high = int(sampled[0]) if places[0] > 0 else _INFINITE
        values, times = np.unique(sampled, return_counts=True)
        most = np.argsort(-times, kind="stable")[:GUESSES]
        if 2 * times[most].sum() >= PLACES:
            self.guesses = sorted(values[most].tolist(), reverse=True)

    def tallied(self, above: list[int], equal: list[int]) -> None:
        """Conclude from how many elements lie above each guess, and how many equal it."""
        low, high = 0, _INFINITE
        for place, guess in enumerate(self.guesses):
            if self.rank <= above[place]:
                low = guess + 1
                break
            if self.rank <= above[place] + equal[place]:
                self.guess = place
                return self._find(guess, above[place], equal[place])
            high = guess - 1
        self.guesses = []
        self.low, self.high = low, high
        return None

    def counted(self, above: int, bins: NDArray[np.int64]) -> None:
        """Conclude from how many elements lie above the bracket, and in each of its bins."""
        reached = above + bins[::-1].cumsum()  # from the largest
        if above >= self.rank:
            self.low, self.high = self.high + 1, _INFINITE
        elif reached[-1] < self.rank:
            self.low, self.high = 0, self.low - 1
        else:
            place = int(np.searchsorted(reached, self.rank))
            shift, number = self.shift, BINS - 1 - place
            low, equal = self.low + (number << shift), int(bins[number])
            if shift:
                self.low, self.high = low, min(self.high, low + (1 << shift) - 1)
            elif int(reached[place]) == self.rank:
                self._find(low, self.rank - equal, equal)
            else:  # to learn which of the equals stay
                self.guesses = [low]

    def _find(self, magnitude: int, above: int, equals: int) -> None:
        self.magnitude, self.wanted, self.equals = magnitude, self.rank - above, equals
