"""The table of merge methods: for each, its parameters, what it measures, and the sweep that computes it.

A method is a row. It knows numbers and names, never a tensor or a backend; what it needs to know of the tensors (a
threshold, the Gram matrix) is measured by the engine and handed to `Method.sweep`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache

from .sweep import CERTAIN, EVERY, Cut, Elect, Keep, Mean, Part, Rescale, Sweep, TieVote

Value = float | bool | str | None


class Base(Enum):
    """What a method makes of `base_model`."""

    INPUT = "input"  # one more model
    ORIGIN = "origin"  # deltas are taken from it; required
    ENDPOINT = "endpoint"  # the first of two models; required


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
    """What the ops said of one tensor: the cut per model (`ranks`), the M x M Gram matrix of the models (`gram`)."""

    cuts: tuple[Cut, ...] = ()
    gram: Sequence[Sequence[float]] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """A row of the table. `models` bounds how many take part, without an ORIGIN base but with an ENDPOINT one."""

    name: str
    formula: str
    paper: str
    base: Base
    models: tuple[int, int | None]
    parameters: tuple[Parameter, ...]
    sweep: Callable[[Settings, Measured], Sweep]
    selects: bool = False  # wants `Measured.cuts`, at the ranks of `ranks`
    gram: bool = False  # wants `Measured.gram`
    random: bool = False

    def parameter(self, name: str) -> Parameter | None:
        return next((p for p in self.parameters if p.name == name), None)


@lru_cache
def ranks(settings: Settings, count: int) -> tuple[int, ...]:
    """How many of `count` elements each model keeps: max(1, int(density * count)), none at density 0."""
    return tuple(_rank(_number(model, "density"), count) for model in settings.models)


@lru_cache
def rescale_of(method: Method, settings: Settings) -> Rescale:
    """The norm that the kept deltas are brought back to after `Keep`, NONE where the method's own factor does it."""
    choice = _rescale(method.random, settings)
    return {"l1": Rescale.L1, "l2": Rescale.L2, "linf": Rescale.LINF}.get(choice, Rescale.NONE)


# --- the sweeps of the table ---


def _linear(settings: Settings, _: Measured) -> Sweep:
    weights = _weights(settings)
    divisor = math.fsum(weights) if settings.shared.get("normalize", True) else 1.0
    return Sweep(tuple(Part(weight) for weight in weights), divisor=divisor)


def _uniform_soup(settings: Settings, _: Measured) -> Sweep:
    return Sweep((Part(),) * len(settings.models), divisor=float(len(settings.models)))


def _task_arithmetic(settings: Settings, _: Measured) -> Sweep:
    return _averaged(settings, tuple(Part(weight) for weight in _weights(settings)), Keep.ALL)


def _ties(settings: Settings, measured: Measured) -> Sweep:
    every = settings.shared["ties"] == "all"
    parts = tuple(
        Part(
            weight,
            _inverse(False, settings, model),
            magnitude=cut.magnitude,
            ties_end=EVERY if every and _number(model, "density") > 0.0 else cut.ties_end,
        )
        for weight, model, cut in zip(_weights(settings), settings.models, measured.cuts, strict=True)
    )
    return _elected(settings, parts, Keep.ABOVE)


def _dare_linear(settings: Settings, _: Measured) -> Sweep:
    return _averaged(settings, _dropped(settings), Keep.BERNOULLI)


def _dare_ties(settings: Settings, _: Measured) -> Sweep:
    return _elected(settings, _dropped(settings), Keep.BERNOULLI)


def _slerp(settings: Settings, measured: Measured) -> Sweep:
    t = _number(settings.shared, "t")
    (aa, ab), (_, bb) = measured.gram
    norm_a, norm_b = (norm if norm >= 1e-8 else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb)))
    cosine = max(-1.0, min(1.0, ab / (norm_a * norm_b)))
    if abs(cosine) > 0.9995:
        return Sweep((Part(1.0 - t), Part(t)))
    angle = math.acos(cosine)
    return Sweep((Part(math.sin((1.0 - t) * angle) / math.sin(angle)), Part(math.sin(t * angle) / math.sin(angle))))


def _passthrough(settings: Settings, _: Measured) -> Sweep:
    scale = settings.models[0].get("scale")
    return Sweep((Part(1.0 if scale is None else float(scale)),))


# --- what several of them share ---


def _averaged(settings: Settings, parts: tuple[Part, ...], keep: Keep) -> Sweep:
    """Every model takes part: a sum, over the sum of the weights where the recipe normalises."""
    divisor = math.fsum(part.weight for part in parts) if settings.shared["normalize"] else 1.0
    return Sweep(
        parts, keep, divisor=divisor if abs(divisor) >= 1e-8 else 1.0, lambda_=_number(settings.shared, "lambda")
    )


def _elected(settings: Settings, parts: tuple[Part, ...], keep: Keep) -> Sweep:
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
        lambda_=_number(shared, "lambda"),
    )


def _dropped(settings: Settings) -> tuple[Part, ...]:
    """Parts whose elements stay with probability `density`."""
    return tuple(
        Part(
            weight,
            _inverse(True, settings, model),
            cut=min(CERTAIN, round(_number(model, "density") * CERTAIN)),
            key=key,
        )
        for weight, model, key in zip(_weights(settings), settings.models, settings.keys, strict=True)
    )


def _rank(density: float, count: int) -> int:
    if density <= 0.0:
        return 0
    return count if density >= 1.0 else max(1, int(density * count))


def _rescale(random: bool, settings: Settings) -> str:
    """`rescale` as a word: true means 1/density for random drops, the L1 norm for trims."""
    choice = settings.shared.get("rescale", False)
    if isinstance(choice, str):
        return choice
    return ("inverse" if random else "l1") if choice else "none"


def _inverse(random: bool, settings: Settings, model: Mapping[str, Value]) -> float:
    density = _number(model, "density")
    return 1.0 / density if _rescale(random, settings) == "inverse" and density > 0.0 else 1.0


def _weights(settings: Settings) -> list[float]:
    return [_number(model, "weight") for model in settings.models]


def _number(values: Mapping[str, Value], name: str) -> float:
    value = values[name]
    if not isinstance(value, int | float):
        raise TypeError(f"{name} was not resolved to a number: {value!r}")
    return float(value)


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

#: Parameters of mergekit's other methods: accepted and unused, as a known parameter of another method always is.
_OTHERS = (
    "gamma epsilon filter_wise select_topk nuslerp_flatten nuslerp_row_wise normalize_weights eps max_iter tol r alpha"
)

#: Every parameter that a recipe may name.
KNOWN = frozenset(_OTHERS.split()) | {DROP_RATE} | {parameter.name for row in _ROWS for parameter in row.parameters}
