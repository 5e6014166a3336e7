"""What an installed fastmerge does with its own dependencies and nothing else: tiny merges, their values checked.

python smoke.py                 # the compiled core computes, and torch is not needed
python smoke.py --without-core  # torch computes, and it is told why
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

import fastmerge

VALUES = {"base": [1.0, -2.0, 3.0, 0.5], "code": [2.0, -2.0, 5.0, 0.5], "maths": [1.0, 0.0, 4.0, 0.25]}
RECIPE = """\
merge_method: task_arithmetic
base_model: {0}/base
models:
  - {{model: {0}/code, parameters: {{weight: 1.0}}}}
  - {{model: {0}/maths, parameters: {{weight: 0.5}}}}
parameters: {{lambda: 0.5}}
"""
EXPECTED = [1.5, -1.5, 4.25, 0.4375]  # base + 0.5 (1 (code - base) + 0.5 (maths - base)), exact in bf16


def main(with_core: bool) -> None:
    said = command("--version")
    assert said.startswith(f"fastmerge {fastmerge.__version__}"), said
    assert ("no core" in said) == (not with_core), said
    print(said, end="")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, values in VALUES.items():
            write(folder / name, values)
        recipe = folder / "recipe.yml"
        recipe.write_text(RECIPE.format(folder.as_posix()))

        report = fastmerge.merge(recipe, folder / "by-python")
        assert report.providers == (("cpu",) if with_core else ("torch",)), report
        told = command("merge", str(recipe), str(folder / "by-command"))
        assert with_core or "torch" in told, told
        for out in ("by-python", "by-command"):
            assert read(folder / out) == EXPECTED, (out, read(folder / out))
            assert (folder / out / "config.json").exists()

    base, *models = (np.array(values, np.float32) for values in VALUES.values())
    merged = fastmerge.merge_tensors("task_arithmetic", models, base, weight=[1.0, 0.5], lambda_=0.5)
    assert merged.tolist() == EXPECTED, merged
    assert ("torch" in sys.modules) == (not with_core)
    print("merged by the command, from files and in memory: all values are right")


def command(*arguments: str) -> str:
    """What the installed command prints, warnings included."""
    fastmerge_ = Path(sysconfig.get_path("scripts")) / "fastmerge"
    ended = subprocess.run(
        [fastmerge_, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def write(folder: Path, values: list[float]) -> None:
    """A model of one tensor in bf16, whose values have no more bits than that."""
    folder.mkdir()
    raw = (np.array(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    about = {"weight": {"dtype": "BF16", "shape": [len(values)], "data_offsets": [0, len(raw)]}}
    header = json.dumps(about).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def read(folder: Path) -> list[float]:
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    begin, end = json.loads(raw[8 : 8 + size])["weight"]["data_offsets"]
    bits = np.frombuffer(raw[8 + size :][begin:end], "<u2").astype(np.uint32) << 16
    values: list[float] = bits.view(np.float32).tolist()
    return values


if __name__ == "__main__":
    main(with_core="--without-core" not in sys.argv[1:])
