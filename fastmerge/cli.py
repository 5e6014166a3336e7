"""The command line: parse, print, exit code; nothing else."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import FastmergeError, FastmergeWarning

if TYPE_CHECKING:
    from .engine import Progress, Report
    from .planner import Job, Plan

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def _bytes(text: str) -> int:
    """A number of bytes in decimal units: 5GB, 500MB, 1000000."""
    number = text.strip().lower().removesuffix("b")
    unit = number[-1:] if number[-1:] in "kmgt" else ""
    try:
        size = round(float(number.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise click.BadParameter(f"{text!r} is not a size; write for example 5GB or 500MB")
    return size


def _vary(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, list[str]]:
    """Values by parameter, of lambda=0.2,0.4 each."""
    values: dict[str, list[str]] = {}
    for text in given:
        name, equals, those = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{text!r} has no values; write for example lambda=0.2,0.4")
        if name in values:
            raise click.BadParameter(f"{name} is given twice; write all of its values after one --vary")
        values[name] = [value.strip() for value in those.split(",")]
    return values


_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_seed = click.option("--seed", type=click.IntRange(0), help="Seed of the random drops; before the recipe's own.")
_shard_size = click.option(
    "--shard-size", type=_bytes, metavar="SIZE", default="5GB", show_default=True, help="Most bytes in one file."
)
_backend = click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "cuda", "triton", "torch"]),
    default="auto",
    show_default=True,
    help="What computes; one asked for by name never falls back.",
)
_gpu_memory = click.option(
    "--gpu-memory",
    type=_bytes,
    metavar="SIZE",
    help="Most bytes for each GPU, half on it, half pinned in the host; by default 8GB, or what it has free.",
)
_varied = click.option(
    "--vary",
    multiple=True,
    callback=_vary,
    metavar="NAME=VALUE,...",
    help="Write OUT/NAME=VALUE for each value of a parameter, from one read; twice: for each combination.",
)
_threads = click.option("--threads", type=click.IntRange(1), help="Workers; by default one per processor.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastmerge")
def main() -> None:
    """Merge fine-tuned language-model checkpoints at the speed of memory."""


@main.command()
@_recipe
@click.argument("out", type=click.Path(path_type=Path))
@_backend
@_threads
@_seed
@_shard_size
@_gpu_memory
@_varied
@click.option("--overwrite", is_flag=True, help="Replace an earlier output in OUT.")
@click.option(
    "--nonfinite",
    type=click.Choice(["error", "propagate"]),
    default="error",
    show_default=True,
    help="What NaN or Inf among the inputs does.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def merge(recipe: Path, out: Path, quiet: bool, **options: Any) -> None:
    """Merge the models of RECIPE (mergekit's YAML) into the new folder OUT."""
    with _mistakes(quiet):
        from .engine import merge as run

        with _bar(quiet) as progress:
            report = run(recipe, out, progress=progress, **options)
        if not quiet:
            click.echo(_closing(report))


@main.command()
@_recipe
@_seed
@_shard_size
@_varied
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def plan(recipe: Path, as_json: bool, **options: Any) -> None:
    """Tell what merging RECIPE would read, compute and write, from headers alone."""
    with _mistakes():
        from .planner import plan as make_plan
        from .recipe import Recipe

        made = make_plan(Recipe.load(recipe), **options)
        if as_json:
            import json

            click.echo(json.dumps(made.to_json(), indent=2))
        else:
            _show_plan(made)


@main.command()
def info() -> None:
    """Tell which kernels run here, and why others are out."""
    with _mistakes():
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        from . import backends

        console = Console()
        columns = ("backend", "works on", *backends.OPS, Column("why not", overflow="fold"))
        table = Table(*columns, title=f"fastmerge {__version__}", title_justify="left")
        for standing in backends.standings():
            why = Text(_printable(standing.reason))  # no markup: it may name fastmerge[torch]
            table.add_row(standing.provider, standing.device, *standing.ops, why)
        console.print(table)
        if gpus := backends.gpus():
            table = Table("GPU", "name", "free memory")
            for number, gpu in enumerate(gpus):
                table.add_row(str(number), Text(_printable(gpu.name)), _size(gpu.free_bytes()))
            console.print(table)
        table = Table("instruction set", "runs", "why not")
        for isa, reason, chosen in backends.instruction_sets():
            table.add_row(isa, "this one" if chosen else "-" if reason else "can", Text(reason))
        console.print(table)
        console.print(f"threads {backends.threads()}; FASTMERGE_ISA forces an instruction set", highlight=False)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@_backend
@_threads
def demo(folder: Path | None, backend: str, threads: int | None) -> None:
    """Make a small base with three fine-tunes and merge them by every method, in FOLDER or a temporary one."""
    with _mistakes():
        from .demo import run

        run(folder, backend=backend, threads=threads)


@contextmanager
def _mistakes(quiet: bool = False) -> Iterator[None]:
    """Exit codes: 2 and one sentence for the user's mistakes, 130 for Ctrl-C; warnings are told as they come, once."""
    told = set()

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        if not quiet and str(message) not in told:
            told.add(str(message))
            click.secho(f"warning: {_printable(str(message))}", fg="yellow", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FastmergeWarning)
        warnings.showwarning = tell
        try:
            yield
        except FastmergeError as error:
            click.secho(f"error: {_printable(str(error))}", fg="red", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; nothing that looks complete was written", err=True)
            sys.exit(130)


def _printable(text: str) -> str:
    """Names come from files: what would steer a terminal is shown as an escape."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


@contextmanager
def _bar(quiet: bool) -> Iterator[Progress | None]:
    """A bar with GB/s and time left, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("merging", BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _closing(report: Report) -> str:
    outputs = f"{len(report.outputs)} outputs, " if report.outputs != (report.out,) else ""
    peak = f", {_size(report.peak_anonymous_bytes)} of memory" if report.peak_anonymous_bytes else ""
    return (
        f"{_printable(str(report.out))}: {outputs}{' + '.join(report.methods)} of {report.tensors:,} tensors, "
        f"read {_size(report.bytes_read)}, wrote {_size(report.bytes_written)} in {report.seconds:.2f} s "
        f"({report.gigabytes_per_second:.1f} GB/s; "
        f"{_who(report)}, {report.threads} threads{peak})"
    ) + (f"; {_printable(report.choice)}" if report.gpu_considered else "")


def _who(report: Report) -> str:
    """Who computed; where there were several, with the ops of each."""
    if len(report.worked) < 2:
        return "".join(report.worked) or "copied"
    return " + ".join(f"{name} ({', '.join(ops)})" for name, ops in report.worked.items())


def _show_plan(made: Plan) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    for stage in made.stages:
        title = Text(_printable(stage.name or "result"))  # no markup
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
            click.echo(f"  model {number}: {_printable(model.name)}")
        table = Table(Column("tensors", overflow="fold"), "", "shape", "dtype", "inputs", "reads")
        for (name, *rest), times in Counter(map(_kind, stage.jobs)).items():
            table.add_row(Text(_printable(name)), f"x {times}" if times > 1 else "", *rest)
        Console().print(table)
    for variant in made.variants:
        if variant.name:
            click.echo(f"  output {variant.name}: {_size(made.stages[-1].bytes_written)}")
    click.echo(f"reads {_size(made.bytes_read)}, writes {_size(made.bytes_written)}")


def _kind(job: Job) -> tuple[str, ...]:
    """A job as the plan shows it: those that differ in a number of their name only are one row."""
    reads = "copied" if job.copy else f"{job.passes} times" if job.passes > 1 else "once"
    shape = " x ".join(map(str, job.shape))
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", job.name), shape, job.dtype, str(len(job.sources)), reads


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


if __name__ == "__main__":
    main()
