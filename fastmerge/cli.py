"""The command line: what the commands take, what they call, how they end."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import showing
from .errors import FastmergeError, FastmergeWarning
from .flags import FLAGS, Fate, Takes

if TYPE_CHECKING:
    from .engine import Report
    from .lora import AdapterReport
    from .recipe import Recipe

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

    return str(click.Choice(backends.names()).convert(name, option, context))


_PATH = click.Path(path_type=Path)

_recipe = click.argument("recipe", type=_PATH)
_config_file = click.argument("config_file", type=_PATH)
_out = click.argument("out", type=_PATH)
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
    help="Most bytes for each GPU, about half on it, half pinned in the host; by default 8GB, or what it has free.",
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
_overwrite = click.option("--overwrite", is_flag=True, help="Replace an earlier output in OUT.")
_restart = click.option("--restart", is_flag=True, help="Begin anew where an unfinished merge is in OUT.")
_hash = click.option(
    "--hash",
    type=click.Choice(["fast", "full"]),
    default="fast",
    show_default=True,
    help="full notes the sha256 of every input in fastmerge.json.",
)
_threads = click.option("--threads", type=click.IntRange(1), help="Workers; by default one per processor.")
_json = partial(click.option, "--json", "as_json", is_flag=True)


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
        with _mistakes():  # options of the group itself are read before its `invoke`
            from .facts import lines

            click.echo("\n".join(lines()))
        context.exit()


class _Commands(click.Group):
    """Commands that all end as `_mistakes` says."""

    def invoke(self, ctx: click.Context) -> Any:
        with _mistakes():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
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
@_out
@_backend
@_threads
@_seed
@_shard_size
@_gpu_memory
@_varied
@_overwrite
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
@_config_file
@click.argument("out_path", type=_PATH)
@_restart
@_mergekits(shown=True)
def as_mergekit_yaml(config_file: Path, out_path: Path, **options: Any) -> None:
    """Merge by the arguments of mergekit-yaml, so that a script changes one word.

    As there, OUT_PATH may hold an earlier model; it is replaced once the new one is complete.
    """
    _merge(config_file, out_path, {**options, "overwrite": True})


@main.command()
@_config_file
@click.option("--out-path", type=_PATH, help="The folder of the document without a name.")
@click.option(
    "-I",
    "--intermediate-dir",
    type=_PATH,
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
@_json(help="Print the whole plan as JSON.")
def plan(recipe: Path, as_json: bool, **options: Any) -> None:
    """Tell what merging RECIPE would read, compute and write, from headers alone.

    Models on the hub are fetched first, as merge does.
    """
    from .planner import plan as make_plan
    from .recipe import Recipe

    made = make_plan(Recipe.load(recipe), **options)
    if as_json:
        showing.as_json(made.to_json())
    else:
        showing.plan(made)


@main.command()
@_recipe
@click.option("--out", type=_PATH, help="Where the merge is to go: whether its disk has room.")
@_json(help="Print errors and warnings as JSON.")
def check(recipe: Path, out: Path | None, as_json: bool) -> None:
    """Tell all that is wrong or odd about RECIPE and its models at once, before merging them.

    Headers, configs, tokenizers and model cards are read, no weights; models on the hub are fetched first, as merge
    does. Exits with 1 where there is an error, that is, where merge would refuse.
    """
    from . import preflight

    found = preflight.check(recipe, out)
    if as_json:
        showing.as_json(found._asdict())
    else:
        showing.findings(recipe, found)
    if found.errors:
        sys.exit(1)


@main.command()
def info() -> None:
    """Tell which kernels run here, and why others are out."""
    showing.kernels()


@main.command()
@click.argument("folder", type=_PATH, required=False)
@_backend
@_threads
def demo(folder: Path | None, backend: str, threads: int | None) -> None:
    """Make a small base with three fine-tunes and merge them by every method, in FOLDER or a temporary one."""
    from .demo import run

    run(folder, backend=backend, threads=threads)


@main.group()
def lora() -> None:
    """Fuse LoRA adapters into their base, combine them, or extract one from a fine-tune."""


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
    from .lora import fuse as run

    with showing.bar(False) as progress:
        report = run(base, adapter, out, progress=progress, **options)
    click.echo(showing.closing(report))


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
    from .lora import AdapterReport
    from .lora import combine as typed

    run: Callable[..., AdapterReport | Report] = typed
    if own := parameters.keys() & {"adapters", "out", *options}:
        raise click.UsageError(f"{min(own)} is no parameter of a method: give it as its own option or argument")
    density = options.pop("density")
    each = density[0] if density and len(density) == 1 else density
    report = run(adapters, out, density=each, **options, **parameters)
    click.echo(showing.adapted(report) if isinstance(report, AdapterReport) else showing.closing(report))


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
    from .lora import extract as run

    click.echo(showing.adapted(run(base, finetuned, out, **options)))


@main.command()
@_out
@click.option("--recompute", type=click.IntRange(0), default=0, metavar="N", help="Merge N random tensors again, too.")
@click.option("--sample-seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of which they are.")
@_threads
@_json(help="Print what was found as JSON.")
def verify(out: Path, as_json: bool, **options: Any) -> None:
    """Hold the merged model in OUT against the fastmerge.json beside it: the hash of every tensor's bytes, and of every
    other file but README.md, which is there to be edited.

    With --recompute some are merged again from the recipe in it and its inputs, and compared to the bit; relative paths
    are looked for from here, then from the folder that OUT is in. Exits with 1 where something is wrong.
    """
    from . import verifying

    found = []
    for folder in verifying.outputs(out):
        with showing.bar(as_json, "verifying") as progress:
            found.append(verifying.verify(folder, progress=progress, **options))
    if as_json:
        showing.as_json({"outputs": [each.to_json() for each in found]})
    else:
        for each in found:
            showing.verification(each)
    if any(each.wrong for each in found):
        sys.exit(1)


@main.command()
@click.argument("a")
@click.argument("b")
@click.option("--base", help="What both are fine-tunes of: how far their task vectors agree.")
@click.option("--all", "every", is_flag=True, help="Show every tensor, not only the 20 that differ most.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 where the two differ, as git diff does.")
@_threads
@_json(help="Print the whole comparison as JSON.")
def diff(a: str, b: str, every: bool, exit_code: bool, as_json: bool, **options: Any) -> None:
    """Compare the models A and B tensor by tensor.

    Each is a folder, a file, an id on the hub, or one with an adapter, MODEL+ADAPTER. A difference is no error: the
    exit code is 0, unless --exit-code is given.
    """
    from .comparing import diff as run

    with showing.bar(as_json, "comparing") as progress:
        found = run(a, b, progress=progress, **options)
    if as_json:
        showing.as_json(found.to_json())
    else:
        showing.comparison(found, every)
    if exit_code and not found.same:
        sys.exit(1)


def _merge(
    recipe: Path, out: Path | None, options: dict[str, Any], between: Path | None = None, lazy: bool = False
) -> None:
    """Merges by options in mergekit's words or ours, and tells of it; the models of documents with a name are kept
    where they have a folder, and there no model is merged again where that is `lazy`."""
    quiet = bool(options["quiet"])
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    signal.signal(signal.SIGTERM, _terminate)
    _import_numpy()
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
        from .planner import uncollected

        for one, place in _steps(recipe, out, between, lazy, quiet):
            with uncollected(), showing.bar(quiet) as progress:
                report = run(one, place, progress=progress, **options)
            if not quiet:
                click.echo(showing.closing(report))
                if figures:
                    showing.health(report.health)


def _import_numpy() -> None:
    """Imports it without the threads of its linear algebra, which a merge does not use: they take 50 ms to begin."""
    wish = "OPENBLAS_NUM_THREADS"
    if "numpy" in sys.modules or wish in os.environ:
        return
    os.environ[wish] = "1"
    try:
        import_module("numpy")
    finally:
        del os.environ[wish]


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
            click.echo(f"{showing.printable(step.out)}: there already; --no-lazy merges it again")


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
            showing.fault("warning", message, err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", FastmergeWarning)
        warnings.showwarning = tell
        try:
            yield
        except FastmergeError as error:
            showing.fault("error", error, err=True)
            sys.exit(2)
        except KeyboardInterrupt as ended:
            whole = f"{', '.join(map(showing.printable, ended.args))}: complete; else " if ended.args else ""
            click.echo(f"stopped; {whole}nothing that looks complete was written{further}", err=True)
            sys.exit(128 + (signal.SIGTERM if isinstance(ended, _TerminatedError) else signal.SIGINT))


if __name__ == "__main__":
    main()
