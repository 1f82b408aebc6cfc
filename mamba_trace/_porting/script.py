"""A script, statement by statement, with its runs of the model as traces.

A call that runs the model can stand anywhere in a statement, and a trace is a block: so the trace is put in
front of the statement, and the variable it saves takes the place of the call.
"""

from __future__ import annotations

import ast
import copy

from . import loading
from .expressions import Expressions, parsed
from .gathered import Hooks
from .runs import ADDS
from .scope import Comprehension

BLOCKS = ("body", "orelse", "finalbody")


class Porter(Expressions):
    """Rewrites the statements of one script; `statements` says what became of each."""

    def statements(self) -> list[tuple[ast.stmt, list[ast.stmt]]]:
        """Every statement of the module, and those that take its place."""
        tree = self.scopes.tree
        self._learn(tree)
        return [(stmt, self.statement(stmt, tree.body)) for stmt in list(tree.body)]

    def _learn(self, tree: ast.Module) -> None:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and loading.is_library(node.module):
                self.dropped |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                names = [alias for alias in node.names if loading.is_library(alias.name)]
                self.dropped |= {alias.asname or alias.name.partition(".")[0] for alias in names}
            elif isinstance(node, ast.Assign) and (
                loading.is_loader(node.value) or loading.is_constructor(node.value)
            ):
                self.tracing.models |= {ast.unparse(target) for target in node.targets}
            elif isinstance(node, ast.Call) and node in self.tracing.hooks:
                parts = [*node.args, *(keyword.value for keyword in node.keywords)]
                inside = [one for part in parts for one in ast.walk(part) if isinstance(one, ast.Name)]
                own = (ast.Lambda, *Comprehension)
                self.consumed |= {
                    one.id for one in inside if not isinstance(self.scopes.owner(one.id, one), own)
                }

    # -- statements ----------------------------------------------------------------------------------------

    def block(self, stmts: list[ast.stmt]) -> list[ast.stmt]:
        """The statements that take the place of those of a block."""
        return [new for stmt in list(stmts) for new in self.statement(stmt, stmts)]

    def statement(self, stmt: ast.stmt, among: list[ast.stmt]) -> list[ast.stmt]:
        """The statements that take the place of one."""
        if isinstance(stmt, (ast.Import, ast.ImportFrom)):
            return self._import(stmt)
        if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return self._definition(stmt)
        if isinstance(stmt, (ast.With, ast.AsyncWith)) and self._hooks_of(stmt) is not None:
            return self._with_hooks(stmt)
        if any(hasattr(stmt, name) for name in BLOCKS):
            return self._compound(stmt)
        if isinstance(stmt, ast.Expr) and isinstance(stmt.value, ast.Call):
            done = self._hook_call(stmt.value)
            if done is not None:
                return done
            run = self.tracing.run(stmt.value)
            if run is not None:
                return self._trace(run, "_", "")
            if isinstance(stmt.value.func, ast.Attribute) and stmt.value.func.attr == "load_state_dict":
                made = self._made_before(stmt.value, among)
                if made is not None:
                    return made
        if self._is_loaded_later(stmt, among):
            return []
        if isinstance(stmt, ast.Assign):
            done = self._assigned(stmt)
            if done is not None:
                return done
        if isinstance(stmt, ast.AnnAssign) and self._mentions(stmt.annotation) and stmt.value is not None:
            stmt = ast.copy_location(ast.Assign([stmt.target], stmt.value), stmt)
        return self._hoisted(stmt)

    def _hoisted(self, stmt: ast.stmt) -> list[ast.stmt]:
        self.before = []
        new = self.visit(stmt)
        before, self.before = self.before, []
        return [*before, new]

    def _import(self, stmt: ast.Import | ast.ImportFrom) -> list[ast.stmt]:
        module = stmt.module if isinstance(stmt, ast.ImportFrom) else None
        kept = [one for one in stmt.names if not loading.is_library(module or one.name)]
        if len(kept) == len(stmt.names):
            return [stmt]
        wanted = {alias.name for alias in stmt.names}
        if module is None or wanted & {*loading.CLASSES, *loading.CONVERTERS}:
            self.needed.add("MambaTrace")
            self.findings.call(stmt, "from mamba_trace import MambaTrace")
        else:
            self.findings.call(stmt, "", "nothing of it is needed")
        self.library = self.library or stmt
        stmt.names = kept
        return [stmt] if kept else []

    def _definition(self, stmt: ast.stmt) -> list[ast.stmt]:
        held, self.active = self.active, ([], [])
        if isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for one in ast.walk(stmt.args):
                if isinstance(one, ast.arg) and one.annotation is not None and self._mentions(one.annotation):
                    one.annotation = None
            if stmt.returns is not None and self._mentions(stmt.returns):
                stmt.returns = None
        stmt.body = self.block(stmt.body) or [ast.Pass()]  # type: ignore[attr-defined]
        self.active = held
        return [stmt]

    def _compound(self, stmt: ast.stmt) -> list[ast.stmt]:
        if self._only_adds_hooks(stmt):
            return []
        before: list[ast.stmt] = []
        self.depth += isinstance(stmt, ast.While)
        for name, value in ast.iter_fields(stmt):
            if isinstance(value, ast.expr) and name in ("iter", "test", "subject"):
                self.before = []
                setattr(stmt, name, self.visit(value))
                before += self.before
            elif name == "items":
                self.before = []
                setattr(stmt, name, [self.visit(item) for item in value])
                before += self.before
        self.depth -= isinstance(stmt, ast.While)
        held = len(self.active[0]) + len(self.active[1])
        for name in BLOCKS:
            if getattr(stmt, name, None):
                setattr(
                    stmt, name, self.block(getattr(stmt, name)) or ([ast.Pass()] if name == "body" else [])
                )
        for part in (*getattr(stmt, "handlers", ()), *getattr(stmt, "cases", ())):
            part.body = self.block(part.body) or [ast.Pass()]
        if len(self.active[0]) + len(self.active[1]) > held:
            self.findings.problem(
                stmt,
                "hooks that are added in some turns of a loop or a branch, and stay: pass them to the run",
            )
        return [*before, stmt]

    def _assigned(self, stmt: ast.Assign) -> list[ast.stmt] | None:
        """An assignment whose whole value is a run: the trace saves under its names at once."""
        target = stmt.targets[0]
        value: ast.expr = stmt.value
        part: object = None
        if isinstance(value, ast.Subscript) and isinstance(value.slice, ast.Constant):
            part, value = value.slice.value, value.value
        if isinstance(stmt.value, ast.ListComp) and isinstance(target, ast.Name):
            return self._comprehension(stmt, target, stmt.value)
        run = self.tracing.run(value)
        if run is None or len(stmt.targets) > 1:
            return None
        cached = run.kind == "run_with_cache"
        if not cached:
            plain = part is None and isinstance(target, ast.Name)
            return self._trace(run, target.id, "") if plain and isinstance(target, ast.Name) else None
        if part in (0, 1) and isinstance(target, ast.Name):
            names = (target.id, "") if part == 0 else ("_", target.id)
            return self._trace(run, *names)
        if part is None and isinstance(target, ast.Tuple) and len(target.elts) == 2:
            first, second = target.elts
            if isinstance(first, ast.Name) and isinstance(second, ast.Name):
                return self._trace(run, first.id, second.id)
        return None

    def _comprehension(
        self, stmt: ast.Assign, target: ast.Name, value: ast.ListComp
    ) -> list[ast.stmt] | None:
        """``x = [f(model(t)) for t in them]`` as a loop."""
        if len(stmt.targets) > 1 or not any(self.tracing.run(node) for node in ast.walk(value)):
            return None
        append = ast.Attribute(ast.Name(target.id, ast.Load()), "append")
        body: ast.stmt = ast.Expr(ast.Call(append, [value.elt], []))
        for generator in reversed(value.generators):
            for test in reversed(generator.ifs):
                body = ast.If(test, [body], [])
            body = ast.For(generator.target, generator.iter, [body], [])
        start = ast.Assign([target], ast.List([], ast.Load()))
        return [
            *self.block([ast.copy_location(start, stmt)]),
            *self.statement(ast.copy_location(body, stmt), []),
        ]

    # -- hooks that stay -----------------------------------------------------------------------------------

    def _hook_call(self, call: ast.Call) -> list[ast.stmt] | None:
        """``add_hook``, ``reset_hooks`` and ``loss.backward()``."""
        name = loading.called(call)
        if name in ADDS and call in self.tracing.hooks:
            self._hold(self.tracing.hooks[call])
            self.findings.call(call, "lines of the traces after it")
            return []
        receiver = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if name == "reset_hooks" and receiver in self.tracing.models:
            self.active = ([], [])
            self.findings.call(call, "", "not needed: a trace leaves no hooks behind")
            return []
        if name == "backward" and self.tracing.pending:
            return parsed(self.tracing.backward(call))
        return None

    def _hold(self, hooks: Hooks) -> None:
        self.active = ([*self.active[0], *hooks[0]], [*self.active[1], *hooks[1]])

    def _only_adds_hooks(self, stmt: ast.stmt) -> bool:
        """A loop that does nothing but add hooks: each of them is held with the loop around it."""
        if not isinstance(stmt, ast.For) or stmt.orelse:
            return False
        calls = [one.value for one in stmt.body if isinstance(one, ast.Expr)]
        if len(calls) < len(stmt.body) or not all(
            isinstance(call, ast.Call) and loading.called(call) in ADDS and call in self.tracing.hooks
            for call in calls
        ):
            return False
        loop = (ast.unparse(stmt.target), ast.unparse(stmt.iter))
        for call in calls:
            hooks = self.tracing.hooks[call]
            for edit in (*hooks[0], *hooks[1]):
                edit.loops = [loop, *edit.loops]
            self._hold(hooks)
            self.findings.call(call, "lines of the traces after it")
        return True

    def _hooks_of(self, stmt: ast.With | ast.AsyncWith) -> ast.Call | None:
        found = [item.context_expr for item in stmt.items if item.context_expr in self.tracing.hooks]
        return found[0] if found and isinstance(found[0], ast.Call) else None

    def _with_hooks(self, stmt: ast.With | ast.AsyncWith) -> list[ast.stmt]:
        """``with model.hooks(...)``: its runs are traces with those hooks, and the block is not needed."""
        call = self._hooks_of(stmt)
        assert call is not None
        assert isinstance(call.func, ast.Attribute)
        lines: list[ast.stmt] = []
        for item in stmt.items:
            if item.context_expr is call and item.optional_vars is not None:
                model, name = ast.unparse(call.func.value), ast.unparse(item.optional_vars)
                self.tracing.models.add(name)
                lines += parsed([f"{name} = {model}"])
        held = self.active
        self._hold(self.tracing.hooks[call])
        self.findings.call(call, "lines of the traces inside it")
        body = self.block(stmt.body)
        self.active = held
        rest = [item for item in stmt.items if item.context_expr is not call]
        return [*lines, ast.With(rest, body)] if rest else [*lines, *body]

    # -- models --------------------------------------------------------------------------------------------

    def _is_loaded_later(self, stmt: ast.stmt, among: list[ast.stmt]) -> bool:
        return any(
            isinstance(one, ast.Expr)
            and isinstance(one.value, ast.Call)
            and loading.called(one.value) == "load_state_dict"
            and self._maker(one.value, among) is stmt
            for one in among
        )

    def _maker(self, call: ast.Call, among: list[ast.stmt]) -> ast.Assign | None:
        """The statement that made the model whose weights a call loads."""
        assert isinstance(call.func, ast.Attribute)
        name = ast.unparse(call.func.value)
        made = None
        for stmt in among:
            if isinstance(stmt, ast.Expr) and stmt.value is call:
                return made
            if isinstance(stmt, ast.Assign) and [ast.unparse(one) for one in stmt.targets] == [name]:
                made = stmt if loading.is_constructor(stmt.value) else None
            elif any(isinstance(one, ast.expr) and ast.unparse(one) == name for one in ast.walk(stmt)):
                made = None
        return None

    def _made_before(self, call: ast.Call, among: list[ast.stmt]) -> list[ast.stmt] | None:
        made = self._maker(call, among)
        if made is None or not call.args:
            return None
        assert isinstance(made.value, ast.Call)
        weights = self.visit(call.args[0])
        source = self.visit_children(copy.deepcopy(made.value))
        model = loading.loaded(source, self.needed, self.findings, weights)
        return [ast.Assign([copy.deepcopy(made.targets[0])], model)]
