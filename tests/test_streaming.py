"""Merges through GPUs made of the host's memory: the same bytes, bounded memory, and what happens when one fails."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Protocol, TypeVar

import emulated
import numpy as np
import pytest
import test_engine
import torch
from safetensors.torch import save_file
from test_engine import (
    BASED,
    COPY,
    LINEAR,
    RECIPES,
    TIES,
    assert_nothing_left,
    family,
    load,
    merged,
    raw,
    save,
    save_sparse,
)

import fastmerge
from fastmerge import (
    BackendError,
    CheckpointError,
    FastmergeWarning,
    NonFiniteError,
    OutputError,
    backends,
    choice,
    reference,
    streaming,
)
from fastmerge.recipe import Recipe
from fastmerge.sweep import SWEPT, Cut, Found, Inputs, Run, Sweep, Target, View

try:
    from fastmerge import native as host
except ImportError:
    host = reference

#: A large tensor of the tests takes some dozen tiles of blocks this small; where ops take memory too they are smaller.
SMALL, SMALLEST = 1 << 16, 1 << 14
TINY_MEMORY = 2 * streaming.LANES * SMALL


class Memory:
    """Memory handed out at multiples of 256, poisoned, and counted."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.used = self.peak = 0
        self.refused = 0
        self._held: dict[int, tuple[int, np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> int:
        with self._lock:
            if self.used + nbytes > self.capacity:
                self.refused += 1
                raise MemoryError
            held = np.full(nbytes + 256, 0xFF, np.uint8)
            address = held.ctypes.data + -held.ctypes.data % 256
            self._held[address] = nbytes, held
            self.used += nbytes
            self.peak = max(self.peak, self.used)
            return address

    def give(self, address: int) -> None:
        with self._lock:
            nbytes, _ = self._held.pop(address)
            self.used -= nbytes

    def holds(self, address: int, nbytes: int) -> bool:
        with self._lock:
            return any(start <= address and address + nbytes <= start + size for start, (size, _) in self._held.items())


class FakeDevice:
    """A GPU of host memory, which sees to it that addresses are what they should be."""

    def __init__(self, number: int, capacity: float, pinnable: float) -> None:
        self.name = f"Fake {number}"
        self.is_cuda = True
        self.memory = Memory(capacity)
        self.pinned = Memory(pinnable)
        self.streams: set[int] = set()
        self.uploaded = 0

    def free_bytes(self) -> int:
        return int(min(self.memory.capacity, 1 << 40)) - self.memory.used

    def allocate(self, nbytes: int) -> int:
        return self.memory.take(nbytes)

    def release(self, address: int) -> None:
        self.memory.give(address)

    def pin(self, nbytes: int) -> int:
        return self.pinned.take(nbytes)

    def unpin(self, address: int) -> None:
        self.pinned.give(address)

    def stream(self) -> int:
        stream = 1 + max(self.streams, default=0)
        self.streams.add(stream)
        return stream

    def close(self, stream: int) -> None:
        self.streams.remove(stream)

    def upload(self, to: int, source: int, nbytes: int, stream: int) -> None:
        assert self.memory.holds(to, nbytes)
        assert self.pinned.holds(source, nbytes)
        assert stream in self.streams
        ctypes.memmove(to, source, nbytes)
        self.uploaded += nbytes

    def download(self, to: int, source: int, nbytes: int, stream: int) -> None:
        assert self.pinned.holds(to, nbytes)
        assert self.memory.holds(source, nbytes)
        assert stream in self.streams
        ctypes.memmove(to, source, nbytes)

    def synchronize(self, stream: int) -> None:
        assert stream in self.streams


class FakeCuda(ModuleType):
    """In the place of the provider `cuda`: the ops of the CPU on the memory of fake devices."""

    name = "cuda"
    DEVICE = "gpu"
    DTYPES = frozenset({"F32", "F16", "BF16"})

    def __init__(self, count: int = 1, capacity: float = np.inf, pinnable: float = np.inf) -> None:
        super().__init__("fastmerge.cuda")
        self.there = [FakeDevice(number, capacity, pinnable) for number in range(count)]
        self.calls: list[tuple[str, int, int]] = []  # op, device, tensors
        self.before: Callable[[str, Run], None] = lambda op, run: None
        self.out = ""

    def why_not(self) -> str:
        return self.out

    def devices(self) -> int:
        return len(self.there)

    def device(self, index: int) -> FakeDevice:
        return self.there[index]

    def gram(self, tensors: Sequence[Inputs], run: Run) -> Any:
        return host.gram(tensors, self._looked_at("gram", tensors, run))

    def norms(self, tensors: Sequence[Inputs], sweeps: Sequence[Sweep], run: Run) -> Any:
        return host.norms(tensors, sweeps, self._looked_at("norms", tensors, run))

    def threshold(self, groups: Sequence[Sequence[Inputs]], ranks: Sequence[Sequence[int]], run: Run) -> Any:
        tensors = [tensor for group in groups for tensor in group]
        assert not any(tensor.begin for tensor in tensors)
        return host.threshold(groups, ranks, self._looked_at("threshold", tensors, run))

    def merge(
        self,
        tensors: Sequence[Inputs],
        sweeps: Sequence[Sequence[Sweep]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> list[Found]:
        memory = self.there[run.device].memory
        for tensor, (target,) in zip(tensors, targets, strict=True):
            assert target.file == -1
            assert target.offset % 256 == 0
            assert not tensor.elements or memory.holds(target.offset, tensor.elements)
        run = self._looked_at("merge", tensors, run)
        if tensors[0].begin:
            return [tile_merged(*each, run) for each in zip(tensors, sweeps, targets, strict=True)]
        return host.merge(tensors, sweeps, targets, run)

    def _looked_at(self, op: str, tensors: Sequence[Inputs], run: Run) -> Run:
        device = self.there[run.device]
        assert run.stream in device.streams
        for tensor in tensors:
            for view in tensor.views:
                assert view.address % 256 == 0
                assert view.dtype in self.DTYPES
                assert not tensor.elements or device.memory.holds(view.address, tensor.elements)
        self.calls.append((op, run.device, len(tensors)))
        self.before(op, run)
        return Run(threads=1)


def tile_merged(tile: Inputs, sweeps: Sequence[Sweep], targets: Sequence[Target], run: Run) -> Found:
    """A tile by way of a whole tensor that is zero before it, as the ops of the CPU take whole tensors only."""
    count = tile.begin + tile.elements
    wholes = [np.zeros(count * SWEPT[view.dtype], np.uint8) for view in tile.views]
    for whole, view in zip(wholes, tile.views, strict=True):
        start = tile.begin * SWEPT[view.dtype]
        ctypes.memmove(whole.ctypes.data + start, view.address, len(whole) - start)
    views = [View(whole.ctypes.data, view.dtype) for whole, view in zip(wholes, tile.views, strict=True)]
    models = len(tile.models)
    (target,) = targets
    output = np.zeros(count * SWEPT[target.dtype], np.uint8)
    inputs = Inputs(count, tuple(views[:models]), views[models] if tile.base else None)
    (found,) = host.merge([inputs], [sweeps], [[Target(target.dtype, output.ctypes.data)]], run)
    start = tile.begin * SWEPT[target.dtype]
    ctypes.memmove(target.offset, output.ctypes.data + start, len(output) - start)
    return found


class FakeRankedCuda(FakeCuda):
    """One that selects and sweeps in one call."""

    def merge_ranked(
        self,
        tensors: Sequence[Inputs],
        sweeps: Sequence[Sequence[Sweep]],
        ranks: Sequence[Sequence[int]],
        targets: Sequence[Sequence[Target]],
        run: Run,
    ) -> tuple[list[tuple[Cut, ...]], list[Found]]:
        run = self._looked_at("merge_ranked", tensors, run)
        cuts = host.threshold([[tensor] for tensor in tensors], ranks, run)
        ranked = []
        for (sweep,), mine in zip(sweeps, cuts, strict=True):
            parts = [
                replace(part, magnitude=cut.magnitude, ties_end=cut.ties_end)
                for part, cut in zip(sweep.parts, mine, strict=True)
            ]
            ranked.append([replace(sweep, parts=tuple(parts))])
        return cuts, host.merge(tensors, ranked, targets, run)


class EmulatedCuda(ModuleType):
    """The compiled CUDA provider on the devices that tests/cuda_emulator has: its own memory, streams and kernels."""

    there: tuple[FakeDevice, ...] = ()

    def __init__(self) -> None:
        super().__init__("fastmerge.cuda")
        self.calls: list[tuple[str, int, int]] = []  # op, device, tensors
        self.before: Callable[[str, Run], None] = lambda op, run: None

    def __getattr__(self, name: str) -> Any:
        found = getattr(emulated.provider(), name)
        if name not in ("gram", "norms", "threshold", "merge", "merge_ranked"):
            return found

        def noted(*arguments: Any) -> Any:
            self.calls.append((name, arguments[-1].device, len(arguments[0])))
            self.before(name, arguments[-1])
            return found(*arguments)

        return noted


Gpu = TypeVar("Gpu", bound="FakeCuda | EmulatedCuda")


class Put(Protocol):
    def __call__(self, gpu: Gpu) -> Gpu: ...


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Put]:
    """Puts a fake in the place of the provider `cuda`; in the end all its memory must have been given back."""
    there: list[FakeCuda | EmulatedCuda] = []

    def put(gpu: Gpu) -> Gpu:
        there.append(gpu)
        monkeypatch.setitem(sys.modules, "fastmerge.cuda", gpu)
        return gpu

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(streaming, "SMALLEST", SMALLEST)
    running = threading.active_count()
    yield put
    for device in (device for fake in there for device in fake.there):
        assert (device.memory.used, device.pinned.used, device.streams) == (0, 0, set())
    assert threading.active_count() == running


def save_family(**tensors: torch.Tensor) -> None:
    """base, a, b and c in bf16, and the same tensors for all beside their own."""
    for name, own in family(torch.bfloat16).items():
        save(name, own | tensors)


def through_gpu(text: str, out: str = "gpu", **options: Any) -> fastmerge.Report:
    return fastmerge.merge(Recipe.parse(text), out, backend="cuda", **options)


# --- the same bytes ---

MORE = {
    "ties-of-equals": f"merge_method: ties\n{BASED}parameters: {{weight: 0.7, density: 0.3, ties: all}}\n",
    "dare_ties-rescaled": f"merge_method: dare_ties\n{BASED}parameters: {{weight: 0.4, density: 0.6, rescale: l1}}\n",
    "passthrough-unscaled": COPY,
}


@pytest.mark.parametrize(
    "kind", [FakeCuda, FakeRankedCuda, EmulatedCuda], ids=["selects-then-sweeps", "in-one-call", "emulated"]
)
@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
@pytest.mark.parametrize("recipe", RECIPES | MORE)
def test_a_merge_through_a_gpu_has_the_bytes_of_the_cpu(
    recipe: str, gpu_memory: int | None, kind: type[FakeCuda | EmulatedCuda], put: Put
) -> None:
    gpu = put(kind())
    save_family(positions=torch.arange(300), flags=torch.tensor([True, False]), empty=torch.zeros(0, dtype=torch.int64))
    text = (RECIPES | MORE)[recipe]
    expected = raw(merged(text, backend="cpu"))
    report = through_gpu(text, gpu_memory=gpu_memory)
    assert raw(test_engine.load("gpu")) == expected
    assert "merge" in report.worked["cuda"]
    assert report.choice == "cuda: asked for by name"
    assert not report.gpu_considered
    tiles = sum(op == "merge" and count == 1 for op, _, count in gpu.calls)
    assert (tiles > 10) is (gpu_memory is not None)


@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
def test_rows_that_are_tensors_of_their_own_have_the_bytes_of_the_cpu(gpu_memory: int | None, put: Put) -> None:
    """A tile is of whole rows, measured where they are swept; NaN is told with its index in the whole tensor."""
    put(EmulatedCuda())
    shapes = {"wide": (403, 200), "narrow": (17, 24), "scalar": (), "empty": (0, 3)}
    models = family(torch.bfloat16, shapes)
    for name, tensors in models.items():
        save(name, tensors)
    text = f"merge_method: model_stock\n{BASED}parameters: {{filter_wise: true}}\n"
    expected = raw(merged(text, backend="cpu"))
    report = through_gpu(text, gpu_memory=gpu_memory)
    assert raw(test_engine.load("gpu")) == expected
    assert report.worked == {"cuda": ("gram", "merge")}
    models["b"]["wide"][[300, 400], 5] = torch.nan
    save("broken", models["b"])
    with pytest.raises(NonFiniteError, match="'wide' holds 2 NaN or Inf, the first at index 60,005"):
        through_gpu(text.replace(", model: b", ", model: broken"), "nan", gpu_memory=gpu_memory)


@pytest.mark.parametrize("kind", [FakeRankedCuda, EmulatedCuda], ids=["fake", "emulated"])
def test_cuts_are_selected_in_one_call_where_nothing_else_is_wanted(
    kind: type[FakeRankedCuda | EmulatedCuda], put: Put
) -> None:
    gpu = put(kind())
    save_family()
    for text, ops in [
        (RECIPES["ties"], {"merge_ranked"}),
        (RECIPES["ties-rescaled"], {"threshold", "norms", "merge"}),
        (RECIPES["ties-of-model"], {"merge"}),
        (RECIPES["breadcrumbs"], {"threshold", "merge"}),
        (MORE["ties-of-equals"], {"threshold", "merge"}),
    ]:
        gpu.calls.clear()
        report = through_gpu(text, overwrite=True)
        assert {op for op, _, _ in gpu.calls} == ops
        assert ("threshold" in report.worked["cuda"]) is ("".join(ops) != "merge")
        assert report.worked.get("cpu", ()) == (("threshold",) if "scope: model" in text else ())


def test_what_must_be_known_of_a_large_tensor_is_measured_by_the_cpu(put: Put) -> None:
    put(FakeCuda())
    save_family()
    report = through_gpu(RECIPES["ties-rescaled"], gpu_memory=TINY_MEMORY)
    assert report.worked == {"cpu": ("norms", "threshold"), "cuda": ("norms", "threshold", "merge")}
    assert set(report.providers) == {"cpu", "cuda"}


def test_what_only_the_cpu_does_it_does_and_says_so(put: Put) -> None:
    """Rows that an adapter adds to, and what is no sweep."""
    put(EmulatedCuda())
    save_family()
    adapter, name = Path("adapter"), "base_model.model.model.wide"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    factors = {f"{name}.lora_A.weight": torch.ones(2, 90_001), f"{name}.lora_B.weight": torch.full((3, 2), 0.01)}
    save_file(factors, adapter / "adapter_model.safetensors")
    adapted = LINEAR.replace("model: b", "model: b+adapter")
    for out, text, count in (("adapted", adapted, 1), ("sce", f"merge_method: sce\n{BASED}", 8)):
        expected = raw(merged(text, out))
        with pytest.warns(FastmergeWarning, match=f"the CPU and not cuda merges {count} tensors, such as 'model"):
            report = through_gpu(text, f"{out}-gpu")
        assert raw(test_engine.load(f"{out}-gpu")) == expected
        assert ("cuda" in report.worked) is (out == "adapted")


def test_float64_is_refused_before_anything_is_done(put: Put) -> None:
    gpu = put(FakeCuda())
    for name, tensors in family(torch.bfloat16).items():
        save(name, tensors | {"wide": torch.ones(3, dtype=torch.float64)})
    with pytest.raises(BackendError, match=r"no backend merges F64 here \(cuda takes BF16, F16, F32\)"):
        through_gpu(LINEAR)
    assert not gpu.calls
    assert_nothing_left("gpu")


@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
def test_a_copy_that_lets_nan_through_never_sees_the_gpu(gpu_memory: int | None, put: Put) -> None:
    gpu = put(FakeCuda())
    values = torch.arange(200_000, dtype=torch.int32).view(torch.float32)
    save("a", {"x": values, "y": torch.tensor([0x7FC00001, -0x400000], dtype=torch.int32).view(torch.float32)})
    report = through_gpu(COPY, nonfinite="propagate", gpu_memory=gpu_memory)
    assert raw(test_engine.load("gpu")) == raw(test_engine.load("a"))
    assert report.providers == ()
    assert not gpu.calls
    assert gpu.there[0].uploaded == 0


@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
def test_nan_is_told_with_its_first_index_in_the_whole_tensor(gpu_memory: int | None, put: Put) -> None:
    put(FakeCuda())
    models = family()
    models["a"]["model.wide.weight"].view(-1)[[250_001, 200_003, 137_001]] = np.nan
    for name, tensors in models.items():
        save(name, tensors)
    with pytest.raises(NonFiniteError, match=r"'model\.wide\.weight' holds 3 NaN or Inf, the first at index 137,001;"):
        through_gpu(LINEAR, gpu_memory=gpu_memory)
    assert_nothing_left("gpu")


def test_overflow_is_counted_over_all_tiles(put: Put) -> None:
    put(FakeCuda())
    save("a", {"x": torch.full((200_000,), 1e9)})
    with pytest.warns(fastmerge.FastmergeWarning, match="200,000 elements in 1 tensors became infinite in F16"):
        through_gpu(f"{COPY}out_dtype: float16\n", gpu_memory=TINY_MEMORY)


@pytest.mark.parametrize("recipe", ["linear", "ties", "ties-rescaled", "ties-of-model", "breadcrumbs", "slerp"])
@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
def test_progress_rises_to_the_bytes_in_all_on_the_calling_thread(
    recipe: str, gpu_memory: int | None, put: Put
) -> None:
    put(FakeCuda())
    save_family()
    seen: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        threads.add(threading.get_ident())

    through_gpu(RECIPES[recipe], gpu_memory=gpu_memory, progress=progress)
    done = [at[0] for at in seen]
    assert done == sorted(done)
    assert {at[1] for at in seen} == {done[-1]}
    assert threads == {threading.get_ident()}


# --- memory ---


@pytest.mark.parametrize("gpu_memory", [TINY_MEMORY, 4 * TINY_MEMORY + 1000, 1 << 30])
@pytest.mark.parametrize("recipe", ["linear", "ties", "passthrough"])
def test_pinned_and_device_memory_stay_within_the_bound(recipe: str, gpu_memory: int, put: Put) -> None:
    gpu = put(FakeCuda(count=2))
    save_family()
    through_gpu(RECIPES[recipe], gpu_memory=gpu_memory)
    for device in gpu.there:
        assert 0 < device.memory.peak + device.pinned.peak <= gpu_memory
        assert device.memory.peak == device.pinned.peak


@pytest.mark.parametrize("gpu_memory", [4 * TINY_MEMORY, 1 << 23])
@pytest.mark.parametrize(
    ("recipe", "vary"),
    [
        *((recipe, {}) for recipe in ("linear", "ties", "ties-rescaled", "breadcrumbs", "slerp")),
        ("ties-rescaled", {"density": [0.1, 0.2, 0.3]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "varied" if value else "",
)
def test_the_scratch_memory_of_ops_is_within_the_bound_too(
    recipe: str, vary: dict[str, list[float]], gpu_memory: int, put: Put
) -> None:
    """Of both emulated devices together, as each has a bound of its own."""
    gpu = put(EmulatedCuda())
    save_family(**{f"small.{i}": torch.linspace(-1, 1, 10 + 1001 * i).bfloat16() for i in range(30)})
    for number in range(gpu.devices()):
        gpu.release_scratch(Run(device=number))
    emulated.peak()
    held = emulated.peak()
    through_gpu(RECIPES[recipe], gpu_memory=gpu_memory, vary=vary)
    assert gpu.calls
    assert emulated.peak() - held <= gpu.devices() * gpu_memory
    assert emulated.peak() == held, "something is kept"


def test_no_more_memory_is_taken_than_the_jobs_need(put: Put) -> None:
    gpu = put(FakeCuda())
    save_family()
    through_gpu(RECIPES["ties"])
    largest = 5 * (3 * 90_001 * 2 + 256)
    assert gpu.there[0].memory.peak <= streaming.LANES * largest


@pytest.mark.parametrize("short", ["capacity", "pinnable"])
def test_lanes_make_do_with_half_where_memory_is_short(short: str, put: Put) -> None:
    save_family()
    expected = raw(merged(RECIPES["ties"], backend="cpu"))
    limit = streaming.LANES * 3 * SMALL
    gpu = put(FakeCuda(**{short: limit}))
    through_gpu(RECIPES["ties"], gpu_memory=1 << 30)
    memory = gpu.there[0].memory if short == "capacity" else gpu.there[0].pinned
    assert memory.refused > 1
    assert limit / 2 < memory.peak <= limit
    assert raw(test_engine.load("gpu")) == expected


@pytest.mark.parametrize("short", ["capacity", "pinnable"])
def test_a_gpu_without_memory_is_an_error_that_says_what_to_do(short: str, put: Put) -> None:
    put(FakeCuda(**{short: streaming.LANES * SMALLEST - 1}))
    save_family()
    with pytest.raises(BackendError, match=r"^Fake 0 needs 131,072 bytes to merge.* or merge with --backend cpu$"):
        through_gpu(LINEAR, gpu_memory=1 << 30)
    assert_nothing_left("gpu")


def test_a_driver_that_refuses_memory_is_told_as_one(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put(EmulatedCuda())
    save_family()
    expected = raw(merged(RECIPES["ties"], backend="cpu"))
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_EMULATOR_MEMORY", "1")
        with pytest.raises(BackendError, match=r"^Emulated device 0 needs [\d,]+ bytes to merge.*--backend cpu$"):
            through_gpu(RECIPES["ties"], gpu_memory=1 << 30)
    assert_nothing_left("gpu")
    through_gpu(RECIPES["ties"], gpu_memory=1 << 30)  # the error has not stayed behind
    assert raw(test_engine.load("gpu")) == expected


def test_a_bound_below_what_any_merge_needs_is_an_error(put: Put) -> None:
    put(FakeCuda())
    save_family()
    with pytest.raises(BackendError, match="pass more as --gpu-memory"):
        through_gpu(LINEAR, gpu_memory=2 * streaming.LANES * SMALLEST - 1)
    assert_nothing_left("gpu")


def test_more_inputs_than_fit_a_block_is_an_error_and_no_overrun(put: Put) -> None:
    put(FakeCuda())
    for number in range(260):
        save(f"m{number}", {"x": torch.full((2000,), float(number))})
    models = ", ".join(f"model: m{number}" for number in range(260))
    with pytest.raises(BackendError, match="tensor 'x' has 260 inputs, for which 65,536 bytes are too little"):
        through_gpu(f"merge_method: uniform_soup\nmodels: [{models}]\n", gpu_memory=TINY_MEMORY)
    assert_nothing_left("gpu")


def test_memory_that_an_op_lacks_is_an_error_that_says_what_to_do(put: Put) -> None:
    gpu = put(FakeCuda())
    save_family()

    def lack(op: str, run: Run) -> None:
        raise MemoryError

    gpu.before = lack
    with pytest.raises(BackendError, match="Fake 0 ran out of memory while it merged: pass less as --gpu-memory"):
        through_gpu(LINEAR)
    assert_nothing_left("gpu")


# --- several GPUs ---


@pytest.mark.parametrize("make", [partial(FakeCuda, count=2), EmulatedCuda], ids=["fake", "emulated"])
def test_gpus_take_from_one_queue(make: Callable[[], FakeCuda | EmulatedCuda], put: Put) -> None:
    """The first does nothing until the second has done all else: a fixed share for each would never end."""
    gpu = put(make())
    save_family()
    expected = raw(merged(RECIPES["dare_ties"], backend="cpu"))
    through_gpu(RECIPES["dare_ties"], out="counted", gpu_memory=TINY_MEMORY)
    pieces = len(gpu.calls)
    assert pieces > 3 * streaming.LANES
    gpu.calls.clear()
    enough, done = threading.Event(), []

    def wait(op: str, run: Run) -> None:
        if run.device == 0:
            assert enough.wait(60)
            return
        done.append(op)
        if len(done) >= pieces - streaming.LANES:
            enough.set()

    gpu.before = wait
    through_gpu(RECIPES["dare_ties"], gpu_memory=TINY_MEMORY)
    assert raw(test_engine.load("gpu")) == expected
    assert len(gpu.calls) == pieces
    assert sum(device == 0 for _, device, _ in gpu.calls) <= streaming.LANES


# --- what goes wrong ---


@pytest.mark.parametrize("kind", [RuntimeError, BackendError, KeyboardInterrupt])
@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
@pytest.mark.parametrize("make", [partial(FakeCuda, count=2), EmulatedCuda], ids=["fake", "emulated"])
def test_an_error_in_a_lane_is_raised_as_it_is_and_stops_the_others(
    kind: type[BaseException], gpu_memory: int | None, make: Callable[[], FakeCuda | EmulatedCuda], put: Put
) -> None:
    """While uploads are under way, which no memory is taken from."""
    gpu = put(make())
    save_family()
    error = kind("the card fell off the bus")

    def fail(op: str, run: Run) -> None:
        raise error

    gpu.before = fail
    with pytest.raises(kind) as caught:
        through_gpu(LINEAR, gpu_memory=gpu_memory)
    assert caught.value is error
    assert len(gpu.calls) <= 2 * streaming.LANES
    assert_nothing_left("gpu")


@pytest.mark.parametrize("recipe", ["linear", "ties-rescaled"])
@pytest.mark.parametrize("at", [1, 2, -1], ids=["at-first", "midway", "at-last"])
@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
def test_an_interrupt_stops_all_lanes_and_the_same_merge_goes_on(
    recipe: str, at: int, gpu_memory: int | None, put: Put
) -> None:
    put(FakeCuda())
    save_family()
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at or done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        through_gpu(RECIPES[recipe], gpu_memory=gpu_memory, progress=interrupt)
    assert all(path.name.startswith(".fastmerge-") for path in Path().glob("gpu/*"))
    through_gpu(RECIPES[recipe], gpu_memory=gpu_memory)
    assert raw(load("gpu")) == raw(merged(RECIPES[recipe], "plain", backend="cpu"))


def test_an_interrupt_does_not_wait_for_what_is_queued(put: Put) -> None:
    """The lanes stand still in the ops until the merge is told to stop."""
    gpu = put(FakeCuda())
    save_family()
    interrupted = threading.Event()
    gpu.before = lambda op, run: None if interrupted.wait(60) else pytest.fail("never told")

    def interrupt(done: int, total: int) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        through_gpu(LINEAR, gpu_memory=TINY_MEMORY, progress=interrupt)
    assert len(gpu.calls) <= streaming.LANES
    assert_nothing_left("gpu")


def test_ctrl_c_reaches_a_merge_that_waits_for_its_lanes(put: Put) -> None:
    gpu = put(FakeCuda())
    save_family()
    main = threading.main_thread().ident
    assert main
    gpu.before = lambda op, run: signal.pthread_kill(main, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            through_gpu(LINEAR, gpu_memory=TINY_MEMORY)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_nothing_left("gpu")


@pytest.mark.parametrize("cut", ["a", "b", "base"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error(cut: str, put: Put) -> None:
    gpu = put(FakeCuda())
    tensors = {f"layers.{n}.norm": ("BF16", (64,)) for n in range(600)} | {"last": ("BF16", (3_000_000,))}
    for number, name in enumerate(("base", "a", "b")):
        save_sparse(name, tensors, bytes([0, number]))
    gpu.before = lambda op, run: os.truncate(f"{cut}/model.safetensors", 4096)
    with pytest.raises(CheckpointError, match=rf"{cut}/model\.safetensors changed while it was read \(it has 4096"):
        through_gpu(TIES, gpu_memory=TINY_MEMORY)
    assert_nothing_left("gpu")


def test_an_input_that_cannot_be_read_is_told_as_one(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put(FakeCuda())
    save_family()

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read \(Input/output error\)"):
        through_gpu(LINEAR)
    assert_nothing_left("gpu")


# --- kvikio ---


class FakeKvikio(ModuleType):
    """kvikio as far as it is used; its reads are told, and those past the end are short."""

    def __init__(self) -> None:
        super().__init__("kvikio")
        self.__spec__ = ModuleSpec("kvikio", None)
        self.read = 0
        fake = self

        class CuFile:
            def __init__(self, file: str, flags: str) -> None:
                assert flags == "r"
                self._file = open(file, "rb")  # noqa: SIM115

            def __enter__(self) -> CuFile:
                return self

            def __exit__(self, *_: object) -> None:
                self._file.close()

            def pread(self, buf: Any, size: int, file_offset: int) -> Any:
                about = buf.__cuda_array_interface__
                assert (about["shape"], about["typestr"], about["version"]) == ((size,), "|u1", 3)
                data = os.pread(self._file.fileno(), size, file_offset)
                ctypes.memmove(about["data"][0], data, len(data))
                fake.read += len(data)
                return SimpleNamespace(get=lambda: len(data))

        self.CuFile = CuFile


@pytest.fixture
def kvikio(monkeypatch: pytest.MonkeyPatch) -> FakeKvikio:
    fake = FakeKvikio()
    monkeypatch.setitem(sys.modules, "kvikio", fake)
    return fake


@pytest.mark.parametrize("gpu_memory", [None, TINY_MEMORY], ids=["whole", "tiles"])
def test_where_kvikio_is_installed_inputs_go_past_the_host(
    gpu_memory: int | None, put: Put, kvikio: FakeKvikio
) -> None:
    gpu = put(FakeCuda())
    save_family(flags=torch.tensor([True, False]))
    expected = raw(merged(TIES, backend="cpu"))
    through_gpu(TIES, gpu_memory=gpu_memory)
    assert raw(test_engine.load("gpu")) == expected
    assert kvikio.read > 0
    assert not any(device.uploaded for device in gpu.there)


def test_a_gpu_that_is_not_nvidias_is_read_to_as_ever(put: Put, kvikio: FakeKvikio) -> None:
    gpu = put(FakeCuda())
    for device in gpu.there:
        device.is_cuda = False
    save_family()
    through_gpu(LINEAR)
    assert kvikio.read == 0
    assert any(device.uploaded for device in gpu.there)


def test_a_file_that_ends_while_kvikio_reads_is_an_error(put: Put, kvikio: FakeKvikio) -> None:
    put(FakeCuda())
    save_family()
    read = kvikio.CuFile.pread
    kvikio.CuFile.pread = lambda self, buf, size, offset: read(self, buf, size, 1 << 40)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        through_gpu(LINEAR)
    assert_nothing_left("gpu")


def test_what_kvikio_cannot_do_is_told_with_the_remedy(put: Put, kvikio: FakeKvikio) -> None:
    put(FakeCuda())
    save_family()

    def fail(*_: object) -> None:
        raise RuntimeError("no libcuda.so.1")

    kvikio.CuFile.pread = fail
    with pytest.raises(
        BackendError, match=r"kvikio cannot read .*model\.safetensors \(no libcuda.so.1\): .* uninstall"
    ):
        through_gpu(LINEAR)
    assert_nothing_left("gpu")


def test_a_disk_that_fills_up_midway_is_an_error(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put(FakeCuda())
    save_family()

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OutputError, match=r"gpu cannot be written \(No space left on device\)"):
        through_gpu(LINEAR)
    assert_nothing_left("gpu")


# --- auto ---


@pytest.mark.parametrize(
    ("left", "cpu", "bus", "expected"),
    [
        (100e9, 10e9, 25e9, "gpu"),
        (100e9, 25e9, 10e9, "cpu"),
        (100e9, 10e9, 10e9, "cpu"),
        (1e9, 10e9, 1000e9, "cpu"),  # done before a GPU has begun
        (20e9, 10e9, 20e9, "cpu"),  # begun too late to be done sooner
        (21e9, 10e9, 20e9, "gpu"),
        (0, 1.0, 25e9, "cpu"),
    ],
)
def test_the_faster_device_takes_what_is_left(left: int, cpu: float, bus: float, expected: str) -> None:
    assert choice.faster(left, cpu, bus) == expected


class Clock:
    """Moves on by a step at each look."""

    def __init__(self, step: float) -> None:
        self.step, self.now = step, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_the_bus_is_as_fast_as_its_slower_direction(put: Put) -> None:
    gpu = put(FakeCuda())
    clock = Clock(1e-3)
    download = gpu.there[0].download

    def slow(*arguments: int) -> None:
        clock.now += 3e-3
        download(*arguments)

    gpu.there[0].download = slow
    assert streaming.bus_rate(gpu.there[0], clock) == pytest.approx((1 << 26) / 4e-3)


def weighed(gpu_step: float, left: int = 100 * 10**9) -> choice.Choice:
    """A choice after the CPU has merged at 10 GB/s; the bus takes a step for 64 MiB."""
    chosen = choice.Choice("auto", {}, Clock(gpu_step))
    chosen.after(10**9, 0.1, left + 10**9)
    assert not chosen.considered, "too short a trial"
    chosen.after(10**9, 0.1, left)
    return chosen


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_DRIVERS", ("/dev/null",))


@pytest.mark.usefixtures("driver")
def test_a_gpu_takes_over_where_its_bus_is_faster(put: Put) -> None:
    put(FakeCuda())
    chosen = weighed((1 << 26) / 25e9)
    assert chosen.gpu is not None
    assert chosen.considered
    assert chosen.reason == "cuda: 25.0 GB/s over the bus of Fake 0 against 10.0 GB/s on the CPU, with 100.0 GB left"


@pytest.mark.usefixtures("driver")
def test_the_cpu_goes_on_where_the_bus_is_slower(put: Put) -> None:
    put(FakeCuda())
    chosen = weighed((1 << 26) / 9e9)
    assert chosen.gpu is None
    assert chosen.considered
    assert chosen.reason == "cpu: 10.0 GB/s against 9.0 GB/s over the bus of Fake 0, with 100.0 GB left"


@pytest.mark.usefixtures("driver")
def test_no_gpu_is_woken_for_what_the_cpu_does_in_a_second(put: Put) -> None:
    gpu = put(FakeCuda())
    gpu.out = "must not be asked"
    chosen = weighed(1e-3, left=10**10)
    assert (chosen.gpu, chosen.considered) == (None, False)
    assert chosen.reason == "cpu: done before a GPU would have begun"


@pytest.mark.usefixtures("driver")
def test_a_gpu_that_cannot_run_leaves_all_to_the_cpu_with_the_reason(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = put(FakeCuda())
    gpu.out = "its driver is too old"
    monkeypatch.setitem(sys.modules, "fastmerge.kernels.provider", None)
    chosen = weighed(1e-3)
    assert chosen.gpu is None
    assert chosen.reason.startswith("cpu: no backend runs on a GPU here (cuda is out: its driver is too old; triton is")


@pytest.mark.usefixtures("driver")
def test_a_gpu_whose_memory_is_full_leaves_all_to_the_cpu(put: Put) -> None:
    put(FakeCuda(capacity=1000))
    assert weighed(1e-3).reason == "cpu: the memory of the GPU is full"


@pytest.mark.usefixtures("driver")
def test_a_gpu_that_is_busy_or_broken_leaves_all_to_the_cpu(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = put(FakeCuda())

    def busy(nbytes: int) -> int:
        raise RuntimeError("the GPU failed to allocate memory: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(gpu.there[0], "allocate", busy)
    chosen = weighed(1e-3)
    assert chosen.gpu is None
    assert chosen.reason.endswith("all CUDA-capable devices are busy or unavailable")


def test_without_a_gpu_the_report_says_so(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = put(FakeCuda())
    gpu.out = "must not be asked"
    monkeypatch.setattr(backends, "_DRIVERS", ())
    save_family()
    report = fastmerge.merge(Recipe.parse(LINEAR), "out")
    assert (report.choice, report.gpu_considered) == ("cpu: there is no GPU", False)
    assert weighed(1e-3).reason == "cpu: there is no GPU"


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("recipe", ["linear", "ties", "ties-of-model", "dare_ties"])
def test_a_gpu_that_takes_over_midway_changes_no_byte(recipe: str, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = put(FakeCuda())
    monkeypatch.setattr("fastmerge.engine.BATCH_BYTES", 100_000)
    save_family()
    for name in ("base", "a", "b", "c"):
        tensors = test_engine.load(name) | {"double": torch.ones(9, dtype=torch.float64)}
        test_engine.save_file(tensors, f"{name}/model.safetensors")
    expected = raw(merged(RECIPES[recipe]))
    monkeypatch.setattr(choice, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(choice, "faster", lambda left, cpu, bus: "gpu")
    report = fastmerge.merge(Recipe.parse(RECIPES[recipe]), "mixed")
    assert raw(test_engine.load("mixed")) == expected
    assert set(report.providers) == {host.name, "cuda", "torch"}
    assert gpu.calls
    assert report.gpu_considered
    assert report.choice.startswith("cuda: ")


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("first", ["linear", "ramplus_tl"], ids=["gpu-first", "alone"])
def test_what_is_no_sweep_never_sees_a_gpu(first: str, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a GPU woken for it, whatever it takes the CPU."""
    gpu = put(FakeCuda())
    save_family()
    text = RECIPES["linear"].replace("merge_method", "name: soup\nmerge_method")
    text += "---\nmerge_method: sce\nbase_model: base\nmodels: [model: soup, model: c]\n"
    if first != "linear":
        text = f"merge_method: {first}\n{BASED}"
    expected = raw(merged(text))
    monkeypatch.setattr(choice, "TRIAL_SECONDS", 0.0)
    monkeypatch.setattr(choice, "faster", lambda left, cpu, bus: "gpu")
    monkeypatch.setattr("fastmerge.engine.BATCH_BYTES", 100_000)
    report = fastmerge.merge(Recipe.parse(text), "mixed")
    assert raw(test_engine.load("mixed")) == expected
    assert report.worked["torch"] == ("merge",)
    assert report.gpu_considered is bool(gpu.calls) is (first == "linear")


# --- Triton ---


def test_a_merge_through_triton_in_its_interpreter_has_the_same_bytes(put: Put) -> None:
    """In pieces for several lanes, and in tiles."""
    pytest.importorskip("triton", reason="triton not installed", exc_type=ImportError)
    shapes = {f"layers.{n % 2}.w{n}": (200 + n,) for n in range(8)} | {"wide": (3, 401), "empty": (0,)}
    for name, tensors in family(torch.bfloat16, shapes).items():
        save(name, tensors)
    expected = raw(merged(TIES, backend="cpu"))
    done = test_engine.run_python(
        f"""
        import fastmerge
        from fastmerge import streaming
        from fastmerge.kernels import provider
        from fastmerge.recipe import Recipe
        streaming.SMALLEST = 4096
        provider.scratch_bytes = lambda *_: 0  # which is more than that
        memory = 2 * streaming.LANES * streaming.SMALLEST
        report = fastmerge.merge(Recipe.parse({TIES!r}), "gpu", backend="triton", gpu_memory=memory)
        print(report.worked)
        """,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.stdout == "{'cpu': ('threshold',), 'triton': ('threshold', 'merge')}\n"
    assert raw(test_engine.load("gpu")) == expected
