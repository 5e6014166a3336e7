"""Whole merges from disk to disk, as processes: against the floor of reading and writing, and against mergekit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import accuracy
import ceiling
import numpy as np
import pytest
import torch
from cases import MODELS, PARAMETERS, WEIGHTS, narrowed
from conftest import Ratio, Row
from torch import Tensor

from fastmerge import Recipe, plan, reference
from fastmerge.checkpoint import Checkpoint, encode_header, open_checkpoint
from fastmerge.methods import METHODS, Base, Measured, ranks
from fastmerge.sweep import Inputs, Run, Sweep, Target, View

_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "passthrough")
_HIDDEN, _INNER, _VOCABULARY = 2048, 5632, 32000
_LOOKED_AT = "model.layers.0.self_attn.q_proj.weight"  # the tensor on which results are compared


class Models(NamedTuple):
    """Where the synthetic models lie: a base and its fine-tunes, the same weights in each of their layers."""

    folder: Path
    base: Path
    tuned: tuple[Path, ...]
    parameters: int


class Child(NamedTuple):
    """What a process took."""

    seconds: float
    resident_mb: float  # ru_maxrss, mapped files included
    anonymous_mb: float  # the peak of RssAnon, looked at every few milliseconds; 0 where the system doesn't tell


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> Iterator[Models]:
    """Written just now, so in the page cache as far as it reaches."""
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
        yield _write_models(Path(folder), int(request.config.getoption("params")))


@pytest.mark.parametrize("case", ["checkpoint"])
@pytest.mark.parametrize("op", ["disk"])
@pytest.mark.parametrize("method", _METHODS)
def test_against_the_floor(
    op: str,
    case: str,
    method: str,
    models: Models,
    run: Run,
    record: Callable[[Row], None],
    benchmark: Any,
    request: Any,
) -> None:
    recipe = _recipe(method, models)
    out = models.folder / "merged"
    children: list[Child] = []
    floors: list[Child] = []
    read = [checkpoint.path for checkpoint in plan(recipe).stages[0].models]
    ceiling.build()
    floor = [sys.executable, ceiling.__file__, str(run.threads), str(out), *map(str, read)]

    def before() -> None:
        floors.append(_alone(floor, out))
        _settle(out)

    def merge() -> None:
        children.append(_child(_ours(recipe, out, run)))

    _settle(out)
    merge()
    error = _error(_checked(recipe, out), recipe)
    rounds = max(3, request.config.getoption("rounds") // 3)
    benchmark.pedantic(merge, setup=before, rounds=rounds, warmup_rounds=1)
    ours, bare = [[child.seconds for child in each[-rounds:]] for each in (children, floors)]
    nbytes = 2 * models.parameters * (len(read) + 1)
    row = Row(
        op,
        f"{models.parameters / 1e6:.0f} M",
        method,
        "BF16",
        median(ours),
        nbytes / median(ours) / 1e9,
        nbytes / median(bare) / 1e9,
        Ratio.of(bare, ours),
        error_ulp=error,
        anonymous_mb=max(child.anonymous_mb for child in children),
        resident_mb=max(child.resident_mb for child in children),
    )
    benchmark.extra_info.update(gbps=row.gbps, ceiling_gbps=row.ceiling_gbps, share=row.share.median)
    record(row)


@pytest.mark.parametrize("case", ["checkpoint"])
@pytest.mark.parametrize("op", ["mergekit"])
@pytest.mark.parametrize("method", _METHODS)
def test_against_mergekit(
    op: str, case: str, method: str, models: Models, run: Run, record: Callable[[Row], None], benchmark: Any
) -> None:
    command = _mergekit()
    recipe = _recipe(method, models)
    ours, theirs = models.folder / "merged", models.folder / "merged-by-mergekit"
    children = [_alone(_ours(recipe, ours, run), ours, keep=True)]
    error = _error(_checked(recipe, ours), recipe)
    path = models.folder / "recipe.yml"
    path.write_text(recipe.text)
    peer = _alone([str(command), str(path), str(theirs), "--quiet", "-j", str(run.threads)], theirs, keep=True)
    peer_error = None if METHODS[method].random else _error(_tensor(open_checkpoint(theirs)), recipe)
    shutil.rmtree(theirs)
    benchmark.pedantic(
        lambda: children.append(_child(_ours(recipe, ours, run))),
        setup=lambda: _settle(ours),
        rounds=3,
        warmup_rounds=1,
    )
    seconds = [child.seconds for child in children[-3:]]
    nbytes = 2 * models.parameters * (len(plan(recipe).stages[0].models) + 1)
    row = Row(
        op,
        f"{models.parameters / 1e6:.0f} M",
        method,
        "BF16",
        median(seconds),
        nbytes / median(seconds) / 1e9,
        times=Ratio.of([peer.seconds] * 3, seconds),
        against="as fast",
        error_ulp=error,
        peer_error_ulp=peer_error,
        peer=f"mergekit {_version(command)}",
        anonymous_mb=max(child.anonymous_mb for child in children),
        resident_mb=max(child.resident_mb for child in children),
        peer_seconds=peer.seconds,
        peer_anonymous_mb=peer.anonymous_mb,
        peer_resident_mb=peer.resident_mb,
    )
    benchmark.extra_info.update(times=row.times.median, peer_seconds=peer.seconds)
    record(row)


# --- the models, and the recipe over them ---


def _write_models(folder: Path, parameters: int) -> Models:
    """Llamas of about so many parameters."""
    embedding, layer = _VOCABULARY * _HIDDEN, 4 * _HIDDEN**2 + 3 * _HIDDEN * _INNER + 2 * _HIDDEN
    layers = max(1, round((parameters - embedding) / layer))
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
        **{f"self_attn.{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"},
        **{f"mlp.{name}_proj": (_INNER, _HIDDEN) for name in ("gate", "up")},
        "mlp.down_proj": (_HIDDEN, _INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for number in range(layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in block.items()}
    shapes["model.norm.weight"] = (_HIDDEN,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    base, *tuned = (folder / name for name in ("base", *(f"tuned-{number}" for number in range(1, MODELS + 1))))
    for number, place in enumerate((base, *tuned)):
        _write_model(place, number, shapes, config)
    return Models(folder, base, tuple(tuned), sum(int(np.prod(shape)) for shape in shapes.values()))


def _write_model(place: Path, number: int, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> None:
    """Model 0 is the base; a later one is it with small random deltas."""
    place.mkdir()
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


def _recipe(method: str, models: Models) -> Recipe:
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


def _checked(recipe: Recipe, out: Path) -> Tensor:
    """One tensor of our output, after asserting that it holds the reference's bits."""
    inputs, sweep, _owners = _job(recipe)
    expected = np.full(inputs.elements * 2, 0xFF, np.uint8)
    reference.merge([inputs], [[sweep]], [[Target("BF16", expected.ctypes.data)]], Run())
    merged = _tensor(open_checkpoint(out))
    assert np.array_equal(merged.view(torch.uint8).numpy(), expected), "not the reference's bits"
    return merged


def _error(merged: Tensor, recipe: Recipe) -> float:
    inputs, sweep, _owners = _job(recipe)
    return accuracy.worst([accuracy.ulps(merged, accuracy.exact(inputs, sweep), inputs, "BF16")])


def _job(recipe: Recipe) -> tuple[Inputs, Sweep, list[object]]:
    """What the plan has for the tensor that is looked at, measured by the reference; and what keeps it mapped."""
    stage = plan(recipe).stages[0]
    job = next(job for job in stage.jobs if job.name == _LOOKED_AT)
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


def _tensor(checkpoint: Checkpoint) -> Tensor:
    address, _owner = checkpoint.address(_LOOKED_AT)
    return accuracy.tensor_in(View(address, "BF16"), checkpoint.tensors[_LOOKED_AT].elements)


# --- processes ---


def _ours(recipe: Recipe, out: Path, run: Run) -> list[str]:
    path = out.with_name("recipe.yml")
    path.write_text(recipe.text)
    command = str(Path(sys.executable).with_name("fastmerge"))
    return [command, "merge", str(path), str(out), "--quiet", "--backend", "cpu", "--threads", str(run.threads)]


def _mergekit() -> Path:
    """mergekit-yaml: FASTMERGE_MERGEKIT, or that of a virtual environment of its own in the repository."""
    beside = Path(__file__).parents[1] / ".venv-mergekit" / "bin" / "mergekit-yaml"
    command = Path(os.environ.get("FASTMERGE_MERGEKIT", beside))
    if not command.exists():
        pytest.skip(f"mergekit is not there: set FASTMERGE_MERGEKIT to mergekit-yaml, or install it at {beside}")
    return command


def _version(mergekit: Path) -> str:
    ask = "from importlib.metadata import version; print(version('mergekit'))"
    return subprocess.run(
        [str(mergekit.with_name("python")), "-c", ask], capture_output=True, text=True, check=True
    ).stdout.strip()


def _settle(out: Path) -> None:
    """No output there, and nothing left to write back: that of one run must not be paid for by the next."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()


def _alone(command: list[str], out: Path, keep: bool = False) -> Child:
    _settle(out)
    child = _child(command)
    if not keep:
        shutil.rmtree(out)
    return child


def _child(command: list[str]) -> Child:
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
    return Child(seconds, usage.ru_maxrss / 1e3, anonymous[0] / 1e3)


def _watch(pid: int, done: threading.Event, peak: list[int]) -> None:
    """The largest RssAnon of a process, in kB."""
    while not done.wait(0.005):
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        peak[0] = max(peak[0], *(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
