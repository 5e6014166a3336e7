"""Outputs held against their record: what is wrong is found and named, and what is merged again is the same."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recorded import SHAPES, merged, models, save, tree
from safetensors.torch import save_file

import fastmerge
from fastmerge import CheckpointError, cli, planner, provenance, verify
from fastmerge.checkpoint import open_checkpoint
from fastmerge.hub import Snapshot
from fastmerge.verifying import Wrong, _refuse_changed

BASED = "base_model: base\nmodels: [model: a, model: b]\n"
LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n"
TIES = f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3}}\n"
OF_MODEL = f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3, scope: model}}\n"
BOTH = f"name: both\n{LINEAR}---\n"
RECIPES = {
    "linear": LINEAR,
    "ties": TIES,
    "ties-of-model": OF_MODEL,
    "dare": f"merge_method: dare_ties\n{BASED}parameters: {{weight: 0.4, density: 0.6}}\n",
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b]\nparameters: {t: 0.3}\n",
    "copy": "merge_method: passthrough\nmodels: [model: a]\n",
    "direct": f"merge_method: della\n{BASED}parameters: {{weight: 0.4, density: 0.6}}\n",
    "stages": BOTH + TIES.replace("model: a", "model: both"),
    "stages-of-model": BOTH + OF_MODEL.replace("model: a", "model: both"),
    "adapter": "merge_method: linear\nmodels: [model: a+adapter, model: b]\nparameters: {weight: 0.5}\n",
    "adapter-over-a-stage": BOTH + "merge_method: passthrough\nmodels: [model: both+adapter]\n",
}
UP = "model.layers.0.mlp.up_proj.weight"
WIDE = "model.wide.weight"
FILLED = [name for name, shape in SHAPES.items() if 0 not in shape]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    models("base", "a", "b")


def flip(name: str, at: int, out: str = "out") -> tuple[str, int, int]:
    """One bit of a tensor's byte; its file there, and the bytes of the tensor."""
    held = open_checkpoint(out)
    info, file = held.tensors[name], held.file_of(name)
    with open(file, "r+b") as opened:
        opened.seek((info.begin if at >= 0 else info.end) + at)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 0x10]))
    return file.name, info.begin, info.end


def save_adapter(scale: float = 1.0) -> None:
    module = "base_model.model.model.layers.0.mlp.up_proj"
    generator = torch.Generator().manual_seed(5)
    factors = {"A": torch.randn(2, 40, generator=generator), "B": torch.randn(24, 2, generator=generator)}
    Path("adapter").mkdir(exist_ok=True)
    save_file(
        {f"{module}.lora_{side}.weight": scale * each for side, each in factors.items()},
        "adapter/adapter_model.safetensors",
    )
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')


def rewrite(change: Callable[[dict[str, Any]], None], out: str = "out") -> None:
    """Another record in the place of the one that is there."""
    file = Path(out, provenance.FILE)
    record = json.loads(file.read_bytes())
    change(record)
    file.write_text(json.dumps(record))


def over(*names: str) -> str:
    listed = ", ".join(f"model: {name}" for name in names)
    return f"merge_method: linear\nmodels: [{listed}]\nparameters: {{weight: 0.5}}\n"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments, prog_name="fastmerge")
    return int(ended.value.code or 0)


# --- the bytes ---


@pytest.mark.parametrize("shard_size", [5_000_000_000, 1000], ids=["one-file", "sharded"])
def test_a_sound_output_has_nothing_wrong(shard_size: int) -> None:
    merged(LINEAR, shard_size=shard_size)
    seen: list[tuple[int, int]] = []
    found = verify("out", progress=lambda done, total: seen.append((done, total)))
    assert (found.wrong, found.tensors, found.recomputed) == ((), len(SHAPES), ())
    assert seen[-1] == (found.bytes_read, found.bytes_read)
    assert found.bytes_read == sum(info.nbytes for info in open_checkpoint("out").tensors.values())


@pytest.mark.parametrize("shard_size", [5_000_000_000, 1000], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("at", [0, -1], ids=["first-byte", "last-byte"])
def test_a_flipped_bit_is_found_and_named(name: str, at: int, shard_size: int) -> None:
    merged(LINEAR, shard_size=shard_size)
    file, begin, end = flip(name, at)
    (wrong,) = verify("out", threads=2).wrong
    assert wrong == Wrong(f"tensor {name!r} has other bytes than were written", name, file, begin, end)


def test_every_wrong_tensor_is_named_in_the_order_of_the_files() -> None:
    merged(LINEAR)
    for name in (WIDE, UP):
        flip(name, 0)
    order = [name for name in open_checkpoint("out").tensors if name in (WIDE, UP)]
    assert [wrong.tensor for wrong in verify("out").wrong] == order


@pytest.mark.parametrize("at", [0, 1 << 20, -1], ids=["first-piece", "second-piece", "last-byte"])
@pytest.mark.parametrize("size", [(1 << 20) + 1, 5 << 19], ids=["one-byte-more", "two-pieces-and-a-half"])
def test_tensors_of_several_pieces_are_read_to_their_end(size: int, at: int) -> None:
    save("large", {"w": torch.arange(size).to(torch.uint8)})
    merged("merge_method: passthrough\nmodels: [model: large]\n")
    assert verify("out").wrong == ()
    flip("w", at)
    assert [wrong.tensor for wrong in verify("out").wrong] == ["w"]


def test_a_flip_in_the_middle_of_a_large_tensor_is_found() -> None:
    merged(LINEAR)
    flip(WIDE, 270_001)
    assert [wrong.tensor for wrong in verify("out").wrong] == [WIDE]


@pytest.mark.parametrize("damage", ["cut", "missing", "no-index", "no-weights"])
def test_a_shard_that_is_not_whole_is_named(damage: str) -> None:
    merged(LINEAR, shard_size=1000)
    shard = sorted(Path("out").glob("*.safetensors"))[1]
    if damage == "cut":
        os.truncate(shard, os.path.getsize(shard) - 1)
    elif damage == "missing":
        shard.unlink()
    elif damage == "no-index":
        Path("out/model.safetensors.index.json").unlink()
    else:
        for file in Path("out").glob("*.safetensors*"):
            file.unlink()
    wrong, *beside = verify("out").wrong
    assert [each.file for each in beside] == ["model.safetensors.index.json"] * damage.startswith("no-")
    assert wrong.tensor is None
    assert (shard.name if damage in ("cut", "missing") else "out has no") in wrong.reason or damage == "no-weights"


def test_headers_must_say_what_the_record_says() -> None:
    merged(LINEAR)
    file = Path("out/model.safetensors")
    data = file.read_bytes().replace(b'"model.scalar"', b'"model.scalaR"').replace(b"[24,40]", b"[40,24]", 1)
    file.write_bytes(data)
    reasons = [wrong.reason for wrong in verify("out").wrong]
    turned = next(name for name, info in open_checkpoint("out").tensors.items() if info.shape == (40, 24))
    assert sorted(reasons) == [
        f"tensor {turned!r} has the shape (40, 24), and was written with (24, 40)",
        "tensor 'model.scalaR' was not written by the merge",
        "tensor 'model.scalar' is missing",
    ]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("dtype", "F16", "has the dtype BF16, and was written with F16"),
        (
            "file",
            "../a/model.safetensors",
            "has the file model.safetensors, and was written with ../a/model.safetensors",
        ),
        ("hash", "0" * 32, "has other bytes than were written"),
    ],
)
def test_a_record_that_says_otherwise(key: str, value: str, reason: str) -> None:
    merged(LINEAR)
    rewrite(lambda record: record["tensors"][UP].update({key: value}))
    assert [wrong.reason for wrong in verify("out").wrong] == [f"tensor {UP!r} {reason}"]


# --- the files beside them ---

CHANGES = {
    "config.json is other": lambda: Path("out/config.json").write_text('{"num_hidden_layers": 3}'),
    "config.json is missing": lambda: Path("out/config.json").unlink(),
    "tokenizer.json is other": lambda: Path("out/tokenizer.json").write_text("{ }"),
    "tokenizer.json is missing": lambda: Path("out/tokenizer.json").unlink(),
    "mergekit_config.yml is other": lambda: Path("out/mergekit_config.yml").write_text(""),
    "model.safetensors.index.json is other": lambda: indented(Path("out/model.safetensors.index.json")),
}


def indented(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_bytes()), indent=4))


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_beside_the_weights_that_is_other_or_missing_is_named(change: str) -> None:
    Path("a/tokenizer.json").write_text("{}")
    merged(LINEAR, shard_size=1000)
    CHANGES[change]()
    name, _, what = change.split()
    found = verify("out", recompute=2)
    fault = f"the file {name!r} is " + ("missing" if what == "missing" else "other than was written")
    assert found.wrong == (Wrong(fault, file=name),)
    assert len(found.recomputed) == 2


def test_a_file_beside_the_weights_that_is_a_folder_is_named() -> None:
    merged(LINEAR)
    Path("out/mergekit_config.yml").unlink()
    Path("out/mergekit_config.yml").mkdir()
    (wrong,) = verify("out").wrong
    assert wrong.file == "mergekit_config.yml"
    assert "is a folder" in wrong.reason


@pytest.mark.parametrize("edit", [lambda card: card.write_text("Mine."), Path.unlink], ids=["other", "none"])
def test_a_card_is_there_to_be_edited(edit: Callable[[Path], object]) -> None:
    merged(LINEAR)
    edit(Path("out/README.md"))
    assert verify("out").wrong == ()


# --- merged again ---


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_tensor_comes_out_the_same_again(recipe: str) -> None:
    save_adapter()
    merged(RECIPES[recipe], seed=11)
    found = verify("out", recompute=100)
    assert found.wrong == ()
    assert found.recomputed == tuple(sorted(SHAPES))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tensor_does_not_depend_on_which_others_are_merged(recipe: str) -> None:
    save_adapter()
    merged(RECIPES[recipe])
    drawn = set()
    for seed in range(4):
        found = verify("out", recompute=1, sample_seed=seed)
        assert found.wrong == ()
        drawn |= set(found.recomputed)
    assert len(drawn) > 1


def test_what_is_drawn_follows_the_seed() -> None:
    merged(LINEAR)
    drawn = [verify("out", recompute=3, sample_seed=seed).recomputed for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    assert {len(each) for each in drawn} == {3}


@pytest.mark.parametrize("recipe", ["linear", "stages-of-model"])
def test_other_weights_with_a_record_that_agrees_are_found(recipe: str) -> None:
    merged(RECIPES[recipe])
    file, begin, end = flip(UP, 3)
    raw = Path("out", file).read_bytes()[begin:end]
    rewrite(lambda record: record["tensors"][UP].update(hash=tree(raw)))
    assert verify("out").wrong == ()
    (wrong,) = verify("out", recompute=100).wrong
    assert wrong == Wrong(
        f"tensor {UP!r} comes out with other bytes when it is merged again", UP, "model.safetensors", begin, end
    )


def test_nothing_is_merged_again_where_bytes_are_wrong() -> None:
    merged(LINEAR)
    flip(UP, 0)
    shutil.rmtree("a")
    found = verify("out", recompute=2)
    assert [wrong.tensor for wrong in found.wrong] == [UP]
    assert found.recomputed == ()


def test_each_output_of_several_is_merged_again_by_its_own_recipe() -> None:
    merged(TIES, vary={"density": [0.2, 0.6]})
    for folder in ("out/density=0.2", "out/density=0.6"):
        found = verify(folder, recompute=100)
        assert (found.wrong, len(found.recomputed)) == ((), len(SHAPES))


def test_models_are_found_from_the_folder_that_the_output_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged(LINEAR)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert verify(tmp_path / "out", recompute=2).wrong == ()


@pytest.mark.parametrize("recipe", ["merged", "copied"])
def test_nan_goes_where_it_went(recipe: str) -> None:
    signalling = np.array([0x3F80, 0x7F81, 0xFFC1, 0x7F80], np.uint16)
    for name in ("x", "y"):
        save(name, {"w": torch.from_numpy(signalling).view(torch.bfloat16)})
    text = over("x", "y") if recipe == "merged" else "merge_method: passthrough\nmodels: [model: x]\n"
    merged(text, nonfinite="propagate")
    assert verify("out", recompute=1).wrong == ()


@pytest.mark.parametrize(
    "result",
    [
        "merge_method: task_arithmetic\nbase_model: z\nmodels: [model: first, model: y]\nparameters: {weight: 0.5}",
        "merge_method: passthrough\nslices: [sources: [{model: y, layer_range: [0, 1]}], sources: [{model: first,"
        " layer_range: [1, 2]}]]",
    ],
    ids=["models", "slices"],
)
def test_rows_of_a_vocabulary_are_gathered_from_stages_again(result: str) -> None:
    for name in ("x", "y", "z"):
        generator = torch.Generator().manual_seed(ord(name))
        tensors = {"model.embed_tokens.weight": torch.randn(4, 8, generator=generator)}
        tensors |= {f"model.layers.{layer}.w": torch.ones(8) for layer in range(2)}
        save(name, tensors, vocab_size=4)
        words = {word: at for at, word in enumerate(["<unk>", *sorted(["w", "v"], reverse=name == "y"), name])}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
        Path(name, "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    text = "name: first\nmerge_method: passthrough\nmodels: [model: x]\nparameters: {scale: 0.5}\n---\n"
    text += f"{result}\ntokenizer_source: union\n"
    record = merged(text)
    tokens = 6 if "model: z" in result or "base_model: z" in result else 5
    assert record.tensors["model.embed_tokens.weight"].shape == (tokens, 8)
    assert "tokenizer.json" in record.inputs[0].files
    found = verify("out", recompute=3)
    assert (found.wrong, len(found.recomputed)) == ((), 3)
    Path("y/tokenizer.json").write_text(Path("y/tokenizer.json").read_text().replace('"y"', '"q"'))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json of the input 'y' is not the file that it was"):
        verify("out", recompute=1)


def test_models_kept_between_are_taken_from_beside_the_output() -> None:
    Path("r.yml").write_text(BOTH + TIES.replace("model: a", "model: both"))
    assert run("multi", "r.yml", "--intermediate-dir", "kept", "--out-path", "kept/out", "--quiet") == 0
    for out in ("kept/both", "kept/out"):
        found = verify(out, recompute=100)
        assert (found.wrong, len(found.recomputed)) == ((), len(SHAPES))
    flip(UP, 0, "kept/both")
    with pytest.raises(CheckpointError, match="of the input 'both' is not the file that it was"):
        verify("kept/out", recompute=1)


def test_a_model_of_the_hub_is_taken_at_the_commit_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(name: str, revision: str | None, **_: Any) -> Snapshot:
        asked.append((name, revision))
        return Snapshot(Path("a"), "c0ffee")

    monkeypatch.setattr(planner, "snapshot", snapshot)
    merged(over("org/a", "b"))
    asked.clear()
    assert verify("out", recompute=1).wrong == ()
    assert asked == [("org/a", "c0ffee")]


# --- what it was merged from ---


@pytest.mark.parametrize("name", ["base", "a", "adapter"])
def test_an_input_that_changed_is_named(name: str) -> None:
    save_adapter()
    recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels: [model: a+adapter]\nparameters: {weight: 0.5}\n"
    merged(recipe)
    if name == "adapter":
        save_adapter(2.0)
        file = "adapter_model.safetensors"
    else:
        file = "model.safetensors"
        flip(UP, 0, name)
    with pytest.raises(CheckpointError, match=f"{file} of the input '{name}' is not the file that it was"):
        verify("out", recompute=1)


def test_an_input_that_is_gone_is_named() -> None:
    merged(LINEAR)
    shutil.rmtree("a")
    with pytest.raises(fastmerge.FastmergeError, match="'a'"):
        verify("out", recompute=1)
    assert verify("out").wrong == ()


def test_a_sha256_that_both_know_must_be_the_same() -> None:
    record = merged(LINEAR)
    digest = "0" * 64
    made = [
        replace(each, files={n: f._replace(sha256=digest) for n, f in each.files.items()}) for each in record.inputs
    ]
    _refuse_changed(replace(record, inputs=tuple(made)), record.inputs, Path("out"))
    other = [replace(each, files={n: f._replace(sha256="1" * 64) for n, f in each.files.items()}) for each in made]
    with pytest.raises(CheckpointError, match="of the input 'a' is not the file that it was"):
        _refuse_changed(replace(record, inputs=tuple(made)), other, Path("out"))


def test_the_bits_of_another_arithmetic_are_not_compared() -> None:
    merged(LINEAR)
    rewrite(lambda record: record.update(arithmetic=provenance.ARITHMETIC + 1))
    assert verify("out").wrong == ()
    with pytest.raises(CheckpointError, match="recompute it with that version"):
        verify("out", recompute=1)


def test_a_recipe_that_is_damaged_is_one_error() -> None:
    merged(LINEAR)
    rewrite(lambda record: record.update(recipe="merge_method: [\n"))
    with pytest.raises(fastmerge.RecipeError, match=r"out/fastmerge\.json"):
        verify("out", recompute=1)


def test_inputs_and_output_stay_as_they_were() -> None:
    merged(TIES)
    files = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    verify("out", recompute=100)
    assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == files


# --- the command ---


def test_the_command_says_that_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    merged(LINEAR)
    assert run("verify", "out", "--recompute", "2") == 0
    out, err = capsys.readouterr()
    held = "out: all 7 tensors and 2 files beside them are as they were written"
    assert out.startswith(f"{held}; 2 merged again, to the bit; read 546.8 kB in ")
    assert err == ""


def test_the_command_names_file_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    merged(LINEAR)
    file, begin, end = flip(UP, 0)
    capsys.readouterr()
    assert run("verify", "out") == 1
    assert capsys.readouterr().out.splitlines() == [
        f"wrong: out/{file}, bytes {begin:,} to {end:,}: tensor {UP!r} has other bytes than were written",
        "out: 1 wrong, 7 tensors and 2 files in fastmerge.json",
    ]


def test_the_command_takes_all_outputs_of_a_merge(capsys: pytest.CaptureFixture[str]) -> None:
    merged(TIES, vary={"density": [0.2, 0.6]})
    flip(UP, 0, "out/density=0.6")
    capsys.readouterr()
    assert run("verify", "out", "--json") == 1
    found = json.loads(capsys.readouterr().out)["outputs"]
    assert [(each["out"], len(each["wrong"])) for each in found] == [("out/density=0.2", 0), ("out/density=0.6", 1)]
    assert list(found[1]) == ["out", "tensors", "files", "bytes_read", "wrong", "recomputed"]
    assert list(found[1]["wrong"][0]) == ["reason", "tensor", "file", "begin", "end"]


@pytest.mark.parametrize("folder", ["a", "absent"])
def test_a_folder_without_a_record_is_a_mistake(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", folder) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {folder}")
    assert err.count("\n") == 1


def test_names_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "w\x1b[31m\x07"
    for model in ("x", "y"):
        save(model, {name: torch.ones(3)})
    merged(over("x", "y"))
    flip(name, 0)
    capsys.readouterr()
    assert run("verify", "out") == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"w\x1b[31m\x07" in out
