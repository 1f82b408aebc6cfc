"""Pieces of a syntax tree, changed so that the comments around them stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import libcst as cst
import libcst.matchers as m

from .report import REMARK, Problem
from .values import Values


def with_comments(old: Any, new: Any) -> Any:
    """A statement, and before it the comments that it lost in its change."""
    kept = [one.value for one in m.findall(new, m.Comment())]  # type: ignore[attr-defined]
    lost: list[Any] = [one for one in m.findall(old, m.Comment()) if one.value not in kept]  # type: ignore
    return new.with_changes(leading_lines=[*new.leading_lines, *(cst.EmptyLine(comment=one) for one in lost)])


def keyword_arg(name: str, value: Any) -> cst.Arg:
    """``name=value``."""
    call: Any = cst.parse_expression(f"f({name}=_)")
    return call.args[0].with_changes(value=value)


def with_args(call: cst.Call, args: list[cst.Arg]) -> cst.Call:
    """A call with other arguments, the last of which is followed by what followed the last before."""
    last: Any = call.args[-1] if call.args else cst.Arg(cst.Name("_"))
    plain = {"comma": cst.MaybeSentinel.DEFAULT, "whitespace_after_arg": cst.SimpleWhitespace("")}
    end = {"comma": last.comma, "whitespace_after_arg": last.whitespace_after_arg}
    inner = [arg.with_changes(**plain) if arg.comma is last.comma else arg for arg in args[:-1]]
    return call.with_changes(args=[*inner, *(arg.with_changes(**end) for arg in args[-1:])])


def remarks_of(problems: Iterable[Problem], script: Values) -> dict[Any, list[str]]:
    """The comments that a script gets before its statements: what of each cannot be ported, and why."""
    simple: list[Any] = m.findall(script.module, m.SimpleStatementLine())  # type: ignore[assignment]
    around = {one for statement in simple for one in script.around(statement)}
    statements = sorted(
        (one for one in around if isinstance(one, (cst.SimpleStatementLine, cst.BaseCompoundStatement))),
        key=script.start,
    )
    remarks: dict[Any, list[str]] = {}
    for problem in problems:
        line = max((script.start(one)[0] for one in statements if script.start(one)[0] <= problem.line), default=0)
        at = next((one for one in statements if script.start(one)[0] == line), None)
        text = " ".join(f"{REMARK} {problem.found}: {problem.reason}".split())
        remarks.setdefault(at, []).append(text)
    return remarks


def remarked(new: Any, remarks: list[str]) -> Any:
    """A statement, or several in the place of one, with comments of the porter before it."""
    first, *rest = new if isinstance(new, cst.FlattenSentinel) else [new]
    if not isinstance(first, cst.CSTNode):  # it was left out
        first = cst.SimpleStatementLine([cst.Pass()])
    lines = [cst.EmptyLine(comment=cst.Comment(text)) for text in remarks]
    first = first.with_changes(leading_lines=[*first.leading_lines, *lines])
    return cst.FlattenSentinel([first, *rest]) if rest else first


def placed(module: cst.Module, statements: list[Any]) -> cst.Module:
    """A module with further statements after its docstring and its first imports."""
    plain = m.SimpleStatementLine([m.OneOf(m.Import(), m.ImportFrom(), m.Expr(m.SimpleString()))])
    at = next((n for n, one in enumerate(module.body) if not m.matches(one, plain)), len(module.body))
    after: list[Any] = list(module.body[at : at + 1])
    for one in after:
        comments = [n for n, line in enumerate(one.leading_lines) if line.comment]
        there = comments[0] if comments else len(one.leading_lines)
        blank = [cst.EmptyLine(indent=False)] * (2 - there)
        after = [one.with_changes(leading_lines=[*blank, *one.leading_lines])]
    return module.with_changes(body=[*module.body[:at], *statements, *after, *module.body[at + 1 :]])
