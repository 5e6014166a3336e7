"""Merges on spheres as weighted sums: the weight of each vector, from the inner products of all.

Whatever these methods make of some vectors x_i on the way is a sum of them, so that its angles and lengths follow from
its coefficients and the Gram matrix G_ij = x_i . x_j. In float64; u_i = x_i / |x_i|. One vector alone stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Gram = Sequence[Sequence[float]]

#: What float64 products of unit vectors cannot tell from zero, as a length or an angle.
_ROUNDING = 2.0**-26


def slerp(gram: Gram, t: float) -> list[float]:
    """On the great circle from x_1 to x_2 (Shoemake, SIGGRAPH 1985), w the angle between them:

        sin((1 - t) w) / sin w x_1 + sin(t w) / sin w x_2

    A straight line where abs(cos w) > 0.9995; a length under 1e-8 counts as 1.
    """
    first, second = (length if length >= 1e-8 else 1.0 for length in _lengths(gram))
    cosine = _clamped(gram[0][1] / (first * second))
    return [1.0 - t, t] if abs(cosine) > 0.9995 else _on_circle(cosine, t)


def nuslerp(gram: Gram, t: float) -> list[float]:
    """`slerp`, straight only where cos w is 1 or -1 in float32; a length under 1e-7 counts as that."""
    if len(gram) == 1:
        return [1.0]
    first, second = (max(length, 1e-7) for length in _lengths(gram))
    cosine = _clamped(gram[0][1] / (first * second))
    return [1.0 - t, t] if 1.0 - abs(cosine) <= 2.0**-25 else _on_circle(cosine, t)


def multislerp(gram: Gram, weights: Sequence[float], eps: float) -> list[float]:
    """One step towards the weighted mean on the sphere (Buss & Fillmore, ACM TOG 2001), begun at the mean direction:

        u_i = x_i / (|x_i| + eps)    m = sum w_i u_i / |sum w_i u_i|    g = sum w_i (u_i - (u_i . m) m)
        (cos a m + sin a / a g) sum w_i |x_i|                           a = |g| + eps

    There g is zero: m is the direction that was taken out of it. Where m has no direction, the weighted sum of the x_i.
    """
    if len(gram) == 1:
        return [1.0]
    lengths = _lengths(gram)
    divisors = [length + eps or 1.0 for length in lengths]
    mean = _length(weights, _scaled(gram, divisors))
    if mean < max(eps, 2.0**-24 * math.fsum(map(abs, weights))):  # in float32 unit vectors cancel no better
        return list(weights)
    scale = math.cos(eps) * _dot(weights, lengths) / mean
    return [scale * weight / divisor for weight, divisor in zip(weights, divisors, strict=True)]


def karcher(gram: Gram, rounds: int, tolerance: float) -> list[float]:
    """The mean of the u_i on the sphere (Karcher, CPAM 1977), times the mean of all lengths, by steps of

        a_i = arccos(u . u_i)    T = mean of a_i / sin a_i (u_i - (u . u_i) u)    u = cos |T| u + sin |T| T / |T|

    from the direction of their sum, or u_1 where that is zero; done where |T| < tolerance. A vector shorter than
    `tolerance` has no direction and counts by its length alone; one as near to u, or to -u, gives no step.
    """
    if len(gram) == 1:
        return [1.0]
    tolerance = max(tolerance, _ROUNDING)
    lengths = _lengths(gram)
    places = [i for i, length in enumerate(lengths) if length > tolerance]
    weights = [0.0] * len(lengths)
    if not places:
        return weights
    cosines = _scaled([[gram[i][j] for j in places] for i in places], [lengths[i] for i in places])
    count = len(places)
    mean = [1.0 / count] * count
    start = _length(mean, cosines)
    u = [1.0] + [0.0] * (count - 1) if start < tolerance else [each / start for each in mean]
    for _ in range(rounds):
        near = [_clamped(_dot(row, u)) for row in cosines]
        angles = map(math.acos, near)
        pulls = [a / math.sin(a) / count if tolerance <= a <= math.pi - tolerance else 0.0 for a in angles]
        back = _dot(pulls, near)
        tangent = [pull - back * each for pull, each in zip(pulls, u, strict=True)]
        step = _length(tangent, cosines)
        if step < tolerance:
            break
        moved = [math.cos(step) * a + math.sin(step) / step * b for a, b in zip(u, tangent, strict=True)]
        length = _length(moved, cosines)
        u = [each / length for each in moved] if length > tolerance else moved
    scale = math.fsum(lengths) / len(lengths)
    for i, each in zip(places, u, strict=True):
        weights[i] = scale * each / lengths[i]
    return weights


def model_stock(gram: Gram) -> list[float]:
    """t / N of each of N deltas, c the mean cosine of two of them (Model Stock, arXiv:2403.19522):

        t = N c / (1 + (N - 1) c)    0 where that is divided by less than 1e-6

    A product of two lengths under 1e-6 counts as that. One delta alone has no cosine, and gets 0.
    """
    count, lengths = len(gram), _lengths(gram)
    cosines = [_clamped(gram[i][j] / max(lengths[i] * lengths[j], 1e-6)) for j in range(count) for i in range(j)]
    mean = math.fsum(cosines) / max(len(cosines), 1)
    divisor = 1.0 + (count - 1) * mean
    return [mean / divisor if abs(divisor) >= 1e-6 else 0.0] * count


def _on_circle(cosine: float, t: float) -> list[float]:
    angle = math.acos(cosine)
    return [math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]


def _lengths(gram: Gram) -> list[float]:
    return [math.sqrt(gram[i][i]) for i in range(len(gram))]


def _scaled(gram: Gram, divisors: Sequence[float]) -> list[list[float]]:
    """The Gram matrix of the vectors, each divided by a number."""
    return [
        [each / (a * b) for each, b in zip(row, divisors, strict=True)] for row, a in zip(gram, divisors, strict=True)
    ]


def _length(coefficients: Sequence[float], gram: Gram) -> float:
    """Of a sum of vectors; rounding may take its square below zero."""
    return math.sqrt(max(0.0, _dot(coefficients, [_dot(row, coefficients) for row in gram])))


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _clamped(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))
