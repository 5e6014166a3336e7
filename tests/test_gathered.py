"""Tensors whose rows are gathered: the bytes of the same merge of inputs that are stored as they come out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Memory, Tensors, compiled_core, decode
from safetensors.torch import save_file

from fastmerge import backends, gathered, measures
from fastmerge.batches import Batch, Reader
from fastmerge.pieces import Pieces, Room
from fastmerge.planner import Job, plan
from fastmerge.recipe import Recipe
from fastmerge.sources.rows import MEAN, PADDING, ZERO, Gather, RowMap
from fastmerge.sweep import Run, Target

NAME = "model.embed_tokens.weight"
BASED = "base_model: base\nmodels: [model: a, model: b]\n"
RECIPES = {
    "passthrough": "merge_method: passthrough\nmodels: [model: a]\n",
    "linear": "merge_method: linear\nmodels: [model: base, model: a, model: b]\nparameters: {weight: [0.2, 0.7]}\n",
    "ties": f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3}}\n",
    "ties-rescaled": f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3, rescale: linf}}\n",
    "dare_ties": f"merge_method: dare_ties\n{BASED}parameters: {{weight: 0.4, density: 0.6}}\n",
    "slerp": "merge_method: slerp\nbase_model: a\nmodels: [model: a, model: b]\nparameters: {t: 0.3}\n",
    "breadcrumbs": f"merge_method: breadcrumbs\n{BASED}parameters: {{weight: 0.7, density: 0.3, gamma: 0.2}}\n",
    "ram": f"merge_method: ram\n{BASED}parameters: {{epsilon: 0.01}}\n",
    "filter-wise": f"merge_method: model_stock\n{BASED}parameters: {{filter_wise: true}}\n",
    "della": f"merge_method: della\n{BASED}parameters: {{weight: 0.7, density: 0.3}}\n",
}
#: Sums over pieces: a gram's and a norm's last bits are not those of the whole.
SUMMED = ("slerp", "ties-rescaled")
HELD = {"base": "BF16", "a": "BF16", "b": "F32"}
TORCH = {"BF16": torch.bfloat16, "F32": torch.float32}
ROWS = 300


@pytest.fixture(params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        compiled_core()
    return str(request.param)


def maps(rng: np.random.Generator, size: int, models: int) -> list[RowMap]:
    """Maps with long runs, single rows, rows of others, zeros, means, and padding at their end."""
    made = []
    for own in range(models):
        model, row = np.full(size, own, np.int32), np.arange(size) % ROWS
        at = rng.choice(size // 2, 60, replace=False) + size // 4
        model[at] = rng.choice([ZERO, MEAN, *range(models)], len(at))
        row[at] = rng.integers(0, ROWS, len(at))
        means = tuple(tuple((m, int(rng.integers(ROWS))) for m in range(models) if m != own or models == 1) for _ in at)
        row[model == MEAN] = np.arange(np.count_nonzero(model == MEAN))
        model[-5:] = PADDING
        row[model == ZERO] = row[-5:] = 0
        made.append(RowMap(model, row.astype(np.int64), means))
    return made


def materialised(own: int, map_: RowMap, stored: list[np.ndarray]) -> np.ndarray:
    """The rows that a map means, one by one."""
    rows = np.zeros((map_.size, stored[own].shape[1]), np.float32)
    for at, (model, row) in enumerate(zip(map_.model, map_.row, strict=True)):
        if model >= 0:
            rows[at] = stored[model][row]
        elif model == MEAN:
            pairs = map_.means[row]
            rows[at] = sum((stored[m][r] for m, r in pairs), np.zeros_like(rows[at])) / np.float32(len(pairs))
    padding = map_.model == PADDING
    rows[padding] = rows[~padding].mean(0, dtype=np.float64)
    return rows


class Case:
    """A job on disk that gathers, and what its inputs are once they are gathered."""

    def __init__(self, recipe: str, width: int) -> None:
        rng = np.random.default_rng(width)
        held = {}
        for name, dtype in HELD.items():
            held[name] = torch.tensor(rng.standard_normal((ROWS, width)) * 0.02).to(TORCH[dtype])
            Path(name).mkdir()
            Path(name, "config.json").write_text(json.dumps({"vocab_size": ROWS}))
            save_file({NAME: held[name]}, Path(name, "model.safetensors"))
        (stage,) = plan(Recipe.parse(RECIPES[recipe])).stages
        names = [model.name for model in stage.models]
        stored = [held[name].to(torch.float32).numpy() for name in names]
        (job,) = stage.jobs
        size = ROWS + 45
        row_maps = maps(rng, size, len(names))
        own = [source.model for source in job.sources]
        shape = (size, width)
        self.job: Job = job._replace(
            shape=shape,
            infos=tuple(info._replace(shape=shape) for info in job.infos),
            gather=Gather(tuple(row_maps[model] for model in own), dict.fromkeys(range(len(names)), NAME)),
        )
        inputs = [(materialised(model, row_maps[model], stored).ravel(), "F32") for model in own]
        models = inputs if job.base is None else inputs[:-1]
        self.tensors = Tensors(models, None if job.base is None else inputs[-1])
        self.reader = Reader(stage.models, propagate=False)  # type: ignore[arg-type]
        self.elements = size * width


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("width", [24, 5, 1], ids=["aligned", "unaligned", "one-column"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_gathered_rows_merge_as_if_they_were_stored(recipe: str, width: int, backend: str) -> None:
    case = Case(recipe, width)
    backend = "torch" if case.job.direct else backend
    ops = backends.Ops(backend, case.reader.held(case.job), "cpu", {})
    outputs = [Memory(4 * case.elements) for _ in range(2)]
    targets = [[Target("F32", output.address)] for output in outputs]
    found = gathered.swept(case.job, case.reader, ops, {}, targets[0], Run(2), Room())
    stored = case.job._replace(gather=None)
    (wanted,) = measures.swept(Batch([stored], [case.tensors.inputs], []), ops, {}, [targets[1]], Run(2))
    for output in outputs:
        output.check_guards()
    merged, expected = (decode(output.bytes, "F32") for output in outputs)
    if recipe in SUMMED:
        np.testing.assert_allclose(merged, expected, rtol=0, atol=2**-23 * np.abs(expected).max())
    else:
        np.testing.assert_array_equal(merged, expected)
    assert found == wanted


def test_what_is_stored_row_after_row_is_read_where_it_lies() -> None:
    """One piece per run of rows, and no memory of ours for it."""
    case = Case("linear", 24)
    plain = RowMap(np.zeros(ROWS, np.int32), np.arange(ROWS))
    split = RowMap(np.ones(ROWS, np.int32), np.roll(np.arange(ROWS), 100))
    maps = tuple(split if source.model == 1 else plain for source in case.job.sources)
    job = case.job._replace(shape=(ROWS, 24), gather=Gather(maps, dict.fromkeys(range(3), NAME)))
    pieces = list(Pieces(job, case.reader, Room()))
    assert [(piece.inputs.begin, piece.inputs.elements) for piece in pieces] == [(0, 2400), (2400, 200 * 24)]
    assert not any(isinstance(owner, np.ndarray) for piece in pieces for owner in piece.owners)


def test_nan_is_found_at_its_place_in_the_output() -> None:
    case = Case("linear", 24)
    values = torch.zeros(ROWS, 24)
    values[7, 3] = torch.nan
    save_file({NAME: values}, Path("b", "model.safetensors"))
    (stage,) = plan(Recipe.parse(RECIPES["linear"])).stages
    reader, at = Reader(stage.models, propagate=False), 2  # type: ignore[arg-type]
    shift = RowMap(np.full(ROWS, at, np.int32), np.roll(np.arange(ROWS), 50))
    own = [RowMap(np.full(ROWS, model, np.int32), np.arange(ROWS)) for model in range(at)]
    job = stage.jobs[0]._replace(gather=Gather((*own, shift), dict.fromkeys(range(3), NAME)))
    output = Memory(4 * ROWS * 24)
    ops = backends.Ops("torch", reader.held(job), "cpu", {})
    found = gathered.swept(job, reader, ops, {}, [Target("F32", output.address)], Run(), Room())
    assert (found.nonfinite, found.first) == ((0, 0, 1), (-1, -1, 57 * 24 + 3))
    assert case.job.name == NAME
