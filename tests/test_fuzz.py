"""Hostile inputs: what reads a file takes it or says in one line why not, and the ops give the bits of the definition
for any setting. `make fuzz` tries more, for as long as it is told."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import shutil
import signal
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import drawn
import fuzzing
import numpy as np
import pytest
import torch
import yaml
from conftest import compiled_core
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastmerge import Recipe, batches, merge, merge_tensors, provenance
from fastmerge.checkpoint import journal, open_checkpoint, read_header
from fastmerge.checkpoint.folder import JOURNAL
from fastmerge.errors import CheckpointError, FastmergeError, OutputError
from fastmerge.sources.adapter import open_adapter
from fastmerge.vocabulary import tokens
from fastmerge.vocabulary.files import open_tokenizer
from fastmerge.vocabulary.setting import TokenizerSetting, TokenRow

pytestmark = pytest.mark.filterwarnings("ignore::fastmerge.errors.FastmergeWarning")

SECONDS = 20  # for a file of a few kilobytes: a hang, however slow the machine
MOST_BYTES = 64 << 20

# --- files that are sound, from which hostile ones are made ---

MODEL = {
    "a.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "b": np.array(7, np.int64),
    "c-0": np.zeros((0, 7), np.float32),
}
SHARD = "model-00001-of-00001.safetensors"
INDEX = {"metadata": {"total_size": 20}, "weight_map": dict.fromkeys(MODEL, SHARD)}
RECIPE = """
name: half
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 0.7, density: [0, 0.5, 1]}
  - model: b+adapter
    parameters: &p {weight: [{filter: mlp, value: 1}, {value: 0.25}], density: 0.5}
parameters: {normalize: true, lambda: 1e-1}
dtype: bfloat16
tokenizer: {source: union, tokens: {"<x>": {source: a, force: true}, "<y>": {source: {kind: zero}}}}
---
merge_method: slerp
base_model: half
slices:
  - sources: [{model: half, layer_range: [0, 4]}, {model: c, layer_range: [0, 4]}]
    parameters: {t: [0, 0.3]}
"""
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"mlp.up": 3},
    "alpha_pattern": {"^model.*down": 8},
    "use_rslora": True,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": ["q", "mlp.up"],
    "base_model_name_or_path": "some/base",
    "fan_in_fan_out": False,
}
FACTORS = {
    f"base_model.model.{module}.lora_{part}.weight": np.ones(shape, np.float32)
    for module, rank in (("l.0.q", 2), ("l.0.mlp.up", 3))
    for part, shape in (("A", (rank, 5)), ("B", (4, rank)))
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 5, "content": "<s>", "special": True, "lstrip": False, "normalized": False}],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel"},
    "model": {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2, "c": 3, "abc": 4},
        "merges": [["a", "b"], "ab c"],
        "unk_token": None,
    },
}
UNIGRAM = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.5], ["b", -2]]}}
OTHER_TOKENIZER = {**TOKENIZER, "model": {**TOKENIZER["model"], "vocab": {"b": 0, "a": 1, "x": 2}, "merges": []}}
# --- how each is read ---


def header(path: Path, data: bytes) -> None:
    """Also as the library reads it, but for what is listed."""
    path.write_bytes(data)
    theirs = read_by_library(path)
    if message := refusal(lambda: read_header(path)):
        stricter = any(row.says in message for row in STRICTER)
        assert theirs is None or stricter, f"only the library takes it: {message}"
    ours = read_header(path).tensors.values()
    assert {info.name: (info.dtype, list(info.shape)) for info in ours} == theirs


def read_by_library(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError:
        return None


def index(path: Path, data: bytes) -> None:
    (path / SHARD).write_bytes(save(MODEL))
    (path / "model.safetensors.index.json").write_bytes(data)
    open_checkpoint(path)


def recipe(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    Recipe.load(path)


def adapter(path: Path, data: bytes) -> None:
    (path / "adapter_model.safetensors").write_bytes(save(FACTORS))
    (path / "adapter_config.json").write_bytes(data)
    open_adapter(path)


def tokenizer(path: Path, data: bytes) -> None:
    """Also joined with another, either way round."""
    models = [
        tokens.Tokenized("hostile", {"tokenizer.json": data}, 8),
        tokens.Tokenized("other", {"tokenizer.json": json.dumps(OTHER_TOKENIZER).encode()}, 8),
    ]
    wanted = {"<new>": None, "a": TokenRow(0, "b", True, "here")}
    for base, source in ((0, "union"), (1, "union"), (1, 0)):
        tokens.vocabulary(models, TokenizerSetting(source, wanted, 8, "here"), base)


def pieces(path: Path, data: bytes) -> None:
    open_tokenizer("hostile", {"tokenizer.model": data})


def record(path: Path, data: bytes) -> None:
    (path / "fastmerge.json").write_bytes(data)
    provenance.read(path)


def config(path: Path, data: bytes) -> None:
    (path / "model.safetensors").write_bytes(save(MODEL))
    (path / "config.json").write_bytes(data)
    open_checkpoint(path)


@cache
def written_by_a_merge() -> bytes:
    """A fastmerge.json."""
    with tempfile.TemporaryDirectory() as folder:
        merge(small_recipe(Path(folder)), Path(folder, "out"))
        return Path(folder, "out", "fastmerge.json").read_bytes()


def small_recipe(folder: Path) -> Path:
    """Of two models beside it."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        tensors = {f"layers.{n}.weight": rng.standard_normal((4, 8)).astype(np.float32) for n in range(3)}
        (folder / name / "model.safetensors").write_bytes(save(tensors))
    path = folder / "recipe.yml"
    path.write_text("merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n")
    return path


class Kind(NamedTuple):
    """A kind of file: who reads it, given a path, which is a folder where the name has no suffix; the documents that
    hostile ones are made from, and as what they are written."""

    read: Callable[[Path, bytes], None]
    name: str
    sound: Callable[[], list[Any]]
    write: Callable[[Any], bytes]


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def as_header(document: Any) -> bytes:
    text = json.dumps(document, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + save(MODEL)[-20:]


def as_yaml(documents: Any) -> bytes:
    return yaml.safe_dump_all(documents if isinstance(documents, list) else [documents]).encode()


def as_pieces(entries: Any) -> bytes:
    """A sentencepiece model of texts, scores and types, all short."""
    held = [
        b"\n" + bytes([len(text)]) + text.encode() + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        for text, score, kind in entries
    ]
    return b"".join(b"\n" + bytes([len(piece)]) + piece for piece in held)


KINDS = {
    "headers": Kind(header, "model.safetensors", lambda: [json.loads(save(MODEL, {"format": "pt"})[8:-20])], as_header),
    "indexes": Kind(index, "model", lambda: [INDEX], as_json),
    "recipes": Kind(recipe, "recipe.yml", lambda: [list(yaml.safe_load_all(RECIPE))], as_yaml),
    "adapters": Kind(adapter, "adapter", lambda: [ADAPTER], as_json),
    "tokenizers": Kind(tokenizer, "tokenizer", lambda: [TOKENIZER, UNIGRAM], as_json),
    "pieces": Kind(pieces, "tokenizer", lambda: [[("<unk>", 0.0, 2), ("a", -1.5, 1), ("b", -2.5, 1)]], as_pieces),
    "records": Kind(record, "merged", lambda: [json.loads(written_by_a_merge())], as_json),
    "configs": Kind(config, "model", lambda: [{"model_type": "llama", "rope": {"a": [1.5]}}], as_json),
}


def check(kind: Kind, folder: Path, data: bytes) -> None:
    """The file is taken, or refused by an error of one line; soon, and in little memory."""
    path = folder / kind.name
    if not path.suffix:
        path.mkdir(exist_ok=True)
    with within_limits():
        message = refusal(lambda: kind.read(path, data))
    assert "\n" not in message, f"more than a line: {message}"


def refusal(read: Callable[[], object]) -> str:
    """The message of its FastmergeError; empty where it raises none."""
    try:
        read()
    except FastmergeError as error:
        return str(error)
    return ""


@contextmanager
def within_limits() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise TimeoutError(f"no answer for {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    tracemalloc.start()
    try:
        yield
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert most < MOST_BYTES, f"{most:,} bytes of memory"


# --- mutations ---

_JUNK = st.one_of(
    st.sampled_from(
        [None, True, False, 0, -1, 1, 2, 0.5, -0.0, 2**31, 2**63, 2**64, 10**400, 1e308, float("inf"), float("nan")]
    ),
    st.sampled_from(["", "a", "..", "/etc/passwd", "\0", "a\nb\x1b[31m", "\ud800", "(a+)+$", "[", "1e-3", "a" * 500]),
    st.sampled_from([[], {}, [[]], [None], {"": None}, {"a": {"a": []}}, [0, 1], ["a", "b"], [0.5, -1]]),
    st.integers(0, 200).map(lambda depth: json.loads("[" * depth + "]" * depth) if depth else []),
)


@st.composite
def other_documents(draw: st.DrawFn, document: Any) -> Any:
    """With some of its values replaced, removed, swapped or doubled."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            return draw(_JUNK)
        holder, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "replace", "remove", "swap", "rename"]))
        other_holder, other_key = draw(st.sampled_from(places))
        if change == "replace":
            holder[key] = copy.deepcopy(draw(_JUNK))
        elif change == "remove":
            del holder[key]
        elif change == "swap":
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif isinstance(holder, dict):
            name = draw(st.one_of(st.text(max_size=4), st.sampled_from(["__metadata__", "<<", "rank_pattern"])))
            holder[name] = holder[key]
        else:
            holder.insert(0, holder[key])
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Each holder of a value, and the key of it there."""
    children = document.items() if isinstance(document, dict) else enumerate(document if type(document) is list else ())
    for key, value in list(children):
        yield document, key
        yield from _places(value)


_PIECES = st.one_of(
    st.sampled_from(rb"-0 1e0 1.0 1e999 null true [] {} [0,0] NaN 0 9 - 18446744073709551616 0x1f .inf <<:".split()),
    st.sampled_from(rb'" "" \u0000 \ud83d \ud800 , : { } [ ] && *a *p &a !!int !!python/object: | > ? --- ...'.split()),
    st.sampled_from([b" ", b"\t", b"\n", b"\n  ", b"\n- ", b": ", b"\0", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\x1b[m"]),
    st.sampled_from([b"[" * 200, b"{" * 200, b'{"a":' * 200, b"- " * 200, b"9" * 5000, b"PK\x03\x04", b"<html>"]),
    st.binary(max_size=9),
)


@st.composite
def other_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """With some of its bytes replaced, cut out, doubled or moved."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.one_of(st.integers(0, 9), st.integers(0, 400))))
        piece = draw(st.one_of(_PIECES, st.just(data[begin:end] * 2)))
        data = data[:begin] + piece + data[end:]
    return data


def hostile(kind: Kind) -> st.SearchStrategy[bytes]:
    documents = st.sampled_from(kind.sound())
    changed = documents.flatmap(other_documents).map(lambda document: _written(kind, document))
    return st.one_of(changed, changed.flatmap(other_bytes), documents.map(kind.write).flatmap(other_bytes))


def _written(kind: Kind, document: Any) -> bytes:
    try:
        return kind.write(document)
    except (AttributeError, OverflowError, TypeError, ValueError, struct.error, yaml.YAMLError):
        return b""  # a file of this kind cannot say that


# --- what is refused, and what is not ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_is_taken(kind: str, tmp_path: Path) -> None:
    for document in KINDS[kind].sound():
        if not (path := tmp_path / KINDS[kind].name).suffix:
            path.mkdir(exist_ok=True)
        KINDS[kind].read(path, KINDS[kind].write(document))


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_taken_or_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    suffix = Path(KINDS[kind].name).suffix or (".model" if kind == "pieces" else ".json")
    with fuzzing.counted(kind) as count:

        @fuzzing.examples(300)
        @given(hostile(KINDS[kind]))
        def tried(data: bytes) -> None:
            count()
            with fuzzing.kept(kind, suffix, data):
                check(KINDS[kind], tmp_path, data)

        tried()


@pytest.mark.parametrize(
    "path",
    [path for kind in KINDS for path in fuzzing.corpus(kind)],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_a_file_that_was_kept_is_taken_or_refused_in_one_line(path: Path, tmp_path: Path) -> None:
    check(KINDS[path.parent.name], tmp_path, path.read_bytes())


@pytest.mark.parametrize("pattern", ["(a|a)*b", "(a+)+b", ".*.*.*.*.*.*b", "((a*))*b", "(a{1,9}){1,9}{1,9}b"])
def test_no_pattern_of_an_adapter_takes_forever(pattern: str, tmp_path: Path) -> None:
    name = f"base_model.model.{'a' * 300}.lora_"
    factors = {f"{name}{part}.weight": np.ones((2, 2), np.float32) for part in "AB"}
    (tmp_path / "adapter_model.safetensors").write_bytes(save(factors))
    (tmp_path / "adapter_config.json").write_bytes(as_json({**ADAPTER, "rank_pattern": {pattern: 3}}))
    with within_limits():
        assert "take forever" in refusal(lambda: open_adapter(tmp_path))


@pytest.mark.parametrize("data", [b"\xff" * 2_000_000, b"\n" + b"\xff" * 2_000_000], ids=["key", "length"])
def test_no_number_of_a_sentencepiece_model_takes_forever(data: bytes) -> None:
    with within_limits():
        assert "has no end" in refusal(lambda: open_tokenizer("m", {"tokenizer.model": data}))


# --- where headers are read more strictly than by the safetensors library ---


class Stricter(NamedTuple):
    """Why a header is refused that the library reads, what the message says, and the file of the corpus that shows
    it."""

    reason: str
    says: str
    file: str


_ENTRY = "is not a dtype, a shape and two data_offsets"
STRICTER = [
    Stricter("of two tensors with a name, the second would win", "there twice", "name-twice"),
    Stricter("of two values of a key, the second would win", "there twice", "metadata-key-twice"),
    Stricter("the format has an object of strings there", "__metadata__ is not a flat object", "metadata-of-null"),
    Stricter("no file system, no index and no recipe can name it", "is empty or holds a NUL", "empty-name"),
    Stricter("other readers take the name to end there", "is empty or holds a NUL", "NUL-in-a-name"),
    Stricter("the format says that the first byte is {", "does not begin with `{`", "leading-space"),
    Stricter("the format says that padding is of spaces", "end with `}` and spaces", "padding-of-tabs"),
    Stricter("the format has an object there; that an array is read is serde's doing", _ENTRY, "entry-as-an-array"),
    Stricter("the format has a string there; that an object is read is serde's doing", _ENTRY, "dtype-as-an-object"),
]


@pytest.mark.parametrize("row", STRICTER, ids=lambda row: row.file)
def test_what_is_listed_is_still_stricter_than_the_library(row: Stricter) -> None:
    file = fuzzing.CORPUS / "headers" / f"stricter-{row.file}.safetensors"
    with pytest.raises(CheckpointError, match=re.escape(row.says)):
        read_header(file)
    assert read_by_library(file) is not None


# --- the journal of a merge that was cut short ---


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, what it merges into, and an output that is all but renamed."""
    compiled_core()
    folder = tmp_path_factory.mktemp("unfinished")
    merge(small_recipe(folder), folder / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", full_disk)
        patch.setattr(journal, "_TOGETHER", 1)
        patch.setattr(batches, "BATCH_JOBS", 1)
        with pytest.raises(OutputError):
            merge(folder / "recipe.yml", folder / "cut")
    assert (folder / "cut" / JOURNAL).read_bytes().count(b"\n") == 4
    return folder


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lines(documents: list[Any]) -> bytes:
    return b"".join(as_json(document) + b"\n" for document in documents)


def test_a_hostile_journal_is_gone_on_with_or_refused_and_spoils_nothing(unfinished: Path, tmp_path: Path) -> None:
    sound = (unfinished / "cut" / JOURNAL).read_bytes()
    kind = Kind(header, "", lambda: [[json.loads(line) for line in sound.splitlines()]], lines)
    with fuzzing.counted("journals") as count:

        @fuzzing.examples(100)
        @given(hostile(kind))
        def tried(data: bytes) -> None:
            count()
            with fuzzing.kept("journals", ".jsonl", data.split(b"\n", 1)[-1]):
                go_on(unfinished, tmp_path / "out", data)

        tried()


@pytest.mark.parametrize("path", fuzzing.corpus("journals"), ids=lambda path: path.stem)
def test_lines_of_a_journal_that_were_kept_spoil_nothing(unfinished: Path, tmp_path: Path, path: Path) -> None:
    first, *rest = (unfinished / "cut" / JOURNAL).read_bytes().splitlines(keepends=True)
    go_on(unfinished, tmp_path / "out", first + path.read_bytes())
    go_on(unfinished, tmp_path / "out", first + path.read_bytes() + b"".join(rest))


def go_on(unfinished: Path, out: Path, data: bytes) -> None:
    """The merge, with another journal, ends in the bytes of one that was not cut short, or is refused."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(unfinished / "cut", out)
    (out / JOURNAL).write_bytes(data)
    with within_limits():
        message = refusal(lambda: merge(unfinished / "recipe.yml", out))
    assert "\n" not in message, f"more than a line: {message}"
    for path in () if message else (unfinished / "whole").glob("model*"):
        assert (out / path.name).read_bytes() == path.read_bytes()


# --- the ops, and what tensors look like in memory ---


def test_any_setting_of_an_op_gives_what_the_definition_does() -> None:
    native = compiled_core()
    isas = [(native, isa) for isa in native.isas()]
    with fuzzing.counted(f"settings of the ops on {', '.join(native.isas())}") as count:

        @fuzzing.examples(150)
        @given(drawn.drawn())
        def tried(setting: drawn.Setting) -> None:
            count()
            with fuzzing.kept("settings", ".json", str(setting).encode()):
                drawn.check(setting, isas)

        tried()


@pytest.mark.parametrize("path", fuzzing.corpus("settings"), ids=lambda path: path.stem)
def test_a_setting_that_was_kept_gives_what_the_definition_does(path: Path) -> None:
    native = compiled_core()
    drawn.check(drawn.Setting.read(path), [(native, isa) for isa in native.isas()])


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a shape in some layout: transposed, every other one of a larger, from an offset on, expanded."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**30)))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    skips = [draw(st.integers(0, 2)) for _ in shape]
    whole = [skip + size * step for size, step, skip in zip(shape, steps, skips, strict=True)]
    tensor = torch.randn([whole[axis] for axis in order], generator=generator).to(dtype)
    tensor = tensor.permute([order.index(axis) for axis in range(len(shape))])
    for axis, (size, step, skip) in enumerate(zip(shape, steps, skips, strict=True)):
        tensor = tensor.narrow(axis, skip, size * step)[(slice(None),) * axis + (slice(None, None, step),)]
    if shape and draw(st.booleans()) and draw(st.booleans()):
        tensor = tensor.narrow(0, 0, min(1, shape[0])).expand(shape)
    assert tensor.shape == torch.Size(shape)
    return tensor


@st.composite
def in_memory(draw: st.DrawFn) -> tuple[str, list[torch.Tensor], torch.Tensor | None, dict[str, Any]]:
    """A method, its models, base and parameters."""
    method, based, parameters = draw(
        st.sampled_from(
            [
                ("linear", False, {"weight": 0.4}),
                ("ties", True, {"weight": 0.7, "density": 0.5}),
                ("dare_ties", True, {"weight": 0.7, "density": 0.5}),
                ("breadcrumbs", True, {"weight": 0.7, "density": 0.5, "gamma": 0.1}),
                ("model_stock", True, {}),
            ]
        )
    )
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    dtype = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
    models = [draw(layouts(shape, draw(dtype))) for _ in range(draw(st.integers(2, 8)))]
    return method, models, draw(layouts(shape, draw(dtype))) if based else None, parameters


def test_no_layout_of_a_tensor_changes_a_bit() -> None:
    """It is refused, or merged as its contiguous copy is."""
    compiled_core()
    merged = []
    with fuzzing.counted("layouts of tensors") as count:

        @fuzzing.examples(200)
        @given(in_memory())
        def tried(case: tuple[str, list[torch.Tensor], torch.Tensor | None, dict[str, Any]]) -> None:
            count()
            method, models, base, parameters = case
            copies = [None if each is None else each.contiguous().clone() for each in (*models, base)]
            wanted = merge_tensors(method, copies[:-1], copies[-1], **parameters)
            found: list[torch.Tensor] = []
            if message := refusal(lambda: found.append(merge_tensors(method, models, base, **parameters))):
                assert "contiguous" in message
            merged.extend(found)
            for each in found:
                assert torch.equal(each.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8))

        tried()
    assert len(merged) > 40, "hardly any were not refused"
