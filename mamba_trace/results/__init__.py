"""What analyses return: numbers with their axes, their figures, and files that hold them.

The interactive figure, the PNG and the terminal's table show the same thing: one row per layer, layer 0 on
top, one column per position labelled with its token, and colours from red (negative) through white (0) to
blue (positive) on a scale that is symmetric about 0, or from white to blue where nothing can be negative. A
cell without a number is grey, a colour that the scale does not have.

plotly draws the figure and matplotlib the PNG (plotly's own PNG export needs Chrome). Both are optional and
are imported when first used. The table needs rich alone and can be read without colours.

In a notebook a result that is the last expression of a cell shows all three (`notebook`).
"""

from .page import Report
from .result import Result

__all__ = ["Report", "Result"]
