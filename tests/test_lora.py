"""LoRA adapters: what each kind adds to its base, the same bits however it is cut, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ISAS, TORCH, compiled_core
from safetensors.torch import load_file, save_file

from fastmerge import CheckpointError, FastmergeWarning, RecipeError, merge, planner
from fastmerge.checkpoint import open_checkpoint
from fastmerge.hub import Snapshot, snapshot
from fastmerge.planner import Planned
from fastmerge.planner import plan as make_plan
from fastmerge.recipe import Model, Recipe, Repository
from fastmerge.sources import lora
from fastmerge.sources.adapter import open_adapter
from fastmerge.sources.lora import Adapted
from fastmerge.sweep import View

Tensors = Mapping[str, torch.Tensor]
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
EMBED = "model.embed_tokens"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 3}


def normal(*shape: int, seed: int = 0, dtype: str = "F32") -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape)).to(TORCH[dtype])


def base(dtype: str = "F32") -> dict[str, torch.Tensor]:
    """A model of two layers, the tensors of which all have their own shape, but for its square ones."""
    shapes = {f"{EMBED}.weight": (10, 6), "model.norm.weight": (6,), "lm_head.weight": (10, 6)}
    for layer in (0, 1):
        stem = f"model.layers.{layer}"
        shapes |= {f"{stem}.self_attn.q_proj.weight": (6, 6), f"{stem}.self_attn.q_proj.bias": (6,)}
        shapes |= {f"{stem}.self_attn.k_proj.weight": (4, 6), f"{stem}.mlp.down_proj.weight": (6, 35)}
    return {name: normal(*shape, seed=number, dtype=dtype) for number, (name, shape) in enumerate(shapes.items())}


def pair(module: str, out: int, inputs: int, rank: int = 2, dtype: str = "F32") -> dict[str, torch.Tensor]:
    a, b = normal(rank, inputs, seed=91, dtype=dtype), normal(out, rank, seed=92, dtype=dtype)
    return {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}


def save_base(tensors: Tensors, folder: str = "base", **config: Any) -> Path:
    Path(folder).mkdir(parents=True)
    save_file(dict(tensors), Path(folder, "model.safetensors"))
    Path(folder, "config.json").write_text(json.dumps({"vocab_size": 10, "tie_word_embeddings": False} | config))
    return Path(folder)


def save_adapter(tensors: Tensors, folder: str = "adapter", **config: Any) -> Path:
    Path(folder).mkdir(parents=True)
    save_file(dict(tensors), Path(folder, "adapter_model.safetensors"))
    Path(folder, "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return Path(folder)


def adapted(model: Tensors, adapter: Tensors, **config: Any) -> Adapted:
    return Adapted(open_checkpoint(save_base(model)), open_adapter(save_adapter(adapter, **config)))


def values(model: Adapted, tensor: str, step: int = 1 << 30, threads: int = 1) -> np.ndarray:
    """A tensor, `step` rows at a time, as what it is computed in; what is stored, as it is stored."""
    info = model.tensors[tensor]
    if not model.computed(tensor):
        raw = load_file(model.file_of(tensor))[model.stored(tensor)[1]]
        assert raw.shape == info.shape
        return raw.to(torch.float64).numpy()
    made = np.full(
        (info.shape[0], math.prod(info.shape[1:])), np.nan, np.float64 if info.dtype == "F64" else np.float32
    )
    for first in range(0, len(made), step):
        model.fill(tensor, first, made[first : first + step], threads)
    return made.reshape(info.shape)


def near(found: np.ndarray, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """Holds what was found against W + scaling * left right in float64, with room for each rounding on the way."""
    w, b, a = (tensor.to(torch.float64).numpy() for tensor in (weight, left, right))
    eps = np.finfo(found.dtype).eps
    room = eps * ((a.shape[0] + 3) * abs(scaling) * (abs(b) @ abs(a)) + abs(w))
    assert found.shape == w.shape
    assert (abs(found - (w + scaling * (b @ a))) <= room).all()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- the arithmetic ---


@pytest.mark.parametrize("theirs", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("ours", ["F32", "F16", "BF16", "F64"])
def test_a_product_is_added(ours: str, theirs: str) -> None:
    model, adapter = base(ours), pair(DOWN, 6, 35, dtype=theirs)
    made = adapted(model, adapter)
    assert made.tensors[f"{DOWN}.weight"].dtype == ours
    a, b = adapter.values()
    near(values(made, f"{DOWN}.weight"), model[f"{DOWN}.weight"], b, a, 1.5)
    assert [name for name in made.tensors if made.computed(name)] == [f"{DOWN}.weight"]
    assert made.inputs == (Path("base"), Path("adapter"))
    assert list(made.tensors) == list(open_checkpoint("base").tensors)


@pytest.fixture(params=("numpy", *(ISAS or ["compiled"])))
def core(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The definition, then the compiled core forced to each instruction set of this build."""
    if request.param == "numpy":
        monkeypatch.setattr(lora, "_core", lambda: None)
        yield "numpy"
        return
    native = compiled_core()
    if request.param not in native.isas():
        pytest.skip(native.why_not(request.param))
    with native.using(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 5, 64])
@pytest.mark.parametrize("width", [1, 15, 16, 31, 32, 33, 100])
def test_a_product_has_the_bits_of_the_definition(core: str, dtype: str, rank: int, width: int) -> None:
    rows, rng = 19, np.random.default_rng([rank, width])
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, width)))
    left[3], right[:, 0] = 0, 1e-42  # products that vanish, and denormal ones
    weights = normal(rows, width, dtype=dtype)
    weights[0, 0] = -0.0
    raw = np.empty(weights.numel() * weights.element_size() + 1, np.uint8)[1:]  # misaligned
    raw[:] = weights.contiguous().view(torch.uint8).flatten().numpy()
    wide = weights.to(torch.float32).numpy()
    total = np.zeros_like(wide)
    for k in range(rank):
        total = total + left[:, k : k + 1] * right[k]
    expected = total * np.float32(0.3) + wide
    if core == "numpy":
        made = lora.added(wide, left, right, 0.3)
        np.testing.assert_array_equal(made.view(np.uint32), expected.view(np.uint32))
        return
    native = compiled_core()
    for threads in (1, 3):
        whole = np.full((rows + 2, width), np.nan, np.float32)
        native.lowrank(View(raw.ctypes.data, dtype), left, native.in_blocks(right), 0.3, whole[1:-1], threads)
        np.testing.assert_array_equal(whole[1:-1].view(np.uint32), expected.view(np.uint32))
        assert np.isnan(whole[[0, -1]]).all(), "written outside of the output"


def test_a_large_product_is_the_same_for_any_threads() -> None:
    native = compiled_core()
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((700, 64), (64, 1000)))
    weights = rng.standard_normal((700, 1000)).astype(np.float32)
    made = []
    for threads in (1, 2, 5):
        made.append(np.full_like(weights, np.nan))
        native.lowrank(View(weights.ctypes.data, "F32"), left, native.in_blocks(right), 2.0, made[-1], threads)
    np.testing.assert_array_equal(made[0], lora.added(weights, left, right, 2.0))
    np.testing.assert_array_equal(made[1], made[0])
    np.testing.assert_array_equal(made[2], made[0])


KINDS: dict[str, tuple[str, dict[str, torch.Tensor], dict[str, Any]]] = {
    "linear": (f"{DOWN}.weight", pair(DOWN, 6, 35), {}),
    "embedding": (
        f"{EMBED}.weight",
        {
            f"{PREFIX}{EMBED}.lora_embedding_A": normal(2, 10, seed=1),
            f"{PREFIX}{EMBED}.lora_embedding_B": normal(6, 2, seed=2),
        },
        {},
    ),
    "dora": (
        f"{DOWN}.weight",
        pair(DOWN, 6, 35) | {f"{PREFIX}{DOWN}.lora_magnitude_vector": normal(6).abs() + 1},
        {"use_dora": True},
    ),
    "dora-embedding": (
        f"{EMBED}.weight",
        {
            f"{PREFIX}{EMBED}.lora_embedding_A": normal(2, 10, seed=1),
            f"{PREFIX}{EMBED}.lora_embedding_B": normal(6, 2, seed=2),
            f"{PREFIX}{EMBED}.lora_magnitude_vector": normal(6).abs() + 1,
        },
        {"use_dora": True},
    ),
}


@pytest.mark.parametrize("dtype", ["BF16", "F64"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_however_they_are_cut(core: str, kind: str, dtype: str) -> None:
    tensor, adapter, config = KINDS[kind]
    made = adapted(base(dtype), adapter, **config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "_core", lambda: None)
        whole = values(Adapted(made.base, made.adapter), tensor)
    for step, threads in ((1, 1), (4, 2), (100, 3)):
        np.testing.assert_array_equal(values(made, tensor, step, threads), whole, err_msg=f"{step} rows at a time")
    assert np.isfinite(whole).all()


def test_rows_come_in_any_order_and_in_either_width() -> None:
    """One after another of two tensors, into float64 where another model of the merge has that."""
    adapter = pair(DOWN, 6, 35) | pair(K, 4, 6)
    made = adapted(base("BF16"), adapter)
    whole = {name: values(made, name) for name in (f"{DOWN}.weight", f"{K}.weight")}
    for row, name in ((5, f"{DOWN}.weight"), (0, f"{K}.weight"), (0, f"{DOWN}.weight")):
        out = np.empty((1, whole[name].shape[1]), np.float64)
        made.fill(name, row, out)
        np.testing.assert_array_equal(out[0], whole[name][row])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_comes_through(core: str, value: float) -> None:
    adapter = pair(DOWN, 6, 35)
    adapter[f"{PREFIX}{DOWN}.lora_B.weight"][2, 1] = value
    found = values(adapted(base(), adapter), f"{DOWN}.weight")
    assert (np.isfinite(found).all(1) == [True, True, False, True, True, True]).all()


# --- what the config says ---


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, 3 / 2),
        ({"use_rslora": True}, 3 / math.sqrt(2)),
        ({"lora_alpha": 0.5}, 0.25),
        ({"alpha_pattern": {"k_proj": 8}}, 4),
        ({"alpha_pattern": {"self_attn.k_proj": 8}, "use_rslora": True}, 8 / math.sqrt(2)),
        ({"alpha_pattern": {"attn.k_proj": 8}}, 3 / 2),
        ({"alpha_pattern": {"k_pro": 8}}, 3 / 2),
        ({"alpha_pattern": {".*k_pro.": 8}}, 4),
        ({"alpha_pattern": {"^model.layers.0.self_attn.k_proj": 8}}, 4),
        ({"alpha_pattern": {"layers.1.self_attn.k_proj": 8}}, 3 / 2),
        ({"alpha_pattern": {"layers.[01].*": 8, "k_proj": 6}}, 4),
        ({"alpha_pattern": {"q_proj|k_proj": 6, "k_proj": 8}}, 3),
        ({"alpha_pattern": None, "rank_pattern": None, "use_rslora": None}, 3 / 2),
        ({"r": 7, "rank_pattern": {"k_proj": 2}}, 3 / 2),
        ({"lora_dropout": 0.5, "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}, 3 / 2),
        ({"target_modules": ["k_proj"], "layers_to_transform": [0], "some_later_key": None}, 3 / 2),
    ],
)
def test_scaling(config: dict[str, Any], scaling: float) -> None:
    model, adapter = base(), pair(K, 4, 6)
    a, b = adapter.values()
    near(values(adapted(model, adapter, **config), f"{K}.weight"), model[f"{K}.weight"], b, a, scaling)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only 'LORA' is supported"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": None}, "r is None, and must be a whole number from 1 on"),
        ({"r": 0}, "r is 0, and must be"),
        ({"r": True}, "r is True, and must be"),
        (
            {"r": 3},
            "'base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight' has rank 2, and adapter_config.json",
        ),
        ({"rank_pattern": {"k_proj": 4}}, "has rank 2, and adapter_config.json says 4"),
        ({"lora_alpha": None}, "lora_alpha is None, and must be a number"),
        ({"lora_alpha": "3"}, "lora_alpha is '3', and must be a number"),
        ({"alpha_pattern": {"k_proj": "3"}}, "alpha_pattern is {'k_proj': '3'}, and must be an object of numbers"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has a pattern that is no regular expression"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes', and must be true or false"),
        ({"bias": "some"}, "bias is 'some', and must be none, all or lora_only"),
        ({"use_dora": True}, "has no magnitude, and adapter_config.json says use_dora: true"),
        ({"lora_bias": True}, "has no bias, and adapter_config.json says lora_bias: true"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which also changed the base"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"target_parameters": ["experts.up"]}, "target_parameters is not supported (which parameter"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config is not supported"),
        ({"bias_pattern": {"k_proj": 1}}, "has the key 'bias_pattern', which is not known here; fuse it into its base"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_configs_that_are_refused(config: dict[str, Any], message: str) -> None:
    folder = save_adapter(pair(K, 4, 6), **config)
    with pytest.raises(CheckpointError) as caught:
        open_adapter(folder)
    assert message in str(caught.value)
    assert str(caught.value).startswith("adapter/adapter_")


# --- kinds of layers ---


def test_an_embedding_is_added_to_by_its_rows() -> None:
    tensor, adapter, _ = KINDS["embedding"]
    a, b = adapter.values()
    model = base()
    near(values(adapted(model, adapter), tensor), model[tensor], a.T, b.T, 1.5)


@pytest.mark.parametrize("flag", [False, True])
def test_a_layer_that_is_stored_by_inputs_shows_by_its_shape(flag: bool) -> None:
    model = {"h.0.attn.c_attn.weight": normal(6, 18)}
    adapter = pair("h.0.attn.c_attn", 18, 6)
    a, b = adapter.values()
    made = adapted(model, adapter, fan_in_fan_out=flag)
    near(values(made, "h.0.attn.c_attn.weight"), *model.values(), a.T, b.T, 1.5)


@pytest.mark.parametrize("by_inputs", [False, True])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("neighbours", ["silent", "of-one-kind", "of-two-kinds"])
def test_a_square_layer_is_stored_as_its_neighbours_are(neighbours: str, by_inputs: bool, flag: bool) -> None:
    model = {"h.0.attn.c_proj.weight": normal(6, 6), "h.0.attn.c_proj.bias": normal(6), "ln.weight": normal(6)}
    if neighbours != "silent":
        model |= {
            "h.0.attn.c_attn.weight": normal(6, 18) if by_inputs else normal(18, 6),
            "h.0.attn.c_attn.bias": normal(18),
        }
    if neighbours == "of-two-kinds":
        model |= {"head.weight": normal(5, 6) if by_inputs else normal(6, 5), "head.bias": normal(5)}
    adapter = pair("h.0.attn.c_proj", 6, 6)
    a, b = adapter.values()
    turned = by_inputs if neighbours != "silent" else flag
    found = values(adapted(model, adapter, fan_in_fan_out=flag), "h.0.attn.c_proj.weight")
    near(found, model["h.0.attn.c_proj.weight"], *((a.T, b.T) if turned else (b, a)), 1.5)


def test_a_convolution() -> None:
    model = {"conv.weight": normal(5, 3, 2, 2), "conv.bias": normal(5)}
    a, b = normal(2, 3, 2, 2, seed=1), normal(5, 2, 1, 1, seed=2)
    made = adapted(model, {f"{PREFIX}conv.lora_A.weight": a, f"{PREFIX}conv.lora_B.weight": b})
    expected = model["conv.weight"].double() + 1.5 * torch.einsum("or,rihw->oihw", b[:, :, 0, 0].double(), a.double())
    np.testing.assert_allclose(values(made, "conv.weight"), expected.numpy(), rtol=0, atol=1e-5)


def test_a_bias_of_the_adapter_is_added() -> None:
    adapter = pair(Q, 6, 6) | {f"{PREFIX}{Q}.lora_B.bias": normal(6, seed=3)}
    model = base()
    made = adapted(model, adapter, lora_bias=True)
    a, b, c = adapter.values()
    near(values(made, f"{Q}.weight"), model[f"{Q}.weight"], b, a, 1.5)
    found = values(made, f"{Q}.bias")
    np.testing.assert_array_equal(found, (c * np.float32(1.5) + model[f"{Q}.bias"]).numpy())


def normed(weight: torch.Tensor, magnitude: torch.Tensor, axis: int) -> np.ndarray:
    """DoRA in float64: each output's weights at the length that is learned."""
    wide = weight.double()
    others = [other for other in range(wide.dim()) if other != axis]
    shape = [-1 if other == axis else 1 for other in range(wide.dim())]
    return (wide * (magnitude.double().flatten() / wide.pow(2).sum(others).sqrt()).reshape(shape)).numpy()


@pytest.mark.parametrize("suffix", ["", ".default", ".weight", ".default.weight"])
def test_dora_of_a_layer(suffix: str) -> None:
    tensor, adapter, config = KINDS["dora"]
    model, (a, b, magnitude) = base(), adapter.values()
    *names, last = adapter
    made = adapted(model, dict(zip([*names, last + suffix], (a, b, magnitude), strict=True)), **config)
    expected = normed(model[tensor].double() + 1.5 * (b.double() @ a.double()), magnitude, 0)
    np.testing.assert_allclose(values(made, tensor), expected, rtol=0, atol=1e-5)


def test_dora_of_a_layer_that_is_stored_by_inputs() -> None:
    model, magnitude = {"c_fc.weight": normal(300, 5)}, normal(5).abs() + 1
    adapter = pair("c_fc", 5, 300)
    a, b = adapter.values()
    made = adapted(model, adapter | {f"{PREFIX}c_fc.lora_magnitude_vector": magnitude}, use_dora=True)
    expected = normed(model["c_fc.weight"].double() + 1.5 * (b.double() @ a.double()).T, magnitude, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "_AT_ONCE", 64)
        np.testing.assert_allclose(values(made, "c_fc.weight", 7), expected, rtol=0, atol=1e-5)


def test_dora_of_an_embedding() -> None:
    tensor, adapter, config = KINDS["dora-embedding"]
    model, (a, b, magnitude) = base(), adapter.values()
    expected = normed(model[tensor].double() + 1.5 * (b.double() @ a.double()).T, magnitude, 1)
    np.testing.assert_allclose(values(adapted(model, adapter, **config), tensor), expected, rtol=0, atol=1e-5)


def test_dora_of_a_convolution() -> None:
    model, magnitude = {"conv.weight": normal(5, 3, 2, 2)}, normal(5).abs() + 1
    a, b = normal(2, 3, 2, 2, seed=1), normal(5, 2, 1, 1, seed=2)
    names = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    tensors = zip(names, (a, b, magnitude.reshape(1, 5, 1, 1)), strict=True)
    made = adapted(model, {f"{PREFIX}conv.{name}": tensor for name, tensor in tensors}, use_dora=True)
    delta = torch.einsum("or,rihw->oihw", b[:, :, 0, 0].double(), a.double())
    expected = normed(model["conv.weight"].double() + 1.5 * delta, magnitude, 0)
    np.testing.assert_allclose(values(made, "conv.weight"), expected, rtol=0, atol=1e-5)


# --- whole tensors ---


def test_a_saved_module_takes_the_place_of_the_bases() -> None:
    adapter = pair(K, 4, 6) | {f"{PREFIX}lm_head.weight": normal(10, 6, seed=5), f"{PREFIX}{Q}.bias": normal(6, seed=6)}
    made = adapted(base(), adapter, modules_to_save=["lm_head"], bias="lora_only")
    assert not made.computed("lm_head.weight")
    assert made.stored("lm_head.weight") == (made.adapter.weights, f"{PREFIX}lm_head.weight")
    assert made.file_of("lm_head.weight") == Path("adapter/adapter_model.safetensors")
    for name in ("lm_head.weight", f"{Q}.bias"):
        np.testing.assert_array_equal(values(made, name), adapter[f"{PREFIX}{name}"].numpy())
    address, owner = made.address("lm_head.weight")
    assert address - made.adapter.weights.address(f"{PREFIX}lm_head.weight")[0] == 0
    del owner


def test_a_saved_module_of_another_dtype_is_widened_and_keeps_the_bases() -> None:
    new = normal(10, 6, seed=5, dtype="F16")
    made = adapted(base("BF16"), {f"{PREFIX}lm_head.weight": new})
    assert made.computed("lm_head.weight")
    assert made.tensors["lm_head.weight"].dtype == "BF16"
    np.testing.assert_array_equal(values(made, "lm_head.weight", 3), new.float().numpy())


def test_an_adapter_grows_the_vocabulary() -> None:
    adapter = {f"{PREFIX}{EMBED}.weight": normal(12, 6, seed=5), f"{PREFIX}lm_head.weight": normal(12, 6, seed=6)}
    save_base(base(), text_config={"vocab_size": 10, "hidden_size": 10})
    Path("base/tokenizer.json").write_text("{}")
    made = Adapted(open_checkpoint("base"), open_adapter(save_adapter(adapter)))
    assert made.tokenizer_folder is None
    assert made.tensors["lm_head.weight"].shape == (12, 6)
    assert made.config["vocab_size"] == 12
    assert made.config["text_config"] == {"vocab_size": 12, "hidden_size": 10}
    assert made.base.config["vocab_size"] == 10
    Path("adapter/tokenizer.json").write_text("{}")
    assert made.tokenizer_folder == Path("adapter")


def test_a_saved_embedding_is_added_to() -> None:
    _, adapter, _ = KINDS["embedding"]
    new = normal(10, 6, seed=5)
    made = adapted(base("BF16"), adapter | {f"{PREFIX}{EMBED}.base_layer.weight": new})
    a, b = adapter.values()
    near(values(made, f"{EMBED}.weight", 4), new, a.T, b.T, 1.5)


def test_a_tokenizer_comes_from_the_adapter_where_the_base_has_none() -> None:
    made = adapted(base(), pair(K, 4, 6))
    assert made.tokenizer_folder is None
    Path("adapter/tokenizer.json").write_text("{}")
    assert made.tokenizer_folder == Path("adapter")
    Path("base/tokenizer.json").write_text("{}")
    assert made.tokenizer_folder is None


def test_a_tied_head_that_was_saved_twice_is_left_out() -> None:
    model = {name: tensor for name, tensor in base().items() if name != "lm_head.weight"}
    new = normal(10, 6, seed=5)
    made = adapted(model, {f"{PREFIX}{EMBED}.weight": new, f"{PREFIX}lm_head.weight": new.clone()})
    assert "lm_head.weight" not in made.tensors
    np.testing.assert_array_equal(values(made, f"{EMBED}.weight"), new.numpy())


SAVED_EMBEDDING = {f"{PREFIX}{EMBED}.weight": normal(10, 6, seed=5)}


@pytest.mark.parametrize(
    ("tied", "adapter", "config"),
    [
        (False, KINDS["embedding"][1], {}),
        (True, KINDS["embedding"][1], {}),
        (False, SAVED_EMBEDDING, {"modules_to_save": ["embed_tokens"]}),
        (True, SAVED_EMBEDDING, {"modules_to_save": ["embed_tokens"]}),
    ],
    ids=["untied", "tied", "untied-saved", "tied-saved"],
)
def test_a_head_that_is_tied_to_what_changes_is_told(
    tied: bool, adapter: Tensors, config: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    save_base({name: tensor for name, tensor in base().items() if name != "lm_head.weight"}, tie_word_embeddings=tied)
    save_adapter(adapter, **config)
    make_plan(Recipe.parse(MERGE.format("base+adapter")))
    told = [str(each.message) for each in recwarn if each.category is FastmergeWarning]
    fault = "base+adapter: its head is tied to the embeddings that the adapter changes, and changes with them"
    assert told == [fault] * tied


@pytest.mark.parametrize(
    "config",
    [{}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}],
    ids=["resized", "kept-tied"],
)
def test_a_head_that_peft_ties_as_well_is_not_told(config: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    save_base({name: tensor for name, tensor in base().items() if name != "lm_head.weight"}, tie_word_embeddings=True)
    save_adapter(SAVED_EMBEDDING, **config)
    make_plan(Recipe.parse(MERGE.format("base+adapter")))
    assert not [each for each in recwarn if each.category is FastmergeWarning]


# --- names ---


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("base_model.model.model.layers.0.up", "model.layers.0.up"),
        ("base_model.model.layers.0.up", "model.layers.0.up"),
        ("base_model.model.model.layers.0.up", "layers.0.up"),
        ("base_model.model.transformer.h.0.up", "h.0.up"),
        ("base_model.model.h.0.up", "transformer.h.0.up"),
        ("model.layers.0.up", "model.layers.0.up"),
    ],
)
@pytest.mark.parametrize("default", ["", ".default", ".my-adapter"])
def test_names_are_those_of_the_base(theirs: str, ours: str, default: str) -> None:
    a, b = normal(2, 6, seed=1), normal(4, 2, seed=2)
    adapter = {f"{theirs}.lora_A{default}.weight": a, f"{theirs}.lora_B{default}.weight": b}
    model = {f"{ours}.weight": normal(4, 6)}
    near(values(adapted(model, adapter), f"{ours}.weight"), *model.values(), b, a, 1.5)


def refusal(model: Tensors, adapter: Tensors, **config: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        adapted(model, adapter, **config)
    return str(caught.value)


A, B = f"{PREFIX}{K}.lora_A.weight", f"{PREFIX}{K}.lora_B.weight"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({A: normal(2, 6)}, f"{A!r} is there without its lora_B"),
        ({B: normal(4, 2)}, f"{B!r} is there without its lora_A"),
        ({A: normal(2, 6), B: normal(4, 3)}, "[2, 6] and 'base_model.model.model.layers.0.self_attn.k_proj.lora_B"),
        ({A: normal(2, 6), B: normal(2)}, "which have no product"),
        ({A: normal(2, 6).to(torch.int8), B: normal(4, 2)}, f"{A!r} is I8, and an adapter's tensors are floating"),
        (pair(K, 4, 6) | {f"{PREFIX}{K}.lora_diag": normal(2)}, "lora_diag' is no part of LoRA that is known here"),
        (pair(K, 4, 6) | {f"{PREFIX}{K}.lora_A.bias": normal(2)}, "lora_A.bias' is no part of LoRA"),
        (
            pair(K, 4, 6) | {f"{PREFIX}{K}.lora_B.bias": normal(4)},
            "has a bias, and adapter_config.json says lora_bias: false",
        ),
        (
            pair(K, 4, 6) | {f"{PREFIX}{K}.lora_magnitude_vector": normal(4)},
            "has a magnitude, and adapter_config.json says use_dora: false",
        ),
        (
            pair(K, 4, 6) | {f"{PREFIX}{K}.lora_A.other.weight": normal(2, 6)},
            f"lora_A.other.weight' and {A!r} are the same part",
        ),
        ({}, "it holds no tensors"),
        (pair(K, 4, 7), "which does not fit 'model.layers.0.self_attn.k_proj.weight' of base, [4, 6]"),
        (pair(K, 5, 6), "which does not fit 'model.layers.0.self_attn.k_proj.weight' of base, [4, 6]"),
        (
            {f"{PREFIX}{K}.lora_embedding_A": normal(2, 6), f"{PREFIX}{K}.lora_embedding_B": normal(4, 2)},
            "which does not fit 'model.layers.0.self_attn.k_proj.weight' of base, [4, 6]",
        ),
        (
            pair("model.layers.7.self_attn.k_proj", 4, 6) | pair("model.layers.0.self_attn.kv", 4, 6),
            f"adapter: these tensors have no place in base: {PREFIX}model.layers.0.self_attn.kv.lora_A.weight, "
            f"{PREFIX}model.layers.7.self_attn.k_proj.lora_A.weight; take the base that it was trained on, org/a",
        ),
        ({f"{PREFIX}score.weight": normal(2, 6)}, f"no place in base: {PREFIX}score.weight; take the base"),
        (
            {f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta": normal(2, 6)},
            "trainable_tokens_delta; take the base",
        ),
        (
            {f"{PREFIX}{EMBED}.weight": normal(12, 6)},
            "'model.embed_tokens.weight' has 12 rows, and 'lm_head.weight' has 10",
        ),
        ({f"{PREFIX}lm_head.weight": normal(10, 7)}, "is [10, 7], and 'lm_head.weight' of base [10, 6]"),
        (
            {f"{PREFIX}{K}.weight": normal(5, 6)},
            "is [5, 6], and 'model.layers.0.self_attn.k_proj.weight' of base [4, 6]",
        ),
        ({f"{PREFIX}model.norm.weight": normal(6, 1)}, "is [6, 1], and 'model.norm.weight' of base [6]"),
        (
            pair("embed_tokens", 10, 6) | pair("model.embed_tokens", 10, 6),
            "two of its tensors are for 'model.embed_tokens.weight' of base",
        ),
    ],
)
def test_adapters_that_do_not_fit(adapter: Tensors, message: str) -> None:
    assert message in refusal(base(), adapter, base_model_name_or_path="org/a")


def test_a_bias_needs_one_in_the_base() -> None:
    adapter = pair(K, 4, 6) | {f"{PREFIX}{K}.lora_B.bias": normal(4)}
    assert f"no place in base: {PREFIX}{K}.lora_B.bias" in refusal(base(), adapter, lora_bias=True)


def test_a_magnitude_has_one_number_for_each_output() -> None:
    adapter = pair(K, 4, 6) | {f"{PREFIX}{K}.lora_magnitude_vector": normal(6)}
    assert "lora_magnitude_vector' is [6], and 'base_model" in refusal(base(), adapter, use_dora=True)


def test_a_name_that_may_be_two_is_refused() -> None:
    towers = {f"{tower}.layers.0.up.weight": normal(4, 6) for tower in ("text", "vision")}
    message = refusal(towers, pair("layers.0.up", 4, 6))
    assert "lora_A.weight' may be for 'text.layers.0.up.weight' or 'vision.layers.0.up.weight' of base" in message


def test_codes_are_not_added_to() -> None:
    model = base() | {f"{K}.weight": torch.zeros(4, 6, dtype=torch.int8)}
    assert f"'{K}.weight' is I8 in base: dequantise that first" in refusal(model, pair(K, 4, 6))


def test_a_head_that_is_tied_says_so() -> None:
    model = {name: tensor for name, tensor in base().items() if name != "lm_head.weight"}
    save_base(model, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="its head is tied to its embeddings, so save it untied first"):
        Adapted(open_checkpoint("base"), open_adapter(save_adapter(pair("lm_head", 10, 6))))


# --- folders ---


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "x holds no adapter: there is no adapter_config.json and no adapter_model.safetensors; name the folder"),
        (["adapter_config.json"], "x holds no adapter: there is no adapter_model.safetensors"),
        (["adapter_model.safetensors"], "x holds no adapter: there is no adapter_config.json"),
        (
            ["adapter_config.json", "adapter_model.bin"],
            "x holds PyTorch files only (adapter_model.bin): pickle is never",
        ),
        (["config.json", "model.safetensors"], "x is a whole model, no adapter: list it as a model of its own"),
    ],
)
def test_folders_that_are_no_adapters(files: Sequence[str], message: str) -> None:
    Path("x").mkdir()
    for file in files:
        Path("x", file).touch()
    with pytest.raises(CheckpointError) as caught:
        open_adapter("x")
    assert message in str(caught.value)


def test_a_file_is_no_adapter() -> None:
    save_adapter(pair(K, 4, 6))
    with pytest.raises(CheckpointError, match="is no folder: an adapter is one"):
        open_adapter("adapter/adapter_model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is no config of an adapter: it is not an object; fetch it again"),
        ('{"r": 1, "r": 2}', "the name 'r' is there twice"),
        ("<!doctype html>", "is an HTML page"),
        ('{"r": 1e999}', "out of range"),
    ],
)
def test_a_config_that_is_none(text: str, message: str) -> None:
    Path(save_adapter(pair(K, 4, 6)), "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        open_adapter("adapter")
    assert str(caught.value).startswith("adapter/adapter_config.json")
    assert message in str(caught.value)


def test_a_file_that_changes_is_noticed() -> None:
    made = adapted(base(), pair(K, 4, 6))
    made.check_unchanged()
    file = Path("adapter/adapter_model.safetensors")
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors changed while it was read"):
        made.check_unchanged()


def test_an_adapter_that_is_cut_is_an_error() -> None:
    made = adapted(base(), pair(K, 4, 6))
    with open("adapter/adapter_model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(CheckpointError, match="became shorter"):
        values(made, f"{K}.weight")


def test_a_base_that_is_cut_is_an_error(core: str) -> None:
    made = adapted({"a.weight": normal(64, 512)}, pair("a", 64, 512))
    values(made, "a.weight")  # which maps it
    with open("base/model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="became shorter"):
        values(made, "a.weight")


# --- in a recipe ---

MERGE = "merge_method: task_arithmetic\nbase_model: base\nmodels:\n  - model: {}\n    parameters: {{weight: 1}}\n"


def parsed(written: str) -> Model:
    """The model of a recipe."""
    (document,) = Recipe.parse(f"merge_method: linear\n\nmodels:\n  - model: {written}\n", "recipe.yml").documents
    return document.models[0]


def hub(id: str, revision: str | None = None) -> Repository:
    return Repository(id, revision, "")


@pytest.mark.parametrize(
    ("written", "base", "adapter"),
    [
        ("base+adapter", Path("base"), Path("adapter")),
        ("org/base+adapter", hub("org/base"), Path("adapter")),
        ("org/base@v1+org/adapter@v2", hub("org/base", "v1"), hub("org/adapter", "v2")),
        ("base+org/adapter", Path("base"), hub("org/adapter")),
        ("base+x", Path("base+x"), None),
        ("{model: base, lora: adapter}", Path("base"), Path("adapter")),
        ("{model: {path: base}, lora: {path: adapter, revision: null}}", Path("base"), Path("adapter")),
        ("{model: {path: c++/m@1}, lora: {path: c++/l}}", Path("c++/m@1"), Path("c++/l")),
        ("{model: {path: org/a, revision: v1}, lora: org/b@v2}", hub("org/a", "v1"), hub("org/b", "v2")),
        ("{model: {path: org/a, revision: v1}}", hub("org/a", "v1"), None),
        ("{model: base, lora: null}", Path("base"), None),
    ],
)
def test_how_models_with_adapters_are_written(written: str, base: object, adapter: object) -> None:
    for folder in ("base", "adapter", "c++/m@1", "c++/l", "base+x"):
        Path(folder).mkdir(parents=True)
    model = parsed(written)
    assert (model.path or model.repository) == base
    assert (model.adapter and (model.adapter.path or model.adapter.repository)) == adapter


@pytest.mark.parametrize(
    ("written", "place", "message"),
    [
        ("base+a b", "", "there is no file or folder 'base+a b', and no 'a b' either"),
        ("a b+adapter", "", "there is no file or folder 'a b+adapter', and no 'a b' either"),
        ("base+", "", "there is no file or folder 'base+', and no '' either"),
        ("+adapter", "", "there is no file or folder '+adapter', and no '' either"),
        ("base+adapter+more", "", "it has more than one +: write {model: {path: ...}, lora: {path: ...}} in its place"),
        ("{lora: adapter}", "", "model is missing; it is a folder, a hub id, or {path: ..., revision: ...}"),
        ("{path: base}", ".path", "unknown key 'path'"),
        ("{model: {revision: v1}}", ".model", "path is missing; it is a folder or a hub id"),
        ("{model: {path: ./nowhere}}", ".model.path", "there is no file or folder './nowhere'"),
        ("{model: base, lora: {path: ./nowhere}}", ".lora.path", "there is no file or folder './nowhere'"),
        ("{model: base, lora: {path: adapter, name: x}}", ".lora.name", "unknown key 'name'"),
        ("{model: [base]}", ".model", "this must be text, not a list"),
    ],
)
def test_models_with_adapters_that_are_not_there(written: str, place: str, message: str) -> None:
    for folder in ("base", "adapter"):
        Path(folder).mkdir()
    with pytest.raises(RecipeError) as caught:
        parsed(written)
    assert message in str(caught.value)
    assert caught.value.place == f"recipe.yml:4: models[0].model{place}"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "{model: {path: a, revision: v1}}",
            "models[0].model.model.revision: revision has no effect: 'a' is not taken",
        ),
        ("{model: a, override_architecture: X}", "models[0].model.override_architecture: override_architecture has no"),
    ],
)
def test_what_has_no_effect_is_told(written: str, message: str) -> None:
    Path("a").mkdir()
    with pytest.warns(FastmergeWarning) as told:
        assert parsed(written).path == Path("a")
    assert message in str(told[0].message)


def test_adapters_make_models_of_one_base_different() -> None:
    for folder in ("base", "one", "two"):
        Path(folder).mkdir()
    text = MERGE.format("base+one") + "  - model: ./base+./two\n    parameters: {weight: 1}\n"
    first, second, third = Recipe.parse(text).documents[0].models
    assert (first.adapter, first.path) == (None, second.path)
    assert (first.text, second.text, third.text) == ("base", "base+one", "base+./two")
    with pytest.raises(RecipeError, match=r"the model 'base\+one' is here twice"):
        Recipe.parse(MERGE.format("base+one") + "  - model: ./base+./one\n    parameters: {weight: 1}\n")


def test_a_base_is_opened_once() -> None:
    save_base(base())
    save_adapter(pair(K, 4, 6), "one")
    save_adapter(pair(DOWN, 6, 35), "two")
    text = MERGE.format("base+one") + "  - model: base+two\n    parameters: {weight: 1}\n"
    (stage,) = make_plan(Recipe.parse(text)).stages
    plain, one, two = stage.models
    assert isinstance(one, Adapted)
    assert isinstance(two, Adapted)
    assert one.base is plain
    assert two.base is plain
    assert [model.name for model in stage.models] == ["base", "base+one", "base+two"]
    assert [job.name for job in stage.jobs if job.gather] == [f"{K}.weight", f"{DOWN}.weight"]
    assert {job.dtype for job in stage.jobs} == {"F32"}


def test_an_adapter_goes_over_what_a_stage_makes() -> None:
    save_base(base())
    save_adapter(pair(K, 4, 6))
    first = "name: between\nmerge_method: linear\nmodels: [model: base]\nparameters: {weight: 1}\n---\n"
    *_, stage = make_plan(Recipe.parse(first + MERGE.format("between+adapter"))).stages
    (made,) = (model for model in stage.models if isinstance(model, Adapted))
    assert isinstance(made.base, Planned)
    assert made.inputs == (Path("adapter"),)
    assert made.name == "between+adapter"
    assert made.computed(f"{K}.weight")
    assert made.config["vocab_size"] == 10
    over = made.over(open_checkpoint("base"))
    np.testing.assert_array_equal(values(over, f"{K}.weight"), values(Adapted(over.base, made.adapter), f"{K}.weight"))


def test_an_adapter_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(base())
    save_adapter(pair(K, 4, 6), "cache")
    asked = []

    def fetched(id: str, revision: str | None, *, adapter: bool = False) -> Snapshot:
        asked.append((id, revision, adapter))
        return Snapshot(Path("cache"), "c" * 40)

    monkeypatch.setattr(planner, "snapshot", fetched)
    (stage,) = make_plan(Recipe.parse(MERGE.format("base+org/adapter@v1"))).stages
    assert asked == [("org/adapter", "v1", True)]
    assert stage.models[1].name == "base+org/adapter@v1"
    assert stage.commits == {"org/adapter@v1": "c" * 40}


def test_an_adapter_that_is_not_on_the_hub_tells_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(base())

    def fetched(id: str, *_: object, **__: object) -> Snapshot:
        raise CheckpointError(f"no {id}")

    monkeypatch.setattr(planner, "snapshot", fetched)
    with pytest.raises(CheckpointError, match=r"^recipe.yml:4: models\[0\]\.model: no org/adapter$"):
        make_plan(Recipe.parse(MERGE.format("base+org/adapter"), "recipe.yml"))


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md", "optimizer.pt"}, ""),
        ({"adapter_config.json", "adapter_model.bin"}, "org/a holds PyTorch files only (adapter_model.bin)"),
        ({"config.json", "model.safetensors"}, "org/a is a whole model, no adapter"),
    ],
    ids=["adapter", "pickle", "model"],
)
def test_what_is_fetched_of_an_adapter(held: set[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

    def download(_: str, *, allow_patterns: list[str], **__: object) -> str:
        folder = Path("snapshots", "c" * 40)
        folder.mkdir(parents=True, exist_ok=True)
        for name in held.intersection(allow_patterns):
            (folder / name).touch()
        return str(folder)

    monkeypatch.setattr(client, "snapshot_download", download)
    monkeypatch.setattr(client.HfApi, "list_repo_files", lambda *_, **__: sorted(held))
    if message:
        with pytest.raises(CheckpointError) as caught:
            snapshot("org/a", None, adapter=True)
        assert message in str(caught.value)
    else:
        folder, commit = snapshot("org/a", None, adapter=True)
        assert commit == "c" * 40
        assert {path.name for path in folder.iterdir()} == held - {"optimizer.pt"}


# --- merges ---


def deltas(adapter: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    """What an adapter adds, in float64, by the name of the weight."""
    modules = [name.removesuffix(".lora_A.weight") for name in adapter if name.endswith(".lora_A.weight")]
    return {
        f"{module.removeprefix(PREFIX)}.weight": scaling
        * (adapter[f"{module}.lora_B.weight"].double() @ adapter[f"{module}.lora_A.weight"].double())
        for module in modules
    }


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_two_adapters_of_one_base_are_merged(dtype: str) -> None:
    model, one, two = base(dtype), pair(K, 4, 6) | pair(DOWN, 6, 35), pair(K, 4, 6) | pair(Q, 6, 6)
    save_base(model)
    save_adapter(one, "one")
    save_adapter(two, "two", lora_alpha=1)
    recipe = "merge_method: task_arithmetic\nbase_model: base\nparameters: {lambda: 0.5}\nmodels:\n"
    recipe += "  - {model: base+one, parameters: {weight: 0.25}}\n  - {model: base+two, parameters: {weight: 2}}\n"
    Path("recipe.yml").write_text(recipe)
    merge("recipe.yml", "out")
    found = load_file("out/model.safetensors")
    assert found.keys() == model.keys()
    ours, theirs = deltas(one, 1.5), deltas(two, 0.5)
    for name, tensor in model.items():
        delta = 0.5 * (0.25 * ours.get(name, torch.zeros(())) + 2 * theirs.get(name, torch.zeros(())))
        assert found[name].dtype == TORCH[dtype]
        room = {"F32": 1e-5, "BF16": 2**-7, "F64": 1e-12}[dtype]
        torch.testing.assert_close(found[name].double(), tensor.double() + delta, rtol=room, atol=room)


def trimmed(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The largest magnitudes of a tensor, in float64."""
    cut = delta.abs().flatten().sort(descending=True).values[max(1, int(density * delta.numel())) - 1]
    return torch.where(delta.abs() >= cut, delta, torch.zeros(()).double())


def test_ties_of_two_adapters_is_that_of_their_true_deltas() -> None:
    model, one, two = base(), pair(DOWN, 6, 35), {name: -tensor for name, tensor in pair(DOWN, 6, 35, 3).items()}
    save_base(model)
    save_adapter(one, "one")
    save_adapter(two, "two", r=3)
    recipe = "merge_method: ties\nbase_model: base\nparameters: {density: 0.4, weight: 1}\nmodels:\n"
    Path("recipe.yml").write_text(recipe + "  - model: base+one\n  - model: base+two\n")
    merge("recipe.yml", "out")
    (ours,), (theirs,) = (deltas(*each).values() for each in ((one, 1.5), (two, 1.0)))
    kept = torch.stack([trimmed(ours, 0.4), trimmed(theirs, 0.4)])
    vote = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    agree = kept.sign() == vote
    mean = (kept * agree).sum(0) / agree.sum(0).clamp(min=1)
    found = load_file("out/model.safetensors")[f"{DOWN}.weight"]
    torch.testing.assert_close(found.double(), model[f"{DOWN}.weight"].double() + mean, rtol=1e-5, atol=1e-5)


def test_a_merge_is_the_same_bytes_for_any_threads(core: str) -> None:
    model, one = {"a.weight": normal(900, 400, dtype="BF16")}, pair("a", 900, 400, 8)
    save_base(model)
    save_adapter(one, r=8)
    Path("recipe.yml").write_text(MERGE.format("base+adapter"))
    made = []
    for threads in (1, 3):
        merge("recipe.yml", f"out{threads}", threads=threads)
        made.append(Path(f"out{threads}/model.safetensors").read_bytes())
    assert made[0] == made[1]
    expected = model["a.weight"].double() + deltas(one, 3 / 8)["a.weight"]
    found = load_file("out1/model.safetensors")["a.weight"].double()
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=1e-6)


def test_an_adapter_alone_is_fused_by_passthrough() -> None:
    model, adapter = base("BF16"), pair(K, 4, 6) | {f"{PREFIX}lm_head.weight": normal(10, 6, seed=4, dtype="BF16")}
    save_base(model)
    save_adapter(adapter)
    Path("recipe.yml").write_text("merge_method: passthrough\nmodels:\n  - model: base+adapter\n")
    merge("recipe.yml", "out")
    found = load_file("out/model.safetensors")
    assert torch.equal(found["lm_head.weight"], adapter[f"{PREFIX}lm_head.weight"])
    made = Adapted(open_checkpoint("base"), open_adapter("adapter"))
    fused = torch.from_numpy(values(made, f"{K}.weight")).to(torch.bfloat16)
    assert torch.equal(found[f"{K}.weight"], fused)
    assert torch.equal(found[f"{Q}.weight"], model[f"{Q}.weight"])


def test_an_adapter_over_a_document_is_merged() -> None:
    save_base(base())
    save_adapter(pair(K, 4, 6))
    first = "name: between\nmerge_method: linear\nmodels: [model: base]\nparameters: {weight: 1}\n---\n"
    Path("recipe.yml").write_text(first + MERGE.format("between+adapter"))
    merge("recipe.yml", "out")
    a, b = pair(K, 4, 6).values()
    found = load_file("out/model.safetensors")[f"{K}.weight"]
    near(found.numpy().astype(np.float32), base()[f"{K}.weight"], b, a, 1.5)


# --- beside PEFT ---


def llama(**config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **config))


def gpt2(**config: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=40, n_positions=16, **config))


def vit(**config: Any) -> Any:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4, **config))


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PATTERNS = {
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.*": 3},
    "alpha_pattern": {"q_proj": 5, "model.layers.0.*up_proj": 7},
}


@pytest.mark.parametrize(
    ("make", "sizes", "config"),
    [
        (llama, {}, {"target_modules": "all-linear"}),
        (llama, {}, {"target_modules": "all-linear", "use_rslora": True} | PATTERNS),
        (llama, {}, {"target_modules": "all-linear", "use_dora": True}),
        (llama, {}, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
        (llama, {}, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
        (llama, {}, {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
        (llama, {"attention_bias": True}, {"target_modules": ATTENTION, "bias": "all"}),
        (llama, {"attention_bias": True}, {"target_modules": ATTENTION, "bias": "lora_only"}),
        (llama, {"attention_bias": True}, {"target_modules": ATTENTION, "lora_bias": True}),
        (llama, {}, {"target_modules": ATTENTION, "layers_to_transform": [1]}),
        (gpt2, {}, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
        (gpt2, {}, {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True, "fan_in_fan_out": True}),
        (gpt2, {"tie_word_embeddings": False}, {"target_modules": ["c_proj", "wte", "lm_head"]}),
        (vit, {}, {"target_modules": ["projection"]}),
        (vit, {}, {"target_modules": ["projection"], "use_dora": True}),
    ],
    ids=[
        *("linear", "patterns", "dora", "embeddings", "dora-embeddings", "saved", "bias", "own-bias", "lora-bias"),
        *("layers", "conv1d", "dora-conv1d", "mixed", "conv2d", "dora-conv2d"),
    ],
)
def test_values_are_those_of_peft(make: Any, sizes: dict[str, Any], config: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    model = make(**sizes)
    model.save_pretrained("base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained("adapter")
    wrapped.merge_and_unload().save_pretrained("fused")
    made = Adapted(open_checkpoint("base"), open_adapter("adapter"))
    fused, before = load_file("fused/model.safetensors"), load_file("base/model.safetensors")
    assert made.tensors.keys() == fused.keys()
    for name, tensor in fused.items():
        np.testing.assert_allclose(values(made, name), tensor.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
        assert made.computed(name) or name in made.adapter.replaced or torch.equal(tensor, before[name])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in fused.items())


def test_a_vocabulary_that_was_resized_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained("base")
    model.resize_token_embeddings(43)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    wrapped.save_pretrained("adapter", save_embedding_layers=True)
    wrapped.merge_and_unload().save_pretrained("fused")
    made = Adapted(open_checkpoint("base"), open_adapter("adapter"))
    for name, tensor in load_file("fused/model.safetensors").items():
        np.testing.assert_allclose(values(made, name), tensor.numpy(), rtol=1e-5, atol=1e-6, err_msg=name)
    assert made.config["vocab_size"] == json.loads(Path("fused/config.json").read_text())["vocab_size"] == 43
