"""Architectures: tiny models of many families, made by transformers, merged, sliced, reloaded and run."""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_mergekit import DRIVER, mergekit_python, ulps_apart

import fastmerge
from fastmerge.recipe import Recipe

VOCABULARY, HIDDEN, LAYERS = 64, 16, 3
IMAGE = 63  # the token that an image stands behind
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 32,
}
GROUPED = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
SIGHT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 8,
    "patch_size": 4,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    **{
        f"{part}_{key}": value
        for part in ("encoder", "decoder")
        for key, value in (("attention_heads", 2), ("ffn_dim", 24))
    },
    "encoder_layers": LAYERS,
    "decoder_layers": 2,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {
    **TEXT,
    **EXPERTS,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}

Inputs = Callable[[], dict[str, torch.Tensor]]


def tokens() -> torch.Tensor:
    return torch.tensor([[5, 9, 17, 33, 2, 40]])


def text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens()}


def two_texts() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :4]}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)}


def image_and_text() -> dict[str, torch.Tensor]:
    return {**text(), **image()}


def image_in_text() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, *[IMAGE] * 4, 33, 2]]), **image()}


def patches_in_text() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.tensor([[5, 60, IMAGE, 61, 33, 2]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 0, 0, 0]]),
        "pixel_values": torch.linspace(-1, 1, 4 * 96).reshape(4, 96),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }


def sound() -> dict[str, torch.Tensor]:
    return {"input_features": torch.linspace(-1, 1, 8 * 32).reshape(1, 8, 32), "decoder_input_ids": tokens()[:, :4]}


@dataclass(frozen=True)
class Family:
    """A class of transformers, the config of a tiny one, and what it is run on. `stacks` are its stacks of layers by
    what its files call them, with the place where its config counts them; `lists` are keys with an entry per layer."""

    architecture: str
    config: Callable[[], Any]
    stacks: Mapping[str, str]
    inputs: Inputs = text
    tied: bool = False
    lists: tuple[str, ...] = ()


def of(name: str, /, **settings: Any) -> Callable[[], Any]:
    """The config of a model type, made when it is asked for."""
    return lambda: getattr(transformers, f"{name}Config")(**settings)


DECODER = {"model.layers": "num_hidden_layers"}
T5_STACKS = {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"}
BERT = {"bert.encoder.layer": "num_hidden_layers"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", of("Llama", **GROUPED), DECODER),
    "mistral": Family("MistralForCausalLM", of("Mistral", **GROUPED), DECODER),
    "qwen2-tied": Family(
        "Qwen2ForCausalLM",
        of("Qwen2", **TEXT, num_key_value_heads=1, tie_word_embeddings=True),
        DECODER,
        tied=True,
        lists=("layer_types",),
    ),
    "qwen3-tied": Family(
        "Qwen3ForCausalLM", of("Qwen3", **GROUPED, tie_word_embeddings=True), DECODER, tied=True, lists=("layer_types",)
    ),
    "gemma": Family("GemmaForCausalLM", of("Gemma", **GROUPED), DECODER, tied=True),
    "gemma2": Family(
        "Gemma2ForCausalLM", of("Gemma2", **GROUPED, sliding_window=8), DECODER, tied=True, lists=("layer_types",)
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        of(
            "Gemma3Text",
            **GROUPED,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        DECODER,
        tied=True,
        lists=("layer_types",),
    ),
    "phi": Family("PhiForCausalLM", of("Phi", **TEXT), DECODER),
    "phi3": Family("Phi3ForCausalLM", of("Phi3", **TEXT, num_key_value_heads=1, pad_token_id=0), DECODER),
    "gpt2": Family(
        "GPT2LMHeadModel",
        of("GPT2", vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=2, n_positions=32),
        {"transformer.h": "n_layer"},
        tied=True,
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", of("GPTNeoX", **TEXT), {"gpt_neox.layers": "num_hidden_layers"}),
    "opt": Family(
        "OPTForCausalLM",
        of(
            "OPT",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            ffn_dim=24,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=HIDDEN,
        ),
        {"model.decoder.layers": "num_hidden_layers"},
        tied=True,
    ),
    "bloom": Family(
        "BloomForCausalLM",
        of("Bloom", vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=2),
        {"transformer.h": "n_layer"},
        tied=True,
    ),
    "falcon": Family(
        "FalconForCausalLM",
        of("Falcon", vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2),
        {"transformer.h": "num_hidden_layers"},
        tied=True,
    ),
    "cohere": Family("CohereForCausalLM", of("Cohere", **TEXT, num_key_value_heads=1), DECODER, tied=True),
    "starcoder2": Family("Starcoder2ForCausalLM", of("Starcoder2", **TEXT, num_key_value_heads=1), DECODER, tied=True),
    "mamba": Family(
        "MambaForCausalLM",
        of("Mamba", vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=4, num_hidden_layers=LAYERS),
        {"backbone.layers": "num_hidden_layers"},
        tied=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM", of("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2), DECODER
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        of(
            "Qwen2Moe",
            **TEXT,
            **EXPERTS,
            num_key_value_heads=1,
            num_experts=4,
            shared_expert_intermediate_size=8,
            mlp_only_layers=[1],
        ),
        DECODER,
        lists=("layer_types",),
    ),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", of("Qwen3Moe", **GROUPED, **EXPERTS, num_experts=4), DECODER),
    "deepseek_v2": Family("DeepseekV2ForCausalLM", of("DeepseekV2", **DEEPSEEK), DECODER),
    "deepseek_v3": Family("DeepseekV3ForCausalLM", of("DeepseekV3", **DEEPSEEK), DECODER),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        of("GptOss", **GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
        DECODER,
        lists=("layer_types",),
    ),
    "bert": Family("BertModel", of("Bert", **TEXT), {"encoder.layer": "num_hidden_layers"}),
    "bert-mlm": Family("BertForMaskedLM", of("Bert", **TEXT), BERT, tied=True),
    "bert-classifier": Family("BertForSequenceClassification", of("Bert", **TEXT), BERT),
    "roberta-mlm": Family(
        "RobertaForMaskedLM", of("Roberta", **TEXT), {"roberta.encoder.layer": "num_hidden_layers"}, tied=True
    ),
    "roberta-classifier": Family(
        "RobertaForSequenceClassification", of("Roberta", **TEXT), {"roberta.encoder.layer": "num_hidden_layers"}
    ),
    "distilbert-mlm": Family(
        "DistilBertForMaskedLM",
        of(
            "DistilBert",
            vocab_size=VOCABULARY,
            dim=HIDDEN,
            hidden_dim=24,
            n_layers=LAYERS,
            n_heads=2,
            max_position_embeddings=32,
        ),
        {"distilbert.transformer.layer": "n_layers"},
        tied=True,
    ),
    "t5": Family("T5ForConditionalGeneration", of("T5", **T5), T5_STACKS, two_texts, tied=True),
    "t5-untied": Family(
        "T5ForConditionalGeneration",
        of("T5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        T5_STACKS,
        two_texts,
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        of("Bart", **SEQ2SEQ, max_position_embeddings=32),
        {"model.encoder.layers": "encoder_layers", "model.decoder.layers": "decoder_layers"},
        two_texts,
        tied=True,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        of(
            "Whisper",
            **SEQ2SEQ,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        ),
        {"model.encoder.layers": "encoder_layers", "model.decoder.layers": "decoder_layers"},
        sound,
        tied=True,
    ),
    "vit": Family(
        "ViTForImageClassification",
        of("ViT", **{**SIGHT, "num_hidden_layers": LAYERS}),
        {"vit.encoder.layer": "num_hidden_layers"},
        image,
    ),
    "clip": Family(
        "CLIPModel",
        of("CLIP", text_config={**TEXT, "eos_token_id": 2}, vision_config=SIGHT, projection_dim=HIDDEN),
        {
            "text_model.encoder.layers": "text_config.num_hidden_layers",
            "vision_model.encoder.layers": "vision_config.num_hidden_layers",
        },
        image_and_text,
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**SIGHT),
            text_config=transformers.LlamaConfig(**GROUPED),
            image_token_index=IMAGE,
        ),
        {
            "language_model.model.layers": "text_config.num_hidden_layers",
            "vision_tower.encoder.layers": "vision_config.num_hidden_layers",
        },
        image_in_text,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        of(
            "Qwen2VL",
            text_config={
                **TEXT,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            },
            vision_config={
                "depth": 3,
                "embed_dim": 16,
                "hidden_size": HIDDEN,
                "num_heads": 2,
                "patch_size": 4,
                "mlp_ratio": 2,
            },
            image_token_id=IMAGE,
            video_token_id=62,
            vision_start_token_id=60,
            vision_end_token_id=61,
        ),
        {"model.layers": "text_config.num_hidden_layers", "visual.blocks": "vision_config.depth"},
        patches_in_text,
        lists=("text_config.layer_types",),
    ),
    "gemma3-vision": Family(
        "Gemma3ForConditionalGeneration",
        of(
            "Gemma3",
            text_config={**GROUPED, "sliding_window": 8},
            vision_config=SIGHT,
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
        ),
        {
            "language_model.model.layers": "text_config.num_hidden_layers",
            "vision_tower.encoder.layers": "vision_config.num_hidden_layers",
        },
        image_in_text,
        tied=True,
        lists=("text_config.layer_types",),
    ),
}
SLICED = {  # one stack that is sliced, of each family that has any
    f"{name}-{stack.rpartition('.')[0]}" if len(family.stacks) > 1 else name: (name, stack)
    for name, family in FAMILIES.items()
    for stack in family.stacks
}


# --- models ---


class Made(NamedTuple):
    """The folder with a family's base and two fine-tunes, a and b; and what the base said before it was saved."""

    folder: Path
    outputs: torch.Tensor


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Made]]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("families")
    threads = torch.get_num_threads()

    @cache
    def make(name: str) -> Made:
        family = FAMILIES[name]
        if not hasattr(transformers, family.architecture):
            pytest.skip(f"transformers {transformers.__version__} has no {family.architecture}")
        torch.manual_seed(len(name))
        model = getattr(transformers, family.architecture)(family.config())
        base = {key: value.detach().clone() for key, value in model.named_parameters()}
        said = outputs(family, model)
        for each, scale in (("base", 0.0), ("a", 0.0015), ("b", 0.0015)):
            with torch.no_grad():
                for key, value in model.named_parameters():
                    value.copy_(base[key] + scale * torch.randn_like(value))
            model.save_pretrained(root / name / each)
        return Made(root / name, said)

    torch.set_num_threads(1)  # tensors are tiny
    yield make
    torch.set_num_threads(threads)


def merged(recipe: str, models: Path, out: Path) -> dict[str, torch.Tensor]:
    """What a recipe gives, without a warning. Its models are named by their folder in `models`."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastmerge.FastmergeWarning)
        fastmerge.merge(Recipe.parse(recipe, folder=models), out)
    return load_file(out / "model.safetensors")


def reloaded(family: Family, folder: Path) -> Any:
    """The model that transformers makes of a folder, which must hold its tensors and no others."""
    kind = getattr(transformers, family.architecture)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert {key: names for key, names in info.items() if names} == {}
    if family.tied:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model


def outputs(family: Family, model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(**family.inputs())
    return found[0] if found.get("logits") is None else found["logits"]


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def at(section: Any, path: str) -> Any:
    """What is at a dotted path of a config."""
    for key in path.split("."):
        section = section[key]
    return section


def tensors(models: Path, *names: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(models / name / "model.safetensors") for name in names]


# --- whole ---

TIES = """
merge_method: ties
base_model: base
models: [model: a, model: b]
parameters: {weight: %s, density: 0.5}
"""
RECIPES = {
    "ties": TIES % 0.7,
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b]\nparameters: {t: [0, 0.4, 1]}\n",
    "dare_ties": TIES.replace("ties\n", "dare_ties\n", 1) % 0.7,
}


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_loads_and_runs(made: Callable[[str], Made], tmp_path: Path, name: str, method: str) -> None:
    models = made(name).folder
    found = merged(RECIPES[method], models, tmp_path / "out")
    (base,) = tensors(models, "base")
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, value.dtype) for key, value in base.items()
    }
    assert config(tmp_path / "out") == config(models / ("a" if method == "slerp" else "base"))
    assert outputs(FAMILIES[name], reloaded(FAMILIES[name], tmp_path / "out")).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_without_weight_the_model_is_the_base(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    (models, expected), family = made(name), FAMILIES[name]
    found = merged(TIES % 0, models, tmp_path / "out")
    (base,) = tensors(models, "base")
    assert all(torch.equal(value, base[key]) for key, value in found.items())
    said = outputs(family, reloaded(family, tmp_path / "out"))
    assert torch.allclose(said, expected, rtol=1e-5, atol=1e-7)  # sums go by where the weights lie in memory


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gradient_runs_over_each_stack_of_layers(made: Callable[[str], Made], tmp_path: Path, name: str) -> None:
    models, family = made(name).folder, FAMILIES[name]
    recipe = """
merge_method: linear
models:
- {model: a, parameters: {weight: [0, 1]}}
- {model: b, parameters: {weight: [1, 0]}}
"""
    found = merged(recipe, models, tmp_path / "out")
    a, b = tensors(models, "a", "b")
    for key, value in found.items():
        t = 0.0
        for stack, count in family.stacks.items():
            if key.startswith(f"{stack}."):
                layer = int(key[len(stack) + 1 :].split(".")[0])
                t = layer / (at(config(models / "base"), count) - 1)
        if key.startswith("visual.merger.mlp."):  # numbered parts, of which the activation between has no tensors
            t = int(key.split(".")[3]) / 2
        expected = t * a[key].double() + (1 - t) * b[key].double()
        assert (value - expected).abs().max() <= 2**-23 * expected.abs().max(), key


# --- sliced ---


def sliced(name: str, stack: str, slices: str) -> str:
    """A passthrough recipe with slices of a stack; other towers are taken from a."""
    if len(FAMILIES[name].stacks) == 1:
        return f"merge_method: passthrough\nslices: {slices}\n"
    rest = "default: {models: [model: a]}"
    return f"merge_method: passthrough\nmodules:\n  {stack.rpartition('.')[0]}: {{slices: {slices}}}\n  {rest}\n"


def check_slices(name: str, stack: str, models: Path, out: Path, kept: list[tuple[str, int]]) -> None:
    """That each layer has the bytes of its source and the config its count, and that the model loads and runs."""
    family = FAMILIES[name]
    found = load_file(out / "model.safetensors")
    sources = dict(zip("ab", tensors(models, "a", "b"), strict=True))
    for place, (model, layer) in enumerate(kept):
        inside = [key for key in found if key.startswith(f"{stack}.{place}.")]
        assert inside
        for key in inside:
            source = key.replace(f"{stack}.{place}.", f"{stack}.{layer}.", 1)
            if source not in sources[model] and "relative_attention_bias" in key:  # T5's, in its first layer for all
                source = key
            assert torch.equal(found[key], sources[model][source]), key
    donor, result = config(models / "a"), config(out)
    for other, count in family.stacks.items():
        assert at(result, count) == (len(kept) if other == stack else at(donor, count))
    for key in family.lists:
        if key.rpartition(".")[0] == family.stacks[stack].rpartition(".")[0]:
            assert at(result, key) == [at(donor, key)[layer] for _, layer in kept]
    assert outputs(family, reloaded(family, out)).isfinite().all()


@pytest.mark.parametrize(("name", "stack"), SLICED.values(), ids=SLICED)
def test_layers_are_stacked(made: Callable[[str], Made], tmp_path: Path, name: str, stack: str) -> None:
    models = made(name).folder
    depth = at(config(models / "a"), FAMILIES[name].stacks[stack])
    slices = f"[sources: [{{model: a, layer_range: [0, {depth}]}}], sources: [{{model: b, layer_range: [1, {depth}]}}]]"
    merged(sliced(name, stack, slices), models, tmp_path / "out")
    kept = [*(("a", layer) for layer in range(depth)), *(("b", layer) for layer in range(1, depth))]
    check_slices(name, stack, models, tmp_path / "out", kept)


@pytest.mark.parametrize(("name", "stack"), SLICED.values(), ids=SLICED)
def test_the_first_layer_is_left_out(made: Callable[[str], Made], tmp_path: Path, name: str, stack: str) -> None:
    models = made(name).folder
    depth = at(config(models / "a"), FAMILIES[name].stacks[stack])
    slices = f"[sources: [{{model: a, layer_range: [1, {depth}]}}]]"
    merged(sliced(name, stack, slices), models, tmp_path / "out")
    check_slices(name, stack, models, tmp_path / "out", [("a", layer) for layer in range(1, depth)])


# --- tied ---

COPIES = {
    "gpt2": {"lm_head.weight": "transformer.wte.weight"},
    "mamba": {"lm_head.weight": "backbone.embeddings.weight"},
    "bert-mlm": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta-mlm": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    "distilbert-mlm": {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    "t5": dict.fromkeys(
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
    ),
    "whisper": {"proj_out.weight": "model.decoder.embed_tokens.weight"},
    "gemma3-vision": {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"},
}


@pytest.mark.parametrize("says", [True, None], ids=["said", "unsaid"])
@pytest.mark.parametrize("name", COPIES)
def test_a_fine_tune_may_store_what_is_tied_twice(
    made: Callable[[str], Made], tmp_path: Path, name: str, says: bool | None
) -> None:
    models = made(name).folder
    for model in ("base", "a", "b"):
        (tmp_path / model).mkdir()
        stored = load_file(models / model / "model.safetensors")
        copies = {copy: stored[original].clone() for copy, original in COPIES[name].items()} if model == "a" else {}
        save_file({**stored, **copies}, tmp_path / model / "model.safetensors", {"format": "pt"})
        said = {key: value for key, value in config(models / model).items() if says or key != "tie_word_embeddings"}
        (tmp_path / model / "config.json").write_text(json.dumps(said))
    found = merged(RECIPES["dare_ties"], tmp_path, tmp_path / "out")
    assert found.keys() == tensors(models, "base")[0].keys()
    reloaded(FAMILIES[name], tmp_path / "out")


# --- beside mergekit ---

GRADIENT = """
merge_method: slerp
base_model: NAME/a
models: [model: NAME/a, model: NAME/b]
parameters: {t: [{filter: norm, value: [1, 0.2, 0]}, {value: [0.1, 0.3, 1]}]}
dtype: float32
"""
STACKED = """
merge_method: passthrough
slices:
- sources: [{model: NAME/a, layer_range: [0, 2]}]
- sources: [{model: NAME/b, layer_range: [1, 3]}]
dtype: float32
"""
MERGED_SLICES = """
merge_method: linear
slices:
- sources:
  - {model: NAME/a, layer_range: [0, 2], parameters: {weight: [0.2, 1]}}
  - {model: NAME/b, layer_range: [0, 2], parameters: {weight: 0.5}}
- sources:
  - {model: NAME/a, layer_range: [1, 3], parameters: {weight: [{filter: layers.1., value: 0.9}, {value: 0.1}]}}
  - {model: NAME/b, layer_range: [0, 2], parameters: {weight: [0.3, 0.7]}}
dtype: float32
"""
PAIR = "models: [{model: NAME/a}, {model: NAME/b, parameters: {weight: 0.3}}]"
MODULES = f"""
merge_method: linear
modules:
  encoder: {{{PAIR}, parameters: {{weight: [0.1, 0.9]}}}}
  decoder: {{slices: [sources: [{{model: NAME/b, layer_range: [0, 2]}}]], parameters: {{weight: 1}}}}
  shared: {{{PAIR}, parameters: {{weight: 0.5}}}}
dtype: float32
"""
BESIDE = {
    f"{name}-{kind}": recipe.replace("NAME", name)
    for kind, recipes in {
        "gradient": dict.fromkeys(("llama", "opt", "t5-untied"), GRADIENT),
        "stacked": dict.fromkeys(("llama", "opt"), STACKED),
        "merged-slices": dict.fromkeys(("llama", "opt"), MERGED_SLICES),
        "modules": {"t5-untied": MODULES},
    }.items()
    for name, recipe in recipes.items()
}


@pytest.fixture(scope="module")
def beside(made: Callable[[str], Made], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where mergekit, which has no table of OPT, wrote the outputs of recipes to theirs/ and we to ours/."""
    python = mergekit_python()
    place = tmp_path_factory.mktemp("mergekit")
    for name in ("llama", "opt", "t5-untied"):
        (place / name).symlink_to(made(name).folder)
    arguments = []
    for name, recipe in BESIDE.items():
        (place / f"{name}.yml").write_text(recipe)
        arguments += [f"{name}.yml", f"theirs/{name}"]
        fastmerge.merge(Recipe.parse(recipe, folder=place), place / "ours" / name)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [python, "-c", DRIVER, *arguments], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place


@pytest.mark.parametrize("name", BESIDE)
def test_layers_are_counted_as_mergekit_counts_them(beside: Path, name: str) -> None:
    ours, theirs = (
        {key: value for file in (beside / who / name).glob("*.safetensors") for key, value in load_file(file).items()}
        for who in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key.startswith("model.decoder.final_layer_norm.") and not name.endswith("gradient"):
            continue  # where mergekit has no table, it takes from the first slice what comes after the layers
        near = (ours[key] - value).abs() <= 1e-6 * value.abs().max()
        assert (near | (ulps_apart(ours[key], value) <= 4)).all(), key
