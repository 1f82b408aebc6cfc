"""`mamba_trace.mamba_lens`: what a MambaLens script calls, on this package.

The experiments and examples of MambaLens's README are made here with its calls and checked against
`patch_grid`, Hugging Face's model, and values recorded from MambaLens itself (tests/record_mamba_lens.py).
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import linecache
import textwrap
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ModuleFactory, agree
from safetensors import safe_open
from torch import Tensor
from transformers import MambaForCausalLM

import mamba_trace.hooked.run_with
from mamba_trace import MambaTrace, mamba_lens
from mamba_trace.conversion import SOURCE_KEY, convert_config, convert_state_dict
from mamba_trace.conversion.model_loading import Loading
from mamba_trace.errors import CheckpointError, PromptError, UnknownSiteError
from mamba_trace.hooked import mamba_cfg as lens_formats
from mamba_trace.mamba_lens import HookedMamba, MambaCfg, MambaInitCfg
from mamba_trace.model import DEMO
from mamba_trace.patching import PatchGrid, logit_diff, patch_grid

UNCORRUPTED = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
CORRUPTED = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"
MAMBA_130M: dict[str, Any] = {  # the config.json of state-spaces/mamba-130m
    "d_model": 768,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
}

with safe_open(str(Path(__file__).parent / "data" / "mamba_lens.safetensors"), framework="pt") as file:
    RECORDED = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    SPEC = json.loads(file.metadata()["spec"])


def under(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in RECORDED.items() if name.startswith(prefix)}


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items()
    )


@pytest.fixture(scope="module")
def model() -> HookedMamba:
    return HookedMamba.from_pretrained(str(DEMO), device="cpu")


@pytest.fixture
def fresh() -> HookedMamba:
    """The demo model, to be edited."""
    return HookedMamba.from_pretrained(DEMO, device="cpu")


@pytest.fixture(autouse=True)
def _not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_trace.hooked.run_with, "_warned", False)


# -- the two experiments -----------------------------------------------------------------------------------


class Experiment:
    """What both experiments share: two prompts, their answers, and the score of a patched run."""

    def __init__(self, model: HookedMamba) -> None:
        self.model = model
        self.clean_tokens = model.to_tokens(UNCORRUPTED)
        self.corrupted_tokens = model.to_tokens(CORRUPTED)
        assert self.clean_tokens.shape == self.corrupted_tokens.shape
        self.n_positions = len(self.clean_tokens[0])
        corrupted_logits, self.corrupted_activations = model.run_with_cache(self.corrupted_tokens)
        self.lowest = self.answer_diff(corrupted_logits)
        self.highest = self.answer_diff(model(self.clean_tokens))

    def answer_diff(self, logits: Tensor) -> Tensor:
        right, wrong = self.model.to_single_token(" Emma"), self.model.to_single_token(" Shelby")
        return logits[0, -1, right] - logits[0, -1, wrong]

    def scores(self, hook_name: Any, make_hook: Any, **flags: bool) -> Tensor:
        """0 where a patch changes nothing, 1 where the answer is the corrupted run's: [n_layers, L]."""
        result = torch.zeros((self.model.cfg.n_layers, self.n_positions), device=self.model.cfg.device)
        for layer in range(self.model.cfg.n_layers):
            for position in range(self.n_positions):
                hook = partial(make_hook, layer=layer, position=position)
                patched = self.model.run_with_hooks(
                    self.clean_tokens, fwd_hooks=[(hook_name(layer, position), hook)], **flags
                )
                share = (self.answer_diff(patched) - self.lowest) / (self.highest - self.lowest)
                result[layer, position] = 1.0 - share
        return result

    def grid(self, site: str) -> PatchGrid:
        metric = logit_diff(self.model, " Emma", " Shelby")
        return patch_grid(self.model, self.clean_tokens, self.corrupted_tokens, site, metric, progress=False)


@pytest.fixture(scope="module")
def experiment(model: HookedMamba) -> Experiment:
    with torch.no_grad():
        return Experiment(model)


@torch.no_grad()
def test_patching_the_hidden_state_at_every_layer_and_position(experiment: Experiment) -> None:
    def patch_h(h: Tensor, hook: Any, layer: int, position: int) -> Tensor:
        assert hook.name == f"blocks.{layer}.hook_h.{position}"
        return experiment.corrupted_activations[hook.name]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = experiment.scores(
            lambda layer, position: f"blocks.{layer}.hook_h.{position}",
            patch_h,
            fast_ssm=True,
            fast_conv=True,
        )
    assert [warning.category for warning in caught] == [DeprecationWarning]
    assert scores.abs().max() > 0.5  # the state holds the answer somewhere
    torch.testing.assert_close(scores, experiment.grid("h").normalized(), rtol=0, atol=1e-4)


@torch.no_grad()
def test_patching_the_residual_stream_at_every_layer_and_position(experiment: Experiment) -> None:
    def patch_resid_pre(resid_pre: Tensor, hook: Any, layer: int, position: int) -> Tensor:
        resid_pre[:, position, :] = experiment.corrupted_activations[hook.name][:, position, :]
        return resid_pre

    scores = experiment.scores(lambda layer, position: f"blocks.{layer}.hook_resid_pre", patch_resid_pre)
    assert scores.abs().max() > 0.5
    torch.testing.assert_close(scores, experiment.grid("resid_pre").normalized(), rtol=0, atol=1e-4)


def test_the_labels_of_the_positions(model: HookedMamba) -> None:
    ours = model.to_str_tokens(model.to_tokens(UNCORRUPTED))
    theirs = model.to_str_tokens(model.to_tokens(CORRUPTED))
    labels = [f"{theirs[i]}_{i}" if ours[i] == theirs[i] else f"{ours[i]}->{theirs[i]}_{i}" for i in range(len(ours))]
    assert labels[0] == "<|endoftext|>_0"
    assert [label for label in labels if "->" in label] == [" Shelby-> Emma_11"]


# -- loading -----------------------------------------------------------------------------------------------


def test_a_pretrained_model_is_hugging_faces(model: HookedMamba) -> None:
    tokens = model.to_tokens("Emma and Shelby had fun")
    with torch.no_grad():
        expected = MambaForCausalLM.from_pretrained(DEMO)(tokens).logits
        agree(model(tokens), expected)
        logits, cache = model.run_with_cache("Emma and Shelby had fun")
    agree(logits, expected)
    assert cache["blocks.7.hook_h.5"].shape == (1, 128, 16)


def test_a_tokenizer_and_a_dtype_can_be_given(model: HookedMamba) -> None:
    other = HookedMamba.from_pretrained(DEMO, "cpu", model.tokenizer, dtype=torch.bfloat16)
    assert other.tokenizer.get_vocab() == model.tokenizer.get_vocab()
    assert other.tokenizer is not model.tokenizer  # its settings are its own
    assert other.cfg.dtype == torch.bfloat16


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        HookedMamba.from_pretrained(tmp_path)


@pytest.mark.parametrize("hooked", [True, False], ids=["mamba_lens", "original"])
def test_a_model_from_a_configuration_and_a_state_dict(hooked: bool) -> None:
    """As MambaLens recorded its own, and as its recorded conversion to the original format has it."""
    if hooked:
        initializer = MambaInitCfg(**SPEC["config"]["initializer_cfg"])
        cfg = MambaCfg(**SPEC["config"] | {"initializer_cfg": initializer})
        weights = under("weights.")
    else:
        cfg = mamba_lens.convert_original_config_to_hooked_mamba_config(
            {"d_model": 24, "n_layer": 3, "vocab_size": 50, "ssm_cfg": {"d_state": 8, "dt_rank": 3}},
            device="cpu",
        )
        weights = mamba_lens.convert_original_state_dict_to_hooked_state_dict(under("original."))
    model = HookedMamba(cfg=cfg, device="cpu", tokenizer=None)
    model.load_state_dict(weights)
    with torch.no_grad():
        found = model(RECORDED["tokens"])
    agree(found, RECORDED["logits"])


def test_a_state_dict_in_any_format_can_be_loaded(fresh: HookedMamba) -> None:
    hf = {name: value.clone() for name, value in fresh._module.state_dict().items()}
    expected = fresh(torch.tensor([[1, 2, 3]]))
    for format in ("huggingface", "original", "mamba_lens"):
        for parameter in fresh.parameters():
            parameter.data.zero_()
        fresh.load_state_dict(convert_state_dict(hf, format))
        assert torch.equal(fresh(torch.tensor([[1, 2, 3]])), expected)


def test_a_state_dict_that_does_not_fit_changes_nothing(fresh: HookedMamba) -> None:
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    weights = {name: torch.zeros_like(value) for name, value in before.items()}
    with pytest.raises(CheckpointError, match=r"missing.*blocks\.1\.W_B\.weight"):
        fresh.load_state_dict({k: v for k, v in weights.items() if k != "blocks.1.W_B.weight"})
    with pytest.raises(CheckpointError, match="ties lm_head"):
        fresh.load_state_dict(weights | {"lm_head.weight": torch.ones(344, 64)})
    assert equal(fresh.state_dict(), before)


# -- from scratch ------------------------------------------------------------------------------------------


def test_a_model_from_scratch() -> None:
    cfg = MambaCfg(
        d_model=64,
        n_layer=4,
        vocab_size=101,
        d_state=8,
        d_conv=3,
        expand=2,
        initializer_config=MambaInitCfg(
            initializer_range=0.05,
            rescale_prenorm_residual=True,
            n_residuals_per_layer=2,
            dt_init="constant",
            dt_scale=0.5,
            dt_min=0.01,
            dt_max=0.02,
            dt_init_floor=1e-4,
        ),
    )
    before = torch.get_rng_state()
    model = HookedMamba(cfg=cfg, device="cpu", initialize_params=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert (model.cfg.n_layers, model.cfg.V, model.cfg.D_delta, model.cfg.d_conv) == (4, 104, 4, 3)
    block = model.blocks[0]
    assert (block.W_delta_2.weight == 4**-0.5 * 0.5).all()
    dt = torch.nn.functional.softplus(block.W_delta_2.bias)
    assert 0.0099 < dt.min() < dt.max() < 0.0201
    assert 0.045 < model.W_E.std() < 0.055
    bound = 128**-0.5 / (2 * 4) ** 0.5  # torch's default over sqrt(n_residuals_per_layer * n_layers)
    assert 0.9 * bound < block.out_proj.weight.abs().max() <= bound
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 104)
    again = MambaTrace.from_config(cfg)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(HookedMamba(cfg, seed=1).W_E.cpu(), model.W_E)


def test_a_configuration_completes_itself() -> None:
    cfg = MambaCfg(768, 24, 50277, device="cpu")
    assert (cfg.D, cfg.E, cfg.N, cfg.D_delta, cfg.D_conv, cfg.V) == (768, 1536, 16, 48, 4, 50280)
    assert (cfg.n_layer, cfg.d_inner, cfg.dt_rank) == (24, 1536, 48)
    assert dataclasses.replace(cfg, d_state=8).N == 8
    assert isinstance(MambaCfg(8, 1, 8, initializer_cfg={"dt_min": 0.01}).initializer_cfg, MambaInitCfg)
    with pytest.raises(TypeError, match="vocab_size"):
        MambaCfg(d_model=768, n_layers=24)
    with pytest.raises(CheckpointError, match="d_inner"):
        HookedMamba(MambaCfg(64, 1, 8, d_inner=100), device="cpu")


def test_a_model_of_its_own_keeps_its_own_unembedding() -> None:
    model = HookedMamba(MambaCfg(16, 1, 8, device="cpu"))
    model.W_U[:] = 0
    assert model.W_E.abs().max() > 0
    assert (model(torch.tensor([[1, 2]])) == 0).all()


# -- and back ----------------------------------------------------------------------------------------------


def test_state_dicts_convert_as_mamba_lens_converts_them() -> None:
    convert, back = (
        mamba_lens.convert_original_state_dict_to_hooked_state_dict,
        mamba_lens.convert_hooked_state_dict_to_original_state_dict,
    )
    cfg, hooked, original = MambaCfg(**SPEC["config"]), under("weights."), under("original.")
    for found in (convert(original), convert(cfg, original), convert(cfg=cfg, state_dict=original)):
        assert equal(found, hooked)
    for found in (back(hooked), back(cfg, hooked), back(cfg=cfg, state_dict=hooked)):
        assert equal(found, original)


def test_a_model_goes_back_to_the_original_format_bit_for_bit(model: HookedMamba) -> None:
    cfg = mamba_lens.convert_hooked_mamba_config_to_original_config(hooked_mamba_cfg=model.cfg)
    weights = mamba_lens.convert_hooked_state_dict_to_original_state_dict(cfg=model.cfg, state_dict=model.state_dict())
    assert equal(weights, convert_state_dict(MambaForCausalLM.from_pretrained(DEMO).state_dict(), "original"))
    assert (cfg["d_model"], cfg["n_layer"], cfg["vocab_size"]) == (64, 8, 344)
    assert json.loads(json.dumps(cfg)) == cfg
    again = MambaTrace.from_state_dict(cfg, weights)
    tokens = model.to_tokens(UNCORRUPTED)
    with torch.no_grad(), again.trace(tokens):
        logits = again.lm_head.output.save()
    with torch.no_grad():
        assert torch.equal(logits, model(tokens))


def test_a_configuration_goes_there_and_back() -> None:
    hooked = mamba_lens.convert_original_config_to_hooked_mamba_config(MAMBA_130M, device="cpu")
    assert (hooked.n_layers, hooked.vocab_size, hooked.d_inner, hooked.device) == (24, 50280, 1536, "cpu")
    assert mamba_lens.convert_hooked_mamba_config_to_original_config(hooked) == MAMBA_130M
    assert mamba_lens.convert_original_config_to_hooked_mamba_config(hooked) is hooked
    edited = dataclasses.replace(hooked, d_state=8)
    assert mamba_lens.convert_hooked_mamba_config_to_original_config(edited)["ssm_cfg"] == {"d_state": 8}
    with pytest.raises(CheckpointError, match="Found the keys"):
        mamba_lens.convert_original_config_to_hooked_mamba_config({"n_embd": 3})


def test_the_configuration_of_mamba_lens_and_what_it_exports() -> None:
    cfg = MambaCfg(**SPEC["config"])
    assert {**vars(cfg), "initializer_cfg": vars(cfg.initializer_cfg)} == SPEC["config"] | {"mamba_trace_source": None}
    exported = mamba_lens.convert_original_config_to_hooked_mamba_config(SPEC["original_config"], device="cpu")
    assert exported == cfg
    original = mamba_lens.convert_hooked_mamba_config_to_original_config(cfg)
    assert original["ssm_cfg"]["d_state"] == SPEC["config"]["d_state"]
    assert convert_config(original, "huggingface").tie_word_embeddings is False  # MambaLens never ties


def test_the_state_dict_is_the_model(fresh: HookedMamba) -> None:
    weights = fresh.state_dict()
    assert equal(weights, convert_state_dict(fresh._module.state_dict(), "mamba_lens"))
    before = fresh(torch.tensor([[1, 2, 3]]))
    weights["blocks.3.W_delta_1.weight"][:] = 0
    assert (fresh.blocks[3].W_delta_1.weight == 0).all()
    assert not torch.equal(fresh(torch.tensor([[1, 2, 3]])), before)


# -- running -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_strings_begin_with_a_token_of_their_own_as_in_mamba_lens(model: HookedMamba) -> None:
    text, texts = "Emma and Shelby had fun", ["Emma and Shelby had fun", "Emma had fun"]
    bos = model.tokenizer.bos_token_id
    with_bos, without = model.to_tokens(text), model.to_tokens(text, prepend_bos=False)
    assert with_bos.tolist() == [[bos, *without[0].tolist()]]
    for run in (model, model.forward, model.run_with_hooks, lambda *a, **k: model.run_with_cache(*a, **k)[0]):
        agree(run(text), model(with_bos))
        agree(run(text, prepend_bos=False), model(without))
    assert (model(with_bos)[0, -1] - model(without)[0, -1]).abs().max() > 1e-2
    agree(model(texts)[1, :4], model(texts[1])[0])  # padded on the right, as MambaLens does
    agree(model(texts, padding_side="left")[1, -4:], model(texts[1])[0])
    other = HookedMamba(model._module, tokenizer=model.tokenizer)
    other.default_prepend_bos = False
    assert torch.equal(other(text), other(without))
    assert HookedMamba(MambaCfg(16, 1, 8, device="cpu", default_prepend_bos=False)).cfg.default_prepend_bos is False


@torch.no_grad()
def test_what_a_call_returns(model: HookedMamba) -> None:
    tokens = model.to_tokens(UNCORRUPTED)
    logits, loss = model(tokens, return_type="both")
    assert torch.equal(logits, model(tokens))
    labels = MambaForCausalLM.from_pretrained(DEMO)(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, labels)
    torch.testing.assert_close(model.loss_fn(logits, tokens), labels)
    assert model(tokens, return_type="loss", loss_per_token=True).shape == (1, tokens.shape[1] - 1)
    assert model(tokens, return_type=None) is None
    assert model(tokens, stop_at_layer=2, padding_side="left").shape == (*tokens.shape, 64)
    assert model(input=tokens).shape == logits.shape


def test_a_call_has_gradients(fresh: HookedMamba) -> None:
    fresh(torch.tensor([[1, 2, 3]])).sum().backward()
    assert fresh.blocks[0].W_B.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("run", ["__call__", "forward", "run_with_hooks", "run_with_cache"])
def test_flags_for_kernels_are_explained_away_once(model: HookedMamba, run: str) -> None:
    tokens = model.to_tokens(UNCORRUPTED)
    call = model if run == "__call__" else getattr(model, run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call(tokens, fast_conv=True, fast_ssm=True, warn_disabled_hooks=False)
        call(tokens, fast_conv=True)
    (warning,) = caught
    assert warning.category is DeprecationWarning
    assert "without effect" in str(warning.message)
    assert warning.filename == __file__  # the user's line
    agree(found[0] if run == "run_with_cache" else found, model(tokens))


@torch.no_grad()
def test_hooks_that_the_flags_disable_in_mamba_lens_fire(model: HookedMamba) -> None:
    tokens, seen = model.to_tokens(UNCORRUPTED), []
    names = [f"blocks.2.hook_{name}" for name in ("conv", "h_start", "delta", "A_bar", "B_bar", "h.3", "y")]
    hooks = [(name, lambda value, hook: seen.append(hook.name)) for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.run_with_hooks(tokens, fwd_hooks=hooks, fast_conv=True, fast_ssm=True)
    assert sorted(seen) == sorted(names)


@torch.no_grad()
def test_it_is_a_mamba_trace(model: HookedMamba) -> None:
    tokens = model.to_tokens(UNCORRUPTED)
    logits = model(tokens)
    with model.trace(tokens):
        model.layers[0].ssm.h[3].output[:] = 0
        inside = model(tokens).logits.save()  # the module, beside the run
        edited = model.lm_head.output.save()
    agree(inside, logits)
    assert not torch.equal(edited, logits)

    def zero(h: Tensor, hook: Any) -> None:
        h[:] = 0

    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_h.3", zero)]), edited)
    with model.edit() as (_, other):
        other.layers[0].ssm.h[3].output[:] = 0
    assert torch.equal(other(tokens), edited)
    assert torch.equal(model(tokens), logits)
    with model.generate(tokens, max_new_tokens=2) as tracer:
        ids = tracer.result.save()
    assert ids.shape == (1, tokens.shape[1] + 2)
    assert torch.equal(model(input_ids=tokens).logits, model._module(tokens).logits)
    assert model.reset_hooks() is None
    assert torch.equal(model.trace(tokens, trace=False).logits, model._module(tokens).logits)


def greedily(model: HookedMamba, prompt: str, n_tokens: int, prepend_bos: bool = True) -> Tensor:
    """The token ids [1,L] of taking the likeliest token of Hugging Face's own module each time."""
    module = MambaForCausalLM.from_pretrained(DEMO)
    tokens = model.to_tokens(prompt, prepend_bos=prepend_bos)
    with torch.no_grad():
        for _ in range(n_tokens):
            tokens = torch.cat((tokens, module(tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens


def test_generate_goes_on_from_the_token_that_goes_before(model: HookedMamba) -> None:
    ids = greedily(model, UNCORRUPTED, 3)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    assert ids[0, 0] == model.tokenizer.bos_token_id
    for return_type in ("tokens", "tensor"):
        assert torch.equal(model.generate(UNCORRUPTED, return_type=return_type, **options), ids)
    assert torch.equal(model.generate(model.to_tokens(UNCORRUPTED), **options), ids)
    without = greedily(model, UNCORRUPTED, 3, prepend_bos=False)
    assert torch.equal(model.generate(UNCORRUPTED, prepend_bos=False, return_type="tokens", **options), without)
    # Every argument by its place, as TransformerLens has them.
    by_place = (3, True, None, False, None, None, 1.0, 0.0, False, False, None, "tokens", False)
    assert torch.equal(model.generate(UNCORRUPTED, *by_place), without)


def test_generate_returns_what_it_was_given(model: HookedMamba) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    text = model.generate(UNCORRUPTED, **options)
    assert text == f"{UNCORRUPTED} Emma."
    assert model.generate([UNCORRUPTED], **options) == text
    several = model.generate([UNCORRUPTED, "Emma gave an apple to"], **options)
    assert several == [text, model.generate("Emma gave an apple to", **options)]
    tokens = model.to_tokens(UNCORRUPTED)
    assert isinstance(model.generate(tokens, **options), Tensor)
    assert model.generate(tokens, return_type="str", **options) == text


def test_generate_adds_ten_tokens_or_ends_at_the_end_of_the_text(model: HookedMamba) -> None:
    whole = greedily(model, UNCORRUPTED, 10)
    end = model.tokenizer.eos_token_id
    assert torch.equal(model.generate(UNCORRUPTED, stop_at_eos=False, do_sample=False, return_type="tokens"), whole)
    stopped = model.generate(UNCORRUPTED, do_sample=False, return_type="tokens")
    assert stopped[0, -1] == end
    assert stopped.shape[1] < whole.shape[1]
    assert torch.equal(stopped, whole[:, : stopped.shape[1]])
    comma = model.to_tokens(UNCORRUPTED, prepend_bos=False).shape[1] + 2
    earlier = model.generate(UNCORRUPTED, eos_token_id=int(whole[0, comma]), do_sample=False, return_type="tokens")
    assert torch.equal(earlier, whole[:, : comma + 1])


def test_generate_draws_from_the_whole_distribution(model: HookedMamba) -> None:
    """And not from the 50 likeliest tokens, as Hugging Face does unasked."""
    tokens = model.to_tokens(["Emma"] * 400)
    likeliest = model(tokens[:1])[0, -1].topk(50).indices
    torch.manual_seed(0)
    drawn = model.generate(tokens, 1, temperature=100.0)[:, -1]
    assert not torch.isin(drawn, likeliest).all()
    assert torch.isin(model.generate(tokens, 1, temperature=100.0, top_k=50)[:, -1], likeliest).all()
    assert len(model.generate(tokens, 1, temperature=0)[:, -1].unique()) == 1


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "match"),
    [
        (UNCORRUPTED, {"return_type": "embeds"}, ValueError, "'embeds' is none of 'input', 'str', 'tokens'"),
        (UNCORRUPTED, {"freq_penalty": 1.0}, ValueError, r"freq_penalty=1\.0: .*logits_processor"),
        (UNCORRUPTED, {"nonsense": 1}, ValueError, "nonsense"),
        (torch.zeros(1, 3, 64), {}, PromptError, "float32 embeddings"),
        ("", {"prepend_bos": False}, PromptError, "has no tokens"),
        (None, {}, PromptError, "needs a prompt"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_generate_refuses(
    model: HookedMamba, prompt: Any, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        model.generate(prompt, **arguments)


def test_generate_in_a_with_is_nnsights(model: HookedMamba) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    steps = []
    with model.generate(UNCORRUPTED, **options) as tracer:
        for _ in tracer.iter[:3]:
            steps.append(model.lm_head.output[:, -1].argmax(-1))
        ids = tracer.result.save()
        steps.save()
    without = greedily(model, UNCORRUPTED, 3, prepend_bos=False)
    assert torch.equal(ids, without)
    assert torch.equal(torch.stack(steps, dim=1), without[:, -3:])
    with model.generate(max_new_tokens=1, do_sample=False) as tracer:
        with tracer.invoke(UNCORRUPTED):
            one = tracer.result.save()
        with tracer.invoke(CORRUPTED):
            other = tracer.result.save()
    assert model.to_string(one[0]) == f"{UNCORRUPTED} Emma"
    assert model.to_string(other[0]) == f"{CORRUPTED} Shelby"


def test_a_script_that_keeps_hooks_on_the_model_is_told_what_to_write(model: HookedMamba) -> None:
    for name in ("hooks", "add_hook", "add_perma_hook", "hook_dict"):
        with pytest.raises(AttributeError, match=rf"'{name}'.*run_with_hooks\(.*mamba-trace port"):
            getattr(model, name)


@torch.no_grad()
def test_a_call_that_fails_leaves_the_model_usable(model: HookedMamba) -> None:
    tokens = model.to_tokens(UNCORRUPTED)
    before = model(tokens)
    with pytest.raises(UnknownSiteError):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_nothing", lambda value, hook: None)])
    with pytest.raises(TypeError, match="nonsense"):
        model(tokens, nonsense=True)
    assert torch.equal(model(tokens), before)


def test_other_ways_to_make_one() -> None:
    for made in (HookedMamba.demo(), HookedMamba.from_config(MambaCfg(16, 1, 8), seed=3)):
        assert type(made) is HookedMamba
        assert made(torch.tensor([[1, 2, 3]])).shape[:2] == (1, 3)
    module = MambaForCausalLM.from_pretrained(DEMO)
    assert HookedMamba(module)._module is module


@pytest.mark.parametrize("name", ["InputDependentHookPoint", "InputDependentHookedRootModule"])
def test_what_has_no_counterpart_says_why(name: str) -> None:
    with pytest.raises(AttributeError, match=r"needs none: blocks\.3\.hook_h\.5 is an address"):
        getattr(mamba_lens, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mamba_lens.nonsense


def test_the_configuration_remembers_under_the_key_of_conversions() -> None:
    assert SOURCE_KEY in {field.name for field in dataclasses.fields(MambaCfg)}


def test_a_configuration_of_any_kind_makes_a_model(model: HookedMamba) -> None:
    for cfg in (
        {"d_model": 16, "n_layer": 1, "vocab_size": 8},
        convert_config(MambaCfg(16, 1, 8), "huggingface"),
    ):
        assert HookedMamba(cfg, device="cpu").cfg.d_model == 16
        assert HookedMamba(cfg).cfg.n_layers == 1
    assert HookedMamba(cfg=model.cfg).cfg.n_layers == 8


# -- documentation -----------------------------------------------------------------------------------------


def documented() -> list[tuple[str, str]]:
    """Every public thing of the modules, with its docstring."""
    found: dict[str, str] = {}
    for module in (
        mamba_trace.hooked.tokens,
        mamba_trace.hooked.weights,
        mamba_trace.hooked.cfg,
        lens_formats,
        mamba_lens,
    ):
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            inside = vars(thing).items() if isinstance(thing, type) else ()
            for full, one in [(name, thing), *((f"{name}.{key}", value) for key, value in inside)]:
                if not full.split(".")[-1].startswith("_") and "Example::" in (getattr(one, "__doc__", None) or ""):
                    found[full] = one.__doc__
    return list(found.items())


@pytest.mark.parametrize(("name", "text"), documented(), ids=lambda value: value.split("\n")[0])
def test_examples_of_the_documentation_run(name: str, text: str, model: HookedMamba) -> None:
    example = textwrap.dedent(inspect.cleandoc(text).split("Example::\n")[1])
    example = example.replace('"state-spaces/mamba-370m"', repr(str(DEMO)))
    original = convert_state_dict(model._module.state_dict(), "original")
    space = {"torch": torch, "MambaTrace": MambaTrace, "model": HookedMamba.demo(), "original": original}
    space |= {public: getattr(mamba_lens, public) for public in mamba_lens.__all__}
    script = Path(__file__).parent / f"example of {name}"
    linecache.cache[str(script)] = (len(example), None, example.splitlines(keepends=True), str(script))
    exec(compile(example, str(script), "exec"), space)


# -- other architectures -----------------------------------------------------------------------------------


def test_a_mamba_2_is_refused_with_what_takes_it(
    tiny_hf: ModuleFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_hf(model_type="mamba2")
    said = (
        r"this is a Mamba-2, and a HookedMamba, as in MambaLens, is a Mamba-1 or a Falcon-Mamba: .*\.MambaTrace takes"
    )
    for make in (
        HookedMamba,
        lambda taken: HookedMamba(cfg=taken),
        lambda taken: HookedMamba(MambaTrace(taken)._module),
    ):
        with pytest.raises(CheckpointError, match=said):
            make(module)
    assert MambaTrace(module).architecture.name == "Mamba-2"
    module.save_pretrained(tmp_path)
    for make in (HookedMamba.from_pretrained, HookedMamba, lambda folder: HookedMamba(module.config)):
        with pytest.raises(CheckpointError, match="Mamba-1"):
            make(str(tmp_path))
    found = SimpleNamespace(config=module.config)
    monkeypatch.setattr(Loading, "_find", lambda *args, **kwargs: found)
    with pytest.raises(CheckpointError, match=said):  # by its configuration, before a weight is read
        HookedMamba.from_pretrained(str(tmp_path))


def test_a_falcon_mamba_runs_by_mamba_lenss_calls(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    plain = tiny_hf(model_type="falcon_mamba")
    model = HookedMamba(tiny_hf(model_type="falcon_mamba"))
    with torch.no_grad():
        agree(model(tokens), plain(tokens).logits)
        logits, cache = model.run_with_cache(tokens)
        agree(logits, plain(tokens).logits)
        zeroed = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_h.2", lambda h, hook: h * 0)])
    assert list(cache) == model.hook_names(tokens.shape[1])
    assert not torch.equal(zeroed, logits)
    agree(zeroed[:, :2], logits[:, :2])
    ids = model.generate(tokens, max_new_tokens=2, do_sample=False)
    assert torch.equal(ids, plain.generate(tokens, max_new_tokens=2, do_sample=False))
