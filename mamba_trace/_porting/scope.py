"""What a name of a script stands for, found without running it.

A hook name or a hook function is often put into a variable first. `Scopes` answers which binding reaches a
use of a name, and gives up (with a binding that equals no other) where that depends on the run: an ``if``, a
later turn of a loop, a name that several functions assign.
"""

from __future__ import annotations

import ast
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
Function = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
CONTAINERS = (ast.List, ast.Dict, ast.Set, *Comprehension)
MUTATORS = {"append", "extend", "insert", "remove", "pop", "clear", "update", "add", "sort", "reverse"}
ARITHMETIC = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
SCOPES = (ast.Module, *Function, *Comprehension)


class Binding(NamedTuple):
    """Where a name gets its value, and the value, or ``None`` where it is no single expression."""

    node: ast.AST
    value: ast.AST | None


class Scopes:
    """The bindings of every scope of a script."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
        self._bound: dict[ast.AST, dict[str, list[Binding]]] = defaultdict(lambda: defaultdict(list))
        #: Which list of statements each is in, as (its parent, the field); the tree is rewritten later.
        self._lists = {
            stmt: (parent, name)
            for parent in ast.walk(tree)
            for name, value in ast.iter_fields(parent)
            if isinstance(value, list)
            for stmt in value
            if isinstance(stmt, ast.AST)
        }
        self._mutated = {name for node in ast.walk(tree) for name in mutated_by(node)}
        for node in ast.walk(tree):
            for name, value, inside in bound_by(node):
                self._bound[node if inside else self.scope(node)][name].append(Binding(node, value))

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes around ``node``, from its parent to the module."""
        while node in self.parents:
            node = self.parents[node]
            yield node

    def scope(self, node: ast.AST) -> ast.AST:
        """The function, comprehension or module that ``node`` is evaluated in."""
        return next((above for above in self.ancestors(node) if isinstance(above, SCOPES)), self.tree)

    def owner(self, name: str, at: ast.AST) -> ast.AST | None:
        """The scope whose binding of ``name`` is seen at a node; ``None`` for a builtin."""
        scopes = [above for above in self.ancestors(at) if isinstance(above, SCOPES)] or [self.tree]
        return next((scope for scope in scopes if name in self._bound[scope]), None)

    def binding(self, name: str, at: ast.AST) -> Binding | None:
        """The binding of ``name`` that a use at ``at`` sees; ``None`` for a builtin."""
        owner = self.owner(name, at)
        if owner is None:
            return None
        unknown, found = Binding(ast.Pass(), None), self._bound[owner][name]
        here = next((scope for scope in (at, *self.ancestors(at)) if scope is owner), None)
        outside = self.scope(at) is not owner and not isinstance(self.scope(at), Comprehension)
        if here is None or outside or isinstance(owner, (*Comprehension, ast.Lambda)):
            return found[0] if len(found) == 1 else unknown
        itself = [above for above in self.ancestors(at) if isinstance(above, ASSIGNMENTS)]
        earlier = [one for one in found if position(one.node) < position(at) or one.node is owner]
        earlier = [one for one in earlier if one.node not in itself]
        if not earlier:
            return unknown
        last = max(earlier, key=lambda one: position(one.node))
        if not self._always_before(last.node, at, owner) or self._rebound(found, last, at):
            return unknown
        return last

    def value(self, node: ast.Name) -> ast.AST | None:
        """What a name stands for, if it can be written in its place: its own names mean the same there."""
        found = self.binding(node.id, node)
        if found is None or found.value is None:
            return None
        if isinstance(found.value, Function) and not isinstance(found.value, ast.Lambda):
            return found.value
        if isinstance(found.value, CONTAINERS) and node.id in self._mutated:
            return None
        for free in ast.walk(found.value):
            if isinstance(free, ast.Name) and self.scope(free) is self.scope(found.value):
                there, here = self.binding(free.id, free), self.binding(free.id, node)
                if there != here:
                    return None
        return found.value

    def expression(self, node: ast.expr) -> ast.expr:
        """``node``, with a name replaced by the expression that it stands for where that is known."""
        for _ in range(8):
            if isinstance(node, ast.Subscript):
                value: ast.AST | None = self._element(node)
            elif isinstance(node, ast.Name):
                value = self.value(node)
            else:
                break
            if not isinstance(value, ast.expr):
                break
            node = value
        return node

    def number(self, node: ast.expr) -> int | None:
        """The whole number that an expression is, if the script says it."""
        node = self.expression(node)
        if isinstance(node, ast.Constant):
            return node.value if type(node.value) is int else None
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            inner = self.number(node.operand)
            return None if inner is None else -inner
        if not isinstance(node, ast.BinOp) or type(node.op) not in ARITHMETIC:
            return None
        left, right = self.number(node.left), self.number(node.right)
        return None if left is None or right is None else ARITHMETIC[type(node.op)](left, right)

    def _element(self, node: ast.Subscript) -> ast.expr | None:
        """The element of a list that is written out in the script."""
        whole = self.expression(node.value)
        index = node.slice.value if isinstance(node.slice, ast.Constant) else None
        if not isinstance(whole, (ast.List, ast.Tuple)) or type(index) is not int:
            return None
        return whole.elts[index] if 0 <= index < len(whole.elts) else None

    def _always_before(self, node: ast.AST, at: ast.AST, owner: ast.AST) -> bool:
        if node is owner:
            return True
        around = [at, *self.ancestors(at)]
        if isinstance(node, (ast.For, ast.With, ast.ExceptHandler)):
            return node in around
        above = self.parents.get(node)
        if above not in around:
            return False
        inner = around[around.index(above) - 1]
        return self._lists.get(node) is not None and self._lists.get(node) == self._lists.get(inner)

    def _rebound(self, found: list[Binding], last: Binding, at: ast.AST) -> bool:
        """Whether a later turn of a loop around the use sees another binding."""
        loops = [above for above in self.ancestors(at) if isinstance(above, (ast.For, ast.While))]
        loops = [loop for loop in loops if last.node is not loop and loop not in self.ancestors(last.node)]
        return any(loop in self.ancestors(one.node) for one in found for loop in loops)


def position(node: ast.AST) -> tuple[int, int]:
    """Where a node begins; (0, 0) for a module."""
    return getattr(node, "lineno", 0), getattr(node, "col_offset", 0)


def mutated_by(node: ast.AST) -> Iterator[str]:
    """The names whose value one node changes in place."""
    if isinstance(node, ast.Attribute) and node.attr in MUTATORS and isinstance(node.value, ast.Name):
        yield node.value.id
    changed = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
    if changed and isinstance(node.value, ast.Name):  # type: ignore[attr-defined]
        yield node.value.id  # type: ignore[attr-defined]


def bound_by(node: ast.AST) -> Iterator[tuple[str, ast.AST | None, bool]]:
    """The names that one node binds: (name, value, whether inside the node's own scope)."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _targets(target, node.value)
    elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)):
        yield from _targets(node.target, node.value)
    elif isinstance(node, (ast.AugAssign, ast.For, ast.AsyncFor)):
        yield from _targets(node.target, None)
    elif isinstance(node, (ast.With, ast.AsyncWith)):
        for item in node.items:
            if item.optional_vars is not None:
                yield from _targets(item.optional_vars, None)
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0], None, False
    elif isinstance(node, Comprehension):
        for generator in node.generators:
            yield from ((name, None, True) for name, _, _ in _targets(generator.target, None))
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name, None, False
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name, node, False
    if isinstance(node, Function):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [one for one in (node.args.vararg, node.args.kwarg) if one is not None]
        yield from ((argument.arg, None, True) for argument in arguments)


def _targets(target: ast.expr, value: ast.AST | None) -> Iterator[tuple[str, ast.AST | None, bool]]:
    if isinstance(target, ast.Name):
        yield target.id, value, False
    elif isinstance(target, ast.Starred):
        yield from _targets(target.value, None)
    elif isinstance(target, (ast.Tuple, ast.List)):
        values: list[ast.AST | None] = [None] * len(target.elts)
        if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
            values = list(value.elts)
        for one, its in zip(target.elts, values, strict=True):
            yield from _targets(one, its)
