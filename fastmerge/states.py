"""State dicts with the interface of checkpoints, and the planner for merges in which some models are."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from . import tensors
from .checkpoint import Checkpoint, TensorInfo, open_checkpoint, same_bytes
from .errors import MismatchError
from .fit import Fit
from .planner import Planned, Planner, Source
from .recipe import Document, Model
from .tensors import CPU, Held

#: Of a tensor the device, and there its first byte and the one after its last.
Place = tuple[str, int, int]
#: A model: tensors by name, the folder or file of a checkpoint, or what is made of these.
Weights = Mapping[str, Any] | str | os.PathLike[str] | Checkpoint


class StateDict(Checkpoint):
    """A model in memory. Each tensor is asked for when the model is looked at, and again when it is read."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.path = self.folder = Path(name)
        self.commit = None
        self.config = {}
        self.files = ()
        self._values = values
        self._look()

    def _look(self) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        #: Of each tensor where it lies, from its first byte to its last, and whether it is torch's.
        self.places: dict[str, Place] = {}
        self.by_torch: dict[str, bool] = {}
        for tensor in self._values:
            one = self.held(tensor)
            self.tensors[tensor] = TensorInfo(tensor, one.dtype, one.shape, 0, one.nbytes)
            self.places[tensor] = (one.device, one.address, one.address + one.nbytes)
            self.by_torch[tensor] = one.of_torch

    def hold(self) -> None:
        """From here on each tensor stays where it is."""
        self._values = {tensor: self.held(tensor) for tensor in self._values}
        self._look()

    def held(self, tensor: str) -> Held:
        if not isinstance(tensor, str):
            raise TypeError(f"{self.name} has the key {tensor!r}: names of tensors are text")
        return tensors.held(self._values[tensor], f"{self.name}[{tensor!r}]")

    def address(self, tensor: str) -> tuple[int, object]:
        now, info = self.held(tensor), self.tensors[tensor]
        if (now.dtype, now.shape, now.device) != (info.dtype, info.shape, self.places[tensor][0]):
            raise MismatchError(f"{self.name}[{tensor!r}] is another tensor than when the merge began; merge again")
        return now.address, now

    def check_unchanged(self) -> None:
        """Whoever changes a tensor in memory is on this machine, and may."""


def opened(name: str, weights: Weights) -> Checkpoint:
    """A model; `name` is what errors call it where it is in memory."""
    if isinstance(weights, Checkpoint):
        return weights
    if isinstance(weights, str | os.PathLike):
        return open_checkpoint(os.fspath(weights))
    if isinstance(weights, Mapping):
        return StateDict(name, weights)
    kind = f"{type(weights).__module__}.{type(weights).__qualname__}"
    how = "its state_dict()" if hasattr(weights, "state_dict") else "tensors by name, or the folder of a checkpoint"
    raise TypeError(f"{name} is a {kind}: give {how}")


def weights_of(module: Any) -> MutableMapping[str, Any]:
    """The parameters and buffers of a torch.nn.Module as its state dict has them, where they are; of one that
    torch.compile made, under the names of the module within."""
    module = getattr(module, "_orig_mod", module)
    if not hasattr(module, "state_dict"):
        raise TypeError(f"module is a {type(module).__qualname__}: give a torch.nn.Module")
    weights: MutableMapping[str, Any] = module.state_dict(keep_vars=True)
    return weights


def same(one: Checkpoint, tensor: str, other: Checkpoint, theirs: str) -> bool:
    """Whether two tensors have the same bytes, wherever they are."""
    if not isinstance(one, StateDict) and not isinstance(other, StateDict):
        return same_bytes(one, tensor, other, theirs)
    return tensors.same_bytes(held_in(one, tensor), held_in(other, theirs))


def held_in(model: Checkpoint, tensor: str) -> Held:
    """A tensor of a model as it lies in memory; one that is mapped is kept there by its owner."""
    if isinstance(model, StateDict):
        return model.held(tensor)
    address, owner = model.address(tensor)
    info = model.tensors[tensor]
    return Held(owner, address, info.dtype, info.shape, CPU)


class InMemoryPlanner(Planner):
    """Plans a document whose models may be in memory, where a look at their bytes is one at memory."""

    def __init__(self, documents: Sequence[Document], models: Mapping[Model, Checkpoint], seed: int) -> None:
        super().__init__(documents, models, seed)
        self.fit = _Fit(self.models)

    def same(self, name: str, dtype: str, sources: Sequence[Source], infos: Sequence[TensorInfo | None]) -> bool:
        first, *others = (source for source, info in zip(sources, infos, strict=True) if info is not None)
        for other in others:
            if not same(self._of(first), first.tensor, self._of(other), other.tensor):
                pair = f"{self.fit.name(first.model)} and {self.fit.name(other.model)}"
                self.fit.problems.append(f"{name!r} holds {dtype} values, which differ in {pair}")
                return False
        return True

    def _of(self, source: Source) -> Checkpoint:
        model = self.models[source.model]
        assert not isinstance(model, Planned)
        return model


class _Fit(Fit):
    def _same(self, name: str, original: str) -> bool:
        return all(
            original in model.tensors
            and model.tensors[name].shape == model.tensors[original].shape
            and isinstance(model, Checkpoint)
            and same(model, name, model, original)
            for model in self.models
            if name in model.tensors
        )
