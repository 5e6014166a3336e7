"""Whole merges: checkpoints in, a checkpoint out, on every backend; and what is left behind when one fails."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from conftest import ISAS, TORCH, compiled_core
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge import BackendError, CheckpointError, FastmergeWarning, MismatchError, NonFiniteError, OutputError
from fastmerge.checkpoint import encode_header, open_checkpoint
from fastmerge.planner import plan
from fastmerge.recipe import Recipe

Tensors = dict[str, torch.Tensor]

SHAPES = {
    "model.embed_tokens.weight": (61, 24),
    "model.layers.0.mlp.up_proj.weight": (24, 40),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.up_proj.weight": (24, 40),
    "model.layers.1.norm.weight": (24,),
    "model.empty": (0, 3),
    "model.scalar": (),
    "model.wide.weight": (3, 90_001),  # more than a tile
}
BASED = "base_model: base\nmodels: [model: a, model: b, model: c]\n"
RECIPES = {
    "linear": "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: [0.2, 0.7]}\n",
    "uniform_soup": "merge_method: uniform_soup\nmodels: [model: a, model: b, model: c]\n",
    "task_arithmetic": f"merge_method: task_arithmetic\n{BASED}parameters: {{weight: 0.4, lambda: 0.9}}\n",
    "ties": f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3}}\n",
    "ties-rescaled": f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3, rescale: l2}}\n",
    "ties-of-model": f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3, scope: model}}\n",
    "breadcrumbs": f"merge_method: breadcrumbs\n{BASED}parameters: {{weight: 0.4, density: 0.6, gamma: 0.1}}\n",
    "breadcrumbs_ties": (
        f"merge_method: breadcrumbs_ties\n{BASED}parameters: {{weight: 0.4, density: 0.6, rescale: true}}\n"
    ),
    "nearswap": "merge_method: nearswap\nbase_model: base\nmodels: [model: a]\nparameters: {t: 0.002}\n",
    "ram": f"merge_method: ram\n{BASED}parameters: {{epsilon: 0.002}}\n",
    "dare_linear": f"merge_method: dare_linear\n{BASED}parameters: {{weight: 0.4, density: 0.6}}\n",
    "dare_ties": f"merge_method: dare_ties\n{BASED}parameters: {{weight: 0.4, density: 0.6}}\n",
    "nuslerp": "merge_method: nuslerp\nmodels: [model: a, model: b]\nparameters: {weight: [0.2, 0.7]}\n",
    "multislerp": f"merge_method: multislerp\n{BASED}parameters: {{weight: [0.2, 0.7]}}\n",
    "karcher": "merge_method: karcher\nmodels: [model: a, model: b, model: c]\n",
    "model_stock": f"merge_method: model_stock\n{BASED}",
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b]\nparameters: {t: [0, 0.7]}\n",
    "passthrough": "merge_method: passthrough\nmodels: [model: a]\nparameters: {scale: [{filter: mlp, value: 0.3}]}\n",
}
LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n"
TIES = "merge_method: ties\nbase_model: base\nmodels: [model: a, model: b]\nparameters: {weight: 1, density: 0.5}\n"
COPY = "merge_method: passthrough\nmodels: [model: a]\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def models() -> None:
    """base, a, b and c in bf16."""
    for name, tensors in family(torch.bfloat16).items():
        save(name, tensors)


def family(dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensors]:
    """A base and its fine-tunes a, b and c."""
    rng = np.random.default_rng(7)
    base = {name: rng.standard_normal(shape) * 0.02 for name, shape in shapes.items()}
    moved = {n: {k: v + rng.standard_normal(v.shape) * 0.003 for k, v in base.items()} for n in "abc"}
    return {
        name: {tensor: torch.tensor(values).to(dtype) for tensor, values in tensors.items()}
        for name, tensors in {"base": base, **moved}.items()
    }


def save(name: str, tensors: Tensors, shards: int = 1, **config: Any) -> None:
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2} | config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def merged(text: str, out: str = "out", **options: Any) -> Tensors:
    """The tensors of a merge."""
    fastmerge.merge(Recipe.parse(text), out, **options)
    return load(out)


def load(folder: str) -> Tensors:
    return {
        name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def raw(tensors: Tensors) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Tensors to the bit: NaN equals NaN, and 0 is not -0."""
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy().ravel()


def digests(*folders: str) -> dict[str, str]:
    files = [file for folder in folders for file in sorted(Path(folder).iterdir())]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def assert_nothing_left(out: str = "out") -> None:
    assert not Path(out).exists()


# --- the same bytes everywhere ---


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_instruction_set_and_thread_count_gives_the_bytes_of_the_reference(recipe: str) -> None:
    native = compiled_core()
    text = RECIPES[recipe]
    expected = raw(merged(text, "torch", backend="torch", threads=1))
    assert len(expected) == len(SHAPES)
    for isa in native.isas():
        for threads in (1, 2, 3):
            with native.using(isa):
                report = fastmerge.merge(Recipe.parse(text), f"{isa}-{threads}", backend="cpu", threads=threads)
            assert report.providers == ("cpu",)
            assert raw(load(f"{isa}-{threads}")) == expected, (isa, threads)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_is_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    native = compiled_core()
    monkeypatch.setenv("FASTMERGE_ISA", isa)
    if isa in native.isas():
        assert native.isa() == isa
        assert merged(LINEAR)
        return
    with pytest.raises(BackendError, match=f"FASTMERGE_ISA='{isa}' cannot run"):
        merged(LINEAR)
    assert_nothing_left()


@pytest.mark.usefixtures("models")
def test_one_seed_gives_one_result() -> None:
    text = RECIPES["dare_ties"]
    first, again, other = (raw(merged(text, out, seed=seed)) for out, seed in (("x", 5), ("y", 5), ("z", 6)))
    assert first == again
    assert first != other
    assert raw(merged(f"{text}seed: 5\n", "own")) == first
    assert raw(merged(f"{text}seed: 6\n", "stronger", seed=5)) == first


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("recipe", ["ties", "dare_linear"])
def test_a_sharded_output_has_the_same_tensors(recipe: str) -> None:
    single = raw(merged(RECIPES[recipe], "single"))
    fastmerge.merge(Recipe.parse(RECIPES[recipe]), "sharded", shard_size=5000)
    names = sorted(file.name for file in Path("sharded").glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    index = json.loads(Path("sharded/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names
    assert raw(load("sharded")) == single
    assert set(open_checkpoint("sharded").tensors) == set(single)


@pytest.mark.parametrize("recipe", ["ties", "slerp"])
def test_sharded_inputs_give_the_bytes_of_whole_ones(tmp_path: Path, recipe: str) -> None:
    for name, tensors in family(torch.bfloat16).items():
        save(f"whole/{name}", tensors)
        save(f"sharded/{name}", tensors, shards={"base": 1, "a": 2, "b": 3, "c": 8}[name])
    results = []
    for kind in ("whole", "sharded"):
        fastmerge.merge(Recipe.parse(RECIPES[recipe], folder=tmp_path / kind), f"from-{kind}")
        results.append(raw(load(f"from-{kind}")))
    assert results[0] == results[1]


def test_a_model_may_be_one_file() -> None:
    models = family()
    save("base", models["base"])
    save("a", models["a"])
    expected = raw(merged(TIES.replace(", model: b", "")))
    os.rename("a/model.safetensors", "a.safetensors")
    assert raw(merged(TIES.replace("model: a, model: b", "model: a.safetensors"), "again")) == expected


# --- dtypes ---


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_dtypes_are_mixed_freely(backend: str) -> None:
    dtypes = {"base": "F32", "a": "BF16", "b": "F16"}
    models = {name: {k: v.to(TORCH[dtypes[name]]) for k, v in family()[name].items()} for name in dtypes}
    for name, tensors in models.items():
        save(name, tensors)
    found = merged(TIES, backend=backend)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        base, *others = (wide(models[model][name]) for model in dtypes)
        expected = oracles.ties(base, others, (1.0, 1.0), (0.5, 0.5))
        np.testing.assert_allclose(wide(tensor), expected, rtol=2**-22, atol=2**-30)


@pytest.mark.parametrize("word", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_the_recipe_names_the_output_dtype(key: str, word: str) -> None:
    models = family()
    for name in ("a", "b"):
        save(name, models[name], torch_dtype="float64")
    found = merged(f"{LINEAR}{key}: {word}\n")
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, word)}
    assert json.loads(Path("out/config.json").read_text())["torch_dtype"] == word
    for name, tensor in found.items():
        a, b = (wide(models[model][name]).astype(np.float32) for model in "ab")
        expected = torch.from_numpy(a * np.float32(0.5) + b * np.float32(0.5)).to(tensor.dtype)
        assert torch.equal(tensor.ravel(), expected)


@pytest.mark.parametrize("recipe", ["linear", "ties", "ties-of-model", "dare_ties", "slerp"])
def test_float64_is_merged_in_float64_by_the_reference(recipe: str) -> None:
    for name, tensors in family(torch.float64).items():
        save(name, tensors)
    report = fastmerge.merge(Recipe.parse(RECIPES[recipe]), "out")
    assert report.providers == ("torch",)
    found = load("out")
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}
    inexact = sum(int((tensor.float().double() != tensor).sum()) for tensor in found.values())
    assert inexact > 0.9 * sum(tensor.numel() for tensor in found.values()), "rounded to float32 on the way"


def test_float64_agrees_with_the_oracle() -> None:
    models = family(torch.float64)
    for name, tensors in models.items():
        save(name, tensors)
    for name, tensor in merged(RECIPES["ties"]).items():
        base, *others = (wide(models[model][name]) for model in ("base", "a", "b", "c"))
        expected = oracles.ties(base, others, (0.7,) * 3, (0.3,) * 3)
        np.testing.assert_allclose(wide(tensor), expected, rtol=1e-13, atol=1e-16)


def test_only_tensors_in_float64_leave_the_core() -> None:
    compiled_core()
    models = family(torch.bfloat16)
    models["b"]["model.layers.0.norm.weight"] = models["b"]["model.layers.0.norm.weight"].double()
    for name, tensors in models.items():
        save(name, tensors)
    report = fastmerge.merge(Recipe.parse(RECIPES["ties"]), "out")
    assert set(report.providers) == {"cpu", "torch"}
    assert load("out")["model.layers.0.norm.weight"].dtype == torch.float64


@pytest.mark.parametrize("recipe", ["ties", "ties-of-model"])
def test_a_base_alone_in_float64_is_merged_too(recipe: str) -> None:
    models = family(torch.float32)
    models["base"] = {name: tensor.double() + 1e-12 for name, tensor in models["base"].items()}
    for name, tensors in models.items():
        save(name, tensors)
    found = merged(RECIPES[recipe])
    assert {tensor.dtype for tensor in found.values()} == {torch.float64}


def test_a_backend_asked_for_by_name_does_not_fall_back() -> None:
    for name, tensors in family(torch.float64).items():
        save(name, tensors)
    with pytest.raises(BackendError, match=r"no backend merges F64 here \(cpu takes BF16, F16, F32, U8\)"):
        merged(LINEAR, backend="cpu")
    assert_nothing_left()


@pytest.mark.usefixtures("models")
def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(BackendError, match="no backend 'gpu'; there are auto, cpu, torch"):
        merged(LINEAR, backend="gpu")


@pytest.mark.usefixtures("models")
def test_nuslerp_is_not_fused_by_columns_alone() -> None:
    rows, columns = (
        "merge_method: nuslerp\nmodels: [model: a, model: b]\nparameters: {weight: 1, nuslerp_flatten: false"
        f", nuslerp_row_wise: {by_columns}}}\n"
        for by_columns in ("false", "true")
    )
    merged(rows, backend="cpu")
    says = r"nuslerp by columns \(nuslerp_row_wise: true\) is not fused and runs by torch alone, not by cpu"
    with pytest.raises(BackendError, match=says):
        merged(columns, "columns", backend="cpu")
    assert not Path("columns").exists()


# --- measures ---


@pytest.mark.parametrize("ties", ["index", "all"])
def test_one_threshold_over_a_whole_model(ties: str) -> None:
    """Deltas are multiples of 2**-10, so many of them equal the threshold, in every tensor."""
    shapes = {f"layers.{n}.w": (400 + n,) for n in range(9)}
    rng = np.random.default_rng(3)
    base = {name: rng.integers(-512, 513, shape) / 256 for name, shape in shapes.items()}
    models = {"base": base} | {
        name: {
            tensor: values + np.rint(rng.standard_normal(values.shape) * 8) / 1024 for tensor, values in base.items()
        }
        for name in "ab"
    }
    for name, tensors in models.items():
        weights = {tensor: torch.tensor(values, dtype=torch.float32) for tensor, values in tensors.items()}
        save(name, weights, num_hidden_layers=9)
    order = list(open_checkpoint("base").tensors)
    text = TIES.replace("density: 0.5", f"density: 0.3, scope: model, ties: {ties}")
    found = merged(text)
    flat = [np.concatenate([np.ravel(tensors[name]) for name in order]) for tensors in models.values()]
    expected = oracles.ties(flat[0], flat[1:], (1.0, 1.0), (0.3, 0.3), ties=ties)
    np.testing.assert_array_equal(np.concatenate([wide(found[name]) for name in order]), expected)
    assert not np.array_equal(expected, oracles.ties(flat[0], flat[1:], (1.0, 1.0), (0.3, 0.3), ties=_other(ties)))


def _other(ties: str) -> str:
    return {"index": "all", "all": "index"}[ties]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("rescale", ["l1", "l2", "linf"])
def test_a_trimmed_delta_is_brought_back_to_its_norm(rescale: str, backend: str) -> None:
    models = family()
    for name, tensors in models.items():
        save(name, tensors)
    found = merged(TIES.replace("density: 0.5", f"density: 0.2, rescale: {rescale}"), backend=backend)
    for name, tensor in found.items():
        base, *others = (wide(models[model][name]) for model in ("base", "a", "b"))
        expected = oracles.ties(base, others, (1.0, 1.0), (0.2, 0.2), rescale=rescale)
        np.testing.assert_allclose(wide(tensor), expected, rtol=2**-21, atol=1e-8)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_random_drops_are_those_of_the_published_generator(method: str, rescale: str, backend: str) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "model.wide.weight"}
    models = family(shapes=shapes)
    for name, tensors in models.items():
        save(name, tensors)
    text = TIES.replace("ties", method).replace("density: 0.5", f"density: [0.3, 0.8], rescale: {rescale}")
    found = merged(text, seed=11, backend=backend)
    (stage,) = plan(Recipe.parse(text), seed=11).stages
    oracle = getattr(oracles, method)
    for job in stage.jobs:
        base, *others = (wide(models[model][job.name]) for model in ("base", "a", "b"))
        densities = [settings["density"] for settings in job.settings.models]
        masks = [
            oracles.bernoulli(key, round(density * 2**32), base.size)
            for key, density in zip(job.settings.keys, densities, strict=True)
        ]
        expected = oracle(base, others, (1.0, 1.0), densities, masks, rescale=rescale)
        np.testing.assert_allclose(wide(found[job.name]), expected, rtol=2**-21, atol=1e-8)


# --- stages ---

STAGED = """
name: {name}
merge_method: task_arithmetic
base_model: base
models: [model: a, model: b]
parameters: {{weight: 0.5}}
dtype: float32
---
merge_method: linear
models: [model: {name}, model: c]
parameters: {{weight: 0.5}}
dtype: float32
"""


@pytest.mark.usefixtures("models")
def test_documents_are_stages_and_only_the_last_stays() -> None:
    first, second = STAGED.format(name="half").split("---\n")
    merged(first.replace("name: half\n", ""), "half-by-hand")
    expected = merged(second.replace("model: half", "model: half-by-hand"), "by-hand")
    report = fastmerge.merge(Recipe.parse(STAGED.format(name="half")), "out")
    assert raw(load("out")) == raw(expected)
    assert report.methods == ("task_arithmetic", "linear")
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.md",
        "config.json",
        "fastmerge.json",
        "mergekit_config.yml",
        "model.safetensors",
    ]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("name", ["../../../elsewhere", "ABSOLUTE", "..", "a/b", "n" * 300], ids=lambda name: name[:20])
def test_a_stage_may_have_any_name_and_writes_nothing_outside(tmp_path: Path, name: str) -> None:
    name = name.replace("ABSOLUTE", str(tmp_path / "absolute"))
    around = set(tmp_path.rglob("*")) | set(tmp_path.parent.iterdir())
    assert merged(STAGED.format(name=name))
    appeared = set(tmp_path.rglob("*")) | set(tmp_path.parent.iterdir())
    assert {path for path in appeared - around if not path.is_relative_to(tmp_path / "out")} == set()


# --- values ---


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("text", [LINEAR, TIES, COPY], ids=["linear", "ties", "passthrough"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_an_error_that_says_where(value: float, text: str, backend: str) -> None:
    models = family()
    place = "model.layers.1.mlp.up_proj.weight"
    models["a"][place].view(-1)[[137, 500, 501]] = value
    for name, tensors in models.items():
        save(name, tensors)
    before = digests(*models)
    with pytest.raises(NonFiniteError) as caught:
        merged(text, backend=backend)
    assert f"a: tensor '{place}' holds 3 NaN or Inf, the first at index 137;" in str(caught.value)
    assert_nothing_left()
    assert digests(*models) == before


def test_nan_in_the_base_is_told_of_the_base() -> None:
    models = family()
    models["base"]["model.scalar"].fill_(np.nan)
    for name, tensors in models.items():
        save(name, tensors)
    with pytest.raises(NonFiniteError, match=r"base: tensor 'model\.scalar' holds 1 NaN or Inf, the first at index 0;"):
        merged(TIES)


def test_a_nan_that_is_let_through_stays_where_it_is() -> None:
    """The selection takes it for 0: among the others the same elements stay as without it."""
    models = family()
    place = "model.layers.1.mlp.up_proj.weight"
    models["a"][place].view(-1)[137] = models["base"][place].view(-1)[137]
    for name, tensors in models.items():
        save(name, tensors)
    clean = merged(TIES, "clean")
    models["a"][place].view(-1)[137] = np.nan
    save_file(models["a"], "a/model.safetensors")
    found = merged(TIES, "found", nonfinite="propagate")
    assert found[place].view(-1)[137].isnan()
    found[place].view(-1)[137] = clean[place].view(-1)[137]
    assert raw(found) == raw(clean)


def test_a_copy_that_lets_nan_through_keeps_its_bits() -> None:
    save(
        "a",
        {"x": torch.tensor([0x7FC00001, 0x7F800000, -0x400000, 0x3F800000, 1], dtype=torch.int32).view(torch.float32)},
    )
    assert raw(merged(COPY, nonfinite="propagate")) == raw(load("a"))


def test_nonfinite_is_one_of_two_words() -> None:
    with pytest.raises(ValueError, match='nonfinite is "error" or "propagate"'):
        fastmerge.merge("recipe.yml", "out", nonfinite="ignore")


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_overflow_in_a_narrow_dtype_is_told_with_counts(backend: str) -> None:
    save("a", {"big": torch.tensor([70000.0, -1e9, 65504.0, 1.0]), "huge": torch.full((5,), 1e30)})
    with pytest.warns(FastmergeWarning, match=r"7 elements in 2 tensors became infinite in F16, 5 of them in 'huge'"):
        found = merged(f"{COPY}out_dtype: float16\n", backend=backend)
    assert found["big"].tolist() == [np.inf, -np.inf, 65504.0, 1.0]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_base_like_all_of_its_models_comes_out_to_the_bit(dtype: str, method: str) -> None:
    values = family(TORCH[dtype])["base"]
    values["zeros"] = torch.tensor([0.0, -0.0, 1e-41, -1e-41, 6e-8, -6e-8]).to(TORCH[dtype])
    for name in ("base", "a", "b"):
        save(name, values)
    with pytest.warns(FastmergeWarning, match="the base is identical to every model"):
        found = merged(TIES.replace("ties", method))
    assert raw(found) == raw(values)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("recipe", ["linear", "ties", "slerp"])
def test_sound_models_bring_no_warning(recipe: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged(RECIPES[recipe])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("recipe", ["linear", "ties", "dare_ties", "slerp"])
def test_buffers_of_integers_are_copied(recipe: str, dtype: torch.dtype) -> None:
    for name, tensors in family().items():
        save(name, tensors | {"positions": torch.tensor([[3, 0, 1, 0, 77]]).to(dtype)})
    found = merged(f"{RECIPES[recipe]}dtype: bfloat16\n")["positions"]
    assert found.dtype == dtype
    assert torch.equal(found, load("a")["positions"])


def test_buffers_that_differ_are_an_error() -> None:
    for number, (name, tensors) in enumerate(family().items()):
        save(name, tensors | {"positions": torch.tensor([3, number])})
    with pytest.raises(MismatchError, match="'positions' holds I64 values, which differ in 'a' and 'b'"):
        merged(LINEAR)
    assert_nothing_left()


# --- what is reported ---


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_progress_rises_to_the_bytes_in_all(recipe: str, backend: str) -> None:
    seen: list[tuple[int, int]] = []
    fastmerge.merge(Recipe.parse(RECIPES[recipe]), "out", backend=backend, progress=lambda *at: seen.append(at))
    done = [at[0] for at in seen]
    assert done == sorted(done)
    assert {at[1] for at in seen} == {done[-1]}


@pytest.mark.usefixtures("models")
def test_the_report_counts_what_was_moved() -> None:
    report = fastmerge.merge(Recipe.parse(TIES), Path("out"), threads=2)
    size = sum(tensor.numel() * 2 for tensor in family()["base"].values())
    assert report.out == Path("out")
    assert (report.methods, report.tensors, report.threads) == (("ties",), len(SHAPES), 2)
    assert report.bytes_read == 3 * size
    assert report.bytes_written == Path("out/model.safetensors").stat().st_size
    assert report.gigabytes_per_second > 0


@pytest.mark.usefixtures("models")
def test_a_merge_on_the_core_imports_no_torch() -> None:
    compiled_core()
    Path("recipe.yml").write_text(RECIPES["ties"])
    code = "import sys, fastmerge; fastmerge.merge('recipe.yml', 'out'); print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"


# --- an input is cut, the disk fills up, the user stops ---


def run_python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, which must end well."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr}"
    return done


def save_sparse(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]], start: bytes = b"") -> None:
    """A checkpoint of zeros that takes no space on disk, but for its first bytes."""
    folder = Path(name)
    folder.mkdir()
    header, _ = encode_header([(tensor, *rest) for tensor, rest in tensors.items()], {})
    size = sum(int(np.prod(shape)) * {"BF16": 2, "F32": 4}[dtype] for dtype, shape in tensors.values())
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header + start)
        file.truncate(len(header) + size)


CUT = """
import os, sys, fastmerge
from fastmerge.recipe import Recipe
text, cut, after, backend = sys.argv[1:]
calls = 0
def progress(done, total):
    global calls
    calls += 1
    if calls == int(after):
        os.truncate(cut, 4096)
try:
    fastmerge.merge(Recipe.parse(text), "out", threads=2, backend=backend, progress=progress)
except fastmerge.CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("after", [1, 2], ids=["in-the-first-pass", "in-the-second-pass"])
@pytest.mark.parametrize(
    ("text", "cut"),
    [(LINEAR, "a"), (LINEAR, "b"), (TIES, "base"), (TIES, "b")],
    ids=["linear-a", "linear-b", "ties-base", "ties-b"],
)
def test_a_file_that_is_cut_while_it_is_read_is_an_error(text: str, cut: str, after: int, backend: str) -> None:
    """Each op reports when it is done, so the file is cut before the sweep that follows a threshold, or a batch."""
    compiled_core()
    tensors = {f"layers.{n}.norm": ("BF16", (64,)) for n in range(600)} | {"last": ("BF16", (20_000_000,))}
    for number, name in enumerate(("base", "a", "b")):
        save_sparse(name, tensors, bytes([0, number]))
    done = subprocess.run(
        [sys.executable, "-c", CUT, text, f"{cut}/model.safetensors", str(after), backend],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{cut}/model.safetensors changed while it was read (it has 4096 bytes, had 40")
    assert_nothing_left()


@pytest.mark.usefixtures("models")
def test_a_file_that_is_replaced_while_it_is_read_is_an_error() -> None:
    def replace(done: int, total: int) -> None:
        Path("new").write_bytes(Path("a/model.safetensors").read_bytes())
        os.replace("new", "a/model.safetensors")

    with pytest.raises(CheckpointError, match=r"a/model\.safetensors changed while it was read"):
        merged(LINEAR, progress=replace)
    assert_nothing_left()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("recipe", ["linear", "ties", "slerp", "ties-rescaled"])
def test_an_interrupt_leaves_nothing(recipe: str, backend: str) -> None:
    before = digests("base", "a", "b", "c")
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if done == total or calls == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(RECIPES[recipe], backend=backend, progress=interrupt)
    assert calls
    assert_nothing_left()
    assert digests("base", "a", "b", "c") == before
    assert gc.isenabled()


@pytest.mark.usefixtures("models")
def test_an_interrupt_leaves_an_earlier_output_as_it_was() -> None:
    merged(LINEAR)
    before = digests("out")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(TIES, overwrite=True, progress=interrupt)
    assert digests("out") == before
    assert raw(merged(TIES, overwrite=True)) == raw(merged(TIES, "fresh"))


@pytest.mark.usefixtures("models")
def test_an_output_that_is_there_stays_without_overwrite() -> None:
    merged(LINEAR)
    before = digests("out")
    with pytest.raises(OutputError, match="out is not empty"):
        merged(TIES)
    assert digests("out") == before


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_a_disk_that_fills_up_midway_is_an_error(backend: str) -> None:
    """As where space cannot be reserved: the file system refuses only the write itself."""
    compiled_core()
    run_python(
        f"""
        import errno, os, resource, fastmerge
        from fastmerge.recipe import Recipe
        def refuse(*_):
            raise OSError(errno.EOPNOTSUPP, "no")
        os.posix_fallocate, os.ftruncate = refuse, lambda *_: None
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            fastmerge.merge(Recipe.parse({TIES!r}), "out", backend={backend!r})
        except fastmerge.OutputError as error:
            assert "out cannot be written (File too large)" in str(error), error
        else:
            raise AssertionError("it fitted")
        """
    )
    assert_nothing_left()


@contextlib.contextmanager
def merging(text: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command line at work on half a minute of it, once its output is being written."""
    compiled_core()
    for name in ("base", "a"):
        save_sparse(name, {"w": ("BF16", (1 << 28,))}, b"\0\1" if name == "a" else b"")
    for name in ("b", "c"):
        Path(name).mkdir()
        os.link("a/model.safetensors", f"{name}/model.safetensors")
    Path("recipe.yml").write_text(text)
    command = [sys.executable, "-m", "fastmerge.cli", "merge", "recipe.yml", "out", "--threads", "1"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FASTMERGE_ISA": "scalar"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not Path("out/.fastmerge-model.safetensors.part").exists():
            assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_ctrl_c_ends_a_merge_at_once() -> None:
    with merging(RECIPES["dare_ties"]) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=5)  # a second, and what a loaded machine adds
    assert process.returncode == 130
    assert out == ""
    assert err == "stopped; nothing that looks complete was written, and the same command goes on from there\n"
    assert_nothing_left()


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_merge_leaves_nothing_that_loads_and_can_be_run_again(ending: signal.Signals) -> None:
    with merging(RECIPES["dare_ties"]) as process:
        process.send_signal(ending)
        process.communicate()
    assert all(path.name.startswith(".fastmerge-") for path in Path().glob("out/*"))
    for name in ("a", "b"):
        (Path(name) / "model.safetensors").unlink()
        save_file({"x": torch.ones(3)}, Path(name) / "model.safetensors")
    assert merged(LINEAR)["x"].tolist() == [1.0, 1.0, 1.0]
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.md",
        "fastmerge.json",
        "mergekit_config.yml",
        "model.safetensors",
    ]


# --- limits of the machine ---


def test_more_shards_than_a_process_may_open_files() -> None:
    shapes = {f"layers.{n}.w": (16,) for n in range(150)}
    for name, tensors in family(torch.float32, shapes).items():
        save(name, tensors, shards=150, num_hidden_layers=150)
    expected = raw(merged(TIES, "expected"))
    run_python(
        f"""
        import resource, fastmerge
        from fastmerge.recipe import Recipe
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        fastmerge.merge(Recipe.parse({TIES!r}), "out", shard_size=64)
        """
    )
    assert len(list(Path("out").glob("*.safetensors"))) == 150
    assert raw(load("out")) == expected


LIMIT = 300_000_000
BIG = 200_000_000  # elements: one tensor of 400 MB


@pytest.fixture
def big_models(tmp_path: Path) -> Iterator[None]:
    """Three models of one tensor each that is larger than the limit; random blocks, again and again."""
    save_sparse("base", {"w": ("BF16", (BIG,))})
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        save_sparse(name, {"w": ("BF16", (BIG,))})
        block = torch.from_numpy(rng.standard_normal(1 << 22, np.float32)).bfloat16().view(torch.uint8).numpy()
        with open(f"{name}/model.safetensors", "r+b") as file:
            file.seek(len(encode_header([("w", "BF16", (BIG,))], {})[0]))
            left = 2 * BIG
            while left:
                left -= file.write(block.data[:left])
    yield
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.usefixtures("big_models")
@pytest.mark.parametrize(
    "text",
    [TIES, TIES.replace("0.5", "0.2, rescale: true, scope: model"), LINEAR, RECIPES["slerp"]],
    ids=["ties", "ties-of-model", "linear", "slerp"],
)
def test_memory_stays_below_the_limit_whatever_the_models_size(text: str) -> None:
    compiled_core()
    code = f"""
        import sys, fastmerge
        from fastmerge.recipe import Recipe
        report = fastmerge.merge(Recipe.parse({text!r}), "out", backend="cpu")
        print(report.peak_anonymous_bytes)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    seen = [0]
    while process.poll() is None:
        seen.append(anonymous_bytes(process.pid))
    assert process.returncode == 0
    assert process.stdout is not None
    reported = int(process.stdout.read())
    process.stdout.close()
    assert Path("out/model.safetensors").stat().st_size > LIMIT
    assert 0 < max(seen) < LIMIT
    assert 0 < reported < LIMIT


def anonymous_bytes(process: int) -> int:
    """What another process holds that is no file, now; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
