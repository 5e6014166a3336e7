"""mergekit and PEFT with fastmerge inside: their own results with and without it, and every attribute put back."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from test_mergekit import (
    MODELS,
    ORACLES,
    PAIR,
    RECIPES,
    THREE,
    WEIGHTED,
    in_bf16,
    loaded,
    mergekit_python,
    ulps_apart,
    write_models,
)

import fastmerge
from fastmerge.errors import BackendError
from fastmerge.integrations import peft, switch
from fastmerge.integrations.switch import Switch, Tally

ROOT = Path(__file__).parents[1]


# --- the switch ---


class Package:
    """A package with two functions, and an integration of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: str = "1.0", fails: bool = False) -> None:
        def attributes(tally: Tally) -> Iterator[switch.Attribute]:
            yield self.names, "one", lambda: tally.computed.update(one=1)
            if fails:
                raise AttributeError("the package has no two")
            yield self.names, "hidden", lambda: None

        self.names: dict[str, Any] = {"one": object(), "two": object()}
        self.before = dict(self.names)
        self.switch = Switch("package", ("0.9", "1.0"), attributes)
        monkeypatch.setattr(switch, "version", {"package": found}.__getitem__)

    def is_as_it_was(self) -> bool:
        same = all(self.names[name] is value for name, value in self.before.items() if name in self.names)
        return same and list(self.names) == list(self.before)


def test_the_switch_puts_every_attribute_back(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch)
    tally = package.switch.install()
    assert package.names.keys() - package.before.keys() == {"hidden"}
    assert package.names["one"] is not package.before["one"]
    package.names["one"]()
    assert tally.computed == {"one": 1}
    package.switch.uninstall()
    assert package.is_as_it_was()


def test_what_is_on_already_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch)
    tally = package.switch.install()
    hook = package.names["one"]
    assert package.switch.install() is tally
    with package.switch.accelerated() as within:
        assert within is tally
    assert package.names["one"] is hook
    package.switch.uninstall()
    package.switch.uninstall()
    assert package.is_as_it_was()


def test_a_block_ends_as_it_began_also_by_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch)
    with pytest.raises(KeyError), package.switch.accelerated():
        raise KeyError
    assert package.is_as_it_was()


def test_what_two_threads_install_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    names, within = {"one": object()}, [Event(), Event()]
    before, order = dict(names), iter(within)

    def attributes(tally: Tally) -> Iterator[switch.Attribute]:
        """A second thread that is let in takes what the first has put for what belongs there, and ends after it."""
        own = next(order)
        yield names, "one", tally
        own.set()
        within[1].wait(0.1) if own is within[0] else threads[0].join()

    made = Switch("package", ("1.0",), attributes)
    monkeypatch.setattr(switch, "version", {"package": "1.0"}.__getitem__)
    threads = [Thread(target=made.install) for _ in within]
    threads[0].start()
    within[0].wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    made.uninstall()
    assert names == before


def test_half_a_patch_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch, fails=True)
    with pytest.raises(AttributeError, match="has no two"):
        package.switch.install()
    assert package.is_as_it_was()
    with pytest.raises(AttributeError, match="has no two"):
        package.switch.install()


def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch, found="1.1")
    message = r"accelerates package 0\.9 or 1\.0, and this is 1\.1: pip install package==1\.0, or run it as it is"
    with pytest.raises(BackendError, match=message):
        package.switch.install()
    assert package.is_as_it_was()


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package(monkeypatch)

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(switch, "version", absent)
    with pytest.raises(BackendError, match=r"package is not installed: pip install package==1\.0"):
        package.switch.install()


@pytest.mark.parametrize("module", ["", ".mergekit", ".peft"])
def test_an_import_brings_in_neither_package(module: str) -> None:
    code = (
        f"import sys, fastmerge.integrations{module}; print(*{{'mergekit', 'peft', 'transformers'}} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# --- mergekit ---

#: Merges each recipe by mergekit's own command, without and with fastmerge, in one process, and prints the tallies.
DRIVER = """
import json, sys
from importlib.metadata import entry_points
import fastmerge
fastmerge.__path__ += json.loads(sys.argv[1])
from fastmerge.integrations import mergekit
(command,) = entry_points(group="console_scripts", name="mergekit-yaml")
run = command.load()
options = ["--no-copy-tokenizer", "--no-write-model-card", "--clone-tensors", "--quiet", "--random-seed", "1"]
tallies = {}
for name in sys.argv[2:]:
    run.main([name + ".yml", "without/" + name, *options], standalone_mode=False)
    with mergekit.accelerated() as tally:
        run.main([name + ".yml", "with/" + name, *options], standalone_mode=False)
    tallies[name] = dict(tally.computed), dict(tally.left)
print(json.dumps(tallies))
"""
#: What fastmerge computes, also with densities of 1 where a method draws.
COMPUTED = [
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "nearswap", "ram"),
    *("task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties"),
    *("dare_linear", "dare_ties", "della", "della_linear"),
]
#: What stays mergekit's, with the reason in the tally; none where the method is not touched.
LEFT = {
    "nuslerp-rows": "rows or columns by themselves",
    "nuslerp-rows-of-deltas": "rows or columns by themselves",
    "nuslerp-columns": "rows or columns by themselves",
    "model_stock-rows": "rows or columns by themselves",
    "karcher-of-one": "too few models",
    "multislerp-of-one": "too few models",
    "dare_ties-drops": "random drops",
    "della_linear-drops": "random drops",
    "slerp-beyond": "t out of bounds",
    "weights-that-cancel": "weights that cancel",
    "float64": "float64",
    "sce": "",
    "ramplus_tl": "",
    "arcee_fusion": "",
    "passthrough-scale-filters": "",
}
OWN = {
    "dare_ties-drops": f"merge_method: dare_ties\nparameters: {{density: 0.6}}\n{WEIGHTED}",
    "della_linear-drops": f"merge_method: della_linear\nparameters: {{density: 0.6}}\n{WEIGHTED}",
    "slerp-beyond": f"merge_method: slerp\nparameters: {{t: 1.5}}\n{PAIR}",
    "weights-that-cancel": f"""
merge_method: task_arithmetic
parameters: {{normalize: true, weight: [{{filter: mlp, value: 1}}, {{value: 0}}]}}
base_model: base
{THREE}""",
    "float64": f"merge_method: ties\nparameters: {{density: 0.5}}\n{WEIGHTED}dtype: float64\n",
}


def method_of(recipe: str) -> str:
    return re.findall(r"merge_method: (\w+)", recipe)[0]


COVERED = [name for name, text in RECIPES.items() if method_of(text) in COMPUTED and name not in LEFT]
BF16 = [name for name in ORACLES if name in COVERED]


class Merges(NamedTuple):
    """Where the recipes and the results of mergekit lie, and by recipe what fastmerge did: its tally's two counters."""

    place: Path
    tallies: dict[str, tuple[dict[str, int], dict[str, int]]]

    def both(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return loaded(self.place / "without" / name), loaded(self.place / "with" / name)


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Merges:
    place = tmp_path_factory.mktemp("mergekit")
    write_models(place)
    recipes = {name: f"{text}dtype: float32\n" for name, text in (RECIPES | OWN).items() if name in {*COVERED, *LEFT}}
    recipes |= {"float64": OWN["float64"]} | {f"bf16-{name}": in_bf16(RECIPES[name]) for name in BF16}
    for name, text in recipes.items():
        (place / f"{name}.yml").write_text(text)
    return Merges(place, json.loads(in_mergekit(DRIVER, *recipes, cwd=place).splitlines()[-1]))


def in_mergekit(code: str, *arguments: str, cwd: Path) -> str:
    """What a script prints in mergekit's environment, to which this fastmerge is brought as it is."""
    python = mergekit_python()
    paths = json.dumps([str(path) for path in fastmerge.__path__])
    done = subprocess.run(
        [python, "-c", code, paths, *arguments], cwd=cwd, env=offline(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def offline() -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(ROOT),
    }


@pytest.mark.parametrize("name", COVERED)
def test_mergekit_with_fastmerge_gives_the_same_numbers(merges: Merges, name: str) -> None:
    without, within = merges.both(name)
    assert within.keys() == without.keys()
    for tensor, expected in without.items():
        found = within[tensor]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), tensor
        far = ulps_apart(found, expected) > 4
        beyond = (found - expected).abs()[far].tolist()
        assert all(error <= 1e-6 * float(expected.abs().max()) for error in beyond), f"{tensor}: {max(beyond)}"
    assert merges.tallies[name] == [{method_of(RECIPES[name]): len(without)}, {}], "fastmerge computed every tensor"


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_mergekit_is_the_same_to_the_bit(merges: Merges, name: str) -> None:
    without, within = merges.both(name)
    assert within.keys() == without.keys()
    assert all(torch.equal(within[tensor], expected) for tensor, expected in without.items())
    computed, left = merges.tallies[name]
    reasons = {LEFT[name]} - {""}
    assert left.keys() == reasons
    assert sum(computed.values()) == (len(without) - sum(left.values()) if reasons else 0)


@pytest.mark.parametrize("name", [*COVERED, *LEFT])
def test_all_other_files_are_the_same(merges: Merges, name: str) -> None:
    without, within = merges.place / "without" / name, merges.place / "with" / name
    names = sorted(file.name for file in without.iterdir())
    assert sorted(file.name for file in within.iterdir()) == names
    assert "config.json" in names
    for file in names:
        if not file.endswith(".safetensors"):
            assert (within / file).read_bytes() == (without / file).read_bytes(), file


@pytest.mark.parametrize("name", BF16)
def test_in_bf16_the_largest_error_is_not_above_mergekits_own(merges: Merges, name: str) -> None:
    computed, left = merges.tallies[f"bf16-{name}"]
    assert computed
    assert not left
    both = merges.both(f"bf16-{name}")
    parents = [loaded(merges.place / "bf16" / model) for model in MODELS]
    largest = [0.0, 0.0]
    for tensor in parents[0]:
        base, *models = (parent[tensor].double().numpy().ravel() for parent in parents)
        expected = ORACLES[name](base, models)
        _, exponent = np.frexp(expected)  # |value| in [0.5, 1) * 2**exponent; bf16 has 8 significant bits
        ulp = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
        for place, found in enumerate(both):
            assert found[tensor].dtype == torch.bfloat16
            error = np.abs(found[tensor].double().numpy().ravel() - expected) / ulp
            largest[place] = max(largest[place], float(error.max()))
    assert largest[1] <= largest[0] + 0.01


#: In mergekit's environment: its API, and the methods that it has registered.
API = """
import json, sys
import torch
import fastmerge
fastmerge.__path__ += json.loads(sys.argv[1])
from mergekit import merge_methods as kit
def attributes():
    return {method.spec.name: {**vars(method), "": method} for method in kit.registered_methods()}
def changed(before):
    after = attributes()
    assert after.keys() == before.keys()
    return sorted(
        name for name, own in before.items()
        if own.keys() != after[name].keys() or any(value is not after[name][key] for key, value in own.items())
    )
torch.manual_seed(0)
base = torch.randn(40, 24)
models = [base + 0.1 * torch.randn(40, 24) for _ in range(3)]
before = attributes()
from fastmerge.errors import BackendError
from fastmerge.integrations import mergekit, switch
assert not changed(before), "an import changes nothing"
"""


def test_mergekit_is_put_back_as_it_was(tmp_path: Path) -> None:
    code = """
mergekit.install()
print(*changed(before))
mergekit.uninstall()
assert not changed(before)
"""
    assert sorted(in_mergekit(API + code, cwd=tmp_path).split()) == sorted(COMPUTED)


def test_mergekit_is_never_half_changed(tmp_path: Path) -> None:
    code = """
def refused():
    try:
        mergekit.install()
    except (BackendError, KeyError) as error:
        assert not changed(before)
        return error
print(type(refused()))
mergekit.uninstall()
get = kit.get
kit.get = lambda name: get(name) if name != "della_linear" else {}[name]
print(refused())
kit.get = get
switch.version = lambda name: "0.1.6"
print(refused())
"""
    none, missing, unknown = in_mergekit(API + code, cwd=tmp_path).splitlines()
    assert none == "<class 'NoneType'>"
    assert missing == "'della_linear'"
    assert unknown.startswith("fastmerge accelerates mergekit 0.1.5, and this is 0.1.6: ")


def test_mergekits_api_computes_with_fastmerge(tmp_path: Path) -> None:
    """What the command line never gives: groups in batches, a base that comes second, views, and gradients."""
    code = """
def same(what, computed, left={}):
    without = what()
    with mergekit.accelerated() as tally:
        within = what()
    assert (dict(tally.computed), dict(tally.left)) == (computed, left), str(tally)
    assert without.keys() == within.keys()
    for name, expected in without.items():
        assert (within[name].dtype, within[name].shape) == (expected.dtype, expected.shape)
        assert (within[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    return within
dicts = [{"a": each, "b": each * 2, "c": each[0]} for each in models]
each = lambda weights: lambda: kit.merge_state_dicts(dicts, "linear", parameters={"weight": weights})
same(each([0.3, 0.5, 0.4]), {"linear": 3})
pair = lambda base: lambda: kit.merge_state_dicts(dicts[:2], "slerp", parameters={"t": 0.2}, base=base)
a, b = same(pair(0), {"slerp": 3}), same(pair(1), {"slerp": 3})
assert not torch.allclose(a["a"], b["a"])
some = {"weight": 0.4, "density": 0.5}
ties = lambda tensors: lambda: {"": kit.merge_tensors(tensors, "ties", parameters=some, base_index=1)}
same(ties([models[0], base, models[1]]), {"ties": 1})
same(ties([models[0].T, base.T, models[1].T]), {}, {"not contiguous": 1})
same(ties([models[0].bfloat16().float(), base, models[1].half()]), {"ties": 1})
wanted = [each.clone().requires_grad_() for each in models]
found = same(ties(wanted), {}, {"a gradient is wanted": 1})
assert found[""].requires_grad
with torch.no_grad():
    same(ties(wanted), {"ties": 1})
untouched = lambda: kit.merge_tensors([base] * 4, "multislerp", parameters={"weight": 0.4}, base_index=0)
try:
    untouched()
    raise SystemExit("mergekit did not stop")
except ValueError:
    pass
with mergekit.accelerated():
    assert torch.equal(untouched(), base)
batch = kit.TensorBatch(tuple(torch.stack([each, -each]) for each in models))
per_group = {"weight": torch.tensor([[0.3, 0.5, 0.2], [0.9, 0.05, 0.05]]), "normalize": True}
same(lambda: {"": kit.get("linear").merge_batch(batch, **per_group)}, {"linear": 2})
"""
    in_mergekit(API + code, cwd=tmp_path)


def test_mergekits_commands_run_with_fastmerge(merges: Merges) -> None:
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    done = run_module(merges.place, "mergekit-yaml", "ties.yml", "by-module", *options)
    assert done.returncode == 0, done.stderr[-4000:]
    tensors = loaded(merges.place / "by-module")
    assert f"merged tensors: {len(tensors)} computed by fastmerge, none left" in done.stderr
    expected = merges.both("ties")[1]
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


def test_mergekit_pytorch_and_multi_run_with_fastmerge(merges: Merges) -> None:
    models = [f"{{model: {name}/model.safetensors, parameters: {{weight: 0.5}}}}" for name in "abc"]
    base = "base_model: base/model.safetensors"
    raw = f"merge_method: task_arithmetic\n{base}\nmodels: [{', '.join(models)}]\ndtype: float32\n"
    (merges.place / "raw.yml").write_text(raw)
    code = """
def ran(*arguments):
    try:
        mergekit.main(arguments)
    except SystemExit as end:
        assert not end.code, end.code
ran("mergekit-pytorch", "raw.yml", "raw", "--quiet")
ran("mergekit-multi", "ties.yml", "-I", "kept", "--out-path", "multi", "--no-copy-tokenizer", "--no-write-model-card")
tally = mergekit.install()
print(json.dumps([tally.computed, tally.left]))
"""
    computed, left = json.loads(in_mergekit(API + code, cwd=merges.place).splitlines()[-1])
    count = len(merges.both("ties")[0])
    assert (computed, left) == ({"task_arithmetic": count, "ties": count}, {})
    assert all(
        torch.equal(tensor, merges.both("ties")[1][name]) for name, tensor in loaded(merges.place / "multi").items()
    )
    assert loaded(merges.place / "raw").keys() == loaded(merges.place / "base").keys()


def test_what_is_no_command_of_mergekits_is_an_error_that_names_them(tmp_path: Path) -> None:
    done = run_module(tmp_path, "pip", "list")
    assert done.returncode == 1
    assert "error: 'pip' is none of mergekit's commands: " in done.stderr
    assert "mergekit-yaml" in done.stderr


def run_module(cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [mergekit_python(), "-m", "fastmerge.integrations.mergekit", *arguments]
    return subprocess.run(command, cwd=cwd, env=offline(), capture_output=True, text=True, check=False)


# --- PEFT ---

FUNCTIONS = ("task_arithmetic", "magnitude_prune", "ties", "dare_linear", "dare_ties")
TYPES = ("svd", "linear", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd", "cat")
CALLS = [
    ("task_arithmetic", ()),
    *(("magnitude_prune", (density,)) for density in (0.0, 0.3, 1.0)),
    *(("ties", (density, vote)) for density in (0.0, 0.3, 1.0) for vote in ("total", "frequency")),
    *(("dare_linear", (density,)) for density in (0.3, 1.0)),
    *(("dare_ties", (density, vote)) for density in (0.3, 1.0) for vote in ("total", "frequency")),
]


@pytest.fixture
def merge_utils() -> Any:
    """`peft.utils.merge_utils`, of the version that is known."""
    pytest.importorskip("peft", reason="PEFT is not installed")
    if version("peft") != "0.21.2":
        pytest.skip(f"parity is with PEFT 0.21.2, and this is {version('peft')}")
    import peft.utils.merge_utils

    return peft.utils.merge_utils


def deltas(dtype: torch.dtype, count: int = 3) -> list[torch.Tensor]:
    """No two magnitudes of one are equal: which of equals `torch.topk` keeps is not defined."""
    rng = np.random.default_rng(3)
    magnitudes = np.ldexp(1 + np.arange(128) / 128, np.arange(-7, -1)[:, None]).ravel()  # all that bf16 has there
    signed = [rng.permutation(magnitudes) * rng.choice([-1, 1], magnitudes.size) for _ in range(count)]
    return [torch.from_numpy(each.reshape(24, 32)).to(dtype) for each in signed]


def with_and_without(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Tally]:
    """A call twice from the same state of torch's generator, which it leaves in the same state; its warnings agree."""
    outcomes = []
    for context in (nullcontext(Tally()), peft.accelerated()):
        torch.manual_seed(5)
        with warnings.catch_warnings(record=True) as found, context as tally:
            warnings.simplefilter("always")
            outcomes.append((call(), torch.get_rng_state(), [str(each.message) for each in found]))
    (without, state, said), (within, after, says) = outcomes
    assert torch.equal(state, after), "PEFT's random masks are drawn as PEFT draws them"
    assert said == says
    return without, within, tally


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [(0.6, 1.0, 0.25), (0.6, -1.0, 0.25), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=lambda each: each if isinstance(each, str) else str(each))
def test_peft_with_fastmerge_gives_the_same_numbers(
    merge_utils: Any, name: str, arguments: tuple[Any, ...], weights: tuple[float, ...], dtype: torch.dtype
) -> None:
    tensors = deltas(dtype)
    without, within, tally = with_and_without(
        lambda: getattr(merge_utils, name)(tensors, torch.tensor(weights), *arguments)
    )
    assert (within.dtype, within.shape) == (without.dtype, without.shape)
    assert (tally.computed, tally.left) == ({name: 1}, {})
    terms = sum(abs(weight) * each.double().abs() for weight, each in zip(weights, tensors, strict=True))
    terms = terms / (arguments[0] or 1.0 if name.startswith("dare") else 1.0)
    # Each rounds every product, every sum and one quotient, PEFT in the dtype of the product.
    rounding = torch.finfo(torch.promote_types(dtype, torch.tensor(weights).dtype)).eps / 2
    assert ((within.double() - without.double()).abs() <= 2 * (len(tensors) + 2) * rounding * terms).all()
    assert arguments[:1] == (0.0,) or within.abs().max() > 0


def test_pefts_errors_stay_pefts(merge_utils: Any) -> None:
    tensors, weights = deltas(torch.float32), torch.ones(3)
    with peft.accelerated() as tally:
        with pytest.raises(ValueError, match="Density should be >= 0"):
            merge_utils.ties(tensors, weights, -0.1)
        with pytest.raises(RuntimeError, match="Unimplemented mask method"):
            merge_utils.ties(tensors, weights, 0.5, "majority")
        with pytest.raises(TypeError, match="density"):
            merge_utils.ties(tensors, weights)
        with pytest.raises(RuntimeError, match="equal size"):
            merge_utils.task_arithmetic([*tensors[:2], tensors[2][:3]], weights)
    assert tally.computed == {}


@pytest.mark.parametrize("reason", ["float64", "a gradient is wanted", "weights of another shape or device"])
def test_what_is_left_to_peft_is_counted(merge_utils: Any, reason: str) -> None:
    tensors, weights = deltas(torch.float64 if reason == "float64" else torch.float32), torch.ones(3)
    tensors[0].requires_grad_(reason == "a gradient is wanted")
    weights = weights[:1] if reason.startswith("weights") else weights
    without, within, tally = with_and_without(lambda: merge_utils.ties(tensors, weights, 0.5))
    assert torch.equal(without, within)
    assert within.requires_grad == tensors[0].requires_grad
    assert (tally.computed, tally.left) == ({}, {reason: 1})


class Tiny(torch.nn.Module):
    """What adapters are made for here: rows that are looked up, and two linear maps, one of them not square."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding(20, 12)
        self.up = torch.nn.Linear(12, 32)
        self.down = torch.nn.Linear(32, 12)


def two_adapters() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["rows", "up", "down"], init_lora_weights=False)
    model = get_peft_model(Tiny(), config, "one")
    model.add_adapter("two", config)
    return model


@pytest.mark.parametrize("kind", TYPES)
def test_a_weighted_adapter_is_the_same_to_the_bit(merge_utils: Any, kind: str) -> None:
    """Of two terms there is one sum, which every order rounds alike: the same delta goes into the same SVD."""

    def made() -> torch.Tensor:
        model = two_adapters()
        torch.manual_seed(8)
        model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "both", kind, density=0.6)
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return torch.cat([tensor.detach().flatten() for name, tensor in sorted(named.items()) if ".both" in name])

    without, within, tally = with_and_without(made)
    assert torch.equal(within, without)
    assert within.abs().max() > 0
    calls = {"cat": 0, **dict.fromkeys((kind for kind in TYPES if kind.endswith("svd")), 3)}.get(kind, 6)
    assert tally.left == {}
    assert tally.computed.total() == calls, "one delta per module, or A and B apart"


def test_peft_is_put_back_as_it_was(merge_utils: Any) -> None:
    from peft.tuners.lora import model as lora

    before = dict(vars(merge_utils)), dict(vars(lora))
    peft.install()
    for module, names in zip((merge_utils, lora), before, strict=True):
        assert {name for name, value in vars(module).items() if value is not names[name]} == set(FUNCTIONS)
        for name in FUNCTIONS:
            assert inspect.signature(getattr(module, name)) == inspect.signature(names[name])
    peft.uninstall()
    for module, names in zip((merge_utils, lora), before, strict=True):
        assert vars(module).keys() == names.keys()
        assert all(value is names[name] for name, value in vars(module).items())


def test_peft_is_never_half_changed(merge_utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(merge_utils, "dare_ties")
    before = dict(vars(merge_utils))
    with pytest.raises(AttributeError, match="dare_ties"):
        peft.install()
    assert all(value is before[name] for name, value in vars(merge_utils).items())
    monkeypatch.setattr(switch, "version", lambda name: "0.22.0")
    with pytest.raises(BackendError, match=r"accelerates peft 0\.21\.2, and this is 0\.22\.0"):
        peft.install()
