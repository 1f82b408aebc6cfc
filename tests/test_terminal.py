"""The terminal's table can be read without colours, at any width."""

from __future__ import annotations

import io
from typing import Any

import pytest
from pictures import NAN, picture
from rich.cells import cell_len
from rich.console import Console

from mamba_trace.results.heatmap import Heatmap
from mamba_trace.results.terminal import terminal_table


def table(values: list[list[float]], **changes: Any) -> Heatmap:
    tokens = [" tok", " longer_than_a_cell", "\n", " ", " 日本語", ","][: len(values[0])]
    tokens += [f" t{i}" for i in range(len(tokens), len(values[0]))]
    runs = {"prompt_tokens": tokens, "source_tokens": [" other", *tokens[1:]]}
    return picture(values, **({**runs, "resolution": 0.005} | changes))


def printed(heatmap: Heatmap, width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(terminal_table(heatmap, width), soft_wrap=True)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_reads_without_colours() -> None:
    text = printed(table([[0.0, 1.0, -1.0, 0.5, 12.34, NAN]]), 100)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["0", "1", "2", "3", "4", "5"]
    assert lines[1][:2] == ["prompt", "tok"]
    assert lines[1][3:] == ["\\n", "'", "'", "日本語", ","]
    assert lines[2] == ["source", "other"]
    assert lines[3] == ["layer", "0", "·", "+1.00", "-1.00", "+0.50", "+12.3", "?"]


def test_the_table_has_no_line_for_a_source_that_is_the_prompt() -> None:
    same = table([[1.0]], source_tokens=[" tok"])
    assert [line.split()[0] for line in printed(same, 80).splitlines()] == ["0", "prompt", "layer"]


def test_a_table_without_tokens_has_the_labels_of_its_columns() -> None:
    lines = printed(picture([[1.0, 2.0]], column_title="Source"), 80).splitlines()
    assert lines[1].split() == ["source", "Lately_0", ",_1"]
    numbered = printed(picture([[1.0, 2.0]], column_labels=["0", "1"]), 80).splitlines()
    assert [line.split() for line in numbered] == [["0", "1"], ["layer", "0", "+1.00", "+2.00"]]


def test_a_table_of_texts_shows_them_in_the_colours_of_the_values() -> None:
    words = picture([[1.0, 0.0]], texts=[[" Emma", "\n"]])
    assert printed(words, 80).splitlines()[-1].split() == ["layer", "0", "Emma", "\\n"]
    assert "48;2;33;102;172m" in printed(words, 80, force_terminal=True, color_system="truecolor")


def test_small_numbers_are_printed_in_a_unit_that_the_corner_names() -> None:
    lines = printed(picture([[0.0012, -0.0006, 0.0]]), 80).splitlines()
    assert lines[0].split() == ["x", "1e-03", "0", "1", "2"]
    assert lines[-1].split() == ["layer", "0", "+1.20", "-0.60", "·"]


@pytest.mark.parametrize("width", [10, 30, 60, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    lines = printed(table([[column / 17 for column in range(17)]]), width).splitlines()
    assert max(cell_len(line) for line in lines) <= max(width, len("layer 0 ") + 6), "one column, at least"
    shown = [number for line in lines if line.startswith("layer 0") for number in line.split()[2:]]
    assert len(shown) == 17
    assert (lines.count("") == 0) == (width == 120)


def test_row_labels_of_any_width_stay_in_line() -> None:
    rows = [" 日本語_0", "\n_1", " a_very_long_token_that_goes_on_2"]
    lines = printed(picture([[1.0]] * 3, row_labels=rows, row_title="token"), 80).splitlines()
    assert len({cell_len(line) for line in lines}) == 1
    assert lines[-2].startswith("token \\n_1 ")


def test_colours_diverge_from_zero_and_can_be_refused() -> None:
    heatmap = table([[0.0, 1.0, -1.0, 0.5]])
    text = printed(heatmap, 80, force_terminal=True, color_system="truecolor")
    assert "48;2;33;102;172m" in text
    assert "48;2;178;24;43m" in text
    assert "48;2;140;174;210m" in text, "half way to blue"
    plain = printed(heatmap, 80, force_terminal=True, no_color=True)
    assert "48;2" not in plain
    assert "+1.00" in plain


def test_rounding_is_not_painted() -> None:
    text = printed(table([[1e-7, -1e-7, 0.0]]), 80, force_terminal=True, color_system="truecolor")
    assert "48;2" not in text
