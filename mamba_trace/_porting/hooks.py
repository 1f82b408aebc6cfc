"""What a hook function does, written at the site it is hooked to.

``fn(value, hook)`` becomes an assignment: the body of a simple function with ``value`` replaced by the site's
``.output``, or else a call of the function. A body is written out only where each of its names means the same
at the place of the call as inside the function.
"""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field

from .names import Name
from .scope import Comprehension, Function, Scopes

Def = ast.FunctionDef | ast.Lambda
#: Methods and functions that return None: a lambda of one of them replaces nothing.
RETURN_NONE = {"append", "extend", "update", "add", "print", "insert", "setdefault", "__setitem__"}
PARTIAL = {"partial", "functools.partial"}


@dataclass
class HookFn:
    """A hook function of a script.

    Attributes:
        source: how the script calls it.
        function: its definition, or ``None`` where it is not in the script.
        bound: arguments that ``partial`` or a default gives it.
        value: the name of the parameter that takes the value.
        hook: the name of the one that takes the hook.
    """

    source: str
    function: Def | None = None
    bound: dict[str, ast.expr] = field(default_factory=dict)
    value: str = ""
    hook: str | None = None

    @property
    def body(self) -> list[ast.stmt]:
        """Its statements, without a docstring."""
        assert self.function is not None
        if isinstance(self.function, ast.Lambda):
            return [ast.Return(self.function.body)]
        body = self.function.body
        docstring = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        return body[1:] if docstring else body

    @property
    def returns(self) -> str:
        """Whether it returns a value: ``"always"``, ``"never"`` or ``"maybe"``."""
        if self.function is None:
            return "maybe"
        found = [node for stmt in self.body for node in walk_here(stmt) if isinstance(node, ast.Return)]
        values = [node.value for node in found if not is_none(node.value)]
        if not values or (len(found) == 1 and returns_none(values[0])):
            return "never"
        # What a function of the script returns is not looked for, and a condition may choose None.
        unsure = any(isinstance(node, ast.IfExp) or calls_a_name(node) for node in values)
        if unsure:
            return "maybe"
        return "always" if len(values) == len(found) and isinstance(self.body[-1], ast.Return) else "maybe"

    @property
    def uses_hook(self) -> bool:
        """Whether its result can depend on the hook it is given."""
        if self.function is None:
            return True
        used = {node.id for stmt in self.body for node in ast.walk(stmt) if isinstance(node, ast.Name)}
        return self.hook in used


def walk_here(node: ast.AST) -> list[ast.AST]:
    """The nodes below ``node``, without those of functions inside it."""
    found, todo = [], [node]
    while todo:
        one = todo.pop()
        found.append(one)
        if not isinstance(one, (*Function, ast.ClassDef)):
            todo += list(ast.iter_child_nodes(one))
    return found


def is_none(node: ast.expr | None) -> bool:
    """Whether an expression is missing or ``None``."""
    return node is None or (isinstance(node, ast.Constant) and node.value is None)


def returns_none(node: ast.expr | None) -> bool:
    """Whether an expression is a call of something that returns None."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return called in RETURN_NONE


def calls_a_name(node: ast.expr | None) -> bool:
    """Whether an expression is a call such as ``f(x)``, not ``torch.f(x)``."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def find_function(node: ast.expr, scopes: Scopes) -> HookFn:
    """The hook function of an expression: a name, a lambda, a ``partial`` of either, or anything else."""
    source = ast.unparse(node)
    inner, bound, positional = unwrapped(node, scopes)
    if not isinstance(inner, (ast.FunctionDef, ast.Lambda)):
        return HookFn(source if not isinstance(node, ast.Lambda) else f"({source})")
    if isinstance(inner, ast.FunctionDef) and inner.decorator_list:
        return HookFn(source)
    arguments = inner.args
    order = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    defaults = dict(zip(order[len(order) - len(arguments.defaults) :], arguments.defaults, strict=True))
    for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        if default is not None:
            defaults[one.arg] = default
    given = dict(zip(order, positional, strict=False)) | bound
    free = [name for name in order if name not in given]
    if not free:
        return HookFn(source)
    rest = [name for name in (*free[1:], *(one.arg for one in arguments.kwonlyargs)) if name not in given]
    hook = "hook" if "hook" in rest else rest[0] if rest and rest[0] not in defaults else None
    source = f"({source})" if isinstance(node, ast.Lambda) else source
    return HookFn(source, inner, {**defaults, **given}, free[0], hook)


def unwrapped(node: ast.expr, scopes: Scopes) -> tuple[ast.AST | None, dict[str, ast.expr], list[ast.expr]]:
    """The function under names and partials, with the keywords and positional arguments it is given."""
    if isinstance(node, ast.Name):
        value = scopes.value(node)
        if isinstance(value, ast.expr):
            return unwrapped(value, scopes)
        return value, {}, []
    if isinstance(node, ast.Call) and ast.unparse(node.func) in PARTIAL and node.args:
        inner, bound, positional = unwrapped(node.args[0], scopes)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg is not None}
        if len(keywords) != len(node.keywords) or any(isinstance(one, ast.Starred) for one in node.args):
            return None, {}, []
        return inner, {**bound, **keywords}, [*positional, *node.args[1:]]
    return (node if isinstance(node, ast.Lambda) else None), {}, []


# -- lines of a trace --------------------------------------------------------------------------------------


def lines_of(fn: HookFn, site: str, name: Name | str, at: ast.AST, scopes: Scopes) -> list[str]:
    """What a hook does to ``site`` (``model.layers[0].ssm.y.output``), as lines of a trace.

    Args:
        fn: the hook function.
        site: the value it is given, as an expression that can be assigned to.
        name: the hook name it is called with, or the variable that holds it.
        at: the call in whose place the lines will stand.
        scopes: the script's.
    """
    hook_name: str
    layer: str | None
    if isinstance(name, str):
        hook_name, layer = name, f"int({name}.split('.')[1])"
    else:
        hook_name, layer = name.source, name.layer
    inlined = inline(fn, site, hook_name, layer, at, scopes)
    if inlined is not None:
        return inlined
    argument = "None"
    if fn.uses_hook:
        layers = "" if layer is None else f", layer=lambda: {layer}"
        argument = f"SimpleNamespace(name={hook_name}{layers})"
    call = f"{fn.source}({site}, hook={argument})"
    if fn.returns == "always":
        return [f"{site} = {call}"]
    if fn.returns == "never":
        return [call]
    return [f"edited = {call}", "if edited is not None:", f"    {site} = edited"]


def inline(
    fn: HookFn, site: str, hook_name: str, layer: str | None, at: ast.AST, scopes: Scopes
) -> list[str] | None:
    """The body of a simple hook function, written for one site; ``None`` where it has to be called."""
    if fn.function is None or fn.returns == "maybe" or not is_simple(fn) or not same_names(fn, at, scopes):
        return None
    body, given = fn.body, dict(fn.bound)
    local = {name for name in assigned(fn) if name != fn.value}
    if any(name in given for name in local):
        return None
    used = [node.id for stmt in body for node in ast.walk(stmt) if isinstance(node, ast.Name)]
    for name, value in given.items():
        plain = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp)
        if used.count(name) > 1 and not isinstance(value, plain):
            return None
    renamed = {name: ast.Name(free_name(name, at, scopes)) for name in local}
    replacer = Replacer({**given, **renamed, fn.value: expression(site)}, fn.hook, hook_name, layer)
    lines: list[str] = []
    for stmt in body:
        if isinstance(stmt, ast.Return):
            whole = isinstance(stmt.value, ast.Name) and stmt.value.id == fn.value
            if stmt.value is None or is_none(stmt.value) or whole:
                continue
            new = replacer.visit(copy.deepcopy(stmt.value))
            lines.append(ast.unparse(new) if fn.returns == "never" else f"{site} = {ast.unparse(new)}")
        elif not isinstance(stmt, ast.Pass):
            lines.append(ast.unparse(ast.fix_missing_locations(replacer.visit(copy.deepcopy(stmt)))))
    return None if replacer.failed else lines


def is_simple(fn: HookFn) -> bool:
    """Whether a body is assignments and calls one after another, and says what becomes of the value."""
    assert fn.function is not None
    arguments, body = fn.function.args, fn.body
    parameters = {one.arg for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    unknown = parameters - set(fn.bound) - {fn.value, fn.hook}
    if unknown or arguments.vararg or arguments.kwarg or len(body) > 6:
        return False
    for index, stmt in enumerate(body):
        if not isinstance(stmt, (ast.Assign, ast.AugAssign, ast.Expr, ast.Pass, ast.Return)):
            return False
        if isinstance(stmt, ast.Return) and index != len(body) - 1:
            return False
        unusual = (*Function, *Comprehension, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)
        if any(isinstance(node, unusual) for node in ast.walk(stmt)):
            return False
    last = body[-1]
    kept = isinstance(last, ast.Return) and isinstance(last.value, ast.Name) and last.value.id == fn.value
    rebound = any(fn.value in assigned_by(stmt) for stmt in body if isinstance(stmt, ast.Assign))
    # A parameter that is assigned to and not returned changes nothing: such a function is called as it is.
    return kept or not rebound


def assigned_by(stmt: ast.stmt) -> set[str]:
    """The names that a statement assigns to."""
    return {
        node.id for node in ast.walk(stmt) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def assigned(fn: HookFn) -> set[str]:
    """The names that a body assigns to."""
    return set().union(*(assigned_by(stmt) for stmt in fn.body)) if fn.body else set()


def same_names(fn: HookFn, at: ast.AST, scopes: Scopes) -> bool:
    """Whether the names a body takes from outside are the same ones at the place of the call."""
    own = {fn.value, fn.hook, *fn.bound, *assigned(fn)}
    for stmt in fn.body:
        for node in ast.walk(stmt):
            if isinstance(node, ast.Name) and node.id not in own:
                inside = scopes.owner(node.id, node)
                if inside is not scopes.owner(node.id, at):
                    return False
    return True


def free_name(name: str, at: ast.AST, scopes: Scopes) -> str:
    """``name``, with underscores where it means something else at the place of the call."""
    while scopes.owner(name, at) is not None:
        name += "_"
    return name


def expression(source: str) -> ast.expr:
    """The expression that source says."""
    return ast.parse(source, mode="eval").body


class Replacer(ast.NodeTransformer):
    """Writes other expressions in place of parameters, ``hook.name`` and ``hook.layer()``."""

    def __init__(
        self, given: dict[str, ast.expr], hook: str | None, hook_name: str, layer: str | None
    ) -> None:
        self.given, self.hook, self.hook_name, self.layer = given, hook, hook_name, layer
        self.failed = False

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id == self.hook:
            self.failed = True
        return copy.deepcopy(self.given.get(node.id, node))

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if self._is_hook(node.value) and node.attr == "name":
            return expression(self.hook_name)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        function = node.func
        if isinstance(function, ast.Attribute) and self._is_hook(function.value) and function.attr == "layer":
            self.failed = self.failed or self.layer is None
            return expression(self.layer or "None")
        return self.generic_visit(node)

    def _is_hook(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self.hook
