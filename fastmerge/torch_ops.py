"""The four ops on tensors: `torch.ops.fastmerge.merge`, `gram`, `threshold` and `norms`, for a CPU and for CUDA.

    cuts = torch_ops.threshold(models, base, [round(0.2 * base.numel())] * len(models))
    (merged,) = torch_ops.merge(models, base, [sweep], cuts=cuts)

`models` and `base` are tensors of one shape, any, on one device; their dtypes are float32, float16 and bfloat16, also
mixed, and on a CPU float64. Flat indices are those of `tensor.flatten()`; what is not contiguous is copied first.
Results are new, contiguous, and on that device. No gradient goes through an op: its results never require one, as
those of `torch.argmax`; `torch.vmap` is refused. On a CPU an op runs on `torch.get_num_threads()` threads, on a GPU
on its current stream.

Importing this module registers the ops, and touches no device. They run under `torch.compile`. On a GPU `merge` and
`threshold` wait for nothing and copy nothing from the host where the provider is `cuda`, so that a CUDA graph can
capture them; `gram` and `norms`, which end on the host, cannot be captured, and nothing can of another provider.

Each raises `MismatchError` where its arguments do not fit one another, and `BackendError` where no provider takes such
tensors, or where a graph is captured of what waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import backends
from .errors import BackendError, MismatchError
from .sweep import Elect, Inputs, Keep, Mean, Part, Run, Sweep, Target, TieVote, View


def merge(
    models: Sequence[Tensor],
    base: Tensor | None,
    sweeps: Sequence[Sweep],
    out_dtype: torch.dtype | None = None,
    *,
    cuts: tuple[Tensor, Tensor] | None = None,
) -> list[Tensor]:
    """One merged tensor of the models' shape per sweep, from one read of the models; each sweep has M parts.

    `out_dtype` is by default what torch promotes all inputs to. `cuts`, as `threshold` returns them, take the place of
    `magnitude` and `ties_end` in every sweep, without a way through the host.
    """
    models = _listed(models)
    for number, sweep in enumerate(sweeps):
        if len(sweep.parts) != len(models):
            raise MismatchError(f"sweeps[{number}] has {len(sweep.parts)} parts where there are {len(models)} models")
    magnitudes, ties_ends = (None, None) if cuts is None else cuts
    merged: list[Tensor] = torch.ops.fastmerge.merge.default(
        models, base, *_flat(sweeps), out_dtype, magnitudes, ties_ends
    )
    return merged


def gram(models: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    """Inner products [M, M] of the deltas, or of the models without a base, in float64; NaN and Inf count as 0."""
    products: Tensor = torch.ops.fastmerge.gram.default(_listed(models), base)
    return products


def threshold(models: Sequence[Tensor], base: Tensor | None, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The cut per model that keeps exactly its rank of elements: magnitudes [M], and ties_ends, int64 [M].

    Of equal magnitudes those with the lowest flat index stay; ties_end is `sweep.EVERY` where all of them do. A NaN
    counts as 0. Magnitudes are float32, and float64 where an input is.
    """
    cuts: tuple[Tensor, Tensor] = torch.ops.fastmerge.threshold.default(_listed(models), base, list(ranks))
    return cuts


def norms(models: Sequence[Tensor], base: Tensor | None, sweep: Sweep) -> Tensor:
    """L1, L2 and Linf of each delta before and after `sweep.keep` [M, 2, 3] in float64; NaN and Inf count as 0."""
    models = _listed(models)
    if len(sweep.parts) != len(models):
        raise MismatchError(f"the sweep has {len(sweep.parts)} parts where there are {len(models)} models")
    found: Tensor = torch.ops.fastmerge.norms.default(models, base, *_flat([sweep]))
    return found


def _listed(models: Sequence[Tensor]) -> list[Tensor]:
    if not models:
        raise MismatchError("there are no models: give one tensor or more")
    return list(models)


# --- sweeps as the flat lists of a schema: stages [K, 4], numbers [K, 2 + 4 M], wholes [K, 4 M] ---


def _flat(sweeps: Sequence[Sweep]) -> tuple[list[int], list[float], list[int]]:
    stages: list[int] = []
    numbers: list[float] = []
    wholes: list[int] = []
    for sweep in sweeps:
        stages += [int(sweep.keep), int(sweep.elect), int(sweep.tie_vote), int(sweep.mean)]
        numbers += [float(sweep.divisor), float(sweep.lambda_)]
        for part in sweep.parts:
            numbers += [float(part.weight), float(part.rescale), float(part.magnitude), float(part.top_magnitude)]
            wholes += [part.ties_end, part.cut, _signed(part.key), part.top_ties_end]
    return stages, numbers, wholes


def _sweeps(models: int, stages: Sequence[int], numbers: Sequence[float], wholes: Sequence[int]) -> list[Sweep]:
    settings = len(stages) // 4
    if (len(stages), len(numbers), len(wholes)) != (4 * settings, (2 + 4 * models) * settings, 4 * models * settings):
        raise MismatchError(
            f"{len(stages)} stages, {len(numbers)} numbers and {len(wholes)} whole numbers are no settings of "
            f"{models} models: give 4, {2 + 4 * models} and {4 * models} for each"
        )
    sweeps = []
    for k in range(settings):
        keep, elect, tie_vote, mean = stages[4 * k : 4 * k + 4]
        divisor, lambda_, *factors = numbers[(2 + 4 * models) * k : (2 + 4 * models) * (k + 1)]
        places = wholes[4 * models * k : 4 * models * (k + 1)]
        parts = tuple(_part(factors[i : i + 4], places[i : i + 4]) for i in range(0, 4 * models, 4))
        sweeps.append(Sweep(parts, Keep(keep), Elect(elect), TieVote(tie_vote), Mean(mean), divisor, lambda_))
    return sweeps


def _part(factors: Sequence[float], places: Sequence[int]) -> Part:
    weight, rescale, magnitude, top_magnitude = factors
    ties_end, cut, key, top_ties_end = places
    return Part(weight, rescale, magnitude, ties_end, cut, key % 2**64, top_magnitude, top_ties_end)


def _signed(key: int) -> int:
    """The 64 bits of a key, as the schema's integers have them."""
    return key - 2**64 if key >= 2**63 else key


# --- the ops, each with what gives its results without values ---

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def _merge(
    models: list[Tensor],
    base: Tensor | None,
    stages: list[int],
    numbers: list[float],
    wholes: list[int],
    out_dtype: torch.dtype | None = None,
    magnitudes: Tensor | None = None,
    ties_ends: Tensor | None = None,
) -> list[Tensor]:
    outputs = _like_merged(models, base, stages, numbers, wholes, out_dtype, magnitudes, ties_ends)
    sweeps = _sweeps(len(models), stages, numbers, wholes)
    if not sweeps:
        return []
    targets = [Target(_DTYPES[output.dtype], output.data_ptr()) for output in outputs]
    with _at("merge", models, base, outputs[0].dtype) as (provider, inputs, run):
        if provider.name == "cuda":
            _queue_merge(provider, inputs, sweeps, targets, magnitudes, ties_ends, run)
        else:
            _may_wait("merge", outputs[0].device)
            if magnitudes is not None and ties_ends is not None:
                sweeps = _with_cuts(sweeps, list(zip(magnitudes.tolist(), ties_ends.tolist(), strict=True)))
            provider.merge([inputs], [sweeps], [targets], run)
    return outputs


def _like_merged(
    models: list[Tensor],
    base: Tensor | None,
    stages: list[int],
    numbers: list[float],
    wholes: list[int],
    out_dtype: torch.dtype | None = None,
    magnitudes: Tensor | None = None,
    ties_ends: Tensor | None = None,
) -> list[Tensor]:
    _check(models, base)
    if magnitudes is not None or ties_ends is not None:
        _check_cuts(magnitudes, ties_ends, _like_cuts(models, base))
    dtype = out_dtype or _promoted(models, base)
    if dtype not in _DTYPES:
        raise MismatchError(f"nothing is merged into {dtype}: ask for one of {_FLOATS}")
    return [models[0].new_empty(models[0].shape, dtype=dtype) for _ in range(len(stages) // 4)]


def _gram(models: list[Tensor], base: Tensor | None = None) -> Tensor:
    products = _like_gram(models, base)
    with _at("gram", models, base) as (provider, inputs, run):
        _may_wait("gram", products.device)
        (measured,) = provider.gram([inputs], run)
    return products.copy_(torch.from_numpy(measured))


def _like_gram(models: list[Tensor], base: Tensor | None = None) -> Tensor:
    _check(models, base)
    return models[0].new_empty((len(models), len(models)), dtype=torch.float64)


def _threshold(models: list[Tensor], base: Tensor | None, ranks: list[int]) -> tuple[Tensor, Tensor]:
    magnitudes, ties_ends = _like_threshold(models, base, ranks)
    with _at("threshold", models, base) as (provider, inputs, run):
        if provider.name == "cuda":
            _queue_threshold(provider, inputs, ranks, magnitudes, ties_ends, run)
        else:
            _may_wait("threshold", magnitudes.device)
            (cuts,) = provider.threshold([[inputs]], [ranks], run)
            magnitudes.copy_(torch.from_numpy(np.array([cut.magnitude for cut in cuts])))
            ties_ends.copy_(torch.from_numpy(np.array([cut.ties_end for cut in cuts])))
    return magnitudes, ties_ends


def _like_threshold(models: list[Tensor], base: Tensor | None, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    _check(models, base)
    if len(ranks) != len(models):
        raise MismatchError(f"ranks has {len(ranks)} numbers where there are {len(models)} models")
    return _like_cuts(models, base)


def _norms(
    models: list[Tensor], base: Tensor | None, stages: list[int], numbers: list[float], wholes: list[int]
) -> Tensor:
    found = _like_norms(models, base, stages, numbers, wholes)
    sweeps = _sweeps(len(models), stages, numbers, wholes)
    with _at("norms", models, base) as (provider, inputs, run):
        _may_wait("norms", found.device)
        (measured,) = provider.norms([inputs], sweeps, run)
    return found.copy_(torch.from_numpy(measured))


def _like_norms(
    models: list[Tensor], base: Tensor | None, stages: list[int], numbers: list[float], wholes: list[int]
) -> Tensor:
    _check(models, base)
    return models[0].new_empty((len(models), 2, 3), dtype=torch.float64)


# --- what the arguments must be ---

_FLOATS = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)


def _check(models: Sequence[Tensor], base: Tensor | None) -> None:
    first = models[0]
    for place, tensor in enumerate(_all(models, base)):
        name = f"models[{place}]" if place < len(models) else "base"
        if tensor.dtype not in _DTYPES:
            raise MismatchError(f"{name} holds {tensor.dtype}: what is merged is one of {_FLOATS}")
        if tensor.device != first.device:
            raise MismatchError(f"{name} lies on {tensor.device} and models[0] on {first.device}: bring them together")
        if tensor.shape != first.shape:
            shapes = f"{name} has the shape {list(tensor.shape)} and models[0] {list(first.shape)}"
            raise MismatchError(f"{shapes}: all must have the same")


def _check_cuts(magnitudes: Tensor | None, ties_ends: Tensor | None, wanted: tuple[Tensor, Tensor]) -> None:
    for name, given, like in zip(("magnitudes", "ties_ends"), (magnitudes, ties_ends), wanted, strict=True):
        if given is None:
            raise MismatchError(f"{name} is missing: give both outcomes of threshold, or none")
        if (given.shape, given.dtype, given.device) != (like.shape, like.dtype, like.device):
            raise MismatchError(
                f"{name} is {list(given.shape)}, {given.dtype}, on {given.device} where {list(like.shape)}, "
                f"{like.dtype}, on {like.device} belongs: give what threshold returned for these models"
            )


def _like_cuts(models: Sequence[Tensor], base: Tensor | None) -> tuple[Tensor, Tensor]:
    """Magnitudes and ties_ends, in the precision in which magnitudes are compared."""
    precision = torch.promote_types(_promoted(models, base), torch.float32)
    return models[0].new_empty(len(models), dtype=precision), models[0].new_empty(len(models), dtype=torch.int64)


def _promoted(models: Sequence[Tensor], base: Tensor | None) -> torch.dtype:
    return reduce(torch.promote_types, [tensor.dtype for tensor in _all(models, base)])


def _all(models: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    return [*models] if base is None else [*models, base]


# --- from tensors to a provider ---


@contextmanager
def _at(
    op: str, models: Sequence[Tensor], base: Tensor | None, *outputs: torch.dtype
) -> Iterator[tuple[backends.Provider, Inputs, Run]]:
    """The provider of an op, the addresses of its inputs, which hold within the block, and how it runs."""
    held = [tensor.contiguous() for tensor in _all(models, base)]
    views = tuple(View(tensor.data_ptr(), _DTYPES[tensor.dtype]) for tensor in held)
    inputs = Inputs(held[0].numel(), views[: len(models)], None if base is None else views[-1])
    device = held[0].device
    provider = _provider(op, device.type, frozenset([*(tensor.dtype for tensor in held), *outputs]))
    if device.type == "cpu":
        yield provider, inputs, Run(threads=torch.get_num_threads())
        return
    with torch.cuda.device(device):
        yield provider, inputs, Run(device=device.index, stream=torch.cuda.current_stream().cuda_stream)


@cache
def _provider(op: str, device: str, dtypes: frozenset[torch.dtype]) -> backends.Provider:
    kind = "cpu" if device == "cpu" else "gpu"
    return backends.choose("auto", {_DTYPES[dtype] for dtype in dtypes}, op=op, device=kind)


def _may_wait(op: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise BackendError(f"fastmerge::{op} waits for its outcome here: call it before the graph is captured")


def _with_cuts(sweeps: Sequence[Sweep], cuts: Sequence[tuple[float, int]]) -> list[Sweep]:
    def cut(part: Part, magnitude: float, ties_end: int) -> Part:
        return replace(part, magnitude=magnitude, ties_end=ties_end)

    return [replace(sweep, parts=tuple(map(cut, sweep.parts, *zip(*cuts, strict=True)))) for sweep in sweeps]


# --- the provider cuda: queued on the stream; its records of cuts are rows of two int64, the first half a float32 ---


def _queue_merge(
    cuda: Any,
    inputs: Inputs,
    sweeps: Sequence[Sweep],
    targets: Sequence[Target],
    magnitudes: Tensor | None,
    ties_ends: Tensor | None,
    run: Run,
) -> None:
    cuts = None
    if magnitudes is not None and ties_ends is not None:
        cuts = ties_ends.new_empty((len(inputs.models), 2))
        cuts.view(torch.float32)[:, 0] = magnitudes
        cuts[:, 1] = ties_ends
    cuda.merge_async(inputs, sweeps, targets, 0 if cuts is None else cuts.data_ptr(), run)


def _queue_threshold(
    cuda: Any, inputs: Inputs, ranks: Sequence[int], magnitudes: Tensor, ties_ends: Tensor, run: Run
) -> None:
    cuts = ties_ends.new_empty((len(ranks), 2))
    workspace = ties_ends.new_empty(cuda.workspace_bytes(inputs, run), dtype=torch.uint8)
    cuda.threshold_async(inputs, ranks, cuts.data_ptr(), workspace.data_ptr(), run)
    magnitudes.copy_(cuts.view(torch.float32)[:, 0])
    ties_ends.copy_(cuts[:, 1])


# --- registration ---

_SETTINGS = "int[] stages, float[] numbers, int[] wholes"
_CUTS = "Tensor? magnitudes=None, Tensor? ties_ends=None"
_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    f"merge(Tensor[] models, Tensor? base, {_SETTINGS}, ScalarType? out_dtype=None, {_CUTS}) -> Tensor[]": (
        _merge,
        _like_merged,
    ),
    "gram(Tensor[] models, Tensor? base=None) -> Tensor": (_gram, _like_gram),
    "threshold(Tensor[] models, Tensor? base, SymInt[] ranks) -> (Tensor magnitudes, Tensor ties_ends)": (
        _threshold,
        _like_threshold,
    ),
    f"norms(Tensor[] models, Tensor? base, {_SETTINGS}) -> Tensor": (_norms, _like_norms),
}


def _registered() -> Any:
    """By `Library` and not `custom_op`, whose layers of Python cost 10 microseconds per call on top of 6."""
    library: Any = torch.library.Library("fastmerge", "DEF")  # type: ignore[no-untyped-call]
    for schema, (op, like) in _OPS.items():
        name = schema.partition("(")[0]
        tags = [torch.Tag.pt2_compliant_tag]
        if name in ("gram", "norms") and hasattr(torch.Tag, "cudagraph_unsafe"):  # a tag that older torch lacks
            tags.append(torch.Tag.cudagraph_unsafe)
        library.define(schema, tags=tags)
        for key in ("CPU", "CUDA"):
            library.impl(name, op, key)
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"fastmerge::{name}", like, lib=library)
    return library


_LIBRARY = _registered()
