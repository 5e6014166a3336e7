"""One adapter of several: methods over their true deltas, module by module, factorised again."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np

from .. import backends
from ..batches import Batch
from ..checkpoint import TensorInfo, same_bytes
from ..checkpoint.header import parse_json, read_small
from ..engine import Report, merge
from ..errors import CheckpointError, FastmergeWarning, MismatchError, NonFiniteError, RecipeError
from ..fit import common
from ..hub import snapshot
from ..keywords import Keyword, document
from ..layers import Row
from ..marked import meant
from ..measures import swept
from ..methods import METHODS, Measured, Method, Settings, find
from ..planner import Job, Source
from ..recipe import repository
from ..settings import Resolver
from ..sources.adapter import CONFIG, Adapter, Update, open_adapter
from ..sweep import Elect, Inputs, Keep, Mean, Run, Target, View
from .factors import Dense, Factors, Matrix, Product
from .fusing import Name, adapted, recipe_of
from .output import AdapterReport, NewAdapter, check_rank, read


class _Way(NamedTuple):
    """What a name of `combine` means: a method of recipes, parameters that it then has; whether it is done on A and B
    apart, and whether ranks are laid side by side."""

    method: Method
    parameters: Mapping[str, Keyword]
    apart: bool = False
    side_by_side: bool = False


_PEFTS = {
    "linear": _Way(METHODS["task_arithmetic"], {}),
    "ties": _Way(METHODS["ties"], {"elect": "plain", "divide": "count"}),
    "dare_linear": _Way(METHODS["dare_linear"], {}),
    "dare_ties": _Way(METHODS["dare_ties"], {"elect": "plain", "divide": "count"}),
    "magnitude_prune": _Way(METHODS["breadcrumbs"], {"gamma": 0}),
}
#: Every name that `combine` takes. PEFT's votes are not weighted, and it divides by how many agree.
WAYS = {
    **{name: _Way(row, {}) for name, row in METHODS.items() if row.base.apart},
    "cat": _Way(METHODS["task_arithmetic"], {}, side_by_side=True),
    "svd": _PEFTS["linear"],
    "linear": _PEFTS["linear"],
    "magnitude_prune": _PEFTS["magnitude_prune"],
    **{f"{name}_svd": way for name, way in _PEFTS.items() if name != "linear"},
    **{f"peft_{name}": way._replace(apart=True) for name, way in _PEFTS.items()},
}


@overload
def combine(
    adapters: Sequence[Name],
    out: Name,
    *,
    method: str = ...,
    weights: Sequence[float] | None = ...,
    density: float | Sequence[float] | None = ...,
    rank: int | None = ...,
    base: None = ...,
    seed: int = ...,
    threads: int | None = ...,
    overwrite: bool = ...,
    **parameters: Keyword,
) -> AdapterReport: ...
@overload
def combine(
    adapters: Sequence[Name],
    out: Name,
    *,
    base: Name,
    method: str = ...,
    weights: Sequence[float] | None = ...,
    density: float | Sequence[float] | None = ...,
    rank: None = ...,
    seed: int = ...,
    threads: int | None = ...,
    overwrite: bool = ...,
    **parameters: Keyword,
) -> Report: ...
def combine(
    adapters: Sequence[Name],
    out: Name,
    *,
    method: str = "svd",
    weights: Sequence[float] | None = None,
    density: float | Sequence[float] | None = None,
    rank: int | None = None,
    base: Name | None = None,
    seed: int = 0,
    threads: int | None = None,
    overwrite: bool = False,
    **parameters: Keyword,
) -> AdapterReport | Report:
    """Makes one adapter of several, whatever their ranks; or, with a `base`, one model.

    Methods are applied to the true deltas d_i = scaling_i * B_i A_i, [out, in] of each module, in float32, one module
    in memory at a time; an adapter that lacks a module has a delta of zero there. What comes out is factorised again:

    - ``cat``: sum w_i d_i, its ranks side by side; only where scaled factors are rounded something is lost;
    - ``svd``, ``linear``: the same sum, the nearest there is of a rank, from the factors alone;
    - ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune``, and each method of recipes that takes deltas: that
      method, and then the factors of a dense matrix as `fastmerge.lora.factors.Dense` has them;
    - ``ties_svd``, ``dare_linear_svd``, ``dare_ties_svd``, ``magnitude_prune_svd``: as PEFT's add_weighted_adapter
      means them: votes are not weighted, and sums are divided by how many agree;
    - ``peft_linear``, ``peft_ties``, ``peft_dare_linear``, ``peft_dare_ties``, ``peft_magnitude_prune``: what PEFT
      means without the prefix, on A and B apart. Their product has cross terms: a FastmergeWarning says so, and the
      errors of the report are the distance from the method on the deltas.

    Args:
        adapters: folders, or ids on the hub, ``org/name`` or ``org/name@revision``.
        out: the folder to write.
        method: one of these names. Task arithmetic is arXiv:2212.04089, TIES arXiv:2306.01708, DARE arXiv:2311.03099.
        weights: one for each adapter, by default 1.
        density: the share of a delta that stays, for all or for each adapter; by default 1.
        rank: what no module exceeds; by default the largest that an adapter has. Not with cat.
        base: where there is one, all deltas are merged into it as a recipe does, and nothing is factorised. What has
            no delta without its base needs one: DoRA, and whole tensors (modules_to_save) on which adapters differ.
        seed: of the random drops.
        threads: workers; by default one for each processor that this process may use.
        overwrite: replace an earlier output in `out`.
        parameters: those of the method in a recipe, such as ``elect="count"`` or ``lambda_=0.5``.

    Raises:
        RecipeError: no such method, or a setting that it cannot have.
        CheckpointError: an adapter that is none, or has no delta without its base.
        MismatchError: adapters of models that are not alike.
        NonFiniteError: NaN or Inf among their weights.
        OutputError: the folder cannot be written.
    """
    if isinstance(adapters, str | os.PathLike):
        raise TypeError("adapters is a list of folders, also where it is one")
    way = _way(method, rank, base)
    given = {**way.parameters, **parameters, **({} if density is None else {"density": density})}
    merging = _Merging(way.method, [os.fspath(name) for name in adapters], weights, given, seed, threads)
    if base is not None:
        recipe = recipe_of(way.method.name, base, merging.models(base), merging.shared)
        return merge(recipe, out, seed=seed, threads=threads, overwrite=overwrite)
    if merging.shared.get("scope") == "model":
        raise RecipeError("scope is model, but modules are merged one by one: leave it out, or give the base too")
    opened = [_opened(name) for name in merging.names]
    _warn(method, way, opened)
    made = NewAdapter(
        Path(out), [each.weights for each in opened], inputs=[each.folder for each in opened], overwrite=overwrite
    )
    most = rank or max((update.a.shape[0] for each in opened for update in each.updates), default=1)
    for module in _modules(opened):
        _add(made, module, merging, way, most)
    _add_biases(made, opened, merging)
    _keep_whole(made, opened)
    densities = density if isinstance(density, Sequence) else [density] if density is not None else []
    options = {
        "--weights": "" if weights is None else ",".join(map(repr, merging.weights)),
        "--density": ",".join(map(repr, densities)),
        "--rank": str(rank or ""),
        "--seed": str(seed or ""),
    }
    return made.write(
        _said(opened),
        names=merging.names,
        command=[
            *("combine", *merging.names, Path(out).name, "--method", method),
            *(f"{name}={value}" for name, value in options.items() if value),
            *(f"--parameter={name}={value}" for name, value in parameters.items()),
        ],
        left_out=(),
        files={},
    )


def _way(name: str, rank: int | None, base: Name | None) -> _Way:
    way = WAYS.get(name) or _added(name)
    if way.apart and base is not None:
        raise RecipeError(f"{name} makes an adapter and no model: leave out the base, and fuse what comes out")
    check_rank(rank)
    if rank is not None and (base is not None or way.apart or way.side_by_side):
        why = "a model has no rank" if base is not None else f"with {name} the ranks are those of the adapters"
        raise RecipeError(f"rank is {rank}, but {why}: leave it out")
    return way


def _added(name: str) -> _Way:
    """A method of another package."""
    found = find(name)
    if isinstance(found, Method) and found.base.apart:
        return _Way(found, {})
    raise RecipeError((isinstance(found, str) and found) or f"unknown method {name!r}{meant(name, WAYS)}")


def _warn(method: str, way: _Way, adapters: Sequence[Adapter]) -> None:
    if way.apart:
        fault = f"{method} works on A and B apart, and their product has cross terms that no adapter has"
        warnings.warn(f"{fault}; {method.removeprefix('peft_')} is of the deltas", FastmergeWarning, stacklevel=3)
    bases = {each.trained_on: each.name for each in adapters if each.trained_on}
    if len(bases) > 1:
        listed = ", ".join(f"{name} for {base}" for base, name in bases.items())
        fault = f"the adapters are for different bases, and are taken as if for one: {listed}"
        warnings.warn(fault, FastmergeWarning, stacklevel=3)


def _opened(name: str) -> Adapter:
    """An adapter on the disk, or on the hub."""
    hub = None if os.path.exists(name) else repository(name)
    if hub is None:
        return open_adapter(name)
    folder, commit = snapshot(hub.id, hub.revision, adapter=True)
    return open_adapter(folder, name=name, commit=commit)


# --- modules ---


class _Module(NamedTuple):
    """A module that adapters add to, and what each of them has for it."""

    name: str
    updates: tuple[Update | None, ...]
    adapters: Sequence[Adapter]

    @property
    def held(self) -> list[tuple[int, Update]]:
        """By the place of its adapter."""
        return [(place, update) for place, update in enumerate(self.updates) if update is not None]

    @property
    def first(self) -> Update:
        return self.held[0][1]

    @property
    def dtype(self) -> str:
        return common(info for _, update in self.held for info in (update.a, update.b))

    def factors(self, place: int) -> Factors:
        """Those of one adapter, without its scaling; zeros of rank 1 where it has none."""
        update = self.updates[place]
        if update is None:
            rows, columns = self.shape
            return Factors(np.zeros((rows, 1), np.float32), np.zeros((1, columns), np.float32))
        a, b = (_finite(self.adapters[place], info) for info in (update.a, update.b))
        return Factors(a.T, b.T) if update.embedding else Factors(b, a)

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]; of an embedding [rows, out]."""
        out, inputs = self.first.b.shape[0], math.prod(self.first.a.shape[1:])
        return (inputs, out) if self.first.embedding else (out, inputs)


def _modules(adapters: Sequence[Adapter]) -> list[_Module]:
    """Every module of any of some adapters, which must have the same shape in all."""
    held: dict[tuple[str, bool], list[Update | None]] = {}
    for place, adapter in enumerate(adapters):
        for update in adapter.updates:
            if update.magnitude is not None:
                remedy = "give the base too, or first make it plain: extract BASE BASE+ADAPTER"
                fault = f"{adapter.name} is DoRA (use_dora), whose deltas depend on the base; {remedy}"
                raise CheckpointError(fault)
            held.setdefault((update.module, update.embedding), [None] * len(adapters))[place] = update
    modules = [_Module(name, tuple(updates), adapters) for (name, _), updates in held.items()]
    if not modules:
        raise CheckpointError(f"{adapters[0].name} has no factors (lora_A, lora_B): there is nothing to combine")
    names: set[str] = set()
    for module in modules:
        shapes = {(update.a.shape[1:], update.b.shape[0]): place for place, update in module.held}
        if len(shapes) > 1 or module.name in names:
            places = [place for each in modules if each.name == module.name for place, _ in each.held]
            models = " and ".join(adapters[place].name for place in dict.fromkeys(places))
            raise MismatchError(f"{module.name!r} has different shapes in {models}: combine adapters of one base")
        names.add(module.name)
    return modules


def _finite(adapter: Adapter, info: TensorInfo) -> Matrix:
    values = read(adapter.weights, info.name)
    if not np.isfinite(values).all():
        raise NonFiniteError(f"{adapter.name}: {info.name!r} holds NaN or Inf; mend the adapter")
    return values


def _add(made: NewAdapter, module: _Module, merging: _Merging, way: _Way, rank: int) -> None:
    """Merges one module, and factorises what comes out."""
    settings = merging.settings(f"{module.name}.weight")
    coefficients = merging.coefficients(settings)
    target = _dense(module, merging, settings) if coefficients is None else _sum(module, coefficients)
    scaling = 1.0
    if way.apart:
        factors = _apart(module, merging)
    elif way.side_by_side and coefficients is not None:
        factors, scaling = _side_by_side(module, coefficients)
    else:
        factors = target.truncated(rank)
    inputs = None if module.first.embedding else module.first.a.shape[1:]
    made.add(
        module.name,
        target,
        factors,
        module.dtype,
        scaling=scaling,
        embedding=module.first.embedding,
        inputs=inputs,
    )


def _sum(module: _Module, coefficients: Sequence[float]) -> Product:
    """The weighted sum of the deltas, as the factors side by side."""
    parts = [(module.factors(place), coefficients[place] * update.scaling) for place, update in module.held]
    left = np.concatenate([each.left for each, _ in parts], 1)
    return Product(left, np.concatenate([each.right * np.float64(factor) for each, factor in parts]))


def _side_by_side(module: _Module, coefficients: Sequence[float]) -> tuple[Factors, float]:
    """The same as factors to be kept, and a scaling; where all have the same, they stay as they are, to the bit."""
    scalings = [coefficients[place] * update.scaling for place, update in module.held]
    shared = scalings[0] if len(set(scalings)) == 1 and scalings[0] else 1.0
    parts = [(module.factors(place), each / shared) for (place, _), each in zip(module.held, scalings, strict=True)]
    left = np.concatenate([each.left for each, _ in parts], 1)
    return Factors(left, np.concatenate([each.right * np.float64(factor) for each, factor in parts])), shared


def _dense(module: _Module, merging: _Merging, settings: Settings) -> Dense:
    """The method over the deltas, as a matrix."""
    dtype = np.float64 if module.dtype == "F64" else np.float32
    deltas = {}
    for place, update in module.held:
        left, right = (each.astype(dtype, copy=False) for each in module.factors(place))
        deltas[place] = (left * dtype(update.scaling)) @ right
    return Dense(merging.merged(deltas, settings, module.shape, np.dtype(dtype)))


def _apart(module: _Module, merging: _Merging) -> Factors:
    """The method over the A and over the B of the adapters, whose weights are shared among the two."""
    ranks = {update.a.shape[0] for _, update in module.held}
    if len(ranks) > 1:
        listed = " and ".join(map(str, sorted(ranks)))
        raise MismatchError(f"{module.name!r} has the ranks {listed}, and A and B apart need one: take another method")
    merged = []
    for side, index in (("B", 0), ("A", 1)):
        if module.first.embedding:
            side = "AB"[index]
        parts = {place: np.ascontiguousarray(module.factors(place)[index]) for place, _ in module.held}
        weights = list(merging.weights)
        for place, update in module.held:
            weight = weights[place] * update.scaling
            weights[place] = math.copysign(math.sqrt(abs(weight)), weight if side == "A" else 1.0)
        first = next(iter(parts.values()))
        settings = merging.settings(f"{module.name}.lora_{side}", weights)
        merged.append(merging.merged(parts, settings, first.shape, first.dtype))
    return Factors(*merged)


def _add_biases(made: NewAdapter, adapters: Sequence[Adapter], merging: _Merging) -> None:
    """What adapters add to biases (lora_bias), which then every module has."""
    if not any(update.bias for adapter in adapters for update in adapter.updates):
        return
    for module in _modules(adapters):
        biases = {
            place: (_finite(module.adapters[place], update.bias) * update.scaling).ravel()
            for place, update in module.held
            if update.bias is not None
        }
        settings = merging.settings(f"{module.name}.bias")
        kind = np.dtype(np.float64 if module.dtype == "F64" else np.float32)
        made.add_bias(module.name, merging.merged(biases, settings, (module.first.b.shape[0],), kind), module.dtype)


# --- what is not in factors ---


def _keep_whole(made: NewAdapter, adapters: Sequence[Adapter]) -> None:
    """Tensors that take the place of the base's, where all adapters that have one have the same."""
    kept: dict[str, tuple[Adapter, TensorInfo]] = {}
    for adapter in adapters:
        for name, info in adapter.replaced.items():
            if name not in kept:
                kept[name] = adapter, info
                continue
            other, there = kept[name]
            same = (info.dtype, info.shape) == (there.dtype, there.shape)
            if not same or not same_bytes(adapter.weights, info.name, other.weights, there.name):
                fault = f"{other.name} and {adapter.name} both replace {name!r} (modules_to_save), by other values"
                raise CheckpointError(f"{fault}: give the base too, for how far they went is not in them")
    for name, (adapter, info) in kept.items():
        made.keep(name, adapter.weights, info.name)
    if kept:
        fault = f"{len(kept)} tensors, such as {next(iter(kept))!r}, take the place of the base's (modules_to_save)"
        warnings.warn(f"{fault}: they are taken over as they are, whatever the weights", FastmergeWarning, stacklevel=3)


def _said(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What the configs of the adapters say that is true of the result."""
    configs = [parse_json(read_small(adapter.folder / CONFIG)) for adapter in adapters]
    saved = [name for config in configs for name in config.get("modules_to_save") or ()]
    biases = [word for config in configs if (word := config.get("bias") or "none") != "none"]
    return {
        **{key: _agreed(config.get(key) for config in configs) for key in ("task_type", "revision")},
        "base_model_name_or_path": next((each.trained_on for each in adapters if each.trained_on), None),
        "fan_in_fan_out": any(each.fan_in_fan_out for each in adapters),
        "modules_to_save": list(dict.fromkeys(saved)) or None,
        "bias": biases[0] if biases else "none",
    }


_T = TypeVar("_T")


def _agreed(values: Iterable[_T]) -> _T | None:
    """What all say that say something; None where they disagree."""
    said = {value for value in values if value is not None}
    return said.pop() if len(said) == 1 else None


# --- the method ---


class _Merging:
    """A method with its settings, over the deltas of some adapters."""

    def __init__(
        self,
        method: Method,
        names: Sequence[str],
        weights: Sequence[float] | None,
        parameters: Mapping[str, Keyword],
        seed: int,
        threads: int | None,
    ) -> None:
        self.names = names
        self.weights = [1.0] * len(names) if weights is None else [float(weight) for weight in weights]
        if not names:
            raise RecipeError("there are no adapters to combine: name at least one")
        if len(self.weights) != len(names):
            raise RecipeError(f"there are {len(self.weights)} weights for {len(names)} adapters: give one to each")
        if weights is not None and method.parameter("weight") is None:
            raise RecipeError(f"{method.name} has no weights: leave them out")
        if "weight" in parameters:
            raise RecipeError("weight is a parameter of recipes: here it is weights, one for each adapter")
        self._method, self._parameters, self._seed = method, parameters, seed
        self._run = Run(backends.workers(threads))
        self._worked: backends.Worked = {}
        self._resolver = self._resolved(self.weights)

    def models(self, base: Name) -> list[tuple[dict[str, str], dict[str, Any]]]:
        """The adapters over a base, with what each has of its own, for a recipe."""
        sources = self._resolver.slice.sources[: len(self.names)]
        return [
            (adapted(base, name), {key: each.constant for key, each in source.parameters.items()})
            for name, source in zip(self.names, sources, strict=True)
        ]

    @property
    def shared(self) -> dict[str, Any]:
        return {key: each.constant for key, each in self._document.parameters.items()}

    def settings(self, name: str, weights: Sequence[float] | None = None) -> Settings:
        """Those of a tensor of this name, of which the random drops are a function, too."""
        resolver = self._resolver if weights is None else self._resolved(weights)
        count = len(self.names)
        settings, _ = resolver.resolve(Row(name, (name,) * count, 0.0), tuple(range(count)))
        return settings

    def coefficients(self, settings: Settings) -> list[float] | None:
        """The factor of each delta, where the method is a sum of them."""
        method = self._method
        if method.direct or method.selects or method.gram or method.random:
            return None
        sweep = method.sweep(settings, Measured())
        if sweep.keep is not Keep.ALL or sweep.elect is not Elect.NONE or sweep.mean is not Mean.SUM:
            return None
        return [part.weight * part.rescale * sweep.lambda_ / sweep.divisor for part in sweep.parts]

    def merged(
        self, deltas: Mapping[int, Matrix], settings: Settings, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> Matrix:
        """What the method makes of deltas, which are zero where there is none of an adapter."""
        zeros, out = np.zeros(shape, dtype), np.empty(shape, dtype)
        word = "F64" if dtype == np.float64 else "F32"
        held = [np.ascontiguousarray(deltas.get(place, zeros), dtype) for place in range(len(self.names))]
        views = [View(each.ctypes.data, word) for each in (*held, zeros)]
        *models, base = (Source(place, "") for place in range(len(views)))
        job = Job("", word, shape, tuple(models), base, (), 0, self._method, (settings,))
        inputs = Inputs(out.size, tuple(views[:-1]), views[-1])
        ops = backends.Ops("torch" if job.direct else "auto", {word}, "cpu", self._worked)
        swept(Batch([job], [inputs], []), ops, {}, [[Target(word, out.ctypes.data)]], self._run)
        return out

    def _resolved(self, weights: Sequence[float]) -> Resolver:
        weighted = self._method.parameter("weight") is not None
        given = {**self._parameters, **({"weight": list(weights)} if weighted else {})}
        self._document = document(self._method, self.names, len(self.names), given, single=True)
        (module,) = self._document.modules
        (slice_,) = module.slices
        return Resolver(self._document, module, slice_, self._seed)
