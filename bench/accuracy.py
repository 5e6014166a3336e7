"""How far a merge is from float64: ours, and the same maths as one writes it in eager PyTorch."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from cases import TORCH
from torch import Tensor

from fastmerge import reference
from fastmerge.sweep import SWEPT, Elect, Inputs, Run, Sweep, Target, View

_PRECISION = {"F32": (24, -126), "F16": (11, -14), "BF16": (8, -126)}  # significant bits, least exponent


def ulps(values: Tensor, exact: Tensor, inputs: Inputs, dtype: str) -> Tensor:
    """Errors in units of the last place, in `dtype`, of the exact value or of the largest input, whichever is larger.

    0.5 is a perfect rounding. The inputs count because where they cancel, the last place of what is left means nothing.
    """
    models, base = _loaded(inputs)
    largest = exact.abs()
    for each in models if base is None else [*models, base]:
        largest = torch.maximum(largest, each.abs())
    bits, least = _PRECISION[dtype]
    _, exponent = torch.frexp(largest)  # |value| in [0.5, 1) * 2**exponent
    unit = torch.ldexp(torch.ones_like(exact), exponent.clamp(min=least + 1) - bits)
    return (values.to(torch.float64) - exact).abs() / unit


def exact(inputs: Inputs, sweep: Sweep) -> Tensor:
    """The sweep in float64, of what is kept of the same inputs."""
    models, base = _loaded(inputs)
    wide = [model.to(torch.float64) for model in models]
    origin = None if base is None else base.to(torch.float64)
    deltas = _kept([reference.delta(model, origin) for model in wide], models, base, sweep)
    scaled = [reference.scale(d, part.rescale) for d, part in zip(deltas, sweep.parts, strict=True)]
    weighted = [reference.scale(d, part.weight) for d, part in zip(scaled, sweep.parts, strict=True)]
    return reference.add(origin, reference.scale(reference.mean(scaled, weighted, sweep), sweep.lambda_))


def assert_bits(merged: Tensor, inputs: Inputs, sweep: Sweep, dtype: str) -> None:
    """Asserts that a merged tensor, or the head of one, holds the reference's bits."""
    inputs = inputs._replace(elements=len(merged))
    expected = torch.full_like(merged, math.nan)
    reference.merge([inputs], [[sweep]], [[Target(dtype, expected.data_ptr())]], Run())
    assert torch.equal(merged.view(torch.uint8), expected.view(torch.uint8)), "not the reference's bits"


def eager(inputs: Inputs, sweep: Sweep) -> Tensor:
    """The sweep in the tensors' own dtype, a PyTorch line per stage; only what is kept of a delta is told to it."""
    models, base = _loaded(inputs)
    deltas = _kept([model if base is None else model - base for model in models], models, base, sweep)
    deltas = [d * part.rescale for d, part in zip(deltas, sweep.parts, strict=True)]
    weighted = torch.stack([d * part.weight for d, part in zip(deltas, sweep.parts, strict=True)])  # [M, n]
    if sweep.elect is Elect.NONE:
        merged = weighted.sum(0) / sweep.divisor
    else:
        agree = (weighted.sign() == torch.where(weighted.sum(0) >= 0, 1, -1)) & (weighted != 0)
        weights = torch.tensor([part.weight for part in sweep.parts], dtype=weighted.dtype)[:, None]
        mass = (agree * weights).sum(0) if sweep.mean else torch.tensor(sweep.divisor)
        merged = (weighted * agree).sum(0) / torch.where(mass == 0, 1, mass)
    merged = merged * sweep.lambda_
    return merged if base is None else base + merged


def tensor_in(view: View, elements: int) -> Tensor:
    """A flat tensor with a copy of the elements that begin at an address."""
    memory = (ctypes.c_uint8 * (elements * SWEPT[view.dtype])).from_address(view.address)
    return torch.frombuffer(memory, dtype=torch.uint8).clone().view(TORCH[view.dtype])


def worst(errors: Sequence[Tensor]) -> float:
    """The largest error of several tensors."""
    return max(float(each.max()) for each in errors)


def _loaded(inputs: Inputs) -> tuple[list[Tensor], Tensor | None]:
    models = [tensor_in(view, inputs.elements) for view in inputs.models]
    return models, None if inputs.base is None else tensor_in(inputs.base, inputs.elements)


def _kept(deltas: Sequence[Tensor], models: Sequence[Tensor], base: Tensor | None, sweep: Sweep) -> list[Tensor]:
    """The deltas, zero where the sweep drops them: its selection is of the float32 deltas, at any precision."""
    origin = None if base is None else base.float()
    whole = [reference.delta(model.float(), origin) for model in models]
    return [
        torch.where(reference.keep(each, sweep.keep, part, 0) != 0, delta, 0)
        for delta, each, part in zip(deltas, whole, sweep.parts, strict=True)
    ]
