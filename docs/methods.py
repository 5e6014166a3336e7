"""The page of the methods, from their table: `python docs/methods.py > docs/methods.md`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from fastmerge.methods import METHODS, Base, Method, Parameter

_HEAD = r"""# Every method

Written by `python docs/methods.py` from the table, `fastmerge/methods.py`. Arithmetic is float32, rounded once at the
end. *Fused* methods read each input once for what they measure first (thresholds, inner products), if anything, and
once for the sweep; the others are plain functions over whole float32 tensors, by PyTorch (extra `torch`).

Formulas hold for each element of a tensor, with flags and words at their defaults:

- $\theta_i$ is model $i$ of $N$, $\theta_0$ the base, $d_i = \theta_i - \theta_0$, and $k_i$ what the method
  keeps of it; $n$ elements are in a tensor; sums run over the models in the order of the recipe;
- $w_i$ is `weight`, $p_i$ `density`, $\lambda$ `lambda`, and other letters are parameters of that name or letter;
- $A$ are the models that agree with the vote, $\mathrm{sgn}(w_i k_i) = \mathrm{sgn} \sum_j w_j
  k_j$. It is another set at each element.
"""
_FORMULAS = {
    "linear": r"\frac{\sum_i w_i \theta_i}{\sum_i w_i}",
    "uniform_soup": r"\frac{1}{N} \sum_i \theta_i",
    "task_arithmetic": r"\theta_0 + \lambda \sum_i w_i d_i",
    "ties": r"""\theta_0 + \lambda \frac{\sum_{i \in A} w_i k_i}{\sum_{i \in A} w_i}, \qquad
k_i = \begin{cases} d_i & \text{where } |d_i| \text{ is one of the } \max(1, \lfloor p_i n \rfloor)
\text{ largest} \\ 0 & \text{elsewhere} \end{cases}""",
    "dare_linear": r"""\theta_0 + \lambda \sum_i w_i k_i, \qquad
k_i = \frac{m_i}{p_i} d_i, \quad m_i \sim \mathrm{Bernoulli}(p_i)""",
    "dare_ties": r"""\theta_0 + \lambda \sum_{i \in A} w_i k_i, \qquad
k_i = \frac{m_i}{p_i} d_i, \quad m_i \sim \mathrm{Bernoulli}(p_i)""",
    "breadcrumbs": r"""\theta_0 + \lambda \sum_i w_i k_i, \qquad
k_i = \begin{cases} 0 & \text{at the } \lfloor \gamma_i n \rfloor \text{ largest } |d_i|
\text{ and at the smallest} \\ d_i & \text{at the } \lfloor p_i n \rfloor \text{ between} \end{cases}""",
    "breadcrumbs_ties": r"""\theta_0 + \lambda \sum_{i \in A} w_i k_i, \qquad
k_i \text{ as for breadcrumbs}""",
    "della": r"""\theta_0 + \lambda \frac{\sum_{i \in A} w_i k_i}{\sum_{i \in A} w_i}, \qquad
k_i = \frac{\lVert d_i \rVert_1}{\lVert m_i d_i \rVert_1} m_i d_i, \quad
m_i \sim \mathrm{Bernoulli}(p_i - \varepsilon_i + 2 \varepsilon_i r)""",
    "della_linear": r"""\theta_0 + \lambda \sum_i w_i k_i, \qquad
k_i \text{ as for della}""",
    "sce": r"""\theta_0 + \frac{\sum_{i \in A} w_i k_i}{\sum_{i \in A} w_i}, \qquad
w_i = \frac{\lVert k_i \rVert^2}{\sum_j \lVert k_j \rVert^2}, \quad
k_i = d_i \text{ where the models vary most, else } 0""",
    "ram": r"\theta_0 + \frac{1}{|S|} \sum_{i \in S} d_i, \qquad S = \lbrace i : |d_i| > \varepsilon \rbrace",
    "ramplus_tl": r"""\theta_0 + \begin{cases} \left(1 + r \min(s_i / u_i, \alpha)\right) d_i &
\text{where } S = \lbrace i \rbrace \\
\frac{1}{|S|} \sum_{i \in S} d_i & \text{elsewhere} \end{cases} \qquad S \text{ as for ram}""",
    "nearswap": r"\theta_0 + \mathrm{sgn}(d) \min(|d|, t)",
    "arcee_fusion": r"""\theta_0 + \begin{cases} d & \text{where } q \ge \mathrm{median}(q) + 1.5\, \mathrm{IQR}(q) \\
0 & \text{elsewhere} \end{cases} \qquad
q = |d|\, \mathrm{KL}\left(\mathrm{softmax}(\theta_1), \mathrm{softmax}(\theta_0)\right)""",
    "slerp": r"""\frac{\sin((1-t)\omega)}{\sin(\omega)} \theta_0 + \frac{\sin(t\omega)}{\sin(\omega)} \theta_1, \qquad
\cos(\omega) = \frac{\theta_0 \cdot \theta_1}{\lVert \theta_0 \rVert \lVert \theta_1 \rVert}""",
    "nuslerp": r"""\frac{\sin((1-t)\omega)}{\sin(\omega)} x_1 + \frac{\sin(t\omega)}{\sin(\omega)} x_2, \qquad
t = \frac{w_2}{w_1 + w_2}, \quad \cos(\omega) = \frac{x_1 \cdot x_2}{\lVert x_1 \rVert \lVert x_2 \rVert}""",
    "multislerp": r"""\frac{\sum_i w_i u_i}{\left\lVert \sum_i w_i u_i \right\rVert}
\sum_i w_i \lVert x_i \rVert, \qquad u_i = \frac{x_i}{\lVert x_i \rVert}""",
    "karcher": r"""\frac{u}{N} \sum_i \lVert \theta_i \rVert, \qquad
u = \mathrm{argmin}_{\lVert u \rVert = 1} \sum_i
\arccos^2 \left( u \cdot \frac{\theta_i}{\lVert \theta_i \rVert} \right)""",
    "model_stock": r"""\theta_0 + \frac{t}{N} \sum_i d_i, \qquad
t = \frac{N c}{1 + (N - 1) c}, \quad c \text{ the mean of } \cos(d_i, d_j) \text{ over } i < j""",
    "passthrough": r"s\, \theta_1",
}
_WHERE = {
    "della": "$r$ is the rank of the element's magnitude in its row, 0 for the smallest and 1 for the largest.",
    "sce": "They vary most where their variance is among the largest `select_topk`. The vote of $A$ is not weighted.",
    "ramplus_tl": r"Model $i$ exceeds $\varepsilon$ alone at $u_i$ elements of the tensor, and with others at $s_i$.",
    "arcee_fusion": "Softmax and divergence are of a row, median and quartiles of the tensor.",
    "slerp": r"A straight line where $|\cos(\omega)| > 0.9995$.",
    "nuslerp": r"$x_i$ is $\theta_i$; with a base it is $d_i$, and the base is added.",
    "multislerp": r"$x_i$ is as for nuslerp, and the weights are divided by their sum.",
    "passthrough": "$s$ is `scale`.",
}
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
    yield f"## {row.name}\n\n$$\n{_FORMULAS[row.name]}\n$$\n"
    if row.name in _WHERE:
        yield f"{_WHERE[row.name]}\n"
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
