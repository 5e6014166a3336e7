"""What is wrong or odd about a merge before it is made: recipe, headers, configs, tokenizers and cards, all at once."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .cards import Card, card_of
from .checkpoint import Checkpoint, open_checkpoint
from .checkpoint.header import LONGEST_JSON, open_regular
from .configs import stated
from .errors import CheckpointError, FastmergeError, FastmergeWarning
from .methods import Method, Value
from .parameters import Parameters
from .planner import Plan, plan
from .recipe import Document, Model, Recipe
from .sources.adapter import CONFIG as ADAPTER_CONFIG
from .sources.adapter import Adapter, open_adapter
from .sources.lora import Adapted


class Findings(NamedTuple):
    """Sentences: what stops a merge, and what is odd but defined."""

    errors: list[str]
    warnings: list[str]


def check(path: Path, out: Path | None = None) -> Findings:
    """What planning the recipe at `path` refuses or warns of, then what `oddities` finds, then whether its outputs have
    room on the disk of `out`. Weights are not read, and nothing is written."""
    errors: list[str] = []
    odd: list[str] = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FastmergeWarning)
        recipe = fetched = None
        try:
            recipe = Recipe.load(path)
            made = plan(recipe)
            fetched = _fetched(made)
            if out is not None and (fault := crowded(out, made.bytes_written)):
                errors.append(fault)
        except FastmergeError as error:
            errors = [str(error)]
            if recipe is not None and isinstance(error, CheckpointError):
                errors += [fault for fault in unreadable(recipe) if fault != str(error)]
        if recipe is not None:
            odd = list(oddities(recipe, fetched or {}))
    return Findings(errors, list(dict.fromkeys([*(str(each.message) for each in told), *odd])))


def before(recipe: Recipe) -> Iterator[str]:
    """What `oddities` finds where models from the hub are fetched first. Raises what planning raises."""
    models = [model for document in recipe.documents for model in document.models]
    fetches = any(half.repository for model in models for half in (model, model.adapter) if half)
    yield from oddities(recipe, _fetched(plan(recipe)) if fetches else {})


def _fetched(made: Plan) -> dict[str, Path]:
    models = [model for stage in made.stages for model in stage.models]
    halves = [(model.base, model.adapter) if isinstance(model, Adapted) else (model,) for model in models]
    known = (half for each in halves for half in each if isinstance(half, Checkpoint | Adapter))
    return {half.name: half.folder for half in known if half.commit}


def oddities(recipe: Recipe, fetched: Mapping[str, Path] = MappingProxyType({})) -> Iterator[str]:
    """What planning has no eye for, from the recipe and the small files beside the weights; `fetched` are the folders
    of models from the hub, by name, which are left out elsewhere. What cannot be read is passed over."""
    for document in recipe.documents:
        yield from suspicious(document)
    named = {document.name: document for document in recipe.documents}
    needed = {model.name for document in recipe.documents for model in document.models}
    folders: dict[Model, Path] = {}
    for document in recipe.documents:
        leaves = list(dict.fromkeys(_leaves(document, named)))
        for model in (*leaves, *(model.adapter for model in document.models if model.adapter)):
            if (folder := fetched.get(model.name) if model.path is None else model.path) is not None:
                folders[model] = folder if os.path.isdir(folder) else folder.parent
        if document.name not in needed and leaves[0] in folders:
            first, *others = [beside(_called(model), folders[model]) for model in leaves if model in folders]
            for other in others:
                yield from differences(first, other, *_made(recipe.documents))
    cards = {model: card_of(folder) for model, folder in folders.items()}
    yield from licences({_called(model): card for model, card in cards.items()})
    for document in recipe.documents:
        for model in document.models:
            adapter, whole = model.adapter, model._replace(adapter=None)
            if adapter in folders and whole in folders:
                config = _object(_read(folders[adapter] / ADAPTER_CONFIG))
                yield from adapted(config, _called(adapter), _called(whole), aliases(whole, folders[whole]))
        base = document.base_model
        if base in folders and document.method.base.apart:
            known = {_called(model): cards[model].bases for model in document.models if model in cards}
            yield from lineage(_called(base), aliases(base, folders[base]), known)


def _made(documents: Sequence[Document]) -> tuple[bool, bool]:
    """Whether the recipe says which tokenizer the output has, and which chat template."""
    settings = [document.tokenizer for document in documents if document.tokenizer]
    templates = any(document.chat_template is not None for document in documents)
    return bool(settings), templates or any(isinstance(setting.source, int) for setting in settings)


def unreadable(recipe: Recipe) -> Iterator[str]:
    """Why models on disk cannot be opened, each that cannot."""
    models = [model for document in recipe.documents for model in document.models]
    opens = {model.path: open_checkpoint for model in models} | {
        model.adapter.path: open_adapter for model in models if model.adapter
    }
    for path, open_ in opens.items():
        if path is not None:
            try:
                open_(path)
            except CheckpointError as error:
                yield str(error)


def crowded(out: Path, needed: int) -> str | None:
    """Why outputs of so many bytes have no room at `out`, which need not be there yet."""
    place = next(place for place in (out, *out.absolute().parents) if os.path.exists(place))
    disk = shutil.disk_usage(place)
    if not disk.total or needed <= disk.free:
        return None
    return f"{out} needs {needed:,} bytes and its disk has {disk.free:,} left: free some, or write elsewhere"


def _leaves(document: Document, named: Mapping[str | None, Document]) -> Iterator[Model]:
    """The models that a document is made of in the end, the one first whose config and tokenizer it has."""
    for model in document.models:
        if model.path is None and model.repository is None:
            yield from _leaves(named[model.name], named)
        else:
            yield model._replace(adapter=None)


def _called(model: Model) -> str:
    """What messages call a model, as those of planning do."""
    return model.name if model.path is None else str(model.path)


# --- the recipe ---


def suspicious(document: Document) -> Iterator[str]:
    """Values that are allowed and that nobody wants."""
    method = document.method
    merged = [model for model in document.models if not (method.base.apart and model == document.base_model)]
    for setting in document.settings:
        name, value = setting.parameter.name, setting.constant
        if not isinstance(value, float):
            continue
        if name == "density" and value == 1.0 and (method.selects or method.random):
            yield f"{setting.place}: density 1 leaves all of a delta, and {method.name} is there to thin it; write less"
        if name in ("density", "weight") and value == 0.0:
            yield f"{setting.place}: {name} 0 leaves nothing of a model; write more, or remove the model"
        if name == "lambda" and value > 1.0 and len(merged) > 2:
            fault = f"lambda {value:g} enlarges what {len(merged)} models add up to, which easily overshoots"
            yield f"{setting.place}: {fault}; 1 or less is usual"
    for module in document.modules:
        for slice_ in module.slices:
            levels = (slice_.parameters, module.parameters, document.parameters)
            own = [source.parameters for source in slice_.sources if source.model in merged]
            if _cancel(method, [(parameters, *levels) for parameters in own], levels):
                fault = "the weights sum to 0, and normalize divides by sums of them"
                yield f"{slice_.place}: {fault}; change them, or set it to false"


def _cancel(method: Method, models: Sequence[Sequence[Parameters]], shared: Sequence[Parameters]) -> bool:
    """Whether weights that are to be normalised cancel one another, where planning does not refuse that."""
    flags = [name for name in ("normalize", "normalize_weights") if method.parameter(name)]
    later = method.selects or method.random or method.gram or method.direct
    if not (later and flags and _constant(method, flags[0], shared)):
        return False
    weights = [_constant(method, "weight", levels) for levels in models]
    numbers = [weight for weight in weights if isinstance(weight, float)]
    return len(numbers) == len(weights) and any(numbers) and abs(math.fsum(numbers)) < 1e-8


def _constant(method: Method, name: str, levels: Sequence[Parameters]) -> Value:
    """A parameter's value where it is one for all tensors."""
    parameter = method.parameter(name)
    setting = next((level[name] for level in levels if name in level), None)
    return setting.constant if setting else parameter.default if parameter else None


# --- what lies beside the weights ---


class Beside(NamedTuple):
    """What small files say of a model; empty where there is none, or none that can be read."""

    name: str
    config: dict[str, Any]
    tokenizer: bytes  # tokenizer.json
    tokens: dict[str, str]  # the special tokens by what they are for
    template: str  # of chats


def beside(name: str, folder: Path) -> Beside:
    settings = _object(_read(folder / "tokenizer_config.json"))
    said = {**_object(_read(folder / "special_tokens_map.json")), **settings}
    tokens = {role: said[role] for role in _ROLES if role in said}
    template = settings.get("chat_template") or _object(_read(folder / "chat_template.json")).get("chat_template")
    file = _read(folder / "chat_template.jinja").decode(errors="replace")
    return Beside(
        name,
        _object(_read(folder / "config.json")),
        _read(folder / "tokenizer.json"),
        {
            role: token["content"] if isinstance(token, dict) and "content" in token else token
            for role, token in tokens.items()
        },
        (file or str(template or "")).strip(),
    )


def differences(first: Beside, other: Beside, tokenizer: bool = False, template: bool = False) -> Iterator[str]:
    """Where another model has a different config, tokenizer or chat template than the first, which gives those of the
    output, but for a `tokenizer` or `template` that the recipe asks for. Keys of a config that change the maths are
    planning's to compare."""
    pair = f"{first.name!r} and {other.name!r}"
    for key in _CONFIG:
        if tokenizer and key == "vocab_size":
            continue
        ours, theirs = stated(first.config, key), stated(other.config, key)
        if None not in (ours, theirs) and ours != theirs:
            yield f"the configs of {pair} have {key} {ours!r} and {theirs!r}: they may not be of one family; check them"
    if not tokenizer:
        yield from _other_tokens(first, other, pair)
    if template:
        return
    if other.template and not first.template:
        fault = f"{first.name!r} has no chat template, unlike {other.name!r}, so the output has none"
        yield f"{fault}; `chat_template: auto` in the recipe takes that of most models"
    elif other.template and first.template != other.template:
        fault = f"the chat templates of {pair} differ: the output has that of {first.name!r}"
        yield f"{fault}; `chat_template` in the recipe says which you want"


def _other_tokens(first: Beside, other: Beside, pair: str) -> Iterator[str]:
    remedy = "`tokenizer_source` in the recipe says which you want, or a union"
    if first.tokenizer and other.tokenizer and (how := tokenizers_differ(first.tokenizer, other.tokenizer)):
        meaning = f"a token may not mean the same in both, and the output has the tokenizer of {first.name!r}"
        yield f"the tokenizers of {pair} differ ({how}): {meaning}; {remedy}"
    for role in _ROLES:
        if role in first.tokens and role in other.tokens and first.tokens[role] != other.tokens[role]:
            values = f"{first.tokens[role]!r} and {other.tokens[role]!r}"
            yield f"the tokenizers of {pair} have {role} {values}: the output has that of {first.name!r}; {remedy}"


def tokenizers_differ(first: bytes, other: bytes) -> str:
    """How two tokenizer.json differ in more than truncation and padding; empty where they do not."""
    if first == other:
        return ""
    one, two = _object(first), _object(other)
    if not one or not two:
        return "in their bytes"
    differing = [key for key in one | two if key not in _PER_CALL and one.get(key) != two.get(key)]
    if not differing:
        return ""
    counts = _tokens(one), _tokens(two)
    return f"{counts[0]} and {counts[1]} tokens" if counts[0] != counts[1] else f"in {', '.join(sorted(differing))}"


_CONFIG = ("architectures", "hidden_size", "vocab_size", "tie_word_embeddings")
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_PER_CALL = ("version", "truncation", "padding")


def _tokens(tokenizer: dict[str, Any]) -> int:
    """How many tokens a tokenizer knows."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    known = {str(entry[0]) if isinstance(entry, list) and entry else str(entry) for entry in vocabulary or ()}
    return len(known | {str(token.get("content")) for token in added or () if isinstance(token, dict)})


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _read(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.exactly(min(LONGEST_JSON, os.fstat(file.fileno()).st_size))
    except CheckpointError:
        return b""


# --- cards ---


def licences(cards: Mapping[str, Card]) -> Iterator[str]:
    """Licences that differ, or that restrict what may be done with a merge."""
    known = {name: card.licence for name, card in cards.items() if card.licence}
    for name, licence in known.items():
        if "nd" in _words(licence):
            fault = f"the licence of {name!r}, {licence}, forbids derivatives to be shared, and a merge is one"
            yield f"{fault}; ask its owner, or leave it out"
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name!r} has {licence}" for name, licence in known.items())
        unpaid = [repr(name) for name, licence in known.items() if _unpaid(licence)]
        some = 0 < len(unpaid) < len(known)
        also = f"; {' and '.join(unpaid)} forbids commercial use, and so of the merge" if some else ""
        yield f"the licences of the models differ: {listed}; a merge must keep to all of them{also}"


def lineage(base: str, known_as: frozenset[str], bases: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Models whose card names a base that is none of the names of the one that deltas are taken from."""
    for model, named in bases.items():
        if model != base and named and not known_as & {_tail(name) for name in named}:
            fault = f"the card of {model!r} names {' and '.join(map(repr, named))} as its base, and the recipe {base!r}"
            yield f"{fault}: where these are two models, its delta is more than its fine-tuning; check base_model"


def adapted(config: Mapping[str, Any], adapter: str, base: str, known_as: frozenset[str]) -> Iterator[str]:
    """An adapter whose adapter_config.json names a base that is none of the names of the one that it is added to."""
    named = config.get("base_model_name_or_path")
    if isinstance(named, str) and named and _tail(named) not in known_as:
        fault = f"the adapter {adapter!r} was trained on {named!r}, and the recipe adds it to {base!r}"
        yield f"{fault}: where these are two models, it may do little good there; check what is before the +"


def aliases(model: Model, folder: Path) -> frozenset[str]:
    """The names that a model may have on the hub, without their owner."""
    cached = (part.replace("--", "/") for part in Path(os.path.realpath(folder)).parts if part.startswith("models--"))
    said = _object(_read(folder / "config.json")).get("_name_or_path")
    own = model.repository.id if model.repository else model.name
    return frozenset(_tail(name) for name in (own, os.path.realpath(folder), *cached, said) if isinstance(name, str))


def _tail(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def _words(licence: str) -> list[str]:
    return re.findall(r"[a-z]+", licence)


def _unpaid(licence: str) -> bool:
    return "nc" in _words(licence) or "noncommercial" in "".join(_words(licence))
