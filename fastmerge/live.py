"""Merges of what is in memory: single tensors, state dicts, and into the weights of live modules."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from . import tensors
from .errors import MismatchError
from .fit import FLOATS
from .keywords import Keyword
from .merging import Merging
from .states import StateDict, Weights, weights_of
from .tensors import Held


def merge_tensors(
    method: str,
    models: Sequence[Any],
    base: Any = None,
    *,
    out: Any = None,
    seed: int = 0,
    name: str = "",
    backend: str = "auto",
    threads: int | None = None,
    nonfinite: str = "error",
    **parameters: Keyword,
) -> Any:
    """Merges tensors of one shape into one.

        merged = fastmerge.merge_tensors("ties", [one, other], base, weight=[0.7, 0.3], density=0.2, lambda_=0.9)

    The bits are those of a merge from disk of a tensor of this name, with the same seed and parameters. Nothing is
    copied; what cannot be read where it lies is an error. Gradients do not go through.

    Args:
        method: its name in a recipe; docs/methods.md has each with its formula, paper and parameters.
        models: tensors of any one shape, contiguous, on one device, CPU or CUDA: of torch, arrays of numpy, or what has
            `__dlpack__`. Their dtypes are bfloat16, float16 and float32, also mixed, and float64 on a CPU; numpy has
            bfloat16 where ml_dtypes is installed.
        base: what deltas are taken from; or one of the two that slerp goes between. It may be one of `models`.
        out: a tensor of torch or numpy for the result, of the models' shape and on their device, of any of the dtypes.
            It may be one of the inputs, and must not overlap them otherwise. If an error is raised it is unchanged, but
            for NaN and Inf in the inputs where it is none of them.
        seed: of the random drops.
        name: of the tensor, on which random drops depend.
        backend: "auto", or a provider by name ("cpu", "torch", "cuda", "triton"), which then never falls back.
        threads: workers on a CPU; by default one for each processor that this process may use.
        nonfinite: "error", or "propagate": NaN and Inf in the inputs go where the arithmetic takes them.
        parameters: those of the method by their names in a recipe; `lambda`, a word of Python, is `lambda_`. Where each
            model has its own (weight, density, gamma, epsilon, scale), one value for all, or a list with one for each.

    Returns:
        `out`, or a new tensor: of torch where an input is, or where torch is installed and all came by DLPack; else of
        numpy. Its dtype is that of the inputs, and where theirs differ what torch promotes them to: bfloat16 with
        float16 gives float32.

    Raises:
        RecipeError: the method, a parameter or its value.
        MismatchError: tensors that do not fit one another or cannot be read, or an `out` that overlaps one of them.
        NonFiniteError: NaN or Inf in an input.
        BackendError: nobody merges these tensors here, or not the one asked for.
        TypeError: something is no tensor.
    """
    ours = [tensors.held(model, f"models[{at}]") for at, model in enumerate(models)]
    at = next((at for at, model in enumerate(models) if model is base), None)
    origin = None if base is None else tensors.held(base, "base") if at is None else ours[at]
    target = None if out is None else tensors.writable(out, "out")
    _check(ours, origin, target)
    states: list[Weights] = [StateDict(f"models[{at}]", {name: one}) for at, one in enumerate(ours)]
    apart = None if origin is None else states[at] if at is not None else StateDict("base", {name: origin})
    merging = Merging(method, states, apart, seed=seed, backend=backend, threads=threads, nonfinite=nonfinite)
    into: dict[str, Any] = {} if target is None else {name: target}
    merging.into(merging.plan(parameters, single=True), {"out": into})
    return into[name] if target is None else out


def merge_state_dicts(
    method: str,
    models: Sequence[Weights],
    base: Weights | None = None,
    *,
    out: MutableMapping[str, Any] | None = None,
    seed: int = 0,
    backend: str = "auto",
    threads: int | None = None,
    nonfinite: str = "error",
    **parameters: Keyword,
) -> MutableMapping[str, Any]:
    """Merges models that are in memory, or mapped from their checkpoints, tensor by tensor.

        merged = fastmerge.merge_state_dicts("ties", [one, "checkpoints/other"], base, weight=0.5, density=0.2)

    The bits are those of a merge from disk of the same tensors, with the same names, seed and parameters. Beside inputs
    and outputs there are in memory the outputs of a few jobs at most: 256 MB, or one tensor.

    Args:
        method: its name in a recipe; docs/methods.md has each with its formula, paper and parameters.
        models: mappings of names to tensors, as `merge_tensors` takes them, or checkpoints by their folder or file,
            which lie on the CPU. The tensors of a name lie on one device, those of other names may lie on others. A
            mapping is asked for each tensor twice, when its shape is looked at and when it is merged, and may make it
            each time anew. Integers and flags are no weights: they are copied where they are the same in all models.
        base: what deltas are taken from; or one of the two that slerp goes between. It may be one of `models`.
        out: where the merged tensors go. A mapping that is empty gets new ones, as they are done. One that is not has
            a tensor of torch or numpy for each, of any of the dtypes, which is written: its own memory, or exactly that
            of an input of the same name, as where `out` is the base itself. Names that share one tensor, as tied
            embeddings do, are merged once, as the first of them, and must do so in each model. If an error is raised
            while tensors are merged, those before are written.
        seed: of the random drops.
        backend: "auto", or a provider by name ("cpu", "torch", "cuda", "triton"), which then never falls back.
        threads: workers on a CPU; by default one for each processor that this process may use.
        nonfinite: "error", or "propagate": NaN and Inf in the inputs go where the arithmetic takes them.
        parameters: those of the method by their names in a recipe; `lambda`, a word of Python, is `lambda_`. A value is
            a scalar; a gradient over the layers, as in ``t=[0, 0.5, 1]``; or conditions on names, as in
            ``lambda_=[{"filter": "mlp", "value": 0.5}, {"value": 1}]``. Where each model has its own parameter (weight,
            density, gamma, epsilon, scale), a list has one of these for each model, as in ``weight=[0.3, [0, 1]]``,
            unless all in it are conditions, which are then for all models.

    Returns:
        `out`, or a new dict, in the order of the base's names. Tensors that are new are of torch where an input is, or
        where torch is installed and all are mapped; else of numpy. Their dtypes are those of the inputs, and where
        these differ what torch promotes them to.

    Raises:
        RecipeError: the method, a parameter or its value.
        CheckpointError: a folder or file that holds no sound model.
        MismatchError: models that do not fit one another or `out`, with the first 20 reasons; tensors that cannot be
            read, or that overlap in memory.
        NonFiniteError: NaN or Inf in an input.
        BackendError: nobody merges these tensors here, or not the one asked for.
        TypeError: something is no tensor.
    """
    merging = Merging(method, models, base, seed=seed, backend=backend, threads=threads, nonfinite=nonfinite)
    stage = merging.plan(parameters)
    into = {} if out is None else out
    merging.into(stage, {"out": into})
    return {job.name: into[job.name] for job in stage.jobs} if out is None else out


def merge_into(
    module: Any,
    method: str,
    models: Sequence[Weights],
    base: Weights | None = None,
    *,
    seed: int = 0,
    backend: str = "auto",
    threads: int | None = None,
    nonfinite: str = "error",
    **parameters: Keyword,
) -> None:
    """Merges models into the weights of a live module, which are written where they are.

        fastmerge.merge_into(model, "task_arithmetic", ["checkpoints/one", "checkpoints/other"], base, weight=0.4)

    As `merge_state_dicts` with ``out=module.state_dict(keep_vars=True)``: parameters, and the buffers that are saved
    with them, by their names in a state dict, each in the dtype that it has. The module may be a model itself, or the
    base, by its `state_dict()`. What is tied is merged once, by its first name, and stays tied; the models may lack its
    other names. Parameters keep their `requires_grad`; as under `torch.no_grad` nothing is recorded, and a graph that
    needs the old values fails when it is run backwards.

    Args:
        module: a `torch.nn.Module` whose weights are all there, on the device of the models'.

    The other arguments and the errors are those of `merge_state_dicts`.
    """
    merging = Merging(method, models, base, seed=seed, backend=backend, threads=threads, nonfinite=nonfinite)
    merging.into(merging.plan(parameters), {"module": weights_of(module)})


def _check(models: Sequence[Held], base: Held | None, out: Held | None) -> None:
    """What does not fit in a merge of single tensors, in fewer words than of models."""
    named = [(f"models[{at}]", model) for at, model in enumerate(models)]
    named += [(name, each) for name, each in (("base", base), ("out", out)) if each is not None]
    for name, each in named:
        (first, lead), *_ = named
        if each.dtype not in FLOATS:
            raise MismatchError(f"{name} holds {each.dtype}: what is merged is one of {', '.join(FLOATS)}")
        if each.shape != lead.shape:
            fault = f"{name} has the shape {list(each.shape)} and {first} {list(lead.shape)}"
            raise MismatchError(f"{fault}: all must have the same")
        if each.device != lead.device:
            raise MismatchError(f"{name} lies on {each.device} and {first} on {lead.device}: bring them together")
