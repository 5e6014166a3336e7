"""The header of a safetensors file: every way it can be wrong, and agreement with the safetensors library."""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from fastmerge.checkpoint import DTYPE_BITS, encode_header, read_header
from fastmerge.checkpoint.header import LONGEST_JSON
from fastmerge.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
ENTRY = json.dumps(F32)


def raw(header: bytes | str | dict[str, Any], data: bytes = b"\0" * 4, length: int | None = None) -> bytes:
    """The bytes of a file with this header, which may lie about its length."""
    text = json.dumps(header) if isinstance(header, dict) else header
    encoded = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


def one(data: bytes = b"\0" * 4, **entry: Any) -> bytes:
    """A file with the one tensor `w`, its entry changed."""
    return raw({"w": {**F32, **entry}}, data)


def nested(depth: int) -> str:
    return '{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": ' + "[" * depth + "]" * depth + "}}"


def peer(path: Path) -> dict[str, tuple[str, list[int]]] | None:
    """What the safetensors library reads, None where it refuses."""
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError:
        return None


def ours(path: Path) -> dict[str, tuple[str, list[int]]]:
    return {name: (info.dtype, list(info.shape)) for name, info in read_header(path).tensors.items()}


ACCEPTED = {
    "one tensor": one(),
    "no tensors": raw({}, b""),
    "only metadata": raw({"__metadata__": {"format": "pt"}}, b""),
    "metadata with escapes": raw({"__metadata__": {"é\n\U0001f600": '"'}}, b""),
    "zero elements": one(b"", shape=[0], data_offsets=[0, 0]),
    "zero elements of huge dimensions": one(b"", shape=[0, 2**63, 4], data_offsets=[0, 0]),
    "a scalar": one(shape=[]),
    "padded with spaces": raw(f'{{"w": {ENTRY}}}   '),
    "white space inside": raw(f'{{\n\t"w" :\r{ENTRY} }}'),
    "an unknown key in an entry": one(x=1.5e3),
    "an unknown key 125 deep": raw(nested(125)),
    "data not aligned to its dtype": raw(
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": {**F32, "data_offsets": [1, 5]}}, b"\0" * 5
    ),
    "entries in another order than the bytes": raw({"b": {**F32, "data_offsets": [4, 8]}, "a": F32}, b"\0" * 8),
    "names with any other character": raw({"\u00e9 /\\\"'\n\t": F32}),
    "a name like metadata": raw({"__metadata": F32}),
    "half-byte dtype on a byte boundary": one(b"\0" * 2, dtype="F4", shape=[4], data_offsets=[0, 2]),
    "six-bit dtype on a byte boundary": one(b"\0" * 3, dtype="F6_E2M3", shape=[4], data_offsets=[0, 3]),
}

# the safetensors library refuses these too: (bytes, what the message says)
REFUSED = {
    "empty file": (b"", "0 bytes, fewer than the 8"),
    "seven bytes": (b"\0" * 7, "7 bytes, fewer than the 8"),
    "length 0": (raw(b"", b""), "does not begin with `{`"),
    "length beyond the file": (raw(b"{}", b"", 3), "header 3 bytes, beyond the file's 10"),
    "length beyond 100 MB": (raw(b"{}", b"", LONGEST_JSON + 1), "longer than 100000000"),
    "length 2^63": (raw(b"{}", b"", 2**63), "longer than"),
    "length 2^64-1": (raw(b"{}", b"", 2**64 - 1), "18446744073709551615 bytes"),
    "not UTF-8": (raw(b'{"\xff":' + ENTRY.encode() + b"}"), "not UTF-8 at byte 2"),
    "a byte order mark": (raw(b"\xef\xbb\xbf{}", b""), "does not begin with `{`"),
    "not JSON": (raw(b"{w}"), "JSON is invalid"),
    "a string": (raw(b'"{}"', b""), "does not begin with `{`"),
    "an array": (raw(b"[]", b""), "does not begin with `{`"),
    "two objects": (raw(b"{}{}", b""), "JSON is invalid"),
    "nested 127 deep in an entry": (raw(nested(126)), "'w'"),
    "nested 900 deep": (raw(nested(900)), "'w'|nested too deep"),
    "nested 100000 deep": (raw(b'{"a":' * 100_000 + b"}" * 100_000), "nested too deep"),
    "padding of NULs": (raw(f'{{"w": {ENTRY}}}\0\0'), "end with `}` and spaces"),
    "trailing bytes": (one(b"\0" * 5), "end at byte .*, the file at"),
    "data cut": (one(b"\0" * 3), "end at byte .*, the file at"),
    "hole before the first tensor": (one(b"\0" * 8, data_offsets=[4, 8]), "a hole before the bytes of tensor 'w'"),
    "hole between": (raw({"a": F32, "b": {**F32, "data_offsets": [5, 9]}}, b"\0" * 9), "a hole .* 'b'"),
    "overlap": (raw({"a": F32, "b": {**F32, "data_offsets": [3, 7]}}, b"\0" * 7), "an overlap .* 'b'"),
    "alias": (raw({"a": F32, "b": F32}), "an overlap .* 'b'"),
    "end before begin": (one(b"", shape=[0], data_offsets=[4, 0]), "'w'"),
    "negative begin": (one(data_offsets=[-4, 0]), "'w'"),
    "last end beyond the file": (one(shape=[2], data_offsets=[0, 8]), "end at byte"),
    "range does not fit the shape": (one(b"\0" * 8, data_offsets=[0, 8]), r"'w' of dtype F32 and shape \[1\]"),
    "range does not fit the dtype": (one(dtype="F16"), "'w' of dtype F16"),
    "elements overflow": (one(shape=[2**32, 2**32]), "'w'"),
    "bytes overflow": (one(shape=[2**62]), "'w'"),
    "overflow hidden by a zero": (one(b"", shape=[2**63, 4, 0], data_offsets=[0, 0]), "'w'"),
    "dimension of 65 bits": (one(b"", shape=[0, 2**64], data_offsets=[0, 0]), "'w'"),
    "dimension of 5000 digits": (raw('{"w": {"dtype": "F32", "shape": [' + "9" * 5000 + "]}}"), "digits"),
    "negative dimensions": (one(shape=[-1, -1]), "'w'"),
    "fractional dimension": (one(shape=[1.0]), "'w'"),
    "boolean dimension": (one(shape=[True]), "'w'"),
    "offset of minus zero": (raw('{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]}}'), "'w'"),
    "three offsets": (one(data_offsets=[0, 4, 4]), "'w'"),
    "no offsets": (raw({"w": {"dtype": "F32", "shape": [1]}}), "'w'"),
    "shape of null": (one(shape=None), "'w'"),
    "entry of null": (raw({"w": None}), "'w'"),
    "entry of a string": (raw({"w": "F32"}), "'w'"),
    "entry key twice": (raw('{"w": {"dtype": "F32", ' + ENTRY[1:] + "}"), "'dtype' is there twice"),
    "metadata twice": (raw('{"__metadata__": {}, "__metadata__": {}}', b""), "'__metadata__' is there twice"),
    "metadata of an array": (raw({"__metadata__": []}, b""), "__metadata__ is not a flat object"),
    "metadata with a number": (raw({"__metadata__": {"a": 1}}, b""), "__metadata__ is not a flat object"),
    "metadata with an object": (raw({"__metadata__": {"a": {}}}, b""), "__metadata__ is not a flat object"),
    "unknown dtype": (one(dtype="F31"), "tensor 'w' has the unknown dtype 'F31'"),
    "dtype of null": (one(dtype=None), "'w'"),
    "half a byte": (one(b"\0" * 2, dtype="F4", shape=[3], data_offsets=[0, 2]), "'w' of dtype F4"),
    "NaN": (one(x=float("nan")), "NaN is not JSON"),
    "number out of range": (raw('{"w": ' + ENTRY[:-1] + ', "x": 1e999}}'), "1e999 is out of range"),
    "half a surrogate pair": (raw('{"\\ud800": ' + ENTRY + "}"), "surrogate"),
    "control character in a name": (raw('{"w\n": ' + ENTRY + "}"), "JSON is invalid"),
}

# the safetensors library takes these
STRICTER = {
    "name twice": (raw(f'{{"w": {ENTRY}, "w": {ENTRY}}}'), "'w' is there twice"),
    "metadata key twice": (raw('{"__metadata__": {"a": "", "a": ""}}', b""), "'a' is there twice"),
    "metadata of null": (raw('{"__metadata__": null}', b""), "__metadata__ is not a flat object"),
    "empty name": (raw({"": F32}), "'' is empty or holds a NUL"),
    "NUL in a name": (raw({"w\0": F32}), "is empty or holds a NUL"),
    "leading space": (raw(f' {{"w": {ENTRY}}}'), "does not begin with `{`"),
    "padding of tabs": (raw(f'{{"w": {ENTRY}}}\t'), "end with `}` and spaces"),
    "entry as an array": (raw('{"w": ["F32", [1], [0, 4]]}'), "'w'"),
    "dtype as an object": (one(dtype={"F32": None}), "'w'"),
}

LOOKS = {
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "git-LFS pointer.*git lfs pull",
    ),
    "HTML page": (b"\n<!DOCTYPE html>\n<html><head>", "HTML page.*download it again"),
    "HTML without a doctype": (b"<html lang=en>", "HTML page"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" + b"\0" * 100, "zip or pickle.*never loaded.*convert it to safetensors"),
    "pickle": (b"\x80\x02}q\0X\x01\0\0\0wq\x01K\x01s.", "zip or pickle.*never loaded.*convert it to safetensors"),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 100, "GGUF.*merge the safetensors"),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.safetensors"


def refused(file: Path, content: bytes) -> str:
    """The message, which names the file."""
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert str(caught.value).startswith(str(file))
    return str(caught.value)


@pytest.mark.parametrize("content", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts_what_the_library_accepts(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    assert ours(file) == peer(file)


@pytest.mark.parametrize(("content", "says"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_the_reason_what_the_library_refuses(file: Path, content: bytes, says: str) -> None:
    message = refused(file, content)
    assert re.search(says, message)
    assert "fetch it again" in message
    assert peer(file) is None


@pytest.mark.parametrize(("content", "says"), STRICTER.values(), ids=STRICTER)
def test_refuses_more_than_the_library(file: Path, content: bytes, says: str) -> None:
    assert re.search(says, refused(file, content))
    assert peer(file) is not None


@pytest.mark.parametrize(("content", "says"), LOOKS.values(), ids=LOOKS)
def test_says_what_the_file_looks_like(file: Path, content: bytes, says: str) -> None:
    assert re.search(says, refused(file, content))


def test_a_damaged_header_of_640_bytes_is_no_pickle(file: Path) -> None:
    content = raw(b"{" + b" " * 638 + b"}")
    assert content.startswith(b"\x80\x02")
    assert "end at byte 648, the file at 652" in refused(file, content)


def test_a_long_message_is_cut(file: Path) -> None:
    assert len(refused(file, raw({"w" * 100_000: {}}))) < len(str(file)) + 700


@pytest.mark.parametrize("length", [LONGEST_JSON - 1, 2**40, 2**64 - 1])
def test_nothing_is_allocated_for_a_lying_length(file: Path, length: int) -> None:
    file.write_bytes(raw(b"{}", b"", length))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


MODEL = {
    "__metadata__": {"format": "pt", "é": ""},
    "a.weight": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
    "c-0": {"dtype": "F32", "shape": [0, 7], "data_offsets": [20, 20]},
}
PIECES = (
    rb"-0 1e0 1.0 null true [] {} [0,0] NaN 0 9 - 18446744073709551616".split()
    + rb"""" "" \u0000 \ud83d , : { }""".split()
    + [b" ", b"\t", b"\0", b"\xff", b"\xc3"]
)
STRICT = re.compile("there twice|not begin with|and spaces|empty or holds a NUL|__metadata__")


@settings(deadline=None)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 8), st.one_of(st.sampled_from(PIECES), st.binary(max_size=3))),
        min_size=1,
        max_size=4,
    ),
    slack=st.integers(-9, 9),
)
@example(edits=[(2, 12, b"a.weight")], slack=0)
def test_agrees_with_the_library_on_mutated_headers(
    edits: list[tuple[int, int, bytes]], slack: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    text = json.dumps(MODEL, separators=(",", ":")).encode()
    for place, cut, piece in edits:
        place %= len(text)
        text = text[:place] + piece + text[place + cut :]
    file.write_bytes(raw(text, b"\0" * 20, max(0, len(text) + (slack if abs(slack) > 7 else 0))))
    theirs = peer(file)
    try:
        read = ours(file)
    except CheckpointError as error:
        read = theirs if STRICT.search(str(error)) else None
    assert read == theirs


def test_gives_absolute_places_in_the_order_of_the_bytes(file: Path) -> None:
    entries = {
        "second": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
        "first": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "__metadata__": {"format": "pt"},
    }
    content = raw(entries, bytes(range(14)))
    file.write_bytes(content)
    header = read_header(file)
    assert list(header.tensors) == ["first", "second"]
    assert header.metadata == {"format": "pt"}
    assert header.size == len(content)
    second = header.tensors["second"]
    assert content[second.begin : second.end] == bytes(range(8, 14))
    assert (second.elements, second.nbytes) == (3, 6)


def test_knows_every_dtype_of_the_library(file: Path) -> None:
    file.write_bytes(one(dtype="?"))
    with pytest.raises(SafetensorError) as caught:
        safe_open(file, "np")
    assert set(DTYPE_BITS) >= set(re.findall("`([A-Z0-9_]+)`", str(caught.value).split("expected one of")[1]))


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_sizes_each_dtype_as_the_library_does(file: Path, dtype: str) -> None:
    size = DTYPE_BITS[dtype]
    file.write_bytes(one(b"\0" * size, dtype=dtype, shape=[8], data_offsets=[0, size]))
    assert ours(file) == peer(file) == {"w": (dtype, [8])}


@pytest.mark.parametrize("elements", [2**31, 2**32])
def test_takes_tensors_past_32_bits(file: Path, elements: int) -> None:
    head, offsets = encode_header([("big", "F32", (elements,)), ("end", "F32", ())], {})
    with file.open("wb") as sparse:
        sparse.write(head)
        sparse.truncate(len(head) + 4 * elements + 4)
    tensors = read_header(file).tensors
    assert tensors["big"].elements == elements
    assert tensors["end"].begin == offsets["end"] == len(head) + 4 * elements


def test_reads_a_model_of_many_tensors_back(file: Path) -> None:
    outputs = [(f"model.layers.{layer}.weight", "BF16", (2, layer % 3)) for layer in range(20_000)]
    head, offsets = encode_header(outputs, {"format": "pt"})
    file.write_bytes(head + b"\0" * sum(4 * (layer % 3) for layer in range(20_000)))
    tensors = read_header(file).tensors
    assert [(info.name, info.dtype, info.shape) for info in tensors.values()] == outputs
    assert {name: info.begin for name, info in tensors.items()} == offsets


@settings(deadline=None)
@given(
    outputs=st.lists(
        st.tuples(
            st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1),
            st.sampled_from([dtype for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        unique_by=lambda output: output[0],
        max_size=6,
    ).filter(lambda outputs: all(name != "__metadata__" for name, _, _ in outputs)),
    metadata=st.dictionaries(st.text(st.characters(blacklist_categories=["Cs"])), st.just("é")),
)
def test_what_is_encoded_is_read_back_by_both(
    outputs: list[tuple[str, str, tuple[int, ...]]],
    metadata: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    file = tmp_path_factory.getbasetemp() / "encoded.safetensors"
    head, offsets = encode_header(outputs, metadata)
    header = _sized(file, head, outputs)
    assert len(head) % 8 == 0
    assert header.metadata == metadata
    assert {name: info.begin for name, info in header.tensors.items()} == offsets
    assert ours(file) == peer(file) == {name: (dtype, list(shape)) for name, dtype, shape in outputs}


def _sized(file: Path, head: bytes, outputs: list[tuple[str, str, tuple[int, ...]]]) -> Any:
    size = 0
    for _, dtype, shape in outputs:
        count = DTYPE_BITS[dtype] // 8
        for dim in shape:
            count *= dim
        size += count
    file.write_bytes(head + b"\0" * size)
    return read_header(file)


# --- what is no readable file ---


def test_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{file} does not exist"):
        read_header(file)


def test_a_dangling_link_is_named_with_its_target(file: Path) -> None:
    file.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"{file} is a link to nowhere, which is missing"):
        read_header(file)


def test_a_link_to_itself_is_named(file: Path) -> None:
    file.symlink_to(file)
    with pytest.raises(CheckpointError, match=str(file)):
        read_header(file)


def test_a_folder_is_named(file: Path) -> None:
    file.mkdir()
    with pytest.raises(CheckpointError, match=f"{file} is a folder"):
        read_header(file)


def test_a_fifo_is_refused_without_waiting_for_a_writer(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match=f"{file} is a FIFO"):
        read_header(file)


def test_a_device_is_refused() -> None:
    with pytest.raises(CheckpointError, match="/dev/zero is a device"):
        read_header("/dev/zero")


def test_a_name_with_a_nul_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be opened"):
        read_header("a\0b")


@contextmanager
def unprivileged() -> Iterator[None]:
    """For root, who may read everything, becomes nobody for a while."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_without_permission_is_named(file: Path) -> None:
    file.write_bytes(one())
    file.chmod(0)
    with unprivileged(), pytest.raises(CheckpointError, match=f"{file} may not be read"):
        read_header(file)
