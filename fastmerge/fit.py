"""What must fit for models to be merged: names, shapes, dtypes, tied embeddings, and weights that are numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from .checkpoint import Checkpoint, TensorInfo, same_bytes
from .configs import Described, stated
from .errors import FastmergeWarning, MismatchError
from .layers import is_embedding, is_head

#: What can be merged, by what holds what.
FLOATS = {"BF16": 1, "F16": 1, "F32": 2, "F64": 3}
#: What can only be copied, where it is the same in all models.
BUFFERS = frozenset(("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"))

_LISTED = 20


class Fit:
    """Gathers what does not fit, to raise it together. Models are spoken of by their index."""

    def __init__(self, models: Sequence[Described]) -> None:
        self.models = models
        self.problems: list[str] = []
        self.lacking: dict[int, list[str]] = {}

    def name(self, model: int) -> str:
        return repr(self.models[model].name)

    def tensor(self, name: str, models: Sequence[int], infos: Sequence[TensorInfo | None], origin: int | None) -> bool:
        """Whether an output can be made of what each of some models has (None: nothing). Where deltas are taken from
        the one at `origin`, another that lacks the tensor has no delta."""
        if infos[0] is not None and infos.count(infos[0]) == len(infos):  # files alike share what is known of them
            return True
        problem = self._misfit(name, models, infos, origin)
        if problem is not None:
            self.problems.append(problem)
        return problem is None

    def left_out(self) -> frozenset[str]:
        """Copies that are left out, such as output heads tied to the embeddings: a loader takes the original there."""
        flags = [stated(model.config, "tie_word_embeddings") for model in self.models]
        names = dict.fromkeys(name for model in self.models for name in model.tensors)
        if True in flags and False in flags:
            heads = [name for name in names if is_head(name)]
            self.problems.extend(self._tied(name, flags.index(True), flags.index(False)) for name in heads)
            return frozenset(heads)
        if False in flags:
            return frozenset()
        held = set(names).intersection(*[model.tensors for model in self.models])
        loose = names if all(flags) else names.keys() - held
        embeddings = [name for name in names if name in held and is_embedding(name)] if loose else []
        return frozenset(name for name in loose if any(self._same(name, one) for one in _originals(name, embeddings)))

    def _same(self, name: str, original: str) -> bool:
        """Whether a tensor is another one in each model that has it; of what is stored nowhere yet, it is assumed."""
        return all(
            original in model.tensors
            and model.tensors[name].shape == model.tensors[original].shape
            and (type(model) is not Checkpoint or same_bytes(model, name, model, original))
            for model in self.models
            if name in model.tensors
        )

    def check(self, place: str, merged: Iterable[int]) -> None:
        """Raises `MismatchError` with the first problems, and with quantised weights among the models `merged`; warns
        of models that lack tensors."""
        codes = {model: reason for model, held in enumerate(self.models) if (reason := _quantised(held)) is not None}
        counted = codes if self.problems or not codes else codes.keys() & set(merged)
        quantised = [
            f"{self.name(model)} is quantised ({reason}): dequantise it first"
            for model, reason in codes.items()
            if model in counted
        ]
        if problems := [*quantised, *self.problems]:
            renames = [rename for model in range(1, len(self.models)) if (rename := self._rename(model)) is not None]
            listed = [*renames, *problems]
            more = f"\n  and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
            lines = "".join(f"\n  {problem}" for problem in listed[:_LISTED])
            raise MismatchError(f"{place}: the models do not fit one another:{lines}{more}")
        for model, names in self.lacking.items():
            fault = f"{self.name(model)} lacks {len(names)} tensors, such as {names[0]!r}: there it counts as the base"
            warnings.warn(fault, FastmergeWarning, stacklevel=2)

    def _misfit(
        self, name: str, models: Sequence[int], infos: Sequence[TensorInfo | None], origin: int | None
    ) -> str | None:
        if None not in infos and len({(info.dtype, info.shape) for info in infos if info is not None}) == 1:
            return None
        (lead, first), *others = having = [
            (model, info) for model, info in zip(models, infos, strict=True) if info is not None
        ]
        if len(having) < len(infos):
            lacking = [model for model, info in zip(models, infos, strict=True) if info is None]
            if is_head(name):
                return self._tied(name, lacking[0], lead)
            if origin is None or infos[origin] is None:
                return f"{name!r} is missing in {', '.join(map(self.name, lacking))}"
            for model in lacking:
                self.lacking.setdefault(model, []).append(name)
        for model, info in others:
            if info.shape != first.shape:
                shapes = f"{list(first.shape)} in {self.name(lead)} and {list(info.shape)} in {self.name(model)}"
                return f"{name!r} is {shapes}{_why(name, first.shape, info.shape)}"
            if info.dtype != first.dtype and not (info.dtype in FLOATS and first.dtype in FLOATS):
                return f"{name!r} is {first.dtype} in {self.name(lead)} and {info.dtype} in {self.name(model)}"
        return None

    def _tied(self, name: str, tied: int, untied: int) -> str:
        return (
            f"{name!r} is tied to the embeddings in {self.name(tied)} and not in {self.name(untied)}: save both one"
            f" way, with {name!r} and tie_word_embeddings: false, or without it and with true"
        )

    def _rename(self, model: int) -> str | None:
        """The renaming that would make most of a model's names those of the first."""
        names, wanted = set(self.models[model].tensors), set(self.models[0].tensors)
        missing, extra = wanted - names, names - wanted
        if not missing or not extra:
            return None

        def fits(renamed: Sequence[str]) -> bool:
            return 2 * len(missing.intersection(renamed)) > len(missing)

        probe = max(missing, key=len)
        added = next((name[: -len(probe)] for name in extra if name.endswith(f".{probe}")), None)
        dropped = next((probe[: -len(name)] for name in extra if probe.endswith(f".{name}")), None)
        if added and fits([name.removeprefix(added) for name in extra]):
            how = f"that begin with {added!r}, unlike {self.name(0)}: remove that from them"
        elif dropped and fits([f"{dropped}{name}" for name in extra]):
            how = f"without the {dropped!r} of {self.name(0)}: put that before them"
        elif fits([name.replace("_orig_mod.", "") for name in extra]):
            how = "with '_orig_mod.', which torch.compile puts there: remove that from them"
        else:
            return None
        return f"{self.name(model)} has names {how}"


def _originals(name: str, embeddings: Iterable[str]) -> Iterable[str]:
    """What a tensor may be a copy of: an output head of embeddings, those of a stack of what its stacks share."""
    if is_head(name):
        return embeddings
    if name.endswith(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")):
        return [one for one in embeddings if one.endswith("shared.weight")]
    return [name.replace(".decoder.", ".")] if name.endswith(".decoder.bias") else []


def common(infos: Iterable[TensorInfo]) -> str:
    """The dtype that holds all of some tensors that fit: what torch promotes to."""
    dtypes = {info.dtype for info in infos}
    if len(dtypes) == 1:
        return dtypes.pop()
    widest = max(dtypes, key=FLOATS.__getitem__)
    return "F32" if FLOATS[widest] == 1 else widest


def _why(name: str, first: tuple[int, ...], second: tuple[int, ...]) -> str:
    if first[::-1] == second:
        return ": one is transposed"
    if first[1:] == second[1:] and (is_head(name) or is_embedding(name)):
        return ": their vocabularies differ; tokenizer_source: union in the recipe goes by token"
    return ""


_CODES = (".qweight", ".qzeros", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".absmax", ".SCB", "_blocks")


def _quantised(model: Described) -> str | None:
    """What shows that a model's numbers are codes, which mean nothing without their scales."""
    if isinstance(config := stated(model.config, "quantization_config"), dict):
        return f"quantization_config in config.json, method {config.get('quant_method', 'unknown')!s}"
    names = (name for name in model.tensors if name.endswith(_CODES))
    return next((f"{name!r} is {model.tensors[name].dtype}" for name in names), None)
