"""Sessions: the bits of a merge that begins anew, from what was measured once."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import family, save
from test_live import CASES, PARAMETERS, Tied, assert_same, copied, in_memory, on_a_card, poisoned, taking_part

from fastmerge import (
    MismatchError,
    NonFiniteError,
    RecipeError,
    Session,
    backends,
    merge_state_dicts,
)
from fastmerge.keywords import method_of, over

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models() -> dict[str, Tensors]:
    made = family(torch.bfloat16)
    return {name: {**tensors, "model.steps": torch.tensor([3, 4])} for name, tensors in made.items()}


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many measures were asked of a provider: selections of a model's tensor, Gram matrices, norms."""
    asked: Counter[str] = Counter()
    provider = backends.choose

    def choose(wanted: str, *arguments: Any, **options: Any) -> Any:
        return Watched(provider(wanted, *arguments, **options), asked)

    monkeypatch.setattr(backends, "choose", choose)
    return asked


class Watched:
    """A provider whose measures are counted."""

    def __init__(self, provider: Any, asked: Counter[str]) -> None:
        self._provider = provider
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._provider, name)
        if name not in ("threshold", "gram", "norms", "merge_ranked"):
            return op

        def counted(tensors: Any, *rest: Any) -> Any:
            self._asked[name] += sum(map(len, rest[0])) if name == "threshold" else len(tensors)
            return op(tensors, *rest)

        return counted


def session_of(case: str, models: dict[str, Any], **options: Any) -> Session:
    method, parameters = CASES[case]
    names, base = taking_part(method)
    given = [models[name] for name in names]
    origin = None if base is None else given[names.index(base)] if base in names else models[base]
    return Session(given, origin, method=method, **options, **parameters)


# --- the same bits, again and again ---


@pytest.mark.parametrize("case", CASES)
def test_a_session_gives_the_bits_of_a_merge(case: str, models: dict[str, Tensors]) -> None:
    method, parameters = CASES[case]
    expected = in_memory(method, parameters, models, seed=5)
    with session_of(case, models, seed=5) as session:
        for _ in range(2):
            assert_same(session.merge(), expected)
        out = poisoned(expected)
        assert session.merge(out=out) is out
        assert_same(out, expected)


OTHER_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "ties": [
        {"lambda_": 0.3},
        {"weight": [1, 0.5, -0.2]},
        {"density": 0.4},
        {"drop_rate": [0.3, 0.5, 0.9]},
        {"scope": "model", "density": 0.3},
        {"rescale": "l1"},
    ],
    "task_arithmetic": [{"lambda_": 0.3}, {"weight": 1}, {"weight": [[0, 1], 0, 1]}],
    "slerp": [{"t": 0.1}, {"t": [0.3, 0.9, 0.4]}, {"t": 0}],
    "dare_ties": [{"density": 0.4}, {"rescale": "l2"}],
    "breadcrumbs": [{"gamma": 0.2}, {"density": 0.3}, {"weight": -1}],
    "model_stock": [{"filter_wise": True}],
    "linear": [{"weight": [1, 0, 0], "normalize": False}, {"weight": 3}],
    "passthrough": [{"scale": 2}, {"scale": 1}],
    "multislerp": [{"weight": 1}, {"eps": 0.1}],
}


@pytest.mark.parametrize("method", OTHER_SETTINGS)
def test_other_settings_give_the_bits_of_other_merges(method: str, models: dict[str, Tensors]) -> None:
    with session_of(method, models) as session:
        session.merge()
        for own in OTHER_SETTINGS[method]:
            expected = in_memory(method, over(PARAMETERS[method], own, method_of(method)), models)
            assert_same(session.merge(**own), expected)


@pytest.mark.parametrize("method", [name for name in OTHER_SETTINGS if name != "model_stock"])
def test_many_settings_at_once_give_what_one_by_one_does(method: str, models: dict[str, Tensors]) -> None:
    own = [{}, *OTHER_SETTINGS[method]]
    with session_of(method, models) as session:
        made = session.merge_many(own)
        assert len(made) == len(own)
        for each, given in zip(made, own, strict=True):
            assert_same(each, session.merge(**given))
        outs = [poisoned(each, torch.float32) for each in made]
        assert session.merge_many(own, outs=outs) == outs
        for out, given in zip(outs, own, strict=True):
            assert_same(out, session.merge(**given, out=poisoned(made[0], torch.float32)))
        assert session.merge_many([]) == []


def test_checkpoints_stay_mapped(models: dict[str, Tensors]) -> None:
    for name in ("base", "a", "b", "c"):
        save(name, models[name], shards=3)
    with session_of("ties", {name: name for name in models}) as session:
        assert_same(session.merge(), in_memory("ties", PARAMETERS["ties"], models))
        assert_same(session.merge(lambda_=2), in_memory("ties", {**PARAMETERS["ties"], "lambda": 2}, models))


def test_a_module_gets_each_setting() -> None:
    module, one, other, base = (Tied(seed) for seed in range(4))
    states = [each.state_dict() for each in (one, other)]
    with Session(states, base.state_dict(), method="ties", density=0.5) as session:
        for lambda_ in (0.5, 1.5):
            session.merge_into(module, weight=[0.3, 0.6], lambda_=lambda_)
            expected = merge_state_dicts(
                "ties", states, base.state_dict(), weight=[0.3, 0.6], density=0.5, lambda_=lambda_
            )
            assert_same(module.state_dict(), expected)


# --- measured once ---


def test_what_another_lambda_or_weight_changes_is_no_selection(
    models: dict[str, Tensors], measures: Counter[str]
) -> None:
    with session_of("ties", models) as session:
        session.merge()
        first = measures["threshold"]
        assert first >= 3
        for own in ({"lambda_": 0.3}, {"weight": 1}, {"normalize": False}, {"elect": "count"}):
            session.merge(**own)
        assert measures["threshold"] == first
        session.merge(density=0.7)
        second = measures["threshold"]
        assert second > first
        session.merge(density=0.7, lambda_=2)
        session.merge()
        assert measures["threshold"] == second
        session.merge(density=[0.7, 0.5, 0.2])  # each of them known
        assert measures["threshold"] == second
        assert not measures["merge_ranked"]


def test_a_threshold_over_a_model_is_kept_too(models: dict[str, Tensors], measures: Counter[str]) -> None:
    with session_of("ties-of-model", models) as session:
        session.merge()
        first = measures["threshold"]
        session.merge(lambda_=0.3, weight=1)
        assert measures["threshold"] == first
        session.merge(density=0.7)
        assert measures["threshold"] == 2 * first


@pytest.mark.parametrize(
    ("case", "measure", "own"),
    [("slerp", "gram", {"t": 0.2}), ("multislerp", "gram", {"weight": 1}), ("ties-rescaled", "norms", {"lambda_": 2})],
)
def test_inner_products_and_norms_are_kept(
    case: str, measure: str, own: dict[str, Any], models: dict[str, Tensors], measures: Counter[str]
) -> None:
    with session_of(case, models) as session:
        session.merge()
        first = measures[measure]
        assert first
        session.merge(**own)
        assert measures[measure] == first


# --- what a session holds, and what it refuses ---


def test_a_session_lets_go_of_its_models() -> None:
    model = {"x": torch.ones(30)}
    gone = weakref.ref(model["x"])
    with Session([model], method="linear", weight=1) as session:
        del model
        assert_same(session.merge(), {"x": torch.ones(30)})
        assert gone() is not None
    gc.collect()
    assert gone() is None
    with pytest.raises(ValueError, match="the session is closed"):
        session.merge()


def test_a_session_is_not_taken_elsewhere() -> None:
    """Its addresses are those of this process."""
    session = Session([{"x": torch.ones(30)}], method="linear", weight=1)
    for take in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="a session holds memory of this process"):
            take(session)


def test_inputs_are_not_written(models: dict[str, Tensors]) -> None:
    ours = {name: copied(tensors) for name, tensors in models.items()}
    with (
        session_of("ties", ours) as session,
        pytest.raises(MismatchError, match=r"overlaps base\[.* in memory.*the inputs of a session stay as they are"),
    ):
        session.merge(out=ours["base"])
    assert_same(ours["base"], models["base"])


def test_what_does_not_fit_is_told(models: dict[str, Tensors]) -> None:
    with session_of("ties", models) as session:
        with pytest.raises(RecipeError, match="did you mean 'lambda_'"):
            session.merge(lamda=1)
        with pytest.raises(ValueError, match="2 outs for 1 settings"):
            session.merge_many([{}], outs=[{}, {}])
        one: Tensors = {}
        with pytest.raises(ValueError, match="two outs are one and the same dict"):
            session.merge_many([{}, {}], outs=[one, one])
        with pytest.raises(TypeError, match="settings is a list of dicts"):
            session.merge_many({"lambda_": 1})  # type: ignore[arg-type]
        out = poisoned(models["base"])
        with pytest.raises(MismatchError, match=r"outs\[0\]\['.*'\] and outs\[1\]\['.*'\] overlap"):
            session.merge_many([{}, {}], outs=[out, {**out}])
    with (
        session_of("model_stock", models) as session,
        pytest.raises(RecipeError, match="row by row with some settings only"),
    ):
        session.merge_many([{}, {"filter_wise": True}])
    with pytest.raises(RecipeError, match="unknown merge_method"):
        Session([{}], method="tie")


def test_a_nan_is_told_each_time() -> None:
    with Session([{"x": torch.full((9,), torch.nan)}], method="linear", weight=0.5) as session:
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="9 NaN or Inf"):
                session.merge()


# --- on a card ---


@on_a_card
@pytest.mark.gpu
@pytest.mark.parametrize("method", ["ties", "slerp", "dare_ties", "task_arithmetic"])
def test_a_gpu_has_the_bits_of_the_cpu(method: str, models: dict[str, Tensors]) -> None:
    there = {name: {key: tensor.cuda() for key, tensor in tensors.items()} for name, tensors in models.items()}
    with session_of(method, models) as here, session_of(method, there) as session:
        for own in [{}, *[each for each in OTHER_SETTINGS[method] if "scope" not in each]]:
            made = {name: tensor.cpu() for name, tensor in session.merge(**own).items()}
            assert_same(made, here.merge(**own))
