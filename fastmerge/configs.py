"""What config.json says: where those of the models differ, and what that of their merge must say otherwise."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

from .checkpoint import TensorInfo
from .errors import FastmergeWarning
from .layers import Stack, stacks
from .numbering import Section, kind, renumbered
from .recipe import DTYPES, Model


class Described(Protocol):
    """What is known of a model before its weights are read: of a `Checkpoint`, or of what a stage will write."""

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]


def warn_of_differences(models: Sequence[Described]) -> None:
    """Warns of what changes the maths between the first model and another, and of layers that its config miscounts."""
    first, *others = models
    said = {count for section in _sections(first.config).values() for key in _COUNTS for count in _counts(section, key)}
    held = {stack.depth for stack in stacks(first.tensors if said else ()).values()}
    if held and not said & held:
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
    """The keys of the first model's config that a merge changes, a nested config as a whole: counts of layers, and what
    is said of layers by their numbers, for `layers` by stack and in order from a model's layer each; and the dtype,
    where it is one. A FastmergeWarning names what stays as it is and holds no longer."""
    first, donor = next(iter(models.items()))
    config = copy.deepcopy(donor.config)
    sections = _sections(config)
    held = stacks(donor.tensors) if layers else {}
    for stack, kept in layers.items():
        if stack in held and kept == [(first, layer) for layer in range(held[stack].depth)]:
            continue
        places = _counters(donor.config, stack, held) if stack in held else {}
        if not places and (stack not in held or len(kept) != held[stack].depth):
            fault = f"no key of config.json counts the layers {stack!r} of {donor.name!r}"
            warnings.warn(f"{fault}; there are {len(kept)} now", FastmergeWarning, stacklevel=2)
        for name, keys in places.items():
            _renumber(models, name, sections[name], keys[0], stack, kept)
            sections[name].update(dict.fromkeys(keys, len(kept)))
    if config and len(dtypes) == 1:
        said = [(section, key) for section in sections.values() for key in ("dtype", "torch_dtype") if section.get(key)]
        for section, key in [*said, (config, "dtype" if "dtype" in config else "torch_dtype")]:
            section[key] = _WORDS[next(iter(dtypes))]
    return {key: value for key, value in config.items() if key not in donor.config or donor.config[key] != value}


def stated(config: dict[str, Any], key: str) -> Any:
    """The value of a key in a config or in one nested in it; None where there is none."""
    return next((section[key] for section in _sections(config).values() if key in section), None)


def restated(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The keys of a config that change where a key gets a value, in each place that states what the first one does; a
    nested config as a whole. Where none states it there is no change."""
    before, changed = stated(config, key), copy.deepcopy(config)
    for section in _sections(changed).values():
        if key in section and section[key] == before:
            section[key] = value
    return {name: now for name, now in changed.items() if config[name] != now}


_COUNTS = (
    *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth", "num_global_layers", "num_hidden_groups"),
    *("num_encoder_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "decoder_num_hidden_layers"),
)
_MATHS = (
    "model_type rope_theta rope_scaling rope_parameters partial_rotary_factor rms_norm_eps layer_norm_eps"
    " layer_norm_epsilon norm_eps hidden_act hidden_activation activation_function num_attention_heads"
    " num_key_value_heads n_head head_dim sliding_window attn_logit_softcapping final_logit_softcapping"
    " num_experts_per_tok"
)
_WORDS = {dtype: word for word, dtype in DTYPES.items()}


def _sections(config: dict[str, Any], path: str = "") -> dict[str, dict[str, Any]]:
    """A config and those nested in it, such as text_config, by their path; its own is empty."""
    found = {path: config}
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or "model_type" in value):
            found |= _sections(value, f"{path}.{key}" if path else key)
    return found


# --- layers ---


_TOWERS = {  # what is none of these reads text, and encodes where another part decodes
    **dict.fromkeys(("vision", "visual", "image", "vit"), "vision"),
    **dict.fromkeys(("audio", "speech"), "audio"),
    "decoder": "decoder",
    "qformer": "qformer",
}


def _tower(*names: str) -> set[str]:
    """Which part of a model some names tell of."""
    return {_TOWERS[word] for name in names for word in re.findall(r"[^._]+", name) if word in _TOWERS}


def _counts(section: Section, key: str) -> Sequence[int]:
    """How many layers a key counts: without and with those that predict further tokens, which come after them."""
    count, further = section.get(key), section.get("num_nextn_predict_layers")
    return (count, count + (further if isinstance(further, int) else 0)) if isinstance(count, int) else ()


def _counters(config: dict[str, Any], stack: str, held: Mapping[str, Stack]) -> dict[str, list[str]]:
    """The keys that count the layers of a stack, by their section: those of its part of the model, else those that are
    of no other part."""
    places = [
        (name, key)
        for name, section in _sections(config).items()
        for key in _COUNTS
        if held[stack].depth in _counts(section, key)
    ]
    others = [_tower(other) for other in held if other != stack]
    own = [place for place in places if _tower(*place) == _tower(stack)]
    found: dict[str, list[str]] = {}
    for name, key in own or [place for place in places if _tower(*place) not in others]:
        found.setdefault(name, []).append(key)
    return found


def _renumber(
    models: Mapping[Model, Described],
    name: str,
    section: dict[str, Any],
    count: str,
    stack: str,
    kept: Sequence[tuple[Model, int]],
) -> None:
    """Makes true what the section of this name says of layers by their numbers; warns where that is not possible."""
    said = {model: _sections(described.config).get(name, {}) for model, described in models.items()}
    donor = next(iter(models.values())).name
    changed, lost = renumbered(section, [(said[model], layer) for model, layer in kept])
    if lost:
        keys = ", ".join(f"{name}.{key}" if name else key for key in lost)
        fault = f"{keys} in config.json of {donor!r} goes by the numbers of layers, which are others now"
        warnings.warn(f"{fault}: set it in that of the result", FastmergeWarning, stacklevel=2)
    elif (place := _odd(models, section, section[count], stack, kept)) is not None:
        fault = f"layer {place} of {stack!r} will hold other tensors than in {donor!r}, and config.json does not say so"
        warnings.warn(f"{fault}: it may not load", FastmergeWarning, stacklevel=2)
    section.update(changed)
    if section.get("num_nextn_predict_layers"):
        section["num_nextn_predict_layers"] = 0  # they came after the layers, whose place others have now


def _odd(
    models: Mapping[Model, Described], section: Section, count: int, stack: str, kept: Sequence[tuple[Model, int]]
) -> int | None:
    """The first layer whose tensors are others than those of its number in the first model, beyond whose end all are
    like its last one. None where what is said of layers there tells which tensors they have."""
    held = {model: stacks(described.tensors).get(stack) for model, described in models.items()}
    ours = next(iter(held.values()))
    names = {} if ours is None else {number: frozenset(inside) for number, inside in ours.layers.items()}
    of_kind: dict[Hashable, set[frozenset[str]]] = {}
    for number in range(count):
        of_kind.setdefault(kind(section, number), set()).add(names.get(number, frozenset()))
    if all(len(sets) == 1 for sets in of_kind.values()):
        return None
    for place, (model, number) in enumerate(kept):
        theirs = held[model]
        if theirs is not None and names.get(min(place, count - 1)) != frozenset(theirs.layers.get(number, ())):
            return place
    return None
