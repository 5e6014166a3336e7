"""The code of the README, the docs and the bench's pages: every block runs, on tiny models that the text names."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from markdown_it import MarkdownIt
from safetensors.torch import load_file
from test_examples import CHATML, write_family
from test_lora import pair, save_adapter

import fastmerge

ROOT = Path(__file__).parents[1]
MODELS = ("base", "code", "maths", "prose", "tuned")
ADAPTERS = ("adapter", "a", "b", "lora-code", "lora-maths")

#: Commands that are not run, and why.
NOT_RUN = {
    r"pip install ": "changes the environment",
    r"fastmerge .*--cuda": "needs a GPU",
    r"python -m fastmerge\.integrations\.mergekit ": "needs mergekit beside fastmerge; test_integrations.py runs it",
    r"python bench/": "takes minutes, and some of them write into the repository",
}
#: Indented blocks that are no commands, by how they begin.
SHOWN = {
    "recipe.yml -> Recipe -> Plan": "a picture",
    "op     method": "a table as the bench printed it",
    "AssertionError: mine.py": "what the bench says of a wrong provider, which test_bench.py holds",
}
#: Pages whose code is that of packages, and all of their blocks: test_plugins.py installs and runs them.
PACKAGES = {
    "docs/write-a-method.md": ["toml", "python", "yaml", "python"],
    "docs/write-a-provider.md": ["python", "toml", "bash"],
}
#: Names that the Python of a page takes as given.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": lambda: {
        **{name: torch.randn(8, 8) for name in ("base", "code", "maths")},
        **{f"{name}_states": load_file(f"{name}/model.safetensors") for name in ("base", "code", "maths")},
        **{name: load_file(f"{model}/model.safetensors") for name, model in (("one", "code"), ("other", "maths"))},
        "model": transformers.AutoModelForCausalLM.from_pretrained("base"),
    },
}


class Block(NamedTuple):
    kind: str  # the word after the fence, or "indented"
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block"):
            kind = token.info.strip().split(" ")[0] if token.type == "fence" else "indented"
            yield Block(kind, token.content, token.map[0] + 1)


PAGES = {
    str(file.relative_to(ROOT)): found
    for folder in (".", "docs", "bench", "bench/page")
    for file in sorted(ROOT.joinpath(folder).glob("*.md"))
    if (found := list(blocks(file.read_text())))
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    write_family(place, (*MODELS, CHATML), transformers.LlamaConfig, 8)
    (place / CHATML).rename(place / "chat")
    for number, name in enumerate(ADAPTERS, 1):
        tensors = pair("model.layers.0.self_attn.q_proj", 16, 16, rank=1 + number % 2)
        save_adapter({key: tensor / number for key, tensor in tensors.items()}, place / name, r=1 + number % 2)
    return place


@pytest.fixture
def reader(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """In a folder that has the models; it goes again, for the quick start writes a gigabyte."""
    folder = tmp_path / "here"
    shutil.copytree(models, folder)
    (folder / "bench").symlink_to(ROOT / "bench")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "80")
    fastmerge.merge(fastmerge.Recipe.parse("merge_method: uniform_soup\nmodels: [model: code, model: maths]\n"), "mine")
    yield Reader()
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(folder)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in PACKAGES])
def test_every_block_of_a_page_runs(page: str, reader: Reader) -> None:
    reader.names |= GIVEN.get(page, dict)()
    for block in PAGES[page]:
        with at(f"{page}:{block.line}"):
            reader.read(block)


@pytest.mark.parametrize("page", PACKAGES)
def test_a_page_of_packages_has_the_blocks_that_are_run_elsewhere(page: str) -> None:
    assert [block.kind for block in PAGES[page]] == PACKAGES[page]


@contextmanager
def at(place: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{place}: {error}") from error


WRONG = {
    "Python that raises": ("```python\nfastmerge.merged('recipe.yml', 'out')\n```", "no attribute 'merged'"),
    "a recipe without a weight": ("```yaml\nmerge_method: linear\nmodels: [model: code]\n```", "weight"),
    "a model that is not there": ("```yaml\nmerge_method: passthrough\nmodels: [model: nobody]\n```", "nobody"),
    "an option that is not there": ("```sh\nfastmerge info --all\n```", "No such option"),
    "a command that is not there": ("    fastmerge fuse base adapter out\n", "No such command"),
    "a program that is not there": ("```sh\nslowmerge recipe.yml out\n```", "slowmerge: nobody knows"),
    "a door that is not there": ("```sh\nmake coffee\n```", "coffee"),
    "a bench that is not there": ("```sh\npytest bench --op brew\n```", "brew"),
    "an error that is not shown": (
        "```console\n$ fastmerge check absent.yml\nall is well\n```",
        "cannot read the recipe",
    ),
    "an error that is only shown": ("```console\n$ fastmerge --version\nerror: none\n```", "ended with 0"),
    "another output": ("```console\n$ fastmerge --version\n1.0\n```", "the page shows"),
    "a fence without a word": ("```\nfastmerge info\n```", "a block of no kind"),
    "a language that is not run": ("```perl\nprint 1\n```", "a block of no kind"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_block_fails(reader: Reader, text: str, message: str) -> None:
    (block,) = blocks(text)
    with pytest.raises((AssertionError, AttributeError, fastmerge.FastmergeError), match=message):
        reader.read(block)


def test_every_exception_is_needed() -> None:
    texts = [block.text for found in PAGES.values() for block in found]
    assert all(any(re.search(f"^{pattern}", text, re.MULTILINE) for text in texts) for pattern in NOT_RUN)
    assert all(any(text.startswith(beginning) for text in texts) for beginning in SHOWN)


class Reader:
    """Does what the blocks of a page say, one after another, in the current folder."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"fastmerge": fastmerge}

    def read(self, block: Block) -> None:
        if block.kind == "indented" and block.text.startswith(tuple(SHOWN)):
            return
        self.anew()
        if block.kind == "python":
            exec(compile(block.text, "block", "exec"), self.names)
        elif block.kind == "yaml":
            self.recipe(block.text)
        elif block.kind in ("sh", "console", "indented"):
            self.commands(block.text)
        else:  # those in braces are the site's own, which `make docs` reads
            assert block.kind.startswith("{"), f"{block.kind or 'unnamed'}: a block of no kind that is tested"

    def anew(self) -> None:
        """Commands that write the same folder are alternatives to one another."""
        for folder in ("out", "merged"):
            shutil.rmtree(folder, ignore_errors=True)

    def recipe(self, text: str) -> None:
        """Merged, and left for the commands after it."""
        recipe = Path("stages.yml" if "\n---\n" in text else "recipe.yml")
        recipe.write_text(text)
        fastmerge.merge(recipe, "out")

    def commands(self, text: str) -> None:
        """Lines that stand alone, then prompts with what is shown below them."""
        alone, *prompts = re.split(r"^\$ ", text, flags=re.MULTILINE)
        for line in alone.splitlines():
            self.anew()
            self.command(line)
        for prompt in prompts:
            line, _, shown = prompt.partition("\n")
            self.command(line, shown.rstrip() + "\n")

    def command(self, line: str, shown: str = "") -> None:
        words = shlex.split(line, comments=True)
        if not words or any(re.match(pattern, " ".join(words)) for pattern in NOT_RUN):
            return
        if words[0] == "cat":
            Path(words[1]).write_text(shown)
            return
        settings = dict(word.split("=", 1) for word in takewhile(re.compile(r"[A-Z_]+=").match, words))
        program, *arguments = words[len(settings) :]
        assert program in PROGRAMS, f"{program}: nobody knows this command here"
        ended = subprocess.run(
            [*PROGRAMS[program], *arguments],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        expected = 2 if re.search(r"^error: ", shown, re.MULTILINE) else 0
        assert ended.returncode == expected, f"{line.strip()} ended with {ended.returncode}:\n{ended.stdout}"
        assert not shown.strip() or like(shown).fullmatch(ended.stdout), (
            f"{line.strip()} prints\n{ended.stdout}and the page shows\n{shown}"
        )


#: Doors of the Makefile and benches are looked up alone: which they are, and whether they would begin.
PROGRAMS = {
    "fastmerge": [str(Path(sys.executable).with_name("fastmerge"))],
    "python": [sys.executable],
    "make": ["make", "--dry-run", "--directory", str(ROOT)],
    "pytest": [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"],
}


def like(shown: str) -> re.Pattern[str]:
    """What is shown; `...` stands for anything, and numbers with a point, as times have, for any of them."""
    pattern = re.escape(shown).replace(re.escape("..."), r"(.|\n)*")
    return re.compile(re.sub(r"\d+\\\.\d+|\d+(?=\\ threads)", r"[\\d.,]+", pattern))
