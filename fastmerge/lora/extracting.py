"""The adapter that a fine-tune is of its base: its deltas at a rank, and whole what has none."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint import Checkpoint, TensorInfo, same_bytes, tokenizer_files
from ..configs import stated
from ..errors import CheckpointError, FastmergeWarning, MismatchError, NonFiniteError, RecipeError
from ..fit import FLOATS
from ..layers import is_embedding, is_head
from ..planner import plan
from ..sources.lora import Adapted, common_parts
from .factors import Dense
from .fusing import Name, recipe_of
from .output import AdapterReport, NewAdapter, check_rank, read


def extract(
    base: Name,
    finetuned: Name,
    out: Name,
    *,
    rank: int | None = None,
    energy: float | None = None,
    whole: bool = True,
    overwrite: bool = False,
) -> AdapterReport:
    """Makes an adapter of what a fine-tune changed: of each weight of a layer the delta, [out, in], at a rank.

    The factors are those of `fastmerge.lora.factors.Dense` (Halko et al., SIAM Review 2011), in the dtype of the
    fine-tune, one delta in memory at a time. What has no factors and differs is kept whole, so that the adapter gives
    the fine-tune: norms, embeddings and new modules in modules_to_save, biases by ``bias: all``. Embeddings that are
    tied to the head, or have another number of rows, take the place of the base's when PEFT loads the adapter; for
    other rows resize the base first (resize_token_embeddings). Modules are called what the base's file calls them.

    Args:
        base: a folder, an id on the hub, or either with an adapter, ``base+adapter``.
        finetuned: likewise; with the same base and its own adapter DoRA becomes plain LoRA.
        out: the folder to write.
        rank: what no module exceeds.
        energy: in the place of that, the share of the squared norm of each delta that its factors hold, in (0, 1]; each
            module has the least rank for it, and rank_pattern says which.
        whole: whether what has no factors is kept; else a FastmergeWarning lists it.
        overwrite: replace an earlier output in `out`.

    Raises:
        RecipeError: not one of rank and energy, or one that cannot be.
        CheckpointError: a model that is none, or whose weights are codes.
        MismatchError: models that have nothing to do with one another, or are the same.
        NonFiniteError: NaN or Inf among their weights.
        OutputError: the folder cannot be written.
    """
    if (rank is None) == (energy is None):
        raise RecipeError("give either rank or energy: how large a module's factors are, or how much they hold")
    check_rank(rank)
    if energy is not None and not 0.0 < energy <= 1.0:
        raise RecipeError(f"energy is {energy}, and must be above 0 and at most 1")
    one, two = _opened(base), _opened(finetuned)
    pair = _Pair(one, two)
    inputs = [path for model in (one, two) for path in (model.inputs if isinstance(model, Adapted) else (model.path,))]
    made = NewAdapter(Path(out), (one, two), inputs=inputs, overwrite=overwrite)
    turned = False
    for name in pair.layers:
        delta = pair.delta(name)
        if not delta.norm:
            continue
        factors = delta.truncated(rank) if rank is not None else delta.holding(float(energy or 1.0))
        by_inputs = pair.by_inputs(name)
        turned |= by_inputs
        made.add(name.removesuffix(".weight"), delta, factors, two.tensors[name].dtype, turned=by_inputs)
    if not made.modules:
        raise MismatchError(f"{one.name} and {two.name} do not differ in the weights of any layer: there is no adapter")
    left_out = list(pair.others(made.modules))
    if whole:
        pair.keep(made, left_out)
        left_out = []
    _warn(one, two, left_out)
    id, _, revision = one.name.partition("@") if one.commit else (one.name, "", "")
    command = ["extract", os.fspath(base), os.fspath(finetuned), Path(out).name]
    command += ["--energy", str(energy)] if rank is None else ["--rank", str(rank)]
    return made.write(
        {
            "base_model_name_or_path": id,
            "revision": revision or None,
            "task_type": _task(two.config or one.config),
            "fan_in_fan_out": turned,
        },
        names=[one.name, two.name],
        command=command if whole else [*command, "--no-whole"],
        left_out=left_out,
        files=tokenizer_files(two.folder) if pair.resized else {},
    )


def _opened(name: Name) -> Checkpoint:
    """A model as recipes find it."""
    model = os.fspath(name)
    (stage,) = plan(recipe_of("passthrough", None, [(model, {})], {})).stages
    (held,) = stage.models
    assert isinstance(held, Checkpoint), "a recipe of one document has no other stage"
    return held


def _warn(one: Checkpoint, two: Checkpoint, left_out: Sequence[str]) -> None:
    if lacking := [name for name in one.tensors if name not in two.tensors and not is_head(name)]:
        fault = f"{two.name} has no {', '.join(lacking[:_LISTED])}: what {one.name} has there stays"
        warnings.warn(fault, FastmergeWarning, stacklevel=3)
    if left_out:
        rest = f" and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
        fault = f"what has no factors is left out, though it differs: {', '.join(left_out[:_LISTED])}{rest}"
        warnings.warn(fault, FastmergeWarning, stacklevel=3)


_LISTED = 20  # names in one message


def _task(config: Mapping[str, Any]) -> str | None:
    """The task_type of PEFT, where the architecture tells."""
    names = config.get("architectures") or [""]
    return next((task for ending, task in _TASKS.items() if str(names[0]).endswith(ending)), None)


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


class _Pair:
    """A base and its fine-tune."""

    def __init__(self, one: Checkpoint, two: Checkpoint) -> None:
        self._one, self._two = one, two
        tie = stated(two.config, "tie_word_embeddings")
        self._tied = tie is True or (tie is None and not any(map(is_head, two.tensors)))
        self._known = dict(_known(one.tensors))
        if not one.tensors.keys() & two.tensors.keys():
            names = f"{next(iter(one.tensors), '-')!r} and {next(iter(two.tensors), '-')!r}"
            raise MismatchError(f"{one.name} and {two.name} have no tensor in common, as in {names}: mend their names")

    @property
    def layers(self) -> list[str]:
        """The weights that have factors: matrices of both, of one shape, and no embeddings."""
        return [name for name, info in self._two.tensors.items() if self._has_factors(name, info)]

    @property
    def resized(self) -> bool:
        """Whether the vocabulary has another size."""
        return any(_of_vocabulary(name) and self._misfits(name) for name in self._two.tensors)

    def delta(self, name: str) -> Dense:
        """A delta in float32, or in float64 where one of the two is that."""
        rows, width = self._two.tensors[name].shape
        dtype = np.float64 if "F64" in (self._one.tensors[name].dtype, self._two.tensors[name].dtype) else np.float32
        matrix = np.empty((rows, width), dtype)
        for first, before, after in self._rows(name):
            matrix[first : first + len(after)] = after - before
        return Dense(matrix)

    def others(self, modules: Sequence[str]) -> Iterator[str]:
        """The tensors that differ beside those of these modules' weights."""
        weights = {f"{module}.weight" for module in modules}
        for name, info in self._two.tensors.items():
            if name in weights or (self._tied and is_head(name)):
                continue
            if name not in self._one.tensors or self._misfits(name) or self._differs(name):
                if info.dtype not in FLOATS:
                    raise CheckpointError(f"{name!r} is {info.dtype} in {self._two.name}: dequantise that first")
                yield name

    def keep(self, made: NewAdapter, names: Sequence[str]) -> None:
        """Tensors that take the place of the base's: alone, or with all of their module."""
        for name in names:
            module, _, last = name.rpartition(".")
            tied = _of_vocabulary(name) and (self._tied or self._misfits(name))
            layer = self._two.tensors.get(f"{module}.weight")
            bias = last == "bias" and layer is not None and len(layer.shape) > 1
            if tied or bias or not module or module in made.modules:
                made.keep(name, self._two, name)
                continue
            made.save_module(module)
            for each in self._two.tensors:
                if each.startswith(f"{module}."):
                    made.keep(each, self._two, each)

    def by_inputs(self, name: str) -> bool:
        """Whether a weight is stored as [in, out], which its bias tells, or that of the nearest module that has one."""
        module = name.removesuffix(".weight")
        nearest = max(self._known, key=lambda other: common_parts(other, module), default="")
        return common_parts(nearest, module) > 0 and self._known[nearest]

    def _has_factors(self, name: str, info: TensorInfo) -> bool:
        floats = name in self._one.tensors and {info.dtype, self._one.tensors[name].dtype} <= FLOATS.keys()
        matrix = name.endswith(".weight") and len(info.shape) == 2 and min(info.shape) > 0
        looked_up = is_embedding(name) or _LOOKED_UP.search(name) or (self._tied and is_head(name))
        return floats and matrix and not looked_up and not self._misfits(name)

    def _misfits(self, name: str) -> bool:
        before = self._one.tensors.get(name)
        return before is not None and before.shape != self._two.tensors[name].shape

    def _differs(self, name: str) -> bool:
        if not {self._one.tensors[name].dtype, self._two.tensors[name].dtype} <= FLOATS.keys():
            return not same_bytes(self._one, name, self._two, name)
        return any((before != after).any() for _, before, after in self._rows(name))

    def _rows(self, name: str) -> Iterator[tuple[int, Any, Any]]:
        shape = self._two.tensors[name].shape or (1,)
        step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
        for first in range(0, shape[0], step):
            before, after = (read(model, name, first, step) for model in (self._one, self._two))
            if not (np.isfinite(before).all() and np.isfinite(after).all()):
                holder = self._two if np.isfinite(before).all() else self._one
                raise NonFiniteError(f"{holder.name}: tensor {name!r} holds NaN or Inf; mend the model")
            yield first, before, after


_BLOCK = 1 << 20  # elements
#: Matrices of which single rows are looked up, beside those that are called embeddings.
_LOOKED_UP = re.compile(r"relative_attention_bias|(?:^|\.)(?:wte|wpe)\.")


def _of_vocabulary(name: str) -> bool:
    return is_embedding(name) or is_head(name)


def _known(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bool]]:
    """Modules whose bias tells whether they are stored as [in, out]."""
    for name, info in tensors.items():
        module = name.removesuffix(".bias")
        weight = tensors.get(f"{module}.weight")
        if module != name and weight is not None and len(weight.shape) == 2 and weight.shape[0] != weight.shape[1]:
            yield module, info.shape == weight.shape[1:]
