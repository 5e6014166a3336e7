"""Merges as processes in whose way something is put: faults of the system at any call, and signals at any moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

SOURCE = Path(__file__).parent / "faults" / "faults.cpp"

#: The command line, tensor by tensor, which ends by a timer of the system at whatever it is just doing: so long after
#: its start, or after it began to write (0: never).
PROGRAM = """
import signal, sys
signal.setitimer(signal.ITIMER_REAL, float(sys.argv.pop(1)))
from fastmerge import batches
from fastmerge.checkpoint import Writer, journal
batches.BATCH_JOBS = journal._TOGETHER = 1
enter, seconds = Writer.__enter__, float(sys.argv.pop(1))
def entered(writer):
    Writer.__enter__ = enter
    signal.setitimer(signal.ITIMER_REAL, seconds)
    return enter(writer)
if seconds:
    Writer.__enter__ = entered
signal.signal(signal.SIGINT, signal.default_int_handler)
from fastmerge.cli import main
main(prog_name="fastmerge")
"""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed.weight": (96, 64),
        **{f"model.layers.{n}.{part}.weight": (64, 48 + n) for n in range(layers) for part in ("up", "down")},
        **{f"model.layers.{n}.norm.weight": (64,) for n in range(layers)},
    }


BASED = "base_model: base\nmodels: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.4}}]\n"
RECIPES = {
    "linear": "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n",
    "ties": "merge_method: ties\nparameters: {density: 0.3}\n" + BASED,
    "dare_ties": "merge_method: dare_ties\nparameters: {density: 0.5}\n" + BASED,
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [model: b]\nparameters: {t: 0.3}\ndtype: bfloat16\n",
    "staged": "name: half\nmerge_method: task_arithmetic\n" + BASED + "---\n"
    "merge_method: linear\nmodels: [model: half, model: b]\nparameters: {weight: 1}\n",
}


class Ended(NamedTuple):
    """How a process ended: its exit code, negative where a signal ended it, and what it said."""

    code: int
    out: str
    err: str


def compiled(folder: Path) -> Path | None:
    """The layer of faults, compiled; None where that cannot be."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if sys.platform != "linux" or compiler is None:
        return None
    path = folder / "faults.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(path), "-ldl"], check=True)
    return path


def save_models(folder: Path, layers: int = 4) -> None:
    """base, a and b, and recipes for them."""
    rng = np.random.default_rng(0)
    for name in ("base", "a", "b"):
        place = folder / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(f'{{"model_type": "llama", "num_hidden_layers": {layers}}}')
        (place / "tokenizer.json").write_text("{}")
        tensors = {tensor: rng.standard_normal(shape, np.float32) for tensor, shape in shapes(layers).items()}
        save_file(tensors, place / "model.safetensors")
    for name, text in RECIPES.items():
        (folder / f"{name}.yml").write_text(text)


def merge(folder: Path, arguments: Sequence[str], **way: Any) -> Ended:
    """`fastmerge merge` in a folder, with what `command` puts in its way."""
    return command(folder, ["merge", *arguments, "--threads", "2"], **way)


def command(
    folder: Path,
    arguments: Sequence[str],
    *,
    layer: Path | None = None,
    fault: str = "",
    below: str = "out",
    start_timer: float = 0.0,
    timer: float = 0.0,
) -> Ended:
    """`fastmerge` in a folder: with a fault such as "pwrite 7 ENOSPC" on what lies below a folder of it, or ended by a
    timer so many seconds after its start, or after it began to write."""
    environment = {**os.environ, "FAULT_BELOW": str(folder / below)}
    if layer is not None and fault:
        environment |= {"LD_PRELOAD": str(layer), "FAULT": fault}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(start_timer), str(timer), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def inputs(folder: Path) -> dict[str, bytes]:
    return {name: data for model in ("base", "a", "b") for name, data in files(folder / model).items()}


def looks_whole(out: Path) -> bool:
    """Whether a loader would take a folder for a model."""
    return any((out / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def tensors_noted(out: Path) -> int:
    """How many tensors the journal of an unfinished output has."""
    journal, names = out / ".fastmerge-journal", set()
    for line in journal.read_bytes().split(b"\n")[1:] if journal.exists() else ():
        with suppress(ValueError):  # the last may be cut
            names.add(json.loads(line)[0])
    return len(names)


SIGNALS = {"KILL": -signal.SIGKILL, "INT": 130, "TERM": 143}
