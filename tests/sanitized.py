"""The provider `cpu` under the sanitizers of its compiler, in a process of its own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import driven
import pytest

#: Not optimised: at -O1 the templates take five times as long to compile, and some accesses are gone.
FLAGS = ("-O0", "-g1", "-Wall", "-Wextra", "-Wno-unused-parameter", "-fno-omit-frame-pointer")
KINDS = {"address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"), "thread": ("-fsanitize=thread",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:handle_sigbus=0",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
#: Half of what they take to compile is undefined behaviour, which is looked for in the same templates of isa_scalar.
WIDE = ("-fno-sanitize=undefined",)
ISAS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "isa_avx512": (*WIDE, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mbmi2", "-mfma", "-mf16c"),
        "isa_avx2": (*WIDE, "-mavx2", "-mfma", "-mf16c"),
    },
    "aarch64": {"isa_neon": WIDE},
}
REST = ("hands", "lowrank", "measure", "merge", "parallel", "ranked", "select")
#: What each is there for, in a program.
PLANTED = {
    "address": "int main(int n, char**) { int* a = new int[4]; int b = a[n + 3]; delete[] a; return b & 1; }",
    "thread": "#include <thread>\nint n;\n"
    "int main() { std::thread t([] { for (int i = 0; i < 999; ++i) ++n; });"
    " for (int i = 0; i < 999; ++i) ++n; t.join(); return 0; }",
}


@contextmanager
def provider(kind: str) -> Iterator[ModuleType]:
    """A `fastmerge.native` of its own, with all the instruction sets of this machine; under "thread" the scalar one
    alone, as what threads share is the same for all."""
    compiler = _compiler(kind)
    sources = {} if kind == "thread" else {**ISAS.get(platform.machine(), {}), "dispatch": ()}
    sources |= dict.fromkeys(("isa_scalar", *REST), ())
    only = ("-DFASTMERGE_ONLY=kernels_scalar",) if kind == "thread" else ()
    driver = driven.built(f"sanitized-{kind}", compiler, (*FLAGS, *KINDS[kind], *only), sources)
    with driven.provider([str(driver)], os.environ | OPTIONS) as native:
        yield native


def _compiler(kind: str) -> str:
    """One whose sanitizer sees what is planted; clang compiles these templates in a third of g++'s time."""
    folder = driven.BUILD / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"planted-{kind}.cpp"
    source.write_text(PLANTED[kind])
    for compiler in filter(shutil.which, ("clang++", "g++")):
        program = source.with_suffix(f".{compiler}")
        command = [compiler, "-O0", *KINDS[kind], "-pthread", str(source), "-o", str(program)]
        if subprocess.run(command, capture_output=True).returncode == 0 and _sees(program):
            return compiler
    pytest.skip(f"no clang++ and no g++ whose {KINDS[kind][0]} works here")


def _sees(program: Path) -> bool:
    ended = subprocess.run([program], env=os.environ | OPTIONS, capture_output=True)
    return ended.returncode != 0 and b"Sanitizer" in ended.stderr
