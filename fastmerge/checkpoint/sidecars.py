"""What lies beside the weights of a merged model: its config, tokenizer and processor files, model card and recipe."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import FastmergeWarning
from .header import looks_like, open_regular
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
_OTHERS = (
    "generation_config.json",
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
    *,
    method: str,
    paper: str,
    models: Sequence[str],
    base: str | None,
    commits: Mapping[str, str],
    command: str,
    version: str,
    title: str,
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
) -> dict[str, bytes]:
    """The files beside the weights, by name.

    The donor gives its config.json, in which only `config_changes` differ, and its tokenizer, processor and generation
    files. Python files of a model are neither run nor copied; a FastmergeWarning names them. `commits` are those of the
    models that came from the hub, by the name that the recipe gives them.
    """
    files = _copied(donor.folder, COPIED if copy_tokenizer else _OTHERS)
    if donor.config:
        files[CONFIG] = _text(json.dumps({**donor.config, **config_changes}, indent=2))
    if write_model_card:
        files[CARD] = _text(_card(recipe_text, method, paper, models, base, commits, command, version, title))
        files[RECIPE] = recipe_text.encode()
    return files


def is_sidecar(name: str) -> bool:
    """Whether a file of this name is one that `sidecars` may give."""
    return name in (CONFIG, CARD, RECIPE) or _is_one_of(name, COPIED)


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _copied(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    names = [name for name in names_in(folder) if (folder / name).is_file()]
    if code := [name for name in names if name.endswith(".py")]:
        _warn(
            f"{folder} comes with code of its own, which is neither run nor copied: {', '.join(code)}; "
            "copy it beside the result if the model needs it"
        )
    files = {}
    for name in names:
        if _is_one_of(name, patterns):
            with open_regular(folder / name) as file:
                files[name] = file.readall()
            if damage := looks_like(files[name][:512]):
                _warn(f"{folder / name} {damage}; it is copied as it is")
    return files


def _card(
    recipe_text: str,
    method: str,
    paper: str,
    models: Sequence[str],
    base: str | None,
    commits: Mapping[str, str],
    command: str,
    version: str,
    title: str,
) -> str:
    """The model card: what the hub reads (front matter), then what people do."""
    every = list(dict.fromkeys((*((base,) if base else ()), *models, *commits)))
    parents = list(dict.fromkeys(f"- {name.partition('@')[0]}" for name in every if name in commits))
    listed = [
        f"- `{name}`{' (base)' if name == base else ''}{f', commit `{commits[name]}`' if name in commits else ''}"
        for name in every
    ]
    matter = ["---", "library_name: transformers", "tags:", "- fastmerge", "- merge"]
    matter += ["base_model:", *parents] if parents else []
    cited = f" ({paper})" if paper.strip("- ") else ""
    return "\n".join(
        [
            *matter,
            "---",
            f"# {' '.join(title.split())}",
            "",
            f"Merged with fastmerge {version} by `{method}`{cited}.",
            "",
            "## Models",
            "",
            *listed,
            "",
            "## Recipe",
            "",
            *_fenced("yaml", recipe_text),
            "",
            "The same again:",
            "",
            *_fenced("sh", command),
        ]
    )


def _fenced(language: str, text: str) -> list[str]:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence + language, text.rstrip("\n"), fence]


def _text(text: str) -> bytes:
    return text.encode(errors="replace") + b"\n"


def _warn(message: str) -> None:
    warnings.warn(message, FastmergeWarning, stacklevel=5)
