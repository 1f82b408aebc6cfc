"""State dicts in three formats: names and splits, exact round trips, the words of errors, MambaLens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from family_models import family_model
from safetensors import safe_open
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

from mamba_trace.conversion import (
    FORMATS,
    check_state_dict,
    convert_config,
    convert_state_dict,
    detect_state_dict_format,
)
from mamba_trace.errors import CheckpointError

RECORDED = Path(__file__).parent / "data" / "mamba_lens.safetensors"


def tiny_config(**changes: Any) -> MambaConfig:
    sizes = {"vocab_size": 24, "hidden_size": 12, "state_size": 3, "num_hidden_layers": 2}
    return MambaConfig(**{**sizes, "time_step_rank": 2, **changes})


def random_state_dict(config: MambaConfig) -> dict[str, Tensor]:
    model = MambaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.state_dict()


def assert_identical(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("start", FORMATS)
def test_state_dict_round_trips_are_exact(start: str, lm_head: bool, dtype: torch.dtype, use_bias: bool) -> None:
    config = tiny_config(use_bias=use_bias, use_conv_bias=not use_bias)
    weights = {name: tensor.to(dtype) for name, tensor in random_state_dict(config).items()}
    weights["backbone.layers.0.mixer.A_log"] = weights["backbone.layers.0.mixer.A_log"].float()
    if not lm_head:
        del weights["lm_head.weight"]
    given_ = convert_state_dict(weights, start)
    before = {name: tensor.clone() for name, tensor in given_.items()}
    for middle in FORMATS:
        there = convert_state_dict(given_, middle)
        assert detect_state_dict_format(there) == middle
        assert ("lm_head.weight" in there) is lm_head
        assert all(tensor.is_contiguous() for tensor in there.values())
        assert_identical(convert_state_dict(there, start), before)
    assert_identical(given_, before)


def test_names_and_splits() -> None:
    weights = random_state_dict(tiny_config())  # D=12 E=24 N=3 R=2
    layer = "backbone.layers.1."
    lens = convert_state_dict(weights, "mamba_lens")
    in_proj, x_proj = weights[layer + "mixer.in_proj.weight"], weights[layer + "mixer.x_proj.weight"]
    expected = {
        "in_proj.weight": in_proj[:24],
        "skip_proj.weight": in_proj[24:],
        "W_delta_1.weight": x_proj[:2],
        "W_B.weight": x_proj[2:5],
        "W_C.weight": x_proj[5:],
        "W_delta_2.weight": weights[layer + "mixer.dt_proj.weight"],
        "W_delta_2.bias": weights[layer + "mixer.dt_proj.bias"],
        "conv1d.weight": weights[layer + "mixer.conv1d.weight"],
        "conv1d.bias": weights[layer + "mixer.conv1d.bias"],
        "out_proj.weight": weights[layer + "mixer.out_proj.weight"],
        "A_log": weights[layer + "mixer.A_log"],
        "W_D": weights[layer + "mixer.D"],
        "norm.weight": weights[layer + "norm.weight"],
    }
    block = {k.removeprefix("blocks.1."): v for k, v in lens.items() if k.startswith("blocks.1.")}
    assert_identical(block, expected)
    outside = {k: v for k, v in lens.items() if not k.startswith("blocks.")}
    assert outside.keys() == {"embedding.weight", "norm.weight", "lm_head.weight"}
    assert torch.equal(outside["norm.weight"], weights["backbone.norm_f.weight"])
    original = convert_state_dict(weights, "original")
    assert original.keys() - weights.keys() == {"backbone.embedding.weight"}
    assert weights.keys() - original.keys() == {"backbone.embeddings.weight"}
    memory = {tensor.data_ptr() for tensor in block.values()}
    assert in_proj.data_ptr() not in memory
    assert x_proj.data_ptr() not in memory


def test_missing_and_unexpected_keys_are_named() -> None:
    weights = random_state_dict(tiny_config())
    del weights["backbone.layers.1.mixer.D"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        convert_state_dict(weights, "mamba_lens")
    assert "1 missing: backbone.layers.1.mixer.D. 1 unexpected: extra" in str(caught.value)


def test_wrong_shapes_are_named_with_both_shapes() -> None:
    weights = convert_state_dict(random_state_dict(tiny_config()), "mamba_lens")
    weights["blocks.0.skip_proj.weight"] = torch.zeros(23, 12)
    with pytest.raises(CheckpointError, match=r"blocks.0.skip_proj.weight \[23, 12\], expected \[24, 12\]"):
        convert_state_dict(weights, "huggingface")
    weights = random_state_dict(tiny_config())
    weights["backbone.layers.1.mixer.in_proj.weight"] = torch.zeros(47, 12)
    with pytest.raises(CheckpointError, match=r"in_proj.weight \[47, 12\], expected \[48, 12\]"):
        convert_state_dict(weights, "original")
    weights = random_state_dict(tiny_config())
    weights["backbone.layers.0.mixer.A_log"] = torch.zeros(24)
    with pytest.raises(CheckpointError, match=r"A_log \[24\], expected \[24, 0\]"):
        convert_state_dict(weights, "original")


def test_other_state_dicts_are_rejected() -> None:
    weights = random_state_dict(tiny_config())
    with pytest.raises(CheckpointError, match=r"found nothing; expected one of 'backbone.embedding.weight'"):
        detect_state_dict_format({})
    with pytest.raises(CheckpointError, match=r"'model.backbone.embeddings.weight' looks like a Mamba inside"):
        detect_state_dict_format({f"model.{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(CheckpointError, match="expected exactly one of"):
        detect_state_dict_format(weights | {"embedding.weight": torch.zeros(1)})
    name = "backbone.layers.0.mixer.A_log"
    with pytest.raises(CheckpointError, match=r"A_log' is complex"):
        convert_state_dict(weights | {name: weights[name].to(torch.complex64)}, "original")
    with pytest.raises(CheckpointError, match="'epoch' is a int"):
        convert_state_dict(weights | {"epoch": cast(Tensor, 3)}, "original")
    with pytest.raises(CheckpointError, match=r"1 unexpected.*the layers look like those of a Mamba-2: give the"):
        convert_state_dict(weights | {"backbone.layers.0.mixer.dt_bias": torch.zeros(4)}, "original")
    with pytest.raises(CheckpointError, match="has no layers"):
        convert_state_dict({"embedding.weight": torch.zeros(8, 4)}, "original")
    lens = convert_state_dict(weights, "mamba_lens")
    lens["blocks.0.skip_proj.weight"] = lens["blocks.0.skip_proj.weight"].half()
    with pytest.raises(CheckpointError, match=r"in_proj.weight must have one dtype, found torch.float32, torch"):
        convert_state_dict(lens, "original")


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "use_conv_bias": False}], ids=str)
def test_state_dicts_of_mamba2(changes: dict[str, Any], lm_head: bool) -> None:
    module = family_model("mamba2", **changes)
    weights = module.state_dict()
    check_state_dict(weights, module.config)
    if not lm_head:
        del weights["lm_head.weight"]
    original = convert_state_dict(weights, "original")
    assert original.keys() - weights.keys() == {"backbone.embedding.weight"}
    assert weights.keys() - original.keys() == {"backbone.embeddings.weight"}
    assert detect_state_dict_format(original) == "original"
    assert_identical(convert_state_dict(original, "huggingface"), weights)
    assert original["backbone.layers.0.mixer.dt_bias"] is weights["backbone.layers.0.mixer.dt_bias"]
    for given_ in (weights, original):
        with pytest.raises(CheckpointError, match="weights of a Mamba-2, which has no mamba_lens format"):
            convert_state_dict(given_, "mamba_lens")


def test_state_dicts_of_mamba2_that_do_not_fit() -> None:
    module = family_model("mamba2")
    weights = module.state_dict()
    short = {name: tensor for name, tensor in weights.items() if name != "backbone.layers.1.mixer.dt_bias"}
    with pytest.raises(CheckpointError, match=r"1 missing: backbone.layers.1.mixer.dt_bias"):
        convert_state_dict(short, "original")
    name = "backbone.layers.2.mixer.in_proj.weight"
    with pytest.raises(CheckpointError, match=rf"of the wrong shape: {name} \[70, 12\], expected \[74, 12\]"):
        convert_state_dict(weights | {name: weights[name][:70]}, "original")
    name = "backbone.layers.0.mixer.D"  # as with D_has_hdim
    with pytest.raises(CheckpointError, match=rf"of the wrong shape: {name} \[24\], expected \[6\]"):
        check_state_dict(weights | {name: torch.zeros(24)}, module.config)
    with pytest.raises(CheckpointError, match="the layers look like those of a Mamba-1 or a Falcon-Mamba: give"):
        check_state_dict(family_model("mamba").state_dict(), module.config)


def test_check_state_dict_lists_everything_at_once() -> None:
    config = tiny_config()
    weights = random_state_dict(config)
    check_state_dict(weights, config)
    check_state_dict({k: v for k, v in weights.items() if k != "lm_head.weight"}, config)  # tied
    with pytest.raises(CheckpointError) as caught:
        check_state_dict(weights, tiny_config(num_hidden_layers=3, vocab_size=32, use_bias=True))
    words = str(caught.value)
    assert "16 missing: backbone.layers.0.mixer.in_proj.bias; " in words
    assert " and 8 more" in words
    assert "backbone.embeddings.weight [24, 12], expected [32, 12]" in words
    assert "vocab_size counts the padding" in words
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight"):
        check_state_dict(
            {k: v for k, v in weights.items() if k != "lm_head.weight"},
            tiny_config(tie_word_embeddings=False),
        )


def test_a_tied_head_that_differs_is_rejected() -> None:
    config = tiny_config()
    weights = random_state_dict(config) | {"lm_head.weight": torch.zeros(24, 12)}
    with pytest.raises(CheckpointError, match="set tie_word_embeddings=False"):
        check_state_dict(weights, config)
    check_state_dict(weights, tiny_config(tie_word_embeddings=False))


def recorded() -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """The specification, MambaLens's and the original state dict, tokens and logits that MambaLens gave."""
    with safe_open(RECORDED, "pt") as file:
        spec = json.loads(file.metadata()["spec"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return spec, under("weights."), under("original."), tensors["tokens"], tensors["logits"]


def test_state_dicts_agree_with_mamba_lens_bit_for_bit() -> None:
    _, lens, original, _, _ = recorded()
    assert_identical(convert_state_dict(lens, "original"), original)
    assert_identical(convert_state_dict(original, "mamba_lens"), lens)


def test_logits_agree_with_mamba_lens() -> None:
    spec, lens, _, tokens, expected = recorded()
    model = MambaForCausalLM(convert_config(spec["config"], "huggingface", trained=True)).eval()
    model.load_state_dict(convert_state_dict(lens, "huggingface"))
    with torch.no_grad():
        logits = model(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
