"""LoRA from disk to disk: adapters fused, combined and extracted, as processes, against PEFT where it does the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import disk
import numpy as np
import pytest
import torch
from conftest import Ratio, Row
from host_marks import SVD, WHOLE
from safetensors.torch import load_file, save_file

from fastmerge.checkpoint import open_checkpoint
from fastmerge.sweep import Run

_RANK, _ALPHA = 16, 32
_WEIGHTS, _DENSITY = (0.7, 0.5), 0.5
_METHODS = ("cat", *SVD)
_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LAYERS = 1  # of the adapters that are combined or extracted: an svd of PEFT's takes seconds for each module
_PREFIX = "base_model.model."
_LOOKED_AT = disk.LOOKED_AT.removesuffix(".weight")


class Case(NamedTuple):
    """A base, an adapter of all its layers and two of the first alone."""

    folder: Path
    base: Path
    parameters: int
    adapter: Path
    few: tuple[Path, Path]
    changed: int  # parameters of the base to which these two add


class Peer(NamedTuple):
    """What PEFT took: by its own clock, without imports, and as a process."""

    seconds: float
    version: str
    child: disk.Child


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
        models = disk.write_llamas(Path(folder), request.config.getoption("params"))
        for unused in models.tuned:
            shutil.rmtree(unused)
        adapters = [Path(folder, name) for name in ("adapter", "one", "two")]
        changed = [_write_adapter(place, models.base, seed, bool(seed)) for seed, place in enumerate(adapters)]
        adapter, *few = adapters
        yield Case(Path(folder), models.base, models.parameters, adapter, (few[0], few[1]), changed[-1])


def _write_adapter(place: Path, base: Path, seed: int, few: bool) -> int:
    """An adapter of the linear modules of all layers or of a few, in float32 as PEFT trains it.

    Returns how many parameters it changes.
    """
    place.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    shapes = {
        module: info.shape
        for name, info in open_checkpoint(base).tensors.items()
        if (module := name.removesuffix(".weight")).endswith(_MODULES)
        and not (few and int(module.split(".")[2]) >= _LAYERS)
    }
    for module, (out, inputs) in shapes.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = torch.randn(_RANK, inputs, generator=generator) / inputs**0.5
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = torch.randn(out, _RANK, generator=generator) * 1e-2
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    names = sorted({module.rpartition(".")[2] for module in _MODULES})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": _ALPHA, "target_modules": names}
    layers = {"layers_to_transform": list(range(_LAYERS))} if few else {}
    (place / "adapter_config.json").write_text(json.dumps(config | layers))
    return sum(out * inputs for out, inputs in shapes.values())


@pytest.mark.parametrize("op", ["fuse"])
def test_fused_against_merge_and_unload(
    op: str, case: Case, run: Run, record: Callable[[Row], None], benchmark: Any, request: pytest.FixtureRequest
) -> None:
    out, theirs = case.folder / "fused", case.folder / "fused-by-peft"
    ours = [_command(), "lora", "fuse", str(case.base), str(case.adapter), str(out), "--backend", "cpu"]
    ours += ["--threads", str(run.threads)]
    disk.alone(ours, out, keep=True)
    error, peer_error = _ulps(case, out), None
    peer = _peer(run, "fuse", case.base, case.adapter, theirs)
    if peer is not None:
        peer_error = _ulps(case, theirs)
        shutil.rmtree(theirs)
    children = _measured(ours, out, benchmark, request)
    disk.peaks(children, run)
    nbytes = 4 * case.parameters + _nbytes(case.adapter)
    row = _row(op, case.parameters, "merge_and_unload", "BF16", nbytes, children)
    for each in _beside(row._replace(error_ulp=error, peer_error_ulp=peer_error), children, peer):
        record(each)


@pytest.mark.parametrize("op", ["combine"])
@pytest.mark.parametrize("method", _METHODS)
def test_combined_against_weighted_adapters(
    op: str,
    method: str,
    case: Case,
    run: Run,
    record: Callable[[Row], None],
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    out, theirs = case.folder / "both", case.folder / "both-by-peft"
    ours = [_command(), "lora", "combine", *map(str, case.few), str(out), "--method", method]
    ours += [f"--weights={','.join(map(str, _WEIGHTS))}", "--threads", str(run.threads)]
    ours += [] if method in ("cat", "svd") else ["--density", str(_DENSITY)]
    disk.alone(ours, out, keep=True)
    found = _delta(out)
    peer = _peer(run, method, case.base, *case.few, theirs, _DENSITY)
    if peer is not None and not method.startswith("dare"):  # whose drops are others
        expected = _delta(theirs / "both")
        apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        # PEFT rounds what is side by side to the dtype of the base.
        assert apart <= (2**-7 if method == "cat" else 1e-4), "not the product that PEFT has"
    if peer is not None:
        shutil.rmtree(theirs)
    children = _measured(ours, out, benchmark, request)
    row = _row(op, case.changed, method, "F32", 2 * _nbytes(case.few[0]) + _nbytes(out), children)
    for each in _beside(row, children, peer):
        record(each)


@pytest.mark.parametrize("op", ["extract"])
def test_extracted(
    op: str, case: Case, record: Callable[[Row], None], benchmark: Any, request: pytest.FixtureRequest
) -> None:
    """Out of a model that an adapter was fused into, and that differs from it by rounding to bf16."""
    tuned, out = case.folder / "tuned", case.folder / "extracted"
    disk.run_child([_command(), "lora", "fuse", str(case.base), str(case.few[0]), str(tuned)])
    ours = [_command(), "lora", "extract", str(case.base), str(tuned), str(out), "--rank", str(_RANK)]
    disk.alone(ours, out, keep=True)
    before, after = (load_file(each / "model.safetensors")[disk.LOOKED_AT].double() for each in (case.base, tuned))
    delta = (after - before).numpy()
    apart, rounded = (np.linalg.norm(delta - _delta(adapter)) for adapter in (out, case.few[0]))
    assert apart <= 1.1 * rounded, "further from the fine-tune than the adapter that was fused"
    children = _measured(ours, out, benchmark, request)
    record(_row(op, case.changed, f"rank {_RANK}", "BF16", 4 * case.parameters + _nbytes(out), children))


def _nbytes(adapter: Path) -> int:
    return (adapter / "adapter_model.safetensors").stat().st_size


def _measured(command: list[str], out: Path, benchmark: Any, request: pytest.FixtureRequest) -> list[disk.Child]:
    """Processes one after another, each on a disk at rest."""
    rounds = max(3, request.config.getoption("rounds") // 3)
    children: list[disk.Child] = []
    benchmark.pedantic(
        lambda: children.append(disk.run_child(command)), setup=lambda: disk.settle(out), rounds=rounds, warmup_rounds=1
    )
    return children[-rounds:]


def _row(op: str, parameters: int, method: str, dtype: str, nbytes: int, children: list[disk.Child]) -> Row:
    seconds = median(child.seconds for child in children)
    return Row(
        op,
        f"{parameters / 1e6:.0f} M",
        method,
        dtype,
        seconds,
        nbytes / seconds / 1e9,
        processors=median(child.spent / child.seconds for child in children),
        anonymous_mb=max(child.anonymous_mb for child in children),
        resident_mb=max(child.resident_mb for child in children),
    )


def _beside(row: Row, children: list[disk.Child], peer: Peer | None) -> Iterator[Row]:
    """Our processes beside what PEFT took by its own clock, and beside its whole process."""
    if peer is None:
        yield row
        return
    for variant, seconds in (("", peer.seconds), (WHOLE, peer.child.seconds)):
        yield row._replace(
            method=f"{row.method}{variant}",
            times=Ratio.of([seconds] * len(children), [child.seconds for child in children]),
            against="as fast",
            peer=f"PEFT {peer.version}",
            peer_seconds=seconds,
            peer_anonymous_mb=peer.child.anonymous_mb,
            peer_resident_mb=peer.child.resident_mb,
        )


# --- results: right before they are timed ---


def _factors(adapter: Path) -> tuple[np.ndarray, np.ndarray, float]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    a, b = (tensors[f"{_PREFIX}{_LOOKED_AT}.lora_{part}.weight"].double().numpy() for part in "AB")
    patterns = config.get("alpha_pattern") or {}
    return b, a, patterns.get(_LOOKED_AT, config["lora_alpha"]) / len(a)


def _delta(adapter: Path) -> np.ndarray:
    """What an adapter adds to the tensor that is looked at, in float64."""
    b, a, scaling = _factors(adapter)
    return scaling * b @ a


def _ulps(case: Case, fused: Path) -> float:
    """The largest error of the tensor that is looked at against float64, in units of the last place of bf16."""
    before, after = (load_file(folder / "model.safetensors")[disk.LOOKED_AT].double() for folder in (case.base, fused))
    exact = before + torch.from_numpy(_delta(case.adapter))
    _, exponent = torch.frexp(torch.maximum(exact.abs(), before.abs()))
    error = float(((after - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - 8)).max())
    assert error <= 2, "not the base with its adapter"
    return error


# --- processes ---


def _command() -> str:
    return str(Path(sys.executable).with_name("fastmerge"))


def _peer(run: Run, *arguments: object) -> Peer | None:
    """PEFT on the same, in a process of its own; None where there is none."""
    python = _python()
    if python is None:
        return None
    command = [python, str(Path(__file__).with_name("peft_peer.py")), str(run.threads), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder, "said")
        child = disk.run_child(["sh", "-c", 'exec "$@" > "$0"', str(said), *command])
        answer = json.loads(said.read_text().splitlines()[-1])
    return Peer(answer["seconds"], answer["version"], child)


@cache
def _python() -> str | None:
    """A Python with PEFT: FASTMERGE_PEFT, or this one."""
    python = os.environ.get("FASTMERGE_PEFT", sys.executable if find_spec("peft") else "")
    if not python:
        return None
    subprocess.run([python, "-c", "import peft, transformers"], check=True)
    return python
