"""A recipe of several documents as several merges, where the models between are kept."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
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


def steps(recipe: Recipe, between: Path, out: Path | None) -> list[Step]:
    """The merges of a recipe's documents in the order in which they need one another; the models of those with a name
    are in folders of that name in `between`, and that of the one without in `out`. Raises RecipeError for a name that
    no folder can have, a place that is an input's, or none."""
    models = [model for document in recipe.documents for model in document.models]
    halves = [half for model in models for half in (model, model.adapter) if half]
    inputs = {os.path.realpath(half.path) for half in halves if half.path}
    places: dict[str | None, Path] = {}
    for document in recipe.documents:
        place = places[document.name] = _place(document, between, out)
        if os.path.realpath(place) in inputs:
            raise RecipeError(f"the output folder {place} is an input: choose another", document.place)
        inputs.add(os.path.realpath(place))
    again = f"multi mergekit_config.yml --intermediate-dir {shlex.quote(between.name or '.')}"
    if out is not None and None in places:
        again += f" --out-path {shlex.quote(out.name)}"
    return [
        Step(Recipe(recipe.text, (_placed(document, places),), again if document.name else ""), places[document.name])
        for document in recipe.documents
    ]


def _place(document: Document, between: Path, out: Path | None) -> Path:
    """Where a document's model goes."""
    name = document.name
    if name is None:
        if out is None:
            raise RecipeError("this document has no name, so say with --out-path where its model goes", document.place)
        return out
    if Path(name).name != name or name == ".." or not name.isprintable():
        raise RecipeError(f"no folder can have the name {name!r}, in which its model is kept", document.place)
    return between / name


def _placed(document: Document, places: Mapping[str | None, Path]) -> Document:
    """The document, in whose models other documents are folders."""

    def found(model: Model) -> Model:
        return model._replace(path=places[model.name]) if model.name in places else model

    return document.with_models(found)
