"""The real NDIF server, on this machine, gives the numbers of a local run: trusted and sandboxed.

Run by hand, in an environment that has NDIF: ``tests/ndif/serve.py`` says what that is. Where it is missing
these tests are skipped, with what is missing as the reason. ``pytest -m ndif`` starts the server itself, or
takes the one whose address is in NDIF_ADDRESS, which must host the demo model.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.schema.config import CONFIG
from nnsight.schema.request import RequestModel

from mamba_trace import MambaTrace
from mamba_trace.patching import attribution_grid, logit_diff, patch_grid
from mamba_trace.tracing import remote

sys.path.append(str(Path(__file__).with_name("ndif")))
import serve

sys.path.pop()

from conftest import agree

MISSING = serve.missing()
pytestmark = [
    pytest.mark.ndif,
    pytest.mark.skipif(bool(MISSING), reason=f"needs an NDIF server's parts: {MISSING}"),
]
PROMPT = "Lately, Emma and Shelby had fun at school. Shelby gave an apple to"
OTHER = "Lately, Emma and Shelby had fun at school. Emma gave an apple to"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if running := os.environ.get("NDIF_ADDRESS"):
        yield running
        return
    with serve.serving() as address:
        yield address


@pytest.fixture(params=[False, True], ids=["trusted", "sandboxed"])
def sandboxed(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def host(sandboxed: bool, address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, with requests that ask to be trusted or not."""
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    metadata = RequestModel.metadata
    monkeypatch.setattr(
        RequestModel,
        "metadata",
        lambda self: json.dumps({**json.loads(metadata(self)), "trusted": not sandboxed}),
    )
    return address


@pytest.fixture(scope="module")
def demo() -> MambaTrace:
    return MambaTrace.demo()


def test_every_site_is_read(host: str, demo: MambaTrace) -> None:
    names = demo.hook_names(4)
    prompt = demo.to_tokens(PROMPT)[:, :4]
    found = []
    for where in (host, False):
        with demo.trace(prompt, remote=where):
            values = {name: demo.hook(name).output for name in names}.save()
        found.append(values)
    assert list(found[0]) == names
    for name in names:
        agree(found[0][name], found[1][name].detach())


@pytest.mark.parametrize("place", ["layers[1].ssm.h[5]", "layers[1].ssm.A_bar", "layers[1].ssm.h", "norm_f"])
def test_an_edit_is_made_in_place_and_by_assignment(place: str, host: str, demo: MambaTrace) -> None:
    for in_place in (True, False):
        found = []
        for where in (host, False):
            with demo.trace(PROMPT, remote=where):
                before = demo.hook(place).output.save()
                if in_place:
                    demo.hook(place).output[:] *= 0.5
                else:
                    demo.hook(place).output = before * 0.5
                logits = demo.lm_head.output.save()
            found.append((before.detach(), logits.detach()))
        agree(found[0][0], found[1][0])
        agree(found[0][1], found[1][1])


def test_invokes_of_different_lengths_are_batched(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.trace(remote=where) as tracer:
            with tracer.invoke(PROMPT):
                state = demo.layers[1].ssm.h[-1].output.save()
            with tracer.invoke(f"{PROMPT} the"):
                demo.layers[1].ssm.h[-3].output[:] = 0
                logits = demo.lm_head.output[0, -1].save()
        found.append((state.detach(), logits.detach()))
    agree(found[0][0], found[1][0])
    agree(found[0][1], found[1][1])


def test_a_padded_position_is_warned_of_and_served(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.trace(remote=where) as tracer:
            with tracer.invoke(PROMPT):
                state = demo.layers[1].ssm.h[3].output.save()
            with tracer.invoke(f"{PROMPT} the"):
                demo.layers[1].ssm.h[-3].output[:] = 0
        found.append(state.detach())
    agree(*found)


def test_every_step_of_a_generation_is_read_and_edited(host: str, demo: MambaTrace) -> None:
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


def test_a_session_carries_a_state_from_one_trace_to_the_next(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.session(remote=where):
            with demo.trace(OTHER):
                state = demo.layers[1].ssm.h[10].output
            with demo.trace(PROMPT):
                demo.layers[1].ssm.h[10].output = state
                logits = demo.lm_head.output[0, -1].save()
        found.append(logits.detach())
    agree(*found)


@pytest.mark.parametrize(
    ("site", "options"), [("h", {}), ("h", {"memory": 1}), ("conv", {"window": 2}), ("embeddings", {}), ("lm_head", {})]
)
def test_a_grid_is_one_request(site: str, options: dict[str, int], host: str, demo: MambaTrace) -> None:
    metric = logit_diff(demo, " Emma", " Shelby")
    there = patch_grid(demo, PROMPT, OTHER, site, metric, remote=host, **options)
    here = patch_grid(demo, PROMPT, OTHER, site, metric, progress=False, **options)
    torch.testing.assert_close(there.values, here.values, rtol=1e-5, atol=1e-4)
    assert there.plan == here.plan


def test_a_session_goes_on_after_a_stopped_trace_and_after_an_error(host: str, demo: MambaTrace) -> None:
    with demo.session(remote=host):
        with demo.trace(PROMPT) as tracer:
            demo.layers[1].ssm.y.output.mean()
            tracer.stop()
        try:
            with demo.trace(PROMPT):
                demo.layers[1].ssm.y.output.mean()
                raise ValueError("of the caller's")
        except ValueError:
            pass
        with demo.trace(PROMPT):
            logits = demo.lm_head.output.save()
    with demo.trace(PROMPT):
        expected = demo.lm_head.output.save()
    agree(logits, expected.detach())


def test_a_module_is_called_on_what_was_saved(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.trace(PROMPT, remote=where):
            stream = demo.layers[1].resid_post.output.save()
            logits = demo.lm_head(demo.norm_f(stream)).save()
        found.append(logits.detach())
    agree(*found)


def test_a_cache_is_filled(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.trace(PROMPT, remote=where) as tracer:
            cache = tracer.cache(modules=["blocks.1.hook_h.5", "layers[1].resid_post"]).save()
        found.append([cache[path].output.detach() for path in cache.keys()])  # noqa: SIM118
    for there, here in zip(*found, strict=True):
        agree(there, here)


def test_what_comes_back_is_the_size_of_what_was_saved(
    host: str, demo: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    finalize = RemoteBackend.finalize
    monkeypatch.setattr(RemoteBackend, "finalize", lambda self, data: sizes.append(len(data)) or finalize(self, data))
    monkeypatch.setattr(CONFIG.API, "COMPRESS", False)
    with demo.trace(demo.to_tokens(PROMPT).repeat(1, 20), remote=host):
        last = demo.lm_head.output[:, -1].save()
    assert sizes[0] < 4 * last.numel() + 3000


def test_a_request_of_another_release_is_refused_with_both_names(
    host: str, demo: MambaTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "__version__", "0.0.9")
    refused = pytest.raises(RemoteError, match=r"written with mamba_trace 0\.0\.9, and the server has")
    with refused, demo.trace(PROMPT, remote=host):
        demo.lm_head.output.save()


@pytest.mark.parametrize(("names", "expected"), [(("y", "delta"), "delta"), (("h.99",), "h[99]")])
def test_an_error_names_the_site(names: tuple[str, ...], expected: str, host: str, demo: MambaTrace) -> None:
    hooks = [f"blocks.1.hook_{name}" for name in names]
    with pytest.raises(RemoteError) as raised, demo.trace(PROMPT, remote=host):
        [demo.hook(hook).output for hook in hooks].save()
    assert f"Error: layers[1].ssm.{expected}" in str(raised.value)


@pytest.mark.parametrize("sandboxed", [False], indirect=True, ids=["trusted"])
def test_a_gradient_is_taken_by_a_trusted_request(host: str, demo: MambaTrace) -> None:
    found = []
    for where in (host, False):
        with demo.trace(PROMPT, remote=where):
            state = demo.layers[1].ssm.h[5].output
            state.requires_grad_()
            with demo.lm_head.output[0, -1].max().backward():
                grad = state.grad.save()
        found.append(grad)
    agree(*found)


@pytest.mark.parametrize("sandboxed", [True], indirect=True, ids=["sandboxed"])
def test_a_gradient_is_refused_in_the_sandbox(host: str, demo: MambaTrace) -> None:
    metric = logit_diff(demo, " Emma", " Shelby")
    with pytest.raises(RemoteError, match="attribution_grid takes gradients, and this server runs the request in a"):
        attribution_grid(demo, PROMPT, OTHER, "h", metric, remote=host)
    refused = pytest.raises(RemoteError, match="a gradient was asked for, and this server")
    with refused, demo.trace(PROMPT, remote=host):
        state = demo.layers[1].ssm.h[5].output
        state.requires_grad_()
        with demo.lm_head.output[0, -1].max().backward():
            state.grad.save()
