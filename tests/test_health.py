"""The health of a merge: its figures against numpy, each warning on both sides of its threshold, what it costs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import ISAS, compiled_core
from recorded import save
from safetensors.torch import load_file, save_file

import fastmerge
from fastmerge import CheckpointError, FastmergeWarning, batches, cli, health, memory, provenance
from fastmerge.checkpoint import journal
from fastmerge.health import (
    DARE_BEYOND,
    DARE_RANGE,
    DENORMAL,
    FEWEST_LAYERS,
    FEWEST_TENSORS,
    LAYER_DEVIATIONS,
    LAYER_TIMES,
    MOST_WINDOWS,
    UNRELATED,
    WHOLE,
    WINDOW,
    Health,
    outliers,
    windows,
)
from fastmerge.planner import plan
from fastmerge.recipe import Recipe

BASED = "base_model: base\nmodels: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.4}}]\n"
ARITHMETIC = f"merge_method: task_arithmetic\n{BASED}"
DARE = "merge_method: dare_linear\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1, density: 0.5}}]\n"
ONE = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n"

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


SHAPES = {
    "model.embed_tokens.weight": (61, 24),
    **{f"model.layers.{n}.{part}.weight": (24, 40) for n in range(6) for part in ("up", "down")},
    **{f"model.layers.{n}.norm.weight": (24,) for n in range(6)},
    "model.empty": (0, 3),
    "model.scalar": (),
}


def family(dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensors]:
    """A base and its fine-tunes a and b."""
    rng = np.random.default_rng(11)
    base = {name: rng.standard_normal(shape) * 0.02 for name, shape in shapes.items()}
    made = {"base": base}
    for model in "ab":
        made[model] = {name: values + rng.standard_normal(values.shape) * 0.001 for name, values in base.items()}
    return {
        model: {name: torch.tensor(values).to(dtype) for name, values in tensors.items()}
        for model, tensors in made.items()
    }


def save_all(models: Mapping[str, Tensors]) -> None:
    for name, tensors in models.items():
        save(name, tensors, num_hidden_layers=6)


def merged(text: str, out: str = "out", **options: Any) -> Health:
    return fastmerge.merge(Recipe.parse(text), out, **options).health


def by_name(found: Health) -> dict[str, health.ModelHealth]:
    return {each.name: each for each in found.models}


def only(found: Health) -> health.Deltas:
    """The deltas of the model a."""
    deltas = by_name(found)["a"].deltas
    assert deltas is not None
    return deltas


def wide(tensors: Tensors) -> np.ndarray:
    return np.concatenate([tensor.to(torch.float64).numpy().ravel() for tensor in tensors.values()])


# --- figures ---

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@pytest.mark.parametrize("dtype", DTYPES)
def test_figures_of_small_tensors_are_those_of_all_elements(dtype: str) -> None:
    models = family(DTYPES[dtype])
    for tensors in models.values():
        for tensor in tensors.values():
            tensor.view(-1)[::3] = 0.25
    save_all(models)
    found = merged(ARITHMETIC)
    count = sum(np.prod(shape, dtype=int) for shape in SHAPES.values())
    assert (found.sampled, found.elements) == (count, count)
    assert (found.looked, found.tensors, found.skipped) == (len(SHAPES) - 1, len(SHAPES), 0)
    base = wide(models["base"])
    assert by_name(found)["base"].deltas is None
    for name in "ab":
        deltas = wide(models[name]) - base
        assert by_name(found)[name].nonfinite == {}
        of = by_name(found)[name].deltas
        assert of is not None
        assert of.zero == pytest.approx((deltas == 0).mean(), rel=1e-12)
        assert of.zero > 0.3
        assert of.beyond == pytest.approx((np.abs(deltas) > DARE_RANGE).mean(), rel=1e-12)
        assert of.mean == pytest.approx(np.abs(deltas).mean(), rel=1e-6)
        assert of.rms == pytest.approx(np.sqrt((deltas**2).mean()), rel=1e-6)
        assert of.norm == pytest.approx(np.linalg.norm(deltas), rel=1e-6)
        assert of.relative == pytest.approx(np.linalg.norm(deltas) / np.linalg.norm(base), rel=1e-6)


def test_models_of_several_dtypes_are_held_against_one_base() -> None:
    models = family()
    models["a"] = {name: tensor.bfloat16() for name, tensor in models["a"].items()}
    models["b"] = {name: tensor.half() for name, tensor in models["b"].items()}
    save_all(models)
    found = merged(ARITHMETIC)
    for name in "ab":
        of = by_name(found)[name].deltas
        assert of is not None
        assert of.norm == pytest.approx(np.linalg.norm(wide(models[name]) - wide(models["base"])), rel=1e-6)


def test_a_sample_stands_for_all_elements_of_its_tensor() -> None:
    """Tensors of other sizes count by their elements, however many of them are looked at."""
    large = 40 * WHOLE
    base = {"large": torch.zeros(large) + 1, "small": torch.ones(WHOLE // 2)}
    save_all({"base": base, "a": {"large": base["large"] + 0.25, "small": base["small"]}})
    found = merged(ONE)
    assert found.sampled < found.elements == large + WHOLE // 2
    assert only(found).zero == pytest.approx(WHOLE // 2 / found.elements, rel=1e-12)
    assert only(found).norm == pytest.approx(0.25 * large**0.5, rel=1e-12)
    assert only(found).relative == pytest.approx(0.25 * (large / found.elements) ** 0.5, rel=1e-12)


def test_a_sample_is_near_the_whole() -> None:
    models = family(torch.bfloat16, {"w": (700, 900)})
    save_all(models)
    found = merged(ONE)
    exact = np.linalg.norm(wide(models["a"]) - wide(models["base"]))
    assert found.sampled < 0.01 * found.elements
    assert only(found).norm == pytest.approx(exact, rel=5 / (2 * found.sampled) ** 0.5)


@pytest.mark.parametrize("elements", [1, WHOLE, WHOLE + 1, 123_457, 1 << 24, 10**9, 1 << 40])
def test_windows_are_spread_from_end_to_end(elements: int) -> None:
    begins, width = windows(elements)
    gaps = {after - before for before, after in pairwise(begins)}
    assert (begins[0], begins[-1] + width) == (0, elements)
    assert max(gaps, default=width) - min(gaps, default=width) <= 1
    assert min(gaps, default=width) >= width
    assert len(begins) * width <= (elements if elements <= WHOLE else MOST_WINDOWS * WINDOW)


def test_windows_are_not_in_step_with_rows() -> None:
    begins, _ = windows(32_000 * 4096)
    assert len({begin % 4096 for begin in begins}) > len(begins) // 2


def test_what_has_no_base_has_no_deltas() -> None:
    save_all(family())
    found = merged("merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n")
    assert [(each.name, each.deltas) for each in found.models] == [("a", None), ("b", None)]
    assert (found.layers, found.warnings) == ((), ())


def test_a_base_of_zeros_has_no_relation() -> None:
    save_all({"base": {"w": torch.zeros(40)}, "a": {"w": torch.full((40,), 0.25)}})
    assert (only(merged(ONE)).relative, only(merged(ONE, "again")).norm) == (None, pytest.approx(0.25 * 40**0.5))


def test_figures_that_are_too_large_for_a_float_are_null() -> None:
    base = torch.ones(9, dtype=torch.float64)
    save_all({"base": {"w": base}, "a": {"w": base * 1e300}})
    assert merged(ONE + "out_dtype: float64\n").to_json()["models"][1]["deltas"]["norm"] is None
    assert provenance.read("out").health["models"][1]["deltas"]["norm"] is None


def test_what_is_copied_gathered_or_computed_is_skipped() -> None:
    models = family()
    for tensors in models.values():
        tensors["model.steps"] = torch.arange(5)
    save_all(models)
    module = "base_model.model.model.layers.0.up"
    Path("adapter").mkdir()
    factors = {f"{module}.lora_A.weight": torch.ones(2, 40), f"{module}.lora_B.weight": torch.ones(24, 2)}
    save_file(factors, "adapter/adapter_model.safetensors")
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 3}')
    found = merged(ARITHMETIC.replace("model: a,", "model: a+adapter,"))
    assert (found.skipped, found.tensors) == (2, len(SHAPES) + 1)
    assert [each.name for each in found.models] == ["base", "a+adapter", "b"]


# --- NaN, Inf, overflow ---


def test_nan_and_inf_are_all_counted_and_left_out_of_the_figures() -> None:
    large = {"large": (300, 1000), "small": (24, 40), "whole": (8, 8)}
    models = family(torch.bfloat16, large)
    clean = {name: {k: v.clone() for k, v in tensors.items()} for name, tensors in models.items()}
    models["a"]["small"].view(-1)[[5, 77]] = torch.tensor([np.nan, np.inf]).bfloat16()
    models["a"]["large"].view(-1)[100_001::1000] = np.nan
    models["base"]["whole"].view(-1)[3] = -np.inf
    save_all(models)
    found = merged(ONE, nonfinite="propagate")
    assert by_name(found)["a"].nonfinite == {"large": 200, "small": 2}
    assert by_name(found)["base"].nonfinite == {"whole": 1}
    save_all({f"clean-{name}": tensors for name, tensors in clean.items()})
    expected = merged(ONE.replace("base_model: base", "base_model: clean-base").replace("a,", "clean-a,"), "other")
    assert only(found).rms == pytest.approx(expected.models[-1].deltas.rms, rel=0.05)  # type: ignore[union-attr]
    assert [each for each in found.warnings if "NaN" in each] == [
        "base: 1 NaN or Inf in 1 tensors, 1 of them in 'whole', went where the arithmetic took them; mend the model",
        "a: 202 NaN or Inf in 2 tensors, 200 of them in 'large', went where the arithmetic took them; mend the model",
    ]


def test_shares_are_of_the_deltas_that_are_finite() -> None:
    base, model = torch.ones(100), torch.ones(100)
    model[:20], model[20:36] = np.nan, 2
    save_all({"base": {"w": base}, "a": {"w": model}})
    deltas = only(merged(ONE, nonfinite="propagate"))
    assert (deltas.zero, deltas.beyond, deltas.mean) == (0.8, 0.2, 0.2)
    assert deltas.relative == pytest.approx((16 / 80) ** 0.5)


def test_a_model_of_nan_has_no_deltas() -> None:
    save_all({"base": {"w": torch.ones(40)}, "a": {"w": torch.full((40,), np.nan)}})
    found = merged(ONE, nonfinite="propagate")
    assert by_name(found)["a"].deltas is None
    assert by_name(found)["a"].nonfinite == {"w": 40}


def test_overflow_is_counted_for_each_output() -> None:
    save_all({"base": {"w": torch.ones(40)}, "a": {"w": torch.full((40,), 1e4), "x": torch.ones(3)}})
    save_file({"w": torch.ones(40), "x": torch.ones(3)}, "base/model.safetensors")
    with pytest.warns(FastmergeWarning, match="40 elements in 1 tensors became infinite in F16"):
        found = merged(ONE + "out_dtype: float16\n", vary={"lambda": [1, 8]})
    assert found.overflow == {"lambda=1": {}, "lambda=8": {"w": 40}}
    for output, counts in found.overflow.items():
        assert provenance.read(f"out/{output}").health["overflow"] == counts


def test_overflow_is_in_the_order_of_the_plan() -> None:
    """In whatever order tensors were done, some of them before."""
    save_all(family())
    (stage,) = plan(Recipe.parse(ONE)).stages
    counts = {job.name: number + 1 for number, job in enumerate(stage.jobs)}
    found = health.Checkup(stage, batches.Reader(stage.models, False)).health({"": dict(reversed(counts.items()))})
    assert list(found.to_json()["overflow"].items()) == list(counts.items())


# --- thresholds ---


def warned(base: Tensors, model: Tensors, text: str = ONE) -> list[str]:
    for folder in ("base", "a", "out"):
        shutil.rmtree(folder, ignore_errors=True)
    save_all({"base": base, "a": model})
    return list(merged(text).warnings)


def changed(values: torch.Tensor, share: float, to: float, more: int = 0) -> torch.Tensor:
    """Values of which a share, and so many more, are others."""
    values = values.clone()
    values[: round(share * len(values)) + more] = to
    return values


COUNT = 2000  # looked at as a whole; a share of 1 % is a whole number of elements


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (DARE, "larger than 0.005"),
        (DARE.replace("dare_linear", "dare_ties"), "larger than 0.005"),
        (DARE.replace("density: 0.5", "density: 1"), ""),
        (DARE.replace("dare_linear", "ties"), ""),
    ],
    ids=["dare_linear", "dare_ties", "nothing-dropped", "ties"],
)
def test_deltas_of_continued_pretraining_are_told_where_they_are_dropped(text: str, word: str) -> None:
    base = torch.ones(COUNT)
    assert warned({"w": base}, {"w": changed(base, DARE_BEYOND, 1 + 2 * DARE_RANGE)}, text) == []
    told = warned({"w": base}, {"w": changed(base, DARE_BEYOND, 1 + 2 * DARE_RANGE, more=1)}, text)
    assert len(told) == bool(word)
    for sentence in told:
        assert sentence.startswith("a: 1.05% of its deltas are larger than 0.005 (threshold 1%), as after continued")
        assert sentence.endswith("(density 0.5); raise the density, or merge by ties")


def test_the_range_of_deltas_that_may_be_dropped_is_the_papers() -> None:
    """All deltas as large as those of the fine-tunes of the paper, or as those of its continued pretraining."""
    base = torch.zeros(COUNT) + 0.5
    assert warned({"w": base}, {"w": base + 0.002}, DARE) == []
    assert len(warned({"w": base}, {"w": base + 0.03}, DARE)) == 1


def test_the_least_density_of_all_outputs_is_told() -> None:
    base = torch.ones(COUNT)
    save_all({"base": {"w": base}, "a": {"w": base + 0.5}})
    text = "merge_method: dare_linear\nbase_model: base\nmodels: [model: a]\nparameters: {weight: 1, density: 0.5}\n"
    (told,) = merged(text, vary={"density": [1, 0.25, 0.5]}).warnings
    assert "(density 0.25)" in told


def test_deltas_larger_than_the_base_are_told() -> None:
    base = torch.ones(COUNT)
    assert warned({"w": base}, {"w": base * (1 + UNRELATED)}) == []
    (told,) = warned({"w": base}, {"w": base * (1.0625 + UNRELATED)})
    assert told.startswith("a: its deltas are 1.06 times as large as the base (threshold 1), ")


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_inputs_that_are_denormal_are_told(dtype: str) -> None:
    base = torch.ones(COUNT).to(DTYPES[dtype])
    small = torch.finfo(DTYPES[dtype]).smallest_normal / 2
    for more in (0, 1):
        told = warned({"w": base}, {"w": changed(base, DENORMAL, small, more)})
        found = by_name(merged(ONE, f"again-{more}"))["a"]
        assert found.denormal == pytest.approx(DENORMAL + more / COUNT)
        assert [each.startswith("a: 1.05% of its elements are denormal (threshold 1%)") for each in told] == [
            True
        ] * more


def test_the_smallest_normal_number_and_zero_are_not_denormal() -> None:
    base = torch.full((COUNT,), torch.finfo(torch.float16).smallest_normal).half()
    base[:1000] = 0
    assert warned({"w": base}, {"w": base * 2}) == []


def test_deltas_that_are_denormal_are_told() -> None:
    base = torch.full((COUNT,), 1e-37)
    for more in (0, 1):
        told = warned({"w": base}, {"w": changed(base, DENORMAL, 1.01e-37, more)})
        assert [each.startswith("a: 1.05% of its deltas are denormal (threshold 1%)") for each in told] == [True] * more


def test_a_model_that_is_the_base_is_told_beside_others_that_are_not() -> None:
    models = family()
    models["b"] = {name: tensor.clone() for name, tensor in models["base"].items()}
    save_all(models)
    assert merged(ARITHMETIC).warnings == (
        "b: all deltas in the sample are zero (threshold 100%); look whether it is the base again",
    )
    models["b"]["model.scalar"] += 1
    save_file(models["b"], "b/model.safetensors")
    assert merged(ARITHMETIC, "again").warnings == ()
    for model in "ab":
        save_file(models["base"], f"{model}/model.safetensors")
    with pytest.warns(FastmergeWarning, match="the base is identical to every model"):
        assert merged(ARITHMETIC, "same").warnings == ()


# --- layers ---


def test_layers_have_the_norms_of_their_deltas() -> None:
    models = family()
    save_all(models)
    found = merged(ARITHMETIC).layers
    assert [(each.stack, each.model, each.numbers) for each in found] == [
        ("model.layers", "a", tuple(range(6))),
        ("model.layers", "b", tuple(range(6))),
    ]
    for each in found:
        for number, norm, rms in zip(each.numbers, each.norms, each.rms, strict=True):
            inside = [name for name in SHAPES if f".layers.{number}." in name]
            of, base = (wide({name: models[model][name] for name in inside}) for model in (each.model, "base"))
            assert norm == pytest.approx(np.linalg.norm(of - base), rel=1e-6)
            assert rms == pytest.approx(norm / len(base) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("times", [LAYER_TIMES, 1 / LAYER_TIMES], ids=["larger", "smaller"])
def test_a_layer_that_stands_out_is_told(times: float) -> None:
    base = {f"model.layers.{n}.w": torch.zeros(COUNT) + 1 for n in range(7)}
    for beyond in (0.99, 1.01):
        factor = times * beyond if times > 1 else times / beyond
        model = {name: 1 + 0.001 * (factor if ".4." in name else 1) * torch.ones(COUNT) for name in base}
        told = warned(base, model, ONE + "dtype: float32\n")
        assert len(told) == (beyond > 1)
        for sentence in told:
            begin = "a: in model.layers the deltas of layers 4 stand out, those of 4 by an rms "
            assert sentence.startswith(begin)
            assert float(sentence.removeprefix(begin).split()[0]) == pytest.approx(factor, rel=0.02)
            assert "(threshold 4 times either way, and 3.5 robust deviations)" in sentence


def test_layers_that_differ_anyway_stand_out_by_robust_deviations() -> None:
    spread = [2.0 ** (i - 4) for i in range(9)]  # the median deviation is 2 octaves
    limit = 2 ** (LAYER_DEVIATIONS * 2 / 0.6745)
    assert outliers([*spread[:-1], limit * 0.99]) == []
    assert outliers([*spread[:-1], limit * 1.01]) == [8]


def test_few_layers_and_those_that_were_frozen_do_not_stand_out() -> None:
    assert outliers([1.0] * (FEWEST_LAYERS - 2) + [1e3]) == []
    assert outliers([1.0] * (FEWEST_LAYERS - 1) + [1e3]) == [FEWEST_LAYERS - 1]
    assert outliers([0.0] * 9 + [1.0] * 6) == []


def test_each_stack_has_its_own_layers() -> None:
    shapes = {f"{stack}.{n}.mlp.w": (8, 8) for stack in ("model.layers", "vision.blocks") for n in (0, 1, 12)}
    save_all(family(shapes=shapes))
    found = merged(ONE).layers
    assert {(each.stack, each.numbers) for each in found} == {
        (stack, (0, 1, 12)) for stack in ("model.layers", "vision.blocks")
    }


# --- the same for the same merge ---


def cut_short(text: str, out: str, **options: Any) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merged(text, out, progress=stop, **options)
    assert not Path(out, "fastmerge.json").exists()


@pytest.mark.parametrize("nonfinite", ["error", "propagate"])
def test_the_record_has_the_figures_and_they_do_not_depend_on_the_run(
    monkeypatch: pytest.MonkeyPatch, nonfinite: str
) -> None:
    models = family(torch.bfloat16, {**SHAPES, "model.wide": (300, 1000)})
    if nonfinite == "propagate":
        for name in models["a"]:
            models["a"][name].view(-1)[:7] = np.nan
    save_all(models)
    text = DARE + "out_dtype: float16\n"
    found = merged(text, threads=1, nonfinite=nonfinite)
    record = Path("out/fastmerge.json").read_bytes()
    assert json.loads(record)["health"] == found.to_json()
    assert bool(by_name(found)["a"].nonfinite) == (nonfinite == "propagate")
    shutil.rmtree("out")
    monkeypatch.setattr(batches, "BATCH_JOBS", 1)
    monkeypatch.setattr(journal, "_TOGETHER", 1)
    cut_short(text, "out", nonfinite=nonfinite)
    again = fastmerge.merge(Recipe.parse(text), "out", threads=3, nonfinite=nonfinite)
    assert again.resumed > 0
    assert again.health == found
    assert Path("out/fastmerge.json").read_bytes() == record


def test_a_record_without_figures_is_refused() -> None:
    save_all(family())
    merged(ONE)
    record = json.loads(Path("out/fastmerge.json").read_bytes())
    del record["health"]
    Path("out/fastmerge.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="has no health that is dict"):
        provenance.read("out")


# --- what it costs ---


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of each piece that is read for the sample."""
    sizes: list[int] = []
    load = memory.load

    def counted(file: int, offset: int, into: memoryview) -> None:
        sizes.append(len(into))
        load(file, offset, into)

    monkeypatch.setattr(memory, "load", counted)
    return iter([sizes])


def test_a_large_tensor_is_read_in_a_few_windows(read: Iterator[list[int]]) -> None:
    (sizes,) = read
    save_all(family(torch.bfloat16, {"w": (2000, 1000)}))
    found = merged(ARITHMETIC)
    assert found.sampled == 4 * WINDOW
    assert sizes == [2 * WINDOW] * 4 * 3


def test_of_many_tensors_a_few_are_read_from_every_layer(read: Iterator[list[int]]) -> None:
    """8 in each of 64 layers: any step that is in step with them would see some of the 8 only."""
    (sizes,) = read
    shapes = {f"layers.{n}.{part}.w": (4, 4) for n in range(64) for part in "abcdefgh"}
    save_all(family(shapes=shapes))
    found = merged(ONE)
    assert (found.looked, found.tensors) == (FEWEST_TENSORS, 512)
    assert sum(sizes) == 2 * FEWEST_TENSORS * 16 * 4
    (layers,) = found.layers
    assert len(layers.numbers) == 64


def test_the_tensors_that_are_read_are_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    look = health._look
    monkeypatch.setattr(health, "_look", lambda values, job: looked.append(job.name) or look(values, job))
    save_all(family(shapes={f"layers.{n}.{part}.w": (4, 4) for n in range(64) for part in "abcdefgh"}))
    merged(ONE)
    kinds = [name.split(".")[2] for name in looked]
    assert {kinds.count(kind) for kind in "abcdefgh"} <= set(range(12, 21))


# --- what goes wrong ---


@pytest.mark.parametrize(
    "fault", [OSError(errno.EIO, os.strerror(errno.EIO)), CheckpointError("cut")], ids=["EIO", "cut"]
)
def test_an_input_that_cannot_be_read_is_one_sentence(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    def load(*_: Any) -> None:
        raise fault

    save_all(family())
    monkeypatch.setattr(memory, "load", load)
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read \(Input/output|^cut$"):
        merged(ONE)
    assert not Path("out/config.json").exists()


# --- what is said ---


def run(*arguments: str) -> tuple[int, str, str]:
    ended = CliRunner().invoke(cli.main, arguments, catch_exceptions=False, prog_name="fastmerge")
    return ended.exit_code, ended.stdout, ended.stderr


def test_a_merge_without_a_fault_says_nothing_of_it() -> None:
    save_all(family())
    Path("recipe.yml").write_text(ARITHMETIC)
    code, out, err = run("merge", "recipe.yml", "out")
    assert (code, out.count("\n"), err) == (0, 1, "")


def test_figures_beyond_a_threshold_are_warnings_and_a_line() -> None:
    models = family()
    models["a"] = {name: 3 * tensor for name, tensor in models["a"].items()}
    save_all(models)
    Path("recipe.yml").write_text(ARITHMETIC)
    code, out, err = run("merge", "recipe.yml", "out")
    assert (code, out.splitlines()[1:]) == (
        0,
        ["health: figures beyond their thresholds: 1; all figures are in fastmerge.json"],
    )
    assert err.startswith("warning: a: its deltas are 2")
    assert err.count("\n") == 1
    assert run("merge", "recipe.yml", "again", "--quiet") == (0, "", "")


def test_an_earlier_stage_is_told_of_too() -> None:
    models = family()
    models["a"] = {name: 3 * tensor for name, tensor in models["a"].items()}
    save_all(models)
    text = f"name: both\n{ARITHMETIC}---\nmerge_method: linear\nmodels: [model: both, model: b]\n"
    with pytest.warns(FastmergeWarning, match="^a: its deltas are 2"):
        found = merged(text + "parameters: {weight: 1}\n")
    assert [each.name for each in found.models] == ["both", "b"]


def test_the_table_has_each_model_and_each_layer() -> None:
    models = family()
    for name in models["b"]:
        if ".3." in name:
            models["b"][name] = models["base"][name] + 0.05
    save_all(models)
    Path("recipe.yml").write_text(ARITHMETIC)
    code, out, _ = run("merge", "recipe.yml", "out", "--health")
    found = {
        cells[1].strip(): [cell.strip() for cell in cells[2:5]]
        for line in out.splitlines()
        if len(cells := line.replace("┃", "│").split("│")) == 6
    }
    record = provenance.read("out").health
    deltas = [each["deltas"] for each in record["models"]]
    assert code == 0
    assert found[""] == ["base", "a", "b"]
    assert found["NaN or Inf"] == ["0", "0", "0"]
    assert found["deltas larger than 0.005"] == ["-", *(f"{each['beyond']:.2%}" for each in deltas[1:])]
    assert found["norm over base's"] == ["-", *(f"{each['relative']:.3g}" for each in deltas[1:])]
    norms = [each["norms"] for each in record["layers"]]
    for layer in range(6):
        (_, a, b) = found[f"model.layers.{layer}"]
        assert b.endswith(" stands out") == (layer == 3)
        assert [float(a), float(b.split()[0])] == pytest.approx([each[layer] for each in norms], rel=0.005)
    size = len(SHAPES) - 1, len(SHAPES)
    assert f"shares and sizes are from 1 of the elements, {size[0]} of {size[1]} tensors; fastmerge diff" in out


def test_the_page_has_every_threshold() -> None:
    page = (Path(__file__).parents[1] / "docs" / "health.md").read_text()
    for name in (
        "DARE_RANGE",
        "DARE_BEYOND",
        "UNRELATED",
        "DENORMAL",
        "LAYER_DEVIATIONS",
        "LAYER_TIMES",
        "FEWEST_LAYERS",
    ):
        assert f"`{name}` {getattr(health, name):g}" in page


# --- NaN changes nothing elsewhere ---

THREE = "base_model: base\nmodels: [model: a, model: b, model: c]\n"
TWO = "models: [model: a, model: b]\n"
METHODS = {
    "linear": f"merge_method: linear\n{TWO}parameters: {{weight: [0.2, 0.7]}}\n",
    "task_arithmetic": f"merge_method: task_arithmetic\n{THREE}parameters: {{weight: 0.4, lambda: 0.9}}\n",
    "ties": f"merge_method: ties\n{THREE}parameters: {{weight: 0.7, density: 0.3}}\n",
    "ties-all": f"merge_method: ties\n{THREE}parameters: {{weight: 0.7, density: 0.3, ties: all}}\n",
    "ties-rescaled": f"merge_method: ties\n{THREE}parameters: {{weight: 0.7, density: 0.3, rescale: l2}}\n",
    "ties-of-model": f"merge_method: ties\n{THREE}parameters: {{weight: 0.7, density: 0.3, scope: model}}\n",
    "breadcrumbs": f"merge_method: breadcrumbs\n{THREE}parameters: {{weight: 0.4, density: 0.6, gamma: 0.1}}\n",
    "breadcrumbs_ties": f"merge_method: breadcrumbs_ties\n{THREE}parameters: {{weight: 1, density: 0.6, rescale: l1}}",
    "dare_linear": f"merge_method: dare_linear\n{THREE}parameters: {{weight: 0.4, density: 0.6, rescale: l1}}\n",
    "dare_ties": f"merge_method: dare_ties\n{THREE}parameters: {{weight: 0.4, density: 0.6}}\n",
    "della": f"merge_method: della\n{THREE}parameters: {{weight: 0.4, density: 0.6}}\n",
    "della_linear": f"merge_method: della_linear\n{THREE}parameters: {{weight: 0.4, density: 0.6}}\n",
    "nearswap": "merge_method: nearswap\nbase_model: base\nmodels: [model: a]\nparameters: {t: 0.002}\n",
    "ram": f"merge_method: ram\n{THREE}parameters: {{epsilon: 0.002}}\n",
    "ramplus_tl": f"merge_method: ramplus_tl\n{THREE}parameters: {{epsilon: 0.005, r: 0.5, alpha: 1}}\n",
    "sce": f"merge_method: sce\n{THREE}parameters: {{select_topk: 0.3}}\n",
    "arcee_fusion": "merge_method: arcee_fusion\nbase_model: base\nmodels: [model: a]\n",
    "slerp": f"merge_method: slerp\nbase_model: a\n{TWO}parameters: {{t: 0.4}}\n",
    "nuslerp": f"merge_method: nuslerp\n{TWO}parameters: {{weight: [0.2, 0.7]}}\n",
    "nuslerp-rows": f"merge_method: nuslerp\n{TWO}parameters: {{weight: 1, nuslerp_flatten: false}}\n",
    "nuslerp-columns": (
        f"merge_method: nuslerp\n{TWO}parameters: {{weight: 1, nuslerp_flatten: false, nuslerp_row_wise: true}}\n"
    ),
    "multislerp": f"merge_method: multislerp\n{THREE}parameters: {{weight: [0.2, 0.7]}}\n",
    "karcher": "merge_method: karcher\nmodels: [model: a, model: b, model: c]\n",
    "model_stock": f"merge_method: model_stock\n{THREE}",
}
DIRECT = ("della", "della_linear", "sce", "ramplus_tl", "arcee_fusion", "nuslerp-columns")
#: Where what is infinite is one of the largest, and nothing else is made of it.
SELECTING = ("ties", "ties-all", "ties-of-model", "breadcrumbs")
UP, WIDE = "layers.0.up.weight", "layers.1.wide.weight"
PLACES = {"a": (137, 138, 900), "b": (500, 138), "base": (700,)}


CASES = [
    (method, value, backend)
    for method in METHODS
    for value in ((np.nan, np.inf) if method in SELECTING else (np.nan,))
    for backend in ("torch", *(() if method in DIRECT else ISAS or ("compiled",)))
]


@pytest.mark.parametrize(("method", "value", "backend"), CASES)
def test_what_is_not_finite_changes_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch, method: str, value: float, backend: str
) -> None:
    """A merge where a NaN was the base's number, so that its delta is zero, or 0 without a base, differs at most where
    the NaN was; an Inf is as a number that is larger than all others."""
    text = METHODS[method]
    if backend != "torch":
        native = compiled_core()
        if backend not in native.isas():
            pytest.skip(native.why_not(backend))
        monkeypatch.setenv("FASTMERGE_ISA", backend)
        backend = "cpu"
    models = {name: tensors for name, tensors in four().items() if f"model: {name}" in text}
    stand_ins = {name: {key: tensor.clone() for key, tensor in tensors.items()} for name, tensors in models.items()}
    for name, places in PLACES.items():
        for key, at in ((key, at) for key in (UP, WIDE) for at in places if name in models):
            if value == np.inf:
                stand_ins[name][key].view(-1)[at] = 3e38
            elif name == "base":
                for each in stand_ins.values():
                    each[key].view(-1)[at] = 0
            else:
                stand_ins[name][key].view(-1)[at] = stand_ins["base"][key].view(-1)[at] if "base" in models else 0
            models[name][key].view(-1)[at] = value
    save_all(models)
    fastmerge.merge(Recipe.parse(text), "found", nonfinite="propagate", backend=backend)
    for name, tensors in stand_ins.items():
        save_file(tensors, f"{name}/model.safetensors")
    fastmerge.merge(Recipe.parse(text), "expected", backend=backend)
    found, expected = (load_file(f"{folder}/model.safetensors") for folder in ("found", "expected"))
    for key, tensor in expected.items():
        elsewhere = torch.ones(tensor.numel(), dtype=torch.bool)
        if key in (UP, WIDE):
            elsewhere[[at for name in models for at in PLACES.get(name, ())]] = False
        here, there = (each[key].view(-1)[elsewhere].view(torch.int32) for each in (found, expected))
        assert torch.equal(here, there), f"{int((here != there).sum())} elements of {key} differ"


def four() -> dict[str, Tensors]:
    shapes = {UP: (24, 40), WIDE: (7, 20_001), "layers.1.up.weight": (24, 40)}
    rng = np.random.default_rng(3)
    models = family(shapes=shapes)
    models["c"] = {k: v + torch.tensor(rng.standard_normal(v.shape) * 0.003).float() for k, v in models["base"].items()}
    return models
