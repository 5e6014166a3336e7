"""PEFT 0.21.2, merging adapters with fastmerge: `peft.utils.merge_utils`, and `add_weighted_adapter`, which calls it.

    from fastmerge.integrations import peft

    peft.install()                 # until peft.uninstall()
    with peft.accelerated(): ...   # or for a block

Replaced are `task_arithmetic`, `magnitude_prune`, `ties`, `dare_linear` and `dare_ties`, in `peft.utils.merge_utils`
and in the module of `LoraModel`, which has them by name; what imported one of them before keeps PEFT's. Trims, votes,
means and sums become two reads of the tensors. PEFT's own are the random masks, from torch's generator, the deltas that
go in, and the SVD behind `svd` and the `*_svd` types, which takes most of the time there: `fastmerge lora` has another.

In float32 the results are PEFT's but for the rounding of a sum of as many terms as there are tensors; with weights in
bf16 or float16, where PEFT rounds after each step, they are rounded once. Of equal magnitudes at a threshold those with
the lowest index stay, where PEFT leaves that to `torch.topk`.

Left to PEFT, each counted with its reason in the `Tally`: float64, tensors that want a gradient (`add_weighted_adapter`
wants none), devices that no backend runs on, and arguments that PEFT has an error for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import reduce, wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import torch_ops
from ..sweep import EVERY, Cut, Elect, Keep, Mean, Part, Sweep
from .refusals import why_left, why_not_in
from .switch import Attribute, Switch, Tally

#: How each function prunes ("" not at all), and whether the rest is elected.
_FUNCTIONS = {
    "task_arithmetic": ("", False),
    "magnitude_prune": ("magnitude", False),
    "ties": ("magnitude", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
}
_ELECT = {"total": Elect.PLAIN, "frequency": Elect.COUNT}


def install() -> Tally:
    """Let PEFT merge with fastmerge, until `uninstall`. Where it does already, nothing happens.

    Raises:
        BackendError: PEFT is not installed, or in a version that fastmerge does not know. Nothing is changed then.
    """
    return _SWITCH.install()


def uninstall() -> None:
    """Let PEFT merge by itself again: every attribute is the object that it was."""
    _SWITCH.uninstall()


def accelerated() -> AbstractContextManager[Tally]:
    """`install` for a block, which is given the `Tally`. Raises what `install` does."""
    return _SWITCH.accelerated()


def _attributes(tally: Tally) -> Iterator[Attribute]:
    utils = import_module("peft.utils.merge_utils")
    lora = import_module("peft.tuners.lora.model")
    for name in _FUNCTIONS:
        original = getattr(utils, name)
        hook = _hook(original, utils.prune, tally)
        yield vars(utils), name, hook
        yield vars(lora), name, _without_gradients(hook)  # assigned to `data`, which has none


_SWITCH = Switch("peft", ("0.21.2",), _attributes)


def _without_gradients(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def unrecorded(*arguments: Any, **keywords: Any) -> Tensor:
        with torch.no_grad():
            return function(*arguments, **keywords)

    return unrecorded


def _hook(original: Callable[..., Tensor], prune: Callable[..., Tensor], tally: Tally) -> Callable[..., Tensor]:
    signature, name = inspect.signature(original), original.__name__
    how, elects = _FUNCTIONS[name]

    @wraps(original)
    def merged(*arguments: Any, **keywords: Any) -> Tensor:
        bound = signature.bind(*arguments, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        tensors, weights, density = list(given["task_tensors"]), given["weights"], given.get("density", 1.0)
        vote = given.get("majority_sign_method", "total")
        reason = _why_not(tensors, weights, density, vote, elects)
        if reason:
            tally.left[reason] += 1
            return original(*arguments, **keywords)
        tally.computed[name] += 1
        cuts = [Cut(0.0, EVERY)] * len(tensors)
        if how == "magnitude" and density < 1.0:
            magnitudes, ties_ends = torch_ops.threshold(
                tensors, None, [int(density * tensors[0].numel())] * len(tensors)
            )
            cuts = list(map(Cut, magnitudes.tolist(), ties_ends.tolist()))
        elif how:  # which at density 1 only warns
            tensors = [prune(each, density, method=how, rescale=how == "random") for each in tensors]
        parts = tuple(Part(weight, 1.0, *cut) for weight, cut in zip(weights.tolist(), cuts, strict=True))
        sweep = Sweep(parts, Keep.ABOVE, _ELECT[vote], mean=Mean.COUNT) if elects else Sweep(parts, Keep.ABOVE)
        return torch_ops.merge(tensors, None, [sweep], _result(tensors, weights, elects))[0]

    return merged


def _why_not(tensors: Sequence[Tensor], weights: Any, density: Any, vote: Any, elects: bool) -> str:
    """Why a call is left to PEFT; empty where it is not."""
    if not tensors:
        return "no tensors"
    if reason := why_left(tensors):
        return reason
    if not isinstance(density, int | float) or not 0.0 <= density < math.inf or vote not in _ELECT:
        return "arguments that PEFT has an error for"
    if type(weights) is not Tensor or weights.shape != (len(tensors),) or weights.device != tensors[0].device:
        return "weights of another shape or device"
    if weights.requires_grad and torch.is_grad_enabled():
        return "a gradient is wanted"
    if not bool(weights.isfinite().all()):
        return "weights that are not finite"
    return why_not_in(_result(tensors, weights, elects))


def _result(tensors: Sequence[Tensor], weights: Tensor, elects: bool) -> torch.dtype:
    """Of PEFT's result: the weights are no scalars to torch, and a vote divides by a count in the default dtype."""
    dtypes = [each.dtype for each in (*tensors, weights)]
    return reduce(torch.promote_types, [*dtypes, torch.get_default_dtype()] if elects else dtypes)
