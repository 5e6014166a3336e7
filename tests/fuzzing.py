"""How much the fuzz tests try: some hundred examples, always the same; or as many new ones as FUZZ_EXAMPLES says, of
which those that fail are kept in tests/corpus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from hypothesis import HealthCheck, settings
from hypothesis.errors import HypothesisException

CORPUS = Path(__file__).with_name("corpus")
LONG = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def examples(count: int) -> settings:
    """The decorator of a test that is to try so many."""
    return settings(
        max_examples=LONG or count,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def counted(what: str) -> Iterator[Callable[[], None]]:
    """Says at the end how often the function was called, and for how long."""
    tried, start = 0, perf_counter()

    def count() -> None:
        nonlocal tried
        tried += 1

    yield count
    print(f"\n{what}: {tried:,} cases in {(perf_counter() - start) / 60:.1f} minutes")


@contextmanager
def kept(folder: str, suffix: str, data: bytes) -> Iterator[None]:
    """In a long run, data that fail within the block stay in the corpus: of each kind of failure the last, which
    hypothesis has made small."""
    try:
        yield
    except HypothesisException:
        raise
    except Exception as error:
        if LONG:
            (CORPUS / folder / f"found-{type(error).__name__}{suffix}").write_bytes(data)
        raise


def corpus(folder: str) -> list[Path]:
    """What was kept."""
    return sorted((CORPUS / folder).iterdir())
