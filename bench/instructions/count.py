"""Instructions per element of the kernels of AVX2, counted by valgrind: the same on every run, however noisy a machine.

They are kept in avx2.json, which tests/test_instructions.py holds the kernels to. To keep new ones, on purpose:

    python bench/instructions/count.py --write
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
KEPT = HERE / "avx2.json"
_ROOT = HERE.parent.parent
_BUILD = _ROOT / "build"
_DRIVER, _KERNELS = HERE / "driver.cpp", _ROOT / "csrc" / "cpu" / "isa_avx2.cpp"
_BUILT = HERE.parent / "results"
_COMPILER = os.environ.get("CXX", "c++")
#: What CMake adds of its own.
_FLAGS = ("-std=c++17", "-DNDEBUG", "-fPIC")


def why_not() -> str:
    """Why nothing can be counted here; empty where it can."""
    if platform.machine() != "x86_64":
        return f"AVX2 is not for {platform.machine()}"
    missing = [tool for tool in ("valgrind", _COMPILER) if not shutil.which(tool)]
    return f"{' and '.join(missing)} missing" if missing else ""


def compiler() -> str:
    """The compiler and its version, which the counts depend on."""
    said = subprocess.run([_COMPILER, "--version"], capture_output=True, text=True, check=True)
    return said.stdout.splitlines()[0].replace(_COMPILER, "", 1).strip()


def release(compiler: str) -> str:
    """What of a compiler decides: of GCC the first number (12.4 is within 1 % of 12.2, 13.3 as far as 7 % off)."""
    gcc = re.match(r"(?:\S+ )?\(.*?\) (\d+)\.", compiler)
    return f"GCC {gcc[1]}" if gcc else compiler


def count() -> dict[str, float]:
    """The instructions per element of each case of the driver."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        options = ("--tool=callgrind", "--zero-before=counted", "--dump-after=counted", f"--callgrind-out-file={out}")
        ran = subprocess.run(["valgrind", "--quiet", *options, _built()], capture_output=True, text=True, check=True)
        cases = dict(line.rsplit(maxsplit=1) for line in ran.stdout.splitlines())
        totals = [_total(out.with_suffix(f".{1 + number}")) for number in range(len(cases))]
    return {case: round(total / int(cases[case]), 3) for case, total in zip(cases, totals, strict=True)}


def _total(dump: Path) -> int:
    (line,) = re.findall(r"^totals: (\d+)$", dump.read_text(), re.MULTILINE)
    return int(line)


def _built() -> Path:
    """The driver, made where there is none of these sources, flags and compiler, of the kernels of the last build."""
    csrc = _ROOT / "csrc"
    sources = [_DRIVER, _KERNELS, *sorted(csrc.glob("*.h")), *sorted((csrc / "cpu").glob("*.[hi]*"))]
    flags = (*_FLAGS, *_flags_of_cmake())
    about = (compiler(), flags, *(source.read_text() for source in sources))
    driver = _BUILT / f"instructions-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"
    if not driver.exists():
        _BUILT.mkdir(exist_ok=True)
        unfinished = driver.with_suffix(f".{os.getpid()}")
        kernels = _from_the_build(sources) or _KERNELS
        subprocess.run([_COMPILER, *flags, str(_DRIVER), str(kernels), "-o", str(unfinished)], check=True)
        unfinished.rename(driver)
    return driver


def _from_the_build(sources: list[Path]) -> Path | None:
    """The kernels as they were compiled last in this tree, if by this compiler and of these sources."""
    changed = max(source.stat().st_mtime for source in [*sources, _ROOT / "CMakeLists.txt"])
    for built in _BUILD.glob(f"*/CMakeFiles/_core.dir/csrc/cpu/{_KERNELS.name}.o"):
        cache = (built.parents[4] / "CMakeCache.txt").read_text()
        (compiler,) = re.findall(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
        if built.stat().st_mtime > changed and os.path.samefile(compiler, str(shutil.which(_COMPILER))):
            return built
    return None


def _flags_of_cmake() -> list[str]:
    text = (_ROOT / "CMakeLists.txt").read_text()
    (everywhere,) = re.findall(r"target_compile_options\(_core PRIVATE (.*?) \$", text)
    (avx2,) = re.findall(r'isa_avx2\.cpp PROPERTIES COMPILE_OPTIONS "(.*?)"', text)
    return [*everywhere.split(), *avx2.split(";")]


def main() -> None:
    if reason := why_not():
        sys.exit(f"nothing can be counted here: {reason}")
    counts = count()
    if sys.argv[1:] == ["--write"]:
        KEPT.write_text(json.dumps({"compiler": compiler(), "instructions_per_element": counts}, indent=2) + "\n")
    for case, instructions in counts.items():
        print(f"{case:16} {instructions:8.3f}")


if __name__ == "__main__":
    main()
