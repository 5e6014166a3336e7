"""Why tensors of another package are left to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .. import backends

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_left(tensors: Sequence[Tensor]) -> str:
    """Why one or more tensors are not merged by fastmerge; empty where they are.

    float64 is left: nothing of ours is faster on it, or nearer to the truth.
    """
    first = tensors[0]
    if not all(map(_is_plain, tensors)):
        return "no plain tensors"
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return "a gradient is wanted"
    if reason := next(filter(None, (why_not_in(each.dtype) for each in tensors)), ""):
        return reason
    if any((each.shape, each.device) != (first.shape, first.device) for each in tensors):
        return "shapes or devices differ"
    return _why_not_on(first.device.type) if first.numel() else "no elements"


def why_not_in(dtype: torch.dtype) -> str:
    """Why nothing of this dtype is read or written; empty where it is."""
    return "" if dtype in _DTYPES else str(dtype).removeprefix("torch.")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_neg()


@cache
def _why_not_on(device: str) -> str:
    names = backends.ORDER["gpu" if device == "cuda" else device]["merge"] if device in ("cpu", "cuda") else ()
    return "" if any(not backends.why_not(name) for name in names) else f"no backend on {device}"
