"""The table of merge methods: for each, its parameters, what it measures, and the sweep that computes it.

A method is a row. It knows numbers and names, never a tensor or a backend; what it needs to know of the tensors (a
threshold, the Gram matrix) is measured by the engine and handed to `Method.sweep`.

Other packages add rows by entry points of the group `fastmerge.methods`, each a `Method` or some of them; they are
looked up where a name is not in the table. docs/write-a-method.md is written for their authors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from keyword import iskeyword
from typing import Any, NamedTuple

from . import spherical
from .errors import RecipeError
from .plugins import Plugin, found
from .sweep import CERTAIN, EVERY, Cut, Elect, Keep, Mean, Part, Rescale, Sweep, TieVote

Value = float | bool | str | None


class Base(Enum):
    """What a method makes of `base_model`."""

    INPUT = "input"  # one more model
    ORIGIN = "origin"  # deltas are taken from it; required
    OPTIONAL = "optional"  # deltas are taken from it, where there is one
    ENDPOINT = "endpoint"  # the first of two models; required

    @property
    def apart(self) -> bool:
        """Whether the base, where there is one, is none of the models that are merged."""
        return self in (Base.ORIGIN, Base.OPTIONAL)


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as a recipe may set it. Without a `default` the recipe must."""

    name: str
    kind: type[float] | type[bool] | type[str]  # a finite number in [low, high], a flag, or one of `words`
    default: Value = None
    help: str = ""
    required: bool = False
    per_model: bool = False
    low: float = -math.inf
    high: float = math.inf
    words: tuple[str, ...] = ()  # a flag may take one of these words instead


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """The parameters of one tensor: those of the method, then those of each model that takes part, in recipe order.

    Tensors with the same parameters share one, so that what follows from it is computed once: it is its own key.
    """

    shared: Mapping[str, Value]
    models: tuple[Mapping[str, Value], ...]
    keys: tuple[int, ...] = ()  # one random key per model: a function of seed, place and tensor name


@dataclass(frozen=True, slots=True)
class Measured:
    """What the ops said of one tensor: the cuts at its `ranks`, the M x M Gram matrix of the models (`gram`)."""

    cuts: tuple[Cut, ...] = ()
    gram: Sequence[Sequence[float]] = ()


def _unswept(_: Settings, __: Measured) -> Sweep:
    raise TypeError("a direct method has no sweep")


def _sound(_: Settings) -> str:
    return ""


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A row of the table. `models` bounds how many take part, without a base that deltas are taken from."""

    name: str
    formula: str
    paper: str
    base: Base
    models: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    sweep: Callable[[Settings, Measured], Sweep] = _unswept  # or, of whole torch tensors:
    function: Callable[..., Any] | None = None  # models, base or None, Settings -> merged; else that of `direct`
    fault: Callable[[Settings], str] = _sound  # what is wrong with values that are fine each; empty where nothing is
    selects: bool = False  # wants `Measured.cuts`, at the ranks of `ranks`
    gram: bool = False  # wants `Measured.gram`
    random: bool = False

    @property
    def direct(self) -> bool:
        """Whether it is no sweep: a function of whole tensors, done by torch on the CPU."""
        return self.sweep is _unswept

    def parameter(self, name: str) -> Parameter | None:
        return next((p for p in self.parameters if p.name == name), None)


@lru_cache
def ranks(settings: Settings, count: int) -> tuple[int, ...]:
    """How many of `count` elements each model keeps: max(1, int(density * count)), none at density 0.

    Where it keeps a band (gamma): how many lie above the lower end of each model's, then how many above the upper end.
    """
    if all("gamma" in model for model in settings.models):
        bands = [_band(number(model, "density"), number(model, "gamma"), count) for model in settings.models]
        return (*(low for low, _ in bands), *(high for _, high in bands))
    return tuple(_rank(number(model, "density"), count) for model in settings.models)


@lru_cache
def rescale_of(method: Method, settings: Settings) -> Rescale:
    """The norm that the kept deltas are brought back to after `Keep`, NONE where the method's own factor does it."""
    choice = rescaling(method.random, settings)
    return {"l1": Rescale.L1, "l2": Rescale.L2, "linf": Rescale.LINF}.get(choice, Rescale.NONE)


def matching(before: float, after: float) -> float:
    """The factor that brings a norm back, 1 where either is about zero."""
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


def by_rows(settings: Settings) -> bool:
    """Whether each row of a tensor, along its last axis, is merged as a tensor of its own."""
    shared = settings.shared
    return shared.get("filter_wise") is True or (shared.get("nuslerp_flatten") is False and not by_columns(settings))


def by_columns(settings: Settings) -> bool:
    """Whether what lies along the first axis is."""
    return settings.shared.get("nuslerp_flatten") is False and settings.shared["nuslerp_row_wise"] is True


# --- the sweeps of the table ---


def _linear(settings: Settings, _: Measured) -> Sweep:
    weights = _weights(settings)
    divisor = math.fsum(weights) if settings.shared.get("normalize", True) else 1.0
    return Sweep(tuple(Part(weight) for weight in weights), divisor=divisor)


def _uniform_soup(settings: Settings, _: Measured) -> Sweep:
    return Sweep((Part(),) * len(settings.models), divisor=float(len(settings.models)))


def _task_arithmetic(settings: Settings, _: Measured) -> Sweep:
    return averaged(settings, tuple(Part(weight) for weight in _weights(settings)), Keep.ALL)


def _ties(settings: Settings, measured: Measured) -> Sweep:
    every = settings.shared["ties"] == "all"
    parts = tuple(
        Part(
            weight,
            _inverse(False, settings, model),
            magnitude=cut.magnitude,
            ties_end=EVERY if every and number(model, "density") > 0.0 else cut.ties_end,
        )
        for weight, model, cut in zip(_weights(settings), settings.models, measured.cuts, strict=True)
    )
    return elected(settings, parts, Keep.ABOVE)


def _breadcrumbs(settings: Settings, measured: Measured) -> Sweep:
    return averaged(settings, _banded(settings, measured), Keep.BAND)


def _breadcrumbs_ties(settings: Settings, measured: Measured) -> Sweep:
    return elected(settings, _banded(settings, measured), Keep.BAND)


def _dare_linear(settings: Settings, _: Measured) -> Sweep:
    return averaged(settings, _dropped(settings), Keep.BERNOULLI)


def _dare_ties(settings: Settings, _: Measured) -> Sweep:
    return elected(settings, _dropped(settings), Keep.BERNOULLI)


def _nearswap(settings: Settings, _: Measured) -> Sweep:
    return Sweep((Part(magnitude=max(0.0, number(settings.shared, "t"))),), Keep.CLIP)


def _ram(settings: Settings, _: Measured) -> Sweep:
    part = Part(magnitude=number(settings.shared, "epsilon"), ties_end=0)
    return Sweep((part,) * len(settings.models), Keep.ABOVE, mean=Mean.CONTRIBUTORS)


def _slerp(settings: Settings, measured: Measured) -> Sweep:
    return _summed(spherical.slerp(measured.gram, number(settings.shared, "t")))


def _nuslerp(settings: Settings, measured: Measured) -> Sweep:
    weights = _weights(settings)
    total = math.fsum(weights)
    return _summed(spherical.nuslerp(measured.gram, weights[-1] / total if abs(total) >= 1e-6 else 0.5))


def _multislerp(settings: Settings, measured: Measured) -> Sweep:
    weights = _weights(settings)
    total = math.fsum(weights) if settings.shared["normalize_weights"] else 1.0
    shares = [weight / (total if abs(total) >= 1e-8 else 1.0) for weight in weights]
    return _summed(spherical.multislerp(measured.gram, shares, number(settings.shared, "eps")))


def _karcher(settings: Settings, measured: Measured) -> Sweep:
    rounds, tolerance = int(number(settings.shared, "max_iter")), number(settings.shared, "tol")
    return _summed(spherical.karcher(measured.gram, rounds, tolerance))


def _model_stock(_: Settings, measured: Measured) -> Sweep:
    return _summed(spherical.model_stock(measured.gram))


def _passthrough(settings: Settings, _: Measured) -> Sweep:
    scale = settings.models[0].get("scale")
    return Sweep((Part(1.0 if scale is None else float(scale)),))


# --- what several of them share ---


def _summed(weights: Sequence[float]) -> Sweep:
    return Sweep(tuple(Part(weight) for weight in weights))


def averaged(settings: Settings, parts: tuple[Part, ...], keep: Keep) -> Sweep:
    """Every model takes part: a sum, over the sum of the weights where the recipe normalises."""
    divisor = math.fsum(part.weight for part in parts) if settings.shared["normalize"] else 1.0
    return Sweep(
        parts, keep, divisor=divisor if abs(divisor) >= 1e-8 else 1.0, lambda_=number(settings.shared, "lambda")
    )


def elected(settings: Settings, parts: tuple[Part, ...], keep: Keep) -> Sweep:
    """Those take part that agree with the vote."""
    shared = settings.shared
    divide = shared["divide"] or ("weights" if shared["normalize"] else "none")
    return Sweep(
        parts,
        keep,
        elect={"weighted": Elect.WEIGHTED, "plain": Elect.PLAIN, "count": Elect.COUNT}[str(shared["elect"])],
        tie_vote={"positive": TieVote.POSITIVE, "zero": TieVote.ZERO}[str(shared["tie_vote"])],
        mean={"weights": Mean.WEIGHTS, "count": Mean.COUNT, "contributors": Mean.CONTRIBUTORS, "none": Mean.SUM}[
            str(divide)
        ],
        lambda_=number(shared, "lambda"),
    )


def _banded(settings: Settings, measured: Measured) -> tuple[Part, ...]:
    """Parts whose elements stay where they are neither too small nor too large."""
    count = len(settings.models)
    own = zip(_weights(settings), settings.models, measured.cuts[:count], measured.cuts[count:], strict=True)
    return tuple(
        Part(
            weight,
            _inverse(False, settings, model),
            magnitude=low.magnitude,
            ties_end=low.ties_end,
            top_magnitude=high.magnitude,
            top_ties_end=high.ties_end,
        )
        for weight, model, low, high in own
    )


def _band(density: float, gamma: float, count: int) -> tuple[int, int]:
    """Between which ranks int(density * count) elements lie: below the int(gamma * count) largest, or below fewer
    where that would leave too few."""
    if density >= 1.0:
        return count, 0
    inside = int(density * count)
    top = min(int(gamma * count), count - inside) if inside else 0
    return top + inside, top


def _dropped(settings: Settings) -> tuple[Part, ...]:
    """Parts whose elements stay with probability `density`."""
    return tuple(
        Part(
            weight,
            _inverse(True, settings, model),
            cut=min(CERTAIN, round(number(model, "density") * CERTAIN)),
            key=key,
        )
        for weight, model, key in zip(_weights(settings), settings.models, settings.keys, strict=True)
    )


def _rank(density: float, count: int) -> int:
    if density <= 0.0:
        return 0
    return count if density >= 1.0 else max(1, int(density * count))


def rescaling(random: bool, settings: Settings) -> str:
    """`rescale` as a word: true means 1/density for random drops, the L1 norm for trims."""
    choice = settings.shared.get("rescale", False)
    if isinstance(choice, str):
        return choice
    return ("inverse" if random else "l1") if choice else "none"


def _inverse(random: bool, settings: Settings, model: Mapping[str, Value]) -> float:
    density = number(model, "density")
    return 1.0 / density if rescaling(random, settings) == "inverse" and density > 0.0 else 1.0


def _weights(settings: Settings) -> list[float]:
    return [number(model, "weight") for model in settings.models]


def number(values: Mapping[str, Value], name: str) -> float:
    value = values[name]
    if not isinstance(value, int | float):
        raise TypeError(f"{name} was not resolved to a number: {value!r}")
    return float(value)


def _probabilities(settings: Settings) -> str:
    """DELLA keeps at random what its density neither keeps nor drops for certain."""
    for model in settings.models:
        density, epsilon = number(model, "density"), number(model, "epsilon")
        if 0.0 < density < 1.0 and not 0.0 < density - epsilon <= density + epsilon < 1.0:
            return f"density {density:g} with epsilon {epsilon:g} takes a probability out of (0, 1); change one of them"
    return ""


# --- the table ---

_WEIGHT = Parameter("weight", float, help="weight of this model", required=True, per_model=True)
_NORMALIZE = Parameter("normalize", bool, False, "divide by the sum of the weights that took part")
_NORMALIZE_ON = replace(_NORMALIZE, default=True)
_LAMBDA = Parameter("lambda", float, 1.0, "factor of the merged delta")
_DENSITY = Parameter("density", float, 1.0, "share of the delta that stays", per_model=True, low=0.0, high=1.0)
_INT8_MASK = Parameter("int8_mask", bool, False, "accepted, changes nothing")
_RESCALE = Parameter(
    "rescale",
    bool,
    False,
    "scale the kept part; true: back to the L1 norm",
    words=("inverse", "l1", "l2", "linf", "none"),
)
_RESCALE_ON = replace(_RESCALE, default=True, help="scale the kept part; true: by 1/density")
_GAMMA = Parameter(
    "gamma", float, 0.01, "share of the delta that is too large to stay", per_model=True, low=0.0, high=1.0
)
_EPSILON = Parameter(
    "epsilon",
    float,
    0.15,
    "what the probability of the largest to stay is above density, and that of the smallest below",
    per_model=True,
    low=0.0,
    high=0.5,
)
_TOUCHED = Parameter("epsilon", float, 1e-5, "magnitude of a delta that counts as none", low=0.0)
_ELECTION = (
    Parameter("elect", str, "weighted", "what votes for the sign", words=("weighted", "plain", "count")),
    Parameter("tie_vote", str, "positive", "what a vote of zero elects", words=("positive", "zero")),
    Parameter(
        "divide",
        str,
        None,
        "what the agreeing sum is divided by; unset: the weights where normalize, none where not",
        words=("weights", "count", "contributors", "none"),
    ),
)
_SELECTION = (
    Parameter("ties", str, "index", "equals at the threshold: exactly k stay, or all", words=("index", "all")),
    Parameter("scope", str, "tensor", "one threshold per tensor, or one per model", words=("tensor", "model")),
)
_ARITHMETIC = (_WEIGHT, _LAMBDA, _INT8_MASK)

_SOUPS = "Model soups, arXiv:2203.05482"
_DARE = "DARE, arXiv:2311.03099"
_BREADCRUMBS = "Model breadcrumbs, arXiv:2312.06795"
_DELLA = "DELLA-Merging, arXiv:2406.11617"
_RAM = "RAM, arXiv:2601.13572"
_ROWS = (
    Method(
        name="linear",
        formula="sum w_i model_i / sum w_i",
        paper=_SOUPS,
        base=Base.INPUT,
        models=(1, None),
        parameters=(_WEIGHT, _NORMALIZE_ON),
        sweep=_linear,
    ),
    Method(
        name="uniform_soup",
        formula="mean of the models",
        paper=_SOUPS,
        base=Base.INPUT,
        models=(1, None),
        parameters=(),
        sweep=_uniform_soup,
    ),
    Method(
        name="task_arithmetic",
        formula="base + lambda * sum w_i d_i",
        paper="Task arithmetic, arXiv:2212.04089",
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _NORMALIZE),
        sweep=_task_arithmetic,
    ),
    Method(
        name="ties",
        formula="base + lambda * mean of the agreeing w_i trim(d_i)",
        paper="TIES-merging, arXiv:2306.01708",
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _DENSITY, _NORMALIZE_ON, _RESCALE, *_ELECTION, *_SELECTION),
        sweep=_ties,
        selects=True,
    ),
    Method(
        name="dare_linear",
        formula="base + lambda * sum w_i drop(d_i) / density_i",
        paper=_DARE,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _DENSITY, _NORMALIZE, _RESCALE_ON),
        sweep=_dare_linear,
        random=True,
    ),
    Method(
        name="dare_ties",
        formula="base + lambda * sum of the agreeing w_i drop(d_i) / density_i",
        paper=_DARE,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _DENSITY, _NORMALIZE, _RESCALE_ON, *_ELECTION),
        sweep=_dare_ties,
        random=True,
    ),
    Method(
        name="breadcrumbs",
        formula="base + lambda * sum w_i band(d_i), the largest and the smallest of d_i left out",
        paper=_BREADCRUMBS,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _DENSITY, _GAMMA, _NORMALIZE, _RESCALE),
        sweep=_breadcrumbs,
        selects=True,
    ),
    Method(
        name="breadcrumbs_ties",
        formula="base + lambda * sum of the agreeing w_i band(d_i)",
        paper=_BREADCRUMBS,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _DENSITY, _GAMMA, _NORMALIZE, _RESCALE, *_ELECTION),
        sweep=_breadcrumbs_ties,
        selects=True,
    ),
    Method(
        name="della",
        formula="base + lambda * mean of the agreeing w_i drop(d_i), smaller elements of a row dropped more often",
        paper=_DELLA,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _DENSITY, _EPSILON, _NORMALIZE_ON, replace(_RESCALE, default=True), *_ELECTION),
        fault=_probabilities,
        random=True,
    ),
    Method(
        name="della_linear",
        formula="base + lambda * sum w_i drop(d_i), smaller elements of a row dropped more often",
        paper=_DELLA,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(*_ARITHMETIC, _DENSITY, _EPSILON, _NORMALIZE, replace(_RESCALE, default=True)),
        fault=_probabilities,
        random=True,
    ),
    Method(
        name="sce",
        formula="base + mean of the agreeing d_i where they vary most, weighted by the mean of d_i^2",
        paper="SCE, arXiv:2408.07990",
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(
            Parameter("select_topk", float, 1.0, "share of the positions of most variance", low=0.0, high=1.0),
            _INT8_MASK,
        ),
    ),
    Method(
        name="ram",
        formula="base + mean of the d_i with abs(d_i) > epsilon",
        paper=_RAM,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(_TOUCHED,),
        sweep=_ram,
    ),
    Method(
        name="ramplus_tl",
        formula="the same, a d_i alone times 1 + r clamp(shared_i / unique_i, 0, alpha)",
        paper=_RAM,
        base=Base.ORIGIN,
        models=(1, None),
        parameters=(
            _TOUCHED,
            Parameter("r", float, 0.1, "how fast a delta alone grows with what its model shares"),
            Parameter("alpha", float, 0.2, "the ratio of shared to unique elements that counts at most"),
        ),
    ),
    Method(
        name="nearswap",
        formula="base + clamp(t / abs(d), 0, 1) d",
        paper="-",
        base=Base.ORIGIN,
        models=(1, 1),
        parameters=(Parameter("t", float, help="how far an element may move", required=True),),
        sweep=_nearswap,
    ),
    Method(
        name="arcee_fusion",
        formula="base + d where abs(d) * KL of the row's softmax >= median + 1.5 IQR",
        paper="-",
        base=Base.ORIGIN,
        models=(1, 1),
        parameters=(),
    ),
    Method(
        name="slerp",
        formula="sin((1-t)w)/sin(w) base + sin(t w)/sin(w) other",
        paper="Shoemake, SIGGRAPH 1985",
        base=Base.ENDPOINT,
        models=(2, 2),
        parameters=(Parameter("t", float, help="0 is the base, 1 the other", required=True, low=0.0, high=1.0),),
        sweep=_slerp,
        gram=True,
    ),
    Method(
        name="nuslerp",
        formula="slerp at w_2 / (w_1 + w_2), of deltas where there is a base",
        paper="Shoemake, SIGGRAPH 1985",
        base=Base.OPTIONAL,
        models=(2, 2),
        parameters=(
            _WEIGHT,
            Parameter("nuslerp_flatten", bool, True, "one angle per tensor; false: one per row"),
            Parameter("nuslerp_row_wise", bool, False, "where not flattened: one angle per column, as mergekit has it"),
        ),
        sweep=_nuslerp,
        gram=True,
    ),
    Method(
        name="multislerp",
        formula="mean direction of the models, or of their deltas, at their mean length, weighted",
        paper="Buss & Fillmore, ACM TOG 2001",
        base=Base.OPTIONAL,
        models=(1, None),
        parameters=(
            _WEIGHT,
            Parameter("normalize_weights", bool, True, "divide the weights by their sum"),
            Parameter("eps", float, 1e-8, "added to lengths that are divided by", low=0.0),
        ),
        sweep=_multislerp,
        gram=True,
    ),
    Method(
        name="karcher",
        formula="mean of the models' directions on the sphere, at their mean length",
        paper="Karcher, CPAM 1977",
        base=Base.INPUT,
        models=(1, None),
        parameters=(
            Parameter("max_iter", float, 10.0, "most steps towards the mean", low=0.0),
            Parameter("tol", float, 1e-5, "length of the step that is the last", low=0.0),
        ),
        sweep=_karcher,
        gram=True,
    ),
    Method(
        name="model_stock",
        formula="base + t * mean of d_i, t = N c / (1 + (N - 1) c), c the mean cosine of the d_i",
        paper="Model Stock, arXiv:2403.19522",
        base=Base.ORIGIN,
        models=(2, None),
        parameters=(Parameter("filter_wise", bool, False, "one t per row, not per tensor"),),
        sweep=_model_stock,
        gram=True,
    ),
    Method(
        name="passthrough",
        formula="scale * model",
        paper="-",
        base=Base.INPUT,
        models=(1, 1),
        parameters=(Parameter("scale", float, help="factor; unset: the tensor is copied", per_model=True),),
        sweep=_passthrough,
    ),
)

#: Every method by its name in a recipe.
METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}

#: Accepted instead of `density`, and means 1 - density.
DROP_RATE = "drop_rate"

#: Every parameter of the table, which any recipe may name; beside them, those of the recipe's own method.
KNOWN = frozenset({DROP_RATE}) | {parameter.name for row in _ROWS for parameter in row.parameters}


# --- the rows of other packages ---

GROUP = "fastmerge.methods"


class Added(NamedTuple):
    """A row of another package, or why there is none: then the name may be that of the entry point."""

    name: str
    package: str
    method: Method | None
    fault: str = ""


def find(name: str) -> Method | str:
    """The method of this name, of the table or of another package; else why there is none, empty where none adds it."""
    if name in METHODS:
        return METHODS[name]
    own = [each for each in added() if each.name == name]
    return own[0].method or own[0].fault if own else ""


def names() -> list[str]:
    """Every name that `find` has a method for."""
    return [*METHODS, *(each.name for each in added() if each.method)]


def broken() -> str:
    """What to say after a name that is unknown, and might be of a package that cannot be used."""
    faults = [each.fault for each in added() if each.method is None and each.name not in METHODS]
    return f"; it may be missing as {faults[0]}" if faults else ""


@lru_cache
def added() -> tuple[Added, ...]:
    """What the installed packages add to the table, all of it loaded."""
    rows = [each for plugin in found(GROUP, RecipeError) for each in _added_by(plugin)]
    taken = Counter(each.name for each in rows if each.method)
    by = {name: " and ".join(each.package for each in rows if each.name == name) for name in taken}
    return tuple(
        each._replace(method=None, fault=f"the method {each.name} is added by {by[each.name]}; uninstall one of them")
        if each.method and taken[each.name] > 1
        else each
        for each in rows
    )


def _added_by(plugin: Plugin) -> Iterator[Added]:
    try:
        loaded = plugin.load()
        rows = [loaded] if isinstance(loaded, Method) else plugin.call("listing its methods", list, loaded)
    except RecipeError as error:
        yield Added(plugin.name, plugin.package, None, str(error))
        return
    for row in rows:
        if fault := _misfit(row):
            name = row.name if isinstance(row, Method) else plugin.name
            yield Added(str(name), plugin.package, None, str(plugin.fault(fault)))
        else:
            yield Added(row.name, plugin.package, _told(row, plugin))


def _misfit(row: Any) -> str:
    """Why an object is no row that could be added; empty where it is one."""
    if not isinstance(row, Method):
        return f"gives {row!r:.60} where a fastmerge.methods.Method belongs"
    if row.name in METHODS:
        return f"adds a method {row.name}, which fastmerge has of its own"
    if not (isinstance(row.base, Base) and all(isinstance(each, Parameter) for each in row.parameters)):
        return f"adds a method {row.name} whose base is no Base, or whose parameters are no Parameter"
    if row.direct == (row.function is None):
        return f"adds a method {row.name} that has not one of sweep and function"
    if row.selects and not any(each.name == "density" and each.per_model for each in row.parameters):
        return f"adds a method {row.name} that selects, and has no density for each model"
    odd = [each.name for each in row.parameters if not _may_be_named(each.name)]
    return f"adds a method {row.name} with a parameter {odd[0]!r}, which is no word for Python" if odd else ""


def _may_be_named(parameter: str) -> bool:
    return parameter in KNOWN or (parameter.isidentifier() and not iskeyword(parameter))


def _told(row: Method, plugin: Plugin) -> Method:
    """A row whose failures are those of the plugin."""
    whole = row.function

    def sweep(settings: Settings, measured: Measured) -> Sweep:
        made = plugin.call(f"the sweep of {row.name}", row.sweep, settings, measured)
        if not isinstance(made, Sweep) or len(made.parts) != len(settings.models):
            raise plugin.fault(f"makes of {row.name} no Sweep with a part for each model")
        return made

    def function(models: Sequence[Any], base: Any, settings: Settings) -> Any:
        merged = plugin.call(f"the function of {row.name}", whole or _unswept, models, base, settings)
        kind, shape = (getattr(merged, each, None) for each in ("dtype", "shape"))
        if (kind, shape) != (models[0].dtype, models[0].shape):
            raise plugin.fault(f"makes of {row.name} no tensor of the shape and dtype of its models")
        return merged

    def fault(settings: Settings) -> str:
        return str(plugin.call(f"the fault of {row.name}", row.fault, settings))

    return replace(row, fault=fault, sweep=sweep) if whole is None else replace(row, fault=fault, function=function)
