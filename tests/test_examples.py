"""The recipes of mergekit's documentation, over tiny models: each runs unchanged, and its model loads and generates."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from test_mergekit import loaded, mergekit_python, ulps_apart
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from fastmerge import cli

# As deep as the models of the recipes, so that ranges of layers stay as they are there.
LLAMA_13B = ("orca/mini-v3-13b", "platypus/2-13b", "wizard/lm-13b-v1.2", "wizard/math-13b-v1.0", "llama/2-13b-fp16")
MISTRAL_7B = ("mistral/7b-v0.1", "mistral/7b-instruct-v0.2", "bio/7b", "hermes/2-pro-7b", "hermes/2.5-7b")
SMALL = ("model_a", "model_b")
CHATML, LLAMA_3 = "chatml_model", "path/to/llama3_model"
OWN_TOKENS = {
    CHATML: ["<|im_start|>", "<|im_end|>", "<|unused|>"],
    LLAMA_3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|original_token|>"],
}
TEMPLATES = {
    CHATML: "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}",
    LLAMA_3: "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>{{ m['content'] }}{% endfor %}",
}


class Example(NamedTuple):
    """A recipe, with what becomes of it: how many layers, and of what dtype."""

    text: str
    layers: int
    dtype: str


GRADIENT_SLERP = """merge_method: slerp
base_model: orca/mini-v3-13b
parameters:
  t:
  - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
  - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
  - value: 0.5
dtype: float16
"""
EXAMPLES = {
    # examples/
    "arcee_fusion": Example(
        "models: [model: model_a, model: model_b]\nmerge_method: arcee_fusion\nbase_model: model_a\ndtype: bfloat16\n",
        2,
        "bfloat16",
    ),
    "bio-merge": Example(
        """
models:
- {model: mistral/7b-instruct-v0.2, parameters: {density: 0.5, weight: 0.5}}
- {model: bio/7b, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: mistral/7b-v0.1
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
        32,
        "float16",
    ),
    "gradient-slerp": Example(
        """
slices:
- sources:
  - {model: orca/mini-v3-13b, layer_range: [0, 40]}
  - {model: platypus/2-13b, layer_range: [0, 40]}
"""
        + GRADIENT_SLERP,
        40,
        "float16",
    ),
    "gradient-slerp-of-models": Example(
        """
models: [model: orca/mini-v3-13b, model: platypus/2-13b]
"""
        + GRADIENT_SLERP,
        40,
        "float16",
    ),
    "linear": Example(
        """
models:
- {model: orca/mini-v3-13b, parameters: {weight: 1.0}}
- {model: wizard/lm-13b-v1.2, parameters: {weight: 0.3}}
- {model: platypus/2-13b, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
        40,
        "float16",
    ),
    "orcamini-platy-44layer": Example(
        """
slices:
- sources: [{model: orca/mini-v3-13b, layer_range: [0, 24]}]
- sources: [{model: platypus/2-13b, layer_range: [20, 40]}]
merge_method: passthrough
dtype: float16
""",
        44,
        "float16",
    ),
    "ties": Example(
        """
models:
- {model: orca/mini-v3-13b, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
- {model: platypus/2-13b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
- {model: wizard/math-13b-v1.0, parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}}
merge_method: ties
base_model: llama/2-13b-fp16
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
        40,
        "float16",
    ),
    # docs/merge_methods.md, which has single settings
    "breadcrumbs": Example(
        """
models: [{model: platypus/2-13b, parameters: {weight: 1, density: 0.9, gamma: 0.01}}]
merge_method: breadcrumbs
base_model: llama/2-13b-fp16
dtype: bfloat16
""",
        40,
        "bfloat16",
    ),
    "passthrough-scale": Example(
        """
models: [{model: model_a, parameters: {scale: [{"filter": "down_proj", "value": 0.5}, {value: 1}]}}]
merge_method: passthrough
dtype: bfloat16
""",
        2,
        "bfloat16",
    ),
    "nuslerp-of-deltas": Example(
        """
models: [{model: orca/mini-v3-13b, parameters: {weight: 0.6}}, {model: platypus/2-13b, parameters: {weight: 0.4}}]
merge_method: nuslerp
base_model: llama/2-13b-fp16
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
dtype: bfloat16
""",
        40,
        "bfloat16",
    ),
}

#: Of docs/multimerge.md.
STAGED = """
name: first-merge
merge_method: linear
models: [model: mistral/7b-v0.1, model: bio/7b]
parameters: {weight: 0.5}
---
name: second-merge
merge_method: slerp
base_model: first-merge
models: [model: hermes/2-pro-7b]
parameters: {t: 0.5}
---
merge_method: dare_ties
base_model: mistral/7b-v0.1
models:
- {model: second-merge, parameters: {density: 0.6, weight: 0.5}}
- {model: hermes/2.5-7b, parameters: {density: 0.8, weight: 0.5}}
"""
ALL_NAMED = """
name: first-merge
merge_method: task_arithmetic
base_model: mistral/7b-v0.1
models: [{model: bio/7b, parameters: {weight: 0.7}}]
---
name: second-merge
merge_method: slerp
base_model: first-merge
models: [model: hermes/2-pro-7b]
parameters: {t: 0.5}
---
name: third-merge
merge_method: linear
models: [model: second-merge, model: hermes/2.5-7b]
parameters: {weight: 0.5}
"""

# --- models ---


def tokenizer_of(name: str) -> transformers.PreTrainedTokenizerFast:
    """Bytes and a few merges, the same in all, and the tokens of its own."""
    words = "the model that merges models is the sum of the models that it merges"
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *OWN_TOKENS.get(name, [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=280, special_tokens=special[:2], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([words], trainer)
    tokenizer.add_special_tokens(special[2:])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if name in TEMPLATES:
        fast.chat_template = TEMPLATES[name]
    return fast


def write_family(place: Path, names: tuple[str, ...], kind: type[Any], layers: int) -> None:
    """Models of one family: the first at random, the others each a little way from it."""
    random = torch.Generator().manual_seed(len(names))
    base: dict[str, torch.Tensor] = {}
    for name in names:
        tokenizer = tokenizer_of(name)
        config = kind(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            dtype="float32",
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
        state = model.state_dict()
        base = base or {key: tensor.clone() for key, tensor in state.items()}
        for key, tensor in state.items():
            rows = min(len(tensor), len(base[key]))
            tensor[:rows] = base[key][:rows]
            tensor += 0.005 * torch.randn(tensor.shape, generator=random)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    write_family(place, LLAMA_13B, transformers.LlamaConfig, 40)
    write_family(place, MISTRAL_7B, transformers.MistralConfig, 32)
    write_family(place, (*SMALL, CHATML, LLAMA_3), transformers.LlamaConfig, 2)
    random = torch.Generator().manual_seed(0)
    (place / "raw").mkdir()
    for name in ("base", "one", "two"):
        tensors = {"head.weight": torch.randn(3, 5, generator=random), "scale": torch.randn(1, generator=random)}
        save_file(tensors, place / "raw" / f"{name}.safetensors", {"format": "pt"})
    return place


@pytest.fixture(autouse=True)
def _among_the_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names like those on the hub are folders here, and nothing else may be asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(models)


def fastmerge(*arguments: str | Path) -> None:
    """A command that goes well."""
    ended = CliRunner().invoke(cli.main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output


@pytest.fixture
def merge(tmp_path: Path) -> Callable[[str], Path]:
    """Merges a recipe by the words of mergekit-yaml."""

    def merge(text: str) -> Path:
        (tmp_path / "config.yml").write_text(text)
        fastmerge("yaml", tmp_path / "config.yml", tmp_path / "out", "--lazy-unpickle", "--allow-crimes", "--quiet")
        return tmp_path / "out"

    return merge


def generated(folder: Path, text: str = "the models that it merges") -> tuple[Any, Any]:
    """A model that loads without a word about its weights and generates, and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    words = tokenizer(text, return_tensors="pt", add_special_tokens=True)
    assert int(words["input_ids"].max()) < model.config.vocab_size
    with torch.inference_mode():
        assert model(**words).logits.isfinite().all()
        assert model.generate(**words, max_new_tokens=2, do_sample=False).shape[1] > words["input_ids"].shape[1]
    return model, tokenizer


# --- they run and load ---


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_its_model_generates(merge: Callable[[str], Path], name: str) -> None:
    text, layers, dtype = EXAMPLES[name]
    model, _ = generated(merge(text))
    assert model.config.num_hidden_layers == layers
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_layers_of_two_models_are_stacked_as_they_are(merge: Callable[[str], Path]) -> None:
    merged = loaded(merge(EXAMPLES["orcamini-platy-44layer"].text.replace("float16", "float32")))
    below, above = loaded(Path("orca/mini-v3-13b")), loaded(Path("platypus/2-13b"))
    part = "model.layers.{}.mlp.up_proj.weight"
    for layer in range(44):
        parent, number = (below, layer) if layer < 24 else (above, layer - 4)
        assert torch.equal(merged[part.format(layer)], parent[part.format(number)])


def test_both_ways_to_write_a_slerp_are_one(merge: Callable[[str], Path]) -> None:
    one, two = (loaded(merge(EXAMPLES[name].text)) for name in ("gradient-slerp", "gradient-slerp-of-models"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_nuslerp_with_the_weights_1_minus_t_and_t_is_slerp(merge: Callable[[str], Path]) -> None:
    weighted = "{model: model_a, parameters: {weight: 0.7}}, {model: model_b, parameters: {weight: 0.3}}"
    nuslerp = loaded(merge(f"merge_method: nuslerp\nmodels: [{weighted}]\ndtype: float32\n"))
    slerp = loaded(merge("merge_method: slerp\nbase_model: model_a\nmodels: [model: model_b]\nparameters: {t: 0.3}\n"))
    matrices = {key: tensor for key, tensor in slerp.items() if tensor.ndim == 2}  # norms are so near that it is linear
    assert len(matrices) == 16
    for key, tensor in matrices.items():
        torch.testing.assert_close(nuslerp[key], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))


# --- documents ---


def test_stages_run_and_each_model_generates(tmp_path: Path) -> None:
    (tmp_path / "staged.yml").write_text(STAGED)
    between, out = tmp_path / "intermediates", tmp_path / "final-merge"
    fastmerge("multi", tmp_path / "staged.yml", "--intermediate-dir", between, "--out-path", out, "--quiet")
    assert sorted(os.listdir(between)) == ["first-merge", "second-merge"]
    for folder in (between / "first-merge", between / "second-merge", out):
        assert generated(folder)[0].config.num_hidden_layers == 32


def test_stages_that_all_have_names_run_and_each_model_generates(tmp_path: Path) -> None:
    (tmp_path / "staged.yml").write_text(ALL_NAMED)
    between = tmp_path / "intermediates"
    fastmerge("multi", tmp_path / "staged.yml", "--intermediate-dir", between, "--quiet")
    assert sorted(os.listdir(between)) == ["first-merge", "second-merge", "third-merge"]
    for folder in between.iterdir():
        assert generated(folder)[0].config.num_hidden_layers == 32


# --- files of tensors, as mergekit-pytorch takes them ---


RAW = """
merge_method: ties
base_model: raw/base.safetensors
models:
- {model: raw/one.safetensors, parameters: {weight: 2, density: 0.5}}
- {model: raw/two.safetensors, parameters: {weight: 1}}
dtype: float32
"""


def test_files_that_are_no_models_are_merged(merge: Callable[[str], Path]) -> None:
    merged = merge(RAW)
    assert {"model.safetensors", "README.md", "fastmerge.json", "mergekit_config.yml"} == set(os.listdir(merged))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(merged / "model.safetensors").items()}
    assert shapes == {"head.weight": (3, 5), "scale": (1,)}


# --- tokenizers ---

MIXED = """
merge_method: linear
base_model: model_a
models:
- {model: model_a, parameters: {weight: 0.4}}
- {model: chatml_model, parameters: {weight: 0.2}}
- {model: path/to/llama3_model, parameters: {weight: 0.4}}
dtype: float32
"""
PER_TOKEN = """
tokenizer:
  source: union
  tokens:
    <|im_start|>:
      source: chatml_model
    <|eot_id|>:
      source: path/to/llama3_model
      force: true
    <|renamed_token|>:
      source: {kind: model_token, model: path/to/llama3_model, token: "<|original_token|>"}
    <|unused|>:
      source: {kind: zero}
      force: true
"""
BOTH_FORMATS = """
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: chatml_model}
    <|im_end|>: {source: chatml_model}
    <|start_header_id|>: {source: path/to/llama3_model, force: true}
    <|end_header_id|>: {source: path/to/llama3_model, force: true}
    <|eot_id|>: {source: path/to/llama3_model, force: true}
"""
VOCABULARIES = {
    "union": ("tokenizer: {source: union, pad_to_multiple_of: null}\n", {*OWN_TOKENS[CHATML], *OWN_TOKENS[LLAMA_3]}),
    "base": ("tokenizer: {source: base}\n", set()),
    "of-a-model": (f"tokenizer: {{source: {LLAMA_3}}}\n", {*OWN_TOKENS[LLAMA_3]}),
    "per-token": (PER_TOKEN, {*OWN_TOKENS[CHATML], *OWN_TOKENS[LLAMA_3], "<|renamed_token|>"}),
    "both-formats": (BOTH_FORMATS, {*OWN_TOKENS[CHATML], *OWN_TOKENS[LLAMA_3]}),
    "source-union": ("tokenizer_source: union\n", {*OWN_TOKENS[CHATML], *OWN_TOKENS[LLAMA_3]}),
    "source-base": ("tokenizer_source: base\n", set()),
    "source-of-a-model": (f"tokenizer_source: {CHATML}\n", {*OWN_TOKENS[CHATML]}),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_an_example_with_a_tokenizer_runs_and_its_model_generates(merge: Callable[[str], Path], name: str) -> None:
    setting, own = VOCABULARIES[name]
    model, tokenizer = generated(merge(MIXED + setting), "".join(["the models", *sorted(own)]))
    plain = tokenizer_of("model_a").get_vocab()
    assert tokenizer.get_vocab().keys() == plain.keys() | own
    assert {token: tokenizer.get_vocab()[token] for token in plain} == plain
    assert model.config.vocab_size == len(tokenizer) == len(model.get_input_embeddings().weight)


def test_tokens_have_the_embeddings_that_the_recipe_gives_them(merge: Callable[[str], Path]) -> None:
    merged = merge(MIXED + PER_TOKEN)
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(folder) for folder in (merged, LLAMA_3))
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, parent = loaded(merged)[key], loaded(Path(LLAMA_3))[key]
        for token, source in (("<|eot_id|>", "<|eot_id|>"), ("<|renamed_token|>", "<|original_token|>")):
            row, expected = (
                rows[ours.convert_tokens_to_ids(token)],
                parent[theirs.convert_tokens_to_ids(source)],
            )
            torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)
        assert (rows[ours.convert_tokens_to_ids("<|unused|>")] == 0).all()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("chat_template: auto\n", TEMPLATES[CHATML]),
        ("chat_template: chatml\n", "<|im_start|>"),
        ('chat_template: "{% for m in messages %}[{{ m.content }}]{% endfor %}"\n', "[{{ m.content }}]"),
    ],
    ids=["auto", "built-in", "jinja"],
)
def test_an_example_with_a_chat_template_has_it(merge: Callable[[str], Path], setting: str, expected: str) -> None:
    two = "models: [{model: model_a, parameters: {weight: 1}}, {model: chatml_model, parameters: {weight: 1}}]\n"
    _, tokenizer = generated(merge(f"merge_method: linear\n{two}tokenizer_source: union\n{setting}"))
    assert expected in tokenizer.chat_template
    assert "hello" in tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)


# --- the same numbers as mergekit ---

#: One process for many merges: importing mergekit takes most of the time of one.
DRIVER = """
import json, sys
from importlib.metadata import entry_points
for command, *arguments in json.loads(sys.argv[1]):
    (found,) = entry_points(group="console_scripts", name=command)
    found.load().main([*arguments, "--clone-tensors", "--no-write-model-card", "--quiet"], standalone_mode=False)
"""
IN_FLOAT32 = {
    name: EXAMPLES[name].text.replace(EXAMPLES[name].dtype, "float32")
    for name in ("bio-merge", "gradient-slerp", "orcamini-platy-44layer", "ties", "passthrough-scale")
}
WITH_TOKENIZER = {name: MIXED + setting for name, (setting, _) in VOCABULARIES.items()}


@pytest.fixture(scope="module")
def theirs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what mergekit makes of the recipes, each by its name."""
    python, place = mergekit_python(), tmp_path_factory.mktemp("theirs")
    commands = []
    for name, text in (IN_FLOAT32 | WITH_TOKENIZER | {"staged": ALL_NAMED, "raw": RAW}).items():
        (place / f"{name}.yml").write_text(text)
        command = {"staged": "mergekit-multi", "raw": "mergekit-pytorch"}.get(name, "mergekit-yaml")
        out = ["-I"] * (name == "staged")
        commands.append([command, f"{place}/{name}.yml", *out, f"{place}/{name}"])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    arguments = [python, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(arguments, cwd=models, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return place


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    """Within 4 ulp, or 1e-6 of a tensor's largest where terms cancel."""
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (expected.dtype, expected.shape), key
        beyond = (ours[key] - expected).abs()[ulps_apart(ours[key], expected) > 4]
        assert (beyond <= 1e-6 * float(expected.abs().max())).all(), key


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_an_example_gives_the_numbers_of_mergekit(merge: Callable[[str], Path], theirs: Path, name: str) -> None:
    assert_same(loaded(merge(IN_FLOAT32[name])), loaded(theirs / name))


def test_files_that_are_no_models_give_the_numbers_of_mergekit(merge: Callable[[str], Path], theirs: Path) -> None:
    assert_same(loaded(merge(RAW)), loaded(theirs / "raw"))


def test_stages_give_the_numbers_of_mergekit(theirs: Path, tmp_path: Path) -> None:
    fastmerge("multi", theirs / "staged.yml", "-I", tmp_path)
    for name in ("first-merge", "second-merge", "third-merge"):
        assert_same(loaded(tmp_path / name), loaded(theirs / "staged" / name))


@pytest.mark.parametrize("name", WITH_TOKENIZER)
def test_a_vocabulary_gives_the_numbers_of_mergekit(merge: Callable[[str], Path], theirs: Path, name: str) -> None:
    folders = merge(WITH_TOKENIZER[name]), theirs / name
    ids = [transformers.AutoTokenizer.from_pretrained(folder).get_vocab() for folder in folders]
    assert ids[0].keys() == ids[1].keys()
    found, expected = map(loaded, folders)
    for tensors, vocabulary in ((found, ids[0]), (expected, ids[1])):  # which may number new tokens in another order
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][[vocabulary[token] for token in sorted(vocabulary)]]
    assert_same(found, expected)
