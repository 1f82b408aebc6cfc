"""What a model says of itself to a server, and ``remote="local"``, which needs none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LENGTH, ModuleFactory, agree
from nnsight.intervention.interleaver import Interleaver
from nnsight.intervention.serialization import dumps, loads
from nnsight.modeling import huggingface
from nnsight.modeling.mixins.remotable import Remotable
from reference import Edit, editing, forward
from torch import Tensor

from mamba_trace import MambaTrace
from mamba_trace.errors import CheckpointError, VersionError
from mamba_trace.tracing.sandbox import heard_out
from mamba_trace.tracing.tree import is_current


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


# -- the key -----------------------------------------------------------------------------------------------


def test_the_key_of_a_folder_is_its_full_path_however_it_is_spelled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.warns(UserWarning, match="no tokenizer"):
        keys = {MambaTrace(name).to_model_key() for name in (str(folder), f"./{folder.name}", folder)}
    (key,) = keys
    name, data = key.split(":", 1)
    assert name == "mamba_trace.model.MambaTrace"
    expected = {"repo_id": str(folder), "revision": None, "task": "text-generation"}
    assert json.loads(data) == expected


def test_a_key_makes_the_same_tree_with_and_without_weights(
    tiny64: MambaTrace, tiny_hf: ModuleFactory, tokens: Tensor
) -> None:
    key = tiny64.to_model_key()
    with pytest.warns(UserWarning, match="no tokenizer"):
        meta = Remotable.from_model_key(key, trust_remote_code=False)
    with pytest.warns(UserWarning, match="no tokenizer"):
        loaded = Remotable.from_model_key(key, dispatch=True, dtype="float64", device="cpu", trust_remote_code=False)
    assert not meta.dispatched
    assert loaded.to_model_key() == key
    paths = [set(model._remoteable_persistent_objects()) for model in (tiny64, meta, loaded)]
    assert paths[0] == paths[1] == paths[2]
    assert {"Module:model.backbone.layers.2.mixer.h", "Interleaver"} <= paths[0]
    with torch.no_grad():
        agree(loaded._module(tokens).logits, tiny_hf(dtype=torch.float64)(tokens).logits)


def test_a_hub_id_is_spelled_as_the_hub_spells_it_and_as_given_where_there_is_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="no tokenizer"):
        model = MambaTrace(str(folder), revision="v1")
    model.repo_id = "State-Spaces/mamba-130m-hf"
    monkeypatch.setitem(huggingface._ID_CACHE, model.repo_id, "state-spaces/mamba-130m-hf")
    assert json.loads(model.to_model_key().split(":", 1)[1]) == {
        "repo_id": "state-spaces/mamba-130m-hf",
        "revision": "v1",
        "task": "text-generation",
    }
    known = model.to_model_key()
    model.repo_id = "state-spaces/mamba-130m-hf"
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    assert model.to_model_key() == known


def unreachable(*args: object, **kwargs: object) -> None:
    """A hub that cannot be reached."""
    raise ConnectionError("no hub")


def test_a_model_without_a_checkpoint_has_no_key_and_says_what_to_do(tiny: MambaTrace) -> None:
    tiny.repo_id = ""
    with pytest.raises(CheckpointError, match="save_pretrained"):
        tiny.trace(torch.ones(1, 3, dtype=torch.long), remote="http://127.0.0.1:1")


def test_another_task_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"text-generation.*fill-mask"):
        MambaTrace(str(folder), task="fill-mask")


def test_the_environment_says_the_release_and_a_server_of_another_refuses_it(demo: MambaTrace) -> None:
    env = demo._remoteable_get_env()
    demo._remoteable_set_env(env)  # as a server of this release does
    demo._remoteable_set_env({})
    with pytest.raises(VersionError, match=r"written with mamba_trace 7\.0.*pip install mamba_trace=="):
        demo._remoteable_set_env({**env, "mamba_trace": "7.0"})


# -- remote="local" ----------------------------------------------------------------------------------------


def test_local_simulation_serves_every_position_and_leaves_the_process_as_it_was(
    tiny64: MambaTrace, tiny_hf: ModuleFactory, tokens: Tensor
) -> None:
    before, modules = list(sys.path), {name for name in sys.modules if name.startswith("mamba_trace")}
    kept = {name: sys.modules[name] for name in modules}
    plain = tiny_hf(dtype=torch.float64)
    local = MambaTrace(plain)
    with local.trace(tokens, remote="local"):
        states = [local.layers[2].ssm.h[p].output for p in range(LENGTH)].save()
        local.layers[2].ssm.y.output[:] = 0
        logits = local.norm_f.output.save()
    expected: dict[str, Tensor] = {}
    edit = editing([Edit("blocks.2.hook_y", "zero")])
    forward(plain.state_dict(), plain.config, tokens, lambda n, v: expected.setdefault(n, edit(n, v)))
    for p, state in enumerate(states):
        agree(state.detach(), expected[f"blocks.2.hook_h.{p}"], 1e-12)
    agree(logits.detach(), expected["hook_norm"], 1e-12)
    assert sys.path == before
    assert all(sys.modules[name] is module for name, module in kept.items())


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from mamba_trace import MambaTrace
from mamba_trace.tracing import remote
assert remote.__file__.startswith(sys.argv[1]), remote.__file__
model, found = MambaTrace.demo(), []
for where in ("local", False):
    with model.trace("Emma gave an apple to", remote=where):
        model.layers[1].ssm.h[2].output[:] = 0
        state = model.layers[2].ssm.h[-1].output.save()
    found.append(state)
assert found[0].equal(found[1]) and found[0].abs().max() > 0
print("the same")
"""


def test_local_simulation_runs_from_a_wheel(tmp_path: Path) -> None:
    root, site_packages = Path(__file__).parents[1], tmp_path / "lib" / "site-packages"
    source = tmp_path / "source"  # pip builds where the source is
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "mamba_trace", source / "mamba_trace", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    subprocess.run([*pip, "--target", str(site_packages), str(source)], check=True, timeout=120)
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-I", str(tmp_path / "script.py"), str(site_packages)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "the same", run.stderr


# -- NDIF's sandbox ----------------------------------------------------------------------------------------


class Line:
    """A connection of the sandbox: what was sent, and what is still to be read."""

    def __init__(self, *messages: tuple[str, ...]) -> None:
        self.sent: list[str] = []
        self.messages = list(messages)

    def send(self, event: str, *values: object, **named: object) -> None:
        self.sent.append(event)

    def recv(self) -> tuple[str, ...]:
        return self.messages.pop(0)


@pytest.mark.parametrize("unread", [[], [("THROW",), ("DONE",)]])
def test_the_last_word_on_a_run_is_read_before_the_next(unread: list[tuple[str, ...]]) -> None:
    line = Line(("RESUME",) if unread else ("DONE",), *unread)
    with heard_out(SimpleNamespace(connection=line)):
        line.send("INTERLEAVE")
        line.recv()
    assert not line.messages


def test_a_run_whose_block_failed_is_stopped() -> None:
    line = Line(("RESUME",), ("DONE",))
    failed = pytest.raises(ValueError, match="mine")
    with failed, heard_out(SimpleNamespace(connection=line)):
        line.send("INTERLEAVE")
        line.recv()
        raise ValueError("mine")
    assert line.sent == ["INTERLEAVE", "STOP"]
    assert not line.messages


def test_a_tree_works_with_an_interleaver_of_another_class(demo: MambaTrace) -> None:
    objects = {**demo._remoteable_persistent_objects(), "Interleaver": Interleaver()}
    assert is_current(loads(dumps(demo), objects))
