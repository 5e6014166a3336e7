"""An adapter and its base as one model: a recipe, merged by the ordinary engine."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..engine import Report, merge
from ..errors import RecipeError
from ..recipe import Model, Recipe

Name = str | os.PathLike[str]


def fuse(base: Name, adapter: Name, out: Name, **options: Any) -> Report:
    """Writes a base with an adapter as one model: W + scaling * B A in float32, rounded once to the dtype of W.

    A few megabytes at a time, whatever the size of the model: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732) and
    DoRA (arXiv:2402.09353), with all that PEFT saves of them. It is the recipe `passthrough` of ``base+adapter``.

    Args:
        base: a folder, or the id of a model on the hub, ``org/name`` or ``org/name@revision``.
        adapter: likewise, with adapter_config.json and adapter_model.safetensors.
        out: the folder to write.
        options: those of `fastmerge.merge`.

    Raises:
        FastmergeError: as `fastmerge.merge`; CheckpointError where the adapter has no place in the base.
    """
    return merge(recipe_of("passthrough", None, [(adapted(base, adapter), {})], {}), out, **options)


def adapted(base: Name, adapter: Name) -> dict[str, str]:
    """A base with an adapter, as a recipe names it."""
    return {"model": os.fspath(base), "lora": os.fspath(adapter)}


def recipe_of(
    method: str,
    base: Name | None,
    models: Sequence[tuple[str | dict[str, str], dict[str, Any]]],
    parameters: Mapping[str, Any],
) -> Recipe:
    """A recipe over models with parameters each, and those of all; JSON is YAML, but for characters that end its lines
    or that it knows by their numbers alone."""
    recipe: dict[str, Any] = {"merge_method": method}
    recipe |= {} if base is None else {"base_model": {"model": os.fspath(base)}}
    recipe |= {"parameters": dict(parameters)} if parameters else {}
    recipe["models"] = [{"model": model, "parameters": own} if own else {"model": model} for model, own in models]
    text = json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
    text = re.sub("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]", lambda one: f"\\u{ord(one[0]):04x}", text)
    try:
        made = Recipe.parse(text)
    except RecipeError as error:
        raise RecipeError(str(error).removeprefix(f"{error.place}: ")) from None
    return replace(made, documents=tuple(document.with_models(_nowhere) for document in made.documents))


def _nowhere(model: Model) -> Model:
    """A model without its place in a text, which nobody wrote."""
    adapter = None if model.adapter is None else _nowhere(model.adapter)
    hub = None if model.repository is None else replace(model.repository, place="")
    return model._replace(repository=hub, adapter=adapter)
