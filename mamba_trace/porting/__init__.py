"""A MambaLens or TransformerLens script, and one hook name of it, as they are here. Nothing is run.

`port_script` renames imports and loading, gives the hooks that a model kept to its runs, and keeps every
comment and all else as it is; beside that it shows the trace of each hook. `port_name` does one name.
"""

from __future__ import annotations

import io
import os
import tokenize
from pathlib import Path
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst.codemod.visitors import AddImportsVisitor

from .. import names
from ..errors import FileError, UnknownSiteError
from .lacking import list_lacking
from .nodes import remarks_of
from .report import Finding, PortReport, Problem
from .runs import Script
from .script import Porter
from .values import WrittenName, is_hook_name, read_name

__all__ = ["PortReport", "port_file", "port_name", "port_script"]


def port_name(name: str) -> str:
    """The value in a trace that a hook name, or a path, names; ``{...}`` in it varies, as in an f-string.

    Raises:
        UnknownSiteError: if no place has this name, or none that means the same.

    >>> port_name("blocks.3.hook_h.5")
    'model.layers[3].ssm.h[5].output'
    >>> port_name("blocks.{layer}.hook_h.{pos}")
    'model.layers[layer].ssm.h[pos].output'
    """
    return f"model.{_written_name(name).path}.output"


def name_note(name: str) -> str:
    """What else to know of a name that `port_name` takes; empty if there is nothing. Raises as it does.

    >>> name_note("blocks.3.attn.hook_z")
    'in hybrids'
    """
    return _written_name(name).note


def _written_name(name: str) -> WrittenName:
    if not isinstance(name, str):
        raise UnknownSiteError(f"port_name takes a hook name, 'blocks.3.hook_h.5', not {name!r}")
    try:
        script = Script(cst.parse_module(f"f{name!r}")) if "{" in name else None
    except cst.ParserSyntaxError:
        script = None
    if script is None:
        return WrittenName(name, names.parse(name))
    written = read_name(script.module.body[0].body[0].value, script)  # type: ignore[union-attr, index]
    if written is None:
        raise UnknownSiteError(f"{name!r} is no hook name: what varies must be a layer or a position")
    return written


def is_file(what: str) -> bool:
    """Whether an argument is a script and no hook name: it ends in .py, or there is such a file."""
    return what.endswith(".py") or "/" in what or os.path.isfile(what)  # a Path may raise


def port_file(path: str | Path) -> PortReport:
    """`port_script` of a file.

    Raises:
        FileError: if there is no such file, or it is no Python.

    Example::

        Path("script.py").write_text("logits, cache = model.run_with_cache(prompt)", encoding="utf-8")
        print(port_file("script.py"))
    """
    if not isinstance(path, (str, Path)):
        raise FileError(f"port_file takes the path of a script, not {path!r}; port_script takes its text")
    if str(path).endswith(".ipynb"):
        raise FileError(f"{path} is a notebook. Make a script of it: jupyter nbconvert --to script {path}")
    try:
        content = Path(path).read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)  # with the line ends that it has
    except (OSError, ValueError, SyntaxError) as error:  # a ValueError for a name with a zero byte, too
        no_text = isinstance(error, UnicodeDecodeError | SyntaxError)
        reason = (
            "it is no text in UTF-8, nor in an encoding it names" if no_text else getattr(error, "strerror", 0) or error
        )
        raise FileError(f"{path} cannot be read: {reason}") from error
    return port_script(text, str(path))


def encoded(script: str) -> bytes:
    """A ported script as a file, in the encoding that it names: UTF-8 where it names none."""
    content = script.encode()
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return script.encode(encoding, errors="backslashreplace")


def port_script(source: str, filename: str = "<script>") -> PortReport:
    """A script, which is parsed and never run, as it is here, and the traces that do what its hooks do.

    Raises:
        FileError: if the script is no Python.

    >>> script = "out = model.run_with_hooks('Hi', fwd_hooks=[('blocks.0.hook_y', lambda y, hook: y * 2)])"
    >>> print(port_script(script).blocks[0].code)
    with model.trace(model.to_tokens('Hi', prepend_bos=True)):
        model.layers[0].ssm.y.output = model.layers[0].ssm.y.output * 2
        out = model.lm_head.output.save()
    """
    if not isinstance(source, str):
        raise FileError(
            f"port_script takes the text of a script, not a {type(source).__name__}; port_file takes its path"
        )
    try:
        return _port(source, filename)
    except RecursionError as error:
        raise FileError(f"{filename} nests expressions too deeply, or adds hundreds of terms: split them") from error


def _port(source: str, filename: str) -> PortReport:
    try:
        compile(source, filename, "exec", dont_inherit=True)  # whose messages are Python's own
        module = cst.parse_module(source)
    except (SyntaxError, ValueError, cst.ParserSyntaxError) as error:
        line = getattr(error, "lineno", None)
        where = f"{filename}, line {line}" if line else filename
        raise FileError(f"{where} is no Python: {getattr(error, 'msg', None) or error}") from error
    script = Script(module)
    report = _rewritten(script, filename, {})
    # What cannot be ported is known at the end alone, and the script gets a comment where it stands.
    return _rewritten(script, filename, remarks_of(report.problems, script)) if report.problems else report


def _rewritten(script: Script, filename: str, remarks: dict[Any, list[str]]) -> PortReport:
    report = PortReport(filename)
    list_names(script, script.module, report)
    porter = Porter(script, report, remarks)
    ported = script.module.visit(porter)
    report.script = AddImportsVisitor(porter.context).transform_module(ported).code
    for node, reason in script.refused:
        report.add(report.problems, Problem(script.start(node)[0], script.code(node), reason))
    for node, reason in porter.axes.unseen(porter.helpers):
        report.add(report.problems, Problem(script.start(node)[0], script.code(node), reason))
    list_lacking(script, report)
    return report


def list_names(script: Script, node: Any, report: PortReport) -> None:
    """Every hook name below a node, and every key (short name, layer) of a cache, with what it is here."""
    asks = m.Call(m.Attribute(attr=m.OneOf(*map(m.Name, ("startswith", "endswith", "split", "replace")))))
    part = m.Comparison(comparisons=[m.ComparisonTarget(m.In() | m.NotIn())]) | asks
    if m.matches(node, part | m.Expr(m.SimpleString())):
        return
    key = [getattr(one.slice, "value", None) for one in node.slice] if isinstance(node, cst.Subscript) else []
    short = len(key) == 2 and isinstance(key[0], cst.BaseString)
    if short or (isinstance(node, cst.BaseExpression) and is_hook_name(node, script)):
        line, found = script.start(node)[0], script.code(node)
        try:
            name = read_name(key[0], script, key[1]) if short else read_name(node, script)
            assert name is not None
            report.add(report.findings, Finding(line, found, f"model.{name.path}.output", name.note))
        except UnknownSiteError as error:
            report.add(report.problems, Problem(line, found, str(error)))
        return
    for child in node.children:
        list_names(script, child, report)
