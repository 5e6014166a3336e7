"""LoRA as PEFT does it, timed without its imports; run by a Python that has PEFT.

    python peft_peer.py THREADS fuse BASE ADAPTER OUT
    python peft_peer.py THREADS TYPE BASE ONE TWO OUT DENSITY

The first loads the base in its own dtype, applies `merge_and_unload` and saves; all of that is timed. The second times
`add_weighted_adapter` of a TYPE alone, with the model and both adapters loaded. Prints the seconds and the version.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    what, *rest = sys.argv[2:]
    with torch.no_grad():
        seconds = fuse(*rest) if what == "fuse" else combine(what, *rest)
    print(json.dumps({"seconds": seconds, "version": peft.__version__}))


def fuse(base: str, adapter: str, out: str) -> float:
    started = perf_counter()
    model = peft.PeftModel.from_pretrained(_loaded(base), adapter)
    model.merge_and_unload().save_pretrained(out)
    return perf_counter() - started


def combine(kind: str, base: str, one: str, two: str, out: str, density: str) -> float:
    model = peft.PeftModel.from_pretrained(_loaded(base), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    started = perf_counter()
    model.add_weighted_adapter(["one", "two"], [0.7, 0.5], "both", kind, density=float(density))
    seconds = perf_counter() - started
    model.save_pretrained(out, selected_adapters=["both"])
    return seconds


def _loaded(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype="auto")


if __name__ == "__main__":
    main()
