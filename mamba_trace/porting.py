"""A MambaLens or TransformerLens script moves over in minutes when its author sees the trace it could be.

`port_script` reads a script without running it and says, line by line, what its hook names and calls are
here; it writes out the traces that do the same; and it names what cannot be ported, with the reason.
`port_name` does one name. The traces ask for sites in execution order, and every block is valid Python.
"""

from __future__ import annotations

import ast
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import names
from ._porting.calls import Tracing
from ._porting.findings import Finding, Findings, Problem
from ._porting.keys import FullKeys, cache_variables
from ._porting.names import name_of, parts_of, read_name
from ._porting.scope import Scopes
from ._porting.script import Porter
from ._porting.tidy import drop_unused, is_text, place_imports
from .errors import FileError, UnknownSiteError

__all__ = ["Block", "Finding", "Problem", "Report", "port_file", "port_name", "port_script"]

LOOKS_LIKE_A_NAME = re.compile(r"(blocks\.|ln_final\.|embed\.hook_|unembed\.hook_).+|hook_\w+")


@dataclass(frozen=True)
class Block:
    """A statement of the script as it is here.

    Attributes:
        line: the line of the statement in the script, from 1.
        code: valid Python.
    """

    line: int
    code: str


@dataclass(frozen=True)
class Report:
    """What was found in a script, and what it becomes.

    Attributes:
        filename: the script.
        findings: hook names, calls and imports, by line, and what each becomes.
        blocks: the statements that change, by line.
        problems: what cannot be ported, by line, and why.
        notes: what else to know, by line.
        script: the whole script with its traces; its comments are not kept.
    """

    filename: str
    findings: list[Finding]
    blocks: list[Block]
    problems: list[Problem]
    notes: list[Problem]
    script: str

    def as_dict(self) -> dict[str, Any]:
        """The report as plain lists and dicts, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [self.filename]
        for finding in self.findings:
            becomes = finding.becomes or f"(left out: {finding.note})"
            becomes = finding.note if finding.note and finding.becomes else becomes
            lines.append(f"{finding.line:>5}  {finding.found}\n       -> {becomes}")
        if not self.findings:
            lines.append("       no hook name and no call of MambaLens or TransformerLens is in it")
        for block in self.blocks:
            lines += ["", f"# line {block.line}", block.code]
        for title, entries in (("Also:", self.notes), ("Cannot be ported:", self.problems)):
            if entries:
                lines += ["", title]
                lines += [f"{one.line:>5}  {one.found}\n       {one.reason}" for one in entries]
        return "\n".join(lines)


def port_name(name: str) -> str:
    """The value in a trace that a hook name names.

    Args:
        name: MambaLens's hook name, TransformerLens 4's, or a path; ``{...}`` for what varies,
            as in an f-string.

    Returns:
        The expression, e.g. ``"model.layers[3].ssm.h[5].output"``.

    Raises:
        UnknownSiteError: if no place has this name, or none that means the same.

    >>> port_name("blocks.3.hook_h.5")
    'model.layers[3].ssm.h[5].output'
    >>> port_name("blocks.{layer}.hook_h.{pos}")
    'model.layers[layer].ssm.h[pos].output'
    """
    try:
        tree = ast.parse(f"f{name!r}") if "{" in name else None
    except SyntaxError:
        tree = None
    if tree is None:
        return f"model.{names.to_path(name)}.output"
    parts = parts_of(tree.body[0].value, Scopes(tree))  # type: ignore[attr-defined]
    if parts is None:
        raise UnknownSiteError(f"{name!r} is no hook name: what varies must be a layer or a position")
    return f"model.{name_of(parts).path}.output"


def is_file(what: str) -> bool:
    """Whether an argument is a script and no hook name: it ends in .py, or there is such a file."""
    return what.endswith(".py") or "/" in what or os.path.isfile(what)  # a Path may raise


def port_file(path: str | Path) -> Report:
    """`port_script` of a file.

    Raises:
        FileError: if there is no such file, or it is no Python.

    Example::

        Path("script.py").write_text("logits, cache = model.run_with_cache(prompt)", encoding="utf-8")
        print(port_file("script.py"))
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # the latter for a name with a zero byte, too
        no_text = isinstance(error, UnicodeDecodeError)
        reason = "it is no text in UTF-8" if no_text else getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path} cannot be read: {reason}") from error
    return port_script(text, str(path))


def port_script(source: str, filename: str = "<script>") -> Report:
    """What the hook names and calls of a script are here, and the traces that do the same.

    Args:
        source: the script; it is parsed and never run.
        filename: for messages.

    Returns:
        The report; ``print(report)`` shows it.

    Raises:
        FileError: if the script is no Python.

    >>> script = "logits, cache = model.run_with_cache('Hi')\\ny = cache['blocks.0.hook_y']"
    >>> print(port_script(script).blocks[0].code)
    with model.trace(model.to_tokens('Hi', prepend_bos=True)):
        cache = {}.save()
        cache['blocks.0.hook_y'] = model.layers[0].ssm.y.output.save()
        logits = model.lm_head.output.save()
    """
    try:
        tree = ast.parse(source, filename)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{filename}, line {line}" if line else filename
        raise FileError(f"{where} is no Python: {getattr(error, 'msg', None) or error}") from error
    return ported(tree, filename)


def ported(tree: ast.Module, filename: str) -> Report:
    """The report of a script; its tree is rewritten."""
    scopes, findings = Scopes(tree), Findings()
    list_names(scopes, findings)
    originals = {id(stmt): ast.dump(stmt) for stmt in tree.body}
    FullKeys(scopes, cache_variables(tree), findings).visit(tree)
    scopes = Scopes(tree)
    porter = Porter(scopes, findings, Tracing(scopes, findings))
    stmts = porter.statements()
    for edit in porter.tracing.pending:
        findings.problem(edit.at, "hooks of the backward pass, and no .backward() after them in this script")
    drop_unused(stmts, porter)
    place_imports(stmts, porter)
    blocks = [
        Block(stmt.lineno, unparsed(new))
        for stmt, new in stmts
        if new and [ast.dump(one) for one in new] != [originals.get(id(stmt))]
    ]
    found, problems, notes = (
        sorted(some.values(), key=lambda one: one.line)
        for some in (findings.found, findings.problems, findings.notes)
    )
    script = unparsed([one for _, new in stmts for one in new])
    return Report(filename, found, blocks, problems, notes, script)  # type: ignore[arg-type]


def unparsed(stmts: list[ast.stmt]) -> str:
    """Statements as source."""
    return ast.unparse(ast.fix_missing_locations(ast.Module(stmts, [])))


# -- hook names --------------------------------------------------------------------------------------------


def list_names(scopes: Scopes, findings: Findings) -> None:
    """Every hook name of a script, with what it is here."""
    todo: list[ast.AST] = [scopes.tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.expr) and is_hook_name(node, scopes):
            try:
                name = read_name(node, scopes)
            except UnknownSiteError as error:
                findings.problem(node, str(error))
                continue
            assert name is not None
            findings.name(node, f"model.{name.path}.output")
        elif isinstance(node, ast.JoinedStr):
            todo += [one for one in node.values if not isinstance(one, ast.Constant)]
        elif not is_text(node):
            todo += list(ast.iter_child_nodes(node))


def is_hook_name(node: ast.expr, scopes: Scopes) -> bool:
    """Whether an expression makes a hook name: a whole one, and not a part to look for in names."""
    if isinstance(node, ast.Name):
        return False
    parts = parts_of(node, scopes)
    if parts is None or (len(parts) == 1 and not isinstance(parts[0], str)):
        return False
    text = "".join(part if isinstance(part, str) else "0" for part in parts)
    if LOOKS_LIKE_A_NAME.fullmatch(text) is None or " " in text:
        return False
    if "." in text or isinstance(node, ast.Call):
        return True
    try:
        return names.parse(text).layer is None
    except UnknownSiteError:
        return False
