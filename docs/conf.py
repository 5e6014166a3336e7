"""How Sphinx builds the site: from the repository's root, so that README.md and the pages of bench/ are in it."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import fastmerge

project = "fastmerge"
copyright = "the authors of fastmerge"
release = version = fastmerge.__version__

root_doc = "docs/index"
include_patterns = ["docs/*.md", "bench/*.md", "bench/page/*.md", "*.md"]
exclude_patterns = [".*", "build", "csrc", "fastmerge", "kernels", "tests", "bench/results"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # the docstrings' `single` quotes
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"fastmerge {release}"
html_additional_pages = {"index": "redirect.html"}
templates_path = ["."]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.connect("autodoc-process-docstring", _literal, priority=400)  # before napoleon
    app.connect("sphinx-click-process-options", _plain)


def _inline(translator: Any, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw themselves: no script, nothing from another host."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.Element) -> None:
    translator.body.append(f"<div>{tex2mathml(node.astext(), as_block=True)}</div>")
    raise nodes.SkipNode


def _literal(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """In docstrings an indented paragraph is code, as in Markdown."""
    lines[:] = re.sub(r"^(\S.*)\n\n(?= {4})", r"\1\n\n::\n\n", "\n".join(lines), flags=re.MULTILINE).split("\n")


def _plain(app: Sphinx, context: object, lines: list[str]) -> None:
    """In the help of an option a word may end in an underscore, which is no reference."""
    lines[:] = [re.sub(r"(?<=\w)_(?!\w)", r"\_", line) for line in lines]
