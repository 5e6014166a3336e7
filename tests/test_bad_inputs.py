"""Every way in which inputs are bad, through the command line: who is named, what is left, and that nothing is lost."""

from __future__ import annotations

import ast
import json
import math
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import compiled_core
from safetensors.numpy import load_file, save_file
from test_header import unprivileged

from fastmerge import cli
from fastmerge.sweep import Found, Inputs, Part, Run, Sweep, Target, View

Tensors = dict[str, np.ndarray]

#: What a bad input may be, as the table of inputs has it; E: an error, W: a warning and a result, OK: a result.
ROWS = (
    # safetensors files
    "shorter than 8 bytes; header length 0, beyond the file, beyond 100 MB, 2^64-1",
    "header not UTF-8, not JSON, not an object, nested thousands deep",
    "first byte not `{`; padding other than spaces; trailing bytes; hole, overlap, alias; end before begin; "
    "first offset not 0; last end not the file's end",
    "shape x dtype overflows, or differs from the byte range; negative or fractional dimension; "
    "duplicate tensor name (also inside an entry)",
    "`__metadata__` not a flat object of strings; empty name, NUL in a name",
    "unknown dtype name",
    "data not aligned to its dtype",
    "zero tensors, zero-element tensors, scalars; 2^31 and 2^32 elements; one tensor larger than memory",
    "a file that changes or is cut while it is read",
    "FIFO, folder, device, dangling link, no permission",
    "git-LFS pointer; HTML page; zip, pickle or GGUF under the name",
    "`.bin`, `.pt`, `.ckpt`",
    # sharded models
    "shard missing; tensor in the index but in no shard; shard path absolute, with `..`, or a link out of the folder; "
    "the same tensor in two shards",
    "shard or tensor on disk that the index doesn't name; wrong `total_size`; both an index and a single file",
    # sets of models
    "tensor in some models only; shapes differ (vocabulary rows, heads, transposed)",
    "dtypes differ between models",
    "integer or bool buffers",
    "prefixes differ (`model.`, `base_model.model.`, `_orig_mod.` ...)",
    "tied embeddings in one, untied in another",
    "quantised weights (bitsandbytes, GPTQ, AWQ, compressed-tensors, block FP8 with scales, MXFP4)",
    "config.json differs in what changes the maths (rope, norm eps, hidden size, heads)",
    "base missing for a delta method",
    # values
    "NaN or Inf in an input",
    "overflow when narrowing to fp16 or fp8",
    "-0.0, denormals, all-equal magnitudes, all zeros",
    "SLERP of zero, parallel, opposite tensors",
    "weight NaN or infinite, wrong count; weights summing to 0 with normalise",
    "density or t out of range or NaN",
    # LoRA adapters
    "an adapter tensor that matches nothing in the base",
    "A without B; rank differs; rank in the config differs from the tensor; alpha missing; r = 0",
    "rsLoRA, rank_pattern, alpha_pattern, fan_in_fan_out, modules_to_save, DoRA, embedding LoRA, bias",
    "the adapter names another base model",
    # recipes
    'unknown key or method (with "did you mean"), duplicate YAML key, YAML tag, alias bomb, empty file, over 10 MB',
    "layer_range reversed, out of bounds, empty; sources of one slice with different lengths; "
    "filter that matches nothing (W)",
    "cycle between stages",
    # environment
    "output folder is an input, or inside one; exists and isn't empty (without `--overwrite` or its own journal)",
    "too little disk for the output",
    "SIGINT, SIGTERM, SIGKILL at any moment",
    "two processes on one output",
    "no GPU, driver too old, Triton missing, GPU out of memory",
    "more shards than open files allowed; memory limit of the container",
)

#: Tests for the rows, or the parts of them, that no command over small files shows.
ELSEWHERE = {
    "zero tensors, zero-element": [
        "test_engine::test_memory_stays_below_the_limit_whatever_the_models_size",
        "test_gpu::test_a_tensor_of_any_length",
    ],
    "a file that changes or is cut": ["test_engine::test_a_file_that_is_cut_while_it_is_read_is_an_error"],
    "NaN or Inf": [
        "test_ops::test_what_is_not_finite_is_not_measured",
        "test_ops::test_a_dropped_nan_is_gone_and_a_trimmed_one_stays",
    ],
    "-0.0": ["test_ops::test_merge_has_the_bits_of_the_reference", "test_ops::test_threshold_keeps_exactly_the_rank"],
    "SLERP of zero": ["test_methods::test_slerp_where_there_is_no_angle"],
    "too little disk": ["test_resume::test_a_disk_that_fails_is_one_sentence_and_the_same_command_goes_on"],
    "SIGINT": [
        "test_resume::test_killed_at_a_call_the_same_command_ends_in_the_same_bytes",
        "test_resume::test_a_signal_ends_a_merge_with_a_sentence_and_the_same_command_goes_on",
        "test_resume::test_ended_at_random_moments",
    ],
    "two processes": [
        "test_writer::test_a_second_writer_of_the_same_folder",
        "test_resume::test_two_processes_on_one_output",
    ],
    "no GPU": [
        "test_cli::test_a_gpu_backend_that_is_out_is_one_sentence_with_the_remedy",
        "test_cli::test_info_says_why_a_backend_is_out",
        "test_streaming::test_lanes_make_do_with_half_where_memory_is_short",
        "test_streaming::test_a_gpu_without_memory_is_an_error_that_says_what_to_do",
    ],
    "more shards": [
        "test_engine::test_more_shards_than_a_process_may_open_files",
        "test_resume::test_a_merge_within_a_limit_of_memory",
    ],
}


class Case(NamedTuple):
    """A row's input: how models and recipe are spoiled, and what comes of the command.

    `names` are in the one message that tells of it, the culprit first; without any, nothing may be told. `found` looks
    at a merge that was made, and may say False.
    """

    row: str
    kind: str
    spoil: Callable[[], object]
    names: tuple[str, ...]
    code: int
    recipe: str
    arguments: tuple[str, ...]
    found: Callable[[], object]
    planned: bool  # whether planning tells already, and so `check` does; else the values tell, which a report looks at


CASES: list[Case] = []
LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [model: a, model: b]\nparameters: {weight: 1, density: 0.5}\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [model: b]\nparameters: {t: 0.5}\n"
ADAPTED = "merge_method: passthrough\nmodels: [model: base+adapter]\n"
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj"
FILE = "a/model.safetensors"
INDEX = "a/model.safetensors.index.json"


def nothing() -> None:
    pass


def case(
    start: str,
    kind: str,
    spoil: Callable[[], object],
    *names: str,
    code: int | None = None,
    recipe: str = LINEAR,
    arguments: Sequence[str] = ("merge", "recipe.yml", "out"),
    found: Callable[[], object] = nothing,
    planned: bool = True,
) -> None:
    """A case of the row that begins so: an error where it names something."""
    (row,) = (row for row in ROWS if row.startswith(start))
    ends = (2 if names else 0) if code is None else code
    CASES.append(Case(row, kind, spoil, names, ends, recipe, tuple(arguments), found, planned))


def odd(start: str, kind: str, spoil: Callable[[], object], *names: str, **more: Any) -> None:
    """A case with a warning, and a result."""
    case(start, kind, spoil, *names, code=0, **more)


# --- models, and how they are spoiled ---


def model(seed: int, shapes: Sequence[tuple[str, tuple[int, ...]]] = ()) -> Tensors:
    rng = np.random.default_rng(seed)
    layers = [(f"model.layers.{n}.self_attn.q_proj.weight", (6, 8)) for n in (0, 1)]
    wanted = shapes or [(EMBED, (10, 8)), *layers, (NORM, (8,)), (HEAD, (10, 8))]
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in wanted}


CONFIG = {"architectures": ["TinyForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base, two fine-tunes a and b, and an adapter of the base."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "a", "b")):
        Path(name).mkdir()
        save_file(model(seed), f"{name}/model.safetensors")
        write(f"{name}/config.json", CONFIG)
    Path("adapter").mkdir()
    save_file(pair(), "adapter/adapter_model.safetensors")
    write("adapter/adapter_config.json", ADAPTER)


ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}


def pair(module: str = Q, rank: int = 2, out: int = 6, inputs: int = 8) -> Tensors:
    stem = f"base_model.model.{module}.lora_"
    return model(7, [(f"{stem}A.weight", (rank, inputs)), (f"{stem}B.weight", (out, rank))])


def write(path: str, content: Any) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    Path(path).write_bytes(data)


def wrote(path: str, content: Any) -> Callable[[], None]:
    return lambda: write(path, content)


def resaved(name: str, change: Callable[[Tensors], Tensors]) -> Callable[[], None]:
    """A model with other tensors."""
    return lambda: save_file(change(load_file(f"{name}/model.safetensors")), f"{name}/model.safetensors")


def both(one: Callable[[], object], two: Callable[[], object]) -> Callable[[], None]:
    def spoil() -> None:
        one()
        two()

    return spoil


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file by the text of its header, whose length may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sparse(size: int, start: bytes) -> Callable[[], None]:
    """A file of zeros but for its start, which takes no space."""

    def spoil() -> None:
        write(FILE, start)
        os.truncate(FILE, size)

    return spoil


def config(name: str, **keys: Any) -> Callable[[], None]:
    return wrote(f"{name}/config.json", {**CONFIG, **keys})


def adapter(tensors: Tensors | None = None, **keys: Any) -> Callable[[], None]:
    """The adapter with other tensors or keys of its config; None takes one away."""

    def spoil() -> None:
        said = {key: value for key, value in {**ADAPTER, **keys}.items() if value is not None}
        write("adapter/adapter_config.json", said)
        if tensors is not None:
            save_file(tensors, "adapter/adapter_model.safetensors")

    return spoil


def merged(name: str = "out") -> Tensors:
    return load_file(f"{name}/model.safetensors")


def instead(make: Callable[[str], object]) -> Callable[[], None]:
    """Something else in the place of a file."""

    def spoil() -> None:
        os.unlink(FILE)
        make(FILE)

    return spoil


# --- safetensors files ---

for kind, data, names in (
    ("an empty file", b"", ("0 bytes",)),
    ("seven bytes", b"1234567", ("7 bytes",)),
    ("a header of length 0", raw(b"", b"data"), ("does not begin",)),
    ("a header beyond the file", raw(b"{}", length=99), ("99 bytes", "beyond the file's 10")),
    ("a header of 2^64-1 bytes", raw(b"{}", length=2**64 - 1), (str(2**64 - 1),)),
):
    case("shorter than 8", kind, wrote(FILE, data), FILE, *names)
case("shorter than 8", "a header over 100 MB", sparse(200_000_000, raw(b"{", length=100_000_001)), FILE, "100000001")

for kind, data, names in (
    ("no UTF-8", raw(b'{"\xff":1}'), ("not UTF-8 at byte 2",)),
    ("no JSON", raw(b"{nonsense}"), ("invalid",)),
    ("an array", raw(b"[]"), ("does not begin",)),
    ("nested thousands deep", raw(b'{"w":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), ("nested too deep",)),
):
    case("header not UTF-8", kind, wrote(FILE, data), FILE, *names)

TWO = {"v": entry(), "w": entry(offsets=(8, 16))}
for kind, data, names in (
    ("a space first", raw(b" " + json.dumps({"w": entry()}).encode(), bytes(8)), ("does not begin",)),
    ("padding of newlines", raw(json.dumps({"w": entry()}).encode() + b"\n", bytes(8)), ("and spaces",)),
    ("trailing bytes", raw({"w": entry()}, bytes(9)), ("end at byte",)),
    ("a hole", raw({**TWO, "w": entry(offsets=(9, 17))}, bytes(17)), ("a hole before", "'w'")),
    ("an overlap", raw({**TWO, "w": entry(offsets=(4, 12))}, bytes(12)), ("an overlap at", "'w'")),
    ("an alias", raw({**TWO, "w": entry()}, bytes(8)), ("an overlap at", "'w'")),
    ("end before begin", raw({"w": entry(offsets=(8, 0))}, bytes(8)), ("'w'", "[8, 0]")),
    ("a first offset of 8", raw({"w": entry(offsets=(8, 16))}, bytes(16)), ("a hole before", "'w'")),
    ("an end beyond the file's", raw({"w": entry()}, bytes(7)), ("end at byte",)),
):
    case("first byte not", kind, wrote(FILE, data), FILE, *names)

for kind, data, names in (
    ("2^64 elements", raw({"w": entry(shape=(2**32, 2**32))}, bytes(8)), ("'w'",)),
    ("2^64 elements by 0", raw({"w": entry(shape=(2**64, 0), offsets=(0, 0))}), ("'w'",)),
    ("more than its range", raw({"w": entry(shape=(3,))}, bytes(8)), ("'w'", "[3]", "[0, 8]")),
    ("a negative dimension", raw({"w": entry(shape=(-1, -2))}, bytes(8)), ("'w'", "-1")),
    ("a fractional dimension", raw({"w": entry(shape=(2.0,))}, bytes(8)), ("'w'",)),
    ("a name twice", raw(b'{"w":%b,"w":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)), ("'w'", "twice")),
    (
        "a key twice in an entry",
        raw(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        ("'dtype'", "twice"),
    ),
):
    case("shape x dtype", kind, wrote(FILE, data), FILE, *names)

for kind, header, names in (
    ("metadata of null", {"__metadata__": None}, ("__metadata__",)),
    ("metadata of a list", {"__metadata__": ["pt"]}, ("__metadata__",)),
    ("nested metadata", {"__metadata__": {"format": {"a": "b"}}}, ("__metadata__",)),
    ("metadata of numbers", {"__metadata__": {"format": 1}}, ("__metadata__",)),
    ("an empty name", {"": entry()}, ("''", "empty")),
    ("a NUL in a name", {"w\0x": entry()}, (r"'w\x00x'", "NUL")),
):
    case("`__metadata__` not", kind, wrote(FILE, raw(header, bytes(8 * ("__metadata__" not in header)))), FILE, *names)

case("unknown dtype", "F7", wrote(FILE, raw({"w": entry("F7")}, bytes(8))), FILE, "'w'", "'F7'")


def save_misaligned() -> None:
    """Both models, their tensors at odd addresses, behind one byte of another."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        header = {"x": entry("U8", (1,), (0, 1)), "w": entry(offsets=(1, 9))}
        write(f"{name}/model.safetensors", raw(header, b"\7" + np.full(2, value, np.float32).tobytes()))


def found_two() -> None:
    assert merged()["w"].tolist() == [2.0, 2.0]
    assert merged()["x"].tolist() == [7]


case("data not aligned", "one byte off", save_misaligned, found=found_two)


def save_alike(tensors: Tensors) -> Callable[[], None]:
    return lambda: [save_file(tensors, f"{name}/model.safetensors") for name in ("a", "b")] and None


def has(tensors: Tensors) -> Callable[[], None]:
    def found() -> None:
        out = merged()
        assert {name: (each.dtype, each.tolist()) for name, each in out.items()} == {
            name: (each.dtype, each.tolist()) for name, each in tensors.items()
        }

    return found


SMALL = {"none": np.zeros((0, 3), np.float32), "one": np.array(1.5, np.float32), "half": np.zeros((2, 0), np.float16)}
case("zero tensors", "no tensors", save_alike({}), found=has({}))
case("zero tensors", "no elements, and scalars", save_alike(SMALL), found=has(SMALL))


def huge(elements: int) -> Callable[[], None]:
    def spoil() -> None:
        header = raw({"w": entry("BF16", (elements,), (0, 2 * elements))})
        for name in ("a", "b"):
            write(f"{name}/model.safetensors", header)
            try:
                os.truncate(f"{name}/model.safetensors", len(header) + 2 * elements)
            except OSError as error:
                pytest.skip(f"this file system has no sparse file of {2 * elements} bytes: {error.strerror}")

    return spoil


for power in (31, 32, 40):
    case("zero tensors", f"a plan of 2^{power} elements", huge(2**power), arguments=("plan", "recipe.yml"))

# --- what lies where a file should be ---

case("FIFO, folder", "a FIFO", instead(os.mkfifo), FILE, "is a FIFO")
case("FIFO, folder", "a folder", instead(os.mkdir), FILE, "is a folder")
case("FIFO, folder", "a device", instead(lambda at: os.symlink("/dev/zero", at)), FILE, "is a device")
case("FIFO, folder", "a dangling link", instead(lambda at: os.symlink("gone", at)), FILE, "is a link to gone")
case("FIFO, folder", "no permission", lambda: os.chmod(FILE, 0), FILE, "may not be read")
case("FIFO, folder", "a folder without permission", lambda: os.chmod("a", 0), "a", "permissions")
case(
    "FIFO, folder",
    "no such folder",
    nothing,
    "recipe.yml:2",
    "no file or folder './c'",
    recipe=LINEAR.replace("model: a", "model: ./c"),
)

for kind, data, names in (
    ("a git-LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ("git lfs pull",)),
    ("an HTML page", b"<!DOCTYPE html><html><body>404</body></html>", ("HTML page", "download it again")),
    ("a zip", b"PK\x03\x04" + bytes(99), ("zip or pickle", "convert it")),
    ("a pickle", b"\x80\x04\x95" + bytes(99), ("zip or pickle", "convert it")),
    ("a GGUF file", b"GGUF" + bytes(99), ("GGUF", "safetensors")),
):
    case("git-LFS pointer", kind, wrote(FILE, data), FILE, *names)

for ending in (".bin", ".pt", ".ckpt"):
    write_it = both(wrote(f"a/model{ending}", b"\x80\x04"), lambda: os.unlink(FILE))
    case("`.bin`", f"a folder with {ending}", write_it, "a holds PyTorch files only", "convert it")
    recipe = LINEAR.replace("model: a", f"model: a/model{ending}")
    case("`.bin`", f"a file {ending}", write_it, f"a/model{ending}", "convert it", recipe=recipe)

# --- sharded models ---


def shard(change: Callable[[dict[str, str]], object] = lambda at: None, **index: Any) -> Callable[[], None]:
    """a in two shards, x and y, whose index is changed."""

    def spoil() -> None:
        tensors = load_file(FILE)
        os.unlink(FILE)
        shards = {"x.safetensors": list(tensors)[:2], "y.safetensors": list(tensors)[2:]}
        for file, names in shards.items():
            save_file({name: tensors[name] for name in names}, f"a/{file}")
        weight_map = {name: file for file, names in shards.items() for name in names}
        change(weight_map)
        total = sum(tensor.nbytes for tensor in tensors.values())
        write(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map, **index})

    return spoil


def elsewhere() -> None:
    os.rename("a/x.safetensors", "x.safetensors")
    os.symlink("../x.safetensors", "a/x.safetensors")


def twice() -> None:
    save_file({NORM: load_file("a/x.safetensors").get(NORM, np.ones(8, np.float32))}, "a/z.safetensors")
    said = json.loads(Path(INDEX).read_bytes())
    write(INDEX, {**said, "weight_map": {**said["weight_map"], NORM: "z.safetensors"}})


def more(name: str) -> Callable[[], None]:
    """Another tensor in a file of a, which the index does not name."""

    def spoil() -> None:
        file = f"a/{name}"
        tensors = load_file(file) if os.path.exists(file) else {}
        save_file({**tensors, "extra": np.ones(3, np.float32)}, file)

    return spoil


MISSING = "shard missing"
case(MISSING, "a shard is missing", both(shard(), lambda: os.unlink("a/y.safetensors")), INDEX, "y.safetensors")
case(MISSING, "no shard has it", shard(lambda at: at.update(ghost="x.safetensors")), INDEX, "ghost in x.safetensors")
case(MISSING, "an absolute path", shard(lambda at: at.update({NORM: "/x.safetensors"})), INDEX, "'/x.safetensors'")
case(MISSING, "a path with ..", shard(lambda at: at.update({NORM: "../b/model.safetensors"})), INDEX, "'../b/model.saf")
case(MISSING, "a link out", both(shard(), elsewhere), "a/x.safetensors", "a link out of its folder")
case(MISSING, "a tensor twice", both(shard(), twice), INDEX, "in two shards", NORM)

NAMED = "shard or tensor on disk"
odd(NAMED, "another shard", both(shard(), more("z.safetensors")), INDEX, "z.safetensors", "left out")
odd(NAMED, "another tensor", both(shard(), more("x.safetensors")), INDEX, "extra in x.safetensors", "left out")
odd(NAMED, "another total_size", shard(metadata={"total_size": 7}), INDEX, "total_size 7", "are believed")
odd(NAMED, "an index and a single file", both(shard(), more("model.safetensors")), "a has both", "the index is used")

# --- sets of models ---

SOME = "tensor in some models only"


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if name not in names}


def reshaped(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: np.zeros(shape, np.float32)}


many = [(f"model.layers.{n}.up.weight", (2,)) for n in range(30)]
case(SOME, "missing in one", resaved("b", without(NORM)), "'b'", repr(NORM), "missing")
case(SOME, "missing in the base", resaved("base", without(NORM)), "'base'", repr(NORM), recipe=TIES)
odd(SOME, "missing beside a base", resaved("b", without(NORM)), "'b'", repr(NORM), "as the base", recipe=TIES)
case(SOME, "vocabulary rows", resaved("b", reshaped(EMBED, 12, 8)), "'b'", repr(EMBED), "tokenizer_source")
case(SOME, "heads", resaved("b", reshaped(f"{Q}.weight", 12, 8)), "'b'", f"'{Q}.weight'", "[12, 8]")
case(SOME, "transposed", resaved("b", reshaped(f"{Q}.weight", 8, 6)), "'b'", f"'{Q}.weight'", "is transposed")
case(
    SOME,
    "thirty tensors",
    resaved("b", lambda tensors: {**tensors, **model(0, many)}),
    "'model.layers.0.up.weight' is missing in 'a'",
    "and 10 more",
)

case(
    "dtypes differ",
    "float16 beside float32",
    resaved("b", lambda tensors: {name: each.astype(np.float16) for name, each in tensors.items()}),
    found=lambda: {each.dtype for each in merged().values()} == {np.dtype(np.float32)},
)

BUFFER = {"mask": np.array([True, False]), "ids": np.arange(3)}
case(
    "integer or bool",
    "equal",
    both(*(resaved(name, lambda tensors: {**tensors, **BUFFER}) for name in "ab")),
    found=lambda: has(BUFFER | {name: merged()[name] for name in merged().keys() - BUFFER.keys()})(),
)
for name, other in {"mask": np.array([True, True]), "ids": np.arange(3) + 1}.items():
    case(
        "integer or bool",
        f"{name} differs",
        both(
            resaved("a", lambda tensors: {**tensors, **BUFFER}),
            resaved("b", lambda tensors, name=name, other=other: {**tensors, **BUFFER, name: other}),  # type: ignore[misc]
        ),
        f"'{name}'",
        "differ in 'a' and 'b'",
    )

for prefix in ("base_model.model.", "_orig_mod."):
    case(
        "prefixes differ",
        f"{prefix} before",
        resaved("b", lambda tensors, prefix=prefix: {prefix + name: each for name, each in tensors.items()}),  # type: ignore[misc]
        "'b'",
        f"begin with {prefix!r}",
        "remove that from them",
    )
case(
    "prefixes differ",
    "model. lost",
    resaved("b", lambda tensors: {name.removeprefix("model."): each for name, each in tensors.items()}),
    "'b'",
    "without the 'model.'",
)

case(
    "tied embeddings",
    "by the config",
    both(resaved("b", without(HEAD)), config("b", tie_word_embeddings=True)),
    repr(HEAD),
    "tied to the embeddings in 'b'",
    "save both one way",
)

QUANTISED = "quantised weights"
for kind, change in {
    "bitsandbytes": {f"{Q}.weight": np.zeros((24, 1), np.uint8), f"{Q}.weight.absmax": np.ones(1, np.float32)},
    "bitsandbytes in 8 bits": {f"{Q}.weight": np.zeros((6, 8), np.int8), f"{Q}.SCB": np.ones(6, np.float32)},
    "GPTQ": {f"{Q}.qweight": np.zeros((1, 6), np.int32), f"{Q}.qzeros": np.zeros((1, 1), np.int32)},
    "AWQ": {f"{Q}.qweight": np.zeros((8, 1), np.int32), f"{Q}.scales": np.ones((1, 6), np.float16)},
    "compressed-tensors": {f"{Q}.weight_packed": np.zeros((6, 1), np.int32), f"{Q}.weight_scale": np.ones((6, 1))},
    "MXFP4": {"experts.up_blocks": np.zeros((2, 4), np.uint8), "experts.up_scales": np.zeros((2, 1), np.uint8)},
}.items():
    spoil = both(
        *(resaved(name, lambda tensors, change=change: {**without(f"{Q}.weight")(tensors), **change}) for name in "ab")  # type: ignore[misc]
    )
    case(QUANTISED, kind, spoil, "'a' is quantised", "dequantise")
case(QUANTISED, "by its config", config("a", quantization_config={"quant_method": "awq"}), "'a' is quantised", "awq")


def save_fp8(name: str) -> None:
    header = {f"{Q}.weight": entry("F8_E4M3", (2, 2), (0, 4)), f"{Q}.weight_scale_inv": entry("F32", (1, 1), (4, 8))}
    write(f"{name}/model.safetensors", raw(header, bytes(8)))


case(QUANTISED, "block FP8", both(lambda: save_fp8("a"), lambda: save_fp8("b")), "'a' is quantised", "dequantise")

MATHS = "config.json differs"
for key, one, two in (("rope_theta", 1e4, 1e6), ("rms_norm_eps", 1e-5, 1e-6), ("num_attention_heads", 2, 4)):
    spoil = both(config("a", **{key: one}), config("b", **{key: two}))
    odd(MATHS, key, spoil, "'a' and 'b'", key, "the first is kept")
case(
    MATHS,
    "a hidden size that cannot fit",
    both(config("b", hidden_size=4), resaved("b", lambda tensors: {n: t[..., :4] + 0 for n, t in tensors.items()})),
    f"'{Q}.weight' is [6, 8] in 'a' and [6, 4] in 'b'",
)

for method in ("ties", "dare_ties", "task_arithmetic", "breadcrumbs", "model_stock"):
    recipe = f"merge_method: {method}\nmodels: [model: a, model: b]\nparameters: {{weight: 1, density: 0.5}}\n"
    case("base missing", method, nothing, "recipe.yml", method, "base_model", recipe=recipe)


def found_base() -> None:
    base = load_file("base/model.safetensors")
    assert {name: each.tobytes() for name, each in merged().items()} == {n: t.tobytes() for n, t in base.items()}


def all_alike() -> None:
    for name in ("a", "b"):
        shutil.copyfile("base/model.safetensors", f"{name}/model.safetensors")


odd(
    "base missing",
    "a base like its models",
    all_alike,
    "the base is identical to every model",
    recipe=TIES,
    found=found_base,
    planned=False,
)

# --- values ---


def put(name: str, value: float, at: int) -> Callable[[], None]:
    def change(tensors: Tensors) -> Tensors:
        tensors[f"{Q}.weight"].reshape(-1)[at:] = value
        return tensors

    return resaved(name, change)


for backend in ("auto", "torch"):
    for value in (math.nan, math.inf, -math.inf):
        case(
            "NaN or Inf",
            f"{value} by {backend}",
            put("b", value, 45),
            "b:",
            f"'{Q}.weight' holds 3 NaN or Inf, the first at index 45",
            "--nonfinite propagate",
            arguments=("merge", "recipe.yml", "out", "--backend", backend),
            recipe=TIES,
            planned=False,
        )
case(
    "NaN or Inf",
    "let through",
    put("b", math.nan, 45),
    arguments=("merge", "recipe.yml", "out", "--nonfinite", "propagate"),
    found=lambda: np.isnan(merged()[f"{Q}.weight"].reshape(-1)).nonzero()[0].tolist() == [45, 46, 47],
    planned=False,
)
case(
    "NaN or Inf",
    "in an adapter",
    lambda: adapter({name: each * math.nan for name, each in pair().items()})(),
    "base+adapter",
    f"'{Q}.weight' holds 48 NaN or Inf",
    recipe=ADAPTED,
    planned=False,
)

odd(
    "overflow when narrowing",
    "float16",
    both(put("a", 1e5, 45), put("b", 1e5, 45)),
    "3 elements in 1 tensors became infinite in F16",
    f"'{Q}.weight'",
    "out_dtype",
    recipe=f"{LINEAR}out_dtype: float16\n",
    planned=False,
)
case(
    "overflow when narrowing",
    "8 bits",
    nothing,
    "recipe.yml:4: out_dtype",
    "unknown dtype 'float8_e4m3fn'",
    recipe=f"{LINEAR}out_dtype: float8_e4m3fn\n",
)


def save_strange() -> None:
    """What orders of magnitudes stumble over, where all kinds meet."""
    kinds = np.array([0.0, -0.0, 1e-45, -1e-42, 1.0, -1.0, 1.0, 3e38], np.float32)
    for seed, name in enumerate(("base", "a", "b")):
        values = np.random.default_rng(seed).choice(kinds[:7], 999)
        alike = np.full(99, [0.0, 1.0, -1.0][seed], np.float32)
        save_file({"strange": values, "alike": alike, "zeros": alike * 0}, f"{name}/model.safetensors")


def found_the_same_by_torch() -> None:
    shutil.move("out", "first")
    assert command("merge", "recipe.yml", "out", "--backend", "torch", "--quiet") == 0
    assert Path("first/model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


for kind, text in (("ties", TIES), ("linear", LINEAR), ("slerp", SLERP)):
    case("-0.0, denormals", kind, save_strange, recipe=text, found=found_the_same_by_torch, planned=False)


def save_vectors(one: Sequence[float], two: Sequence[float]) -> Callable[[], None]:
    def spoil() -> None:
        for name, values in (("a", one), ("b", two)):
            save_file({"w": np.array(values, np.float32)}, f"{name}/model.safetensors")

    return spoil


for kind, one, two, half in (
    ("zero", (0, 0), (3, 4), (3 * math.sqrt(0.5), 4 * math.sqrt(0.5))),  # as if at a right angle
    ("parallel", (3, 4), (6, 8), (4.5, 6)),
    ("opposite", (3, 4), (-3, -4), (0, 0)),
):
    found = lambda half=half: np.allclose(merged()["w"], half, rtol=1e-6, atol=0)  # noqa: E731
    case("SLERP of zero", kind, save_vectors(one, two), recipe=SLERP, found=found)

WEIGHT = "weight NaN or infinite"
for written in (".nan", ".inf", "-.inf", "nan", "1e999"):
    recipe = LINEAR.replace("0.5", written)
    case(WEIGHT, written, nothing, "recipe.yml:3: parameters.weight", f"'{written}'", recipe=recipe)
case(
    WEIGHT,
    "none for a model",
    nothing,
    "recipe.yml:2: models[1]",
    "the parameter weight",
    recipe="merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]\n",
)
case(
    WEIGHT,
    "one too many",
    nothing,
    "3 weights for 2 adapters",
    arguments=("lora", "combine", "adapter", "adapter", "out", "--weights", "1,2,3"),
    planned=False,
)
case(
    WEIGHT,
    "NaN for an adapter",
    nothing,
    "weight",
    "nan",
    arguments=("lora", "combine", "adapter", "adapter", "out", "--weights", "1,nan"),
    planned=False,
)
case(
    WEIGHT,
    "a sum of 0",
    nothing,
    "recipe.yml:2",
    "sum to 0",
    repr(HEAD),
    recipe="merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
    "  - {model: b, parameters: {weight: -1}}\n",
)

for written in ("1.5", "-0.1", ".nan"):
    text = TIES.replace("density: 0.5", f"density: {written}")
    case("density or t", f"density {written}", nothing, "recipe.yml:4: parameters.density", f"'{written}'", recipe=text)
for written in (".nan", ".inf"):
    text = SLERP.replace("0.5", written)
    case("density or t", f"t {written}", nothing, "recipe.yml:4: parameters.t", f"'{written}'", recipe=text)

# --- adapters ---

MATCHES = "an adapter tensor that matches nothing"
lost = pair("model.layers.7.q") | pair("model.layers.8.q")
case(MATCHES, "two modules", adapter(lost), "adapter", *list(lost)[::2], "no place in base", recipe=ADAPTED)
case(MATCHES, "another shape", adapter(pair(inputs=9)), "adapter", f"'{Q}.weight' of base, [6, 8]", recipe=ADAPTED)

ALONE = "A without B"
first, second = pair()
weights = "adapter/adapter_model.safetensors"
said = "adapter/adapter_config.json"
for kind, spoil, names in (
    ("A alone", adapter({first: pair()[first]}), (weights, repr(first), "without its lora_B")),
    ("B alone", adapter({second: pair()[second]}), (weights, repr(second), "without its lora_A")),
    ("ranks that differ", adapter({**pair(), second: pair(rank=3)[second]}), (weights, repr(first), repr(second))),
    ("the rank of the config", adapter(r=3), (weights, repr(first), "has rank 2", "says 3")),
    ("no alpha", adapter(lora_alpha=None), (said, "lora_alpha is None")),
    ("no rank", adapter(r=None), (said, "r is None")),
    ("rank 0", adapter(r=0), (said, "r is 0")),
):
    case(ALONE, kind, spoil, *names, recipe=ADAPTED)
    case(ALONE, f"{kind}, combined", spoil, *names, arguments=("lora", "combine", "adapter", "adapter", "out"))
    case(ALONE, f"{kind}, fused", spoil, *names, arguments=("lora", "fuse", "base", "adapter", "out"))

KINDS = "rsLoRA, rank_pattern"
VECTOR = {f"base_model.model.{Q}.lora_magnitude_vector": np.ones(6, np.float32)}
EMBEDDING = {
    f"base_model.model.model.embed_tokens.lora_embedding_{part}": values
    for part, values in {"A": np.ones((2, 10), np.float32), "B": np.ones((8, 2), np.float32)}.items()
}
for kind, spoil in {
    "rsLoRA": adapter(use_rslora=True),
    "rank_pattern": adapter(r=9, rank_pattern={"q_proj": 2}),
    "alpha_pattern": adapter(alpha_pattern={"q_proj": 3}),
    "fan_in_fan_out": adapter(fan_in_fan_out=True),
    "modules_to_save": adapter(
        {**pair(), f"base_model.model.{NORM}": np.ones(8, np.float32)}, modules_to_save=["norm"]
    ),
    "DoRA": adapter({**pair(), **VECTOR}, use_dora=True),
    "an embedding": adapter({**pair(), **EMBEDDING}),
}.items():
    case(KINDS, kind, spoil, recipe=ADAPTED)
for key in (
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "trainable_token_indices",
    "alora_invocation_tokens",
):
    case(KINDS, key, adapter(**{key: [1]}), said, key, "not supported", "merge_and_unload", recipe=ADAPTED)
case(KINDS, "PiSSA", adapter(init_lora_weights="pissa"), said, "'pissa'", recipe=ADAPTED)
case(KINDS, "what nobody knows", adapter(use_newest=True), said, "'use_newest'", "not known", recipe=ADAPTED)
case(KINDS, "another kind than LoRA", adapter(peft_type="IA3"), said, "'IA3'", recipe=ADAPTED)
case(
    KINDS,
    "a bias that the base lacks",
    adapter({**pair(), f"base_model.model.{Q}.lora_B.bias": np.ones(6, np.float32)}, lora_bias=True),
    "adapter",
    f"{Q}.lora_B.bias",
    recipe=ADAPTED,
)

odd(
    "the adapter names another",
    "another base",
    adapter(base_model_name_or_path="org/other"),
    "'adapter' was trained on 'org/other'",
    "'base'",
    recipe=ADAPTED,
)

# --- recipes ---

UNKNOWN = "unknown key or method"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
for kind, text, names in (
    ("a key", LINEAR + "mdoels: 1\n", ("recipe.yml:4: mdoels", "did you mean 'models'?")),
    ("a parameter", LINEAR.replace("weight", "wieght"), ("recipe.yml:3", "did you mean 'weight'?")),
    ("a method", LINEAR.replace("linear", "linera"), ("recipe.yml:1: merge_method", "did you mean 'linear'?")),
    ("a key twice", LINEAR + "merge_method: ties\n", ("recipe.yml:4", "'merge_method' is already on line 1")),
    ("a tag", LINEAR + "seed: !!python/object/apply:os.getpid []\n", ("recipe.yml:4", "the YAML tag")),
    ("an alias bomb", BOMB, ("recipe.yml:6", "aliases expand")),
    ("nested deep", "[" * 100_000, ("recipe.yml:1", "nested more than 32 deep")),
    ("a number of millions of digits", f"seed: 1{':0' * 200_000}\n", ("recipe.yml:1", "is not a number")),
    ("a name of millions of letters", LINEAR.replace("linear", "x" * 1_000_000), ("recipe.yml:1: merge_method",)),
    ("an empty file", "", ("recipe.yml: the recipe is empty",)),
    ("over 10 MB", "#" * 10_000_001, ("recipe.yml", "over 10 MB")),
):
    case(UNKNOWN, kind, nothing, *names, recipe=text)

RANGE = "layer_range reversed"
SLICES = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: %s}]
"""
for written, fault in (("[2, 0]", "reversed"), ("[1, 1]", "empty"), ("[-1, 1]", "negative"), ("[0, 3]", "2 layers")):
    case(RANGE, fault, nothing, "recipe.yml:3: slices[0].sources[0]", written, fault, recipe=SLICES % written)
case(
    RANGE,
    "lengths that differ",
    nothing,
    "recipe.yml:3: slices[0].sources[1]",
    "'a'",
    "need the same number",
    recipe="merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: "
    "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 1]}]}]\n",
)
odd(
    RANGE,
    "a filter for nothing",
    nothing,
    "recipe.yml:3",
    "the filter 'nowhere' matches no tensor",
    recipe=LINEAR.replace("0.5", "[{filter: nowhere, value: 1}, {value: 0.5}]"),
)

case(
    "cycle between stages",
    "two that need one another",
    nothing,
    "recipe.yml",
    "'x' needs 'y' needs 'x'",
    recipe=f"name: x\n{LINEAR.replace('model: a', 'model: y')}---\nname: y\n{LINEAR.replace('model: a', 'model: x')}"
    f"---\n{LINEAR.replace('model: a', 'model: x')}",
)

# --- the environment ---

OUTPUT = "output folder is an input"


def occupied() -> None:
    Path("out").mkdir()
    Path("out/thesis.tex").write_text("two years")


for out, spoil, names in (
    ("a", nothing, ("the output folder a is the input a",)),
    ("a/merged", nothing, ("the output folder a/merged is inside the input a",)),
    ("link", lambda: os.symlink("a", "link"), ("the output folder link is the input a",)),
    ("base", nothing, ("base is not empty",)),
    ("out", occupied, ("out is not empty (thesis.tex)", "--overwrite")),
    ("recipe.yml", nothing, ("recipe.yml cannot be written",)),
):
    case(OUTPUT, out, spoil, *names, arguments=("merge", "recipe.yml", out), planned=False)
for tool, *rest in (
    ("fuse", "base", "adapter", "base"),
    ("combine", "adapter", "adapter", "adapter"),
    ("extract", "base", "a", "a", "--rank", "1"),
):
    taken = rest[2]
    named = f"the output folder {taken} is the input {taken}"
    case(OUTPUT, f"lora {tool}", nothing, named, arguments=("lora", tool, *rest), planned=False)


def without_room() -> None:
    """The patch of a disk is taken back with those of the test."""


FULL = "too little disk for the output"
case(FULL, "before it begins", without_room, "out needs", "bytes and its disk has 1,000 left", planned=False)


# --- the tests ---


def command(*arguments: str) -> int:
    """The command's exit code: an exception that is no exit fails the test, as a traceback would."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments, prog_name="fastmerge")
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return code or 0


def lying(folder: str = ".") -> dict[str, tuple[object, ...]]:
    """All that lies in a folder, with what tells whether it was touched."""
    return {str(path): tuple(_looks(path)) for path in sorted(Path(folder).rglob("*")) if path.parts[0] != "out"} | {
        str(path): () for path in Path().glob("out/**/*")
    }


def _looks(path: Path) -> Iterator[object]:
    status = path.lstat()
    yield from (status.st_mode, status.st_ino)
    if stat.S_ISREG(status.st_mode):
        read = status.st_size < 1_000_000 and os.access(path, os.R_OK)
        yield from (status.st_size, status.st_mtime_ns, path.read_bytes() if read else None)


@contextmanager
def circumstances(at: Case, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of a case that no file makes: who asks, and how full the disk is."""
    with monkeypatch.context() as patch:
        if at.spoil is without_room:
            full = SimpleNamespace(f_blocks=1000, f_bfree=1, f_bavail=1, f_frsize=1000)
            patch.setattr(os, "statvfs", lambda place: full)
        if "permission" not in at.kind:
            yield
            return
        os.chmod(".", 0o755)
        with unprivileged():
            yield


@pytest.mark.parametrize("at", CASES, ids=[f"{at.row}: {at.kind}" for at in CASES])
def test_what_comes_of_it(at: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipe.yml").write_text(at.recipe)
    at.spoil()
    before = lying()
    with circumstances(at, monkeypatch):
        code = command(*at.arguments)
    printed = capsys.readouterr()
    after = lying()
    lines = [line for line in printed.err.splitlines() if not line.startswith("  ")]  # a list goes on so
    assert code == at.code, printed
    if code:
        *warned, said = lines
        assert said.startswith("error: ")
        assert all(line.startswith("warning: ") for line in warned), lines
        assert printed.out == ""
        assert after == before, "something was written"
    else:
        assert all(line.startswith("warning: ") for line in lines)
        assert bool(lines) == bool(at.names) or not at.planned, lines
        assert {path: looks for path, looks in after.items() if not path.startswith("out")} == before
        assert at.found() is not False
    assert all(name in printed.err for name in at.names), printed.err
    assert len(printed.err) < 4000


# --- inputs that are cut, and tensors that are long ---

#: The command line, where a file is cut as soon as anything is mapped, or before bytes of it are read or hashed.
CUT = """
import os, sys
from fastmerge import memory, system
from fastmerge.checkpoint import reader
cut = sys.argv.pop(1)
def cutting(function, first):
    def wrapped(*arguments):
        if first:
            os.truncate(cut, 4096)
        found = function(*arguments)
        os.truncate(cut, 4096)
        return found
    return wrapped
system.map_file = cutting(system.map_file, first=False)
memory.load = cutting(memory.load, first=True)
if "--recompute" not in sys.argv:  # whose inputs are to be cut later
    reader.hash_in_file = cutting(reader.hash_in_file, first=True)
from fastmerge.cli import main
main(prog_name="fastmerge")
"""


@pytest.mark.parametrize(
    ("cut", "arguments"),
    [
        ("a/model.safetensors", "merge recipe.yml out --backend cpu"),
        ("b/model.safetensors", "merge recipe.yml out --backend torch"),
        ("b/model.safetensors", "merge della.yml out"),
        ("base/model.safetensors", "merge adapted.yml out"),
        ("adapter/adapter_model.safetensors", "merge adapted.yml out"),
        ("base/model.safetensors", "lora fuse base adapter out"),
        ("adapter/adapter_model.safetensors", "lora fuse base adapter out"),
        ("adapter/adapter_model.safetensors", "lora combine adapter other out"),
        ("base/model.safetensors", "lora extract base a out --rank 1"),
        ("a/model.safetensors", "lora extract base a out --rank 1"),
        ("a/model.safetensors", "diff a b"),
        ("b/model.safetensors", "diff a b --base base"),
        ("base/model.safetensors", "diff a b --base base"),
        ("adapter/adapter_model.safetensors", "diff base+adapter a"),
        ("merged/model.safetensors", "verify merged"),
        ("a/model.safetensors", "verify merged --recompute 9"),
    ],
)
def test_a_file_that_is_cut_is_named(cut: str, arguments: str) -> None:
    """In a process of its own, which a mapped read past the end would kill."""
    shapes = [(f"model.layers.{n}.up.weight", (64, 96)) for n in range(4)]
    for seed, name in enumerate(("base", "a", "b")):
        save_file(model(seed, shapes), f"{name}/model.safetensors")
    modules = (name.removesuffix(".weight") for name, _ in shapes)
    factors = {name: each for module in modules for name, each in pair(module, 8, 64, 96).items()}
    adapter(factors, r=8)()
    shutil.copytree("adapter", "other")
    Path("recipe.yml").write_text(LINEAR)
    Path("adapted.yml").write_text(ADAPTED)
    Path("della.yml").write_text(TIES.replace("ties", "della"))
    assert command("merge", "recipe.yml", "merged", "--quiet") == 0
    done = subprocess.run(
        [sys.executable, "-c", CUT, cut, *arguments.split()], capture_output=True, text=True, check=False
    )
    wrong = arguments == "verify merged"  # which is what verify is to find
    assert done.returncode == (1 if wrong else 2), done
    told = (done.stdout if wrong else done.stderr).splitlines()
    (line,) = (line for line in told if line.startswith("wrong: " if wrong else "error: "))
    assert cut in line
    assert "Traceback" not in done.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize("elements", [2**31 + 7, 2**32 + 7], ids=["2^31", "2^32"])
def test_a_tensor_of_more_elements_than_32_bits_count(elements: int) -> None:
    """By the compiled core; zeros that nobody wrote to take no memory."""
    core = compiled_core()
    values = np.zeros(elements, np.uint16)
    values[-1] = 0x7F80  # Inf
    inputs = Inputs(elements, (View(values.ctypes.data, "BF16"),))
    with open(os.devnull, "wb") as nowhere:
        target = Target("BF16", 0, nowhere.fileno())
        (found,) = core.merge([inputs], [[Sweep((Part(1.0),))]], [[target]], Run(threads=2))
    assert found == Found((1,), (elements - 1,), (0,))


CHECKED = [at for at in CASES if at.planned and at.arguments[0] == "merge" and "permission" not in at.kind]


@pytest.mark.parametrize("at", CHECKED, ids=[f"{at.row}: {at.kind}" for at in CHECKED])
def test_check_and_plan_tell_the_same(at: Case, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yml").write_text(at.recipe)
    at.spoil()
    before = lying()
    assert command("check", "recipe.yml") == (1 if at.code else 0)
    found = capsys.readouterr().out
    assert all(name in found for name in at.names), found
    if at.code:
        assert command("plan", "recipe.yml") == at.code
        told = capsys.readouterr().err
        assert all(name in told for name in at.names), told
    assert lying() == before


def test_every_row_has_a_case_or_a_test_elsewhere() -> None:
    (*covered,) = {at.row for at in CASES}
    for start, tests in ELSEWHERE.items():
        covered += [row for row in ROWS if row.startswith(start)]
        assert any(row.startswith(start) for row in ROWS), start
        for test in tests:
            module, _, name = test.partition("::")
            assert name in _functions(Path(__file__).with_name(f"{module}.py")), test
    assert set(covered) == set(ROWS)


def _functions(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}
