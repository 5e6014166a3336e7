"""The page of the methods, from their table: `python docs/methods.py > docs/methods.md`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from fastmerge.methods import METHODS, Base, Method, Parameter

_HEAD = """# Every method

Written by `python docs/methods.py` from the table, `fastmerge/methods.py`. `d_i = model_i - base`, sums over the models
in the order of the recipe. Arithmetic is float32, rounded once at the end. *Fused* methods read each input once for
what they measure first (thresholds, inner products), if anything, and once for the sweep; the others are plain
functions over whole float32 tensors, by PyTorch (extra `torch`).
"""
_BASES = {
    Base.INPUT: "none; a base is one more model",
    Base.ORIGIN: "required: deltas are taken from it",
    Base.ENDPOINT: "required: the first of the two",
    Base.OPTIONAL: "optional: with one, deltas are taken from it",
}


def page() -> str:
    return "\n".join([_HEAD, *(line for row in METHODS.values() for line in _section(row))])


def _section(row: Method) -> Iterator[str]:
    least, most = row.models
    many = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
    beside = " beside the base" if row.base in (Base.ORIGIN, Base.OPTIONAL) else ""
    yield f"## {row.name}\n\n    {row.formula}\n"
    fused = "Not fused" if row.direct else "Fused"
    yield f"{_linked(row.paper)}. {fused}. Models: {many}{beside}. Base: {_BASES[row.base]}.\n"
    if row.parameters:
        yield "| parameter | default | of each model | |\n| --- | --- | --- | --- |"
        yield from map(_parameter, row.parameters)
        yield ""


def _parameter(each: Parameter) -> str:
    default = "required" if each.required else "-" if each.default is None else str(each.default).lower()
    bounds = [f"from {each.low:g}"] * (each.low > -math.inf) + [f"to {each.high:g}"] * (each.high < math.inf)
    words = (["a flag, or"] if each.kind is bool and each.words else []) + [", ".join(each.words)]
    says = "; ".join(filter(None, (each.help, " ".join(bounds), " ".join(words).strip())))
    return f"| `{each.name}` | {default} | {'yes' if each.per_model else ''} | {says} |"


def _linked(paper: str) -> str:
    if paper == "-":
        return "No paper"
    return re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


if __name__ == "__main__":
    print(page(), end="")
