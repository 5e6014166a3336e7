"""Instructions per element of the CUDA kernels' hot loops, read off the machine code for an H100: no card is needed.

Three models, and a base where the method has one, all bfloat16. A thread takes eight elements each time round; loops
within are counted once for each model, what is rare with them. By pipe, as what a processor starts in a clock differs:
128 lanes in all and of float32, 64 of whole numbers, comparisons and choices (`alu`). They are kept in sm_90.json,
which tests/test_instructions.py holds the kernels to. To keep new ones, on purpose:

    python bench/instructions/gpu.py --write
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
KEPT = HERE / "sm_90.json"
_CUDA = HERE.parent.parent / "csrc" / "cuda"
_BUILD = HERE.parent.parent / "build"
_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-arch=sm_90")
_MODELS, _EIGHT = 3, 8
_FLOAT, _MEMORY, _CONTROL = (
    ("FADD", "FMUL", "FFMA", "HFMA2", "IMAD"),
    ("LD", "ST"),
    ("B", "EXIT", "NOP", "YIELD", "WARP"),
)


class Loop(NamedTuple):
    """Where a case is: the file, the function's name as a pattern, how many inputs its loop reads."""

    file: str
    function: str
    reads: int


def _sweep(keep: int, elect: int, mass: int, reads: int) -> Loop:
    return Loop("merge", rf"sweep_kernel\w*KeepE{keep}\w*ElectE{elect}\w*MassE{mass}E", reads)


CASES = {
    "linear": _sweep(0, 0, 0, 3),
    "task_arithmetic": _sweep(0, 0, 0, 4),
    "ties": _sweep(1, 1, 1, 4),
    "ties, counted": Loop("guessed", r"guessed_kernel\w*MassE1E", 4),
    "dare_linear": _sweep(2, 0, 0, 4),
    "dare_ties": _sweep(2, 1, 1, 4),
}


def why_not() -> str:
    """Why nothing can be counted here; empty where it can."""
    missing = [tool for tool, path in (("nvcc", shutil.which("nvcc")), ("nvdisasm", _tool("nvdisasm"))) if not path]
    return f"{' and '.join(missing)} missing" if missing else ""


def compiler() -> str:
    """The release of nvcc, which the counts depend on."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    (release,) = re.findall(r"release ([\d.]+)", said.stdout)
    return f"nvcc {release}"


def _tool(name: str) -> str | None:
    """The toolkit's, or Triton's."""
    spec = importlib.util.find_spec("triton")
    folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else Path()
    return shutil.which(name) or shutil.which(folder / name)


def count() -> dict[str, dict[str, float]]:
    """Of each case the instructions per element: all of them, and those of each pipe."""
    code = {file: machine_code(file) for file in {loop.file for loop in CASES.values()}}
    return {case: _counted(code[loop.file], loop) for case, loop in CASES.items()}


def machine_code(file: str) -> str:
    """Of a file of kernels, for an H100."""
    with _compiled(file, "-xelf", "*.sm_90.cubin", "-cubin") as cubin:
        said = subprocess.run([str(_tool("nvdisasm")), "-c", str(cubin)], capture_output=True, text=True, check=True)
    return said.stdout


def ptx(file: str) -> str:
    """What machine code is made of, for an H100 or the newest card that is built for."""
    with _compiled(file, "-xptx", "*.ptx", "-ptx") as text:
        return text.read_text()


@contextmanager
def _compiled(file: str, extract: str, name: str, compile_to: str) -> Iterator[Path]:
    """A file of kernels as the last build in this tree has it, where there is one of these sources; or compiled."""
    with tempfile.TemporaryDirectory() as folder:
        _extract_from_the_build(file, extract, Path(folder))
        found = next(Path(folder).glob(name), Path(folder) / "compiled")
        if not found.exists():
            subprocess.run(["nvcc", *_FLAGS, compile_to, "-o", str(found), str(_CUDA / f"{file}.cu")], check=True)
        yield found


def _extract_from_the_build(file: str, what: str, folder: Path) -> None:
    changed = max(source.stat().st_mtime for source in _CUDA.parent.rglob("*.*"))
    built = [
        each for each in _BUILD.glob(f"*/CMakeFiles/_cuda.dir/csrc/cuda/{file}.cu.o") if each.stat().st_mtime > changed
    ]
    tool = _tool("cuobjdump")
    if built and tool:
        subprocess.run([tool, what, "all", str(built[0].resolve())], cwd=folder, stdout=subprocess.DEVNULL, check=True)


def _counted(code: str, loop: Loop) -> dict[str, float]:
    (function,) = [
        part for part in re.split(r"\n(?=//-+ \.text\.)", code) if re.match(rf"//-+ \.text\.\w*{loop.function}", part)
    ]
    lines, loops = _loops(function)
    hot = [each for each in loops if sum("LDGSTS" in lines[n] for n in each) == loop.reads and _is_swept(lines, each)]
    body = hot[0]  # a function that is called comes later
    within = {n for other in loops if set(other) < set(body) for n in other}
    pipes: Counter[str] = Counter()
    for n in body:
        pipes[_pipe(lines[n])] += _MODELS if n in within else 1
    return {name: round(each / _EIGHT, 2) for name, each in [("all", pipes.total()), *sorted(pipes.items())]}


def _is_swept(lines: list[str], loop: range) -> bool:
    return any("STG" in lines[n] for n in loop)


def _loops(function: str) -> tuple[list[str], list[range]]:
    """The instructions, and from where to where a branch goes back."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in function.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*)", line):
            lines.append(instruction[1])
    branches = [(n, found[1]) for n, line in enumerate(lines) if (found := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))]
    return lines, [range(labels[to], n + 1) for n, to in branches if labels[to] < n]


def _pipe(line: str) -> str:
    name = re.sub(r"^@!?U?P\w+\s+", "", line)
    if name.startswith(_MEMORY):
        return "memory"
    if name.startswith(_CONTROL):
        return "control"
    return "float" if name.startswith(_FLOAT) else "special" if name.startswith("MUFU") else "alu"


def main() -> None:
    if reason := why_not():
        sys.exit(f"nothing can be counted here: {reason}")
    counts = count()
    if sys.argv[1:] == ["--write"]:
        KEPT.write_text(json.dumps({"compiler": compiler(), "instructions_per_element": counts}, indent=2) + "\n")
    for case, pipes in counts.items():
        print(f"{case:16}", *(f"{name} {each:6.2f}" for name, each in pipes.items()))


if __name__ == "__main__":
    main()
