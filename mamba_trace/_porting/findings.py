"""What is found in a script, collected in any order and handed out by line."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Finding:
    """Something of a script that is known here.

    Attributes:
        line: its line, from 1.
        found: how the script writes it.
        becomes: what it is here; empty where it is left out.
        note: why, or what else to know.
    """

    line: int
    found: str
    becomes: str = ""
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """Something of a script that cannot be ported, or not without a hand.

    Attributes:
        line: its line, from 1.
        found: how the script writes it.
        reason: why, and what to do instead.
    """

    line: int
    found: str
    reason: str


@dataclass
class Findings:
    """The findings of one script; nothing is listed twice."""

    found: dict[tuple[int, str], Finding] = field(default_factory=dict)
    problems: dict[tuple[int, str], Problem] = field(default_factory=dict)
    notes: dict[tuple[int, str], Problem] = field(default_factory=dict)

    def name(self, node: ast.expr, becomes: str) -> None:
        """A hook name."""
        self._add(node, source(node), becomes)

    def call(self, node: ast.AST, becomes: str, note: str = "") -> None:
        """A call, an import or a statement that becomes another."""
        self._add(node, source(node), becomes, note)

    def dropped(self, node: ast.AST, found: str, why: str) -> None:
        """An argument that is not needed."""
        self._add(node, found, "", why)

    def problem(self, node: ast.AST, reason: str, found: str = "") -> None:
        """What cannot be ported."""
        line, found = getattr(node, "lineno", 1), found or source(node)
        self.problems.setdefault((line, found), Problem(line, found, reason))

    def note(self, node: ast.AST, reason: str) -> None:
        """What else to know about a line."""
        line = getattr(node, "lineno", 1)
        self.notes.setdefault((line, reason), Problem(line, source(node), reason))

    def _add(self, node: ast.AST, found: str, becomes: str, note: str = "") -> None:
        line = getattr(node, "lineno", 1)
        self.found.setdefault((line, found), Finding(line, found, becomes, note))


def source(node: ast.AST) -> str:
    """A node as one line of source."""
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:87]}..."
