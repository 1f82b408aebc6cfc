"""The calls of a MambaLens or TransformerLens script that run the model, as traces.

`Tracing` turns one call into the lines of a trace, which save what it returned under the names it is given.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from .advice import report_arguments, report_changed, report_use, report_whole_states, suggest_grid
from .gathered import Gathered, Hooks
from .hooks import HookFn, lines_of
from .names import Name
from .reads import EVERYTHING, as_edits, filtered, read_lines
from .runs import Run
from .traces import Edit, Read, edit_lines, in_order, picked


@dataclass
class Tracing(Gathered):
    """What a script says, and the traces that its calls become.

    Attributes:
        pending: hooks of the backward pass that wait for ``loss.backward()``.
        caches: for each variable of a cache, the input that it was made on.
    """

    pending: list[Edit] = field(default_factory=list)
    caches: dict[str, str] = field(default_factory=dict)

    def trace(self, run: Run, active: Hooks, out: str, cache: str) -> list[str]:
        """The lines that run the model with hooks, keep its output as ``out`` and its cache as ``cache``."""
        report_arguments(run, self.findings)
        if cache:
            self.caches[cache] = run.input
        forward, backward = (
            [*held, *own] for held, own in zip(active, self.hooks.get(run.node, ([], [])), strict=True)
        )
        stop = run.arguments.get("stop_at_layer")
        if stop is not None and isinstance(stop, ast.Constant) and stop.value is None:
            stop = None
        edits = [*forward, *self._kept(run, backward)]
        report_whole_states(forward, self.findings)
        report_changed([*active[0], *active[1]], run, self.scopes, self.findings)
        reads = self._reads(run, cache) if run.kind == "run_with_cache" else []
        body, unsorted = self._body(run, edits, reads, cache, stop)
        returns = run.returns if stop is None else "stopped"
        if out == "_" and (edits or reads) and returns != "stopped":
            returns = ""
        if unsorted and stop is not None:
            self.findings.problem(run.node, "stop_at_layer beside sites that are chosen when the script runs")
            stop = None
        logits = out if returns in ("logits", "stopped") else self.fresh("logits")
        after: list[str] = []
        if stop is not None:
            body += [
                f"{out} = {run.model}.layers[{ast.unparse(stop)}].resid_pre.output.save()",
                "tracer.stop()",
            ]
        elif returns or not body:
            body.append(f"{logits} = {run.model}.lm_head.output.save()")
        if returns in ("loss", "both"):
            after = self._loss(run, logits, out, returns)
        head = f"with {run.model}.trace({run.input}){' as tracer' if stop is not None else ''}:"
        self.findings.call(run.node, f"with {run.model}.trace({run.input}): ...")
        suggest_grid(run, forward, self.caches, self.scopes, self.findings)
        return [head, *(f"    {line}" for text in body for line in text.splitlines()), *after]

    def _body(
        self, run: Run, edits: list[Edit], reads: list[Read], cache: str, stop: ast.expr | None
    ) -> tuple[list[str], bool]:
        """The lines of the body, and whether its sites are only known when the script runs."""
        suffix = "[0]" if run.constant("remove_batch_dim") is True else ""
        if "device" in run.arguments and run.kind == "run_with_cache":
            suffix += f".to({ast.unparse(run.arguments['device'])})"
        suffix += ".save()"
        lines = [f"{cache} = {{}}.save()"] if run.kind == "run_with_cache" and cache else []
        if edits and reads:
            both = as_edits(cache, reads, run.node, self.scopes, suffix)
            if both is not None and in_order([*edits, *both], self.scopes) is not None:
                return lines + edit_lines(run.model, [*edits, *both], self.scopes), False
        unsorted = any(read.name is None for read in reads) or bool(edits and reads)
        if unsorted or in_order(edits, self.scopes) is None:
            edits = [edit for edit in edits if self._listed(run, edit.name)]
            reads = [read for read in reads if self._listed(run, read.name, key=True)]
        if unsorted:
            general = suffix.replace("[0]", ".squeeze(0)")
            return lines + picked(run.model, edits, reads, self.scopes, cache, general), True
        if edits:
            lines += edit_lines(run.model, edits, self.scopes)
        elif reads:
            layers = f"len({run.model}.layers)"
            if stop is not None:
                layers = f"len({run.model}.layers[:{ast.unparse(stop)}])"
            taken = f"{run.input}\n{cache}"
            lines += read_lines(run.model, cache, reads, self.scopes, suffix, f"range({layers})", taken)
        return lines, False

    def _listed(self, run: Run, name: Name | None, key: bool = False) -> bool:
        """Whether a place can be picked while going through all the hook names; else it is a problem."""
        if name is None or (name.in_hook_names and not (key and name.hook_name != name.source)):
            return True
        self.findings.problem(
            run.node,
            f"model.{name.path} beside places that are chosen when the script runs: model.hook_names does "
            f"not list this name, so put its line where its turn in execution order is",
            name.source,
        )
        return False

    def _reads(self, run: Run, cache: str) -> list[Read]:
        """The places that a cache has to hold."""
        if cache in ("", "_"):
            return []
        failed: list[tuple[ast.expr, str]] = []
        reads = None
        if "names_filter" in run.arguments:
            reads = filtered(run.arguments["names_filter"], self.scopes, failed)
        if reads is None:
            reads, unknown, failed = self.keys.get(cache, ([], [run.node], []))
            for use in unknown:
                report_use(use, cache, self.findings)
            if unknown:
                reads = [EVERYTHING]
            elif not reads:
                self.findings.note(run.node, f"nothing is read from {cache}, so the trace saves no site")
        for where, reason in failed:
            self.findings.problem(where, reason)
        return reads

    def _kept(self, run: Run, backward: list[Edit]) -> list[Edit]:
        """Edits that keep the values whose gradients are hooked."""
        kept: list[Edit] = []
        for edit in backward:
            if edit.name is None or edit.name.place is None or edit.loops:
                self.findings.problem(
                    run.node,
                    "hooks of the backward pass on places chosen when the script runs: keep each site's "
                    "value in a dict inside the trace, and read their .grad in reverse order inside "
                    "`with loss.backward():`",
                )
                continue
            site = edit.name.place.site
            variable = self.fresh(edit.name.place.native or "value" if site is None else site.name)
            kept.append(Edit(edit.name, HookFn(""), edit.at, keeps=variable))
            self.pending.append(Edit(edit.name, edit.fn, edit.at, keeps=variable))
        return kept

    def backward(self, node: ast.Call) -> list[str]:
        """``with loss.backward():`` with the hooks of the backward pass, the last site first."""
        edits = in_order(self.pending, self.scopes) or self.pending
        lines = [f"with {ast.unparse(node)}:"]
        for edit in reversed(edits):
            assert edit.name is not None
            body = lines_of(edit.fn, f"{edit.keeps}.grad", edit.name, node, self.scopes)
            lines += [f"    {line}" for text in body for line in text.splitlines()]
        self.pending = []
        self.findings.call(node, f"{lines[0]} ...")
        return lines

    def _loss(self, run: Run, logits: str, out: str, returns: str) -> list[str]:
        """The mean cross entropy of the next token, as TransformerLens's ``return_type="loss"``."""
        tokens = self.fresh("token_ids")
        source = run.input
        lines = [
            f"{tokens} = {run.model}.to_tokens({source}) if isinstance({source}, (str, list)) else {source}"
        ]
        loss = f"-{logits}[:, :-1].log_softmax(-1).gather(-1, {tokens}[:, 1:, None]).mean()"
        return [*lines, f"{out} = {loss}" if returns == "loss" else f"{out} = ({logits}, {loss})"]
