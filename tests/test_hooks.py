"""Hooks of run_with_hooks and run_with_cache: what they change, in which order, and what is refused.

The references are interventions and gradients recorded from MambaLens, the float64 forward of `reference`,
and PyTorch's autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import test_mamba_lens as recorded
import torch
from allocations import PeakMemory
from conftest import LENGTH, TINY, ModuleFactory, agree
from reference import forward
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import LayerError, PositionError, SiteValueError, UnknownSiteError
from mamba_trace.hooked.hooks import KEEPING_HOOKS
from mamba_trace.hooked.losses import next_token_loss
from mamba_trace.patching import logit_diff, patch_grid

PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
SOURCE = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture(scope="module")
def lens() -> MambaTrace:
    """The model that MambaLens's values were recorded from."""
    return recorded.model_from("weights.", recorded.SPEC["config"])


@pytest.fixture(params=TINY)
def each(tiny_hf: ModuleFactory, request: pytest.FixtureRequest) -> MambaTrace:
    """A model of each architecture, in float64."""
    return MambaTrace(tiny_hf(model_type=request.param, dtype=torch.float64))


def plain(model: MambaTrace, *inputs: Any) -> Tensor:
    with torch.no_grad(), model.trace(*inputs):
        logits = model.lm_head.output.save()
    return logits


def referred(model: MambaTrace, tokens: Tensor, edit: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
    return forward(model._module.state_dict(), model.config, tokens, edit)


# -- forward hooks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [False, True], ids=["returned", "in place"])
@pytest.mark.parametrize("k", recorded.INTERVENTIONS, ids=recorded.describe)
def test_a_recorded_intervention_of_mamba_lens(lens: MambaTrace, k: int, in_place: bool) -> None:
    def hook_of(edit: Any) -> Callable[..., Any]:
        def change(value: Tensor, hook: Any) -> Tensor | None:
            if not in_place:
                return edit(value)
            value[...] = edit(value)
            return None

        return change

    # The order of the list does not matter but for hooks on one name.
    by_name: dict[str, list[Any]] = {}
    for edit in recorded.edits_of(k):
        by_name.setdefault(edit.hook, []).append((edit.hook, hook_of(edit)))
    fwd_hooks = [pair for pairs in reversed(by_name.values()) for pair in pairs]
    recorded.agree(lens.run_with_hooks(recorded.TOKENS, fwd_hooks), f"intervention.{k}.logits")
    logits, _ = lens.run_with_cache(recorded.TOKENS, fwd_hooks=fwd_hooks)
    recorded.agree(logits, f"intervention.{k}.logits")


def test_hooks_on_one_name_run_in_the_order_given(exact: MambaTrace, tokens: Tensor) -> None:
    name = "blocks.1.hook_h.3"

    def add_one(h: Tensor, hook: Any) -> None:
        h += 1

    hooks: list[Any] = [
        (name, lambda h, hook: h * 2),
        ("layers[1].ssm.h[3]", add_one),
        (lambda one: one == name, lambda h, hook: h.pow(2)),
    ]
    seen = []
    hooks.append((name, lambda h, hook: seen.append((hook.name, hook.path, hook.layer(), h.clone()))))
    _, cache = exact.run_with_cache(tokens, name)
    logits, edited = exact.run_with_cache(tokens, name, fwd_hooks=hooks)
    expected = (2 * cache[name] + 1) ** 2
    agree(edited[name], expected, 1e-12)
    assert [one[:3] for one in seen] == [(name, "layers[1].ssm.h[3]", 1)]
    agree(seen[0][3].detach(), expected, 1e-12)

    def edit(hook: str, value: Tensor) -> Tensor:
        return (2 * value + 1) ** 2 if hook == name else value

    agree(logits.detach(), referred(exact, tokens, edit), 1e-10)


def test_a_predicate_edits_the_state_after_every_token(each: MambaTrace, tokens: Tensor) -> None:
    def decay(h: Tensor, hook: Any) -> Tensor:
        return h * (0.9 if hook.layer() == 1 else 1.0)

    states = [(lambda name: ".hook_h." in name, decay)]
    logits, cache = each.run_with_cache(tokens, fwd_hooks=states)
    values = {}

    def edit(hook: str, value: Tensor) -> Tensor:
        values[hook] = value * 0.9 if hook.startswith("blocks.1.hook_h.") else value
        return values[hook]

    expected = referred(each, tokens, edit)
    agree(logits.detach(), expected, 1e-10)
    for name, value in cache.items():
        agree(value, values[name], 1e-10)


def test_every_hook_name_edits_its_place(each: MambaTrace, tokens: Tensor) -> None:
    """One layer's at a time, all of its hooks at once; and the cache holds what they leave."""
    for layer in range(3):
        hooked = [name for name in each.hook_names(LENGTH) if name.startswith(f"blocks.{layer}.")]
        seen: list[str] = []

        def fn(value: Tensor, hook: Any, seen: list[str] = seen) -> Tensor:
            seen.append(hook.name)
            return value * 0.97

        logits, cache = each.run_with_cache(tokens, hooked, fwd_hooks=[(name, fn) for name in hooked])
        assert seen == hooked == list(cache)
        values: dict[str, Tensor] = {}

        def edit(hook: str, value: Tensor, hooked: list[str] = hooked, values: dict[str, Tensor] = values) -> Tensor:
            values[hook] = value * 0.97 if hook in hooked else value
            return values[hook]

        agree(logits.detach(), referred(each, tokens, edit), 1e-10)
        for name, value in cache.items():
            agree(value, values[name], 1e-10, name)


def test_a_hook_on_a_state_makes_no_state_of_every_position(tiny_hf: ModuleFactory, tokens: Tensor) -> None:
    model = MambaTrace(tiny_hf(model_type="mamba2"))
    H, P, N = model.layers[0].ssm._module.state_shape
    names = ["blocks.1.hook_h.3", "blocks.1.hook_h.7"]

    def shapes_of(cached: list[str]) -> set[tuple[int, ...]]:
        hooks: list[Any] = [(names[0], lambda h, hook: h * 2)]
        with torch.no_grad():
            return set(PeakMemory.of(lambda: model.run_with_cache(tokens, cached, fwd_hooks=hooks)).shapes)

    sizes = [shape[1] for shape in shapes_of(names) if len(shape) == 5 and shape[2:] == (H, P, N)]
    assert not [size for size in sizes if size > 1]
    assert (3, LENGTH, H, P, N) in shapes_of(["blocks.1.mixer.hook_ssm_state"])


def test_the_whole_trajectory_by_its_path(each: MambaTrace, tokens: Tensor) -> None:
    """An edit of it is not carried on."""
    shapes = []

    def edit_one(h: Tensor, hook: Any) -> None:
        shapes.append((hook.name, tuple(h.shape)))
        h[:, 2] = 0

    logits = each.run_with_hooks(tokens, [("layers[1].ssm.h", edit_one)])
    assert shapes == [("layers[1].ssm.h", (3, LENGTH, *each.layers[1].ssm._module.state_shape))]

    def edit(hook: str, value: Tensor) -> Tensor:
        if hook != "blocks.1.hook_h":
            return value
        value = value.clone()
        value[:, 2] = 0
        return value

    agree(logits.detach(), referred(each, tokens, edit), 1e-10)


def test_the_state_that_transformer_lens_hooks_is_not_carried_on(each: MambaTrace, tokens: Tensor) -> None:
    """mixer.hook_ssm_state is read by y at its position alone; hook_h.p is what the next tokens see."""

    def clear(h: Tensor, hook: Any) -> None:
        h[:, 2] = 0

    name = "blocks.1.mixer.hook_ssm_state"
    logits, cache = each.run_with_cache(tokens, [name, "blocks.1.hook_h"], fwd_hooks=[(name, clear)])
    assert torch.equal(logits, each.run_with_hooks(tokens, [("layers[1].ssm.h", clear)]))
    assert not cache[name][:, 2].any()
    assert cache["blocks.1.hook_h.2"].all()


@pytest.mark.parametrize("site", ["h", "resid_pre"])
def test_patching_cell_by_cell_gives_the_grid(demo: MambaTrace, site: str) -> None:
    """The experiments that MambaLens is used for, with hooks from a cache of another run."""
    metric = logit_diff(demo, " Emma", " Shelby")
    grid = patch_grid(demo, PROMPT, SOURCE, site=site, metric=metric, progress=False)
    n_positions = grid.values.shape[1]

    def patch_state(h: Tensor, hook: Any, position: int) -> Tensor:
        return cache[hook.name]

    def patch_stream(stream: Tensor, hook: Any, position: int) -> Tensor:
        stream[:, position] = cache[hook.name][:, position]
        return stream

    with torch.no_grad():
        _, cache = demo.run_with_cache(demo.to_tokens(SOURCE))
        for layer, position in ((0, 10), (4, 11), (len(demo.layers) - 1, n_positions - 1)):
            name, fn = f"blocks.{layer}.hook_{site}", patch_stream
            if site == "h":
                name, fn = f"{name}.{position}", patch_state
            logits = demo.run_with_hooks(demo.to_tokens(PROMPT), [(name, partial(fn, position=position))])
            agree(metric(logits[:, -1])[0], grid.values[layer, position], 1e-4)


def test_a_hook_is_called_with_its_arguments_by_position_or_name(tiny: MambaTrace, tokens: Tensor) -> None:
    calls: list[tuple[str, int]] = []

    def patch(h: Tensor, hook: Any, layer: int) -> Tensor:
        calls.append((hook.name, layer))
        return h

    class Callable:
        def __call__(self, value: Tensor, *, hook: Any) -> None:
            calls.append((hook.name, 1))

    def otherwise_called(v: Tensor, place: Any) -> None:
        calls.append((place.name, 2))

    name = "blocks.0.hook_y"
    hooks: list[Any] = [(name, partial(patch, layer=0)), (name, Callable()), (name, otherwise_called)]
    tiny.run_with_hooks(tokens, hooks)
    assert calls == [(name, 0), (name, 1), (name, 2)]


def test_a_context_is_shared_by_the_hooks_of_a_name_and_new_in_each_run(tiny: MambaTrace, tokens: Tensor) -> None:
    def count(value: Tensor, hook: Any) -> None:
        hook.ctx["calls"] = hook.ctx.get("calls", 0) + 1
        found.append(hook.ctx["calls"])

    for _ in range(2):
        found: list[int] = []
        hooks = [("hook_embed", count)]
        tiny.run_with_hooks(tokens, hooks * 2, hooks, return_type="loss").backward()
        assert found == [1, 2, 3]


# -- backward hooks ---------------------------------------------------------------------------------------

GRADIENT = recorded.SPEC["gradient"]


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_mamba_lenss(frozen: bool) -> None:
    model = recorded.model_from("weights.", recorded.SPEC["config"])
    model._module.requires_grad_(not frozen)
    found = {}

    def keep(gradient: Tensor, hook: Any) -> None:
        found[hook.name] = gradient

    hooks = [(name, keep) for name in GRADIENT["hooks"]]
    logits = model.run_with_hooks(recorded.TOKENS, bwd_hooks=hooks)
    assert not found
    logits[:, -1, GRADIENT["token"]].sum().backward()
    assert set(found) == set(GRADIENT["hooks"])
    for name, gradient in found.items():
        recorded.agree(gradient, f"grad.{name}")


@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.hook_h.3", "blocks.2.hook_delta", "hook_logits"])
@pytest.mark.parametrize("how", ["returned", "tuple", "in place"])
def test_a_gradient_can_be_replaced(exact: MambaTrace, tokens: Tensor, name: str, how: str) -> None:
    """Against autograd through the reference, where the value is x3 in the gradient alone."""

    def triple(gradient: Tensor, hook: Any) -> Any:
        if how == "in place":
            gradient *= 3
            return None
        return (gradient * 3,) if how == "tuple" else gradient * 3

    weight = exact._module.backbone.embeddings.weight
    exact.run_with_hooks(tokens, bwd_hooks=[(name, triple)], return_type="loss").backward()
    weights = {key: value.detach().clone() for key, value in exact._module.state_dict().items()}
    for value in weights.values():
        value.requires_grad_()

    def edit(hook: str, value: Tensor) -> Tensor:
        return 3 * value - 2 * value.detach() if hook == name else value

    next_token_loss(forward(weights, exact.config, tokens, edit), tokens).backward()
    # The embedding and lm_head are one parameter, under two names in the state dict.
    expected = sum(
        weights[key].grad for key in ("backbone.embeddings.weight", "lm_head.weight") if weights[key].grad is not None
    )
    agree(weight.grad, expected, 1e-9)


def test_incl_bwd_keeps_every_gradient(each: MambaTrace, tokens: Tensor) -> None:
    loss, cache = each.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    values = {}

    def edit(hook: str, value: Tensor) -> Tensor:
        values[hook] = value.clone() if value.requires_grad else value.requires_grad_()
        values[hook].retain_grad()  # of a tensor of its own, as several hooks may be given the same
        return values[hook]

    weights = {key: value.detach().requires_grad_() for key, value in each._module.state_dict().items()}
    expected = next_token_loss(forward(weights, each.config, tokens, edit), tokens)
    expected.backward()
    agree(loss.detach(), expected.detach(), 1e-10)
    names = each.hook_names(LENGTH)
    assert sorted(cache) == sorted([*names, *(f"{name}_grad" for name in names)])
    for name in names:
        agree(cache[name], values[name].detach(), 1e-10)
        agree(cache[f"{name}_grad"], values[name].grad, 1e-8)
    assert torch.equal(cache["h_grad", 1][:, 2], cache["blocks.1.hook_h.2_grad"])


def test_backward_hooks_run_after_a_forward_edit(each: MambaTrace, tokens: Tensor) -> None:
    """The gradient is that of the value that went on, also where that is a constant."""
    constant, found = torch.ones(3, LENGTH, 12, dtype=torch.float64), []
    name = "blocks.1.hook_resid_post"
    loss = each.run_with_hooks(
        tokens,
        fwd_hooks=[(name, lambda value, hook: constant)],
        bwd_hooks=[(name, lambda gradient, hook: found.append(gradient))],
        return_type="loss",
    )
    loss.backward()
    stream = constant.clone().requires_grad_()
    logits = each.run_with_hooks(stream, start_at_layer=2)
    next_token_loss(logits, tokens).backward()
    agree(found[0], stream.grad, 1e-9)
    assert not constant.requires_grad


# -- refusals ---------------------------------------------------------------------------------------------
def nothing(value: Tensor, hook: Any) -> None:
    raise AssertionError("never called")


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("blocks.1.hook_yy", UnknownSiteError, r"did you mean .*blocks\.1\.hook_y"),
        ("blocks.1.hook_h5", UnknownSiteError, r"did you mean blocks\.1\.hook_h\.5 or"),
        ("blocks.1.attn.hook_pattern", UnknownSiteError, "hook_pattern': a Mamba has no attention, no MLP"),
        ("blocks.1.hook_q", UnknownSiteError, "hook_q': a Mamba has no attention, no MLP"),
        ("blocks.3.hook_y", LayerError, "^'blocks.3.hook_y': this model has layers 0 to 2, and no 3$"),
        ("blocks.1.hook_h.9", PositionError, r"blocks\.1\.hook_h\.9.* 9 positions"),
        ("blocks.1.hook_h.-10", PositionError, "9 positions"),
        ("layers[1].ssm.h[12]", PositionError, "9 positions"),
        ("blocks.1.hook_h", UnknownSiteError, r"blocks\.1\.hook_h\.p.*layers\[1\]\.ssm\.h"),
        (lambda name: False, UnknownSiteError, r"none of the hook names.*hook_names\(9\)"),
        (5, TypeError, "named by a string or by a predicate"),
    ],
)
def test_a_name_that_is_none_is_refused_before_anything_runs(
    tiny: MambaTrace, tokens: Tensor, name: Any, error: type[Exception], match: str
) -> None:
    tiny.run_with_hooks(tokens)
    before = list(tiny.last_run)
    for hooks in ("fwd_hooks", "bwd_hooks"):
        with pytest.raises(error, match=match):
            tiny.run_with_hooks(tokens, **{hooks: [("hook_embed", nothing), (name, nothing)]})
    if isinstance(name, str) and name != "blocks.1.hook_h":
        with pytest.raises(error, match=match):
            tiny.run_with_cache(tokens, name)
    assert all(run is old for run, old in zip(tiny.last_run, before, strict=True))
    agree(tiny.run_with_hooks(tokens).detach(), plain(tiny, tokens))


@pytest.mark.parametrize(
    ("model_type", "name", "match"),
    [
        ("mamba", "blocks.1.hook_B_in", "^'blocks.1.hook_B_in' is not a place .*: it is a site of Mamba-2; "),
        ("falcon_mamba", "layers[1].ssm.inner_norm", "a Mamba-1 or Falcon-Mamba: it is a site of Mamba-2; "),
        ("mamba", "blocks.1.mixer.inner_norm.hook_in", "in TransformerLens 4 it is one of Mamba-2; "),
        ("mamba2", "layers[1].ssm.x_proj", "a Mamba-2: it is a module of Mamba-1 and Falcon-Mamba; "),
        ("mamba2", "blocks.1.mixer.hook_dt_proj", "in TransformerLens 4 it is one of Mamba-1 and Falcon-Mamba; "),
    ],
)
def test_a_place_of_another_architecture_is_refused_before_anything_runs(
    tiny_hf: ModuleFactory, tokens: Tensor, model_type: str, name: str, match: str
) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type))
    logits = model.run_with_hooks(tokens)
    before = list(model.last_run)
    for arguments in ({"fwd_hooks": [(name, nothing)]}, {"bwd_hooks": [(name, nothing)]}, {"names_filter": [name]}):
        with pytest.raises(UnknownSiteError, match=match):
            model.run_with_cache(tokens, **arguments)
    for hooks in ("fwd_hooks", "bwd_hooks"):
        with pytest.raises(UnknownSiteError, match="none of the hook names"):
            model.run_with_hooks(tokens, **{hooks: [(lambda one: one == name, nothing)]})
    assert all(run is old for run, old in zip(model.last_run, before, strict=True))
    assert torch.equal(model.run_with_hooks(tokens), logits)


@pytest.mark.parametrize("model_type", TINY)
def test_a_bridge_name_means_what_it_means_in_this_model(
    tiny_hf: ModuleFactory, tokens: Tensor, model_type: str
) -> None:
    model = MambaTrace(tiny_hf(model_type=model_type))
    path = "layers[1].ssm.inner_norm" if model_type == "mamba2" else "layers[1].ssm.after_skip"
    seen: list[str] = []
    name = "blocks.1.mixer.out_proj.hook_in"
    _, cache = model.run_with_cache(tokens, name, fwd_hooks=[(name, lambda value, hook: seen.append(hook.path))])
    assert seen == [path]
    assert cache[name] is cache[path]
    assert len(cache) == 1


@pytest.mark.parametrize("wrong", [*"hook_hh hook_h_3 hook_h5 hook_delt hook_ssm_outptu mixer.hook_write".split()])
def test_a_name_that_is_suggested_is_accepted(tiny: MambaTrace, tokens: Tensor, wrong: str) -> None:
    with pytest.raises(UnknownSiteError, match="did you mean") as error:
        tiny.run_with_hooks(tokens, [(f"blocks.1.{wrong}", nothing)])
    suggested = str(error.value).split("did you mean ")[1].rstrip("?").split(" or ")
    seen = []
    for name in suggested:
        tiny.run_with_hooks(tokens, [(name, lambda value, hook: seen.append(hook.name))])
    assert seen == suggested


@pytest.mark.parametrize("name", sorted(KEEPING_HOOKS))
def test_hooks_are_not_kept_on_a_model(tiny: MambaTrace, name: str) -> None:
    assert not hasattr(tiny, name)
    with pytest.raises(UnknownSiteError) as error:
        getattr(tiny, name)
    for said in (f"'{name}'", "run_with_hooks(input, fwd_hooks=", "`mamba-trace port script.py`"):
        assert said in str(error.value)


def test_there_are_no_hooks_to_reset(tiny: MambaTrace, tokens: Tensor) -> None:
    seen = []
    tiny.run_with_hooks(tokens, [("hook_embed", lambda value, hook: seen.append(1))])
    tiny.run_with_hooks(tokens)
    assert len(seen) == 1
    assert tiny.reset_hooks(clear_contexts=True, including_permanent=True) is None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"stop_at_layer": 1}, "blocks.1.hook_y"),
        ({"stop_at_layer": 3}, "hook_norm"),
        ({"only_use_these_layers": [0, 2]}, "blocks.1.hook_y"),
        ({"start_at_layer": 2}, "hook_embed"),
    ],
    ids=str,
)
def test_a_place_the_run_does_not_reach_is_refused(
    tiny: MambaTrace, tokens: Tensor, arguments: dict[str, Any], name: str
) -> None:
    argument = next(iter(arguments))
    with pytest.raises(LayerError, match=f"{name}.*{argument}"):
        tiny.run_with_hooks(tokens, [(name, nothing)], **arguments)
    with pytest.raises(LayerError, match=f"{name}.*{argument}"):
        tiny.run_with_cache(tokens, [name], **arguments)


def test_gradients_must_be_on_for_backward_hooks(tiny: MambaTrace, tokens: Tensor) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"bwd_hooks.*enable_grad"):
        tiny.run_with_hooks(tokens, bwd_hooks=[("hook_embed", nothing)])
    with torch.no_grad(), pytest.raises(ValueError, match=r"incl_bwd.*enable_grad"):
        tiny.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    for arguments in ({}, {"return_type": "loss", "stop_at_layer": 1}):
        with pytest.raises(ValueError, match='needs return_type="loss"'):
            tiny.run_with_cache(tokens, incl_bwd=True, **arguments)


@pytest.mark.parametrize(
    "returned", [torch.zeros(2, 2), 5, (torch.zeros(3, LENGTH, 24),)], ids=["shape", "int", "tuple"]
)
def test_what_a_hook_returns_must_fit(tiny: MambaTrace, tokens: Tensor, returned: Any) -> None:
    with pytest.raises(SiteValueError, match=r"the hook on blocks\.1\.hook_y returned: .*\(3, 9, 24\)"):
        tiny.run_with_hooks(tokens, [("blocks.1.hook_y", lambda value, hook: returned)])
    agree(tiny.run_with_hooks(tokens).detach(), plain(tiny, tokens))
    if not isinstance(returned, tuple):
        loss = tiny.run_with_hooks(
            tokens, bwd_hooks=[("blocks.1.hook_y", lambda value, hook: returned)], return_type="loss"
        )
        with pytest.raises(SiteValueError, match=r"blocks\.1\.hook_y .*\(3, 9, 24\), and returned"):
            loss.backward()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["hook_embed", "blocks.1.hook_h.3", "hook_logits"])
def test_a_hook_that_raises_leaves_nothing_behind(
    tiny: MambaTrace, tokens: Tensor, name: str, error: type[BaseException]
) -> None:
    expected = plain(tiny, tokens)

    def fail(value: Tensor, hook: Any) -> None:
        value[:] = 0
        raise error

    with pytest.raises(error):
        tiny.run_with_cache(tokens, fwd_hooks=[(name, fail)])
    for _ in range(2):
        assert torch.equal(plain(tiny, tokens), expected)
    _, cache = tiny.run_with_cache(tokens)
    assert list(cache) == tiny.hook_names(LENGTH)
