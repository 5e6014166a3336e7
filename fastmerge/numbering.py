"""What a config says of layers by their numbers, made true of layers that are numbered anew."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Section = Mapping[str, Any]


def renumbered(section: Section, origins: Sequence[tuple[Section, int]]) -> tuple[dict[str, Any], list[str]]:
    """The keys of a section of a config that change where its layers are those of `origins` in turn, each a model's
    section and a number there; and the keys that no value makes true."""
    changes: dict[str, Any] = {}
    lost: list[str] = []
    for key in _lists(section):
        entries = [_entry(origin, key, layer) for origin, layer in origins]
        if None in entries:
            lost.append(key)
        else:
            changes[key] = entries
    for rule in _rules(section):
        flags = [rule.holds(origin, layer) for origin, layer in origins]
        if flags != [rule.holds(section, place) for place in range(len(flags))]:
            solved = rule.solve(flags)
            lost += [rule.key] if solved is None else []
            changes |= solved or {}
    for key, interval in _intervals(section):
        if any((layer - place) % interval for place, (_, layer) in enumerate(origins)):
            lost.append(key)
    return changes, lost + [key for key in _OTHERS if section.get(key)]


def kind(section: Section, layer: int) -> Hashable:
    """What a section says of a layer by its number."""
    return (
        *(str(_entry(section, key, layer)) for key in _lists(section)),
        *(rule.holds(section, layer) for rule in _rules(section)),
        *(layer % interval for _, interval in _intervals(section)),
    )


# --- lists with an entry per layer ---

_LISTS = (
    *("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers", "attn_type_list", "block_configs"),
    *("no_rope_layers", "activation_sparsity_pattern", "ffn_multipliers"),
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "num_query_heads", "moe_layer_freq"),  # or one
)


def _lists(section: Section) -> Iterator[str]:
    return (key for key in _LISTS if isinstance(section.get(key), list))


def _entry(section: Section, key: str, layer: int) -> Any:
    """The entry of a layer, None where there is none."""
    entries = section.get(key)
    return entries[layer] if isinstance(entries, list) and layer < len(entries) else None


# --- keys that hold of some layers ---


class _Rule(NamedTuple):
    """Of which layers a key holds, and what makes it hold of others: None where nothing does."""

    key: str
    holds: Callable[[Section, int], bool]
    solve: Callable[[list[bool]], dict[str, Any] | None]


_INDICES = (
    *("full_attn_idxs", "fullatt_block_indexes", "global_attn_indexes", "window_block_indices", "attn_layer_indices"),
    *("cross_attention_layers", "hybrid_layer_ids", "moe_layers"),
)
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
_UP_TO = ("moe_layer_end_index",)
_PERIODS = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))


def _rules(section: Section) -> Iterator[_Rule]:
    yield from (_listed(key) for key in _INDICES if isinstance(section.get(key), list))
    for key in _FIRST:
        windows = key == "max_window_layers"
        overruled = windows and (not section.get("use_sliding_window") or isinstance(section.get("layer_types"), list))
        if isinstance(section.get(key), int) and not overruled:
            yield _first(key, 0)
    yield from (_first(key, 1) for key in _UP_TO if isinstance(section.get(key), int))
    yield from (_periodic(*keys) for keys in _PERIODS if all(isinstance(section.get(key), int) for key in keys))
    if isinstance(section.get("mlp_only_layers"), list):
        yield _Rule("mlp_only_layers", _is_dense, _made_dense)


def _listed(key: str) -> _Rule:
    """The key lists the layers."""
    return _Rule(
        key,
        lambda section, layer: layer in (section.get(key) or ()),
        lambda flags: {key: [place for place, flag in enumerate(flags) if flag]},
    )


def _first(key: str, included: int) -> _Rule:
    """The key counts the layers, which are the first ones, or is the number of the last of them."""
    return _Rule(
        key,
        lambda section, layer: layer < (section.get(key) or 0) + included,
        lambda flags: {key: sum(flags) - included} if flags == sorted(flags, reverse=True) else None,
    )


def _periodic(period: str, offset: str) -> _Rule:
    """The keys are the distance from one of the layers to the next, and the first."""

    def holds(section: Section, layer: int) -> bool:
        return bool(section.get(period)) and layer % section[period] == section.get(offset)

    def solve(flags: list[bool]) -> dict[str, Any] | None:
        for length in range(1, len(flags) + 2):
            for start in range(length):
                if flags == [place % length == start for place in range(len(flags))]:
                    return {period: length, offset: start}
        return None

    return _Rule(period, holds, solve)


def _is_dense(section: Section, layer: int) -> bool:
    """Whether a layer has no experts: it is listed, or not the last of a step of layers."""
    step = section.get("decoder_sparse_step") or 1
    return layer in (section.get("mlp_only_layers") or ()) or (layer + 1) % step != 0


def _made_dense(flags: list[bool]) -> dict[str, Any]:
    return {"mlp_only_layers": [place for place, flag in enumerate(flags) if flag], "decoder_sparse_step": 1}


# --- keys that are kept, and hold where all layers move by whole intervals ---

_INTERVALS = {  # and the lists that are there in their stead
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "full_attention_interval": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "moe_layer_freq": "",
    "moe_layer_interval": "",
    "cross_layer_interval": "",
    "cross_attention_frequency": "",
}
_UNSAID = {"gemma2": {"sliding_window_pattern": 2}}  # what models of a type are built by and their configs leave out
_OTHERS = (
    *("attention_types", "hybrid_override_pattern", "num_kv_shared_layers", "deepstack_visual_indexes"),
    *("out_features", "out_indices", "depths"),
)


def _intervals(section: Section) -> Iterator[tuple[str, int]]:
    said = {**_UNSAID.get(str(section.get("model_type")), {}), **section}
    for key, instead in _INTERVALS.items():
        if isinstance(said.get(key), int) and said[key] > 1 and not isinstance(said.get(instead), list):
            yield key if key in section else instead, said[key]
