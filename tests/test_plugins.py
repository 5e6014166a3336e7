"""What other packages add by entry points: the method and the provider of the docs, many broken ones, names taken."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

import fastmerge
from fastmerge import RecipeError, backends, cli, installed, lora, merge_tensors, methods, plugins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
METHOD_PAGE, PROVIDER_PAGE = ROOT / "docs/write-a-method.md", ROOT / "docs/write-a-provider.md"
WEIGHTS, LAMBDA = (0.6, 0.4), 0.9

#: A row of a package, and a provider of one, which the tests break in many ways.
HALF = """
from fastmerge.methods import Base, Method, Parameter, number
from fastmerge.sweep import Part, Sweep
def half(settings, measured):
    return Sweep((Part(number(settings.shared, "share")),))
def row(name="half", **other):
    share = Parameter("share", float, 0.5)
    given = dict(formula="share * model", paper="-", base=Base.INPUT, models=(1, 1), parameters=(share,), sweep=half)
    return Method(name=name, **{**given, **other})
ROW = row()
"""
ADDER = """
import ctypes
import numpy as np
from fastmerge.sweep import Found, Keep
DTYPES = {"F32", "F64", "U8"}
KINDS = {"F32": np.float32, "F64": np.float64, "U8": np.uint8}
def at(address, kind, count):
    return np.frombuffer((ctypes.c_uint8 * (count * np.dtype(kind).itemsize)).from_address(address), kind)
def merge(tensors, sweeps, targets, run):
    found = []
    for inputs, (sweep,), (target,) in zip(tensors, sweeps, targets):
        if sweep.keep is not Keep.ALL:
            raise NotImplementedError("it drops nothing")
        assert target.file == -1, "outputs are in memory"
        kind = KINDS[target.dtype]
        views = [at(view.address, kind, inputs.elements) for view in inputs.models]
        total = sum(view * kind(part.weight) for view, part in zip(views, sweep.parts))
        at(target.offset, kind, inputs.elements)[:] = total / kind(sweep.divisor)
        found.append(Found((0,) * len(inputs.views), (-1,) * len(inputs.views), (0,)))
    return found
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Packages:
    """A folder of installed packages: modules, each with a .dist-info of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def add(self, package: str, group: str, points: Mapping[str, str], **modules: str) -> None:
        """Installs a package of version 1.0 with these entry points and the source of its modules."""
        about = self.folder / f"{package.replace('-', '_')}-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (about / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        for name, source in modules.items():
            (self.folder / f"{name}.py").write_text(source)
        self.modules += modules
        forget()

    def method(self, source: str, name: str = "half", package: str = "fastmerge-half", value: str = "ROW") -> None:
        module = package.replace("-", "_")
        self.add(package, methods.GROUP, {name: f"{module}:{value}"}, **{module: source})

    def provider(self, source: str, name: str = "adder", package: str = "fastmerge-adder") -> None:
        module = package.replace("-", "_")
        self.add(package, installed.GROUP, {name: module}, **{module: source})

    def imported(self) -> set[str]:
        return set(self.modules) & set(sys.modules)


def forget() -> None:
    """As a new process begins."""
    importlib.invalidate_caches()
    for looked_up in (plugins.found, methods.added, installed.load):
        looked_up.cache_clear()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Packages(tmp_path / "site")
    monkeypatch.syspath_prepend(made.folder)
    yield made
    for name in made.modules:
        sys.modules.pop(name, None)
    forget()


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and two models, one of which moved ten times as far."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    rng = np.random.default_rng(3)
    base = {f"layers.{n}.w": rng.standard_normal((16, 24)).astype(np.float32) for n in range(3)}
    save("base", base)
    for name, far in (("code", 0.02), ("maths", 0.2)):
        save(name, {key: each + rng.normal(0, far, each.shape).astype(np.float32) for key, each in base.items()})
    Path("linear.yml").write_text(recipe("linear"))
    Path("half.yml").write_text("merge_method: half\nmodels: [model: code]\nparameters: {share: 0.25}\n")


def save(name: str, tensors: Mapping[str, np.ndarray]) -> None:
    Path(name).mkdir(exist_ok=True)
    save_file(dict(tensors), Path(name) / "model.safetensors")


def load(name: str) -> dict[str, np.ndarray]:
    return load_file(Path(name) / "model.safetensors")


def recipe(method: str, more: str = "") -> str:
    base = "" if method == "linear" else "base_model: base\n"
    return f"merge_method: {method}\n{base}models: [model: code, model: maths]\nparameters: {{weight: 0.5{more}}}\n"


@pytest.fixture
def fastmerge_(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """The command, in this process: an exception that is no exit fails the test, as a traceback would."""

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments, prog_name="fastmerge")
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def install_from(pages: Packages, project: str, **modules: str) -> None:
    """A package as its pyproject.toml has it."""
    about = tomllib.loads(project)["project"]
    assert about["version"] == "1.0"
    ((group, points),) = about["entry-points"].items()
    pages.add(about["name"], group, points, **modules)


def process(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, in which the packages of a folder are installed."""
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


# --- the pages ---


@pytest.fixture
def balanced(packages: Packages) -> Packages:
    """The package of the page, with the method as a sweep, and one with it as a function."""
    (project,), (row, whole) = blocks(METHOD_PAGE, "toml"), blocks(METHOD_PAGE, "python")
    install_from(packages, project, fastmerge_balanced=row)
    points = {"whole": "fastmerge_balanced_whole:WHOLE"}
    packages.add("fastmerge-balanced-whole", methods.GROUP, points, fastmerge_balanced_whole=whole)
    (text,) = blocks(METHOD_PAGE, "yaml")
    Path("balanced.yml").write_text(text)
    Path("balanced_whole.yml").write_text(text.replace("balanced", "balanced_whole"))
    return packages


def assert_balanced(merged: Mapping[str, np.ndarray]) -> None:
    """As the formula of the page has it, in float64; each term is rounded five times, and their sum three."""
    base, *tuned = ({key: each.astype(np.float64) for key, each in load(name).items()} for name in NAMES)
    assert merged.keys() == base.keys()
    for key, origin in base.items():
        deltas = [model[key] - origin for model in tuned]
        lengths = [np.sqrt((delta**2).sum()) for delta in deltas]
        terms = [
            LAMBDA * weight * np.mean(lengths) / length * delta
            for weight, length, delta in zip(WEIGHTS, lengths, deltas, strict=True)
        ]
        error = np.abs(merged[key] - (origin + sum(terms)))
        assert (error <= 2.0**-24 * (np.abs(origin) + 8 * sum(map(np.abs, terms)))).all()


NAMES = ("base", "code", "maths")


@pytest.mark.parametrize("method", ["balanced", "balanced_whole"])
def test_the_method_of_the_page_is_its_formula(method: str, balanced: Packages) -> None:
    ended = process(balanced.folder, "-m", "fastmerge.cli", "merge", f"{method}.yml", "out")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"out: {method} of 3 tensors")
    assert_balanced(load("out"))


def test_the_method_of_the_page_is_its_formula_in_memory(balanced: Packages) -> None:
    base, *models = map(load, NAMES)
    merged = {
        key: merge_tensors("balanced", [model[key] for model in models], each, weight=WEIGHTS, lambda_=LAMBDA)
        for key, each in base.items()
    }
    assert_balanced({key: np.asarray(each) for key, each in merged.items()})


def test_a_plan_tells_which_is_no_sweep(balanced: Packages, fastmerge_: Callable[..., Ended]) -> None:
    sweep, whole = (fastmerge_("plan", f"{method}.yml").out for method in ("balanced", "balanced_whole"))
    assert "2 times" in sweep
    assert "not fused" not in sweep
    assert "not fused" in whole


def test_info_lists_the_methods_of_the_page(balanced: Packages, fastmerge_: Callable[..., Ended]) -> None:
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in fastmerge_("info").out.splitlines()]
    assert ["balanced", "fastmerge-balanced 1.0", ""] in rows
    assert ["balanced_whole", "fastmerge-balanced-whole 1.0", ""] in rows


def test_the_provider_of_the_page_has_the_bits_of_the_core(packages: Packages) -> None:
    if not shutil.which("cc"):
        pytest.skip("no C compiler named cc")
    pytest.importorskip("fastmerge.native", reason="compiled core not built", exc_type=ImportError)
    (project,), (about,) = blocks(PROVIDER_PAGE, "toml"), blocks(PROVIDER_PAGE, "python")
    (source,) = blocks(ROOT / "bench/KERNELS.md", "python")
    install_from(packages, project, fastmerge_mine=about + source)
    Path("recipe.yml").write_text(recipe("task_arithmetic") + "dtype: bfloat16\n")
    for name in NAMES:
        halves = {key: torch.from_numpy(each).bfloat16() for key, each in load(name).items()}
        safetensors.torch.save_file(halves, f"{name}/model.safetensors")
    (command,) = blocks(PROVIDER_PAGE, "bash")
    ended = process(packages.folder, "-m", "fastmerge.cli", *command.split()[1:])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(r"GB/s; mine, \d", ended.stdout)
    fastmerge.merge("recipe.yml", "core", backend="cpu")
    assert_same_bytes("out", "core")


def assert_same_bytes(one: str, other: str) -> None:
    first, second = (Path(name, "model.safetensors").read_bytes() for name in (one, other))
    assert first == second


# --- methods ---


def test_a_parameter_of_its_own_is_known_to_that_method_alone(packages: Packages) -> None:
    packages.method(HALF)
    model = load("code")["layers.0.w"]
    assert_same(merge_tensors("half", [model], share=0.25), model * np.float32(0.25))
    fastmerge.merge("half.yml", "out")
    assert_same(load("out")["layers.0.w"], model * np.float32(0.25))
    with fastmerge.Session([load("code")], method="half", share=0.25) as session:
        assert_same(session.merge(share=0.5)["layers.0.w"], model * np.float32(0.5))
    with pytest.raises(RecipeError, match="unknown parameter 'share'"):
        merge_tensors("linear", [model], weight=1, share=0.25)
    Path("other.yml").write_text(recipe("linear", ", share: 1"))
    with pytest.raises(RecipeError, match="unknown parameter 'share'"):
        fastmerge.merge("other.yml", "other")


def assert_same(ours: Any, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.asarray(ours), expected)


def test_an_entry_point_may_name_several_rows(packages: Packages) -> None:
    packages.method(HALF + 'ROWS = [ROW, row("quarter")]', value="ROWS")
    model = load("code")["layers.0.w"]
    assert_same(merge_tensors("quarter", [model], share=0.25), model * np.float32(0.25))
    assert methods.names()[-2:] == ["half", "quarter"]


def test_a_method_of_a_package_combines_adapters(packages: Packages) -> None:
    packages.method(HALF + "WIDE = row('wide', base=Base.OPTIONAL)", value="WIDE")
    with pytest.raises(fastmerge.CheckpointError, match="absent"):
        lora.combine(["absent"], "out", method="wide")
    with pytest.raises(RecipeError, match="unknown method 'wider'"):
        lora.combine(["absent"], "out", method="wider")


@pytest.mark.parametrize("command", ["--help", "merge linear.yml out", "plan linear.yml"])
def test_no_other_command_looks_for_packages(command: str, packages: Packages) -> None:
    packages.method("raise SystemExit('imported')")
    packages.provider("raise SystemExit('imported')")
    code = f"""
from fastmerge import cli, plugins
try:
    cli.main({command.split()!r})
except SystemExit as ended:
    assert not ended.code, ended
print(plugins.found.cache_info().misses, "groups looked for")
"""
    ended = process(packages.folder, "-c", code)
    assert ended.stdout.endswith("\n0 groups looked for\n"), ended.stderr


def test_a_typo_is_told_with_the_methods_of_packages(packages: Packages) -> None:
    packages.method(HALF)
    with pytest.raises(RecipeError, match=r"unknown merge_method 'hlf'; did you mean 'half'[?]$"):
        merge_tensors("hlf", [load("code")["layers.0.w"]])


BROKEN_ROWS = {
    "does not import": (
        "import no_such_module",
        "failed in loading, with ModuleNotFoundError: No module named 'no_such",
    ),
    "is no Python": ("ROW = (", "failed in loading, with SyntaxError: '(' was never closed"),
    "leaves": ("raise SystemExit(3)", "failed in loading, with SystemExit: 3"),
    "has no such name": (
        "ROWS = ()",
        "failed in loading, with AttributeError: module 'fastmerge_half' has no attribute",
    ),
    "is no row": ("ROW = 3", "failed in listing its methods, with TypeError: 'int' object is not iterable"),
    "lists no rows": ("ROW = [3]", "gives 3 where a fastmerge.methods.Method belongs"),
    "has no sweep": (HALF.replace(", sweep=half", ""), "adds a method half that has not one of sweep and function"),
    "has both": (HALF.replace("=half)", "=half, function=half)"), "half that has not one of sweep and function"),
    "has no Base": (HALF.replace("Base.INPUT", "'input'"), "a method half whose base is no Base"),
    "has odd parameters": (
        HALF.replace('"share", float', '"to share", float'),
        "with a parameter 'to share', which is",
    ),
    "selects by nothing": (HALF.replace("=half)", "=half, selects=True)"), "half that selects, and has no density"),
    "fails": (
        HALF.replace("return Sweep", "1 / 0\n    return Sweep"),
        "failed in the sweep of half, with ZeroDivisionError: division",
    ),
    "makes no sweep": (HALF.replace("return Sweep", "return "), "makes of half no Sweep with a part for each model"),
    "has too few parts": (
        HALF.replace("(Part(", "(*(Part(").replace("),))", ") for _ in ()),))"),
        "makes of half no Sw",
    ),
    "fails to judge": (
        HALF.replace("=half)", "=half, fault=lambda _: 1 / 0)"),
        "failed in the fault of half, with Zero",
    ),
    "computes nothing": (
        HALF.replace("sweep=half", "function=lambda models, base, settings: None"),
        "makes of half no tensor of the shape and dtype of its models",
    ),
}


@pytest.mark.parametrize(("source", "fault"), BROKEN_ROWS.values(), ids=BROKEN_ROWS)
def test_a_broken_method_is_one_sentence(
    source: str, fault: str, packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    packages.method(source)
    ended = fastmerge_("merge", "half.yml", "out")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
    assert "the entry point 'half' of fastmerge-half 1.0 " in ended.err
    assert fault in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["does not import", "is no row", "has both"])
def test_a_broken_method_is_listed_and_stops_no_other_merge(
    kind: str, packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    source, fault = BROKEN_ROWS[kind]
    packages.method(source)
    packages.method(HALF + 'ROW = row("whole")', name="whole", package="fastmerge-whole")
    row = next(line for line in fastmerge_("info").out.splitlines() if "fastmerge-half" in line)
    assert fault in row
    assert fastmerge_("merge", "linear.yml", "out").code == 0
    model = load("code")["layers.0.w"]
    assert_same(merge_tensors("whole", [model], share=0.25), model * np.float32(0.25))


def test_an_unknown_name_may_be_one_that_a_broken_package_adds(packages: Packages) -> None:
    packages.method("import no_such_module", name="rows")
    with pytest.raises(
        RecipeError, match=r"unknown merge_method 'half'.* may be missing as the entry point 'rows' of fast"
    ):
        merge_tensors("half", [load("code")["layers.0.w"]])


def test_the_name_of_a_built_in_method_cannot_be_taken(packages: Packages, fastmerge_: Callable[..., Ended]) -> None:
    packages.method(HALF + 'ROW = row("linear")', name="linear")
    assert fastmerge_("merge", "linear.yml", "out").code == 0
    row = next(line for line in fastmerge_("info").out.splitlines() if "fastmerge-half" in line)
    assert "the entry point 'linear' of fastmerge-half 1.0 adds a method linear, which fastmerge has of its own" in row


def test_two_packages_cannot_add_one_name(packages: Packages) -> None:
    packages.method(HALF)
    packages.method(HALF, package="fastmerge-other")
    both = "the method half is added by fastmerge-half 1.0 and fastmerge-other 1.0; uninstall one of them"
    with pytest.raises(RecipeError, match=both):
        merge_tensors("half", [load("code")["layers.0.w"]])
    assert [each.fault for each in methods.added()] == [both, both]


# --- providers ---


def standing(name: str) -> backends.Standing:
    (found,) = (each for each in backends.standings() if each.provider == name)
    return found


def test_a_provider_is_forced_by_name_and_has_the_ops_that_it_defines(
    packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    packages.provider(ADDER)
    ended = fastmerge_("merge", "linear.yml", "out", "--backend", "adder")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"GB/s; adder, \d", ended.out)
    fastmerge.merge("linear.yml", "torch", backend="torch")
    assert_same_bytes("out", "torch")
    assert standing("adder") == ("adder", "cpu", ("-", "-", "-", "can"), "")
    row = next(line for line in fastmerge_("info").out.splitlines() if "adder" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["adder", "cpu", "-", "-", "-", "can", ""]


@pytest.mark.parametrize(
    ("recipe_", "dtype", "fault"),
    [
        (
            recipe("ties", ", density: 0.5"),
            "float32",
            "backend adder has no threshold, which this merge needs: ask for",
        ),
        (
            recipe("dare_linear"),
            "float32",
            "backend adder refuses: NotImplementedError: it drops nothing; ask for auto",
        ),
        (recipe("linear"), "float16", "no backend merges F16 with F32 here (adder takes F32, F64, U8)"),
    ],
    ids=["op", "sweep", "dtype"],
)
def test_what_a_provider_cannot_do_it_refuses(
    recipe_: str, dtype: str, fault: str, packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    packages.provider(ADDER)
    Path("recipe.yml").write_text(f"{recipe_}out_dtype: {dtype}\n")
    ended = fastmerge_("merge", "recipe.yml", "out", "--backend", "adder")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: {fault}")
    assert not Path("out").exists()


def test_auto_takes_a_provider_where_no_other_is_able(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    packages.provider(ADDER)
    wide = load("code")["layers.0.w"].astype(np.float64)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)  # torch, who else takes float64
    assert backends.choose("auto", {"F32"}).name == "cpu"
    assert not packages.imported()
    assert_same(merge_tensors("linear", [wide, wide + 1], weight=0.5), wide * 0.5 + (wide + 1) * 0.5)
    assert packages.imported()


BROKEN_PROVIDERS = {
    "does not import": ("import no_such_module", "failed in loading, with ModuleNotFoundError: No module named"),
    "has no op": ("DTYPES = {'F32'}", "defines none of gram, norms, threshold, merge, merge_ranked"),
    "has no such device": (f"{ADDER}DEVICE = 'tpu'", 'has the DEVICE \'tpu\', which is neither "cpu" nor "gpu"'),
    "knows no GPUs": (f"{ADDER}DEVICE = 'gpu'", "works on a GPU and has no devices"),
    "cannot tell": (
        f"{ADDER}def why_not(): return 1 / 0",
        "failed in why_not, with ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize(("source", "fault"), BROKEN_PROVIDERS.values(), ids=BROKEN_PROVIDERS)
def test_a_broken_provider_is_one_sentence_and_listed(
    source: str, fault: str, packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    packages.provider(source)
    told = f"the entry point 'adder' of fastmerge-adder 1.0 {fault}"
    ended = fastmerge_("merge", "linear.yml", "out", "--backend", "adder")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: backend adder cannot run: {told}")
    assert ended.err.count("\n") == 1
    assert told in standing("adder").reason
    assert set(standing("adder").ops) == {"-"}
    assert fastmerge_("merge", "linear.yml", "out").code == 0


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("return found", "return found[0][0][9]", "failed in merge, with IndexError: tuple index out of range"),
        ("return found", "return None", "returns of merge no list with an item for each tensor"),
        ("return found", "return found[1:]", "returns of merge no list with an item for each tensor"),
    ],
    ids=["raises", "returns-nothing", "returns-too-little"],
)
def test_a_provider_that_fails_is_one_sentence(
    old: str, new: str, fault: str, packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    packages.provider(ADDER.replace(old, new))
    ended = fastmerge_("merge", "linear.yml", "out", "--backend", "adder")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        f"error: the entry point 'adder' of fastmerge-adder 1.0 {fault}; update or uninstall that package\n"
    )
    assert not Path("out").exists()


def test_a_provider_tells_why_it_is_out(packages: Packages) -> None:
    packages.provider(f"{ADDER}def why_not(): return 'it is asleep'")
    assert standing("adder").reason == "it is asleep"
    with pytest.raises(fastmerge.BackendError, match="backend adder cannot run: it is asleep"):
        fastmerge.merge("linear.yml", "out", backend="adder")


def test_a_provider_of_gpus_is_listed_with_them(packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "ORDER", backends.ORDER | {"gpu": dict.fromkeys(backends.OPS, ())})
    card = "class Card: name = 'Fast card'\n"
    packages.provider(f"{ADDER}DEVICE = 'gpu'\n{card}def devices(): return 2\ndef device(number): return Card")
    assert standing("adder") == ("adder", "gpu", ("-", "-", "-", "auto"), "")
    assert [gpu.name for gpu in backends.gpus()] == ["Fast card", "Fast card"]


def test_the_name_of_a_built_in_backend_cannot_be_taken(packages: Packages, fastmerge_: Callable[..., Ended]) -> None:
    packages.provider("import no_such_module", name="torch")
    assert fastmerge_("merge", "linear.yml", "out", "--backend", "torch").code == 0
    *_, last = backends.standings()
    assert backends.added() == []
    assert last.reason.startswith("the entry point 'torch' of fastmerge-adder 1.0 has a name that is fastmerge's own")
    assert not packages.imported()


def test_two_packages_cannot_add_one_backend(packages: Packages) -> None:
    packages.provider(ADDER)
    packages.provider(ADDER, package="fastmerge-other")
    both = "the backend adder is added by fastmerge-adder 1.0 and fastmerge-other 1.0; uninstall one of them"
    with pytest.raises(fastmerge.BackendError, match=both):
        fastmerge.merge("linear.yml", "out", backend="adder")
    assert standing("adder").reason == both


def test_an_unknown_backend_is_told_with_those_of_packages(
    packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    packages.provider(ADDER)
    ended = fastmerge_("merge", "linear.yml", "out", "--backend", "ader")
    assert ended.code == 2
    assert "'ader' is not one of 'auto', 'cpu', 'torch', 'cuda', 'triton', 'adder'" in ended.err
    with pytest.raises(fastmerge.BackendError, match="there are auto, cpu, torch, cuda, triton, adder"):
        backends.provider("ader")


def test_entry_points_that_cannot_be_read_stop_only_who_needs_them(
    packages: Packages, fastmerge_: Callable[..., Ended]
) -> None:
    packages.add("fastmerge-torn", "fastmerge.methods]\nno equals sign\n[other", {})
    assert fastmerge_("merge", "linear.yml", "out").code == 0
    ended = fastmerge_("merge", "half.yml", "other")
    assert ended.code == 2
    assert "the entry points of the installed packages cannot be read: TypeError: " in ended.err
