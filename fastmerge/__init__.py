"""fastmerge: merges fine-tuned language-model checkpoints at the speed of memory.

    import fastmerge
    report = fastmerge.merge("recipe.yml", "merged/")

Importing this package imports neither torch nor triton, and no kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    BackendError,
    CheckpointError,
    FastmergeError,
    FastmergeWarning,
    MismatchError,
    NonFiniteError,
    OutputError,
    RecipeError,
)

if TYPE_CHECKING:
    from . import lora
    from .comparing import Comparison, diff
    from .engine import Report, merge
    from .live import merge_into, merge_state_dicts, merge_tensors
    from .planner import Plan, plan
    from .recipe import Recipe
    from .session import Session
    from .verifying import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "Comparison",
    "FastmergeError",
    "FastmergeWarning",
    "MismatchError",
    "NonFiniteError",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "Report",
    "Session",
    "Verification",
    "diff",
    "lora",
    "merge",
    "merge_into",
    "merge_state_dicts",
    "merge_tensors",
    "plan",
    "verify",
]

#: The module of each public name that is loaded when first asked for.
_LAZY = {
    "Comparison": "comparing",
    "Plan": "planner",
    "Recipe": "recipe",
    "Report": "engine",
    "Session": "session",
    "Verification": "verifying",
    "diff": "comparing",
    "lora": "lora",
    "merge": "engine",
    "merge_into": "live",
    "merge_state_dicts": "live",
    "merge_tensors": "live",
    "plan": "planner",
    "verify": "verifying",
}


def __getattr__(name: str) -> Any:
    """The public names whose modules are loaded when first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f".{_LAZY[name]}", __name__)
    value = module if name == _LAZY[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
