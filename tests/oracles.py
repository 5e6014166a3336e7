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


# --- Model breadcrumbs, arXiv:2312.06795 ---


def breadcrumbs(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: str = "none",
) -> Array:
    kept = banded(base, models, densities, gammas, rescale)
    return base + lambda_ * weighted_sum(kept, weights, normalize)


def breadcrumbs_ties(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    gammas: Sequence[float],
    *,
    lambda_: float = 1.0,
    rescale: str = "none",
    elect: str = "weighted",
    tie_vote: str = "positive",
    divide: str = "none",
) -> Array:
    kept = banded(base, models, densities, gammas, rescale)
    return base + lambda_ * consensus(kept, weights, elect, tie_vote, divide)


def banded(
    base: Array, models: Sequence[Array], densities: Sequence[float], gammas: Sequence[float], rescale: str
) -> list[Array]:
    return [
        rescaled(x - base, band(x - base, density, gamma), density, rescale)
        for x, density, gamma in zip(models, densities, gammas, strict=True)
    ]


def band(delta: Array, density: float, gamma: float) -> Array:
    """Of the magnitudes from the largest, equals by index: int(gamma n) skipped, but no more than may be, then
    int(density n) kept."""
    kept = int(density * delta.size)
    skipped = min(int(gamma * delta.size), delta.size - kept)
    mask = np.zeros(delta.size, bool)
    mask[np.argsort(-np.abs(delta), kind="stable")[skipped : skipped + kept]] = True
    return np.where(mask, delta, 0.0)


# --- DELLA-Merging, arXiv:2406.11617 ---


def della_linear(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    keys: Sequence[int],
    columns: int,
    *,
    normalize: bool = False,
    lambda_: float = 1.0,
    rescale: str = "l1",
) -> Array:
    kept = magnitude_pruned(base, models, densities, epsilons, keys, columns, rescale)
    return base + lambda_ * weighted_sum(kept, weights, normalize)


def della(
    base: Array,
    models: Sequence[Array],
    weights: Sequence[float],
    densities: Sequence[float],
    epsilons: Sequence[float],
    keys: Sequence[int],
    columns: int,
    *,
    lambda_: float = 1.0,
    rescale: str = "l1",
    elect: str = "weighted",
    tie_vote: str = "positive",
    divide: str = "weights",
) -> Array:
    kept = magnitude_pruned(base, models, densities, epsilons, keys, columns, rescale)
    return base + lambda_ * consensus(kept, weights, elect, tie_vote, divide)


def magnitude_pruned(
    base: Array,
    models: Sequence[Array],
    densities: Sequence[float],
    epsilons: Sequence[float],
    keys: Sequence[int],
    columns: int,
    rescale: str,
) -> list[Array]:
    """MagPrune: each element of a row is kept with a probability that grows with its rank."""
    kept = []
    for x, density, epsilon, key in zip(models, densities, epsilons, keys, strict=True):
        delta = x - base
        chance = probabilities(delta.reshape(-1, columns), density, epsilon).ravel()
        bits = pieces(key, delta.size, 0) << 16 | pieces(key, delta.size, 1)
        left = np.where(bits < np.rint(chance * 2**32), delta, 0.0)
        kept.append(left / chance if rescale == "inverse" else rescaled(delta, left, density, rescale))
    return kept


def probabilities(rows: Array, density: float, epsilon: float) -> Array:
    """From density - epsilon for a row's smallest magnitude to density + epsilon for its largest, in equal steps; of
    equals the first is the largest."""
    columns = rows.shape[1]
    found = np.empty(rows.shape)
    for row, chances in zip(np.abs(rows), found, strict=True):
        smaller = [sum(row < x) + sum(row[i + 1 :] == x) for i, x in enumerate(row)]
        chances[:] = density - epsilon + 2 * epsilon * np.array(smaller) / (columns - 1)
    return found


# --- methods that are nobody's paper, or a paper's without a drop ---


def nearswap(base: Array, model: Array, t: float) -> Array:
    delta = model - base
    apart = np.where(delta == 0, 1.0, np.abs(delta))
    return base + np.clip(t / apart, 0.0, 1.0) * delta


def arcee_scores(base: Array, model: Array) -> tuple[Array, float]:
    """What is held against the threshold, and the threshold. Rows of [rows, columns]."""
    after, before = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) + 1e-8 for x in (model, base))
    divergence = (after * np.log(after / before)).sum(axis=1, keepdims=True)
    scores = np.abs(model - base) * divergence
    low, median, high = (np.sort(scores.ravel())[int(q * (scores.size - 1))] for q in (0.25, 0.5, 0.75))
    return scores, median + 1.5 * (high - low)


def sce(base: Array, models: Sequence[Array], top: float = 1.0) -> Array:
    """Select, calculate, erase: arXiv:2408.07990."""
    deltas = np.stack(models) - base  # [M, n]
    if top < 1:
        variance = deltas.var(axis=0)
        deltas = np.where(largest(variance, int(top * np.count_nonzero(variance))), deltas, 0.0)
    squares = (deltas**2).mean(axis=1)
    weights = squares / squares.sum() if squares.sum() >= 1e-6 else np.full(len(models), 1 / len(models))
    return base + consensus(list(deltas), weights.tolist(), "plain", "positive", "weights")


def ram(base: Array, models: Sequence[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Array:
    """RAM, and RAM+ where r is not 0: arXiv:2601.13572."""
    deltas = np.stack(models) - base  # [M, n]
    active = np.abs(deltas) > epsilon
    count = active.sum(axis=0)
    merged = np.zeros(base.size)
    for delta, mine in zip(deltas, active, strict=True):
        alone, shared = mine & (count == 1), mine & (count > 1)
        grown = 1 + r * np.clip(shared.sum() / max(alone.sum(), 1), 0, alpha)
        merged += np.where(alone, grown * delta, 0.0) + np.where(shared, delta / np.maximum(count, 1), 0.0)
    return base + merged


# --- SLERP, Shoemake, SIGGRAPH 1985 ---


def slerp(a: Array, b: Array, t: float) -> Array:
    """On the great circle through a and b; a straight line where they are all but parallel."""
    norm_a, norm_b = (norm if norm >= 1e-8 else 1.0 for norm in (np.linalg.norm(a), np.linalg.norm(b)))
    cosine = float(np.clip(np.dot(a / norm_a, b / norm_b), -1.0, 1.0))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def nuslerp(models: Sequence[Array], weights: Sequence[float], base: Array | float = 0.0) -> Array:
    """Of deltas, at the second one's share of the weights; straight where the cosine is 1 or -1 in float32."""
    t = weights[1] / sum(weights) if abs(sum(weights)) >= 1e-6 else 0.5
    a, b = (x - base for x in models)
    cosine = np.clip(np.dot(*(x / max(np.linalg.norm(x), 1e-7) for x in (a, b))), -1.0, 1.0)
    if abs(np.float32(cosine)) == 1:
        return base + (1 - t) * a + t * b
    angle = math.acos(cosine)
    return base + (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


# --- means on the sphere ---


def multislerp(
    models: Sequence[Array],
    weights: Sequence[float],
    base: Array | float = 0.0,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Array:
    """Algorithm A1 of Buss & Fillmore (ACM TOG 2001), one step of it from the direction of the mean."""
    x = np.stack(models) - base  # [M, n]
    w = np.asarray(weights, float) / (sum(weights) if normalize else 1.0)
    lengths = np.linalg.norm(x, axis=1)
    u = x / (lengths + eps)[:, None]
    mean = w @ u
    mean /= np.linalg.norm(mean)
    step = w @ (u - np.outer(u @ mean, mean))
    angle = np.linalg.norm(step) + eps
    return base + (w @ lengths) * (math.cos(angle) * mean + math.sin(angle) / angle * step)


def karcher(models: Sequence[Array], rounds: int = 10, tolerance: float = 1e-5) -> Array:
    """The mean of Karcher (CPAM 1977) of the directions, by gradient descent with steps of 1, times the mean length."""
    lengths = [float(np.linalg.norm(x)) for x in models]
    units = [x / length for x, length in zip(models, lengths, strict=True) if length > tolerance]
    if not units:
        return np.zeros_like(models[0])
    u = np.mean(units, axis=0)
    u = units[0] if np.linalg.norm(u) < tolerance else u / np.linalg.norm(u)
    for _ in range(rounds):
        step = np.mean([logarithm(u, unit, tolerance) for unit in units], axis=0)
        angle = float(np.linalg.norm(step))
        if angle < tolerance:
            break
        u = math.cos(angle) * u + math.sin(angle) / angle * step
        u = u / np.linalg.norm(u)
    return np.mean(lengths) * u


def logarithm(u: Array, v: Array, tolerance: float) -> Array:
    """The tangent at u that leads to v; zero where they are as near as `tolerance`, or opposite."""
    cosine = float(np.clip(np.dot(u, v), -1.0, 1.0))
    angle = math.acos(cosine)
    if min(angle, math.pi - angle) < tolerance:
        return np.zeros_like(u)
    return angle / math.sin(angle) * (v - cosine * u)


# --- Model Stock, arXiv:2403.19522 ---


def model_stock(base: Array, models: Sequence[Array]) -> Array:
    deltas = [x - base for x in models]
    lengths = [float(np.linalg.norm(d)) for d in deltas]
    count = len(deltas)
    cosine = np.mean(
        [
            np.clip(np.dot(deltas[i], deltas[j]) / max(lengths[i] * lengths[j], 1e-6), -1.0, 1.0)
            for i in range(count)
            for j in range(i + 1, count)
        ]
    )
    divisor = 1 + (count - 1) * cosine
    t = count * cosine / divisor if abs(divisor) >= 1e-6 else 0.0
    return t * np.mean(models, axis=0) + (1 - t) * base


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
