"""Checkpoints on disk: single files, sharded models, the hub's cache, and files that change while they are read."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import resource
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastmerge.checkpoint import Checkpoint, open_checkpoint, same_bytes
from fastmerge.checkpoint.reader import KEPT_MAPPINGS
from fastmerge.errors import CheckpointError, FastmergeWarning

INDEX = "model.safetensors.index.json"
ONE = "model-00001-of-00002.safetensors"
TWO = "model-00002-of-00002.safetensors"
A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(5, dtype=np.float16)


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """A warning that a test does not expect is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastmergeWarning)
        yield


def index(folder: Path, weight_map: Mapping[str, Any], **metadata: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A model of two shards: `a` in the first, `b` in the second."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    save_file({"a": A}, folder / ONE)
    save_file({"b": B}, folder / TWO)
    index(folder, {"b": TWO, "a": ONE}, total_size=34)
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    save_file({"a": A, "b": B}, folder / "model.safetensors")
    return folder


def values(checkpoint: Checkpoint, tensor: str) -> bytes:
    address, owner = checkpoint.address(tensor)
    assert owner is not None
    return ctypes.string_at(address, checkpoint.tensors[tensor].nbytes)


def refused(path: Path | str, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert re.search(says, str(caught.value)), caught.value


# --- what is read ---


def test_a_folder_with_one_file(single: Path) -> None:
    model = open_checkpoint(str(single))
    assert (model.name, model.path, model.folder) == (str(single), single, single)
    assert model.files == (single / "model.safetensors",)
    assert {name: (info.dtype, info.shape) for name, info in model.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F16", (5,)),
    }
    assert values(model, "a") == A.tobytes()
    assert values(model, "b") == B.tobytes()


def test_a_sharded_folder(sharded: Path) -> None:
    model = open_checkpoint(sharded)
    assert model.files == (sharded / ONE, sharded / TWO)
    assert list(model.tensors) == ["a", "b"]
    assert model.file_of("b") == sharded / TWO
    assert values(model, "a") == A.tobytes()
    assert values(model, "b") == B.tobytes()


def test_a_file_with_its_folders_config(single: Path) -> None:
    (single / "config.json").write_text('{"model_type": "llama"}')
    model = open_checkpoint(single / "model.safetensors")
    assert model.files == (model.path,)
    assert model.folder == single
    assert model.config == {"model_type": "llama"}


def test_no_config_is_an_empty_one(single: Path) -> None:
    assert open_checkpoint(single).config == {}


def test_a_config_may_hold_infinity(single: Path) -> None:
    (single / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(single).config == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize(
    "text",
    [b"{", b"[]", b'{"a": "\xff"}', b'{"a":' * 100_000, b'{"a":' * 200 + b"1" + b"}" * 200],
    ids=["cut", "array", "not UTF-8", "nested 100000 deep", "nested 200 deep"],
)
def test_a_broken_config_is_named(single: Path, text: bytes) -> None:
    (single / "config.json").write_bytes(text)
    refused(single, f"{single}/config.json is not a model config")


def test_a_config_that_is_a_pointer_is_named(single: Path) -> None:
    (single / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(single, f"{single}/config.json is a git-LFS pointer")


def test_a_config_of_gigabytes_is_not_read(single: Path) -> None:
    with (single / "config.json").open("wb") as sparse:
        sparse.truncate(2**40)
    refused(single, f"{single}/config.json has {2**40} bytes")


def test_an_empty_model(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensors == {}


def test_a_misaligned_tensor_and_one_without_elements(tmp_path: Path) -> None:
    entries = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "float": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
        "none": {"dtype": "F32", "shape": [0], "data_offsets": [5, 5]},
    }
    text = json.dumps(entries).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07" + np.float32(1.5).tobytes())
    model = open_checkpoint(path)
    assert values(model, "float") == np.float32(1.5).tobytes()
    assert values(model, "none") == b""


# --- mappings ---


def test_an_owner_outlives_the_checkpoint(single: Path) -> None:
    model = open_checkpoint(single)
    address, owner = model.address("a")
    del model
    gc.collect()
    assert ctypes.string_at(address, A.nbytes) == A.tobytes()
    assert mapped(single) == 1
    del owner
    gc.collect()
    assert mapped(single) == 0


def test_tensors_of_one_file_share_a_mapping(single: Path) -> None:
    model = open_checkpoint(single)
    assert model.address("a")[1] is model.address("b")[1]


def test_more_shards_than_open_files_allowed(tmp_path: Path) -> None:
    count = 3 * KEPT_MAPPINGS
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({f"t{number}": np.full(3, number, np.int32)}, tmp_path / name)
        weight_map[f"t{number}"] = name
    index(tmp_path, weight_map, total_size=12 * count)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (KEPT_MAPPINGS, hard))
    try:
        model = open_checkpoint(tmp_path)
        places = [model.address(f"t{number}") for number in range(count)]
        read = [ctypes.cast(address, ctypes.POINTER(ctypes.c_int32))[2] for address, _ in places]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read == list(range(count))
    assert mapped(tmp_path) == count
    del places
    gc.collect()
    assert mapped(tmp_path) == KEPT_MAPPINGS


def mapped(folder: Path) -> int:
    return sum(f"{folder}/" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_tensors_have_the_same_bytes_or_not(single: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    late = A.copy()
    late[-1, -1] = -1.0
    save_file({"same": A, "late": late, "short": A[0], "zero": np.zeros(1), "minus": -np.zeros(1)}, other)
    one, two = open_checkpoint(single), open_checkpoint(other)
    assert same_bytes(one, "a", two, "same")
    assert not same_bytes(one, "a", two, "late")
    assert not same_bytes(one, "a", two, "short")
    assert not same_bytes(two, "zero", two, "minus")


# --- files that change ---


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def swap(path: Path) -> None:
    status = path.stat()
    content = path.read_bytes()
    path.rename(path.with_suffix(".old"))
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [cut, grow, touch, swap])
def test_a_file_that_changed_is_named(sharded: Path, change: Any) -> None:
    model = open_checkpoint(sharded)
    model.check_unchanged()
    change(sharded / TWO)
    with pytest.raises(CheckpointError, match=f"{sharded / TWO} changed while it was read"):
        model.check_unchanged()
    with pytest.raises(CheckpointError, match=f"{sharded / TWO} changed while it was read"):
        model.address("b")
    assert values(model, "a") == A.tobytes()


def test_a_file_that_went_away_is_named(sharded: Path) -> None:
    model = open_checkpoint(sharded)
    (sharded / TWO).unlink()
    with pytest.raises(CheckpointError, match=f"{sharded / TWO} went away"):
        model.check_unchanged()
    with pytest.raises(CheckpointError, match=f"{sharded / TWO} does not exist"):
        model.address("b")


def test_a_file_that_cannot_be_mapped_is_named(sharded: Path) -> None:
    with (sharded / ONE).open("r+b") as file:
        text = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (2**42, 2**42)
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 2**42)
    index(sharded, {"b": TWO, "a": ONE})
    model = open_checkpoint(sharded)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**41, hard))
    try:
        with pytest.raises(CheckpointError, match=f"{sharded / ONE} cannot be mapped .*ulimit -v"):
            model.address("a")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- folders and files that are no model ---


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "no", f"{tmp_path}/no does not exist; mend the path")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, f"{tmp_path} holds no model: neither model.safetensors nor {INDEX}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch loaded'\ntR.")
    refused(tmp_path, rf"{tmp_path} holds PyTorch files only \({name}\).*never loaded.*convert it to safetensors")
    refused(tmp_path / name, f"{name} is a PyTorch checkpoint.*never loaded.*convert it to safetensors")


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 40)
    refused(tmp_path / "model.gguf", "model.gguf is a GGUF file")


def test_weights_of_another_name(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "lora.safetensors")
    refused(tmp_path, f"{tmp_path} has no model.safetensors.*name one of its files instead: lora.safetensors")


def test_a_dangling_link_instead_of_the_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    refused(tmp_path, f"{tmp_path}/model.safetensors is a link to gone")


# --- indexes ---


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "JSON is invalid"),
        (b"\xff", "not UTF-8"),
        (b"[]", "not an object"),
        (b"{}", "weight_map is not an object"),
        (b'{"weight_map": ["a"]}', "weight_map is not an object"),
        (b'{"weight_map": {"a": 1}}', "weight_map is not an object of file names"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "'a' is there twice"),
        (b'{"weight_map":' * 100_000, "nested too deep"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    ],
)
def test_a_broken_index_is_named(sharded: Path, text: bytes, says: str) -> None:
    (sharded / INDEX).write_bytes(text)
    refused(sharded, f"{sharded / INDEX} .*{says}")


def test_missing_shards_are_all_named(sharded: Path) -> None:
    (sharded / ONE).unlink()
    (sharded / TWO).unlink()
    refused(sharded, f"{sharded / INDEX} names shards that are missing: {ONE}, {TWO}")


def test_a_broken_shard_is_named(sharded: Path) -> None:
    cut(sharded / TWO)
    refused(sharded, f"{sharded / TWO} is not a sound safetensors file")


def test_tensors_in_no_shard_are_named_up_to_twenty(sharded: Path) -> None:
    index(sharded, {"a": ONE, "b": TWO, **{f"c{number}": TWO for number in range(25)}})
    refused(sharded, f"{sharded / INDEX} names tensors that its shards lack: c0 in {TWO}, .*c19 in {TWO} and 5 more;")


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    index(sharded, {"a": TWO, "b": TWO})
    refused(sharded, f"lack: a in {TWO}")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file({"b": B, "a": A}, sharded / TWO)
    refused(sharded, f"{sharded / INDEX}: the same tensor is in two shards, {ONE}, {TWO}: a;")


@pytest.mark.parametrize("shard", ["/etc/x.safetensors", "../x.safetensors", "x/../../y.safetensors", "", "a\0b"])
def test_a_shard_path_out_of_the_folder(sharded: Path, shard: str) -> None:
    index(sharded, {"a": ONE, "b": shard})
    refused(sharded, f"{sharded / INDEX} names the shard {re.escape(repr(shard))}, which is not a path inside")


def test_a_link_out_of_the_folder(sharded: Path, tmp_path: Path) -> None:
    (sharded / TWO).rename(tmp_path / "elsewhere")
    (sharded / TWO).symlink_to(tmp_path / "elsewhere")
    refused(sharded, f"{sharded / TWO} is a link out of its folder, to {tmp_path}/elsewhere")


def test_a_loop_of_links(sharded: Path) -> None:
    (sharded / TWO).unlink()
    (sharded / TWO).symlink_to(TWO)
    refused(sharded, f"{sharded / INDEX} names shards that are missing: {TWO}")


def test_a_folder_of_shards_that_is_a_link_out(sharded: Path, tmp_path: Path) -> None:
    save_file({"b": B}, tmp_path / "b.safetensors")
    (sharded / "parts").symlink_to(tmp_path)
    index(sharded, {"a": ONE, "b": "parts/b.safetensors"})
    refused(sharded, "parts/b.safetensors is a link out of its folder")


def test_links_inside_the_folder_and_a_linked_folder(sharded: Path, tmp_path: Path) -> None:
    (sharded / "parts").mkdir()
    (sharded / TWO).rename(sharded / "parts" / "b")
    (sharded / TWO).symlink_to("parts/b")
    (tmp_path / "link").symlink_to(sharded)
    assert values(open_checkpoint(tmp_path / "link"), "b") == B.tobytes()


def hub_cache(sharded: Path, root: Path) -> Path:
    """The model as the hub's client stores it: snapshots of links into blobs."""
    repo = root / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(repo / "blobs" / f"{number:064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_the_hub_cache_links_into_its_blobs(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(sharded, tmp_path)
    model = open_checkpoint(snapshot)
    assert model.files == (snapshot / ONE, snapshot / TWO)
    assert values(model, "b") == B.tobytes()


def test_a_link_out_of_the_hub_cache_repository(sharded: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(sharded, tmp_path)
    other = tmp_path / "models--org--other"
    other.mkdir()
    (snapshot / TWO).resolve().rename(other / "blob")
    (snapshot / TWO).unlink()
    (snapshot / TWO).symlink_to(other / "blob")
    refused(snapshot, f"{snapshot / TWO} is a link out of its folder, to {other}/blob")


def test_a_folder_named_like_a_cache_is_none(sharded: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--mine"
    home.mkdir()
    sharded.rename(home / "sharded")
    (home / "sharded" / TWO).rename(home / "elsewhere")
    (home / "sharded" / TWO).symlink_to("../elsewhere")
    refused(home / "sharded", "is a link out of its folder")


# --- odd, but defined ---


def warned(folder: Path, says: str) -> Checkpoint:
    with pytest.warns(FastmergeWarning) as caught:
        model = open_checkpoint(folder)
    assert len(caught) == 1
    assert re.search(says, str(caught[0].message)), caught[0].message
    return model


def test_an_index_is_taken_before_a_single_file(sharded: Path) -> None:
    save_file({"a": A + 1}, sharded / "model.safetensors")
    model = warned(sharded, f"{sharded} has both {INDEX} and model.safetensors; the index is used")
    assert values(model, "a") == A.tobytes()


def test_an_index_over_a_single_file(single: Path) -> None:
    index(single, {"a": "model.safetensors", "b": "model.safetensors"}, total_size=34)
    assert list(open_checkpoint(single).tensors) == ["a", "b"]


def test_a_shard_that_the_index_does_not_name(sharded: Path) -> None:
    save_file({"c": A}, sharded / "model-00003-of-00003.safetensors")
    model = warned(sharded, f"{sharded / INDEX} does not name model-00003-of-00003.safetensors, .*left out")
    assert list(model.tensors) == ["a", "b"]


def test_a_tensor_that_the_index_does_not_name(sharded: Path) -> None:
    save_file({"b": B, "c": B}, sharded / TWO)
    index(sharded, {"a": ONE, "b": TWO}, total_size=44)
    model = warned(sharded, f"{sharded / INDEX} does not name c in {TWO}; they are left out")
    assert list(model.tensors) == ["a", "b"]


def test_a_wrong_total_size(sharded: Path) -> None:
    index(sharded, {"a": ONE, "b": TWO}, total_size=35)
    model = warned(sharded, f"{sharded / INDEX} says total_size 35, its shards hold 34 bytes")
    assert list(model.tensors) == ["a", "b"]


def test_an_index_without_a_total_size(sharded: Path) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"a": ONE, "b": TWO}}))
    assert list(open_checkpoint(sharded).tensors) == ["a", "b"]
