"""Writes parity.md: every method that mergekit has too, its results beside mergekit's and both beside float64.

    python bench/parity.py [--mergekit PATH] [--methods ties,slerp]

mergekit runs in a process of its own (`mergekit_peer.py`), by its in-memory interface, in the tensors' own dtype; ours
merges checkpoints of the same tensors. With `--methods` those are printed, and parity.md stays as it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import accuracy
import numpy as np
import torch
from cases import TORCH
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastmerge
from fastmerge.methods import METHODS, Base, Method
from fastmerge.recipe import Recipe
from fastmerge.sweep import Inputs, View

_HERE = Path(__file__).parent
sys.path.append(str(_HERE.parent / "tests"))
oracles = importlib.import_module("oracles")

Array = np.ndarray
#: The base of a tensor, its models, the settings of the case.
Oracle = Callable[[Array, Sequence[Array], Mapping[str, Any]], Array]

_PAGE = _HERE / "parity.md"
_PEER = _HERE / "mergekit_peer.py"
#: Runs the peer with drops that are the same each time.
_SEEDED = """
import runpy, sys, torch, mergekit.merge_methods
torch.manual_seed(1)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_SETTING = "FASTMERGE_MERGEKIT"
_SHAPES = {"vector": (97,), "matrix": (64, 96), "embedding": (1000, 32), "large": (512, 768)}
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MODELS = 3  # and a base
_OURS_ALONE = ("uniform_soup",)
_WEIGHTS = (0.6180339, 0.3141592, 0.2718281)  # no sum or difference of them cancels by chance
_COMMON = {"weight": _WEIGHTS, "density": 0.5, "t": 0.3}  # mergekit draws with the density in the dtype: all hold 0.5
_OWN: Mapping[str, Mapping[str, Any]] = {
    "breadcrumbs": {"gamma": 0.05},
    "breadcrumbs_ties": {"gamma": 0.05},
    "nearswap": {"t": 0.001},
    "ram": {"epsilon": 0.001},
    "ramplus_tl": {"epsilon": 0.001},
}
#: More of a method than its defaults.
_VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "model_stock": [{"filter_wise": True}],
    "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "passthrough": [{"scale": 0.7}],
    "sce": [{"select_topk": 0.3}],
    "ties": [{"rescale": True}],
}
_COLUMNS = (
    *("method", "dtype", "shape", "differing", "ulp apart", "of the largest", "our error", "mergekit's error"),
    *("ours, sigma: share, mean, norm", "mergekit, sigma", ""),
)
_ULPS, _OF_LARGEST = 4, 1e-6
_FARTHER = 0.01  # ulp
_SIGMAS, _DRAWS = 5, 100


class Case(NamedTuple):
    """A method with its settings: those per model are tuples."""

    method: str
    settings: Mapping[str, Any]
    based: bool  # deltas are taken from a base
    label: str

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    @property
    def models(self) -> int:
        """How many take part beside a base that deltas are taken from."""
        return min(_MODELS, self.row.models[1] or _MODELS)


class Result(NamedTuple):
    """A row of the page."""

    case: Case
    dtype: str
    shape: str
    differing: float
    apart: float  # ulp
    of_largest: float
    errors: tuple[tuple[float, float], ...]  # of ours and mergekit's: worst and mean, in ulp
    sigmas: tuple[tuple[float, ...], ...]  # of ours and mergekit's: kept share, mean, norm
    verdict: str


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mergekit", type=Path, help=f"mergekit-yaml of 0.1.5; else {_SETTING}, .venv-mergekit")
    options.add_argument("--methods", type=lambda text: text.split(","), help="some methods, with commas")
    asked = options.parse_args()
    script = asked.mergekit or os.environ.get(_SETTING) or _HERE.parent / ".venv-mergekit/bin/mergekit-yaml"
    both = [name for name in METHODS if name not in _OURS_ALONE]
    methods = asked.methods or both
    if unknown := sorted(set(methods) - set(both)):
        options.error(f"not a method of both: {', '.join(unknown)}; there are {', '.join(both)}")
    with tempfile.TemporaryDirectory(prefix="fastmerge-parity-") as folder, Mergekit(Path(script)) as mergekit:
        results = [each for dtype in _NAMES for each in _results(methods, dtype, Path(folder) / dtype, mergekit)]
        page = _page(results, mergekit.versions)
    if asked.methods:
        print(page)
    else:
        _PAGE.write_text(page)
        print(f"{_PAGE}: {sum(each.verdict == 'within' for each in results)} of {len(results)} within")


def _results(methods: Sequence[str], dtype: str, folder: Path, mergekit: Mergekit) -> Iterator[Result]:
    tensors = [{name: each.to(TORCH[dtype]) for name, each in model.items()} for model in family()]
    paths = [folder / f"model-{number}" for number in range(len(tensors))]
    for path, model in zip(paths, tensors, strict=True):
        path.mkdir(parents=True)
        save_file(model, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    for case in (case for method in methods for case in cases(method)):
        taken = slice(0 if case.based else 1, 1 + case.models)
        out = folder / case.label
        fastmerge.merge(Recipe.parse(json.dumps(recipe(case, dtype, paths)), case.label), out, write_model_card=False)
        ours = load_file(out / "model.safetensors")
        theirs = mergekit.merged(case, paths[taken], folder / "mergekit.safetensors")
        for shape in _SHAPES:
            yield _compared(case, dtype, shape, ours[shape], theirs[shape], [model[shape] for model in tensors])


# --- what is merged ---


def cases(method: str) -> Iterator[Case]:
    """The method as it is by default, without a base and with one where either may be, and its variants."""
    row = METHODS[method]
    count = min(_MODELS, row.models[1] or _MODELS)
    for variant in ({}, *_VARIANTS.get(method, ())):
        given = {**_COMMON, **_OWN.get(method, {}), **variant}
        settings = {
            p.name: _per_model(given[p.name], count) if p.per_model else given[p.name]
            for p in row.parameters
            if p.name in given
        }
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in variant.items())
        for based in {Base.ORIGIN: (True,), Base.OPTIONAL: (False, True)}.get(row.base, (False,)):
            words = (method, told, "of deltas" if based and row.base is Base.OPTIONAL else "")
            yield Case(method, settings, based, " ".join(filter(None, words)))


def _per_model(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value[:count]) if isinstance(value, tuple) else (value,) * count


def recipe(case: Case, dtype: str, paths: Sequence[Path]) -> dict[str, Any]:
    each = {name: value for name, value in case.settings.items() if isinstance(value, tuple)}
    models = [
        {"model": str(path), "parameters": {name: value[i] for name, value in each.items()}}
        for i, path in enumerate(paths[1 : 1 + case.models])
    ]
    base = paths[0] if case.based else paths[1] if case.row.base is Base.ENDPOINT else None
    return {
        "merge_method": case.method,
        **({} if base is None else {"base_model": str(base)}),
        "models": models,
        "parameters": {name: value for name, value in case.settings.items() if name not in each},
        "dtype": _NAMES[dtype],
    }


def family() -> list[dict[str, Tensor]]:
    """A base and its fine-tunes in float32. No two deltas of a model are equally large in a tensor: they are multiples
    of 2^-27, which the sums hold exactly. Rounded to 16 bits many are."""
    rng = np.random.default_rng(20)
    models: list[dict[str, Tensor]] = [{} for _ in range(1 + _MODELS)]
    for name, shape in _SHAPES.items():
        count = prod(shape)
        base = np.rint(np.clip(rng.standard_normal(count) * 0.02, -0.1, 0.1) * 2**27)
        for number, model in enumerate(models):
            sizes = (rng.permutation(count) + 1) * (2**19 // count) * rng.choice([-1, 1], count)
            values = base + (sizes if number else 0)
            model[name] = torch.from_numpy((values / 2**27).astype(np.float32)).view(shape)
    return models


class Mergekit:
    """mergekit in a process of its own."""

    def __init__(self, script: Path) -> None:
        if not script.is_file():
            raise SystemExit(f"no mergekit at {script}: name a mergekit-yaml of 0.1.5 in {_SETTING} or by --mergekit")
        self._python = str(script.with_name("python"))
        asked = "from importlib.metadata import version as v; print(v('mergekit'), v('torch').partition('+')[0])"
        told = subprocess.run([self._python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
        self.versions = f"mergekit {told[0]} (torch {told[1]})"
        if told[0] != "0.1.5":
            raise SystemExit(f"parity is with mergekit 0.1.5, and {script} is of {told[0]}")

    def __enter__(self) -> Mergekit:
        self._child = subprocess.Popen(
            [self._python, "-c", _SEEDED, str(_PEER), "1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()

    def merged(self, case: Case, paths: Sequence[Path], out: Path) -> dict[str, Tensor]:
        self._ask({"load": [str(path / "model.safetensors") for path in paths]})
        based = case.based or case.row.base is Base.ENDPOINT
        self._ask({"method": case.method, "parameters": case.settings, "base": 0 if based else None})
        self._ask({"save": str(out)})
        return load_file(out)

    def _ask(self, line: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps(line), file=self._child.stdin, flush=True)
        if not self._child.stdout.readline():
            raise SystemExit("mergekit's process ended; what it said is above")


# --- what it should be ---

ORACLES: Mapping[str, Oracle] = {
    "linear": lambda base, models, own: oracles.linear(models, own["weight"]),
    "task_arithmetic": lambda base, models, own: oracles.task_arithmetic(base, models, own["weight"]),
    "ties": lambda base, models, own: oracles.ties(
        base, models, own["weight"], own["density"], rescale="l1" if own.get("rescale") else "none"
    ),
    "breadcrumbs": lambda base, models, own: oracles.breadcrumbs(
        base, models, own["weight"], own["density"], own["gamma"]
    ),
    "breadcrumbs_ties": lambda base, models, own: oracles.breadcrumbs_ties(
        base, models, own["weight"], own["density"], own["gamma"]
    ),
    "slerp": lambda base, models, own: oracles.slerp(*models, own["t"]),
    "nuslerp": lambda base, models, own: oracles.nuslerp(models, own["weight"], base),
    "multislerp": lambda base, models, own: oracles.multislerp(models, own["weight"], base),
    "karcher": lambda base, models, own: oracles.karcher(models),
    "model_stock": lambda base, models, own: oracles.model_stock(base, models),
    "nearswap": lambda base, models, own: oracles.nearswap(base, *models, own["t"]),
    "sce": lambda base, models, own: oracles.sce(base, models, own.get("select_topk", 1.0)),
    "ram": lambda base, models, own: oracles.ram(base, models, own["epsilon"]),
    "ramplus_tl": lambda base, models, own: oracles.ram(base, models, own["epsilon"], r=0.1, alpha=0.2),
    "passthrough": lambda base, models, own: oracles.passthrough(*models, *own.get("scale", ())),
}

#: Of what the random methods kept: `masks` are drawn.
RANDOM: Mapping[str, Callable[[Array, Sequence[Array], Mapping[str, Any], Sequence[Array]], Array]] = {
    "dare_linear": lambda base, models, own, masks: oracles.dare_linear(
        base, models, own["weight"], own["density"], masks
    ),
    "dare_ties": lambda base, models, own, masks: oracles.dare_ties(base, models, own["weight"], own["density"], masks),
    "della_linear": lambda base, models, own, masks: oracles.dare_linear(
        base, models, own["weight"], own["density"], masks, rescale="l1"
    ),
    "della": lambda base, models, own, masks: oracles.dare_ties(
        base, models, own["weight"], own["density"], masks, normalize=True, rescale="l1"
    ),
}


def exact(case: Case, tensors: Sequence[Tensor]) -> Array | None:
    """In float64, flat; None where there is no oracle."""
    base, *models = (tensor.double().numpy() for tensor in tensors)
    base = base if case.based else np.zeros_like(base)
    models = models[: case.models]
    if case.method == "arcee_fusion":
        rows = [each.reshape(-1, each.shape[-1]) for each in (base, *models)]
        scores, threshold = oracles.arcee_scores(*rows)
        return np.where(scores >= threshold, rows[1], rows[0]).ravel()
    if case.method not in ORACLES:
        return None
    oracle, own = ORACLES[case.method], case.settings
    if own.get("nuslerp_row_wise"):
        lines = [each.reshape(each.shape[0], -1).T for each in (base, *models)]
        return _by_lines(oracle, lines, own).T.ravel()
    if own.get("filter_wise") or own.get("nuslerp_flatten") is False:
        return _by_lines(oracle, [each.reshape(-1, each.shape[-1]) for each in (base, *models)], own).ravel()
    return oracle(base.ravel(), [model.ravel() for model in models], own)


def _by_lines(oracle: Oracle, lines: Sequence[Array], own: Mapping[str, Any]) -> Array:
    return np.stack([oracle(base, models, own) for base, *models in zip(*lines, strict=True)])


# --- how they compare ---


def _compared(case: Case, dtype: str, shape: str, ours: Tensor, theirs: Tensor, tensors: Sequence[Tensor]) -> Result:
    assert (ours.dtype, ours.shape) == (tensors[0].dtype, tensors[0].shape), f"{case.label} {dtype} {shape}"
    theirs = theirs.to(ours.dtype)
    if case.row.random:
        sigmas = _sigmas(case, dtype, tensors, (ours, theirs))
        verdict = "within" if max(sigmas[0]) <= _SIGMAS else "**beyond**"
        return Result(case, dtype, shape, 0.0, 0.0, 0.0, (), sigmas, verdict)
    inputs = _inputs(case, dtype, tensors)
    one, two = ours.flatten().double(), theirs.flatten().double()
    apart, largest = (one - two).abs(), float(two.abs().max())
    should = exact(case, tensors)
    errors: tuple[tuple[float, float], ...] = ()
    if should is not None:
        found = [accuracy.ulps(each, torch.from_numpy(should), inputs, dtype) for each in (one, two)]
        errors = tuple((float(each.max()), float(each.mean())) for each in found)
    if dtype == "F32":
        same = bool(((_values_apart(ours, theirs) <= _ULPS) | (apart <= _OF_LARGEST * largest)).all())
    else:
        same = not errors or all(mine <= its + _FARTHER for mine, its in zip(*errors, strict=True))
    if dtype != "F32" and not errors:
        verdict = "no oracle"
    elif same:
        verdict = "within"
    else:
        verdict = "**beyond**, ours nearer to float64" if errors and errors[0] < errors[1] else "**beyond**"
    return Result(
        case,
        dtype,
        shape,
        float((apart > 0).double().mean()),
        float(accuracy.ulps(one, two, inputs, dtype).max()),
        float(apart.max()) / largest,
        errors,
        (),
        verdict,
    )


def _inputs(case: Case, dtype: str, tensors: Sequence[Tensor]) -> Inputs:
    base, *models = (View(tensor.data_ptr(), dtype) for tensor in tensors)
    return Inputs(tensors[0].numel(), tuple(models[: case.models]), base if case.based else None)


def _values_apart(one: Tensor, two: Tensor) -> Tensor:
    """How many float32 values lie between, element by element."""

    def place(values: Tensor) -> Tensor:
        bits = values.flatten().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    return (place(one) - place(two)).abs()


def _sigmas(
    case: Case, dtype: str, tensors: Sequence[Tensor], outcomes: Sequence[Tensor]
) -> tuple[tuple[float, ...], ...]:
    """How far the kept share, the mean and the norm of the merged delta are from those of the formula in float64 with
    drops drawn anew, in its standard deviations."""
    rng = np.random.default_rng(1)
    base, *models = (tensor.double().numpy() for tensor in tensors)
    deltas = [model - base for model in models]
    chances = [
        _by_rank(delta, density) if case.row.parameter("epsilon") else density
        for delta, density in zip(deltas, case.settings["density"], strict=True)
    ]
    drawn = []
    for _ in range(_DRAWS):
        masks = [(rng.random(base.shape) < chance).ravel() for chance in chances]
        merged = RANDOM[case.method](base.ravel(), [model.ravel() for model in models], case.settings, masks)
        drawn.append(_statistics(torch.from_numpy(merged).to(TORCH[dtype]), base))
    mean, deviation = np.mean(drawn, axis=0), np.std(drawn, axis=0, ddof=1)
    return tuple(tuple((np.abs(_statistics(each, base) - mean) / deviation).tolist()) for each in outcomes)


def _by_rank(delta: Array, density: float) -> Array:
    """DELLA's probabilities with its default epsilon."""
    ranks = np.abs(delta).argsort(axis=-1, kind="stable").argsort(axis=-1)
    return density + 0.15 * (2 * ranks / (delta.shape[-1] - 1) - 1)


def _statistics(merged: Tensor, base: Array) -> Array:
    delta = merged.double().numpy().ravel() - base.ravel()
    return np.array([np.mean(delta != 0), np.mean(delta), np.linalg.norm(delta)])


# --- the page ---


def _page(results: Sequence[Result], peer: str) -> str:
    rows = sorted(results, key=lambda each: each.case.label)  # stable: dtypes and shapes stay as they come
    ours = f"fastmerge {fastmerge.__version__} (torch {version('torch').partition('+')[0]})"
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in _SHAPES.items())
    head = f"""# The same numbers as mergekit?

Written by `python bench/parity.py`, in some minutes: {ours} against {peer}. Three models and a base, or as many as a
method takes; {shapes}.

An ulp is a unit in the last place, in the dtype, of the exact result or of the largest input, whichever is larger.
Errors, in ulp, are from the formula in float64 of the same inputs: worst / mean. One in the hundreds or more is that of
an element at a threshold, which rounding took to the other side. **within** is:

- float32: every element is at most {_ULPS} float32 values from mergekit's, or {_OF_LARGEST:g} of the tensor's largest
  magnitude.
- bfloat16, float16: neither our worst error nor our mean one is more than {_FARTHER:g} ulp above mergekit's. It
  computes in the dtype, ours in float32: where its rounded deltas are kept or voted differently, it is off by the size
  of a delta.
- random methods: kept share, mean and norm of our merged delta are at most {_SIGMAS} sigma from those of the formula in
  float64 with drops of its own, drawn {_DRAWS} times; sigma is their standard deviation.

"""
    table = ("| " + " | ".join(cells) + " |" for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)))
    return head + "".join(f"{line}\n" for line in table)


def _cells(each: Result) -> list[str]:
    drawn = each.case.row.random
    cells = ["", "", ""] if drawn else [_share(each.differing), f"{each.apart:.2f}", f"{each.of_largest:.1e}"]
    cells += [f"{worst:.3f} / {mean:.4f}" for worst, mean in each.errors] or ["", ""]
    cells += [", ".join(f"{value:.1f}" for value in values) for values in each.sigmas] or ["", ""]
    return [each.case.label, _NAMES[each.dtype], each.shape, *cells, each.verdict]


def _share(value: float) -> str:
    return f"{value:.2%}" if value >= 0.0001 else "< 0.01%" if value else "none"


if __name__ == "__main__":
    main()
