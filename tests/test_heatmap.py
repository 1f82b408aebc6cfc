"""What every drawing agrees on: one scale around zero, and every label and word in its place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pictures import INF, NAN, picture, shaped
from rich.cells import cell_len

from mamba_trace.results.heatmap import Heatmap, spelt


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([[1.0, -3.0]], 3.0),
        ([[1e-6, 0.0]], 1e-6),
        ([[0.0, 0.0]], 1.0),
        ([[NAN, 0.5]], 0.5),
        ([[INF, -2.0]], 2.0),
        ([[NAN, NAN]], 1.0),
        (torch.tensor([[3, -1]]), 3.0),
        (torch.tensor([[0.5, -0.25]], dtype=torch.bfloat16), 0.5),
        (torch.empty(0, 3), 1.0),
    ],
    ids=["signs", "small", "zeros", "nan", "inf", "nans", "integers", "bfloat16", "empty"],
)
def test_the_scale_is_the_largest_finite_value(values: Any, scale: float) -> None:
    assert picture(values).scale == pytest.approx(scale, rel=1e-6)


def test_the_scale_is_never_finer_than_the_resolution() -> None:
    assert picture([[1e-7]], resolution=0.005).scale == 0.005
    assert picture([[0.5]], resolution=0.005).scale == 0.5


def test_colours_saturate_no_sooner_than_the_saturation() -> None:
    assert picture([[0.5, -0.2]]).limit == 0.5
    assert picture([[0.5, -0.2]], saturation=1.0).limit == 1.0
    assert picture([[3.0, -INF]], saturation=1.0).shades.tolist() == [[3.0, -3.0]]
    assert picture([[0.5, -INF]], saturation=1.0).shades.tolist() == [[0.5, -1.0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"row_labels": ["0"]}, "1 row_labels for values of shape [2, 3]"),
        ({"column_labels": ["a"] * 4}, "4 column_labels for values of shape [2, 3]"),
        ({"prompt_tokens": ["a"]}, "1 prompt_tokens for values of shape [2, 3]"),
        ({"source_tokens": []}, "0 source_tokens for values of shape [2, 3]"),
        ({"texts": [["a"] * 3]}, "texts must hold one string for each of the [2, 3] values"),
        ({"hover": [["a"] * 3, ["a"]]}, "hover must hold one string for each of the [2, 3] values"),
    ],
    ids=["rows", "columns", "prompt", "source", "texts", "hover"],
)
def test_labels_that_do_not_fit_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        shaped(2, 3, **changes)


def test_values_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[rows, columns\], not a tensor of shape \[3\]"):
        Heatmap(values=torch.ones(3), title="", row_title="", row_labels=[], column_labels=[])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" Emma_2", " Emma_2"),
        ("\n_3", "\\n_3"),
        ("a\tb\u200b", "a\\tb\\u200b"),
        ("日本語", "日本語"),
        ("a_very_long_token_that_goes_on_31", "a_very_long_token_th…_31"),
        ("日" * 20 + "_7", "日" * 10 + "…_7"),
    ],
    ids=["space", "newline", "invisible", "wide", "long", "long and wide"],
)
def test_labels_are_spelt_in_one_line_and_keep_their_position(text: str, shown: str) -> None:
    assert spelt(text, 24) == shown
    assert cell_len(spelt(text, 24)) <= 24


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.00012, 0.0005], ["+0.00012000", "+0.00050000"]),
        ([12345.678, -5.0], ["+12346", "-5"]),
        ([1e-9, 0.0], ["+1e-09", "+0"]),
        ([INF, 1.0], ["+inf", "+1.0000"]),
        ([NAN, 1.0], ["not computed", "+1.0000"]),
    ],
    ids=["small", "large", "tiny", "infinite", "not computed"],
)
def test_a_value_is_said_as_finely_as_the_scale_is(values: list[float], words: list[str]) -> None:
    hover = picture(torch.tensor([values], dtype=torch.float64)).hover_texts()[0]
    assert [text.split("value ")[1] for text in hover] == words
