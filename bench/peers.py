"""The same merges as one writes them in PyTorch, in the tensors' own dtype; what `torch.compile` is given too."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cases import PARAMETERS, WEIGHTS
from torch import Tensor

_DENSITY, _T = PARAMETERS["density"], PARAMETERS["t"]


def linear(models: Sequence[Tensor], base: Tensor | None) -> Tensor:
    return _weighted(models) / sum(WEIGHTS)


def task_arithmetic(models: Sequence[Tensor], base: Tensor) -> Tensor:
    return base + _weighted([model - base for model in models])


def ties(models: Sequence[Tensor], base: Tensor) -> Tensor:
    agreeing, mass = _elected([_trimmed(model - base) for model in models])
    return base + agreeing / torch.where(mass == 0, 1, mass)


def dare_linear(models: Sequence[Tensor], base: Tensor) -> Tensor:
    return base + _weighted([_dropped(model - base) for model in models])


def dare_ties(models: Sequence[Tensor], base: Tensor) -> Tensor:
    agreeing, _ = _elected([_dropped(model - base) for model in models])
    return base + agreeing


def slerp(models: Sequence[Tensor], base: Tensor | None) -> Tensor:
    one, other = models
    wide = one.float(), other.float()
    cosine = (wide[0] / wide[0].norm() * (wide[1] / wide[1].norm())).sum()
    angle = torch.acos(cosine.clamp(-1, 1))
    along = torch.sin((1 - _T) * angle) / torch.sin(angle) * one + torch.sin(_T * angle) / torch.sin(angle) * other
    return torch.where(cosine.abs() > 0.9995, (1 - _T) * one + _T * other, along.to(one.dtype))


def passthrough(models: Sequence[Tensor], base: Tensor | None) -> Tensor:
    return models[0].clone()


def _weighted(tensors: Sequence[Tensor]) -> Tensor:
    return sum(weight * tensor for weight, tensor in zip(WEIGHTS, tensors, strict=True))


def _trimmed(delta: Tensor) -> Tensor:
    kept = torch.topk(delta.abs(), int(_DENSITY * delta.numel()), sorted=False).indices
    return torch.zeros_like(delta).index_copy_(0, kept, delta[kept])


def _dropped(delta: Tensor) -> Tensor:
    return torch.where(torch.rand(delta.shape, device=delta.device) < _DENSITY, delta / _DENSITY, 0)


def _elected(deltas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The sum of the weighted deltas that agree with the vote, and of their weights."""
    weights = torch.tensor(WEIGHTS, dtype=deltas[0].dtype, device=deltas[0].device)[:, None]
    weighted = torch.stack(list(deltas)) * weights  # [M, n]
    agree = (weighted.sign() == torch.where(weighted.sum(0) >= 0, 1, -1)) & (weighted != 0)
    return (weighted * agree).sum(0), (agree * weights).sum(0)
