"""fastmerge.json, the record beside a merge: what it was made from and how, and the hash of each tensor."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from .checkpoint import CARD, INDEX, hashing, tokenizer_files
from .checkpoint.header import looks_like, open_regular, parse_json, read_small
from .checkpoint.reader import sha256_in_cache
from .errors import CheckpointError
from .planner import Job, Planned, Stage
from .sources.adapter import CONFIG as ADAPTER_CONFIG
from .sources.lora import Adapted

FILE = "fastmerge.json"
#: What the bits of a merge follow, beside its recipe and its inputs; bumped by each change after which the same merge
#: has other bits anywhere.
ARITHMETIC = 1

_FORMAT = 1


class File(NamedTuple):
    """A file of an input. The fingerprint is the xxh3_128 of its first megabyte, then of 64 pieces of 4 KB from all of
    the rest; `sha256`, of the whole, may be unknown."""

    bytes: int
    sha256: str | None
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Input:
    """A model or an adapter by the name that the recipe gives it, at a commit where it came from the hub.

    `role` is base, model or adapter. `files` are those that tensors came from, by their paths in its folder, with the
    configs of adapters, and the tokenizers where a vocabulary was made of them.
    """

    name: str
    revision: str | None
    role: str
    files: Mapping[str, File]


class Tensor(NamedTuple):
    """A tensor of the output: `parameters` are those of the method, and `models` those of each model that took part."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    parameters: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    hash: str


@dataclass(frozen=True, slots=True)
class Record:
    """What fastmerge.json says. `document` is the one of the recipe that was merged, None where that has no name;
    `seed` went before the recipe's own; `provider` has the ops that each ran; `files` has the hash of each file beside
    the weights but for README.md, which is there to be edited."""

    fastmerge: str
    arithmetic: int
    versions: Mapping[str, str]
    provider: Mapping[str, tuple[str, ...]]
    isa: str | None
    seed: int | None
    options: Mapping[str, Any]
    recipe: str
    document: str | None
    command: str
    inputs: tuple[Input, ...]
    health: Mapping[str, Any]
    files: Mapping[str, str]
    tensors: Mapping[str, Tensor]


def written(
    result: Stage,
    recipe_text: str,
    command: str,
    *,
    inputs: Sequence[Input],
    hashes: Mapping[str, str],
    worked: Mapping[str, Collection[str]],
    isa: str | None,
    seed: int | None = None,
    options: Mapping[str, Any],
    health: Mapping[str, Any],
    beside: Mapping[str, bytes],
    variant: int = 0,
) -> bytes:
    """The file for an output of a recipe's last stage, a line for each input and each tensor; the same for the same
    merge.

    Args:
        result: the stage that wrote it.
        recipe_text: the recipe; that of the variant where parameters vary.
        command: what merges it again.
        inputs: what `inputs_of` says of the stage.
        hashes: by name the hash of each tensor's bytes, in hexadecimal.
        worked: by provider, the ops that it ran.
        isa: the instruction set of the compiled core; None where that had no work.
        seed: the one given beside the recipe.
        options: others that the bits follow, such as ``nonfinite``; strings, numbers and booleans.
        health: what was seen of the output's figures, as `Health.to_json` has it.
        beside: by name, the files that are written beside the weights.
        variant: the index of the output among those of the stage.
    """
    from . import __version__

    head = {
        "format": _FORMAT,
        "fastmerge": __version__,
        "arithmetic": ARITHMETIC,
        "hash": hashing.NAME,
        "versions": _versions(worked),
        "provider": {name: sorted(ops) for name, ops in sorted(worked.items())},
        "isa": isa,
        "seed": seed,
        "options": dict(sorted(options.items())),
        "recipe": recipe_text,
        "document": result.document.name,
        "command": command,
    }
    lines = [f"  {_json(key)}: {_json(value)}" for key, value in head.items()]
    lines.append(_block('"inputs": [', [_json(_input_entry(each)) for each in inputs], "]"))
    lines.append(_block('"health": {', (f"{_json(key)}: {_json(value)}" for key, value in health.items()), "}"))
    index = result.layout.index_file
    files = {**beside, **({} if index is None else {INDEX: index})}
    kept = {name: hashing.hash_of([memoryview(files[name])]).hex() for name in sorted(files) if name != CARD}
    lines.append(_block('"files": {', (f"{_json(name)}: {_json(hash)}" for name, hash in kept.items()), "}"))
    lines.append(_block('"tensors": {', _tensor_lines(result, variant, hashes), "}"))
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode(errors="replace")


def inputs_of(result: Stage, *, full: bool = False, threads: int = 1) -> tuple[Input, ...]:
    """The inputs of a stage and of those that it needs, each once; the sha256 of a file is what the hub's cache calls
    it, and with `full` computed where that does not say."""
    found: dict[tuple[str, bool], Input] = {}
    paths: dict[tuple[str, bool], dict[str, Path]] = {}
    for input_, files in _leaves(result):
        key = input_.name, input_.role == "adapter"
        if key not in found or input_.role == "base":
            found[key] = input_
        paths.setdefault(key, {}).update(files)

    def file_of(path: Path) -> File:
        sha256 = sha256_in_cache(path)
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
        return File(size, _sha256(path) if full and not sha256 else sha256, fingerprint(path))

    with ThreadPoolExecutor(threads) as pool:
        made = {key: {name: pool.submit(file_of, path) for name, path in sorted(paths[key].items())} for key in found}
        return tuple(
            replace(input_, files={name: file.result() for name, file in made[key].items()})
            for key, input_ in found.items()
        )


def fingerprint(path: Path) -> str:
    """As `File` has it."""
    hasher = xxhash.xxh3_128()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        hasher.update(file.exactly(min(size, _HEAD)))
        rest = size - _HEAD - _PIECE
        for number in range(_PIECES if rest > 0 else 0):
            file.seek(_HEAD + rest * number // (_PIECES - 1))
            hasher.update(file.exactly(_PIECE))
        if -_PIECE < rest <= 0:
            hasher.update(file.exactly(size - _HEAD))
    return hasher.hexdigest()


_HEAD, _PIECE, _PIECES = 1 << 20, 1 << 12, 64


def _leaves(stage: Stage) -> Iterator[tuple[Input, dict[str, Path]]]:
    """What a stage is made from that no stage makes, with its files."""
    document = stage.document
    for model, held in zip(document.models, stage.models, strict=True):
        whole, adapter = (held.base, held.adapter) if isinstance(held, Adapted) else (held, None)
        tokenized = document.tokenizer is not None
        if isinstance(whole, Planned):
            yield from _leaves(whole.stage)
        else:
            role = "base" if model == document.base_model else "model"
            files = {_inside(file, whole.folder): file for file in whole.files}
            files |= {name: whole.folder / name for name in (tokenizer_files(whole.folder) if tokenized else ())}
            yield Input(model.name, getattr(whole, "commit", None), role, {}), files
        if adapter is not None and model.adapter is not None:
            names = [ADAPTER_CONFIG, *(tokenizer_files(adapter.folder) if tokenized else ())]
            files = {_inside(file, adapter.folder): file for file in adapter.weights.files}
            files |= {name: adapter.folder / name for name in names}
            yield Input(model.adapter.name, adapter.commit, "adapter", {}), files


def _inside(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with open_regular(path) as file:
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


def _versions(worked: Mapping[str, object]) -> dict[str, str]:
    found = {"python": sys.version.split()[0], "numpy": np.__version__}
    if worked.keys() & {"torch", "triton"}:
        from importlib.metadata import version  # here: few merges need it, and it is slow to import

        found["torch"] = version("torch")
    return found


def _input_entry(input_: Input) -> dict[str, Any]:
    files = {name: file._asdict() for name, file in input_.files.items()}
    return {"name": input_.name, "revision": input_.revision, "role": input_.role, "files": files}


def _tensor_lines(stage: Stage, variant: int, hashes: Mapping[str, str]) -> Iterator[str]:
    """A line for each tensor in the order of the files; tensors alike in all but name and hash share their text."""
    names = [model.text for model in stage.document.models]
    jobs = {job.name: job for job in stage.jobs}
    for shard in stage.layout.shards:
        texts: dict[tuple[object, ...], str] = {}
        for name in shard.offsets:
            job = jobs[name]
            settings, models = job.variants[variant], tuple([source.model for source in job.inputs])
            key = job.dtype, job.shape, job.method, job.copy, id(settings.shared), id(settings.models), models
            if (text := texts.get(key)) is None:
                place = f'"file": {_json(shard.name)}, "dtype": "{job.dtype}", "shape": {_json(job.shape)}'
                text = texts[key] = f"{place}, {_settings(job, variant, [names[model] for model in models])}"
            yield f'{_json(name)}: {{{text}, "hash": "{hashes[name]}"}}'


def _settings(job: Job, variant: int, names: Sequence[str]) -> str:
    settings = job.variants[variant]
    parameters = {} if job.copy else dict(settings.shared)
    each = [{} if job.copy else dict(model) for model in settings.models]
    models = dict(zip(names, each, strict=True))
    method = "copy" if job.copy else job.method.name
    return f'"method": {_json(method)}, "parameters": {_json(parameters)}, "models": {_json(models)}'


_json = json.JSONEncoder(allow_nan=False).encode


def _block(opening: str, lines: Iterable[str], closing: str) -> str:
    inside = ",\n    ".join(lines)
    return "\n".join([f"  {opening}", f"    {inside}" if inside else "", f"  {closing}"])


# --- read again ---


def read(folder: str | os.PathLike[str]) -> Record:
    """What fastmerge.json in a folder says. Raises CheckpointError where there is none, or none that is sound."""
    path = Path(folder, FILE)
    if os.path.isdir(folder) and not os.path.lexists(path):
        raise CheckpointError(f"{folder} has no {FILE}: name a folder that `fastmerge merge` has written")
    data = read_small(path)
    try:
        return _record(parse_json(data))
    except ValueError as error:
        reason = looks_like(data[:512]) or f"is not the record of a merge: {error!s:.500}; merge again"
        raise CheckpointError(f"{path} {reason}") from None


def _record(document: Any) -> Record:
    at = _Fields(document, "it")
    if (number := at.take("format", int)) != _FORMAT:
        raise ValueError(f"its format is {number}, and this fastmerge reads {_FORMAT}")
    if (name := at.take("hash", str)) != hashing.NAME:
        raise ValueError(f"its hash is {name!r:.100}, and this fastmerge knows {hashing.NAME!r}")
    provider = at.take("provider", dict)
    return Record(
        at.take("fastmerge", str),
        at.take("arithmetic", int),
        _each(at.take("versions", dict), str, "versions"),
        {name: tuple(_list(ops, str, f"provider {name!r}")) for name, ops in provider.items()},
        at.take("isa", str, type(None)),
        at.take("seed", int, type(None)),
        at.take("options", dict),
        at.take("recipe", str),
        at.take("document", str, type(None)),
        at.take("command", str),
        tuple(_input(_Fields(entry, "an input")) for entry in at.take("inputs", list)),
        at.take("health", dict),
        {name: _beside(name, at.take("files", dict)) for name in at.take("files", dict)},
        {name: _tensor(_Fields(entry, f"tensor {name!r}")) for name, entry in at.take("tensors", dict).items()},
    )


def _input(at: _Fields) -> Input:
    name, revision, role = at.take("name", str), at.take("revision", str, type(None)), at.take("role", str)
    files = {}
    for file, entry in at.take("files", dict).items():
        of = _Fields(entry, f"file {file!r} of {name!r}")
        sha256 = of.take("sha256", str, type(None))
        files[file] = File(of.take("bytes", int), sha256, of.digest("fingerprint"))
    return Input(name, revision, role, files)


def _beside(name: str, hashes: dict[str, Any]) -> str:
    if os.path.basename(name) != name or not name.strip("."):
        raise ValueError(f"its file {name!r} is not one beside it")
    return _Fields(hashes, "files").digest(name)


def _tensor(at: _Fields) -> Tensor:
    return Tensor(
        at.take("file", str),
        at.take("dtype", str),
        tuple(_list(at.take("shape", list), int, at.what)),
        at.take("method", str),
        at.take("parameters", dict),
        _each(at.take("models", dict), dict, f"models of {at.what}"),
        at.digest("hash"),
    )


Kind = TypeVar("Kind")


class _Fields:
    """An object of the file, whose fields have kinds; ValueError where they have not."""

    def __init__(self, entry: Any, what: str) -> None:
        if type(entry) is not dict:
            raise ValueError(f"{what} is not an object")
        self._entry, self.what = entry, what

    def take(self, key: str, *kinds: type) -> Any:
        value = self._entry.get(key)
        if key not in self._entry or type(value) not in kinds:
            named = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{self.what} has no {key} that is {named}")
        return value

    def digest(self, key: str) -> str:
        text: str = self.take(key, str)
        if not re.fullmatch("[0-9a-f]{32}", text):
            raise ValueError(f"{self.what} has no {key} of 32 hexadecimal digits")
        return text


def _list(value: Any, kind: type[Kind], what: str) -> list[Kind]:
    if type(value) is not list or not all(type(item) is kind for item in value):
        raise ValueError(f"{what} has something other than a list of {kind.__name__}")
    return value


def _each(value: dict[str, Any], kind: type[Kind], what: str) -> dict[str, Kind]:
    if not all(type(item) is kind for item in value.values()):
        raise ValueError(f"its {what} are not {kind.__name__} each")
    return value
