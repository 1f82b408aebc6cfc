"""Copies and saved files of models, modules, caches and weights: they compute the same, and on their own."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from conftest import agree, make_hf
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.patching import patch_grid

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer")


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "torch.save": through_torch,
}


@pytest.fixture(params=COPIES.values(), ids=COPIES.keys())
def copied(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    return request.param


def run(model: MambaTrace, tokens: Tensor, edited: bool = False) -> Tensor:
    with torch.no_grad(), model.trace(tokens):
        if edited:
            model.layers[1].ssm.h[2].output[:] = 0
        logits = model.lm_head.output.save()
    return logits


@pytest.mark.parametrize("ran", [False, True], ids=["new", "after a run"])
def test_a_copy_of_a_model_is_a_model_of_its_own(tiny, tokens, copied, ran):
    expected, edited = (run(MambaTrace(make_hf()), tokens, edit) for edit in (False, True))
    if ran:
        run(tiny, tokens)
        tiny.run_with_cache(tokens)
        tiny.layers[1].ssm.source  # noqa: B018
    other = copied(tiny)
    assert type(other) is MambaTrace
    assert torch.equal(run(other, tokens), expected)
    assert torch.equal(run(other, tokens, edited=True), edited)
    agree(other.run_with_cache(tokens)[0], expected)
    assert torch.equal(other.layers[2].norm(torch.ones(1, 12)), tiny.layers[2].norm(torch.ones(1, 12)))
    assert other.layers[1].parent.parent.parent is other
    own = {parameter.data_ptr() for parameter in tiny._module.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in other._module.parameters())
    with torch.no_grad():
        other._module.lm_head.weight.zero_()
    assert not run(other, tokens).any()
    assert torch.equal(run(tiny, tokens), expected)


def test_a_copy_has_its_own_kernels_report_and_generation(tiny, tokens, copied):
    run(tiny, tokens)
    other = copied(tiny)
    other.kernels = "reference"
    run(other, tokens[:, :4])
    assert tiny.kernels == "auto"
    assert tiny.last_run[0].positions == tokens.shape[1]
    assert [(one.layer, one.positions) for one in other.last_run] == [(0, 4), (1, 4), (2, 4)]
    with torch.no_grad():
        options = {"max_new_tokens": 3, "do_sample": False}
        assert torch.equal(other.generate(tokens, **options), tiny.generate(tokens, **options))
    metric = lambda logits: logits[:, 3]  # noqa: E731
    grids = [patch_grid(model, tokens[:1], tokens[1:2], "h", metric).values for model in (tiny, other)]
    agree(grids[1], grids[0])


def test_edits_are_copied_and_act_on_the_copy_alone(tiny, tokens, copied):
    plain, expected = run(tiny, tokens), run(tiny, tokens, edited=True)
    nothing = torch.zeros(1, 24, 5)
    with tiny.edit() as (_, separate):
        separate.layers[1].ssm.h[2].output[:] = nothing
    with tiny.edit(inplace=True):
        tiny.layers[1].ssm.h[2].output[:] = nothing
    others = [copied(separate), copied(tiny)]
    tiny.clear_edits()
    nothing += 1
    for other in others:
        assert torch.equal(run(other, tokens), expected)
    assert torch.equal(run(tiny, tokens), plain)
    others[1].clear_edits()
    assert torch.equal(run(others[1], tokens), plain)


def test_a_shallow_copy_is_another_wrapper_around_the_same_module(tiny, tokens):
    expected = run(tiny, tokens)
    twin = copy.copy(tiny)
    assert twin._module is tiny._module
    with twin.edit(inplace=True):
        twin.layers[1].ssm.h[2].output[:] = 0
    edited = run(twin, tokens)
    del twin
    gc.collect()
    assert tiny.layers.parent.parent is tiny
    assert torch.equal(run(tiny, tokens), expected)
    assert torch.equal(run(tiny, tokens, edited=True), edited)


def test_a_model_without_weights_stays_one(tokens, tmp_path, copied):
    make_hf().save_pretrained(tmp_path)
    model = MambaTrace(tmp_path)
    other = copied(model)
    assert not other.dispatched
    agree(run(other, tokens), run(MambaTrace(make_hf()), tokens))
    assert not model.dispatched


def test_a_copy_made_inside_of_a_trace(tiny, tokens, copied):
    plain, edited = run(tiny, tokens), run(tiny, tokens, edited=True)
    made = []
    with torch.no_grad(), tiny.trace(tokens):
        made.append(copied(tiny))
        tiny.layers[1].ssm.h[2].output[:] = 0
        made.append(copied(tiny))
        logits = tiny.lm_head.output.save()
    assert torch.equal(logits, edited)
    for other in made:
        assert torch.equal(run(other, tokens), plain)
        assert torch.equal(run(other, tokens, edited=True), edited)


@pytest.mark.parametrize("traced", [False, True], ids=["wrapped", "sourced"])
def test_a_wrapped_module_can_be_copied_and_wrapped_again(tokens, copied, traced):
    tiny = MambaTrace(make_hf(tie_word_embeddings=False))
    expected, edited = run(tiny, tokens), run(tiny, tokens, edited=True)
    if traced:
        with torch.no_grad(), tiny.trace(tokens):
            tiny.layers[0].ssm.source.self_in_proj_0.output.save()
    module = copied(tiny._module)
    with torch.no_grad():
        plain = module(tokens).logits
        agree(plain, expected)  # up to rounding: PyTorch multiplies by the lm_head of a model that is not wrapped
        module.lm_head.weight.mul_(2)
        assert torch.equal(module(tokens).logits, 2 * plain)
        module.lm_head.weight.mul_(0.5)
    assert torch.equal(run(tiny, tokens), expected)
    again = MambaTrace(module)
    assert torch.equal(run(again, tokens, edited=True), edited)


def test_a_dispatched_model_can_be_copied(tokens, tmp_path):
    module = make_hf()
    places = {"backbone": "cpu", "lm_head": "cpu"}
    model = MambaTrace(dispatch_model(module, places, force_hooks=True))
    expected = run(model, tokens)
    other = copy.deepcopy(model)
    with torch.no_grad():
        module.lm_head.weight.zero_()
    assert torch.equal(run(other, tokens), expected)


def test_a_cache_can_be_copied(tiny, tokens, copied):
    logits, cache = tiny.run_with_cache(tokens)
    other = copied(cache)
    assert list(other) == list(cache)
    for name in cache:
        assert torch.equal(other[name], cache[name])
    assert torch.equal(other["h", 1], cache["h", 1])
    assert torch.equal(other.logit_attrs(other.decompose_resid(), 3), cache.logit_attrs(cache.decompose_resid(), 3))
    other["hook_logits"].zero_()
    assert torch.equal(cache["hook_logits"], logits)
    agree(run(other.model, tokens), logits)


def test_views_of_weights_can_be_copied(tiny, copied):
    views = {
        "Weights": tiny.blocks[0].W_B,
        "LensBlock": tiny.blocks[0],
        "Blocks": tiny.blocks,
        "cfg": tiny.cfg,
    }
    before = tiny.blocks[0].W_B.weight.clone()
    others = {name: copied(view) for name, view in views.items()}
    tiny.blocks[0].W_B.weight[:] = 0
    assert torch.equal(others["Weights"].weight, before)
    assert torch.equal(others["LensBlock"].W_B.weight, before)
    assert torch.equal(others["Blocks"][0].W_B.weight, before)
    assert others["cfg"].d_model == 12
    assert not copy.copy(views["Weights"]).weight.any()  # a view still


def test_a_saved_module_computes_the_same_in_another_process(tiny, tokens, tmp_path):
    expected = run(tiny, tokens)
    torch.save({"module": tiny._module, "model": tiny, "tokens": tokens, "logits": expected}, tmp_path / "saved.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    plain = saved['module'](saved['tokens']).logits\n"
        "    hooked = saved['model'].run_with_hooks(saved['tokens'])\n"
        "torch.testing.assert_close(plain, saved['logits'])\n"
        "torch.testing.assert_close(hooked, saved['logits'])\n"
    )
    script = tmp_path / "load.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "saved.pt")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr


def child(model: MambaTrace, tokens: Tensor, queue: Any) -> None:
    queue.put(model.run_with_hooks(tokens).detach().tolist())


def test_a_model_is_sent_to_a_process_that_was_spawned(tiny, tokens):
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(tiny, tokens, queue))
    process.start()
    found = queue.get(timeout=300)
    process.join()
    agree(torch.tensor(found), run(tiny, tokens), 1e-5)


def test_nothing_keeps_a_model_that_is_no_longer_used(tokens):
    model = MambaTrace(make_hf())
    other = copy.deepcopy(model)
    logits, cache = other.run_with_cache(tokens)
    modules = [weakref.ref(model._module), weakref.ref(other._module)]
    del model, other, cache
    gc.collect()
    assert [module() for module in modules] == [None, None]
    assert logits.any()
