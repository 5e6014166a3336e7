"""What the bytes of a merge follow from, as plain data: by it an unfinished output is known again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from .checkpoint import Checkpoint
from .checkpoint.header import cannot_read
from .checkpoint.reader import names_in
from .methods import METHODS, added
from .planner import Plan, Planned
from .provenance import ARITHMETIC, fingerprint
from .sources.lora import Adapted

_READ_BESIDE = (".json", ".model", ".jinja", ".txt")  # configs and tokenizers


def identity(plan: Plan, *, seed: int | None, nonfinite: str, backend: str) -> dict[str, Any]:
    """All but the recipe's text and the layout of the files, which each output has of its own."""
    return {
        "seed": seed,
        "nonfinite": nonfinite,
        "backend": backend,
        "arithmetic": ARITHMETIC,
        "package": packages(plan),
        "input": {file: stamp for stage in plan.stages for model in stage.models for file, stamp in _stamps(model)},
    }


def packages(plan: Plan) -> dict[str, str]:
    """The methods that are not our own, with the packages that add them."""
    names = {stage.document.method.name for stage in plan.stages} - METHODS.keys()
    return {f"method {row.name}": row.package for row in (added() if names else ()) if row.name in names}


def _stamps(model: Checkpoint | Planned) -> Iterator[tuple[str, list[int | str]]]:
    """Size, time of change and fingerprint of each file that a merge reads of a model: copies keep times, too."""
    if isinstance(model, Planned):
        return
    halves = [model.folder, *([model.adapter.folder] if isinstance(model, Adapted) else [])]
    beside = [folder / name for folder in halves for name in names_in(folder) if name.endswith(_READ_BESIDE)]
    for file in dict.fromkeys((*model.files, *beside)):
        try:
            status = os.stat(file)
        except OSError as error:
            model.check_unchanged()  # which says so
            raise cannot_read(file, error) from None
        yield str(file), [status.st_size, status.st_mtime_ns, fingerprint(file)]
