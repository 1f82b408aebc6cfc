"""A request to a server gives the numbers of a local run, and says itself what is wrong with it.

The server is a subprocess (`remote_server.py`) that builds the model from its key and has none of this
folder's files. What needs none is in `test_remote_local.py`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cloudpickle.cloudpickle import _PICKLE_BY_VALUE_MODULES
from conftest import LENGTH, ModuleFactory, agree
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.config import CONFIG
from reference import Edit, editing, forward
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.cli import PROMPT, SOURCE
from mamba_trace.errors import FileError
from mamba_trace.model import DEMO
from mamba_trace.patching import attribution_grid, logit_diff, patch_grid
from mamba_trace.tracing import remote

EDITED = ("layer_input", "skip", "conv", "delta", "A", "A_bar", "B_bar", "h.3", "h", "y", "resid_post")


def halve(value: Tensor) -> Tensor:
    """A function in a file that the server does not have."""
    return value / 2


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Iterator[None]:
    before, CONFIG.APP.REMOTE_LOGGING = CONFIG.APP.REMOTE_LOGGING, False
    yield
    CONFIG.APP.REMOTE_LOGGING = before


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server in a process of its own, which runs in a folder of its own."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("remote_server.py"))]
    server = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("server"), stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().strip()
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_hf: ModuleFactory) -> Path:
    """A checkpoint of the tiny model, in float64."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_hf(dtype=torch.float64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny64(folder: Path) -> MambaTrace:
    with pytest.warns(UserWarning, match="no tokenizer"):
        return MambaTrace(str(folder))


def test_every_site_is_read_on_the_server(
    host: str, tiny64: MambaTrace, tiny_hf: ModuleFactory, tokens: Tensor
) -> None:
    names = tiny64.hook_names(LENGTH)
    with tiny64.trace(tokens, remote=host):
        values = {name: tiny64.hook(name).output for name in names}.save()
    expected: dict[str, Tensor] = {}
    plain = tiny_hf(dtype=torch.float64)
    forward(plain.state_dict(), plain.config, tokens, lambda name, value: expected.setdefault(name, value))
    assert list(values) == names
    for name in names:
        agree(values[name].double(), expected[name], 1e-12 if name != "hook_logits" else 1e-6)
    assert not tiny64.dispatched  # the caller has loaded no weights


def test_the_sites_that_have_no_name_in_mamba_lens_are_read_on_the_server(
    host: str, tiny64: MambaTrace, tiny_hf: ModuleFactory, tokens: Tensor
) -> None:
    mixer = tiny64.layers[1].ssm
    with tiny64.trace(tokens, remote=host):
        found = [mixer.write.output, mixer.h.output, mixer.h_read.output].save()
    expected: dict[str, Tensor] = {}
    plain = tiny_hf(dtype=torch.float64)
    forward(plain.state_dict(), plain.config, tokens, lambda name, value: expected.setdefault(name, value))
    for value, hook in zip(found, ("mixer.hook_ssm_write", "hook_h", "mixer.hook_ssm_state"), strict=True):
        agree(value, expected[f"blocks.1.{hook}"], 1e-12)


@pytest.mark.parametrize("site", EDITED)
def test_an_edit_is_made_on_the_server(
    site: str, host: str, tiny64: MambaTrace, tiny_hf: ModuleFactory, tokens: Tensor
) -> None:
    name = f"blocks.1.hook_{site}"
    with tiny64.trace(tokens, remote=host):
        place = tiny64.hook(name) if site != "h" else tiny64.layers[1].ssm.h
        place.output[:] *= 0.5
        logits = tiny64.norm_f.output.save()
    plain, expected = tiny_hf(dtype=torch.float64), {}
    edit = editing([Edit(name, "scale", 0.5)])
    forward(plain.state_dict(), plain.config, tokens, lambda n, v: expected.setdefault(n, edit(n, v)))
    agree(logits, expected["hook_norm"], 1e-12)


@pytest.mark.parametrize("name", ["mamba2", "hybrid"])
def test_every_site_of_another_architecture_is_read_on_the_server_and_an_edit_is_made(host: str, name: str) -> None:
    model = MambaTrace.demo(name)
    hooks = [hook for hook in model.hook_names(2) if not hook.endswith("hook_h.0")]
    edited, found = f"layers[{model.ssm_layers[1]}].ssm.h[1]", []
    for where in (host, False):
        with torch.no_grad(), model.trace(PROMPT, remote=where):
            values = {}.save()
            for hook in hooks:
                values[hook] = model.hook(hook).output.detach()
                if model._place(hook).path == edited:
                    model.hook(edited).output[:] = 0
        found.append(values)
    assert found[0].keys() == found[1].keys() == set(hooks)
    assert "layers[2].attn.pattern" in {model._place(hook).path for hook in hooks} or name == "mamba2"
    for hook in hooks:
        agree(found[0][hook], found[1][hook])


def test_an_edit_with_a_function_of_the_callers_file_is_made_on_the_server(host: str, demo: MambaTrace) -> None:
    with demo.trace(PROMPT):
        demo.layers[1].ssm.h[5].output = demo.layers[1].ssm.h[5].output / 2
        expected = demo.lm_head.output.save()
    with demo.trace(PROMPT, remote=host):
        demo.layers[1].ssm.h[5].output = halve(demo.layers[1].ssm.h[5].output)
        logits = demo.lm_head.output.save()
    agree(logits, expected.detach())


def test_an_edit_that_a_model_keeps_goes_with_its_requests(host: str, demo: MambaTrace) -> None:
    with demo.edit() as (_, edited):
        edited.layers[1].ssm.h[5].output[:] = 0
    found = []
    for model, where in ((edited, host), (edited, False), (demo, host)):
        with model.trace(PROMPT, remote=where):
            logits = model.lm_head.output.save()
        found.append(logits.detach())
    agree(found[0], found[1])
    assert not torch.allclose(found[0], found[2])


def test_invokes_of_different_lengths_are_batched_on_the_server(host: str, demo: MambaTrace) -> None:
    longer = f"{PROMPT} the"
    with demo.trace(longer):
        demo.layers[1].ssm.h[-3].output[:] = 0
        expected = demo.lm_head.output[0, -1].save()
    with demo.trace(remote=host) as tracer:
        with tracer.invoke(PROMPT):
            state = demo.layers[1].ssm.h[-1].output.save()
        with tracer.invoke(longer):
            demo.layers[1].ssm.h[-3].output[:] = 0
            logits = demo.lm_head.output[0, -1].save()
    with demo.trace(PROMPT):
        alone = demo.layers[1].ssm.h[-1].output.save()
    agree(logits, expected.detach())
    agree(state, alone.detach())


def test_every_step_of_a_generation_is_read_and_edited_on_the_server(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.generate(max_new_tokens=3, do_sample=False, remote=where) as tracer:
            with tracer.invoke(PROMPT):
                states = [].save()
                for step in tracer.iter[:3]:
                    if step == 1:
                        demo.layers[1].ssm.h[-1].output[:] = 0
                    states.append(demo.layers[1].ssm.h[-1].output)
            with tracer.invoke():
                result = tracer.result.save()
        found.append((torch.stack(states).detach(), result))
    agree(found[0][0], found[1][0])
    assert found[0][1].equal(found[1][1])


def test_a_session_is_one_request_and_carries_values_between_its_traces(
    host: str, demo: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    send = RemoteBackend.send
    monkeypatch.setattr(RemoteBackend, "send", lambda self, *args: sent.append(args) or send(self, *args))
    found = []
    for where in (host, False):
        with demo.session(remote=where):
            with demo.trace(PROMPT.replace("Shelby gave", "Emma gave")):
                state = demo.layers[1].ssm.h[10].output
            with demo.trace(PROMPT):
                demo.layers[1].ssm.h[10].output = state
                logits = demo.lm_head.output[0, -1].save()
        found.append(logits.detach())
    agree(*found)
    assert len(sent) == 1


def test_a_gradient_is_taken_on_the_server(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.trace(PROMPT, remote=where):
            state = demo.layers[1].ssm.h[5].output
            state.requires_grad_()
            with demo.lm_head.output[0, -1].max().backward():
                grad = state.grad.save()
        found.append(grad)
    agree(*found)


def test_a_cache_is_filled_on_the_server(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.trace(PROMPT, remote=where) as tracer:
            cache = tracer.cache(modules=["blocks.1.hook_h.5", "layers[1].resid_post"]).save()
        assert cache.keys() == ["model.backbone.layers.1.mixer.h.5", "model.backbone.layers.1.resid_post"]
        found.append([cache[cache.keys()[0]].output, cache.model.layers[1].resid_post.output])
    for there, here in zip(*found, strict=True):
        agree(there, here.detach())


def test_what_comes_back_is_the_size_of_what_was_saved(
    host: str, demo: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    finalize = RemoteBackend.finalize
    monkeypatch.setattr(RemoteBackend, "finalize", lambda self, data: sizes.append(len(data)) or finalize(self, data))
    monkeypatch.setattr(CONFIG.API, "COMPRESS", False)
    prompt = demo.to_tokens(PROMPT).repeat(1, 20)
    with demo.trace(prompt, remote=host):
        _ = demo.layers[0].ssm.h.output  # the run has it, nobody saves it
        row = [demo.layers[1].ssm.y.output[:, -1]].save()
        last = demo.lm_head.output[:, -1].save()
    with demo.session(remote=host):
        with demo.trace(prompt):
            logits = demo.lm_head.output
        of_session = {"last": (logits[:, -1],)}.save()
    values = last.numel() + row[0].numel()
    assert sizes[0] < 4 * values + 3000
    assert sizes[1] < 4 * of_session["last"][0].numel() + 3000
    agree(of_session["last"][0], last)


def test_a_request_written_with_another_release_is_refused_with_both_names(
    host: str, demo: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "__version__", "0.0.9")
    refused = pytest.raises(RemoteError, match=r"written with mamba_trace 0\.0\.9, and the server has mamba_trace \d")
    with refused, demo.trace(PROMPT, remote=host):
        demo.lm_head.output.save()


def test_an_error_on_the_server_names_the_site_and_shows_the_callers_line(host: str, demo: MambaTrace) -> None:
    with pytest.raises(RemoteError) as raised, demo.trace(PROMPT, remote=host):
        [demo.layers[1].ssm.y.output, demo.layers[1].ssm.delta.output].save()
    text = str(raised.value)
    assert "SiteOrderError: layers[1].ssm.delta was already computed" in text
    assert Path(__file__).name in text
    assert "[demo.layers[1].ssm.y.output, demo.layers[1].ssm.delta.output].save()" in text


def test_a_position_that_the_prompt_does_not_have_is_refused_on_the_server(host: str, demo: MambaTrace) -> None:
    refused = pytest.raises(RemoteError, match=r"PositionError: layers\[1\]\.ssm\.h\[99\]")
    with refused, demo.trace(PROMPT, remote=host):
        demo.layers[1].ssm.h[99].output.save()


def test_the_server_has_none_of_the_callers_files(host: str, demo: MambaTrace) -> None:
    with pytest.raises(RemoteError, match="No module named 'conftest'"), demo.trace(PROMPT, remote=host):
        __import__("conftest")


def test_the_kernels_asked_for_are_those_of_the_request_alone(host: str) -> None:
    forced = MambaTrace.demo(dispatch=False, kernels="reference")
    auto = MambaTrace.demo(dispatch=False)
    found = []
    for model in (forced, auto):
        with model.trace(PROMPT, remote=host):
            ran = str(model.layers[0].ssm._module.kernels)
            nothing = model.lm_head.output[0, -1].max()
            kernels = [ran, nothing].save()
        found.append(kernels[0])
    assert found == ["reference", "auto"]


def test_this_package_is_never_sent_along_where_it_runs_from_a_checkout(
    host: str, demo: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    post = RemoteBackend._post
    monkeypatch.setattr(
        RemoteBackend,
        "_post",
        lambda self, request, blob: sizes.append(len(blob)) or post(self, request, blob),
    )
    states: list[Tensor] = []
    for where in ("local", host):
        _PICKLE_BY_VALUE_MODULES.add("mamba_trace")  # what nnsight does where it finds no distribution
        with demo.trace(PROMPT, remote=where):
            states.append(demo.layers[1].ssm.h[3].output)
            states.save()
        assert "mamba_trace" not in _PICKLE_BY_VALUE_MODULES
    agree(states[1], states[0].detach())
    assert sizes[0] < 20_000


def test_a_grid_is_one_request(host: str, demo: MambaTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics of the caller's own travel with it, and a model without weights is enough to ask."""
    sent = []
    request = RemoteBackend.request
    monkeypatch.setattr(RemoteBackend, "request", lambda self, *args: sent.append(1) or request(self, *args))
    asking = MambaTrace(str(DEMO))

    def margin(logits: Tensor) -> Tensor:
        return logits[:, 5] - logits[:, 6:].amax(-1)

    metrics = {"margin": margin, "difference": logit_diff(demo, " Emma", " Shelby")}
    there = patch_grid(asking, PROMPT, SOURCE, "h", metrics, remote=host)
    here = patch_grid(demo, PROMPT, SOURCE, "h", metrics, progress=False)
    for name in metrics:
        torch.testing.assert_close(there[name].values, here[name].values, rtol=1e-5, atol=1e-4)
    assert len(sent) == 1
    assert asking.layers[0].ssm._module.A_log.is_meta
    estimate = attribution_grid(asking, PROMPT, SOURCE, "h", metrics["difference"], remote=host)
    assert estimate.correlation(here["difference"]) > 0.99
    with pytest.raises(FileError, match="the cells are on the server"):
        patch_grid(asking, PROMPT, SOURCE, "h", metrics, remote=host, keep="folder")
