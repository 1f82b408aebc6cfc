"""The table of the page on other packages, cell by cell: what it says, and the test or the recorded number behind it.

Evidence is ``"test_flow.py::test_name"`` or ``"forward.json: lengths / 128 / contenders / floor / ms"``, a path into
a file of `tests/benchmarks`. A cell may have ``{}`` where the recorded number stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
COLUMNS = ("mamba_trace", "MambaLens 0.0.4", "TransformerLens 4.3", "nnsight 0.8 on Hugging Face's model")
FORWARD = "forward.json: lengths / 128 / contenders / "
LENS4 = "transformer_lens.json: models / "
PATCHING = "patching.json: first difference / 0 / "


class Cell(NamedTuple):
    """What one cell says, and what holds it."""

    text: str
    evidence: tuple[str, ...] = ()

    def written(self) -> str:
        """The text with the recorded numbers in it."""
        numbers = [value(item) for item in self.evidence if ".json: " in item]
        return self.text.format(*(number for number in numbers if isinstance(number, int | float)))


def cell(text: str, *evidence: str) -> Cell:
    return Cell(text, evidence)


NOT_MEASURED = Cell("not measured")
ROWS: dict[str, tuple[Cell, Cell, Cell, Cell]] = {
    "architectures": (
        cell(
            "Mamba-1, Falcon-Mamba, Mamba-2 and seven hybrids",
            *("test_reference.py::test_every_value_in_float64", "test_hybrids.py::test_every_site_in_float64"),
        ),
        cell("Mamba-1", "test_mamba_lens.py::test_the_hooks_are_the_same"),
        cell(
            "Mamba, Mamba-2 and hybrids; logits as Hugging Face's in the three that were tried",
            *(LENS4 + f"{name} / logits" for name in ("mamba", "mamba2", "nemotron_h")),
        ),
        cell("any module; tried on Hugging Face's Mamba-1", "test_peers.py::test_nnsight_alone_reaches_no_state"),
    ),
    "the state after one token can be read": (
        cell("`ssm.h[p]`", "test_reference.py::test_every_value_in_float64"),
        cell("`hook_h.p`", "test_mamba_lens.py::test_every_value"),
        cell("`hook_ssm_state`, with `eager_scan`", LENS4 + "mamba / positions changed"),
        cell("no module has it", "test_peers.py::test_nnsight_alone_reaches_no_state"),
    ),
    "an edit of it is carried to later tokens": (
        cell("yes", "test_documentation.py::test_an_edit_is_carried_from_one_position_and_not_from_the_whole"),
        cell("yes", "test_mamba_lens.py::test_intervention"),
        cell(
            "no: the mixer's output changes at that token alone",
            LENS4 + "mamba / positions changed",
            LENS4 + "mamba2 / positions changed",
        ),
        cell("there is none to edit", "test_peers.py::test_nnsight_alone_reaches_no_state"),
    ),
    "the convolution and delta": (
        cell("`conv`, `delta_1`, `delta_2`, `delta`", "test_reference.py::test_every_value_in_float64"),
        cell("`hook_conv`, `hook_delta_1`, ...", "test_mamba_lens.py::test_every_value"),
        cell("their hooks never fire", LENS4 + "mamba / effective attention", LENS4 + "mamba / state"),
        cell("`conv1d` and `dt_proj` are never called", "test_peers.py::test_nnsight_alone_misses_two_modules"),
    ),
    "gradients of states": (
        cell("yes", "test_gradients.py::test_the_gradient_of_every_place"),
        cell("yes", "test_mamba_lens.py::test_gradients_through_autograd"),
        NOT_MEASURED,
        cell("there is none", "test_peers.py::test_nnsight_alone_reaches_no_state"),
    ),
    "hidden attention": (
        cell(
            "yes, for channels, heads and whole layers",
            "test_hidden_attention.py::test_every_pair_in_every_channel_is_the_product_of_the_matrices_between",
        ),
        NOT_MEASURED,
        cell(
            "raises a RuntimeError with transformers 5.24",
            *(LENS4 + f"{name} / effective attention" for name in ("mamba", "mamba2", "nemotron_h")),
        ),
        NOT_MEASURED,
    ),
    "`generate` with its defaults gives the greedy tokens": (
        cell("yes", "test_huggingface.py::test_greedy_generation", "test_hybrids.py::test_generate_is_greedy_decoding"),
        NOT_MEASURED,
        cell(
            "not in Mamba and Mamba-2, yes in Nemotron-H",
            *(LENS4 + f"{name} / generate" for name in ("mamba", "mamba2", "nemotron_h")),
        ),
        cell("yes: it is Hugging Face's", "test_huggingface.py::test_greedy_generation"),
    ),
    "a forward, beside its matmuls (L = 128)": (
        cell("{:.2f}", FORWARD + "untraced / ratio"),
        cell("{:.2f}", FORWARD + "mamba lens / ratio"),
        NOT_MEASURED,
        cell("{:.2f}", FORWARD + "hugging face / ratio"),
    ),
    "an edit of one state, beside its own forward": (
        cell("{:.2f}", FORWARD + "trace, edit h[5] / ratio"),
        cell("{:.2f}", FORWARD + "mamba lens, edit h[5] / ratio"),
        cell("not carried", LENS4 + "mamba / positions changed"),
        cell("there is none", "test_peers.py::test_nnsight_alone_reaches_no_state"),
    ),
    "an empty trace of a tiny model, beside nnsight's": (
        cell("{:.2f}", "forward.json: tiny / contenders / trace, empty / ratio"),
        NOT_MEASURED,
        NOT_MEASURED,
        cell("1", "forward.json: tiny / contenders / nnsight on hugging face, empty trace / ratio"),
    ),
    "the heatmap of the state, 24 layers x 17 positions": (
        cell("{:.0f} ms", PATCHING + "contenders / patch_grid / ms"),
        cell("{:.0f} ms", PATCHING + "mamba lens / ms"),
        cell("not possible: no edit is carried", LENS4 + "mamba / positions changed"),
        cell("not possible", "test_peers.py::test_nnsight_alone_reaches_no_state"),
    ),
}


def value(evidence: str) -> Any:
    """The recorded number that a path leads to."""
    file, _, path = evidence.partition(": ")
    found = json.loads((HERE / "benchmarks" / file).read_text(encoding="utf-8"))
    for key in path.split(" / "):
        found = found[key]
    return found


def cells() -> Iterator[tuple[str, str, Cell]]:
    """Every cell with its row and column."""
    for row, line in ROWS.items():
        for column, item in zip(COLUMNS, line, strict=True):
            yield row, column, item


def comparison_table() -> str:
    """The table in Markdown, with a number at each cell that leads to its evidence."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    known = evidence_numbers()
    for row, line in ROWS.items():
        texts = []
        for item in line:
            numbers = ", ".join(str(known[evidence]) for evidence in item.evidence)
            texts.append(item.written() + (f" <sup>{numbers}</sup>" if numbers else ""))
        lines.append(f"| {row} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def evidence_numbers() -> dict[str, int]:
    """Each piece of evidence and its number, in the order in which the table has them."""
    found: dict[str, int] = {}
    for _, _, item in cells():
        for evidence in item.evidence:
            found.setdefault(evidence, len(found) + 1)
    return found


def evidence_list() -> str:
    """What the numbers of the table stand for."""
    lines = []
    for evidence, number in evidence_numbers().items():
        where = f"`tests/benchmarks/{evidence}`" if ".json: " in evidence else f"`tests/{evidence}`"
        recorded = f" is `{json.dumps(value(evidence))}`" if ".json: " in evidence else ""
        lines.append(f"{number}. {where}{recorded}")
    return "\n".join(lines)
