"""Recipes: what each piece of YAML comes to mean, and where each mistake is said to be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmerge.errors import FastmergeWarning, RecipeError
from fastmerge.methods import KNOWN, METHODS, Parameter
from fastmerge.parameters import Condition, Setting
from fastmerge.recipe import Document, Model, Recipe, Repository


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)


def document(text: str) -> Document:
    (only,) = Recipe.parse(text, "recipe.yml").documents
    return only


def refusal(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, "recipe.yml")
    return caught.value


def setting(written: str, method: str = "linear", name: str = "weight") -> Setting:
    text = f"merge_method: {method}\nbase_model: base\nmodels: [{{model: a}}]\nparameters: {{{name}: {written}}}\n"
    return document(text).parameters[name]


LINEAR = """\
merge_method: linear
models:
  - model: a
    parameters:
      weight: 0.25
  - model: b
    parameters:
      weight: 0.75
"""


# --- what is read ---


def test_models_become_one_slice_of_whole_models() -> None:
    linear = document(LINEAR)
    (module,) = linear.modules
    (slice_,) = module.slices
    assert linear.method is METHODS["linear"]
    assert module.name is None
    assert slice_.base is None
    assert [(source.model.name, source.layers) for source in slice_.sources] == [("a", None), ("b", None)]
    assert [source.parameters["weight"].constant for source in slice_.sources] == [0.25, 0.75]


def test_the_text_is_kept_verbatim() -> None:
    assert Recipe.parse(LINEAR).text == LINEAR


def test_a_file_is_read_with_its_mark_and_its_models_are_found_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    (folder / "mine").mkdir(parents=True)
    (folder / "r.yml").write_bytes(b"\xef\xbb\xbfmerge_method: passthrough\nmodels: [{model: mine}]\n")
    (read,) = Recipe.load(folder / "r.yml").documents
    assert [model.path for model in read.models] == [folder / "mine"]


def test_the_current_directory_goes_before_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "a").mkdir(parents=True)
    recipe = Recipe.parse("merge_method: passthrough\nmodels: [{model: a}]", folder=tmp_path / "elsewhere")
    assert recipe.documents[0].models[0].path == Path("a")


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_base_model_that_is_not_listed_joins_last(method: str) -> None:
    (slice_,) = document(f"merge_method: {method}\nbase_model: base\nmodels: [model: a, model: b]").modules[0].slices
    assert [source.model.name for source in slice_.sources] == ["a", "b", "base"]
    assert slice_.base == 2


@pytest.mark.parametrize("spelling", ["./base", "base/", "a/../base"])
def test_one_folder_is_one_model_however_it_is_written(spelling: str) -> None:
    (slice_,) = (
        document(f"merge_method: ties\nbase_model: {spelling}\nmodels: [model: base, model: b]").modules[0].slices
    )
    assert len(slice_.sources) == 2
    assert slice_.base == 0


def test_slices_keep_their_order_and_ranges() -> None:
    sliced = document(
        """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: ["1", 3.0]}]
"""
    )
    assert [s.sources[0].layers for s in sliced.modules[0].slices] == [(0, 2), (1, 3)]


def test_a_slice_may_have_its_own_base() -> None:
    sliced = document(
        """
merge_method: slerp
base_model: a
parameters: {t: 0.5}
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - base_model: b
    sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
"""
    )
    assert [s.base for s in sliced.modules[0].slices] == [0, 1]


def test_modules_keep_their_names_and_parameters() -> None:
    towers = document(
        """
merge_method: linear
modules:
  encoder: {models: [{model: a}, {model: b}], parameters: {weight: 0.5}}
  default: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}
parameters: {weight: 1}
"""
    )
    assert [module.name for module in towers.modules] == ["encoder", "default"]
    assert towers.modules[0].parameters["weight"].constant == 0.5
    assert towers.modules[1].slices[0].sources[0].layers == (0, 1)


@pytest.mark.parametrize(
    ("written", "name"),
    [("bfloat16", "BF16"), ("torch.float16", "F16"), ("float32", "F32"), ("torch.float64", "F64")],
)
def test_dtypes_may_carry_torchs_prefix(written: str, name: str) -> None:
    read = document(f"{LINEAR}dtype: {written}\nout_dtype: {written}\n")
    assert (read.dtype, read.out_dtype) == (name, name)


def test_what_has_no_value_is_absent() -> None:
    read = document(LINEAR + "base_model:\nparameters: ~\ndtype: null\nslices: []\n")
    assert (read.base_model, dict(read.parameters), read.dtype) == (None, {}, None)


def test_a_seed_may_stand_in_the_recipe() -> None:
    assert document(LINEAR + "seed: 7\n").seed == 7


# --- parameters ---


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("'0.5'", 0.5), ("-2", -2.0), ("0x10", 16.0), ("1_000", 1000.0), (".5", 0.5)],
)
def test_numbers_are_numbers_however_yaml_reads_them(written: str, value: float) -> None:
    assert setting(written).constant == value


@pytest.mark.parametrize(
    ("written", "value"), [("true", True), ("no", False), ("1", True), ("0.0", False), ("'true'", True)]
)
def test_flags(written: str, value: bool) -> None:
    assert setting(written, name="normalize").constant is value


@pytest.mark.parametrize(("written", "value"), [("l2", "l2"), ("none", "none"), ("on", True)])
def test_a_flag_may_be_one_of_its_words(written: str, value: object) -> None:
    assert setting(written, "ties", "rescale").constant == value


def test_drop_rate_is_one_minus_density() -> None:
    text = "merge_method: dare_ties\nbase_model: base\nmodels: [{model: a}]\nparameters: {drop_rate: [0.9, 0.25]}"
    (condition,) = document(text).parameters["density"].conditions
    assert condition.values == (0.1, 0.75)


@pytest.mark.parametrize("name", sorted(KNOWN - {"weight", "normalize"}))
def test_parameters_of_other_methods_are_accepted_and_unused(name: str) -> None:
    assert name not in document(LINEAR + f"parameters: {{{name}: whatever}}").parameters


@pytest.mark.parametrize(
    ("t", "value"), [(0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.75, 0.75), (1.0, 1.0)], ids=lambda v: f"{v:g}"
)
def test_a_gradient_is_linear_between_its_values(t: float, value: float) -> None:
    assert setting("[0, 0.5, 1]").read("any", t) == value


@pytest.mark.parametrize(("t", "value"), [(0.0, "l1"), (0.49, "l1"), (0.5, True), (0.99, True), (1.0, "l2")])
def test_a_gradient_of_words_takes_the_one_at_or_before(t: float, value: object) -> None:
    assert setting("[l1, true, l2]", "ties", "rescale").read("any", t) == value


@given(
    values=st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=6).map(tuple),
    t=st.floats(0.0, 1.0),
)
def test_a_gradient_stays_between_its_values(values: tuple[float, ...], t: float) -> None:
    gradient = Setting(Parameter("weight", float), (Condition(None, values, ""),), "")
    value = gradient.read("any", t)
    assert isinstance(value, float)
    assert min(values) <= value <= max(values)


FILTERS = "[{filter: self_attn, value: [0, 1]}, {filter: mlp, value: [1, 0]}, {value: 0.5}]"


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("model.layers.1.self_attn.q_proj.weight", 0.25),
        ("model.layers.1.mlp.up_proj.weight", 0.75),
        ("model.layers.1.post_attention_layernorm.weight", 0.5),
        ("model.embed_tokens.weight", 0.5),
    ],
    ids=["attention", "mlp", "norm", "embeddings"],
)
def test_the_first_condition_that_matches_counts(tensor: str, value: float) -> None:
    assert setting(FILTERS, "slerp", "t").read(tensor, 0.25) == value


@pytest.mark.parametrize(("tensor", "value"), [("layers.1.x", 2.0), ("layers.19.x", 2.0), ("layers.2.x", None)])
def test_a_filter_is_a_part_of_the_name(tensor: str, value: float | None) -> None:
    assert setting("{filter: layers.1, value: 2}").read(tensor, 0.0) == value


def test_a_star_matches_everything() -> None:
    assert setting("[{filter: '*', value: 3}, {filter: a, value: 4}]").constant == 3.0


def test_a_shared_parameter_under_a_model_is_said_to_have_no_effect() -> None:
    text = LINEAR.replace("      weight: 0.25", "      weight: 0.25\n      normalize: false")
    with pytest.warns(FastmergeWarning, match=r"^recipe.yml:6: models\[0\].parameters.normalize: .* no effect"):
        assert "normalize" not in document(text).modules[0].slices[0].sources[0].parameters


# --- documents as stages ---


def names(text: str) -> list[str | None]:
    return [document.name for document in Recipe.parse(text, "recipe.yml").documents]


def stage(name: str | None, *models: str, method: str = "linear") -> str:
    listed = ", ".join(f"model: {model}" for model in models)
    return (f"name: {name}\n" if name else "") + f"merge_method: {method}\nmodels: [{listed}]\n"


def test_documents_come_in_the_order_of_need() -> None:
    text = "---\n".join([stage(None, "y", "x"), stage("x", "a", "b"), stage("y", "x", "c")])
    assert names(text) == ["x", "y", None]


def test_an_only_document_is_the_result_with_or_without_a_name() -> None:
    assert names(stage("x", "a")) == ["x"]


def test_a_base_model_may_be_a_stage() -> None:
    text = stage("x", "a", "b") + "---\nmerge_method: ties\nbase_model: x\nmodels: [model: a]"
    assert names(text) == ["x", None]
    last = Recipe.parse(text).documents[-1]
    assert last.base_model is not None
    assert last.base_model.path is None


def test_a_stage_called_like_a_word_of_the_schema_changes_no_other_string() -> None:
    text = stage("linear", "a", "b") + "---\n" + stage(None, "linear", "c")
    assert [d.method.name for d in Recipe.parse(text).documents] == ["linear", "linear"]


def test_a_document_that_nothing_needs_is_left_out_with_a_warning() -> None:
    with pytest.warns(FastmergeWarning, match="nothing needs the document 'x'"):
        assert names(stage("x", "a") + "---\n" + stage(None, "b")) == [None]


@pytest.mark.parametrize(
    ("documents", "order"),
    [
        ([stage(None, "a"), stage("x", "y"), stage("y", "b")], ["y", "x", None]),
        ([stage("x", "y"), stage("y", "b")], ["y", "x"]),
        ([stage("x", "a")], ["x"]),
        ([stage(None, "a")], [None]),
    ],
    ids=["not-needed", "all-named", "one-named", "one"],
)
def test_every_document_is_one_to_merge_when_asked_for(documents: Sequence[str], order: Sequence[str | None]) -> None:
    recipe = Recipe.parse("---\n".join(documents), every=True)
    assert [document.name for document in recipe.documents] == order


def test_a_cycle_among_all_documents_is_refused() -> None:
    text = "---\n".join([stage("x", "y"), stage("y", "x")])
    with pytest.raises(RecipeError, match="in a circle: 'x' needs 'y' needs 'x'"):
        Recipe.parse(text, every=True)


def test_empty_documents_do_not_count() -> None:
    assert names("---\n---\n" + stage(None, "a") + "---\n") == [None]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([stage("x", "y"), stage("y", "x"), stage(None, "x")], "'x' needs 'y' needs 'x'"),
        ([stage("x", "x"), stage(None, "a")], "'x' needs 'x'"),
        ([stage("x", "a"), stage("x", "b"), stage(None, "x")], "a document named 'x' is already at recipe.yml:1: name"),
        ([stage(None, "a"), stage(None, "b")], "only one document may go without a name"),
        ([stage("x", "a"), stage("y", "x")], "each document has a name; leave it out of the one that is the"),
    ],
    ids=["cycle", "self", "duplicate-name", "two-results", "no-result"],
)
def test_stages_that_cannot_be(documents: Sequence[str], message: str) -> None:
    assert message in str(refusal("---\n".join(documents)))


# --- YAML itself ---


def test_anchors_and_merge_keys_work() -> None:
    linear = document(
        """
merge_method: linear
models:
  - {model: a, parameters: &half {weight: 0.5}}
  - {model: b, parameters: *half}
  - {model: c, parameters: {<<: *half, density: 1}}
"""
    )
    assert [s.parameters["weight"].constant for s in linear.modules[0].slices[0].sources] == [0.5] * 3


def test_a_merged_key_gives_way_to_one_that_is_written() -> None:
    models = "[{model: a, parameters: &p {weight: 1}}, {model: b, parameters: {<<: *p, weight: 2}}]"
    text = f"merge_method: linear\nmodels: {models}"
    assert [s.parameters["weight"].constant for s in document(text).modules[0].slices[0].sources] == [1.0, 2.0]


def test_of_several_merged_mappings_the_first_counts() -> None:
    text = """
merge_method: linear
models:
  - {model: a, parameters: &one {weight: 1}}
  - {model: b, parameters: &two {weight: 2, density: 1}}
  - {model: c, parameters: {<<: [*one, *two]}}
"""
    assert document(text).modules[0].slices[0].sources[2].parameters["weight"].constant == 1.0


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)

MAPPING_BOMB = "a0: &a0 {b: 1}\n" + "".join(
    f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' for j in range(10))}}}\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yml: the recipe is empty"),
        ("# nothing\n", "recipe.yml: the recipe is empty"),
        ("---\n---\n", "recipe.yml: the recipe is empty"),
        ("merge_method: linear\nmerge_method: ties\n", "recipe.yml:2: the key 'merge_method' is already on line 1"),
        ("merge_method: !!str linear\n", "recipe.yml:1: the YAML tag"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", "recipe.yml:2: the YAML tag"),
        (BOMB, "recipe.yml:6: aliases expand this to more than 1000000 entries"),
        (MAPPING_BOMB, "recipe.yml:7: aliases expand this to more than 1000000 entries"),
        ("a: &x [1, *x]\n", "recipe.yml:1: the alias *x has no anchor before it, or is inside it"),
        ("a: *x\n", "recipe.yml:1: the alias *x has no anchor before it"),
        ("a: " + "[" * 50 + "]" * 50, "recipe.yml:1: this is nested more than 32 deep"),
        ("[" * 100_000, "recipe.yml:1: this is nested more than 32 deep"),
        ("- linear\n", "recipe.yml:1: this must be a mapping (key: value), not a list"),
        ("linear\n", "recipe.yml:1: this must be a mapping (key: value), not 'linear'"),
        ("a: b: c\n", "recipe.yml:1: this is not YAML"),
        ("a: 'b\n", "this is not YAML"),
        ("a: \x1b[31m\n", "this is not YAML"),
        ("? [a]\n: b\n", "recipe.yml:1: a key must be plain text"),
        ("<<: 1\n", "recipe.yml:1: << takes in a mapping"),
        ("a: " + "9" * 5000, "is not a number that can be read"),
        ("#" * 10_000_001, "recipe.yml: the recipe has over 10 MB"),
    ],
    ids=[
        *(
            "empty",
            "comment",
            "empty-documents",
            "duplicate-key",
            "tag",
            "python-tag",
            "bomb",
            "mapping-bomb",
            "self-alias",
        ),
        *("no-anchor", "deep", "very-deep", "list", "scalar", "syntax", "quote", "control-character", "key-not-text"),
        *("merge-scalar", "long-number", "10-MB"),
    ],
)
def test_yaml_that_is_no_recipe(text: str, message: str) -> None:
    assert message in str(refusal(text))


@pytest.mark.parametrize(
    "data",
    [b"\xff\xfe\x00", b"merge_method: \x80"],
    ids=["utf-16", "stray-byte"],
)
def test_files_that_are_not_utf8(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_bytes(data)
    with pytest.raises(RecipeError, match=r"r.yml': it is not UTF-8 text"):
        Recipe.load(tmp_path / "r.yml")


def test_a_file_over_10_mb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_bytes(b"# " * 5_000_001)
    with pytest.raises(RecipeError, match="over 10 MB"):
        Recipe.load(tmp_path / "r.yml")


@pytest.mark.parametrize("name", ["absent.yml", "a"])
def test_files_that_cannot_be_read(name: str) -> None:
    with pytest.raises(RecipeError, match=f"cannot read the recipe '{name}'"):
        Recipe.load(name)


# --- mistakes, each with its place ---

TIES = "merge_method: ties\nbase_model: base\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
SLICES = """\
merge_method: linear
parameters: {weight: 1}
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
      - model: b
        layer_range: [2, 4]
"""


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        (LINEAR + "mdoels: 1\n", ":9: mdoels", "unknown key 'mdoels'; did you mean 'models'?"),
        (LINEAR + "t: 1\n", ":9: t", "unknown key 't'; it is one of"),
        (LINEAR.replace("parameters:", "parameter:", 1), ":4: models[0].parameter", "did you mean 'parameters'?"),
        (LINEAR.replace("weight: 0.75", "wieght: 1"), ":8: models[1].parameters.wieght", "did you mean 'weight'?"),
        (LINEAR + "parameters: {zzz: 1}", ":9: parameters.zzz", "unknown parameter 'zzz'"),
        (SLICES.replace("sources", "source"), ":4: slices[0].source", "did you mean 'sources'?"),
        (
            SLICES.replace("layer_range: [2", "layer_rang: [2"),
            ":8: slices[0].sources[1].layer_rang",
            "did you mean 'layer_range'",
        ),
        ("models: [model: a]", ":1", "merge_method is missing"),
        (
            "merge_method: tise\nmodels: [model: a]",
            ":1: merge_method",
            "unknown merge_method 'tise'; did you mean 'ties'?",
        ),
        ("merge_method: linear\nmodels: [{parameters: {}}]", ":2: models[0]", "model is missing"),
        ("merge_method: linear", ":1", "exactly one of models, slices and modules must be there, not none"),
        ("merge_method: linear\nmodels: []", ":1", "not none"),
        (LINEAR + SLICES.split("\n", 2)[2], ":1", "not models and slices"),
        ("merge_method: linear\nmodules: {x: {}}", ":2: modules.x", "a module has either models or slices"),
        ("merge_method: linear\nmodels: {model: a}", ":2: models", "this must be a list, not a mapping"),
        ("merge_method: linear\nmodels: [a]", ":2: models[0]", "this must be a mapping (key: value), not 'a'"),
        ("merge_method: linear\nmodels: [model: {path: a}]", ":2: models[0].model.path", "unknown key 'path'"),
        (LINEAR + "dtype: bfloat\n", ":9: dtype", "unknown dtype 'bfloat'; did you mean 'bfloat16'?"),
        (LINEAR + "out_dtype: int64\n", ":9: out_dtype", "unknown dtype 'int64'"),
        (LINEAR + "seed: 1.5\n", ":9: seed", "this must be a whole number, not '1.5'"),
    ],
    ids=lambda value: None if "\n" in value else value[:40],
)
def test_mistakes_of_structure(text: str, place: str, message: str) -> None:
    error = refusal(text)
    assert error.place == f"recipe.yml{place}"
    assert message in str(error)


@pytest.mark.parametrize(
    ("written", "method", "name", "message"),
    [
        (".nan", "linear", "weight", "weight must be a finite number, not '.nan'"),
        (".inf", "linear", "weight", "weight must be a finite number, not '.inf'"),
        ("nan", "linear", "weight", "weight must be a finite number, not 'nan'"),
        ("1e999", "linear", "weight", "weight must be a finite number, not '1e999'"),
        ("9" * 400, "linear", "weight", "weight must be a finite number"),
        ("true", "linear", "weight", "weight must be a finite number, not 'true'"),
        ("heavy", "linear", "weight", "weight must be a finite number, not 'heavy'"),
        ("null", "linear", "weight", "weight must be a finite number, not 'null'"),
        ("[]", "linear", "weight", "weight is an empty list"),
        ("[[1]]", "linear", "weight", "weight must be a finite number, not a list"),
        ("{filter: mlp}", "linear", "weight", "a condition needs a value"),
        ("{filter: mlp, valeu: 1}", "linear", "weight", "unknown key 'valeu'; did you mean 'value'?"),
        ("[1, {value: 1}]", "linear", "weight", "this must be a mapping"),
        ("1.5", "ties", "density", "density must be a number from 0 to 1, not '1.5'"),
        ("-0.1", "ties", "density", "density must be a number from 0 to 1, not '-0.1'"),
        ("[0, .nan]", "ties", "density", "density must be a number from 0 to 1, not '.nan'"),
        ("1.01", "dare_ties", "drop_rate", "density must be a number from 0 to 1, not '1.01'"),
        ("2", "linear", "normalize", "normalize must be true or false, not '2'"),
        ("l3", "ties", "rescale", "rescale must be true or false or inverse or l1 or l2 or linf or none, not 'l3'"),
        ("all", "ties", "elect", "elect must be weighted or plain or count, not 'all'"),
        ("true", "ties", "elect", "elect must be weighted or plain or count, not 'true'"),
    ],
)
def test_values_out_of_place(written: str, method: str, name: str, message: str) -> None:
    error = refusal(f"merge_method: {method}\nbase_model: base\nmodels: [model: a]\nparameters:\n  {name}: {written}\n")
    assert error.place is not None
    assert error.place.startswith(f"recipe.yml:5: parameters.{name}")
    assert message in str(error)


def test_drop_rate_and_density_together_are_refused() -> None:
    error = refusal(TIES.replace("{weight: 1}", "{weight: 1, density: 0.5, drop_rate: 0.5}"))
    assert "drop_rate and density are both given" in str(error)
    assert error.place == "recipe.yml:5: models[0].parameters.drop_rate"


def test_a_models_drop_rate_goes_before_the_recipes_density() -> None:
    read = document(TIES.replace("{weight: 1}", "{weight: 1, drop_rate: 0.75}") + "parameters: {density: 1}")
    assert read.modules[0].slices[0].sources[0].parameters["density"].constant == 0.25


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ("[4, 2]", "layer_range [4, 2] is reversed"),
        ("[2, 2]", "layer_range [2, 2] is empty"),
        ("[-1, 1]", "layer_range [-1, 1] is negative"),
        ("[0, 1, 2]", "layer_range is two numbers"),
        ("[0, two]", "this must be a whole number, not 'two'"),
        ("[0, 1.5]", "this must be a whole number, not '1.5'"),
        ("3", "this must be a list, not '3'"),
    ],
)
def test_layer_ranges_that_are_none(bounds: str, message: str) -> None:
    error = refusal(SLICES.replace("[0, 2]", bounds))
    assert error.place is not None
    assert error.place.startswith("recipe.yml:6: slices[0].sources[0].layer_range")
    assert message in str(error)


def test_the_sources_of_a_slice_have_equal_lengths() -> None:
    error = refusal(SLICES.replace("[2, 4]", "[2, 5]"))
    assert error.place == "recipe.yml:7: slices[0].sources[1]"
    assert "layer_range has 3 layers where that of 'a' has 2" in str(error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SLICES.replace("  - sources", "  - residual_weight: 1\n    sources"), "residual_weight has no effect"),
        (SLICES.replace("        layer_range: [2, 4]\n", ""), "layer_range is missing"),
        (LINEAR.replace("  - model: a\n", "  - model: a\n    layer_range: [0, 2]\n"), "models are merged whole"),
        ("merge_method: linear\nslices: [{parameters: {}}]", "a slice needs sources"),
    ],
    ids=["residual_weight", "no-range", "range-in-models", "no-sources"],
)
def test_slices_that_are_none(text: str, message: str) -> None:
    assert message in str(refusal(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b, model: c]",
            "slerp takes exactly two models, got 3",
        ),
        ("merge_method: slerp\nbase_model: a\nmodels: [model: a]", "slerp takes exactly two models, got 1"),
        ("merge_method: passthrough\nmodels: [model: a, model: b]", "passthrough takes exactly one model, got 2"),
        (
            "merge_method: passthrough\nbase_model: base\nmodels: [model: a]",
            "passthrough takes exactly one model, got 2; base_model counts as one",
        ),
        (
            "merge_method: ties\nbase_model: a\nmodels: [model: a]",
            "ties takes at least one model besides the base, got 0",
        ),
        ("merge_method: ties\nmodels: [model: a]", "ties needs base_model"),
        ("merge_method: slerp\nmodels: [model: a, model: b]", "slerp needs base_model"),
        ("merge_method: linear\nmodels: [model: a, model: a]", "the model 'a' is here twice"),
        ("merge_method: ties\nbase_model: base\n" + SLICES.split("\n", 1)[1], "it is one of the sources of each slice"),
        ("merge_method: linear\nslices: [sources: []]", "linear takes at least one model, got 0"),
    ],
    ids=[
        *("slerp-3", "slerp-1", "passthrough-2", "passthrough-base", "ties-0", "ties-no-base", "slerp-no-base"),
        *("twice", "slice-without-base", "empty-slice"),
    ],
)
def test_counts_of_models(text: str, message: str) -> None:
    assert message in str(refusal(text))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/b/c", "there is no file or folder 'a/b/c'"),
        ("org/a..b", "there is no file or folder 'org/a..b'"),
        ("org/a.", "there is no file or folder 'org/a.'"),
        ("org/a@../b", "there is no file or folder 'org/a@../b'"),
        ("org/a@b@c", "there is no file or folder 'org/a@b@c'"),
        ("/nowhere/to/be/found", "there is no file or folder '/nowhere/to/be/found'"),
        ("./nowhere", "there is no file or folder './nowhere'"),
        ('"bad\\e[31mname"', "'bad\\x1b[31mname'"),
        ('"nul\\0name"', "'nul\\x00name'"),
    ],
)
def test_models_that_are_not_there(name: str, message: str) -> None:
    error = refusal(f"merge_method: linear\nmodels:\n  - model: {name}\n")
    assert error.place == "recipe.yml:3: models[0].model"
    assert message in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("name", "id", "revision"),
    [
        ("meta-llama/Llama-3.1_8B", "meta-llama/Llama-3.1_8B", None),
        ("gpt2", "gpt2", None),
        ("org/a@main", "org/a", "main"),
        ("org/a@refs/pr/1", "org/a", "refs/pr/1"),
        ("org/a@fix--it", "org/a", "fix--it"),
    ],
)
def test_what_is_no_folder_is_a_model_on_the_hub(name: str, id: str, revision: str | None) -> None:
    (model,) = document(f"merge_method: linear\nmodels:\n  - model: {name}\n    parameters: {{weight: 1}}\n").models
    assert model == Model(name, None, Repository(id, revision, ""))
    assert model.repository is not None
    assert model.repository.place == "recipe.yml:3: models[0].model"


def test_one_repository_named_twice_is_one_model() -> None:
    text = "merge_method: ties\nbase_model: org/a\nmodels: [model: org/a, model: org/b]\nparameters: {weight: 1}\n"
    assert [model.name for model in document(text).models] == ["org/a", "org/b"]


def test_a_folder_with_a_plus_or_at_in_its_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a+b@c").mkdir()
    assert document("merge_method: linear\nmodels: [model: a+b@c]").models[0].name == "a+b@c"


def test_terminal_escapes_in_keys_are_shown_escaped() -> None:
    error = refusal('merge_method: linear\n"\\e[2J": 1\n')
    assert "\x1b" not in str(error)
    assert "\\x1b[2J" in str(error)


def test_a_sound_recipe_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document(LINEAR)
        document(TIES)
