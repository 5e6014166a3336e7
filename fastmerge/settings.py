"""The settings of each tensor: a parameter's value is from the strongest place of the recipe that gives one."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

from .errors import RecipeError
from .layers import Row
from .methods import Measured, Parameter, Settings, Value
from .parameters import Parameters
from .recipe import Document, Module, Slice
from .sweep import Part, Sweep


class Resolver:
    """The settings of the tensors of one slice; tensors with the same values share one."""

    def __init__(self, document: Document, module: Module, slice_: Slice, seed: int) -> None:
        self.method = document.method
        self.slice = slice_
        self.seed = seed
        levels = (slice_.parameters, module.parameters, document.parameters)
        parameters = document.method.parameters
        self.shared = [_Lookup(p, levels, document.place) for p in parameters if not p.per_model]
        self.models = [
            [_Lookup(p, (source.parameters, *levels), source.place) for p in parameters if p.per_model]
            for source in slice_.sources
        ]
        self.varying = [lookup for lookup in self.shared if lookup.varies]
        self.varying_models = [[lookup for lookup in lookups if lookup.varies] for lookups in self.models]
        self.varies = bool(self.varying) or any(self.varying_models) or document.method.random
        self.made: dict[Hashable, tuple[Settings, bool]] = {}

    def resolve(self, row: Row, takers: tuple[int, ...]) -> tuple[Settings, bool]:
        """The settings of a tensor in which some sources take part, and whether they make its sweep change nothing."""
        shared = [lookup.read(row, row.name) for lookup in self.varying]
        own = [lookup.read(row, row.inputs[i]) for i in takers for lookup in self.varying_models[i]]
        key = (takers, *shared, *own)
        if key not in self.made:
            self.made[key] = self._make(row, takers)
        settings, identity = self.made[key]
        if self.method.random:
            keys = tuple(_key(self.seed, place, row.name) for place in range(len(takers)))
            settings = Settings(settings.shared, settings.models, keys)
        return settings, identity

    def _make(self, row: Row, takers: tuple[int, ...]) -> tuple[Settings, bool]:
        settings = Settings(
            {lookup.parameter.name: self._needed(lookup, row, row.name) for lookup in self.shared},
            tuple(
                {lookup.parameter.name: self._needed(lookup, row, row.inputs[i]) for lookup in self.models[i]}
                for i in takers
            ),
        )
        if fault := self.method.fault(settings):
            raise RecipeError(f"{fault}, for {row.name!r}", self.slice.place)
        if self.method.selects or self.method.gram or self.method.random or self.method.direct:
            return settings, False
        sweep = self.method.sweep(settings, Measured())
        if abs(sweep.divisor) < 1e-8:
            raise RecipeError(
                f"the weights sum to {sweep.divisor:g} for {row.name!r}, and normalize divides by that;"
                " change them, or set normalize: false",
                self.slice.place,
            )
        return settings, sweep == Sweep((Part(),))

    def _needed(self, lookup: _Lookup, row: Row, tensor: str) -> Value:
        value = lookup.read(row, tensor)
        if value is None and lookup.parameter.required:
            raise RecipeError(
                f"{self.method.name} needs the parameter {lookup.parameter.name}, and nothing gives it for {tensor!r}",
                lookup.place,
            )
        return value


class _Lookup:
    """One parameter, of one model or of all, in the places that set it, strongest first."""

    def __init__(self, parameter: Parameter, levels: Sequence[Parameters], place: str) -> None:
        self.parameter = parameter
        self.place = place
        self.settings = [level[parameter.name] for level in levels if parameter.name in level]
        self.constant = self.settings[0].constant if self.settings else parameter.default
        self.varies = bool(self.settings) and self.constant is None

    def read(self, row: Row, tensor: str) -> Value:
        if not self.varies:
            return self.constant
        values = (setting.read(tensor, row.t) for setting in self.settings)
        return next((value for value in values if value is not None), self.parameter.default)


def _key(seed: int, place: int, tensor: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{place}\0{tensor}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
