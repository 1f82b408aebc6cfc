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
from enum import StrEnum
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

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
SOURCE = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
DEMO = "demo"


class MetricName(StrEnum):
    """What ``patch`` can measure."""

    LOGIT_DIFF = "logit-diff"
    LOGIT = "logit"
    LOG_PROB = "log-prob"
    PROB = "prob"


class Dtype(StrEnum):
    """The dtypes that a model can be loaded in."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class PlainErrors(TyperGroup):
    """A group of commands that prints this package's errors instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MambaTraceError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from error
        except BrokenPipeError:
            raise  # whoever reads the output has closed it, which typer ends quietly
        except OSError as error:  # a full disk, a folder that went away
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
    site: Annotated[str, typer.Option(help="What is patched, or several: h,conv; see `sites`.")] = "h",
    metric: Annotated[MetricName, typer.Option(help="What is measured.")] = MetricName.LOGIT_DIFF,
    window: Annotated[int, typer.Option(min=1, help="Layers patched together.")] = 1,
    attribution: Annotated[
        bool, typer.Option("--attribution", help="Estimate to first order, too, and correlate.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Save: .html (a page, of several too), .png, .json, .safetensors.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="A folder to keep cells in and go on from.")] = None,
    kernels: Annotated[str, typer.Option(help="Which scan runs: auto or a backend.")] = "auto",
    dtype: Annotated[Dtype | None, typer.Option(help="Of the model; its checkpoint's by default.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs: cpu, cuda, cuda:1, auto.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The most cells in one forward; as memory permits by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Patch a site from one prompt's run into another's, at every layer and position.

    Prints a metric of both runs, the logit difference ANSWER - WRONG unless another is named, and for each
    cell how far patching it alone moves that from the prompt's (0) to the source's (1).
    """
    from .patching import command as command

    options = {"window": window, "batch_size": batch_size, "keep": keep, "progress": not quiet}
    named = [name for name in site.replace(",", " ").split() if name]
    check_text(**{"--prompt": prompt, "--source": source, "--answer": answer, "--wrong": wrong})
    asked = command.Asked(prompt, source, named, attribution, out, options)
    loaded = load_model(model, kernels, quiet, dtype, device)
    warn_of_spaces(loaded, answer, wrong)
    grids = asked.grids(loaded, command.METRICS[metric.value](loaded, answer, wrong))
    with command.in_the_first_process() as first:
        if not first:
            return
        if as_json:
            typer.echo(command.as_json(grids, asked, model))
        else:
            command.print_grids(grids, asked, model, console())
        if (written := asked.save(grids)) is not None:
            typer.echo(f"wrote {written}", err=as_json)


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

    check_text(**{"--prompt": prompt})
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


def load_model(
    name: str, kernels: str, quiet: bool, dtype: str | None = None, device: str | None = None
) -> MambaTrace:
    """The shipped model for ``"demo"``, a checkpoint for any other name."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from .conversion.load_options import PLACED_BY_ACCELERATE, check_device
    from .model import MambaTrace
    from .patching.processes import own_device

    if quiet:
        disable_progress_bar()
    options: dict[str, Any] = {"kernels": kernels}
    if dtype is not None:
        options["dtype"] = getattr(torch, dtype)
    if device:
        check_device("--device ", device, PLACED_BY_ACCELERATE)
    device = device or own_device()
    if device is not None:
        options["device_map"] = device
    return MambaTrace.demo(**options) if name == DEMO else MambaTrace(name, **options)


def check_text(**options: str) -> None:
    """Refuse bytes that are no text: the shell passes them on as characters that nothing can encode."""
    from .errors import PromptError

    for option, text in options.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"{option} is no text in UTF-8: {text!r:.80}") from error


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
