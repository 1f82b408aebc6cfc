"""What analyses return: numbers with their axes, their figures, and files that hold them.

A sweep over layers and positions is read at a glance or not at all, so the interactive figure, the PNG and
the table for the terminal show the same thing: one row per layer, layer 0 on top, one column per position
labelled with its token, and colours from red (negative) through white (0) to blue (positive) on one scale
that is symmetric about 0. A cell that holds no number is grey, which is no colour of the scale.

plotly draws the figure and matplotlib the PNG (plotly's own PNG export needs a Chrome); both are optional
and imported when first used. The table needs rich alone, and can be read without colours.
"""

from .page import Report
from .results import Result

__all__ = ["Report", "Result"]
