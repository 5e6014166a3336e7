"""Models on the hub: those files of a repository that a merge reads, in the cache of huggingface_hub."""

from __future__ import annotations

import glob
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .checkpoint import CARD, CONFIG, COPIED, INDEX, SINGLE, no_model, shards_named
from .errors import CheckpointError
from .sources.adapter import CONFIG as ADAPTER_CONFIG
from .sources.adapter import WEIGHTS as ADAPTER_WEIGHTS
from .sources.adapter import no_adapter


class Snapshot(NamedTuple):
    """A repository as it was at a commit: what was fetched of it lies in `folder`."""

    folder: Path
    commit: str


def snapshot(name: str, revision: str | None, *, adapter: bool = False) -> Snapshot:
    """Fetches what the cache lacks of a model, or of an adapter: weights in safetensors, config, card, tokenizer files;
    no pickles, no code.

    `revision` is a branch, a tag or a commit, by default the main branch. Where the hub cannot be reached, the cache
    must hold it all. Raises CheckpointError.
    """
    try:
        import huggingface_hub as client
        from huggingface_hub import errors
    except ImportError:
        raise CheckpointError(
            f"there is no folder or document {name!r}, and to take it from the hub needs `pip install 'fastmerge[hub]'`"
        ) from None

    # The base of its errors is that of the HTTP library that it takes, whichever that is.
    failures: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, *errors.HfHubHTTPError.__bases__)

    def fetch(revision: str | None, files: Sequence[str], but: str | None = None) -> Path:
        return Path(client.snapshot_download(name, revision=revision, allow_patterns=list(files), ignore_patterns=but))

    try:
        folder = fetch(revision, [*([ADAPTER_CONFIG] if adapter else [CONFIG, INDEX]), CARD, *COPIED], but="*/*")
        commit = folder.name
        weights = shards_named(folder / INDEX) if (folder / INDEX).exists() else [SINGLE]
        if adapter:
            weights = [ADAPTER_WEIGHTS]
        fetch(commit, [glob.escape(file) for file in weights])
        if not all((folder / file).exists() for file in weights):
            held = client.HfApi().list_repo_files(name, revision=commit)  # an error where there is no hub to ask
            if adapter and ADAPTER_WEIGHTS not in held:
                raise CheckpointError(no_adapter(name, held))
            if not adapter and SINGLE not in held and INDEX not in held:
                raise CheckpointError(no_model(name, held))
        return Snapshot(folder, commit)
    except errors.GatedRepoError:
        reason = f"{name!r} is gated on the hub: accept its terms on its page there, and run `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"{name!r} has no revision {revision!r} on the hub: write one of its branches, tags or commits"
    except errors.RepositoryNotFoundError:
        reason = (
            f"there is no folder or document {name!r}, and no model of that id on the hub that you may read: mend the "
            "name, or run `hf auth login` where it is private"
        )
    except failures as error:
        cause = error.__cause__ or error
        command = shlex.join(["hf", "download", name, *(["--revision", revision] if revision else [])])
        reason = (
            f"there is no folder or document {name!r}, the hub's cache does not hold it all, and it cannot be fetched "
            f"({type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}): mend that, or run `{command}` "
            "where the hub can be reached"
        )
    raise CheckpointError(reason)
