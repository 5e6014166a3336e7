"""The torch operators: the bits of the reference, what torch asks of an operator, and CUDA where there is a card."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import emulated
import numpy as np
import pytest
import torch
from conftest import TORCH, bits, compiled_core
from conftest import merge as merge_bytes
from test_ops import SELECTION, STAGES, Case, cases, check_cut, sweeps_of, tensors_of, values_of
from torch import Tensor

from fastmerge import reference, torch_ops
from fastmerge.errors import BackendError, MismatchError
from fastmerge.sweep import CERTAIN, EVERY, Cut, Elect, Keep, Mean, Part, Sweep, TieVote

OPS = torch.ops.fastmerge
LINEAR = Sweep((Part(0.3), Part(0.7), Part(-0.1)))
TIES = replace(LINEAR, keep=Keep.ABOVE, elect=Elect.WEIGHTED, mean=Mean.WEIGHTS, lambda_=0.9)
DARE = Sweep(
    tuple(Part(0.4, rescale=2.0, cut=CERTAIN // 2, key=2**64 - 1 - i) for i in range(3)), Keep.BERNOULLI, Elect.PLAIN
)


def three(
    *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """Three models near a base."""
    random = torch.Generator().manual_seed(seed)
    base, *deltas = (torch.randn(shape, generator=random) for _ in range(4))
    return [(base + 0.1 * delta).to(dtype).to(device) for delta in deltas], base.to(dtype).to(device)


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether the bits are the same; that dtypes, shapes and devices are is asserted."""
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.device) == (other.dtype, other.shape, other.device)
    return all(bytes_of(one) == bytes_of(other) for one, other in zip(found, expected, strict=True))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()


# --- the numbers ---


def torch_tensors(case: Case) -> tuple[list[Tensor], Tensor | None]:
    """The inputs of a case of test_ops."""
    rng = np.random.default_rng(case.seed)
    tensors = [torch.from_numpy(values_of(case.values, case.elements, rng)).to(TORCH[dtype]) for dtype in case.dtypes]
    return (tensors[:-1], tensors[-1]) if case.has_base else (tensors, None)


@pytest.mark.parametrize("case", list(cases())[: len(STAGES)], ids=str)
def test_merge_has_the_bits_of_the_reference(case: Case) -> None:
    """Every combination of stages, K settings in one read, into each dtype."""
    models, base = torch_tensors(case)
    for dtype in sorted(set(case.outputs)):
        expected, _ = merge_bytes(reference, tensors_of(case), sweeps_of(case), [dtype] * len(case.outputs))
        found = torch_ops.merge(models, base, sweeps_of(case), TORCH[dtype])
        for output, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(bits(np.frombuffer(bytes_of(output), np.uint8), dtype), bits(wanted, dtype))


def test_merge_is_by_default_into_what_torch_promotes_to() -> None:
    (half, other, wide), base = three(5)
    one = Sweep((Part(),))
    for models, origin, dtype in (
        ([half], None, torch.bfloat16),
        ([half], base, torch.bfloat16),
        ([half], base.half(), torch.float32),
        ([other.half()], wide.double(), torch.float64),
    ):
        assert torch_ops.merge(models, origin, [one])[0].dtype == dtype


def test_float64_is_swept_in_float64() -> None:
    models, base = three(500, dtype=torch.float64)
    cuts = torch_ops.threshold(models, base, [100] * 3)
    (merged,) = torch_ops.merge(models, base, [TIES], cuts=cuts)
    deltas = [model - base for model in models]
    kept = [delta.where(delta.abs() >= delta.abs().topk(100).values[-1], 0.0) for delta in deltas]
    assert cuts[0].dtype == merged.dtype == torch.float64
    assert [int((delta.abs() > cut).sum()) for delta, cut in zip(deltas, cuts[0], strict=True)] == [99] * 3
    weighted = torch.stack([delta * part.weight for delta, part in zip(kept, TIES.parts, strict=True)])
    agrees = weighted.sign() * weighted.sum(0).sign() > 0
    weights = torch.tensor([[part.weight] for part in TIES.parts], dtype=torch.float64)
    mass = (weights * agrees).sum(0)
    expected = base + 0.9 * (weighted * agrees).sum(0) / mass.where(mass != 0, 1.0)
    torch.testing.assert_close(merged, expected, rtol=1e-14, atol=1e-14)


def test_no_sweeps_give_no_tensors() -> None:
    assert torch_ops.merge(*three(5), []) == []


@pytest.mark.parametrize("data", SELECTION)
def test_threshold_is_the_k_th_of_torch(data: str) -> None:
    values = torch.from_numpy(SELECTION[data].copy())
    count = len(values)
    ranks = sorted({0, 1, count // 5, count // 2, count - 1, count})
    magnitudes, ties_ends = torch_ops.threshold([values] * len(ranks), None, ranks)
    assert (magnitudes.dtype, ties_ends.dtype) == (torch.float32, torch.int64)
    ordered = values.abs().nan_to_num(0.0, torch.inf).sort(descending=True).values
    for k, magnitude, ties_end in zip(ranks, magnitudes.tolist(), ties_ends.tolist(), strict=True):
        check_cut(Cut(magnitude, ties_end), SELECTION[data], k)
        if 0 < k < count:
            assert magnitude == ordered[k - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_cuts_as_tensors_are_those_of_the_parts(dtype: torch.dtype) -> None:
    """Many magnitudes are equal, so that `ties_end` matters."""
    models, base = [torch.randint(-4, 5, (40, 70)).to(dtype) for _ in range(3)], torch.ones(40, 70, dtype=dtype)
    magnitudes, ties_ends = torch_ops.threshold(models, base, [0, 1000, 2800])
    assert ties_ends[1] < EVERY
    parts = tuple(
        replace(part, magnitude=magnitude, ties_end=ties_end)
        for part, magnitude, ties_end in zip(TIES.parts, magnitudes.tolist(), ties_ends.tolist(), strict=True)
    )
    settings = [TIES, replace(TIES, lambda_=0.1, tie_vote=TieVote.ZERO)]
    expected = torch_ops.merge(models, base, [replace(sweep, parts=parts) for sweep in settings])
    assert same(torch_ops.merge(models, base, settings, cuts=(magnitudes, ties_ends)), expected)
    assert not same(torch_ops.merge(models, base, settings), expected)


@pytest.mark.parametrize("with_base", [False, True], ids=["weights", "deltas"])
def test_gram_and_norms_are_those_of_float64(with_base: bool) -> None:
    models, base = three(300, 20)
    deltas = torch.stack([(model.float() - base.float() if with_base else model.float()).flatten() for model in models])
    deltas = deltas.double()
    found = torch_ops.gram(models, base if with_base else None)
    torch.testing.assert_close(found, deltas @ deltas.T, rtol=1e-12, atol=1e-9)
    sweep = Sweep(tuple(Part(magnitude=m) for m in (0.05, 0.1, 9.0)), Keep.ABOVE)
    norms = torch_ops.norms(models, base if with_base else None, sweep)
    cuts = torch.tensor([np.float32(part.magnitude) for part in sweep.parts], dtype=torch.float64)
    kept = deltas.where(deltas.abs() >= cuts[:, None], 0.0)
    for column, order in enumerate((1, 2, torch.inf)):
        expected = torch.stack([torch.linalg.vector_norm(each, order, dim=1) for each in (deltas, kept)], dim=1)
        torch.testing.assert_close(norms[:, :, column], expected, rtol=1e-12, atol=0)


# --- tensors of any shape ---


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (2, 3, 4, 5)], ids=str)
def test_any_shape_goes(shape: tuple[int, ...]) -> None:
    models, base = three(*shape)
    flat, flat_base = [model.flatten() for model in models], base.flatten()
    found = torch_ops.merge(models, base, [TIES, DARE])
    assert [merged.shape for merged in found] == [base.shape] * 2
    assert same([merged.flatten() for merged in found], torch_ops.merge(flat, flat_base, [TIES, DARE]))
    ranks = [0, base.numel() // 2, base.numel()]
    assert same(torch_ops.threshold(models, base, ranks), torch_ops.threshold(flat, flat_base, ranks))
    assert same([torch_ops.gram(models)], [torch_ops.gram(flat)])
    assert same([torch_ops.norms(models, base, DARE)], [torch_ops.norms(flat, flat_base, DARE)])


@pytest.mark.parametrize(
    "view",
    [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x[:1].expand(30, 40), lambda x: x[3:, 5:], torch._neg_view],
    ids=["transposed", "strided", "expanded", "corner", "negated"],
)
def test_a_view_is_its_contiguous_copy(view: Callable[[Tensor], Tensor]) -> None:
    models, base = three(30, 40)
    views, copies = [view(model) for model in models], [view(model).clone().contiguous() for model in models]
    shown, copied = view(base), view(base).clone().contiguous()
    found = torch_ops.merge(views, shown, [TIES, DARE])
    assert all(merged.is_contiguous() for merged in found)
    assert same(found, torch_ops.merge(copies, copied, [TIES, DARE]))
    ranks = [shown.numel() // 3] * 3
    assert same(torch_ops.threshold(views, shown, ranks), torch_ops.threshold(copies, copied, ranks))


def test_an_op_runs_on_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    native = compiled_core()

    def gram(tensors: Any, run: Any) -> Any:
        seen.append(run.threads)
        return native.gram(tensors, run)

    monkeypatch.setattr(torch_ops, "_provider", lambda *_: SimpleNamespace(name="cpu", gram=gram))
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch_ops.gram(three(5)[0])
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 3]


# --- errors ---

MODELS, BASE = three(4, 6)
CUTS = torch_ops.threshold(MODELS, BASE, [3, 3, 3])
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no-models": (lambda: torch_ops.gram([]), "there are no models"),
    "parts": (lambda: torch_ops.merge(MODELS[:2], BASE, [LINEAR]), r"sweeps\[0\] has 3 parts where there are 2 models"),
    "parts-of-norms": (lambda: torch_ops.norms(MODELS[:2], BASE, LINEAR), "has 3 parts where there are 2 models"),
    "ranks": (lambda: torch_ops.threshold(MODELS, BASE, [1, 2]), "ranks has 2 numbers where there are 3 models"),
    "shape": (
        lambda: torch_ops.gram([*MODELS, BASE.t()]),
        r"models\[3\] has the shape \[6, 4\] and models\[0\] \[4, 6\]",
    ),
    "shape-of-base": (lambda: torch_ops.merge(MODELS, BASE.flatten(), [LINEAR]), r"base has the shape \[24\]"),
    "device": (lambda: torch_ops.gram(MODELS, BASE.to("meta")), r"base lies on meta and models\[0\] on cpu"),
    "integers": (lambda: torch_ops.gram([BASE.int()]), r"models\[0\] holds torch.int32"),
    "integers-out": (lambda: torch_ops.merge(MODELS, BASE, [LINEAR], torch.int8), "nothing is merged into torch.int8"),
    "one-cut": (lambda: OPS.merge(MODELS, BASE, *torch_ops._flat([TIES]), None, CUTS[0]), "ties_ends is missing"),
    "cuts-of-others": (
        lambda: torch_ops.merge(MODELS, BASE, [TIES], cuts=(CUTS[0][:2], CUTS[1])),
        r"magnitudes is \[2\], torch.float32, on cpu where \[3\], torch.float32, on cpu belongs",
    ),
    "narrow-cuts": (
        lambda: torch_ops.merge(MODELS, BASE.double(), [TIES], cuts=CUTS),
        r"magnitudes is \[3\], torch.float32, on cpu where \[3\], torch.float64",
    ),
    "settings": (lambda: OPS.merge(MODELS, BASE, [0] * 4, [1.0], [0]), "4 stages, 1 numbers and 1 whole numbers"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_one_sentence(wrong: str) -> None:
    call, message = WRONG[wrong]
    with pytest.raises(MismatchError, match=message):
        call()


def test_a_gpu_takes_no_float64() -> None:
    with pytest.raises(BackendError, match="no backend merges F64"):
        torch_ops._provider("merge", "cuda", frozenset({torch.float64}))


# --- what torch asks of an operator ---


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    mixed = [MODELS[0].float(), MODELS[1].half(), MODELS[2]]
    asking = [model.clone().requires_grad_() for model in MODELS]
    return {
        "merge": (OPS.merge, (MODELS, BASE, *torch_ops._flat([TIES, DARE]))),
        "merge-by-cuts": (OPS.merge, (MODELS, BASE, *torch_ops._flat([TIES]), torch.float16, *CUTS)),
        "merge-mixed-without-base": (OPS.merge, (mixed, None, *torch_ops._flat([LINEAR]))),
        "merge-views": (OPS.merge, ([model.t() for model in MODELS], None, *torch_ops._flat([LINEAR]))),
        "merge-nothing": (OPS.merge, (MODELS, BASE, [], [], [])),
        "merge-what-asks-for-gradients": (OPS.merge, (asking, BASE, *torch_ops._flat([TIES]))),
        "gram": (OPS.gram, (mixed, BASE)),
        "gram-without-base": (OPS.gram, (asking,)),
        "threshold": (OPS.threshold, (asking, BASE, [0, 5, 24])),
        "threshold-float64": (OPS.threshold, ([BASE.double()], None, [5])),
        "norms": (OPS.norms, (asking, BASE, *torch_ops._flat([DARE]))),
    }


@pytest.mark.parametrize("call", calls())
def test_opcheck_passes(call: str) -> None:
    op, arguments = calls()[call]
    torch.library.opcheck(op.default, arguments)


def whole_ties(models: list[Tensor], base: Tensor) -> list[Tensor]:
    """Every op once; sums that a compiler could contract are left out."""
    cuts = torch_ops.threshold(models, base, [int(0.2 * base.numel())] * 3)
    merged = torch_ops.merge(models, base, [TIES, DARE], torch.float32, cuts=cuts)
    return [*merged, *cuts, torch_ops.gram(models, base), torch_ops.norms(models, None, DARE)]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_compiled_function_gives_the_same_bits(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(whole_ties, fullgraph=True, backend=backend, dynamic=dynamic)
    for shape in ((40, 30), (7, 50)):
        assert same(compiled(*three(*shape)), whole_ties(*three(*shape)))


def test_a_new_shape_is_not_compiled_again() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(whole_ties, fullgraph=True, backend=counter, dynamic=True)
    for shape in ((40, 30), (7, 50), (300, 2)):
        compiled(*three(*shape))
    assert counter.frame_count == 1


def test_a_setting_of_a_compiled_function_may_change() -> None:
    torch._dynamo.reset()

    def linear(models: list[Tensor], weight: float, key: int) -> list[Tensor]:
        parts = tuple(Part(weight, cut=CERTAIN // 3, key=key) for _ in models)
        return torch_ops.merge(models, None, [Sweep(parts, Keep.BERNOULLI)])

    compiled = torch.compile(linear, fullgraph=True, backend="eager")
    models, _ = three(40, 30)
    for weight, key in ((0.1, 5), (0.3, 5), (1 / 3, 2**63 + 1)):
        assert same(compiled(models, weight, key), linear(models, weight, key))


def test_meta_tensors_have_shapes_and_dtypes() -> None:
    models, base = [model.to("meta") for model in MODELS], BASE.to("meta")
    assert [each.shape for each in torch_ops.merge(models, base, [TIES, DARE])] == [(4, 6), (4, 6)]
    assert [(each.shape, each.dtype) for each in torch_ops.threshold(models, base, [1, 2, 3])] == [
        ((3,), torch.float32),
        ((3,), torch.int64),
    ]
    assert torch_ops.gram(models).shape == (3, 3)
    assert torch_ops.norms(models, base, DARE).shape == (3, 2, 3)


def test_no_gradient_goes_through() -> None:
    asking = [model.float().requires_grad_() for model in MODELS]
    (merged,) = torch_ops.merge(asking, None, [LINEAR])
    assert not merged.requires_grad
    assert same([merged], torch_ops.merge([model.detach() for model in asking], None, [LINEAR]))
    with pytest.raises(RuntimeError, match="does not require grad"):
        merged.sum().backward()


@pytest.mark.parametrize("op", ["merge", "gram", "threshold", "norms"])
def test_vmap_is_refused(op: str) -> None:
    one = {
        "merge": lambda model: torch_ops.merge([model], None, [Sweep((Part(),))])[0],
        "gram": lambda model: torch_ops.gram([model]),
        "threshold": lambda model: torch_ops.threshold([model], None, [1]),
        "norms": lambda model: torch_ops.norms([model], None, Sweep((Part(),))),
    }[op]
    with pytest.raises(RuntimeError, match=f"Batching rule not implemented for fastmerge::{op}"):
        torch.vmap(one)(torch.ones(3, 4))


# --- the provider cuda ---


class Done:
    """The emulated provider, which has done what it is told when it returns: torch does not wait for its streams."""

    def __init__(self, cuda: ModuleType) -> None:
        self._cuda = cuda

    def __getattr__(self, name: str) -> Any:
        def told(*arguments: Any) -> Any:
            answer = getattr(self._cuda, name)(*arguments)
            self._cuda.device(0).synchronize(0)
            return answer

        return "cuda" if name == "name" else told


def test_what_the_provider_cuda_is_told_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tables, the cuts that stay on the device, its workspace; the emulated device works in memory of the host."""
    models, base = [torch.randint(-4, 5, (40, 70)).to(torch.bfloat16) for _ in range(3)], torch.ones(40, 70)
    settings, ranks = [TIES, replace(DARE, lambda_=0.3)], [0, 1000, 2800]
    cuts = torch_ops.threshold(models, base, ranks)
    expected = [
        torch_ops.merge(models, base, settings, torch.float16),
        torch_ops.merge(models, base, settings, cuts=cuts),
    ]
    monkeypatch.setattr(torch_ops, "_provider", lambda *_: Done(emulated.provider()))
    assert same(torch_ops.threshold(models, base, ranks), cuts)
    assert same(torch_ops.merge(models, base, settings, torch.float16), expected[0])
    assert same(torch_ops.merge(models, base, settings, cuts=cuts), expected[1])


# --- on a card ---

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def queued() -> None:
    provider = torch_ops._provider("merge", "cuda", frozenset({torch.bfloat16}))
    if provider.name != "cuda":
        pytest.skip(f"a graph captures only what the provider cuda runs, and here it is {provider.name}")


@on_a_card
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (31,), (1000, 1001)], ids=str)
def test_a_gpu_has_the_bits_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    models, base = three(*shape, dtype=dtype)
    there, base_there = [model.cuda() for model in models], base.cuda()
    ranks = [0, base.numel() // 5, base.numel()]
    cuts, cuts_there = torch_ops.threshold(models, base, ranks), torch_ops.threshold(there, base_there, ranks)
    assert same([cut.cpu() for cut in cuts_there], cuts)
    for chosen in (None, (cuts, cuts_there)):
        expected = torch_ops.merge(models, base, [TIES, DARE, LINEAR], cuts=chosen and chosen[0])
        found = torch_ops.merge(there, base_there, [TIES, DARE, LINEAR], cuts=chosen and chosen[1])
        assert all(merged.is_cuda for merged in found)
        assert same([merged.cpu() for merged in found], expected)
    for here, away in (
        (torch_ops.gram(models, base), torch_ops.gram(there, base_there)),
        (torch_ops.norms(models, base, DARE), torch_ops.norms(there, base_there, DARE)),
    ):
        assert away.is_cuda
        torch.testing.assert_close(away.cpu(), here, rtol=1e-12, atol=1e-12)


@on_a_card
def test_a_graph_captures_a_whole_ties() -> None:
    queued()
    models, base = three(1000, 1001, device="cuda")
    ranks = [base.numel() // 5] * 3

    def ties() -> list[Tensor]:
        return torch_ops.merge(models, base, [TIES, DARE], cuts=torch_ops.threshold(models, base, ranks))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ties()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = ties()
    for seed in (1, 2):
        others, other_base = three(1000, 1001, device="cuda", seed=seed)
        for to, values in zip([*models, base], [*others, other_base], strict=True):
            to.copy_(values)
        graph.replay()
        assert same(merged, ties())


@on_a_card
@pytest.mark.parametrize("op", ["gram", "norms"])
def test_what_waits_is_refused_while_a_graph_is_captured(op: str) -> None:
    models, base = three(100, device="cuda")
    call = {"gram": lambda: torch_ops.gram(models), "norms": lambda: torch_ops.norms(models, base, DARE)}[op]
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(BackendError, match=f"fastmerge::{op} waits"):
            call()
        base.add_(1)  # a graph of nothing is a warning


@on_a_card
@pytest.mark.parametrize("op", ["merge", "gram", "threshold"])
def test_an_op_comes_after_what_its_stream_was_told_before(op: str) -> None:
    models, base = three(1000, 1001, device="cuda")
    call = {
        "merge": lambda: torch_ops.merge(models, base, [TIES]),
        "gram": lambda: [torch_ops.gram(models, base)],
        "threshold": lambda: torch_ops.threshold(models, base, [5000] * 3),
    }[op]
    doubled = [2 * model for model in models]
    call()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        for model, values in zip(models, doubled, strict=True):
            model.copy_(values)
        found = call()
    side.synchronize()
    assert same(found, call())


@on_a_card
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_function_compiled_for_a_card_gives_the_same_bits(mode: str) -> None:
    queued()
    torch._dynamo.reset()
    compiled = torch.compile(whole_ties, fullgraph=True, mode=mode)
    models, base = three(300, 301, device="cuda")
    for _ in range(3):  # the first calls of a graph warm up and capture
        assert same(compiled(models, base), whole_ties(models, base))


# --- importing ---

IMPORTS = """
import os, sys
import fastmerge
assert "torch" not in sys.modules
import torch
assert not hasattr(torch.ops.fastmerge, "merge")
before = set(sys.modules)
from fastmerge import torch_ops
assert hasattr(torch.ops.fastmerge, "merge")
assert not {"triton", "fastmerge._cuda", "fastmerge.cuda"} & (set(sys.modules) - before)
assert not torch.cuda.is_initialized() and not torch.cuda._is_in_bad_fork()
models = [torch.arange(100_000.0), torch.ones(100_000)]
expected = torch_ops.gram(models)
child = os.fork()
if not child:
    os._exit(0 if torch.equal(torch_ops.gram(models), expected) and not torch.cuda._is_in_bad_fork() else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_importing_registers_and_touches_no_device_so_that_a_fork_can_go_on() -> None:
    ended = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert ended.stdout == "done\n", ended.stderr
