"""Embeddings and heads of a merge whose tokenizer is not that of all its models: which tensors, and which rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from .checkpoint import TensorInfo
from .configs import Described, stated
from .sources.rows import Gather, RowMap
from .vocabulary.tokens import Vocabulary

_INPUT = r"embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|token_embd|tokens_embed|shared"
_OUTPUT = r"lm_head|lm_head\.decoder|embed_out|output|predictions|predictions\.decoder|vocab_projector"
_EMBEDDING = re.compile(rf"(?:.*\.)?(?:{_INPUT})\.weight")
_VOCABULARY = re.compile(rf"(?:.*\.)?(?:(?:{_INPUT})\.weight|(?:{_OUTPUT})\.(?:weight|bias))")


def rows_of(model: Described) -> int:
    """How many rows a model's embeddings have, which its token ids stay below."""
    for name, info in model.tensors.items():
        if _EMBEDDING.fullmatch(name) and len(info.shape) == 2:
            return info.shape[0]
    size = stated(model.config, "vocab_size")
    return size if isinstance(size, int) else 0


class Rows:
    """What the tensors of a vocabulary are made of. Models are spoken of by their index."""

    def __init__(self, vocabulary: Vocabulary, models: Sequence[Described]) -> None:
        self.size = vocabulary.size
        self._models = models
        self._maps = vocabulary.maps
        self._held = [rows_of(model) for model in models]
        own = [_is_own(at, map_, held) for at, (map_, held) in enumerate(zip(self._maps, self._held, strict=True))]
        #: Whether the vocabulary is that of every model already.
        self.trivial = all(own)

    def covers(self, model: int, info: TensorInfo) -> bool:
        """Whether a tensor of a model has a row for each of its tokens."""
        return info.shape[:1] == (self._held[model],) and _VOCABULARY.fullmatch(info.name) is not None

    def resized(self, info: TensorInfo) -> TensorInfo:
        """A tensor as it comes out."""
        return info._replace(shape=(self.size, *info.shape[1:]))

    def gather(self, models: Sequence[int], names: Mapping[int, str]) -> Gather:
        """The rows of some models' tensors; raises KeyError, with its index, where they take some of a model that has
        no such tensor."""
        maps = tuple(self._maps[model] for model in models)
        needed: set[int] = set()
        for map_ in maps:
            needed.update(np.unique(map_.model[map_.model >= 0]).tolist())
            needed.update(model for mean in map_.means for model, _ in mean)
        for model in needed - names.keys():
            raise KeyError(model)
        return Gather(maps, {model: names[model] for model in sorted({*needed, *models})})


def _is_own(at: int, map_: RowMap, held: int) -> bool:
    """Whether a map gives a model its own rows in their order."""
    return map_.size == held and bool((map_.model == at).all()) and bool((map_.row == np.arange(held)).all())
