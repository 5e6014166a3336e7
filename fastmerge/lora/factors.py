"""Low-rank factors: of sums of products exactly, of dense matrices from a random sketch where that is cheaper.

`left` is [rows, rank] and `right` [rank, columns]; both have the same norm, so that neither leaves the range of a
16-bit dtype, and a product keeps its direction where they are trained on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[Any]  # of float32 or float64


class Factors(NamedTuple):
    """A product: `left` [rows, rank] times `right` [rank, columns]."""

    left: Matrix
    right: Matrix

    @property
    def rank(self) -> int:
        return len(self.right)


class Product:
    """A matrix that is known as a product, or as a sum of products side by side; it is never formed.

    Its singular values are those of two small triangular factors (QR) in float64, so that they are exact.
    """

    def __init__(self, left: Matrix, right: Matrix) -> None:
        self.left, self.right = left.astype(np.float64), right.astype(np.float64)
        self.norm = _norm_of_product(self.left, self.right)

    def truncated(self, rank: int) -> Factors:
        """The nearest matrix of a rank, by the Frobenius norm (Eckart and Young, Psychometrika 1936)."""
        (ql, rl), (qr, rr) = np.linalg.qr(self.left), np.linalg.qr(self.right.T)
        u, values, v = np.linalg.svd(rl @ rr.T, full_matrices=False)
        return _balanced(ql @ u[:, :rank], values[:rank], v[:rank] @ qr.T)

    def distance(self, other: Factors) -> float:
        """The Frobenius norm of the difference."""
        left = np.concatenate([self.left, -other.left.astype(np.float64)], 1)
        return _norm_of_product(left, np.concatenate([self.right, other.right.astype(np.float64)]))


class Dense:
    """A matrix [rows, columns] in memory.

    Where it is small, or much of its rank is wanted, its factors come from the eigenvectors of its smaller Gram matrix
    in float64; else from a random sketch that is refined by subspace iteration (Halko, Martinsson and Tropp, SIAM
    Review 2011), seeded, until a round finds less than a millionth of what was missing. Of matrices that come from
    low-rank ones that is after 4 to 8 rounds, and what comes out is then the nearest to float32's precision; where
    singular values are all but equal beyond the rank, others of them may be taken.
    """

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix
        self.shape = matrix.shape
        self._squares = math.fsum(_squares(rows) for rows in _blocks(matrix))
        self.norm = math.sqrt(self._squares)

    def truncated(self, rank: int) -> Factors:
        """A matrix of a rank that is as near as there is, or about so where a sketch gives it."""
        u, values, v = self._leading(min(rank, *self.shape))
        return _balanced(u[:, :rank], values[:rank], v[:rank])

    def holding(self, energy: float) -> Factors:
        """Of the smallest rank whose squared singular values are at least this share of all, as far as is found."""
        size, most = _SKETCH, min(self.shape)
        while True:
            u, values, v = self._leading(min(size, most))
            held = np.cumsum(values**2)
            if held[-1] >= energy * self._squares or len(values) >= most:
                rank = min(len(values), int(np.searchsorted(held, energy * self._squares)) + 1)
                return _balanced(u[:, :rank], values[:rank], v[:rank])
            size *= 2

    def distance(self, other: Factors) -> float:
        """The Frobenius norm of the difference."""
        left, right = (each.astype(self.matrix.dtype, copy=False) for each in other)
        starts = range(0, len(left), _step(self.matrix))
        parts = zip(_blocks(self.matrix), (left[at : at + _step(self.matrix)] for at in starts), strict=True)
        return math.sqrt(math.fsum(_squares(rows - part @ right) for rows, part in parts))

    def _leading(self, rank: int) -> tuple[Matrix, Matrix, Matrix]:
        """At least so many of the largest singular values, and their vectors."""
        small, size = min(self.shape), rank + _SPARE
        if small <= _SMALL or _WORTH * size >= small:
            return self._decomposed()
        return self._sketched(size)

    def _decomposed(self) -> tuple[Matrix, Matrix, Matrix]:
        wide = self.matrix if self.shape[0] <= self.shape[1] else self.matrix.T
        gram = np.zeros((len(wide), len(wide)))
        for columns in _blocks(wide.T):
            double = columns.astype(np.float64)
            gram += double.T @ double
        _, vectors = np.linalg.eigh(gram)
        u = vectors[:, ::-1]
        v = u.T.astype(wide.dtype) @ wide  # rows of singular value times singular vector
        values = np.sqrt(np.square(v, dtype=np.float64).sum(1))
        v = v / np.where(values > 0, values, 1)[:, None]
        return (u, values, v) if wide is self.matrix else (v.T, values, u.T)

    def _sketched(self, size: int) -> tuple[Matrix, Matrix, Matrix]:
        matrix, dtype = self.matrix, self.matrix.dtype
        probe = np.random.default_rng(_SEED).standard_normal((self.shape[1], size), np.float32).astype(dtype)
        found = 0.0
        for _ in range(_ROUNDS):
            basis, _ = np.linalg.qr(matrix @ probe)
            image = matrix.T @ basis  # [columns, size]
            before, found = found, _squares(image)
            if found - before <= 1e-6 * (self._squares - found) + 1e-8 * self._squares:
                break
            probe, _ = np.linalg.qr(image)
        v, values, u = np.linalg.svd(image.astype(np.float64), full_matrices=False)
        return basis @ u.T, values, v.T


_SEED = 0
_SPARE = 16  # columns of a sketch beyond the rank that is wanted
_ROUNDS = 12  # of subspace iteration, at most
_SKETCH = 64  # the first rank that is looked at where the energy is given
_SMALL = 256  # rows or columns of which there is no sketch
_WORTH = 6  # a sketch is worth its while where this many times its size is less than the smaller side
_BLOCK = 1 << 20  # elements


def _balanced(left: Matrix, values: Matrix, right: Matrix) -> Factors:
    roots = np.sqrt(values)
    return Factors(left * roots, right * roots[:, None])


def _norm_of_product(left: Matrix, right: Matrix) -> float:
    one, two = (cast(Matrix, np.linalg.qr(each, mode="r")) for each in (left, right.T))
    return float(np.linalg.norm(one @ two.T))


def _step(matrix: Matrix) -> int:
    return max(1, _BLOCK // max(1, int(matrix.shape[1])))


def _blocks(matrix: Matrix) -> list[Matrix]:
    """Views of some rows after others."""
    return [matrix[at : at + _step(matrix)] for at in range(0, len(matrix), _step(matrix))]


def _squares(values: Matrix) -> float:
    return float(np.square(values, dtype=np.float64).sum())
