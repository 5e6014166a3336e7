"""What a recipe says about the output's vocabulary: the keys `tokenizer` and `tokenizer_source`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from ..marked import Marked, meant, printable

Model = TypeVar("Model")


@dataclass(frozen=True, slots=True)
class TokenizerSetting:
    """Models are spoken of by their index among those of the document.

    `source` is whose tokenizer the output has; `tokens` are those that it must know, and where their rows come from
    (None: from where those of other tokens do). The rows become a multiple of `pad_to_multiple_of`.
    """

    source: Literal["base", "union"] | int
    tokens: Mapping[str, TokenRow | None]
    pad_to_multiple_of: int
    place: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row for the models that lack a token, with `force` for all: that of a `token` of a model, by its text or its id
    (None: of the same token); zeros when `model` is None."""

    model: int | None
    token: str | int | None
    force: bool
    place: str


def read_tokenizer(
    fields: Mapping[str, Marked], find: Callable[[Marked], Model], models: Sequence[Model]
) -> TokenizerSetting | None:
    """The setting in the fields of a document, None where it has none. `find` says which model a name means; each must
    be one of `models`, those of the document. Raises `RecipeError`."""
    reader = _Reader(lambda at, words: _index(at, words, find, models))
    if "tokenizer" in fields and "tokenizer_source" in fields:
        raise fields["tokenizer_source"].error("tokenizer and tokenizer_source are both given; keep tokenizer")
    if "tokenizer_source" in fields:
        at = fields["tokenizer_source"]
        return TokenizerSetting(reader.source(at), {}, 1, at.place)
    return reader.setting(fields["tokenizer"]) if "tokenizer" in fields else None


def _index(at: Marked, words: Sequence[str], find: Callable[[Marked], Model], models: Sequence[Model]) -> int:
    """The model that is meant, where none of some words is."""
    model = find(at)
    if model not in models:
        likely = meant(at.value, words) if isinstance(at.value, str) else ""
        raise at.error(f"{at.said()} is none of the models that are merged{likely or '; name one of them'}")
    return models.index(model)


@dataclass(frozen=True, slots=True)
class _Reader:
    index: Callable[[Marked, Sequence[str]], int]

    def setting(self, at: Marked) -> TokenizerSetting:
        if isinstance(at.value, str):
            remedy = f"for the source alone write tokenizer_source: {printable(at.text())}"
            raise at.error(f"tokenizer must be a mapping (source, tokens, pad_to_multiple_of); {remedy}")
        fields = at.fields(("source", "tokens", "pad_to_multiple_of"))
        tokens = fields["tokens"].mapping() if "tokens" in fields else {}
        padding = fields["pad_to_multiple_of"].integer() if "pad_to_multiple_of" in fields else 1
        if padding < 1:
            raise fields["pad_to_multiple_of"].error(f"pad_to_multiple_of must be 1 or more, not {padding}")
        return TokenizerSetting(
            self.source(fields["source"]) if "source" in fields else "union",
            {token: self.row(token, entry) for token, entry in tokens.items()},
            padding,
            at.place,
        )

    def source(self, at: Marked) -> Literal["base", "union"] | int:
        return "base" if at.value == "base" else "union" if at.value == "union" else self.index(at, ("base", "union"))

    def row(self, token: str, at: Marked) -> TokenRow | None:
        if not token:
            raise at.error("a token cannot be empty")
        if at.value is None:
            return None
        fields = at.fields(("source", "force"))
        force = fields["force"].value if "force" in fields else False
        if not isinstance(force, bool):
            raise fields["force"].error(f"force must be true or false, not {fields['force'].said()}")
        if "source" not in fields:
            if force:
                raise at.error("force needs a source: the row that all models are to have")
            return None
        source = fields["source"]
        if not isinstance(source.value, dict) or "kind" not in source.value:
            return TokenRow(self.index(source, ()), None, force, source.place)
        kind = source.mapping()["kind"]
        if kind.value == "zero":
            source.fields(("kind",))
            return TokenRow(None, None, force, source.place)
        if kind.value != "model_token":
            raise kind.error(f"kind must be zero or model_token, not {kind.said()}")
        fields = source.fields(("kind", "model", "token", "token_id"))
        if "model" not in fields or ("token" in fields) == ("token_id" in fields):
            raise source.error("model_token needs model, and either token or token_id")
        named = fields["token"].text() if "token" in fields else fields["token_id"].integer()
        return TokenRow(self.index(fields["model"], ()), named, force, source.place)
