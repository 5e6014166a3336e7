"""What the benches from disk to disk share: models, recipes over them, results that are right, processes and floors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import accuracy
import ceiling
import numpy as np
from cases import MODELS, PARAMETERS, WEIGHTS, narrowed
from torch import Tensor

from fastmerge import Recipe, plan, reference
from fastmerge.checkpoint import Checkpoint, encode_header, open_checkpoint
from fastmerge.methods import METHODS, Base, Measured, ranks
from fastmerge.sweep import Inputs, Run, Sweep, View

LOOKED_AT = "model.layers.0.self_attn.q_proj.weight"  # the tensor on which results are compared

_WIDTHS = (  # at least so many parameters: hidden, inner, vocabulary
    (200e6, 2048, 5632, 32000),
    (10e6, 512, 1408, 8192),
    (1e6, 128, 352, 2048),
    (0, 64, 128, 500),
)


class Models(NamedTuple):
    """Where the synthetic models lie: a base and its fine-tunes, the same weights in each of their layers."""

    folder: Path
    base: Path
    tuned: tuple[Path, ...]
    parameters: int


class Child(NamedTuple):
    """What a process took."""

    seconds: float
    spent: float  # seconds of processors
    resident_mb: float  # ru_maxrss, mapped files included
    anonymous_mb: float  # the peak of RssAnon, looked at every few milliseconds; 0 where the system doesn't tell


# --- the models, and the recipe over them ---


def write_llamas(folder: Path, parameters: float) -> Models:
    """Llamas of about so many parameters."""
    hidden, inner, vocabulary = next(sizes for least, *sizes in _WIDTHS if parameters >= least)
    embedding, layer = vocabulary * hidden, 4 * hidden**2 + 3 * hidden * inner + 2 * hidden
    layers = max(1, round((parameters - embedding) / layer))
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        **{f"mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")},
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return write_models(folder, shapes, config)


def write_models(folder: Path, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Models:
    """A base and its fine-tunes with these tensors, written just now: in the page cache as far as it reaches."""
    base, *tuned = (folder / name for name in ("base", *(f"tuned-{number}" for number in range(1, MODELS + 1))))
    for number, place in enumerate((base, *tuned)):
        _write_model(place, number, shapes, config)
    return Models(folder, base, tuple(tuned), sum(int(np.prod(shape)) for shape in shapes.values()))


def _write_model(place: Path, number: int, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    """Model 0 is the base; a later one is it with small random deltas."""
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config))
    header, _ = encode_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"})
    weights: dict[str, np.ndarray] = {}
    with open(place / "model.safetensors", "wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            role = name.split(".", 3)[-1] if ".layers." in name else name
            if role not in weights:
                seed = len(weights)
                values = np.random.default_rng(seed).standard_normal(shape, np.float32) * np.float32(0.02)
                if number:
                    values += np.random.default_rng([seed, number]).standard_normal(shape, np.float32) * np.float32(
                        1e-3
                    )
                weights[role] = narrowed(values.ravel(), "BF16")
            file.write(weights[role].data)


def recipe_of(method: str, models: Models) -> Recipe:
    """What the bench in memory merges, as a recipe that mergekit takes too; JSON is YAML."""
    row = METHODS[method]
    tuned = models.tuned[: row.models[1]]
    named = [models.base, tuned[0]] if row.base is Base.ENDPOINT else tuned
    own = [p.name for p in row.parameters if p.per_model and p.name in ("weight", "density")]
    recipe = {
        "merge_method": method,
        "models": [
            {
                "model": str(path),
                "parameters": {name: WEIGHTS[i] if name == "weight" else PARAMETERS[name] for name in own},
            }
            for i, path in enumerate(named)
        ],
        "dtype": "bfloat16",
        "parameters": {"t": PARAMETERS["t"]} if row.parameter("t") else {},
    }
    if row.base is not Base.INPUT:
        recipe["base_model"] = str(models.base)
    return Recipe.parse(json.dumps(recipe, indent=1), method)


# --- results: right before they are timed ---


def checked(recipe: Recipe, out: Path) -> Tensor:
    """One tensor of our output, after asserting that it holds the reference's bits."""
    inputs, sweep, _owners = _job(recipe)
    merged = looked_at(open_checkpoint(out))
    accuracy.assert_bits(merged, inputs, sweep, "BF16")
    return merged


def error(merged: Tensor, recipe: Recipe) -> float:
    """The largest of a tensor against float64, in units of the last place."""
    inputs, sweep, _owners = _job(recipe)
    return accuracy.worst([accuracy.ulps(merged, accuracy.exact(inputs, sweep), inputs, "BF16")])


def looked_at(checkpoint: Checkpoint) -> Tensor:
    address, _owner = checkpoint.address(LOOKED_AT)
    return accuracy.tensor_in(View(address, "BF16"), checkpoint.tensors[LOOKED_AT].elements)


def _job(recipe: Recipe) -> tuple[Inputs, Sweep, list[object]]:
    """What the plan has for the tensor that is looked at, measured by the reference; and what keeps it mapped."""
    stage = plan(recipe).stages[0]
    job = next(job for job in stage.jobs if job.name == LOOKED_AT)
    owners: list[object] = []

    def view(source: Any) -> View:
        address, owner = stage.models[source.model].address(source.tensor)
        owners.append(owner)
        return View(address, "BF16")

    inputs = Inputs(int(np.prod(job.shape)), tuple(map(view, job.inputs)), view(job.base) if job.base else None)
    cuts = ()
    if job.method.selects:
        (cuts,) = reference.threshold([[inputs]], [ranks(job.settings, inputs.elements)], Run())
    gram = reference.gram([inputs], Run())[0].tolist() if job.method.gram else ()
    return inputs, job.method.sweep(job.settings, Measured(cuts, gram)), owners


# --- processes ---


def ours(recipe: Recipe, out: Path, run: Run, *options: str) -> list[str]:
    """Our command line."""
    path = out.with_name("recipe.yml")
    path.write_text(recipe.text)
    command = str(Path(sys.executable).with_name("fastmerge"))
    return [
        command,
        "merge",
        str(path),
        str(out),
        "--quiet",
        "--backend",
        "cpu",
        "--threads",
        str(run.threads),
        *options,
    ]


def read_by(recipe: Recipe) -> list[Path]:
    """The models that a recipe reads."""
    return [checkpoint.path for checkpoint in plan(recipe).stages[0].models]


def floor(recipe: Recipe, out: Path, run: Run, outputs: int = 1) -> list[str]:
    """The same bytes through the same reader and writer, fsync included, with no arithmetic."""
    ceiling.build()
    return [sys.executable, ceiling.__file__, str(run.threads), str(outputs), str(out), *map(str, read_by(recipe))]


def cat_and_cp(recipe: Recipe, out: Path) -> list[str]:
    """Every input to nowhere, then a file of the output's size to the output's folder; neither waits for the disk."""
    files = [str(file) for model in read_by(recipe) for file in sorted(model.glob("*.safetensors"))]
    # Where a file system can share blocks, cp would copy nothing.
    script = 'mkdir "$0" && cat "$@" > /dev/null && cp --reflink=never "$1" "$0"'
    return ["sh", "-c", script, str(out), *files]


def warm(recipe: Recipe) -> None:
    """Reads the inputs into the page cache: what a process of minutes beside them leaves there is not all of them."""
    for model in read_by(recipe):
        for path in model.glob("*.safetensors"):
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def settle(out: Path) -> None:
    """No output there, and nothing left to write back: that of one run must not be paid for by the next."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def alone(command: list[str], out: Path, keep: bool = False) -> Child:
    """Runs a command that writes to a folder, on a disk at rest."""
    settle(out)
    child = run_child(command)
    if not keep:
        shutil.rmtree(out)
    return child


def run_child(command: list[str]) -> Child:
    """Runs a command to its end and measures it."""
    done = threading.Event()
    anonymous = [0]
    with tempfile.TemporaryFile() as said:
        start = perf_counter()
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
        )
        watcher = threading.Thread(target=_watch, args=(process.pid, done, anonymous))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watcher.join()
        said.seek(0)
        assert process.returncode == 0, said.read()[-2000:].decode(errors="replace")
    return Child(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, anonymous[0] / 1e3)


def _watch(pid: int, done: threading.Event, peak: list[int]) -> None:
    """The largest RssAnon of a process, in kB."""
    while not done.wait(0.005):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        peak[0] = max(peak[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def peaks(children: Sequence[Child], run: Run) -> dict[str, float]:
    """The most memory that any of ours took, after asserting that a merge holds no model in it."""
    anonymous = max(child.anonymous_mb for child in children)
    most = 200 + 8 * run.threads
    assert anonymous <= most, f"{anonymous:.0f} MB of anonymous memory, where {most} are enough for any model"
    return {"anonymous_mb": anonymous, "resident_mb": max(child.resident_mb for child in children)}
