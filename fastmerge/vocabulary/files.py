"""Tokenizers as their files say: which ids their tokens have, and the same tokenizer with fewer or more of them."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.header import looks_like
from ..errors import CheckpointError, FastmergeWarning
from .bpe import Rules, joining

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """What the files of a model's tokenizer say.

    `ids` are those of all tokens, in ascending order. `added` are the definitions of the tokens that are found before a
    text is split: their flags as in tokenizer.json. `merges` are the rules of a BPE model and `scores` those of the
    pieces of a Unigram model, empty in others. `json` is tokenizer.json as it is on disk, None where there is none.
    """

    name: str
    files: Mapping[str, bytes]
    json: dict[str, Any] | None
    ids: dict[str, int]
    added: dict[str, dict[str, Any]]
    merges: Sequence[tuple[str, str]]
    scores: Mapping[str, float]

    @property
    def model(self) -> dict[str, Any]:
        """The part of tokenizer.json that turns a word into tokens."""
        return {} if self.json is None else self.json["model"]

    @property
    def size(self) -> int:
        """The smallest number of rows in which every id is one."""
        return max(self.ids.values(), default=-1) + 1


def open_tokenizer(name: str, files: Mapping[str, bytes]) -> Tokenizer | None:
    """Reads a tokenizer from its files; None where there are none. Nothing of it is run.

    tokenizer.json says all; without one, what tokens there are is read from a sentencepiece tokenizer.model, from
    vocab.json with merges.txt, or from vocab.txt. Raises `CheckpointError` where nothing can be read.
    """
    for file, read in _READERS.items():
        if file in files:
            if damage := looks_like(files[file][:512]):
                raise CheckpointError(f"{file} of {name!r} {damage}")
            try:
                return _checked(_with_late_tokens(read(name, files)))
            except _DAMAGE as error:
                reason = f"{type(error).__name__}: {error}"
                raise CheckpointError(f"the {file} of {name!r} cannot be read ({reason}); {REMEDY}") from None
    if unknown := files.keys() - _BESIDE.keys():
        raise CheckpointError(f"{name!r} has no {TOKENIZER}, and {', '.join(sorted(unknown))} cannot be read; {REMEDY}")
    return None


#: What reading a file raises that is not what its name says.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, struct.error)
#: What to do about a tokenizer that cannot be read or changed.
REMEDY = (
    "save it as a fast tokenizer, which writes tokenizer.json: transformers'"
    " AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
)


def below(tokenizer: Tokenizer, end: int) -> Tokenizer:
    """The tokenizer without the tokens of ids from `end` on, for which a model has no rows."""
    if tokenizer.size <= end:
        return tokenizer
    ids = {token: id_ for token, id_ in tokenizer.ids.items() if id_ < end}
    joined = joining(tokenizer.model)
    return replace(
        tokenizer,
        ids=ids,
        added={token: flags for token, flags in tokenizer.added.items() if token in ids},
        merges=[(a, b) for a, b in tokenizer.merges if a in ids and b in ids and joined(a, b) in ids],
        scores={token: score for token, score in tokenizer.scores.items() if token in ids},
    )


def extended(tokenizer: Tokenizer, donors: Sequence[Tokenizer], names: Collection[str] | None = None) -> Tokenizer:
    """The tokenizer with the tokens that others know besides, or those of them in `names`.

    Ids stay; new ones follow, by donor and there by id. Added tokens keep their flags; the first definition is kept,
    with a warning where another differs. A new piece of Unigram has its donor's score, never below the lowest here
    (which would change what an unknown character costs); new words of other models are words here.

    BPE reaches a new token by rules: those of its donors whose parts exist here, then rules for what those leave in
    several pieces. All of them come after the rules here and make new tokens only. So a text is first split as before,
    and then some of the pieces that lie side by side become one new token: what holds none of them stays the same.
    (mergekit adds them as added tokens instead, which are cut out of every text, the middle of words included, and
    in byte-level vocabularies, where a space is written as another letter, are not found at all.)
    """
    ids, added, scores = dict(tokenizer.ids), dict(tokenizer.added), dict(tokenizer.scores)
    lowest = min(scores.values(), default=0.0)
    words: dict[str, None] = {}
    end = tokenizer.size
    for donor in donors:
        new = donor.ids.keys() - ids.keys()
        if names is not None:
            new &= set(names)
        for token in sorted(new, key=lambda token: (donor.ids[token], token)):
            ids[token] = end
            end += 1
            if token not in donor.added:
                words[token] = None
                if scores:
                    scores[token] = max(donor.scores.get(token, lowest), lowest)
        if any(token in words for token in new):
            _warn_of_other_splits(tokenizer, donor)
        defined = [token for token in donor.added if names is None or token in names]
        conflicts = [token for token in defined if added.setdefault(token, donor.added[token]) != donor.added[token]]
        if conflicts:
            fault = f"the tokenizer of {donor.name!r} defines {_some(conflicts)} with other flags than one before it"
            warnings.warn(f"{fault}; the first definition is kept", FastmergeWarning, stacklevel=2)
    words = {token: None for token in words if token not in added}
    merges = tokenizer.merges
    if words and tokenizer.model.get("type") == "BPE":
        rules = Rules(tokenizer.model, tokenizer.merges, words, ids)
        for donor in donors:
            rules.take(donor.merges)
        if lost := rules.complete():
            fault = f"no text gives {_some(lost)}, which the tokenizer of {tokenizer.name!r} splits elsewhere"
            warnings.warn(f"{fault}; the rows are there", FastmergeWarning, stacklevel=2)
        merges = [*tokenizer.merges, *rules.new]
    return replace(tokenizer, ids=ids, added=added, merges=merges, scores=scores)


def with_added(tokenizer: Tokenizer, names: Sequence[str]) -> Tokenizer:
    """The tokenizer with new added tokens, found in a text as they are written."""
    first = tokenizer.size
    ids = tokenizer.ids | {token: first + i for i, token in enumerate(names)}
    return replace(tokenizer, ids=ids, added=tokenizer.added | {token: _flags({}) for token in names})


def rewritten(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files of a changed tokenizer: tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat
    template. Others, such as vocab.json and tokenizer.model, hold the old vocabulary and are left out."""
    if tokenizer.json is None:
        raise CheckpointError(f"{tokenizer.name!r} has no {TOKENIZER}, so its tokens cannot change; {REMEDY}")
    files = {name: tokenizer.files[name] for name in _BESIDE if name in tokenizer.files and _BESIDE[name]}
    added = sorted(tokenizer.added.items(), key=lambda entry: tokenizer.ids[entry[0]])
    entries = [{"id": tokenizer.ids[token], "content": token, **flags} for token, flags in added]
    files[TOKENIZER] = _text({**tokenizer.json, "added_tokens": entries, "model": _model(tokenizer)}, indent=None)
    for name in (CONFIG, "special_tokens_map.json"):
        if name in files:
            said = _object(files, name)
            changed = {key: value for key, value in _without_unknown(said, tokenizer.ids).items() if key not in _FORKS}
            if "added_tokens_decoder" in changed:
                changed["added_tokens_decoder"] = {
                    str(tokenizer.ids[token]): {"content": token, **flags} for token, flags in added
                }
            files[name] = _text(changed, indent=2)
    return files


# --- reading ---

#: Files that do not hold the vocabulary, and whether they go with another one.
_BESIDE = {
    CONFIG: True,
    "special_tokens_map.json": True,
    "chat_template.jinja": True,
    "chat_template.json": True,
    "added_tokens.json": False,
}


def _from_json(name: str, files: Mapping[str, bytes]) -> Tokenizer:
    said = json.loads(files[TOKENIZER])
    model = said["model"]
    said["model"] = model = {"type": _kind(model), **model}
    vocabulary = model["vocab"]
    scores: dict[str, float] = {}
    if model["type"] == "Unigram":
        scores = {token: float(score) for token, score in vocabulary}
        ids = {token: id_ for id_, (token, _) in enumerate(vocabulary)}
    else:
        ids = dict(sorted(vocabulary.items(), key=lambda entry: (entry[1], entry[0])))
    added = {}
    for entry in sorted(said.get("added_tokens") or [], key=lambda entry: int(entry["id"])):
        ids.setdefault(entry["content"], int(entry["id"]))
        added[entry["content"]] = _flags(entry)
    merges = [(a, b) for a, b in (_pair(rule) for rule in model.get("merges") or [])]
    if not all(type(a) is type(b) is str for a, b in merges):
        raise ValueError("a rule of its merges is not of two tokens")
    if not all(isinstance(model.get(key) or "", str) for key in ("continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError("a prefix or suffix of its model is not text")
    return Tokenizer(name, files, said, ids, added, merges, scores)


def _kind(model: Mapping[str, Any]) -> str:
    """The type of a model; old files do not name it."""
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    if isinstance(model["vocab"], list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _pair(rule: str | Sequence[str]) -> Sequence[str]:
    return rule.split(" ") if isinstance(rule, str) else rule


def _from_pieces(name: str, files: Mapping[str, bytes]) -> Tokenizer:
    """From a sentencepiece model, a protocol buffer whose field 1 are the pieces, each of text, score and type."""
    ids: dict[str, int] = {}
    scores: dict[str, float] = {}
    added = {}
    for piece in (value for field, value in _protocol(files["tokenizer.model"]) if field == 1):
        fields = dict(_protocol(piece))
        token, kind = fields[1].decode(), fields.get(3, 1)
        (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
        scores[token] = score
        ids[token] = len(ids)
        if kind in (2, 3, 4):  # unknown, control, defined by the user
            added[token] = _flags({"special": kind != 4})
    if not ids:
        raise ValueError("it holds no pieces")
    return Tokenizer(name, files, None, ids, added, [], scores)


def _protocol(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a protocol buffer: an int, or the bytes."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number in it has no end")
            if shift > 63:
                raise ValueError("it is no protocol buffer")

    while at < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or number()
        if key & 7 not in (1, 2, 5) or at + size > len(data):
            raise ValueError("it is no protocol buffer")
        yield key >> 3, data[at : at + size]
        at += size


def _from_vocabulary(name: str, files: Mapping[str, bytes]) -> Tokenizer:
    """From vocab.json, and the rules of merges.txt."""
    ids = {token: int(id_) for token, id_ in json.loads(files["vocab.json"]).items()}
    lines = files.get("merges.txt", b"").decode().split("\n")
    rules = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(a, b) for a, b in rules]
    return Tokenizer(name, files, None, dict(sorted(ids.items(), key=lambda entry: entry[1])), {}, merges, {})


def _from_lines(name: str, files: Mapping[str, bytes]) -> Tokenizer:
    """From vocab.txt, a token per line."""
    lines = files["vocab.txt"].decode().removesuffix("\n").split("\n")
    return Tokenizer(name, files, None, {line.rstrip("\r"): id_ for id_, line in enumerate(lines)}, {}, [], {})


_READERS: Mapping[str, Callable[[str, Mapping[str, bytes]], Tokenizer]] = {
    TOKENIZER: _from_json,
    "tokenizer.model": _from_pieces,
    "vocab.json": _from_vocabulary,
    "vocab.txt": _from_lines,
}


def _with_late_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """With the added tokens that other files name besides: transformers adds them when it loads the tokenizer."""
    ids, added = dict(tokenizer.ids), dict(tokenizer.added)
    taken = set(ids.values())
    config = _object(tokenizer.files, CONFIG)
    late = [(int(id_), entry["content"], entry) for id_, entry in (config.get("added_tokens_decoder") or {}).items()]
    if not late:
        late = [(int(id_), token, {}) for token, id_ in _object(tokenizer.files, "added_tokens.json").items()]
    for id_, token, entry in sorted(late, key=lambda one: one[:2]):
        if token not in ids and id_ not in taken:
            ids[token] = id_
            taken.add(id_)
        if ids.get(token) == id_:
            added.setdefault(token, _flags(entry))
    if tokenizer.json is None:
        for key, value in {**_object(tokenizer.files, "special_tokens_map.json"), **config}.items():
            entry = value if isinstance(value, dict) else {"content": value}
            if key.endswith("_token") and isinstance(token := entry.get("content"), str) and token in ids:
                added.setdefault(token, _flags({**entry, "special": True}))
    return replace(tokenizer, ids=dict(sorted(ids.items(), key=lambda entry: entry[1])), added=added)


def _checked(tokenizer: Tokenizer) -> Tokenizer:
    if not all(type(token) is str for token in tokenizer.ids):
        raise ValueError("a token is not text")
    if not all(type(id_) is int and 0 <= id_ < _MOST_IDS for id_ in tokenizer.ids.values()):
        raise ValueError(f"an id is not a whole number below {_MOST_IDS}")
    return tokenizer


#: Sixteen times as many as the largest vocabularies have: a row is planned for each id.
_MOST_IDS = 1 << 22


def _flags(entry: Mapping[str, Any]) -> dict[str, bool]:
    return {flag: bool(entry.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    value = json.loads(files.get(name, b"{}"))
    if not isinstance(value, dict):
        raise ValueError(f"{name} beside it is no JSON object")
    return value


# --- more tokens ---


def _warn_of_other_splits(tokenizer: Tokenizer, donor: Tokenizer) -> None:
    if tokenizer.json is None or donor.json is None:
        return
    parts = [part for part in ("normalizer", "pre_tokenizer") if tokenizer.json.get(part) != donor.json.get(part)]
    if tokenizer.model["type"] != donor.model["type"]:
        parts.append("model")
    if parts:
        fault = f"the tokenizers of {tokenizer.name!r} and {donor.name!r} split text differently ({', '.join(parts)})"
        remedy = "a text may not give all the tokens that the second adds"
        warnings.warn(f"{fault}: {remedy}", FastmergeWarning, stacklevel=3)


def _some(tokens: Sequence[str]) -> str:
    return f"{len(tokens)} tokens, such as {tokens[0]!r}," if len(tokens) > 1 else f"the token {tokens[0]!r}"


# --- writing ---


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    """The model of tokenizer.json. An added token that is not in its vocabulary gets the first free id when it is
    loaded, whatever its entry says; where that is another, all added tokens are in the vocabulary."""
    before = tokenizer.model["vocab"]
    inside = before if isinstance(before, dict) else {token for token, _ in before}
    outside = {token for token in tokenizer.added if token not in inside}
    vocabulary = {token: id_ for token, id_ in tokenizer.ids.items() if token not in outside}
    if sorted(tokenizer.ids[token] for token in outside) != list(range(len(vocabulary), len(tokenizer.ids))):
        vocabulary = tokenizer.ids
    vocabulary = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
    model = {**tokenizer.model, "vocab": vocabulary}
    if model["type"] == "Unigram":
        lowest = min(tokenizer.scores.values())
        model["vocab"] = [[token, tokenizer.scores.get(token, lowest)] for token in vocabulary]
        if list(vocabulary.values()) != list(range(len(vocabulary))):
            raise CheckpointError(f"the ids of {TOKENIZER} of {tokenizer.name!r} have holes; {REMEDY}")
    if model["type"] == "BPE":
        older = any(isinstance(rule, str) for rule in model.get("merges") or ())  # rules as text, with a space between
        older = older and not any(" " in part for rule in tokenizer.merges for part in rule)
        model["merges"] = [" ".join(rule) if older else list(rule) for rule in tokenizer.merges]
    return model


def _without_unknown(said: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
    """Settings without the special tokens that are not there: transformers would add them, and they have no rows."""

    def unknown(value: Any) -> bool:
        token = value.get("content") if isinstance(value, dict) else value
        return isinstance(token, str) and token not in ids

    lists = {
        key: [token for token in value if not unknown(token)]
        for key, value in said.items()
        if key in ("additional_special_tokens", "extra_special_tokens") and isinstance(value, list)
    }
    kept = {key: value for key, value in said.items() if not (key.endswith("_token") and unknown(value))}
    return kept | lists


#: Settings that name other files instead of tokenizer.json.
_FORKS = ("fast_tokenizer_files", "tokenizer_file", "vocab_file", "merges_file")


def _text(value: Any, indent: int | None) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent).encode() + b"\n"
    except UnicodeEncodeError:
        raise CheckpointError(f"a tokenizer holds half a surrogate pair, which is no text; {REMEDY}") from None
