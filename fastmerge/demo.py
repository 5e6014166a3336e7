"""The demo: a small base with three fine-tunes, merged by every fused method, each result held against its parents."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from . import backends
from .checkpoint import Checkpoint, encode_header, open_checkpoint
from .engine import merge
from .methods import METHODS, Base
from .recipe import Recipe
from .sweep import Inputs, Part, Run, Sweep, View

_HIDDEN, _INNER, _LAYERS, _VOCABULARY = 512, 1536, 8, 8000
_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
_PARENTS = ("base", "code", "maths", "prose")
_PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "task_arithmetic": {"lambda": 0.5},
    "ties": {"density": 0.2},
    "breadcrumbs": {"density": 0.2, "lambda": 0.5},
    "breadcrumbs_ties": {"density": 0.2, "lambda": 0.5},
    "dare_linear": {"density": 0.5, "lambda": 0.5},
    "dare_ties": {"density": 0.5, "lambda": 0.5},
    "nearswap": {"t": 0.001},
    "slerp": {"t": 0.5},
}


def run(folder: Path | None, *, backend: str = "auto", threads: int | None = None) -> None:
    """Makes the models in `folder`, or in a temporary one that goes again, merges them and prints the table."""
    with _place(folder) as place:
        for number, name in enumerate(_PARENTS):
            _write(place / name, number)
        table = Table("method", "time", "GB/s", *(f"to {name}" for name in _PARENTS), title_justify="left")
        for method in (name for name, row in METHODS.items() if not row.direct):
            recipe = Recipe.parse(_recipe(method, place), method)
            report = merge(recipe, place / method, backend=backend, threads=threads, overwrite=True)
            merged = open_checkpoint(place / method)
            distances = [_distance(merged, open_checkpoint(place / name)) for name in _PARENTS]
            table.add_row(
                method,
                f"{report.seconds * 1e3:.0f} ms",
                f"{report.gigabytes_per_second:.1f}",
                *(f"{distance:.4f}" for distance in distances),
            )
        console = Console()
        size = f"{_parameters() / 1e6:.0f} M parameters in bf16"
        table.title = f"{size}; distance: L2 of the difference / L2 of the parent"
        console.print(table)
        if folder:
            console.print(f"the models are in {folder}", highlight=False)


def _recipe(method: str, place: Path) -> str:
    """A recipe over as many of the parents as the method takes; JSON is YAML."""
    row = METHODS[method]
    most = row.models[1] or len(_PARENTS)
    names = (_PARENTS if row.base is Base.ENDPOINT else _PARENTS[1:])[:most]
    weighted = row.parameter("weight") is not None
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(place / name), "parameters": {"weight": 1.0} if weighted else {}} for name in names],
        "parameters": _PARAMETERS.get(method, {}),
    }
    if row.base is not Base.INPUT:
        recipe["base_model"] = str(place / "base")
    return json.dumps(recipe)


def _shapes() -> dict[str, tuple[int, ...]]:
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (_HIDDEN,),
        "post_attention_layernorm": (_HIDDEN,),
        **{f"self_attn.{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"},
        "mlp.gate_proj": (_INNER, _HIDDEN),
        "mlp.up_proj": (_INNER, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (_VOCABULARY, _HIDDEN)}
    for number in range(_LAYERS):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (_HIDDEN,)}


def _parameters() -> int:
    return sum(int(np.prod(shape)) for shape in _shapes().values())


def _write(folder: Path, number: int) -> None:
    """A parent: the base's random weights, and for a fine-tune a small random delta on top."""
    folder.mkdir(parents=True, exist_ok=True)
    base, delta = np.random.default_rng(0), np.random.default_rng(number)
    header, _ = encode_header([(name, "BF16", shape) for name, shape in _shapes().items()], {"format": "pt"})
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        for shape in _shapes().values():
            weights = base.standard_normal(shape, np.float32) * 0.02 if len(shape) > 1 else np.ones(shape, np.float32)
            if number:
                weights = weights + delta.standard_normal(shape, np.float32) * 0.0019
            file.write(_bf16(weights).tobytes())
    (folder / "config.json").write_text(json.dumps(_CONFIG, indent=2) + "\n")


def _bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32, rounded to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _distance(merged: Checkpoint, parent: Checkpoint) -> float:
    """L2 of the difference over L2 of the parent, over all tensors."""
    provider = backends.choose("auto", {"BF16"})
    differences, parents, owners = [], [], []
    for name, info in parent.tensors.items():
        (here, owner), (there, other) = merged.address(name), parent.address(name)
        owners += [owner, other]
        differences.append(Inputs(info.elements, (View(here, "BF16"),), View(there, "BF16")))
        parents.append(Inputs(info.elements, (View(there, "BF16"),)))
    run = Run(backends.threads())
    everything = [Sweep((Part(),))] * len(differences)
    squares = [
        sum(float(norms[0, 0, 1]) ** 2 for norms in provider.norms(inputs, everything, run))
        for inputs in (differences, parents)
    ]
    return float(np.sqrt(squares[0] / squares[1]))


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fastmerge-demo-") as temporary:
        yield Path(temporary)
