"""What SECURITY.md promises: each threat has a test, and what files hold is never run, followed or taken for markup."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from safetensors.numpy import load_file, save_file
from test_bad_inputs import command, pair
from test_lora import CONFIG as ADAPTER

from fastmerge import CheckpointError, FastmergeError, FastmergeWarning, OutputError, cards, lora, merge
from fastmerge.checkpoint import STAGES, Writer, lay_out, open_checkpoint
from fastmerge.checkpoint.header import LONGEST_JSON
from fastmerge.recipe import Recipe, repository
from fastmerge.sources.adapter import open_adapter
from fastmerge.vocabulary.files import open_tokenizer

ROOT = Path(__file__).parents[1]
SOURCES = sorted(file for folder in ("fastmerge", "kernels") for file in (ROOT / folder).rglob("*.py"))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- the page ---


def threats() -> list[tuple[str, list[str]]]:
    """The rows of the table, and the tests in their last cell."""
    lines = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]
    rows = [line.strip("| ").split(" | ") for line in lines[2:]]
    return [(row[0], re.findall(r"`(\w+\.py::\w+)`", row[-1])) for row in rows]


@pytest.mark.parametrize(("threat", "tests"), [pytest.param(*row, id=row[0]) for row in threats()])
def test_each_threat_has_tests_that_exist(threat: str, tests: list[str]) -> None:
    assert tests, threat
    for test in tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, test


def test_the_page_has_its_parts() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    for heading in ("## What is promised", "## What is not", "## Versions", "## Reporting", "## Threats"):
        assert f"\n{heading}\n" in text
    assert len(threats()) >= 15


# --- what the source never does ---

_MODULES = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"),
    *("subprocess", "multiprocessing", "pty", "runpy", "code", "imp", "jinja2"),
}
_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
_OF_OS = re.compile(r"system|popen|exec\w+|spawn\w+|posix_spawn\w*|fork\w*|startfile")
_KEYWORDS = {"trust_remote_code": None, "shell": False, "allow_pickle": False, "weights_only": True}


def dangers(source: str) -> Iterator[str]:
    """The names of what runs, or may run, something that it was given."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in _MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (part for part in parts if part.partition(".")[0] in _MODULES or _reaches(*part.rsplit(".", 1)))
        elif (
            isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and _reaches(node.value.id, node.attr)
        ):
            yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call):
            yield from _called(node)


def _reaches(module: str, name: str) -> bool:
    if module == "yaml":
        return bool(re.search("load|Constructor", name)) or (name.endswith("Loader") and "Safe" not in name)
    return module == "os" and bool(_OF_OS.fullmatch(name))


def _called(node: ast.Call) -> Iterator[str]:
    called = node.func
    name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
    owner = called.value.id if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) else ""
    given = {keyword.arg: getattr(keyword.value, "value", ...) for keyword in node.keywords if keyword.arg}
    if isinstance(called, ast.Name) and name in _CALLS:
        yield name
    if (owner, name) == ("torch", "load") and given.get("weights_only") is not True:
        yield "torch.load"
    if owner in ("np", "numpy") and name == "load" and given.get("allow_pickle", False) is not False:
        yield "numpy.load"
    yield from (key for key, sound in _KEYWORDS.items() if key in given and given[key] is not sound)
    if name == "import_module" and not _fixed(node.args[0]):
        yield "import_module"
    if name in ("CDLL", "PyDLL", "LoadLibrary") and not _loaded(node.args[0]):
        yield name


def _loaded(library: ast.expr) -> bool:
    """Whether a library is the process itself, or a module that was imported."""
    return getattr(library, "value", ...) is None or getattr(library, "attr", "") == "__file__"


def _fixed(name: ast.expr) -> bool:
    """Whether a module's name is written in the source, or is one of our own."""
    if isinstance(name, ast.IfExp):
        return _fixed(name.body) and _fixed(name.orelse)
    first = name.values[0] if isinstance(name, ast.JoinedStr) and name.values else name
    return isinstance(first, ast.Constant) and (first is name or str(first.value).startswith("."))


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(ROOT)) for file in SOURCES])
def test_nothing_that_is_read_is_run(file: Path) -> None:
    allowed = {"yaml.constructor"} if file.name == "marked.py" else set()  # SafeConstructor, for plain scalars
    assert set(dangers(file.read_text())) <= allowed


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("import pickle", "pickle"),
        ("from subprocess import run", "subprocess.run"),
        ("from os import system", "os.system"),
        ("import os\nos.popen('x')", "os.popen"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "weights_only"),
        ("np.load(path, allow_pickle=True)", "numpy.load"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml.load"),
        ("yaml.parse(text, Loader=yaml.FullLoader)", "yaml.FullLoader"),
        ("from yaml import unsafe_load", "yaml.unsafe_load"),
        ("AutoModel.from_pretrained(path, trust_remote_code=True)", "trust_remote_code"),
        ("run(command, shell=True)", "shell"),
        ("eval(text)", "eval"),
        ("import_module(config['auto_map'])", "import_module"),
        ("import_module(f'{name}.x')", "import_module"),
        ("ctypes.CDLL(path)", "CDLL"),
    ],
)
def test_what_runs_what_it_is_given_is_seen(source: str, danger: str) -> None:
    assert danger in set(dangers(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "re.compile(x)",
        "import_module('kvikio')",
        "yaml.SafeLoader",
        "memory.load()",
    ],
)
def test_what_does_not_is_let_through(source: str) -> None:
    assert not set(dangers(source))


# --- code, templates and other texts of a model ---

LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n"


def save(name: str, tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder = Path(name)
    folder.mkdir()
    values = np.random.default_rng(len(name)).standard_normal((6, 8)).astype(np.float32)
    save_file(tensors or {"layers.0.up.weight": values}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def test_code_of_a_model_is_neither_run_nor_copied() -> None:
    for name in ("a", "b"):
        folder = save(name, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
        (folder / "modeling_evil.py").write_text("open('ran', 'w')")
        (folder / "config.py").write_text("open('ran', 'w')")
    with pytest.warns(FastmergeWarning, match="code of its own, which is neither run nor copied"):
        merge(Recipe.parse(LINEAR), "out")
    assert not Path("ran").exists()
    assert not list(Path("out").glob("*.py"))


def test_a_template_is_copied_and_never_rendered() -> None:
    evil = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    for name in ("a", "b"):
        folder = save(name)
        (folder / "chat_template.jinja").write_text(evil)
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": evil}))
        (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"x": 0}, "merges": []}}')
    merge(Recipe.parse(f"{LINEAR}chat_template: auto\n"), "out")
    assert Path("out/chat_template.jinja").read_text() == evil
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_beside_the_weights_are_read_up_to_a_limit(name: str) -> None:
    folder = save("a")
    (folder / name).touch()
    os.truncate(folder / name, LONGEST_JSON + 1)
    with pytest.raises(CheckpointError, match=rf"a/{name} has 100000001 bytes, more than the 100000000 that are read"):
        open_checkpoint(folder)


def test_what_is_copied_is_copied_up_to_a_limit() -> None:
    for name in ("a", "b"):
        save(name)
    with open("a/tokenizer.json", "wb") as file:
        file.truncate(LONGEST_JSON + 1)
    with pytest.warns(FastmergeWarning, match=r"a/tokenizer\.json has 100000001 bytes, more than the 100000000"):
        merge(Recipe.parse(LINEAR), "out")
    assert not Path("out/tokenizer.json").exists()


def test_a_config_of_an_adapter_is_read_up_to_a_limit() -> None:
    folder = adapter("adapter", "layers.0.up")
    os.truncate(folder / "adapter_config.json", LONGEST_JSON + 1)
    with pytest.raises(CheckpointError, match="has 100000001 bytes"):
        open_adapter(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"model": ' * 100_000,
        b'{"model": {"type": "BPE", "vocab": {"x": %s}, "merges": []}}' % (b"9" * 5000),
        b'{"model": {"type": "BPE", "vocab": {"x": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": [["x"]], "merges": [["x"]]}}',
        b"\xff",
    ],
    ids=["deep", "deep-objects", "a-long-number", "a-negative-id", "pairs", "no-text"],
)
def test_a_tokenizer_that_is_none_is_an_error(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"the tokenizer\.json of 'a' cannot be read"):
        open_tokenizer("a", {"tokenizer.json": data})


def test_a_number_without_an_end_in_a_sentencepiece_model_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="a number in it has no end"):
        open_tokenizer("a", {"tokenizer.model": b"\x80" * 1_000_000 + b"\x01"})


@pytest.mark.parametrize(
    ("key", "value"),
    [("modules_to_save", 5), ("modules_to_save", [5]), ("task_type", ["x"]), ("revision", {"a": 1})],
)
def test_an_adapter_that_says_something_else_is_an_error(key: str, value: Any) -> None:
    folder = adapter("adapter", "layers.0.up", **{key: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {key} is"):
        lora.combine([folder, folder], "out")


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../b", "a/b/c", "/etc/passwd", "a/b@../../refs", "a/b@/etc", "a/b@x\ny", "a--b/c", "a/b@", "~/x"],
)
def test_what_is_no_id_never_reaches_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("fastmerge.planner.snapshot", ask)
    monkeypatch.setattr("fastmerge.lora.combining.snapshot", ask)
    assert repository(name) is None
    with pytest.raises(FastmergeError):
        lora.combine([name, name], "out")
    with pytest.raises(FastmergeError):
        lora.fuse(name, name, "out")


# --- where is written ---

OUTPUTS = [("a", "F32", (4,)), ("b", "F32", (4,))]


def begun(out: Path) -> None:
    """An output that was stopped when one tensor of two was whole."""
    with suppress(KeyboardInterrupt), writer(out) as files:
        descriptor, offset = files.target("a")
        os.pwrite(descriptor, bytes(16), offset)
        files.record([("a", 0, None)], {})
        files.settle()
        raise KeyboardInterrupt
    assert (out / ".fastmerge-journal").exists()


def writer(out: Path) -> Writer:
    return Writer(out, lay_out(OUTPUTS, 1 << 30), inputs=(), overwrite=True, plan={"recipe": "x"})


def ended(out: Path) -> None:
    """The same output, to its end."""
    with writer(out) as files:
        for name, _, _ in OUTPUTS:
            descriptor, offset = files.target(name)
            os.pwrite(descriptor, np.ones(4, np.float32).tobytes(), offset)
            files.record([(name, 0, None)], {})
        stage = out / STAGES / "0"
        stage.mkdir(parents=True, exist_ok=True)
        (stage / "weights").write_bytes(b"of a stage")
        files.commit({"config.json": b"{}"})
    assert {name: each.tolist() for name, each in load_file(out / "model.safetensors").items()} == {
        "a": [1.0] * 4,
        "b": [1.0] * 4,
    }


LOCK = ".fastmerge-lock"
HIDDEN = (LOCK, *(f".fastmerge-{name}" for name in ("model.safetensors.part", "config.json.part", "commit", "journal")))


@pytest.mark.parametrize("put", [os.link, os.symlink], ids=["hard link", "link"])
@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "new"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", *HIDDEN])
def test_what_a_file_of_the_output_links_to_stays(
    tmp_path: Path, name: str, put: Callable[[Path, Path], None], resumed: bool
) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    if resumed and name != ".fastmerge-journal":  # without which nothing is
        begun(out)
    out.mkdir(exist_ok=True)
    shutil.copyfile(out / name if (out / name).exists() else __file__, victim)
    before = victim.read_bytes()
    (out / name).unlink(missing_ok=True)
    put(victim, out / name)
    try:
        ended(out)
    except OutputError:
        assert name == LOCK  # which is told, and goes away by hand
    assert victim.read_bytes() == before


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "new"])
@pytest.mark.parametrize("place", [STAGES, f"{STAGES}/0", f"{STAGES}/0/weights"])
def test_what_a_folder_of_the_output_links_to_stays(tmp_path: Path, place: str, resumed: bool) -> None:
    out, victim = tmp_path / "out", tmp_path / "victim"
    if resumed:
        begun(out)
    (victim / "0").mkdir(parents=True)
    (victim / "0" / "weights").write_bytes(b"mine")
    (victim / "weights").write_bytes(b"mine")
    link = out / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim / "weights" if place.endswith("weights") else victim)
    ended(out)
    assert {path.read_bytes() for path in victim.rglob("weights")} == {b"mine"}


@pytest.mark.parametrize("name", ["../b", "..", "/tmp/b", "a/b", ".", "a\nb", ""])
def test_a_document_cannot_name_a_folder_elsewhere(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("a", "b"):
        save(model)
    first, second = f"name: {json.dumps(name)}\n{LINEAR}", f"name: last\n{LINEAR}"
    Path("recipe.yml").write_text(f"{first}---\n{second}")
    before = sorted(Path().rglob("*"))
    code = command("multi", "recipe.yml", "--intermediate-dir", "between")
    assert code == 2, capsys.readouterr()
    assert sorted(Path().rglob("*")) == before


# --- names are shown, and nothing else ---

#: What would steer a terminal, forge a line, be markup of Rich, or of Markdown and HTML.
EVIL = "x[red]\x1b[31m\x9b2J\x07\u202e\r\nerror: forged\n\n# forged\n``` ` <b>[y](http:z) `z"
MODULE = "layers.0." + EVIL.replace("\n", "").replace("\r", "")


def adapter(name: str, module: str, **config: Any) -> Path:
    folder = Path(name)
    folder.mkdir()
    save_file(pair(module), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**ADAPTER, **config}))
    return folder


#: Exit codes of commands over models whose names are all evil; a capital letter is such a name.
COMMANDS = {
    "merge R.yml O": 0,
    "merge staged.yml O": 0,
    "merge R.yml O --nonfinite propagate": 0,
    "merge R.yml O --shard-size 100": 0,
    "merge nan.yml O": 2,
    "merge R.yml A": 2,
    "merge absent.yml O": 2,
    "merge broken.yml O": 2,
    "merge misfit.yml O": 2,
    "merge key.yml O": 2,
    "merge X O": 2,
    "yaml R.yml O": 0,
    "multi staged.yml --out-path O": 0,
    "plan R.yml": 0,
    "plan staged.yml": 0,
    "plan R.yml --json": 0,
    "check misfit.yml": 1,
    "check adapted.yml": 0,
    "check misfit.yml --json": 1,
    "verify V": 0,
    "verify V --recompute 9": 0,
    "verify W": 1,
    "verify W --json": 1,
    "verify A": 2,
    "diff A B --base C": 0,
    "diff A N": 0,
    "diff A N --json": 0,
    "diff A D": 2,
    "lora fuse A L O": 0,
    "lora fuse N L O": 2,
    "lora combine L M O": 0,
    "lora combine L K O": 2,
    "lora combine L A O": 2,
    "lora extract A B O --rank 1": 0,
    "lora extract A N O --rank 1": 2,
}


def evil(word: str) -> str:
    return word + EVIL if re.fullmatch("[A-Z]", word) else word


@pytest.fixture
def _evil_models() -> None:
    """Models A, B and C, N that is another, I of infinities, D that is broken; adapters L, M and K; merges V and W."""
    rng = np.random.default_rng(0)
    shapes = {f"{MODULE}.weight": (6, 8), f"layers.0.{EVIL}.weight": (3,)}
    for letter in "ABC":
        save(evil(letter), {tensor: rng.standard_normal(shape, np.float32) for tensor, shape in shapes.items()})
    save(evil("N"), {f"{MODULE}.weight": np.zeros((5, 8), np.float32), f"other{EVIL}": np.ones(2, np.float32)})
    values = load_file(Path(evil("A"), "model.safetensors"))
    save(evil("I"), {tensor: each * np.inf for tensor, each in values.items()})
    Path(save(evil("D")), "model.safetensors").write_bytes(b"short")
    for letter, factor in (("L", 1), ("M", 2), ("K", np.nan)):
        folder = adapter(evil(letter), MODULE, base_model_name_or_path=f"org/{EVIL}")
        weights = {tensor: each * np.float32(factor) for tensor, each in pair(MODULE).items()}
        save_file(weights, folder / "adapter_model.safetensors")

    def linear(*models: str, **more: Any) -> dict[str, Any]:
        listed = [{"model": model} for model in models]
        return {"merge_method": "linear", "parameters": {"weight": 0.5}, "models": listed, **more}

    a, b, n, i, d = map(evil, "ABNID")
    recipes = {
        "R": [linear(a, b)],
        "staged": [linear(a, b, name=EVIL.replace("\n", "").replace("\r", "")), linear(MODULE[9:], b)],
        "nan": [linear(a, i)],
        "absent": [linear(f"./absent{EVIL}", b)],
        "broken": [linear(a, d)],
        "misfit": [linear(a, n)],
        "key": [linear(a, b, **{EVIL: 1})],
        "adapted": [{"merge_method": "passthrough", "models": [{"model": {"model": a, "lora": evil("L")}}]}],
    }
    for name, documents in recipes.items():
        Path(f"{name}.yml").write_text("---\n".join(f"{json.dumps(document)}\n" for document in documents))
    for letter in "VW":
        merge("R.yml", evil(letter))
    with open(Path(evil("W"), "model.safetensors"), "r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"other")


@pytest.mark.filterwarnings("ignore::fastmerge.FastmergeWarning")
@pytest.mark.usefixtures("_evil_models")
@pytest.mark.parametrize("line", COMMANDS)
def test_evil_names_are_shown_as_they_are(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_, **__: False)
    code = command(*map(evil, line.split()))
    said = re.sub(r"\x1b\[(?:3[13]|0)m", "", "".join(capsys.readouterr()))  # without the colours of errors and warnings
    assert code == COMMANDS[line], said
    assert not [c for c in said if not (c.isprintable() or c == "\n")], ascii(said)
    assert not re.search("(?m)^(error: forged|# forged)", said), said
    assert "x[red]" in said


def rendered(folder: Path) -> str:
    """The HTML of a card, and that its front matter says what a card of ours may."""
    _, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    keys = {"base_model", "base_model_relation", "library_name", "license", "tags"}
    assert yaml.safe_load(matter).keys() <= keys
    return MarkdownIt().render(text)


@pytest.mark.filterwarnings("ignore::fastmerge.FastmergeWarning")
@pytest.mark.usefixtures("_evil_models")
@pytest.mark.parametrize(
    "line", [line for line, code in COMMANDS.items() if line.split()[0] in ("merge", "lora") and not code]
)
def test_a_card_shows_evil_names_as_code(line: str) -> None:
    command(*map(evil, line.split()))
    html = rendered(Path(evil("O")))
    assert html.count("<h1>") == 1
    assert "x[red]" in re.sub("<pre>.*?</pre>", "", html, flags=re.DOTALL), "named outside of the recipe"
    assert not re.search("<b>|<a |<h1>forged", html), html
    assert not [c for c in re.sub("<pre>.*?</pre>", "", html, flags=re.DOTALL) if not (c.isprintable() or c == "\n")]


@pytest.mark.parametrize(
    "character", ["\x7f", "\x85", "\x9b", "\u2028", "\ufeff", "\uffff", "\U0001f600", "`", "'", '"', "\\", "\t"]
)
def test_a_folder_of_any_name_is_fused(character: str) -> None:
    save(f"a{character}b", {"layers.0.up.weight": np.zeros((6, 8), np.float32)})
    adapter("adapter", "layers.0.up")
    lora.fuse(f"a{character}b", "adapter", "out")
    assert load_file("out/model.safetensors")["layers.0.up.weight"].any()


CARD = """\
---
tags:
- fastmerge
- merge
---
# A merge

## Models

- `org/one` (base), commit `0a` of `org/one`
  - `model.safetensors`, 1,234 bytes, sha256 `00`
- `two` ![seen](http://example.org/seen.png)
- `` th`ree ``
  - `model.safetensors`, 9 bytes
- `four`
  - `x`, 1 bytes <script>
- `five` <b>

## Recipe

```yaml
```
"""


def test_a_card_takes_over_nothing_but_models() -> None:
    one, *others = cards.read(CARD).models
    assert one == "- `org/one` (base), commit `0a` of `org/one`\n  - `model.safetensors`, 1,234 bytes, sha256 `00`"
    assert others == ["- `` th`ree ``\n  - `model.safetensors`, 9 bytes"]


def test_a_card_without_an_end_is_read_at_once() -> None:
    assert cards.read("---\ntags: [fastmerge]\n---\n" + "\n## Models\n\n" * 8000).models == ()


def test_a_folder_that_looks_like_the_cache_brings_nothing_into_the_front_matter() -> None:
    place = Path("models--x\nlicense: mit\n", "snapshots")
    place.mkdir(parents=True)
    folders = [save(str(place / "1")), save("b")]
    listed = [cards.Input(folder.name, [folder / "model.safetensors"], False) for folder in folders]
    said = cards.card(listed, "", method="linear", paper="", command="", version="0", title="out")
    assert yaml.safe_load(said.split("---\n")[1]) == {"tags": ["fastmerge", "merge"]}
