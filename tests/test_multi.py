"""`fastmerge multi`: the documents of a recipe as merges whose models are kept, by mergekit-multi's arguments."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

from fastmerge import cli

STAGED = """\
name: first
merge_method: slerp
base_model: a
models: [model: b]
parameters: {t: 0.25}
dtype: bfloat16
---
merge_method: dare_ties
base_model: c
models: [{model: first, parameters: {weight: 0.5}}, {model: second, parameters: {weight: 1}}]
parameters: {density: 0.5}
---
name: second
merge_method: linear
models: [{model: first, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
"""


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three small models, and a recipe in which the result needs `first` and `second`, and `second` needs `first`."""
    monkeypatch.chdir(tmp_path)
    weights, *deltas = np.random.default_rng(0).standard_normal((4, 4, 8, 16)).astype(np.float32)
    for name, delta in zip("abc", deltas, strict=True):
        Path(name).mkdir()
        tensors = {f"layers.{n}.w": weights[n] / 16 + delta[n] / 1024 for n in range(4)}
        save_file(tensors, Path(name, "model.safetensors"))
        for file in ("config.json", "tokenizer.json"):
            Path(name, file).write_text('{"model_type": "llama"}')
    Path("staged.yml").write_text(STAGED)


def run(*arguments: str) -> Result:
    """The command; an exception that is no exit fails the test."""
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False, prog_name="fastmerge")
    assert isinstance(result, Result)
    return result


def files(folder: str) -> dict[str, bytes]:
    """What does not tell where the models between were."""
    own = ("README.md", "fastmerge.json")
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name not in own}


@pytest.fixture
def merged() -> dict[str, bytes]:
    """What `fastmerge merge` makes of the recipe, but for the card."""
    assert run("merge", "staged.yml", "merged").exit_code == 0
    return files("merged")


def test_only_the_result_is_kept(merged: dict[str, bytes]) -> None:
    ended = run("multi", "staged.yml", "--out-path", "out")
    assert (ended.exit_code, ended.stdout.count("\n"), ended.stderr) == (0, 1, "")
    assert files("out") == merged
    assert sorted(os.listdir()) == ["a", "b", "c", "merged", "out", "staged.yml"]


@pytest.mark.parametrize("option", ["-I", "--intermediate-dir"])
def test_the_models_between_are_kept_where_asked(option: str, merged: dict[str, bytes]) -> None:
    ended = run("multi", "staged.yml", "--out-path", "out", option, "between", "--out-shard-size", "5B")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert [line.partition(":")[0] for line in ended.stdout.splitlines()] == ["between/first", "between/second", "out"]
    assert files("out") == merged
    assert set(files("between/first")) == set(merged)
    first, *_ = STAGED.split("---\n")
    Path("first.yml").write_text(first.replace("name: first\n", ""))
    assert run("merge", "first.yml", "first").exit_code == 0
    assert files("between/first")["model.safetensors"] == files("first")["model.safetensors"]


def test_a_model_that_is_there_is_left_as_it_is_and_named() -> None:
    command = ("multi", "staged.yml", "--out-path", "out", "-I", "between")
    assert run(*command).exit_code == 0
    before = files("between/second")
    Path("staged.yml").write_text(STAGED.replace("weight: 3", "weight: 4").replace("0.25", "0.5"))
    for folder in ("between/first", "out"):
        Path(folder, "model.safetensors").unlink()
    ended = run(*command)
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["between/first", "between/second", "out"]
    assert lines[1] == "between/second: there already; --no-lazy merges it again"
    assert files("between/second") == before
    again = run(*command, "--quiet")
    assert (again.exit_code, again.output) == (0, "")


def test_no_lazy_merges_all_of_it_again() -> None:
    command = ("multi", "staged.yml", "--out-path", "out", "-I", "between", "--no-lazy")
    assert run(*command).exit_code == 0
    folders = ("between/first", "between/second", "out")
    before = [files(folder)["model.safetensors"] for folder in folders]
    Path("staged.yml").write_text(STAGED.replace("0.25", "0.75"))
    assert run(*command).exit_code == 0
    assert run("merge", "staged.yml", "merged").exit_code == 0
    after = [files(folder)["model.safetensors"] for folder in folders]
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert after[-1] == files("merged")["model.safetensors"]


def test_what_does_not_fit_later_is_found_before_anything_is_merged() -> None:
    save_file({"layers.0.w": np.ones((3, 3), np.float32)}, Path("c/model.safetensors"))
    ended = run("multi", "staged.yml", "--out-path", "out", "-I", "between")
    assert ended.exit_code == 2
    assert "the models do not fit one another" in ended.stderr
    assert not Path("between").exists()


@pytest.mark.parametrize("name", ["..", ".", "/tmp", "up/down", "a\\tb"])
def test_a_name_that_is_none_of_a_folder_is_refused(name: str) -> None:
    Path("staged.yml").write_text(STAGED.replace("first", f'"{name}"'))
    ended = run("multi", "staged.yml", "--out-path", "out", "-I", "between")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: staged.yml:1: no folder can have the name ")
    assert not Path("out").exists()


@pytest.mark.parametrize("arguments", [["--out-path", "out", "-I", "kept"], ["--out-path", "b", "-I", "between"]])
def test_no_input_is_replaced(arguments: list[str]) -> None:
    Path("kept").mkdir()
    Path("b").rename("kept/second")
    Path("b").symlink_to("kept/second")
    before = files("kept/second")
    ended = run("multi", "staged.yml", "--no-lazy", *arguments)
    assert ended.exit_code == 2
    assert "is an input: choose another" in ended.stderr
    assert files("kept/second") == before
    assert sorted(os.listdir()) == ["a", "b", "c", "kept", "staged.yml"]


# --- documents that nothing needs, and names for all ---

EXTRA = """\
---
name: extra
merge_method: linear
models: [{model: second, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
"""
ALL_NAMED = STAGED.replace("---\nmerge_method", "---\nname: last\nmerge_method")


def test_a_document_that_nothing_needs_is_merged_where_models_are_kept(merged: dict[str, bytes]) -> None:
    Path("staged.yml").write_text(STAGED + EXTRA)
    ended = run("multi", "staged.yml", "--out-path", "out", "-I", "between")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert sorted(os.listdir("between")) == ["extra", "first", "second"]
    assert files("out")["model.safetensors"] == merged["model.safetensors"]
    second, c, extra = (load_file(f"{place}/model.safetensors") for place in ("between/second", "c", "between/extra"))
    for name, tensor in extra.items():
        np.testing.assert_allclose(tensor, (second[name] + c[name]) / 2, rtol=0, atol=1e-6)


def test_a_document_that_nothing_needs_is_left_out_where_none_is_kept() -> None:
    Path("staged.yml").write_text(STAGED + EXTRA)
    ended = run("multi", "staged.yml", "--out-path", "out")
    assert ended.exit_code == 0
    assert ended.stderr == "warning: staged.yml:17: nothing needs the document 'extra'; it is left out\n"
    assert Path("out/model.safetensors").exists()


@pytest.mark.parametrize("option", [[], ["--out-path", "out"]], ids=["without", "with"])
def test_where_all_have_a_name_all_are_kept_by_it(option: list[str], merged: dict[str, bytes]) -> None:
    Path("staged.yml").write_text(ALL_NAMED)
    ended = run("multi", "staged.yml", "-I", "between", *option)
    assert ended.exit_code == 0
    assert ended.stderr == ("--out-path: not needed, each document has a name to keep its model by\n" if option else "")
    assert sorted(os.listdir("between")) == ["first", "last", "second"]
    assert files("between/last")["model.safetensors"] == merged["model.safetensors"]
    assert not Path("out").exists()


@pytest.mark.parametrize("command", [["merge", "staged.yml", "out"], ["multi", "staged.yml", "--out-path", "out"]])
def test_where_all_have_a_name_none_is_the_result(command: list[str]) -> None:
    Path("staged.yml").write_text(ALL_NAMED)
    ended = run(*command)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: staged.yml:1: each document has a name; leave it out of the one that is the")
    assert ended.stderr.endswith("keep the models of all with `fastmerge multi --intermediate-dir`\n")


def test_an_adapter_may_be_added_to_the_model_of_a_document() -> None:
    Path("lora").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w"]}
    Path("lora/adapter_config.json").write_text(json.dumps(config))
    halves = {"A": np.ones((2, 16), np.float32), "B": np.ones((8, 2), np.float32)}
    tensors = {f"base_model.model.layers.0.w.lora_{half}.weight": values for half, values in halves.items()}
    save_file(tensors, "lora/adapter_model.safetensors")
    for name in "ab":
        save_file({"layers.0.w.weight": np.ones((8, 16), np.float32)}, f"{name}/model.safetensors")
    Path("staged.yml").write_text(
        "name: first\nmerge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 1}\n"
        "---\nmerge_method: passthrough\nmodels: [model: first+lora]\n"
    )
    for out, option in (("out", []), ("kept", ["-I", "between"])):
        ended = run("multi", "staged.yml", "--out-path", out, *option)
        assert ended.exit_code == 0, ended.output
        assert (load_file(f"{out}/model.safetensors")["layers.0.w.weight"] == 1 + 2 * 2).all()
    ended = run("multi", "staged.yml", "--out-path", "lora", "-I", "between")
    assert "the output folder lora is an input" in ended.stderr


def test_the_oddities_of_every_document_are_told() -> None:
    Path("b/tokenizer.json").write_text('{"model_type": "gpt2"}')
    Path("staged.yml").write_text(f"name: last\n{STAGED.partition(chr(10))[2].partition('---')[0]}")
    ended = run("multi", "staged.yml", "-I", "between")
    assert "warning: the tokenizers of 'a' and 'b' differ" in ended.stderr


def test_the_models_need_a_place() -> None:
    ended = run("multi", "staged.yml")
    assert ended.exit_code == 2
    assert "the models need a folder: --out-path for the result, or --intermediate-dir for all" in ended.stderr


def test_the_result_needs_a_place() -> None:
    ended = run("multi", "staged.yml", "-I", "between")
    assert ended.exit_code == 2
    assert ended.stderr == (
        "error: staged.yml:8: this document has no name, so say with --out-path where its model goes\n"
    )
    assert not Path("between").exists()


def test_no_two_models_have_one_place() -> None:
    ended = run("multi", "staged.yml", "-I", "between", "--out-path", "between/first")
    assert ended.exit_code == 2
    assert "the output folder between/first is an input: choose another" in ended.stderr
    assert not Path("between").exists()
