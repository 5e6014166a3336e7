"""What `fastmerge check` finds: a tiny recipe per problem, all problems in one report, and nothing touched."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastmerge import cli
from fastmerge.preflight import oddities, tokenizers_differ
from fastmerge.recipe import Recipe

LINEAR = "merge_method: linear\nmodels: [model: base, model: a, model: b]\nparameters: {weight: 1}\n"
TIES = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters: {weight: 1, density: 0.5}
  - model: b
    parameters: {weight: 0.5, density: 0.5}
"""
TEMPLATE = "{% for message in messages %}{{ message }}{% endfor %}"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and two fine-tunes that agree in everything."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b", "c"):
        Path(name).mkdir()
        save_file({"layers.0.w": rng.standard_normal((4, 8)).astype(np.float32)}, f"{name}/model.safetensors")
        write(f"{name}/config.json", {"architectures": ["TinyForCausalLM"], "rope_theta": 1e4, "vocab_size": 3})
        write(f"{name}/tokenizer.json", tokenizer("x", "y", "z"))
        write(f"{name}/tokenizer_config.json", {"eos_token": "z", "chat_template": TEMPLATE})
        card(name, "license: mit" if name == "base" else "license: mit\nbase_model: owner/Base")


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Command:
    """`fastmerge check` of a recipe's text; whatever it finds, no file is touched."""

    def run(recipe: str, *options: str) -> Ended:
        Path("recipe.yml").write_text(recipe)
        before = {path: path.lstat().st_mtime_ns for path in Path().rglob("*")}
        ended = command("check", "recipe.yml", *options, capsys=capsys)
        assert {path: path.lstat().st_mtime_ns for path in Path().rglob("*")} == before
        return ended

    return run


def command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Ended:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments, prog_name="fastmerge")
    code = ended.value.code
    assert code is None or isinstance(code, int)
    return Ended(code or 0, *capsys.readouterr())


def write(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value))


def tokenizer(*tokens: str, **others: Any) -> dict[str, Any]:
    return {"model": {"vocab": {token: number for number, token in enumerate(tokens)}}, "added_tokens": [], **others}


def bpe(*tokens: str) -> dict[str, Any]:
    """A tokenizer.json that is one."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": None, "fuse_unk": False}
    return {"version": "1.0", "model": model, "added_tokens": []}


def card(model: str, matter: str) -> None:
    Path(model, "README.md").write_text(f"---\n{matter}\n---\n# A model\n")


def warned(ended: Ended, *said: str) -> None:
    """The command warned once, and said this."""
    *lines, last = ended.out.splitlines()
    assert (ended.code, ended.err, len(lines), last) == (0, "", 1, "recipe.yml: errors 0, warnings 1"), ended
    assert lines[0].startswith("warning: ")
    for words in said:
        assert words in lines[0]


# --- a report ---


@pytest.mark.parametrize("recipe", [LINEAR, TIES], ids=["linear", "ties"])
def test_a_clean_recipe_has_nothing_wrong(check: Command, recipe: str) -> None:
    assert check(recipe) == (0, "recipe.yml: nothing is wrong or odd\n", "")
    assert json.loads(check(recipe, "--json").out) == {"errors": [], "warnings": []}


def test_all_problems_are_in_one_report_errors_first(check: Command) -> None:
    for name in ("a", "b"):
        Path(name, "model.safetensors").unlink()
    Path("a/pytorch_model.bin").touch()
    write("b/config.json", {"architectures": ["TinyForCausalLM"], "vocab_size": 4})
    card("b", "license: cc-by-nd-4.0")
    ended = check(TIES.replace("density: 0.5", "density: 1"))
    kinds = [line.partition(":")[0] for line in ended.out.splitlines()]
    assert (ended.code, kinds) == (1, ["error"] * 2 + ["warning"] * 5 + ["recipe.yml"])
    said = json.loads(check(TIES.replace("density: 0.5", "density: 1"), "--json").out)
    for message, words in zip(
        (*said["errors"], *said["warnings"]),
        (
            "a holds PyTorch files only (pytorch_model.bin)",
            "b holds no model",
            "recipe.yml:5: models[0].parameters.density: density 1",
            "recipe.yml:7: models[1].parameters.density: density 1",
            "vocab_size 3 and 4",
            "'b', cc-by-nd-4.0, forbids derivatives",
            "licences of the models differ",
        ),
        strict=True,
    ):
        assert words in message


def test_what_planning_refuses_and_warns_of_is_told_once(check: Command) -> None:
    write("b/config.json", {"architectures": ["TinyForCausalLM"], "rope_theta": 1e6, "vocab_size": 3})
    save_file({"layers.0.w": np.zeros((4, 9), np.float32)}, "a/model.safetensors")
    ended = check(LINEAR)
    assert ended.code == 1
    assert ended.out.count("'layers.0.w' is [4, 8] in 'base' and [4, 9] in 'a'") == 1
    assert ended.out.count("rope_theta (10000.0 and 1000000.0)") == 1
    assert ended.out.endswith("recipe.yml: errors 1, warnings 1\n")


def test_a_model_that_is_opened_twice_is_warned_of_once(check: Command) -> None:
    write("a/model.safetensors.index.json", {"weight_map": {"layers.0.w": "one.safetensors"}})
    shutil.copyfile("a/model.safetensors", "a/one.safetensors")
    os.remove("b/model.safetensors")
    ended = check(LINEAR)
    assert ended.out.count("a has both model.safetensors.index.json and model.safetensors") == 1
    assert ended.out.endswith("recipe.yml: errors 1, warnings 1\n")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("merge_metod: linear\n", "recipe.yml:1: merge_metod: unknown key"),
        (LINEAR.replace("model: a", "model: no/where/is"), "there is no file or folder 'no/where/is'"),
    ],
    ids=["key", "model"],
)
def test_a_recipe_that_cannot_be_meant_is_an_error(check: Command, recipe: str, said: str) -> None:
    ended = check(recipe)
    assert (ended.code, ended.err) == (1, "")
    assert ended.out.startswith("error: recipe.yml:")
    assert said in ended.out


def test_names_that_would_steer_a_terminal_are_shown_as_escapes(check: Command) -> None:
    card("b", r'license: "x\e[31m"')
    for options in ((), ("--json",)):
        ended = check(LINEAR, *options)
        assert "31m" in ended.out
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", ended.out)


# --- headers ---


def test_quantised_weights_are_an_error(check: Command) -> None:
    write("a/config.json", {"quantization_config": {"quant_method": "gptq"}})
    ended = check(LINEAR)
    assert ended.code == 1
    assert "'a' is quantised (quantization_config in config.json, method gptq): dequantise it first" in ended.out


def test_an_output_without_room_is_an_error(check: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda at: asked.append(at) or SimpleNamespace(total=9**9, free=100))
    ended = check(LINEAR, "--out", "new/out")
    assert ended.code == 1
    assert re.search(r"error: new/out needs [0-9]{3} bytes and its disk has 100 left", ended.out)
    assert [os.path.realpath(place) for place in asked] == [os.getcwd()]
    assert check(LINEAR).code == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=9**9, free=9**9))
    assert check(LINEAR, "--out", "new/out").code == 0


# --- settings ---


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("weight: 1, density: 0.5", "weight: 1, density: 1", "recipe.yml:5: models[0].parameters.density: density 1"),
        ("weight: 1, density: 0.5", "weight: 1, density: 0", "recipe.yml:5: models[0].parameters.density: density 0"),
        ("weight: 1, density: 0.5", "weight: 0, density: 0.5", "recipe.yml:5: models[0].parameters.weight: weight 0"),
        ("weight: 0.5", "weight: -1", "recipe.yml:3: models: the weights sum to 0, and normalize divides"),
    ],
    ids=["density-1", "density-0", "weight-0", "sum-0"],
)
def test_a_value_that_nobody_wants_is_a_warning_with_its_place(check: Command, old: str, new: str, said: str) -> None:
    warned(check(TIES.replace(old, new)), said)


def test_a_value_for_some_tensors_only_is_meant(check: Command) -> None:
    some = "weight: [{filter: layers, value: 0}, {value: 1}], density: [0, 1]"
    assert check(TIES.replace("weight: 1, density: 0.5", some)).out == "recipe.yml: nothing is wrong or odd\n"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_density_1_leaves_a_random_drop_nothing_to_drop(check: Command, method: str) -> None:
    recipe = TIES.replace("ties", method).replace("weight: 1, density: 0.5", "weight: 1, density: 1")
    warned(check(recipe), "models[0].parameters.density: density 1", f"{method} is there to thin it")


def test_weights_that_sum_to_0_are_fine_where_nothing_divides_by_them(check: Command) -> None:
    recipe = TIES.replace("weight: 0.5", "weight: -1") + "parameters: {normalize: false}\n"
    assert check(recipe).out == "recipe.yml: nothing is wrong or odd\n"


def test_weights_of_0_are_told_of_once_each(check: Command) -> None:
    ended = check(TIES.replace("weight: 1", "weight: 0").replace("weight: 0.5", "weight: 0"))
    assert ended.out.count("weight 0 leaves nothing") == 2
    assert ended.out.endswith("recipe.yml: errors 0, warnings 2\n")


def test_weights_that_planning_refuses_are_an_error_alone(check: Command) -> None:
    recipe = (
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: -1}}"
    )
    ended = check(recipe)
    assert ended.code == 1
    assert ended.out.count("the weights sum to 0") == 1
    assert ended.out.endswith("recipe.yml: errors 1, warnings 0\n")


def test_lambda_over_1_is_odd_with_three_models_and_not_with_two(check: Command) -> None:
    scaled = TIES + "parameters: {lambda: 1.5}\n"
    assert check(scaled).out == "recipe.yml: nothing is wrong or odd\n"
    third = "  - model: c\n    parameters: {weight: 1, density: 0.5}\n"
    warned(
        check(TIES + third + "parameters: {lambda: 1.5}\n"), "recipe.yml:10: parameters.lambda: lambda 1.5", "3 models"
    )


# --- configs, tokenizers, templates ---


@pytest.mark.parametrize(
    ("key", "ours", "theirs"),
    [
        ("architectures", ["TinyForCausalLM"], ["OtherForCausalLM"]),
        ("hidden_size", 8, 16),
        ("vocab_size", 3, 4),
        ("tie_word_embeddings", True, False),
        ("rope_theta", 1e4, 1e6),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("num_attention_heads", 4, 8),
        ("num_key_value_heads", 2, 4),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_configs_that_differ_are_a_warning(check: Command, key: str, ours: Any, theirs: Any, nested: bool) -> None:
    for name, value in (("base", ours), ("a", ours), ("b", theirs)):
        write(f"{name}/config.json", {"text_config": {key: value}} if nested else {key: value})
    warned(check(LINEAR), "'base' and 'b'", key, repr(ours), repr(theirs))


def test_tokenizers_that_differ_are_a_warning(check: Command) -> None:
    write("b/tokenizer.json", tokenizer("x", "y", "z", "more"))
    warned(check(LINEAR), "'base' and 'b' differ (3 and 4 tokens)", "the output has the tokenizer of 'base'")


def test_special_tokens_that_differ_are_a_warning(check: Command) -> None:
    write("b/tokenizer_config.json", {"eos_token": {"content": "y", "lstrip": False}, "chat_template": TEMPLATE})
    write("a/tokenizer_config.json", {"eos_token": {"content": "z", "lstrip": False}, "chat_template": TEMPLATE})
    warned(check(LINEAR), "'base' and 'b'", "eos_token 'z' and 'y'")


def test_chat_templates_that_differ_are_a_warning(check: Command) -> None:
    Path("b/chat_template.jinja").write_text("{{ other }}")
    Path("a/chat_template.jinja").write_text(TEMPLATE)
    warned(check(LINEAR), "the chat templates of 'base' and 'b' differ")


def test_a_base_without_a_chat_template_is_a_warning(check: Command) -> None:
    for name in ("base", "a"):
        write(f"{name}/tokenizer_config.json", {})
    warned(check(LINEAR), "'base' has no chat template, unlike 'b', so the output has none")


@pytest.mark.parametrize("setting", ["tokenizer_source: union", "tokenizer: {source: base}", "tokenizer_source: b"])
def test_tokenizers_that_the_recipe_brings_together_may_differ(check: Command, setting: str) -> None:
    for name, tokens in (("base", "xyz"), ("a", "xyz"), ("b", "xyzw")):
        write(f"{name}/tokenizer.json", bpe(*tokens))
        write(f"{name}/config.json", {"vocab_size": len(tokens)})
    write("b/tokenizer_config.json", {"eos_token": "y", "chat_template": TEMPLATE})
    assert len(check(LINEAR).out.splitlines()) == 4
    assert check(f"{LINEAR}{setting}\n").out == "recipe.yml: nothing is wrong or odd\n"


@pytest.mark.parametrize("setting", ["chat_template: auto", "tokenizer_source: b"])
def test_a_chat_template_that_the_recipe_chooses_may_differ(check: Command, setting: str) -> None:
    for name in ("base", "a", "b"):
        write(f"{name}/tokenizer.json", bpe("x", "y", "z"))
    write("b/tokenizer_config.json", {"eos_token": "z", "chat_template": "{{ other }} of twenty letters"})
    warned(check(LINEAR), "the chat templates of 'base' and 'b' differ", "`chat_template` in the recipe says which")
    assert check(f"{LINEAR}{setting}\n").out == "recipe.yml: nothing is wrong or odd\n"


MERGES = {"vocab": {"x": 0}, "merges": ["x y"]}


@pytest.mark.parametrize(
    ("first", "other", "how"),
    [
        (tokenizer("x"), tokenizer("x", padding={"length": 8}, truncation={"max_length": 9}, version="1.1"), ""),
        (tokenizer("x"), tokenizer("x", added_tokens=[{"content": "<pad>"}]), "1 and 2 tokens"),
        ({"model": {"vocab": [["x", -1.0]]}}, {"model": {"vocab": [["x", -1.0], ["y", -2.0]]}}, "1 and 2 tokens"),
        (tokenizer("x", "y"), tokenizer("y", "x"), "in model"),
        (tokenizer("x", normalizer=None), tokenizer("x", normalizer={"type": "NFC"}), "in normalizer"),
        ({"model": MERGES}, {"model": {**MERGES, "merges": []}}, "in model"),
        (tokenizer("x"), [], "in their bytes"),
    ],
    ids=["per-call", "added", "unigram", "order", "normalizer", "merges", "unreadable"],
)
def test_tokenizers_are_compared_by_what_they_mean(first: Any, other: Any, how: str) -> None:
    assert tokenizers_differ(json.dumps(first).encode(), json.dumps(other).encode()) == how


def test_files_that_cannot_be_read_are_passed_over(check: Command) -> None:
    Path("b/tokenizer_config.json").write_bytes(b"\xff{")
    Path("b/README.md").write_bytes(b"---\n\xff\xfe: [\n---\n")
    os.remove("a/README.md")
    os.mkfifo("a/README.md")
    assert check(LINEAR).out == "recipe.yml: nothing is wrong or odd\n"


# --- cards ---


def test_licences_that_differ_are_a_warning(check: Command) -> None:
    card("b", "license: apache-2.0")
    warned(check(LINEAR), "'base' has mit, 'a' has mit, 'b' has apache-2.0; a merge must keep to all of them")


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "cc-by-nc-sa-4.0", "[mit, some-non-commercial]"])
def test_a_licence_against_commercial_use_among_others_is_named(check: Command, licence: str) -> None:
    card("b", f"license: {licence}")
    warned(check(LINEAR), "licences of the models differ", "; 'b' forbids commercial use")


def test_a_licence_against_derivatives_is_a_warning(check: Command) -> None:
    for name in ("base", "a", "b"):
        card(name, f"license: {'mit' if name == 'a' else 'other'}\nlicense_name: cc-by-nd-4.0")
    os.remove("a/README.md")
    os.remove("base/README.md")
    warned(check(LINEAR), "the licence of 'b', cc-by-nd-4.0, forbids derivatives")


@pytest.mark.parametrize("named", ["owner/Another", "[owner/another, else/other]"])
def test_a_card_that_names_another_base_is_a_warning(check: Command, named: str) -> None:
    card("b", f"license: mit\nbase_model: {named}")
    warned(check(TIES), "the card of 'b' names 'owner/", "the recipe 'base'")
    slerp = "merge_method: slerp\nbase_model: base\nmodels: [model: base, model: b]\nparameters: {t: 0.5}\n"
    assert check(slerp).out == "recipe.yml: nothing is wrong or odd\n", "which takes no deltas"


def test_what_the_base_was_made_of_does_not_matter(check: Command) -> None:
    card("base", "license: mit\nbase_model: owner/older")
    assert check(TIES).out == "recipe.yml: nothing is wrong or odd\n"


@pytest.mark.parametrize("how", ["config", "link"])
def test_a_base_may_have_another_name_here(check: Command, how: str) -> None:
    card("b", "license: mit\nbase_model: owner/tiny-1B")
    os.remove("a/README.md")
    if how == "config":
        config = json.loads(Path("base/config.json").read_text())
        write("base/config.json", {**config, "_name_or_path": "owner/Tiny-1B"})
    else:
        cached = Path("cache/models--owner--Tiny-1B/snapshots/0123")
        cached.parent.mkdir(parents=True)
        Path("base").rename(cached)
        Path("base").symlink_to(cached)
    assert check(TIES).out == "recipe.yml: nothing is wrong or odd\n"


# --- adapters ---

ADAPTED = "merge_method: linear\nmodels: [model: base, model: base+lora]\nparameters: {weight: 1}\n"


def adapter(trained_on: str | None) -> None:
    Path("lora").mkdir(exist_ok=True)
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w"]}
    write("lora/adapter_config.json", lora | {"base_model_name_or_path": trained_on})
    halves = {"A": np.ones((2, 8), np.float32), "B": np.ones((4, 2), np.float32)}
    tensors = {f"base_model.model.layers.0.w.lora_{half}.weight": values for half, values in halves.items()}
    save_file(tensors, "lora/adapter_model.safetensors")
    for name in ("base", "b"):
        save_file({"layers.0.w.weight": np.ones((4, 8), np.float32)}, f"{name}/model.safetensors")


@pytest.mark.parametrize("trained_on", [None, "", "owner/Base", "base", "/somewhere/else/base/"])
def test_an_adapter_of_the_base_that_it_names_is_fine(check: Command, trained_on: str | None) -> None:
    adapter(trained_on)
    assert check(ADAPTED).out == "recipe.yml: nothing is wrong or odd\n"


def test_an_adapter_that_names_another_base_is_a_warning(check: Command) -> None:
    adapter("owner/another-1B")
    warned(check(ADAPTED), "the adapter 'lora' was trained on 'owner/another-1B', and the recipe adds it to 'base'")


def test_the_licence_of_an_adapter_counts(check: Command) -> None:
    adapter("owner/base")
    card("lora", "license: cc-by-nc-4.0")
    warned(check(ADAPTED), "'base' has mit, 'lora' has cc-by-nc-4.0")


def test_an_adapter_that_cannot_be_opened_is_among_all_errors(check: Command) -> None:
    adapter("owner/base")
    os.remove("lora/adapter_model.safetensors")
    os.remove("a/model.safetensors")
    ended = check(ADAPTED.replace("model: base,", "model: base, model: a,"))
    assert ended.code == 1
    assert ended.out.count("error: a holds no model") == 1
    assert ended.out.count("error: lora holds no adapter") == 1


# --- merge ---


def test_merge_tells_of_what_is_odd_and_merges(capsys: pytest.CaptureFixture[str]) -> None:
    card("b", "license: apache-2.0")
    Path("recipe.yml").write_text(LINEAR)
    ended = command("merge", "recipe.yml", "out", capsys=capsys)
    assert ended.code == 0
    assert ended.err.startswith("warning: the licences of the models differ: ")
    assert ended.err.count("\n") == 1
    assert Path("out/model.safetensors").exists()
    assert command("merge", "recipe.yml", "quiet", "--quiet", capsys=capsys) == (0, "", "")


def test_models_of_documents_are_looked_through(check: Command) -> None:
    write("b/tokenizer.json", tokenizer("x", "y"))
    staged = (
        f"name: first\n{TIES}---\nmerge_method: linear\nmodels: [model: first, model: c]\nparameters: {{weight: 1}}\n"
    )
    warned(check(staged), "the tokenizers of 'base' and 'b' differ (3 and 2 tokens)")


def test_models_from_the_hub_count_where_they_were_fetched() -> None:
    card("b", "license: apache-2.0\nbase_model: owner/base")
    write("b/tokenizer.json", tokenizer("x", "y"))
    recipe = Recipe.parse(TIES.replace("base_model: base", "base_model: owner/base@main").replace("a\n", "owner/a\n"))
    fetched = {"owner/base@main": Path("base").rename("0123"), "owner/a": Path("a")}
    tokens, terms = oddities(recipe, fetched)
    assert tokens.startswith("the tokenizers of 'owner/base@main' and 'b' differ (3 and 2 tokens)")
    assert "'owner/base@main' has mit, 'owner/a' has mit, 'b' has apache-2.0" in terms
    assert list(oddities(recipe)) == [], "one model alone has nothing to differ from"
