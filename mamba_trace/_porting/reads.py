"""Which places a script reads from its cache, and the lines of a trace that read them in execution order.

A cache is filled before it is read, so the variables of the loops that read it do not exist yet: what varies
in a key is read at every layer, or every position.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from itertools import groupby

from ..errors import UnknownSiteError
from .hooks import HookFn
from .names import Name, read_name, written
from .scope import Scopes
from .traces import Edit, Read, indented, phase, predicate

Failures = list[tuple[ast.expr, str]]
EVERYTHING = Read(None, "True")


# -- what is read ------------------------------------------------------------------------------------------


def filtered(node: ast.expr, scopes: Scopes, failed: Failures) -> list[Read] | None:
    """What a ``names_filter`` lets through; ``None`` if it is None."""
    test = predicate(node, scopes)
    if test is not None:
        return [Read(None, test)]
    whole = scopes.expression(node)
    if isinstance(whole, ast.Constant) and whole.value is None:
        return None
    if isinstance(whole, (ast.List, ast.Tuple, ast.Set)):
        return [read for one in whole.elts for read in (filtered(one, scopes, failed) or [])]
    if isinstance(whole, (ast.ListComp, ast.SetComp)):
        return keyed(whole.elt, scopes, failed, {})
    try:
        name = read_name(whole, scopes)
    except UnknownSiteError as error:
        failed.append((whole, str(error)))
        return []
    if name is None:  # a list made when the script runs, or a name that is one
        return [Read(None, f"{{name}} in {ast.unparse(node)}")]
    return [Read(name)] if name.place is not None else [EVERYTHING]


def used_keys(
    variable: str, scopes: Scopes, hooked: dict[ast.AST, list[Edit]], failed: Failures
) -> tuple[list[Read], list[ast.AST]]:
    """What is read from a cache by its name anywhere in the script, and the uses that do not say."""
    reads: list[Read] = []
    unknown: list[ast.AST] = []
    for node in ast.walk(scopes.tree):
        if not (isinstance(node, ast.Name) and node.id == variable and isinstance(node.ctx, ast.Load)):
            continue
        above = scopes.parents[node]
        found = None
        if isinstance(above, ast.Subscript) and above.value is node:
            found = keyed(above.slice, scopes, failed, hooked)
            if found and any(read.test == "True" for read in found):
                found = None
        if found is None:
            unknown.append(above)
        else:
            reads += found
    return reads, unknown


def keyed(
    key: ast.expr, scopes: Scopes, failed: Failures, hooked: dict[ast.AST, list[Edit]]
) -> list[Read] | None:
    """The reads of one key; ``None`` where it is not known."""
    if isinstance(key, ast.Attribute) and key.attr == "name" and isinstance(key.value, ast.Name):
        return hooked_names(key.value, scopes, hooked)
    if isinstance(key, ast.Name):
        found = listed(key, scopes, failed)
        if found is not None:
            return found
    try:
        name = read_name(key, scopes)
    except UnknownSiteError as error:
        failed.append((key, str(error)))
        return []
    return None if name is None or name.place is None else [Read(name)]


def hooked_names(hook: ast.Name, scopes: Scopes, hooked: dict[ast.AST, list[Edit]]) -> list[Read] | None:
    """The places that the function around ``hook.name`` is hooked to."""
    function = scopes.owner(hook.id, hook)
    edits = hooked.get(function, []) if function is not None else []
    if not edits or any(edit.listing for edit in edits):
        return None
    reads = [Read(edit.name, edit.test) for edit in edits]
    return None if any(read.name is not None and read.name.place is None for read in reads) else reads


def listed(key: ast.Name, scopes: Scopes, failed: Failures) -> list[Read] | None:
    """The reads of a key that goes through a list of names in a loop."""
    found = scopes.binding(key.id, key)
    if found is None or not isinstance(found.node, (ast.For, ast.ListComp, ast.DictComp, ast.GeneratorExp)):
        return None
    loops = [found.node] if isinstance(found.node, ast.For) else found.node.generators
    loop = next(one for one in loops if ast.unparse(one.target) == key.id) if loops else None
    names = scopes.expression(loop.iter) if loop is not None else None
    if not isinstance(names, (ast.List, ast.Tuple)):
        return None
    reads = [keyed(one, scopes, failed, {}) for one in names.elts]
    return None if None in reads else [read for some in reads for read in some or []]


# -- lines of a trace --------------------------------------------------------------------------------------


@dataclass
class Slot:
    """A read with its layer and position as numbers, or ``None`` for every one of them."""

    read: Read
    name: Name
    layer: int | None
    position: int | None

    @property
    def has_layer(self) -> bool:
        return self.name.place is not None and self.name.place.layer is not None

    @property
    def has_position(self) -> bool:
        return self.name.place is not None and self.name.place.position is not None

    def line(self, model: str, cache: str, layer: str, position: str, suffix: str) -> str:
        """The line that reads it; ``layer`` and ``position`` are the variables of the loops around it."""
        place = self.name.place
        assert place is not None
        layer = layer if self.layer is None else str(self.layer)
        position = position if self.position is None else str(self.position)
        path = f"layers[{layer}].ssm.{place.native}" if place.site is None else place.site.path(layer)  # type: ignore[arg-type]
        path += f"[{position}]" if self.has_position else ""
        numbers = {place.layer: layer, place.position: position}
        parts: list[str | ast.expr] = []
        slots = {id(part): number for number, part in self.name.slots.items()}
        for part in self.name.parts:
            whole = part if isinstance(part, str) else numbers[slots[id(part)]]
            parts.append(whole if isinstance(part, str) or not whole.isidentifier() else ast.Name(whole))
        key = written(parts)
        if place.site is not None and not place.site.axes.startswith("B"):
            suffix = suffix.removeprefix("[0]")
        return f"{cache}[{key}] = {model}.{path}.output{suffix}"


def read_lines(
    model: str, cache: str, reads: list[Read], scopes: Scopes, suffix: str, layers: str, taken: str
) -> list[str]:
    """The lines that read places into a dict, in execution order.

    Args:
        model: the model, as an expression.
        cache: the variable of the dict.
        reads: what is read, each at a known site.
        scopes: the script's.
        suffix: what follows ``.output``.
        layers: the layers that run, as an iterable of their numbers.
        taken: source whose names must keep their meaning.
    """
    names = {node.id for node in ast.walk(ast.parse(taken)) if isinstance(node, ast.Name)}
    layer, position = (one if one not in names else f"{one}_" for one in ("layer", "position"))
    slots = distinct([slot_of(read, scopes) for read in reads])
    before = [one for one in slots if phase(one.name) == 0]
    after = [one for one in slots if phase(one.name) == 2]
    inside = [one for one in slots if phase(one.name) == 1]
    needs_length = any(len(some) and loops_positions(some) for some in by_layer(inside))
    length = "n_positions" if "n_positions" not in names else "n_positions_"
    lines = [f"{length} = {model}.embeddings.output.shape[1]"] if needs_length else []
    lines += [one.line(model, cache, layer, position, suffix) for one in before]
    for group in by_layer(inside):
        every = loops_layers(group)
        if every:
            lines.append(f"for {layer} in {layers}:")
        body = block_lines(model, cache, group, (layer, position, length), suffix)
        lines += indented(body, int(every))
    return lines + [one.line(model, cache, layer, position, suffix) for one in after]


def block_lines(
    model: str, cache: str, slots: list[Slot], variables: tuple[str, str, str], suffix: str
) -> list[str]:
    """The reads of one layer, or of every layer in turn."""
    layer, position, length = variables
    lines: list[str] = []
    loop = loops_layers(slots)
    slots = sorted(slots, key=lambda one: (one.name.rank, one.position or 0))
    for of_state, group in groupby(slots, key=lambda one: one.has_position):
        some = list(group)
        if not (of_state and loops_positions(some)):
            for one in some:
                guarded = loop and one.layer is not None
                lines += [f"if {layer} == {one.layer}:"] if guarded else []
                lines += indented([one.line(model, cache, layer, position, suffix)], int(guarded))
            continue
        lines.append(f"for {position} in range({length}):")
        for one in some:
            tests = [f"{layer} == {one.layer}"] if loop and one.layer is not None else []
            if one.position is not None:
                at = str(one.position) if one.position >= 0 else f"{length} - {-one.position}"
                tests.append(f"{position} == {at}")
            lines += [f"    if {' and '.join(tests)}:"] if tests else []
            lines += indented([one.line(model, cache, layer, position, suffix)], 2 if tests else 1)
    return lines


def by_layer(slots: list[Slot]) -> list[list[Slot]]:
    """Slots of numbered layers, layer by layer; one group where a layer is every layer."""
    if loops_layers(slots):
        return [slots]
    ordered = sorted(slots, key=lambda one: one.layer or 0)
    return [list(group) for _, group in groupby(ordered, key=lambda one: one.layer)]


def loops_layers(slots: list[Slot]) -> bool:
    """Whether some slot is of every layer."""
    return any(one.has_layer and one.layer is None for one in slots)


def loops_positions(slots: list[Slot]) -> bool:
    """Whether the positions of reads of the state can only be put in order while they are gone through."""
    positions = [one.position for one in slots if one.has_position]
    if len(set(positions)) < 2 and None not in positions:
        return False
    signs = {one is None or one < 0 for one in positions}
    return None in positions or len(signs) > 1


def as_edits(cache: str, reads: list[Read], at: ast.AST, scopes: Scopes, suffix: str) -> list[Edit] | None:
    """Reads as entries beside hooks; ``None`` where one is of every layer or position."""
    edits: list[Edit] = []
    for read in reads:
        if read.name is None or read.name.place is None:
            return None
        one = slot_of(read, scopes)
        if (one.has_layer and one.layer is None) or (one.has_position and one.position is None):
            return None
        target, _, value = one.line("model", cache, "layer", "position", suffix).partition(" = ")
        edits.append(Edit(read.name, HookFn(""), at, keeps=target, suffix=value.partition(".output")[2]))
    return edits


def slot_of(read: Read, scopes: Scopes) -> Slot:
    """A read with what is known of its numbers."""
    assert read.name is not None
    place = read.name.place
    assert place is not None
    return Slot(
        read, read.name, number(read.name, place.layer, scopes), number(read.name, place.position, scopes)
    )


def number(name: Name, value: int | None, scopes: Scopes) -> int | None:
    """A layer or position, if the script says which."""
    if value is None or value not in name.slots:
        return value
    return scopes.number(name.slots[value])


def distinct(slots: list[Slot]) -> list[Slot]:
    """Slots without repetitions, and without those that another reads at every layer or position."""
    kept: list[Slot] = []
    for one in slots:
        same = [other for other in slots if other is not one and covers(other, one)]
        if not any(not covers(one, other) or other in kept for other in same):
            kept.append(one)
    return kept


def covers(wide: Slot, narrow: Slot) -> bool:
    """Whether one slot reads all that another does, under the same keys."""
    ours, theirs = wide.name.place, narrow.name.place
    assert ours is not None
    assert theirs is not None
    if (ours.site, ours.native) != (theirs.site, theirs.native):
        return False
    if spelling(wide.name) != spelling(narrow.name) or wide.has_position != narrow.has_position:
        return False
    return wide.layer in (None, narrow.layer) and wide.position in (None, narrow.position)


def spelling(name: Name) -> str:
    """A hook name without its numbers: the two names of one site are two keys."""
    text = "".join(part if isinstance(part, str) else "0" for part in name.parts)
    return "".join(letter for letter in text if not letter.isdigit() and letter != "-")
