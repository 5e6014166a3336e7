"""Where each tensor of an output lies: its files, their headers and the bytes of each tensor, before any arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import xxhash

from .header import DTYPE_BITS, encode_header
from .reader import SINGLE


class Shard(NamedTuple):
    """One file to be: its name, its bytes up to the first tensor, where each tensor begins, and its size in bytes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


class Layout(NamedTuple):
    """All files of an output's weights; `weight_index` is the JSON beside them where there is more than one."""

    shards: tuple[Shard, ...]
    weight_index: dict[str, Any] | None

    @property
    def index_file(self) -> bytes | None:
        """The file with it."""
        return None if self.weight_index is None else json.dumps(self.weight_index, indent=2).encode() + b"\n"

    @property
    def hash(self) -> str:
        """Of all that it says."""
        state = xxhash.xxh3_128()
        for name, header, _, size in self.shards:
            state.update(f"{name} {size} ".encode() + header)
        return state.hexdigest()


def lay_out(outputs: Sequence[tuple[str, str, tuple[int, ...]]], shard_size: int) -> Layout:
    """Places (name, dtype, shape) tensors, in this order, into shards of at most `shard_size` bytes of tensors each.

    A tensor larger than that has a shard of its own. Inside a shard wider dtypes come first, so that each tensor is
    aligned to its dtype.
    """
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    sizes = [0]
    for output in outputs:
        nbytes = math.prod(output[2]) * DTYPE_BITS[output[1]] // 8
        if groups[-1] and sizes[-1] + nbytes > shard_size:
            groups.append([])
            sizes.append(0)
        groups[-1].append(output)
        sizes[-1] += nbytes
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        return Layout((_shard(SINGLE, groups[0], sizes[0]),), None)
    weight_map = {output[0]: name for name, group in zip(names, groups, strict=True) for output in group}
    return Layout(
        tuple(map(_shard, names, groups, sizes)), {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    )


def _shard(name: str, group: Sequence[tuple[str, str, tuple[int, ...]]], nbytes: int) -> Shard:
    header, offsets = encode_header(sorted(group, key=lambda output: -DTYPE_BITS[output[1]]), {"format": "pt"})
    return Shard(name, header, offsets, len(header) + nbytes)
