"""What can go wrong for a user, as a small tree of exceptions.

    FastmergeError
      RecipeError        the recipe: a key, a value, a place in the YAML
      CheckpointError    an input on disk: a header, an index, a shard, a config
      MismatchError      inputs that are fine alone but do not fit one another
      NonFiniteError     NaN or Inf among the input weights
      OutputError        the output folder: not empty, inside an input, full, in use
      BackendError       a provider or instruction set asked for by name that cannot run

Each message is one sentence that says what is wrong, where, and what to do. `FastmergeWarning` is the category of
everything that is odd but defined.
"""

from __future__ import annotations


class FastmergeError(Exception):
    """Base of every error that a user can cause and mend."""


class RecipeError(FastmergeError):
    """The recipe cannot mean what it says; `place` is where, for example ``recipe.yml:4: models[1].parameters``."""

    def __init__(self, message: str, place: str | None = None) -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.place = place


class CheckpointError(FastmergeError):
    """A file or folder that should hold a model does not, or changed while it was read."""


class MismatchError(FastmergeError):
    """Models that cannot be merged with one another as they are."""


class NonFiniteError(FastmergeError):
    """An input holds NaN or Inf; the message names tensor, model, count and first index."""


class OutputError(FastmergeError):
    """The output cannot be written where it was asked for."""


class BackendError(FastmergeError):
    """A provider or instruction set asked for by name cannot run here; the message says why."""


#: What a provider says when an input that it reads through a mapping ends too soon; the engine finds out which.
CUT = "an input file became shorter while it was read; merge again from a whole copy"


class FastmergeWarning(UserWarning):
    """Something odd in the inputs, with a defined result."""
