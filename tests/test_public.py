"""What others rely on: the public names and their docs, what importing costs, and who imports whom."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from enum import Enum
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import fastmerge
from fastmerge import errors
from fastmerge.methods import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastmerge"

#: Which rooms of the package a room may import; `errors` and `sweep` may be imported by any, and import none.
ROOMS = {
    "__init__": {"comparing", "engine", "live", "lora", "planner", "recipe", "session", "verifying"},
    "cli": {
        "backends",
        "comparing",
        "demo",
        "engine",
        "facts",
        "flags",
        "lora",
        "multi",
        "planner",
        "preflight",
        "recipe",
        "showing",
        "verifying",
    },
    "showing": {
        "backends",
        "checkpoint",
        "comparing",
        "engine",
        "health",
        "lora",
        "methods",
        "planner",
        "preflight",
        "verifying",
    },
    "comparing": {"backends", "checkpoint", "lora", "memory", "planner", "sources"},
    "verifying": {
        "backends",
        "batches",
        "checkpoint",
        "measures",
        "memory",
        "pieces",
        "planner",
        "provenance",
        "recipe",
        "sources",
        "sweeping",
    },
    "provenance": {"checkpoint", "planner", "sources"},
    "lora": {
        "backends",
        "batches",
        "cards",
        "checkpoint",
        "configs",
        "engine",
        "fit",
        "hub",
        "keywords",
        "layers",
        "marked",
        "measures",
        "memory",
        "methods",
        "planner",
        "recipe",
        "settings",
        "sources",
        "system",
    },
    "session": {
        "backends",
        "batches",
        "fit",
        "keywords",
        "layers",
        "measures",
        "merging",
        "methods",
        "planner",
        "settings",
        "states",
    },
    "live": {"fit", "keywords", "merging", "states", "tensors"},
    "merging": {
        "backends",
        "batches",
        "checkpoint",
        "fit",
        "keywords",
        "measures",
        "planner",
        "recipe",
        "states",
        "tensors",
    },
    "states": {"checkpoint", "fit", "planner", "recipe", "tensors"},
    "keywords": {"marked", "methods", "parameters", "recipe"},
    "tensors": {"checkpoint", "memory"},
    "multi": {"checkpoint", "recipe"},
    "preflight": {"cards", "checkpoint", "configs", "methods", "parameters", "planner", "recipe", "sources"},
    "demo": {"backends", "checkpoint", "engine", "methods", "recipe"},
    "cards": {"checkpoint", "marked"},
    "engine": {
        "backends",
        "batches",
        "cards",
        "checkpoint",
        "choice",
        "health",
        "identity",
        "measures",
        "pieces",
        "planner",
        "provenance",
        "recipe",
        "sources",
        "streaming",
        "sweeping",
        "vary",
    },
    "identity": {"checkpoint", "methods", "planner", "provenance", "sources"},
    "sweeping": {"backends", "batches", "gathered", "measures", "pieces", "planner"},
    "health": {"batches", "checkpoint", "layers", "memory", "methods", "planner"},
    "choice": {"backends", "streaming"},
    "streaming": {"backends", "batches", "checkpoint", "gds", "measures", "memory", "methods", "planner"},
    "gathered": {"backends", "batches", "checkpoint", "measures", "pieces", "planner"},
    "measures": {"backends", "batches", "direct", "methods", "pieces", "planner"},
    "pieces": {"batches", "checkpoint", "memory", "planner", "sources"},
    "batches": {"backends", "checkpoint", "methods", "planner", "sources"},
    "planner": {
        "checkpoint",
        "configs",
        "embeddings",
        "fit",
        "hub",
        "layers",
        "methods",
        "parameters",
        "recipe",
        "settings",
        "sources",
        "vary",
        "vocabulary",
    },
    "embeddings": {"checkpoint", "configs", "sources", "vocabulary"},
    "fit": {"checkpoint", "configs", "layers"},
    "hub": {"checkpoint", "sources"},
    "settings": {"layers", "methods", "parameters", "recipe"},
    "configs": {"checkpoint", "layers", "numbering", "recipe"},
    "numbering": set(),
    "layers": {"recipe"},
    "vary": {"marked", "parameters", "recipe"},
    "recipe": {"marked", "methods", "parameters", "vocabulary"},
    "parameters": {"marked", "methods"},
    "marked": set(),
    "methods": {"plugins", "spherical"},
    "spherical": set(),
    "integrations": {"backends", "live", "methods", "torch_ops"},
    "torch_ops": {"backends"},
    "backends": {"cuda", "installed", "kernels", "native", "reference"},
    "installed": {"memory", "plugins"},
    "plugins": set(),
    "deprecation": set(),
    "native": {"_core", "records"},
    "cuda": {"_cuda", "records"},
    "records": {"_core"},
    "direct": {"methods", "reference"},
    "reference": {"memory"},
    "kernels": set(),
    "facts": {"_build", "backends"},
    "memory": {"system"},
    "system": set(),
    "gds": set(),
    "flags": set(),
    "checkpoint": {"system"},
    "sources": {"checkpoint", "memory", "native"},
    "vocabulary": {"checkpoint", "marked", "sources"},
    "sweep": set(),
    "errors": set(),
}
#: Which rooms may import these packages.
HEAVY = {
    "click": {"cli", "showing"},
    "rich": {"demo", "showing"},
    "pydantic": set(),
    "yaml": {"marked", "vary"},
    "torch": {"direct", "integrations", "kernels", "reference", "tensors", "torch_ops"},
    "triton": {"kernels"},
    "safetensors": set(),
    "tokenizers": set(),
    "transformers": set(),
    "mergekit": set(),
    "peft": set(),
    "huggingface_hub": {"hub"},
}


def python(code: str, *arguments: str) -> str:
    """What a script prints in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


# --- names ---


@pytest.mark.parametrize("name", fastmerge.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    value = getattr(fastmerge, name)
    doc = inspect.getdoc(value) or ""
    assert len(doc) > 10
    assert not doc.startswith(f"{name}("), "the docstring that a dataclass makes up"


@pytest.mark.parametrize("method", ["load", "parse"])
def test_a_recipe_is_made_in_two_documented_ways(method: str) -> None:
    assert inspect.getdoc(getattr(fastmerge.Recipe, method))


def test_all_is_what_is_public() -> None:
    modules = {name for name, value in vars(fastmerge).items() if inspect.ismodule(value)}
    public = {name for name in dir(fastmerge) if not name.startswith("_")}
    assert public - modules - {"TYPE_CHECKING", "Any", "annotations"} == set(fastmerge.__all__) - modules
    assert fastmerge.__all__ == sorted(fastmerge.__all__)


def test_every_error_is_public_and_has_one_root() -> None:
    kinds = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert set(kinds) <= set(fastmerge.__all__)
    for name, kind in kinds.items():
        assert issubclass(kind, UserWarning if name == "FastmergeWarning" else fastmerge.FastmergeError)
        assert name == "FastmergeWarning" or name in (errors.__doc__ or "")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'fastmerge' has no attribute 'absent'"):
        fastmerge.absent  # noqa: B018


def test_a_public_name_is_never_a_module_whatever_is_asked_for_first() -> None:
    code = """
import sys, fastmerge
from types import ModuleType
found = [getattr(fastmerge, name) for name in sys.argv[1:] * 2]
assert not any(isinstance(value, ModuleType) for value in found), found
"""
    for order in permutations(("merge", "plan", "Recipe")):
        python(code, *order)


def test_the_version_is_that_of_the_distribution() -> None:
    assert fastmerge.__version__ == version("fastmerge")


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    core = pytest.importorskip("fastmerge._core", reason="compiled core not built", exc_type=ImportError)
    stubbed = {
        node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else node.target.id
        for node in ast.parse((PACKAGE / "_core.pyi").read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        or (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
    }
    public = {name for name in dir(core) if not name.startswith("_")}
    assert public <= stubbed


def test_the_kernels_are_installed_within_the_package() -> None:
    assert importlib.util.find_spec("fastmerge.kernels.provider"), "which is not imported: it needs triton"
    top = ast.parse((ROOT / "kernels" / "__init__.py").read_text()).body
    assert len(top) == 1, "only a docstring: in a checkout it also answers to `import kernels`"


# --- the surface ---

#: The modules that others may rely on, and the names where that is not all that is in them.
SURFACE = {
    "fastmerge": "",
    "fastmerge.lora": "",
    "fastmerge.integrations.mergekit": "accelerated install uninstall",
    "fastmerge.integrations.peft": "accelerated install uninstall",
    "fastmerge.methods": "Base Measured Method Parameter Settings number",
    "fastmerge.sweep": "",
    "fastmerge.reference": "add delta keep random_bits scale sweep_tile",
}


def test_the_surface_is_what_others_rely_on() -> None:
    """Names, parameters and defaults, as tests/surface.txt has them: it changes on purpose, and with the CHANGELOG."""
    found = "\n".join(f"{module}.{line}" for module in SURFACE for line in surface(module))
    assert found.splitlines() == (ROOT / "tests" / "surface.txt").read_text().splitlines()


def test_the_page_tells_the_surface() -> None:
    page = (ROOT / "docs" / "write-a-method.md").read_text().partition("## What you may rely on")[2]
    told = {
        module: set(re.findall(r"`(.*?)`", names))
        for modules, names in re.findall(r"^\| (`fastmerge.*?) \| (.*?) \|$", page, re.MULTILINE)
        for module in re.findall(r"`(.*?)`", modules)
    }
    assert told.keys() == SURFACE.keys()
    for module, names in SURFACE.items():
        assert told[module] - {f"{module}.__all__"} == set(names.split())


def surface(module: str) -> Iterator[str]:
    """A line for each public name of a module, and for each public member of a class."""
    held = importlib.import_module(module)
    mine = [name for name, value in vars(held).items() if name.isupper() or getattr(value, "__module__", "") == module]
    own = [name for name in mine if not name.startswith("_")]
    for name in sorted(SURFACE[module].split() or getattr(held, "__all__", own)):
        value = getattr(held, name)
        if inspect.isclass(value):
            yield from members(name, value)
        else:
            yield name + (signature(value) if callable(value) else "" if inspect.ismodule(value) else f" = {value!r}")


def members(name: str, kind: type) -> Iterator[str]:
    if issubclass(kind, Enum):
        yield f"{name}: {', '.join(f'{each.name} = {each.value!r}' for each in kind)}"
    elif issubclass(kind, Exception):
        yield f"{name}({kind.__mro__[1].__name__})"
    else:
        yield f"{name}{signature(kind)}"
        fields = {*getattr(kind, "_fields", ()), *getattr(kind, "__dataclass_fields__", ())}
        for member in sorted(vars(kind).keys() - fields):
            if not member.startswith("_"):
                value = getattr(kind, member)
                yield f"{name}.{member}{signature(value) if callable(value) else ''}"


def signature(value: Callable[..., Any]) -> str:
    """Parameters and defaults, without the types, which are for another checker."""
    given = [each.replace(annotation=each.empty) for each in inspect.signature(value).parameters.values()]
    shown = [each if each.default is each.empty else each.replace(default=Shown(each.default)) for each in given]
    return str(inspect.Signature([each for each in shown if each.name != "self"]))


class Shown(NamedTuple):
    """A default, written alike in every version of Python."""

    value: object

    def __repr__(self) -> str:
        if isinstance(self.value, Enum):
            return f"{type(self.value).__name__}.{self.value.name}"
        return "..." if callable(self.value) else repr(self.value)


# --- what importing costs ---


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fastmerge", "torch triton numpy pydantic yaml rich click transformers"),
        ("import fastmerge.cli", "torch triton numpy pydantic yaml rich transformers asyncio"),
        ("import fastmerge.engine, fastmerge.native", "torch triton rich transformers huggingface_hub"),
        ("from fastmerge import merge, plan, Recipe, Report, Plan", "torch triton rich transformers"),
        ("from fastmerge import merge_into, merge_tensors, Session", "torch triton rich transformers"),
    ],
    ids=["package", "command-line", "engine", "public-names", "in-memory"],
)
def test_an_import_brings_nothing_heavy(statement: str, absent: str) -> None:
    loaded = json.loads(python(f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"))
    assert "fastmerge" in loaded
    assert set(absent.split()) & set(loaded) == set()


# --- who imports whom ---


def sources() -> Iterator[tuple[str, Path]]:
    """Each Python file of the package with its room: a module, or a folder of them."""
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE).parts[0].removesuffix(".py"), file
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", file


def imports(room: str, file: Path) -> Iterator[str]:
    """The absolute names that a file imports, at its top, in a function or for type checkers."""
    inside = file.relative_to(PACKAGE).parent.parts if room != "kernels" else ("kernels",)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ("fastmerge", *inside)[: len(inside) + 2 - node.level] if node.level else ()
            name = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{name}.{alias.name}" for alias in node.names)


def rooms_imported(room: str, file: Path) -> set[str]:
    parts = [name.split(".") for name in imports(room, file)]
    return {names[1] for names in parts if names[0] == "fastmerge"} - {room, "__version__"}


@pytest.mark.parametrize(("room", "file"), list(sources()), ids=[str(file.relative_to(ROOT)) for _, file in sources()])
def test_a_room_imports_only_what_lies_below_it(room: str, file: Path) -> None:
    assert room in ROOMS, "a new room: say in ROOMS what it may import"
    shared = set() if room in ("errors", "sweep") else {"errors", "sweep"}
    assert rooms_imported(room, file) - shared <= ROOMS[room]


def test_the_rooms_lie_in_one_order() -> None:
    """No room is above itself, by whatever way."""
    left = {room: set(below) for room, below in ROOMS.items()}
    while left:
        lowest = [room for room, below in left.items() if not below & left.keys()]
        assert lowest, f"a circle among {', '.join(left)}"
        for room in lowest:
            del left[room]


@pytest.mark.parametrize("package", HEAVY)
def test_a_heavy_package_is_imported_only_where_it_belongs(package: str) -> None:
    users = {room for room, file in sources() for name in imports(room, file) if name.split(".")[0] == package}
    assert users <= HEAVY[package]


@pytest.mark.parametrize("room", ["methods", "sweep", "errors"])
def test_plain_data_needs_only_the_standard_library(room: str) -> None:
    tops = {name.split(".")[0] for name in imports(room, PACKAGE / f"{room}.py")} - {"fastmerge"}
    assert tops <= sys.stdlib_module_names


def test_no_kernel_knows_the_name_of_a_method() -> None:
    """In csrc and kernels. Ties is also the plain word for equals."""
    files = [file for folder in ("csrc", "kernels") for file in (ROOT / folder).rglob("*") if file.is_file()]
    assert any(file.suffix == ".inl" for file in files)
    for file in files:
        if file.suffix in (".h", ".cpp", ".cu", ".inl", ".py"):
            assert words(file) & METHODS.keys() <= {"ties"}, file.name


def words(file: Path) -> set[str]:
    """The words of a source file without its comments."""
    text = file.read_text()
    if file.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        text = " ".join(token.string for token in tokens if token.type in (tokenize.NAME, tokenize.STRING))
        text = re.sub(r'""".*?"""', "", text, flags=re.DOTALL)
    else:
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    return set(re.findall(r"\w+", text))
