"""Two checkpoints compared: the numbers of a float64 oracle, what does not compare, and what the command says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TORCH, compiled_core
from recorded import models, save
from safetensors.torch import save_file

import fastmerge
from fastmerge import backends, cli, comparing, diff
from fastmerge.checkpoint import encode_header
from fastmerge.comparing import Difference, Mismatch

SIZES = [1, 7, 1000, (1 << 18) + 5]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(params=["compiled", "numpy"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who computes what is finite."""
    if request.param == "compiled":
        compiled_core()
        assert comparing._core() is not None
    else:
        monkeypatch.setattr(comparing, "_core", lambda: None)
    return str(request.param)


def numbers(size: int, dtype: str, seed: int) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal(size) * 0.1
    return torch.from_numpy(values).to(TORCH[dtype])


def oracle(a: torch.Tensor, b: torch.Tensor, base: torch.Tensor | None = None) -> dict[str, Any]:
    """The numbers of `Difference` in float64, without what is not finite."""
    all_of_it = [each.double().numpy().ravel() for each in (a, b, base) if each is not None]
    finite = np.logical_and.reduce([np.isfinite(each) for each in all_of_it])
    x, y, *origin = (each[finite] for each in all_of_it)
    same = (all_of_it[0] == all_of_it[1]) | (np.isnan(all_of_it[0]) & np.isnan(all_of_it[1]))
    found = {
        "elements": a.numel(),
        "differing": int((~same).sum()),
        "nonfinite": int((~finite).sum()),
        "max": float(np.abs(x - y).max()) if len(x) else None,
        "rms": float(np.sqrt(np.mean((x - y) ** 2))) if len(x) else None,
        "cosine": cosine(x, y),
        "sign_agreement": None,
        "delta_cosine": None,
    }
    if origin:
        dx, dy = x - origin[0], y - origin[0]
        voting = (dx != 0) & (dy != 0)
        if voting.any():
            found["sign_agreement"] = float((np.sign(dx) == np.sign(dy))[voting].mean())
        found["delta_cosine"] = cosine(dx, dy)
    return found


def cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms else None


def agrees(found: Difference, expected: Mapping[str, Any], within: float) -> None:
    """Counts to the last one; the rest within a relative, and for ratios an absolute, error."""
    for key, value in expected.items():
        got = getattr(found, key)
        if value is None or isinstance(value, int):
            assert got == value, key
        else:
            assert got == pytest.approx(value, rel=within, abs=within if "cosine" in key else 0.0), key


#: Of a difference in float32: half a unit in the last place of each operand's size, here at most 8 times its own.
FLOAT32 = 8 * 2.0**-24


# --- the numbers ---


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", ["F32 F32", "BF16 BF16", "F16 F16", "F64 F64", "BF16 F32", "F16 F64"])
@pytest.mark.parametrize("based", [False, True], ids=["alone", "based"])
def test_numbers_are_those_of_the_oracle(dtypes: str, size: int, based: bool, by: str) -> None:
    one, two = dtypes.split()
    a, b, base = numbers(size, one, 1), numbers(size, two, 2), numbers(size, one, 3)
    b[::3] = a[::3].to(b.dtype)
    base[::5] = a[::5]
    for name, each in (("a", a), ("b", b), ("base", base)):
        save(name, {"w": each})
    found = diff("a", "b", base="base" if based else None)
    agrees(found.tensors[0], oracle(a, b, base if based else None), FLOAT32)
    agrees(found.total, oracle(a, b, base if based else None), FLOAT32)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
@pytest.mark.parametrize("based", [False, True], ids=["alone", "based"])
def test_what_is_not_finite_is_counted_and_left_out(dtype: str, based: bool, by: str) -> None:
    size = (1 << 18) + 100
    a, b, base = (numbers(size, dtype, seed) for seed in range(3))
    inf, nan = float("inf"), float("nan")
    for at, values in enumerate([(nan, 1, 1), (1, nan, 1), (nan, nan, 1), (inf, 1, 1), (inf, inf, 1), (inf, -inf, 1)]):
        a[at], b[at], base[at] = values
        a[-at - 1], b[-at - 1], base[-at - 1] = values
    base[50] = nan
    for name, each in (("a", a), ("b", b), ("base", base)):
        save(name, {"w": each})
    found = diff("a", "b", base="base" if based else None)
    expected = oracle(a, b, base if based else None)
    assert expected["nonfinite"] == (13 if based else 12)
    agrees(found.tensors[0], expected, FLOAT32)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_difference_beyond_float32_is_seen(dtype: str, by: str) -> None:
    a, b = torch.tensor([3e38, 1.0]).to(TORCH[dtype]), torch.tensor([-3e38, 1.0]).to(TORCH[dtype])
    save("a", {"w": a})
    save("b", {"w": b})
    agrees(diff("a", "b").tensors[0], oracle(a, b), 1e-12)


def test_the_smallest_numbers_vote(by: str) -> None:
    a, b, base = (torch.tensor([value, 0.0], dtype=torch.float32) for value in (2e-45, -2e-45, 0.0))
    for name, each in (("a", a), ("b", b), ("base", base)):
        save(name, {"w": each})
    found = diff("a", "b", base="base").tensors[0]
    assert found.differing == 1
    assert found.sign_agreement == 0.0
    assert found.max == pytest.approx(float(a[0]) * 2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool], ids=str)
def test_whole_numbers_are_compared_as_numbers(dtype: torch.dtype) -> None:
    a = torch.tensor([0, 1, 1, 100]).to(dtype)
    b = torch.tensor([0, 1, 0, 97]).to(dtype)
    save("a", {"w": a})
    save("b", {"w": b})
    agrees(diff("a", "b").tensors[0], oracle(a, b), 1e-12)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)], ids=["scalar", "empty", "empty-rows", "three"])
def test_every_shape(shape: tuple[int, ...], by: str) -> None:
    a, b = torch.ones(shape), torch.full(shape, 3.0)
    save("a", {"w": a})
    save("b", {"w": b})
    (found,) = diff("a", "b").tensors
    assert found.shape == shape
    agrees(found, oracle(a, b), 1e-12)


def test_all_together_are_as_one_tensor(by: str) -> None:
    parts = {f"w{n}": (numbers(100 * n, "F32", n), numbers(100 * n, "F32", n + 9)) for n in range(4)}
    save("a", {name: a for name, (a, _) in parts.items()})
    save("b", {name: b for name, (_, b) in parts.items()})
    whole = [torch.cat(side) for side in zip(*parts.values(), strict=True)]
    agrees(diff("a", "b").total, oracle(*whole), FLOAT32)


def test_numbers_do_not_depend_on_threads() -> None:
    models("base", "a", "b")
    assert diff("a", "b", base="base", threads=1) == diff("a", "b", base="base", threads=3)


# --- bits ---


def test_bits_count_where_the_dtypes_are_the_same(by: str) -> None:
    """-0.0 is not 0.0, and a NaN is not another."""
    a = np.array([0x00000000, 0x7FC00000, 0x7FC00000, 0x3F800000], np.uint32)
    b = np.array([0x80000000, 0x7FC00001, 0x7FC00000, 0x3F800000], np.uint32)
    save("a", {"w": torch.from_numpy(a.view(np.float32))})
    save("b", {"w": torch.from_numpy(b.view(np.float32))})
    found = diff("a", "b")
    assert (found.tensors[0].differing, found.tensors[0].nonfinite, found.same) == (2, 2, False)


def test_values_count_where_the_dtypes_are_not(by: str) -> None:
    a = torch.tensor([0.0, float("nan"), 1.0, 2.0])
    save("a", {"w": a})
    save("b", {"w": torch.tensor([-0.0, float("nan"), 1.0, 3.0]).bfloat16()})
    found = diff("a", "b")
    assert (found.tensors[0].differing, found.tensors[0].dtypes) == (1, ("F32", "BF16"))
    save("c", {"w": a.double()})
    assert diff("a", "c").total.differing == 0
    assert not diff("a", "c").same


@pytest.mark.parametrize(("dtype", "nbytes"), [("F8_E4M3", 6), ("F4", 3)])
def test_small_floats_are_compared_as_bytes(dtype: str, nbytes: int) -> None:
    for name, last in (("a", 1), ("b", 2)):
        Path(name).mkdir()
        header, _ = encode_header([("w", dtype, (6,))], {})
        Path(name, "model.safetensors").write_bytes(header + bytes([7] * (nbytes - 1) + [last]))
    (found,) = diff("a", "b").tensors
    assert (found.elements, found.differing, found.max, found.rms, found.cosine) == (6, 1, None, None, None)


def test_a_model_is_the_same_as_itself_however_it_is_split(tmp_path: Path) -> None:
    models("base", "a", "b")
    text = "merge_method: passthrough\nmodels: [model: a]\n"
    fastmerge.merge(fastmerge.Recipe.parse(text), "split", shard_size=1000)
    found = diff("a", "split")
    assert found.same
    assert found.worst == ()


# --- what does not compare ---


def test_what_only_one_has_and_what_does_not_fit_is_listed() -> None:
    save("a", {"both": torch.ones(2), "shape": torch.ones(2, 3), "mine": torch.ones(1)})
    save("b", {"both": torch.ones(2), "shape": torch.ones(3, 2), "theirs": torch.ones(1)})
    found = diff("a", "b")
    assert [each.name for each in found.tensors] == ["both"]
    assert found.mismatched == (Mismatch("shape", ("F32", "F32"), ((2, 3), (3, 2))),)
    assert (found.only_in_a, found.only_in_b, found.same) == (("mine",), ("theirs",), False)
    assert found.total.differing == 0


def test_a_base_counts_where_it_has_the_tensor() -> None:
    for name, value in (("a", 2.0), ("b", 3.0)):
        save(name, {"in_base": torch.full((4,), value), "new": torch.ones(4), "grown": torch.ones(5)})
    save("base", {"in_base": torch.ones(4), "grown": torch.ones(4)})
    found = {each.name: each for each in diff("a", "b", base="base").tensors}
    assert found["in_base"].sign_agreement == 1.0
    assert found["new"].sign_agreement is found["grown"].sign_agreement is None


def test_the_worst_come_first() -> None:
    save("a", {f"w{n}": torch.zeros(4) for n in range(4)})
    save("b", {f"w{n}": torch.full((4,), value) for n, value in enumerate([0.5, 0.0, 2.0, 1.0])})
    assert [each.name for each in diff("a", "b").worst] == ["w2", "w3", "w0"]


# --- what it takes ---


@pytest.mark.parametrize("tile", [5, 20, 1 << 18])
def test_an_adapter_is_applied(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_TILE", tile)
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    save("base", {"layer.weight": weight, "other": torch.ones(3)})
    factors = {"A": torch.randn(2, 8), "B": torch.randn(6, 2)}
    Path("adapter").mkdir()
    named = {f"base_model.model.layer.lora_{side}.weight": each for side, each in factors.items()}
    save_file(named, "adapter/adapter_model.safetensors")
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    fused = weight.double() + 2 * factors["B"].double() @ factors["A"].double()
    save("fused", {"layer.weight": fused.float(), "other": torch.ones(3)})
    found = {each.name: each for each in diff("base+adapter", "fused", base="base").tensors}
    assert found["other"].differing == 0
    assert found["layer.weight"].max < 1e-5
    assert found["layer.weight"].delta_cosine == pytest.approx(1.0, abs=1e-9)
    assert diff("base", "fused").total.differing > 0


def test_single_files_are_taken() -> None:
    save("a", {"w": torch.ones(3)})
    assert diff("a/model.safetensors", "a").same


def test_progress_ends_at_all_bytes() -> None:
    models("a", "b")
    seen: list[tuple[int, int]] = []
    diff("a", "b", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == 2 * sum(i.nbytes for i in comparing.open_checkpoint("a").tensors.values())


# --- the command ---


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments, prog_name="fastmerge")
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("other", "code"), [("a", 0), ("b", 1)])
def test_the_exit_code_tells_of_a_difference_where_that_is_asked_for(other: str, code: int) -> None:
    models("a", "b")
    assert run("diff", "a", other) == 0
    assert run("diff", "a", other, "--exit-code") == code


@pytest.mark.parametrize("arguments", [("a", "absent/model"), ("a", "a", "--base", "README")])
def test_a_model_that_is_none_is_a_mistake(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save("a", {"w": torch.ones(3)})
    Path("README").write_text("none")
    assert run("diff", *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err[:7], err.count("\n")) == ("", "error: ", 1)


def test_the_table_has_the_worst_and_all_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    save("a", {f"w{n:02}": torch.ones(4) for n in range(30)})
    save("b", {f"w{n:02}": torch.ones(4) + (n if n < 25 else 0) for n in range(30)})
    assert run("diff", "a", "b") == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("│")] == [
        f"w{n:02}" for n in range(24, 4, -1)
    ]
    last = out.splitlines()[-1]
    assert last.startswith("a and b: 24 of 30 tensors differ, in 96 of 120 elements, max 24, rms ")
    run("diff", "a", "b", "--all")
    assert sum(line.startswith("│") for line in capsys.readouterr().out.splitlines()) == 30


def test_what_only_one_has_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    save("a", {"w": torch.ones(2), "x\x1b[2J": torch.ones(2, 3), "mine": torch.ones(1)})
    save("b", {"w": torch.ones(2), "x\x1b[2J": torch.ones(3, 2), "y\x07": torch.ones(1), "w\x1b[0m": torch.ones(1)})
    assert run("diff", "a", "b") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert out.splitlines() == [
        "only in A: mine",
        r"only in B: w\x1b[0m, y\x07",
        r"not compared: x\x1b[2J is F32 [2, 3] in A, F32 [3, 2] in B",
        "a and b: 0 of 1 tensors differ, in 0 of 2 elements, max 0, rms 0, cosine 1.000000",
    ]


def test_json_has_these_fields(capsys: pytest.CaptureFixture[str]) -> None:
    save("a", {"w": torch.tensor([1.0, 2.0]), "nan": torch.tensor([float("nan")])})
    save("b", {"w": torch.tensor([1.0, 4.0]), "nan": torch.tensor([float("nan")])})
    assert run("diff", "a", "b", "--json") == 0

    def constant(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=constant)
    assert list(found) == ["a", "b", "base", "same", "total", "tensors", "mismatched", "only_in_a", "only_in_b"]
    by_name = {each.pop("name"): each for each in found["tensors"]}
    assert by_name["w"] == {
        "dtypes": ["F32", "F32"],
        "shape": [2],
        "elements": 2,
        "differing": 1,
        "nonfinite": 0,
        "max": 2.0,
        "rms": pytest.approx(math.sqrt(2.0)),
        "cosine": pytest.approx(9 / math.sqrt(5 * 17)),
        "sign_agreement": None,
        "delta_cosine": None,
    }
    assert (by_name["nan"]["max"], by_name["nan"]["rms"], by_name["nan"]["nonfinite"]) == (None, None, 1)
    assert found["total"]["elements"] == 3


def test_without_the_compiled_core_numpy_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    comparing._core.cache_clear()
    monkeypatch.setattr(backends, "why_not", lambda name: "it is not there")
    try:
        assert comparing._core() is None
    finally:
        comparing._core.cache_clear()
