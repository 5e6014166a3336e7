"""Merges tensors in memory by mergekit's own `merge_state_dicts`, once per line that it is asked in; run by its Python.

    python mergekit_peer.py THREADS

A line is JSON: {"load": the safetensors files of the inputs} keeps them in memory, {"method", "parameters", "base": the
place of the base among the inputs, or null} merges them and is answered {"seconds"}, {"save": file} keeps the result.
"""

from __future__ import annotations

import json
import sys
from time import perf_counter
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    inputs: list[dict[str, torch.Tensor]] = []
    merged: dict[str, torch.Tensor] = {}
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        answer = {}
        if "load" in asked:
            inputs = [{name: each.clone() for name, each in load_file(path).items()} for path in asked["load"]]
        elif "save" in asked:
            save_file(merged, asked["save"])
        else:
            merged = {}  # freed before the clock starts
            started = perf_counter()
            with torch.no_grad():
                merged = merge_state_dicts(inputs, asked["method"], parameters=asked["parameters"], base=asked["base"])
            answer["seconds"] = perf_counter() - started
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
