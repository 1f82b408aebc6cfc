"""Topics of nnsight's documentation, one test for each topic and architecture.

What is expected is what Hugging Face's own model says in which PyTorch hooks read and edit the same, and of the sites
inside of an SSM, which it has no modules for, what the float64 reference says.
"""

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch
from reference import Edit
from topics import base_of, both_of, changed, double, each_architecture, mixer_of, run_with, same, seen
from torch import Tensor, nn

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


# -- access ------------------------------------------------------------------------------------------------


@each_architecture
def test_access(architecture: str) -> None:
    """Inputs and outputs of modules, and sites."""
    both = both_of(architecture)
    model, tokens, blocks = both.model, both.tokens, base_of(both.plain).layers
    layer = model.ssm_layers[0]
    mixer = mixer_of(blocks[layer])
    with torch.no_grad(), model.trace(tokens):
        embeddings = model.embeddings.output.save()
        projected = model.layers[layer].ssm.in_proj.output.save()
        state = model.layers[layer].ssm.h[2].output.save()
        y = model.layers[layer].ssm.y.output.save()
        left = model.layers[layer].ssm.out_proj.output.save()
        into = model.layers[1].input.save()
        out = model.layers[-1].output.save()
        unembedded = model.lm_head.output.save()
        logits = model.output.logits.save()
    modules = (both.plain.get_input_embeddings(), mixer.in_proj, mixer.out_proj, *blocks, both.plain.lm_head)
    expected = seen(both.plain, tokens, *modules)
    for actual, value in zip((embeddings, projected, left, into), expected, strict=False):
        same(actual, value)
    same(out, expected[-3])
    same(unembedded, expected[-2])
    same(logits, expected[-1])
    both.subject.same(state, both.values[f"layers[{layer}].ssm.h[2]"], "h[2]")
    both.subject.same(y, both.values[f"layers[{layer}].ssm.y"], "y")


# -- invokes -----------------------------------------------------------------------------------------------


@each_architecture
def test_batching(architecture: str) -> None:
    """Prompts of several lengths in one run, each with its own edit, have the logits that they have alone."""
    both = both_of(architecture)
    model, first, second = both.model, both.tokens[:1], both.tokens[:, :4]
    padded = nn.functional.pad(second, (2, 0))
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(first):
            model.layers[0].output[:] *= 2
            one = model.logits.output.save()
        with tracer.invoke(padded, attention_mask=(padded != 0).long()):
            model.layers[1].output[:] *= 2
            other = model.logits.output.save()
        with tracer.invoke(first):
            clean = model.logits.output.save()
        with tracer.invoke():
            every = model.logits.output.save()
    blocks = base_of(both.plain).layers
    same(one, run_with(both.plain, first, {blocks[0]: double}))
    same(other[:, 2:], run_with(both.plain, second, {blocks[1]: double}))
    same(clean, run_with(both.plain, first, {}))
    assert torch.equal(every, torch.cat((one, other, clean)))


@each_architecture
def test_barriers(architecture: str) -> None:
    """A block's output and a state go from one prompt into the run of another."""
    both = both_of(architecture)
    model, one, other = both.model, both.tokens[:1], both.tokens[1:]
    layer = model.ssm_layers[-1]
    with torch.no_grad(), model.trace() as tracer:
        meet, again = tracer.barrier(2), tracer.barrier(2)
        with tracer.invoke(one):
            stream = model.embeddings.output
            meet()
            state = model.layers[layer].ssm.h[3].output
            again()
        with tracer.invoke(other):
            meet()
            model.embeddings.output = stream
            again()
            model.layers[layer].ssm.h[3].output = 2 * state
            logits = model.logits.output.save()
    name = next(name for name in both.subject.hooks if both.subject.path(name) == f"layers[{layer}].ssm.h[3]")
    twice = Edit(name, "scale", 2.0)
    expected = both.subject.forward(one, lambda hook, value: twice(value) if hook == name else value)
    both.subject.same(logits, expected, "logits")
    assert (expected - both.subject.forward(one)).abs().max() > 1e-3


# -- caching -----------------------------------------------------------------------------------------------


@each_architecture
def test_caching(architecture: str) -> None:
    both = both_of(architecture)
    model, blocks = both.model, base_of(both.plain).layers
    layer = model.ssm_layers[0]
    with torch.no_grad(), model.trace(both.tokens) as tracer:
        chosen = tracer.cache(modules=[*model.layers, model.lm_head], include_inputs=True)
        everything = tracer.cache()
        model.layers[0].output[:] *= 2
    with changed(blocks[0], double):
        *streams, head, _ = seen(both.plain, both.tokens, *blocks[1:], both.plain.lm_head)
    for number, stream in enumerate(streams, 1):
        same(chosen.model.layers[number].output, stream)
        assert torch.equal(everything.model.layers[number].output, chosen.model.layers[number].output)
    same(chosen.model.layers[1].input, 2 * seen(both.plain, both.tokens, blocks[0])[0])
    same(chosen.model.lm_head.output, head)
    path = f"layers[{layer}].ssm.conv"
    both.subject.same(everything.model.layers[layer].ssm.conv.output, both.values[path], "conv")


@each_architecture
def test_a_cache_holds_what_outputs_are(architecture: str) -> None:
    """Of blocks, attention and routers of several rows, whatever their modules return beside it."""
    both, places = both_of(architecture), []
    model, tokens = both.model, both.tokens
    for layer, kind in zip(model.layers, model._layout.layers, strict=True):
        places += [layer.attn] if "attn" in kind.parts else []
        places += [layer.moe.router] if "moe" in kind.parts else []
        places.append(layer)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(tokens):
            whole, chosen = tracer.cache(), tracer.cache(modules=places)
        with tracer.invoke(tokens[:1]):
            values = {place.path: place.output for place in places}.save()
    for path, value in values.items():
        assert value.dim() == 3
        both.subject.same(whole[path].output[:1], value, path)
        assert torch.equal(chosen[path].output, whole[path].output), path


# -- Python in a body --------------------------------------------------------------------------------------


@each_architecture
def test_conditionals_and_loops(architecture: str) -> None:
    both = both_of(architecture)
    model, taken = both.model, []
    with torch.no_grad(), model.trace(both.tokens):
        ways = [].save()
        for layer in model.layers:
            if layer.output[0, -1, 0] > 0:
                layer.output = layer.output * 0.5
                ways.append("half")
            else:
                layer.output = layer.output + 0.25
                ways.append("more")
        logits = model.logits.output.save()

    def change(value: Tensor) -> Tensor:
        taken.append("half" if value[0, -1, 0] > 0 else "more")
        return value * 0.5 if taken[-1] == "half" else value + 0.25

    same(logits, run_with(both.plain, both.tokens, dict.fromkeys(base_of(both.plain).layers, change)))
    assert ways == taken


# -- generation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["all", "slice", "one", "some"])
@each_architecture
def test_generation_step_by_step(architecture: str, steps: str) -> None:
    """A block's output is doubled in some steps; a PyTorch hook that counts the calls does the same."""
    both = both_of(architecture)
    model, block, calls = both.model, base_of(both.plain).layers[0], []
    chosen = {"all": [0, 1, 2, 3], "slice": [1, 2], "one": [2], "some": [0, 3]}[steps]
    with torch.no_grad(), model.generate(both.tokens, **GREEDY) as tracer:
        streams = [].save()
        over = {"all": tracer.iter[:], "slice": tracer.iter[1:3], "one": tracer.iter[2], "some": tracer.iter[[0, 3]]}
        for _ in over[steps]:
            model.layers[0].output[:] *= 2
            streams.append(model.layers[0].output[:, -1])
            if steps == "all" and len(streams) == 4:
                break
        ids = tracer.result.save()
    expected: list[Tensor] = []

    def change(value: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) - 1 in chosen:
            value = 2 * value
            expected.append(value[:, -1])
        return value

    with changed(block, change):
        assert torch.equal(ids, both.plain.generate(both.tokens, **GREEDY))
    assert len(streams) == len(chosen)
    same(torch.stack(list(streams)), torch.stack(expected))


# -- scan and sessions -------------------------------------------------------------------------------------


@each_architecture
def test_scan(architecture: str) -> None:
    """Shapes without numbers: those of Hugging Face's outputs and of the reference's values."""
    both = both_of(architecture)
    model, blocks = both.model, base_of(both.plain).layers
    paths = [f"layers[{model.ssm_layers[0]}].ssm.{site}" for site in ("delta", "h[4]", "y")]
    with model.scan(both.tokens):
        shapes = [model.hook(path).output.shape for path in paths].save()
        stream = nnsight.save(model.layers[-1].output.shape)
        logits = nnsight.save(model.logits.output.shape)
    assert list(shapes) == [both.values[path].shape for path in paths]
    assert [stream, logits] == [value.shape for value in seen(both.plain, both.tokens, blocks[-1])]


@each_architecture
def test_sessions(architecture: str) -> None:
    """The mean of a block's output over two prompts goes into a third trace."""
    both = both_of(architecture)
    model, block = both.model, base_of(both.plain).layers[0]
    with torch.no_grad(), model.session():
        total = 0
        for row in range(2):
            with model.trace(both.tokens[row : row + 1]):
                total = total + model.layers[0].output
        with model.trace(both.tokens):
            model.layers[0].output = (total / 2).expand(2, -1, -1)
            logits = model.logits.output.save()
    mean = sum(seen(both.plain, both.tokens[row : row + 1], block)[0] for row in range(2)) / 2
    same(logits, run_with(both.plain, both.tokens, {block: lambda value: mean.expand_as(value)}))


# -- stop --------------------------------------------------------------------------------------------------


@each_architecture
def test_stop(architecture: str) -> None:
    both, runs = both_of(architecture), []
    handle = both.model.layers[1]._module.register_forward_pre_hook(lambda module, args: runs.append(1))
    with torch.no_grad(), both.model.trace(both.tokens) as tracer:
        stream = both.model.layers[0].output.save()
        tracer.stop()
    assert not runs
    same(stream, seen(both.plain, both.tokens, base_of(both.plain).layers[0])[0])
    with torch.no_grad(), both.model.trace(both.tokens):
        logits = both.model.logits.output.save()
    handle.remove()
    assert runs == [1]
    same(logits, run_with(both.plain, both.tokens, {}))


# -- remote ------------------------------------------------------------------------------------------------


@each_architecture
def test_remote_as_a_simulation(architecture: str) -> None:
    both = both_of(architecture)
    model, tokens = both.model, both.tokens
    with model.trace(tokens, remote="local"):
        state = model.layers[0].ssm.h[-1].output.save()
        model.layers[0].output[:] *= 2
        logits = model.logits.output.save()
    same(logits, run_with(both.plain, tokens, {base_of(both.plain).layers[0]: double}))
    both.subject.same(state.detach(), both.values["layers[0].ssm.h[5]"], "h[5]")
