"""Many outputs from one read: each is what a plain merge of its own recipe writes, and nothing is done twice."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import BASED, SHAPES, assert_nothing_left, digests, family, raw, save
from test_engine import load as load_tensors
from test_streaming import TINY_MEMORY, FakeCuda, FakeRankedCuda, put

import fastmerge
from fastmerge import FastmergeWarning, OutputError, RecipeError, backends, vary
from fastmerge.checkpoint import Writer
from fastmerge.planner import plan
from fastmerge.recipe import Recipe
from fastmerge.sweep import Found, Run

__all__ = ["put"]

ALIKE = {"positions": torch.arange(300), "flags": torch.tensor([True, False])}
#: A recipe that has a place for each value; the parameters that vary, and their values.
CASES: dict[str, tuple[str, dict[str, Sequence[float | bool | str]]]] = {
    "linear": (
        "merge_method: linear\nmodels: [model: a, {model: b, parameters: {weight: 2}}]\n"
        "parameters: {weight: 1, normalize: %s} # why\n",
        {"normalize": [True, False]},
    ),
    "linear-weight": (
        "merge_method: linear\nmodels: [model: a, model: b]\nparameters:\n  weight: %s\n  normalize: false\n",
        {"weight": [0.5, 0.2, 1]},
    ),
    "task_arithmetic": (
        f"merge_method: task_arithmetic\n{BASED}parameters: {{weight: 0.4, lambda: %s}}\n",
        {"lambda": [0.2, 0.4, 0.6, 1]},
    ),
    "ties": (
        f"merge_method: ties\n{BASED}parameters:\n  weight: 0.7\n  density: 0.3\n  lambda: %s  # the last\n",
        {"lambda": ["1e-3", 0.5, 1.5]},
    ),
    "ties-density": (
        f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: %s, lambda: %s}}\n",
        {"density": [0.1, 0.3, 1], "lambda": [0.5, 1]},
    ),
    "ties-rescale": (
        f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3, rescale: %s, lambda: %s}}\n",
        {"rescale": ["l1", "l2", False], "lambda": [0.5, 1]},
    ),
    "ties-equals": (
        f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3, ties: %s}}\n",
        {"ties": ["index", "all"]},
    ),
    "ties-scope": (
        f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, scope: %s, density: %s}}\n",
        {"scope": ["model", "tensor"], "density": [0.3, 0.4]},
    ),
    "dare_ties": (
        f"merge_method: dare_ties\n{BASED}parameters: {{weight: 0.4, density: 0.6, lambda: %s}}\n",
        {"lambda": [0.5, 1]},
    ),
    "dare_linear-drop_rate": (
        f"merge_method: dare_linear\n{BASED}parameters: {{weight: 0.4, drop_rate: %s, rescale: l1}}\n",
        {"drop_rate": [0.5, 0.9, 0]},
    ),
    "slerp": (
        "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b]\nparameters: {t: %s}\n",
        {"t": [0, 0.3, 0.7]},
    ),
    "passthrough": ("merge_method: passthrough\nmodels: [model: a]\nparameters: {scale: %s}\n", {"scale": [1, 0.5]}),
    "staged": (
        "name: half\nmerge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n---\n"
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [model: half, model: c]\n"
        "parameters: {weight: 1, lambda: %s}\n",
        {"lambda": [0.5, 0.25]},
    ),
}
TASKS = f"merge_method: task_arithmetic\n{BASED}parameters: {{weight: 0.4}}\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def save_models(dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> None:
    for name, tensors in family(dtype).items():
        save(name, tensors | ALIKE, shards)
        Path(name, "tokenizer.json").write_text("{}")


def values_of(case: str) -> dict[str, list[str]]:
    return {name: [str(value).lower() for value in values] for name, values in CASES[case][1].items()}


def combinations(case: str) -> dict[str, tuple[str, ...]]:
    """By the name of the output, the values in it."""
    combined: list[tuple[str, ...]] = [()]
    for values in values_of(case).values():
        combined = [(*each, value) for each in combined for value in values]
    names = values_of(case)
    return {",".join(f"{n}={v}" for n, v in zip(names, each, strict=True)): each for each in combined}


def files_of(folder: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The digests of its files, and its record but for the ops that ran."""
    files = {Path(file).name: digest for file, digest in digests(folder).items()}
    record = json.loads(Path(folder, "fastmerge.json").read_text())
    hashes = {name: tensor["hash"] for name, tensor in record["tensors"].items()}
    del files["fastmerge.json"]
    return files, {"tensors": hashes, "command": record["command"], "inputs": record["inputs"]}


# --- the same bytes ---


@pytest.mark.parametrize(("dtype", "shards"), [(torch.bfloat16, 1), (torch.float32, 2)], ids=["bf16", "f32-sharded"])
@pytest.mark.parametrize("case", CASES)
def test_each_output_is_that_of_a_plain_merge(case: str, dtype: torch.dtype, shards: int) -> None:
    """To the last byte of every file: weights, index, config, tokenizer, card and recipe; the record, too, but for the
    ops that ran, which are those for all outputs."""
    save_models(dtype, shards)
    options: dict[str, Any] = {"seed": 3, "shard_size": 300_000 if shards > 1 else 5_000_000_000}
    text, varied = CASES[case]
    outputs = combinations(case)
    first = next(iter(outputs.values()))
    report = fastmerge.merge(Recipe.parse(text % first), "varied", vary=varied, **options)
    assert report.outputs == tuple(Path("varied", name) for name in outputs)
    assert sorted(os.listdir("varied")) == sorted(outputs)
    different = set()
    for name, values in outputs.items():
        plain = fastmerge.merge(Recipe.parse(text % values), Path("plain", name), **options)
        (files, record), (plain_files, plain_record) = (files_of(f"{folder}/{name}") for folder in ("varied", "plain"))
        assert files == plain_files
        assert record == plain_record
        assert {"config.json", "tokenizer.json", "README.md", "mergekit_config.yml"} < files.keys()
        assert any("-of-" in file for file in files) is (shards > 1)
        assert plain.bytes_read == report.bytes_read
        different.add("".join(files[file] for file in sorted(files) if file.endswith(".safetensors")))
    assert len(different) == len(outputs) or dtype == torch.float32, "each value matters, where there are equals"


def _one_by_one(settings: Sequence[Sequence[Any]], merge: Callable[..., list[Found]], targets: Any) -> list[Found]:
    """Several outputs by an op that is given one at a time."""
    found = [merge([[each[k]] for each in settings], [[each[k]] for each in targets]) for k in range(len(targets[0]))]
    return [
        mine[0]._replace(overflow=tuple(count for each in mine for count in each.overflow))
        for mine in zip(*found, strict=True)
    ]


class Cuda(FakeCuda):
    """A fake GPU that writes several outputs."""

    def merge(self, tensors: Any, sweeps: Any, targets: Any, run: Run) -> list[Found]:
        return _one_by_one(sweeps, lambda sweeps, to: FakeCuda.merge(self, tensors, sweeps, to, run), targets)


class RankedCuda(Cuda, FakeRankedCuda):
    """One that selects and sweeps in one call."""

    def merge_ranked(self, tensors: Any, sweeps: Any, ranks: Any, targets: Any, run: Run) -> Any:
        def merge(sweeps: Any, to: Any) -> list[Found]:
            return FakeRankedCuda.merge_ranked(self, tensors, sweeps, ranks, to, run)[1]

        return [], _one_by_one(sweeps, merge, targets)


@pytest.mark.parametrize(
    ("fake", "gpu_memory"),
    [(RankedCuda, None), (Cuda, TINY_MEMORY)],
    ids=["in-one-call-whole", "selects-then-sweeps-tiles"],
)
@pytest.mark.parametrize("case", CASES)
def test_outputs_through_a_gpu_have_the_bytes_of_the_cpu(
    case: str, gpu_memory: int | None, fake: type[FakeCuda], put: Any
) -> None:
    put(fake())
    save_models()
    text, varied = CASES[case]
    recipe = Recipe.parse(text % next(iter(combinations(case).values())))
    fastmerge.merge(recipe, "cpu", backend="cpu", vary=varied)
    report = fastmerge.merge(recipe, "gpu", backend="cuda", vary=varied, gpu_memory=gpu_memory)
    assert "merge" in report.worked["cuda"]
    for name in combinations(case):
        assert raw(load_tensors(f"gpu/{name}")) == raw(load_tensors(f"cpu/{name}"))


@pytest.mark.parametrize("copied", ["propagate", "error"])
def test_a_copy_goes_to_every_output(copied: str) -> None:
    """Buffers as bytes, and weights that no value changes, as bytes or past a look for NaN."""
    save_models()
    text = "merge_method: passthrough\nmodels: [model: a]\nparameters: {scale: 1}\n"
    fastmerge.merge(Recipe.parse(text), "out", vary={"scale": [1, "1.0"]}, nonfinite=copied)
    expected = raw(load_tensors("a"))
    assert raw(load_tensors("out/scale=1")) == raw(load_tensors("out/scale=1.0")) == expected


# --- nothing twice ---


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("task_arithmetic", {"merge": 1}),
        ("ties", {"merge_ranked": 1}),
        ("ties-density", {"threshold": 3, "merge": 1}),
        ("ties-equals", {"threshold": 1, "merge": 1}),
        ("ties-rescale", {"threshold": 1, "norms": 1, "merge": 1}),
        ("dare_linear-drop_rate", {"norms": 3, "merge": 1}),
        ("slerp", {"gram": 1, "merge": 1}),
    ],
)
def test_what_values_have_in_common_is_measured_once(
    case: str, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[str] = Counter()
    for op in ("gram", "norms", "threshold", "merge", "merge_ranked"):
        original = getattr(backends.Ops, op)

        def count(self: Any, tensors: Any, *rest: Any, op: str = op, original: Any = original) -> Any:
            counted[op] += len(tensors)
            return original(self, tensors, *rest)

        monkeypatch.setattr(backends.Ops, op, count)
    if "merge_ranked" in expected:
        pytest.importorskip("fastmerge.native", reason="compiled core not built", exc_type=ImportError)
    tensors = family(torch.bfloat16, {name: shape for name, shape in SHAPES.items() if math.prod(shape) > 1})
    for name in tensors:
        save(name, tensors[name])
    text, varied = CASES[case]
    recipe = Recipe.parse(text % next(iter(combinations(case).values())))
    fastmerge.merge(recipe, "out", vary=varied)
    assert +counted == {op: times * len(tensors["a"]) for op, times in expected.items()}
    made = plan(recipe, vary=varied)
    measured = sum(expected.values()) + ("merge_ranked" in expected)
    assert {job.passes for job in made.stages[-1].jobs} == {measured}


def test_the_report_counts_inputs_once_and_every_output() -> None:
    save_models()
    one = fastmerge.merge(Recipe.parse(TASKS), "one")
    four = fastmerge.merge(Recipe.parse(TASKS), "four", vary={"lambda": [0.1, 0.2, 0.3, 0.4]})
    assert (four.bytes_read, four.bytes_written) == (one.bytes_read, 4 * one.bytes_written)
    assert (four.tensors, four.out) == (one.tensors, Path("four"))


def test_progress_rises_to_the_bytes_in_all() -> None:
    save_models()
    seen: list[tuple[int, int]] = []
    text, varied = CASES["ties-density"]
    fastmerge.merge(Recipe.parse(text % (1, 1)), "out", vary=varied, progress=lambda *at: seen.append(at))
    done = [at[0] for at in seen]
    assert done == sorted(done)
    assert {at[1] for at in seen} == {done[-1]}


# --- the recipe that each output has beside it ---

MODELS = "merge_method: task_arithmetic\nbase_model: base\nmodels: [model: a]\n"
HALF = "name: half\nmerge_method: linear\nmodels: [model: a, model: b]\n"
STAGED = "merge_method: task_arithmetic\nbase_model: base\nmodels: [model: half]\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{MODELS}parameters: {{weight: 1, lambda: 3}}\n", f"{MODELS}parameters: {{weight: 1, lambda: 0.2}}\n"),
        (f"{MODELS}parameters:\n  lambda: '3' # so\n", f"{MODELS}parameters:\n  lambda: 0.2 # so\n"),
        (f"{MODELS}parameters:\n  lambda: {{value: 3}}\n", f"{MODELS}parameters:\n  lambda: 0.2\n"),
        (f"{MODELS}parameters: {{weight: 1}}\n", f"{MODELS}parameters: {{lambda: 0.2, weight: 1}}\n"),
        (f"{MODELS}parameters: {{}}\n", f"{MODELS}parameters: {{lambda: 0.2, }}\n"),
        (f"{MODELS}parameters:\n  weight: 1", f"{MODELS}parameters:\n  lambda: 0.2\n  weight: 1"),
        (f"{MODELS}parameters:\n", f"{MODELS}parameters: {{lambda: 0.2}}\n"),
        (f"# ä\U0001f600\n{MODELS}", f"# ä\U0001f600\nparameters: {{lambda: 0.2}}\n{MODELS}"),
        (f"---\n{MODELS}...\n", f"---\nparameters: {{lambda: 0.2}}\n{MODELS}...\n"),
        (
            '{"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}]}',
            '{parameters: {lambda: 0.2}, "merge_method": "ties", "base_model": "base", "models": [{"model": "a"}]}',
        ),
        (f"{STAGED}---\n{HALF}", f"parameters: {{lambda: 0.2}}\n{STAGED}---\n{HALF}"),
        (f"{HALF}---\n{STAGED}", f"{HALF}---\nparameters: {{lambda: 0.2}}\n{STAGED}"),
        (f"name: alone\n{MODELS}", f"parameters: {{lambda: 0.2}}\nname: alone\n{MODELS}"),
    ],
    ids=[
        "in-flow",
        "in-block",
        "conditions-for-all",
        "beside-others",
        "in-none",
        "before-others",
        "empty",
        "absent",
        "marks",
        "json",
        "first-document",
        "last-document",
        "named",
    ],
)
def test_the_text_has_the_value_in_its_place(text: str, expected: str) -> None:
    for name in ("base", "a", "b"):
        Path(name).mkdir()
    (variant,) = vary.variants(Recipe.parse(text), {"lambda": [0.2]})
    assert variant.text == expected
    read = Recipe.parse(expected).documents[-1]
    assert read.parameters["lambda"].constant == variant.document.parameters["lambda"].constant == 0.2
    assert read.parameters.keys() == variant.document.parameters.keys()


@pytest.mark.parametrize(
    ("value", "name"),
    [(1e-05, "1e-05"), (-1, "-1"), (True, "true"), ("+.5", "+.5"), (torch.tensor(0.5).item(), "0.5")],
    ids=str,
)
def test_a_value_is_named_as_it_is_written(value: float | bool | str, name: str) -> None:
    Path("a").mkdir()
    parameter = "normalize" if value is True else "weight"
    text = "merge_method: linear\nmodels: [model: a]\nparameters: {weight: 2}\n"
    (variant,) = vary.variants(Recipe.parse(text), {parameter: [value]})
    assert variant.name == f"{parameter}={name}"
    assert variant.document.parameters[parameter].constant == (value if value is True else float(value))


# --- mistakes ---

LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\n"


@pytest.mark.parametrize(
    ("text", "varied", "message"),
    [
        ("parameters: {weight: 1}", {"wieght": [1]}, "wieght=1: unknown parameter 'wieght'; did you mean 'weight'?"),
        ("parameters: {weight: 1}", {"lambda": [1]}, "lambda=1: linear has no parameter lambda; it has weight, norm"),
        ("parameters: {weight: 1}", {"weight": ["x"]}, "weight=x: weight must be a finite number, not 'x'"),
        ("parameters: {weight: 1}", {"weight": ["null"]}, "weight=null: weight must be a finite number, not 'null'"),
        ("parameters: {weight: 1}", {"weight": [float("inf")]}, "weight=inf: weight must be a finite number, not 'i"),
        ("parameters: {weight: 1}", {"normalize": [2]}, "normalize=2: normalize must be true or false, not '2'"),
        ("parameters: {weight: 1}", {"weight": []}, "weight: there are no values to vary it over"),
        ("parameters: {weight: 1}", {"weight": [""]}, "weight=: a value is a number, true, false or a word"),
        ("parameters: {weight: 1}", {"weight": [".."]}, "weight=..: a value is a number, true, false or a word"),
        ("parameters: {weight: 1}", {"weight": ["1\nseed: 2"]}, "a value is a number, true, false or a word"),
        ("parameters: {weight: 1}", {"weight": [0.5, "0.5"]}, "weight=0.5: this value is here twice"),
        ("parameters: {weight: [1, 2]}", {"weight": [1]}, ":3: parameters.weight: weight depends on the tensor here"),
        (
            "parameters: {weight: [{filter: mlp, value: 1}, {value: 2}]}",
            {"weight": [1]},
            ":3: parameters.weight: weight depends on the tensor here, and varies only as one value for all",
        ),
        (
            "parameters: {weight: 1}",
            {"weight": range(33)},
            "33 values make 33 outputs, and one merge writes 32 at most",
        ),
        (
            "parameters: {weight: 1}",
            {"weight": range(1, 18), "normalize": [True, False]},
            "17 x 2 values make 34 outputs",
        ),
        ("parameters: &p {weight: 1}", {"weight": [2]}, "write the recipe's parameters out, without anchors and al"),
        ("parameters: {weight: &w 1}", {"weight": [2]}, "write the recipe's parameters out, without anchors and al"),
        ("<<: {parameters: {weight: 3}}", {"normalize": [True]}, "write the recipe's parameters out, without anch"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(text: str, varied: dict[str, Any], message: str) -> None:
    save_models()
    with pytest.raises(RecipeError) as raised:
        fastmerge.merge(Recipe.parse(LINEAR + text + "\n"), "out", vary=varied)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert_nothing_left()


def test_a_value_of_one_model_goes_before_one_for_all_so_that_cannot_vary() -> None:
    save_models()
    text = "merge_method: linear\nmodels:\n- model: a\n- model: b\n  parameters: {weight: 2}\nparameters: {weight: 1}\n"
    with pytest.raises(RecipeError, match=r"recipe:5: models\[1\]\.parameters\.weight: weight is set for a part of"):
        fastmerge.merge(Recipe.parse(text), "out", vary={"weight": [1, 2]})


def test_density_and_drop_rate_do_not_vary_beside_one_another() -> None:
    save_models()
    text = f"merge_method: dare_linear\n{BASED}parameters: {{weight: 1, density: 0.5}}\n"
    with pytest.raises(RecipeError, match="drop_rate"):
        fastmerge.merge(Recipe.parse(text), "out", vary={"drop_rate": [0.5, 0.9]})


def test_what_one_value_makes_of_a_recipe_is_told() -> None:
    save_models()
    with pytest.raises(RecipeError, match="the weights sum to 0"):
        fastmerge.merge(Recipe.parse(LINEAR + "parameters: {weight: 1}\n"), "out", vary={"weight": [1, 0]})


def test_overflow_is_told_of_the_output_where_it_is() -> None:
    save_models(torch.float32)
    text = f"{TASKS}out_dtype: float16\n"
    with pytest.warns(FastmergeWarning, match="became infinite in") as warned:
        fastmerge.merge(Recipe.parse(text), "out", vary={"lambda": [1, 1e9]})
    assert [str(each.message).split(":")[0] for each in warned] == ["lambda=1000000000.0"]


# --- what is left when a merge ends early ---


def test_an_output_that_is_there_stays_unless_it_may_be_replaced() -> None:
    save_models()
    recipe = Recipe.parse(TASKS)
    fastmerge.merge(recipe, "out", vary={"lambda": [0.2]})
    before = digests("out/lambda=0.2")
    with pytest.raises(OutputError, match=r"out/lambda=0\.2 is not empty"):
        fastmerge.merge(recipe, "out", vary={"lambda": [0.1, 0.2]})
    assert digests("out/lambda=0.2") == before
    assert os.listdir("out") == ["lambda=0.2"]
    fastmerge.merge(recipe, "out", vary={"lambda": [0.1, 0.2]}, overwrite=True, shard_size=300_000)
    assert sorted(os.listdir("out")) == ["lambda=0.1", "lambda=0.2"]
    assert not Path("out/lambda=0.2/model.safetensors").exists()


@pytest.mark.parametrize("case", ["task_arithmetic", "ties-density", "staged"])
def test_an_interrupt_leaves_no_output(case: str) -> None:
    save_models()
    text, varied = CASES[case]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    recipe = Recipe.parse(text % next(iter(combinations(case).values())))
    with pytest.raises(KeyboardInterrupt):
        fastmerge.merge(recipe, "out", vary=varied, progress=interrupt)
    assert_nothing_left()


def test_nan_leaves_no_output() -> None:
    save_models()
    tensors = family(torch.bfloat16)["b"]
    tensors["model.wide.weight"][1, 5] = torch.nan
    save("odd", tensors | ALIKE)
    recipe = Recipe.parse(TASKS.replace("model: b,", "model: odd,"))
    with pytest.raises(fastmerge.NonFiniteError, match=r"odd: tensor 'model\.wide\.weight' holds 1 NaN"):
        fastmerge.merge(recipe, "out", vary={"lambda": [1, 2]})
    assert_nothing_left()


def test_a_disk_too_small_for_all_is_told_before_any_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output takes its place on the disk at the start, so the one for which there is none finds out."""
    save_models()
    made: list[Path] = []

    def allocate(descriptor: int, begin: int, size: int) -> None:
        made.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent)
        if len(made) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(Writer, "target", lambda *_: pytest.fail("nothing is merged"))
    with pytest.raises(OutputError, match="No space left on device"):
        fastmerge.merge(Recipe.parse(TASKS), "out", vary={"lambda": [1, 2, 3, 4]})
    assert [folder.name for folder in made] == ["lambda=1", "lambda=2", "lambda=3"]
    assert_nothing_left()


def test_an_input_is_no_place_for_outputs() -> None:
    save_models()
    with pytest.raises(OutputError, match="is inside the input"):
        fastmerge.merge(Recipe.parse(TASKS), "a", vary={"lambda": [1]})
    assert not Path("a/lambda=1").exists()


def test_as_many_outputs_as_may_be_keep_few_files_open() -> None:
    resource = pytest.importorskip("resource", reason="no limits on open files here")
    tensors = {f"{n}.weight": torch.full((64,), float(n)) for n in range(40)}
    for name in ("base", "a", "b", "c"):
        save(name, tensors, num_hidden_layers=40)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard), hard))
    try:
        with pytest.warns(FastmergeWarning, match="the base is identical"):
            fastmerge.merge(Recipe.parse(TASKS), "out", vary={"lambda": range(vary.MOST)}, shard_size=256)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("out")) == vary.MOST
    assert raw(load_tensors("out/lambda=31")) == raw(tensors)
