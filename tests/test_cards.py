"""Model cards: what those of models say, the one of a merge, and that the same bytes can be made again from it."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from safetensors.numpy import save_file

from fastmerge import cli
from fastmerge.cards import Card, Input, card, card_of, read

RECIPE = "merge_method: ties  # the author's words\nmodels: []\n"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def a_model(name: str, matter: str = "", *, id: str = "", commit: str = "c" * 40) -> Input:
    """A model by its name in a recipe; with an `id`, as it lies in the hub's cache."""
    folder = Path("cache", f"models--{id.replace('/', '--')}", "snapshots", commit) if id else Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    if id and not weights.exists():
        blob = folder.parents[1] / "blobs" / ("5a" * 32)
        blob.parent.mkdir()
        blob.write_bytes(b"x" * 1234)
        weights.symlink_to(blob.absolute())
    elif not id:
        weights.write_bytes(b"x" * 1234)
    if matter:
        (folder / "README.md").write_text(f"---\n{matter}\n---\n")
    return Input(name, [weights], is_base=False)


def written(*models: Input, text: str = RECIPE, **facts: Any) -> str:
    given: dict[str, Any] = {
        "method": "ties",
        "paper": "TIES-merging, arXiv:2306.01708",
        "command": "fastmerge merge recipe.yml out --seed 7",
        "version": "1.2.3",
        "title": "out",
    }
    return card(models, text, **given | facts)


def matter_of(text: str) -> Any:
    return yaml.safe_load(text.split("---\n")[1])


# --- what a card says ---

BOMB = "a: &a {k: v}\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 20)}]\n" for before, name in pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "licence", "bases"),
    [
        ("---\nlicense: MIT\nbase_model: x/y\n---\n", "mit", ("x/y",)),
        ("---\r\nlicense: mit\r\n---\r\ntext", "mit", ()),
        ("---\nlicense: [mit, gpl-3.0]\nbase_model: [x, y]\n---", "mit and gpl-3.0", ("x", "y")),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", "llama3", ()),
        ("---\nlicense: other\n---\n", "other", ()),
        ("---\nlicense: {a: 1}\nbase_model: 7\n---\n", "", ()),
        ("# no front matter\nlicense: mit\n", "", ()),
        ("---\nlicense: mit\n", "", ()),
        ("---\n- license: mit\n---\n", "", ()),
        ("---\nlicense: [\n---\n", "", ()),
        ("---\nlicense: !!python/object:os.system x\n---\n", "", ()),
        (f"---\n{BOMB}license: mit\n---\n", "", ()),
        (f"---\nlicense: {'[' * 50_000}\n---\n", "", ()),
        ("", "", ()),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, str) else "",
)
def test_front_matter_is_read_or_passed_over(text: str, licence: str, bases: tuple[str, ...]) -> None:
    said = read(text)
    assert (said.licence, said.bases, said.merged) == (licence, bases, False)


@pytest.mark.parametrize("matter", ["tags: [mergekit, merge]", "base_model_relation: merge"])
def test_a_card_says_whether_its_model_is_a_merge(matter: str) -> None:
    assert read(f"---\n{matter}\nbase_model: [x, y]\n---\n") == Card("", ("x", "y"), merged=True)


def test_a_folder_without_a_card_says_nothing(tmp_path: Path) -> None:
    assert card_of(tmp_path) == Card()
    (tmp_path / "README.md").mkdir()
    assert card_of(tmp_path) == Card()


# --- the card of a merge ---


def test_the_card_says_what_was_merged_and_how() -> None:
    base = a_model("org/base", id="org/base", commit="b" * 40)._replace(is_base=True)
    text = written(base, a_model("org/math@v1", id="org/math"), a_model("./code"))
    assert "\n# out\n" in text
    assert "fastmerge 1.2.3 by `ties` (TIES-merging, arXiv:2306.01708)" in text
    weights = "  - `model.safetensors`, 1,234 bytes"
    assert (
        f"\n- `org/base` (base), commit `{'b' * 40}`\n{weights}, sha256 `{'5a' * 32}`\n"
        f"- `org/math@v1`, commit `{'c' * 40}`\n{weights}, sha256 `{'5a' * 32}`\n- `./code`\n{weights}\n\n"
    ) in text
    assert f"```yaml\n{RECIPE}```\n" in text
    assert "```sh\nfastmerge merge recipe.yml out --seed 7\n```\n" in text


def test_the_front_matter_is_what_the_hub_reads() -> None:
    models = [a_model("org/base", id="org/base"), a_model("org/math@v1", id="org/math"), a_model("gpt2", id="gpt2")]
    assert matter_of(written(*models, library="transformers")) == {
        "base_model": ["org/base", "org/math", "gpt2"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["fastmerge", "merge"],
    }


def test_models_that_are_on_this_disk_alone_are_not_named_to_the_hub() -> None:
    assert matter_of(written(a_model("org/code"), a_model("more"))) == {"tags": ["fastmerge", "merge"]}


def test_a_merge_on_this_disk_stands_for_what_it_was_merged_from() -> None:
    merge = a_model("first", "tags: [merge]\nbase_model: [org/a, org/b, 'x\ny: z']")
    tuned = a_model("tuned", "base_model: org/c")
    assert matter_of(written(merge, tuned, a_model("org/b", id="org/b")))["base_model"] == ["org/a", "org/b"]


def test_the_models_of_a_merge_on_this_disk_are_listed_too() -> None:
    base, tuned = a_model("org/base", id="org/base")._replace(is_base=True), a_model("tuned")
    Path("first").mkdir()
    Path("first/README.md").write_text(written(base, tuned))
    text = written(a_model("first"), tuned)
    lines = [line for line in text.splitlines() if line.startswith("- `")]
    assert lines == ["- `first`", "- `tuned`", f"- `org/base`, commit `{'c' * 40}`"]
    assert text.count("  - `model.safetensors`, 1,234 bytes") == 3
    assert matter_of(text)["base_model"] == ["org/base"]


def test_a_model_and_an_adapter_are_two_commits_of_one_input() -> None:
    files = [*a_model("x", id="org/base", commit="a" * 40).files, *a_model("x", id="org/lora", commit="b" * 40).files]
    text = written(Input("org/base+org/lora", files, is_base=False))
    assert f"`org/base+org/lora`, commit `{'a' * 40}` of `org/base`, commit `{'b' * 40}` of `org/lora`\n" in text
    assert matter_of(text)["base_model"] == ["org/base", "org/lora"]


OTHER = "license: other\nlicense_name: Llama 3.1\nlicense_link: 'https://example.org/#x: y'"


@pytest.mark.parametrize(
    ("one", "two", "terms"),
    [
        ("license: apache-2.0", "license: apache-2.0", {"license": "apache-2.0"}),
        (OTHER, OTHER, yaml.safe_load(OTHER)),
        ("license: apache-2.0", "license: mit", {}),
        (OTHER, OTHER.replace("3.1", "3.2"), {}),
        ("license: mit", "", {}),
        ("license: [mit, x]", "license: [mit, x]", {}),
        ("license_name: x", "license_name: x", {}),
    ],
    ids=["same", "same-other", "different", "different-names", "unknown", "several", "no-licence"],
)
def test_the_licence_is_that_of_all_inputs_where_they_agree(one: str, two: str, terms: dict[str, str]) -> None:
    said = matter_of(written(a_model("one", one), a_model("two", two)))
    assert {key: value for key, value in said.items() if key.startswith("license")} == terms


def test_a_model_of_two_documents_is_listed_once() -> None:
    model, first = a_model("org/math", id="org/math"), Input("first", (), is_base=False)
    text = written(first, model, model)
    assert text.count("- `org/math`") == 1
    assert "\n- `first`\n- `org/math`, " in text


def test_how_to_pin_what_the_recipe_does_not() -> None:
    models = [a_model("org/base", id="org/base", commit="b" * 40), a_model("org/math", id="org/math")]
    assert written(*models, text="model: org/base@" + "b" * 40).endswith(
        f"Where a model has changed since, write it there as `org/math@{'c' * 40}`."
    )
    assert "has changed since" not in written(a_model("code"))


def test_a_method_without_a_paper_cites_none() -> None:
    assert "by `passthrough`.\n" in written(method="passthrough", paper="-")


def test_a_recipe_cannot_break_out_of_its_block() -> None:
    text = "a: |\n  ````\n  # fake\n"
    assert f"`````yaml\n{text}`````\n" in written(text=text)


# --- the same again ---

LINEAR = "merge_method: linear  # the ```author's``` words\nmodels: [model: a, model: b]\nparameters: {weight: 1}\n"
DARE = "merge_method: dare_ties\nbase_model: c\nmodels: [model: a, model: b]\nparameters: {weight: 1, density: 0.5}\n"
STAGED = f"name: first\n{DARE}---\nmerge_method: linear\nmodels: [model: first, model: b]\nparameters: {{weight: 1}}\n"
NAMED = STAGED.replace("---\n", "---\nname: second\n")


@pytest.fixture
def _models() -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "broken"):
        Path(name).mkdir()
        tensors = {f"layers.{n}.w": rng.standard_normal((8, 16)).astype(np.float32) for n in range(4)}
        tensors["layers.0.w"][0, 0] = np.nan if name == "broken" else 0
        save_file(tensors, Path(name, "model.safetensors"))
        for file in ("config.json", "tokenizer.json"):
            Path(name, file).write_text('{"model_type": "llama"}')


def fastmerge(*arguments: str) -> None:
    ended = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output


@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize(
    ("text", "arguments", "outputs"),
    [
        (LINEAR, "merge recipe.yml out", ["out"]),
        (LINEAR, "yaml recipe.yml 'my out'", ["my out"]),
        (LINEAR, "merge recipe.yml deep/out --no-copy-tokenizer", ["deep/out"]),
        (LINEAR.replace("a,", "broken,"), "merge recipe.yml out --nonfinite propagate", ["out"]),
        (DARE, "merge recipe.yml out --seed 7 --shard-size 1KB", ["out"]),
        (DARE, "yaml recipe.yml out --random-seed 7 --out-shard-size 1k", ["out"]),
        (DARE, "merge recipe.yml out --seed 5 --vary lambda=0.2,0.4", ["out/lambda=0.2", "out/lambda=0.4"]),
        (STAGED, "merge recipe.yml out --seed 3", ["out"]),
        (STAGED, "multi recipe.yml --out-path out --random-seed 3", ["out"]),
        (STAGED, "multi recipe.yml --out-path out -I kept --random-seed 3", ["kept/first", "out"]),
        (NAMED, "multi recipe.yml -I kept --random-seed 3 --out-shard-size 1k", ["kept/first", "kept/second"]),
    ],
    ids=["plain", "space", "no-tokenizer", "nan", "seed", "mergekit", "vary", "stages", "multi", "kept", "all-named"],
)
def test_the_card_is_enough_to_make_the_same_bytes(text: str, arguments: str, outputs: list[str]) -> None:
    Path("recipe.yml").write_text(text)
    fastmerge(*shlex.split(arguments))
    for number, output in enumerate(outputs):
        told = Path(output, "README.md").read_text()
        recipe = re.search(r"(?s)\n(````*)yaml\n(.*?)\1\n", told)
        command = re.search(r"\n```sh\nfastmerge (.*)\n```\n", told + "\n")
        assert recipe
        assert command
        again = Path(f"again-{number}")
        again.mkdir()
        for model in ("a", "b", "c", "broken"):
            Path(again, model).symlink_to(Path(model).absolute())
        (again / "mergekit_config.yml").write_text(recipe[2])
        with pytest.MonkeyPatch.context() as here:
            here.chdir(again)
            fastmerge(*shlex.split(command[1]))
        (made,) = (place for place in again.glob(f"**/{Path(output).name}") if place.is_dir())
        before, after = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (Path(output), made))
        if output == "out" and "-I" in arguments:  # the model between is on disk for the one, and not for the other
            for name in ("README.md", "fastmerge.json"):
                assert before.pop(name) != after.pop(name)
        assert before == after
