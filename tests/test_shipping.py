"""What is shipped: the versions agree, the sdist and the wheel hold what they should, and platforms without a compiled
core get by on torch."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

import fastmerge
from fastmerge import facts

ROOT = Path(__file__).parents[1]
SMOKE: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "smoke.py"))

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="no tomllib before Python 3.11, and no tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CIBUILDWHEEL = PROJECT["tool"]["cibuildwheel"]


# --- versions ---


def test_the_changelog_begins_with_this_version_or_what_comes_after_it() -> None:
    headings = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == fastmerge.__version__
    assert all(date for _, date in headings[1:])


def test_the_version_stands_in_one_place() -> None:
    assert "version" in PROJECT["project"]["dynamic"]
    assert PROJECT["tool"]["scikit-build"]["metadata"]["version"]["input"] == "fastmerge/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastmerge.__version__), "semantic versioning"


def test_facts_tell_of_the_core_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastmerge._core", reason="compiled core not built", exc_type=ImportError)
    from fastmerge import native

    first, core, cuda, python = facts.lines()
    assert first.startswith(f"fastmerge {fastmerge.__version__}")
    assert core.startswith("core: ")
    assert f"{native.isa()} (runs)" in core
    assert all(isa in core for isa in native.ISAS)
    assert cuda.startswith(("CUDA kernels: nvcc ", "no CUDA kernels: "))
    assert "{}.{}.{}".format(*sys.version_info[:3]) in python
    monkeypatch.setitem(sys.modules, "fastmerge._core", None)
    assert list(facts.lines())[1].startswith("no core, torch computes: ")


# --- sdist and wheel ---


@pytest.fixture(scope="module")
def build() -> Any:
    return pytest.importorskip("scikit_build_core.build", reason="scikit-build-core not installed")


@pytest.fixture(scope="module")
def sdist(build: Any, tmp_path_factory: pytest.TempPathFactory) -> tarfile.TarFile:
    folder = tmp_path_factory.mktemp("sdist")
    with chdir(ROOT):
        return tarfile.open(folder / build.build_sdist(str(folder)))


@pytest.fixture(scope="module")
def source(sdist: tarfile.TarFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    sdist.extractall(folder)
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(build: Any, source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Of the sdist, and of Python alone, as Windows gets it."""
    folder = tmp_path_factory.mktemp("wheel")
    options = {"wheel.cmake": "false", "wheel.platlib": "true", "wheel.py-api": "py3"}
    with chdir(source):
        return zipfile.ZipFile(folder / build.build_wheel(str(folder), options))


def test_the_sdist_holds_what_a_wheel_is_made_of_and_nothing_else(sdist: tarfile.TarFile) -> None:
    names = {name.split("/", 1)[1] for name in sdist.getnames()}
    python = {path.relative_to(ROOT).as_posix() for folder in ("fastmerge", "kernels") for path in modules(folder)}
    core = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    top = {"CHANGELOG.md", "CMakeLists.txt", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert len(core) > 40
    assert names == python | core | top | {"fastmerge/py.typed", "tests/smoke.py"}


def test_the_wheel_holds_the_package_with_its_kernels_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT).as_posix() for path in modules("fastmerge")}
    kernels = {f"fastmerge/kernels/{path.name}" for path in modules("kernels")}
    assert names == package | kernels | {"fastmerge/py.typed"}
    about = {name.split("/", 1)[1] for name in wheel.namelist()} - {name.split("/", 1)[1] for name in names}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    metadata, about = said(wheel, "METADATA"), said(wheel, "WHEEL")
    assert (metadata["Name"], metadata["Version"]) == ("fastmerge", fastmerge.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert sorted(needed) == sorted(PROJECT["project"]["dependencies"])
    assert not [each for each in needed if "<" in each], "no upper bounds"
    assert about["Root-Is-Purelib"] == "false"
    assert about["Tag"].startswith("py3-none-"), "one wheel for every Python, of this platform"
    assert "fastmerge = fastmerge.cli:main" in wheel.read(named(wheel, "entry_points.txt")).decode()


def test_without_a_compiler_the_wheel_has_no_core_and_says_why(
    build: Any, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cmake", reason="cmake not installed")
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/bin/false")
    with chdir(source):
        wheel = zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path)))
    assert not [name for name in wheel.namelist() if "_core." in name and not name.endswith(".pyi")]
    written: dict[str, str] = {}
    exec(wheel.read("fastmerge/_build.py"), written)
    assert written["NO_CORE"] == "there is no C++ compiler"
    assert written["NO_CUDA"]


@contextmanager
def chdir(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def modules(folder: str) -> list[Path]:
    """The Python files of a package, but for what a build puts there."""
    return [path for path in (ROOT / folder).rglob("*.py*") if path.suffix in (".py", ".pyi")]


def said(wheel: zipfile.ZipFile, name: str) -> Message:
    return message_from_bytes(wheel.read(named(wheel, name)))


def named(wheel: zipfile.ZipFile, name: str) -> str:
    return f"fastmerge-{fastmerge.__version__}.dist-info/{name}"


# --- platforms without a compiled core ---

#: Leaves of POSIX what Windows has, too, and no core.
WINDOWS = """
import mmap, os, shutil, sys, types
import torch  # which has its own ways with each system
room = shutil.disk_usage(".")
shutil.disk_usage = lambda _: room
for module in ("fcntl", "resource", "pwd", "grp", "fastmerge._core"):
    sys.modules[module] = None
for name in (
    "pread", "preadv", "pwrite", "pwritev", "posix_fallocate", "posix_fadvise", "sched_getaffinity",
    "statvfs", "fstatvfs", "getuid", "geteuid", "mkfifo", "fchmod", "sysconf", "uname",
    "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY",
):
    if hasattr(os, name):
        delattr(os, name)
for name in ("MAP_SHARED", "MAP_PRIVATE", "PROT_READ", "PROT_WRITE", "MADV_WILLNEED"):
    delattr(mmap, name)
locked = []
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *how: locked.append(how))
"""
MERGE = """
import runpy
from pathlib import Path
import fastmerge
smoke = runpy.run_path(sys.argv[1])
for name, values in smoke["VALUES"].items():
    smoke["write"](Path(name), values)
Path("recipe.yml").write_text(smoke["RECIPE"].format("."))
report = fastmerge.merge("recipe.yml", "out")
print(*report.providers, *smoke["read"](Path("out")))
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), str(ROOT / "tests" / "smoke.py")]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_where_only_windows_has_calls_torch_merges(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch not installed")
    ended = python(f"{WINDOWS}{MERGE}assert locked, 'the output folder was taken'", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["torch", *map(str, SMOKE["EXPECTED"])]


def test_without_a_core_torch_merges_and_a_warning_says_why_it_is_slow(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch not installed")
    ended = python(f"import sys\nsys.modules['fastmerge._core'] = None\n{MERGE}", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["torch", *map(str, SMOKE["EXPECTED"])]
    assert "FastmergeWarning: torch computes, slowly: the compiled core is not there" in ended.stderr


def test_without_a_core_and_torch_one_error_says_what_to_install(tmp_path: Path) -> None:
    code = f"import sys\nsys.modules['fastmerge._core'] = sys.modules['torch'] = None\n{MERGE}"
    ended = python(code, tmp_path)
    assert ended.stderr.splitlines()[-1].startswith("fastmerge.errors.BackendError: ")
    assert "pip install 'fastmerge[torch]'" in ended.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


# --- continuous integration ---


def test_the_workflow_runs_what_ci_runs() -> None:
    assert ".ci/run" in commands("ci")


def test_wheels_are_built_for_every_platform_and_tried_there() -> None:
    machines = workflow("wheels")["wheels"]["strategy"]["matrix"]["machine"]
    assert [name.split("-")[0] + ("-arm" if name.endswith("-arm") else "") for name in machines] == [
        "ubuntu",
        "ubuntu-arm",
        "macos",
        "windows",
    ]
    tried = [CIBUILDWHEEL["test-command"], CIBUILDWHEEL["windows"]["test-command"]]
    assert all("python {project}/tests/smoke.py" in str(command) for command in tried)
    assert CIBUILDWHEEL["config-settings"]["cmake.define.FASTMERGE_CORE"] == "ON", "no wheel lacks its core by accident"


@pytest.mark.parametrize(
    ("platform", "machine", "builds"),
    [
        ("linux", "x86_64", [f"cp3{minor}-manylinux_x86_64" for minor in (10, 11, 12, 13, 14)]),
        ("linux", "aarch64", [f"cp3{minor}-manylinux_aarch64" for minor in (10, 11, 12, 13, 14)]),
        ("macos", "arm64", [f"cp3{minor}-macosx_arm64" for minor in (10, 11, 12, 13, 14)]),
        ("windows", "AMD64", ["cp312-win_amd64"]),
    ],
)
def test_cibuildwheel_knows_what_to_build(platform: str, machine: str, builds: list[str]) -> None:
    pytest.importorskip("cibuildwheel", reason="cibuildwheel not installed")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", "--platform", platform]
    ended = subprocess.run([*command, "--archs", machine, str(ROOT)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert set(ended.stdout.split()) >= set(builds)


def workflow(name: str) -> dict[str, Any]:
    """The jobs of a workflow."""
    jobs: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]
    return jobs


def commands(name: str) -> list[str]:
    return [step["run"] for job in workflow(name).values() for step in job["steps"] if "run" in step]
