"""mergekit-yaml's options as data: what each takes, and what becomes of it here."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple


class Fate(Enum):
    """What becomes of an option."""

    HONOURED = "honoured"
    ACCEPTED = "accepted"  # one line says why it does nothing
    REFUSED = "refused"  # one sentence says why


class Takes(Enum):
    """What follows an option."""

    SWITCH = "nothing, and there is a --no- of it"
    NOTHING = "nothing"
    NOTHING_OFTEN = "nothing, and it may be given again"
    TEXT = "a text"
    NUMBER = "a whole number from 0 up"
    SIZE = "a whole number, of thousands, millions or billions with k, m or b"


class Flag(NamedTuple):
    """One option.

    `sets` is the keyword of `fastmerge.merge`, or in capitals the variable of the environment, that gets its value, or
    what `values` has for it: for a backend, the kind of device. A switch of no effect says nothing as long as it is as
    mergekit has it when it is not given: off, or on where it is `usually_on`.
    """

    names: tuple[str, ...]
    takes: Takes
    fate: Fate
    says: str
    sets: str = ""
    values: Mapping[Any, str] = MappingProxyType({})
    usually_on: bool = False

    @property
    def key(self) -> str:
        """The last of its names, as Python spells it."""
        return self.names[-1].lstrip("-").replace("-", "_")

    @property
    def ours(self) -> bool:
        """Whether fastmerge has it by the same name."""
        return self.key == self.sets

    def spelled(self, value: object) -> str:
        """The option as it must have been written to have this value."""
        return self.names[-1].replace("--", "--no-", 1) if value is False else self.names[-1]

    def speaks(self, value: object) -> bool:
        """Whether this value asks for something out of the usual."""
        return value is not self.usually_on


FLAGS = (
    # what it warns of
    Flag(
        ("--allow-crimes",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, models fit by the names and shapes of their tensors, whatever their architecture is called",
    ),
    Flag(
        ("--unsafe-truncate-embeddings",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not done, equal rows need not be equal tokens; where vocabularies differ, tokenizer_source makes them one",
    ),
    Flag(
        ("--trust-remote-code",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, no code of a model is ever run",
    ),
    # where things lie
    Flag(
        ("--transformers-cache",),
        Takes.TEXT,
        Fate.HONOURED,
        "folder that keeps what is downloaded, as HF_HUB_CACHE in the environment says it",
        "HF_HUB_CACHE",
    ),
    Flag(
        ("--lora-merge-cache",),
        Takes.TEXT,
        Fate.ACCEPTED,
        "not needed, no merged copy of an adapter is ever written",
    ),
    # what is computed
    Flag(
        ("--lora-merge-dtype",),
        Takes.TEXT,
        Fate.ACCEPTED,
        "not needed, all arithmetic is in float32 or wider",
    ),
    Flag(("--random-seed",), Takes.NUMBER, Fate.HONOURED, "seed of the random drops", "seed"),
    # what is said
    Flag(("-v",), Takes.NOTHING_OFTEN, Fate.ACCEPTED, "not needed, fastmerge plan tells what a merge does"),
    Flag(("--quiet",), Takes.SWITCH, Fate.HONOURED, "print nothing but errors", "quiet"),
    # who computes it
    Flag(
        ("--cuda",),
        Takes.SWITCH,
        Fate.HONOURED,
        "on the GPUs, or with --no-cuda on the CPU; by default where it is faster",
        "backend",
        {True: "gpu", False: "cpu"},
    ),
    Flag(
        ("--device",),
        Takes.TEXT,
        Fate.HONOURED,
        "one of auto, cpu, cuda and xpu; all GPUs take part, and CUDA_VISIBLE_DEVICES says which there are",
        "backend",
        {"auto": "auto", "cpu": "cpu", "cuda": "gpu", "xpu": "gpu"},
    ),
    Flag(
        ("--gpu-rich",),
        Takes.NOTHING,
        Fate.ACCEPTED,
        "taken as --cuda, and nothing more is needed",
        "backend",
        {True: "gpu"},
    ),
    Flag(
        ("--multi-gpu",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, all GPUs take part that are seen",
    ),
    Flag(
        ("--low-cpu-memory",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, a merge never has a model in memory",
    ),
    Flag(
        ("--read-to-gpu",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, what a GPU merges goes there piece by piece while others are merged",
    ),
    Flag(
        ("--lazy-unpickle",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, models are safetensors and mapped; a pickle is never loaded",
    ),
    Flag(("-j", "--num-threads"), Takes.NUMBER, Fate.HONOURED, "workers; by default one per processor", "threads"),
    Flag(
        ("--async-write",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, tensors go to their place in the files as they are merged",
    ),
    Flag(
        ("--write-threads",),
        Takes.NUMBER,
        Fate.ACCEPTED,
        "not needed, who merges a tensor writes it",
    ),
    # what is written
    Flag(
        ("--out-shard-size",),
        Takes.SIZE,
        Fate.HONOURED,
        "most bytes in one file, such as 500M or 5B (billion); 0 for one file",
        "shard_size",
    ),
    Flag(
        ("--copy-tokenizer",),
        Takes.SWITCH,
        Fate.HONOURED,
        "copy the files of the tokenizer, as by default",
        "copy_tokenizer",
    ),
    Flag(
        ("--clone-tensors",),
        Takes.SWITCH,
        Fate.ACCEPTED,
        "not needed, each tensor of the output has bytes of its own",
    ),
    Flag(
        ("--write-model-card",),
        Takes.SWITCH,
        Fate.HONOURED,
        "write README.md and mergekit_config.yml, as by default",
        "write_model_card",
    ),
    Flag(
        ("--safe-serialization",),
        Takes.SWITCH,
        Fate.REFUSED,
        "only safetensors are written, never pickles; leave it out",
        usually_on=True,
    ),
)
