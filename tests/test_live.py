"""Merges in memory: the bits of a merge from disk, whatever holds the tensors; where results go; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from test_engine import family, load, save

import fastmerge
from fastmerge import (
    BackendError,
    FastmergeWarning,
    MismatchError,
    NonFiniteError,
    Recipe,
    RecipeError,
    Session,
    merge_into,
    merge_state_dicts,
    merge_tensors,
    tensors,
)
from fastmerge.methods import METHODS, Base
from fastmerge.sweep import Run

Tensors = dict[str, torch.Tensor]

#: By method parameters that use what it has; lists have one value per model.
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.2, 0.7, 0.4]},
    "uniform_soup": {},
    "task_arithmetic": {"weight": [0.2, 0.7, -0.4], "lambda": 0.9},
    "ties": {"weight": [0.2, 0.7, 0.4], "density": [0.3, 0.5, 0.2], "lambda": 0.8},
    "dare_linear": {"weight": 0.4, "density": 0.6},
    "dare_ties": {"weight": 0.4, "density": [0.6, 0.5, 0.4]},
    "breadcrumbs": {"weight": 0.4, "density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"weight": 0.4, "density": 0.6, "rescale": True},
    "della": {"weight": 0.4, "density": 0.6, "epsilon": 0.1},
    "della_linear": {"weight": 0.4, "density": 0.6},
    "sce": {"select_topk": 0.4},
    "ram": {"epsilon": 0.002},
    "ramplus_tl": {"epsilon": 0.002},
    "nearswap": {"t": 0.002},
    "arcee_fusion": {},
    "slerp": {"t": [0.0, 0.7]},
    "nuslerp": {"weight": [0.2, 0.7]},
    "multislerp": {"weight": [0.2, 0.7, 0.4]},
    "karcher": {},
    "model_stock": {},
    "passthrough": {"scale": 0.3},
}
#: Options that take another way through the engine.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ties-of-model": ("ties", {"weight": 0.7, "density": 0.3, "scope": "model"}),
    "ties-rescaled": ("ties", {"weight": 0.7, "density": 0.3, "rescale": "l2"}),
    "model_stock-by-rows": ("model_stock", {"filter_wise": True}),
    "nuslerp-by-columns": (
        "nuslerp",
        {"weight": [0.2, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "passthrough-as-it-is": ("passthrough", {}),
    "conditions": (
        "task_arithmetic",
        {
            "weight": [{"filter": "mlp", "value": 0.3}, {"value": [0, 1]}],
            "lambda": [{"filter": "*", "value": [1, 0.5]}],
        },
    ),
    "each-its-own": ("task_arithmetic", {"weight": [[0, 1], 0.5, [{"filter": "norm", "value": 1}, {"value": 0.2}]]}),
    "drop_rate": ("dare_linear", {"weight": 0.4, "drop_rate": [0.9, 0.5, 0.4]}),
}
CASES = {**{name: (name, given) for name, given in PARAMETERS.items()}, **OTHERS}


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def models() -> dict[str, Tensors]:
    """base, a, b and c in bf16, with a scalar, an empty tensor, one of more than a tile, and a counter."""
    made = family(torch.bfloat16)
    return {name: {**tensors, "model.steps": torch.tensor([3, 4])} for name, tensors in made.items()}


def taking_part(method: str) -> tuple[list[str], str | None]:
    """The models of a merge, and its base."""
    row = METHODS[method]
    names = list("abc")[: row.models[1] or 3]
    if row.base is Base.ENDPOINT:
        return names, names[0]
    return names, "base" if row.base is Base.ORIGIN else None


def from_disk(method: str, parameters: Mapping[str, Any], models: Mapping[str, Tensors], **options: Any) -> Tensors:
    """What a recipe with the same parameters makes of the same tensors."""
    for name, model in models.items():
        if not Path(name).exists():
            save(name, model)
    names, base = taking_part(method)
    own = {p.name for p in METHODS[method].parameters if p.per_model} | {"drop_rate"}
    lists = {
        name: value
        for name, value in parameters.items()
        if name in own and isinstance(value, list) and not all(isinstance(each, dict) for each in value)
    }
    recipe = {
        "merge_method": method,
        "models": [
            {"model": name, "parameters": {key: value[at] for key, value in lists.items()}}
            for at, name in enumerate(names)
        ],
        "parameters": {key: value for key, value in parameters.items() if key not in lists},
        **({} if base is None else {"base_model": base}),
    }
    fastmerge.merge(Recipe.parse(json.dumps(recipe)), "out", overwrite=True, **options)
    return load("out")


def in_memory(method: str, parameters: Mapping[str, Any], models: Mapping[str, Any], **options: Any) -> Any:
    names, base = taking_part(method)
    given = [models[name] for name in names]
    origin = None if base is None else given[names.index(base)] if base in names else models[base]
    return merge_state_dicts(method, given, origin, **options, **parameters)


def assert_same(found: Mapping[str, Any], expected: Mapping[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        one = found[name] if isinstance(found[name], torch.Tensor) else torch.from_numpy(found[name])
        assert (one.dtype, one.shape) == (tensor.dtype, tensor.shape), name
        assert bytes_of(one) == bytes_of(tensor), name


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def copied(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def poisoned(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> Tensors:
    """Of the same shapes, with values that nothing merges to."""
    made = {}
    for name, tensor in tensors.items():
        floating = tensor.is_floating_point()
        made[name] = torch.full_like(tensor, torch.nan if floating else 77, dtype=dtype if floating else None)
    return made


# --- the bits of a merge from disk ---


def test_every_method_is_tried() -> None:
    assert PARAMETERS.keys() == METHODS.keys()


@pytest.mark.parametrize("case", CASES)
def test_state_dicts_give_the_bits_of_a_merge_from_disk(case: str, models: dict[str, Tensors]) -> None:
    method, parameters = CASES[case]
    expected = from_disk(method, parameters, models, seed=5)
    before = {name: copied(model) for name, model in models.items()}
    assert_same(in_memory(method, parameters, models, seed=5), expected)
    for name, model in before.items():
        assert_same(models[name], model)


@pytest.mark.parametrize("case", CASES)
def test_into_given_tensors_and_in_place_it_is_the_same(case: str, models: dict[str, Tensors]) -> None:
    method, parameters = CASES[case]
    expected = in_memory(method, parameters, models, seed=5)
    out = poisoned(expected)
    places = {name: tensor.data_ptr() for name, tensor in out.items()}
    assert in_memory(method, parameters, models, seed=5, out=out) is out
    assert_same(out, expected)
    assert {name: tensor.data_ptr() for name, tensor in out.items()} == places
    for written in {*taking_part(method)[0], taking_part(method)[1]} - {None}:
        ours = {**models, written: copied(models[written])}
        in_memory(method, parameters, ours, seed=5, out=ours[written])
        assert_same(ours[written], expected)


@pytest.mark.parametrize("method", METHODS)
def test_one_tensor_gives_its_bits_in_a_state_dict(method: str, models: dict[str, Tensors]) -> None:
    parameters = {name: 0.4 if name == "t" else value for name, value in PARAMETERS[method].items()}
    names, base = taking_part(method)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.scalar", "model.empty"):
        alone = {key: {name: tensors[name]} for key, tensors in models.items()}
        expected = in_memory(method, parameters, alone, seed=5)[name]
        given = [models[each][name] for each in names]
        origin = None if base is None else models[base][name]
        made = merge_tensors(method, given, origin, seed=5, name=name, **parameters)
        assert_same({name: made}, {name: expected})
        out = torch.full_like(made, torch.nan)
        assert merge_tensors(method, given, origin, out=out, seed=5, name=name, **parameters) is out
        assert_same({name: out}, {name: expected})


def test_checkpoints_and_state_dicts_go_together(models: dict[str, Tensors]) -> None:
    parameters = PARAMETERS["ties"]
    expected = from_disk("ties", parameters, models)
    assert_same(in_memory("ties", parameters, {**models, "b": "b", "base": Path("base/model.safetensors")}), expected)
    assert_same(
        in_memory("ties", parameters, dict.fromkeys("abc", "a") | {"a": "a", "b": "b", "c": "c", "base": "base"}),
        expected,
    )


@pytest.mark.parametrize("method", ["ties", "dare_linear", "slerp", "della"])
def test_any_number_of_threads_and_any_backend_gives_the_same_bits(method: str, models: dict[str, Tensors]) -> None:
    expected = in_memory(method, PARAMETERS[method], models, threads=1)
    assert_same(in_memory(method, PARAMETERS[method], models, threads=3), expected)
    assert_same(in_memory(method, PARAMETERS[method], models, backend="torch"), expected)


def test_a_seed_and_a_name_are_what_random_drops_depend_on(models: dict[str, Tensors]) -> None:
    given, base = [models[name]["model.wide.weight"] for name in "ab"], models["base"]["model.wide.weight"]
    ways = [{}, {"seed": 1}, {"name": "x"}]
    made = [merge_tensors("dare_linear", given, base, weight=0.5, density=0.5, **way) for way in ways]
    assert len({bytes_of(one) for one in made}) == 3
    assert bytes_of(made[0]) == bytes_of(merge_tensors("dare_linear", given, base, weight=0.5, density=0.5))


# --- what holds the tensors ---


class Foreign:
    """An array of another library, as DLPack shows it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_arrays_in_arrays_out(dtype: torch.dtype, models: dict[str, Tensors]) -> None:
    ours = {k: {n: t.to(dtype) for n, t in tensors.items()} for k, tensors in models.items()}
    expected = in_memory("task_arithmetic", {"weight": 0.5}, ours)
    made = in_memory(
        "task_arithmetic",
        {"weight": 0.5},
        {k: {n: t.numpy() for n, t in tensors.items()} for k, tensors in ours.items()},
    )
    assert all(isinstance(array, np.ndarray) for array in made.values())
    assert_same(made, expected)
    out = {name: np.full_like(array, 77) for name, array in made.items()}
    assert merge_state_dicts("task_arithmetic", [ours[n] for n in "abc"], ours["base"], weight=0.5, out=out) is out
    assert_same(out, expected)


def test_bfloat16_is_an_array_by_ml_dtypes(models: dict[str, Tensors]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes not installed")
    name = "model.wide.weight"
    tensors = [models[each][name] for each in ("a", "b", "base")]
    *given, base = (tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) for tensor in tensors)
    made = merge_tensors("ties", given, base, weight=0.5, density=0.4)
    assert made.dtype == ml_dtypes.bfloat16
    expected = merge_tensors("ties", tensors[:2], tensors[2], weight=0.5, density=0.4)
    assert made.tobytes() == bytes_of(expected)


def test_dlpack_is_read_where_it_lies(models: dict[str, Tensors]) -> None:
    name = "model.wide.weight"
    *given, base = (models[each][name] for each in ("a", "b", "base"))
    made = merge_tensors("ties", [Foreign(each) for each in given], Foreign(base), weight=0.5, density=0.4)
    assert_same({name: made}, {name: merge_tensors("ties", given, base, weight=0.5, density=0.4)})


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_parameters_may_be_of_torch_and_numpy(kind: Callable[[Any], Any]) -> None:
    """As a softmax over weights gives them: one array, or a list of scalars."""
    expected = merge_tensors("linear", [ONE, OTHER], weight=[0.25, 0.5])
    for weight in (kind([0.25, 0.5]), [kind(0.25), kind(0.5)]):
        assert torch.equal(merge_tensors("linear", [ONE, OTHER], weight=weight), expected)
    states = [{"model.layers.0.x": ONE, "model.layers.1.x": ONE}, {"model.layers.0.x": OTHER, "model.layers.1.x": ONE}]
    gradient = merge_state_dicts("linear", states, weight=[[0.0, 1.0], 0.5])
    assert_same(merge_state_dicts("linear", states, weight=[kind([0.0, 1.0]), kind(0.5)]), gradient)


def test_an_input_of_torch_makes_the_result_torchs(models: dict[str, Tensors]) -> None:
    one = models["a"]["model.wide.weight"].float()
    assert isinstance(merge_tensors("linear", [one.numpy(), one], weight=0.5), torch.Tensor)
    assert isinstance(merge_tensors("linear", [one.numpy(), one.numpy()], weight=0.5), np.ndarray)


def test_without_torch_arrays_are_merged() -> None:
    code = """
import sys
import numpy as np, fastmerge
one, other, base = (np.linspace(0, k, 1000, dtype=np.float32).reshape(10, 100) for k in (1, 2, 3))
made = fastmerge.merge_tensors("ties", [one, other], base, weight=[0.5, 0.25], density=0.5, lambda_=2)
with fastmerge.Session([{"x": one}, {"x": other}], {"x": base}, method="ties", density=0.5) as session:
    again = session.merge(weight=[0.5, 0.25], lambda_=2)["x"]
assert made.tobytes() == again.tobytes() and made.dtype == np.float32
assert "torch" not in sys.modules
"""
    pytest.importorskip("fastmerge.native", reason="compiled core not built", exc_type=ImportError)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float64, torch.bfloat16), torch.float64),
    ],
    ids=str,
)
def test_a_result_has_the_dtype_that_holds_all_inputs(
    dtypes: tuple[torch.dtype, torch.dtype], expected: torch.dtype
) -> None:
    models = [torch.linspace(0, 1, 50).to(dtype) for dtype in dtypes]
    assert merge_tensors("linear", models, weight=0.5).dtype == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ["ties", "passthrough-as-it-is", "linear"])
@pytest.mark.parametrize("nonfinite", ["error", "propagate"])
def test_an_output_of_another_dtype_is_rounded_once(
    case: str, dtype: torch.dtype, nonfinite: str, models: dict[str, Tensors]
) -> None:
    method, parameters = CASES[case]
    if dtype == torch.float64:
        models = {k: {n: t.double() if t.is_floating_point() else t for n, t in m.items()} for k, m in models.items()}
    wide = {k: {n: t.float() if t.is_floating_point() else t for n, t in m.items()} for k, m in models.items()}
    out = poisoned(models["base"], dtype)
    in_memory(method, parameters, models, out=out, nonfinite=nonfinite)
    expected = in_memory(method, parameters, models if dtype == torch.float64 else wide)
    assert_same(out, {n: t.to(dtype) if t.is_floating_point() else t for n, t in expected.items()})


class Lazy(Mapping[str, torch.Tensor]):
    """A model whose tensors are made when they are asked for; none may be alive when the next is."""

    alive = 0
    most = 0

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        made = self.tensors[name].clone()
        Lazy.alive += 1
        Lazy.most = max(Lazy.most, Lazy.alive)
        weakref.finalize(made, self.gone)
        return made

    @staticmethod
    def gone() -> None:
        Lazy.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def test_tensors_are_asked_for_when_they_are_wanted(
    models: dict[str, Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmerge.merging.BATCH_BYTES", 1)
    Lazy.alive = Lazy.most = 0
    lazy = {name: Lazy(tensors) for name, tensors in models.items()}
    out: dict[str, Any] = {}
    in_memory("ties", PARAMETERS["ties"], lazy, out=out)
    assert_same(out, in_memory("ties", PARAMETERS["ties"], models))
    assert Lazy.alive == 0
    assert Lazy.most <= 5


def test_a_head_that_is_the_embeddings_is_left_out_where_others_lack_it() -> None:
    embeddings = [torch.randn(9, 4) for _ in range(2)]
    tied = {"embed_tokens.weight": embeddings[0], "lm_head.weight": embeddings[0].clone()}
    other = {"embed_tokens.weight": embeddings[1]}
    assert list(merge_state_dicts("linear", [tied, other], weight=0.5)) == ["embed_tokens.weight"]
    tied["lm_head.weight"][3, 2] += 1
    with pytest.raises(MismatchError, match=r"'lm_head.weight' is tied to the embeddings in 'models\[1\]'"):
        merge_state_dicts("linear", [tied, other], weight=0.5)


# --- live modules ---


class Tied(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(30, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.head = torch.nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.randn(4), persistent=False)
        self.norm.running_mean.copy_(torch.randn(8))


def test_a_module_gets_what_a_state_dict_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is, once where it is tied, and with no tensor made anew."""
    module, one, other, base = (Tied(seed) for seed in range(4))
    states = [each.state_dict() for each in (one, other)]
    expected = merge_state_dicts("ties", states, base.state_dict(), weight=[0.4, 0.7], density=0.5)
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    mask, version = module.mask.clone(), module.embed.weight._version
    monkeypatch.setattr(tensors, "empty", None)
    merge_into(module, "ties", states, base.state_dict(), weight=[0.4, 0.7], density=0.5)
    assert_same(module.state_dict(), expected)
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == places
    assert module.head.weight is module.embed.weight
    assert module.embed.weight.requires_grad
    assert module.embed.weight._version > version
    assert torch.equal(module.mask, mask)


def test_a_compiled_module_has_the_names_of_the_one_within() -> None:
    module, one, other = (torch.nn.Linear(3, 2) for _ in range(3))
    states = [one.state_dict(), other.state_dict()]
    compiled = torch.compile(module)
    merge_into(compiled, "linear", states, weight=0.5)
    assert_same(module.state_dict(), merge_state_dicts("linear", states, weight=0.5))
    with Session(states, method="linear") as session:
        session.merge_into(compiled, weight=0.25)
    assert_same(module.state_dict(), merge_state_dicts("linear", states, weight=0.25))


@pytest.mark.parametrize("method", ["dare_linear", "ties"])
def test_what_is_tied_is_merged_once_by_its_first_name(method: str) -> None:
    """Also in place, where a second time would start from what the first has made."""
    one, base = Tied(1), Tied(2)
    first = {"embed.weight": one.embed.weight.clone()}, {"embed.weight": base.embed.weight.clone()}
    expected = merge_state_dicts(method, [first[0]], first[1], weight=0.7, density=0.5)["embed.weight"]
    merge_into(base, method, [one.state_dict()], base.state_dict(), weight=0.7, density=0.5)
    assert torch.equal(base.embed.weight, expected)
    lacking = {name: tensor for name, tensor in one.state_dict().items() if name != "head.weight"}
    module, other = Tied(3), {n: t.clone() for n, t in Tied(2).state_dict().items() if n != "head.weight"}
    merge_into(module, method, [lacking], other, weight=0.7, density=0.5)
    assert torch.equal(module.head.weight, expected)


def test_a_graph_that_needs_old_values_fails() -> None:
    module = torch.nn.Linear(3, 3)
    loss = module(torch.ones(1, 3, requires_grad=True)).square().sum()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    merge_into(module, "linear", [state], weight=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_live_transformer_has_the_logits_of_the_merged_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    made = {name: transformers.LlamaForCausalLM(config).eval() for name in ("base", "a", "b")}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"weight": 0.5, "density": 0.4, "lambda": 0.7},
    }
    fastmerge.merge(Recipe.parse(json.dumps(recipe)), "out")
    merged = transformers.LlamaForCausalLM.from_pretrained("out").eval()
    live = transformers.LlamaForCausalLM(config).eval()
    merge_into(
        live, "ties", ["a", made["b"].state_dict()], made["base"].state_dict(), weight=0.5, density=0.4, lambda_=0.7
    )
    words = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(live(words).logits, merged(words).logits)


# --- NaN and Inf ---


def test_a_nan_is_told_and_what_it_would_overwrite_stays() -> None:
    base, one = torch.zeros(300), torch.ones(300)
    one[7] = torch.nan
    with pytest.raises(NonFiniteError, match=r'models\[0\]: .* 1 NaN or Inf, the first at index 7; .*nonfinite="prop'):
        merge_tensors("task_arithmetic", [one], base, weight=0.5, out=base)
    assert not base.any()
    with pytest.raises(NonFiniteError, match=r"base: tensor 'x' holds"):
        merge_state_dicts("task_arithmetic", [{"x": base}], {"x": one}, weight=0.5)


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in-place"])
def test_a_nan_goes_where_the_arithmetic_takes_it(in_place: bool) -> None:
    base, one = torch.zeros(300), torch.ones(300)
    one[7] = torch.nan
    out = base if in_place else None
    made = merge_tensors("task_arithmetic", [one], base, weight=0.5, out=out, nonfinite="propagate")
    assert made[7].isnan()
    assert made.nansum() == 299 * 0.5


@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in-place"])
def test_overflow_is_told_and_counted(in_place: bool) -> None:
    models = [torch.full((40,), 60000.0, dtype=torch.float16) for _ in range(2)]
    with pytest.warns(FastmergeWarning, match="40 elements in 1 tensors became infinite"):
        made = merge_tensors("linear", models, weight=1, normalize=False, out=models[0] if in_place else None)
    assert made.isposinf().all()


# --- what is refused ---

ONE, OTHER, BASE = (torch.linspace(0, k, 24).reshape(4, 6) for k in (1, 2, 3))
WHOLE = torch.zeros(100)
READ_ONLY = np.zeros((4, 6), np.float32)
READ_ONLY.flags.writeable = False
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "method": (
        lambda: merge_tensors("tie", [ONE], BASE),
        RecipeError,
        "unknown merge_method 'tie'; did you mean 'ties'",
    ),
    "parameter": (lambda: ties(densty=0.3), RecipeError, "unknown parameter 'densty'; did you mean 'density'"),
    "lambda": (lambda: ties(lamda=0.3), RecipeError, "unknown parameter 'lamda'; did you mean 'lambda_'"),
    "lambda-twice": (lambda: ties(**{"lambda": 1}, lambda_=1), RecipeError, "lambda and lambda_ are both given"),
    "of-another-method": (lambda: ties(t=0.3), RecipeError, "ties has no parameter t; it has weight, lambda"),
    "value": (lambda: ties(density=1.5), RecipeError, "density must be a number from 0 to 1, not '1.5'"),
    "nan": (lambda: ties(weight=np.float32("nan")), RecipeError, "weight must be a finite number"),
    "word": (lambda: ties(elect="sum"), RecipeError, "elect must be weighted or plain or count, not 'sum'"),
    "object": (lambda: ties(lambda_=object()), RecipeError, "a value is a number, True, False or a word, not <object"),
    "too-few-values": (lambda: ties(weight=[1]), RecipeError, "weight has 1 values where there are 2 models"),
    "gradient-of-one-tensor": (lambda: ties(lambda_=[0, 1]), RecipeError, "lambda has one value here"),
    "missing-parameter": (lambda: merge_tensors("ties", [ONE], BASE), RecipeError, "ties needs the parameter weight"),
    "required-of-a-base": (
        lambda: merge_tensors("linear", [ONE], BASE, weight=[1]),
        RecipeError,
        "base: linear needs the parameter weight, and nothing gives it",
    ),
    "drop-rate": (lambda: ties(drop_rate=0.5, density=0.5), RecipeError, "drop_rate and density are both given"),
    "no-base": (lambda: merge_tensors("ties", [ONE], weight=1), RecipeError, "ties: it needs a base"),
    "three": (lambda: merge_tensors("slerp", [ONE, OTHER], BASE, t=0.5), RecipeError, "exactly two models, got 3"),
    "none": (lambda: merge_tensors("linear", [], weight=1), RecipeError, "at least one model, got 0"),
    "zero-weights": (
        lambda: merge_tensors("linear", [ONE, OTHER], weight=[1, -1]),
        RecipeError,
        "the weights sum to 0",
    ),
    "nonfinite": (lambda: ties(nonfinite="no"), ValueError, "nonfinite is"),
    "no-threads": (lambda: ties(threads=-1), ValueError, "threads is -1, and must be a whole number from 1 on"),
    "half-a-seed": (lambda: ties(seed=0.5), TypeError, "seed is 0.5, and must be a whole number"),
    "half-a-thread": (lambda: ties(threads=1.5), ValueError, "threads is 1.5, and must be"),
    "no-name": (lambda: merge_tensors(None, [ONE]), TypeError, "method is a NoneType: give its name"),
    "transformed": (
        lambda: torch.func.vmap(lambda one: merge_tensors("linear", [one], weight=1))(ONE),
        MismatchError,
        r"models\[0\] is a Tensor without memory of its own",
    ),
    "a-list": (lambda: merge_tensors("linear", [[1.0]], weight=1), TypeError, r"models\[0\] is a builtins.list: give"),
    "integers": (lambda: merge_tensors("linear", [ONE.int()], weight=1), MismatchError, r"models\[0\] holds I32"),
    "complex": (lambda: merge_tensors("linear", [ONE.cfloat()], weight=1), MismatchError, r"models\[0\] holds C64"),
    "shape": (lambda: ties(BASE.flatten()), MismatchError, r"base has the shape \[24\] and models\[0\] \[4, 6\]"),
    "meta": (lambda: ties(BASE.to("meta")), MismatchError, "base lies on meta"),
    "transposed": (lambda: ties(BASE.t()), MismatchError, r"base is not contiguous.*\.contiguous\(\)"),
    "strided-array": (
        lambda: merge_tensors("linear", [READ_ONLY[:, ::2]], weight=1),
        MismatchError,
        "not contiguous.*ascontiguousarray",
    ),
    "expanded": (lambda: ties(torch.ones(1, 6).expand(4, 6)), MismatchError, "base is not contiguous"),
    "negated": (lambda: ties(torch._neg_view(BASE)), MismatchError, r"resolve_neg\(\)"),
    "sparse": (lambda: ties(BASE.to_sparse()), MismatchError, "base is sparse_coo"),
    "swapped": (lambda: ties(READ_ONLY.astype(">f4")), MismatchError, "has the bytes of its numbers swapped"),
    "dlpack": (lambda: ties(Foreign(ONE.to("meta"))), MismatchError, "base cannot be had through DLPack"),
    "out-by-dlpack": (lambda: ties(out=Foreign(ONE)), MismatchError, "out is written through DLPack by no one"),
    "out-read-only": (lambda: ties(out=READ_ONLY), MismatchError, "out is read-only"),
    "out-shape": (lambda: ties(out=torch.zeros(24)), MismatchError, r"out has the shape \[24\]"),
    "out-integers": (lambda: ties(out=ONE.int()), MismatchError, "out holds I32"),
    "out-strided": (lambda: ties(out=torch.zeros(4, 12)[:, ::2]), MismatchError, "out is not contiguous"),
    "out-overlaps": (
        lambda: merge_tensors("linear", [WHOLE[:50], WHOLE[50:]], weight=1, out=WHOLE[25:75]),
        MismatchError,
        r"out overlaps models\[0\] in memory",
    ),
    "backend-of-gpus": (lambda: ties(backend="triton"), BackendError, "triton does not work where .* lies, on cpu"),
    "no-backend": (lambda: ties(backend="tpu"), BackendError, "there is no backend 'tpu'"),
    "not-fused": (
        lambda: merge_tensors("della", [ONE], BASE, weight=1, density=0.5, backend="cpu"),
        BackendError,
        "della is not fused",
    ),
    "cpu-takes-no-float64": (
        lambda: merge_tensors("linear", [ONE.double()], weight=0.5, normalize=False, backend="cpu"),
        BackendError,
        "no backend merges F64",
    ),
    "models-is-one": (lambda: merge_state_dicts("linear", {"x": ONE}, weight=1), TypeError, "models is a list"),
    "a-module": (lambda: merge_state_dicts("linear", [Tied(0)], weight=1), TypeError, "give its state_dict"),
    "no-module": (lambda: merge_into({}, "linear", [{}], weight=1), TypeError, "give a torch.nn.Module"),
    "a-key": (lambda: merge_state_dicts("linear", [{3: ONE}], weight=1), TypeError, "has the key 3: names of"),
    "a-value": (lambda: merge_state_dicts("linear", [{"x": None}], weight=1), TypeError, r"models\[0\]\['x'\] is a"),
    "an-empty-gradient": (lambda: dicts(lambda_=[]), RecipeError, "lambda is an empty list"),
    "a-condition": (
        lambda: dicts(lambda_=[{"filter": "x", "valu": 1}]),
        RecipeError,
        'lambda: a condition is {"filter": text, "value": value}',
    ),
    "nothing-matches": (
        lambda: merge_state_dicts("linear", [{"x": ONE}], weight=[[{"filter": "y", "value": 1}]]),
        RecipeError,
        r"models\[0\]: linear needs the parameter weight, and nothing gives it for 'x'",
    ),
    "names": (
        lambda: merge_state_dicts("linear", [{"x": ONE}, {"y": ONE}], weight=1),
        MismatchError,
        r"linear: the models do not fit one another:\s+'x' is missing in 'models\[1\]'",
    ),
    "shapes": (
        lambda: merge_state_dicts("linear", [{"x": ONE}, {"x": ONE.t().contiguous()}], weight=1),
        MismatchError,
        r"'x' is \[4, 6\] in 'models\[0\]' and \[6, 4\] in 'models\[1\]': one is transposed",
    ),
    "counters": (
        lambda: merge_state_dicts("linear", [{"x": torch.tensor(1)}, {"x": torch.tensor(2)}], weight=1),
        MismatchError,
        "'x' holds I64 values, which differ in",
    ),
    "out-is-a-list": (lambda: dicts(out=[ONE]), TypeError, "out is a list: give a dict"),
    "out-lacks": (lambda: dicts(out={"y": OTHER}), MismatchError, "out lacks 1 tensors of the merge, such as 'x'"),
    "out-has-more": (
        lambda: dicts(out={"x": torch.zeros(4, 6), "y": torch.zeros(3)}),
        MismatchError,
        "out has 1 tensors that no model has, such as 'y'",
    ),
    "outs-overlap": (
        lambda: merge_state_dicts(
            "linear",
            [{"x": ONE.flatten(), "y": ONE.flatten()}],
            weight=1,
            out={"x": WHOLE[:24], "y": WHOLE[12:36]},
        ),
        MismatchError,
        r"out\['x'\] and out\['y'\] overlap in memory",
    ),
    "out-of-another": (
        lambda: (lambda state: merge_state_dicts("linear", [state], weight=1, out={"x": state["y"], "y": state["x"]}))(
            {"x": ONE.clone(), "y": OTHER.clone()}
        ),
        MismatchError,
        r"overlaps models\[0\]\['.'\] in memory",
    ),
    "tied-only-in-out": (
        lambda: (lambda one: merge_state_dicts("linear", [{"x": ONE, "y": OTHER}], weight=1, out={"x": one, "y": one}))(
            torch.zeros(4, 6)
        ),
        MismatchError,
        r"'y' and 'x' are one tensor in out, and two in models\[0\]",
    ),
    "a-counter-of-another-dtype": (
        lambda: merge_state_dicts("linear", [{"x": torch.tensor(1)}], weight=1, out={"x": torch.tensor(1.0)}),
        MismatchError,
        r"out\['x'\] holds F32, and what is merged I64",
    ),
}


def ties(base: Any = BASE, **given: Any) -> Any:
    return merge_tensors("ties", [ONE, OTHER], base, **{"weight": 0.5, **given})


def dicts(**given: Any) -> Any:
    return merge_state_dicts("ties", [{"x": ONE}, {"x": OTHER}], {"x": BASE}, **{"weight": 0.5, **given})


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_sentence(wrong: str) -> None:
    call, kind, message = WRONG[wrong]
    before = [tensor.clone() for tensor in (ONE, OTHER, BASE)]
    with pytest.raises(kind, match=message):
        call()
    assert all(map(torch.equal, before, (ONE, OTHER, BASE)))


# --- GPUs ---

FUSED = [name for name, method in METHODS.items() if not method.direct]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of torch are said to lie on a GPU, which works in memory of the host; arrays stay on the CPU."""
    of_torch, empty, running = tensors._of_torch, tensors.empty, tensors.running

    def made(dtype: str, shape: tuple[int, ...], device: str, by_torch: bool) -> tensors.Held:
        assert by_torch is (device == "cuda:0")
        return tensors.held(empty(dtype, shape, "cpu", by_torch).value, "a new tensor")

    @contextmanager
    def on_gpu(device: str, threads: int) -> Iterator[Run]:
        with running("cpu", threads) as run:
            yield Run(device=0, stream=0) if device == "cuda:0" else run

    monkeypatch.setattr(tensors, "_of_torch", lambda value, name: replace(of_torch(value, name), device="cuda:0"))
    monkeypatch.setattr(tensors, "empty", made)
    monkeypatch.setattr(tensors, "running", on_gpu)
    with emulated.installed():
        yield


ON_GPU = [
    case for case, (name, given) in CASES.items() if name in FUSED and not {"nuslerp_row_wise", "scope"} & {*given}
]


@pytest.mark.parametrize("backend", ["auto", "cuda"])
@pytest.mark.parametrize("case", ON_GPU)
def test_what_lies_on_a_gpu_is_merged_there(
    case: str, backend: str, models: dict[str, Tensors], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    method, parameters = CASES[case]
    few = {name: {n: t for n, t in held.items() if n != "model.wide.weight"} for name, held in models.items()}
    expected = in_memory(method, parameters, few, seed=5)
    ours = {name: copied(held) for name, held in few.items()}
    request.getfixturevalue("gpu")
    monkeypatch.setitem(sys.modules, "fastmerge.native", None)  # nothing of it may be asked of the CPU
    assert_same(in_memory(method, parameters, few, seed=5, backend=backend), expected)
    written = taking_part(method)[0][0]
    in_memory(method, parameters, ours, seed=5, backend=backend, out=ours[written])
    assert_same(ours[written], expected)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ties(BASE.numpy()), MismatchError, r"base lies on cpu and models\[0\] on cuda:0"),
        (lambda: ties(out=np.zeros((4, 6), np.float32)), MismatchError, "out lies on cpu"),
        (
            lambda: merge_state_dicts("linear", [{"x": ONE}, {"x": OTHER.numpy()}], weight=1),
            MismatchError,
            r"'x' lies on cuda:0 in models\[0\] and on cpu in models\[1\]: bring them together",
        ),
        (lambda: ties(backend="cpu"), BackendError, "backend cpu does not work where a tensor lies, on cuda:0"),
        (lambda: ties(scope="model"), BackendError, "scope: model selects among tensors of the CPU"),
        (lambda: ties(BASE.double()), BackendError, "no backend merges .*F64"),
        (
            lambda: merge_tensors("sce", [ONE], BASE),
            BackendError,
            "sce is not fused, and runs by torch on tensors of the CPU: bring them there",
        ),
    ],
    ids=["base", "out", "models", "backend", "scope", "float64", "not-fused"],
)
def test_what_a_gpu_does_not_do_is_refused(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_each_tensor_is_merged_where_it_lies(models: dict[str, Tensors], request: pytest.FixtureRequest) -> None:
    """As where a large model is spread over devices."""
    few = {k: {n: t.float() for n, t in m.items() if "layers" in n or "embed" in n} for k, m in models.items()}
    expected = in_memory("ties", PARAMETERS["ties"], few)
    spread = {k: {n: t.numpy() if "norm" in n else t for n, t in m.items()} for k, m in few.items()}
    request.getfixturevalue("gpu")
    made = in_memory("ties", PARAMETERS["ties"], spread)
    assert {name for name in made if isinstance(made[name], np.ndarray)} == {name for name in made if "norm" in name}
    assert_same(made, expected)


# --- on a card ---

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@on_a_card
@pytest.mark.gpu
@pytest.mark.parametrize("method", FUSED)
def test_a_gpu_has_the_bits_of_the_cpu(method: str, models: dict[str, Tensors]) -> None:
    expected = in_memory(method, PARAMETERS[method], models)
    there = {name: {key: tensor.cuda() for key, tensor in tensors.items()} for name, tensors in models.items()}
    made = in_memory(method, PARAMETERS[method], there)
    assert all(tensor.is_cuda for tensor in made.values())
    assert_same({name: tensor.cpu() for name, tensor in made.items()}, expected)
    written = taking_part(method)[0][0]
    in_memory(method, PARAMETERS[method], there, out=there[written])
    assert_same({name: tensor.cpu() for name, tensor in there[written].items()}, expected)
