"""Each row of the table against its formula, on every provider: measured, turned into a sweep, and swept."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import oracles
import pytest
from conftest import Tensors, decode, measured_sweep, merge, merge_by

from fastmerge.methods import KNOWN, METHODS, Base, Measured, Settings, ranks, rescale_of
from fastmerge.sweep import EVERY, Cut, Keep, Rescale, Run

COUNT = 3000
WEIGHTS = (0.6180339, 1.0, 0.2718281)  # no sum or difference of them cancels by chance
SIGNED = (0.6180339, -1.0, 0.2718281)
KEYS = (17, 2**63 + 5, 4)


def family(seed: int = 0, models: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and its fine-tunes. Deltas are small multiples of 2**-9: exact in float32, many of equal magnitude."""
    rng = np.random.default_rng(seed)
    base = rng.integers(-512, 513, COUNT) / 256
    return base, [base + np.rint(rng.standard_normal(COUNT) * 256) / 512 for _ in range(models)]


def assert_within_rounding(
    found: np.ndarray, expected: np.ndarray, base: np.ndarray | float, terms: Sequence[np.ndarray], mass: float = 1.0
) -> None:
    """Within the first-order error of float32: u = 2**-24 for each operation, of the largest intermediate result.

    Per term at most 5 roundings (rescale, weight, both products, lambda), then the sum (M), the mass (M), the division,
    the product with lambda, the base's sum and the output: fewer than 2 M + 10. `terms` are lambda times the weighted,
    rescaled deltas; `mass` is the least they are divided by.
    """
    size = np.abs(base) + sum(np.abs(term) for term in terms) / mass
    bound = (2 * len(terms) + 10) * 2.0**-24 * size
    error = np.abs(found - expected)
    assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound, at {int(np.argmax(error / bound))}"


# --- plain weights ---


@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED], ids=["positive", "negative"])
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(provider: ModuleType, normalize: bool, weights: tuple[float, ...]) -> None:
    _, models = family()
    found = merge_by("linear", provider, models, weight=weights, shared={"normalize": normalize})
    expected = oracles.linear(models, weights, normalize)
    terms = [w * x for w, x in zip(weights, models, strict=True)]
    assert_within_rounding(found, expected, 0.0, terms, abs(sum(weights)) if normalize else 1.0)


def test_linear_with_weights_that_sum_to_zero_is_the_sum(provider: ModuleType) -> None:
    """A recipe cannot ask for it; a mean without mass has a value all the same."""
    _, models = family(models=2)
    found = merge_by("linear", provider, models, weight=(1.0, -1.0))
    np.testing.assert_array_equal(found, models[0] - models[1])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_uniform_soup(provider: ModuleType, count: int) -> None:
    _, models = family(models=count)
    found = merge_by("uniform_soup", provider, models)
    assert_within_rounding(found, oracles.uniform_soup(models), 0.0, models, count)
    np.testing.assert_array_equal(found, merge_by("linear", provider, models, weight=[1.0] * count))


@pytest.mark.parametrize("scale", [None, 1.0, 0.5, -3.0, 0.0, 0.3])
def test_passthrough(provider: ModuleType, scale: float | None) -> None:
    _, (model,) = family(models=1)
    found = merge_by("passthrough", provider, [model], scale=[scale])
    expected = oracles.passthrough(model, scale)
    if scale == 0.3:
        assert_within_rounding(found, expected, 0.0, [expected])
    else:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_slerp(provider: ModuleType, t: float) -> None:
    base, (model,) = family(models=1)
    other = np.roll(model, 7)  # far from parallel
    found = merge_by("slerp", provider, [base, other], shared={"t": t})
    expected = oracles.slerp(base, other, t)
    assert_within_rounding(found, expected, 0.0, [base * 2, other * 2])  # coefficients are below 2 at this angle
    if t in (0.0, 1.0):
        np.testing.assert_array_equal(found, other if t else base)


@pytest.mark.parametrize("relation", ["parallel", "almost-parallel", "opposite", "zero", "both-zero", "orthogonal"])
def test_slerp_where_there_is_no_angle(provider: ModuleType, relation: str) -> None:
    base, _ = family()
    half = np.arange(COUNT) % 2
    a, b = {
        "parallel": (base, 2 * base),
        "almost-parallel": (base, base + half / 512),
        "opposite": (base, -base),
        "zero": (base, 0 * base),
        "both-zero": (0 * base, 0 * base),
        "orthogonal": (base * half, base * (1 - half)),
    }[relation]
    t = 0.25
    found = merge_by("slerp", provider, [a, b], shared={"t": t})
    straight = (1 - t) * a + t * b
    right_angle = math.sin((1 - t) * math.pi / 2) * a + math.sin(t * math.pi / 2) * b
    assert_within_rounding(found, oracles.slerp(a, b, t), 0.0, [a, b])
    is_straight = relation in ("parallel", "almost-parallel", "opposite")
    assert_within_rounding(found, straight if is_straight else right_angle, 0.0, [a, b])


def test_slerp_keeps_the_length_on_the_way(provider: ModuleType) -> None:
    base, _ = family()
    a, b = base / np.linalg.norm(base), np.roll(base, 1) / np.linalg.norm(base)
    for t in (0.2, 0.5, 0.7):
        found = merge_by("slerp", provider, [a, b], shared={"t": t})
        assert np.linalg.norm(found) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("based", [False, True], ids=["models", "deltas"])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.3, 0.5), (0.5, -0.2)], ids=str)
def test_nuslerp(provider: ModuleType, weights: tuple[float, float], based: bool) -> None:
    base, models = unlike(2)
    origin = base if based else None
    found = merge_by("nuslerp", provider, models, origin, weight=weights)
    expected = oracles.nuslerp(models, weights, base * based)
    assert_within_rounding(found, expected, base * based, [2 * (x - base * based) for x in models])


@pytest.mark.parametrize("based", [False, True], ids=["models", "deltas"])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(provider: ModuleType, normalize: bool, based: bool) -> None:
    base, models = unlike(3)
    origin, shared = base if based else None, {"normalize_weights": normalize}
    found = merge_by("multislerp", provider, models, origin, weight=WEIGHTS, shared=shared)
    expected = oracles.multislerp(models, WEIGHTS, base * based, normalize)
    assert_within_rounding(found, expected, base * based, [2 * (x - base * based) for x in models])


def test_weights_of_multislerp_that_sum_to_nothing_are_not_divided_by(provider: ModuleType) -> None:
    base, models = unlike(2)
    found = merge_by("multislerp", provider, models, base, weight=(1.0, -1.0))
    expected = oracles.multislerp(models, (1.0, -1.0), base, normalize=False)
    assert_within_rounding(found, expected, base, [x - base for x in models])


@pytest.mark.parametrize("shared", [{}, {"max_iter": 1.0}, {"tol": 0.1}], ids=str)
def test_karcher(provider: ModuleType, shared: dict[str, float]) -> None:
    _, models = unlike(3)
    found = merge_by("karcher", provider, models, shared=shared)
    expected = oracles.karcher(models, int(shared.get("max_iter", 10)), shared.get("tol", 1e-5))
    assert_within_rounding(found, expected, 0.0, [2 * x for x in models])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_model_stock(provider: ModuleType, count: int) -> None:
    base, models = unlike(count)
    found = merge_by("model_stock", provider, models, base)
    assert_within_rounding(found, oracles.model_stock(base, models), base, [x - base for x in models])


def unlike(count: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A base and models at wide angles, whose deltas have something in common: no weight here comes to 2."""
    base, models = family(models=count + 1)
    shared = models.pop() - base
    return base, [np.roll(model, 7 * i) + shared for i, model in enumerate(models)]


# --- deltas, every model taking part ---


@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED], ids=["positive", "negative"])
@pytest.mark.parametrize(("normalize", "lambda_"), [(False, 1.0), (True, 1.0), (True, -0.7), (False, 0.3)])
def test_task_arithmetic(provider: ModuleType, normalize: bool, lambda_: float, weights: tuple[float, ...]) -> None:
    base, models = family()
    shared = {"normalize": normalize, "lambda": lambda_}
    found = merge_by("task_arithmetic", provider, models, base, weight=weights, shared=shared)
    expected = oracles.task_arithmetic(base, models, weights, normalize, lambda_)
    terms = [lambda_ * w * (x - base) for w, x in zip(weights, models, strict=True)]
    assert_within_rounding(found, expected, base, terms, abs(sum(weights)) if normalize else 1.0)


@pytest.mark.parametrize("weights", [(1.0, -1.0), (1e-9, 0.0), (0.0, 0.0)], ids=str)
def test_weights_that_sum_to_nothing_are_not_divided_by(provider: ModuleType, weights: tuple[float, ...]) -> None:
    base, models = family(models=2)
    found = merge_by("task_arithmetic", provider, models, base, weight=weights, shared={"normalize": True})
    expected = oracles.task_arithmetic(base, models, weights, normalize=True)
    assert_within_rounding(found, expected, base, [w * (x - base) for w, x in zip(weights, models, strict=True)])
    if weights == (0.0, 0.0):
        np.testing.assert_array_equal(found, base)


def test_models_equal_to_the_base_leave_its_bits(provider: ModuleType) -> None:
    base, _ = family()
    base[:3] = -0.0, 0.0, 1e-45
    settings: dict[str, dict[str, Any]] = {
        "task_arithmetic": {},
        "ties": {"density": (0.5, 0.2)},
        "dare_linear": {"density": (0.5, 0.2), "keys": (1, 2)},
        "dare_ties": {"density": (0.5, 0.2), "keys": (1, 2)},
    }
    for method, each in settings.items():
        found = merge_by(method, provider, [base, base], base, weight=(0.3, 0.9), **each)
        np.testing.assert_array_equal(found, base.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(found), np.signbit(base))


# --- TIES ---

GOLDEN = [
    [4, -3, 2, 1, 0, 2, -1, 5, 1, 2],
    [-1, -2, 4, 1, 3, -2, -1, -5, 1, 6],
    [2, 5, -3, 1, 0, 0, 4, 0.5, 1, -7],
]
DEFAULT = (3, 5, 3, 0, 3, 2, 4, 5, 0, -7)
GOLDEN_RESULTS = {
    "all-contributors-zero": (3, 0, 2, 0, 3, 0, 4, 0, 0, 8 / 3),
    "all-count-zero": (3, 0, 3, 0, 3, 0, 4, 0, 0, 4),
    "index-weights-positive": DEFAULT,
    "index-count-positive": DEFAULT,
}


@pytest.mark.parametrize("options", GOLDEN_RESULTS)
def test_the_golden_example(provider: ModuleType, options: str) -> None:
    ties, divide, tie_vote = options.split("-")
    models = [np.array(delta, float) for delta in GOLDEN]
    found = merge_by(
        "ties",
        provider,
        models,
        np.zeros(10),
        weight=[1.0] * 3,
        density=[0.5] * 3,
        shared={"ties": ties, "divide": divide, "tie_vote": tie_vote},
    )
    np.testing.assert_array_equal(found, np.float32(GOLDEN_RESULTS[options]))
    oracle = oracles.ties(np.zeros(10), models, [1.0] * 3, [0.5] * 3, ties=ties, divide=divide, tie_vote=tie_vote)
    np.testing.assert_array_equal(found, oracle.astype(np.float32))


def test_the_golden_example_by_default(provider: ModuleType) -> None:
    models = [np.array(delta, float) for delta in GOLDEN]
    found = merge_by("ties", provider, models, np.zeros(10), weight=[1.0] * 3, density=[0.5] * 3)
    np.testing.assert_array_equal(found, np.float32(DEFAULT))


def check_elected(
    method: str, provider: ModuleType, oracle: dict[str, Any], masks: list[np.ndarray] | None = None, **each: Any
) -> None:
    """A method that elects, against the oracle called with the same options."""
    base, models = family()
    options = {"lambda" if name == "lambda_" else name: value for name, value in oracle.items()}
    weights, densities = each["weight"], each["density"]
    if masks is None:
        expected = oracles.ties(base, models, weights, densities, **oracle)
    else:
        expected = oracles.dare_ties(base, models, weights, densities, masks, **oracle)
    found = merge_by(method, provider, models, base, shared=options, **each)
    factor = 6.0  # no rescale here is by more: 1 / density, or a ratio of norms
    terms = [oracle.get("lambda_", 1.0) * factor * w * (x - base) for w, x in zip(weights, models, strict=True)]
    # the least sum of these weights that is not 0, where there is one to divide by
    assert_within_rounding(found, expected, base, terms, 0.1)


@pytest.mark.parametrize("elect", ["weighted", "plain", "count"])
@pytest.mark.parametrize("tie_vote", ["positive", "zero"])
@pytest.mark.parametrize("divide", [None, "weights", "count", "contributors", "none"])
@pytest.mark.parametrize("ties", ["index", "all"])
def test_ties_elections(provider: ModuleType, elect: str, tie_vote: str, divide: str | None, ties: str) -> None:
    oracle = {"elect": elect, "tie_vote": tie_vote, "divide": divide, "ties": ties, "lambda_": 0.7}
    check_elected("ties", provider, oracle, weight=WEIGHTS, density=(0.3, 0.5, 0.8))


@pytest.mark.parametrize("rescale", ["none", "inverse", "l1", "l2", "linf"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED], ids=["positive", "negative"])
def test_ties_rescales(provider: ModuleType, rescale: str, normalize: bool, weights: tuple[float, ...]) -> None:
    oracle = {"rescale": rescale, "normalize": normalize}
    check_elected("ties", provider, oracle, weight=weights, density=(0.2, 0.5, 0.8))


@pytest.mark.parametrize("densities", [(0.0, 0.5, 1.0), (1.0,) * 3, (0.0,) * 3, (1e-9, 0.3334, 0.9999)], ids=str)
@pytest.mark.parametrize("ties", ["index", "all"])
def test_ties_densities(provider: ModuleType, densities: tuple[float, ...], ties: str) -> None:
    check_elected("ties", provider, {"ties": ties}, weight=WEIGHTS, density=densities)


def test_a_trim_that_rescales_by_default_matches_the_l1_norm(provider: ModuleType) -> None:
    base, (model,) = family(models=1)
    found = merge_by("ties", provider, [model], base, weight=[1.0], density=[0.3], shared={"rescale": True})
    expected = oracles.ties(base, [model], [1.0], [0.3], rescale="l1")
    assert_within_rounding(found, expected, base, [4 * (model - base)])
    assert np.abs(found - base).sum() == pytest.approx(np.abs(model - base).sum(), rel=1e-6)


def test_a_norm_of_nothing_rescales_nothing(provider: ModuleType) -> None:
    base, (model,) = family(models=1)
    for density, tune in ((0.0, model), (0.5, base)):
        for rescale in ("l1", "l2", "linf"):
            found = merge_by(
                "ties", provider, [tune], base, weight=[1.0], density=[density], shared={"rescale": rescale}
            )
            np.testing.assert_array_equal(found, base)


@pytest.mark.parametrize("ties", ["index", "all"])
def test_one_threshold_over_a_model(provider: ModuleType, ties: str) -> None:
    """`scope: model`: the group's cut, told to each tensor in its own indices, is TIES on the tensors end to end."""
    base, models = family()
    bounds = (0, 700, 701, 2000, COUNT)
    row, shared = METHODS["ties"], {"scope": "model", "ties": ties}
    settings = Settings(
        {p.name: shared.get(p.name, p.default) for p in row.parameters if not p.per_model},
        tuple({"weight": w, "density": density} for w, density in zip(WEIGHTS, (0.2, 0.45, 0.7), strict=True)),
    )
    pieces = [
        Tensors([(model[a:b], "F32") for model in models], (base[a:b], "F32")) for a, b in itertools.pairwise(bounds)
    ]
    (cuts,) = provider.threshold([[piece.inputs for piece in pieces]], [ranks(settings, COUNT)], Run())
    found = []
    for piece, begin in zip(pieces, bounds, strict=False):
        own = tuple(Cut(cut.magnitude, max(0, cut.ties_end - begin)) for cut in cuts)
        ((raw,), _) = merge(provider, piece, [measured_sweep(provider, row, settings, piece, own)], ["F32"])
        found.append(decode(raw, "F32"))
    expected = oracles.ties(base, models, WEIGHTS, (0.2, 0.45, 0.7), ties=ties)
    terms = [w * (x - base) for w, x in zip(WEIGHTS, models, strict=True)]
    assert_within_rounding(np.concatenate(found), expected, base, terms, min(WEIGHTS))


# --- Model breadcrumbs ---

BAND = {"density": (0.3, 0.9, 0.55), "gamma": (0.05, 0.3, 0.013)}  # the second leaves less to gamma than it asks for


@pytest.mark.parametrize("rescale", ["none", "inverse", "l1", "l2", "linf"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [WEIGHTS, SIGNED], ids=["positive", "negative"])
def test_breadcrumbs(provider: ModuleType, rescale: str, normalize: bool, weights: tuple[float, ...]) -> None:
    base, models = family()
    shared = {"rescale": rescale, "normalize": normalize, "lambda": 0.7}
    found = merge_by("breadcrumbs", provider, models, base, weight=weights, shared=shared, **BAND)
    expected = oracles.breadcrumbs(
        base, models, weights, *BAND.values(), normalize=normalize, lambda_=0.7, rescale=rescale
    )
    terms = [0.7 * 8 * w * (x - base) for w, x in zip(weights, models, strict=True)]  # no rescale is by more than 8
    assert_within_rounding(found, expected, base, terms, abs(sum(weights)) if normalize else 1.0)
    assert 0.5 * COUNT < np.count_nonzero(found != base) < COUNT


@pytest.mark.parametrize("elect", ["weighted", "plain", "count"])
@pytest.mark.parametrize("tie_vote", ["positive", "zero"])
@pytest.mark.parametrize("divide", ["weights", "count", "contributors", "none"])
def test_breadcrumbs_ties(provider: ModuleType, elect: str, tie_vote: str, divide: str) -> None:
    base, models = family()
    options = {"rescale": "l2", "elect": elect, "tie_vote": tie_vote, "divide": divide}
    found = merge_by("breadcrumbs_ties", provider, models, base, weight=WEIGHTS, shared=options, **BAND)
    expected = oracles.breadcrumbs_ties(base, models, WEIGHTS, *BAND.values(), **options)
    terms = [8 * w * (x - base) for w, x in zip(WEIGHTS, models, strict=True)]
    assert_within_rounding(found, expected, base, terms, min(WEIGHTS))


@pytest.mark.parametrize(
    ("density", "gamma", "expected"),
    [
        (0.5, 0.1, [0, -4, 3, -3, 0, 1, 0, 0, 0, 4]),  # one of the three fours goes, and one of the three ones stays
        (0.5, 0.0, [4, -4, 3, -3, 0, 0, 0, 0, 0, 4]),
        (0.5, 0.25, [0, 0, 3, -3, 0, 1, 0, -1, 0, 4]),
        (0.9, 0.5, [0, -4, 3, -3, 2**-30, 1, 0, -1, 1, 4]),  # all that density leaves to gamma is one
        (1.0, 0.5, [4, -4, 3, -3, 2**-30, 1, 0, -1, 1, 4]),
        (0.05, 0.1, [0] * 10),  # int(density n) is none
        (0.0, 0.1, [0] * 10),
    ],
    ids=["band", "no-gamma", "gamma", "density-first", "density-1", "under-one", "density-0"],
)
def test_a_band_keeps_its_count_and_of_equals_the_first(
    provider: ModuleType, density: float, gamma: float, expected: list[float]
) -> None:
    delta = np.array([4, -4, 3, -3, 2**-30, 1, 0, -1, 1, 4])
    found = merge_by("breadcrumbs", provider, [delta], 0 * delta, weight=[1.0], density=[density], gamma=[gamma])
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(oracles.band(delta, density, gamma), expected)


@pytest.mark.parametrize("count", [2047, 70_003])
def test_a_band_of_few_magnitudes_is_that_of_the_oracle(provider: ModuleType, count: int) -> None:
    delta = np.random.default_rng(4).integers(-5, 6, count) / 4
    for density, gamma in ((0.3, 0.1), (0.6, 0.6), (0.05, 0.9), (0.2, 0.0001)):
        found = merge_by("breadcrumbs", provider, [delta], 0 * delta, weight=[1.0], density=[density], gamma=[gamma])
        np.testing.assert_array_equal(found, oracles.band(delta, density, gamma))


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_a_nan_stays_in_a_band(provider: ModuleType, method: str) -> None:
    base, models = family()
    models[0][77] = np.nan
    found = merge_by(method, provider, models, base, weight=WEIGHTS, **BAND)
    assert np.flatnonzero(np.isnan(found)).tolist() == [77]


# --- near swap ---


@pytest.mark.parametrize("t", [0.25, 0.001, 7.0])
def test_nearswap(provider: ModuleType, t: float) -> None:
    base, (model,) = family(models=1)
    found = merge_by("nearswap", provider, [model], base, shared={"t": t})
    assert_within_rounding(found, oracles.nearswap(base, model, t), base, [model - base])
    assert (found != base).any()


@pytest.mark.parametrize("t", [0.0, -1.0])
def test_nearswap_that_may_not_move_leaves_the_base(provider: ModuleType, t: float) -> None:
    base, (model,) = family(models=1)
    base[0] = -0.0
    found = merge_by("nearswap", provider, [model], base, shared={"t": t})
    np.testing.assert_array_equal(found, base)
    assert np.signbit(found[0])


def test_nearswap_keeps_a_nan(provider: ModuleType) -> None:
    base, (model,) = family(models=1)
    model[77] = np.nan
    found = merge_by("nearswap", provider, [model], base, shared={"t": 0.1})
    assert np.flatnonzero(np.isnan(found)).tolist() == [77]


# --- RAM ---


@pytest.mark.parametrize("epsilon", [0.5, 0.4999, 1e-5, 0.0, 9.0])  # some deltas are as large as the first
@pytest.mark.parametrize("count", [1, 3, 7])
def test_ram(provider: ModuleType, count: int, epsilon: float) -> None:
    base, models = family(models=count)
    found = merge_by("ram", provider, models, base, shared={"epsilon": epsilon})
    expected = oracles.ram(base, models, epsilon)
    assert_within_rounding(found, expected, base, [model - base for model in models])
    assert (found != base).any() == (epsilon < 9.0)


def test_ram_keeps_a_nan(provider: ModuleType) -> None:
    base, models = family()
    models[0][77] = np.nan
    found = merge_by("ram", provider, models, base)
    assert np.flatnonzero(np.isnan(found)).tolist() == [77]


# --- DARE ---


def masks_of(densities: Sequence[float]) -> list[np.ndarray]:
    cuts = [round(density * 2**32) for density in densities]
    return [oracles.bernoulli(key, cut, COUNT) for key, cut in zip(KEYS, cuts, strict=True)]


@pytest.mark.parametrize("rescale", ["none", "inverse", "l1", "l2", "linf", True, False], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
def test_dare_linear(provider: ModuleType, rescale: str | bool, normalize: bool) -> None:
    base, models = family()
    densities, lambda_ = (0.2, 0.5, 0.9), 0.8
    shared = {"rescale": rescale, "normalize": normalize, "lambda": lambda_}
    found = merge_by("dare_linear", provider, models, base, weight=SIGNED, density=densities, keys=KEYS, shared=shared)
    word = {True: "inverse", False: "none"}.get(rescale, rescale)
    expected = oracles.dare_linear(
        base, models, SIGNED, densities, masks_of(densities), normalize=normalize, lambda_=lambda_, rescale=word
    )
    terms = [lambda_ * 6 * w * (x - base) for w, x in zip(SIGNED, models, strict=True)]
    assert_within_rounding(found, expected, base, terms, abs(sum(SIGNED)) if normalize else 1.0)


@pytest.mark.parametrize("rescale", ["none", "inverse", "l1"])
@pytest.mark.parametrize("elect", ["weighted", "plain", "count"])
@pytest.mark.parametrize("normalize", [True, False])
def test_dare_ties(provider: ModuleType, rescale: str, elect: str, normalize: bool) -> None:
    densities = (0.2, 0.5, 0.9)
    oracle = {"rescale": rescale, "elect": elect, "normalize": normalize, "lambda_": 0.8}
    check_elected("dare_ties", provider, oracle, masks_of(densities), weight=WEIGHTS, density=densities, keys=KEYS)


@pytest.mark.parametrize("rescale", [True, False, "inverse", "l1", "l2", "linf", "none"], ids=str)
def test_density_one_is_no_drop_to_the_bit(provider: ModuleType, rescale: str | bool) -> None:
    rng = np.random.default_rng(1)
    base, *models = (rng.standard_normal(COUNT) for _ in range(4))
    each = {"weight": WEIGHTS, "density": (1.0,) * 3}
    found = merge_by("dare_linear", provider, models, base, keys=KEYS, shared={"rescale": rescale}, **each)
    np.testing.assert_array_equal(found, merge_by("task_arithmetic", provider, models, base, weight=WEIGHTS))
    found = merge_by("dare_ties", provider, models, base, keys=KEYS, shared={"rescale": rescale}, **each)
    np.testing.assert_array_equal(found, merge_by("ties", provider, models, base, shared={"divide": "none"}, **each))
    found = merge_by("breadcrumbs", provider, models, base, shared={"rescale": rescale}, **each)
    np.testing.assert_array_equal(found, merge_by("task_arithmetic", provider, models, base, weight=WEIGHTS))


def test_density_zero_leaves_the_base(provider: ModuleType) -> None:
    base, models = family()
    for method in ("dare_linear", "dare_ties"):
        found = merge_by(method, provider, models, base, weight=WEIGHTS, density=(0.0,) * 3, keys=KEYS)
        np.testing.assert_array_equal(found, base)


def test_a_drop_is_right_on_average(provider: ModuleType) -> None:
    """The paper's point: over many masks the mean is the delta; each has a variance of d**2 (1 - p) / p."""
    density, draws = 0.25, 400
    base, delta = np.zeros(64), np.linspace(0.5, 2.0, 64)
    total = np.zeros(64)
    for key in range(draws):
        total += merge_by("dare_linear", provider, [delta], base, weight=[1.0], density=[density], keys=[key])
    deviation = delta * math.sqrt((1 - density) / density / draws)
    assert (np.abs(total / draws - delta) <= 5 * deviation).all()


# --- the table itself ---


@pytest.mark.parametrize(
    ("density", "count", "rank"),
    [
        (0.0, 10, 0),
        (-0.5, 10, 0),
        (1.0, 10, 10),
        (1.5, 10, 10),
        (0.5, 10, 5),
        (0.59, 10, 5),
        (1e-9, 10, 1),
        (0.999, 10, 9),
        (0.5, 1, 1),
        (0.29, 100, 28),  # 0.29 * 100 is 28.999...
        (0.1, 2**33, 858993459),
    ],
)
def test_ranks(density: float, count: int, rank: int) -> None:
    settings = Settings({}, ({"density": density}, {"density": 0.5}))
    assert ranks(settings, count) == (rank, max(1, count // 2))


@pytest.mark.parametrize(
    ("density", "gamma", "count", "low", "high"),
    [
        (0.5, 0.1, 10, 6, 1),
        (0.9, 0.5, 10, 10, 1),
        (1.0, 0.5, 10, 10, 0),
        (0.0, 0.5, 10, 0, 0),
        (0.05, 0.5, 10, 0, 0),
        (0.5, 0.05, 10, 5, 0),
        (0.3, 1.0, 10, 10, 7),
        (0.5, 0.5, 0, 0, 0),
    ],
)
def test_ranks_of_a_band(density: float, gamma: float, count: int, low: int, high: int) -> None:
    settings = Settings({}, ({"density": density, "gamma": gamma}, {"density": 0.2, "gamma": 0.3}))
    assert ranks(settings, count) == (low, count // 2, high, 3 * count // 10)


@pytest.mark.parametrize("word", ["none", "inverse", "l1", "l2", "linf", True, False], ids=str)
@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties"])
def test_which_norm_a_rescale_matches(method: str, word: str | bool) -> None:
    named = {"l1": Rescale.L1, "l2": Rescale.L2, "linf": Rescale.LINF}
    expected = Rescale.L1 if word is True and method == "ties" else named.get(str(word), Rescale.NONE)
    assert rescale_of(METHODS[method], Settings({"rescale": word}, ())) is expected


@pytest.mark.parametrize("method", ["linear", "uniform_soup", "task_arithmetic", "slerp", "passthrough"])
def test_methods_without_a_drop_match_no_norm(method: str) -> None:
    assert rescale_of(METHODS[method], Settings({}, ())) is Rescale.NONE


def test_the_table_names_what_each_row_needs() -> None:
    assert list(METHODS) == [
        "linear",
        "uniform_soup",
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
        "sce",
        "ram",
        "ramplus_tl",
        "nearswap",
        "arcee_fusion",
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "model_stock",
        "passthrough",
    ]
    assert [name for name, row in METHODS.items() if row.base is Base.ORIGIN] == [
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
        "sce",
        "ram",
        "ramplus_tl",
        "nearswap",
        "arcee_fusion",
        "model_stock",
    ]
    assert [name for name, row in METHODS.items() if row.base is Base.OPTIONAL] == ["nuslerp", "multislerp"]
    assert [name for name, row in METHODS.items() if row.selects] == ["ties", "breadcrumbs", "breadcrumbs_ties"]
    assert [name for name, row in METHODS.items() if row.random] == [
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
    ]
    assert [name for name, row in METHODS.items() if row.gram] == [
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "model_stock",
    ]
    for row in METHODS.values():
        assert {parameter.name for parameter in row.parameters} <= KNOWN


def test_defaults_are_those_of_mergekit() -> None:
    def default(method: str, name: str) -> object:
        parameter = METHODS[method].parameter(name)
        assert parameter is not None
        return parameter.default

    assert {m: default(m, "normalize") for m in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")} == {
        "linear": True,
        "task_arithmetic": False,
        "ties": True,
        "dare_linear": False,
        "dare_ties": False,
    }
    assert {m: default(m, "rescale") for m in ("ties", "dare_linear", "dare_ties")} == {
        "ties": False,
        "dare_linear": True,
        "dare_ties": True,
    }
    assert (default("ties", "density"), default("ties", "lambda"), default("passthrough", "scale")) == (1.0, 1.0, None)


def test_ties_all_keeps_nothing_at_density_zero() -> None:
    """The cut of rank 0 has no equals to keep: its magnitude is not one of the tensor's."""
    row = METHODS["ties"]
    shared = {p.name: p.default for p in row.parameters if not p.per_model} | {"ties": "all"}
    models = ({"weight": 1.0, "density": 0.0}, {"weight": 1.0, "density": 0.5})
    sweep = row.sweep(Settings(shared, models), Measured((Cut(math.inf, 0), Cut(0.5, 7))))
    assert sweep.keep is Keep.ABOVE
    assert [(part.magnitude, part.ties_end) for part in sweep.parts] == [(math.inf, 0), (0.5, EVERY)]


def test_the_page_of_the_methods_is_that_of_the_table() -> None:
    root = Path(__file__).parents[1] / "docs"
    written = subprocess.run([sys.executable, root / "methods.py"], capture_output=True, text=True, check=True).stdout
    assert (root / "methods.md").read_text() == written, "write it anew: python docs/methods.py > docs/methods.md"
