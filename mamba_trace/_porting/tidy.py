"""What is left over in a ported script is left out, and what it needs is imported."""

from __future__ import annotations

import ast

from .expressions import parsed
from .loading import called, imports
from .script import Porter

#: What hook names, hook functions and lists of both are written as.
NAMES_AND_FUNCTIONS = (
    ast.Constant,
    ast.JoinedStr,
    ast.BinOp,
    ast.Call,
    ast.Lambda,
    ast.List,
    ast.Tuple,
    ast.ListComp,
)


def drop_unused(ported: list[tuple[ast.stmt, list[ast.stmt]]], porter: Porter) -> None:
    """Leave out hook functions and names that are written into the traces and used nowhere else."""
    consumed = set(porter.consumed)
    functions = set(porter.tracing.hooked)
    while True:
        whole = ast.Module([one for _, new in ported for one in new], [])
        loads = {node.id for node in ast.walk(whole) if isinstance(node, ast.Name) and not is_store(node)}
        unused = Unused(loads, consumed, functions)
        for index, (stmt, new) in enumerate(ported):
            ported[index] = stmt, [one for one in map(unused.visit, new) if one is not None]
        if not unused.removed:
            return


def is_store(node: ast.Name) -> bool:
    """Whether a name is assigned to."""
    return isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))


class Unused(ast.NodeTransformer):
    """Removes assignments and functions that only the hooks of the script used."""

    def __init__(self, loads: set[str], consumed: set[str], functions: set[ast.AST]) -> None:
        self.loads, self.consumed, self.functions, self.removed = loads, consumed, functions, False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        if node in self.functions and node.name not in self.loads:
            self.removed = True
            return None
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        target = node.targets[0]
        if len(node.targets) > 1 or not isinstance(target, ast.Name) or target.id in self.loads:
            return node
        if not isinstance(node.value, NAMES_AND_FUNCTIONS):
            return node
        calls = {called(one) for one in ast.walk(node.value) if isinstance(one, ast.Call)}
        if target.id not in self.consumed or calls - {"partial", "format", "str", "range"}:
            return node
        self.consumed |= {one.id for one in ast.walk(node.value) if isinstance(one, ast.Name)}
        self.removed = True
        return None


def place_imports(ported: list[tuple[ast.stmt, list[ast.stmt]]], porter: Porter) -> None:
    """Put the imports that the traces need where the script imported its library, or at the top."""
    lines = parsed(imports(porter.needed))
    if not lines:
        return
    for index, (stmt, new) in enumerate(ported):
        if stmt is porter.library:
            ported[index] = stmt, [*lines, *new]
            return
    start = 0
    while start < len(ported) and is_header(ported[start][0]):
        start += 1
    ported.insert(start, (ast.Pass(lineno=1), lines))


def is_header(stmt: ast.stmt) -> bool:
    """A docstring or an import from ``__future__``, which must stay first."""
    return is_text(stmt) or (isinstance(stmt, ast.ImportFrom) and stmt.module == "__future__")


def is_text(node: ast.AST) -> bool:
    """A statement that is nothing but a string, and a test for a part of a name."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in ("startswith", "endswith", "split", "replace")
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn))
