"""mergekit-yaml's options: each is there, and does what it says or says why not; and `yaml`, which takes them all."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file
from test_mergekit import mergekit_python

from fastmerge import cli
from fastmerge.flags import FLAGS, Fate, Flag, Takes

#: Every option that mergekit-yaml 0.1.5 has.
SWITCHES = (
    "allow-crimes unsafe-truncate-embeddings trust-remote-code cuda low-cpu-memory copy-tokenizer clone-tensors"
    " lazy-unpickle write-model-card safe-serialization quiet read-to-gpu multi-gpu async-write"
)
OTHERS = (
    "--transformers-cache --lora-merge-cache --lora-merge-dtype --device --out-shard-size --random-seed -v"
    " -j --num-threads --gpu-rich --write-threads"
)

LINEAR = "merge_method: linear\nmodels: [model: a, model: b]\nparameters: {weight: 0.5}\n"
DARE = "merge_method: dare_linear\nbase_model: a\nmodels: [model: b]\nparameters: {weight: 1, density: 0.5}\nseed: 7\n"
GIVEN = {
    Takes.SWITCH: [],
    Takes.NOTHING: [],
    Takes.NOTHING_OFTEN: [],
    Takes.TEXT: ["text"],
    Takes.NUMBER: ["2"],
}


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small models with a tokenizer, and recipes over them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Path(name).mkdir()
        tensors = {f"layers.{n}.w": rng.standard_normal((8, 16)).astype(np.float32) for n in range(4)}
        save_file(tensors, Path(name, "model.safetensors"))
        for file in ("config.json", "tokenizer.json", "vocab.txt", "generation_config.json"):
            Path(name, file).write_text('{"model_type": "llama"}')
    Path("linear.yml").write_text(LINEAR)
    Path("dare.yml").write_text(DARE)


def run(*arguments: str) -> Result:
    """The command; an exception that is no exit fails the test."""
    result = CliRunner().invoke(cli.main, arguments, catch_exceptions=False, prog_name="fastmerge")
    assert isinstance(result, Result)
    return result


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the engine was asked for, each time; it does nothing."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr("fastmerge.engine.merge", lambda *_, progress, **options: seen.append(options))
    return seen


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --- the table ---


def test_every_option_of_mergekit_is_in_the_table() -> None:
    listed = {name for flag in FLAGS for name in flag.names}
    assert listed == {f"--{name}" for name in SWITCHES.split()} | set(OTHERS.split())
    assert {flag.names[0] for flag in FLAGS if flag.takes is Takes.SWITCH} == {f"--{name}" for name in SWITCHES.split()}
    assert len({flag.key for flag in FLAGS}) == len(FLAGS)


def test_the_table_has_what_mergekits_own_help_lists() -> None:
    script = mergekit_python().with_name("mergekit-yaml")
    text = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    columns = re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)
    switches = [flag.spelled(False) for flag in FLAGS if flag.takes is Takes.SWITCH]
    assert set(re.findall(r"-[a-z-]+", " ".join(columns))) == {name for flag in FLAGS for name in flag.names} | set(
        switches
    )


def test_what_is_honoured_sets_something_and_what_is_refused_sets_nothing() -> None:
    assert all(flag.sets for flag in FLAGS if flag.fate is Fate.HONOURED)
    assert not any(flag.sets for flag in FLAGS if flag.fate is Fate.REFUSED)


def test_yaml_shows_all_options_and_merge_those_that_have_no_other_name() -> None:
    shown, hidden = (set(run(command, "--help").stdout.split()) for command in ("yaml", "merge"))
    for flag in FLAGS:
        names = [f"--no-{flag.key.replace('_', '-')}"] if flag.takes is Takes.SWITCH else []
        for name in (*flag.names, *names):
            assert {name, f"{name},"} & shown, name
            assert bool({name, f"{name},"} & hidden) == (flag.sets == flag.key), name


# --- what is honoured ---


@pytest.mark.parametrize("command", ["merge", "yaml"])
def test_out_shard_size_is_the_most_bytes_in_a_file(command: str) -> None:
    assert run(command, "linear.yml", "out", "--out-shard-size", "600").exit_code == 0
    assert len(list(Path("out").glob("*.safetensors"))) == 4
    assert run(command, "linear.yml", "one", "--out-shard-size", "0").exit_code == 0
    assert [path.name for path in Path("one").glob("*.safetensors*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "size"), [("5B", 5 * 10**9), ("500M", 5 * 10**8), ("2b", 2 * 10**9), ("20k", 20_000), ("1000", 1000)]
)
def test_out_shard_size_has_the_units_of_mergekit(text: str, size: int, asked: list[dict[str, Any]]) -> None:
    assert run("yaml", "linear.yml", "out", "--quiet", "--out-shard-size", text).exit_code == 0
    assert [options["shard_size"] for options in asked] == [size]


@pytest.mark.parametrize("text", ["2.5B", "1GB", "-1", "five", "", "5 5"])
def test_an_out_shard_size_that_is_none_of_mergekits_is_refused(text: str) -> None:
    ended = run("yaml", "linear.yml", "out", "--out-shard-size", text)
    assert ended.exit_code == 2
    assert f"{text!r} is not a size of mergekit's; write for example 500M or 5B (billion)" in ended.stderr


def test_random_seed_is_the_seed() -> None:
    for out, *seed in (
        ("seed", "--seed", "0"),
        ("random", "--random-seed", "0"),
        ("other", "--random-seed", "1"),
        ("own",),
    ):
        assert run("merge", "dare.yml", out, *seed).exit_code == 0
    weights = [files(out)["model.safetensors"] for out in ("seed", "random", "other", "own")]
    assert weights[0] == weights[1]
    assert len(set(weights)) == 3, "the recipe's own seed is another, and so is 1"


@pytest.mark.parametrize("option", ["-j", "--num-threads"])
def test_num_threads_is_the_number_of_workers(option: str) -> None:
    assert ", 3 threads" in run("yaml", "linear.yml", "out", option, "3").stdout


@pytest.mark.parametrize(
    ("option", "backends"),
    [
        (["--no-cuda"], ["cpu", "torch"]),
        (["--device", "cpu"], ["cpu", "torch"]),
        (["--cuda"], ["cuda", "triton"]),
        (["--device", "cuda"], ["cuda", "triton"]),
        (["--device", "xpu"], ["cuda", "triton"]),
        (["--gpu-rich"], ["cuda", "triton"]),
    ],
    ids=["no-cuda", "cpu", "cuda", "device-cuda", "xpu", "gpu-rich"],
)
def test_on_a_device_the_first_backend_computes_that_can(
    option: list[str], backends: list[str], asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for running in backends:
        monkeypatch.setattr("fastmerge.backends.why_not", lambda name, running=running: "" if name == running else "no")
        assert run("yaml", "linear.yml", "out", "--quiet", *option).exit_code == 0
    assert [options["backend"] for options in asked] == backends


def test_without_a_gpu_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmerge.backends.why_not", lambda name: "there is none" if name != "cpu" else "")
    ended = run("yaml", "linear.yml", "out", "--cuda")
    assert (ended.exit_code, ended.stderr) == (2, "error: backend cuda cannot run: there is none\n")
    assert not Path("out").exists()


def test_the_device_auto_is_the_default(asked: list[dict[str, Any]]) -> None:
    assert run("yaml", "linear.yml", "out", "--quiet", "--device", "auto").exit_code == 0
    assert asked[0]["backend"] == "auto"


@pytest.mark.parametrize("device", ["cuda:1", "mps", ""])
def test_another_device_is_refused(device: str) -> None:
    ended = run("yaml", "linear.yml", "out", "--device", device)
    assert ended.exit_code == 2
    assert ended.stderr.rstrip().endswith(
        f"--device {device}: one of auto, cpu, cuda and xpu; all GPUs take part, and CUDA_VISIBLE_DEVICES says which"
        " there are"
    )


@pytest.mark.parametrize("command", ["merge", "yaml"])
def test_without_the_tokenizer_the_other_files_are_there(command: str) -> None:
    weights = {"model.safetensors", "config.json", "generation_config.json", "fastmerge.json"}
    weights |= {"README.md", "mergekit_config.yml"}
    for out, option in (("all", []), ("said", ["--copy-tokenizer"]), ("less", ["--no-copy-tokenizer"])):
        assert run(command, "linear.yml", out, *option).exit_code == 0
    assert set(files("all")) == set(files("said")) == weights | {"tokenizer.json", "vocab.txt"}
    assert set(files("less")) == weights
    assert b"mergekit_config.yml less --no-copy-tokenizer\n" in files("less")["README.md"]


@pytest.mark.parametrize("command", ["merge", "yaml"])
def test_without_a_card_the_other_files_are_there(command: str) -> None:
    for out, option in (("all", []), ("said", ["--write-model-card"]), ("less", ["--no-write-model-card"])):
        assert run(command, "linear.yml", out, *option).exit_code == 0
    assert set(files("all")) == set(files("said")) == {*files("less"), "README.md", "mergekit_config.yml"}
    assert "tokenizer.json" in files("less")


def test_no_quiet_is_the_default() -> None:
    assert run("yaml", "linear.yml", "out", "--no-quiet").stdout.startswith("out: linear of 4 tensors")


def test_the_cache_of_transformers_is_that_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", "elsewhere")
    assert run("yaml", "linear.yml", "out", "--transformers-cache", "here").exit_code == 0
    assert os.environ["HF_HUB_CACHE"] == "here"


# --- what is not needed ---

NEEDLESS = [flag for flag in FLAGS if flag.fate is Fate.ACCEPTED]


@pytest.mark.parametrize("flag", NEEDLESS, ids=lambda flag: flag.key)
@pytest.mark.parametrize("command", ["merge", "yaml"])
def test_what_is_not_needed_says_so_in_one_line(
    command: str, flag: Flag, monkeypatch: pytest.MonkeyPatch, asked: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr("fastmerge.showing.closing", lambda _: "done")
    monkeypatch.setattr("fastmerge.backends.why_not", lambda _: "")
    arguments = (command, "linear.yml", "out", flag.names[-1], *GIVEN[flag.takes])
    ended = run(*arguments)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "done\n", f"{flag.names[-1]}: {flag.says}\n")
    assert run(*arguments, "--quiet").output == ""
    assert len(asked) == 2


def test_what_mergekit_does_by_default_may_be_said_aloud() -> None:
    off = [f"--no-{flag.names[0][2:]}" for flag in NEEDLESS if flag.takes is Takes.SWITCH]
    ended = run("yaml", "linear.yml", "out", *off, "--safe-serialization")
    assert (ended.exit_code, ended.stderr) == (0, "")


# --- what is refused ---


@pytest.mark.parametrize("command", ["merge", "yaml"])
def test_no_pickle_is_written(command: str) -> None:
    ended = run(command, "linear.yml", "out", "--no-safe-serialization")
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.endswith(
        "Error: --no-safe-serialization: only safetensors are written, never pickles; leave it out\n"
    )
    assert not Path("out").exists()


def test_embeddings_of_different_lengths_are_never_cut_off() -> None:
    for name, rows in (("a", 5), ("b", 6)):
        save_file({"model.embed_tokens.weight": np.ones((rows, 4), np.float32)}, Path(name, "model.safetensors"))
    ended = run("yaml", "linear.yml", "out", "--unsafe-truncate-embeddings")
    assert ended.exit_code == 2
    assert "--unsafe-truncate-embeddings: not done, " in ended.stderr
    assert "error: " in ended.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--seed 1 --random-seed 2", "--seed and --random-seed"),
        ("--shard-size 1GB --out-shard-size 2B", "--shard-size and --out-shard-size"),
        ("--threads 1 -j 2", "--threads and --num-threads"),
        ("--backend torch --device cpu", "--backend and --device"),
        ("--device cpu --cuda", "--cuda and --device"),
        ("--no-cuda --gpu-rich", "--no-cuda and --gpu-rich"),
    ],
)
def test_options_that_contradict_one_another_are_refused(
    options: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmerge.backends.why_not", lambda _: "")
    ended = run("merge", "linear.yml", "out", *options.split())
    assert ended.exit_code == 2
    assert ended.stderr.endswith(f"Error: {said} contradict one another; leave one out\n")


def test_the_same_said_twice_is_no_contradiction(asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmerge.backends.why_not", lambda _: "")
    options = "--quiet --cuda --device cuda --gpu-rich --backend cuda --seed 3 --random-seed 3"
    assert run("merge", "linear.yml", "out", *options.split()).exit_code == 0
    assert (asked[0]["backend"], asked[0]["seed"]) == ("cuda", 3)


# --- yaml ---


def test_yaml_gives_the_bytes_of_merge() -> None:
    for command in ("merge", "yaml"):
        assert run(command, "dare.yml", f"{command}/out").exit_code == 0
    assert files("yaml/out") == files("merge/out")


def test_yaml_replaces_an_earlier_model_and_leaves_the_rest() -> None:
    assert run("yaml", "linear.yml", "out", "--out-shard-size", "600").exit_code == 0
    Path("out/notes.txt").write_text("mine")
    assert run("merge", "dare.yml", "out").exit_code == 2
    assert run("yaml", "dare.yml", "out").exit_code == 0
    assert run("merge", "dare.yml", "new/out").exit_code == 0
    assert files("out") == {**files("new/out"), "notes.txt": b"mine"}
    assert json.loads(files("out")["config.json"])


def test_yaml_never_replaces_an_input() -> None:
    before = files("a")
    ended = run("yaml", "linear.yml", "a")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: the output folder a is the input")
    assert files("a") == before


@pytest.mark.parametrize("arguments", [[], ["linear.yml"]], ids=["none", "one"])
def test_yaml_needs_both_of_its_arguments(arguments: Sequence[str]) -> None:
    ended = run("yaml", *arguments)
    assert ended.exit_code == 2
    assert "Missing argument" in ended.stderr
