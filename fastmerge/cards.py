"""Model cards: what those of models say, and the one of a merge."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from . import marked
from .checkpoint import CARD
from .checkpoint.header import open_regular
from .checkpoint.reader import sha256_in_cache
from .errors import CheckpointError, RecipeError


class Card(NamedTuple):
    """What a model's README.md says, in its front matter or, where fastmerge wrote it, of the models merged."""

    licence: str = ""
    bases: tuple[str, ...] = ()
    merged: bool = False  # whether `bases` are what it was merged from
    terms: Mapping[str, str] = MappingProxyType({})  # the licence as it stands there, with its name and link
    models: tuple[str, ...] = ()  # each as it is listed, with its files


def card_of(folder: Path) -> Card:
    """The card of the model in a folder; one that says nothing where there is none, or none that can be read."""
    try:
        with open_regular(folder / CARD) as file:
            head = file.exactly(min(_LONGEST, os.fstat(file.fileno()).st_size))
    except CheckpointError:
        return Card()
    return read(head.decode("utf-8-sig", "replace"))


def read(text: str) -> Card:
    """The card of a README.md; one that says nothing where that cannot be read."""
    matter = re.match(r"---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    try:
        root, *_ = marked.documents(matter[1] if matter else "", CARD)
        entries = root.mapping()
        said = {
            key: [item.value for item in (at.items() if isinstance(at.value, list) else [at])]
            for key, at in entries.items()
            if key in ("tags", "base_model", "base_model_relation", *_TERMS)
        }
    except (RecipeError, ValueError):
        return Card()
    texts = {key: [value for value in values if isinstance(value, str) and value] for key, values in said.items()}
    licence = texts.get("license", [])
    if licence == ["other"]:
        licence = texts.get("license_name", licence)
    return Card(
        " and ".join(licence).lower(),
        tuple(texts.get("base_model", ())),
        "merge" in (*texts.get("tags", ()), *texts.get("base_model_relation", ())),
        {key: texts[key][0] for key in _TERMS if len(texts.get(key, ())) == 1},
        _models(text) if "fastmerge" in texts.get("tags", ()) else (),
    )


def _models(text: str) -> tuple[str, ...]:
    """The entries of a list of models that hold nothing but what a card says of them."""
    section, _, _ = text.partition("\n## Models\n\n")[2].partition("\n\n## Recipe\n")
    entries = re.findall(r"^- `.*(?:\n  - `.*)*", section, re.MULTILINE)
    return tuple(entry for entry in entries if _ENTRY.fullmatch(_CODE.sub("", entry)))


_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)")
#: Without its code.
_ENTRY = re.compile(r"- (?: \(base\))?(?:, commit (?: of )?)*(?:\n  - , [\d,]+ bytes(?:, sha256 )?)*")
_LONGEST = 100_000  # bytes of a README.md that are read
_TERMS = ("license", "license_name", "license_link")


# --- of a merge ---


class Input(NamedTuple):
    """A model of a merge by the name that the recipe gives it, and the files with its weights; none where it is merged
    first."""

    name: str
    files: Sequence[Path]
    is_base: bool


def card(
    inputs: Sequence[Input],
    recipe_text: str,
    *,
    method: str,
    paper: str,
    command: str,
    version: str,
    title: str,
    library: str = "",
) -> str:
    """The card of a merge: what the hub reads (front matter), then what people do. `library` is what loads the model.

    Which commit of a repository an input was, and the SHA-256 of its files, are what the hub's cache calls them. The
    output has a licence where all inputs have the same.
    """
    parents = list(dict.fromkeys(f"- {name}" for name in _parents(inputs)))
    matter = ["base_model:", *parents, "base_model_relation: merge"] if parents else []
    matter += [f"library_name: {library}"] if library else []
    matter += [f"{key}: {_scalar(value)}" for key, value in _terms(inputs).items()]
    listed = [*map(_listed, inputs), *(model for each in inputs for model in _inherited(each))]
    cited = f" ({paper})" if paper.strip("- ") else ""
    return "\n".join(
        [
            "---",
            *matter,
            "tags:",
            "- fastmerge",
            "- merge",
            "---",
            f"# {heading(title)}",
            "",
            f"Merged with fastmerge {version} by `{method}`{cited}.",
            "",
            "## Models",
            "",
            *dict.fromkeys(listed),
            "",
            "## Recipe",
            "",
            *_fenced("yaml", recipe_text),
            "",
            "The same again, with this recipe in `mergekit_config.yml`:",
            "",
            *_fenced("sh", command),
            *_moving(inputs, recipe_text),
        ]
    )


class _Place(NamedTuple):
    """A folder with weights: of which commit of which repository it is a copy, where the hub's cache tells."""

    folder: Path
    id: str
    commit: str


def _places(files: Iterable[Path]) -> Iterator[_Place]:
    for folder in dict.fromkeys(file.parent for file in files):
        at = re.search(r"/models--([\w.-]+)/snapshots/([\w.-]+)$", folder.absolute().as_posix(), re.ASCII)
        yield _Place(folder, at[1].replace("--", "/") if at else "", at[2] if at else "")


def _parents(inputs: Iterable[Input]) -> Iterator[str]:
    """The repositories that a merge comes from; a merge on this disk stands for what it was merged from."""
    for each in inputs:
        for place in _places(each.files):
            if place.id:
                yield place.id
            elif (own := card_of(place.folder)).merged:
                yield from filter(_ID.fullmatch, own.bases)


_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?", re.ASCII)


def _terms(inputs: Iterable[Input]) -> Mapping[str, str]:
    """The licence of all inputs; nothing where one has another, or none."""
    first, *others = [card_of(place.folder).terms for each in inputs for place in _places(each.files)] or [{}]
    return first if "license" in first and all(other == first for other in others) else {}


def _scalar(text: str) -> str:
    return text if re.fullmatch(r"[a-z][\w.-]*", text, re.ASCII) else json.dumps(text)


def _inherited(model: Input) -> Iterator[str]:
    """What a merge on this disk lists in its turn."""
    for place in _places(model.files):
        if not place.id:
            yield from (each.replace("` (base)", "`", 1) for each in card_of(place.folder).models)


def _listed(model: Input) -> str:
    commits = [place for place in _places(model.files) if place.id]
    alone = len(commits) == 1 and commits[0].id == model.name.partition("@")[0]
    known = [f"commit `{place.commit}`" + ("" if alone else f" of `{place.id}`") for place in commits]
    lines = [", ".join([f"- {code(model.name)}{' (base)' if model.is_base else ''}", *known])]
    for file in model.files:
        digest = f", sha256 `{sha256}`" if (sha256 := sha256_in_cache(file)) else ""
        lines.append(f"  - {code(file.name)}, {os.path.getsize(file):,} bytes{digest}")
    return "\n".join(lines)


def _moving(inputs: Iterable[Input], recipe_text: str) -> list[str]:
    """How to have the models as they were, of which the recipe names no commit."""
    pinned = [f"`{place.id}@{place.commit}`" for each in inputs for place in _places(each.files) if place.id]
    loose = list(dict.fromkeys(name for name in pinned if name.strip("`") not in recipe_text))
    return ["", f"Where a model has changed since, write it there as {' and '.join(loose)}."] if loose else []


def code(text: str) -> str:
    """A text as it is, in a line of Markdown, whatever it holds; what is not printable as an escape."""
    shown = marked.printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{fence} {shown} {fence}" if len(fence) > 1 else f"`{shown}`"


def heading(text: str) -> str:
    """The same as a title, in which nothing is markup."""
    return re.sub(r"([\\`*<>&\[\]])", r"\\\1", marked.printable(" ".join(text.split())))


def _fenced(language: str, text: str) -> list[str]:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [fence + language, text.rstrip("\n"), fence]
