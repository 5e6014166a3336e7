"""Small models, merges of them, and the record of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors.torch import save_file

import fastmerge
from fastmerge import provenance
from fastmerge.checkpoint import open_checkpoint
from fastmerge.recipe import Recipe

SHAPES = {
    "model.embed_tokens.weight": (61, 24),
    "model.layers.0.mlp.up_proj.weight": (24, 40),
    "model.layers.0.norm.weight": (24,),
    "model.layers.1.mlp.up_proj.weight": (24, 40),
    "model.empty": (0, 3),
    "model.scalar": (),
    "model.wide.weight": (3, 90_001),
}


def models(*names: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """A base, when it is the first, and fine-tunes of it, each in a folder of its own."""
    rng = np.random.default_rng(7)
    base = {name: rng.standard_normal(shape) * 0.02 for name, shape in SHAPES.items()}
    for name in names:
        moved = {tensor: values + rng.standard_normal(values.shape) * 0.003 for tensor, values in base.items()}
        tensors = base if name == "base" else moved
        save(name, {tensor: torch.tensor(values).to(dtype) for tensor, values in tensors.items()})


def save(name: str, tensors: Mapping[str, torch.Tensor], **config: Any) -> None:
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2} | config))
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})


def merged(text: str, out: str = "out", **options: Any) -> provenance.Record:
    """A merge, and the record of it, of its first output where parameters vary."""
    report = fastmerge.merge(Recipe.parse(text), out, **options)
    return provenance.read(report.outputs[0])


def tree(data: bytes) -> str:
    """The hash that records have of a tensor: that of the hashes of each 32 KB."""
    pieces = [data[at : at + 32768] for at in range(0, len(data), 32768)]
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_128(piece).digest() for piece in pieces)).hexdigest()


def hashes(folder: Path) -> dict[str, str]:
    """By name, the hash of each tensor's bytes as they lie in the files."""
    held = open_checkpoint(folder)
    return {name: tree(held.file_of(name).read_bytes()[info.begin : info.end]) for name, info in held.tensors.items()}
