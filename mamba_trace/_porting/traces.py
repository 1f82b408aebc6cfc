"""Edits and reads in any order become the lines of one trace, where sites are asked for in execution order.

Where layers and positions are numbers, or one variable in all of them, they are sorted here. Where that
cannot be known before the run, the lines go through `model.hook_names` in order and pick: that is always
right.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from ..errors import UnknownSiteError
from ..sites import SITES
from .hooks import PARTIAL, HookFn, find_function, lines_of
from .names import Name, name_of, read_name
from .scope import Scopes

Loop = tuple[str, str]


@dataclass
class Edit:
    """One entry of a list of hooks.

    Attributes:
        name: its hook name, or ``None`` where it is chosen by a test or the list is not known.
        fn: the hook function.
        at: the call whose place the trace takes.
        test: whether it is hooked to a place, as an expression of ``{name}``.
        loops: the loops of a comprehension around it: (target, iterable).
        listing: a list of hooks that is made when the script runs.
        keeps: where it only saves the value, the variable that keeps it.
        suffix: what follows the value that is kept.
    """

    name: Name | None
    fn: HookFn
    at: ast.AST
    test: str = ""
    loops: list[Loop] = field(default_factory=list)
    listing: str = ""
    keeps: str = ""
    suffix: str = ".save()"

    def lines(self, site: str, name: Name | str, scopes: Scopes) -> list[str]:
        """What it does to a site."""
        if self.keeps:
            return [f"{self.keeps} = {site}{self.suffix}"]
        return lines_of(self.fn, site, name, self.at, scopes)


@dataclass
class Read:
    """A key that a cache is read by.

    Attributes:
        name: its hook name, or ``None`` where it is chosen by a test.
        test: the test, as an expression of ``{name}``.
    """

    name: Name | None
    test: str = ""


# -- what a list of hooks says -----------------------------------------------------------------------------


def read_hooks(
    node: ast.expr | None, at: ast.AST, scopes: Scopes, failed: list[tuple[ast.expr, str]]
) -> list[Edit]:
    """The entries of a ``fwd_hooks`` or ``bwd_hooks`` argument; names that are no place go to ``failed``."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return []
    whole = scopes.expression(node)
    if isinstance(whole, ast.BinOp) and isinstance(whole.op, ast.Add):
        return [edit for side in (whole.left, whole.right) for edit in read_hooks(side, at, scopes, failed)]
    if isinstance(whole, (ast.ListComp, ast.GeneratorExp)):
        loops = [(ast.unparse(one.target), ast.unparse(one.iter)) for one in whole.generators]
        pair = scopes.expression(whole.elt)
        plain = not any(one.ifs for one in whole.generators)
        late = late_bound(whole.elt, whole, scopes)
        if late:
            reason = f"its lambda sees the last {late} only, the trace sees each: give it {late}={late}"
            failed.append((whole.elt, reason))
        if plain and isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
            return read_pair(pair, whole.elt, scopes, loops, failed)
    if isinstance(whole, (ast.List, ast.Tuple)):
        edits: list[Edit] = []
        for one in whole.elts:
            pair = scopes.expression(one)
            if isinstance(one, ast.Starred):
                edits += read_hooks(one.value, at, scopes, failed)
            elif isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                edits += read_pair(pair, at, scopes, [], failed)
            else:
                edits.append(Edit(None, HookFn("function"), at, listing=f"[{ast.unparse(one)}]"))
        return edits
    return [Edit(None, HookFn("function"), at, listing=ast.unparse(node))]


def late_bound(pair: ast.expr, comprehension: ast.AST, scopes: Scopes) -> str:
    """A variable of a comprehension that a lambda in it looks up when it is called, or nothing."""
    for function in ast.walk(pair):
        if isinstance(function, ast.Lambda):
            for node in ast.walk(function.body):
                if isinstance(node, ast.Name) and scopes.owner(node.id, node) is comprehension:
                    return node.id
    return ""


def read_pair(
    pair: ast.Tuple, at: ast.AST, scopes: Scopes, loops: list[Loop], failed: list[tuple[ast.expr, str]]
) -> list[Edit]:
    """The edits of one ``(name, function)``."""
    fn = find_function(pair.elts[1], scopes)
    test = predicate(pair.elts[0], scopes)
    if test is not None:
        return [Edit(None, fn, at, test, loops)]
    try:
        name = read_name(pair.elts[0], scopes)
    except UnknownSiteError as error:
        failed.append((pair.elts[0], str(error)))
        return []
    return [Edit(name or name_of([pair.elts[0]]), fn, at, "", loops)]


def predicate(node: ast.expr, scopes: Scopes) -> str | None:
    """A function of a hook name as a condition on ``{name}``; ``None`` for what is no function."""
    found = scopes.expression(node)
    if isinstance(found, ast.Lambda) and len(found.args.args) == 1:
        variable = found.args.args[0].arg
        return template(found.body, variable)
    value = scopes.value(node) if isinstance(node, ast.Name) else None
    if isinstance(value, ast.FunctionDef):
        return f"{ast.unparse(node)}({{name}})"
    if isinstance(found, ast.Call) and ast.unparse(found.func) in PARTIAL:
        return escaped(ast.unparse(found)) + "({name})"
    return None


def escaped(text: str) -> str:
    """Source as a part of a format string."""
    return text.replace("{", "{{").replace("}", "}}")


def template(node: ast.expr, variable: str) -> str:
    """An expression as a format string, with ``{name}`` for one of its variables."""
    marker = "_the_name_of_the_hook_"
    source = ast.unparse(node)
    tree = ast.parse(source, mode="eval")
    for one in ast.walk(tree):
        if isinstance(one, ast.Name) and one.id == variable:
            one.id = marker
    return escaped(ast.unparse(tree)).replace(marker, "{name}")


# -- edits -------------------------------------------------------------------------------------------------


def edit_lines(model: str, edits: list[Edit], scopes: Scopes) -> list[str]:
    """The lines that do what hooks do, in execution order."""
    ordered = in_order(edits, scopes)
    if ordered is None:
        return picked(model, edits, [], scopes, "", "")
    lines: list[str] = []
    open_loops: list[Loop] = []
    for edit in ordered:
        if edit.loops != open_loops:
            lines += [f"{'    ' * i}for {t} in {ascending(it)}:" for i, (t, it) in enumerate(edit.loops)]
            open_loops = edit.loops
        assert edit.name is not None
        done = edit.lines(f"{model}.{edit.name.path}.output", edit.name, scopes)
        lines += indented(done, len(edit.loops))
    return lines


def in_order(edits: list[Edit], scopes: Scopes) -> list[Edit] | None:
    """Edits in execution order; ``None`` where only the run can say it."""
    named = [(edit, edit.name) for edit in edits if edit.name is not None]
    if len(named) < len(edits):
        return None
    if len(named) == 1 and not named[0][0].loops:
        return edits
    keys: list[tuple[tuple, Edit]] = []
    bases: dict[str, set] = {"layer": set(), "loops": set()}
    for edit, name in named:
        if name.place is None:
            return None
        layer, layer_offset = offset(name.layer_node, scopes)
        position, position_offset = offset(name.position_node, scopes)
        if name.place.layer is not None:
            bases["layer"].add(layer)
            bases["loops"].add(tuple(edit.loops))
            bases.setdefault(f"h{layer_offset}", set())
            if name.position is not None:
                bases[f"h{layer_offset}"].add((position, position_offset < 0 and not position))
        elif edit.loops:
            return None
        keys.append(((phase(name), layer_offset, name.rank, position_offset), edit))
    if any(len(base) > 1 for base in bases.values()) or not loops_go_up(named, scopes):
        return None
    return [edit for _, edit in sorted(keys, key=lambda pair: pair[0])]


def loops_go_up(named: list[tuple[Edit, Name]], scopes: Scopes) -> bool:
    """Whether loops around edits visit places in execution order, if their iterables ascend."""
    looped = [(edit, name) for edit, name in named if edit.loops]
    for edit, name in looped:
        variables = [target for target, _ in edit.loops]
        if len(looped) > 1 and variables != [name.layer]:
            return False
        if variables not in ([name.layer], [name.position], [name.layer, name.position]):
            return False
        position = offset(name.position_node, scopes)[0]
        if variables == [name.layer] and name.position is not None and position == name.layer:
            return False
    return True


def phase(name: Name) -> int:
    """0 before the layers, 1 in them, 2 after them."""
    assert name.place is not None
    if name.place.layer is not None:
        return 1
    return 0 if name.place.site is SITES[0] else 2


def offset(node: ast.expr | int | None, scopes: Scopes) -> tuple[str, int]:
    """``layer + 2`` -> ``("layer", 2)``, ``3`` -> ``("", 3)``."""
    if node is None or isinstance(node, int):
        return "", node or 0
    known = scopes.number(node)
    if known is not None:
        return "", known
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
        shift = scopes.number(node.right)
        if shift is not None:
            return ast.unparse(node.left), shift if isinstance(node.op, ast.Add) else -shift
    return ast.unparse(node), 0


def ascending(iterable: str) -> str:
    """An iterable of numbers in ascending order: itself where it is a plain range."""
    tree = ast.parse(iterable, mode="eval").body
    if isinstance(tree, ast.Call) and ast.unparse(tree.func) == "range" and len(tree.args) < 3:
        return iterable
    return f"sorted({iterable})"


def picked(
    model: str, edits: list[Edit], reads: list[Read], scopes: Scopes, cache: str, suffix: str
) -> list[str]:
    """Lines that go through all the hook names in order, and edit and read at those that are wanted."""
    used = {node.id for edit in edits for node in ast.walk(edit.at) if isinstance(node, ast.Name)}
    name = "name" if "name" not in used else "hook_name"
    site = f"{model}.hook({name}).output"
    lines = [f"for {name} in {model}.hook_names({model}.embeddings.output.shape[1]):"]
    for edit in edits:
        if edit.listing:
            done = edit.lines(site, name, scopes)
            test = f"wanted({name}) if callable(wanted) else wanted == {name}"
            lines += [f"    for wanted, function in {edit.listing}:", f"        if {test}:"]
            lines += indented(done, 3)
            continue
        loops = [f"for {target} in {iterable}:" for target, iterable in edit.loops]
        lines += [f"{'    ' * depth}{loop}" for depth, loop in enumerate(loops, start=1)]
        lines += indented([f"if {test_of(edit.name, edit.test, name)}:"], 1 + len(loops))
        lines += indented(edit.lines(site, name, scopes), 2 + len(loops))
    tests = list(dict.fromkeys(read_test(read, name, scopes) for read in reads))
    if "True" in tests:
        lines.append(f"    {cache}[{name}] = {site}{suffix}")
    elif tests:
        test = " or ".join(f"({one})" if " or " in one or " if " in one else one for one in tests)
        lines += [f"    if {test}:", f"        {cache}[{name}] = {site}{suffix}"]
    return lines


def test_of(name: Name | None, test: str, variable: str) -> str:
    """The condition that a variable holds a wanted hook name."""
    return test.format(name=variable) if name is None else f"{variable} == {name.hook_name or name.source}"


def read_test(read: Read, variable: str, scopes: Scopes) -> str:
    """The condition that a variable holds a name a cache is read by, whose own variables do not exist yet."""
    if read.name is None:
        return read.test.format(name=variable)
    place = read.name.place
    assert place is not None
    assert place.site is not None
    layer, position = (
        node if node is None or isinstance(node, int) else scopes.number(node)
        for node in (read.name.layer_node, read.name.position_node)
    )
    hook = place.site.hook
    if place.position is not None:
        start, end = ("." if layer is None else f"blocks.{layer}.") + f"{hook}.", position
        if layer is None:
            return f"{start!r} in {variable}" if end is None else f"{variable}.endswith({f'{start}{end}'!r})"
        return f"{variable}.startswith({start!r})" if end is None else f"{variable} == {f'{start}{end}'!r}"
    if place.layer is not None and layer is None:
        return f"{variable}.endswith({f'.{hook}'!r})"
    return f"{variable} == {place.site.hook_name(layer)!r}"


def indented(lines: list[str], depth: int) -> list[str]:
    """Lines, moved to the right."""
    return [("    " * depth + line) for text in lines for line in text.splitlines()]
