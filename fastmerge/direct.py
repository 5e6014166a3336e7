"""Methods that are no sweep: each a function of whole tensors, over the stages of the reference.

A function takes the models that take part, what deltas are taken from, and the settings of the tensor, and gives the
merged tensor, which is rounded later. All have the tensor's shape, for rows matter to some, and the precision of the
arithmetic. A job is done by torch on the CPU, all of it in memory: in float32 its models, the base, a delta each, and
up to seven tensors more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .methods import METHODS, Measured, Method, Settings, averaged, elected, matching, number, rescaling
from .reference import add, delta, random_bits, scale, sweep_tile
from .sweep import CERTAIN, Elect, Keep, Mean, Part, Sweep

Function = Callable[[Sequence[Tensor], Tensor, Settings], Tensor]


def function(
    method: Method, settings: Settings, shape: tuple[int, ...]
) -> Callable[[Sequence[Tensor], Tensor | None], Tensor]:
    """A method with its settings, of the flat tensors that have this shape."""
    own = method.function or FUNCTIONS.get(method.name)
    whole: Callable[..., Tensor] = nuslerp_columns if own is None else own

    def merged(models: Sequence[Tensor], base: Tensor | None) -> Tensor:
        origin = None if base is None else base.view(shape)
        return whole([model.view(shape) for model in models], origin, settings).flatten()

    return merged


# --- deltas that are dropped by their rank ---


def della(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """DELLA-Merging (arXiv:2406.11617): drops by rank, then the mean of what agrees with the vote."""
    return _merged(_drops(models, base, settings), base, settings, elected)


def della_linear(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """The same drops, summed."""
    return _merged(_drops(models, base, settings), base, settings, averaged)


def _merged(
    kept: Sequence[tuple[Tensor, float]],
    base: Tensor,
    settings: Settings,
    combined: Callable[[Settings, tuple[Part, ...], Keep], Sweep],
) -> Tensor:
    """Of what is left of each delta, and the factor that it is rescaled by."""
    own = zip(kept, settings.models, strict=True)
    parts = tuple(Part(number(model, "weight"), factor) for (_, factor), model in own)
    return _swept([each for each, _ in kept], base, combined(settings, parts, Keep.ALL))


def _drops(models: Sequence[Tensor], base: Tensor, settings: Settings) -> list[tuple[Tensor, float]]:
    word, kept = rescaling(False, settings), []
    for model, own, key in zip(models, settings.models, settings.keys, strict=True):
        change = delta(model, base)
        left = _dropped(change, number(own, "density"), number(own, "epsilon"), key, word == "inverse")
        kept.append((left, _ratio(change, left, word)))
    return kept


def _dropped(change: Tensor, density: float, epsilon: float, key: int, inverse: bool) -> Tensor:
    """What stays of each row with probability density - epsilon for its smallest element, to density + epsilon for its
    largest; over that probability if `inverse`. Of equals the first ranks highest, a NaN counting as 0; one alone stays
    with `density`."""
    if density >= 1.0 or density <= 0.0:
        return change if density >= 1.0 else torch.zeros_like(change)
    rows = _rows(change)
    width = rows.shape[1]
    places = torch.arange(width)
    ranks = 1.0 - places.double() / (width - 1) if width > 1 else torch.tensor([0.5], dtype=torch.float64)
    probabilities = density - epsilon + 2.0 * epsilon * ranks  # from the largest magnitude to the smallest
    cuts = (probabilities * CERTAIN).round().long()
    kept = torch.empty_like(rows)
    step = max(1, _TILE // width)
    for begin in range(0, len(rows), step):
        block = rows[begin : begin + step]
        order = block.abs().nan_to_num_(0.0, torch.inf).argsort(dim=1, descending=True, stable=True)
        place = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
        drawn = random_bits(key, begin * width, block.numel()).view_as(block)
        left = torch.where(drawn < cuts[place], block, 0.0)
        kept[begin : begin + step] = left / probabilities[place].to(left.dtype) if inverse else left
    return kept.view_as(change)


# --- one other model ---


def arcee_fusion(models: Sequence[Tensor], base: Tensor, _: Settings) -> Tensor:
    """d where abs(d) times the KL divergence of its row's softmax is at least median + 1.5 IQR of that product.

    The quantiles are those of all elements, however many. The steps are those that others take in float32: of rows that
    are nearly equal the divergence is not much more than their rounding. Where d is NaN or Inf it stays, and the rest
    is as if it were 0 there.
    """
    (model,) = models
    change = delta(model, base)
    finite = change.isfinite()
    origin = torch.where(base.isfinite(), base, 0.0)
    after, before = (torch.softmax(_rows(each), dim=1) + 1e-8 for each in (torch.where(finite, model, origin), origin))
    divergence = (after * (after / before).log()).sum(dim=1, keepdim=True)  # [rows, 1]
    score = _rows(torch.where(finite, change.abs(), 0.0)) * divergence
    places = [int(share * (score.numel() - 1)) for share in (0.25, 0.5, 0.75)]
    low, median, high = torch.from_numpy(np.partition(score.numpy().ravel(), places)[places])
    kept = ~(score < median + 1.5 * (high - low)).view_as(change) | ~finite
    return add(base, torch.where(kept, change, 0.0))


# --- weights that follow from the deltas ---


def sce(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """SCE (arXiv:2408.07990): of the positions that differ among the models the share of highest variance; the mean of
    the deltas that agree with the sign of their sum, weighted by their mean squares; equally where those sum to less
    than 1e-6."""
    deltas = [delta(model, base) for model in models]
    share = number(settings.shared, "select_topk")
    if share < 1.0:
        spread = _spread(deltas)
        chosen = _largest(spread, int(share * int(spread.count_nonzero())))
        for each in deltas:
            each.masked_fill_(~(chosen | each.isnan()), 0.0)
    squares = [_norms(each)[1] ** 2 / base.numel() for each in deltas]
    total = math.fsum(squares)
    weights = [square / total for square in squares] if total >= 1e-6 else [1.0 / len(squares)] * len(squares)
    parts = tuple(Part(weight) for weight in weights)
    return _swept(deltas, base, Sweep(parts, elect=Elect.PLAIN, mean=Mean.WEIGHTS))


def _spread(deltas: Sequence[Tensor]) -> Tensor:
    """The variance across M models times M, in float64, in which the mean of equal float32 numbers is exact; a NaN
    counts as 0, and where a model is infinite it is, too."""
    spread = torch.empty_like(deltas[0], dtype=torch.float64)
    for part, *tiles in _tiles(spread, *deltas):
        wide = torch.stack([tile.double().nan_to_num_(0.0, torch.inf, -torch.inf) for tile in tiles])  # [M, tile]
        torch.sum((wide - wide.sum(0) / len(wide)).square_(), 0, out=part)
    return spread.nan_to_num_(torch.inf, torch.inf)


def ramplus_tl(models: Sequence[Tensor], base: Tensor, settings: Settings) -> Tensor:
    """RAM+ (arXiv:2601.13572): the mean of the deltas that exceed epsilon where they do; where a model alone does its
    delta grows, by up to r * alpha, with how much it shares."""
    epsilon, r, alpha = (number(settings.shared, name) for name in ("epsilon", "r", "alpha"))
    deltas = [delta(model, base) for model in models]
    actives = [each.abs() > epsilon for each in deltas]
    count = torch.zeros_like(base)
    for active in actives:
        count += active
    alone, total = count == 1.0, torch.zeros_like(base)
    for each, active in zip(deltas, actives, strict=True):
        unique = int((active & alone).sum())
        shared = int(active.sum()) - unique
        factor = 1.0 + r * min(shared / max(unique, 1), alpha)
        total += torch.where(active, torch.where(alone, scale(each, factor), each), 0.0)
        total += torch.where(each.isnan(), each, 0.0)
    return add(base, total / count.clamp(min=1.0))


# --- columns ---


def nuslerp_columns(models: Sequence[Tensor], base: Tensor | None, settings: Settings) -> Tensor:
    """What lies along the first axis merged as the sweep of nuslerp merges whole tensors."""
    row, shape = METHODS["nuslerp"], models[0].shape
    grid = (shape[0] if shape else 1, math.prod(shape[1:]))  # [length, columns]
    deltas = [delta(model, base).reshape(grid) for model in models]
    merged = torch.zeros(grid, dtype=deltas[0].dtype)
    step = max(1, _TILE // max(1, grid[0]))
    for begin in range(0, grid[1], step):
        blocks = [each[:, begin : begin + step] for each in deltas]
        wide = [each.double().nan_to_num_(0.0, 0.0, 0.0) for each in blocks]
        products = torch.stack([(a * b).sum(0) for a in wide for b in wide])  # [M * M, columns]
        grams = products.T.reshape(-1, len(wide), len(wide)).tolist()
        sweeps = [row.sweep(settings, Measured(gram=gram)) for gram in grams]
        weights = torch.tensor([[part.weight for part in sweep.parts] for sweep in sweeps], dtype=merged.dtype)
        for each, weight in zip(blocks, weights.T, strict=True):
            merged[:, begin : begin + step] += each * weight
    return merged.view(shape) if base is None else add(base, merged.view(shape))


# --- what several of them share ---

#: Elements that are worked on together where they stand alone, so that little memory is taken by what is between.
_TILE = 1 << 20


def _tiles(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """The same flat part of each tensor, of one after the other, to be read or written."""
    yield from map(list, zip(*(torch.split(tensor.view(-1), _TILE) for tensor in tensors), strict=True))


def _swept(kept: Sequence[Tensor], base: Tensor, sweep: Sweep) -> Tensor:
    """What a sweep makes of deltas, added to the base."""
    merged = torch.empty_like(base)
    for part, origin, *deltas in _tiles(merged, base, *kept):
        part.copy_(add(origin, sweep_tile(deltas, None, sweep, 0)))
    return merged


def _rows(values: Tensor) -> Tensor:
    """[rows, columns] along the last axis; a vector is one row."""
    return values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values.reshape(1, -1)


def _largest(values: Tensor, k: int) -> Tensor:
    """Where the k largest magnitudes are, of equals those with the lowest flat index; a NaN counts as 0."""
    magnitudes = values.abs().nan_to_num_(0.0, torch.inf).flatten()
    count = len(magnitudes)
    if k <= 0 or k >= count:
        return torch.full_like(values, k > 0, dtype=torch.bool)
    threshold = float(np.partition(magnitudes.numpy(), count - k)[count - k])
    kept = magnitudes > threshold
    equals = (magnitudes == threshold).nonzero().flatten()
    kept[equals[: k - int(kept.sum())]] = True
    return kept.view_as(values)


def _ratio(change: Tensor, kept: Tensor, word: str) -> float:
    """What brings the kept part of a delta back to the norm that `rescale` names, 1 where it names none."""
    if word not in _NORMS:
        return 1.0
    before, after = (_norms(values)[_NORMS.index(word)] for values in (change, kept))
    return matching(before, after)


_NORMS = ("l1", "l2", "linf")


def _norms(values: Tensor) -> tuple[float, float, float]:
    """By `_NORMS`; NaN and Inf count as 0. Summed by numpy, in an order that no number of threads changes."""
    first, squares, largest = 0.0, 0.0, 0.0
    for (part,) in _tiles(values):
        magnitudes = part.double().abs().nan_to_num_(0.0, 0.0).numpy()
        first += float(magnitudes.sum())
        squares += float(np.square(magnitudes).sum())
        largest = max(largest, float(magnitudes.max()))
    return first, math.sqrt(squares), largest


#: The function of each method that is no sweep.
FUNCTIONS: Mapping[str, Function] = {
    each.__name__: each
    for each in (
        della,
        della_linear,
        arcee_fusion,
        sce,
        ramplus_tl,
    )
}
