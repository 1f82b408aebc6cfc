"""Pictures of numbers over positions: an interactive figure, a PNG, and a table for the terminal.

A sweep over layers and positions is read at a glance or not at all, so all three show the same thing: one row
per layer, layer 0 on top, one column per position labelled with its token, and colours from red (negative)
through white (0) to blue (positive) on one scale that is symmetric about 0. A cell that holds no number is
grey, which is no colour of the scale.

plotly draws the figure and matplotlib the PNG (plotly's own PNG export needs a Chrome); both are optional
and imported when first used. The table needs rich alone, and can be read without colours.
"""

from ..files import check_writable
from .heatmap import Heatmap
from .interactive import plotly_figure
from .png import write_png
from .terminal import terminal_table

__all__ = ["Heatmap", "check_writable", "plotly_figure", "terminal_table", "write_png"]
