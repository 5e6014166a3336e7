"""LoRA from disk to disk: adapters fused and combined, as processes, against PEFT's merge_and_unload and its svd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
from safetensors.torch import load_file, save_file

from fastmerge.checkpoint import open_checkpoint
from fastmerge.sweep import Run

_RANK, _ALPHA = 16, 32
_WEIGHTS, _DENSITY = (0.7, 0.5), 0.5
_METHODS = ("cat", "svd", "magnitude_prune_svd", "ties_svd", "dare_linear_svd")
_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MODULES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_PREFIX = "base_model.model."
_LOOKED_AT = disk.LOOKED_AT.removesuffix(".weight")


class Case(NamedTuple):
    """A base and two adapters of it."""

    folder: Path
    base: Path
    adapters: tuple[Path, Path]
    parameters: int
    nbytes: int  # of one adapter's weights


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
        one, two = (_write_adapter(Path(folder, f"adapter-{seed}"), models.base, seed) for seed in (1, 2))
        nbytes = (one / "adapter_model.safetensors").stat().st_size
        yield Case(Path(folder), models.base, (one, two), models.parameters, nbytes)


def _write_adapter(place: Path, base: Path, seed: int) -> Path:
    """An adapter of all linear layers, in float32 as PEFT trains it."""
    place.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, info in open_checkpoint(base).tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith(_MODULES):
            out, inputs = info.shape
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = torch.randn(_RANK, inputs, generator=generator) / inputs**0.5
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = torch.randn(out, _RANK, generator=generator) * 1e-2
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    names = sorted({module.rpartition(".")[2] for module in _MODULES})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": _ALPHA, "target_modules": names}
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("op", ["fuse"])
def test_fused_against_merge_and_unload(
    op: str, case: Case, run: Run, record: Callable[[Row], None], benchmark: Any, request: pytest.FixtureRequest
) -> None:
    out, theirs = case.folder / "fused", case.folder / "fused-by-peft"
    ours = [_command(), "lora", "fuse", str(case.base), str(case.adapters[0]), str(out), "--backend", "cpu"]
    ours += ["--threads", str(run.threads)]
    children = [disk.alone(ours, out, keep=True)]
    error, peer_error = _ulps(case, out), None
    peer = _peer(run, "fuse", case.base, case.adapters[0], theirs)
    if peer is not None:
        peer_error = _ulps(case, theirs)
        shutil.rmtree(theirs)
    rounds = max(3, request.config.getoption("rounds") // 3)
    benchmark.pedantic(
        lambda: children.append(disk.run_child(ours)), setup=lambda: disk.settle(out), rounds=rounds, warmup_rounds=1
    )
    children = children[-rounds:]
    nbytes = 4 * case.parameters + case.nbytes
    row = _row(op, case, "merge_and_unload", nbytes, children, peer, disk.peaks(children, run), error, peer_error)
    record(row)
    if peer is not None:
        times = Ratio.of([peer.child.seconds] * rounds, [child.seconds for child in children])
        record(row._replace(method="the same with imports", times=times, peer_seconds=peer.child.seconds))


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
    ours = [_command(), "lora", "combine", *map(str, case.adapters), str(out), "--method", method]
    ours += [f"--weights={','.join(map(str, _WEIGHTS))}", "--threads", str(run.threads)]
    ours += [] if method in ("cat", "svd") else ["--density", str(_DENSITY)]
    children = [disk.alone(ours, out, keep=True)]
    found = _delta(out)
    peer = _peer(run, method, case.base, *case.adapters, theirs, _DENSITY)
    if peer is not None and not method.startswith("dare"):  # whose drops are others
        expected = _delta(theirs / "both")
        apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        # PEFT rounds what is side by side to the dtype of the base.
        assert apart <= (2**-7 if method == "cat" else 1e-4), "not the product that PEFT has"
    if peer is not None:
        shutil.rmtree(theirs)
    rounds = max(3, request.config.getoption("rounds") // 3)
    benchmark.pedantic(
        lambda: children.append(disk.run_child(ours)), setup=lambda: disk.settle(out), rounds=rounds, warmup_rounds=1
    )
    children = children[-rounds:]
    peaks = {
        "anonymous_mb": max(child.anonymous_mb for child in children),
        "resident_mb": max(child.resident_mb for child in children),
    }
    record(_row(op, case, method, 3 * case.nbytes, children, peer, peaks, None, None))


def _row(
    op: str,
    case: Case,
    method: str,
    nbytes: int,
    children: list[disk.Child],
    peer: Peer | None,
    peaks: Mapping[str, float],
    error: float | None,
    peer_error: float | None,
) -> Row:
    seconds = [child.seconds for child in children]
    row = Row(
        op,
        f"{case.parameters / 1e6:.0f} M",
        method,
        "BF16" if op == "fuse" else "F32",
        median(seconds),
        nbytes / median(seconds) / 1e9,
        processors=median(child.spent / child.seconds for child in children),
        error_ulp=error,
        **peaks,
    )
    if peer is None:
        return row
    return row._replace(
        times=Ratio.of([peer.seconds] * len(seconds), seconds),
        against="as fast",
        peer=f"PEFT {peer.version}",
        peer_error_ulp=peer_error,
        peer_seconds=peer.seconds,
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
    exact = before + torch.from_numpy(_delta(case.adapters[0]))
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
