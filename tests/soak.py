"""Kills merges again and again, goes on with them, and compares every byte: `python tests/soak.py --kills 200`."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter

from injected import RECIPES, SIGNALS, compiled, files, inputs, looks_whole, merge, save_models, tensors_noted

_OPTIONS = ((), ("--shard-size", "60KB"))
_LAYERS = 12
_CALLS = {"pwrite": 74, "write": 44, "fsync": 18, "rename": 14, "unlink": 3, "fallocate": 7, "any": 150}
_DISK = ("ENOSPC", "EIO", "EDQUOT")
_DONE = "nothing, as it was done before"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastmerge-soak-") as name:
        print(soak(Path(name), asked.kills, random.Random(asked.seed)))


def soak(folder: Path, kills: int, chance: random.Random) -> str:
    """What was survived, in a sentence; AssertionError where anything was lost, mixed or changed."""
    layer = compiled(folder)
    if layer is None:
        sys.exit("the soak needs Linux and a C++ compiler")
    save_models(folder, _LAYERS)
    before = inputs(folder)
    started = perf_counter()
    ends: Counter[str] = Counter()
    merges = compared = within = 0
    expected: dict[tuple[str, ...], dict[str, bytes]] = {}
    while sum(ends.values()) - ends[_DONE] < kills:
        arguments = (f"{chance.choice(list(RECIPES))}.yml", "out", *chance.choice(_OPTIONS))
        if arguments not in expected:
            assert merge(folder, arguments).code == 0
            expected[arguments] = files(folder / "out")
            shutil.rmtree(folder / "out")
        for _ in range(chance.randrange(1, 5)):
            before_it = tensors_noted(folder / "out")
            ends[_disturbed(folder, arguments, layer, chance)] += 1
            if looks_whole(folder / "out"):
                break
            within += tensors_noted(folder / "out") > before_it
        if not looks_whole(folder / "out"):
            ended = merge(folder, arguments)
            assert ended.code == 0, ended
        visible = {name: data for name, data in files(folder / "out").items() if not name.startswith(".")}
        assert visible == expected[arguments], f"{arguments} ended in other bytes"
        assert inputs(folder) == before, "an input changed"
        merges += 1
        compared += sum(map(len, visible.values()))
        shutil.rmtree(folder / "out")
    told = ", ".join(f"{count} by {end}" for end, count in ends.most_common())
    minutes = (perf_counter() - started) / 60
    said = f"{merges} merges, {sum(ends.values())} ends ({told}), {within} of them while tensors were merged"
    return f"{said}, {compared:,} bytes compared, in {minutes:.1f} minutes"


def _disturbed(folder: Path, arguments: tuple[str, ...], layer: Path, chance: random.Random) -> str:
    """Merges with one thing in the way, and says what ended it."""
    if chance.random() < 0.3:
        starting = chance.random() < 0.1
        timer = {"start_timer": chance.uniform(0.02, 0.3)} if starting else {"timer": 10 ** chance.uniform(-2.3, -0.6)}
        ended = merge(folder, arguments, **timer)
        kind, codes = "a timer at any moment", {0, -14}
    else:
        call, most = chance.choice(list(_CALLS.items()))
        what = chance.choice((*SIGNALS, *SIGNALS, *_DISK))
        if what in _DISK and call == "any":
            call = "pwrite"
        ended = merge(folder, arguments, layer=layer, fault=f"{call} {chance.randrange(1, most)} {what}")
        kind, codes = (f"SIG{what}", {0, SIGNALS[what]}) if what in SIGNALS else (what, {0, 2})
    assert ended.code in codes, (kind, ended)
    assert "Traceback" not in ended.err, ended.err
    return _DONE if ended.code == 0 else kind


if __name__ == "__main__":
    main()
