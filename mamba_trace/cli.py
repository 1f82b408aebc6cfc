"""``mamba-trace``: the main job from a shell.

There is one function for each command. It reads its options, calls the library and prints; everything that
takes thought is in the library. torch and transformers take seconds to import, so a command imports what it
uses when it runs, and ``--help`` needs neither.

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
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from ._version import __version__
from .errors import FileError, MambaTraceError, PromptError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .model import MambaTrace
    from .sites import Family, Layout, Row

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
SOURCE = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
DEMO = "demo"
#: The models that ship: the argument of `MambaTrace.demo` for each name.
DEMOS = {DEMO: "mamba", "demo-mamba2": "mamba2", "demo-hybrid": "hybrid"}
#: The column of the table of sites for all hybrids together.
HYBRIDS = "hybrids"
#: What ``patch`` can measure, and the dtypes that it can load a model in.
MetricName = Literal["logit-diff", "logit", "log-prob", "prob"]
Dtype = Literal["float32", "float64", "float16", "bfloat16"]
#: Options of several commands.
ModelName = Annotated[str, typer.Option(help="A hub id or a folder; 'demo', 'demo-mamba2' and 'demo-hybrid' ship.")]
Kernels = Annotated[str, typer.Option(help="The backend of the scan: auto or its name.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class PlainErrors(TyperGroup):
    """A group of commands that prints this package's and the system's errors instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the program that reads the output has closed it; typer ends quietly
        except (MambaTraceError, OSError) as error:  # OSError: a full disk, a folder that went away
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
    """Print the version and stop, if the user gave ``--version``."""
    if wanted:
        typer.echo(f"mamba-trace {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command()
def patch(
    model: ModelName = DEMO,
    prompt: Annotated[str, typer.Option(help="The prompt of the run that is patched.")] = PROMPT,
    source: Annotated[str, typer.Option(help="The prompt of the run that values are taken from.")] = SOURCE,
    answer: Annotated[str, typer.Option(help="The token that prompt calls for; mind its space.")] = " Emma",
    wrong: Annotated[str, typer.Option(help="The token that source calls for.")] = " Shelby",
    site: Annotated[str, typer.Option(help="The site to patch, or several: h,conv; see `sites`.")] = "h",
    metric: Annotated[MetricName, typer.Option(help="What is measured.")] = "logit-diff",
    window: Annotated[int, typer.Option(min=1, help="How many layers are patched together.")] = 1,
    attribution: Annotated[
        bool, typer.Option("--attribution", help="Estimate to first order, too, and correlate.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Save as .html (one page, also of several), .png, .json, .safetensors."),
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="A folder to keep cells in and go on from.")] = None,
    kernels: Kernels = "auto",
    dtype: Annotated[Dtype | None, typer.Option(help="The model's dtype; by default its checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option(help="Where it runs: cpu, cuda, cuda:1, auto.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The most cells in one forward; by default as memory permits.")
    ] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress bars.")] = False,
) -> None:
    """Patch a site from one prompt's run into another's, at every layer and position.

    Prints a metric of both runs, the logit difference ANSWER - WRONG unless another is named, and for each
    cell how far patching only this cell moves the metric from the prompt's (0) to the source's (1).
    """
    from rich.console import Console

    from .patching.command import METRICS, PatchCommand
    from .patching.processes import in_the_first_process

    options = {"window": window, "batch_size": batch_size, "keep": keep, "progress": not quiet}
    named = site.replace(",", " ").split()
    check_text(**{"--prompt": prompt, "--source": source, "--answer": answer, "--wrong": wrong})
    command = PatchCommand(model, prompt, source, named, attribution, out, options)
    loaded = load_model(model, kernels, quiet, dtype, device)
    warn_of_spaces(loaded, answer, wrong)
    grids = command.grids(loaded, METRICS[metric](loaded, answer, wrong))
    with in_the_first_process() as first:
        if not first:
            return
        if as_json:
            typer.echo(command.as_json(grids))
        else:
            if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character shows a question mark
                sys.stdout.reconfigure(errors="replace")
            command.print(grids, Console())
        if (written := command.save(grids)) is not None:
            typer.echo(f"wrote {written}", err=as_json)


@app.command()
def sites(
    model: Annotated[
        str | None,
        typer.Option(help="Only the sites of this model: a hub id, a folder, demo, demo-mamba2 or demo-hybrid."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List every place that can be read or edited, in execution order, and its shape in each architecture.

    Without --model these are the places of all models. The order of a hybrid that has attention before its SSM differs:
    --model prints the order of one model.
    """
    from .names.layouts import spans
    from .sites import AXES, FAMILY_MODELS, rows

    models, family, layout = dict(FAMILY_MODELS), None, None
    if model is not None:
        loaded = load_model(model, "auto", quiet=True)
        architecture, layout = loaded.architecture, loaded._layout
        family = architecture.family
        models = {family: (architecture.name,)}
    table = list(rows(family, layout, hybrid=None))
    layers = {row.path: layers_with(row, layout) for row in table} if layout is not None and layout.hybrid else {}
    if as_json:
        shapes = [shapes_of(row, models, layout is None) for row in table]
        content = [
            {"path": row.path, "shape": shape, "hook": row.hook, "meaning": row.meaning}
            | ({"layers": layers[row.path]} if layers.get(row.path) is not None else {})
            for row, shape in zip(table, shapes, strict=True)
        ]
        typer.echo(json.dumps(content, indent=1))
        return
    columns = [*map(", ".join, models.values()), *([HYBRIDS] if layout is None else [])]
    lines = [["path", *columns, *(["layers"] if layers else []), "hook name", "meaning"]]
    for row in table:
        where = [spans(layers[row.path] or ())] if layers else []
        shape = shapes_of(row, models, layout is None)
        in_each = [shape[column.split(", ")[0]] or "(none)" for column in columns]
        lines.append([row.path, *in_each, *where, row.hook or "(none)", row.meaning])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    typer.echo("\n" + ", ".join(f"{axis} {meaning}" for axis, meaning in AXES.items()))


@app.command()
def info(
    model: ModelName = DEMO,
    prompt: Annotated[str, typer.Option(help="The prompt to run.")] = PROMPT,
    kernels: Kernels = "auto",
    as_json: AsJson = False,
) -> None:
    """Say which kernels this machine has, how to install the others, and what a forward of a model runs."""
    import torch

    from .scan import availability

    check_text(**{"--prompt": prompt})
    loaded = load_model(model, kernels, quiet=True)
    with torch.no_grad(), loaded.trace(prompt):
        loaded.lm_head.output.save()
    backends, run = availability(loaded.architecture.family), loaded.last_run
    if as_json:
        content = {"kernels": list(map(asdict, backends)), "layers": list(map(asdict, run.layers))}
        typer.echo(json.dumps(content, indent=1))
        return
    typer.echo(f"{versions()}\n")
    for what in ("scan", "convolution"):
        typer.echo(what)
        for backend in backends:
            reason = getattr(backend, what)
            typer.echo(f"  {backend.backend:<10} {'yes' if reason is None else f'no: {reason}'}")
    typer.echo(f"\n{model}: {loaded.kernels} kernels, {run}")


@app.command()
def port(
    what: Annotated[str, typer.Argument(help="A hook name, or a script FILE.py.")],
    out: Annotated[Path | None, typer.Option(help="Write the ported script to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a hook name, or a script of MambaLens or TransformerLens, is here. Never runs the script.

    Exits with 1 where a script cannot be ported as a whole: what is left to do has a comment in what --out writes.
    """
    from .porting import encoded, is_file, name_note, port_file, port_name

    if is_file(what):
        report = port_file(what)
        if out is not None:
            from .results.files import check_writable  # which needs torch

            check_writable(out, (".py",)).write_bytes(encoded(report.script))
        typer.echo(json.dumps(report.as_dict(), indent=1) if as_json else str(report))
        if report.problems:
            typer.echo(f"mamba-trace port: {report.incomplete}", err=True)
            raise typer.Exit(1)
        return
    if out is not None:
        raise FileError(f"--out writes a script, and {what} is a hook name")
    path, note = port_name(what), name_note(what)
    answer = {"found": what, "becomes": path} | ({"note": note} if note else {})
    typer.echo(json.dumps(answer) if as_json else f"{path} ({note})" if note else path)


# -- what the commands need --------------------------------------------------------------------------------


def shapes_of(row: Row, models: Mapping[Family, Sequence[str]], hybrids: bool) -> dict[str, str | None]:
    """The shape of a row in each model, and in all hybrids together; ``None`` where a model lacks the site.

    A layer of a hybrid that has an SSM has the shapes of the Mamba that the SSM is one of.
    """
    from .sites import site_of

    shapes = {name: row.shape(family) for family, names in models.items() for name in names}
    if not hybrids:
        return shapes
    if site_of(row).part:
        return dict.fromkeys(shapes) | {HYBRIDS: row.shape("dual")}
    return shapes | {HYBRIDS: shapes["Mamba-1"] if len({*shapes.values()}) == 1 else "as its SSM"}


def layers_with(row: Row, layout: Layout) -> list[int] | None:
    """The layers of a hybrid that have the site of a row; ``None`` for a site of the whole model."""
    from .sites import site_of

    site = site_of(row)
    return None if site.scope == "model" else layout.with_site(site)


def versions() -> str:
    """``"mamba_trace 0.1.0, torch 2.13.0, ..."``."""
    installed = [f"mamba_trace {__version__}"]
    for package in ("torch", "nnsight", "transformers", "mamba-ssm", "causal-conv1d", "triton", "numba"):
        with contextlib.suppress(PackageNotFoundError):
            installed.append(f"{package} {version(package)}")
    return ", ".join(installed)


def load_model(name: str, kernels: str, quiet: bool, dtype: str | None = None, device: str | None = None) -> MambaTrace:
    """Load a shipped model for a name in `DEMOS`, a checkpoint for any other name."""
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
    return MambaTrace.demo(DEMOS[name], **options) if name in DEMOS else MambaTrace(name, **options)


def check_text(**options: str) -> None:
    """Refuse options that are not UTF-8: the shell passes such bytes on as lone surrogates."""
    for option, text in options.items():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(f"{option} is no text in UTF-8: {text!r:.80}") from error


def warn_of_spaces(model: MambaTrace, *answers: str) -> None:
    """Warn of an answer without its leading space, where the answer with a space is a token as well."""
    for answer in answers:
        try:
            if answer.startswith(" ") or model.to_single_token(answer) == model.to_single_token(f" {answer}"):
                continue
        except PromptError:
            continue
        different = f"warning: {answer!r} and {' ' + answer!r} are different tokens"
        typer.echo(f"{different}; a word inside a sentence carries its space", err=True)
