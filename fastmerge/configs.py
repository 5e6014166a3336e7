"""What config.json says: where those of the models differ, and what that of their merge must say otherwise."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .checkpoint import TensorInfo
from .errors import FastmergeWarning
from .layers import counts
from .recipe import DTYPES, Model


class Described(Protocol):
    """What is known of a model before its weights are read: of a `Checkpoint`, or of what a stage will write."""

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]


def warn_of_differences(models: Sequence[Described]) -> None:
    """Warns of what changes the maths between the first model and another, and of layers that its config miscounts."""
    first, *others = models
    numbers = [section.get(key) for section in _sections(first.config).values() for key in _COUNTS.split()]
    said, held = {n for n in numbers if isinstance(n, int)}, set(counts(first.tensors).values())
    if said and held and not said & held:
        speaks, are = (" and ".join(map(str, sorted(kinds))) for kinds in (said, held))
        fault = f"config.json of {first.name!r} speaks of {speaks} layers, and its tensors are of {are}"
        warnings.warn(fault, FastmergeWarning, stacklevel=2)
    for model in others:
        sections = _sections(model.config)
        differing = [
            f"{key} ({ours[key]!r} and {theirs[key]!r})"
            for name, ours in _sections(first.config).items()
            for theirs in (sections.get(name, {}),)
            for key in _MATHS.split()
            if key in ours and key in theirs and ours[key] != theirs[key]
        ]
        if differing:
            fault = f"the configs of {first.name!r} and {model.name!r} differ in {', '.join(differing)}"
            warnings.warn(f"{fault}; the first is kept", FastmergeWarning, stacklevel=2)


def changes(
    models: Mapping[Model, Described], layers: Mapping[str, Sequence[tuple[Model, int]]], dtypes: set[str]
) -> dict[str, Any]:
    """The keys of the first model's config that a merge changes, a nested config as a whole: counts of layers and lists
    that go by layer, for `layers` by stack and in order from a model's layer each; and the dtype, where it is one."""
    donor = next(iter(models.values()))
    config = copy.deepcopy(donor.config)
    depths = counts(donor.tensors) if layers else {}
    for stack, kept in layers.items():
        place = _counter(donor.config, stack, depths.get(stack, 0))
        if place is None:
            if len(kept) != depths.get(stack, 0):
                fault = f"no key of config.json counts the layers {stack!r} of {donor.name!r}"
                warnings.warn(f"{fault}; there are {len(kept)} now", FastmergeWarning, stacklevel=2)
            continue
        section, key = place
        values = _sections(config)[section]
        values[key] = len(kept)
        for name in _BY_LAYER:
            entries = [_entry(_sections(models[model].config).get(section, {}), name, layer) for model, layer in kept]
            if name in values and None not in entries:
                values[name] = entries
    if config and len(dtypes) == 1:
        config["dtype" if "dtype" in config else "torch_dtype"] = _WORDS[next(iter(dtypes))]
    return {key: value for key, value in config.items() if key not in donor.config or donor.config[key] != value}


def stated(config: dict[str, Any], key: str) -> Any:
    """The value of a key in a config or in one nested in it; None where there is none."""
    return next((section[key] for section in _sections(config).values() if key in section), None)


_COUNTS = "num_hidden_layers n_layer num_layers n_layers depth num_decoder_layers encoder_layers decoder_layers"
_BY_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers")  # lists with an entry per layer
_MATHS = (
    "model_type rope_theta rope_scaling rope_parameters partial_rotary_factor rms_norm_eps layer_norm_eps"
    " layer_norm_epsilon norm_eps hidden_act hidden_activation activation_function num_attention_heads"
    " num_key_value_heads n_head head_dim sliding_window attn_logit_softcapping final_logit_softcapping"
    " num_experts_per_tok"
)
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def _sections(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A config and those nested in it, such as text_config, by their key; its own is empty."""
    nested = {key: value for key, value in config.items() if key.endswith("_config") and isinstance(value, dict)}
    return {"": config, **nested}


def _counter(config: dict[str, Any], stack: str, count: int) -> tuple[str, str] | None:
    """Section and key that count the layers of a stack: where several would do, those that share a word with it."""
    sections = _sections(config).items()
    places = [(name, key) for name, section in sections for key in _COUNTS.split() if section.get(key) == count]
    words = set(re.findall(r"[^._]+", stack))
    sharing = [place for place in places if words & set(re.findall(r"[^._]+", ".".join(place)))]
    return next(iter(sharing + places), None)


def _entry(config: Mapping[str, Any], name: str, layer: int) -> Any:
    """The entry of a layer in a list of a config, None where there is none."""
    entries = config.get(name)
    return entries[layer] if isinstance(entries, list) and layer < len(entries) else None
