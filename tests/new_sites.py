"""Sites that the package does not have, each added by one row of the table and one `offer` in a forward.

`test_sites` runs this in a process of its own: the sources of the package are edited as they are imported.
Each site says the same as one that is there, so that one tells what must be seen at the other.
"""

from __future__ import annotations

import re
from importlib.machinery import SourceFileLoader
from types import CodeType

import torch

TABLE = "mamba_trace.sites.table"
OFFERS = "mamba_trace.modeling."
#: The row before the new one, the row, and the one line of a forward: where, what it was, what it is.
NEW = [
    (
        'Site("norm", "block"',
        'Site("u", "mixer", "BLD", "hook_u", "input of the mixer", alias=True)',
        ("mixer", 'offer.into("in_proj", self.entered(hidden_states))', 'offer("u", self.entered(hidden_states))'),
    ),
    (
        'Site("conv", "mixer"',
        'Site("conv_out", "mixer", "BLE", "hook_conv_out", "SiLU of conv", stage="conv")',
        (
            "mixer",
            "self.act(self.offered(offer, self.columns_out, conv))",
            'offer("conv_out", self.act(self.offered(offer, self.columns_out, conv)))',
        ),
    ),
    (
        'Site("h", "mixer"',
        'Site("h_kept", "mixer", "BLEN", "hook_h_kept", "the trajectory", stage="states", alias=True)',
        ("stretches", "self.offer(STATE, states)", 'self.offer("h_kept", self.offer(STATE, states))'),
    ),
    (
        'Site("h_read", "mixer"',
        'Site("raw_y", "mixer", "BLE", "hook_raw_y", "C h", stage="scan", alias=True)',
        (
            "mixer",
            'offer("y", self.by_channel(joined(pieces)))',
            'offer("y", offer("raw_y", self.by_channel(joined(pieces))))',
        ),
    ),
    (
        'Site("out_proj", "mixer"',
        'Site("branch", "block", "BLD", "hook_branch", "what the block adds", alias=True)',
        (
            "block",
            "resid + self.term(offer, normalized, cache, attention_mask, kwargs)",
            'resid + offer("branch", self.term(offer, normalized, cache, attention_mask, kwargs))',
        ),
    ),
]
#: New site -> the one whose edit by a factor means the same, and what the new one holds, by that of others.
SAME = {
    "u": ("norm", "norm", lambda value: value),
    "conv_out": ("ssm_input", "conv", torch.nn.functional.silu),
    "h_kept": ("h_read", "h", lambda value: value),
    "raw_y": ("y", "y", lambda value: value),
    "branch": ("out_proj", "out_proj", lambda value: value),
}
#: What reading a new site alone gives up, in the words of the report.
GIVEN_UP = {
    "u": [],
    "conv_out": ["conv or its SiLU is wanted or hooked"],
    "h_kept": ["h_kept is wanted"],
    "raw_y": ["raw_y is wanted"],
    "branch": [],
}


def edited(source: str, module: str) -> str:
    """The source of a module of the package with the new rows or lines in it."""
    for before, row, (where, old, new) in NEW:
        if module == TABLE:
            at = re.search(before.replace("(", r"\(\s*"), source)  # the arguments may begin on the next line
            assert at, before
            end = source.index("\n    Site(", at.end())
            source = f"{source[:end]}\n    {row},{source[end:]}"
        elif module == OFFERS + where:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
    return source


def install() -> None:
    """Edit the modules of the package as they are imported; their files stay as they are."""
    own = SourceFileLoader.get_code
    touched = {TABLE, *(OFFERS + where for _, _, (where, _, _) in NEW)}

    def get_code(self: SourceFileLoader, name: str) -> CodeType | None:
        if name not in touched:
            return own(self, name)
        return compile(edited(self.get_source(name) or "", name), self.path, "exec")

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def main() -> None:
    import nnsight
    from conftest import make_hf

    from mamba_trace import MambaTrace
    from mamba_trace.sites import BY_NAME, rows

    torch.set_num_threads(1)
    model = MambaTrace(make_hf())
    tokens = torch.randint(1, 31, (2, 6), generator=torch.Generator().manual_seed(0))
    for name, (twin, source, function) in SAME.items():
        place, same, origin = (model.hook(BY_NAME[one].path(1)) for one in (name, twin, source))
        hook = BY_NAME[name].hook_name(1)
        with torch.no_grad(), model.trace(tokens):
            expected = function(origin.output).save()
            logits = model.lm_head.output.save()
        with torch.no_grad(), model.trace(tokens):
            alone = place.output.save()
        close(alone, expected)
        assert model.last_run[1].reasons == GIVEN_UP[name], model.last_run[1].reasons
        assert model.last_run[0].reasons == []
        with torch.no_grad(), model.trace(tokens):
            same.output *= 0.5
            halved = model.lm_head.output.save()
        assert not torch.allclose(halved, logits, atol=1e-4), name
        with torch.no_grad(), model.trace(tokens):
            place.output = place.output * 0.5
            assigned = model.lm_head.output.save()
        with torch.no_grad(), model.trace(tokens):
            place.output[:] = place.output * 0.5
            in_place = model.lm_head.output.save()
        close(assigned, halved)
        close(in_place, halved)
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens)
            hooked = model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda value, hook: value * 0.5)])
        close(cache[hook], expected)
        close(hooked, halved)
        assert hook in model.hook_names(6)
        assert any(row.path.endswith(f".{name}") for row in rows())

        with model.generate(tokens, max_new_tokens=3) as tracer:
            generated = nnsight.save([])
            for _ in tracer.iter[:3]:
                generated.append(place.output)
        assert [value.shape[1] for value in generated] == [6, 1, 1], name
        with model.generate(tokens, max_new_tokens=3) as tracer:
            steps = nnsight.save([])
            for _ in tracer.iter[:3]:
                steps.append(function(origin.output))
        with model.generate(tokens, max_new_tokens=3) as tracer:
            late = nnsight.save([])
            for _ in tracer.iter[2]:
                late.append(place.output)
        for value, step in zip([*generated, *late], [*steps, steps[-1]], strict=True):
            close(value, step)
        print(name)


if __name__ == "__main__":
    install()
    main()
