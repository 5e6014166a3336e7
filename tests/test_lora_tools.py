"""LoRA adapters made here: low-rank factors, combined and extracted adapters, and that PEFT takes them as its own."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from safetensors.torch import load_file
from test_lora import (
    ATTENTION,
    DOWN,
    EMBED,
    PATTERNS,
    PREFIX,
    K,
    Q,
    Tensors,
    base,
    gpt2,
    llama,
    normal,
    pair,
    save_adapter,
    save_base,
    values,
)

import fastmerge
from fastmerge import CheckpointError, FastmergeWarning, MismatchError, NonFiniteError, OutputError, RecipeError, cli
from fastmerge.checkpoint import open_checkpoint
from fastmerge.hub import Snapshot
from fastmerge.lora import AdapterReport, combine, combining, extract, factors, fuse
from fastmerge.lora.factors import Dense, Factors, Product
from fastmerge.sources.adapter import Adapter, open_adapter
from fastmerge.sources.lora import Adapted

EPS = float(np.finfo(np.float32).eps)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- factors ---


def product(of: Factors) -> np.ndarray:
    return of.left.astype(np.float64) @ of.right.astype(np.float64)


def nearest(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """The nearest matrix of a rank, and how far it is (Eckart and Young), in float64."""
    u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank], float(np.linalg.norm(values[rank:]))


def decaying(rows: int, columns: int, rate: float, seed: int = 0) -> np.ndarray:
    """A matrix in float32 whose k-th singular value is rate^k."""
    rng, small = np.random.default_rng([seed, rows, columns]), min(rows, columns)
    u, v = (np.linalg.qr(rng.standard_normal((size, small)))[0] for size in (rows, columns))
    return ((u * rate ** np.arange(small)) @ v.T).astype(np.float32)


@pytest.mark.parametrize(("rows", "columns", "inner"), [(7, 9, 4), (9, 7, 4), (5, 6, 8), (1, 4, 2), (6, 1, 2)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_a_product_is_truncated_without_being_formed(rows: int, columns: int, inner: int, rank: int) -> None:
    rng = np.random.default_rng([rows, columns, inner])
    target = Product(rng.standard_normal((rows, inner)), rng.standard_normal((inner, columns)))
    found = target.truncated(rank)
    matrix = target.left @ target.right
    expected, distance = nearest(matrix, rank)
    assert found.rank == min(rank, rows, columns, inner)
    np.testing.assert_allclose(product(found), expected, rtol=0, atol=1e-12)
    assert target.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-13)
    assert target.distance(found) == pytest.approx(distance, rel=1e-9, abs=1e-12)
    norms = [np.linalg.norm(each) for each in found]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)


@pytest.fixture(params=["decomposed", "sketched"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Dense matrices by their Gram matrix, then by a sketch however small they are; the other way is a failure."""
    sketched = request.param == "sketched"
    monkeypatch.setattr(factors, "_SMALL", 0 if sketched else 1 << 20)
    monkeypatch.setattr(factors, "_WORTH", 0)
    monkeypatch.setattr(factors, "_BLOCK", 1000)
    other = "_decomposed" if sketched else "_sketched"
    monkeypatch.setattr(Dense, other, lambda *_: pytest.fail("the other way was taken"))
    return str(request.param)


@pytest.mark.parametrize("shape", [(90, 200), (200, 90)])
def test_a_dense_matrix_is_truncated(way: str, shape: tuple[int, int]) -> None:
    matrix = decaying(*shape, 0.8)
    found = Dense(matrix).truncated(12)
    expected, distance = nearest(matrix, 12)
    assert found.rank == 12
    # Rounding moves each singular vector by about eps over the gap, which is 0.2 of its value.
    np.testing.assert_allclose(product(found), expected, rtol=0, atol=100 * EPS)
    assert Dense(matrix).distance(found) == pytest.approx(distance, rel=1e-4)


def test_a_sketch_of_a_flat_spectrum_is_nearly_as_near_as_there_is(way: str) -> None:
    matrix = np.random.default_rng(3).standard_normal((150, 260)).astype(np.float32)
    found = Dense(matrix).truncated(8)
    _, distance = nearest(matrix, 8)
    assert Dense(matrix).distance(found) <= distance * 1.02


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_has_the_rank_comes_back(way: str, dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(4)
    matrix = (rng.standard_normal((120, 5)) @ rng.standard_normal((5, 80))).astype(dtype)
    dense = Dense(matrix)
    assert dense.distance(dense.truncated(5)) <= 20 * np.finfo(dtype).eps * dense.norm


def test_a_matrix_of_zeros_has_factors(way: str) -> None:
    dense = Dense(np.zeros((70, 80), np.float32))
    found = dense.truncated(3)
    assert (dense.norm, found.rank) == (0.0, 3)
    assert not product(found).any()


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_least_rank_that_holds_a_share(way: str, energy: float) -> None:
    matrix = decaying(90, 70, 0.97)
    found = Dense(matrix).holding(energy)
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    least = int(np.searchsorted(squares.cumsum(), energy * squares.sum() * (1 - 1e-6))) + 1
    assert least <= found.rank <= (least + 1 if energy < 1 else 70)
    kept = (np.linalg.norm(product(found)) / np.linalg.norm(matrix.astype(np.float64))) ** 2
    assert kept >= energy * (1 - 1e-5)


def test_the_same_factors_each_time(way: str) -> None:
    matrix = decaying(90, 200, 0.9)
    one, two = Dense(matrix).truncated(6), Dense(matrix.copy()).truncated(6)
    np.testing.assert_array_equal(one.left, two.left)
    np.testing.assert_array_equal(one.right, two.right)


# --- combine ---


def delta(adapter: Adapter, module: str) -> np.ndarray:
    """What an adapter adds to a module, in float64; zero where it adds nothing."""
    tensors = load_file(adapter.weights.path)
    for update in adapter.updates:
        if update.module == module:
            a, b = (tensors[info.name].double().numpy() for info in (update.a, update.b))
            return update.scaling * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    return np.zeros(())


def names_of(adapters: Sequence[Adapter]) -> list[str]:
    return list(dict.fromkeys(update.module for adapter in adapters for update in adapter.updates))


def two_adapters(dtype: str = "F32") -> list[Adapter]:
    """Of other modules, ranks and scalings, but for one module that is in both."""
    save_adapter(pair(K, 4, 6, 2, dtype) | pair(DOWN, 6, 35, 2, dtype), "one")
    other = {name: -tensor.flip(0) for name, tensor in pair(DOWN, 6, 35, 3, dtype).items()}
    save_adapter(pair(Q, 6, 6, 3, dtype) | other, "two", r=3, lora_alpha=2, use_rslora=True)
    return [open_adapter("one"), open_adapter("two")]


def made(out: str | Path = "out") -> Adapter:
    return open_adapter(out)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_cat_is_the_weighted_sum(dtype: str) -> None:
    adapters = two_adapters(dtype)
    report = combine(["one", "two"], "out", method="cat", weights=[0.7, -1.3])
    assert {each.module: each.rank for each in report.modules} == {K: 2, DOWN: 5, Q: 3}
    for module in names_of(adapters):
        expected = 0.7 * delta(adapters[0], module) - 1.3 * delta(adapters[1], module)
        eps = {"F32": 2**-23, "BF16": 2**-8, "F16": 2**-11, "F64": 2**-52}[dtype]
        np.testing.assert_allclose(delta(made(), module), expected, rtol=0, atol=8 * eps * abs(expected).max())
    assert {tensor.dtype for tensor in made().weights.tensors.values()} == {dtype}
    assert report.error <= 4 * eps


def test_cat_of_equal_scalings_keeps_every_bit() -> None:
    save_adapter(pair(K, 4, 6, 2, "BF16"), "one")
    save_adapter({name: tensor + 1 for name, tensor in pair(K, 4, 6, 2, "BF16").items()}, "two")
    report = combine(["one", "two"], "out", method="cat", weights=[0.3, 0.3])
    found, *both = (load_file(f"{name}/adapter_model.safetensors") for name in ("out", "one", "two"))
    for part, axis in (("A", 0), ("B", 1)):
        name = f"{PREFIX}{K}.lora_{part}.weight"
        assert torch.equal(found[name], torch.cat([each[name] for each in both], axis))
    assert made().updates[0].scaling == pytest.approx(0.3 * 1.5)
    assert report.error <= 1e-15


@pytest.mark.parametrize("method", ["svd", "linear", "task_arithmetic"])
@pytest.mark.parametrize("rank", [None, 1, 4, 50])
def test_a_sum_is_the_nearest_of_its_rank(method: str, rank: int | None) -> None:
    adapters = two_adapters()
    report = combine(["one", "two"], "out", method=method, weights=[0.7, -1.3], rank=rank)
    squares = norms = 0.0
    for each in report.modules:
        whole = 0.7 * delta(adapters[0], each.module) - 1.3 * delta(adapters[1], each.module)
        most = {K: 2, Q: 3, DOWN: 5}[each.module]
        wanted = {K: 2, Q: 3, DOWN: 3}[each.module] if rank is None else min(rank, most)
        expected, distance = nearest(whole, wanted)
        assert each.rank == wanted
        np.testing.assert_allclose(delta(made(), each.module), expected, rtol=0, atol=20 * EPS * abs(whole).max())
        assert each.error == pytest.approx(distance / np.linalg.norm(whole), rel=1e-5, abs=4 * EPS)
        assert each.norm == pytest.approx(np.linalg.norm(whole), rel=1e-6)
        squares, norms = squares + distance**2, norms + np.linalg.norm(whole) ** 2
    assert report.error == pytest.approx(math.sqrt(squares / norms), rel=1e-5, abs=4 * EPS)


def flat(adapter: Adapter, module: str, shape: tuple[int, int]) -> np.ndarray:
    return np.broadcast_to(delta(adapter, module), shape).ravel()


SHAPES = {K: (4, 6), Q: (6, 6), DOWN: (6, 35)}
DENSITIES, WEIGHTS = [0.6, 0.6], [0.7, 1.3]
ORACLES: dict[str, Callable[[np.ndarray, list[np.ndarray]], np.ndarray]] = {
    "ties": lambda zero, d: oracles.ties(zero, d, WEIGHTS, DENSITIES),
    "ties_svd": lambda zero, d: oracles.ties(zero, d, WEIGHTS, DENSITIES, elect="plain", divide="count"),
    "magnitude_prune": lambda zero, d: oracles.breadcrumbs(zero, d, WEIGHTS, DENSITIES, [0.0, 0.0]),
    "magnitude_prune_svd": lambda zero, d: oracles.breadcrumbs(zero, d, WEIGHTS, DENSITIES, [0.0, 0.0]),
}


@pytest.mark.parametrize("method", ORACLES)
def test_methods_are_applied_to_the_true_deltas(method: str) -> None:
    """At a rank that holds all, what comes out is the method's result, in float64 from the papers."""
    adapters = two_adapters()
    report = combine(["one", "two"], "out", method=method, weights=WEIGHTS, density=0.6, rank=99)
    for module, shape in SHAPES.items():
        deltas = [flat(adapter, module, shape) for adapter in adapters]
        expected = ORACLES[method](np.zeros(math.prod(shape)), deltas).reshape(shape)
        np.testing.assert_allclose(delta(made(), module), expected, rtol=0, atol=30 * EPS * abs(expected).max())
    assert report.error <= 20 * EPS


METHODS = {
    "cat": {},
    "svd": {"rank": 99},
    "ties": {"density": 0.5, "rank": 99},
    "ties_svd": {"density": 0.5, "elect": "count", "rank": 99},
    "dare_linear": {"density": 0.5, "rank": 99},
    "dare_ties_svd": {"density": 0.5, "rank": 99, "lambda_": 0.5},
    "breadcrumbs": {"density": [0.5, 0.8], "gamma": 0.1, "rank": 99},
    "della": {"density": 0.5, "rank": 99},
    "model_stock": {"rank": 99, "weights": None},
    "multislerp": {"rank": 99},
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_what_the_model_becomes(method: str) -> None:
    """The model with a base is its base and the adapter: the same method, drops and all, over the same deltas."""
    save_base(base("F32"))
    two_adapters()
    options: dict[str, Any] = {"weights": WEIGHTS, "seed": 7} | METHODS[method]
    combine(["one", "two"], "adapter", method=method, **options)
    options.pop("rank", None)
    report = combine(["one", "two"], "model", method=method, base="base", **options)
    assert isinstance(report, fastmerge.Report)
    before, found = (load_file(f"{name}/model.safetensors") for name in ("base", "model"))
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        change = torch.from_numpy(np.broadcast_to(delta(made("adapter"), module), tensor.shape).copy())
        # The model takes its deltas from rounded sums, W + d - W: what is trimmed there may differ in its last bits.
        torch.testing.assert_close(tensor.double(), before[name].double() + change, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["cat", "svd", "ties", "peft_linear"])
def test_embeddings_and_convolutions_are_combined(method: str) -> None:
    tensors = {
        f"{PREFIX}{EMBED}.lora_embedding_A": normal(2, 10, seed=1),
        f"{PREFIX}{EMBED}.lora_embedding_B": normal(6, 2, seed=2),
        f"{PREFIX}conv.lora_A.weight": normal(2, 3, 2, 2, seed=3),
        f"{PREFIX}conv.lora_B.weight": normal(5, 2, 1, 1, seed=4),
    }
    save_adapter(tensors, "one")
    save_adapter({name: 2 * tensor for name, tensor in tensors.items()}, "two")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastmergeWarning)
        report = combine(["one", "two"], "out", method=method)
    found, one = load_file("out/adapter_model.safetensors"), made("one")
    rank = 4 if method == "cat" else 2
    assert {name.removeprefix(PREFIX): tuple(tensor.shape) for name, tensor in found.items()} == {
        f"{EMBED}.lora_embedding_A": (rank, 10),
        f"{EMBED}.lora_embedding_B": (6, rank),
        "conv.lora_A.weight": (rank, 3, 2, 2),
        "conv.lora_B.weight": (5, rank, 1, 1),
    }
    times = {"ties": 2.5, "peft_linear": 9.0}.get(method, 5.0)  # two adapters of d and 4 d; (1 + 2)^2 d where apart
    for module in (EMBED, "conv"):
        expected = times * delta(one, module)
        np.testing.assert_allclose(delta(made(), module), expected, rtol=0, atol=20 * EPS * abs(expected).max())
    assert report.error == pytest.approx(0.8 if method == "peft_linear" else 0.0, abs=1e-6)


def test_biases_are_combined() -> None:
    one = pair(K, 4, 6) | {f"{PREFIX}{K}.lora_B.bias": normal(4, seed=3)}
    save_adapter(one, "one", lora_bias=True)
    save_adapter(pair(K, 4, 6) | pair(Q, 6, 6), "two")
    combine(["one", "two"], "out", method="cat", weights=[0.5, 2])
    found = {update.module: update for update in made().updates}
    tensors = load_file("out/adapter_model.safetensors")
    for module, expected in ((K, 0.5 * 1.5 * one[f"{PREFIX}{K}.lora_B.bias"]), (Q, torch.zeros(6))):
        bias = found[module].bias
        assert bias is not None
        torch.testing.assert_close(found[module].scaling * tensors[bias.name], expected, rtol=1e-6, atol=0)


def test_whole_tensors_that_agree_are_taken_over() -> None:
    head = {f"{PREFIX}lm_head.weight": normal(10, 6, seed=5)}
    save_adapter(pair(K, 4, 6) | head, "one", modules_to_save=["lm_head"])
    save_adapter(pair(Q, 6, 6) | head, "two", modules_to_save=["lm_head"])
    with pytest.warns(FastmergeWarning, match=r"1 tensors, such as 'lm_head.weight', take the place of the base's"):
        report = combine(["one", "two"], "out")
    assert report.whole == ("lm_head.weight",)
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    found = load_file("out/adapter_model.safetensors")
    assert torch.equal(found[f"{PREFIX}lm_head.weight"], head[f"{PREFIX}lm_head.weight"])


def test_ranks_and_scalings_that_differ_are_in_the_patterns() -> None:
    save_adapter(pair("a.up", 4, 6, 1) | pair("b.a.up", 4, 6) | pair("b.down", 5, 6), "one", rank_pattern={"^a.up": 1})
    combine(["one"], "out", method="cat", weights=[3])
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 9)
    assert list(config["rank_pattern"].items()) == [("b.a.up", 2), ("a.up", 1)]
    assert config["alpha_pattern"] == {"b.a.up": 9, "a.up": 9}
    assert sorted(config["target_modules"]) == ["a.up", "b.a.up", "b.down"]
    for module in ("a.up", "b.a.up", "b.down"):
        np.testing.assert_allclose(delta(made(), module), 3 * delta(made("one"), module), rtol=1e-6)


def test_what_all_configs_say_stays() -> None:
    shared = {"base_model_name_or_path": "org/a", "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    save_adapter(pair(K, 4, 6), "one", **shared, revision="v1")
    save_adapter(pair(K, 4, 6), "two", **shared, revision="v2")
    combine(["one", "two"], "out")
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert {key: config[key] for key in shared} == shared
    assert config["revision"] is None
    card = Path("out/README.md").read_text()
    assert card.startswith('---\nbase_model: "org/a"\nlibrary_name: peft\n')
    assert "fastmerge lora combine one two out --method svd" in card


def test_adapters_of_other_bases_are_told() -> None:
    save_adapter(pair(K, 4, 6), "one", base_model_name_or_path="org/a")
    save_adapter(pair(K, 4, 6), "two", base_model_name_or_path="org/b")
    with pytest.warns(FastmergeWarning, match="for different bases.*one for org/a, two for org/b"):
        combine(["one", "two"], "out")


def test_apart_is_told() -> None:
    two_adapters()
    save_adapter(pair(K, 4, 6), "three")
    with pytest.warns(FastmergeWarning, match="peft_linear works on A and B apart, and their product has cross terms"):
        report = combine(["one", "three"], "out", method="peft_linear")
    assert report.error > 0.1


NAN = {name: torch.full_like(tensor, torch.nan) for name, tensor in pair(K, 4, 6).items()}


@pytest.mark.parametrize(
    ("tensors", "config", "options", "error", "message"),
    [
        ({}, {}, {"method": "tie"}, RecipeError, "unknown method 'tie'; did you mean 'ties'?"),
        ({}, {}, {"weights": [1]}, RecipeError, "there are 1 weights for 2 adapters: give one to each"),
        ({}, {}, {"weights": [1, math.inf]}, RecipeError, "weight must be a finite number"),
        ({}, {}, {"rank": 0}, RecipeError, "rank is 0, and must be a whole number from 1 on"),
        ({}, {}, {"rank": 2.5}, RecipeError, "rank is 2.5, and must be a whole number from 1 on"),
        ({}, {}, {"weight": [1, 2]}, RecipeError, "here it is weights, one for each adapter"),
        ({}, {}, {"method": "ties", "scope": "model"}, RecipeError, "scope is model, but modules are merged one"),
        ({}, {}, {"rank": 2, "method": "cat"}, RecipeError, "with cat the ranks are those of the adapters"),
        ({}, {}, {"rank": 2, "base": "base"}, RecipeError, "rank is 2, but a model has no rank: leave it out"),
        ({}, {}, {"method": "peft_ties", "base": "base"}, RecipeError, "peft_ties makes an adapter and no model"),
        ({}, {}, {"density": 0.5}, RecipeError, "task_arithmetic has no parameter density"),
        ({}, {}, {"method": "ties", "density": 2}, RecipeError, "density must be a number from 0 to 1"),
        ({}, {}, {"method": "model_stock", "weights": [1, 1]}, RecipeError, "model_stock has no weights"),
        (pair(K, 4, 6, 3), {"r": 3}, {"method": "peft_linear"}, MismatchError, "has the ranks 2 and 3, and A and B"),
        (pair(K, 5, 6), {}, {}, MismatchError, f"'{K}' has different shapes in one and two"),
        (
            pair(K, 4, 6) | {f"{PREFIX}{K}.lora_magnitude_vector": normal(4)},
            {"use_dora": True},
            {},
            CheckpointError,
            "two is DoRA (use_dora), whose deltas depend on the base; give the base too",
        ),
        (
            {f"{PREFIX}lm_head.weight": normal(10, 6)},
            {},
            {},
            CheckpointError,
            "one and two both replace 'lm_head.weight' (modules_to_save), by other values: give the base too",
        ),
        (NAN, {}, {}, NonFiniteError, "lora_A.weight' holds NaN or Inf; mend the adapter"),
    ],
    ids=lambda value: "",
)
@pytest.mark.filterwarnings("ignore:peft_linear works on A and B apart")
def test_what_cannot_be_combined(
    tensors: Tensors, config: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_adapter(pair(K, 4, 6) | {f"{PREFIX}lm_head.weight": normal(10, 6, seed=8)}, "one")
    save_adapter(tensors or pair(K, 4, 6), "two", **config)
    with pytest.raises(error) as caught:
        combine(["one", "two"], "out", **options)
    assert message in str(caught.value)
    assert not Path("out").exists()


def test_one_adapter_is_a_list_too() -> None:
    with pytest.raises(TypeError, match="adapters is a list of folders"):
        combine(save_adapter(pair(K, 4, 6)), "out")  # type: ignore[call-overload]


def test_adapters_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(pair(K, 4, 6), "cache")
    asked = []

    def fetched(id: str, revision: str | None, *, adapter: bool) -> Snapshot:
        asked.append((id, revision, adapter))
        return Snapshot(Path("cache"), "c" * 40)

    monkeypatch.setattr(combining, "snapshot", fetched)
    combine(["org/one@v1", "org/two"], "out", weights=[1, -3])
    assert asked == [("org/one", "v1", True), ("org/two", None, True)]
    np.testing.assert_allclose(delta(made(), K), -2 * delta(made("cache"), K), rtol=0, atol=1e-5)
    assert "- `org/one@v1`\n- `org/two`\n" in Path("out/README.md").read_text()


def test_adapters_without_factors_are_refused() -> None:
    save_adapter({f"{PREFIX}lm_head.weight": normal(10, 6)}, "one")
    with pytest.raises(CheckpointError, match="one has no factors"):
        combine(["one"], "out")
    with pytest.raises(RecipeError, match="no adapters to combine"):
        combine([], "out")


def test_an_output_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    two_adapters()
    combine(["one", "two"], "out", method="cat")
    monkeypatch.setattr(Product, "truncated", lambda *_: pytest.fail("it was begun"))
    for out, message in (("out", "out is not empty"), ("one", "is the input one"), ("one/in", "inside the input one")):
        with pytest.raises(OutputError, match=message):
            combine(["one", "two"], out)
    assert sorted(path.name for path in Path("one").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_output_is_replaced_when_asked() -> None:
    two_adapters()
    combine(["one", "two"], "out", method="cat")
    combine(["one", "two"], "out", overwrite=True)
    assert [update.a.shape[0] for update in made().updates if update.module == DOWN] == [3]
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in Path("out").iterdir()) == files


def test_an_input_that_changes_leaves_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    two_adapters()
    file = Path("one/adapter_model.safetensors")
    truncated = Product.truncated

    def meanwhile(self: Product, rank: int) -> Factors:
        file.write_bytes(file.read_bytes() + b" ")
        return truncated(self, rank)

    monkeypatch.setattr(Product, "truncated", meanwhile)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        combine(["one", "two"], "out")
    assert not Path("out").exists()


# --- fuse ---


def test_fuse_is_the_base_with_the_adapter() -> None:
    save_base(base("BF16"))
    save_adapter(pair(K, 4, 6), "a+b")
    report = fuse("base", "a+b", "out")
    assert report.methods == ("passthrough",)
    fused = Adapted(open_checkpoint("base"), open_adapter("a+b"))
    found = load_file("out/model.safetensors")[f"{K}.weight"]
    assert torch.equal(found, torch.from_numpy(values(fused, f"{K}.weight")).to(torch.bfloat16))
    assert Path("out/README.md").exists()
    again = fastmerge.merge("out/mergekit_config.yml", "again")
    assert Path(again.out, "model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()


# --- extract ---


def tuned(model: Tensors, deltas: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor + deltas[name] if name in deltas else tensor for name, tensor in model.items()}


def fused_again(adapter: str = "adapter", folder: str = "base") -> dict[str, np.ndarray]:
    """The base with an adapter, as it is read."""
    both = Adapted(open_checkpoint(folder), open_adapter(adapter))
    return {name: values(both, name) for name in both.tensors}


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_what_has_a_rank_is_extracted(dtype: str) -> None:
    model = base(dtype)
    change = normal(6, 3, seed=1, dtype=dtype) @ normal(3, 35, seed=2, dtype=dtype)
    save_base(model)
    save_base(tuned(model, {f"{DOWN}.weight": change}), "tuned")
    report = extract("base", "tuned", "adapter", rank=3)
    assert [(each.module, each.rank) for each in report.modules] == [(DOWN, 3)]
    assert report.whole == ()
    eps = 2**-23 if dtype == "F32" else 2**-52
    assert report.error <= 50 * eps
    for name, tensor in load_file("tuned/model.safetensors").items():
        np.testing.assert_allclose(fused_again()[name], tensor.numpy(), rtol=0, atol=200 * eps)


def test_a_rank_cuts_and_a_share_of_energy_chooses() -> None:
    model = base()
    change = torch.diag(torch.tensor([4.0, 2, 1, 0, 0, 0]))
    save_base(model)
    save_base(tuned(model, {f"{Q}.weight": change, f"{K}.weight": normal(4, 6, seed=3)}), "tuned")
    report = extract("base", "tuned", "ranked", rank=2)
    errors = {each.module: each for each in report.modules}
    assert errors[Q].error == pytest.approx(1 / math.sqrt(21), rel=1e-4)
    assert errors[Q].norm == pytest.approx(math.sqrt(21), rel=1e-6)
    shares = extract("base", "tuned", "shared", energy=0.9)
    ranks = {each.module: each.rank for each in shares.modules}
    assert ranks[Q] == 2  # 20 of 21
    assert all(each.error**2 <= 0.1 + 1e-6 for each in shares.modules)
    config = json.loads(Path("shared/adapter_config.json").read_text())
    assert {module: config["rank_pattern"].get(module, config["r"]) for module in ranks} == ranks


def everything(model: Tensors) -> dict[str, torch.Tensor]:
    return {name: tensor + 0.1 * normal(*tensor.shape, seed=7) for name, tensor in model.items()}


def test_all_that_differs_is_in_the_adapter() -> None:
    model = base()
    save_base(model)
    save_base(everything(model), "tuned")
    report = extract("base", "tuned", "adapter", rank=99)
    kept = {f"{EMBED}.weight", "model.norm.weight", *(name for name in model if name.endswith(".bias"))}
    assert set(report.whole) == kept
    assert len(report.modules) == 7
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["bias"] == "all"
    assert sorted(config["modules_to_save"]) == [EMBED, "model.norm"]
    for name, tensor in load_file("tuned/model.safetensors").items():
        np.testing.assert_allclose(fused_again()[name], tensor.numpy(), rtol=0, atol=2e-6)


def test_what_has_no_factors_is_left_out_when_asked() -> None:
    model = base()
    save_base(model)
    save_base(everything(model), "tuned")
    with pytest.warns(FastmergeWarning, match="what has no factors is left out, though it differs: .*model.norm"):
        report = extract("base", "tuned", "adapter", rank=2, whole=False)
    assert report.whole == ()
    assert "model.norm.weight" in report.left_out
    assert made("adapter").replaced == {}


def test_a_tied_embedding_and_a_new_vocabulary_take_the_place_of_the_bases() -> None:
    model = {name: tensor for name, tensor in base().items() if name != "lm_head.weight"}
    save_base(model, tie_word_embeddings=True)
    grown = tuned(model, {f"{Q}.weight": normal(6, 6, seed=3)}) | {f"{EMBED}.weight": normal(12, 6, seed=4)}
    save_base(grown, "tuned", tie_word_embeddings=True, vocab_size=12)
    Path("tuned/tokenizer.json").write_text("{}")
    report = extract("base", "tuned", "adapter", rank=6)
    assert report.whole == (f"{EMBED}.weight",)
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] is None
    assert Path("adapter/tokenizer.json").read_text() == "{}"
    both = Adapted(open_checkpoint("base"), open_adapter("adapter"))
    np.testing.assert_array_equal(values(both, f"{EMBED}.weight"), grown[f"{EMBED}.weight"].numpy())
    assert both.config["vocab_size"] == 12


@pytest.mark.parametrize("square", [False, True])
def test_layers_that_are_stored_by_inputs(square: bool) -> None:
    model = {
        "h.0.attn.c_attn.weight": normal(6, 18),
        "h.0.attn.c_attn.bias": normal(18),
        "h.0.attn.c_proj.weight": normal(6, 6, seed=1),
    }
    name = "h.0.attn.c_proj.weight" if square else "h.0.attn.c_attn.weight"
    save_base(model)
    save_base(tuned(model, {name: normal(*model[name].shape, seed=2)}), "tuned")
    extract("base", "tuned", "adapter", rank=6)
    (update,) = made("adapter").updates
    assert (update.a.shape, update.b.shape) == ((6, 6), (model[name].shape[1], 6))
    assert made("adapter").fan_in_fan_out
    expected = load_file("tuned/model.safetensors")[name]
    np.testing.assert_allclose(fused_again()[name], expected.numpy(), rtol=0, atol=2e-5)


def test_dora_becomes_plain() -> None:
    save_base(base())
    magnitude = {f"{PREFIX}{DOWN}.lora_magnitude_vector": normal(6).abs() + 1}
    save_adapter(pair(DOWN, 6, 35) | magnitude, "dora", use_dora=True)
    extract("base", "base+dora", "plain", rank=6)
    both = Adapted(open_checkpoint("base"), open_adapter("dora"))
    found = fused_again("plain")[f"{DOWN}.weight"]
    np.testing.assert_allclose(found, values(both, f"{DOWN}.weight"), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {}, RecipeError, "give either rank or energy"),
        ({}, {"rank": 1, "energy": 0.5}, RecipeError, "give either rank or energy"),
        ({}, {"rank": 0}, RecipeError, "rank is 0, and must be a whole number from 1 on"),
        ({}, {"rank": "4"}, RecipeError, "rank is '4', and must be a whole number from 1 on"),
        ({}, {"energy": 1.5}, RecipeError, "energy is 1.5, and must be above 0 and at most 1"),
        ({}, {"rank": 1}, MismatchError, "base and tuned do not differ in the weights of any layer"),
        (
            {f"{Q}.weight": torch.full((6, 6), torch.nan)},
            {"rank": 1},
            NonFiniteError,
            f"tuned: tensor '{Q}.weight' holds NaN or Inf",
        ),
    ],
    ids=["neither", "both", "rank", "text", "energy", "same", "nan"],
)
def test_what_cannot_be_extracted(
    change: Tensors, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    save_base(base())
    save_base(tuned(base(), change), "tuned")
    with pytest.raises(error) as caught:
        extract("base", "tuned", "adapter", **options)
    assert message in str(caught.value)
    assert not Path("adapter").exists()


def test_models_without_a_name_in_common_are_refused() -> None:
    save_base({"a.weight": normal(4, 6)})
    save_base({"b.weight": normal(4, 6)}, "tuned")
    with pytest.raises(MismatchError, match="base and tuned have no tensor in common"):
        extract("base", "tuned", "adapter", rank=1)


def test_tensors_that_are_not_numbers_are_refused() -> None:
    model = base() | {"codes": torch.zeros(4, dtype=torch.int8)}
    save_base(model)
    changed = tuned(model, {f"{Q}.weight": normal(6, 6, seed=3)}) | {"codes": torch.ones(4, dtype=torch.int8)}
    save_base(changed, "tuned")
    with pytest.raises(CheckpointError, match="'codes' is I8 in tuned: dequantise that first"):
        extract("base", "tuned", "adapter", rank=1)


# --- the command line ---


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    save_base(base())
    two_adapters()

    def run(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["lora", *arguments], prog_name="fastmerge")
        return (ended.value.code, *capsys.readouterr())

    code, out, _ = run("fuse", "base", "one", "fused")
    assert (code, out.split(",")[0]) == (0, "fused: passthrough of 11 tensors")
    combining = ["combine", "one", "two", "both", "--method", "ties", "--density", "0.5", "--weights=-1,2"]
    code, out, _ = run(*combining, "--parameter", "elect=count", "--rank", "4")
    assert code == 0
    assert out.startswith("both: 3 modules of rank 4, relative error ")
    command = (
        "lora combine one two both --method ties --weights=-1.0,2.0 --density=0.5 --rank=4 --parameter=elect=count"
    )
    assert command in Path("both/README.md").read_text()
    code, out, _ = run("combine", "one", "two", "model", "--base", "base", "--method", "ties")
    assert (code, out.split(",")[0]) == (0, "model: ties of 11 tensors")
    code, out, _ = run("extract", "base", "fused", "adapter", "--energy", "0.5")
    assert (code, out.split(", ")[0]) == (0, "adapter: 2 modules of rank 1")
    for arguments, fault in (
        (("combine", "one", "two", "both"), "error: both is not empty"),
        (("combine", "one", "two", "x", "--parameter", "elect"), "'elect' has no value; write for example elect=count"),
        (("combine", "one", "two", "x", "--parameter", "density=1"), "density is no parameter of a method: give it as"),
        (("combine", "one", "two", "x", "--weights", "a"), "'a' is not numbers; write for example 0.5,1"),
        (("extract", "base", "fused", "x"), "error: give either rank or energy"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        assert fault in err


def test_what_is_not_there_is_told_without_a_place_in_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a recipe inside, which the user did not write."""
    save_base(base())
    save_adapter(pair(K, 4, 6))
    calls: dict[str, Callable[[str], object]] = {
        "fuse": lambda absent: fuse("base", absent, "out"),
        "combine": lambda absent: combine(["adapter"], "out", base=absent),
        "extract": lambda absent: extract(absent, "base", "out", rank=1),
    }
    for call in calls.values():
        with pytest.raises(RecipeError, match=r"^there is no file or folder '/absent'"):
            call("/absent")

    def offline(*_: object, **__: object) -> Snapshot:
        raise CheckpointError("org/absent cannot be fetched")

    monkeypatch.setattr("fastmerge.planner.snapshot", offline)
    for call in calls.values():
        with pytest.raises(CheckpointError, match=r"^org/absent cannot be fetched"):
            call("org/absent")


def test_the_functions_are_public() -> None:
    assert fastmerge.lora.combine is combine
    assert isinstance(combine([save_adapter(pair(K, 4, 6))], "out"), AdapterReport)


# --- beside PEFT ---


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft", reason="PEFT is not installed")


def grown(peft: Any, model: Any, name: str, seed: int, **config: Any) -> Any:
    """A model with an adapter of random weights, which is saved."""
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6} | config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(name)
    return wrapped


IDS = torch.arange(14)[None] * 7 % 40


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


CASES: dict[str, tuple[Any, dict[str, Any], list[dict[str, Any]]]] = {
    "ranks": (llama, {}, [{"target_modules": "all-linear"}, {"target_modules": ATTENTION, "r": 6}]),
    "rslora-patterns": (
        llama,
        {},
        [{"target_modules": "all-linear", "use_rslora": True, **PATTERNS}, {"target_modules": ["down_proj", "q_proj"]}],
    ),
    "embeddings": (
        llama,
        {"tie_word_embeddings": False},
        [{"target_modules": ["embed_tokens", "lm_head", "q_proj"]}, {"target_modules": ["embed_tokens"], "r": 2}],
    ),
    "conv1d": (
        gpt2,
        {},
        [
            {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn"], "r": 3, "fan_in_fan_out": True},
        ],
    ),
    "lora-bias": (
        llama,
        {"attention_bias": True},
        [{"target_modules": ATTENTION, "lora_bias": True}, {"target_modules": ["q_proj"], "lora_bias": True}],
    ),
    "saved": (
        llama,
        {"tie_word_embeddings": False},
        [{"target_modules": ATTENTION, "modules_to_save": ["lm_head", "norm"]}, {"target_modules": ["up_proj"]}],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["cat", "svd", "ties"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_combined_gives_pefts_logits(peft: Any, case: str, method: str) -> None:
    """Loaded by PEFT, an adapter that holds all gives the logits of the base with the method's deltas."""
    make, sizes, configs = CASES[case]
    make(**sizes).save_pretrained("base")
    kind = type(make(**sizes))
    for number, config in enumerate(configs):
        grown(peft, kind.from_pretrained("base"), f"{number}", number, task_type="CAUSAL_LM", **config)
    options: dict[str, Any] = {} if method == "cat" else {"rank": 99}
    options |= {"density": 0.7} if method == "ties" else {}
    combine(["0", "1"], "out", method=method, weights=[0.7, 0.9], **options)
    loaded = peft.PeftModel.from_pretrained(kind.from_pretrained("base"), "out")
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    fuse("base", "out", "fused")
    found = logits(loaded)
    torch.testing.assert_close(found, logits(kind.from_pretrained("fused")), rtol=0, atol=5e-6)
    if case != "saved":
        options.pop("rank", None)
        combine(["0", "1"], "model", method=method, weights=[0.7, 0.9], base="base", **options)
        torch.testing.assert_close(found, logits(kind.from_pretrained("model")), rtol=0, atol=5e-5)
    assert (found - logits(kind.from_pretrained("base"))).abs().max() > 1e-3
    report_of_peft = loaded.merge_and_unload()
    torch.testing.assert_close(logits(report_of_peft), found, rtol=0, atol=5e-6)


#: PEFT's types, and how the sign is elected.
TYPES = [
    *((name, "plain") for name in ("cat", "svd", "magnitude_prune_svd", "dare_linear_svd")),
    *((name, elect) for name in ("ties_svd", "dare_ties_svd", "peft_ties") for elect in ("plain", "count")),
    *((name, "plain") for name in ("peft_linear", "peft_magnitude_prune")),
]


def keyed(peft_model: Any, names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's random pruning with our masks, which are known by what is pruned."""
    from peft.utils import merge_utils

    from fastmerge.reference import random_bits
    from fastmerge.settings import _key

    known = [
        (layer.get_delta_weight(name), _key(0, place, f"{module.removeprefix('base_model.model.')}.weight"))
        for module, layer in peft_model.named_modules()
        if hasattr(layer, "get_delta_weight")
        for place, name in enumerate(names)
        if name in layer.scaling
    ]

    def pruned(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        (key,) = [key for each, key in known if each.shape == tensor.shape and torch.equal(each, tensor)]
        kept = random_bits(key, 0, tensor.numel()) < round(density * 2**32)
        return tensor * kept.view_as(tensor) / density

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)


@pytest.mark.parametrize(("combination", "elect"), TYPES)
@pytest.mark.filterwarnings("ignore")
def test_weighted_adapters_are_those_of_peft(
    peft: Any, combination: str, elect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products, for factors may turn: of each type of add_weighted_adapter on deltas, and of those on A and B apart."""
    apart = combination.startswith("peft_")
    second = {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "r": 4 if apart else 3, "lora_alpha": 5}
    llama(tie_word_embeddings=False).save_pretrained("base")
    kind = type(llama())
    both = grown(peft, kind.from_pretrained("base"), "one", 1, target_modules=["q_proj", "down_proj", "embed_tokens"])
    grown(peft, kind.from_pretrained("base"), "two", 2, **second)
    both.load_adapter("two", "two")
    if "dare" in combination:
        keyed(both, ["default", "two"], monkeypatch)
    weights, density = [0.7, -1.2], 0.6
    votes = {"plain": "total", "count": "frequency"}[elect]
    name = combination.removeprefix("peft_")
    both.add_weighted_adapter(["default", "two"], weights, "new", name, density=density, majority_sign_method=votes)
    options: dict[str, Any] = {"weights": weights, "method": combination}
    options |= {"elect": elect} if "ties" in combination else {}
    options |= {"density": density} if name not in ("cat", "svd", "linear") else {}
    report = combine(["one", "two"], "out", **options)
    deltas = {
        module.removeprefix("base_model.model."): layer.get_delta_weight("new").detach().numpy()
        for module, layer in both.named_modules()
        if hasattr(layer, "get_delta_weight") and "new" in layer.scaling
    }
    assert deltas.keys() == {each.module for each in report.modules}
    if not apart and name != "cat":
        combine(["one", "two"], "whole", **options, rank=99)
    for module, expected in deltas.items():
        found = delta(made(), module)
        room = 20 * EPS * float(np.linalg.norm(expected))
        if Path("whole").exists():
            # Rounding turns the space that is kept by about eps over the gap after its last singular value.
            singular = np.linalg.svd(delta(made("whole"), module), compute_uv=False)
            room *= 1 + 2 * singular[0] / (singular[3] - singular[4])
        found = found.T if "embed" in module else found
        np.testing.assert_allclose(found, expected, rtol=0, atol=room, err_msg=module)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (llama, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        (llama, {"tie_word_embeddings": True}),
        (gpt2, {}),
        (gpt2, {"tie_word_embeddings": False}),
    ],
    ids=["llama-biases", "llama-tied", "gpt2-tied", "gpt2"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_extracted_gives_the_logits_of_the_fine_tune(peft: Any, make: Any, sizes: dict[str, Any]) -> None:
    model = make(**sizes)
    model.save_pretrained("base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained("tuned")
    extract("base", "tuned", "adapter", rank=99)
    kind = type(model)
    before = logits(kind.from_pretrained("base"))
    loaded = peft.PeftModel.from_pretrained(kind.from_pretrained("base"), "adapter")
    found, wanted = logits(loaded), logits(kind.from_pretrained("tuned"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    assert (before - wanted).abs().max() > 1e-2
    fuse("base", "adapter", "fused")
    torch.testing.assert_close(logits(kind.from_pretrained("fused")), wanted, rtol=0, atol=5e-6)
