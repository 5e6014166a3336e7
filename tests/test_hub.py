"""Models on the hub: recipes that name them, against a small hub on this machine; no network."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from fastmerge import CheckpointError, planner
from fastmerge.hub import Snapshot, snapshot
from fastmerge.recipe import Recipe

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

RECIPE = "merge_method: task_arithmetic\nbase_model: {}\nmodels: [model: {}]\nparameters: {{weight: 0.5}}\n"


# --- a hub ---


class Commit(NamedTuple):
    """A commit, the branch that it is the head of, and what it holds."""

    hash: str
    branch: str
    files: Mapping[str, bytes]


Answer = tuple[HTTPStatus, dict[str, str], bytes]


class Hub:
    """A server that answers what a client asks of the hub; it holds `models`, and notes what was `asked`."""

    def __init__(self, models: Mapping[str, list[Commit]]) -> None:
        self.models = models
        self.gated: set[str] = set()
        self.down = False
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            hub = self

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                self.hub.asked.append(f"{self.command} {path}")
                status, headers, body = self.hub.answer(path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    @property
    def given(self) -> set[str]:
        """The files that were asked for, as "id/file"."""
        gets = (re.fullmatch(r"GET /(.+)/resolve/[^/]+/(.+)", asked) for asked in self.asked)
        return {f"{get[1]}/{get[2]}" for get in gets if get}

    def answer(self, path: str) -> Answer:
        if self.down:
            return HTTPStatus.SERVICE_UNAVAILABLE, {}, b""
        for pattern, answer in (
            (r"/api/models/(?P<id>[^/]+(?:/[^/]+)?)(?:/revision/(?P<revision>[^/]+))?", self.info),
            (r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self.tree),
            (r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", self.file),
        ):
            if asked := re.fullmatch(pattern, path):
                id, revision, *rest = asked.groups()
                if id not in self.models:
                    return HTTPStatus.UNAUTHORIZED, {"X-Error-Code": "RepoNotFound"}, b""
                for commit in self.models[id]:
                    if unquote(revision or "main") in (commit.hash, commit.branch):
                        return answer(id, commit, *rest)
                return HTTPStatus.NOT_FOUND, {"X-Error-Code": "RevisionNotFound"}, b""
        return HTTPStatus.NOT_FOUND, {}, b""

    def info(self, id: str, commit: Commit) -> Answer:
        facts = {"id": id, "sha": commit.hash, "siblings": [{"rfilename": name} for name in commit.files]}
        return HTTPStatus.OK, {}, json.dumps(facts).encode()

    def tree(self, id: str, commit: Commit) -> Answer:
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in commit.files.items()
        ]
        return HTTPStatus.OK, {}, json.dumps(files).encode()

    def file(self, id: str, commit: Commit, name: str) -> Answer:
        headers = {"X-Repo-Commit": commit.hash}
        if id in self.gated:
            return HTTPStatus.FORBIDDEN, headers | {"X-Error-Code": "GatedRepo"}, b""
        if name not in commit.files:
            return HTTPStatus.NOT_FOUND, headers | {"X-Error-Code": "EntryNotFound"}, b""
        content = commit.files[name]
        digest = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1  # as of large files and of small
        return HTTPStatus.OK, headers | {"ETag": f'"{digest(content).hexdigest()}"'}, content


def single(seed: int) -> dict[str, bytes]:
    """A small model in one file, with what lies beside weights on the hub."""
    return {
        "config.json": b'{"model_type": "llama", "num_hidden_layers": 2}',
        "generation_config.json": b'{"max_length": 7}',
        "tokenizer.json": b'{"version": "1.0"}',
        "tokenizer_config.json": b"{}",
        "model.safetensors": save(tensors(seed)),
        "pytorch_model.bin": b"pickled",
        "modeling_x.py": b"raise SystemExit",
        "README.md": b"---\nlicense: mit\n---\ntheirs",
        "original/tokenizer.model": b"theirs",
        "onnx/model.safetensors": b"theirs",
    }


def sharded(seed: int) -> dict[str, bytes]:
    """The same in two shards, with the weights once more under another name."""
    files, held = single(seed), tensors(seed)
    shards = {f"model-0000{n}-of-00002.safetensors": name for n, name in enumerate(held, 1)}
    index = {"metadata": {}, "weight_map": {name: shard for shard, name in shards.items()}}
    return {
        **{name: content for name, content in files.items() if name != "model.safetensors"},
        **{shard: save({name: held[name]}) for shard, name in shards.items()},
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": files["model.safetensors"],
    }


def tensors(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"model.layers.{n}.w": rng.standard_normal((8, 16)).astype(np.float32) for n in range(2)}


BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SHARDS = ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
MODELS = {
    "org/base": [Commit("a1" * 20, "main", sharded(0))],
    "org/math": [Commit("b2" * 20, "main", single(1)), Commit("c3" * 20, "old/style", single(2))],
    "org/pickled": [Commit("d4" * 20, "main", {"config.json": b"{}", "pytorch_model.bin": b"pickled"})],
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub(MODELS)
    thread = Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def merged(base: str, model: str, url: str, out: str = "out", **environment: str) -> dict[str, bytes]:
    """The files of a merge by a process of its own: the client reads its environment when it is imported."""
    ended = run(RECIPE.format(base, model), url, out, **environment)
    assert ended.returncode == 0, ended.stderr
    return {path.name: path.read_bytes() for path in Path(out).iterdir()}


def refusal(base: str, model: str, url: str, **environment: str) -> str:
    """The last line that it prints when it fails, leaving nothing behind."""
    ended = run(RECIPE.format(base, model), url, "out", **environment)
    assert ended.returncode == 2, ended.stderr
    assert not Path("out").exists()
    return ended.stderr.splitlines()[-1]


def run(recipe: str, url: str, out: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    Path("recipe.yml").write_text(recipe)
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    theirs = {"HF_ENDPOINT": url, "HF_HOME": str(Path("home").absolute()), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "fastmerge.cli", "merge", "recipe.yml", out, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ours | theirs | environment)


def folder(name: str, files: Mapping[str, bytes]) -> str:
    """What a folder would hold that was downloaded by hand, without the parts that only warn."""
    for file, content in files.items():
        if not file.endswith((".py", ".bin")) and "/" not in file and file != "consolidated.safetensors":
            Path(name).mkdir(exist_ok=True)
            (Path(name) / file).write_bytes(content)
    return name


def nowhere() -> str:
    """Where no server listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


# --- merges ---


def test_a_merge_of_two_ids_is_that_of_their_folders(hub: Hub) -> None:
    theirs = merged("org/base", "org/math", hub.url)
    ours = merged(folder("base", sharded(0)), folder("math", single(1)), nowhere(), "local")
    for files in (theirs, ours):
        del files["README.md"], files["mergekit_config.yml"], files["fastmerge.json"]
    assert theirs == ours
    assert set(theirs) == {*BESIDE, "model.safetensors"}


def test_only_what_a_merge_reads_is_fetched(hub: Hub) -> None:
    merged("org/base", "org/math", hub.url)
    wanted = {f"org/base/{name}" for name in (*BESIDE, *SHARDS, "README.md")}
    assert hub.given == wanted | {f"org/math/{name}" for name in (*BESIDE, "model.safetensors", "README.md")}


def test_the_card_names_models_commits_and_hashes_and_the_recipe_stays(hub: Hub) -> None:
    files = merged("org/base", "org/math@old/style", hub.url)
    card = files["README.md"].decode()
    matter = yaml.safe_load(card.split("---\n")[1])
    assert (matter["base_model"], matter["license"]) == (["org/base", "org/math"], "mit")
    weights = single(2)["model.safetensors"]
    assert f"- `org/base` (base), commit `{'a1' * 20}`\n  - `model-00001-of-00002.safetensors`, " in card
    assert (
        f"- `org/math@old/style`, commit `{'c3' * 20}`\n"
        f"  - `model.safetensors`, {len(weights):,} bytes, sha256 `{hashlib.sha256(weights).hexdigest()}`\n"
    ) in card
    assert files["mergekit_config.yml"].decode() == RECIPE.format("org/base", "org/math@old/style")


def test_what_the_card_says_of_commits_gives_the_same_again_when_a_model_has_moved_on(hub: Hub) -> None:
    before = merged("org/base", "org/math", hub.url)
    moved, was = Commit("e5" * 20, "main", single(3)), MODELS["org/math"][0]._replace(branch="")
    hub.models = {**MODELS, "org/math": [moved, was]}
    assert merged("org/base", "org/math", hub.url, "moved")["model.safetensors"] != before["model.safetensors"]
    base, math = re.findall(r"`(org/\w+@\w+)`", before["README.md"].decode().splitlines()[-1])
    assert merged(base, math, hub.url, "again")["model.safetensors"] == before["model.safetensors"]


def test_a_model_without_a_card_is_merged_into_one_without_a_licence(hub: Hub) -> None:
    files = {name: content for name, content in single(1).items() if name != "README.md"}
    hub.models = {**MODELS, "org/math": [Commit("b2" * 20, "main", files)]}
    card = merged("org/base", "org/math", hub.url)["README.md"].decode()
    assert "license" not in yaml.safe_load(card.split("---\n")[1])


def test_cards_of_models_from_the_hub_are_looked_at_before_a_merge(hub: Hub) -> None:
    files = single(1) | {"README.md": b"---\nlicense: gpl\n---\n"}
    hub.models = {**MODELS, "org/math": [Commit("b2" * 20, "main", files)]}
    ended = run(RECIPE.format("org/base", "org/math"), hub.url, "out")
    assert "warning: the licences of the models differ: 'org/base' has mit, 'org/math' has gpl" in ended.stderr


@pytest.mark.parametrize("revision", ["old/style", "c3" * 20], ids=["branch", "commit"])
def test_a_revision_is_what_is_merged(hub: Hub, revision: str) -> None:
    theirs = merged("org/base", f"org/math@{revision}", hub.url)
    ours = merged(folder("base", sharded(0)), folder("math", single(2)), nowhere(), "local")
    assert theirs["model.safetensors"] == ours["model.safetensors"]


@pytest.mark.parametrize("offline", [True, False], ids=["told-so", "no-server"])
def test_without_a_hub_the_cache_counts(hub: Hub, offline: bool) -> None:
    before = merged("org/base", "org/math@old/style", hub.url)
    hub.asked.clear()
    environment = {"HF_HUB_OFFLINE": "1"} if offline else {}
    after = merged("org/base", "org/math@old/style", hub.url if offline else nowhere(), "again", **environment)
    assert after["model.safetensors"] == before["model.safetensors"]
    assert f"commit `{'c3' * 20}`" in after["README.md"].decode()
    assert not hub.asked


def test_what_is_cached_is_not_fetched_again(hub: Hub) -> None:
    merged("org/base", "org/math", hub.url)
    hub.asked.clear()
    merged("org/base", "org/math", hub.url, "again")
    assert hub.asked
    assert not hub.given


def test_quiet_shows_no_downloads(hub: Hub) -> None:
    ended = run(RECIPE.format("org/base", "org/math"), hub.url, "out", "--quiet")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# --- refusals ---


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("org/absent", "there is no folder or document 'org/absent', and no model of that id on the hub that you may"),
        ("absent", "there is no folder or document 'absent', and no model of that id on the hub"),
        ("org/math@absent", "'org/math' has no revision 'absent' on the hub: write one of its branches, tags or"),
        ("org/gated", "'org/gated' is gated on the hub: accept its terms on its page there, and run `hf auth login`"),
        ("org/pickled", "org/pickled holds PyTorch files only (pytorch_model.bin): "),
    ],
    ids=["no-repository", "no-name", "no-revision", "gated", "pickles-only"],
)
def test_what_the_hub_refuses_is_one_sentence_with_its_place(hub: Hub, model: str, message: str) -> None:
    hub.models = {**MODELS, "org/gated": MODELS["org/math"]}
    hub.gated.add("org/gated")
    assert refusal("org/base", model, hub.url).startswith(f"error: recipe.yml:3: models[0].model: {message}")
    assert not {file for file in hub.given if file.endswith(".bin")}


@pytest.mark.parametrize("state", ["offline", "no-server", "down"])
def test_without_a_hub_or_a_cache_the_command_that_fetches_is_named(hub: Hub, state: str) -> None:
    hub.down = state == "down"
    error = refusal(
        folder("base", sharded(0)),
        "org/math@old/style",
        nowhere() if state == "no-server" else hub.url,
        **({"HF_HUB_OFFLINE": "1"} if state == "offline" else {}),
    )
    assert error.startswith(
        "error: recipe.yml:3: models[0].model: there is no folder or document 'org/math', the hub's"
    )
    cause = {"offline": "OfflineModeIsEnabled: ", "no-server": "Connect", "down": "HfHubHTTPError: "}[state]
    assert f"it cannot be fetched ({cause}" in error
    assert error.endswith("run `hf download org/math --revision old/style` where the hub can be reached")


@pytest.mark.parametrize("lost", ["model.safetensors", "model-00002-of-00002.safetensors"])
def test_a_cache_that_lacks_weights_is_not_enough(hub: Hub, lost: str) -> None:
    merged("org/base", "org/math", hub.url)
    (path,) = Path("home").rglob(lost)
    path.unlink()
    Path("out").rename("before")
    error = refusal("org/base", "org/math", hub.url, HF_HUB_OFFLINE="1")
    assert f"run `hf download org/{'math' if lost == 'model.safetensors' else 'base'}` where" in error


def test_without_the_client_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        CheckpointError, match=r"no folder or document 'org/a', and .* `pip install 'fastmerge\[hub\]'`"
    ):
        snapshot("org/a", None)


# --- stages ---


def test_the_commits_of_earlier_documents_are_those_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "snapshot", lambda id, _: Snapshot(Path(folder(id[-1], single(1))), id[-1] * 40))
    text = "name: first\nmerge_method: linear\nmodels: [model: org/a, model: org/b@v1]\nparameters: {weight: 1}\n---\n"
    text += "merge_method: passthrough\nmodels: [model: first]\n"
    first, result = planner.plan(Recipe.parse(text)).stages
    assert first.commits == result.commits == {"org/a": "a" * 40, "org/b@v1": "b" * 40}
    assert [model.name for model in first.models] == ["org/a", "org/b@v1"]
