"""A script says which hook it means in many ways: a literal, an f-string, ``+``, ``%``, ``.format``.

`read_name` takes such an expression apart into text and the expressions between it, and lets `names.parse`
say which place the text means, with a number of its own in place of every expression. So this module knows
no name of a site, and a name that `names` refuses is refused here with the same reason.
"""

from __future__ import annotations

import ast
import re
import string
from dataclasses import dataclass, field

from .. import names
from ..errors import UnknownSiteError
from ..names import Place
from ..sites import SITES, STATE
from .scope import Scopes

#: The number that stands for the i-th expression of a name is SLOT + i: no model has so many layers.
SLOT = 900_000_000
_SLOT = re.compile(r"9000\d{5}(?!\d)")
#: TransformerLens's short names, for get_act_name, and the part of a block that they are put in.
LAYER_TYPES = {
    **dict.fromkeys(("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores"), "attn"),
    **dict.fromkeys(("pre", "post", "mid", "pre_linear"), "mlp"),
    **dict.fromkeys(("scale", "normalized"), "ln1"),
}
#: Where an inner module of the mixer runs: just before this site.
NATIVE_BEFORE = {"in_proj": "skip", "conv1d": "conv", "x_proj": "delta_1", "dt_proj": "delta_2"}

Parts = list[str | ast.expr]


@dataclass
class Name:
    """A hook name of a script.

    Attributes:
        parts: text, and the expressions between it.
        place: the place, with slot numbers for what varies; ``None`` where the text alone does not say it.
        slots: the expression of each slot number.
    """

    parts: Parts
    place: Place | None
    slots: dict[int, ast.expr] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """What stands after ``model.``: ``layers[layer].ssm.h[pos]``, or ``hook(name)``."""
        if self.place is None:
            return f"hook({self.source})"
        return self._filled(self.place.path)

    @property
    def source(self) -> str:
        """The name as an expression: a literal or an f-string."""
        if len(self.parts) == 1 and isinstance(self.parts[0], ast.expr):
            return ast.unparse(self.parts[0])
        return written(self.parts)

    @property
    def hook_name(self) -> str | None:
        """MambaLens's name of the place, as an expression; ``None`` where it has none."""
        if self.place is None:
            return self.source
        try:
            text = self.place.hook_name
        except UnknownSiteError:
            return None
        parts: Parts = []
        for piece in re.split(r"(9000\d{5})", text):
            parts.append(self.slots[int(piece)] if _SLOT.fullmatch(piece) else piece)
        return written(parts)

    @property
    def in_hook_names(self) -> bool:
        """Whether `model.hook_names` lists the place."""
        if self.place is None:
            return True
        site, position = self.place.site, self.place.position
        return site is not None and site.in_mamba_lens and (site.name != STATE or position is not None)

    @property
    def layer(self) -> str | None:
        """The layer, as an expression."""
        return None if self.place is None else self._number(self.place.layer)

    @property
    def position(self) -> str | None:
        """The position of ``h[p]``, as an expression."""
        return None if self.place is None else self._number(self.place.position)

    @property
    def layer_node(self) -> ast.expr | int | None:
        """The layer, as a number or a node of the script."""
        return None if self.place is None else self._node(self.place.layer)

    @property
    def position_node(self) -> ast.expr | int | None:
        """The position, as a number or a node of the script."""
        return None if self.place is None else self._node(self.place.position)

    def _node(self, number: int | None) -> ast.expr | int | None:
        return None if number is None else self.slots.get(number, number)

    @property
    def rank(self) -> float:
        """Where the place comes in its block, or in the model."""
        assert self.place is not None
        order = [site.name for site in SITES]
        if self.place.site is None:
            return order.index(NATIVE_BEFORE[str(self.place.native)]) - 0.5
        before_the_whole = self.place.site.name == STATE and self.place.position is not None
        return order.index(self.place.site.name) - 0.5 * before_the_whole

    def _number(self, number: int | None) -> str | None:
        return None if number is None else self._filled(str(number))

    def _filled(self, text: str) -> str:
        return _SLOT.sub(lambda match: ast.unparse(self.slots[int(match[0])]), text)


def read_name(node: ast.expr, scopes: Scopes) -> Name | None:
    """The hook name that an expression makes; ``None`` where it makes no string that can be read.

    Raises:
        UnknownSiteError: if it names no place, or one that no site means.
    """
    parts = parts_of(node, scopes)
    return None if parts is None else name_of(parts)


def name_of(parts: Parts) -> Name:
    """The name that text and expressions make. Raises `UnknownSiteError`."""
    slots = {SLOT + i: part for i, part in enumerate(parts) if isinstance(part, ast.expr)}
    text = "".join(part if isinstance(part, str) else str(SLOT + i) for i, part in enumerate(parts))
    try:
        place = names.parse(text)
    except UnknownSiteError as error:
        if _varies(text):
            return Name(parts, None, slots)
        plain = _SLOT.sub(lambda match: "{" + ast.unparse(slots[int(match[0])]) + "}", str(error))
        raise UnknownSiteError(plain) from error
    numbers = {number for number in (place.layer, place.position) if number is not None}
    if set(slots) != {number for number in numbers if number in slots}:
        return Name(parts, None, slots)  # a number of which a part varies, as in f"blocks.1{digit}."
    return Name(parts, place, slots)


def _varies(text: str) -> bool:
    """Whether more of a name varies than the layer and the position."""
    rest = re.sub(r"^blocks\.\d+\.", "", text)
    return _SLOT.search(re.sub(rf"^hook_{STATE}\.-?\d+$", "", rest)) is not None


def written(parts: Parts) -> str:
    """Text and expressions as Python source."""
    if all(isinstance(part, str) for part in parts):
        return repr("".join(str(part) for part in parts))
    values: list[ast.expr] = []
    for part in parts:
        value = ast.Constant(part) if isinstance(part, str) else ast.FormattedValue(part, conversion=-1)
        values.append(value)
    return ast.unparse(ast.JoinedStr(values))


# -- expressions that make strings -------------------------------------------------------------------------


def parts_of(node: ast.expr, scopes: Scopes) -> Parts | None:
    """Text and the expressions between it; ``None`` for what makes no string, as far as can be seen."""
    node = scopes.expression(node)
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return _joined([_formatted(value, scopes) for value in node.values])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _added(node, scopes)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return _percent(node, scopes)
    if isinstance(node, ast.Call):
        return _called(node, scopes)
    return None


def _formatted(node: ast.expr, scopes: Scopes) -> Parts | None:
    if not isinstance(node, ast.FormattedValue):
        return parts_of(node, scopes)
    spec = node.format_spec
    plain = spec is None or ast.unparse(spec) in ("f'd'", 'f"d"', "f''")
    if not plain or node.conversion not in (-1, ord("s")):
        return None
    return _embedded(node.value, scopes)


def _embedded(node: ast.expr, scopes: Scopes) -> Parts:
    """An expression inside a name: its text if it is a string, itself if it is a number or not known."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "str":
        return _embedded(node.args[0], scopes) if len(node.args) == 1 else [node]
    return parts_of(node, scopes) or [node]


def _joined(pieces: list[Parts | None]) -> Parts | None:
    parts: Parts = []
    for piece in pieces:
        if piece is None:
            return None
        for part in piece:
            if parts and isinstance(part, str) and isinstance(parts[-1], str):
                parts[-1] += part
            else:
                parts.append(part)
    return parts


def _added(node: ast.BinOp, scopes: Scopes) -> Parts | None:
    left, right = parts_of(node.left, scopes), parts_of(node.right, scopes)
    if left is None and right is None:
        return None
    sides = [_embedded(node.left, scopes), _embedded(node.right, scopes)]
    return _joined(list(sides))


def _percent(node: ast.BinOp, scopes: Scopes) -> Parts | None:
    left = parts_of(node.left, scopes)
    if left is None or len(left) != 1 or not isinstance(left[0], str):
        return None
    values = list(node.right.elts) if isinstance(node.right, ast.Tuple) else [node.right]
    texts = re.split(r"%[dis]", left[0])
    if len(texts) != len(values) + 1 or any("%" in text for text in texts):
        return None
    pieces: list[Parts | None] = [[texts[0]]]
    for value, text in zip(values, texts[1:], strict=True):
        pieces += [_embedded(value, scopes), [text]]
    return _joined(pieces)


def _called(node: ast.Call, scopes: Scopes) -> Parts | None:
    function = node.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if called == "get_act_name":
        return act_name(node, scopes)
    if called != "format" or not isinstance(function, ast.Attribute):
        return None
    template = parts_of(function.value, scopes)
    if template is None or len(template) != 1 or not isinstance(template[0], str):
        return None
    named = {keyword.arg: keyword.value for keyword in node.keywords}
    pieces: list[Parts | None] = []
    for index, (text, key, spec, conversion) in enumerate(string.Formatter().parse(template[0])):
        pieces.append([text])
        if key is None:
            continue
        number = index if key == "" else int(key) if key.isdigit() else None
        value = named.get(key) if number is None else dict(enumerate(node.args)).get(number)
        if value is None or spec not in ("", "d") or conversion is not None:
            return None
        pieces.append(_embedded(value, scopes))
    return _joined(pieces)


def act_name(node: ast.Call, scopes: Scopes) -> Parts | None:
    """The name that TransformerLens's ``get_act_name(name, layer, layer_type)`` makes."""
    named: dict[str | None, ast.expr] = dict(zip(("name", "layer", "layer_type"), node.args, strict=False))
    named |= {keyword.arg: keyword.value for keyword in node.keywords}
    if "name" not in named:
        return None
    kind = parts_of(named["layer_type"], scopes) if "layer_type" in named else None
    return short_name(named["name"], named.get("layer"), scopes, kind)


def short_name(
    name: ast.expr, layer: ast.expr | None, scopes: Scopes, kind: Parts | None = None
) -> Parts | None:
    """The full name of ``("resid_pre", layer)``, as caches and get_act_name take it."""
    short = parts_of(name, scopes)
    if short is None or not isinstance(short[0], str):
        return None
    if isinstance(layer, ast.Constant) and layer.value is None:
        layer = None
    if layer is None and ("." in short[0] or short[0].startswith("hook_")):
        return short
    digits = re.fullmatch(r"([a-z_]+?)(\d+)", short[0]) if layer is None and len(short) == 1 else None
    if digits:
        short, layer = [digits[1]], ast.Constant(int(digits[2]))
    part = str((kind or [LAYER_TYPES.get(str(short[0]), "")])[0])
    prefix = f"{part}." if part else ""
    if layer is None:
        return _joined([[f"{prefix}hook_"], short])
    return _joined([["blocks."], _embedded(layer, scopes), [f".{prefix}hook_"], short])
