"""Whole merges of models with different vocabularies: each token's row, the tokenizer written, mergekit beside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_mergekit import CONFIG, DRIVER, mergekit_python, shapes, ulps_apart
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import fastmerge
from fastmerge import MismatchError
from fastmerge.cli import main
from fastmerge.planner import Job, plan
from fastmerge.recipe import Recipe

HIDDEN = 32
COMMON = ["<s>", "</s>", "<unk>", *(f"w{n}" for n in range(40))]
#: Each vocabulary in the order of its ids; `base` has rows to spare.
WORDS = {
    "base": [*COMMON, "only-base"],
    "a": [*COMMON, "only-a", "both"],
    "b": [*COMMON[:3], *reversed(COMMON[3:]), "both", "only-b"],
}
ADDED = {"base": [], "a": ["<|im_start|>", "<|shared|>"], "b": ["<|shared|>", "<|b|>"]}
ROWS = {"base": 64, "a": 47, "b": 48}
HEADS = ("model.embed_tokens.weight", "lm_head.weight")

PAIR = "base_model: base\nmodels: [{model: a, parameters: {weight: 0.6}}, {model: b, parameters: {weight: 0.7}}]\n"
TASK = f"merge_method: task_arithmetic\n{PAIR}"
TOKENS = """
tokenizer:
  source: union
  tokens:
    "<|im_start|>": {source: {kind: model_token, model: b, token: w3}}
    "<|shared|>": {source: a, force: true}
    only-b: {source: {kind: zero}}
"""
#: What a recipe says of the tokenizer, that mergekit takes as well.
SETTINGS = {
    "union": "tokenizer_source: union\n",
    "base": "tokenizer_source: base\n",
    "a-model": "tokenizer_source: b\n",
    "tokens": TOKENS,
    "padded": "tokenizer: {source: union, pad_to_multiple_of: 32}\n",
}
METHODS = {
    "linear": f"merge_method: linear\nparameters: {{weight: 1}}\n{PAIR}",
    "task_arithmetic": TASK,
    "ties": f"merge_method: ties\nparameters: {{density: 0.5}}\n{PAIR}",
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b]\nparameters: {t: 0.3}\n",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a and b, with their tokenizers."""
    folder = tmp_path_factory.mktemp("vocabularies")
    rng = np.random.default_rng(3)
    common = {name: rng.standard_normal(shape) * 0.02 for name, shape in shapes().items() if name not in HEADS}
    for model, words in WORDS.items():
        tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ADDED[model]])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + f"{{# {model == 'base'} #}}"
        fast.save_pretrained(folder / model)
        values = {name: each + rng.standard_normal(each.shape) * 0.003 for name, each in common.items()}
        values |= {head: rng.standard_normal((ROWS[model], HIDDEN)) * 0.02 for head in HEADS}
        tensors = {name: torch.tensor(each, dtype=torch.float32) for name, each in values.items()}
        save_file(tensors, folder / model / "model.safetensors", {"format": "pt"})
        config = {**CONFIG, "vocab_size": ROWS[model], "dtype": "float32", "eos_token_id": 1, "bos_token_id": 0}
        (folder / model / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(autouse=True)
def _in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def merged(text: str, out: Path, **options: object) -> dict[str, torch.Tensor]:
    fastmerge.merge(Recipe.parse(text), out, **options)  # type: ignore[arg-type]
    return tensors_of(out)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def tokens_of(folder: Path) -> dict[str, int]:
    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def held(model: str, head: str) -> torch.Tensor:
    return tensors_of(Path(model))[head]


def row_of(model: str, token: str, head: str) -> torch.Tensor | None:
    ids = {word: n for n, word in enumerate([*WORDS[model], *ADDED[model]])}
    return held(model, head)[ids[token]] if token in ids else None


def expected(token: str, head: str, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A token's row in each model, as the rules have it for a union."""
    rows = {model: row for model in WORDS if (row := row_of(model, token, head)) is not None}
    if token in given:
        other = given[token]
    elif len(rows) == 1:
        (other,) = rows.values()
    else:
        other = rows.get("base", sum(rows.values(), torch.zeros(HIDDEN)) / max(1, len(rows)))
    return {model: rows.get(model, other) for model in WORDS}


@pytest.mark.parametrize("head", HEADS)
def test_each_token_has_the_row_that_the_rules_give_it(tmp_path: Path, head: str) -> None:
    found = merged(TASK + TOKENS, tmp_path / "out")[head]
    ids = tokens_of(tmp_path / "out")
    words = {word for model in WORDS for word in (*WORDS[model], *ADDED[model])}
    assert ids.keys() == words
    assert sorted(ids.values()) == list(range(len(words))) == list(range(len(found)))
    (w3, shared) = (row_of(model, token, head) for model, token in (("b", "w3"), ("a", "<|shared|>")))
    given = {"<|im_start|>": w3, "<|shared|>": shared, "only-b": torch.zeros(HIDDEN)}
    for token, at in ids.items():
        base, a, b = expected(token, head, given).values()  # type: ignore[arg-type]
        if token == "<|shared|>":
            base = a = b = shared
        wanted = base.double() + 0.6 * (a.double() - base.double()) + 0.7 * (b.double() - base.double())
        torch.testing.assert_close(found[at].double(), wanted, rtol=0, atol=2e-8, msg=token)


def test_the_output_loads_and_speaks_both(tmp_path: Path) -> None:
    merged(f"{TASK}tokenizer_source: union\n", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    base = AutoTokenizer.from_pretrained("base")
    assert tokenizer("w1 w7 only-base").input_ids == base("w1 w7 only-base").input_ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("both only-b <|b|>").input_ids) == ["both", "only-b", "<|b|>"]
    assert tokenizer.eos_token_id == 1
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.vocab_size == len(tokenizer)
    assert model(torch.tensor([tokenizer("w1 <|b|> both").input_ids])).logits.isfinite().all()


def test_tied_embeddings_stay_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in WORDS:
        shutil.copytree(model, tmp_path / model)
        tensors = {name: tensor for name, tensor in tensors_of(Path(model)).items() if name != "lm_head.weight"}
        save_file(tensors, tmp_path / model / "model.safetensors", {"format": "pt"})
        config = json.loads(Path(model, "config.json").read_text())
        (tmp_path / model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    monkeypatch.chdir(tmp_path)
    found = merged(f"{TASK}tokenizer_source: union\n", tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.lm_head.weight, found["model.embed_tokens.weight"])


def test_padding_rows_are_the_mean_of_the_others(tmp_path: Path) -> None:
    found = merged(f"{METHODS['linear']}{SETTINGS['padded']}", tmp_path / "out")
    for head in HEADS:
        assert len(found[head]) == 64
        count = len(tokens_of(tmp_path / "out"))
        mean = found[head][:count].double().mean(0)
        assert count < 64
        torch.testing.assert_close(found[head][count:].double(), mean.expand(64 - count, -1), rtol=0, atol=1e-8)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 64


@pytest.mark.parametrize("source", ["union", "base", "a"])
def test_where_vocabularies_are_the_same_nothing_is_gathered(tmp_path: Path, source: str) -> None:
    text = (
        "merge_method: ties\nbase_model: a\nmodels: [model: a, model: again]\nparameters: {weight: 1, density: 0.5}\n"
    )
    if not (again := Path("again")).exists():
        shutil.copytree("a", again)
        save_file({name: tensor * 1.01 for name, tensor in tensors_of(Path("a")).items()}, again / "model.safetensors")
    (stage,) = plan(Recipe.parse(f"{text}tokenizer_source: {source}\n")).stages
    assert not any(job.gather for job in stage.jobs)
    plain, with_source = (
        merged(text, tmp_path / "plain"),
        merged(f"{text}tokenizer_source: {source}\n", tmp_path / "out"),
    )
    assert all(torch.equal(plain[name], with_source[name]) for name in plain)
    assert tokens_of(tmp_path / "out") == tokens_of(Path("a"))


def test_layers_are_stacked_with_a_vocabulary_of_all(tmp_path: Path) -> None:
    """The embeddings are of the first slice's model; what only another knows is there all the same."""
    text = """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
tokenizer_source: union
"""
    found = merged(text, tmp_path / "out")
    ids = tokens_of(tmp_path / "out")
    embedding, head = HEADS
    assert torch.equal(found[embedding][ids["w5"]], row_of("a", "w5", embedding))
    assert torch.equal(found[embedding][ids["only-b"]], row_of("b", "only-b", embedding))
    assert torch.equal(found[head][ids["w5"]], row_of("b", "w5", head))
    assert torch.equal(found[head][ids["only-a"]], row_of("a", "only-a", head))


def test_a_stage_hands_its_vocabulary_on(tmp_path: Path) -> None:
    first = "name: first\nmerge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 1}\n"
    second = (
        "merge_method: linear\nmodels: [model: first, model: base]\nparameters: {weight: 1}\ntokenizer_source: union\n"
    )
    found = merged(f"{first}tokenizer_source: union\n---\n{second}", tmp_path / "out")
    ids = tokens_of(tmp_path / "out")
    assert ids.keys() == {word for model in WORDS for word in (*WORDS[model], *ADDED[model])}
    for head in HEADS:
        both = sum(row_of(model, "both", head).double() for model in "ab") / 2  # type: ignore[union-attr]
        torch.testing.assert_close(found[head][ids["both"]].double(), both, rtol=0, atol=1e-8)


def test_settings_that_vary_share_the_gathered_rows(tmp_path: Path) -> None:
    text = f"{TASK}parameters: {{lambda: 1}}\ntokenizer_source: union\n"
    fastmerge.merge(Recipe.parse(text), tmp_path / "both", vary={"lambda": [0.5, 1]})
    for value in ("0.5", "1"):
        alone = merged(text.replace("lambda: 1", f"lambda: {value}"), tmp_path / value)
        varied = load_file(tmp_path / "both" / f"lambda={value}" / "model.safetensors")
        assert all(torch.equal(alone[name], varied[name]) for name in alone)


def test_ids_of_special_tokens_follow_the_tokenizer(tmp_path: Path) -> None:
    """With another model's tokenizer the config says its ids."""
    words = ["</s>", "<s>", "<unk>", *COMMON[3:]]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    other = tmp_path / "other"
    fast.save_pretrained(other)
    tensors = {
        name: tensor[: len(words)] if name in HEADS else tensor for name, tensor in tensors_of(Path("a")).items()
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, other / "model.safetensors")
    (other / "config.json").write_text(
        json.dumps({**CONFIG, "vocab_size": len(words), "eos_token_id": 0, "bos_token_id": 1})
    )
    text = f"merge_method: linear\nmodels: [model: base, model: {other}]\nparameters: {{weight: 1}}\n"
    merged(f"{text}tokenizer_source: {other}\n", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (len(words), 0, 1)


def test_without_a_setting_vocabularies_that_differ_are_refused_with_the_remedy() -> None:
    with pytest.raises(MismatchError, match="tokenizer_source"):
        plan(Recipe.parse(TASK))


def test_the_plan_says_what_is_gathered(tmp_path: Path) -> None:
    jobs: dict[str, Job] = {
        job.name: job for job in plan(Recipe.parse(f"{TASK}tokenizer_source: union\n")).stages[0].jobs
    }
    assert {name for name, job in jobs.items() if job.gather} == set(HEADS)
    assert {jobs[head].shape for head in HEADS} == {(50, HIDDEN)}
    (tmp_path / "recipe.yml").write_text(f"{TASK}tokenizer_source: union\n")
    said = CliRunner().invoke(main, ["plan", str(tmp_path / "recipe.yml")], catch_exceptions=False).output
    assert said.count("once, gathered") == len(HEADS)


@pytest.mark.parametrize("template", ["auto", "chatml", "{{ messages[0].content }} and then some"])
def test_the_chat_template_is_the_one_that_the_recipe_names(tmp_path: Path, template: str) -> None:
    merged(f"{TASK}tokenizer_source: union\nchat_template: '{template}'\n", tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    if template == "auto":
        assert found == AutoTokenizer.from_pretrained("a").chat_template  # b has the same, base another
    elif template == "chatml":
        assert "<|im_start|>" in found
    else:
        assert found == template


# --- mergekit ---


@pytest.fixture(scope="module")
def theirs(place: Path) -> Path:
    """Each method with each setting through mergekit, in one process."""
    python = mergekit_python()
    driver = DRIVER.replace('"--no-copy-tokenizer", ', "")
    arguments = []
    for method, text in METHODS.items():
        for name, setting in SETTINGS.items():
            recipe = place / f"{method}-{name}.yml"
            recipe.write_text(f"{text}{setting}dtype: float32\n")
            arguments += [recipe.name, f"theirs/{method}-{name}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [python, "-c", driver, *arguments], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place / "theirs"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_each_token_has_the_row_that_mergekit_gives_it(theirs: Path, tmp_path: Path, method: str, setting: str) -> None:
    found = merged(f"{METHODS[method]}{SETTINGS[setting]}dtype: float32\n", tmp_path / "out")
    beside = load_file(theirs / f"{method}-{setting}" / "model.safetensors")
    ours, those = tokens_of(tmp_path / "out"), tokens_of(theirs / f"{method}-{setting}")
    assert ours.keys() == those.keys()
    at = [ours[token] for token in those]
    for name, wanted in beside.items():
        rows, theirs_rows = (found[name][at], wanted[list(those.values())]) if name in HEADS else (found[name], wanted)
        far = ulps_apart(rows, theirs_rows) > 4
        assert (rows - theirs_rows).abs()[far].tolist() == [] or float(
            (rows - theirs_rows).abs()[far].max()
        ) <= 1e-6 * float(wanted.abs().max())
