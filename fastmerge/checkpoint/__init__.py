"""Checkpoints as bytes: safetensors headers, models read through mappings, outputs written in place."""

from .header import DTYPE_BITS, Header, TensorInfo, encode_header, read_header
from .reader import Checkpoint, open_checkpoint, same_bytes
from .sidecars import sidecars
from .writer import STAGES, Descriptor, Layout, Shard, Writer, lay_out

__all__ = [
    "DTYPE_BITS",
    "STAGES",
    "Checkpoint",
    "Descriptor",
    "Header",
    "Layout",
    "Shard",
    "TensorInfo",
    "Writer",
    "encode_header",
    "lay_out",
    "open_checkpoint",
    "read_header",
    "same_bytes",
    "sidecars",
]
