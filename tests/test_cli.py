"""The command line: what it prints and where, its exit codes, and that a user's mistake is one sentence."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fastmerge
from fastmerge import cli
from fastmerge.backends import OPS
from fastmerge.methods import METHODS

LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n"
TIES = "merge_method: ties\nbase_model: a\nmodels: [model: b]\nparameters: {weight: 1, density: 0.5}\n"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models, a and its fine-tune b, and recipes over them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    weights, deltas = np.random.default_rng(0).standard_normal((2, 4, 8, 16)).astype(np.float32)
    for name, values in (("a", weights), ("b", weights + deltas / 8)):
        save(name, {f"layers.{n}.w": values[n] for n in range(4)})
    Path("linear.yml").write_text(LINEAR)
    Path("ties.yml").write_text(TIES)


@pytest.fixture
def fastmerge_(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command, in this process: an exception that is no exit fails the test, as a traceback would."""

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments, prog_name="fastmerge")
        code = ended.value.code
        assert code is None or isinstance(code, int)
        return Ended(code or 0, *capsys.readouterr())

    return run


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fastmerge.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def save(name: str, tensors: Mapping[str, np.ndarray]) -> None:
    Path(name).mkdir()
    save_file(dict(tensors), Path(name) / "model.safetensors")


# --- merge ---


def test_merge_says_what_it_did(fastmerge_: Command) -> None:
    ended = fastmerge_("merge", "linear.yml", "out")
    assert (ended.code, ended.err) == (0, "")
    size = os.path.getsize("out/model.safetensors")
    line = rf"out: linear of 4 tensors, read 4\.1 kB, wrote {size / 1000:.1f} kB in \d+\.\d\d s \(\d+\.\d GB/s; .+\)\n"
    assert re.fullmatch(line, ended.out), ended.out
    a, b, merged = (load_file(f"{name}/model.safetensors")["layers.0.w"] for name in ("a", "b", "out"))
    np.testing.assert_array_equal(merged, a * np.float32(0.5) + b * np.float32(0.5))


def test_quiet_says_nothing(fastmerge_: Command) -> None:
    shutil.copyfile("a/model.safetensors", "b/model.safetensors")
    assert fastmerge_("merge", "ties.yml", "out", "--quiet") == (0, "", "")
    assert Path("out/model.safetensors").exists()


def test_quiet_still_tells_of_an_error(fastmerge_: Command) -> None:
    ended = fastmerge_("merge", "absent.yml", "out", "--quiet")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: cannot read the recipe 'absent.yml'")


def test_a_warning_is_told_and_the_merge_is_done(fastmerge_: Command) -> None:
    shutil.copyfile("a/model.safetensors", "b/model.safetensors")
    ended = fastmerge_("merge", "ties.yml", "out")
    assert ended.code == 0
    assert ended.err.startswith("warning: the base is identical to every model")
    assert ended.err.count("\n") == 1
    assert ended.out.startswith("out: ties of 4 tensors")


def test_overwrite_replaces_an_earlier_output(fastmerge_: Command) -> None:
    assert fastmerge_("merge", "linear.yml", "out", "--shard-size", "600").code == 0
    assert len(list(Path("out").glob("*.safetensors"))) == 4
    refused = fastmerge_("merge", "ties.yml", "out")
    assert refused.code == 2
    assert refused.err.startswith("error: out is not empty")
    assert refused.err.endswith("pass --overwrite\n")
    assert fastmerge_("merge", "ties.yml", "out", "--overwrite").code == 0
    assert [file.name for file in Path("out").glob("*.safetensors*")] == ["model.safetensors"]


def test_options_reach_the_engine(fastmerge_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("fastmerge.engine.merge", lambda *args, **options: seen.append((args, options)))
    assert fastmerge_("merge", "linear.yml", "out", "--quiet").code == 0
    options = "--quiet --backend torch --threads 3 --seed 9 --shard-size 2MB --gpu-memory 3GB --overwrite"
    options += " --restart --hash full --nonfinite propagate --vary weight=0.25,1e-3 --vary normalize=true"
    assert fastmerge_("merge", "linear.yml", "out", *options.split()).code == 0
    paths = (Path("linear.yml"), Path("out"))
    defaults = {
        "backend": "auto",
        "threads": None,
        "seed": None,
        "shard_size": 5_000_000_000,
        "gpu_memory": None,
        "overwrite": False,
        "restart": False,
        "hash": "fast",
        "nonfinite": "error",
        "vary": {},
        "progress": None,
    }
    given = {
        "backend": "torch",
        "threads": 3,
        "seed": 9,
        "shard_size": 2_000_000,
        "gpu_memory": 3_000_000_000,
        "overwrite": True,
        "restart": True,
        "hash": "full",
        "nonfinite": "propagate",
        "vary": {"weight": ["0.25", "1e-3"], "normalize": ["true"]},
        "progress": None,
    }
    assert seen == [(paths, defaults), (paths, given)]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("500mb", 5 * 10**8),
        ("1000", 1000),
        ("1000B", 1000),
        ("20k", 20_000),
        ("1.5 GB", 15 * 10**8),
        ("2T", 2 * 10**12),
    ],
)
def test_a_shard_size_is_a_number_and_a_unit(
    fastmerge_: Command, monkeypatch: pytest.MonkeyPatch, text: str, size: int
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("fastmerge.engine.merge", lambda *_, shard_size, **__: seen.append(shard_size))
    assert fastmerge_("merge", "linear.yml", "out", "--quiet", "--shard-size", text).code == 0
    assert seen == [size]


@pytest.mark.parametrize("option", ["--shard-size", "--gpu-memory"])
@pytest.mark.parametrize("text", ["", "0", "-5GB", "GB", "five", "5GiB", "5XB", "nan", "inf", "0.1", "1e999GB", "5GBB"])
def test_a_size_that_is_none_is_refused(fastmerge_: Command, text: str, option: str) -> None:
    ended = fastmerge_("merge", "linear.yml", "out", option, text)
    assert ended.code == 2
    assert f"{text!r} is not a size; write for example 5GB or 500MB" in ended.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("merge linear.yml out --backend gpu", "'gpu' is not one of"),
        ("merge linear.yml out --threads 0", "Invalid value for '--threads'"),
        ("merge linear.yml out --seed -1", "Invalid value for '--seed'"),
        ("merge linear.yml out --nonfinite no", "Invalid value for '--nonfinite'"),
        ("merge linear.yml", "Missing argument 'OUT'"),
        ("merge linear.yml out --fast", "No such option"),
        ("mrege linear.yml out", "No such command"),
        ("plan absent.yml", "cannot read the recipe 'absent.yml'"),
        ("plan a", "cannot read the recipe 'a'"),
        ("plan broken.yml", "broken.yml:"),
        ("plan unknown.yml", "unknown.yml:1"),
        ("plan missing.yml", "missing.yml:2: models[1].model: there is no"),
        ("merge missing.yml out", "missing.yml:2: models[1].model: there is no"),
        ("merge linear.yml a", "the output folder a is the input"),
        ("merge linear.yml a/inside", "is inside the input"),
        ("merge linear.yml linear.yml", "linear.yml cannot be written"),
        ("merge nan.yml out", "holds 1 NaN or Inf, the first at index 5; mend the model, or let them through with"),
        ("merge f64.yml out --backend cpu", "no backend merges F64 here"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(fastmerge_: Command, arguments: str, said: str) -> None:
    Path("broken.yml").write_text("models: [a\n  b: {\n")
    Path("unknown.yml").write_text("merge_metod: linear\n")
    Path("missing.yml").write_text(LINEAR.replace("model: b", "model: nowhere"))
    values = np.arange(8, dtype=np.float32)
    values[5] = np.nan
    save("nan", {"w": values})
    save("f64", {"w": np.ones(3)})
    for name in ("nan", "f64"):
        Path(f"{name}.yml").write_text(LINEAR.replace("model: a, model: b", f"model: {name}"))
    ended = fastmerge_(*arguments.split())
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert len([line for line in ended.err.splitlines() if line.lower().startswith("error: ")]) == 1
    assert not Path("out").exists()
    assert sorted(path.name for path in Path("a").iterdir()) == ["model.safetensors"]


def test_a_mistake_shows_no_traceback_in_a_process_of_its_own() -> None:
    ended = process("merge", "absent.yml", "out")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: cannot read the recipe 'absent.yml'")
    assert "Traceback" not in ended.stderr


def test_an_instruction_set_that_is_none_is_a_mistake() -> None:
    pytest.importorskip("fastmerge._core", reason="compiled core not built", exc_type=ImportError)
    ended = process("merge", "linear.yml", "out", FASTMERGE_ISA="mmx")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: FASTMERGE_ISA='mmx' cannot run: this build has no mmx kernels; here there ")
    assert not Path("out").exists()


def test_what_is_our_fault_is_exit_code_1() -> None:
    code = """
import sys, fastmerge.engine
def broken(*_, **__):
    raise RuntimeError("ours")
fastmerge.engine.merge = broken
from fastmerge.cli import main
main(["merge", "linear.yml", "out"])
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: ours\n")


def test_an_interrupt_is_exit_code_130(fastmerge_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmerge.engine.merge", interrupted)
    assert fastmerge_("merge", "linear.yml", "out") == (
        130,
        "",
        "stopped; nothing that looks complete was written, and the same command goes on from there\n",
    )


def test_on_a_terminal_there_is_a_bar() -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "fastmerge.cli", "merge", "linear.yml", "out"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, text=True, check=False, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError as error:
        assert error.errno == errno.EIO  # noqa: PT017  the end of a terminal
    os.close(ours)
    assert ended.returncode == 0
    assert b"merging" in seen
    assert ended.stdout.startswith("out: linear of 4 tensors")


# --- names from files ---


def test_names_that_would_steer_a_terminal_are_shown_as_escapes(fastmerge_: Command) -> None:
    values = np.full(3, np.nan, np.float32)
    save("evil\x1b[31m", {"w\x1b]0;title\x07\r\x9b": values})
    recipe = LINEAR.replace("model: a, model: b", r'model: "evil\e[31m"')
    Path("evil.yml").write_text(recipe)
    for arguments in (("merge", "evil.yml", "out"), ("plan", "evil.yml")):
        ended = fastmerge_(*arguments)
        assert r"evil\x1b[31m" in ended.out + ended.err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", ended.out + ended.err)


def test_a_stage_name_is_neither_markup_nor_an_escape(fastmerge_: Command) -> None:
    name = r'"\e[31m[red]x[/red]"'
    first = f"name: {name}\n{LINEAR}"
    Path("staged.yml").write_text(f"{first}---\n{LINEAR.replace('model: b', f'model: {name}')}")
    ended = fastmerge_("plan", "staged.yml")
    assert ended.code == 0
    assert r"\x1b[31m[red]x[/red]" in ended.out
    assert "\x1b" not in ended.out


def test_an_output_name_is_printed_with_escapes(fastmerge_: Command) -> None:
    ended = fastmerge_("merge", "linear.yml", "out\x1b[31m")
    assert ended.code == 0
    assert ended.out.startswith(r"out\x1b[31m: linear")


# --- many outputs ---


def test_vary_writes_a_folder_for_each_value(fastmerge_: Command) -> None:
    (Path("a") / "modeling.py").write_text("")
    ended = fastmerge_("merge", "ties.yml", "out", "--vary", "lambda=0.2, 1e-1", "--vary", "normalize=false")
    assert ended.code == 0
    assert ended.out.startswith("out: 2 outputs, ties of 4 tensors, read 4.1 kB, ")
    assert ended.out.count("\n") == 1
    assert ended.err.count("modeling.py") == 1, "a warning is told once"
    assert sorted(os.listdir("out")) == ["lambda=0.2,normalize=false", "lambda=1e-1,normalize=false"]
    for value in ("0.2", "1e-1"):
        recipe = Path("out", f"lambda={value},normalize=false", "mergekit_config.yml").read_text()
        assert f"parameters: {{normalize: false, lambda: {value}, weight: 1, density: 0.5}}" in recipe


@pytest.mark.parametrize("command", ["merge linear.yml out", "plan linear.yml"])
@pytest.mark.parametrize(
    ("vary", "message"),
    [
        (["weight"], "'weight' has no values; write for example lambda=0.2,0.4"),
        (["=1"], "'=1' has no values; write for example lambda=0.2,0.4"),
        (["weight=1", "weight=2"], "weight is given twice; write all of its values after one --vary"),
        (["weight=1,,2"], "weight=: a value is a number, true, false or a word"),
        (["t=0.5"], "t=0.5: linear has no parameter t; it has weight, normalize"),
    ],
    ids=["no-values", "no-name", "twice", "an-empty-one", "of-another-method"],
)
def test_a_mistake_in_vary_is_one_sentence(
    vary: Sequence[str], message: str, command: str, fastmerge_: Command
) -> None:
    ended = fastmerge_(*command.split(), *(word for text in vary for word in ("--vary", text)))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.rstrip().endswith(message)
    assert not Path("out").exists()


# --- plan ---


def test_plan_says_what_a_merge_would_move(fastmerge_: Command) -> None:
    ended = fastmerge_("plan", "linear.yml", "--shard-size", "600")
    assert (ended.code, ended.err) == (0, "")
    assert "  model 0: a\n  model 1: b\n" in ended.out
    cells = [cell.strip() for cell in next(line for line in ended.out.splitlines() if "linear" in line).split("│")]
    assert cells[1:3] + cells[5:6] == ["linear", "4", "4"]
    cells = [cell.strip() for cell in next(line for line in ended.out.splitlines() if "layers.*.w" in line).split("│")]
    assert cells[1:7] == ["layers.*.w", "x 4", "8 x 16", "F32", "2", "once"]
    assert not Path("out").exists()


def test_plan_lists_the_outputs_of_what_varies_and_reads_once(fastmerge_: Command) -> None:
    fastmerge_("merge", "linear.yml", "out")
    read, written = 2 * 4 * 8 * 16 * 4, Path("out/model.safetensors").stat().st_size
    ended = fastmerge_("plan", "linear.yml", "--vary", "weight=0.25,0.5", "--vary", "normalize=true,false")
    lines = ended.out.splitlines()[-5:]
    names = [f"weight={weight},normalize={flag}" for weight in ("0.25", "0.5") for flag in ("true", "false")]
    assert lines[:4] == [f"  output {name}: {written / 1000:.1f} kB" for name in names]
    assert lines[4].startswith(f"reads {read / 1000:.1f} kB, writes {4 * written / 1000:.1f} kB")
    made = json.loads(fastmerge_("plan", "linear.yml", "--json", "--vary", "weight=0.25,0.5").out)
    assert made["outputs"] == ["weight=0.25", "weight=0.5"]


def test_plan_as_json_is_the_whole_plan(fastmerge_: Command) -> None:
    shutil.copyfile("a/model.safetensors", "a/stray.safetensors")
    ended = fastmerge_("plan", "ties.yml", "--json", "--seed", "3")
    assert ended.code == 0
    plan = json.loads(ended.out)
    (stage,) = plan["stages"]
    assert plan["bytes_read"] == 2 * 4 * 8 * 16 * 4
    assert (stage["method"], stage["models"], stage["donor"]) == ("ties", ["a", "b"], "a")
    assert [job["name"] for job in stage["jobs"]] == [f"layers.{n}.w" for n in range(4)]
    job = stage["jobs"][0]
    assert job["base"] == {"model": "a", "tensor": "layers.0.w"}
    assert job["inputs"] == [{"model": "b", "tensor": "layers.0.w"}]
    assert (job["dtype"], job["shape"], job["method"]) == ("F32", [8, 16], "ties")
    assert job["model_parameters"] == [{"weight": 1.0, "density": 0.5}]


def test_plan_leaves_its_warnings_out_of_the_json(fastmerge_: Command) -> None:
    Path("filtered.yml").write_text(LINEAR.replace("0.5", "[{filter: nothing, value: 1}, {value: 0.5}]"))
    ended = fastmerge_("plan", "filtered.yml", "--json")
    assert json.loads(ended.out)["stages"]
    assert "the filter 'nothing' matches no tensor" in ended.err


# --- info and demo ---


def test_info_prints_who_runs_what(fastmerge_: Command) -> None:
    ended = fastmerge_("info")
    assert ended.code == 0
    for word in ("cpu", "torch", "gram", "norms", "threshold", "merge", "threads", "FASTMERGE_ISA"):
        assert word in ended.out
    assert f"fastmerge {fastmerge.__version__}" in ended.out


def test_info_tells_what_auto_takes_on_each_device(fastmerge_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is a backend, what it works on, its four ops, and why it is out."""
    pytest.importorskip("fastmerge.native", reason="compiled core not built", exc_type=ImportError)
    monkeypatch.setitem(sys.modules, "fastmerge.cuda", Gpu())
    monkeypatch.setattr("fastmerge.backends.ORDER", ORDER)
    monkeypatch.setitem(sys.modules, "fastmerge.kernels.provider", None)
    ended = fastmerge_("info")
    rows = {cells[0]: cells[1:6] for line in ended.out.splitlines() if len(cells := cells_of(line)) > 6 and cells[0]}
    assert rows["cpu"] == ["cpu", "auto", "auto", "auto", "can"]
    assert rows["torch"] == ["cpu", "can", "can", "can", "auto"]
    assert rows["cuda"] == ["gpu", "-", "auto", "auto", "auto"]
    assert rows["triton"] == ["gpu", "-", "-", "-", "-"]
    assert ["1", "Fast [card]", "80.0 GB"] in [cells_of(line) for line in ended.out.splitlines()]


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")]


ORDER = {
    "cpu": dict.fromkeys(OPS, ("cpu", "torch")) | {"merge": ("torch", "cpu")},
    "gpu": dict.fromkeys(OPS, ("cuda", "triton")) | {"gram": ("triton",)},
}


class Gpu(ModuleType):
    """A provider with two GPUs, as far as they are shown."""

    name, DTYPES = "cuda", frozenset({"F32"})

    def __init__(self) -> None:
        super().__init__("fastmerge.cuda")

    def why_not(self) -> str:
        return ""

    def devices(self) -> int:
        return 2

    def device(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(name="Fast [card]", free_bytes=lambda: 80_000_000_000)


def test_info_says_how_to_come_by_a_gpu_backend(fastmerge_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastmerge.cuda", None)
    ended = fastmerge_("info")
    said = " ".join(" ".join(cells_of(line)[6:]) for line in ended.out.splitlines() if len(cells_of(line)) > 6)
    assert "the CUDA module is not there" in said
    assert "(reinstall fastmerge where CUDA's compiler nvcc is)" in said


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_gpu_backend_that_is_out_is_one_sentence_with_the_remedy(
    fastmerge_: Command, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setitem(sys.modules, {"cuda": "fastmerge.cuda", "triton": "fastmerge.kernels.provider"}[backend], None)
    ended = fastmerge_("merge", "linear.yml", "out", "--backend", backend)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"error: backend {backend} cannot run: ")
    assert ended.err.count("\n") == 1
    assert not Path("out").exists()


def test_the_closing_line_tells_of_a_gpu_that_was_considered(
    fastmerge_: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    worked = {"cpu": ("threshold",), "cuda": ("threshold", "merge")}
    for considered, end in [
        (True, "; cpu (threshold) + cuda (threshold, merge), 2 threads); cuda: 25.0 GB/s over the bus of it\n"),
        (False, "; cpu (threshold) + cuda (threshold, merge), 2 threads)\n"),
    ]:
        why = "cuda: 25.0 GB/s over the bus of it"
        out = Path("out")
        report = fastmerge.Report(out, (out,), ("ties",), 4, 100, 50, 1.0, 0, worked, 2, why, considered, 3)
        monkeypatch.setattr("fastmerge.engine.merge", lambda *_, report=report, **__: report)
        assert fastmerge_("merge", "linear.yml", "out").out.endswith(end)


def test_info_says_why_a_backend_is_out(fastmerge_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fastmerge._core", "torch"):
        monkeypatch.setitem(sys.modules, module, None)
    ended = fastmerge_("info")
    assert ended.code == 0
    assert "the compiled core is not there" in ended.out
    assert "torch is not installed (pip install 'fastmerge[torch]')" in ended.out


def test_without_any_backend_a_merge_says_what_to_install(fastmerge_: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("fastmerge._core", "torch"):
        monkeypatch.setitem(sys.modules, module, None)
    ended = fastmerge_("merge", "linear.yml", "out")
    assert ended.code == 2
    assert "reinstall fastmerge with a C++17 compiler at hand" in ended.err
    assert "pip install 'fastmerge[torch]'" in ended.err
    assert not Path("out").exists()


def test_demo_merges_by_every_fused_method(fastmerge_: Command) -> None:
    ended = fastmerge_("demo", "models")
    assert (ended.code, ended.err) == (0, "")
    rows = {cells[1].strip(): cells for line in ended.out.splitlines() if len(cells := line.split("│")) > 4}
    fused = {name for name, row in METHODS.items() if not row.direct}
    assert rows.keys() == fused
    distances = {name: [float(cell) for cell in cells[4:8]] for name, cells in rows.items()}
    assert all(0 < distance < 0.2 for name, row in distances.items() for distance in row if name != "passthrough")
    assert distances["passthrough"][1] == 0
    assert {path.name for path in Path("models").iterdir()} == {"base", "code", "maths", "prose", *fused}
    shutil.rmtree("models")


# --- help ---


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["merge", "--help"], ["plan", "-h"], ["demo", "-h"]], ids=" ".join
)
def test_help_loads_nothing_but_itself(arguments: list[str]) -> None:
    code = """
import sys
from fastmerge.cli import main
try:
    main(sys.argv[1:], prog_name="fastmerge")
finally:
    heavy = {"torch", "triton", "numpy", "pydantic", "yaml", "rich", "safetensors", "fastmerge._core", "asyncio"}
    print("loaded:", sorted(heavy & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("Usage: fastmerge")
    assert ended.stdout.endswith("loaded: []\n")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc, where threads can be counted")
def test_a_merge_begins_no_threads_for_linear_algebra() -> None:
    """And leaves the choice of them to whatever is imported later. Python's own threads are not counted: one that was
    joined may still be seen."""
    code = """
import os
import threading
of_python = set()
threading.setprofile(lambda *_: of_python.add(str(threading.get_native_id())))
from fastmerge.cli import main
main(["merge", "linear.yml", "out", "--quiet", "--threads", "1"], standalone_mode=False)
print(len(set(os.listdir("/proc/self/task")) - of_python), "OPENBLAS_NUM_THREADS" in os.environ)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout == "1 False\n"


def test_help_names_every_command_and_its_options(fastmerge_: Command) -> None:
    text = fastmerge_("--help").out
    assert all(f"  {command} " in text for command in ("demo", "info", "merge", "multi", "plan", "yaml"))
    text = fastmerge_("merge", "--help").out
    for option in ["backend", "threads", "seed", "shard-size", "gpu-memory", "overwrite", "nonfinite", "quiet"]:
        assert f"--{option}" in text
    assert "5GB" in text


def test_the_version_is_printed(fastmerge_: Command) -> None:
    code, out, err = fastmerge_("--version")
    assert (code, err) == (0, "")
    assert out.startswith(f"fastmerge {fastmerge.__version__}")


def test_the_command_is_installed() -> None:
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="fastmerge")
    assert command.load() is cli.main
