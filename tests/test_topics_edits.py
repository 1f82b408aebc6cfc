"""Topics of nnsight's documentation in which a run is changed, one test for each topic and architecture.

What is expected is what Hugging Face's own model says in which PyTorch hooks read and edit the same, and of the sites
inside of an SSM, which it has no modules for, what the float64 reference says.
"""

from __future__ import annotations

from typing import Any

import torch
from nnsight.intervention.envoy import Envoy
from topics import base_of, both_of, changed, double, each_architecture, fresh, make, mixer_of, run_with, same, seen
from torch import Tensor, nn

from mamba_trace import MambaTrace

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


# -- edits -------------------------------------------------------------------------------------------------


@each_architecture
def test_lasting_edits(architecture: str) -> None:
    """Of a copy and in place, in traces and in generate, where one without tracer.iter is of the first step."""
    both, (_, model) = both_of(architecture), fresh(architecture)
    plain, tokens, blocks = both.plain, both.tokens, base_of(both.plain).layers

    def logits_of(model: MambaTrace) -> Tensor:
        with torch.no_grad(), model.trace(tokens):
            logits = model.logits.output.save()
        return logits

    with model.edit() as (_, copied):
        copied.layers[0].output = 2 * copied.layers[0].output
    clean, edited = run_with(plain, tokens, {}), run_with(plain, tokens, {blocks[0]: double})
    same(logits_of(copied), edited)
    same(logits_of(model), clean)
    with changed(blocks[0], lambda value: 2 * value if value.shape[1] > 1 else value):
        expected = plain.generate(tokens, **GREEDY)
    with copied.generate(tokens, **GREEDY) as tracer:
        found = tracer.result.save()
    assert torch.equal(found, expected)
    with model.edit(inplace=True):
        model.layers[1].output[:] *= 2
    same(logits_of(model), run_with(plain, tokens, {blocks[1]: double}))
    model.clear_edits()
    same(logits_of(model), clean)


# -- gradients ---------------------------------------------------------------------------------------------


@each_architecture
def test_gradients(architecture: str) -> None:
    """Of a module's output against Hugging Face's model, and of sites against the reference."""
    both, (plain, model) = both_of(architecture), fresh(architecture)
    tokens, layer = both.tokens, model.ssm_layers[0]
    with model.trace(tokens):
        state = model.layers[layer].ssm.h[2].output
        y = model.layers[layer].ssm.y.output
        stream = model.layers[-2].output
        loss = model.logits.output[:, -1].square().sum()
        with loss.backward():
            of_stream = stream.grad.save()
            of_y = y.grad.save()
            of_state = state.grad.save()
    kept: list[Tensor] = []
    with changed(base_of(plain).layers[-2], kept.append):
        expected = plain(tokens).logits[:, -1].square().sum()
    (exact,) = torch.autograd.grad(expected, kept)
    same(of_stream, exact)
    wanted, values = {f"layers[{layer}].ssm.{site}": of for site, of in (("h[2]", of_state), ("y", of_y))}, {}

    def keep(name: str, value: Tensor) -> Tensor:
        if both.subject.path(name) in wanted:
            values[both.subject.path(name)] = value = value.clone()
        return value

    exact_loss = both.subject.forward(tokens, keep)[:, -1].square().sum()
    for path, gradient in zip(values, torch.autograd.grad(exact_loss, list(values.values())), strict=True):
        both.subject.same_gradient(wanted[path], gradient, path)


# -- skip --------------------------------------------------------------------------------------------------


@each_architecture
def test_skip(architecture: str) -> None:
    """A mixer and a block that do not run, of which a value is said to be what they return."""
    both = both_of(architecture)
    model, layer = both.model, both.model.ssm_layers[0]
    width, runs = model.config.hidden_size, []
    value = torch.linspace(-1, 1, 12 * width, dtype=torch.float64).view(2, 6, width)
    blocks = base_of(both.plain).layers
    ours = [model.layers[-1]._module, model.layers[layer].ssm._module.in_proj]
    handles = [module.register_forward_pre_hook(lambda module, args: runs.append(module)) for module in ours]
    with torch.no_grad(), model.trace(both.tokens):
        model.layers[layer].ssm.skip(value)
        mixed = model.logits.output.save()
    with torch.no_grad(), model.trace(both.tokens):
        model.layers[-1].skip(value)
        logits = model.logits.output.save()
    for handle in handles:
        handle.remove()
    same(mixed, run_with(both.plain, both.tokens, {mixer_of(blocks[layer]): lambda _: value}))
    same(logits, run_with(both.plain, both.tokens, {blocks[-1]: lambda _: value}))
    assert runs.count(ours[1]) == (1 if layer != len(blocks) - 1 else 0)


# -- source ------------------------------------------------------------------------------------------------


@each_architecture
def test_source(architecture: str) -> None:
    """An operation in a module of Hugging Face's that nothing has changed, and one in a mixer of ours."""
    both = both_of(architecture)
    model, layer, mixer = both.model, both.model.ssm_layers[0], mixer_of(base_of(both.plain).layers[0])
    assert layer == 0
    with torch.no_grad(), model.trace(both.tokens):
        model.layers[0].ssm.out_proj.source.F_linear_0.output[:] *= 2
        unembedded = model.lm_head.source.F_linear_0.output.save()
        logits = model.logits.output.save()
    with torch.no_grad(), model.trace(both.tokens):
        projected = model.layers[0].ssm.source.self_in_proj_0.output.save()
        state = model.layers[0].ssm.h[2].output.save()
    same(logits, run_with(both.plain, both.tokens, {mixer.out_proj: double}))
    with changed(mixer.out_proj, double):
        same(unembedded, seen(both.plain, both.tokens, both.plain.lm_head)[0])
    same(projected, seen(both.plain, both.tokens, mixer.in_proj)[0])
    both.subject.same(state, both.values["layers[0].ssm.h[2]"], "h[2]")


@each_architecture
def test_source_of_an_mlp(architecture: str) -> None:
    """Which is Hugging Face's own module; where there is none, the embedding is."""
    both, calls = both_of(architecture), []
    named = list(both.plain.named_modules())
    path, whole = next(
        (pair for pair in named if type(pair[1]).__name__.endswith("MLP")), ("", both.plain.get_input_embeddings())
    )
    name, inner = next(((n, m) for n, m in whole.named_children() if type(m) is nn.Linear), ("", whole))
    source = both.model.get(path).source if path else both.model.embeddings.source
    operation = getattr(source, f"self_{name}_0" if name else "F_embedding_0")
    with torch.no_grad(), both.model.trace(both.tokens):
        operation.output[:] *= 2
        logits = both.model.logits.output.save()

    def first_doubled(value: Tensor) -> Tensor:
        calls.append(1)  # a block that layers share is called in each
        return 2 * value if len(calls) == 1 else value

    same(logits, run_with(both.plain, both.tokens, {inner: first_doubled}))
    assert calls


# -- envoys and modules of one's own -----------------------------------------------------------------------


class Halves(Envoy):
    """Two names for the halves of what a module returns."""

    @property
    def first(self) -> Tensor:
        return self.output[..., : self.output.shape[-1] // 2]


@each_architecture
def test_custom_envoys(architecture: str) -> None:
    both = both_of(architecture)
    model = MambaTrace(make(architecture), envoys={"out_proj": Halves, "lm_head": Halves})
    out = mixer_of(base_of(both.plain).layers[0]).out_proj
    with torch.no_grad(), model.trace(both.tokens):
        model.layers[0].ssm.out_proj.first[:] *= 2
        half = model.lm_head.first.save()
        logits = model.logits.output.save()
    factor = torch.ones(model.config.hidden_size, dtype=torch.float64)
    factor[: len(factor) // 2] = 2
    same(logits, run_with(both.plain, both.tokens, {out: lambda value: value * factor}))
    with changed(out, lambda value: value * factor):
        same(half, seen(both.plain, both.tokens, both.plain.lm_head)[0][..., :15])


@each_architecture
def test_a_module_is_added_and_called(architecture: str) -> None:
    """Such as a sparse autoencoder: it runs in the stream, and its own output can be edited."""
    both, (_, model) = both_of(architecture), fresh(architecture)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        probe = nn.Linear(model.config.hidden_size, model.config.hidden_size).double()
    model.layers[0].probe = probe
    with torch.no_grad(), model.trace(both.tokens):
        block = model.layers[0]
        block.output = block.probe(block.output, hook=True)
        logits = model.logits.output.save()
    same(logits, run_with(both.plain, both.tokens, {base_of(both.plain).layers[0]: probe}))
