"""What commands show: a bar while they run, then sentences and tables."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from . import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from rich.text import Text

    from .comparing import Comparison, Difference
    from .engine import Progress, Report
    from .health import Health, Layers
    from .lora import AdapterReport
    from .planner import Job, Plan
    from .preflight import Findings
    from .verifying import Verification

_SHOWN = 20  # tensors of a table or a list


@contextmanager
def bar(quiet: bool, doing: str = "merging") -> Iterator[Progress | None]:
    """A bar with GB/s and time left, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (doing, BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def fault(kind: str, message: object, *, err: bool = False) -> None:
    """A line in the colour of its kind: error, warning or wrong."""
    click.secho(f"{kind}: {printable(message)}", fg="yellow" if kind == "warning" else "red", err=err)


def printable(text: object) -> str:
    """Names come from files: what would steer a terminal, or begin a line that is not of a list, is an escape."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text))
    return re.sub(r"\n(?!  )", r"\\n", shown)


def as_json(found: dict[str, Any]) -> None:
    import json

    click.echo(json.dumps(found, indent=2))


# --- merges ---


def closing(report: Report) -> str:
    """What was merged, by whom and how fast."""
    outputs = f"{len(report.outputs)} outputs, " if report.outputs != (report.out,) else ""
    peak = f", {_size(report.peak_anonymous_bytes)} of memory" if report.peak_anonymous_bytes else ""
    before = f", {report.resumed:,} of them before" if report.resumed else ""
    odd = len(report.health.warnings)
    health = f"\nhealth: figures beyond their thresholds: {odd}; all figures are in fastmerge.json" if odd else ""
    return (
        f"{printable(report.out)}: {outputs}{' + '.join(report.methods)} of {report.tensors:,} tensors{before}, "
        f"read {_size(report.bytes_read)}, wrote {_size(report.bytes_written)} in {report.seconds:.2f} s "
        f"({report.gigabytes_per_second:.1f} GB/s; "
        f"{_who(report)}, {report.threads} threads{peak})"
    ) + (f"; {printable(report.choice)}{health}" if report.gpu_considered else health)


def _who(report: Report) -> str:
    """Who computed; where there were several, with the ops of each."""
    if len(report.worked) < 2:
        return "".join(report.worked) or "copied"
    return " + ".join(f"{name} ({', '.join(ops)})" for name, ops in report.worked.items())


def adapted(report: AdapterReport) -> str:
    """What was made, and the module that is farthest from what it was to be."""
    ranks = sorted({each.rank for each in report.modules})
    worst = max(report.modules, key=lambda each: each.error)
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    whole = f"; {len(report.whole):,} tensors whole" if report.whole else ""
    return (
        f"{printable(report.out)}: {len(report.modules):,} modules of rank {span}, relative error "
        f"{report.error:.2e} (most in {printable(worst.module)}, {worst.error:.2e}){whole}; "
        f"wrote {_size(report.bytes_written)} in {report.seconds:.2f} s"
    )


def health(found: Health) -> None:
    """A column for each model: its figures, then the norm of its deltas in each layer."""
    from rich.console import Console
    from rich.table import Column, Table

    from .health import DARE_RANGE

    names = [_text(each.name) for each in found.models]
    table = Table(Column("", no_wrap=True), *[Column(name, justify="right", overflow="fold") for name in names])
    counts = [sum(each.nonfinite.values()) for each in found.models]
    table.add_row("NaN or Inf", *[f"{count:,}" for count in counts])
    table.add_row("denormal", *[f"{each.denormal:.2%}" for each in found.models])
    deltas = [each.deltas for each in found.models]
    for kind, name in (("zero", "zero"), ("denormal", "denormal"), (f"larger than {DARE_RANGE:g}", "beyond")):
        table.add_row(f"deltas {kind}", *[f"{getattr(each, name):.2%}" if each else "-" for each in deltas])
    for kind, name in (("mean size", "mean"), ("rms", "rms"), ("norm", "norm"), ("norm over base's", "relative")):
        values = [getattr(each, name, None) for each in deltas]
        table.add_row(kind, *["-" if value is None else f"{value:.3g}" for value in values])
    table.add_section()
    for stack in dict.fromkeys(each.stack for each in found.layers):
        held = {each.model: each for each in found.layers if each.stack == stack}
        norms = {name: dict(zip(each.numbers, each.norms, strict=True)) for name, each in held.items()}
        for layer in sorted(set().union(*norms.values())):
            row = [_of_layer(held.get(each.name), norms.get(each.name, {}).get(layer), layer) for each in found.models]
            table.add_row(_text(f"{stack}.{layer}" if stack else f"layer {layer}"), *row)
    Console().print(table)
    skipped = f"; {found.skipped:,} are copied, gathered or computed" if found.skipped else ""
    share = found.sampled / max(1, found.elements)
    part = f"{share:.2g} of the elements, {found.looked:,} of {found.tensors:,} tensors"
    click.echo(f"shares and sizes are from {part}{skipped}; fastmerge diff has exact ones")


def _of_layer(held: Layers | None, norm: float | None, layer: int) -> str:
    return "-" if held is None or norm is None else f"{norm:.3g}{' stands out' if layer in held.outliers else ''}"


# --- before a merge ---


def plan(made: Plan) -> None:
    """For each stage what it moves, its models, and a row for each kind of job."""
    from rich.console import Console
    from rich.table import Column, Table

    for stage in made.stages:
        title = _text(stage.name or "result")
        table = Table("", "tensors", "read", "write", "files", title=title, title_justify="left")
        table.add_row(
            stage.document.method.name,
            f"{len(stage.jobs):,}",
            _size(stage.bytes_read),
            _size(stage.bytes_written),
            f"{len(stage.layout.shards):,}",
        )
        Console().print(table)
        for number, model in enumerate(stage.models):
            click.echo(f"  model {number}: {printable(model.name)}")
        table = Table(Column("tensors", overflow="fold"), "", "shape", "dtype", "inputs", "reads")
        for (name, *rest), times in Counter(map(_kind, stage.jobs)).items():
            table.add_row(_text(name), f"x {times}" if times > 1 else "", *rest)
        Console().print(table)
    for variant in made.variants:
        if variant.name:
            click.echo(f"  output {printable(variant.name)}: {_size(made.stages[-1].bytes_written)}")
    click.echo(f"reads {_size(made.bytes_read)}, writes {_size(made.bytes_written)}")


def _kind(job: Job) -> tuple[str, ...]:
    """A job as the plan shows it: those that differ in a number of their name only are one row."""
    reads = "copied" if job.copy else "not fused" if job.direct else f"{job.passes} times" if job.passes > 1 else "once"
    reads += ", gathered" if job.gather else ""
    shape = " x ".join(map(str, job.shape))
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", job.name), shape, job.dtype, str(len(job.sources)), reads


def findings(recipe: Path, found: Findings) -> None:
    """A line for each, then how many there are."""
    for kind, messages in (("error", found.errors), ("warning", found.warnings)):
        for message in messages:
            fault(kind, message)
    counts = f"errors {len(found.errors)}, warnings {len(found.warnings)}"
    click.echo(f"{printable(recipe)}: {counts if any(found) else 'nothing is wrong or odd'}")


def kernels() -> None:
    """Who runs what on this machine: providers, methods of other packages, GPUs, instruction sets."""
    from rich.console import Console
    from rich.table import Column, Table

    from . import backends, methods
    from .checkpoint import hashing

    console = Console()
    columns = ("backend", "works on", *backends.OPS, Column("why not", overflow="fold"))
    table = Table(*columns, title=f"fastmerge {__version__}", title_justify="left")
    for standing in backends.standings():
        table.add_row(_text(standing.provider), standing.device, *standing.ops, _text(standing.reason))
    console.print(table)
    if added := methods.added():
        table = Table("method of another package", "package", Column("why not", overflow="fold"))
        for each in added:
            table.add_row(*map(_text, (each.name, each.package, each.fault)))
        console.print(table)
    if gpus := backends.gpus():
        table = Table("GPU", "name", "free memory")
        for number, gpu in enumerate(gpus):
            table.add_row(str(number), _text(gpu.name), _size(gpu.free_bytes()))
        console.print(table)
    table = Table("instruction set", "runs", "why not")
    for isa, reason, chosen in backends.instruction_sets():
        table.add_row(isa, "this one" if chosen else "-" if reason else "can", _text(reason))
    console.print(table)
    hashed = (
        "while it is written" if hashing.function() else "read back, as this xxhash shows compiled code no function"
    )
    console.print(f"what cpu writes is hashed: {hashed}", highlight=False)
    console.print(f"threads {backends.threads()}; FASTMERGE_ISA forces an instruction set", highlight=False)


# --- after a merge ---


def verification(found: Verification) -> None:
    """The first that are wrong and how many there are, or that all is right."""
    out = printable(found.out)
    for each in found.wrong[:_SHOWN]:
        place = f"{found.out}/{each.file}, bytes {each.begin:,} to {each.end:,}: " if each.end else ""
        fault("wrong", place + each.reason)
    if found.wrong:
        held = f"{found.tensors:,} tensors and {found.files} files in fastmerge.json"
        click.echo(f"{out}: {len(found.wrong):,} wrong, {held}")
        return
    again = f"; {len(found.recomputed):,} merged again, to the bit" if found.recomputed else ""
    rate = found.bytes_read / found.seconds / 1e9
    read = f"read {_size(found.bytes_read)} in {found.seconds:.2f} s ({rate:.1f} GB/s)"
    beside = f" and {found.files} files beside them" if found.files else ""
    click.echo(f"{out}: all {found.tensors:,} tensors{beside} are as they were written{again}; {read}")


def comparison(found: Comparison, every: bool) -> None:
    """A row for each tensor, those first that differ most, or for the first of these; then all together."""
    from rich.console import Console
    from rich.table import Column, Table

    most = None if every else _SHOWN
    differing = {each.name for each in found.worst}
    shown = [*found.worst, *(each for each in found.tensors if every and each.name not in differing)][:most]
    if shown:
        kinds = [kind for kind, _ in _figures(shown[0], found)]
        figures = [Column(kind, justify="right", no_wrap=True) for kind in ("dtype", *kinds)]
        table = Table(Column("tensor", overflow="fold"), *figures)
        for each in shown:
            dtypes = ", ".join(dict.fromkeys(each.dtypes))
            row = [figure for _, figure in _figures(each, found)]
            table.add_row(_text(each.name), dtypes, *row)
        console = Console()
        console.width = max(console.width, 120) if console.is_terminal else 160
        console.print(table)
    for kind, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            more = f" and {len(names) - _SHOWN:,} more" if most and len(names) > _SHOWN else ""
            click.echo(printable(f"only in {kind}: {', '.join(names[:most])}{more}"))
    for one in found.mismatched:
        in_a, in_b = (f"{dtype} {list(shape)}" for dtype, shape in zip(one.dtypes, one.shapes, strict=True))
        click.echo(printable(f"not compared: {one.name} is {in_a} in A, {in_b} in B"))
    (_, count), *others = _figures(found.total, found)
    said = "".join(f", {kind} {figure}" for kind, figure in others)
    tensors = f"{len(differing):,} of {len(found.tensors):,} tensors differ"
    apart = f"{tensors}, in {count} of {found.total.elements:,} elements"
    click.echo(f"{printable(found.a)} and {printable(found.b)}: {apart}{said}")


def _figures(each: Difference, found: Comparison) -> Iterator[tuple[str, str]]:
    """The numbers of a difference by their names, as they are shown."""
    yield "differ", f"{each.differing:,}"
    for kind, size in (("max", each.max), ("rms", each.rms)):
        yield kind, "-" if size is None else f"{size:.3g}"
    ratios = {"cosine": each.cosine}
    if found.base is not None:
        ratios |= {"same sign": each.sign_agreement, "cosine of deltas": each.delta_cosine}
    for kind, ratio in ratios.items():
        yield kind, "-" if ratio is None else f"{ratio:.6f}"
    if found.total.nonfinite:
        yield "NaN or Inf", f"{each.nonfinite:,}"


# --- cells ---


def _text(text: str) -> Text:
    """No markup, whatever is in it: a reason may name fastmerge[torch]."""
    from rich.text import Text

    return Text(printable(text))


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
