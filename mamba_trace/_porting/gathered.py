"""What a script says about its models, hooks and caches, read before any of it is rewritten."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from ..errors import UnknownSiteError
from .findings import Findings
from .hooks import find_function
from .keys import cache_variables
from .names import name_of
from .reads import used_keys
from .runs import ADDS, MODEL_METHODS, RUNS, Run, attribute_parts, find_run
from .scope import Scopes
from .traces import Edit, Read, read_hooks

Hooks = tuple[list[Edit], list[Edit]]
Failures = list[tuple[ast.expr, str]]


@dataclass
class Gathered:
    """The models, hooks and cache keys of a script.

    Attributes:
        models: the expressions that are models.
        hooks: for each call that sets hooks, those of the forward and of the backward pass.
        hooked: for each hook function, where it is hooked.
        keys: for each variable of a cache, what is read from it, the uses that do not say, and the names
            that are no place.
        taken: names that the script or its port uses.
    """

    scopes: Scopes
    findings: Findings
    models: set[str] = field(default_factory=set)
    hooks: dict[ast.AST, Hooks] = field(default_factory=dict)
    hooked: dict[ast.AST, list[Edit]] = field(default_factory=dict)
    keys: dict[str, tuple[list[Read], list[ast.AST], Failures]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        nodes = list(ast.walk(self.scopes.tree))
        self.taken |= {node.id for node in nodes if isinstance(node, ast.Name)}
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        for node in calls:
            if isinstance(node.func, ast.Attribute) and node.func.attr in MODEL_METHODS:
                self.models.add(ast.unparse(node.func.value))
        for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
            self._gather(node)
        for variable in cache_variables(self.scopes.tree):
            failed: Failures = []
            self.keys[variable] = (*used_keys(variable, self.scopes, self.hooked, failed), failed)

    def run(self, node: ast.AST) -> Run | None:
        """A call as a run of the model; ``None`` if it is none."""
        run = find_run(node, self.models)
        if (
            run is not None
            and (given := run.arguments.get("input") or run.arguments.get("tokens")) is not None
        ):
            run.is_text = self.is_text(given)
        return run

    def is_text(self, node: ast.expr) -> bool:
        """Whether an expression is known to be a string."""
        text = self.scopes.expression(node)
        return isinstance(text, ast.JoinedStr) or (
            isinstance(text, ast.Constant) and isinstance(text.value, str)
        )

    def fresh(self, name: str) -> str:
        """A name that the script does not use."""
        found, number = name, 1
        while found in self.taken:
            number += 1
            found = f"{name}_{number}"
        self.taken.add(found)
        return found

    def _gather(self, node: ast.Call) -> None:
        """Read the hooks that a call sets."""
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if called not in (*RUNS, *ADDS, "hooks"):
            return
        failed: Failures = []
        named = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
        if called in ADDS:
            sides = self._added(node, named, failed)
        else:
            if called == "hooks":
                named = dict(zip(("fwd_hooks", "bwd_hooks"), node.args, strict=False)) | named
            forward = read_hooks(named.get("fwd_hooks"), node, self.scopes, failed)
            sides = forward, read_hooks(named.get("bwd_hooks"), node, self.scopes, failed)
        self.hooks[node] = sides
        for where, reason in failed:
            self.findings.problem(where, reason)
        for edit in (*sides[0], *sides[1]):
            if edit.fn.function is not None:
                self.hooked.setdefault(edit.fn.function, []).append(edit)

    def _added(self, node: ast.Call, named: dict, failed: Failures) -> Hooks:
        assert isinstance(node.func, ast.Attribute)
        arguments = list(node.args)
        point = attribute_parts(node.func.value)
        if point is None and ast.unparse(node.func.value) in self.models | {"model"}:
            self.models.add(ast.unparse(node.func.value))
            first = named.get("name") or (arguments.pop(0) if arguments else None)
        else:
            first = None
        function = named.get("hook") or (arguments.pop(0) if arguments else None)
        if function is None or (first is None and point is None):
            return [], []
        edits = read_hooks(
            ast.List([ast.Tuple([first, function])]) if first is not None else None, node, self.scopes, failed
        )
        if point is not None:
            try:
                edits = [Edit(name_of(point), find_function(function, self.scopes), node)]
            except UnknownSiteError as error:
                failed.append((node.func.value, str(error)))
        direction = named.get("dir") or (arguments[0] if arguments else None)
        backward = isinstance(direction, ast.Constant) and direction.value == "bwd"
        return ([], edits) if backward else (edits, [])
