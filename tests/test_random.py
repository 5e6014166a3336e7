"""The random keep: the oracle's Philox bit for bit on every provider, and the statistics that a mask must have."""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType

import numpy as np
import oracles
import pytest
import torch
from conftest import Tensors, decode, merge

from fastmerge import reference
from fastmerge.sweep import CERTAIN, Keep, Part, Run, Sweep

KEY = 0x0123456789ABCDEF


def mask(provider: ModuleType, key: int, cut: int, count: int, run: Run = Run()) -> np.ndarray:  # noqa: B008  immutable
    """Which of `count` elements a provider keeps."""
    tensors = Tensors([(np.ones(count), "BF16")])
    ((raw,), _) = merge(provider, tensors, [Sweep((Part(cut=cut, key=key),), Keep.BERNOULLI)], ["F32"], run)
    return decode(raw, "F32") == 1.0


# --- the same bits ---

ZEROS, ONES = (0,) * 4, (0xFFFFFFFF,) * 4
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
KNOWN = {
    "zeros-7-rounds": (7, ZEROS, ZEROS[:2], (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    "ones-7-rounds": (7, ONES, ONES[:2], (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    "pi-7-rounds": (7, PI[:4], PI[4:], (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    "zeros-10-rounds": (10, ZEROS, ZEROS[:2], (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones-10-rounds": (10, ONES, ONES[:2], (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi-10-rounds": (10, PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
}


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN.values(), ids=list(KNOWN))
def test_the_oracle_gives_the_known_answers_of_random123(
    rounds: int, counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert oracles.philox4x32(counter, key, rounds) == words


CUTS = {
    "a-half": CERTAIN // 2,
    "a-tenth": round(0.1 * CERTAIN),
    "a-millionth": round(1e-6 * CERTAIN),
    "almost-all": CERTAIN - 1,
    "almost-none": 1,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=list(CUTS))
@pytest.mark.parametrize("key", [0, KEY, 2**64 - 1, 2**32, 1], ids=hex)
def test_the_mask_is_that_of_the_oracle(provider: ModuleType, key: int, cut: int) -> None:
    for count, run in ((5003, Run()), (5003, Run(3, 2048)), (7, Run()), (8, Run()), (9, Run())):
        np.testing.assert_array_equal(mask(provider, key, cut, count, run), oracles.bernoulli(key, cut, count))


def test_an_element_stays_once_the_cut_exceeds_its_32_bits(provider: ModuleType) -> None:
    """The second draw decides where the first equals the upper half of the cut."""
    count = 300
    drawn = oracles.pieces(KEY, count, 0) << 16 | oracles.pieces(KEY, count, 1)
    for element in (0, 1, 7, 8, 63, 130, 299):
        assert not mask(provider, KEY, int(drawn[element]), count)[element]
        assert mask(provider, KEY, int(drawn[element]) + 1, count)[element]


@pytest.mark.parametrize("begin", [2**35 + 3, 2**36 - 8, 5 * 2**35 + 7])
def test_far_elements_count_in_64_bits(begin: int) -> None:
    """No tensor of a test is that long: the stage alone, against the oracle's blocks."""
    kept = reference.keep(torch.ones(40), Keep.BERNOULLI, Part(cut=CERTAIN // 3, key=KEY), begin)
    expected = []
    for e in range(begin, begin + 40):
        counter = ((e // 8) & 0xFFFFFFFF, (e // 8) >> 32)
        first, second = (oracles.philox4x32((*counter, s, 0), (KEY & 0xFFFFFFFF, KEY >> 32), 7) for s in (0, 1))
        piece, shift = e % 8 // 2, 16 * (e % 2)
        expected.append(((first[piece] >> shift & 0xFFFF) << 16 | (second[piece] >> shift & 0xFFFF)) < CERTAIN // 3)
    assert kept.tolist() == expected


def test_density_one_keeps_all_and_zero_none(provider: ModuleType) -> None:
    assert mask(provider, KEY, CERTAIN, 70_003).all()
    assert not mask(provider, KEY, 0, 70_003).any()


# --- statistics of the mask; what one provider draws all do. Five standard deviations: one in two million by chance ---

COUNT = 1 << 20


@cache
def long_mask(key: int, density: float) -> np.ndarray:
    return mask(reference, key, round(density * CERTAIN), COUNT)


@pytest.mark.parametrize("density", [1e-4, 0.1, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("key", [0, 1, KEY], ids=hex)
def test_the_share_kept_is_the_density(key: int, density: float) -> None:
    """Binomial: n p kept, with a variance of n p (1 - p)."""
    kept = int(long_mask(key, density).sum())
    assert abs(kept - COUNT * density) <= 5 * math.sqrt(COUNT * density * (1 - density))


def test_a_density_of_a_millionth_is_kept() -> None:
    """Below 2**-16 the second draw alone makes the probability: 8.4 of 2**23 expected, 5 deviations above are 23."""
    kept = sum(int(long_mask(key, 1e-6).sum()) for key in range(8))
    assert 0 < kept <= 23


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 8, 9, 16, 64, 128, 2048, 4096])
def test_neighbours_are_independent(lag: int) -> None:
    """The correlation of n independent pairs has a deviation of 1 / sqrt(n)."""
    kept = long_mask(KEY, 0.3).astype(float)
    assert abs(np.corrcoef(kept[:-lag], kept[lag:])[0, 1]) <= 5 / math.sqrt(COUNT - lag)


@pytest.mark.parametrize("other", [KEY + 1, KEY ^ 1, KEY + 2**32, KEY ^ 2**63, 0], ids=hex)
def test_models_are_independent(other: int) -> None:
    """Neighbouring keys too, in the same place and one place on."""
    a, b = long_mask(KEY, 0.3).astype(float), long_mask(other, 0.3).astype(float)
    for shift in (0, 1, 8):
        assert abs(np.corrcoef(a[shift:], b[: COUNT - shift])[0, 1]) <= 5 / math.sqrt(COUNT - shift)


@pytest.mark.parametrize("stream", [0, 1])
def test_each_of_the_eight_pieces_is_uniform(stream: int) -> None:
    """Chi-square over the upper and over the lower byte: 255 degrees of freedom, a deviation of sqrt(2 * 255)."""
    pieces = oracles.pieces(KEY, 1 << 18, stream).reshape(-1, 8)
    expected = len(pieces) / 256
    for piece in pieces.T:
        for byte in (piece >> 8, piece & 0xFF):
            squares = float(((np.bincount(byte, minlength=256) - expected) ** 2).sum() / expected)
            assert abs(squares - 255) <= 5 * math.sqrt(2 * 255)


def test_each_of_the_eight_places_is_kept_as_often() -> None:
    for place in long_mask(KEY, 0.3).reshape(-1, 8).T:
        assert abs(place.sum() - len(place) * 0.3) <= 5 * math.sqrt(len(place) * 0.21)


def test_the_two_draws_are_independent() -> None:
    first, second = (oracles.pieces(KEY, 1 << 17, stream).astype(float) for stream in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) <= 5 / math.sqrt(1 << 17)
