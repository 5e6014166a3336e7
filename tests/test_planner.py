"""Plans: which tensors become which jobs with which settings, and what is said of models that do not fit."""

from __future__ import annotations

import gc
import hashlib
import json
import struct
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import pytest

from fastmerge.checkpoint import DTYPE_BITS
from fastmerge.errors import CheckpointError, FastmergeWarning, MismatchError, RecipeError
from fastmerge.methods import METHODS
from fastmerge.planner import Job, Plan, Planned, Source, Stage, plan
from fastmerge.recipe import Recipe

Tensors = dict[str, tuple[str, tuple[int, ...]]]


def llama(layers: int = 5, *, rows: int = 8, dtype: str = "F32", head: bool = True) -> Tensors:
    """The tensors of a small decoder, in the order of its file."""
    tensors: Tensors = {"model.embed_tokens.weight": (dtype, (rows, 4))}
    for layer in range(layers):
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = (dtype, (4,))
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"] = (dtype, (6, 4))
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = (dtype, (4, 4))
    tensors["model.norm.weight"] = (dtype, (4,))
    return tensors | ({"lm_head.weight": (dtype, (rows, 4))} if head else {})


def save(
    name: str, tensors: Tensors, config: Mapping[str, Any] | None = None, data: Mapping[str, bytes] | None = None
) -> None:
    """Writes a checkpoint folder, zeros but for `data`."""
    folder = Path(name)
    folder.mkdir()
    header: dict[str, Any] = {}
    body = b""
    for tensor, (dtype, shape) in tensors.items():
        piece = (data or {}).get(tensor, bytes(prod(shape) * DTYPE_BITS[dtype] // 8))
        header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(piece)]}
        body += piece
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def models() -> None:
    for name in ("base", "a", "b", "c"):
        save(name, llama(), {"num_hidden_layers": 5, "torch_dtype": "float32"})


def planned(text: str, **options: Any) -> Plan:
    return plan(Recipe.parse(text, "recipe.yml"), **options)


def stage(text: str, **options: Any) -> Stage:
    (only,) = planned(text, **options).stages
    return only


def jobs(text: str, **options: Any) -> dict[str, Job]:
    return {job.name: job for job in stage(text, **options).jobs}


def refusal(text: str, kind: type[Exception] = MismatchError) -> str:
    with pytest.raises(kind) as caught:
        planned(text)
    return str(caught.value)


def layer(number: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{number}.{part}.weight"


LINEAR = "merge_method: linear\nparameters: {weight: 0.5}\nmodels: [model: a, model: b]\n"
TIES = "merge_method: ties\nbase_model: base\nparameters: {weight: 1, density: 0.5}\nmodels: [model: a, model: b]\n"
SLERP = "merge_method: slerp\nbase_model: b\nparameters: {t: 0.5}\nmodels: [model: a, model: b]\n"
PASSTHROUGH = "merge_method: passthrough\nmodels: [model: a]\n"


# --- jobs ---


@pytest.mark.usefixtures("models")
def test_outputs_are_in_the_order_of_the_base() -> None:
    save("shuffled", dict(reversed(llama().items())))
    assert list(jobs(LINEAR)) == list(llama())
    assert list(jobs("merge_method: ties\nbase_model: shuffled\nparameters: {weight: 1}\nmodels: [model: a]")) == [
        *reversed(llama())
    ]


@pytest.mark.usefixtures("models")
def test_a_job_knows_what_it_reads() -> None:
    job = jobs(TIES)[layer(0)]
    assert [(info.name, info.shape) for info in job.infos] == [(layer(0), (6, 4))] * len(job.sources)
    assert job.nbytes == 3 * 6 * 4 * 4


@pytest.mark.usefixtures("models")
def test_the_same_header_is_looked_at_once() -> None:
    a, b = stage(LINEAR).models
    assert all(b.tensors[name] is info for name, info in a.tensors.items())


@pytest.mark.usefixtures("models")
def test_a_file_that_is_cut_is_refused_beside_a_whole_one_with_its_header() -> None:
    file = Path("b/model.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in refusal(LINEAR, CheckpointError)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("text", [LINEAR, "merge_method: linear\nmodels: [model: a]\n"], ids=["planned", "refused"])
def test_the_garbage_collector_is_left_as_it_was(text: str, enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(RecipeError):
            planned(text)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


@pytest.mark.usefixtures("models")
def test_an_input_method_takes_every_model() -> None:
    job = jobs(LINEAR)[layer(0)]
    assert job.inputs == (Source(0, layer(0)), Source(1, layer(0)))
    assert job.base is None
    assert job.method is METHODS["linear"]
    assert (job.dtype, job.shape, job.copy) == ("F32", (6, 4), False)


@pytest.mark.usefixtures("models")
def test_deltas_are_taken_from_the_base_which_is_no_input() -> None:
    made = stage(TIES.replace("[model: a, model: b]", "[model: a, model: base, model: b]"))
    job = made.jobs[0]
    assert [made.models[source.model].name for source in job.inputs] == ["a", "b"]
    assert job.base is not None
    assert made.models[job.base.model].name == "base"
    assert len(job.settings.models) == 2


@pytest.mark.usefixtures("models")
def test_an_endpoint_base_comes_first() -> None:
    made = stage(SLERP)
    assert [made.models[source.model].name for source in made.jobs[0].inputs] == ["b", "a"]
    assert made.jobs[0].base is None


@pytest.mark.usefixtures("models")
def test_passthrough_copies_bytes_unless_scaled_or_converted() -> None:
    assert all(job.copy for job in jobs(PASSTHROUGH).values())
    assert not any(job.copy for job in jobs(PASSTHROUGH + "dtype: bfloat16").values())
    scaled = jobs(PASSTHROUGH + "parameters: {scale: [{filter: mlp, value: 2}]}")
    assert [name for name, job in scaled.items() if not job.copy] == [layer(n) for n in range(5)]
    assert scaled[layer(0)].settings.models == ({"scale": 2.0},)


@pytest.mark.usefixtures("models")
def test_a_base_model_beside_linear_needs_a_weight() -> None:
    text = "merge_method: linear\nbase_model: base\nmodels:\n  - {model: a, parameters: {weight: 1}}\n"
    message = refusal(text, RecipeError)
    assert message.startswith("recipe.yml:3: models: linear needs the parameter weight")
    assert len(jobs(text + "parameters: {weight: 3}")[layer(0)].inputs) == 2
    assert jobs(text + "parameters: {weight: 3}")[layer(0)].settings.models == ({"weight": 1.0}, {"weight": 3.0})


@pytest.mark.usefixtures("models")
def test_a_missing_weight_names_its_model() -> None:
    text = "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - model: b\n"
    assert refusal(text, RecipeError) == (
        "recipe.yml:4: models[1]: linear needs the parameter weight, "
        "and nothing gives it for 'model.embed_tokens.weight'"
    )


@pytest.mark.usefixtures("models")
def test_a_missing_shared_parameter_names_the_tensor() -> None:
    message = refusal(SLERP.replace("{t: 0.5}", "{t: [{filter: mlp, value: 0.5}]}"), RecipeError)
    assert message == "recipe.yml:1: slerp needs the parameter t, and nothing gives it for 'model.embed_tokens.weight'"


# --- parameters ---


def weights(made: Mapping[str, Job], part: str = "mlp.up_proj", model: int = 0) -> list[object]:
    return [job.settings.models[model]["weight"] for name, job in made.items() if part in name]


@pytest.mark.usefixtures("models")
def test_a_gradient_runs_over_the_layers_and_starts_outside_of_them() -> None:
    made = jobs(
        "merge_method: linear\nparameters: {weight: [0, 0.5, 1], normalize: false}\nmodels: [model: a, model: b]"
    )
    assert weights(made) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [weights(made, part) for part in ("embed", "model.norm", "lm_head")] == [[0.0], [0.0], [0.0]]


def test_a_gradient_over_one_layer_is_at_its_end() -> None:
    save("a", llama(1))
    assert weights(jobs("merge_method: linear\nmodels: [model: a]\nparameters: {weight: [1, 2]}")) == [2.0]


@pytest.mark.usefixtures("models")
def test_a_gradient_starts_again_in_each_slice() -> None:
    made = jobs(
        """
merge_method: linear
parameters: {weight: [0, 0.5, 1], normalize: false}
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: a, layer_range: [3, 4]}]
"""
    )
    assert weights(made) == [0.0, 0.5, 1.0, 1.0]
    assert weights(made, "embed") + weights(made, "lm_head") == [0.0, 0.0]


@pytest.mark.usefixtures("models")
def test_the_strongest_place_that_gives_a_value_wins() -> None:
    made = jobs(
        """
merge_method: linear
parameters: {weight: 4}
modules:
  default:
    parameters: {weight: [{filter: norm, value: 3}, {filter: mlp, value: 3}, {filter: q_proj, value: 3}]}
    slices:
      - parameters: {weight: [{filter: mlp, value: 2}, {filter: q_proj, value: 2}]}
        sources:
          - {model: a, layer_range: [0, 1], parameters: {weight: {filter: q_proj, value: 1}}}
"""
    )
    assert {name.rpartition("s.0.")[2]: job.settings.models[0]["weight"] for name, job in made.items()} == {
        "self_attn.q_proj.weight": 1.0,
        "mlp.up_proj.weight": 2.0,
        "input_layernorm.weight": 3.0,
        "model.norm.weight": 3.0,
        "model.embed_tokens.weight": 4.0,
        "lm_head.weight": 4.0,
    }


@pytest.mark.usefixtures("models")
def test_filters_see_a_models_own_name_for_its_parameters_and_the_outputs_for_shared_ones() -> None:
    made = jobs(
        """
merge_method: task_arithmetic
base_model: base
parameters:
  weight: [{filter: layers.3., value: 3}, {value: 1}]
  lambda: [{filter: layers.0., value: 5}, {value: 1}]
slices:
  - sources: [{model: base, layer_range: [0, 1]}, {model: a, layer_range: [3, 4]}]
"""
    )[layer(0)]
    assert made.inputs == (Source(1, layer(3)),)
    assert made.base == Source(0, layer(0))
    assert made.settings.models == ({"weight": 3.0},)
    assert made.settings.shared["lambda"] == 5.0


@pytest.mark.usefixtures("models")
def test_each_layer_has_the_parameters_of_the_layer_it_comes_from() -> None:
    made = jobs(
        """
merge_method: linear
parameters: {weight: [{filter: layers.3., value: 3}, {value: 1}], normalize: false}
slices:
  - sources: [{model: a, layer_range: [2, 5]}]
"""
    )
    assert weights(made) == [1.0, 3.0, 1.0]


@pytest.mark.usefixtures("models")
def test_the_settings_of_tensors_with_equal_values_are_one_object() -> None:
    assert len({id(job.settings) for job in jobs(TIES).values()}) == 1
    halves = jobs(LINEAR.replace("0.5", "[{filter: mlp, value: 1}, {value: 2}]")).values()
    assert len({id(job.settings) for job in halves}) == 2


@pytest.mark.usefixtures("models")
def test_a_filter_that_matches_nothing_warns_with_its_place() -> None:
    text = LINEAR.replace("{weight: 0.5}", "\n  weight:\n    - {filter: mpl, value: 1}\n    - {value: 0.5}")
    with pytest.warns(FastmergeWarning, match=r"recipe.yml:4: parameters.weight\[0\]: the filter 'mpl' matches no"):
        planned(text)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("weight", "tensor"),
    [("-1", "model.embed_tokens.weight"), ("[0, -1, 0]", "model.layers.2.input_layernorm.weight")],
    ids=["everywhere", "in-one-layer"],
)
def test_weights_that_sum_to_zero_are_refused_when_normalised(weight: str, tensor: str) -> None:
    first, second = "{model: a, parameters: {weight: 1}}", f"{{model: b, parameters: {{weight: {weight}}}}}"
    text = f"merge_method: linear\nmodels: [{first}, {second}]\n"
    assert f"the weights sum to 0 for '{tensor}', and normalize divides by that" in refusal(text, RecipeError)
    assert jobs(text + "parameters: {normalize: false}")


@pytest.mark.usefixtures("models")
def test_keys_are_a_function_of_seed_place_and_tensor() -> None:
    text = TIES.replace("ties", "dare_ties")
    name = layer(2)
    expected = [
        int.from_bytes(hashlib.blake2b(f"7\0{place}\0{name}".encode(), digest_size=8).digest(), "little")
        for place in range(2)
    ]
    assert list(jobs(text, seed=7)[name].settings.keys) == expected
    assert list(jobs(text + "seed: 7")[name].settings.keys) == expected
    assert list(jobs(text + "seed: 8", seed=7)[name].settings.keys) == expected
    assert jobs(text)[name].settings.keys == jobs(text, seed=0)[name].settings.keys != tuple(expected)
    assert jobs(TIES, seed=7)[name].settings.keys == ()


@pytest.mark.usefixtures("models")
def test_scope_model_needs_one_density_per_model() -> None:
    ties = TIES.replace("density: 0.5", "scope: model, density: %s")
    assert jobs(ties % "0.5")[layer(0)].settings.shared["scope"] == "model"
    message = refusal(ties % "[0.25, 1]", RecipeError)
    assert message.startswith("recipe.yml:3: parameters.scope: ")
    assert "density must be the same" in message
    partly = TIES.replace("density: 0.5", "scope: {filter: mlp, value: model}")
    assert "scope is model for some tensors only" in refusal(partly, RecipeError)


@pytest.mark.usefixtures("models")
@pytest.mark.filterwarnings("ignore::fastmerge.errors.FastmergeWarning")
def test_scope_model_needs_every_tensor_in_every_model() -> None:
    save("part", {name: info for name, info in llama().items() if "norm" not in name})
    text = TIES.replace("density: 0.5", "scope: model").replace("model: b]", "model: part]")
    assert "must come from the same models" in refusal(text, RecipeError)


# --- dtypes ---


@pytest.mark.parametrize(
    ("first", "second", "settings", "output"),
    [
        ("BF16", "BF16", "", "BF16"),
        ("BF16", "F16", "", "F32"),
        ("F16", "F32", "", "F32"),
        ("F32", "F64", "", "F64"),
        ("F32", "F32", "dtype: bfloat16", "BF16"),
        ("F32", "F32", "dtype: float32\nout_dtype: float16", "F16"),
    ],
)
def test_the_output_has_the_recipes_dtype_or_one_that_holds_all_inputs(
    first: str, second: str, settings: str, output: str
) -> None:
    save("a", llama(dtype=first))
    save("b", llama(dtype=second))
    assert {job.dtype for job in jobs(LINEAR + settings).values()} == {output}


def test_nested_configs_that_say_a_dtype_say_the_one_that_is_written() -> None:
    text = {"hidden_size": 4, "torch_dtype": "float32"}
    save("a", llama(1), {"text_config": text, "vision_config": {"depth": 1}, "dtype": "float32"})
    assert stage(PASSTHROUGH + "dtype: bfloat16").config_changes == {
        "dtype": "bfloat16",
        "text_config": {**text, "torch_dtype": "bfloat16"},
    }


def test_the_config_says_the_dtype_that_is_written() -> None:
    save("a", llama(dtype="BF16"), {"num_hidden_layers": 5, "dtype": "bfloat16"})
    save("b", llama(dtype="BF16"))
    assert stage(LINEAR).config_changes == {}
    assert stage(LINEAR + "dtype: float32").config_changes == {"dtype": "float32"}
    save("old", llama(dtype="BF16"), {"num_hidden_layers": 5, "torch_dtype": "bfloat16"})
    old = LINEAR.replace("model: a", "model: old")
    assert stage(old + "out_dtype: float16").config_changes == {"torch_dtype": "float16"}


BUFFER = "model.position_ids"


@pytest.mark.parametrize("dtype", ["I64", "BOOL", "U8", "I32"])
def test_equal_buffers_are_copied(dtype: str) -> None:
    values = bytes([1]) * (DTYPE_BITS[dtype] // 8 * 3)
    for name in ("base", "a", "b"):
        save(name, {BUFFER: (dtype, (3,)), "w.weight": ("F32", (2,))}, data={BUFFER: values})
    for text in (LINEAR, TIES, SLERP):
        job = jobs(text + "dtype: bfloat16\n")[BUFFER]
        assert (job.dtype, job.copy, len(job.inputs), job.base) == (dtype, True, 1, None)


@pytest.mark.parametrize("at", [0, (1 << 20) + 1, (2 << 20) + 4], ids=["first", "second-chunk", "last"])
def test_buffers_that_differ_are_refused(at: int) -> None:
    values = bytearray((2 << 20) + 5)
    save("a", {BUFFER: ("U8", (len(values),))}, data={BUFFER: bytes(values)})
    values[at] = 1
    save("b", {BUFFER: ("U8", (len(values),))}, data={BUFFER: bytes(values)})
    assert f"'{BUFFER}' holds U8 values, which differ in 'a' and 'b'" in refusal(LINEAR)


@pytest.mark.parametrize("other", ["I32", "F32"])
def test_a_buffer_of_two_dtypes_is_refused(other: str) -> None:
    save("a", {BUFFER: ("I64", (3,))})
    save("b", {BUFFER: (other, (3,))})
    assert f"'{BUFFER}' is I64 in 'a' and {other} in 'b'" in refusal(LINEAR)


# --- slices ---

STACKED = """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
"""


@pytest.mark.usefixtures("models")
def test_layers_are_numbered_as_they_come() -> None:
    made = jobs(STACKED)
    assert list(made) == list(llama(6))
    assert [made[layer(n)].inputs[0] for n in range(6)] == [
        *(Source(0, layer(n)) for n in (0, 1, 2)),
        *(Source(1, layer(n)) for n in (1, 2, 3)),
    ]


@pytest.mark.usefixtures("models")
def test_slices_are_in_the_order_of_their_base() -> None:
    tensors = {"model.extra_embed.weight": ("F32", (2,)), **llama(1)}
    save("forward", tensors)
    save("backward", dict(reversed(tensors.items())))
    made = jobs(
        """
merge_method: task_arithmetic
base_model: backward
parameters: {weight: 1}
slices:
  - sources: [{model: forward, layer_range: [0, 1]}, {model: backward, layer_range: [0, 1]}]
"""
    )
    embeddings = ["model.embed_tokens.weight", "model.extra_embed.weight"]
    inside = [layer(0, part) for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")]
    assert list(made) == [*embeddings, *inside, "lm_head.weight", "model.norm.weight"]


@pytest.mark.usefixtures("models")
def test_embeddings_come_from_the_first_slice_and_the_head_from_the_last() -> None:
    made = jobs(STACKED)
    assert [
        made[name].inputs[0].model for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    ] == [
        0,
        1,
        1,
    ]


@pytest.mark.parametrize(
    ("names", "before"),
    [
        (("wte.weight", "wpe.weight"), True),
        (("embeddings.LayerNorm.weight", "gpt_neox.embed_in.weight", "tok_embeddings.weight"), True),
        (("shared.weight", "conv1.weight", "vision_model.pre_layrnorm.bias", "cls_token"), True),
        (("ln_f.weight", "embed_out.weight", "unembed.weight", "score.weight", "output.weight"), False),
        (("post_layernorm.weight", "logit_scale", "proj_out.weight", "final_conv.weight"), False),
    ],
    ids=["gpt2", "embeddings", "stems", "heads", "rest"],
)
def test_which_tensors_outside_the_layers_come_before_them(names: tuple[str, ...], before: bool) -> None:
    tensors: Tensors = {f"h.{n}.w": ("F32", (2,)) for n in range(5)} | dict.fromkeys(names, ("F32", (2,)))
    save("a", tensors, {"n_layer": 5})
    save("b", tensors)
    made = jobs(STACKED)
    assert {made[name].inputs[0].model for name in names} == {0 if before else 1}
    assert set(made) == {*names, *(f"h.{n}.w" for n in range(6))}


@pytest.mark.usefixtures("models")
def test_the_config_counts_the_layers_that_are_written() -> None:
    assert stage(STACKED).config_changes == {"num_hidden_layers": 6}
    same = "merge_method: passthrough\nslices: [sources: [{model: a, layer_range: [0, 5]}]]"
    assert stage(same).config_changes == {}


@pytest.mark.parametrize("key", ["n_layer", "num_layers", "n_layers"])
def test_the_count_goes_by_many_names(key: str) -> None:
    for name in ("a", "b"):
        save(name, llama(), {key: 5, "torch_dtype": "float32"})
    assert stage(STACKED).config_changes == {key: 6}


def test_a_nested_config_changes_as_a_whole_and_lists_follow_their_layers() -> None:
    for name, kind in (("a", "full"), ("b", "sliding")):
        text = {"num_hidden_layers": 5, "hidden_size": 4, "layer_types": [f"{kind}{n}" for n in range(5)]}
        save(name, llama(), {"text_config": text, "torch_dtype": "float32"})
    assert stage(STACKED).config_changes == {
        "text_config": {
            "num_hidden_layers": 6,
            "hidden_size": 4,
            "layer_types": ["full0", "full1", "full2", "sliding1", "sliding2", "sliding3"],
        }
    }


def test_every_key_that_counts_a_stack_changes() -> None:
    tensors: Tensors = {
        f"model.{part}.layers.{n}.w": ("F32", (2,)) for part in ("encoder", "decoder") for n in range(3)
    }
    counts = {"num_hidden_layers": 3, "encoder_layers": 3, "decoder_layers": 3, "torch_dtype": "float32"}
    save("a", tensors, counts)
    text = """
merge_method: passthrough
modules:
  %s: {slices: [sources: [{model: a, layer_range: [0, 2]}]]}
  default: {models: [model: a]}
"""
    assert stage(text % "encoder").config_changes == {"num_hidden_layers": 2, "encoder_layers": 2}
    assert stage(text % "decoder").config_changes == {"decoder_layers": 2}


def test_a_config_that_says_it_nested_and_flat_changes_in_both_places() -> None:
    text = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"]}
    tensors = llama(3) | {f"visual.blocks.{n}.w.weight": ("F32", (2,)) for n in range(3)}
    save("a", tensors, {**text, "text_config": text, "vision_config": {"depth": 3}, "torch_dtype": "float32"})
    sliced = "{slices: [sources: [{model: a, layer_range: [1, 3]}]]}"
    made = stage(f"merge_method: passthrough\nmodules: {{visual: {{models: [model: a]}}, default: {sliced}}}")
    now = {"num_hidden_layers": 2, "layer_types": ["y", "z"]}
    assert made.config_changes == {**now, "text_config": now}


def test_a_count_of_another_stack_is_left_alone() -> None:
    tensors: Tensors = {f"{part}.block.{n}.w": ("F32", (2,)) for part in ("encoder", "decoder") for n in range(3)}
    save("a", tensors, {"num_layers": 3, "torch_dtype": "float32"})
    text = """
merge_method: passthrough
modules:
  encoder: {models: [model: a]}
  decoder: {slices: [sources: [{model: a, layer_range: [0, 2]}]]}
"""
    with pytest.warns(FastmergeWarning, match="no key of config.json counts the layers 'decoder.block' of 'a'"):
        assert stage(text).config_changes == {}


def test_layers_that_predict_further_tokens_are_neither_counted_nor_kept() -> None:
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "torch_dtype": "float32"}
    for name in ("a", "b"):
        save(name, llama(5) | {"model.layers.4.eh_proj.weight": ("F32", (4, 8))}, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = stage(STACKED.replace("[1, 4]", "[2, 4]"))
    assert made.config_changes == {"num_hidden_layers": 5, "num_nextn_predict_layers": 0}
    assert not any("eh_proj" in job.name for job in made.jobs)


def test_a_key_that_goes_by_layer_follows_or_is_warned_of() -> None:
    for name in ("a", "b"):
        save(name, llama(), {"num_hidden_layers": 5, "first_k_dense_replace": 2, "torch_dtype": "float32"})
    with pytest.warns(FastmergeWarning, match="first_k_dense_replace in config.json of 'a' goes by the numbers of lay"):
        assert stage(STACKED).config_changes == {"num_hidden_layers": 6}
    assert stage(STACKED.replace("[1, 4]", "[2, 4]").replace("[0, 3]", "[1, 3]")).config_changes == {
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
    }


def test_a_first_layer_unlike_the_others_is_warned_of_elsewhere() -> None:
    for name in ("a", "b"):
        tensors = without(llama(), "layers.0.input_layernorm")
        save(name, tensors, {"num_hidden_layers": 5, "torch_dtype": "float32"})
    with pytest.warns(FastmergeWarning, match=r"layer 3 of 'model.layers' will hold other tensors than in 'a'"):
        planned(STACKED.replace("[1, 4]", "[0, 3]"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(STACKED)


def test_what_the_first_layer_holds_for_all_stays_there() -> None:
    shared = {"model.layers.0.self_attn.bias.weight": ("F32", (2,))}
    for name in ("a", "b"):
        save(name, llama() | shared, {"num_hidden_layers": 5})
    made = jobs(STACKED.replace("[0, 3]", "[2, 4]").replace("[1, 4]", "[0, 2]"))
    assert [name for name in made if name.endswith("self_attn.bias.weight")] == list(shared)
    assert made[next(iter(shared))].inputs[0] == Source(0, next(iter(shared)))


def test_a_config_that_counts_no_layers_is_warned_of() -> None:
    for name in ("a", "b"):
        save(name, llama(), {"model_type": "odd"})
    with pytest.warns(FastmergeWarning, match="no key of config.json counts the layers 'model.layers' of 'a'"):
        planned(STACKED)


def test_a_config_that_counts_no_layers_does_not_matter_when_all_stay() -> None:
    save("a", llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(jobs("merge_method: passthrough\nslices: [sources: [{model: a, layer_range: [0, 5]}]]")) == len(
            llama()
        )


@pytest.mark.usefixtures("models")
def test_a_range_beyond_the_layers_is_refused_with_its_place() -> None:
    message = refusal(STACKED.replace("[1, 4]", "[1, 6]"), RecipeError)
    assert message == (
        "recipe.yml:5: slices[1].sources[0].layer_range: layer_range [1, 6] goes beyond the 5 layers of 'b'"
    )


def test_numbers_of_experts_are_not_layers() -> None:
    tensors: Tensors = {
        f"model.layers.{n}.mlp.experts.{expert}.w1.weight": ("F32", (2,)) for n in range(2) for expert in range(8)
    }
    save("a", tensors, {"num_hidden_layers": 2, "num_experts": 8})
    made = jobs("merge_method: linear\nmodels: [model: a]\nparameters: {weight: [1, 2]}")
    assert weights(made, "layers.0") == [1.0] * 8
    assert weights(made, "layers.1") == [2.0] * 8


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": ("F32", (2,))}, "slices need one stack of layers, and 'a' has none"),
        (
            {"vision.layers.0.w": ("F32", (2,)), "text.layers.0.w": ("F32", (2,))},
            "has several ('vision.layers', 'text.layers'): say which under modules",
        ),
    ],
    ids=["none", "several"],
)
def test_slices_need_one_stack_of_layers(tensors: Tensors, message: str) -> None:
    save("a", tensors)
    text = "merge_method: passthrough\nslices: [sources: [{model: a, layer_range: [0, 1]}]]"
    assert message in refusal(text, RecipeError)


def test_numbered_parts_that_hold_tensors_alone_are_no_layers() -> None:
    projector: Tensors = {f"projector.{n}.weight": ("F32", (2,)) for n in (0, 2)}
    save("a", llama(3) | projector, {"num_hidden_layers": 3})
    made = jobs("merge_method: passthrough\nslices: [sources: [{model: a, layer_range: [1, 3]}]]")
    assert {name for name in made if "layers" not in name} == {
        *projector,
        *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    }


# --- modules ---


@pytest.fixture
def towers() -> None:
    tensors: Tensors = {
        "shared.weight": ("F32", (4,)),
        **{f"encoder.block.{n}.w": ("F32", (4,)) for n in range(3)},
        "encoder.final_norm.weight": ("F32", (4,)),
        **{f"decoder.block.{n}.w": ("F32", (4,)) for n in range(3)},
    }
    for name in ("a", "b"):
        save(name, tensors, {"num_layers": 3, "num_decoder_layers": 3, "torch_dtype": "float32"})


MODULES = """
merge_method: linear
modules:
  encoder: {models: [{model: a}, {model: b}], parameters: {weight: [1, 2, 3]}}
  decoder: {slices: [{sources: [{model: b, layer_range: [1, 3]}]}, {sources: [{model: a, layer_range: [0, 2]}]}]}
  default: {models: [{model: a}, {model: b}]}
parameters: {weight: 7}
"""


@pytest.mark.usefixtures("towers")
def test_modules_take_their_own_tensors() -> None:
    made = stage(MODULES)
    merged = {job.name: job for job in made.jobs}
    assert sorted(merged) == sorted(
        [
            *("shared.weight", "encoder.final_norm.weight"),
            *(f"encoder.block.{n}.w" for n in range(3)),
            *(f"decoder.block.{n}.w" for n in range(4)),
        ]
    )
    assert weights(merged, "encoder.block") == [1.0, 2.0, 3.0]
    assert weights(merged, "encoder.final_norm") == [1.0]
    assert weights(merged, "shared") == [7.0]
    assert [merged[f"decoder.block.{n}.w"].inputs[0].tensor[14] for n in range(4)] == ["1", "2", "0", "1"]
    assert made.config_changes == {"num_decoder_layers": 4}


@pytest.mark.usefixtures("towers")
def test_a_module_may_be_named_by_its_whole_prefix() -> None:
    made = jobs(MODULES.replace("  encoder:", "  encoder.block:"))
    assert weights(made, "encoder.block") == [1.0, 2.0, 3.0]
    assert weights(made, "encoder.final_norm") == [7.0]


@pytest.mark.usefixtures("towers")
def test_a_tensor_belongs_to_the_innermost_module() -> None:
    block = "  encoder.block: {models: [{model: a}, {model: b}], parameters: {weight: 9}}\n"
    made = jobs(MODULES.replace("  decoder:", block + "  decoder:"))
    assert weights(made, "encoder.block") == [9.0] * 3
    assert weights(made, "encoder.final_norm") == [1.0]


def test_mergekits_names_of_modules_mean_what_they_are_called_here() -> None:
    tensors = llama(2) | {
        f"visual.{part}.{n}.proj.weight": ("F32", (2,)) for part in ("blocks", "merger") for n in (0, 1)
    }
    save("a", tensors)
    scaled = "{models: [{model: a, parameters: {weight: %s}}]}"
    text = f"""
merge_method: linear
parameters: {{normalize: false}}
modules:
  text_decoder: {scaled % 1}
  multi_modal_projector: {scaled % 2}
  vision_tower: {scaled % 3}
"""
    made = jobs(text)
    assert {name: weights({name: made[name]}, "")[0] for name in made} == {
        name: 3.0 if "blocks" in name else 2.0 if "merger" in name else 1.0 for name in tensors
    }


@pytest.mark.usefixtures("towers")
def test_a_head_that_no_module_covers_is_the_decoders() -> None:
    part = "{models: [{model: c, parameters: {weight: %s}}]}"
    save("c", {"lm_head.weight": ("F32", (2,)), **{f"{p}.block.0.w": ("F32", (2,)) for p in ("encoder", "decoder")}})
    text = f"""
merge_method: linear
parameters: {{normalize: false}}
modules: {{encoder: {part % 1}, decoder: {part % 2}}}
"""
    made = jobs(text)
    assert (weights(made, "lm_head"), weights(made, "encoder")) == ([2.0], [1.0])


@pytest.mark.usefixtures("models")
def test_the_only_module_is_the_default_one() -> None:
    assert list(jobs("merge_method: passthrough\nmodules: {default: {models: [model: a]}}")) == list(llama())


@pytest.mark.usefixtures("towers")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("encoder:", "encodr:"), "recipe.yml:4: modules.encodr: the module 'encodr' names no part of 'a'"),
        (("encoder:", "block:"), "the module 'block' names several parts (decoder.block., encoder.block.)"),
        (
            ("  default: {models: [{model: a}, {model: b}]}\n", ""),
            "no module covers 1 tensors, such as 'shared.weight'",
        ),
    ],
    ids=["unknown", "ambiguous", "uncovered"],
)
def test_modules_that_do_not_fit_the_model(change: tuple[str, str], message: str) -> None:
    assert message in refusal(MODULES.replace(*change), RecipeError)


@pytest.mark.usefixtures("models")
def test_a_part_of_the_model_has_one_module() -> None:
    text = "merge_method: passthrough\nmodules:\n  layers: {models: [model: a]}\n  model.layers: {models: [model: a]}\n"
    assert refusal(text, RecipeError) == (
        "recipe.yml:4: modules.model.layers: the module 'layers' is the same part; keep one of them"
    )


def test_two_stacks_that_one_nested_config_counts_both_change_it() -> None:
    tensors: Tensors = {f"{part}.{n}.w": ("F32", (2,)) for part in ("encoder", "decoder") for n in range(3)}
    counts = {"encoder_layers": 3, "decoder_layers": 3}
    save("a", tensors, {"text_config": counts, "torch_dtype": "float32"})
    sliced = "{slices: [sources: [{model: a, layer_range: [0, %s]}]]}"
    text = f"merge_method: passthrough\nmodules:\n  encoder: {sliced % 1}\n  decoder: {sliced % 2}\n"
    assert stage(text).config_changes == {"text_config": {"encoder_layers": 1, "decoder_layers": 2}}


# --- models that do not fit ---


def without(tensors: Tensors, part: str) -> Tensors:
    return {name: info for name, info in tensors.items() if part not in name}


@pytest.mark.usefixtures("models")
def test_a_model_without_a_tensor_has_no_delta_there() -> None:
    save("part", without(llama(), "layers.1.mlp"))
    with pytest.warns(FastmergeWarning, match=r"'part' lacks 1 tensors, such as 'model.layers.1.mlp.up_proj.weight'"):
        made = stage(TIES.replace("model: b]", "model: part]"))
    (job,) = (job for job in made.jobs if job.name == layer(1))
    assert [made.models[source.model].name for source in job.inputs] == ["a"]
    assert len(job.settings.models) == 1


@pytest.mark.usefixtures("models")
def test_a_tensor_of_the_base_alone_is_copied() -> None:
    save("part", without(llama(), "layers.1.mlp"))
    text = TIES.replace("[model: a, model: b]", "[model: part]")
    with pytest.warns(FastmergeWarning):
        job = jobs(text)[layer(1)]
    assert (job.copy, job.base, job.inputs) == (True, None, (Source(0, layer(1)),))
    with pytest.warns(FastmergeWarning):
        converted = jobs(text + "dtype: float16")[layer(1)]
    assert (converted.copy, converted.dtype, converted.method) == (False, "F16", METHODS["passthrough"])


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("text", [LINEAR, SLERP, TIES.replace("base_model: base", "base_model: b")])
def test_a_tensor_that_a_needed_model_lacks_is_refused(text: str) -> None:
    save("part", without(llama(), "layers.1.mlp"))
    assert f"\n  '{layer(1)}' is missing in 'part'" in refusal(
        text.replace("model: b", "model: part").replace("base_model: b", "base_model: part")
    )


@pytest.mark.usefixtures("models")
def test_models_of_different_depth_are_refused() -> None:
    save("deep", llama(6), {"num_hidden_layers": 6})
    assert "'model.layers.5.input_layernorm.weight' is missing in 'a'" in refusal(
        LINEAR.replace("model: b", "model: deep")
    )


@pytest.mark.parametrize(
    ("name", "shape", "other", "hint"),
    [
        ("model.embed_tokens.weight", (8, 4), (9, 4), "their vocabularies differ"),
        ("lm_head.weight", (8, 4), (9, 4), "their vocabularies differ"),
        ("model.layers.0.k_proj.weight", (8, 4), (4, 4), "and [4, 4] in 'b'"),
        ("model.layers.0.c_attn.weight", (8, 4), (4, 8), "one is transposed"),
        ("model.norm.weight", (4,), (4, 1), "is [4] in 'a' and [4, 1] in 'b'"),
    ],
    ids=["embeddings", "head", "heads", "transposed", "rank"],
)
def test_shapes_that_differ_are_refused(name: str, shape: tuple[int, ...], other: tuple[int, ...], hint: str) -> None:
    save("a", {name: ("F32", shape)})
    save("b", {name: ("F32", other)})
    message = refusal(LINEAR)
    assert f"'{name}' is {list(shape)} in 'a'" in message
    assert hint in message


def test_the_first_20_problems_are_listed() -> None:
    save("a", {f"t{n:02}": ("F32", (2,)) for n in range(33)})
    save("b", {f"t{n:02}": ("F32", (3,)) for n in range(33)})
    lines = refusal(LINEAR).splitlines()
    assert lines[0] == "recipe.yml:1: the models do not fit one another:"
    assert [line.split("'")[1] for line in lines[1:21]] == [f"t{n:02}" for n in range(20)]
    assert lines[21:] == ["  and 13 more"]


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize(
    ("rename", "hint"),
    [
        (
            lambda n: f"base_model.model.{n}",
            "'other' has names that begin with 'base_model.model.', unlike 'a': remove",
        ),
        (lambda n: f"_orig_mod.{n}", "'other' has names that begin with '_orig_mod.', unlike 'a'"),
        (lambda n: n.replace("model.", "model._orig_mod."), "'other' has names with '_orig_mod.'"),
        (lambda n: n.removeprefix("model."), "'other' has names without the 'model.' of 'a': put that before them"),
    ],
    ids=["peft", "compiled", "compiled-inside", "bare"],
)
def test_prefixes_that_differ_come_with_the_rename_that_fits(rename: Callable[[str], str], hint: str) -> None:
    save("other", {rename(name): info for name, info in llama().items()})
    assert refusal(LINEAR.replace("model: b", "model: other")).splitlines()[1].strip().startswith(hint)


def test_tensor_names_in_messages_show_terminal_escapes_escaped() -> None:
    save("a", {"\x1b[31mred": ("F32", (2,))})
    save("b", {"\x1b[31mred": ("F32", (3,))})
    assert "'\\x1b[31mred' is [2]" in refusal(LINEAR)


@pytest.mark.parametrize("text", [LINEAR, TIES.replace("base_model: base", "base_model: b")])
def test_tied_and_untied_embeddings_are_refused(text: str) -> None:
    save("a", llama(head=False), {"num_hidden_layers": 5, "tie_word_embeddings": True})
    save("b", llama(), {"num_hidden_layers": 5, "tie_word_embeddings": False})
    assert "'lm_head.weight' is tied to the embeddings in 'a' and not in 'b': save both one way" in refusal(text)


def test_a_head_of_its_own_that_one_model_lacks_is_refused_whatever_the_configs_say() -> None:
    save("a", llama(head=False))
    save("b", llama(), data={"lm_head.weight": b"\1" * 8 * 4 * 4})
    assert "'lm_head.weight' is tied to the embeddings in 'a' and not in 'b'" in refusal(LINEAR)


@pytest.mark.parametrize("heads", [(False, False), (True, False), (True, True)], ids=["none", "one", "both"])
def test_tied_embeddings_stay_one_tensor(heads: tuple[bool, bool]) -> None:
    for name, head in zip("ab", heads, strict=True):
        save(name, llama(head=head), {"num_hidden_layers": 5, "tie_word_embeddings": True})
    assert list(jobs(LINEAR)) == list(llama(head=False))


def test_a_tied_head_that_is_no_copy_stays_for_the_loader_to_judge() -> None:
    for name in "ab":
        data = {"lm_head.weight": b"\1" * 8 * 4 * 4}
        save(name, llama(), {"num_hidden_layers": 5, "tie_word_embeddings": True}, data)
    assert sorted(jobs(LINEAR)) == sorted(llama())


@pytest.mark.parametrize(
    ("copies", "original"),
    [
        (["lm_head.weight"], "transformer.wte.weight"),
        (["cls.predictions.decoder.weight"], "bert.embeddings.word_embeddings.weight"),
        (["decoder.weight"], "model.embeddings.tok_embeddings.weight"),
        (["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"], "shared.weight"),
        (["cls.predictions.decoder.bias"], "cls.predictions.bias"),
    ],
    ids=["gpt2", "bert", "modernbert", "t5", "bias"],
)
def test_a_copy_that_only_some_models_store_is_left_out(copies: list[str], original: str) -> None:
    tensors: Tensors = {original: ("F32", (8, 4)), "norm.weight": ("F32", (4,))}
    data = {original: b"\1" * 128}
    save("a", tensors, {}, data)
    save("b", tensors | dict.fromkeys(copies, ("F32", (8, 4))), {}, data | dict.fromkeys(copies, data[original]))
    assert list(jobs(LINEAR)) == list(tensors)
    assert list(jobs(LINEAR.replace("[model: a, model: b]", "[model: b, model: a]"))) == list(tensors)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        ({}, {"quantization_config": {"quant_method": "bitsandbytes"}}, "method bitsandbytes"),
        ({"model.q.qweight": ("I32", (2, 2)), "model.q.scales": ("F16", (2,))}, {}, "'model.q.qweight' is I32"),
        ({"model.q.weight_packed": ("I32", (2,))}, {}, "'model.q.weight_packed' is I32"),
        ({"q.weight": ("F8_E4M3", (2, 2)), "q.weight_scale_inv": ("F32", (1, 1))}, {}, "'q.weight_scale_inv' is F32"),
        ({"mlp.experts.down_proj_blocks": ("U8", (4,))}, {}, "'mlp.experts.down_proj_blocks' is U8"),
    ],
    ids=["bitsandbytes", "gptq", "compressed-tensors", "block-fp8", "mxfp4"],
)
def test_quantised_weights_are_refused(tensors: Tensors, config: dict[str, Any], reason: str) -> None:
    for name in ("a", "b"):
        save(name, llama() | tensors, config)
    message = refusal(LINEAR)
    assert f"'a' is quantised ({reason}" in message.replace("quantization_config in config.json, ", "")
    assert f"'b' is quantised ({reason}" in message.replace("quantization_config in config.json, ", "")


def test_fp8_without_scales_is_refused_too() -> None:
    for name in ("base", "a", "b"):
        save(name, {"q.weight": ("F8_E5M2", (2, 2))})
    for text in (LINEAR, TIES, PASSTHROUGH + "dtype: bfloat16"):
        assert "'q.weight' is F8_E5M2 in 'a': dequantise it" in refusal(text)


def test_quantised_weights_may_be_copied() -> None:
    save("a", {"q.weight": ("F8_E4M3", (2, 2)), "q.weight_scale": ("F32", ())})
    assert [(job.copy, job.dtype) for job in jobs(PASSTHROUGH).values()] == [(True, "F8_E4M3"), (True, "F32")]


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("rope_theta", 10000.0, 500000.0),
        ("rms_norm_eps", 1e-5, 1e-6),
        ("num_attention_heads", 4, 2),
        ("rope_scaling", None, {"type": "linear", "factor": 2}),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_configs_that_change_the_maths_are_warned_of(key: str, first: object, second: object, nested: bool) -> None:
    for name, value in (("a", first), ("b", second)):
        save(name, llama(), {"text_config": {key: value}} if nested else {key: value})
    with pytest.warns(FastmergeWarning, match=f"the configs of 'a' and 'b' differ in {key} "):
        planned(LINEAR)


def test_layers_that_the_config_does_not_count_are_warned_of() -> None:
    save("a", llama(), {"num_hidden_layers": 4})
    with pytest.warns(FastmergeWarning, match=r"config.json of 'a' speaks of 4 layers, and its tensors are of 5"):
        planned(PASSTHROUGH)


@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("text", [LINEAR, TIES, SLERP, STACKED])
def test_models_that_fit_give_no_warning(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(text)


# --- stages ---

STAGES = """
name: soup
merge_method: linear
parameters: {weight: 0.5}
models: [model: a, model: b]
dtype: bfloat16
---
merge_method: ties
base_model: base
parameters: {weight: 1}
models: [model: soup, model: c]
"""


@pytest.mark.usefixtures("models")
def test_a_stage_reads_what_an_earlier_one_will_write() -> None:
    made = planned(STAGES)
    soup, result = made.stages
    assert [soup.name, result.name] == ["soup", None]
    assert [type(model).__name__ for model in result.models] == ["Checkpoint", "Planned", "Checkpoint"]
    before = result.models[1]
    assert isinstance(before, Planned)
    assert before.stage is soup
    assert before.tensors[layer(0)].dtype == "BF16"
    assert before.tensors[layer(0)].nbytes == 6 * 4 * 2
    assert {job.dtype for job in result.jobs} == {"F32"}


@pytest.mark.usefixtures("models")
def test_a_donor_that_is_a_stage_hands_its_own_on_with_all_changes() -> None:
    text = (
        "name: tall\n"
        + STACKED.lstrip()
        + "---\nmerge_method: linear\nmodels: [model: tall]\nparameters: {weight: 1}\n"
    )
    last = planned(text + "dtype: bfloat16").stages[-1]
    assert last.donor.name == "a"
    assert last.config_changes == {"num_hidden_layers": 6, "torch_dtype": "bfloat16"}
    assert [job.name for job in last.jobs] == list(llama(6))


def test_buffers_are_compared_through_stages() -> None:
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        save(name, {BUFFER: ("I8", (1,))}, data={BUFFER: bytes([value])})
    text = "name: soup\n" + LINEAR + "---\n" + LINEAR.replace("model: a, model: b", "model: soup, model: %s")
    assert planned(text % "a").stages[-1].jobs[0].copy
    assert "which differ in 'soup' and 'c'" in refusal(text % "c")


# --- bytes ---


@pytest.mark.usefixtures("models")
def test_bytes_are_those_of_inputs_and_files() -> None:
    weights = sum(prod(shape) * 4 for _, shape in llama().values())
    made = planned(TIES)
    assert made.bytes_read == 3 * weights
    assert made.bytes_written == sum(shard.size for shard in made.stages[0].layout.shards) > weights
    two = planned(STAGES)
    assert two.bytes_read == 2 * weights + (weights // 2 + 2 * weights)


@pytest.mark.usefixtures("models")
def test_shards_follow_the_shard_size() -> None:
    shards = stage(LINEAR, shard_size=200).layout.shards
    assert len(shards) > 1
    assert [name for shard in shards for name in shard.offsets] == list(llama())


@pytest.mark.usefixtures("models")
def test_the_plan_as_json() -> None:
    made = planned(STAGES)
    plain = json.loads(json.dumps(made.to_json()))
    assert plain == made.to_json()
    soup, result = plain["stages"]
    assert (soup["method"], soup["models"], result["models"]) == ("linear", ["a", "b"], ["base", "soup", "c"])
    assert result["jobs"][0] == {
        "name": "model.embed_tokens.weight",
        "dtype": "F32",
        "shape": [8, 4],
        "inputs": [
            {"model": "soup", "tensor": "model.embed_tokens.weight"},
            {"model": "c", "tensor": "model.embed_tokens.weight"},
        ],
        "base": {"model": "base", "tensor": "model.embed_tokens.weight"},
        "passes": 2,
        "gathered": False,
        "fused": True,
        "method": "ties",
        "parameters": {
            "lambda": 1.0,
            "int8_mask": False,
            "normalize": True,
            "rescale": False,
            "elect": "weighted",
            "tie_vote": "positive",
            "divide": None,
            "ties": "index",
            "scope": "tensor",
        },
        "model_parameters": [{"weight": 1.0, "density": 1.0}] * 2,
    }
    assert plain["bytes_read"] == soup["bytes_read"] + result["bytes_read"]
    assert plain["bytes_written"] == made.bytes_written
