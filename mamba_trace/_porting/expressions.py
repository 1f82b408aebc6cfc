"""Expressions of a script as they are here: runs, loading, conversion, names.

A trace is a block and no expression, so a run inside an expression leaves its trace in `before` and the
variable that it saves in the place of the call.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field

from ..errors import UnknownSiteError
from . import loading
from .calls import Tracing
from .findings import Findings
from .gathered import Hooks
from .generation import generated
from .names import read_name
from .runs import Run
from .scope import Scopes

#: Methods that put a beginning-of-sequence token before a string where they are not told.
PREPENDING = ("to_tokens", "to_str_tokens")
#: Methods that a MambaTrace has under the same names.
SAME = ("to_tokens", "to_string", "to_str_tokens", "to_single_token")


@dataclass
class Expressions(ast.NodeTransformer):
    """Rewrites expressions.

    Attributes:
        needed: names that the port imports.
        dropped: names that the script imports from the libraries.
        consumed: names that are used to say which hooks there are.
        active: hooks that hold for the runs that follow.
        before: statements that come before the one that is being rewritten.
        depth: how many lambdas, comprehensions and tests of loops are around the expression.
        library: the first import of the libraries.
    """

    scopes: Scopes
    findings: Findings
    tracing: Tracing
    needed: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    consumed: set[str] = field(default_factory=set)
    active: Hooks = field(default_factory=lambda: ([], []))
    before: list[ast.stmt] = field(default_factory=list)
    depth: int = 0
    library: ast.stmt | None = None

    def _mentions(self, node: ast.expr) -> bool:
        """Whether an annotation names something of the libraries, which is not imported any more."""
        return any(isinstance(one, ast.Name) and one.id in self.dropped for one in ast.walk(node))

    def visit_children(self, node: ast.Call) -> ast.Call:
        """A call with its arguments rewritten."""
        node.args = [self.visit(one) for one in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        run = self.tracing.run(node)
        if run is not None:
            return self._run(run)
        name = loading.called(node)
        if name == "get_act_name":
            return self._act_name(node)
        receiver = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name == "generate" and receiver in self.tracing.models:
            return self._generated(node, receiver)
        node.func = self.visit(node.func)
        node = self.visit_children(node)
        if loading.is_loader(node) or loading.is_constructor(node):
            return loading.loaded(node, self.needed, self.findings)
        if name in loading.CONVERTERS:
            return loading.converted(node, self.needed, self.findings)
        if name in loading.CONFIGS:
            self.findings.call(node, "dict(...)")
            return ast.Call(ast.Name("dict"), node.args, node.keywords)
        if name == "to_numpy" and len(node.args) == 1 and self._mentions(node.func):
            new = ast.parse(f"({ast.unparse(node.args[0])}).detach().cpu().numpy()", mode="eval").body
            self.findings.call(node, ast.unparse(new))
            return new
        if name in SAME and isinstance(node.func, ast.Attribute):
            return self._tokens(node, name) if receiver in self.tracing.models else node
        if self._mentions(node.func):
            self.findings.problem(node, "a function of the library that has no counterpart here")
        return node

    def _tokens(self, node: ast.Call, name: str) -> ast.expr:
        """A call about tokens: the same here, but for the token that the libraries put first."""
        if name not in PREPENDING or any(keyword.arg == "prepend_bos" for keyword in node.keywords):
            self.findings.call(node, ast.unparse(node), "the same here")
            return node
        new = ast.Call(node.func, node.args, [*node.keywords, ast.keyword("prepend_bos", ast.Constant(True))])
        self.findings.call(node, ast.unparse(new), "what it does there unless told otherwise")
        return new

    def _generated(self, node: ast.Call, model: str) -> ast.expr:
        """``model.generate(...)``."""
        given = [*node.args[:1], *(one.value for one in node.keywords if one.arg == "input")]
        is_text = not given or self.tracing.is_text(given[0])
        if self.active[0] or self.active[1]:
            self.findings.problem(
                node,
                "the hooks that are set run at every step of it: write their lines below "
                "`with model.generate(...) as tracer:`, in `for step in tracer.iter[:]:`",
            )
        original = copy.deepcopy(node)
        return generated(self.visit_children(node), original, model, is_text, self.findings)

    def _act_name(self, node: ast.Call) -> ast.expr:
        try:
            name = read_name(node, self.scopes)
        except UnknownSiteError:
            name = None
        return node if name is None else ast.parse(name.source, mode="eval").body

    def _run(self, run: Run) -> ast.expr:
        """A run inside an expression."""
        if self.depth:
            self.findings.problem(
                run.node, "a run inside a comprehension, a lambda or the test of a loop: a trace is a block"
            )
            return run.node
        out = self.tracing.fresh("logits" if run.returns in ("", "logits") else run.returns)
        cache = self.tracing.fresh("cache") if run.kind == "run_with_cache" else ""
        before = self.before
        self.before = [*before, *self._trace(run, out, cache)]
        value = f"({out}, {cache})" if cache else out if run.returns else "None"
        return ast.parse(value, mode="eval").body

    def _trace(self, run: Run, out: str, cache: str) -> list[ast.stmt]:
        held, self.before = self.before, []
        for name in ("input", "tokens"):
            if name in run.arguments:
                run.arguments[name] = self.visit(run.arguments[name])
        inner, self.before = self.before, held
        lines = self.tracing.trace(run, self.active, out, cache)
        if any("SimpleNamespace" in line for line in lines):
            self.needed.add("SimpleNamespace")
        return [*inner, *parsed(lines)]

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self._deeper(node)

    def _deeper(self, node: ast.AST) -> ast.AST:
        self.depth += 1
        node = self.generic_visit(node)
        self.depth -= 1
        return node

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _deeper


def parsed(lines: list[str]) -> list[ast.stmt]:
    """Lines of source as statements."""
    return ast.parse("\n".join(lines)).body
