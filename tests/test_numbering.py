"""Configs that speak of layers by their numbers, when the layers get others."""

from __future__ import annotations

from typing import Any

import pytest

from fastmerge.numbering import kind, renumbered

DENSE = {"mlp_only_layers": [0], "decoder_sparse_step": 2}  # layers 1 and 3 have experts


def renumber(section: dict[str, Any], *layers: int) -> tuple[dict[str, Any], list[str]]:
    return renumbered(section, [(section, layer) for layer in layers])


def said(value: object) -> str:
    """The part of a test's name that tells of a value."""
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items()) or "same"
    return "".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(
    ("section", "layers", "changes"),
    [
        ({"layer_types": list("abcd")}, (1, 2, 2), {"layer_types": ["b", "c", "c"]}),
        ({"intermediate_size": [4, 5, 6]}, (2, 0), {"intermediate_size": [6, 4]}),
        ({"intermediate_size": 4}, (2, 0), {}),
        ({"full_attn_idxs": [1, 3]}, (1, 2, 3, 3), {"full_attn_idxs": [0, 2, 3]}),
        ({"moe_layers": [1, 3]}, (0, 2), {"moe_layers": []}),
        ({"first_k_dense_replace": 2}, (1, 2, 3), {"first_k_dense_replace": 1}),
        ({"first_k_dense_replace": 2}, (2, 3), {"first_k_dense_replace": 0}),
        ({"first_k_dense_replace": 2}, (0, 1, 3), {}),
        ({"moe_layer_end_index": 2}, (0, 1, 2, 2), {"moe_layer_end_index": 3}),
        ({"moe_layer_end_index": -1}, (0, 1, 2, 2), {}),
        ({"max_window_layers": 2, "use_sliding_window": True}, (1, 2), {"max_window_layers": 1}),
        ({"max_window_layers": 2, "use_sliding_window": False}, (1, 2), {}),
        (
            {"attn_layer_period": 4, "attn_layer_offset": 3},
            (1, 2, 3, 4, 5, 6, 7),
            {"attn_layer_period": 4, "attn_layer_offset": 2},
        ),
        ({"attn_layer_period": 4, "attn_layer_offset": 3}, (0, 1), {}),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, (2, 3), {"attn_layer_period": 3, "attn_layer_offset": 2}),
        (DENSE, (1, 2, 3), {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
        (DENSE, (0, 1, 2, 3), {}),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, (1, 2, 2), {}),
        ({"sliding_window_pattern": 2}, (0, 1, 2, 3, 2, 3), {}),
        ({"sliding_window_pattern": 2, "layer_types": list("ab")}, (1,), {"layer_types": ["b"]}),
        ({"model_type": "gemma2"}, (2, 3), {}),
    ],
    ids=said,
)
def test_what_changes(section: dict[str, Any], layers: tuple[int, ...], changes: dict[str, Any]) -> None:
    changed, lost = renumber(section, *layers)
    assert (changed, lost) == (changes, [])
    after = {**section, **changed}
    assert [kind(after, place) for place in range(len(layers))] == [kind(section, layer) for layer in layers]


@pytest.mark.parametrize(
    ("section", "layers", "key"),
    [
        ({"layer_types": ["a"]}, (0, 1), "layer_types"),
        ({"first_k_dense_replace": 1}, (1, 0), "first_k_dense_replace"),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, (0, 1, 1, 2), "attn_layer_period"),
        ({"sliding_window_pattern": 2}, (1, 2), "sliding_window_pattern"),
        ({"model_type": "gemma2"}, (1, 2), "layer_types"),
        ({"num_kv_shared_layers": 2}, (0, 1), "num_kv_shared_layers"),
    ],
    ids=said,
)
def test_what_no_value_makes_true(section: dict[str, Any], layers: tuple[int, ...], key: str) -> None:
    assert renumber(section, *layers) == ({}, [key])


def test_layers_bring_what_their_own_model_says_of_them() -> None:
    ours, theirs = ({"layer_types": [word] * 2, "full_attn_idxs": idxs} for word, idxs in (("a", []), ("b", [1])))
    assert renumbered(ours, [(ours, 1), (theirs, 1)]) == ({"layer_types": ["a", "b"], "full_attn_idxs": [1]}, [])
    assert renumbered(ours, [(ours, 0), ({}, 0)]) == ({}, ["layer_types"])
