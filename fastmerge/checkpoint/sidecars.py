"""What lies beside the weights of a merged model: its config, tokenizer and processor files, model card and recipe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import FastmergeWarning
from .header import LONGEST_JSON, looks_like, read_small
from .reader import Checkpoint, names_in

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab*.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "encoder.json",
    "bpe.codes",
    "dict.txt",
    "normalizer.json",
    "byte_maps.json",
    "emoji.json",
    "entity_vocab.json",
    "target_vocab.json",
    "word_pronunciation.json",
    "word_shape.json",
    "tekken.json",
    "tokenizer.model*",
    "spiece.model",
    "spm*.model",
    "sentencepiece*.model",
    "*.spm",
    "*.tiktoken",
    "prophetnet.tokenizer",
)
GENERATION = "generation_config.json"
_OTHERS = (
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
)
#: What is copied from the donor as it is: all that transformers' AutoTokenizer, AutoProcessor and generate() look for.
COPIED = (*_TOKENIZER, *_OTHERS)
CONFIG = "config.json"
CARD = "README.md"
RECIPE = "mergekit_config.yml"


def sidecars(
    donor: Checkpoint,
    config_changes: Mapping[str, Any],
    recipe_text: str,
    card: str | None,
    *,
    tokenizer: Mapping[str, bytes] | None = None,
    copy_tokenizer: bool = True,
) -> dict[str, bytes]:
    """The files beside the weights, by name.

    The donor gives its config.json, in which only `config_changes` differ, and its tokenizer, processor and generation
    files, or a tokenizer made for the output stands for its own. Python files of a model are neither run nor copied; a
    FastmergeWarning names them. The recipe is beside a card, and where there is none, neither is.
    """
    files = _copied(donor.folder, COPIED if copy_tokenizer and tokenizer is None else _OTHERS)
    files |= tokenizer or {}
    if donor.config:
        files[CONFIG] = _text(json.dumps({**donor.config, **config_changes}, indent=2))
    if card is not None:
        files[CARD] = _text(card)
        files[RECIPE] = recipe_text.encode()
    return files


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The files of the tokenizer in a folder, by name."""
    return _read(folder, _TOKENIZER)


def is_sidecar(name: str) -> bool:
    """Whether a file of this name is one that `sidecars` may give."""
    return name in (CONFIG, CARD, RECIPE) or _is_one_of(name, COPIED)


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _copied(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    if code := [name for name in names_in(folder) if name.endswith(".py") and (folder / name).is_file()]:
        _warn(
            f"{folder} comes with code of its own, which is neither run nor copied: {', '.join(code)}; "
            "copy it beside the result if the model needs it"
        )
    files = _read(folder, patterns)
    for name, content in files.items():
        if damage := looks_like(content[:512]):
            _warn(f"{folder / name} {damage}; it is copied as it is")
    return files


def _read(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    names = [name for name in names_in(folder) if _is_one_of(name, patterns) and (folder / name).is_file()]
    for name in names:
        if (size := (folder / name).stat().st_size) > LONGEST_JSON:
            _warn(f"{folder / name} has {size} bytes, more than the {LONGEST_JSON} that are read; it is left out")
            names = [other for other in names if other != name]
    return {name: read_small(folder / name) for name in names}


def _text(text: str) -> bytes:
    return text.encode(errors="replace") + b"\n"


def _warn(message: str) -> None:
    warnings.warn(message, FastmergeWarning, stacklevel=5)
