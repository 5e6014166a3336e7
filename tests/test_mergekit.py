"""Parity with mergekit 0.1.5, which runs beside us as a black box: the same recipe gives the same checkpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge.recipe import Recipe

SETTING = "FASTMERGE_MERGEKIT"
LAYERS = 4
MODELS = ("base", "a", "b", "c")
HIDDEN, INNER, ROWS = 32, 48, 80
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": ROWS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

#: Runs mergekit's own command once per pair of arguments, in one process: importing it takes most of its time.
DRIVER = """
import sys
from importlib.metadata import entry_points
(command,) = entry_points(group="console_scripts", name="mergekit-yaml")
run = command.load()
options = ["--no-copy-tokenizer", "--no-write-model-card", "--clone-tensors", "--quiet", "--random-seed", "1"]
for recipe, out in zip(sys.argv[1::2], sys.argv[2::2]):
    run.main([recipe, out, *options], standalone_mode=False)
"""

THREE = "models: [model: a, model: b, model: c]\n"
WEIGHTED = """
base_model: base
models:
- {model: a, parameters: {weight: 0.6180339}}
- {model: b, parameters: {weight: 1.0}}
- {model: c, parameters: {weight: 0.2718281}}
"""
SIGNED = WEIGHTED.replace("weight: 1.0", "weight: -1.0")
PAIR = "base_model: a\nmodels: [model: a, model: b]\n"
WEIGHTS_OF_TWO = "models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.4}}]\n"

#: Without a dtype of their own: float32 models with `dtype: float32`, bf16 models with `dtype: bfloat16`.
RECIPES = {
    # linear
    "linear": f"merge_method: linear\n{WEIGHTED.replace('base_model: base', '')}",
    "linear-negative-weight": f"merge_method: linear\n{SIGNED.replace('base_model: base', '')}",
    "linear-not-normalized": (
        f"merge_method: linear\nparameters: {{normalize: false}}\n{WEIGHTED.replace('base_model: base', '')}"
    ),
    "linear-gradient": f"merge_method: linear\nparameters: {{weight: [0.2, 1, 0.4]}}\n{THREE}",
    "linear-base-joins-as-model": f"merge_method: linear\nbase_model: base\nparameters: {{weight: 0.25}}\n{THREE}",
    "linear-of-one": "merge_method: linear\nmodels: [{model: a, parameters: {weight: 0.3}}]\n",
    # task arithmetic
    "task_arithmetic": f"merge_method: task_arithmetic\n{WEIGHTED}",
    "task_arithmetic-negative-weight": f"merge_method: task_arithmetic\n{SIGNED}",
    "task_arithmetic-normalized": f"merge_method: task_arithmetic\nparameters: {{normalize: true}}\n{WEIGHTED}",
    "task_arithmetic-lambda": f"merge_method: task_arithmetic\nparameters: {{lambda: 0.7}}\n{WEIGHTED}",
    "task_arithmetic-base-among-models": (
        f"merge_method: task_arithmetic\n{WEIGHTED.replace('models:', 'models:' + chr(10) + '- model: base')}"
    ),
    # ties
    "ties": f"merge_method: ties\nparameters: {{density: 0.5}}\n{WEIGHTED}",
    "ties-density-1": f"merge_method: ties\n{WEIGHTED}",
    "ties-density-0": f"merge_method: ties\nparameters: {{density: 0}}\n{WEIGHTED}",
    "ties-sparse": f"merge_method: ties\nparameters: {{density: 0.013}}\n{WEIGHTED}",
    "ties-not-normalized": f"merge_method: ties\nparameters: {{density: 0.5, normalize: false}}\n{WEIGHTED}",
    "ties-negative-weight": f"merge_method: ties\nparameters: {{density: 0.5}}\n{SIGNED}",
    "ties-lambda": f"merge_method: ties\nparameters: {{density: 0.3, lambda: 1.5}}\n{WEIGHTED}",
    "ties-rescaled": f"merge_method: ties\nparameters: {{density: 0.3, rescale: true}}\n{WEIGHTED}",
    "ties-int8_mask": f"merge_method: ties\nparameters: {{density: 0.3, int8_mask: true}}\n{WEIGHTED}",
    "ties-density-per-model": """
merge_method: ties
base_model: base
models:
- {model: a, parameters: {weight: 0.6, density: 0.2}}
- {model: b, parameters: {weight: 0.9, density: [0.1, 0.7]}}
- {model: c, parameters: {weight: 0.3, density: [{filter: mlp, value: 0.9}, {value: 0.4}]}}
""",
    # the part of dare that draws nothing
    "dare_linear-density-1": f"merge_method: dare_linear\nparameters: {{density: 1}}\n{SIGNED}",
    "dare_ties-density-1": f"merge_method: dare_ties\nparameters: {{density: 1}}\n{WEIGHTED}",
    "dare_ties-density-1-normalized": f"merge_method: dare_ties\nparameters: {{normalize: true}}\n{SIGNED}",
    # breadcrumbs, and the part of della that draws nothing
    "breadcrumbs": f"merge_method: breadcrumbs\nparameters: {{density: 0.6, gamma: 0.1}}\n{WEIGHTED}",
    "breadcrumbs-no-gamma": f"merge_method: breadcrumbs\nparameters: {{density: 0.6, gamma: 0}}\n{WEIGHTED}",
    "breadcrumbs-sparse": f"merge_method: breadcrumbs\nparameters: {{density: 0.013}}\n{WEIGHTED}",
    "breadcrumbs-more-gamma-than-is-left": (
        f"merge_method: breadcrumbs\nparameters: {{density: 0.9, gamma: 0.3}}\n{WEIGHTED}"
    ),
    "breadcrumbs-rescaled": (
        f"merge_method: breadcrumbs\nparameters: {{density: 0.6, rescale: true, normalize: true}}\n{WEIGHTED}"
    ),
    "breadcrumbs-density-1": f"merge_method: breadcrumbs\nparameters: {{rescale: true}}\n{SIGNED}",
    "breadcrumbs_ties": f"merge_method: breadcrumbs_ties\nparameters: {{density: 0.6, gamma: 0.1}}\n{WEIGHTED}",
    "breadcrumbs_ties-normalized": (
        f"merge_method: breadcrumbs_ties\nparameters: {{density: 0.6, normalize: true, lambda: 0.7}}\n{WEIGHTED}"
    ),
    "della-density-1": f"merge_method: della\nparameters: {{density: 1}}\n{WEIGHTED}",
    "della_linear-density-1": f"merge_method: della_linear\nparameters: {{density: 1}}\n{SIGNED}",
    # one other model
    "nearswap": "merge_method: nearswap\nbase_model: base\nmodels: [model: a]\nparameters: {t: 0.001}\n",
    "nearswap-small": "merge_method: nearswap\nbase_model: a\nmodels: [model: b]\nparameters: {t: [0, 0.00001]}\n",
    "arcee_fusion": "merge_method: arcee_fusion\nbase_model: base\nmodels: [model: a]\n",
    # weights that follow from the deltas
    "sce": f"merge_method: sce\nbase_model: base\n{THREE}",
    "sce-top": f"merge_method: sce\nbase_model: base\nparameters: {{select_topk: 0.3}}\n{THREE}",
    "sce-of-one": "merge_method: sce\nbase_model: base\nparameters: {select_topk: 0.3}\nmodels: [model: a]\n",
    "ram": f"merge_method: ram\nbase_model: base\nparameters: {{epsilon: 0.003}}\n{THREE}",
    "ram-default": f"merge_method: ram\nbase_model: base\n{THREE}",
    "ramplus_tl": f"merge_method: ramplus_tl\nbase_model: base\nparameters: {{epsilon: 0.003}}\n{THREE}",
    "ramplus_tl-more": (
        f"merge_method: ramplus_tl\nbase_model: base\nparameters: {{epsilon: 0.002, r: 0.5, alpha: 7}}\n{THREE}"
    ),
    # slerp
    "slerp": f"merge_method: slerp\nparameters: {{t: 0.3}}\n{PAIR}",
    "slerp-ends": f"merge_method: slerp\nparameters: {{t: [0, 1]}}\n{PAIR}",
    "slerp-filters": f"""
merge_method: slerp
{PAIR}
parameters:
  t:
  - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
  - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}
  - {{value: 0.5}}
""",
    "slerp-base-is-the-second": """
merge_method: slerp
base_model: b
models: [model: a, model: b]
parameters: {t: 0.2}
""",
    "slerp-slices": """
merge_method: slerp
base_model: b
slices:
- sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
- sources: [{model: a, layer_range: [1, 4]}, {model: b, layer_range: [1, 4]}]
parameters: {t: [0.1, 0.9]}
""",
    # means on the sphere
    "nuslerp": f"merge_method: nuslerp\n{WEIGHTS_OF_TWO}",
    "nuslerp-of-deltas": f"merge_method: nuslerp\nbase_model: base\n{WEIGHTS_OF_TWO}",
    "nuslerp-rows": f"merge_method: nuslerp\nparameters: {{nuslerp_flatten: false}}\n{WEIGHTS_OF_TWO}",
    "nuslerp-rows-of-deltas": (
        f"merge_method: nuslerp\nbase_model: base\nparameters: {{nuslerp_flatten: false}}\n{WEIGHTS_OF_TWO}"
    ),
    "nuslerp-columns": (
        f"merge_method: nuslerp\nparameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}\n{WEIGHTS_OF_TWO}"
    ),
    "multislerp": f"merge_method: multislerp\n{WEIGHTED.replace('base_model: base', '')}",
    "multislerp-of-deltas": f"merge_method: multislerp\n{WEIGHTED}",
    "multislerp-not-normalized": f"merge_method: multislerp\nparameters: {{normalize_weights: false}}\n{WEIGHTED}",
    "multislerp-of-one": (
        "merge_method: multislerp\nbase_model: base\nmodels: [{model: a, parameters: {weight: 0.3}}]\n"
    ),
    "karcher": f"merge_method: karcher\n{THREE}",
    "karcher-base-joins-as-model": f"merge_method: karcher\nbase_model: base\n{THREE}",
    "karcher-of-one": "merge_method: karcher\nmodels: [model: a]\n",
    "model_stock": f"merge_method: model_stock\nbase_model: base\n{THREE}",
    "model_stock-rows": f"merge_method: model_stock\nbase_model: base\nparameters: {{filter_wise: true}}\n{THREE}",
    # passthrough
    "passthrough": "merge_method: passthrough\nmodels: [model: a]\n",
    "passthrough-frankenmerge": """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
- sources: [{model: a, layer_range: [2, 3]}]
- sources: [{model: c, layer_range: [3, 4]}]
""",
    "passthrough-scale-filters": """
merge_method: passthrough
slices:
- sources:
  - model: a
    layer_range: [0, 2]
    parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: 1.7}, {value: 1.0}]}
- sources: [{model: a, layer_range: [1, 4]}]
""",
    # lookup of parameters
    "precedence": """
merge_method: task_arithmetic
base_model: base
parameters: {weight: [{filter: norm, value: 0.9}, {value: [0.1, 0.3]}]}
slices:
- sources:
  - {model: base, layer_range: [0, 2]}
  - {model: a, layer_range: [0, 2], parameters: {weight: [{filter: q_proj, value: 0.5}]}}
  - {model: b, layer_range: [0, 2]}
  parameters: {weight: [{filter: k_proj, value: 0.25}]}
- sources:
  - {model: base, layer_range: [2, 4]}
  - {model: a, layer_range: [2, 4]}
  - {model: b, layer_range: [2, 4], parameters: {weight: -0.4}}
""",
    "layers-shifted-against-each-other": """
merge_method: linear
slices:
- sources:
  - {model: a, layer_range: [0, 2], parameters: {weight: 0.3}}
  - {model: b, layer_range: [2, 4], parameters: {weight: [{filter: layers.2, value: 0.9}, {value: 0.6}]}}
- sources:
  - {model: c, layer_range: [3, 4], parameters: {weight: [0.2, 1]}}
  - {model: b, layer_range: [0, 1], parameters: {weight: [0.7, 0.1]}}
""",
}

OUT_DTYPES = {
    "out-bfloat16": f"merge_method: ties\n{WEIGHTED}dtype: float32\nout_dtype: bfloat16\n",
    "out-float16": f"merge_method: linear\nparameters: {{weight: 1}}\n{THREE}dtype: float32\nout_dtype: float16\n",
    "out-float32-of-bfloat16": (
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [model: bf16/a, model: bf16/b]\n"
        "dtype: float32\nout_dtype: float32\n"
    ),
    "mixed-inputs": "merge_method: linear\nparameters: {weight: 0.3}\nmodels: [model: bf16/a, model: b]\n",
    "mixed-inputs-task_arithmetic": """
merge_method: task_arithmetic
base_model: base
models: [model: bf16/a, model: b]
parameters: {weight: 0.3}
""",
}

WEIGHTS = (0.6180339, 1.0, 0.2718281)
NEGATIVE = (0.6180339, -1.0, 0.2718281)

Oracle = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]
#: In bf16, against the papers in float64: the same recipes by name, each with its oracle over base and models.
ORACLES: Mapping[str, Oracle] = {
    "linear": lambda base, models: oracles.linear(models, WEIGHTS),
    "linear-negative-weight": lambda base, models: oracles.linear(models, NEGATIVE),
    "linear-not-normalized": lambda base, models: oracles.linear(models, WEIGHTS, normalize=False),
    "task_arithmetic": lambda base, models: oracles.task_arithmetic(base, models, WEIGHTS),
    "task_arithmetic-negative-weight": lambda base, models: oracles.task_arithmetic(base, models, NEGATIVE),
    "task_arithmetic-lambda": lambda base, models: oracles.task_arithmetic(base, models, WEIGHTS, lambda_=0.7),
    "ties": lambda base, models: oracles.ties(base, models, WEIGHTS, (0.5,) * 3),
    "ties-density-1": lambda base, models: oracles.ties(base, models, WEIGHTS, (1.0,) * 3),
    "ties-negative-weight": lambda base, models: oracles.ties(base, models, NEGATIVE, (0.5,) * 3),
    "ties-rescaled": lambda base, models: oracles.ties(base, models, WEIGHTS, (0.3,) * 3, rescale="l1"),
    "dare_linear-density-1": lambda base, models: oracles.task_arithmetic(base, models, NEGATIVE),
    "dare_ties-density-1": lambda base, models: oracles.ties(base, models, WEIGHTS, (1.0,) * 3, normalize=False),
    "breadcrumbs": lambda base, models: oracles.breadcrumbs(base, models, WEIGHTS, (0.6,) * 3, (0.1,) * 3),
    "breadcrumbs_ties": lambda base, models: oracles.breadcrumbs_ties(base, models, WEIGHTS, (0.6,) * 3, (0.1,) * 3),
    "nearswap": lambda base, models: oracles.nearswap(base, models[0], 0.001),
    "sce": lambda base, models: oracles.sce(base, models),
    "ram": lambda base, models: oracles.ram(base, models, 0.003),
    "slerp": lambda base, models: oracles.slerp(models[0], models[1], 0.3),
    "nuslerp": lambda base, models: oracles.nuslerp(models[:2], (0.7, 0.4)),
    "nuslerp-of-deltas": lambda base, models: oracles.nuslerp(models[:2], (0.7, 0.4), base),
    "multislerp": lambda base, models: oracles.multislerp(models, WEIGHTS),
    "multislerp-of-deltas": lambda base, models: oracles.multislerp(models, WEIGHTS, base),
    "karcher": lambda base, models: oracles.karcher(models),
    "model_stock": lambda base, models: oracles.model_stock(base, models),
    "passthrough": lambda base, models: models[0],
}


class Outputs(NamedTuple):
    """Where the results of both lie, by recipe, and the models they are made of."""

    models: Path
    theirs: Path
    ours: Path

    def both(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return loaded(self.theirs / name), loaded(self.ours / name)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Outputs:
    """Every recipe of this file through mergekit, in one process, and through fastmerge."""
    python = mergekit_python()
    place = tmp_path_factory.mktemp("parity")
    write_models(place)
    recipes = {name: f"{text}dtype: float32\n" for name, text in RECIPES.items()} | OUT_DTYPES
    recipes |= {f"bf16-{name}": in_bf16(RECIPES[name]) for name in ORACLES}
    arguments = []
    for name, text in recipes.items():
        (place / f"{name}.yml").write_text(text)
        arguments += [f"{name}.yml", f"theirs/{name}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [python, "-c", DRIVER, *arguments], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in recipes:
        fastmerge.merge(Recipe.load(place / f"{name}.yml"), place / "ours" / name)
    return Outputs(place, place / "theirs", place / "ours")


def mergekit_python() -> Path:
    """The Python of mergekit's virtual environment; a skip that says how to name it where there is none."""
    root = Path(__file__).parents[1]
    script = Path(os.environ.get(SETTING) or root / ".venv-mergekit" / "bin" / "mergekit-yaml")
    if not script.is_file():
        pytest.skip(
            f"mergekit 0.1.5 is not there: install it into .venv-mergekit, or name its mergekit-yaml in {SETTING}"
        )
    python = script.parent / "python"
    asked = "from importlib.metadata import version; print(version('mergekit'))"
    version = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    if version != "0.1.5":
        pytest.skip(f"parity is with mergekit 0.1.5, and {script} is of {version}")
    return python


def in_bf16(recipe: str) -> str:
    return re.sub(rf"model: ({'|'.join(MODELS)})\b", r"model: bf16/\1", recipe) + "dtype: bfloat16\n"


# --- models ---


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    }
    every = {f"model.layers.{n}.{name}.weight": shape for n in range(LAYERS) for name, shape in layer.items()}
    return {
        "model.embed_tokens.weight": (ROWS, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (ROWS, HIDDEN),
    } | every


def write_models(place: Path) -> None:
    """Each model in float32, and rounded to bf16 under bf16/. No two deltas of a float32 tensor are equally large:
    which of equals mergekit keeps is not defined."""
    rng = np.random.default_rng(20)
    base = {name: rng.standard_normal(shape) * 0.02 + (len(shape) == 1) for name, shape in shapes().items()}
    for model in MODELS:
        tensors = {}
        for name, values in base.items():
            moved = values.astype(np.float32)
            if model != "base":
                size = rng.permutation(values.size).reshape(values.shape) + 1
                delta = 0.004 * size / values.size * rng.choice([-1, 1], values.shape)
                moved = (moved + delta).astype(np.float32)
                magnitudes = np.abs(moved - values.astype(np.float32))
                assert len(np.unique(magnitudes)) == magnitudes.size, f"equal magnitudes in {name}"
            tensors[name] = torch.from_numpy(moved)
        save(place / model, tensors, "float32")
        save(place / "bf16" / model, {name: tensor.bfloat16() for name, tensor in tensors.items()}, "bfloat16")


def save(folder: Path, tensors: dict[str, torch.Tensor], dtype: str) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "dtype": dtype}))


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- float32: the same numbers ---


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_numbers(outputs: Outputs, name: str) -> None:
    theirs, ours = outputs.both(name)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        found = ours[tensor]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), tensor
        worst = float(expected.abs().max())
        far = ulps_apart(found, expected) > 4
        beyond = (found - expected).abs()[far].tolist()
        assert all(error <= 1e-6 * worst for error in beyond), f"{tensor}: {max(beyond)} of {worst}"


@pytest.mark.parametrize("name", [*RECIPES, *OUT_DTYPES])
def test_the_same_config(outputs: Outputs, name: str) -> None:
    theirs, ours = (json.loads((place / name / "config.json").read_text()) for place in (outputs.theirs, outputs.ours))
    for key in ("architectures", "num_hidden_layers", "hidden_size", "vocab_size", "tie_word_embeddings"):
        assert ours[key] == theirs[key], key
    if not name.startswith("mixed"):  # there mergekit names the dtype of one of the models, whatever it wrote
        assert ours["dtype"] == theirs["dtype"]


@pytest.mark.parametrize("name", OUT_DTYPES)
def test_the_same_output_dtypes(outputs: Outputs, name: str) -> None:
    theirs, ours = outputs.both(name)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert ours[tensor].dtype == expected.dtype
        error = (ours[tensor].double() - expected.double()).abs()
        spacing = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[expected.dtype]
        assert (error <= spacing * expected.double().abs() + 1e-6 * float(expected.abs().max())).all(), tensor


def ulps_apart(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """How many float32 values lie between, element by element."""

    def place(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (place(one) - place(two)).abs()


# --- bf16: nearer to the papers ---


@pytest.mark.parametrize("name", ORACLES)
def test_in_bf16_our_largest_error_is_not_above_theirs(outputs: Outputs, name: str) -> None:
    theirs, ours = outputs.both(f"bf16-{name}")
    parents = [loaded(outputs.models / "bf16" / model) for model in MODELS]
    largest = [0.0, 0.0]
    for tensor in parents[0]:
        base, *models = (parent[tensor].double().numpy().ravel() for parent in parents)
        expected = ORACLES[name](base, models)
        _, exponent = np.frexp(expected)  # |value| in [0.5, 1) * 2**exponent; bf16 has 8 significant bits
        ulp = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
        for place, found in enumerate((ours, theirs)):
            assert found[tensor].dtype == torch.bfloat16
            error = np.abs(found[tensor].double().numpy().ravel() - expected) / ulp
            largest[place] = max(largest[place], float(error.max()))
    assert largest[0] <= largest[1] + 0.01
