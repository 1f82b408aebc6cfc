"""What the variables and the hook names of a script stand for, found without running it.

A hook name, a function or a list of hooks is often put into a variable first. `Values` says which expression
such a variable stands for where it is assigned once, and gives up where its value may depend on the run.
`read_name` makes the string of a hook name, with a number of its own in place of each expression that varies,
and lets `names.parse` say which place that is: this module knows no name of a site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import libcst as cst
import libcst.matchers as m
from libcst import metadata

from .. import names
from ..errors import UnknownSiteError
from ..names import Place
from ..sites import STATE

#: The number that stands for the i-th expression of a name is SLOT + i: no model has so many layers.
SLOT = 900_000_000
_SLOT = re.compile(r"9000\d{5}(?!\d)")
_LOOKS_LIKE_A_NAME = re.compile(r"(blocks\.|ln_final\.|embed\.hook_|unembed\.hook_)\S+|hook_\w+")
#: The sites of which TransformerLens's Mamba-1 has the values with other axes: see `axes`.
OTHER_AXES = ("write", "h_read")
#: How a list that a variable holds is changed in place.
CHANGES = r"\b{0}(\.(append|extend|insert|remove|pop|clear|sort|reverse)\(|\[[^\]]*\] *[-+*|]?=)"


class Values:
    """The variables of a script, ``module``, whose nodes the methods take."""

    def __init__(self, module: cst.Module) -> None:
        wrapper = metadata.MetadataWrapper(module)
        self.module = wrapper.module
        self.parents = wrapper.resolve(metadata.ParentNodeProvider)
        self._positions = wrapper.resolve(metadata.PositionProvider)
        self._scopes: Any = wrapper.resolve(metadata.ScopeProvider)

    def code(self, node: cst.CSTNode) -> str:
        """The source of a node."""
        return self.module.code_for_node(node).strip()

    def start(self, node: cst.CSTNode) -> tuple[int, int]:
        """The line, from 1, and the column at which a node begins."""
        start = self._positions[node].start
        return start.line, start.column

    def around(self, node: Any) -> Iterator[Any]:
        """A node and all that it stands in, from the inside out."""
        while node is not None:
            yield node
            node = self.parents.get(node)

    def qualified(self, node: Any) -> str:
        """What an expression refers to, e.g. ``transformer_lens.utils.get_act_name``; or ``""``."""
        scope = self._scopes.get(node)
        return next((one.name for one in scope.get_qualified_names_for(node)), "") if scope else ""

    def bound(self, name: str, at: Any) -> list[metadata.Assignment]:
        """Every assignment of the variable that a name is at a node; none of a builtin."""
        scope = self._scopes.get(at) or self._scopes[self.module]
        return [one for one in scope[name] if isinstance(one, metadata.Assignment)]

    def owner(self, name: str, at: Any) -> Any:
        """The scope of the variable that a name is at a node; ``None`` for a builtin."""
        return next((one.scope for one in self.bound(name, at)), None)

    def binding(self, name: str, at: Any) -> object:
        """What gives a variable its value at a node; an object of its own where that depends on the run."""
        nodes = [one.node for one in self.bound(name, at)]
        if len(nodes) <= 1:
            return nodes[0] if nodes else name
        for loop in self.around(at):  # the variable of a loop
            inside = [node for node in nodes if loop in self.around(node)]
            if isinstance(loop, cst.For) and inside:
                alone = len(inside) == 1 and loop.target in self.around(inside[0])
                return loop if alone and loop.body in self.around(at) else object()
        return object()

    def value(self, node: Any) -> Any:
        """The expression or function that a variable stands for, where it means the same in its place."""
        bound: Any = self.binding(node.value, node) if isinstance(node, cst.Name) else None
        if isinstance(bound, cst.FunctionDef):
            return bound
        holder = self.parents.get(bound) if isinstance(bound, cst.CSTNode) else None
        holder = self.parents.get(holder) if isinstance(holder, cst.AssignTarget) else holder
        value = getattr(holder, "value", None) if isinstance(holder, (cst.Assign, cst.AnnAssign)) else None
        is_list = isinstance(value, (cst.List, cst.ListComp))
        changes = is_list and re.search(CHANGES.format(node.value), self.module.code)
        same = value is not None and self.start(value) < self.start(node) and self.same_names(value, node)
        return value if same and not changes else None

    def same_names(self, expression: Any, at: Any) -> bool:
        """Whether each variable of an expression has the same value at another node."""
        free = self.free_names(expression)
        return all(self.binding(one.value, one) == self.binding(one.value, at) for one in free)

    def free_names(self, expression: Any) -> list[Any]:
        """The variables that an expression takes from outside of it."""
        names: list[Any] = m.findall(expression, m.Name())  # type: ignore[assignment]
        names = [one for one in names if self.owner(one.value, one) is self.owner(one.value, expression)]
        above = {self.parents[one] for one in names}  # labels of which are no variables
        labels = {getattr(one, label, None) for one in above for label in ("attr", "keyword", "name")}
        return [one for one in names if one not in labels]

    def expression(self, node: Any) -> Any:
        """``node``, or the expression that it stands for where it is a variable."""
        value = self.value(node)
        return self.expression(value) if isinstance(value, cst.BaseExpression) else node


def called(node: Any) -> str:
    """The last name of what a call calls; ``""`` for what is no call."""
    function = getattr(node.func, "attr", node.func) if isinstance(node, cst.Call) else None
    return function.value if isinstance(function, cst.Name) else ""


def arguments(node: Any, *order: str) -> dict[str, Any]:
    """The arguments of a call by name, where ``order`` names the positional ones."""
    positional = [arg.value for arg in node.args if arg.keyword is None and not arg.star]
    named = {arg.keyword.value: arg.value for arg in node.args if arg.keyword is not None}
    return dict(zip(order, positional, strict=False)) | named


class WrittenName(NamedTuple):
    """A hook name as a script writes it."""

    source: str  # the name as an expression
    place: Place | None = None  # with slot numbers for what varies; ``None`` where the text does not say it
    sources: Mapping[int, str] = MappingProxyType({})  # the expression of each slot number

    @property
    def path(self) -> str:
        """What stands after ``model.``: ``layers[layer].ssm.h[pos]``, or ``hook(name)``."""
        return f"hook({self.source})" if self.place is None else filled(self.place.path, self.sources)

    @property
    def layer(self) -> str:
        """The layer, as an expression; empty for a place of the whole model, or an unknown one."""
        layer = getattr(self.place, "layer", None)
        return "" if layer is None else filled(str(layer), self.sources)

    @property
    def note(self) -> str:
        """What else to know where a name of TransformerLens 4's does not stand for the same tensor."""
        if self.turned:
            return "[B,E,L,N] in TransformerLens's Mamba-1 is [B,L,E,N] here; in Mamba-2 both have [B,L,H,P,N]"
        if getattr(getattr(self.place, "site", None), "part", ""):
            return "in hybrids"
        return "that of a Mamba-1; in a Mamba-2 it is ssm.inner_norm" if ".out_proj.hook_in" in self.source else ""

    @property
    def turned(self) -> bool:
        """Whether TransformerLens's Mamba-1 has its value with other axes."""
        return getattr(getattr(self.place, "site", None), "name", "") in OTHER_AXES

    @property
    def unlisted(self) -> bool:
        """Whether a cache keeps its value only where a names_filter has its name, and TransformerLens's always."""
        site = getattr(self.place, "site", None)
        native = getattr(self.place, "native", None) is not None
        return native or (site is not None and not site.in_mamba_lens and not site.part)

    @property
    def listed(self) -> bool:
        """Whether `model.hook_names` has it, under this name, as far as is known."""
        if self.place is None or self.place.site is None:
            return self.place is None
        if self.unlisted:
            return False
        one_state = (self.place.position is not None) == (self.place.site.name == STATE)
        return one_state and (self.place.position or 0) >= 0 and self.place.site.hook in self.source


def filled(text: str, sources: Mapping[int, str]) -> str:
    """A text with expressions in place of their slot numbers."""
    return _SLOT.sub(lambda match: sources[int(match[0])], text)


def read_name(node: Any, values: Values, layer: Any = None) -> WrittenName | None:
    """The hook name that an expression, or a short name and a layer, makes; ``None`` where it is no string.

    Raises:
        UnknownSiteError: if it names no place, or one that no site means.
    """
    slots: dict[int, Any] = {}
    text = text_of(node, values, slots) if layer is None else short_name(node, layer, values, slots)
    if text is None:
        return None
    sources = {number: values.code(one) for number, one in slots.items()}
    try:
        place: Place | None = names.parse(text)
    except UnknownSiteError as error:
        rest = re.sub(r"^blocks\.\d+\.", "", text)
        if not _SLOT.search(re.sub(rf"^hook_{STATE}\.-?\d+$", "", rest)):
            braced = {number: f"{{{one}}}" for number, one in sources.items()}
            raise UnknownSiteError(filled(str(error), braced)) from error
        place = None  # more of it varies than the layer and the position
    if place is not None and set(slots) - {place.layer, place.position}:
        place = None  # a part of a number varies, as in f"blocks.1{digit}."
    return WrittenName(written(text, sources), place, sources)


def written(text: str, sources: dict[int, str]) -> str:
    """The source of a string in which expressions stand for slot numbers."""
    if _SLOT.fullmatch(text):
        return sources[int(text)]
    quoted = '"' + text.replace("\\", r"\\").replace('"', r"\"") + '"'
    if any(character in one for one in sources.values() for character in "\"'\\{}#\n!:="):
        ordered = [sources[int(number)] for number in _SLOT.findall(text)]  # none can be in an f-string
        return f"{_SLOT.sub('{}', quoted)}.format({', '.join(ordered)})"
    return "f" * bool(sources) + filled(quoted, {number: f"{{{one}}}" for number, one in sources.items()})


def text_of(node: Any, values: Values, slots: dict[int, Any]) -> str | None:
    """The string that an expression makes, with slot numbers; ``None`` where none is seen."""
    node = values.expression(node)
    if isinstance(node, cst.BaseString) and isinstance(getattr(node, "evaluated_value", None), str):
        return node.evaluated_value  # type: ignore[attr-defined]
    if isinstance(node, cst.FormattedString):
        varied = [one for one in node.parts if isinstance(one, cst.FormattedStringExpression)]
        specs = {values.code(spec) for one in varied for spec in one.format_spec or ()}
        plain = specs <= {"d"} and all(one.conversion in (None, "s") for one in varied)
        return "".join(_piece(part, values, slots) for part in node.parts) if plain else None
    if isinstance(node, cst.ConcatenatedString) or m.matches(node, m.BinaryOperation(operator=m.Add())):
        some = [text_of(one, values, {}) for one in (node.left, node.right)]
        return "".join(_piece(one, values, slots) for one in (node.left, node.right)) if any(some) else None
    if called(node) == "get_act_name":
        given = arguments(node, "name", "layer", "layer_type")
        known = "name" in given and "layer_type" not in given
        return short_name(given["name"], given.get("layer"), values, slots) if known else None
    percent = m.matches(node, m.BinaryOperation(operator=m.Modulo()))
    formats = called(node) == "format" and isinstance(node.func, cst.Attribute)
    whole = node.left if percent else node.func.value if formats else None
    if whole is None or (template := text_of(whole, values, slots)) is None:
        return None
    try:
        if percent:
            right = node.right.elements if isinstance(node.right, cst.Tuple) else [cst.Element(node.right)]
            return re.sub("%[di]", "%s", template) % tuple(_piece(one.value, values, slots) for one in right)
        named = {one.keyword.value: _piece(one.value, values, slots) for one in node.args if one.keyword}
        positional = [_piece(one.value, values, slots) for one in node.args if not one.keyword]
        return template.replace(":d}", "}").format(*positional, **named)
    except (TypeError, ValueError, LookupError):
        return None


def _piece(node: Any, values: Values, slots: dict[int, Any]) -> str:
    """A part of a name: its text if it is a string or a number, or else a slot number."""
    if isinstance(node, cst.FormattedStringText):
        return node.value.replace("{{", "{").replace("}}", "}")
    node = node.expression if isinstance(node, cst.FormattedStringExpression) else node
    if m.matches(node, m.Call(func=m.Name("str"), args=[m.Arg()])):
        return _piece(node.args[0].value, values, slots)
    text = node.value if isinstance(node, cst.Integer) else text_of(node, values, slots)
    if text is None:
        slots[SLOT + len(slots)] = node
    return str(SLOT + len(slots) - 1) if text is None else text


def short_name(name: Any, layer: Any, values: Values, slots: dict[int, Any]) -> str | None:
    """The full name of ``("resid_pre", layer)``, as caches and get_act_name take it."""
    short = text_of(name, values, slots)
    if short is None or _SLOT.match(short):
        return None
    number = None if layer is None or m.matches(layer, m.Name("None")) else _piece(layer, values, slots)
    if number is None and ("." in short or short.startswith("hook_")):
        return short
    return f"hook_{short}" if number is None else f"blocks.{number}.hook_{short}"


def is_hook_name(node: Any, values: Values) -> bool:
    """Whether an expression is a whole hook name, and not a part to look for in names, or a variable."""
    text = None if isinstance(node, cst.Name) else text_of(node, values, {})
    if text is None or _LOOKS_LIKE_A_NAME.fullmatch(text) is None:
        return False
    try:
        return "." in text or isinstance(node, cst.Call) or names.parse(text).layer is None
    except UnknownSiteError:
        return False
