"""Checkpoints as bytes: safetensors headers, models read through mappings, outputs written in place."""

from .folder import STAGES
from .header import DTYPE_BITS, Header, TensorInfo, encode_header, read_header
from .layout import Layout, Shard, lay_out
from .reader import (
    INDEX,
    SINGLE,
    Checkpoint,
    naming_what_changed,
    no_model,
    open_checkpoint,
    same_bytes,
    shards_named,
)
from .sidecars import CARD, CONFIG, COPIED, GENERATION, sidecars, tokenizer_files
from .writer import Descriptor, Writer

__all__ = [
    "CARD",
    "CONFIG",
    "COPIED",
    "DTYPE_BITS",
    "GENERATION",
    "INDEX",
    "SINGLE",
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
    "naming_what_changed",
    "no_model",
    "open_checkpoint",
    "read_header",
    "same_bytes",
    "shards_named",
    "sidecars",
    "tokenizer_files",
]
