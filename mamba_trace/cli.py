"""``mamba-trace``: the main job from a shell.

One function per command. A body reads its options, calls the library and prints; whatever takes thought
lives in the library. torch and transformers take seconds to import, so every command imports what it uses
when it runs: ``--help`` needs neither.

Results go to stdout; progress bars, warnings and errors go to stderr. An error of this package is one message
without a traceback, and the exit code is 2.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ._version import __version__
from .errors import MambaTraceError

if TYPE_CHECKING:
    from rich.console import Console

    from .model import MambaTrace
    from .patching import PatchGrid

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
SOURCE = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
DEMO = "demo"


class PlainErrors(TyperGroup):
    """A group of commands that prints this package's errors instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MambaTraceError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=PlainErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Trace and edit every intermediate value of Mamba language models.",
)


def main() -> None:
    """Run the command line."""
    app(prog_name="mamba-trace")


def print_version(wanted: bool) -> None:
    """Print the version and stop, where ``--version`` is given."""
    if wanted:
        typer.echo(f"mamba-trace {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """What can be given before a command."""


@app.command()
def patch(
    model: Annotated[str, typer.Option(help="A hub id or a folder; 'demo' is the model that ships.")] = DEMO,
    prompt: Annotated[str, typer.Option(help="The run that is patched.")] = PROMPT,
    source: Annotated[str, typer.Option(help="The run that values are taken from.")] = SOURCE,
    answer: Annotated[str, typer.Option(help="The token prompt calls for; mind its space.")] = " Emma",
    wrong: Annotated[str, typer.Option(help="The token source calls for.")] = " Shelby",
    site: Annotated[str, typer.Option(help="What is patched; see `mamba-trace sites`.")] = "h",
    out: Annotated[Path | None, typer.Option(help="Save the grid: .html, .png or .json.")] = None,
    kernels: Annotated[str, typer.Option(help="Which scan runs: auto or a backend.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Positions patched in one forward.")] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Patch a site from one prompt's run into another's, at every layer and position.

    Prints the logit difference ANSWER - WRONG of both runs, and for each cell how far patching it alone
    moves that difference from the prompt's (0) to the source's (1).
    """
    from .patching import find_site, logit_diff, patch_grid
    from .plotting import check_writable

    find_site(site)
    if out is not None:
        check_writable(out)
    loaded = load_model(model, kernels, quiet)
    warn_of_spaces(loaded, answer, wrong)
    metric = logit_diff(loaded, answer, wrong)
    grid = patch_grid(loaded, prompt, source, site, metric, batch_size=batch_size, progress=not quiet)
    report(grid, model, prompt, source)
    if out is not None:
        typer.echo(f"wrote {grid.save(out)}")


@app.command()
def sites(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List every place that can be read or edited, in execution order."""
    from .sites import rows

    table = list(rows())
    if as_json:
        keys = ("path", "shape", "hook", "meaning")
        typer.echo(json.dumps([{key: getattr(row, key) for key in keys} for row in table], indent=1))
        return
    lines = [("path", "shape", "hook name", "meaning")]
    lines += [(row.path, row.shape, row.hook or "(none)", row.meaning) for row in table]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    typer.echo(f"\n{axes_legend()}")


@app.command()
def info(
    model: Annotated[str, typer.Option(help="A hub id or a folder; 'demo' is the model that ships.")] = DEMO,
    prompt: Annotated[str, typer.Option(help="What is run.")] = PROMPT,
    kernels: Annotated[str, typer.Option(help="Which scan runs: auto or a backend.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say which kernels this machine has, how to install the others, and what a forward of a model runs."""
    import torch

    from .scan import availability

    loaded = load_model(model, kernels, quiet=True)
    with torch.no_grad(), loaded.trace(prompt):
        loaded.lm_head.output.save()
    found, run = availability(), loaded.last_run
    if as_json:
        layers = [asdict(layer) for layer in run.layers]
        typer.echo(json.dumps({"kernels": [asdict(one) for one in found], "layers": layers}, indent=1))
        return
    typer.echo(f"{versions()}\n")
    for what in ("scan", "convolution"):
        typer.echo(what)
        for one in found:
            reason = getattr(one, what)
            typer.echo(f"  {one.backend:<10} {'yes' if reason is None else f'no: {reason}'}")
    typer.echo(f"\n{model}: {loaded.kernels} kernels, {run}")


@app.command()
def port(
    what: Annotated[str, typer.Argument(help="A hook name, or a script FILE.py.")],
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Say what a hook name, or a script of MambaLens or TransformerLens, is here. Never runs the script."""
    from .porting import is_file, port_file, port_name

    if is_file(what):
        report = port_file(what)
        typer.echo(json.dumps(report.as_dict(), indent=1) if as_json else str(report))
        return
    path = port_name(what)
    typer.echo(json.dumps({"found": what, "becomes": path}) if as_json else path)


# -- what the commands print -------------------------------------------------------------------------------


def report(grid: PatchGrid, model: str, prompt: str, source: str) -> None:
    """Print both runs' metrics, and the normalised grid."""
    from .plotting import terminal_table

    screen = console()
    for name, value in (
        ("model", model),
        ("prompt", prompt),
        ("source", source),
        ("site", f"{grid.site}, taken from source and put into prompt"),
        ("metric", grid.metric),
        ("uncorrupted", f"{grid.prompt_metric:+.4f} (prompt)"),
        ("corrupted", f"{grid.source_metric:+.4f} (source)"),
    ):
        screen.print(f"{name:<12} {value}", markup=False, highlight=False, soft_wrap=True)
    screen.print("\nnormalised metric after patching: 0 as prompt, 1 as source", highlight=False)
    screen.print(terminal_table(grid.heatmap(), screen.width), soft_wrap=True)


def versions() -> str:
    """``"mamba_trace 0.1.0, torch 2.13.0, ..."``."""
    packages = ("torch", "nnsight", "transformers", "mamba-ssm", "causal-conv1d", "triton", "numba")
    found = [f"mamba_trace {__version__}"]
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def axes_legend() -> str:
    """``"B batch, L positions, ..."``."""
    from .sites import AXES

    return ", ".join(f"{axis} {meaning}" for axis, meaning in AXES.items())


def console() -> Console:
    """Where results are printed. A terminal that cannot show a character gets a question mark."""
    from rich.console import Console

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console()


# -- what the commands need --------------------------------------------------------------------------------


def load_model(name: str, kernels: str, quiet: bool) -> MambaTrace:
    """The shipped model for ``"demo"``, a checkpoint for any other name."""
    from transformers.utils.logging import disable_progress_bar

    from .model import MambaTrace

    if quiet:
        disable_progress_bar()
    return MambaTrace.demo(kernels=kernels) if name == DEMO else MambaTrace(name, kernels=kernels)


def warn_of_spaces(model: MambaTrace, *answers: str) -> None:
    """Warn of an answer without its leading space, where the spaced form is a token as well."""
    from .errors import PromptError

    for answer in answers:
        try:
            if answer.startswith(" ") or model.to_single_token(answer) == model.to_single_token(f" {answer}"):
                continue
        except PromptError:
            continue
        typer.echo(
            f"warning: {answer!r} and {' ' + answer!r} are different tokens; "
            f"a word inside a sentence carries its space",
            err=True,
        )
