"""What a layer does again without its code: the very numbers of its code, until anything about it is another."""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import make_hf, multiplied_in
from hybrid_models import PLAIN, make_hybrid
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mamba_trace import MambaTrace
from mamba_trace.modeling import repeated, unwatched
from mamba_trace.scan import cpu, elements
from mamba_trace.scan import linear as linears
from mamba_trace.scan.cpu import captured, team

PURE = ("mamba", "mamba2", "falcon_mamba")
KINDS = (*PURE, *PLAIN)
#: The layers of these multiply by weights in ways of their own.
RUN_EACH_TIME = ("zamba",)


@pytest.fixture(autouse=True)
def many_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the processor, as many vectors are multiplied by the compiled loop, and by BLAS, as on one of Intel."""
    monkeypatch.setattr(linears, "most_vectors", lambda: linears.FEW)
    monkeypatch.setattr(linears, "least_numbers", lambda: math.inf)
    for module in (repeated, unwatched):
        monkeypatch.setattr(module, "most_noted", lambda: linears.MOST)


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was done again, in order."""
    done: list[Any] = []
    run = repeated.Repeated.run

    def watched(self: Any, value: Tensor, past: Any) -> Tensor:
        done.append(self)
        return run(self, value, past)

    monkeypatch.setattr(repeated.Repeated, "run", watched)
    return done


def model_of(kind: str) -> Any:
    return MambaTrace(make_hf(model_type=kind) if kind in PURE else make_hybrid(kind))._module


def tokens_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 31, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def steps(module: Any, prompt: Tensor, count: int = 4, **options: Any) -> Iterator[Tensor]:
    """The logits of a prompt, and of each of some tokens after it."""
    out = module(prompt, use_cache=True, **options)
    yield out.logits
    name = "cache_params" if hasattr(out, "cache_params") else "past_key_values"
    cache, token = out[name], prompt[:, :1]
    for _ in range(count):
        yield module(token, use_cache=True, **{name: cache}).logits
        token = (token + 1) % 31


class as_written:
    """A block in which nothing is done again."""

    def __init__(self) -> None:
        self.patch = pytest.MonkeyPatch()

    def __enter__(self) -> None:
        self.patch.setattr(repeated, "how_called", lambda *_: None)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def same(module: Any, *prompts: Tensor) -> None:
    """Hold what a model computes to what its code computes."""
    for prompt in prompts:
        with as_written():
            expected = list(steps(module, prompt))
        for found, wanted in zip(steps(module, prompt), expected, strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_very_numbers_of_the_code(kind: str, rows: int, again: list[Any]) -> None:
    module = model_of(kind)
    for seed, length in enumerate((9, 9, 9, 4, 1, 1, 1, 9, 4, 4, 70, 70, 70)):
        same(module, tokens_of(rows, length, seed))
    assert bool(again) == (kind not in RUN_EACH_TIME)


@pytest.mark.parametrize("kind", PURE)
def test_linear_layers_are_multiplied_by_the_blas_of_pytorch(kind: str, again: list[Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(linears, "most_vectors", lambda: 1)
    module = model_of(kind)
    for seed, rows, length in ((0, 1, 9), (1, 1, 9), (2, 1, 9), (3, 3, 70), (4, 3, 70), (5, 3, 70)):
        same(module, tokens_of(rows, length, seed))
    kernels = {k for repeat in again for step in repeat.replay.steps for k, *_ in step.launches}
    assert cpu.kernels_in(".blas").forward in kernels
    counts = [len(again)]
    for precision in ("bf16", "ieee"):
        with multiplied_in(precision):
            same(module, tokens_of(1, 9, 6))
        counts.append(len(again))
    assert counts[0] == counts[1] < counts[2], "who lets PyTorch round has it multiply"


@pytest.mark.parametrize("rank", [1, 700])
def test_a_bias_is_added_when_pytorch_adds_it(rank: int, again: list[Any]) -> None:
    module = MambaTrace(make_hf(time_step_rank=rank))._module
    for seed in range(3):
        same(module, tokens_of(1, 200, seed))
    assert any(repeat.shape[1] == 200 for repeat in again)


@pytest.mark.parametrize("kind", ["falcon_h1", "zamba2"])
def test_operations_write_into_the_memory_that_all_share(kind: str, again: list[Any]) -> None:
    module = model_of(kind)
    for length in (5, 9):
        same(module, *(tokens_of(1, length, seed) for seed in range(3)))
    operations = [
        (repeat.replay, step)
        for repeat in again
        for step in repeat.replay.steps
        if isinstance(step, captured.Operation)
    ]
    assert operations
    for replay, (_, args, kwargs) in operations:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        assert all(captured.memory(tensor) == captured.memory(replay.scratch) for tensor in tensors)


def test_pairs_that_end_alike() -> None:
    one, other = torch.rand(2, 3, 4), torch.rand(3, 4)
    for pair in ((one, other), (one, other[None]), (one, one), (other, other[0]), (one, other[:1])):
        assert captured.ends_alike(*pair)
    for pair in ((other, one), (other[0], other[None, :1]), (one, other[:, :1]), (one, 2.0)):
        assert not captured.ends_alike(*pair)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("openmp", [True, False], ids=["openmp", "pool"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_any_threads_may_run_it(kind: str, openmp: bool, threads: int, again: list[Any], monkeypatch: Any) -> None:
    if not openmp:
        monkeypatch.setattr(team, "openmp", lambda: None)
    monkeypatch.setattr(team, "SMALL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    module = model_of(kind)
    for seed in range(4):
        same(module, tokens_of(1, 9, seed))
    assert again


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "jamba"])
def test_what_it_returned_is_not_overwritten(kind: str, again: list[Any]) -> None:
    module, kept = model_of(kind), []
    for seed in range(4):
        prompt = tokens_of(1, 9, seed)
        with torch.no_grad():
            out = module(prompt, output_hidden_states=True, use_cache=True)
        kept += [(tensor, tensor.clone()) for tensor in (out.logits, *out.hidden_states)]
    assert again
    assert all(torch.equal(tensor, before) for tensor, before in kept)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_caches_may_be_used_in_turn(kind: str, again: list[Any]) -> None:
    module, prompts = model_of(kind), [tokens_of(1, 9, seed) for seed in range(3)]
    with as_written():
        expected = [list(steps(module, prompt)) for prompt in prompts]
    for found in zip(*[steps(module, prompt) for prompt in prompts], strict=True):
        for logits, wanted in zip(found, expected, strict=True):
            assert torch.equal(logits, wanted.pop(0))
    assert again


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def replaced(block: Any) -> None:
    old = block.mixer.out_proj
    block.mixer.out_proj = Doubled(old.in_features, old.out_features, bias=old.bias is not None)


def hooked(inner: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda block: inner(block).register_forward_hook(lambda module, args, out: 2 * out)


def by_another_method(block: Any) -> None:
    divided = block.mixer.divided
    block.mixer.divided = lambda rows: divided(2 * rows)


def in_place_of_something(block: Any) -> None:
    block.mixer.something = 5
    del block.mixer.something
    by_another_method(block)


def of_another_class(block: Any) -> None:
    kind = type(block.mixer)
    block.mixer.__class__ = type("Own", (kind,), {"entered": lambda self, value: 2 * kind.entered(self, value)})


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda block: block.mixer.in_proj.weight.mul_(2),
    "by .data in place": lambda block: block.mixer.A_log.data.add_(1),
    "by other .data": lambda block: setattr(block.mixer.D, "data", block.mixer.D.data * 2),
    "another parameter": lambda block: setattr(block.mixer, "D", nn.Parameter(block.mixer.D * 2)),
    "a bias that it lacked": lambda block: setattr(block.mixer.in_proj, "bias", nn.Parameter(torch.ones(1))),
    "another dtype": lambda block: block.double(),
    "a weight that is transposed": lambda block: setattr(
        block.mixer.out_proj.weight, "data", block.mixer.out_proj.weight.data.t().contiguous().t()
    ),
    "another module": replaced,
    "a hook on the block": hooked(lambda block: block),
    "a hook on the mixer": hooked(lambda block: block.mixer),
    "a hook on the norm": hooked(lambda block: block.norm),
    "a hook on in_proj": hooked(lambda block: block.mixer.in_proj),
    "a hook on conv1d": hooked(lambda block: block.mixer.conv1d),
    "a hook on a site": hooked(lambda block: block.mixer.ssm_input),
    "another number": lambda block: setattr(block.norm, "variance_epsilon", 0.5),
    "another activation": lambda block: setattr(block.mixer, "act", nn.GELU()),
    "another method": by_another_method,
    "a method in place of something": in_place_of_something,
    "another class": of_another_class,
    "what hides a weight": lambda block: vars(block.mixer.in_proj).update(weight=2 * block.mixer.in_proj.weight),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@torch.no_grad()
def test_the_code_runs_again_once_anything_is_another(kind: str, change: str, again: list[Any]) -> None:
    module, prompt = model_of(kind), tokens_of(1, 9)
    for _ in range(3):
        before = list(steps(module, prompt))
    assert again
    block = module.backbone.layers[1]
    if change == "a bias that it lacked":
        block.mixer.in_proj.bias = nn.Parameter(torch.ones(len(block.mixer.in_proj.weight)))
    else:
        CHANGES[change](block)
    if change == "another dtype":
        block.float()
    for seed in range(4):
        same(module, tokens_of(1, 9, seed))
    unchanged = change in ("another dtype", "a weight that is transposed")
    assert torch.allclose(before[0], next(steps(module, prompt)), atol=1e-4) == unchanged


def test_limits_may_stand_in_a_list_as_in_a_loaded_configuration(again: list[Any]) -> None:
    module, prompt = model_of("mamba2"), tokens_of(1, 9)
    mixer = module.backbone.layers[1].mixer
    mixer.time_step_limit = [0.0, 0.5]
    for limits in ([0.0, 0.5], [0.1, 0.2], [0.3, 0.4]):
        mixer.time_step_limit[:] = limits
        for _ in range(3):
            same(module, prompt)
    assert again


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_a_convolution_may_have_no_bias(kind: str, again: list[Any]) -> None:
    module = MambaTrace(make_hf(model_type=kind, use_conv_bias=False))._module
    for seed in range(3):
        same(module, tokens_of(2, 9, seed))
    assert again


@torch.no_grad()
def repeating_block(again: list[Any]) -> tuple[Any, Tensor, Tensor]:
    """A block that does again what it did, its input, and what it returns."""
    block = model_of("mamba").backbone.layers[0]
    hidden = torch.randn(1, 9, 12, generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        expected = block(hidden)
    assert again
    return block, hidden, expected


def test_an_input_may_stand_for_its_negative(again: list[Any]) -> None:
    block, hidden, expected = repeating_block(again)
    with torch.no_grad():
        torch.testing.assert_close(block(torch._neg_view(-hidden)), expected)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "bamba", "jamba", "zamba2"])
def test_each_step_of_a_generation_is_counted(kind: str) -> None:
    model = MambaTrace(make_hf(model_type=kind) if kind in PURE else make_hybrid(kind))
    layer = model.layers[model.ssm_layers[0]]
    for step in (1, 3):
        kept = []
        with torch.no_grad(), model.generate(tokens_of(1, 5), max_new_tokens=5, do_sample=False) as tracer:
            for _ in tracer.iter[step : step + 1]:
                kept.append(layer.norm.output)
                kept.append(layer.ssm.in_proj.output)
                kept.append(layer.ssm.out_proj.output)
                kept.append(layer.ssm.output)
            kept.save()
        assert [value.shape[:2] for value in kept] == [(1, 1)] * 4


def test_hooks_may_come_and_go(again: list[Any]) -> None:
    module, prompt = model_of("mamba"), tokens_of(1, 9)
    for _ in range(3):
        same(module, prompt)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        count = len(again)
        same(module, prompt)
        assert len(again) == count
        handle.remove()
    same(module, prompt)
    assert len(again) > count


def test_a_trace_sees_what_it_would_see_of_the_code() -> None:
    model, prompt = MambaTrace(make_hf()), tokens_of(1, 9)

    @torch.no_grad()
    def traced() -> list[Tensor]:
        with model.trace(prompt):
            first = model.layers[0].output.save()
            state = model.layers[1].ssm.h[5].output.save()
            model.layers[1].ssm.y.output[:] *= 0.5
            last = model.layers[2].output.save()
            logits = model.lm_head.output.save()
        return [first, state, last, logits]

    with as_written():
        expected = traced()
    for _ in range(4):
        assert all(map(torch.equal, traced(), expected))
        same(model._module, prompt)


def test_what_ran_is_reported() -> None:
    model, prompt = MambaTrace(make_hf()), tokens_of(1, 9)
    reports = []
    for _ in range(4):
        list(steps(model._module, prompt))
        reports.append(repr(model.last_run))
    assert len(set(reports)) == 1


def test_modes_see_the_operations(again: list[Any]) -> None:
    module, prompt = model_of("mamba"), tokens_of(1, 9)
    for _ in range(3):
        same(module, prompt)
    count = len(again)
    with torch.no_grad(), FlopCounterMode(display=False) as operations:
        module(prompt)
    assert operations.get_total_flops() > 0
    assert len(again) == count


def test_gradients_are_those_of_the_code(again: list[Any]) -> None:
    module, prompt = model_of("mamba"), tokens_of(1, 9)
    for _ in range(3):
        same(module, prompt)
    count = len(again)
    module(prompt).logits.sum().backward()
    assert module.backbone.layers[0].mixer.A_log.grad is not None
    assert len(again) == count


def test_inference_mode_comes_and_goes(again: list[Any]) -> None:
    module, prompt = model_of("mamba2"), tokens_of(1, 9)
    for _ in range(3):
        with torch.inference_mode():
            same(module, prompt)
        same(module, prompt)
    assert again


def test_each_thread_has_notes_of_its_own(again: list[Any]) -> None:
    module, prompts = model_of("mamba"), [tokens_of(1, 9, seed) for seed in range(3)]
    with as_written():
        expected = [list(steps(module, prompt)) for prompt in prompts]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(6):
            found = list(steps(module, prompts[number]))
            wrong.extend([number] * (not all(map(torch.equal, found, expected[number]))))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_child_process_begins_anew() -> None:
    module, prompt = model_of("mamba"), tokens_of(1, 9)
    for _ in range(3):
        expected = list(steps(module, prompt))
    child = os.fork()
    if child == 0:
        found = [logits for _ in range(3) for logits in steps(module, prompt)]
        os._exit(not all(map(torch.equal, found, 3 * expected)))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deep", "pickled"])
def test_a_copy_has_no_notes(copied: Callable[[Any], Any], again: list[Any]) -> None:
    block, hidden, expected = repeating_block(again)
    with torch.no_grad():
        other, count = copied(block), len(again)
        assert torch.equal(other(hidden), expected)
        assert len(again) == count
        other.norm = copy.copy(block.norm)
        other.norm.variance_epsilon = 0.5
        for _ in range(3):
            assert not torch.allclose(other(hidden), expected)
        assert repeated.__name__.encode() not in pickle.dumps(block)


def test_notes_keep_no_model_and_no_old_weight() -> None:
    module = model_of("mamba")
    for _ in range(3):
        list(steps(module, tokens_of(1, 9)))
    mixer = module.backbone.layers[0].mixer
    old = weakref.ref(mixer.in_proj.weight)
    mixer.in_proj.weight = nn.Parameter(mixer.in_proj.weight.detach().clone())
    gc.collect()
    assert old() is None
    gone = weakref.ref(mixer)
    del module, mixer
    gc.collect()
    assert gone() is None


def test_a_module_that_is_another_each_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, prompt = model_of("mamba"), tokens_of(1, 9)
    noted: list[int] = []
    begin = captured.Capture.__enter__
    monkeypatch.setattr(captured.Capture, "__enter__", lambda self: noted.append(1) or begin(self))
    for _ in range(30):
        for block in module.backbone.layers:
            block.mixer.D = nn.Parameter(block.mixer.D.detach().clone())
        with torch.no_grad():
            module(prompt, use_cache=False)
    assert len(noted) <= 2 * (repeated.IN_VAIN + 1) * len(module.backbone.layers)


# -- notes themselves ----------------------------------------------------------------------------------------


def noted(run: Callable[[], Tensor]) -> tuple[captured.Capture, Tensor]:
    with torch.no_grad(), captured.Capture() as capture:
        out = run()
    return capture, out


def test_operations_are_done_again_between_kernels() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8, 8)

    def run(x: Tensor) -> Tensor:
        y = cpu.linear(3.0 * x, weight, None).clamp(-1, 1)
        return cpu.linear(y, weight, None).neg_()

    capture, out = noted(lambda: run(x))
    replay = captured.Replay(capture, (x, out), [weight])
    assert replay.refused == ""
    for _ in range(3):
        other, into = torch.randn(2, 3, 8), torch.empty(2, 3, 8)
        replay.run(other, into)
        assert torch.equal(into, run(other))


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (lambda x, w, there: cpu.linear(x, there, None), "weight was not there before"),
        (lambda x, w, there: cpu.linear(x, w, None) * torch.tensor(float(x.sum())), "_local_scalar_dense"),
        (lambda x, w, there: cpu.linear(x[:, :1].sigmoid(), w, None), "an operation on a tensor that was there"),
        (lambda x, w, there: cpu.linear(x.sort()[0], w, None), "aten.sort"),
        (lambda x, w, there: x, "tensors that share memory"),
    ],
    ids=["unknown", "number", "part", "several", "input"],
)
def test_what_cannot_be_done_again_is_refused(run: Callable[..., Tensor], why: str) -> None:
    x, weight, there = torch.randn(1, 3, 8), torch.randn(8, 8), torch.randn(8, 8)
    capture, out = noted(lambda: run(x, weight, there))
    assert why in captured.Replay(capture, (x, out), [weight]).refused


def test_sums_and_products_are_computed_as_by_pytorch() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2, 5, 24, generator=generator)
    ends = [one, torch.randn(24, generator=generator), torch.randn(1, 1, 24, generator=generator), one[0]]
    for first in (one, torch.cat((one, one), -1)[..., :24], one.transpose(0, 1)):
        for end in (*ends, one[:, :1], torch.tensor(2.0)):
            for function in (torch.add, torch.mul):
                try:
                    expected = function(first, end)
                except RuntimeError:
                    continue
                assert torch.equal(noted(lambda f=function, a=first, b=end: f(a, b))[1], expected)


@pytest.mark.parametrize("name", ["exponentials", "rates", "softplus"])
def test_functions_of_a_number_are_those_of_float64(name: str) -> None:
    function = getattr(elements, name)
    x = torch.linspace(-30, 30, 10_001)
    exact = function(x.double())
    assert float(((function(x) - exact) / exact).abs().max()) < 3e-7
    ends = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    torch.testing.assert_close(function(ends), function(ends.double()).float(), equal_nan=True)
    x = x[::100].clone().requires_grad_()
    assert torch.equal(function(x).detach(), function(x.detach()))
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    (wanted,) = torch.autograd.grad(function(x.double()).sum(), x)
    torch.testing.assert_close(grad, wanted)
