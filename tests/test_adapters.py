"""Adapters and replaced modules, before and after wrapping: a trace runs and shows the modules that are
there.

The reference is a plain Hugging Face module with the same weights, into which PEFT merged the same adapters:
Hugging Face's own mixer reads dt_proj's weight past an adapter.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from conftest import agree, make_hf, near
from reference import forward
from torch import Tensor, nn
from transformers import MambaForCausalLM

from mamba_trace import MambaTrace
from mamba_trace.errors import CheckpointError
from mamba_trace.lenses import logit_lens, state_lens
from mamba_trace.patching import patch_grid
from mamba_trace.tracing.tree import is_current

pytestmark = pytest.mark.filterwarnings("ignore")
D, E, N, V = 12, 24, 5, 31


def lora(*targets: str, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda module: peft.get_peft_model(
        module, peft.LoraConfig(**{"r": 2, "target_modules": list(targets), **options})
    )


def lora_anyway(*targets: str, **options: Any) -> Callable[[nn.Module], Any]:
    """LoRA where PEFT refuses it to a Mamba, since Hugging Face's kernels read the weight of some layers."""

    def adapt(module: nn.Module) -> Any:
        with mock.patch("peft.tuners.tuners_utils._check_lora_target_modules_mamba", return_value=None):
            return lora(*targets, **options)(module)

    return adapt


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    **{name: lora(name) for name in ("in_proj", "x_proj", "dt_proj", "lm_head", "embeddings")},
    "out_proj": lora_anyway("out_proj"),
    "several": lora("in_proj", "x_proj", "dt_proj", "lm_head", use_dora=True),
    "ia3": lambda module: peft.get_peft_model(
        module,
        peft.IA3Config(target_modules=["in_proj", "x_proj", "lm_head"], feedforward_modules=["x_proj"]),
    ),
    "modules_to_save": lora("in_proj", modules_to_save=["lm_head", "norm_f"]),
    "saved embeddings": lora("in_proj", modules_to_save=["embeddings"]),
    "norms": lambda module: peft.get_peft_model(module, peft.LNTuningConfig(target_modules=["norm", "norm_f"])),
}
ORDERS = ("inner module wrapped", "whole wrapped", "adapted after wrapping", "adapted after a run")


def adapted(module: nn.Module, kind: str) -> Any:
    """PEFT's model around a module, the adapter drawn from a seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = KINDS[kind](module).eval()
    lively(model)
    return model


def lively(model: nn.Module) -> None:
    """Draw the adapters' weights from a seed: PEFT's begin as no change, or from the global one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            if any(part in name for part in ("magnitude", "ia3_", "modules_to_save", "ln_tuning")):
                parameter.add_(noise)
            elif "lora_" in name:
                parameter.copy_(noise)


def traced(kind: str, order: str) -> MambaTrace:
    module = make_hf(tie_word_embeddings=False)
    if order == "inner module wrapped":
        adapted(module, kind)
        return MambaTrace(module)
    if order == "whole wrapped":
        return MambaTrace(adapted(module, kind))
    model = MambaTrace(module)
    if order == "adapted after a run":
        model.run_with_hooks(torch.ones(1, 3, dtype=torch.long))
    adapted(module, kind)
    return model


def reference(kind: str, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return adapted(make_hf(tie_word_embeddings=False), kind).merge_and_unload()(tokens).logits


def both(model: MambaTrace, tokens: Tensor) -> Tensor:
    """The logits of a trace, which are the same at both places where one reads them."""
    with torch.no_grad(), model.trace(tokens):
        logits = model.lm_head.output.save()
        whole = model.output.logits.save()
    assert torch.equal(logits, whole)
    return logits


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=ORDERS)
def order(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str, order: str) -> MambaTrace:
    return traced(kind, order)


def test_a_trace_and_a_cache_have_the_logits_of_peft(model, kind, tokens):
    expected = reference(kind, tokens)
    agree(both(model, tokens), expected)
    logits, cache = model.run_with_cache(tokens)
    agree(logits, expected)
    assert torch.equal(cache["hook_logits"], logits)


def test_the_terms_of_the_stream_add_up_to_the_logits(model, kind, tokens):
    logits, cache = model.run_with_cache(tokens)
    attributed = cache.logit_attrs(cache.decompose_resid(), tokens=7).sum(0)
    agree(attributed, logits[..., 7])
    agree(cache.logit_lens()[-1], logits)
    agree(logit_lens(model, tokens[:1], token=7).logits[-1], logits[0, :, 7])


def test_an_edit_its_gradient_and_a_cell_of_a_grid(model, kind, tokens):
    other = traced(kind, "inner module wrapped")
    found = []
    for one in (model, other):
        with one.trace(tokens):
            h = one.layers[0].ssm.h[3].output
            h.requires_grad_()  # with adapters on the last layers alone there is no other reason to
            projected = one.layers[1].ssm.in_proj.output.save()
            one.layers[1].ssm.h[5].output[:] *= 0.5
            logits = one.lm_head.output.save()
            gradient = torch.autograd.grad(logits.square().sum(), h)[0].save()
        found.append((projected, logits, gradient))
    for value, expected in zip(*found, strict=True):
        agree(value, expected)
    assert not torch.allclose(found[0][1], both(model, tokens))
    metric = lambda logits: logits[:, 3] - logits[:, 5]  # noqa: E731
    grid = patch_grid(model, tokens[:1], tokens[1:2], "h", metric)
    with torch.no_grad(), model.trace(tokens[1:2]):
        state = model.layers[1].ssm.h[4].output.save()
    with torch.no_grad(), model.trace(tokens[:1]):
        model.layers[1].ssm.h[4].output = state
        cell = metric(model.lm_head.output[:, -1]).save()
    agree(grid.values[1, 4], cell[0].double().to(grid.values.dtype))


def test_what_is_called_by_the_names_of_mamba_lens(model, kind, tokens):
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0))
    in_proj = model.layers[1].ssm.in_proj
    with torch.no_grad():
        whole = in_proj(x)
        agree(model.blocks[1].in_proj(x), whole[..., :E])
        agree(model.blocks[1].skip_proj(x), whole[..., E:])
    if hasattr(in_proj._module, "base_layer"):
        with pytest.raises(CheckpointError, match=r"blocks\[1\].in_proj.weight is not one parameter: a \w+ .*merge"):
            model.blocks[1].in_proj.weight  # noqa: B018
        with pytest.raises(CheckpointError, match="not one parameter"):
            model.blocks[1].in_proj = torch.zeros(E, D)


# -- LoRA on each projection -------------------------------------------------------------------------------

#: Layers that Hugging Face's own mixer calls; it reads the weights of the others past an adapter.
CALLED = ("in_proj", "x_proj", "out_proj", "lm_head", "embeddings")


def places_beside(model: MambaTrace, tokens: Tensor) -> list[Tensor]:
    """Values of a run without an edit, and of one whose state and gate are edited."""
    ssm = model.layers[1].ssm
    with torch.no_grad(), model.trace(tokens):
        seen = [ssm.in_proj.output, ssm.conv.output, ssm.x_proj.output, ssm.dt_proj.output, ssm.h[3].output]
        seen = [value.clone() for value in [*seen, ssm.out_proj.output, model.lm_head.output]].save()
    with torch.no_grad(), model.trace(tokens):
        ssm.skip.output *= 0.5
        ssm.h[5].output[:] = 0.25
        edited = [ssm.y.output, model.lm_head.output].save()
    return seen + edited


@pytest.mark.parametrize("layer", [*CALLED, "dt_proj"])
def test_lora_on_each_projection_merged_and_not(layer, tokens):
    """Numbers of PEFT on plain Hugging Face, and reads and edits of a model that has the merged weights."""
    plain = adapted(make_hf(tie_word_embeddings=False), layer)
    with torch.no_grad():
        unmerged = plain(tokens).logits
        plain_module = plain.merge_and_unload()
        merged = plain_module(tokens).logits
    expected = places_beside(MambaTrace(plain_module), tokens)
    agree(expected[6], merged)
    module = make_hf(tie_word_embeddings=False)
    model = MambaTrace(module)
    base = both(model, tokens)
    tuned = adapted(module, layer)
    for change in (lambda: None, tuned.merge_adapter, tuned.unmerge_adapter):
        change()
        seen = places_beside(model, tokens)
        for value, other in zip(seen, expected, strict=True):
            agree(value, other)
        if layer in CALLED:
            agree(seen[6], unmerged)
        assert not torch.allclose(seen[6], base)
        assert not torch.allclose(seen[-1], seen[6])
    assert type(tuned.merge_and_unload()) is type(model._module)
    agree(both(model, tokens), merged)


def test_lora_on_the_convolution(tokens):
    """Neither PEFT nor Hugging Face computes it for a Mamba, so the reference is written out in float64."""
    module = make_hf(tie_word_embeddings=False)
    weights = {name: weight.clone() for name, weight in module.state_dict().items()}
    model = MambaTrace(module)
    base = both(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = lora_anyway("conv1d", r=E)(module).eval()
    lively(tuned)
    layers = [block.mixer.conv1d for block in module.backbone.layers]
    x_in: list[Tensor] = []

    def edit(hook: str, value: Tensor) -> Tensor:
        if hook.endswith("hook_in_proj"):
            x_in.append(value)
        if not hook.endswith("hook_conv"):
            return value
        conv1d = layers[len(x_in) - 1]
        A, B = (copy.deepcopy(lora["default"]).double() for lora in (conv1d.lora_A, conv1d.lora_B))
        added = B(A(x_in[-1].transpose(1, 2)))[..., : value.shape[1]] * conv1d.scaling["default"]
        return value + added.transpose(1, 2)

    with torch.no_grad():
        expected = forward(weights, module.config, tokens, edit).float()
    agree(both(model, tokens), expected)
    assert not torch.allclose(expected, base)
    with torch.no_grad(), model.trace(tokens[:, :5], use_cache=True):
        cache = model.output.cache.save()
    with torch.no_grad(), model.trace(tokens[:, 5:], cache=cache):
        conv = model.layers[0].ssm.conv1d.output.save()
        logits = model.lm_head.output.save()
    assert conv.shape[:2] == (3, E)
    agree(logits, expected[:, 5:])
    with tuned.disable_adapter():
        agree(both(model, tokens), base)


@pytest.mark.parametrize("groups", [1, 2], ids=["not depthwise", "two groups"])
def test_another_convolution_in_the_place_of_conv1d_is_called(groups, tokens):
    """A kernel reads the weight of conv1d only where it is the convolution that the configuration says."""
    torch.manual_seed(4)
    other = nn.Conv1d(E, E, 3, padding=2, groups=groups)
    logits = []
    for kernels in ("auto", "reference"):
        module = make_hf(tie_word_embeddings=False)
        module.backbone.layers[1].mixer.conv1d = other
        logits.append(both(MambaTrace(module, kernels=kernels), tokens))
    agree(logits[0], logits[1])


# -- adapters that come and go -----------------------------------------------------------------------------


def test_adapters_are_switched_disabled_merged_and_unloaded(tokens):
    module = make_hf(tie_word_embeddings=False)
    model = MambaTrace(module)
    base = both(model, tokens)
    tuned = adapted(module, "several")

    def same() -> Tensor:
        with torch.no_grad():
            expected = tuned(tokens).logits
        found = both(model, tokens)
        agree(found, expected)
        _, cache = model.run_with_cache(tokens)
        agree(cache.logit_attrs(cache.decompose_resid(), tokens=7).sum(0), expected[..., 7])
        return found

    first = same()
    assert not torch.allclose(first, base)
    with tuned.disable_adapter():
        assert torch.equal(both(model, tokens), base)
        agree(model.tokens_to_residual_directions(7), module.lm_head.base_layer.weight[7])
    tuned.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head", "x_proj"]))
    lively(tuned)
    tuned.eval()
    tuned.set_adapter("second")
    second = same()
    assert not torch.allclose(first, second)
    with torch.no_grad(), model.trace(tokens):
        inner = model.lm_head.lora_A.second.output.save()  # what came after the first run can be looked at
    assert inner.shape == (*tokens.shape, 3)
    tuned.merge_adapter()
    agree(same(), second)
    tuned.unmerge_adapter()
    agree(same(), second)
    plain = tuned.merge_and_unload()
    assert plain is model._module
    assert type(module.lm_head) is nn.Linear
    agree(both(model, tokens), second)
    model.blocks[1].in_proj.weight[:] = 0
    assert not torch.allclose(both(model, tokens), second)


def test_saved_modules_are_unloaded(tokens):
    module = make_hf(tie_word_embeddings=False)
    model = MambaTrace(module)
    tuned = adapted(module, "modules_to_save")
    agree(both(model, tokens), reference("modules_to_save", tokens))
    tuned.unload()
    with torch.no_grad():
        expected = adapted(make_hf(tie_word_embeddings=False), "modules_to_save").unload()(tokens).logits
    agree(both(model, tokens), expected)
    assert isinstance(module.backbone.norm_f, type(make_hf().backbone.norm_f))
    copied = MambaTrace(copy.deepcopy(module))
    agree(copied.run_with_hooks(tokens), expected)


def test_prompts_that_are_tuned_come_before_the_model(tokens):
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=3,
        token_dim=D,
        num_layers=3,
        num_attention_heads=1,
        num_transformer_submodules=1,
    )
    module = make_hf()
    model = MambaTrace(module)
    base = both(model, tokens)
    tuned = peft.get_peft_model(module, config).eval()
    with torch.no_grad():
        expected = tuned(tokens, attention_mask=torch.ones_like(tokens)).logits  # [B,3+L,V]
        prompts = tuned.get_prompt(len(tokens))
        embedded = torch.cat((prompts, module.backbone.embeddings(tokens)), dim=1)
    assert torch.equal(both(model, tokens), base)
    with torch.no_grad(), model.trace(inputs_embeds=embedded):
        logits = model.lm_head.output.save()
    agree(logits, expected)
    with pytest.raises(CheckpointError, match=r"puts tokens of its own in front.*inputs_embeds"):
        MambaTrace(tuned)


# -- replaced modules --------------------------------------------------------------------------------------


def new_head(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    torch.manual_seed(5)
    module.lm_head = nn.Linear(D, V, bias=True)


def new_embedding(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    module.set_input_embeddings(other.get_input_embeddings())


def new_projection(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    torch.manual_seed(5)
    module.backbone.layers[1].mixer.x_proj = nn.Sequential(nn.Linear(E, 3), nn.Linear(3, 14))


def new_norm(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    module.backbone.norm_f = other.backbone.norm_f


def new_mixer(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    module.backbone.layers[1].mixer = other.backbone.layers[1].mixer


def new_block(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    module.backbone.layers[1] = other.backbone.layers[1]


def new_backbone(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    module.backbone = other.backbone


def swapped_projections(module: MambaForCausalLM, other: MambaForCausalLM) -> None:
    first, second = (module.backbone.layers[layer].mixer for layer in (0, 2))
    first.x_proj, second.x_proj = second.x_proj, first.x_proj


REPLACEMENTS = [
    new_head,
    new_embedding,
    new_projection,
    new_norm,
    new_mixer,
    new_block,
    new_backbone,
    swapped_projections,
]


def replaced(replace: Callable) -> tuple[MambaForCausalLM, MambaTrace]:
    """A plain module with the replacement, and a wrapped one that got it after a run."""
    plain = make_hf(tie_word_embeddings=False)
    replace(plain, make_hf(seed=9, tie_word_embeddings=False))
    model = MambaTrace(make_hf(tie_word_embeddings=False), kernels="reference")
    model.run_with_hooks(torch.ones(1, 3, dtype=torch.long))
    replace(model._module, make_hf(seed=9, tie_word_embeddings=False))
    return plain, model


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_a_module_that_was_replaced_is_the_one_that_is_traced(replace, tokens):
    plain, model = replaced(replace)
    with torch.no_grad():
        expected = plain(tokens).logits
    with torch.no_grad(), model.trace(tokens):
        embedded = model.embeddings.output.save()
        states = [layer.ssm.h.output for layer in list(model.layers)[:2]].save()
        projected = model.layers[2].ssm.x_proj.output.save()
        normed = model.norm_f.output.save()
        logits = model.lm_head.output.save()
    agree(logits, expected)
    agree(model.run_with_cache(tokens)[0], expected)
    same = MambaTrace(plain, kernels="reference")
    with torch.no_grad(), same.trace(tokens):
        agree(embedded, same.embeddings.output)
        for state, layer in zip(states, list(same.layers)[:2], strict=True):
            agree(state, layer.ssm.h.output)
        agree(projected, same.layers[2].ssm.x_proj.output)
        agree(normed, same.norm_f.output)
    assert model.kernels == "reference"
    assert [run.layer for run in model.last_run] == [0, 1, 2]
    with torch.no_grad(), model.trace(tokens):
        model.layers[1].ssm.h[2].output[:] = 0
        edited = model.lm_head.output.save()
    assert not torch.allclose(edited, expected)


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_the_terms_still_add_up(replace, tokens):
    _, model = replaced(replace)
    logits, cache = model.run_with_cache(tokens)
    bias = 0 if model._module.lm_head.bias is None else float(model._module.lm_head.bias[7])
    agree(cache.logit_attrs(cache.decompose_resid(), tokens=7).sum(0) + bias, logits[..., 7])
    agree(cache.logit_lens()[-1], logits)


def test_a_bias_of_the_unembedding_is_no_part_of_what_a_state_adds(tokens):
    _, model = replaced(new_head)
    with_bias = state_lens(model, tokens[:1], token=7).logits
    directions = model.tokens_to_residual_directions(torch.arange(V))
    assert torch.equal(directions, model._module.lm_head.weight)
    with torch.no_grad():
        model._module.lm_head.bias.zero_()
    agree(with_bias, state_lens(model, tokens[:1], token=7).logits)


def test_a_direction_is_right_before_anything_has_run():
    model = MambaTrace(make_hf(tie_word_embeddings=False))
    adapted(model._module, "lm_head")
    head = model._module.lm_head
    weight = head.base_layer.weight + head.get_delta_weight("default")
    ids = torch.tensor([[3, 5], [5, 30]])
    agree(model.tokens_to_residual_directions(ids), weight[ids].detach())


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (
            lambda module: setattr(module.backbone.layers[1], "mixer", nn.Identity()),
            r"layers\[1\]\.ssm is a Identity",
        ),
        (lora("lm_head", modules_to_save=["mixer"]), r"layers\[0\]\.ssm is a ModulesToSaveWrapper"),
    ],
    ids=["another module", "a mixer that is saved"],
)
def test_what_has_no_sites_is_refused_before_it_runs(replace, message, tokens):
    plain = make_hf()
    model = MambaTrace(plain)
    before = both(model, tokens)
    mixers = [block.mixer for block in plain.backbone.layers]
    replace(plain)
    entered = []
    with pytest.raises(CheckpointError, match=message), model.trace(tokens):
        entered.append(model.embeddings.output)
    assert not entered
    with pytest.raises(CheckpointError, match=message):
        MambaTrace(plain)
    for block, mixer in zip(plain.backbone.layers, mixers, strict=True):
        block.mixer = mixer
    plain.lm_head = getattr(plain.lm_head, "base_layer", plain.lm_head)
    assert torch.equal(both(model, tokens), before)


def test_the_tree_is_left_alone_while_nothing_changes(tiny, tokens, monkeypatch):
    assert is_current(tiny)
    monkeypatch.setattr(MambaTrace, "_update", lambda *args: pytest.fail("the tree was built again"))
    both(tiny, tokens)
    both(tiny, tokens)


@pytest.mark.parametrize("kind", ["in_proj", "out_proj"])
@pytest.mark.parametrize("model_type", ["falcon_mamba", "mamba2"])
def test_an_adapter_of_the_other_architectures_is_what_it_merges_to(model_type: str, kind: str, tokens: Tensor) -> None:
    plain, model = make_hf(model_type=model_type), adapted(make_hf(model_type=model_type), kind)
    exact = copy.deepcopy(model).double()
    _, unmerged = MambaTrace(model).run_with_cache(tokens)
    _, merged = MambaTrace(model.merge_and_unload()).run_with_cache(tokens)
    _, unmerged_exactly = MambaTrace(exact).run_with_cache(tokens)
    _, merged_exactly = MambaTrace(exact.merge_and_unload()).run_with_cache(tokens)
    _, without = MambaTrace(plain).run_with_cache(tokens)
    assert list(unmerged) == list(merged)
    for name in merged:
        near(unmerged_exactly[name], merged_exactly[name], 1e-12, name)
        for rounded in (unmerged, merged):  # the norm of small values enlarges what rounding comes to
            near(rounded[name], merged_exactly[name], 2e-5, name)
    assert not torch.allclose(merged["hook_logits"], without["hook_logits"], atol=1e-3)
