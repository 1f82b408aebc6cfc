"""The rewriting of a script: imports, loading, and the calls that keep hooks on a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import libcst as cst
import libcst.matchers as m
from libcst.codemod import CodemodContext
from libcst.codemod.visitors import AddImportsVisitor

from .axes import NAMES, Axes
from .imports import imported, replacement, unused_names
from .lacking import NOT_SET
from .nodes import keyword_arg, placed, remarked, with_args, with_comments
from .report import Finding, PortedBlock, PortReport, Problem
from .runs import FORWARD, ORDER, SAME, SIDES, HookedPlace, ModelRun, Script, lines_of, trace_of
from .values import arguments, called

FOLDING = "weights are kept as they were trained; nothing is folded into them"
#: Arguments that are left out, and why.
NOT_NEEDED = {
    "fast_conv": "the convolution kernel runs wherever conv is not asked for",
    "fast_ssm": "the scan kernel runs wherever its inner sites are not asked for",
    "warn_disabled_hooks": "no kernel disables a site",
    "return_cache_object": "a cache is what run_with_cache returns",
    **dict.fromkeys(("fold_ln", "fold_value_biases", "refactor_factored_attn_matrices"), FOLDING),
    **dict.fromkeys(("center_unembed", "center_writing_weights"), FOLDING),
    "default_padding_side": "padding never changes a result",
    "default_prepend_bos": "it is set after loading, model.default_prepend_bos = False, where it is not True",
}
TURNED_NOTE = "states and writes as TransformerLens's Mamba-1 has them, [B,E,L,N]"
#: What the names of Mamba-2's checkpoints have in them.
MAMBA_2 = re.compile(r"mamba[-_]?2(?![.\d])|codestral", re.IGNORECASE)


#: What those of hybrids have.
HYBRID = re.compile(r"[jbz]amba|granite-4|falcon-h1|nemotron-?h", re.IGNORECASE)


class Porter(cst.CSTTransformer):
    """Rewrites one script, and reports what it does."""

    def __init__(self, script: Script, report: PortReport, remarks: Mapping[Any, list[str]]) -> None:
        super().__init__()
        self.script, self.report, self.remarks, self.context = script, report, remarks, CodemodContext()
        self.axes = Axes(script)
        # The functions of `axes` that the ported script needs, by what they are for, and the runs of one of them.
        self.helpers: dict[str, str] = {}
        self.cached: set[Any] = set()
        # The variables that hold the hooks of add_hook, by model and direction, and where they are made.
        self.kept: dict[tuple[str, str], str] = {}
        self.starts: dict[Any, list[str]] = {}
        # Each `with model.hooks(...)` around: its models, its lists of hooks and their variables.
        self.inside: list[tuple[Any, set[str], dict[str, tuple[Any, str]]]] = []
        self.hooks: dict[Any, dict[str, list[HookedPlace | None]]] = {}  # of each run, as far as known
        for key in dict.fromkeys(added[:2] for added in map(self.added, script.calls) if added):
            self.kept[key] = self.fresh(re.sub(r"\W", "_", f"{key[0]}_{key[1]}"))
            resets = [one for one in script.calls if called(one) == "reset_hooks" and script.receiver(one) == key[0]]
            first = next(one for one in script.calls if one in resets or (self.added(one) or ())[:2] == key)
            self.starts.setdefault(self.top(first), []).append(self.kept[key])

    def fresh(self, name: str) -> str:
        """A variable that the script does not have."""
        above = [(one, self.script.parents[one]) for one in m.findall(self.script.module, m.Name(name))]
        # The name of an argument or an attribute is no variable.
        taken = any(one not in (getattr(up, "keyword", None), getattr(up, "attr", None)) for one, up in above)
        return self.fresh(f"{name}_") if taken else name

    def top(self, node: Any) -> Any:
        """The statement of the module that a node is in."""
        return next(one for one in self.script.around(node) if self.script.parents[one] is self.script.module)

    def known(self, node: Any, becomes: str, note: str = "") -> None:
        """List what is known here."""
        finding = Finding(self.script.start(node)[0], self.script.code(node).rstrip(", "), becomes, note)
        self.report.add(self.report.findings, finding)

    def problem(self, node: Any, reason: str, only_note: bool = False) -> None:
        """List what cannot be ported, or what else to know."""
        problem = Problem(self.script.start(node)[0], self.script.code(node), reason)
        self.report.add(self.report.notes if only_note else self.report.problems, problem)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        script, name, receiver = self.script, called(original_node), self.script.receiver(original_node)
        if (run := script.run(original_node)) is not None:
            return self.ran(run, updated_node)
        if script.loads(original_node):
            return self.loaded(original_node, updated_node)
        alone = not isinstance(script.parents[original_node], cst.WithItem) and receiver in script.models
        if receiver and name in ("add_hook", "add_perma_hook", *("hooks",) * alone):
            return self.hook_added(original_node, updated_node)
        new = replacement(original_node, script, updated_node)
        if name == "reset_hooks":
            new = ", ".join(f"{one}.clear()" for key, one in self.kept.items() if key[0] == receiver)
        if new:
            self.known(original_node, new)
        elif receiver in script.models and name in SAME:
            self.known(original_node, script.code(original_node), "the same here")
        return cst.parse_expression(new) if new else updated_node

    def leave_Name(self, original_node: Any, updated_node: Any) -> Any:
        new = replacement(original_node, self.script)
        return cst.parse_expression(new) if new else updated_node

    leave_Attribute = leave_Name

    def added(self, node: Any) -> tuple[str, str, str, Any] | None:
        """The model, the direction, the name and the function of an ``add_hook`` call, if it is plain."""
        receiver, code = self.script.receiver(node), self.script.code
        point = re.fullmatch(r"(.+?)\.((?:blocks\[.+\]\.)?hook_\w+(?:\[[^\"]+\])?)", receiver)
        given = arguments(node, *(() if point else ("name",)), "hook", "dir")
        plain = receiver and {"hook"} <= {*given} <= {"name", "hook", "dir"} and (point or "name" in given)
        if called(node) != "add_hook" or not plain:
            return None
        side = SIDES["bwd" in code(given.get("dir", cst.Name("fwd")))]
        if point is None:
            return receiver, side, code(given["name"]), given["hook"]
        name = re.sub(r"\[([^\]]*)\]", r".{\1}", re.sub(r"\[(\d+)\]", r".\1", point[2]))
        return point[1], side, f'{"f" * ("{" in name)}"{name}"', given["hook"]

    def hook_added(self, node: cst.Call, updated: cst.Call) -> cst.BaseExpression:
        """``model_fwd_hooks.append((name, fn))`` for ``model.add_hook(name, fn)``."""
        if (added := self.added(node)) is None:
            self.problem(node, "hooks that stay on a model are edits here: `with model.edit(inplace=True):`")
            return updated
        model, side, name, function = added
        for run in filter(None, map(self.script.run, self.script.calls)):
            if run.model != model and (run.model, side) not in self.kept:
                self.problem(run.node, f"hooks are added to {model}: if this is one, give it {side}=")
        code = f"{self.kept[model, side]}.append(({name}, {self.script.code(function)}))"
        self.known(node, code, f"{side} of the runs of {model}")
        return cst.parse_expression(code)

    def needed(self, node: Any, updated: Any, *order: str) -> list[tuple[str, Any, Any]]:
        """The arguments of a call that are needed here: the name, as it was, and as it is."""
        given = iter(order)
        names = [one.keyword.value if one.keyword else one.star or next(given, "") for one in node.args]
        args = list(zip(names, node.args, updated.args, strict=True))
        for name, old, _ in args:
            if name in NOT_NEEDED:
                self.known(old, "", NOT_NEEDED[name])
        return [arg for arg in args if arg[0] not in NOT_NEEDED]

    def loaded(self, node: cst.Call, updated: Any) -> cst.Call:
        """The call that loads the same model here."""
        renamed = {"model_name": {"keyword": cst.Name("pretrained_model_name")}}
        args = [new.with_changes(**renamed.get(name, {})) for name, _, new in self.needed(node, updated)]
        new = with_args(updated.with_deep_changes(updated.func, attr=cst.Name("from_pretrained")), args)
        which = getattr(node.args[0].value, "evaluated_value", None) if node.args else None
        if isinstance(which, str) and "mamba" not in which.lower():
            hybrid = f": MambaTrace({which!r}) loads a hybrid" if HYBRID.search(which) else ""
            self.problem(node, f"{which} is no Mamba by its name, and HookedMamba loads nothing else{hybrid}")
        elif isinstance(which, str) and MAMBA_2.search(which):
            self.problem(node, f"{which} is a Mamba-2 by its name, and HookedMamba loads none: MambaTrace({which!r})")
        self.known(node, self.script.code(new))
        return new

    def ran(self, run: ModelRun, updated: Any) -> cst.Call:
        """A run with the hooks that are set around it, and without the arguments that are not needed."""
        args: list[cst.Arg] = []
        for name, old, new in self.needed(run.node, updated, *FORWARD):
            # All but the first are passed by name: here the hooks come second.
            by_name = old.keyword is None and not old.star and name not in ("", "input")
            args.append(keyword_arg(name, new.value).with_changes(comma=new.comma) if by_name else new)
        self.hooks[run.node] = {}
        for side in SIDES:
            args = self.turned(run, side, self.with_hooks(run, side, args))
        if run.kind == "forward" and any(self.hooks[run.node].values()):
            model = updated.func.value if called(run.node) == "forward" else updated.func
            updated = updated.with_changes(func=cst.Attribute(model, cst.Name("run_with_hooks")))
        call = with_args(updated, args)
        if run.kind != "run_with_cache" or not self.axes.in_cache(run):
            return call
        given = [cst.Arg(cst.parse_expression(run.model)), *call.args]
        call = with_args(call.with_changes(func=cst.Name(self.helper("cache"))), given)
        self.cached.add(run.node)
        self.known(run.node, self.script.code(call), TURNED_NOTE)
        return call

    def helper(self, kind: str) -> str:
        """The name of a function of `axes`, which the ported script gets."""
        if kind == "hooks":
            self.helper("hook")
        if kind not in self.helpers:
            self.helpers[kind] = self.fresh(NAMES[kind])
        return self.helpers[kind]

    def turned(self, run: ModelRun, side: str, args: list[cst.Arg]) -> list[cst.Arg]:
        """The arguments of a run, of which the hooks see each value with the axes that it has in the script."""
        if any(one.star == "**" for one in run.node.args) and self.axes.written:
            self.problem(run.node, "hooks in ** may be of values that have other axes here: give them by name")
        places = self.hooks[run.node][side]
        own = next((arg for arg in args if arg.keyword is not None and arg.keyword.value == side), None)
        if own is None or not self.axes.among([one and one.name for one in places]):
            return args
        helper = self.helper("hook")
        self.hooks[run.node][side] = [
            one._replace(source=f"{helper}({one.source})", turned=True) if one and self.axes.among([one.name]) else one
            for one in places
        ]
        stop = [
            arg.with_changes(comma=cst.MaybeSentinel.DEFAULT)
            for name, _, arg in self.needed(run.node, run.node, *FORWARD)
            if name == "stop_at_layer"
        ]
        whole = cst.Arg(cst.parse_expression(run.model)), cst.Arg(own.value)
        hooks = cst.Call(cst.Name(self.helper("hooks")), [*whole, *stop])
        self.known(run.node, f"{side}={self.script.code(hooks)}", TURNED_NOTE)
        return [arg.with_changes(value=hooks) if arg is own else arg for arg in args]

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        return placed(updated_node, self.axes.definitions(self.helpers)) if self.helpers else updated_node

    def with_hooks(self, run: ModelRun, side: str, args: list[cst.Arg]) -> list[cst.Arg]:
        """The arguments of a run with the hooks that are set around it, of one direction."""
        script = self.script
        held = [lists[side] for _, models, lists in self.inside if run.model in models and side in lists]
        known = [script.hooked(one) if script.same_names(one, run.node) else [None] for one, _ in held]
        names = [cst.Name(name) for _, name in held]
        adds = [one for one in script.calls if (self.added(one) or ())[:2] == (run.model, side)]
        later = any(isinstance(one, cst.FunctionDef) for at in (run.node, *adds) for one in script.around(at))
        if adds and (later or script.start(self.top(adds[0])) <= script.start(run.node)):
            known, names = [[None], *known], [cst.Name(self.kept[run.model, side]), *names]
        known.append(script.hooked(run.given.get(side)))
        self.hooks[run.node][side] = [place for some in known for place in some]
        if not names:
            return args
        own = [arg for arg in args if arg.keyword is not None and arg.keyword.value == side]
        values = [*names, *(arg.value for arg in own)]
        whole = values[0] if len(values) == 1 else cst.List([cst.StarredElement(one) for one in values])
        return [*(arg for arg in args if arg not in own), keyword_arg(side, whole)]

    def visit_WithItem(self, node: cst.WithItem) -> None:
        model, block = self.script.receiver(node.item), self.script.parents[node]
        hooks = called(node.item) == "hooks" and model in self.script.models
        if hooks and self.reaches(block, node.item, model):
            given = arguments(node.item, *SIDES)
            models = {model, self.script.code(node.asname.name) if node.asname else model}
            self.script.models |= models
            names = {side: self.fresh(side + "_" * len(self.inside)) for side in given if side in SIDES}
            self.inside.append((block, models, {side: (given[side], name) for side, name in names.items()}))

    def reaches(self, block: Any, hooks: Any, model: str) -> bool:
        """Whether all that ``with model.hooks(...)`` hooks are runs in its body."""
        script, reason = self.script, ""
        for call in [one for one in script.calls if block.body in script.around(one)]:
            function = script.value(call.func)
            inner = [one for one in script.calls if function is not None and function in script.around(one)]
            if called(call) == "generate":
                reason = "they run at every step: write them in model.generate(...), below tracer.iter[:]"
            elif any(map(script.run, inner)) or any(script.code(arg.value) == model for arg in call.args):
                reason = f"{called(call)} may run it, and hooks are given to each run here: pass {SIDES[0]}="
        if reason:
            self.problem(hooks, reason)
        return not reason

    def leave_With(self, original_node: cst.With, updated_node: cst.With) -> Any:
        """``with nullcontext(hooks) as fwd_hooks:``, so that the runs in it can be given them."""
        if not self.inside or self.inside[-1][0] is not original_node:
            return updated_node
        items: list[cst.WithItem] = []
        for item in updated_node.items:
            call: Any = item.item
            given = arguments(call, *SIDES) if called(call) == "hooks" else {}
            held = [(given[side], name) for side, (_, name) in self.inside[-1][2].items() if given]
            held += [(call.func.value, self.script.code(item.asname.name))] if given and item.asname else []
            made = [(cst.Call(cst.Name("nullcontext"), [cst.Arg(value)]), name) for value, name in held]
            items += [cst.WithItem(value, cst.AsName(cst.Name(name))) for value, name in made] or [item]
            items[-1] = items[-1].with_changes(comma=item.comma)
        self.inside.pop()
        AddImportsVisitor.add_needed_import(self.context, "contextlib", "nullcontext")
        return with_comments(original_node, updated_node.with_changes(items=items))

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        """Make the lists of hooks before their first use."""
        new: Any = super().on_leave(original_node, updated_node)
        if original_node in self.remarks:
            new = remarked(new, self.remarks[original_node])
        made: list[Any] = [cst.parse_statement(f"{name} = []") for name in self.starts.get(original_node, ())]
        if not made:
            return new
        first, *rest = new if isinstance(new, cst.FlattenSentinel) else [new]
        made[0] = made[0].with_changes(leading_lines=first.leading_lines)
        return cst.FlattenSentinel([*made, first.with_changes(leading_lines=[]), *rest])

    def leave_SimpleStatementLine(self, original_node: cst.SimpleStatementLine, updated_node: Any) -> Any:
        small: list[Any] = []
        for old, new in zip(original_node.body, updated_node.body, strict=True):
            imports = imported(old, self.script, self.report)
            if m.matches(old, m.Assign([m.AssignTarget(m.Attribute(attr=m.Name(NOT_SET)))])):
                self.known(old, "", "the states have their places in every run")
                continue
            if imports is None:
                self.traced(old, new)
            else:
                unused = unused_names(old, self.script)
                note = f"nothing uses {', '.join(unused)}, which has no counterpart and needs none" if unused else ""
                self.known(old, "; ".join(map(self.script.code, imports)), note)
            small += [new] if imports is None else imports
        if not small and not m.findall(original_node, m.Comment()):
            return cst.RemoveFromParent()
        count = len(original_node.body)
        line = with_comments(original_node, updated_node.with_changes(body=small[:count] or [cst.Pass()]))
        return cst.FlattenSentinel([line, *(cst.SimpleStatementLine([one]) for one in small[count:])])

    def source_of(self, run: ModelRun, place: HookedPlace) -> str:
        """The prompt of the cache that a hook of a run takes its values from, if that is seen."""
        script, caches = self.script, self.script.caches
        used = {one.value for one in m.findall(place.function or place.node, m.Name())} & set(caches)  # type: ignore
        prompts = {script.input(caches[name]) for name in used or caches}
        others = prompts - {script.input(run)}
        return others.pop() if len(others) == 1 else "source=..."

    def traced(self, old: Any, new: Any) -> None:
        """Show the trace of a statement that runs a model, and that of each hook."""
        for run in filter(None, map(self.script.run, m.findall(old, m.Call()))):
            hooks, source = self.hooks[run.node], self.script.input(run)
            hooked: list[Any] = [(side, one) for side in SIDES for one in hooks[side] if one and one.name]
            for direction, place in hooked:
                value = f"{run.model}.{place.name.path}.output"
                lines = lines_of(place, value if direction == SIDES[0] else "value.grad", self.script)
                if direction == SIDES[1]:
                    inner = [f"    {line}" for line in lines]
                    lines = [f"value = {value}.save()", "with loss.backward():", *inner]
                self.known(place.node, "\n".join(lines))
                loops = [one for one in self.script.around(run.node) if isinstance(one, cst.For)]
                site: Any = getattr(place.name.place, "site", None)
                if len(loops) > 1 and "L" in getattr(site, "axes", ""):
                    given = f"{run.model}, {source}, {self.source_of(run, place)}, site={site.name!r}"
                    call = f"patch_grid({given}, metric=...)"
                    self.problem(run.node, f"these loops are one call: {call}, of mamba_trace.patching", True)
            unseen = any(one is None or one.name is None for some in hooks.values() for one in some)
            trace = trace_of(run, old, new, hooks, self.script)
            trace = ORDER if unseen and "hooks" in self.helpers and self.axes.possible else trace
            if not isinstance(trace, str):
                self.known(run.node, f"with {run.model}.trace({source}): ...")
                block = PortedBlock(self.script.start(old)[0], self.script.code(new), "\n".join(trace))
                self.report.add(self.report.blocks, block)
            elif run.node in self.cached:
                continue  # which is listed as what it is now
            elif any(hooks.values()):
                self.problem(run.node, f"this call runs as it is; no trace is shown for it, as {trace}", True)
            else:
                self.known(run.node, self.script.code(run.node), "the same here")
