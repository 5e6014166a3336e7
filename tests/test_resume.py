"""Merges that are cut short: nothing looks complete, inputs stay, and the same command ends in the same bytes."""

from __future__ import annotations

import filecmp
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from injected import (
    RECIPES,
    SIGNALS,
    Ended,
    command,
    compiled,
    files,
    inputs,
    looks_whole,
    merge,
    save_models,
    tensors_noted,
)
from test_engine import compiled_core

import fastmerge
from fastmerge.checkpoint import encode_header

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


def test_ended_at_random_moments(tmp_path: Path) -> None:
    """By a timer: twice while the process starts, then ever later in the merge, until enough of them hit its middle."""
    compiled_core()
    save_models(tmp_path, layers=60)
    arguments, out, chance = ["dare_ties.yml", "out", *SHARDED], tmp_path / "out", random.Random(5)
    assert merge(tmp_path, arguments).code == 0
    whole = files(out)
    shutil.rmtree(out)
    seconds, noted, hit = 0.01, 0, 0
    for number in range(100):
        timer = {"start_timer": chance.uniform(0.02, 0.2)} if number < 2 else {"timer": seconds}
        ended = merge(tmp_path, arguments, **timer)
        assert ended.code in (0, -signal.SIGALRM)
        if looks_whole(out):  # the moment may be after the last rename
            assert {name: data for name, data in files(out).items() if not name.startswith(".")} == whole
            shutil.rmtree(out)
            seconds, noted = 0.01, 0
            continue
        assert ended.code
        before, noted = noted, tensors_noted(out)
        hit += noted > before
        if hit == 6:
            break
        seconds *= chance.uniform(1.2, 2)
    else:
        pytest.fail(f"only {hit} of {number + 1} ends came while tensors were merged")
    assert f", {noted} of them before" in (last := merge(tmp_path, arguments)).out
    assert last.code == 0
    assert files(out) == whole


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


# --- faults of the disk that an input is on ---

_READS = [("read", n) for n in (1, 3, 5, 7)] + [("pread", n) for n in (1, 9, 16)]


@pytest.mark.parametrize("below", ["a", "base"])
@pytest.mark.parametrize(("call", "nth"), _READS, ids=[f"{call}-{nth}" for call, nth in _READS])
def test_an_input_that_cannot_be_read_is_named_and_the_output_is_not_blamed(
    folder: Path, layer: Path, call: str, nth: int, below: str
) -> None:
    before = inputs(folder)
    assert_unreadable(merge(folder, ["ties.yml", "out"], layer=layer, fault=f"{call} {nth} EIO", below=below), below)
    assert not looks_whole(folder / "out")
    assert inputs(folder) == before


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["merge", "linear.yml", "new", "--hash", "full"], "read 7 EIO"),
        (["plan", "ties.yml"], "read 3 EIO"),
        (["verify", "out", "--recompute", "1"], "read 1 EIO"),
        (["verify", "out", "--recompute", "1"], "read 4 EIO"),
        (["diff", "a", "b"], "read 3 EIO"),
        (["diff", "a", "b", "--base", "base"], "pread 1 EIO"),
        (["diff", "b", "base", "--base", "a"], "pread 5 EIO"),
    ],
    ids=lambda told: told if isinstance(told, str) else " ".join(told),
)
def test_so_it_is_by_other_commands(folder: Path, layer: Path, arguments: list[str], fault: str) -> None:
    assert merge(folder, ["ties.yml", "out"]).code == 0
    assert_unreadable(command(folder, arguments, layer=layer, fault=fault, below="a"), "a")


def assert_unreadable(ended: Ended, below: str) -> None:
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(rf"(?:warning: .*\n)*error: {below}/\S+ cannot be read \(Input/output error\): .*\n", ended.err)


def test_an_output_that_cannot_be_read_is_not_as_it_was_written(folder: Path, layer: Path) -> None:
    assert merge(folder, ["ties.yml", "out"]).code == 0
    ended = command(folder, ["verify", "out"], layer=layer, fault="pread 5 EIO")
    assert (ended.code, ended.err) == (1, "")
    assert ended.out.startswith("wrong: out/model.safetensors cannot be read (Input/output error)")


@pytest.mark.parametrize("fault", ["read 1 SHORT", "read 2 EINTR", "pread 1 SHORT", "pread 2 EINTR"])
@pytest.mark.parametrize("below", ["a", "base"])
def test_reads_that_do_half_or_are_interrupted_are_done_again(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], fault: str, below: str
) -> None:
    """Fingerprints, cards and tokenizers that are compared come whole, too."""
    plain = merge(folder, ["ties.yml", "out"])
    shutil.rmtree(folder / "out")
    ended = merge(folder, ["ties.yml", "out"], layer=layer, fault=fault, below=below)
    assert (ended.code, ended.err) == (0, plain.err)
    assert files(folder / "out") == expected["ties"]


@pytest.mark.parametrize("fault", ["read 1 SHORT", "pread 1 SHORT"])
def test_what_is_verified_comes_whole(folder: Path, layer: Path, fault: str) -> None:
    assert merge(folder, ["ties.yml", "out"]).code == 0
    ended = command(folder, ["verify", "out", "--recompute", "13"], layer=layer, fault=fault)
    assert (ended.code, ended.err) == (0, "")


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


def test_good_lines_below_a_damaged_first_one_say_nothing(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]]
) -> None:
    cut(folder, layer)
    journal = folder / "out" / JOURNAL
    first, *lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(bytes(len(first) - 1) + b"\n" + b"".join(lines))
    again = merge(folder, ["ties.yml", "out"])
    assert (again.code, "of them before" in again.out) == (0, False)
    assert files(folder / "out") == expected["ties"]


def test_a_journal_that_the_system_does_not_let_us_read_is_not_taken_for_none(folder: Path, layer: Path) -> None:
    cut(folder, layer)
    held = files(folder / "out")
    refused = merge(folder, ["ties.yml", "out"], layer=layer, fault="read 1 EIO")
    assert refused.code == 2
    assert f"{JOURNAL} cannot be read (Input/output error)" in refused.err
    assert files(folder / "out") == held


def test_an_input_with_other_weights_and_the_times_of_before_is_refused(folder: Path, layer: Path) -> None:
    cut(folder, layer)
    file = folder / "b" / "model.safetensors"
    data, status = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    refused = merge(folder, ["ties.yml", "out"])
    assert refused.code == 2
    assert "unfinished merge with another input (b/model.safetensors)" in refused.err


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


# --- two processes ---

#: The command line, which waits before it commits.
_WAITS = """
import sys
from fastmerge.checkpoint import Writer
from fastmerge.cli import main
settle = Writer.settle
def wait(writer):
    print("all is merged", flush=True)
    sys.stdin.readline()
    settle(writer)
Writer.settle = wait
main(prog_name="fastmerge")
"""


def test_two_processes_on_one_output(folder: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """The second is refused, whatever it is told, and the first is not disturbed."""
    arguments = [sys.executable, "-c", _WAITS, "merge", "ties.yml", "out"]
    with subprocess.Popen(arguments, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "all is merged\n"
        held = files(folder / "out")
        for recipe, *options in (["ties.yml"], ["ties.yml", "--restart"], ["linear.yml", "--overwrite"]):
            second = merge(folder, [recipe, "out", *options])
            assert (second.code, second.out) == (2, "")
            assert second.err.splitlines()[-1] == (
                "error: another fastmerge is writing to out: wait for it, or choose another folder"
            )
        assert files(folder / "out") == held
        first.communicate("\n")
    assert first.returncode == 0
    assert files(folder / "out") == expected["ties"]


# --- limits ---


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of data counts all of a process's own memory on Linux")
def test_a_merge_within_a_limit_of_memory(folder: Path) -> None:
    """Of models whose one tensor is more than a process may have, as it finds out before."""
    compiled_core()
    limit, nbytes = 200 << 20, 256 << 20
    header, _ = encode_header([("model.embed.weight", "BF16", (nbytes // 2,))], {})
    for number, model in enumerate(("base", "a", "b")):
        part = np.random.default_rng(number).standard_normal(1 << 19, np.float32).view(np.uint16)[1::2].tobytes()
        with open(folder / model / "model.safetensors", "wb") as file:
            file.write(header)
            for _ in range(nbytes // len(part)):
                file.write(part)
    code = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({limit},) * 2)\n"
    code += f"try: bytearray({nbytes}); raise SystemExit('there is no limit')\nexcept MemoryError: pass\n"
    code += "from fastmerge.cli import main; main()"
    arguments = [sys.executable, "-c", code, "merge", "ties.yml", "out", "--threads", "2"]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert merge(folder, ["ties.yml", "free"]).code == 0
    assert filecmp.cmp(folder / "out" / "model.safetensors", folder / "free" / "model.safetensors", shallow=False)
    shutil.rmtree(folder)


# --- the last moments ---


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("nth", range(6, 14))
def test_a_failure_is_never_told_of_an_output_that_looks_whole(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], nth: int
) -> None:
    """Whichever of the last syncs fails; there are eleven."""
    ended = merge(folder, ["ties.yml", "out"], layer=layer, fault=f"fsync {nth} EIO")
    assert ended.code == (2 if nth < 12 else 0)
    assert looks_whole(folder / "out") == (ended.code == 0)
    if ended.code:
        assert merge(folder, ["ties.yml", "out"]).code == 0
    assert files(folder / "out") == expected["ties"]


@pytest.mark.parametrize("kind", ["INT", "TERM"])
@pytest.mark.parametrize("call", ["rename 7", "unlink 2", "unlink 3", "unlink 4"])
def test_a_signal_after_the_last_name_is_given_changes_nothing(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], call: str, kind: str
) -> None:
    ended = merge(folder, ["ties.yml", "out"], layer=layer, fault=f"{call} {kind}")
    assert ended.code == 0
    assert "stopped" not in ended.err
    assert leftovers(folder / "out") == []
    assert files(folder / "out") == expected["ties"]


def test_what_is_complete_of_several_outputs_is_told(folder: Path, layer: Path) -> None:
    arguments = ["ties.yml", "out", "--vary", "lambda=0.5,1"]
    ended = merge(folder, arguments, layer=layer, fault="rename 10 INT")
    assert ended.code == 130
    assert ended.err.startswith("stopped; out/lambda=0.5: complete; else nothing that looks complete was written")
    assert [looks_whole(folder / "out" / name) for name in ("lambda=0.5", "lambda=1")] == [True, False]
    assert merge(folder, arguments).code == 0


@pytest.mark.parametrize("name", [b"vocab\xff.json", b"vocab\nconfig.json"], ids=["not-utf-8", "newline"])
def test_odd_names_of_files_beside_go_through_a_commit_that_is_cut(folder: Path, layer: Path, name: bytes) -> None:
    (folder / "base" / os.fsdecode(name)).write_text("{}")
    assert merge(folder, ["ties.yml", "whole"]).code == 0
    whole = files(folder / "whole")
    assert os.fsdecode(name) in whole
    assert merge(folder, ["ties.yml", "out"], layer=layer, fault="rename 5 KILL").code < 0
    assert merge(folder, ["ties.yml", "out"]).code == 0
    assert files(folder / "out").keys() == whole.keys()
    assert merge(folder, ["linear.yml", "out", "--overwrite"], layer=layer, fault="rename 5 KILL").code < 0
    assert merge(folder, ["linear.yml", "out", "--overwrite"]).code == 0


# --- several documents ---


@pytest.mark.parametrize("nth", [6, 12, 20])
def test_the_model_of_an_earlier_document_goes_on_too(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], nth: int
) -> None:
    """Within it, at its end, and after it: 13 tensors each."""
    assert merge(folder, ["staged.yml", "out"], layer=layer, fault=f"pwrite {nth} TERM").code == 143
    again = merge(folder, ["staged.yml", "out"])
    assert again.code == 0
    assert " of them before" in again.out or nth == 12
    assert files(folder / "out") == expected["staged"]


def test_the_model_of_an_earlier_document_is_not_made_again(folder: Path, layer: Path) -> None:
    assert merge(folder, ["staged.yml", "out"], layer=layer, fault="pwrite 16 TERM").code == 143
    model = folder / "out" / ".fastmerge-stages" / "0" / "model.safetensors"
    before = model.stat()
    assert merge(folder, ["staged.yml", "out"], layer=layer, fault="pwrite 3 TERM").code == 143
    assert model.stat() == before


@pytest.mark.parametrize("damaged", ["model.safetensors", "done"])
def test_the_model_of_an_earlier_document_is_looked_at_before_it_is_used(
    folder: Path, layer: Path, expected: dict[str, dict[str, bytes]], damaged: str
) -> None:
    assert merge(folder, ["staged.yml", "out"], layer=layer, fault="pwrite 20 TERM").code == 143
    file = folder / "out" / ".fastmerge-stages" / "0" / damaged
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    assert merge(folder, ["staged.yml", "out"]).code == 0
    assert files(folder / "out") == expected["staged"]
