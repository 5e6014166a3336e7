"""mergekit 0.1.5, computing with fastmerge: its command line, its Python API, its outputs.

    from fastmerge.integrations import mergekit

    mergekit.install()                 # until mergekit.uninstall()
    with mergekit.accelerated(): ...   # or for a block

    python -m fastmerge.integrations.mergekit mergekit-yaml recipe.yml out/

What one of mergekit's registered methods computes from a group of tensors is replaced, and nothing else: parameters,
dtypes, tokenizers, files and options stay mergekit's. fastmerge computes

    linear, slerp, nuslerp, multislerp, karcher, model_stock, nearswap, ram,
    task_arithmetic, ties, breadcrumbs, breadcrumbs_ties

and, where every density is 1 so that nothing is drawn, dare_linear, dare_ties, della and della_linear. In float32 the
results are mergekit's within 4 ulp, or 1e-6 of a tensor's largest weight; in bf16 and float16, where mergekit rounds
after each step, they are rounded once. Of equal magnitudes at a threshold those with the lowest index stay, where
mergekit leaves that to its sort. A NaN stays at its element, also where mergekit spreads it over the tensor. Where the
directions that multislerp averages cancel, as those of three models that all left a tensor as it was, or karcher's are
opposite, the result is fastmerge's: mergekit stops there, or follows its rounding.

Left to mergekit, each counted with its reason in the `Tally`: random drops, nuslerp by rows or columns, model_stock by
rows, one model alone where angles are taken, weights that are divided by their sum and cancel, settings outside of the
bounds of a recipe, float64, tensors that are not contiguous or want a gradient, and devices that no backend runs on.
Methods that are not named here are not touched at all.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor

from ..errors import FastmergeError
from ..live import merge_tensors
from ..methods import METHODS, Base, Method
from .refusals import why_left
from .switch import Attribute, Switch, Tally

#: mergekit's methods by the row that computes them.
_ROWS = {
    name: METHODS[name]
    for name in (
        *("linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "ram"),
        *("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"),
    )
}
#: Those that draw where a density is below 1, by the row that they are where none is.
_DRAWING = {
    "dare_linear": METHODS["task_arithmetic"],
    "dare_ties": METHODS["ties"],
    "della": METHODS["ties"],
    "della_linear": METHODS["task_arithmetic"],
}


def install() -> Tally:
    """Let mergekit compute with fastmerge, until `uninstall`. Where it does already, nothing happens.

    Raises:
        BackendError: mergekit is not installed, or in a version that fastmerge does not know. Nothing is changed then.
    """
    return _SWITCH.install()


def uninstall() -> None:
    """Let mergekit compute by itself again: every attribute is the object that it was."""
    _SWITCH.uninstall()


def accelerated() -> AbstractContextManager[Tally]:
    """`install` for a block, which is given the `Tally`. Raises what `install` does."""
    return _SWITCH.accelerated()


def main(arguments: Sequence[str]) -> None:
    """Run one of mergekit's commands, with its arguments, on fastmerge; say at the end, on stderr, what it computed."""
    name = arguments[0] if arguments else ""
    try:
        tally = install()
    except FastmergeError as error:
        raise SystemExit(f"error: {error}") from None
    scripts = entry_points(group="console_scripts")
    commands = {script.name: script for script in scripts if script.value.startswith("mergekit.")}
    if name not in commands:
        raise SystemExit(f"error: {name!r} is none of mergekit's commands: {', '.join(sorted(commands))}")
    sys.argv = list(arguments)
    try:
        commands[name].load()()
    finally:
        if tally.computed or tally.left:
            print(f"merged tensors: {tally}", file=sys.stderr)


# --- the hooks ---


def _attributes(tally: Tally) -> Iterator[Attribute]:
    """The computing function of each registered method, as an attribute of its own, which hides that of its class."""
    kit = import_module("mergekit.merge_methods")
    for name in (*_ROWS, *_DRAWING):
        method = kit.get(name)
        batched = isinstance(method, kit.BatchedMergeMethod)
        function, hook = ("merge_batch", _of_batches) if batched else ("merge_group", _of_groups)
        yield vars(method), function, hook(name, getattr(method, function), tally)


_SWITCH = Switch("mergekit", ("0.1.5",), _attributes)


def _of_groups(name: str, original: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """Of tensors with identities, one of which may be the base."""
    row = _ROWS.get(name) or _DRAWING[name]
    fixed = {"rescale": False} if name in _DRAWING else {}  # where nothing is dropped

    def merge_group(group: Any, /, **parameters: Any) -> Any:
        entries = group.non_base if row.base.apart else group.entries
        base = group.base.tensor if row.base.apart and group.base is not None else None
        keywords = {
            key: [value[entry.id] for entry in entries] if isinstance(value, Mapping) else value
            for key, value in (parameters | fixed).items()
        }
        drawn = name in _DRAWING and any(density < 1.0 for density in keywords["density"])
        reason = "random drops" if drawn else _why_not(row, keywords, len(entries)) or _why_left(group.tensors)
        if reason:
            tally.left[reason] += 1
            return original(group, **parameters)
        tally.computed[name] += 1
        return _merged(row, [entry.tensor for entry in entries], base, keywords)

    return merge_group


def _of_batches(name: str, original: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    """Of tensors [B, ...], each of which holds one input of B groups, with parameters [B] or [B, inputs]."""
    row = _ROWS[name]

    def merge_batch(batch: Any, /, **parameters: Any) -> Any:
        tensors = batch.tensors
        given = {key: each.tolist() for key, each in parameters.items() if isinstance(each, Tensor)}
        groups = [parameters | {key: each[b] for key, each in given.items()} for b in range(len(tensors[0]))]
        reasons = (_why_not(row, keywords, len(tensors)) for keywords in groups)
        reason = next(filter(None, reasons), "") or _why_left(tensors)
        if reason:
            tally.left[reason] += len(groups)
            return original(batch, **parameters)
        tally.computed[name] += len(groups)

        def merged(models: Sequence[Tensor], keywords: Mapping[str, Any]) -> Tensor:
            base = models[batch.base_index] if row.base is Base.ENDPOINT else None
            return _merged(row, models, base, keywords)

        if len(groups) == 1 or (not row.gram and all(keywords == groups[0] for keywords in groups)):
            return merged(tensors, groups[0])  # elements stand alone
        return torch.stack([merged(models, keywords) for keywords, *models in zip(groups, *tensors, strict=True)])

    return merge_batch


def _merged(row: Method, models: Sequence[Tensor], base: Tensor | None, keywords: Mapping[str, Any]) -> Tensor:
    known = {p.name: keywords[p.name] for p in row.parameters if p.name in keywords}
    merged: Tensor = merge_tensors(
        row.name, models, base, threads=torch.get_num_threads(), nonfinite="propagate", **known
    )
    return merged


# --- what is left to mergekit ---


def _why_left(tensors: Sequence[Tensor]) -> str:
    return why_left(tensors) or ("" if all(each.is_contiguous() for each in tensors) else "not contiguous")


def _why_not(row: Method, keywords: Mapping[str, Any], models: int) -> str:
    """Why a row does not compute what mergekit does with these parameters; empty where it does."""
    if keywords.get("filter_wise") or keywords.get("nuslerp_flatten") is False:
        return "rows or columns by themselves"
    if models < max(row.models[0], 2 if row.gram else 1):
        return "too few models"
    for parameter in row.parameters:
        given = keywords.get(parameter.name, parameter.default)
        for value in given if isinstance(given, list) else [given]:
            if isinstance(value, float) and not (math.isfinite(value) and parameter.low <= value <= parameter.high):
                return f"{parameter.name} out of bounds"
    weights = keywords.get("weight", [])
    divided = keywords.get("normalize") or keywords.get("normalize_weights")
    if divided and abs(math.fsum(weights)) <= 1e-6 * math.fsum(map(abs, weights)):
        return "weights that cancel"
    return ""


if __name__ == "__main__":
    from fastmerge.integrations import mergekit

    mergekit.main(sys.argv[1:])  # of the module that others import: one switch
