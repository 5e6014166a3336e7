"""An adapter that is made here: its tensors, its config and card, written as a whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import memory, system
from ..cards import code, heading
from ..checkpoint import CARD, DTYPE_BITS, SINGLE, Checkpoint, Layout, Writer, lay_out, naming_what_changed
from ..errors import RecipeError
from ..marked import printable
from ..sources.adapter import CONFIG, WEIGHTS
from ..sources.lora import Adapted, widened
from .factors import Dense, Factors, Matrix, Product

PREFIX = "base_model.model."


class Fitted(NamedTuple):
    """A module of an adapter that was written: its rank, the Frobenius norm of what it was to be, and how far it is
    from that, relative to it, as it was rounded to its dtype."""

    module: str
    rank: int
    norm: float
    error: float


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What `combine` or `extract` wrote."""

    out: Path
    modules: tuple[Fitted, ...]
    whole: tuple[str, ...]  # tensors of the base that others take the place of
    left_out: tuple[str, ...]  # tensors of the base that would have to change, and do not
    bytes_written: int
    seconds: float

    @property
    def error(self) -> float:
        """The relative Frobenius error of all modules together."""
        norm = math.hypot(*(each.norm for each in self.modules))
        return math.hypot(*(each.norm * each.error for each in self.modules)) / norm if norm else 0.0


class _Tensor(NamedTuple):
    """A tensor to write: bytes in memory, or those of a model's tensor."""

    dtype: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8] | None
    model: Checkpoint | None = None
    name: str = ""


def check_rank(rank: int | None) -> None:
    """Raises RecipeError for one that no module can have."""
    if rank is not None and (not hasattr(rank, "__index__") or rank < 1):
        raise RecipeError(f"rank is {rank!r}, and must be a whole number from 1 on")


class NewAdapter:
    """An adapter while its modules are found; its factors are in memory until it is written."""

    def __init__(self, out: Path, models: Sequence[Checkpoint], *, inputs: Sequence[Path], overwrite: bool) -> None:
        self._started = time.perf_counter()
        self._out, self._models, self._inputs, self._overwrite = out, models, inputs, overwrite
        with self._writer(Layout((), None)):
            pass  # what stands in the way of the output shows before the work
        self._tensors: dict[str, _Tensor] = {}
        self._modules: dict[str, tuple[int, float]] = {}  # rank and alpha
        self._fitted: list[Fitted] = []
        self._whole: dict[str, None] = {}
        self._saved: list[str] = []  # modules_to_save
        self._bias = "none"

    def add(
        self,
        module: str,
        target: Product | Dense,
        factors: Factors,
        dtype: str,
        *,
        scaling: float = 1.0,
        embedding: bool = False,
        turned: bool = False,
        inputs: tuple[int, ...] | None = None,
    ) -> None:
        """A module whose delta is to be `target`, [out, in]; or [in, out] where it is an embedding or `turned`. The
        shape of its `inputs` says what a convolution has."""
        stored = [narrowed(each, dtype) for each in factors]
        left, right = (widened(raw, dtype).reshape(each.shape) for raw, each in zip(stored, factors, strict=True))
        distance = target.distance(Factors(left * np.float64(scaling), right))
        self._fitted.append(Fitted(module, factors.rank, target.norm, distance / target.norm if target.norm else 0.0))
        self._modules[module] = factors.rank, scaling * factors.rank
        a, b = (left.T, right.T) if embedding or turned else (right, left)
        inputs = a.shape[1:] if inputs is None else inputs
        names = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
        shapes = (factors.rank, *inputs), (*b.shape, *(1,) * (len(inputs) - 1))
        for part, values, shape in zip(names, (a, b), shapes, strict=True):
            self._put(f"{module}.lora_{part}", _Tensor(dtype, shape, narrowed(values, dtype)))

    def add_bias(self, module: str, values: Matrix, dtype: str) -> None:
        """What is added to the bias of a module, [out]."""
        rank, alpha = self._modules[module]
        scaling = alpha / rank
        self._put(f"{module}.lora_B.bias", _Tensor(dtype, values.shape, narrowed(values / scaling, dtype)))

    def keep(self, name: str, model: Checkpoint, tensor: str) -> None:
        """A tensor of the base that one of a model takes the place of."""
        module, _, last = name.rpartition(".")
        wrapped = f"{module}.base_layer.{last}" if module in self._modules else name
        info = model.tensors[tensor]
        if name not in self._whole:
            self._put(wrapped, _Tensor(info.dtype, info.shape, None, model, tensor))
            self._whole[name] = None
        if last == "bias" and module not in self._saved:
            self._bias = "all"

    def save_module(self, module: str) -> None:
        """Says that all tensors of a module are kept (modules_to_save), before they are."""
        if module not in self._saved:
            self._saved.append(module)

    @property
    def modules(self) -> Sequence[str]:
        """Those added so far."""
        return list(self._modules)

    def write(
        self,
        config: Mapping[str, Any],
        *,
        names: Sequence[str],
        command: Sequence[str],
        left_out: Sequence[str],
        files: Mapping[str, bytes],
    ) -> AdapterReport:
        """Writes all, `files` beside it. `names` are those of what it was made of, by a `command`.

        Raises CheckpointError where one of the models that it was made of changed meanwhile.
        """
        from .. import __version__

        layout = lay_out([(name, each.dtype, each.shape) for name, each in self._tensors.items()], sys.maxsize)
        said = _json({**self._config(), **config})
        nbytes = sum(shard.size for shard in layout.shards) + len(said)
        made = tuple(self._fitted), tuple(self._whole), tuple(left_out)
        report = AdapterReport(self._out, *made, nbytes, 0.0)
        card = _card(report, names, {**config}.get("base_model_name_or_path"), command, __version__)
        with self._writer(layout) as writer:
            for name, tensor in self._tensors.items():
                file, offset = writer.target(name)
                _store(tensor, offset, file)
            writer.written(self._tensors)
            for model in self._models:
                model.check_unchanged()
            writer.commit({**files, CONFIG: said, CARD: card})
            os.rename(self._out / SINGLE, self._out / WEIGHTS)
            system.sync(self._out)
        return replace(report, seconds=time.perf_counter() - self._started)

    def _writer(self, layout: Layout) -> Writer:
        return Writer(self._out, layout, inputs=self._inputs, overwrite=self._overwrite)

    def _put(self, name: str, tensor: _Tensor) -> None:
        self._tensors[PREFIX + name] = tensor

    def _config(self) -> dict[str, Any]:
        """adapter_config.json as PEFT has it, every module by its whole name."""
        ((rank, alpha), _), *_ = Counter(self._modules.values()).most_common(1) or [((1, 1), 0)]
        odd = [module for module, own in self._modules.items() if own != (rank, alpha)]
        # PEFT takes the first pattern that matches the end of a name: longer names go first, and those that end so too.
        ends = tuple(f".{module}" for module in odd)
        named = [module for module in self._modules if module in set(odd) or module.endswith(ends)]
        named.sort(key=len, reverse=True)
        return {
            "peft_type": "LORA",
            "inference_mode": True,
            "r": rank,
            "lora_alpha": _whole_number(alpha),
            "rank_pattern": {module: self._modules[module][0] for module in named},
            "alpha_pattern": {module: _whole_number(self._modules[module][1]) for module in named},
            "target_modules": list(self._modules),
            "modules_to_save": self._saved or None,
            "bias": self._bias,
            "lora_bias": any(name.endswith(".lora_B.bias") for name in self._tensors),
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
        }


def narrowed(values: Matrix, dtype: str) -> NDArray[np.uint8]:
    """The bytes of finite numbers in a dtype, rounded to nearest even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return np.ascontiguousarray(values, _NUMPY[dtype]).reshape(-1).view(np.uint8)


_NUMPY = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def read(model: Checkpoint, tensor: str, first: int = 0, count: int | None = None) -> Matrix:
    """Rows first ... of a tensor as a matrix [count, width] of float32, or of float64 where it is that."""
    info = model.tensors[tensor]
    rows, width = (info.shape or (1,))[0], math.prod(info.shape[1:])
    count = rows - first if count is None else min(count, rows - first)
    if isinstance(model, Adapted) and model.computed(tensor):
        made = np.empty((count, width), np.float64 if info.dtype == "F64" else np.float32)
        with naming_what_changed(model):
            model.fill(tensor, first, made)
        return made
    pitch = width * DTYPE_BITS[info.dtype] // 8
    raw = np.empty(count * pitch, np.uint8)
    address, owner = model.address(tensor)
    with naming_what_changed(model):
        memory.read(address + first * pitch, raw.data)
    del owner  # it was mapped until here
    return widened(raw, info.dtype).reshape(count, width)


_BLOCK = 1 << 20  # bytes or elements at a time


def _store(tensor: _Tensor, offset: int, file: int) -> None:
    if tensor.raw is not None:
        memory.write(tensor.raw.data, offset, file)
        return
    model, name = tensor.model, tensor.name
    assert model is not None
    if isinstance(model, Adapted) and model.computed(name):
        step = max(1, _BLOCK // max(1, math.prod(tensor.shape[1:])))
        for first in range(0, tensor.shape[0], step):
            raw = narrowed(read(model, name, first, step), tensor.dtype)
            memory.write(raw.data, offset, file)
            offset += raw.size
        return
    address, owner = model.address(name)
    nbytes = math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8
    raw = np.empty(min(_BLOCK, nbytes), np.uint8)
    for begin in range(0, nbytes, _BLOCK):
        part = raw[: min(_BLOCK, nbytes - begin)]
        with naming_what_changed(model):
            memory.read(address + begin, part.data)
        memory.write(part.data, offset + begin, file)
    del owner  # it was mapped until here


def _card(report: AdapterReport, names: Sequence[str], base: str | None, command: Sequence[str], version: str) -> bytes:
    """README.md, as the hub shows it."""
    matter = [f"base_model: {json.dumps(base)}"] if base else []
    worst = max(report.modules, key=lambda each: each.error)
    lines = [
        "---",
        *matter,
        "library_name: peft",
        "tags:",
        "- fastmerge",
        "- lora",
        "---",
        f"# {heading(report.out.resolve().name)}",
        "",
        f"A LoRA adapter made with fastmerge {version} of",
        "",
        *(f"- {code(name)}" for name in names),
        "",
        f"    {printable(shlex.join(['fastmerge', 'lora', *command]))}",
        "",
        f"Its {len(report.modules):,} modules are within {report.error:.3g} of what they were to be (relative "
        f"Frobenius error), {code(worst.module)} within {worst.error:.3g}.",
    ]
    left_out = ", ".join(map(code, report.left_out))
    lines += ["", f"Not in it, though it would have to change: {left_out}"] if left_out else []
    return ("\n".join(lines) + "\n").encode(errors="replace")


def _json(config: Mapping[str, Any]) -> bytes:
    return json.dumps(config, indent=2).encode() + b"\n"


def _whole_number(value: float) -> float:
    return int(value) if float(value).is_integer() else value
