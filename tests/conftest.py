"""What the tests of the arithmetic share: tensors in guarded memory, each provider in turn, a method run on tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fastmerge import reference
from fastmerge.methods import METHODS, Measured, Method, Settings, ranks, rescale_of
from fastmerge.sweep import SWEPT, Cut, Found, Inputs, Rescale, Run, Sweep, Target, View

try:
    from fastmerge.native import ISAS
except ImportError:
    ISAS = ()
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
SIZES = SWEPT | {"F64": 8}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests are few and long come first: the processor that gets one last keeps the other waiting."""
    items.sort(key=lambda item: item.path.stem not in ("test_sanitized", "test_real"))


# --- every provider, every instruction set ---


@pytest.fixture(params=("torch", *(ISAS or ["compiled"])))
def provider(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The reference, then the compiled core forced to each instruction set of this build."""
    if request.param == "torch":
        yield reference
        return
    native = compiled_core()
    if request.param not in native.isas():
        pytest.skip(native.why_not(request.param))
    with native.using(request.param):
        assert native.isa() == request.param
        yield native


def compiled_core() -> Any:
    return pytest.importorskip("fastmerge.native", reason="compiled core not built", exc_type=ImportError)


# --- tensors in memory ---


class Memory:
    """Bytes at any misalignment, poisoned with 0xFF (a NaN in every float dtype), between guards."""

    GUARD = 64

    def __init__(self, size: int, skew: int = 0) -> None:
        self._whole = np.full(size + skew + 3 * self.GUARD, 0xA5, np.uint8)
        address = self._whole.ctypes.data
        self._start = self.GUARD + -address % self.GUARD + skew
        self._end = self._start + size
        self.address = address + self._start
        self.bytes = self._whole[self._start : self._end]
        self.bytes[:] = 0xFF

    def check_guards(self) -> None:
        outside = np.concatenate([self._whole[: self._start], self._whole[self._end :]])
        assert (outside == 0xA5).all(), "written outside of the output"


class Tensors:
    """The inputs of one sweep, each in memory of its own, to be held while an op runs; uint8 values are raw bytes."""

    def __init__(
        self, models: Sequence[tuple[np.ndarray, str]], base: tuple[np.ndarray, str] | None = None, skew: int = 0
    ) -> None:
        self._memory: list[Memory] = []
        self._skew = skew
        self.inputs = Inputs(
            models[0][0].nbytes // SIZES[models[0][1]] if models[0][0].dtype == np.uint8 else len(models[0][0]),
            tuple(self._place(*model) for model in models),
            None if base is None else self._place(*base),
        )
        self.nbytes = sum(len(memory.bytes) for memory in self._memory)

    def _place(self, values: np.ndarray, dtype: str) -> View:
        raw = values if values.dtype == np.uint8 else encode(values, dtype)
        memory = Memory(raw.size, self._skew * (1 + len(self._memory)))
        memory.bytes[:] = raw
        self._memory.append(memory)
        return View(memory.address, dtype)


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of some numbers in a dtype."""
    if not values.size:
        return np.zeros(0, np.uint8)
    return torch.from_numpy(np.ascontiguousarray(values)).to(TORCH[dtype]).view(torch.uint8).numpy()


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The float64 values of some bytes in a dtype."""
    return torch.from_numpy(raw.copy()).view(TORCH[dtype]).to(torch.float64).numpy()


def bits(raw: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes as unsigned integers, one per element."""
    return raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[SIZES[dtype]])


# --- ops on them ---


def merge(
    provider: ModuleType,
    tensors: Tensors,
    sweeps: Sequence[Sweep],
    dtypes: Sequence[str],
    run: Run = Run(),  # noqa: B008  immutable
    skew: int = 0,
) -> tuple[list[np.ndarray], Found]:
    """The bytes of K outputs, which were poisoned before and whose surroundings are checked after."""
    count = tensors.inputs.elements
    outputs = [Memory(count * SIZES[dtype], skew * (1 + k)) for k, dtype in enumerate(dtypes)]
    targets = [Target(dtype, output.address) for dtype, output in zip(dtypes, outputs, strict=True)]
    (found,) = provider.merge([tensors.inputs], [sweeps], [targets], run)
    for output in outputs:
        output.check_guards()
    return [output.bytes for output in outputs], found


def merge_by(
    method: str,
    provider: ModuleType,
    models: Sequence[np.ndarray],
    base: np.ndarray | None = None,
    *,
    keys: Sequence[int] = (),
    shared: Mapping[str, Any] = MappingProxyType({}),
    **each: Sequence[Any],
) -> np.ndarray:
    """A float32 tensor merged by a method as the engine does it; `each` holds one value per model of a parameter."""
    row = METHODS[method]
    settings = Settings(
        {p.name: shared.get(p.name, p.default) for p in row.parameters if not p.per_model},
        tuple(
            {p.name: each[p.name][i] if p.name in each else p.default for p in row.parameters if p.per_model}
            for i in range(len(models))
        ),
        tuple(keys),
    )
    tensors = Tensors([(model, "F32") for model in models], None if base is None else (base, "F32"))
    ((raw,), _) = merge(provider, tensors, [measured_sweep(provider, row, settings, tensors)], ["F32"])
    return decode(raw, "F32")


def measured_sweep(
    provider: ModuleType, method: Method, settings: Settings, tensors: Tensors, cuts: tuple[Cut, ...] = ()
) -> Sweep:
    """The sweep of a method, with what it wants to know measured; `cuts` where they are known already."""
    inputs, run = tensors.inputs, Run()
    if method.selects and not cuts:
        wanted = ranks(settings, inputs.elements)
        (cuts,) = provider.threshold([[inputs.selected(wanted)]], [wanted], run)
    gram = provider.gram([inputs], run)[0].tolist() if method.gram else ()
    sweep = method.sweep(settings, Measured(cuts, gram))
    norm = rescale_of(method, settings)
    if norm is Rescale.NONE:
        return sweep
    (norms,) = provider.norms([inputs], [sweep], run)  # [M, 2, 3]
    factors = [
        before / after if min(before, after) >= 1e-7 else 1.0 for before, after in norms[:, :, norm - 1].tolist()
    ]
    parts = (replace(p, rescale=p.rescale * factor) for p, factor in zip(sweep.parts, factors, strict=True))
    return replace(sweep, parts=tuple(parts))
