"""The page of parity is of the table as it is: every method, variant, dtype and shape, each held against an oracle."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmerge.methods import METHODS

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def parity() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("parity")


def test_the_page_has_every_case(parity: Any) -> None:
    labels = [case.label for method in METHODS if method not in parity._OURS_ALONE for case in parity.cases(method)]
    rows = [line.split(" | ") for line in (BENCH / "parity.md").read_text().splitlines() if line.startswith("| ")]
    found = [(cells[0].removeprefix("| "), *cells[1:3]) for cells in rows[2:]]
    assert sorted(found) == sorted(product(labels, parity._NAMES.values(), parity._SHAPES))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "uniform_soup"])
def test_a_method_has_an_oracle_of_its_own(parity: Any, method: str) -> None:
    small = [model["vector"] for model in parity.family()]
    for case in parity.cases(method):
        if case.row.random:
            assert method in parity.RANDOM
        else:
            assert parity.exact(case, small).shape == (small[0].numel(),)


def test_no_two_deltas_are_equally_large(parity: Any) -> None:
    base, *models = parity.family()
    for name, model in product(base, models):
        magnitudes = (model[name] - base[name]).abs()
        assert len(torch.unique(magnitudes)) == magnitudes.numel(), name
        assert torch.equal(model[name].double() - base[name].double(), (model[name] - base[name]).double())
