"""Names of places: paths, MambaLens's hooks, TransformerLens 4's bridge, and the errors where none fits."""

from __future__ import annotations

import re
from pathlib import Path

import nnsight
import pytest
import torch
from by_hand import by_hand, same
from conftest import module_path, near, pair
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from mamba_trace import MambaTrace, names
from mamba_trace.errors import PositionError, UnknownSiteError
from mamba_trace.means import mean_activation
from mamba_trace.names import BRIDGE_BLOCK, BRIDGE_MODEL, hook_names, to_bridge_name, to_hook_name, to_path
from mamba_trace.sites import FAMILIES, SITES, walk

#: The names of design.md's table, written out: these are fixed.
TABLE = {
    "embeddings": "hook_embed",
    "layers[7].resid_pre": "blocks.7.hook_resid_pre",
    "layers[7].layer_input": "blocks.7.hook_layer_input",
    "layers[7].norm": "blocks.7.hook_normalized_input",
    "layers[7].ssm.skip": "blocks.7.hook_skip",
    "layers[7].ssm.x_in": "blocks.7.hook_in_proj",
    "layers[7].ssm.conv": "blocks.7.hook_conv",
    "layers[7].ssm.ssm_input": "blocks.7.hook_ssm_input",
    "layers[7].ssm.h_start": "blocks.7.hook_h_start",
    "layers[7].ssm.delta_1": "blocks.7.hook_delta_1",
    "layers[7].ssm.delta_2": "blocks.7.hook_delta_2",
    "layers[7].ssm.delta": "blocks.7.hook_delta",
    "layers[7].ssm.A": "blocks.7.hook_A",
    "layers[7].ssm.A_bar": "blocks.7.hook_A_bar",
    "layers[7].ssm.B": "blocks.7.hook_B",
    "layers[7].ssm.B_bar": "blocks.7.hook_B_bar",
    "layers[7].ssm.C": "blocks.7.hook_C",
    "layers[7].ssm.h[12]": "blocks.7.hook_h.12",
    "layers[7].ssm.h[-1]": "blocks.7.hook_h.-1",
    "layers[7].ssm.y": "blocks.7.hook_y",
    "layers[7].ssm.ssm_output": "blocks.7.hook_ssm_output",
    "layers[7].ssm.after_skip": "blocks.7.hook_after_skip",
    "layers[7].ssm.out_proj": "blocks.7.hook_out_proj",
    "layers[7].resid_post": "blocks.7.hook_resid_post",
    "norm_f": "hook_norm",
    "lm_head": "hook_logits",
}


@pytest.mark.parametrize(("path", "hook"), TABLE.items())
def test_the_fixed_names(path, hook):
    assert to_path(hook) == path
    assert to_hook_name(path) == hook


def test_the_table_has_no_other_row():
    mamba_1 = [site for site in SITES if "selective" in site.families]
    assert {site.path(7) for site in mamba_1 if site.in_mamba_lens} - {"layers[7].ssm.h"} <= set(TABLE)
    only_in_mamba2 = {site.hook for site in SITES} - {site.hook for site in mamba_1}
    assert only_in_mamba2 == {"hook_B_in", "hook_C_in", "hook_B_conv", "hook_C_conv", "hook_inner_norm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_paths_and_hook_names_are_inverse_over_every_name(family):
    every = hook_names(3, 9, family)
    in_mamba_lens = sum(site.in_mamba_lens for site in SITES if family in site.families)
    assert len(every) == len(set(every)) == 3 + 3 * (in_mamba_lens - 4 + 9)
    for of in (family, None):  # the model's family, or none
        assert [to_hook_name(to_path(name, of), of) for name in every] == every
        paths = [to_path(name, of) for name in every]
        assert [to_path(to_hook_name(path, of), of) for path in paths] == paths


#: All but one: where nobody knows the model, MambaLens's name of the logits is that of lm_head.
ONE_TO_ONE = [site for site in SITES if site.name != "logits"]


@given(st.sampled_from(ONE_TO_ONE), st.integers(0, 99), st.integers(-300, 300))
def test_inverse_over_any_layer_and_position(site, layer, position):
    hook = site.hook_name(layer) + (f".{position}" if site.name == "h" else "")
    path = site.path(layer) + (f"[{position}]" if site.name == "h" else "")
    assert to_path(hook) == path
    assert to_hook_name(path) == hook
    # A path is understood by to_path as well, and a hook name by to_hook_name.
    assert to_path(path) == path
    assert to_hook_name(hook) == hook


def test_hook_names_are_in_the_order_of_the_walk():
    expected = []
    for site, layer in walk(2):
        if not site.in_mamba_lens:
            continue
        expected += [f"blocks.{layer}.hook_h.{p}" for p in range(4)] if site.name == "h" else [site.hook_name(layer)]
    assert hook_names(2, 4) == expected
    assert hook_names(2, 4)[0] == "hook_embed"
    assert hook_names(2, 4)[-2:] == ["hook_norm", "hook_logits"]


def test_hook_names_are_those_of_mamba_lens():
    with safe_open(Path(__file__).parent / "data" / "mamba_lens.safetensors", "pt") as file:
        hooks = {match[0] for key in list(file.keys()) if (match := re.search(r"(blocks\.\d+\.)?hook_[\w.]+$", key))}
    layers = 1 + max(int(hook.split(".")[1]) for hook in hooks if hook.startswith("blocks"))
    positions = 1 + max((int(hook.split(".")[-1]) for hook in hooks if "hook_h." in hook), default=0)
    assert len(hooks) > 20 * layers
    assert hooks <= set(hook_names(layers, positions))


@pytest.mark.parametrize(
    "spelling",
    [
        "blocks.3.hook_h.5",
        "layers[3].ssm.h[5]",
        "layers.3.ssm.h.5",
        "layers[3].ssm.h.5",
        "layers.3.ssm.h[5]",
        "layers[3].ssm.h[5].output",
        "model.layers.3.ssm.h.5",
        "model.layers.3.ssm.h.5.output",
        "backbone.layers.3.mixer.h.5",
        "model.backbone.layers.3.mixer.h.5.output",
    ],
)
def test_spellings_of_one_place(spelling):
    assert to_path(spelling) == "layers[3].ssm.h[5]"
    assert to_hook_name(spelling) == "blocks.3.hook_h.5"


@pytest.mark.parametrize("site", [site for site in SITES if not site.part], ids=lambda site: site.name)
def test_every_site_by_its_module_path(site):
    location = f"model.{module_path(site, 4)}.output"
    assert to_path(location) == site.path(4)
    assert names.public_path(location) == site.path(4)


def test_a_location_that_is_no_site_is_told_as_it_is():
    assert names.public_path("model.backbone.layers.0.mixer.act.output") == "model.backbone.layers.0.mixer.act.output"


@pytest.mark.parametrize("native", ["in_proj", "conv1d", "x_proj", "dt_proj"])
def test_inner_modules_have_a_path_and_no_hook(native):
    assert to_path(f"layers.2.ssm.{native}") == f"layers[2].ssm.{native}"
    with pytest.raises(
        UnknownSiteError, match=rf"layers\[2\]\.ssm\.{native} has no MambaLens hook: {native} is a module"
    ):
        to_hook_name(f"layers[2].ssm.{native}")


def test_the_whole_trajectory_has_a_path_and_no_hook():
    assert to_path("layers.2.ssm.h") == "layers[2].ssm.h"
    with pytest.raises(UnknownSiteError, match=r"blocks\.2\.hook_h\.p, which is layers\[2\]\.ssm\.h\[p\] here"):
        to_hook_name("layers[2].ssm.h")


# -- TransformerLens 4 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bridge", "path"),
    [
        ("embed.hook_out", "embeddings"),
        ("blocks.1.hook_in", "layers[1].resid_pre"),
        ("blocks.1.hook_out", "layers[1].resid_post"),
        ("blocks.1.norm.hook_in", "layers[1].layer_input"),
        ("blocks.1.norm.hook_out", "layers[1].norm"),
        ("blocks.1.mixer.hook_in", "layers[1].norm"),
        ("blocks.1.mixer.in_proj.hook_out", "layers[1].ssm.in_proj"),
        ("blocks.1.mixer.conv1d.hook_out", "layers[1].ssm.conv1d"),
        ("blocks.1.mixer.x_proj.hook_in", "layers[1].ssm.ssm_input"),
        ("blocks.1.mixer.x_proj.hook_out", "layers[1].ssm.x_proj"),
        ("blocks.1.mixer.dt_proj.hook_in", "layers[1].ssm.delta_1"),
        ("blocks.1.mixer.dt_proj.hook_out", "layers[1].ssm.delta_2"),
        ("blocks.1.mixer.out_proj.hook_in", "layers[1].ssm.after_skip"),
        ("blocks.1.mixer.out_proj.hook_out", "layers[1].ssm.out_proj"),
        ("blocks.1.mixer.hook_out", "layers[1].ssm.out_proj"),
        ("ln_final.hook_out", "norm_f"),
        ("unembed.hook_out", "lm_head"),
    ],
)
def test_bridge_names(bridge, path):
    assert to_path(bridge) == to_path(bridge, "selective") == path


#: What the bridge's names of Mamba-2 mean, by hand: in ``ssm2_mixer`` the norm is given the gate, and gates first.
IN_MAMBA_2 = {
    "blocks.1.mixer.inner_norm.hook_gate": "layers[1].ssm.skip",
    "blocks.1.mixer.inner_norm.hook_in": "layers[1].ssm.ssm_output",
    "blocks.1.mixer.inner_norm.hook_out": "layers[1].ssm.inner_norm",
    "blocks.1.mixer.hook_inner_norm": "layers[1].ssm.inner_norm",
    "blocks.1.mixer.out_proj.hook_in": "layers[1].ssm.inner_norm",
    "blocks.1.mixer.out_proj.hook_out": "layers[1].ssm.out_proj",
    "blocks.1.mixer.hook_ssm_out": "layers[1].ssm.out_proj",
    "blocks.1.mixer.hook_in_proj": "layers[1].ssm.in_proj",
    "blocks.1.mixer.conv1d.hook_out": "layers[1].ssm.conv1d",
    "blocks.1.mixer.hook_ssm_write": "layers[1].ssm.write",
    "blocks.1.mixer.hook_ssm_state": "layers[1].ssm.h_read",
    "blocks.1.hook_mixer_in": "layers[1].norm",
    "unembed.hook_in": "norm_f",
}


@pytest.mark.parametrize(("bridge", "path"), IN_MAMBA_2.items())
def test_bridge_names_in_mamba_2(bridge, path):
    assert to_path(bridge, "dual") == path


def test_a_bridge_name_without_a_family_is_that_of_whichever_has_it():
    """Mamba-1's, where they differ, which one name does."""
    different = {name for name, path in IN_MAMBA_2.items() if to_path(name) != path}
    assert different == {"blocks.1.mixer.out_proj.hook_in"}
    assert to_bridge_name("layers[0].ssm.inner_norm") == "blocks.0.mixer.inner_norm.hook_out"
    assert to_bridge_name("layers[0].ssm.after_skip") == "blocks.0.mixer.out_proj.hook_in"


@pytest.mark.parametrize(
    "name", ["x_proj.hook_in", "hook_x_proj", "dt_proj.hook_in", "dt_proj.hook_out", "hook_ssm_dt", "hook_dt_proj"]
)
def test_names_of_x_proj_and_dt_proj_are_none_of_mamba_2(name):
    assert to_path(f"blocks.0.mixer.{name}", "selective")
    said = rf"'blocks.0.mixer.{name}' is not a place of this model, a Mamba-2: .* of Mamba-1 and Falcon-Mamba;"
    with pytest.raises(UnknownSiteError, match=said):
        to_path(f"blocks.0.mixer.{name}", "dual")
    with pytest.raises(UnknownSiteError, match="or Falcon-Mamba: in TransformerLens 4 it is one of Mamba-2; "):
        to_path("blocks.0.mixer.inner_norm.hook_in", "selective")


@pytest.mark.parametrize("name", ["layers[0].ssm.B_in", "blocks.0.hook_inner_norm", "backbone.layers.0.mixer.C_conv"])
def test_a_name_that_the_family_lacks_says_which_models_have_it(name):
    assert to_path(name) == to_path(name, "dual")
    for function in (to_path, to_hook_name, to_bridge_name):
        said = "of this model, a Mamba-1 or Falcon-Mamba: it is a site of Mamba-2; "
        with pytest.raises(UnknownSiteError, match=said) as error:
            function(name, "selective")
        assert str(error.value).startswith(repr(name))
    for path in ("layers[0].ssm.x_proj", "layers.0.ssm.dt_proj.output"):
        with pytest.raises(UnknownSiteError, match="a Mamba-2: it is a module of Mamba-1 and Falcon-Mamba; "):
            to_path(path, "dual")


def test_no_name_of_another_family_is_suggested():
    for family, suggested in ((None, True), ("dual", True), ("selective", False)):
        with pytest.raises(UnknownSiteError) as error:
            to_path("blocks.0.hook_B_convv", family)
        assert ("hook_B_conv?" in str(error.value) or "hook_B_conv or" in str(error.value)) == suggested


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bridge_name_of_the_map_leads_to_a_place(family):
    for bridge in [*BRIDGE_MODEL, *(f"blocks.2.{name}" for name in BRIDGE_BLOCK[family])]:
        path = to_path(bridge, family)
        assert to_path(path) == to_path(path, family) == path


@pytest.mark.parametrize("family", FAMILIES)
def test_bridge_names_and_paths_are_inverse(family):
    paths = {*BRIDGE_MODEL.values(), *(f"layers[2].{path}" for path in BRIDGE_BLOCK[family].values())}
    paths |= {"layers[2].ssm.write", "layers[2].ssm.h_read"}
    for path in paths:
        assert to_path(to_bridge_name(path, family), family) == path
        assert to_path(to_bridge_name(path)) == path
    assert to_bridge_name("blocks.3.hook_delta_2") == "blocks.3.mixer.dt_proj.hook_out"
    gone = {"selective": ["skip", "ssm_output"], "dual": ["delta_1", "delta_2", "ssm_input", "after_skip"]}[family]
    for place in ("h[3]", "h", "A_bar", *gone):
        with pytest.raises(UnknownSiteError, match=r"has no name in TransformerLens 4's Mamba bridge of Mamba-"):
            to_bridge_name(f"layers[0].ssm.{place}", family)


@pytest.mark.parametrize("site", [site for site in SITES if site.name != "h"], ids=lambda site: site.name)
def test_bridge_names_read_what_the_bridge_would(tiny, tokens, site):
    """Each bridge name that ends in hook_out is a module's output: Hugging Face's own, by a PyTorch hook."""
    outs = {"embed.hook_out": "embeddings", "ln_final.hook_out": "norm_f", "unembed.hook_out": "lm_head"}
    bridges = [name for name, path in outs.items() if path == site.name]
    bridges += [
        f"blocks.1.{name}"
        for name, path in BRIDGE_BLOCK["selective"].items()
        if name.endswith(".hook_out") and path.rsplit(".", 1)[-1] == site.name
    ]
    for bridge in bridges:
        module = {"embed": "backbone.embeddings", "ln_final": "backbone.norm_f", "unembed": "lm_head"}.get(
            bridge.split(".")[0], bridge.replace("blocks", "backbone.layers").removesuffix(".hook_out")
        )
        seen = []
        handle = tiny._module.get_submodule(module).register_forward_hook(lambda m, a, out: seen.append(out))  # noqa: B023
        with torch.no_grad(), tiny.trace(tokens):
            value = tiny.hook(bridge).output.save()
        handle.remove()
        assert torch.equal(value, seen[0])


def test_what_transformerlens_alone_has_is_never_taken_for_h():
    """Its state is read after the scan, and what it writes is no state."""
    pairs = {
        "blocks.3.mixer.hook_ssm_state": "layers[3].ssm.h_read",
        "blocks.3.mixer.hook_ssm_write": "layers[3].ssm.write",
    }
    for hook, path in pairs.items():
        assert to_path(hook) == path
        assert to_hook_name(path) == hook
        assert hook not in hook_names(4, 9)  # MambaLens's


# -- on a model --------------------------------------------------------------------------------------------


def test_bridge_names_of_mamba_2_read_what_the_bridge_would(tiny_hf, tokens):
    """What the inner norm is given and returns, in Hugging Face's own forward, which passes the gate to it."""
    plain, model = pair(tiny_hf, model_type="mamba2")
    mixer, seen = plain.backbone.layers[1].mixer, {}
    mixer.norm.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(hook_in=args[0], hook_gate=kwargs.get("gate", args[-1]), hook_out=out),
        with_kwargs=True,
    )
    mixer.out_proj.register_forward_hook(lambda m, args, out: seen.update(out_proj=args[0]))
    with torch.no_grad():
        plain(tokens)
        with model.trace(tokens):
            values = nnsight.save({})
            for name in ("hook_gate", "hook_in", "hook_out"):
                values[name] = model.hook(f"blocks.1.mixer.inner_norm.{name}").output
        with model.trace(tokens):
            values["out_proj"] = model.hook("blocks.1.mixer.out_proj.hook_in").output
    for name, value in values.items():
        near(value, seen[name].view_as(value).double(), 1e-5, name)


def test_the_model_decides_what_a_bridge_name_means(tiny, tiny_hf):
    dual = MambaTrace(tiny_hf(model_type="mamba2"))
    name = "blocks.1.mixer.out_proj.hook_in"
    assert tiny.hook(name) is tiny.layers[1].ssm.after_skip
    assert dual.hook(name) is dual.layers[1].ssm.inner_norm
    falcon = MambaTrace(tiny_hf(model_type="falcon_mamba"))
    assert falcon.hook(name) is falcon.layers[1].ssm.after_skip
    with pytest.raises(UnknownSiteError, match="a Mamba-2: in TransformerLens 4 it is one of Mamba-1 and Falcon-Mamba"):
        dual.hook("blocks.1.mixer.x_proj.hook_in")


def test_every_hook_name_reads_its_place(tiny, tiny_hf, tokens):
    expected = by_hand(tiny_hf().double(), tokens)
    every = tiny.hook_names(tokens.shape[1])
    assert every == hook_names(3, tokens.shape[1])

    with torch.no_grad(), tiny.trace(tokens):
        values = nnsight.save({})
        for name in every:
            values[name] = tiny.hook(name).output
    for name, value in values.items():
        same(value, expected[to_path(name)])


@pytest.mark.parametrize("spelling", ["layers.1.ssm.h.5", "layers.1.ssm.h.-4", "layers.1.ssm.delta", "layers.1.ssm.h"])
def test_get(tiny, tiny_hf, tokens, spelling):
    place = tiny.get(spelling)
    with torch.no_grad(), tiny.trace(tokens):
        value = place.output.save()
    same(value, by_hand(tiny_hf().double(), tokens)[to_path(spelling)])


def test_hook_is_the_envoy_itself(tiny):
    assert tiny.hook("blocks.1.hook_conv") is tiny.layers[1].ssm.conv
    assert tiny.hook("layers[1].ssm.x_proj") is tiny.layers[1].ssm.x_proj
    assert tiny.hook("hook_logits") is tiny.lm_head
    assert tiny.hook("blocks.1.hook_h.5").path == tiny.layers[1].ssm.h[5].path


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("blocks.3.hook_detla", "blocks.3.hook_delta"),
        ("blocks.3.hook_resid_middle", "blocks.3.hook_resid_"),
        ("blocks.3.hook_h_starts", "blocks.3.hook_h_start"),
        ("layers[3].ssm.cnv", "layers[3].ssm.conv"),
        ("layers.3.ssm.ssm_inputs", "layers[3].ssm.ssm_input"),
        ("hook_embeds", "hook_embed"),
        ("hook_logit", "hook_logits"),
        ("lm_haed", "lm_head"),
        ("layers[3].resid_prev", "layers[3].resid_pre"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, suggestion):
    for function in (to_path, to_hook_name):
        with pytest.raises(UnknownSiteError, match="no site is called") as error:
            function(name)
        assert repr(name) in str(error.value)
        assert suggestion in str(error.value)


def test_a_suggestion_has_one_mark_after_it(tiny, tokens):
    """Whether the message ends with it or goes on."""
    for ask in (
        lambda: to_path("blocks.0.hook_hh"),
        lambda: getattr(tiny.layers[0].ssm, "hh"),  # noqa: B009
        lambda: getattr(tiny.layers[0], "resid_prae"),  # noqa: B009
        lambda: tiny.layers[0].ssm.y.outptu,
        lambda: tiny.cfg.d_modl,
        lambda: tiny.blocks[0].W_delta_3,
        lambda: mean_activation(tiny, tokens, "yy"),
    ):
        with pytest.raises(AttributeError, match="did you mean") as error:
            ask()
        assert not re.search(r"\w[?.;:,!]{2}", str(error.value)), error.value
        hint = str(error.value).split("did you mean ")[1]
        assert hint.endswith("?") or re.match(r"[\w.\[\] ]+[.?] [A-Z]", hint), error.value


@pytest.mark.parametrize(
    "name",
    [
        "",
        "qqqq",
        "blocks.hook_h.5",
        "blocks.x.hook_h.5",
        "blocks.0.hook_h.",
        "h[5]",
        "layers[0]",
        "layers[-1].ssm.h[0]",
        "layers[0].ssm.h[1:2]",
        "blocks.0.hook_h.5.5",
        "layers[0].ssm",
    ],
)
def test_a_name_that_is_none(name):
    with pytest.raises(UnknownSiteError, match="no site is called") as error:
        to_path(name)
    assert isinstance(error.value, AttributeError)
    assert isinstance(error.value, KeyError)
    assert str(error.value).endswith(("?", "lists them all"))


def test_a_layer_out_of_range(tiny):
    for name in (
        "blocks.3.hook_h.5",
        "layers[17].ssm.h[5]",
        "blocks.3.hook_resid_pre",
        "layers.3.ssm.x_proj",
    ):
        with pytest.raises(UnknownSiteError, match="this model has layers 0 to 2") as error:
            tiny.hook(name)
        assert name in str(error.value)


@pytest.mark.parametrize("count", [0, -1])
def test_hook_names_of_no_position(tiny, count):
    with pytest.raises(PositionError, match=f"at least one position, not {count}"):
        tiny.hook_names(count)
