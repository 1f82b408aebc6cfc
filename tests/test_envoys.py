"""What ``model.layers[3].ssm.h[5]`` is: envoy classes, representation, copies, pickles, assignment."""

# A traced block is not a statement under test: what pytest.raises expects comes out of its end.
# ruff: noqa: PT012

from __future__ import annotations

import copy
import io
import operator
import pickle

import pytest
import torch
from by_hand import by_hand, same
from conftest import MAMBA_SITES, make_hf, module_path
from nnsight.intervention.envoy import Envoy
from nnsight.intervention.eproperty import eproperty
from transformers.models.mamba.modeling_mamba import MambaMixer

from mamba_trace import MambaTrace
from mamba_trace.errors import SiteOrderError, SiteValueError, UnknownSiteError
from mamba_trace.sites import describe_axes, walk
from mamba_trace.tracing.envoys import (
    BY_SCOPE,
    BlockEnvoy,
    MixerEnvoy,
    PositionEnvoy,
    SiteEnvoy,
    SkipEnvoy,
    StateEnvoy,
    envoy_classes,
)
from mamba_trace.tracing.fitting import fit


def test_every_site_has_an_envoy_that_knows_its_row(tiny):
    for site, layer in walk(3):
        envoy = tiny.hook(site.path(layer))
        assert isinstance(envoy, SiteEnvoy)
        assert envoy.site is site
        assert envoy.path == f"model.{module_path(site, layer)}"
    assert isinstance(tiny.layers[0], BlockEnvoy)
    assert isinstance(tiny.layers[0].ssm, MixerEnvoy)
    assert isinstance(tiny.layers[0].ssm.h, StateEnvoy)
    assert isinstance(tiny.layers[0].ssm.skip, SkipEnvoy)
    assert isinstance(tiny.layers[0].ssm.h[1], PositionEnvoy)


def test_the_names_of_hugging_face_lead_to_the_same_envoys(tiny):
    assert tiny.backbone.layers[1].mixer is tiny.layers[1].ssm
    assert tiny.backbone.embeddings is tiny.embeddings
    assert tiny.backbone.norm_f is tiny.norm_f
    assert tiny.layers[-1] is tiny.layers[2]
    assert len(tiny.layers) == 3


def test_the_parameters_keep_their_names(tiny, tiny_hf):
    assert list(tiny._module.state_dict()) == list(tiny_hf().state_dict())


def test_sites_of_the_map_name_no_other_module(tiny):
    """`norm` of a block and `norm_f` are sites; act, and what a user hangs below a mixer, are not."""
    assert type(tiny.layers[0].ssm.act) is Envoy
    tiny._module.backbone.layers[0].mixer.add_module("probe", torch.nn.Identity())
    assert type(tiny.layers[0].ssm.probe) is Envoy
    assert {*envoy_classes().values(), *BY_SCOPE.values()} >= {SiteEnvoy, StateEnvoy, SkipEnvoy, BlockEnvoy, MixerEnvoy}


def test_the_users_own_envoys_come_first(tiny_hf, tokens):
    class Own(Envoy):
        pass

    model = MambaTrace(tiny_hf(), envoys={"mixer.x_proj": Own}, rename={"lm_head": "unembed"})
    assert isinstance(model.layers[0].ssm.x_proj, Own)
    assert model.unembed is model.lm_head
    with model.trace(tokens):
        value = model.layers[0].ssm.h[1].output.save()
    assert value.dim() == 3


def test_print_shows_every_site_with_its_shape(tiny):
    text = repr(tiny)
    for site in MAMBA_SITES:
        assert site.hook in text, site.name
    for shape in (
        "[B, L, 24], hook_conv",
        "[B, L, 24, 5], hook_A_bar",
        "[24, 5], hook_A",
        "[B, 24, 5], hook_h_start",
        "[B, L, 4], hook_delta_1",
        "[B, L, 12], hook_resid_pre",
        "[B, L, 5], hook_B",
    ):
        assert shape in text
    assert "hook_conv" in repr(tiny.layers[0].ssm)
    assert repr(tiny.layers[2].ssm.h[-3]) == "layers[2].ssm.h[-3]: state [B,E,N] after token -3"


def test_both_names_of_a_site_are_shown():
    """inner_norm is Hugging Face's norm: whoever prints the mixer, or completes its names, finds it."""
    model = MambaTrace(make_hf(model_type="mamba2"))
    ssm = model.layers[1].ssm
    assert "(inner_norm/norm): HookableMamba2RMSNormGated()" in repr(ssm)
    assert "inner_norm" in dir(ssm)
    assert "inner_norm" not in dir(model.layers[1])
    assert "inner_norm" not in dir(MambaTrace(make_hf()).layers[1].ssm)
    ssm._module.norm = torch.nn.Identity()
    with model.trace(torch.ones(1, 3, dtype=torch.long)):
        value = ssm.inner_norm.output.save()
    assert value.shape == (1, 3, 24)
    assert "(inner_norm/norm): Identity()" in repr(ssm)
    assert repr(copy.deepcopy(model).layers[1].ssm) == repr(ssm)


def test_describe_axes():
    assert describe_axes("BEN") == "[B batch, E d_inner, N d_state]"


def test_a_position_belongs_to_its_site(tiny):
    place = tiny.layers[1].ssm.h[-2]
    assert place.path == "model.backbone.layers[1].mixer.h.-2".replace("[1]", ".1")
    assert place.position == -2
    assert place.interleaver is tiny.interleaver
    assert place._module is tiny.layers[1].ssm.h._module
    # Making one registers nothing: the tree has the same envoys as before.
    before = len(list(tiny.modules()))
    _ = [tiny.layers[1].ssm.h[p] for p in range(9)]
    assert len(list(tiny.modules())) == before


def test_a_copied_position(tiny, tiny_hf, tokens):
    place = tiny.layers[1].ssm.h[3]
    twin = copy.copy(place)
    assert twin is not place
    with torch.no_grad(), tiny.trace(tokens):
        value = twin.output.save()
    same(value, by_hand(tiny_hf().double(), tokens)["layers[1].ssm.h[3]"])


def test_a_pickled_position_is_its_site_and_its_number(tiny):
    """As nnsight ships code to a server: the interleaver and modules stay behind, by their persistent ids."""
    place = tiny.layers[1].ssm.h[3]
    function, arguments = place.__reduce__()
    assert function is operator.getitem
    assert arguments == (tiny.layers[1].ssm.h, 3)

    kept: dict[str, object] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> str | None:
            name = getattr(value, "__dict__", {}).get("_persistent_id")
            if name is not None:
                kept[name] = value
            return name

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, name: str) -> object:
            return kept[name]

    file = io.BytesIO()
    Pickler(file).dump(place)
    file.seek(0)
    twin = Unpickler(file).load()
    assert isinstance(twin, PositionEnvoy)
    assert (twin.path, twin.position) == (place.path, 3)


def test_other_values_of_an_envoy_stay_nnsights(tiny, tiny_hf, tokens):
    expected = by_hand(tiny_hf().double(), tokens)
    with torch.no_grad(), tiny.trace(tokens):
        (resid,), _ = tiny.layers[1].inputs
        resid = resid.clone().save()
        mixer_in = tiny.layers[1].ssm.input.clone().save()
        site_in = tiny.layers[1].ssm.conv.input.clone().save()
        out = tiny.layers[1].ssm.output.save()
        block = tiny.layers[1].output.save()
        logits = tiny.output.logits.save()
    same(resid, expected["layers[1].resid_pre"])
    same(mixer_in, expected["layers[1].norm"])
    same(site_in, expected["layers[1].ssm.conv"])
    same(out, expected["layers[1].ssm.out_proj"])
    same(block, expected["layers[1].resid_post"])
    same(logits, expected["lm_head"])


@pytest.mark.parametrize("place", ["input", "inputs"])
def test_the_input_of_a_site_may_be_edited_too(tiny, tiny_hf, tokens, place):
    conv = tiny.layers[1].ssm.conv
    with torch.no_grad(), tiny.trace(tokens):
        if place == "input":
            conv.input = conv.input * 0.5
        else:
            conv.inputs = ((conv.input * 0.5,), {})
        logits = tiny.lm_head.output.save()
    same(logits, by_hand(tiny_hf().double(), tokens, {"layers[1].ssm.conv": lambda v: v * 0.5})["lm_head"])


@pytest.mark.parametrize("level", ["block", "mixer"])
def test_the_output_of_a_block_or_mixer_may_be_edited(tiny, tiny_hf, tokens, level):
    envoy = tiny.layers[1] if level == "block" else tiny.layers[1].ssm
    path = "layers[1].resid_post" if level == "block" else "layers[1].ssm.out_proj"
    with torch.no_grad(), tiny.trace(tokens):
        before = envoy.output.save()
        envoy.output[:] = envoy.output * 0.5
        logits = tiny.lm_head.output.save()
    expected = by_hand(tiny_hf().double(), tokens)
    same(before, expected[path])
    same(logits, by_hand(tiny_hf().double(), tokens, {path: lambda v: v * 0.5})["lm_head"])


# -- classes of the user's ---------------------------------------------------------------------------------


class Shouting(Envoy):
    """An envoy of a user's, with an attribute, a method and a view of its own."""

    volume = 11

    def twice(self):
        return 2 * self.output

    @eproperty(key="output")
    def loud(self, value):
        return value * self.volume


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("mixer.conv", "layers[1].ssm.conv"),
        ("conv", "layers[1].ssm.conv"),
        ("ssm.conv", "layers[1].ssm.conv"),
        ("h", "layers[1].ssm.h"),
        ("skip", "layers[1].ssm.skip"),
        ("lm_head", "lm_head"),
        ("mixer", "layers[1].ssm"),
        ("ssm", "layers[1].ssm"),
        ("layers.*", "layers[1]"),
        ("backbone.layers", "layers"),
        ("x_proj", "layers[1].ssm.x_proj"),
        (MambaMixer, "layers[1].ssm"),
        (torch.nn.Linear, "lm_head"),
        (torch.nn.Linear, "layers[1].ssm.in_proj"),
        ("act", "layers[1].ssm.act"),
        (None, "layers[1].ssm.h"),
        (None, "layers[1]"),
        (None, "layers[1].ssm.act"),
    ],
    ids=str,
)
def test_a_users_envoy_and_a_sites_are_one(tiny_hf, tokens, key, path):
    plain = MambaTrace(tiny_hf())
    model = MambaTrace(tiny_hf(), envoys=Shouting if key is None else {key: Shouting})
    names = path.replace("[1]", ".1")
    envoy, ordinary = model.get(names), plain.get(names)
    assert isinstance(envoy, Shouting)
    assert isinstance(envoy, type(ordinary))
    assert envoy.volume == 11
    if path == "layers":
        assert len(envoy) == 3
        return
    with torch.no_grad(), plain.trace(tokens):
        value = ordinary.output.clone().save()
        logits = plain.lm_head.output.save()
    with torch.no_grad(), model.trace(tokens):
        twice = envoy.twice().save()
        loud = envoy.loud.save()
        again = model.lm_head.output.save()
    same(twice, 2 * value)
    same(loud, 11 * value)
    same(again, logits)


def test_a_users_envoy_of_every_module_leaves_the_sites_as_they_are(tiny_hf, tokens):
    model = MambaTrace(tiny_hf(), envoys=Shouting)
    for site, layer in walk(3):
        assert isinstance(model.hook(site.path(layer)), SiteEnvoy)
    with torch.no_grad(), model.trace(tokens):
        state = model.layers[1].ssm.h[2].output.save()
        with pytest.raises(SiteOrderError):
            _ = model.layers[1].ssm.delta.output
    same(state, by_hand(tiny_hf().double(), tokens)["layers[1].ssm.h[2]"])
    model.layers[1].ssm.note = "an attribute of the user's own"
    with pytest.raises(UnknownSiteError, match="did you mean output"):
        model.layers[1].ssm.outptu = 0


def test_a_users_envoy_may_be_a_sites_own_class(tiny_hf):
    class Own(StateEnvoy):
        pass

    class Another(SiteEnvoy):
        pass

    model = MambaTrace(tiny_hf(), envoys={"h": Own, "y": Another})
    assert type(model.layers[0].ssm.h) is Own
    assert type(model.layers[0].ssm.y) is Another


class InOrder(Envoy):
    """An envoy that hands nnsight's arguments on in their order."""

    def __init__(self, module, path="model", interleaver=None, rename=None, envoys=None, parent=None):
        super().__init__(module, path, interleaver, rename, envoys, parent)


def test_a_users_envoy_may_hand_its_arguments_on_in_their_order(tiny_hf, tokens):
    model = MambaTrace(tiny_hf(), envoys=InOrder, rename={"in_proj": "expand"})
    assert isinstance(model.layers[0].ssm.conv1d, InOrder)
    assert model.layers[0].ssm.expand is model.layers[0].ssm.in_proj
    assert torch.equal(model.run_with_cache(tokens)[0], MambaTrace(tiny_hf()).run_with_cache(tokens)[0])


def test_a_position_may_have_a_name(tiny_hf, tokens):
    model = MambaTrace(tiny_hf(), rename={"-1": "last"})
    with torch.no_grad(), model.trace(tokens):
        named = model.layers[1].ssm.h.last.output.save()
    with torch.no_grad(), model.trace(tokens):
        counted = model.layers[1].ssm.h[-1].output.save()
    assert torch.equal(named, counted)


@pytest.mark.parametrize("wrong", [5, {"mixer": 5}, {"mixer": torch.nn.Linear}, "mixer", [Envoy]], ids=str)
def test_what_is_no_envoy(tiny_hf, wrong):
    with pytest.raises(SiteValueError, match=r"envoys= takes a subclass of nnsight's Envoy, or a dictionary"):
        MambaTrace(tiny_hf(), envoys=wrong)


# -- names beside ours -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rename", "names"),
    [
        ({"layers": "stack"}, ["stack"]),
        ({"backbone.layers": "stack"}, ["stack"]),
        ({"backbone.layers": ["stack", "h"]}, ["stack", "h"]),
        ({"mixer": "mamba"}, []),
        ({"backbone.embeddings": "wte", "lm_head": "unembed"}, []),
        ({"backbone.layers": "layers"}, []),
        ({MambaMixer: "state_space"}, []),
    ],
    ids=str,
)
def test_a_further_name_leaves_ours(tiny_hf, tokens, rename, names):
    model = MambaTrace(tiny_hf(), rename=rename)
    plain = MambaTrace(tiny_hf())
    for name in names:
        assert getattr(model, name) is model.layers
    if "mixer" in rename:
        assert model.layers[1].mamba is model.layers[1].ssm
    if MambaMixer in rename:
        assert model.layers[1].state_space is model.layers[1].ssm
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        right, expected = plain.run_with_cache(tokens)
    assert torch.equal(logits, right)
    assert list(cache.keys()) == list(expected.keys())


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        ({"layers": "blocks"}, r"'blocks' is the name of MambaTrace.blocks already; choose another"),
        ({"lm_head": "layers"}, r"'layers' is the name of backbone.layers already"),
        ({"lm_head": "trace"}, r"'trace' is the name of MambaTrace.trace already"),
        ({"mixer": "output"}, r"'output' is the name of MambaTrace.output already"),
        ({"lm_head": "un embed"}, r"a name is a string that can stand after a dot"),
        ({"lm_head": 5}, r"a name is a string"),
        (5, r"rename= takes a dictionary"),
    ],
    ids=str,
)
def test_a_name_that_is_taken(tiny_hf, rename, said):
    with pytest.raises(UnknownSiteError, match=said):
        MambaTrace(tiny_hf(), rename=rename)


# -- loops over positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 2])
def test_a_loop_over_the_states(tiny, tokens, layer):
    h = tiny.layers[layer].ssm.h
    with torch.no_grad(), tiny.trace(tokens):
        for p in range(9):
            h[p].output[:] *= 0.5
        expected = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        for state in h:
            state.output[:] *= 0.5
        logits = tiny.lm_head.output.save()
    assert torch.equal(logits, expected)


def test_a_loop_over_the_states_that_edits_one(tiny, tokens):
    h = tiny.layers[1].ssm.h
    with torch.no_grad(), tiny.trace(tokens):
        h[3].output = torch.zeros(3, 24, 5)
        expected = tiny.lm_head.output.save()
    with torch.no_grad(), tiny.trace(tokens):
        n = len(h)
        for p, state in enumerate(h):
            if p == 3:
                state.output = torch.zeros(3, 24, 5)
        logits = tiny.lm_head.output.save()
        n = [n].save()
    assert n == [9]
    torch.testing.assert_close(logits, expected)


def test_a_loop_over_the_states_of_every_step_and_invoke(tiny, tokens):
    counted = []
    with tiny.generate(max_new_tokens=3, do_sample=False) as tracer:
        with tracer.invoke(tokens[:1]):
            for _ in tracer.iter[:3]:
                counted.append(len([state.output for state in tiny.layers[1].ssm.h]))
        with tracer.invoke(tokens[1:]):
            for _ in tracer.iter[:3]:
                counted.append(len(tiny.layers[2].ssm.h))
        with tracer.invoke():
            counted.save()
    assert sorted(counted) == [1, 1, 1, 1, 9, 9]


def test_a_loop_over_the_states_once_they_are_gone(tiny, tokens):
    with (
        pytest.raises(SiteOrderError, match=r"layers\[1\].ssm.h\[0\] was already computed"),
        tiny.trace(tokens),
    ):
        _ = tiny.layers[1].ssm.y.output
        for state in tiny.layers[1].ssm.h:
            state.output[:] = 0


def test_a_loop_over_shapes(tiny, tokens):
    with tiny.scan(tokens):
        shapes = [tuple(state.output.shape) for state in tiny.layers[1].ssm.h].save()
    assert shapes == [(3, 24, 5)] * 9


# -- fit: what may be assigned -----------------------------------------------------------------------------


def test_fit_copies_so_that_a_later_edit_leaves_the_assigned_tensor_alone():
    value = torch.ones(2, 3)
    fitted = fit("x", "BL", value, torch.zeros(2, 3))
    fitted[:] = 0
    assert torch.equal(value, torch.ones(2, 3))


def test_fit_casts_and_keeps_the_graph():
    value = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    fitted = fit("x", "BL", value, torch.zeros(2, 3, dtype=torch.bfloat16))
    assert fitted.dtype == torch.bfloat16
    fitted.float().sum().backward()
    assert (value.grad == 1).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"x takes shape \(2, 3\) \[B batch, L positions\], not \(3,\)"),
        (torch.ones(2, 3, 1), r"not \(2, 3, 1\)"),
        (torch.ones(2, 3, dtype=torch.long), r"not torch.int64: use .float\(\)"),
        (2.0, r"not a float. To fill it with a number, write x.output\[:\]"),
        (torch.ones(2, 3, device="meta"), "meta device, which holds no numbers"),
    ],
)
def test_fit_refuses(value, message):
    with pytest.raises(SiteValueError, match=message):
        fit("x", "BL", value, torch.zeros(2, 3))
