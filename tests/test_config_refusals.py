"""Configurations of models that Hugging Face's classes do not compute: refused by name, whatever the route."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import fails, refused
from configurations import MAMBA2_130M
from family_models import family_config
from transformers import Mamba2Config

from mamba_trace import MambaTrace
from mamba_trace.conversion import convert_config
from mamba_trace.conversion.checkpoints import find_checkpoint
from mamba_trace.errors import CheckpointError

ONLY = "; only Mamba-2 with RMSNorm, as Hugging Face's Mamba2ForCausalLM has it, is supported"


def ssm(**options: Any) -> dict[str, Any]:
    return {"ssm_cfg": {"layer": "Mamba2"} | options}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"attn_layer_idx": [9, 18]}, "attn_layer_idx is [9, 18]: some layers are attention" + ONLY),
        ({"d_intermediate": 1024}, "d_intermediate is 1024: the blocks have an MLP" + ONLY),
        ({"rms_norm": False}, "rms_norm is False: the norms are LayerNorm" + ONLY),
        (ssm(layer="Mamba3"), "ssm_cfg.layer is 'Mamba3', and the layers that can be loaded are 'Mamba1', 'Mamba2'"),
        (ssm(rmsnorm=False), "ssm_cfg.rmsnorm is False: the mixer has no norm of its own" + ONLY),
        (ssm(norm_before_gate=True), "ssm_cfg.norm_before_gate is True: the mixer's norm comes before the gate" + ONLY),
        (ssm(D_has_hdim=True), "ssm_cfg.D_has_hdim is True: D has a number for each channel"),
        (ssm(d_ssm=1024), "ssm_cfg.d_ssm is 1024, but expand * d_model is 1536: a part of the mixer is an MLP" + ONLY),
        (ssm(process_group=3), "ssm_cfg.process_group is 3: the weights are spread over several processes" + ONLY),
        (
            ssm(dt_rank=4),
            "Mamba-2 does not have: dt_rank. A Mamba-1 has them: ssm_cfg.layer, 'Mamba2' here and 'Mamba1'",
        ),
        (ssm(dt_rank=4, activation=1), "ssm_cfg has options that Mamba-2 does not have: activation, dt_rank" + ONLY),
        ({"norm_epsilon": 1e-6}, "norm_epsilon is 1e-06, and the mixer's own norm keeps an epsilon of 1e-05" + ONLY),
        (ssm(headdim=60), "ssm_cfg.headdim is 60, and a Mamba-2 of width 1536 (expand times d_model) has no whole"),
        (ssm(ngroups=5), "ssm_cfg.ngroups is 5, and the 24 heads cannot be divided into such groups"),
        (ssm(d_state=0), "ssm_cfg.d_state must be a whole number of at least 1, found 0"),
        (ssm(dt_limit=[0.1]), "ssm_cfg.dt_limit must be two numbers, the lower one first, found [0.1]"),
        (ssm(dt_limit=[0.2, 0.1]), "ssm_cfg.dt_limit must be two numbers, the lower one first, found [0.2, 0.1]"),
        (ssm(dt_limit=[0, "Infinity"]), "ssm_cfg.dt_limit must be two numbers"),
        (ssm(conv_init=-1), "ssm_cfg.conv_init must be a positive number, or null, found -1"),
        (ssm(A_init_range=[True, 2]), "ssm_cfg.A_init_range must be two numbers"),
    ],
)
def test_originals_that_are_no_mamba2_of_hugging_faces(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    config = MAMBA2_130M | change
    with pytest.raises(CheckpointError) as caught:
        convert_config(config, "huggingface")
    assert words in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in refused(tmp_path)
    assert f"cannot load {tmp_path}" in fails(lambda: find_checkpoint(tmp_path))


def test_originals_that_say_what_is_so_anyway() -> None:
    options = {"rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "d_ssm": 1536, "process_group": None}
    options |= {"use_mem_eff_path": False, "sequence_parallel": True, "layer_idx": None, "d_state": 128}
    plain, full = (convert_config(MAMBA2_130M | change, "huggingface").to_dict() for change in ({}, ssm(**options)))
    for found in (plain, full):
        del found["mamba_trace_source"]
    assert plain == full


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_groups": 4}, "n_groups is 4, and the 6 heads cannot be divided into such groups"),
        ({"time_step_limit": (0.5, 0.1)}, "time_step_limit must be two numbers, the lower one first"),
        ({"hidden_act": "zzz"}, "hidden_act 'zzz' is no activation"),
        ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon must not be negative"),
    ],
)
def test_huggingfaces_of_no_meaning(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        MambaTrace.from_config(family_config("mamba2", **changes))
    assert words in str(caught.value)


def test_heads_that_do_not_fill_the_model() -> None:
    config = family_config("mamba2")
    config.num_heads = 5
    with pytest.raises(CheckpointError, match=r"Mamba2Config rejects this configuration.*must equal num_heads"):
        MambaTrace.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "format", "words"),
    [
        ("mamba2", "mamba_lens", "Mamba-2 has no mamba_lens format: MambaLens has Mamba-1 only. It has 'original' and"),
        ("falcon_mamba", "mamba_lens", "Falcon-Mamba has no mamba_lens format: MambaLens has Mamba-1 only"),
        ("falcon_mamba", "original", "Falcon-Mamba has no original format: state-spaces' mamba_ssm has no such model"),
    ],
)
def test_formats_that_an_architecture_does_not_have(model_type: str, format: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        convert_config(family_config(model_type), format)
    assert words in str(caught.value)


def test_what_mamba_ssm_computes_otherwise_is_not_written() -> None:
    for changes, words in (
        ({"layer_norm_epsilon": 1e-6}, "the norms of mamba_ssm's Mamba-2 have an epsilon of 1e-05, found 1e-06"),
        ({"hidden_act": "gelu"}, "the original format has only silu, found hidden_act 'gelu'"),
    ):
        with pytest.raises(CheckpointError, match=words):
            convert_config(family_config("mamba2", **changes), "original")


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_mamba"])
def test_the_view_of_a_model_that_mamba_lens_does_not_have_is_no_configuration(model_type: str) -> None:
    """It would otherwise be taken for that of a Mamba-1."""
    model = MambaTrace.from_config(family_config(model_type))
    with pytest.raises(CheckpointError, match=r"MambaLens's format has Mamba-1 only.*model\.config"):
        MambaTrace.from_config(model.cfg.to_dict())


def test_a_fresh_mamba2_config_is_not_where_defaults_come_from() -> None:
    found, codestral = convert_config(MAMBA2_130M, "huggingface"), Mamba2Config()
    assert (found.n_groups, found.num_heads, found.hidden_size, found.vocab_size) == (1, 24, 768, 50288)
    assert (found.pad_token_id, found.bos_token_id, found.eos_token_id) == (0, 0, 0)
    assert (found.tie_word_embeddings, found.initializer_range) == (True, 0.02)
    assert (codestral.n_groups, codestral.pad_token_id, codestral.eos_token_id) == (8, 1, 2)
