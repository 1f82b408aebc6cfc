"""The interactive figure shows every number in its place, and leaves its layout to plotly."""

from __future__ import annotations

import importlib
import json

import pytest
from pictures import INF, NAN, SIZES, every_size, picture, shaped, square
from rich.cells import cell_len

from mamba_trace.results.figure import plotly_figure
from mamba_trace.results.heatmap import Heatmap, spelt


def test_the_figure_is_the_matrix_centred_at_zero() -> None:
    heatmap = picture([[0.5, -2.0], [0.0, 1.0], [1.0, 0.25]])
    figure = plotly_figure(heatmap)
    (drawn,) = figure.data
    assert [[*row] for row in drawn.z] == heatmap.values.tolist()
    assert drawn.zmid == 0
    assert (drawn.zmin, drawn.zmax) == (-2.0, 2.0)
    assert drawn.colorscale[0][1] == "rgb(103,0,31)", "red for negative"
    assert drawn.colorscale[5][1] == "rgb(247,247,247)", "white for zero"
    assert drawn.colorscale[-1][1] == "rgb(5,48,97)", "blue for positive"
    assert figure.layout.yaxis.autorange == "reversed", "layer 0 on top"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Position", "Layer")
    assert figure.layout.title.text == "A title"
    assert drawn.colorbar.title.text == "value"


def test_markup_in_labels_titles_and_words_is_shown_as_it_is() -> None:
    given = {"texts": [["<b>"]], "title": "<i>\nb", "row_labels": ["<s>"], "value_title": "a<b"}
    figure = plotly_figure(picture([[1.0]], column_labels=["<|endoftext|>_0"], **given))
    drawn, layout = figure.data[0], figure.layout
    assert layout.xaxis.labelalias == {"0": "&lt;|endoftext|&gt;_0"}
    assert layout.yaxis.labelalias == {"0": "&lt;s&gt;"}
    assert layout.title.text == "&lt;i&gt;<br>b"
    assert drawn.text[0][0] == "&lt;b&gt;"
    assert drawn.colorbar.title.text == "a&lt;b"
    assert drawn.hovertext[0][0].split("<br>")[0] == "layer &lt;s&gt;"
    dollars = plotly_figure(picture([[1.0]], column_labels=["$a$"])).layout.xaxis.labelalias
    assert dollars == {"0": "&#36;a&#36;"}, "no formula, where MathJax is loaded"


def test_a_cell_says_its_row_column_and_value() -> None:
    plain = plotly_figure(picture([[1.0, -0.00004]], value_title="alpha")).data[0]
    assert plain.text[0][0] == "layer 0<br>position Lately_0<br>alpha +1.0000"
    assert plain.text[0][1] == "layer 0<br>position ,_1<br>alpha +0.0000", "no negative zero"
    assert plain.hoverinfo == "text"
    tokens = {"prompt_tokens": ["a", "\n"], "source_tokens": ["a", " b"]}
    compared = plotly_figure(picture([[1.0, 2.0]], **tokens)).data[0].text[0]
    assert compared[0] == "layer 0<br>position 0: token 'a'<br>value +1.0000"
    assert compared[1] == "layer 0<br>position 1: prompt '\\n', source ' b'<br>value +2.0000"


def test_words_of_a_cell_can_be_given() -> None:
    drawn = plotly_figure(picture([[1.0, 2.0]], hover=[["one\ntwo", "<3"]], texts=[[" Emma", "\n"]])).data[0]
    assert [*drawn.hovertext[0]] == ["one<br>two", "&lt;3"]
    assert [*drawn.text[0]] == [" Emma", "\\n"]
    assert drawn.texttemplate == "%{text}"


def test_cells_without_a_number_are_grey_and_infinite_ones_saturate() -> None:
    figure = plotly_figure(picture([[NAN, INF, -INF, 0.0, 2.0]]))
    (drawn,) = figure.data
    content = json.loads(figure.to_json())["data"][0]["z"][0]
    assert content == [None, 2.0, -2.0, 0.0, 2.0]
    assert drawn.hoverongaps
    assert figure.layout.plot_bgcolor == "rgb(190,190,190)"
    assert "rgb(190,190,190)" not in [colour for _, colour in drawn.colorscale]


@every_size
def test_plotly_makes_room_for_titles_labels_and_bars(heatmaps: list[Heatmap]) -> None:
    layout = plotly_figure(heatmaps).layout
    assert layout.margin.autoexpand is None, "plotly's default, under which margins grow"
    for number, heatmap in enumerate(heatmaps, start=1):
        suffix = "" if number == 1 else str(number)
        for axis, labels in (("xaxis", heatmap.column_labels), ("yaxis", heatmap.row_labels)):
            settings = layout[f"{axis}{suffix}"]
            assert settings.automargin
            assert settings.type == "category", "plotly labels as many categories as fit"
            assert (settings.tickmode, settings.tickvals, settings.nticks) == (None, None, None)
            assert list(settings.labelalias) == [str(at) for at in range(len(labels))]
    if len(heatmaps) == 1:
        title, lines = layout.title, layout.title.text.count("<br>") + 1
        assert (title.yref, title.yanchor) == ("container", "top")
        base = (1 - title.y) * layout.height  # of the first line, in pixels from the top
        assert base - 15 >= 25, "below the buttons"
        assert base + 20 * (lines - 1) + 5 <= layout.margin.t, "above the cells"
    assert layout.width <= 1800 or any(heatmap.texts for heatmap in heatmaps)


def test_stacked_pictures_have_room_for_the_labels_and_titles_between_them() -> None:
    figure = plotly_figure(SIZES["three"])
    layout = figure.layout
    height = layout.height - layout.margin.t - layout.margin.b
    assert layout.margin.t >= 2 * 15 + 6, "two lines of 15 pixels above the first"
    end = None  # of the picture above, as a share of the height from below
    for number, (drawn, heatmap) in enumerate(zip(figure.data, SIZES["three"], strict=True), start=1):
        domain = layout[f"yaxis{'' if number == 1 else number}"].domain
        assert (domain[1] - domain[0]) * height == pytest.approx(heatmap.size.height)
        if end is not None:
            longest = max(cell_len(label) for label in SIZES["three"][number - 2].column_labels)
            slanted = 0.7 * 6.6 * longest + 15
            assert (end - domain[1]) * height > slanted + 2 * 15 + 20, "slanted labels, their heading and a title"
        end = domain[0]
        assert drawn.colorbar.y == pytest.approx(sum(domain) / 2)
        assert drawn.colorbar.len == pytest.approx(domain[1] - domain[0])
        assert layout.annotations[number - 1].y == domain[1]
        assert layout.annotations[number - 1].yanchor == "bottom"


@pytest.mark.parametrize(("columns", "longest", "angle"), [(3, 4, 0), (15, 9, 45), (60, 9, 45), (100, 9, 90)])
def test_labels_are_turned_where_columns_are_narrow(columns: int, longest: int, angle: int) -> None:
    heatmap = shaped(2, columns, column_labels=["m" * longest] * columns)
    assert heatmap.size.angle == plotly_figure(heatmap).layout.xaxis.tickangle == angle


def test_pictures_of_a_stack_have_their_own_width() -> None:
    figure = plotly_figure([shaped(2, 30), shaped(2, 15)])
    wide, narrow = figure.layout.xaxis.domain[1], figure.layout.xaxis2.domain[1]
    assert (wide, narrow) == (1, 0.5)
    assert [drawn.colorbar.x for drawn in figure.data] == [1, 0.5]


def test_the_template_of_the_user_is_kept() -> None:
    templates = importlib.import_module("plotly.io").templates
    before = templates.default
    try:
        templates.default = "plotly_dark"
        layout = plotly_figure(shaped(2, 3)).layout
        assert layout.template.layout.paper_bgcolor == templates["plotly_dark"].layout.paper_bgcolor
        assert (layout.paper_bgcolor, layout.font.color, layout.title.font.color) == (None, None, None)
    finally:
        templates.default = before


@pytest.mark.parametrize("columns", [1, 15, 500])
def test_every_label_is_there_for_plotly_to_choose_from(columns: int) -> None:
    labels = [f" a_very_long_token_that_goes_on_{column}" for column in range(columns)]
    figure = plotly_figure(shaped(64, columns, column_labels=labels))
    assert [*figure.data[0].x] == list(range(columns))
    assert [*figure.layout.xaxis.labelalias.values()] == [spelt(label, 24) for label in labels]
    assert [*figure.layout.yaxis.labelalias.values()] == [str(row) for row in range(64)]


def test_equal_labels_stay_columns_of_their_own() -> None:
    drawn = plotly_figure(picture([[1.0, 2.0, 3.0]], column_labels=["a", "a", "b"])).data[0]
    assert [*drawn.x] == [0, 1, 2]
    assert [*drawn.z[0]] == [1.0, 2.0, 3.0]


def test_what_cannot_be_negative_has_a_scale_that_begins_at_zero() -> None:
    drawn = plotly_figure(picture([[0.25, 0.5]], signed=False)).data[0]
    assert (drawn.zmin, drawn.zmid, drawn.zmax) == (0, None, 0.5)
    assert drawn.text[0][1].endswith("value 0.50000"), "without a sign"
    assert drawn.colorscale[0][1] == "rgb(247,251,255)", "white for zero"
    assert drawn.colorscale[-1][1] == "rgb(8,48,107)", "blue for much"


def test_every_picture_of_a_stack_has_its_own_title_axes_and_scale() -> None:
    figure = plotly_figure([picture([[1.0]], title="one"), picture([[-2.0]], title="two")])
    assert [note.text for note in figure.layout.annotations] == ["one", "two"]
    assert [(drawn.xaxis, drawn.yaxis) for drawn in figure.data] == [("x", "y"), ("x2", "y2")]
    assert [drawn.zmax for drawn in figure.data] == [1.0, 2.0]
    assert figure.layout.yaxis2.anchor == "x2"
    assert figure.layout.title.text is None


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="no heatmap to draw"):
        plotly_figure([])


@pytest.mark.parametrize("size", [2, 17, 120, 500])
def test_token_by_token_cells_are_squares(size: int) -> None:
    heatmap = square(size)
    assert heatmap.size.width == heatmap.size.height <= 900
    axis = plotly_figure(heatmap).layout.yaxis if size <= 17 else None
    assert axis is None or (axis.scaleanchor, axis.constrain) == ("x", "domain")
    assert plotly_figure(shaped(2, 3)).layout.yaxis.scaleanchor is None


def test_long_titles_are_broken_to_the_width_of_the_picture() -> None:
    title = plotly_figure(shaped(3, 5, title="word " * 60 + "\nand another line")).layout.title
    lines = title.text.split("<br>")
    assert len(lines) > 4
    assert max(map(len, lines)) * 8 <= 420 + 120
    assert lines[-1] == "and another line"
    assert " ".join(lines) == "word " * 60 + "and another line"
