"""A recipe of several documents as several merges, where the models between are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .checkpoint import open_checkpoint
from .errors import CheckpointError, RecipeError
from .recipe import Document, Model, Recipe


class Step(NamedTuple):
    """One document's merge, and the folder of its model."""

    recipe: Recipe
    out: Path

    def done(self) -> bool:
        """Whether there is a complete model in its folder already, of whatever recipe."""
        try:
            open_checkpoint(self.out)
        except CheckpointError:
            return False
        return True


def steps(recipe: Recipe, between: Path, out: Path) -> list[Step]:
    """The merges of a recipe in the order in which they need one another; the models of documents with a name are in
    folders of that name in `between`. Raises RecipeError for a name that no folder can have, or that of an input."""
    *named, result = recipe.documents
    inputs = {os.path.realpath(model.path) for each in recipe.documents for model in each.models if model.path}
    places: dict[str | None, Path] = {}
    for document in named:
        name = str(document.name)
        if Path(name).name != name or name == ".." or not name.isprintable():
            raise RecipeError(f"no folder can have the name {name!r}, in which its model is kept", document.place)
        places[name] = between / name
    made = [*zip(named, places.values(), strict=True), (result, out)]
    for document, place in made:
        if os.path.realpath(place) in inputs:
            raise RecipeError(f"the output folder {place} is an input: choose another", document.place)
    return [Step(Recipe(recipe.text, (_placed(document, places),)), place) for document, place in made]


def _placed(document: Document, places: Mapping[str | None, Path]) -> Document:
    """The document, in whose models other documents are folders."""

    def found(model: Model) -> Model:
        return Model(model.name, places[model.name]) if model.name in places else model

    modules = []
    for module in document.modules:
        slices = [
            replace(piece, sources=tuple(replace(source, model=found(source.model)) for source in piece.sources))
            for piece in module.slices
        ]
        modules.append(replace(module, slices=tuple(slices)))
    base = document.base_model and found(document.base_model)
    return replace(document, modules=tuple(modules), base_model=base)
