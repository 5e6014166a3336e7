"""Vocabularies: the tokens of a merge's output, and the row that each of its models has for them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, FastmergeWarning, RecipeError
from ..sources.rows import MEAN, PADDING, ZERO, RowMap
from .files import REMEDY, Tokenizer, below, extended, open_tokenizer, rewritten, with_added
from .setting import TokenizerSetting, TokenRow

_Ids = npt.NDArray[np.int64]  # [models, ids]


class Tokenized(NamedTuple):
    """A model's name, the files of its tokenizer by name (none where it has no tokenizer), and how many rows its
    embeddings have."""

    name: str
    files: Mapping[str, bytes]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`tokens` rows, and up to `size` of padding; a map to them for each model, in order. `files` are all of the
    tokenizer, by name. `moved` are the ids that are others than in the base: from there to here."""

    size: int
    tokens: int
    maps: tuple[RowMap, ...]
    files: dict[str, bytes]
    moved: dict[int, int]

    def token_ids(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """What changes in a config of the base, or in its generation_config.json: the ids of its special tokens."""
        changes: dict[str, Any] = {}
        for key, value in config.items():
            if key.endswith("_token_id") and isinstance(value, int):
                changes[key] = self.moved.get(value, value)
            elif key.endswith("_token_id") and isinstance(value, list):
                changes[key] = [self.moved.get(id_, id_) for id_ in value]
            elif key.endswith("_config") and isinstance(value, dict):
                changes[key] = {**value, **self.token_ids(value)}
        return {key: value for key, value in changes.items() if value != config[key]}


def vocabulary(models: Sequence[Tokenized], setting: TokenizerSetting, base: int = 0) -> Vocabulary:
    """The vocabulary that a recipe asks for; `base` is the index of the base or the first model.

    With source ``base`` it is that of the base, with ``union`` that and the tokens that the others know besides, in
    order of models and ids, as `files.extended` adds them; with a model it is that of the model. Tokens that
    the recipe names and it lacks are added. Ids never depend on hashing.

    A model has its own row for a token that it knows. For others it has the row that the recipe gives, else that of
    the only model that knows it, else zeros where none does, else the base's, else the mean of those that know it. An
    id at or beyond a model's `vocab_size` has no row there. Raises `CheckpointError` for a tokenizer that cannot be
    read, `RecipeError` for a row that is nowhere; a `FastmergeWarning` tells of a model without a tokenizer, which is
    taken for the base's, and of definitions that differ.
    """
    opened = _opened(models, base)
    known = [below(tokenizer, model.vocab_size) for tokenizer, model in zip(opened, models, strict=True)]
    origin = setting.source if isinstance(setting.source, int) else base
    start = opened[origin] if isinstance(setting.source, int) else known[base]
    donors = [tokenizer for model, tokenizer in enumerate(known) if model != origin]
    if setting.source == "union":
        whole = extended(start, donors)
    else:
        whole = extended(start, donors, [token for token in setting.tokens if token not in start.ids])
    whole = with_added(whole, [token for token in setting.tokens if token not in whole.ids])
    unchanged = whole.ids == opened[origin].ids and whole.added == opened[origin].added
    entries = {whole.ids[token]: (token, entry) for token, entry in setting.tokens.items() if entry is not None}
    given = {id_: _given(entry, token, known, models) for id_, (token, entry) in entries.items()}
    forced = [id_ for id_, (_, entry) in entries.items() if entry.force]
    size = -(-whole.size // setting.pad_to_multiple_of) * setting.pad_to_multiple_of
    moved = {id_: whole.ids[token] for token, id_ in opened[base].ids.items() if whole.ids.get(token, id_) != id_}
    return Vocabulary(
        size,
        whole.size,
        tuple(_maps(_rows(whole, known, models, origin), base, given, forced, size)),
        dict(opened[origin].files) if unchanged else rewritten(whole),
        moved,
    )


def _opened(models: Sequence[Tokenized], base: int) -> list[Tokenizer]:
    """The tokenizers; the base's for a model that has none."""
    own = open_tokenizer(models[base].name, models[base].files)
    if own is None:
        raise CheckpointError(f"{models[base].name!r} has no tokenizer, and the recipe asks for one; {REMEDY}")
    opened = []
    for place, model in enumerate(models):
        tokenizer = own if place == base else open_tokenizer(model.name, model.files)
        if tokenizer is None:
            fault = f"{model.name!r} has no tokenizer: its tokens are taken for those of {own.name!r}"
            warnings.warn(fault, FastmergeWarning, stacklevel=4)
        opened.append(tokenizer or replace(own, name=model.name))
    return opened


def _rows(whole: Tokenizer, known: Sequence[Tokenizer], models: Sequence[Tokenized], origin: int) -> _Ids:
    """The row of each id in each model, -1 where it has none. An id without a token is one that only the model at
    `origin` knows, whose ids these are."""
    rows = np.full((len(models), whole.size), -1, np.int64)
    ids = np.fromiter(whole.ids.values(), np.int64, len(whole.ids))
    for place, tokenizer in enumerate(known):
        rows[place, ids] = np.fromiter(map(tokenizer.ids.get, whole.ids, repeat(-1)), np.int64, len(ids))
    holes = np.setdiff1d(np.arange(whole.size), ids)
    rows[origin, holes] = np.where(holes < models[origin].vocab_size, holes, -1)
    return rows


def _maps(
    rows: _Ids, base: int, given: Mapping[int, tuple[int, int]], forced: Sequence[int], size: int
) -> list[RowMap]:
    """A map per model from the rows that they have for each id; `given` are model and row for ids, for all models where
    they are `forced`."""
    has = rows >= 0
    known_by = has.sum(axis=0)
    model = np.where(has[base], base, MEAN)
    model = np.where(known_by == 1, has.argmax(axis=0), model)
    model = np.where(known_by == 0, ZERO, model)
    row = np.where(model >= 0, rows[model, np.arange(len(model))], 0)
    averaged = np.flatnonzero(model == MEAN)
    row[averaged] = np.arange(len(averaged))
    columns = rows[:, averaged].T.tolist()
    means = tuple([tuple([(place, at) for place, at in enumerate(column) if at >= 0]) for column in columns])
    for id_, place in given.items():
        model[id_], row[id_] = place
    has[:, forced] = False
    padding = (0, size - len(model))
    return [
        RowMap(
            np.pad(np.where(own, place, model).astype(np.int32), padding, constant_values=PADDING),
            np.pad(np.where(own, rows[place], row), padding),
            means,
        )
        for place, own in enumerate(has)
    ]


def _given(entry: TokenRow, token: str, known: Sequence[Tokenizer], models: Sequence[Tokenized]) -> tuple[int, int]:
    """Model and row that the recipe gives to a token."""
    if entry.model is None:
        return ZERO, 0
    name, end = models[entry.model].name, models[entry.model].vocab_size
    wanted = token if entry.token is None else entry.token
    row = wanted if isinstance(wanted, int) else known[entry.model].ids.get(wanted)
    if row is None:
        remedy = "name a model that has, or {kind: zero}"
        raise RecipeError(f"{name!r} has no row for the token {wanted!r}; {remedy}", entry.place)
    if not 0 <= row < end:
        raise RecipeError(f"{name!r} has rows 0 to {end - 1}, and so no row {row}", entry.place)
    return entry.model, row
