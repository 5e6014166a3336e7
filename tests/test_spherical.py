"""Weights from a Gram matrix, against the papers on whole vectors; rows that are merged as tensors; a base or none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from test_engine import load, merged, save, wide

import fastmerge
from fastmerge import MismatchError, NonFiniteError, RecipeError, batches, spherical
from fastmerge.planner import plan
from fastmerge.recipe import Recipe

SIZE = 50
WEIGHTS = (0.6180339, 1.0, 0.2718281, 0.4, 0.9, 0.1, 0.7)
SIGNED = (0.6180339, -1.0, 0.9718281, 0.4, 0.9, -0.1, 0.7)


def vectors(count: int, spread: float = 1.0) -> list[np.ndarray]:
    """Some directions, all the nearer to one another the smaller `spread` is, of lengths from 2 up."""
    rng = np.random.default_rng(count)
    middle = rng.standard_normal(SIZE)
    moved = [middle + spread * rng.standard_normal(SIZE) for _ in range(count)]
    return [(2 + i / 3) * x / np.linalg.norm(x) for i, x in enumerate(moved)]


def gram(xs: Sequence[np.ndarray]) -> list[list[float]]:
    return [[math.fsum(a * b) for b in xs] for a in xs]


def combined(weights: Sequence[float], xs: Sequence[np.ndarray]) -> np.ndarray:
    return sum((w * x for w, x in zip(weights, xs, strict=True)), np.zeros_like(xs[0]))


def assert_same(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-13) -> None:
    """To `tolerance` of the lengths: some hundred roundings of float64, where nothing is ill-conditioned."""
    assert np.linalg.norm(found - expected) <= tolerance * max(1.0, float(np.linalg.norm(expected)))


# --- two vectors ---


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2), (1.0, -0.3), (1e-7, 1e-7)], ids=str)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_nuslerp(weights: tuple[float, float], spread: float) -> None:
    a, b = vectors(2, spread)
    t = weights[1] / sum(weights) if sum(weights) >= 1e-6 else 0.5
    assert_same(combined(spherical.nuslerp(gram([a, b]), t), [a, b]), oracles.nuslerp([a, b], weights))


@pytest.mark.parametrize("length", [2.0, -3.0, 1.0, -1.0, 1 / 3, -1 / 7])
def test_nuslerp_is_straight_where_there_is_no_angle(length: float) -> None:
    a = vectors(1)[0]
    assert spherical.nuslerp(gram([a, length * a]), 0.25) == [0.75, 0.25]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("angle", "straight"), [(1e-6, True), (2e-4, True), (3e-4, False), (1e-2, False)])
def test_nuslerp_is_straight_where_the_cosine_is_one_in_float32(sign: int, angle: float, straight: bool) -> None:
    cosine = sign * math.cos(angle)
    found = spherical.nuslerp([[1.0, cosine], [cosine, 1.0]], 0.25)
    assert (found == [0.75, 0.25]) is straight
    assert bool(abs(np.float32(cosine)) == 1) is straight


def test_nuslerp_takes_a_vector_without_length_for_a_right_angle() -> None:
    zero, a = np.zeros(SIZE), vectors(1)[0]
    for pair in ([a, zero], [zero, a], [zero, zero]):
        assert_same(combined(spherical.nuslerp(gram(pair), 0.25), pair), oracles.nuslerp(pair, (0.75, 0.25)))
    assert spherical.nuslerp(gram([a, zero]), 0.25) == pytest.approx([math.sin(3 * math.pi / 8), math.sin(math.pi / 8)])


# --- multislerp ---


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("eps", [1e-8, 0.0, 0.2])
@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED], ids=["positive", "negative"])
def test_multislerp(count: int, spread: float, eps: float, weights: tuple[float, ...]) -> None:
    """The oracle takes the tangents one by one, though they sum to nothing; an eps of 0 would divide by that."""
    xs, own = vectors(count, spread), weights[:count]
    found = combined(spherical.multislerp(gram(xs), own, eps), xs)
    expected = oracles.multislerp(xs, own, normalize=False, eps=eps or 1e-9)
    assert_same(found, expected, 1e-7 if eps == 0.2 else 1e-8)  # eps lengthens what the oracle projects on


def test_multislerp_of_equal_vectors_is_that_vector() -> None:
    a = vectors(1)[0]
    assert_same(combined(spherical.multislerp(gram([a] * 3), (0.2, 0.3, 0.5), 1e-12), [a] * 3), a, 1e-11)


@pytest.mark.parametrize("lengths", [(1.0, -1.0), (3.0, -1 / 7), (0.0, 0.0), (1.0, -1.0, 0.0)], ids=str)
def test_multislerp_without_a_direction_is_the_weighted_sum(lengths: tuple[float, ...]) -> None:
    a = vectors(1)[0]
    weights = (0.5, 0.5, 0.3)[: len(lengths)]
    assert spherical.multislerp(gram([length * a for length in lengths]), weights, 1e-8) == list(weights)
    assert spherical.multislerp(gram([length * a for length in lengths]), weights, 0.0) == list(weights)


def test_a_vector_without_length_adds_nothing_to_the_direction() -> None:
    a, zero = vectors(1)[0], np.zeros(SIZE)
    found = combined(spherical.multislerp(gram([a, zero]), (0.25, 0.75), 1e-12), [a, zero])
    assert_same(found, 0.25 * a, 1e-11)


# --- Karcher ---


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
@pytest.mark.parametrize(("rounds", "tolerance"), [(0, 1e-5), (1, 1e-5), (10, 1e-5), (10, 0.1), (200, 0.0)])
def test_karcher(count: int, spread: float, rounds: int, tolerance: float) -> None:
    xs = vectors(count, spread)
    found = combined(spherical.karcher(gram(xs), rounds, tolerance), xs)
    assert_same(found, oracles.karcher(xs, rounds, max(tolerance, 2.0**-26)), 1e-7 if tolerance < 1e-5 else 1e-10)
    assert np.linalg.norm(found) == pytest.approx(np.mean([np.linalg.norm(x) for x in xs]))


@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_what_karcher_ends_at_is_pulled_nowhere(spread: float) -> None:
    """The gradient of the sum of squared angles is zero there: the definition of the mean."""
    xs = vectors(5, spread)
    u = combined(spherical.karcher(gram(xs), 500, 1e-7), xs)
    u = u / np.linalg.norm(u)
    pull = sum((oracles.logarithm(u, x / np.linalg.norm(x), 0.0) for x in xs), np.zeros(SIZE))
    assert np.linalg.norm(pull) < 1e-6


def test_karcher_of_two_is_half_way_along_the_circle() -> None:
    a, b = (x / np.linalg.norm(x) for x in vectors(2))
    found = combined(spherical.karcher(gram([a, 3 * b]), 10, 1e-5), [a, 3 * b])
    assert_same(found, 2 * oracles.slerp(a, b, 0.5))


@pytest.mark.parametrize(
    "lengths",
    [(1, 1, 1), (1, 2, 3), (1, -1), (1, 0), (0, 1), (1, 1e-6, 2), (0, 0), (1e-6, 1e-7)],
    ids=str,
)
def test_karcher_where_there_is_no_angle(lengths: tuple[float, ...]) -> None:
    """Along the first that has a direction, at the mean of all lengths; nothing where none has."""
    a = vectors(1)[0] / 2
    xs = [length * a for length in lengths]
    size = np.mean(np.abs(lengths)) if max(np.abs(lengths)) > 1e-5 else 0.0
    found = combined(spherical.karcher(gram(xs), 10, 1e-5), xs)
    assert_same(found, size * a, 1e-12)
    assert_same(found, oracles.karcher(xs), 1e-12)


def test_an_opposite_vector_pulls_nowhere() -> None:
    a, b = vectors(2)
    for xs in ([a, -2 * a, b], [b, a, -a]):
        assert_same(combined(spherical.karcher(gram(xs), 10, 1e-5), xs), oracles.karcher(xs), 1e-12)


# --- Model Stock ---


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_model_stock(count: int, spread: float) -> None:
    xs = vectors(count, spread)
    found = combined(spherical.model_stock(gram(xs)), xs)
    assert_same(found, oracles.model_stock(np.zeros(SIZE), xs))


def test_model_stock_goes_all_the_way_where_all_agree_and_nowhere_where_none_do() -> None:
    a = vectors(1)[0]
    assert spherical.model_stock(gram([a, a, a])) == pytest.approx([1 / 3] * 3)
    assert spherical.model_stock(gram(list(np.eye(3)))) == [0.0] * 3
    assert spherical.model_stock(gram([a, -a])) == [0.0] * 2  # the singularity
    assert spherical.model_stock(gram([a, 0 * a])) == [0.0] * 2
    assert spherical.model_stock(gram([a])) == [0.0]


def test_model_stock_of_tiny_deltas_has_smaller_cosines() -> None:
    a = vectors(1)[0] * 1e-4
    b = 2 * a
    assert_same(combined(spherical.model_stock(gram([a, b])), [a, b]) * 1e4, 1e4 * oracles.model_stock(0 * a, [a, b]))
    assert spherical.model_stock(gram([a, b]))[0] < 0.2


@pytest.mark.parametrize(
    "method",
    [
        partial(spherical.nuslerp, t=0.3),
        partial(spherical.multislerp, weights=(0.3,), eps=1e-8),
        partial(spherical.karcher, rounds=10, tolerance=1e-5),
    ],
    ids=["nuslerp", "multislerp", "karcher"],
)
@pytest.mark.parametrize("length", [1.0, 1e-9, 0.0])
def test_one_vector_stays_as_it_is(method: Callable[..., list[float]], length: float) -> None:
    assert method([[length**2]]) == [1.0]


# --- whole merges ---

SHAPES = {
    "layers.0.up": (13, 40),
    "layers.0.norm": (40,),
    "layers.1.up": (13, 40),
    "layers.1.norm": (40,),
    "conv": (3, 5, 11),
    "scalar": (),
    "empty": (0, 3),
    "narrow": (7, 1),
}
PAIR = "models: [{model: a, parameters: {weight: 0.3}}, {model: b, parameters: {weight: 0.5}}]\n"
THREE = "models: [model: a, model: b, model: c]\n"
Oracle = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]
ROWS: dict[str, tuple[str, Oracle]] = {
    "nuslerp": (
        f"merge_method: nuslerp\n{PAIR}parameters: {{nuslerp_flatten: false}}\n",
        lambda base, xs: oracles.nuslerp(xs[:2], (0.3, 0.5)),
    ),
    "nuslerp-of-deltas": (
        f"merge_method: nuslerp\nbase_model: base\n{PAIR}parameters: {{nuslerp_flatten: false}}\n",
        lambda base, xs: oracles.nuslerp(xs[:2], (0.3, 0.5), base),
    ),
    "model_stock": (
        f"merge_method: model_stock\nbase_model: base\n{THREE}parameters: {{filter_wise: true}}\n",
        oracles.model_stock,
    ),
}
WHOLE: dict[str, tuple[str, Oracle]] = {
    "nuslerp": (f"merge_method: nuslerp\n{PAIR}", ROWS["nuslerp"][1]),
    "nuslerp-of-deltas": (f"merge_method: nuslerp\nbase_model: base\n{PAIR}", ROWS["nuslerp-of-deltas"][1]),
    "multislerp": (
        f"merge_method: multislerp\n{THREE}parameters: {{weight: 0.5}}\n",
        lambda base, xs: oracles.multislerp(xs, (0.5,) * 3),
    ),
    "multislerp-of-deltas": (
        f"merge_method: multislerp\nbase_model: base\n{THREE}parameters: {{weight: 0.5, normalize_weights: false}}\n",
        lambda base, xs: oracles.multislerp(xs, (0.5,) * 3, base, normalize=False),
    ),
    "karcher": (f"merge_method: karcher\n{THREE}", lambda base, xs: oracles.karcher(xs)),
    "model_stock": (f"merge_method: model_stock\nbase_model: base\n{THREE}", oracles.model_stock),
}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save_models(dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """A base and three models, in which some rows are equal, colinear or without a delta."""
    rng = np.random.default_rng(3)
    base = {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}
    models = {"base": base} | {
        model: {name: values + 0.25 * rng.standard_normal(values.shape) for name, values in base.items()}
        for model in "abc"
    }
    for name in ("layers.0.up", "layers.1.up"):
        for model in "abc":
            models[model][name][4] = base[name][4]
        models["b"][name][5] = models["a"][name][5]
        models["b"][name][7] = 2 * models["a"][name][7]
        models["b"][name][11] = -models["a"][name][11]
    tensors = {m: {n: torch.tensor(v).to(dtype) for n, v in each.items()} for m, each in models.items()}
    for model, each in tensors.items():
        save(model, each)
    return tensors


def assert_merged(
    found: dict[str, torch.Tensor], models: dict[str, dict[str, torch.Tensor]], oracle: Oracle, rows: bool
) -> None:
    """To half of the output's last place, and the roundings of float32 before: 2 M + 10 at most, of terms that are no
    larger than three times the models and the base."""
    assert found.keys() == SHAPES.keys()
    for name, tensor in found.items():
        shape = models["base"][name].shape
        base, *others = (wide(each[name]) for each in models.values())
        count = math.prod(shape[:-1]) if rows and len(shape) > 1 else 1
        pieces = zip(*(np.split(each, count) if count else [] for each in (base, *others)), strict=True)
        expected = np.concatenate([oracle(mine, list(theirs)) for mine, *theirs in pieces if mine.size] or [base])
        half = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[tensor.dtype]
        size = 3 * sum(map(np.abs, (base, *others)))
        bound = half * np.abs(expected) + 16 * 2.0**-24 * size
        assert tensor.shape == shape
        assert (np.abs(wide(tensor) - expected) <= bound).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("recipe", WHOLE)
def test_a_merge_has_the_numbers_of_the_papers(recipe: str, backend: str, dtype: torch.dtype) -> None:
    models, (text, oracle) = save_models(dtype), WHOLE[recipe]
    assert_merged(merged(text, backend=backend), models, oracle, rows=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("at_once", [1, 4, 4096])
@pytest.mark.parametrize("recipe", ROWS)
def test_each_row_is_tensoras_a_tensor_of_its_own(
    recipe: str, at_once: int, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", at_once)
    models, (text, oracle) = save_models(dtype), ROWS[recipe]
    found = merged(text, backend=backend)
    assert_merged(found, models, oracle, rows=True)
    whole, _ = WHOLE[recipe]
    assert not torch.equal(found["layers.0.up"], merged(whole, "whole", backend=backend)["layers.0.up"])


def test_rows_are_for_the_layers_that_ask_for_them() -> None:
    models = save_models(torch.float32)
    asked = "{filter_wise: [{filter: layers.0, value: true}]}"
    found = merged(f"merge_method: model_stock\nbase_model: base\n{THREE}parameters: {asked}\n")
    for rows, part in ((True, "layers.0"), (False, "layers.1")):
        expected = merged(ROWS["model_stock"][0] if rows else WHOLE["model_stock"][0], f"rows-{rows}")
        assert torch.equal(found[f"{part}.up"], expected[f"{part}.up"])
    assert models


def test_a_float64_tensor_goes_row_by_row_too() -> None:
    models, (text, oracle) = save_models(torch.float64), ROWS["model_stock"]
    found = merged(f"{text}out_dtype: float32\n")
    assert_merged(found, models, oracle, rows=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
@pytest.mark.parametrize("at_once", [1, 60, 1 << 20])
@pytest.mark.parametrize("recipe", ["nuslerp", "nuslerp-of-deltas"])
def test_columns_are_the_rows_of_the_transposed(
    recipe: str, at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmerge.direct._TILE", at_once)
    models, (text, oracle) = save_models(dtype), ROWS[recipe]
    text = text.replace("nuslerp_flatten: false", "nuslerp_flatten: false, nuslerp_row_wise: true")
    assert all(job.direct for job in plan(Recipe.parse(text)).stages[0].jobs)
    found = merged(text)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    for tensors in (found, *models.values()):
        for name, shape in SHAPES.items():
            tensors[name] = tensors[name].reshape(shape[0] if shape else 1, math.prod(shape[1:])).T
    assert_merged(found, models, oracle, rows=True)


def test_nan_in_a_row_is_told_with_its_index_in_the_tensor() -> None:
    models = save_models(torch.float32)
    broken = models["b"]["layers.1.up"]
    broken[3, 7] = broken[9, 2] = torch.nan
    Path("b/model.safetensors").unlink()
    Path("b/config.json").unlink()
    Path("b").rmdir()
    save("b", models["b"])
    with pytest.raises(NonFiniteError, match=r"b: tensor 'layers.1.up' holds 2 NaN or Inf, the first at index 127;"):
        merged(ROWS["model_stock"][0])
    found = merged(ROWS["model_stock"][0], nonfinite="propagate")["layers.1.up"].isnan()
    assert found.nonzero().tolist() == [[3, 7], [9, 2]]


# --- what a recipe may ask for ---


def test_a_base_that_is_not_there_is_not_needed_but_one_that_is_must_be_a_source() -> None:
    save_models(torch.float32)
    sources = "[{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]"
    text = f"merge_method: nuslerp\nslices: [sources: {sources}]\nparameters: {{weight: 1}}\n"
    assert merged(text).keys() == SHAPES.keys()
    with pytest.raises(RecipeError, match="nuslerp needs base_model, and where layers are sliced it is one of"):
        merged(f"base_model: base\n{text}")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"merge_method: nuslerp\nbase_model: a\n{PAIR}", "nuslerp takes exactly two models besides the base, got 1"),
        (f"merge_method: nuslerp\n{THREE}", "nuslerp takes exactly two models, got 3"),
        ("merge_method: model_stock\nbase_model: base\nmodels: [model: a]\n", "at least two models besides the base"),
        (f"merge_method: model_stock\n{THREE}", "model_stock needs base_model"),
        (f"merge_method: multislerp\n{THREE}", "multislerp needs the parameter weight"),
    ],
    ids=["base-is-a-model", "three", "one", "no-base", "no-weight"],
)
def test_what_cannot_be_tensoris_said_with_its_place(text: str, fault: str) -> None:
    save_models(torch.float32)
    with pytest.raises(RecipeError, match=fault):
        merged(text)


def test_columns_are_not_meant_where_tensors_are_flattened() -> None:
    save_models(torch.float32)
    text, _ = WHOLE["nuslerp"]
    flat = merged(f"{text}parameters: {{nuslerp_row_wise: true}}\n")
    expected = merged(text, "expected")
    assert all(torch.equal(flat[name], tensor) for name, tensor in expected.items())


def test_rows_are_for_all_outputs_or_for_none() -> None:
    save_models(torch.float32)
    with pytest.raises(RecipeError, match="some outputs are merged row by row and some not"):
        fastmerge.merge(Recipe.parse(ROWS["model_stock"][0]), "out", vary={"filter_wise": [True, False]})


@pytest.mark.filterwarnings("ignore:.*lacks 1 tensors")
def test_a_tensor_that_one_model_alone_has_beside_the_base_stays_or_is_the_base() -> None:
    """As mergekit: one model is not merged; Model Stock of one has no cosine."""
    tensors = save_models(torch.float32)
    for model in ("base", "a", "b"):
        extra = {"bias": torch.linspace(1, 2, 40) * (3 if model == "a" else 1)}
        save(f"extra/{model}", tensors[model] | ({} if model == "b" else extra))
    pair = "base_model: extra/base\nmodels: [model: extra/a, model: extra/b]\n"
    for method, source in (("nuslerp", "a"), ("multislerp", "a"), ("model_stock", "base")):
        parameters = "" if method == "model_stock" else "parameters: {weight: 1}\n"
        found = merged(f"merge_method: {method}\n{pair}{parameters}", method)["bias"]
        torch.testing.assert_close(found, load(f"extra/{source}")["bias"], rtol=2e-7, atol=0)
    with pytest.raises(MismatchError, match="'bias' is missing in 'extra/b'"):
        merged("merge_method: karcher\nmodels: [model: extra/a, model: extra/b]\n")
