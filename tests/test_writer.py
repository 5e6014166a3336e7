"""The output folder: its layout, what stands in the way, and that nothing ever looks complete before it is."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastmerge.checkpoint import DTYPE_BITS, STAGES, Layout, Writer, lay_out, open_checkpoint, read_header
from fastmerge.checkpoint import writer as writing
from fastmerge.errors import OutputError

INDEX = "model.safetensors.index.json"
OUTPUTS = [("a", "F32", (4,)), ("b", "F32", (2, 2)), ("c", "F32", (4,))]
SIDECARS = {"config.json": b"{}\n", "tokenizer.json": b"new"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def writer(out: Path, layout: Layout, *inputs: Path, overwrite: bool = False) -> Writer:
    return Writer(out, layout, inputs=inputs, overwrite=overwrite)


def write(out: Path, value: float, shard_size: int = 1 << 30, **options: Any) -> None:
    """A whole output: every element is `value`."""
    with writer(out, lay_out(OUTPUTS, shard_size), **options) as files:
        fill(files, value)
        files.commit(SIDECARS)


def fill(files: Writer, value: float) -> None:
    for name, _, _ in OUTPUTS:
        descriptor, offset = files.target(name)
        os.pwrite(descriptor, np.full(4, value, np.float32).tobytes(), offset)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def held(folder: Path) -> dict[str, float]:
    """The value of each tensor that a loader finds."""
    model = open_checkpoint(folder)
    return {name: float(load_file(model.file_of(name))[name].flat[0]) for name in model.tensors}


# --- layout ---


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    layout = lay_out(OUTPUTS, 48)
    assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    assert layout.weight_index is None


def test_shards_fill_up_to_the_limit_and_are_numbered() -> None:
    layout = lay_out(OUTPUTS, 47)
    assert [(shard.name, list(shard.offsets)) for shard in layout.shards] == [
        ("model-00001-of-00002.safetensors", ["a", "b"]),
        ("model-00002-of-00002.safetensors", ["c"]),
    ]
    assert layout.weight_index == {
        "metadata": {"total_size": 48},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
        },
    }


def test_a_tensor_larger_than_the_limit_has_its_own_shard() -> None:
    layout = lay_out([("small", "U8", (1,)), ("large", "U8", (9,)), ("last", "U8", (1,))], 8)
    assert [list(shard.offsets) for shard in layout.shards] == [["small"], ["large"], ["last"]]


def test_no_outputs_are_one_empty_shard() -> None:
    (shard,) = lay_out([], 8).shards
    assert (shard.size, shard.offsets) == (len(shard.header), {})


@given(
    outputs=st.lists(
        st.tuples(
            st.text("abc.", min_size=1, max_size=8),
            st.sampled_from(["F32", "BF16", "U8", "I64"]),
            st.lists(st.integers(0, 5), max_size=2).map(tuple),
        ),
        unique_by=lambda output: output[0],
    ),
    shard_size=st.integers(1, 200),
)
@settings(deadline=None)
def test_a_layout_holds_each_tensor_once_aligned_and_packed(
    outputs: list[tuple[str, str, tuple[int, ...]]], shard_size: int
) -> None:
    layout = lay_out(outputs, shard_size)
    sizes = {name: int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8 for name, dtype, shape in outputs}
    widths = {name: DTYPE_BITS[dtype] // 8 for name, dtype, _ in outputs}
    assert sorted(name for shard in layout.shards for name in shard.offsets) == sorted(sizes)
    for shard in layout.shards:
        filled = [sizes[name] for name in shard.offsets]
        assert sum(filled) <= shard_size or sum(map(bool, filled)) == 1
        assert all(offset % widths[name] == 0 for name, offset in shard.offsets.items())
        end = len(shard.header)
        for name, offset in sorted(shard.offsets.items(), key=lambda item: (item[1], sizes[item[0]])):
            assert offset == end
            end += sizes[name]
        assert end == shard.size


# --- writing ---


@pytest.mark.parametrize("shard_size", [1 << 30, 32, 16], ids=["one shard", "two shards", "three shards"])
def test_what_is_written_is_loaded(out: Path, shard_size: int) -> None:
    write(out, 1.5, shard_size)
    assert held(out) == {"a": 1.5, "b": 1.5, "c": 1.5}
    assert open_checkpoint(out).tensors["b"].shape == (2, 2)
    assert (out / "tokenizer.json").read_bytes() == b"new"
    assert not [name for name in names(out) if name.startswith(".")]


def test_each_shard_says_that_it_is_for_pytorch(out: Path) -> None:
    write(out, 0.0, 16)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        with safe_open(shard, "np") as file:
            assert file.metadata() == {"format": "pt"}


def test_the_index_is_the_layouts(out: Path) -> None:
    write(out, 0.0, 16)
    assert json.loads((out / INDEX).read_bytes()) == lay_out(OUTPUTS, 16).weight_index


def test_before_the_commit_every_name_is_hidden_and_every_file_has_its_size(out: Path) -> None:
    layout = lay_out(OUTPUTS, 16)
    with writer(out, layout) as files:
        fill(files, 1.0)
        assert all(name.startswith(".fastmerge-") for name in names(out))
        assert not any(name.endswith((".safetensors", ".json")) for name in names(out))
        parts = sorted(out.glob(".fastmerge-model-*"))
        assert [part.stat().st_size for part in parts] == [shard.size for shard in layout.shards]
        assert all(part.stat().st_blocks for part in parts)


def test_a_folder_that_cannot_allocate_is_written_sparsely(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(out, 1.0)
    assert held(out) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_a_descriptor_stays_open_as_long_as_it_is_referenced(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_KEPT_FILES", 1)
    with writer(out, lay_out(OUTPUTS, 16)) as files:
        first, _ = files.target("a")
        number = int(first)
        files.target("b")
        os.fstat(first)
        del first
        gc.collect()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
def test_what_is_said_to_be_written_is_put_on_disk_file_by_file(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = lay_out([*OUTPUTS, ("d", "F32", (4,))], 32)  # a and b, c and d
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *range_and_advice: advised.append(range_and_advice))
    with writer(out, layout) as files:
        begins = {name: files.target(name)[1] for name in "abcd"}
        for said in (["c"], ["b", "d", "a"], []):
            files.written(said)
    assert advised == [
        (begins["c"], 16, os.POSIX_FADV_DONTNEED),
        (begins["a"], 32, os.POSIX_FADV_DONTNEED),
        (begins["d"], 16, os.POSIX_FADV_DONTNEED),
    ]


def test_more_shards_than_open_files_allowed(out: Path) -> None:
    outputs = [(f"t{number}", "F32", (4,)) for number in range(150)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with writer(out, lay_out(outputs, 16)) as files:
            for name, _, _ in outputs:
                descriptor, offset = files.target(name)
                os.pwrite(descriptor, np.full(4, 2.0, np.float32).tobytes(), offset)
            files.commit({})
        assert set(held(out).values()) == {2.0}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_file_reaches_the_disk_before_it_has_its_name(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        order.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        order.append("name " + os.path.basename(new))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    write(out, 1.0, 16)
    final = [line.removeprefix("name ") for line in order if line.startswith("name ") and ".fastmerge" not in line]
    assert final[-1] == INDEX
    assert set(final) == names(out)
    for name in final:
        assert order.index(f"sync .fastmerge-{name}.part") < order.index(f"name {name}")
    assert order[-3:] == ["sync out", f"name {INDEX}", "sync out"]


# --- what stands in the way ---


def refused(says: str, out: Path, *inputs: Path, overwrite: bool = False) -> None:
    """Entering fails, and leaves the disk as it was."""
    before = snapshot(out.parent)
    with (
        pytest.raises(OutputError, match=says) as caught,
        writer(out, lay_out(OUTPUTS, 16), *inputs, overwrite=overwrite),
    ):
        pytest.fail("the writer took the folder")
    assert str(out) in str(caught.value)
    assert snapshot(out.parent) == before


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(entry): entry.read_bytes() if entry.is_file() else None for entry in sorted(folder.rglob("*"))}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.zeros(1)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_is_an_input(model: Path, overwrite: bool) -> None:
    refused(f"is the input {model}", model, model, overwrite=overwrite)


@pytest.mark.parametrize("below", ["out", "a/b/out"])
def test_the_output_is_inside_an_input(model: Path, below: str) -> None:
    refused(f"is inside the input {model}", model / below, model)


def test_the_output_is_an_input_by_another_name(model: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    refused("is the input", tmp_path / "link", model, overwrite=True)
    refused("is inside the input", tmp_path / "link" / "out", model)


def test_the_output_holds_an_input_file(model: Path) -> None:
    refused("holds files of the input", model, model / "model.safetensors", overwrite=True)


def test_the_output_holds_what_an_input_links_to(model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(model / "model.safetensors")
    refused(f"holds files of the input {linked}", model, linked, overwrite=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "adapter_config.json", "added_tokens.json"])
@pytest.mark.parametrize("way", ["straight", "by-a-folder", "by-a-file", "through"])
@pytest.mark.parametrize("one_file", [False, True], ids=["folder", "file"])
def test_the_output_holds_what_a_file_beside_the_weights_links_to(
    model: Path, tmp_path: Path, name: str, way: str, one_file: bool
) -> None:
    linked, elsewhere = tmp_path / "linked", tmp_path / "elsewhere"
    linked.mkdir()
    shutil.copy(model / "model.safetensors", linked)
    elsewhere.write_text("{}")
    (linked / "loop").symlink_to("loop")
    if way == "through":  # the output holds a link of its own
        (model / name).symlink_to(elsewhere)
    else:
        (model / name).write_text("{}")
    between = tmp_path / "between"
    if way == "by-a-folder":
        between.symlink_to(model)
    elif way == "by-a-file":
        between.symlink_to(model / name)
    (linked / name).symlink_to({"by-a-folder": Path("../between", name), "by-a-file": between}.get(way, model / name))
    refused("holds files of the input", model, linked / "model.safetensors" if one_file else linked, overwrite=True)


def test_links_among_inputs_are_no_reason_to_refuse(out: Path, model: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("model.safetensors", "config.json"):
        (model / name).touch()
        (linked / name).symlink_to(model / name)
    (linked / "loop").symlink_to("loop")
    (linked / "folder").symlink_to(out)
    with writer(out, lay_out(OUTPUTS, 16), linked) as files:
        files.commit({})
    assert (out / INDEX).exists()


def test_the_output_may_lie_beside_an_input_file(model: Path) -> None:
    write_beside = writer(model / "out", lay_out(OUTPUTS, 16), model / "model.safetensors")
    with write_beside as files:
        files.commit({})
    assert (model / "out" / INDEX).exists()


def test_a_folder_that_is_not_empty(out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(r"is not empty \(notes.txt\): choose another folder, or pass --overwrite", out)


def test_a_file_where_the_folder_should_be(out: Path) -> None:
    out.write_text("mine")
    refused("cannot be written .*choose another folder", out)


def test_a_loop_of_links(out: Path) -> None:
    out.symlink_to(out)
    refused("cannot be written .*choose another folder", out)


def test_a_folder_below_a_file(out: Path) -> None:
    out.write_text("mine")
    refused("cannot be written .*choose another folder", out / "below")


def test_a_disk_without_room(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = namedtuple("disk", "total used free")(1000, 900, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    needed = sum(shard.size for shard in lay_out(OUTPUTS, 16).shards)
    refused(f"needs {needed} bytes and its disk has 100 left: free some, or write elsewhere", out)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_fails_while_files_are_made(out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def failing(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", failing)
    refused(os.strerror(code), out)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_in_the_commit(out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def failing(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OutputError, match=f"{out} cannot be written .{os.strerror(code)}"):
        write(out, 1.0)
    assert not out.exists()


def test_a_second_writer_of_the_same_folder(out: Path) -> None:
    with writer(out, lay_out(OUTPUTS, 16)) as files:
        fill(files, 1.0)
        with (
            pytest.raises(OutputError, match=f"another fastmerge is writing to {out}"),
            writer(out, lay_out(OUTPUTS, 16), overwrite=True),
        ):
            pytest.fail("both hold the folder")
        files.commit(SIDECARS)
    assert held(out) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_the_folder_is_free_after_its_writer_left(out: Path) -> None:
    for _ in range(2):
        with writer(out, lay_out(OUTPUTS, 16)):
            pass
        assert not out.exists()


# --- overwriting ---


def test_an_earlier_output_is_replaced_whole(out: Path) -> None:
    write(out, 1.0, 16)
    stale = ["pytorch_model.bin", "adapter_model.safetensors", "adapter_config.json", "added_tokens.json"]
    for name in [*stale, "notes.txt"]:
        (out / name).write_text("old")
    write(out, 2.0, overwrite=True)
    assert held(out) == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert names(out) == {"model.safetensors", "notes.txt", *SIDECARS}


def test_a_single_file_is_replaced_by_shards(out: Path) -> None:
    write(out, 1.0)
    write(out, 2.0, 16, overwrite=True)
    assert held(out) == {"a": 2.0, "b": 2.0, "c": 2.0}
    assert "model.safetensors" not in names(out)


def test_an_earlier_output_stays_until_the_commit(out: Path) -> None:
    write(out, 1.0, 16)
    before = snapshot(out)
    with suppress(KeyboardInterrupt), writer(out, lay_out(OUTPUTS, 16), overwrite=True) as files:
        fill(files, 2.0)
        assert held(out) == {"a": 1.0, "b": 1.0, "c": 1.0}
        raise KeyboardInterrupt
    assert snapshot(out) == before


def test_a_link_in_the_output_is_replaced_not_followed(out: Path, model: Path) -> None:
    out.mkdir()
    (out / "model.safetensors").symlink_to(model / "model.safetensors")
    before = (model / "model.safetensors").read_bytes()
    write(out, 2.0, overwrite=True)
    assert (model / "model.safetensors").read_bytes() == before
    assert held(out) == {"a": 2.0, "b": 2.0, "c": 2.0}


# --- interruption at any moment ---


def check_visible(out: Path) -> bool:
    """Whether a loader takes the folder for a model, which then is a whole one.

    Some loaders begin with the index or the single file; some take every weight file beside a config.
    """
    there = names(out) if out.exists() else set()
    listed = there & {INDEX, "model.safetensors"}
    globbed = [name for name in there if name.endswith(".safetensors")] if "config.json" in there else []
    if listed:
        assert set(held(out)) == {"a", "b", "c"}
        assert len(set(held(out).values())) == 1, "old and new are mixed"
    if globbed:
        tensors = [(name, float(value.flat[0])) for file in globbed for name, value in load_file(out / file).items()]
        assert sorted(name for name, _ in tensors) == ["a", "b", "c"]
        assert len({value for _, value in tensors}) == 1, "old and new are mixed"
        assert there >= set(SIDECARS)
    return bool(listed)


class Killed(BaseException):
    pass


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, watch: Callable[[], object]) -> None:
    """Counts the calls that change the folder; looks at it before each, and stops for good at one of them."""
    count = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal count
            watch()
            count += 1
            if count > step:
                raise Killed
            return real(*args, **options)

        monkeypatch.setattr(os, name, counted)

    for name in ("rename", "unlink", "fsync"):
        wrap(name)


@pytest.mark.parametrize("shards", [(16, 16), (16, 1 << 30), (1 << 30, 16), (1 << 30, 1 << 30)], ids=str)
@pytest.mark.parametrize("step", range(0, 40))
def test_killed_at_any_step_of_an_overwrite(
    out: Path, monkeypatch: pytest.MonkeyPatch, step: int, shards: tuple[int, int]
) -> None:
    write(out, 1.0, shards[0])

    killed = True
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, lambda: check_visible(out))
        try:
            write(out, 2.0, shards[1], overwrite=True)
            killed = False
        except Killed:
            pass
    check_visible(out)
    write(out, 3.0, shards[1], overwrite=True)
    assert held(out) == {"a": 3.0, "b": 3.0, "c": 3.0}
    assert not [name for name in names(out) if name.startswith(".fastmerge-")]
    assert killed or step > 10


@pytest.mark.parametrize("shard_size", [16, 1 << 30], ids=["shards", "one file"])
@pytest.mark.parametrize("step", range(0, 30))
def test_killed_at_any_step_the_same_command_goes_on(
    out: Path, monkeypatch: pytest.MonkeyPatch, step: int, shard_size: int
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(step, patch, lambda: check_visible(out))
        with suppress(Killed):
            write(out, 1.0, shard_size)
    if not check_visible(out):
        write(out, 1.0, shard_size)
    assert held(out) == {"a": 1.0, "b": 1.0, "c": 1.0}
    assert names(out) >= set(SIDECARS)


KILL = """
import os, signal, sys
from pathlib import Path
from fastmerge.checkpoint import Writer, lay_out
out, calls = Path(sys.argv[1]), int(sys.argv[2])
rename = os.rename
def dying(old, new):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(old, new)
os.rename = dying
with Writer(out, lay_out([("a", "F32", (4,)), ("b", "F32", (2, 2)), ("c", "F32", (4,))], 16), inputs=(), overwrite=False) as w:
    w.commit({"config.json": b"{}"})
"""  # noqa: E501


@pytest.mark.parametrize("renames", range(6))
def test_a_process_killed_in_the_commit_leaves_what_the_next_run_cleans_up(out: Path, renames: int) -> None:
    root = Path(writing.__file__).parents[2]
    command = [sys.executable, "-c", KILL, str(out), str(renames)]
    died = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    assert INDEX not in names(out)
    write(out, 1.0)
    assert names(out) == {"model.safetensors", *SIDECARS}


@pytest.mark.parametrize("commit", [True, False])
def test_stages_go_with_the_writer(out: Path, commit: bool) -> None:
    with writer(out, lay_out(OUTPUTS, 16)) as files:
        fill(files, 1.0)
        write(out / STAGES / "first", 2.0)
        assert held(out / STAGES / "first") == {"a": 2.0, "b": 2.0, "c": 2.0}
        if commit:
            files.commit(SIDECARS)
    assert not (out / STAGES).exists()
    assert out.exists() == commit


def test_stages_of_a_killed_run_are_cleaned_up(out: Path) -> None:
    write(out / STAGES / "first", 2.0)
    write(out, 1.0)
    assert names(out) == {"model.safetensors", *SIDECARS}


def test_a_link_in_the_place_of_the_stages_is_not_followed(out: Path, model: Path) -> None:
    out.mkdir()
    (out / STAGES).symlink_to(model)
    write(out, 1.0)
    assert (model / "model.safetensors").exists()
    assert names(out) == {"model.safetensors", *SIDECARS}


def test_only_its_own_leftovers_are_cleaned_up(out: Path) -> None:
    out.mkdir()
    (out / ".fastmerge-model.safetensors.part").write_bytes(b"old")
    (out / ".fastmerge-lock").touch()
    write(out, 1.0)
    assert names(out) == {"model.safetensors", *SIDECARS}


def test_a_list_of_names_cannot_reach_outside_the_folder(out: Path, tmp_path: Path) -> None:
    out.mkdir()
    (tmp_path / "victim").write_text("mine")
    (out / ".fastmerge-commit").write_text("../victim\nmodel.safetensors")
    (out / ".fastmerge-model.safetensors.part").touch()
    write(out, 1.0)
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_finished_output_whose_list_stayed_is_not_taken_for_leftovers(out: Path) -> None:
    write(out, 1.0)
    (out / ".fastmerge-commit").write_text("config.json\nmodel.safetensors")
    with pytest.raises(OutputError, match="is not empty"):
        write(out, 2.0)
    assert held(out) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_the_header_on_disk_is_the_layouts(out: Path) -> None:
    layout = lay_out(OUTPUTS, 1 << 30)
    write(out, 0.0)
    tensors: Mapping[str, Any] = read_header(out / "model.safetensors").tensors
    assert {name: info.begin for name, info in tensors.items()} == layout.shards[0].offsets
