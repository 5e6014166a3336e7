"""Merges that are cut short: nothing looks complete, inputs stay, and the same command ends in the same bytes."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from injected import RECIPES, SIGNALS, compiled, files, inputs, looks_whole, merge, save_models
from test_engine import compiled_core

import fastmerge

JOURNAL = ".fastmerge-journal"


@pytest.fixture(scope="session")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (path := compiled(tmp_path_factory.mktemp("faults"))) is None:
        pytest.skip("a layer of faults needs Linux and a C++ compiler")
    return path


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What merges that nothing disturbs write, by recipe and options."""
    compiled_core()
    folder = tmp_path_factory.mktemp("expected")
    save_models(folder)
    found = {}
    for name in RECIPES:
        for options in ((), ("--shard-size", "60KB")):
            assert merge(folder, [f"{name}.yml", "out", *options]).code == 0
            found[" ".join((name, *options))] = files(folder / "out")
            shutil.rmtree(folder / "out")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_models(tmp_path)
    return tmp_path


SHARDED = ("--shard-size", "60KB")


# --- killed at any call ---

_CALLS = [
    *(("pwrite", n) for n in (1, 4, 13)),
    *(("write", n) for n in (1, 3, 15)),
    *(("fsync", n) for n in (1, 6)),
    *(("rename", n) for n in (1, 2, 6)),
    ("unlink", 1),
    ("fallocate", 1),
]


@pytest.mark.parametrize("options", [(), SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize(("call", "nth"), _CALLS, ids=[f"{call}-{nth}" for call, nth in _CALLS])
def test_killed_at_a_call_the_same_command_ends_in_the_same_bytes(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], call: str, nth: int, options: tuple[str, ...]
) -> None:
    before = inputs(folder)
    killed = merge(folder, ["ties.yml", "out", *options], layer=layer, fault=f"{call} {nth} KILL")
    assert killed.code == -signal.SIGKILL
    if not looks_whole(folder / "out"):
        assert merge(folder, ["ties.yml", "out", *options]).code == 0
    elif killed.code:  # complete, but for what is left to clear away
        merge(folder, ["ties.yml", "out", *options])
    assert files(folder / "out") == expected[" ".join(("ties", *options))]
    assert inputs(folder) == before


def test_what_was_whole_is_not_merged_again(folder: Path, layer: Path, expected: dict[str, dict[str, bytes]]) -> None:
    assert merge(folder, ["ties.yml", "out"], layer=layer, fault="write 8 KILL").code < 0
    again = merge(folder, ["ties.yml", "out"])
    assert again.code == 0
    assert " 13 tensors, 5 of them before" in again.out
    assert files(folder / "out") == expected["ties"]


@pytest.mark.parametrize("name", RECIPES)
def test_killed_again_and_again(folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], name: str) -> None:
    for nth in (8, 5, 6, 4):
        ended = merge(folder, [f"{name}.yml", "out"], layer=layer, fault=f"pwrite {nth} KILL")
        assert not looks_whole(folder / "out") or ended.code == 0
        if ended.code == 0:
            break
    else:
        assert merge(folder, [f"{name}.yml", "out"]).code == 0
    assert files(folder / "out") == expected[name]


@pytest.mark.parametrize("kind", ["INT", "TERM"])
@pytest.mark.parametrize("call", ["pwrite 9", "rename 2"])
def test_a_signal_ends_a_merge_with_a_sentence_and_the_same_command_goes_on(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], kind: str, call: str
) -> None:
    ended = merge(folder, ["ties.yml", "out"], layer=layer, fault=f"{call} {kind}")
    assert ended == (
        SIGNALS[kind],
        "",
        "stopped; nothing that looks complete was written, and the same command goes on from there\n",
    )
    assert not looks_whole(folder / "out")
    assert " of them before" in (again := merge(folder, ["ties.yml", "out"])).out
    assert again.code == 0
    assert files(folder / "out") == expected["ties"]


def test_ended_at_random_moments(folder: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """By a timer, anywhere from the start of the interpreter to the end of the merge."""
    moments = random.Random(5)
    for _ in range(8):
        ended = merge(folder, ["dare_ties.yml", "out", *SHARDED], timer=moments.uniform(0.05, 0.6))
        assert ended.code in (0, -signal.SIGALRM)
        if looks_whole(folder / "out"):  # the moment may be after the last rename
            break
    else:
        assert merge(folder, ["dare_ties.yml", "out", *SHARDED]).code == 0
    assert files(folder / "out") == expected["dare_ties --shard-size 60KB"]


@pytest.mark.parametrize(
    "fault", ["pwrite 6 KILL", "pwrite 22 KILL", "rename 9 KILL", "rename 10 INT", "rename 11 EIO"]
)
def test_several_outputs_go_on_too(folder: Path, layer: Path, fault: str) -> None:
    """Also where the first of them is complete, and the second is not."""
    arguments = ["ties.yml", "out", "--vary", "lambda=0.5,1"]
    assert merge(folder, arguments).code == 0
    whole = files(folder / "out")
    shutil.rmtree(folder / "out")
    assert merge(folder, arguments, layer=layer, fault=fault).code != 0
    assert looks_whole(folder / "out" / "lambda=0.5") is fault.startswith("rename")
    assert not looks_whole(folder / "out" / "lambda=1")
    assert merge(folder, arguments).code == 0
    assert files(folder / "out") == whole


@pytest.mark.parametrize("nth", [5, 14, 20])
def test_an_overwrite_that_is_killed_keeps_the_old_output_or_goes_on(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], nth: int
) -> None:
    assert merge(folder, ["linear.yml", "out"]).code == 0
    assert merge(folder, ["ties.yml", "out", "--overwrite"], layer=layer, fault=f"any {nth} KILL").code < 0
    assert {name: data for name, data in files(folder / "out").items() if not name.startswith(".")} == expected[
        "linear"
    ]
    assert merge(folder, ["ties.yml", "out", "--overwrite"]).code == 0
    assert files(folder / "out") == expected["ties"]


# --- faults of the disk ---


@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT"])
@pytest.mark.parametrize("call", ["pwrite 10", "write 9", "fsync 1", "fsync 9", "rename 1", "fallocate 2", "unlink 1"])
def test_a_disk_that_fails_is_one_sentence_and_the_same_command_goes_on(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], call: str, error: str
) -> None:
    before = inputs(folder)
    ended = merge(folder, ["ties.yml", "out", *SHARDED], layer=layer, fault=f"{call} {error}")
    if ended.code == 0:  # clearing up after the output was complete
        assert call == "unlink 1"
    else:
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("error: ")
        assert "out" in ended.err
        assert "cannot be written" in ended.err
        assert ended.err.count("\n") == 1
        assert not looks_whole(folder / "out")
    if not looks_whole(folder / "out"):
        assert merge(folder, ["ties.yml", "out", *SHARDED]).code == 0
        assert files(folder / "out") == expected["ties --shard-size 60KB"]
    assert inputs(folder) == before


def test_files_that_are_not_whole_go_when_the_disk_is_full_and_the_journal_stays(folder: Path, layer: Path) -> None:
    assert merge(folder, ["ties.yml", "out", *SHARDED], layer=layer, fault="pwrite 10 ENOSPC").code == 2
    left = {path.name for path in (folder / "out").iterdir()}
    noted = {json.loads(line)[0] for line in (folder / "out" / JOURNAL).read_text().splitlines()[1:]}
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        (stage,) = fastmerge.plan(fastmerge.Recipe.load("ties.yml"), shard_size=60_000).stages
    whole = {shard.name for shard in stage.layout.shards if shard.offsets.keys() <= noted}
    assert 0 < len(whole) < len(stage.layout.shards)
    assert left == {JOURNAL, *(f".fastmerge-{name}.part" for name in whole)}


@pytest.mark.parametrize(
    "fault", ["pwrite 2 SHORT", "pwrite 2 EINTR", "write 2 SHORT", "write 3 EINTR", "read 2 SHORT"]
)
def test_calls_that_do_half_or_are_interrupted_are_done_again(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], fault: str
) -> None:
    assert merge(folder, ["ties.yml", "out"], layer=layer, fault=fault).code == 0
    assert files(folder / "out") == expected["ties"]


# --- what is not gone on with ---


def cut(folder: Path, layer: Path, *options: str) -> None:
    """An unfinished merge: the journal's next line would have been its sixth of a tensor."""
    assert merge(folder, ["ties.yml", "out", *options], layer=layer, fault="write 8 KILL").code < 0
    assert len((folder / "out" / JOURNAL).read_bytes().splitlines()) > 4


@pytest.mark.parametrize(
    ("arguments", "differs"),
    [
        (["linear.yml"], "another recipe"),
        (["ties.yml", "--seed", "3"], "another seed"),
        (["ties.yml", "--nonfinite", "propagate"], "another nonfinite"),
        (["ties.yml", "--backend", "cpu"], "another backend"),
        (["ties.yml", *SHARDED], "another layout"),
    ],
    ids=["recipe", "seed", "nonfinite", "backend", "shard-size"],
)
def test_another_merge_is_refused_and_restart_begins_it(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], arguments: list[str], differs: str
) -> None:
    cut(folder, layer)
    held = {name: data for name, data in files(folder / "out").items() if not name.endswith("lock")}
    recipe, *options = arguments
    refused = merge(folder, [recipe, "out", *options])
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith(f"error: out holds an unfinished merge with {differs}")
    assert "--restart" in refused.err
    assert files(folder / "out") == held
    assert merge(folder, [recipe, "out", *options, "--restart"]).code == 0
    plain = merge(folder, [recipe, "plain", *options])
    assert plain.code == 0
    weights = {path.name: path.read_bytes() for path in (folder / "out").glob("model*")}
    assert weights == {path.name: path.read_bytes() for path in (folder / "plain").glob("model*")}


def test_a_changed_input_is_refused_by_name(folder: Path, layer: Path) -> None:
    cut(folder, layer)
    file = folder / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    refused = merge(folder, ["ties.yml", "out"])
    assert refused.code == 2
    assert "unfinished merge with another input (b/model.safetensors)" in refused.err


def test_a_journal_cut_in_a_line_goes_on_from_the_line_before(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    cut(folder, layer)
    journal = folder / "out" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    assert " of them before" in merge(folder, ["ties.yml", "out"]).out
    assert files(folder / "out") == expected["ties"]


def test_bytes_that_are_not_those_of_the_journal_are_merged_again(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    """As after a power cut, when the journal reached the disk and the tensors did not."""
    cut(folder, layer)
    part = folder / "out" / ".fastmerge-model.safetensors.part"
    header = int.from_bytes(part.read_bytes()[:8], "little") + 8
    part.write_bytes(part.read_bytes()[:header] + bytes(part.stat().st_size - header))
    again = merge(folder, ["ties.yml", "out"])
    assert again.code == 0
    assert "of them before" not in again.out
    assert files(folder / "out") == expected["ties"]


@pytest.mark.parametrize("damage", [b"", b"not a journal\n", b'{"journal": 9, "plan": {}}\n[]\n["x"]\n', b"\xff\xfe\n"])
def test_a_damaged_journal_is_begun_anew(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], damage: bytes
) -> None:
    cut(folder, layer)
    (folder / "out" / JOURNAL).write_bytes(damage)
    assert merge(folder, ["ties.yml", "out"]).code == 0
    assert files(folder / "out") == expected["ties"]


def test_a_hidden_file_that_is_a_link_is_not_followed(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    cut(folder, layer)
    part, victim = folder / "out" / ".fastmerge-model.safetensors.part", folder / "victim"
    victim.write_bytes(part.read_bytes())
    before = victim.read_bytes()
    part.unlink()
    part.symlink_to(victim)
    assert merge(folder, ["ties.yml", "out"]).code == 0
    assert victim.read_bytes() == before
    assert files(folder / "out") == expected["ties"]


# --- limits ---


def test_a_merge_within_a_limit_of_memory(folder: Path, expected: dict[str, dict[str, bytes]]) -> None:
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (200 << 20,) * 2); "
    code += "from fastmerge.cli import main; main()"
    command = [sys.executable, "-c", code, "merge", "ties.yml", "out", "--threads", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert files(folder / "out") == expected["ties"]
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != 200 << 20
