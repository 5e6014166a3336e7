"""Whole methods on tensors in memory against PyTorch, eager and compiled, and against mergekit: in turn, in one run."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import accuracy
import peers
import pytest
import test_merge
import test_ops
import torch
import torch._dynamo
from cases import CASES, PARAMETERS, TORCH, WEIGHTS, Buffers, read_by, sweeps
from conftest import Ratio, Row
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._inductor import metrics

from fastmerge import memory, native
from fastmerge.methods import METHODS, Base
from fastmerge.sweep import SWEPT, Inputs, Run, View

_MERGEKIT = Path(__file__).with_name("mergekit_peer.py")
_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp", "passthrough")
_LONG = 0.1  # seconds
#: A peer rounds at most eight times, each time by half a unit in the last place of its largest input.
_ULPS = 4
#: Of ties: of equal magnitudes at the threshold a peer may keep others, and rounded votes may fall to the other side.
_UNDECIDED = 0.02
_SPACING = 0.125  # between the sums of the subsets of WEIGHTS


class Arguments(NamedTuple):
    """Of the merge of one tensor."""

    models: list[Tensor]
    base: Tensor | None


class Peer(Protocol):
    """Who merges the same tensors, into new ones: as it is written, it takes no place for its output."""

    name: str

    def hold(self, sets: Sequence[Sequence[Arguments]]) -> None:
        """What to merge from now on: tensors of the case, per set."""

    def seconds(self, number: int) -> float:
        """What a merge of a set took."""

    def merged(self) -> list[Tensor]:
        """The outcome of the last."""

    def density(self, dtype: torch.dtype) -> float:
        """With which it keeps, where it drops at random."""


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> tuple[str, Buffers]:
    """One case in memory at a time."""
    return request.param, Buffers(CASES[request.param], request.config.getoption("dtype"))


@pytest.mark.parametrize("case", CASES, indirect=True, scope="module")
@pytest.mark.parametrize("op", ["peer"])
@pytest.mark.parametrize("method", _METHODS)
@pytest.mark.parametrize("peer", ["eager", "compile", "mergekit"])
def test_against_peers(
    op: str,
    case: tuple[str, Buffers],
    method: str,
    peer: str,
    run: Run,
    record: Callable[[Row], None],
    request: pytest.FixtureRequest,
) -> None:
    """Ours measures and sweeps, as a real merge does; both are right before they are timed."""
    name, buffers = case
    row = METHODS[method]
    torch.set_num_threads(run.threads)
    work = test_ops.worked("whole" if row.selects or row.gram else "merge", method, buffers, native, run)
    other = _compiled(method) if peer == "compile" else _Torch("eager torch", getattr(peers, method))
    if peer == "mergekit":
        if method == "passthrough":
            pytest.skip("mergekit hands the input itself over: no work to time")
        other = request.getfixturevalue("mergekit")(method)
    if row.random:
        _assert_drops_as_told(other, buffers)
    other.hold([_arguments(work.inputs(number)) for number in range(len(buffers))])
    other.seconds(0)
    peer_error = None if row.random else _checked(other.merged(), method, buffers, run)
    took = other.seconds(buffers.turn())
    ours, theirs = [], []
    for _ in range(test_ops.rounds(took, request.config)):
        ours.append(_second(lambda: test_ops.timed(work.call, buffers.turn())))
        theirs.append(other.seconds(buffers.turn()) if took > _LONG else _second(lambda: other.seconds(buffers.turn())))
    record(
        Row(
            op,
            name,
            method,
            buffers.dtype,
            median(ours),
            test_ops.nbytes(work, buffers) / median(ours) / 1e9,
            times=Ratio.of(theirs, ours),
            against=f"as fast as {other.name}",
            error_ulp=work.error_ulp,
            peer_error_ulp=peer_error,
            peer=other.name,
            peer_seconds=median(theirs),
        )
    )


def _second(call: Callable[[], float]) -> float:
    """Of two calls in a row: in the first the threads of the other may still spin, which in a long one is nothing."""
    call()
    return call()


# --- the peers ---


class _Torch:
    """A method of `peers`, tensor after tensor."""

    def __init__(self, name: str, function: Callable[..., Tensor]) -> None:
        self.name, self._function = name, function
        self._merged: list[Tensor] = []

    def hold(self, sets: Sequence[Sequence[Arguments]]) -> None:
        self._sets = sets

    def seconds(self, number: int) -> float:
        self._merged.clear()
        started = perf_counter()
        self._merged.extend(self._function(*each) for each in self._sets[number])
        return perf_counter() - started

    def merged(self) -> list[Tensor]:
        return self._merged

    @staticmethod
    def density(dtype: torch.dtype) -> float:
        return PARAMETERS["density"]


def _compiled(method: str) -> _Torch:
    """By inductor, tried on a few elements: a graph break leaves some of it eager, but not all."""
    torch.compiler.reset()
    metrics.reset()
    function = torch.compile(getattr(peers, method), dynamic=False)
    some = torch.linspace(0.1, 1, 4096)
    try:
        function([some * (i + 1) for i in range(read_by(METHODS[method])[0])], some)
    except torch._dynamo.exc.TorchDynamoException as error:
        pytest.skip(f"torch.compile cannot: {str(error).splitlines()[0]}")
    assert metrics.generated_kernel_count, "nothing was compiled"
    return _Torch("torch.compile", function)


class _Mergekit:
    """mergekit in a process with tensors of its own: the first set, which may stay in its caches."""

    def __init__(self, name: str, child: subprocess.Popen[str], method: str) -> None:
        self.name, self._child = name, child
        row = METHODS[method]
        many, based = read_by(row)
        weights = {"weight": list(WEIGHTS)} if any(p.name == "weight" for p in row.parameters) else {}
        densities = {"density": [PARAMETERS["density"]] * many} if row.selects or row.random else {}
        shared = {"t": PARAMETERS["t"]} if row.parameter("t") else {}
        self._merge = {
            "method": method,
            "parameters": weights | densities | shared,
            "base": 0 if based or row.base is Base.ENDPOINT else None,
        }

    def hold(self, sets: Sequence[Sequence[Arguments]]) -> None:
        first = [([] if each.base is None else [each.base]) + each.models for each in sets[0]]
        with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
            paths = [str(Path(folder) / f"{number}.safetensors") for number in range(len(first[0]))]
            for path, tensors in zip(paths, zip(*first, strict=True), strict=True):
                save_file({f"{number:06}": tensor.clone() for number, tensor in enumerate(tensors)}, path)
            self._ask({"load": paths})

    def seconds(self, number: int) -> float:
        return float(self._ask(self._merge)["seconds"])

    def merged(self) -> list[Tensor]:
        with tempfile.TemporaryDirectory(prefix="fastmerge-bench-") as folder:
            path = str(Path(folder) / "merged.safetensors")
            self._ask({"save": path})
            return [tensor.clone() for _, tensor in sorted(load_file(path).items())]

    @staticmethod
    def density(dtype: torch.dtype) -> float:
        """It draws with a probability of the tensors' own dtype."""
        return float(torch.tensor(PARAMETERS["density"], dtype=dtype))

    def _ask(self, line: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(json.dumps(line), file=self._child.stdin, flush=True)
        answer = self._child.stdout.readline()
        assert answer, "mergekit's process ended"
        return dict(json.loads(answer))


@pytest.fixture(scope="session")
def mergekit(run: Run) -> Iterator[Callable[[str], _Mergekit]]:
    """One process for all, as mergekit takes seconds to import."""
    command = test_merge._mergekit()
    asked = [str(command.with_name("python")), str(_MERGEKIT), str(run.threads)]
    with subprocess.Popen(asked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield lambda method: _Mergekit(f"mergekit {test_merge._version(command)}", child, method)
        child.stdin.close()


# --- what they are given, and whether they are right ---


def _arguments(inputs: Sequence[Inputs]) -> list[Arguments]:
    """The same memory as tensors."""

    def tensor(view: View, elements: int) -> Tensor:
        raw = memory.view(view.address, elements * SWEPT[view.dtype])
        return torch.frombuffer(raw, dtype=TORCH[view.dtype])

    return [
        Arguments([tensor(view, each.elements) for view in each.models], each.base and tensor(each.base, each.elements))
        for each in inputs
    ]


def _checked(merged: Sequence[Tensor], method: str, buffers: Buffers, run: Run) -> float:
    """Asserts that a peer's result is the method's, by float64; gives its largest error."""
    inputs = buffers.inputs(*read_by(METHODS[method]))
    errors = []
    for out, each, (sweep,) in zip(merged, inputs, sweeps(native, method, inputs, run), strict=True):
        assert (out.dtype, out.numel()) == (TORCH[buffers.dtype], each.elements)
        head = test_ops.head(each)
        errors.append(accuracy.ulps(out[: head.elements], accuracy.exact(head, sweep), head, buffers.dtype))
    beyond = sum(int((error > _ULPS).sum()) for error in errors) / sum(error.numel() for error in errors)
    allowed = _UNDECIDED if METHODS[method].selects else 0
    assert beyond <= allowed, f"{beyond:.2%} of the elements are more than {_ULPS} ulp from float64"
    return accuracy.worst(errors)


def _assert_drops_as_told(peer: Peer, buffers: Buffers) -> None:
    """Of models that are one everywhere each subset is kept as often as independent drops have it, within 6 sigma.

    mergekit rescales by the share that it happened to keep, so that a sum of weights is only near that of its subset.
    """
    case, dtype = buffers.case, TORCH[buffers.dtype]
    ones, zeros = (torch.full((case.elements,), value, dtype=dtype) for value in (1.0, 0.0))
    peer.hold([[Arguments([ones.clone() for _ in WEIGHTS], zeros)] * case.tensors])
    peer.seconds(0)
    values = torch.cat(peer.merged()).to(torch.float64) * PARAMETERS["density"]  # the kept weights, summed
    count, density = values.numel(), peer.density(dtype)
    for kept in product((False, True), repeat=len(WEIGHTS)):
        mass = sum(weight for weight, keeps in zip(WEIGHTS, kept, strict=True) if keeps)
        share = density ** sum(kept) * (1 - density) ** (len(kept) - sum(kept))
        found = int(((values - mass).abs() < _SPACING / 2).sum())
        assert abs(found - count * share) <= 6 * (count * share * (1 - share)) ** 0.5, f"{kept} was kept {found} times"
