"""The calls of a script that run a model, and the traces that do the same.

A trace asks for sites in execution order, so that of several hooks goes through `model.hook_names` and picks.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import libcst as cst
import libcst.matchers as m

from ..errors import UnknownSiteError
from ..names import Place
from .values import Values, WrittenName, arguments, called, read_name

CLASSES = ("HookedMamba", "HookedTransformer", "TransformerBridge")
LOADERS = ("from_pretrained", "from_pretrained_no_processing", "boot_transformers")
RUNS = ("run_with_cache", "run_with_hooks", "forward")
#: Methods that a model has under the same names here.
SAME = ("to_tokens", "to_str_tokens", "to_single_token", "to_string", "generate")
#: The arguments of a model's call in order; run_with_hooks and run_with_cache hand theirs on to it.
FORWARD = ("input", "return_type", "loss_per_token", "prepend_bos", "padding_side")
#: Methods and functions that return None: a lambda of one of them replaces nothing.
RETURN_NONE = {"append", "extend", "update", "add", "print", "insert", "setdefault", "__setitem__"}
SIDES = ("fwd_hooks", "bwd_hooks")
ORDER = "its order is only known to the run"
PICKED = """for site_name in {model}.hook_names({model}.embeddings.output.shape[1]):
    for wanted, function in {hooks}:
        if wanted(site_name) if callable(wanted) else wanted == site_name:
            hook = SimpleNamespace(name=site_name, layer=lambda: int(site_name.split(".")[1]))
            edited = function({model}.hook(site_name).output, hook=hook)
            if edited is not None:
                {model}.hook(site_name).output = edited"""
#: A name of which it is known that nothing is at its place.
NOWHERE = WrittenName("", Place(None))
_TEXT = re.compile(r"[\s\[({]*[rfu]{0,2}[\"']")
_TOKENS = re.compile(r"(\w+\.)*(to_tokens|tensor|LongTensor|arange|randint)\(")


class HookedPlace(NamedTuple):
    """One entry of a list of hooks: (name, function)."""

    node: Any
    name: WrittenName | None  # ``None`` where a test chooses the places
    source: str  # how the function is called
    function: Any  # its definition, where that is in the script
    turned: bool = False  # whether ``source`` gives the function other axes, and so returns a tensor: see `axes`

    @property
    def returns(self) -> str:
        """Whether the function returns a value: ``"always"``, ``"never"`` or ``"maybe"``."""
        if self.turned:
            return "always"
        if not isinstance(self.function, cst.FunctionDef):
            return "never" if called(getattr(self.function, "body", None)) in RETURN_NONE else "maybe"
        every: list[Any] = m.findall(self.function, m.Return())  # type: ignore[assignment]
        if all(m.matches(one, m.Return(None) | m.Return(m.Name("None"))) for one in every):
            return "never"
        # What a function of the script returns is not looked for, and a condition may choose None.
        unsure = len(every) > 1 or m.matches(every[0], m.Return(m.IfExp() | m.Call(func=m.Name())))
        ends = m.SimpleStatementLine([m.ZeroOrMore(), m.Return()]) | m.Return()
        return "always" if m.matches(self.function.body.body[-1], ends) and not unsure else "maybe"


class ModelRun(NamedTuple):
    """A call that runs a model: its method, the model as source, and the arguments by name."""

    node: Any
    kind: str
    model: str
    given: dict[str, Any]


class Script(Values):
    """A script, with its calls from the top, the models in it (as source), and hooks that name no place."""

    def __init__(self, module: cst.Module) -> None:
        super().__init__(module)
        self.calls: list[Any] = sorted(m.findall(self.module, m.Call()), key=self.start)
        self.refused: list[tuple[Any, str]] = []
        # Only a model of these libraries has such methods, so whatever they are called on is one.
        methods = (*RUNS[:2], *SAME[:-1], "add_hook", "reset_hooks", "hooks")
        self.models = {self.receiver(node) for node in self.calls if called(node) in methods} - {""}
        for node in self.calls:
            assign = self.parents[node]
            if isinstance(assign, cst.Assign) and (self.loads(node) or called(node) in CLASSES):
                self.models |= {self.code(one.target) for one in assign.targets}
        for other in m.findall(self.module, m.Assign()):  # another name of a model
            if self.code(other.value) in self.models:  # type: ignore[attr-defined]
                self.models |= {self.code(one.target) for one in other.targets}  # type: ignore[attr-defined]

    def loads(self, node: Any) -> bool:
        """Whether a call loads a model."""
        return called(node) in LOADERS and self.receiver(node).rpartition(".")[2] in CLASSES

    def receiver(self, node: Any) -> str:
        """What the method of a call belongs to, as source."""
        return self.code(node.func.value) if m.matches(node, m.Call(func=m.Attribute())) else ""

    def run(self, node: Any) -> ModelRun | None:
        """A call as a run of one of the models; ``None`` if it is none."""
        kind = called(node) if called(node) in RUNS else "forward"
        model = self.receiver(node) if called(node) in RUNS else self.code(node.func)
        return ModelRun(node, kind, model, arguments(node, *FORWARD)) if model in self.models else None

    @property
    def caches(self) -> dict[str, ModelRun]:
        """The variables that hold caches, and the run that each holds the values of."""
        held: dict[str, ModelRun] = {}
        for run in filter(None, map(self.run, self.calls)):
            above = self.parents[run.node]
            picked = isinstance(above, cst.Subscript)  # run_with_cache(...)[1]
            assign = self.parents[above] if picked else above
            for target in getattr(assign, "targets", ()) if run.kind == "run_with_cache" else ():
                pair: Any = getattr(target.target, "elements", ())
                name = target.target if picked else pair[1].value if len(pair) == 2 else None
                held |= {} if name is None else {self.code(name): run}
        return held

    def name_of(self, node: Any, layer: Any = None) -> WrittenName | None:
        """`read_name`, with a name of no place where it raises: that is an error of its own."""
        try:
            return read_name(node, self, layer)
        except UnknownSiteError:
            return NOWHERE

    def hooked(self, node: Any) -> list[HookedPlace | None]:
        """The entries of a list of hooks; with ``None`` for what only the run knows of it."""
        whole = self.expression(node)
        if node is None or m.matches(whole, m.Name("None")):
            return []
        if isinstance(whole, cst.BinaryOperation):
            return self.hooked(whole.left) + self.hooked(whole.right)
        if isinstance(whole, (cst.ListComp, cst.GeneratorExp)):
            bodies = [one.body for one in m.findall(whole.elt, m.Lambda())]  # type: ignore[attr-defined]
            own = [self.owner(one.value, one) for one in m.findall(whole.for_in.target, m.Name())]  # type: ignore
            late = [one for body in bodies for one in self.free_names(body) if self.owner(one.value, one) in own]
            return [None] if late else [self.place(whole.elt), None]
        if not isinstance(whole, (cst.List, cst.Tuple)):
            return [None]
        starred = [(one.value, isinstance(one, cst.StarredElement)) for one in whole.elements]
        return [entry for one, star in starred for entry in (self.hooked(one) if star else [self.place(one)])]

    def place(self, node: Any) -> HookedPlace | None:
        """The one entry of a pair (name, function); ``None`` for anything else, and a name of no place."""
        pair = self.expression(node)
        if not isinstance(pair, cst.Tuple) or len(pair.elements) != 2:
            return None
        first, function = (one.value for one in pair.elements)
        test = self.value(first) if isinstance(self.value(first), cst.FunctionDef) else self.expression(first)
        tested = isinstance(test, (cst.Lambda, cst.FunctionDef)) or called(test) == "partial"
        try:
            name = None if tested else read_name(first, self) or WrittenName(self.code(first))
        except UnknownSiteError as error:
            self.refused.append((first, str(error)))
            return None
        source = f"({self.code(function)})" if isinstance(function, cst.Lambda) else self.code(function)
        while called(function) == "partial" or isinstance(function, cst.Name):
            function = function.args[0].value if isinstance(function, cst.Call) else self.value(function)
        known = isinstance(function, (cst.Lambda, cst.FunctionDef)) and not getattr(function, "decorators", 0)
        return HookedPlace(node, name, source, function if known else None)

    def input(self, run: ModelRun) -> str:
        """What a trace is given for a run: each string with the token that the libraries put before it."""
        given = run.given.get("input", cst.Name("input"))
        root = given.value if isinstance(given, cst.Subscript) else given
        bound = self.bound(root.value, root) if isinstance(root, cst.Name) else []
        values = [getattr(self.parents[self.parents[one.node]], "value", None) for one in bound] or [root]
        source = self.code(given)
        if all(one is not None and _TOKENS.match(self.code(one)) for one in values):
            return source
        # Where the script sets the model's default, to_tokens follows it as the run does.
        default = "" if "default_prepend_bos" in self.module.code else "True"
        prepend = self.code(run.given["prepend_bos"]) if "prepend_bos" in run.given else default
        tokens = f"{run.model}.to_tokens({source}{f', prepend_bos={prepend}' if prepend else ''})"
        is_text = _TEXT.match(self.code(self.expression(given)))
        return tokens if is_text else f"{tokens} if isinstance({source}, (str, list)) else {source}"


def lines_of(one: HookedPlace, value: str, script: Script) -> list[str]:
    """What one hook does to a value in a trace: the body of a lambda, or else a call."""
    name, function = one.name or WrittenName(""), one.function
    given = [parameter.name.value for parameter in function.params.params] if function is not None else []
    if isinstance(function, cst.Lambda) and one.source == f"({script.code(function)})" and len(given) == 2:
        free = [use.value for use in script.free_names(function.body)]
        changed: Any = m.replace(function.body, m.Name(given[0]), cst.parse_expression(value))
        plain = not m.matches(changed, m.IfExp() | m.Call(func=m.Name()) | m.Lambda())
        every = len(m.findall(function.body, m.Name(given[0]))) == free.count(given[0])
        if plain and every and given[1] not in free:
            return [script.code(changed) if one.returns == "never" else f"{value} = {script.code(changed)}"]
    layer = f", layer=lambda: {name.layer}" if name.layer else ""
    call = f"{one.source}({value}, hook=SimpleNamespace(name={name.source}{layer}))"
    maybe = [f"edited = {call}", "if edited is not None:", f"    {value} = edited"]
    return {"always": [f"{value} = {call}"], "never": [call], "maybe": maybe}[one.returns]


def trace_of(run: ModelRun, old: Any, new: Any, hooks: dict, script: Script) -> list[str] | str:
    """The trace in the place of a statement that is a run (``old``, ported ``new``); or why there is none."""
    targets = [script.code(one.target) for one in getattr(old, "targets", ())]
    others = set(run.given) - {"input", "prepend_bos", "fast_ssm", "fast_conv", "warn_disabled_hooks", *SIDES}
    if run.kind == "run_with_cache" or others:
        return f"it takes {', '.join(sorted(others))}" if others else "it fills a cache"
    if getattr(old, "value", None) is not run.node or not all(map(re.compile(r"\w+").fullmatch, targets)):
        return "what it returns is a part of something"
    places, body = hooks[SIDES[0]], [f"{name} = {run.model}.lm_head.output.save()" for name in targets]
    several = [one.name for one in places if one is not None and one.name is not None]
    if hooks[SIDES[1]] or (len(places) > 1 and not all(name.listed for name in several)):
        return ORDER
    if len(places) == len(several) == 1:
        body = lines_of(places[0], f"{run.model}.{several[0].path}.output", script) + body
    elif places:
        source = script.code(arguments(new.value)[SIDES[0]])
        source = f"({source})" if "\n" in source else source
        body = PICKED.format(model=run.model, hooks=source).splitlines() + body
    body = body or [f"logits = {run.model}.lm_head.output.save()"]
    imports = ["from types import SimpleNamespace"] if any("SimpleNamespace" in line for line in body) else []
    lines = [f"    {line}" for text in body for line in text.splitlines()]
    return [*imports, f"with {run.model}.trace({script.input(run)}):", *lines]
