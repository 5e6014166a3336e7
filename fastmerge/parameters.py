"""Parameters as a recipe writes them: scalars, gradients, and conditions on tensor names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .errors import FastmergeWarning, RecipeError
from .marked import Marked, documents, meant, printable
from .methods import DROP_RATE, KNOWN, Method, Parameter, Value


@dataclass(frozen=True, slots=True)
class Setting:
    """A parameter as written in one place: conditions, of which the first that matches gives the value."""

    parameter: Parameter
    conditions: tuple[Condition, ...]
    place: str

    @property
    def constant(self) -> Value:
        """The value that every tensor gets; None when it depends on the tensor."""
        first = self.conditions[0]
        return first.values[0] if first.filter is None and len(first.values) == 1 else None

    def read(self, tensor: str, t: float) -> Value:
        """The value for a tensor at layer position `t` in [0, 1]; None when no condition matches."""
        for condition in self.conditions:
            if condition.filter is None or condition.filter in tensor:
                return _along(condition.values, t, self.parameter.kind is float)
        return None


class Condition(NamedTuple):
    """A scalar (one value) or gradient (several) for the tensors whose name contains `filter`; None: for all."""

    filter: str | None
    values: tuple[Value, ...]
    place: str


Parameters = Mapping[str, Setting]


def read_parameters(fields: Mapping[str, Marked], method: Method, own: bool = False) -> Parameters:
    """The settings under `parameters` that mean something to the method; `own` when they belong to one model."""
    written = fields["parameters"].mapping() if "parameters" in fields else {}
    settings = {}
    for name, at in written.items():
        if name not in KNOWN and method.parameter(name) is None:
            raise at.error(f"unknown parameter {name!r}{meant(name, KNOWN)}")
        if name == DROP_RATE and "density" in written:
            raise at.error("drop_rate and density are both given; drop_rate is 1 - density, keep one")
        parameter = _parameter(name, method)
        if parameter is None:
            continue
        if own and not parameter.per_model:
            fault = f"{name} is one for all models and has no effect here; move it to the recipe's parameters"
            warnings.warn(f"{at.place}: {fault}", FastmergeWarning, stacklevel=2)
            continue
        conditions = [
            condition._replace(values=_densities(condition.values)) if name == DROP_RATE else condition
            for condition in _conditions(at, parameter)
        ]
        settings[parameter.name] = Setting(parameter, tuple(conditions), at.place)
    return settings


def setting_of(name: str, text: str, method: Method) -> Setting:
    """The setting of one value, written as text, for all tensors; what is wrong with it is said of ``name=text``."""
    place = printable(f"{name}={text}")
    parameter = _parameter(name, method)
    if parameter is None and name not in KNOWN:
        raise RecipeError(f"unknown parameter {name!r}{meant(name, KNOWN)}", place)
    if parameter is None:
        names = ", ".join(parameter.name for parameter in method.parameters) or "none"
        raise RecipeError(f"{method.name} has no parameter {name}; it has {names}", place)
    read = [_scalar(at, parameter) for at in documents(text, place)]
    if len(read) != 1 or read[0] is None:
        raise RecipeError(f"{name} must be {_wanted(parameter)}, not {text!r}", place)
    values = _densities((read[0],)) if name == DROP_RATE else (read[0],)
    return Setting(parameter, (Condition(None, values, place),), place)


def _parameter(name: str, method: Method) -> Parameter | None:
    return method.parameter("density" if name == DROP_RATE else name)


def _densities(drop_rates: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(round(1.0 - float(rate or 0.0), 12) for rate in drop_rates)  # so that 0.9 becomes 0.1


def _conditions(at: Marked, parameter: Parameter) -> list[Condition]:
    if isinstance(at.value, dict):
        return [_condition(at, parameter)]
    if isinstance(at.value, list) and any(isinstance(item.value, dict) for item in at.value):
        return [_condition(item, parameter) for item in at.items()]
    return [Condition(None, _values(at, parameter), at.place)]


def _condition(at: Marked, parameter: Parameter) -> Condition:
    fields = at.fields(("filter", "value"))
    if "value" not in fields:
        raise at.error("a condition needs a value, beside its filter")
    text = fields["filter"].text() if "filter" in fields else "*"
    return Condition(None if text == "*" else text, _values(fields["value"], parameter), at.place)


def _values(at: Marked, parameter: Parameter) -> tuple[Value, ...]:
    ends = at.items() if isinstance(at.value, list) else [at]
    if not ends:
        raise at.error(f"{parameter.name} is an empty list; give it values or remove it")
    return tuple(_value(end, parameter) for end in ends)


def _value(at: Marked, parameter: Parameter) -> Value:
    value = _scalar(at, parameter)
    if value is None:
        raise at.error(f"{parameter.name} must be {_wanted(parameter)}, not {at.said()}")
    return value


def _scalar(at: Marked, parameter: Parameter) -> Value:
    """The value, None where the parameter does not take it."""
    if parameter.kind is float:
        number = at.number()
        return number if number is not None and parameter.low <= number <= parameter.high else None
    if isinstance(at.value, str) and at.value in parameter.words:
        return at.value
    return _FLAGS.get(str(at.value).lower()) if parameter.kind is bool else None


_FLAGS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def _wanted(parameter: Parameter) -> str:
    if parameter.kind is float:
        bounds = math.isfinite(parameter.low) and math.isfinite(parameter.high)
        return f"a number from {parameter.low:g} to {parameter.high:g}" if bounds else "a finite number"
    return " or ".join([*(("true", "false") if parameter.kind is bool else ()), *parameter.words])


def _along(values: tuple[Value, ...], t: float, numeric: bool) -> Value:
    """The gradient at `t`. Between two numbers it stays between them, so what the ends may be, the value may be."""
    position = t * (len(values) - 1)
    low = int(position)
    fraction = position - low
    if not numeric or fraction == 0.0:
        return values[low]
    first, second = float(values[low] or 0.0), float(values[low + 1] or 0.0)
    return min(max((1.0 - fraction) * first + fraction * second, min(first, second)), max(first, second))
