"""The merge methods once more, from the papers, in float64 numpy: readable, slow, independent of all that we ship.

Tensors are flat float64 arrays, `models` a list of them, `densities` and `weights` one number per model. What the
literature leaves open is named as in the recipe (`elect`, `tie_vote`, `divide`, `ties`, `rescale`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray

# --- model soups, arXiv:2203.05482 ---


def linear(models: Sequence[Array], weights: Sequence[float], normalize: bool = True) -> Array:
    total = sum(w * x for w, x in zip(weights, models, strict=True))
    return total / sum(weights) if normalize else total


def uniform_soup(models: Sequence[Array]) -> Array:
    return np.mean(models, axis=0)


# --- task arithmetic, arXiv:2212.04089 ---


def task_arithmetic(
    base: Array, models: Sequence[Array], weights: Sequence[float], normalize: bool = False, lambda_: float = 1.0
) -> Array:
    return base + lambda_ * weighted_sum([x - base for x in models], weights, normalize)


def weighted_sum(deltas: Sequence[Array], weights: Sequence[float], normalize: bool) -> Array:
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    mass = sum(weights) if normalize else 1.0
    return total / (mass if abs(mass) >= 1e-8 else 1.0)


# --- TIES, arXiv:2306.01708 ---


def ties(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    normalize: bool = True,
    lambda_: float = 1.0,
    rescale: str = "none",
    elect: str = "weighted",
    tie_vote: str = "positive",
    divide: str | None = None,
    ties: str = "index",
) -> Array:
    """One threshold per array: `scope: model` is this function over all tensors of a model laid end to end."""
    kept = [
        rescaled(x - base, trim(x - base, density, ties), density, rescale)
        for x, density in zip(models, densities, strict=True)
    ]
    divide = divide or ("weights" if normalize else "none")
    return base + lambda_ * consensus(kept, weights, elect, tie_vote, divide)


def trim(delta: Array, density: float, ties: str) -> Array:
    """The max(1, int(density n)) largest magnitudes of a delta, zero elsewhere."""
    k = rank(density, delta.size)
    magnitudes = np.abs(delta)
    if ties == "all" and k > 0:
        return np.where(magnitudes >= np.sort(magnitudes)[-k], delta, 0.0)
    return np.where(largest(magnitudes, k), delta, 0.0)


def rank(density: float, count: int) -> int:
    if density <= 0:
        return 0
    return count if density >= 1 else max(1, int(density * count))


def largest(magnitudes: Array, k: int) -> Array:
    """Which k elements are the largest, by a full stable sort: of equals, those with the lowest index."""
    mask = np.zeros(magnitudes.size, bool)
    mask[np.argsort(-magnitudes, kind="stable")[: max(k, 0)]] = True
    return mask


def consensus(deltas: Sequence[Array], weights: Sequence[float], elect: str, tie_vote: str, divide: str) -> Array:
    """Elect a sign per element; the sum of the weighted deltas of that sign, divided."""
    d = np.stack(deltas)  # [M, n]
    w = np.asarray(weights, float)[:, None]  # [M, 1]
    ballots = {"weighted": w * d, "plain": d, "count": np.sign(d)}[elect]
    vote = np.sign(np.sum(ballots, axis=0))  # [n]
    if tie_vote == "positive":
        vote = np.where(vote == 0, 1.0, vote)
    agrees = (np.sign(ballots) == vote) & (ballots != 0)
    mass = {
        "weights": np.sum(w * agrees, axis=0),
        "count": np.sum(agrees, axis=0),
        "contributors": np.sum(ballots != 0, axis=0),
        "none": np.ones(d.shape[1]),
    }[divide]
    return np.sum(w * d * agrees, axis=0) / np.where(mass == 0, 1.0, mass)


def rescaled(before: Array, kept: Array, density: float, rescale: str) -> Array:
    """The kept part of a delta, over the density or back at the norm of the whole."""
    if rescale == "inverse":
        return kept / density if density > 0 else kept
    if rescale == "none":
        return kept
    order = {"l1": 0, "l2": 1, "linf": 2}[rescale]
    old, new = norms(before)[order], norms(kept)[order]
    return kept * (old / new) if old >= 1e-7 and new >= 1e-7 else kept


# --- DARE, arXiv:2311.03099: `masks` says which elements survived the drop ---


def dare_linear(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    masks: Sequence[Array],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: str = "inverse",
) -> Array:
    return base + lambda_ * weighted_sum(dropped(base, models, densities, masks, rescale), weights, normalize)


def dare_ties(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    masks: Sequence[Array],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: str = "inverse",
    elect: str = "weighted",
    tie_vote: str = "positive",
    divide: str | None = None,
) -> Array:
    kept = dropped(base, models, densities, masks, rescale)
    divide = divide or ("weights" if normalize else "none")
    return base + lambda_ * consensus(kept, weights, elect, tie_vote, divide)


def dropped(
    base: Array, models: Sequence[Array], densities: Sequence[float], masks: Sequence[Array], rescale: str
) -> list[Array]:
    return [
        rescaled(x - base, np.where(mask, x - base, 0.0), density, rescale)
        for x, density, mask in zip(models, densities, masks, strict=True)
    ]


# --- SLERP, Shoemake, SIGGRAPH 1985 ---


def slerp(a: Array, b: Array, t: float) -> Array:
    """On the great circle through a and b; a straight line where they are all but parallel."""
    norm_a, norm_b = (norm if norm >= 1e-8 else 1.0 for norm in (np.linalg.norm(a), np.linalg.norm(b)))
    cosine = float(np.clip(np.dot(a / norm_a, b / norm_b), -1.0, 1.0))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def passthrough(model: Array, scale: float | None = None) -> Array:
    return model if scale is None else scale * model


# --- what the ops measure ---


def gram(vectors: Sequence[Array]) -> Array:
    """Inner products, each an exactly rounded sum."""
    return np.array([[math.fsum(a * b) for b in vectors] for a in vectors])


def norms(vector: Array) -> tuple[float, float, float]:
    """L1, L2 and Linf."""
    magnitudes = np.abs(vector)
    return math.fsum(magnitudes), math.sqrt(math.fsum(magnitudes**2)), float(max(magnitudes, default=0.0))


def kth_largest(values: Array, k: int) -> float:
    """The k-th largest magnitude, 1 <= k <= n, by a full sort; a NaN counts as 0."""
    return float(np.sort(selectable(values))[-k])


def kept_by_rank(values: Array, k: int) -> Array:
    """Which elements a trim to k keeps: the k largest magnitudes, and any NaN beside them."""
    return largest(selectable(values), k) | np.isnan(values)


def selectable(values: Array) -> Array:
    return np.where(np.isnan(values), 0.0, np.abs(values))


# --- Philox, Salmon, Moraes, Dror & Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011), section 3.3 ---


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int], rounds: int) -> tuple[int, int, int, int]:
    """The paper's Philox4x32-`rounds`, on Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (right >> 32) ^ c1 ^ k0,
            right & 0xFFFFFFFF,
            (left >> 32) ^ c3 ^ k1,
            left & 0xFFFFFFFF,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def pieces(key: int, count: int, stream: int) -> Array:
    """The 16 random bits of the elements 0 ... count - 1: eight of them share one block of Philox with 7 rounds."""
    found: list[int] = []
    for block in range(-(-count // 8)):
        counter = (block & 0xFFFFFFFF, block >> 32, stream, 0)
        for word in philox4x32(counter, (key & 0xFFFFFFFF, key >> 32), 7):
            found += [word & 0xFFFF, word >> 16]
    return np.array(found[:count], np.int64)


def bernoulli(key: int, cut: int, count: int) -> Array:
    """Kept where the 32 bits of an element, its pieces of stream 0 and then 1, are below `cut`."""
    return (pieces(key, count, 0) << 16 | pieces(key, count, 1)) < cut


# --- floating point formats: significant bits, least and greatest exponent ---

FORMATS = {"F32": (24, -126, 127), "BF16": (8, -126, 127), "F16": (11, -14, 15)}


def rounded(values: Array, dtype: str) -> Array:
    """Float64 values at the precision of `dtype`: to nearest, ties to even; too large becomes infinite."""
    bits, least, greatest = FORMATS[dtype]
    _, exponent = np.frexp(values)  # |value| in [0.5, 1) * 2**exponent
    unit = np.ldexp(1.0, np.maximum(exponent - 1, least) - (bits - 1))
    result = np.rint(values / unit) * unit
    return np.where(np.abs(result) > (2 - 2.0 ** (1 - bits)) * 2.0**greatest, np.copysign(np.inf, values), result)
