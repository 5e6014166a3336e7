"""Methods that are no sweep: each against its formula in float64, in whole merges, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import oracles
import pytest
import torch
from conftest import TORCH
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge import BackendError, NonFiniteError, RecipeError, direct, reference
from fastmerge.methods import METHODS, Measured, Settings
from fastmerge.planner import plan
from fastmerge.recipe import Recipe

ROWS, COLUMNS = 24, 125
SHAPE = (ROWS, COLUMNS)
WEIGHTS = (0.6180339, 1.0, 0.2718281)  # no sum or difference of them cancels by chance
SIGNED = (0.6180339, -1.0, 0.2718281)
KEYS = (17, 2**63 + 5, 4)
EMPTY: Mapping[str, Any] = MappingProxyType({})


def family(dtype: str, models: int = 3, size: float = 1.0) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and its fine-tunes as float64, which the dtype holds. Deltas are exact in float32, many of equal size."""
    rng = np.random.default_rng(3)
    base = rng.integers(-64, 65, ROWS * COLUMNS) / 32
    moved = [base + size * np.rint(rng.standard_normal(base.size) * 256) / 512 for _ in range(models)]
    return base, [oracles.rounded(each, dtype) for each in moved]


def settings_of(
    method: str, models: int, shared: Mapping[str, Any] = EMPTY, keys: Sequence[int] = (), **each: Sequence[Any]
) -> Settings:
    row = METHODS[method]
    return Settings(
        {p.name: shared.get(p.name, p.default) for p in row.parameters if not p.per_model},
        tuple(
            {p.name: each[p.name][i] if p.name in each else p.default for p in row.parameters if p.per_model}
            for i in range(models)
        ),
        tuple(keys),
    )


def merged(
    method: str, base: np.ndarray, models: Sequence[np.ndarray], settings: Settings, shape: tuple[int, ...] = SHAPE
) -> np.ndarray:
    """By a method, in float32, not yet rounded to any dtype."""
    tensors = [torch.tensor(each.reshape(shape), dtype=torch.float32) for each in (*models, base)]
    found = direct.FUNCTIONS[method](tensors[:-1], tensors[-1], settings)
    assert (found.shape, found.dtype) == (shape, torch.float32)
    return found.double().numpy().ravel()


# --- the formulas ---


class Case(NamedTuple):
    """`gain`: what no delta is multiplied by more than, all in all."""

    method: str
    gain: float
    oracle: Callable[[np.ndarray, list[np.ndarray]], np.ndarray]
    shared: Mapping[str, Any] = EMPTY
    each: Mapping[str, Sequence[Any]] = EMPTY
    models: int = 3
    size: float = 1.0


DENSITY, EPSILON = (0.3, 0.9, 0.55), (0.2, 0.05, 0.4)
DROP = {"weight": WEIGHTS, "density": DENSITY, "epsilon": EPSILON}
SIGNED_DROP = DROP | {"weight": SIGNED}
DROPPED = (DENSITY, EPSILON, KEYS, COLUMNS)
CASES = {
    "della": Case("della", 4.0 / min(WEIGHTS), lambda b, m: oracles.della(b, m, WEIGHTS, *DROPPED), each=DROP),
    "della-inverse": Case(
        "della",
        10.0 / min(WEIGHTS),
        lambda b, m: oracles.della(b, m, WEIGHTS, *DROPPED, rescale="inverse"),
        {"rescale": "inverse"},
        DROP,
    ),
    "della_linear": Case(
        "della_linear", 4.0, lambda b, m: oracles.della_linear(b, m, SIGNED, *DROPPED), each=SIGNED_DROP
    ),
    "della_linear-plain": Case(
        "della_linear",
        1.0,
        lambda b, m: oracles.della_linear(b, m, WEIGHTS, *DROPPED, rescale="none", lambda_=0.9),
        {"rescale": False, "lambda": 0.9},
        DROP,
    ),
    "sce": Case("sce", 1.0, oracles.sce),
    "sce-top": Case("sce", 1.0, lambda b, m: oracles.sce(b, m, 0.4), {"select_topk": 0.4}, models=2),
    "sce-of-one": Case("sce", 1.0, lambda b, m: b, {"select_topk": 0.4}, models=1),
    "sce-of-small-deltas": Case("sce", 1.0, oracles.sce, size=2.0**-10),
    "ramplus_tl": Case(
        "ramplus_tl", 1.5, lambda b, m: oracles.ram(b, m, 0.7, 0.5, 0.9), {"epsilon": 0.7, "r": 0.5, "alpha": 0.9}
    ),
    "ramplus_tl-cut": Case(
        "ramplus_tl", 1.5, lambda b, m: oracles.ram(b, m, 0.4, 0.5, 0.2), {"epsilon": 0.4, "r": 0.5}
    ),
}


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("name", CASES)
def test_a_method_is_its_formula(name: str, dtype: str) -> None:
    """Within the first-order error of float32, as in test_methods.py: u = 2**-24 for each of the at most 2 M + 10
    operations, of the largest intermediate result."""
    case = CASES[name]
    base, models = family(dtype, case.models, case.size)
    settings = settings_of(case.method, case.models, case.shared, KEYS[: case.models], **case.each)
    expected = case.oracle(base, models)
    found = merged(case.method, base, models, settings)
    size = np.abs(base) + case.gain * sum(np.abs(model - base) for model in models)
    bound = (2 * case.models + 10) * 2.0**-24 * size
    error = np.abs(found - expected)
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound, at {int(np.argmax(error / bound))}"
    if "of-one" not in name:
        assert np.count_nonzero(found != base) > 0.1 * base.size


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_arcee_fusion_takes_what_matters_most(dtype: str) -> None:
    """A score in float32 is within 1e-4 of its row's divergence; what lies nearer to the threshold may be either."""
    base, (model,) = family(dtype, 1, 4.0)
    found = merged("arcee_fusion", base, [model], settings_of("arcee_fusion", 1))
    scores, threshold = (np.ravel(each) for each in oracles.arcee_scores(base.reshape(SHAPE), model.reshape(SHAPE)))
    decided = np.abs(scores - threshold) > 1e-4 * threshold
    assert decided.mean() > 0.99
    assert 0.02 < (scores >= threshold).mean() < 0.4
    np.testing.assert_array_equal(found[decided], np.where(scores >= threshold, model, base)[decided])
    assert ((found == base) | (found == model)).all()


def test_every_method_that_is_no_sweep_has_a_function() -> None:
    assert direct.FUNCTIONS.keys() == {name for name, row in METHODS.items() if row.direct}
    assert {case.method for case in CASES.values()} | {"arcee_fusion"} == direct.FUNCTIONS.keys()


def test_the_parts_of_a_sweep_that_they_share_have_its_bits() -> None:
    """At density 1 nothing is dropped or scaled."""
    base, models = family("F32")
    tensors = [torch.tensor(each, dtype=torch.float32) for each in (*models, base)]
    for method, like in (("della_linear", "task_arithmetic"), ("della", "dare_ties")):
        shared = {"rescale": True, "lambda": 0.7, "normalize": False}
        own = settings_of(method, 3, shared, KEYS, weight=WEIGHTS, density=(1.0,) * 3)
        other = settings_of(like, 3, shared, KEYS, weight=WEIGHTS, density=(1.0,) * 3)
        expected = reference.sweep_tile(tensors[:3], tensors[3], METHODS[like].sweep(other, Measured()), 0)
        np.testing.assert_array_equal(merged(method, base, models, own), expected.double().numpy())


# --- what is kept ---


def drops(rows: np.ndarray, density: float, epsilon: float, key: int = KEYS[0], word: Any = "none") -> np.ndarray:
    settings = settings_of(
        "della_linear", 1, {"rescale": word}, (key,), weight=(1.0,), density=(density,), epsilon=(epsilon,)
    )
    return merged("della_linear", np.zeros(rows.size), [rows.ravel()], settings, rows.shape).reshape(rows.shape)


def test_the_larger_an_element_in_its_row_the_likelier_it_stays() -> None:
    """Kept shares of ten buckets of ranks, each within 5 sigma of its probability."""
    rng = np.random.default_rng(1)
    rows = np.stack([rng.permutation(1000) + 1.0 for _ in range(300)]) * rng.choice([-1, 1], (300, 1000))
    for density, epsilon in ((0.5, 0.4), (0.3, 0.1), (0.9, 0.05)):
        stays = drops(rows, density, epsilon) != 0
        for bucket in range(10):
            place = np.abs(rows) - 1
            inside = (place >= 100 * bucket) & (place < 100 * bucket + 100)
            chance = density - epsilon + 2 * epsilon * place[inside] / 999
            sigma = np.sqrt((chance * (1 - chance)).sum())
            assert abs(stays[inside].sum() - chance.sum()) < 5 * sigma, (density, epsilon, bucket)


def test_an_element_alone_in_its_row_stays_with_the_density() -> None:
    count = 20_000
    stays = drops(np.ones((count, 1)), 0.3, 0.2) != 0
    assert abs(stays.sum() - 0.3 * count) < 5 * np.sqrt(0.3 * 0.7 * count)


def test_rescaled_drops_have_the_norm_and_the_mean_of_the_delta() -> None:
    rows = np.random.default_rng(2).standard_normal((200, 500)).astype(np.float32).astype(np.float64)
    whole = np.abs(rows).sum()
    assert np.abs(drops(rows, 0.4, 0.2, word=True)).sum() == pytest.approx(whole, rel=1e-6)
    chance = oracles.probabilities(rows, 0.4, 0.2)
    sigma = np.sqrt((np.square(rows) * (1 - chance) / chance).sum())
    assert abs(np.abs(drops(rows, 0.4, 0.2, word="inverse")).sum() - whole) < 5 * sigma


def test_drops_do_not_depend_on_the_rows_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(2).standard_normal((57, 93))
    expected = drops(rows, 0.4, 0.2)
    assert (drops(rows, 0.4, 0.2, key=KEYS[1]) != expected).any()
    for together in (1, 300, 93 * 56):
        monkeypatch.setattr(direct, "_TILE", together)
        np.testing.assert_array_equal(drops(rows, 0.4, 0.2), expected)


@pytest.mark.parametrize("method", ["arcee_fusion", "sce", "ramplus_tl"])
def test_a_nan_stays(method: str) -> None:
    base, models = family("F32", METHODS[method].models[1] or 3)
    models[0][77] = np.nan
    settings = settings_of(method, len(models), {"select_topk": 0.5})
    assert np.isnan(merged(method, base, models, settings)[77])


# --- whole merges ---

SHAPES = {
    "model.embed_tokens.weight": (61, 24),
    "model.layers.0.mlp.up_proj.weight": (24, 40),
    "model.layers.0.norm.weight": (24,),
    "model.empty": (0, 3),
    "model.scalar": (),
    "model.wide.weight": (2, 3, 5, 7),
}
THREE = "base_model: base\nmodels: [model: a, model: b, model: c]\n"
TWO = "base_model: base\nmodels: [model: a]\n"
RECIPES = {
    "della": f"{THREE}parameters: {{weight: 0.4, density: 0.6}}\n",
    "della_linear": f"{THREE}parameters: {{weight: 0.4, density: 0.6, epsilon: [0.1, 0.3]}}\n",
    "arcee_fusion": TWO,
    "sce": f"{THREE}parameters: {{select_topk: 0.3}}\n",
    "ramplus_tl": f"{THREE}parameters: {{epsilon: 0.002, r: 0.5}}\n",
}


def recipe(method: str, more: str = "") -> Recipe:
    return Recipe.parse(f"merge_method: {method}\n{RECIPES[method]}{more}")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """base, a, b and c in bf16, in the folder that tests are in."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(7)
    base = {name: rng.standard_normal(shape) * 0.02 for name, shape in SHAPES.items()}
    saved = {}
    for model in ("base", "a", "b", "c"):
        size = 0.0 if model == "base" else 0.003
        saved[model] = {
            name: torch.tensor(values + size * rng.standard_normal(values.shape)).to(torch.bfloat16)
            for name, values in base.items()
        }
        save(model, saved[model])
    return saved


def save(folder: str, tensors: Mapping[str, torch.Tensor]) -> None:
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "config.json").write_text(json.dumps({"num_hidden_layers": 1}))
    save_file(dict(tensors), Path(folder) / "model.safetensors", {"format": "pt"})


def test_every_method_has_a_recipe() -> None:
    assert RECIPES.keys() == direct.FUNCTIONS.keys()


@pytest.mark.parametrize("dtype", ["BF16", "F32", "F64"])
@pytest.mark.parametrize("method", RECIPES)
def test_a_whole_merge_is_the_function_of_each_tensor(
    models: dict[str, dict[str, torch.Tensor]], method: str, dtype: str
) -> None:
    arithmetic = torch.float32
    if dtype == "F64":  # in which F64 inputs are merged
        arithmetic = torch.float64
        for model, tensors in models.items():
            models[model] = {name: tensor.double() for name, tensor in tensors.items()}
            save(model, models[model])
    asked = recipe(method, "out_dtype: float32\n" if dtype == "F32" else "")
    (stage,) = plan(asked).stages
    report = fastmerge.merge(asked, "out")
    assert report.worked == {"torch": ("merge",)}
    found = load_file("out/model.safetensors")
    assert found.keys() == SHAPES.keys()
    changed = 0
    for job in stage.jobs:
        if not job.shape or 0 not in job.shape:
            tensors = [models[stage.models[source.model].name][source.tensor].to(arithmetic) for source in job.sources]
            expected = reference.narrow(direct.FUNCTIONS[method](tensors[:-1], tensors[-1], job.settings), TORCH[dtype])
            assert torch.equal(found[job.name], expected), job.name
            changed += not torch.equal(found[job.name].double(), tensors[-1].double())
        assert (found[job.name].dtype, tuple(found[job.name].shape)) == (TORCH[dtype], job.shape)
    assert changed >= 3


@pytest.mark.usefixtures("models")
def test_the_seed_decides_what_is_dropped() -> None:
    results = []
    for out, seed in (("x", 5), ("y", 5), ("z", 6)):
        fastmerge.merge(recipe("della"), out, seed=seed, threads=1 + len(results))
        results.append((Path(out) / "model.safetensors").read_bytes())
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.usefixtures("models")
def test_several_outputs_of_one_read() -> None:
    report = fastmerge.merge(recipe("della_linear"), "out", vary={"lambda": [0.5, 1.0]})
    assert len(report.outputs) == 2
    fastmerge.merge(recipe("della_linear"), "single")
    names = [(folder / "model.safetensors").read_bytes() for folder in (Path("single"), *report.outputs)]
    assert names[0] == names[2]
    assert names[0] != names[1]


@pytest.mark.parametrize("method", ["sce", "ramplus_tl", "della"])
def test_a_model_without_the_tensor_has_no_part_in_it(models: dict[str, dict[str, torch.Tensor]], method: str) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    del models["b"][name]
    save("b", models["b"])
    with pytest.warns(fastmerge.FastmergeWarning, match="lacks 1 tensors"):
        (stage,) = plan(recipe(method)).stages
    with pytest.warns(fastmerge.FastmergeWarning, match="lacks 1 tensors"):
        fastmerge.merge(recipe(method), "out")
    job = next(job for job in stage.jobs if job.name == name)
    tensors = [models[model][name].float() for model in ("a", "c", "base")]
    expected = direct.FUNCTIONS[method](tensors[:2], tensors[2], job.settings)
    assert torch.equal(load_file("out/model.safetensors")[name], expected.bfloat16())


@pytest.mark.parametrize("method", RECIPES)
def test_a_nan_among_the_inputs_stops_the_merge_or_goes_through(
    models: dict[str, dict[str, torch.Tensor]], method: str
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    models["a"][name][3, 5], models["a"][name][4, 0] = torch.nan, torch.inf
    save("a", models["a"])
    with pytest.raises(NonFiniteError, match=f"a: tensor '{name}' holds 2 NaN or Inf, the first at index 125"):
        fastmerge.merge(recipe(method), "out")
    assert not Path("out").exists()
    fastmerge.merge(recipe(method), "out", nonfinite="propagate")


# --- what the plan says, and what is refused ---


@pytest.mark.usefixtures("models")
def test_the_plan_says_what_is_not_fused() -> None:
    for method, text in (("sce", RECIPES["sce"]), ("task_arithmetic", f"{THREE}parameters: {{weight: 1}}\n")):
        (stage,) = plan(Recipe.parse(f"merge_method: {method}\n{text}")).to_json()["stages"]
        assert {(job["fused"], job["passes"]) for job in stage["jobs"]} == {(method != "sce", 1)}


@pytest.mark.usefixtures("models")
def test_without_torch_a_merge_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match=r"sce is not fused and runs by torch alone: .*fastmerge\[torch\]"):
        fastmerge.merge(recipe("sce"), "out")
    assert not Path("out").exists()


@pytest.mark.usefixtures("models")
def test_a_backend_asked_for_by_name_does_not_fall_back() -> None:
    with pytest.raises(BackendError, match="ramplus_tl is not fused and runs by torch alone, not by cpu"):
        fastmerge.merge(recipe("ramplus_tl"), "out", backend="cpu")
    assert not Path("out").exists()


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: sce\nmodels: [model: a]\n", "sce needs base_model"),
        (f"merge_method: nearswap\n{THREE}parameters: {{t: 1}}\n", "nearswap takes exactly one model besides the base"),
        (f"merge_method: arcee_fusion\n{THREE}", "arcee_fusion takes exactly one model besides the base, got 3"),
        (f"merge_method: nearswap\n{TWO}", "nearswap needs the parameter t"),
        (f"merge_method: ram\n{TWO}parameters: {{alfa: 1}}\n", "unknown parameter 'alfa'; did you mean 'alpha'"),
        (f"merge_method: sce\n{TWO}parameters: {{select_topk: 2}}\n", "select_topk must be a number from 0 to 1"),
        (
            f"merge_method: della\n{THREE}parameters: {{weight: 1, density: 0.9}}\n",
            "density 0.9 with epsilon 0.15 takes a probability out of (0, 1); change one of them, for 'model.",
        ),
    ],
    ids=["no-base", "nearswap-of-four", "arcee-of-four", "no-t", "unknown", "too-much", "probability"],
)
def test_a_recipe_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(Recipe.parse(text))
    assert message in str(caught.value)
