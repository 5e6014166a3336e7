"""LoRA adapters as PEFT saves them, read strictly: what is not understood is refused, for it may change the weights."""

from __future__ import annotations

import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import SINGLE, Checkpoint, TensorInfo, open_checkpoint
from ..checkpoint.header import CONVERT, looks_like, parse_json, read_small
from ..checkpoint.reader import names_in
from ..errors import CheckpointError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

#: What to do with an adapter that is refused.
FUSE = "fuse it into its base with PEFT's merge_and_unload, save that, and write its folder"


class Update(NamedTuple):
    """What an adapter adds to a module: scaling * `b` `a`, tensors of shapes [out, rank, 1 ...] and [rank, in, ...]; to
    its bias scaling * `bias` [out]. `magnitude` [out] is DoRA's. Of an embedding, out are its columns, in its rows."""

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float
    embedding: bool
    bias: TensorInfo | None
    magnitude: TensorInfo | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter; made by `open_adapter`.

    `trained_on` is the base that it names. `fan_in_fan_out` says that layers of which nothing else does store their
    weights as [in, out]. `saved` are the ends of the names of modules that PEFT keeps apart from what they are tied to
    (modules_to_save). `replaced` are the tensors of the base that others, of `weights`, take the place of.
    """

    name: str
    folder: Path
    commit: str | None
    weights: Checkpoint
    trained_on: str | None
    fan_in_fan_out: bool
    saved: tuple[str, ...]
    updates: tuple[Update, ...]
    replaced: Mapping[str, TensorInfo]


def open_adapter(folder: str | Path, *, name: str | None = None, commit: str | None = None) -> Adapter:
    """Opens a folder with adapter_config.json and adapter_model.safetensors; reads the one and the other's header.

    Raises CheckpointError for what is no sound LoRA adapter, and for what is not supported, by its name.
    """
    name, folder = name or str(folder), Path(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is no folder: an adapter is one, with {CONFIG} and {WEIGHTS} in it")
    if not all(os.path.lexists(folder / file) for file in (CONFIG, WEIGHTS)):
        raise CheckpointError(no_adapter(folder, names_in(folder)))
    config = _Config(folder / CONFIG)
    weights = open_checkpoint(folder / WEIGHTS)
    updates, replaced = _Tensors(folder / WEIGHTS, config).read(weights.tensors)
    said = config.trained_on, config.fan_in_fan_out, config.saved
    return Adapter(name, folder, commit, weights, *said, updates, replaced)


def no_adapter(where: str | Path, names: Sequence[str]) -> str:
    """Why what holds files of these names, but not the two of an adapter, is refused, with the remedy."""
    if CONFIG not in names and SINGLE in names:
        return f"{where} is a whole model, no adapter: list it as a model of its own"
    if WEIGHTS not in names and (pickles := [name for name in names if name.endswith((".bin", ".pt"))]):
        return f"{where} holds PyTorch files only ({', '.join(pickles)}): {CONVERT}"
    missing = " and no ".join(name for name in (CONFIG, WEIGHTS) if name not in names)
    return f"{where} holds no adapter: there is no {missing}; name the folder that PEFT saved"


# --- adapter_config.json ---

_REFUSED = {
    "alora_invocation_tokens": "it changes the weights for some tokens only",
    "arrow_config": "it chooses among adapters for each token",
    "enable_lora": "it changes parts of a fused layer",
    "kasa_config": "KaSA also takes something from the base",
    "layer_replication": "its base repeats layers",
    "megatron_config": "its layers are Megatron's",
    "monteclora_config": "its weights are drawn at random",
    "target_parameters": "which parameter a tensor is for is in the code of the model, not in its name",
    "trainable_token_indices": "it replaces single rows of the embeddings",
    "use_bdlora": "its factors are blocks of a diagonal",
    "use_qalora": "it adds to quantised groups",
}
#: Initialisations that take what they begin with out of the base.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Keys that say nothing about the weights beyond what the tensors do.
_WITHOUT_EFFECT = (
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode"
    " init_lora_weights layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core"
    " merge_weights peft_version qalora_group_size runtime_config target_modules velora_config"
)


class _Config:
    """What adapter_config.json says about the weights."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._said = _object(path)
        kind = self._said.pop("peft_type", None)
        if kind != "LORA":
            raise CheckpointError(f"{path}: peft_type is {kind!r}, and only 'LORA' is supported; {FUSE}")
        self.rank: int = self._take("r", _is_rank, "a whole number from 1 on")
        self.alpha: float = self._take("lora_alpha", _is_number, "a number")
        self._ranks = self._patterns("rank_pattern", _is_rank)
        self._alphas = self._patterns("alpha_pattern", _is_number)
        self.rslora, self.dora, self.bias, self.fan_in_fan_out = (
            bool(self._take(key, _is_flag, "true or false", False))
            for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
        )
        self._take("bias", ("none", "all", "lora_only").__contains__, "none, all or lora_only", "none")
        saved = tuple(self._take("modules_to_save", _are_names, "a list of names", []))
        self.saved: tuple[str, ...] = () if self._said.get("ensure_weight_tying") else saved
        for key in ("task_type", "revision"):
            self._take(key, lambda value: value is None or isinstance(value, str), "text or null")
        base = self._said.get("base_model_name_or_path")
        self.trained_on = base if isinstance(base, str) and base else None
        self._refuse_rest()

    def scaling(self, module: str) -> tuple[int, float]:
        """Rank and scaling of a module."""
        rank = next((rank for pattern, rank in self._ranks if pattern.match(module)), self.rank)
        alpha = next((alpha for pattern, alpha in self._alphas if pattern.match(module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def _take(self, key: str, sound: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
        value = self._said.pop(key, None)
        if value is None and default is not None:
            return default
        if not sound(value):
            raise CheckpointError(f"{self._path}: {key} is {value!r}, and must be {wanted}; mend it")
        return value

    def _patterns(self, key: str, sound: Callable[[Any], bool]) -> list[tuple[re.Pattern[str], Any]]:
        """Values by what matches the end of a module's name, from the name of a part on."""

        def sound_entries(value: Any) -> bool:
            return isinstance(value, dict) and all(map(sound, value.values()))

        entries = self._take(key, sound_entries, "an object of numbers", {})
        if slow := [pattern for pattern in entries if _is_slow(pattern)]:
            fault = f"{key} has the pattern {slow[0]!r:.200}, which may take forever to match"
            raise CheckpointError(f"{self._path}: {fault}; repeat no group in it, and use at most three of * + {{")
        try:
            return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in entries.items()]
        except (re.error, OverflowError, RecursionError) as error:
            fault = f"{key} has a pattern that is no regular expression ({error}); mend it"
            raise CheckpointError(f"{self._path}: {fault}") from None

    def _refuse_rest(self) -> None:
        start = self._said.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
            remedy = "save it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it"
            fault = f"init_lora_weights is {start!r}, which also changed the base that the adapter is for; {remedy}"
            raise CheckpointError(f"{self._path}: {fault}")
        for key, value in self._said.items():
            if key in _WITHOUT_EFFECT.split() or not value:
                continue
            if key in _REFUSED:
                raise CheckpointError(f"{self._path}: {key} is not supported ({_REFUSED[key]}); {FUSE}")
            raise CheckpointError(f"{self._path} has the key {key!r}, which is not known here; {FUSE}")


def _object(path: Path) -> dict[str, Any]:
    data = read_small(path)
    try:
        value = parse_json(data)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        reason = looks_like(data[:512]) or f"is no config of an adapter: {error!s:.500}; fetch it again"
        raise CheckpointError(f"{path} {reason}") from None
    return value


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_slow(pattern: str) -> bool:
    """Whether a group is repeated in it, or more than three things are: a name can then match in very many ways."""
    return re.search(r"\)[*+{]", pattern) is not None or sum(map(pattern.count, "*+{")) > 3


def _is_flag(value: Any) -> bool:
    return type(value) is bool


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# --- names ---

#: `default` stands for any name that PEFT may have given the adapter.
_PART = re.compile(
    r"(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(?:\.(?!(?:weight|bias)$)(?P<default>[^.]+))?(?P<end>\.weight|\.bias)?"
)
_PARTS = {
    ("A", ".weight"): "a",
    ("B", ".weight"): "b",
    ("B", ".bias"): "bias",
    ("embedding_A", None): "a",
    ("embedding_B", None): "b",
    ("magnitude_vector", None): "magnitude",
    ("magnitude_vector", ".weight"): "magnitude",
}
#: A module that is wrapped, and saved all the same.
_WRAPPED = re.compile(r"\.base_layer(?=\.(?:weight|bias)$)")
_FLOATS = ("F32", "F16", "BF16", "F64")


class _Tensors:
    """Sorts the tensors of an adapter by what they are for."""

    def __init__(self, file: Path, config: _Config) -> None:
        self._file, self._config = file, config

    def read(self, tensors: Mapping[str, TensorInfo]) -> tuple[tuple[Update, ...], dict[str, TensorInfo]]:
        parts: dict[tuple[str, bool], dict[str, TensorInfo]] = defaultdict(dict)
        replaced: dict[str, TensorInfo] = {}
        for info in tensors.values():
            if info.dtype not in _FLOATS:
                raise self._error(f"{info.name!r} is {info.dtype}, and an adapter's tensors are floating-point numbers")
            name = info.name.removeprefix("base_model.model.")
            if (match := _PART.fullmatch(name)) and (match["part"], match["end"]) in _PARTS:
                held, key = parts[match["module"], "embedding" in match["part"]], _PARTS[match["part"], match["end"]]
            else:
                held, key = replaced, _WRAPPED.sub("", name)
                if "lora_" in name:
                    raise self._error(f"{info.name!r} is no part of LoRA that is known here")
            if key in held:
                raise self._error(f"{held[key].name!r} and {info.name!r} are the same part")
            held[key] = info
        for (module, embedding), held in list(parts.items()):
            if held.keys() == {"magnitude"} and not embedding and (module, True) in parts:
                parts[module, True] |= parts.pop((module, False))
        if not parts and not replaced:
            raise self._error("it holds no tensors")
        return tuple(self._update(module, embedding, held) for (module, embedding), held in parts.items()), replaced

    def _update(self, module: str, embedding: bool, held: Mapping[str, TensorInfo]) -> Update:
        for part, other in (("a", "b"), ("b", "a")):
            if part not in held:
                lone = held.get(other) or next(iter(held.values()))
                raise self._error(f"{lone.name!r} is there without its lora_{part.upper()}")
        a, b = held["a"], held["b"]
        pair = len(a.shape) == len(b.shape) >= 2 and a.shape[0] == b.shape[1] and set(b.shape[2:]) <= {1}
        if not pair:
            raise self._error(f"{a.name!r} is {list(a.shape)} and {b.name!r} {list(b.shape)}, which have no product")
        rank, scaling = self._config.scaling(module)
        if rank != a.shape[0]:
            raise self._error(f"{a.name!r} has rank {a.shape[0]}, and {CONFIG} says {rank}")
        config = self._config
        for part, wanted, key in (("bias", config.bias, "lora_bias"), ("magnitude", config.dora, "use_dora")):
            if (part in held) != wanted:
                what = f"has a {part}" if part in held else f"has no {part}"
                raise self._error(f"{module!r} {what}, and {CONFIG} says {key}: {str(wanted).lower()}")
            if part in held and math.prod(held[part].shape) != b.shape[0]:
                raise self._error(f"{held[part].name!r} is {list(held[part].shape)}, and {b.name!r} {list(b.shape)}")
        return Update(module, a, b, scaling, embedding, held.get("bias"), held.get("magnitude"))

    def _error(self, fault: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {fault}; save it again with PEFT, or fetch it again")
