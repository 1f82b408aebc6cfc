"""Random programs of interventions on random models, each compared with the independent reference in float64.

A program is one of `KINDS`: it is drawn from a seed, run through the package, and its logits, saved values and, where
it has some, gradients are held to the reference's. A seed is one model of an architecture (`subjects.draw_subject`)
and one program; programs that share ``seed // SHARED`` share a model.

    python tests/programs.py --programs 1000 --json tests/data/programs.json      # of each architecture
    python tests/programs.py --architectures jamba --first 12345 --programs 1      # one of them again
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from reference import Edit, EditValue, editing
from subjects import ARCHITECTURES, L, Subject, draw_subject, draw_tokens, split_state, state
from torch import Tensor

from mamba_trace.patching import patch_grid

SHARED = 10  # programs of one model
ROUNDINGS = 32  # of the weights, among which the reference must have a gradient of float32
READ = "read"
OPERATIONS = (READ, "scale", "add", "replace", "zero", "add_at_position", "replace_first_row")


def same_gradients(subject: Subject, found: list[Tensor], exact: Callable[[], list[Tensor]], what: str) -> None:
    """Hold gradients to those that ``exact`` takes from the reference, here or within rounding of here.

    Where a derivative jumps, as at a limit of delta, the gradient of float32 is that of weights a rounding away.
    """
    try:
        for one, other in zip(found, exact(), strict=True):
            subject.same_gradient(one, other, what)
    except AssertionError:
        for seed in range(ROUNDINGS if subject.module.dtype == torch.float32 else 0):
            with subject.rounded(seed), contextlib.suppress(AssertionError):
                for one, other in zip(found, exact(), strict=True):
                    subject.same_gradient(one, other, what)
                return
        raise


def gradients(logits: Tensor, parameters: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    """The gradient of each parameter; zeros where it does not matter, as when the logits were replaced."""
    if not logits.requires_grad:
        return [torch.zeros_like(parameter) for parameter in parameters]
    return list(
        torch.autograd.grad(logits, parameters, cotangent.to(logits.dtype), allow_unused=True, materialize_grads=True)
    )


def make_edit(hook: str, op: str, position: int, value: Tensor, generator: torch.Generator) -> Edit:
    """An edit of a size that matters: tensors are of the value's own size, replacements of its own signs."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    noise = noise * (float(value.square().mean().sqrt()) or 1.0)
    factor = 0.5 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
    if op == "scale":
        return Edit(hook, op, 0.25 + 1.5 * float(torch.rand(1, generator=generator)))
    if op == "add":
        return Edit(hook, op, 0.3 * noise)
    if op == "add_at_position":
        axis = min(1, value.dim() - 1)
        position %= value.shape[axis]
        return Edit(hook, op, 0.3 * noise.select(axis, position), position)
    replacement = value * factor if value.any() else noise
    return Edit(hook, op, replacement if op == "replace" else replacement[0])


@dataclass(frozen=True)
class Step:
    """What a trace does at one place: reads and saves the value, edits it, or both in this order."""

    hook: str
    op: str
    position: int = 0  # of the edit, where it takes one
    in_place: bool = False
    from_end: bool = False  # a state's own position is written as a negative one
    saved: bool = False

    @property
    def reads(self) -> bool:
        return self.saved or self.op == READ

    def make(self, envoy: Any, edit: Edit | None, saved: dict[str, Tensor]) -> None:
        """Do it, inside a trace."""
        if self.reads:
            saved[self.hook] = envoy.output.save()
        if edit is not None:
            edit.in_place(envoy) if self.in_place else edit.assign(envoy)


def draw_steps(hooks: list[str], random: Random, operations: tuple[str, ...] = OPERATIONS) -> list[Step]:
    """Up to eight steps, each at another place, in execution order."""
    chosen = random.sample(range(len(hooks)), min(len(hooks), random.randint(1, 8)))
    return [
        Step(hooks[i], random.choice(operations), random.randrange(20), *(random.random() < 0.5 for _ in range(3)))
        for i in sorted(chosen)
    ]


class Plan:
    """Steps in execution order, with tensors of the right shapes for given tokens."""

    def __init__(self, subject: Subject, steps: list[Step], tokens: Tensor, seed: int) -> None:
        self.subject, self.tokens, self.steps = subject, tokens, steps
        values, generator = dict(subject.values(tokens)), torch.Generator().manual_seed(seed)
        self.edits = {
            step.hook: make_edit(step.hook, step.op, step.position, values[step.hook], generator)
            for step in steps
            if step.op != READ
        }
        self.saved: dict[str, Tensor] = {}

    def make(self, steps: Iterable[Step] | None = None) -> None:
        """Do every step, inside a trace."""
        for step in self.steps if steps is None else steps:
            envoy = self.subject.place(step.hook, self.tokens.shape[1] if step.from_end else None)
            step.make(envoy, self.edits.get(step.hook), self.saved)

    def reference(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The reference's logits, and the values that the steps must have saved: each before its own edit."""
        saved: dict[str, Tensor] = {}
        reads, edit_value = {step.hook for step in self.steps if step.reads}, editing(self.edits.values())

        def edit(hook: str, value: Tensor) -> Tensor:
            if hook in reads:
                saved[hook] = value.detach()
            return edit_value(hook, value)

        return self.subject.forward(self.tokens, edit), saved

    def check(self, logits: Tensor | None) -> Tensor:
        """Hold the logits and the saved values to the reference's; return its logits."""
        expected, saved = self.reference()
        if logits is not None:
            self.subject.same(logits, expected, "logits")
        assert set(self.saved) == set(saved)
        for hook, value in saved.items():
            self.subject.same(self.saved[hook], value, hook)
        return expected


def name_of(hook: str) -> str:
    """The last part of a value's name: ``"y"``, ``"hook_y"``."""
    return split_state(hook)[0].rpartition(".")[2]


def of_rows(hooks: list[str]) -> list[str]:
    """Without A, which has no batch axis: an edit of it is one for every invoke."""
    return [hook for hook in hooks if name_of(hook) not in ("A", "hook_A")]


def by_position(hooks: list[str]) -> list[str]:
    """The values whose second axis is the positions', or that are the state after one of them."""
    other = {"h_start", "pattern"}
    return [
        hook
        for hook in of_rows(hooks)
        if name_of(hook).removeprefix("hook_") not in other and not hook.endswith("conv1d.hook_out")
    ]


def plan_of(subject: Subject, random: Random, hooks: list[str] | None = None) -> Plan:
    """A plan on tokens of a random batch."""
    seed = random.randrange(10**6)
    tokens = draw_tokens(random.choice([1, 2, 3]), seed)
    return Plan(subject, draw_steps(subject.hooks if hooks is None else hooks, random), tokens, seed)


def with_gradients(subject: Subject, random: Random) -> None:
    """One trace, and the gradient of every parameter."""
    plan = plan_of(subject, random)
    with subject.model.trace(plan.tokens):
        plan.make()
        logits = subject.model.logits.output.save()
    expected, seed = plan.check(logits), random.randrange(10**6)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = gradients(logits, subject.parameters, cotangent)
    same_gradients(subject, found, lambda: gradients(plan.reference()[0], subject.parameters, cotangent), "a parameter")


def without_gradients(subject: Subject, random: Random) -> None:
    """One trace, where kernels may be fused."""
    plan, mode = plan_of(subject, random), random.choice([torch.no_grad, torch.inference_mode])
    with mode():
        with subject.model.trace(plan.tokens):
            plan.make()
            logits = subject.model.logits.output.save()
        plan.check(logits)


def invokes(subject: Subject, random: Random) -> None:
    """Prompts with edits of their own in one run, and one without any."""
    one, two = (plan_of(subject, random, of_rows(subject.hooks)) for _ in range(2))
    with torch.no_grad(), subject.model.trace() as tracer:
        with tracer.invoke(one.tokens):
            one.make()
            logits_one = subject.model.logits.output.save()
        with tracer.invoke(two.tokens):
            two.make()
            logits_two = subject.model.logits.output.save()
        with tracer.invoke(one.tokens):
            clean = subject.model.logits.output.save()
    one.check(logits_one)
    two.check(logits_two)
    Plan(subject, [], one.tokens, 0).check(clean)


def barrier(subject: Subject, random: Random) -> None:
    """A value of one prompt put into the run of another."""
    hook, seed = random.choice(of_rows(subject.hooks)), random.randrange(10**6)
    source, tokens = draw_tokens(2, seed), draw_tokens(2, seed + 1)
    with torch.no_grad(), subject.model.trace() as tracer:
        both = tracer.barrier(2)
        with tracer.invoke(source):
            value = subject.place(hook).output
            both()
        with tracer.invoke(tokens):
            both()
            subject.place(hook).output = value
            logits = subject.model.logits.output.save()
    moved = dict(subject.values(source))[hook]
    subject.same(logits, subject.forward(tokens, lambda name, own: moved if name == hook else own), f"moved {hook}")


def with_hooks(subject: Subject, random: Random) -> None:
    """The edits of a plan as hooks of run_with_hooks."""
    plan = plan_of(subject, random)
    plan.steps = [step for step in plan.steps if subject.hook_name(step.hook)]
    plan.edits = {step.hook: plan.edits[step.hook] for step in plan.steps if step.op != READ}
    hooks = []
    for step in plan.steps:

        def hook(value: Tensor, hook: Any, step: Step = step) -> Tensor | None:
            if step.reads:
                plan.saved[step.hook] = value.clone()
            edit = plan.edits.get(step.hook)
            return None if edit is None else edit(value)

        hooks.append((subject.hook_name(step.hook), hook))
    with torch.no_grad():
        plan.check(subject.model.run_with_hooks(plan.tokens, fwd_hooks=hooks))


def cached(subject: Subject, random: Random) -> None:
    """Values of run_with_cache."""
    tokens = draw_tokens(2, random.randrange(10**6))
    values = dict(subject.values(tokens))
    named = [(subject.hook_name(hook), values[hook]) for hook in subject.hooks]
    chosen = dict(random.sample([(name, value) for name, value in named if name], 3))
    with torch.no_grad():
        logits, cache = subject.model.run_with_cache(tokens, names_filter=list(chosen))
    subject.same(logits, subject.forward(tokens), "logits")
    assert set(cache) == set(chosen)
    for name, value in chosen.items():
        subject.same(cache[name], value, name)


def lasting(subject: Subject, random: Random) -> None:
    """A lasting edit, and a trace of the edited model."""
    plan = plan_of(subject, random)
    plan.steps = [replace(step, saved=False) for step in plan.steps if step.op != READ]
    with torch.no_grad():
        with subject.model.edit() as (_, edited):
            plan.make()
        with edited.trace(plan.tokens):
            logits = edited.logits.output.save()
        plan.check(logits)
        with subject.model.trace(plan.tokens):
            clean = subject.model.logits.output.save()
        Plan(subject, [], plan.tokens, 0).check(clean)


def stopped(subject: Subject, random: Random) -> None:
    """A run that ends after the last step."""
    plan = plan_of(subject, random)
    with torch.no_grad(), subject.model.trace(plan.tokens) as tracer:
        plan.make()
        tracer.stop()
    plan.check(None)


def skipped(subject: Subject, random: Random) -> None:
    """A block that does not run, and edits on either side of it."""
    layer = random.randrange(len(subject.model.layers))
    inside, name = f"layers[{layer}].", f"layers[{layer}].resid_post"
    outside = [hook for hook in subject.hooks if not subject.path(hook).startswith(inside)]
    plan = plan_of(subject, random, outside)
    post = next(hook for hook in subject.hooks if subject.path(hook) == name)
    value = make_edit(post, "replace", 0, dict(subject.values(plan.tokens))[post], torch.Generator().manual_seed(layer))
    before = [step for step in plan.steps if subject.hooks.index(step.hook) < subject.hooks.index(post)]
    with torch.no_grad(), subject.model.trace(plan.tokens):
        plan.make(before)
        subject.model.layers[layer].skip(value.argument)
        plan.make(plan.steps[len(before) :])
        logits = subject.model.logits.output.save()
    plan.edits[post] = value
    plan.check(logits)


def at_positions(edits: list[dict[str, Edit]], spans: list[range], seen: list[dict[str, Tensor]]) -> EditValue:
    """The edits of each call of a generation, made in one forward over all tokens: each at its call's positions.

    What each call finds at a value before its own edit is put into ``seen``.
    """

    def edit(hook: str, value: Tensor) -> Tensor:
        stem, position = split_state(hook)
        for own, span, found in zip(edits, spans, seen, strict=True):
            if position is not None:
                if position in span:
                    here = state(stem, position - span.start)
                    found[here] = value
                    value = own[here](value) if here in own else value
            elif value.dim() > 1 and value.shape[1] >= span.stop:
                found[hook] = value[:, span.start : span.stop]
                if hook in own:
                    value = value.clone()
                    value[:, span.start : span.stop] = own[hook](value[:, span.start : span.stop])
        return value

    return edit


def generated(subject: Subject, random: Random) -> None:
    """Edits of a prefill and of decode steps, which one forward over all tokens must repeat."""
    if subject.hybrid and not subject.model.attention_layers:  # transformers' cache of such a Nemotron-H has no length
        return without_gradients(subject, random)
    steps, batch, seed = random.choice([2, 3]), random.choice([1, 2]), random.randrange(10**6)
    tokens = draw_tokens(batch, seed)
    plans = []
    for call in range(steps):
        hooks = by_position(subject.hooks if call == 0 else subject.hooks_on(1))
        plans.append(draw_steps(hooks, random, (READ, "scale", "zero")))
    edits = [
        {
            step.hook: make_edit(step.hook, step.op, 0, torch.ones(1), torch.Generator().manual_seed(seed + call))
            for step in plan
            if step.op != READ
        }
        for call, plan in enumerate(plans)
    ]
    saved: list[dict[str, Tensor]] = [{} for _ in plans]
    with torch.no_grad(), subject.model.generate(tokens, max_new_tokens=steps, do_sample=False) as tracer:
        logits = [].save()
        for call in tracer.iter[:steps]:
            for step in plans[call]:
                step.make(subject.place(step.hook), edits[call].get(step.hook), saved[call])
            logits.append(subject.model.logits.output)
        sequence = tracer.result.save()
    spans = [range(L)] + [range(L + call, L + call + 1) for call in range(steps - 1)]
    seen: list[dict[str, Tensor]] = [{} for _ in plans]
    expected = subject.forward(sequence[:, :-1], at_positions(edits, spans, seen))
    for found, values in zip(saved, seen, strict=True):
        for hook, value in found.items():
            exact = values[hook]
            same_positions = exact if split_state(hook)[1] is not None else exact[:, -value.shape[1] :]
            subject.same(value, same_positions, hook)  # of its logits, generate asks the prefill for the last alone
    logits[0] = logits[0][:, -1:]  # generate asks the prefill for no more
    subject.same(torch.cat(list(logits), dim=1), expected[:, L - 1 :], "logits")


def padded(subject: Subject, random: Random) -> None:
    """Prompts of two lengths in one run, each with edits of its own: what is left of the shorter one is padding."""
    plans = []
    for length in (L, L - random.choice([1, 2, 4])):
        hooks, seed = by_position(subject.hooks_on(length)), random.randrange(10**6)
        steps = [replace(step, from_end=True) for step in draw_steps(hooks, random, (READ, "scale", "zero"))]
        plans.append(Plan(subject, steps, draw_tokens(random.choice([1, 2]), seed, length), seed))
    random.shuffle(plans)
    logits = []
    with torch.no_grad(), subject.model.trace() as tracer:
        for plan in plans:
            missing = L - plan.tokens.shape[1]
            tokens = torch.nn.functional.pad(plan.tokens, (missing, 0))
            with tracer.invoke(tokens, attention_mask=(tokens != 0).long()):
                plan.make()
                logits.append(subject.model.logits.output.save())
    for plan, found in zip(plans, logits, strict=True):
        length = plan.tokens.shape[1]
        plan.saved = {
            hook: value if split_state(hook)[1] is not None else value[:, -length:]
            for hook, value in plan.saved.items()
        }
        plan.check(found[:, -length:])


def in_a_session(subject: Subject, random: Random) -> None:
    """A value of one trace of a session in another."""
    hook, seed = random.choice(subject.hooks), random.randrange(10**6)
    source, tokens = draw_tokens(2, seed), draw_tokens(2, seed + 1)
    with torch.no_grad(), subject.model.session():
        with subject.model.trace(source):
            value = subject.place(hook).output
        with subject.model.trace(tokens):
            subject.place(hook).output = value
            logits = subject.model.logits.output.save()
    moved = dict(subject.values(source))[hook]
    subject.same(logits, subject.forward(tokens, lambda name, own: moved if name == hook else own), f"moved {hook}")


#: The modules whose outputs are values of the reference.
MODULES = ("in_proj", "x_proj", "out_proj", "norm", "embeddings", "norm_f")


def with_torch_hooks(subject: Subject, random: Random) -> None:
    """A PyTorch hook on a module below, and edits of a trace."""
    name = random.choice([hook for hook in subject.hooks if subject.path(hook).rpartition(".")[2] in MODULES])
    plan = plan_of(subject, random, [hook for hook in subject.hooks if hook != name])
    factor = Edit(name, "scale", 0.25 + random.random())
    handle = subject.place(name)._module.register_forward_hook(lambda module, args, output: factor(output))
    try:
        with torch.no_grad(), subject.model.trace(plan.tokens):
            plan.make()
            logits = subject.model.logits.output.save()
    finally:
        handle.remove()
    plan.edits[name] = factor
    try:
        plan.check(logits)
    except AssertionError as error:
        raise AssertionError(f"{name} {plan.steps}") from error


def gradient_of_a_value(subject: Subject, random: Random) -> None:
    """The gradient of some logits with respect to a value, edits of others made."""
    plan = plan_of(subject, random)
    plan.steps = [replace(step, saved=False) for step in plan.steps if step.op != READ]
    names = [hook for hook in subject.hooks[:-2] if hook not in plan.edits and split_state(hook)[1] is None]
    wanted = random.choice(names)

    def reference() -> list[Tensor]:
        """The gradient; none where the value has no part in the logits."""
        seen: dict[str, Tensor] = {}

        def edit(hook: str, value: Tensor) -> Tensor:
            if hook == wanted:
                seen[hook] = value = value.clone()
            return plan.edits[hook](value) if hook in plan.edits else value

        loss = subject.forward(plan.tokens, edit)[:, -1].square().sum()
        if not loss.requires_grad or not seen[wanted].requires_grad:
            return []
        return list(torch.autograd.grad(loss, seen[wanted], allow_unused=True, materialize_grads=True))

    if not (exact := reference()):
        return without_gradients(subject, random)
    before = [step for step in plan.steps if subject.hooks.index(step.hook) < subject.hooks.index(wanted)]
    with subject.model.trace(plan.tokens):
        plan.make(before)
        value = subject.place(wanted).output
        plan.make(plan.steps[len(before) :])
        loss = subject.model.logits.output[:, -1].square().sum()
        if exact[0].any():
            with loss.backward():
                gradient = value.grad.save()
        else:
            gradient = exact[0].save()
    same_gradients(subject, [gradient], reference, wanted)


#: Sites that `patch_grid` patches at a position.
GRID_SITES = ("resid_pre", "x_in", "conv", "ssm_input", "delta", "B", "C", "h", "y", "skip", "ssm_output", "resid_post")


def grid(subject: Subject, random: Random) -> None:
    """Every cell of a patching grid."""
    seed, site = random.randrange(10**6), random.choice(GRID_SITES)
    tokens = draw_tokens(1, seed)
    source = tokens.clone()
    source[0, random.randrange(L) :] = draw_tokens(1, seed + 1)[0, 0]
    if torch.equal(source, tokens) or not (site.startswith("resid") or subject.model.ssm_layers):
        return without_gradients(subject, random)
    found = patch_grid(
        subject.model,
        tokens,
        source,
        site,
        lambda logits: logits[:, 3] - logits[:, 5],
        progress=False,
        distribute=False,
    )
    values = dict(subject.values(source))
    hooks = {subject.path(hook): hook for hook in subject.hooks}
    for row, layer in enumerate(found.layers):
        for position in random.sample(range(L), 2):
            part = f"layers[{layer}]." if site.startswith("resid") else f"layers[{layer}].ssm."
            hook = hooks[f"{part}{site}[{position}]" if site == "h" else part + site]

            def edit(name: str, value: Tensor, hook: str = hook, position: int = position) -> Tensor:
                if name != hook:
                    return value
                if site == "h":
                    return values[hook]
                value = value.clone()
                value[:, position] = values[hook][:, position]
                return value

            logits = subject.forward(tokens, edit)[0, -1].detach()
            difference, scale = logits[3] - logits[5], float(logits.abs().max())
            subject.same(found.values[row, position], difference, f"{hook} at {position}", least=scale)


KINDS: tuple[Callable[[Subject, Random], None], ...] = (
    with_gradients,
    without_gradients,
    invokes,
    barrier,
    with_hooks,
    cached,
    lasting,
    stopped,
    skipped,
    generated,
    grid,
    padded,
    in_a_session,
    with_torch_hooks,
    gradient_of_a_value,
)


@functools.lru_cache(maxsize=2)
def subject_of(architecture: str, seed: int) -> Subject:
    return draw_subject(architecture, seed)


def run(architecture: str, seed: int) -> str:
    """Run one program; its kind."""
    random = Random(f"{architecture} program {seed}")
    kind = random.choice(KINDS)
    kind(subject_of(architecture, seed // SHARED), random)
    return kind.__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--programs", type=int, default=100, help="of each architecture")
    parser.add_argument("--json", type=Path, help="where to write what was run, architecture by architecture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    record: dict[str, Any] = {}
    if options.json and options.json.exists():
        record = json.loads(options.json.read_text(encoding="utf-8"))
    for architecture in options.architectures:
        start, failures, kinds = time.perf_counter(), [], dict.fromkeys((kind.__name__ for kind in KINDS), 0)
        for seed in range(options.first, options.first + options.programs):
            try:
                kinds[run(architecture, seed)] += 1
            except Exception:
                failures.append(seed)
                print(f"{architecture}, seed {seed}:\n{traceback.format_exc()}", flush=True)
        seconds = round(time.perf_counter() - start)
        record[architecture] = {
            "first": options.first,
            "programs": options.programs,
            "kinds": kinds,
            "failures": failures,
            "seconds": seconds,
        }
        print(f"{architecture}: {options.programs} programs, {len(failures)} failures, {seconds} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
