"""fastmerge.json: what stands in it, that it is the same for the same merge, and that a damaged one is one error."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import hashes, merged, models, save, tree
from safetensors.torch import save_file

from fastmerge import CheckpointError, backends, planner, provenance
from fastmerge.hub import Snapshot
from fastmerge.planner import plan
from fastmerge.recipe import Recipe

TIES = """merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.25, density: [{filter: mlp, value: 0.5}, {value: 0.75}]}}
  - {model: b, parameters: {weight: 0.5, density: 1}}
parameters: {lambda: 0.9}
"""
LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    models("base", "a", "b")


def inputs(text: str, full: bool = False) -> dict[str, provenance.Input]:
    return {each.name: each for each in provenance.inputs_of(plan(Recipe.parse(text)).stages[-1], full=full, threads=2)}


# --- what stands in it ---


def test_the_file_has_these_fields() -> None:
    merged(TIES, seed=3)
    record = json.loads(Path("out/fastmerge.json").read_bytes())
    assert list(record) == [
        "format",
        "fastmerge",
        "arithmetic",
        "hash",
        "versions",
        "provider",
        "isa",
        "seed",
        "options",
        "recipe",
        "document",
        "command",
        "inputs",
        "health",
        "files",
        "tensors",
    ]
    assert (record["format"], record["arithmetic"]) == (1, provenance.ARITHMETIC)
    assert record["recipe"] == TIES
    assert record["seed"] == 3
    assert record["command"] == "fastmerge merge mergekit_config.yml out --seed 3"
    assert list(record["versions"]) == ["python", "numpy"]
    assert [list(each) for each in record["inputs"]] == [["name", "revision", "role", "files"]] * 3
    file = {"bytes": os.path.getsize("a/model.safetensors"), "sha256": None}
    for each in record["inputs"]:
        assert each["files"]["model.safetensors"].pop("fingerprint").isalnum()
        assert each["files"] == {"model.safetensors": file}
    assert record["tensors"][UP] | {"hash": "-"} == {
        "file": "model.safetensors",
        "dtype": "BF16",
        "shape": [24, 40],
        "method": "ties",
        "parameters": {**record["tensors"]["model.scalar"]["parameters"], "lambda": 0.9},
        "models": {"a": {"weight": 0.25, "density": 0.5}, "b": {"weight": 0.5, "density": 1.0}},
        "hash": "-",
    }
    assert record["tensors"]["model.scalar"]["models"]["a"] == {"weight": 0.25, "density": 0.75}


def test_what_is_read_is_what_was_written() -> None:
    record = merged(TIES, seed=3)
    assert {name: tensor.hash for name, tensor in record.tensors.items()} == hashes(Path("out"))
    assert record.tensors["model.empty"].shape == (0, 3)
    assert [(each.name, each.role, each.revision) for each in record.inputs] == [
        ("base", "base", None),
        ("a", "model", None),
        ("b", "model", None),
    ]
    assert (record.seed, record.document) == (3, None)
    assert record.options == {"nonfinite": "error", "shard_size": 5_000_000_000}
    here = next((name for name, _, runs in backends.instruction_sets() if runs), None)
    assert record.isa == here
    assert record.provider == {"cpu" if here else "torch": ("merge", "threshold")}


def test_the_same_merge_has_the_same_file_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(TIES)
    shutil.copytree(tmp_path, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("out", "elsewhere"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    merged(TIES)
    here, there = (Path(folder, "fastmerge.json").read_bytes() for folder in ("../out", "out"))
    assert here == there
    assert str(tmp_path).encode() not in here


@pytest.mark.parametrize("shard_size", [5_000_000_000, 1000], ids=["one-file", "sharded"])
def test_each_file_beside_the_weights_has_its_hash_but_for_the_card(shard_size: int) -> None:
    Path("a/tokenizer.json").write_text("{}" * 40_000)
    record = merged(LINEAR, shard_size=shard_size)
    beside = {path.name for path in Path("out").iterdir() if path.suffix != ".safetensors"}
    beside -= {"README.md", provenance.FILE}
    assert record.files == {name: tree(Path("out", name).read_bytes()) for name in beside}
    assert {"config.json", "mergekit_config.yml", "tokenizer.json"} <= record.files.keys()
    assert ("model.safetensors.index.json" in record.files) is (shard_size == 1000)


def test_a_copy_says_whose_it_is() -> None:
    record = merged("merge_method: passthrough\nmodels: [model: a]\n")
    assert {(each.method, *each.models) for each in record.tensors.values()} == {("copy", "a")}


def test_each_output_has_its_own_values() -> None:
    merged(TIES, vary={"lambda": [0.25, 1.5]})
    for value in (0.25, 1.5):
        record = provenance.read(f"out/lambda={value}")
        assert record.tensors[UP].parameters["lambda"] == value
        assert f"lambda: {value}" in record.recipe


def test_other_stages_give_their_inputs() -> None:
    text = "name: both\nmerge_method: slerp\nbase_model: b\nmodels: [model: a, model: b]\nparameters: {t: 0.5}\n---\n"
    text += "merge_method: ties\nbase_model: base\nmodels: [model: b, model: both]\nparameters: {weight: 1}\n"
    record = merged(text)
    assert [(each.name, each.role) for each in record.inputs] == [("base", "base"), ("b", "base"), ("a", "model")]
    assert list(record.tensors[UP].models) == ["b", "both"]


def test_an_adapter_is_an_input_with_its_config() -> None:
    folder = Path("adapter")
    folder.mkdir()
    module = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 40), f"{module}.lora_B.weight": torch.ones(24, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
    text = "merge_method: linear\nmodels: [model: a+adapter, model: b]\nparameters: {weight: 0.5}\n"
    before = inputs(text)
    assert [(name, each.role) for name, each in before.items()] == [
        ("a", "model"),
        ("adapter", "adapter"),
        ("b", "model"),
    ]
    assert list(before["adapter"].files) == ["adapter_config.json", "adapter_model.safetensors"]
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    assert inputs(text)["adapter"].files["adapter_config.json"] != before["adapter"].files["adapter_config.json"]


def test_the_hub_gives_commit_and_sha256(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(Path("a/model.safetensors").read_bytes()).hexdigest()
    folder = Path("hub/models--org--a/snapshots/c0ffee")
    folder.mkdir(parents=True)
    blob = folder.parents[1] / "blobs" / digest
    blob.parent.mkdir()
    shutil.copy("a/model.safetensors", blob)
    (folder / "model.safetensors").symlink_to(f"../../blobs/{digest}")
    monkeypatch.setattr(planner, "snapshot", lambda *_, **__: Snapshot(folder, "c0ffee"))
    found = inputs("merge_method: linear\nmodels: [model: org/a, model: b]\nparameters: {weight: 0.5}\n")
    assert found["org/a"].revision == "c0ffee"
    assert found["org/a"].files["model.safetensors"].sha256 == digest
    assert found["b"].files["model.safetensors"].sha256 is None


def test_full_computes_what_nobody_says() -> None:
    for name, each in inputs(LINEAR, full=True).items():
        digest = hashlib.sha256(Path(name, "model.safetensors").read_bytes()).hexdigest()
        assert each.files["model.safetensors"].sha256 == digest


@pytest.mark.parametrize("lies", ["", "blobs", "models--org--a", "models--org--a/snapshots", "models/blobs"])
def test_a_name_like_a_hash_is_believed_in_the_cache_of_the_hub_alone(lies: str) -> None:
    digest = hashlib.sha256(Path("a/model.safetensors").read_bytes()).hexdigest()
    named = Path(lies, "0" * 64)
    named.parent.mkdir(parents=True, exist_ok=True)
    shutil.move("a/model.safetensors", named)
    Path("a/model.safetensors").symlink_to(named.absolute())
    assert inputs(LINEAR)["a"].files["model.safetensors"].sha256 is None
    record = merged(LINEAR, hash="full")
    assert record.inputs[0].files["model.safetensors"].sha256 == digest
    assert "0" * 64 not in Path("out/README.md").read_text()


# --- fingerprints ---


@pytest.mark.parametrize("size", [1, 1 << 20, (1 << 20) + 1, (1 << 20) + 4096, (1 << 20) + 4097, 3_000_001])
def test_a_fingerprint_sees_both_ends(size: int) -> None:
    file = Path("file")
    data = bytearray(size)
    file.write_bytes(data)
    found = {provenance.fingerprint(file)}
    for at in {0, size - 1}:
        data[at] ^= 1
        file.write_bytes(data)
        found.add(provenance.fingerprint(file))
    assert len(found) == (2 if size == 1 else 3)


def test_a_fingerprint_tells_trainings_apart() -> None:
    """Two models of one architecture have the same header and size."""
    for name in ("one", "two"):
        save(name, {"w": torch.randn(1024, 1024, generator=torch.Generator().manual_seed(len(name) + ord(name[0])))})
    assert provenance.fingerprint(Path("one/model.safetensors")) != provenance.fingerprint(
        Path("two/model.safetensors")
    )


# --- damaged ---


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        at: Any = record
        for key in parents:
            at = at[key]
        if value is ...:
            del at[last]
        else:
            at[last] = value

    return change


DAMAGE = {
    "no-format": changed("format", ...),
    "later-format": changed("format", 2),
    "another-hash": changed("hash", "md5"),
    "format-true": changed("format", True),
    "no-recipe": changed("recipe", ...),
    "recipe-a-list": changed("recipe", []),
    "seed-a-text": changed("seed", "1"),
    "arithmetic-a-fraction": changed("arithmetic", 1.5),
    "versions-of-numbers": changed("versions", {"numpy": 2}),
    "provider-of-texts": changed("provider", {"cpu": "merge"}),
    "inputs-an-object": changed("inputs", {}),
    "an-input-a-text": changed("inputs/0", "a"),
    "no-files": changed("inputs/0/files", ...),
    "bytes-a-text": changed("inputs/0/files/model.safetensors/bytes", "5"),
    "fingerprint-a-word": changed("inputs/0/files/model.safetensors/fingerprint", "zebra"),
    "no-files-beside": changed("files", ...),
    "files-beside-a-list": changed("files", []),
    "a-file-beside-null": changed("files/config.json", None),
    "a-file-elsewhere": changed("files", {"../config.json": "0" * 32}),
    "a-file-that-is-a-folder": changed("files", {"..": "0" * 32}),
    "tensors-a-list": changed("tensors", []),
    "a-tensor-null": changed("tensors/model.scalar", None),
    "shape-of-texts": changed("tensors/model.scalar/shape", ["1"]),
    "shape-of-booleans": changed("tensors/model.scalar/shape", [True]),
    "models-a-list": changed("tensors/model.scalar/models", []),
    "models-of-numbers": changed("tensors/model.scalar/models", {"a": 1}),
    "no-hash": changed("tensors/model.scalar/hash", ...),
    "hash-too-short": changed("tensors/model.scalar/hash", "0f"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_is_one_sentence(damage: Callable[[dict[str, Any]], None]) -> None:
    merged(LINEAR)
    file = Path("out/fastmerge.json")
    record = json.loads(file.read_bytes())
    provenance.read("out")
    damage(record)
    file.write_text(json.dumps(record))
    refused()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"\xff\xfe",
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b"[" * 100_000,
        b'{"format":' * 100_000,
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["empty", "null", "list", "no-utf-8", "twice", "nan", "deep-lists", "deep-objects", "lfs-pointer"],
)
def test_what_is_no_record_is_one_sentence(data: bytes) -> None:
    Path("out").mkdir()
    Path("out/fastmerge.json").write_bytes(data)
    refused()


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_one_sentence(kind: str) -> None:
    Path("out").mkdir()
    if kind == "folder":
        Path("out/fastmerge.json").mkdir()
    if kind == "fifo":
        os.mkfifo("out/fastmerge.json")
    refused()


def refused() -> None:
    with pytest.raises(CheckpointError) as error:
        provenance.read("out")
    assert re.match(r"out(/fastmerge\.json)? ", str(error.value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
