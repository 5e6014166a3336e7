"""The command line: parse, print, exit code; nothing else."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import FastmergeError, FastmergeWarning
from .flags import FLAGS, Fate, Takes

if TYPE_CHECKING:
    from .comparing import Comparison, Difference
    from .engine import Progress, Report
    from .health import Health, Layers
    from .lora import AdapterReport
    from .planner import Job, Plan
    from .recipe import Recipe
    from .verifying import Verification

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


def _numbers(_: click.Context, __: click.Parameter, text: str | None) -> list[float] | None:
    """The numbers of 0.5,1."""
    try:
        return None if text is None else [float(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not numbers; write for example 0.5,1") from None


def _parameters(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Values by parameter, of elect=count each."""
    if wrong := [text for text in given if "=" not in text]:
        raise click.BadParameter(f"{wrong[0]!r} has no value; write for example elect=count")
    return dict(text.split("=", 1) for text in given)


_BACKENDS = ("auto", "cpu", "cuda", "triton", "torch")


def _backend_of(context: click.Context, option: click.Parameter, name: str) -> str:
    """One of these, or else one that another package adds."""
    if name in _BACKENDS:
        return name
    from . import backends

    with _mistakes():
        known = backends.names()
    return str(click.Choice(known).convert(name, option, context))


_recipe = click.argument("recipe", type=click.Path(path_type=Path))
_seed = click.option("--seed", type=click.IntRange(0), help="Seed of the random drops; before the recipe's own.")
_shard_size = click.option(
    "--shard-size", type=_bytes, metavar="SIZE", default="5GB", show_default=True, help="Most bytes in one file."
)
_backend = click.option(
    "--backend",
    callback=_backend_of,
    metavar=f"[{'|'.join(_BACKENDS)}|NAME]",
    default="auto",
    show_default=True,
    help="What computes, NAME being one of another package; one asked for by name never falls back.",
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
_nonfinite = click.option(
    "--nonfinite",
    type=click.Choice(["error", "propagate"]),
    default="error",
    show_default=True,
    help="What NaN or Inf among the inputs does.",
)
_restart = click.option("--restart", is_flag=True, help="Begin anew where an unfinished merge is in OUT.")
_hash = click.option(
    "--hash",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="full notes the sha256 of every input in fastmerge.json.",
)
_threads = click.option("--threads", type=click.IntRange(1), help="Workers; by default one per processor.")


def _mergekit_bytes(text: str) -> int:
    """A number of bytes as mergekit writes it: 500M, 5B (billion), or 0 for no limit."""
    match = re.fullmatch(r"(\d+)([kmb]?)", text.strip().lower())
    if not match:
        raise click.BadParameter(f"{text!r} is not a size of mergekit's; write for example 500M or 5B (billion)")
    size = int(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2]]
    return size or sys.maxsize


def _mergekits(shown: bool) -> Callable[[Any], Any]:
    """The options of mergekit-yaml; where they are not `shown`, help tells of those only that have no other name."""
    takes: dict[Takes, dict[str, Any]] = {
        Takes.SWITCH: {},
        Takes.NOTHING: {"is_flag": True},
        Takes.NOTHING_OFTEN: {"count": True},
        Takes.TEXT: {"type": str},
        Takes.NUMBER: {"type": click.IntRange(0)},
        Takes.SIZE: {"type": _mergekit_bytes, "metavar": "SIZE"},
    }

    def add(command: Any) -> Any:
        for flag in reversed(FLAGS):
            names = [f"{name}/{flag.spelled(False)}" if flag.takes is Takes.SWITCH else name for name in flag.names]
            says = f"{flag.says[0].upper()}{flag.says[1:]}."
            if flag.fate is Fate.REFUSED:
                says = f"{flag.spelled(not flag.usually_on)} is refused: {flag.says}."
            how = {"default": None, "hidden": not (shown or flag.ours), "help": says, **takes[flag.takes]}
            command = click.option(*names, flag.key, **how)(command)
        return command

    return add


def _version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        with _mistakes():
            from .facts import lines

            click.echo("\n".join(lines()))
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and how it was built.",
)
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
@_restart
@_hash
@_nonfinite
@click.option("--health", is_flag=True, help="Show the figures of the deltas, by model and by layer.")
@_mergekits(shown=False)
def merge(recipe: Path, out: Path, **options: Any) -> None:
    """Merge the models of RECIPE (mergekit's YAML) into the new folder OUT.

    The options of mergekit-yaml are taken, too: fastmerge yaml --help lists them.
    """
    _merge(recipe, out, options)


@main.command("yaml")
@click.argument("config_file", type=click.Path(path_type=Path))
@click.argument("out_path", type=click.Path(path_type=Path))
@_restart
@_mergekits(shown=True)
def as_mergekit_yaml(config_file: Path, out_path: Path, **options: Any) -> None:
    """Merge by the arguments of mergekit-yaml, so that a script changes one word.

    As there, OUT_PATH may hold an earlier model; it is replaced once the new one is complete.
    """
    _merge(config_file, out_path, {**options, "overwrite": True})


@main.command()
@click.argument("config_file", type=click.Path(path_type=Path))
@click.option("--out-path", type=click.Path(path_type=Path), help="The folder of the document without a name.")
@click.option(
    "-I",
    "--intermediate-dir",
    type=click.Path(path_type=Path),
    help="Keep the models of documents with a name in folders of this one; by default only the result is kept.",
)
@click.option(
    "--lazy/--no-lazy",
    default=True,
    help="With --intermediate-dir, leave models as they are that are there already, whatever they were merged from; "
    "the default.",
)
@_seed
@_shard_size
@_restart
@_nonfinite
@_mergekits(shown=True)
def multi(config_file: Path, out_path: Path | None, intermediate_dir: Path | None, lazy: bool, **options: Any) -> None:
    """Merge several documents by the arguments of mergekit-multi.

    All of them, in the order in which they need one another; without --intermediate-dir those alone that the one
    without a name needs. An earlier model in the place of one is replaced once the new one is complete.
    """
    if out_path is None and intermediate_dir is None:
        raise click.UsageError("the models need a folder: --out-path for the result, or --intermediate-dir for all")
    _merge(config_file, out_path, {**options, "overwrite": True}, intermediate_dir, lazy)


@main.command()
@_recipe
@_seed
@_shard_size
@_varied
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def plan(recipe: Path, as_json: bool, **options: Any) -> None:
    """Tell what merging RECIPE would read, compute and write, from headers alone.

    Models on the hub are fetched first, as merge does.
    """
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
@_recipe
@click.option("--out", type=click.Path(path_type=Path), help="Where the merge is to go: whether its disk has room.")
@click.option("--json", "as_json", is_flag=True, help="Print errors and warnings as JSON.")
def check(recipe: Path, out: Path | None, as_json: bool) -> None:
    """Tell all that is wrong or odd about RECIPE and its models at once, before merging them.

    Headers, configs, tokenizers and model cards are read, no weights; models on the hub are fetched first, as merge
    does. Exits with 1 where there is an error, that is, where merge would refuse.
    """
    with _mistakes():
        from . import preflight

        found = preflight.check(recipe, out)
        if as_json:
            import json

            click.echo(json.dumps(found._asdict(), indent=2))
        else:
            for color, kind, messages in (("red", "error", found.errors), ("yellow", "warning", found.warnings)):
                for message in messages:
                    click.secho(f"{kind}: {_printable(message)}", fg=color)
            counts = f"errors {len(found.errors)}, warnings {len(found.warnings)}"
            click.echo(f"{_printable(str(recipe))}: {counts if any(found) else 'nothing is wrong or odd'}")
        if found.errors:
            sys.exit(1)


@main.command()
def info() -> None:
    """Tell which kernels run here, and why others are out."""
    with _mistakes():
        from rich.console import Console
        from rich.table import Column, Table
        from rich.text import Text

        from . import backends, methods

        console = Console()
        columns = ("backend", "works on", *backends.OPS, Column("why not", overflow="fold"))
        table = Table(*columns, title=f"fastmerge {__version__}", title_justify="left")
        for standing in backends.standings():
            why = Text(_printable(standing.reason))  # no markup: it may name fastmerge[torch]
            table.add_row(Text(_printable(standing.provider)), standing.device, *standing.ops, why)
        console.print(table)
        if added := methods.added():
            table = Table("method of another package", "package", Column("why not", overflow="fold"))
            for each in added:
                table.add_row(*(Text(_printable(text)) for text in (each.name, each.package, each.fault)))
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


@main.group()
def lora() -> None:
    """Fuse LoRA adapters into their base, combine them, or extract one from a fine-tune."""


_overwrite = click.option("--overwrite", is_flag=True, help="Replace an earlier output in OUT.")
_out = click.argument("out", type=click.Path(path_type=Path))


@lora.command()
@click.argument("base")
@click.argument("adapter")
@_out
@_backend
@_threads
@_shard_size
@_nonfinite
@_overwrite
def fuse(base: str, adapter: str, out: Path, **options: Any) -> None:
    """Write BASE with ADAPTER as one model into the new folder OUT, tile by tile.

    Both are folders, or ids on the hub.
    """
    with _mistakes():
        from .lora import fuse as run

        with _bar(False) as progress:
            report = run(base, adapter, out, progress=progress, **options)
        click.echo(_closing(report))


@lora.command()
@click.argument("adapters", nargs=-1, required=True)
@_out
@click.option(
    "--method",
    default="svd",
    show_default=True,
    help="cat, svd, ties, dare_ties, dare_linear, magnitude_prune, or what a recipe takes; with _svd after its name as "
    "PEFT means it; with peft_ before it on A and B apart.",
)
@click.option("--weights", callback=_numbers, metavar="NUMBER,...", help="One for each adapter; by default 1.")
@click.option("--density", callback=_numbers, metavar="NUMBER,...", help="Share of a delta that stays; one for all.")
@click.option("--rank", type=click.IntRange(1), help="What no module exceeds; by default the largest of the adapters'.")
@click.option("--base", help="Merge all of them into this model, which is then what is written.")
@click.option("--parameter", "parameters", multiple=True, callback=_parameters, metavar="NAME=VALUE")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the random drops.")
@_threads
@_overwrite
def combine(adapters: tuple[str, ...], out: Path, parameters: dict[str, str], **options: Any) -> None:
    """Make one adapter of several ADAPTERS, whatever their ranks, in the new folder OUT.

    A parameter is one that the method has in a recipe.
    """
    with _mistakes():
        from .lora import AdapterReport
        from .lora import combine as typed

        run: Callable[..., AdapterReport | Report] = typed
        density = options.pop("density")
        each = density[0] if density and len(density) == 1 else density
        report = run(adapters, out, density=each, **options, **parameters)
        click.echo(_adapted(report) if isinstance(report, AdapterReport) else _closing(report))


@lora.command()
@click.argument("base")
@click.argument("finetuned")
@_out
@click.option("--rank", type=click.IntRange(1), help="What no module exceeds.")
@click.option("--energy", type=float, help="In its place: the share of each delta's squared norm that is to be held.")
@click.option(
    "--whole/--no-whole",
    default=True,
    help="Whether what has no factors (norms, embeddings, biases) is kept whole where it differs; the default.",
)
@_overwrite
def extract(base: str, finetuned: str, out: Path, **options: Any) -> None:
    """Make an adapter of what FINETUNED changes in BASE, in the new folder OUT."""
    with _mistakes():
        from .lora import extract as run

        click.echo(_adapted(run(base, finetuned, out, **options)))


@main.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recompute", type=click.IntRange(0), default=0, metavar="N", help="Merge N random tensors again, too.")
@click.option("--sample-seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of which they are.")
@_threads
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def verify(out: Path, as_json: bool, **options: Any) -> None:
    """Hold the merged model in OUT against the fastmerge.json beside it: every tensor's bytes against their hash.

    With --recompute some are merged again from the recipe in it and its inputs, and compared to the bit; relative paths
    are looked for from here, then from the folder that OUT is in. Exits with 1 where something is wrong.
    """
    with _mistakes():
        from . import verifying

        found = []
        for folder in verifying.outputs(out):
            with _bar(as_json, "verifying") as progress:
                found.append(verifying.verify(folder, progress=progress, **options))
        if as_json:
            import json

            click.echo(json.dumps({"outputs": [each.to_json() for each in found]}, indent=2))
        else:
            for each in found:
                _show_verification(each)
        if any(each.wrong for each in found):
            sys.exit(1)


def _show_verification(found: Verification) -> None:
    out = _printable(str(found.out))
    for each in found.wrong[:_SHOWN]:
        place = f"{found.out}/{each.file}, bytes {each.begin:,} to {each.end:,}: " if each.end else ""
        click.secho(f"wrong: {_printable(place + each.reason)}", fg="red")
    if found.wrong:
        click.echo(f"{out}: {len(found.wrong):,} wrong, {found.tensors:,} tensors in fastmerge.json")
        return
    again = f"; {len(found.recomputed):,} merged again, to the bit" if found.recomputed else ""
    rate = found.bytes_read / found.seconds / 1e9
    read = f"read {_size(found.bytes_read)} in {found.seconds:.2f} s ({rate:.1f} GB/s)"
    click.echo(f"{out}: all {found.tensors:,} tensors are as they were written{again}; {read}")


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--base", help="What both are fine-tunes of: how far their task vectors agree.")
@click.option("--all", "every", is_flag=True, help="Show every tensor, not only the 20 that differ most.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 where the two differ, as git diff does.")
@_threads
@click.option("--json", "as_json", is_flag=True, help="Print the whole comparison as JSON.")
def diff(a: str, b: str, every: bool, exit_code: bool, as_json: bool, **options: Any) -> None:
    """Compare the models A and B tensor by tensor.

    Each is a folder, a file, an id on the hub, or one with an adapter, MODEL+ADAPTER. A difference is no error: the
    exit code is 0, unless --exit-code is given.
    """
    with _mistakes():
        from .comparing import diff as run

        with _bar(as_json, "comparing") as progress:
            found = run(a, b, progress=progress, **options)
        if as_json:
            import json

            click.echo(json.dumps(found.to_json(), indent=2, allow_nan=False))
        else:
            _show_comparison(found, every)
        if exit_code and not found.same:
            sys.exit(1)


def _show_comparison(found: Comparison, every: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

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
            table.add_row(Text(_printable(each.name)), dtypes, *row)
        console = Console()
        console.width = max(console.width, 120) if console.is_terminal else 160
        console.print(table)
    for kind, names in (("A", found.only_in_a), ("B", found.only_in_b)):
        if names:
            more = f" and {len(names) - _SHOWN:,} more" if most and len(names) > _SHOWN else ""
            click.echo(_printable(f"only in {kind}: {', '.join(names[:most])}{more}"))
    for one in found.mismatched:
        in_a, in_b = (f"{dtype} {list(shape)}" for dtype, shape in zip(one.dtypes, one.shapes, strict=True))
        click.echo(_printable(f"not compared: {one.name} is {in_a} in A, {in_b} in B"))
    (_, count), *others = _figures(found.total, found)
    said = "".join(f", {kind} {figure}" for kind, figure in others)
    tensors = f"{len(differing):,} of {len(found.tensors):,} tensors differ"
    apart = f"{tensors}, in {count} of {found.total.elements:,} elements"
    click.echo(f"{_printable(found.a)} and {_printable(found.b)}: {apart}{said}")


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


_SHOWN = 20  # tensors of a table or a list


def _adapted(report: AdapterReport) -> str:
    """What was made, and the module that is farthest from what it was to be."""
    ranks = sorted({each.rank for each in report.modules})
    worst = max(report.modules, key=lambda each: each.error)
    span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    whole = f"; {len(report.whole):,} tensors whole" if report.whole else ""
    return (
        f"{_printable(str(report.out))}: {len(report.modules):,} modules of rank {span}, relative error "
        f"{report.error:.2e} (most in {_printable(worst.module)}, {worst.error:.2e}){whole}; "
        f"wrote {_size(report.bytes_written)} in {report.seconds:.2f} s"
    )


def _merge(
    recipe: Path, out: Path | None, options: dict[str, Any], between: Path | None = None, lazy: bool = False
) -> None:
    """Merges by options in mergekit's words or ours, and tells of it; the models of documents with a name are kept
    where they have a folder, and there no model is merged again where that is `lazy`."""
    quiet = bool(options["quiet"])
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    signal.signal(signal.SIGTERM, _terminate)
    with _mistakes(quiet, ", and the same command goes on from there"):
        needless = _in_our_words(options)
        if not quiet:
            click.echo("".join(f"{line}\n" for line in needless), nl=False, err=True)
            from .preflight import before
            from .recipe import Recipe

            for fault in before(Recipe.load(recipe, every=between is not None)):
                warnings.warn(fault, FastmergeWarning, stacklevel=2)
        options.pop("quiet", None)
        figures = options.pop("health", False)
        from .engine import merge as run

        for one, place in _steps(recipe, out, between, lazy, quiet):
            with _bar(quiet) as progress:
                report = run(one, place, progress=progress, **options)
            if not quiet:
                click.echo(_closing(report))
                if figures:
                    _show_health(report.health)


def _steps(
    recipe: Path, out: Path | None, between: Path | None, lazy: bool, quiet: bool
) -> Iterator[tuple[Path | Recipe, Path]]:
    """The merges of a recipe that are still to be made: one, or where models between are kept, those of its documents,
    once it is sound as a whole."""
    from .multi import steps
    from .planner import plan as make_plan
    from .recipe import Recipe

    if between is None:
        assert out is not None, "one of them is there"
        yield recipe, out
        return
    whole = Recipe.load(recipe, every=True)
    make_plan(whole)
    if out is not None and whole.documents[-1].name is not None and not quiet:
        click.echo("--out-path: not needed, each document has a name to keep its model by", err=True)
    for step in steps(whole, between, out):
        if not (lazy and step.done()):
            yield step
        elif not quiet:
            click.echo(f"{_printable(str(step.out))}: there already; --no-lazy merges it again")


def _in_our_words(options: dict[str, Any]) -> list[str]:
    """Puts what mergekit's options say into fastmerge's; a line for each that does nothing here."""
    source = click.get_current_context().get_parameter_source
    given = {
        key: (f"--{key.replace('_', '-')}", value)
        for key, value in options.items()
        if source(key) is click.core.ParameterSource.COMMANDLINE
    }
    lines = []
    for flag in FLAGS:
        value = options.pop(flag.key)
        if value is None:
            continue
        name = flag.spelled(value)
        if flag.values and value not in flag.values:
            raise click.UsageError(f"{name} {value}: {flag.says}")
        if flag.fate is Fate.REFUSED and flag.speaks(value):
            raise click.UsageError(f"{name}: {flag.says}")
        if flag.fate is Fate.ACCEPTED and flag.speaks(value):
            lines.append(f"{name}: {flag.says}")
        if flag.sets.isupper():
            os.environ[flag.sets] = value
        elif flag.sets:
            value = flag.values.get(value, value)
            if flag.sets == "backend" and value != "auto":
                value = _backend_on(value)
            other, before = given.setdefault(flag.sets, (name, value))
            if before != value:
                raise click.UsageError(f"{other} and {name} contradict one another; leave one out")
            options[flag.sets] = value
    return lines


def _backend_on(device: str) -> str:
    """The backend that `auto` takes on a kind of device; where none can run, the first, which says why."""
    from . import backends

    order = backends.ORDER[device]["merge"]
    return next((name for name in order if not backends.why_not(name)), order[0])


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends a merge as Ctrl-C does."""


def _terminate(*_: Any) -> None:
    raise _TerminatedError


@contextmanager
def _mistakes(quiet: bool = False, further: str = "") -> Iterator[None]:
    """Exit codes: 2 and one sentence for the user's mistakes, 130 for Ctrl-C and 143 for SIGTERM, after which there is
    something further to tell; warnings are told as they come, once."""
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
        except KeyboardInterrupt as ended:
            click.echo(f"stopped; nothing that looks complete was written{further}", err=True)
            sys.exit(128 + (signal.SIGTERM if isinstance(ended, _TerminatedError) else signal.SIGINT))


def _printable(text: str) -> str:
    """Names come from files: what would steer a terminal, or begin a line that is not of a list, is an escape."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"\n(?!  )", r"\\n", shown)


@contextmanager
def _bar(quiet: bool, doing: str = "merging") -> Iterator[Progress | None]:
    """A bar with GB/s and time left, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (doing, BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _closing(report: Report) -> str:
    outputs = f"{len(report.outputs)} outputs, " if report.outputs != (report.out,) else ""
    peak = f", {_size(report.peak_anonymous_bytes)} of memory" if report.peak_anonymous_bytes else ""
    before = f", {report.resumed:,} of them before" if report.resumed else ""
    odd = len(report.health.warnings)
    health = f"\nhealth: figures beyond their thresholds: {odd}; all figures are in fastmerge.json" if odd else ""
    return (
        f"{_printable(str(report.out))}: {outputs}{' + '.join(report.methods)} of {report.tensors:,} tensors{before}, "
        f"read {_size(report.bytes_read)}, wrote {_size(report.bytes_written)} in {report.seconds:.2f} s "
        f"({report.gigabytes_per_second:.1f} GB/s; "
        f"{_who(report)}, {report.threads} threads{peak})"
    ) + (f"; {_printable(report.choice)}{health}" if report.gpu_considered else health)


def _show_health(found: Health) -> None:
    """A column for each model: its figures, then the norm of its deltas in each layer."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from .health import DARE_RANGE

    names = [Text(_printable(each.name)) for each in found.models]
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
            table.add_row(Text(_printable(f"{stack}.{layer}" if stack else f"layer {layer}")), *row)
    Console().print(table)
    skipped = f"; {found.skipped:,} are copied, gathered or computed" if found.skipped else ""
    share = found.sampled / max(1, found.elements)
    part = f"{share:.2g} of the elements, {found.looked:,} of {found.tensors:,} tensors"
    click.echo(f"shares and sizes are from {part}{skipped}; fastmerge diff has exact ones")


def _of_layer(held: Layers | None, norm: float | None, layer: int) -> str:
    return "-" if held is None or norm is None else f"{norm:.3g}{' stands out' if layer in held.outliers else ''}"


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
            click.echo(f"  output {_printable(variant.name)}: {_size(made.stages[-1].bytes_written)}")
    click.echo(f"reads {_size(made.bytes_read)}, writes {_size(made.bytes_written)}")


def _kind(job: Job) -> tuple[str, ...]:
    """A job as the plan shows it: those that differ in a number of their name only are one row."""
    reads = "copied" if job.copy else "not fused" if job.direct else f"{job.passes} times" if job.passes > 1 else "once"
    reads += ", gathered" if job.gather else ""
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
